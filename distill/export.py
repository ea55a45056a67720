"""The trained student as a checkpoint: its own names, dtypes and files, with a manifest and a card.

Weights of 16 bits are rounded at random (`wtool.rounding`): to the nearest, a short training would be lost again.
"""

import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.tensor import DTensor

from wtool import __version__
from wtool.checkpoint import Checkpoint, TensorInfo
from wtool.checkpoint.folder import open_local
from wtool.checkpoint.tied import HEADS, embedding_name, is_tied
from wtool.dtypes import FLOATS, config_name, torch_dtype
from wtool.loading import own_dtype, quiet
from wtool.plan import DEFAULT_SHARD_BYTES, sketch
from wtool.rounding import stochastic
from wtool.shards import json_bytes, plan_shards
from wtool.writer import MANIFEST, Writer

from .objective import PROJECTORS
from .planner import DistillPlan

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model that several processes hold parts of, whole; all of them must ask at once."""
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole[name] = full.detach().cpu()
    return whole


def save_trained(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Let transformers, or peft, write what was trained, under the names that it has on disk.

    state: the weights, where they are not in the model (sharded training)
    """
    shutil.rmtree(folder, ignore_errors=True)
    if hasattr(model, PROJECTORS):
        delattr(model, PROJECTORS)
    if state is not None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(PROJECTORS)}
    with quiet():
        model.save_pretrained(folder, **({"state_dict": dict(state)} if state is not None else {}))


def trained_checkpoint(plan: DistillPlan, saved: Path) -> Checkpoint:
    """What `save_trained` wrote as a checkpoint; an adapter is added to the student it was trained beside."""
    if plan.recipe.lora is None:
        return open_local(saved, str(saved))
    from wtool.checkpoint.adapter import Adapted

    return Adapted(plan.student.source, saved, plan.student.label)


def output_tensors(plan: DistillPlan, trained: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors to write: the student's names and dtypes; of one that began at random, the teacher's dtype."""
    usual = own_dtype(plan.student.source)
    if plan.student.config is not None:
        return {name: _as(info, usual) for name, info in trained.tensors.items()}
    own = {name: _as(trained.tensors.get(name, info), info.dtype) for name, info in plan.student.source.tensors.items()}
    return own | {name: _as(info, usual) for name, info in trained.tensors.items() if name not in own}


def write_student(
    plan: DistillPlan,
    saved: Path,
    out: Path,
    figures: Mapping[str, Any],
    *,
    force: bool,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Let the student appear in its place, or go on with that.

    saved: what `save_trained` wrote
    figures: what is to be told of the training in the manifest

    raises: OutputError
    """
    told: dict[str, bytes | Path] = {MANIFEST: json_bytes({**_about(plan), **figures}), "README.md": _card(plan)}
    if plan.recipe.lora is not None and plan.recipe.lora.keep_adapter:
        with Writer(out, [], plan.fingerprint(), force=force) as writer:
            writer.commit({name: saved / name for name in ADAPTER_FILES} | told)
        return
    trained = trained_checkpoint(plan, saved)
    tensors = output_tensors(plan, trained)
    beside: dict[str, bytes | Path] = {**(trained if plan.recipe.lora else plan.student.source).files}
    with Writer(out, plan_shards(tensors, DEFAULT_SHARD_BYTES), plan.fingerprint(), force=force) as writer:
        for name, info in tensors.items():
            if name not in writer.done:
                tensor = _read(plan.student.source, trained, name)
                seed = zlib.crc32(f"{plan.recipe.training.seed} {name}".encode())
                writer.write({name: stochastic(tensor, torch_dtype(info.dtype), seed).contiguous()})
            progress(info.nbytes)
        manifest = {**_about(plan), **figures, "tensors_xxh3": {name: writer.done[name] for name in tensors}}
        told[MANIFEST] = json_bytes(manifest)
        writer.commit({**beside, "config.json": json_bytes(_config(plan, trained)), **told})


def sketch_student(plan: DistillPlan, folder: Path) -> None:
    """Write what the student will look like, all but its numbers, where that is known before it is trained."""
    lora, source = plan.recipe.lora, plan.student.source
    if plan.student.config is None and not (lora and lora.keep_adapter):
        config = {"config.json": json_bytes(_config(plan, source))}
        sketch(folder, plan_shards(output_tensors(plan, source), DEFAULT_SHARD_BYTES), {**source.files, **config})


def _read(source: Checkpoint, trained: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as it was trained; a tied head that the file holds twice from the embedding; else as it was."""
    if name in trained.tensors:
        return trained.read(name)
    embedding = embedding_name(trained.tensors)
    if name in HEADS and embedding is not None and is_tied(source.config):
        return trained.read(embedding)
    return source.read(name)


def _config(plan: DistillPlan, trained: Checkpoint) -> dict[str, Any]:
    if plan.student.config is not None:
        classes = [name.removeprefix("FSDP") for name in trained.config.get("architectures") or []]  # sharded or not
        return {
            **trained.config,
            "architectures": classes,
            "dtype": config_name(own_dtype(plan.student.source)),
            "use_cache": True,
        }
    config = trained.config if plan.recipe.lora else plan.student.source.config
    return {key: value for key, value in config.items() if key != "quantization_config"}  # its weights are plain now


def _as(info: TensorInfo, dtype: str) -> TensorInfo:
    return replace(info, dtype=dtype) if info.dtype in FLOATS and dtype in FLOATS else info


def _about(plan: DistillPlan) -> dict[str, Any]:
    """What was made of what: the same inputs and recipe give the same."""
    student = plan.student
    inputs = [(student.label, student.source), *([(plan.teacher.label, plan.teacher)] if plan.teacher else [])]
    return {
        "wtool": __version__,
        "fingerprint": plan.fingerprint(),
        "recipe": {"distill": plan.recipe.model_dump(mode="json", exclude_defaults=True)},
        "inputs": [
            {
                "checkpoint": label,
                **({"revision": source.revision} if source.revision else {}),
                "files": {file.name: {"size": file.size, "header_sha256": file.header} for file in source.identity()},
            }
            for label, source in inputs
        ],
        "text": plan.texts.record,
        "precision": plan.precision,
        "processes": plan.processes,
        **({"student_layers": list(student.layers)} if student.layers is not None else {}),
        **({"cache": dict(plan.cache.about)} if plan.cache is not None else {}),
    }


def _card(plan: DistillPlan) -> bytes:
    """README.md. Only a name on the Hub goes into its front matter: a local path means nothing there."""
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["distillation", "wtool"]}
    if plan.student.source.revision:
        head["base_model"] = [plan.student.source.label.split("@")[0]]
    recipe = yaml.safe_dump(
        plan.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {plan.student.label}, distilled from {plan.recipe.teacher}\n\n"
        f"Made with wtool {__version__}, loss `{plan.recipe.loss.kind}`, {plan.steps} steps.\n\n"
        f"## Recipe\n\nSave it as `recipe.yml` and run `wtool distill recipe.yml -o OUT`.\n\n```yaml\n{recipe}```\n"
    ).encode()
