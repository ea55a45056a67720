"""Windows against their definition, written slowly: what is in them, what is not, and what the user is told."""

import copy
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tiny_models import TEXT, VOCABULARY, tokenizer
from transformers import PreTrainedTokenizerFast

from wtool.calibration_data import CalibrationSource, Windows, source, windows
from wtool.errors import InputError, MalformedFile, Mismatch, MissingInput, UsageError

BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no ' + message.role + ' here') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
)


def chatty() -> PreTrainedTokenizerFast:
    found = copy.deepcopy(tokenizer())
    found.chat_template = TEMPLATE
    return found


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def entries(count: int) -> list[str]:
    """Unlike texts of unlike lengths."""
    return [f"{number}: {TEXT[number * 37 : number * 45 + 20]}" for number in range(count)]


def encoded(text: str, bos: bool = True) -> list[int]:
    return [*([BOS] if bos else []), *tokenizer(bos).encode(text, add_special_tokens=False), EOS]


def digest(found: Windows) -> str:
    return found.record["ids_xxh3"]


def slow_stream(documents: list[list[int]], seed: int) -> list[int]:
    """All documents of one source, in the order of the keys that are drawn for them."""
    keys = random.Random(f"{seed} source 0")
    ranked = sorted((keys.random(), number) for number in range(len(documents)))
    return [token for _, number in ranked for token in documents[number]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_windows_are_pieces_of_the_stream(tmp_path: Path, bos: bool, length: int) -> None:
    texts = entries(12)
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = windows(CalibrationSource((file,), samples=10_000, length=length, seed=3), tokenizer(bos))
    stream = slow_stream([encoded(text, bos) for text in texts], seed=3)
    expected = [stream[begin : begin + length] for begin in range(0, len(stream) - length + 1, length)]
    for window in expected:
        window[0] = BOS if bos else window[0]
    assert found.ids.tolist() == expected and found.mask is None and found.ids.dtype == torch.int64
    assert found.record["samples"] == len(expected) and found.tokens == length * len(expected)


def test_some_windows_are_taken_from_all_over_the_stream(tmp_path: Path) -> None:
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefghij", k=60)) for _ in range(30)]
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    seen: Counter[int] = Counter()
    for seed in range(8):
        everything = CalibrationSource((file,), samples=10_000, length=16, seed=seed)
        all_of_it = windows(everything, tokenizer()).ids.tolist()
        some = windows(CalibrationSource((file,), samples=10, length=16, seed=seed), tokenizer()).ids.tolist()
        places = [all_of_it.index(window) for window in some]
        assert places == sorted(set(places)) and len(places) == 10
        assert len(all_of_it) > 60
        seen.update(place * 10 // len(all_of_it) for place in places)
    assert set(seen) == set(range(10))


def test_a_plain_text_is_cut_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    whole = encoded(TEXT)
    for seed in range(3):
        found = windows(CalibrationSource((str(tmp_path / "a.txt"),), samples=5, length=32, seed=seed), tokenizer())
        for window in found.ids.tolist():
            begins = [begin for begin in range(0, len(whole), 32) if whole[begin + 1 : begin + 32] == window[1:]]
            assert len(begins) == 1 and window[0] == BOS
        assert len(found.ids.unique(dim=0)) == 5


def test_the_seed_decides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in entries(30)])
    found = [
        windows(CalibrationSource((file,), samples=5, length=16, seed=seed), tokenizer()) for seed in (0, 0, 1, -1)
    ]
    assert torch.equal(found[0].ids, found[1].ids) and found[0].record == found[1].record
    assert len({digest(each) for each in found}) == 3
    assert [each.record["seed"] for each in found] == [0, 0, 1, -1]


def test_a_long_source_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "POOL", 100)
    texts = entries(30)
    rows = [json.dumps({"text": text}) for text in texts]
    asked = CalibrationSource((str(tmp_path / "a.jsonl"),), samples=3, length=16)  # a pool of 100, beyond 2 * 3 * 16
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = windows(asked, tokenizer())
    stream = slow_stream([encoded(text) for text in texts], seed=0)
    starts = [stream[begin + 1 : begin + 16] for begin in range(0, 300, 16)]
    assert all(window[1:] in starts for window in found.ids.tolist())
    last = max(range(30), key=[slow for _, slow in _ranked(30)].index)  # never reached: what it holds is no matter
    rows[last] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert torch.equal(windows(asked, tokenizer()).ids, found.ids)


def _ranked(count: int) -> list[tuple[float, int]]:
    keys = random.Random("0 source 0")
    return sorted((keys.random(), number) for number in range(count))


def test_sources_are_heard_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "POOL", 6000)
    many = write(tmp_path / "many.jsonl", [{"text": "a" * 9} for _ in range(2000)])
    long = write(tmp_path / "long.jsonl", [{"text": "b" * 99} for _ in range(200)])
    few = write(tmp_path / "few.jsonl", [{"text": "c" * 49} for _ in range(3)])
    asked = CalibrationSource((many, long, few), samples=300, length=10)
    counts = Counter(tokenizer().decode(windows(asked, tokenizer(bos=False)).ids.flatten()))
    assert counts["c"] == pytest.approx(
        3 * 49 / 2, rel=0.4
    )  # all there is went into the stream, which half is taken of
    ours = {letter: sum(map(len, tokenizer().tokenize(letter * 99))) for letter in "ab"}
    assert ours == {"a": 99, "b": 99} and 0.7 < counts["a"] / counts["b"] < 1.4


@pytest.mark.parametrize("spelling", ["messages", "conversations"])
def test_conversations_stay_whole(tmp_path: Path, spelling: str) -> None:
    names = {"messages": ("role", "content", "user", "assistant"), "conversations": ("from", "value", "human", "gpt")}
    who, what, human, machine = names[spelling]
    talks = [
        [{who: human, what: f"{n}?" * (n % 5 + 1)}, {who: machine, what: TEXT[n * 9 : n * 9 + n % 7 * 8]}]
        for n in range(60)
    ]
    file = write(tmp_path / "a.jsonl", [{spelling: talk} for talk in talks])
    found = windows(CalibrationSource((file,), samples=1000, length=128), chatty())
    expected = Counter(f"<s>[user]{question[what]}</s>[assistant]{answer[what]}</s>" for question, answer in talks)
    heard: Counter[str] = Counter()
    for window in found.unpadded():
        text = str(tokenizer().decode(window))
        assert text.startswith("<s>[user]") and text.endswith("</s>")
        heard.update("<s>" + part for part in text.split("<s>")[1:])
    assert heard == expected
    assert found.mask is not None and found.ids.shape[1] <= 128
    assert not found.remarks
    assert found.mask.sum(1).double().mean() > 0.8 * 128  # small ones fill the gaps
    for ids, mask in zip(found.ids, found.mask, strict=True):
        tokens = int(mask.sum())
        assert mask[:tokens].all() and not mask[tokens:].any() and not ids[tokens:].any()


def test_a_conversation_longer_than_a_window_loses_its_end(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": TEXT[n:300]}] for n in range(3)]
    file = write(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks])
    found = windows(CalibrationSource((file,), samples=3, length=32), chatty())
    expected = [list(chatty().apply_chat_template(talk, tokenize=True, return_dict=False))[:32] for talk in talks]
    assert sorted(map(repr, found.ids.tolist())) == sorted(map(repr, expected)) and found.mask is None
    assert found.remarks == ("3 rows are longer than a calibration window of 32 and lose their end",)


def test_a_chat_template_is_needed_and_has_its_say(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "judge", "content": "b"}]}]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as caught:
        windows(CalibrationSource((file,)), tokenizer())
    assert str(caught.value) == (
        f"{file}: conversations, and the model's tokenizer has no chat template; "
        "give plain text, or put a chat_template.jinja beside the tokenizer"
    )
    with pytest.raises(InputError) as caught:
        windows(CalibrationSource((file,)), chatty())
    assert str(caught.value) == f"{file}:2: the tokenizer's chat template refuses it: no judge here"


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_rows_of_token_ids_are_taken_as_they_are(tmp_path: Path, with_tokenizer: bool) -> None:
    rows = [[5, 6, 7], [8], list(range(10, 20)), [9, 9, 9, 9]]
    file = write(tmp_path / "a.jsonl", [{"input_ids": row} for row in rows])
    found = windows(CalibrationSource((file,), samples=4, length=6), tokenizer() if with_tokenizer else None)
    assert [window.tolist() for window in found.unpadded()] == [[5, 6, 7], [8], [10, 11, 12, 13, 14, 15], [9] * 4]
    assert found.ids.tolist()[:2] == [[5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0]] and found.tokens == 3 + 1 + 6 + 4
    assert found.mask is not None and found.mask.tolist()[1] == [True] + [False] * 5
    assert found.remarks == ("1 rows are longer than a calibration window of 6 and lose their end",)
    assert not found.warnings and (found.record["tokenizer"] is None) is not with_tokenizer


def test_equal_rows_need_no_mask_whatever_the_length_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"input_ids": [n, n + 1, n + 2]} for n in range(10)])
    found = windows(CalibrationSource((file,), samples=10), None)
    assert found.ids.tolist() == [[n, n + 1, n + 2] for n in range(10)] and found.mask is None
    some = windows(CalibrationSource((file,), samples=4), None).ids[:, 0].tolist()
    assert some == sorted(set(some)) and len(some) == 4


def test_kinds_of_sources_share_the_windows(tmp_path: Path) -> None:
    ids = write(tmp_path / "ids.jsonl", [{"input_ids": [7] * 16}] * 50)
    (tmp_path / "a.txt").write_text(TEXT)
    talk = write(tmp_path / "talk.jsonl", [{"messages": [{"role": "user", "content": "?" * 12}]}])
    asked = CalibrationSource((ids, str(tmp_path / "a.txt"), talk), samples=9, length=16)
    found = [window.tolist() for window in windows(asked, chatty()).unpadded()]
    assert len(found) == 9
    assert (
        found.count([7] * 16) == 4
        and sum(str(tokenizer().decode(window)).startswith("<s>[user]") for window in found) == 1
    )


@pytest.mark.parametrize("text, tokens", [("a", 3), ("ab " * 10, None)])
def test_less_than_a_window_is_one_short_window(tmp_path: Path, text: str, tokens: int | None) -> None:
    (tmp_path / "a.txt").write_text(text)
    found = windows(CalibrationSource((str(tmp_path / "a.txt"),)), tokenizer())
    assert found.ids.tolist() == [encoded(text)] and found.mask is None
    assert tokens in (None, found.tokens)
    assert found.warnings == (f"the calibration text has {found.tokens} tokens, 128 windows of 2048 were asked for",)


def test_too_little_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c d e " * 20)
    found = windows(CalibrationSource((str(tmp_path / "a.txt"),), samples=7, length=32), tokenizer())
    count = len(found.ids)
    assert 1 < count < 7
    assert found.warnings == (
        f"the calibration text is enough for {count} windows of 32 tokens, not for the 7 asked for",
    )
    enough = windows(CalibrationSource((str(tmp_path / "a.txt"),), samples=count, length=32), tokenizer())
    assert not enough.warnings and torch.equal(enough.ids, found.ids)


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": ""}, {"text": " \n"}, {"text": None}])
    with pytest.raises(InputError, match=rf"^{file}: no text to calibrate on$"):
        windows(CalibrationSource((file,)), tokenizer())


def test_empty_rows_are_passed_over(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": None}, {"text": "  "}, {"text": "abc"}, {"text": ""}])
    assert windows(CalibrationSource((file,)), tokenizer()).ids.tolist() == [encoded("abc")]


def test_a_row_of_another_kind(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": [1, 2]}])
    with pytest.raises(MalformedFile, match=r"a\.jsonl:2: a list of token ids among rows that are a text each$"):
        windows(CalibrationSource((file,)), tokenizer())


def test_no_window_is_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    asked = CalibrationSource((str(tmp_path / "a.txt"),), samples=4, length=100)
    found = windows(asked, tokenizer(), limit=64)
    assert found.ids.shape == (4, 64) and found.record["length"] == 64
    assert found.remarks == ("calibration windows are 64 tokens, not 100: the model has no more positions",)
    assert not windows(asked, tokenizer(), limit=100).remarks


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"input_ids": [3, VOCABULARY]}])
    with pytest.raises(Mismatch, match="has token 320, but the model's vocabulary has 320$"):
        windows(CalibrationSource((file,)), None, vocabulary=VOCABULARY)
    assert windows(CalibrationSource((file,)), None, vocabulary=VOCABULARY + 1).tokens == 2


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(InputError, match="the model has no tokenizer to read it with; give rows of input_ids$"):
        windows(CalibrationSource((str(tmp_path / "a.txt"),)), None)


def test_the_text_that_python_carries_is_the_default() -> None:
    found = windows(CalibrationSource(samples=16, length=64), tokenizer())
    assert found.ids.shape == (16, 64) and found.mask is None and not found.warnings
    assert len(found.remarks) == 1 and "--calib FILE" in found.remarks[0]
    assert found.record["sources"][0]["builtin"] == "manual and standard library"
    assert json.loads(json.dumps(found.record)) == found.record


def test_the_record_tells_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(topics["if"])
    asked = CalibrationSource((str(tmp_path / "a.txt"),), samples=2, length=16)
    found = windows(asked, tokenizer()).record
    assert found["sources"][0]["file"] == str(tmp_path / "a.txt")
    assert found["tokenizer"]["tokens"] == len(tokenizer().get_vocab())
    (tmp_path / "a.txt").write_text(topics["if"] + " ")
    changed = windows(asked, tokenizer()).record
    assert changed["sources"][0]["xxh3"] != found["sources"][0]["xxh3"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("corpus.tx", ": no such text file; did you mean 'corpus.txt'?"),
        ("other/corpus.txt", ": no such text file; a dataset of the Hub is named org/name"),
    ],
)
def test_no_such_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "corpus.txt").write_text("a")
    with pytest.raises(MissingInput) as caught:
        windows(CalibrationSource((str(tmp_path / name),)), tokenizer())
    assert str(caught.value) == f"{tmp_path / name}{message}"


@pytest.mark.parametrize("samples, length", [(0, 2048), (-1, 2048), (128, 1), (128, 0)])
def test_figures_that_make_no_sense(samples: int, length: int) -> None:
    with pytest.raises(UsageError, match="at least"):
        CalibrationSource(samples=samples, length=length)
