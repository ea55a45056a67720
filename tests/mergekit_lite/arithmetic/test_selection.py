import numpy as np
import pytest
import torch

from mergekit_lite.arithmetic import chunks, selection
from mergekit_lite.arithmetic.task_vectors import Thin, merge_task_vectors


def spreads(models):
    """As they are compared, which are those of the definition."""
    found = np.concatenate([piece.copy() for _, piece in selection.Magnitudes(models).pieces()])
    exact = torch.stack([model.double().view(-1) for model in models]).var(0, correction=0) * len(models)
    assert found == pytest.approx(exact.numpy(), rel=1e-4)
    return torch.from_numpy(found)


def by_histogram(magnitudes, *, keep):
    """Without a sample."""
    return selection._search(magnitudes, {keep: selection._exact(magnitudes, keep)})[keep]


def by_gathering(magnitudes, *, keep):
    """Of all that there is."""
    return selection._search(magnitudes, {keep: (0.0, np.inf)})[keep]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("find", "keep"),
    [
        *((selection.top, keep) for keep in (0, 1, 17, 220, 221)),
        *((find, keep) for find in (by_histogram, by_gathering) for keep in (1, 17, 220)),
    ],
)
def test_the_largest_of_what_is_computed_from_three_tensors(tensors, piece, dtype, find, keep):
    _, models = tensors(3, dtype=dtype)
    before = [model.clone() for model in models]
    cut = find(selection.Magnitudes(models), keep=keep)
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))
    values = spreads(models)
    order = sorted(range(221), key=lambda i: (-values[i].item(), i))
    ties = torch.arange(221) < cut.ties_end
    chosen = (values > cut.magnitude) | (ties & (values == cut.magnitude))
    assert chosen.nonzero().view(-1).tolist() == sorted(order[:keep])


@pytest.mark.parametrize("keep", range(13))
def test_a_vector_is_cut_to_the_kept_and_ties_are_kept_from_the_front(keep, piece):
    vector = torch.tensor([1.0, -2, 1, 0, 2, -1, 0, 3, -2, 1, 0, 0])
    cut = selection.top(selection.Magnitudes([torch.zeros(12), vector]), keep=keep)
    order = sorted(range(12), key=lambda i: (-abs(vector[i].item()), i))
    for thin, wanted in ((Thin(kept=cut), order[:keep]), (Thin(dropped=cut), order[keep:])):
        left = merge_task_vectors(
            torch.zeros(12), [vector], thin=[thin], weight=[1.0], elect=False, normalize=False, scale=1.0, dtype=None
        )
        assert left.whole().tolist() == [vector[i].item() if i in wanted else 0.0 for i in range(12)]


def test_a_large_tensor_is_sampled_and_left_alone(monkeypatch):
    # in float32 a sample of the tensors could be a view of them
    monkeypatch.setattr(selection, "SAMPLE", 1 << 10)
    monkeypatch.setattr(chunks, "CHUNK", 1 << 12)
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(100_000, generator=generator) for _ in range(3)]
    before = [model.clone() for model in models]
    cut = selection.top(selection.Magnitudes(models), keep=30_000)
    assert all(torch.equal(model, old) for model, old in zip(models, before, strict=True))
    values = spreads(models)
    assert cut.magnitude == values.sort(descending=True).values[29_999].item()
