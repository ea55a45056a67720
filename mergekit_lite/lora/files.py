"""LoRA adapters on disk, without their base: what PEFT's two files say, and how they are written.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685. An adapter is
opened as a checkpoint whose tensors are its factors, so that a plan can read them. Scales (alpha/r, alpha/√r with
rsLoRA, and the patterns of both) are settled here: what is written has scale 1 in every module.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.adapter import FACTOR, MERGE_FIRST, SETTINGS, WRAPPER, by_pattern, open_weights, read_settings
from wtool.checkpoint.base import Checkpoint, FileIdentity, TensorInfo
from wtool.checkpoint.folder import side_files
from wtool.checkpoint.made import made_as
from wtool.checkpoint.resolve import local_folder
from wtool.errors import MalformedFile, Mismatch, QuantizedInput
from wtool.shards import Shard, plan_shards

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a module: scale times b times a."""

    a: str  # names of the tensors in the file
    b: str
    scale: float
    rank: int
    shape: tuple[int, int]  # out, in: of b times a; of an embedding (features, tokens)
    is_embedding: bool = False


class Adapter(Checkpoint):
    """An adapter in a folder.

    raises: InputError; what is no plain LoRA is refused by its name
    """

    def __init__(self, folder: Path, label: str):
        self.label, self.folder = label, folder
        self.settings = read_settings(folder / SETTINGS)
        self.config, self.files = {}, side_files(folder)
        self._file = open_weights(folder)
        self.tensors = self._file.tensors
        for option in ("use_dora", "lora_bias"):
            if self.settings.get(option):
                raise QuantizedInput(f"{folder}: LoRA with '{option}' is not merged by its factors: {MERGE_FIRST}")
        if self.settings.get("bias", "none") != "none":
            raise QuantizedInput(f"{folder}: LoRA that trains biases is not merged by its factors: {MERGE_FIRST}")
        parts, self.saved = self._sorted()  # saved: whole tensors by the base's name
        self.updates = {module: self._update(module, names) for module, names in parts.items()}

    @property
    def base(self) -> str | None:
        """The base's name, with its revision where one is told."""
        name, revision = self.settings.get("base_model_name_or_path"), self.settings.get("revision")
        return f"{name}@{revision}" if name and revision not in (None, "main") else name or None

    def _sorted(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        parts: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for tensor in self.tensors:
            name = tensor.removeprefix(PREFIX)
            found = FACTOR.fullmatch(name)
            if found is None and "lora_" not in name:
                whole[WRAPPER.sub("", name)] = tensor
            elif found is None or found["bias"] or found["part"] == "lora_magnitude_vector":
                raise QuantizedInput(f"{self._file.path}: '{tensor}' is of a kind of LoRA that is not known here")
            elif found["part"] in (module := parts.setdefault(found["module"], {})):
                raise MalformedFile(f"{self._file.path}: '{tensor}' and '{module[found['part']]}' are of two adapters")
            else:
                module[found["part"]] = tensor
        if not parts:
            raise MalformedFile(f"{self._file.path}: holds no factors of LoRA")
        return parts, whole

    def _update(self, module: str, names: Mapping[str, str]) -> Update:
        is_embedding = any("embedding" in part for part in names)
        kind = "lora_embedding_" if is_embedding else "lora_"
        if set(names) != {f"{kind}A", f"{kind}B"}:
            raise MalformedFile(f"{self._file.path}: '{next(iter(names.values()))}' lacks its lora_A or lora_B")
        a, b = names[f"{kind}A"], names[f"{kind}B"]
        wide, tall = self.tensors[a].shape, self.tensors[b].shape
        if len(wide) != 2 or len(tall) != 2:
            raise QuantizedInput(f"{self._file.path}: '{module}' is LoRA of a convolution, which is not known here")
        rank = by_pattern(self.settings.get("rank_pattern"), module, self.settings["r"])
        alpha = by_pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
        if wide[0] != rank or tall[1] != rank:
            raise Mismatch(f"{self._file.path}: '{module}' has rank {wide[0]} and {tall[1]}, {SETTINGS} says {rank}")
        scale = alpha / (sqrt(rank) if self.settings.get("use_rslora") else rank)
        return Update(a, b, scale, rank, (tall[0], wide[1]), is_embedding)

    def read(self, name: str) -> "torch.Tensor":
        return self._file.read(name)

    def identity(self) -> list[FileIdentity]:
        path, found = self.folder / SETTINGS, self._file.identity()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()  # scales are there
        made = made_as(self.folder, [self._file.path])
        weights = replace(found, version=made) if made else found
        return [FileIdentity(SETTINGS, path.stat().st_size, digest, digest), weights]

    def folders(self) -> list[Path]:
        return [self.folder.resolve()]


def open_adapter(reference: str) -> Adapter:
    """Open an adapter: a folder, or a Hub id.

    raises: InputError
    """
    return Adapter(local_folder(reference), reference)


def factor_names(module: str, *, is_embedding: bool = False) -> tuple[str, str]:
    """The names under which PEFT keeps a module's a and b."""
    if is_embedding:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def factor_infos(
    module: str, shape: tuple[int, int], rank: int, dtype: str, *, is_embedding: bool = False
) -> dict[str, TensorInfo]:
    """The headers of a module's a and b; shape: (out, in)."""
    a, b = factor_names(module, is_embedding=is_embedding)
    return {a: TensorInfo(dtype, (rank, shape[1])), b: TensorInfo(dtype, (shape[0], rank))}


def one_file(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[Shard]:
    """The layout of an adapter: all in one file, which PEFT looks for by its name."""
    (shard,) = plan_shards(tensors, 1 << 62)
    return [replace(shard, filename=WEIGHTS)]


def settings_of(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    targets: Any,
    task_type: str | None = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
    modules_to_save: Iterable[str] = (),
) -> dict[str, Any]:
    """The content of adapter_config.json, with scale 1 everywhere: alpha is the rank, in patterns too.

    ranks: by module; the most frequent becomes `r`
    targets: PEFT's target_modules
    """
    usual = max(Counter(ranks.values()).items(), key=lambda each: (each[1], each[0]))[0] if ranks else 1
    pattern = {f"^{module}": rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": targets,
        "modules_to_save": list(modules_to_save) or None,
    }
