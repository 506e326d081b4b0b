"""The Triton kernels in Triton's interpreter, against eager; that they compile for a GPU; and their fallback.

The interpreter must be asked for before triton is imported, so one other process does what is to be interpreted.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from tests.nn.attention_cases import BLOCK, OPTIONS, Problem, pairs_covered
from tests.tiny import segments_of, tiny, tokens
from trivium.core.errors import ConfigError
from trivium.models.block import Block
from trivium.models.transformer import Transformer
from trivium.nn.attention import Attention, Mixer, Scores, use_backend
from trivium.nn.backends import backends
from trivium.nn.feedforward import MLP
from trivium.nn.inputs import Inputs
from trivium.nn.latent import LatentAttention
from trivium.nn.patterns import Window

pytest.importorskip("triton")
FEW = {
    **OPTIONS,
    "seen": ("causal", "holes", "window", "both ways", "cached"),
    "count": (1, BLOCK - 1, BLOCK, BLOCK + 1),
    "heads": ((2, 2), (2, 1)),
    "bias": (None, "learned"),
}
CASES = pairs_covered(FEW, seed=3)
Remote = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Remote]:
    """Calls a function of this module in the process that interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda call, *given: pool.submit(call, *given).result()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Iterator[Remote]:
    """Calls a function of this module in a process that compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda call, *given: pool.submit(call, *given).result()


def differences(case: dict[str, Any], precision: str) -> dict[str, float]:
    """By output and gradient: the largest difference from eager in float32; in bfloat16, how many times SDPA's own error (eager's,
    where SDPA has no softcap) from float64 the kernel's is."""
    problem = Problem(**case)
    run, eager = backends.get("triton"), backends.get("eager")
    if precision == "float32":
        ours, expected = problem.run(run, torch.float32, block=(BLOCK, BLOCK)), problem.run(eager, torch.float32)
        return {name: (x - expected[name]).abs().max().item() for name, x in ours.items()}
    problem.leaves = {name: x.bfloat16().double() for name, x in problem.leaves.items()}
    problem.grad = problem.grad.bfloat16().double()
    truth, peer = problem.run(eager, torch.float64), eager if case["softcap"] else backends.get("sdpa")
    ours, theirs = (problem.run(x, torch.bfloat16, **o) for x, o in ((run, {"block": (BLOCK, BLOCK)}), (peer, {})))

    def error(found: torch.Tensor, name: str) -> float:
        return ((found.double() - truth[name]).norm() / truth[name].norm().clamp_min(1e-6)).item()

    return {name: error(x, name) / max(error(theirs[name], name), 1e-3) for name, x in ours.items()}


@pytest.mark.slow
@pytest.mark.concept("X.38", part="kernels/triton_attention.py")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_interpreted_forward_and_gradients_are_eagers(interpreter, case):
    for name, difference in interpreter(differences, case, "float32").items():
        assert difference <= (1e-5 if name == "out" else 1e-4), name


@pytest.mark.concept("X.38", part="kernels/triton_attention.py")
@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: "-".join(map(str, case.values())))
def test_interpreted_bfloat16_is_near_the_truth(interpreter, case):
    """Twice SDPA's error; gradients twice that, for they start from the output rounded to 16 bits, as FlashAttention's do, where
    torch's statement for a CPU keeps it whole."""
    for name, times in interpreter(differences, case, "bfloat16").items():
        assert times <= (2 if name == "out" else 4), name


MIXERS: dict[str, Mixer] = {
    "grouped": Attention(heads=4, kv_heads=2, head_dim=8, position={"kind": "rope"}, scores=Scores(softcap=2.0)),
    "window": Attention(heads=2, kv_heads=1, head_dim=8, pattern=Window(size=6), scores=Scores(sinks=True)),
    "alibi": Attention(heads=2, kv_heads=2, head_dim=8, position={"kind": "alibi"}),
    "latent": LatentAttention(heads=2, kv_rank=10, q_rank=14, head_dim=6, rope_dim=4, v_dim=7),
}


def model_off(name: str) -> list[float]:
    """The largest differences from eager's: of logits at once, through a cache, of documents in a row, and of gradients."""
    model = tiny(Transformer(dim=16, vocab=61, layers=("a",), blocks={"a": Block(mixer=MIXERS[name], ffn=MLP(hidden=24))}))
    x, segments, found = tokens(2, 19), segments_of([[19], [5, 9, -5]], 19), []
    for backend in ("eager", "triton"):
        use_backend(model, backend)
        with torch.no_grad():
            cache = model.cache(rows=2, capacity=19)
            pieces = [model(Inputs(piece, cache=cache)).logits for piece in x.split((9, 1, 9), dim=1)]
            outs = [model(x).logits, torch.cat(pieces, 1)]
        model.zero_grad()
        packed = model(Inputs(x, segments=segments)).logits[segments >= 0]
        packed.square().sum().backward()
        found.append([*outs, packed, torch.cat([p.grad.flatten() for p in model.parameters()])])
    return [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.concept("X.38", part="kernels/triton_attention.py")
@pytest.mark.concept("T19.04", part="nn/backends.py")
@pytest.mark.parametrize("name", MIXERS)
def test_a_model_on_the_interpreted_kernels(interpreter, name):
    *logits, gradients = interpreter(model_off, name)
    assert max(logits) <= 1e-5 and gradients <= 1e-3


def compiled() -> list[str]:
    """The kernels that ptxas made code for an H100 of, with every option and small tiles."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from trivium.kernels import triton_attention as kernels

    types = {"scale": "fp32", "mask": "*u8", **dict.fromkeys(("lse", "delta", "sinks", "bias", "dbias"), "*fp32")}
    types |= dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), "*bf16")
    flags = {"CAUSAL": True, "WINDOW": 9, "SOFTCAP": 5.0, "BIAS": True, "MASK": True, "SINKS": True, "WANTS_BIAS": True}
    flags |= {"DIM": 24, "WIDTH": 20, "D": 32, "E": 32, "M": 32, "N": 16}
    made = []
    for kernel in (kernels._forward, kernels._backward_queries, kernels._backward_keys):
        signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, "i32") for p in kernel.params}
        given = {name: value for name, value in flags.items() if name in signature}
        code = compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32), options={"num_stages": 1})
        made += [kernel.__name__] if code.asm["cubin"] else []
    return made


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(compiler):
    assert compiler(compiled) == ["_forward", "_backward_queries", "_backward_keys"]


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="need a GPU; use 'tiled'") as error:
        q = torch.randn(1, 1, 3, 4)
        backends.get("triton")(q, q, q, scale=1.0, causal=True, mask=None)
    assert error.value.field == "backend" and error.value.value == "triton"


def refused() -> tuple[str | None, Any]:
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    try:
        backends.get("triton")(q, q, q, scale=1.0, causal=True, mask=None)
    except ConfigError as error:
        return error.field, error.value
    return None, None


def test_float64_is_refused(interpreter):
    assert interpreter(refused) == ("backend", "triton")
