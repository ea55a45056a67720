"""What the Trainer is told, from a plan."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from wtool.errors import RuntimeProblem

from .planner import DistillPlan
from .recipe import OPTIMIZERS, Training
from .trainer import JUDGED_BY

LOGS = 100  # lines in the record of a training, about
KEPT = 2  # checkpoints: the best and the last


def training_arguments(plan: DistillPlan, folder: Path, *, resuming: bool) -> TrainingArguments:
    """The Trainer's settings.

    folder: for its checkpoints; absolute, as they are found again by it

    raises: RuntimeProblem where TensorBoard is asked for and is not installed
    """
    asked = plan.recipe.training
    optimizer = OPTIMIZERS.get(asked.optimizer, asked.optimizer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=asked.batch,
        gradient_accumulation_steps=asked.accumulation,
        average_tokens_across_devices=True,
        learning_rate=asked.lr,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.clip,
        optim="adamw_torch" if optimizer == "muon" else optimizer,
        **_schedule(asked, plan.steps),
        bf16=plan.precision == "mixed" and plan.device != "cpu",  # there the products alone are rounded
        eval_strategy="steps",
        eval_steps=plan.evaluate_every,
        eval_on_start=not resuming,
        save_strategy="steps",
        save_steps=plan.evaluate_every,
        save_total_limit=KEPT,
        load_best_model_at_end=True,
        metric_for_best_model=JUDGED_BY,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        logging_steps=_logging_steps(plan),
        logging_nan_inf_filter=False,  # a loss that is not finite ends the training instead
        seed=asked.seed,
        data_seed=asked.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=_reports(asked),
        use_cpu=plan.device == "cpu",
    )
    if arguments.n_gpu > 1:  # threads over several GPUs, which nobody asked for: `accelerate launch` uses them all
        arguments._n_gpu = 1
    return arguments


def _schedule(asked: Training, steps: int) -> dict[str, Any]:
    warmup = round(asked.warmup * steps)
    if asked.schedule == "one_cycle":
        return {"lr_scheduler_type": "constant"}  # the Distiller makes its own
    name = "constant_with_warmup" if asked.schedule == "constant" and warmup else asked.schedule
    return {"lr_scheduler_type": name, "warmup_steps": warmup}


def _logging_steps(plan: DistillPlan) -> int:
    """A divisor of the steps between checkpoints, so that no logged mean is cut by a stop."""
    wanted = max(1, plan.steps // LOGS)
    return max(each for each in range(1, min(wanted, plan.evaluate_every) + 1) if plan.evaluate_every % each == 0)


def _reports(asked: Training) -> list[str]:
    if asked.tensorboard is None:
        return ["none"]
    if not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise RuntimeProblem("TensorBoard is not installed (pip install tensorboard)")
    os.environ["TENSORBOARD_LOGGING_DIR"] = asked.tensorboard  # where transformers looks for it
    return ["tensorboard"]
