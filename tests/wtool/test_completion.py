"""Completion: what may stand in the place of the last word, and the scripts in a real shell."""

import shutil
import subprocess
import sys

import pytest

from wtool.cli import VERBS, load, run
from wtool.completion import SHELLS, candidates


def found(*words):
    return candidates(list(words), VERBS, load)


def test_verbs_come_first():
    assert set(VERBS) < set(found(""))
    assert found("qu") == ["quantize"]
    assert found("me") == ["merge", "merge-lora"]
    assert found("--v") == ["--version"]


def test_options_of_a_verb():
    assert found("merge", "--den") == ["--density"]
    assert set(found("quantize", "org/model", "--s")) >= {"--samples", "--seqlen", "--symmetric", "--stats"}
    assert "--no-act-order" in found("quantize", "--no")
    assert all(option.startswith("--") for option in found("prune", "-"))
    assert "--verbose" in found("eval", "--v")


def test_where_a_file_is_meant_the_shell_goes_on():
    assert found("merge", "mod") == []
    assert found("nonsense", "--x") == []
    assert found("--show-completion", "") == list(SHELLS)


def test_a_shell_that_is_not_known(capsys, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/csh")
    assert run(["--show-completion"]) == 2
    assert "no completion for 'csh': name a shell, one of bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_put_where_the_shell_looks(shell, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert run(["--install-completion", shell]) == 0
    told = capsys.readouterr().out
    (written,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert str(written) in told
    assert run(["--show-completion", shell]) == 0
    assert written.read_text() == capsys.readouterr().out


def test_bash_completes(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    command = tmp_path / "wtool"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wtool "$@"\n')
    command.chmod(0o755)
    script = f"""
PATH={tmp_path}:$PATH
source <(wtool --show-completion bash)
for line in "wtool qu" "wtool merge a --ignore-t"; do
    COMP_WORDS=($line); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
    _wtool; echo "${{COMPREPLY[@]}}"
done
"""
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "quantize\n--ignore-tokenizers\n", done.stderr
