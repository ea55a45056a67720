"""Beside mergekit 0.1.5: the same recipes with `tokenizer` through both, compared token by token.

The numbers of tokens that a union adds differ (mergekit's come out of a set), so rows are looked up by the token.
Ours keeps the rows that pad an embedding and the file generation_config.json; mergekit drops them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vocabulary_models import DREAMS, EMBEDDING, HEAD, bpe, saved

from wtool.cli import run

PYTHON = os.environ.get("WTOOL_MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="mergekit is not here: pip install mergekit==0.1.5"),
]

RUN_ALL = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, recipe in json.load(open(sys.argv[1])).items():
    options = MergeOptions(copy_tokenizer=True, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe), f"{sys.argv[2]}/{name}", options)
"""


def linear(weights, base="base", **keys):
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
    return {"merge_method": "linear", "base_model": base, "models": models, "dtype": "float32", **keys}


MIXED = {"base": 0.25, "a": 0.5, "b": 0.25}
RULES = {
    "<both>": {"source": "b"},
    "<a>": {"source": {"kind": "zero"}},
    "<b>": {"source": {"kind": "model_token", "model": "a", "token": "</s>"}},
    "<s>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}, "force": True},
    "</s>": {"source": {"kind": "zero"}, "force": True},
}
TASK_VECTORS = {
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 0.7}}, {"model": "b", "parameters": {"weight": -0.25}}],
    "dtype": "float32",
    "tokenizer": {"source": "union"},
}
CASES = {
    "union": linear(MIXED, tokenizer={"source": "union"}),
    "old spelling": linear(MIXED, tokenizer_source="union"),
    "base": linear(MIXED, tokenizer={"source": "base"}),
    "one model's": linear(MIXED, tokenizer={"source": "a"}),
    "single tokens": linear(MIXED, tokenizer={"source": "union", "tokens": RULES}),
    "padded": linear(MIXED, tokenizer={"source": "union", "pad_to_multiple_of": 32}),
    "without a base": {k: v for k, v in linear(MIXED, tokenizer={"source": "union"}).items() if k != "base_model"},
    "pieces of another": linear({"base": 0.5, "other": 0.5}, tokenizer={"source": "union"}),
    "padding rows": linear({"padded": 0.5, "a": 0.5}, base="padded", tokenizer={"source": "union"}),
    "tied": linear({"tied": 0.5, "tied2": 0.5}, base="tied", tokenizer={"source": "union"}),
    "task arithmetic": {"merge_method": "task_arithmetic", **TASK_VECTORS},
    "chat template": linear({"base": 1.0}, chat_template="chatml"),
    "mistral's": linear({"base": 1.0}, chat_template="mistral"),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Every case through mergekit, in one process, and through ours."""
    folder = tmp_path_factory.mktemp("vocabularies")
    saved(folder / "base", 1, bpe())
    saved(folder / "a", 2, bpe(added=[("<a>", True), ("<both>", False)]))
    saved(folder / "b", 3, bpe(added=[("<both>", True), ("<b>", False)]))
    saved(folder / "padded", 4, bpe(), rows=288)
    saved(folder / "other", 5, bpe(DREAMS, 275, [("<o>", True)]))
    saved(folder / "tied", 6, bpe(added=[("<t>", True)]), tied=True)
    saved(folder / "tied2", 7, bpe(added=[("<u>", True)]), tied=True)
    (folder / "cases.json").write_text(json.dumps(CASES))
    done = subprocess.run(
        [str(PYTHON), "-c", RUN_ALL, "cases.json", "theirs"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    old = Path.cwd()
    os.chdir(folder)
    try:
        for name, recipe in CASES.items():
            (folder / "r.yml").write_text(yaml.safe_dump(recipe))
            assert run(["merge", "r.yml", "-o", f"ours/{name}", "--quiet"]) == 0
    finally:
        os.chdir(old)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_each_token_has_the_same_row(both, case):
    found = {}
    for side in ("theirs", "ours"):
        weights = load_file(both / side / case / "model.safetensors")
        found[side] = (weights, AutoTokenizer.from_pretrained(both / side / case).get_vocab())
    (theirs, their_numbers), (ours, our_numbers) = found["theirs"], found["ours"]
    assert theirs.keys() == ours.keys() and their_numbers.keys() == our_numbers.keys()
    for name, tensor in theirs.items():
        if name in (EMBEDDING, HEAD):
            for token, number in their_numbers.items():
                torch.testing.assert_close(ours[name][our_numbers[token]], tensor[number], rtol=2e-6, atol=2e-3)
        else:
            torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=2e-6)
    count = len(theirs[EMBEDDING])
    if case == "padded":
        assert count == len(ours[EMBEDDING]) == 288
        torch.testing.assert_close(ours[EMBEDDING][273:], theirs[EMBEDDING][273:], rtol=2e-6, atol=2e-3)
    assert len(ours[EMBEDDING]) == (288 if case == "padding rows" else count)


@pytest.mark.parametrize("case", ["chat template", "mistral's"])
def test_the_same_text_of_a_conversation(both, case):
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": role.upper()} for role in roles]
    texts = [
        AutoTokenizer.from_pretrained(both / side / case).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        for side in ("theirs", "ours")
    ]
    assert texts[0] == texts[1]


def test_texts_are_split_as_by_the_base_where_mergekit_cuts_words(both):
    text = "the green dog dreams"
    base, theirs, ours = (
        AutoTokenizer.from_pretrained(both / path)(text).input_ids
        for path in ("base", "theirs/pieces of another", "ours/pieces of another")
    )
    assert ours == base and theirs != base
