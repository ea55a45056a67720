"""What can be asked, and what is said where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prune.recipe import METHODS, PruneRecipe, parse_recipe, read_recipe
from wtool.errors import UsageError

WANDA: dict[str, Any] = {"model": "m", "method": "wanda"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_amount(method: str) -> None:
    amount = {"rank_ratio": 0.5} if method.startswith("svd") else {"sparsity": 0.5}
    recipe = parse_recipe({"model": "m", "method": method, **amount}, "here")
    assert recipe.kind == ("rank" if method.startswith("svd") else "sparsity")
    other = {"sparsity": 0.5} if method.startswith("svd") else {"rank_ratio": 0.5}
    for wrong in (other, {}, amount | other):
        with pytest.raises(UsageError, match=f"method '{method}' takes .*, one of them; found"):
            parse_recipe({"model": "m", "method": method, **wrong}, "here")


def test_sizes_alone_are_a_pruning_of_the_structure() -> None:
    recipe = parse_recipe({"model": "m", "layers": [0, 2, 3], "ffn": 96}, "here")
    assert (recipe.kind, recipe.layers, recipe.ffn, recipe.compensate) == ("structure", (0, 2, 3), 96, True)
    assert parse_recipe({"model": "m", "layers": 3}, "here").layers == 3


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "what is to go? give sizes to keep "
        "(layers, hidden, ffn, heads, kv_heads, experts, expert_ffn, params, size or latency_ratio)",
    ),
    ({"sparsity": 0.5}, "'sparsity' needs a method: one of magnitude, wanda"),
    ({"method": "wnda", "sparsity": 0.5}, "no pruning method 'wnda'; did you mean 'wanda'?"),
    ({"method": "wanda", "sparsity": 1.2}, "sparsity 1.2 is not a share of the weights to drop, from 0 to below 1"),
    ({"method": "wanda", "sparsity": -0.1}, "sparsity -0.1 is not a share"),
    ({"method": "wanda", "sparsity": float("nan")}, "sparsity nan is not a share"),
    ({"method": "wanda", "pattern": "4:2"}, "pattern 4:2 is not N kept of every M, with N from 1 to M - 1"),
    ({"method": "wanda", "pattern": "2-4"}, "pattern '2-4' is not N:M, N kept of every M neighbours, such as 2:4"),
    ({"method": "wanda", "sparsity": 0.5, "pattern": "2:4"}, "takes sparsity or pattern, one of them"),
    ({"method": "wanda", "pattern": "2:4", "layer_ratios": "owl"}, "layer ratios 'owl' move a share of weights"),
    ({"method": "wanda", "sparsity": 0.5, "layers": 3}, "'layers' and method 'wanda' are two prunings"),
    ({"method": "svd", "rank_ratio": 0.0}, "rank ratio 0 is not a share of the parameters to keep"),
    ({"method": "svd", "rank_ratio": 1.5}, "rank ratio 1.5 is not a share of the parameters to keep"),
    ({"layers": 3, "depth_score": "angle"}, "no score of layers 'angle'; did you mean 'angular'?"),
    ({"experts": 3, "expert_score": "reaper"}, "no score of experts 'reaper'; did you mean 'reap'?"),
    ({"ffn": 0}, "'ffn': input should be greater than or equal to 1 (found '0')"),
    ({"layers": 3, "statistics": "stats"}, "statistics are for methods"),
    ({"method": "wanda", "sparsity": 0.5, "dampning": 0.1}, "unknown key 'dampning'; did you mean 'damping'?"),
    ({"method": "wanda", "sparsity": 0.5, "damping": 2}, "'damping': input should be less than or equal to 1"),
    ({"layers": 3, "calibration": {"sample": 3}}, "unknown key 'calibration.sample'; did you mean 'samples'?"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_what_cannot_be_meant_is_told_in_one_line(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe({"model": "m", **content}, "here")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_without_a_model_or_that_is_no_mapping() -> None:
    with pytest.raises(UsageError, match="here: 'model' is missing"):
        parse_recipe({"layers": 3}, "here")
    with pytest.raises(UsageError, match="here: a recipe is a mapping with model, layers, hidden"):
        parse_recipe([1], "here")


@pytest.mark.parametrize(
    "content",
    [
        {"model": "m", "layers": [0, 1], "hidden": 32, "rescale_norms": False},
        {"model": "m", "method": "sparsegpt", "pattern": "2:4", "ignore": ["up_proj"], "calibration": {"seqlen": 9}},
        {"model": "m", "method": "svd-llm", "rank_ratio": 0.3, "ranks": "uniform", "factors": False},
    ],
)
def test_what_a_manifest_and_a_card_tell_is_the_same_recipe_again(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(content, "here")
    told = recipe.model_dump(mode="json", exclude_none=True)
    for number, written in enumerate((told, {"prune": told, "kept": {"layers": [0]}})):
        path = tmp_path / f"{number}.yml"
        path.write_text(yaml.safe_dump(written))
        assert read_recipe(path) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.method = None


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yml: cannot be read"):
        read_recipe(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_text("a: [")
    with pytest.raises(UsageError, match=r"bad\.yml: not valid YAML"):
        read_recipe(tmp_path / "bad.yml")


def test_how_much_is_asked() -> None:
    assert PruneRecipe(**WANDA, sparsity=0.3).asked.share == 0.3
    assert PruneRecipe(**WANDA, pattern=" 1:4 ").asked.pattern == (1, 4)
