"""A report with everything a report can have."""

import math

import pytest
from report_cases import DOMAINS, expert_layer, metrics_row

from moekit.report import Compression, ExpertUse, Report, Sample


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
