"""Carrying out a plan: train, or go on with it, and let the student appear when it is whole.

While it trains, checkpoints are in the hidden folder beside the output. After a stop the same command goes on from the
last of them that is whole, and ends with the weights that an undisturbed run gives (on one device, to the bit).
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from wtool.errors import UsageError
from wtool.loading import quiet
from wtool.products import in_bfloat16
from wtool.writer import Writer, is_complete, work_folder

from .export import gathered, save_trained, write_student
from .making import make_trainer
from .planner import DistillPlan
from .trainer import Distiller, Steps, last_checkpoint

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """How a distillation ended."""

    out: Path
    already_there: bool = False  # the same work had been completed before; nothing was done
    resumed_steps: int = 0  # done by an earlier run that was stopped
    seconds: float = 0.0  # of training and evaluating, in this run
    tokens: int = 0  # learnt in this run


def run_distillation(
    plan: DistillPlan,
    out: Path,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda steps: None,
) -> Outcome:
    """Train a student, or go on with one whose training was stopped.

    force: replace an output that is there, discard unfinished work of another recipe
    progress: is told the steps done

    raises: WtoolError; what was done is kept and continued by the same call
    """
    out = out.resolve()
    _check_place(plan, out)
    if out.exists() and not force and is_complete(out, plan.fingerprint()):
        return Outcome(out, already_there=True)
    main = int(os.environ.get("RANK", "0")) == 0
    folder = work_folder(out) / "training"
    with ExitStack() as stack:
        stack.enter_context(_own_accelerator())
        if plan.device == "cpu" and plan.precision != "float32":
            stack.enter_context(in_bfloat16())
        if main:
            stack.enter_context(_place(plan, out, folder, force))
        else:
            _wait_for(folder / "fingerprint", plan.fingerprint())
        trainer, outcome = _train(plan, out, folder, trust_remote_code, progress)
        state = gathered(trainer.model) if trainer.is_fsdp_enabled else None
        trainer.accelerator.wait_for_everyone()
        if main:
            save_trained(trainer.accelerator.unwrap_model(trainer.model), folder / "trained", state)
    if main:
        write_student(plan, folder / "trained", out, figures(trainer.state), force=force)
    return outcome


def figures(state: TrainerState) -> dict[str, Any]:
    """What a training was like, step by step, for the manifest; no times, so that equal runs tell the same."""
    training: dict[int, dict[str, float]] = {}
    evaluation: dict[int, dict[str, float]] = {}
    for entry in state.log_history:
        step = int(entry["step"])
        if "loss" in entry:
            training[step] = {key: entry[key] for key in sorted(entry) if key != "epoch"}
        elif "eval_kl" in entry:
            told = {key.removeprefix("eval_"): entry[key] for key in sorted(entry) if key.startswith("eval_")}
            evaluation[step] = {**told, "step": step, "tokens": entry["tokens"]}
    return {
        "training": list(training.values()),
        "evaluation": list(evaluation.values()),
        "best_step": state.best_global_step,
    }


def _train(
    plan: DistillPlan, out: Path, folder: Path, trust_remote_code: bool, progress: Progress
) -> tuple[Distiller, Outcome]:
    """Train to the end; the trainer then holds the best student."""
    last = last_checkpoint(folder) if int(os.environ.get("RANK", "0")) == 0 else _last_seen(folder)
    trainer = make_trainer(plan, folder, resuming=last is not None, trust_remote_code=trust_remote_code)
    trainer.add_callback(Steps(progress))
    before = TrainerState.load_from_json(f"{last}/trainer_state.json") if last else TrainerState()
    begin = time.perf_counter()
    with quiet():
        if last and _is_over(before, plan.steps):
            trainer.state = before
            trainer._load_best_model()
        else:
            trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - begin
    tokens = trainer.state.num_input_tokens_seen - before.num_input_tokens_seen
    return trainer, Outcome(out, resumed_steps=before.global_step, seconds=seconds, tokens=tokens)


def _is_over(state: TrainerState, steps: int) -> bool:
    control: Mapping[str, Any] = state.stateful_callbacks.get("TrainerControl", {})  # pyright: ignore
    stopped = control.get("args", {}).get("should_training_stop", False)
    return state.global_step >= steps or bool(stopped)


def _check_place(plan: DistillPlan, out: Path) -> None:
    for source in plan.out_of_the_way:
        for folder in source.folders():
            if out.is_relative_to(folder) or folder.is_relative_to(out):
                raise UsageError(f"{out}: is the input {source.label}, or holds it, or is in it; take another folder")


@contextmanager
def _place(plan: DistillPlan, out: Path, folder: Path, force: bool) -> Iterator[None]:
    """Hold the place of the output while training; discard what is there of another recipe, where that is asked."""
    fingerprint = plan.fingerprint()
    with Writer(out, [], fingerprint, force=force):
        mark = folder / "fingerprint"
        if not mark.is_file() or mark.read_text() != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(fingerprint)
        yield


def _wait_for(mark: Path, fingerprint: str, seconds: float = 600.0) -> None:
    """On other processes than the first: wait until that has the place."""
    end = time.monotonic() + seconds
    while not mark.is_file() or mark.read_text() != fingerprint:
        if time.monotonic() > end:
            raise UsageError(f"{mark.parent}: the first process has not begun within {seconds:.0f} s")
        time.sleep(0.05)


def _last_seen(folder: Path) -> str | None:
    whole = [path.parent for path in folder.glob("checkpoint-*/whole")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


@contextmanager
def _own_accelerator() -> Iterator[None]:
    """Let a next training in this process have other settings: accelerate keeps them for all."""
    from accelerate.state import AcceleratorState, GradientState

    try:
        yield
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
