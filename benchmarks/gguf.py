"""Writing GGUF: a model directory in bf16 to one file of each type, beside the gguf package doing the same; and llama.cpp's logits.

Both sides read the safetensors, interleave q and k, pack matrices and write metadata that names no vocabulary. Tensors must
come out equal, byte for byte. Where llama-cpp-python is installed, the facts say how far its predictions are from ours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from . import common
from .common import Row

PEER = "gguf"
SIDES = {"trivium": "benchmarks.gguf:Trivium", PEER: "benchmarks.gguf:Package"}
KINDS = ("f32", "f16", "bf16", "q8_0")
TEXT = "The capital of France is Paris, and 123 + 456 = 579. Grüße 🙂 from 東京.\n\n\tdef f(x): return x  \n"


class Prepare:
    """Makes the model directory that both sides read, and compares what they wrote."""

    def __init__(self, *, model: str, out: str):
        self.path = common.converted(model, Path(out))

    def equal(self, *, ours: str, theirs: str) -> bool:
        from trivium.io.gguf.reader import open_gguf

        left, right = open_gguf(ours), open_gguf(theirs)
        same = {name: info.type for name, info in left.tensors.items()} == {name: info.type for name, info in right.tensors.items()}
        return same and all(bool((left.raw(name) == right.raw(name)).all()) for name in left.tensors)

    def parity(self, *, dtype: str, out: str) -> list[float] | None:
        """Mean KL divergence of llama.cpp's predictions (nats), and the largest difference of a logit; None without llama.cpp."""
        try:
            import llama_cpp
        except ImportError:
            return None
        import numpy as np
        import torch

        from trivium.recipes.gguf import export_gguf
        from trivium.recipes.load import load

        path = export_gguf(self.path, out, dtype=dtype, overwrite=True)
        bundle = load(path, dtype="fp32")
        ids = bundle.tokenizer.encode(TEXT)
        peer = llama_cpp.Llama(str(path), n_ctx=128, n_batch=128, logits_all=True, verbose=False, type_k=0, type_v=0)
        peer.eval(ids)
        theirs = torch.from_numpy(np.array(peer.scores[: len(ids)]))
        with torch.no_grad():
            ours = bundle.model(torch.tensor([ids])).logits[0]
        left, right = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        return [float((left.exp() * (left - right)).sum(-1).mean()), float((ours - theirs).abs().max())]


class Trivium:
    def __init__(self, *, path: str):
        self.path = path

    def write(self, *, dtype: str, out: str) -> dict[str, float]:
        from trivium.io import directory
        from trivium.io.gguf.export import write_model

        def work() -> None:
            loaded = directory.read(self.path)
            write_model(out, loaded.model, dtype=dtype, rest=loaded.rest, overwrite=True)

        return common.clock(work)[0]


class Package:
    """What llama.cpp's converter does with the gguf package, for this one architecture."""

    def __init__(self, *, path: str):
        self.path = Path(path)

    def write(self, *, dtype: str, out: str) -> dict[str, float]:
        return common.clock(lambda: self._write(dtype, Path(out)))[0]

    def _write(self, dtype: str, out: Path) -> None:
        import json

        import gguf
        from safetensors import safe_open

        config = json.loads((self.path / "config.json").read_text())
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        writer = gguf.GGUFWriter(out, "llama")
        with safe_open(self.path / "model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                rows = file.get_tensor(name).float()
                if (count := heads.get(name.split(".")[-2])) is not None:
                    rows = rows.view(count, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
                kind = gguf.GGMLQuantizationType["F32" if rows.dim() == 1 else dtype.upper()]
                writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), gguf.quantize(rows.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main() -> None:
    options = common.with_model(common.arguments(__doc__)).parse_args()
    machine, count = common.machine(), 1 if options.quick else options.rounds
    rows, facts = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, first = Path(scratch), {"model": common.located(options.model), "out": f"{scratch}/model"}
        with common.Worker("benchmarks.gguf:Prepare", threads=options.threads, options=first) as prepare:
            prepare.call("peak")  # the directory is there when it answers
            for dtype in KINDS[-1:] if options.quick else KINDS:
                outs = {side: str(folder / f"{side}.gguf") for side in SIDES}
                with common.workers(SIDES, threads=options.threads, options={"path": first["out"]}) as sides:

                    def write(side: str, dtype: str = dtype, outs: dict[str, str] = outs, sides: Any = sides) -> dict[str, float]:
                        return sides[side].call("write", dtype=dtype, out=outs[side])

                    found = common.rounds(list(SIDES), write, count=count, warm=0 if options.quick else 1, what=f"writing {dtype}")
                    ours, theirs = ([one["seconds"] for one in found[side]] for side in SIDES)
                    rows.append(Row(f"write {dtype}", "s", "less", ours, PEER, theirs, goal=1 - common.WITHIN))
                    rows.append(Row(f"write {dtype}", "MB peak", "less", [sides["trivium"].peak()], PEER, [sides[PEER].peak()]))
                facts[f"{dtype}: all tensors equal"] = prepare.call("equal", ours=outs["trivium"], theirs=outs[PEER])
                figures = prepare.call("parity", dtype=dtype, out=str(folder / "parity.gguf"))
                said = (
                    "llama-cpp-python is not installed"
                    if figures is None
                    else f"KL {figures[0]:.1e} nats, largest difference {figures[1]:.1e}"
                )
                facts[f"{dtype}: llama.cpp's logits"] = said
    notes = [
        "seconds hold reading the directory, packing and writing; trivium also hashes the file and flushes it to the disk (fsync)",
        "llama.cpp rounds activations to the type of the matrix that they meet, so only f32 can agree to the last digits",
    ]
    told = common.versions("trivium", "gguf", "torch", "llama-cpp-python")
    common.report("gguf", options, rows, facts=facts, notes=notes, versions=told, machine=machine)


if __name__ == "__main__":
    main()
