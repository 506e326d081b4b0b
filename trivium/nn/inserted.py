"""A batch with the virtual tokens of adapters (see `adapted_inputs`), as the layers see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .inputs import Inputs


@dataclass(frozen=True)
class Inserted:
    """A batch with virtual tokens. `given` are the inputs without them, `inputs` those with; `places` [B, T] is where each
    given token now stands. `keys` [N, layers, 2, K, D] are those of the virtual tokens that have some, which stand in rows
    `at[0]` at `at[1]`."""

    given: Inputs
    inputs: Inputs
    places: Tensor
    at: tuple[Tensor, Tensor]
    keys: Tensor | None

    def outer(self, x: Tensor) -> Tensor:
        """What of `x` [B|1, T', ...] stands at the given tokens, [B, T, ...]."""
        index = self.places.view(*self.places.shape, *[1] * (x.dim() - 2))
        return x.expand(len(index), *x.shape[1:]).gather(1, index.expand(*self.places.shape, *x.shape[2:]))

    def keyed(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, T', D] of a layer, a prefix's own in their places."""
        if self.keys is None:
            return k, v
        rows, places = self.at
        k, v = k.clone(), v.clone()
        k[rows, :, places], v[rows, :, places] = self.keys[:, layer].to(k.dtype).unbind(1)
        return k, v
