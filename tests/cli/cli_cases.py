"""A run file for a very small model, its text, and what a refusal looks like."""

import random
from pathlib import Path
from typing import NamedTuple, Protocol

SENTENCE = "the expert router of a token chooses and balances its load while each layer sees small weights never"

RUN = """
seed = 1

[model]
vocab_size = 300
width = 32
n_layers = 2
dense_width = 48
max_positions = 128
attention = { kind = "mla", n_heads = 2, kv_lora_rank = 16, qk_nope_head_dim = 8, qk_rope_head_dim = 8, v_head_dim = 8 }

[model.moe]
expert_width = 16
n_routed = 8
top_k = 2
routing = { score = "sigmoid", renormalise = true, epsilon = 1e-20 }
balance = { bias = { rate = 0.01 } }

[data]
sequence_length = 16

[[data.sources]]
path = "words.txt"
domain = "words"

[train]
steps = 4
batch = 4
checkpoint_every = 2
validate_every = 4
dtype = "float32"
"""


class Said(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


class Moekit(Protocol):
    """`moekit(...)` in this process."""

    def __call__(self, *arguments: str) -> Said: ...


def words(seed: int = 0) -> str:
    """Documents of these words, as a text file separates them."""
    rng = random.Random(seed)
    return "\n\n\n\n".join(" ".join(rng.choices(SENTENCE.split(), k=60)) for _ in range(20))


def assert_refused(said: Said, *words: str) -> None:
    """The law of bad input: status 2, nothing on stdout, one line of error and at most one hint after it."""
    assert said.status == 2, said
    assert said.out == ""
    assert "Traceback" not in said.err
    lines = said.err.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert all(line.startswith("hint: ") for line in lines[errors[0] + 1 :])
    assert len(lines) - errors[0] <= 2
    for word in words:
        assert word in said.err, said.err


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is below a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
