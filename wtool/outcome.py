"""What is told at the end of a run, alike in every verb: as figures for scripts, and in words."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.console import human_bytes

if TYPE_CHECKING:
    from wtool.executors.local import Outcome


def outcome_record(
    output: Path, outcome: "Outcome", seconds: float, warnings: Sequence[str], **rest: Any
) -> dict[str, Any]:
    """The result for --json.

    rest: what only this verb tells
    """
    return {
        "output": str(output),
        "already_there": outcome.already_there,
        "resumed_bytes": outcome.resumed_bytes,
        **rest,
        "seconds": round(seconds, 3),
        "warnings": list(warnings),
    }


def there_already(output: Path) -> str:
    """What is told of an output that needed no work."""
    return f"{output}: there already, made by this recipe from these inputs; nothing to do (--force makes it anew)"


def resumed(outcome: "Outcome") -> str:
    """The end of a sentence on what was made; empty where no run before left anything."""
    return f", {human_bytes(outcome.resumed_bytes)} of it from the run before" if outcome.resumed_bytes else ""
