"""A pipeline, as asked: variables, a matrix of values, and stages that name each other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wtool.console import parse_size
from wtool.errors import UsageError, did_you_mean
from wtool.recipe_file import read_yaml, validated

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Verb:
    """How a pipeline calls a verb."""

    makes: str  # "checkpoint", "folder" (something else that stages can use), "page", or "figures" alone
    subject: str  # the key of what it is done to
    has_recipe: bool = False  # what stands under it is the verb's recipe; else its options


VERBS: dict[str, Verb] = {
    "merge": Verb("checkpoint", "models", has_recipe=True),
    "quantize": Verb("checkpoint", "model", has_recipe=True),
    "prune": Verb("checkpoint", "model", has_recipe=True),
    "distill": Verb("checkpoint", "teacher", has_recipe=True),
    "teacher-cache": Verb("folder", "teacher"),
    "calibrate": Verb("folder", "model"),
    "eval": Verb("figures", "checkpoint"),
    "diff": Verb("figures", "a"),
    "inspect": Verb("figures", "checkpoint"),
    "report": Verb("page", "out"),
    "push": Verb("figures", "folder"),
}
NAME = re.compile(r"[a-z_][a-z0-9_]*")
OF_STAGES: dict[str, dict[str, Any]] = {
    "options": {"type": "object", "description": "options of the command line, beside a recipe"},
    "keep": {"type": "boolean", "description": "false: drop the output when all that needs it is done"},
    "resources": {"type": "object", "description": "on a cluster: cpus, gpus, memory (16GB)"},
    "after": {"type": "array", "items": {"type": "string"}, "description": "stages to wait for, though not read"},
}


class Resources(BaseModel):
    """What a job needs of a machine in a cluster, which begins no more jobs than there is room for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    memory: str | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.memory is None else parse_size(self.memory)

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text


class Stage(BaseModel):
    """One verb, on files or on what other stages made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: str
    content: dict[str, Any]  # the verb's recipe, or its options
    options: dict[str, Any] = Field(default_factory=dict)
    keep: bool = True
    resources: Resources = Resources()
    after: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _verb_is_a_key(cls, written: Any) -> Any:
        """{merge: {…}, keep: false} -> {verb: merge, content: {…}, keep: false}"""
        if not isinstance(written, dict):
            raise UsageError("a stage is a mapping with a verb: " + ", ".join(VERBS))
        found = [key for key in written if key not in OF_STAGES]
        unknown = next((key for key in found if key not in VERBS), None)
        if unknown is not None:
            raise UsageError(f"no verb '{unknown}'{did_you_mean(str(unknown), (*VERBS, *OF_STAGES))}")
        if len(found) != 1:
            raise UsageError(f"a stage has one verb; here are {', '.join(found) or 'none'}")
        if not isinstance(written[found[0]], dict):
            raise UsageError(f"{found[0]}: give a mapping, such as {VERBS[found[0]].subject}: …")
        rest = {key: value for key, value in written.items() if key in OF_STAGES}
        return {"verb": found[0], "content": written[found[0]], **rest}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """A stage as it is written: its verb is a key."""
        verbs = {verb: {"type": "object", "description": f"options or recipe of wtool {verb}"} for verb in VERBS}
        return {
            "type": "object",
            "description": cls.__doc__,
            "properties": {**verbs, **OF_STAGES},
            "additionalProperties": False,
            "oneOf": [{"required": [verb]} for verb in VERBS],
        }


class Pipeline(BaseModel):
    """Stages that name each other's outputs, and what they have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variables: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="values that stages name: $name or ${name}"
    )
    matrix: dict[str, list[Scalar]] = Field(
        default_factory=dict, description="values that a name takes in turn; a stage that names it is run for each"
    )
    exclude: tuple[dict[str, Scalar], ...] = Field(
        default=(), description="combinations of the matrix that are left out"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the command line for every stage whose verb has them"
    )
    stages: dict[str, Stage] = Field(min_length=1, description="name: {verb: its recipe or options}")

    @field_validator("stages", mode="before")
    @classmethod
    def _tell_which_stage(cls, written: Any) -> Any:
        if not isinstance(written, Mapping):
            raise UsageError("stages is a mapping from names to stages")
        for name, stage in written.items():
            try:
                Stage.model_validate(stage)
            except UsageError as error:
                raise UsageError(f"stage '{name}': {error}") from None
        return written

    @model_validator(mode="after")
    def _names_are_names(self) -> "Pipeline":
        seen: dict[str, str] = {}
        for kind, names in (("variable", self.variables), ("matrix", self.matrix), ("stage", self.stages)):
            for name in names:
                if not NAME.fullmatch(name):
                    raise UsageError(f"{kind} '{name}': names are of small letters, digits and _")
                if name in seen:
                    raise UsageError(f"'{name}' is a {seen[name]} and a {kind}; give one of them another name")
                seen[name] = kind
        for axis, values in self.matrix.items():
            if not values:
                raise UsageError(f"matrix: '{axis}' has no value")
        for unlike in self.exclude:
            for axis in unlike:
                if axis not in self.matrix:
                    raise UsageError(f"exclude: no '{axis}' in the matrix{did_you_mean(axis, self.matrix)}")
        return self

    def with_variables(self, given: Mapping[str, Scalar]) -> "Pipeline":
        """The same with some variables given otherwise.

        raises: UsageError for one that the file does not name
        """
        for name in given:
            if name not in self.variables:
                raise UsageError(f"--set {name}=…: no such variable{did_you_mean(name, self.variables)}")
        return self.model_copy(update={"variables": {**self.variables, **given}})


def read_pipeline(path: Path) -> Pipeline:
    """Read a pipeline's file (YAML).

    raises: UsageError, with the key and what would be right
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a pipeline is a mapping with stages, and perhaps variables and a matrix")
    try:
        return validated(Pipeline, content, str(path))
    except UsageError as error:
        raise UsageError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
