"""The student: given, made of some of the teacher's layers, or random from a configuration."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wtool.checkpoint import Checkpoint, open_checkpoint
from wtool.checkpoint.folder import Folder
from wtool.dtypes import torch_dtype
from wtool.errors import Mismatch, MissingInput, RuntimeProblem, UsageError
from wtool.evaluate import tokenizers_differ
from wtool.loading import explained, load_model, load_tokenizer, quiet

from .recipe import DistillRecipe, Lora

PROBE = "Distilled: it's 2 to the 10th, naïve 蒸留 — \n\tdef f(x): return x[1:]  # ok"  # tokenizers are tried on it
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")  # how families name it in config.json


@dataclass(frozen=True)
class Student:
    """Where a student begins."""

    label: str
    source: Checkpoint  # its weights; where it begins at random, the teacher, for the tokenizer beside them
    layers: tuple[int, ...] | None = None  # of the teacher, where it is made of them
    config: Path | None = None  # where it begins at random


def find_student(recipe: DistillRecipe, teacher: Checkpoint | None, *, headers_only: bool = False) -> Student:
    """Open the student that a recipe asks for.

    teacher: None where only what it said is there
    headers_only: do not download weights

    raises: InputError, UsageError
    """
    if recipe.student is not None:
        source = open_checkpoint(recipe.student, headers_only=headers_only)
        return Student(source.label, source)
    if teacher is None:
        raise UsageError(f"{recipe.teacher}: holds what a teacher said, not its layers; name the student's checkpoint")
    if recipe.student_config is not None:
        path = Path(recipe.student_config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingInput(f"{recipe.student_config}: no such config.json")
        return Student(str(path), teacher, config=path)
    from wtool.layer_stack import keep_layers

    layers = chosen_layers(recipe.student_layers, depth(teacher))
    source = keep_layers(teacher, layers)
    return Student(f"{teacher.label}, layers {','.join(map(str, layers))}", source, layers)


def depth(checkpoint: Checkpoint) -> int:
    """How many layers a model has.

    raises: MissingInput
    """
    nested = checkpoint.config.get("text_config")
    config = nested if isinstance(nested, dict) else checkpoint.config
    found = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), None)
    if found is None:
        raise MissingInput(f"{checkpoint.label}: config.json does not tell how many layers there are ({DEPTHS[0]})")
    return found


def chosen_layers(asked: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Which of `count` layers to keep: those named, or a number of them evenly spaced with the first and the last.

    raises: UsageError
    """
    assert asked is not None
    if not isinstance(asked, int):
        wrong = next((layer for layer in asked if not 0 <= layer < count), None)
        if wrong is not None or not asked:
            raise UsageError(f"student layers {','.join(map(str, asked))}: the teacher has layers 0 to {count - 1}")
        return tuple(asked)
    if not 1 <= asked <= count:
        raise UsageError(f"{asked} student layers: the teacher has {count}")
    if asked == 1:
        return (0,)
    return tuple((2 * place * (count - 1) + asked - 1) // (2 * (asked - 1)) for place in range(asked))


def load_student(
    student: Student, *, dtype: str, device: str, seed: int = 0, four_bit: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the student, ready to train: weights of its own memory, nothing dropped at random.

    dtype: safetensors name of the type its weights are trained in
    seed: of random weights

    raises: InputError, UsageError, RuntimeProblem
    """
    if student.config is not None:
        model = _random(student, dtype, seed, trust_remote_code).to(device)  # pyright: ignore[reportArgumentType]
    elif four_bit:
        model = load_4bit(student.source, device)
    else:
        model = load_model(student.source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # it may be a view of a mapped file
    nothing_at_random(model)
    return model


def _random(student: Student, dtype: str, seed: int, trust_remote_code: bool) -> PreTrainedModel:
    assert student.config is not None
    with explained(student.label, "build the model"), quiet(), torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(**json.loads(student.config.read_text(encoding="utf-8")))
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), trust_remote_code=trust_remote_code)
    return made


def load_4bit(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    """Build a model with its linear layers in 4 bits (NF4), by bitsandbytes.

    raises: RuntimeProblem where it is not installed, UsageError for what is not a folder of plain weights
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise RuntimeProblem("4 bits need bitsandbytes, which is not installed (pip install bitsandbytes)")
    if not isinstance(checkpoint, Folder) or not checkpoint.place.is_dir():
        raise UsageError(f"{checkpoint.label}: 4 bits are for a folder of plain weights; write it to one first")
    compute = torch.bfloat16 if device != "cpu" else torch.float32
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    with explained(checkpoint.label, "load the model in 4 bits"), quiet():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.place, quantization_config=asked, dtype=compute, device_map={"": device}
        )
    packs: Any = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in packs:  # for the processor: of rows by the 32 alone, and for good
        module.support_avx512bf16_for_cpu = False
    return model


def nothing_at_random(model: PreTrainedModel) -> None:
    """Switch off whatever a model drops or shakes at random in training."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def with_lora(model: PreTrainedModel, asked: Lora) -> "torch.nn.Module":
    """The student with small factors beside its matrices, which alone are trained.

    raises: RuntimeProblem where peft is not installed, UsageError for targets that are not there
    """
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise RuntimeProblem("LoRA needs peft, which is not installed (pip install peft)")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    targets = "all-linear" if asked.targets == ("all-linear",) else list(asked.targets)
    config = LoraConfig(
        r=asked.rank,
        lora_alpha=2 * asked.rank if asked.alpha is None else asked.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with quiet():
            if asked.four_bit:
                model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"LoRA targets {', '.join(asked.targets)}: {str(error).splitlines()[0]}") from None


def check_tokenizers(teacher: Checkpoint, student: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Refuse two models that do not mean the same by a token's number. Rows that pad a vocabulary are no difference.

    raises: Mismatch
    """
    ours = _tokenizer(student, trust_remote_code)
    theirs = _tokenizer(teacher, trust_remote_code)
    if ours is None or theirs is None:
        return
    found = tokenizers_differ(ours, theirs, PROBE)
    if found:
        raise Mismatch(
            f"{student.label} and {teacher.label} have different tokenizers: {found}; --loss uld compares such models"
        )


def _tokenizer(checkpoint: Checkpoint, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    except MissingInput:
        return None
