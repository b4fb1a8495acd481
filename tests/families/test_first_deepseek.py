"""DeepSeekMoE-16B's family, which transformers lacks, against the paper."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.checkpoint.load import load
from moekit.checkpoint.save import save_model
from moekit.config.families import family_for
from oracle import deepseek_v1 as oracle
from oracle.compare import relative_error


def described(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    n_kv_heads = rng.choice([1, 2])
    n_heads = n_kv_heads * rng.choice([1, 3])
    return {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "attention_bias": rng.random() < 0.5,
        "first_k_dense_replace": rng.choice([0, 1, 4]),
        "hidden_act": "silu",
        "hidden_size": n_heads * rng.choice([2, 6]),
        "intermediate_size": 10,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 5,
        "moe_layer_freq": rng.choice([1, 1, 2]),
        "n_routed_experts": 6,
        "n_shared_experts": rng.choice([None, 1, 2]),
        "norm_topk_prob": rng.random() < 0.5,
        "num_attention_heads": n_heads,
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "num_hidden_layers": 3,
        "num_key_value_heads": n_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000.0,
        "scoring_func": "softmax",
        "tie_word_embeddings": rng.random() < 0.3,
        "vocab_size": 17,
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of such a model, as the released files name them."""
    width, head_dim = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    kv_width = config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        for part, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            found[f"{at}.self_attn.{part}_proj.weight"] = (rows, width)
            if config["attention_bias"]:
                found[f"{at}.self_attn.{part}_proj.bias"] = (rows,)
        found |= feed_forward(config, layer, f"{at}.mlp")
    return found


def feed_forward(config: dict[str, Any], layer: int, place: str) -> dict[str, tuple[int, ...]]:
    width = config["hidden_size"]

    def block(inner: int, name: str = "") -> dict[str, tuple[int, ...]]:
        halves = {f"{place}{name}.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        return halves | {f"{place}{name}.down_proj.weight": (width, inner)}

    if layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"]:
        return block(config["intermediate_size"])
    found: dict[str, tuple[int, ...]] = {f"{place}.gate.weight": (config["n_routed_experts"], width)}
    for expert in range(config["n_routed_experts"]):
        found |= block(config["moe_intermediate_size"], f".experts.{expert}")
    if config["n_shared_experts"]:
        found |= block(config["n_shared_experts"] * config["moe_intermediate_size"], ".shared_experts")
    return found


def written(config: dict[str, Any], folder: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes(config).items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return weights


@torch.no_grad()
@pytest.mark.parametrize("seed", range(16))
def test_a_hand_written_folder_computes_what_the_paper_says(seed: int, tmp_path: Path) -> None:
    config = described(seed)
    # The released code divides by the sum of several weights alone.
    normed = config["norm_topk_prob"] and config["num_experts_per_tok"] > 1
    weights = written(config, tmp_path, seed)
    model, ids = load(tmp_path), torch.randint(0, 17, (11,), generator=torch.Generator().manual_seed(seed))
    expected = oracle.logits(ids.tolist(), weights, config | {"norm_topk_prob": normed})
    assert relative_error(model(ids[None]).logits[0], expected) <= 1e-4
    cache = model.new_cache(len(ids))
    steps = [model(token.view(1, 1), cache).logits[0] for token in ids]
    assert relative_error(torch.cat(steps), expected) <= 1e-4


@pytest.mark.parametrize("seed", range(16))
def test_it_is_written_tensor_for_tensor_as_it_was_read(seed: int, tmp_path: Path) -> None:
    config = described(seed)
    weights = written(config, tmp_path, seed)
    model = load(tmp_path)
    assert family_for(model.config, prefer="deepseek").model_type == "deepseek"
    save_model(model.state_dict(), model.config, tmp_path / "ours", None)
    again = load_file(tmp_path / "ours" / "model.safetensors")
    if json.loads((tmp_path / "ours" / "config.json").read_text("utf-8"))["model_type"] == "deepseek":
        assert again.keys() == weights.keys()
    for name in again.keys() & weights.keys():
        assert torch.equal(again[name], weights[name]), name
    found = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
