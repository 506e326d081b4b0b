"""Families: how models of Hugging Face's `model_type`s become specs and tensors of ours, and go back.

A family is data and pure functions: the keys that shape the model (a frozen spec whose defaults are transformers' own),
the keys that are only carried, key values to spec and back, and one list of weight rules. A spec that the family cannot
say comes back changed from the way there and back, and is refused. Nothing outside a family's file knows its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeGuard

from ...core.config import diff
from ...core.errors import ConfigError, nearest
from ...core.registry import Registry
from ...core.spec import Spec, explained, validate
from ...models.model import Model
from ...models.transformer import Transformer
from ...nn.heads import LMHead
from ...nn.heads_task import Classifier
from ..rules import Rename, Rule
from . import tasks

# Keys that any config may hold and that say nothing about the model's shape.
COMMON = frozenset({
    "architectures", "dtype", "initializer_range", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    "output_attentions", "output_hidden_states", "return_dict",
    "_attn_implementation_autoset", "_name_or_path", "is_llama_config", "transformers.js_config",
})  # fmt: skip


class Family:
    """One `model_type`. A family says the class variables, `spec`, `values` and `rules`; the rest is shared."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    keys: ClassVar[type[Spec]]  # the keys of config.json that shape the model, in today's form
    carried: ClassVar[Mapping[str, Any]]  # further keys that are kept and not read, with what transformers takes where they are absent
    spelled: ClassVar[tuple[str, ...]] = ()  # keys of which several values mean the same: a file's own is kept while it says the model

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config` with keys of older forms replaced by today's."""
        raise NotImplementedError

    def spec(self, keys: Any) -> Model:
        """What the keys say."""
        raise NotImplementedError

    def values(self, spec: Any) -> dict[str, Any]:
        """The keys that say `spec`, as far as the family has words. Raises `ConfigError` where it has none."""
        raise NotImplementedError

    def rules(self, spec: Any) -> list[Rule]:
        """The rules that carry weights and adapter names."""
        raise NotImplementedError

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        """The keys of a modern `config` that are neither read nor known to be harmless."""
        return sorted(set(config) - set(self.keys.model_fields) - set(self.carried) - COMMON - {"model_type"})

    def to_spec(self, config: Mapping[str, Any], *, allow_unknown: Collection[str] = ()) -> tuple[Model, dict[str, Any]]:
        """A config.json as (spec, rest). `rest` holds every key that is carried, those of `allow_unknown` among them, and what
        the file says in one of several ways, as it says it.

        Raises `ConfigError` that lists the keys that are neither read, nor known to be harmless, nor allowed.
        """
        config = self.modernize(dict(config))
        read = self.keys.model_fields
        if unknown := [key for key in self.unknown_keys(config) if key not in allow_unknown]:
            hints = {key: nearest(key, read) for key in unknown}
            listed = ", ".join(f"{key} (did you mean {hint}?)" if hint else key for key, hint in hints.items())
            raise ConfigError(
                f"config.json: keys that model_type {self.model_type!r} does not know: {listed}; if they change nothing, allow them by name",
                field=unknown[0],
                value=config[unknown[0]],
                choices=read,
            )
        keys = validate(self.keys, {key: value for key, value in config.items() if key in read}, where="config.json")
        rest = {key: value for key, value in config.items() if key not in read and key != "model_type"}
        if (dtype := rest.pop("torch_dtype", None)) is not None:
            rest.setdefault("dtype", dtype)
        with explained("config.json"):
            made = self.spec(keys)
        spec = tasks.classified(made, tasks.classifier_name(self.architecture), config)
        kept = (*self.spelled, "tie_word_embeddings") if _classifies(spec) else self.spelled
        return spec, {**self.carried, **rest, **{key: config[key] for key in kept if key in config}}

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json that transformers 5 would write for `spec`. Raises `ConfigError` with the reason if none can say it."""
        name = tasks.classifier_name(self.architecture)
        if name is not None and _classifies(spec):
            return self._classifier(spec, rest, name)
        values = self.values(spec)
        wanted, said = spec.with_plain_names(), self.spec(validate(self.keys, values, where="config.json"))
        if said != wanted:
            lost = ", ".join(f"{path} = {mine!r}" for path, mine, _ in diff(wanted, said))
            raise self.cannot(f"it has no words for {lost}")
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # absent ones would get transformers' defaults
        kept = {key: value for key, value in rest.items() if key != "_name_or_path"}  # a place, not a fact about the model
        if name in (kept.get("architectures") or ()):
            del kept["architectures"]  # what this was read as, before its head was changed
        config = {**self.carried, **tokens, "architectures": [self.architecture], **kept, **values, "model_type": self.model_type}
        for key in self.spelled:
            if key in rest and self._says({**values, key: rest[key]}, said):
                config[key] = rest[key]
        return config

    def _classifier(self, spec: Transformer, rest: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The config of a classifier on the last token, which is a language model's but for the class and the labels. Whether the
        language model's head was tied is not in the spec; `rest` has it."""
        key = "tie_word_embeddings"
        tied = rest.get(key, key in self.keys.model_fields and self.keys.model_fields[key].default)
        config = self.to_hf(spec.replace(head=LMHead(tied=tied)), rest)
        said: dict[str, Any] = {**config, "architectures": [name]}
        assert isinstance(spec.head, Classifier)
        if tasks.labels_of(said.get("id2label")) != spec.head.labels:
            said = tasks.with_numbers({**said, "id2label": tasks.names_of(spec.head.labels)})
        if tasks.classified(spec, name, said) != spec:
            raise self.cannot("a classifier of transformers' reads the last token, by a map without bias, and nothing else")
        return said

    def weight_rules(self, spec: Any) -> list[Rule]:
        """`rules`, whatever head there is."""
        if tasks.classifier_name(self.architecture) is None or not _classifies(spec):
            return self.rules(spec)
        return [Rename("score", "head.out"), *self.rules(spec.replace(head=LMHead(tied=True)))]

    def _says(self, values: Mapping[str, Any], spec: Model) -> bool:
        try:
            return self.spec(validate(self.keys, values)) == spec
        except ConfigError:
            return False

    def cannot(self, reason: str) -> ConfigError:
        """The error for a spec that this family cannot express."""
        return ConfigError(f"this model cannot be written as model_type {self.model_type!r}: {reason}; save it as 'trivium' instead")


def _classifies(spec: Model) -> TypeGuard[Transformer]:
    return isinstance(spec, Transformer) and isinstance(spec.head, Classifier)


families: Registry[Family] = Registry("model_type", "trivium.io.hf")
