"""The two kinds of text of the demo: prose and code that every CPython carries.

``docs``: topics of the language reference, as ``help("for")`` shows them
(``pydoc_data.topics``). ``code``: the source of pure-Python modules of the
standard library. So real text is at hand on any machine, without a download
and without shipping a line of it.

Both are split by name alone, never by content, so that the split that trained
the demo's models holds on another Python version too, where the texts differ a
little. Some topics quote others whole ("compound" holds "if", "for", "try" ...),
hence the rule which makes the split honest: a paragraph that stands in a
held-out document is taken out of the training text, wherever it occurs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Domain = Literal["docs", "code"]

DOMAINS: tuple[Domain, ...] = ("docs", "code")

TRAINING_MODULES = (
    "argparse ast calendar configparser contextlib dataclasses difflib dis enum fractions ftplib functools gettext "
    "gzip inspect ipaddress optparse pickle plistlib pprint random selectors shutil smtplib socket statistics "
    "subprocess tarfile tempfile threading tokenize traceback typing"
).split()

HELD_OUT_MODULES = "csv queue shelve shlex textwrap".split()

# Shorter paragraphs ("Example:", a closing quote) are part of the language rather than of one text.
SHORTEST_OWN_PARAGRAPH = 40


def training_documents(domain: Domain) -> dict[str, str]:
    """Give the texts to train on, by topic or module name, without repeated and without held-out paragraphs."""
    seen = {
        _fingerprint(paragraph)
        for other in DOMAINS
        for text in held_out_documents(other).values()
        for paragraph in text.split("\n\n")
    }
    documents = _topics(held_out=False) if domain == "docs" else _modules(TRAINING_MODULES)
    return {name: "\n\n".join(_new_paragraphs(text, seen)) for name, text in documents.items()}


def held_out_documents(domain: Domain) -> dict[str, str]:
    """Give the texts no demo model was trained on, by topic or module name."""
    return _topics(held_out=True) if domain == "docs" else _modules(HELD_OUT_MODULES)


def training_text(domain: Domain) -> str:
    """Give all training text of a domain as one string."""
    return "\n\n".join(training_documents(domain).values())


def held_out_text(domain: Domain, limit_characters: int = 60_000) -> str:
    """Give held-out text of a domain, at most `limit_characters`, from the start of every document.

    The limit is shared evenly; what a short document leaves goes to the longer ones.
    """
    documents = sorted(held_out_documents(domain).values(), key=len)
    excerpts: list[str] = []
    remaining = limit_characters
    for position, text in enumerate(documents):
        excerpt = text[: remaining // (len(documents) - position)]
        excerpts.append(excerpt)
        remaining -= len(excerpt)
    return "\n\n".join(excerpts)[:limit_characters]


def is_held_out_topic(name: str) -> bool:
    """Tell whether a topic is for measuring only: by chance 5 of 79, an eighth of the text, whatever the version."""
    return zlib.crc32(name.encode()) % 10 == 0


def _topics(*, held_out: bool) -> dict[str, str]:
    from pydoc_data.topics import topics  # half a megabyte of literals: load it only where it is used

    return {name: topics[name] for name in sorted(topics) if is_held_out_topic(name) == held_out}


def _modules(names: Sequence[str]) -> dict[str, str]:
    """Read the source of every module of the list that this Python has as a .py file."""
    sources = {}
    for name in names:
        spec = find_spec(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            sources[name] = Path(spec.origin).read_text(encoding="utf-8")
    return sources


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """Yield the paragraphs of a text which were not seen before, and note them in `seen`."""
    for paragraph in text.split("\n\n"):
        fingerprint = _fingerprint(paragraph)
        if len(fingerprint) >= SHORTEST_OWN_PARAGRAPH and fingerprint in seen:
            continue
        seen.add(fingerprint)
        yield paragraph


def _fingerprint(paragraph: str) -> str:
    """Reduce a paragraph to its words, as a quoting text may indent or wrap it differently."""
    return " ".join(paragraph.split())
