"""A checkpoint of any source as a transformers model and tokenizer.

transformers builds the model from the checkpoint's config.json and is handed the weights as a state dict whose
entries are read when their turn comes. So a GGUF, a base with an adapter and a plain folder load alike, through
transformers' own renaming and fusing (the experts of a mixture), and what is mapped on disk is not copied first.
transformers makes up what a checkpoint lacks; here that is an error. A model's own code runs only where that is
asked for.
"""

import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from wtool.checkpoint import Checkpoint
from wtool.dtypes import FLOATS, torch_dtype
from wtool.errors import InputError, Mismatch, MissingInput, RuntimeProblem, UsageError, WtoolError
from wtool.shards import json_bytes

log = logging.getLogger(__name__)


class Stored:
    """A tensor of a checkpoint in the form in which transformers takes one of a safetensors file: read when indexed."""

    def __init__(self, checkpoint: Checkpoint, name: str, failures: list[WtoolError]):
        self._checkpoint = checkpoint
        self._name = name
        self._failures = failures  # transformers tells a failed read in words of its own

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.tensors[self._name].shape)

    def get_dtype(self) -> str:
        return self._checkpoint.tensors[self._name].dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return self._checkpoint.read(self._name)[index]
        except WtoolError as error:
            self._failures.append(error)
            raise


def load_model(
    checkpoint: Checkpoint, *, dtype: str, device: str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a causal language model, ready to evaluate.

    dtype: safetensors name of the type to compute in; `working_dtype` proposes one
    returns: the model; its weights may be views of mapped files, so they must not be written to
    raises: InputError where the checkpoint makes no such model, UsageError where it needs code of its own
    """
    label = checkpoint.label
    if not checkpoint.config:
        raise MissingInput(f"{label}: no config.json beside the weights, and without it no model can be built")
    failures: list[WtoolError] = []
    state: Any = {name: Stored(checkpoint, name, failures) for name in checkpoint.tensors}
    with (
        explained(label, "build the model"),
        quiet(),
        model_folder(checkpoint, code_files(checkpoint, trust_remote_code)) as folder,
    ):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):  # weighs nothing; tells the class, which may be one of the model's own code
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        try:
            model, found = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                state_dict=state,
                dtype=torch_dtype(dtype),
                ignore_mismatched_sizes=True,  # told below, in one line
                output_loading_info=True,
            )
        except Exception:
            if failures:
                raise failures[0] from None
            raise
    _check(label, str(config.model_type), found)
    if checkpoint.config.get("quantization_config") and not getattr(model, "is_quantized", False):
        model.to(torch_dtype(dtype))  # unpacked on loading, to a type of transformers' choice
    return model.to(device)  # pyright: ignore[reportArgumentType] - its stub takes no strings


def _check(label: str, kind: str, found: dict[str, Any]) -> None:
    """Refuse a model with made-up weights; tell what was left out."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise MissingInput(
            f"{label}: lacks {len(missing)} tensor(s) that config.json asks for (model_type {kind}), "
            f"the first is '{missing[0]}'"
        )
    for name, stored, needed in sorted(found["mismatched_keys"]):
        raise Mismatch(f"{label}: tensor '{name}' is {list(stored)}, but config.json asks for {list(needed)}")
    if unexpected:
        log.warning("%s: %d tensor(s) have no place in a %s model and are left out, the first is '%s'",
                    label, len(unexpected), kind, unexpected[0])  # fmt: skip


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    raises: MissingInput where it has none
    """
    names = [name for name in checkpoint.files if trust_remote_code or not name.endswith(".py")]
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in names):
        raise MissingInput(f"{checkpoint.label}: no tokenizer beside the weights (tokenizer.json, vocab.json, …)")
    with explained(checkpoint.label, "load the tokenizer"), quiet(), model_folder(checkpoint, names) as folder:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def own_dtype(checkpoint: Checkpoint) -> str:
    """The floating type of most of a model's weights, by their bytes; float32 where none is of such a type."""
    nbytes = dict.fromkeys(FLOATS, 0)
    for info in checkpoint.tensors.values():
        if info.dtype in nbytes:
            nbytes[info.dtype] += info.nbytes
    own = max(nbytes, key=lambda dtype: nbytes[dtype])
    return own if nbytes[own] else "F32"


def working_dtype(checkpoint: Checkpoint, device: str) -> str:
    """The type a model computes in unless told otherwise: that of most of its weights, on a CPU float32 at least."""
    own = own_dtype(checkpoint)
    return "F32" if device.startswith("cpu") and own in ("F16", "BF16") else own


def pick_device(name: str) -> str:
    """`auto` is the first GPU, where there is one.

    raises: UsageError, RuntimeProblem where there is no such device
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device '{name}' is not one of auto, cpu, cuda, cuda:1, …") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RuntimeProblem(f"device '{name}': torch {torch.__version__} sees {count} CUDA devices here")
    return name


def code_files(checkpoint: Checkpoint, trusted: bool) -> list[str]:
    """The names of the model's own code, where the user trusts it."""
    return [name for name in checkpoint.files if trusted and name.endswith(".py")]


@contextmanager
def model_folder(checkpoint: Checkpoint, names: Collection[str]) -> Iterator[Path]:
    """A folder with the checkpoint's config.json and those of its other files."""
    with tempfile.TemporaryDirectory(prefix="wtool-model-") as name:
        folder = Path(name)
        if checkpoint.config:
            (folder / "config.json").write_bytes(json_bytes(checkpoint.config))
        for file in names:
            (folder / file).symlink_to(checkpoint.files[file].resolve())
        yield folder


@contextmanager
def explained(label: str, what: str) -> Iterator[None]:
    """Tell in one line what transformers tells in many."""
    try:
        yield
    except WtoolError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UsageError(
                f"{label}: transformers does not know this model, which brings its own code; "
                "read that code, and --trust-remote-code runs it"
            ) from error
        reason = next((line.strip() for line in text.splitlines() if line.strip()), "") or type(error).__name__
        raise InputError(f"{label}: transformers cannot {what}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks and progress bars, and Python's warnings, off the screen for a while."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
