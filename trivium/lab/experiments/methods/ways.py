"""The ways to adapt a model that are measured against each other: what each trains, how fast, and where the rate comes from.

A way is a change to the config of `recipes.sft` or `recipes.prefer`; everything else of a run is the same for all of them.
Rates are published defaults of the class of methods, not tuned for this task: tuned rates could change places in a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ....adapt.bottleneck import Bottleneck
from ....adapt.dora import DoRA
from ....adapt.freeze import Freeze
from ....adapt.gated_prompt import LlamaAdapter
from ....adapt.ia3 import IA3
from ....adapt.lora import LoRA
from ....adapt.nf4 import Nf4
from ....adapt.prefix import Prefix
from ....adapt.prompt import Prompt
from ....adapt.square import MoRA
from ....core.spec import Spec
from ....train.objectives import NextToken
from ....train.preference import DPO, IPO, KTO, ORPO, Hinge, Preference, RobustDPO, SimPO

MAKERS = "the lower rate in the recipe of the model's makers"
DEMO = "the demo's; QLoRA's authors take 2e-4 for far longer runs"
ADAPTERS = "as LoRA's; Houlsby et al. find 3e-5 to 3e-3"
PAIRS = "one for all: a usual rate of LoRA, high enough for few steps"


@dataclass(frozen=True)
class Way:
    """One way: its peak learning rate and why, and `changes` to fields of the recipe's config. `first`: supervised steps on the
    chosen answers that come before the pairs, as a multiple of the run's own steps."""

    rate: float
    because: str
    changes: dict[str, Any] = field(default_factory=dict)
    first: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """What a result depends on, as JSON values."""
        changes = {name: _plain(value) for name, value in self.changes.items()}
        return {"rate": self.rate, "changes": changes, **({"first": self.first} if self.first else {})}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.to_dict() if isinstance(value, Spec) else value


def lora(rank: int) -> Way:
    return Way(1e-3, DEMO, {"adapter": LoRA(rank=rank, alpha=2.0 * rank)})


def dora(rank: int) -> Way:
    return Way(1e-3, "as LoRA's", {"adapter": DoRA(rank=rank, alpha=2.0 * rank)})


def prefer(objective: Preference | KTO, *, first: float = 0.0) -> Way:
    return Way(5e-4, PAIRS, {"adapter": LoRA(rank=16, alpha=32.0), "objective": objective}, first=first)


UNTAUGHT = "untaught"
TEACHING: dict[str, Way] = {
    UNTAUGHT: Way(0.0, "nothing is trained"),
    "full": Way(3e-4, MAKERS, {"adapter": None}),
    "last 4 layers": Way(3e-4, "as full", {"adapter": None, "passes": (Freeze(last=4, train=("final_norm",)),)}),
    "tied head alone": Way(3e-4, "as full", {"adapter": None, "passes": (Freeze(train=("embed",)),)}),
    "lora": lora(16),
    "qlora": Way(1e-3, "as LoRA's", {"adapter": LoRA(rank=16, alpha=32.0), "passes": (Nf4(),)}),
    "dora": dora(16),
    "mora": Way(1e-3, "as LoRA's", {"adapter": MoRA(rank=16)}),
    "bottleneck": Way(1e-3, ADAPTERS, {"adapter": Bottleneck(size=64)}),
    "parallel bottleneck": Way(1e-3, ADAPTERS, {"adapter": Bottleneck(size=128, after=("ffn",), reads="input", scale=4.0)}),
    "prefix": Way(1e-2, "P-tuning v2's", {"adapter": Prefix(length=16)}),
    "prompt": Way(3e-2, "PEFT's example", {"adapter": Prompt(length=16)}),
    "llama_adapter": Way(9e-3, "its authors'", {"adapter": LlamaAdapter(length=10)}),
    "ia3": Way(3e-3, "its authors'", {"adapter": IA3()}),
}
RANKS: dict[str, Way] = {"lora 4": lora(4), "dora 4": dora(4), "lora 64": lora(64), "dora 64": dora(64)}
MASKING: dict[str, Way] = {  # beside "lora", which learns the answers alone
    f"prompts count {weight:g}": Way(1e-3, DEMO, {"adapter": LoRA(rank=16, alpha=32.0), "objective": NextToken(prompt_weight=weight)})
    for weight in (0.1, 1.0)
}
PREFERRING: dict[str, Way] = {
    UNTAUGHT: Way(0.0, "nothing is trained"),
    "dpo": prefer(DPO()),
    "cdpo": prefer(DPO(label_smoothing=0.1)),
    "robust": prefer(RobustDPO()),
    "hinge": prefer(Hinge()),
    "ipo": prefer(IPO()),
    "simpo": prefer(SimPO()),
    "orpo": prefer(ORPO()),
    "kto": prefer(KTO()),
    "sft, then dpo": prefer(DPO(), first=1.0),
}
