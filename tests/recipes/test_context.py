"""A loaded model's context, made longer by one word everywhere; what goes beyond it is refused; what is saved says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.recipes.toys import Trivium, write_rows
from tests.tiny import tiny
from trivium.core.errors import ConfigError, DataError, TriviumError
from trivium.infer.generate import generate
from trivium.infer.sampling import Sampling
from trivium.models import presets
from trivium.models.block import Block
from trivium.models.context import Extension
from trivium.models.transformer import Transformer
from trivium.nn.attention import Attention
from trivium.nn.embeddings import Tokens
from trivium.nn.positions_absolute import Learned
from trivium.recipes.load import load
from trivium.recipes.sft import SFT, sft
from trivium.train.loop import TrainConfig

LONG = torch.randint(0, 448, (1, 300), generator=torch.Generator().manual_seed(0))  # the toy's context is 256


def test_beyond_the_context_is_refused_and_extended_it_is_not(toy):
    plain, longer = load(toy), load(toy, extend="yarn:2")
    greedy = Sampling(temperature=0, max_tokens=4)
    with pytest.raises(DataError, match=r"prompts\[0\] has 300 tokens.*extend=KIND:FACTOR"):
        generate(plain.model, LONG.tolist(), greedy)
    with pytest.raises(ConfigError, match="context: is 300 tokens, beyond the 256"):
        generate(plain.model, LONG[:, :9].tolist(), greedy, context=300)
    assert len(generate(longer.model, LONG.tolist(), greedy)[0].ids) == 4
    assert longer.spec.context == 512 and plain.spec.context == 256
    assert longer.lineage[-1] == {"step": "extend", "how": "yarn:2", "before": 256, "after": 512}
    mine, theirs = dict(longer.model.named_parameters()), dict(plain.model.named_parameters())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.concept("T13.02", "T13.03", "T13.04", part="models/context.py")
@pytest.mark.parametrize("how", ["linear:2", "dynamic:2", "yarn:2", "ntk:2", "none:2"])
def test_what_is_saved_is_what_was_run(toy, tmp_path, how):
    """The same logits after a round trip, and from transformers, which reads the scaling in config.json."""
    longer = load(toy, extend=how)
    expected = longer.model(LONG).logits
    again = load(longer.save(tmp_path / "longer"))
    assert again.spec == longer.spec and again.lineage == longer.lineage
    assert torch.equal(again.model(LONG).logits, expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "longer", attn_implementation="eager")
    found = theirs(input_ids=LONG, attention_mask=torch.ones_like(LONG)).logits
    torch.testing.assert_close(expected, found, rtol=0, atol=3e-5 * found.std().item())
    positions = json.loads((tmp_path / "longer" / "config.json").read_text())["max_position_embeddings"]
    assert positions == (256 if how == "dynamic:2" else 512) and again.spec.context == 512
    changed = (load(toy).model(LONG[:, :200]).logits - longer.model(LONG[:, :200]).logits).abs().max()
    assert (changed > 1e-3) == (how not in ("none:2", "dynamic:2"))


def test_training_rows_beyond_the_context_are_refused(toy, tmp_path):
    rows = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "hello " * 50}, {"role": "assistant", "content": "good bye " * 10}]
    rows.write_text(json.dumps({"messages": talk}) + "\n")
    config = SFT(model=str(toy), data=(str(rows),), out=str(tmp_path / "run"), length=512, train=TrainConfig(rows=1, steps=1))
    with pytest.raises(ConfigError, match="the longest row has [0-9]+ tokens, beyond the 256"):
        sft(config)
    assert sft(config.replace(extend="linear:2")).metrics


def test_an_adapter_brings_the_extension_it_was_trained_with(toy, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", count=4)
    config = SFT(
        model=str(toy), data=(str(rows),), out=str(tmp_path / "run"), length=256, extend="yarn:2", train=TrainConfig(rows=1, steps=2)
    )
    run = sft(config)
    assert load(run.path).spec == load(toy, extend="yarn:2").spec
    assert load(toy, adapter=run.path, extend="yarn:2.0").spec.context == 512
    with pytest.raises(ConfigError, match="was trained with extend=yarn:2, not linear:2"):
        load(run.path, extend="linear:2")
    assert load(run.path, extend="linear:2", accept=True).extended == "linear:2"


def test_every_command_takes_it(trivium: Trivium, toy: Path, tmp_path: Path):
    long = "one two three " * 90
    assert "beyond" not in trivium.refused("generate", toy, long, "--max_tokens", "4")
    assert trivium.ok("generate", toy, long, "--max_tokens", "4", "--extend", "yarn:4").err.count("context extended from 256 to 1024") == 1
    assert trivium.ok("chat", toy, long, "--max_tokens", "4", "--extend", "ntk:4", "--json").out
    trivium.ok("convert", toy, "--out", tmp_path / "longer", "--extend", "yarn:4")
    trivium.ok("generate", tmp_path / "longer", long, "--max_tokens", "4")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": long}) + "\n")
    task = ("--task.kind", "perplexity", "--task.data", text, "--task.context", "512")
    out = tmp_path / "result.json"
    assert "beyond the 256" in trivium.refused("eval", "run", "--model", toy, *task, "--out", out)
    trivium.ok("eval", "run", "--model", toy, *task, "--extend", "yarn:4", "--out", out)
    assert "extended by yarn:4" in json.loads(out.read_text())["model"]
    assert "KIND:FACTOR" in trivium.refused("generate", toy, "x", "--extend", "yarn")


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, "yarn", "not KIND:FACTOR"),
        ({}, "yarn:1", "greater than 1"),
        ({}, "yarm:2", "yarn"),
        ({"context": None}, "yarn:2", "does not say what context"),
        ({"position": None}, "yarn:2", "no rotary positions"),
        ({"position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}}, "yarn:2", "stretched already, by 'linear'"),
    ],
)
def test_what_cannot_be_extended_says_why(change, how, message):
    spec = presets.llama(dim=24, layers=2, heads=3, kv_heads=3, hidden=32, vocab=61, context=64)
    if "position" in change:
        block = spec.blocks[spec.layers[0]]
        spec = spec.replace(blocks={spec.layers[0]: block.replace(mixer=block.mixer.replace(position=change["position"]))})
    spec = spec.replace(context=change.get("context", spec.context))
    with pytest.raises(ConfigError, match=message):
        Extension.parse(how).apply(spec)
    longer = Extension.parse("none:2").apply(spec.replace(context=64))
    assert longer.context == 128 and longer.blocks == spec.blocks


def test_learned_positions_end_with_their_table():
    block = Block(mixer=Attention(heads=3, kv_heads=3, head_dim=8))
    spec = Transformer(dim=24, vocab=61, layers=("a",), blocks={"a": block}, embed=Tokens(positions=Learned(size=16)), context=16)
    with pytest.raises(ConfigError, match="learned positions, 16 of them"):
        Extension.parse("none:2").apply(spec)
    with pytest.raises(TriviumError, match="learned 16 positions"):
        tiny(spec)(torch.zeros(1, 17, dtype=torch.int64))
