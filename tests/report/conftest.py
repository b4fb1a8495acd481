"""Reports to render: a full one and parts of it."""

import math

import pytest

from moekit.report import Compression, ExpertLayer, ExpertUse, Report, Sample

DOMAINS = ("code", "日本語")


def metrics_row(step: int, loss: float, **more) -> dict:
    layers = [{"layer": layer, "max_violation": 0.5 + layer, "entropy": 0.97, "dead_experts": 0} for layer in (1, 2)]
    return {
        "step": step,
        "loss": loss + 0.1,
        "losses": {"next_token": loss, "mtp": loss + 0.7, "sequence_loss": 0.0003},
        "lr": 0.02,
        "gradient_norm": 0.7,
        "tokens": 4096 * step,
        "tokens_per_s": 21000.0,
        "layers": layers,
        **more,
    }


def expert_layer(layer: int, load: list[int]) -> ExpertLayer:
    share = [[value / max(sum(load), 1) * 2 for value in load] for _ in DOMAINS]
    return ExpertLayer(
        layer=layer,
        load=load,
        max_violation=1.2345,
        entropy=0.9,
        dead_experts=load.count(0),
        share=share,
        divergence=0.1234,
        pairwise=[[0.0, 0.1234], [0.1234, 0.0]],
        shuffled_mean=0.0021,
        shuffled_p95=0.0032,
    )


@pytest.fixture
def report() -> Report:
    valid = {name: {"loss": 3.0, "bits_per_byte": 1.75} for name in DOMAINS}
    rows = [metrics_row(step, 8 / step**0.2) for step in range(1, 101)]
    rows[-1]["validation"] = valid
    layers = [expert_layer(1, [5, 0, 9, 2]), expert_layer(2, [4, 4, 4, 4])]
    return Report(
        title="runs/a",
        facts=[("parameters", "7.9 M"), ("time", "3 min")],
        compression=[
            Compression(domain="code", bits_per_byte=1.43, gzip=1.62, xz=1.48),
            Compression(domain="日本語", bits_per_byte=2.19, gzip=2.9, xz=math.nan),
        ],
        metrics=rows,
        experts=ExpertUse(domains=DOMAINS, tokens=(8, 8), uniform_share=0.5, permutations=20, layers=layers),
        samples=[Sample(domain="日本語", prompt="吾輩は", continuation="猫である。")],
    )
