"""The pipelines in examples/, run as they stand on small trained models; SmolLM2 is for `benchmarks/pipeline.py`."""

import json
import shutil
from pathlib import Path

import pytest

from wtool.cli import run
from wtool.commands.demo import MODELS
from wtool.demo.texts import held_out_text, training_documents

EXAMPLES = Path(__file__).parents[2] / "examples" / "pipelines"
SMALL = {"samples": 8, "seqlen": 64, "steps": 4}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, name in (("base", "base"), ("docs", "first"), ("code", "second")):
        shutil.copytree(MODELS / source, tmp_path / name)
    shutil.copytree(MODELS / "docs-lora", tmp_path / "lora")
    shutil.copytree(MODELS / "docs", tmp_path / "model")
    (tmp_path / "train.txt").write_text("\n\n".join(list(training_documents("docs").values())[:20]), encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(held_out_text("docs", 4000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def rows(name: str, capsys: pytest.CaptureFixture[str], **variables: object) -> list[dict[str, object]]:
    """The results of an example."""
    given = [part for key, value in variables.items() for part in ("--set", f"{key}={value}")]
    assert run(["run", str(EXAMPLES / name), "-o", "out", "--json", "--quiet", *given]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_three_experts_become_one_that_two_runtimes_load(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"third": "./base+./lora", "layers": 3, "ffn": 256, "group_size": 32}
    found = {row["stage"]: row for row in rows("three-experts.yaml", capsys, **SMALL, **sizes)}
    assert all(row["status"] == "done" for row in found.values())
    assert found["healed"]["held-out KL"] < found["slim"]["held-out KL"]
    assert found["merged"]["held-out perplexity"] < found["of_base"]["held-out perplexity"]
    assert len(list(Path("out/llama_cpp").glob("*.gguf"))) == 1
    assert json.loads(Path("out/vllm/config.json").read_bytes())["quantization_config"]["format"] == "pack-quantized"
    page = Path("out/page.html").read_text(encoding="utf-8")
    assert all(stage in page for stage in ("merged", "slim", "healed", "vllm", "llama_cpp"))


def test_bits_and_methods_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows("bits-and-methods.yaml", capsys, samples=8, seqlen=64, group_size=32)
    assert [(row["bits"], row["method"]) for row in found] == [
        (bits, method) for bits in (4, 3) for method in ("rtn", "gptq", "awq")
    ]
    assert all(0 < row["held-out KL"] < 1 for row in found)


def test_a_pruned_model_recovers(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = (EXAMPLES / "prune-and-recover.yaml").read_text().replace("[27, 24]", "[3, 2]")
    Path("smaller.yaml").write_text(pipeline)
    found = rows(str(Path("smaller.yaml").resolve()), capsys, **SMALL)
    lost = {row["layers"]: row["held-out KL"] for row in found if row["stage"] == "pruned"}
    for row in found:
        if row["stage"] == "recovered":
            assert row["held-out KL"] < lost[row["layers"]]


def test_a_cut_in_rounds_is_beside_the_same_cut_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["stage"]: row for row in rows("prune-in-rounds.yaml", capsys, **SMALL, first=3, last=2)}
    lost = {stage: row["held-out KL"] for stage, row in found.items() if row.get("held-out KL") is not None}
    assert lost["in_rounds"] < lost["rest"] and lost["at_once"] < lost["whole_cut"]
