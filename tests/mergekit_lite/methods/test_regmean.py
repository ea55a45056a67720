import merge_definitions_regmean as definition
import pytest
import torch

from mergekit_lite.methods import regmean as module
from mergekit_lite.methods.regmean import regmean, regmean_shared
from wtool.errors import RuntimeProblem

WEIGHT = [0.5, 1.25, 0.7]


def made(count, rows=7, columns=5, tokens=40, seed=0, dtype=torch.float64):
    """Inputs [tokens, in], each model's spread over its own directions, and weights [out, in]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [normal(tokens, columns) @ normal(columns, columns) for _ in range(count)]
    first = normal(rows, columns)
    return inputs, [(first + 0.3 * normal(rows, columns)).to(dtype) for _ in range(count)]


def grams_of(inputs, dtype=torch.float32):
    return [(rows.T @ rows / len(rows)).to(dtype) for rows in inputs]


def lists(tensors):
    """As the definition wants weights: [in][out]."""
    return [tensor.double().T.tolist() for tensor in tensors]


def expected(inputs, models, **options):
    found = definition.regmean([rows.tolist() for rows in inputs], lists(models), **options)
    return torch.tensor(found, dtype=torch.float64).T


@pytest.fixture(params=[module.ROWS, 3], ids=["one-stripe", "many-stripes"], autouse=True)
def stripes(request, monkeypatch):
    monkeypatch.setattr(module, "ROWS", request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (4, 1), (1, 1)])
def test_definition(shape, alpha, dtype):
    inputs, models = made(3, *shape, dtype=dtype)
    found = regmean(models, grams_of(inputs, torch.float64), weight=WEIGHT, alpha=alpha, damping=0.02)
    assert found.weight.dtype == dtype and found.damping == 0.02 and found.fallback is None
    step = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    wanted = expected(inputs, models, weight=WEIGHT, alpha=alpha, damping=0.02)
    torch.testing.assert_close(found.weight.double(), wanted, rtol=step, atol=step)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_the_objective_is_that_of_the_outputs(alpha):
    inputs, models = made(3)
    found = regmean(models, grams_of(inputs, torch.float64), weight=WEIGHT, alpha=alpha)
    rows = [each.tolist() for each in inputs]
    at = definition.objective(rows, lists(models), lists([found.weight])[0], weight=WEIGHT)
    mean = definition.objective(rows, lists(models), definition.mean(lists(models), weight=WEIGHT), weight=WEIGHT)
    assert found.objective == pytest.approx(at / mean, rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 3, 4, 40])  # up to 4 leave every Gram matrix singular
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_with_alpha_one_it_is_never_worse_than_the_mean(tokens, damping, seed):
    inputs, models = made(2, tokens=tokens, seed=seed, dtype=torch.float32)
    found = regmean(models, grams_of(inputs), weight=[1.0, 2.0], alpha=1.0, damping=damping)
    assert found.objective is not None and found.objective <= 1 + 1e-6


def test_inputs_that_do_not_meet_leave_each_model_its_outputs():
    # model 1 is fed by the first features only, model 2 by the others: columns of one and of the other
    inputs, models = made(2, tokens=50)
    inputs[0][:, 2:], inputs[1][:, :2] = 0, 0
    found = regmean(models, grams_of(inputs, torch.float64), weight=[1.0, 1.0], alpha=1.0, damping=1e-12)
    torch.testing.assert_close(found.weight, torch.cat([models[0][:, :2], models[1][:, 2:]], 1), rtol=1e-6, atol=1e-6)
    assert found.objective is not None and found.objective < 1e-9


def test_alpha_zero_is_the_mean_weighted_by_squares():
    inputs, models = made(3)
    grams = grams_of(inputs, torch.float64)
    parts = [weight * gram.diagonal() for weight, gram in zip(WEIGHT, grams, strict=True)]
    wanted = sum(part * model for part, model in zip(parts, models, strict=True)) / sum(parts)
    found = regmean(models, grams, weight=WEIGHT, alpha=0.0, damping=0.0)
    torch.testing.assert_close(found.weight, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_equal_gram_matrices_give_the_weighted_mean(alpha):
    inputs, models = made(3)
    grams = grams_of(inputs[:1], torch.float64) * 3
    wanted = sum(w * model for w, model in zip(WEIGHT, models, strict=True)) / sum(WEIGHT)
    found = regmean(models, grams, weight=WEIGHT, alpha=alpha)
    torch.testing.assert_close(found.weight, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_one_model_and_equal_models_are_themselves_to_the_bit(count, dtype):
    inputs, models = made(count, dtype=dtype)
    found = regmean([models[0]] * count, grams_of(inputs), weight=WEIGHT[:count])
    assert torch.equal(found.weight, models[0]) and found.objective == 1.0


def test_the_order_of_models_does_not_matter():
    inputs, models = made(3)
    grams = grams_of(inputs, torch.float64)
    one = regmean(models, grams, weight=WEIGHT).weight
    other = regmean(models[::-1], grams[::-1], weight=WEIGHT[::-1]).weight
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_unit_of_the_inputs_does_not_matter(size):
    inputs, models = made(2)
    inputs[0][:, 0] = inputs[1][:, 0] = 0  # also with an input that is always 0
    one = regmean(models, grams_of(inputs, torch.float64), weight=[1.0, 1.0]).weight
    other = regmean(models, grams_of([size * rows for rows in inputs], torch.float64), weight=[1.0, 1.0]).weight
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_feature_that_was_always_0_stays_at_the_mean():
    inputs, models = made(2)
    inputs[0][:, 3] = inputs[1][:, 3] = 0
    found = regmean(models, grams_of(inputs, torch.float64), weight=[1.0, 3.0]).weight
    torch.testing.assert_close(found[:, 3], (models[0][:, 3] + 3 * models[1][:, 3]) / 4)


def test_a_model_without_tokens_leaves_the_others_their_outputs():
    inputs, models = made(2)
    found = regmean(models, [grams_of(inputs, torch.float64)[0], None], weight=[1.0, 1.0], damping=0.0)
    torch.testing.assert_close(found.weight, models[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grams", [[None, None], [torch.zeros(5, 5)] * 2])
def test_without_tokens_it_is_the_weighted_mean(grams):
    _, models = made(2, dtype=torch.float32)
    found = regmean(models, grams, weight=[1.0, 3.0])
    torch.testing.assert_close(found.weight, (models[0] + 3 * models[1]) / 4)
    assert found.fallback and found.objective is None


def test_linears_that_share_an_input_are_as_each_alone():
    inputs, first = made(2)
    _, second = made(2, rows=9, seed=1)
    grams = grams_of(inputs, torch.float64)
    found = regmean_shared([first, second], grams, weight=[1.0, 2.0])
    for models, each in zip([first, second], found, strict=True):
        assert torch.equal(each.weight, regmean(models, grams, weight=[1.0, 2.0]).weight)


def test_transposed_and_strided_inputs_and_nothing_is_changed():
    inputs, models = made(2, dtype=torch.float32)
    grams = grams_of(inputs)
    kept = [tensor.clone() for tensor in (*models, *grams)]
    turned = [model.T.contiguous().T for model in models]  # as a Conv1D's weight, which lies as [in, out]
    assert not turned[0].is_contiguous()
    assert torch.equal(
        regmean(turned, grams, weight=[1.0, 1.0]).weight, regmean(models, grams, weight=[1.0, 1.0]).weight
    )
    assert all(torch.equal(one, other) for one, other in zip(kept, (*models, *grams), strict=True))


def test_float32_is_near_float64_though_features_differ_a_million_times():
    inputs, models = made(3, rows=32, columns=64, tokens=200)
    size = torch.logspace(-3, 3, 64, dtype=torch.float64)
    inputs = [rows * size for rows in inputs]
    exact = regmean(models, grams_of(inputs, torch.float64), weight=WEIGHT)
    found = regmean([model.float() for model in models], grams_of(inputs), weight=WEIGHT)
    assert (found.weight - exact.weight).norm() / exact.weight.norm() < 1e-4
    assert found.objective == pytest.approx(exact.objective, rel=1e-3)


def test_a_gram_matrix_that_is_not_finite_is_refused():
    inputs, models = made(2)
    grams = grams_of(inputs)
    grams[1][2, 2] = float("inf")
    with pytest.raises(RuntimeProblem, match="must be finite"):
        regmean(models, grams, weight=[1.0, 1.0])
