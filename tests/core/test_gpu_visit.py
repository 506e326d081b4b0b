"""The list of what waits for a GPU runs, item by item, where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SPEC = importlib.util.spec_from_file_location("gpu_visit", Path(__file__).parents[2] / "scripts" / "gpu_visit.py")
assert SPEC is not None and SPEC.loader is not None
gpu_visit = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_visit"] = gpu_visit
SPEC.loader.exec_module(gpu_visit)


@pytest.mark.parametrize("item", gpu_visit.ITEMS, ids=lambda item: item.name)
def test_item_meets_its_expectation_on_the_cpu(item):
    assert item.measure(torch.device("cpu")) <= item.expected


def test_without_a_gpu_it_says_so(capsys):
    if not torch.cuda.is_available():
        assert gpu_visit.main([]) == 1 and "no GPU here" in capsys.readouterr().err
