"""Which of a model's own parameters are trained: the last layers and named modules alone. Feature extraction trains the head
alone; a classifier in GPT's style the head, the final norm and the last layer. For training: a saved model has no need of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..core.errors import ConfigError
from ..models.block import Layer
from ..models.model import BuiltModel
from .passes import Pass


class Freeze(Pass):
    """All parameters stay as they are but those of the last `last` layers and of the modules in `train`."""

    lasting: ClassVar[bool] = False
    kind: Literal["freeze"] = "freeze"
    last: int = Field(0, ge=0, description="how many layers are trained, counted from the last")
    train: tuple[str, ...] = Field(("head",), description="further modules that are trained, by name, such as head, final_norm or embed")

    @classmethod
    def tiny(cls) -> Freeze:
        return cls(last=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.last and not self.train:
            raise ValueError("nothing would be trained: name modules in train, or say how many layers in last")
        return self

    def change(self, model: BuiltModel[Any]) -> None:
        layers = [name for name, module in model.named_modules() if isinstance(module, Layer)]
        if self.last > len(layers):
            raise ConfigError(
                f"freeze: the last {self.last} layers are to be trained, the model has {len(layers)}", field="last", value=self.last
            )
        modules = dict(model.named_modules())
        for name in self.train:
            if name not in modules or not any(True for _ in modules[name].parameters()):
                choices = sorted(child for child, module in model.named_children() if any(True for _ in module.parameters()))
                raise ConfigError(
                    f"freeze: {name!r} is no module of this model with parameters of its own (there are: {', '.join(choices)}; a tied head is "
                    "part of embed)",
                    field="train",
                    value=name,
                    choices=choices,
                )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in (*layers[len(layers) - self.last :], *self.train):
            for path, parameter in modules[name].named_parameters():
                if not parameter.is_floating_point():
                    raise ConfigError(
                        f"freeze: {name}.{path.rpartition('.')[0]} holds its weights in four bits, which cannot be trained: leave it out of "
                        "nf4 (keep), or train an adapter",
                        field="train",
                        value=name,
                    )
                parameter.requires_grad_(True)
