"""Writes lm_eval.json: what lm-evaluation-harness measures of the toy model on the toy tasks.

Run in an environment of its own, which the tests do not need:
    pip install torch "lm-eval[hf]==0.4.13" && python tests/evaluate/make_lm_eval.py
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
import toys
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

TARGET = Path(__file__).with_name("lm_eval.json")


def save_model(folder: Path) -> transformers.LlamaForCausalLM:
    config = {**toys.CONFIG, "vocab_size": toys.vocab()}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in toys.weights().items()}, strict=True)
    model.generation_config = transformers.GenerationConfig(eos_token_id=toys.vocab() - 1, pad_token_id=toys.vocab() - 1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(toys.tokenizer_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": toys.END,
        "pad_token": toys.END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model.eval()


def completions(model: transformers.LlamaForCausalLM, folder: Path) -> list[dict]:
    """Prompts and expected completions, of which two in three are what the model writes (three tokens or fewer)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for index, question in enumerate(toys.questions(24, seed=3)):
        prompt = question["question"] + " the"
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=3, do_sample=False)
        written = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": prompt, "completion": written if index % 3 and "\n" not in written else question["choices"][0]})
    return rows


def task(folder: Path, name: str, rows: list[dict], output: str, **settings: object) -> dict:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {"task": name, "output_type": output, **source, "metadata": {"version": 1}, **settings}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = save_model(folder / "model")
        rows = {"choices": toys.questions(), "perplexity": toys.texts(), "generate": completions(model, folder / "model")}
        tasks = [
            task(
                folder, "choices", rows["choices"], "multiple_choice", doc_to_text="{{question}}\nAnswer:", doc_to_choice="choices",
                doc_to_target="answer", metric_list=[{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
            ),
            task(
                folder, "perplexity", rows["perplexity"], "loglikelihood_rolling", doc_to_text="", doc_to_target="text",
                metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
            ),
            task(
                folder, "generate", rows["generate"], "generate_until", doc_to_text="prompt", doc_to_target="completion",
                metric_list=[{"metric": "exact_match"}], generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 3, "do_sample": False},
            ),
        ]  # fmt: skip
        subject = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=4)
        found = simple_evaluate(subject, tasks=tasks, log_samples=True, bootstrap_iters=0)
    metrics = {
        name: {key.split(",")[0]: value for key, value in one.items() if key.endswith(",none")} for name, one in found["results"].items()
    }
    scores = [[float(answer[0][0]) for answer in sample["resps"]] for sample in found["samples"]["choices"]]
    written = [sample["resps"][0][0] for sample in found["samples"]["generate"]]
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch", "tokenizers")}
    command = "pip install torch 'lm-eval[hf]==0.4.13' && python tests/evaluate/make_lm_eval.py"
    fixture = {"command": command, "versions": versions, "metrics": metrics, "rows": rows, "logprobs": scores, "generated": written}
    TARGET.write_text(json.dumps(fixture, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
