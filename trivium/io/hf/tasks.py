"""What `architectures` and `id2label` of a config.json say of a head: a class of transformers' is its model and a task.

Labels have names there and numbers here: the names are carried along, and written again where they still fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...core.errors import ConfigError
from ...models.model import Model
from ...models.transformer import Transformer
from ...nn.heads import Head, LMHead, MaskedLMHead, NoHead
from ...nn.heads_task import Classifier, Project, Span, Tagger

LABELS = 2  # transformers' number where a config gives none


def task_of(architectures: Collection[str] | None, prefix: str, known: Collection[str], *, default: str) -> str:
    """What follows `prefix` in the one architecture named: "Model", "ForMaskedLM", ... `default` where none is named."""
    if not architectures:
        return default
    (name, *_) = architectures
    task = name.removeprefix(prefix)
    if task == name or task not in known:
        listed = ", ".join(f"{prefix}{one}" for one in known)
        raise ConfigError(f"config.json: architectures {name!r} is not supported (known: {listed})", field="architectures", value=name)
    return task


def task_for(head: Head) -> str | None:
    """The task that transformers' classes call a model with this head; None where they have none."""
    match head:
        case LMHead():
            return "ForCausalLM"
        case MaskedLMHead():
            return "ForMaskedLM"
        case Classifier():
            return "ForSequenceClassification"
        case Tagger():
            return "ForTokenClassification"
        case Span():
            return "ForQuestionAnswering"
        case Project() | NoHead():
            return "Model"
    return None


def labels_of(id2label: Mapping[str, str] | None) -> int:
    return LABELS if id2label is None else len(id2label)


def names_of(count: int) -> dict[str, str] | None:
    """As transformers names labels without names; None where it writes nothing."""
    return None if count == LABELS else {str(i): f"LABEL_{i}" for i in range(count)}


def with_numbers(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with a `label2id` that is its `id2label` turned round, where that says anything."""
    names = config.get("id2label")
    rest = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    return rest if names is None else {**rest, "id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def classifier_name(architecture: str) -> str | None:
    """transformers' class that puts a classifier on the last token of a causal family, from that of its language model."""
    for suffix in ("ForCausalLM", "LMHeadModel"):
        if architecture.endswith(suffix):
            return architecture.removesuffix(suffix) + "ForSequenceClassification"
    return None


def classified(spec: Model, name: str | None, config: Mapping[str, Any]) -> Model:
    """`spec` with a classifier in the place of its head, if `config` names the class `name`."""
    if name is None or name not in (config.get("architectures") or ()) or not isinstance(spec, Transformer):
        return spec
    return spec.replace(head=Classifier(labels=labels_of(config.get("id2label")), pool="last", bias=False))
