"""Every way to adapt a model, and every objective of preferences, has a page whose command uses it; test_docs.py runs it to its end."""

from __future__ import annotations

import re

import pytest

from docs import methods
from tests.journeys.test_docs import RUN, blocks, source
from trivium.adapt.adapter import Adapter
from trivium.adapt.lora import LoRA
from trivium.adapt.prefix import Prefix
from trivium.train.objectives import Objective
from trivium.train.preference import KTO, Preference
from trivium.train.rewards import BradleyTerry

PAGES = sorted({*methods.METHODS, *methods.OBJECTIVES})


def test_no_method_is_without_its_page():
    told = {step.kind for passes in methods.METHODS.values() for step in passes}
    assert {kind for kind, member in Adapter.registry.items() if member.__module__.startswith("trivium.")} <= told
    learned = {each.kind for found in methods.OBJECTIVES.values() for each in found}
    assert {kind for kind, member in Objective.registry.items() if issubclass(member, Preference | KTO | BradleyTerry)} <= learned
    assert {path.stem for path in methods.FOLDER.glob("*.md")} == {*PAGES, "index"}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_its_command_its_python_its_options_and_its_source(page):
    name = f"methods/{page}.md"
    text, languages = source(name), {language for language, title, _ in blocks(name) if not title}
    assert name in RUN and {"sh", "python"} <= languages
    commands = " ".join(body for language, _, body in blocks(name) if language == "sh")
    kinds = [step.kind for step in methods.METHODS.get(page, ())] + [each.kind for each in methods.OBJECTIVES.get(page, ())]
    assert all(kind in commands or kind in ("lora", "bradley_terry") for kind in kinds)  # those are what is done where nothing is said
    assert "**Choose it**" in text and re.search(r"^Source: .*(arXiv:\d{4}\.\d{4,5})", text, re.MULTILINE)


def test_counts_are_those_of_the_formula():
    """SmolLM2-135M: 30 layers of width 576, 9 heads and 3 key heads of 64, hidden 1536."""
    maps = (576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536)
    found = methods.count((LoRA(),))
    assert found.trained == 30 * 16 * maps and found.merges and found.saved == "`LORA`"
    prefix = methods.count((Prefix(),))
    assert prefix.trained == 2 * 30 * 16 * 192 and not prefix.merges and prefix.total == 134_515_008
