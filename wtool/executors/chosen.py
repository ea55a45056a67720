"""Running a plan where the user wants it."""

from collections.abc import Callable
from pathlib import Path

from wtool.errors import UsageError
from wtool.executors.local import Outcome, Progress
from wtool.plan import Plan


def check(executor: str, plan: Plan) -> None:
    """Refuse a place where a plan cannot be carried out.

    raises: UsageError
    """
    if executor == "local":
        return
    from wtool.executors.cluster import address_of

    address_of(executor)
    if any(step.function is None for step in plan.steps):
        raise UsageError(
            f"--executor {executor}: a walk through the model cannot be split by output files; start it with torchrun "
            "to spread it over processes, or gather statistics first (wtool calibrate, then --stats)"
        )


def run(
    executor: str,
    make: Callable[[], Plan],
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    memory: int | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda nbytes: None,
) -> Outcome:
    """Carry out a plan without a walk, or go on with one that was stopped.

    executor: local, ray, or ray:HOST:PORT
    make: makes the plan anew on another machine; a partial of a function that a module has
    workers: threads, on a cluster of each task
    memory: bytes that the steps in flight may hold together on this machine; None for no bound but the workers

    raises: WtoolError; what was done is kept and continued by the same call
    """
    check(executor, plan)
    if executor == "local":
        from wtool.executors import local

        return local.run(
            plan,
            out,
            workers=workers,
            memory=memory,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if memory is not None:
        raise UsageError(f"--memory is for --executor local; tasks on {executor} are placed by what their steps take")
    from wtool.executors import ray
    from wtool.executors.cluster import address_of

    return ray.run(
        make,
        plan,
        out,
        address=address_of(executor),
        workers=workers,
        force=force,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )
