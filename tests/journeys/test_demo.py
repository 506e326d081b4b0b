"""The demo at toy size: every step runs, the report stands alone, the commands that it prints are what was run."""

from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.recipes.toys import Done, Trivium

pytestmark = pytest.mark.slow

TOY = ("--train_rows", "24", "--test_rows", "4", "--length", "256", "--adapter.rank", "4")
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what refers to something outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.outside += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.outside += [tag] if tag in ("script", "link", "iframe", "img", "object", "embed") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def done(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The demo's folder, and its facts."""
    from trivium.core import config
    from trivium.recipes.demo import Demo, demo

    out = tmp_path_factory.mktemp("demo") / "out"
    flags = [(name[2:], value) for name, value in zip(TOY[::2], TOY[1::2], strict=True)]
    facts = demo(config.resolve(Demo, (), [("model", str(toy)), ("out", str(out)), *flags]).spec)
    return out, facts


def again(trivium: Trivium, toy: Path, out: Path) -> Done:
    return trivium.ok("demo", "--model", toy, "--out", out, *TOY, "--json")


def test_every_step_leaves_what_it_says(done):
    out, facts = done
    assert all(check["pass"] for check in facts["checks"]) and all(check["pass"] for check in facts["reload"])
    assert {check["by"] for check in facts["reload"]} == {"trivium", "transformers"}
    assert facts["baseline"]["value"] < 0.5 and facts["merge"]["maps"] == 14 and facts["answer"]["answer"]
    for name in ("base/model.safetensors", "run/adapter/adapter_model.safetensors", "model/trivium.json", "results/after.json"):
        assert (out / name).is_file(), name
    lineage = json.loads((out / "model" / "trivium.json").read_text())["lineage"]
    assert [step["step"] for step in lineage] == ["convert", "merge"]


def test_the_report_stands_alone(done):
    out, facts = done
    page = Page()
    written = (out / "report.html").read_bytes().decode()  # as it is: the toy may answer with line ends of any kind
    page.feed(written)
    page.close()
    assert page.open == [] and page.outside == [] and "url(" not in written and "@import" not in written
    for said in (*facts["commands"], "exact_match", facts["hashes"]["after"]["weights"], facts["answer"]["answer"], "transformers"):
        assert said.strip() in page.text, said


def test_a_second_demo_starts_from_what_is_there(done, trivium: Trivium, toy: Path):
    out, facts = done
    kept = ("base/model.safetensors", "results/before.json", "results/after.json")
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    repeated = again(trivium, toy, out)
    assert repeated.json["gain"] == facts["gain"] and repeated.json["merge"] == facts["merge"]
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert "going on from" in repeated.err and "measured before" in repeated.err


def test_its_commands_are_what_it_did(done, trivium: Trivium):
    """Each, typed again, finds its work done or does the same."""
    out, facts = done
    for command in facts["commands"]:
        words = shlex.split(command)
        assert words[0] == "trivium"
        trivium.ok(*words[1:])
    after = json.loads((out / "results" / "after.json").read_text())
    assert after["metrics"]["exact_match"]["value"] == facts["gain"]["after"]
    assert after["hashes"] == facts["hashes"]["after"]


def test_a_dry_run_does_nothing(trivium: Trivium, tmp_path: Path):
    shown = trivium.ok("demo", "--seed", "7", "--adapter.rank", "4", "--dry-run", "--json").json
    assert shown["seed"] == 7 and shown["adapter"]["rank"] == 4 and list(tmp_path.iterdir()) == []
