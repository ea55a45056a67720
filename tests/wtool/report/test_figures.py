"""The figures of a report: where each linear stands, and what is made of figures that lack or make no sense."""

from math import inf, nan
from typing import Any

import pytest

from wtool.report.figures import Linear, linears, middle, stacks


def linear(module: str, **told: Any) -> Linear:
    (found,) = linears({"report": {module: told}})
    return found


def test_what_is_told_is_what_stands_there() -> None:
    found = linear(
        "a.0.b",
        weight_error=0.1,
        output_error=0.05,
        rtn_output_error=0.2,
        damping=0.01,
        fallback="why",
        tokens=7,
        bits=4,
        group_size=-1,
    )
    assert found == Linear(
        "a.0.b",
        weight_error=0.1,
        output_error=0.05,
        rtn_output_error=0.2,
        damping=0.01,
        fallback="why",
        tokens=7,
        bits=4,
        group_size=-1,
    )
    assert (found.error, found.gain) == (0.05, 0.75)


def test_a_pruned_and_a_merged_layer() -> None:
    pruned = linear("a", output_error=0.1, cut_output_error=0.4, sparsity=0.5, rank=3)
    assert (pruned.gain, pruned.sparsity, pruned.rank) == (0.75, 0.5, 3)
    merged = linear("a", change=0.01, conflict=0.25, cosine=-0.5)
    assert (merged.change, merged.conflict, merged.cosine, merged.error) == (0.01, 0.25, -0.5, None)


def test_what_lacks_is_none() -> None:
    found = linear("a")
    assert found == Linear("a")
    assert (found.error, found.gain) == (None, None)
    assert linear("a", weight_error=0.3).error == 0.3
    assert linear("a", output_error=0.3, rtn_output_error=0).gain is None
    assert linear("a", weight_error="much", tokens=True, bits=4.5) == linear("a")


@pytest.mark.parametrize("manifest", [{}, {"report": None}, {"report": []}, {"report": {"a": 3}}])
def test_a_manifest_without_figures(manifest: dict[str, Any]) -> None:
    assert linears(manifest) == []


def test_blocks_and_places() -> None:
    names = [
        "lm_head",
        "model.layers.10.mlp.experts.3.down_proj",
        "model.layers.10.mlp.experts.12.down_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.self_attn.q_proj",
        "h.0.attn.c_attn",
        "h2.proj",
        "0",
    ]
    found = {name: linear(name) for name in names}
    blocks, outside = stacks(list(found.values()))
    assert [each.module for each in outside] == ["lm_head", "h2.proj"]
    assert [(stack.name, stack.blocks) for stack in blocks] == [("", (0,)), ("h", (0,)), ("model.layers", (2, 10))]
    model = blocks[2]
    assert model.places == ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj")
    assert model.cells[10, "mlp.experts.*.down_proj"] == (found[names[1]], found[names[2]])
    assert model.cells[2, "mlp.down_proj"] == (found[names[3]],)
    assert (10, "mlp.down_proj") not in model.cells
    assert sum(len(cell) for stack in blocks for cell in stack.cells.values()) + len(outside) == len(names)


def test_encoder_and_decoder_are_stacks_of_their_own() -> None:
    names = [f"{part}.layers.{number}.fc1" for part in ("encoder", "decoder") for number in range(3)]
    blocks, outside = stacks([linear(name) for name in names])
    assert [(stack.name, stack.blocks) for stack in blocks] == [
        ("decoder.layers", (0, 1, 2)),
        ("encoder.layers", (0, 1, 2)),
    ]
    assert not outside


def test_the_median_is_of_what_is_there() -> None:
    assert middle([None, 3.0, nan, 1.0, 2.0, None]) == 2.0
    assert middle([1.0, 2.0]) == 1.5
    assert middle([None, inf]) is None
