"""Every method that PEFT has a format for, both ways: what PEFT saved loads here, what is saved here loads in PEFT, and the logits
agree, on bases with maps of their own (Llama) and fused, transposed ones (GPT-2)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.io.test_peft import here, off, theirs
from tests.parity import hf
from trivium.adapt.adapter import Adapter, adapter_tensors, adapters, initialize_adapter, merge, updates
from trivium.adapt.bottleneck import Bottleneck
from trivium.adapt.dora import DoRA
from trivium.adapt.gated_prompt import LlamaAdapter
from trivium.adapt.ia3 import IA3
from trivium.adapt.lora import LoRA
from trivium.adapt.prefix import Prefix
from trivium.adapt.prompt import Prompt
from trivium.adapt.square import MoRA
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.core.seed import generator
from trivium.io import directory
from trivium.io import peft as ours
from trivium.models.transformer import TransformerModel
from trivium.nn.inputs import Inputs

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 40}
X = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {
        "llama": hf.save(hf.tiny("llama", **LLAMA), tmp_path_factory.mktemp("llama")),
        "gpt2": hf.save(hf.tiny("gpt2", **GPT2), tmp_path_factory.mktemp("gpt2")),
    }


def adapted(base: Path, config: peft.PeftConfig) -> peft.PeftModel:
    """PEFT's adapter on the base, every parameter of it drawn, the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(theirs(base), config).eval()
    redraw({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    return model


@torch.no_grad()
def redraw(parameters: dict[str, torch.Tensor]) -> None:
    """Moved from where they start, so that magnitudes and scales stay near what they are for."""
    for name, parameter in parameters.items():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(1, name)))


def logits(model: Any) -> torch.Tensor:
    """At the tokens that were given: PEFT gives those at virtual tokens too. In double precision, since in single what PEFT gives is
    itself up to 1e-5 from what it gives in double."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(X).logits[:, -X.shape[1] :]


CONFIGS: dict[str, tuple[str, type[peft.PeftConfig], dict[str, Any]]] = {
    "dora": ("llama", peft.LoraConfig, {"use_dora": True, "r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
    "dora of all": ("llama", peft.LoraConfig, {"use_dora": True, "r": 2, "target_modules": "all-linear", "rank_pattern": {"q_proj": 4}}),
    "dora, rslora": ("llama", peft.LoraConfig, {"use_dora": True, "use_rslora": True, "r": 3, "target_modules": ["v_proj"]}),
    "dora, fused": ("gpt2", peft.LoraConfig, {"use_dora": True, "r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"]}),
    "saved whole": ("llama", peft.LoraConfig, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "dora, saved whole": ("llama", peft.LoraConfig, {"use_dora": True, "r": 2, "target_modules": ["up_proj"], "modules_to_save": ["o_proj"]}),
    "prompt": ("llama", peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "prompt of gpt2": ("gpt2", peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "p-tuning": ("llama", peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 9}),
    "prefix": ("llama", peft.PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "prefix through a network": ("llama", peft.PrefixTuningConfig, {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7}),
    "prefix of gpt2": ("gpt2", peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "llama-adapter": ("llama", peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 2}),
    "ia3": ("llama", peft.IA3Config, {}),
    "ia3, fused": ("gpt2", peft.IA3Config, {}),
}  # fmt: skip


def both_ways(bases: dict[str, Path], tmp_path: Path, name: str) -> tuple[TransformerModel, torch.Tensor]:
    family, kind, config = CONFIGS[name]
    base = bases[family]
    other = adapted(base, kind(task_type="CAUSAL_LM", **config))
    expected = logits(other)
    assert off(logits(theirs(base)), expected) > 0.01  # the adapter shows
    other.save_pretrained(tmp_path / "theirs")
    model = here(base)
    step = ours.read(tmp_path / "theirs", model, family=family)
    assert off(logits(model), expected) < 1e-5
    ours.write(tmp_path / "ours", model, family=family, base=base)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    assert off(logits(back), expected) < 1e-5
    a, b = (load_file(tmp_path / folder / ours.WEIGHTS) for folder in ("theirs", "ours"))
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in b)
    again = here(base)
    assert ours.read(tmp_path / "ours", again, family=family, base=base) == step
    assert torch.equal(logits(again), logits(model))
    directory.write(tmp_path / "native", model)
    native = directory.read(tmp_path / "native").model
    assert native.passes == model.passes and torch.equal(logits(native), logits(model))
    return model, expected


@pytest.mark.concept("T06.05", part="adapt/dora.py")
@pytest.mark.concept("T06.05", part="nn/adapted_dora.py")
@pytest.mark.parametrize("name", [name for name in CONFIGS if "dora" in name])
def test_dora(bases, tmp_path, name):
    model, expected = both_ways(bases, tmp_path, name)
    assert merge(copy.deepcopy(model).double(), probe=X).relative < 1e-5
    merge(model, probe=X)
    assert model.passes == () and off(logits(model), expected) < 1e-5
    directory.write(tmp_path / "merged", model, family=CONFIGS[name][0])
    assert off(logits(theirs(tmp_path / "merged")), expected) < 1e-5


@pytest.mark.concept("T06.03", part="io/peft_lora.py")
def test_lora_with_a_module_saved_whole(bases, tmp_path):
    model, expected = both_ways(bases, tmp_path, "saved whole")
    assert adapters(model)["default"].full == ("head.out",)  # type: ignore[attr-defined]
    merge(model, probe=X)
    assert off(logits(model), expected) < 1e-5


@pytest.mark.concept("T06.08", part="adapt/prompt.py")
@pytest.mark.parametrize("name", ["prompt", "prompt of gpt2", "p-tuning"])
def test_prompt(bases, tmp_path, name):
    model, _ = both_ways(bases, tmp_path, name)
    assert sum(t.numel() for t in adapter_tensors(model).values()) == 24 * CONFIGS[name][2]["num_virtual_tokens"]


@pytest.mark.concept("X.67", part="adapt/prefix.py")
@pytest.mark.concept("T06.07", part="adapt/prefix.py")
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("prefix")])
def test_prefix(bases, tmp_path, name):
    model, _ = both_ways(bases, tmp_path, name)
    width = 24 if "gpt2" in name else 12
    assert sum(t.numel() for t in adapter_tensors(model).values()) == 2 * 3 * CONFIGS[name][2]["num_virtual_tokens"] * width


@pytest.mark.concept("X.65", part="adapt/gated_prompt.py")
def test_llama_adapter(bases, tmp_path):
    model, expected = both_ways(bases, tmp_path, "llama-adapter")
    assert off(logits(model), expected) < 1e-5
    assert sum(t.numel() for t in adapter_tensors(model).values()) == 2 * (4 * 24 + 1)  # in each of two layers, a prompt and a gate


@pytest.mark.parametrize("name", ["ia3", "ia3, fused"])
def test_ia3(bases, tmp_path, name):
    model, expected = both_ways(bases, tmp_path, name)
    merge(model, probe=X)
    assert off(logits(model), expected) < 2e-5


GRADIENTS = {"dora": "lora", "prompt": "prompt_embeddings", "prefix": "prompt_embeddings", "llama-adapter": "adaption"}


@pytest.mark.concept("T06.05", part="nn/adapted_dora.py")
@pytest.mark.concept("T06.07", part="nn/adapted_inputs.py")
@pytest.mark.concept("T06.08", part="nn/adapted_inputs.py")
@pytest.mark.concept("X.65", part="nn/adapted_attention.py")
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_pefts(bases, tmp_path, name):
    """The gradients, written as an adapter, are those of PEFT's parameters; the base has none."""
    family, kind, config = CONFIGS[name]
    other = adapted(bases[family], kind(task_type="CAUSAL_LM", **config))
    other.save_pretrained(tmp_path / "theirs")
    model = here(bases[family])
    ours.read(tmp_path / "theirs", model, family=family)
    for one in (model, other):
        one(X).logits[:, -X.shape[1] :].square().mean().backward()
    mine = adapter_tensors(model)
    assert all((parameter.grad is not None) == (key in mine) for key, parameter in model.named_parameters())
    with torch.no_grad():
        for parameter in mine.values():
            parameter.copy_(parameter.grad)
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    ours.write(tmp_path / "mine", model, family=family)
    other.save_pretrained(tmp_path / "others")
    a, b = (load_file(tmp_path / folder / ours.WEIGHTS) for folder in ("mine", "others"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.concept("T06.03", part="adapt/lora.py")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_base_are_plain_lora_of_twice_the_rank_on_disk(bases, tmp_path, start, family):
    """The base never changes; step 0 is the base; A and B start as PEFT's do; what was learned loads in PEFT on the base as it was."""
    base = bases[family]
    model = here(base)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    target = ["q_proj", "down_proj"] if family == "llama" else ["c_fc"]
    LoRA(rank=3, alpha=5.0, start=start, targets=("mixer.inp.q", "ffn.out") if family == "llama" else ("ffn.inp.up", "mixer.inp.q")).apply(
        model
    )
    initialize_adapter(model, seed=0)
    assert off(logits(model), logits(here(base))) == 0
    other = peft.get_peft_model(theirs(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=target, init_lora_weights=start))
    if (start, family) != ("olora", "gpt2"):  # PEFT decomposes the transposed matrix there
        pairs = [m for m in other.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        mine = [update for path, (_, update) in updates(model, "default").items() if family == "llama" or "ffn" in path]
        for theirs_, update in zip(pairs, mine, strict=True):
            torch.testing.assert_close(update.A, theirs_.lora_A["default"].weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(update.B, theirs_.lora_B["default"].weight, rtol=1e-4, atol=1e-5)
    redraw({name: parameter for name, parameter in adapter_tensors(model).items() if parameter.requires_grad})
    expected = logits(model)
    ours.write(tmp_path / "adapter", model, family=family, base=base)
    config = json.loads((tmp_path / "adapter" / ours.CONFIG).read_text())
    assert config["r"] == 6 and config["alpha_pattern"] == {} and config["lora_alpha"] == pytest.approx(10)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    assert off(logits(back), expected) < 2e-5  # the start is taken off in another order there
    after = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    directory.write(tmp_path / "native", model)
    assert torch.equal(logits(directory.read(tmp_path / "native").model), expected)
    merge(model, probe=X)
    assert off(logits(model), expected) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_saved_as_such_a_start_loads(bases, tmp_path, start):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    other = adapted(bases["llama"], config)
    other.save_pretrained(tmp_path)
    model = here(bases["llama"])
    ours.read(tmp_path, model, family="llama")
    assert off(logits(model), logits(other)) < 5e-5  # PEFT rounds the base when it takes the start out of it


NATIVE = {
    "bottleneck": Bottleneck(size=5),
    "parallel": Bottleneck(size=5, after=("ffn",), reads="input", scale=4.0),
    "mora": MoRA(rank=3),
    "gates by head": LlamaAdapter(layers=2, gates="head"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_peft_has_no_format_for_is_kept_by_our_names(bases, tmp_path, name):
    model = here(bases["llama"])
    step = NATIVE[name].replace(name="mine")
    step.apply(model)
    initialize_adapter(model, "mine", seed=0)
    redraw(adapter_tensors(model, "mine"))
    ours.write(tmp_path / "adapter", model, family="llama", name="mine", base=bases["llama"])
    again = here(bases["llama"])
    assert ours.read(tmp_path / "adapter", again, family="llama", base=bases["llama"]) == NATIVE[name]
    assert torch.equal(logits(again), logits(model)) and off(logits(model), logits(here(bases["llama"]))) > 0.01
    tensors = load_file(tmp_path / "adapter" / ours.WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), tmp_path / "adapter" / ours.WEIGHTS)
    with pytest.raises(FileError, match="missing"):
        ours.read(tmp_path / "adapter", here(bases["llama"]), family="llama")


def test_rows_of_a_batch_choose_among_methods(bases):
    """Methods of every kind on one base: each row is what its own adapter alone gives."""
    steps: dict[str, Adapter] = {
        "lora": LoRA(name="lora", rank=2), "dora": DoRA(name="dora", rank=3, targets=("q", "ffn.out")), "prompt": Prompt(name="prompt", length=3),
        "prefix": Prefix(name="prefix", length=5), "gated": LlamaAdapter(name="gated", length=4, layers=2),
        "bottleneck": Bottleneck(name="bottleneck", size=4), "ia3": IA3(name="ia3"), "mora": MoRA(name="mora", rank=2),
    }  # fmt: skip
    model = here(bases["llama"])
    x = X[:1].expand(len(steps) + 1, -1)
    for name, step in steps.items():
        step.apply(model)
        initialize_adapter(model, name, seed=0)
        redraw(adapter_tensors(model, name))
    with torch.no_grad():
        found = model(Inputs(x, adapters=torch.arange(len(x)) - 1)).logits
        assert off(found[0], here(bases["llama"])(x[:1]).logits[0]) < 1e-5
        for row, (name, step) in enumerate(steps.items(), 1):
            alone = here(bases["llama"])
            step.apply(alone)
            for key, tensor in adapter_tensors(alone, name).items():
                tensor.copy_(adapter_tensors(model, name)[key])
            assert off(found[row], alone(x[:1]).logits[0]) < 1e-5, name
            assert off(found[row], found[0]) > 0.01, name
    with pytest.raises(TriviumError, match="several adapters"):
        model(x)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dora", {"use_dora": False}, "there is more"),
        ("saved whole", {"use_dora": True}, "use_dora"),
        ("saved whole", {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ("saved whole", {"modules_to_save": None}, "replaces weights of the base"),
        ("prefix", {"num_virtual_tokens": 4}, "another base"),
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("llama-adapter", {"adapter_layers": 3}, "missing"),
        ("ia3", {"target_modules": ["k_proj"], "feedforward_modules": []}, "left over"),
    ],
)
def test_what_does_not_fit_says_why(bases, tmp_path, name, change, message):
    family, kind, config = CONFIGS[name]
    adapted(bases[family], kind(task_type="CAUSAL_LM", **config)).save_pretrained(tmp_path)
    path = tmp_path / ours.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = here(bases[family])
    with pytest.raises(TriviumError, match=message):
        ours.read(tmp_path, model, family=family)
    assert model.passes == ()


def test_learned_prompts_of_a_family_that_peft_computes_otherwise(bases, tmp_path):
    model = here(bases["gpt2"])
    LlamaAdapter(layers=2).apply(model)
    initialize_adapter(model, seed=0)
    with pytest.raises(ConfigError, match="fuses"):
        ours.write(tmp_path / "x", model, family="gpt2")
