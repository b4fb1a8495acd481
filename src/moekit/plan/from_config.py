"""The blueprint of a model that moekit can run."""

from moekit.config.balance import BiasBalance
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig
from moekit.config.routing import Routing, TopKRouting
from moekit.plan.blueprint import Attention, Blueprint, Mixture, Part, Weight
from moekit.plan.bulk import Bulk


def blueprint_of(config: ModelConfig, name: str, family: str, quantisation: str | None = None) -> Blueprint:
    """All tensors of `config` in bulk, with their counts; exact to the parameter."""
    moe = config.moe_block
    bulk = Bulk()
    dense, mixed, last = len(config.dense_layers), len(config.moe_layers), config.mtp_depth
    bulk.add("embedding", "embedding", (config.vocab_size, config.width), 1, kind="lookup", blocks=False)
    _attention(bulk, config, config.n_layers, None)
    _attention(bulk, config, last, "prediction")
    bulk.add("norms", "norms of a block", (config.width,), 2 * config.n_layers, kind="vector")
    bulk.add("prediction", "norms of a block", (config.width,), 2 * last, met=False, kind="vector")
    _swiglu(bulk, "dense", "dense", config.width, config.dense_width, dense)
    if mixed:
        _mixture(bulk, config, mixed, None)
    if last:
        if mixed:
            _mixture(bulk, config, last, "prediction")
        else:
            _swiglu(bulk, "prediction", "dense of the prediction module", config.width, config.dense_width, last, False)
        bulk.add("prediction", "projection", (config.width, 2 * config.width), last, False, blocks=False)
        bulk.add("prediction", "norms of the module", (config.width,), 3 * last, False, "vector", False)
    bulk.add("norms", "final norm", (config.width,), 1, kind="vector", blocks=False)
    head = Weight("head", "head", (config.vocab_size, config.width), 0 if config.tie_embeddings else 1, 1, blocks=False)
    mixture = Mixture(
        mixed,
        moe.n_routed,
        moe.active_experts,
        3 * moe.width * moe.expert_width,
        3 * moe.width * moe.shared_width,
        *_groups(moe.routing),
        moe.pools if len(moe.pools) > 1 else (),
    )
    return Blueprint(
        name,
        family,
        config.width,
        config.vocab_size,
        config.n_layers,
        config.max_positions,
        (*bulk.weights, head),
        (_attention_shape(config),),
        (mixture,) if mixed else (),
        config.mtp_depth,
        quantisation,
    )


def _groups(routing: Routing) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may choose from; one of one where that is no limit."""
    if isinstance(routing, TopKRouting) and routing.top_k_groups < routing.n_groups:
        return routing.n_groups, routing.top_k_groups
    return 1, 1


def _swiglu(bulk: Bulk, part: Part, name: str, width: int, inner: int, count: int, met: bool = True) -> None:
    bulk.add(part, f"{name}, gate and up", (inner, width), 2 * count, met)
    bulk.add(part, f"{name}, down", (width, inner), count, met)


def _attention(bulk: Bulk, config: ModelConfig, layers: int, inside: Part | None) -> None:
    a, d = config.attention, config.width
    part, met = inside or "attention", inside is None
    if isinstance(a, GQAConfig):
        rows = {"q": a.n_heads * a.head_dim, "k": a.n_kv_heads * a.head_dim, "v": a.n_kv_heads * a.head_dim}
        for name, out in rows.items():
            bulk.add(part, name, (out, d), layers, met)
            bulk.add(part, f"{name}, bias", (out,), layers * a.qkv_bias, met, "vector", False)
        bulk.add(part, "output", (d, a.n_heads * a.head_dim), layers, met)
        bulk.add(part, "output, bias", (d,), layers * a.out_bias, met, "vector", False)
        if a.qk_norm != "none":
            for name, heads in (("query", a.n_heads), ("key", a.n_kv_heads)):
                shape = (a.head_dim * (heads if a.qk_norm == "full" else 1),)
                bulk.add(part, f"{name} norm", shape, layers, met, "vector", False)
        return
    _latent_attention(bulk, a, d, layers, part, met)


def _latent_attention(bulk: Bulk, a: MLAConfig, d: int, layers: int, part: Part, met: bool) -> None:
    qk = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    compressed = a.kv_lora_rank + a.qk_rope_head_dim
    if a.q_lora_rank is None:
        bulk.add(part, "q", (qk, d), layers, met)
    else:
        bulk.add(part, "q_a", (a.q_lora_rank, d), layers, met)
        bulk.add(part, "q_a, bias", (a.q_lora_rank,), layers * a.bias, met, "vector", False)
        bulk.add(part, "q_a norm", (a.q_lora_rank,), layers, met, "vector", False)
        bulk.add(part, "q_b", (qk, a.q_lora_rank), layers, met)
    bulk.add(part, "kv_a", (compressed, d), layers, met)
    bulk.add(part, "kv_a, bias", (compressed,), layers * a.bias, met, "vector", False)
    bulk.add(part, "kv_a norm", (a.kv_lora_rank,), layers, met, "vector", False)
    bulk.add(part, "kv_b", (a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank), layers, met)
    bulk.add(part, "output", (d, a.n_heads * a.v_head_dim), layers, met)
    bulk.add(part, "output, bias", (d,), layers * a.bias, met, "vector", False)


def _mixture(bulk: Bulk, config: ModelConfig, layers: int, inside: Part | None) -> None:
    moe, met = config.moe_block, inside is None
    routed, shared, router = inside or "routed", inside or "shared", inside or "router"
    stored, used = layers * moe.n_routed, layers * moe.active_experts * met
    bulk.choose(routed, "experts, gate and up", (moe.expert_width, moe.width), 2 * stored, 2 * used)
    bulk.choose(routed, "experts, down", (moe.width, moe.expert_width), stored, used)
    if moe.n_shared:
        _swiglu(bulk, shared, "shared experts", moe.width, moe.shared_width, layers, met)
    bulk.add(shared, "gate of the shared experts", (1, moe.width), layers * moe.shared_gate, met, blocks=False)
    if n_centroids := moe.routing.n_centroids(moe.n_routed):
        bulk.add(router, "centroids", (n_centroids, moe.width), layers, met, blocks=False)
    if extra := moe.routing.extra_parameters(moe.n_routed, moe.top_k, moe.width):
        bulk.add(router, "the selection rule's own", (extra,), layers, met, "vector", blocks=False)
    if moe.capacity is not None and (kept := moe.capacity.state_size(moe.n_choices)):
        bulk.add(router, "the capacity's own", (kept,), layers, met, "vector", blocks=False)
    for rule in moe.balance:
        if isinstance(rule, BiasBalance):
            bulk.add(router, "selection bias", (moe.n_choices,), layers, met, "vector")
            bulk.add(router, "steps of the selection bias", (1,), layers * (rule.until_step > 0), met, "vector")


def _attention_shape(config: ModelConfig) -> Attention:
    a = config.attention
    if isinstance(a, MLAConfig):
        qk = a.qk_nope_head_dim + a.qk_rope_head_dim
        cached, expanded = a.kv_lora_rank + a.qk_rope_head_dim, a.n_heads * (qk + a.v_head_dim)
        heads = (config.n_layers, a.n_heads, a.n_heads, qk, a.v_head_dim, cached, expanded)
        return Attention("mla", *heads, a.kv_lora_rank, a.qk_rope_head_dim)
    kind = "mha" if a.n_kv_heads == a.n_heads else "mqa" if a.n_kv_heads == 1 else "gqa"
    cached = 2 * a.n_kv_heads * a.head_dim
    return Attention(
        kind, config.n_layers, a.n_heads, a.n_kv_heads, a.head_dim, a.head_dim, cached, 2 * a.n_heads * a.head_dim
    )
