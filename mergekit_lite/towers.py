"""Towers: the parts of a model that have a stack of layers each (text, vision, encoder, decoder), told from names.

Stacks that differ in the first part of their names belong to different towers, and a tower's tensors are those whose
names start as its stack's does. What has no stack (a projector) is a tower of its own; the head, wherever it stands,
belongs to the tower of the language model.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from wtool.checkpoint.tied import EMBEDDINGS, HEADS
from wtool.errors import UsageError, did_you_mean
from wtool.linear_names import LAYER

WHOLE = "default"  # the name of the only tower, as in mergekit
MIXER = re.compile(r"att|mixer|mamba|ssm|rwkv", re.IGNORECASE)  # what a layer of a network has, and a numbered part not
EXTRA = re.compile(r"(^|\.)(mtp|nextn)\b")  # layers for multi-token prediction, which are no tower
TEXT = re.compile(r"language|text|decoder|llm")
HEAD = re.compile(r"^(lm_head|embed_out|proj_out|score|classifier|shared)\.")
# names for the same tower: mergekit's, and those that families give it
ALIASES = (
    ("text_decoder", "language_model", "text_model", "text", "llm", "decoder"),
    ("vision_tower", "vision_model", "visual", "vision_encoder", "vision", "image_encoder"),
    ("audio_tower", "audio_model", "audio_encoder", "audio"),
    ("multi_modal_projector", "multimodal_projector", "mm_projector", "projector", "connector", "modality_projection"),
)


def stacks(names: Collection[str]) -> dict[str, int]:
    """The stacks of layers: what comes before a layer's number -> how many layers there are."""
    numbers: dict[str, list[int]] = {}
    mixers: set[str] = set()
    for name in names:
        if (match := LAYER.match(name)) and not EXTRA.search(match[1]):
            numbers.setdefault(match[1], []).append(int(match[2]))
            if MIXER.search(name[match.end() :]):
                mixers.add(match[1])
    kept = mixers or sorted(numbers, key=lambda stack: -len(numbers[stack]))[:1]
    return {stack: max(numbers[stack]) + 1 for stack in numbers if stack in kept}


def towers(names: Sequence[str]) -> dict[str, list[str]]:
    """The towers of a model by their names, each with its tensors; the names of the only tower are all."""
    found = stacks(names)
    if len(found) < 2:
        return {WHOLE: list(names)}
    groups = _split(names, list(found), "")
    text = text_tower(groups)
    result: dict[str, list[str]] = {}
    for name in names:
        key = next((key for key in groups if _within(name, key)), text)
        result.setdefault(text if name in HEADS or HEAD.match(name) else key, []).append(name)
    return result


def _split(names: Iterable[str], found: Sequence[str], prefix: str) -> dict[str, list[str]]:
    """Towers by the part of the name in which stacks differ, split again where one still has several.

    prefix: what the names and stacks have in common already
    """
    shared = _shared([stack.split(".") for stack in found])
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if parts[: len(shared)] == shared:
            groups.setdefault(".".join(parts[: len(shared) + 1]), []).append(name)
    result: dict[str, list[str]] = {}
    for key, members in groups.items():
        inside = [stack for stack in found if _within(stack, key)]
        result |= _split(members, inside, key) if len(inside) > 1 else {key: members}
    return result


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """The parts that all paths begin with."""
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


def _within(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def text_tower(groups: Mapping[str, Sequence[str]]) -> str:
    """The tower of the language model: the one with the embedding, or with a name that says so, or the longest."""
    layered = {key: found for key, members in groups.items() if (found := stacks(members))}
    for key in layered:
        if any(name in EMBEDDINGS for name in groups[key]):
            return key
    named = [key for key in layered if TEXT.search(key)]
    return named[0] if named else max(layered, key=lambda key: max(layered[key].values()))


def find_tower(asked: str, groups: Mapping[str, Sequence[str]]) -> str:
    """The tower that a recipe means by a name.

    raises: UsageError with the towers that there are
    """
    if asked in groups:
        return asked
    last = {key.rsplit(".", 1)[-1]: key for key in groups}
    if asked in last:
        return last[asked]
    alike = next((names for names in ALIASES if asked in names), ())
    if len(groups) > 1 and "text_decoder" in alike:
        return text_tower(groups)
    for name in alike:
        if name in last:
            return last[name]
    within = {last[part] for part in asked.split(".") if part in last}
    if len(within) == 1:  # mergekit names what it infers by the stack: model.vision_tower.encoder.layers
        return within.pop()
    raise UsageError(
        f"modules: the checkpoint has no module '{asked}'{did_you_mean(asked, [*groups, *last])} "
        f"(it has {', '.join(groups)})"
    )
