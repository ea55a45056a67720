from dataclasses import replace

import distillation_definitions as definition
import pytest
import torch
from torch import nn

from distill.kinds import KINDS, Divergence
from distill.linear_divergence import Head, linear_divergence
from distill.losses import divergence, sampled_divergence, top_k_divergence
from distill.signals import Online, of_hidden, sample, top_k
from wtool.errors import Mismatch

HEADS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 1.7, "softcap": 5.0}]
F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def a_head(vocabulary, width, *, seed=0, bias=False, dtype=F64, **options):
    return Head(
        normal(vocabulary, width, seed=seed, dtype=dtype),
        normal(vocabulary, seed=seed + 1) if bias else None,
        **options,
    )


def dense_logits(hidden, head):
    logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def dense(hidden, head, teacher, asked, *, labels=None, ce_weight=0.0, kd_weight=1.0):
    """As it is usually done."""
    ours, theirs = dense_logits(hidden, head), dense_logits(teacher.hidden, teacher.head)
    total = kd_weight * divergence(ours, theirs, asked).sum()
    return total if labels is None else total + ce_weight * nn.functional.cross_entropy(ours, labels, reduction="sum")


def both(hidden, head, run):
    """A value, and its gradients by hidden states, weight and bias."""
    leaves = [each.detach().clone().requires_grad_() for each in (hidden, head.weight, head.bias) if each is not None]
    bias = leaves[2] if head.bias is not None else None
    value = run(leaves[0], replace(head, weight=leaves[1], bias=bias))
    (2 * value).backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("asked", [Divergence(), Divergence("jsd", temperature=2), Divergence("reverse-kl")], ids=str)
def test_as_the_dense_computation(asked, bias, options, tokens):
    hidden, head = normal(tokens, 5), a_head(11, 5, bias=bias, **options)
    teacher = Online(normal(tokens, 8, seed=3), a_head(11, 8, seed=4, bias=True, softcap=3.0))
    mix = {"labels": torch.arange(tokens) % 11, "ce_weight": 0.4, "kd_weight": 1.5}
    expected = both(hidden, head, lambda *ours: dense(*ours, teacher, asked, **mix))
    for chunk in (None, 1, 2, 3, 100):
        found = both(hidden, head, lambda *ours, c=chunk: linear_divergence(*ours, teacher, asked, **mix, chunk=c)[0])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes_of_the_value(kind):
    hidden, head = normal(2, 3), a_head(6, 3, bias=True, scale=0.8, softcap=4.0)
    teacher, asked = Online(normal(2, 4, seed=5), a_head(6, 4, seed=6)), Divergence(kind, temperature=1.5)
    labels = torch.tensor([5, 0])

    def run(hidden, head):
        return linear_divergence(hidden, head, teacher, asked, labels=labels, ce_weight=0.3, chunk=1)[0]

    _, *found = both(hidden, head, run)
    slow = [
        definition.slope(lambda moved: 2 * run(moved, head).item(), hidden),
        definition.slope(lambda moved: 2 * run(hidden, replace(head, weight=moved)).item(), head.weight),
        definition.slope(lambda moved: 2 * run(hidden, replace(head, bias=moved)).item(), head.bias),
    ]
    torch.testing.assert_close(found, slow, rtol=1e-6, atol=1e-7)


def test_sums_are_told_apart():
    hidden, head = normal(9, 4), a_head(7, 4)
    teacher, labels = Online(normal(9, 4, seed=1), a_head(7, 4, seed=2)), torch.arange(9) % 7
    total, sums = linear_divergence(hidden, head, teacher, Divergence(), labels=labels, ce_weight=0.25, kd_weight=2.0)
    torch.testing.assert_close(sums["kd"], dense(hidden, head, teacher, Divergence()))
    torch.testing.assert_close(
        sums["ce"], nn.functional.cross_entropy(dense_logits(hidden, head), labels, reduction="sum")
    )
    torch.testing.assert_close(total, 2 * sums["kd"] + sums["ce"] / 4)
    assert not any(each.requires_grad for each in sums.values())


def test_cross_entropy_alone_needs_no_teacher():
    hidden, head, labels = normal(5, 4), a_head(7, 4), torch.tensor([1, 2, 3, 6, 0])

    def plain(hidden, head):
        return nn.functional.cross_entropy(dense_logits(hidden, head), labels, reduction="sum")

    found = both(
        hidden, head, lambda *ours: linear_divergence(*ours, None, Divergence(), labels=labels, ce_weight=1.0)[0]
    )
    torch.testing.assert_close(found, both(hidden, head, plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ours", "theirs"), [(8, 11), (11, 8)])
def test_vocabularies_of_unequal_padding(ours, theirs, kind):
    hidden, head = normal(3, 5), a_head(ours, 5, bias=True)
    teacher = Online(normal(3, 6, seed=3), a_head(theirs, 6, seed=4, bias=True))
    asked = Divergence(kind)
    common = None if kind == "uld" else 8
    found = both(hidden, head, lambda *s: linear_divergence(*s, teacher, asked, chunk=2)[0])

    def cut(hidden, head):
        logits = dense_logits(hidden, head)[:, :common], dense_logits(teacher.hidden, teacher.head)[:, :common]
        return divergence(*logits, asked).sum()

    torch.testing.assert_close(found, both(hidden, head, cut))


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_of_whom_k_tokens_are_known(kind, temperature):
    hidden, head, asked = normal(5, 4), a_head(12, 4, scale=2.0), Divergence(kind, temperature)
    told = top_k(normal(5, 12, seed=9, dtype=F64) * 3, 4, temperature=temperature)
    expected = both(
        hidden,
        head,
        lambda h, w: top_k_divergence(dense_logits(h, w), told.ids, told.log_probs, told.tail, asked).sum(),
    )
    found = both(hidden, head, lambda *ours: linear_divergence(*ours, told, asked, chunk=2)[0])
    torch.testing.assert_close(found, expected)


def test_a_sample_of_the_teacher():
    hidden, head = normal(5, 4), a_head(12, 4)
    told = sample(normal(5, 12, seed=9) * 3, 4, generator=torch.Generator().manual_seed(0))
    expected = both(
        hidden,
        head,
        lambda h, w: sampled_divergence(
            dense_logits(h, w), told.ids, told.log_weights, told.entropy, Divergence()
        ).sum(),
    )
    torch.testing.assert_close(
        both(hidden, head, lambda *ours: linear_divergence(*ours, told, Divergence(), chunk=2)[0]), expected
    )


@pytest.mark.parametrize("kept", [top_k, sample])
def test_cached_tokens_beyond_the_students_vocabulary_are_left_out(kept):
    # the teacher has 4 tokens more, of which some are among the known ones
    hidden, head, teacher = normal(6, 4), a_head(8, 4), normal(6, 12, seed=9) * 2
    told = kept(teacher, 12)
    assert (told.ids >= 8).any()
    found = both(hidden, head, lambda *ours: linear_divergence(*ours, told, Divergence(), chunk=4)[0])
    expected = both(hidden, head, lambda h, w: divergence(dense_logits(h, w), teacher[:, :8], Divergence()).sum())
    gradients = found[1:], expected[1:]
    torch.testing.assert_close(*gradients)
    if kept is top_k:  # a sample tells the entropy over all tokens only
        torch.testing.assert_close(found[0], expected[0])


def test_cached_tokens_of_a_smaller_vocabulary():
    hidden, head, teacher = normal(6, 4), a_head(12, 4), normal(6, 8, seed=9) * 2
    found = both(hidden, head, lambda *ours: linear_divergence(*ours, top_k(teacher, 8), Divergence())[0])
    expected = both(hidden, head, lambda h, w: divergence(dense_logits(h, w)[:, :8], teacher, Divergence()).sum())
    torch.testing.assert_close(found, expected)
    assert not found[2][8:].any()


def test_tied_embeddings_get_both_gradients():
    weight = normal(9, 4).requires_grad_()
    ids, teacher = torch.tensor([3, 1, 8]), Online(normal(3, 4, seed=1), a_head(9, 4, seed=2))

    def through(loss):
        (found,) = torch.autograd.grad(loss(torch.tanh(weight[ids]), Head(weight)), weight)
        return found

    found = through(lambda *ours: linear_divergence(*ours, teacher, Divergence())[0])
    torch.testing.assert_close(found, through(lambda *ours: dense(*ours, teacher, Divergence())))


def test_a_frozen_head_gets_none_and_a_teacher_never():
    hidden, head = normal(4, 3).requires_grad_(), a_head(5, 3)
    theirs, of_teacher = normal(4, 3, seed=1).requires_grad_(), a_head(5, 3, seed=2)
    of_teacher.weight.requires_grad_()
    linear_divergence(hidden, head, Online(theirs, of_teacher), Divergence())[0].backward()
    assert hidden.grad is not None and hidden.grad.any()
    assert head.weight.grad is None and theirs.grad is None and of_teacher.weight.grad is None
    weight = head.weight.requires_grad_()
    linear_divergence(hidden.detach(), head, Online(theirs, of_teacher), Divergence())[0].backward()
    assert weight.grad is not None and weight.grad.any()


def test_without_a_graph():
    hidden, head = normal(4, 3).requires_grad_(), a_head(5, 3)
    teacher = Online(normal(4, 3, seed=1), a_head(5, 3, seed=2))
    with torch.no_grad():
        value, _ = linear_divergence(hidden, head, teacher, Divergence())
    assert not value.requires_grad
    torch.testing.assert_close(value, dense(hidden, head, teacher, Divergence()).detach())


def test_no_token_is_0_with_a_graph():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    teacher = Online(torch.zeros(0, 3), Head(torch.ones(5, 3)))
    value, sums = linear_divergence(hidden, Head(weight), teacher, Divergence(), labels=labels, ce_weight=1.0)
    assert value.item() == sums["kd"].item() == sums["ce"].item() == 0
    value.backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_weights_are_computed_with_in_float32(autocast):
    hidden, head = normal(5, 6, dtype=torch.bfloat16), a_head(9, 6, dtype=torch.bfloat16)
    teacher = Online(normal(5, 6, seed=3, dtype=torch.float16), a_head(9, 6, seed=4, dtype=torch.bfloat16))
    asked = Divergence(temperature=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = both(hidden, head, lambda *ours: linear_divergence(*ours, teacher, asked, chunk=2)[0])
    exact = Online(teacher.hidden.float(), Head(teacher.head.weight.float()))
    expected = both(hidden.float(), Head(head.weight.float()), lambda *ours: dense(*ours, exact, asked))
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=1e-3)  # cast once, and doubled


def test_gradients_of_a_second_pass_are_the_same():
    hidden = normal(4, 3).requires_grad_()
    value, _ = linear_divergence(hidden, a_head(5, 3), Online(normal(4, 3, seed=1), a_head(5, 3, seed=2)), Divergence())
    (first,) = torch.autograd.grad(value, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, hidden)
    torch.testing.assert_close(second, 3 * first)


def test_extreme_logits_give_numbers():
    hidden, head = torch.tensor([[1e4, -1e4], [0.0, 1.0]]), Head(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    teacher = Online(-hidden, head)
    for kind in KINDS:
        found = both(hidden, head, lambda *ours, kind=kind: linear_divergence(*ours, teacher, Divergence(kind))[0])
        assert all(each.isfinite().all() for each in found)


def test_what_it_gets_is_not_changed():
    hidden, head = normal(4, 3), a_head(5, 3, bias=True, scale=0.5, softcap=1.0)
    teacher = Online(normal(4, 3, seed=1), a_head(5, 3, seed=2))
    told = top_k(normal(4, 5, seed=3), 2)
    kept = [each.clone() for each in (hidden, head.weight, head.bias, teacher.hidden, told.log_probs, told.ids)]
    for targets in (teacher, told):
        linear_divergence(hidden, head, targets, Divergence("jsd", 2.0), labels=torch.arange(4), ce_weight=1.0)
    after = (hidden, head.weight, head.bias, teacher.hidden, told.log_probs, told.ids)
    assert all(torch.equal(*pair) for pair in zip(kept, after, strict=True))


def test_other_tokens_are_refused():
    with pytest.raises(
        Mismatch, match="the student has 4 tokens, the teacher's signal 3; they must be the same tokens"
    ):
        linear_divergence(normal(4, 3), a_head(5, 3), Online(normal(3, 3), a_head(5, 3)), Divergence())
    with pytest.raises(Mismatch, match="the student has 4 tokens, labels 2"):
        linear_divergence(normal(4, 3), a_head(5, 3), None, Divergence(), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_a_signal_is_that_of_the_whole_logits(chunk):
    hidden, head = normal(7, 4), a_head(20, 4, scale=1.5, softcap=6.0, bias=True)
    told = of_hidden(hidden, head, lambda logits: top_k(logits, 5, temperature=2.0), chunk=chunk)
    expected = (dense_logits(hidden, head) / 2).log_softmax(-1)
    torch.testing.assert_close(told.log_probs, expected.topk(5).values)
    assert torch.equal(told.ids, expected.topk(5).indices)
    torch.testing.assert_close(told.tail, (1 - told.log_probs.exp().sum(-1)).log())
    assert told.vocabulary == 20
