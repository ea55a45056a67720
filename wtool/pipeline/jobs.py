"""From stages to jobs: a stage once for every combination of the matrix's values that it, or what it needs, names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

from wtool.errors import UsageError, did_you_mean

from .recipe import VERBS, Pipeline, Scalar, Stage

Folder = Callable[["Job"], str]


class Text(Template):
    """A text that names variables, values and stages: $name, ${name}, ${stage.all}; $$ is a dollar."""

    idpattern = r"(?a:[a-z_][a-z0-9_]*)"
    braceidpattern = r"(?a:[a-z_][a-z0-9_]*(?:\.all)?)"


@dataclass(frozen=True)
class Job:
    """A stage at one point of the matrix."""

    stage: str
    values: Mapping[str, Scalar]  # of the matrix, those that count here
    asked: Stage = field(repr=False)
    needs: tuple["Job", ...] = field(repr=False)

    @property
    def verb(self) -> str:
        return self.asked.verb

    @property
    def point(self) -> str:
        """The values in a word, as a file's name may be; empty where there are none."""
        return ",".join(f"{axis}={_plain(value)}" for axis, value in self.values.items())

    @property
    def name(self) -> str:
        return f"{self.stage} {self.point}".strip()

    def output(self, out: Path) -> Path | None:
        """Where what it makes is; None where that is figures alone."""
        makes = VERBS[self.verb].makes
        if makes == "figures":
            return None
        place = out / self.stage / self.point if self.point else out / self.stage
        return place.with_name(f"{place.name}.html") if makes == "page" else place

    def __hash__(self) -> int:
        return hash(self.name)


def jobs_of(pipeline: Pipeline) -> list[Job]:
    """The jobs of a pipeline, each after those that it needs.

    raises: UsageError
    """
    named = {name: _named(stage, _constants(pipeline)) for name, stage in pipeline.stages.items()}
    made: dict[str, list[Job]] = {}
    for name in _in_order(pipeline, named):
        made[name] = _jobs_of_stage(pipeline, name, named[name], made)
    return [job for jobs in made.values() for job in jobs]


def _jobs_of_stage(pipeline: Pipeline, name: str, named: set[str], made: Mapping[str, list[Job]]) -> list[Job]:
    """A stage's jobs, where those of the stages that it needs are made."""
    stage = pipeline.stages[name]
    ones = [each for each in pipeline.stages if each in named]
    wholes = [each for each in pipeline.stages if f"{each}.all" in named or each in stage.after]
    axes = {axis for one in ones for job in made[one] for axis in job.values} | named
    jobs: list[Job] = []
    for values in _points(pipeline, [axis for axis in pipeline.matrix if axis in axes]):
        needs = [next((job for job in made[one] if _agrees(job, values)), None) for one in ones]
        others = [job for each in wholes for job in made[each]]
        if None not in needs:  # else what it needs was excluded
            needed = dict.fromkeys([*(job for job in needs if job is not None), *others])
            jobs.append(Job(name, values, stage, tuple(needed)))
    return jobs


def content_of(job: Job, pipeline: Pipeline, folder: Folder) -> dict[str, Any]:
    """What a job asks, with every name replaced.

    folder: how the output of a job that it needs is called
    """
    return _filled(job.asked.content, _meaning(job, pipeline, folder))


def options_of(job: Job, pipeline: Pipeline, folder: Folder) -> dict[str, Any]:
    """A job's own options of the command line, with every name replaced."""
    return _filled(job.asked.options, _meaning(job, pipeline, folder))


def _meaning(job: Job, pipeline: Pipeline, folder: Folder) -> Callable[[str], Any]:
    """What each name stands for in a job."""
    known = {**_constants(pipeline), **job.values}
    others = {each.stage: each for each in job.needs if _agrees(each, job.values)}

    def look_up(name: str) -> Any:
        if name.endswith(".all"):
            return [folder(each) for each in job.needs if each.stage == name.removesuffix(".all")]
        return folder(others[name]) if name in others else known[name]

    return look_up


def _constants(pipeline: Pipeline) -> dict[str, Any]:
    """The variables, whose values may name those before them."""
    known: dict[str, Any] = {}
    for name, value in pipeline.variables.items():
        for unknown in sorted(_names(value) - known.keys()):
            raise UsageError(f"variable '{name}': no variable '{unknown}' before it{did_you_mean(unknown, known)}")
        known[name] = _filled(value, known.__getitem__)
    return known


def _filled(value: Any, look_up: Callable[[str], Any]) -> Any:
    """A value with its names replaced: a text that is one name alone becomes what that stands for, of any type."""
    if isinstance(value, Mapping):
        return {key: _filled(each, look_up) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [part for each in value for part in _spliced(each, _filled(each, look_up))]
    if not isinstance(value, str):
        return value
    names = Text(value).get_identifiers()
    if len(names) == 1 and value in (f"${names[0]}", f"${{{names[0]}}}"):
        return look_up(names[0])
    return Text(value).substitute({name: _joined(look_up(name)) for name in names})


def _spliced(written: Any, found: Any) -> list[Any]:
    """In a list, a name of several values stands for them all."""
    return found if isinstance(written, str) and isinstance(found, list) else [found]


def _joined(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(value: Any) -> set[str]:
    """The names in a value, however deep."""
    if isinstance(value, str):
        text = Text(value)
        if not text.is_valid():
            raise UsageError(f"'{value}': a $ begins a name ($name, ${{name}}); write $$ for the sign itself")
        return set(text.get_identifiers())
    if isinstance(value, Mapping):
        return {name for each in value.values() for name in _names(each)}
    return {name for each in value for name in _names(each)} if isinstance(value, (list, tuple)) else set()


def _named(stage: Stage, constants: Mapping[str, Any]) -> set[str]:
    """The names of a stage that are no variables."""
    return (_names(stage.content) | _names(stage.options)) - constants.keys()


def _in_order(pipeline: Pipeline, named: Mapping[str, set[str]]) -> Iterable[str]:
    """Stages after those that they need, else as they stand in the file."""
    needs = {name: _needs(pipeline, name, named[name]) for name in pipeline.stages}
    try:
        return list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise UsageError(f"stages need each other in a circle: {' needs '.join(reversed(error.args[1]))}") from None


def _needs(pipeline: Pipeline, name: str, named: set[str]) -> list[str]:
    """The stages that one needs."""
    stage = pipeline.stages[name]
    needed: set[str] = set()
    for each in (*sorted(named - pipeline.matrix.keys()), *stage.after):
        other = each.removesuffix(".all")
        if other not in pipeline.stages:
            known = [*pipeline.stages, *pipeline.matrix, *pipeline.variables]
            raise UsageError(f"stage '{name}': nothing is called '{other}'{did_you_mean(other, known)}")
        if other not in stage.after and VERBS[pipeline.stages[other].verb].makes == "figures":
            raise UsageError(f"stage '{name}': '{other}' gives figures and no files; `after: [{other}]` waits for it")
        needed.add(other)
    return [each for each in pipeline.stages if each in needed]


def _points(pipeline: Pipeline, axes: list[str]) -> list[dict[str, Scalar]]:
    """Combinations of the values of some axes; one that is wholly among the excluded is left out."""
    points = [dict(zip(axes, values, strict=True)) for values in product(*(pipeline.matrix[axis] for axis in axes))]
    return [
        point
        for point in points
        if not any(all(point.get(axis) == value for axis, value in unlike.items()) for unlike in pipeline.exclude)
    ]


def _agrees(job: Job, values: Mapping[str, Scalar]) -> bool:
    return all(axis in values and values[axis] == value for axis, value in job.values.items())


def _plain(value: Scalar) -> str:
    """A value as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in str(value))
