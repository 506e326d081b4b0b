"""`trivium reward`: reward models, and what they make of rows."""

from __future__ import annotations

from json import dumps
from pathlib import Path

from . import UsageError
from .options import Configs, Flags, resolve, teach


def reward(
    *flags: Flags, config: Configs = (), score: Path | None = None, caution: float = 0.0, dry_run: bool = False, json: bool = False
) -> None:
    """Trains a reward model on pairs of answers: one number for an answer, higher for those that would be chosen.

    Rows are those of `prefer`, with a margin where they have one. Accuracy and calibration on --validation rows are shown at
    the end. The result opens in transformers as a ForSequenceClassification with one label. With --score, nothing is trained:
    each row of FILE is printed as JSON with its reward.

    Try:
      trivium reward --model smollm2 --data pairs.jsonl --validation held-out.jsonl --out runs/reward
      trivium reward --model smollm2 --data pairs.jsonl --members 3 --objective.center 0.01
      trivium reward --score answers.jsonl --model runs/reward

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    score
        Give the rows of this file their rewards, by --model, which then names a reward model; of the fields below, length and
        format hold then.
    caution
        With --score, by several members: how many deviations to take off where they disagree.
    dry_run
        Show the pairs and what the run would need, print the resolved config, and do not train.
    json
        Answer as JSON: path and metrics, or with --dry-run config, data and needs.
    """
    if score is not None:
        from ..recipes.score import Score
        from ..recipes.score import score as scored

        given = ["--data", str(score), "--caution", str(caution), *flags]
        for row in scored(resolve(Score, config, given, aliases={}, command=reward)):
            print(dumps(row, ensure_ascii=False))
        return
    if caution:
        raise UsageError("--caution is of the rewards that --score gives; name a file to score")
    from ..recipes.reward import ALIASES, RewardModel, plan
    from ..recipes.reward import reward as run

    job = resolve(RewardModel, config, flags, aliases=ALIASES, command=reward)
    said = "score rows with it: trivium reward --score FILE --model {path}"
    teach(job, run=run, plan=plan, dry_run=dry_run, try_=said, as_json=json)
