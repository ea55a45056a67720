"""Methods on angles and lengths beside mergekit 0.1.5: the same tensors through both (see test_peers.py).

Where ours differ on purpose, what mergekit gives is checked too, so that a change of it is noticed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite.methods.arcee_fusion import arcee_fusion
from mergekit_lite.methods.karcher import karcher
from mergekit_lite.methods.model_stock import model_stock
from mergekit_lite.methods.multislerp import multislerp
from mergekit_lite.methods.nearswap import nearswap
from mergekit_lite.methods.nuslerp import nuslerp

PYTHON = os.environ.get("WTOOL_MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="mergekit is not here: pip install mergekit==0.1.5"),
]

PAIR, FOUR, MODELS = ["m0", "m1"], ["base", "m0", "m1", "m2"], ["m0", "m1", "m2"]
# case -> (mergekit's method and parameters, its inputs, ours)
CASES = {
    "nuslerp": ("nuslerp", {"weight": [0.3, 0.9]}, PAIR, lambda b, m: nuslerp(None, m[:2], weight=[0.3, 0.9])),
    "nuslerp base": (
        "nuslerp",
        {"weight": [0.3, 0.9]},
        ["base", *PAIR],
        lambda b, m: nuslerp(b, m[:2], weight=[0.3, 0.9]),
    ),
    "nuslerp rows": (
        "nuslerp",
        {"weight": [0.3, 0.9], "nuslerp_flatten": False},
        ["base", *PAIR],
        lambda b, m: nuslerp(b, m[:2], weight=[0.3, 0.9], vectors="rows"),
    ),
    "nuslerp columns": (
        "nuslerp",
        {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        PAIR,
        lambda b, m: nuslerp(None, m[:2], weight=[0.3, 0.9], vectors="columns"),
    ),
    "nuslerp of three axes, first": (
        "nuslerp",
        {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        ["deep0", "deep1"],
        lambda b, m: nuslerp(None, deep(m), weight=[0.3, 0.9], nuslerp_flatten=False, nuslerp_row_wise=True),
    ),
    "nuslerp weights that cancel": (
        "nuslerp",
        {"weight": [1.0, -1.0]},
        PAIR,
        lambda b, m: nuslerp(None, m[:2], weight=[1.0, -1.0]),
    ),
    "multislerp": (
        "multislerp",
        {"weight": [0.3, 0.5, 0.9]},
        MODELS,
        lambda b, m: multislerp(None, m, weight=[0.3, 0.5, 0.9]),
    ),
    "multislerp base": (
        "multislerp",
        {"weight": [0.3, -0.2, 0.9]},
        FOUR,
        lambda b, m: multislerp(b, m, weight=[0.3, -0.2, 0.9]),
    ),
    "multislerp sum": (
        "multislerp",
        {"weight": [0.3, 0.5, 0.9], "normalize_weights": False},
        FOUR,
        lambda b, m: multislerp(b, m, weight=[0.3, 0.5, 0.9], normalize_weights=False),
    ),
    "multislerp opposite": (
        "multislerp",
        {"weight": [0.3, 0.3]},
        ["m0", "opposite"],
        lambda b, m: multislerp(None, [m[0], -2 * m[0]], weight=[0.3, 0.3]),
    ),
    "karcher": ("karcher", {}, MODELS, lambda b, m: karcher(m)),
    "karcher one step": ("karcher", {"max_iter": 1}, MODELS, lambda b, m: karcher(m, max_iter=1)),
    "karcher opposite": ("karcher", {}, ["m0", "opposite"], lambda b, m: karcher([m[0], -2 * m[0]])),
    "karcher zero": ("karcher", {}, ["m0", "zero", "m1"], lambda b, m: karcher([m[0], torch.zeros_like(b), m[1]])),
    "model_stock": ("model_stock", {}, ["base", "s0", "s1", "s2"], lambda b, m: model_stock(b, shifted(m))),
    "model_stock rows": (
        "model_stock",
        {"filter_wise": True},
        ["base", "s0", "s1", "s2"],
        lambda b, m: model_stock(b, shifted(m), filter_wise=True),
    ),
    "model_stock apart": (
        "model_stock",
        {},
        ["base", "away", "m1"],
        lambda b, m: model_stock(b, [away(b, m), m[1]], clamp=False),
    ),
    "nearswap": ("nearswap", {"t": 0.2}, ["base", "m0"], lambda b, m: nearswap(b, m[:1], t=0.2)),
    "arcee_fusion": ("arcee_fusion", {}, ["base", "m0"], lambda b, m: arcee_fusion(b, m[:1])),
}
HAS_BASE = {name for name, (_, _, inputs, _) in CASES.items() if inputs[0] == "base"}


def deep(models):
    return [model[:60, :60].reshape(3, 20, 60) for model in models[:2]]


def shifted(models):
    return [model + 0.2 for model in models]  # so that they agree in part


def away(base, models):
    return base - (models[1] - base) + 0.5 * (models[2] - base)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Run all cases in one process of mergekit."""
    folder = tmp_path_factory.mktemp("peer")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(97, 61, generator=generator)
    models = [base + 0.3 * torch.randn(97, 61, generator=generator) for _ in range(3)]
    tensors = {
        "base": base,
        "zero": torch.zeros_like(base),
        "opposite": -2 * models[0],
        "away": away(base, models),
        **{f"m{i}": model for i, model in enumerate(models)},
        **{f"s{i}": model for i, model in enumerate(shifted(models))},
        **{f"deep{i}": model.contiguous() for i, model in enumerate(deep(models))},
    }
    cases = {
        name: {"method": method, "parameters": parameters, "inputs": inputs, "base": 0 if name in HAS_BASE else None}
        for name, (method, parameters, inputs, _) in CASES.items()
    }
    cases["nuslerp zero"] = {
        "method": "nuslerp",
        "parameters": {"weight": [1, 1]},
        "inputs": ["zero", "m0"],
        "base": None,
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    save_file(tensors, folder / "tensors.safetensors")
    script = Path(__file__).parents[1] / "peers_mergekit.py"
    arguments = [folder / "cases.json", folder / "tensors.safetensors", folder / "out.safetensors"]
    done = subprocess.run([str(PYTHON), str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return base, models, load_file(folder / "out.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(theirs, case):
    base, models, results = theirs
    ours = CASES[case][3](base, models)
    exact = CASES[case][3](base.double(), [model.double() for model in models])
    deviation, error = (ours - results[case]).abs().max().item(), (ours - exact).abs().max().item()
    print(f"{case}: from mergekit {deviation:.1e}, from float64 {error:.1e}")
    step = 3e-5 if case == "model_stock apart" else 2e-6  # there t = -17 multiplies the rounding of mergekit's cosine
    torch.testing.assert_close(ours, results[case], rtol=step, atol=step)


def test_a_vector_of_no_length_is_on_a_line_and_not_at_right_angles(theirs):
    base, models, results = theirs
    torch.testing.assert_close(results["nuslerp zero"], models[0] * 0.5**0.5)
    torch.testing.assert_close(nuslerp(None, [0 * models[0], models[0]], weight=[1.0, 1.0]), models[0] / 2)


def test_model_stock_goes_no_farther_than_the_base(theirs):
    base, models, results = theirs
    pair = [away(base, models), models[1]]
    print(f"mergekit goes {((results['model_stock apart'] - base).norm() / (sum(pair) / 2 - base).norm()).item():.1f}")
    assert (results["model_stock apart"] - base).norm() > 10 * (sum(pair) / 2 - base).norm()
    assert torch.equal(model_stock(base, pair), base)
