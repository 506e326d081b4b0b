"""Data commands on files: convert, curate, decontaminate, synthesize and inspect; what is written, and what is refused untouched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.assets import asset
from tests.data.fakes import talk
from tests.recipes.toys import Trivium, bundle, write_rows
from trivium.core.errors import ConfigError, DataError
from trivium.data.curation import Best, Diverse, Exact, Length
from trivium.data.items import read_items
from trivium.data.scorers import IFD, auc
from trivium.data.scorers import losses as answer_losses
from trivium.data.synthesis import Draft, FromText, Magpie
from trivium.infer.sampling import Sampling
from trivium.io import files
from trivium.nn.inputs import Inputs
from trivium.recipes.curate import Curate, curate, encoder, grouped, losses, means
from trivium.recipes.rewrite import convert, decontaminate
from trivium.recipes.synthesize import Synthesize, judged, synthesize
from trivium.text.prompt import Row

END = 2  # the id of <|im_end|>


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


def test_convert_writes_all_or_nothing(trivium: Trivium, tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", {"messages": talk("q", "a"), "id": 1}, {"messages": talk("q", "a", "r", "b"), "id": 2})
    done = trivium.ok("data", "convert", rows, "--to", "alpaca", "--out", "alpaca.jsonl", "--json")
    assert done.json == {"path": "alpaca.jsonl", "rows": 2}
    assert lines(tmp_path / "alpaca.jsonl")[1] == {"history": [["q", "a"]], "instruction": "r", "input": "", "output": "b", "id": 2}
    again = trivium.refused("data", "convert", rows, "--to", "alpaca", "--out", "alpaca.jsonl")
    assert "alpaca.jsonl: is already there; name another file, or say --overwrite" in again
    trivium.ok("data", "convert", rows, "--to", "sharegpt", "--drop", "id", "--out", "alpaca.jsonl", "--overwrite")
    assert lines(tmp_path / "alpaca.jsonl")[0] == {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    bad = write(
        tmp_path / "bad.jsonl", {"messages": talk("q", "a")}, {"messages": [{"role": "system", "content": "s"}] * 2 + talk("q", "a")}
    )
    assert "bad.jsonl:2: 'alpaca' rows are turns" in trivium.refused("data", "convert", bad, "--to", "alpaca", "--out", "x.jsonl")
    assert "rows.jsonl: is one of the files that are read" in trivium.refused(
        "data", "convert", rows, "--to", "text", "--out", rows, "--overwrite"
    )
    assert "ends in .jsonl" in trivium.refused("data", "convert", rows, "--to", "text", "--out", "x.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    assert "no rows: the data is empty" in trivium.refused("data", "convert", "empty.jsonl", "--to", "text", "--out", "x.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "latin.jsonl:1: not valid UTF-8 at byte 14" in trivium.refused(
        "data", "convert", "latin.jsonl", "--to", "text", "--out", "x.jsonl"
    )
    assert left(tmp_path) == ["alpaca.jsonl", "bad.jsonl", "empty.jsonl", "latin.jsonl", "rows.jsonl"]


def test_ctrl_c_leaves_what_was_there(trivium: Trivium, tmp_path: Path, monkeypatch):
    rows = write(tmp_path / "rows.jsonl", *[{"text": f"t{n}"} for n in range(9)])
    test = write(tmp_path / "test.jsonl", {"text": "t3"})
    whole = files.HashingWriter.write
    (tmp_path / "old.jsonl").write_text("{}\n")

    def interrupted(self: files.HashingWriter, data: bytes) -> None:
        if self.size > 20:
            raise KeyboardInterrupt
        whole(self, data)

    monkeypatch.setattr(files.HashingWriter, "write", interrupted)
    for command in (("convert", "--to", "text"), ("curate", "--steps", "[exact]"), ("decontaminate", "--against", test, "--least", "1")):
        name, *options = command
        done = trivium("data", name, rows, *options, "--out", "new.jsonl")
        names = left(tmp_path)  # what lies beside the rows may be there, whole; the rows come last
        assert done.status == 130 and "new.jsonl" not in names and not any("partial" in name for name in names), done
    trivium("data", "convert", rows, "--to", "text", "--out", "old.jsonl", "--overwrite")
    assert (tmp_path / "old.jsonl").read_text() == "{}\n"


@pytest.mark.slow
def test_curate_keeps_what_went_and_why(trivium: Trivium, toy: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", count=8)
    rows.write_text(rows.read_text() * 2)
    steps = "[exact, {kind: length, max: 256}, {kind: best, by: gain, count: 6}, {kind: diverse, share: 0.5}]"
    options = ("data", "curate", rows, "--model", toy, "--steps", steps)
    planned = trivium.ok(*options, "--dry-run", "--json").json
    assert planned["path"] is None and planned["kept"] == 3 and left(tmp_path) == ["rows.jsonl"]
    done = trivium.ok(*options, "--out", "kept.jsonl")
    assert done.out == "kept.jsonl\n" and "3 of 16 rows stay" in done.err
    assert left(tmp_path) == ["kept.jsonl", "kept.removed.jsonl", "kept.report.json", "rows.jsonl"]
    kept, gone = lines(tmp_path / "kept.jsonl"), lines(tmp_path / "kept.removed.jsonl")
    assert len(kept) == 3 and len(gone) == 13 and [row["step"] for row in gone] == ["exact"] * 8 + ["best"] * 2 + ["diverse"] * 3
    assert gone[0]["why"] == f"says the same as {rows}:1" and all(row["row"]["messages"] for row in gone)
    report = json.loads((tmp_path / "kept.report.json").read_text())
    assert {key: planned[key] for key in report} == report
    trivium.ok("sft", "--model", toy, "--data", "kept.jsonl", "--length", "256", "--dry-run")
    assert "is already there" in trivium.refused(*options, "--out", "kept.jsonl")
    assert "unknown curation step 'exakt'; did you mean 'exact'" in trivium.refused("data", "curate", rows, "--steps", "[exakt]", status=2)
    assert "say one of share, count and at_least" in trivium.refused("data", "curate", rows, "--steps", "[best]", status=2)
    assert "no such file or folder" in trivium.refused("data", "curate", "nowhere.jsonl")


def test_losses_are_the_models():
    made = bundle(context=64)
    nats = losses(made.model)
    rows = [made.prompt.completion("New order", text) for text in (" from Berlin", " x", " of twelve chairs and a table")]
    found = nats(rows)
    for row, value in zip(rows, found, strict=True):
        logits = made.model(Inputs(torch.tensor([row.ids]))).logits[0].log_softmax(-1).detach()
        alone = -sum(float(logits[at - 1, token]) for at, token in enumerate(row.ids) if row.targets[at])
        assert value == pytest.approx(alone, rel=1e-4)
    with pytest.raises(DataError, match=r"a row has \d+ tokens, and the model reads 64; take long rows out first"):
        nats([made.prompt.completion("a " * 80, "b")])
    groups = grouped([5, 900, 4000, 7, 0])
    assert sorted(place for group in groups for place in group) == list(range(5)) and groups[0] == [2]


@pytest.mark.slow
@pytest.mark.concept("X.45", part="recipes/curate.py")
def test_a_trained_model_ranks_swapped_answers_last():
    """A model that has learned what belongs together puts answers to other questions last: AUC over 0.9 by gain."""
    made, items, swapped = bundle(context=64), *_facts()
    clean = [row for row, wrong in zip(items, swapped, strict=True) if not wrong]
    optimizer = torch.optim.AdamW(made.model.parameters(), 3e-3)
    rows = [made.prompt.completion(row["prompt"], row["completion"]) for row in clean]
    start = made.tokenizer.bos  # a model that has read much also knows what answers look like by themselves
    rows += [Row([start, *row.ids[(at := row.targets.index(True)) :]], [False, *row.targets[at:]]) for row in rows]
    width = max(len(row.ids) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.zeros_like(tokens, dtype=torch.bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row.ids)] = torch.tensor(row.ids)
        targets[at, : len(row.ids)] = torch.tensor(row.targets)
    for _ in range(60):
        logits = made.model(Inputs(tokens)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[targets[:, 1:]], tokens[:, 1:][targets[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config = Curate(data=("unused",), steps=(Best(by=IFD(), share=0.5),))
    tools = means(config, made)
    given, alone = answer_losses(read_items(items), tools)
    wrong = np.array(swapped)
    assert auc((alone - given)[~wrong], (alone - given)[wrong]) > 0.9
    scores = IFD().scores(read_items(items), tools)
    assert (scores[wrong] < scores[~wrong].min()).mean() > 0.8, "IFD likes what is hard, and some of what is wrong only looks hard"


def _facts() -> tuple[list[dict], list[bool]]:
    colors = ["red", "green", "blue", "white", "black", "gray", "gold", "pink"]
    things = ["door", "lamp", "boat", "coat", "tree", "bird", "shoe", "cup", "roof", "leaf", "ring", "rose"]
    rows, wrong = [], []
    for n, thing in enumerate(things):
        for k, ask in enumerate(
            ("The color of the {} is", "What color has the {}? It is", "The {} was painted", "Everyone likes the {} in")
        ):
            swapped = (n + k) % 4 == 0
            color = colors[(n * 3 + (5 if swapped else 0)) % len(colors)]
            rows.append({"prompt": ask.format(thing), "completion": f" {color}"})
            wrong.append(swapped)
    return rows, wrong


def test_a_sentence_encoder_tells_topics_apart(tmp_path: Path):
    embed = encoder(asset("minilm"))
    cats, cat, market = embed(["A cat sits on the mat.", "On the mat there is a cat.", "The stock market fell sharply on Monday."])
    assert cats @ cat > 0.8 > 0.3 > cats @ market and np.linalg.norm(cats) == pytest.approx(1, abs=1e-5)
    texts = ["A dog barks at night.", "The dog was barking at night.", "Interest rates rose again.", "Rates of interest went up again."]
    rows = write(tmp_path / "rows.jsonl", *[{"text": text} for text in texts])
    config = Curate(data=(str(rows),), out=str(tmp_path / "out.jsonl"), steps=(Diverse(count=2),), encoder=str(asset("minilm")))
    kept = {record.line for record in curate(config).kept}
    assert len(kept & {1, 2}) == len(kept & {3, 4}) == 1


def test_an_encoder_reads_both_ways(toy: Path):
    with pytest.raises(ConfigError, match="holds no encoder of sentences"):
        encoder(toy)


def test_decontaminate_on_files(trivium: Trivium, tmp_path: Path):
    question = "a train leaves the station at nine and arrives at noon so how long does it take"
    train = write(tmp_path / "train.jsonl", {"text": f"once {question} they asked"}, {"text": "something else about bees and honey"})
    test = write(tmp_path / "test.jsonl", {"question": question, "answer": "3"})
    shown = trivium.ok("data", "decontaminate", train, "--against", test)
    assert shown.out == "1 of 2 rows\n" and "shares words with" in shown.err and left(tmp_path) == ["test.jsonl", "train.jsonl"]
    done = trivium.ok("data", "decontaminate", train, "--against", test, "--out", "clean.jsonl", "--json").json
    assert done["contaminated"] == 1 and done["path"] == "clean.jsonl" and lines(tmp_path / "clean.jsonl") == lines(train)[1:]
    (gone,) = lines(tmp_path / "clean.removed.jsonl")
    assert gone["where"] == f"{train}:1" and gone["row"] == lines(train)[0] and question[:20] in gone["why"]
    assert "clean.jsonl: is already there" in trivium.refused("data", "decontaminate", train, "--against", test, "--out", "clean.jsonl")
    with pytest.raises(DataError, match="no such file"):
        decontaminate([train], ["nowhere.jsonl"], None)


# A toy with random weights speaks gibberish; with its end of turn made likely, it ends in time.
SPEAKS = Sampling(temperature=1.0, max_tokens=24, logit_bias={END: 4.0})


def gibberish(tmp_path: Path, **fields: object) -> Synthesize:
    return Synthesize(out=str(tmp_path / "made.jsonl"), count=24, sampling=SPEAKS, steps=(Exact(over="question"),)).replace(**fields)


@pytest.mark.concept("X.44", part="recipes/synthesize.py")
def test_magpie_by_seed_with_provenance(tmp_path: Path):
    made = bundle()
    first = synthesize(gibberish(tmp_path), bundle=made)
    rows, gone = lines(tmp_path / "made.jsonl"), lines(tmp_path / "made.removed.jsonl")
    assert rows == list(first.kept) and len(rows) + len(gone) == 24 and rows
    report = json.loads((tmp_path / "made.report.json").read_text())
    assert report["asked"] == 24 and report["kept"] == len(rows) <= report["accepted"] <= report["parsed"] <= 24
    assert report["parsed share"] == report["parsed"] / 24 and report["model"] == made.weights()
    assert report["accepted"] + sum(report["troubles"].values()) == 24 and all(row["why"] for row in gone)
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] and all(
            turn["content"].strip() for turn in row["messages"]
        )
        told = row["synthetic"]
        assert (told["model"], told["prompt"], told["seed"]) == (made.weights(), made.prompt.digest(), 0)
        assert told["method"] == {"kind": "magpie"} and told["sampling"]["max_tokens"] == 24 and "seed" not in told["sampling"]
    alone = synthesize(gibberish(tmp_path, batch=5), bundle=made, overwrite=True)
    assert alone.kept == first.kept, "batches change nothing"
    other = synthesize(gibberish(tmp_path, seed=1), bundle=made, overwrite=True)
    assert [row["messages"] for row in other.kept] != [row["messages"] for row in first.kept]
    assert convert([tmp_path / "made.jsonl"], tmp_path / "sharegpt.jsonl", to="sharegpt") == len(other.kept)


@pytest.mark.concept("X.44", part="recipes/synthesize.py")
def test_filters_and_dedup_judge_drafts(tmp_path: Path):
    """Of what parsed, questions asked before and near copies go, each with the reason; rates are of all drafts."""
    long = "how does a bee that gathers nectar from many flowers find the way home to its own hive in the evening"
    drafts = [
        Draft(0, "How far is it?", "An hour."),
        Draft(1, "how far is it", "Two hours."),
        Draft(2, long, "By the sun."),
        Draft(3, f"so {long}", "By the sun."),
        Draft(4, trouble="no question and answer"),
        Draft(5, "Is it?", "It is far", trouble="cut off"),
    ]
    config = Synthesize(out=str(tmp_path / "made.jsonl"), count=6)
    made = judged(drafts, config, bundle())
    assert [row["synthetic"]["request"] for row in made.kept] == [0, 2]
    told = [(row["step"], row["why"].partition(" request")[0]) for row in made.removed]
    assert told[:3] == [("draft", "no question and answer"), ("draft", "cut off"), ("exact", "says the same as")]
    assert told[3][0] == "near" and len(told) == 4
    counts = {key: made.report[key] for key in ("asked", "parsed", "parsed share", "accepted", "kept", "troubles")}
    assert counts == {
        "asked": 6, "parsed": 4, "parsed share": 4 / 6, "accepted": 4, "kept": 2, "troubles": {"cut off": 1, "no question and answer": 1},
    }  # fmt: skip


def test_from_text_reads_and_refuses(tmp_path: Path):
    text = tmp_path / "book.txt"
    text.write_text("New order from Berlin.\n\nTwelve chairs and a table.\n")
    config = gibberish(tmp_path, method=FromText.tiny(), data=(str(text),))
    with pytest.raises(DataError, match=r"none of 24 drafts stands: no question and answer \(24\)"):
        synthesize(config, bundle=bundle())
    assert left(tmp_path) == ["book.txt", "made.removed.jsonl", "made.report.json"] and len(lines(tmp_path / "made.removed.jsonl")) == 24
    small = config.replace(count=1)
    with pytest.raises(DataError, match="does not fit"):
        synthesize(small, bundle=bundle(context=16))
    with pytest.raises(ConfigError, match="the method 'from_text' reads raw text: name it"):
        synthesize(config.replace(data=()), bundle=bundle())
    with pytest.raises(ConfigError, match="the method 'magpie' reads no raw text"):
        synthesize(config.replace(method=Magpie()), bundle=bundle())
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"blank.txt: holds no text to write about"):
        synthesize(config.replace(data=(str(tmp_path / "blank.txt"),)), bundle=bundle())
    assert not (tmp_path / "made.jsonl").exists()


def test_synthesize_needs_a_template_and_a_place(trivium: Trivium, toy: Path, tmp_path: Path):
    bare = bundle()
    bare.prompt = type(bare.prompt).of(bare.tokenizer, None)
    bare.save(tmp_path / "bare")
    refused = trivium.refused("data", "synthesize", "--model", "bare", "--count", "2")
    assert "this model has no chat template" in refused
    (tmp_path / "synthetic.jsonl").write_text("{}\n")
    assert "synthetic.jsonl: is already there" in trivium.refused("data", "synthesize", "--model", toy)
    assert "unknown way to synthesize 'magpi'; did you mean 'magpie'" in trivium.refused(
        "data", "synthesize", "--method", "magpi", status=2
    )
    assert (tmp_path / "synthetic.jsonl").read_text() == "{}\n"


def test_inspect_shows_duplicates_truncation_and_pairs(trivium: Trivium, toy: Path, tmp_path: Path):
    long = " ".join(f"order number {n} from the shop" for n in range(8))
    said = [{"prompt": "Q:", "completion": text} for text in (long, long, long + "!", "New order", long * 4)]
    rows = write(tmp_path / "rows.jsonl", *said)
    options = ("data", "inspect", rows, "--model", toy, "--length", "192", "--json")
    found = trivium.ok(*options).json
    assert (found["duplicates"], found["near_duplicates"], found["compared"]) == (1, 1, 4)
    assert found["facts"]["dropped"]["count"] == 1 and found["facts"]["truncated"]["count"] == 0
    cut = trivium.ok(*options, "--too-long", "truncate").json
    assert cut["facts"]["truncated"]["count"] == 1 and cut["rows"] == 5
    assert "near duplicates" in trivium.ok(*options[:-1]).out
    pairs = write(tmp_path / "pairs.jsonl", *[{"prompt": "2+2=", "chosen": f" {n}.", "rejected": " ?"} for n in (4, 4, 5)])
    found = trivium.ok("data", "inspect", pairs, "--model", toy, "--json").json
    assert found["facts"]["format"] == "preference" and found["rows"] == 6 and found["compared"] == 3
    assert [text for row in found["shown"][:2] for text, on in row if on] == [" 4.<|im_end|>", " ?<|im_end|>"]


def test_a_step_that_needs_no_model_loads_none(tmp_path: Path):
    config = Curate(data=("x",), steps=(Exact(), Diverse(count=1)), model="no such model")
    assert means(config).prompt is None and means(config).embed is not None
    with pytest.raises(ValueError, match="no such model"):
        means(config.replace(steps=(Length(),)))
