"""Supervised fine-tuning against transformers: the loss, one step of its Trainer, and a task that is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from trivium.core.seed import generator
from trivium.data.batch import Batch
from trivium.models.presets import llama
from trivium.models.transformer import build, initialize
from trivium.nn.inputs import Inputs
from trivium.optim.optimizers import AdamW
from trivium.optim.schedules import Constant, Cosine
from trivium.train.loop import TrainConfig, fit
from trivium.train.objectives import NextToken

from .toys import VOCAB, model, weights

NAMES = {"inp.q": "q_proj", "inp.k": "k_proj", "inp.v": "v_proj", "out": "o_proj"}
FFN = {"inp.gate": "gate_proj", "inp.up": "up_proj", "out": "down_proj"}


def theirs_of(name: str) -> str:
    """The Hugging Face name of one of our parameters, written out here so that the test stands apart from `io`."""
    for ours, hf in NAMES.items():
        name = name.replace(f"mixer.{ours}.", f"self_attn.{hf}.")
    for ours, hf in FFN.items():
        name = name.replace(f"ffn.{ours}.", f"mlp.{hf}.")
    name = name.replace("mixer_norm", "input_layernorm").replace("ffn_norm", "post_attention_layernorm")
    name = name.replace("embed.weight", "embed_tokens.weight").replace("final_norm", "norm")
    return "lm_head.weight" if name == "head.out.weight" else f"model.{name}"


def pair() -> tuple[torch.nn.Module, transformers.LlamaForCausalLM]:
    ours = model()
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=24,
        rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    missing = theirs.load_state_dict({theirs_of(name): param for name, param in weights(ours).items()}, strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    return ours, theirs


def padded() -> Batch:
    """One document a row, prompts of different lengths, padding at the right."""
    draws = generator(0, "padded")
    lengths = torch.tensor([12, 7, 9, 4])
    at = torch.arange(12)
    tokens = torch.randint(1, VOCAB, (4, 12), generator=draws)
    inside = at < lengths[:, None]
    return Batch(tokens * inside, torch.where(inside, 0, -1), inside & (at >= torch.tensor([5, 1, 3, 2])[:, None]))


class Once:
    """The same batch, whatever its number."""

    fingerprint = "once"

    def __init__(self, batch: Batch):
        self.made = batch

    def batch(self, i: int) -> Batch:
        return self.made

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs))


def labels(batch: Batch) -> Tensor:
    return batch.tokens.masked_fill(~batch.targets, -100)


@pytest.mark.concept("T06.01", part="train/loop.py")
def test_loss_is_transformers():
    ours, theirs = pair()
    batch = padded()
    expected = theirs(input_ids=batch.tokens, attention_mask=(batch.segments >= 0).long(), labels=labels(batch)).loss
    found = NextToken().terms(ours, batch)["loss"] / batch.targets.sum()
    assert expected > 1 and abs(found - expected) < 1e-5


@pytest.mark.concept("T06.01", part="train/loop.py")
@pytest.mark.parametrize("micro", [None, 1])
def test_one_step_is_the_trainers(tmp_path, micro):
    """One AdamW step with decay and clipping; accumulated on both sides when `micro` is given."""
    ours, theirs = pair()
    before = weights(ours)
    batch = padded()
    rows = [
        {"input_ids": t, "attention_mask": (s >= 0).long(), "labels": y}
        for t, s, y in zip(batch.tokens, batch.segments, labels(batch), strict=True)
    ]
    setting = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=1, per_device_train_batch_size=micro or 4, gradient_accumulation_steps=4 // (micro or 4),
        learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=0.5, lr_scheduler_type="constant", use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(theirs, setting, train_dataset=rows, data_collator=transformers.default_data_collator).train()
    fit(
        ours,
        Once(batch),
        objective=NextToken(),
        optim=AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        schedule=Constant(),
        config=TrainConfig(steps=1, micro=micro, clip=0.5, precision="fp32"),
        directory=tmp_path / "ours",
    )
    expected = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        assert not torch.equal(param, before[name]), f"{name} did not move"
        assert (param - expected[theirs_of(name)]).abs().max() < 1e-6, name


class Recall:
    """ "a b c d, which?" -> that letter: four drawn tokens, a question (1 to 4), the answer. Held-out rows start with what training's never do."""

    fingerprint = "recall"

    def __init__(self, *, held_out: bool):
        self.held_out = held_out

    def batch(self, i: int) -> Batch:
        draws = generator(0, "recall", i, str(self.held_out))
        letters = torch.randint(5, 15, (64, 4), generator=draws)
        letters[:, 1] = (letters[:, 1] - 5) // 2 * 2 + 5 + (letters[:, 0] + self.held_out) % 2  # the parity of the second says which set
        asked = torch.randint(0, 4, (64, 1), generator=draws)
        tokens = torch.cat([letters, asked + 1, letters.gather(1, asked)], dim=1)
        targets = torch.zeros_like(tokens, dtype=torch.bool)
        targets[:, -1] = True
        return Batch(tokens, torch.zeros_like(tokens), targets)

    def steps(self, epochs: float) -> int:
        return round(epochs)


@pytest.mark.slow
@pytest.mark.concept("T06.01", part="train/loop.py")
def test_a_task_is_learned_from_chance(tmp_path):
    spec = llama(dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, hidden=64, vocab=VOCAB, context=16)
    trained = initialize(build(spec, device="cpu"), seed=0)

    def accuracy(of: torch.nn.Module) -> dict[str, float]:
        batch = Recall(held_out=True).batch(0)
        guess = of(Inputs(batch.tokens[:, :-1]), keep="last").logits.argmax(-1)
        return {"accuracy": (guess == batch.tokens[:, -1]).float().mean().item()}

    before = accuracy(trained)["accuracy"]
    done = fit(
        trained,
        Recall(held_out=False),
        objective=NextToken(),
        optim=AdamW(lr=1e-2),
        schedule=Cosine(warmup=0.1),
        config=TrainConfig(steps=200, precision="fp32"),
        directory=Path(tmp_path),
        validate=accuracy,
    )
    assert before < 0.3 and done.metrics["validation.accuracy"] > 0.95
