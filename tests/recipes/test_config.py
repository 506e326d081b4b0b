"""A run is its config: the same YAML and seed give the same run, the saved config too, and a wrong one says where."""

from __future__ import annotations

import pytest

from tests.recipes.toys import write_rows
from trivium.core import config as configs
from trivium.optim.optimizers import AdamW
from trivium.recipes.from_scratch import FromScratch
from trivium.recipes.pretrain import Pretrain
from trivium.recipes.sft import SFT
from trivium.train import history
from trivium.train.loop import TrainConfig

RUN = """\
model: {model}
data: [rows.jsonl]
length: 256
adapter: {{rank: 2, targets: [q, ffn.out]}}
optim: {{kind: adamw, lr: 1e-2}}
schedule: {{kind: linear, warmup: 1}}
train: {{steps: 3, rows: 1, precision: fp32, seed: {seed}, track: []}}
"""


def losses(path):
    return [row["loss"] for row in history.read(path)]


@pytest.mark.slow
@pytest.mark.concept("X.61", part="recipes/sft.py")
def test_the_same_yaml_and_seed_give_the_same_run(trivium, toy, tmp_path):
    write_rows(tmp_path / "rows.jsonl", count=16)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.yaml").write_text(RUN.format(model=toy, seed=seed))
        trivium.ok("sft", "--config", f"{name}.yaml", "--out", name)
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2] and losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    trivium.ok("sft", "--config", tmp_path / "a" / "config.yaml", "--out", "again")
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == weights[0]
    changed = trivium("sft", "--config", "a.yaml", "--out", "a", "--optim.lr", "0.5")
    assert changed.status == 1 and "optim.lr: was 0.01, is now 0.5" in changed.err


@pytest.mark.concept("X.61", part="core/config.py")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("lr: 1e-2}}", "optim.lr_: unknown field 'lr_'; did you mean 'lr'"),
        ("kind: adamw", "optim.kind: unknown optimizer 'adam'; did you mean 'adamw'"),
        ("steps: 3", "train.steps: Input should be a valid integer"),
    ],
)
def test_a_wrong_yaml_names_path_line_and_nearest(trivium, toy, tmp_path, wrong, said):
    right = RUN.format(model=toy, seed=1)
    changed = {
        "lr: 1e-2}}": right.replace("lr: 1e-2", "lr_: 1e-2"),
        "kind: adamw": right.replace("adamw", "adam"),
        "steps: 3": right.replace("3,", "few,", 1),
    }
    (tmp_path / "run.yaml").write_text(changed[wrong])
    error = trivium.refused("sft", "--config", "run.yaml", status=2)
    assert said in error and "run.yaml:" in error and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [{"train": TrainConfig(rows=8)}, {"train": TrainConfig(rows=16), "optim": AdamW(lr=1.0)}, {}], ids=str)
def test_a_written_config_is_read_back_as_it_was(changes, tmp_path):
    """Also where a field equals the default of its class, but not that of the recipe."""
    scratch = FromScratch(train=changes["train"]) if changes else FromScratch()
    for spec in (SFT(data=("a",), **changes), Pretrain(tokenizer="t", data=("a",), **changes), scratch):
        path = tmp_path / "config.yaml"
        path.write_text(configs.dump(spec))
        assert configs.resolve(type(spec), [path]).spec == spec
