"""The families `bert`, `roberta` and `xlm-roberta`: encoders with learned positions, segment embeddings and the norms after the sums.

`architectures` says which head there is: masked language model, classifier of texts or tokens, extractive question answering,
or none but the pooler. They differ in names, and in where RoBERTa's positions begin. arXiv:1810.04805, arXiv:1907.11692.
Next-sentence prediction beside a masked language model is read over; the cross-attention of their decoder form is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ...core.errors import ConfigError
from ...core.spec import Spec
from ...models.block import Block
from ...models.model import Model
from ...models.transformer import Transformer
from ...nn.attention import Attention
from ...nn.embeddings import Tokens
from ...nn.feedforward import MLP
from ...nn.heads import Head, MaskedLMHead
from ...nn.heads_task import Classifier, Project, Span, Tagger
from ...nn.norms import Layer, NoNorm
from ...nn.positions_absolute import Learned
from ..rules import Drop, Rename, Rule
from . import Family, families, tasks
from .gpt2 import GPT2_ACTIVATIONS as ACTIVATIONS

TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class Keys(Spec):
    """What both families read from config.json."""

    architectures: tuple[str, ...] | None = None
    vocab_size: int = Field(30522, gt=0)
    hidden_size: int = Field(768, gt=0)
    num_hidden_layers: int = Field(12, gt=0, le=10_000)
    num_attention_heads: int = Field(12, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    classifier_dropout: float | None = Field(None, ge=0, lt=1)
    max_position_embeddings: int = Field(512, gt=0)
    type_vocab_size: int = Field(2, gt=0)
    layer_norm_eps: float = Field(1e-12, gt=0)
    id2label: dict[str, str] | None = None
    tie_word_embeddings: bool = True
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    position_embedding_type: Literal["absolute"] = "absolute"


class RobertaKeys(Keys):
    vocab_size: int = Field(50265, gt=0)
    pad_token_id: int = Field(1, ge=0)  # positions begin behind it


class XLMRobertaKeys(RobertaKeys):
    vocab_size: int = Field(30522, gt=0)


class Bert(Family):
    """BERT, and the sentence encoders that are made of it."""

    model_type = "bert"
    architecture = "BertForMaskedLM"
    keys = Keys
    spelled = ("architectures", "hidden_act", "classifier_dropout", "id2label", "tie_word_embeddings")
    carried: Mapping[str, Any] = {"initializer_range": 0.02, "use_cache": True, "pad_token_id": 0}
    prefix = "Bert"
    stem = "bert"

    def modernize(self, config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "gradient_checkpointing"}

    def to_hf(self, spec: Model, rest: Mapping[str, Any]) -> dict[str, Any]:
        return tasks.with_numbers(super().to_hf(spec, rest))

    def offset(self, keys: Any) -> int:
        """The row of position 0."""
        return 0

    def spec(self, keys: Any) -> Transformer:
        if keys.hidden_size % keys.num_attention_heads:
            message = f"hidden_size ({keys.hidden_size}) must be a multiple of num_attention_heads ({keys.num_attention_heads})"
            raise ConfigError(f"config.json: {message}", field="num_attention_heads")
        if keys.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"config.json: hidden_act {keys.hidden_act!r} is not supported (known: {known})", field="hidden_act")
        offset = self.offset(keys)
        if keys.max_position_embeddings <= offset:
            raise ConfigError(f"config.json: max_position_embeddings must be more than {offset}", field="max_position_embeddings")
        norm, size = Layer(eps=keys.layer_norm_eps), keys.max_position_embeddings - offset
        heads = keys.num_attention_heads
        attention = Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=keys.hidden_size // heads,
            bias=("q", "k", "v", "out"),
            dropout=keys.attention_probs_dropout_prob,
        )
        mlp = MLP(hidden=keys.intermediate_size, activation=ACTIVATIONS[keys.hidden_act], gated=False, bias=True)
        block = Block(mixer=attention, ffn=mlp, norm=norm, norm_at="post", dropout=keys.hidden_dropout_prob)
        return Transformer(
            dim=keys.hidden_size,
            vocab=keys.vocab_size,
            layers=("layer",) * keys.num_hidden_layers,
            blocks={"layer": block},
            embed=Tokens(
                positions=Learned(size=size, offset=offset), types=keys.type_vocab_size, norm=norm, dropout=keys.hidden_dropout_prob
            ),
            head=self.head(keys),
            final_norm=NoNorm(),
            causal=False,
            context=size,
        )

    def head(self, keys: Any) -> Head:
        dropout = keys.hidden_dropout_prob if keys.classifier_dropout is None else keys.classifier_dropout
        labels = tasks.labels_of(keys.id2label)
        match tasks.task_of(keys.architectures, self.prefix, TASKS, default="Model"):
            case "ForMaskedLM":
                return MaskedLMHead(
                    activation=self.head_activation(keys), norm=Layer(eps=keys.layer_norm_eps), tied=keys.tie_word_embeddings
                )
            case "ForSequenceClassification":
                return Classifier(labels=labels, inner=True, dropout=dropout)
            case "ForTokenClassification":
                return Tagger(labels=labels, dropout=dropout)
            case "ForQuestionAnswering":
                return Span()
        return Project(inner=True)

    def head_activation(self, keys: Any) -> Any:
        return ACTIVATIONS[keys.hidden_act]

    def values(self, spec: Any) -> dict[str, Any]:
        block = spec.blocks[spec.layers[0]] if isinstance(spec, Transformer) else None
        if block is None or not isinstance(block.mixer, Attention) or not isinstance(block.ffn, MLP):
            raise self.cannot("each layer must be attention, then an mlp")
        embed, head, task = spec.embed, spec.head, tasks.task_for(spec.head)
        if not isinstance(embed, Tokens) or not isinstance(embed.positions, Learned):
            raise self.cannot("its embedding must have learned positions")
        if task not in TASKS:
            raise self.cannot(f"transformers has no class for a head of kind {head.kind!r}")
        said = {
            "architectures": [f"{self.prefix}{task}"],
            "vocab_size": spec.vocab,
            "hidden_size": spec.dim,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": block.mixer.heads,
            "intermediate_size": block.ffn.hidden,
            "hidden_act": next((name for name, one in ACTIVATIONS.items() if one == block.ffn.activation), "gelu"),
            "hidden_dropout_prob": block.dropout,
            "attention_probs_dropout_prob": block.mixer.dropout,
            "classifier_dropout": head.dropout if isinstance(head, Classifier | Tagger) and head.dropout != block.dropout else None,
            "max_position_embeddings": embed.positions.size + embed.positions.offset,
            "type_vocab_size": embed.types,
            "layer_norm_eps": block.norm.eps if isinstance(block.norm, Layer) else 1e-12,
            "tie_word_embeddings": not isinstance(head, MaskedLMHead) or head.tied,
            "is_decoder": False,
            "add_cross_attention": False,
        }
        return {**said, "id2label": tasks.names_of(head.labels)} if isinstance(head, Classifier | Tagger) else said

    def rules(self, spec: Transformer) -> list[Rule]:
        bare = isinstance(spec.head, Project)
        prefixes = ("", f"{self.stem}.") if bare else (f"{self.stem}.", "")  # the first is written, both are read
        rules = [*self.head_rules(spec.head), *(rule for prefix in prefixes for rule in self._body(prefix))]
        return [*rules, *(early for rule in rules for early in first_names(rule))]

    def head_rules(self, head: Head) -> list[Rule]:
        words, pooler = f"{self.stem}.embeddings.word_embeddings", f"{self.stem}.pooler.dense"
        match head:
            case MaskedLMHead():
                return [
                    *self.masked("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
                    *self.decoder("cls.predictions", words, tied=head.tied),
                    Drop("cls.seq_relationship"),
                    Drop(pooler),
                ]
            case Classifier():
                return [Rename("classifier", "head.out"), Rename(pooler, "head.pooler.dense")]
            case Tagger():
                return [Rename("classifier", "head.out")]
            case Span():
                return [Rename("qa_outputs", "head.out")]
        return [Rename("pooler.dense", "head.pooler.dense"), Rename(pooler, "head.pooler.dense")]

    def masked(self, dense: str, norm: str) -> list[Rule]:
        return [Rename(dense, "head.transform.dense"), Rename(norm, "head.transform.norm")]

    def decoder(self, theirs: str, words: str, *, tied: bool) -> list[Rule]:
        """The last map of a masked language model. Tied, its bias has a name of its own; apart, that one is read by nothing."""
        if tied:
            copies: list[Rule] = [Drop(f"{theirs}.decoder.bias"), Drop(f"{theirs}.decoder", same_as=words)]
            return [Rename(f"{theirs}.bias", "head.bias"), *copies]
        return [Drop(f"{theirs}.bias"), Rename(f"{theirs}.decoder", "head.out")]

    def _body(self, prefix: str) -> list[Rule]:
        layer, ours = f"{prefix}encoder.layer.{{i}}", "layers.{i}"
        names = {
            "attention.self.query": "mixer.inp.q",
            "attention.self.key": "mixer.inp.k",
            "attention.self.value": "mixer.inp.v",
            "attention.output.dense": "mixer.out",
            "attention.output.LayerNorm": "mixer_norm",
            "intermediate.dense": "ffn.inp.up",
            "output.dense": "ffn.out",
            "output.LayerNorm": "ffn_norm",
        }
        return [
            Rename(f"{prefix}embeddings.word_embeddings", "embed"),
            Rename(f"{prefix}embeddings.position_embeddings", "embed.positions"),
            Rename(f"{prefix}embeddings.token_type_embeddings", "embed.types"),
            Rename(f"{prefix}embeddings.LayerNorm", "embed.norm"),
            Drop(f"{prefix}embeddings"),  # the numbers of positions, which transformers stored before 4.31
            *(Rename(f"{layer}.{theirs}", f"{ours}.{mine}") for theirs, mine in names.items()),
        ]


class Roberta(Bert):
    """RoBERTa."""

    model_type = "roberta"
    architecture = "RobertaForMaskedLM"
    keys = RobertaKeys
    carried: Mapping[str, Any] = {"initializer_range": 0.02, "use_cache": True, "bos_token_id": 0, "eos_token_id": 2}
    prefix = "Roberta"
    stem = "roberta"

    def offset(self, keys: Any) -> int:
        return keys.pad_token_id + 1

    def head_activation(self, keys: Any) -> Any:
        return ACTIVATIONS["gelu"]  # whatever the layers have

    def values(self, spec: Any) -> dict[str, Any]:
        values = super().values(spec)
        return {**values, "pad_token_id": spec.embed.positions.offset - 1}

    def head_rules(self, head: Head) -> list[Rule]:
        match head:
            case MaskedLMHead():
                return [
                    *self.masked("lm_head.dense", "lm_head.layer_norm"),
                    *self.decoder("lm_head", f"{self.stem}.embeddings.word_embeddings", tied=head.tied),
                    Drop(f"{self.stem}.pooler.dense"),
                ]
            case Classifier():
                return [Rename("classifier.dense", "head.pooler.dense"), Rename("classifier.out_proj", "head.out")]
        return super().head_rules(head)


class XLMRoberta(Roberta):
    """RoBERTa over many languages (arXiv:1911.02116)."""

    model_type = "xlm-roberta"
    architecture = "XLMRobertaForMaskedLM"
    keys = XLMRobertaKeys
    prefix = "XLMRoberta"


def first_names(rule: Rule) -> list[Rule]:
    """What the first BERTs' files call a norm's parameters."""
    if not isinstance(rule, Rename) or not rule.disk[0].text.endswith("LayerNorm"):
        return []
    theirs, ours = rule.disk[0].text, rule.ours[0].text
    return [Rename(f"{theirs}.gamma", f"{ours}.weight"), Rename(f"{theirs}.beta", f"{ours}.bias")]


for _family in (Bert(), Roberta(), XLMRoberta()):
    families.add(_family.model_type, _family)
