"""The schemas of recipes, checked by jsonschema against recipes that the verbs take and that they refuse."""

import json
from functools import cache

import jsonschema
import pytest
import yaml

from distill.recipe import parse_recipe as distillation
from mergekit_lite.methods.table import METHODS
from mergekit_lite.recipe import parse_recipe
from prune.recipe import parse_recipe as pruning
from quant.recipe import parse_recipe as quantization
from wtool.cli import run
from wtool.commands.schema import SCHEMAS, schema_of
from wtool.errors import UsageError

PARSERS = {"merge": parse_recipe, "quantize": quantization, "prune": pruning, "distill": distillation}
GOOD = {
    "merge": [
        "{merge_method: linear, models: [{model: a}, {model: b, parameters: {weight: 0.3}}]}",
        "{merge_method: slerp, models: [{model: a}, {model: b}], parameters: {t: [0, 0.5, 1]}}",
        """
merge_method: dare_ties
base_model: org/base
models:
  - model: org/base
  - model: org/a
    parameters:
      weight: [0.1, 0.5]
      density: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.5}]
  - {model: org/b@main, parameters: {weight: 1, density: 0.3}}
parameters: {normalize: true, int8_mask: true, lambda: 0.9, rescale: l1}
dtype: bfloat16
out_dtype: float16
seed: 3
""",
        "{merge_method: ties, base_model: b, models: [{model: a, parameters: {density: 0.5}}], dtype: null}",
        "{merge_method: task_arithmetic, base_model: b, models: [{model: a}], parameters: {weight: -1}}",
        "{merge_method: passthrough, models: [{model: a}], parameters: {scale: [{filter: o, value: 0}, {value: 1}]}}",
    ],
    "quantize": [
        "{model: a}",
        "{model: a, method: rtn, bits: 3, group_size: -1, symmetric: false, format: gptq, ignore: [lm_head]}",
        "{model: a, overrides: [{filter: 're:a', bits: 8}], calibration: {data: [x.txt], samples: 4}, way: one-pass}",
        "{model: a, target: vllm, tensor_parallel: 2, statistics: s, damping: 0.1, refine: 0, dtype: float16}",
    ],
    "prune": [
        "{model: a, layers: 3}",
        "{model: a, layers: [0, 2], ffn: 64, depth_score: angular}",
        "{model: a, method: wanda, pattern: '2:4', layer_ratios: uniform}",
        "{model: a, method: sparsegpt, sparsity: 0.5, bits: 4, ignore: [lm_head]}",
        "{model: a, method: svd, rank_ratio: 0.5, ranks: uniform, factors: false}",
    ],
    "distill": [
        "{teacher: a, student: b}",
        "{teacher: a, student_layers: [0, 1], loss: {kind: jsd, beta: 0.3}, training: {steps: 5, optimizer: lion}}",
        "{teacher: a, student_layers: 2, data: {sources: [x.txt], seqlen: 64}, lora: {rank: 4}}",
    ],
}
BAD = {
    "merge": [
        "{merge_method: dare-ties, models: [{model: a}]}",
        "{merge_methd: ties, models: [{model: a}]}",
        "{merge_method: linear}",
        "{merge_method: linear, models: []}",
        "{merge_method: linear, models: [{parameters: {}}]}",
        "{merge_method: linear, models: [{model: a, weight: 1}]}",
        "{merge_method: linear, models: [{model: a, parameters: {density: 0.5}}]}",
        "{merge_method: ties, base_model: b, models: [{model: a, parameters: {normalize: true}}]}",
        "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {normalise: true}}",
    ],
    "quantize": [
        "{}",
        "{model: a, method: gtpq}",
        "{model: a, bits: 7}",
        "{model: a, format: gguff}",
        "{model: a, target: ollama}",
        "{model: a, overrides: [{bits: 8}]}",
        "{model: a, calibration: {samples: 0}}",
        "{model: a, group: 3}",
        "{model: a, damping: 2}",
    ],
    "prune": [
        "{layers: 3}",
        "{model: a, layers: 3, depth_score: angle}",
        "{model: a, ffn: 0}",
        "{model: a, method: wand, sparsity: 0.5}",
        "{model: a, method: wanda, sparsity: 0.5, layer_ratios: mine}",
        "{model: a, method: sparsegpt, sparsity: 0.5, bits: 9}",
    ],
    "distill": [
        "{student: a}",
        "{teacher: a, student: b, loss: {kind: kl}}",
        "{teacher: a, student: b, loss: {temperature: 0}}",
        "{teacher: a, student: b, lora: {}}",
        "{teacher: a, student: b, training: {step: 5}}",
    ],
}


@cache
def schema(verb):
    return jsonschema.Draft202012Validator(schema_of(verb))


def pairs(recipes):
    return [(verb, text) for verb, texts in recipes.items() for text in texts]


@pytest.mark.parametrize(("verb", "text"), pairs(GOOD))
def test_what_a_verb_takes_fits_its_schema(verb, text):
    content = yaml.safe_load(text)
    recipe = PARSERS[verb](content, "recipe.yml")
    schema(verb).validate(content)
    schema(verb).validate(recipe.model_dump(mode="json", exclude_defaults=True))


@pytest.mark.parametrize(("verb", "text"), pairs(BAD))
def test_what_a_verb_refuses_does_not_fit(verb, text):
    content = yaml.safe_load(text)
    with pytest.raises(UsageError):
        PARSERS[verb](content, "recipe.yml")
    with pytest.raises(jsonschema.ValidationError):
        schema(verb).validate(content)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_field_says_what_it_is_for(verb):
    content = schema_of(verb)
    jsonschema.Draft202012Validator.check_schema(content)
    for model in (content, *content.get("$defs", {}).values()):
        for name, field in model.get("properties", {}).items():
            assert field.get("description"), f"{model['title']}.{name}"


def test_values_to_choose_from_are_listed(capsys):
    assert run(["schema", "merge"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["merge_method"]["enum"] == list(METHODS)
    quantize = schema_of("quantize")["properties"]
    assert "gptq" in quantize["method"]["enum"] and "compressed-tensors" in quantize["format"]["enum"]


def test_each_merge_method_takes_its_own_parameters():
    for name, method in METHODS.items():
        for other in set().union(*(each.parameters for each in METHODS.values())) - method.parameters:
            content = {"merge_method": name, "models": [{"model": "a"}], "parameters": {other: 1}}
            with pytest.raises(jsonschema.ValidationError):
                schema("merge").validate(content)


def test_a_verb_without_recipe(capsys):
    assert run(["schema", "inspct"]) == 2
    assert "no recipe for 'inspct'" in capsys.readouterr().err
