"""What the pages of methods take from the code: a method's counts and options, and the tables of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.generate import DOCS, fields, filled, table
from trivium.adapt.adapter import Adapter, adapters, linear_updates
from trivium.adapt.bottleneck import Bottleneck
from trivium.adapt.dora import DoRA
from trivium.adapt.freeze import Freeze
from trivium.adapt.gated_prompt import LlamaAdapter
from trivium.adapt.ia3 import IA3
from trivium.adapt.lora import LoRA
from trivium.adapt.nf4 import Nf4
from trivium.adapt.noise import Noise
from trivium.adapt.passes import Pass, apply_passes
from trivium.adapt.prefix import Prefix
from trivium.adapt.prompt import Prompt
from trivium.adapt.square import MoRA
from trivium.core.errors import ConfigError
from trivium.io import peft
from trivium.lab import concepts
from trivium.models.presets import presets
from trivium.models.transformer import build
from trivium.train.objectives import Objective
from trivium.train.preference import DPO, IPO, KTO, ORPO, Hinge, Preference, RobustDPO, SimPO
from trivium.train.rewards import BradleyTerry

FOLDER = DOCS / "methods"
# By page: what it does to the model, with the defaults that are counted.
METHODS: dict[str, tuple[Pass, ...]] = {
    "full": (),
    "freeze": (Freeze(last=1, train=("final_norm",)),),
    "lora": (LoRA(),),
    "qlora": (Nf4(), LoRA()),
    "dora": (DoRA(),),
    "prompt-tuning": (Prompt(),),
    "prefix-tuning": (Prefix(through=512),),
    "p-tuning-v2": (Prefix(),),
    "bottleneck": (Bottleneck(),),
    "llama-adapter": (LlamaAdapter(),),
    "mora": (MoRA(),),
    "ia3": (IA3(),),
    "neftune": (Noise(),),
}
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "dpo": (DPO(),),
    "cdpo": (DPO(label_smoothing=0.1), RobustDPO()),
    "ipo": (IPO(),),
    "hinge": (Hinge(),),
    "simpo": (SimPO(),),
    "orpo": (ORPO(),),
    "kto": (KTO(),),
    "reward": (BradleyTerry(),),
}


@dataclass(frozen=True)
class Counted:
    """`trained` of `total` parameters of SmolLM2-135M."""

    trained: int
    total: int
    merges: bool
    saved: str

    @property
    def share(self) -> str:
        return f"{self.trained:,} ({100 * self.trained / self.total:.3g}%)" if self.trained < self.total else f"{self.trained:,} (all)"


def pages() -> dict[Path, str]:
    """Every page of the folder, its generated parts made anew."""
    counted = {name: count(passes) for name, passes in METHODS.items()}
    made = {}
    for path in sorted(FOLDER.glob("*.md")):
        text, name = path.read_text(encoding="utf-8"), path.stem
        if name in METHODS:
            text = filled(text, "method", name, method(METHODS[name], counted[name]))
        elif name in OBJECTIVES:
            text = filled(text, "objective", name, "\n".join(objective(each) for each in OBJECTIVES[name]))
        elif name == "index":
            text = filled(text, "methods", "table", methods(counted))
            text = filled(text, "objectives", "table", objectives())
        made[path] = text
    return made


def count(passes: tuple[Pass, ...]) -> Counted:
    model = build(presets.get("smollm2-135m")())
    total = sum(parameter.numel() for parameter in model.parameters())
    apply_passes(model, passes)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    steps = list(adapters(model).values())
    saved = f"`{saved_as(steps[0])}`" if steps else "a model directory"
    return Counted(trained, total, all(_merges(model, step) for step in steps), saved)


def saved_as(step: Adapter) -> str:
    """The `peft_type` of its adapter_config.json."""
    kind = peft.WRITES.get(step.kind, peft.OwnFormat.peft_type)
    return kind if peft.FORMATS[kind].holds(step) else peft.OwnFormat.peft_type


def _merges(model: Any, step: Adapter) -> bool:
    try:
        return bool(linear_updates(model, step.name))
    except ConfigError:
        return False


def method(passes: tuple[Pass, ...], counted: Counted) -> str:
    """Facts, and the options of each pass."""
    adapter = next((step for step in passes if isinstance(step, Adapter)), None)
    rows = [("trained parameters of SmolLM2-135M, by default", counted.share)]
    if adapter is not None:
        rows += [
            ("saved as", f"PEFT's two files, `peft_type` {counted.saved}"),
            ("merges into the base", "yes" if counted.merges else "no"),
        ]
    else:
        rows.append(("saved as", counted.saved))
    rows += [(f"code of `{step.kind}`", _code(type(step))) for step in passes]
    options = [f"\nOptions, as `{_prefix(step)}`:\n\n{fields(type(step))}" for step in passes]
    return table(("what", "is"), rows) + "".join(options)


def _prefix(step: Pass) -> str:
    return "adapter.NAME" if isinstance(step, Adapter) else f"passes: {{kind: {step.kind}, NAME: ...}}"


def objective(each: Objective) -> str:
    rows = [("kind", f"`{each.kind}`"), ("compared with a reference", "yes" if _refers(each) else "no"), ("code", _code(type(each)))]
    return table(("what", "is"), rows) + f"\nOptions, as `objective.NAME`:\n\n{fields(type(each))}"


def _refers(each: Objective) -> bool:
    return isinstance(each, KTO) or (isinstance(each, Preference) and each.refers)


def _code(cls: type[Any]) -> str:
    """The file that holds a method, and the lines of code of its class."""
    part = cls.__module__.removeprefix("trivium.").replace(".", "/") + ".py"
    return f"`{cls.__name__}` in `trivium/{part}`, {concepts.lines(part, cls.__name__)} lines"


def methods(counted: dict[str, Counted]) -> str:
    def row(name: str, passes: tuple[Pass, ...]) -> tuple[str, ...]:
        own = counted[name]
        kinds = ", ".join(f"`{step.kind}`" for step in passes) or "`--adapter null`"
        adapter = any(isinstance(step, Adapter) for step in passes)
        return f"[{title(name)}]({name}.md)", kinds, own.share, own.saved, ("yes" if own.merges else "no") if adapter else ""

    return table(("method", "kind", "trained (share)", "saved as", "merges"), [row(*item) for item in METHODS.items()])


def objectives() -> str:
    rows = [
        (f"[{title(name)}]({name}.md)", ", ".join(f"`{each.kind}`" for each in found), "yes" if any(map(_refers, found)) else "no")
        for name, found in OBJECTIVES.items()
    ]
    return table(("method", "kind", "reference"), rows)


def title(name: str) -> str:
    """The heading of a page."""
    return next(line[2:] for line in (FOLDER / f"{name}.md").read_text(encoding="utf-8").splitlines() if line.startswith("# "))
