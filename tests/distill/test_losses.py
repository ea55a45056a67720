import math

import distillation_definitions as definition
import pytest
import torch

from distill.hidden_states import hidden_cosine, hidden_mse, relation_divergence
from distill.kinds import KINDS, Divergence
from distill.losses import (
    divergence,
    divergence_with_gradient,
    sampled_divergence,
    top_k_divergence,
    top_k_with_gradient,
)
from distill.signals import sample, top_k
from wtool.errors import Mismatch, UsageError

ASKED = [
    *(Divergence(kind) for kind in KINDS),
    *(Divergence(kind, temperature=2.5) for kind in KINDS),
    *(Divergence("jsd", beta=beta) for beta in (0, 1e-3, 0.2, 0.9, 1)),
    *(Divergence(kind, alpha=alpha) for kind in ("skew-kl", "skew-reverse-kl") for alpha in (0, 0.7)),
]
PARTIAL = [asked for asked in ASKED if asked.kind != "uld"]
SHAPES = [(1, 1), (1, 2), (3, 7), (1, 33)]


def logits(*shape, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradient_of(loss, student):
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(student).sum(), student)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_definition_and_finite_differences(asked, shape):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    found = divergence(student, teacher, asked)
    expected = [definition.divergence(*pair, asked) for pair in zip(student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)

    def total(moved):
        return sum(definition.divergence(*pair, asked) for pair in zip(moved.tolist(), teacher.tolist(), strict=True))

    gradient = gradient_of(lambda student: divergence(student, teacher, asked), student)
    torch.testing.assert_close(gradient, definition.slope(total, student), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_each_token_has_its_own_gradient(asked):
    student, teacher = logits(4, 9), logits(4, 9, seed=1)
    weights = torch.tensor([2.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    value, gradient = divergence_with_gradient(student, teacher, asked)
    found = gradient_of(lambda student: weights * divergence(student, teacher, asked), student)
    torch.testing.assert_close(found, weights[:, None] * gradient)
    torch.testing.assert_close(value, divergence(student, teacher, asked))


def by_autograd(student, teacher, asked):
    """The formula, of which autograd finds the derivative."""
    ls, lt = (each.div(asked.temperature).log_softmax(-1) for each in (student, teacher))
    share = {"jsd": asked.beta, "skew-kl": asked.alpha, "skew-reverse-kl": 1 - asked.alpha}.get(asked.kind, 0.5)
    m = ((1 - share) * ls.exp() + share * lt.exp()).log()
    forward, reverse = lt.exp() * (lt - ls), ls.exp() * (ls - lt)
    of_teacher, of_student = lt.exp() * (lt - m), ls.exp() * (ls - m)
    terms = {
        "forward-kl": forward,
        "reverse-kl": reverse,
        "jsd": asked.beta * of_teacher + (1 - asked.beta) * of_student,
        "skew-kl": of_teacher,
        "skew-reverse-kl": of_student,
        "tvd": (ls.exp() - lt.exp()).abs() / 2,
        "uld": (ls.exp().sort().values - lt.exp().sort().values).abs(),
    }
    return terms[asked.kind].sum(-1) * asked.temperature**2


@pytest.mark.parametrize("asked", [each for each in ASKED if not (each.kind == "jsd" and each.beta in (0, 1))], ids=str)
def test_closed_form_is_what_autograd_finds(asked):
    student, teacher = logits(6, 50), logits(6, 50, seed=1)
    expected = gradient_of(lambda student: by_autograd(student, teacher, asked), student)
    torch.testing.assert_close(divergence_with_gradient(student, teacher, asked)[1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_nothing_between_equals_and_more_than_nothing_otherwise(asked):
    student, teacher = logits(5, 20), logits(5, 20, seed=1)
    value, gradient = divergence_with_gradient(student, student + 7, asked)
    assert value.abs().max() < 1e-13
    assert asked.kind in ("tvd", "uld") or gradient.abs().max() < 1e-13  # those two have an edge there
    assert (divergence(student, teacher, asked) > 1e-5).all()


def test_the_ends_of_jsd_are_the_two_kl():
    student, teacher = logits(3, 30), logits(3, 30, seed=1)
    for beta, kind in ((0, "forward-kl"), (1, "reverse-kl")):
        pairs = zip(
            divergence_with_gradient(student, teacher, Divergence("jsd", beta=beta)),
            divergence_with_gradient(student, teacher, Divergence(kind)),
            strict=True,
        )
        assert all(torch.equal(*pair) for pair in pairs)


def test_jsd_is_symmetric_in_the_middle_and_at_most_ln_2():
    student, teacher = logits(50, 30, size=20), logits(50, 30, seed=1, size=20)
    found = divergence(student, teacher, Divergence("jsd"))
    torch.testing.assert_close(found, divergence(teacher, student, Divergence("jsd")))
    assert found.max() <= math.log(2) and found.max() > 0.69
    apart = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert divergence(*apart, Divergence("jsd")).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(asked, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, 1e4], [200.0, 0.0, -200.0]], dtype=dtype)
    value, gradient = divergence_with_gradient(student, student.flip(1).roll(1, 0), asked)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value >= 0).all() and value.dtype == gradient.dtype == torch.float32


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_token_that_neither_can_say_counts_nothing(asked):
    student, teacher = logits(3, 8), logits(3, 8, seed=1)
    more = [torch.cat([each, torch.full((3, 2), -math.inf, dtype=each.dtype)], 1) for each in (student, teacher)]
    value, gradient = divergence_with_gradient(student, teacher, asked)
    found, longer = divergence_with_gradient(more[0], more[1], asked)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(longer, torch.nn.functional.pad(gradient, (0, 2)))


def test_what_a_reference_gives():
    # torch's own KL of the same distributions, and the gradient softmax(s) - softmax(t)
    student, teacher = logits(5, 40).float(), logits(5, 40, seed=1).float()
    value, gradient = divergence_with_gradient(student, teacher, Divergence())
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(value, expected.sum(-1))
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


def test_no_token_at_all():
    student = torch.zeros(0, 5, requires_grad=True)
    divergence(student, torch.zeros(0, 5), Divergence()).sum().backward()
    assert student.grad is not None and student.grad.shape == (0, 5)


def test_16_bit_students_get_gradients_of_their_type():
    student, teacher = logits(2, 6).bfloat16().requires_grad_(), logits(2, 6, seed=1).half()
    before = student.detach().clone(), teacher.clone()
    divergence(student, teacher, Divergence(temperature=2)).sum().backward()
    exact = divergence_with_gradient(before[0].float(), teacher.float(), Divergence(temperature=2))[1]
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad, exact.bfloat16())
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("k", [1, 3, 6, 7])
@pytest.mark.parametrize("asked", PARTIAL, ids=str)
def test_top_k_definition_and_finite_differences(asked, k):
    student, teacher = logits(3, 7), logits(3, 7, seed=1)
    told = top_k(teacher, k, temperature=asked.temperature)
    rows = list(zip(told.ids.tolist(), told.log_probs.exp().tolist(), strict=True))

    def values(moved):
        return [definition.top_k_divergence(row, *told, asked) for row, told in zip(moved.tolist(), rows, strict=True)]

    found = top_k_divergence(student, told.ids, told.log_probs, told.tail, asked)
    torch.testing.assert_close(found, torch.tensor(values(student), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    gradient = gradient_of(lambda z: top_k_divergence(z, told.ids, told.log_probs, told.tail, asked), student)
    torch.testing.assert_close(
        gradient, definition.slope(lambda moved: sum(values(moved)), student), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("asked", PARTIAL, ids=str)
def test_top_k_is_full_at_the_whole_vocabulary_and_less_before(asked):
    student, teacher = logits(40, 24), logits(40, 24, seed=1)
    value, gradient = divergence_with_gradient(student, teacher, asked)
    before = torch.zeros_like(value)
    for k in (1, 2, 5, 12, 23):
        told = top_k(teacher, k, temperature=asked.temperature)
        found, _ = top_k_with_gradient(student, told.ids, told.log_probs, told.tail, asked)
        assert (found <= value + 1e-12).all() and (found >= before - 1e-12).all()
        before = found
    told = top_k(teacher, 24, temperature=asked.temperature)
    assert told.tail is not None and (told.tail == -math.inf).all()
    found = top_k_with_gradient(student, told.ids, told.log_probs, told.tail, asked)
    torch.testing.assert_close(found, (value, gradient))


def test_without_the_tail_the_terms_of_the_known_tokens_are_left():
    student, teacher = logits(3, 9), logits(3, 9, seed=1)
    asked = Divergence(temperature=2)
    told = top_k(teacher, 4, temperature=2)
    terms = told.log_probs.exp() * (told.log_probs - (student / 2).log_softmax(-1).gather(1, told.ids))
    found, gradient = top_k_with_gradient(student, told.ids, told.log_probs, None, asked)
    torch.testing.assert_close(found, 4 * terms.sum(-1))

    def total(moved):
        logs = (moved / 2).log_softmax(-1).gather(1, told.ids)
        return (4 * told.log_probs.exp() * (told.log_probs - logs)).sum().item()

    torch.testing.assert_close(gradient, definition.slope(total, student), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("asked", PARTIAL, ids=str)
def test_top_k_of_extreme_logits(asked):
    student = torch.tensor([[1e4, -1e4, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-1e4, -1e4, -1e4, 1e4]])
    told = top_k(student.roll(1, 0), 2, temperature=asked.temperature)
    value, gradient = top_k_with_gradient(student, told.ids, told.log_probs, told.tail, asked)
    assert value.isfinite().all() and gradient.isfinite().all()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()


@pytest.mark.parametrize("distance", [1.0, 0.05])
def test_with_the_tail_the_gradient_is_nearer_the_full_one(distance):
    student, teacher = definition.pruned_student(distance=distance)
    _, full = divergence_with_gradient(student, teacher, Divergence())
    for k, at_least in ((4, 0.9), (16, 0.97), (64, 0.99)):
        told = top_k(teacher, k)
        with_tail = cosine(top_k_with_gradient(student, told.ids, told.log_probs, told.tail, Divergence())[1], full)
        truncated = cosine(top_k_with_gradient(student, told.ids, told.log_probs, None, Divergence())[1], full)
        renormalised = told.log_probs.log_softmax(-1)
        pretended = cosine(top_k_with_gradient(student, told.ids, renormalised, None, Divergence())[1], full)
        assert with_tail > max(truncated, pretended)
        if distance == 1.0:
            assert with_tail > at_least


def test_a_sample_is_right_in_the_mean():
    student, teacher = logits(1, 12, size=1.5), logits(1, 12, seed=1, size=1.5)
    asked = Divergence(temperature=1.5)
    value, gradient = divergence_with_gradient(student, teacher, asked)
    draws = sample(teacher.expand(20000, -1), 4, temperature=1.5, generator=torch.Generator().manual_seed(0))
    many = student.expand(20000, -1).clone().requires_grad_()
    found = sampled_divergence(many, draws.ids, draws.log_weights, draws.entropy, asked)
    (slopes,) = torch.autograd.grad(found.sum(), many)
    for estimate, exact in ((found[:, None], value), (slopes, gradient[0])):
        error = estimate.std(0) / len(estimate) ** 0.5
        assert ((estimate.mean(0) - exact).abs() < 4 * error + 1e-6).all()


@pytest.mark.parametrize("k", [1, 3, 11, 12, 40])
def test_a_sample_has_different_tokens_and_all_of_the_mass(k):
    teacher = torch.cat([logits(200, 12, size=4.0), torch.zeros(1, 12, dtype=torch.float64)])
    drawn = sample(teacher, k, generator=torch.Generator().manual_seed(0))
    assert drawn.ids.shape == (201, min(k, 12))
    assert all(len(set(row)) == len(row) for row in drawn.ids.tolist())
    torch.testing.assert_close(drawn.log_weights.exp().sum(-1), torch.ones(201))
    assert (drawn.log_weights.diff(dim=-1) <= 1e-6).all()
    if k >= 12:
        torch.testing.assert_close(drawn.log_weights.exp(), teacher.float().softmax(-1).gather(1, drawn.ids))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "foward-kl"}, "loss 'foward-kl' is not one of forward-kl, .*; did you mean 'forward-kl'?"),
        ({"temperature": 0}, "temperature 0: a number above 0 is needed"),
        ({"beta": 1.5}, r"beta 1.5: a share in \[0, 1\] is needed"),
        ({"alpha": 1.0}, r"alpha 1.0: a share in \[0, 1\) is needed"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked, message):
    with pytest.raises(UsageError, match=message):
        Divergence(**asked)


def test_what_a_cache_cannot_tell_is_refused():
    told = top_k(logits(1, 5), 2)
    with pytest.raises(UsageError, match="loss 'reverse-kl' needs the teacher's mass outside the cached tokens"):
        top_k_divergence(logits(1, 5), told.ids, told.log_probs, None, Divergence("reverse-kl"))
    with pytest.raises(UsageError, match="loss 'uld' needs all of the teacher's probabilities"):
        top_k_divergence(logits(1, 5), told.ids, told.log_probs, told.tail, Divergence("uld"))


@pytest.mark.parametrize(("short", "long"), [(3, 8), (1, 4)])
def test_uld_of_two_vocabularies(short, long):
    for ours, theirs in ((short, long), (long, short)):
        student, teacher = logits(4, ours), logits(4, theirs, seed=1)
        asked = Divergence("uld")
        expected = [
            definition.divergence(*pair, asked) for pair in zip(student.tolist(), teacher.tolist(), strict=True)
        ]
        found, gradient = divergence_with_gradient(student, teacher, asked)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))

        def total(moved, teacher=teacher, asked=asked):
            return sum(
                definition.divergence(*pair, asked) for pair in zip(moved.tolist(), teacher.tolist(), strict=True)
            )

        torch.testing.assert_close(gradient, definition.slope(total, student), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 1), (4, 6)])
def test_hidden_states(shape):
    student, teacher, projector = logits(shape[0], 3), logits(*shape, seed=1), logits(shape[1], 3, seed=2)
    brought = [
        [sum(p * h for p, h in zip(row, token, strict=True)) for row in projector.tolist()]
        for token in student.tolist()
    ]
    pairs = list(zip(brought, teacher.tolist(), strict=True))
    squares = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / shape[1] for pair in pairs]
    angles = [
        1 - sum(a * b for a, b in zip(*pair, strict=True)) / (math.hypot(*pair[0]) * math.hypot(*pair[1]))
        for pair in pairs
    ]
    torch.testing.assert_close(hidden_mse(student, teacher, projector), torch.tensor(squares, dtype=torch.float64))
    torch.testing.assert_close(hidden_cosine(student, teacher, projector), torch.tensor(angles, dtype=torch.float64))
    found = torch.autograd.functional.jacobian(lambda p: hidden_mse(student, teacher, p).sum(), projector)
    slow = definition.slope(lambda p: hidden_mse(student, teacher, p).sum().item(), projector)
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-7)


def test_hidden_states_of_other_widths_need_a_projector():
    with pytest.raises(Mismatch, match=r"student's hidden states are \[2, 3\], the teacher's \[2, 4\]; .*a projector"):
        hidden_mse(torch.zeros(2, 3), torch.zeros(2, 4))


def test_states_of_zeros_are_apart_by_one():
    assert hidden_cosine(torch.zeros(1, 3), torch.ones(1, 3)).item() == 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (5, 2), (3, 6)])
def test_relations(tokens, heads, causal):
    student, teacher = logits(tokens, 12, size=1.0), logits(tokens, 6, seed=1, size=1.0)
    expected = definition.relation_divergence(student.tolist(), teacher.tolist(), heads, causal)
    found = relation_divergence(student, teacher, heads=heads, causal=causal)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    gradient = gradient_of(lambda s: relation_divergence(s, teacher, heads=heads, causal=causal), student)
    slow = definition.slope(
        lambda s: sum(definition.relation_divergence(s.tolist(), teacher.tolist(), heads, causal)), student
    )
    torch.testing.assert_close(gradient, slow, rtol=1e-5, atol=1e-8)


def test_relation_heads_must_divide_the_width():
    with pytest.raises(UsageError, match="5 relation heads: they must divide the width of the states, 12"):
        relation_divergence(torch.zeros(2, 12), torch.zeros(2, 10), heads=5)
