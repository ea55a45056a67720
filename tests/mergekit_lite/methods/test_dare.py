import merge_definitions as definition
import pytest
import torch
from shapes import SHAPES, TYPES

from mergekit_lite.arithmetic import chunks
from mergekit_lite.arithmetic.random_mask import LEVELS, mask_key
from mergekit_lite.methods.dare import dare_linear, dare_ties


def masks_of(keys, density, elements):
    return [definition.mask(key, share, elements).tolist() for key, share in zip(keys, density, strict=True)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, rescale, method):
    base, models = tensors(3, shape, dtype)
    options = {"weight": [0.5, 1.25, 0.7], "density": [0.5, 0.25, 1.0], "rescale": rescale, "lambda_": 0.8}
    keys = [11, 22, 33]
    expected = definition.dare(
        *as_lists(base, models),
        masks=masks_of(keys, options["density"], base.numel()),
        elect=method is dare_ties,
        **options,
    )
    agrees(method(base, models, key=keys, **options), expected, dtype, shape)


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_limits(tensors, method):
    base, models = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(method(base, models, weight=[1.0], density=[1.0], key=[1]), models[0])
    assert torch.equal(method(base, models, weight=[1.0], density=[0.0], key=[1]), base)


def kept_of(elements, density, model):
    """Which elements of a model are kept."""
    zeros, ones, key = torch.zeros(elements), torch.ones(elements), mask_key(0, model, "x")
    return dare_linear(zeros, [ones], weight=[1.0], density=[density], key=[key], rescale="none") == 1


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_as_many_are_kept_as_asked(density):
    n = 400_000
    kept = int(kept_of(n, density, 0).sum())
    assert abs(kept - density * n) < 5 * (n * density * (1 - density)) ** 0.5


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_the_expectation_is_the_task_vector(method):
    # also where one element is far larger than the others, where scaling by norms is biased
    base, model = torch.zeros(10), torch.tensor([100.0] + [0.01] * 9)
    draws = [method(base, [model], weight=[1.0], density=[0.5], key=[key]) for key in range(4000)]
    mean = torch.stack(draws).double().mean(0)
    torch.testing.assert_close(mean, model.double(), rtol=0.1, atol=0.0)


def test_masks_do_not_depend_on_the_pieces(monkeypatch):
    base, model = torch.zeros(1000), torch.ones(1000)
    whole = dare_linear(base, [model], weight=[1.0], density=[0.3], key=[7])
    for size in (4, 32, 512):
        monkeypatch.setattr(chunks, "CHUNK", size)
        assert torch.equal(dare_linear(base, [model], weight=[1.0], density=[0.3], key=[7]), whole)


def test_keys_tell_seed_model_and_tensor_apart():
    keys = {mask_key(seed, model, name) for seed in (0, 1) for model in (0, 1) for name in ("a", "b")}
    assert len(keys) == 8


def test_masks_of_two_models_are_independent():
    a, b = (kept_of(100_000, 0.5, model) for model in (0, 1))
    assert abs((a == b).double().mean().item() - 0.5) < 0.01


def test_the_rescaling_is_of_the_density_that_is_used():
    merged = dare_linear(torch.zeros(100), [torch.ones(100)], weight=[1.0], density=[0.3], key=[1])
    assert set(merged.tolist()) == {0.0, torch.tensor(LEVELS / round(0.3 * LEVELS)).item()}


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_what_is_not_a_number_is_not_dropped(method):
    base, model = torch.zeros(1000), torch.full((1000,), torch.nan)
    assert method(base, [model], weight=[1.0], density=[0.3], key=[1]).isnan().all()
