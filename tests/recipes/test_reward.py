"""Reward models from pairs to a directory that transformers opens, ensembles of them, and rows scored by them."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from tests.recipes import toys
from trivium.adapt.bottleneck import Bottleneck
from trivium.adapt.lora import LoRA
from trivium.core.errors import ConfigError, DataError
from trivium.io import directory
from trivium.nn.heads_task import Reward
from trivium.recipes import needs
from trivium.recipes import reward as recipe
from trivium.recipes.load import Bundle, load
from trivium.recipes.prefer import prepared
from trivium.recipes.reward import RewardModel, judged, reward, with_reward_head
from trivium.recipes.score import Score, score
from trivium.train import history
from trivium.train.loop import TrainConfig
from trivium.train.preference import DPO
from trivium.train.rewards import rewards_of

TRAIN = TrainConfig(steps=12, rows=4, precision="fp32", track=(), seed=1)


@cache
def made(seed: int) -> Bundle:
    return toys.bundle(seed=seed)


def bundle(seed: int = 0) -> Bundle:
    """The toy, fresh."""
    return replace(made(seed), model=copy.deepcopy(made(seed).model))


def pairs(count: int, first: int = 0) -> list[dict[str, object]]:
    """Polite answers are chosen."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Where is parcel {n}?"}],
            "chosen": [{"role": "assistant", "content": f"It comes on day {n}, thank you."}],
            "rejected": [{"role": "assistant", "content": f"No idea{'!' * (n % 5)}"}],
        }
        for n in range(first, first + count)
    ]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardModel:
    """Without the forecast, which costs more than the run; `test_what_is_planned` has it."""
    monkeypatch.setenv("TRIVIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(recipe, "foresee", lambda *_, **__: None)
    monkeypatch.setattr(recipe, "announce", lambda _: None)
    return RewardModel(
        model="toy",
        data=(write(tmp_path / "pairs.jsonl", pairs(10)),),
        validation=(write(tmp_path / "held-out.jsonl", pairs(3, first=30)),),
        out=str(tmp_path / "run"),
        adapter=None,
        length=96,
        optim={"kind": "adamw", "lr": 5e-3},
        train=TRAIN,
    )


@pytest.mark.slow
@pytest.mark.concept("T07.11", part="recipes/reward.py")
@pytest.mark.parametrize("adapter", [LoRA(rank=4), None], ids=["lora", "full"])
def test_a_reward_model_tells_held_out_pairs_apart(adapter, config, capsys):
    config = config.replace(adapter=adapter)
    run = reward(config, bundle=bundle())
    first = history.read(Path(config.out))[0]
    assert run.metrics["validation.accuracy"] == 1 and run.metrics["validation.loss"] < first["loss"] < 5
    assert 0 <= run.metrics["validation.calibration_error"] < 0.5
    said = capsys.readouterr().err
    assert "on held-out pairs: accuracy 1.000" in said and "how sure it is, and how often right" in said
    assert ("merged 14 maps: rewards moved by at most" in said) == (adapter is not None)
    table = json.loads((Path(config.out) / "calibration.json").read_text())
    assert table["accuracy"] == 1 and sum(row["pairs"] for row in table["reliability"]) == 3
    again, tokens = load(run.path), torch.arange(3, 30)[None]
    assert again.model(tokens).logits.shape == (1, 1) and again.lineage[-1]["step"] == "reward" and not again.passes
    ours, theirs = (dict(model.named_parameters()) for model in (again.model, run.model))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    more = reward(config.replace(out=f"{config.out}-more", adapter=None), bundle=again)
    assert more.metrics["validation.accuracy"] == 1  # one that has such a head goes on from it


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|endoftext|>"])
def test_transformers_reads_it_and_gives_the_same_rewards(pad, config):
    """Padded rows too, where the model padded with what ends a turn, which its classifiers would then not read."""
    given = bundle()
    given.tokenizer = copy.copy(given.tokenizer)
    given.tokenizer.config = {**given.tokenizer.config, "pad_token": pad}
    given.tokenizer.pad = None if pad is None else given.tokenizer.id(pad)
    given.rest = {**given.rest, "pad_token_id": given.tokenizer.pad}
    run = reward(config.replace(train=TRAIN.replace(steps=2)), bundle=given)
    rows = [[*row["prompt"], *row[side]] for row in pairs(3, first=30) for side in ("chosen", "rejected")]
    ours = score(Score(model=str(run.path), data=(write(Path(config.out) / "rows.jsonl", [{"messages": row} for row in rows]),)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(run.path, output_loading_info=True)
    assert not any(report.values()) and model.config.num_labels == 1 and type(model).__name__ == "LlamaForSequenceClassification"
    ids = [load(run.path).prompt.rows(row, turns="last")[0].ids for row in rows]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    assert batch["attention_mask"].min() == 0 and tokenizer.pad_token == "<|endoftext|>"
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].tolist()
    assert [row["reward"] for row in ours] == pytest.approx(theirs, abs=1e-5)


def test_what_weights_cannot_say_stays_beside_them(config, capsys):
    run = reward(config.replace(adapter=Bottleneck(size=4)), bundle=bundle())
    assert "cannot be merged; it is kept beside the base, in trivium's own format" in capsys.readouterr().err
    again = load(run.path)
    assert again.family == directory.NATIVE and len(again.passes) == 1
    data = Path(config.validation[0])
    scores = score(Score(model=str(run.path), data=(str(data),)))
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in scores)


def test_members_of_an_ensemble_differ_by_their_seeds():
    """In their heads at first; all else is shared."""
    heads = [with_reward_head(bundle(), seed=seed).model.head.out.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    given = bundle()
    assert with_reward_head(given, seed=0).model.embed.weight.data_ptr() == given.model.embed.weight.data_ptr()
    kept = replace(given, model=with_reward_head(given, seed=0).model)
    assert with_reward_head(kept, seed=1) is kept


@pytest.mark.slow
def test_several_members_score_together(config, capsys):
    given = bundle()
    before = given.weights()
    run = reward(config.replace(members=3, train=TRAIN.replace(steps=8)), bundle=given)
    assert given.weights() == before and run.path == Path(config.out)
    assert run.metrics["validation.accuracy"] == 1 and 0 <= run.metrics["validation.agreement"] <= 1
    assert "3 members together: accuracy 1.000" in capsys.readouterr().err
    data = (config.validation[0],)
    members = json.loads((run.path / "ensemble.json").read_text())["members"]
    single = [score(Score(model=str(run.path / member["path"]), data=data)) for member in members]
    assert len({rows[0]["chosen_reward"] for rows in single}) == 3
    mean, careful = (score(Score(model=str(run.path), data=data, caution=caution)) for caution in (0.0, 2.0))
    for n, row in enumerate(mean):
        each = torch.tensor([[rows[n][side] - member["mean"] for side in ("chosen_reward", "rejected_reward")]
                             for rows, member in zip(single, members, strict=True)])  # fmt: skip
        assert [row["chosen_reward"], row["rejected_reward"]] == pytest.approx(each.mean(0).tolist(), abs=1e-5)
        assert row["disagreement"] == pytest.approx((each[:, 0] - each[:, 1]).std(correction=0).item(), abs=1e-5)
        low = each.mean(0) - 2 * each.std(0, correction=0)
        assert [careful[n]["chosen_reward"], careful[n]["rejected_reward"]] == pytest.approx(low.tolist(), abs=1e-5)


def test_reward_models_learn_margins_and_refuse_other_objectives(config):
    write(Path(config.data[0]), [row | {"margin": 2.0} for row in pairs(10)])
    reward(config.replace(validation=(), train=TRAIN.replace(steps=1, rows=2)), bundle=bundle())
    (first,) = history.read(Path(config.out))
    assert first["loss"] > math.log(2) + 0.5  # a margin of 2 is asked for from the start
    with pytest.raises(ConfigError, match="'dpo' trains no reward model"):
        reward(config.replace(objective=DPO()), bundle=bundle())


def test_what_is_judged(config):
    """The same whatever stands beside it in a batch, with either kind of head."""
    model = with_reward_head(bundle(), seed=0)
    ((bank, _),), _ = prepared(config, model)
    found = judged(model.model, bank, rows=3)
    assert found.keys() == {"accuracy", "calibration_error", "loss", "margin"} and 0 <= found["accuracy"] <= 1
    assert found == pytest.approx(judged(model.model, bank, rows=4), abs=1e-5)
    rewards = rewards_of(model.model, bank, rows=2)
    for row in range(len(bank)):
        ids = torch.from_numpy(bank.row(row)[0].astype("int64"))[None]
        assert rewards[row].item() == pytest.approx(model.model(ids).logits.item(), abs=1e-5)
    each = copy.deepcopy(model.model)
    each.head = Reward().build(each.spec.vocab, each.spec.dim)
    each.spec = each.spec.replace(head=Reward())
    each.head.out.weight.data.copy_(model.model.head.out.weight)
    torch.testing.assert_close(rewards_of(each, bank, rows=3), rewards, rtol=1e-5, atol=1e-5)


def test_what_is_planned(config, monkeypatch):
    monkeypatch.setattr(recipe, "foresee", needs.foresee)
    found = recipe.plan(config, bundle=bundle())
    assert found["needs"]["steps"] == 12 and found["needs"]["peak"] > 0 and found["data"]["pairs"] == 10


def test_what_cannot_be_scored(config, tmp_path):
    data = (config.data[0],)
    with pytest.raises(ConfigError, match=r"its head \(lm\) gives no reward"):
        score(Score(model="toy", data=data), bundle=bundle())
    model = with_reward_head(bundle(), seed=0)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: \d+ tokens, and there is room for 8"):
        score(Score(model="toy", data=data, length=8), bundle=model)
    with pytest.raises(ConfigError, match="an answer may have 999"):
        score(Score(model="toy", data=data, length=999), bundle=model)
    with pytest.raises(DataError, match="no format fits the columns 'x'"):
        score(Score(model="toy", data=(write(tmp_path / "x.jsonl", [{"x": 1}]),)), bundle=model)


# The command


@pytest.mark.slow
def test_the_command(trivium, toy, tmp_path):
    write(tmp_path / "pairs.jsonl", pairs(6))
    flags = ["--model", toy, "--data", "pairs.jsonl", "--length", "96", "--train.steps", "2", "--train.rows", "2", "--out", "run"]
    planned = trivium.ok("reward", *flags, "--objective.center", "0.01", "--dry_run", "--json").json
    assert planned["config"]["objective"] == {"kind": "bradley_terry", "center": 0.01} and planned["data"]["pairs"] == 6
    assert not Path("run").exists()
    done = trivium.ok("reward", *flags, "--validation", "pairs.jsonl", "--json").json
    assert Path(done["path"]) == Path("run/model") and 0 <= done["metrics"]["validation.accuracy"] <= 1
    assert trivium.ok("reward", "--config", "run/config.yaml").out == "run/model\n"  # finished: found as it is
    scored = trivium.ok("reward", "--score", "pairs.jsonl", "--model", "run")
    rows = [json.loads(line) for line in scored.out.splitlines()]
    assert len(rows) == 6 and all(row.keys() == {"prompt", "chosen", "rejected", "chosen_reward", "rejected_reward"} for row in rows)
    share = sum(row["chosen_reward"] > row["rejected_reward"] for row in rows) / 6
    assert share == pytest.approx(done["metrics"]["validation.accuracy"], abs=1e-3) and "on 6 pairs: accuracy" in scored.err
    assert "name a file to score" in trivium.refused("reward", *flags, "--caution", "1", status=2)
    assert "gives no reward" in trivium.refused("reward", "--score", "pairs.jsonl", "--model", toy)
    assert "--cautious" in trivium.refused("reward", "--score", "pairs.jsonl", "--model", "run", "--cautious", "1", status=2)
