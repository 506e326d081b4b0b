"""Mixture of experts: against transformers' routers and experts, the naive loop, and formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from tests.models.test_count import counter
from tests.nn.test_parts import apart_with_gradients, draw
from tests.tiny import FORMS, host, redraw, segments_of, tiny, tokens
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError
from trivium.core.spec import exemptions, validate
from trivium.models import count
from trivium.models.transformer import build, initialize
from trivium.nn.activations import ReLU, Swish
from trivium.nn.feedforward import FFN, MLP
from trivium.nn.inputs import Inputs
from trivium.nn.moe import MoE, MoELayer, grouped, naive
from trivium.nn.routing import Correction, Groups, load_entropy, within_capacity
from trivium.nn.step import Step

DIM, HIDDEN = 12, 20
EXPERT = MLP(hidden=HIDDEN)


def step_of(x: Tensor, *, segments: Tensor | None = None, adapters: Tensor | None = None) -> Step:
    return Step.begin(Inputs(embeds=x, segments=segments, adapters=adapters), causal=True)


def built(spec: MoE, *, seed: int = 0) -> MoELayer:
    """With a router that chooses rather than hesitates."""
    layer = redraw(spec.build(DIM), seed=seed)
    with torch.no_grad():
        layer.router.weight.mul_(4)
    return layer


@torch.no_grad()
def copied(ours: MoELayer, theirs: nn.Module) -> nn.Module:
    """`theirs` with our weights, whatever its parts are called."""
    state = theirs.state_dict()
    state[next(name for name in state if name in ("gate.weight", "router.weight", "router.classifier.weight"))].copy_(ours.router.weight)
    if ours.router.bias is not None:
        state["router.bias"].copy_(ours.router.bias)
    if ours.router.correction is not None:
        state["gate.e_score_correction_bias"].copy_(ours.router.correction.weight)
    for e, expert in enumerate(ours.experts):
        if "experts.gate_up_proj_bias" in state:  # gpt-oss: transposed, gate and up interleaved
            maps = (expert.inp.gate, expert.inp.up)
            state["experts.gate_up_proj"][e] = torch.stack([m.weight for m in maps], 1).flatten(0, 1).T
            state["experts.gate_up_proj_bias"][e] = torch.stack([m.bias for m in maps], 1).flatten()
            state["experts.down_proj"][e] = expert.out.weight.T
            state["experts.down_proj_bias"][e] = expert.out.bias
        elif "experts.gate_up_proj" in state:
            state["experts.gate_up_proj"][e] = torch.cat([expert.inp.gate.weight, expert.inp.up.weight])
            state["experts.down_proj"][e] = expert.out.weight
        else:
            state[f"experts.expert_{e}.wi.weight"].copy_(expert.inp.up.weight)
            state[f"experts.expert_{e}.wo.weight"].copy_(expert.out.weight)
    if ours.shared is not None:
        name = "shared_experts" if "shared_experts.gate_proj.weight" in state else "shared_expert"
        for key, module in {"gate_proj": ours.shared.inp.gate, "up_proj": ours.shared.inp.up, "down_proj": ours.shared.out}.items():
            state[f"{name}.{key}.weight"].copy_(module.weight)
    if ours.shared_gate is not None:
        state["shared_expert_gate.weight"].copy_(ours.shared_gate.weight)
    return theirs.eval()


MIXTRAL = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=6, num_experts_per_tok=3)
DEEPSEEK = {
    "hidden_size": DIM,
    "moe_intermediate_size": HIDDEN,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}
V3 = DeepseekV3Config(**DEEPSEEK, n_routed_experts=12, n_group=4, topk_group=2, norm_topk_prob=True)
V2 = DeepseekV2Config(**DEEPSEEK, n_routed_experts=12, n_group=4, topk_group=2, topk_method="group_limited_greedy", num_attention_heads=4)
QWEN = Qwen2MoeConfig(
    hidden_size=DIM,
    moe_intermediate_size=HIDDEN,
    num_experts=5,
    num_experts_per_tok=2,
    shared_expert_intermediate_size=16,
    norm_topk_prob=False,
)
OSS = GptOssConfig(
    hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=5, num_experts_per_tok=3, swiglu_limit=0.4, swiglu_alpha=1.3
)
SWITCH = SwitchTransformersConfig(d_model=DIM, d_ff=HIDDEN, num_experts=4, expert_capacity=2, dense_act_fn="relu", dropout_rate=0.0)
ORACLES = {
    "mixtral": (MoE(experts=6, top_k=3, expert=EXPERT), MixtralSparseMoeBlock, MIXTRAL),
    "deepseek-v3": (
        MoE(
            experts=12,
            top_k=3,
            expert=EXPERT,
            shared=MLP(hidden=2 * HIDDEN),
            score="sigmoid",
            scale=1.7,
            groups=Groups(count=4, chosen=2),
            correction=True,
        ),
        DeepseekV3MoE,
        V3,
    ),
    "deepseek-v2": (
        MoE(
            experts=12,
            top_k=3,
            expert=EXPERT,
            shared=MLP(hidden=2 * HIDDEN),
            normalize=False,
            scale=1.7,
            groups=Groups(count=4, chosen=2, rank="max"),
        ),
        DeepseekV2Moe,
        V2,
    ),
    "qwen2": (
        MoE(experts=5, top_k=2, expert=EXPERT, shared=MLP(hidden=16), shared_gate=True, normalize=False),
        Qwen2MoeSparseMoeBlock,
        QWEN,
    ),
    "gpt-oss": (
        MoE(
            experts=5,
            top_k=3,
            expert=MLP(hidden=HIDDEN, activation=Swish(beta=1.3, trained=False), bias=True, limit=0.4, shift=1.0),
            router_bias=True,
        ),
        GptOssMLP,
        OSS,
    ),
    "switch": (
        MoE(experts=4, top_k=1, expert=MLP(hidden=HIDDEN, activation=ReLU(), gated=False), normalize=False, capacity=2 * 4 / 9),
        SwitchTransformersSparseMLP,
        SWITCH,
    ),
}


@pytest.mark.concept("T03.04", part="nn/moe.py")
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dispatch", [grouped, naive])
def test_layers_equal_transformers(name, dispatch):
    """Values and gradients of the input and of the router. Switch drops what its experts have no room for: 2 of each row of 9."""
    spec, theirs_class, config = ORACLES[name]
    config._experts_implementation = "eager"
    ours = built(spec)
    ours.dispatch = dispatch
    theirs = copied(ours, theirs_class(config))
    x = draw(3, 9, DIM)

    def run(x: Tensor) -> Tensor:
        out = theirs(x)
        return out[0] if isinstance(out, tuple) else out

    assert apart_with_gradients(lambda x: ours(x, step_of(x)), run, x) <= 1e-5
    gradient = next(p.grad for n, p in theirs.named_parameters() if n in ("gate.weight", "router.weight", "router.classifier.weight"))
    torch.testing.assert_close(ours.router.weight.grad, gradient, rtol=0, atol=2e-5)
    assert gradient.abs().max() > 0.01
    chosen = ours.router(x.flatten(0, 1)).chosen
    assert len(chosen.unique()) > 3, "a router that always chooses the same proves little"


@pytest.mark.concept("T03.04", part="nn/moe.py")
@pytest.mark.parametrize("dispatch", [grouped, naive])
def test_all_experts_is_the_weighted_dense_sum(dispatch):
    layer, x = built(MoE(experts=5, top_k=5, expert=EXPERT)), draw(2, 7, DIM)
    layer.dispatch = dispatch
    step = step_of(x)
    weights = F.linear(x, layer.router.weight).softmax(-1)
    expected = torch.stack([expert(x, step) for expert in layer.experts], -1) @ weights[..., None]
    torch.testing.assert_close(layer(x, step), expected[..., 0], rtol=0, atol=1e-6)


def gradients(layer: MoELayer, x: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, step_of(x, segments=segments))
    if segments is not None:
        out = out[segments >= 0]
    (out * draw(*out.shape, seed=3)).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}}


@pytest.mark.concept("T03.04", part="nn/moe.py")
@pytest.mark.parametrize("segments", [None, segments_of([[5, 3], [-2, 4], [8]], 8)], ids=["whole", "packed"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss", "switch", "crowded"])
def test_grouped_dispatch_equals_the_naive_loop(name, segments):
    spec = MoE(experts=4, top_k=2, expert=EXPERT, capacity=0.6) if name == "crowded" else ORACLES[name][0]
    layer, x = built(spec), draw(3, 8, DIM)
    expected = gradients(layer, x, segments)
    layer.dispatch = naive
    for key, value in gradients(layer, x, segments).items():
        torch.testing.assert_close(expected[key], value, rtol=0, atol=2e-5, msg=key)


def test_an_expert_that_none_chose_has_a_gradient_of_zero():
    layer = built(MoE(experts=6, top_k=1, expert=EXPERT))
    found = gradients(layer, draw(1, 1, DIM), None)
    idle = [e for e in range(6) if not found[f"experts.{e}.out.weight"].any()]
    assert len(idle) == 5


@pytest.mark.concept("T03.04", part="nn/moe.py")
def test_a_token_of_no_expert_passes_through_the_shared_one_alone():
    layer, x = built(MoE(experts=4, top_k=1, expert=EXPERT, shared=MLP(hidden=8), capacity=1e-3)), draw(1, 6, DIM)
    chosen = layer.router(x[0]).chosen[:, 0]
    out, shared = layer(x, step_of(x)), layer.shared(x, step_of(x))
    first = torch.tensor([e not in chosen[:t] for t, e in enumerate(chosen.tolist())])
    assert torch.equal(out[0, ~first], shared[0, ~first]) and not first.all()
    assert (out[0, first] != shared[0, first]).any(-1).all()


@pytest.mark.concept("T03.04", part="nn/routing.py")
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_room_is_given_in_order(rows, length, top_k, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:top_k] for _ in range(rows * length)])
    real = torch.rand(rows * length, generator=generator) < 0.8
    expected = torch.zeros_like(chosen, dtype=torch.bool)
    for row in range(rows):
        taken = [0, 0, 0]
        for token in range(row * length, (row + 1) * length):
            for k in range(top_k):
                if real[token] and taken[chosen[token, k]] < capacity:
                    taken[chosen[token, k]] += 1
                    expected[token, k] = True
    assert torch.equal(within_capacity(chosen, real, rows=rows, experts=3, capacity=capacity), expected)


@pytest.mark.concept("T03.04", part="nn/routing.py")
@pytest.mark.parametrize("padded", [False, True])
def test_balance_and_z_losses(padded):
    """Balance against transformers' own, layer by layer (over several layers it multiplies means that are taken over all
    of them); z against its formula."""
    model, x = tiny(host(MoE(experts=6, top_k=2, expert=EXPERT))), tokens(3, 12)
    segments = segments_of([[5, 3], [-2, 4, 6], [12]], 12) if padded else None
    routings = []
    for layer in model.layers:
        layer.ffn.router.register_forward_hook(lambda _module, _args, routing: routings.append(routing))
    aux = model(Inputs(x, segments=segments)).aux
    mask = torch.ones(3, 12) if segments is None else (segments >= 0).float()
    for index, routing in enumerate(routings):
        theirs = load_balancing_loss_func((routing.logits,), 6, 2, mask)
        torch.testing.assert_close(aux.terms["balance", index] / mask.sum(), theirs, rtol=0, atol=1e-6)
        mine, expected = (
            torch.autograd.grad(v, routing.logits, retain_graph=True)[0] for v in (aux.terms["balance", index] / mask.sum(), theirs)
        )
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-7)
        z = (routing.logits.exp().sum(-1).log() ** 2 * mask.flatten()).sum()
        torch.testing.assert_close(aux.terms["router_z", index], z)
        load = torch.bincount(routing.chosen[mask.flatten() > 0].flatten(), minlength=6)
        assert torch.equal(aux.loads[index], load) and load.sum() == 2 * mask.sum()
    assert len(routings) == len(aux.loads) == 2
    even = MoE(experts=6, top_k=2, expert=EXPERT).build(DIM)
    nn.init.zeros_(even.router.weight)
    routing = even.router(draw(30, DIM))
    assert routing.balance(torch.full((6,), 10), None).item() == pytest.approx(30 * 2)


def test_decoding_keeps_no_terms():
    model = tiny(host(MoE.tiny()))
    aux = model(Inputs(tokens(1, 4), cache=model.cache(1, 8))).aux
    assert not aux.terms and set(aux.loads) == {0, 1}


@pytest.mark.concept("T03.04", part="nn/routing.py")
def test_the_correction_evens_the_load_without_a_gradient():
    """A router that sends most tokens to two experts; its scores do not change, its choices do."""
    layer = built(MoE(experts=8, top_k=2, expert=EXPERT, score="sigmoid", correction=True))
    router, x = layer.router, draw(400, DIM)
    with torch.no_grad():
        router.correction.weight.zero_()
        x = x + 1.5 * router.weight[0] + 1.5 * router.weight[1]
        before = router(x)
        for _ in range(400):
            router.correction.see(router(x).load(None))
            router.correction.move(0.005)
        after = router(x)
    assert load_entropy(before.load(None)) < 0.85 and load_entropy(after.load(None)) > 0.98
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(after.weights, F.normalize(after.scores.gather(1, after.chosen), p=1, dim=1))
    router(x).weights.sum().backward()
    assert router.correction.weight.grad is None
    idle = Correction(3)
    idle.reset()
    idle.see(torch.tensor([0, 1, 0]))
    idle.see(torch.tensor([0, 2, 6]))
    idle.move(0.5)
    assert idle.weight.tolist() == [0.5, 0.0, -0.5] and idle.load is None


def test_load_entropy():
    assert load_entropy(torch.tensor([5, 5, 5])) == pytest.approx(1)
    assert load_entropy(torch.tensor([0, 7, 0])) == 0
    assert load_entropy(torch.tensor([3, 3, 0, 0])) == pytest.approx(0.5)


@pytest.mark.concept("T03.04", part="models/count.py")
def test_what_one_token_costs_does_not_grow_with_the_experts():
    """Active parameters, and operations as torch counts them: all that grows is the router, by one row an expert."""
    spec = MoE(experts=4, top_k=2, expert=EXPERT, shared=MLP(hidden=8))
    specs = {experts: spec.replace(experts=experts) for experts in (4, 8, 32)}
    active, flops = {}, {}
    for experts, moe in specs.items():
        model = tiny(host(moe))
        routers = 2 * experts * 24
        found = count.parameters(model)
        dense = count.parameters(build(host(MoE(experts=1, top_k=1, expert=EXPERT, shared=MLP(hidden=8)))))
        assert found.active - routers == dense.active - 2 * 24 + 2 * 3 * 24 * HIDDEN
        assert found.total - found.active == 2 * (experts - 2) * 3 * 24 * HIDDEN
        with counter() as mode, torch.no_grad():
            model(tokens(2, 12))
        active[experts] = found.active - routers
        flops[experts] = mode.get_total_flops() - 2 * 24 * routers
        assert mode.get_total_flops() == count.flops(model, torch.zeros(2, 12, dtype=torch.int64), kept=24).forward
    assert len(set(active.values())) == len(set(flops.values())) == 1


def test_each_token_has_its_rows_adapter():
    """Adapters beside the experts' maps, several in one batch: tokens are sorted by expert, and keep their row's."""
    model = tiny(host(MoE.tiny()))
    for name in ("a", "b"):
        LoRA(name=name, rank=2).apply(model)
    assert sum(".experts." in name for name, _ in model.named_parameters() if ".lora.b.A" in name) == 2 * 4 * 3
    redraw(model, seed=1)
    x, rows = tokens(3, 7), torch.tensor([1, -1, 0])
    for dispatch in (grouped, naive):
        for layer in model.layers:
            layer.ffn.dispatch = dispatch
        together = model(Inputs(x, adapters=rows)).logits
        for row in range(3):
            alone = model(Inputs(x[row : row + 1], adapters=rows[row : row + 1])).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4)
        assert (together - model(Inputs(x, adapters=rows.flip(0))).logits).abs().max() > 0.1


def test_half_precision_routes_in_single():
    layer, x = built(MoE(experts=4, top_k=2, expert=EXPERT)).bfloat16(), draw(2, 5, DIM).bfloat16()
    routing = layer.router(x.flatten(0, 1))
    assert {routing.logits.dtype, routing.weights.dtype} == {torch.float32}
    out = layer(x, step_of(x))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer.float()(x.float(), step_of(x.float())), rtol=0.05, atol=0.05)


def test_an_exemption_is_in_the_table():
    crowded = FORMS["ffn-moe-capacity"]
    assert crowded.exempt.keys() == {"cache", "packing", "flops"} and not MoE.tiny().exempt
    assert exemptions(host(crowded))[0][:2] == ("blocks.a.ffn", "cache")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"top_k": 5}, "top_k (5) is more than there are experts (4)"),
        ({"shared_gate": True}, "needs a shared expert"),
        ({"groups": {"count": 3, "chosen": 1}}, "3 groups of like size"),
        ({"groups": {"count": 4, "chosen": 2}}, "two or more for rank top2"),
        ({"groups": {"count": 2, "chosen": 3}}, "chosen (3)"),
        ({"groups": {"count": 2, "chosen": 1}, "top_k": 3}, "top_k (3) is more than the experts of 1 groups (2)"),
        ({"capacity": 0}, "capacity"),
        ({"expert": {"kind": "mlp", "hidden": 3, "gated": False, "limit": 1.0}}, "limit and shift"),
    ],
)
def test_specs_that_make_no_sense(change, reason):
    with pytest.raises(ConfigError) as error:
        validate(FFN, {**MoE.tiny().to_dict(), **change})
    assert reason in str(error.value)


def test_experts_start_as_mlps_do():
    """GPT-2's start: `std`, and over sqrt(2 layers) what writes into the stream; the correction at zero; no two experts alike."""
    model = initialize(build(host(FORMS["ffn-moe-grouped"].replace(expert=MLP(hidden=200))), device="cpu"), seed=1, std=0.02)
    ffn = model.layers[1].ffn
    for module, std in ((ffn.router, 0.02), (ffn.experts[3].inp.gate, 0.02), (ffn.experts[3].out, 0.01), (ffn.shared.out, 0.01)):
        assert module.weight.std().item() == pytest.approx(std, rel=0.15)
    assert not torch.equal(ffn.experts[0].out.weight, ffn.experts[1].out.weight) and not ffn.router.correction.weight.any()
    assert not ffn.router.correction.weight.requires_grad
