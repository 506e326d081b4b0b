"""Answers to prompts, as token ids: batched, cached, streamed; and `generate_naive`, which says what they must be.

A batch is padded on the right once, for the prompts; then each step feeds one token a row, and rows that ended leave
the batch. What a request yields does not depend on the requests beside it. Admitting requests into a running batch is
left to an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from ..models.context import HINT, check_length, scalings_by_length
from ..models.encoder_decoder import EncoderDecoder
from ..models.model import BuiltModel
from ..models.transformer import Transformer
from ..models.vision_language import VisionLanguage, VisionLanguageModel
from ..nn.heads import LMHead
from ..nn.inputs import Inputs
from ..nn.rope_scaling import LongScaling
from ..nn.store import Store
from .sampling import Drawn, Sampler, Sampling, sample_naive
from .stops import StopStrings

Finish = Literal["stop", "length"]


class Decoder(Protocol):
    """Ids to text, never half a character: `text`'s StreamDecoder is one."""

    def push(self, token: int, /) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True)
class Event:
    """One token of one row, and the text that it released ("" while a character or a stop string is incomplete).

    `logprob` is the model's own (temperature 1, nothing processed) and `top` the likeliest tokens with theirs, if asked
    for. The row's last event carries `finish_reason`.
    """

    row: int
    id: int
    text: str = ""
    logprob: float | None = None
    top: dict[int, float] | None = None
    finish_reason: Finish | None = None


@dataclass
class Completion:
    """One answer. `ids` are as sampled, the stop id or the tokens of the stop string included; `text` has neither, and
    is None without a decoder. `logprobs` and `top` have an entry for each id, if asked for."""

    ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: Finish | None = None
    logprobs: list[float] | None = None
    top: list[dict[int, float]] | None = None

    def add(self, event: Event) -> None:
        self.ids.append(event.id)
        self.finish_reason = event.finish_reason
        if self.text is not None:
            self.text += event.text
        if self.logprobs is not None and event.logprob is not None:
            self.logprobs.append(event.logprob)
        if self.top is not None and event.top is not None:
            self.top.append(event.top)


def generate(
    model: BuiltModel[Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    images: Sequence[Tensor | None] | None = None,
    stops: Collection[int] = (),
    decoder: Callable[[], Decoder] | None = None,
    context: int | None = None,
    chunk: int = 2048,
    batch: int | None = None,
) -> list[Completion]:
    """The answers to `prompts` (token ids), in their order.

    `sampling`: one for all, or one each; None samples the model's own distribution. `stops`: ids that end an answer,
    besides each request's own. `sources`: for an encoder-decoder, what its encoder reads, one each; the prompts are then how the
    decoder's text begins, such as its start token alone. `images`: for a vision-language model, those of each prompt [n, channels, H,
    W], or None for one without. `decoder`: makes a fresh decoder for a row; without one there is no text. `context`:
    most tokens of prompt and answer together (None: what the model was made for). `chunk`: most columns of the prompts
    in one forward. `batch`: most rows at a time (None: all), the longest prompts first.

    Raises `DataError` for a prompt that is empty, holds ids outside the vocabulary or leaves no room to answer, and
    `ConfigError` for settings that cannot be met.
    """
    requests = _requests(model, prompts, sampling, sources=sources, images=images, stops=stops, decoder=decoder, context=context)
    order = sorted(range(len(requests)), key=lambda row: -len(requests[row].prompt))
    size = batch or max(1, len(requests))
    for start in range(0, len(order), size):
        for event in _run(model, [requests[row] for row in order[start : start + size]], chunk=chunk):
            requests[event.row].completion.add(event)
    return [request.completion for request in requests]


def stream(
    model: BuiltModel[Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    images: Sequence[Tensor | None] | None = None,
    stops: Collection[int] = (),
    decoder: Callable[[], Decoder] | None = None,
    context: int | None = None,
    chunk: int = 2048,
) -> Iterator[Event]:
    """`generate` as it happens: an event for each token, the rows of a batch in turn. Errors come at the call.

    Until the stream ends or is closed, the model is in evaluation mode.
    """
    return _run(
        model,
        _requests(model, prompts, sampling, sources=sources, images=images, stops=stops, decoder=decoder, context=context),
        chunk=chunk,
    )


def generate_naive(
    model: BuiltModel[Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    sources: Sequence[Sequence[int]] | None = None,
    images: Sequence[Tensor | None] | None = None,
    stops: Collection[int] = (),
    context: int | None = None,
) -> list[list[int]]:
    """The ids of `generate`, one row after the other, without cache: a full forward for each token. Its oracle."""
    requests = _requests(model, prompts, sampling, sources=sources, images=images, stops=stops, decoder=None, context=context)
    device = model.device
    with _evaluating(model), torch.inference_mode():
        for request in requests:
            ids = request.completion.ids
            while len(ids) < request.room and (not ids or ids[-1] not in request.stops):
                inputs = Inputs(
                    torch.tensor([request.prompt + ids], device=device), source=_source(model, [request]), images=_images(model, [request])
                )
                logits = model(inputs).logits[0, -1]
                ids.append(sample_naive(logits, request.sampling, prompt=request.prompt, answer=ids))
    return [request.completion.ids for request in requests]


class _Request:
    """One row of the batch: what it asks for, and how far its answer is."""

    def __init__(
        self,
        row: int,
        prompt: list[int],
        sampling: Sampling,
        *,
        source: list[int] | None,
        images: Tensor | None,
        room: int,
        stops: frozenset[int],
        decoder: Decoder | None,
    ):
        self.row = row
        self.prompt = prompt
        self.source = source
        self.images = images
        self.sampling = sampling
        self.room = room
        self.stops = stops
        self.decoder = decoder
        self.strings = StopStrings(sampling.stop)
        self.ids: list[int] = []
        asked = sampling.logprobs
        self.completion = Completion(
            text=None if decoder is None else "",
            logprobs=None if asked is None else [],
            top=[] if asked else None,
        )

    def take(self, token: int, logprob: float | None, top: dict[int, float] | None) -> Event:
        """The event of the token sampled next."""
        self.ids.append(token)
        finish: Finish | None = None
        text = ""
        if token in self.stops:
            finish = "stop"
        elif self.decoder is not None:
            text = self.strings.push(self.decoder.push(token))
        if finish is None and len(self.ids) == self.room:
            finish = "length"
        if finish and self.decoder is not None:
            text += self.strings.push(self.decoder.finish())
            text += self.strings.finish()
        if self.strings.hit:
            finish = "stop"
        return Event(self.row, token, text, logprob, top, finish)


def _requests(
    model: BuiltModel[Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None,
    *,
    sources: Sequence[Sequence[int]] | None,
    images: Sequence[Tensor | None] | None,
    stops: Collection[int],
    decoder: Callable[[], Decoder] | None,
    context: int | None,
) -> list[_Request]:
    settings = list(sampling) if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
    if len(settings) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts, but {len(settings)} sampling settings: give one for all, or one each", field="sampling")
    if sources is not None and len(sources) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts, but {len(sources)} sources: give one each", field="sources")
    if (sources is not None) != isinstance(model.spec, EncoderDecoder):
        reason = "reads a source: give sources, one for each prompt" if sources is None else "has no encoder: leave out sources"
        raise ConfigError(f"this model {reason}", field="sources")
    stack = model.spec.decoder if isinstance(model.spec, EncoderDecoder) else model.spec
    if isinstance(stack, Transformer) and not (stack.causal and isinstance(stack.head, LMHead)):
        message = f"this model (causal: {stack.causal}, head: {stack.head.kind}) cannot generate: that takes causal: true and head: lm"
        raise ConfigError(message, field="head", value=stack.head.kind)
    if images is not None and len(images) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts, but {len(images)} sets of images: give one each, or None in its place", field="images")
    if images is not None and not isinstance(model, VisionLanguageModel):
        raise ConfigError("this model reads no images: leave out images", field="images")
    if context is not None:
        check_length(model.spec.context, context, what="context: is", field="context")
    context = model.spec.context if context is None else context
    requests = []
    for row, (prompt, wanted) in enumerate(zip(prompts, settings, strict=True)):
        _check(prompt, vocab=model.spec.vocab, where=f"prompts[{row}]")
        _check_bias(wanted, vocab=model.spec.vocab)
        source = None if sources is None else list(sources[row])
        if source is not None:
            assert isinstance(model.spec, EncoderDecoder)
            _check(source, vocab=model.spec.encoder.vocab, where=f"sources[{row}]")
        room = wanted.max_tokens if context is None else min(wanted.max_tokens, context - len(prompt))
        if room < 1:
            raise DataError(
                f"prompts[{row}] has {len(prompt)} tokens; the context of {context} leaves no room for an answer: shorten the prompt, or "
                f"{HINT}",
                field=f"prompts[{row}]",
                value=len(prompt),
            )
        if wanted.stop and decoder is None:
            raise ConfigError("stop strings need a decoder (decoder=tokenizer.stream); or use stop_ids", field="stop", value=wanted.stop)
        own = decoder() if decoder is not None else None
        ends = frozenset((*stops, *wanted.stop_ids))
        seen = None if images is None else images[row]
        if isinstance(model, VisionLanguageModel):
            _check_images(model.spec, prompt, 0 if seen is None else len(seen), where=f"prompts[{row}]")
        requests.append(_Request(row, list(prompt), wanted, source=source, images=seen, room=room, stops=ends, decoder=own))
    return requests


def _check(prompt: Sequence[int], *, vocab: int, where: str) -> None:
    if not len(prompt):
        raise DataError(f"{where} is empty: an answer needs at least one token to follow", field=where)
    outside = next((token for token in prompt if not 0 <= token < vocab), None)
    if outside is not None:
        hint = "was it made by another tokenizer?"
        raise DataError(f"{where} holds token {outside}, outside the model's vocabulary of {vocab}: {hint}", field=where, value=outside)


def _check_images(spec: VisionLanguage, prompt: Sequence[int], count: int, *, where: str) -> None:
    token, wanted = spec.image_token, spec.places * count
    if token is not None and (found := sum(one == token for one in prompt)) != wanted:
        message = f"{where} has {found} image tokens (token {token}), but its {count} images take {wanted}, {spec.places} each"
        raise DataError(message, field=where, value=found)


def _check_bias(sampling: Sampling, *, vocab: int) -> None:
    highest = max(sampling.logit_bias, default=0)
    if highest >= vocab:
        raise ConfigError(f"logit_bias: token {highest} is outside the model's vocabulary of {vocab}", field="logit_bias", value=highest)


def _run(model: BuiltModel[Any], requests: list[_Request], *, chunk: int) -> Iterator[Event]:
    if not requests:
        return
    with _evaluating(model):
        live = requests
        longest = max(len(request.prompt) for request in live)
        scalings = scalings_by_length(model.spec)
        if scalings:  # a prompt is turned by its whole length
            chunk = longest
        switches = {scaling.original_max_position_embeddings + 1 for scaling in scalings if isinstance(scaling, LongScaling)}
        # the last token sampled is never fed back
        capacity = longest + max(request.room for request in live) - 1
        store = model.cache(len(live), capacity)
        logits = _prefill(model, store, live, chunk)
        sampler = Sampler([r.sampling for r in live], [r.prompt for r in live], vocab=logits.shape[-1], device=logits.device)
        while True:
            drawn = _draw(sampler, logits)
            going = []
            for i, (token, logprob, top) in enumerate(_report(drawn, live)):
                event = live[i].take(token, logprob, top)
                if event.finish_reason is None:
                    going.append(i)
                yield event
            if not going:
                return
            tokens = drawn.ids[:, None]
            if len(going) < len(live):
                live = [live[i] for i in going]
                store.reorder(going)
                sampler.reorder(going)
                tokens = tokens[torch.tensor(going, device=tokens.device)]
            if any(len(request.prompt) + len(request.ids) in switches for request in live):  # what is cached is turned the other way
                store = model.cache(len(live), capacity)
                logits = _prefill(model, store, live, capacity)
            else:
                logits = _forward(model, Inputs(tokens, cache=store), "last")


@torch.inference_mode()
def _draw(sampler: Sampler, logits: Tensor) -> Drawn:
    return sampler.step(logits)


@torch.inference_mode()
def _forward(model: BuiltModel[Any], inputs: Inputs, keep: Literal["last", "none"] | Tensor) -> Tensor:
    return model(inputs, keep=keep).logits


def _prefill(model: BuiltModel[Any], store: Store, requests: list[_Request], chunk: int) -> Tensor:
    """Feeds the prompts and what was answered so far, at most `chunk` columns at a time, the sources with the first; with images all
    at once, since they stand anywhere. Returns the logits [B, V] after each row's last token."""
    prompts = [request.prompt + request.ids for request in requests]
    tokens, segments = _columns(prompts, model.device)
    longest = tokens.shape[1]
    source, images = _source(model, requests), _images(model, requests)
    if longest <= chunk or images is not None:
        return _forward(model, Inputs(tokens, segments=segments, source=source, images=images, cache=store), "last")
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)[:, None]
    column = torch.arange(longest, device=model.device)
    rows, logits = [], []
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        given = source if start == 0 else None
        inputs = Inputs(tokens[:, part], segments=None if segments is None else segments[:, part], source=given, cache=store)
        ending = [row for row, prompt in enumerate(prompts) if start < len(prompt) <= start + chunk]
        out = _forward(model, inputs, column[part] == last if ending else "none")
        if ending:
            rows += ending
            logits.append(out)
    back = torch.tensor(rows, device=model.device).argsort()
    return torch.cat(logits)[back]


def _columns(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Texts padded on the right [B, T], and their segments where there is padding."""
    longest = max(len(text) for text in texts)
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
    if all(len(text) == longest for text in texts):
        return tokens, None
    lengths = torch.tensor([len(text) for text in texts], device=device)[:, None]
    return tokens, torch.where(torch.arange(longest, device=device) < lengths, 0, -1)


def _source(model: BuiltModel[Any], requests: list[_Request]) -> Inputs | None:
    """What the encoder reads, if the model has one."""
    sources = [request.source for request in requests if request.source is not None]
    if not sources:
        return None
    tokens, segments = _columns(sources, model.device)
    return Inputs(tokens, segments=segments)


def _images(model: BuiltModel[Any], requests: list[_Request]) -> Tensor | None:
    """Those of all rows, one after another."""
    given = [request.images for request in requests if request.images is not None]
    return torch.cat(given).to(model.device) if given else None


def _report(drawn: Drawn, live: list[_Request]) -> Iterator[tuple[int, float | None, dict[int, float] | None]]:
    """Per row: the token, and as much about its log-probabilities as the row asked for. The one read from the device."""
    ids = drawn.ids.tolist()
    if drawn.logprobs is None or drawn.top_ids is None or drawn.top_logprobs is None:
        yield from ((token, None, None) for token in ids)
        return
    columns = zip(ids, drawn.logprobs.tolist(), drawn.top_ids.tolist(), drawn.top_logprobs.tolist(), live, strict=True)
    for token, logprob, top_ids, top_logprobs, request in columns:
        asked = request.sampling.logprobs
        top = dict(zip(top_ids[:asked], top_logprobs, strict=False)) if asked else None
        yield token, None if asked is None else logprob, top


@contextmanager
def _evaluating(model: BuiltModel[Any]) -> Generator[None]:
    """Dropout off, then each module as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
