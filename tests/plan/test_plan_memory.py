from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_shapes import published, windowed

from moekit.config.codec import update
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.kernels import experts
from moekit.kernels.experts import computes
from moekit.model.transformer import Transformer
from moekit.moe.routing import Routing
from moekit.plan import activations
from moekit.plan.activations import Batch, saved
from moekit.plan.from_config import blueprint_of
from moekit.plan.memory import Layout, Training, cache_bytes, kv_cache, memory
from moekit.plan.precision import FORMATS, parse_precision
from moekit.plan.training import is_muon, training_bytes
from moekit.train import cross_entropy
from moekit.train.objective import Rows, objective
from moekit.train.optimizer import muon_groups

BF16 = FORMATS["bfloat16"]
GQA = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
MLA = {"kind": "mla", "n_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64, "v_head_dim": 32}


def small(attention: dict[str, Any], **changes: Any) -> ModelConfig:
    shape = {"vocab_size": 1000, "width": 128, "n_layers": 3, "dense_width": 512, "attention": attention}
    mixture = {"n_routed": 16, "n_shared": 1, "top_k": 4, "expert_width": 64}
    return update(ModelConfig(), {**shape, "moe": mixture, **changes})


@pytest.mark.parametrize(
    ("name", "elements"), [("deepseek-v3", 35_136), ("deepseek-v2", 34_560), ("deepseek-v2-lite", 15_552)]
)
def test_cached_numbers_are_those_of_the_papers(name: str, elements: int) -> None:
    """arXiv 2405.04434, Table 1: (d_c + d_hR) l; 2.25 groups, for a latent of 4 heads and half a head of rotary."""
    section = kv_cache(published(name), BF16, 4096, 1)
    assert section.value("elements_per_token") == elements
    assert section.value("bytes_per_token") == 2 * elements
    assert section.value("equivalent_groups") == 2.25


def test_cached_bytes_of_deepseek_v3_and_mixtral() -> None:
    """arXiv 2505.09343, Table 1 prints 70.272 KB; Mixtral keeps 65,536 numbers, whatever its experts."""
    assert kv_cache(published("deepseek-v3"), BF16, 131_072, 1).value("total") == 131_072 * 70_272
    assert kv_cache(published("mixtral-8x7b"), BF16, 4096, 1).value("bytes_per_token") == 131_072


def test_expanded_keys_and_values_of_deepseek_v3_take_five_megabytes() -> None:
    assert kv_cache(published("deepseek-v3"), BF16, 1, 1).value("expanded_bytes_per_token") == 61 * 128 * 320 * 2


def test_six_bits_against_sixteen_save_what_deepseek_v2_prints() -> None:
    """-93.3 % against DeepSeek 67B (95 layers, 8 groups of 128) follows from 6 bits against 16 (section 3.2.3)."""
    six_bits = kv_cache(published("deepseek-v2"), BF16, 1, 1).value("elements_per_token") * 6
    assert 100 * (1 - six_bits / (2 * 8 * 128 * 95 * 16)) == pytest.approx(93.3, abs=0.05)


@given(st.integers(1, 30), st.integers(1, 5))
def test_a_window_limits_what_its_layers_keep(context: int, batch: int) -> None:
    assert cache_bytes(windowed(), BF16, context, batch) == batch * 2 * 32 * 2 * (context + min(context, 8))


@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
def test_the_cache_takes_what_generation_allocates(attention: dict[str, Any]) -> None:
    config = small(attention)
    model = Transformer(config).bfloat16()
    cache = model.new_cache(24)
    with torch.no_grad():
        model(torch.randint(0, 1000, (3, 24)), cache)
    assert cache.bytes() == cache_bytes(blueprint_of(config, "small", "moekit"), BF16, 24, 3)


def test_parts_sum_to_the_total_without_the_prediction_module() -> None:
    section = memory(published("deepseek-v3"), parse_precision("bfloat16"), BF16, 4096, 1)
    parts = {f.key: f.value for f in section.figures if f.key.startswith("weights.")}
    # Two bytes for each of 671,026,419,200 parameters, two more for each of 58 x 256 selection biases.
    assert parts["weights.total"] == 2 * 671_026_419_200 + 2 * 58 * 256
    assert sum(parts.values()) == 2 * parts["weights.total"] + parts["weights.prediction"]


@pytest.mark.skipif(not computes(torch.zeros(1, 16, dtype=torch.bfloat16), 16), reason="planned for compiled kernels")
@pytest.mark.parametrize("length", [64, 768])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        small(GQA),
        small(MLA),
        small(GQA, dense_layers=[0, 1, 2]),
        small({"kind": "mla"}),
        small(MLA, mtp_depth=1),
        small({**GQA, "head_dim": 128}, dense_width=64),
        small(GQA, moe={"n_routed": 64, "n_shared": 1, "top_k": 4, "expert_width": 32}),
        small({**GQA, "qk_norm": "head"}),
        small({**GQA, "n_kv_heads": 4, "qk_norm": "full"}),
    ],
    ids=["gqa", "mla", "dense", "plain queries", "prediction", "wide heads", "many experts", "normed", "all normed"],
)
def test_activations_are_the_tensors_that_autograd_saves(config: ModelConfig, dtype: torch.dtype, length: int) -> None:
    """Within 2.5 %: the last norm's output is alive but not saved; rotation tables are not planned."""
    model = Transformer(config).to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = objective(model, Rows(torch.randint(0, 1000, (4, length + 2))), 0.3, 1.0, {})
    for routing in result.routings:
        _keep_routing(routing, keep)
    for x in _hidden(result.loss):
        keep(x)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    predicted = saved(blueprint_of(config, "small", "moekit"), Batch(4, length, dtype.itemsize))
    assert predicted == pytest.approx(measured, rel=0.025)


def _hidden(loss: torch.Tensor) -> list[torch.Tensor]:
    """What the compiled blocks of experts keep beside saved tensors: their backward overwrites it; and their rows."""
    found, seen = list[torch.Tensor](), set[Any]()
    open_nodes: list[Any] = [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "kept"):
                found += [*node.kept.hidden, node.kept.weights, node.rows.tokens, node.rows.places, node.rows.weights]
            open_nodes += [each for each, _ in node.next_functions]
    return found


def _keep_routing(routing: Routing, keep: Any) -> None:
    for value in (routing.experts, routing.weights, routing.scores, routing.logits):
        keep(value)


def test_the_plan_knows_the_sizes_that_the_code_works_with() -> None:
    planned = (activations.LANES, activations.GROUP, activations.NARROW, activations.MANY, activations.CHUNK)
    assert planned == (experts.LANES, experts.GROUP, experts.NARROW, experts.MANY, cross_entropy.CHUNK)


def test_muon_moves_the_matrices_that_the_plan_says() -> None:
    for config in (small(GQA), small(MLA, mtp_depth=1), small(MLA, tie_embeddings=True)):
        named = dict(Transformer(config).named_parameters())
        moved = sum(named[name].numel() for group in muon_groups(named) for name in group["names"])
        assert moved == sum(w.stored for w in blueprint_of(config, "small", "moekit").weights if is_muon(w))


def test_adamw_with_masters_keeps_fourteen_bytes_for_each_parameter() -> None:
    """2 in bfloat16, 4 of the master, 8 of two moments; 10 with the moments in bfloat16 (arXiv 2412.19437, 3.3.3)."""
    shape = blueprint_of(small(MLA), "small", "moekit")
    n = sum(w.stored for w in shape.weights)
    adamw = Training(2, 16, optimizer="adamw")
    assert training_bytes(shape, adamw).kept == 14 * n
    assert training_bytes(shape, adamw._replace(moments=BF16)).kept == 10 * n
    assert training_bytes(shape, adamw._replace(compute=FORMATS["float32"])).kept == 12 * n


def test_muon_keeps_one_moment_of_matrices_and_adamw_two_of_all_else() -> None:
    shape = blueprint_of(small(MLA), "small", "moekit")
    n, matrices = (sum(w.stored for w in shape.weights if test(w)) for test in (lambda _: True, is_muon))
    assert training_bytes(shape, Training(2, 16)).moments == 4 * matrices + 8 * (n - matrices)


def test_recomputing_keeps_less_and_more_tokens_keep_more() -> None:
    shape = published("deepseek-v2-lite")
    plain = training_bytes(shape, Training(1, 4096)).activations
    assert training_bytes(shape, Training(1, 4096, recompute=True)).activations < plain / 5
    assert training_bytes(shape, Training(2, 4096)).activations > 1.9 * plain


def on_devices(layout: Layout, training: Training | None = None) -> dict[str, Any]:
    section = memory(published("deepseek-v3"), parse_precision("bfloat16"), BF16, 4096, 1, training, layout)
    return {f.key.removeprefix("device."): f.value for f in section.figures if f.key.startswith("device.")}


def test_expert_parallelism_divides_experts_alone() -> None:
    whole = memory(published("deepseek-v3"), parse_precision("bfloat16"), BF16, 4096, 1)
    experts, others = whole.value("weights.routed"), whole.value("weights.total") - whole.value("weights.routed")
    assert on_devices(Layout(expert=64))["weights"] == experts // 64 + others


def test_each_stage_of_zero_spreads_one_more_thing_over_copies() -> None:
    """Every device of 8 copies keeps an eighth of the optimizer's state, then of gradients, then of weights."""
    training = Training(1, 4096, optimizer="adamw")
    stages = [on_devices(Layout(data=8, zero=zero), training) for zero in range(4)]
    for stage, part in ((1, "optimizer"), (2, "gradients"), (3, "weights")):
        before, after = stages[stage - 1], stages[stage]
        assert after[part] == pytest.approx(before[part] / 8)
        assert {k: v for k, v in after.items() if k not in (part, "total")} == {
            k: v for k, v in before.items() if k not in (part, "total")
        }


def test_zero_spreads_experts_over_the_copies_that_there_are_of_them() -> None:
    """8 copies of the dense parts hold 2 copies of the experts, a quarter on each device: both end at an eighth."""
    training = Training(1, 4096, optimizer="adamw")
    spread = on_devices(Layout(data=8, expert=4, zero=1), training)
    state = 12 * sum(w.stored for w in published("deepseek-v3").weights)
    assert spread["optimizer"] == pytest.approx(state / 8)


def test_a_latent_cache_is_whole_on_every_device_of_a_tensor_group() -> None:
    assert on_devices(Layout(tensor=8))["kv_cache"] == 4096 * 70_272
    assert on_devices(Layout(data=8))["kv_cache"] == 4096 * 70_272 / 8


def test_without_a_layout_nothing_is_said_about_devices() -> None:
    assert on_devices(Layout()) == {}


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (Layout(data=0), "data"),
        (Layout(data=6, expert=4), "expert"),
        (Layout(zero=4), "zero"),
        (Layout(tensor=-1), "tensor"),
    ],
)
def test_a_layout_that_cannot_be_names_its_degree(layout: Layout, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        on_devices(layout)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("training", "key"),
    [
        (Training(0, 4), "sequences"),
        (Training(1, 4, compute=FORMATS["int4"]), "compute"),
        (Training(1, 4, optimizer="sgd"), "optimizer"),  # type: ignore[arg-type]
    ],
)
def test_training_that_cannot_be_names_its_value(training: Training, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        on_devices(Layout(), training)
    assert error.value.key == key
