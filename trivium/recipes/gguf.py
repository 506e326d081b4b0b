"""A GGUF file that llama.cpp and Ollama run, with a Modelfile beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import FileError
from ..core.log import log
from ..io.files import atomic_file
from ..io.gguf.export import write_model
from .load import Bundle, load

CONTEXT = 8192  # tokens that Ollama is told to keep; a cache for all that a long-context model allows can fill the memory


def export_gguf(model: Bundle | str | Path, out: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Write `model` (or what `load` makes of it) to the GGUF file `out`, and `<its stem>.Modelfile` beside it.

    `dtype`: f32, f16, bf16 or q8_0 for the matrices; None keeps the model's own. Raises `ConfigError` with the reason where
    the format cannot say what the model does, `FileError` where a file is in the way or cannot be written.
    """
    out = Path(out)
    beside = out.with_suffix(".Modelfile")
    if not overwrite and (there := [path for path in (out, beside) if path.exists()]):
        raise FileError(f"{there[0]}: is there already; choose another place, or allow overwriting")
    if isinstance(model, Bundle):
        bundle = model
    else:  # a packed file is read as float32 where that is more than will be kept, so that values are rounded once
        packed = Path(model).suffix == ".gguf"
        bundle = load(model, dtype="fp32" if packed and dtype is not None else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = write_model(
        out,
        bundle.model,
        dtype=dtype,
        tokenizer=bundle.tokenizer,
        template=bundle.prompt.template,
        rest=bundle.rest,
        generation_config=bundle.generation_config,
        name=bundle.path.stem,
        overwrite=overwrite,
    )
    for note in written.notes:
        log.say(f"{out.name}: {note}")
    if bundle.prompt.arguments:
        log.say(f"{out.name}: the chat template's arguments {bundle.prompt.arguments} have no place in GGUF; whoever serves it sets them")
    stops = [bundle.tokenizer.token(id) for id in bundle.prompt.stops]
    text = modelfile(out.name, context=bundle.spec.context, stops=stops, template=bundle.prompt.template is not None)
    with atomic_file(beside) as file:
        file.write(text.encode())
    log.say(f"{out}: written ({written.type}, {out.stat().st_size / 1e6:,.1f} MB, sha256 {written.sha256}); for Ollama: {beside}")
    return out


def modelfile(gguf: str, *, context: int | None, stops: Sequence[str], template: bool) -> str:
    """What `ollama create` reads: where the weights are, how much to remember, where an answer ends.

    Ollama runs templates in Go's language, which a Jinja template cannot be translated to in general; none is made up here.
    """
    length = min(context or CONTEXT, CONTEXT)
    lines = [f"# ollama create NAME -f {Path(gguf).stem}.Modelfile", f"FROM ./{gguf}"]
    if context is not None and context > length:
        lines.append(f"# The model allows {context} tokens; raise this if there is memory for them.")
    lines.append(f"PARAMETER num_ctx {length}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if "\n" not in stop]
    if template:
        lines += [
            "# The chat template is in the GGUF file, in Jinja. Ollama knows common ones by their text and takes its own translation;",
            "# see which with: ollama show NAME --template. Where that says only {{ .Prompt }}, write it here: TEMPLATE (in Go's language).",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
