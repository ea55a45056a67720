"""How windows become batches, and which of them are never trained on."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import llama

from distill.body import body_of, keeps_documents_apart
from distill.data import IGNORED, Collate, Numbered, restarting_positions, split
from wtool.errors import InputError


def windows(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def test_a_label_is_the_token_that_follows() -> None:
    batch = Collate()([Numbered(windows([5, 6, 7, 8], [9, 4]), (1, 0))[place] for place in (0, 1)])
    assert batch["input_ids"].tolist() == [[9, 4, 0, 0], [5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[4, IGNORED, IGNORED, IGNORED], [6, 7, 8, IGNORED]]
    assert batch["numbers"].tolist() == [1, 0]


def test_a_document_s_first_token_is_nobody_s_label_where_documents_are_apart() -> None:
    batch = Collate(end=1)([{"number": 0, "ids": torch.tensor([5, 1, 6, 7, 1, 8])}])
    assert batch["labels"].tolist() == [[1, IGNORED, 7, 1, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_positions_count_anew_after_each_end(rows: list[list[int]]) -> None:
    found = restarting_positions(torch.tensor(rows), 1).tolist()
    for row, positions in zip(rows, found, strict=True):
        expected, count = [], 0
        for token in row:
            expected.append(count)
            count = 0 if token == 1 else count + 1
        assert positions == expected


def test_documents_apart_do_not_see_one_another() -> None:
    model = llama()
    assert keeps_documents_apart(model)
    ids = torch.tensor([[5, 6, 1, 7, 8, 9]])
    with torch.no_grad():
        together = body_of(model, {"input_ids": ids, "position_ids": restarting_positions(ids, 1)}).last_hidden_state
        alone = body_of(model, {"input_ids": ids[:, 3:]}).last_hidden_state
    torch.testing.assert_close(together[:, 3:], alone, rtol=1e-5, atol=1e-5)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 3))
def test_what_is_held_out_is_never_trained_on(count: int, wanted: int, seed: int) -> None:
    rows = windows(*([number, number] for number in range(count)))
    train, held_out = split(rows, wanted, seed)
    assert sorted(train + held_out) == list(range(count))
    assert len(held_out) == min(wanted, max(1, count // 5))
    assert split(rows, wanted, seed) == (train, held_out)


def test_a_copy_of_a_held_out_window_is_not_trained_on() -> None:
    rows = windows(*([number % 4, 7] for number in range(20)))
    train, held_out = split(rows, 1, 0)
    assert not {tuple(rows[n].tolist()) for n in train} & {tuple(rows[n].tolist()) for n in held_out}
    with pytest.raises(InputError, match="gives 1 different window"):
        split(windows([1, 2], [1, 2]), 1, 0)


def test_held_out_text_of_its_own(tmp_path: Path) -> None:
    from tiny_models import saved

    from distill.data import read_texts
    from distill.recipe import Data
    from wtool.checkpoint import open_checkpoint

    (tmp_path / "train.txt").write_text("for a in b: pass\n" * 50)
    (tmp_path / "judge.txt").write_text("while x: break\n" * 50)
    checkpoint = open_checkpoint(str(saved(llama(), tmp_path / "m")))
    asked = Data(
        sources=(str(tmp_path / "train.txt"),), held_out_sources=(str(tmp_path / "judge.txt"),), seqlen=16, held_out=3
    )
    texts = read_texts(checkpoint, asked, 10)
    assert len(texts.train) == 10 and len(texts.held_out) == 3
    assert texts.tokens == 10 * 15
    assert not set(texts.train) & set(texts.held_out)
