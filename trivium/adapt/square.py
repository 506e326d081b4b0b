"""MoRA (arXiv:2405.12130) as a pass: one square matrix beside each map, of as many parameters as LoRA's pair and high rank."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..core.errors import ConfigError
from ..models.model import BuiltModel
from ..nn.adapted_maps import Square, square_size
from .adapter import Adapter, adapt_linear
from .passes import Targets, select


class MoRA(Adapter):
    """W x + out(M in(x)) on chosen linear maps; only M, [S, S] with S about sqrt((in + out) rank), is trained."""

    kind: Literal["mora"] = "mora"
    rank: int = Field(16, gt=0, description="the rank at which LoRA would have as many parameters")
    targets: Targets = Field("all-linear", description="module names or their endings, such as q or ffn.out")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance of an input channel to be dropped on its way into M, in training")

    @classmethod
    def tiny(cls) -> MoRA:
        return cls(rank=3, targets=("q", "ffn.out"))

    def put(self, model: BuiltModel[Any]) -> None:
        for name, module in select(model, self.targets, what=f"adapter {self.name!r}").items():
            outputs, inputs = module.weight.shape
            if self.rank > min(inputs, outputs):
                raise ConfigError(
                    f"adapter {self.name!r}: rank {self.rank} is above the size of {name} ({outputs} x {inputs})",
                    field="rank",
                    value=self.rank,
                )
            adapted = adapt_linear(model, name, module)
            adapted.lora[self.name] = Square(adapted, size=square_size(inputs, outputs, self.rank), dropout=self.dropout)
