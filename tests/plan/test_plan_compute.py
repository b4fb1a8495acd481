import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_shapes import published, windowed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moekit.config.codec import update
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.model.transformer import Transformer
from moekit.plan.blueprint import Attention
from moekit.plan.compute import compute, decode_score_flops, full_attention_flops, score_flops, visible
from moekit.plan.from_config import blueprint_of

ATTENTIONS = {
    "gqa": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16},
    "mla": {"kind": "mla", "n_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "v_head_dim": 16},
}


def small(attention: str) -> ModelConfig:
    shape = {"vocab_size": 96, "width": 64, "n_layers": 3, "dense_width": 80, "attention": ATTENTIONS[attention]}
    return update(ModelConfig(), {**shape, "moe": {"n_routed": 8, "n_shared": 1, "top_k": 3, "expert_width": 24}})


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_the_parts_sum_to_what_torch_counts_in_a_forward_pass(attention: str) -> None:
    """Short sequences compute whole score matrices, as full attention does; so few tokens need no rows of padding."""
    config, length = small(attention), 32
    model = Transformer(config).bfloat16()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 96, (1, length)))
    section = compute(blueprint_of(config, "small", "moekit"), length)
    assert counter.get_total_flops() == section.value("convention.full_attention") * length


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_one_more_token_costs_what_torch_counts_with_a_cache(attention: str) -> None:
    config, length = small(attention), 12
    model, ids = Transformer(config), torch.randint(0, 96, (1, length))
    with torch.no_grad():
        cache = model.new_cache(length)
        model(ids[:, :-1], cache)
        # The fused kernel is not counted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], cache)
    assert counter.get_total_flops() == compute(blueprint_of(config, "small", "moekit"), length).value(
        "decode.per_token"
    )


@given(st.integers(1, 60), st.none() | st.integers(1, 70), st.booleans())
def test_visible_tokens_are_those_of_the_mask(context: int, window: int | None, causal: bool) -> None:
    attention = Attention("mha", 1, 1, 1, 1, 1, 2, 2, window=window, causal=causal)
    allowed = sum(
        1
        for query in range(context)
        for key in range(context)
        if not causal or (key <= query and (window is None or query - key < window))
    )
    if not causal and window is not None:
        allowed = context * min(window, context)
    assert visible(attention, context) == allowed


def test_a_sequence_costs_as_many_scores_as_its_tokens_one_by_one() -> None:
    for attention in windowed().attentions:
        singly = sum(decode_score_flops(attention, position) for position in range(1, 31))
        assert score_flops(attention, 30) == singly


def test_a_tied_head_computes_though_it_is_not_stored() -> None:
    assert compute(windowed(), 4).value("forward.head") == 2 * 100 * 16


def test_training_is_three_forward_passes() -> None:
    section = compute(published("deepseek-v2-lite"), 4096, 10**12)
    assert section.value("training.per_token") == pytest.approx(3 * section.value("forward.per_token"))
    assert section.value("training.total") == pytest.approx(3e12 * section.value("forward.per_token"))


@pytest.mark.parametrize(("name", "billions"), [("deepseek-v3", 250), ("deepseek-v2", 155)])
def test_training_of_one_token_as_printed_by_deepseek(name: str, billions: int) -> None:
    """arXiv 2505.09343, Table 2: GFLOPs for each token at 4096. The exact causal count agrees with their rule."""
    section = compute(published(name), 4096)
    assert int(section.value("convention.causal_half") / 1e9) == billions
    assert section.value("training.per_token") == pytest.approx(section.value("convention.causal_half"), rel=1e-4)


def test_the_released_shape_of_the_16b_model_takes_75_8_teraflops_by_the_papers_rule() -> None:
    assert compute(published("deepseek-moe-16b"), 4096).value("convention.deepseekmoe") / 1e12 == pytest.approx(
        75.82, abs=0.005
    )


@pytest.mark.parametrize(
    ("layers", "d", "vocab", "feed_forwards", "s", "printed", "digits"),
    [
        (9, 1280, 8192, 1, 2048, 2.9, 1),
        (9, 1280, 8192, 2, 2048, 4.3, 1),
        (9, 1280, 8192, 3, 2048, 5.8, 1),
        (9, 1280, 8192, 16, 2048, 24.6, 1),
        (28, 2048, 102400, 2, 4096, 74.4, 1),
        (30, 4096, 102400, 1, 4096, 183.5, 1),
        (32, 4096, 32000, 1, 4096, 187.9, 1),
        (62, 4096, 102400, 2 * 1408 / (4096 / 3), 4096, 585.5, 1),
    ],
)
def test_the_tables_of_deepseekmoe_follow_from_nominal_widths(
    layers: int, d: int, vocab: int, feed_forwards: float, s: int, printed: float, digits: int
) -> None:
    """arXiv 2401.06066, Tables 1 to 6, TFLOPs for s tokens: attention of 4 d^2, `feed_forwards` times 8 d^2 active, the
    head. The 145B model's experts are 1408 wide instead of 4096 / 3; the paper prints 585.6."""
    products = round(layers * (4 + 8 * feed_forwards) * d * d) + vocab * d
    assert round(full_attention_flops(products, 2 * layers * d, s, s) / 1e12, digits) == printed


@pytest.mark.parametrize(("key", "sizes"), [("context", (0, None)), ("tokens", (4, 0)), ("context", (-1, 5))])
def test_sizes_below_one_are_errors(key: str, sizes: tuple[int, int | None]) -> None:
    with pytest.raises(ConfigError) as error:
        compute(windowed(), *sizes)
    assert error.value.key == key
