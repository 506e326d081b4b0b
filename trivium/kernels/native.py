"""The native library (native.cpp), if it was built: loaded through ctypes, and typed functions over CPU tensors.

Optional: without a compiler at installation nothing is there, and callers keep to torch. `takes(...)` says whether these
tensors may go in; the functions themselves check shapes only by assertion. TRIVIUM_NATIVE=0 switches the library off.
The library's name carries the hash of its source, so that one built from an older source is never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

HERE = Path(__file__).parent
VARIANTS = {"AVX512": ("v4bf16", "v4"), "AVX2": ("v3",)}  # by torch's name of what the processor can do: x86-64-v*, the best first
PLAIN = (Tensor, nn.Parameter, FakeTensor)  # a ghost (of `plan`) goes where the tensor that it stands for would go

SIGNATURES = {
    "rms_norm": ([c_int, *[c_void_p] * 4, c_long, c_long, c_float, c_float, c_int, c_int], None),
    "rms_norm_backward": ([c_int, *[c_void_p] * 6, c_long, c_long, c_float, c_int, c_int], c_int),
    "silu_times": ([c_int, *[c_void_p] * 3, c_long, c_int], None),
    "silu_times_backward": ([c_int, *[c_void_p] * 5, c_long, c_int], None),
    "rotate": ([c_int, *[c_void_p] * 4, *[c_long] * 11, c_float, c_int], None),
    "causal_softmax": ([c_int, c_void_p, c_long, c_long, c_float, c_int], c_int),
    "causal_softmax_backward": ([c_int, *[c_void_p] * 2, c_long, c_long, c_float, c_int], None),
    "cross_entropy": ([c_int, *[c_void_p] * 4, c_long, c_long, c_float, c_int], None),
    "nf4": ([c_int, *[c_void_p] * 4, c_long, c_long, c_int], None),
}


class Loaded(NamedTuple):
    library: ctypes.CDLL | None
    state: str  # for people: what runs, or why nothing does
    threaded: bool = False


def _load() -> Loaded:
    if os.environ.get("TRIVIUM_NATIVE", "1") == "0":
        return Loaded(None, "off (TRIVIUM_NATIVE=0)")
    digest = hashlib.sha256((HERE / "native.cpp").read_bytes()).hexdigest()[:12]
    converts = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)  # younger than the oldest torch we take
    for variant in (*VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ()), "plain"):
        if variant == "v4bf16" and not converts:
            continue
        path = HERE / f"native-{variant}-{digest}.so"
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:  # built on another system
                return Loaded(None, f"off ({error})")
            for name, (arguments, result) in SIGNATURES.items():
                function = getattr(library, f"trivium_{name}")
                function.argtypes, function.restype = arguments, result
            threaded = _share_threads(library)
            return Loaded(library, f"on ({variant}{'' if threaded else ', one thread'})", threaded)
    others = "built from another source" if any(HERE.glob("native-*.so")) else "not built: no C++ compiler at installation"
    return Loaded(None, f"off ({others}; install trivium again)")


def _share_threads(library: ctypes.CDLL) -> bool:
    """Lend the library torch's own OpenMP threads. False where torch's runtime does not speak GNU's interface (macOS)."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = [
            ctypes.cast(getattr(torch_cpu, name), c_void_p) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        ]
    except (OSError, AttributeError):
        return False
    library.trivium_threads.argtypes = [c_void_p] * 3
    library.trivium_threads.restype = None
    library.trivium_threads(*functions)
    return True


_found = _load()
_active = _found.library


def available() -> bool:
    """Whether the library is loaded and not switched off."""
    return _active is not None


def state() -> str:
    """`on (v4)`, or `off` and why."""
    return _found.state


@contextmanager
def switched_off() -> Iterator[None]:
    """Inside, everything runs on torch: what the library is compared with."""
    global _active
    before, _active = _active, None
    try:
        yield
    finally:
        _active = before


def takes(*tensors: Tensor) -> bool:
    """Whether the library is there and the tensors are plain ones on the CPU, all bfloat16 or all float32.

    Never while torch.compile traces: it makes better of the torch formulation than of a foreign call.
    """
    if _active is None or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        return False
    for x in tensors:  # noqa: SIM110 - a plain loop: this is asked some hundred times for each token that is decoded
        if x.dtype is not dtype or x.device.type != "cpu" or type(x) not in PLAIN:
            return False
    return True


def _run(name: str, *arguments: Tensor | float | None) -> None:
    """Call the library: tensors as pointers, before them the dtype of the first, after them the threads. A ghost is computed by no one."""
    first = arguments[0]
    assert isinstance(first, Tensor) and _found.library is not None
    if isinstance(first, FakeTensor):
        return
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    function = getattr(_found.library, f"trivium_{name}")
    if function(int(first.dtype is torch.bfloat16), *values, torch.get_num_threads()):
        raise MemoryError("no memory for a native kernel's scratch")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """x [..., C] contiguous, weight [C] -> the norm like x, and each row's 1 / rms [...], float32, for the backward."""
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape == x.shape[-1:]
    y, scales = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _run("rms_norm", x, weight, y, scales, scales.numel(), x.shape[-1], eps, offset, round_first)
    return y, scales


def rms_norm_backward(
    x: Tensor, weight: Tensor, scales: Tensor, grad: Tensor, *, offset: float, round_first: bool, weight_too: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [..., C] and, if wanted, of the weight [C]; `scales` is what `rms_norm` gave."""
    assert grad.is_contiguous() and grad.shape == x.shape
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight) if weight_too else None
    _run("rms_norm_backward", x, weight, scales, grad, grad_x, grad_weight, scales.numel(), x.shape[-1], offset, round_first)
    return grad_x, grad_weight


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, both contiguous and of one shape."""
    assert gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape
    out = torch.empty_like(gate)
    _run("silu_times", gate, up, out, gate.numel())
    return out


def silu_times_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    assert grad.is_contiguous() and grad.shape == gate.shape
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _run("silu_times_backward", gate, up, grad, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Turn the pairs (x_i, x_{i+D/2}) of x [B, H, T, D] by the tables' angles, or `back`; cos, sin [B|1, 1, T, D/2] contiguous.

    The result lies in memory as x does where x is dense.
    """
    batch, heads, time, dim = x.shape
    assert x.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    assert cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1:] == (1, time, dim // 2)
    y = torch.empty_like(x)
    if y.stride(-1) != 1:
        y = x.new_empty(x.shape)
    between = 0 if cos.shape[0] == 1 else time * (dim // 2)  # one row's tables and the next
    _run("rotate", x, cos, sin, y, batch, heads, time, dim, *x.stride()[:3], *y.stride()[:3], between, -1.0 if back else 1.0)
    return y


def causal_softmax_(scores: Tensor, scale: float) -> Tensor:
    """softmax(scores * scale) in place, scores [..., n * T, T] contiguous: row r sees its first r % T + 1 places; the others
    become 0. `scale` > 0."""
    time = scores.shape[-1]
    assert scores.is_contiguous() and scores.shape[-2] % time == 0 and scale > 0
    _run("causal_softmax", scores, scores.numel() // time, time, scale)
    return scores


def causal_softmax_backward_(weights: Tensor, grad: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, written over `grad`, that of the weights that `causal_softmax_` gave."""
    assert weights.is_contiguous() and grad.is_contiguous() and weights.shape == grad.shape
    time = grad.shape[-1]
    _run("causal_softmax_backward", weights, grad, grad.numel() // time, time, scale)
    return grad


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float, grad: Tensor | None) -> Tensor:
    """Each row's cross-entropy [N], float32, of logits [N, V] and labels [N] int64. `grad` receives the gradient of the
    rows' sum; it may be `logits` itself. A label outside the vocabulary is an IndexError."""
    rows, vocab = logits.shape
    assert logits.is_contiguous() and labels.is_contiguous() and labels.dtype is torch.int64 and labels.shape == (rows,)
    assert grad is None or (grad.is_contiguous() and grad.shape == logits.shape and grad.dtype is logits.dtype)
    if rows and not (int(labels.min()) >= 0 and int(labels.max()) < vocab):
        raise IndexError(f"a label is outside the vocabulary of {vocab}")
    losses = logits.new_empty(rows, dtype=torch.float32)
    _run("cross_entropy", logits, labels, grad, losses, rows, vocab, label_smoothing)
    return losses


def nf4_(out: Tensor, codes: Tensor, table: Tensor, scales: Tensor, *, block: int) -> Tensor:
    """`out` [n] becomes table[code] * scale: `codes` uint8 [ceil(n / 2)], two to a byte, the first in its high half; `table` [16] and
    `scales` [ceil(n / block)], float32. `block` is a multiple of 16."""
    count = out.numel()
    assert out.is_contiguous() and codes.is_contiguous() and scales.is_contiguous() and block % 16 == 0
    assert codes.dtype is torch.uint8 and len(codes) == -(-count // 2) and table.shape == (16,)
    assert scales.dtype is table.dtype is torch.float32 and len(scales) == -(-count // block)
    _run("nf4", out, codes, table, scales, count, block)
    return out
