"""No selection rule builds a tensor of tokens x experts x capacity."""

import subprocess
import sys

import pytest
from selection_cases import CASES, Case

SCRIPT = """
import resource, sys
import torch
from moekit.config import routing as rules
from moekit.config.moe import MoEConfig
from moekit.moe.layer import MoE

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

name, settings, top_k, training = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
rule = getattr(rules, name)(**settings)
config = MoEConfig(width=8, expert_width=4, n_routed=256, n_shared=0, top_k=top_k, routing=rule)
layer = MoE(config).train(training)
tasks = torch.zeros(16, dtype=torch.long)
layer(torch.randn(1, 16, 8), None, torch.randint(50, (1, 16)), tasks[:1]).y.sum().backward()
before = peak()
y, routing = layer(torch.randn(16, 4096, 8), None, torch.randint(50, (16, 4096)), tasks)
layer.after_step(layer.observe(routing))
y.sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=Case.name)
@pytest.mark.parametrize("training", [True, False])
def test_routing_65536_tokens_over_256_experts_takes_less_than_one_and_a_half_gigabytes(
    case: Case, training: bool
) -> None:
    top_k = {1: 1, 2: 8}[case.config().top_k] if case.rule().kind != "gshard" else 2
    command = [sys.executable, "-c", SCRIPT, case.cls.__name__, repr(case.settings), str(top_k), str(training)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e9
