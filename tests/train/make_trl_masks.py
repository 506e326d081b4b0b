"""Writes trl_masks.json: what TRL's SFTTrainer makes of `ROWS` with assistant_only_loss and with completion_only_loss.

Run in an environment of its own, which the tests do not need:
    pip install trl==1.16.0 && python -m tests.train.make_trl_masks
A trainer is built on a tiny model for each setting, and its prepared data set is written down: ids, and labels that are not -100.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.recipes import toys

TARGET = Path(__file__).with_name("trl_masks.json")
MARKED = (  # TRL asks that a template mark what the assistant writes
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "It leaves tomorrow."}
MORE = [{"role": "user", "content": "And the lamp, 12 €?"}, {"role": "assistant", "content": "That one came back – broken."}]
TALKS: list[list[dict[str, Any]]] = [
    [USER, ANSWER],
    [USER, ANSWER, *MORE],
    [{"role": "system", "content": "Be brief."}, USER, ANSWER, *MORE],
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "assistant_only_loss": [{"messages": talk} for talk in TALKS],
    "completion_only_loss": [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS],
}


def made(setting: str, folder: str) -> list[dict[str, list[Any]]]:
    import datasets
    import transformers
    import trl

    toys.bundle().save(folder, overwrite=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    asked: dict[str, Any] = {"output_dir": folder, "report_to": [], "use_cpu": True, "max_length": 512, "bf16": False, setting: True}
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=trl.SFTConfig(**asked),
        train_dataset=datasets.Dataset.from_list(ROWS[setting]),
        processing_class=tokenizer,
    )
    return [{"ids": row["input_ids"], "trained": [label != -100 for label in row["labels"]]} for row in trainer.train_dataset]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {setting: made(setting, folder) for setting in ROWS}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    TARGET.write_text(json.dumps({"versions": versions, "found": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
