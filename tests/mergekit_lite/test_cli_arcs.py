"""The methods on angles and lengths as a user runs them, on a tiny llama, opened again in transformers."""

import merge_definitions_arcs as definition
import pytest
import torch
from tiny_models import llama, saved
from transformers import AutoModelForCausalLM

from wtool.cli import run

CASES = {
    "nuslerp": (
        ["a", "b", "--base", "base", "-w", "0.3", "-w", "0.9", "-p", "vectors=rows"],
        lambda base, a, b, columns: definition.nuslerp(
            base, [a, b], weight=[0.3, 0.9], vectors="rows", columns=columns
        ),
    ),
    "multislerp": (
        ["a", "b", "-w", "0.3", "-w", "0.9", "-p", "normalize_weights=false"],
        lambda base, a, b, columns: definition.multislerp(None, [a, b], weight=[0.3, 0.9], normalize_weights=False),
    ),
    "karcher": (
        ["a", "b", "-w", "1", "-w", "3", "-p", "max_iter=20", "-p", "tol=1e-7"],
        lambda base, a, b, columns: definition.karcher([a, b], weight=[1.0, 3.0], max_iter=20, tol=1e-7),
    ),
    "model_stock": (
        ["a", "b", "--base", "base", "-p", "filter_wise=true"],
        lambda base, a, b, columns: definition.model_stock(base, [a, b], filter_wise=True, columns=columns),
    ),
    "nearswap": (
        ["a", "--base", "base", "-t", "0.01"],
        lambda base, a, b, columns: definition.nearswap(base, [a], t=0.01),
    ),
    "arcee_fusion": (
        ["a", "--base", "base"],
        lambda base, a, b, columns: definition.arcee_fusion(base, [a], columns=columns),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base, and a, b tuned from it."""
    folder = tmp_path_factory.mktemp("models")
    model = llama()
    saved(model, folder / "base")
    for name in ("a", "b"):
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        saved(model, folder / name)
    return folder


@pytest.mark.parametrize("method", CASES)
def test_the_result_opens_and_is_the_definition(models, tmp_path, monkeypatch, method):
    flags, merge = CASES[method]
    monkeypatch.chdir(models)
    assert run(["merge", *flags, "-m", method, "-o", str(tmp_path / "out")]) == 0
    states = [AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("base", "a", "b")]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        lists = [state[name].double().reshape(-1).tolist() for state in states]
        expected = torch.tensor(merge(*lists, tensor.shape[-1]), dtype=torch.float64).reshape(tensor.shape)
        torch.testing.assert_close(tensor.double(), expected, rtol=3e-6, atol=3e-6)


def test_karcher_refuses_weights_of_0(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    assert run(["merge", "a", "b", "-m", "karcher", "-w", "0", "-o", str(tmp_path / "out")]) == 2
    assert "karcher: the weights sum to 0" in capsys.readouterr().err
