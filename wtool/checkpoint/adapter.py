"""A base model with a LoRA adapter added on reading: W + scale · B·A, computed in float32.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685; scale is
alpha/r, or alpha/√r with rsLoRA (https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) then
gives every output of the sum the length its magnitude vector tells. The files are those of Hugging Face's PEFT:
adapter_config.json and adapter_model.safetensors, in which a tensor is either a factor (`….q_proj.lora_A.weight`)
or a whole tensor that takes the base's place (modules_to_save, biases, embeddings). What PEFT can do beyond that
is refused by its name: a wrong sum would load, and talk.

A tied output head needs care. In training an adapter on the embedding does not reach the head, nor one on the head
the embedding; so a head that is told apart so becomes a tensor of its own, and config.json says so. (PEFT's
merge_and_unload changes both, which is another model than the one that was trained.)
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.checkpoint.base import Checkpoint, FileIdentity, LazyFiles, TensorFile, TensorInfo
from wtool.checkpoint.folder import SIDE_FILES, read_json, side_files
from wtool.checkpoint.safetensors import SafetensorsFile
from wtool.checkpoint.tied import HEADS, embedding_name, head_name, is_tied
from wtool.dtypes import FLOATS
from wtool.errors import MalformedFile, Mismatch, MissingInput, QuantizedInput, did_you_mean

if TYPE_CHECKING:
    import torch

SETTINGS = "adapter_config.json"
# Options of LoRA that this file follows, and those that only matter in training. Any other one that is set is refused.
FOLLOWED = frozenset(
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora bias lora_bias fan_in_fan_out "
    "modules_to_save ensure_weight_tying init_lora_weights".split()
)
OF_TRAINING = frozenset(
    "task_type inference_mode auto_mapping base_model_name_or_path revision peft_version runtime_config "
    "target_modules exclude_modules layers_to_transform layers_pattern lora_dropout megatron_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size".split()
)
MERGE_FIRST = "merge it with PEFT (merge_and_unload) and give the merged model"
# Ways to start training that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, …) change it too.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Families whose linear layers are transformers' Conv1D, stored (in, out). A square one does not tell by its shape.
CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.weight|(?P<bias>\.bias))?"  # the segment between is the adapter's name in training
)
WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.)")
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
NOT_TOKENIZER = {"generation_config.json", "preprocessor_config.json", "processor_config.json", "README.md"}


@dataclass(frozen=True)
class Update:
    """What is added to a tensor: the names of its factors in the adapter's file, and their scale."""

    scale: float
    b: str
    a: str | None = None  # None: b itself, for a bias
    transposed: bool = False  # the weight is stored (in, out); so is an embedding
    magnitude: str | None = None  # DoRA


class Adapted(Checkpoint):
    """A base with an adapter. Changed tensors are read in float32; their headers keep the base's dtype."""

    def __init__(self, base: Checkpoint, folder: Path, label: str):
        self.label = label
        self.revision = base.revision
        self.files = LazyFiles(lambda: _merged_files(base.files, folder))
        self._base = base
        self._folder = folder
        self._settings = read_settings(folder / SETTINGS)
        self._file = open_weights(folder)
        self._embedding = embedding_name(base.tensors)
        self._tied = is_tied(base.config) and self._embedding is not None
        self._updates: dict[str, Update] = {}
        self._sources: dict[str, tuple[Checkpoint | TensorFile, str]] = {}  # where not the base's tensor of that name
        factors, whole = self._sort_names()
        replaced = {name: self._replace(name, tensor) for name, tensor in whole.items()}
        saved = {target for name, target in replaced.items() if self._is_module_to_save(name)}
        summed = {module: self._target(f"{module}.weight") for module in factors}
        dropped = self._settle_head({*saved, *summed.values()}, saved)
        for module, name in summed.items():
            if name not in dropped:
                self._add(module, name, factors[module])
        names = [name for name in (*base.tensors, *self._sources) if name not in dropped]
        self.tensors = {name: self._info(name) for name in names}
        self._check_vocabulary()

    # What the names in the adapter's file mean

    def _sort_names(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """The tensors of the file: factors by module and part, and whole tensors by the name they replace."""
        factors: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for tensor in self._file.tensors:
            name = tensor.removeprefix("base_model.model.")
            if found := FACTOR.fullmatch(name):
                parts = factors.setdefault(found["module"], {})
                part = found["part"].replace("embedding_", "") + (found["bias"] or "")
                if part in parts:
                    raise MalformedFile(f"{self._file.path}: '{tensor}' and '{parts[part]}' are of two adapters")
                parts[part] = tensor
            elif "lora_" in name:
                raise QuantizedInput(f"{self._file.path}: '{tensor}' is of a kind of LoRA that is not known here")
            else:
                whole[WRAPPER.sub("", name)] = tensor
        if not factors and not whole:
            raise MalformedFile(f"{self._file.path}: holds no tensor")
        return factors, whole

    def _target(self, name: str) -> str:
        """The tensor a name means: the base's, with or without the name of its trunk, or its tied head."""
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._base.tensors or (self._tied and candidate in HEADS):
                return candidate
        of = self._settings.get("base_model_name_or_path")
        raise Mismatch(
            f"{self._file.path}: changes '{name}', which {self._base.label} does not hold"
            f"{did_you_mean(name, self._base.tensors)}{f' (made for {of})' if of else ''}"
        )

    def _is_module_to_save(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        return any(module.endswith(ending) for ending in self._settings.get("modules_to_save") or [])  # PEFT's rule

    def _replace(self, name: str, tensor: str) -> str:
        """Take the adapter's tensor for the base's; only the vocabulary may have grown or shrunk."""
        target = self._target(name)
        self._sources[target] = self._file, tensor
        ours, theirs = self._info(target).shape, self._base_info(target).shape
        resized = target == self._embedding or target in HEADS
        if ours != theirs and not (resized and ours[1:] == theirs[1:]):
            raise Mismatch(f"{self._file.path}: '{tensor}' is {list(ours)}, {self._base.label}'s {list(theirs)}")
        return target

    def _settle_head(self, changed: set[str], saved: set[str]) -> set[str]:
        """Decide whether a tied head stays tied; return the names that it does without then.

        changed: what training changed alone, by factors or as a module to save
        saved: the modules to save among them
        """
        self.config = self._base.config
        if not self._tied or self._embedding is None:
            return set()
        head = head_name([*self._base.tensors, *self._sources, *changed]) or "lm_head.weight"
        if self._settings.get("ensure_weight_tying") or not changed & {self._embedding, head}:
            stale = {self._embedding, head} & (changed | set(self._sources))
            self._sources.pop(head, None)
            return {head} if stale else set()
        self.config = _with_setting(self.config, "tie_word_embeddings", False)
        if head not in self._sources and head not in self._base.tensors:
            shared = self._embedding in self._sources and self._embedding not in saved
            self._sources[head] = self._sources[self._embedding] if shared else (self._base, self._embedding)
        return set()

    def _add(self, module: str, name: str, parts: Mapping[str, str]) -> None:
        """Note the sum that a module's factors make with its weight, after checking that they fit."""
        if not {"lora_A", "lora_B"} <= set(parts):
            raise MalformedFile(f"{self._file.path}: '{next(iter(parts.values()))}' lacks its lora_A or lora_B")
        if ("lora_magnitude_vector" in parts) != bool(self._settings.get("use_dora")):
            raise MalformedFile(f"{self._file.path}: '{module}': {SETTINGS}'s use_dora and the magnitudes disagree")
        info = self._info(name)
        if info.dtype not in FLOATS:
            raise QuantizedInput(f"{self._base.label}: '{name}' is packed ({info.dtype}): give the unquantized base")
        a, b = (self._file.tensors[parts[part]].shape for part in ("lora_A", "lora_B"))
        if len(a) != 2 or len(b) != 2 or len(info.shape) != 2:
            raise QuantizedInput(f"{self._file.path}: '{module}' is LoRA of a convolution, which is not known here")
        rank, scale = self._rank_and_scale(module)
        if a[0] != rank or b[1] != rank:
            raise Mismatch(f"{self._file.path}: '{module}' has rank {a[0]} and {b[1]}, {SETTINGS} says {rank}")
        straight, turned = info.shape == (b[0], a[1]), info.shape == (a[1], b[0])
        if not straight and not turned:
            raise Mismatch(
                f"{self._file.path}: '{module}' adds {b[0]} x {a[1]} to '{name}', which is {list(info.shape)}"
            )
        transposed = self._is_conv1d() if straight and turned else turned
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude and self._file.tensors[magnitude].elements != b[0]:
            raise Mismatch(f"{self._file.path}: '{magnitude}' has not one magnitude for each of {b[0]} outputs")
        self._updates[name] = Update(scale, parts["lora_B"], parts["lora_A"], transposed, magnitude)
        if bias := parts.get("lora_B.bias"):
            self._updates[self._target(f"{module}.bias")] = Update(scale, bias)

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        settings = self._settings
        rank = by_pattern(settings.get("rank_pattern"), module, settings["r"])
        alpha = by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        return rank, alpha / (sqrt(rank) if settings.get("use_rslora") else rank)

    def _is_conv1d(self) -> bool:
        """Whether a square weight is stored (in, out): PEFT goes by the class of the layer, we by the family."""
        family = self._base.config.get("model_type")
        return bool(self._settings.get("fan_in_fan_out")) if family is None else family in CONV1D_FAMILIES

    # Headers

    def _base_info(self, name: str) -> TensorInfo:
        """The header of the base's tensor; of the embedding for a tied head."""
        return self._base.tensors[name if name in self._base.tensors else self._embedding or name]

    def _info(self, name: str) -> TensorInfo:
        source, tensor = self._sources.get(name, (self._base, name))
        return TensorInfo(self._base_info(name).dtype, source.tensors[tensor].shape)

    def _check_vocabulary(self) -> None:
        """Follow an embedding that was resized for new tokens."""
        if self._embedding is None:
            return
        rows, head = self.tensors[self._embedding].shape[0], head_name(self.tensors)
        if rows == self._base.tensors[self._embedding].shape[0]:
            return
        if head and self.tensors[head].shape[0] != rows:
            raise Mismatch(
                f"{self._file.path}: its embedding has {rows} tokens, the output head {self.tensors[head].shape[0]}: "
                "save both with the adapter (save_embedding_layers=True)"
            )
        self.config = _with_setting(self.config, "vocab_size", rows)

    # What a checkpoint can do

    def read(self, name: str) -> "torch.Tensor":
        import torch

        if name not in self.tensors:
            raise self.missing(name)
        source, tensor = self._sources.get(name, (self._base, name))
        weight = source.read(tensor)
        update = self._updates.get(name)
        if update is None:
            same = source is self._base or source.tensors[tensor].dtype == self.tensors[name].dtype
            return weight if same else weight.float()
        added = self._file.read(update.b).float()
        if update.a:
            added = added @ self._file.read(update.a).float()  # [out, r] @ [r, in]
        added = added * update.scale
        weight = weight.float() + (added.T if update.transposed else added)
        if update.magnitude:
            length = torch.linalg.norm(weight, dim=0 if update.transposed else 1, keepdim=True)  # of each output
            weight = weight * (self._file.read(update.magnitude).float().view(length.shape) / length)
        return weight

    def prefetch(self, name: str) -> None:
        source, tensor = self._sources.get(name, (self._base, name))
        source.prefetch(tensor)

    def expect(self, names: Iterable[str]) -> None:
        for name in names:
            source, tensor = self._sources.get(name, (self._base, name))
            source.expect([tensor])

    def forget(self, name: str) -> None:
        source, tensor = self._sources.get(name, (self._base, name))
        source.forget(tensor)

    def identity(self) -> list[FileIdentity]:
        path = self._folder / SETTINGS
        stat, digest = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
        settings = FileIdentity(SETTINGS, stat.st_size, str(stat.st_mtime_ns), digest)
        return [*self._base.identity(), settings, self._file.identity()]

    def folders(self) -> list[Path]:
        return [*self._base.folders(), self._folder.resolve()]


def read_settings(path: Path) -> dict[str, Any]:
    """adapter_config.json, once it is clear that all it asks for is known here."""
    if not path.is_file():
        raise MissingInput(f"{path.parent}: not a LoRA adapter: there is no {SETTINGS}")
    settings = read_json(path)
    if settings.get("peft_type") != "LORA":
        raise QuantizedInput(
            f"{path}: peft_type {settings.get('peft_type')} is not read here, only LORA: {MERGE_FIRST}"
        )
    for option, value in settings.items():
        if value and option not in FOLLOWED | OF_TRAINING:
            raise QuantizedInput(f"{path}: LoRA with '{option}' is not read here: {MERGE_FIRST}")
    start = settings.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise QuantizedInput(f"{path}: init_lora_weights '{start}' changes the base too, not read here: {MERGE_FIRST}")
    sizes = {option: settings.get(option) for option in ("r", "lora_alpha")}
    for option in ("rank_pattern", "alpha_pattern"):
        sizes |= {f"{option}: {pattern}": size for pattern, size in (settings.get(option) or {}).items()}
    for option, size in sizes.items():
        if not isinstance(size, int | float) or size <= 0:
            raise MalformedFile(f"{path}: '{option}' is {size!r}, not a number above 0")
    return settings


def open_weights(folder: Path) -> TensorFile:
    if (folder / "adapter_model.safetensors").is_file():
        return SafetensorsFile(folder / "adapter_model.safetensors")
    if (folder / "adapter_model.bin").is_file():
        from wtool.checkpoint.torch_bin import TorchFile

        return TorchFile(folder / "adapter_model.bin")
    raise MissingInput(f"{folder}: holds {SETTINGS}, but neither adapter_model.safetensors nor adapter_model.bin")


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's path ends with (PEFT's rule), else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _with_setting(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """config.json with a setting of the text model changed, wherever it keeps it."""
    text = config.get("text_config")
    if isinstance(text, dict) and key in text:
        config = {**config, "text_config": {**text, key: value}}
        return {**config, key: value} if key in config else config
    return {**config, key: value}


def _merged_files(base: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The base's files beside the weights; a tokenizer in the adapter's folder takes the place of the base's."""
    own = {name: path for name, path in side_files(folder).items() if name in SIDE_FILES and name != "README.md"}
    tokenizer = set(SIDE_FILES) - NOT_TOKENIZER if TOKENIZERS & set(own) else set()
    return {name: path for name, path in base.items() if name not in tokenizer} | own
