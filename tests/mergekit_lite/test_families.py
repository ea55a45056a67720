"""Merges of many families, opened again in transformers: they compute what the merge made in memory computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import yaml
from families import FAMILIES, OTHERS, any_saved, inputs_of
from layered import weights
from torch import Tensor

from wtool.cli import run
from wtool.loading import quiet

NAMES = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "phi3", "mistral", "gpt2", "olmo2"]
NAMES += ["deepseek_v3", "bert", *OTHERS]


def linear(_: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (0.3 * a + 0.9 * b) / 1.2


def ties(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Nothing is trimmed, so it does not matter whether experts lie in one tensor or in several."""
    up, down = 0.3 * (a - base), 0.9 * (b - base)
    sign = torch.sign(up + down)
    agree = [(torch.sign(each) == sign).to(base.dtype) for each in (up, down)]
    weight = 0.3 * agree[0] + 0.9 * agree[1]
    return base + (up * agree[0] + down * agree[1]) / torch.where(weight == 0, 1.0, weight)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"linear": linear, "ties": ties}


@pytest.mark.parametrize("name", NAMES)
def test_the_merge_computes_what_the_one_in_memory_does(name, tmp_path):
    models = [any_saved(name, tmp_path / part, seed) for seed, part in enumerate(("base", "a", "b"))]
    inputs = inputs_of(name)
    for method, merge in METHODS.items():
        content = {
            "merge_method": method,
            "base_model": str(tmp_path / "base") if method == "ties" else None,
            "models": [
                {"model": str(tmp_path / part), "parameters": {"weight": weight}}
                for part, weight in (("a", 0.3), ("b", 0.9))
            ],
        }
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(content))
        out = tmp_path / method
        assert run(["merge", str(tmp_path / "recipe.yml"), "-o", str(out), "--quiet"]) == 0
        with quiet():
            loaded: Any = type(models[0]).from_pretrained(out, output_loading_info=True)
            expected = type(models[0])(transformers.AutoConfig.from_pretrained(tmp_path / "a"))
        found, report = loaded
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        states = [model.state_dict() for model in models]
        expected.load_state_dict({key: merge(*(state[key] for state in states)) for key in states[0]})
        with torch.no_grad():
            logits, right = (model.eval()(**inputs).logits for model in (found, expected))
        assert right.std() > 1e-3
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
        before, after = weights(tmp_path / "a"), weights(out)
        assert {key: tensor.shape for key, tensor in before.items()} == {key: x.shape for key, x in after.items()}


def test_the_families_are_those_of_the_table():
    assert set(NAMES) - set(OTHERS) <= set(FAMILIES)
