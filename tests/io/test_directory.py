"""Model directories: saved and read again they are the same; edits are noticed; nothing is half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.assets import asset
from trivium.adapt.lora import LoRA, initialize_adapter
from trivium.core.errors import ConfigError, FileError, TriviumError
from trivium.io import directory
from trivium.io.directory import RECORD
from trivium.io.tensors import SINGLE, Lazy
from trivium.models.presets import llama
from trivium.models.transformer import Transformer, TransformerModel, build, initialize

X = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def small() -> Transformer:
    return llama(dim=32, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=48, vocab=97, context=128)


def model(spec: Transformer | None = None, *, seed: int = 0) -> TransformerModel:
    return initialize(build(spec or small(), device="cpu"), seed=seed).eval()


def odd_spec() -> Transformer:
    """What no family can say: two kinds of layers."""
    spec = small()
    block = spec.blocks["layer"].to_dict()
    block["mixer"]["pattern"] = {"kind": "window", "size": 3}
    return spec.replace(layers="layer near", blocks={"layer": spec.blocks["layer"], "near": block})


def same(a: TransformerModel, b: TransformerModel) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return (
        a.spec == b.spec and a.passes == b.passes and all(n == m and p.dtype == q.dtype and torch.equal(p, q) for (n, p), (m, q) in pairs)
    )


@pytest.fixture
def saved(tmp_path) -> Path:
    directory.write(tmp_path / "model", model(), family="llama", rest={"eos_token_id": 2}, lineage=[{"step": "drawn", "seed": 0}])
    return tmp_path / "model"


@pytest.mark.concept("X.88", part="io/directory.py")
@pytest.mark.parametrize("shard_bytes", [10_000, 10**9])
@pytest.mark.parametrize("family", ["llama", "trivium"])
def test_round_trip(tmp_path, family, shard_bytes):
    first = model()
    hashes = directory.write(
        tmp_path / "a", first, family=family, rest={"eos_token_id": 2}, lineage=[{"step": "drawn"}], shard_bytes=shard_bytes
    )
    loaded = directory.read(tmp_path / "a")
    assert (
        same(first, loaded.model)
        and loaded.family == family
        and loaded.rest["eos_token_id"] == 2
        and loaded.lineage == ({"step": "drawn"},)
    )
    assert torch.equal(loaded.model(X).logits, first(X).logits)
    again = directory.write(
        tmp_path / "b", loaded.model, family=loaded.family, rest=loaded.rest, lineage=loaded.lineage, shard_bytes=shard_bytes
    )
    assert again == hashes and set(hashes) == {path.name for path in (tmp_path / "a").iterdir()} - {RECORD}


def test_what_no_family_can_say_is_saved_as_our_own(tmp_path):
    odd = model(odd_spec())
    with pytest.raises(ConfigError, match="alike"):
        directory.write(tmp_path / "x", odd, family="llama")
    assert not list(tmp_path.iterdir())
    directory.write(tmp_path / "x", odd)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_type"] == "trivium"
    assert same(odd, directory.read(tmp_path / "x").model)
    (tmp_path / "x" / RECORD).unlink()
    with pytest.raises(FileError, match="missing"):
        directory.read(tmp_path / "x")


def test_block_names_are_kept(tmp_path):
    spec = small()
    named = spec.replace(layers=("decoder",) * 2, blocks={"decoder": spec.blocks["layer"]})
    directory.write(tmp_path / "x", model(named), family="llama")
    assert directory.read(tmp_path / "x").spec == named


def test_passes_are_saved_in_our_own_form_only(tmp_path):
    adapted = model()
    LoRA(name="a", rank=2, targets=("q",)).apply(adapted)
    initialize_adapter(adapted, "a", seed=1)
    with pytest.raises(TriviumError, match="merge them first"):
        directory.write(tmp_path / "x", adapted, family="llama")
    directory.write(tmp_path / "x", adapted)
    loaded = directory.read(tmp_path / "x")
    assert same(adapted, loaded.model)
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in adapted.parameters()]


def test_nothing_is_drawn_or_copied_on_the_way_in(saved, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("initialized")

    monkeypatch.setattr(torch.nn.init, "constant_", refuse)
    state = torch.get_rng_state()
    loaded = directory.read(saved).model
    assert torch.equal(torch.get_rng_state(), state)
    storages = {parameter.untyped_storage().data_ptr() for parameter in loaded.parameters()}
    assert len(storages) == 1  # all are views of the one mapped file


def test_dtype_and_device(saved):
    half = directory.read(saved, dtype="bf16").model
    full = directory.read(saved).model
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())
    assert directory.read(saved, device="cpu").model.device.type == "cpu"
    with pytest.raises(ConfigError, match="unknown dtype"):
        directory.read(saved, dtype="fp23")


def test_mixed_dtypes_need_a_choice(saved):
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / SINGLE)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].bfloat16()}, saved / SINGLE)
    (saved / RECORD).unlink()
    with pytest.raises(FileError, match="bfloat16, float32"):
        directory.read(saved)
    assert directory.read(saved, dtype="fp32").model.dtype == torch.float32


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit_are_named(saved, change):
    from safetensors.torch import load_file, save_file

    tensors, name = load_file(saved / SINGLE), "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors |= {"model.layers.2.mlp.up_proj.weight": tensors[name].clone()}
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, saved / SINGLE)
    (saved / RECORD).unlink()
    with pytest.raises(FileError, match="layers.[12].ffn.inp.up.weight"):
        directory.read(saved)


def test_unfilled_model_is_refused(saved):
    bare = build(small())
    with pytest.raises(FileError, match="21 tensors of this model are not stored"):
        directory.fill(bare, {})
    with pytest.raises(FileError, match="left over"):
        directory.fill(bare, {name: Lazy.of(p) for name, p in model().named_parameters()} | {"x": Lazy.of(X)})


class Words:
    """What a tokenizer and a prompt contract do for a directory."""

    def save(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{}")

    def settings(self) -> dict[str, object]:
        return {"arguments": {"today": "2025-01-01"}, "stops": [2, 7]}


def test_text_side_is_saved_and_watched(tmp_path):
    hashes = directory.write(tmp_path / "x", model(), family="llama", tokenizer=Words(), prompt=Words())  # type: ignore[arg-type]
    assert "tokenizer.json" in hashes
    assert directory.read(tmp_path / "x").prompt == {"arguments": {"today": "2025-01-01"}, "stops": (2, 7)}
    (tmp_path / "x" / "tokenizer.json").write_text("[]")
    with pytest.raises(FileError, match="tokenizer.json was edited"):
        directory.read(tmp_path / "x")


def test_exported_tensors_are_those_of_the_file(saved):
    from safetensors.torch import load_file

    loaded, stored = directory.read(saved), load_file(saved / SINGLE)
    tensors = directory.exported(loaded.model, family="llama")
    assert set(tensors) == set(stored) and all(torch.equal(tensors[name], stored[name]) for name in stored)


def test_digest_of_weights_is_that_of_the_files_as_they_are(saved):
    digest = directory.weights_digest(saved)
    edit(saved, SINGLE)
    assert directory.weights_digest(saved) != digest
    edit(saved, SINGLE)
    (saved / RECORD).unlink()
    assert directory.weights_digest(saved) == digest


def edit(path: Path, name: str) -> None:
    if name == "config.json":
        config = json.loads((path / name).read_text())
        config["rope_parameters"]["rope_theta"] = 777.0
        (path / name).write_text(json.dumps(config))
    elif name == SINGLE:
        data = bytearray((path / name).read_bytes())
        data[-1] ^= 1
        (path / name).write_bytes(data)
    elif name == "chat_template.jinja":
        (path / name).write_text("{{ messages }}")


@pytest.mark.parametrize(
    "name, said",
    [
        ("config.json", r"config.json was edited.*position.base: 10000.0, now 777.0"),
        (SINGLE, r"model.safetensors was edited \(sha256"),
        ("chat_template.jinja", "chat_template.jinja was added"),
    ],
)
def test_edits_stop_loading_until_accepted(saved, name, said):
    edit(saved, name)
    with pytest.raises(FileError, match=said):
        directory.read(saved)
    accepted = directory.read(saved, accept=True)
    assert same(accepted.model, directory.read(saved).model)  # adopted: the second read asks nothing
    assert (accepted.spec.blocks["layer"].mixer.position.base == 777.0) == (name == "config.json")
    assert accepted.lineage == ({"step": "drawn", "seed": 0},)


def test_removed_file_is_noticed(tmp_path):
    directory.write(tmp_path / "x", model(), family="llama", generation_config={"eos_token_id": [2]})
    (tmp_path / "x" / "generation_config.json").unlink()
    with pytest.raises(FileError, match="generation_config.json was removed"):
        directory.read(tmp_path / "x")
    directory.read(tmp_path / "x", accept=True)
    directory.read(tmp_path / "x")


def test_large_files_are_hashed_when_their_time_changed(saved, monkeypatch):
    """Unchanged size and time are trusted above a size; a copy has another time and is hashed; `full` hashes always."""
    monkeypatch.setattr(directory, "TRUSTED_ABOVE", 1000)
    record, file = directory.read_record(saved), saved / SINGLE
    assert record is not None
    times = file.stat()
    edit(saved, SINGLE)
    assert [change.file for change in directory.edited(saved, record)] == [SINGLE]
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert directory.edited(saved, record) == []
    assert [change.file for change in directory.edited(saved, record, full=True)] == [SINGLE]
    edit(saved, SINGLE)  # flips the bit back
    assert directory.edited(saved, record, full=True) == []


def test_records_that_cannot_be_used_say_why(saved):
    good = json.loads((saved / RECORD).read_text())
    other = json.loads(json.dumps(good))
    other["spec"]["context"] = 64
    cases = {
        "format 2": {**good, "format": 2} | {"format": 2},
        "unknown field 'sepc'": {**good, "sepc": {}},
        "disagree: context: 64": other,
        "sha256": {**good, "files": {"config.json": {"size": 1, "mtime_ns": 0, "sha256": "x"}}},
    }
    for message, data in cases.items():
        (saved / RECORD).write_text(json.dumps(data))
        with pytest.raises(FileError, match=message.replace("format 2", "format 2.*newer")):
            directory.read(saved)
    (saved / RECORD).write_text("{")
    with pytest.raises(FileError, match="not valid JSON"):
        directory.read(saved)


def test_file_names_in_a_record_stay_in_the_directory(saved):
    record = json.loads((saved / RECORD).read_text())
    record["files"]["../outside"] = record["files"]["config.json"]
    (saved / RECORD).write_text(json.dumps(record))
    with pytest.raises(FileError, match="outside' is no file of this directory"):
        directory.read(saved)


def test_directories_that_are_none_say_why(tmp_path):
    with pytest.raises(FileError, match="no directory"):
        directory.read(tmp_path / "nowhere")
    with pytest.raises(FileError, match="config.json"):
        directory.read(tmp_path)


def test_overwriting_is_asked_for_and_keeps_what_is_in_use(saved):
    first = directory.read(saved).model
    before = first(X).logits
    with pytest.raises(FileError, match="already holds files"):
        directory.write(saved, model(seed=1), family="llama")
    directory.write(saved, model(seed=1), family="llama", overwrite=True)
    assert torch.equal(first(X).logits, before)  # the mapped file lives on until it is let go
    assert same(directory.read(saved).model, model(seed=1))
    directory.write(saved, first, family="llama", overwrite=True)  # onto the place it came from
    assert same(directory.read(saved).model, model())


def test_full_disk_leaves_what_was_there(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(FileError, match="cannot be written"):
            directory.write(saved, model(seed=1), family="llama", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def write_and_die(path: Path, new: TransformerModel, at: int) -> int:
    """Overwrite `path` in a child process that dies at its `at`-th fsync or rename; its exit status, or 9 if it died so."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def dying(real):
        def call(*args):
            nonlocal count
            count += 1
            if count == at:
                os._exit(9)
            return real(*args)

        return call

    try:
        os.fsync, os.replace, os.rename = dying(os.fsync), dying(os.replace), dying(os.rename)
        directory.write(path, new, family="llama", overwrite=True)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
def test_killed_at_every_fsync_and_rename(saved):
    """Whichever call is the last one, the old model or the new one stands there, whole (or both, between the two renames)."""
    whole = [model(seed=seed) for seed in (0, 1)]
    outcomes = []
    for at in range(1, 40):
        place = saved.with_name(f"at{at}") / "model"
        shutil.copytree(saved, place)
        outcomes.append(write_and_die(place, whole[1], at))
        if place.exists():
            assert any(same(directory.read(place).model, candidate) for candidate in whole)
        else:
            standing = sorted(path.name.split("-")[0] for path in place.parent.iterdir())
            assert standing == ["model.old", "model.partial"]
            assert all(any(same(directory.read(path).model, candidate) for candidate in whole) for path in place.parent.iterdir())
        if outcomes[-1] == 0:
            break
    assert outcomes == [9] * (len(outcomes) - 1) + [0] and len(outcomes) > 10


@pytest.mark.slow
@pytest.mark.concept("X.88", part="io/directory.py")
@pytest.mark.parametrize("name", ["tokenizer-llama3", "tokenizer-qwen3"])
def test_transformers_loads_the_whole_directory(tmp_path, name):
    """Weights, tokenizer, template and generation config: transformers sees the same ids and the same logits."""
    import transformers

    from trivium.text.prompt import Prompt
    from trivium.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(asset(name))
    prompt = Prompt.load(asset(name), tokenizer)
    first = model(small().replace(vocab=tokenizer.vocab_size))
    directory.write(tmp_path / "x", first, family="llama", tokenizer=tokenizer, prompt=prompt, generation_config={"eos_token_id": [1, 2]})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    messages = [{"role": "user", "content": "Grüße, 世界! 🙂"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompt.generation(messages)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert other.generation_config.eos_token_id == [1, 2]
    with torch.no_grad():
        x = torch.tensor([ids])
        torch.testing.assert_close(first(x).logits, other(x).logits, atol=1e-5, rtol=0)
    again = Tokenizer.load(tmp_path / "x")
    assert again.digest() == tokenizer.digest()
    assert Prompt.load(tmp_path / "x", again).generation(messages) == ids
