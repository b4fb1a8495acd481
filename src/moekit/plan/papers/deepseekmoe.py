"""DeepSeekMoE 2B and 145B, and the GShard 137B they are held against (arXiv 2401.06066, tables 1, 6 and 7)."""

from collections.abc import Callable, Mapping

from moekit.plan.blueprint import Attention, Blueprint, Mixture, Weight
from moekit.plan.bulk import Bulk
from moekit.plan.decoder import Decoder, Dense, Experts, Heads, blueprint_of_decoder

NOMINAL = (
    "nominal sizes: a standard feed-forward holds 8 d^2 parameters, written as two matrices of 4 d; routers and norms "
    "are left out, which the paper's own figures and FLOPs need"
)

STANDARD = 8
"""Parameters of a standard feed-forward in d^2 (section 4.1.2)."""


def deepseekmoe_2b(name: str) -> Blueprint:
    """One shared and 63 routed experts, each a quarter of a standard feed-forward; all layers are mixtures."""
    notes = (
        "published: 2.0B, 0.3B active; experts alone 1.89B, 0.24B active, which these shapes give",
        "the paper says a vocabulary of 8K; 8192 here",
        NOMINAL,
    )
    width, layers, expert = 1280, 9, STANDARD * 1280**2 // 4
    bulk = Bulk()
    _trunk(bulk, 8192, width, layers)
    bulk.add("shared", "shared expert, both matrices", (expert // width, width), layers)
    bulk.choose("routed", "experts, both matrices", (expert // width, width), 63 * layers, 7 * layers)
    mixture = Mixture(layers, 63, 7, expert, expert)
    return _blueprint(name, bulk, 8192, width, (layers, 10, 2048), mixture, notes)


def gshard_137b(name: str) -> Blueprint:
    """Sixteen experts of a standard feed-forward, of which a token takes two; the first layer is dense."""
    notes = (
        "published: 136.5B, 21.6B active; these shapes give 136.3B and 21.6B, and the published FLOPs of 572.7T",
        "the first layer is taken as dense and as wide as two experts, like that of DeepSeekMoE 145B; as wide as one, "
        "136,130,330,624 would be stored",
        NOMINAL,
    )
    width, layers, expert = 4096, 62, STANDARD * 4096**2
    bulk = Bulk()
    _trunk(bulk, 102400, width, layers)
    bulk.add("dense", "dense, both matrices", (2 * expert // width, width), 1)
    bulk.choose("routed", "experts, both matrices", (expert // width, width), 16 * (layers - 1), 2 * (layers - 1))
    mixture = Mixture(layers - 1, 16, 2, expert, 0)
    return _blueprint(name, bulk, 102400, width, (layers, 32, 4096), mixture, notes)


def deepseekmoe_145b(name: str) -> Blueprint:
    """Four shared and 128 routed experts, each an eighth of a standard feed-forward."""
    notes = (
        "published: 144.6B, 22.2B active, which these shapes give",
        "the widths of an expert (1408: an eighth of 8 d^2 / 3 d, rounded up to a multiple of 64) and of the dense "
        "first layer (21888) are not published; these fit",
    )
    layers = ((Dense(21888), 1), (Experts(128, 12, 1408, 4 * 1408), 61))
    heads = Heads(32, 32, 128)
    return blueprint_of_decoder(Decoder(name, "deepseek", 102400, 4096, 4096, heads, layers, notes=notes))


MODELS: Mapping[str, Callable[[str], Blueprint]] = {
    "deepseekmoe-2b": deepseekmoe_2b,
    "deepseekmoe-145b": deepseekmoe_145b,
    "gshard-137b": gshard_137b,
}


def _trunk(bulk: Bulk, vocab_size: int, width: int, layers: int) -> None:
    bulk.add("embedding", "embedding", (vocab_size, width), 1, kind="lookup")
    bulk.add("attention", "q, k, v and output", (width, width), 4 * layers)


def _blueprint(
    name: str,
    bulk: Bulk,
    vocab_size: int,
    width: int,
    attention: tuple[int, int, int],
    mixture: Mixture,
    notes: tuple[str, ...],
) -> Blueprint:
    """`attention`: layers, heads, and the length of a sequence."""
    layers, n_heads, length = attention
    head_dim = width // n_heads
    seen = Attention("mha", layers, n_heads, n_heads, head_dim, head_dim, 2 * width, 2 * width)
    head = Weight("head", "head", (vocab_size, width), 1, 1, blocks=False)
    weights = (*bulk.weights, head)
    return Blueprint(name, "deepseek", width, vocab_size, layers, length, weights, (seen,), (mixture,), notes=notes)
