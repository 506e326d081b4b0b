"""What mixes positions, over length: time, peak memory and how both grow, beside transformers' layer of the same shape in the same run.

One layer of each kind, alone, forward and backward (`--forward`: without gradients) on one row of random inputs. Attention runs on each
backend; a backend that refuses is listed with its reason. Growth is the exponent e of length ** e, fitted to the logarithms:
1 is linear, 2 is quadratic. `--device cuda` measures a GPU, and its own memory.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log
from typing import Any

from . import common

DIM, HEADS, KV_HEADS, HEAD_DIM, SPAN = 512, 8, 2, 64, 256
WIDTHS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
ATTENTION = {"kind": "attention", **WIDTHS, "position": {"kind": "rope"}}
LATENT = {"kind": "latent", "heads": HEADS, "kv_rank": 128, "q_rank": 192, "head_dim": 64, "rope_dim": 32, "v_dim": 64}
KINDS: dict[str, dict[str, Any]] = {
    "full": ATTENTION,
    "window": {**ATTENTION, "pattern": {"kind": "window", "size": SPAN}},
    "chunk": {**ATTENTION, "pattern": {"kind": "chunk", "size": SPAN}},
    "softcap": {**ATTENTION, "scores": {"softcap": 50.0}},
    "alibi": {**ATTENTION, "position": {"kind": "alibi"}},
    "latent": LATENT,
    "linear": {"kind": "linear_attention", "heads": HEADS, "head_dim": HEAD_DIM},
    "retention": {"kind": "retention", "heads": HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM, "norm": {"kind": "rms"}},
    "gated_linear": {"kind": "gated_linear", "heads": HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM, "norm": {"kind": "rms"}},
    "gated_delta": {"kind": "gated_delta", "key_heads": 4, "value_heads": HEADS, "key_dim": HEAD_DIM, "value_dim": HEAD_DIM, "norm": {"kind": "rms"}},
    "mamba2": {"kind": "mamba2", "heads": 16, "head_dim": HEAD_DIM, "states": 64},
}  # fmt: skip
BACKENDS = {"cpu": ("auto", "eager", "native", "sdpa", "tiled", "flex"), "cuda": ("auto", "eager", "sdpa", "flex", "triton", "flash")}
PEERS = ("full", "window", "latent", "gated_delta", "mamba2")  # what transformers has, and runs without kernels from elsewhere


class Layer:
    """One layer, and passes through it. A subclass gives `run(x)`."""

    def __init__(self, *, threads: int, device: str, forward: bool):
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.device, self.forward = torch.device(device), forward

    def run(self, x: Any) -> Any:
        raise AssertionError

    def measure(self, length: int) -> dict[str, float] | str:
        """Seconds of one pass over a row of this length; why not, where this cannot be done."""
        import torch

        from trivium.core.errors import TriviumError

        x = torch.randn(1, length, DIM, device=self.device, requires_grad=not self.forward)
        try:
            times, _ = common.clock(lambda: self._pass(x))
        except TriviumError as error:
            return str(error)
        return times

    def _pass(self, x: Any) -> None:
        import torch

        with torch.set_grad_enabled(not self.forward):
            out = self.run(x)
        if not self.forward:
            out.sum().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """The most bytes that were held so far: in this process, or on its GPU."""
        import torch

        return common.peak_bytes() if self.device.type == "cpu" else torch.cuda.max_memory_allocated()


class Trivium(Layer):
    """Ours: the mixer as a model would build it."""

    def __init__(self, *, kind: str, backend: str, **given: Any):
        super().__init__(**given)
        import trivium.nn.heads  # noqa: F401  (a part of the floor, so that its registries are whole)
        from trivium.core.spec import validate
        from trivium.nn.attention import Mixer, use_backend

        self.layer = validate(Mixer, KINDS[kind]).build(DIM).to(self.device)
        for parameter in self.layer.parameters():
            parameter.data.normal_(std=0.02)
        use_backend(self.layer, backend)

    def run(self, x: Any) -> Any:
        from trivium.nn.inputs import Inputs
        from trivium.nn.step import Step

        step = Step.begin(Inputs(embeds=x), causal=True)
        return self.layer(x, step, step.handle(0))


class Transformers(Layer):
    """Theirs: the layer alone, on sdpa where it is attention, with the mask that their model would hand it."""

    def __init__(self, *, kind: str, **given: Any):
        super().__init__(**given)
        import transformers

        self.kind = kind
        shape: dict[str, Any] = {
            "hidden_size": DIM,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "attn_implementation": "sdpa",
        }
        match kind:
            case "full":
                self.config = transformers.LlamaConfig(**shape, head_dim=HEAD_DIM)
                self.layer, self.rope = self._made("llama", "LlamaAttention", "LlamaRotaryEmbedding")
            case "window":
                self.config = transformers.MistralConfig(**shape, head_dim=HEAD_DIM, sliding_window=SPAN)
                self.layer, self.rope = self._made("mistral", "MistralAttention", "MistralRotaryEmbedding")
            case "latent":
                widths: dict[str, Any] = shape | {
                    "num_key_value_heads": HEADS,
                    "kv_lora_rank": 128,
                    "q_lora_rank": 192,
                    "qk_nope_head_dim": 64,
                    "qk_rope_head_dim": 32,
                    "v_head_dim": 64,
                }
                self.config = transformers.DeepseekV3Config(**widths)
                self.layer, self.rope = self._made("deepseek_v3", "DeepseekV3Attention", "DeepseekV3RotaryEmbedding")
            case "gated_delta":
                heads: dict[str, Any] = {"linear_num_key_heads": 4, "linear_num_value_heads": HEADS}
                self.config = transformers.Qwen3NextConfig(**shape, **heads, linear_key_head_dim=HEAD_DIM, linear_value_head_dim=HEAD_DIM)
                self.layer, self.rope = self._made("qwen3_next", "Qwen3NextGatedDeltaNet", None)
            case "mamba2":
                self.config = transformers.Mamba2Config(hidden_size=DIM, num_heads=16, head_dim=HEAD_DIM, state_size=64, n_groups=1)
                self.layer, self.rope = self._made("mamba2", "Mamba2Mixer", None)

    def _made(self, family: str, layer: str, rope: str | None) -> tuple[Any, Any]:
        import importlib

        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        made = getattr(module, layer)(self.config, layer_idx=0).to(self.device)
        return made, None if rope is None else getattr(module, rope)(self.config).to(self.device)

    def run(self, x: Any) -> Any:
        import torch
        from transformers.masking_utils import create_sliding_window_causal_mask

        if self.rope is None:
            return self.layer(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        mask = None
        if self.kind == "window":
            mask = create_sliding_window_causal_mask(
                config=self.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
            )
        return self.layer(hidden_states=x, position_embeddings=self.rope(x, positions), attention_mask=mask)[0]


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """e of value ~ length ** e: the slope of a line through the logarithms."""
    return statistics.linear_regression([log(x) for x in lengths], [log(max(x, 1e-9)) for x in values]).slope


@dataclass
class Found:
    """What came out: rows of the table, each side's growth, and why a side is missing."""

    rows: list[common.Row] = field(default_factory=list)
    growth: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@contextmanager
def opened(kind: str, sides: Sequence[str], options: argparse.Namespace, found: Found) -> Iterator[dict[str, common.Worker]]:
    """A worker for each side that can do this kind, after a short pass: what is loaded once is no cost of a length."""
    running: dict[str, common.Worker] = {}
    try:
        for side in sides:
            given: dict[str, Any] = {"kind": kind, "threads": options.threads, "device": options.device, "forward": options.forward}
            target = "Transformers" if side == "transformers" else "Trivium"
            given |= {} if side == "transformers" else {"backend": side}
            running[side] = common.Worker(f"benchmarks.parts:{target}", threads=options.threads, options=given)
            answer = running[side].call("measure", length=16)
            if isinstance(answer, str):
                found.refused[f"{kind}, {side}"] = answer
                running.pop(side).close()
        yield running
    finally:
        for worker in running.values():
            worker.close()


def measure(kind: str, sides: Sequence[str], options: argparse.Namespace, found: Found) -> None:
    """One kind. Lengths rise, so that a process's high-water mark is that of the last."""
    with opened(kind, sides, options, found) as running:
        start = {side: worker.call("memory") for side, worker in running.items()}
        seconds: dict[str, list[float]] = {side: [] for side in running}
        memory: dict[str, list[float]] = {side: [] for side in running}
        for length in options.lengths:
            times = common.rounds(
                list(running),
                lambda side, length=length: running[side].call("measure", length=length),
                count=options.rounds,
                warm=0 if options.quick else 1,
                what=f"{kind}, {length} tokens",
            )
            for side, worker in running.items():
                seconds[side].append(statistics.median(one["seconds"] for one in times[side]))
                memory[side].append(max(worker.call("memory") - start[side], 1e5) / 1e6)
            found.rows += rows_of(f"{kind}, {length}", length, times, {side: values[-1] for side, values in memory.items()})
    for side in running if len(options.lengths) > 1 else ():
        time, held = (exponent(options.lengths, values[side]) for values in (seconds, memory))
        found.growth[f"{kind}, {side}"] = f"seconds {time:.2f}, memory {held:.2f}"


def rows_of(what: str, length: int, times: Mapping[str, Sequence[Mapping[str, float]]], memory: Mapping[str, float]) -> list[common.Row]:
    """Each of our sides beside the peer's, where it has one."""
    peer = "transformers" if "transformers" in times else ""
    rates = {side: [length / one["seconds"] for one in rounds] for side, rounds in times.items()}
    rows = []
    for side in times:
        if side != "transformers":
            rows.append(common.Row(f"{what}, {side}", "tok/s", "more", rates[side], peer, rates[peer] if peer else ()))
            rows.append(common.Row(f"{what}, {side}", "MB more", "less", [memory[side]], peer, [memory[peer]] if peer else ()))
    return rows


def main() -> None:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--backends", nargs="+", help="of attention (default: all)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096], help="tokens in the row")
    parser.add_argument("--device", default="cpu", choices=list(BACKENDS))
    parser.add_argument("--forward", action="store_true", help="without gradients")
    options = parser.parse_args()
    machine = common.machine()
    if options.quick:
        options.rounds, options.lengths = 1, [32, 64]
    options.lengths = sorted(set(options.lengths))
    found = Found()
    for kind in options.kinds:
        scored = KINDS[kind]["kind"] in ("attention", "latent")
        sides = [*((options.backends or BACKENDS[options.device]) if scored else ["auto"]), *(["transformers"] if kind in PEERS else [])]
        measure(kind, sides, options, found)
    notes = [
        f"one layer, {DIM} wide, {HEADS} heads, {KV_HEADS} kv heads of {HEAD_DIM}, spans of {SPAN}, float32, one row, "
        + ("forward alone" if options.forward else "forward and backward"),
        "transformers: its layer on sdpa, its own mask for windows; gated_delta and mamba2 on its torch path",
        "memory: what the process (or the GPU) held at most, less what it held after a pass over 16 tokens",
    ]
    versions = common.versions("trivium", "torch", "transformers", "triton")
    facts = {"growth": found.growth, "refused": found.refused or "nothing"}
    common.report("parts", options, found.rows, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
