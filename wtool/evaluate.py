"""How well a model foretells a text (perplexity), and how far its foretelling is from a reference model's.

A text is cut into windows that overlap. Each token is scored exactly once, in the first window that reaches it, so
that every token beyond the first window has at least `window - stride` tokens before it; the last window is moved
back to end with the text. Where the tokenizer puts a BOS in front of a text, each window begins with one (in the place
of its first token, as in llama.cpp): some families talk nonsense without. The first token of a text is then scored
too; without a BOS nothing foretells it.

    perplexity = exp(mean over tokens of -log p(token | those before))
    divergence = mean over tokens of KL(reference || model) of the next-token distributions, in nats

The logits of a text never exist at once: a model's body runs once a window, and its head on some positions at a
time. Softmax in float32, sums over tokens in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp, inf

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wtool.errors import InputError, Mismatch, UsageError
from wtool.loading import quiet

LOGITS = 1 << 23  # elements of logits at a time, 32 MB in float32


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of one text."""

    perplexity: float  # NaN or infinite where a token's probability is
    nats_per_token: float  # its logarithm
    tokens: int  # that were scored, each once
    windows: int
    window: int  # tokens
    stride: int  # tokens
    bos: bool  # whether each window begins with a BOS
    nonfinite: int  # tokens whose log-probability is NaN or infinite
    reference_perplexity: float | None = None  # of the reference, on the same windows
    divergence: float | None = None  # mean KL(reference || model), nats per token
    agreement: float | None = None  # share of tokens where both think the same token likeliest, in [0, 1]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text: its inputs are tokens begin to end - 1, its targets begin + 1 to end."""

    begin: int
    end: int
    fresh: int  # the first token not scored by a window before


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 1024,
    stride: int | None = None,
    reference: PreTrainedModel | None = None,
    batch: int = 1,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Score a text.

    window: tokens a model sees at once; cut to what it has positions for
    stride: tokens from one window to the next; half the window if None
    reference: a model with the same tokenizer (`tokenizers_differ` tells) on the same device; where one has more
               logits than the other, which pad its vocabulary, both are compared on those they have in common
    batch: windows computed together
    limit: tokens to score at most
    progress: is told the tokens scored

    raises: InputError where there is nothing to score, UsageError, Mismatch
    """
    ids, bos = encode(tokenizer, text)
    ids = ids if limit is None else ids[: limit + 1]
    models = (model,) if reference is None else (model, reference)
    window = min([window, *(longest for each in models if (longest := positions(each)))])
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"a stride of {stride} tokens does not fit a window of {window}: take 1 to {window}")
    _check(ids, models)
    windows = spread(len(ids) - 1, window, stride)
    sums = _Sums()
    with quiet(), torch.inference_mode(), _evaluating(models):
        for begin in range(0, len(windows), batch):
            before = sums.tokens
            _score(models, ids, bos, windows[begin : begin + batch], sums)
            progress(sums.tokens - before)
    mean = sums.nats / sums.tokens
    result = Evaluation(
        perplexity=_exp(mean),
        nats_per_token=mean,
        tokens=sums.tokens,
        windows=len(windows),
        window=window,
        stride=stride,
        bos=bos is not None,
        nonfinite=sums.nonfinite,
    )
    if reference is None:
        return result
    return replace(
        result,
        reference_perplexity=_exp(sums.reference_nats / sums.tokens),
        divergence=sums.divergence / sums.tokens,
        agreement=sums.agreed / sums.tokens,
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int | None]:
    """A text's tokens, with a BOS in front if the tokenizer puts one there, and that BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int) or tokenizer.encode("a", verbose=False)[:1] != [bos]:
        return ids, None
    return [bos, *ids], bos


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model is made to see at once; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def spread(targets: int, window: int, stride: int) -> list[Window]:
    """Lay windows over a text of which tokens 1 to `targets` are to be scored: all of one length, the last at its end.

    window, stride: tokens, stride at most window
    """
    length = min(window, targets)
    begins = [*range(0, targets - length, stride), targets - length]
    ends = [begin + length for begin in begins]
    return [Window(begin, end, last + 1) for begin, end, last in zip(begins, ends, [0, *ends], strict=False)]


def tokenizers_differ(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, text: str) -> str | None:
    """Tell what makes two tokenizers unfit for one comparison; None if nothing does.

    text: what they are tried on; a token that only one of them has matters where it occurs
    """
    known = theirs.get_vocab()
    moved = [(number, token) for token, number in ours.get_vocab().items() if known.get(token, number) != number]
    if moved:
        return f"{len(moved)} tokens have other numbers, the first is {min(moved)[1]!r}"
    if encode(ours, text) != encode(theirs, text):
        return "they cut the text into other tokens"
    return None


@dataclass
class _Sums:
    """Over the tokens scored so far."""

    tokens: int = 0
    nats: float = 0.0
    nonfinite: int = 0
    reference_nats: float = 0.0
    divergence: float = 0.0
    agreed: int = 0


def _check(ids: list[int], models: Sequence[PreTrainedModel]) -> None:
    if len(ids) < 2:
        found = "is empty" if not ids else "has one token, and nothing before it"
        raise InputError(f"nothing to score: the text {found}")
    for model in models:
        embedding = model.get_input_embeddings().weight
        if isinstance(embedding, Tensor) and max(ids) >= len(embedding):
            raise Mismatch(f"the tokenizer gives token {max(ids)}, but the model's vocabulary has {len(embedding)}")


def _score(
    models: Sequence[PreTrainedModel], ids: list[int], bos: int | None, windows: Sequence[Window], sums: _Sums
) -> None:
    """Add the tokens that no window before has scored."""
    device = models[0].device
    inputs = torch.tensor([ids[window.begin : window.end] for window in windows], device=device)
    targets = torch.tensor([ids[window.begin + 1 : window.end + 1] for window in windows], device=device)
    places = torch.tensor([range(window.begin + 1, window.end + 1) for window in windows])
    fresh = (places >= torch.tensor([[window.fresh] for window in windows])).to(device)  # [windows, length]
    if bos is not None:
        inputs[:, 0] = bos
    first = min(window.fresh - window.begin - 1 for window in windows)
    vocabulary = max(model.config.get_text_config().vocab_size for model in models)
    step = max(1, LOGITS // (vocabulary * len(windows)))
    for begin, *logits in zip(
        range(first, inputs.shape[1], step),
        *(logits_in_pieces(model, inputs, first, step) for model in models),
        strict=True,
    ):
        chosen = fresh[:, begin : begin + step]
        _add([each[chosen].float() for each in logits], targets[:, begin : begin + step][chosen], sums)


def logits_in_pieces(model: PreTrainedModel, inputs: Tensor, first: int, step: int) -> Iterator[Tensor]:
    """Yield the logits [windows, step, vocabulary] of all positions from `first` on, some at a time.

    A family may do more to its logits than multiply (soft caps, scales), so it is the whole model that runs on each
    piece, and its body is made to hand out a piece of what it computed once.
    """
    body = model.base_model
    output = None if body is model else body(input_ids=inputs, use_cache=False)
    if output is None or "last_hidden_state" not in output:
        yield from model(input_ids=inputs, use_cache=False).logits[:, first:].split(step, dim=1)
        return
    for hidden in output.last_hidden_state[:, first:].split(step, dim=1):
        # in one piece, or the head is multiplied with each window on its own, and most of that is reading the head
        piece = type(output)(**{**output, "last_hidden_state": hidden.contiguous()})
        body.forward = lambda *_, piece=piece, **__: piece
        try:
            logits = model(input_ids=inputs, use_cache=False).logits
        finally:
            del body.forward
        yield logits


def _add(logits: list[Tensor], targets: Tensor, sums: _Sums) -> None:
    """Add some tokens.

    logits: of the model, and of the reference if there is one, [tokens, vocabulary] in float32
    """
    ours = logits[0].log_softmax(-1)
    scores = ours.gather(-1, targets[:, None]).double()
    sums.tokens += len(targets)
    sums.nats -= scores.sum().item()
    sums.nonfinite += int((~scores.isfinite()).sum())
    if len(logits) == 1:
        return
    theirs = logits[1].log_softmax(-1)
    sums.reference_nats -= theirs.gather(-1, targets[:, None]).double().sum().item()
    common = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (
        log if log.shape[-1] == common else raw[:, :common].log_softmax(-1)
        for log, raw in zip((ours, theirs), logits, strict=True)
    )
    terms = theirs.exp() * (theirs - ours)
    sums.divergence += terms.masked_fill_(theirs == -inf, 0.0).sum(-1, dtype=torch.float64).sum().item()
    sums.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())


@contextmanager
def _evaluating(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, before in zip(models, training, strict=True):
            model.train(before)


def _exp(nats: float) -> float:
    try:
        return exp(nats)
    except OverflowError:
        return inf
