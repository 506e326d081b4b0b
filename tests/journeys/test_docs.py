"""The documentation site says what is true: its pages run from top to bottom, and what is generated is current.

Each page is followed as a reader would, in a folder of its own: files with a title are written, commands and Python run, at toy
size. Whatever that leaves on disk is then opened by other libraries. A page whose front matter says `after: PAGE` goes on in
that page's folder.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import gguf
import peft
import pytest
import safetensors
import tokenizers
import transformers
import yaml

from docs import generate
from tests.journeys import test_readme as readme
from tests.recipes.toys import Trivium
from trivium import cli
from trivium.io.hf import families

DOCS = generate.DOCS
WRITTEN = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.parent.name != "api")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# What makes the long commands short; options that come last win.
TOY = {
    "pretrain": "--train.steps 4 --train.rows 2 --length 64",
    "demo": "--train_rows 6 --test_rows 2 --length 256 --adapter.rank 2",
    "demo --from-scratch": "--megabytes 0.05 --vocab 300 --held_out 1 --length 64 --train.rows 2 --train.steps 3 --preset tiny-llama",
    "doctor": "--quick",
    # a toy's end of turn (token 2), made likely, so that it ends what it says
    "data synthesize": '--count 12 --sampling.max_tokens 24 --sampling.logit_bias {"2":4}',
}
every_page = pytest.mark.parametrize("page", WRITTEN)


def source(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(language, title or "", body) of each fenced block, in order."""
    for found in BLOCK.finditer(source(page)):
        yield found[1], found[2] or "", found[3]


def before(page: str) -> str | None:
    """The page that `page` goes on from."""
    front = re.match(r"---\nafter: (\S+)\n---\n", source(page))
    return front[1] if front else None


RUN = [page for page in WRITTEN if any(language in ("sh", "python") and not title for language, title, _ in blocks(page))]


class Reader:
    """Follows a page in the current folder."""

    def __init__(self, trivium: Trivium, toy: Path):
        self.trivium, self.toy = trivium, toy
        self.seen: set[str] = set()

    def follow(self, page: str) -> None:
        names: dict[str, object] = {}
        for language, title, body in blocks(page):
            if title:
                Path(title).parent.mkdir(parents=True, exist_ok=True)
                Path(title).write_text(re.sub("^model: smollm2$", f"model: {self.toy}", body, flags=re.MULTILINE), encoding="utf-8")
            elif language == "python":
                exec(compile(body.replace('"smollm2"', repr(str(self.toy))), page, "exec"), names)
            elif language == "sh":
                for line in body.replace("\\\n", " ").splitlines():
                    self.type(line)

    def type(self, line: str) -> None:
        """One line of a shell: a command of ours, perhaps with a file piped into it; `make` is left to its own tests."""
        words, given = shlex.split(line, comments=True), ""
        if "|" in words:
            assert words[0] == "cat" and words[2] == "|", line
            given, words = Path(words[1]).read_text(encoding="utf-8"), words[3:]
        if not words or words[0] == "make":
            return
        command = cli.find(words[1:])
        assert words[0] == "trivium" and command is not None, line
        self.seen.add(command.name)
        words = [str(self.toy) if word == "smollm2" else word for word in words[1:]]
        scratch = "--from-scratch" in words
        if command.name == "pretrain" and "--config" not in words:
            words += ["--preset", "tiny-llama"]
        words += TOY.get(command.name + " --from-scratch" * scratch, "").split()
        if command.name == "demo" and not scratch:  # it names no model
            words += ["--model", str(self.toy)]
        done = self.trivium.ok(*words, stdin=given)
        assert done.out or done.err, line


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    """Where pages were followed that others go on from."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_page_runs(page, folders, toy, trivium, tmp_path, tmp_path_factory, monkeypatch):
    reader = Reader(trivium, toy)
    if (earlier := before(page)) is not None:
        if earlier not in folders:
            folders[earlier] = tmp_path_factory.mktemp("page")
            monkeypatch.chdir(folders[earlier])
            reader.follow(earlier)
            reader.seen.clear()
        shutil.copytree(folders[earlier], tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
    reader.follow(page)
    for command in cli.COMMANDS:
        if page == generate.command_page(command.name).relative_to(DOCS).as_posix():
            assert command.name in reader.seen, f"{page} does not use its own command"
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            open_elsewhere(path)


def open_elsewhere(path: Path) -> None:
    """What other libraries know how to read, they must read."""
    match path.suffix:
        case ".safetensors":
            with safetensors.safe_open(path, "np") as tensors:
                assert list(tensors.keys())
        case ".gguf":
            read = gguf.GGUFReader(path)
            assert read.tensors and read.get_field("general.architecture").contents()
            if importlib.util.find_spec("llama_cpp"):
                model = importlib.import_module("llama_cpp").Llama(str(path), n_ctx=32, n_threads=1, verbose=False)
                assert len(list(itertools.islice(model.generate([1, 2, 3], temp=0.0), 3))) == 3
        case ".json":
            json.loads(path.read_text(encoding="utf-8"))
        case ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in path.read_text(encoding="utf-8").splitlines())
        case ".yaml":
            assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
        case ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    if path.name == "tokenizer.json":
        assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() > 256
    elif path.name == "adapter_config.json":
        said = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
        assert said == "TRIVIUM" or peft.PeftConfig.from_pretrained(str(path.parent)).peft_type == said  # ours, or PEFT's
    elif path.name == "config.json" and path.with_name("model.safetensors").is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] not in families:
            return  # a shape that only our own format can say
        _, said = getattr(transformers, config["architectures"][0]).from_pretrained(path.parent, output_loading_info=True)
        assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), said


@pytest.mark.slow
def test_generated_parts_are_current():
    """In a process of its own, whose registries hold nothing of other tests."""
    program = (
        "from docs.generate import made; "
        "print([path.name for path, text in made().items() if not path.exists() or path.read_text(encoding='utf-8') != text])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=readme.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", f"make docs writes what is old: {done.stdout}{done.stderr}"


def test_every_command_and_every_room_has_its_page():
    for command in cli.COMMANDS:
        page = generate.command_page(command.name)
        assert page.relative_to(DOCS).as_posix() in RUN, f"{page} needs an example that runs"
    rooms = {path.parent.name for path in (readme.ROOT / "trivium").glob("*/__init__.py")}
    shown = {room for page in WRITTEN for room in re.findall(r"<!-- files: (\w+) -->", source(page))} - {"end"}
    assert shown == rooms
    assert all(page in RUN for page in WRITTEN if page.startswith(("rooms/", "tutorials/")))


def test_navigation_holds_every_page():
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for item in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(item)

    project = tomllib.loads((readme.ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    listed = list(pages(project["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_site_builds(tmp_path):
    """Strictly: a link to a page or a heading that is not there is an error."""
    pytest.importorskip("zensical", reason="make docs installs it")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(readme.ROOT / "zensical.toml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*") if path.is_file()}
    assert {f"{path.relative_to(DOCS).as_posix()[:-3]}.html" for path in DOCS.rglob("*.md")} <= built
    assert not any(name.endswith((".py", ".pyc")) for name in built)


@every_page
def test_what_a_page_names_exists(page):
    """Links, files of the tree, tests, commands and options."""
    name = f"docs/{page}"
    links = [link for link in re.findall(r"\]\(([^)#]+)", re.sub(BLOCK, "", source(page))) if "://" not in link]
    assert [link for link in links if not ((DOCS / page).parent / link).exists()] == []
    titles = {title for _, title, _ in blocks(page)}
    paths = [code.partition("::")[0] for code in readme.inline(name) if code.startswith(readme.OURS) and " " not in code]
    assert [path for path in paths if not (readme.ROOT / path).exists() and path not in titles] == []
    readme.test_tests_that_are_named_exist(name)
    readme.test_commands_and_options_that_are_named_exist(name)
