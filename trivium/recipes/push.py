"""To the hub: a model directory with a card written from what is known of it, its lineage and its results.

Nothing is sent that is not listed first; `HF_ENDPOINT` and `HF_TOKEN` say where and as whom. A card that someone wrote
is kept, and only its generated part, between two marks, is written anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import config as configs
from ..core.errors import FileError, TriviumError
from ..core.log import log
from ..evaluate import results
from ..io import directory, files, peft
from ..models.transformer import Transformer

CARD = "README.md"
BEGIN, END = "<!-- trivium: generated from here -->", "<!-- trivium: to here -->"
SENT = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja", "adapter_config.json", "trivium.json",
    "trivium_adapter.json", "*.gguf", "Modelfile", CARD,
)  # fmt: skip


@dataclass(frozen=True)
class Pushed:
    """What was, or would be, sent: the repository, its address once sent, and the files with their sizes."""

    repo: str
    url: str | None
    files: Mapping[str, int]


def push(
    path: str | Path,
    repo: str,
    *,
    result_files: Sequence[str | Path] = (),
    private: bool = True,
    license: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Send the model or adapter directory `path` to the hub repository `repo` (owner/name), with a model card.

    `result_files`: results of `trivium eval run` to report. `dry_run` writes the card and lists what would be sent. Raises
    `FileError` for what is no model, `TriviumError` for what the hub refuses; nothing of a failed push is visible there.
    """
    path = Path(path)
    if not (path / directory.CONFIG).is_file() and not (path / peft.CONFIG).is_file():
        raise FileError(f"{path}: holds no model and no adapter (no {directory.CONFIG}, no {peft.CONFIG})")
    record = directory.read_record(path)
    if record is not None and (changed := directory.edited(path, record, full=True)):
        names = ", ".join(edit.file for edit in changed)
        raise FileError(
            f"{path}: changed since {directory.RECORD} was written: {names}. Accept the change first (trivium inspect --accept)"
        )
    write_card(path, result_files=result_files, license=license)
    sent = {file.name: file.stat().st_size for pattern in SENT for file in sorted(path.glob(pattern)) if file.is_file()}
    if dry_run:
        return Pushed(repo, None, sent)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=path, allow_patterns=list(SENT), commit_message=f"{path.name}, sent by trivium")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TriviumError(f"{repo}: the hub did not take it: {said}") from None
    log.say(f"sent {len(sent)} files, {sum(sent.values()) / 1e6:.1f} MB")
    return Pushed(repo, str(done.repo_url), sent)


def write_card(path: Path, *, result_files: Sequence[str | Path] = (), license: str | None = None) -> Path:
    """Write the model card of `path`, keeping what stands outside the generated part."""
    found = [results.load(Path(file))[0] for file in result_files]
    body = "\n".join([BEGIN, *_body(path, found), END])
    card = path / CARD
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    if BEGIN in old and END in old:
        text = old[: old.index(BEGIN)] + body + old[old.index(END) + len(END) :]
    elif old.strip():
        text = old.rstrip() + "\n\n" + body + "\n"
    else:
        text = _front(path, found, license) + f"\n# {path.name}\n\n" + body + "\n"
    with files.atomic_file(card) as sink:
        sink.write(text.encode())
    return card


def _front(path: Path, found: Sequence[results.Result], license: str | None) -> str:
    adapter = (path / peft.CONFIG).is_file()
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": ["trivium"], "pipeline_tag": "text-generation"}
    if license:
        front["license"] = license
    if adapter and (base := peft.read_config(path).base_model_name_or_path):
        front["base_model"] = base
    if found:
        front["model-index"] = [{"name": path.name, "results": [_indexed(result) for result in found]}]
    return f"---\n{configs.dump(front)}---\n"


def _indexed(result: results.Result) -> dict[str, Any]:
    data = ", ".join(Path(name).name for name in result.hashes if name.startswith("data/"))
    metrics = [{"type": name, "value": round(measured.value, 6)} for name, measured in result.metrics.items()]
    return {"task": {"type": "text-generation"}, "dataset": {"name": data, "type": "other"}, "metrics": metrics}


def _body(path: Path, found: Sequence[results.Result]) -> list[str]:
    lines = ["## What it is", ""]
    record = directory.read_record(path)
    if record is not None:
        spec = record.spec
        if isinstance(spec, Transformer):
            lines += [
                f"{len(spec.layers)} layers of width {spec.dim}, a vocabulary of {spec.vocab}"
                + (f", a context of {spec.context} tokens." if spec.context else "."),
                "",
            ]
        lines += ["## How it came to be", ""]
        lines += [f"{number}. {_step(step)}" for number, step in enumerate(record.lineage, start=1)] or ["It is not recorded."]
        lines += ["", "## Hashes", "", "| file | SHA-256 |", "|---|---|"]
        lines += [f"| `{name}` | `{mark.sha256}` |" for name, mark in sorted(record.files.items())]
    else:
        lines += ["A LoRA adapter." if (path / peft.CONFIG).is_file() else "A model directory.", ""]
    if found:
        lines += ["", "## Results", "", "| task | data | metric | value | 95% interval | rows |", "|---|---|---|---|---|---|"]
        for result in found:
            data = ", ".join(Path(name).name for name in result.hashes if name.startswith("data/"))
            for name, m in result.metrics.items():
                interval = "" if m.low is None or m.high is None else f"{m.low:.4f} to {m.high:.4f}"
                lines.append(f"| {result.task['kind']} | {data} | {name} | {m.value:.4f} | {interval} | {m.rows} |")
        lines += ["", "Measured with: " + "; ".join(f"`{' '.join(result.command)}`" for result in found)]
    return lines


def _step(step: Mapping[str, Any]) -> str:
    facts = {name: value for name, value in step.items() if name != "step"}
    text = json.dumps(facts, ensure_ascii=False, default=str)
    return f"**{step.get('step', 'step')}**: `{text if len(text) <= 600 else text[:600] + '...'}`"
