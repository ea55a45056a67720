"""The model card of a pruned checkpoint: what it was made from, how, and the recipe that makes it again."""

from collections.abc import Mapping
from typing import Any

import yaml

from wtool import __version__
from wtool.checkpoint import Checkpoint


def model_card(record: Mapping[str, Any], source: Checkpoint, what: str) -> str:
    """The text of README.md. Only a name on the Hub goes into its front matter: a local path means nothing there.

    what: was done, in words
    """
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["pruned", "wtool"]}
    if source.revision:
        head["base_model"] = [source.label.split("@")[0]]
    recipe = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {source.label}, pruned\n\n"
        f"Made with wtool {__version__}: {what}\n\n"
        f"## Recipe\n\nSave it as `recipe.yml` and run `wtool prune recipe.yml -o OUT`.\n\n```yaml\n{recipe}```\n"
    )
