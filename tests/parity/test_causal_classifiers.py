"""Causal families with a classifier on the last token, as transformers' *ForSequenceClassification have it: there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.parity.harness import Exported
from trivium.core.errors import ConfigError
from trivium.io.hf import families
from trivium.models.transformer import TransformerModel, with_head
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


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 9, 4 and 7 tokens, padded on the right."""
    there = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0)).masked_fill(~there, 60), there


@torch.no_grad()
def theirs_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    tokens, there = batch()
    return model(input_ids=tokens, attention_mask=there.long()).logits


@torch.no_grad()
def ours_of(model: TransformerModel, config: Any) -> torch.Tensor:
    tokens, there = batch()
    return model(Inputs(tokens, segments=there.long() - 1)).logits


@pytest.mark.concept("X.62", part="io/hf/__init__.py")
class TestClassifiers(Exported):
    table = TABLE
    theirs = staticmethod(theirs_of)
    ours = staticmethod(ours_of)

    def test_logits(self, case):
        assert case.expected.std() > 0.5
        torch.testing.assert_close(ours_of(case.read().model, case.theirs.config), case.expected, rtol=0, atol=1e-5)

    def test_a_head_that_was_changed_changes_the_class(self, case):
        theirs, loaded = case.theirs, case.read()
        family = families.get(theirs.config.model_type)
        other = with_head(loaded.model, Classifier(labels=5, pool="last", bias=False), seed=0)
        config = family.to_hf(other.spec, loaded.rest)
        assert config["architectures"] == [type(theirs).__name__] and config["id2label"]["4"] == "LABEL_4" and len(config["label2id"]) == 5
        language = family.to_hf(with_head(other, LMHead(tied=True), seed=0).spec, loaded.rest)
        assert language["architectures"] == [family.architecture] and language["tie_word_embeddings"]
        with pytest.raises(ConfigError, match="reads the last token"):
            family.to_hf(with_head(other, Classifier(labels=5, pool="mean", bias=False), seed=0).spec, loaded.rest)
