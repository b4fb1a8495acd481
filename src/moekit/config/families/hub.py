"""Read the fields of a hub's `config.json` one by one, so that none is missed and none is silently ignored."""

import math
from collections.abc import Mapping
from typing import Any

from moekit.config.errors import ConfigError, check
from moekit.config.model import RopeConfig, YarnConfig

WORDS = """
_attn_implementation_autoset _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype
eos_token_id ep_size id2label initializer_range is_encoder_decoder label2id model_type output_attentions
output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef
tokenizer_class torch_dtype transformers_version unsloth_fixed use_cache
"""

WITHOUT_EFFECT = frozenset(WORDS.split())
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
        return _typed(value, kind, key)

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
        key = "rope_scaling" if self.data.get("rope_scaling") else "rope_parameters"
        given = self.data.get(key) or {}
        check(isinstance(given, dict), key, f"{given!r} is not an object")
        scaling = {name: value for name, value in given.items() if value is not None}
        theta = _typed(scaling.pop("rope_theta", None) or self.data.get("rope_theta") or 10000.0, float, "rope_theta")
        kind = scaling.pop("type", None) or scaling.get("rope_type") or "default"
        scaling.pop("rope_type", None)
        check(scaling.pop("partial_rotary_factor", 1) == 1, f"{key}.partial_rotary_factor", "is not supported")
        check(kind in ("default", "yarn"), f"{key}.rope_type", f"{kind!r} is not supported")
        if kind == "yarn":
            return RopeConfig(theta=theta, layout=layout, scaling=_yarn(scaling, key, max_positions))
        check(not scaling, f"{key}.{next(iter(scaling), '')}", "is not understood without a rope_type")
        return RopeConfig(theta=theta, layout=layout)

    def finish(self) -> None:
        """Raise a ConfigError that names the fields which were neither read nor known to be without effect."""
        unknown = sorted(self.data.keys() - self.asked - WITHOUT_EFFECT)
        if unknown:
            raise ConfigError(
                unknown[0], f"not understood: {', '.join(unknown)}", "the model may need what moekit lacks"
            )


def _typed(value: Any, kind: type, key: str) -> Any:
    """`value` if it is of type `kind`; a whole number may stand for another, and numbers are finite."""
    check(type(value) is kind or (kind, type(value)) == (float, int), key, f"{value!r} is not of type {kind.__name__}")
    if kind is not float:
        return value
    check(abs(value) < math.inf, key, f"{value} is not a finite number")
    return float(value)


YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""The hub's names of the fields of YaRN, and ours."""


def _yarn(scaling: dict[str, Any], key: str, max_positions: int) -> YarnConfig:
    check(scaling.pop("truncate", True) is True, f"{key}.truncate", "is supported as true alone")
    unknown = sorted(scaling.keys() - YARN.keys())
    check(not unknown, f"{key}.{unknown[0] if unknown else ''}", "is not understood")
    check("factor" in scaling, f"{key}.factor", "is missing from config.json")
    values = {"original_max_position_embeddings": max_positions, "mscale": 1.0, "mscale_all_dim": 0.0} | scaling
    # DeepSeek's own code and transformers read other pairs than these differently.
    both = values["mscale_all_dim"] and scaling.get("mscale")
    neither = not values["mscale_all_dim"] and values["mscale"] == 1
    check(bool(both or neither), f"{key}.mscale", "needs mscale_all_dim, and the other way round; both above 0")
    kinds = {"original_max_position_embeddings": int}
    typed = {YARN[hub]: _typed(value, kinds.get(hub, float), f"{key}.{hub}") for hub, value in values.items()}
    return YarnConfig(**typed)


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
