"""Pretraining steps against transformers and litgpt: the same shape, batches, dtype, optimizer and threads, sides in turn.

A pass is `--steps` updates on random tokens. Trivium trains through its own loop's update, with fp32 masters of its bf16 weights and finite
checks; the peers train plain bf16 weights with torch's fused AdamW, clipping included, which is less work. litgpt takes part where it is
installed. Nobody compiles.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from . import common

SHAPES = {  # of performance.md's kind: dim, layers, heads, hidden, vocab; batch rows and length
    "8M": ((256, 6, 8, 688, 8192), (16, 256)),
    "110M": ((768, 10, 12, 2048, 32000), (4, 512)),
}
LR, CLIP, DECAY = 1e-4, 1.0, 0.1
GOAL = 1.5


class Trivium:
    """Ours: the loop's own update."""

    def __init__(self, *, shape: str, threads: int, steps: int):
        import torch

        from trivium.data.batch import Batch
        from trivium.models.presets import llama
        from trivium.models.transformer import build, initialize
        from trivium.optim.masters import Masters
        from trivium.optim.optimizers import AdamW
        from trivium.optim.schedules import Constant
        from trivium.train.loop import TrainConfig, _Update
        from trivium.train.objectives import NextToken

        torch.set_num_threads(threads)
        (dim, layers, heads, hidden, vocab), (rows, length) = SHAPES[shape]
        spec = llama(dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden, vocab=vocab, tied=True)
        self.model = initialize(build(spec, device="cpu"), seed=0)
        self.steps = steps
        drawn = _tokens(shape, steps)
        segments = torch.zeros(rows, length, dtype=torch.int64)
        targets = torch.ones(rows, length, dtype=torch.bool)
        targets[:, 0] = False

        class Drawn:
            fingerprint = "random"

            def batch(self, i: int, /) -> Batch:
                return Batch(drawn[i % len(drawn)], segments, targets)

            def steps(self, epochs: float, /) -> int:
                return len(drawn)

        self.update = _Update(
            self.model,
            Masters(self.model, AdamW(lr=LR, weight_decay=DECAY), dtype=torch.bfloat16),
            Drawn(),
            objective=NextToken(),
            schedule=Constant(),
            config=TrainConfig(rows=rows, precision="bf16", clip=CLIP),
            total=steps,
        )

    def train(self) -> dict[str, float]:
        times, done = common.clock(lambda: [self.update(step) for step in range(self.steps)])
        return {**times, "loss": done[-1]["loss"]}

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class Transformers:
    """Theirs, in the leanest loop: no Trainer, their own loss."""

    def __init__(self, *, shape: str, threads: int, steps: int):
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.model = self.build(shape).to(torch.bfloat16).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
        self.drawn = _tokens(shape, steps)

    def build(self, shape: str) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        (dim, layers, heads, hidden, vocab), (_, length) = SHAPES[shape]
        config = LlamaConfig(
            hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=hidden,
            vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def loss(self, tokens: Any) -> Any:
        return self.model(input_ids=tokens, labels=tokens).loss

    def _step(self, tokens: Any) -> float:
        import torch

        loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def train(self) -> dict[str, float]:
        times, losses = common.clock(lambda: [self._step(tokens) for tokens in self.drawn])
        return {**times, "loss": losses[-1]}

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class LitGPT(Transformers):
    """litgpt's model of the same shape; its head is never tied, so it is larger by one table."""

    def build(self, shape: str) -> Any:
        from litgpt import GPT, Config

        (dim, layers, heads, hidden, vocab), (_, length) = SHAPES[shape]
        return GPT(
            Config(
                n_embd=dim,
                n_layer=layers,
                n_head=heads,
                n_query_groups=heads,
                intermediate_size=hidden,
                padded_vocab_size=vocab,
                block_size=length,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                rotary_percentage=1.0,
                bias=False,
                parallel_residual=False,
            )
        )

    def loss(self, tokens: Any) -> Any:
        import torch.nn.functional as F

        return F.cross_entropy(self.model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


SIDES = {"trivium": "benchmarks.train:Trivium", "transformers": "benchmarks.train:Transformers", "litgpt": "benchmarks.train:LitGPT"}


def _tokens(shape: str, steps: int) -> list[Any]:
    import torch

    (*_, vocab), (rows, length) = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (rows, length), generator=generator) for _ in range(steps)]


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=2, help="updates in one pass (default: 2)")
    options = parser.parse_args()
    machine = common.machine()
    if options.quick:
        options.rounds, options.steps, options.shapes = 1, 1, ["8M"]
    sides = {name: target for name, target in SIDES.items() if name != "litgpt" or importlib.util.find_spec("litgpt")}
    rows: list[common.Row] = []
    sizes: dict[str, Any] = {}
    for shape in options.shapes:
        given = {"shape": shape, "threads": options.threads, "steps": options.steps}
        with common.workers(sides, threads=options.threads, options=given) as running:
            warm = 0 if options.quick else 1
            found = common.rounds(list(sides), lambda side: running[side].call("train"), count=options.rounds, warm=warm, what=shape)
            sizes[shape] = ", ".join(f"{side} {worker.call('size'):,}" for side, worker in running.items())
            peaks = {side: worker.peak() for side, worker in running.items()}
        _, (batch, length) = SHAPES[shape]
        for peer in sides:
            if peer != "trivium":
                rows += common.rates(found, f"{shape}, {batch} x {length}", options.steps * batch * length, peer=peer, goal=GOAL)
                rows.append(common.Row(f"{shape}: peak memory", "MB", "less", [peaks["trivium"]], peer, [peaks[peer]]))
    facts = {"parameters": sizes} | ({} if "litgpt" in sides else {"litgpt": "not installed, so it took no part"})
    notes = [
        "trivium: the loop's own update, bf16 weights with fp32 masters, clipping, checks that all is finite",
        "transformers: sdpa attention, its own loss; litgpt: its model, untied head; both bf16 weights without masters, fused AdamW, clipping",
        "no compile, no checkpointing, the default allocator on every side",
    ]
    versions = common.versions("trivium", "torch", "transformers", "litgpt")
    common.report("train", options, rows, facts=facts, notes=notes, versions=versions, machine=machine)


if __name__ == "__main__":
    main()
