"""Model families of the hub that moekit does not run but counts, one file each."""

from collections.abc import Callable, Mapping
from typing import Any

from moekit.plan.blueprint import Blueprint
from moekit.plan.decoder import Decoder, blueprint_of_decoder
from moekit.plan.families import dbrx, ernie4_5_moe, glm4_moe, gpt_oss, granitemoe, hunyuan_v1_moe, phimoe

READERS: Mapping[str, Callable[[Mapping[str, Any], str], Decoder]] = {
    "dbrx": dbrx.read,
    "ernie4_5_moe": ernie4_5_moe.read,
    "glm4_moe": glm4_moe.read,
    "gpt_oss": gpt_oss.read,
    "granitemoe": granitemoe.read,
    "hunyuan_v1_moe": hunyuan_v1_moe.read,
    "phimoe": phimoe.read,
}
"""What reads the `config.json` of each `model_type`."""


def read_family(data: Mapping[str, Any], name: str) -> Blueprint:
    """The blueprint of the model called `name`, whose `model_type` must be among READERS.

    Raises ConfigError for a field that is missing, wrong, or unknown and so might change a count.
    """
    return blueprint_of_decoder(READERS[data["model_type"]](data, name))
