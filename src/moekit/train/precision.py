"""Rounded computation with float32 master weights: the optimizer moves masters, the model holds their roundings."""

from collections.abc import Callable, Container, Mapping

import torch
from torch import nn

from moekit.tensors import Tensor
from moekit.tensors.memory import in_huge_pages
from moekit.tensors.sums import add_


class MasterWeights:
    """The float32 weights of a model that computes in `dtype`, those named in `roundings` after these as well.

    In float32 without roundings the model's parameters are the masters. A master takes over the gradient of its
    rounding as it is; gradients of several micro-batches are summed in float32.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, roundings: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> None:
        self.roundings = roundings
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        exact = dtype == torch.float32 and not roundings
        masters = {} if exact else {name: _master(p.detach()) for name, p in named.items()}
        model.to(dtype)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: Mapping[str, Tensor] = self.working if exact else masters
        for master in masters.values():
            master.grad_dtype = None
        self.publish()

    def collect(self) -> None:
        """Move the gradients of the last backward pass to the masters, adding to what is there."""
        if self.masters is self.working:
            return
        for name, working in self.working.items():
            if working.grad is not None:
                master = self.masters[name]
                if master.grad is None:
                    master.grad = working.grad
                else:
                    master.grad = add_(master.grad.float(), working.grad)
                working.grad = None

    def copies(self) -> dict[int, Tensor]:
        """The tensors that hold plain roundings, by the identity of their master: who moves it can round it as well."""
        if self.masters is self.working:
            return {}
        return {id(self.masters[name]): p.detach() for name, p in self.working.items() if name not in self.roundings}

    @torch.no_grad()
    def publish(self, rounded: Container[int] = ()) -> None:
        """Round the masters into the model, but those whose identity is among `rounded`: it is done."""
        if self.masters is self.working:
            return
        for name, working in self.working.items():
            rounding, master = self.roundings.get(name), self.masters[name]
            if id(master) not in rounded:
                working.copy_(master if rounding is None else rounding(master))

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.masters.values(), *self.working.values()):
            parameter.grad = None

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors with masters in place of their roundings."""
        return {**model.state_dict(), **{name: p.detach() for name, p in self.masters.items()}}


def _master(weight: Tensor) -> Tensor:
    return in_huge_pages(weight, torch.float32).copy_(weight).requires_grad_()


def compute_dtype(wanted: str, device: str) -> torch.dtype:
    """`auto`: bfloat16 where matrix products of that type are fast here, else float32."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    fast = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
