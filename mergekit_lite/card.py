"""The model card of a merge: what was merged, how, and the recipe that makes it again."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from wtool import __version__
from wtool.checkpoint import Checkpoint


def recipe_yaml(record: Mapping[str, Any]) -> str:
    """A recipe as a file that makes the merge again."""
    return yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)


def model_card(record: Mapping[str, Any], sources: Sequence[Checkpoint]) -> str:
    """The text of README.md. Only names on the Hub go into its front matter: a local path means nothing there."""
    bases = [source.label.split("@")[0] for source in sources if source.revision]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "wtool"]}
    if bases:
        head["base_model"] = bases
    models = "\n".join(f"- `{source.label}`" for source in sources)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# A merge of {len(sources)} checkpoints\n\n"
        f"Made with wtool {__version__}, method `{record['merge_method']}`, of\n\n{models}\n\n"
        f"## Recipe\n\nSave it as `recipe.yml` and run `wtool merge recipe.yml -o OUT`.\n\n"
        f"```yaml\n{recipe_yaml(record)}```\n"
    )
