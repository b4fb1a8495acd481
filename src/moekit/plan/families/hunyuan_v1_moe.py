"""Hunyuan-A13B (Tencent, 2025): one shared expert, normed queries and keys, sizes that may differ by layer."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields, typed
from moekit.plan.decoder import Decoder, Dense, Experts
from moekit.plan.families.fields import read_heads, read_trunk

WORDS = """
anyres_pooling_size anyres_vit_max_image_size anyres_vit_two_views capacity_factor cla_share_factor class_num dense_list
eod_token_id group_limited_greedy im_end_id im_newline_id im_start_id image_token_id mask_init_id max_seq_length
moe_drop_tokens moe_random_routing_dropped_token n_group norm_type num_media_embeds org_vocab_size pad_id pool_type
position_embedding_xdrope skip_cls_token text_end_id text_start_id topk_group use_rotary_pos_emb video_end_id
video_start_id vit_input_resolution vit_mapping_type vit_norm_type vit_patch vit_path vit_remove_prenorm vit_token
vit_used_rms_norm xdrope_section
"""
"""Fields about routing, tokens and a vision tower that this family does not have; released files carry them along.

The sizes of latent attention stand there too, without effect while `use_mla` is false.
"""

LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`."""
    fields = HubFields(data)
    fields.ignore(*WORDS.split(), *LATENT)
    for key in ("use_mla", "use_cla", "mlp_bias", "add_classification_head", "moe_router_enable_expert_bias"):
        fields.expect(key, False)
    fields.expect("vit_type")
    trunk = read_trunk(fields, name)
    bias = fields.get("attention_bias", bool, False)
    norms = fields.get("use_qk_norm", bool, True)
    heads = read_heads(fields, trunk.width, qkv_bias=bias, out_bias=bias, head_norms=norms)
    fields.expect("attention_head_dim", heads.head_dim)
    layers = Counter(_layers(fields, trunk.n_layers))
    fields.finish()
    return Decoder(**trunk.shape("hunyuan_v1_moe"), heads=heads, layers=tuple(layers.items()))


def _layers(fields: HubFields, n_layers: int) -> list[Dense | Experts]:
    width = fields.positive("intermediate_size")
    n_routed = _by_layer(fields, "num_experts", n_layers, 1)
    top_k = _by_layer(fields, "moe_topk", n_layers, 1)
    expert_width = _by_layer(fields, "moe_intermediate_size", n_layers, width)
    shared = _by_layer(fields, "num_shared_expert", n_layers, 1)
    mixed = fields.get("use_mixed_mlp_moe", bool, True)
    skipped = fields.get("moe_layer_num_skipped", int, 0)
    found: list[Dense | Experts] = []
    for layer in range(n_layers):
        n, k, inner = n_routed[layer], top_k[layer], expert_width[layer]
        check(0 < k <= n, "moe_topk", f"{k} is not 1 to num_experts = {n} in layer {layer}")
        experts = Experts(n, k, inner, inner * shared[layer] * mixed)
        found.append(Dense(width) if layer < skipped else experts)
    return found


def _by_layer(fields: HubFields, key: str, n_layers: int, default: int) -> list[int]:
    """One number for all layers, or a list of one for each."""
    given = fields.data.get(key)
    if not isinstance(given, list):
        return [fields.positive(key, default)] * n_layers
    fields.ignore(key)
    check(len(given) >= n_layers, key, f"has {len(given)} entries for {n_layers} layers")
    numbers = [typed(number, int, key) for number in given[:n_layers]]
    check(all(number > 0 for number in numbers), key, "has an entry that is not above 0")
    return numbers
