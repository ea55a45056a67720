"""The model card of a quantized checkpoint: what it was made from, how, and the recipe that makes it again."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from wtool import __version__
from wtool.checkpoint import Checkpoint
from wtool.formats import Scheme
from wtool.formats.fp8 import Fp8


def model_card(record: Mapping[str, Any], source: Checkpoint, schemes: Sequence[Scheme | Fp8]) -> str:
    """The text of README.md. Only a name on the Hub goes into its front matter: a local path means nothing there."""
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["quantized", "wtool", record["method"]]}
    if source.revision:
        head["base_model"] = [source.label.split("@")[0]]
        head["base_model_relation"] = "quantized"
    kinds = "\n".join(f"- {scheme}" for scheme in dict.fromkeys(map(str, schemes)))
    recipe = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {source.label}, quantized\n\n"
        f"Made with wtool {__version__}, method `{record['method']}`, format `{record['format']}`:\n\n{kinds}\n\n"
        f"## Recipe\n\nSave it as `recipe.yml` and run `wtool quantize recipe.yml -o OUT`.\n\n```yaml\n{recipe}```\n"
    )
