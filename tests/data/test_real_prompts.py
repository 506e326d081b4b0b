"""With the real prompt contract and real tokenizers: the bank holds its rows, id for id, and trains answers alone."""

from __future__ import annotations

import pytest

from tests.assets import asset
from tests.data.fakes import talk
from trivium.data.inspect import paint, spans
from trivium.data.prepare import prepare
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer

ANSWERS = ("Grüße! 你好 🙂", "Forty-two.")
CHAT = talk("Say hello in three ways", ANSWERS[0], "And six times seven?", ANSWERS[1])


@pytest.fixture(scope="module", params=["llama3", "qwen3", "gemma3"])
def prompt(request: pytest.FixtureRequest) -> Prompt:
    directory = asset(f"tokenizer-{request.param}")
    return Prompt.load(directory, Tokenizer.load(directory))


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["all", "last"])
def test_the_bank_holds_the_rows_of_the_contract(prompt: Prompt, turns):
    prepared = prepare([{"messages": CHAT}], prompt, length=512, turns=turns)
    got = [(ids.tolist(), targets.tolist()) for ids, targets in map(prepared.row, range(len(prepared)))]
    assert got == [(row.ids, row.targets) for row in prompt.rows(CHAT, turns=turns)]


def test_answers_alone_are_trained_and_shown(prompt: Prompt):
    prepared = prepare([{"messages": CHAT}], prompt, length=512)
    rows = [spans(prepared, row, prompt.tokenizer) for row in range(len(prepared))]
    trained = [span.text for row in rows for span in row if span.trained]
    assert len(trained) == 2
    for text, answer in zip(trained, ANSWERS, strict=True):
        stop = text.removeprefix(text[: text.index(answer)] + answer)
        assert stop.strip() in {prompt.tokenizer.token(stop_id) for stop_id in prompt.stops}
    for row in rows:
        assert "".join(span.text for span in row if not span.trained).count("Say hello in three ways") == 1
    for number, row in enumerate(rows):
        plain = "".join(span.text for span in row)
        assert plain == prompt.tokenizer.decode(prepared.row(number)[0].tolist(), skip_special=False)
        assert paint(row, color=False).replace("⟦", "").replace("⟧", "") == plain


def test_a_turn_can_be_switched_off(prompt: Prompt):
    messages = [dict(message) for message in CHAT]
    messages[1]["train"] = False
    prepared = prepare([{"messages": messages}], prompt, length=512)
    shown = "".join(span.text for row in range(len(prepared)) for span in spans(prepared, row, prompt.tokenizer) if span.trained)
    assert ANSWERS[1] in shown and ANSWERS[0] not in shown


def test_plain_text_and_completions(prompt: Prompt):
    prepared = prepare([{"text": "A document.\n" * 40}], prompt, length=64)
    row = prompt.text("A document.\n" * 40)
    assert prepared.supervised == sum(row.targets) == len(row.ids) - 1
    prepared = prepare([{"prompt": "2 + 2 =", "completion": " 4"}], prompt, length=64)
    row = prompt.completion("2 + 2 =", " 4")
    assert (prepared.row(0)[0].tolist(), prepared.row(0)[1].tolist()) == (row.ids, row.targets)
