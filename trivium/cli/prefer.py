"""`trivium prefer`: preference learning."""

from __future__ import annotations

from .options import Configs, Flags, resolve, teach


def prefer(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Trains a LoRA adapter (or, with --adapter null, every parameter) on pairs of answers, of which one is preferred.

    Rows are {prompt, chosen, rejected}, as strings or messages; or {prompt, completion, label} for --method kto. What the model
    is compared with is itself before the run. Ctrl-C finishes the step and saves it; the same command goes on from there.
    Prints where the result is.

    Try:
      trivium prefer --method dpo --model smollm2 --data pairs.jsonl --out runs/preferred
      trivium prefer --method simpo --model smollm2 --data pairs.jsonl --objective.gamma 0.5
      trivium prefer --method kto --model smollm2 --data judged.jsonl --dry-run

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    dry_run
        Show the pairs and what the run would need, print the resolved config, and do not train.
    json
        Answer as JSON: path and metrics, or with --dry-run config, data and needs.
    """
    from ..recipes.prefer import ALIASES, Prefer, plan
    from ..recipes.prefer import prefer as run

    job = resolve(Prefer, config, flags, aliases=ALIASES, command=prefer)
    teach(job, run=run, plan=plan, dry_run=dry_run, try_="talk to it: trivium chat {path}", as_json=json)
