"""Capacities never build a tensor of tokens x experts x capacity."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from moekit.config import capacity
from moekit.config.moe import MoEConfig
from moekit.moe.layer import MoE

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

limit = eval(sys.argv[1], vars(capacity))
layer = MoE(MoEConfig(width=8, expert_width=4, n_routed=256, n_shared=0, top_k=8, capacity=limit))
layer(torch.randn(1, 16, 8)).y.sum().backward()
x = torch.randn(16, 4096, 8)
if sys.argv[2] == "alike":
    x = x[:, :1].expand(-1, 4096, -1) + 0.01 * x
before = peak()
layer(x).y.sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("capacity", "tokens"),
    [
        ("ExpertCapacity(drop='batch_priority', dropped='next_best')", "alike"),
        ("ExpertCapacity(factor=1.0, scope='sequence', drop='random', dropped='next_best')", "any"),
        ("DynamicCapacity(drop='probability')", "any"),
        ("DeviceCapacity(n_devices=8)", "any"),
    ],
)
def test_65536_tokens_over_256_experts_take_less_than_one_and_a_half_gigabytes(capacity: str, tokens: str) -> None:
    command = [sys.executable, "-c", SCRIPT, capacity, tokens]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e9
