"""Causal families with a classifier on the last token, as transformers' *ForSequenceClassification have it: there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from trivium.core.errors import ConfigError
from trivium.io import directory
from trivium.io.hf import families
from trivium.models.transformer import with_head
from trivium.nn.heads import LMHead
from trivium.nn.heads_task import Classifier
from trivium.nn.inputs import Inputs

SHAPE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 60}
SMALL = {**SHAPE, "num_key_value_heads": 2, "head_dim": 6, "bos_token_id": 1, "eos_token_id": 2}
NAMES = {"id2label": {0: "ham", 1: "spam", 2: "news"}, "label2id": {"ham": 0, "spam": 1, "news": 2}}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2ForSequenceClassification", {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "pad_token_id": 60, **NAMES}),
    "gpt2-untied": ("GPT2ForSequenceClassification", {
        "vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "pad_token_id": 60, "tie_word_embeddings": False,
    }),
    "llama-reward": ("LlamaForSequenceClassification", {**SMALL, "num_labels": 1}),
    "qwen3-tied": ("Qwen3ForSequenceClassification", {**SMALL, "num_labels": 4, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.fixture(scope="module", params=TABLE)
def case(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """transformers' model and the directory it wrote."""
    name, keys = TABLE[request.param]
    model_class = getattr(transformers, name)
    model = model_class._from_config(model_class.config_class(**keys), attn_implementation="eager").eval()
    hf.redraw(model, seed=0)
    return model, hf.save(model, tmp_path_factory.mktemp(request.param))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 9, 4 and 7 tokens, padded on the right."""
    there = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0)).masked_fill(~there, 60), there


@torch.no_grad()
def theirs_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    tokens, there = batch()
    return model(input_ids=tokens, attention_mask=there.long()).logits


@pytest.mark.concept("X.62", part="io/hf/__init__.py")
def test_logits_and_export(case, tmp_path):
    """Files equal byte for byte; transformers loads ours and gives the same."""
    theirs, path = case
    loaded = directory.read(path)
    tokens, there = batch()
    with torch.no_grad():
        found = loaded.model(Inputs(tokens, segments=there.long() - 1)).logits
    expected = theirs_of(theirs)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    directory.write(tmp_path, loaded.model, family=loaded.family, rest=loaded.rest, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    ours, wanted = (json.loads((where / "config.json").read_text()) for where in (tmp_path, path))
    assert ours == wanted
    back, report = type(theirs).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs_of(back), expected)
    again = directory.read(tmp_path)
    assert again.spec == loaded.spec and again.rest == loaded.rest


def test_a_head_that_was_changed_changes_the_class(case):
    theirs, path = case
    loaded, family = directory.read(path), families.get(theirs.config.model_type)
    other = with_head(loaded.model, Classifier(labels=5, pool="last", bias=False), seed=0)
    config = family.to_hf(other.spec, loaded.rest)
    assert config["architectures"] == [type(theirs).__name__] and config["id2label"]["4"] == "LABEL_4" and len(config["label2id"]) == 5
    language = family.to_hf(with_head(other, LMHead(tied=True), seed=0).spec, loaded.rest)
    assert language["architectures"] == [family.architecture] and language["tie_word_embeddings"]
    with pytest.raises(ConfigError, match="reads the last token"):
        family.to_hf(with_head(other, Classifier(labels=5, pool="mean", bias=False), seed=0).spec, loaded.rest)
