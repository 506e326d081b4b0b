"""Chat templates by name, for models that come without one, or are to get another: `alpaca`, plain text with headings, which needs no
token of its own (Taori et al. 2023), and `chatml`, turns between two marks.

An answer ends with the tokenizer's end of text, in `chatml` after the mark that its text holds. Tools and thoughts are left out.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ConfigError, unknown
from .files import read_text

SUFFIX = ".jinja"
TEMPLATES = {
    "alpaca": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
        "{% else %}{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}"
        "{% elif message.role == 'assistant' %}{{ '### Response:\n' }}"
        "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% set end = '' if eos_token == '<|im_end|>' else eos_token %}"  # not twice, where ChatML's own mark ends texts
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' + end }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def template_of(name: str) -> str:
    """The template called `name`, or the text of the file `name`.jinja. Raises `ConfigError`, or `FileError` for a file that is not there."""
    if name.endswith(SUFFIX):
        return read_text(Path(name))
    if name not in TEMPLATES:
        message = f"{unknown('chat template', name, TEMPLATES, field='template')}; or name a file that ends in {SUFFIX}"
        raise ConfigError(message, field="template", value=name, choices=TEMPLATES)
    return TEMPLATES[name]
