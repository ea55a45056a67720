"""Who is the base, and who are the models: the entries of one place of a recipe, put in their roles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from wtool.errors import UsageError

from .methods.table import METHODS, Method
from .places import Setting


@dataclass(frozen=True)
class Entry:
    """A model as one place of a recipe names it."""

    model: str
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    first: int = 0  # the number in the model of the layer that comes first in this place


@dataclass(frozen=True)
class Mix:
    """What some of the output's tensors are made of, and how."""

    method: str
    base: Entry | None  # taken aside by the method
    models: tuple[Entry, ...]
    shared: tuple[Mapping[str, Setting], ...]  # parameters for all models, the most specific first

    @cached_property
    def row(self) -> Method:
        return METHODS[self.method]

    @cached_property
    def inputs(self) -> tuple[Entry, ...]:
        """The base, if there is one, and the models: the order of the tensors that a step reads."""
        return self.models if self.base is None else (self.base, *self.models)


def mix(method: str, base: str | None, entries: Sequence[Entry], shared: Sequence[Mapping[str, Setting]]) -> Mix:
    """Tell the base from the models.

    A method with a base takes it aside, also where it is among the models. Slerp starts from the base, if one is
    named. For the other methods a base is a model like any other if it has a weight (karcher's has one anyway),
    and else gives only configuration and tokenizer.

    base:   a reference, as among the entries
    raises: UsageError if the method cannot take these models, or lacks a parameter
    """
    row = METHODS[method]
    models = list(entries)
    taken: Entry | None = None
    if row.has_base or (row.may_have_base and base is not None):
        if base is None:
            raise UsageError(
                f"{method} needs a base: the checkpoint that the models were fine-tuned from "
                "(--base, or base_model in a recipe)"
            )
        taken = _own(base, models)
        models = [entry for entry in models if not _same(entry, taken)]
    elif method == "slerp" and base is not None:
        first = _own(base, models)
        models = [first, *(entry for entry in models if not _same(entry, first))]
    elif base is not None and (method == "karcher" or any("weight" in place for place in shared)):
        if base not in (entry.model for entry in models):
            models = [_own(base, models), *models]
    _check_count(method, row, len(models), taken is not None)
    _check_required(method, row, shared)
    return Mix(method, taken, tuple(models), tuple(shared))


def takes(method: str, base: str | None, entries: Sequence[Entry]) -> bool:
    """Whether a method can merge these models."""
    row = METHODS[method]
    count = len({entry.model for entry in entries} - ({base} if row.has_base or row.may_have_base else set()))
    if method == "slerp" and base is not None:
        count = len({base, *(entry.model for entry in entries)})
    return row.least <= count and (row.most is None or count <= row.most)


def _own(base: str, entries: Sequence[Entry]) -> Entry:
    """The base's entry; one that has none takes the layers that all entries take.

    raises: UsageError where those differ
    """
    named = next((entry for entry in entries if entry.model == base), None)
    if named is not None:
        return Entry(base, {}, named.first)
    firsts = sorted({entry.first for entry in entries})
    if len(firsts) > 1:
        raise UsageError(
            f"the sources start at layers {', '.join(map(str, firsts))}: name the base {base} among them, "
            "with its layer_range"
        )
    return Entry(base, {}, firsts[0] if firsts else 0)


def _same(entry: Entry, other: Entry) -> bool:
    return (entry.model, entry.first) == (other.model, other.first)


def _check_count(method: str, row: Method, count: int, has_base: bool) -> None:
    if row.least <= count and (row.most is None or count <= row.most):
        return
    takes = f"{row.least}" if row.most == row.least else f"{row.least} or more"
    takes = "1" if row.most == 1 else takes
    beside = " beside the base" if has_base else ""
    raise UsageError(f"{method} takes {takes} model(s){beside}; {count} are given")


def _check_required(method: str, row: Method, shared: Sequence[Mapping[str, Setting]]) -> None:
    for name, parameter in row.shared.items():
        if parameter.is_required and not any(name in place for place in shared):
            flag = f"-{name}" if len(name) == 1 else f"--{name}"
            raise UsageError(f"{method} needs '{name}': {flag}, or parameters in a recipe")
