"""Configuration: YAML 1.2, bounds, overlays, flags, aliases, origins in errors, diffs."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SerializeAsAny

from trivium.core import config
from trivium.core.errors import ConfigError, FileError
from trivium.core.registry import Registry
from trivium.core.spec import Part, Spec


class Optim(Part, registry=Registry("optimizer")):
    pass


class Adam(Optim):
    kind: Literal["adam"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)


class Muon(Optim):
    kind: Literal["muon"] = "muon"
    lr: float = 2e-2
    momentum: float = 0.95


class Block(Spec):
    width: int = 4
    optim: SerializeAsAny[Optim] | None = None


class Job(Spec):
    name: str = "job"
    steps: int = 10
    optim: SerializeAsAny[Optim] = Adam(lr=5e-4)
    passes: tuple[SerializeAsAny[Optim], ...] = ()
    blocks: dict[str, Block] = {}
    inner: Block = Block(width=8, optim=Muon(momentum=0.5))
    table: ClassVar[dict[str, str]] = {"learning_rate": "optim.lr", "max-steps": "steps"}


def job(*texts: str, flags=(), tmp_path=None) -> config.Resolved[Job]:
    paths = []
    for i, text in enumerate(texts):
        paths.append(tmp_path / f"c{i}.yaml")
        paths[-1].write_text(text)
    return config.resolve(Job, paths, flags, aliases=Job.table)


def test_yaml_is_read_as_1_2():
    text = "[1e-5, 1E3, no, on, yes, y, 12:30:00, 2001-01-01, 0o17, 010, 1_000, ~, null, true, .5, -.inf, 'true', 0x1F, <<, =]"
    expected = [
        1e-5,
        1e3,
        "no",
        "on",
        "yes",
        "y",
        "12:30:00",
        "2001-01-01",
        15,
        10,
        "1_000",
        None,
        None,
        True,
        0.5,
        float("-inf"),
        "true",
        31,
        "<<",
        "=",
    ]
    found = config.scalar(text, name="x")
    assert found == expected and [type(x) for x in found] == [type(x) for x in expected]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), plain, max_size=4))
def test_dump_reads_back(data):
    assert config.scalar(config.dump(data), name="x") == data or data == {}


@given(st.text(alphabet="0123456789eE+-._:xonyesf~", min_size=1, max_size=6))
def test_words_are_quoted_where_yaml_1_1_would_misread_them(word):
    text = config.dump({"a": word})
    assert config.scalar(text, name="x") == {"a": word} == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"c0\.yaml:3: 'a' is given twice"),
        ("a: [1, 2\n", r"c0\.yaml:\d: not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", r"c0\.yaml:1"),
        ("a: !!python/name:os.system x\n", r"c0\.yaml:1: tags such as"),
        ("- 1\n", "a mapping"),
        ("a: " + "9" * 5000, "c0.yaml:1"),
        ("? [1]\n: 2\n", "c0.yaml:1: a field name must be a word"),
        ("a: &a [*a]\n", "nested deeper"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested deeper"),
        ("a: 1\n--- \nb: 2\n", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("steps: many\n", r"steps: .*\(given: 'many'\) \(.*c0\.yaml:1\)"),
        ("steps: 1\noptim:\n  lrr: 2\n", r"optim\.lrr: unknown field 'lrr'; did you mean 'lr'.*c0\.yaml:3"),
        ("optim:\n  kind: muom\n", r"optim\.kind: .*did you mean 'muon'.*c0\.yaml:2"),
    ],
)
def test_bad_yaml_is_one_clear_error(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        job(text, tmp_path=tmp_path)


def test_alias_bombs_are_refused(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="counting what aliases repeat"):
        job("\n".join(lines), tmp_path=tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    big, binary = tmp_path / "big.yaml", tmp_path / "b.yaml"
    big.write_text("a: " + "x" * config.MAX_BYTES)
    binary.write_bytes(b"a: \xff")
    for path, message in [
        (big, "larger than"),
        (binary, "not UTF-8 at byte 3"),
        (tmp_path / "no.yaml", "No such file"),
        (tmp_path / "a.toml", "a .yaml"),
    ]:
        with pytest.raises(FileError, match=message):
            config.load(path)


def test_json_configs(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"steps": 3, "optim": {"kind": "muon"}}')
    assert config.resolve(Job, [path]).spec == Job(steps=3, optim=Muon())
    for text, message in [
        ('{"a": 1, "a": 2}', "given twice"),
        ('{"a": 1,\n}', r"c\.json:2"),
        ("[" * 100_000, "nested"),
        ('{"a": ' + "9" * 5000 + "}", "not valid"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            config.load(path)


def test_later_files_win_and_flags_last(tmp_path):
    found = job("steps: 1\nname: a\noptim: {lr: 1}\n", "steps: 2\noptim: {betas: [0, 0]}\n", flags=[("steps", "3")], tmp_path=tmp_path)
    assert found.spec == Job(steps=3, name="a", optim=Adam(lr=1, betas=(0, 0))) and found.dropped == ()


def test_flags_take_dots_dashes_aliases_and_indices(tmp_path):
    text = "passes: [{kind: adam, lr: 1, betas: [0]}, muon]\nblocks: {full-attention: {width: 2}}\n"
    flags = [
        ("learning-rate", "2e-5"),
        ("max_steps", "7"),
        ("passes.0.lr", "3"),
        ("passes.1.momentum", "0.1"),
        ("blocks.full-attention.width", "5"),
        ("inner.width", "9"),
    ]
    spec = job(text, flags=flags, tmp_path=tmp_path).spec
    assert spec.optim == Adam(lr=2e-5) and spec.steps == 7
    assert spec.passes == (Adam(lr=3, betas=(0,)), Muon(momentum=0.1))
    assert spec.blocks["full-attention"].width == 5
    assert spec.inner == Block(width=9, optim=Muon(momentum=0.5))


def test_flags_become_what_the_field_holds(tmp_path):
    flags = [("name", "2024"), ("passes", "muon"), ("optim", "adam"), ("optim.betas", "0.5"), ("inner.width", "3")]
    assert job(flags=flags, tmp_path=tmp_path).spec == Job(
        name="2024", passes=(Muon(),), optim=Adam(betas=(0.5,), lr=5e-4), inner=Block(width=3, optim=Muon(momentum=0.5))
    )
    for text, value in [("no", "no"), ("1e-5", "1e-5"), ("true", "true")]:
        assert job(flags=[("name", text)], tmp_path=tmp_path).spec.name == value


def test_a_flag_into_a_list_keeps_everything_beside_it():
    class Stack(Spec):
        blocks: tuple[Block, ...] = ()

    base = {"blocks": [{"width": 1}, {"width": 2, "optim": {"kind": "adam", "lr": 1, "betas": [0]}}]}
    tree = config._single(("blocks", 1, "optim", "lr"), 7, "x", base)
    assert tree.data == {"blocks": [{"width": 1}, {"width": 2, "optim": {"kind": "adam", "lr": 7, "betas": [0]}}]}
    assert Stack(**tree.data).blocks[1].optim == Adam(lr=7, betas=(0,)) and base["blocks"][1]["optim"]["lr"] == 1


def test_a_part_without_kind_is_the_default_part_with_changes(tmp_path):
    assert job("optim: {betas: [0]}\n", tmp_path=tmp_path).spec.optim == Adam(lr=5e-4, betas=(0,))
    assert job("inner: {optim: {lr: 1}}\n", tmp_path=tmp_path).spec.inner == Block(width=8, optim=Muon(lr=1, momentum=0.5))
    assert job("optim: {kind: muon}\n", tmp_path=tmp_path).spec.optim == Muon(), "the old kind's default lr must not leak"


def test_an_overlay_that_changes_kind_keeps_common_fields_and_lists_the_rest(tmp_path):
    found = job("optim:\n  lr: 0.1\n  betas: [0.5]\n", "optim: {kind: muon}\n", tmp_path=tmp_path)
    assert found.spec.optim == Muon(lr=0.1)
    assert [line.split(" (")[0] for line in found.dropped] == ["optim.betas"] and "c0.yaml:3" in found.dropped[0]
    assert job("optim: {betas: [0.5]}", flags=[("optim", "muon")], tmp_path=tmp_path).dropped
    nested = job("blocks: {a: {optim: {kind: adam, betas: [1]}}}", "blocks: {a: {optim: {kind: muon}}}", tmp_path=tmp_path)
    assert nested.spec.blocks["a"].optim == Muon() and nested.dropped[0].startswith("blocks.a.optim.betas")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (("optim.lrr", "1"), r"optim\.lrr: unknown field 'lrr'; did you mean 'lr'.*\(--optim\.lrr\)"),
        (("learning_rat", "1"), "--learning_rat: unknown option 'learning_rat'; did you mean 'learning_rate'"),
        (("steps", "[1"), "--steps:1: not valid YAML"),
        (("passes.1.lr", "1"), "no index of a list of 1"),
        (("steps.x", "1"), "steps: "),
    ],
)
def test_wrong_flags_name_the_flag(flag, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        job("passes: [adam]", flags=[flag], tmp_path=tmp_path)


def test_resolved_spec_is_itself_a_config(tmp_path):
    spec = job("optim: {kind: muon, lr: 1}\nname: 'no'\n", flags=[("steps", "4")], tmp_path=tmp_path).spec
    assert job(config.dump(spec), tmp_path=tmp_path).spec == spec


def test_diff_shows_defaults_and_absent_sides():
    a, b = Job(steps=1), Job(steps=1, optim=Muon(lr=5e-4), passes=(Adam(),))
    assert config.diff(a, a) == []
    assert config.diff(a, b) == [
        ("optim.kind", "adam", "muon"),
        ("optim.betas", [0.9, 0.95], config.ABSENT),
        ("passes", [], config.ABSENT),
        ("optim.momentum", config.ABSENT, 0.95),
        ("passes.0.kind", config.ABSENT, "adam"),
        ("passes.0.lr", config.ABSENT, 1e-3),
        ("passes.0.betas", config.ABSENT, [0.9, 0.95]),
    ]
    assert config.diff({"a": 1, "b": True}, {"a": 1.0, "b": 1}) == [("a", 1, 1.0), ("b", True, 1)]


def test_a_flag_for_words_is_taken_as_it_stands():
    """Text that YAML would read as something else: a mapping, a comment, a number."""

    class Words(Spec):
        text: str = ""
        maybe: str | None = "x"
        many: tuple[str, ...] = ()

    for text in ("{question}", "Q: x", "#", "2024", "null", "a, b", "[1]"):
        assert config.resolve(Words, flags=[("text", text)]).spec.text == text
    assert config.resolve(Words, flags=[("maybe", "null")]).spec.maybe is None
    assert config.resolve(Words, flags=[("maybe", "Q: x")]).spec.maybe == "Q: x"
    assert config.resolve(Words, flags=[("many", "[a, b]")]).spec.many == ("a", "b")
