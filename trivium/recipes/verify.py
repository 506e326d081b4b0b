"""Is this model what it claims to be? Each check compares with an independent side, and says by how much they differ.

Tensors against the gguf and safetensors packages; token ids against jinja2 and `tokenizers` called directly; cached,
batched and packed computation against the plain forward; every attention backend against the naive one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, MissingExtra
from ..core.log import log
from ..io import directory
from ..nn.attention import use_backend
from ..nn.backends import backends
from ..nn.inputs import Inputs
from .load import Bundle, load

CONVERSATION = (
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Spell naïve café, 你好 and 👩‍🚀 backwards."},
    {"role": "assistant", "content": "That takes a moment."},
    {"role": "user", "content": "  Take it.\n\n\tThanks — {really} 100% <b>sure</b>?  "},
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then does it again, because once is never enough.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
)


@dataclass(frozen=True)
class Check:
    """One comparison: `check` was compared with `against`; `difference` must not pass `tolerance`. What a difference is
    stands in `unit`."""

    check: str
    against: str
    difference: float
    tolerance: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "pass": self.passed}


def verify(x: str | Path, *, source: str | Path | None = None, dtype: str | None = "fp32") -> list[Check]:
    """All checks that apply to `x` (as `load` takes it). `source`: the GGUF file that it came from, if lineage does not
    say or the file moved. Computation is compared in `dtype`; float32 tells rounding from error."""
    bundle = load(x, dtype=dtype)
    return [*_stored(bundle, source), *_text(bundle), *_computed(bundle)]


def show(checks: list[Check]) -> None:
    """The table of what was compared, on the log."""
    rows = [(c.check, c.against, f"{c.difference:.3g}", f"{c.tolerance:.3g}", c.unit, "yes" if c.passed else "NO") for c in checks]
    log.table("verified", ("check", "against", "difference", "tolerance", "unit", "pass"), rows)


def _stored(bundle: Bundle, source: str | Path | None) -> Iterator[Check]:
    """Tensors as they lie in memory against what other packages read from the files."""
    if bundle.path.is_dir() and bundle.adapter is None:
        yield _against_safetensors(bundle)
    file = Path(source) if source else _gguf_of(bundle)
    if file is not None and file.is_file():
        yield _against_gguf(bundle, file)


def _gguf_of(bundle: Bundle) -> Path | None:
    if bundle.path.suffix == ".gguf":
        return bundle.path
    first = bundle.lineage[0] if len(bundle.lineage) == 1 else {}  # trained since: no longer the file's tensors
    return Path(str(first["path"])) if first.get("step") == "gguf" else None


def _against_safetensors(bundle: Bundle) -> Check:
    """Saved again, the model gives the very bytes of its files, read by the safetensors package."""
    from safetensors import safe_open

    stored = load(bundle.path)  # as stored, in no other dtype
    exported = directory.exported(stored.model, family=stored.family)
    different, seen = 0, set()
    for path in directory.weight_files(bundle.path):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                theirs, ours = file.get_tensor(name), exported.get(name)
                seen.add(name)
                same = ours is not None and ours.dtype == theirs.dtype and torch.equal(_bits(ours), _bits(theirs))
                different += 0 if same else 1
    different += len(set(exported) - seen)
    return Check(f"{len(seen)} tensors, saved again", "bytes read by safetensors", different, 0, "tensors that differ")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _against_gguf(bundle: Bundle, path: Path) -> Check:
    """Every tensor against the gguf package's reader and dequantization, rounded as the model is."""
    import gguf

    stored = load(bundle.path) if bundle.path.is_dir() else bundle
    exported = directory.exported(stored.model, family=stored.family)
    heads = {"attn_q": int(_attention(bundle).heads), "attn_k": int(_attention(bundle).kv_heads)}
    reader, largest, count = gguf.GGUFReader(path), 0.0, 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(bundle.spec.layers))
    ours = {names.get_name(name, (".weight", ".bias")): tensor for name, tensor in exported.items()}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        part = tensor.name.split(".")[-2]
        if part in heads:  # llama.cpp interleaves the rotary pairs of each head
            array = array.reshape(heads[part], -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        mine = ours[tensor.name]
        theirs = torch.tensor(array).to(mine.dtype)
        largest = max(largest, (mine.float() - theirs.float()).abs().max().item())
        count += 1
    return Check(f"{count} tensors", "gguf package, dequantized", largest, 0.0, "largest absolute")


def _attention(bundle: Bundle) -> Any:
    return bundle.spec.blocks[bundle.spec.layers[0]].mixer


def _text(bundle: Bundle) -> Iterator[Check]:
    """A conversation's token ids against the template rendered by jinja2 itself and encoded by `tokenizers` itself."""
    if bundle.prompt.template is None:
        return
    import jinja2
    import jinja2.sandbox
    import tokenizers

    ours = bundle.prompt.generation(CONVERSATION)  # first, within our limits: a template that never ends is stopped here
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    special = {
        name: bundle.tokenizer.token(i) if i is not None else ""
        for name, i in (("bos_token", bundle.tokenizer.bos), ("eos_token", bundle.tokenizer.eos))
    }
    rendered = environment.from_string(bundle.prompt.template).render(messages=list(CONVERSATION), add_generation_prompt=True, **special)
    engine = tokenizers.Tokenizer.from_str(bundle.tokenizer.json())
    theirs = engine.encode(rendered, add_special_tokens=False).ids
    yield Check(f"{len(ours)} token ids of a conversation", "jinja2 and tokenizers", _distance(ours, theirs), 0, "ids that differ")
    decoder, text = bundle.tokenizer.stream(), bundle.tokenizer.decode(ours)
    streamed = "".join([decoder.push(i) for i in ours]) + decoder.finish()
    yield Check("decoding as a stream", "decoding at once", _distance(streamed, text), 0, "characters that differ")


def _distance(a: Any, b: Any) -> int:
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


@torch.inference_mode()
def _computed(bundle: Bundle) -> Iterator[Check]:
    """Ways of computing the same logits, against the plain forward of one row; in units of the logits' deviation."""
    model, exact = bundle.model, bundle.model.dtype == torch.float32
    rows = [bundle.tokenizer.encode(text) for text in TEXTS]
    if bundle.prompt.template is not None:
        rows.append(bundle.prompt.generation(CONVERSATION))
    x = torch.tensor([max(rows, key=len)], device=model.device)
    plain = model(x).logits.float()
    tolerance, unit = (1e-4, 0.2)[not exact], "standard deviations of the logits"

    def off(logits: Tensor, reference: Tensor = plain) -> float:
        return ((logits.float() - reference).abs().max() / plain.std()).item()

    def check(name: str, compute: Callable[[], float], against: str = "the full forward") -> Check:
        return Check(name, against, compute(), tolerance, unit)

    yield check("cached decoding, token by token", lambda: off(_cached(model, x, 1)))
    yield check("cached prefill, 7 tokens at a time", lambda: off(_cached(model, x, 7)))
    yield check(f"{len(rows)} rows in a padded batch", lambda: _apart(model, rows, off, packed=False), "each row alone")
    yield check(f"{len(rows)} documents packed in a row", lambda: _apart(model, rows, off, packed=True), "each document alone")
    for name in backends.names():
        if name != "eager" and (found := _with_backend(model, x, name, off)) is not None:
            yield check(f"attention backend {name}", lambda found=found: found, "eager attention")


def _cached(model: Any, x: Tensor, size: int) -> Tensor:
    cache = model.cache(rows=1, capacity=x.shape[1])
    return torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split(size, dim=1)], 1)


def _apart(model: Any, rows: list[list[int]], off: Callable[[Tensor, Tensor], float], *, packed: bool) -> float:
    alone = [model(torch.tensor([ids], device=model.device)).logits[0].float() for ids in rows]
    if packed:
        tokens = torch.tensor([[i for ids in rows for i in ids]], device=model.device)
        segments = torch.tensor([[n for n, ids in enumerate(rows) for _ in ids]], device=model.device)
        together = model(Inputs(tokens, segments=segments)).logits[0].split([len(ids) for ids in rows])
    else:
        width = max(map(len, rows))
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows], device=model.device)
        segments = torch.tensor([[0] * len(ids) + [-1] * (width - len(ids)) for ids in rows], device=model.device)
        logits = model(Inputs(tokens, segments=segments)).logits
        together = [logits[row, : len(ids)] for row, ids in enumerate(rows)]
    return max(off(a, b) for a, b in zip(together, alone, strict=True))


def _with_backend(model: Any, x: Tensor, name: str, off: Callable[[Tensor, Tensor], float]) -> float | None:
    """None where the backend says that it cannot do what this model asks, on this machine."""
    use_backend(model, "eager")
    reference = model(x).logits.float()
    use_backend(model, name)
    try:
        return off(model(x).logits, reference)
    except (ConfigError, MissingExtra):
        return None
    finally:
        use_backend(model, "auto")
