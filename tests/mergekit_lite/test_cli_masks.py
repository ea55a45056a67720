"""The methods that mask task vectors, once each through `wtool merge` on a tiny llama."""

import merge_definitions_masks as definition
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite.arithmetic.random_mask import mask_key
from wtool.cli import run
from wtool.random_bits import RandomBits

SHAPES = {"model.embed_tokens.weight": (12, 7), "model.layers.0.mlp.up_proj.weight": (9, 7), "model.norm.weight": (7,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base, and a and b tuned from it, each of which left a third of the base's weights."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    for name in ("base", "a", "b"):
        tuned = {
            key: tensor + torch.randn(tensor.shape, generator=generator) * (torch.rand(tensor.shape) > 1 / 3)
            for key, tensor in base.items()
        }
        (folder / name).mkdir()
        content = base if name == "base" else {key: tensor.bfloat16() for key, tensor in tuned.items()}
        save_file(content, folder / name / "model.safetensors", {"format": "pt"})
    return folder


TRIM = {"weight": 0.5, "density": 0.6, "gamma": 0.1}
SAMPLE = {"weight": 0.5, "density": 0.6, "epsilon": 0.2}
CASES = {
    "breadcrumbs": TRIM,
    "breadcrumbs_ties": {**TRIM, "normalize": True, "lambda": 0.9},
    "della": {**SAMPLE, "rescale": "l1"},
    "della_linear": {**SAMPLE, "rescale": "density"},
    "sce": {"select_topk": 0.5},
    "ram": {"epsilon": 0.1},
    "ramplus_tl": {"r": 0.5, "alpha": 0.4, "epsilon": 0.1},
}


@pytest.mark.parametrize("method", CASES)
def test_the_result_is_the_definition(models, tmp_path, method):
    options = [text for key, value in CASES[method].items() for text in ("-p", f"{key}={str(value).lower()}")]
    inputs = [str(models / name) for name in ("a", "b")]
    command = ["merge", *inputs, "--base", str(models / "base"), "--method", method, *options]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    base, a, b, found = (
        load_file(folder / "model.safetensors")
        for folder in (models / "base", models / "a", models / "b", tmp_path / "out")
    )
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = torch.tensor(definition_of(method, name, base[name], [a[name], b[name]])).view(tensor.shape)
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected.double(), rtol=2**-8, atol=1e-5)


def definition_of(method, name, base, models):
    options = {"lambda_" if key == "lambda" else key: value for key, value in CASES[method].items()}
    options |= {key: [options[key]] * 2 for key in ("weight", "density", "gamma") if key in options}
    if "della" in method:
        keys = [mask_key(0, model, name) for model in range(2)]
        numbers = [RandomBits(key).take(0, base.numel()).tolist() for key in keys]
        options |= {"epsilon": [options["epsilon"]] * 2, "numbers": numbers, "columns": base.shape[-1]}
    flat = [tensor.double().view(-1).tolist() for tensor in (base, *models)]
    return getattr(definition, method)(flat[0], flat[1:], **options)
