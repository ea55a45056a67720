"""From a recipe to what will happen: teacher, student, text and steps, before any weight is read."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wtool import __version__
from wtool.calibrate import working_dtype
from wtool.calibration_data.tokens import identity
from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.console import human_bytes, human_count
from wtool.errors import Mismatch, MissingInput, UsageError
from wtool.evaluate import tokenizers_differ
from wtool.loading import load_tokenizer
from wtool.writer import MANIFEST

from .alignment import Alignment, aligned_texts
from .data import Texts, read_texts, split
from .recipe import OPTIMIZERS, DistillRecipe
from .signal_cache import Cache
from .student import PROBE, Student, check_tokenizers, depth, find_student

WINDOWS = 1024  # of text, where the recipe does not tell how long to train
# Bytes a trained parameter that an optimizer keeps beside weight and gradient, where it is not AdamW's 8
STATE_BYTES = {"adamw-8bit": 2, "adafactor": 0.1, "sgd": 4, "lion": 4, "lion-8bit": 1, "muon": 4}


@dataclass(frozen=True)
class DistillPlan:
    """What will be trained on what, and for how long."""

    recipe: DistillRecipe
    teacher: Checkpoint | None  # None where it is a cache
    cache: Cache | None
    student: Student
    texts: Texts
    steps: int
    evaluate_every: int  # steps
    precision: str  # float32, mixed, bfloat16
    device: str
    processes: int  # that train together
    alignments: Mapping[int, Alignment] | None = None  # of the windows, where teacher and student cut text otherwise

    @property
    def out_of_the_way(self) -> list[Checkpoint]:
        """Where nothing may be written."""
        return [self.student.source, *([self.teacher] if self.teacher is not None else [])]

    def fingerprint(self) -> str:
        """Tells this work from any other: recipe, inputs, text, version of the tool."""
        parts: dict[str, Any] = {
            "wtool": __version__,
            "recipe": self.recipe.model_dump(mode="json"),
            "student": [asdict(file) for file in self.student.source.identity()],
            "teacher": None if self.teacher is None else [asdict(file) for file in self.teacher.identity()],
            "cache": None if self.cache is None else dict(self.cache.about),
            "texts": self.texts.record,
            "precision": self.precision,
            "processes": self.processes,
        }
        if self.student.config is not None:
            parts["config"] = self.student.config.read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """The plan in figures."""
        training = self.recipe.training
        windows = training.batch * training.accumulation * self.processes
        mean = self.texts.tokens / len(self.texts.train)
        parameters = _parameters(self.student)
        trained = None if parameters is None else parameters * (4 + 4 + STATE_BYTES.get(training.optimizer, 8))
        return {
            "student": self.student.label,
            "student_layers": None if self.student.config else depth(self.student.source),
            "student_parameters": parameters,
            "teacher": self.recipe.teacher,
            "teacher_parameters": None if self.teacher is None else self.teacher.parameters,
            "windows": len(self.texts.train),
            "held_out_windows": len(self.texts.held_out),
            "longest_window": max(map(len, self.texts.windows)),
            "steps": self.steps,
            "tokens_a_step": round(mean * windows),
            "tokens": round(mean * windows * self.steps),
            "epochs": round(self.steps * windows / len(self.texts.train), 2),
            "precision": self.precision,
            "bytes_of_student": None if trained is None or self.recipe.lora else round(trained),
            "bytes_of_teacher": self._teacher_bytes(),
            "flops": round(mean * windows * self.steps * self._flops_per_token(parameters or 0)),
        }

    def _flops_per_token(self, parameters: int) -> int:
        """Forwards of the teacher, and forwards and backwards of the student."""
        return 6 * parameters + (0 if self.teacher is None else 2 * self.teacher.parameters)

    def _teacher_bytes(self) -> int | None:
        if self.teacher is None or self.recipe.stream_teacher:
            return None
        each = 0.56 if self.recipe.teacher_4bit else 4 if working_dtype(self.teacher, self.device) == "F32" else 2
        return round(self.teacher.parameters * each)


def plan_distillation(
    recipe: DistillRecipe, *, device: str, headers_only: bool = False, trust_remote_code: bool = False
) -> DistillPlan:
    """Open the inputs, read the text, and decide how long to train.

    device: that it will run on
    headers_only: do not download weights

    raises: InputError, UsageError
    """
    cache = _open_cache(recipe.teacher)
    teacher = None if cache else open_checkpoint(recipe.teacher, headers_only=headers_only)
    student = find_student(recipe, teacher, headers_only=headers_only)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    _check_together(recipe, teacher, cache, student, trust_remote_code)
    if cache:
        texts = _cached_texts(recipe, cache)
    else:
        wanted = _samples(recipe, processes)
        texts = read_texts(student.source, recipe.data, wanted, trust_remote_code=trust_remote_code)
    alignments = None
    if recipe.loss.kind == "uld" and teacher is not None:
        texts, alignments = _in_both_words(recipe, texts, student.source, teacher, trust_remote_code)
    steps = _steps(recipe, texts, processes)
    return DistillPlan(
        recipe=recipe,
        teacher=teacher,
        cache=cache,
        student=student,
        texts=texts,
        steps=steps,
        evaluate_every=recipe.training.evaluate_every or max(1, math.ceil(steps / 10)),
        precision=recipe.training.precision or ("float32" if device == "cpu" else "mixed"),
        device=device,
        processes=processes,
        alignments=alignments,
    )


def describe(plan: DistillPlan) -> list[str]:
    """The plan in words."""
    told = plan.summary()
    layers = f", {told['student_layers']} layers" if told["student_layers"] else ""
    size = f", {human_count(told['student_parameters'])} parameters" if told["student_parameters"] else ""
    lines = [
        f"student: {told['student']}{layers}{size}",
        f"teacher: {told['teacher']}"
        + (f", {human_count(told['teacher_parameters'])} parameters" if told["teacher_parameters"] else " (a cache)"),
        f"text: {told['windows']} windows of up to {told['longest_window']} tokens, {told['held_out_windows']} more "
        "are held out",
        f"training: {told['steps']} steps of {human_count(told['tokens_a_step'])} tokens, "
        f"{human_count(told['tokens'])} in all, {told['epochs']:g} times over the text, in {told['precision']}",
    ]
    known = [
        f"{human_bytes(told[key])} for the {who}"
        for key, who in (("bytes_of_student", "student, its gradients and optimizer"), ("bytes_of_teacher", "teacher"))
        if told[key]
    ]
    return [*lines, *([f"memory: {', '.join(known)}, and the activations of a batch"] if known else [])]


def _open_cache(reference: str) -> Cache | None:
    manifest = Path(reference) / MANIFEST
    if not manifest.is_file() or "signals" not in json.loads(manifest.read_bytes()):
        return None
    return Cache(Path(reference))


def _check_together(
    recipe: DistillRecipe,
    teacher: Checkpoint | None,
    cache: Cache | None,
    student: Student,
    trust_remote_code: bool,
) -> None:
    if cache and (recipe.loss.hidden != "none" or recipe.loss.relations):
        raise UsageError("a cache holds what the teacher said, not its hidden states; name the teacher itself")
    if cache and recipe.training.on_policy:
        raise UsageError("a cache knows nothing of what the student will write; name the teacher itself")
    if cache and cache.kind.temperature != recipe.loss.temperature:
        raise Mismatch(
            f"{recipe.teacher}: was made at temperature {cache.kind.temperature}, but {recipe.loss.temperature} is "
            "asked for; give that, or make a cache at this one"
        )
    if cache and recipe.data.separate:
        raise UsageError("a cache was made of whole windows, so documents cannot be kept apart any more")
    if cache and recipe.data.assistant_only:
        raise UsageError("a cache holds tokens, not who says them; for assistant_only name the teacher itself")
    if cache and cache.about.get("tokenizer"):
        _check_cache_tokenizer(recipe.teacher, cache, student.source, trust_remote_code)
    if teacher is not None and recipe.student is not None and recipe.loss.kind != "uld":
        check_tokenizers(teacher, student.source, trust_remote_code=trust_remote_code)


def _in_both_words(
    recipe: DistillRecipe, texts: Texts, student: Checkpoint, teacher: Checkpoint, trust_remote_code: bool
) -> tuple[Texts, Mapping[int, Alignment] | None]:
    """The text as both tokenizers cut it, where they cut it otherwise."""
    ours = load_tokenizer(student, trust_remote_code=trust_remote_code)
    theirs = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    if tokenizers_differ(ours, theirs, PROBE) is None:
        return texts, None
    unfit = {
        "stream_teacher": recipe.stream_teacher,
        "hidden": recipe.loss.hidden != "none",
        "relations": recipe.loss.relations > 0,
        "on_policy": recipe.training.on_policy > 0,
        "separate": recipe.data.separate,
        "held_out_sources": bool(recipe.data.held_out_sources),
    }
    for name in (name for name, asked in unfit.items() if asked):
        raise UsageError(f"{name} is not for a teacher with another tokenizer; leave it out")
    return aligned_texts(texts, ours, theirs, recipe.data.held_out, recipe.data.seed)


def _check_cache_tokenizer(label: str, cache: Cache, student: Checkpoint, trust_remote_code: bool) -> None:
    try:
        found = identity(load_tokenizer(student, trust_remote_code=trust_remote_code))
    except MissingInput:
        return
    if found["vocabulary_xxh3"] != cache.about["tokenizer"]["vocabulary_xxh3"]:
        raise Mismatch(f"{student.label} has another tokenizer than the teacher whose words {label} holds")


def _cached_texts(recipe: DistillRecipe, cache: Cache) -> Texts:
    if recipe.data.sources or recipe.data.held_out_sources:
        raise UsageError(f"{recipe.teacher}: a cache brings its own text; leave the data out")
    train, held_out = split(cache.windows, recipe.data.held_out, recipe.data.seed)
    if recipe.data.samples is not None:
        train = train[: recipe.data.samples]
    return Texts(tuple(cache.windows), train, held_out, {"cache": recipe.teacher, "held_out": list(held_out)})


def _samples(recipe: DistillRecipe, processes: int) -> int:
    """How many windows of text to ask for."""
    training, data = recipe.training, recipe.data
    held_out = 0 if data.held_out_sources else data.held_out
    if data.samples is not None:
        return data.samples
    if training.steps is not None:
        return training.steps * training.batch * training.accumulation * processes + held_out
    if training.tokens is not None:
        return math.ceil(training.tokens / data.seqlen) + held_out
    return WINDOWS


def _steps(recipe: DistillRecipe, texts: Texts, processes: int) -> int:
    """How many steps the optimizer does."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    windows = training.batch * training.accumulation * processes
    if training.tokens is not None:
        return max(1, math.ceil(training.tokens / (windows * texts.tokens / len(texts.train))))
    batches = math.ceil(len(texts.train) / (training.batch * processes))
    return max(1, math.ceil((training.epochs or 1.0) * math.ceil(batches / training.accumulation)))


def _parameters(student: Student) -> int | None:
    return student.source.parameters if student.config is None else None


assert set(STATE_BYTES) <= set(OPTIMIZERS)
