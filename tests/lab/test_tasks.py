"""The made-up tasks of experiments: their labels say what they are meant to say."""

from __future__ import annotations

import torch

from trivium.core.seed import generator
from trivium.lab.experiments import captions, encoders

SOURCE = """import os.path
import numpy as np
class Tree:
    def grow(self, by, *more, far=1):
        leaf = np.ones(by)
        def inner():
            return far, leaf, self
        return os.path.join(Tree, helper(more))
def helper(os):
    return os
"""


def test_roles_are_those_of_names_in_use():
    found = [(SOURCE[first:end], role) for first, end, role in encoders.roles(SOURCE)]
    assert found == [
        ("np", "module"),
        ("by", "argument"),
        ("far", "argument"),
        ("os", "module"),
        ("Tree", "class"),
        ("helper", "function"),
        ("more", "argument"),
        ("os", "argument"),  # what an argument hides is not the module
    ]


def test_a_scene_shows_what_its_answers_say():
    shown = captions.scenes(64, generator(0, "test"))
    prompt, caption = shown.asked("caption", torch.zeros(64, dtype=torch.int64))
    assert prompt.unique().tolist() == [captions.WORDS.index("caption")] and caption.shape == (64, 6)
    for row in range(64):
        words = [captions.WORDS[i] for i in caption[row].tolist()]
        seen = [words[:3], words[3:]]
        for number, place in enumerate(captions.PLACES):
            top, left = (8 * x for x in divmod(number, 2))
            cell = shown.images[row, :, top : top + 8, left : left + 8]
            here = [thing for thing in seen if thing[2] == place]
            assert bool(here) == bool(cell.max() > 0.7)
            for color, shape, _ in here:
                painted = captions.stencils()[captions.SHAPES.index(shape)].bool()
                strength = cell[:, painted].mean(1)
                assert torch.equal(strength > 0.5, torch.tensor(captions.COLORS[color]) == 1) and cell[:, ~painted].max() < 0.7
    for which in (0, 1):
        for kind, told, wanted in (("color-of", 1, 0), ("shape-of", 0, 1), ("place-of", 1, 2)):
            asked, answer = shown.asked(kind, torch.full((64,), which))
            assert torch.equal(asked[:, 1], caption[:, 3 * which + told]) and torch.equal(answer[:, 0], caption[:, 3 * which + wanted])


def test_what_is_masked_is_asked_for():
    ids = torch.arange(1000) % 512
    seen, whole, chosen = encoders.masked(ids, 400, generator(0, "test"))
    assert torch.equal(seen[~chosen], whole[~chosen]) and (whole[:, 1:] - whole[:, :-1]).remainder(512).eq(1).all()
    assert abs(float(chosen.float().mean()) - 0.15) < 0.01
    assert abs(float((seen[chosen] == encoders.MASK).float().mean()) - 0.8) < 0.03
    assert abs(float((seen[chosen] == whole[chosen]).float().mean()) - 0.1) < 0.03
