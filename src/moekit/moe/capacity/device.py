"""Each device serves so many places, those of the highest affinity (arXiv 2405.04434, section 2.2.4)."""

import torch

from moekit.moe.capacity.limit import CapacityLimit, room_for
from moekit.moe.capacity.queue import queue, within_room
from moekit.moe.routing import Routing
from moekit.tensors import Bool, Float, Int, Tensor


class Limit(CapacityLimit):
    """A device has room for ceil(factor x K x T / devices) places of the batch's T real tokens, at least 1.

    The places of the lowest weight are dropped. Those of some sequences, `protected` of all that have real tokens (to
    the nearest whole number), are served even where there is no room; the others share what these leave. Which
    ones is chance in training and the first ones outside it. With `projection` routing the gate, up and down
    matrices of one number are on one device.
    """

    def limit(
        self,
        routing: Routing,
        ranking: Float[Tensor, "T E"],  # noqa: ARG002
        generator: torch.Generator | None,
    ) -> Routing:
        served = self._served(routing, generator)
        weights = routing.weights.masked_fill(served < 0, 0)
        return routing._replace(served=served, weights=weights, weights_before=routing.weights)

    @torch.no_grad()
    def _served(self, routing: Routing, generator: torch.Generator | None) -> Int[Tensor, "T K"]:
        n_devices, n_tokens = self.capacity.n_devices, len(routing.experts)
        safe = self._protected(routing, generator).repeat_interleave(n_tokens // routing.n_sequences)
        line = queue(routing, "probability", generator)
        line = line.at((~safe)[line.token].long().argsort(stable=True))
        device = line.of(routing.experts) % self.config.n_routed // (self.config.n_routed // n_devices)
        real = torch.tensor(n_tokens, device=device.device) if routing.mask is None else routing.mask.sum()
        room = room_for(self.capacity.factor, self.places(real).double() / n_devices).expand(n_devices)
        return line.at(~(within_room(device, room) | safe[line.token])).emptied(routing.experts)

    def _protected(self, routing: Routing, generator: torch.Generator | None) -> Bool[Tensor, " B"]:
        """The sequences that nothing of is dropped."""
        n_sequences, device = routing.n_sequences, routing.experts.device
        safe = torch.zeros(n_sequences, dtype=torch.bool, device=device)
        full = torch.arange(n_sequences, device=device)
        if routing.mask is not None:
            full = full[routing.mask.view(n_sequences, -1).any(dim=-1)]
        if self.training:
            full = full[torch.randperm(len(full), generator=generator, device=device)]
        safe[full[: int(len(full) * self.capacity.protected + 0.5)]] = True
        return safe
