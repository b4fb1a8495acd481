"""Multi-gate mixture of experts (Ma et al., KDD 2018): the model of its synthetic data. All experts always run."""

from collections.abc import Callable, Mapping

from moekit.plan.blueprint import Blueprint, Mixture
from moekit.plan.bulk import Bulk

INPUTS, EXPERTS, HIDDEN, TOWER, TASKS = 100, 8, 16, 8, 2


def mmoe_synthetic(name: str) -> Blueprint:
    """Eight experts of one layer, and for each of two tasks a gate and a tower."""
    notes = (
        "published: 13,056 parameters in experts and towers (100 x 16 x 8 + 16 x 8 x 2); each task's gate, 8 x 100, "
        "is counted as its router; no biases, no outputs of the towers",
    )
    bulk = Bulk()
    bulk.add("router", "gates", (EXPERTS, INPUTS), TASKS, blocks=False)
    bulk.add("routed", "experts", (HIDDEN, INPUTS), EXPERTS)
    bulk.add("dense", "towers", (TOWER, HIDDEN), TASKS)
    mixture = Mixture(1, EXPERTS, EXPERTS, HIDDEN * INPUTS, 0)
    return Blueprint(name, "mmoe", INPUTS, 0, 1, 1, tuple(bulk.weights), (), (mixture,), notes=notes)


MODELS: Mapping[str, Callable[[str], Blueprint]] = {"mmoe-synthetic": mmoe_synthetic}
