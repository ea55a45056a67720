"""Model cards: what a card has stays, what is known and lacking is added."""

import json

import pytest
import yaml

from wtool.card import bases, completed, read_figures
from wtool.errors import MalformedFile, MissingInput

MADE = {
    "wtool": "0.1.0",
    "recipe": {"quantize": {"model": "org/a", "bits": 4}},
    "inputs": [{"checkpoint": "org/a@main", "revision": "0" * 40}],
    "tensors_xxh3": {"w": "1"},
}
MEASURED = {"reference": None, "texts": [{"file": "x/held-out.txt", "perplexity": 3.0, "tokens": 1000}]}


def head(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_is_made_of_the_manifest():
    card = completed(None, MADE, [], "small-a")
    assert head(card) == {"library_name": "transformers", "tags": ["wtool"], "base_model": ["org/a"]}
    assert "# small-a" in card and "wtool quantize recipe.yml" in card
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == MADE["recipe"]["quantize"]


def test_what_a_card_says_already_stays():
    written = "---\nlicense: mit\nbase_model: other/base\ntags: [mine]\n---\n\n# Mine\n\nWords.\n"
    card = completed(written, MADE, [], "name")
    assert head(card)["license"] == "mit" and head(card)["base_model"] == "other/base"
    assert head(card)["tags"] == ["mine", "wtool"]
    assert card.endswith("# Mine\n\nWords.\n")
    assert completed("# Not wtool's\n", {}, [], "name") == "# Not wtool's\n"


def test_figures_are_put_in_once():
    card = completed(None, MADE, [MEASURED], "name")
    assert "| held-out.txt | 3.0000 | 1,000 | - | - |" in card and "reference" not in card
    again = completed(card, MADE, [{**MEASURED, "texts": [{**MEASURED["texts"][0], "perplexity": 2.5}]}], "name")
    assert "2.5000" in again and "3.0000" not in again and again.count("## Measured") == 1
    assert completed(card, MADE, [MEASURED], "name") == card


def test_the_bases_of_an_input_made_here_are_found_through_it(tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    inputs = [{"checkpoint": f"org/{name}", "revision": "0" * 40} for name in "ab"]
    (merged / "wtool.json").write_text(json.dumps({"inputs": inputs}))
    assert bases({"inputs": [{"checkpoint": str(merged)}]}) == ["org/a", "org/b"]
    assert bases({"inputs": [{"checkpoint": "org/a+lora", "revision": "0" * 40}, {"checkpoint": "gone"}]}) == ["org/a"]
    (merged / "wtool.json").write_text(json.dumps({"inputs": [{"checkpoint": str(merged)}]}))
    assert bases({"inputs": [{"checkpoint": str(merged)}]}) == []


def test_damage_is_told(tmp_path):
    with pytest.raises(MalformedFile, match=r"README.md: its front matter is not YAML"):
        completed("---\na: [\n---\n", MADE, [], "name")
    with pytest.raises(MissingInput, match=r"wtool eval … --json"):
        read_figures(tmp_path / "eval.json")
    (tmp_path / "eval.json").write_text('{"texts": [{"kl": 1}]}')
    with pytest.raises(MalformedFile, match="each with a perplexity"):
        read_figures(tmp_path / "eval.json")
