import pytest
import torch
from quantization_definitions import layer

from prune.lowrank import allocate, break_even, cost, rank_of, spectrum, truncate
from wtool.errors import UsageError

SHAPES = [(1, 1), (1, 6), (6, 1), (5, 12), (12, 5), (9, 9)]


def whitened(weight, gram):
    """σ, and the parts of SVD-LLM's definition: U, V and the Cholesky factor C of G = C Cᵀ."""
    root = torch.linalg.cholesky(gram.double())
    u, sigma, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return u, sigma, vh, root


def output_error(error, inputs):
    """The mean over tokens of |E x|², token by token."""
    return sum(float((error.double() @ x).square().sum()) for x in inputs.double()) / len(inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_definition_of_svd_llm(shape):
    weight, gram = layer(*shape)
    weight, gram = weight.double(), gram.double() + 1e-3 * torch.eye(shape[1])
    u, sigma, vh, root = whitened(weight, gram)
    found = spectrum(weight, gram)
    torch.testing.assert_close(found.energies, sigma**2, rtol=1e-9, atol=1e-12 * float(sigma[0]) ** 2)
    for rank in range(1, min(shape) + 1):
        right = torch.linalg.solve_triangular(root, sigma[:rank, None] * vh[:rank], upper=False, left=False)
        factors = truncate(weight, found, rank)
        assert factors.u.shape == (shape[0], rank) and factors.v.shape == (rank, shape[1])
        torch.testing.assert_close(factors.u @ factors.v, u[:, :rank] @ right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_is_the_singular_value_decomposition(shape):
    weight, _ = layer(*shape)
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    found = spectrum(weight)
    torch.testing.assert_close(found.energies, sigma**2, rtol=1e-9, atol=1e-13)
    for rank in range(1, min(shape) + 1):
        factors = truncate(weight.double(), found, rank)
        expected = u[:, :rank] * sigma[:rank] @ vh[:rank]
        torch.testing.assert_close(factors.u @ factors.v, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (7, 7)])
def test_what_is_lost_is_the_sum_of_the_energies_that_were_dropped(shape):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    weight = torch.randn(shape, generator=generator).double()
    found = spectrum(weight, inputs.double().T @ inputs.double() / len(inputs))
    plain = spectrum(weight)
    for rank in range(1, min(shape)):
        factors, nearest = truncate(weight, found, rank), truncate(weight, plain, rank)
        lost = output_error(weight - factors.u @ factors.v, inputs)
        assert lost == pytest.approx(float(found.energies[rank:].sum()), rel=1e-9)
        assert lost < output_error(weight - nearest.u @ nearest.v, inputs)


def test_fewer_tokens_than_features_need_no_damping():
    weight, gram = layer(12, 30, tokens=5)
    found = spectrum(weight, gram)
    assert found.energies[5:].max() < 1e-6 * found.energies[0]
    factors = truncate(weight.double(), found, 5)
    error = weight.double() - factors.u @ factors.v
    assert float(((error @ gram.double()) * error).sum()) < 1e-6 * float(found.energies.sum())


def test_directions_are_orthonormal_and_energies_fall():
    for shape in SHAPES:
        weight, gram = layer(*shape)
        for found in (spectrum(weight, gram), spectrum(weight), spectrum(torch.zeros(shape), gram)):
            size = found.directions.T @ found.directions
            torch.testing.assert_close(size, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-12)
            assert (found.energies >= 0).all() and (found.energies.diff() <= 0).all()


def test_factors_are_of_the_weights_type_and_equally_long():
    weight, gram = layer(16, 40, dtype=torch.bfloat16)
    factors = truncate(weight, spectrum(weight, gram), 10)
    assert factors.u.dtype == factors.v.dtype == torch.bfloat16
    torch.testing.assert_close(factors.u.float().norm(dim=0), factors.v.float().norm(dim=1), rtol=1e-2, atol=0)
    zeros = truncate(torch.zeros(3, 4), spectrum(torch.zeros(3, 4)), 2)
    assert not (zeros.u @ zeros.v).any() and zeros.u.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 3), (576, 192), (576, 1536)])
def test_break_even(shape):
    rank = break_even(shape)
    assert cost(shape, rank) < cost(shape, None) <= cost(shape, rank + 1)


def test_rank_of_a_share_of_the_parameters():
    assert rank_of((576, 576), 0.8) == 230 and cost((576, 576), 230) <= 0.8 * 576 * 576 < cost((576, 576), 231)
    assert rank_of((576, 1536), 0.001) == 1
    assert rank_of((576, 576), 1.0) is None and rank_of((1, 9), 0.5) is None
    for ratio in (0.0, -1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="is not a share of the parameters to keep, above 0 and at most 1"):
            rank_of((8, 8), ratio)


def spectra():
    shapes = {"wide": (6, 20), "tall": (24, 7), "square": (10, 10), "row": (1, 8)}
    scales = {"wide": 1.0, "tall": 30.0, "square": 0.1, "row": 1.0}
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        weight, gram = layer(*shape, seed=seed)
        found[name] = spectrum(weight * scales[name], gram).energies
    return found, shapes


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_parameters_are_spent_where_energy_is(ratio, relative):
    energies, shapes = spectra()
    ranks = allocate(energies, shapes, ratio, relative=relative)
    total = sum(cost(shape, None) for shape in shapes.values())
    spent = sum(cost(shapes[name], rank) for name, rank in ranks.items())
    least = sum(cost(shape, 1 if break_even(shape) else None) for shape in shapes.values())
    assert spent <= max(ratio * total, least) and ranks["row"] is None
    # a direction that was left out is worth no more than any that was taken and costs no less
    worth = {}
    for name, energy in energies.items():
        scale = float(energy.sum()) if relative else 1.0
        worth[name] = [float(x) / scale / sum(shapes[name]) for x in energy]
    for a, first in ranks.items():
        for b, second in ranks.items():
            factors = first is not None and second is not None and second > 1
            if factors and first < break_even(shapes[a]) and sum(shapes[a]) <= sum(shapes[b]):
                assert worth[a][first] <= worth[b][second - 1]


def test_all_parameters_leave_all_matrices_and_none_leave_one_direction():
    energies, shapes = spectra()
    assert set(allocate(energies, shapes, 1.0).values()) == {None}
    assert allocate(energies, shapes, 1e-9) == {"wide": 1, "tall": 1, "square": 1, "row": None}


def test_relative_energies_do_not_depend_on_the_size_of_outputs():
    energies, shapes = spectra()
    larger = {name: energy * (1e6 if name == "square" else 1) for name, energy in energies.items()}
    assert allocate(larger, shapes, 0.5, relative=True) == allocate(energies, shapes, 0.5, relative=True)
    before, after = allocate(energies, shapes, 0.5)["square"], allocate(larger, shapes, 0.5)["square"]
    assert before is not None and (after is None or after > before)
