"""BERT and RoBERTa against transformers, in fp32, on tiny models whose every parameter is redrawn: each head that the
families know, on padded rows with two types of token (see `harness.py`)."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from tests.parity.harness import OTHER, SHAPE, TOLERANCE, Family, Refusals, apart, config_of, tensors_of
from trivium.io import directory
from trivium.io.hf import families
from trivium.models.model import BuiltModel
from trivium.nn.heads_task import Classifier, Project
from trivium.nn.inputs import Inputs

ONE: dict[str, Any] = {**SHAPE, "max_position_embeddings": 40, "layer_norm_eps": 0.01}
TWO: dict[str, Any] = {
    **OTHER, "max_position_embeddings": 50, "type_vocab_size": 3, "hidden_act": "gelu_new", "layer_norm_eps": 0.05, "hidden_dropout_prob": 0.25,
    "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.125, "initializer_range": 0.03, "use_cache": False, "pad_token_id": 4,
    "bos_token_id": 5, "eos_token_id": 6,
}  # fmt: skip
NAMES = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}, "label2id": {"no": 0, "perhaps": 1, "yes": 2}}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-masked": ("BertForMaskedLM", ONE),
    "bert-masked-tanh": ("BertForMaskedLM", TWO),
    "bert-classes": ("BertForSequenceClassification", TWO | NAMES),
    "bert-two-classes": ("BertForSequenceClassification", ONE),
    "bert-tags": ("BertForTokenClassification", {**ONE, "num_labels": 7}),
    "bert-spans": ("BertForQuestionAnswering", TWO),
    "bert-bare": ("BertModel", ONE),
    "roberta-masked": ("RobertaForMaskedLM", ONE),
    "roberta-classes": ("RobertaForSequenceClassification", TWO | NAMES),
    "roberta-tags": ("RobertaForTokenClassification", {**TWO, "num_labels": 4, "classifier_dropout": None}),
    "roberta-spans": ("RobertaForQuestionAnswering", ONE),
    "xlm-roberta-masked": ("XLMRobertaForMaskedLM", TWO),
    "xlm-roberta-bare": ("XLMRobertaModel", ONE),
    "roberta-bare": ("RobertaModel", {**ONE, "type_vocab_size": 1}),
}  # fmt: skip
LENGTHS = [17, 9, 12]


def tiny(kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    model = hf.tiny(kind, **keys)
    with torch.no_grad():  # tables that are looked up, not summed over
        for table, parameter in model.named_parameters():
            if "_embeddings.weight" in table:
                parameter.mul_(2)
    return model


def batch(config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their types, and which ones are there."""
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    tokens = torch.randint(7, config.vocab_size, (len(LENGTHS), width), generator=generator)
    types = torch.randint(0, config.type_vocab_size, tokens.shape, generator=generator)
    there = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    return tokens.masked_fill(~there, config.pad_token_id), types, there


@torch.no_grad()
def theirs_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    """[N, *]: at each position that is there, or for each row."""
    tokens, types, there = batch(model.config)
    out = model(input_ids=tokens, token_type_ids=types, attention_mask=there.long())
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)[there]
    if "pooler_output" in out:
        return torch.cat([out.pooler_output, out.last_hidden_state[there]])
    return out.logits if out.logits.dim() == 2 else out.logits[there]


@torch.no_grad()
def ours_of(model: BuiltModel[Any], config: Any) -> torch.Tensor:
    tokens, types, there = batch(config)
    out = model(Inputs(tokens, types=types, segments=there.long() - 1))
    if isinstance(model.spec.head, Project):
        return torch.cat([out.logits, out.hidden[there]])
    return out.logits if out.logits.dim() == 2 else out.logits[there]


@pytest.mark.concept("T03.02", part="io/hf/bert.py")
class TestBert(Family, Refusals):
    table = TABLE
    noise = 0.1
    alike = ("is_decoder", "add_cross_attention", "position_embedding_type", "tie_word_embeddings", "architectures", "id2label")
    tiny = staticmethod(tiny)
    theirs = staticmethod(theirs_of)
    ours = staticmethod(ours_of)
    spread = (0.3, math.inf)
    others = {"architectures": ["BertForPreTraining"], "id2label": {str(i): str(i) for i in range(9)}, "hidden_act": "relu"}
    heeded = ("hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")
    refused = ("architectures", "is_decoder", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    unreadable = [
        ("bert-bare", {"hidden_act": "mish"}, "hidden_act 'mish'"),
        ("bert-bare", {"architectures": ["BertLMHeadModel"]}, "architectures 'BertLMHeadModel' is not supported"),
        ("bert-bare", {"is_decoder": True}, "is_decoder"),
        ("bert-bare", {"num_attention_heads": 5}, "num_attention_heads"),
        ("bert-bare", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ]
    unsayable = [
        ("bert-bare", {"causal": True}, "causal"),
        ("bert-bare", {"head": {"kind": "lm"}}, "no class for a head of kind 'lm'"),
        ("bert-bare", {"head": {"kind": "project", "pool": "mean"}}, "pool"),
        ("bert-bare", {"embed": {"kind": "tokens"}}, "learned positions"),
        ("bert-bare", {"final_norm": {"kind": "rms"}}, "final_norm"),
    ]

    def silent(self, name: str, spec: Any) -> bool:
        return name.endswith("k.bias")

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        return value if key == "position_embedding_type" else super().other(key, value, config)

    def idle(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Keys that not every head reads."""
        return "tie_word_embeddings", "classifier_dropout", "id2label"


def test_a_table_of_its_own_for_the_masked_head(tmp_path):
    """transformers stores a bias twice then, and reads one of the two."""
    theirs = tiny("BertForMaskedLM", {**ONE, "tie_word_embeddings": False})
    model = directory.read(hf.save(theirs, tmp_path)).model
    assert not model.spec.head.tied and apart(ours_of(model, theirs.config), theirs_of(theirs)) < TOLERANCE


def test_files_with_more_or_less_around_the_encoder(tmp_path):
    """A bare encoder's names with a prefix, without `architectures`, norms as they were called first, and with what old writers stored;
    pretraining's second head."""
    theirs = tiny("BertModel", ONE)
    expected = theirs_of(theirs)
    config = config_of(hf.save(theirs, tmp_path))
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "position_embedding_type": "absolute", "gradient_checkpointing": False}))
    weights = {f"bert.{name}": tensor for name, tensor in tensors_of(tmp_path).items()}
    early = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for now, then in early.items():
        weights = {name.replace(now, then): tensor for name, tensor in weights.items()}
    weights["bert.embeddings.position_ids"] = torch.arange(40)[None]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert apart(ours_of(directory.read(tmp_path).model, theirs.config), expected) < TOLERANCE

    both = transformers.BertForPreTraining(transformers.BertConfig(**ONE)).eval()
    hf.redraw(both, seed=1)
    config = config_of(hf.save(both, tmp_path / "both"))
    (tmp_path / "both" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    tokens, types, there = batch(both.config)
    with torch.no_grad():
        expected = both(input_ids=tokens, token_type_ids=types, attention_mask=there.long()).prediction_logits[there]
    assert apart(ours_of(directory.read(tmp_path / "both").model, both.config), expected) < TOLERANCE


def test_another_number_of_labels_gets_names_of_its_own(tmp_path):
    theirs = tiny(*TABLE["bert-classes"])
    loaded = directory.read(hf.save(theirs, tmp_path))
    family = families.get("bert")
    wider = loaded.spec.replace(head=Classifier(labels=4, inner=True, dropout=0.125))
    config = family.to_hf(wider, loaded.rest)
    assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(4)} and config["label2id"]["LABEL_3"] == 3
    assert family.to_hf(loaded.spec, loaded.rest)["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
