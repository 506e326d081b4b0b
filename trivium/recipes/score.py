"""Rows scored by a reward model, or by several: each answer gets its number, each pair two.

Takes what `reward` made, and what others made as *ForSequenceClassification of one label. Of an ensemble it is the mean of the
members' rewards, each less its mean on the rows it was judged by, less `caution` deviations where they disagree (arXiv:2310.02743).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import ConfigError
from ..core.spec import Spec
from ..data import rows as source
from ..data.prepare import prepare
from ..io import files
from ..models.context import check_length
from ..train.rewards import pessimistic, rewards_of
from .load import Bundle, load
from .reward import ENSEMBLE, gives_rewards, show


class Score(Spec):
    """What is scored, and by what."""

    model: str = Field("runs/reward/model", description="a reward model, or the run's folder of several members")
    data: tuple[str, ...] = Field(min_length=1, description="rows with answers or pairs: files, folders or globs")
    length: int | None = Field(None, ge=2, description="tokens that an answer with its prompt may have; none given: the model's context")
    format: str | None = Field(None, description="the rows' format, if their columns do not tell")
    rows: int = Field(8, gt=0, description="rows at a time")
    caution: float = Field(0.0, ge=0, description="of several members: how many deviations are taken off where they disagree")


def score(config: Score, *, bundle: Bundle | None = None) -> list[dict[str, Any]]:
    """Each row of `config.data` with its `reward`; a pair with `chosen_reward` and `rejected_reward`. Of an ensemble there is
    `disagreement` too, the deviation between members (of a pair's difference). `bundle`: the one model, already loaded.

    Raises `ConfigError` for a model that gives no reward, `DataError` for rows without an answer and for those that are too long.
    """
    records = list(source.read(config.data))
    found = []
    for path, mean in _members(config) if bundle is None else [(Path(config.model), 0.0)]:
        found.append(_rewards(config, bundle or load(path), records) - mean)
    rewards = torch.stack(found)  # [M, rows of the bank]
    each = pessimistic(rewards, caution=config.caution) if len(found) > 1 else rewards[0]
    paired = rewards.shape[1] == 2 * len(records)
    if paired:
        show(each[0::2] - each[1::2], what=f"on {len(records)} pairs")
        rewards = rewards[:, 0::2] - rewards[:, 1::2]
        made: list[dict[str, Any]] = [
            {**record.value, "chosen_reward": good, "rejected_reward": bad}
            for record, (good, bad) in zip(records, each.view(-1, 2).tolist(), strict=True)
        ]
    else:
        made = [{**record.value, "reward": value} for record, value in zip(records, each.tolist(), strict=True)]
    if len(found) > 1:
        for row, spread in zip(made, rewards.std(0, correction=0).tolist(), strict=True):
            row["disagreement"] = spread
    return made


def _members(config: Score) -> list[tuple[Path | str, float]]:
    """The models, and what is taken off each one's rewards."""
    listed = Path(config.model) / ENSEMBLE
    if listed.is_file():
        return [(Path(config.model) / member["path"], float(member["mean"])) for member in files.read_json(listed)["members"]]
    inside = Path(config.model) / "model"
    return [(inside if inside.is_dir() else config.model, 0.0)]


def _rewards(config: Score, bundle: Bundle, records: list[source.Record]) -> Tensor:
    """The rewards of the rows' answers in order, [rows of the bank]."""
    if not gives_rewards(bundle):
        raise ConfigError(
            f"{config.model}: its head ({bundle.spec.head.kind}) gives no reward; train one with `trivium reward`", field="model"
        )
    length = config.length or bundle.spec.context
    if length is None:
        raise ConfigError("length: the model does not say how long its context is; give one", field="length")
    check_length(bundle.spec.context, length, what="an answer may have", field="length")
    bank = prepare(records, bundle.prompt, length=length, feeds="answers", format=config.format, turns="last", packing="none")
    return rewards_of(bundle.model, bank, rows=config.rows)
