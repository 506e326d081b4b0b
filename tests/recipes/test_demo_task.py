"""The demo's task: pure, disjoint between splits, answers that stand in the text, and out of reach of look-up."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from tests import assets
from trivium.core.errors import ConfigError
from trivium.io.gguf.reader import open_gguf
from trivium.recipes.demo_baseline import NearestTemplate
from trivium.recipes.demo_task import INSTRUCTION, KINDS, SPLITS, WORDS, Example, Words, examples, messages, question
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer


def test_an_example_is_a_function_of_split_seed_and_index():
    for split in SPLITS:
        assert examples(split, seed=1, count=40)[:10] == examples(split, seed=1, count=10)
        assert examples(split, seed=1, count=10) != examples(split, seed=2, count=10)
    golden = examples("train", seed=0, count=1)[0]
    assert golden.text == "Book a slot. On August 18. Guest Chen Castro. Hosted by Falcon Inc. No rush. 7:45 o'clock."
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        examples("training", seed=0, count=1)  # type: ignore[arg-type]


def _entries(words: Words) -> dict[str, set[str]]:
    lists = {field.name: getattr(words, field.name) for field in dataclasses.fields(words) if field.name != "joints"}
    flat = {}
    for name, value in lists.items():
        for key, entries in value.items() if isinstance(value, dict) else [("", value)]:
            assert len(set(entries)) == len(entries), f"{name} {key} names something twice"
            flat[f"{name}/{key}"] = {entry.lower() for entry in entries}
    return flat


@pytest.mark.parametrize(("one", "other"), [("train", "valid"), ("train", "test"), ("valid", "test")])
def test_splits_share_no_template_and_no_name(one, other):
    left, right = _entries(WORDS[one]), _entries(WORDS[other])
    for name in left:
        assert not left[name] & right[name]
    clauses = [set.union(*(found for name, found in side.items() if name.startswith("clauses"))) for side in (left, right)]
    assert not clauses[0] & clauses[1]


def test_names_of_the_test_split_stand_in_no_training_text():
    seen = set(re.findall(r"[A-Za-z]+", " ".join(example.text for example in examples("train", seed=0, count=3000))))
    words = WORDS["test"]
    assert not seen & {
        word for names in (words.first, words.last, words.firms, words.things, words.colors) for name in names for word in name.split()
    }
    assert not seen & {name.split()[0] for name in words.streets}


@pytest.mark.parametrize("split", SPLITS)
def test_every_value_stands_in_the_text(split):
    kinds = set()
    for example in examples(split, seed=3, count=300):
        kinds.add(example.kind)
        kind, *fields = example.answer
        assert kind == "type" and example.answer["type"] == example.kind
        assert set(fields) <= set(KINDS[example.kind]) and len(fields) == (3 if example.kind == "contact" else 4)
        for field in fields:
            value = example.answer[field]
            assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", example.text), (example, field)
        assert "{" not in example.text
    assert kinds == set(KINDS)


def test_messages_hold_the_text_and_compact_json():
    (example,) = examples("train", seed=5, count=1)
    user, assistant = messages(example)
    assert [user] == question(example) == [{"role": "user", "content": INSTRUCTION + example.text}]
    assert json.loads(assistant["content"]) == example.answer and ", " not in assistant["content"].replace(example.text, "")
    assert assistant["content"].startswith(f'{{"type":"{example.kind}",')


def test_asides_make_texts_longer_and_change_no_answer():
    none, all_ = (examples("train", seed=0, count=200, asides=chance) for chance in (0.0, 1.0))
    assert [example.answer for example in none] == [example.answer for example in all_]
    assert all(len(a.text) < len(b.text) + 12 for a, b in zip(none, all_, strict=True))
    assert sum(len(b.text) for b in all_) > sum(len(a.text) for a in none) + 200 * 5


def test_look_up_fills_in_a_template_that_it_knows_and_fails_on_the_test_split():
    known = [
        Example(
            "order",
            "Order. Item red lamp. 7 pieces. For Anna Young.",
            {"type": "order", "buyer": "Anna Young", "item": "red lamp", "count": 7},
        ),
        Example("contact", "Contact, ring 555-0142, Boris Price here.", {"type": "contact", "name": "Boris Price", "phone": "555-0142"}),
    ]
    lookup = NearestTemplate(known)
    assert lookup.answer("Order. Item blue clock. 12 pieces. For Emma Ross.") == {
        "type": "order",
        "buyer": "Emma Ross",
        "item": "blue clock",
        "count": 12,
    }
    assert lookup.answer("Contact, ring 200-9999, Carla Stone here.") == {"type": "contact", "name": "Carla Stone", "phone": "200-9999"}
    train = examples("train", seed=0, count=600)
    lookup = NearestTemplate(train)
    assert sum(lookup.answer(example.text) == example.answer for example in train[:50]) >= 48
    test = examples("test", seed=0, count=150)
    right = sum(lookup.answer(example.text) == example.answer for example in test)
    assert 0 < right < 0.2 * len(test)


def test_lengths_under_the_real_tokenizer():
    """About 63 tokens of prompt and 33 of answer, template, generation prompt and the end of the turn included."""
    metadata = open_gguf(assets.asset("smollm2")).metadata
    tokenizer = Tokenizer.from_gguf(metadata)
    prompt = Prompt.of(tokenizer, metadata["tokenizer.chat_template"])
    for split in SPLITS:
        found = examples(split, seed=0, count=200)
        asked = [len(prompt.generation(question(example))) for example in found]
        whole = [len(prompt.rows(messages(example))[0].ids) for example in found]
        answers = [b - a for a, b in zip(asked, whole, strict=True)]
        assert 55 <= sum(asked) / 200 <= 72 and max(asked) <= 85
        assert 28 <= sum(answers) / 200 <= 40 and max(answers) <= 45
