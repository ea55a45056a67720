"""Pages opened in headless Chromium, as a reader would see them."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
).split()
# Chromium makes no window narrower than 500 pixels, so a phone is a frame in one.
FRAME = """<!doctype html><html><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe></body></html>"""
MEASURE = """<script>addEventListener("load", () => document.body.setAttribute("data-told",
JSON.stringify(({expression})(document.querySelector("iframe").contentDocument))))</script></html>"""


@dataclass(frozen=True)
class View:
    """How a page is looked at."""

    width: int = 1200  # pixels
    height: int = 1600
    dark: bool = False

    def flags(self) -> list[str]:
        return [f"--window-size={max(self.width, 500)},{self.height}", *(["--force-dark-mode"] if self.dark else [])]


def photograph(page: Path, view: View, picture: Path) -> Path:
    """A picture of a page (PNG, one pixel a pixel)."""
    _run(_framed(page, view, ""), [*view.flags(), f"--screenshot={picture}"], picture.parent)
    return picture


def measured(page: Path, view: View, expression: str) -> str:
    """What a function of JavaScript, called with the page's document, says of it (JSON)."""
    frame = _framed(page, view, MEASURE.replace("{expression}", expression))
    told = _run(frame, [*view.flags(), "--allow-file-access-from-files", "--dump-dom"], page.parent)
    found = re.search(r'data-told="([^"]*)"', told)
    assert found, told[-500:]
    return unescape(found[1])


def _framed(page: Path, view: View, script: str) -> Path:
    frame = page.with_name(f"{page.stem}-{view.width}-frame.html")
    content = FRAME.format(page=page.name, width=view.width, height=view.height)
    frame.write_text(content.replace("</html>", script or "</html>"))
    return frame


def _run(page: Path, flags: list[str], folder: Path) -> str:
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
