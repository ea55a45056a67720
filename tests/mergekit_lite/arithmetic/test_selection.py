import pytest
import torch

from mergekit_lite.arithmetic import chunks, selection


def squares(parts):
    first, second, third = parts
    return first.add_(second).add_(third).square_()


def by_histogram(magnitudes, *, keep):
    return selection._by_histogram(magnitudes, keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("find", "keep"),
    [*((selection.top, keep) for keep in (0, 1, 17, 220, 221)), *((by_histogram, keep) for keep in (1, 17, 220))],
)
def test_the_largest_of_what_is_computed_from_three_tensors(tensors, piece, dtype, find, keep):
    _, models = tensors(3, dtype=dtype)
    before = [model.clone() for model in models]
    cut = find(selection.Magnitudes(squares, models), keep=keep)
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    values = squares([model.to(kind, copy=True).view(-1) for model in models])
    order = sorted(range(221), key=lambda i: (-values[i].item(), i))
    parts = [cut.mask(begin, values[begin : begin + 16].clone()) for begin in range(0, 221, 16)]
    assert torch.cat(parts).nonzero().view(-1).tolist() == sorted(order[:keep])


@pytest.mark.parametrize("keep", range(13))
def test_a_vector_is_shrunk_to_the_kept_and_ties_are_kept_from_the_front(keep):
    vector = torch.tensor([1.0, -2, 1, 0, 2, -1, 0, 3, -2, 1, 0, 0])
    cut = selection.largest(torch.zeros(12), vector, keep=keep)
    order = sorted(range(12), key=lambda i: (-abs(vector[i].item()), i))
    expected = [vector[i].item() if i in order[:keep] else 0.0 for i in range(12)]
    for step in (12, 5, 1):
        shrunk = vector.clone()
        for begin in range(0, 12, step):
            cut.shrink(begin, shrunk[begin : begin + step])
        assert shrunk.tolist() == expected


def test_a_large_tensor_is_sampled_and_left_alone(monkeypatch):
    # in float32 a sample of the tensors could be a view of them
    monkeypatch.setattr(selection, "SAMPLE", 1 << 10)
    monkeypatch.setattr(chunks, "CHUNK", 1 << 12)
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(100_000, generator=generator) for _ in range(3)]
    before = [model.clone() for model in models]
    cut = selection.top(selection.Magnitudes(squares, models), keep=30_000)
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))
    values = squares([model.clone() for model in models])
    assert cut.magnitude == values.sort(descending=True).values[29_999].item()
