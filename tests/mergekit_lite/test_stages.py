"""Several merges in one file: against the same merges run one by one, and after stops."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from layered import llama, weights

from wtool.cli import run

RECIPE = """
name: first
merge_method: linear
models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 3}}]
---
name: second
merge_method: task_arithmetic
base_model: A
models: [{model: first}, {model: C}]
parameters: {weight: 0.5}
---
merge_method: passthrough
slices:
- sources: [{model: first, layer_range: [0, 2]}]
- sources: [{model: second, layer_range: [0, 2]}]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: llama(folder / name, 2, seed) for seed, name in enumerate("ABC")}, folder


@pytest.fixture
def recipe(models, tmp_path):
    return written(models, tmp_path, RECIPE)


def written(models, tmp_path, text):
    for name in "ABC":
        text = text.replace(f"model: {name}", f"model: {models[1] / name}")
    (tmp_path / "recipe.yml").write_text(text)
    return str(tmp_path / "recipe.yml")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_stage_is_merged_and_the_output_of_them(models, recipe, tmp_path):
    assert run(["merge", recipe, "-o", str(tmp_path / "out")]) == 0
    a, b, c = models[0].values()
    found = weights(tmp_path / "out")
    for name in a:
        first = (a[name] + 3 * b[name]) / 4
        second = a[name] + 0.5 * (first - a[name]) + 0.5 * (c[name] - a[name])
        if ".layers." in name:
            later = name.replace(".0.", ".2.").replace(".1.", ".3.")
            torch.testing.assert_close(found[name], first)
            torch.testing.assert_close(found[later], second)
        else:  # embeddings are of the first slice's model, norm and head of the last's
            torch.testing.assert_close(found[name], first if "embed" in name else second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yml"]


def test_kept_stages_are_those_merged_alone(models, recipe, tmp_path):
    assert run(["merge", recipe, "-o", str(tmp_path / "out"), "--keep-stages"]) == 0
    alone = yaml.safe_load(Path(recipe).read_text().split("---")[0])
    del alone["name"]
    (tmp_path / "alone.yml").write_text(yaml.safe_dump(alone))
    assert run(["merge", str(tmp_path / "alone.yml"), "-o", str(tmp_path / "alone")]) == 0
    assert contents(tmp_path / "out.stages/first") == contents(tmp_path / "alone")


def test_the_card_holds_all_stages(models, recipe, tmp_path):
    assert run(["merge", recipe, "-o", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    (tmp_path / "again.yml").write_text(card.split("```yaml\n")[1].split("```")[0])
    assert run(["merge", str(tmp_path / "again.yml"), "-o", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert str(tmp_path) not in "".join(card.split("```yaml")[0])


def test_an_output_that_is_there_is_known_without_its_stages(models, recipe, tmp_path, capsys):
    command = ["merge", recipe, "-o", str(tmp_path / "out")]
    assert run(command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(command) == 0
    assert "there already, made by these stages" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    Path(recipe).write_text(Path(recipe).read_text().replace("weight: 0.5", "weight: 0.6"))
    assert run(command) == 4
    assert "--force replaces it" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0


def test_a_stopped_merge_goes_on_with_the_stages_that_are_done(models, recipe, tmp_path, monkeypatch):
    from wtool.executors import local

    assert run(["merge", recipe, "-o", str(tmp_path / "whole")]) == 0
    made = []

    def stopping(plan, out, **more):
        made.append(out.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return whole(plan, out, **more)

    whole = local.run
    monkeypatch.setattr(local, "run", stopping)
    assert run(["merge", recipe, "-o", str(tmp_path / "out")]) != 0
    assert (tmp_path / "out.stages/first/wtool.json").exists() and not (tmp_path / "out").exists()
    first = (tmp_path / "out.stages/first/wtool.json").stat().st_mtime_ns
    assert run(["merge", recipe, "-o", str(tmp_path / "out"), "--keep-stages"]) == 0
    assert (tmp_path / "out.stages/first/wtool.json").stat().st_mtime_ns == first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_dry_run_plans_all_and_writes_nothing(models, recipe, tmp_path, capsys):
    assert run(["merge", recipe, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("stage first: 9 tensors") and "output: 15 tensors" in said
    assert run(["merge", recipe, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tensors"] == 15 and list(told["stages"]) == ["first", "second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml"]


def test_a_problem_in_a_later_stage_is_told_before_the_first_is_run(models, tmp_path, capsys):
    recipe = written(models, tmp_path, RECIPE.replace("second, layer_range: [0, 2]", "second, layer_range: [1, 3]"))
    assert run(["merge", recipe, "-o", str(tmp_path / "out")]) == 2
    assert "the output: slice 1: layer_range [1, 3] of second goes beyond its 2 layers" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: second", "name: first"), "document 2: a second 'first'"),
        (("name: second", "name: a/b"), "document 2: name is 'a/b'"),
        (("name: second\n", ""), "document 3: a second one without a name"),
        (("{model: A, parameters: {weight: 1}}", "{model: second}"), "stages that need each other"),
        (("{model: second, layer_range", "{model: first, layer_range"), "does not use stage 'second'"),
        (
            ("merge_method: linear", "merge_method: lineer"),
            "document 1: no merge method 'lineer'; did you mean 'linear'?",
        ),
        (("name: first", "name: [first"), "recipe.yml: not valid YAML"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, change, message):
    recipe = written(models, tmp_path, RECIPE.replace(*change))
    assert run(["merge", recipe, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_what_is_for_greedy_soups_alone_is_refused(recipe, tmp_path, capsys):
    assert run(["merge", recipe, "--window", "8", "-o", str(tmp_path / "out")]) == 2
    assert "--window tells how --greedy measures" in capsys.readouterr().err
    assert run(["merge", recipe, "--greedy", "held.txt", "-o", str(tmp_path / "out")]) == 2
    assert "--greedy chooses among the models of one merge" in capsys.readouterr().err


def test_where_all_have_names_the_last_is_the_output(models, tmp_path):
    assert run(["merge", written(models, tmp_path, RECIPE), "-o", str(tmp_path / "one")]) == 0
    named = RECIPE.replace("---\nmerge_method", "---\nname: last\nmerge_method")
    assert run(["merge", written(models, tmp_path, named), "-o", str(tmp_path / "two")]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
