import pytest

from mergekit_lite.recipe import parse_recipe
from mergekit_lite.tokens.recipe import ModelToken, Zero, tokenizer_asked
from wtool.errors import UsageError

GOOD = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def test_mergekits_spelling():
    tokens = {
        "<a>": {"source": "org/a@main"},
        "<b>": {"source": {"kind": "zero"}, "force": True},
        "<c>": {"source": {"kind": "model_token", "model": {"model": {"path": "b"}}, "token_id": 3}},
        "<d>": {"source": {"model": {"path": "b", "revision": "v1"}}},
    }
    recipe = parse_recipe({**GOOD, "tokenizer": {"source": "base", "tokens": tokens, "pad_to_multiple_of": 64}}, "x")
    assert recipe.tokenizer is not None
    rules = recipe.tokenizer.tokens
    assert rules["<a>"].source == "org/a@main" and not rules["<a>"].force
    assert rules["<b>"].source == Zero(kind="zero") and rules["<b>"].force
    assert rules["<c>"].source == ModelToken(kind="model_token", model="b", token_id=3)
    assert rules["<d>"].source == "b@v1"
    assert parse_recipe(recipe.model_dump(mode="json", exclude_none=True), "again") == recipe


@pytest.mark.parametrize("source", ["union", "base", "a", "model:a"])
def test_the_old_spelling(source):
    recipe = parse_recipe({**GOOD, "tokenizer_source": source}, "x")
    asked = tokenizer_asked(recipe.tokenizer, recipe.tokenizer_source)
    assert asked is not None and asked.source == source.removeprefix("model:")


def test_the_default_is_a_union():
    recipe = parse_recipe({**GOOD, "tokenizer": {}}, "x")
    assert recipe.tokenizer is not None and recipe.tokenizer.source == "union"
    assert tokenizer_asked(None, None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": {}, "tokenizer_source": "base"}, "give one of them"),
        ({"tokenizer": {"sorce": "base"}}, "unknown key 'tokenizer.sorce'; did you mean 'source'?"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "'tokenizer.pad_to_multiple_of': "),
        ({"tokenizer": {"tokens": {"<a>": {"force": True}}}}, "source' is missing"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "model_token", "model": "a"}}}}}, "token or token_id"),
    ],
)
def test_mistakes_are_one_line_with_the_cure(change, message):
    with pytest.raises(UsageError) as caught:
        parse_recipe({**GOOD, **change}, "recipe.yml")
    assert message in str(caught.value) and "\n" not in str(caught.value)
