"""The package flash-attn as a backend: FlashAttention 2 (arXiv:2307.08691), for the GPUs that it supports.

It takes causal rows and sliding windows, softcap and grouped heads in 16 bits; masks, biases, sinks and values of another width
are a `ConfigError`.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..core.errors import ConfigError, MissingExtra
from .backends import NONE, Extras, Mask, backends, skipping
from .patterns import Window
from .step import View

skipping.add("flash")


@backends.register("flash")
def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Mask | None, extras: Extras = NONE) -> Tensor:
    """What flash_attn_func gives. It lays later queries at the last keys, as a cache does."""
    back = -1
    if isinstance(mask, View) and mask.even and mask.prefix is None:
        if isinstance(mask.bounded, Window):
            back = mask.bounded.size - 1
        if mask.bounded is None or back >= 0:
            causal, mask = mask.causal, None
    wrong = {
        "it needs a GPU": q.device.type != "cuda",
        "it takes float16 and bfloat16": q.dtype not in (torch.float16, torch.bfloat16),
        "it takes no mask": mask is not None,
        "it takes no bias and no sinks": extras.bias is not None or extras.sinks is not None,
        "it wants values as wide as keys": q.shape[-1] != v.shape[-1],
    }
    for reason, so in wrong.items():
        if so:
            raise ConfigError(f"the attention backend 'flash' cannot do this: {reason}; use 'auto'", field="backend", value="flash")
    try:
        run = importlib.import_module("flash_attn").flash_attn_func
    except ModuleNotFoundError as error:
        raise MissingExtra("flash-attn", "flash", "the attention backend 'flash'") from error
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = run(q, k, v, softmax_scale=scale, causal=causal, window_size=(back, 0 if causal else back), softcap=extras.softcap or 0.0)
    return out.transpose(1, 2)
