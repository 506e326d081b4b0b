"""`trivium pretrain`: a model of one's own from text."""

from __future__ import annotations

from .options import Configs, Flags, resolve, teach


def pretrain(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Trains a new model on text, from random weights.

    Say a shape (--preset, or --preset null with --model.* fields), a tokenizer, and text. With validation, the best model so
    far is kept beside the last, and --samples are completed each time. Ctrl-C finishes the step and saves it; the same
    command goes on from there. Prints where the result is.

    Try:
      trivium pretrain --tokenizer tok --data books/ --validation held-out/ --out runs/books
      trivium pretrain --config run.yaml --preset llama-5m --train.steps 500 --samples "Once upon a time"
      trivium pretrain --config run.yaml --dry-run

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    dry_run
        Show the data and the model's size, print the resolved config, and do not train.
    json
        Answer as JSON: path and metrics, or with --dry-run config and size.
    """
    from ..recipes.pretrain import ALIASES, Pretrain, plan
    from ..recipes.pretrain import pretrain as run

    job = resolve(Pretrain, config, flags, aliases=ALIASES, command=pretrain)
    said = "let it write: trivium generate {path} 'Once upon a time'"
    teach(job, run=run, plan=lambda given: {"size": plan(given)}, dry_run=dry_run, try_=said, as_json=json)
