"""Mixture of experts: a router sends each token to a few of many small MLPs (arXiv:1701.06538, arXiv:2401.04088).

Shared experts that see every token and fine-grained ones are arXiv:2401.06066. Experts are plain MLPs in a list, not stacked
tensors: each of their maps is a `Linear` that adapters, quantization and weight rules treat as any other, and tokens sorted
by expert make one product for each map. Stacking them for one grouped kernel would be a lowering pass; spreading them over
devices is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .feedforward import FFN, MLP, FFNModule
from .products import Multiplies, Product
from .routing import Groups, Router, Routing, within_capacity
from .step import Step


class MoE(FFN):
    """sum over a token's `top_k` experts of weight * expert(x), and `shared`(x), which every token has.

    `softmax` with `normalize` is Mixtral's router and, with `router_bias`, gpt-oss's (a softmax over the chosen alone is
    the same); `sigmoid` with `groups`, `correction` and `scale` is DeepSeek-V3's.
    """

    kind: Literal["moe"] = "moe"
    experts: int = Field(gt=0, description="how many experts there are")
    top_k: int = Field(gt=0, description="experts that each token is sent to")
    expert: MLP = Field(description="what each expert is")
    shared: MLP | None = Field(None, description="an expert beside the router, for every token")
    shared_gate: bool = Field(False, description="the shared expert is multiplied by a sigmoid of the input (Qwen 2)")
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="what makes scores of the router's logits")
    normalize: bool = Field(True, description="weights are divided by their sum")
    scale: float = Field(1.0, description="what the weights of routed experts are multiplied by")
    groups: Groups | None = Field(None, description="groups of experts that bound a token's choice; none given: all are open")
    router_bias: bool = Field(False, description="the router's logits have a bias")
    correction: bool = Field(False, description="a vector that moves choices towards idle experts; no gradient, see the objective")
    capacity: float | None = Field(
        None, gt=0, description="an expert's room in a row, as a multiple of an even share; who finds no room is dropped"
    )

    @classmethod
    def tiny(cls) -> MoE:
        return cls(experts=4, top_k=2, expert=MLP(hidden=12))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k ({self.top_k}) is more than there are experts ({self.experts})")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate needs a shared expert")
        if self.groups is not None:
            size, rest = divmod(self.experts, self.groups.count)
            if rest or (self.groups.rank == "top2" and size < 2):
                raise ValueError(
                    f"experts ({self.experts}) must make {self.groups.count} groups of like size, of two or more for rank top2"
                )
            if self.groups.chosen * size < self.top_k:
                raise ValueError(
                    f"top_k ({self.top_k}) is more than the experts of {self.groups.chosen} groups ({self.groups.chosen * size})"
                )
        return self

    @classmethod
    def exempted(cls) -> MoE:
        return cls.tiny().replace(capacity=0.8)

    @property
    def exempt(self) -> Mapping[str, str]:
        if self.capacity is None:
            return {}
        why = "capacity: which tokens an expert has room for depends on the others of the row"
        return {"cache": why, "packing": why, "flops": "capacity: products of dropped tokens are counted"}

    def room(self, tokens: int) -> int:
        """How many choices an expert takes from a row of `tokens`."""
        assert self.capacity is not None
        return math.ceil(self.capacity * self.top_k * tokens / self.experts)

    def build(self, dim: int) -> MoELayer:
        return MoELayer(self, dim)


class Experts(nn.ModuleList):
    """MLPs that are alike; each token is sent to `top_k` of them."""

    def __init__(self, spec: MoE, dim: int):
        super().__init__(spec.expert.build(dim) for _ in range(spec.experts))
        self.top_k = spec.top_k


class Gate(Multiplies):
    """sigmoid(weight x): [..., C] -> [..., 1]."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).sigmoid()

    def multiplied(self, tokens: int, *, flowing: bool) -> list[Product]:
        return [Product(2 * tokens * self.weight.numel(), flowing, self.weight.requires_grad)]


class MoELayer(FFNModule):
    """Leaves in `step.aux`: `loads`, how many real tokens chose each expert, before capacity drops any; but when decoding,
    the terms `balance` and `router_z` (see `Routing`)."""

    def __init__(self, spec: MoE, dim: int):
        super().__init__()
        self.spec = spec
        self.router = Router(
            dim,
            spec.experts,
            top_k=spec.top_k,
            score=spec.score,
            normalize=spec.normalize,
            scale=spec.scale,
            groups=spec.groups,
            bias=spec.router_bias,
            correction=spec.correction,
        )
        self.experts = Experts(spec, dim)
        self.shared = spec.shared.build(dim) if spec.shared is not None else None
        self.shared_gate = Gate(dim) if spec.shared_gate else None
        self.dispatch: Dispatch = grouped

    def forward(self, x: Tensor, step: Step) -> Tensor:
        spec, flat = self.spec, x.flatten(0, -2)
        routing = self.router(flat)
        real = (step.segments >= 0).flatten() if step.segments is not None else None
        self._record(routing, real, step)
        kept = None
        if spec.capacity is not None:
            rows, count = x.shape[:2]
            kept = within_capacity(routing.chosen, real, rows=rows, experts=spec.experts, capacity=spec.room(count))
        y = self.dispatch(self.experts, flat, routing, kept, step).view_as(x)
        if self.shared is None:
            return y
        shared = self.shared(x, step)
        return y + (shared if self.shared_gate is None else self.shared_gate(x) * shared)

    def _record(self, routing: Routing, real: Tensor | None, step: Step) -> None:
        load = step.aux.loads[self.layer] = routing.load(real)
        if step.inputs.cache is None:
            step.aux.terms["balance", self.layer] = routing.balance(load, real)
            step.aux.terms["router_z", self.layer] = routing.z(real)


Dispatch = Callable[[Experts, Tensor, Routing, Tensor | None, Step], Tensor]


def grouped(experts: Experts, x: Tensor, routing: Routing, kept: Tensor | None, step: Step) -> Tensor:
    """[N, C] -> [N, C]: tokens sorted by expert, each expert called once on its own. Sums are made token by
    token in the order of choice, so a token's answer depends on no other token. `kept` [N, K]: which choices count."""
    flat, top_k = routing.chosen.flatten(), routing.chosen.shape[1]
    if kept is not None:
        flat = flat.masked_fill(~kept.flatten(), len(experts))  # sorted behind the last expert
    sizes = _counts(flat, experts=len(experts))
    order = flat.argsort(stable=True)[: sum(sizes)]  # places in [N * K]
    tokens = order // top_k
    pieces = zip(experts, x[tokens].split(sizes), tokens.split(sizes), strict=True)
    every = torch.is_grad_enabled()  # so that gradients of experts that none chose are zero, as everywhere else, and not missing
    found = [expert(piece, of_tokens(step, own)) for expert, piece, own in pieces if every or len(own)]
    answers = torch.cat(found) if found else x[tokens]
    spread = answers.new_zeros(flat.numel(), x.shape[1]).index_copy(0, order, answers).view(-1, top_k, x.shape[1])
    return (spread * routing.weights.to(x.dtype)[..., None]).sum(1)


def _counts(flat: Tensor, *, experts: int) -> list[int]:
    """How often each expert stands in `flat`, read on the host. Tensors that hold nothing are taken to be even."""
    if flat.is_meta or isinstance(flat, FakeTensor):
        share, rest = divmod(flat.numel(), experts)
        return [share + (e < rest) for e in range(experts)]
    return torch.bincount(flat, minlength=experts)[:experts].tolist()


def naive(experts: Experts, x: Tensor, routing: Routing, kept: Tensor | None, step: Step) -> Tensor:
    """[N, C] -> [N, C]: every expert on every token, times its weight there, which is mostly 0. What `grouped` must equal."""
    out, everyone = torch.zeros_like(x), of_tokens(step, torch.arange(len(x), device=x.device))
    for index, expert in enumerate(experts):
        counts = routing.chosen == index if kept is None else (routing.chosen == index) & kept
        out = out + (routing.weights * counts).sum(-1, keepdim=True).to(x.dtype) * expert(x, everyone)
    return out


def of_tokens(step: Step, tokens: Tensor) -> Step:
    """The step as a map sees it whose rows are single `tokens` [n] of the flattened batch: each has its row's adapter."""
    if step.adapters is None:
        return step
    return replace(step, adapters=step.adapters[tokens // step.count], _memo={})
