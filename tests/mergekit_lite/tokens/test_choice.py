"""Merges of models with vocabularies of their own: every row of the output against what it is defined to be."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_models import CATS, DREAMS, EMBEDDING, HEAD, PIECES, bpe, rows_of, saved

from mergekit_lite.planner import plan_merge
from mergekit_lite.recipe import parse_recipe
from wtool.checkpoint import TensorInfo
from wtool.cli import run

BASE = [f"base:{i}" for i in range(PIECES)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "base", 1, bpe())
    saved(folder / "a", 2, bpe(added=[("<a>", True), ("<both>", False)]))
    saved(folder / "b", 3, bpe(added=[("<both>", True), ("<b>", False)]))
    saved(folder / "padded", 4, bpe(), rows=288)
    saved(folder / "other", 5, bpe(DREAMS, 275, [("<o>", True)]))
    saved(folder / "tied", 6, bpe(added=[("<t>", True)]), tied=True)
    return folder


def linear(models, weights, base=None, **keys):
    """A recipe of a weighted mean; with one weight of 1 the output shows what that model brings to the merge."""
    entries = [{"model": str(models / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    recipe = {"merge_method": "linear", "models": entries, "dtype": "float32", **keys}
    return recipe | ({"base_model": str(models / base)} if base else {})


def merged(recipe, folder, *flags):
    (folder / "r.yml").write_text(yaml.safe_dump(recipe))
    assert run(["merge", str(folder / "r.yml"), "-o", str(folder / "out"), *flags]) == 0
    return folder / "out"


def by_token(folder, name=EMBEDDING):
    """token -> its row, through the tokenizer as transformers loads it."""
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), rows_of(folder, name)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(rows) >= len(tokenizer)
    return {token: rows[number] for token, number in tokenizer.get_vocab().items()}


# The numbers of the new tokens in each model are: a: <a> 270, <both> 271; b: <both> 270, <b> 271.
UNION = {
    "base": {"<a>": 2270, "<both>": (2271 + 3270) / 2, "<b>": 3271},  # it lacks all three
    "a": {"<a>": 2270, "<both>": 2271, "<b>": 3271},
    "b": {"<a>": 2270, "<both>": 3270, "<b>": 3271},
}


@pytest.mark.parametrize("whose", UNION)
def test_a_union_has_every_token_and_a_model_that_lacks_one_gets_the_others_mean(models, tmp_path, whose):
    weights = {name: float(name == whose) for name in UNION}
    out = merged(linear(models, weights, base="base", tokenizer={"source": "union"}), tmp_path)
    for name, sign in ((EMBEDDING, 1), (HEAD, -1)):
        found = by_token(out, name)
        assert {token: sign * found[token] for token in UNION[whose]} == UNION[whose]
        number = ["", "base", "a", "b"].index(whose)
        assert sign * found["dog"] == number * 1000 + AutoTokenizer.from_pretrained(models / whose).get_vocab()["dog"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoTokenizer.from_pretrained(models / "base").get_vocab()
    assert {token: tokenizer.get_vocab()[token] for token in base} == base  # no number of the base's has changed
    assert tokenizer.decode(tokenizer("cat <a> sat <both><b>").input_ids, skip_special_tokens=True) == (
        "cat  sat <both><b>"  # <a> is special, as in its model; <both> is of the first model that has it
    )


def test_a_merge_of_task_vectors_leaves_a_lone_models_row_as_it_is(models, tmp_path):
    recipe = linear(models, {"a": 1.0, "b": 1.0}, base="base", tokenizer={"source": "union"})
    found = by_token(merged(recipe | {"merge_method": "task_arithmetic"}, tmp_path))
    assert found["<a>"] == 2270 and found["<b>"] == 3271
    middle = (2271 + 3270) / 2
    assert found["<both>"] == middle + (2271 - middle) + (3270 - middle)
    assert found["<s>"] == 1000 + 1000 + 2000


def test_without_a_base_the_first_model_only_numbers(models, tmp_path):
    weights = {"a": 0.0, "base": 1.0}
    found = by_token(merged(linear(models, weights, tokenizer_source="union"), tmp_path))
    assert found["<both>"] == 2271 and found["<s>"] == 1000


@pytest.mark.parametrize(("source", "tokens"), [("base", []), ("a", ["<a>", "<both>"]), ("b", ["<both>", "<b>"])])
def test_the_tokenizer_of_one_model(models, tmp_path, source, tokens):
    name = source if source == "base" else str(models / source)
    recipe = linear(models, {"base": 0.0, "a": 0.0, "b": 1.0}, base="base", tokenizer={"source": name})
    out = merged(recipe, tmp_path)
    found = by_token(out)
    assert list(found)[PIECES:] == [] if not tokens else set(tokens) == found.keys() & {"<a>", "<both>", "<b>"}
    assert len(rows_of(out)) == PIECES + len(tokens)
    assert found["<s>"] == 3000
    expected = {"<a>": 2270, "<both>": 3270, "<b>": 3271}
    assert {token: found[token] for token in tokens} == {token: expected[token] for token in tokens}
    assert (out / "tokenizer.json").read_bytes() == (models / source / "tokenizer.json").read_bytes()


def test_rows_of_single_tokens(models, tmp_path):
    a, b = str(models / "a"), str(models / "b")
    rules = {
        "<both>": {"source": b},
        "<a>": {"source": {"kind": "zero"}},
        "<b>": {"source": {"kind": "model_token", "model": a, "token": "</s>"}},
        "<s>": {"source": {"kind": "model_token", "model": a, "token_id": 7}, "force": True},
    }
    tokenizer = {"source": "union", "tokens": rules}
    for whose, expected in (("base", {"<both>": 3270, "<a>": 0, "<b>": 2001}), ("a", {"<both>": 2271, "<a>": 2270})):
        folder = tmp_path / whose
        folder.mkdir()
        weights = {name: float(name == whose) for name in UNION}
        found = by_token(merged(linear(models, weights, base="base", tokenizer=tokenizer), folder))
        assert {token: found[token] for token in expected} == expected
        assert found["<s>"] == 2007 and found["</s>"] == (1001 if whose == "base" else 2001)


def test_a_row_that_no_model_has_is_the_mean_of_the_models_own(models, tmp_path):
    tokenizer = {"source": "union", "pad_to_multiple_of": 32}
    out = merged(linear(models, {"base": 0.0, "a": 1.0, "b": 0.0}, base="base", tokenizer=tokenizer), tmp_path)
    rows = rows_of(out)
    own = [*(2000.0 + i for i in range(PIECES)), 2270.0, 2271.0, 3271.0]
    assert len(rows) == 288 and rows[: len(own)] == own
    assert rows[len(own) :] == pytest.approx([sum(own) / len(own)] * 15)


def test_models_that_differ_by_padding_alone_merge_with_a_remark(models, tmp_path, capsys):
    """The output has the first model's rows; the padding is that of the models that have it."""
    for first, second, count in (("base", "padded", 270), ("padded", "base", 288)):
        folder = tmp_path / first
        folder.mkdir()
        weights = {first: 0.25, second: 0.75}
        rows = rows_of(merged(linear(models, weights), folder))
        assert f"for its 270 tokens; the output has {count}" in capsys.readouterr().err
        lower = 0.25 if first == "base" else 0.75
        expected = [1000 * lower + 4000 * (1 - lower) + i for i in range(PIECES)]
        assert rows == pytest.approx([*expected, *(4000.0 + i for i in range(PIECES, count))])


def test_a_model_with_more_tokens_gives_its_tokenizer(models, tmp_path, capsys):
    out = merged(linear(models, {"base": 0.5, "a": 0.5}, base="base"), tmp_path)
    assert "the output has the tokenizer of" in capsys.readouterr().err
    found = by_token(out)
    assert found["<a>"] == 2270 and found["<both>"] == 2271 and found["<s>"] == 1500


def test_unlike_tokens_need_a_word(models, tmp_path, capsys):
    a, b = str(models / "a"), str(models / "b")
    assert run(["merge", a, b, "-o", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert "1 of 272 tokens have other numbers" in error and "first: '<both>' is 270, not 271" in error
    assert "tokenizer: {source: union}" in error and "--tokenizer union|base|MODEL" in error
    assert run(["merge", a, b, "--tokenizer", "union", "-o", str(tmp_path / "out")]) == 0
    assert by_token(tmp_path / "out").keys() >= {"<a>", "<both>", "<b>"}


def test_an_embedding_tied_in_one_model_only(models, tmp_path):
    out = merged(linear(models, {"tied": 1.0, "a": 0.0}, tokenizer={"source": "union"}), tmp_path)
    assert by_token(out, HEAD)["<t>"] == by_token(out)["<t>"] == 6270
    assert by_token(out)["<a>"] == 2270 and by_token(out, HEAD)["<a>"] == -2270


def test_pieces_of_another_bpe_have_rows_and_leave_the_splitting_of_texts_alone(models, tmp_path, capsys):
    recipe = linear(models, {"base": 0.0, "other": 1.0}, base="base", tokenizer={"source": "union"})
    out = merged(recipe, tmp_path)
    assert "15 ordinary tokens" in capsys.readouterr().err
    theirs, base, ours = (AutoTokenizer.from_pretrained(path) for path in (models / "other", models / "base", out))
    found = by_token(out)
    assert {token: found[token] for token in theirs.get_vocab()} == {
        token: 5000.0 + number for token, number in theirs.get_vocab().items()
    }
    for text in (CATS, DREAMS, "gr ee iou", "Ġideas"):
        assert ours(text).input_ids == base(text).input_ids
    piece = ours.get_vocab()["Ġideas"]
    assert ours.decode([piece]) == " ideas"  # an added token would be decoded as it is spelt
    assert ours.convert_ids_to_tokens(ours("the <o> dog").input_ids) == ["the", "Ġ", "<o>", "Ġ", "dog"]


def test_the_output_opens_and_computes(models, tmp_path):
    recipe = linear(models, {"base": 0.5, "a": 0.3, "b": 0.2}, base="base", tokenizer={"source": "union"})
    out = merged(recipe, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the <b> dog", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], 273)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1


def test_gpt2_with_its_tied_embedding(tmp_path):
    first = saved(tmp_path / "first", 1, bpe(), kind="gpt2")
    second = saved(tmp_path / "second", 2, bpe(added=[("<x>", True)]), rows=280, kind="gpt2")
    assert run(["merge", str(first), str(second), "-o", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out", "transformer.wte.weight")
    assert len(rows) == 280 and rows[270] == 2270 and rows[3] == 1503 and rows[279] == 2279
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 280 and model.lm_head.weight.shape == (280, 8)


def test_what_is_no_input_of_a_step_gives_its_rows_too(models, tmp_path):
    """A base without a weight gives tokenizer and rows, and takes no part in a mean."""
    recipe = linear(models, {"padded": 1.0, "base": 0.0}, base="a", tokenizer={"source": "base"})
    found = by_token(merged(recipe, tmp_path))
    assert found["<a>"] == 2270 and found["<both>"] == 2271 and found["<s>"] == 4000


def test_models_without_a_known_tokenizer(tmp_path, capsys):
    for number, name in enumerate("ab", 1):
        saved(tmp_path / name, number, None)
        (tmp_path / name / "tokenizer.model").write_bytes(b"sentencepiece" + name.encode())
    a, b, out = str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")
    assert run(["merge", a, b, "--tokenizer", "union", "-o", out]) == 3
    error = capsys.readouterr().err
    assert "has no tokenizer.json" in error and "save_pretrained" in error and error.count("\n") == 1
    assert run(["merge", a, b, "--tokenizer", "base", "-o", out]) == 3
    assert "whether its tokens are those of the others is not known" in capsys.readouterr().err
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"sentencepiecea")
    assert run(["merge", a, b, "--tokenizer", "base", "-o", out]) == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"sentencepiecea"
    assert rows_of(tmp_path / "out")[5] == 1505


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        ({"source": "unoin"}, "tokenizer: 'unoin' is none of the models; did you mean 'union'?"),
        ({"tokens": {"<bth>": {"source": {"kind": "zero"}}}}, "no token '<bth>'; did you mean '<both>'?"),
        ({"tokens": {"<b>": {"source": "A"}}}, "has no row for '<b>' (it has 272 rows)"),
        (
            {"tokens": {"<b>": {"source": {"kind": "model_token", "model": "A", "token_id": 272}}}},
            "has no row for number 272 (it has 272 rows)",
        ),
    ],
)
def test_what_is_not_there_is_named(models, tmp_path, capsys, tokenizer, told):
    text = yaml.safe_dump(linear(models, {"a": 1.0, "b": 1.0}, tokenizer=tokenizer))
    (tmp_path / "r.yml").write_text(text.replace(": A\n", f": {models / 'a'}\n"))
    assert run(["merge", str(tmp_path / "r.yml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_plan_counts_the_rows_it_holds(models):
    recipe = linear(models, {"a": 1.0, "b": 1.0}, tokenizer={"source": "union"})
    plan = plan_merge(parse_recipe(recipe, "here"))
    step = next(step for step in plan.steps if EMBEDDING in step.outputs)
    # both inputs in the output's order, and twice the three rows that one of them lacks (<a>, <b>), in float32
    assert step.scratch == 2 * 273 * 8 * 4 + 2 * 2 * 8 * 4
    assert step.outputs[EMBEDDING] == TensorInfo("F32", (273, 8))


def test_models_on_the_hub_are_planned_from_their_tokenizers_alone(models, hub, tmp_path, capsys):
    for name in ("a", "b"):
        hub.add(f"org/{name}", models / name)
    command = ["merge", "org/a", "org/b", "--dry-run", "--json"]
    assert run([*command, "--tokenizer", "union"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_to_read"] and not plan["problems"]
    assert run(command) == 3
    assert "have other numbers in org/b" in json.loads(capsys.readouterr().out)["problems"][0]
    cached = [path.name for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert "tokenizer.json" in cached and "model.safetensors" not in cached


def test_rows_have_a_type_of_their_own(models, tmp_path):
    """What a model lacks is rounded to the type that its tensor has."""
    recipe = linear(models, {"base": 1.0, "a": 0.0, "b": 0.0}, base="base", tokenizer={"source": "union"})
    out = merged(recipe | {"dtype": "bfloat16"}, tmp_path)
    assert by_token(out)["<both>"] == torch.tensor((2271 + 3270) / 2).bfloat16().item()
    assert Path(out / "tokenizer.json").is_file()
