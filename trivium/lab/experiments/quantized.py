"""Fine-tuning beside a base of four bits, against the same base in full: what is lost, and what is held."""

from __future__ import annotations

from typing import Any

from ...adapt.lora import LoRA, initialize_adapter
from ...adapt.nf4 import Nf4, memory
from ...models.transformer import TransformerModel
from . import Result, experiment, small
from .adapting import adapted, base, manual, told

DIM, STEPS, SEEDS = 128, 120, tuple(range(5))
LORA = LoRA(rank=8, alpha=16.0)
LIMIT = 0.02  # the share of the loss that may be lost


def quantized(*, effort: float, seed: int) -> TransformerModel:
    """The base in four bits, with the adapter that the full one gets."""
    model = Nf4().apply(adapted(None, effort=effort, seed=seed, dim=DIM))
    initialize_adapter(LORA.apply(model), seed=seed)
    return model


@experiment("qlora", "T06.04", question="Does LoRA on a 4-bit base end within 2% of the loss of LoRA on the full one?")
def qlora(effort: float) -> Result:
    """A model of width 128 that read the standard library's source, taught the language's manual by LoRA of rank 8 on all linear maps: on the
    full base and on the one in NF4 with double quantization, in float32 both; five seeds paired, loss on held-out sections."""
    steps = small.steps_of(STEPS, effort)
    starts = {"LoRA": base(DIM, effort), "QLoRA": quantized(effort=effort, seed=0)}
    before = {name: small.held_out(model, manual()[1]) for name, model in starts.items()}
    losses: dict[str, list[float]] = {"LoRA": [], "QLoRA": []}
    for seed in SEEDS:
        for name, model in (("LoRA", adapted(LORA, effort=effort, seed=seed, dim=DIM)), ("QLoRA", quantized(effort=effort, seed=seed))):
            trained, _ = small.train(model.spec, steps=steps, seed=seed, lr=3e-3, data=manual()[0], model=model)
            losses[name].append(small.held_out(trained, manual()[1]))
    gap = small.paired([1.0] * len(SEEDS), [ours / full for full, ours in zip(losses["LoRA"], losses["QLoRA"], strict=True)])
    held = memory(starts["QLoRA"])
    numbers: dict[str, Any] = {
        "steps": steps,
        "loss before": before,
        "held-out loss by seed": losses,
        "loss over LoRA's, less one": gap,
        "bits a weight": held.bits,
    }
    standing = "Holds" if gap["high"] <= LIMIT else "Does not hold at this size" if gap["low"] > LIMIT else "Not settled at this size"
    if small.mean(losses["LoRA"]) >= before["LoRA"]:
        standing = "Says nothing, for LoRA itself did not learn"
    lost = told({"QLoRA": gap}, "+.2%")
    verdict = f"{standing}: held-out loss over that of LoRA on the full base, less one: {lost}, at {held.bits:.2f} bits a weight."
    return Result(numbers, verdict, SEEDS)
