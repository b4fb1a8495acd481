"""FP8 simulated on a model: which numbers are rounded, which are not, and that all is as before afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from moekit.checkpoint.save import save_model
from moekit.cli.main import main
from moekit.config.balance import BiasBalance
from moekit.config.model import GQAConfig, ModelConfig
from moekit.config.routing import TopKRouting
from moekit.evaluate.text import evaluate_tokens
from moekit.model.fp8 import round_activations, simulated_fp8, weight_roundings
from moekit.model.transformer import Transformer
from moekit.moe.experts import Experts
from moekit.tensors.fp8 import round_blocks, round_rows

TEXT = "the lazy dog jumps over 天地\n" * 12

PLAIN = ("embed_tokens", "lm_head", "mlp.gate.", "norm", "eh_proj", "shared_head", "bias")
"""Words in the names of what DeepSeek-V3's FP8 checkpoint stores unrounded."""


def build(config: ModelConfig) -> Transformer:
    return Transformer(config, torch.Generator().manual_seed(0))


@pytest.fixture(params=["latent", "grouped", "shared gate"])
def config(request: pytest.FixtureRequest, model: Transformer) -> ModelConfig:
    """Every kind of projection there is; matrices of more than one block, and of sides that 128 does not divide."""
    base = replace(model.config, width=136, mtp_depth=1)
    if request.param == "latent":
        attention = replace(base.attention, q_lora_rank=24, bias=True)
        moe = replace(base.moe, expert_width=132)
        return replace(base, attention=attention, moe=moe, dense_layers=(0,))
    grouped = replace(base, attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=8), mtp_depth=0)
    if request.param == "grouped":
        return grouped
    return replace(grouped, moe=replace(grouped.moe, shared_gate=True), dense_layers=())


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_each_matrix_of_a_released_checkpoint_is_rounded_on_its_own(model: Transformer, tmp_path: Path) -> None:
    routing = TopKRouting(score="sigmoid", renormalise=True, epsilon=1e-20, n_groups=2, group_score="top2_sum")
    moe = replace(model.config.moe, routing=routing, expert_width=132, balance=(BiasBalance(),))
    config = replace(model.config, width=136, moe=moe, mtp_depth=1)
    model = build(config)
    save_model(model.state_dict(), config, tmp_path / "exact", None)
    with simulated_fp8(model):
        save_model(model.state_dict(), config, tmp_path / "rounded", None)
    assert json.loads((tmp_path / "exact" / "config.json").read_text("utf-8"))["model_type"] == "deepseek_v3"
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    plain = {name for name in exact if any(word in name for word in PLAIN)}
    assert any("experts.5.gate_proj" in name for name in exact.keys() - plain)
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor if name in plain else round_blocks(tensor)), name
        assert name in plain or not torch.equal(rounded[name], tensor), name


def test_every_matrix_is_rounded_but_those_that_choose_or_read_and_write_tokens(config: ModelConfig) -> None:
    model = build(config)
    kept = ("embedding", "head", "router", "shared_gate", "projection")
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert weight_roundings(model).keys() == {name for name in matrices if name.split(".")[-2] not in kept}


def test_every_product_sees_a_rounded_input_and_nothing_else_does(config: ModelConfig) -> None:
    model = build(config).bfloat16()
    rounded = {name.rpartition(".")[0] for name in weight_roundings(model)}
    seen: dict[str, bool] = {}

    def look(name: str, x: Tensor) -> None:
        seen[name] = torch.equal(x, round_rows(x))

    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    # Hooks run in the order they were registered: these see what the product sees.
    with round_activations(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Experts) or name.endswith("router"):
                module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
        states = model.hidden(ids).states
        model.head(states)
        if model.mtp is not None:
            model.hidden_after_next(states, ids)
    assert {name for name, is_rounded in seen.items() if is_rounded} == rounded
    assert {name.rpartition(".")[2] for name in seen.keys() - rounded} >= {"head", "router"}


def test_the_experts_inner_activation_is_rounded_too(config: ModelConfig) -> None:
    model = build(config)
    layer = model.moe_layers()[0]
    x = torch.randn(5, config.width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), round_activations(model):
        rounded = layer(x).y
        layer.experts.round_inner = None
        exact_inside = layer(x).y
        layer.experts.round_inner = torch.zeros_like
        without = layer(x).y
    part = (exact_inside - without).abs().max()
    assert 0 < (rounded - exact_inside).abs().max() < 0.1 * part


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_what_it_was(config: ModelConfig, fails: bool) -> None:
    model = build(config).eval()
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
        try:
            with simulated_fp8(model):
                assert not torch.equal(model(ids).logits, logits)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert torch.equal(model(ids).logits, logits)
    assert same_bits(before, dict(model.state_dict()))
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(layer.experts.round_inner is None for layer in model.moe_layers())


def test_eval_shows_the_loss_as_stored_and_in_simulated_fp8(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model.state_dict(), model.config, tmp_path / "model", tokenizer)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    command = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "a.txt"), "--sequence-length", "16"]
    assert main([*command, "--json"]) == 0
    (plain,) = json.loads(capsys.readouterr().out)["data"]
    assert main([*command, "--fp8", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["data"]
    found = row.pop("fp8")
    assert row == plain
    ids = np.array(tokenizer.encode(TEXT).ids)
    with simulated_fp8(model):
        expected = evaluate_tokens(model, ids, len(TEXT.encode()), 0, 16, 8).loss
    assert found == {"loss": expected, "difference": expected - plain["loss"]}
    assert found["difference"] != 0
    main([*command, "--fp8"])
    shown = capsys.readouterr().out
    assert "FP8 simulated" in shown and f"{found['difference']:+.4f}" in shown


def test_fp8_changes_the_loss_of_a_model_of_large_weights_by_less_than_a_percent(model: Transformer) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, 400)
    exact = evaluate_tokens(model, tokens, 400, 0, 32, 32).loss
    with simulated_fp8(model):
        rounded = evaluate_tokens(model, tokens, 400, 0, 32, 32).loss
    assert 0 < abs(rounded / exact - 1) < 0.01
