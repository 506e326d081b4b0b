"""LoRA steps against transformers and PEFT: the same weights and texts, rank 16 on every linear, bf16, AdamW, sides in turn.

A pass is `--steps` updates over the same documents on every side; its rate counts real tokens, no padding. Trivium trains on packed
rows through its own loop's update. The peer gets the same documents sorted by length and cut into as many right-padded batches, no mask
(causal attention needs none), logits only where a token is supervised, adapters in bf16, and eager or sdpa attention.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from . import common
from .common import Row

SIDES = {"trivium": "benchmarks.finetune:Trivium", "PEFT eager": "benchmarks.finetune:Eager", "PEFT sdpa": "benchmarks.finetune:SDPA"}
RANK, ALPHA, LR, CLIP, DECAY = 16, 32.0, 1e-4, 1.0, 0.0
GOAL = 1.5  # against the faster of the peers
ALIKE = 0.02  # the sides' losses before training differ by less than this share, or they do not do the same work


class Prepare:
    """Makes what the sides get: a model directory, a token bank, and the documents of its first batches for the peer."""

    def __init__(self, *, model: str, out: str, length: int, steps: int):
        from trivium.data.batches import Batches
        from trivium.data.prepare import prepare
        from trivium.recipes.demo_task import examples, messages
        from trivium.text.prompt import Prompt
        from trivium.text.tokenizer import Tokenizer

        folder = Path(out)
        path = common.converted(model, folder / "model")
        texts = examples("train", seed=0, count=max(64, steps * length // 60))
        prompt = Prompt.load(path, Tokenizer.load(path))
        bank = prepare(({"messages": messages(example)} for example in texts), prompt, length=length)
        bank.save(folder / "bank")
        batches = Batches([(bank, 1)], seed=0, rows=1)
        numbers = [int(row) for step in range(steps) for _, bin_ in batches.bins(step) for row in bank.bins[bin_]]
        documents = [[part.tolist() for part in bank.row(row)] for row in numbers]
        (folder / "documents.json").write_text(json.dumps(documents))
        self.about = {
            "documents": len(documents),
            "tokens": sum(len(ids) for ids, _ in documents),
            "targets": sum(sum(targets) for _, targets in documents),
        }

    def describe(self) -> dict[str, int]:
        return self.about


class Trivium:
    """Ours: batches by number from the bank, and the loop's own update (fp32 masters, clipping, checks and all)."""

    def __init__(self, *, folder: str, threads: int, steps: int):
        import torch

        import trivium
        from trivium.adapt.lora import LoRA, initialize_adapter
        from trivium.data.bank import Prepared
        from trivium.data.batches import Batches
        from trivium.optim.masters import Masters
        from trivium.optim.optimizers import AdamW
        from trivium.optim.schedules import Constant
        from trivium.train.loop import TrainConfig, _Update
        from trivium.train.objectives import NextToken

        torch.set_num_threads(threads)
        self.model, self.steps, self.objective = trivium.load(Path(folder) / "model", dtype="bf16").model, steps, NextToken()
        adapter = LoRA(rank=RANK, alpha=ALPHA)
        adapter.apply(self.model)
        initialize_adapter(self.model, adapter.name, seed=0)
        self.batches = Batches([(Prepared.load(Path(folder) / "bank"), 1)], seed=0, rows=1)
        self.update = _Update(
            self.model,
            Masters(self.model, AdamW(lr=LR, weight_decay=DECAY), dtype=torch.bfloat16),
            self.batches,
            objective=self.objective,
            schedule=Constant(),
            config=TrainConfig(rows=1, precision="bf16", clip=CLIP),
            total=steps,
        )

    def loss(self) -> float:
        """Mean over all supervised tokens of the pass, nothing trained."""
        import torch

        with torch.no_grad():
            batches = [self.batches.batch(step) for step in range(self.steps)]
            total = sum(float(self.objective.terms(self.model, batch)["loss"]) for batch in batches)
        return total / sum(int(batch.targets.sum()) for batch in batches)

    def train(self) -> dict[str, float]:
        times, done = common.clock(lambda: [self.update(step) for step in range(self.steps)])
        return {**times, "loss": done[-1]["loss"], "positions": sum(self.batches.batch(step).tokens.numel() for step in range(self.steps))}

    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


class Eager:
    """Theirs, in a loop as lean as one can write: no Trainer, no mask, no logits that no loss needs, bf16 adapters without masters."""

    attention = "eager"

    def __init__(self, *, folder: str, threads: int, steps: int):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        base = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.bfloat16, attn_implementation=self.attention)
        base.config.use_cache = False
        wanted = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
        self.peft = get_peft_model(base, wanted, autocast_adapter_dtype=False)
        self.peft.train()
        self.core, self.head = base.model, base.lm_head
        self.parameters = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=DECAY, fused=True)
        self.batches = self._batches(json.loads((Path(folder) / "documents.json").read_text()), steps)

    def _batches(self, documents: list[Any], steps: int) -> list[tuple[Any, Any]]:
        """Documents of like length together, about equally many real tokens in each batch; tokens [B, T] and targets [B, T]."""
        import torch

        documents = sorted(documents, key=lambda document: len(document[0]))
        total, held = sum(len(ids) for ids, _ in documents), 0
        groups: list[list[Any]] = [[] for _ in range(steps)]
        for document in documents:
            groups[min(steps - 1, held * steps // total)].append(document)
            held += len(document[0])
        batches = []
        for group in filter(None, groups):
            width = max(len(ids) for ids, _ in group)
            padded = [(ids + [0] * (width - len(ids)), targets + [False] * (width - len(ids))) for ids, targets in group]
            batches.append((torch.tensor([ids for ids, _ in padded]), torch.tensor([targets for _, targets in padded])))
        assert len(batches) == steps
        return batches

    def _sum(self, tokens: Any, targets: Any) -> Any:
        import torch.nn.functional as F

        hidden = self.core(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.head(hidden[:, :-1][targets[:, 1:]])
        return F.cross_entropy(logits.float(), tokens[targets], reduction="sum")

    def loss(self) -> float:
        import torch

        with torch.no_grad():
            total = sum(float(self._sum(*batch)) for batch in self.batches)
        return total / sum(int(targets.sum()) for _, targets in self.batches)

    def _step(self, tokens: Any, targets: Any) -> float:
        import torch

        loss = self._sum(tokens, targets) / targets.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def train(self) -> dict[str, float]:
        times, losses = common.clock(lambda: [self._step(*batch) for batch in self.batches])
        return {**times, "loss": losses[-1], "positions": sum(tokens.numel() for tokens, _ in self.batches)}

    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


class SDPA(Eager):
    attention = "sdpa"


def main() -> None:
    parser = common.with_model(common.arguments(__doc__))
    parser.add_argument("--steps", type=int, default=6, help="updates in one pass (default: 6)")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a packed row, about those of an update (default: 1024)")
    options = parser.parse_args()
    machine = common.machine()
    if options.quick:
        options.rounds, options.steps, options.length = 1, 2, 256
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as scratch:
        made = {"model": common.located(options.model), "out": scratch, "length": options.length, "steps": options.steps}
        with common.Worker("benchmarks.finetune:Prepare", threads=options.threads, options=made) as worker:
            about = worker.call("describe")
        given = {"folder": scratch, "threads": options.threads, "steps": options.steps}
        with common.workers(SIDES, threads=options.threads, options=given) as running:
            losses = {side: worker.call("loss") for side, worker in running.items()}
            trained = {side: worker.call("trained") for side, worker in running.items()}
            what = f"LoRA rank {RANK}"
            warm = 0 if options.quick else 1
            found = common.rounds(list(SIDES), lambda side: running[side].call("train"), count=options.rounds, warm=warm, what=what)
            peaks = {side: worker.peak() for side, worker in running.items()}
    if max(losses.values()) > min(losses.values()) * (1 + ALIKE) or len(set(trained.values())) != 1:
        raise SystemExit(f"the sides do not do the same work: losses before training {losses}, trained parameters {trained}")
    rows = []
    for peer in list(SIDES)[1:]:
        rows += common.rates(found, what, about["tokens"], peer=peer, goal=GOAL)
        rows.append(Row(f"{what}: peak memory", "MB", "less", [peaks["trivium"]], peer, [peaks[peer]]))
    facts: dict[str, Any] = {
        "a pass": f"{options.steps} updates, {about['documents']} documents, {about['tokens']} real tokens, {about['targets']} supervised",
        "trained parameters on every side": f"{trained['trivium']:,}",
        "loss before training": ", ".join(f"{side} {loss:.4f}" for side, loss in losses.items()),
        "loss of the last update": ", ".join(f"{side} {times[-1]['loss']:.4f}" for side, times in found.items()),
        "positions computed in a pass": ", ".join(f"{side} {times[0]['positions']}" for side, times in found.items()),
    }
    notes = [
        "tokens are real ones: padding is not counted on any side; a pass is the same documents, and as many updates, on every side",
        "trivium: packed rows, the loop's own update (fp32 masters of the adapters, gradient clipping, checks that all is finite), fused AdamW",
        "peers: a lean loop, not Trainer; sorted by length, right-padded, no mask; the head at supervised positions only; bf16 adapters that AdamW "
        "(fused) moves directly, which is less work than masters; gradients clipped; no compile, no checkpointing on any side",
        "the goal holds against the faster peer; batches of the peers hold other mixes of the same documents, so losses of single updates differ",
        "peak memory is a fresh process's resident high-water mark, loading included",
    ]
    versions = common.versions("trivium", "torch", "transformers", "peft", "tokenizers")
    common.report("finetune", options, rows, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
