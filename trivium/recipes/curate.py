"""Curation of files: rows in, the good ones out, the others beside them with the reason.

Models are loaded only where a step needs one: `model` counts tokens and gives losses, `encoder` embeds sentences. Without an
encoder, rows are compared by their words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny

from ..core.errors import ConfigError, DataError, FileError
from ..core.log import log
from ..core.spec import Spec
from ..data import rows
from ..data.batch import Batch
from ..data.curation import Curated, Exact, Near, Step
from ..data.curation import curate as through
from ..data.items import Means
from ..data.likeness import bags
from ..io import directory
from ..models.transformer import TransformerModel, with_head
from ..nn.heads_task import Project
from ..nn.inputs import Inputs
from ..text.prompt import Row
from ..train.logprobs import document_logprobs
from .data import text_side
from .load import Bundle, load
from .rewrite import Place

TOKENS = 4096  # of one forward, padding included


class Curate(Spec):
    """What is done to which rows."""

    data: tuple[str, ...] = Field(min_length=1, description="rows: files, folders or globs")
    out: str = Field("curated.jsonl", pattern=r"\.jsonl$", description="the rows that stay; the others and a report lie beside it")
    steps: tuple[SerializeAsAny[Step], ...] = Field((Exact(), Near()), description="what takes rows out, in order")
    model: str = Field("smollm2", description="what counts tokens and gives losses, where a step asks for them")
    encoder: str | None = Field(None, description="directory of a sentence encoder (BERT); null compares rows by their words")
    format: str | None = Field(None, description="the rows' format, if their columns do not tell")


def curate(config: Curate, *, bundle: Bundle | None = None, overwrite: bool = False, write: bool = True) -> Curated:
    """Put rows through the steps and write what is left to `config.out`, what is not to `.removed.jsonl` beside it, and the numbers
    to `.report.json`.

    `bundle`: the model, already loaded. `write` False writes nothing. Raises `DataError` for no rows, mixed formats, a step that would
    leave nothing, and a place that is taken.
    """
    place = Place.of(config.out, config.data, overwrite=overwrite) if write else None
    if not config.steps:
        raise ConfigError("steps: name at least one", field="steps")
    found = through(rows.read(config.data), config.steps, means=means(config, bundle), format=config.format)
    if place is not None:
        place.write((record.value for record in found.kept), (out.to_dict() for out in found.removed), found.report)
    return found


def means(config: Curate, bundle: Bundle | None = None) -> Means:
    """What the steps of `config` need, and no more."""
    needs = {need for step in config.steps for need in step.needs}
    if "nats" in needs:
        bundle = bundle or load(config.model)
    prompt = None
    if "prompt" in needs:
        prompt = bundle.prompt if bundle is not None else text_side(config.model)[1]
    nats = None if bundle is None or "nats" not in needs else losses(bundle.model)
    embed = bags if config.encoder is None else encoder(config.encoder) if "embed" in needs else None
    return Means(prompt=prompt, nats=nats, embed=embed)


def losses(model: TransformerModel) -> Callable[[Sequence[Row]], list[float]]:
    """The summed loss in nats of each row's targets. Raises `DataError` for a row that is longer than the model's context."""

    @torch.inference_mode()
    def nats(found: Sequence[Row]) -> list[float]:
        context = model.spec.context
        longest = max((len(row.ids) for row in found), default=0)
        if context is not None and longest > context:
            raise DataError(f"a row has {longest} tokens, and the model reads {context}; take long rows out first (step: length)")
        total = [0.0] * len(found)
        with log.progress("losses", total=len(found)) as progress:
            for group in grouped([len(row.ids) for row in found]):
                tokens = torch.zeros(len(group), len(found[group[0]].ids), dtype=torch.int64)
                segments, targets = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
                for at, place in enumerate(group):
                    row, size = found[place], len(found[place].ids)
                    tokens[at, :size], segments[at, :size] = torch.tensor(row.ids), 0
                    targets[at, 1:size] = torch.tensor(row.targets[1:])
                batch = Batch(tokens, segments, targets).to(model.device)
                for place, logprob in zip(group, document_logprobs(model, batch)[:, 0].tolist(), strict=True):
                    total[place] = -logprob
                progress.advance(len(group))
        return total

    return nats


def encoder(path: str | Path) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Sentence vectors [N, C] of length 1, the mean over a text's tokens (arXiv:1908.10084), by a BERT such as all-MiniLM-L6-v2.

    Texts longer than it reads are cut, and counted aloud. Raises `FileError` and `ConfigError` for what is no such model.
    """
    model = directory.read(path).model
    if not isinstance(model, TransformerModel) or model.spec.causal:
        raise ConfigError(
            f"encoder: {path} holds no encoder of sentences, which reads in both directions", field="encoder", value=str(path)
        )
    model = with_head(model, Project(pool="mean", normalize=True), seed=0).eval()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    except Exception as error:  # the engine raises nothing more special
        raise FileError(f"{path}: its tokenizer.json cannot be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    context = model.spec.context or 512

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        ids = [found.ids for found in tokenizer.encode_batch(list(texts))]
        if long := sum(len(row) > context for row in ids):
            log.warn(f"{long} of {len(ids)} texts are longer than the encoder's {context} tokens, and are compared by their beginning")
        ids = [row[:context] for row in ids]
        vectors = np.zeros((len(ids), model.spec.dim), np.float32)
        with log.progress("embeddings", total=len(ids)) as progress:
            for group in grouped([len(row) for row in ids]):
                tokens = torch.zeros(len(group), len(ids[group[0]]), dtype=torch.int64)
                segments = torch.full_like(tokens, -1)
                for at, place in enumerate(group):
                    tokens[at, : len(ids[place])], segments[at, : len(ids[place])] = torch.tensor(ids[place]), 0
                logits = model(Inputs(tokens.to(model.device), segments=segments.to(model.device))).logits
                assert logits is not None
                vectors[group] = logits.float().cpu().numpy()
                progress.advance(len(group))
        return vectors

    return embed


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Places in groups of similar length, the longest first, of at most `TOKENS` tokens with their padding."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= TOKENS:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
