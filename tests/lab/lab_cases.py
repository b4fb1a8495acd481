"""A lab of two variants that takes seconds, with its text."""

import random
from pathlib import Path

SENTENCE = "the expert router of a token chooses and balances its load while each layer sees small weights never"

RUN = """
[model]
vocab_size = 300
width = 32
n_layers = 3
dense_layers = [0]
dense_width = 48
max_positions = 64
attention = { kind = "gqa", n_heads = 2, n_kv_heads = 1, head_dim = 16 }

[model.moe]
expert_width = 16
n_routed = 8
top_k = 2

[data]
sequence_length = 16

[[data.sources]]
path = "PLACE/words.txt"
domain = "words"

[[data.sources]]
path = "PLACE/numbers.txt"
domain = "numbers"
weight = 0.5

[train]
steps = 8
batch = 4
checkpoint_every = 3
validate_every = 8
dtype = "float32"
"""

LAB = """
title = "Two ways"
base = "base.toml"
seeds = [3, 4]

[settings.optim]
lr = 0.01

[variants.plain]
about = "nothing that balances"

[variants.choice]
model.moe.routing = { score = "sigmoid", renormalise = true }
model.moe.top_k = 3
"""


def documents(vocabulary: list[str], seed: int) -> str:
    rng = random.Random(seed)
    return "\n\n\n\n".join(" ".join(rng.choices(vocabulary, k=60)) for _ in range(30))


def write_lab(folder: Path, lab: str = LAB, run: str = RUN) -> Path:
    """`lab.toml`, `base.toml` and their text in the folder."""
    (folder / "words.txt").write_text(documents(SENTENCE.split(), 0), "utf-8")
    (folder / "numbers.txt").write_text(documents([str(n) for n in range(20)], 1), "utf-8")
    (folder / "base.toml").write_text(run.replace("PLACE", folder.as_posix()), "utf-8")
    (folder / "lab.toml").write_text(lab, "utf-8")
    return folder / "lab.toml"
