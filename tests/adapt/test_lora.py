"""LoRA as a pass: against the formula, several adapters on one base, merging and taking a merge back, what it refuses.

Against PEFT itself: tests/io."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import tiny, tokens
from trivium.adapt.adapter import remove_adapter
from trivium.adapt.lora import LoRA, adapter_tensors, adapters, initialize_adapter, merge, unmerge, updates
from trivium.adapt.passes import apply_passes, linears
from trivium.models.presets import llama, presets
from trivium.models.transformer import build
from trivium.nn.adapted import AdaptedLinear, adapted_linear
from trivium.nn.attention import use_backend
from trivium.nn.inputs import Inputs

VOCAB = 97


def adapted(*passes: LoRA, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A tiny model with adapters whose B is drawn too, so that they do something."""
    model = apply_passes(tiny(presets.get("tiny-llama")(), dtype=dtype), passes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for step in passes:
            initialize_adapter(model, step.name, seed=seed)
            for _, update in updates(model, step.name).values():
                update.B.copy_(torch.randn(update.B.shape, generator=generator) * 0.1)
    return model


@pytest.mark.concept("T06.03", part="adapt/lora.py")
def test_the_fused_map_equals_the_formula_with_gradients():
    shapes = [(2, 3, 4), (5, 4), (5,), (2, 4), (5, 2)]
    x, weight, bias, A, B = (torch.randn(s, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, s in enumerate(shapes))
    trained = [t.requires_grad_() for t in (x, A, B)]
    fused = adapted_linear(x, weight, bias, A, B, 0.7)
    torch.testing.assert_close(fused, F.linear(x, weight, bias) + 0.7 * F.linear(F.linear(x, A), B))
    assert torch.autograd.gradcheck(lambda x, A, B: adapted_linear(x, weight, bias, A, B, 0.7), trained)


@pytest.mark.concept("T06.03", part="adapt/lora.py")
@pytest.mark.parametrize("rsqrt", [False, True])
def test_an_adapted_model_is_the_model_with_the_updates_added(rsqrt):
    spec = LoRA(rank=3, alpha=5.0, rsqrt=rsqrt, ranks={"mixer.inp.q": 2, "layers.1.mixer.inp.q": 4}, alphas={"ffn.out": 9.0})
    model, plain = adapted(spec), tiny(presets.get("tiny-llama")())
    weights, modules = plain.state_dict(), linears(model)
    for path, (_, update) in updates(model, "default").items():
        rank = update.A.shape[0]
        assert rank == (3 if "inp.q" not in path else 4 if path.startswith("layers.1") else 2)
        alpha = 9.0 if path.endswith("ffn.out") else 5.0
        weights[f"{path}.weight"] += alpha / (rank**0.5 if rsqrt else rank) * update.B.detach() @ update.A.detach()
    plain.load_state_dict(weights)
    x = tokens(2, 9, vocab=VOCAB)
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=0, atol=1e-5)
    assert len(modules) == 15 and not isinstance(modules["head.out"], AdaptedLinear)


@pytest.mark.concept("T06.03", part="adapt/lora.py")
def test_step_zero_is_the_base_and_only_adapters_get_gradients():
    model = tiny(presets.get("tiny-llama")())
    x = tokens(2, 9, vocab=VOCAB)
    before = model(x).logits
    LoRA(rank=4).apply(model)
    initialize_adapter(model, seed=0)
    assert torch.equal(model(x).logits, before)
    model(x).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora." in name), name
    again = tiny(presets.get("tiny-llama")())
    LoRA(rank=4).apply(again)
    initialize_adapter(again, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(adapter_tensors(model).values(), adapter_tensors(again).values(), strict=True))


@pytest.mark.concept("T06.03", part="adapt/lora.py")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged_and_merging_can_be_undone(dtype):
    spec = LoRA(rank=3)
    model, x = adapted(spec, dtype=dtype), tokens(2, 9, vocab=VOCAB)
    before, kept = model(x).logits.float(), {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    report = merge(model, probe=x)
    after = model(x).logits.float()
    assert report.maps == 14 and report.tokens == 18 and model.passes == ()
    assert report.max_logit_difference == (before - after).abs().max().item()
    assert report.relative < (1e-5 if dtype == torch.float32 else 0.2) and report.mean_kl < 0.05
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())
    unmerge(model, spec, kept)
    torch.testing.assert_close(model(x).logits.float(), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.3)
    if dtype == torch.float32:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, weights[name], rtol=0, atol=1e-6)


@pytest.mark.concept("T06.03", part="adapt/lora.py")
def test_each_row_of_a_batch_uses_its_own_adapter():
    one, two = LoRA(name="one", rank=2), LoRA(name="two", rank=3, targets=("q", "ffn.out"))
    both, x = adapted(one, two), tokens(4, 7, vocab=VOCAB)
    assert list(adapters(both)) == ["one", "two"]
    with pytest.raises(ValueError, match="several adapters"):
        both(x)
    mixed = both(Inputs(x, adapters=torch.tensor([1, -1, 0, 1]))).logits
    plain = tiny(presets.get("tiny-llama")())
    for row, name in enumerate(["two", None, "one", "two"]):
        alone = plain
        if name:
            alone = apply_passes(tiny(presets.get("tiny-llama")()), [adapters(both)[name]])
            alone.load_state_dict({key: value for key, value in both.state_dict().items() if key in alone.state_dict()}, strict=False)
            wanted = adapter_tensors(both, name)
            own = dict(alone.named_parameters())
            with torch.no_grad():
                for key, value in wanted.items():
                    own[key].copy_(value)
        torch.testing.assert_close(mixed[row], alone(x[row][None]).logits[0], rtol=0, atol=1e-5)


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model, x = adapted(LoRA(rank=3, dropout=0.5)), tokens(2, 9, vocab=VOCAB)
    reference = adapted(LoRA(rank=3))(x).logits
    assert torch.equal(model.eval()(x).logits, reference)
    model.train()
    torch.manual_seed(1)
    first = model(x).logits
    assert not torch.equal(first, reference)
    torch.manual_seed(1)
    assert torch.equal(model(x).logits, first)


@pytest.mark.concept("T06.03", part="adapt/lora.py")
def test_ten_thousand_times_fewer_parameters_is_the_arithmetic_of_gpt3():
    """GPT-3's shape at rank 4 on q and v: 18.9 M against 174.6 B; for SmolLM2-135M on all linear maps the factor is far smaller."""
    model = build(llama(dim=12288, layers=96, heads=96, kv_heads=96, hidden=8 * 12288 // 3, vocab=50257))
    total = sum(p.numel() for p in model.parameters())
    LoRA(rank=4, targets=("q", "v")).apply(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 96 * 2 * 4 * (12288 + 12288) == 18_874_368
    assert 9_000 < 174_600_000_000 / trained < 10_000 and 9_000 < total / trained < 10_000
    small = build(presets.get("smollm2-135m")())
    whole = sum(p.numel() for p in small.parameters())
    LoRA(rank=4, targets=("q", "v")).apply(small)
    assert sum(p.numel() for p in small.parameters() if p.requires_grad) == 230_400
    remove_adapter(small)
    LoRA(rank=16).apply(small)
    assert 25 < whole / sum(p.numel() for p in small.parameters() if p.requires_grad) < 30


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoRA(targets=("query",)), "'query' matches no linear map of the model .*mixer.inp.q"),
        (LoRA(rank=37), r"rank 37 is above the size of layers.0.mixer.inp.q \(48 x 36\)"),
        (LoRA(targets=("q",), ranks={"v": 2}), "ranks: 'v' matches none"),
    ],
)
def test_what_cannot_be_is_one_clear_error(spec, message):
    with pytest.raises(ValueError, match=message):
        spec.apply(tiny(presets.get("tiny-llama")()))


def test_the_same_name_twice_and_an_unknown_name():
    model = adapted(LoRA(rank=2))
    with pytest.raises(ValueError, match="called 'default' is there already"):
        LoRA(rank=2).apply(model)
    with pytest.raises(ValueError, match="unknown adapter 'defult'; did you mean 'default'"):
        merge(model, "defult", probe=tokens(1, 3, vocab=VOCAB))
    with pytest.raises(ValueError, match="unknown attention backend"):
        use_backend(model, "flush")
