"""The work that the planner predicts, done for real: generating and training."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moekit.config.model import ModelConfig
from moekit.config.run import OptimConfig, RunConfig, TrainSection
from moekit.generation.generate import extend
from moekit.generation.sampling import SamplingConfig
from moekit.measure.clock import least_seconds
from moekit.measure.machine import DTYPES
from moekit.measure.models import random_model
from moekit.train.step import Stepper


class Rates(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


def generator(config: ModelConfig, dtype: str, batch: int, prompt: int, new: int) -> Callable[[], Rates]:
    """What continues `batch` prompts of `prompt` tokens by `new` ones; it was done once."""
    model = random_model(config, DTYPES[dtype])
    ids = torch.randint(0, config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
    greedy = SamplingConfig(temperature=0.0)

    def generate() -> Rates:
        speed = extend(model, ids, new, greedy).speed
        return Rates(speed.prefill_tokens_per_s or 0.0, speed.decode_tokens_per_s or 0.0)

    generate()
    return generate


def best_rates(generate: Callable[[], Rates], tries: int) -> Rates:
    """The best of each kind."""
    return Rates(*map(max, zip(*(generate() for _ in range(tries)), strict=True)))


def train_steps(config: ModelConfig, dtype: str, optimizer: str, batch: int, length: int, steps: int = 4) -> float:
    """Do optimizer steps on `batch` sequences of `length` tokens; returns tokens per second of the best."""
    optim = OptimConfig(kind=optimizer)  # type: ignore[arg-type]
    run = RunConfig(model=config, optim=optim, train=TrainSection(dtype=dtype, batch=batch, steps=100))  # type: ignore[arg-type]
    stepper = Stepper(run, random_model(config, torch.float32))
    ids = torch.randint(0, config.vocab_size, (batch, length + 2), generator=torch.Generator().manual_seed(1))
    return batch * length / least_seconds(lambda: stepper.step(ids, 50), steps, warm=1)
