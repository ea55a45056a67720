"""Distances against their formulas in float64, and everything that is no plain pair of tensors."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wtool.checkpoint import open_checkpoint
from wtool.compare import CHUNK, Comparison, compare, measure
from wtool.errors import QuantizedInput
from wtool.shards import json_bytes

NAN, INF = math.nan, math.inf


def folder(path: Path, tensors: dict[str, Tensor], config: dict | None = None) -> str:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_bytes(json_bytes(config))
    return str(path)


def compared(tmp_path: Path, a: dict[str, Tensor], b: dict[str, Tensor], **config: dict | None) -> Comparison:
    first = open_checkpoint(folder(tmp_path / "a", a, config.get("config_a")))
    second = open_checkpoint(folder(tmp_path / "b", b, config.get("config_b")))
    return compare(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 1000, CHUNK, 3 * CHUNK + 7])
def test_the_formulas(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    a = torch.randn(count).to(dtype)
    b = (a.float() + 0.01 * torch.randn(count)).to(dtype)
    x, y = a.double(), b.double()
    found = measure(a, b)
    assert found.relative == pytest.approx(((x - y).norm() / x.norm()).item(), rel=1e-12)
    assert found.cosine == pytest.approx((x @ y / (x.norm() * y.norm())).item(), rel=1e-12)
    assert found.largest == (x - y).abs().max().item()
    assert found.equal == torch.equal(a, b)
    assert measure(a, a.clone()).equal and measure(a, a.clone()).relative == 0.0 and measure(a, a).cosine == 1.0


def test_tiny_and_huge_values_are_not_lost() -> None:
    """Their squares do not fit float32."""
    for scale in (1e-30, 1e30):
        found = measure(torch.tensor([3.0, 4.0]) * scale, torch.tensor([3.0, 5.0]) * scale)
        assert found.relative == pytest.approx(0.2, rel=1e-6)


def test_zeros_scalars_and_empty_tensors() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert (measure(zero, zero).relative, measure(zero, zero).cosine, measure(zero, zero).equal) == (0.0, None, True)
    assert (measure(zero, one).relative, measure(zero, one).cosine, measure(zero, one).equal) == (INF, None, False)
    assert (measure(one, zero).relative, measure(one, zero).cosine, measure(one, zero).largest) == (1.0, None, 1.0)
    assert measure(torch.tensor(2.0), torch.tensor(-3.0)).relative == 2.5
    assert measure(torch.tensor(2.0), torch.tensor(-3.0)).cosine == -1.0
    assert measure(torch.empty(0, 4), torch.empty(0, 4)).equal
    assert measure(torch.tensor([0.0]), torch.tensor([-0.0])).equal


def test_other_types() -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64):
        found = measure(torch.tensor([3, 4], dtype=dtype), torch.tensor([3, 6], dtype=dtype))
        assert (found.relative, found.largest, found.equal) == (0.4, 2.0, False)
        assert measure(torch.tensor([3, 4], dtype=dtype), torch.tensor([3, 4], dtype=dtype)).equal
    mask = torch.tensor([True, False])
    assert measure(mask, mask).equal and measure(mask, ~mask).relative == pytest.approx(math.sqrt(2))
    large = torch.tensor([2**60])
    assert measure(large, large).equal and not measure(large, large + 1).equal  # float64 cannot tell them apart
    turned = measure(torch.tensor([1 + 1j]), torch.tensor([1 - 1j]))
    assert turned.relative == pytest.approx(math.sqrt(2)) and turned.largest == 2.0
    assert measure(torch.tensor([1.5]).bfloat16(), torch.tensor([1.5])).equal


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    found = measure(torch.tensor([3.0, NAN, 1.0, 4.0]), torch.tensor([3.0, 2.0, INF, 5.0]))
    assert found.relative == pytest.approx(0.2) and found.largest == 1.0
    assert found.nonfinite == (1, 1) and not found.equal
    same = torch.tensor([NAN, INF, -INF, 2.0])
    assert measure(same, same).equal and measure(same, same).nonfinite == (3, 3) and measure(same, same).cosine == 1.0
    assert not measure(torch.tensor([INF]), torch.tensor([-INF])).equal
    assert measure(torch.tensor([NAN]), torch.tensor([1.0])).cosine is None


def test_the_whole_and_the_layers_are_one_long_vector(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [f"model.layers.{layer}.{part}.weight" for layer in (0, 1, 10) for part in "qk"] + ["norm.weight"]
    a = {name: torch.randn(5, 7) for name in names}
    b = {name: tensor + 0.1 * torch.randn(5, 7) for name, tensor in a.items()} | {"norm.weight": a["norm.weight"]}
    found = compared(tmp_path, a, b)

    def expected(some: list[str]) -> tuple[float, float]:
        x, y = (torch.cat([side[name].double().flatten() for name in some]) for side in (a, b))
        return ((x - y).norm() / x.norm()).item(), (x @ y / (x.norm() * y.norm())).item()

    assert (found.overall.relative, found.overall.cosine) == pytest.approx(expected(names))
    assert list(found.layers) == [0, 1, 10]
    layer = found.layers[10]
    assert (layer.relative, layer.cosine) == pytest.approx(expected([name for name in names if ".10." in name]))
    assert found.equal == 1 and not found.identical
    distances = [difference.sums.relative for difference in found.worst(7)]
    assert distances == sorted(distances, reverse=True) and len(found.worst(3)) == 3


def test_tensors_without_a_counterpart(tmp_path: Path) -> None:
    a = {"both": torch.ones(2), "shape": torch.ones(2, 3), "mine": torch.ones(1)}
    b = {"both": torch.ones(2).bfloat16(), "shape": torch.ones(3, 2), "yours": torch.ones(1)}
    found = compared(tmp_path, a, b)
    assert (found.only_a, found.only_b) == (("mine",), ("yours",))
    assert found.shapes == (("shape", (2, 3), (3, 2)),)
    (both,) = found.differences
    assert both.sums.equal and both.dtypes == ("F32", "BF16") and not found.identical


def test_identical(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(20)}
    found = compared(tmp_path, tensors, tensors)
    assert found.identical and found.equal == 20
    assert [difference.name for difference in found.differences] == list(open_checkpoint(str(tmp_path / "a")).tensors)


@pytest.mark.parametrize("tied_side", ["a", "b"])
def test_a_tied_head_is_compared_with_the_embedding(tmp_path: Path, tied_side: str) -> None:
    embedding = torch.randn(6, 4)
    tied = {"model.embed_tokens.weight": embedding}, {"tie_word_embeddings": True}
    own = {"model.embed_tokens.weight": embedding, "lm_head.weight": 2 * embedding}, {"tie_word_embeddings": False}
    first, second = (tied, own) if tied_side == "a" else (own, tied)
    found = compared(tmp_path, first[0], second[0], config_a=first[1], config_b=second[1])
    assert not found.only_a and not found.only_b and len(found.differences) == 2
    (head,) = (difference for difference in found.differences if difference.name != difference.other)
    assert {head.name, head.other} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert head.sums.relative == pytest.approx(1.0 if tied_side == "a" else 0.5)


def test_an_untied_model_without_head_lacks_it(tmp_path: Path) -> None:
    embedding = {"model.embed_tokens.weight": torch.randn(6, 4)}
    config = {"tie_word_embeddings": False}
    both = {**embedding, "lm_head.weight": torch.randn(6, 4)}
    assert compared(tmp_path, embedding, both, config_a=config, config_b=config).only_b == ("lm_head.weight",)


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    plain, packed = {"a.weight": torch.ones(2)}, {"a.qweight": torch.ones(2, dtype=torch.int32)}
    with pytest.raises(QuantizedInput, match="a.qweight"):
        compared(tmp_path, plain, packed)


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a = open_checkpoint(folder(tmp_path / "a", {f"{i}.w": torch.randn(100, 100) for i in range(9)}))
    b = open_checkpoint(folder(tmp_path / "b", {f"{i}.w": torch.randn(100, 100) for i in range(9)}))
    done: list[int] = []
    assert compare(a, b, workers=1) == compare(a, b, workers=4, progress=done.append)
    assert sum(done) == a.nbytes
