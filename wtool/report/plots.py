"""The plots of a report alone, as PNG files on white.

They are drawn by resvg (package resvg-py, 3 MB, extra `png`): it needs no browser and no library of the system, and
takes the page's own style. Cairo's bindings need libcairo and know no CSS variables; a browser is 300 MB.
"""

import re
from collections.abc import Mapping
from typing import Any

from wtool.errors import RuntimeProblem
from wtool.report import curves, layers
from wtool.report.figures import linears
from wtool.report.style import LIGHT, PICTURE

ZOOM = 3  # pixels a unit
_NO_NAME = re.compile(r"[^A-Za-z0-9]+")


def plots(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of a manifest as SVG, by the names of their files (without an ending)."""
    drawn = [
        (f"{measure.name} {name}", picture)
        for measure, theirs in layers.drawings(linears(manifest))
        for name, picture in theirs
    ]
    drawn += curves.drawings(manifest)
    return {_NO_NAME.sub("-", name).strip("-").lower(): picture for name, picture in drawn}


def png(picture: str) -> bytes:
    """A picture of a report as PNG, in the colours of the light theme.

    raises: RuntimeProblem where resvg-py is not installed
    """
    try:
        import resvg_py
    except ImportError:
        raise RuntimeProblem("--png needs the package resvg-py: pip install 'wtool[png]'") from None
    alone = picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return bytes(
        resvg_py.svg_to_bytes(svg_string=alone, style_sheet=_resolved(PICTURE), background="#ffffff", zoom=ZOOM)
    )


def _resolved(css: str) -> str:
    """Style with the light theme's colours in the place of their names, which resvg does not know."""
    return re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], css)
