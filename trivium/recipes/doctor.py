"""Examine the machine: versions, processor, memory, disk, torch's build, GPU, cache, and the rate of matrix products.

The one idea: every figure comes with what follows from it (`advice`), so that a slow or failing run can be understood.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..core.home import home
from ..core.seed import generator
from ..kernels import native

PACKAGES = (
    "trivium",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "pydantic",
    "huggingface-hub",
    "pyarrow",
    "gguf",
    "transformers",
    "peft",
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
GIB = 1 << 30


def examine(*, measure: bool = True, size: int = 2048) -> dict[str, Any]:
    """Facts by section, and `advice`, a list of sentences. `measure` times products of `size` x `size` matrices."""
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: found for name in PACKAGES if (found := _version(name))}},
        "machine": _machine(),
        "torch": _torch(),
        "gpu": _gpu(),
        "cache": _cache(),
    }
    if measure:
        report["matmul"] = {f"{name} TFLOP/s": _rate(dtype, size) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    report["advice"] = _advice(report)
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info)
    flags = re.search(r"(?:flags|Features)\s*: (.+)", info)
    memory = {name: int(kib) / (1 << 20) for name, kib in re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo"))}
    return {
        "system": platform.platform(),
        "cpu": model[1] if model else platform.machine(),
        "cores": _cores(),
        "cpu features": [name for name in CPU_FLAGS if flags and name in flags[1].split()],
        "memory GiB": round(memory["MemTotal"], 1) if memory else None,
        "memory free GiB": round(memory["MemAvailable"], 1) if memory else None,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has no affinity


def _torch() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "native kernels": native.state(),
        "onednn": torch.backends.mkldnn.is_available(),
        "openmp": torch.backends.openmp.is_available(),
        "cuda build": torch.version.cuda,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _gpu() -> dict[str, Any]:
    found: dict[str, Any] = {"devices": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    for index in range(found["devices"]):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, compute {facts.major}.{facts.minor}"
    return found


def _cache() -> dict[str, Any]:
    there = home()
    while not there.exists():
        there = there.parent
    return {"home": str(home()), "disk free GiB": round(shutil.disk_usage(there).free / GIB, 1)}


def _rate(dtype: torch.dtype, size: int) -> float:
    """TFLOP/s of a square product, the median of five after one to warm up."""
    a, b = (torch.randn(size, size, generator=generator(0, "doctor", name)).to(dtype) for name in "ab")
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return round(2 * size**3 / statistics.median(seconds[1:]) / 1e12, 3)


def _advice(report: dict[str, Any]) -> list[str]:
    found = []
    machine, build = report["machine"], report["torch"]
    if not native.available():
        found.append(f"the native kernels are {build['native kernels']}: element-wise steps run on torch, slower")
    if build["threads"] > machine["cores"]:
        found.append(f"torch uses {build['threads']} threads on {machine['cores']} cores; set OMP_NUM_THREADS={machine['cores']}")
    if "matmul" in report and report["matmul"]["bf16 TFLOP/s"] < report["matmul"]["fp32 TFLOP/s"]:
        found.append("bf16 is slower than fp32 on this processor: prefer --dtype fp32")
    if machine["memory free GiB"] is not None and machine["memory free GiB"] < 4:
        found.append(f"{machine['memory free GiB']} GiB of memory are free; the demo needs about 3")
    if report["cache"]["disk free GiB"] < 3:
        found.append(
            f"{report['cache']['disk free GiB']} GiB of disk are free under {report['cache']['home']}; set TRIVIUM_HOME to a larger disk"
        )
    if build["cuda build"] and not report["gpu"]["devices"]:
        found.append("this torch is built for CUDA, but sees no GPU")
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux
        return ""
