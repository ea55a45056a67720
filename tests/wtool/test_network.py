"""The model as blocks: what is filled is what transformers itself loads."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, saved_family
from safetensors.torch import load_file, save_file

from wtool.checkpoint import open_checkpoint
from wtool.errors import InputError, MissingInput
from wtool.linear_names import linear_layers
from wtool.network import Network, Regions


def network(folder: Path) -> Network:
    return Network(open_checkpoint(str(folder)), dtype="F32")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_filled_block_has_the_weights_of_the_model_and_an_emptied_one_none(name: str, tmp_path: Path) -> None:
    model = saved_family(name, tmp_path)
    ours = network(tmp_path)
    expected = dict(model.named_parameters())
    assert len(ours.blocks) == model.config.num_hidden_layers
    assert not ours.unknown
    for block in ours.blocks:
        with ours.filled(block):
            for inner, parameter in block.module.named_parameters():
                torch.testing.assert_close(parameter.data, expected[f"{block.name}.{inner}"].data, rtol=0, atol=0)
        assert all(parameter.is_meta for parameter in block.module.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_view_is_the_stored_matrix_and_writing_to_it_changes_the_model(name: str, tmp_path: Path) -> None:
    saved_family(name, tmp_path)
    ours = network(tmp_path)
    block = ours.blocks[-1]
    with ours.filled(block):
        before = [parameter.clone() for parameter in block.module.parameters()]
        for linear in block.linears:
            view, stored = ours.view(linear), ours.read(linear.name)
            assert view.shape == linear.shape
            assert torch.equal(view, stored.T if linear.slot.transposed else stored)
            view.mul_(2)
        changed = sum(
            int((now != was).sum()) for now, was in zip(block.module.parameters(), before, strict=True) if now.ndim > 1
        )
    assert changed == sum(linear.shape[0] * linear.shape[1] for linear in block.linears)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_alone_tell_the_linears_that_the_model_has(name: str, tmp_path: Path) -> None:
    saved_family(name, tmp_path)
    ours = network(tmp_path)
    found, _ = linear_layers(ours.checkpoint)
    assert {layer.tensor: layer.shape for layer in found.values()} == {
        linear.name: linear.shape for block in ours.blocks for linear in block.linears
    }


def test_experts_that_transformers_fuses_are_found_under_their_names_on_disk(tmp_path: Path) -> None:
    saved_family("qwen3_moe", tmp_path)
    block = network(tmp_path).blocks[0]
    names = {linear.name for linear in block.linears if "experts" in linear.name}
    assert names == {
        f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"
        for expert in range(4)
        for kind in ("gate", "up", "down")
    }
    assert block.fused


def test_memory_is_told_by_the_linears_it_is_made_of(tmp_path: Path) -> None:
    saved_family("mixtral", tmp_path)
    ours = network(tmp_path)
    block = ours.blocks[0]
    with ours.filled(block):
        regions = Regions(ours, block.linears)
        experts = block.module.get_submodule("mlp.experts")
        gate_up = experts.get_parameter("gate_up_proj").data
        assert [linear.name[-9:-7] for linear in regions.of(gate_up[2])] == ["w1", "w3"]
        assert all(".2." in linear.name for linear in regions.of(gate_up[2]))
        assert not regions.of(gate_up[2, 1:])  # a part of a matrix is none
        assert not regions.of(torch.zeros(48, 32))


def test_rows_of_an_embedding_that_are_looked_up_are_read_in_every_batch(tmp_path: Path) -> None:
    model = saved_family("gemma3_text", tmp_path)  # its embedding scales what it looks up
    ours = network(tmp_path)
    embedding = ours.model.get_input_embeddings()
    with torch.inference_mode(), ours.filled_on_demand():
        for ids in (torch.tensor([[3, 5, 3]]), torch.tensor([[7, 200]])):
            assert torch.equal(embedding(ids), model.get_input_embeddings()(ids))
    assert embedding.weight.is_meta


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    saved_family("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = network(tmp_path)
    with ours.filled(ours.blocks[0]):
        pass
    with pytest.raises(MissingInput, match=r"lacks the weights of 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        with ours.filled(ours.blocks[1]):
            pass


def test_a_shape_that_config_json_does_not_ask_for_is_named(tmp_path: Path) -> None:
    saved_family("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    ours = network(tmp_path)
    with pytest.raises(
        InputError, match=r"gives \[32, 48\] for '.*down_proj.weight', but config.json asks for \[32, 64"
    ):
        with ours.filled(ours.blocks[0]):
            pass


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    from tiny_models import saved
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=320)
    saved(T5ForConditionalGeneration(config), tmp_path, with_tokenizer=False)
    with pytest.raises(InputError, match="t5 has an encoder and a decoder"):
        network(tmp_path)
