"""What stays of a matrix is fitted by least squares, and what is redundant can go without a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, saved
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prune.compensate import Compensating, Fitted, compensated
from wtool.calibration_data.for_model import windows_asked
from wtool.checkpoint import open_checkpoint
from wtool.loading import quiet
from wtool.recipe_parts import Calibration
from wtool.statistics import Gram

Prune = Callable[..., Path]


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated inputs, float64 [tokens, features]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, dtype=torch.float64, generator=generator)
    return torch.randn(tokens, features, dtype=torch.float64, generator=generator) @ mix


def gram_of(x: Tensor) -> Tensor:
    gram = Gram(x.shape[1])
    gram.add(x.float())
    return gram.finish()


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("columns", [(0,), (1, 4, 5), (0, 2, 3, 6, 7, 8)])
def test_it_is_least_squares_drawn_a_little_to_the_weights_as_they_were(columns: tuple[int, ...]) -> None:
    x, weight, stay = inputs(60, 9), weights(4, 9), list(columns)
    found = compensated(weight, gram_of(x), columns)
    assert found is not None and found.dtype == torch.float32
    # rows that ask for W' to stay near W, with the weight that a thousandth of the mean square has
    part = x[:, stay]
    ridge = numpy.sqrt(1e-3 * float((part**2).mean()) * len(x)) * numpy.eye(len(stay))
    wanted = (x @ weight.double().T).numpy()
    near = ridge @ weight.double()[:, stay].T.numpy()
    solved = numpy.linalg.lstsq(numpy.vstack([part.numpy(), ridge]), numpy.vstack([wanted, near]), rcond=None)[0].T
    torch.testing.assert_close(found[:, stay].double(), torch.tensor(solved), rtol=1e-3, atol=1e-4)
    gone = [column for column in range(9) if column not in stay]
    assert not found[:, gone].any()


def test_without_damping_to_speak_of_it_is_plain_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, dtype=torch.float64, generator=generator)
    x[:, 6:] = x[:, :6] @ torch.randn(6, 2, dtype=torch.float64, generator=generator)  # nothing new in these
    weight, columns = weights(3, 8), (0, 1, 2, 3, 4, 5)
    found = compensated(weight, gram_of(x), columns)
    assert found is not None
    solved = numpy.linalg.lstsq(x[:, :6].numpy(), (x @ weight.double().T).numpy(), rcond=None)[0].T
    torch.testing.assert_close(found[:, :6].double(), torch.tensor(solved), rtol=1e-2, atol=1e-2)
    left = (x @ (found.double() - weight.double()).T).norm() / (x @ weight.double().T).norm()
    cut = (x[:, 6:] @ weight.double()[:, 6:].T).norm() / (x @ weight.double().T).norm()
    assert left < 2e-3 * cut


@pytest.mark.parametrize("tokens", [1, 3, 12, 200])  # fewer than features too
@pytest.mark.parametrize("keep", [1, 5, 11])
def test_outputs_are_never_further_off_than_those_of_the_plain_cut(tokens: int, keep: int) -> None:
    x, weight = inputs(tokens, 12, tokens), weights(5, 12)
    columns = tuple(range(12 - keep, 12))
    found = compensated(weight, gram_of(x), columns)
    assert found is not None
    plain = torch.zeros(5, 12)
    plain[:, list(columns)] = weight[:, list(columns)]
    fitted, cut = (float((x @ (each - weight).double().T).norm()) for each in (found, plain))
    assert fitted <= cut * (1 + 1e-5)


def test_where_all_columns_stay_nothing_changes() -> None:
    weight = weights(4, 9)
    found = compensated(weight, gram_of(inputs(60, 9)), tuple(range(9)))
    assert found is not None
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_always_zero_leaves_its_weights_and_a_dead_site_everything() -> None:
    x, weight = inputs(60, 6), weights(4, 6)
    x[:, 2] = 0
    found = compensated(weight, gram_of(x), (1, 2, 4))
    assert found is not None
    torch.testing.assert_close(found[:, 2], weight[:, 2])
    assert (found[:, [1, 4]] - weight[:, [1, 4]]).abs().max() > 0.01
    assert compensated(weight, torch.zeros(6, 6), (1, 2)) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [None, (0, 2)])
@pytest.mark.parametrize("tokens", [60, 31])  # enough, and too few
def test_what_is_written_is_the_cut_matrix_and_what_the_walk_goes_on_with_is_read_back_from_it(
    transposed: bool, rows: tuple[int, ...] | None, tokens: int
) -> None:
    weight, columns = weights(4, 6).bfloat16().float(), (0, 3, 5)
    axes = (columns, rows) if transposed else (rows, columns)
    stored = (weight.T if transposed else weight).bfloat16()
    fitted = Fitted("small.weight", axes, "BF16", transposed)
    change = Compensating({"big.weight": fitted}, lambda name: stored)
    assert change.outputs("big.weight") == ("small.weight",) and not change.outputs("other.weight")
    gram = Gram(6)
    gram.add(inputs(tokens, 6).float())
    (made,) = change.site(["big.weight"], [weight], gram)
    (cut,) = (written := made.encode()).values()
    assert cut.dtype == torch.bfloat16 and cut.is_contiguous()
    assert cut.shape == ((3, len(rows or range(4))) if transposed else (len(rows or range(4)), 3))
    assert torch.equal(change.decode("big.weight", written), made.value)
    stay = list(rows or range(4))
    assert torch.equal(made.value[stay][:, list(columns)], cut.T if transposed else cut)
    assert not made.value[:, [1, 2, 4]].any()
    told = made.explain(weight)
    assert told["inputs"] == [6, 3] and told["tokens"] == tokens
    if tokens == 31:
        assert told["fallback"] == "only 31 tokens came to it"
        assert torch.equal(made.value[:, list(columns)].float(), weight[:, list(columns)])
    else:
        assert 0 < told["output_error"] < told["cut_output_error"] and "fallback" not in told


def test_a_matrix_that_no_token_came_to_is_cut() -> None:
    weight = weights(2, 4)
    change = Compensating({"w": Fitted("w", (None, (1, 2)), "F32", False)}, lambda name: weight)
    made = change.unseen("w", weight, "no token came to it")
    assert torch.equal(made.encode()["w"], weight[:, 1:3])
    assert made.explain(weight) == {"inputs": [4, 2], "tokens": 0, "fallback": "only 0 tokens came to it"}


def redundant(ids: Tensor) -> LlamaForCausalLM:
    """A llama in which every second ffn channel does what the one before it does, and is read less than any such."""
    model = llama()
    for layer in model.model.layers:
        mlp: Any = layer.mlp
        fed: list[Tensor] = []
        with torch.no_grad(), mlp.down_proj.register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0])):
            for projection in (mlp.gate_proj, mlp.up_proj):
                projection.weight[1::2] = projection.weight[::2]
            model(input_ids=ids)
            # so that all channels of the first kind add as much to the outputs
            mlp.down_proj.weight.div_(fed[0].square().mean((0, 1)).sqrt() * mlp.down_proj.weight.norm(dim=0))
            mlp.down_proj.weight[:, 1::2] = 0.4 * mlp.down_proj.weight[:, ::2].roll(1, 0)
    return model


def test_redundant_channels_can_go_without_a_trace(prune: Prune, text: Path, tmp_path: Path) -> None:
    asked = Calibration(data=(str(text),), samples=8, seqlen=48)
    windows = windows_asked(open_checkpoint(str(saved(llama(), tmp_path / "any"))), asked)
    model = redundant(windows.ids)
    folder = saved(model, tmp_path / "model")
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(5))  # unlike the text

    @torch.no_grad()
    def off(out: Path) -> float:
        kept = json.loads((out / "wtool.json").read_text())["recipe"]["kept"]["ffn"]
        assert kept == {"0": list(range(0, 48, 2)), "1": list(range(0, 48, 2))}
        with quiet():
            small = AutoModelForCausalLM.from_pretrained(out)
        assert small.config.intermediate_size == 24
        full = model(input_ids=ids).logits
        return float((small(input_ids=ids).logits - full).norm() / full.norm())

    fitted = off(prune(folder, "--ffn", "24", name="fitted"))
    cut = off(prune(folder, "--ffn", "24", "--no-compensate", name="cut"))
    assert fitted < 1e-3 and cut > 0.05


def test_the_report_tells_how_far_outputs_are_off_fitted_and_cut(prune: Prune, tmp_path: Path) -> None:
    folder = saved(llama(dtype=torch.bfloat16), tmp_path / "model")
    out = prune(folder, "--ffn", "40", "--heads", "2")
    told = json.loads((out / "wtool.json").read_text())["report"]
    leaves = ("mlp.down_proj", "self_attn.o_proj")
    assert told.keys() == {f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in leaves}
    for entry in told.values():
        assert 0 < entry["output_error"] < entry["cut_output_error"] < 1.5 and entry["tokens"] == 8 * 48
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].shape == (32, 40)
