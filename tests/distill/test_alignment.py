"""Two tokenizers: the places where both have read the same text, and learning there."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from distilled import manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama, saved, tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distill.alignment import align, their_batch
from wtool.cli import run


def coarse(merges: int) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with only its first merges, other numbers, and no BOS."""
    told = json.loads(tokenizer(False).backend_tokenizer.to_str())
    told["model"]["merges"] = told["model"]["merges"][:merges]
    vocabulary = list(told["model"]["vocab"])
    told["model"]["vocab"] = {token: (number * 7 + 3) % len(vocabulary) for number, token in enumerate(vocabulary)}
    for token in told["added_tokens"]:
        token["id"] = told["model"]["vocab"][token["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@settings(deadline=None, max_examples=30)
@given(st.text(alphabet="forwhile in:\n xyü蒸", min_size=3, max_size=40))
def test_at_each_place_both_have_read_the_same_text(text: str) -> None:
    ours, theirs = tokenizer(), coarse(10)
    found = align(text, ours, theirs)
    ends = {}
    for name, each, ids in (("ours", ours, found.ours), ("theirs", theirs, found.theirs)):
        ends[name] = [each.decode(ids[: place + 1], skip_special_tokens=True) for place in range(len(ids))]
    for ours_at, theirs_at in zip(found.ours_at.tolist(), found.theirs_at.tolist(), strict=True):
        assert ends["ours"][ours_at] == ends["theirs"][theirs_at]
        assert ours_at < len(found.ours) - 1
    assert found.ours_at.tolist() == sorted(set(found.ours_at.tolist()))
    assert found.theirs_at.tolist() == sorted(set(found.theirs_at.tolist()))


def test_one_tokenizer_twice_is_aligned_everywhere_but_at_the_bos() -> None:
    found = align("for x in y", tokenizer(), tokenizer())
    assert torch.equal(found.ours, found.theirs)
    assert found.ours_at.tolist() == found.theirs_at.tolist() == list(range(1, len(found.ours) - 1))


def test_a_batch_of_the_teacher_s_is_padded_on_the_right() -> None:
    known = {n: align(text, tokenizer(), coarse(5)) for n, text in enumerate(["for x in y", "while"])}
    ids, asked = their_batch(known, [1, 0])
    assert ids[0, : len(known[1].theirs)].tolist() == known[1].theirs.tolist()
    assert asked.sum(1).tolist() == [len(known[1].theirs_at), len(known[0].theirs_at)]


def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    big = llama(3, initializer_range=0.1)
    with torch.no_grad():
        big.lm_head.weight.mul_(8)  # far from uniform, which a student is at the start
    teacher = saved(big, tmp_path / "teacher", with_tokenizer=False)
    coarse(10).save_pretrained(teacher)
    student = saved(llama(4, initializer_range=0.02), tmp_path / "student")
    text = tmp_path / "text.txt"
    text.write_text(topics["for"] + topics["while"] + topics["class"])
    out = tmp_path / "out"
    flags = ["--loss", "uld", "--steps", "25", "--lr", "1e-2", "--seqlen", "32", "--evaluate-every", "25"]
    assert run(["distill", str(teacher), str(student), "--data", str(text), *flags, "-o", str(out), "--quiet"]) == 0
    first, last = manifest(out)["evaluation"]
    assert last["kl"] < 0.9 * first["kl"]
    told = manifest(out)["text"]["aligned"]
    assert 0 < told["places"] < told["tokens"]
    assert run(["distill", str(teacher), str(student), "--data", str(text), "--seqlen", "32", "--dry-run"]) == 3
