"""Fine-tuning steps against transformers, PEFT, bitsandbytes and TRL: the same weights, texts, threads and dtype, sides in turn.

A pass is `--steps` updates over the same documents on every side; its rate counts real tokens, no padding. Trivium trains on packed
rows through its own loop's update; a peer gets the same documents sorted by length and cut into as many right-padded batches, and takes
part with eager and with sdpa attention. What a peer does and does not do stands in `finetune_sides.py` and under the table.
"""

from __future__ import annotations

import tempfile
from typing import Any

from . import common
from .common import Row
from .finetune_sides import JOBS, PAIRS

PEERS = {"full": "transformers", "lora": "PEFT", "qlora": "PEFT, bitsandbytes", "dpo": "TRL", "orpo": "TRL"}
GOAL = 1.5  # against the faster of the peers
ALIKE = 0.02  # what the sides find before training differs by less than this share, or they do not do the same work


def sides(job: str) -> dict[str, str]:
    """Who takes part, by name."""
    module = "benchmarks.finetune_sides"
    peers = {f"{PEERS[job]} {attention}": f"{module}:{attention}" for attention in ("eager", "sdpa")}
    return {"trivium": f"{module}:Trivium", **peers}


def measure(job: str, options: Any, *, folder: str, tokens: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one job, and what is to be known of it."""
    given = {"job": job, "folder": folder, "threads": options.threads, "steps": options.steps}
    taking = sides(job)
    with common.workers(taking, threads=options.threads, options=given) as running:
        starts = {side: worker.call("start") for side, worker in running.items()}
        trained = {side: worker.call("trained") for side, worker in running.items()}
        warm = 0 if options.quick else 1
        found = common.rounds(list(taking), lambda side: running[side].call("train"), count=options.rounds, warm=warm, what=JOBS[job])
        peaks = {side: worker.peak() for side, worker in running.items()}
    if max(starts.values()) > min(starts.values()) * (1 + ALIKE) or len(set(trained.values())) != 1:
        raise SystemExit(
            f"{job}: the sides do not do the same work: nats per target before training {starts}, trained parameters {trained}"
        )
    rows = []
    for peer in list(taking)[1:]:
        rows += common.rates(found, JOBS[job], tokens, peer=peer, goal=GOAL)
        rows.append(Row(f"{JOBS[job]}: peak memory", "MB", "less", [peaks["trivium"]], peer, [peaks[peer]]))
    facts = {
        f"{job}: trained parameters on every side": f"{trained['trivium']:,}",
        f"{job}: nats per target before training": ", ".join(f"{side} {loss:.4f}" for side, loss in starts.items()),
        f"{job}: loss of the last update": ", ".join(f"{side} {times[-1]['loss']:.4f}" for side, times in found.items()),
        f"{job}: positions computed in a pass": ", ".join(f"{side} {times[0]['positions']}" for side, times in found.items()),
    }
    return rows, facts


def main() -> None:
    parser = common.with_model(common.arguments(__doc__))
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS), help="what is measured (default: everything)")
    parser.add_argument("--steps", type=int, default=6, help="updates in one pass (default: 6)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a packed row, about those of an update (default: 1024)")
    options = parser.parse_args()
    machine = common.machine()
    if options.quick:
        options.rounds, options.steps, options.length = 1, 2, 256
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as scratch:
        made = {"model": common.located(options.model), "out": scratch, "length": options.length, "steps": options.steps}
        with common.Worker("benchmarks.finetune_sides:Prepare", threads=options.threads, options=made) as worker:
            about = worker.call("describe")
        for name, one in about.items():
            told = f"{options.steps} updates, {one['documents']} documents, {one['tokens']} real tokens, {one['targets']} supervised"
            facts[f"a pass over {name}"] = told
        for job in options.jobs:
            tokens = about["pairs" if job in PAIRS else "rows"]["tokens"]
            found, known = measure(job, options, folder=scratch, tokens=tokens)
            rows += found
            facts |= known
    notes = [
        "tokens are real ones: padding is not counted on any side; a pass is the same documents, and as many updates, on every side",
        "trivium: packed rows, the loop's own update (fp32 masters of what is trained, gradient clipping, checks that all is finite), fused AdamW",
        "peers: a lean loop, not Trainer; sorted by length, right-padded; bf16 parameters that AdamW (fused) moves directly, which is less work "
        "than masters; gradients clipped; no compile, no checkpointing on any side",
        "full, LoRA, QLoRA: the peers get no mask, which causal attention does not need, and the head at supervised positions only",
        "QLoRA: NF4 with double quantization, bf16 products, on both sides",
        "DPO, ORPO: the peer's loss is that of TRL's trainer, with the measures that it takes at each step; both sides ask the model with its "
        "adapter off for DPO's reference; ORPO's likelihood term counts the answers of the chosen side here, and prompts too in TRL",
        "DPO, ORPO: a prompt that both sides of a pair share is computed once in trivium, and with each side in TRL",
        "the goal holds against the faster peer; batches of the peers hold other mixes of the same documents, so losses of single updates differ",
        "peak memory is a fresh process's resident high-water mark, loading included",
    ]
    versions = common.versions("trivium", "torch", "transformers", "peft", "trl", "bitsandbytes", "tokenizers")
    common.report("finetune", options, rows, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
