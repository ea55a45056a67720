"""`wtool distill` and `wtool teacher-cache` as a user runs them: caches, recipes, refusals."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from distilled import manifest, weights
from tiny_models import VOCABULARY, llama, saved, tokenizer

from distill.signal_cache import Cache
from wtool.cli import run

Distill = Callable[..., Path]
TEXT = ["--seqlen", "32", "--samples", "24"]


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return saved(llama(7, num_hidden_layers=1, hidden_size=48, intermediate_size=64), tmp_path / "student")


@pytest.fixture
def cache(teacher: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    def go(*flags: str, name: str = "cache") -> Path:
        out = tmp_path / name
        assert run(["teacher-cache", str(teacher), "--data", str(text), *TEXT, *flags, "-o", str(out), "--quiet"]) == 0
        return out

    return go


def trained(teacher: Path, student: Path, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    settings = ["--steps", "4", "--lr", "1e-2", "--optimizer", "sgd", "--evaluate-every", "4", "--held-out", "4"]
    assert run(["distill", str(teacher), str(student), *settings, *flags, "-o", str(out), "--quiet"]) == 0
    return weights(out)


@pytest.mark.parametrize("loss", ["forward-kl", "jsd", "reverse-kl"])
def test_all_that_a_teacher_said_trains_as_the_teacher_itself(
    cache: Callable[..., Path], teacher: Path, student: Path, text: Path, tmp_path: Path, loss: str
) -> None:
    signals = cache("--top-k", str(VOCABULARY))
    flags = ["--loss", loss, "--ce", "0.2"]
    online = trained(teacher, student, tmp_path / "online", *flags, "--data", str(text), *TEXT)
    cached = trained(signals, student, tmp_path / "cached", *flags)
    start = {name: each for name, each in weights(student).items()}
    for name, tensor in online.items():
        moved = float((tensor - start[name]).abs().max())
        torch.testing.assert_close(cached[name], tensor, rtol=0, atol=0.02 * moved + 1e-7)
    ours, theirs = (manifest(tmp_path / name)["evaluation"][-1]["kl"] for name in ("cached", "online"))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_a_few_tokens_and_the_tail_teach_nearly_as_well(
    cache: Callable[..., Path], student: Path, tmp_path: Path
) -> None:
    signals = cache("--top-k", "16")
    trained(signals, student, tmp_path / "out", "--steps", "20", "--optimizer", "adamw")
    first, last = manifest(tmp_path / "out")["evaluation"][0], manifest(tmp_path / "out")["evaluation"][-1]
    assert last["kl"] < 0.8 * first["kl"]
    assert manifest(tmp_path / "out")["cache"]["signals"]["k"] == 16


def test_a_sample_teaches_too(cache: Callable[..., Path], student: Path, tmp_path: Path) -> None:
    signals = cache("--mode", "sample", "--top-k", "24")
    trained(signals, student, tmp_path / "out", "--steps", "20", "--optimizer", "adamw")
    first, last = manifest(tmp_path / "out")["evaluation"][0], manifest(tmp_path / "out")["evaluation"][-1]
    assert last["kl"] < 0.9 * first["kl"]


def test_a_streamed_teacher_says_the_same(cache: Callable[..., Path]) -> None:
    whole, streamed = Cache(cache(name="whole")), Cache(cache("--stream", name="streamed"))
    numbers = list(range(len(whole.windows)))
    ours, theirs = whole.targets(numbers), streamed.targets(numbers)
    assert [each.tolist() for each in whole.windows] == [each.tolist() for each in streamed.windows]
    same = (ours.ids == theirs.ids).float().mean()
    assert same > 0.99  # but for equals
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=0.02)


def test_a_cache_of_another_seed_or_size_is_another(cache: Callable[..., Path], teacher: Path, text: Path) -> None:
    out = cache()
    before = (out / "wtool.json").stat().st_mtime_ns
    cache()
    assert (out / "wtool.json").stat().st_mtime_ns == before
    command = ["teacher-cache", str(teacher), "--data", str(text), *TEXT, "-o", str(out), "--quiet"]
    assert run([*command, "-k", "8"]) == 4
    assert run([*command, "-k", "8", "--force"]) == 0
    assert Cache(out).kind.k == 8


def test_a_streamed_teacher_teaches_as_one_in_memory(distill: Distill) -> None:
    plain, streamed = distill(name="plain"), distill("--stream-teacher", name="streamed")
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(streamed)[name], tensor, rtol=0, atol=1e-5)


def test_documents_are_kept_apart_on_request(distill: Distill, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"for {number} in range: pass"}) + "\n" for number in range(60)))
    together = distill("--data", str(rows), name="together")
    apart = distill("--data", str(rows), "--separate", name="apart")
    assert any(not torch.equal(tensor, weights(apart)[name]) for name, tensor in weights(together).items())


def test_the_manifest_s_recipe_makes_it_again(distill: Distill, tmp_path: Path) -> None:
    out = distill("--loss", "skew-kl", "--alpha", "0.2", "--ce", "0.5")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(manifest(out)["recipe"]))
    again = tmp_path / "again"
    assert run(["distill", str(recipe), "-o", str(again), "--quiet"]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_a_plan_is_shown_and_nothing_trained(
    teacher: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["distill", str(teacher), "--student-layers", "2", "--data", str(text), "--seqlen", "32", "--dry-run"]
    assert run([*command, "--tokens", "1000", "--batch", "2", "--accumulation", "4"]) == 0
    shown = capsys.readouterr().out
    assert "5 steps of 248 tokens" in shown and "no problem found" in shown
    assert run([*command, "--epochs", "2", "--samples", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["windows"] == 16 and told["held_out_windows"] == 4
    assert told["steps"] == 8 and told["student_layers"] == 2
    assert told["tokens"] == 2 * 16 * 31


def test_the_result_is_told_as_json(
    teacher: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["distill", str(teacher), "--student-layers", "2", "--data", str(text), "--seqlen", "32", "--steps", "2"]
    assert run([*command, "-o", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in told["evaluation"]] == [0, 1, 2]
    assert told["tokens_per_second"] > 0 and told["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "one student is needed, none is given"),
        (["--student-layers", "2", "--student-config", "x"], 2, "student_layers and student_config are given"),
        (["--student-layers", "9"], 2, "9 student layers: the teacher has 4"),
        (["--student-layers", "a"], 2, "give how many layers (15), or their numbers with commas (0,2,5)"),
        (["--student-layers", "2", "--loss", "foward-kl"], 2, "no loss 'foward-kl'; did you mean 'forward-kl'?"),
        (["--student-layers", "2", "--optimizer", "adamv"], 2, "no optimizer 'adamv'; did you mean 'adamw'?"),
        (["--student-layers", "2", "--schedule", "cosin"], 2, "no schedule 'cosin'; did you mean 'cosine'?"),
        (["--student-layers", "2", "--steps", "2", "--epochs", "1"], 2, "both say how long to train"),
        (["--student-layers", "2", "--beta", "2", "--loss", "jsd"], 2, "less than or equal to 1"),
        (["--student-layers", "2", "--kd", "0"], 2, "there is nothing to learn"),
        (["--student-layers", "2", "--data", "nowhere.txt"], 3, "nowhere.txt: no such"),
        (["--student-layers", "2", "--optimizer-arg", "x"], 2, "write NAME=VALUE"),
        (["--student-layers", "2", "--hidden", "cosin"], 2, "'loss.hidden'"),
        (["--student-layers", "2", "--teacher-4bit", "--stream-teacher"], 2, "a streamed teacher is not quantized"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    out = tmp_path / "out"
    assert run(["distill", str(teacher), *flags, "-o", str(out), "--quiet"]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_what_a_cache_cannot_do_is_told(
    cache: Callable[..., Path], student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    signals = cache()
    other = tmp_path / "other"
    saved(llama(7, num_hidden_layers=1), other, with_tokenizer=False)
    changed = json.loads(tokenizer().backend_tokenizer.to_str())
    changed["model"]["vocab"]["ZZ"] = changed["model"]["vocab"].pop(next(reversed(changed["model"]["vocab"])))
    changed["model"]["merges"] = []
    tokenizer().save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(changed))
    for whose, flags, message in [
        (student, ["--temperature", "2"], "was made at temperature 1.0, but 2.0 is asked for"),
        (student, ["--hidden", "mse"], "not its hidden states"),
        (student, ["--on-policy", "0.5"], "knows nothing of what the student will write"),
        (student, ["--data", str(text)], "a cache brings its own text"),
        (student, ["--separate"], "kept apart any more"),
        (other, [], "has another tokenizer than the teacher"),
    ]:
        assert run(["distill", str(signals), str(whose), *flags, "--dry-run"]) in (2, 3)
        assert message in capsys.readouterr().err
    assert run(["distill", str(signals), "--student-layers", "2", "--dry-run"]) == 2
    assert "holds what a teacher said, not its layers" in capsys.readouterr().err


def test_an_input_is_never_written_to(teacher: Path, capsys: pytest.CaptureFixture[str], text: Path) -> None:
    command = ["distill", str(teacher), "--student-layers", "2", "--data", str(text), "--seqlen", "32", "--steps", "1"]
    assert run([*command, "-o", str(teacher), "--force", "--quiet"]) == 2
    assert "is the input" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["distill", "teacher-cache"])
def test_help_does_not_wait_for_torch(verb: str) -> None:
    code = (
        "import sys; from wtool.cli import run; run(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules); sys.exit(len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TEACHER" in done.stdout
