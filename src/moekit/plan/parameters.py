"""How many parameters are stored, how many compute one token, and among how many sets of experts it chooses."""

import math
from collections.abc import Iterator

from moekit.plan.blueprint import PARTS, Blueprint, Mixture, Part, Weight
from moekit.plan.figure import Figure, Section

REPEATING = ("deepseek_v3", "glm4_moe")
"""Families whose files repeat embedding and head in every prediction module."""

FP8_BLOCK = 128
"""Rows and columns that share a scale (arXiv 2412.19437, section 3.3)."""

MXFP4_GROUP = 32
"""Numbers that share a scale of one byte (OCP Microscaling Formats 1.0)."""

ALL, NO_INPUT, NEITHER = "active.all", "active.without_input_embedding", "active.without_embeddings"


def parameters(blueprint: Blueprint) -> Section:
    """Stored and active parameters by part, one expert, and the sets of experts a token can reach; all exact."""
    figures = (*_stored(blueprint), *_copies(blueprint), *_active(blueprint), *_choice(blueprint.mixtures))
    return Section("parameters", "Parameters", figures, blueprint.notes)


def _stored(blueprint: Blueprint) -> Iterator[Figure]:
    parts = _by_part(blueprint, active=False)
    for part, count in parts.items():
        formula = "sum over the tensors of the part: rows x columns x how many"
        yield Figure(f"stored.{part}", f"stored, {part}", count, "", formula, _products(blueprint, part))
    total, ahead = sum(parts.values()), parts.get("prediction", 0)
    note = "what a file only repeats is not counted"
    yield Figure("stored.total", "stored", total, "", "sum over parts", _sum(parts), note)
    note = "generation does not use the prediction module" if ahead else "there is no prediction module"
    rest, numbers = "stored, without prediction", f"{total:,} - {ahead:,}"
    yield Figure("stored.without_prediction", rest, total - ahead, "", "stored - prediction", numbers, note)


def _copies(blueprint: Blueprint) -> Iterator[Figure]:
    """What released files hold beyond the model's own parameters."""
    modules = blueprint.prediction_modules
    if modules and blueprint.family in REPEATING:
        count = 2 * blueprint.vocab_size * blueprint.width * modules
        numbers = f"2 x {blueprint.vocab_size} x {blueprint.width} x {modules}"
        note = "released files repeat embedding and head in the prediction module; not part of stored.total"
        yield Figure("stored.file_copies", "copies in the file", count, "", "2 V d D", numbers, note)
    if blueprint.quantisation == "fp8":
        count = sum(_fp8_scales(weight) for weight in blueprint.weights if weight.blocks)
        formula = "sum over quantised matrices: ceil(rows / 128) x ceil(columns / 128)"
        note = "one float32 for each block of 128 x 128; not part of stored.total"
        yield Figure("stored.block_scales", "scales of FP8 blocks", count, "", formula, "", note)
    if blueprint.quantisation == "mxfp4":
        count = sum(_mxfp4_scales(weight) for weight in blueprint.weights if weight.part == "routed" and weight.blocks)
        note = "one byte for each 32 numbers of the routed experts' matrices; not part of stored.total"
        yield Figure("stored.block_scales", "scales of MXFP4", count, "", "rows x ceil(columns / 32)", "", note)


def _fp8_scales(weight: Weight) -> int:
    rows, columns = weight.shape
    return weight.count * math.ceil(rows / FP8_BLOCK) * math.ceil(columns / FP8_BLOCK)


def _mxfp4_scales(weight: Weight) -> int:
    rows, columns = weight.shape
    return weight.count * rows * math.ceil(columns / MXFP4_GROUP)


def _active(blueprint: Blueprint) -> Iterator[Figure]:
    parts = _by_part(blueprint, active=True)
    everything = sum(parts.values())
    for part, count in parts.items():
        formula = "sum over the tensors that one token meets"
        yield Figure(f"active_by_part.{part}", f"active, {part}", count, "", formula, _products(blueprint, part, True))
    note = "convention of DeepSeek-MoE, Mixtral, OLMoE and Qwen: both embedding matrices count, a tied one once"
    yield Figure(ALL, "active", everything, "", "sum over parts", _sum(parts), note)
    inputs, both = _input_embedding(blueprint), _embeddings(blueprint)
    note = "convention of gpt-oss and of DeepSeek-V3's 36.7B: the input embedding is looked up, not multiplied"
    if _tied(blueprint):
        note += "; the tied matrix stays, because as the head it is multiplied"
    label, numbers = "active, without input embedding", f"{everything:,} - {inputs:,}"
    yield Figure(NO_INPUT, label, everything - inputs, "", "active - input embedding", numbers, note)
    note = "convention of GLM and Moonlight: neither embedding nor head"
    if _tied(blueprint):
        note += "; the tied matrix is left out"
    label, numbers = "active, without embeddings", f"{everything:,} - {both:,}"
    yield Figure(NEITHER, label, everything - both, "", "active - embedding - head", numbers, note)
    stored = sum(_by_part(blueprint, active=False).values()) - _by_part(blueprint, active=False).get("prediction", 0)
    numbers, note = f"100 x {everything:,} / {stored:,}", "of what is stored without the prediction module"
    share = 100 * everything / stored
    yield Figure("active.share", "share that is active", share, "%", "100 x active / stored", numbers, note)


def _tied(blueprint: Blueprint) -> bool:
    return any(weight.part == "head" and weight.used > weight.count for weight in blueprint.weights)


def _input_embedding(blueprint: Blueprint) -> int:
    """Rows are looked up in it; a tied one is multiplied as well, as the head."""
    heads = {weight.shape for weight in blueprint.weights if weight.part == "head" and weight.used > weight.count}
    lookups = (weight for weight in blueprint.weights if weight.part == "embedding" and weight.kind == "lookup")
    return sum(weight.active for weight in lookups if weight.shape not in heads)


def _embeddings(blueprint: Blueprint) -> int:
    return sum(weight.active for weight in blueprint.weights if weight.part in ("embedding", "head"))


def _choice(mixtures: tuple[Mixture, ...]) -> Iterator[Figure]:
    """For each kind of mixture; the second and further ones have their number in the key."""
    kinds = list({mixture._replace(layers=0): mixture for mixture in mixtures}.values())
    for number, mixture in enumerate(kinds, 1):
        end = "" if number == 1 else f"_{number}"
        n, k, groups, limit = mixture.n_routed, mixture.top_k, mixture.n_groups, mixture.top_k_groups
        label = "" if len(kinds) == 1 else f", mixture {number}: {k} of {n}"
        note = "one routed expert, biases included"
        yield Figure(f"per_expert{end}", f"one expert{label}", mixture.expert, note=note)
        note = "in each layer; shared experts are not chosen, all tokens use them"
        pools = mixture.pools or ((n, k),)
        sets, numbers = math.prod(math.comb(*pool) for pool in pools), " x ".join(f"C{pool}" for pool in pools)
        formula = "C(N, K)" if len(pools) == 1 else "product over pools of C(N, K)"
        yield Figure(f"combinations{end}", f"sets of experts{label}", sets, "", formula, numbers, note)
        if len(pools) > 1:
            continue
        reached = combinations_within_groups(n, k, groups, limit)
        formula = "sum over m <= M of C(D, m) sum over j of (-1)^(m-j) C(m, j) C(j N/D, K)"
        note = "sets that touch at most M of the D groups" if groups > limit else "groups set no limit"
        numbers = f"N = {n}, K = {k}, D = {groups}, M = {limit}"
        label = f"sets within the groups{label}"
        yield Figure(f"combinations_within_groups{end}", label, reached, "", formula, numbers, note)


def combinations_within_groups(n_routed: int, top_k: int, n_groups: int, top_k_groups: int) -> int:
    """How many sets of `top_k` experts touch at most `top_k_groups` of `n_groups` equal groups.

    Sets that touch exactly the m groups of a choice: inclusion and exclusion over the j of them that are allowed.
    """
    size = n_routed // n_groups
    most = min(top_k_groups, n_groups)
    return sum(math.comb(n_groups, m) * _touching_all(m, size, top_k) for m in range(1, most + 1))


def _touching_all(m: int, size: int, top_k: int) -> int:
    return sum((-1) ** (m - j) * math.comb(m, j) * math.comb(j * size, top_k) for j in range(m + 1))


def _by_part(blueprint: Blueprint, active: bool) -> dict[Part, int]:
    """Parameters of the parts that there are, in the order of PARTS."""
    found: dict[Part, int] = {}
    for part in PARTS:
        weights = [weight for weight in blueprint.weights if weight.part == part]
        if weights and not (active and part == "prediction"):
            found[part] = sum(weight.active if active else weight.stored for weight in weights)
    return found


def _products(blueprint: Blueprint, part: Part, active: bool = False) -> str:
    """The matrices of a part with their numbers; vectors in one sum."""
    weights = [weight for weight in blueprint.weights if weight.part == part]
    terms, vectors = [], 0
    for weight in weights:
        count = min(weight.used, weight.count) if active else weight.count
        if weight.kind == "vector":
            vectors += weight.numel * count
        elif count:
            sizes = " x ".join(str(size) for size in weight.shape)
            terms.append(sizes if count == 1 else f"{count} x {sizes}")
    return " + ".join(terms + ([f"{vectors:,}"] if vectors else [])) or "0"


def _sum(parts: dict[Part, int]) -> str:
    return " + ".join(f"{count:,}" for count in parts.values())
