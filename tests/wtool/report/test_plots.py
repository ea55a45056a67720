"""The plots alone: PNG files of the right size, in the colours of the scale."""

import pytest
from pictures import pixels

from wtool.report.plots import ZOOM, plots, png

pytest.importorskip("resvg_py", reason="pip install 'wtool[png]'")
MANIFEST = {
    "report": {f"m.{n}.{place}": {"weight_error": 0.01 * 4**n} for n in range(3) for place in ("up", "down")},
    "evaluation": [{"tokens": n, "kl": 1.0 / (n + 1)} for n in range(4)],
}


def test_their_names() -> None:
    assert list(plots(MANIFEST)) == ["weight-error-m", "held-out-text-kl-from-the-teacher"]
    assert plots({}) == {}


def test_the_picture_has_the_colours_of_the_scale() -> None:
    picture = plots(MANIFEST)["weight-error-m"]
    width, height, colours = pixels(png(picture))
    box = [float(number) for number in picture.split('viewBox="')[1].split('"')[0].split()]
    assert (width, height) == (int(box[2] * ZOOM), int(box[3] * ZOOM))
    wanted = {bytes.fromhex(colour) for colour in ("fbf5d3", "dd5f3c", "2f0d4d", "ffffff")}
    assert wanted <= colours
