"""What every family is asked, in one place: the same outputs as transformers', the same files, and nothing on our side idle.

A test file states a table of configs and a class `Test...(Family)` or `(Causal)`: how its models are drawn, what they are given
(by default tokens for logits), and what is unusual. Each test runs over each config of the table. A mutation of any one tensor
or key on our side alone must show, so tables give each key two values, and sizes that all differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.parity import hf
from trivium.core.errors import ConfigError, TriviumError
from trivium.io import directory
from trivium.io.hf import Family as Format
from trivium.io.hf import families
from trivium.io.tensors import read_weights
from trivium.nn.inputs import Inputs

SHAPE = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6}
OTHER = {"vocab_size": 89, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5}
LENGTH = 40  # longer than the tables' windows
TOLERANCE = 1e-5  # of the outputs' standard deviation
Table = Mapping[str, tuple[str, dict[str, Any]]]


def tokens(vocab: int, *, seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return ((found - expected).abs().max() / expected.std()).item()


@torch.no_grad()
def off(model: Any, expected: torch.Tensor, x: torch.Tensor) -> float:
    """How far our logits of tokens `x` are from those expected."""
    return apart(model(x).logits, expected)


@torch.no_grad()
def cached_greedy(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    cache = model.cache(len(prompt), prompt.shape[1] + count)
    out, step = [], prompt
    for _ in range(count):
        step = model(Inputs(step, cache=cache), keep="last").logits.argmax(-1, keepdim=True)
        out.append(step)
    return torch.cat(out, 1)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / directory.CONFIG).read_text())


def typeless(config: dict[str, Any]) -> dict[str, Any]:
    """Without the dtype of each part, which transformers adds to what it has loaded."""
    parts = {key: value for key, value in config.items() if isinstance(value, dict)}
    return config | {key: {name: one for name, one in value.items() if name != "dtype"} for key, value in parts.items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: lazy.load().clone() for name, lazy in read_weights(path).items()}


def keys_of(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that a family reads, with the way to it and its value; those of the parts too."""
    for key in sorted(families.get(config["model_type"]).keys.model_fields):
        value = config.get(key)
        if isinstance(value, dict) and "model_type" in value:
            yield from keys_of(value, (*path, key))
        else:
            yield (*path, key), value


def changed(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    return {**tree, key: changed(tree[key], tuple(rest), value) if rest else value}


def overlaid(tree: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Fields over those of a spec's dict; one that names its kind stands alone."""
    alone = {key for key, value in change.items() if not isinstance(value, dict) or "kind" in value or not isinstance(tree.get(key), dict)}
    return {**tree, **{key: value if key in alone else overlaid(tree[key], value) for key, value in change.items()}}


@dataclass(frozen=True)
class Case:
    """transformers' model, the directory that it wrote, and what it says to the family's inputs."""

    theirs: transformers.PreTrainedModel
    path: Path
    expected: torch.Tensor

    def read(self, *, dtype: torch.dtype | None = None) -> directory.Loaded:
        return directory.read(self.path, dtype=dtype)


class Parity:
    """What tests of a family need. `table`: a model_type or class of transformers' (`hf.classes`) and keys, by name."""

    table: Table
    tolerance = TOLERANCE

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.table, indirect=True)

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
        own = cls()
        model = own.tiny(*cls.table[request.param])
        return Case(model, own.save(model, tmp_path_factory.mktemp(request.param)), own.theirs(model))

    def tiny(self, kind: str, keys: dict[str, Any]) -> transformers.PreTrainedModel:
        """A redrawn model of transformers'."""
        return hf.tiny(kind, **keys)

    def save(self, model: transformers.PreTrainedModel, path: Path) -> Path:
        return hf.save(model, path)

    def theirs(self, model: transformers.PreTrainedModel) -> torch.Tensor:
        """What transformers' model says."""
        return hf.logits(model, tokens(model.config.vocab_size))

    def ours(self, model: Any, config: Any) -> torch.Tensor:
        """The same of ours; `config` is theirs."""
        return model(tokens(config.vocab_size)).logits

    @torch.no_grad()
    def off(self, model: Any, case: Case) -> float:
        return apart(self.ours(model, case.theirs.config), case.expected)


class Exported(Parity):
    in_order = True  # tensors lie in the file as transformers lays them

    def test_export_is_what_transformers_writes(self, case: Case, tmp_path: Path) -> None:
        """Files equal byte for byte; transformers loads ours, says the same and writes the same again, and so do we."""
        theirs, loaded, path, again = case.theirs, case.read(), tmp_path / "ours", tmp_path / "again"
        generation = theirs.generation_config.to_diff_dict() if theirs.can_generate() else None
        directory.write(path, loaded.model, family=loaded.family, rest=loaded.rest, generation_config=generation)
        if self.in_order:
            assert (path / "model.safetensors").read_bytes() == (case.path / "model.safetensors").read_bytes()
        back, report = type(theirs).from_pretrained(path, attn_implementation="eager", output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(self.theirs(back), case.expected)
        self.save(back, again)
        assert config_of(path) == config_of(case.path) and typeless(config_of(path)) == typeless(config_of(again))
        mine, written = tensors_of(path), tensors_of(again)
        assert set(mine) == set(written) and (list(mine) == list(written) or not self.in_order)
        for name, tensor in mine.items():
            assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
        reread = directory.read(path)
        assert reread.spec == loaded.spec and reread.rest == loaded.rest

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_round_trip_is_bit_exact(self, case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
        first = case.read(dtype=dtype)
        directory.write(tmp_path / "a", first.model, family=first.family, rest=first.rest)
        second = directory.read(tmp_path / "a")
        assert second.spec == first.spec and second.rest == {**first.rest, "dtype": str(dtype).removeprefix("torch.")}
        directory.write(tmp_path / "b", second.model, family=second.family, rest=second.rest)
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
            assert a.dtype == b.dtype == dtype and torch.equal(a, b), name


class Native(Parity):
    """Assemblies, which a directory of ours holds as well."""

    def test_a_native_directory_holds_the_same(self, case: Case, tmp_path: Path) -> None:
        loaded = case.read()
        directory.write(tmp_path / "native", loaded.model)
        native = directory.read(tmp_path / "native")
        config = case.theirs.config
        assert native.spec == loaded.spec and torch.equal(self.ours(native.model, config), self.ours(loaded.model, config))


class Decoded(Parity):
    """Models of language that decode with a cache."""

    tied_repeat = False  # where the head is tied, tokens may repeat themselves

    def decodes(self, config: Any) -> bool:
        """Whether transformers itself decodes what it computes at once."""
        return True

    def test_greedy_tokens_with_a_cache(self, case: Case) -> None:
        if not self.decodes(case.theirs.config):
            pytest.skip("transformers' own decoding differs from its forward")
        prompt = tokens(case.theirs.config.vocab_size, seed=1)[:, :12]
        expected = hf.greedy(case.theirs, prompt, 24)
        assert torch.equal(cached_greedy(case.read().model, prompt, 24), expected)
        repeats = self.tied_repeat and case.theirs.config.tie_word_embeddings
        assert len(expected.unique()) > 5 or repeats  # text, not one token over and over


class Family(Exported):
    """Whatever has a family: `table` gives each key that it reads two values, but those that it says alike."""

    spread: tuple[float, float] = (1.0, 3.0)  # where the standard deviation of the outputs lies
    noise = 0.05
    moved = 1e-3  # what a change must move them by, in standard deviations
    swaps: Sequence[tuple[str, str]] = ()  # weights of one shape in the first layer
    others: Mapping[str, Any] = {}  # by key, another value than twice the one that is there
    further: Table = {}  # configs that single tests have
    alike: Collection[str] = ()
    shown: Collection[str] = ()  # keys that, as rates of dropout, show in the spec and move nothing
    heeded: Collection[str] = ()  # keys whose change is never refused
    refused: Collection[str] = ()  # keys whose change always is

    def said_alike(self, family: Format) -> set[str]:
        return set(self.alike)

    def nudge(self, name: str) -> float:
        """How much noise is added to a tensor to see that it matters; 0 leaves it out."""
        return self.noise

    def silent(self, name: str, spec: Any) -> bool:
        """Whether a tensor moves nothing in exact arithmetic, as a bias on keys that are not turned."""
        return False

    def idle(self, config: dict[str, Any]) -> Collection[str]:
        """Keys whose change may change nothing at all, for it speaks of parts that are not there."""
        return ()

    def other(self, key: str, value: Any, config: dict[str, Any]) -> Any:
        """Another value for a key; the same one leaves it out."""
        if key in self.others:
            return self.others[key]
        if isinstance(value, bool):
            return not value
        if key == "rope_parameters":
            return {**value, "rope_theta": 3 * value["rope_theta"]}
        return 0.75 if "dropout" in key else 5 if value is None else 2 * value

    def mutations(self, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """One changed config for each key that the family reads."""
        for path, value in keys_of(config):
            if (other := self.other(path[-1], value, config)) != value:
                yield path[-1], changed(config, path, other)

    def shows(self, key: str, before: Any, after: Any, config: dict[str, Any]) -> bool:
        """Whether the changed `config` shows in the spec."""
        return after != before

    def test_logits(self, case: Case) -> None:
        low, high = self.spread
        assert low <= case.expected.std() <= high
        assert self.off(case.read().model, case) < self.tolerance

    def test_every_key_takes_two_values(self) -> None:
        written = [hf.classes(kind)[0](**keys).to_dict() for kind, keys in [*self.table.values(), *self.further.values()]]
        for name in {config["model_type"] for config in written}:
            family, configs = families.get(name), [config for config in written if config["model_type"] == name]
            for key in {*family.keys.model_fields, *family.carried} - self.said_alike(family):
                values = {json.dumps(config.get(key), sort_keys=True, default=str) for config in configs}
                assert len(values) > 1, f"{name}: {key} is always {values}"

    @pytest.mark.slow
    @torch.no_grad()
    def test_every_tensor_matters(self, case: Case) -> None:
        """Changing any one tensor on our side alone breaks parity; so does swapping two of one shape."""
        loaded, generator = case.read(), torch.Generator().manual_seed(0)
        parameters = dict(loaded.model.named_parameters())
        for name, parameter in parameters.items():
            if size := self.nudge(name):
                before = parameter.clone()
                parameter.add_(size * torch.randn(before.shape, generator=generator))
                found = self.off(loaded.model, case)
                assert found < 10 * self.tolerance if self.silent(name, loaded.spec) else found > self.moved, name
                parameter.copy_(before)
        for pair in self.swaps:
            a, b = (parameters[f"layers.0.{name}.weight"] for name in pair)
            kept = a.clone(), b.clone()
            a.copy_(kept[1])
            b.copy_(kept[0])
            assert self.off(loaded.model, case) > self.moved, pair
            a.copy_(kept[0])
            b.copy_(kept[1])

    @pytest.mark.slow
    def test_every_key_matters(self, case: Case, tmp_path: Path) -> None:
        """Changing any one key on our side alone breaks parity, is refused, or shows in the spec where it shapes no output."""
        config, before, refused = config_of(case.path), case.read().spec, set()
        shutil.copy(case.path / "model.safetensors", tmp_path)
        for key, now in self.mutations(config):
            (tmp_path / directory.CONFIG).write_text(json.dumps(now))
            try:
                loaded = directory.read(tmp_path)
                found = self.off(loaded.model, case)
            except TriviumError:
                refused.add(key)
                continue
            if loaded.spec == before:
                assert key in self.idle(config) and found < self.tolerance, key
            elif key in self.shown or "dropout" in key or key.endswith("pdrop"):
                assert self.shows(key, before, loaded.spec, now) and found < self.tolerance, key
            else:
                assert found > self.moved, key
        assert not refused & set(self.heeded)
        assert refused >= set(self.refused)


class Causal(Family, Decoded):
    """Models of language of one stack."""

    shown = ("max_position_embeddings",)

    def shows(self, key: str, before: Any, after: Any, config: dict[str, Any]) -> bool:
        return after.context == config[key] if key == "max_position_embeddings" else after != before


class Refusals(Parity):
    """What no config and no spec of a family may say: (name in the table, what is changed, what the error says)."""

    unreadable: Sequence[tuple[str, dict[str, Any], str]]
    unsayable: Sequence[tuple[str, dict[str, Any], str]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        for name, values in (("unreadable", self.unreadable), ("unsayable", self.unsayable)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=lambda row: f"{row[0]}-{next(iter(row[1]))}")

    def config(self, name: str) -> dict[str, Any]:
        kind, keys = self.table[name]
        return hf.classes(kind)[0](**keys).to_diff_dict()

    def test_configs_that_cannot_be_read_say_why(self, unreadable: tuple[str, dict[str, Any], str]) -> None:
        name, change, message = unreadable
        config = self.config(name)
        with pytest.raises(ConfigError, match=message):
            families.get(config["model_type"]).to_spec({**config, **change})

    def test_what_the_family_cannot_say_is_refused(self, unsayable: tuple[str, dict[str, Any], str]) -> None:
        name, change, reason = unsayable
        config = self.config(name)
        family = families.get(config["model_type"])
        spec, rest = family.to_spec(config)
        fields = overlaid(spec.to_dict(), change)
        with pytest.raises(ConfigError, match=reason):
            family.to_hf(spec.replace(**{key: fields[key] for key in change}), rest)


class Loss(Parity):
    """The mean over all tokens but each row's first, as transformers' `labels` give it."""

    def test_loss(self, case: Case) -> None:
        x = tokens(case.theirs.config.vocab_size, seed=2)
        with torch.no_grad():
            expected = case.theirs(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss
            logits = case.read().model(x).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        assert abs(loss - expected) < 1e-5


class Experts(Parity):
    def test_every_expert_is_chosen(self, case: Case) -> None:
        """One that none chose would not be tested."""
        loads = case.read().model(tokens(case.theirs.config.vocab_size)).aux.loads
        assert all((load > 0).all() for load in loads.values())


class Recurrent(Parity):
    """Mixers that hold a state."""

    gradient = 1e-4  # of each tensor's largest

    @torch.no_grad()
    def test_cached_pieces_equal_the_whole(self, case: Case) -> None:
        model, x = case.read().model, tokens(case.theirs.config.vocab_size)
        cache = model.cache(len(x), x.shape[1])
        pieces = torch.cat([model(Inputs(piece, cache=cache)).logits for piece in x.split((17, 1, 2, 20), 1)], 1)
        assert apart(pieces, case.expected) < self.tolerance

    def test_gradients(self, case: Case, tmp_path: Path) -> None:
        """The loss's gradient of every parameter: theirs are written as weights, and read."""
        theirs, model, x = case.theirs, case.read().model, tokens(case.theirs.config.vocab_size, seed=2)
        for logits in (theirs(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits, model(x).logits):
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        with torch.no_grad():
            kept = [parameter.clone() for parameter in theirs.parameters()]
            for parameter in theirs.parameters():
                parameter.copy_(parameter.grad)
            twin = directory.read(hf.save(theirs, tmp_path)).model
            for parameter, value in zip(theirs.parameters(), kept, strict=True):
                parameter.copy_(value)
        theirs.zero_grad()
        expected = dict(twin.named_parameters())
        for name, parameter in model.named_parameters():
            grad = expected[name]
            assert ((parameter.grad - grad).abs().max() / grad.abs().max().clamp_min(1e-3)) < self.gradient, name
