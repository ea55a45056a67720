"""Training steps against the definition, and what the Trainer is asked for by name."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled import logits, manifest, weights

from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.loading import load_model

Distill = Callable[..., Path]


def test_held_out_divergence_falls_and_the_best_is_kept(distill: Distill) -> None:
    told = manifest(distill("--steps", "30", "--evaluate-every", "5"))
    divergences = {entry["step"]: entry["kl"] for entry in told["evaluation"]}
    assert list(divergences) == [0, 5, 10, 15, 20, 25, 30]
    assert divergences[30] < 0.6 * divergences[0]
    assert told["best_step"] == min(divergences, key=lambda step: divergences[step])


def test_what_is_told_of_held_out_text_is_so(distill: Distill, teacher: Path, text: Path) -> None:
    from distill.planner import plan_distillation
    from distill.recipe import parse_recipe

    out = distill()
    recipe = {"teacher": str(teacher), "student_layers": 2, "training": {"steps": 6, "lr": 3e-3}}
    recipe["data"] = {"sources": [str(text)], "seqlen": 32, "held_out": 4}
    plan = plan_distillation(parse_recipe(recipe, "test"), device="cpu")
    divergence = entropy = 0.0
    tokens = 0
    for number in plan.texts.held_out:
        window = plan.texts.windows[number]
        ours, theirs = logits(out, window[None])[0].log_softmax(-1), logits(teacher, window[None])[0].log_softmax(-1)
        for place in range(len(window) - 1):
            divergence += float((theirs[place].exp() * (theirs[place] - ours[place])).sum())
            entropy -= float(ours[place, window[place + 1]])
            tokens += 1
    told = next(entry for entry in manifest(out)["evaluation"] if entry["step"] == manifest(out)["best_step"])
    assert told["kl"] == pytest.approx(divergence / tokens, rel=1e-4)
    assert told["ce"] == pytest.approx(entropy / tokens, rel=1e-5)
    assert told["perplexity"] == pytest.approx(math.exp(entropy / tokens), rel=1e-4)


def test_a_step_is_that_of_the_definition(distill: Distill, teacher: Path, text: Path) -> None:
    """One step of plain gradient descent, computed again from dense logits by autograd."""
    from distill.planner import plan_distillation
    from distill.recipe import parse_recipe

    flags = ["--steps", "1", "--optimizer", "sgd", "--optimizer-arg", "momentum=0", "--lr", "0.05", "--clip", "0"]
    out = distill(*flags, "--schedule", "constant", "--warmup", "0", "--batch", "100", "--ce", "0.3", "--samples", "9")
    recipe = {"teacher": str(teacher), "student_layers": 2, "training": {"steps": 1}}
    recipe["data"] = {"sources": [str(text)], "seqlen": 32, "held_out": 4, "samples": 9}
    plan = plan_distillation(parse_recipe(recipe, "test"), device="cpu")
    student = load_model(plan.student.source, dtype="F32")
    big = load_model(open_checkpoint(str(teacher)), dtype="F32")
    ids = torch.stack([plan.texts.windows[number] for number in plan.texts.train])
    with torch.no_grad():
        theirs = big(input_ids=ids).logits[:, :-1].log_softmax(-1)
    for parameter in student.parameters():
        parameter.data = parameter.data.clone()
    ours = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    entropy = -ours.gather(-1, ids[:, 1:, None]).mean()
    (divergence + 0.3 * entropy).backward()
    written = weights(out)
    moved = 0.0
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - 0.05 * parameter.grad
        torch.testing.assert_close(written[name], expected, rtol=0, atol=1e-6)
        moved = max(moved, float((0.05 * parameter.grad).abs().max()))
    assert moved > 1e-4
    told = manifest(out)["training"][0]
    assert told["kd"] == pytest.approx(divergence.item(), rel=1e-4)
    assert told["ce"] == pytest.approx(entropy.item(), rel=1e-4)
    assert told["loss"] == pytest.approx((divergence + 0.3 * entropy).item(), rel=1e-4)


def test_a_step_in_pieces_is_the_step_at_once(distill: Distill, teacher: Path, tmp_path: Path) -> None:
    """Windows of unequal lengths, so that a mean of means would be another step."""
    rows = tmp_path / "rows.jsonl"
    generator = torch.Generator().manual_seed(0)
    lengths = (4, 31, 7, 2, 19, 11, 28, 5, 9, 3)
    ids = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    rows.write_text("".join(f'{{"input_ids": {each}}}\n' for each in ids))
    flags = [
        "--optimizer",
        "sgd",
        "--lr",
        "0.1",
        "--steps",
        "2",
        "--data",
        str(rows),
        "--seqlen",
        "32",
        "--samples",
        "10",
    ]
    written = []
    for batch, accumulation in ((8, 1), (2, 4), (3, 3)):
        out = tmp_path / f"{batch}"
        student = [
            "--student-layers",
            "2",
            "--held-out",
            "2",
            "--batch",
            str(batch),
            "--accumulation",
            str(accumulation),
        ]
        assert run(["distill", str(teacher), *student, *flags, "-o", str(out), "--quiet"]) == 0
        written.append(weights(out))
    for other in written[1:]:
        for name, tensor in written[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "muon", "rmsprop", "adagrad"])
def test_every_optimizer_learns_by_name(distill: Distill, optimizer: str) -> None:
    rate = {"sgd": "0.3", "adafactor": "1e-2", "rmsprop": "1e-3", "adagrad": "1e-2"}.get(optimizer, "5e-3")
    told = manifest(distill("--optimizer", optimizer, "--lr", rate, "--steps", "8", "--evaluate-every", "8"))
    first, last = told["evaluation"]
    assert last["kl"] < first["kl"]


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "lion", "lion-8bit"])
def test_optimizers_of_bitsandbytes(distill: Distill, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    told = manifest(distill("--optimizer", optimizer, "--lr", "1e-3", "--steps", "8", "--evaluate-every", "8"))
    first, last = told["evaluation"]
    assert last["kl"] < first["kl"]


def rates(told: dict) -> list[float]:
    return [entry["learning_rate"] for entry in told["training"]]


@pytest.mark.parametrize(
    "schedule", ["cosine", "linear", "constant", "one_cycle", "reduce_lr_on_plateau", "polynomial"]
)
def test_every_schedule_runs_by_name(distill: Distill, schedule: str) -> None:
    found = rates(manifest(distill("--schedule", schedule, "--warmup", "0.3", "--steps", "10", "--lr", "1e-3")))
    assert len(found) == 10
    assert max(found) == pytest.approx(1e-3, rel=0.05)
    if schedule != "reduce_lr_on_plateau":
        assert found[0] < 0.7e-3  # it warms up
    if schedule in ("cosine", "linear", "one_cycle", "polynomial"):
        assert found[-1] < 0.3e-3
        peak = found.index(max(found))
        assert found[peak:] == sorted(found[peak:], reverse=True)


def test_it_stops_early_and_keeps_the_best(distill: Distill) -> None:
    told = manifest(
        distill(
            "--lr", "0.3", "--clip", "0", "--warmup", "0", "--steps", "12", "--evaluate-every", "1", "--patience", "2"
        )
    )
    steps = [entry["step"] for entry in told["evaluation"]]
    assert steps[-1] < 12
    later = {entry["step"]: entry["kl"] for entry in told["evaluation"] if entry["step"]}
    assert told["best_step"] == min(later, key=lambda step: later[step])
    assert steps[-1] == told["best_step"] + 2


def test_activations_computed_again_change_nothing(distill: Distill) -> None:
    plain, again = distill(name="plain"), distill("--checkpointing", name="again")
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(again)[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_sixteen_bits_learn_too(distill: Distill, precision: str) -> None:
    told = manifest(distill("--precision", precision, "--steps", "20", "--evaluate-every", "20"))
    first, last = told["evaluation"]
    assert last["kl"] < 0.85 * first["kl"]


def test_hidden_states_come_nearer(distill: Distill) -> None:
    told = manifest(distill("--hidden", "mse", "--hidden-weight", "1", "--steps", "20"))
    apart = [entry["hidden"] for entry in told["training"]]
    assert apart[-1] < 0.8 * apart[0]


def test_a_loss_that_is_not_finite_ends_it_in_one_line(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", str(teacher), "--student-layers", "2", "--data", str(text), "--seqlen", "32", "--steps", "9"]
    settings = ["--optimizer", "sgd", "--lr", "1e30", "--clip", "0", "--schedule", "constant", "--warmup", "0"]
    assert run([*command, *settings, "-o", str(tmp_path / "out"), "--quiet"]) == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step ") and "lower learning rate" in error


@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl", "jsd", "skew-kl", "skew-reverse-kl"])
def test_every_loss_brings_the_student_nearer(distill: Distill, loss: str) -> None:
    told = manifest(distill("--loss", loss, "--steps", "15", "--evaluate-every", "15", "--temperature", "1.5"))
    first, last = told["evaluation"]
    assert last["kl"] < 0.9 * first["kl"]


def test_what_the_student_writes_counts_by_what_it_wrote(distill: Distill) -> None:
    told = manifest(distill("--on-policy", "1", "--steps", "4", "--batch", "3", "--lr", "1e-3"))
    assert all(math.isfinite(entry["loss"]) for entry in told["training"])
    seen = told["training"][-1]["tokens"]
    assert 0 < seen <= 4 * 3 * 17  # of windows of 32 tokens the second half, and less where it ended before
