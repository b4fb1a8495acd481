"""Read the fields of a hub's `config.json` one by one, so that none is missed and none is silently ignored."""

from collections.abc import Mapping
from typing import Any

from moekit.config.errors import ConfigError, check
from moekit.config.model import RopeConfig, YarnConfig

WITHOUT_EFFECT = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id ep_size
    id2label initializer_range is_encoder_decoder label2id model_type num_key_value_heads
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type
    return_dict router_aux_loss_coef torch_dtype transformers_version unsloth_fixed use_cache
    """.split()
)
"""Fields that change neither the weights nor what is computed from them."""


class HubFields:
    """The fields of one `config.json`; `finish` complains about those nobody asked for."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.asked: set[str] = set()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, of type `kind`; null or absent gives the default, or an error where there is none."""
        self.asked.add(key)
        value = self.data.get(key)
        if value is None:
            check(default is not None, key, "is missing from config.json")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        check(type(value) is kind, key, f"{value!r} is not of type {kind.__name__}")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """The value of `key`, or None where it is null or absent."""
        self.asked.add(key)
        return None if self.data.get(key) is None else self.get(key, kind)

    def expect(self, key: str, *allowed: Any) -> None:
        """`key` may be absent, null or one of `allowed`; another value is a model of a different kind."""
        self.asked.add(key)
        value = self.data.get(key)
        check(value is None or value in allowed, key, f"{value!r} is not supported for this family")

    def rope(self, layout: Any, max_positions: int) -> RopeConfig:
        """`rope_theta` and `rope_scaling`, or `rope_parameters` which hold both in newer files."""
        self.asked |= {"rope_theta", "rope_scaling", "rope_parameters"}
        scaling = dict(self.data.get("rope_scaling") or self.data.get("rope_parameters") or {})
        theta = scaling.pop("rope_theta", None) or self.data.get("rope_theta") or 10000.0
        kind = scaling.pop("type", None) or scaling.get("rope_type") or "default"
        scaling.pop("rope_type", None)
        if kind == "default":
            return RopeConfig(theta=float(theta), layout=layout)
        check(kind == "yarn", "rope_scaling.type", f"{kind!r} is not supported")
        return RopeConfig(theta=float(theta), layout=layout, scaling=_yarn(scaling, max_positions))

    def finish(self) -> None:
        """Raise a ConfigError that names the fields which were neither read nor known to be without effect."""
        unknown = sorted(self.data.keys() - self.asked - WITHOUT_EFFECT)
        if unknown:
            raise ConfigError(
                unknown[0], f"not understood: {', '.join(unknown)}", "the model may need what moekit lacks"
            )


def _yarn(scaling: dict[str, Any], max_positions: int) -> YarnConfig:
    fields = {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    }
    unknown = sorted(scaling.keys() - fields.keys())
    check(not unknown, f"rope_scaling.{unknown[0] if unknown else ''}", "is not understood")
    given = {ours: float(scaling[hub]) for hub, ours in fields.items() if scaling.get(hub) is not None}
    original = int(given.pop("original_max_positions", max_positions))
    # Without mscale_all_dim, DeepSeek's code leaves the softmax scale alone.
    return YarnConfig(original_max_positions=original, **{"mscale_all_dim": 0.0, **given})  # type: ignore[arg-type]


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields `rope` reads, as older and newer readers both understand them."""
    if rope.scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    yarn = rope.scaling
    scaling = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
