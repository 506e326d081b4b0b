"""Inference against transformers: the same weights in bf16, the same threads, the same token ids, sides in turn.

Load to first token (fresh processes), prefill, greedy decoding at batch 1 and 8, and peak memory. `generate` rows take the call
that users make on either side; `forward` rows take bare forwards with a cache and an argmax. Nothing stops at an EOS, prompts
of a batch are equally long, and transformers gets its attention mask, so both sides compute the same steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import common
from .common import Row

SIDES = {"trivium": "benchmarks.inference:Trivium", "transformers": "benchmarks.inference:Transformers"}
FRESH = {"trivium": "benchmarks.inference:FreshTrivium", "transformers": "benchmarks.inference:FreshTransformers"}
PEER = "transformers"
QUESTION = "Why is the sky blue?"
EQUAL = 1 - common.WITHIN  # the goal for every ratio: ahead, or within 5%


class Prepare:
    """Makes what both sides get: the model directory, and token ids of real text."""

    def __init__(self, *, model: str, out: str):
        from trivium.io.pull import pull
        from trivium.text.tokenizer import Tokenizer

        self.source = pull(model).path
        self.path = common.converted(model, Path(out))
        self.tokenizer = Tokenizer.load(self.path)

    def gguf(self) -> str | None:
        """The file that the weights came from, if it is one."""
        return str(self.source) if self.source.suffix == ".gguf" else None

    def tokens(self, *, count: int) -> list[int]:
        from trivium.recipes.demo_task import examples

        text = "\n".join(example.text for example in examples("train", seed=0, count=count // 20 + 1))
        ids = self.tokenizer.encode(text)
        assert len(ids) >= count
        return ids[:count]


class FreshTrivium:
    """What a user does first: load, ask, see a token. The clock runs outside, from before the process starts."""

    def __init__(self, *, path: str):
        self.path = path

    def first(self) -> dict[str, Any]:
        began = time.perf_counter()
        import trivium
        from trivium.infer.sampling import Sampling

        imported = time.perf_counter()
        bundle = trivium.load(self.path, dtype="bf16")
        answer = bundle.chat(QUESTION, sampling=Sampling(temperature=0, max_tokens=1))
        return {"imports": imported - began, "rest": time.perf_counter() - imported, "ids": answer.ids}


class FreshTransformers:
    """The same with transformers."""

    def __init__(self, *, path: str):
        self.path = path

    def first(self) -> dict[str, Any]:
        began = time.perf_counter()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        imported = time.perf_counter()
        path = Path(self.path)
        where = {"pretrained_model_name_or_path": path}
        if path.is_file():
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        messages = [{"role": "user", "content": QUESTION}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**asked, max_new_tokens=1, do_sample=False)
        ids = answer[0, asked["input_ids"].shape[1] :].tolist()
        return {"imports": imported - began, "rest": time.perf_counter() - imported, "ids": ids}


class Trivium:
    """Ours: `generate`, and the model called directly."""

    def __init__(self, *, path: str, threads: int):
        import torch

        import trivium

        torch.set_num_threads(threads)
        self.model = trivium.load(path, dtype="bf16").model
        self.model.eval()

    def generate(self, *, prompts: list[list[int]], new: int) -> dict[str, Any]:
        from trivium.infer.generate import generate
        from trivium.infer.sampling import Sampling

        sampling = Sampling(temperature=0, max_tokens=new)
        times, answers = common.clock(lambda: generate(self.model, prompts, sampling))
        return {**times, "ids": [answer.ids for answer in answers]}

    def forward(self, *, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """The prompts are fed before the clock starts, unless they are all that is asked for (`new` = 0)."""
        import torch

        from trivium.nn.inputs import Inputs

        tokens = torch.tensor(prompts)
        store = self.model.cache(len(prompts), tokens.shape[1] + new)

        def step(tokens: Any) -> Any:
            return self.model(Inputs(tokens, cache=store), keep="last").logits.argmax(-1, keepdim=True)

        return _decode(step, tokens, new)


class Transformers:
    """Theirs: `model.generate` and the model called directly, with its default attention (sdpa) and its default cache."""

    def __init__(self, *, path: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.model.eval()
        self.model.generation_config.eos_token_id = None
        self.attention = self.model.config._attn_implementation

    def generate(self, *, prompts: list[list[int]], new: int) -> dict[str, Any]:
        import torch

        tokens = torch.tensor(prompts)
        mask = torch.ones_like(tokens)
        asked = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        times, answer = common.clock(lambda: self.model.generate(tokens, attention_mask=mask, **asked))
        return {**times, "ids": answer[:, tokens.shape[1] :].tolist()}

    def forward(self, *, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """As ours. No mask is given: there is no padding, and so its sdpa may take its fastest path."""
        import torch
        from transformers import DynamicCache

        tokens = torch.tensor(prompts)
        cache = DynamicCache(config=self.model.config)

        def step(tokens: Any) -> Any:
            return self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

        return _decode(step, tokens, new)


def _decode(step: Callable[[Any], Any], tokens: Any, new: int) -> dict[str, Any]:
    import torch

    def go(token: Any) -> list[Any]:
        return [token := step(token) for _ in range(new)]

    with torch.inference_mode():
        if new == 0:
            times, token = common.clock(lambda: step(tokens))
            return {**times, "ids": token.tolist()}
        token = step(tokens)
        times, chosen = common.clock(lambda: go(token))
    return {**times, "ids": torch.cat([token, *chosen], 1).tolist()}


def load_rows(path: Path, what: str, options: Any, *, goal: float | None) -> tuple[list[Row], dict[str, str]]:
    """From nothing to the first token, in fresh processes; and what that took of memory."""

    def one(side: str) -> dict[str, Any]:
        with common.Worker(FRESH[side], threads=options.threads, options={"path": str(path)}) as worker:
            answer = worker.call("first")
            return {**answer, "seconds": worker.age(), "peak": worker.peak()}

    found = common.rounds(list(FRESH), one, count=options.rounds, warm=0 if options.quick else 1, what=what)
    named = {"seconds": ("", "s", goal), "imports": (": imports", "s", None), "rest": (": after imports", "s", None)}
    named["peak"] = (": peak memory", "MB", goal)
    rows = []
    for key, (name, unit, wanted) in named.items():
        ours, theirs = ([one[key] for one in found[side]] for side in ("trivium", PEER))
        rows.append(Row(what + name, unit, "less", ours, PEER, theirs, wanted))
    firsts = {side: {tuple(one["ids"]) for one in times} for side, times in found.items()}
    return rows, {f"{what}: first token": "the same" if firsts["trivium"] == firsts[PEER] and len(firsts[PEER]) == 1 else f"{firsts}"}


def speed_rows(
    directory: Path, prompts: dict[int, list[list[int]]], prefill: list[int], new: int, options: Any
) -> tuple[list[Row], dict[str, str]]:
    """Prefill and decoding, through `generate` and bare, and each side's peak memory after all of it."""
    rows, facts = [], {}
    jobs: list[tuple[str, str, dict[str, Any], int]] = [
        (f"prefill {len(prefill)}, generate", "generate", {"prompts": [prefill], "new": 1}, len(prefill)),
        (f"prefill {len(prefill)}, forward", "forward", {"prompts": [prefill], "new": 0}, len(prefill)),
    ]
    for batch, rows_of_ids in prompts.items():
        for method in ("generate", "forward"):
            jobs.append((f"decode batch {batch}, {method}", method, {"prompts": rows_of_ids, "new": new}, batch * new))
    with common.workers(SIDES, threads=options.threads, options={"path": str(directory), "threads": options.threads}) as running:
        for what, method, asked, units in jobs:
            found = common.rounds(
                list(SIDES),
                lambda side, method=method, asked=asked: running[side].call(method, **asked),
                count=options.rounds,
                warm=0 if options.quick else 1,
                what=what,
            )
            rows += common.rates(found, what, units, peer=PEER, goal=EQUAL if method == "generate" else None)
            facts[f"{what}: greedy ids"] = _agreement(found["trivium"][0]["ids"], found[PEER][0]["ids"])
        ours, theirs = running["trivium"].peak(), running[PEER].peak()
        rows.append(Row("peak memory, load and all of the above", "MB", "less", [ours], PEER, [theirs], EQUAL))
    return rows, facts


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How far the sides said the same. bf16 rounds differently on either side: a near tie parts them for good."""
    assert [len(row) for row in ours] == [len(row) for row in theirs], "the sides made different numbers of tokens"
    alike = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in zip(ours, theirs, strict=True)]
    return f"equal up to token {', '.join(map(str, alike))} of {len(ours[0])}"


def main() -> None:
    options = common.with_model(common.arguments(__doc__)).parse_args()
    machine = common.machine()
    length, short, new, batches = (64, 8, 4, (1, 2)) if options.quick else (512, 32, 64, (1, 8))
    if options.quick:
        options.rounds = 1
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as scratch:
        directory = Path(scratch) / "model"
        with common.Worker(
            "benchmarks.inference:Prepare", threads=options.threads, options={"model": common.located(options.model), "out": str(directory)}
        ) as worker:
            ids, gguf = worker.call("tokens", count=max(length, short * max(batches))), worker.call("gguf")
        prompts = {batch: [ids[row * short : (row + 1) * short] for row in range(batch)] for batch in batches}
        parts = [load_rows(directory, "load to first token", options, goal=EQUAL)]
        if gguf is not None:
            parts.append(load_rows(Path(gguf), "GGUF to first token", options, goal=None))
        parts.append(speed_rows(directory, prompts, ids[:length], new, options))
    notes = [
        f"decode: prompts of {short} tokens, {new} greedy tokens each; `generate` rows time the whole call, the prompts included; "
        "`forward` rows time the steps alone",
        "load to first token: wall time from before the process starts; a directory of safetensors, one chat question, one token",
        "GGUF to first token: the same from the GGUF file itself, which both sides turn into bf16",
        "transformers: sdpa attention, dynamic cache (its defaults), no compile on either side; the same thread, allocator and OpenMP settings",
        "tok/cpu s: the same rounds in processor time, which a busy machine disturbs less (spinning threads count)",
        "peak memory is a fresh process's resident high-water mark; mapped weight files count while they are resident",
    ]
    versions = common.versions("trivium", "torch", "transformers", "tokenizers", "safetensors")
    rows = [row for part, _ in parts for row in part]
    facts = {name: fact for _, part in parts for name, fact in part.items()}
    common.report("inference", options, rows, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
