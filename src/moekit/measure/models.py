"""Models with numbers in them that cost no time to draw: for measuring speed and memory, not text."""

import torch

from moekit.config.model import ModelConfig
from moekit.model.transformer import Transformer

DRAWN = 1 << 20
"""Random numbers that are drawn; tensors repeat them."""


@torch.no_grad()
def random_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model in `dtype`, ready for evaluation, with weights of a trained model's size."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    numbers = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        drawn = (numbers * (1.0 / parameter.shape[-1]) ** 0.5).to(parameter.dtype)
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), DRAWN):
            part = flat[start : start + DRAWN]
            part.copy_(drawn[: len(part)])
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model
