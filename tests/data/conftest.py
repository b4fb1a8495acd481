"""A small tokenizer and a source of text that several tests share."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moekit.data.tokenizer import train_tokenizer

WORDS = (
    "the",
    "quick",
    "brown fox",
    "jumps over",
    "lazy",
    "def return",
    "self",
    "神",
    "天地を",
    "創造",
    "2024",
    "don't",
)

Story = Callable[..., str]


@pytest.fixture(scope="session")
def story() -> Story:
    """Makes some text that differs from seed to seed."""

    def make(seed: int, words: int = 60) -> str:
        pick = random.Random(seed)
        return " ".join(pick.choice(WORDS) for _ in range(words)) + f"\n    line({seed})\n"

    return make


@pytest.fixture(scope="session")
def tokenizer(story: Story) -> Tokenizer:
    return train_tokenizer([story(seed) for seed in range(50)], 320)


@pytest.fixture
def folder(tmp_path: Path, story: Story) -> Path:
    """A folder of forty documents."""
    place = tmp_path / "text"
    place.mkdir()
    for seed in range(40):
        (place / f"{seed:02}.txt").write_text(story(seed), encoding="utf-8")
    return place
