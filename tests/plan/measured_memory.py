"""Measures this process: python measured_memory.py JSON prints the bytes that steps, or generation, take at their peak.

JSON holds `run`, the tables of a run's configuration; with `prompt` = [sequences, length] text is generated, else three
optimizer steps are done. What importing and a first tiny step take is not counted.
"""

import json
import re
import sys
from pathlib import Path

import torch

from moekit.config.codec import update
from moekit.config.run import RunConfig
from moekit.generation import generate as generation
from moekit.model.transformer import Transformer
from moekit.train.precision import compute_dtype
from moekit.train.step import Stepper

STEPS = 3


def resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) * 1024


def train(run: RunConfig) -> None:
    stepper = Stepper(run, Transformer(run.model))
    for number in range(STEPS):
        ids = torch.randint(0, run.model.vocab_size, (run.train.batch, run.data.sequence_length + 2))
        stepper.step(ids, number)


def generate(run: RunConfig, sequences: int, length: int) -> None:
    torch.set_default_dtype(compute_dtype("auto", "cpu"))
    model = Transformer(run.model)
    torch.set_default_dtype(torch.float32)
    generation.generate(model, torch.randint(0, run.model.vocab_size, (sequences, length)), 4)


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    run = update(RunConfig(), asked["run"])
    tiny = {"width": 64, "n_layers": 2, "vocab_size": 64}
    first = update(run, {"model": tiny, "data": {"sequence_length": 16}, "train": {"batch": 2}})
    work, sizes = (generate, asked["prompt"]) if "prompt" in asked else (train, [])
    work(first, *(2 for _ in sizes))
    before = resident("VmRSS")
    work(run, *sizes)
    sys.stdout.write(str(resident("VmHWM") - before))


if __name__ == "__main__":
    main()
