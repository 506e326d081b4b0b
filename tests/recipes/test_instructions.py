"""Instruction tuning: chat and Alpaca templates as transformers renders and masks them, many tasks in one run, and a base model that gets
a template and keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.recipes.toys import bundle
from trivium.core.errors import ConfigError, FileError
from trivium.core.spec import validate
from trivium.data.batches import Batches
from trivium.data.prepare import prepare
from trivium.recipes.load import Bundle, load, templated
from trivium.recipes.sft import SFT, sft
from trivium.text.named import TEMPLATES, template_of

TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Name the fruit.\nstone apple chair"}, {"role": "assistant", "content": "apple"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Größe in cm?"},
        {"role": "assistant", "content": "zwölf – 12"},
        {"role": "user", "content": "And in mm?"},
        {"role": "assistant", "content": " 120"},
    ],
]
ALPACA = [
    {"instruction": "Name the fruit.", "input": "stone apple chair", "output": "apple"},
    {"instruction": "Say hello.", "input": "", "output": "Hello"},
    {"instruction": "And now?", "output": "Bye", "system": "Be polite.", "history": [["Say hello.", "Hello"]]},
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    path = bundle().save(tmp_path_factory.mktemp("theirs") / "model")
    return transformers.AutoTokenizer.from_pretrained(path)


def rendered(theirs: transformers.PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """transformers' ids and assistant mask of a conversation."""
    found = theirs.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(found["input_ids"]), [bool(on) for on in found["assistant_masks"]]


@pytest.mark.concept("T06.02", part="text/named.py")
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_and_masked_as_transformers_does(name: str, theirs):
    """As far as the last answer's end, behind which nothing is trained."""
    mine = templated(bundle(), template_of(name)).prompt
    assert mine.stops[0] == mine.tokenizer.eos and not mine.notes
    for messages in TALKS:
        (row,) = mine.rows(messages)
        ids, mask = rendered(theirs, TEMPLATES[name], messages)
        size = len(row.ids)
        assert row.ids == ids[:size] and row.targets == mask[:size] and not any(mask[size:])
        asked = theirs.apply_chat_template(messages[:-1], chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False)
        assert mine.generation(messages[:-1]) == list(asked) == row.ids[: len(asked)]


@pytest.mark.concept("T06.02", part="data/formats.py")
@pytest.mark.parametrize("name", TEMPLATES)
def test_alpaca_rows_are_conversations(name: str, theirs):
    """Instruction, input, system and history: token for token the conversation that they stand for."""
    bank = prepare(ALPACA, templated(bundle(), template_of(name)).prompt, length=512, packing="none")
    talks = [
        TALKS[0],
        [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello"}],
        [
            {"role": "system", "content": "Be polite."},
            {"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Bye"},
        ],
    ]  # fmt: skip
    assert len(bank) == 3
    for row, messages in enumerate(talks):
        ids, mask = rendered(theirs, TEMPLATES[name], messages)
        ours, targets = bank.row(row)
        assert ours.tolist() == ids[: len(ours)] and targets.tolist() == mask[: len(ours)]


@pytest.mark.concept("T06.02", part="data/batches.py")
def test_many_tasks_are_mixed_evenly():
    """A mixture deals every task its share all along, not one after another."""
    prompt = templated(bundle(), template_of("alpaca")).prompt
    tasks = [[{"instruction": f"Task {task}, number {n}.", "output": f"{task * n}"} for n in range(30)] for task in range(5)]
    sets = [(prepare(rows, prompt, length=128), 1) for rows in tasks]
    batches = Batches(sets, seed=0, rows=5)
    for i in range(0, 40, 4):
        seen = [number for step in range(i, i + 4) for number, _ in batches.bins(step)]
        assert all(2 <= seen.count(task) <= 6 for task in range(5))


def base() -> Bundle:
    """A model without a chat template."""
    found = bundle()
    return Bundle(**{**vars(found), "prompt": type(found.prompt).of(found.tokenizer, None, found.generation_config, None)})


@pytest.mark.parametrize("adapter", [None, {"rank": 2}], ids=["full", "adapter"])
@pytest.mark.parametrize("template", ["alpaca", "chatml", "file"])
def test_a_base_model_gets_a_template_and_keeps_it(tmp_path: Path, adapter, template: str):
    path, rows, file = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    base().save(path)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    file.write_text(TEMPLATES["alpaca"].replace("###", "##"))
    asked = {"model": str(path), "data": [str(rows)], "out": str(tmp_path / "run"), "length": 512, "adapter": adapter,
             "train": {"steps": 2, "rows": 1, "precision": "fp32"}}  # fmt: skip
    with pytest.raises(Exception, match="no chat template"):
        sft(validate(SFT, asked))
    run = sft(validate(SFT, {**asked, "template": str(file) if template == "file" else template}))
    again, expected = load(run.path), templated(base(), template_of(str(file) if template == "file" else template)).prompt
    assert again.prompt.generation(TALKS[1][:2]) == expected.generation(TALKS[1][:2]) and again.prompt.stops == expected.stops
    assert load(path).prompt.template is None
    ids = torch.tensor([again.prompt.generation(TALKS[0][:1])])
    torch.testing.assert_close(again.model(ids).logits, run.model(ids).logits, rtol=0, atol=1e-5)


def test_templates_that_are_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        template_of("alpacca")
    with pytest.raises(FileError, match="cannot be read"):
        template_of(str(tmp_path / "none.jinja"))
