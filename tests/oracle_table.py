"""Writes docs/merge-oracle.md: every merge method beside its definition and beside mergekit 0.1.5.

    python tests/oracle_table.py MERGEKIT_PYTHON BASE FIRST SECOND THIRD [PAGE]

MERGEKIT_PYTHON has mergekit; BASE and the others are checkpoints in bfloat16, of which one matrix is taken. Each method
merges (1) random float32 matrices, (2) that matrix of the real models, (3) what is at the limits: one element, no axis,
one column, models equal to the base, zeros, opposite models. The definitions are loops over Python's floats
(tests/merge_definitions*.py); with masks that are random, they are given ours, and mergekit's cannot be compared.
"""

import importlib
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite.arithmetic.random_mask import mask_key
from mergekit_lite.methods.table import METHODS
from wtool.random_bits import RandomBits

DEFINITIONS = [importlib.import_module(f"merge_definitions{end}") for end in ("", "_arcs", "_masks")]
MATRIX = "model.layers.3.self_attn.k_proj.weight"
ROWS = ("della", "della_linear", "model_stock", "arcee_fusion", "nuslerp")  # their definitions ask for the columns
WEIGHTS, DENSITIES = [0.3, 0.5, 0.9], [0.5, 0.25, 0.75]
ASKED: dict[str, dict[str, Any]] = {  # what has no default
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.02},
    "passthrough": {"scale": 0.7},
    "sce": {"select_topk": 0.5},
}

Numbers = dict[str, Any]
Tensors = list[Tensor]  # the base, and the models


@dataclass(frozen=True)
class Result:
    """What the two tools and the definition make of the same tensors."""

    ours: Tensor
    defined: Tensor  # float64
    theirs: Tensor | None  # None where mergekit's cannot be compared; NaN where it fails


def parameters(name: str, count: int) -> Numbers:
    """What both tools are asked for."""
    method = METHODS[name]
    found = dict(ASKED.get(name, {}))
    if "weight" in method.per_model and name != "karcher":
        found["weight"] = WEIGHTS[:count]
    if "density" in method.per_model:
        found["density"] = DENSITIES[:count]
    return found


def count_of(name: str) -> int:
    return min(METHODS[name].most or 3, 3)


def ours(name: str, tensors: Tensors) -> Tensor:
    method, (base, *models) = METHODS[name], tensors
    asked = parameters(name, len(models))
    numbers: Numbers = {"dtype": base.dtype}
    for key, parameter in (method.shared | method.per_model).items():
        if parameter.argument != "":
            each = key in method.per_model
            value = asked.get(key, [parameter.default] * len(models) if each else parameter.default)
            numbers[parameter.argument or key] = value
    if method.is_random:
        numbers["key"] = keys(models)
    if method.may_have_base or method.has_base:
        return method.function(base, models, **numbers)
    return method.function(models, **numbers)


def keys(models: Tensors) -> list[int]:
    return [mask_key(0, number, "x") for number in range(len(models))]


def defined(name: str, tensors: Tensors) -> Tensor:
    method, (base, *models) = METHODS[name], tensors
    lists = [tensor.double().reshape(-1).tolist() for tensor in tensors]
    asked = parameters(name, len(models))
    if name == "passthrough":
        return torch.tensor([asked["scale"] * x for x in lists[1]], dtype=torch.float64).reshape(base.shape)
    if name in ROWS:
        asked["columns"] = base.shape[-1] if base.dim() else 1
    called = "dare" if name.startswith("dare") else name
    definition = next(getattr(module, called) for module in DEFINITIONS if hasattr(module, called))
    if name.startswith("dare"):
        masks = [
            DEFINITIONS[0].mask(key, share, base.numel()).tolist()
            for key, share in zip(keys(models), asked["density"], strict=True)
        ]
        asked |= {"masks": masks, "rescale": "density", "elect": name == "dare_ties"}
    if name.startswith("della"):
        asked |= {"epsilon": [0.15] * len(models), "numbers": draws(models)}
    if name.startswith("breadcrumbs"):
        asked["gamma"] = [0.01] * len(models)
    asked = {("lambda_" if key == "lambda" else key): value for key, value in asked.items()}
    takes_base = method.may_have_base or method.has_base
    flat = definition(lists[0], lists[1:], **asked) if takes_base else definition(lists[1:], **asked)
    return torch.tensor(flat, dtype=torch.float64).reshape(base.shape)


def draws(models: Tensors) -> list[list[int]]:
    """The 16 random bits of each element."""
    return [RandomBits(key).take(0, model.numel()).tolist() for key, model in zip(keys(models), models, strict=True)]


def mergekit(python: str, cases: dict[str, tuple[str, Tensors]]) -> dict[str, Tensor]:
    """What mergekit makes of cases: method and tensors; a case that it fails at is left out."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tensors: dict[str, Tensor] = {}
        asked: dict[str, Any] = {}
        for case, (name, given) in cases.items():
            method = METHODS[name]
            inputs = given if method.has_base or method.may_have_base else given[1:]
            names = [f"{case}/{i}" for i in range(len(inputs))]
            tensors |= {key: tensor.clone() for key, tensor in zip(names, inputs, strict=True)}
            base = 0 if method.has_base or method.may_have_base or name == "slerp" else None
            told = parameters(name, len(given) - 1)
            asked[case] = {"method": name, "parameters": told, "inputs": names, "base": base, "may_fail": True}
        (place / "cases.json").write_text(json.dumps(asked))
        save_file(tensors, place / "tensors.safetensors")
        script = Path(__file__).with_name("peers_mergekit.py")
        arguments = [python, str(script), *(str(place / file) for file in ("cases.json", "tensors.safetensors", "out"))]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return load_file(place / "out")


def random_matrices(name: str) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(97, 61, generator=generator)
    return [base, *(base + 0.3 * torch.randn(97, 61, generator=generator) for _ in range(count_of(name)))]


def real_matrices(name: str, checkpoints: list[Path]) -> Tensors:
    found: Tensors = []
    for folder in checkpoints[: 1 + count_of(name)]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            found.append(file.get_tensor(MATRIX).clone())
    return found


def limits(name: str) -> dict[str, Tensors]:
    """Tensors at the limits, and what they are."""
    count = count_of(name)
    generator = torch.Generator().manual_seed(1)

    def near(*shape: int) -> Tensors:
        base = torch.randn(shape, generator=generator)
        return [base, *(base + 0.3 * torch.randn(shape, generator=generator) for _ in range(count))]

    base, *models = near(5, 3)
    zeros = torch.zeros(5, 3)
    return {
        "one element": near(1),
        "no axis": near(),
        "one column": near(7, 1),
        "one row": near(1, 7),
        "equal to the base": [base] * (count + 1),
        "zeros": [zeros] * (count + 1),
        "a zero base": [zeros, *models],
        "opposite models": [base, *(base + (-1) ** number * (models[0] - base) for number in range(count))],
    }


def apart(one: Tensor, other: Tensor) -> float:
    """The largest deviation, relative to the largest number."""
    size = float(other.double().abs().max()) or 1.0
    return float((one.double() - other.double()).abs().max()) / size


def rounded(one: Tensor, exact: Tensor) -> str:
    """How many numbers are not the exact one rounded once, and the largest deviation from that."""
    once = exact.to(one.dtype)
    return f"{float((one != once).double().mean()):.2%}, {figure(apart(one, once))}"


def figure(value: float) -> str:
    return "fails" if math.isnan(value) else f"{value:.1e}" if value else "0"


def main() -> None:
    python, *rest = sys.argv[1:]
    checkpoints, page = [Path(path) for path in rest[:4]], Path(rest[4] if len(rest) > 4 else "docs/merge-oracle.md")
    inputs = {
        name: {"random": random_matrices(name), "real": real_matrices(name, checkpoints), **limits(name)}
        for name in METHODS
    }
    cases = {
        f"{name}/{case}": (name, tensors)
        for name, each in inputs.items()
        if not METHODS[name].is_random
        for case, tensors in each.items()
    }
    theirs = mergekit(python, cases)
    rows: list[str] = []
    for name, each in inputs.items():
        found = {
            case: Result(
                ours(name, tensors),
                defined(name, tensors),
                None if METHODS[name].is_random else theirs.get(f"{name}/{case}", torch.tensor(math.nan)),
            )
            for case, tensors in each.items()
        }
        rows.append(row(name, found))
        print(rows[-1])
    page.write_text(PAGE.replace("ROWS", "\n".join(rows)), encoding="utf-8")


def row(name: str, found: dict[str, Result]) -> str:
    random, real = found.pop("random"), found.pop("real")
    worst = max(apart(each.ours, each.defined) for each in found.values())
    unlike = [
        f"{case} ({'fails' if each.theirs is not None and each.theirs.isnan().any() else 'another result'})"
        for case, each in found.items()
        if each.theirs is not None and not apart(each.theirs, each.defined) < 1e-5
    ]
    cells = [
        f"`{name}`",
        figure(apart(random.ours, random.defined)),
        "its masks are its own" if random.theirs is None else figure(apart(random.ours, random.theirs)),
        rounded(real.ours, real.defined),
        "–" if real.theirs is None else rounded(real.theirs, real.defined),
        figure(worst),
        "–" if random.theirs is None else ", ".join(unlike) or "none",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    ("method", "float32: from the definition", "float32: from mergekit", "bfloat16: wtool", "bfloat16: mergekit")
    + ("limits: wtool", "limits: where mergekit differs")
)  # fmt: skip
PAGE = f"""# Merge methods against their definitions

Every method on the same tensors three times: by wtool, by the definition (loops over Python's floats, in float64), and
by mergekit 0.1.5. Made by `tests/oracle_table.py` with torch {torch.__version__}.

- **float32**: random matrices of 97 × 61, weights .3, .5, .9, densities .5, .25, .75 where there are any. Largest
  deviation, relative to the largest number.
- **bfloat16**: a matrix of SmolLM2-135M and of three LoRA fine-tunes (192 × 576). The share of numbers that are not
  the exact result rounded once to bfloat16, and the largest deviation from that, relative to the largest number.
- **Limits**: one element, no axis, one column, one row, models equal to the base, zeros, a zero base, opposite models,
  in float32. wtool's largest deviation from the definition, and where mergekit's result is another one.

| {" | ".join(HEAD)} |
|{"---|" * len(HEAD)}
ROWS

mergekit computes in the inputs' type (all but `linear` and `slerp`), so its bfloat16 results are rounded many times.
What wtool's float32 makes otherwise than float64 are elements on a knife's edge: a sum of task vectors that cancels to
about nothing, whose sign is elected (`ties`, `dare_ties`, `breadcrumbs_ties`, `sce`), and equal variances at the cut
of `sce`, of which only as many are taken as asked. Where mergekit differs at the limits,
[Merging](merging.md#deliberate-differences-from-mergekit-015) says which result wtool takes, and why.
"""

if __name__ == "__main__":
    main()
