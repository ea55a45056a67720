"""The card of an adapter: what it was made of, and how."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from wtool import __version__
from wtool.checkpoint.resolve import is_hub_id


def card(base: str | None, title: str, inputs: Sequence[str], record: Mapping[str, Any]) -> str:
    """The text of README.md, with the front matter that PEFT's own cards have.

    base: what the adapter is for; only a name on the Hub goes into the front matter
    """
    head: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "wtool"]}
    if base and is_hub_id(base):
        head["base_model"] = base.partition("@")[0]
    listed = "\n".join(f"- `{name}`" for name in inputs)
    asked = yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}, sort_keys=False)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}\n\n"
        f"Made with wtool {__version__}, for `{base}`, of\n\n{listed}\n\n```yaml\n{asked}```\n"
    )
