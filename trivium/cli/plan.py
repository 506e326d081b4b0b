"""`trivium plan`: what a run would need."""

from __future__ import annotations

from .options import Configs, Flags, answer, resolve


def plan(*flags: Flags, config: Configs = (), json: bool = False) -> int:
    """Says what a fine-tuning run would need: parameters, memory by kind, disk, steps, and time on this machine.

    Takes the options and files of `trivium sft`; data may be left out. Exits with 1 where the run cannot fit, and says what
    could. Memory is that of the very code that would run, tried on tensors that hold nothing.

    Try:
      trivium plan --model smollm2 --length 512 --train.rows 4
      trivium plan --config run.yaml --adapter null --train.recompute.every 1
      trivium plan --model smollm2 --data rows.jsonl --json

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    json
        Answer as JSON: sizes in bytes, FLOPs, seconds.
    """
    from ..core.errors import TriviumError
    from ..core.log import log
    from ..recipes.plan import Ask
    from ..recipes.plan import plan as run
    from ..recipes.sft import ALIASES

    planned = run(resolve(Ask, config, flags, aliases=ALIASES, command=plan))
    if json:
        answer(planned.to_dict(), as_json=True)
    else:
        answer([{"what": what, "how much": much} for what, much in planned.rows()], as_json=False)
    try:
        planned.require_fits()
    except TriviumError as error:
        log.error(str(error))
        return 1
    return 0
