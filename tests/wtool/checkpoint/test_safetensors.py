import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from wtool.checkpoint.safetensors import SafetensorsFile, read_header
from wtool.errors import MalformedFile


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_package_wrote(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "f16": torch.randn(2, 2, 2, generator=generator).half(),
        "i64": torch.arange(4),
        "bool": torch.tensor([True, False, True]),
        "f8": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(
            found.view(torch.uint8) if found.dim() else found, tensor.view(torch.uint8) if tensor.dim() else tensor
        )
        file.prefetch(name)
        file.forget(name)
        assert torch.equal(file.read(name).float(), tensor.float())


def test_reads_data_that_is_not_aligned(tmp_path):
    header = {"odd": entry(0, 1, "U8", [1]), "x": entry(1, 9, "F32", [2])}
    write(tmp_path / "x.safetensors", header, b"\7" + struct.pack("<2f", 1.5, -2.0))
    assert SafetensorsFile(tmp_path / "x.safetensors").read("x").tolist() == [1.5, -2.0]
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [1.5, -2.0]


CASES = {
    "too short": (b"123", "3 bytes is too short for a safetensors file"),
    "empty": (b"", "0 bytes is too short"),
    "header cut": (struct.pack("<Q", 1000) + b"{}", "cut short: the header needs 1,008 bytes, the file has 10"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}", "header length 1,152,921,504,606,846,976 is beyond"),
    "not JSON": (struct.pack("<Q", 4) + b"nope", "header is not valid JSON"),
    "not an object": (struct.pack("<Q", 2) + b"[]", "header is a JSON list, not an object"),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_files_are_named(tmp_path, case):
    content, message = CASES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(MalformedFile, match="x.safetensors: ") as caught:
        read_header(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


HEADERS = {
    "overlap": (
        {"a": entry(0, 8), "b": entry(4, 12)},
        12,
        "tensor 'b' at byte 4 overlaps the tensor before it (expected 8)",
    ),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "tensor 'b' at byte 12 leaves a hole before it"),
    "cut": ({"a": entry(0, 800)}, 100, "cut short: the header describes"),
    "tail": ({"a": entry(0, 8)}, 9, "has bytes after the last tensor"),
    "dtype": ({"a": entry(0, 8, "F7", [2])}, 8, "tensor 'a' has the unknown dtype 'F7'"),
    "size": ({"a": entry(0, 8, "F32", [3])}, 8, "tensor 'a' spans 8 bytes, but F32 [3] takes 12"),
    "negative": (
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        8,
        "needs dtype, shape and data_offsets",
    ),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "needs dtype, shape and data_offsets"),
    "backwards": ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [8, 0]}}, 8, "tensor 'a' spans -8 bytes"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_named(tmp_path, case):
    header, size, message = HEADERS[case]
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(MalformedFile) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_name_given_twice_is_refused(tmp_path):
    one = json.dumps(entry(0, 8))
    path = write(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8))
    with pytest.raises(MalformedFile, match="'a' is there twice"):
        read_header(path)
