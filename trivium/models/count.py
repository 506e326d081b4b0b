"""What a model costs, counted without running it: parameters, matrix products forward and backward, cache.

The modules are walked as they stand after all passes, also on the meta device: linear maps and adapters count their own
sizes, mixers declare the products beside them, so a new part needs nothing here. Elementwise work is left out, as in
torch's FlopCounterMode; attention is counted as its naive statement, gradients as autograd takes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..nn.adapted import AdaptedLinear, LinearUpdate
from ..nn.adapted_inputs import SoftPrefix, Through, VirtualTokens
from ..nn.attention import MixerModule
from ..nn.heads import LanguageHead
from ..nn.inputs import Inputs
from ..nn.keepers import Slots
from ..nn.linear import Linear, Projections
from ..nn.moe import Experts, MoELayer
from ..nn.nf4 import Nf4Linear
from ..nn.products import Multiplies, Product
from ..nn.sparse import Aside
from ..nn.step import Step
from .block import Layer
from .checkpointing import Recompute
from .transformer import TransformerModel


@dataclass(frozen=True)
class Parameters:
    """`total` counts shared ones once; `trained` are those that require a gradient; `active` are those that one token
    passes through: of experts, as many as it is sent to."""

    total: int
    trained: int
    active: int


def parameters(model: nn.Module) -> Parameters:
    """Exact, whatever device the model is on."""
    total = _numbers(model)
    experts = [(_numbers(module), module) for module in model.modules() if isinstance(module, Experts)]
    idle = sum(size - size * module.top_k // len(module) for size, module in experts)
    return Parameters(total, sum(p.numel() for p in model.parameters() if p.requires_grad), total - idle)


def _numbers(model: nn.Module) -> int:
    """How many there are in a model, whatever the bits that hold them."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            sizes |= {id(p): 0 for p in (module.scales, module.outer, module.like) if p is not None}
            sizes[id(module.codes)] = module.inputs * module.outputs
    return sum(sizes.values())


@dataclass(frozen=True)
class Flops:
    """Floating-point operations in matrix products. `again`: what gradient checkpointing computes a second time."""

    forward: int
    backward: int
    again: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.again


def flops(model: TransformerModel, segments: Tensor, *, kept: int, memory: Tensor | None = None) -> Flops:
    """Of one batch with `segments` [B, T] (the document of each token, -1 is padding), on the CPU. `kept`: at how many
    places logits are computed. `memory` [B, M, C]: what cross-attention reads. The backward is that of all parameters that
    require a gradient."""
    if model.virtual is not None:
        segments = model.virtual.widened(segments)
    step = Step.begin(Inputs(torch.zeros_like(segments), segments=segments, memory=memory), causal=model.spec.causal)
    return _count(model, step, tokens=segments.numel(), kept=kept)


def decoding_flops(model: TransformerModel, *, held: int, memory: Tensor | None = None) -> int:
    """Of one more token of one row whose cache holds `held`, and what cross-attention made of `memory` [1, M, C]."""
    inputs = Inputs(torch.zeros(1, 1, dtype=torch.int64), memory=memory)
    step = Step(torch.tensor([[held]]), None, Slots(held, held + 1, None, None), None, inputs, model.spec.causal)
    return _count(model, step, tokens=1, kept=1, recalled=True).forward


def cache_bytes(model: TransformerModel) -> list[int]:
    """By layer: the bytes that one token of one row takes in a cache of the model's dtype."""
    states = [layer.state() for layer in model.layers if isinstance(layer, Layer)]
    return [sum(entry.per_token(model.dtype) for entry in state.values()) for state in states]


def state_bytes(model: TransformerModel) -> list[int]:
    """By layer: the bytes that one row takes in a cache of the model's dtype however long it is."""
    states = [layer.state() for layer in model.layers if isinstance(layer, Layer)]
    return [sum(entry.constant(model.dtype) for entry in state.values()) for state in states]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(model: TransformerModel, step: Step, *, tokens: int, kept: int, recalled: bool = False) -> Flops:
    walk = _Walk(step, recalled=recalled)
    flowing = walk.visit(model.embed, tokens, flowing=False)
    if model.virtual is not None and not recalled:
        flowing = walk.made(model.virtual) or flowing
    halves: list[dict[str, list[Product]]] = []
    for layer in model.layers:
        halves.append({"mixer": [], "ffn": []})
        for name, child in _as_run(layer):
            before = len(walk.products)
            flowing = walk.visit(child, tokens, flowing=flowing)
            halves[-1]["ffn" if name.startswith("ffn") else "mixer"] += walk.products[before:]
    flowing = walk.visit(model.final_norm, tokens, flowing=flowing)
    if model.spec.head.reads == "documents":
        kept = step.inputs.shape[0] if step.segments is None else len(step.runs)
    walk.visit(model.head, kept, flowing=flowing)
    if isinstance(model.head, LanguageHead) and model.head.spec.tied:
        table = model.embed.weight
        assert isinstance(table, Tensor)
        walk.products.append(Product(2 * kept * model.head.readings * table.numel(), flowing, table.requires_grad))
    forward, backward = sum(p.flops for p in walk.products), sum(p.backward for p in walk.products)
    return Flops(forward, backward, 0 if model.recompute is None else _again(halves, model.recompute))


def _as_run(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """A layer's children in the order in which they run: adapters of a sublayer, which came later, right behind it."""
    found = dict(layer.named_children())
    order = [name for own in found for name in (own, f"{own}_adapters") if name in found]
    return [(name, found[name]) for name in dict.fromkeys(order)]


def _again(halves: list[dict[str, list[Product]]], recompute: Recompute) -> int:
    """What is computed a second time: stretches through which gradients pass, but for a last plain product, whose result
    no gradient needs."""
    if recompute.only is None:
        stretches = [
            [product for layer in halves[i : i + recompute.every] for half in layer.values() for product in half]
            for i in range(0, len(halves), recompute.every)
        ]
    else:
        stretches = [layer[recompute.only] for layer in halves]
    return sum(
        p.flops for stretch in stretches if any(p.backward for p in stretch) for p in (stretch[:-1] if stretch[-1].right else stretch)
    )


class _Walk:
    """Collects products. Modules run in the order of their registration; those of a container of projections, and an
    adapted map's base and updates, read the same input."""

    def __init__(self, step: Step, *, recalled: bool):
        self.step, self.recalled = step, recalled  # whether the cache holds what was made of the memory
        self.products: list[Product] = []
        self.keyed = False  # whether an adapter writes keys and values of its own

    def made(self, virtual: VirtualTokens) -> bool:
        """What makes virtual tokens, once a forward. Returns whether they bring gradients into the stream itself."""
        for soft in virtual.softs.values():
            if soft.through is not None:
                assert isinstance(soft.through, Through)
                for linear in soft.through.maps:
                    self.visit(linear, soft.length, flowing=True)
        self.keyed = any(isinstance(soft, SoftPrefix) for soft in virtual.softs.values())
        return any(not isinstance(soft, SoftPrefix) for soft in virtual.softs.values())

    def adapted(self, host: AdaptedLinear, tokens: int, *, flowing: bool) -> bool:
        """A linear map and its updates, of which each is run on every token, as one that is alone."""
        updates = [update for update in host.updates.values() if isinstance(update, LinearUpdate)]
        if not updates or not all(update.replaces for update in updates):
            self.visit(host.base, tokens, flowing=flowing or any(update.inward for update in updates))
        for update in updates:
            self.products += update.multiplied(tokens, flowing=flowing)
        return flowing or any(parameter.requires_grad for parameter in host.parameters())

    def visit(self, module: nn.Module, tokens: int, *, flowing: bool) -> bool:
        """`flowing`: whether the input has a gradient. Returns whether the output has one."""
        if isinstance(module, Linear):
            self.products.append(Product(2 * tokens * module.weight.numel(), flowing, module.weight.requires_grad))
        elif isinstance(module, AdaptedLinear):
            return self.adapted(module, tokens, flowing=flowing)
        elif isinstance(module, Multiplies):
            self.products += module.multiplied(tokens, flowing=flowing)
        elif isinstance(module, Experts):
            return self._chosen(module, tokens, flowing=flowing)
        elif isinstance(module, Projections | nn.ModuleDict | MoELayer):
            outs = [self.visit(child, tokens, flowing=flowing) for child in module.children()]  # every one, so no generator
            return any(outs)
        flowing = flowing or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        flows: dict[str, bool] = {}
        last = [role for role, child in module.named_children() if isinstance(child, Projections) and role != "memory"][-1:]
        for role, child in module.named_children():
            if isinstance(child, Aside):  # its inputs are detached, and it trains on a term of its own
                before = len(self.products)
                self.visit(child, tokens, flowing=False)
                self.products[before:] = [replace(p, left=False, right=p.right and child.training) for p in self.products[before:]]
            elif isinstance(module, MixerModule) and isinstance(child, Projections):
                if role == "memory":
                    memory = self.step.inputs.memory
                    assert memory is not None, "a model that reads a memory is counted with one"
                    if self.recalled:
                        continue
                    self.visit(child, memory.shape[:2].numel(), flowing=memory.requires_grad)
                    continue
                flows |= {name: self.visit(inner, tokens, flowing=flowing) for name, inner in child.named_children()}
                if self.keyed:
                    flows |= {name: True for name in ("k", "v") if name in flows}
                own = module.products(self.step, flows) if [role] == last else []
                self.products += own
                flowing = any(product.backward for product in own) or any(flows.values())
            else:
                flowing = self.visit(child, tokens, flowing=flowing)
        return flowing

    def _chosen(self, experts: Experts, tokens: int, *, flowing: bool) -> bool:
        """Each of the E experts with an even share of what is sent to them; what capacity drops is counted too."""
        before = len(self.products)
        outs = [self.visit(expert, tokens * experts.top_k, flowing=flowing) for expert in experts]
        self.products[before:] = [replace(product, flops=product.flops // len(experts)) for product in self.products[before:]]
        return any(outs)
