"""Adapters into weights and out again, with what that changed measured; and what an adapter holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapt.adapter import MergeReport, adapters, merge, updates
from ..adapt.lora import LoRA
from ..core.errors import ConfigError, TriviumError
from ..core.log import log
from ..io import files, peft
from ..io.tensors import read_file
from .load import Bundle, load
from .verify import CONVERSATION, TEXTS

TOLERANCE = 0.02  # nats of mean KL; rounding to bf16 alone moves a small model by about a tenth of it


def merge_adapter(
    adapter: str | Path, out: str | Path, *, base: str | Path | None = None, dtype: str | None = None, tolerance: float = TOLERANCE,
    probe: str | None = None, accept: bool = False, overwrite: bool = False,
) -> MergeReport:  # fmt: skip
    """Add `adapter` into its base (the one that it names, or `base`) and write the result to `out`.

    What merging changed is measured on the text `probe`; nothing is written if that is above `tolerance` nats of mean KL.
    """
    bundle = _loaded(adapter, base, dtype=dtype, accept=accept)
    return merge_into(bundle, Path(out), tolerance=tolerance, probe=_probe(bundle, probe), overwrite=overwrite)


def merge_into(bundle: Bundle, out: Path, *, tolerance: float, probe: Sequence[int], overwrite: bool) -> MergeReport:
    """Merge the bundle's adapter and save; `TriviumError` if the model moves by more than `tolerance` nats of mean KL."""
    found = merge(bundle.model, probe=torch.tensor([list(probe)], device=bundle.model.device))
    _say("merged", found)
    if found.mean_kl > tolerance:
        raise TriviumError(f"merging moved the model by {found.mean_kl:.3g} nats, more than {tolerance:g}: merge in float32 (--dtype fp32)")
    bundle.since("merge", adapter=bundle.adapter, report=asdict(found)).save(out, overwrite=overwrite)
    return found


def unmerge_adapter(
    model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str | None = None, probe: str | None = None, overwrite: bool = False
) -> MergeReport:
    """Take `adapter` out of `model`, into which it was merged, and write the result to `out`: the base, up to the rounding
    of its dtype. The report compares with `model` and the adapter's updates taken off beside it."""
    bundle = load(model, adapter=adapter, dtype=dtype, accept=True)  # these are not the base weights that the adapter records
    step = adapters(bundle.model)["default"]
    if type(step) is not LoRA or step.full:
        raise ConfigError(
            f"{adapter}: what a {step.kind} adapter was merged into does not tell what it was before: keep the base",
            field="kind",
            value=step.kind,
        )
    with torch.no_grad():
        for _, update in updates(bundle.model, "default").values():
            update.B.neg_()
    found = merge(bundle.model, probe=torch.tensor([_probe(bundle, probe)], device=bundle.model.device))
    _say("took out", found)
    bundle.since("unmerge", adapter=str(adapter), report=asdict(found)).save(Path(out), overwrite=overwrite)
    return found


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """What the adapter in directory `path` says and holds; needs no base. `norm` is the Frobenius norm of
    B A, before its scale."""
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
    }


def _loaded(adapter: str | Path, base: str | Path | None, *, dtype: str | None, accept: bool) -> Bundle:
    if not (Path(adapter) / peft.CONFIG).is_file():
        raise TriviumError(f"{adapter}: is no adapter directory; it has no {peft.CONFIG}")
    if base is None:
        return load(adapter, dtype=dtype, accept=accept)
    return load(base, adapter=adapter, dtype=dtype, accept=accept)


def _probe(bundle: Bundle, text: str | None) -> list[int]:
    """Tokens to measure on: the text, or a conversation, or plain text where the model has no template."""
    if text is not None:
        return bundle.tokenizer.encode(text)
    return bundle.tokenizer.encode("\n".join(TEXTS)) if bundle.prompt.template is None else bundle.prompt.generation(CONVERSATION)


def _say(done: str, found: MergeReport) -> None:
    log.say(
        f"{done} {found.maps} maps: logits moved by at most {found.max_logit_difference:.3g} (their deviation is {found.logit_deviation:.3g}), "
        f"mean KL {found.mean_kl:.2g} nats, likeliest token changed at {found.argmax_changed:.1%} of {found.tokens} positions"
    )


def _norm(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of b a, [out, r] by [r, in], without forming it."""
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt())
