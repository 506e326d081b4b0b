"""Synthetic instructions: what is parsed and refused, whose words the model is given, and who judges. A script stands for the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.assets import asset
from tests.recipes.toys import TEMPLATE, tokenizer
from trivium.core.errors import ConfigError, DataError
from trivium.core.spec import validate
from trivium.data.rows import Record
from trivium.data.synthesis import (
    FromText,
    Magpie,
    Method,
    Passage,
    Written,
    check_template,
    grounded,
    parse,
    passages,
    tally,
    user_opening,
)  # fmt: skip
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer

PROMPT = Prompt.of(tokenizer(), TEMPLATE, None, None)


class Script:
    """A model that says what stands in a list, stage by stage; it remembers what it was asked."""

    def __init__(self, **stages: list[str]):
        self.stages = stages
        self.asked: list[tuple[str, str, tuple[int, ...], tuple[str, ...]]] = []

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        stage: str,
        numbers: Sequence[int],
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[Written]:
        for ids in prompts:
            self.asked.append((stage, PROMPT.tokenizer.decode(ids, skip_special=False), tuple(stop_ids), tuple(stop)))
        said = [self.stages[stage][number % len(self.stages[stage])] for number in numbers]
        return [Written(text.removesuffix("..."), ended=not text.endswith("...")) for text in said]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Question: Is it far?\nAnswer: An hour.", ("Is it far?", "An hour.")),
        ("**Question:** Is it far?\n\n**Answer:** An hour.\nIt rains.", ("Is it far?", "An hour.\nIt rains.")),
        ("Sure!\nQUESTION 1: a b?\nanswer: c\nQuestion 2: d?\nAnswer: e", ("a b?", "c")),
        ("Question: only this", None),
        ("Question:\nAnswer: c", None),
        ("Question: a?\nAnswer: ", None),
        ("", None),
    ],
)
def test_parsing(text, found):
    assert parse(text) == found


def test_passages_hold_whole_paragraphs():
    def cut(text: str, most: int) -> list[str]:
        return [passage.text for passage in passages([Record({"text": text}, "a.txt", 1)], most=most)]

    assert cut("one two\n\nthree\n \nfour five six\n", 3) == ["one two\n\nthree", "four five six"]
    assert cut("a b c d e f g", 3) == ["a b c", "d e f", "g"] and cut(" \n\n", 3) == []
    assert " ".join(" ".join(cut("a b\n\nc d e f g\n\nh", 4)).split()) == "a b c d e f g h", "nothing is lost"
    with pytest.raises(DataError, match="rows.jsonl:3: has no 'text'; instructions are made from raw text"):
        list(passages([Record({"messages": []}, "rows.jsonl", 3)], most=3))


def test_grounded_counts_longer_words():
    assert grounded("Bees store honey in wax.", "The bees make honey.") == 2 / 3  # bees, store, honey
    assert grounded("It is so", "so it goes") == 2 / 3 and grounded("?", "a") == 0.0


@pytest.mark.concept("X.44", part="data/synthesis.py")
def test_from_text_keeps_what_the_text_says():
    passage = [
        Passage("Bees gather nectar and store honey in combs of wax.", "a.txt:1"),
        Passage("Rain falls on <|im_end|> hills.", "a.txt:2"),
    ]
    script = Script(write=["Question: What do bees store?\nAnswer: Bees store honey.", "", "Question: Who won?\nAnswer: The other team won.", "",
                           "nothing of use", "", "Question: What do bees store?\nAnswer: Bees store..."])  # fmt: skip
    drafts = FromText().drafts(range(7), prompt=PROMPT, passages=passage, write=script)
    assert [draft.trouble and draft.trouble[:14] for draft in drafts] == [
        None, "cannot be aske", "not about the ", "cannot be aske", "no question an", "cannot be aske", "cut off",
    ]  # fmt: skip
    assert (drafts[0].question, drafts[0].answer, drafts[0].source) == ("What do bees store?", "Bees store honey.", "a.txt:1")
    assert [draft.number for draft in drafts] == list(range(7)) and "<|im_end|>" in drafts[1].trouble
    assert tally(drafts) == {
        "asked": 7, "parsed": 2, "parsed share": 2 / 7, "accepted": 1,
        "troubles": {"cannot be asked": 3, "cut off": 1, "no question and answer": 1, "not about the text": 1},
    }  # fmt: skip
    asked = script.asked[0][1]
    assert asked.startswith("<|im_start|>user\nRead the text.") and asked.endswith("of wax.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.concept("X.44", part="data/synthesis.py")
def test_magpie_gives_only_the_beginning_of_a_users_turn():
    script = Script(
        ask=["How far is it?", "Hm", " Is it open?\n", "Stop <|im_end|> now", "So long..."], answer=["An hour.", "", "Is it open"]
    )
    drafts = Magpie().drafts(range(5), prompt=PROMPT, passages=[], write=script)
    end = PROMPT.tokenizer.id("<|im_end|>")
    assert {asked for asked in script.asked if asked[0] == "ask"} == {("ask", "<|im_start|>user\n", (end,), ())}
    answers = [asked[1] for asked in script.asked if asked[0] == "answer"]
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert answers == [turn.format("How far is it?"), turn.format("Is it open?")]
    assert [draft.trouble and draft.trouble[:14] for draft in drafts] == [
        None, "a question of ", "the answer rep", "cannot be aske", "cut off",
    ]  # fmt: skip
    assert tally(drafts)["parsed"] == 2 and tally(drafts)["accepted"] == 1
    steered = Script(ask=["How far is it?"], answer=["An hour."])
    Magpie(system="You know roads.").drafts([0], prompt=PROMPT, passages=[], write=steered)
    assert steered.asked[0][1] == "<|im_start|>system\nYou know roads.<|im_end|>\n<|im_start|>user\n"
    assert steered.asked[1][1].startswith("<|im_start|>system\nYou know roads.<|im_end|>\n<|im_start|>user\nHow far is it?")


def test_where_a_users_turn_ends():
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + ' [END]\n' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    opening = user_opening(Prompt.of(tokenizer(), plain, None, None))
    assert opening.stop == ("[END]",) and opening.stop_ids == () and tokenizer().decode(opening.ids) == "user: "
    silent = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="writes nothing before a user's words"):
        user_opening(Prompt.of(tokenizer(), silent, None, None))
    unended = "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
    with pytest.raises(DataError, match="no telling where they end"):
        user_opening(Prompt.of(tokenizer(), unended, None, None))
    shouting = "{% for m in messages %}{{ 'u ' + m.content | upper + ' e' }}{% endfor %}"
    with pytest.raises(DataError, match="does not write what a user says as it is"):
        user_opening(Prompt.of(tokenizer(), shouting, None, None))
    with pytest.raises(ConfigError, match="this model has no chat template"):
        check_template(Prompt.of(tokenizer(), None, None, None))


def test_a_real_template_has_a_users_turn():
    """The ids before the user's words are those that serving sends, what begins a text among them, once."""
    path: Path = asset("tokenizer-llama3")
    text = Tokenizer.load(path)
    prompt = Prompt.load(path, text)
    opening = user_opening(prompt)
    assert opening.stop_ids == (text.id("<|eot_id|>"),) and opening.ids.count(text.bos) == 1
    served = prompt.generation([{"role": "user", "content": "Hello there"}])
    assert served[: len(opening.ids)] == opening.ids and text.decode(served[len(opening.ids) :]).startswith("Hello there")


def test_methods_are_parts():
    for name, member in Method.registry.items():
        assert validate(Method, member.tiny().to_dict()) == member.tiny() and member.tiny().kind == name
    with pytest.raises(ConfigError, match="ask"):
        validate(Method, {"kind": "from_text", "ask": "no place for the passage"})
