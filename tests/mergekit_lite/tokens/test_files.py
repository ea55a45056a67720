"""Grown tokenizers, as transformers opens them: numbers, splitting, decoding."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from vocabulary_models import CATS, DREAMS, bpe

from mergekit_lite.tokens.files import grown_files, union
from mergekit_lite.tokens.tokenizer import tokens_of

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "dog", "sat", "##s"]


def opened(folder: Path) -> Any:
    return SimpleNamespace(label=folder.name, files={path.name: path for path in folder.iterdir()})


def grown(tmp_path, *folders):
    """The union of the tokenizers in folders, written to `out`, and what is said of it."""
    checkpoints = [opened(folder) for folder in folders]
    tokens = [found for checkpoint in checkpoints if (found := tokens_of(checkpoint))]
    assert len(tokens) == len(checkpoints)
    made = union(checkpoints, tokens)
    out = tmp_path / "out"
    out.mkdir()
    if not made.problems:
        for name, content in grown_files(checkpoints[0], tokens[0], made).items():
            (out / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return out, made


def written(folder, tokenizer, added=(), **config):
    """A tokenizer's files as older versions of transformers write them."""
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(entry.pop("id")): entry for entry in entries}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
    return folder


def gpt2(folder, added=()):
    inner = Tokenizer.from_str(bpe().backend_tokenizer.to_str())
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    return written(folder, inner, added, **config)


def llama(folder, added=()):
    """SentencePiece's BPE as tokenizer.json has it: no pre-tokenizer, spaces as ▁, bytes for what is unknown."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "th", "the", "▁the"]
    inner = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(vocabulary)},
            merges=[("t", "h"), ("th", "e"), ("▁", "the")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return written(folder, inner, added, **config)


def bert(folder, added=(), words=()):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[3:], *words]
    inner = Tokenizer(models.WordPiece({word: number for number, word in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(names[:5])
    return written(folder, inner, added, tokenizer_class="BertTokenizer")


def t5(folder, added=()):
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁the", -2.0),
        ("▁", -3.0),
        *((c, -4.0) for c in "catdogs"),
    ]
    inner = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<pad>", "</s>", "<unk>"])
    config = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return written(folder, inner, added, extra_ids=0, **config)


@pytest.mark.parametrize("kind", [gpt2, llama, bert, t5])
def test_each_kind_of_tokenizer_opens_with_the_numbers_told(tmp_path, kind):
    base = kind(tmp_path / "base", [("<x>", True)])
    out, made = grown(tmp_path, base, kind(tmp_path / "a", [("<y>", False), ("<x>", True)]), kind(tmp_path / "b"))
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    assert type(after) is type(before)
    assert after.get_vocab() == made.tokens.numbers == {**before.get_vocab(), "<y>": len(before)}
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(len(before))]["content"] == "<y>"
    for text in ("the cats", "the <x> dog", "sat"):
        assert after(text).input_ids == before(text).input_ids
    one = after("the <y>cat", add_special_tokens=False).input_ids
    parts = [before(text, add_special_tokens=False).input_ids for text in ("the ", "cat")]
    if kind in (gpt2, bert):  # the others put a space in front of each part
        assert one == [*parts[0], len(before), *parts[1]]
    assert one.count(len(before)) == 1
    kept, dropped = (after.decode(one, skip_special_tokens=skip) for skip in (False, True))
    assert "<y>" in kept and "<y>" in dropped  # it is not special in its model
    assert "<x>" not in after.decode(after("<x> the").input_ids, skip_special_tokens=True)


def test_flags_are_those_of_the_model_the_token_is_from(tmp_path):
    base, own = gpt2(tmp_path / "base"), Tokenizer.from_str(bpe().backend_tokenizer.to_str())
    own.add_tokens([AddedToken("<l>", lstrip=True, rstrip=True, single_word=True, special=True, normalized=False)])
    out, _ = grown(tmp_path, base, written(tmp_path / "a", own))
    entry = json.loads((out / "tokenizer.json").read_text())["added_tokens"][-1]
    assert entry.pop("id") == 270 and entry.pop("content") == "<l>"
    assert entry == {"single_word": True, "lstrip": True, "rstrip": True, "normalized": False, "special": True}


def test_files_for_other_readers_agree(tmp_path):
    base = gpt2(tmp_path / "base")
    inner = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "vocab.json").write_text(json.dumps(inner["vocab"]))
    (base / "merges.txt").write_text("#version: 0.2\n")
    other = tmp_path / "other"
    bpe(DREAMS, 275, [("<o>", True)]).save_pretrained(other)
    out, made = grown(tmp_path, base, other)
    numbers = json.loads((out / "vocab.json").read_text()) | json.loads((out / "added_tokens.json").read_text())
    assert numbers == made.tokens.numbers
    assert (out / "merges.txt").read_bytes() == (base / "merges.txt").read_bytes()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == numbers


def test_new_pieces_and_old_added_tokens_keep_their_numbers(tmp_path):
    """The tokenizers library numbers an added token after the vocabulary, which has pieces behind it now."""
    base, other = tmp_path / "base", tmp_path / "other"
    bpe(added=[("<b1>", True), ("<b2>", False)]).save_pretrained(base)
    bpe(DREAMS, 275, [("<o>", True)]).save_pretrained(other)
    out, made = grown(tmp_path, base, other)
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    assert after.get_vocab() == made.tokens.numbers
    assert after.get_vocab()["<b1>"] == 270 and after.get_vocab()["<b2>"] == 271
    for text in (CATS, DREAMS, "a <b1> b <b2>"):
        assert after(text).input_ids == before(text).input_ids
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab() == made.tokens.numbers


def test_ordinary_pieces_of_a_wordpiece_are_refused(tmp_path):
    _, made = grown(tmp_path, bert(tmp_path / "base"), bert(tmp_path / "a", words=["mat", "##a"]))
    (problem,) = made.problems
    assert problem.startswith("tokenizer: 2 ordinary tokens of a are not in base (first: 'mat'), and a WordPiece")
    assert "source: base" in problem


def test_a_model_that_splits_texts_in_another_way_is_told(tmp_path):
    other = json.loads((gpt2(tmp_path / "x", [("<y>", True)]) / "tokenizer.json").read_text())
    other["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "x" / "tokenizer.json").write_text(json.dumps(other))
    _, made = grown(tmp_path, gpt2(tmp_path / "base"), tmp_path / "x")
    assert made.warnings == ["x splits texts in another way (pre_tokenizer); the output splits them as base"]


def test_nothing_new_leaves_the_files_as_they_are(tmp_path):
    base = gpt2(tmp_path / "base", [("<x>", True)])
    out, _ = grown(tmp_path, base, gpt2(tmp_path / "a"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {p.name: p.read_bytes() for p in base.iterdir()}
