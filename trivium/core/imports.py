"""Parts from a file of one's own: run it, and what it registers is known in every spec, command and registry.

Only what the user names is run, by `--import FILE` or by `import_file`; a model directory never names code to run. Packages
that are installed need neither: their entry points under `trivium.parts` are found by themselves.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from .errors import ConfigError, FileError, TriviumError


def import_file(path: Path | str) -> ModuleType:
    """The module in the Python file `path`, under the file's name; a file that was imported already is not run again.

    Raises `FileError` where there is no such file, `ConfigError` for a name that another module has, `TriviumError` for a file
    that fails, with the line that does.
    """
    path = Path(path).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise FileError(f"{path}: is no Python file that could be imported")
    name = path.stem
    if (known := sys.modules.get(name)) is not None:
        if known.__spec__ is not None and known.__spec__.origin == str(path):
            return known
        raise ConfigError(f"{path}: a module called {name!r} is there already: give the file another name", field="import", value=str(path))
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None and description.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(description)
    try:
        description.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, TriviumError):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise TriviumError(f"{path}{f', line {at}' if at else ''}: {type(error).__name__}: {error}") from error
    return module
