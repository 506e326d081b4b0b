"""How a model whose head is for a task leaves: in its own family's words where that has them, so that transformers reads it alike."""

from __future__ import annotations

import copy
from dataclasses import replace

from ..core.errors import ConfigError
from ..core.log import log
from ..io import directory
from ..io.hf import families
from .load import Bundle


def padded(bundle: Bundle) -> Bundle:
    """`bundle` with a padding token that ends no answer: transformers' classifiers read the last token that is not padding, and
    many chat models pad with the very token that ends a turn."""
    text, stops = bundle.tokenizer, bundle.prompt.stops
    if text.pad is not None and text.pad not in stops:
        return replace(bundle, rest={**bundle.rest, "pad_token_id": text.pad})
    named = [token for token in (text.unk, text.bos) if token is not None]
    pad = next((token for token in (*named, *sorted(text.special)) if token not in stops), None)
    text = copy.copy(text)
    if pad is None:
        log.warn("no special token is left to pad with, so transformers will read rows of this model one at a time only")
        text.config = {key: value for key, value in text.config.items() if key != "pad_token"}
    else:
        text.config = {**text.config, "pad_token": text.token(pad)}
    text.pad = pad
    return replace(bundle, tokenizer=text, rest={**bundle.rest, "pad_token_id": pad})


def family_of(bundle: Bundle) -> str:
    """The model_type that can say what `bundle` has become: its own, or trivium's."""
    if bundle.family == directory.NATIVE or bundle.passes:
        return directory.NATIVE
    try:
        families.get(bundle.family).to_hf(bundle.spec, bundle.rest)
    except ConfigError as error:
        log.say(str(error))
        return directory.NATIVE
    return bundle.family
