"""What recipes of several rooms have in them."""

import re
from collections.abc import Iterable, Mapping
from typing import cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from wtool.errors import UsageError, did_you_mean


class Calibration(BaseModel):
    """The text that inputs are gathered from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: tuple[str, ...] = Field(default=(), description="files or datasets of the Hub; none is the built-in text")
    samples: int = Field(default=128, ge=1, description="windows of text")
    seqlen: int = Field(default=2048, ge=2, description="tokens of a window")
    seed: int = Field(default=0, description="of the choice of windows")
    text_column: str | None = Field(
        default=None, description="key or column of the text, where it is none of the usual"
    )
    split: str = Field(default="train", description="of a dataset")


def fits(entry: str, module: str) -> bool:
    """Whether a filter fits a module's name: by a part of it, or by a regular expression after "re:".

    raises: UsageError
    """
    if entry.startswith("re:"):
        try:
            return re.search(entry[3:], module) is not None
        except re.error as error:
            raise UsageError(f"'{entry}': not a regular expression: {error}") from None
    return entry in module


def unfitting(entries: Iterable[str], modules: Iterable[str]) -> list[str]:
    """A warning for each filter that fits no module."""
    modules = list(modules)
    return [f"no module fits '{entry}'" for entry in entries if not any(fits(entry, module) for module in modules)]


def one_of(names: Iterable[object], *others: object) -> dict[str, JsonValue]:
    """What a recipe's schema tells of a field that takes one of some values."""
    return {"enum": [cast(JsonValue, name) for name in (*names, *others)]}


def known(what: str, name: str, names: Mapping[str, object] | tuple[str, ...]) -> str:
    """The name, if it is one of those there are.

    raises: UsageError
    """
    if name not in names:
        raise UsageError(f"no {what} '{name}'{did_you_mean(name, names)} (there are {', '.join(names)})")
    return name
