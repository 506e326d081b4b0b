"""Data sets that are mixed by weight: how a config names them, the batches of a run over them, and what such a run takes of each.

A weight is a share of the tokens. Every set goes through epochs of its own, and batch i is a function of its number alone, so what
a run will have taken in the end is known before it begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import ConfigError
from ..core.log import log
from ..data.bank import Prepared
from ..data.batches import Batches
from ..train.loop import TrainConfig

Sets = Sequence[tuple[Prepared, int]]  # data sets, each with its weight


def mixture(data: Sequence[str]) -> list[tuple[tuple[str, ...], int]]:
    """The data sets of a run, and their weights. `a.jsonl:2` is a set with the weight 2; without any weight, all of `data` is one set.
    Raises `ConfigError` where some have a weight and some have none."""
    found = [(path, 0) if Path(path).exists() else _weighted(path) for path in data]
    bare = [path for path, weight in found if not weight]
    if len(bare) == len(found):
        return [(tuple(data), 1)]
    if bare:
        message = f"data: {bare[0]} has no weight, and others have; write one behind each ({bare[0]}:1), or behind none"
        raise ConfigError(message, field="data", value=bare[0])
    return [((path,), weight) for path, weight in found]


def _weighted(text: str) -> tuple[str, int]:
    """A path and its weight, 0 where it has none."""
    parts = re.fullmatch(r"(.+):(\d+)", text)
    if parts is None:
        return text, 0
    if not int(parts[2]):
        raise ConfigError(f"data: {text}: a weight is a whole number from 1; leave out what is not to be used", field="data", value=text)
    return parts[1], int(parts[2])


def batches(train: Prepared | Sets, config: TrainConfig) -> Batches:
    """The batches of a run over one data set, or over several with their weights."""
    return Batches([(train, 1)] if isinstance(train, Prepared) else train, seed=config.seed, rows=config.rows)


def say_mixture(train: Sets, config: TrainConfig) -> None:
    """What a run takes of each of several data sets, on the log: tokens, exactly, and passes."""
    if len(train) < 2:
        return
    dealer = batches(train, config)
    bins = dealer.dealt(config.steps or dealer.steps(config.epochs))
    tokens = [dealer.held(number, count) for number, count in enumerate(bins)]
    rows = [
        (", ".join(one.facts.sources), str(weight), f"{count:,}", f"{count / sum(tokens):.1%}", f"{taken / len(one.bins):.2f}")
        for (one, weight), taken, count in zip(train, bins, tokens, strict=True)
    ]
    log.table("mixture", ("data", "weight", "tokens", "share", "epochs"), rows)
