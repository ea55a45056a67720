import json

import pytest
import torch
from safetensors.torch import save_file

from wtool.checkpoint import open_checkpoint
from wtool.errors import MalformedFile, MissingInput


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for shard, name in (("one.safetensors", "a"), ("two.safetensors", "b")):
        save_file({name: torch.ones(2)}, folder / shard)
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_checkpoint(sharded):
    checkpoint = open_checkpoint(str(sharded))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.read("b").tolist() == [1.0, 1.0]
    assert checkpoint.config == {"model_type": "llama"}
    assert [file.name for file in checkpoint.identity()] == ["one.safetensors", "two.safetensors"]


def test_a_single_file_is_a_checkpoint(sharded):
    assert list(open_checkpoint(str(sharded / "one.safetensors")).tensors) == ["a"]


def test_of_several_weights_transformers_choice_counts(sharded):
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    assert list(open_checkpoint(str(sharded)).tensors) == ["a", "b"]
    save_file({"c": torch.ones(2)}, sharded / "model.safetensors")
    assert list(open_checkpoint(str(sharded)).tensors) == ["c"]


def test_a_missing_tensor_has_a_neighbour(sharded):
    save_file({"model.norm.weight": torch.ones(1)}, sharded / "three.safetensors")
    with pytest.raises(MissingInput, match="no tensor 'model.norm.wieght'; did you mean 'model.norm.weight'?"):
        open_checkpoint(str(sharded / "three.safetensors")).read("model.norm.wieght")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "names the shard 'three.safetensors', which is not there"),
        ({"a": "../secret.safetensors"}, "names the file '../secret.safetensors', which is outside its folder"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd', which is outside its folder"),
        (
            {"a": "one.safetensors", "c": "two.safetensors"},
            "says tensor 'c' is in two.safetensors, which does not hold",
        ),
        ({"a": "one.safetensors"} | {"a": "two.safetensors"}, "says tensor 'a' is in two.safetensors"),
        (["a"], "needs a 'weight_map'"),
    ],
)
def test_an_index_that_lies_is_named(sharded, weight_map, message):
    write_index(sharded, weight_map)
    with pytest.raises((MalformedFile, MissingInput)) as caught:
        open_checkpoint(str(sharded))
    assert message in str(caught.value) and "model.safetensors.index.json" in str(caught.value)


def test_a_tensor_the_index_forgets_is_named(sharded):
    save_file({"b": torch.ones(2), "c": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(MalformedFile, match="does not name tensor 'c', which two.safetensors holds"):
        open_checkpoint(str(sharded))


def test_nothing_there(tmp_path):
    with pytest.raises(MissingInput, match="no weights there"):
        open_checkpoint(str(tmp_path))


def test_no_such_folder_has_a_neighbour(sharded):
    with pytest.raises(MissingInput, match="modle: no such file or folder; did you mean 'model'?"):
        open_checkpoint(str(sharded.parent / "modle"))


def test_an_adapter_alone_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingInput, match="a LoRA adapter, not a model; name its base with it"):
        open_checkpoint(str(tmp_path))


def test_damaged_configuration_is_named(sharded):
    (sharded / "config.json").write_text("{")
    with pytest.raises(MalformedFile, match="config.json: not valid JSON"):
        open_checkpoint(str(sharded))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(MalformedFile, match="not a kind of weights file known here"):
        open_checkpoint(str(tmp_path / "x.npz"))


def test_code_belongs_to_a_model_that_says_so(sharded):
    (sharded / "modeling.py").write_text("")
    assert "modeling.py" not in open_checkpoint(str(sharded)).files
    (sharded / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    assert "modeling.py" in open_checkpoint(str(sharded)).files
