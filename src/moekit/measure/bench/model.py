"""Training a whole model: tokens a second and peak memory, each program in a process of its own."""

from collections.abc import Callable, Iterator

import torch

from moekit.config.run import OptimConfig, RunConfig, TrainSection
from moekit.measure.bench.processes import Job, in_processes
from moekit.measure.bench.row import Row, Value, rate_row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.shapes import HubFields, model_config
from moekit.measure.bench.turns import OURS, take_turns
from moekit.measure.peers import transformers
from moekit.model.transformer import Transformer
from moekit.plan.from_config import blueprint_of
from moekit.train.step import Stepper

DTYPE = "bfloat16"
"""What is computed in; the weights that the optimizer moves are float32 in both programs."""


def training(setting: Setting) -> Iterator[Row]:
    """Steps of AdamW in turn, one at a time, while both processes live. The peak counts the libraries, too."""
    sizes = setting.sizes
    how = (dict(sizes.model), DTYPE, sizes.batch, sizes.length)
    jobs = [Job(OURS, "", training_step, how)]
    if transformers.NAME in setting.peers:
        fields, *rest = how
        jobs += [
            Job(transformers.NAME, back_end, transformers.training_step, (fields, back_end, *rest))
            for back_end in transformers.back_ends(sizes.batch * sizes.length)
        ]
    with in_processes(jobs, float(sizes.batch * sizes.length)) as processes:
        timings = take_turns([*processes], setting.pace)
        peaks = [
            Value(timing.name, worker.peak_bytes() / 1e9)
            for timing, worker in zip(timings, processes.values(), strict=True)
        ]
    what = f"{_parameters(sizes.model) / 1e6:.0f} M parameters, AdamW, {DTYPE}, {sizes.batch} x {sizes.length} tokens"
    yield rate_row("model-train", "train", f"model, training: {what}", "tokens/s", timings)
    ours, *others = peaks
    label = "the same: most memory of the process"
    yield Row("model-train-memory", "train", label, "GB", ours.value, tuple(others), less_is_better=True)


def training_step(fields: HubFields, dtype: str, batch: int, length: int) -> Callable[[], object]:
    """One step of moekit's `Stepper`, which also clips the gradient and moves the selection bias."""
    torch.manual_seed(0)
    config = model_config(fields)
    section = TrainSection(dtype=dtype, batch=batch, steps=100)  # type: ignore[arg-type]
    stepper = Stepper(RunConfig(model=config, optim=OptimConfig(kind="adamw"), train=section), Transformer(config))
    ids = torch.randint(0, config.vocab_size, (batch, length + 2))
    return lambda: stepper.step(ids, 50)


def _parameters(fields: HubFields) -> int:
    return sum(weight.stored for weight in blueprint_of(model_config(fields), "", "").weights)
