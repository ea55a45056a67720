"""Which figures are drawn, and which layer is the worst of them."""

from math import inf, nan

from wtool.report.figures import Linear
from wtool.report.measures import COSINE, OUTPUT, shown


def names(*found: Linear) -> list[str]:
    return [measure.name for measure in shown(found)]


def test_outputs_where_they_are_known_else_weights() -> None:
    assert names(Linear("a", weight_error=0.1), Linear("b", weight_error=0.1, output_error=0.2)) == ["output error"]
    assert names(Linear("a", weight_error=0.1)) == ["weight error"]
    assert names(Linear("a")) == [] == names()


def test_zeros_are_drawn_only_where_they_differ() -> None:
    assert names(Linear("a", sparsity=0.5), Linear("b", sparsity=0.501)) == []
    assert names(Linear("a", sparsity=0.5), Linear("b", sparsity=0.6)) == ["sparsity"]


def test_a_merge() -> None:
    assert names(Linear("a", conflict=0.0, cosine=1.0, change=0.1)) == ["conflict", "cosine", "change"]


def test_the_worst() -> None:
    found = [Linear(str(number), weight_error=error) for number, error in enumerate([0.1, None, 0.3, 0.2])]
    assert OUTPUT.worst(found).module == "2"
    assert OUTPUT.worst([*found, Linear("bad", weight_error=nan)]).module == "bad"
    assert OUTPUT.worst([found[1], found[0]]).module == "0" and OUTPUT.worst([found[1]]).module == "1"
    assert OUTPUT.badness(Linear("a", weight_error=inf)) == OUTPUT.badness(Linear("a", weight_error=nan)) == inf
    assert COSINE.worst([Linear("a", cosine=0.5), Linear("b", cosine=-0.5), Linear("c")]).module == "b"
