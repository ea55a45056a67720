"""What a peer's process reports of itself: seconds, and memory from the kernel's own account."""

import json
import sys
from pathlib import Path


def memory(field: str) -> int:
    """A line of this process's status in bytes: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def calibration_rows(path: str) -> list[list[int]]:
    """The token ids of every line."""
    return [json.loads(line)["input_ids"] for line in Path(path).read_text().splitlines()]


def stop_after_imports(after_imports: int) -> None:
    """End here when no arguments are given: what a process takes that does nothing."""
    if len(sys.argv) == 1:
        report(after_imports=after_imports)
        raise SystemExit


def report(**figures: float | str) -> None:
    """Print the last line of a peer: one JSON object."""
    print(json.dumps({**figures, "peak": memory("VmHWM")}), flush=True)
