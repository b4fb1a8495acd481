"""Blueprints of presets, and devices with round numbers."""

from moekit.config.presets.load import load_run
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.from_config import blueprint_of


def preset(name: str) -> Blueprint:
    return blueprint_of(load_run(name).model, name, "preset")


def dense() -> Blueprint:
    """A model without mixtures."""
    whole = preset("olmoe-1b-7b")
    weights = tuple(w for w in whole.weights if w.part not in ("routed", "router"))
    return whole._replace(weights=weights, mixtures=())


def card(memory: float = 24e9, bandwidth: float = 1000e9, rate: float = 100e12, **changes: object) -> Device:
    """A device with the same rate for all types."""
    rates = {"float32": rate, "bfloat16": rate}
    device = Device("card", "gpu", int(memory), bandwidth, rates, {"host": 32e9}, 8, 0.0, "", "")
    return device._replace(**changes)  # type: ignore[arg-type]


def computer(memory: float, bandwidth: float) -> Device:
    return card(memory, bandwidth, kind="cpu", links={})
