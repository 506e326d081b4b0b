"""Adapters into weights and out again, with what that changed measured; and what an adapter holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapt.adapter import MergeReport, Repacked, compared, merge, remove_adapter, take_out, updates
from ..adapt.nf4 import dequantize
from ..core.errors import TriviumError
from ..core.log import log
from ..io import files, peft
from ..io.tensors import Lazy, read_file
from ..models.count import bytes_of
from ..nn.inputs import Inputs
from .load import Bundle, load
from .packed import Packing, packing_of
from .verify import CONVERSATION, TEXTS

TOLERANCE = 0.02  # nats of mean KL; rounding to bf16 alone moves a small model by about a tenth of it


def merge_adapter(
    adapter: str | Path, out: str | Path, *, base: str | Path | None = None, dtype: str | None = None, tolerance: float = TOLERANCE,
    probe: str | None = None, accept: bool = False, overwrite: bool = False,
) -> MergeReport:  # fmt: skip
    """Add `adapter` into its base (the one that it names, or `base`) and write the result to `out`.

    What merging changed is measured on the text `probe`; nothing is written if that is above `tolerance` nats of mean KL. Where
    the base is packed in few bits, what is written is not: the report's `repacked` says what that costs.
    """
    bundle = opened(adapter, base, dtype=dtype, accept=accept)
    return merge_into(bundle, Path(out), tolerance=tolerance, probe=probe_of(bundle, probe), overwrite=overwrite)


def merge_into(bundle: Bundle, out: Path, *, tolerance: float, probe: Sequence[int], overwrite: bool) -> MergeReport:
    """Merge the bundle's adapter and save; `TriviumError` if the model moves by more than `tolerance` nats of mean KL."""
    tokens = torch.tensor([list(probe)], device=bundle.model.device)
    packing = packing_of(bundle)
    beside = None if packing is None else logits_of(bundle, tokens)
    if packing is not None and packing.still:
        dequantize(bundle.model)  # four bits could not hold what is merged
    maps = list(updates(bundle.model, "default"))
    found = merge(bundle.model, probe=tokens)
    say("merged", found)
    if found.mean_kl > tolerance:
        raise TriviumError(f"merging moved the model by {found.mean_kl:.3g} nats, more than {tolerance:g}: merge in float32 (--dtype fp32)")
    if packing is not None and beside is not None:
        found = replace(found, repacked=cost(bundle, packing, maps, tokens, beside))
    bundle.since("merge", adapter=bundle.adapter, report=asdict(found)).save(out, overwrite=overwrite)
    return found


@torch.no_grad()
def cost(bundle: Bundle, packing: Packing, maps: Sequence[str], tokens: Tensor, beside: Tensor) -> Repacked:
    """What it costs that the base was packed, said on the log: in bytes, since merged weights are not, and, were `maps` packed so
    again, in nats from `beside`, the logits of the adapter beside its packed base. The model is left as it was."""
    moved, nats = bytes_of(bundle.model.parameters()), None
    if packing.again is not None:
        weights = [bundle.model.get_parameter(f"{path}.weight") for path in maps]
        held = [weight.clone() for weight in weights]
        for weight in weights:
            weight.copy_(packing.again(weight))
        nats = compared(beside, logits_of(bundle, tokens), adapter="default", maps=len(maps)).mean_kl
        for weight, old in zip(weights, held, strict=True):
            weight.copy_(old)
    again = "" if nats is None else f"; packed so again, the merged maps would be {nats:.2g} nats of mean KL away"
    log.say(f"the base was held as {packing.form} in {packing.bytes / 1e6:,.1f} MB; merged, it takes {moved / 1e6:,.1f} MB{again}")
    return Repacked(packing.form, packing.bytes, moved, nats)


@torch.no_grad()
def unmerge_adapter(
    model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str | None = None, probe: str | None = None, overwrite: bool = False
) -> MergeReport:
    """Take `adapter` out of `model`, into which it was merged, and write the result to `out`: the base, up to the rounding
    of its dtype. The report compares `model` with the result and the adapter beside it. `TriviumError` where what was merged does
    not tell what the base was: maps trained whole, and DoRA without the norms that adapters saved here keep."""
    bundle = load(model, dtype=dtype)
    peft.read(adapter, bundle.model, family=bundle.family)  # whatever base it records: these are not those weights any more
    tokens = torch.tensor([probe_of(bundle, probe)], device=bundle.model.device)
    maps = len(updates(bundle.model, "default"))
    merged = bundle.model(Inputs(tokens, adapters=torch.tensor([-1], device=tokens.device))).logits
    take_out(bundle.model, known=peft.read_kept(adapter))
    found = compared(merged, logits_of(bundle, tokens), adapter="default", maps=maps)
    say("took out", found)
    remove_adapter(bundle.model)
    bundle.since("unmerge", adapter=str(adapter), report=asdict(found)).save(Path(out), overwrite=overwrite)
    return found


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """What the adapter in directory `path` says and holds; needs no base. `maps`: of low-rank updates, each with its sizes and
    the Frobenius norm of B A, before its scale; `tensors`: of all other parameters, each with its shape and norm."""
    path = Path(path)
    config, tensors = peft.read_config(path), read_file(path / peft.WEIGHTS)
    record = files.read_json(path / peft.RECORD) if (path / peft.RECORD).is_file() else {}
    maps = []
    for name in sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")):
        a, b = (tensors[f"{name}.lora_{part}.weight"].load().float() for part in "AB")
        maps.append(
            {
                "module": name.removeprefix(peft.PREFIX),
                "in": a.shape[1],
                "out": b.shape[0],
                "rank": a.shape[0],
                "parameters": a.numel() + b.numel(),
                "norm": _norm(a, b),
            }
        )
    return {
        "path": str(path),
        "base": config.base_model_name_or_path,
        "base_digest": record.get("base"),
        "config": config.to_dict(),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "maps": maps,
        "tensors": [_told(key, lazy) for key, lazy in sorted(tensors.items()) if not key.endswith((".lora_A.weight", ".lora_B.weight"))],
    }


def _told(key: str, lazy: Lazy) -> dict[str, Any]:
    return {"tensor": key.removeprefix(peft.PREFIX), "shape": list(lazy.shape), "norm": float(lazy.load().float().norm())}


def opened(adapter: str | Path, base: str | Path | None, *, dtype: str | None, accept: bool) -> Bundle:
    """The adapter on `base`, or on the base that it names."""
    if not (Path(adapter) / peft.CONFIG).is_file():
        raise TriviumError(f"{adapter}: is no adapter directory; it has no {peft.CONFIG}")
    if base is None:
        return load(adapter, dtype=dtype, accept=accept)
    return load(base, adapter=adapter, dtype=dtype, accept=accept)


def probe_of(bundle: Bundle, text: str | None) -> list[int]:
    """Tokens to measure on: the text, or a conversation, or plain text where the model has no template."""
    if text is not None:
        return bundle.tokenizer.encode(text)
    return bundle.tokenizer.encode("\n".join(TEXTS)) if bundle.prompt.template is None else bundle.prompt.generation(CONVERSATION)


@torch.no_grad()
def logits_of(bundle: Bundle, tokens: Tensor) -> Tensor:
    """[1, T] -> [1, T, V], as the model now is, at rest."""
    return bundle.model.eval()(tokens).logits


def say(done: str, found: MergeReport) -> None:
    """The report, on the log."""
    log.say(
        f"{done} {found.maps} maps: logits moved by at most {found.max_logit_difference:.3g} (their deviation is {found.logit_deviation:.3g}), "
        f"mean KL {found.mean_kl:.2g} nats, likeliest token changed at {found.argmax_changed:.1%} of {found.tokens} positions"
    )


def _norm(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of b a, [out, r] by [r, in], without forming it."""
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt())
