"""The top level of the command: what it answers at once, and how errors are told to people and to scripts."""

import json
import subprocess
import sys

import pytest

from wtool.cli import VERBS, load, run


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merg", "--json"], 2, "no verb 'merg'; did you mean 'merge'?"),
        (["inspect", "nowhere/at/all", "--json"], 3, "no such file or folder"),
        (["inspect", "--json", "--tensor"], 2, "No such option"),
        (["merge", "a", "--json"], 2, "where to?"),
        (["eval", "--json"], 2, "Missing"),
    ],
)
def test_an_error_is_one_line_for_people_and_an_object_for_scripts(capsys, arguments, code, message):
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert json.loads(captured.out) == {"error": captured.err.removeprefix("error: ").strip(), "exit_code": code}
    assert run([argument for argument in arguments if argument != "--json"]) == code
    assert capsys.readouterr().out == ""


def test_a_bug_shows_its_traceback_and_is_told_to_scripts(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr("wtool.checkpoint.open_checkpoint", broken)
    with pytest.raises(KeyError, match="a bug"):
        run(["inspect", "x", "--json"])
    assert json.loads(capsys.readouterr().out) == {"error": "KeyError: 'a bug'", "exit_code": 1}


def test_a_stop_has_a_code_of_its_own(capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("wtool.checkpoint.open_checkpoint", stopped)
    assert run(["inspect", "x", "--json"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "stopped\n" and json.loads(captured.out) == {"error": "stopped", "exit_code": 130}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_be_loaded_and_says_more_when_asked(verb, capsys):
    assert load(verb) is not None
    assert run([verb, "--help"]) == 0
    told = capsys.readouterr().out
    assert "--verbose" in told and "Usage:" in told


def test_what_happens_inside_is_told_on_stderr(capsys, monkeypatch, tmp_path):
    arguments = ["inspect", "wtool/demo/models/base", "--json"]
    monkeypatch.delenv("WTOOL_LOG", raising=False)
    assert run(arguments) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert run([*arguments, "--verbose"]) == 0
    loud = capsys.readouterr()
    assert loud.out == quiet.out and "wtool: inspect ended after" in loud.err
    monkeypatch.setenv("WTOOL_LOG", "debug")
    assert run(arguments) == 0
    assert "wtool: inspect ended after" in capsys.readouterr().err
    monkeypatch.setenv("WTOOL_LOG", "loud")
    assert run(arguments) == 2
    assert "WTOOL_LOG is 'loud'; there are debug, info, warning" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--nonsense", "-x"])
def test_an_unknown_option_of_the_tool_itself(flag, capsys):
    assert run([flag]) == 2
    assert f"no option '{flag}'" in capsys.readouterr().err


def test_help_and_completion_do_not_wait_for_torch():
    code = (
        "import sys; from wtool.cli import run\n"
        "for words in (['--help'], ['--version'], ['--complete', ''], ['--complete', 'quantize', '--'], ['doctor'],\n"
        "              ['--show-completion', 'bash']): run(words)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub.hf_api'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
