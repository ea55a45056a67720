"""The merges whose quality is measured: every method as it stands, and the settings that people use."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One recipe for both tools."""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    has_base: bool = True
    two: bool = False  # of the first two experts, as the method takes no more
    ours: dict[str, Any] = field(default_factory=dict)  # parameters that mergekit lacks: then it is wtool's alone
    rounding: str = ""  # as the recipe has it, which mergekit does not: the same

    @property
    def shared(self) -> bool:
        return not self.ours and not self.rounding

    def recipe(self, base: Path, experts: Sequence[Path]) -> str:
        """In mergekit's YAML (JSON is YAML)."""
        models = [{"model": str(path)} for path in (experts[:2] if self.two else experts)]
        origin = base
        if self.method in ("nearswap", "arcee_fusion", "slerp"):  # the base is one of the two that are merged
            origin, models = experts[0], models[1:] if self.method != "slerp" else models
        content: dict[str, Any] = {"merge_method": self.method, "models": models, "dtype": "bfloat16"}
        if self.rounding:
            content["rounding"] = self.rounding
        if self.has_base:
            content["base_model"] = str(origin)
        if parameters := self.parameters | self.ours:
            content["parameters"] = parameters
        return json.dumps(content, indent=1)


ONE = {"weight": 1.0}
HALF = {"weight": 0.5}
SPARSE = {"weight": 0.5, "density": 0.5}


def on_task_vectors(method: str, *, sparse: bool = True) -> list[Case]:
    """A method at its default (all weights 1, nothing dropped), and as it is used."""
    found = [Case(f"{method}, default", method, ONE), Case(f"{method}, weight 0.5", method, HALF)]
    return [found[0], Case(f"{method}, weight 0.5, density 0.5", method, SPARSE)] if sparse else found


CASES: list[Case] = [
    Case("linear", "linear", ONE, has_base=False),
    Case("multislerp", "multislerp", ONE, has_base=False),
    Case("multislerp on the base", "multislerp", ONE),
    Case("karcher", "karcher", has_base=False),
    *on_task_vectors("task_arithmetic", sparse=False),
    *on_task_vectors("ties"),
    *on_task_vectors("dare_linear"),
    *on_task_vectors("dare_ties"),
    *on_task_vectors("breadcrumbs"),
    *on_task_vectors("breadcrumbs_ties"),
    *on_task_vectors("della"),
    *on_task_vectors("della_linear"),
    Case("ties, density 0.5, sum of 0.7", "ties", {"weight": 0.7, "density": 0.5, "normalize": False}),
    Case("task_arithmetic, weight 0.7", "task_arithmetic", {"weight": 0.7}),
    Case("sce", "sce"),
    Case("sce, select 0.5", "sce", {"select_topk": 0.5}),
    Case("ram", "ram"),
    Case("ramplus_tl", "ramplus_tl"),
    Case("model_stock", "model_stock"),
    Case("slerp, t 0.5 (two)", "slerp", {"t": 0.5}, two=True),
    Case("nuslerp (two)", "nuslerp", ONE, has_base=False, two=True),
    Case("nuslerp on the base (two)", "nuslerp", ONE, two=True),
    Case("nearswap, t 0.001 (two)", "nearswap", {"t": 0.001}, two=True),
    Case("arcee_fusion (two)", "arcee_fusion", two=True),
    *(
        Case(f"arcee_fusion, iqr_factor {factor} (two)", "arcee_fusion", two=True, ours={"iqr_factor": factor})
        for factor in (1.85, 2.2)
    ),
]
CASES += [replace(case, name=f"{case.name}, stochastic", rounding="stochastic") for case in CASES]
CASES += [Case("model_stock, nearest", "model_stock", rounding="nearest")]  # stochastic is its default
