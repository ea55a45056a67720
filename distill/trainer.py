"""transformers' Trainer with our loss, our judgement of held-out text, and checkpoints that a stop cannot spoil.

Accumulation, clipping, optimizers, schedules, mixed precision, sharding, logging and resuming are the Trainer's.
Ours is how much a step weighs: the gradient is of the sum over all tokens of the step, in all its forwards and on all
devices, divided by their number, so it does not depend on how the step is cut up.
"""

import math
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback

from wtool.errors import RuntimeProblem

from .data import IGNORED, Collate, Numbered
from .kinds import Divergence
from .objective import Sums, Wanted, token_sums
from .on_policy import written_by_student
from .optimizers import class_and_arguments, one_cycle
from .recipe import Training
from .teacher import SILENT, Said, Teacher

WHOLE = "whole"  # a file in a checkpoint that was written to its end
JUDGED_BY = "eval_kl"


class Distiller(Trainer):
    """Trains a student; its forward must take an objective (`objective.give_objective`)."""

    def __init__(
        self,
        model: torch.nn.Module,
        arguments: TrainingArguments,
        *,
        teacher: Teacher,
        wanted: Wanted,
        judged: Divergence,
        asked: Training,
        train: Numbered,
        held_out: Numbered,
        collate: Collate,
        exact_head: bool,
        end_token: int | None = None,
    ):
        """
        judged: the divergence that held-out text is judged by
        end_token: the one that ends what a student writes
        """
        self.teacher, self.wanted, self.asked, self.end_token = teacher, wanted, asked, end_token
        self._judged = Wanted(judged, kd=1.0, ce=1.0)
        self._exact_head = exact_head
        self._parts: dict[str, Tensor] = {}  # sums since the last log
        stop = [EarlyStoppingCallback(asked.patience)] if asked.patience else []
        super().__init__(
            model,  # pyright: ignore[reportArgumentType]
            arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collate,
            callbacks=stop,  # pyright: ignore[reportArgumentType]
            optimizer_cls_and_kwargs=class_and_arguments(asked, arguments, model),
        )
        self.model_accepts_loss_kwargs = True  # the loss is that of a whole step: not to be divided again
        self.remove_callback(PrinterCallback)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of a step, and how many tokens of it are learnt on all devices."""
        batches = list(islice(epoch_iterator, num_batches))
        if self.asked.on_policy:
            batches = [self._maybe_rewritten(batch, place) for place, batch in enumerate(batches)]
        count = torch.tensor(sum(int((batch["labels"] != IGNORED).sum()) for batch in batches), device=device)
        total: Any = self.accelerator.gather(count)
        self.state.num_input_tokens_seen += int(total.sum())
        return batches, total.sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This forward's part of the step's loss."""
        sums = self._sums(model, inputs, self.wanted)
        for name in sums.keys() - {"loss"}:
            self._parts[name] = self._parts.get(name, 0) + sums[name].detach().float()
        count = torch.as_tensor((inputs["labels"] != IGNORED).sum())
        self._parts["tokens"] = self._parts.get("tokens", 0) + count
        # devices' gradients are averaged, where the step's is their sum
        return sums["loss"] * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Judge the student by the held-out windows."""
        metrics = self.held_out(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out(self, prefix: str = "eval") -> dict[str, float]:
        """Divergence from the teacher and cross-entropy, per token, of each held-out token once."""
        model: Any = self.model_wrapped
        world = self.accelerator.num_processes
        before = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        batches = self._held_out_batches()
        for begin in range(0, len(batches), world):
            place = begin + self.accelerator.process_index
            batch = self._prepare_inputs(dict(batches[min(place, len(batches) - 1)]))
            if place >= len(batches):  # all devices must run together, even where one has nothing left
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            sums = self._sums(model, batch, self._judged)
            learnt = (batch["labels"] != IGNORED).sum()
            totals += torch.stack([sums["kd"].double(), sums["ce"].double(), learnt.double()])
        model.train(before)
        kd, ce, tokens = self.accelerator.reduce(totals, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        mean = ce / max(tokens, 1)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {f"{prefix}_kl": kd / max(tokens, 1), f"{prefix}_ce": mean, f"{prefix}_perplexity": perplexity}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer does, with the parts of the loss and the tokens seen.

        raises: RuntimeProblem where the loss is not finite
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise RuntimeProblem(
                    f"step {self.state.global_step}: the loss is {logs['loss']}; take a lower learning rate, a smaller "
                    "--clip or float32"
                )
            logs |= self._mean_parts()
        if "train_runtime" not in logs:
            logs["tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer does, and one-cycle."""
        if self.asked.schedule != "one_cycle" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        taken: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = one_cycle(taken, lr=self.asked.lr, steps=num_training_steps, warmup=self.asked.warmup)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _sums(self, model: Any, inputs: Any, wanted: Wanted) -> Sums:
        said = self._said(inputs, wanted) if wanted.of_teacher else SILENT

        def objective(student: Any) -> Sums:
            return token_sums(student, inputs, said, wanted, exact_head=self._exact_head)

        return model(input_ids=inputs["input_ids"], objective=objective)

    def _said(self, inputs: Any, wanted: Wanted) -> Said:
        layer = wanted.related[1] if wanted.relations else None
        states = wanted.hidden != "none"
        return self.teacher.say(inputs, inputs["labels"] != IGNORED, all_states=states, layer=layer)

    def _held_out_batches(self) -> list[dict[str, Tensor]]:
        held_out, size = self.eval_dataset, self.args.per_device_train_batch_size
        assert isinstance(held_out, Numbered)
        numbers = range(len(held_out))
        groups = [numbers[begin : begin + size] for begin in range(0, len(held_out), size)]
        return [self.data_collator([held_out[number] for number in group]) for group in groups]

    def _maybe_rewritten(self, batch: dict[str, Tensor], place: int) -> dict[str, Tensor]:
        seed = hash((self.asked.seed, self.state.global_step, place, self.accelerator.process_index))
        model = self.accelerator.unwrap_model(self.model)
        return written_by_student(model, batch, share=self.asked.on_policy, seed=seed, end=self.end_token)

    def _mean_parts(self) -> dict[str, float]:
        names = sorted(self._parts)
        sums = torch.stack([torch.as_tensor(self._parts[name]).double().to(self.args.device) for name in names])
        found = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))  # pyright: ignore
        self._parts = {}
        tokens = max(found.pop("tokens"), 1)
        return {name: total / tokens for name, total in found.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's weights under the model's own names, which is how the Trainer loads them."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # theirs hold them
        if hasattr(self.model, "peft_config"):
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            model: Any = self.model
            save_model(model, str(folder / "model.safetensors"), {"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)  # where it is missing, the Trainer does not take it for the best
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for file in (path for path in folder.rglob("*") if path.is_file()):
                _to_disk(file)
            (folder / WHOLE).touch()
            _to_disk(folder / WHOLE)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).is_file():
            whole.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return str(max(whole)[1]) if whole else None


class Steps(TrainerCallback):
    """Tells someone of each step done."""

    def __init__(self, tell: Any):
        self._tell = tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(1)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
