"""How a conversation becomes a text: the output's chat template, one of the models', a format's, or the user's own.

The formats are written from their public descriptions:
chatml   https://github.com/openai/openai-python/blob/release-v0.28.1/chatml.md
llama3   https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
alpaca   https://github.com/tatsu-lab/stanford_alpaca (the instruction without input; a system message takes the place
         of the sentence in front; a turn ends with the end-of-text token, as in its training)
mistral  https://docs.mistral.ai/guides/tokenization (version 1; the system message stands before the first user's)
exaone   the model card of LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.errors import UsageError, did_you_mean
from wtool.shards import json_bytes

from .tokenizer import read_json

AUTO = "auto"
JINJA_FILE, CONFIG_FILE, OLD_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"

_UNKNOWN_ROLE = "{{- raise_exception('this format has system, user and assistant, not ' + message['role']) -}}"

FORMATS = {
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        "{{- message['content'] | trim -}}{{- '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "alpaca": (
        "{%- if messages[0]['role'] != 'system' -%}"
        "{{- 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\\n\\n' -}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
        "{%- elif message['role'] == 'user' -%}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- '### Response:\\n' + message['content'] -}}{{- eos_token -}}{{- '\\n\\n' -}}"
        "{%- else -%}" + _UNKNOWN_ROLE + "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}"
        "{%- set told = namespace(first='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{%- set told.first = message['content'] + '\\n\\n' -%}"
        "{%- elif message['role'] == 'user' -%}"
        "{{- ' [INST] ' + told.first + message['content'] + ' [/INST]' -}}{%- set told.first = '' -%}"
        "{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] -}}{{- eos_token -}}"
        "{%- else -%}" + _UNKNOWN_ROLE + "{%- endif -%}"
        "{%- endfor -%}"
    ),
    "exaone": (
        "{%- if messages[0]['role'] != 'system' -%}{{- '[|system|][|endofturn|]\\n' -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- '[|' + message['role'] + '|]' + message['content'] -}}"
        "{%- if message['role'] != 'user' -%}{{- '[|endofturn|]' -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
    ),
}
# Tokens that a format is made of: where the vocabulary lacks them they are split into pieces no model was trained on.
MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
}


def check_template(asked: str) -> str:
    """What a recipe may ask for. raises: UsageError"""
    if asked in (AUTO, *FORMATS) or "{{" in asked or "{%" in asked:
        return asked
    known = [AUTO, *FORMATS]
    raise UsageError(
        f"chat_template '{asked}' is neither one of {', '.join(known)} nor a template in Jinja"
        f"{did_you_mean(asked, known)}"
    )


def template_of(files: Mapping[str, bytes | Path]) -> str | None:
    """A model's chat template: of several, the one that is used by default; None where there is none."""
    if isinstance(path := files.get(JINJA_FILE), Path):
        return path.read_text(encoding="utf-8")
    for name in (CONFIG_FILE, OLD_FILE):
        found: Any = read_json(path).get("chat_template") if isinstance(path := files.get(name), Path) else None
        if isinstance(found, list):  # [{name, template}, …]
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def chosen_template(asked: str, models: Sequence[Checkpoint]) -> str | None:
    """The template that a recipe asks for: with auto the one that most models have, of equally many the first's."""
    if asked != AUTO:
        return FORMATS.get(asked, asked)
    counted = Counter(found for model in models if (found := template_of(model.files)) is not None)
    return counted.most_common(1)[0][0] if counted else None


def with_template(files: Mapping[str, bytes | Path], template: str) -> dict[str, bytes | Path]:
    """The output's files with a template: where transformers 5 looks for it, and where others do."""
    result = {name: content for name, content in files.items() if name != OLD_FILE}
    result[JINJA_FILE] = template.encode()
    if CONFIG_FILE in files:
        content = files[CONFIG_FILE]
        config = read_json(content) if isinstance(content, Path) else _parsed(content)
        result[CONFIG_FILE] = json_bytes({**config, "chat_template": template})
    return result


def _parsed(content: bytes) -> dict[str, Any]:
    return json.loads(content)


def template_remarks(asked: str, template: str | None, tokens: Collection[str] | None) -> list[str]:
    """What a user should know.

    tokens: the output's, where they are known
    """
    if template is None:
        return ["chat_template: auto, but no model has a chat template"]
    lacking = [mark for mark in MARKS.get(asked, ()) if tokens is not None and mark not in tokens]
    if not lacking:
        return []
    return [f"chat_template: {asked} is made of {', '.join(lacking)}, which the output's vocabulary has not as tokens"]
