"""The display of long work, and memory."""

import io
import sys

import numpy as np
import pytest

from wtool import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("unit", "told"), [("bytes", "bytes"), ("batches", "20/20")])
def test_a_terminal_shows_stage_amount_and_memory(monkeypatch, unit, told):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.progress("quantizing", 20, unit=unit) as advance:
        for _ in range(20):
            advance(1)
    shown = terminal.getvalue()
    assert "quantizing" in shown and told in shown and "B held, " in shown and "B own" in shown


@pytest.mark.parametrize(("columns", "told"), [("160", True), ("110", False)])
def test_the_layer_is_told_where_there_is_room(monkeypatch, columns, told):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console.working_on("before anything is shown")
    with console.progress("quantizing", 20) as advance:
        console.working_on("model.layers.7.[mlp]")
        advance(20)
    console.working_on("after it")
    shown = terminal.getvalue()
    assert ("model.layers.7.[mlp]" in shown) == told
    assert "anything" not in shown and "after" not in shown


def test_nothing_is_shown_to_no_terminal_or_where_none_is_wanted(monkeypatch):
    for stream, quiet in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with console.progress("quantizing", 20, quiet=quiet) as advance:
            advance(20)
        assert stream.getvalue() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_what_the_process_holds():
    before = console.memory()
    held = np.ones(50_000_000, np.uint8)
    after = console.memory()
    assert before and after and held.nbytes
    for earlier, later in zip(before, after, strict=True):
        assert 45_000_000 < later - earlier < 80_000_000
    assert after[1] <= after[0]
