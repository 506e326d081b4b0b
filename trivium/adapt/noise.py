"""NEFTune (arXiv:2310.05914) as a pass: noise on embeddings while the model is trained. It has no parameters, and beside virtual
tokens, which embed for themselves, it does nothing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ..core.errors import ConfigError
from ..models.model import BuiltModel
from ..nn.embeddings import TokenEmbedding
from ..nn.noise import EmbeddingNoise
from .passes import Pass


class Noise(Pass):
    """Uniform noise of at most alpha / sqrt(length * width) on every embedding, in training alone."""

    lasting: ClassVar[bool] = False
    kind: Literal["noise"] = "noise"
    alpha: float = Field(5.0, gt=0, description="its size; the paper's are 5, 10 and 15")

    @classmethod
    def tiny(cls) -> Noise:
        return cls()

    def change(self, model: BuiltModel[Any]) -> None:
        found = [module for module in model.modules() if isinstance(module, TokenEmbedding)]
        if not found:
            raise ConfigError("noise: the model embeds no tokens", field="kind", value=self.kind)
        for embed in found:
            embed.noise = EmbeddingNoise(self.alpha)
