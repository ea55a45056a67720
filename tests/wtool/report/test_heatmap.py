"""The heatmap: a cell for each linear, of the colour its error has on a logarithmic scale."""

from collections.abc import Mapping
from html import unescape
from math import inf
from xml.etree import ElementTree

from wtool.report.figures import linears, stacks
from wtool.report.heatmap import brief, heatmap, short_names
from wtool.report.measures import OUTPUT
from wtool.report.scale import STEPS, Scale


def drawn(report: Mapping[str, Mapping[str, object]], low: float = 0.01, high: float = 1.0) -> ElementTree.Element:
    (stack,), _ = stacks(linears({"report": report}))
    return ElementTree.fromstring(heatmap(stack, OUTPUT, Scale(low, high, True)))


def cells(picture: ElementTree.Element) -> dict[str, tuple[str, float, float]]:
    """The first line of each cell's tooltip, with its colour and place."""
    found: dict[str, tuple[str, float, float]] = {}
    for group in picture.iter("g"):
        title, box = group.find("title"), group.find("rect")
        assert title is not None and box is not None and title.text
        name = title.text.splitlines()[0]
        found[name] = (box.attrib["class"], float(box.attrib["x"]), float(box.attrib["y"]))
    return found


def test_each_linear_has_its_cell() -> None:
    report = {
        f"model.layers.{block}.{place}": {"output_error": 0.011 + 0.1 * block + 0.3 * column}
        for block in range(3)
        for column, place in enumerate(("self_attn.q_proj", "mlp.down_proj"))
        if (block, column) != (1, 0)
    }
    found = cells(drawn(report))
    assert found.keys() == report.keys()
    for name, (colour, _, _) in found.items():
        error = report[name]["output_error"]
        assert colour == f"c{Scale(0.01, 1.0, True).step(error)}"
    columns = {name.rpartition(".")[2]: {x for key, (_, x, _) in found.items() if key.endswith(name)} for name in found}
    assert all(len(places) == 1 for places in columns.values())
    rows = {block: {y for key, (_, _, y) in found.items() if f".{block}." in key} for block in range(3)}
    assert all(len(places) == 1 for places in rows.values()) and len(set.union(*rows.values())) == 3


def test_a_cell_of_experts_shows_the_worst() -> None:
    report = {f"h.0.experts.{number}.up": {"output_error": error} for number, error in enumerate([0.02, 0.9, 0.1])}
    (shown,) = cells(drawn(report)).items()
    assert shown[0] == "h.0.experts.1.up, the worst of 3" and shown[1][0] == f"c{STEPS - 1}"


def test_what_is_not_known_or_not_finite_is_no_colour() -> None:
    found = cells(drawn({"h.0.a": {"weight_error": inf}, "h.1.a": {}, "h.2.a": {"weight_error": 0.5}}))
    assert [found[f"h.{number}.a"][0] for number in range(3)] == ["bad", "none", f"c{Scale(0.01, 1.0, True).step(0.5)}"]


def test_fallbacks_are_marked_and_told() -> None:
    picture = drawn({"h.0.a": {"output_error": 0.1, "fallback": "x < y & z"}, "h.1.a": {"output_error": 0.1}})
    assert len(list(picture.iter("circle"))) == 2  # the cell and the foot
    titles = [title.text or "" for title in picture.iter("title")]
    assert any(text.endswith("fallback: x < y & z") for text in titles)


def test_a_tooltip_tells_the_figures() -> None:
    told = {"output_error": 0.12345, "rtn_output_error": 0.2, "weight_error": 0.3, "bits": 4}
    texts = [title.text for title in drawn({"h.0.a": told}).iter("title")]
    assert "h.0.a\noutput error 0.1235 (by rounding 0.2000)\nweight error 0.3000\n4 bits" in texts


def test_names_of_places_are_short_and_unlike() -> None:
    assert short_names(["self_attn.q_proj", "mlp.up"]) == ["q_proj", "up"]
    places = ["mlp.up", "mlp.experts.*.up", "mlp.shared.up", "attn.up"]
    assert short_names(places) == ["mlp.up", "experts.up", "shared.up", "attn.up"]
    assert short_names(["a.up", "b.a.up"]) == ["a.up", "b.a.up"]
    assert short_names([""]) == [""]


def test_many_blocks_are_not_all_numbered_and_all_drawn() -> None:
    picture = drawn({f"h.{number}.a": {"weight_error": 0.1} for number in range(126)})
    numbers = [text.text for text in picture.iter("text") if text.attrib.get("class") == "block"]
    assert numbers == [str(number) for number in range(0, 126, 5)]
    assert len(list(picture.iter("rect"))) == 126 + STEPS
    _, _, _, height = map(float, picture.attrib["viewBox"].split())
    assert all(y < height for _, _, y in cells(picture).values())


def test_the_number_stands_in_the_cell() -> None:
    picture = drawn({"h.0.a": {"weight_error": 0.037}, "h.1.a": {"weight_error": inf}}, 0.01, 0.1)
    numbers = [text.text for text in picture.iter("text") if text.attrib.get("class", "").startswith("n ")]
    assert numbers == ["37", "!"]
    told = [text.text for text in picture.iter("text")]
    assert "10 to 100 ‰ (output error)" in told


def test_numbers_are_brief() -> None:
    assert brief(-0.42, Scale(-0.5, 0.9, False)) == "−42"
    assert brief(0.0004, Scale(0.0001, 0.2, True)) == "0"
    assert brief(12.0, Scale(0.1, 12.0, True)) == "…"


def test_hostile_names() -> None:
    name = 'h.0.<script>alert("x")</script>'
    assert name in {unescape(key) for key in cells(drawn({name: {"weight_error": 0.1}}))}
