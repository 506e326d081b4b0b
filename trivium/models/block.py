"""A block: a mixer, a reader of memory and a feed-forward part, each with its norm and its way into the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from ..core.spec import Spec
from ..nn.attention import Mixer, MixerModule, Place
from ..nn.feedforward import FFN, FFNModule
from ..nn.keepers import State
from ..nn.norms import RMS, Norm
from ..nn.residual import Join, Plain, Residual
from ..nn.step import Step


class Block(Spec):
    """What one kind of layer is.

    `norm_at`: `pre`, x + f(norm(x)); `post`, norm(x + f(x)) (arXiv:2002.04745), which with a residual scale of 1/alpha is
    DeepNorm (arXiv:2203.00555); `reordered`, x + norm(f(x)) (OLMo 2, arXiv:2501.00656); `sandwich`, x + norm(f(norm(x)))
    with two norms (arXiv:2105.13290, Gemma 2).
    `parallel`: mixer and feed-forward part read the same norm of the stream, and one sum of both joins it (GPT-J, PaLM,
    arXiv:2204.02311).
    """

    mixer: SerializeAsAny[Mixer] | None = Field(None, description="what mixes positions")
    cross: SerializeAsAny[Mixer] | None = Field(None, description="what reads the memory, such as an encoder's output")
    ffn: SerializeAsAny[FFN] | None = Field(None, description="what works on each position alone")
    norm: SerializeAsAny[Norm] = Field(RMS(), description="the norm of each sublayer")
    norm_at: Literal["pre", "post", "reordered", "sandwich"] = Field("pre", description="where the norms stand")
    parallel: bool = Field(False, description="mixer and ffn side by side, on one norm")
    residual: SerializeAsAny[Residual] = Field(Plain(), description="how a sublayer's output joins the stream")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of a channel of a sublayer's output to be dropped, in training")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mixer is None and self.cross is None and self.ffn is None:
            raise ValueError("a block needs a mixer, a cross, an ffn, or several of them")
        if self.parallel and (self.mixer is None or self.ffn is None or self.cross is not None or self.norm_at != "pre"):
            raise ValueError("a parallel block has a mixer, an ffn and no cross, and its norm_at is pre")
        return self

    def build(self, dim: int, place: Place) -> Layer:
        return Layer(self, dim, place)


class Layer(nn.Module):
    """A built block at its `place` in the whole model. Sublayers are called `mixer`, `cross` and `ffn`; each one's norms and
    way into the stream bear its name."""

    def __init__(self, spec: Block, dim: int, place: Place):
        super().__init__()
        self.spec, self.index = spec, place.index
        for number, (name, part) in enumerate((("mixer", spec.mixer), ("cross", spec.cross), ("ffn", spec.ffn))):
            if part is None:
                continue
            if not (spec.parallel and name == "ffn"):
                self.add_module(f"{name}_norm", spec.norm.build(dim))
                join = spec.residual.build(dim)
                join.settle(2 * place.index + min(number, 1))
                self.add_module(f"{name}_join", join)
            module = part.build(dim)
            self.add_module(name, module)
            if isinstance(module, FFNModule):
                module.layer = place.index
            if spec.norm_at == "sandwich":
                self.add_module(f"{name}_out_norm", spec.norm.build(dim))
        for mixer in self.mixers().values():
            mixer.settle(place)

    def mixers(self) -> dict[str, MixerModule]:
        """The sublayers that may keep state: mixer and cross, where they are there."""
        return {name: module for name, module in self._modules.items() if isinstance(module, MixerModule)}

    def _part(self, name: str) -> nn.Module:
        module = self._modules[name]
        assert module is not None
        return module

    def state(self) -> State:
        """What a store keeps for this layer; entries of the cross bear its name."""
        return {
            name if part == "mixer" else f"{part}.{name}": entry for part, m in self.mixers().items() for name, entry in m.state().items()
        }

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.feed(self.mix(x, step), step)

    def mix(self, x: Tensor, step: Step) -> Tensor:
        """The first half: what mixes positions, and what reads the memory. All of a parallel block."""
        if self.spec.mixer is not None:
            x = self._sublayer("mixer", x, lambda y: self._part("mixer")(y, step, step.handle(self.index)), step)
        if self.spec.cross is not None:
            x = self._sublayer("cross", x, lambda y: self._part("cross")(y, step, step.handle(self.index, prefix="cross.")), step)
        return x

    def feed(self, x: Tensor, step: Step) -> Tensor:
        """The second half: what works on each position alone."""
        if self.spec.ffn is not None and not self.spec.parallel:
            x = self._sublayer("ffn", x, lambda y: self._part("ffn")(y, step), step)
        return x

    def _sublayer(self, name: str, x: Tensor, run: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        """The stream x with what the sublayer `name` makes of it."""
        spec, norm, join = self.spec, self._part(f"{name}_norm"), self._part(f"{name}_join")
        assert isinstance(join, Join)
        y, read = join.read(x)
        stream = y
        if spec.norm_at in ("pre", "sandwich"):
            y = norm(y)
        inner = y
        y = run(y) + self._part("ffn")(y, step) if spec.parallel else run(y)
        if (adapted := self._modules.get(f"{name}_adapters")) is not None:
            y = adapted(stream, inner, y, step)
        if spec.norm_at == "reordered":
            y = norm(y)
        elif spec.norm_at == "sandwich":
            y = self._part(f"{name}_out_norm")(y)
        if spec.dropout:
            y = F.dropout(y, spec.dropout, self.training)
        x = join.write(x, y, read)
        return norm(x) if spec.norm_at == "post" else x
