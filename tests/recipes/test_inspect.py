"""What `inspect` says of sizes, against a cache that is really opened and products that are really counted; of loaded models
and of what has no weights: presets, configs, specs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trivium.core import config
from trivium.core.errors import ConfigError, TriviumError
from trivium.core.imports import import_file
from trivium.io import directory
from trivium.models import count
from trivium.models.presets import assemblies, llama, presets
from trivium.models.transformer import build, expand_layers, initialize
from trivium.nn.attention import use_backend
from trivium.nn.inputs import Inputs
from trivium.recipes.inspect import differences, facts, inspect
from trivium.recipes.load import load
from trivium.recipes.sheet import brief, sheet, shorthand, tables


def test_sizes_at_the_models_context(toy):
    bundle = load(toy)
    model, found = bundle.model, facts(bundle)
    use_backend(model, "eager")
    said, context = found["at"], bundle.spec.context
    assert said["context"] == context and said["cache_bytes"] == model.cache(rows=1, capacity=context).bytes
    assert said["weight_bytes"] == found["weight_bytes"] and sum(row["parameters"] for row in found["layers"]) == found["parameters"]
    x = torch.zeros(1, context, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, keep="last")
    assert abs(said["read_flops"] / counter.get_total_flops() - 1) < 0.01
    cache = model.cache(rows=1, capacity=context)
    with torch.no_grad():
        model(Inputs(x[:, :-1], cache=cache))
        with FlopCounterMode(display=False) as counter:
            model(Inputs(x[:, -1:], cache=cache), keep="last")
    assert abs(said["token_flops"] / counter.get_total_flops() - 1) < 0.01


@pytest.mark.concept("X.21", part="recipes/sheet.py")
@pytest.mark.parametrize("name", ["gemma3-mini", "mixtral-mini", "deepseek-v3-mini", "qwen3-next-mini", "mamba2-mini", "t5-mini"])
def test_costs_of_a_sheet_are_those_of_a_run(name):
    """At 40 tokens: the cache's bytes, and the products of the last token, counted as they happen."""
    spec = (presets if name in presets else assemblies).get(name)()
    model = initialize(build(spec, device="cpu"), seed=0).eval()
    for stack in ("encoder", "decoder"):
        use_backend(model.get_submodule(stack) if name == "t5-mini" else model, "eager")
    found = sheet(build(spec), context=40)["stacks"]
    said = found["decoder" if "decoder" in found else "transformer"]["at"]
    x = torch.arange(40)[None] % 97
    source = Inputs(x) if name == "t5-mini" else None
    cache = model.cache(rows=1, capacity=40)
    with torch.no_grad():
        model(Inputs(x[:, :-1], cache=cache, source=source))
        with FlopCounterMode(display=False) as counter:
            model(Inputs(x[:, -1:], cache=cache), keep="last")
    assert said["cache_bytes"] == cache.bytes
    assert abs(said["token_flops"] / counter.get_total_flops() - 1) < 0.02


def test_a_sheet_counts_what_a_token_passes_through():
    found = sheet(build(presets.get("mixtral-mini")()))
    (block,) = found["stacks"]["transformer"]["blocks"]
    expert = 3 * 256 * 256
    assert block["parameters"] - block["active"] == 6 * expert and found["parameters"] - found["active"] == 4 * 6 * expert
    assert block["layers"] == 4 and block["ffn"] == {"kind": "moe", "experts": 8, "top_k": 2, "expert": {"kind": "mlp", "hidden": 256}}


def test_a_sheet_says_what_stands_where():
    found = sheet(build(presets.get("gemma3-mini")()), context=600)
    stack = found["stacks"]["transformer"]
    assert stack["order"] == "5*local full" and stack["tied"] and stack["positions"] == ["rope", "rope(base=1e+06)"]
    assert stack["patterns"] == ["window(size=256)", "full"] and stack["activations"] == ["gelu(approximate=tanh)"]
    assert stack["cache_bytes_per_token"] == 2 * 4 * 32 * 4  # one layer keeps all
    assert stack["state_bytes_per_row"] == 5 * 256 * 2 * 4 * 32 * 4  # five keep a window
    lines = {row["what"]: row["value"] for _, rows in tables(found) for row in rows}
    assert "head_dim=32" in lines["mixer"] and lines["head"] == "lm, tied to the embedding" and "at 600 tokens" in lines


def test_of_what_has_no_weights(toy, tmp_path: Path):
    """A preset, a bare config.json, a directory without weights, a spec, a run's config: the same facts by all doors."""
    loaded = inspect(toy)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(toy / "config.json", bare)
    spec = loaded["spec"]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "run.yaml").write_text(config.dump({"preset": None, "model": spec}))
    shutil.copy(toy / "trivium.json", tmp_path / "record.json")
    for x in (bare, bare / "config.json", tmp_path / "spec.json", tmp_path / "run.yaml", tmp_path / "record.json"):
        found = inspect(x)
        assert differences(found, {**loaded, "hashes": found["hashes"]}) == [], x
        assert found["sheet"] == loaded["sheet"] and "tokenizer" not in found
    assert inspect("llama-5m")["spec"] == presets.get("llama-5m")().to_dict(defaults=True)
    assert inspect("t5-mini")["spec"]["kind"] == "encoder_decoder"
    rows = {what: (a, b) for what, a, b in differences(inspect("llama-5m"), inspect("tiny-llama"))}
    assert rows["spec.dim"] == (256, 36) and rows["context"] == (1024, 128)


def test_a_stored_dtype_counts(tmp_path: Path):
    keys = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    sizes = []
    for dtype in ("float32", "bfloat16"):
        (tmp_path / "config.json").write_text(json.dumps({**keys, "dtype": dtype}))
        found = inspect(tmp_path)
        sizes.append((found["weight_bytes"], found["cache_bytes_per_token"]))
        assert found["dtype"] == dtype
    assert sizes[0] == (2 * sizes[1][0], 2 * sizes[1][1])


def test_parameters_that_are_shared_count_once():
    for name in ("t5-mini", "flamingo-mini", "recurrent-memory-mini"):
        found = inspect(name)
        assert sum(row["parameters"] for row in found["layers"]) == found["parameters"], name
    once = llama(dim=32, layers=4, heads=4, kv_heads=2, hidden=48, vocab=97, tied=True)
    looped = build(once.replace(shared=("layer",)))
    assert sheet(looped)["parameters"] == count.parameters(build(once.replace(layers=("layer",)))).total
    assert sheet(looped)["stacks"]["transformer"]["shared"] == ["layer"]


def test_what_cannot_be_told(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "trivium"}')
    with pytest.raises(TriviumError, match="that file is missing"):
        inspect(tmp_path)
    (tmp_path / "spec.yaml").write_text("dim: 4\nvocab: 5\n")
    with pytest.raises(ConfigError, match="layers"):
        inspect(tmp_path / "spec.yaml")
    with pytest.raises(TriviumError, match="unknown model 'gemma3-minni'"):
        inspect("gemma3-minni")


@pytest.mark.parametrize("text", ["a", "3*a", "4*(5*local full) 2*local", "dense 58*moe", "2*(a b) c 2*(a b)", "12*(3*(x y) z)"])
def test_shorthand_is_what_was_written(text):
    assert expand_layers(shorthand(expand_layers(text))) == expand_layers(text)
    assert len(shorthand(expand_layers(text))) <= len(text)


def test_brief():
    assert brief(None) == "none" and brief(presets.get("tiny-llama")().final_norm) == "rms"
    assert brief({"kind": "moe", "experts": 8, "expert": {"kind": "mlp", "hidden": 4}}) == "moe(experts=8, expert=mlp(hidden=4))"
    assert brief({"kind": "x", "scale": 0.5, "many": list(range(9)), "few": ["q", "k"]}) == "x(scale=0.5, many=[9 values], few=[q, k])"


PART = """
from typing import Literal
from trivium.nn.activations import Activation, SiLU

class Hushed(Activation):
    kind: Literal["hushed"] = "hushed"
    @classmethod
    def tiny(cls):
        return cls()
    def build(self):
        return SiLU().build()
"""


def test_a_directory_says_where_parts_of_ones_own_came_from(tmp_path: Path):
    """And names what is missing; it is never imported because the file says so."""
    (tmp_path / "hushed_part.py").write_text(PART)
    import_file(tmp_path / "hushed_part.py")
    plain = llama(dim=32, layers=1, heads=4, kv_heads=2, hidden=48, vocab=97)
    ffn = plain.blocks["layer"].ffn.replace(activation="hushed")
    for name, spec in (("plain", plain), ("foreign", plain.replace(blocks={"layer": plain.blocks["layer"].replace(ffn=ffn)}))):
        directory.write(tmp_path / name, initialize(build(spec, device="cpu"), seed=0))
    assert "parts" not in json.loads((tmp_path / "plain" / "trivium.json").read_text())
    record = (tmp_path / "foreign" / "trivium.json").read_text()
    assert json.loads(record)["parts"] == {"hushed": "hushed_part"} and directory.read(tmp_path / "foreign").spec.blocks["layer"].ffn == ffn
    (tmp_path / "foreign" / "trivium.json").write_text(record.replace('"hushed"', '"gone"').replace('"hushed_part"', '"this"'))
    with pytest.raises(TriviumError, match="unknown activation 'gone'.*; its parts came from this: give that file with --import"):
        directory.read(tmp_path / "foreign")
    assert "this" not in sys.modules
