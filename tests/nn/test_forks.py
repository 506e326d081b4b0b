"""Documents that begin with tokens of another: what each computes is what it computes where they are repeated, gradients too."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB, tiny, tokens
from trivium.models.block import Block
from trivium.models.transformer import Transformer, TransformerModel
from trivium.nn.attention import Attention, Mixer, Scores, use_backend
from trivium.nn.feedforward import MLP
from trivium.nn.heads import LMHead
from trivium.nn.inputs import Inputs, Prefix
from trivium.nn.linear_attention import LinearAttention
from trivium.nn.patterns import Window
from trivium.nn.positions import Rope
from trivium.nn.positions_relative import Alibi

SHARED, FIRST, SECOND, OTHER = 5, 4, 6, 7  # tokens of the common beginning, of its two ends, of a document beside them
HALF = {"heads": 6, "kv_heads": 3, "head_dim": 8}
MIXERS = {
    "rope": Attention(**HALF, position=Rope()),
    "none": Attention(**HALF),
    "alibi": Attention(**HALF, position=Alibi()),
    "window": Attention(**HALF, position=Rope(), pattern=Window(size=4)),
    "softcap": Attention(**HALF, position=Rope(), scores=Scores(softcap=20.0, sinks=True)),
    "linear": LinearAttention(heads=3, head_dim=8),
}


def model(mixer: Mixer) -> TransformerModel:
    spec = Transformer(dim=24, vocab=VOCAB, layers=("a",) * 2, blocks={"a": Block(mixer=mixer, ffn=MLP(hidden=40))}, head=LMHead(tied=True))
    return tiny(spec)


def batches() -> tuple[Inputs, Inputs, torch.Tensor, torch.Tensor]:
    """One row of three documents (two of them alike at first, then one by itself) and a row with padding, repeated and forked; and
    where the forked row's tokens lie in the repeated one."""
    ids = tokens(2, 2 * SHARED + FIRST + SECOND + OTHER)
    ids[:, SHARED + FIRST : 2 * SHARED + FIRST] = ids[:, :SHARED]
    names = torch.tensor([0] * (SHARED + FIRST) + [1] * (SHARED + SECOND) + [2] * OTHER).expand(2, -1).clone()
    names[1, -OTHER:] = -1
    kept = torch.tensor([at for at in range(ids.shape[1]) if not SHARED + FIRST <= at < 2 * SHARED + FIRST])
    forks = torch.where(names == 1, SHARED, 0)[:, kept]
    whole = Inputs(ids, segments=names)
    return whole, Inputs(ids[:, kept], segments=names[:, kept], forks=forks), kept, names[:, kept] >= 0


@pytest.mark.parametrize("backend", ["auto", "eager", "native"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_shared_beginning_is_as_a_repeated_one(name, backend):
    made = model(MIXERS[name])
    use_backend(made, backend)
    whole, shared, kept, real = batches()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(*shared.shape, VOCAB, generator=generator) * real[..., None]
    found = []
    for inputs, places in ((whole, kept), (shared, slice(None))):
        logits = made(inputs).logits[:, places]
        found.append((logits[real], torch.autograd.grad((weights * logits).sum(), list(made.parameters()))))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    for ours, expected in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["rope", "window"])
def test_the_mask_says_so_too(name):
    """Weights are computed by the naive mask."""
    made = model(MIXERS[name])
    _, shared, _, real = batches()
    fast, naive = made(shared).logits, made(shared, weights=True)
    torch.testing.assert_close(fast[real], naive.logits[real], rtol=1e-4, atol=1e-4)
    seen = naive.aux.weights[0][0].amax(0) > 0
    second = slice(SHARED + FIRST, SHARED + FIRST + SECOND)
    assert not seen[second, SHARED : SHARED + FIRST].any() and not seen[SHARED + FIRST + SECOND :, : SHARED + FIRST + SECOND].any()
    assert bool(seen[second, 0].any()) == (name == "rope")


@pytest.mark.parametrize("forks", [[0, 0, 3, 3, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, -1, -1, 0, 0]])
def test_a_document_forks_from_the_whole_one_before_it(forks):
    given = Inputs(tokens(1, 6), segments=torch.tensor([[0, 0, 1, 1, 2, 2]]), forks=torch.tensor([forks]))
    with pytest.raises(ValueError, match="forks: a document can begin"):
        model(MIXERS["rope"])(given)


def test_forks_stand_alone():
    ids, names, forks = tokens(1, 4), torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1]])
    for more in ({}, {"segments": names, "mask": Prefix(torch.tensor([1]))}, {"segments": names, "positions": names}):
        with pytest.raises(ValueError, match="forks go with segments"):
            Inputs(ids, forks=forks, **more)
    with pytest.raises(ValueError, match="forks must be"):
        Inputs(ids, segments=names, forks=forks[:, :3])
