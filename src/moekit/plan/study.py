"""What is asked about a model, and the sections that answer it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moekit.config.errors import ConfigError, check
from moekit.plan.blueprint import Blueprint
from moekit.plan.compute import compute
from moekit.plan.devices import Device
from moekit.plan.figure import Section
from moekit.plan.fit import fit
from moekit.plan.memory import Layout, Training, kv_cache, memory
from moekit.plan.offload import offload
from moekit.plan.parallel import expert_parallel
from moekit.plan.parameters import parameters
from moekit.plan.precision import FORMATS, Format, Precision, parse_precision
from moekit.plan.speed import speed
from moekit.plan.step import LARGEST

PARTLY = {"mxfp4": "bfloat16,routed=mxfp4"}
"""How released models that are quantised in part store their parts: gpt-oss its experts alone."""


class Recipe(NamedTuple):
    """How to train: the optimizer, and the tokens of one of its steps, over all devices; none: those of one batch."""

    optimizer: Literal["adamw", "muon"] = "muon"
    tokens_per_step: int | None = None


DESKTOP = 64 * 10**9


class Host(NamedTuple):
    """The computer around a device: its memory in bytes, how fast that and the disk are in bytes/s.

    The defaults are a desktop's: 64 GB of dual-channel DDR5, unless the device computes in its computer's memory, and a
    PCIe 4.0 disk. `hit_rate` is the share of wanted experts that are in memory; none: as uniform choices give.
    """

    ram: int | None = None
    ram_bandwidth: float = 80e9
    disk_bandwidth: float = 7e9
    hit_rate: float | None = None

    def beside(self, device: Device) -> tuple[int, float, float, float | None]:
        """The four numbers, with the default memory filled in."""
        ram = DESKTOP if device.kind == "gpu" else 0
        return (ram if self.ram is None else self.ram, *self[1:])


ONE_DEVICE, AROUND = Layout(), Host()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked. What a device is needed for is answered where `device` is given."""

    precision: Precision | None = None
    """formats of the weights; none: as the source stores them"""
    kv: Format = FORMATS["bfloat16"]
    """format of the key-value cache"""
    context: int | None = None
    """tokens of a sequence; none: 4096, or what the model is meant for if that is less"""
    batch: int = 1
    """sequences at once"""
    prompt: int = 512
    """tokens that are read before the first is generated"""
    tokens: int | None = None
    """tokens to train on"""
    recipe: Recipe | None = None
    """how to train, where the memory of training is asked for"""
    layout: Layout = ONE_DEVICE
    """how devices share the model"""
    device: Device | None = None
    """what it runs on"""
    n_devices: int = 1
    """how many of them"""
    redundant: int = 0
    """experts that are held twice, in all, where experts are spread over devices"""
    host: Host = AROUND
    """what surrounds the device"""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("context", "batch", "prompt", "n_devices")}
        sizes |= {name: getattr(self.layout, name) for name in ("data", "expert", "tensor", "pipeline")}
        for key, value in sizes.items():
            check(value is None or 1 <= value <= LARGEST, key, f"{value} is no size", f"1 to {LARGEST:,}")
        check(0 <= self.redundant <= LARGEST, "redundant", f"{self.redundant} must not be negative")
        check(self.tokens is None or self.tokens > 0, "tokens", f"{self.tokens} must be above 0")
        rate = self.host.hit_rate
        check(rate is None or 0 <= rate <= 1, "hit_rate", f"{rate} is no share", "from 0 to 1")

    def precision_of(self, blueprint: Blueprint) -> Precision:
        """The formats asked for; else those that the source stores, or bfloat16 where it does not say."""
        if self.precision is not None:
            return self.precision
        stored = blueprint.quantisation or "bfloat16"
        try:
            return parse_precision(PARTLY.get(stored, stored))
        except ConfigError:
            message = f"{blueprint.name} is stored as {stored}, whose size is not known here"
            raise ConfigError("dtype", message, "name the format to plan with, for example q4_k or bfloat16") from None

    def context_of(self, blueprint: Blueprint) -> int:
        """The context asked for, or the default for this model."""
        return self.context or max(min(blueprint.max_positions, 4096), 1)

    def training_of(self, blueprint: Blueprint) -> Training | None:
        """The training asked for, in sequences of the context; in bfloat16 where the weights' format is finer.

        Raises ConfigError where the tokens of a step are no whole number of batches.
        """
        if self.recipe is None:
            return None
        length, compute = self.context_of(blueprint), self.precision_of(blueprint).default
        at_once = self.batch * length * self.layout.data
        wanted = self.recipe.tokens_per_step or at_once
        message = f"{wanted:,} are no multiple of batch x context x data = {at_once:,}"
        check(wanted % at_once == 0, "tokens_per_step", message, f"for example {max(wanted // at_once, 1) * at_once}")
        compute = FORMATS["bfloat16"] if compute.quantised else compute
        optimizer, batches = self.recipe.optimizer, wanted // at_once
        return Training(self.batch, length, optimizer, compute, micro_batches=batches)


def study(blueprint: Blueprint, request: Request) -> tuple[Section, ...]:
    """The sections that answer `request`, in the order in which they are read. Offloading is of one device.

    Raises ConfigError for what cannot be.
    """
    precision, context, kv, batch = (
        request.precision_of(blueprint),
        request.context_of(blueprint),
        request.kv,
        request.batch,
    )
    sections = [
        parameters(blueprint),
        kv_cache(blueprint, kv, context, batch),
        memory(blueprint, precision, kv, context, batch, request.training_of(blueprint), request.layout),
        compute(blueprint, context, request.tokens),
    ]
    device = request.device
    if device is None:
        return tuple(sections)
    sections += [
        fit(blueprint, precision, kv, context, batch, device, request.n_devices),
        speed(blueprint, precision, kv, context, batch, request.prompt, device, request.n_devices),
    ]
    if request.n_devices == 1:
        sections.append(offload(blueprint, precision, kv, context, device, *request.host.beside(device)))
    if request.layout.expert > 1:
        sections.append(_spread(blueprint, request, device))
    return tuple(sections)


def _spread(blueprint: Blueprint, request: Request, device: Device) -> Section:
    """Experts over `layout.expert` devices; each starts with the tokens it trains on at once, or with its prompts."""
    precision, devices = request.precision_of(blueprint), request.layout.expert
    tokens = request.batch * (request.prompt if request.recipe is None else request.context_of(blueprint))
    rate = device.rate(precision.named.get("routed", precision.default).compute)
    per_node = min(device.per_node, devices)
    try:
        return expert_parallel(blueprint, precision, devices, per_node, request.redundant, tokens, device.links, rate)
    except ConfigError as error:
        key = "expert" if error.key == "devices" else error.key
        raise ConfigError(key, error.reason, error.hint) from None
