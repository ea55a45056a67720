import merge_definitions as definition
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES, TYPES

from mergekit_lite.arithmetic import chunks, selection
from mergekit_lite.methods.ties import kept, ties


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_definition(tensors, agrees, as_lists, piece, shape, dtype, normalize, rescale):
    base, models = tensors(3, shape, dtype)
    options = {
        "weight": [0.5, 1.25, 0.7],
        "density": [0.5, 0.29, 1.0],
        "normalize": normalize,
        "rescale": rescale,
        "lambda_": 0.8,
    }
    expected = definition.ties(*as_lists(base, models), **options)
    agrees(ties(base, models, **options), expected, dtype, shape)


@pytest.mark.parametrize("weight", [[1.0, -0.5, 0.3], [-1.0, -1.0, -2.0], [0.0, 1.0, 1.0]])
def test_definition_with_negative_and_zero_weights(tensors, agrees, as_lists, weight):
    base, models = tensors(3)
    options = {"weight": weight, "density": [0.5, 0.6, 0.7], "normalize": False}
    agrees(ties(base, models, **options), definition.ties(*as_lists(base, models), **options), base.dtype, base.shape)


def test_density_one_and_one_model_is_the_model(tensors):
    base, (model,) = tensors(1, dtype=torch.bfloat16)
    assert torch.equal(ties(base, [model], weight=[1.0], density=[1.0]), model)


def test_density_zero_is_the_base(tensors):
    base, models = tensors(2, dtype=torch.bfloat16)
    assert torch.equal(ties(base, models, weight=[1.0, 1.0], density=[0.0, 0.0]), base)


def test_models_equal_to_the_base_change_nothing(tensors):
    base, _ = tensors(0, dtype=torch.bfloat16)
    assert torch.equal(ties(base, [base.clone(), base.clone()], weight=[1.0, 1.0], density=[0.5, 0.5]), base)


def test_by_hand():
    # model 1 says +, model 2 says - and more: - is elected, and the mean is over model 2 alone
    base = torch.zeros(4)
    models = [torch.tensor([1.0, 2.0, 0.1, 4.0]), torch.tensor([-3.0, 2.0, 5.0, 0.1])]
    merged = ties(base, models, weight=[1.0, 1.0], density=[0.75, 0.75])
    assert merged.tolist() == [-3.0, 2.0, 5.0, 4.0]


def test_a_tie_of_signs_is_plus():
    merged = ties(torch.zeros(1), [torch.tensor([2.0]), torch.tensor([-2.0])], weight=[1.0, 1.0], density=[1.0, 1.0])
    assert merged.tolist() == [2.0]


@pytest.mark.parametrize(
    ("density", "elements", "expected"), [(0.29, 100, 29), (0.7, 10, 7), (0.001, 10, 1), (0.0, 10, 0)]
)
def test_counts_are_exact(density, elements, expected):
    # 0.29 * 100 is 28.999999999999996 in floating point
    assert kept(density, elements) == expected


values = st.sampled_from([0.0, 0.0, 0.0, 1.0, -1.0, 0.5, 0.25, 3.0])  # few values: ties everywhere


def by_histogram(magnitudes, *, keep):
    return selection._search(magnitudes, {keep: selection._exact(magnitudes, keep)})[keep]


@settings(max_examples=200, deadline=None)
@given(vector=st.lists(values, min_size=1, max_size=60), share=st.floats(0.01, 1.0), chunk=st.sampled_from([4, 16, 64]))
def test_exactly_k_are_kept_and_of_equal_ones_the_earlier(vector, share, chunk):
    model = torch.tensor(vector)
    keep = kept(round(share, 2), len(vector))
    old, chunks.CHUNK = chunks.CHUNK, chunk
    try:
        magnitudes = selection.Magnitudes([torch.zeros_like(model), model])
        for find in (selection.top, by_histogram):
            cut = find(magnitudes, keep=keep)
            index = torch.arange(len(vector))
            chosen = (model.abs() > cut.magnitude) | ((model.abs() == cut.magnitude) & (index < cut.ties_end))
            expected = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))[:keep]
            if keep < len(vector) or find is selection.top:
                assert sorted(expected) == index[chosen].tolist()
    finally:
        chunks.CHUNK = old


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["normal", "bf16", "heavy", "rows", "constant", "sorted"])
@pytest.mark.parametrize("sample", [1 << 14, 1 << 17], ids=["sampled", "whole"])
def test_selection_by_sample_agrees_with_a_sort(monkeypatch, kind, density, sample):
    # large enough for the sampled bracket, with structure that misleads a sample
    monkeypatch.setattr(selection, "SAMPLE", sample)
    n = 400_000
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(n, generator=generator)
    if kind == "bf16":
        vector = vector.bfloat16().float()
    if kind == "heavy":
        vector = vector**5
    if kind == "rows":  # an embedding of which few rows were trained
        vector = (vector.view(-1, 100) * (torch.arange(4000) % 7 == 0)[:, None]).reshape(-1)
    if kind == "constant":
        vector = torch.ones(n)
    if kind == "sorted":
        vector = vector.sort().values
    keep = int(density * n)
    cut = selection.top(selection.Magnitudes([torch.zeros(n), vector]), keep=keep)
    magnitude = vector.abs()
    chosen = (magnitude > cut.magnitude) | ((magnitude == cut.magnitude) & (torch.arange(n) < cut.ties_end))
    assert cut.magnitude == magnitude.sort(descending=True).values[keep - 1].item()
    assert chosen.sum() == keep
