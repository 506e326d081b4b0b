"""Compiles trivium/kernels/native.cpp while a wheel or an editable installation is built, if there is a C++ compiler.

One library for each instruction set; which one runs is chosen on the user's machine. Without a compiler, or where one
fails, the package installs all the same and runs on torch. CXX names the compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi")
X86 = {
    "plain": (),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "v4bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
}


class NativeHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        built = build(Path(self.root) / "trivium" / "kernels", warn=self.app.display_warning)
        if built:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"] += [f"/trivium/kernels/{path.name}" for path in built]


def build(folder: Path, *, warn: Any = print) -> list[Path]:
    """Compile what is not there yet, and return the libraries, those of older sources removed."""
    source = folder / "native.cpp"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        warn(f"no C++ compiler ({compiler[0]}): trivium runs on torch alone, some steps slower; install one and install again")
        return []
    recipe = source.read_bytes(), Path(__file__).stat().st_mtime
    digest = hashlib.sha256(recipe[0]).hexdigest()[:12]
    variants = X86 if platform.machine() in ("x86_64", "AMD64") else {"plain": ()}
    built = []
    for variant, flags in variants.items():
        library = folder / f"native-{variant}-{digest}.so"
        if not library.exists() or library.stat().st_mtime < recipe[1]:
            partial = library.with_suffix(f".{os.getpid()}.partial")
            done = subprocess.run([*compiler, *FLAGS, *flags, str(source), "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                warn(f"the native library was not built for {variant}: {done.stderr.strip()[-500:]}")
                partial.unlink(missing_ok=True)
                continue
            partial.replace(library)
        built.append(library)
    for path in folder.glob("native-*.so"):
        if path not in built:
            path.unlink()
    return built
