"""The site builds without a warning, every page has its place, and none needs another host."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS

from wtool.cli import VERBS

ROOT = DOCS.parent
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_verb_has_its_page() -> None:
    assert {page.stem for page in (DOCS / "verbs").glob("*.md")} == set(VERBS)


def test_every_page_has_its_place() -> None:
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", CONFIG, re.MULTILINE)) == pages


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'wtool[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(VERBS)
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="?(https?:[^" >]+)', page.read_text(encoding="utf-8"))
        loaded += re.findall(
            r'<link rel="?(?:stylesheet|preconnect|icon)"?[^>]*href="?(https?:[^" >]+)', page.read_text()
        )
        assert loaded == [], page
