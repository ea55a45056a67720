"""Which tensors count tokens, what becomes of them and of config.json; in models of several kinds."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PhiConfig,
    PhiForCausalLM,
)
from vocabulary_models import EMBEDDING, HEAD, bpe, rows_of, saved

from mergekit_lite.tokens.token_rows import row_map
from mergekit_lite.tokens.tokenizer import Tokens
from mergekit_lite.tokens.vocabulary import TOKEN_MODULES, NewVocabulary, embedding_rows
from wtool.checkpoint import TensorInfo
from wtool.cli import run
from wtool.loading import quiet


def vocabulary(config: dict[str, Any]) -> NewVocabulary:
    """Seven tokens, where a model with this configuration had five of its eight rows."""
    few, more = Tokens({letter: i for i, letter in enumerate("abcde")}), Tokens({x: i for i, x in enumerate("abcdefg")})
    rows = row_map(7, more, [few, more], [8, 7], 0, {})
    return NewVocabulary(rows, frozenset([8, 7]), SimpleNamespace(config=config), {})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("model.embed_tokens.weight", (8, 4), 0),
        ("lm_head.weight", (7, 4), 0),
        ("lm_head.bias", (8,), 0),
        ("final_logits_bias", (1, 8), 1),
        ("model.embed_tokens.weight", (9, 4), None),  # of other things than tokens
        ("model.norm.weight", (8,), None),  # as wide as there are rows, by chance
    ],
)
def test_the_axis_is_told_by_name_and_length(name, shape, axis):
    own = vocabulary({})
    assert own.axis(name, TensorInfo("BF16", shape)) == axis
    if axis is not None:
        expected = tuple(7 if number == axis else length for number, length in enumerate(shape))
        assert own.shape(axis, TensorInfo("BF16", shape)) == TensorInfo("BF16", expected)


def test_config_json_tells_the_rows_and_the_tokenizers_own_numbers():
    theirs = {
        "eos_token_id": [6, 1],
        "bos_token_id": None,
        "image_token_index": 5,
        "hidden_size": 99,
        "vocab_size": 1,
        "text_config": {"pad_token_id": 6, "vocab_size": 1},
    }
    config = {
        "eos_token_id": 1,
        "bos_token_id": 0,
        "image_token_index": 4,
        "hidden_size": 4,
        "vocab_size": 8,
        "text_config": {"pad_token_id": 0, "vocab_size": 8, "num_hidden_layers": 3},
        "vision_config": {"vocab_size": 8},
    }
    assert vocabulary(theirs).configured(config) == {
        "eos_token_id": [6, 1],
        "bos_token_id": 0,  # a number that the other configuration does not tell stays
        "image_token_index": 5,
        "hidden_size": 4,
        "vocab_size": 7,
        "text_config": {"pad_token_id": 6, "vocab_size": 7, "num_hidden_layers": 3},
        "vision_config": {"vocab_size": 8},
    }
    assert vocabulary({}).configured({"text_config": {"vocab_size": 8}}) == {"text_config": {"vocab_size": 7}}


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "lm_head.bias",
        "embed_out.weight",
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "lm_head.decoder.bias",
        "final_logits_bias",
        "shared.weight",
        "transformer.wte.weight",
        "encoder.embed_tokens.weight",
        "model.layers.61.embed_tokens.weight",
    ],
)
def test_names_that_count_tokens(name):
    assert TOKEN_MODULES.search(name)


@pytest.mark.parametrize(
    "name", ["transformer.wpe.weight", "model.norm.weight", "bert.embeddings.position_embeddings.weight", "x.bias"]
)
def test_names_that_do_not(name):
    assert not TOKEN_MODULES.search(name)


def test_rows_are_found_where_the_name_is_no_usual_one():
    tensors = {
        "bert.embeddings.word_embeddings.weight": TensorInfo("F32", (100, 8)),
        "bert.embeddings.position_embeddings.weight": TensorInfo("F32", (512, 8)),
    }
    assert embedding_rows(SimpleNamespace(tensors=tensors)) == 100  # pyright: ignore[reportArgumentType]
    assert embedding_rows(SimpleNamespace(tensors={})) is None  # pyright: ignore[reportArgumentType]


def test_a_head_with_a_bias_grows_with_it(tmp_path):
    for number, (name, added) in enumerate([("first", []), ("second", [("<x>", True)])], 1):
        tokenizer = bpe(added=added)
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        torch.manual_seed(number)
        with quiet():
            model = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes))
            torch.nn.init.normal_(model.lm_head.bias)
            model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    assert run(["merge", str(tmp_path / "first"), str(tmp_path / "second"), "-o", str(out)]) == 0
    first, second, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        assert len(first[name]) == 270 and len(merged[name]) == 271
        torch.testing.assert_close(merged[name][:270], (first[name] + second[name][:270]) / 2)
        assert torch.equal(merged[name][270], second[name][270])
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("the <x> dog", return_tensors="pt").input_ids
    assert 270 in ids and model(ids).logits.shape[-1] == 271


def test_a_masked_models_tied_decoder_and_its_bias(tmp_path):
    for number, (name, added) in enumerate([("first", [("<y>", True)]), ("second", [("<x>", True)])], 1):
        tokenizer = bpe(added=added)
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        torch.manual_seed(number)
        with quiet():
            model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=271, **sizes))
            torch.nn.init.normal_(model.cls.predictions.bias)
            model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    command = ["merge", str(tmp_path / "first"), str(tmp_path / "second"), "--tokenizer", "union", "-o", str(out)]
    assert run(command) == 0
    first, second, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "out"))
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        expected = [(first[name][:270] + second[name][:270]) / 2, first[name][270:], second[name][270:]]
        torch.testing.assert_close(merged[name], torch.cat(expected))
    positions = "bert.embeddings.position_embeddings.weight"  # as many as the tokens were, and no tokens
    torch.testing.assert_close(merged[positions], (first[positions] + second[positions]) / 2)
    with quiet():
        assert AutoModelForMaskedLM.from_pretrained(out)(torch.tensor([[270, 271]])).logits.shape[-1] == 272


def test_slices_of_models_with_other_tokens(tmp_path):
    """What stands outside of the layers is merged over all sources, in the union's order."""
    for number, name in enumerate("ab", 1):
        saved(tmp_path / name, number, bpe(added=[(f"<{name}>", True)]))
    slices = [{"sources": [{"model": str(tmp_path / name), "layer_range": [0, 1]}]} for name in "ab"]
    recipe = {"merge_method": "linear", "slices": slices, "tokenizer": {"source": "union"}}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    assert run(["merge", str(tmp_path / "r.yml"), "-o", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == 272
    for name, sign in ((EMBEDDING, 1), (HEAD, -1)):
        rows = [sign * row for row in rows_of(tmp_path / "out", name)]
        assert rows[270] == 1270 and rows[271] == 2270


def test_the_numbers_of_special_tokens_come_with_the_tokenizer(tmp_path):
    base, chat = saved(tmp_path / "base", 1, bpe()), saved(tmp_path / "chat", 2, bpe(added=[("<end>", True)]))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((chat / name).read_text()) | {"eos_token_id": 270}
        (chat / name).write_text(json.dumps(content))
    assert run(["merge", str(base), str(chat), "-o", str(tmp_path / "out")]) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 270
    assert run(["merge", str(base), str(chat), "--tokenizer", "union", "-o", str(tmp_path / "union")]) == 0
    assert json.loads((tmp_path / "union" / "config.json").read_text())["eos_token_id"] == 1  # the base's


def test_a_row_beyond_the_embedding_is_no_row(tmp_path, capsys):
    """A tokenizer may have more tokens than its model has rows."""
    first, second = saved(tmp_path / "first", 1, bpe()), saved(tmp_path / "second", 2, bpe())
    more = bpe(added=[("<x>", True)])
    more.save_pretrained(second)
    assert run(["merge", str(first), str(second), "--tokenizer", "union", "-o", str(tmp_path / "out")]) == 0
    assert "1 tokens have no row in any model (first: '<x>')" in capsys.readouterr().err
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 271 and rows[270] == pytest.approx(1500 + 269 / 2)
