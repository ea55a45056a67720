"""Weights that lie in parts: whole again on reading, or every contradiction told in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, saved

from wtool.checkpoint import TensorInfo, open_checkpoint
from wtool.checkpoint.quantized import refuse_quantized
from wtool.cli import run
from wtool.errors import InputError, MalformedFile, MissingInput, QuantizedInput
from wtool.formats import bitmask
from wtool.loading import load_model, quiet

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def is_linear(name: str) -> bool:
    return name.endswith("proj.weight")


def rewritten(source: Path, target: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A checkpoint with other tensors and settings."""
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A llama of whose linears every third weight is 0."""
    folder = saved(llama(hidden_size=20, num_attention_heads=2, num_key_value_heads=1), tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    for name in filter(is_linear, tensors):
        tensors[name].view(-1)[::3] = 0
    return rewritten(folder, tmp_path / "model", tensors)


def packed(source: Path, target: Path) -> Path:
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        parts = bitmask.pack(tensor) if is_linear(name) else {"weight": tensor}
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()}
    return rewritten(source, target, tensors, quantization_config=bitmask.settings(1 / 3))


def factored(source: Path, target: Path, rank: int = 5) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with two weights as random factors, and what they stand for."""
    tensors, whole = load_file(source / "model.safetensors"), {}
    for seed, layer in enumerate((Q, V)):
        rows, columns = tensors.pop(f"{layer}.weight").shape
        generator = torch.Generator().manual_seed(seed)
        u, v = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        tensors |= {f"{layer}.low_rank_u": u.bfloat16(), f"{layer}.low_rank_v": v.bfloat16()}
        whole[f"{layer}.weight"] = u.bfloat16().double() @ v.bfloat16().double()
    return rewritten(source, target, tensors, wtool_low_rank={Q: rank, V: rank}), whole


def test_bitmasks_look_like_a_plain_checkpoint(model: Path, tmp_path: Path) -> None:
    plain, found = open_checkpoint(str(model)), open_checkpoint(str(packed(model, tmp_path / "packed")))
    assert dict(found.tensors) == dict(plain.tensors) and found.config == plain.config
    assert found.quantization == "sparse-bitmask in 14 layer(s)" and plain.quantization is None
    refuse_quantized(found)
    for name in plain.tensors:
        found.prefetch(name)
        assert torch.equal(found.read(name), plain.read(name)) and found.read(name).dtype == plain.read(name).dtype
        found.forget(name)
    assert [file.name for file in found.identity()] == ["model.safetensors"]
    assert found.folders() == [(tmp_path / "packed").resolve()]
    with pytest.raises(MissingInput, match=f"no tensor '{Q}.bitmask'"):
        found.read(f"{Q}.bitmask")


def test_factors_look_like_a_plain_checkpoint(model: Path, tmp_path: Path) -> None:
    folder, whole = factored(model, tmp_path / "factored")
    plain, found = open_checkpoint(str(model)), open_checkpoint(str(folder))
    assert set(found.tensors) == set(plain.tensors) and found.config == plain.config
    assert found.tensors[f"{V}.weight"] == TensorInfo("BF16", (10, 20))
    assert found.quantization == "low rank in 2 layer(s)"
    refuse_quantized(found)
    for name in plain.tensors:
        if name in whole:
            torch.testing.assert_close(found.read(name).double(), whole[name], rtol=1e-5, atol=1e-5)
            assert found.read(name).dtype == torch.float32
        else:
            assert torch.equal(found.read(name), plain.read(name))


def test_both_at_once(model: Path, tmp_path: Path) -> None:
    folder, whole = factored(model, tmp_path / "factored")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weight = tensors.pop(f"{name}.weight")
    tensors |= {f"{name}.{suffix}": part for suffix, part in bitmask.pack(weight).items()}
    both = rewritten(folder, tmp_path / "both", tensors, quantization_config=bitmask.settings(1 / 3))
    found = open_checkpoint(str(both))
    assert found.quantization == "sparse-bitmask in 1 layer(s); low rank in 2 layer(s)"
    assert torch.equal(found.read(f"{name}.weight"), weight) and f"{Q}.weight" in found.tensors
    assert set(found.tensors) == set(open_checkpoint(str(model)).tensors)


def test_a_model_can_be_loaded_from_either(model: Path, tmp_path: Path) -> None:
    ids = torch.arange(12)[None]
    folder, whole = factored(model, tmp_path / "factored")
    expected = load_file(model / "model.safetensors") | {name: weight.float() for name, weight in whole.items()}
    multiplied = rewritten(model, tmp_path / "multiplied", expected)
    with torch.no_grad(), quiet():
        for parts, plain in ((packed(model, tmp_path / "packed"), model), (folder, multiplied)):
            ours, theirs = (load_model(open_checkpoint(str(path)), dtype="F32") for path in (parts, plain))
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_other_verbs_take_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", str(model), str(packed(model, tmp_path / "packed")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def forget(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: [tensors.pop(f"{Q}.{name}") for name in names] and None


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (forget("compressed"), MissingInput, f"no tensor '{Q}.compressed': its weight lies in parts"),
        (forget("shape"), MissingInput, f"no tensor '{Q}.shape'"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(1)}), MalformedFile, "has both 'weight' and its parts"),
        (lambda t: t.update({f"{Q}.shape": torch.tensor([20, 40])}), MalformedFile, "is U8 [20, 3], not U8 [20, 5]"),
        (lambda t: t.update({f"{Q}.shape": torch.zeros(3)}), MalformedFile, "is F32 [3], not I64 [2]"),
        (lambda t: t.update({f"{Q}.bitmask": torch.zeros(3)}), MalformedFile, "is F32 [3], not U8 of 2 dimensions"),
        (
            lambda t: t.update({f"{Q}.row_offsets": torch.zeros(20, dtype=torch.int32)}),
            MalformedFile,
            "is I32 [20], not I64 [20] for [20, 20]",
        ),
    ],
)
def test_bitmasks_that_contradict_themselves(
    model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[InputError], told: str
) -> None:
    tensors = load_file(packed(model, tmp_path / "packed") / "model.safetensors")
    change(tensors)
    broken = rewritten(tmp_path / "packed", tmp_path / "broken", tensors)
    with pytest.raises(error) as raised:
        open_checkpoint(str(broken))
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_values_that_do_not_fit_the_bits_are_told_on_reading(model: Path, tmp_path: Path) -> None:
    tensors = load_file(packed(model, tmp_path / "packed") / "model.safetensors")
    tensors[f"{Q}.compressed"] = tensors[f"{Q}.compressed"][1:].clone()
    broken = open_checkpoint(str(rewritten(tmp_path / "packed", tmp_path / "broken", tensors)))
    with pytest.raises(MalformedFile, match=f"'{Q}': bitmask keeps 266 weights, compressed holds 265"):
        broken.read(f"{Q}.weight")


@pytest.mark.parametrize(
    ("ranks", "error", "told"),
    [
        ({Q: 6, V: 5}, MalformedFile, f"'{Q}.low_rank_u' is BF16 [20, 5], not [outputs, 6] of a float type"),
        ({Q: 5, V: 5, "lm_head": 5}, MissingInput, "no tensor 'lm_head.low_rank_u'"),
        ([Q, V], MalformedFile, "wtool_low_rank is not an object of layers and ranks"),
        ({Q: "5"}, MalformedFile, "wtool_low_rank is not an object of layers and ranks"),
    ],
)
def test_ranks_that_contradict_the_tensors(
    model: Path, tmp_path: Path, ranks: Any, error: type[InputError], told: str
) -> None:
    folder, _ = factored(model, tmp_path / "factored")
    broken = rewritten(folder, tmp_path / "broken", load_file(folder / "model.safetensors"), wtool_low_rank=ranks)
    with pytest.raises(error) as raised:
        open_checkpoint(str(broken))
    assert told in str(raised.value)


def test_parts_without_the_words_for_them_are_not_taken_for_plain(model: Path, tmp_path: Path) -> None:
    folder, _ = factored(model, tmp_path / "factored")
    parts = (folder, packed(model, tmp_path / "packed"))
    for number, path in enumerate(parts):
        tensors = load_file(path / "model.safetensors")
        silent = open_checkpoint(str(rewritten(model, tmp_path / f"silent{number}", tensors)))
        with pytest.raises(QuantizedInput, match="it cannot be read as plain weights"):
            refuse_quantized(silent)
