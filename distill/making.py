"""The parts of a training, made from a plan: student, teacher, loss, trainer."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from wtool.calibrate import working_dtype as walking_dtype
from wtool.console import warn
from wtool.errors import Mismatch, UsageError
from wtool.loading import load_model, load_tokenizer, working_dtype

from .alignment import places_mask
from .body import is_head_right, keeps_documents_apart
from .data import Collate, Numbered, spoken_mask
from .kinds import Divergence
from .objective import Wanted, give_objective, give_projectors, layer_map
from .planner import DistillPlan
from .relations import layer_pair, projections
from .settings import training_arguments
from .student import depth, load_4bit, load_student, with_lora
from .teacher import CachedTeacher, OnlineTeacher, StreamedTeacher, Teacher, TranslatedTeacher
from .trainer import Distiller


def make_trainer(plan: DistillPlan, folder: Path, *, resuming: bool, trust_remote_code: bool = False) -> Distiller:
    """All that a training needs, ready to begin.

    folder: for checkpoints
    resuming: whether it will go on from one

    raises: WtoolError
    """
    recipe = plan.recipe
    torch.manual_seed(recipe.training.seed)
    student = _student(plan, trust_remote_code)
    teacher = make_teacher(plan, trust_remote_code)
    _check_vocabulary(plan, student)
    wanted = _wanted(plan, student, teacher)
    give_objective(student)
    give_projectors(student, *_widths(student, teacher), wanted, recipe.training.seed)
    model = student if recipe.lora is None else with_lora(student, recipe.lora)
    exact = is_head_right(student)
    if not exact:
        warn(f"{plan.student.label}: its logits are more than a matrix times its hidden states; they are made whole")
    if recipe.training.checkpointing:  # transformers is renaming it
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    known, spoken = plan.alignments, plan.texts.spoken
    separator = _end(plan, trust_remote_code) if recipe.data.separate else None
    if recipe.data.separate:
        _check_separate(plan, separator, student, teacher)
    learnt = None if known is None else functools.partial(places_mask, known)
    learnt = learnt if spoken is None else functools.partial(spoken_mask, spoken)
    return Distiller(
        model,
        training_arguments(plan, folder, resuming=resuming),
        teacher=teacher,
        wanted=wanted,
        judged=_judged(plan),
        asked=recipe.training,
        train=Numbered(plan.texts.windows, plan.texts.train),
        held_out=Numbered(plan.texts.windows, plan.texts.held_out),
        collate=Collate(separator, learnt),
        exact_head=exact,
        end_token=_end(plan, trust_remote_code) if recipe.training.on_policy else None,
    )


def _student(plan: DistillPlan, trust_remote_code: bool) -> PreTrainedModel:
    lora = plan.recipe.lora
    full = "BF16" if plan.precision == "bfloat16" else "F32"
    dtype = full if lora is None else working_dtype(plan.student.source, plan.device)
    return load_student(
        plan.student,
        dtype=dtype,
        device=_device(plan),
        seed=plan.recipe.training.seed,
        four_bit=lora is not None and lora.four_bit,
        trust_remote_code=trust_remote_code,
    )


def make_teacher(plan: DistillPlan, trust_remote_code: bool = False) -> Teacher:
    """The teacher that a plan asks for, where it asks for it."""
    device = _device(plan)
    if plan.cache is not None:
        return CachedTeacher(plan.cache, device)
    assert plan.teacher is not None
    dtype = walking_dtype(plan.teacher, device)
    if plan.recipe.stream_teacher:
        return StreamedTeacher(plan.teacher, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if plan.recipe.teacher_4bit:
        model = load_4bit(plan.teacher, device)
    else:
        model = load_model(plan.teacher, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    teacher = OnlineTeacher(model)
    return teacher if plan.alignments is None else TranslatedTeacher(teacher, plan.alignments)


def _wanted(plan: DistillPlan, student: PreTrainedModel, teacher: Teacher) -> Wanted:
    loss = plan.recipe.loss
    layers: tuple[tuple[int, int], ...] = ()
    if loss.hidden != "none":
        assert plan.teacher is not None
        ours = student.config.get_text_config().num_hidden_layers
        layers = layer_map(ours, depth(plan.teacher), plan.student.layers)
    wanted = Wanted(loss.divergence, loss.kd, loss.ce, loss.hidden, loss.hidden_weight, layers)
    return _with_relations(wanted, plan, student, teacher) if loss.relations else wanted


def _with_relations(wanted: Wanted, plan: DistillPlan, student: PreTrainedModel, teacher: Teacher) -> Wanted:
    assert plan.teacher is not None
    config = student.config.get_text_config()
    pair = layer_pair(config.num_hidden_layers, depth(plan.teacher), plan.student.layers)
    for model, layer in zip((student, _model_of(teacher)), pair, strict=True):
        projections(model, layer)
    heads = config.num_attention_heads
    return replace(wanted, relations=plan.recipe.loss.relations, related=pair, relation_heads=heads)


def _judged(plan: DistillPlan) -> Divergence:
    """Held-out text is judged by the forward KL whatever is trained on, so that losses can be compared."""
    loss = plan.recipe.loss
    if loss.kind == "uld":
        return Divergence("uld")
    return Divergence(temperature=loss.temperature if plan.cache else 1.0)


def _widths(student: PreTrainedModel, teacher: Teacher) -> tuple[int, int]:
    ours = student.config.get_text_config().hidden_size
    if isinstance(teacher, OnlineTeacher | StreamedTeacher):
        return ours, _model_of(teacher).config.get_text_config().hidden_size
    return ours, ours


def _model_of(teacher: Teacher) -> PreTrainedModel:
    assert isinstance(teacher, OnlineTeacher | StreamedTeacher), "a cache has no model"
    return teacher.model if isinstance(teacher, OnlineTeacher) else teacher.network.model


def _end(plan: DistillPlan, trust_remote_code: bool) -> int | None:
    found = load_tokenizer(plan.student.source, trust_remote_code=trust_remote_code).eos_token_id
    return found if isinstance(found, int) else None


def _check_separate(plan: DistillPlan, end: int | None, student: PreTrainedModel, teacher: Teacher) -> None:
    if end is None:
        raise UsageError(f"{plan.student.label}: its tokenizer has no end of text, so documents cannot be kept apart")
    for model in (student, *([teacher.model] if isinstance(teacher, OnlineTeacher) else [])):
        if not keeps_documents_apart(model):
            raise UsageError(
                f"a {type(model).__name__} does not keep documents apart by positions; leave --separate out"
            )


def _check_vocabulary(plan: DistillPlan, student: PreTrainedModel) -> None:
    rows = len(student.get_input_embeddings().weight)  # pyright: ignore
    largest = max(int(window.max()) for window in plan.texts.windows)
    if largest >= rows:
        raise Mismatch(f"the text has token {largest}, but the vocabulary of {plan.student.label} has {rows}")


def _device(plan: DistillPlan) -> str:
    return plan.device if plan.device == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
