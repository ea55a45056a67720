import pytest

from mergekit_lite.methods.table import METHODS
from mergekit_lite.recipe import parse_recipe, read_recipe
from wtool.errors import UsageError

GOOD = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "parameters": {"density": 0.5}}]}


def test_mergekits_yaml(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("""
merge_method: dare_ties
base_model: org/base
models:
  - model: org/base
  - model: org/a
    parameters:
      weight: [0.1, 0.5e-0]
      density:
        - filter: mlp
          value: [0.2, 0.9]
        - value: 0.5
  - model: org/b@main
    parameters: {weight: 1, density: 0.3}
parameters: {normalize: true, int8_mask: true, lambda: 0.9, rescale: l1}
dtype: bfloat16
out_dtype: float16
""")
    recipe = read_recipe(path)
    assert [entry.model for entry in recipe.models] == ["org/base", "org/a", "org/b@main"]
    assert recipe.output_dtype == "F16"
    assert recipe.models[1].parameters["weight"] == [0.1, 0.5]
    assert parse_recipe(recipe.model_dump(mode="json", exclude_none=True), "again") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "dare-ties"}, "no merge method 'dare-ties'; did you mean 'dare_ties'?"),
        ({"merge_methd": "ties"}, "unknown key 'merge_methd'; did you mean 'merge_method'?"),
        ({"parameters": {"normalise": True}}, "ties has no parameter 'normalise'; did you mean 'normalize'?"),
        (
            {"models": [{"model": "a", "parameters": {"wieght": 1}}]},
            "model a: ties has no parameter 'wieght'; did you mean",
        ),
        ({"models": [{"model": "a", "weight": 1}]}, "unknown key 'models.0.weight'"),
        ({"models": []}, "'models': "),
        ({"models": [{"parameters": {}}]}, "'models.0.model' is missing"),
        ({"models": [{"model": "a", "parameters": {"normalize": True}}]}, "'normalize' is one for all models"),
        (
            {"dtype": "bfloat61"},
            "dtype 'bfloat61' is not one of float16, bfloat16, float32, float64; did you mean 'bfloat16'?",
        ),
        ({"slices": []}, "'slices': "),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, "this one has models and slices"),
        ({"models": [{"model": {"path": "a", "rev": "x"}}]}, "unknown key 'rev' of a model"),
        ({"models": [{"model": {"lora": "a"}}]}, "'model' is missing"),
    ],
)
def test_mistakes_are_one_line_with_the_cure(change, message):
    with pytest.raises(UsageError) as caught:
        parse_recipe({**GOOD, **change}, "recipe.yml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def slices(*sources, **more):
    return {"merge_method": "linear", "slices": [{"sources": list(sources), **more}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (slices({"model": "a", "layer_range": [2, 2]}), "layer_range [2, 2] of a has no layers"),
        (slices({"model": "a", "layer_range": [-1, 2]}), "layer_range [-1, 2] of a has no layers"),
        (slices({"model": "a"}), "'slices.0.sources.0.layer_range' is missing"),
        (
            slices({"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}),
            "as many layers each; here are [0, 2] of a, [0, 3] of b",
        ),
        (
            slices({"model": "a", "layer_range": [0, 2], "parameters": {"normalize": True}}),
            "slice 0: model a: 'normalize' is one for all models",
        ),
        (slices({"model": "a", "layer_range": [0, 2]}, parameters={"t": 1}), "slice 0: parameters: linear has no"),
        ({"merge_method": "linear"}, "this one has none"),
        (
            {"merge_method": "linear", "modules": {"text": {}}},
            "a module has either models or slices; this one has none",
        ),
        (
            {"merge_method": "linear", "modules": {"text": {"models": [{"model": "a"}], "parameters": {"x": 1}}}},
            "module text: parameters: linear has no parameter 'x'",
        ),
    ],
)
def test_slices_and_modules_that_cannot_be_meant(content, message):
    with pytest.raises(UsageError) as caught:
        parse_recipe(content, "recipe.yml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mergekits_long_spelling_of_a_model():
    long = {
        "model": {"path": "org/a", "revision": "main"},
        "lora": {"path": "org/l", "revision": None},
        "override_architecture": "LlamaForCausalLM",
    }
    base = {"model": {"path": "org/base"}}
    recipe = parse_recipe({**GOOD, "base_model": base, "models": [{"model": long}, {"model": "b"}]}, "recipe.yml")
    assert recipe.references == ["org/base", "org/a@main+org/l", "b"]
    assert recipe.remarks == (
        "org/a@main+org/l: 'override_architecture' has no effect: no list of architectures is used",
    )


def test_what_has_no_effect_is_said():
    content = slices({"model": "a", "layer_range": [0, 2]}, residual_weight=0.5)
    assert parse_recipe(content, "x").remarks == ("'residual_weight' has no effect, as in mergekit",)
    (remark,) = parse_recipe({**GOOD, "parameters": {"int8_mask": True}}, "x").remarks
    assert remark.startswith("'int8_mask' has no effect")
    assert parse_recipe(GOOD, "x").remarks == ()


@pytest.mark.parametrize("text", ["- a", "merge_method: [", "just words"])
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(UsageError, match="x.yml: ") as caught:
        read_recipe(tmp_path / "x.yml")
    assert "\n" not in str(caught.value)


def test_the_table_of_methods_is_whole():
    import mergekit_lite

    assert mergekit_lite.__doc__ and all(f"| {name} " in mergekit_lite.__doc__ for name in METHODS)
