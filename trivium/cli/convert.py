"""`trivium convert`: a model as a model directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from .options import answer


def convert(
    model: str, /, *, out: Path, dtype: str | None = None, family: str | None = None, extend: str | None = None,
    overwrite: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Loads a model and writes it in Hugging Face's layout, or as one GGUF file for llama.cpp and Ollama, whole or not at all;
    prints where it is.

    Takes what every command takes: a known name, a model directory, a GGUF file, a hub repository. An adapter has to be
    merged (trivium adapter merge).

    Try:
      trivium convert SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2
      trivium convert models/smollm2 --dtype fp32 --out models/smollm2-fp32
      trivium convert models/smollm2 --dtype q8_0 --out smollm2.gguf

    Parameters
    ----------
    model
        What to convert.
    out
        The directory to write; a name that ends in .gguf makes a GGUF file, with a Modelfile for Ollama beside it.
    dtype
        fp32, bf16 or fp16, and q8_0 for a GGUF file; otherwise as stored (bf16 for what comes from a GGUF file).
    family
        The model_type to write, if it can say what this model is; "trivium" always can.
    extend
        Make the model's context longer: KIND:FACTOR, such as yarn:4 (linear, ntk, dynamic, yarn, none).
    overwrite
        Replace what --out holds.
    json
        Answer as JSON: path.
    """
    from ..recipes.pull import convert as run

    path = str(run(model, out, dtype=dtype, family=family, extend=extend, overwrite=overwrite))
    answer({"path": path} if json else path, as_json=json)
