"""Routing never builds a tensor of tokens x experts x capacity."""

import subprocess
import sys

SCRIPT = """
import resource
import torch
from moekit.config.balance import BiasBalance, CommunicationLoss, SequenceLoss
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.moe.balance import active_rules
from moekit.moe.layer import MoE

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

rules = (BiasBalance(), SequenceLoss(), CommunicationLoss(n_devices=8, max_devices=4))
routing = TopKRouting(score="sigmoid", renormalise=True, n_groups=8, top_k_groups=4, group_score="top2_sum")
config = MoEConfig(width=8, expert_width=4, n_routed=256, n_shared=0, top_k=8, routing=routing, balance=rules)
layer = MoE(config)
layer(torch.randn(1, 16, 8)).y.sum().backward()
before = peak()
y, routing = layer(torch.randn(16, 4096, 8))
losses = [loss for _, rule in active_rules(layer.balance) if (loss := rule.loss(routing)) is not None]
(y.sum() + sum(losses)).backward()
print(peak() - before)
"""


def test_routing_65536_tokens_over_256_experts_takes_less_than_one_and_a_half_gigabytes() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5e9
