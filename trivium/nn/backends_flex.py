"""torch's FlexAttention as a backend: scores and masks as small functions that torch compiles into one kernel (arXiv:2412.05496).

On a GPU it is compiled; on a CPU torch runs the same functions over the whole matrix of scores, without a backward.
Sinks need no kernel of their own: one more key of value zero scales what attention gives by sigmoid(lse - sink).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from ..core.errors import ConfigError
from .backends import NONE, Extras, Mask, backends, skipping
from .step import View, pick

skipping.add("flex")


@backends.register("flex")
def flex(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """FlexAttention; on a CPU without gradients alone."""
    cpu = q.device.type == "cpu"
    learned = [x for x in (q, k, v, extras.sinks, *extras.learned) if x is not None and x.requires_grad]
    if cpu and torch.is_grad_enabled() and learned:
        raise ConfigError("FlexAttention has no gradients on a CPU; use 'auto', or torch.no_grad()", field="backend", value="flex")
    if not q.numel() or not k.numel():
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    blocks = _blocks(q, k, causal=causal, mask=mask)
    run = _eager if cpu else _compiled()
    out, aux = run(q, k, v, _change(extras), blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True))
    if extras.sinks is None:
        return out
    return out * torch.sigmoid(aux.lse - extras.sinks.float()[:, None])[..., None].to(out.dtype)


def _eager(*given: Any, **named: Any) -> Any:
    """The plain statement: torch would else trace it anew for each shape. That it holds every score is known here."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(*given, **named)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _change(extras: Extras) -> Callable[..., Tensor] | None:
    """What becomes of the score of query i and key j in head h of row b."""
    if extras.softcap is None and extras.bias is None:
        return None

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if extras.softcap is not None:
            score = extras.softcap * torch.tanh(score / extras.softcap)
        if extras.bias is not None:
            assert extras.places is not None
            query, key = (pick(x, b, at) for x, at in zip(extras.places, (i, j), strict=True))
            bias = extras.bias(query.view(1, 1), key.view(1, 1))[0, :, 0, 0]
            score = score + (bias[h] if len(bias) > 1 else bias[0])
        return score

    return change


def _blocks(q: Tensor, k: Tensor, *, causal: bool, mask: Mask | None) -> BlockMask | None:
    """Which blocks of keys hold anything that a query sees. A view's are found once per forward."""
    batch, _, count, _ = q.shape
    slots = k.shape[2]

    def build(sees: Callable[..., Tensor], rows: int | None = None, heads: int | None = None) -> BlockMask:
        return create_block_mask(sees, rows, heads, count, slots, device=q.device)

    if causal:
        return build(lambda b, h, i, j: j <= i)
    if isinstance(mask, View):
        view = mask  # the memo holds the slots too, so that their id stays theirs
        key = ("blocks of", view.causal, view.bounded, id(view.slots))
        return view.step.memo(key, lambda: (view.slots, build(lambda b, h, i, j: view.at(b, i, j), batch)))[1]
    if mask is None:
        return None
    whole = mask.expand(-1, -1, count, slots)
    rows, heads = whole.shape[:2]
    return build(lambda b, h, i, j: whole[b if rows > 1 else 0, h if heads > 1 else 0, i, j], batch, heads if heads > 1 else None)
