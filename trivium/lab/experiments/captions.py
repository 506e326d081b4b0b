"""A small vision-language model (patches and a projector, arXiv:2304.08485) that tells of shapes and colors: captions and answers,
right in full, with the image, with another one, and without any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ...core.seed import generator
from ...models.transformer import build, initialize
from ...models.vision_language import VisionLanguage, VisionLanguageModel
from ...nn.heads import NoHead
from ...nn.inputs import Inputs
from ...nn.patches import Patches, fold
from ...nn.positions_absolute import Learned
from ...nn.resampler import MLPConnector
from ...optim.schedules import Cosine
from . import Result, experiment, small

PIXELS, CELL = 16, 8  # an image has four cells, two of which hold a shape
COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "disc", "triangle", "cross")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
WORDS = ("<image>", "caption", "color-of", "shape-of", "place-of", *COLORS, *SHAPES, *PLACES)
KINDS = ("caption", "color-of", "shape-of", "place-of")


@dataclass(frozen=True)
class Scenes:
    """Two things in each of B images [B, 3, 16, 16]: numbers of their colors, shapes and places [B, 2], those of either apart from
    the other's, in the order of the places."""

    images: Tensor
    colors: Tensor
    shapes: Tensor
    places: Tensor

    def asked(self, kind: str, which: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts [B, P] after the image, and answers [B, A], as tokens; of a question, about the thing `which` [B]."""
        color, shape, place = (
            numbers + WORDS.index(first) for numbers, first in ((self.colors, "red"), (self.shapes, "square"), (self.places, "top-left"))
        )
        word = torch.full((len(which), 1), WORDS.index(kind))
        if kind == "caption":
            return word, torch.stack([color, shape, place], -1).flatten(1)
        told, wanted = {"color-of": (shape, color), "shape-of": (color, shape), "place-of": (shape, place)}[kind]
        return torch.cat([word, told.gather(1, which[:, None])], 1), wanted.gather(1, which[:, None])


@cache
def stencils() -> Tensor:
    """[shapes, 8, 8]: each shape, 6 pixels wide, in the middle of its cell."""
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    drawn = (
        torch.ones(6, 6, dtype=torch.bool),
        (x - 2.5) ** 2 + (y - 2.5) ** 2 < 8,
        (x - 2.5).abs() <= (y + 1) / 2,
        ((x - 2.5).abs() < 1) | ((y - 2.5).abs() < 1),
    )
    return pad(torch.stack(drawn).float(), (1, 1, 1, 1))


def scenes(rows: int, g: torch.Generator) -> Scenes:
    """New ones, with noise."""
    two = [torch.rand(rows, 4, generator=g).argsort(1)[:, :2] for _ in range(3)]
    colors, shapes, places = two[0], two[1], two[2].sort(1).values
    paint = torch.tensor(list(COLORS.values()), dtype=torch.float32)[colors]  # [B, 2, 3]
    things = paint[..., None, None] * stencils()[shapes][:, :, None]  # [B, 2, 3, 8, 8]
    cells = torch.zeros(rows, 4, 3 * CELL * CELL).scatter(1, places[..., None].expand(-1, -1, 3 * CELL * CELL), things.flatten(2))
    images = fold(cells, patch=CELL, width=PIXELS)
    return Scenes(images + 0.1 * torch.randn(images.shape, generator=g), colors, shapes, places)


def spec() -> VisionLanguage:
    text = small.shape(layers=2).replace(vocab=len(WORDS))
    embed = Patches(image=PIXELS, patch=CELL, positions=Learned(size=5))
    vision = small.shape(layers=2, attention={"position": None}).replace(vocab=1, embed=embed, head=NoHead(), causal=False)
    return VisionLanguage(vision=vision, connector=MLPConnector(), text=text, image_token=0)


def answers(model: VisionLanguageModel, shown: Scenes, kind: str, which: Tensor, *, blind: bool) -> tuple[Tensor, Tensor]:
    """Logits [B, A, V] of each word of the answers, those before it given, and the answers [B, A]. `blind`: without the image."""
    prompt, answer = shown.asked(kind, which)
    tokens = torch.cat([torch.zeros(len(prompt), 0 if blind else model.spec.places, dtype=torch.int64), prompt, answer], 1)
    logits = model(Inputs(tokens[:, :-1], images=None if blind else shown.images)).logits
    assert logits is not None
    return logits[:, -answer.shape[1] :], answer


def trained(seed: int, steps: int, *, blind: bool) -> VisionLanguageModel:
    model = initialize(build(spec(), device="cpu"), seed=seed, std=0.08)  # at this width, 0.02 learns far more slowly
    assert isinstance(model, VisionLanguageModel)

    def loss(step: int) -> Tensor:
        g = generator(seed, "scene", step)
        total = torch.zeros(())
        for kind in ("caption", KINDS[1 + step % 3]):
            logits, answer = answers(model, scenes(64, g), kind, torch.randint(0, 2, (64,), generator=g), blind=blind)
            total = total + cross_entropy(logits.flatten(0, 1), answer.flatten())
        return total

    small.descend(model, loss, steps=steps, lr=2e-3, schedule=Cosine(warmup=0.05, minimum=0.05))
    return model


@torch.no_grad()
def exact(model: VisionLanguageModel, shown: Scenes, kind: str, *, blind: bool = False) -> float:
    """Share of answers that greedy decoding writes right in full: those whose every word is the likeliest after the right ones."""
    which = torch.arange(len(shown.images)) % 2
    logits, answer = answers(model, shown, kind, which, blind=blind)
    return float((logits.argmax(-1) == answer).all(1).float().mean())


@experiment("captions", "T03.06", question="Does a small vision-language model tell what it sees, and only from the image?")
def captions(effort: float) -> Result:
    """Images of two shapes in two of four places; captions of six words, and questions for a color, a shape or a place. Two layers of
    width 64 on each side, three seeds, 1,024 new images; and as many images in another order, and a model that never saw any."""
    steps, seeds = small.steps_of(900, effort), (0, 1, 2)
    shown = scenes(1024, generator(0, "held"))
    shuffled = replace(shown, images=shown.images.roll(1, 0))
    found: dict[str, dict[str, list[float]]] = {how: {kind: [] for kind in KINDS} for how in ("image", "another image", "text only")}
    for seed in seeds:
        model, blind = trained(seed, steps, blind=False), trained(seed, max(3, steps // 3), blind=True)
        for kind in KINDS:
            found["image"][kind].append(exact(model, shown, kind))
            found["another image"][kind].append(exact(model, shuffled, kind))
            found["text only"][kind].append(exact(blind, shown, kind, blind=True))
    means = {how: {kind: small.mean(values) for kind, values in row.items()} for how, row in found.items()}
    gaps = {kind: small.paired(found["text only"][kind], found["another image"][kind]) for kind in KINDS}
    numbers: dict[str, Any] = {"steps": steps, "exact match by seed": found, "another image less text only": gaps}
    right, prior = min(min(values) for values in found["image"].values()) > 0.9, all(abs(gap["mean"]) < 0.03 for gap in gaps.values())
    told = "; ".join(f"{how}: " + ", ".join(f"{kind} {value:.1%}" for kind, value in row.items()) for how, row in means.items())
    verdict = (
        f"'Over 90%' {'holds' if right else 'does not hold'}; 'shuffled images drop to the text-only prior' "
        f"{'holds' if prior else 'does not hold'} (within 3 points). Exact match, {told}."
    )
    return Result(numbers, verdict, seeds)
