"""What an objective asks of routers: terms against transformers' loss, the correction through the loop, and clear refusals."""

from __future__ import annotations

import pytest
import torch

from tests.parity import hf
from tests.tiny import redraw
from trivium.core.errors import ConfigError
from trivium.core.spec import exemptions
from trivium.io import directory
from trivium.models.block import Block
from trivium.models.compiling import compiled
from trivium.models.ledger import Ledger, followed, ghost
from trivium.models.transformer import Transformer, TransformerModel, build
from trivium.nn.attention import Attention
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.moe import MoE
from trivium.nn.positions import Rope
from trivium.nn.routing import load_entropy
from trivium.train.loop import Interrupted
from trivium.train.objectives import NextToken, corrections

from .toys import CONFIG, VOCAB, Rows, Signalled, model, same, train, weights

SPARSE = MoE(experts=4, top_k=2, expert=MLP(hidden=8))
CORRECTED = SPARSE.replace(correction=True, score="sigmoid", shared=MLP(hidden=8))


def spec(moe: MoE) -> Transformer:
    attention = Attention(heads=4, kv_heads=2, head_dim=4, position=Rope(base=50.0))
    return Transformer(dim=16, vocab=VOCAB, layers=("a", "a"), blocks={"a": Block(mixer=attention, ffn=moe)})


def built(moe: MoE) -> TransformerModel:
    made = redraw(build(spec(moe), device="cpu"), seed=2, std=0.25)
    for correction in corrections(made).values():
        correction.reset()
    return made


@pytest.mark.concept("T03.04", part="train/objectives.py")
def test_terms_are_the_models_own_times_coefficients():
    trained, batch = built(SPARSE), Rows().batch(0)
    terms = NextToken(balance=0.5, router_z=0.25).terms(trained, batch)
    plain = NextToken().terms(trained, batch)
    assert plain.keys() == {"loss"} and torch.equal(plain["loss"], terms["loss"])
    aux = trained(Inputs(batch.tokens, segments=batch.segments)).aux
    torch.testing.assert_close(terms["balance"], 0.5 * (aux.terms["balance", 0] + aux.terms["balance", 1]))
    torch.testing.assert_close(terms["router_z"], 0.25 * (aux.terms["router_z", 0] + aux.terms["router_z", 1]))
    tokens = float((batch.segments >= 0).sum())
    assert NextToken(balance=0.5).weights(batch) == {"loss": float(batch.targets.sum()), "balance": tokens}
    trained.zero_grad()
    terms["balance"].backward()
    assert trained.layers[0].ffn.router.weight.grad.abs().max() > 0


@pytest.mark.concept("T03.04", part="train/objectives.py")
def test_the_loss_is_transformers_where_there_is_one_layer(tmp_path):
    keys = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4}
    theirs = hf.tiny(
        "mixtral",
        **keys,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.3,
        sliding_window=None,
    )
    trained = directory.read(hf.save(theirs, tmp_path / "x")).model
    batch = Rows(length=12).batch(1)
    rows = [int((segments == 0).sum()) for segments in batch.segments]
    batch = type(batch)(batch.tokens, torch.where(batch.segments == 0, 0, -1), batch.targets & (batch.segments == 0))
    labels = torch.where(batch.targets, batch.tokens, -100)
    mask = (batch.segments == 0).long()
    assert len(set(rows)) > 1
    out = theirs(input_ids=batch.tokens, attention_mask=mask, labels=labels)
    objective = NextToken(balance=0.3)
    terms, weighed = objective.terms(trained, batch), objective.weights(batch)
    assert sum(term / weighed[name] for name, term in terms.items()).item() == pytest.approx(out.loss.item(), abs=1e-5)
    assert (terms["balance"] / weighed["balance"]).item() == pytest.approx(0.3 * out.aux_loss.item(), abs=1e-6)
    assert out.aux_loss > 1


def test_z_adds_up_over_rows_and_balance_says_that_it_does_not():
    objective, trained, batch = NextToken(balance=1.0, router_z=1.0), built(SPARSE), Rows().batch(0)
    whole, parts = objective.terms(trained, batch), [objective.terms(trained, part) for part in batch.split(3)]
    for name in ("loss", "router_z"):
        assert sum(part[name] for part in parts).item() == pytest.approx(whole[name].item(), rel=1e-5)
    assert sum(part["balance"] for part in parts).item() != pytest.approx(whole["balance"].item(), rel=1e-3)
    assert [row[:2] for row in exemptions(objective)] == [("", "linear in rows")]
    assert not exemptions(NextToken(router_z=1.0))


@pytest.mark.parametrize("field", ["balance", "router_z", "correction_speed"])
def test_a_model_without_a_router_is_refused(field):
    with pytest.raises(ConfigError, match=f"objective.{field}: .*router") as error:
        NextToken(**{field: 0.1}).terms(model().train(), Rows().batch(0))
    assert error.value.field == field


def test_a_router_without_a_correction_is_refused():
    with pytest.raises(ConfigError, match=r"set ffn\.correction"):
        NextToken(correction_speed=0.1).terms(built(SPARSE).train(), Rows().batch(0))


@pytest.mark.concept("T03.04", part="train/objectives.py")
def test_one_update_moves_the_correction_by_the_load_of_the_whole_batch(tmp_path):
    """Two micro-batches, one move; validation, which sees other rows, counts for nothing."""
    trained = built(CORRECTED)
    before = {name: one.weight.clone() for name, one in corrections(trained).items()}
    batch = Rows().batch(0)
    loads = trained(Inputs(batch.tokens, segments=batch.segments)).aux.loads
    train(tmp_path, of=trained, objective=NextToken(correction_speed=0.01), config=CONFIG.replace(steps=1))
    for layer, (name, one) in enumerate(corrections(trained).items()):
        load = loads[layer].float()
        torch.testing.assert_close(one.weight.detach(), before[name] + 0.01 * (load.mean() - load).sign())
        assert load.std() > 0 and one.load is None and one.weight.grad is None


@pytest.mark.concept("T03.04", part="train/objectives.py")
def test_a_run_that_was_interrupted_goes_on_with_its_corrections(tmp_path):
    objective = NextToken(correction_speed=0.02, balance=0.01)
    whole, _ = train(tmp_path / "whole", of=built(CORRECTED), objective=objective)
    moved = [one.weight.abs().max().item() for one in corrections(whole).values()]
    assert max(moved) > 0.02
    for directory_, rows in (("cut", Signalled(at=3)), ("cut", Rows())):
        last = built(CORRECTED)
        try:
            train(tmp_path / directory_, of=last, objective=objective, rows=rows)
        except Interrupted:
            continue
    assert same(weights(last), weights(whole))
    for a, b in zip(corrections(last).values(), corrections(whole).values(), strict=True):
        assert torch.equal(a.weight, b.weight)


@pytest.mark.concept("T03.04", part="nn/routing.py")
@pytest.mark.parametrize("by", ["balance", "correction"])
def test_a_collapsed_router_is_evened_out(by):
    """A few steps on routers that send nearly all tokens to two experts of four: with balancing all come to be used."""
    found = {}
    for balanced in (True, False):
        trained = built((CORRECTED if by == "correction" else SPARSE).replace(router_bias=True)).train()
        with torch.no_grad():
            for layer in trained.layers:
                layer.ffn.router.bias.copy_(torch.tensor([3.0, 3.0, 0.0, 0.0]))
        objective = NextToken() if not balanced else NextToken(balance=1.0) if by == "balance" else NextToken(correction_speed=0.05)
        optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.02)
        for i in range(25):
            batch = Rows().batch(i)
            optimizer.zero_grad()
            terms, weighed = objective.terms(trained, batch), objective.weights(batch)
            sum(term / weighed[name] for name, term in terms.items()).backward()
            optimizer.step()
            objective.updated(trained)
            batch = Rows().batch(99)
        loads = trained(Inputs(batch.tokens, segments=batch.segments)).aux.loads
        found[balanced] = sum(load_entropy(load) for load in loads.values()) / 2
    assert found[True] > 0.9 and found[True] > found[False] + 0.1, found


def test_a_model_that_holds_nothing_can_be_tried():
    """`trivium plan` runs one step on a model without values: nobody knows who goes where, and shares are even."""
    made = build(spec(CORRECTED))
    ghost(made)
    batch, ledger = Rows().batch(0), Ledger()
    with followed(ledger):
        terms = NextToken(balance=0.1, router_z=0.1, correction_speed=0.1).terms(made.train(), batch)
        torch.stack(list(terms.values())).sum().backward()
    assert ledger.peak.total() > 0 and made.layers[0].ffn.experts[0].out.weight.grad is not None


def test_mixtures_are_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    with pytest.raises(ConfigError, match="every layer is a mixture"), compiled(built(SPARSE)):
        pass
    mixed = spec(SPARSE).replace(layers=("a", "b"), blocks={"a": spec(SPARSE).blocks["a"], "b": Block(ffn=MLP(hidden=8))})
    made = build(mixed)
    with compiled(made):
        assert "feed" not in vars(made.layers[0]) and "feed" in vars(made.layers[1])
