"""The table of merge methods: a row each, with the numbers it takes. The arithmetic is in a file each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from wtool.errors import UsageError
from wtool.pieces import InPieces

from .arcee_fusion import arcee_fusion
from .breadcrumbs import breadcrumbs, breadcrumbs_ties
from .dare import dare_linear, dare_ties
from .della import della, della_linear
from .karcher import karcher
from .linear import linear
from .model_stock import model_stock
from .multislerp import multislerp
from .nearswap import nearswap
from .nuslerp import nuslerp
from .passthrough import passthrough
from .ram import ram, ramplus_tl
from .sce import sce
from .slerp import slerp
from .task_arithmetic import task_arithmetic
from .ties import ties

REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One number (or switch) of a method."""

    default: Any = REQUIRED
    low: float | None = None
    high: float | None = None
    choices: Mapping[Any, Any] | None = None  # spelling -> value, for parameters that are not numbers
    argument: str | None = None  # the function's name for it, where that differs
    whole: bool = False  # an integer

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    def check(self, value: Any, what: str) -> Any:
        """Turn a user's value into the function's; raises UsageError."""
        if self.choices is not None:
            if not isinstance(value, (bool, str)) or value not in self.choices:
                raise UsageError(f"{what} is {value!r}; it must be one of {', '.join(map(str, self.choices))}")
            return self.choices[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise UsageError(f"{what} is {value!r}; it must be a number")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise UsageError(f"{what} is {value}; it must be {self._range}")
        if self.whole and value != int(value):
            raise UsageError(f"{what} is {value}; it must be a whole number")
        return int(value) if self.whole else float(value)

    @property
    def _range(self) -> str:
        if self.high is None:
            return f"{self.low} or more"
        return f"between {self.low} and {self.high}" if self.low is not None else f"{self.high} or less"


SWITCH = {True: True, False: False}
WEIGHT = Parameter(default=1.0)
DENSITY = Parameter(default=1.0, low=0.0, high=1.0)
LAMBDA = Parameter(default=1.0, argument="lambda_")
VECTORS = Parameter(default=None, choices={"tensor": "tensor", "rows": "rows", "columns": "columns"})  # None: flags
IGNORED = Parameter(default=False, choices=SWITCH, argument="")  # mergekit's, without effect on results
DARE_RESCALE = Parameter(
    default="density",
    choices={True: "density", "density": "density", "l1": "l1", False: "none", "none": "none"},
)
L1_RESCALE = Parameter(default=False, choices={**SWITCH, "l1": True, "none": False})
GAMMA = Parameter(default=0.01, low=0.0, high=1.0)
SPREAD = Parameter(default=0.15, low=0.0, high=1.0)
LEAST_CHANGE = Parameter(default=1e-5, low=0.0)
THINNED = {"weight": WEIGHT, "density": DENSITY}
DROPPED = {"rescale": DARE_RESCALE, "lambda": LAMBDA, "int8_mask": IGNORED}
MASKED = {"rescale": L1_RESCALE, "lambda": LAMBDA, "int8_mask": IGNORED}


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    function: InPieces[...]
    summary: str
    has_base: bool = False  # takes (base, models, …), and needs a base; else (models, …)
    may_have_base: bool = False  # takes (base or None, models, …): with a base it merges task vectors, else weights
    least: int = 1  # models, the base not counted where the method takes one
    most: int | None = None
    per_model: Mapping[str, Parameter] = field(default_factory=dict)
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    is_random: bool = False
    rounding: str = "nearest"  # to 16 bits, where the recipe does not say

    @property
    def parameters(self) -> set[str]:
        return {*self.per_model, *self.shared}


def _normalize(default: bool) -> Parameter:
    return Parameter(default=default, choices=SWITCH)


METHODS: dict[str, Method] = {
    "linear": Method(
        linear,
        "weighted mean (a soup)",
        per_model={"weight": WEIGHT},
        shared={"normalize": _normalize(True)},
    ),
    "slerp": Method(
        slerp,
        "between two models along the arc",
        least=2,
        most=2,
        shared={"t": Parameter()},
    ),
    "nuslerp": Method(
        nuslerp,
        "between two models or task vectors along the arc, with a weight each",
        may_have_base=True,
        least=2,
        most=2,
        per_model={"weight": WEIGHT},
        shared={
            "vectors": VECTORS,
            "nuslerp_flatten": Parameter(default=True, choices=SWITCH),
            "nuslerp_row_wise": Parameter(default=False, choices=SWITCH),
        },
    ),
    "multislerp": Method(
        multislerp,
        "mean of directions and of lengths",
        may_have_base=True,
        per_model={"weight": WEIGHT},
        shared={"normalize_weights": _normalize(True), "eps": Parameter(default=1e-8, low=0.0)},
    ),
    "karcher": Method(
        karcher,
        "mean on the sphere",
        per_model={"weight": Parameter(default=1.0, low=0.0)},
        shared={
            "max_iter": Parameter(default=10, low=0, whole=True),
            "tol": Parameter(default=1e-5, low=0.0),
        },
    ),
    "model_stock": Method(
        model_stock,
        "towards the mean as far as the models' angle tells",
        has_base=True,
        least=2,
        shared={
            "filter_wise": Parameter(default=False, choices=SWITCH),
            "clamp": Parameter(default=True, choices=SWITCH),
        },
        rounding="stochastic",  # most of its steps are less than half of one of bfloat16's
    ),
    "nearswap": Method(
        nearswap,
        "towards the other model by t at most",
        has_base=True,
        most=1,
        shared={"t": Parameter(low=0.0)},
    ),
    "arcee_fusion": Method(
        arcee_fusion,
        "what changed much in rows that changed shape",
        has_base=True,
        most=1,
        shared={"iqr_factor": Parameter(default=1.5, low=0.0)},
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        "base plus weighted task vectors",
        has_base=True,
        per_model={"weight": WEIGHT},
        shared={"normalize": _normalize(False), "lambda": LAMBDA, "int8_mask": IGNORED},
    ),
    "ties": Method(
        ties,
        "trim, elect signs, average what agrees",
        has_base=True,
        per_model=THINNED,
        shared={
            "normalize": _normalize(True),
            "rescale": Parameter(default=False, choices=SWITCH),
            "lambda": LAMBDA,
            "int8_mask": IGNORED,
        },
    ),
    "dare_linear": Method(
        dare_linear,
        "drop at random, rescale, sum",
        has_base=True,
        per_model=THINNED,
        shared={"normalize": _normalize(False), **DROPPED},
        is_random=True,
    ),
    "dare_ties": Method(
        dare_ties,
        "drop at random, rescale, elect signs, sum",
        has_base=True,
        per_model=THINNED,
        shared={"normalize": _normalize(False), **DROPPED},
        is_random=True,
    ),
    "breadcrumbs": Method(
        breadcrumbs,
        "drop smallest and largest, sum",
        has_base=True,
        per_model={**THINNED, "gamma": GAMMA},
        shared={"normalize": _normalize(False), **MASKED},
    ),
    "breadcrumbs_ties": Method(
        breadcrumbs_ties,
        "drop smallest and largest, elect signs, sum",
        has_base=True,
        per_model={**THINNED, "gamma": GAMMA},
        shared={"normalize": _normalize(False), **MASKED},
    ),
    "della": Method(
        della,
        "drop at random by rank, rescale, elect signs, average",
        has_base=True,
        per_model={**THINNED, "epsilon": SPREAD},
        shared={"normalize": _normalize(True), **DROPPED},
        is_random=True,
    ),
    "della_linear": Method(
        della_linear,
        "drop at random by rank, rescale, sum",
        has_base=True,
        per_model={**THINNED, "epsilon": SPREAD},
        shared={"normalize": _normalize(False), **DROPPED},
        is_random=True,
    ),
    "sce": Method(
        sce,
        "where models differ most, weighed by how far they moved",
        has_base=True,
        shared={"select_topk": Parameter(default=1.0, low=0.0, high=1.0), "int8_mask": IGNORED},
    ),
    "ram": Method(
        ram,
        "add what is unique, average what is shared",
        has_base=True,
        shared={"epsilon": LEAST_CHANGE},
    ),
    "ramplus_tl": Method(
        ramplus_tl,
        "the same, with what is unique scaled up",
        has_base=True,
        shared={
            "r": Parameter(default=0.1),
            "alpha": Parameter(default=0.2, low=0.0),
            "epsilon": LEAST_CHANGE,
        },
    ),
    "passthrough": Method(
        passthrough,
        "one model as it is, or scaled",
        most=1,
        shared={"scale": Parameter(default=1.0)},
    ),
}
