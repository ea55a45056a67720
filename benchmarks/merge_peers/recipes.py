"""The merges that are measured: every method that wtool and mergekit share, as one file that both read."""

from pathlib import Path

HALF = "weight: 0.5"
SPARSE = "weight: 0.5, density: 0.5"
# method -> parameters of the recipe; with a base or without, by the second word
METHODS: dict[str, tuple[str, str]] = {
    "linear": (HALF, "both"),
    "slerp": ("t: 0.3", "from first"),
    "nuslerp": (HALF, "both"),
    "multislerp": (HALF, "both"),
    "karcher": ("", "both"),
    "task_arithmetic": (HALF, "on base"),
    "ties": (SPARSE, "on base"),
    "dare_linear": (SPARSE, "on base"),
    "dare_ties": (SPARSE, "on base"),
    "breadcrumbs": (SPARSE, "on base"),
    "breadcrumbs_ties": (SPARSE, "on base"),
    "della": (SPARSE, "on base"),
    "della_linear": (SPARSE, "on base"),
    "sce": ("select_topk: 0.5", "on base"),
    "ram": ("", "on base"),
    "ramplus_tl": ("", "on base"),
    "model_stock": ("", "on base"),
    "nearswap": ("t: 0.001", "from first"),
    "arcee_fusion": ("", "from first"),
    "passthrough": ("", "first"),
}


def recipe(method: str, folder: Path) -> str:
    """The recipe of a method for the models in a folder, in mergekit's YAML."""
    parameters, models = METHODS[method]
    base, first, second = (folder / name for name in ("base", "a", "b"))
    entries = [first] if models == "first" else [first, second]
    lines = [f"merge_method: {method}", *(["models:"] + [f"  - model: {entry}" for entry in entries])]
    if models in ("on base", "from first"):
        lines.append(f"base_model: {base if models == 'on base' else first}")
    if parameters:
        lines.append(f"parameters: {{{parameters}}}")
    return "\n".join([*lines, "dtype: bfloat16"]) + "\n"


def inputs(method: str) -> int:
    """How many models it reads."""
    return {"both": 2, "from first": 2, "first": 1, "on base": 3}[METHODS[method][1]]
