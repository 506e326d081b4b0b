"""BERT and RoBERTa against transformers, in fp32, on tiny models whose every parameter is redrawn: each head that the
families know, on padded rows with two types of token. A mutation of any one tensor or key on our side alone must show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from tests.parity import hf
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import families
from trivium.io.tensors import read_weights
from trivium.models.model import BuiltModel
from trivium.nn.heads_task import Classifier, Project
from trivium.nn.inputs import Inputs

SHAPE = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6}
OTHER = {"vocab_size": 89, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5}
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
TOLERANCE = 1e-5  # of the outputs' standard deviation


def tiny(name: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, name)
    model = model_class._from_config(model_class.config_class(**keys), attn_implementation="eager").eval()
    hf.redraw(model, seed=0)
    with torch.no_grad():  # tables that are looked up, not summed over
        for table, parameter in model.named_parameters():
            if "_embeddings.weight" in table:
                parameter.mul_(2)
    return model


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    model = tiny(*TABLE[request.param])
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


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


def off(model: BuiltModel[Any], config: Any, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations."""
    return ((ours_of(model, config) - expected).abs().max() / expected.std()).item()


@pytest.mark.concept("T03.02", part="io/hf/bert.py")
def test_logits(case):
    theirs, path = case
    expected = theirs_of(theirs)
    assert expected.std() > 0.3
    assert off(directory.read(path).model, theirs.config, expected) < TOLERANCE


def test_every_key_takes_two_values():
    fixed = ("is_decoder", "add_cross_attention", "position_embedding_type", "tie_word_embeddings")
    for family in (families.get("bert"), families.get("roberta")):
        written = [
            getattr(transformers, name).config_class(**keys).to_dict() for name, keys in TABLE.values() if name.startswith(family.prefix)
        ]
        for key in {*family.keys.model_fields, *family.carried} - {*fixed, "architectures", "id2label"}:
            assert len({json.dumps(config[key], sort_keys=True) for config in written}) > 1, f"{family.model_type}: {key}"


def test_every_tensor_matters(case):
    """Changing any one tensor on our side alone breaks parity; a bias on the keys moves no score in exact arithmetic."""
    theirs, path = case
    expected = theirs_of(theirs)
    model = directory.read(path).model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.add_(0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        there = off(model, theirs.config, expected)
        assert there < 10 * TOLERANCE if name.endswith("k.bias") else there > 100 * TOLERANCE, name
        parameter.copy_(before)


def test_every_key_matters(case, tmp_path):
    """Changing any one key on our side alone breaks parity, is refused, or (dropout, names of labels) shows in the spec."""
    theirs, path = case
    expected = theirs_of(theirs)
    config = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    spec, refused = directory.read(path).spec, set()
    headless = {"tie_word_embeddings", "classifier_dropout", "id2label"}  # keys that not every head reads
    for key in set(families.get(config["model_type"]).keys.model_fields) - {"position_embedding_type"}:
        value = config.get(key)
        if isinstance(value, bool):
            changed: Any = not value
        elif key == "architectures":
            changed = ["BertForPreTraining"]
        elif key == "id2label":
            changed = {str(i): str(i) for i in range(9)}
        elif key == "hidden_act":
            changed = "relu"
        else:
            changed = 0.75 if "dropout" in key else 2 * value
        (tmp_path / "config.json").write_text(json.dumps({**config, key: changed}))
        try:
            loaded = directory.read(tmp_path)
        except TriviumError:
            refused.add(key)
            continue
        if "dropout" in key or key in headless:
            assert loaded.spec != spec or key in headless, key
            assert off(loaded.model, theirs.config, expected) < TOLERANCE, key
        else:
            assert off(loaded.model, theirs.config, expected) > 100 * TOLERANCE, key
    assert not refused & {"hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"}
    assert refused >= {"architectures", "is_decoder", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"}


@pytest.mark.concept("T03.02", part="io/hf/bert.py")
def test_export_is_what_transformers_writes(case, tmp_path):
    """Files equal byte for byte; transformers loads ours, gives the same and writes the same again."""
    theirs, path = case
    loaded = directory.read(path)
    directory.write(tmp_path / "ours", loaded.model, family=loaded.family, rest=loaded.rest)
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    back, report = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs_of(back), theirs_of(theirs))
    ours, wanted = (json.loads((where / "config.json").read_text()) for where in (tmp_path / "ours", path))
    assert ours == wanted
    again = directory.read(tmp_path / "ours")
    assert again.spec == loaded.spec and again.rest == loaded.rest


def test_a_table_of_its_own_for_the_masked_head(tmp_path):
    """transformers stores a bias twice then, and reads one of the two."""
    theirs = tiny("BertForMaskedLM", {**ONE, "tie_word_embeddings": False})
    model = directory.read(hf.save(theirs, tmp_path)).model
    assert not model.spec.head.tied and off(model, theirs.config, theirs_of(theirs)) < TOLERANCE


def test_files_with_more_or_less_around_the_encoder(tmp_path):
    """A bare encoder's names with a prefix, without `architectures`, norms as they were called first, and with what old writers stored;
    pretraining's second head."""
    theirs = tiny("BertModel", ONE)
    expected = theirs_of(theirs)
    hf.save(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "position_embedding_type": "absolute", "gradient_checkpointing": False}))
    weights = {f"bert.{name}": lazy.load().clone() for name, lazy in read_weights(tmp_path).items()}
    early = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for now, then in early.items():
        weights = {name.replace(now, then): tensor for name, tensor in weights.items()}
    weights["bert.embeddings.position_ids"] = torch.arange(40)[None]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert off(directory.read(tmp_path).model, theirs.config, expected) < TOLERANCE

    both = transformers.BertForPreTraining(transformers.BertConfig(**ONE)).eval()
    hf.redraw(both, seed=1)
    hf.save(both, tmp_path / "both")
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    (tmp_path / "both" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    tokens, types, there = batch(both.config)
    with torch.no_grad():
        expected = both(input_ids=tokens, token_type_ids=types, attention_mask=there.long()).prediction_logits[there]
    assert off(directory.read(tmp_path / "both").model, both.config, expected) < TOLERANCE


def test_another_number_of_labels_gets_names_of_its_own(tmp_path):
    theirs = tiny(*TABLE["bert-classes"])
    loaded = directory.read(hf.save(theirs, tmp_path))
    family = families.get("bert")
    wider = loaded.spec.replace(head=Classifier(labels=4, inner=True, dropout=0.125))
    config = family.to_hf(wider, loaded.rest)
    assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(4)} and config["label2id"]["LABEL_3"] == 3
    assert family.to_hf(loaded.spec, loaded.rest)["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"architectures": ["BertLMHeadModel"]}, "architectures 'BertLMHeadModel' is not supported"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_configs_that_cannot_be_read_say_why(change, message):
    with pytest.raises(ConfigError, match=message):
        families.get("bert").to_spec({**transformers.BertConfig(**ONE).to_diff_dict(), **change})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"causal": True}, "causal"),
        ({"head": {"kind": "lm"}}, "no class for a head of kind 'lm'"),
        ({"head": {"kind": "project", "pool": "mean"}}, "pool"),
        ({"embed": {"kind": "tokens"}}, "learned positions"),
        ({"final_norm": {"kind": "rms"}}, "final_norm"),
    ],
)
def test_what_the_family_cannot_say_is_refused(change, reason):
    family = families.get("bert")
    spec, rest = family.to_spec(transformers.BertConfig(**ONE).to_diff_dict())
    with pytest.raises(ConfigError, match=reason):
        family.to_hf(spec.replace(**change), rest)
