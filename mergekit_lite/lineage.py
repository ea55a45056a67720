"""What models say of their origin: the base that a model card names."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from wtool.checkpoint import Checkpoint
from wtool.checkpoint.resolve import is_hub_id


def common_base(models: Sequence[Checkpoint]) -> str | None:
    """The one base that the cards of all models name, if it can be found; else None."""
    named = {_named_base(model) for model in models}
    return named.pop() if len(named) == 1 else None


def _named_base(model: Checkpoint) -> str | None:
    """The card's `base_model`: a folder beside the model's, or a Hub id."""
    if "README.md" not in model.files:
        return None
    parts = model.files["README.md"].read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    name = head.get("base_model") if isinstance(head, dict) else None
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if not isinstance(name, str):
        return None
    beside = Path(model.label.split("+")[0]).parent / name
    if beside.is_dir():
        return str(beside)
    return name if is_hub_id(name) else None
