"""How well a merge foretells held-out texts, measured before it is written.

The merge is built as one model in memory, its tensors computed from the mapped inputs one after the other; nothing of
it is written. What is measured is what `wtool eval` measures of the merge once it is there.
"""

import gc
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, fsum, inf
from pathlib import Path
from typing import Any

from wtool.checkpoint import Checkpoint
from wtool.console import human_bytes
from wtool.dtypes import FLOATS, config_name, itemsize, parse_float_dtype
from wtool.errors import InputError, Mismatch, RuntimeProblem, UsageError
from wtool.evaluate import Evaluation, encode, evaluate
from wtool.loading import load_model, load_tokenizer, pick_device, working_dtype
from wtool.memory import give_back_freed_memory, give_back_large_blocks
from wtool.plan import Plan
from wtool.planned import planned
from wtool.text_file import read_text

WINDOW = 1024  # tokens, as in wtool eval
MEMINFO = Path("/proc/meminfo")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class How:
    """How texts are scored: as the options of `wtool eval` of these names tell."""

    window: int | None = None  # None is WINDOW
    stride: int | None = None
    limit_tokens: int | None = None
    batch: int | None = None  # windows at a time; None is 1, on a GPU 8
    device: str = "auto"
    dtype: str | None = None  # to compute in, a safetensors name; None is that of the weights, on a CPU float32
    trust_remote_code: bool = False


@dataclass(frozen=True)
class HeldOut:
    """Texts, and how they are scored, with everything settled."""

    texts: Mapping[str, str]  # the file's name as the user wrote it -> its content
    tokens: Mapping[str, tuple[int, ...]]  # of each text, the same for every merge that is compared
    how: How
    window: int  # tokens; no more than the model has positions for
    device: str
    dtype: str  # safetensors name
    model_bytes: int  # memory that one model takes

    @property
    def scored(self) -> int:
        """Tokens scored in one evaluation."""
        limit = self.how.limit_tokens
        counts = [len(ids) - 1 for ids in self.tokens.values()]
        return sum(count if limit is None else min(count, limit) for count in counts)

    def record(self) -> dict[str, Any]:
        """What was measured on, for a manifest: all that the figures depend on."""
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}
        return {
            "texts": [{"file": name, "sha256": digest} for name, digest in digests.items()],
            "window": self.window,
            "stride": self.how.stride,
            "limit_tokens": self.how.limit_tokens,
            "batch": self.batch,
            "device": self.device,
            "dtype": self.dtype,
        }

    def key(self, plan: Plan) -> str:
        """Tells the evaluation of a plan from any other: the inputs, the recipe, the texts, the way they are scored."""
        told = self.record()
        told["texts"] = [text["sha256"] for text in told["texts"]]
        return hashlib.sha256(f"{plan.fingerprint()} {json.dumps(told, sort_keys=True)}".encode()).hexdigest()

    @property
    def batch(self) -> int:
        return self.how.batch or (8 if self.device.startswith("cuda") else 1)


def held_out(plan: Plan, texts: Mapping[str, str], how: How) -> HeldOut:
    """Settle how plans like this one are to be scored.

    raises: UsageError, MissingInput without a tokenizer, InputError where nothing is to be scored, RuntimeProblem
            where one model does not fit into memory
    """
    device = pick_device(how.device)
    with planned(plan, "the merge") as checkpoint:
        dtype = parse_float_dtype(how.dtype) if how.dtype else working_dtype(checkpoint, device)
        check_room(checkpoint, dtype)
        tokens = _tokens(checkpoint, texts, how.trust_remote_code)
        window = min(how.window or WINDOW, _positions(checkpoint))
        return HeldOut(texts, tokens, how, window, device, dtype, model_bytes(checkpoint, dtype))


def measure(plan: Plan, label: str, held: HeldOut, progress: Progress = lambda tokens: None) -> list[Evaluation]:
    """Score the texts with what a plan would write, each in its turn.

    label: of the merge, for errors
    progress: is told the tokens scored
    """
    give_back_large_blocks()
    with planned(plan, label) as checkpoint:
        if _tokens(checkpoint, held.texts, held.how.trust_remote_code) != held.tokens:
            raise Mismatch(f"{label}: has a tokenizer of its own; losses of other tokens cannot be compared")
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=held.how.trust_remote_code)
        trust = held.how.trust_remote_code
        model = load_model(checkpoint, dtype=held.dtype, device=held.device, trust_remote_code=trust)
        found = [
            evaluate(
                model,
                tokenizer,
                text,
                window=held.window,
                stride=held.how.stride,
                batch=held.batch,
                limit=held.how.limit_tokens,
                progress=progress,
            )
            for text in held.texts.values()
        ]
    del model
    gc.collect()  # a model knows itself in circles, and the next one needs its room
    give_back_freed_memory()
    return found


def mean_loss(nats: Sequence[float]) -> float:
    """The loss over several texts: every text counts alike, however long it is."""
    return fsum(nats) / len(nats)


def perplexity(nats: float) -> float:
    """Of a loss in nats a token; infinite beyond floats."""
    return exp(nats) if nats < 700 else inf if nats == nats else nats


def model_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """What the model takes in memory while it is measured: itself, and the largest tensor as it is being made."""
    infos = checkpoint.tensors.values()
    sizes = [info.elements * itemsize(dtype) if info.dtype in FLOATS else info.nbytes for info in infos]
    return sum(sizes) + max((info.nbytes for info in infos), default=0)


def check_room(checkpoint: Checkpoint, dtype: str) -> None:
    """Refuse a model that this machine's memory does not hold.

    raises: RuntimeProblem
    """
    needed, free = model_bytes(checkpoint, dtype), available_memory()
    if free is not None and needed > free:
        raise RuntimeProblem(
            f"one model in {config_name(dtype)} takes {human_bytes(needed)} of memory, and {human_bytes(free)} are "
            "free; --compute-dtype bfloat16 takes half of float32"
        )


def available_memory() -> int | None:
    """Bytes that this machine can give without swapping; None where it does not tell."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Read text files in UTF-8.

    raises: MissingInput, MalformedFile, InputError for an empty one
    """
    return {str(path): read_text(path) for path in paths}


def check_stride(window: int | None, stride: int | None) -> None:
    """Refuse windows with a gap between them.

    raises: UsageError
    """
    size = window or WINDOW
    if stride and stride > size:
        raise UsageError(f"--stride {stride} is beyond --window {size}: the tokens between would not be scored")


def _positions(checkpoint: Checkpoint) -> int:
    """How many tokens the model is made to see at once; WINDOW and more where config.json does not say."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return longest if isinstance(longest, int) else sys.maxsize


def _tokens(checkpoint: Checkpoint, texts: Mapping[str, str], trust: bool) -> dict[str, tuple[int, ...]]:
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust)
    found = {name: tuple(encode(tokenizer, text)[0]) for name, text in texts.items()}
    for name, ids in found.items():
        if len(ids) < 2:
            raise InputError(f"{name}: nothing to score: the text has one token, and nothing before it")
    return found
