"""The sides of `benchmarks.finetune`: trivium through its own loop's update, and transformers, PEFT, bitsandbytes and TRL in a lean loop.

A peer gets a loop as lean as one can write: no Trainer around it, no mask where causal attention needs none, no logits that no loss
needs, adapters in bf16 that fused AdamW moves directly. TRL's losses are its trainers' own `compute_loss`, on batches made beforehand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from . import common

RANK, ALPHA, LR, CLIP, DECAY = 16, 32.0, 1e-4, 1.0, 0.0
JOBS = {
    "full": "full fine-tuning",
    "lora": f"LoRA rank {RANK}",
    "qlora": f"QLoRA rank {RANK}",
    "dpo": f"DPO, LoRA rank {RANK}",
    "orpo": f"ORPO, LoRA rank {RANK}",
}
PAIRS = ("dpo", "orpo")


class Prepare:
    """Makes what the sides get: a model directory, a token bank of rows and one of pairs, and the documents of their first batches."""

    def __init__(self, *, model: str, out: str, length: int, steps: int):
        from trivium.data.prepare import prepare
        from trivium.recipes.demo_task import examples, messages
        from trivium.text.prompt import Prompt
        from trivium.text.tokenizer import Tokenizer

        self.folder, self.steps = Path(out), steps
        path = common.converted(model, self.folder / "model")
        prompt = Prompt.load(path, Tokenizer.load(path))
        texts = [messages(example) for example in examples("train", seed=0, count=max(64, steps * length // 60))]
        self.about = {"rows": self._keep("rows", prepare(({"messages": text} for text in texts), prompt, length=length))}
        pairs = [
            {"prompt": text[:-1], "chosen": text[-1:], "rejected": other[-1:]}  # a wrong record is what another text states
            for text, other in zip(texts, [*texts[1:], texts[0]], strict=True)
        ]
        self.about["pairs"] = self._keep("pairs", prepare(pairs, prompt, length=length // 2, feeds="preference", max_same=None))

    def _keep(self, name: str, bank: Any) -> dict[str, int]:
        """Saves the bank, and beside it the documents of its first batches, as ids and targets."""
        from trivium.data.batches import Batches

        bank.save(self.folder / name)
        batches = Batches([(bank, 1)], seed=0, rows=1)
        numbers = [int(row) for step in range(self.steps) for _, bin_ in batches.bins(step) for row in bank.bins[bin_]]
        documents = [[part.tolist() for part in bank.row(row)] for row in numbers]
        (self.folder / f"{name}.json").write_text(json.dumps(documents))
        return {
            "documents": len(documents),
            "tokens": sum(len(ids) for ids, _ in documents),
            "targets": sum(sum(targets) for _, targets in documents),
        }

    def describe(self) -> dict[str, dict[str, int]]:
        return self.about


class Trivium:
    """Ours: batches by number from the bank, and the loop's own update (fp32 masters, clipping, checks and all)."""

    def __init__(self, *, job: str, folder: str, threads: int, steps: int):
        import torch

        import trivium
        from trivium.adapt.lora import LoRA, initialize_adapter
        from trivium.adapt.nf4 import Nf4
        from trivium.data.bank import Prepared
        from trivium.data.batches import Batches
        from trivium.optim.masters import Masters
        from trivium.optim.optimizers import AdamW
        from trivium.optim.schedules import Constant
        from trivium.train.loop import TrainConfig, _Update
        from trivium.train.objectives import NextToken
        from trivium.train.preference import DPO, ORPO

        torch.set_num_threads(threads)
        self.model, self.job, self.steps = trivium.load(Path(folder) / "model", dtype="bf16").model, job, steps
        self.objective = {"dpo": DPO(), "orpo": ORPO()}.get(job) or NextToken()
        if job == "qlora":
            Nf4().apply(self.model)
        if job != "full":
            adapter = LoRA(rank=RANK, alpha=ALPHA)
            adapter.apply(self.model)
            initialize_adapter(self.model, adapter.name, seed=0)
        bank = Prepared.load(Path(folder) / ("pairs" if job in PAIRS else "rows"))
        self.batches = Batches([(bank, 1)], seed=0, rows=1)
        self.update = _Update(
            self.model,
            Masters(self.model, AdamW(lr=LR, weight_decay=DECAY), dtype=torch.bfloat16),
            self.batches,
            objective=self.objective,
            schedule=Constant(),
            config=TrainConfig(rows=1, precision="bf16", clip=CLIP),
            total=steps,
        )

    def start(self) -> float:
        """Nats per target of the pass, nothing trained; of pairs, of both sides' answers."""
        import torch

        from trivium.train.logprobs import document_logprobs

        with torch.no_grad():
            batches = [self.batches.batch(step) for step in range(self.steps)]
            total = -sum(float(document_logprobs(self.model, batch).sum()) for batch in batches)
        return total / sum(int(batch.targets.sum()) for batch in batches)

    def train(self) -> dict[str, float]:
        times, done = common.clock(lambda: [self.update(step) for step in range(self.steps)])
        return {**times, "loss": done[-1]["loss"], "positions": sum(self._computed(step).numel() for step in range(self.steps))}

    def _computed(self, step: int) -> Any:
        """The tokens of a pass over a batch; a prompt that both sides of a pair share stands in it once."""
        from trivium.train.logprobs import forked

        batch = self.batches.batch(step)
        return forked(batch)[0].tokens if self.job in PAIRS else batch.tokens

    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


class Tokens:
    """transformers alone, with PEFT, or with PEFT on a base that bitsandbytes holds in four bits."""

    def __init__(self, *, job: str, folder: str, threads: int, steps: int, attention: str):
        import torch

        torch.set_num_threads(threads)
        self.job, self.folder = job, Path(folder)
        base = self._base(attention)
        base.config.use_cache = False
        self.model = base if job == "full" else self._adapted(base)
        self.model.train()
        self.core, self.head = base.model, base.lm_head
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=DECAY, fused=True)
        self.batches = self._batches(steps)

    def _base(self, attention: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantized = BitsAndBytesConfig(**four, bnb_4bit_compute_dtype=torch.bfloat16) if self.job == "qlora" else None
        return AutoModelForCausalLM.from_pretrained(
            self.folder / "model", dtype=torch.bfloat16, attn_implementation=attention, quantization_config=quantized
        )

    def _adapted(self, base: Any) -> Any:
        from peft import get_peft_model

        return get_peft_model(base, wanted(), autocast_adapter_dtype=False)

    def _batches(self, steps: int) -> list[Any]:
        """Tokens [B, T] and targets [B, T], right-padded."""
        return [padded(group) for group in grouped(json.loads((self.folder / "rows.json").read_text()), steps)]

    def _sum(self, tokens: Any, targets: Any) -> Any:
        import torch.nn.functional as F

        hidden = self.core(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.head(hidden[:, :-1][targets[:, 1:]])
        return F.cross_entropy(logits.float(), tokens[targets], reduction="sum")

    def _loss(self, batch: Any) -> Any:
        tokens, targets = batch
        return self._sum(tokens, targets) / targets.sum()

    def start(self) -> float:
        import torch

        with torch.no_grad():
            total = sum(float(self._sum(tokens, targets)) for tokens, targets in self.batches)
        return total / sum(int(targets.sum()) for _, targets in self.batches)

    def _step(self, batch: Any) -> float:
        import torch

        loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def train(self) -> dict[str, float]:
        times, losses = common.clock(lambda: [self._step(batch) for batch in self.batches])
        return {**times, "loss": losses[-1], "positions": self._positions()}

    def _positions(self) -> int:
        return sum(tokens.numel() for tokens, _ in self.batches)

    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


class Pairs(Tokens):
    """TRL's trainer of the method: its loss, its reference (the adapter off) and its measures; not its data loader or its loop."""

    def _adapted(self, base: Any) -> Any:
        import torch
        from datasets import Dataset, disable_progress_bars
        from transformers import AutoTokenizer
        from trl import DPOConfig, DPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        disable_progress_bars()
        trainer, config = {"dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}[self.job]
        self.scratch = tempfile.TemporaryDirectory(prefix="trivium-bench-")
        settings = config(
            output_dir=self.scratch.name, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None
        )
        self.trainer = trainer(
            model=base,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),  # not read: batches are given
            processing_class=AutoTokenizer.from_pretrained(self.folder / "model"),
            peft_config=wanted(),
        )
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        return self.trainer.model

    def _batches(self, steps: int) -> list[Any]:
        documents = json.loads((self.folder / "pairs.json").read_text())
        pairs = [[documents[i], documents[i + 1]] for i in range(0, len(documents), 2)]
        make = self._of_dpo if self.job == "dpo" else self._of_orpo
        return [make(group) for group in grouped(pairs, steps)]

    def _of_dpo(self, group: list[Any]) -> dict[str, Any]:
        """As DPOTrainer's collator makes it of ids."""
        rows = []
        for (chosen, targets), (rejected, _) in group:
            prompt = targets.index(True)
            rows.append({"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]})
        return self.trainer.data_collator(rows)

    def _of_orpo(self, group: list[Any]) -> dict[str, Any]:
        """As ORPOTrainer's collator makes it: each side by itself, labels of answers alone."""
        found = {}
        for side, name in enumerate(("chosen", "rejected")):
            tokens, targets = padded([pair[side] for pair in group])
            lengths = [len(pair[side][0]) for pair in group]
            found[f"{name}_input_ids"] = tokens
            found[f"{name}_labels"] = tokens.masked_fill(~targets, -100)
            mask = tokens.new_zeros(tokens.shape)
            for row, length in enumerate(lengths):
                mask[row, :length] = 1
            found[f"{name}_attention_mask"] = mask
        return found

    def _loss(self, batch: Any) -> Any:
        return self.trainer.compute_loss(self.model, batch)

    def start(self) -> float:
        import torch

        total = count = 0.0
        with torch.no_grad():
            for batch in self.batches:
                for tokens, targets in self._sides(batch):
                    total += float(self._sum(tokens, targets))
                    count += int(targets.sum())
        return total / count

    def _sides(self, batch: dict[str, Any]) -> list[tuple[Any, Any]]:
        """The tokens and targets of a batch."""
        if self.job == "dpo":
            return [(batch["input_ids"], batch["completion_mask"].bool())]
        return [(batch[f"{name}_input_ids"], batch[f"{name}_labels"] != -100) for name in ("chosen", "rejected")]

    def _positions(self) -> int:
        """Both sides are padded to the longer one's width."""
        if self.job == "dpo":
            return sum(batch["input_ids"].numel() for batch in self.batches)
        widths = [max(batch[f"{name}_input_ids"].shape[1] for name in ("chosen", "rejected")) for batch in self.batches]
        return sum(2 * len(batch["chosen_input_ids"]) * width for batch, width in zip(self.batches, widths, strict=True))


def eager(**options: Any) -> Tokens:
    return (Pairs if options["job"] in PAIRS else Tokens)(attention="eager", **options)


def sdpa(**options: Any) -> Tokens:
    return (Pairs if options["job"] in PAIRS else Tokens)(attention="sdpa", **options)


def wanted() -> Any:
    """PEFT's LoRA on every linear but the head."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")


def grouped(items: list[Any], steps: int) -> list[list[Any]]:
    """Documents, or pairs of them, of like length together, about equally many real tokens in each of `steps` groups."""

    def size(item: Any) -> int:
        return len(item[0]) if isinstance(item[0][0], int) else sum(len(ids) for ids, _ in item)

    items = sorted(items, key=size)
    total, held = sum(map(size, items)), 0
    groups: list[list[Any]] = [[] for _ in range(steps)]
    for item in items:
        groups[(2 * held + size(item)) * steps // (2 * total)].append(item)  # where its middle falls
        held += size(item)
    assert all(groups)
    return groups


def padded(documents: list[Any]) -> tuple[Any, Any]:
    import torch

    width = max(len(ids) for ids, _ in documents)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in documents])
    return tokens, torch.tensor([targets + [False] * (width - len(ids)) for ids, targets in documents])
