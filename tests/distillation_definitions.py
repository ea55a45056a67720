"""Distillation written as slowly and plainly as the papers have it: loops over numbers, in float64."""

from math import exp, inf, log

import torch


def lists(tensor):
    return tensor.double().tolist()


def softmax(logits, temperature=1.0):
    largest = max(logits)
    weights = [exp((z - largest) / temperature) for z in logits]
    return [weight / sum(weights) for weight in weights]


def kl(p, q):
    """Σ p log(p / q), where a p of 0 counts nothing."""
    return sum(a * (log(a / b) if b else inf) for a, b in zip(p, q, strict=True) if a)


def mixture(p, q, share):
    return [(1 - share) * a + share * b for a, b in zip(p, q, strict=True)]


def between(student, teacher, asked):
    """The divergence of two lists of probabilities."""
    match asked.kind:
        case "forward-kl":
            return kl(teacher, student)
        case "reverse-kl":
            return kl(student, teacher)
        case "jsd" if asked.beta in (0, 1):  # by convention
            return kl(student, teacher) if asked.beta else kl(teacher, student)
        case "jsd":
            middle = mixture(student, teacher, asked.beta)
            return asked.beta * kl(teacher, middle) + (1 - asked.beta) * kl(student, middle)
        case "skew-kl":
            return kl(teacher, mixture(student, teacher, asked.alpha))
        case "skew-reverse-kl":
            return kl(student, mixture(teacher, student, asked.alpha))
        case "tvd":
            return sum(abs(a - b) for a, b in zip(student, teacher, strict=True)) / 2
        case "uld":
            longest = max(len(student), len(teacher))
            ours, theirs = (sorted(p, reverse=True) + [0.0] * (longest - len(p)) for p in (student, teacher))
            return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def divergence(student, teacher, asked):
    """Of two lists of logits."""
    t = asked.temperature
    return t * t * between(softmax(student, t), softmax(teacher, t), asked)


def top_k_divergence(student, ids, probabilities, asked):
    """Of the outcomes "one of these tokens" and "another"; probabilities of the tokens are the teacher's."""
    t = asked.temperature
    ours = softmax(student, t)
    known = [ours[i] for i in ids]
    others = sum(p for i, p in enumerate(ours) if i not in ids)
    theirs = [*probabilities, 1 - sum(probabilities)] if others else [*probabilities, 0.0]
    return t * t * between([*known, others], theirs, asked)


def slope(function, tensor, step=1e-5):
    """The derivative of a number by every element of a float64 tensor, by central differences."""
    found = torch.empty_like(tensor)
    for i in range(tensor.numel()):
        ends = []
        for sign in (1, -1):
            moved = tensor.clone()
            moved.view(-1)[i] += sign * step
            ends.append(function(moved))
        found.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return found


def relation_divergence(student, teacher, heads, causal):
    """Of two lists of states, for each token."""

    def relations(states, head, i):
        width = len(states[0]) // heads
        part = [row[head * width : (head + 1) * width] for row in states]
        seen = range(i + 1) if causal else range(len(states))
        return softmax([sum(a * b for a, b in zip(part[i], part[j], strict=True)) / width**0.5 for j in seen])

    return [
        sum(kl(relations(teacher, h, i), relations(student, h, i)) for h in range(heads)) / heads
        for i in range(len(student))
    ]


def pruned_student(tokens=64, vocabulary=4096, distance=1.0, seed=0):
    """Logits of a teacher with few likely tokens, as language models have, and of a student that lost something.

    distance: how far the student is; at 1 the mean KL is some nats, as after a cut of depth
    returns: student and teacher, float32 [tokens, vocabulary]
    """
    generator = torch.Generator().manual_seed(seed)
    common = -1.2 * torch.arange(1, vocabulary + 1).float().log()  # Zipf's law
    teacher = common + 2.5 * torch.randn(tokens, vocabulary, generator=generator)
    lost = torch.randn(tokens, vocabulary, generator=generator)
    return teacher * (1 - 0.5 * distance) + distance * lost, teacher
