"""What a shell asks while the user types: the verbs, and each verb's options.

The shell's script calls `wtool --complete WORD…` with the words so far, the last of which is being typed; where there
is nothing to say, the shell goes on with file names.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtool.errors import OutputError, UsageError

if TYPE_CHECKING:
    import typer

TOP = ("--help", "--version", "--show-completion", "--install-completion")

BASH = """\
_wtool() {
    local IFS=$'\\n'
    COMPREPLY=($(wtool --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _wtool wtool
"""
ZSH = """\
#compdef wtool
_wtool() {
    local -a found
    found=("${(@f)$(wtool --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
if [[ "$funcstack[1]" == _wtool ]]; then _wtool "$@"; else compdef _wtool wtool; fi
"""
FISH = """\
complete -c wtool -a '(wtool --complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
"""
# shell -> its script, where such a script is looked for, and what else is to be done
SHELLS: dict[str, tuple[str, str, str]] = {
    "bash": (BASH, "{data}/bash-completion/completions/wtool", "read by the package bash-completion in a new shell"),
    "zsh": (
        ZSH,
        "{home}/.zfunc/_wtool",
        "put `fpath+=~/.zfunc` before `autoload -Uz compinit && compinit` in ~/.zshrc",
    ),
    "fish": (FISH, "{config}/fish/completions/wtool.fish", "read by a new shell"),
}


def answer(flag: str, words: list[str], verbs: Mapping[str, Any], load: Callable[[str], "typer.Typer"]) -> str:
    """What is printed for --complete, --show-completion and --install-completion.

    raises: UsageError, OutputError
    """
    if flag == "--complete":
        return "".join(f"{word}\n" for word in candidates(words, verbs, load))
    shell = words[0] if words else Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise UsageError(f"no completion for '{shell}': name a shell, one of {', '.join(SHELLS)}")
    return SHELLS[shell][0] if flag == "--show-completion" else _install(shell)


def candidates(words: list[str], verbs: Mapping[str, Any], load: Callable[[str], "typer.Typer"]) -> list[str]:
    """What may stand in the place of the last word."""
    *before, typed = words or [""]
    if not before:
        return [word for word in (*verbs, *TOP) if word.startswith(typed)]
    if before[0] in ("--show-completion", "--install-completion"):
        return [shell for shell in SHELLS if shell.startswith(typed)]
    if before[0] not in verbs or not typed.startswith("-"):
        return []
    from wtool.options import command_of

    command = command_of(load(before[0]))
    names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return sorted(name for name in (*names, "--help") if name.startswith("--") and name.startswith(typed))


def _install(shell: str) -> str:
    script, place, then = SHELLS[shell]
    home = Path.home()
    path = Path(
        place.format(
            home=home,
            data=os.environ.get("XDG_DATA_HOME") or home / ".local/share",
            config=os.environ.get("XDG_CONFIG_HOME") or home / ".config",
        )
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: the completion cannot be written: {error.strerror}") from None
    return f"{path}: written; {then}\n"
