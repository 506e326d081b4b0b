"""In how few bits a model's weights were held where it came from: what merging into them, or writing them in full, gives up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapt.adapter import adapter_tensors, adapters
from ..adapt.nf4 import Nf4
from ..io.gguf.dequantize import TYPES, dequantize
from ..io.gguf.quantize import WRITTEN, quantize
from ..io.gguf.reader import open_gguf
from ..models.count import bytes_of
from ..nn.nf4 import Nf4Linear
from .load import Bundle


@dataclass(frozen=True)
class Packing:
    """`form`: how most of what is packed was held; `bytes`: of all tensors of the base. `again`: a matrix as it would be after it was
    packed so once more; None where we do not pack so. `still`: whether the model holds it so now, as it does NF4's."""

    form: str
    bytes: int
    again: Callable[[Tensor], Tensor] | None
    still: bool


def packing_of(bundle: Bundle) -> Packing | None:
    """How the base of `bundle` was packed; None where it was not."""
    if (quantized := next((step for step in bundle.passes if isinstance(step, Nf4)), None)) is not None:
        beside = sum(bytes_of(adapter_tensors(bundle.model, name).values()) for name in adapters(bundle.model))
        return Packing("NF4", bytes_of(bundle.model.parameters()) - beside, _through_nf4(quantized), still=True)
    if not bundle.path.is_file():
        return None
    tensors = open_gguf(bundle.path).tensors.values()
    sizes: Counter[str] = Counter()
    for info in tensors:
        if TYPES[info.type].block > 1:
            sizes[info.type] += info.nbytes
    if not sizes:
        return None
    kind = sizes.most_common(1)[0][0]
    return Packing(kind, sum(info.nbytes for info in tensors), _through(kind) if kind in WRITTEN else None, still=False)


def _through_nf4(step: Nf4) -> Callable[[Tensor], Tensor]:
    def again(weight: Tensor) -> Tensor:
        outputs, inputs = weight.shape
        made = Nf4Linear(inputs, outputs, block=step.block, double=step.double)
        made.take(weight)
        return made.dense(weight.dtype)

    return again


def _through(kind: str) -> Callable[[Tensor], Tensor]:
    def again(weight: Tensor) -> Tensor:
        if weight.shape[-1] % TYPES[kind].block:
            return weight
        packed = quantize(kind, weight.detach().float().cpu().contiguous().view(-1).numpy())
        return torch.from_numpy(dequantize(kind, packed)).view(weight.shape).to(weight)

    return again
