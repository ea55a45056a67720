"""Which files of a folder go to the Hub, and which weights there they replace."""

import pytest

from wtool.checkpoint.hub_push import contents, stale_weights


def test_what_belongs_to_a_checkpoint_goes(tmp_path):
    belongs = {
        "model-00001-of-00002.safetensors": 3,
        "model.safetensors.index.json": 2,
        "config.json": 2,
        "generation_config.json": 1,
        "tokenizer.json": 5,
        "tokenizer.model": 4,
        "chat_template.jinja": 1,
        "modeling_tiny.py": 2,
        "wtool.json": 7,
        "README.md": 0,
        "LICENSE": 1,
        "model-Q4_K_M.gguf": 9,
        "adapter_config.json": 1,
    }
    others = ["notes.txt", "training_args.bin", "optimizer.pt", "checkpoint-500"]
    for name, size in belongs.items():
        (tmp_path / name).write_bytes(b"x" * size)
    for name in others[:-1]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / others[-1]).mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".gitattributes").write_bytes(b"x")
    found = contents(tmp_path)
    assert found.files == belongs
    assert sorted(found.left) == sorted(others)


@pytest.mark.parametrize(
    ("there", "new", "gone"),
    [
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            ["model.safetensors", "config.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (["model.safetensors", "config.json"], ["model.safetensors", "config.json"], []),
        (["pytorch_model.bin", "vocab.txt"], ["model.safetensors"], ["pytorch_model.bin"]),
        (["m-Q8_0.gguf", "onnx/model.safetensors"], ["model.safetensors"], []),
        (["model.safetensors", "m-Q8_0.gguf"], ["m-Q4_K_M.gguf"], []),
        ([], ["model.safetensors"], []),
    ],
)
def test_weights_that_would_be_loaded_in_the_place_of_the_new_ones_go(there, new, gone):
    assert stale_weights(there, new) == gone
