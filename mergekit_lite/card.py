"""The model card of a merge: what was merged, how, and the recipe that makes it again."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from wtool import __version__
from wtool.checkpoint import Checkpoint

NO_STAGES: Mapping[str, Mapping[str, Any]] = {}


def recipe_yaml(record: Mapping[str, Any]) -> str:
    """A recipe as a file that makes the merge again."""
    return yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)


def model_card(
    record: Mapping[str, Any],
    sources: Sequence[Checkpoint],
    *,
    stages: Mapping[str, Mapping[str, Any]] = NO_STAGES,
    hub: Sequence[str] = (),
) -> str:
    """The text of README.md. Only names on the Hub go into its front matter: a local path means nothing there.

    stages: the recipes of merges made before, whose results were merged, by their names
    hub:    names on the Hub of what went into those
    """
    named = [*(source.label for source in sources if source.revision), *hub]
    bases = list(dict.fromkeys(name.split("@")[0] for name in named))
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "wtool"]}
    if bases:
        head["base_model"] = bases
    models = "\n".join(f"- `{source.label}`" for source in sources)
    recipes = "---\n".join(recipe_yaml({"name": name, **stage}) for name, stage in stages.items())
    recipes = f"{recipes}---\n{recipe_yaml(record)}" if recipes else recipe_yaml(record)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# A merge of {len(sources)} checkpoints\n\n"
        f"Made with wtool {__version__}, method `{record['merge_method']}`, of\n\n{models}\n\n"
        f"## Recipe\n\nSave it as `recipe.yml` and run `wtool merge recipe.yml -o OUT`.\n\n"
        f"```yaml\n{recipes}```\n"
    )
