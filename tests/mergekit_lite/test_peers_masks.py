"""The methods that mask task vectors, beside mergekit 0.1.5 (see test_peers.py).

Where definitions agree the results must; where they differ on purpose, the difference itself is checked. Masks at
random agree in how often each rank is kept.
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

from mergekit_lite.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from mergekit_lite.methods.della import della, della_linear
from mergekit_lite.methods.ram import ram, ramplus_tl
from mergekit_lite.methods.sce import sce

PYTHON = os.environ.get("WTOOL_MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="mergekit is not here: pip install mergekit==0.1.5"),
]

METHODS = {
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
}
TRIMMED = {"weight": [0.3, 0.5, 0.9], "density": [0.5, 0.25, 0.9], "gamma": [0.01, 0.0, 0.3]}
# case -> (method, parameters)
CASES = {
    "breadcrumbs": ("breadcrumbs", TRIMMED),
    "breadcrumbs mean": ("breadcrumbs", {**TRIMMED, "normalize": True, "lambda": 1.3}),
    "breadcrumbs rescaled": ("breadcrumbs", {**TRIMMED, "rescale": True}),
    "breadcrumbs_ties": ("breadcrumbs_ties", TRIMMED),
    "breadcrumbs_ties mean": ("breadcrumbs_ties", {**TRIMMED, "normalize": True, "rescale": True}),
    "breadcrumbs_ties negative": ("breadcrumbs_ties", {**TRIMMED, "weight": [1.0, -0.5, 0.5]}),
    "sce": ("sce", {}),
    "sce selected": ("sce", {"select_topk": 0.3}),
    "sce nothing": ("sce", {"select_topk": 0.0}),
    "ram": ("ram", {}),
    "ram coarse": ("ram", {"epsilon": 0.25}),
    "ramplus_tl": ("ramplus_tl", {}),
    "ramplus_tl coarse": ("ramplus_tl", {"r": 0.5, "alpha": 2.0, "epsilon": 0.4}),
}
ROWS, COLUMNS = 4096, 9  # of the tensor whose ranks are counted: positive, so that signs agree
DELLA = {"weight": [1.0], "density": [0.5], "epsilon": [0.15]}
RANDOM = {
    "della": ("della", DELLA),
    "della_linear": ("della_linear", DELLA),
    "della_linear unscaled": ("della_linear", {**DELLA, "rescale": False}),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Run all cases in one process of mergekit."""
    folder = tmp_path_factory.mktemp("peer")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(97, 61, generator=generator)
    models = [base + 0.3 * torch.randn(97, 61, generator=generator) for _ in range(3)]
    ramp = torch.rand(ROWS, COLUMNS, generator=generator) + 0.5
    tensors = {"base": base, "zero": torch.zeros_like(ramp), "ramp": ramp, "one": torch.ones(1), "none": torch.zeros(1)}
    tensors |= {f"m{i}": model for i, model in enumerate(models)}
    tensors |= {f"small{i}": base + 1e-4 * (i + 1) * (model - base) for i, model in enumerate(models)}
    names = [f"m{i}" for i in range(3)]
    cases = {name: (*case, ["base", *names]) for name, case in CASES.items()}
    cases |= {name: (*case, ["zero", "ramp"]) for name, case in RANDOM.items()}
    cases["single"] = ("breadcrumbs", {"weight": [1.0], "density": [0.9], "gamma": [0.01]}, ["none", "one"])
    cases["small"] = ("sce", {}, ["base", *(f"small{i}" for i in range(3))])
    content = {
        name: {"method": method, "parameters": parameters, "inputs": inputs, "base": 0}
        for name, (method, parameters, inputs) in cases.items()
    }
    (folder / "cases.json").write_text(json.dumps(content))
    save_file(tensors, folder / "tensors.safetensors")
    script = Path(__file__).parents[1] / "peers_mergekit.py"
    arguments = [folder / "cases.json", folder / "tensors.safetensors", folder / "out.safetensors"]
    done = subprocess.run([str(PYTHON), str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return tensors, load_file(folder / "out.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(theirs, case):
    tensors, results = theirs
    method, parameters = CASES[case]
    options = {"lambda_" if key == "lambda" else key: value for key, value in parameters.items()}
    ours = METHODS[method](tensors["base"], [tensors[f"m{i}"] for i in range(3)], **options)
    print(f"{case}: largest deviation {(ours - results[case]).abs().max().item():.2e}")
    torch.testing.assert_close(ours, results[case], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", RANDOM)
def test_della_keeps_each_rank_as_often(theirs, case):
    tensors, results = theirs
    zero, ramp = tensors["zero"], tensors["ramp"]
    rescale = "none" if "unscaled" in case else "l1"
    merge = della if case == "della" else della_linear
    ours = merge(zero, [ramp], weight=[1.0], density=[0.5], epsilon=[0.15], key=[1], rescale=rescale)
    order = ramp.argsort(dim=1)
    expected = torch.linspace(0.35, 0.65, COLUMNS, dtype=torch.float64)
    for merged in (ours, results[case]):
        kept = (merged.gather(1, order) != 0).double().mean(0)
        assert ((kept - expected).abs() < 5 * (expected * (1 - expected) / ROWS).sqrt()).all()
        factors = (merged / ramp)[merged != 0]
        torch.testing.assert_close(factors, factors.mean().expand_as(factors))
        if rescale == "l1":
            torch.testing.assert_close(merged.sum(), ramp.sum())
        else:
            assert abs(factors[0].item() - 1.0) < 1e-6


def test_what_differs_on_purpose(theirs):
    tensors, results = theirs
    # a single element: a density of 0.9 keeps it, mergekit drops it
    assert results["single"].item() == 0.0
    ours = breadcrumbs(tensors["none"], [tensors["one"]], weight=[1.0], density=[0.9], gamma=[0.01])
    assert ours.item() == 1.0
    # small task vectors are weighed by their mean squares as large ones are, not equally
    base, models = tensors["base"], [tensors[f"small{i}"] for i in range(3)]
    change, other = ((merged - base).double() for merged in (sce(base, models), results["small"]))
    assert (change - other).abs().max() > 0.1 * other.abs().max()
