"""The MatMul-free model: its mixer against the recurrence, and what its inference runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.nn.test_linear_attention import apart, draw, grads
from tests.tiny import DIM, VOCAB, redraw, tiny, tokens
from trivium.adapt.low_bit import LowBit, pack_weights
from trivium.core.errors import ConfigError
from trivium.kernels import native
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.matmul_free import MLGRU, linear_scan, recurrent
from trivium.nn.step import Step
from trivium.nn.store import Handle

MAPS = ("f", "c", "g", "mixer.out", "gate", "up", "ffn.out", "head.out")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "_int_mm", "einsum", "convolution"}


def model() -> TransformerModel:
    """MLGRU and gated mlp, every map ternary, the head's too."""
    block = Block(mixer=MLGRU(hidden=20), ffn=MLP(hidden=40))
    return tiny(Transformer(dim=DIM, vocab=VOCAB, layers=("a", "a"), blocks={"a": block}, head=LMHead(tied=False)))


@pytest.mark.concept("X.28", part="nn/matmul_free.py")
@pytest.mark.parametrize("forget", ["some", "all", "nothing"])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 33])
def test_the_scan_equals_the_recurrence(length, forget):
    keep = torch.sigmoid(draw(2, length, 5, seed="keep") * 3 + {"some": 0, "all": -60, "nothing": 60}[forget])
    inputs = [keep.requires_grad_(), draw(2, length, 5).requires_grad_(), draw(2, 5, seed="start").requires_grad_()]
    for given in (inputs, [*inputs[:2], None]):
        of = [x for x in given if x is not None]
        y, expected = linear_scan(*given), recurrent(*given)
        assert apart(y, expected) <= 1e-5
        for mine, theirs in zip(grads(y, of), grads(expected, of), strict=True):
            assert apart(mine, theirs) <= 1e-5
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    assert torch.autograd.gradcheck(lambda a, b: linear_scan(a, b, None), exact, fast_mode=True)


@pytest.mark.concept("X.28", part="nn/matmul_free.py")
def test_the_mixer_against_the_paper():
    """f = sigmoid(x W_f + b_f), c = silu(x W_c), h = f h + (1 - f) c, out(sigmoid(x W_g) h)."""
    mixer, x = redraw(MLGRU(hidden=20, bias=("f", "out")).build(24)), draw(2, 17, 24)
    f, c, g = (x @ m.weight.T + (0 if m.bias is None else m.bias) for m in mixer.inp.children())
    h, outputs = torch.zeros(2, 20), []
    for t in range(17):
        forget = f[:, t].sigmoid()
        h = forget * h + (1 - forget) * c[:, t] * c[:, t].sigmoid()
        outputs.append(g[:, t].sigmoid() * h)
    expected = torch.stack(outputs, 1) @ mixer.out.weight.T + mixer.out.bias
    assert apart(mixer(x, Step.begin(Inputs(embeds=x), causal=True), Handle()), expected) <= 1e-5


@pytest.mark.concept("X.28", part="nn/matmul_free.py")
@pytest.mark.parametrize("packed", [False, True])
def test_decoding_equals_the_forward(packed):
    """Of the whole ternary model, parallel over time and token by token."""
    subject, x = LowBit(targets=MAPS).apply(model()), tokens(2, 14)
    with torch.inference_mode():
        expected = subject(x).logits
        subject = pack_weights(subject) if packed else subject
        cache = subject.cache(rows=2, capacity=14)
        steps = torch.cat([subject(Inputs(piece, cache=cache)).logits for piece in x.split(1, 1)], 1)
    assert apart(steps, expected) <= 1e-5


class Trace(TorchDispatchMode):
    """The names of all operators that run, those inside others too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def trace(subject: TransformerModel) -> set[str]:
    with torch.inference_mode(), Trace() as found:
        cache = subject.cache(rows=2, capacity=8)
        subject(Inputs(tokens(2, 6), cache=cache))
        subject(Inputs(tokens(2, 1), cache=cache))
    return found.names


@pytest.mark.concept("X.28", part="nn/matmul_free.py")
def test_inference_multiplies_no_matrices(monkeypatch):
    """From token ids to logits, prompt and decoding: no operator that multiplies two matrices runs, in any number format. What
    is left of the maps is choosing, adding, and one division for each output. Native kernels, which no trace sees, are off."""
    monkeypatch.setattr(native, "takes", lambda *tensors: False)
    trained = LowBit(targets=MAPS).apply(model())
    assert trace(trained) & PRODUCTS, "in training form they do, and the trace shows it"
    packed = trace(pack_weights(trained))
    assert not packed & PRODUCTS and {"where", "sum", "rsqrt"} <= packed


def test_a_prefix_is_refused():
    with pytest.raises(ConfigError, match="left to right"):
        model()(Inputs(tokens(2, 6), mask=Prefix(torch.tensor([2, 3]))))
