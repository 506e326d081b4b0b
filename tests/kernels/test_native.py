"""Each native kernel against torch's formulation, values and gradients, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from trivium.kernels import functions, native
from trivium.nn.activations import silu_times
from trivium.nn.backends import eager_weights
from trivium.nn.norms import RMS
from trivium.nn.positions import rotate
from trivium.train.cross_entropy import cross_entropy_sum

pytestmark = pytest.mark.skipif(not native.available(), reason=native.state())
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
SHAPES = [(1, 1), (3, 7), (2, 5, 16), (4, 33), (5, 64), (2, 3, 67), (70, 576), (2, 4099)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def apart(got: Tensor, want: Tensor, *, terms: float = 0.0) -> float:
    """The largest difference in units. fp32: 1e-6 of the largest value (or of `terms`, the size of what was added up to cancel);
    bf16: the last place of each value, or 2^-12 of the largest."""
    assert got.dtype is want.dtype and got.shape == want.shape
    if not got.numel():
        return 0.0
    got, exact = got.double(), want.double()
    size = max(float(exact.abs().max()), terms)
    allowed = torch.full_like(exact, 1e-6 * size)
    if want.dtype is torch.bfloat16:
        allowed = torch.maximum(torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8), torch.full_like(exact, size * 2**-12))
    return float(((got - exact).abs() / allowed.clamp(min=1e-37)).max())


def gradients(function, *inputs: Tensor, seed: int = 9) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, draw(*out.shape, dtype=out.dtype, seed=seed))
    return (out.detach(), *grads)


def exact(function, *inputs: Tensor, seed: int = 9) -> tuple[Tensor, ...]:
    """Values and gradients of the torch formulation in float64, rounded to the inputs' dtype at the end."""
    leaves = [x.double().requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, draw(*out.shape, dtype=inputs[0].dtype, seed=seed).double())
    return tuple(x.detach().to(inputs[0].dtype) for x in (out, *grads))


# ------------------------------------------------------------------------------------------------ RMS norm


def norm(x: Tensor, weight: Tensor, *, offset: float, round_first: bool) -> Tensor:
    module = RMS(eps=1e-4, offset=offset, round_first=round_first).build(x.shape[-1])
    return torch.func.functional_call(module, {"weight": weight}, (x,))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, True), (0.0, False), (1.0, False)])
def test_rms_norm_is_the_formula(dtype, shape, offset, round_first):
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    got = gradients(lambda x, w: functions.rms_norm(x, w, eps=1e-4, offset=offset, round_first=round_first), x, weight)
    with native.switched_off():
        naive = norm(x, weight, offset=offset, round_first=round_first)
        rounding = (weight + offset).double() - (weight.double() + offset) if round_first else 0.0
        true = exact(lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * (w + offset + rounding), x, weight)
    assert apart(got[0], naive) <= 1
    assert apart(got[1], true[1], terms=4.0) <= 2
    assert apart(got[2], true[2], terms=math.sqrt(x.numel() / shape[-1])) <= 8


# ------------------------------------------------------------------------------------------------ silu times up


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8)])
def test_silu_times_is_the_formula(dtype, shape):
    gate, up = draw(*shape, dtype=dtype, scale=4.0), draw(*shape, dtype=dtype, seed=1)
    got = gradients(functions.silu_times, gate, up)
    with native.switched_off():
        naive = silu_times(gate, up)
        true = exact(lambda g, u: F.silu(g) * u, gate, up)
    assert apart(got[0], naive) <= 1
    for mine, theirs in zip(got[1:], true[1:], strict=True):
        assert apart(mine, theirs) <= 1


def test_silu_times_of_extremes():
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e4, -1e4, 88.0, -88.0, -104.0, 3e38, -3e38, 1e-40])
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(native.silu_times(gate, up), F.silu(gate) * up, equal_nan=True, rtol=1e-5, atol=1e-35)
    halves = native.silu_times(gate.bfloat16(), up.bfloat16())
    torch.testing.assert_close(halves, F.silu(gate.bfloat16()) * up.bfloat16(), equal_nan=True, rtol=1e-2, atol=1e-35)


# ------------------------------------------------------------------------------------------------ rotary


@DTYPES
@pytest.mark.parametrize(("batch", "heads", "time", "dim"), [(1, 1, 1, 2), (2, 3, 5, 6), (2, 9, 17, 64), (1, 2, 3, 34)])
@pytest.mark.parametrize("tables", ["shared", "own"])
@pytest.mark.parametrize("layout", ["heads first", "time first"])
def test_rotate_is_the_formula(dtype, batch, heads, time, dim, tables, layout):
    x = draw(batch, heads, time, dim, dtype=dtype)
    if layout == "time first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    angles = draw(batch if tables == "own" else 1, 1, time, dim // 2, dtype=torch.float32, seed=1, scale=3.0)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    got = gradients(lambda x: functions.rotate(x, cos, sin), x)
    with native.switched_off():
        want = gradients(lambda x: rotate(x, cos, sin), x)
    for mine, theirs in zip(got, want, strict=True):
        if dtype is torch.bfloat16:
            assert torch.equal(mine, theirs)
        else:
            assert apart(mine, theirs) <= 1


# ------------------------------------------------------------------------------------------------ causal attention


@DTYPES
@pytest.mark.parametrize("time", [1, 2, 7, 16, 17, 100])
def test_causal_softmax_is_the_formula(dtype, time):
    scores = draw(3, 2 * time, time, dtype=dtype, scale=3.0)
    hidden = torch.ones(time, time, dtype=torch.bool).triu(1).repeat(2, 1)
    grad = draw(3, 2 * time, time, dtype=dtype, seed=1)
    wide = scores.double().requires_grad_()
    want = torch.softmax((wide * 0.3).masked_fill(hidden, float("-inf")), -1)
    weights = native.causal_softmax_(scores.masked_fill(hidden, float("nan")), 0.3)  # what is hidden is not even read
    assert apart(weights, want.detach().to(dtype)) <= 1
    assert bool((weights[:, hidden] == 0).all())
    assert (
        apart(native.causal_softmax_backward_(weights, grad.clone(), 0.3), torch.autograd.grad(want, wide, grad.double())[0].to(dtype))
        <= 16
    )


def test_causal_softmax_of_extremes():
    """Scores so large that rounding them after scaling would leave some above their own maximum; infinities; NaN."""
    inf, nan = float("inf"), float("nan")
    scores = draw(64, 64, dtype=torch.float32, scale=1e15)
    scores[40, :3], scores[41, 2], scores[42, 5], scores[43, 40] = -inf, nan, inf, nan
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    want = torch.softmax((scores.double() * 0.3537).masked_fill(hidden, -inf), -1).float()
    torch.testing.assert_close(native.causal_softmax_(scores.clone(), 0.3537).tril(), want.tril(), equal_nan=True)


@DTYPES
@pytest.mark.parametrize("layout", ["heads first", "time first"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_causal_attention_is_the_formula(dtype, heads, kv_heads, layout):
    q, k, v = (draw(2, n, 19, 8, dtype=dtype, seed=n + 20 * i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    if layout == "time first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))

    def naive(q, k, v):
        weights = eager_weights(q, k, scale=0.3, causal=True, mask=None)
        return (weights.view(2, kv_heads, -1, 19) @ v).view(2, heads, 19, 8)

    got = gradients(lambda q, k, v: functions.causal_attention(q, k, v, scale=0.3), q, k, v)
    for mine, theirs in zip(got, exact(naive, q, k, v), strict=True):
        assert apart(mine, theirs) <= (16 if dtype is torch.bfloat16 else 2)


# ------------------------------------------------------------------------------------------------ cross-entropy


@DTYPES
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (4, 64), (5, 1003), (2, 49_152), (0, 12)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula(dtype, rows, vocab, smoothing):
    logits = draw(rows, vocab, dtype=dtype, scale=4.0)
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(3))
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
    grad = torch.empty_like(logits)
    losses = native.cross_entropy(logits, labels, label_smoothing=smoothing, grad=grad)
    assert apart(losses, want.detach().float()) <= 2
    assert apart(grad, torch.autograd.grad(want.sum(), wide)[0].to(dtype), terms=1.0 if vocab == 1 else 0.0) <= 2
    over = logits.clone()
    assert torch.equal(native.cross_entropy(over, labels, label_smoothing=smoothing, grad=over), losses) and torch.equal(over, grad)


def test_cross_entropy_of_extremes():
    inf = float("inf")
    logits = torch.tensor([[3e38, -3e38, 0.0], [-inf, 1.0, 2.0], [1.0, float("nan"), 2.0], [inf, 1.0, 2.0], [-300.0, -301.0, -302.0]])
    labels = torch.tensor([0, 1, 0, 1, 2])
    grad = torch.empty_like(logits)
    losses = native.cross_entropy(logits, labels, label_smoothing=0.0, grad=grad)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), equal_nan=True)
    want = torch.softmax(logits, -1) - F.one_hot(labels, 3)
    torch.testing.assert_close(grad, want, equal_nan=True)
    with pytest.raises(IndexError, match="vocabulary of 3"):
        native.cross_entropy(logits, torch.tensor([0, 1, 3, 0, 0]), label_smoothing=0.0, grad=None)


# ------------------------------------------------------------------------------------------------ independence


def everything(rows: int) -> list[Tensor]:
    """Every kernel on inputs whose first rows are the same whatever `rows` is; the results' rows."""
    x, weight = draw(90, 700, dtype=torch.bfloat16)[:rows], draw(700, dtype=torch.bfloat16, seed=1)
    grad = draw(90, 700, dtype=torch.bfloat16, seed=2)[:rows]
    y, scales = native.rms_norm(x, weight, eps=1e-5, offset=0.0, round_first=True)
    norm_x, _ = native.rms_norm_backward(x, weight, scales, grad, offset=0.0, round_first=True, weight_too=False)
    angles = draw(1, 1, 1, 350, dtype=torch.float32, seed=3)
    turned = native.rotate(x.view(rows, 1, 1, 700), angles.cos().bfloat16(), angles.sin().bfloat16())
    weights = native.causal_softmax_(x[:, None].expand(-1, 700, -1).contiguous(), 0.2)
    back = native.causal_softmax_backward_(weights, grad[:, None].expand(-1, 700, -1).contiguous(), 0.2)
    slope = torch.empty_like(x)
    losses = native.cross_entropy(x, torch.arange(rows), label_smoothing=0.1, grad=slope)
    return [y, norm_x, native.silu_times(x, grad), *native.silu_times_backward(x, grad, grad), turned, weights, back, losses, slope]


def test_a_row_does_not_depend_on_its_mates():
    for one, many in zip(everything(3), everything(9), strict=True):
        assert torch.equal(one, many[:3])


def test_threads_change_nothing():
    before = torch.get_num_threads()
    x, weight = draw(900, 700, dtype=torch.float32), draw(700, dtype=torch.float32, seed=1)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, scales = native.rms_norm(x, weight, eps=1e-5, offset=0.0, round_first=True)
            grads = native.rms_norm_backward(x, weight, scales, y, offset=0.0, round_first=True, weight_too=True)
            results.append([*everything(60), y, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------ who is let in


def test_takes_only_plain_cpu_tensors_of_one_kind():
    x = torch.ones(2, 2)
    assert native.takes(x) and native.takes(x.bfloat16(), torch.nn.Parameter(x.bfloat16()))
    assert not native.takes(x, x.bfloat16())
    assert not native.takes(x.double()) and not native.takes(x.half()) and not native.takes(x.to("meta"))
    with native.switched_off():
        assert not native.takes(x) and not native.available()
    assert native.available()


def test_ghosts_go_the_same_way():
    """What `plan` measures: tensors that hold nothing take the native path, and keep what real ones keep."""
    x, weight = draw(6, 8, dtype=torch.bfloat16), draw(8, dtype=torch.bfloat16)
    labels = torch.arange(6)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    x, weight = mode.from_tensor(x).requires_grad_(), mode.from_tensor(weight).requires_grad_()
    assert native.takes(x, weight)
    y = functions.rms_norm(x, weight, eps=1e-5, offset=0.0, round_first=True)
    kept = [held for held in y.grad_fn.saved_tensors if held is not x and held is not weight]
    assert [(held.shape, held.dtype) for held in kept] == [((6,), torch.float32)]
    y = functions.silu_times(y, y)
    turned = functions.rotate(y.view(1, 2, 3, 8), x[:3, :4].detach()[None, None], x[:3, 4:].detach()[None, None])
    out = functions.causal_attention(turned, turned, turned, scale=0.5).reshape(6, 8)
    cross_entropy_sum(out, labels).backward()
    assert isinstance(x.grad, FakeTensor) and x.grad.shape == (6, 8)


def test_a_second_derivative_is_an_error():
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(functions.silu_times(x, x).sum(), x, create_graph=True)
