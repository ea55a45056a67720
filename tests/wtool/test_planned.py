"""A plan as a checkpoint: what is read is what a run writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, saved
from torch import Tensor

from mergekit_lite.planner import plan_merge
from mergekit_lite.recipe import parse_recipe
from wtool.checkpoint import open_checkpoint
from wtool.checkpoint.base import TensorInfo
from wtool.errors import Mismatch, MissingInput, UsageError
from wtool.executors import local
from wtool.plan import Plan, Step, Told
from wtool.planned import planned


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    seeds = {"base": 0, "a": 1, "b": 2}
    return {name: str(saved(llama(seed).bfloat16(), tmp_path / name)) for name, seed in seeds.items()}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_it_is_what_is_written(method: str, models: dict[str, str], tmp_path: Path) -> None:
    recipe = {"merge_method": method, "base_model": models["base"], "models": [{"model": models[n]} for n in "ab"]}
    plan = plan_merge(parse_recipe(recipe | {"parameters": {"weight": 0.7}}, "here"))
    local.run(plan, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    with planned(plan, "out") as checkpoint:
        assert list(checkpoint.tensors) == list(plan.outputs) and set(checkpoint.tensors) == set(written)
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert torch.equal(tensor, written[name]) and tensor.dtype == written[name].dtype
            assert tuple(tensor.shape) == tuple(info.shape)
        assert checkpoint.config == json.loads((tmp_path / "out/config.json").read_bytes())
        for name, path in checkpoint.files.items():
            assert path.read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert checkpoint.identity() and checkpoint.folders()
        with pytest.raises(MissingInput, match="out: no tensor 'model.norm.weigth'; did you mean 'model.norm.weight'"):
            checkpoint.read("model.norm.weigth")


def halves(tensor: Tensor) -> Told:
    return Told((tensor[:1], tensor[1:]), {"told": 1})


def test_steps_of_several_outputs_and_files_made_up(models: dict[str, str]) -> None:
    source = open_checkpoint(models["a"])
    name = "model.norm.weight"
    info = source.tensors[name]
    outputs = {"head": TensorInfo(info.dtype, (1,)), "tail": TensorInfo(info.dtype, (info.shape[0] - 1,))}
    plan = Plan((source,), (Step(((0, name),), outputs, halves),), {"tokenizer.json": b"{}"}, {})
    with planned(plan, "two") as checkpoint:
        both = torch.cat([checkpoint.read("head"), checkpoint.read("tail")])
        assert torch.equal(both, source.read(name)) and checkpoint.config == {}
        path = checkpoint.files["tokenizer.json"]
        assert path.read_bytes() == b"{}"
    assert not path.exists()


def test_what_cannot_be_read(models: dict[str, str]) -> None:
    source = open_checkpoint(models["a"])
    walk = Plan((source,), (Step((), {"x": TensorInfo("F32", (1,))}, None),), {}, {})
    with pytest.raises(UsageError, match="walk: comes out of a walk through the model"), planned(walk, "walk"):
        pass
    with pytest.raises(Mismatch, match="no way"), planned(Plan((), (), {}, {}, problems=["no way"]), "none"):
        pass
