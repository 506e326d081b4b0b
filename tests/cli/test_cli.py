"""The command line: what it imports, how fast it starts, its exit statuses, and errors of one line."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, SerializeAsAny

from trivium import cli
from trivium.cli.options import Configs, Flags, UsageError, answer, describe, pairs, resolve
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.core.imports import import_file
from trivium.core.registry import Registry
from trivium.core.spec import Part, Spec

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "huggingface_hub")


class Optim(Part, registry=Registry("optimizer")):
    pass


class Adam(Optim):
    kind: Literal["adam"] = "adam"
    lr: float = Field(1e-3, description="Learning rate.")


class Muon(Optim):
    kind: Literal["muon"] = "muon"
    momentum: float = 0.9


class Job(Spec):
    data: str = Field(description="Where the rows are.")
    optim: SerializeAsAny[Optim] = Adam()


def run(*tokens: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "trivium", *tokens], capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "code",
    [
        "import trivium; dir(trivium)",
        "from trivium.cli import main; main(['--help'])",
        "from trivium.cli import main; main(['concpts'])",
        "from trivium.cli import main; main(['concepts', '--help'])",
        "from trivium.cli import main; main(['concepts'])",
        "from trivium.cli import build; print(build().generate_completion(shell='bash'))",
    ],
)
def test_light_commands_import_no_torch(code):
    check = f"{code}\nimport sys; heavy = [m for m in {HEAVY} if m in sys.modules]; assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("code", "limit"), [("import trivium", 0.15), ("from trivium.cli import main; main(['--help'])", 0.4)])
def test_starting_is_fast(code, limit, note):
    def seconds(program: str) -> float:
        """Processor time, which other processes on the machine lengthen less than the clock's."""
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, cwd=ROOT) as process:
            used = os.wait4(process.pid, 0)[2]
            process.returncode = 0
        return used.ru_utime + used.ru_stime

    best = min(seconds(code) for _ in range(5))
    note(f"{code}: {best:.3f} s of {limit} s, with the interpreter's own start ({min(seconds('pass') for _ in range(3)):.3f} s)")
    assert best < limit


def test_exit_statuses_and_one_line_errors():
    assert run("--version").stdout == "0.1.0\n"
    for tokens, status, said in [
        (["concpts"], 2, 'error: Unknown command "concpts". Did you mean "concepts"?'),
        (["concepts", "--jsn"], 2, "error: Unknown option: --jsn. Did you mean --json? See: trivium concepts --help"),
        (["concepts", "perpetual motion"], 1, "error: unknown concept 'perpetual motion'"),
    ]:
        done = run(*tokens)
        assert done.returncode == status and done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_debug_shows_where_an_error_came_from():
    done = run("concepts", "perpetual motion", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "lab/concepts.py" in done.stderr


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "trivium", "concepts", "--json"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def interrupted() -> None:
    raise KeyboardInterrupt


def full() -> None:
    raise OSError(28, "No space left on device", "model.safetensors")


def broken() -> None:
    raise FileError("model.safetensors: truncated")


def fails() -> int:
    return 1


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("interrupted", 130, "interrupted\n"),
        ("full", 1, "error: No space left on device: model.safetensors\n"),
        ("broken", 1, "error: model.safetensors: truncated\n"),
        ("fails", 1, ""),
    ],
)
def test_what_a_command_may_raise(name, status, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "commands_of_this_test", sys.modules[__name__])
    commands = (cli.Command(name, f"commands_of_this_test:{name}", "x"),)
    monkeypatch.setattr(cli, "COMMANDS", commands)
    assert cli.main([name]) == status
    assert capsys.readouterr().err == said


def test_every_command_teaches(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for command in cli.COMMANDS:
        assert cli.main([*command.name.split(), "--help"]) == 0
        out = capsys.readouterr().out
        assert f"Try:\n  trivium {command.name}" in out, command.name
        assert "Parameters" in out and (command.spec is None or "Fields:" in out), command.name
    assert cli.main(["--help"]) == 0
    top = capsys.readouterr().out
    assert all(f" {command.name.split()[0]} " in top for command in cli.COMMANDS)


def test_commands_of_two_words_sit_in_a_group(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "commands_of_this_test", sys.modules[__name__])
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("data check", "commands_of_this_test:fails", "Check."),))
    monkeypatch.setattr(cli, "GROUPS", {"data": "Data."})
    assert cli.main(["data", "check"]) == 1
    assert cli.main(["data", "chek"]) == 2 and 'Did you mean "check"' in capsys.readouterr().err
    assert cli.find(["data", "check", "--x"]) == cli.COMMANDS[0] and cli.find(["data"]) is None


def test_flags_become_pairs():
    assert pairs(["--optim.lr", "2e-5", "--a=b=c", "--packed", "--n", "-1", "--last"]) == [
        ("optim.lr", "2e-5"),
        ("a", "b=c"),
        ("packed", "true"),
        ("n", "-1"),
        ("last", "true"),
    ]
    with pytest.raises(UsageError, match="'x' belongs to no option"):
        pairs(["--a", "1", "x"])


def test_files_and_flags_become_a_spec(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text("data: rows.jsonl\noptim: {lr: 1}\n")
    spec = resolve(Job, [path], ["--optim", "muon", "--momentum", "0.5"], aliases={"momentum": "optim.momentum"})
    assert spec == Job(data="rows.jsonl", optim=Muon(momentum=0.5))
    assert "warning: optim.lr" in capsys.readouterr().err
    for flags in (["--optim.lrr", "1"], ["--dta", "x"]):
        with pytest.raises(UsageError, match="did you mean"):
            resolve(Job, [path], flags, aliases={})
    with pytest.raises(UsageError, match="No such file"):
        resolve(Job, [tmp_path / "no.yaml"], [], aliases={})


def teach(*flags: Flags, config: Configs = (), dry_run: bool = False, json: bool = False) -> int:
    """Teach it."""
    assert dry_run
    answer(resolve(Job, config, flags, aliases={"learning_rate": "optim.lr"}), as_json=json)
    return 0


def test_a_command_driven_by_a_spec(tmp_path, monkeypatch, capsys):
    here = "commands_of_this_test"
    monkeypatch.setitem(sys.modules, here, sys.modules[__name__])
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("teach", f"{here}:teach", "Teach.", spec=f"{here}:Job"),))
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("data: rows.jsonl\noptim: {lr: 1}\n")
    second.write_text("optim: {lr: 2}\n")
    tokens = ["teach", "--config", str(first), "--data", "more.jsonl", "--config", str(second), "--dry-run", "--json"]
    assert cli.main(tokens) == 0
    assert json.loads(capsys.readouterr().out) == {"data": "more.jsonl", "optim": {"kind": "adam", "lr": 2.0}}
    assert cli.main([*tokens, "--learning-rate", "3e-4"]) == 0
    assert json.loads(capsys.readouterr().out)["optim"]["lr"] == 3e-4
    assert cli.main([*tokens, "--optim.lrr", "3e-4"]) == 2
    assert capsys.readouterr().err == "error: optim.lrr: unknown field 'lrr'; did you mean 'lr'? (known: kind, lr) (--optim.lrr)\n"
    assert cli.main(["teach", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config" in out and "Learning rate." in out and "--flags" not in out.lower()


def test_answers_go_to_stdout(capsys):
    answer([{"a": 1, "b": None}], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"a": 1, "b": None}]
    answer([{"a": 1, "b": None}], as_json=False)
    assert capsys.readouterr().out == "a  b\n-  -\n1\n"
    answer(Job(data="x"), as_json=False)
    assert capsys.readouterr().out == "data: x\noptim:\n  kind: adam\n  lr: 0.001\n"
    answer(Job(data="x"), as_json=True)
    assert json.loads(capsys.readouterr().out)["optim"] == {"kind": "adam", "lr": 1e-3}


def test_fields_of_a_spec_are_described(monkeypatch):
    monkeypatch.setitem(sys.modules, "commands_of_this_test", sys.modules[__name__])
    lines = [" ".join(line.split()) for line in describe("commands_of_this_test:Job").splitlines()]
    assert (
        "--data (required) Where the rows are." in lines
        and "--optim adam one of adam, muon" in lines
        and "--optim.lr 0.001 Learning rate." in lines
    )


@pytest.mark.slow
def test_doctor_reports_facts_and_advice():
    found = json.loads(run("doctor", "--quick", "--json").stdout)
    assert set(found) == {"versions", "machine", "torch", "gpu", "cache", "advice"}
    assert found["versions"]["trivium"] == "0.1.0" and found["machine"]["cores"] >= 1


def test_doctor_measures_and_advises():
    from trivium.recipes import doctor

    report = doctor.examine(size=64)
    assert all(rate > 0 for rate in report["matmul"].values())
    report["torch"]["threads"], report["machine"]["cores"], report["machine"]["memory free GiB"] = 8, 2, 1.0
    report["cache"]["disk free GiB"], report["matmul"] = 0.5, {"fp32 TFLOP/s": 2.0, "bf16 TFLOP/s": 1.0}
    report["torch"]["cuda build"], report["gpu"] = "13.0", {"devices": 0}
    assert len(doctor._advice(report)) == 5


PART = """
from typing import Literal
from trivium.nn.activations import Activation, SiLU

class Loud(Activation):
    kind: Literal["loud"] = "loud"
    def build(self):
        return SiLU().build()
"""
LOUD = '{"dim": 8, "vocab": 9, "layers": ["a"], "blocks": {"a": {"ffn": {"kind": "mlp", "hidden": 4, "activation": "loud"}}}}'


@pytest.mark.slow
def test_import_makes_parts_known_where_the_user_says_so(tmp_path):
    """Before any command, as often as it is given; a file in or beside what is read is never run by itself."""
    (tmp_path / "loud.py").write_text(PART)
    (tmp_path / "model.json").write_text(LOUD)
    said = run("inspect", str(tmp_path / "model.json"))
    assert said.returncode == 1 and "unknown activation 'loud'" in said.stderr and said.stderr.count("\n") == 1
    for words in (("--import", str(tmp_path / "loud.py")), (f"--import={tmp_path / 'loud.py'}", "--import", str(tmp_path / "loud.py"))):
        done = run("inspect", *words, str(tmp_path / "model.json"), "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["spec"]["blocks"]["a"]["ffn"]["activation"]["kind"] == "loud", done.stderr


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (None, 1, "is no Python file that could be imported"),
        ("x = 1\ny = x +\n", 1, "line 2: SyntaxError"),
        ("x = 1\n\nundefined\n", 1, "line 3: NameError: name 'undefined' is not defined"),
        ("", 2, "--import needs the file to import"),
    ],
)
def test_import_of_what_fails_is_one_line(tmp_path, text, status, message):
    file = tmp_path / "part.py"
    if text:
        file.write_text(text)
    done = run("concepts", "--import", *(() if text == "" else (str(file),)))
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_imported_files_are_run_once_and_take_no_other_modules_name(tmp_path):
    file = tmp_path / "counted_part.py"
    file.write_text("import builtins\nbuiltins.counted = getattr(builtins, 'counted', 0) + 1\n")
    assert import_file(file) is import_file(str(file)) and builtins.counted == 1  # type: ignore[attr-defined]
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="called 'json' is there already"):
        import_file(tmp_path / "json.py")
    file.with_name("failing_part.py").write_text("raise RuntimeError('first try')")
    for _ in range(2):
        with pytest.raises(TriviumError, match="line 1: RuntimeError: first try"):
            import_file(file.with_name("failing_part.py"))


class Plan(Spec):
    job: Job | None = Field(None, description="What is run.")
    others: dict[str, Job] = Field({}, description="What else is.")


def test_help_shows_fields_of_what_may_be_absent_and_of_what_the_user_names():
    rows = {line.split()[0]: line for line in describe(f"{__name__}:Plan").splitlines() if line.startswith(("--job", "--others"))}
    assert list(rows) == [
        "--job", "--job.data", "--job.optim", "--job.optim.lr",
        "--others", "--others.NAME.data", "--others.NAME.optim", "--others.NAME.optim.lr",
    ]  # fmt: skip
    assert "one of adam, muon" in rows["--job.optim"] and "null" in rows["--job"] and "(required)" in rows["--others.NAME.data"]
