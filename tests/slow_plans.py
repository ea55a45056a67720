"""A merge that takes its time, so that a test can come between: each step waits before it computes."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

from mergekit_lite.planner import plan_merge
from mergekit_lite.recipe import parse_recipe
from wtool.plan import Plan


def plan(folders: tuple[str, ...], max_shard_bytes: int, seconds: float) -> Plan:
    """The plan of a linear merge; it has the fingerprint of one that does not wait."""
    content = {"merge_method": "linear", "models": [{"model": folder} for folder in folders]}
    made = plan_merge(parse_recipe({**content, "parameters": {"weight": 0.5}}, "test"), max_shard_bytes=max_shard_bytes)
    slow = [replace(step, function=partial(_slow, function=step.function, seconds=seconds)) for step in made.steps]
    return replace(made, steps=tuple(slow))


def _slow(*inputs: Any, function: Any, seconds: float) -> Any:
    time.sleep(seconds)
    return function(*inputs)
