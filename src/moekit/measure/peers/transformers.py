"""Hugging Face transformers at the same work: `DeepseekV3MoE` and `DeepseekV3ForCausalLM`."""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from moekit.measure.bench.shapes import HubFields, LayerShape
from moekit.measure.models import fill, fill_matrix

NAME = "transformers"

BACK_ENDS = ("eager", "grouped_mm", "batched_mm")
"""Ways to compute the experts; the last gathers each place's matrices, which suits a single token alone."""


def back_ends(tokens: int) -> tuple[str, ...]:
    """Those that are tried with so many tokens."""
    return BACK_ENDS if tokens == 1 else BACK_ENDS[:2]


def layers(shape: LayerShape, dtype: torch.dtype, copies: int) -> Iterator[tuple[str, list[nn.Module]]]:
    """For each back end, `copies` layers with the numbers of `fill`. Those of all back ends are the same in memory."""
    first: list[nn.Module] = []
    for back_end in back_ends(shape.tokens):
        empty = [_empty_layer(shape, dtype, back_end) for _ in range(copies)]
        if not first:
            first = [_filled(layer) for layer in empty]
        for layer, filled in zip(empty, first, strict=True):
            if layer is not filled:
                layer.load_state_dict(filled.state_dict(keep_vars=True), assign=True)
        yield back_end, empty


def training_step(fields: HubFields, back_end: str, dtype: str, batch: int, length: int) -> Callable[[], object]:
    """One step of AdamW on a fresh model of `config.json` fields; bfloat16 by autocast over float32 weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: PLC0415 - optional, and slow to import

    torch.manual_seed(0)
    config = DeepseekV3Config(**fields)
    config._experts_implementation = back_end
    model = DeepseekV3ForCausalLM._from_config(config)
    model.config._experts_implementation = back_end
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, fields["vocab_size"], (batch, length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _empty_layer(shape: LayerShape, dtype: torch.dtype, back_end: str) -> nn.Module:
    from transformers import DeepseekV3Config  # noqa: PLC0415 - optional, and slow to import
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: PLC0415

    config = DeepseekV3Config(
        hidden_size=shape.width,
        moe_intermediate_size=shape.expert_width,
        n_routed_experts=shape.n_routed,
        num_experts_per_tok=shape.top_k,
        n_shared_experts=shape.n_shared,
        n_group=1,
        topk_group=1,
    )
    config._experts_implementation = back_end
    with torch.device("meta"), warnings.catch_warnings():
        # Shared experts of no width are built where there are none.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return DeepseekV3MoE(config).to(dtype)


@torch.no_grad()
def _filled(layer: nn.Module) -> nn.Module:
    layer.to_empty(device="cpu")
    fill(layer)
    for bias in layer.buffers():
        bias.zero_()
    # moekit has these two in one matrix.
    shared = layer.get_submodule("shared_experts")
    gate, up = (shared.get_parameter(f"{name}_proj.weight") for name in ("gate", "up"))
    if gate.numel():
        both = torch.empty(2, *gate.shape, dtype=gate.dtype)
        fill_matrix(both)
        gate.copy_(both[0])
        up.copy_(both[1])
    return layer
