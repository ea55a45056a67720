"""`wtool eval`: one command gives what the library gives, and says how."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import TEXT, llama, saved, tokenizer
from transformers import LlamaForCausalLM

from wtool.cli import run
from wtool.evaluate import evaluate


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:500], encoding="utf-8")
    return str(path)


def rounded() -> LlamaForCausalLM:
    """The fixture's model in float32 (`.bfloat16().float()` would round the rotary frequencies too)."""
    model = llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(saved(llama().bfloat16(), tmp_path / "model"))


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_is_what_the_library_gives(model: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capfd, model, "--text", text, "--window", "32", "--stride", "8", "--batch", "2")
    expected = evaluate(rounded(), tokenizer(), TEXT[:500], window=32, stride=8)
    (row,) = found["texts"]
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert (row["tokens"], row["windows"], row["window"], row["stride"]) == (expected.tokens, expected.windows, 32, 8)
    assert (row["file"], row["bos"], row["divergence"]) == (text, True, None)
    assert (found["dtype"], found["device"], found["reference"]) == ("float32", "cpu", None)
    assert capfd.readouterr().err == ""


def test_a_reference(model: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = str(saved(llama(seed=1), tmp_path / "other"))
    (row,) = evaluated(capfd, model, "--text", text, "--reference", other, "--device", "cpu")["texts"]
    expected = evaluate(rounded(), tokenizer(), TEXT[:500], reference=llama(seed=1))
    assert row["divergence"] == pytest.approx(expected.divergence, rel=1e-4)
    assert row["agreement"] == pytest.approx(expected.agreement)
    assert row["reference_perplexity"] == pytest.approx(expected.reference_perplexity, rel=1e-4)
    (row,) = evaluated(capfd, model, "--text", text, "--reference", model)["texts"]
    assert (row["divergence"], row["agreement"]) == (0.0, 1.0)


def test_shown_to_people(model: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    second = tmp_path / "second.txt"
    second.write_text(TEXT[500:700])
    arguments = ["--text", text, "--text", str(second), "--reference", model, "--dtype", "bf16", "--limit-tokens", "50"]
    assert run(["eval", model, *arguments]) == 0
    shown = capfd.readouterr()
    assert f"{model}: bfloat16 on cpu, windows of 64 tokens, stride 32, a BOS in front of each window" in shown.out
    assert shown.out.count("100.00%") == 2 and str(second) in shown.out and " 50 " in shown.out
    assert shown.err == "the window is 64 tokens, not 1024: the model has no more positions\n"


def test_a_tokenizer_from_the_reference(
    model: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = str(saved(llama(), tmp_path / "bare", with_tokenizer=False))
    assert run(["eval", bare, "--text", text]) == 3
    assert "no tokenizer beside the weights" in capfd.readouterr().err
    assert run(["eval", bare, "--text", text, "--reference", model, "--window", "64"]) == 0
    assert capfd.readouterr().err.endswith("that of the other model is taken\n")


def test_tokenizers_that_differ_are_refused(
    model: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = str(saved(llama(), tmp_path / "other", bos=False))
    assert run(["eval", model, "--text", text, "--reference", other]) == 3
    assert "the tokenizers of" in (error := capfd.readouterr().err) and "cannot be compared" in error


@pytest.mark.parametrize(
    "content, code, words",
    [
        (b"", 3, "nothing to score: the text is empty"),
        (b"\xff\xfe", 3, "not UTF-8 at byte 0"),
        (None, 3, "no such text file"),
    ],
)
def test_texts_that_are_none(
    content: bytes | None, code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(["eval", "unread/model", "--text", str(path)]) == code
    error = capfd.readouterr().err
    assert error.startswith(f"error: {path}: ") and words in error and error.count("\n") == 1


def test_a_text_of_one_token(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = str(saved(llama(), tmp_path / "model", bos=False))
    path = tmp_path / "one.txt"
    path.write_text("a")
    assert run(["eval", model, "--text", str(path)]) == 3
    assert capfd.readouterr().err == f"error: {path}: nothing to score: the text has one token, and nothing before it\n"


def test_usage(model: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, words in {
        ("--window", "8", "--stride", "9"): "--stride 9 is beyond --window 8",
        ("--dtype", "int8"): "dtype 'int8' is not one of",
        ("--device", "gpu"): "device 'gpu' is not one of auto, cpu, cuda",
    }.items():
        assert run(["eval", model, "--text", text, *arguments]) == 2
        assert words in capfd.readouterr().err
    assert run(["eval", model]) == 2
    assert "--text" in capfd.readouterr().err


def test_weights_that_are_not_finite(model: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    weights = Path(model) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, weights)
    assert run(["eval", model, "--text", text, "--json"]) == 5
    shown = capfd.readouterr()
    (row,) = json.loads(shown.out)["texts"]
    assert row["perplexity"] is None and row["nonfinite"] == row["tokens"]
    assert "the probability NaN or 0: weights that are not finite" in shown.err


def test_code_of_the_models_own_runs_only_when_asked(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own = Path(shutil.copytree(model, tmp_path / "own"))
    (own / "modeling_own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'it-ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config))
    assert run(["eval", str(own), "--text", text]) == 2
    assert "--trust-remote-code runs it" in capfd.readouterr().err and not (tmp_path / "it-ran").exists()
    (found,) = evaluated(capfd, str(own), "--text", text, "--trust-remote-code")["texts"]
    assert (tmp_path / "it-ran").exists()
    (expected,) = evaluated(capfd, model, "--text", text)["texts"]
    assert found["perplexity"] == expected["perplexity"]


def test_another_type(model: str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    exact = evaluated(capfd, model, "--text", text)["texts"][0]["perplexity"]
    found = evaluated(capfd, model, "--text", text, "--dtype", "bfloat16")
    assert found["dtype"] == "bfloat16"
    assert found["texts"][0]["perplexity"] == pytest.approx(exact, rel=0.1)
