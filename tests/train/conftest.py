import random
from pathlib import Path

import pytest
from training_cases import small_model

from moekit.config.run import DataConfig, OptimConfig, RunConfig, Source, TrainSection

WORDS = ["the", "a", "expert", "router", "token", "of", "chooses", "load", "weight", "layer", "sees", "never"]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=120)) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n\n\n".join(texts), "utf-8")
    return path


@pytest.fixture
def small_run(corpus_file: Path) -> RunConfig:
    return RunConfig(
        model=small_model(),
        data=DataConfig(sources=(Source(path=str(corpus_file), domain="words"),), sequence_length=16),
        optim=OptimConfig(warmup_steps=3, lr=0.01),
        train=TrainSection(steps=12, batch=8, checkpoint_every=4, validate_every=6, dtype="float32"),
        seed=1,
    )
