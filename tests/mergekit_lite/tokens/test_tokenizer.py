import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from vocabulary_models import bpe

from mergekit_lite.tokens.tokenizer import Tokens, difference, same_sentencepiece, tokens_of
from wtool.errors import MalformedFile


@pytest.fixture
def model(tmp_path):
    """Files beside weights, as a checkpoint has them."""

    def make(label="m", **contents):
        folder = tmp_path / label
        folder.mkdir(exist_ok=True)
        files = {}
        for name, content in contents.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            files[path.name] = path
        return SimpleNamespace(label=label, files=files)

    return make


def test_the_numbers_are_those_that_transformers_gives(tmp_path):
    bpe(added=[("<a>", True), ("dog-house", False)]).save_pretrained(tmp_path)
    found = tokens_of(SimpleNamespace(files={path.name: path for path in tmp_path.iterdir()}))  # pyright: ignore[reportArgumentType]
    assert found is not None
    assert found.numbers == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert found.added["<a>"]["special"] and not found.added["dog-house"]["special"]
    assert found.end == 272 and found.names[270] == "<a>"


ADDED = {"id": 2, "content": "<c>", "special": True, "single_word": False, "lstrip": True, "rstrip": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [ADDED]}},
        {
            "tokenizer__json": {
                "model": {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]},
                "added_tokens": [ADDED],
            }
        },
        {
            "tokenizer__json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []},
            "tokenizer_config__json": {
                "added_tokens_decoder": {"2": {"content": "<c>", "special": True, "lstrip": True}}
            },
        },
        {"vocab__json": {"a": 0, "b": 1}, "added_tokens__json": {"<c>": 2}},
        {"vocab__txt": b"a\nb\n<c>\n"},
    ],
    ids=["bpe", "unigram", "added by the configuration", "vocab.json", "vocab.txt"],
)
def test_every_kind_of_file(model, files):
    found = tokens_of(model(**files))
    assert found is not None
    assert found.numbers == {"a": 0, "b": 1, "<c>": 2}
    flags = found.added.get("<c>", {})
    assert flags in ({}, {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True})


def test_nothing_is_told_of_a_sentencepiece_model_alone(model):
    assert tokens_of(model(tokenizer__model=b"x")) is None
    assert same_sentencepiece([model("a", tokenizer__model=b"x"), model("b", tokenizer__model=b"x")])
    assert not same_sentencepiece([model("a", tokenizer__model=b"x"), model("b", tokenizer__model=b"y")])
    more = model("c", tokenizer__model=b"x", added_tokens__json={"<c>": 2})
    assert not same_sentencepiece([model("a", tokenizer__model=b"x"), more])
    assert not same_sentencepiece([model("d"), model("e")])  # two that tell nothing are not the same


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_broken_file_is_one_line(model, content):
    with pytest.raises(MalformedFile, match="tokenizer.json: ") as caught:
        tokens_of(model(tokenizer__json=content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"a": 0, "b": 1}, None),
        ({"a": 0}, None),
        ({"a": 0, "b": 1, "c": 2}, None),
        ({"a": 1, "b": 0}, "2 of 2 tokens have other numbers in y than in x (first: 'a' is 1, not 0)"),
        ({"a": 0, "c": 1}, "number 1 is 'b' in x and 'c' in y"),
    ],
)
def test_what_is_told_of_a_difference(model, theirs, told):
    found = difference(model("x"), model("y"), Tokens({"a": 0, "b": 1}), Tokens(theirs))
    assert found == (f"tokenizers differ: {told}" if told else None)
