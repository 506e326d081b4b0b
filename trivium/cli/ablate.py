"""`trivium ablate`: which part is better, measured."""

from __future__ import annotations

from .options import Configs, Flags, answer, resolve


def ablate(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> None:
    """Exchanges parts of a model or a run, trains each variant on the same batches to the same budget, and compares them.

    --vary PATH=VALUE,VALUE... names what is exchanged, from the model down (blocks.*.mixer.position, where * stands for every
    block) or from the run down (optim, schedule.warmup). The first value is what the others are compared with; several
    --vary entries, as a list, make every combination. Intervals come from drawing both the seeds and the held-out documents
    anew; differences are paired. Stopped, the same command goes on. The folder holds table.md, ablation.json and curves.svg.

    Try:
      trivium ablate --base llama-5m --vary "blocks.*.mixer.position=rope,none" --tokenizer tok --data train/ --validation held-out/ --amount 1e6
      trivium ablate --config ablation.yaml --vary "['blocks.*.norm=rms,layer', 'optim.lr=1e-3,3e-3']" --seeds 5
      trivium ablate --config ablation.yaml --budget minutes --amount 5 --dry-run

    Parameters
    ----------
    config
        YAML or JSON with the fields below; given more than once, later ones win, and options come last.
    dry_run
        Show the variants, their sizes and their steps, and do not train.
    json
        Answer as JSON: a list with a row for each variant.
    """
    from ..core.log import log
    from ..lab.ablate import ALIASES, Ablate, differences, plan, rows_of
    from ..lab.ablate import ablate as run

    job = resolve(Ablate, config, flags, aliases=ALIASES, command=ablate)
    if dry_run:
        answer([{"variant": v.name, "steps": v.steps, **v.facts, "runs": job.seeds} for v in plan(job)], as_json=json)
        return
    measured = run(job)
    log.say(f"{differences(measured)}\n")
    answer(rows_of(measured), as_json=json)
    log.say(f"also in {job.out}: table.md, ablation.json, curves.svg, runs/")
