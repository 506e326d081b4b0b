"""Every way to adapt SmolLM2-135M, measured beside the others: fine-tuning, ranks, instruction masking, preferences.

    python -m trivium.lab.experiments fine-tuning adapter-ranks instruction-masking preference-table

makes the runs that the ledger `runs/methods/runs.jsonl` lacks, one thread each, and reads the answers off it. The same command
started twice shares the work; one that was stopped goes on. `TRIVIUM_PAIRS` names the file of preference rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....core.errors import FileError
from ....core.log import log
from .. import Result, experiment, small
from . import tables
from .runs import Job, Preferring, Run, Teaching, complete, measured
from .tables import POINT, standing, words
from .ways import MASKING, PREFERRING, RANKS, TEACHING, UNTAUGHT, Way

FOLDER = Path("runs/methods")
PAIRS = "TRIVIUM_PAIRS"
SEEDS = (0, 1, 2)


def ran(job: Job, ways: Mapping[str, Way], *, seeds: Sequence[int] = SEEDS, effort: float = 1.0) -> tables.Lines:
    """The lines of every way, by seed, made where they are missing: one seed after the other, so that an unfinished set is of whole
    seeds. With less effort, few steps and rows, in this process, and a ledger of its own."""
    torch.set_num_threads(1)
    wanted = [Run(name, way, seed, job) for seed in seeds for name, way in ways.items() if seed == seeds[0] or name != UNTAUGHT]
    if effort < 1:
        found = complete(wanted, FOLDER.with_name("methods-brief"), do=measured)
    else:
        found = complete(wanted, FOLDER)
    return {name: [found[run.id] for run in wanted if run.name == name] for name in ways}


def teaching_job(effort: float) -> Teaching:
    steps = small.steps_of(Teaching().steps, effort)
    return Teaching(steps=steps) if effort == 1 else Teaching(steps=steps, texts=24, test=4, most=8, general=2)


def preferring_job(effort: float) -> Preferring:
    """Raises `FileError` where there is no file of pairs."""
    path = os.environ.get(PAIRS, "")
    if not Path(path).is_file():
        raise FileError(
            f"{PAIRS}: {path or 'not set'}: name a file of preference rows {{instruction, input, chosen, rejected}}", value=path
        )
    job = Preferring(pairs=path)
    steps = small.steps_of(job.steps, effort)
    return job if effort == 1 else job.replace(steps=steps, train=30, test=8, asked=2, most=8, general=2)


@experiment(
    "fine-tuning",
    "T06.03",
    "T06.04",
    "T06.06",
    "T06.07",
    "X.66",
    question="At equal steps on one task, how near do methods that train a part of the parameters come to full fine-tuning?",
)
def fine_tuning(effort: float) -> Result:
    """The demo's task, every way of fine-tuning, the same texts and steps for all with a seed."""
    job = teaching_job(effort)
    lines = ran(job, TEACHING, effort=effort)
    table = tables.teaching(lines, TEACHING, seeds=len(SEEDS))
    log.say(tables.markdown(table))
    gaps = {name: gap(lines, name, "full") for name in TEACHING if name not in (UNTAUGHT, "full")}
    numbers = {"job": job.to_dict(defaults=True), "table": table, "exact match less full's": {k: tables.told(v) for k, v in gaps.items()}}
    claims = [f"{name} within 1 point of full {standing(gaps[name], above=-POINT)} ({words(gaps[name])})" for name in COMPARED]
    order = sorted((name for name in TEACHING if name != UNTAUGHT), key=lambda name: -tables.exact(lines[name], seeds=len(SEEDS)).value)
    best = ", ".join(f"{name} {tables.exact(lines[name], seeds=len(SEEDS)).value:.1%}" for name in order)
    kept = nats_less(lines["lora"], lines["qlora"], "answer")
    share = kept.value / tables.nats(lines["lora"], "answer", seeds=len(SEEDS)).value
    numbers["qlora less lora, nats per token of the answer"] = tables.told(kept)
    verdict = (
        f"Exact match after {job.steps} steps, less full fine-tuning's: {'; '.join(claims)}. In order: {best}. 'QLoRA is within 2% of 16-bit "
        f"LoRA's loss' {'holds' if share < 0.02 else 'does not hold'} ({share:+.1%}; {words(kept, percent=False)} nats)."
    )
    return Result(numbers, verdict, SEEDS)


COMPARED = ("lora", "bottleneck", "prefix")


def gap(lines: tables.Lines, name: str, other: str) -> tables.Crossed:
    """Exact match of one way less that of another."""
    return tables.exact(lines[name], seeds=len(SEEDS)) - tables.exact(lines[other], seeds=len(SEEDS))


@experiment("adapter-ranks", "T06.05", "X.64", question="Is DoRA better than LoRA at every rank, and does LoRA learn less and forget less?")
def adapter_ranks(effort: float) -> Result:
    """LoRA and DoRA of ranks 4, 16 and 64, MoRA at LoRA's number of parameters, and full fine-tuning."""
    job = teaching_job(effort)
    ways = {name: TEACHING[name] for name in (UNTAUGHT, "full", "lora", "dora", "mora")} | RANKS
    lines, seeds = ran(job, ways, effort=effort), len(SEEDS)
    table = tables.teaching(lines, ways, seeds=seeds)
    log.say(tables.markdown(table))
    pairs = {"4": ("lora 4", "dora 4"), "16": ("lora", "dora"), "64": ("lora 64", "dora 64")}
    every = [[line for pair in pairs.values() for line in lines[pair[side]]] for side in (0, 1)]
    better = {rank: nats_less(lines[a], lines[b], "answer") for rank, (a, b) in pairs.items()}
    pooled = nats_less(every[0], every[1], "answer")
    learned, forgot = nats_less(lines["full"], lines["lora"], "answer"), nats_less(lines["full"], lines["lora"], "general")
    square = nats_less(lines["lora"], lines["mora"], "answer")
    numbers = {
        "job": job.to_dict(defaults=True),
        "table": table,
        "dora less lora, nats per token of the answer, by rank": {rank: tables.told(one) for rank, one in better.items()},
        "the same over all ranks and seeds": tables.told(pooled),
        "lora less full, nats per token of the answer": tables.told(learned),
        "lora less full, nats per token of general text": tables.told(forgot),
        "mora less lora, nats per token of the answer": tables.told(square),
    }
    consistent = "holds" if all(one.interval().high < 0 for one in better.values()) else "does not hold at this size"
    verdict = (
        f"'DoRA consistently outperforms LoRA' {consistent}: {words(pooled, percent=False)} nats per token of the answer over "
        f"{len(every[0])} pairs of runs of three ranks. 'LoRA learns less' {standing(learned, above=0)} ({words(learned, percent=False)} nats "
        f"more than full), 'and forgets less' {standing(minus(forgot), above=0)} ({words(forgot, percent=False)} nats more on general text). "
        f"MoRA less LoRA, at equal parameters: {words(square, percent=False)}."
    )
    return Result(numbers, verdict, SEEDS)


def nats_less(one: Sequence[Any], other: Sequence[Any], of: str) -> tables.Crossed:
    """Nats per token of the second way less those of the first."""
    seeds = len(one)
    return tables.nats(other, of, seeds=seeds) - tables.nats(one, of, seeds=seeds)


def minus(found: tables.Crossed) -> tables.Crossed:
    return tables.Crossed(-found.value, -found.draws)


@experiment("instruction-masking", "X.63", question="Is it better to learn the answers alone, or the prompts too?")
def instruction_masking(effort: float) -> Result:
    """LoRA with the loss on answers alone, on all tokens alike, and on prompts at a tenth."""
    job = teaching_job(effort)
    ways = {name: TEACHING[name] for name in (UNTAUGHT, "lora")} | MASKING
    lines = ran(job, ways, effort=effort)
    table = tables.teaching(lines, ways, seeds=len(SEEDS))
    log.say(tables.markdown(table))
    worse = {name: nats_less(lines["lora"], lines[name], "answer") for name in MASKING}
    matched = {name: gap(lines, name, "lora") for name in MASKING}
    numbers = {
        "job": job.to_dict(defaults=True),
        "table": table,
        "less masked, nats per token of the answer": {name: tables.told(one) for name, one in worse.items()},
        "less masked, exact match": {name: tables.told(one) for name, one in matched.items()},
    }
    each = "; ".join(f"{name}: {words(matched[name])} exact match, {words(one, percent=False)} nats" for name, one in worse.items())
    modelled = worse[list(MASKING)[-1]]
    verdict = f"'Masking prompts is better' {standing(modelled, above=0)} on this task; against answers alone, {each}."
    return Result(numbers, verdict, SEEDS)


@experiment(
    "preference-table",
    "T07.03",
    "T07.04",
    "T07.05",
    "T07.06",
    question="At equal steps on the same pairs, which method tells held-out pairs apart, and what does it do to likelihood and length?",
)
def preference_methods(effort: float) -> Result:
    """LoRA of rank 16 on the same pairs for every way with a seed; judged answers (KTO) are the sides of the same pairs."""
    job = preferring_job(effort)
    lines, seeds = ran(job, PREFERRING, effort=effort), len(SEEDS)
    table = tables.preferring(lines, PREFERRING, seeds=seeds)
    log.say(tables.markdown(table))
    base = lines[UNTAUGHT][0]
    apart = {name: tables.told_apart(lines[name], base, seeds=seeds) for name in PREFERRING if name != UNTAUGHT}
    ranked = {name: tables.likelier(lines[name], seeds=seeds) for name in PREFERRING}
    length = tables.spoken(lines["simpo"], seeds=seeds) - tables.spoken(lines["dpo"], seeds=seeds)
    stages, judged = ranked["orpo"] - ranked["sft, then dpo"], apart["kto"] - apart["dpo"]
    fell = tables.chosen(lines["dpo"], seeds=seeds) - tables.chosen(lines[UNTAUGHT], seeds=seeds)
    numbers = {
        "job": {name: value for name, value in job.to_dict(defaults=True).items() if name != "pairs"} | {"pairs": Path(job.pairs).name},
        "table": table,
        "dpo: log-probability per token of chosen less the untaught model's": tables.told(fell),
        "simpo less dpo: tokens of an answer": tables.told(length),
        "simpo less dpo: better side likelier per token": tables.told(ranked["simpo"] - ranked["dpo"]),
        "orpo less sft and dpo: better side likelier per token": tables.told(stages),
        "kto less dpo: pairs told apart": tables.told(judged),
    }
    verdict = (
        f"DPO tells {words(apart['dpo'])} of held-out pairs apart ({job.steps} steps; above chance "
        f"{standing(apart['dpo'], above=0.5)}), chosen answers moving by {words(fell, percent=False)} nats per token; PPO was not run beside it. "
        f"'SimPO speaks shorter than DPO' {standing(minus(length), above=0)} ({words(length, percent=False)} tokens). "
        f"'ORPO reaches SFT and DPO in one stage', half the steps, {standing(stages, above=-0.05)} within 5 points ({words(stages)}). "
        f"'KTO reaches DPO from single judgments' {standing(judged, above=-0.05)} within 5 points ({words(judged)})."
    )
    return Result(numbers, verdict, SEEDS)
