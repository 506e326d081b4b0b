"""What waits for a GPU, by value: each item computes something and says what it must come to.

`python scripts/gpu_visit.py` on a machine with one; `--device cpu` shows that the items themselves run. Nothing is
downloaded. An item that fails is printed and the rest goes on; the exit status is 1 if any failed. The table of attention's speed is
`python -m benchmarks.parts --device cuda`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.adapt.nf4 import Nf4
from trivium.core.errors import ConfigError, MissingExtra
from trivium.data.batch import Batch
from trivium.infer.generate import generate
from trivium.infer.sampling import Sampling
from trivium.models.checkpointing import Recompute
from trivium.models.presets import llama
from trivium.models.transformer import Transformer, TransformerModel, build, initialize
from trivium.nn.attention import use_backend
from trivium.nn.backends import Extras, attend, backends
from trivium.nn.inputs import Inputs
from trivium.nn.nf4 import Nf4Linear
from trivium.nn.patterns import Window
from trivium.nn.step import Step
from trivium.optim.eight_bit import AdamW8bit
from trivium.optim.masters import Masters
from trivium.optim.optimizers import AdamW
from trivium.optim.schedules import Constant
from trivium.train.loop import TrainConfig, fit
from trivium.train.objectives import NextToken

SPEC = llama(dim=64, layers=3, heads=4, kv_heads=2, hidden=128, vocab=211, context=256, window=48)


@dataclass(frozen=True)
class Item:
    """`measure(device)` must give at most `expected` (what, in words). `rows`: the contract's rows that wait for it."""

    name: str
    rows: str
    what: str
    expected: float
    measure: Callable[[torch.device], float]


def model(device: torch.device, dtype: torch.dtype = torch.float32) -> TransformerModel:
    made = initialize(build(SPEC, device="cpu"), seed=0, std=0.2)
    return made.to(device, dtype).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SPEC.vocab, shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(device: torch.device) -> Inputs:
    lengths = (60, 5, 40, 23)
    segments = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)]])
    return Inputs(tokens(1, sum(lengths)).to(device), segments=segments.to(device))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in deviations of b."""
    return ((a.cpu().float() - b.cpu().float()).abs().max() / b.float().std().cpu()).item()


def forward_is_the_cpus(device: torch.device) -> float:
    return off(model(device)(packed(device)).logits, model(torch.device("cpu"))(packed(torch.device("cpu"))).logits)


def backends_agree(device: torch.device) -> float:
    """Forward; a backend that cannot do this, or is not installed, takes no part."""
    made, worst = model(device), 0.0
    use_backend(made, "eager")
    expected = made(packed(device)).logits
    for name in backends.names():
        use_backend(made, name)
        with suppress(ConfigError, MissingExtra):
            worst = max(worst, off(made(packed(device)).logits, expected))
    return worst


def attended(name: str, device: torch.device, dtype: torch.dtype, **asked: Any) -> list[torch.Tensor]:
    """What a backend gives for 2 rows of 300 tokens in 8 heads over 2, causal, and the gradients of q, k, v and whatever else."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 8, 300, 64), "k": (2, 2, 300, 64), "v": (2, 2, 300, 64)}
    shapes |= {"sinks": (8,)} if asked.get("sinks") else {}
    leaves = {key: torch.randn(shape, generator=draw).bfloat16().to(device, dtype).requires_grad_() for key, shape in shapes.items()}
    inputs = Inputs(torch.zeros(2, 300, dtype=torch.int64, device=device))
    view = Step.begin(inputs, causal=True).view(Window(size=70) if asked.get("window") else None)
    extras = Extras(softcap=asked.get("softcap"), sinks=leaves.get("sinks"))
    out = attend(leaves["q"], leaves["k"], leaves["v"], view, scale=0.125, backend=name, extras=extras)
    grad = torch.randn(out.shape, generator=draw).bfloat16().to(device, dtype)
    return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]


ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"window": True},
    {"softcap": 5.0},
    {"sinks": True},
    {"window": True, "softcap": 5.0, "sinks": True},
)


def kernel_is_eager(name: str, device: torch.device) -> float:
    """Forward and gradients, over what can be asked; what a backend refuses (flex's gradients on a CPU) counts as nothing."""
    worst = 0.0
    for asked in ASKED:
        with suppress(ConfigError, MissingExtra):
            pairs = zip(attended(name, device, torch.float32, **asked), attended("eager", device, torch.float32, **asked), strict=True)
            worst = max(worst, *(off(ours, theirs) for ours, theirs in pairs))
    return worst


def kernel_beside_sdpa(name: str, device: torch.device) -> float:
    """In bfloat16, how many times SDPA's own error (eager's, where SDPA has no softcap) is the kernel's, at most."""
    worst = 0.0
    for asked in ASKED:
        with suppress(ConfigError, MissingExtra):
            ours = attended(name, device, torch.bfloat16, **asked)
            theirs = attended("eager" if "softcap" in asked else "sdpa", device, torch.bfloat16, **asked)
            truth = attended("eager", device, torch.float64, **asked)
            errors = [[((x.double() - y).norm() / y.norm()).item() for x, y in zip(side, truth, strict=True)] for side in (ours, theirs)]
            worst = max(worst, *(mine / max(its, 1e-3) for mine, its in zip(*errors, strict=True)))
    return worst


def triton_seconds(device: torch.device) -> float:
    """Of forward and backward in SDPA's, over 4096 tokens in bfloat16. Without a GPU there is nothing to time: 0."""
    if device.type != "cuda":
        return 0.0
    length, rounds = 4096, 20
    inputs = Inputs(torch.zeros(2, length, dtype=torch.int64, device=device))
    view = Step.begin(inputs, causal=True).view()
    x = torch.randn(2, 16, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def seconds(name: str) -> float:
        start = 0.0
        for number in range(rounds + 1):
            if number == 1:  # the first one compiles
                start = time.perf_counter()
            attend(x, x, x, view, scale=0.125, backend=name).sum().backward()
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds("triton") / seconds("sdpa")


def cached_is_full(device: torch.device) -> float:
    made, x = model(device), tokens(3, 90).to(device)
    cache = made.cache(rows=3, capacity=90)
    with torch.inference_mode():
        pieces = [made(Inputs(piece, cache=cache)).logits for piece in x.split((70, 1, 1, 18), dim=1)]
    return off(torch.cat(pieces, 1), made(x).logits)


def answers_are_the_cpus(device: torch.device) -> float:
    """Greedy and sampled: the share of ids that differ. Sampling draws the same numbers on every device."""
    prompts = [tokens(1, n)[0].tolist() for n in (5, 30, 12)]
    settings = [
        Sampling(temperature=0, max_tokens=40),
        Sampling(seed=1, top_p=0.9, max_tokens=40),
        Sampling(seed=2, top_k=20, min_p=0.02, max_tokens=40),
    ]
    ours, theirs = (generate(model(where), prompts, settings) for where in (device, torch.device("cpu")))
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one.ids, other.ids, strict=True)]
    return sum(a != b for a, b in pairs) / len(pairs)


class Rows:
    fingerprint = "visit"

    def __init__(self, device: torch.device):
        self.device = device

    def batch(self, i: int, /) -> Batch:
        x = tokens(4, 64 + i % 2)
        targets = torch.ones_like(x, dtype=torch.bool)
        targets[:, 0] = False
        return Batch(x, torch.zeros_like(x), targets).to(self.device)

    def steps(self, epochs: float, /) -> int:
        return 4


def trained(device: torch.device, *, precision: str, steps: int, folder: Path) -> tuple[TransformerModel, dict[str, float]]:
    made = LoRA(rank=4).apply(model(device))
    initialize_adapter(made, seed=0)
    config = TrainConfig(rows=4, micro=2, steps=steps, precision=precision, save_every=2, track=())  # type: ignore[arg-type]
    done = fit(made, Rows(device), objective=NextToken(), optim=AdamW(lr=1e-2), schedule=Constant(), config=config, directory=folder)
    return made, done.metrics


def training_is_the_cpus(device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        ours = trained(device, precision="fp32", steps=4, folder=Path(a))[1]["loss"]
        theirs = trained(torch.device("cpu"), precision="fp32", steps=4, folder=Path(b))[1]["loss"]
    return abs(ours / theirs - 1)


def resumed_is_uninterrupted(device: torch.device) -> float:
    """The largest difference of any parameter; 0 means bit for bit."""
    with tempfile.TemporaryDirectory() as a:
        whole = trained(device, precision="bf16", steps=4, folder=Path(a))[0]
        newest = Path(a) / "checkpoint-4"
        for path in newest.iterdir():  # what a crash after step 2 leaves
            path.unlink()
        newest.rmdir()
        again = trained(device, precision="bf16", steps=4, folder=Path(a))[0]
    return max((p - q).abs().max().item() for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def four_bits_are_the_cpus(device: torch.device) -> float:
    """Codes that differ, as a share, and logits, in deviations: whichever is more."""
    ours, theirs = (Nf4().apply(model(where)) for where in (device, torch.device("cpu")))
    pairs = [(a.codes.cpu(), b.codes) for a, b in zip(ours.modules(), theirs.modules(), strict=True) if isinstance(b, Nf4Linear)]
    share = max((a != b).float().mean().item() for a, b in pairs)
    return max(share, off(ours(packed(device)).logits, theirs(packed(torch.device("cpu"))).logits))


@torch.no_grad()
def in_four_bits(spec: Transformer, device: torch.device, *, rank: int) -> TransformerModel:
    """A random model with LoRA, built and quantized on the meta device and drawn as codes: there never is a full weight."""
    made = LoRA(rank=rank, alpha=16).apply(Nf4().apply(build(spec, dtype=torch.bfloat16)))
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if name == "outer":  # the scales' scales, and the scales' mean
                held.view(torch.float32).fill_(1e-3)[-1] = 0.02
            elif held.dtype is torch.uint8:
                held.random_(0, 256)
            else:
                held.fill_(1.0) if parameter.dim() == 1 else held.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(held, requires_grad=parameter.requires_grad))
    initialize_adapter(made, seed=0)
    made.recompute = Recompute()
    return made.train()


def qlora_gib(device: torch.device) -> float:
    """GiB at the worst moment of one step of LoRA (rank 64, states of 8 bits, 512 tokens) on a model of LLaMA 65B's shape; without a
    GPU, of the weights of a small one."""
    large = device.type == "cuda"
    spec = llama(dim=8192, layers=80, heads=64, kv_heads=64, hidden=22016, vocab=32000) if large else SPEC
    made = in_four_bits(spec, device, rank=64 if large else 4)
    masters = Masters(made, AdamW8bit(lr=2e-4), dtype=torch.bfloat16)
    x = torch.randint(0, spec.vocab, (1, 512 if large else 32), device=device)
    targets = torch.ones_like(x, dtype=torch.bool)
    targets[:, 0] = False
    term = torch.stack(list(NextToken().terms(made, Batch(x, torch.zeros_like(x), targets)).values())).sum() / targets.sum()
    term.backward()
    masters.accumulate()
    if not bool(masters.clip(1.0).isfinite()):
        raise ValueError("the gradient is not finite")
    masters.step(1.0)
    return (torch.cuda.max_memory_allocated() if large else sum(p.nbytes for p in made.parameters())) / 2**30


def offloaded_states_are_the_same(device: torch.device) -> float:
    ends = []
    for offload in (False, True):
        made = model(device)
        masters = Masters(made, AdamW8bit(lr=1e-2, offload=offload), dtype=torch.float32)
        for step in range(3):
            made(tokens(2, 20 + step).to(device)).logits.square().mean().backward()
            masters.step(1.0)
        ends.append(made)
    return max((p - q).abs().max().item() for p, q in zip(ends[0].parameters(), ends[1].parameters(), strict=True))


ITEMS = (
    Item("forward, packed, float32", "T01.01 T02.01 T16.01 T17.01", "deviations from the CPU's logits", 1e-4, forward_is_the_cpus),
    Item("attention backends", "T01.01 T19.01", "deviations from eager", 1e-4, backends_agree),
    Item("triton, float32", "X.38 T19.04", "deviations from eager", 1e-4, partial(kernel_is_eager, "triton")),
    Item("triton, bfloat16", "X.38 T19.04", "times SDPA's error", 2.0, partial(kernel_beside_sdpa, "triton")),
    Item("flex, float32", "T19.04", "deviations from eager (0: not here)", 1e-4, partial(kernel_is_eager, "flex")),
    Item("flash, bfloat16", "T19.04", "times SDPA's error (0: not here)", 2.0, partial(kernel_beside_sdpa, "flash")),
    Item("triton, speed", "X.38 T19.04", "of SDPA's seconds, forward and backward (0: not timed)", 3.0, triton_seconds),
    Item("cached decoding", "T08.01", "deviations from the full forward", 1e-4, cached_is_full),
    Item(
        "answers, greedy and sampled",
        "T09.01 T09.02 T09.03 T09.04 T09.05",
        "share of ids that differ from the CPU's",
        0.05,
        answers_are_the_cpus,
    ),
    Item(
        "four LoRA steps, accumulated, float32",
        "T06.03 T10.03 T10.04",
        "relative difference of the last loss from the CPU's",
        1e-4,
        training_is_the_cpus,
    ),
    Item("resumed run, bfloat16", "T10.03", "largest difference from the uninterrupted run", 0.0, resumed_is_uninterrupted),
    Item("4-bit weights", "T06.04", "codes that differ from the CPU's, or deviations of logits", 1e-3, four_bits_are_the_cpus),
    Item("65B in four bits, one LoRA step", "T06.04", "GiB at the worst moment (a small model without a GPU)", 48.0, qlora_gib),
    Item("8-bit states in the host's memory", "T06.04", "largest difference from those on the device", 0.0, offloaded_states_are_the_same),
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here; --device cpu runs the items on the CPU", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    for item in ITEMS:
        try:
            found = item.measure(device)
            passed = found <= item.expected
            print(
                f"{'ok  ' if passed else 'FAIL'} {item.name}: {found:.3g} {item.what} (expected at most {item.expected:g}) [{item.rows}]",
                flush=True,
            )
        except Exception:  # the rest of a visit is too dear to lose
            passed = False
            print(f"FAIL {item.name}: {traceback.format_exc(limit=3)}", flush=True)
        failed += not passed
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
