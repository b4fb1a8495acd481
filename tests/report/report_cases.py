"""Parts of reports to render."""

from moekit.report import ExpertLayer

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
