"""Stages and a matrix against what they say: each combination once, and only of what a stage names."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wtool.errors import UsageError
from wtool.pipeline.jobs import Job, content_of, jobs_of, options_of
from wtool.pipeline.recipe import Pipeline


def pipeline(stages: dict[str, Any], **rest: Any) -> Pipeline:
    return Pipeline.model_validate({"stages": stages, **rest})


def quantize(**content: Any) -> dict[str, Any]:
    return {"quantize": content}


def folder(job: Job) -> str:
    return f"<{job.name}>"


def test_a_stage_is_done_once_for_each_value_that_it_or_what_it_needs_names() -> None:
    asked = pipeline(
        {
            "score": {"eval": {"checkpoint": "$small", "text": ["a.txt"]}},
            "small": quantize(model="$whole", bits="$bits", method="$method"),
            "whole": {"merge": {"models": [{"model": "./a"}]}},
            "wide": quantize(model="$whole", bits="$bits"),
        },
        matrix={"bits": [4, 3], "method": ["gptq", "rtn"], "unused": [1, 2]},
    )
    names = [job.name for job in jobs_of(asked)]
    points = [f"bits={bits},method={method}" for bits, method in product([4, 3], ["gptq", "rtn"])]
    assert sorted(names) == sorted(
        [
            "whole",
            "wide bits=4",
            "wide bits=3",
            *(f"{stage} {point}" for stage in ("small", "score") for point in points),
        ]
    )
    seen: set[str] = set()
    for job in jobs_of(asked):
        assert {each.name for each in job.needs} <= seen
        assert all(job.values[axis] == value for each in job.needs for axis, value in each.values.items())
        seen.add(job.name)


def test_names_become_what_they_stand_for_in_their_own_types() -> None:
    asked = pipeline(
        {
            "a": quantize(model="${root}/x", bits="$bits", ignore=["$two", "c"], note="$$5 in $root"),
            "b": {"merge": {"models": [{"model": "$a"}], "k": ["${a.all}", "z"]}, "options": {"workers": "$bits"}},
        },
        variables={"root": "./m", "two": ["p", "q"], "deep": "$root/d"},
        matrix={"bits": [4]},
    )
    a, b = jobs_of(asked)
    assert content_of(a, asked, folder) == {"model": "./m/x", "bits": 4, "ignore": ["p", "q", "c"], "note": "$5 in ./m"}
    assert content_of(b, asked, folder) == {"models": [{"model": "<a bits=4>"}], "k": ["<a bits=4>", "z"]}
    assert options_of(b, asked, folder) == {"workers": 4}


def test_all_jobs_of_a_stage_can_be_named_at_once() -> None:
    asked = pipeline(
        {"a": quantize(model="m", bits="$bits"), "page": {"report": {"out": "${a.all}"}}}, matrix={"bits": [4, 3, 2]}
    )
    page = jobs_of(asked)[-1]
    assert page.name == "page" and page.values == {}
    assert content_of(page, asked, folder) == {"out": ["<a bits=4>", "<a bits=3>", "<a bits=2>"]}


@given(st.sets(st.tuples(st.sampled_from([2, 3, 4]), st.sampled_from(["x", "y"]))))
def test_excluded_combinations_and_what_needs_them_are_left_out(without: set[tuple[int, str]]) -> None:
    asked = pipeline(
        {"b": quantize(model="$a"), "a": quantize(model="m", bits="$bits", method="$method")},
        matrix={"bits": [2, 3, 4], "method": ["x", "y"]},
        exclude=[{"bits": bits, "method": method} for bits, method in without],
    )
    expected = {pair for pair in product([2, 3, 4], ["x", "y"])} - without
    for stage in "ab":
        assert {tuple(job.values.values()) for job in jobs_of(asked) if job.stage == stage} == expected


def test_outputs_lie_in_a_folder_a_stage() -> None:
    asked = pipeline(
        {
            "a": quantize(model="m", name="$name"),
            "p": {"report": {"out": "$a"}},
            "e": {"eval": {"checkpoint": "$a"}},
            "q": {"report": {"out": "x"}},
        },
        matrix={"name": ["org/x", 0.5]},
    )
    places = {job.name: job.output(Path("o")) for job in jobs_of(asked)}
    assert places["a name=org-x"] == Path("o/a/name=org-x") and places["a name=0.5"] == Path("o/a/name=0.5")
    assert places["p name=0.5"] == Path("o/p/name=0.5.html") and places["q"] == Path("o/q.html")
    assert places["e name=0.5"] is None


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": quantize(model="$b"), "b": quantize(model="$a")}, "in a circle: a needs b needs a|circle: b needs a"),
        ({"a": quantize(model="$a")}, "circle"),
        ({"a": quantize(model="$mergd"), "merged": quantize(model="m")}, "nothing is called 'mergd'; did you mean 'm"),
        ({"a": {**quantize(model="m"), "after": ["x"]}}, "stage 'a': nothing is called 'x'"),
        ({"a": quantize(model="5 $ 6")}, r"'5 \$ 6': a \$ begins a name"),
        ({"e": {"eval": {"checkpoint": "m"}}, "a": quantize(model="$e")}, "'e' gives figures and no files"),
    ],
)
def test_names_that_mean_nothing_are_refused(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        jobs_of(pipeline(stages))


def test_a_variable_knows_those_before_it_only() -> None:
    with pytest.raises(UsageError, match="variable 'a': no variable 'b' before it"):
        jobs_of(pipeline({"s": quantize(model="$a")}, variables={"a": "$b", "b": "x"}))
