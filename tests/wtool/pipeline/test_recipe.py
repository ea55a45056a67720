"""The file of a pipeline: what is refused, in one line that tells where and what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from wtool.errors import UsageError
from wtool.pipeline.recipe import Pipeline, read_pipeline

MERGE = {"merge": {"merge_method": "linear", "models": []}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a pipeline is a mapping with stages"),
        ({"stage": {}}, "stage"),
        ({"stages": {}}, "stages"),
        ({"stages": {"a": {"merg": {}}}}, "stage 'a': no verb 'merg'; did you mean 'merge'?"),
        ({"stages": {"a": {"keep": False}}}, "stage 'a': a stage has one verb; here are none"),
        ({"stages": {"a": {**MERGE, "quantize": {}}}}, "stage 'a': a stage has one verb; here are merge, quantize"),
        ({"stages": {"a": {"merge": "x"}}}, "stage 'a': merge: give a mapping, such as models: …"),
        ({"stages": {"a": "merge"}}, "stage 'a': a stage is a mapping with a verb"),
        ({"stages": {"A b": MERGE}}, "stage 'A b': names are of small letters, digits and _"),
        ({"stages": {"a": MERGE}, "matrix": {"a": [1]}}, "'a' is a matrix and a stage"),
        ({"stages": {"a": MERGE}, "matrix": {"bits": []}}, "matrix: 'bits' has no value"),
        ({"stages": {"a": MERGE}, "matrix": {"bits": [1]}, "exclude": [{"bit": 1}]}, "did you mean 'bits'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError) as raised:
        read_pipeline(path)
    assert str(raised.value).startswith(str(path)) and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_only_variables_that_are_there_can_be_given_otherwise() -> None:
    pipeline = Pipeline.model_validate({"variables": {"base": "a"}, "stages": {"a": MERGE}})
    assert pipeline.with_variables({"base": "b"}).variables == {"base": "b"}
    with pytest.raises(UsageError, match=r"--set bas=…: no such variable; did you mean 'base'\?"):
        pipeline.with_variables({"bas": "b"})
