"""Real tokenizers, ours and transformers', loaded once a process; and conversations to try on them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from tests.assets import asset
from trivium.text.prompt import Prompt
from trivium.text.tokenizer import Tokenizer

REAL = ("llama3", "qwen3", "gemma3", "deepseek_v3", "gptoss")
GENERATION = {"llama3": {"eos_token_id": [128001, 128009]}, "gptoss": {"eos_token_id": [200002, 199999, 200012]}}
DATE = "2025-06-30"
ODD = "Wörld 12345 – 你好 👩‍🚀\t e\u0301 \u200b x  \n\n\n y\r\n{{ a }} 'll IT'S ½ ﬁ  \n"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@cache
def ours(name: str) -> Tokenizer:
    return Tokenizer.load(asset(f"tokenizer-{name}"))


@cache
def theirs(name: str) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(asset(f"tokenizer-{name}"))
    tokenizer.chat_template = template(name)
    return tokenizer


@cache
def template(name: str) -> str:
    """The chat template of a real tokenizer; gpt-oss comes without one here, and gets one of the same format."""
    config = json.loads((asset(f"tokenizer-{name}") / "tokenizer_config.json").read_text())
    return config.get("chat_template") or Path(__file__).with_name("harmony.jinja").read_text()


def prompt(name: str, **settings: Any) -> Prompt:
    if "strftime_now" in template(name):
        settings["arguments"] = {"date": DATE} | settings.get("arguments", {})
    return Prompt.of(ours(name), template(name), GENERATION.get(name), **settings)


def talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages, the user first, in turns."""
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def calling(*, content: str | None = None, thoughts: str | None = None, arguments: Any = None) -> list[dict[str, Any]]:
    """A conversation with a tool call and its result."""
    arguments = {"city": "Zürich"} if arguments is None else arguments
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turn = {"role": "assistant", "content": content, "tool_calls": [call], "reasoning_content": thoughts}
    answer = {"role": "assistant", "content": "It is raining.", "reasoning_content": thoughts and f"{thoughts} again"}
    return [*talk("Weather?"), turn, {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "rain"}, answer]
