"""Making students: which layers, how they start, and which teachers they can have."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilled import manifest, weights
from families import saved_family
from tiny_models import llama, saved, tokenizer
from transformers import AutoModelForCausalLM

from distill.student import Student as Begin
from distill.student import chosen_layers, load_student, nothing_at_random
from wtool.checkpoint import open_checkpoint
from wtool.cli import run
from wtool.errors import UsageError
from wtool.loading import quiet

Distill = Callable[..., Path]


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_layers_are_evenly_spaced_with_the_first_and_the_last(count: int) -> None:
    for asked in range(2, count + 1):
        layers = chosen_layers(asked, count)
        gaps = [after - before for before, after in zip(layers, layers[1:], strict=False)]
        assert len(layers) == asked and layers[0] == 0 and layers[-1] == count - 1
        assert max(gaps) - min(gaps) <= 1
        assert all(abs(layer - place * (count - 1) / (asked - 1)) <= 0.5 for place, layer in enumerate(layers))


def test_chosen_layers_are_taken_as_they_are_named() -> None:
    assert chosen_layers([0, 2, 5], 6) == (0, 2, 5)
    assert chosen_layers(1, 6) == (0,)
    with pytest.raises(UsageError, match="the teacher has layers 0 to 5"):
        chosen_layers([0, 6], 6)
    with pytest.raises(UsageError, match="7 student layers: the teacher has 6"):
        chosen_layers(7, 6)


def test_a_student_of_all_layers_starts_as_its_teacher(distill: Distill) -> None:
    told = manifest(distill("--student-layers", "0,1,2,3", "--steps", "1"))
    assert told["student_layers"] == [0, 1, 2, 3]
    assert told["evaluation"][0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_student_is_made_of_the_named_layers(distill: Distill, teacher: Path) -> None:
    out = distill("--student-layers", "0,2", "--lr", "1e-12")
    before, after = weights(teacher), weights(out)
    for place, layer in enumerate((0, 2)):
        theirs = {name: each for name, each in before.items() if name.startswith(f"model.layers.{layer}.")}
        for name, tensor in theirs.items():
            ours = after[name.replace(f"layers.{layer}.", f"layers.{place}.")]
            torch.testing.assert_close(ours, tensor, rtol=0, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    with quiet():
        assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 2


def test_a_student_begins_at_random_from_a_configuration(distill: Distill, teacher: Path, tmp_path: Path) -> None:
    config = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": 1, "hidden_size": 32}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"head_dim": 8}))
    first = distill("--student-config", str(path), "--steps", "3", name="first")
    again = distill("--student-config", str(path), "--steps", "3", name="again")
    other = distill("--student-config", str(path), "--steps", "3", "--seed", "1", name="other")
    with quiet():
        made = AutoModelForCausalLM.from_pretrained(first)
    assert made.config.hidden_size == 32 and made.config.num_hidden_layers == 1
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(first).items())
    assert any(not torch.equal(tensor, weights(other)[name]) for name, tensor in weights(first).items())
    assert (first / "tokenizer.json").is_file()


def test_nothing_is_left_to_chance_in_training(tmp_path: Path) -> None:
    saved_family("gpt2", tmp_path / "m", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    source = open_checkpoint(str(tmp_path / "m"))
    student = load_student(Begin("m", source), dtype="F32", device="cpu").train()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, student(input_ids=ids).logits)
    wild = llama(attention_dropout=0.5).train()
    nothing_at_random(wild)
    with torch.no_grad():
        assert torch.equal(wild(input_ids=ids).logits, wild(input_ids=ids).logits)


def test_a_student_s_weights_are_not_the_file_s(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "m")
    student = load_student(Begin("m", open_checkpoint(str(folder))), dtype="F32", device="cpu")
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_vocabulary_that_is_padded_is_no_difference(teacher: Path, text: Path, tmp_path: Path) -> None:
    padded = saved(llama(5, vocab_size=352, hidden_size=32), tmp_path / "padded")
    out = tmp_path / "out"
    flags = ["--data", str(text), "--seqlen", "32", "--steps", "8", "--lr", "1e-2", "--evaluate-every", "8"]
    assert run(["distill", str(teacher), str(padded), *flags, "-o", str(out), "--quiet"]) == 0
    first, last = manifest(out)["evaluation"]
    assert last["kl"] < 0.9 * first["kl"]
    assert weights(out)["model.embed_tokens.weight"].shape[0] == 352


def test_another_tokenizer_is_refused_with_a_pointer(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved(llama(), tmp_path / "other", with_tokenizer=False)
    theirs = json.loads(tokenizer().backend_tokenizer.to_str())
    vocabulary = theirs["model"]["vocab"]
    last, before = sorted(vocabulary, key=lambda token: vocabulary[token])[-2:]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    tokenizer().save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(theirs))
    command = ["distill", str(teacher), str(other), "--data", str(text), "--seqlen", "32", "--steps", "1"]
    assert run([*command, "-o", str(tmp_path / "out"), "--quiet"]) == 3
    error = capsys.readouterr().err
    assert "have different tokenizers: 2 tokens have other numbers" in error and "--loss uld" in error
