"""The vocabulary in a GGUF file's metadata, as the engine that a tokenizer.json would give.

Two kinds: `gpt2`, byte-level BPE whose splitting rule has a name (`tokenizer.ggml.pre`, the table below), and `llama`,
SentencePiece BPE with scores, byte fallback and a dummy prefix, whose merges are recovered from the scores.
Unigram, WordPiece and RWKV vocabularies are left out. Rules and names follow llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..core.errors import FileError, unknown
from .stream import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
MAX_TOKENS = 1 << 22

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# Patterns that split one after the other, as the tokenizers themselves declare them.
PRE: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_WORDS % "{1,3}",),
    "smaug-bpe": (_WORDS % "{1,3}",),  # the same, but merges alone decide
    "qwen2": (_WORDS % "",),
    "stablelm2": (_WORDS % "",),  # the same, but text is taken as it is
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK),
    "gpt-4o": (_GPT4O,),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "gpt-4o")  # a piece that is a token is taken whole, whatever the merges say
NFC = ("qwen2",)


def build(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The engine, and what tokenizer_config.json would say. Keys are `tokenizer.ggml.*`. Raises `FileError`."""
    kind = _need(metadata, "model", str)
    if kind not in ("gpt2", "llama"):
        raise FileError(f"tokenizer.ggml.model: {unknown('kind of GGUF vocabulary', kind, ('gpt2', 'llama'))}")
    tokens = _strings(metadata, "tokens")
    if not tokens or len(tokens) > MAX_TOKENS:
        raise FileError(f"tokenizer.ggml.tokens: {len(tokens)} tokens; a vocabulary has between 1 and {MAX_TOKENS}")
    types = [int(number) for number in metadata.get("tokenizer.ggml.token_type", ())] or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise FileError(f"tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens")
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens):
        raise FileError(f"tokenizer.ggml.tokens: {len(tokens) - len(vocab)} tokens stand there twice")
    engine = _byte_level(metadata, vocab) if kind == "gpt2" else _sentencepiece(metadata, vocab, types)
    special = (CONTROL, UNKNOWN)
    marked = [(token, type in special) for token, type in zip(tokens, types, strict=True) if type in (*special, USER_DEFINED)]
    engine.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in marked])
    config: dict[str, Any] = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        id = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if id is not None and 0 <= int(id) < len(tokens):
            config[f"{ours}_token"] = tokens[int(id)]
    for end, default in {"bos": kind == "llama", "eos": False}.items():
        wanted = bool(metadata.get(f"tokenizer.ggml.add_{end}_token", default))
        config[f"add_{end}_token"] = wanted and f"{end}_token" in config
    engine.post_processor = ends(engine, config)
    return engine, config


def _need(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        raise FileError(f"tokenizer.ggml.{name}: {'missing' if value is None else repr(value)[:40]}; a vocabulary needs it")
    return value


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = list(_need(metadata, name, Sequence))
    if not all(isinstance(value, str) for value in values):
        raise FileError(f"tokenizer.ggml.{name}: it is not a list of strings")
    return values


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE:
        raise FileError(f"tokenizer.ggml.pre: {unknown('splitting rule', str(pre), PRE)}")
    merges = []
    for line in _strings(metadata, "merges"):
        left, _, right = line.partition(" ")
        if not right or left not in vocab or right not in vocab or left + right not in vocab:
            raise FileError(f"tokenizer.ggml.merges: {line!r:.60} does not join two tokens to a third")
        merges.append((left, right))
    engine = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS_FIRST))
    if pre in NFC:
        engine.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE[pre]]
    engine.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    return engine


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> Tokenizer:
    scores = [float(score) for score in metadata.get("tokenizer.ggml.scores", ())]
    if len(scores) != len(vocab):
        raise FileError(f"tokenizer.ggml.scores: {len(scores)} scores for {len(vocab)} tokens")
    unknowns = [token for token, type in zip(vocab, types, strict=True) if type == UNKNOWN]
    model = models.BPE(
        vocab=vocab,
        merges=list(_merges(vocab, scores, types)),
        unk_token=unknowns[0] if unknowns else None,
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    engine = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = [normalizers.Replace(" ", SPACE)]
    engine.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return engine


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> Iterator[tuple[str, str]]:
    """Every way to join two tokens to a third, the third with the highest score first."""
    usable = {token for token, id in vocab.items() if types[id] == NORMAL}
    for token in sorted(usable, key=lambda token: (-scores[vocab[token]], vocab[token])):
        for cut in range(1, len(token)):
            if token[:cut] in usable and token[cut:] in usable:
                yield token[:cut], token[cut:]


def ends(engine: Tokenizer, config: Mapping[str, Any]) -> processors.TemplateProcessing | None:
    """What writes the tokens that begin and end a text, for whoever loads the saved tokenizer.json."""
    found = {end: config[f"{end}_token"] for end in ("bos", "eos") if config[f"add_{end}_token"]}
    if not found:
        return None
    single = [found.get(part, part) for part in ("bos", "$A", "eos") if part in found or part == "$A"]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(token, engine.token_to_id(token)) for token in set(found.values())]
    )
