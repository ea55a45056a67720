"""Models of the Hub that pass through this machine shard by shard: how much of them lies here at a time."""

import json
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Request
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved

from wtool.checkpoint.resolve import open_checkpoint
from wtool.cli import run


class Watched(list[Request]):
    """The requests of a server; when a shard is asked for, the bytes of shards that lie there are noted."""

    def __init__(self, folder: Path):
        self.folder, self.held = folder, [0]

    def append(self, request: Request) -> None:
        if request.path.startswith("/cdn/") and request.range is None and request.method == "GET":
            sizes = [path.stat().st_size for path in self.folder.rglob("*.safetensors")]
            self.held.append(sum(sizes) + request.sent)
        super().append(request)

    def whole(self) -> list[str]:
        return [r.path for r in self if r.path.startswith("/cdn/") and r.range is None and r.method == "GET"]


@pytest.fixture
def models(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Two models in many shards; the bytes of their shards."""
    monkeypatch.chdir(tmp_path)
    sizes = {}
    for seed, (name, shard) in enumerate((("a", "24KB"), ("b", "40KB"))):
        model = llama(seed, num_hidden_layers=6)
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        saved_beside = saved(llama(0), tmp_path / "tokenizer")
        for path in saved_beside.glob("token*"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        hub.add(f"org/{name}", tmp_path / name)
        sizes[name] = [path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")]
        assert len(sizes[name]) > 5
    return sizes


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "hf").rglob("*.safetensors")]


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "org/a", "org/b", "--method", "linear"],
        ["quantize", "org/a", "--method", "rtn", "-g", "16"],
        ["prune", "org/a", "--method", "magnitude", "--sparsity", "0.5"],
    ],
    ids=lambda command: command[0],
)
def test_never_more_than_a_few_shards_lie_here(hub, models, tmp_path, command):
    hub.requests = watched = Watched(tmp_path / ".low.wtool/downloads")
    assert run([*command, "-o", "low", "--low-disk", "--quiet"]) == 0
    used = [name for name in models if f"org/{name}" in command]
    shards = sum(len(models[name]) for name in used)
    assert len(set(watched.whole())) == shards and len(watched.whole()) == shards
    # two of each model, and where two models' shards are cut in unlike places one more of the other
    bound = sum(max(models[name]) * (2 if len(used) == 1 else 3) for name in used)
    total = sum(sum(models[name]) for name in used)
    assert max(watched.held) <= bound < 0.75 * total
    assert not cached(tmp_path) and not (tmp_path / ".low.wtool").exists()

    assert run([*command, "-o", "whole", "--quiet"]) == 0
    assert cached(tmp_path)
    assert same(tmp_path / "low", tmp_path / "whole")
    manifests = [json.loads((tmp_path / name / "wtool.json").read_text()) for name in ("low", "whole")]
    assert manifests[0] == manifests[1]


def test_what_is_in_the_cache_already_is_used_and_stays(hub, models, tmp_path):
    checkpoint = open_checkpoint("org/a")
    before = cached(tmp_path)
    gone = before[0]
    blob, gone_name = gone.resolve(), gone.name
    gone.unlink()
    blob.unlink()
    hub.requests = watched = Watched(tmp_path / ".low.wtool/downloads")
    assert run(["merge", "org/a", "--method", "passthrough", "-o", "low", "--low-disk", "--quiet"]) == 0
    assert [path.rpartition("/")[2] for path in watched.whole()] == [gone_name]
    assert sorted(cached(tmp_path)) == sorted(before[1:])
    assert len(load_file(tmp_path / "low/model.safetensors")) == len(checkpoint.tensors)


def test_a_work_that_was_stopped_fetches_only_what_is_left(hub, models, tmp_path, monkeypatch):
    from wtool.writer import Writer

    write, calls = Writer.note_done, []

    def stopping(self, tensors, note=None):
        write(self, tensors, note)
        calls.append(tensors)
        if len(calls) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "note_done", stopping)
    command = ["merge", "org/a", "--method", "passthrough", "-o", "low", "--low-disk", "--quiet", "--workers", "1"]
    assert run(command) == 130
    monkeypatch.setattr(Writer, "note_done", write)
    assert not (tmp_path / "low").exists()
    hub.requests = watched = Watched(tmp_path / ".low.wtool/downloads")
    assert run(command) == 0
    assert 0 < len(watched.whole()) < len(models["a"])
    assert not (tmp_path / ".low.wtool").exists() and not cached(tmp_path)
    assert run(["merge", "org/a", "--method", "passthrough", "-o", "whole", "--quiet"]) == 0
    assert same(tmp_path / "low", tmp_path / "whole")


def test_a_tensor_that_is_looked_at_beforehand_comes_alone(hub, models, tmp_path):
    checkpoint = open_checkpoint("org/a", low_disk=tmp_path / "place")
    name = "model.layers.3.mlp.up_proj.weight"
    hub.requests.clear()
    assert torch.equal(checkpoint.read(name), open_checkpoint(str(tmp_path / "a")).read(name))
    assert sum(request.sent for request in hub.requests) == checkpoint.tensors[name].nbytes
    assert not list((tmp_path / "place").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["quantize", "org/a", "--method", "gptq"], "a walk through the model"),
        (["prune", "org/a", "--method", "wanda", "--sparsity", "0.5"], "pruning by wanda"),
        (["prune", "org/a", "--layers", "2"], "pruning by structure"),
        (["quantize", "org/a", "--format", "gguf"], "writing GGUF"),
    ],
)
def test_work_that_reads_more_than_once_is_refused(hub, models, capsys, command, work):
    assert run([*command, "-o", "low", "--low-disk"]) == 2
    told = capsys.readouterr().err
    assert f"{work} reads more: leave it out" in told and told.count("\n") == 1
    assert all(request.range for request in hub.requests if request.path.startswith("/cdn/"))


def test_views_of_a_model_tell_it_what_they_will_read(hub, models, tmp_path):
    """Packed weights and adapters read other tensors than they are asked for."""
    assert run(["quantize", "a", "--method", "rtn", "-g", "16", "--shard-size", "24KB", "-o", "packed", "-q"]) == 0
    hub.add("org/packed", tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 3
    lora = tmp_path / "lora"
    lora.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.1.self_attn.o_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, lora / "adapter_model.safetensors")
    for far, near in (("org/packed", "packed"), ("org/a+lora", "a+lora")):
        hub.requests = watched = Watched(tmp_path / ".low.wtool/downloads")
        arguments = ["--method", "passthrough", "--force", "--quiet"]
        assert run(["merge", far, *arguments, "-o", "low", "--low-disk"]) == 0
        assert run(["merge", near, *arguments, "-o", "whole"]) == 0
        assert same(tmp_path / "low", tmp_path / "whole")
        shards = list((tmp_path / near.partition("+")[0]).glob("*.safetensors"))
        assert len(watched.whole()) == len(shards)
        assert max(watched.held) <= 2 * max(path.stat().st_size for path in shards)


def test_a_hub_that_is_lost_on_the_way_is_one_line(hub, models, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("wtool.checkpoint.hub_errors.TRIES", 1)
    hub.drop("model-00004-of-00011.safetensors", times=20)
    command = ["merge", "org/a", "--method", "passthrough", "-o", "low", "--low-disk", "--quiet"]
    capsys.readouterr()
    assert run(command) == 5
    told = capsys.readouterr().err
    assert told.startswith("error: org/a: ") and told.count("\n") == 1
    hub.drops.clear()
    assert run(command) == 0
    assert not (tmp_path / ".low.wtool").exists()
