"""A distillation, as asked: one frozen object, validated once."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from wtool import recipe_file
from wtool.errors import UsageError, did_you_mean
from wtool.recipe_file import parsed
from wtool.recipe_parts import one_of

from .kinds import KINDS, Divergence

# name -> what transformers calls it; its own names may be given too
OPTIMIZERS: dict[str, str] = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "lion": "lion_32bit",
    "lion-8bit": "lion_8bit",
    "muon": "muon",  # torch's, for the matrices of the layers; AdamW for the rest
}
SCHEDULES = ("cosine", "linear", "constant", "one_cycle", "reduce_lr_on_plateau")

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Data(BaseModel):
    """The text to learn from."""

    model_config = _FROZEN

    sources: tuple[str, ...] = Field(
        default=(), description="files or datasets of the Hub; none is the built-in text, or the windows of a cache"
    )
    samples: int | None = Field(default=None, ge=2, description="windows; null is as many as the training is long")
    seqlen: int = Field(default=1024, ge=2, description="tokens of a window")
    seed: int = Field(default=0, description="of the choice of windows")
    text_column: str | None = Field(
        default=None, description="key or column of the text, where it is none of the usual"
    )
    split: str = Field(default="train", description="of a dataset")
    held_out: int = Field(default=16, ge=1, description="windows that are never trained on; a fifth of all at most")
    held_out_sources: tuple[str, ...] = Field(
        default=(), description="text for them, in the place of windows of the text above"
    )
    separate: bool = Field(default=False, description="keep the documents of a window from attending to one another")
    assistant_only: bool = Field(default=False, description="of conversations, learn what the assistant says alone")


class Loss(BaseModel):
    """What the student is to make small."""

    model_config = _FROZEN

    kind: str = Field(default="forward-kl", description="divergence from the teacher", json_schema_extra=one_of(KINDS))
    temperature: float = Field(default=1.0, gt=0, description="of both distributions")
    beta: float = Field(default=0.5, ge=0, le=1, description="of jsd: 0 is forward KL, 1 reverse KL")
    alpha: float = Field(default=0.1, gt=0, lt=1, description="of the skew divergences")
    kd: float = Field(default=1.0, ge=0, description="weight of the divergence")
    ce: float = Field(default=0.0, ge=0, description="weight of the cross-entropy with the text")
    hidden: Literal["none", "mse", "cosine"] = Field(
        default="none", description="compare hidden states layer by layer too"
    )
    hidden_weight: float = Field(default=1.0, gt=0, description="weight of that")
    relations: float = Field(
        default=0.0, ge=0, description="weight of how tokens relate in the last layer's queries, keys and values"
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, name: str) -> str:
        if name not in KINDS:
            raise UsageError(f"no loss '{name}'{did_you_mean(name, KINDS)} (there are {', '.join(KINDS)})")
        return name

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.kind, self.temperature, self.beta, self.alpha)

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Loss":
        if not self.kd and not self.ce:
            raise UsageError("kd and ce are both 0, so there is nothing to learn; give one of them a weight")
        return self


class Training(BaseModel):
    """How long and how it is trained."""

    model_config = _FROZEN

    steps: int | None = Field(default=None, ge=1, description="of the optimizer")
    epochs: float | None = Field(default=None, gt=0, description="times over the text")
    tokens: int | None = Field(default=None, ge=1, description="to learn from")
    batch: int = Field(default=4, ge=1, description="windows a forward, on each device")
    accumulation: int = Field(default=1, ge=1, description="forwards a step")
    optimizer: str = Field(default="adamw", description="one of ours, or of transformers by its name")
    optimizer_arguments: dict[str, Any] = Field(default={}, description="what else the optimizer's class takes")
    schedule: str = Field(
        default="cosine", description="of the learning rate: one of ours, or of transformers by its name"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    lr: float = Field(default=1e-4, gt=0, description="the highest learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="of the matrices")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 is any")
    checkpointing: bool = Field(
        default=False, description="compute activations again in the backward instead of keeping them"
    )
    precision: Literal["float32", "mixed", "bfloat16"] | None = Field(
        default=None, description="null: float32 on CPUs, else mixed"
    )
    evaluate_every: int | None = Field(default=None, ge=1, description="steps; null is a tenth of them")
    patience: int | None = Field(default=None, ge=1, description="evaluations without a better one before it stops")
    on_policy: float = Field(
        default=0.0, ge=0, le=1, description="share of batches whose second half the student writes"
    )
    seed: int = Field(default=0, description="of the order of the text and of dropout")
    tensorboard: str | None = Field(default=None, description="folder for its event files")

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str) -> str:
        from transformers.trainer_utils import SchedulerType

        known = (*SCHEDULES, *(each.value for each in SchedulerType))
        if name not in known:
            raise UsageError(f"no schedule '{name}'{did_you_mean(name, known)} (there are {', '.join(SCHEDULES)})")
        return name

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        from transformers.training_args import OptimizerNames

        known = (*OPTIMIZERS, *(each.value for each in OptimizerNames))
        if name not in known:
            raise UsageError(f"no optimizer '{name}'{did_you_mean(name, known)} (there are {', '.join(OPTIMIZERS)})")
        return name

    @model_validator(mode="after")
    def _one_length(self) -> "Training":
        given = [key for key in ("steps", "epochs", "tokens") if getattr(self, key) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} both say how long to train; give one of them")
        return self


class Lora(BaseModel):
    """Train small factors beside the weights instead of the weights."""

    model_config = _FROZEN

    rank: int = Field(ge=1, description="of the factors")
    alpha: float | None = Field(default=None, gt=0, description="null is twice the rank")
    targets: tuple[str, ...] = Field(default=("all-linear",), description="ends of module names")
    keep_adapter: bool = Field(default=False, description="write the adapter instead of the student with it added")
    four_bit: bool = Field(default=False, description="keep the student's own weights in 4 bits meanwhile (QLoRA)")


class DistillRecipe(BaseModel):
    """A distillation, as asked."""

    model_config = _FROZEN

    teacher: str = Field(description="a checkpoint, or a folder that `wtool teacher-cache` made")
    student: str | None = Field(default=None, description="checkpoint to train")
    student_layers: int | tuple[int, ...] | None = Field(default=None, description="of the teacher: how many, or which")
    student_config: str | None = Field(default=None, description="a config.json to start from random weights")
    data: Data = Field(default=Data(), description="the text to learn from")
    loss: Loss = Field(default=Loss(), description="what the student is to make small")
    training: Training = Field(default=Training(), description="how long and how it is trained")
    lora: Lora | None = Field(default=None, description="train small factors beside the weights instead of the weights")
    teacher_4bit: bool = Field(default=False, description="keep the teacher in 4 bits")
    stream_teacher: bool = Field(default=False, description="one block of the teacher in memory at a time")

    @model_validator(mode="after")
    def _one_student(self) -> "DistillRecipe":
        ways = ("student", "student_layers", "student_config")
        given = [way for way in ways if getattr(self, way) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise UsageError(f"one student is needed, {found}: name it, or give student_layers or student_config")
        if self.student_config is not None and self.lora is not None:
            raise UsageError("a student that begins at random has nothing for LoRA to stand beside; train all of it")
        if self.teacher_4bit and self.stream_teacher:
            raise UsageError("teacher_4bit and stream_teacher: a streamed teacher is not quantized; give one of them")
        if self.data.assistant_only and (self.training.on_policy or self.loss.kind == "uld"):
            other = "on_policy" if self.training.on_policy else "loss 'uld'"
            raise UsageError(f"assistant_only and {other} both say which tokens are learnt; leave one out")
        return self


def parse_recipe(content: Any, where: str) -> DistillRecipe:
    """Validate a recipe, as YAML gives it. raises: UsageError, with the key and what would be right"""
    return parsed(DistillRecipe, content, where)


def read_recipe(path: Path) -> DistillRecipe:
    """Read a recipe file (YAML). raises: UsageError"""
    return recipe_file.read_recipe(DistillRecipe, path, "distill")
