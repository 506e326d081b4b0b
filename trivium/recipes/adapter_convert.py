"""An adapter in another form: another method or rank, another dtype, the names of another family's layout, or a GGUF file.

Whatever is done is measured on the model, as merging is, and nothing is written where it moved too much.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapt.adapter import MergeReport, adapter_tensors, adapters, compared, updates
from ..adapt.refit import Kind, refit
from ..core import device
from ..core.errors import ConfigError, FileError, TriviumError
from ..core.log import log
from ..io import peft
from ..io.gguf.adapter import write_adapter
from ..nn.adapted import Principal
from ..nn.adapted_dora import Dora
from .adapter import TOLERANCE, logits_of, opened, probe_of, say
from .load import Bundle, load


@dataclass(frozen=True)
class Converted:
    """What was written, and what that changed. `lost`: the worst that cutting the rank took of one map's update, as a share of its
    Frobenius norm."""

    path: str
    kind: str
    parameters_before: int
    parameters: int
    lost: float
    report: MergeReport


def convert_adapter(
    adapter: str | Path, out: str | Path, *, base: str | Path | None = None, onto: str | Path | None = None, kind: Kind | None = None,
    rank: int | None = None, dtype: str | None = None, tolerance: float = TOLERANCE, probe: str | None = None, accept: bool = False,
    overwrite: bool = False,
) -> Converted:  # fmt: skip
    """Write `adapter` in another form to `out`: a directory in PEFT's format, or a GGUF file where it ends in .gguf.

    `kind`: lora or dora, whatever it was, if weights of the base can express it; `rank`: cut to that, by singular values; one that
    started from the base's own weights becomes plain LoRA in any case. `dtype`: of what is stored. `onto`: the same base as another
    directory, whose names of layers the result takes. Raises `TriviumError` above `tolerance` nats of mean KL.
    """
    bundle = opened(adapter, base, dtype="fp32", accept=accept)
    model, out = bundle.model, Path(out)
    target = bundle if onto is None else _same_base(bundle, load(onto, dtype="fp32", accept=accept))
    tokens = torch.tensor([probe_of(bundle, probe)], device=model.device)
    before, count = logits_of(bundle, tokens), _count(bundle)
    lost: dict[str, float] = {}
    if kind is not None or rank is not None or _starts_from_base(bundle):
        lost = refit(model, rank=rank, kind=kind or ("dora" if adapters(model)["default"].kind == "dora" else "lora"))
    if dtype is not None:
        _round(bundle, device.dtype(dtype))
    step = adapters(model)["default"]
    found = compared(before, logits_of(bundle, tokens), adapter="default", maps=len(updates(model, "default")))
    say("converted", found)
    worst = max(lost, key=lambda path: lost[path], default=None)
    if worst is not None and lost[worst]:
        log.say(f"of {worst}, which lost the most, {lost[worst]:.2%} of the update are gone")
    if found.mean_kl > tolerance:
        raise TriviumError(
            f"converting moved the model by {found.mean_kl:.3g} nats, more than {tolerance:g}: take a higher --rank, or another --tolerance"
        )
    if out.suffix == ".gguf":
        write_adapter(out, model, dtype=dtype, rest=bundle.rest, overwrite=overwrite)
    else:
        peft.write(
            out, model, family=target.family, base=target.path if target.path.is_dir() else None, base_name=str(target.path.resolve()),
            extend=bundle.extended, dtype=None if dtype is None else device.dtype(dtype), overwrite=overwrite,
        )  # fmt: skip
    return Converted(str(out), step.kind, count, _count(bundle), max(lost.values(), default=0.0), found)


def _same_base(bundle: Bundle, other: Bundle) -> Bundle:
    """`other`, if it is what `bundle` is without its adapter, tensor for tensor."""
    mine = {name.replace(".base.", "."): parameter for name, parameter in bundle.model.named_parameters()}
    theirs = dict(other.model.named_parameters())
    if other.passes:
        raise ConfigError(f"{other.path}: has passes of its own; the result is put on a plain base", field="onto")
    own = {name: mine[name] for name in theirs if name in mine}
    if len(own) < len(theirs) or any(not torch.equal(own[name], theirs[name]) for name in theirs):
        raise FileError(f"{other.path}: does not hold the weights that the adapter's base ({bundle.path}) does")
    return other


def _starts_from_base(bundle: Bundle) -> bool:
    found = [update for _, update in updates(bundle.model, "default").values()]
    return any(isinstance(update.low if isinstance(update, Dora) else update, Principal) for update in found)


def _count(bundle: Bundle) -> int:
    return sum(tensor.numel() for tensor in adapter_tensors(bundle.model).values())


@torch.no_grad()
def _round(bundle: Bundle, dtype: torch.dtype) -> None:
    for tensor in adapter_tensors(bundle.model).values():
        tensor.copy_(tensor.to(dtype))
