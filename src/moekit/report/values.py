"""What a report is made of: plain values, ready to be drawn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """Bits per byte of held-out text of a domain: the model's, and what two compressors need; NaN where unknown."""

    domain: str
    bits_per_byte: float
    gzip: float = math.nan
    """of `gzip -9`"""
    xz: float = math.nan
    """of `xz -9`"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayer:
    """How one layer's experts were used."""

    layer: int
    """its number in the model, counted from 0"""
    load: Sequence[int]
    """slots given to each expert"""
    max_violation: float
    """(largest load - mean load) / mean load"""
    entropy: float
    """of the load, 1 where all experts work equally"""
    dead_experts: int
    """experts no token used"""
    share: Sequence[Sequence[float]]
    """for each domain, the share of its tokens that visit each expert"""
    divergence: float
    """Jensen-Shannon divergence between the domains, in bits"""
    pairwise: Sequence[Sequence[float]]
    """the same for two domains alone"""
    shuffled_mean: float
    """the divergence when tokens are given a domain at random: mean over the permutations"""
    shuffled_p95: float
    """its 95th percentile"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertUse:
    """Which text went to which expert."""

    domains: Sequence[str]
    tokens: Sequence[int]
    """tokens traced of each domain"""
    uniform_share: float
    """share of tokens that visit an expert if all were alike: top_k / n_routed"""
    permutations: int
    """random permutations behind the shuffled control"""
    layers: Sequence[ExpertLayer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the model writes after a prompt."""

    domain: str
    prompt: str
    continuation: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that a page shows. Whatever is empty is left out of the page."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """label and value of what a reader wants to know first: parameters, tokens, time, machine"""
    compression: Sequence[Compression] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    """rows of metrics.jsonl"""
    experts: ExpertUse | None = None
    samples: Sequence[Sample] = ()


def average(rows: Iterable[Compression]) -> Compression:
    """The plain mean over the domains; NaN where a domain's figure is unknown."""
    rows = list(rows)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    return Compression(
        domain="average",
        bits_per_byte=mean([row.bits_per_byte for row in rows]),
        gzip=mean([row.gzip for row in rows]),
        xz=mean([row.xz for row in rows]),
    )
