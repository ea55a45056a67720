"""What a recipe says of the output's tokens, in the words of mergekit's YAML: `tokenizer`, `tokenizer_source`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from wtool.errors import UsageError

from ..places import Reference, reference

BASE, UNION = "base", "union"
_STRICT = ConfigDict(frozen=True, extra="forbid")


class Zero(BaseModel):
    """A row of zeros."""

    model_config = _STRICT

    kind: Literal["zero"] = Field(description="zeros")


class ModelToken(BaseModel):
    """The row of another token, in one of the models."""

    model_config = _STRICT

    kind: Literal["model_token"] = Field(description="the row of another token")
    model: Reference = Field(description="whose row")
    token: str | None = Field(default=None, description="the token whose row it is")
    token_id: int | None = Field(default=None, ge=0, description="in the place of token: its number in that model")

    @model_validator(mode="after")
    def _one_token(self) -> "ModelToken":
        if (self.token is None) == (self.token_id is None):
            raise UsageError(f"tokens: a model_token of {self.model} has either token or token_id")
        return self


def _source(written: Any) -> Any:
    """A model in its long spelling is a mapping too: only those with `kind` are something else."""
    return written if isinstance(written, Mapping) and "kind" in written else reference(written)


class TokenRule(BaseModel):
    """Where the row of one token comes from."""

    model_config = _STRICT

    source: Annotated[Zero | ModelToken | str, BeforeValidator(_source)] = Field(
        description="a model that has the token, {kind: zero}, or {kind: model_token, model, token or token_id}"
    )
    force: bool = Field(default=False, description="in every model, also in those that have a row of their own")


class TokenizerRecipe(BaseModel):
    """Which tokens the output has, and where their rows come from."""

    model_config = _STRICT

    source: Reference = Field(default=UNION, description="union, base, or one of the models")
    tokens: dict[str, TokenRule] = Field(default_factory=dict, description="rows of single tokens")
    pad_to_multiple_of: int | None = Field(default=None, ge=1, description="what the number of rows is a multiple of")


def tokenizer_asked(tokenizer: TokenizerRecipe | None, source: str | None) -> TokenizerRecipe | None:
    """What a recipe asks for, by the new key or the old one.

    raises: UsageError for both
    """
    if tokenizer is not None and source is not None:
        raise UsageError("tokenizer_source is the old spelling of tokenizer: {source: …}; give one of them")
    return TokenizerRecipe(source=source.removeprefix("model:")) if source is not None else tokenizer
