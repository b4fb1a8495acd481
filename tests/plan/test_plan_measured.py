import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moekit.config.codec import update
from moekit.config.run import RunConfig
from moekit.plan.blueprint import Blueprint
from moekit.plan.from_config import blueprint_of
from moekit.plan.memory import Training, memory
from moekit.plan.precision import FORMATS, parse_precision
from moekit.train.precision import compute_dtype

LATENT = {
    "model": {
        "vocab_size": 8192,
        "width": 384,
        "n_layers": 6,
        "dense_width": 1536,
        "attention": {"kind": "mla", "n_heads": 6, "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64},
        "moe": {"n_routed": 32, "n_shared": 1, "top_k": 4, "expert_width": 256},
    },
    "data": {"sequence_length": 512},
    "train": {"batch": 8},
}
GROUPED = {
    "model": {
        "vocab_size": 8192,
        "width": 512,
        "n_layers": 8,
        "dense_layers": [],
        "attention": {"kind": "gqa", "n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
        "moe": {"n_routed": 16, "n_shared": 0, "top_k": 2, "expert_width": 512},
    },
    "data": {"sequence_length": 1024},
    "train": {"batch": 8},
    "optim": {"kind": "adamw"},
}
MANY_WORDS = {
    "model": {
        "vocab_size": 100_000,
        "width": 384,
        "n_layers": 4,
        "dense_width": 1024,
        "attention": {"kind": "mla", "n_heads": 6, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "v_head_dim": 64},
        "moe": {"n_routed": 16, "n_shared": 2, "top_k": 4, "expert_width": 192},
    },
    "data": {"sequence_length": 256},
    "train": {"batch": 8},
}
RUNS = {"latent": LATENT, "grouped": GROUPED, "many words": MANY_WORDS}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc then returns every freed block of a process that does not train."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"),
]


def peak(asked: dict[str, Any], environment: dict[str, str]) -> int:
    script = str(Path(__file__).with_name("measured_memory.py"))
    done = subprocess.run(
        [sys.executable, script, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


def shape_of(run: RunConfig) -> Blueprint:
    return blueprint_of(run.model, "measured", "moekit")


def planned(run: RunConfig) -> Any:
    form = FORMATS[str(compute_dtype("auto", "cpu")).removeprefix("torch.")]
    training = Training(run.train.batch, run.data.sequence_length, run.optim.kind, form)
    precision = parse_precision("bfloat16")
    return memory(shape_of(run), precision, FORMATS["bfloat16"], 8, 1, training)


@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_takes_what_is_planned(name: str) -> None:
    section = planned(update(RunConfig(), RUNS[name]))
    measured = peak({"run": RUNS[name]}, {})
    assert section.value("training.total") - section.value("library") == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", RUNS)
def test_generation_takes_what_is_planned(name: str) -> None:
    model = {**RUNS[name]["model"], "n_layers": 24}
    run, form = update(RunConfig(), {"model": model}), FORMATS[str(compute_dtype("auto", "cpu")).removeprefix("torch.")]
    section = memory(shape_of(run), parse_precision(form.name), form, 1028, 4)
    measured = peak({"run": {"model": model}, "prompt": [4, 1024]}, GIVES_BACK)
    assert section.value("total") - section.value("library") == pytest.approx(measured, rel=0.05)
