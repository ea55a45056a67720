"""Sketches of outputs: the files that the work will write, all but the numbers."""

import json
from pathlib import Path

import pytest
from tiny_models import llama, saved

from wtool.cli import run


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "model", "model", "--shard-size", "100kB"],
        ["quantize", "model", "--method", "rtn", "--group-size", "16"],
        ["quantize", "model", "--format", "gguf", "--type", "Q8_0"],
        ["prune", "model", "--method", "magnitude", "--sparsity", "0.5"],
        ["prune", "model", "--layers", "0,2"],
        ["distill", "model", "model", "--data", "text.txt", "--steps", "1", "--seqlen", "8"],
    ],
)
def test_a_sketch_is_the_output_without_its_numbers(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(llama(num_hidden_layers=3), tmp_path / "model")
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    assert run([*command, "--sketch", "sketch"]) == 0
    assert run([*command, "-o", "out", "--quiet"]) == 0
    capsys.readouterr()
    made = {path.name: path.stat().st_size for path in Path("out").iterdir()}
    sketched = {path.name: path.stat().st_size for path in Path("sketch").iterdir()}
    named = {name for name in sketched if name.endswith((".safetensors", ".gguf"))}
    assert named and {name: sketched[name] for name in named} == {name: made[name] for name in named}
    assert sketched.keys() - {"README.md"} == made.keys() - {"README.md", "wtool.json"}
    assert Path("sketch/config.json").exists() == Path("out/config.json").exists()
    if Path("out/config.json").exists():
        assert Path("sketch/config.json").read_bytes() == Path("out/config.json").read_bytes()
        told = []
        for folder in ("sketch", "out"):
            assert run(["inspect", folder, "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            told.append({key: value for key, value in found.items() if key not in ("checkpoint", "files")})
        assert told[0] == told[1]
