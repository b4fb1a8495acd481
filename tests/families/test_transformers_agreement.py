"""moekit and transformers open each other's folders to the same model, whatever the family and its shape."""

import json
from pathlib import Path

import pytest
import torch
from family_shapes import EAGER, SHAPES, ids_of, their_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.checkpoint.load import load
from moekit.checkpoint.save import save_model
from moekit.config.families import family_for
from moekit.generation.generate import generate
from moekit.model.transformer import Transformer
from oracle.compare import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

SEEDS = 16
CASES = [(family, seed) for family in SHAPES for seed in range(SEEDS)]
MANY = [(family, seed) for family in SHAPES for seed in range(SEEDS, 200)]


def opened(theirs: PreTrainedModel, folder: Path) -> Transformer:
    theirs.save_pretrained(folder)
    return load(folder, dtype="float32")


def decoded(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Logits from a cache: a short prompt at once, then token by token."""
    cache = model.new_cache(ids.shape[1])
    pieces = [ids[:, :3], *ids[:, 3:].split(1, dim=1)]
    return torch.cat([model(piece, cache).logits for piece in pieces], dim=1)


@torch.no_grad()
def check_we_open_theirs(family: str, seed: int, folder: Path) -> None:
    theirs, ids = their_model(family, seed), ids_of(seed)
    ours = opened(theirs, folder)
    expected = theirs(input_ids=ids).logits
    assert relative_error(ours(ids).logits, expected) <= 1e-4
    assert relative_error(decoded(ours, ids), expected) <= 1e-4


@torch.no_grad()
def check_they_open_ours(family: str, seed: int, folder: Path) -> None:
    theirs, ids = their_model(family, seed), ids_of(seed)
    ours = opened(theirs, folder / "theirs")
    assert family_for(ours.config, prefer=family).model_type == family
    save_model(ours.state_dict(), ours.config, folder / "ours", None)
    written = json.loads((folder / "ours" / "config.json").read_text("utf-8"))["model_type"]
    assert written == family_for(ours.config).model_type != "moekit"
    again, found = AutoModelForCausalLM.from_pretrained(
        folder / "ours", dtype=torch.float32, output_loading_info=True, **EAGER
    )
    assert not any(found.values()), found
    assert relative_error(again(input_ids=ids).logits, theirs(input_ids=ids).logits) <= 1e-4
    check_same_tensors(load(folder / "ours"), ours)


def check_same_tensors(found: Transformer, expected: Transformer) -> None:
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_we_open_their_folder_to_the_same_logits(family: str, seed: int, tmp_path: Path) -> None:
    check_we_open_theirs(family, seed, tmp_path)


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_they_open_our_folder_to_the_same_logits_and_we_bit_for_bit(family: str, seed: int, tmp_path: Path) -> None:
    check_they_open_ours(family, seed, tmp_path)


@pytest.mark.parametrize("family", SHAPES)
def test_both_continue_a_text_alike(family: str, tmp_path: Path) -> None:
    theirs, ids = their_model(family, SEEDS), ids_of(SEEDS, 5)
    ours = opened(theirs, tmp_path)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(ours, ids, max_new_tokens=12, temperature=0.0), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), MANY)
def test_many_more_shapes_agree(family: str, seed: int, tmp_path: Path) -> None:
    check_we_open_theirs(family, seed, tmp_path / "first")
    check_they_open_ours(family, seed, tmp_path)
