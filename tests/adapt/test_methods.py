"""What holds for every adapter, whatever its method: it starts as it says, trains nothing of the base, sees documents, padding,
caches and rows apart, replays, is taken away and merged. Against PEFT itself: tests/io/test_peft_methods.py."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from tests.adapt import adapterhub, litgpt_adapter
from tests.parity import hf
from tests.tiny import apart, tiny, tokens
from trivium.adapt.adapter import Adapter, adapter_tensors, initialize_adapter, merge, remove_adapter, unmerge, updates
from trivium.adapt.adapter import kept as needed_to_undo
from trivium.adapt.bottleneck import Bottleneck
from trivium.adapt.dora import DoRA
from trivium.adapt.freeze import Freeze
from trivium.adapt.gated_prompt import LlamaAdapter
from trivium.adapt.ia3 import IA3
from trivium.adapt.lora import LoRA
from trivium.adapt.noise import Noise
from trivium.adapt.passes import Pass, apply_passes
from trivium.adapt.prefix import Prefix
from trivium.adapt.prompt import Prompt
from trivium.adapt.square import MoRA
from trivium.core.errors import ConfigError, TriviumError
from trivium.core.seed import generator
from trivium.core.spec import validate
from trivium.infer.generate import generate, generate_naive
from trivium.infer.sampling import Sampling
from trivium.io import directory
from trivium.models.block import Block
from trivium.models.checkpointing import Recompute
from trivium.models.presets import llama, presets
from trivium.models.transformer import Transformer, TransformerModel, build, with_head
from trivium.nn.activations import SiLU
from trivium.nn.attention import use_backend
from trivium.nn.feedforward import MLP
from trivium.nn.heads_task import Classifier
from trivium.nn.inputs import Inputs
from trivium.nn.inputs import Prefix as PrefixMask
from trivium.nn.mamba import Mamba

METHODS: dict[str, Adapter] = {
    **{kind: member.tiny() for kind, member in Adapter.registry.items()},
    "parallel": Bottleneck(size=5, after=("ffn",), reads="input", scale=4.0),
    "prompt without network": Prompt(length=4, ids=(5, 9)),
    "p-tuning v2": Prefix(length=4),
    "gates by head": LlamaAdapter(length=3, layers=2, gates="head"),
    "pissa": LoRA(rank=3, start="pissa", targets=("q", "ffn.out")),
    "olora": LoRA(rank=3, start="olora", targets=("q", "ffn.out")),
    "gaussian": LoRA(rank=3, alpha=2.0, start="gaussian"),
    "dora of a part": DoRA(rank=3, start="pissa", full=("head.out",)),
}
SILENT = set(METHODS) - {"prompt", "prompt without network", "prefix", "p-tuning v2"}  # those that start as the base
MERGES = {"lora", "dora", "ia3", "mora", "pissa", "olora", "gaussian", "dora of a part"}
X = tokens(3, 9, vocab=97)
every_method = pytest.mark.parametrize("name", METHODS)


def base() -> TransformerModel:
    return tiny(presets.get("tiny-llama")())


def adapted(step: Adapter, *, std: float = 0.1) -> TransformerModel:
    """With every trained parameter moved from its start."""
    model = step.apply(base())
    initialize_adapter(model, step.name, seed=0)
    with torch.no_grad():
        for key, parameter in adapter_tensors(model, step.name).items():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator(1, key)))
    return model.eval()


@pytest.mark.concept("T06.05", part="adapt/dora.py")
@pytest.mark.concept("T06.03", part="adapt/adapter.py")
@every_method
def test_the_start_and_what_is_trained(name):
    """Adapters start as the base, exactly, or say so; they alone have gradients, all of them."""
    model, plain = base(), base()(X).logits
    step = METHODS[name]
    step.apply(model)
    initialize_adapter(model, seed=0)
    assert torch.equal(model(X).logits, plain) == (name in SILENT)
    model = adapted(step)
    model(X).logits.square().sum().backward()
    mine = adapter_tensors(model)
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (key in mine and parameter.requires_grad), key
    again = adapted(step)
    assert all(torch.equal(a, b) for a, b in zip(mine.values(), adapter_tensors(again).values(), strict=True))


@pytest.mark.concept("T06.07", part="adapt/prefix.py")
@pytest.mark.concept("T06.08", part="adapt/prompt.py")
@every_method
def test_documents_padding_caches_rows_and_backends(name):
    model, plain = adapted(METHODS[name]), base()
    wanted = model(X).logits
    assert (wanted - plain(X).logits).abs().max() > 0.01
    cache = model.cache(3, 9)
    parts = [model(Inputs(part, cache=cache)).logits for part in X.split([4, 1, 4], 1)]
    assert apart(torch.cat(parts, 1), wanted) <= 1e-5
    segments = torch.tensor([[0] * 4 + [1] * 5, [-1, -1, *[0] * 7], [0, 0, -1, 1, 1, 1, -1, -1, -1]])
    packed = model(Inputs(X, segments=segments)).logits
    for row, part in ((0, slice(0, 4)), (0, slice(4, 9)), (1, slice(2, 9)), (2, slice(0, 2)), (2, slice(3, 6))):
        assert apart(packed[row, part], model(X[row : row + 1, part]).logits[0]) <= 1e-5
    assert packed.isfinite().all()
    assert apart(model(Inputs(X, segments=segments, positions=_positions(segments))).logits[segments >= 0], packed[segments >= 0]) <= 1e-5
    assert apart(model(Inputs(X, segments=segments), keep="last").logits, packed[torch.arange(3), torch.tensor([8, 8, 5])]) <= 1e-5
    mixed = model(Inputs(X, adapters=torch.tensor([0, -1, 0]))).logits
    assert apart(mixed[[0, 2]], wanted[[0, 2]]) <= 1e-5
    assert apart(mixed[1], plain(X).logits[1]) <= 1e-5
    assert apart(model(Inputs(X, mask=PrefixMask(torch.tensor([3, 3, 3])))).logits[:, 3:].isfinite().float(), torch.ones(3, 6, 97)) <= 0
    use_backend(model, "eager")
    assert apart(model(X).logits, wanted) <= 1e-5
    model.recompute = Recompute()
    model.train()(X).logits.square().sum().backward()
    found = {key: tensor.grad.clone() for key, tensor in adapter_tensors(model).items() if tensor.grad is not None}
    model.recompute = None
    model.zero_grad()
    model(X).logits.square().sum().backward()
    for key, tensor in adapter_tensors(model).items():
        if tensor.grad is not None:
            torch.testing.assert_close(found[key], tensor.grad, rtol=1e-4, atol=1e-4)


def _positions(segments: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(segments)
    for row, names in enumerate(segments.tolist()):
        for at in range(1, len(names)):
            out[row, at] = out[row, at - 1] + 1 if names[at] == names[at - 1] else 0
    return out


@pytest.mark.parametrize("name", ["prompt", "prefix", "llama_adapter", "bottleneck", "dora"])
def test_generation_with_a_cache_is_generation_without(name):
    model = adapted(METHODS[name])
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    sampling = Sampling(temperature=0, max_tokens=6)
    found = generate(model, rows, sampling)
    assert [list(done.ids) for done in found] == [list(ids) for ids in generate_naive(model, rows, sampling)]


@every_method
def test_passes_replay_and_are_taken_away(name):
    model, plain = adapted(METHODS[name]), base()
    replayed = [validate(Pass, json.loads(step.canonical())) for step in model.passes]
    twin = apply_passes(build(presets.get("tiny-llama")()), replayed)
    missing = twin.load_state_dict(model.state_dict(), assign=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(twin.eval()(X).logits, model(X).logits)
    remove_adapter(model)
    assert model.passes == () and {k for k, _ in model.named_parameters()} == {k for k, _ in plain.named_parameters()}
    assert torch.equal(model(X).logits, plain(X).logits)
    with pytest.raises(TriviumError, match="unknown adapter"):
        updates(model, "default")


@every_method
def test_merging_and_its_undoing(name):
    step = METHODS[name]
    model = adapted(step)
    before, kept = model(X).logits, {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    weights = {key.replace(".base.", "."): p.clone() for key, p in model.named_parameters() if key not in kept}
    known = needed_to_undo(model)
    if name not in MERGES:
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge(model, probe=X)
        assert torch.equal(model(X).logits, before)
        return
    report = merge(model, probe=X)
    assert apart(model(X).logits, before) <= 5e-5
    assert model.passes == () and report.relative < 1e-5 and report.tokens == X.numel()
    assert {key for key, _ in model.named_parameters()} == set(weights)
    assert bool(known) == ("dora" in name)
    if "dora" in name:
        twin = copy.deepcopy(model)
        with pytest.raises(TriviumError, match="cannot be taken out"):
            unmerge(twin, step, kept)
    if name == "dora of a part":  # which trains a map whole
        with pytest.raises(TriviumError, match="cannot be taken out"):
            unmerge(model, step, kept, known=known)
        return
    unmerge(model, step, kept, known=known)
    assert apart(model(X).logits, before) <= 5e-5
    for key, parameter in model.named_parameters():
        if key not in kept:
            assert apart(parameter, weights[key.replace(".base.", ".")]) <= 1e-6


def test_bf16_merges_round_once():
    model = DoRA(rank=3).apply(tiny(presets.get("tiny-llama")(), dtype=torch.bfloat16))
    initialize_adapter(model, seed=0)
    with torch.no_grad():
        for key, parameter in adapter_tensors(model).items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(1, key)).bfloat16())
    report = merge(model, probe=X)
    assert report.mean_kl < 0.05 and 0 < report.relative < 0.3


@pytest.mark.concept("T06.06", part="adapt/bottleneck.py")
@pytest.mark.parametrize("reads", ["output", "sum", "input", "stream"])
def test_bottlenecks_are_the_formula(reads):
    """Layer by layer: x + f(x) with f(x) + s up(relu(down(.))) of what f gave (arXiv:1902.00751), or read (arXiv:2110.04366)."""
    step = Bottleneck(size=5, reads=reads, scale=1.5)
    model = adapted(step)
    plain = base()
    inner = plain.begin(Inputs(X))
    x = plain.embed(X, inner)
    for index, layer in enumerate(plain.layers):
        for name in ("mixer", "ffn"):
            update = model.get_submodule(f"layers.{index}.{name}_adapters.adapters.default")
            read = layer.get_submodule(f"{name}_norm")(x)
            given = layer.mixer(read, inner, inner.handle(index)) if name == "mixer" else layer.ffn(read, inner)
            down, up = update.down, update.up
            hidden = F.relu(F.linear({"output": given, "sum": x + given, "input": read, "stream": x}[reads], down.weight, down.bias))
            x = x + given + 1.5 * F.linear(hidden, up.weight, up.bias)
    assert apart(model(X).logits, plain.finish(x, inner, "all").logits) <= 1e-5
    other = Bottleneck(name="other", size=3, after=("ffn",))
    other.apply(model)
    initialize_adapter(model, "other", seed=1)
    pair = model(Inputs(X, adapters=torch.tensor([0, 1, -1]))).logits  # tasks share one copy of the base
    assert apart(pair[0], model(Inputs(X, adapters=torch.tensor([0, 0, 0]))).logits[0]) <= 1e-5
    assert apart(pair[1:], base()(X).logits[1:]) <= 1e-5


@pytest.mark.concept("X.64", part="adapt/square.py")
def test_a_square_update_is_the_formula_and_has_as_many_parameters():
    model = adapted(MoRA(rank=4))
    plain = base()
    weights = plain.state_dict()
    for path, (host, update) in updates(model, "default").items():
        outputs, inputs = host.weight.shape
        size = len(update.matrix)
        assert abs(size**2 / (4 * (inputs + outputs)) - 1) < 0.15
        delta = torch.zeros(outputs, inputs)
        for channel in range(inputs):
            stretch, within = divmod(channel, size)
            turned = torch.zeros(size)
            half = size // 2
            angle = stretch * 10000.0 ** (-2 * (within % half) / size)
            first, second = within % half, within % half + half
            turned[first], turned[second] = (math.cos(angle), math.sin(angle)) if within < half else (-math.sin(angle), math.cos(angle))
            column = torch.zeros(-(-inputs // size) * size)
            column[stretch * size : (stretch + 1) * size] = update.matrix.detach() @ turned
            delta[:, channel] = column.repeat(-(-outputs // len(column)))[:outputs]
        assert torch.linalg.matrix_rank(delta) > 4  # above what LoRA could have
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
    plain.load_state_dict(weights)
    assert apart(model(X).logits, plain(X).logits) <= 1e-5


@pytest.mark.concept("T06.07", part="adapt/prefix.py")
@pytest.mark.concept("X.67", part="adapt/prefix.py")
@pytest.mark.concept("T06.08", part="adapt/prompt.py")
def test_counts_of_prefix_and_prompt():
    """A prefix of GPT-2 medium's shape has 2 L n d parameters: 0.1% of the model's at 7 tokens, and 2 L times those of a prompt."""
    counts = {}
    for kind in (Prefix, Prompt):
        model = build(llama(dim=1024, layers=24, heads=16, kv_heads=16, hidden=2731, vocab=50257))
        total = sum(p.numel() for p in model.parameters())
        kind(length=7).apply(model)
        counts[kind] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts[Prefix] == 2 * 24 * 7 * 1024 and counts[Prompt] == 7 * 1024
    assert 0.0007 < counts[Prefix] / total < 0.0013 and counts[Prefix] == 2 * 24 * counts[Prompt]


@pytest.mark.concept("X.67", part="adapt/prefix.py")
def test_deep_prompts_with_a_classification_head():
    """P-tuning v2: the head is trained beside the prefix, and reads the last token of each document."""
    model = with_head(base(), Classifier(labels=3), seed=0)
    Prefix(length=4).apply(model)
    initialize_adapter(model, seed=0)
    for parameter in model.head.parameters():
        parameter.requires_grad_(True)
    one, packed = model(X[:1]).logits, Inputs(X[:1].repeat(1, 2), segments=torch.tensor([[0] * 9 + [1] * 9]))
    assert one.shape == (1, 3)
    assert apart(model(packed).logits, one.expand(2, -1)) <= 1e-5
    model(X).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (*adapter_tensors(model).values(), model.head.out.weight))


@pytest.mark.parametrize(
    ("step", "trained"),
    [
        (Freeze(), ("head.",)),
        (Freeze(last=1, train=("final_norm", "head")), ("head.", "final_norm.", "layers.1.")),
        (Freeze(last=2, train=()), ("layers.",)),
    ],
)
def test_freezing_leaves_what_is_named(step, trained):
    model = step.apply(base())
    model(X).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == name.startswith(trained), name


def test_noise_is_uniform_of_each_documents_own_size():
    """arXiv:2310.05914, by hand; nothing in evaluation."""
    model, plain = Noise(alpha=5.0).apply(base()), base()
    assert torch.equal(model.eval()(X).logits, plain(X).logits)
    model.train()
    segments = torch.tensor([[0] * 4 + [1] * 5, [-1, -1, *[0] * 7], [0] * 9])
    lengths = torch.tensor([[4] * 4 + [5] * 5, [1, 1, *[7] * 7], [9] * 9])
    step = model.begin(Inputs(X, segments=segments))
    torch.manual_seed(0)
    noise = torch.stack([model.embed(X, step) - plain.embed(X, step) for _ in range(200)])
    bound = 5.0 / (lengths * 36).sqrt()[..., None]
    share = (noise / bound)[:, segments >= 0]
    assert share.abs().max() < 1.001 and share.abs().max() > 0.99
    assert abs(share.mean()) < 0.01 and abs(share.var() - 1 / 3) < 0.01
    even = model.embed(X, model.begin(Inputs(X))) - plain.embed(X, plain.begin(Inputs(X)))
    assert 0.98 < even.abs().max() / (5.0 / (9 * 36) ** 0.5) < 1.001


def _mamba() -> TransformerModel:
    block = Block(mixer=Mamba.tiny(), ffn=MLP(hidden=40))
    return build(Transformer(dim=24, vocab=61, layers=("a", "a"), blocks={"a": block}), device="cpu")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (DoRA(targets=("query",)), "'query' matches no linear map"),
        (DoRA(rank=37), "rank 37 is above the size"),
        (MoRA(rank=37), "rank 37 is above the size"),
        (LoRA(full=("lm_head",)), "full: target 'lm_head' matches no linear map"),
        (LoRA(targets=("q",), full=("q",)), "trained whole, and in targets as well"),
        (IA3(targets=("q",), inputs=("ffn.out",)), "'ffn.out' matches none"),
        (LlamaAdapter(layers=3), "3 layers are to be adapted, the model has 2"),
        (Prompt(ids=(97,)), "id 97 is not in the vocabulary of 97"),
        (Freeze(last=3), "the model has 2"),
        (Freeze(train=("classifier",)), "'classifier' is no module"),
    ],
)
def test_what_cannot_be_is_one_clear_error(step, message):
    model = base()
    with pytest.raises(ConfigError, match=message):
        step.apply(model)
    assert model.passes == ()


@pytest.mark.parametrize("step", [Prefix(), LlamaAdapter(layers=1)])
def test_layers_without_keys_of_their_own(step):
    with pytest.raises(ConfigError, match="no keys and values of its own"):
        step.apply(_mamba())


def test_what_a_config_cannot_say():
    with pytest.raises(ConfigError, match="nothing would be trained"):
        validate(Freeze, {"train": ()})
    with pytest.raises(ConfigError, match="share one A cannot start"):
        validate(LoRA, {"shared": ("mixer.inp",), "start": "pissa"})
    with pytest.raises(ConfigError, match="unknown adapter 'low_bit'"):
        validate(Adapter, {"kind": "low_bit"})


@pytest.mark.concept("T06.06", part="adapt/bottleneck.py")
@pytest.mark.parametrize("kind", adapterhub.KINDS)
def test_bottlenecks_equal_adapterhubs(kind, tmp_path):
    """Houlsby's, Pfeiffer's and the parallel form, with copied weights: the logits that AdapterHub computed (adapterhub.py)."""
    other = hf.tiny("gpt2", **adapterhub.KEYS)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(adapterhub.formula(name, tuple(parameter.shape)))
    model = directory.read(hf.save(other, tmp_path)).model
    steps = {
        "houlsby": Bottleneck(size=4, activation=SiLU()),
        "pfeiffer": Bottleneck(size=4, after=("ffn",), reads="sum"),
        "parallel": Bottleneck(size=4, after=("ffn",), reads="stream", scale=4.0),
    }
    x = torch.tensor(adapterhub.TOKENS)
    plain = model(x).logits
    steps[kind].apply(model)
    with torch.no_grad():
        for path, (_, update) in updates(model, "default").items():
            place = {"mixer_adapters": "attention_adapters", "ffn_adapters": "output_adapters"}[path.split(".")[2]]
            for mine, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
                for leaf, parameter in update.get_submodule(mine).named_parameters():
                    name = f"transformer.h.{path.split('.')[1]}.{place}.adapters.{kind}.{theirs}.{leaf}"
                    parameter.copy_(adapterhub.formula(name, tuple(parameter.shape)))
    wanted = torch.tensor(json.loads(adapterhub.FIXTURE.read_text())["logits"][kind])
    found = model(x).logits
    assert (plain - found).abs().max() > 0.1
    assert apart(found[0], wanted) <= 1e-5


@pytest.mark.concept("X.65", part="adapt/gated_prompt.py")
def test_gated_prompts_equal_litgpts():
    """Adapter v1, a gate for each head, with copied weights: the logits that litgpt computed (litgpt_adapter.py)."""
    lit, dim, heads = litgpt_adapter, litgpt_adapter.DIM, litgpt_adapter.HEADS
    spec = llama(dim=dim, layers=lit.LAYERS, heads=heads, kv_heads=1, hidden=lit.HIDDEN, vocab=lit.VOCAB, tied=False, eps=1e-6)
    model = build(spec, device="cpu")
    LlamaAdapter(length=lit.LENGTH, layers=lit.LAYERS - lit.START, gates="head").apply(model)
    size = dim // heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            within = f"transformer.h.{parts[1]}."
            match parts[2:-1]:
                case ["mixer", "inp", which]:
                    rows = adapterhub.formula(f"{within}attn.qkv.weight", (dim + 2 * size, dim)).split([dim, size, size])
                    found = rows["qkv".index(which)]
                case ["mixer", "prompts", *_]:
                    leaf, shape = ("gating_factor", (1, 1, heads, 1)) if parts[-1] == "gate" else ("adapter_wte.weight", (lit.LENGTH, dim))
                    found = adapterhub.formula(f"{within}attn.{leaf}", shape).reshape(parameter.shape)
                case ["mixer", "out"]:
                    found = adapterhub.formula(f"{within}attn.proj.weight", (dim, dim))
                case ["ffn", *_]:
                    theirs = {"gate": "fc_1", "up": "fc_2", "out": "proj"}[parts[-2]]
                    found = adapterhub.formula(f"{within}mlp.{theirs}.weight", tuple(parameter.shape))
                case ["mixer_norm" | "ffn_norm" as norm]:
                    found = 1 + adapterhub.formula(f"{within}norm_{1 if norm == 'mixer_norm' else 2}.weight", (dim,))
                case _:
                    theirs = {"embed.weight": "transformer.wte.weight", "final_norm.weight": "transformer.ln_f.weight"}.get(
                        name, "lm_head.weight"
                    )
                    found = adapterhub.formula(theirs, tuple(parameter.shape))
            parameter.copy_(found)
    x = torch.tensor(adapterhub.TOKENS)
    wanted = torch.tensor(json.loads(lit.FIXTURE.read_text())["logits"])
    assert apart(model(x).logits[0], wanted) <= 1e-5
    remove_adapter(model)
    assert (model(x).logits[0] - wanted).abs().max() > 0.05
