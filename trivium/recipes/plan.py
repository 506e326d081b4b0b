"""What a run would need, without data if there is none yet: the recipe of `trivium plan`."""

from __future__ import annotations

import torch
from pydantic import Field

from ..adapt.passes import apply_passes
from ..core.device import dtype
from ..core.log import log
from ..models import count
from ..models.transformer import TransformerModel
from .load import Bundle
from .needs import Plan, foresee, whole
from .sft import SFT, prepared, started


class Ask(SFT):
    """A run of supervised fine-tuning, with or without its data."""

    data: tuple[str, ...] = Field((), description="training rows; none given: full rows of one document, all of it trained")


def plan(config: SFT, *, bundle: Bundle | None = None) -> Plan:
    """Memory, disk, steps and time of `sft(config)`. Without data, of full rows, which is the most that data can ask for;
    then without `train.steps`, of one step."""
    bundle = started(config, bundle)
    if config.data:
        data, _ = prepared(config, bundle)
        apply_passes(bundle.model, config.passes)
        return foresee(config, bundle.model, data, adapter=config.adapter)
    if config.train.steps is None:
        log.say("no data and no train.steps: disk and time are those of one step")
    apply_passes(bundle.model, config.passes)
    return foresee(config, bundle.model, whole(rows=config.train.rows, length=config.length), adapter=config.adapter)


def serving(model: TransformerModel, *, rows: int, context: int, precision: str | torch.dtype) -> dict[str, int]:
    """Bytes that answering takes beside the process itself: weights and the cache of `rows` rows of `context` tokens."""
    width = dtype(precision).itemsize
    entries = sum(count.cache_bytes(model)) // model.dtype.itemsize
    return {"weights": count.parameters(model).total * width, "cache": entries * width * rows * context}
