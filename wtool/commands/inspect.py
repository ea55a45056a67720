"""`wtool inspect`: what a checkpoint holds, told from headers alone; a model on the Hub is not downloaded for it.

Nothing here needs torch, and quantized checkpoints that no other verb can read can be looked at; those that others
can are shown as they are read, with what is on disk beside it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wtool.checkpoint import Checkpoint

app = typer.Typer(add_completion=False, rich_markup_mode=None)

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")  # of a layer or an expert, in a tensor's name
FORMATS = {
    ".safetensors": "safetensors",
    ".gguf": "GGUF",
    ".bin": "torch .bin",
    ".pt": "torch .bin",
    ".pth": "torch .bin",
}
# What a person wants to know of config.json, under the names the families give it.
CONFIG: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token"),
    "expert_ffn": ("moe_intermediate_size",),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
SHAPES = 3  # unlike shapes of a group that are told one by one


@app.command()
def inspect(
    reference: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="a folder, a weights file or a Hub id")],
    tensors: Annotated[bool, typer.Option("--tensors", help="list each tensor, not groups of layers")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Tell what a checkpoint holds: tensors, types, sizes, configuration. Reads headers only."""
    from wtool.checkpoint import open_checkpoint
    from wtool.console import emit_json

    checkpoint = open_checkpoint(reference, headers_only=True)
    facts = describe(checkpoint)
    rows = list_tensors(checkpoint) if tensors else group(checkpoint)
    if as_json:
        emit_json({**facts, "tensor_list" if tensors else "groups": rows})
    else:
        _print(facts, rows, tensors)


def describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    """A checkpoint in figures."""
    from wtool.checkpoint.base import LazyFiles
    from wtool.checkpoint.tied import head_name, is_tied

    identity = checkpoint.identity()
    by_dtype: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.nbytes
    tied = is_tied(checkpoint.config) if checkpoint.config else None
    head = head_name(checkpoint.tensors)
    twice = checkpoint.tensors[head].elements if tied and head else 0
    kind = _kind(file.name for file in identity)
    # the files of a GGUF are made from its inside, by transformers, which takes seconds
    inside = "GGUF" in kind and isinstance(checkpoint.files, LazyFiles)
    return {
        "checkpoint": checkpoint.label,
        "kind": kind,
        "revision": checkpoint.revision,
        "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.parameters - twice,
        "bytes": checkpoint.nbytes,
        "bytes_on_disk": sum(file.size for file in identity),
        "bytes_by_dtype": dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
        "config": config_summary(checkpoint.config),
        "tied": tied,
        "quantization": quantization(checkpoint),
        "decoded_from": checkpoint.quantization,
        "shards": [{"name": file.name, "bytes": file.size} for file in identity],
        "files": None if inside else sorted(checkpoint.files),
    }


def _kind(names: Iterable[str]) -> str:
    """The formats the weights are in, told from their files."""
    kinds: list[str] = []
    for name in names:
        kind = FORMATS.get(PurePath(name).suffix, PurePath(name).suffix)
        kinds.append("LoRA adapter" if name.startswith("adapter_") else kind)
    return " + ".join(dict.fromkeys(kinds))


def config_summary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The few entries of config.json that describe the network, under one name for all families."""
    from wtool.layer_rules import text_config

    entries = {**config, **text_config(config)}
    found = {key: config[key] for key in ("model_type", "architectures") if config.get(key) is not None}
    for key, names in CONFIG.items():
        value = next((entries[name] for name in names if entries.get(name) is not None), None)
        if value is not None:
            found[key] = value
    return found


def quantization(checkpoint: "Checkpoint") -> dict[str, Any] | None:
    """How the weights are packed; None for plain ones, and for those that are plain once they are read."""
    from wtool.checkpoint.quantized import refuse_quantized
    from wtool.errors import QuantizedInput

    try:
        refuse_quantized(checkpoint)
        return None
    except QuantizedInput:
        settings = checkpoint.config.get("quantization_config")
        settings = settings if isinstance(settings, dict) else {}
    plain = {key: value for key, value in settings.items() if isinstance(value, (str, int, float, bool))}
    return {"quant_method": "unnamed", **plain}


def list_tensors(checkpoint: "Checkpoint") -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
        for name, info in checkpoint.tensors.items()
    ]


def group(checkpoint: "Checkpoint") -> list[dict[str, Any]]:
    """The tensors by the pattern of their names, layer and expert numbers replaced by *."""
    groups: dict[str, dict[str, Any]] = {}
    for name, info in checkpoint.tensors.items():
        pattern = NUMBER.sub("*", name)
        entry = groups.setdefault(pattern, {"name": pattern, "count": 0, "dtypes": [], "shapes": [], "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += info.nbytes
        for key, value in (("dtypes", info.dtype), ("shapes", list(info.shape))):
            if value not in entry[key]:
                entry[key].append(value)
    return list(groups.values())


def _print(facts: Mapping[str, Any], rows: list[dict[str, Any]], tensors: bool) -> None:
    from wtool.console import emit, human_bytes, human_count, table

    types = ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in facts["bytes_by_dtype"].items())
    packed, decoded = facts["quantization"], facts["decoded_from"]
    head = ", head tied to the embedding" if facts["tied"] else ", head of its own" if facts["tied"] is False else ""
    count, on_disk = facts["parameters"], facts["bytes_on_disk"]
    smaller = f" unpacked, {human_bytes(on_disk)} on disk" if decoded or "GGUF" in facts["kind"] else ""
    lines = {
        "checkpoint": facts["checkpoint"],
        "kind": facts["kind"],
        "revision": facts["revision"],
        "stored values" if packed else "parameters": f"{human_count(count)} ({count:,}) in {facts['tensors']} tensors",
        "size": f"{human_bytes(facts['bytes'])}{smaller} ({types})",
        "quantized": ", ".join(f"{key} {value}" for key, value in packed.items()) if packed else decoded,
        **_network(facts["config"], head),
        "files": _files(facts["shards"], human_bytes),
        "beside": "the tokenizer is inside the file" if facts["files"] is None else ", ".join(facts["files"]),
    }
    for key, value in lines.items():
        if value:
            emit(f"{key:<14} {value}")
    if tensors:
        cells = [[row["name"], _shape(row["shape"]), row["dtype"], human_bytes(row["bytes"])] for row in rows]
        table(None, ["tensor", "shape", "type", "size"], cells)
    else:
        columns = ["tensors", "count", "shape", "type", "size"]
        table(None, columns, [_group_cells(row) for row in rows])


def _group_cells(row: Mapping[str, Any]) -> list[str]:
    from wtool.console import human_bytes

    return [row["name"], str(row["count"]), _shapes(row["shapes"]), ", ".join(row["dtypes"]), human_bytes(row["bytes"])]


def _network(config: Mapping[str, Any], head: str) -> dict[str, str]:
    """The configuration in two lines."""
    if not config:
        return {"model": "no config.json"}
    architectures = ", ".join(config.get("architectures") or [])
    figures = [
        f"{key.replace('_', ' ')} {value if isinstance(value, (int, str)) else 'varies'}"
        for key, value in config.items()
        if key not in ("model_type", "architectures")
    ]
    return {
        "model": f"{config.get('model_type', 'unnamed')}{f' ({architectures})' if architectures else ''}{head}",
        "network": ", ".join(figures),
    }


def _files(shards: list[dict[str, Any]], human_bytes: Any) -> str:
    if len(shards) > SHAPES:
        sizes = [shard["bytes"] for shard in shards]
        ends = f"{shards[0]['name']} … {shards[-1]['name']}"
        return f"{len(shards)} shards of {human_bytes(min(sizes))} to {human_bytes(max(sizes))} ({ends})"
    return ", ".join(f"{shard['name']} ({human_bytes(shard['bytes'])})" for shard in shards)


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _shapes(shapes: list[list[int]]) -> str:
    told = ", ".join(_shape(shape) for shape in shapes[:SHAPES])
    return f"{told}, … ({len(shapes)} shapes)" if len(shapes) > SHAPES else told
