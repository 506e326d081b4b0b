"""(IA)^3 in PEFT's layout: a vector for each map, of its outputs or, in feed-forward modules, of its inputs. Maps that stand as one
on disk (GPT-2's c_attn) are scaled together: our own apart are written with ones for those that have none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapt.adapter import updates
from ..adapt.ia3 import IA3
from ..adapt.passes import linears
from ..core.errors import ConfigError, FileError
from ..models.transformer import TransformerModel
from .peft_format import PREFIX, WEIGHTS, Format, PeftConfig, endings, listed, say_rounding, sites_of, take
from .rules import some
from .tensors import Lazy


class Ia3Config(PeftConfig):
    """Field names are PEFT's."""

    peft_type: Literal["IA3"]
    target_modules: str | tuple[str, ...]
    feedforward_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] | None = None
    fan_in_fan_out: bool = False


class Ia3Format(Format):
    peft_type = "IA3"
    config = Ia3Config
    values = {"init_ia3_weights": (True, False)}

    def read(self, path: Path, config: Any, tensors: Mapping[str, Lazy], model: TransformerModel, family: str, name: str) -> IA3:
        places, own, shapes = sites_of(model, family), linears(model), {}
        chosen = [place for place in places if listed(config.target_modules, place) and not listed(config.exclude_modules, place)]
        if not chosen:
            raise FileError(f"{path / WEIGHTS}: target_modules match no linear map of this base")
        inward = {place for place in chosen if listed(config.feedforward_modules, place)}
        for place in chosen:
            weights = [own[mine].weight for mine in places[place].ours]
            size = (1, weights[0].shape[1]) if place in inward else (sum(map(len, weights)), 1)
            shapes[f"{PREFIX}{place}.ia3_l"] = size
        found = take(path, tensors, shapes)
        every = [mine for site in places.values() for mine in site.ours]
        targets, inputs = ([mine for place in some_places for mine in places[place].ours] for some_places in (chosen, inward))
        step = IA3(name=name, targets=tuple(endings(targets, every)), inputs=tuple(endings(inputs, every)))
        step.apply(model)
        with torch.no_grad():
            for place in chosen:
                parts = [updates(model, name)[mine][1].factor for mine in places[place].ours]
                flat = found[f"{PREFIX}{place}.ia3_l"].flatten()
                for factor, rows in zip(
                    parts, [flat] * len(parts) if place in inward else flat.split([len(f) for f in parts]), strict=True
                ):
                    factor.copy_(rows)
        say_rounding(path, tensors, model)
        return step

    def write(self, step: Any, model: TransformerModel, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        found = {mine: update for mine, (_, update) in updates(model, step.name).items()}
        places, own, tensors, inward = sites_of(model, family), linears(model), {}, []
        for place, site in places.items():
            mine = [name for name in site.ours if name in found]
            if not mine:
                continue
            if found[mine[0]].side == "in":
                if len(site.ours) > 1:
                    raise ConfigError(f"adapter {step.name!r}: {place} holds {some(site.ours)} in one, whose inputs are scaled together")
                inward.append(place)
                tensors[f"{PREFIX}{place}.ia3_l"] = found[mine[0]].factor[None]
                continue
            parts = [found[name].factor if name in found else own[name].weight.new_ones(len(own[name].weight)) for name in site.ours]
            tensors[f"{PREFIX}{place}.ia3_l"] = torch.cat([part.detach() for part in parts])[:, None]
        written = [key.removeprefix(PREFIX).removesuffix(".ia3_l") for key in tensors]
        return {
            "target_modules": sorted(endings(written, places)),
            "feedforward_modules": sorted(endings(inward, places)),
            "fan_in_fan_out": any(places[place].transposed for place in written),
        }, tensors
