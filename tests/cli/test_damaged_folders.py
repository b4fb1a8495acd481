"""300 damaged model folders: every verb says in one line what is wrong, exits with 2, and writes nothing."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.checkpoint.header import write_header
from moekit.checkpoint.save import save
from moekit.cli.main import main
from moekit.config.balance import BiasBalance
from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.data.tokenizer import train_tokenizer
from moekit.model.transformer import Transformer

INDEX = "model.safetensors.index.json"

VOCABULARY = 270


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    config = ModelConfig(
        vocab_size=VOCABULARY,
        width=16,
        n_layers=2,
        dense_width=12,
        attention=MLAConfig(n_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
        moe=MoEConfig(
            expert_width=8,
            n_routed=4,
            top_k=2,
            routing=TopKRouting(score="sigmoid", renormalise=True, epsilon=1e-20, group_score="top2_sum"),
            balance=(BiasBalance(),),
        ),
        max_positions=64,
    )
    tokenizer = train_tokenizer(["one text, and the same text again"] * 9, VOCABULARY)
    model = Transformer(config, torch.Generator().manual_seed(0))
    save(model, path / "single", tokenizer)
    save(model, path / "sharded", tokenizer, shard_bytes=9000)
    return path


def shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def pick(rng: random.Random, data: dict[str, Any]) -> str:
    return rng.choice(sorted(data))


def cut(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def lengthen(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    file.write_bytes(file.read_bytes() + bytes(rng.randint(1, 99)))


def promise_more_header(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    content = file.read_bytes()
    file.write_bytes(rng.choice([len(content), 2**40, 2**64 - 1]).to_bytes(8, "little") + content[8:])


def overlap(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = pick(rng, {key: value for key, value in header.items() if value.get("data_offsets", [0])[0]})
    header[name]["data_offsets"] = [place - 4 for place in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def other_shape(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    edit_tensors(shard(folder, rng), change)


def lose_a_tensor(folder: Path, rng: random.Random) -> None:
    edit_tensors(shard(folder, rng), lambda tensors: tensors.pop(pick(rng, tensors)))


def add_a_tensor(folder: Path, rng: random.Random) -> None:
    edit_tensors(shard(folder, rng), lambda tensors: tensors.update(stray=torch.ones(2)))


def whole_numbers(folder: Path, rng: random.Random) -> None:
    edit_tensors(
        shard(folder, rng), lambda tensors: tensors.update({(name := pick(rng, tensors)): tensors[name].int()})
    )


def not_finite(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        # Every expert serves some token of the texts below; the first tensors are always read.
        name = rng.choice(sorted(name for name in tensors if "experts" not in name))
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice([float("nan"), float("inf")])

    edit_tensors(shard(folder, rng), change)


def lose_a_field(folder: Path, rng: random.Random) -> None:
    needed = ["model_type", "hidden_size", "num_hidden_layers", "kv_lora_rank", "n_routed_experts", "vocab_size"]
    edit_json(folder / "config.json", lambda data: data.pop(rng.choice(needed)))


def strange_field(folder: Path, rng: random.Random) -> None:
    key = rng.choice(["surprise", "attention_sinks", "sliding_window", "experts"])
    edit_json(folder / "config.json", lambda data: data.update({key: rng.choice([1, "x", [1], {"a": 1}, 0.5])}))


def other_size(folder: Path, rng: random.Random) -> None:
    key = rng.choice(["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "kv_lora_rank"])
    value = rng.choice([0, -1, 2**40, 10**400, 17, "many", 1.5, None, True])
    edit_json(folder / "config.json", lambda data: data.update({key: value}))


def other_experts(folder: Path, rng: random.Random) -> None:
    key = rng.choice(["n_routed_experts", "moe_intermediate_size"])
    edit_json(folder / "config.json", lambda data: data.update({key: rng.choice([0, 5, 2**40, "x"])}))


def no_json(folder: Path, rng: random.Random) -> None:
    name = rng.choice(["config.json", "generation_config.json", "tokenizer.json"])
    text = (folder / name).read_text()
    (folder / name).write_text(
        rng.choice(["", "[]", "\0" * 99, "[" * 99_999, text[: rng.randrange(1, len(text) // 2)]])
    )


def pickled(folder: Path, rng: random.Random) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    (folder / rng.choice(["pytorch_model.bin", "model.pt", "consolidated.00.pth"])).write_bytes(b"\x80\x02}q\x00.")


def no_weights(folder: Path, rng: random.Random) -> None:
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()


def too_many_ids(folder: Path, rng: random.Random) -> None:
    def change(data: dict[str, Any]) -> None:
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        data["added_tokens"].append({"id": VOCABULARY + rng.randrange(9), "content": "<|new|>"} | token)

    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    count = len(vocabulary["model"]["vocab"])
    edit_json(folder / "tokenizer.json", change)
    if count < VOCABULARY:
        words = {f"word{number}": number for number in range(count, VOCABULARY + 1)}
        edit_json(folder / "tokenizer.json", lambda data: data["model"]["vocab"].update(words))


def index_outside(folder: Path, rng: random.Random) -> None:
    name = rng.choice(["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", "missing.safetensors", 3])
    edit_json(folder / INDEX, lambda data: data["weight_map"].update({pick(rng, data["weight_map"]): name}))


def lose_a_shard(folder: Path, rng: random.Random) -> None:
    shard(folder, rng).unlink()


def twice(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    edit_tensors(second, lambda tensors: tensors.update([rng.choice(sorted(load_file(first).items()))]))


def strange_index(folder: Path, rng: random.Random) -> None:
    (folder / INDEX).write_text(rng.choice(["", "{}", "[]", '{"weight_map": 1}', '{"weight_map": {}}', "{" * 99]))


def strange_header(folder: Path, rng: random.Random) -> None:
    file = shard(folder, rng)
    name = pick(rng, load_file(file))
    header = bytearray(write_header([(name, "F32", (rng.choice([2**60, 3, 0]),))]))
    file.write_bytes(bytes(header) + bytes(rng.randrange(1, 8)))


DAMAGE = (
    cut,
    lengthen,
    promise_more_header,
    overlap,
    other_shape,
    lose_a_tensor,
    add_a_tensor,
    whole_numbers,
    not_finite,
    lose_a_field,
    strange_field,
    other_size,
    other_experts,
    no_json,
    pickled,
    no_weights,
    too_many_ids,
    strange_header,
)

SHARD_DAMAGE = (index_outside, lose_a_shard, twice, strange_index, cut, lose_a_tensor, not_finite)

CASES = [("single", damage, seed) for damage in DAMAGE for seed in range(12)]
CASES += [("sharded", damage, seed) for damage in SHARD_DAMAGE for seed in range(12)]

TEXT = "one text, and the same text again"


def verbs(folder: Path, out: Path) -> list[list[str]]:
    return [
        ["inspect", str(folder)],
        ["generate", str(folder), "--prompt", TEXT, "--max-new-tokens", "2"],
        ["convert", str(folder), str(out), "--dtype", "bfloat16"],
    ]


@pytest.mark.parametrize("damage", sorted({damage for _, damage, _ in CASES}, key=lambda damage: damage.__name__))
def test_every_verb_refuses_it(
    damage: Callable[..., None], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, _, seed in (case for case in CASES if case[1] is damage):
        folder = Path(shutil.copytree(whole / kind, tmp_path / f"{kind}-{seed}"))
        damage(folder, random.Random(f"{kind} {seed}"))
        before = sorted(entry.name for entry in tmp_path.iterdir())
        for arguments in verbs(folder, tmp_path / "out"):
            if damage is no_json and arguments[0] == "inspect":
                continue
            status = main(arguments)
            said = capsys.readouterr().err.strip().splitlines()
            errors = [line for line in said if line.startswith("error: ")]
            assert (status, len(errors)) == (2, 1), (arguments[0], kind, seed, status, said)
            assert "Traceback" not in "".join(said)
            assert sorted(entry.name for entry in tmp_path.iterdir()) == before, arguments[0]


def test_there_are_300_of_them() -> None:
    assert len(CASES) == 300
