"""Floating-point operations of a forward pass, of one more token, and of training, with the conventions papers use."""

from fractions import Fraction

from moekit.config.errors import ConfigError
from moekit.plan.blueprint import PARTS, Attention, Blueprint
from moekit.plan.figure import Figure, Section


def compute(blueprint: Blueprint, context: int, tokens: int | None = None) -> Section:
    """FLOPs for each token of a sequence of `context` tokens, by part; of one token after it; of training on `tokens`.

    One multiplication with one addition counts as two; norms, softmax and activations are left out.
    """
    check_sizes(context=context, tokens=1 if tokens is None else tokens)
    linear = {part: product_flops(blueprint, part) for part in PARTS}
    products = sum(linear.values())
    scores = Fraction(sum(score_flops(a, context) for a in blueprint.attentions), context)
    forward = products + scores
    figures = [
        Figure(
            f"forward.{part}",
            part,
            flops,
            "FLOP",
            "2 x numbers in the matrices that a token meets",
            f"2 x {flops // 2:,}",
        )
        for part, flops in linear.items()
        if flops
    ]
    figures += [
        Figure(
            "forward.scores",
            "attention scores",
            exact(scores),
            "FLOP",
            "sum over layers of 2 heads (d_qk + d_v) x mean of visible tokens",
            _scores_in_numbers(blueprint, context),
            "exact causal: token i sees min(i, window) tokens, so (s + 1) / 2 on average without a window",
        ),
        Figure(
            "forward.per_token",
            "forward, each token",
            exact(forward),
            "FLOP",
            "products + attention scores",
            f"{products:,} + {float(scores):,.0f}",
            f"mean over a sequence of {context:,} tokens",
        ),
        Figure(
            "forward.sequence",
            "forward, whole sequence",
            exact(forward * context),
            "FLOP",
            "tokens x forward of each",
            f"{context:,} x {float(forward):,.0f}",
        ),
        _decode(blueprint, products, context),
        *_training(forward, tokens),
        *_conventions(blueprint, products, context),
    ]
    return Section("compute", f"Computation at {context:,} tokens", tuple(figures), _notes(blueprint))


def product_flops(blueprint: Blueprint, part: str) -> int:
    """FLOPs of the products of one token with the matrices of `part`; a tied head is computed though not stored."""
    return sum(2 * w.numel * w.used for w in blueprint.weights if w.kind == "product" and w.part == part)


def visible(attention: Attention, context: int) -> int:
    """How many tokens those of a sequence of `context` see, summed over the sequence."""
    seen = context if attention.window is None else min(attention.window, context)
    if not attention.causal:
        return context * seen
    return seen * (seen + 1) // 2 + (context - seen) * seen


def score_flops(attention: Attention, context: int) -> int:
    """FLOPs of q k^T and of the sum over values, for all tokens of a sequence; keys and values in full (prefill)."""
    return attention.layers * 2 * attention.n_heads * (attention.qk_dim + attention.v_dim) * visible(attention, context)


def decode_score_flops(attention: Attention, context: int) -> int:
    """FLOPs of attention for one new token that sees `context` tokens, itself included.

    With a latent cache the queries move into the latent space (arXiv 2405.04434, section 2.1.2: W_UK is absorbed), so
    that keys are `latent` + `rotary` wide and values `latent`; the products with kv_b cost what they cost in prefill.
    """
    seen = context if attention.window is None else min(attention.window, context)
    widths = 2 * attention.latent + attention.rotary if attention.latent else attention.qk_dim + attention.v_dim
    return attention.layers * 2 * attention.n_heads * widths * seen if attention.causal else 0


def full_attention_flops(products: int, widths: int, tokens: int, context: int) -> int:
    """Training FLOPs as the tables of arXiv 2401.06066 count them: tokens (6 N + 12 L d s).

    N = `products` are the matrix weights that a token meets, without router and input embedding; `widths` = 2 L d is
    the sum over layers of heads times the widths of a key and a value; s = `context`, all of it visible.
    """
    return tokens * (6 * products + 6 * widths * context)


def exact(value: Fraction) -> int | float:
    """A whole number where it is one."""
    return value.numerator if value.denominator == 1 else float(value)


def check_sizes(**sizes: int) -> None:
    """Raise a ConfigError that names the first size below 1."""
    for key, value in sizes.items():
        if value < 1:
            raise ConfigError(key, f"{value} must be at least 1")


def _decode(blueprint: Blueprint, products: int, context: int) -> Figure:
    scores = sum(decode_score_flops(a, context) for a in blueprint.attentions)
    return Figure(
        "decode.per_token",
        "one more token",
        products + scores,
        "FLOP",
        "products + sum over layers of 2 heads (d_k + d_v) x visible",
        f"{products:,} + {scores:,}",
        f"the token at position {context:,}; with a latent cache d_k = latent + rotary, d_v = latent (absorbed)",
    )


def _training(forward: Fraction, tokens: int | None) -> list[Figure]:
    note = "backward = 2 x forward; nothing computed twice; prediction modules not counted"
    per_token = Figure(
        "training.per_token",
        "training, each token",
        exact(3 * forward),
        "FLOP",
        "3 x forward",
        f"3 x {float(forward):,.0f}",
        note,
    )
    if tokens is None:
        return [per_token]
    total = exact(3 * forward * tokens)
    numbers = f"{tokens:,} x {float(3 * forward):,.0f}"
    return [
        per_token,
        Figure("training.total", "training, all tokens", total, "FLOP", "tokens x training", numbers, note),
    ]


def _conventions(blueprint: Blueprint, products: int, context: int) -> list[Figure]:
    """What papers print for the same model; they count attention, router and embedding differently."""
    matrices = (products - product_flops(blueprint, "router")) // 2
    widths = sum(a.layers * a.n_heads * (a.qk_dim + a.v_dim) for a in blueprint.attentions)
    met = _active_without_input_embedding(blueprint)
    return [
        Figure(
            "convention.full_attention",
            "forward, each token, full attention",
            products + 2 * widths * context,
            "FLOP",
            "products + sum over layers of 2 heads (d_qk + d_v) s",
            f"{products:,} + 2 x {widths:,} x {context:,}",
            "as if every token saw the whole sequence",
        ),
        Figure(
            "convention.deepseekmoe",
            "training, whole sequence, as arXiv 2401.06066",
            full_attention_flops(matrices, widths, context, context),
            "FLOP",
            "s (6 N + 6 W s), W = sum over layers of heads (d_qk + d_v) = 2 L d",
            f"{context:,} x (6 x {matrices:,} + 6 x {widths:,} x {context:,})",
            "full attention, no router; the paper's tables use nominal widths (feed-forwards of 8 d^2, all layers "
            "alike), which gives 74.4T for its 16B model at 4096 tokens, where the released shape gives 75.8T",
        ),
        Figure(
            "convention.causal_half",
            "training, each token, as arXiv 2505.09343",
            6 * met + 3 * widths * context,
            "FLOP",
            "6 x active without input embedding + 3 W s",
            f"6 x {met:,} + 3 x {widths:,} x {context:,}",
            "half of full attention; Table 2 there, at 4096 tokens: DeepSeek-V3 250 GFLOPs, DeepSeek-V2 155",
        ),
    ]


def _active_without_input_embedding(blueprint: Blueprint) -> int:
    """Parameters that compute one token; a tied head counts as a matrix of its own."""
    return sum(w.numel * w.used for w in blueprint.weights if w.kind != "lookup")


def _scores_in_numbers(blueprint: Blueprint, context: int) -> str:
    return " + ".join(
        f"{a.layers} x 2 x {a.n_heads} x ({a.qk_dim} + {a.v_dim}) x {visible(a, context) / context:,.6g}"
        for a in blueprint.attentions
    )


def _notes(blueprint: Blueprint) -> tuple[str, ...]:
    notes = ("2 FLOPs for a multiplication with its addition; norms, softmax and activations are left out.",)
    if blueprint.prediction_modules:
        notes += ("Prediction modules compute in training only and are not counted.",)
    return notes
