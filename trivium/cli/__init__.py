"""The command line: a tree of lazily imported commands, each a thin file that parses and calls one recipe.

`trivium --help`, completion and a misspelt command import none of the commands' recipes, and so no torch.
To add a command: write `cli/<name>.py` with one function whose docstring teaches (end it with "Try:" and examples), import
its recipe inside the function, and add one line to `COMMANDS`. A name of two words sits in a group of `GROUPS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import TriviumError

if TYPE_CHECKING:
    from cyclopts import App

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class UsageError(TriviumError):
    """A command line or a config that cannot be run as written; exit status 2."""


@dataclass(frozen=True)
class Command:
    """`target` is "module:function"; `spec`, "module:Class", makes `--help` list that spec's fields as options."""

    name: str
    target: str
    help: str
    spec: str | None = None


COMMANDS = (
    Command("demo", "trivium.cli.demo:demo", "A real model learns a task, proves it, and goes out.", "trivium.recipes.demo:Demo"),
    Command("pull", "trivium.cli.pull:pull", "Fetch a model by name, from a package, a hub or a path."),
    Command("push", "trivium.cli.push:push", "Send a model to the hub, with a card."),
    Command("inspect", "trivium.cli.inspect:inspect", "What a model is: spec, layers, sizes, hashes, lineage; or how two differ."),
    Command("verify", "trivium.cli.verify:verify", "Compare a model with independent readers, and with itself."),
    Command("generate", "trivium.cli.generate:generate", "Continue a text.", "trivium.infer.sampling:Sampling"),
    Command("chat", "trivium.cli.chat:chat", "Talk to a model, or ask it one thing.", "trivium.infer.sampling:Sampling"),
    Command("data inspect", "trivium.cli.data:inspect", "What rows become: numbers, and what is trained in them."),
    Command("data prepare", "trivium.cli.data:prepare", "Turn rows into a folder of tokens that training reads."),
    Command("data convert", "trivium.cli.data:convert", "Write rows in another format, and lose nothing."),
    Command(
        "data curate", "trivium.cli.data:curate", "Keep the good rows: dedup, lengths, scores, diversity.", "trivium.recipes.curate:Curate"
    ),
    Command("data decontaminate", "trivium.cli.data:decontaminate", "Take out rows that hold what an evaluation asks."),
    Command(
        "data synthesize",
        "trivium.cli.data:synthesize",
        "Let a model write instructions and answers.",
        "trivium.recipes.synthesize:Synthesize",
    ),
    Command("tokenizer train", "trivium.cli.tokenizer:train", "Train a tokenizer on text of any size."),
    Command("tokenizer encode", "trivium.cli.tokenizer:encode", "The tokens of a text."),
    Command("tokenizer inspect", "trivium.cli.tokenizer:inspect", "What a tokenizer is, and what it makes of text."),
    Command("pretrain", "trivium.cli.pretrain:pretrain", "Train a new model from text.", "trivium.recipes.pretrain:Pretrain"),
    Command("ablate", "trivium.cli.ablate:ablate", "Exchange parts, train all variants alike, compare.", "trivium.lab.ablate:Ablate"),
    Command("plan", "trivium.cli.plan:plan", "What a run would need: memory, disk, time; and whether it fits.", "trivium.recipes.plan:Ask"),
    Command("sft", "trivium.cli.sft:sft", "Teach a model from examples (supervised fine-tuning).", "trivium.recipes.sft:SFT"),
    Command(
        "prefer", "trivium.cli.prefer:prefer", "Teach a model which answers are better (DPO and its kin).", "trivium.recipes.prefer:Prefer"
    ),
    Command(
        "reward",
        "trivium.cli.reward:reward",
        "Train a reward model from pairs, or score rows with one.",
        "trivium.recipes.reward:RewardModel",
    ),
    Command(
        "classify train",
        "trivium.cli.classify:train",
        "Teach a model which class a text is of.",
        "trivium.recipes.classify:Classify",
    ),
    Command("classify predict", "trivium.cli.classify:predict", "Which class a text is of, or each row of a file."),
    Command("eval run", "trivium.cli.eval:run", "Measure a model on a task.", "trivium.recipes.evaluate:Eval"),
    Command("eval diff", "trivium.cli.eval:diff", "Compare two results, row by row."),
    Command("adapter inspect", "trivium.cli.adapter:inspect", "What an adapter changes, and by how much."),
    Command("adapter merge", "trivium.cli.adapter:merge", "Add an adapter into its base's weights."),
    Command("adapter unmerge", "trivium.cli.adapter:unmerge", "Take a merged adapter out again."),
    Command("adapter convert", "trivium.cli.adapter:convert", "Write an adapter as another method, rank, dtype, layout, or as GGUF."),
    Command("convert", "trivium.cli.convert:convert", "Write a model as a model directory, in another dtype or family, or as a GGUF file."),
    Command("runs", "trivium.cli.runs:runs", "The runs on this machine: list, compare, draw."),
    Command("concepts", "trivium.cli.concepts:concepts", "What works today, the part that does it, and its proof."),
    Command("doctor", "trivium.cli.doctor:doctor", "What this machine has, how fast it is, and what to watch."),
)
GROUPS = {  # of commands of two words
    "data": "Look at training data, convert, curate and prepare it.",
    "tokenizer": "Train tokenizers, and look inside.",
    "classify": "Train classifiers, and use them.",
    "eval": "Measure models, and compare results.",
    "adapter": "Merge adapters, take them out again, convert them, and look inside.",
}

HELP = """Trivium builds, adapts, measures and serves language models, from raw text to agent.

Every command explains itself: trivium COMMAND --help. Add --debug to see where an error came from, and --import FILE.py
to make parts of your own known (more than once for more files)."""


def find(tokens: Sequence[str]) -> Command | None:
    """The command that the first words name, if there is one."""
    for command in COMMANDS:
        words = command.name.split()
        if list(tokens[: len(words)]) == words:
            return command
    return None


def build(*, asked: Command | None = None) -> App:
    """The command tree. Only the command that is `asked` for may be imported; its help is then its docstring."""
    from cyclopts import App, Parameter

    from .. import __version__

    shown = Parameter(negative=(), show_default=lambda value: value if value not in (False, (), "") else None)
    app = App(
        name="trivium",
        help=HELP,
        help_format="plaintext",
        version=__version__,
        default_parameter=shown,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    app.register_install_completion_command(help="Complete commands and options in your shell.")
    groups = {name: App(name=name, help=text, help_format="plaintext", default_parameter=shown) for name, text in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for command in COMMANDS:
        *group, name = command.name.split()
        (groups[group[0]] if group else app).command(
            command.target, name=name, help=None if command is asked else command.help, help_format="plaintext"
        )
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 success, 1 failure, 2 usage, 130 interrupted."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in tokens
    tokens, imported = imports([token for token in tokens if token != "--debug"])
    try:
        status = _run(tokens, imported, debug=debug)
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:  # a run that saved itself says where, and how to go on
        print(str(stopped) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough (`trivium concepts | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def imports(tokens: Sequence[str]) -> tuple[list[str], list[str | None]]:
    """(what is left, the files of `--import FILE` and `--import=FILE`); None for one that is not named."""
    rest: list[str] = []
    files: list[str | None] = []
    words = iter(tokens)
    for word in words:
        if word == "--import":
            files.append(next(words, None))
        elif word.startswith("--import="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, files


def _run(tokens: list[str], imported: Sequence[str | None], *, debug: bool) -> int:
    from cyclopts import CycloptsError

    from ..core.imports import import_file
    from ..core.log import log

    asked = find(tokens)
    try:
        for file in imported:
            if not file:
                raise UsageError("--import needs the file to import")
            import_file(file)
        result = build(asked=asked)(tokens, exit_on_error=False, print_error=False)
        if asked is not None and asked.spec is not None and {"--help", "-h"} & set(tokens):
            from .options import describe

            print(describe(asked.spec))
        return result or 0
    except CycloptsError as error:
        if debug:
            raise
        log.error(f"{' '.join(str(error).split())} See: trivium {f'{asked.name} ' if asked else ''}--help")
        return USAGE
    except TriviumError as error:
        if debug:
            raise
        log.error(str(error))
        return USAGE if isinstance(error, UsageError) else FAILURE
    except OSError as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        log.error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return FAILURE
