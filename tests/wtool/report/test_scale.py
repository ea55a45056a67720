"""Scales: colours at equal ratios or distances, every figure inside, none narrow."""

from math import inf

import pytest

from wtool.report.scale import SPAN, STEPS, WIDTH, Scale, scale_of


@pytest.mark.parametrize("scale", [Scale(0.01, 0.9, True), Scale(0.05, 0.2, True), Scale(-0.4, 0.9, False)])
def test_colours_meet_at_equal_ratios_or_distances(scale: Scale) -> None:
    marks = scale.edges()
    assert marks[0] == pytest.approx(scale.low) and marks[-1] == pytest.approx(scale.high) and len(marks) == STEPS + 1
    pairs = list(zip(marks, marks[1:], strict=False))
    sizes = [b / a if scale.logarithmic else b - a for a, b in pairs]
    assert sizes == pytest.approx([sizes[0]] * STEPS)
    for number, (begin, end) in enumerate(pairs):
        inside = (end - begin) * 1e-6
        assert scale.step(begin + inside) == number == scale.step(end - inside)
    assert scale.step(scale.low - 9) == 0 and scale.step(scale.high + 9) == STEPS - 1


def test_a_logarithmic_scale_holds_every_error_and_is_never_narrow() -> None:
    def of(*errors: float | None) -> tuple[float, float] | None:
        found = scale_of(errors, logarithmic=True)
        return found and (found.low, found.high)

    assert of(0.02, 0.5, None, 0.1, inf, 0.0) == pytest.approx((0.02, 0.5))
    assert of(0.1) == pytest.approx((0.1 / SPAN**0.5, 0.1 * SPAN**0.5))
    narrow = of(0.1, 0.11)
    assert narrow and narrow[1] / narrow[0] == pytest.approx(SPAN) and narrow[0] < 0.1 < 0.11 < narrow[1]
    assert of() is None and of(None, 0.0, inf) is None


def test_a_linear_scale_takes_zeros_and_negative_figures() -> None:
    wide = scale_of([-0.5, 0.0, None, inf, 0.5], logarithmic=False)
    assert wide and (wide.low, wide.high) == (-0.5, 0.5)
    narrow = scale_of([0.0], logarithmic=False)
    assert narrow and (narrow.low, narrow.high) == pytest.approx((-WIDTH / 2, WIDTH / 2))


@pytest.mark.parametrize("high, unit", [(0.9, "%"), (0.2, "‰"), (0.001, "‰"), (0.0001, "millionths")])
def test_numbers_have_at_most_three_digits_in_their_unit(high: float, unit: str) -> None:
    name, many = Scale(high / 10, high, True).unit
    assert name == unit and 0.5 <= high * many < 1000
