"""`trivium sft`: supervised fine-tuning."""

from __future__ import annotations

from .options import Configs, Flags, resolve, teach


def sft(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Trains a LoRA adapter (or, with --adapter null, every parameter) on rows of text, prompts or conversations.

    Only what the model should say is trained; the first row's labels are shown before the first step. Ctrl-C finishes the
    step and saves it; the same command goes on from there. Prints where the result is.

    Try:
      trivium sft --model smollm2 --data rows.jsonl --out runs/first
      trivium sft --config run.yaml --optim.lr 2e-4 --adapter.rank 8 --train.epochs 2
      trivium sft --config run.yaml --dry-run

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    dry_run
        Show the data and how many steps and tokens that is, print the resolved config, and do not train.
    json
        Answer as JSON: path and metrics, or with --dry-run config, data and size.
    """
    from ..recipes.sft import ALIASES, SFT, plan
    from ..recipes.sft import sft as run

    job = resolve(SFT, config, flags, aliases=ALIASES, command=sft)
    teach(job, run=run, plan=plan, dry_run=dry_run, try_="talk to it: trivium chat {path}", as_json=json)
