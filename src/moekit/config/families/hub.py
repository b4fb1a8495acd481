"""Read the fields of a hub's `config.json` one by one, so that none is missed and none is silently ignored."""

import math
from collections.abc import Mapping
from typing import Any

from moekit.config.errors import ConfigError, check
from moekit.config.quantisation import KEY

WORDS = """
_attn_implementation_autoset _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype
eos_token_id ep_size id2label is_encoder_decoder label2id model_type output_attentions output_hidden_states
output_router_logits pad_token_id pretraining_tp problem_type return_dict router_aux_loss_coef tokenizer_class
torch_dtype transformers_version unsloth_fixed use_cache
"""

WITHOUT_EFFECT = frozenset(WORDS.split())
"""Fields that change neither the weights nor what is computed from them."""

READ_WITH_THE_WEIGHTS = frozenset({KEY})
"""Fields that say how tensors are stored, not which model they make up."""


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
        return typed(value, kind, key)

    def optional(self, key: str, kind: type) -> Any:
        """The value of `key`, or None where it is null or absent."""
        self.asked.add(key)
        return None if self.data.get(key) is None else self.get(key, kind)

    def either(self, key: str, other: str, kind: type) -> Any:
        """The value of one field that goes by two names. Both may be given if they agree."""
        values = {name: self.optional(name, kind) for name in (key, other)}
        found = {value for value in values.values() if value is not None}
        check(len(found) < 2, key, f"is {values[key]}, but {other} is {values[other]}")
        return found.pop() if found else self.get(key, kind)

    def positive(self, key: str, default: int | None = None) -> int:
        """The whole number `key`, which is above 0."""
        value = self.get(key, int, default)
        check(value > 0, key, f"{value} must be above 0")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """`key` may be absent, null or one of `allowed`; another value is a model of a different kind."""
        self.asked.add(key)
        value = self.data.get(key)
        check(value is None or value in allowed, key, f"{value!r} is not supported for this family")

    def ignore(self, *keys: str) -> None:
        """These fields have no effect in this family."""
        self.asked.update(keys)

    def finish(self) -> None:
        """Raise a ConfigError that names the fields which were neither read nor known to be without effect."""
        unknown = sorted(self.data.keys() - self.asked - WITHOUT_EFFECT - READ_WITH_THE_WEIGHTS)
        if unknown:
            raise ConfigError(
                unknown[0], f"not understood: {', '.join(unknown)}", "the model may need what moekit lacks"
            )


def typed(value: Any, kind: type, key: str) -> Any:
    """`value` if it is of type `kind`; a whole number may stand for another, and numbers are finite."""
    check(type(value) is kind or (kind, type(value)) == (float, int), key, f"{value!r} is not of type {kind.__name__}")
    if kind is int:
        check(abs(value) < 2**63, key, "is too large a number")
    if kind is not float:
        return value
    check(abs(value) < math.inf, key, f"{value} is not a finite number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(key, "is too large a number") from None
