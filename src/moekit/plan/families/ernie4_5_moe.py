"""ERNIE 4.5 (Baidu, 2025), text models: which layers have experts is a span with an interval; biases are optional."""

from collections.abc import Mapping
from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.plan.decoder import Decoder, Dense, Experts, Prediction
from moekit.plan.families.fields import read_choice, read_heads, read_trunk


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`. The selection bias is counted, as in the released files."""
    fields = HubFields(data)
    fields.ignore("moe_norm_min", "moe_capacity", "moe_gate", "moe_gate_act", "moe_aux_loss_lambda", "moe_group")
    fields.ignore("moe_z_loss_lambda", "moe_orthogonal_loss_lambda", "compression_ratio", "hidden_dropout_prob")
    fields.expect("moe_use_aux_free", True)
    fields.expect("use_rmsnorm", True)
    trunk = read_trunk(fields, name, tied=True)
    bias = fields.get("use_bias", bool, False)
    heads = read_heads(fields, trunk.width, qkv_bias=bias, out_bias=bias)
    dense = Dense(fields.positive("intermediate_size"), bias=bias)
    experts = _experts(fields, bias)
    mixed = _mixed_layers(fields, trunk.n_layers)
    ahead = fields.get("num_nextn_predict_layers", int, 0)
    check(0 <= ahead <= trunk.n_layers, "num_nextn_predict_layers", f"{ahead} is not 0 to {trunk.n_layers}")
    fields.finish()
    return Decoder(
        **trunk.shape("ernie4_5_moe"),
        heads=heads,
        layers=((dense, trunk.n_layers - mixed), (experts, mixed)),
        head_bias=bias,
        # Its block is dense, and its output goes through the model's own last norm.
        prediction=Prediction(ahead, dense, norms=2) if ahead else None,
    )


def _experts(fields: HubFields, bias: bool) -> Experts:
    n_routed, top_k = read_choice(fields, "moe_num_experts", "moe_k")
    width, shared = fields.positive("moe_intermediate_size"), fields.get("moe_num_shared_experts", int, 0)
    check(shared >= 0, "moe_num_shared_experts", f"{shared} must not be negative")
    return Experts(n_routed, top_k, width, shared * width, shared_bias=bias, selection_bias=True)


def _mixed_layers(fields: HubFields, n_layers: int) -> int:
    """Layer i has experts if start <= i <= end and the interval divides i + 1; an end of -1 is the last layer."""
    start = fields.get("moe_layer_start_index", int, 1)
    end, interval = fields.get("moe_layer_end_index", int, -1), fields.positive("moe_layer_interval", 1)
    last = n_layers - 1 if end == -1 else min(end, n_layers - 1)
    return sum(layer >= start and (layer + 1) % interval == 0 for layer in range(last + 1))
