"""Families: how models of Hugging Face's `model_type`s become specs and tensors of ours, and go back.

A family is data and pure functions: the keys that shape the model (a frozen spec whose defaults are transformers' own),
the keys that are only carried, key values to spec and back, and one list of weight rules. A spec that the family cannot
say comes back changed from the way there and back, and is refused. Nothing outside a family's file knows its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from ...core.config import diff
from ...core.errors import ConfigError, nearest
from ...core.registry import Registry
from ...core.spec import Spec, validate
from ...models.transformer import Transformer
from ..rules import Rule

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

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config` with keys of older forms replaced by today's."""
        raise NotImplementedError

    def spec(self, keys: Any) -> Transformer:
        """What the keys say."""
        raise NotImplementedError

    def values(self, spec: Transformer) -> dict[str, Any]:
        """The keys that say `spec`, as far as the family has words. Raises `ConfigError` where it has none."""
        raise NotImplementedError

    def rules(self, spec: Transformer) -> list[Rule]:
        """The rules that carry weights and adapter names."""
        raise NotImplementedError

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        """The keys of a modern `config` that are neither read nor known to be harmless."""
        return sorted(set(config) - set(self.keys.model_fields) - set(self.carried) - COMMON - {"model_type"})

    def to_spec(self, config: Mapping[str, Any], *, allow_unknown: Collection[str] = ()) -> tuple[Transformer, dict[str, Any]]:
        """A config.json as (spec, rest). `rest` holds every key that is carried, those of `allow_unknown` among them.

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
        return self.spec(keys), {**self.carried, **rest}

    def to_hf(self, spec: Transformer, rest: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json that transformers 5 would write for `spec`. Raises `ConfigError` with the reason if none can say it."""
        values = self.values(spec)
        wanted, said = with_plain_names(spec), self.spec(validate(self.keys, values, where="config.json"))
        if said != wanted:
            lost = ", ".join(f"{path} = {mine!r}" for path, mine, _ in diff(wanted, said))
            raise self.cannot(f"it has no words for {lost}")
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # absent ones would get transformers' defaults
        kept = {key: value for key, value in rest.items() if key != "_name_or_path"}  # a place, not a fact about the model
        return {**self.carried, **tokens, "architectures": [self.architecture], **kept, **values, "model_type": self.model_type}

    def cannot(self, reason: str) -> ConfigError:
        """The error for a spec that this family cannot express."""
        return ConfigError(f"this model cannot be written as model_type {self.model_type!r}: {reason}; save it as 'trivium' instead")


def with_plain_names(spec: Transformer) -> Transformer:
    """`spec` with its blocks named as families name them: block names are free, and say nothing about the model."""
    names = list(dict.fromkeys(spec.layers))
    new = {name: "layer" if len(names) == 1 else f"layer{k}" for k, name in enumerate(names)}
    return spec.replace(layers=tuple(new[name] for name in spec.layers), blocks={new[name]: spec.blocks[name] for name in names})


families: Registry[Family] = Registry("model_type", "trivium.io.hf")
