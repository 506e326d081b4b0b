"""Every backend is eager within rounding: forward and gradients, over all pairs of options; and why `auto` takes which."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.nn.attention_cases import BLOCK, OPTIONS, Problem, draw, met, pairs_covered
from tests.tiny import segments_of, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.models.block import Block
from trivium.models.transformer import Transformer
from trivium.nn.attention import Attention, Scores, use_backend
from trivium.nn.backends import WHOLE, Added, Extras, backends, why
from trivium.nn.backends_tiled import Tiles, tiled
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.latent import LatentAttention
from trivium.nn.patterns import Window
from trivium.nn.positions import Rope
from trivium.nn.step import Step

CASES = pairs_covered(OPTIONS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
HERE = [name for name in backends.names() if name not in ("eager", "flash", "flex", "triton")]
# flash and triton need a GPU (triton's interpreter: tests/kernels); flex is below


def test_the_cases_cover_all_pairs():
    found = set().union(*map(met, CASES))
    names = list(OPTIONS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert all(((a, x), (b, y)) in found for x in OPTIONS[a] for y in OPTIONS[b])


def options(name: str) -> dict[str, tuple[int, int]]:
    return {"block": (BLOCK, BLOCK)} if name == "tiled" else {}


@pytest.mark.concept("T01.01", "T19.04", part="nn/backends.py")
@every_case
def test_forward_and_gradients_are_eagers(case):
    problem = Problem(**case)
    expected = problem.run(backends.get("eager"), torch.float32)
    for name in HERE:
        if name == "sdpa" and case["softcap"]:
            with pytest.raises(ConfigError, match="no softcap"):
                problem.run(backends.get(name), torch.float32)
            continue
        for what, found in problem.run(backends.get(name), torch.float32, **options(name)).items():
            torch.testing.assert_close(found, expected[what], rtol=0, atol=1e-5 if what == "out" else 1e-4)


@pytest.mark.concept("T19.04", part="nn/backends.py")
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: "-".join(map(str, case.values())))
def test_flex_is_eager_without_gradients(case):
    problem = Problem(**case)
    with torch.no_grad():
        expected = problem.run(backends.get("eager"), torch.float32, gradients=False)["out"]
        torch.testing.assert_close(problem.run(backends.get("flex"), torch.float32, gradients=False)["out"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="no gradients on a CPU") as error:
        problem.run(backends.get("flex"), torch.float32)
    assert error.value.field == "backend" and error.value.value == "flex"


@pytest.mark.concept("T19.04", part="nn/backends.py")
@every_case
def test_bfloat16_is_as_near_the_truth_as_torchs(case):
    """Against float64 from the same rounded inputs: at most twice SDPA's own error."""
    if case["softcap"]:
        case = {**case, "softcap": None}  # SDPA has none
    problem = Problem(**case)
    problem.leaves = {name: x.bfloat16().double() for name, x in problem.leaves.items()}
    problem.grad = problem.grad.bfloat16().double()
    truth = problem.run(backends.get("eager"), torch.float64)
    theirs, ours = (problem.run(backends.get(name), torch.bfloat16, **options(name)) for name in ("sdpa", "tiled"))
    for what, expected in truth.items():
        mine, its = ((x[what].double() - expected).norm() for x in (ours, theirs))
        assert mine <= 2 * its + 1e-6 * expected.norm(), what


@pytest.mark.concept("T01.01", part="nn/backends.py")
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (7, 2), (64, 64)], ids=str)
def test_any_tile_is_right_in_double(block):
    """gradcheck, of everything that has a gradient, and for blocks that divide nothing."""
    problem = Problem(seen="holes", count=4, heads=(4, 2), softcap=1.5, sinks=True, bias="learned", width=3)
    q, k, v, sinks, table = (problem.leaves[name].requires_grad_() for name in ("q", "k", "v", "sinks", "table"))

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, table: Tensor) -> Tensor:
        def bias(queries: Tensor, keys: Tensor) -> Tensor:
            return table[(queries[:, :, None] - keys[:, None, :]).clamp(-4, 4) + 4].permute(0, 3, 1, 2)

        extras = Extras(1.5, bias, (torch.arange(4)[None], torch.arange(8)[None]), sinks, (table,))
        return tiled(q, k, v, scale=0.4, causal=False, mask=problem.mask, extras=extras, block=block)

    problem.mask = problem.mask[1:]
    assert torch.autograd.gradcheck(run, (q[1:], k[1:], v[1:], sinks, table), fast_mode=True)


def test_a_bias_that_hides_its_tensors_is_refused():
    q, table = draw("q", 1, 2, 3, 4).float(), torch.zeros(1, 2, 3, 3, requires_grad=True)
    extras = Extras(bias=Added(table), places=(torch.arange(3)[None],) * 2)
    with pytest.raises(AssertionError, match="Extras.learned"):
        tiled(q, q, q, scale=1.0, causal=True, mask=None, extras=extras)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that any one tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("seen", ["causal", "window", "packed"])
def test_tiles_hold_no_square(seen):
    """Forward and backward, mask and bias included, hold nothing of T x T numbers, and work on few of the tiles."""
    count = 512
    segments = segments_of([[200, 300, -12]], count) if seen == "packed" else None
    step = Step.begin(Inputs(torch.zeros(1, count, dtype=torch.int64), segments=segments), causal=True)
    view = step.view(None if seen == "causal" else Window(size=20))
    q = draw("q", 1, 1, count, 4).float().requires_grad_()
    extras = Extras(bias=lambda i, j: -0.1 * (i[:, None, :, None] - j[:, None, None, :]), places=(step.positions, step.positions))
    expected = backends.get("eager")(q, q, q, scale=0.5, causal=False, mask=view, extras=extras)
    with Largest() as largest:
        out = tiled(q, q, q, scale=0.5, causal=seen == "causal", mask=None if seen == "causal" else view, extras=extras, block=(32, 64))
        out.sum().backward()
    assert largest.numbers <= count * 32
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    tiles = Tiles(0.5, False, view, None, None, None, (32, 64))
    worked = sum(tiles.sees(rows, cols, q.device) is not False for rows in tiles.walk(count, 0) for cols in tiles.walk(count, 1))
    assert worked <= {"causal": 72, "window": 23, "packed": 23}[seen] < 16 * 8


POSITION = {"kind": "rope", "base": 50.0}
VARIANTS = {
    "multi-head": Attention(heads=4, kv_heads=4, head_dim=8, position=POSITION),
    "grouped": Attention(heads=4, kv_heads=2, head_dim=8, position=POSITION),
    "multi-query": Attention(heads=4, kv_heads=1, head_dim=8, position=POSITION),
    "latent": LatentAttention(heads=3, kv_rank=10, q_rank=14, head_dim=6, rope_dim=4, v_dim=7, position=Rope(base=50.0)),
    "window": Attention(heads=4, kv_heads=2, head_dim=8, position=POSITION, pattern=Window(size=6)),
    "alibi": Attention(heads=4, kv_heads=2, head_dim=8, position={"kind": "alibi"}),
    "relative bias": Attention(heads=4, kv_heads=2, head_dim=8, position={"kind": "relative_bias"}),
    "softcap": Attention(heads=4, kv_heads=2, head_dim=8, position=POSITION, scores=Scores(softcap=2.0)),
    "sinks": Attention(heads=4, kv_heads=2, head_dim=8, position=POSITION, scores=Scores(sinks=True)),
}
LENGTHS = [[19], [5, 9, -5], [-3, 1, 15]]


def variant(name: str) -> torch.nn.Module:
    block = Block(mixer=VARIANTS[name], ffn=MLP(hidden=24))
    return tiny(Transformer(dim=24, vocab=61, layers=("a", "a"), blocks={"a": block}))


@pytest.mark.concept("T19.04", part="nn/backends.py")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_switch_changes_no_logit(name, packed):
    """MHA, GQA, MQA, MLA, window, ALiBi, softcap and sinks: every backend, at once and through a cache."""
    model, x = variant(name), tokens(3, 19)
    segments = segments_of(LENGTHS, 19) if packed else None
    real = torch.ones(3, 19, dtype=torch.bool) if segments is None else segments >= 0
    with torch.no_grad():
        use_backend(model, "eager")
        expected = model(Inputs(x, segments=segments)).logits[real]
        assert expected.std() > 0.3
        for backend in backends.names():
            if backend in ("flash", "triton") or (backend == "sdpa" and name == "softcap"):
                continue
            use_backend(model, backend)
            torch.testing.assert_close(model(Inputs(x, segments=segments)).logits[real], expected, rtol=0, atol=1e-5)
            if not packed:
                cache = model.cache(rows=3, capacity=19)
                pieces = [model(Inputs(piece, cache=cache)).logits for piece in x.split((9, 1, 9), dim=1)]
                torch.testing.assert_close(torch.cat(pieces, 1)[real], expected, rtol=0, atol=1e-5)


@pytest.mark.concept("T19.04", part="nn/backends.py")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_switch_changes_no_gradient(name):
    model, x, found = variant(name), tokens(3, 19), {}
    segments = segments_of(LENGTHS, 19)
    weight = draw("weight", 3, 19, 61).float() * (segments >= 0)[..., None]
    for backend in ("eager", *HERE):
        if backend == "sdpa" and name == "softcap":
            continue
        use_backend(model, backend)
        model.zero_grad()
        (model(Inputs(x, segments=segments)).logits * weight).sum().backward()
        found[backend] = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(found[backend], found["eager"], rtol=1e-4, atol=1e-4)


def test_why_names_a_backend_and_auto_is_it():
    def ask(count: int, slots: int, *, heads: int = 2, gradients: bool = False, device: str = "cpu", mask=None, **extras) -> str:
        q = torch.empty(1, heads, count, 4, device=device, requires_grad=gradients)
        choice = why(q, torch.empty(1, heads, slots, 4, device=device), mask=mask, extras=Extras(**extras))
        assert choice.name in backends.names() and len(choice.reason) > 10
        return choice.name

    assert ask(1, 100_000) == "native" and ask(200, 200) == "native"
    assert ask(300, 300) == "sdpa" and ask(300, 300, gradients=True) == "native"
    assert ask(200, 200, mask=torch.ones(200, 200, dtype=torch.bool)) == "sdpa"  # the native softmax is causal
    assert ask(1000, 1000, softcap=5.0) == "native" and ask(2000, 2000, softcap=5.0) == ask(20_000, 20_000, softcap=5.0) == "tiled"
    assert ask(2000, 2000, bias=lambda i, j: i) == "sdpa" and ask(20_000, 20_000, bias=lambda i, j: i) == "tiled"
    assert ask(300, 300, device="meta") == "sdpa" and ask(2, 2, softcap=5.0, device="meta") == "native"
    long = int(WHOLE**0.5) + 1
    step = Step.begin(Inputs(torch.zeros(1, long, dtype=torch.int64)), causal=True)
    assert ask(long, long, mask=step.view(Window(size=5))) == "tiled" and ask(long, long, mask=step.view()) == "sdpa"
    q, k, v = draw("q", 1, 2, 400, 4).float(), draw("k", 1, 2, 400, 4).float(), draw("v", 1, 2, 400, 4).float()
    for x in (q[:, :, :9], q):
        k_, v_ = k[:, :, : x.shape[2]], v[:, :, : x.shape[2]]
        given = {"scale": 0.5, "causal": True, "mask": None}
        assert torch.equal(backends.get("auto")(x, k_, v_, **given), backends.get(why(x, k_).name)(x, k_, v_, **given))


@pytest.mark.concept("T01.01", part="nn/backends.py")
@pytest.mark.parametrize("name", HERE)
def test_an_additive_mask(name):
    """Numbers added to scores, some of them -inf, whose gradients are wanted: torch's attn_mask."""
    q, k, v = draw("q", 2, 4, 5, 8).float(), draw("k", 2, 2, 7, 8).float(), draw("v", 2, 2, 7, 8).float()
    table, grad = draw("mask", 1, 4, 5, 7).float() * 2, draw("grad", 2, 4, 5, 8).float()
    table[..., 3:5] = torch.where(table[..., 3:5] > 1, -torch.inf, table[..., 3:5])
    found = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, table)]
        if ours:
            extras = Extras(bias=Added(leaves[3]), places=(torch.arange(5)[None], torch.arange(7)[None]), learned=(leaves[3],))
            out = backends.get(name)(*leaves[:3], scale=0.3, causal=False, mask=None, extras=extras)
        else:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                out = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3], scale=0.3, enable_gqa=True)
        out.backward(grad)
        found.append([out, *(x.grad for x in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if ours is found[0][0] else 5e-6)


@pytest.mark.concept("T01.01", part="nn/backends.py")
@pytest.mark.parametrize("name", ["grouped", "window", "alibi", "softcap", "sinks"])
def test_weights_on_request_give_the_output(name):
    """`model(..., weights=True)` changes no logit; rows of weights sum to one (less with a sink) and lie where they may."""
    model, x, segments = variant(name), tokens(3, 19), segments_of(LENGTHS, 19)
    plain, asked = model(Inputs(x, segments=segments)), model(Inputs(x, segments=segments), weights=True)
    real = segments >= 0
    torch.testing.assert_close(asked.logits[real], plain.logits[real], rtol=0, atol=1e-5)
    assert not plain.aux.weights and sorted(asked.aux.weights) == [0, 1]
    seen = (segments[:, :, None] == segments[:, None]) & torch.ones(19, 19, dtype=torch.bool).tril()
    for weights in asked.aux.weights.values():
        assert weights.shape == (3, 4, 19, 19) and weights.min() >= 0
        assert (weights * ~seen[:, None]).abs().max() == 0
        total = weights.sum(-1).transpose(1, 2)[real]
        assert (total < 1).all() if name == "sinks" else torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_flash_says_what_it_cannot_do():
    q = draw("q", 1, 2, 5, 4).float()
    with pytest.raises(ConfigError, match="needs a GPU") as error:
        backends.get("flash")(q, q, q, scale=1.0, causal=True, mask=None)
    assert error.value.field == "backend" and error.value.value == "flash"


@pytest.mark.concept("T01.03", part="nn/step.py")
@pytest.mark.parametrize("name", HERE)
def test_a_changed_suffix_changes_no_bit_before_it(name):
    """Causal, in tiles and at once: what comes before the change is the same to the last bit."""
    q, k, v = (draw(x, 2, 4, 40, 8).float() for x in "qkv")
    later = [x.clone() for x in (k, v)]
    for x in later:
        x[:, :, 21:] = 50 * x[:, :, 21:] + 3
    run = backends.get(name)
    a = run(q, k, v, scale=0.3, causal=True, mask=None, **options(name))
    b = run(q, *later, scale=0.3, causal=True, mask=None, **options(name))
    assert torch.equal(a[:, :, :21], b[:, :, :21]) and not torch.equal(a[:, :, 21:], b[:, :, 21:])
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(a, theirs, rtol=0, atol=1e-6)
