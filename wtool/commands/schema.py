"""`wtool schema VERB`: what may stand in a recipe, as JSON Schema, from which editors complete and check."""

import importlib
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wtool import console
from wtool.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# verb -> where the model of its recipe is
SCHEMAS: dict[str, str] = {
    "merge": "mergekit_lite.recipe:MergeRecipe",
    "quantize": "quant.recipe:QuantRecipe",
    "prune": "prune.recipe:PruneRecipe",
    "distill": "distill.recipe:DistillRecipe",
    "run": "wtool.pipeline.recipe:Pipeline",
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"

EPILOG = """\
\b
wtool schema quantize > quantize.schema.json, and as the first line of a recipe:
# yaml-language-server: $schema=quantize.schema.json

Editors with the YAML language server (VS Code, Neovim, JetBrains, …) then complete keys and values and tell what each
is for."""


@app.command(epilog=EPILOG)
def schema(
    verb: Annotated[str, typer.Argument(metavar="VERB", help=", ".join(SCHEMAS))],
    as_json: Annotated[bool, typer.Option("--json", help="JSON it is anyway")] = False,
) -> None:
    """Print the JSON schema of a verb's recipe."""
    console.emit(json.dumps(schema_of(verb), indent=2, ensure_ascii=False))


def schema_of(verb: str) -> dict[str, Any]:
    """The JSON schema of a verb's recipe.

    raises: UsageError
    """
    if verb not in SCHEMAS:
        raise UsageError(f"no recipe for '{verb}'{did_you_mean(verb, SCHEMAS)} (there are {', '.join(SCHEMAS)})")
    module, name = SCHEMAS[verb].split(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    found = {"$schema": DIALECT, **model.model_json_schema()}
    return _with_keys(found) if verb == "run" else found


def _with_keys(pipeline: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's schema with the keys of each verb's recipe; their values may be names, so they have no types."""
    verbs = pipeline["$defs"]["Stage"]["properties"]
    for verb in SCHEMAS.keys() & verbs.keys():
        keys = schema_of(verb)["properties"]
        verbs[verb]["properties"] = {key: {"description": keys[key].get("description", "")} for key in keys}
    return pipeline
