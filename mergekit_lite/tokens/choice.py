"""From a recipe and the models' tokenizer files to the output's vocabulary, or to what stands against it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wtool.checkpoint import Checkpoint
from wtool.errors import UsageError, did_you_mean

from .files import TOKENIZER, grown_files, own_files, union
from .recipe import BASE, UNION, ModelToken, TokenizerRecipe, Zero
from .token_rows import Given, RowMap, row_map
from .tokenizer import SENTENCEPIECE, Tokens, difference, same_sentencepiece, tokens_of
from .vocabulary import GENERATION, NewVocabulary, embedding_rows

CURE = "say whose the output has with tokenizer: {source: union} in the recipe, or --tokenizer union|base|MODEL"
MAKE_TOKENIZER_JSON = "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL) with transformers makes it"

Checkpoints = Mapping[str, Checkpoint]


@dataclass(frozen=True)
class Chosen:
    """The output's vocabulary; none where it is that of every model."""

    vocabulary: NewVocabulary | None
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tokens: Mapping[str, int] | None = None  # the output's, where they are known


@dataclass(frozen=True)
class _Output:
    """Which tokens the output has."""

    model: int  # whose tokenizer it is, perhaps with more tokens
    tokens: Tokens
    files: Mapping[str, bytes | Path]
    size: int
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()


def choose_vocabulary(
    asked: TokenizerRecipe | None, checkpoints: Checkpoints, base: str | None, ignore_tokenizers: bool
) -> Chosen:
    """Settle the output's vocabulary.

    asked:       what the recipe says
    checkpoints: by their references, the donor of the configuration first
    base:        the recipe's base_model
    ignore_tokenizers: merge though the same numbers mean other tokens
    raises: UsageError for a model or a token that is not there
    """
    models = list(checkpoints.values())
    read = [tokens_of(model) for model in models]
    known = [tokens for tokens in read if tokens is not None]
    counts = [embedding_rows(model) for model in models]
    rows = [count for count in counts if count is not None]
    if len(known) < len(models):
        return _of_unread(asked, checkpoints, read, ignore_tokenizers)
    if len(rows) < len(models):
        return _without_rows(asked, models, known, counts, ignore_tokenizers)
    if asked is not None:
        found = _asked(asked, checkpoints, known, rows)
        given = _given(asked, found.tokens, checkpoints, known, rows)
    else:
        found, given = _superset(models, known, rows), {}
        if isinstance(found, str):
            return Chosen(None, *_refused(found, ignore_tokenizers), known[0].numbers)
    same = all(tokens.numbers == found.tokens.numbers for tokens in known) and set(rows) == {found.size}
    if same and not given and found.model == 0:
        return Chosen(None, found.problems, found.warnings, found.tokens.numbers)
    place = None if base is None else list(checkpoints).index(base)
    made = row_map(found.size, found.tokens, known, rows, place, given)
    return Chosen(_vocabulary(found, made, models, rows, given), tokens=found.tokens.numbers)


def _vocabulary(
    found: _Output, made: RowMap, models: Sequence[Checkpoint], rows: Sequence[int], given: Mapping[int, Given]
) -> NewVocabulary:
    best = made.rows.max(0).values[: found.tokens.end].tolist()
    warnings = [*found.warnings, *_rowless(best, found.tokens, given)]
    files = _with_generation(found, models)
    return NewVocabulary(made, frozenset(rows), models[found.model], files, found.problems, warnings)


def _refused(problem: str, ignore_tokenizers: bool) -> tuple[list[str], list[str]]:
    """(problems, warnings)"""
    return ([], [problem]) if ignore_tokenizers else ([f"{problem}; {CURE}; --ignore-tokenizers merges anyway"], [])


def _compared(
    models: Sequence[Checkpoint], read: Sequence[Tokens | None], ignore_tokenizers: bool
) -> tuple[list[str], list[str]]:
    """Whether the models whose tokens are known mean the same by the same numbers: (problems, warnings)."""
    known = [(model, tokens) for model, tokens in zip(models, read, strict=True) if tokens is not None]
    problems, warnings = [], []
    for model, tokens in known[1:]:
        if found := difference(known[0][0], model, known[0][1], tokens):
            refused, told = _refused(found, ignore_tokenizers)
            problems, warnings = [*problems, *refused], [*warnings, *told]
    return problems, warnings


def _of_unread(
    asked: TokenizerRecipe | None, checkpoints: Checkpoints, read: Sequence[Tokens | None], ignore_tokenizers: bool
) -> Chosen:
    """Where tokens of a model are not read: it is merged row by row, so nothing else can be asked for."""
    models = list(checkpoints.values())
    lacking = next(model for model, tokens in zip(models, read, strict=True) if tokens is None)
    if asked is None:
        return Chosen(None, *_compared(models, read, ignore_tokenizers))
    told = f"tokenizer: {lacking.label} has no tokenizer.json, vocab.json or vocab.txt"
    if asked.source == UNION or asked.tokens or asked.pad_to_multiple_of:
        return Chosen(None, [f"{told}, so its tokens are not known here; {_cure(lacking)}"])
    if not same_sentencepiece(models):
        return Chosen(None, [f"{told}, so whether its tokens are those of the others is not known; {_cure(lacking)}"])
    chosen = _chosen(asked.source, checkpoints)
    if chosen == 0:
        return Chosen(None)
    return Chosen(None, [f"tokenizer: all models have the same SentencePiece file; take source: {BASE}"])


def _cure(model: Checkpoint) -> str:
    has_tokenizer = any(name in model.files for name in SENTENCEPIECE)
    return MAKE_TOKENIZER_JSON if has_tokenizer else "put the tokenizer it was trained with beside its weights"


def _without_rows(
    asked: TokenizerRecipe | None,
    models: Sequence[Checkpoint],
    tokens: Sequence[Tokens],
    counts: Sequence[int | None],
    ignore_tokenizers: bool,
) -> Chosen:
    """Where a model has no embedding that is known: tokens are compared, and nothing can be moved."""
    if asked is None:
        return Chosen(None, *_compared(models, tokens, ignore_tokenizers), tokens[0].numbers)
    lacking = models[counts.index(None)]
    return Chosen(None, [f"tokenizer: no embedding of tokens is found among the tensors of {lacking.label}"])


def _superset(models: Sequence[Checkpoint], tokens: Sequence[Tokens], rows: Sequence[int]) -> _Output | str:
    """The vocabulary of the model that has all tokens, with the same numbers; else why there is none."""
    for model, own in zip(models[1:], tokens[1:], strict=True):
        if problem := difference(models[0], model, tokens[0], own):
            return problem
    largest = max(range(len(models)), key=lambda i: (len(tokens[i].numbers), -i))
    for model, own in zip(models, tokens, strict=True):
        if only := [token for token in own.numbers if tokens[largest].numbers.get(token) != own.numbers[token]]:
            return (
                f"tokenizers differ: {len(only)} tokens of {model.label} are not in {models[largest].label} "
                f"(first: {only[0]!r})"
            )
    output = _Output(largest, tokens[largest], own_files(models[largest]), rows[largest])
    return _Output(**{**vars(output), "warnings": _about_superset(output, models, tokens, rows)})


def _about_superset(
    output: _Output, models: Sequence[Checkpoint], tokens: Sequence[Tokens], rows: Sequence[int]
) -> list[str]:
    """Remarks on models that have fewer tokens, or another number of rows for the same ones."""
    winner, remarks = models[output.model].label, []
    for model, own, count in zip(models, tokens, rows, strict=True):
        only = sorted(output.tokens.numbers.keys() - own.numbers.keys())
        if only:
            remarks.append(
                f"tokenizers differ: {len(only)} tokens are only in one of {model.label} and {winner} "
                f"(first: {only[0]!r}); the output has the tokenizer of {winner}, which has all tokens of every model"
            )
        elif count != output.size:
            remarks.append(
                f"{model.label} has {count} rows for its {len(own.numbers)} tokens; the output has {output.size}, "
                f"as {winner} has, whose tokenizer it gets"
            )
    return remarks


def _asked(asked: TokenizerRecipe, checkpoints: Checkpoints, tokens: Sequence[Tokens], rows: Sequence[int]) -> _Output:
    """The vocabulary that the recipe names."""
    models = list(checkpoints.values())
    chosen = 0 if asked.source == UNION else _chosen(asked.source, checkpoints)
    output = _Output(chosen, tokens[chosen], own_files(models[chosen]), rows[chosen])
    if asked.source == UNION and any(own.numbers.keys() - tokens[0].numbers.keys() for own in tokens):
        if without := [model.label for model in models if TOKENIZER not in model.files]:
            problem = f"tokenizer: union needs the tokenizer.json of every model; {without[0]} has none"
            return _Output(0, tokens[0], output.files, rows[0], [f"{problem}; {MAKE_TOKENIZER_JSON}"])
        made = union(models, tokens)
        files = {} if made.problems else grown_files(models[0], tokens[0], made)
        output = _Output(0, made.tokens, files, rows[0], made.problems, made.warnings)
    size = max(output.size, output.tokens.end)
    if asked.pad_to_multiple_of:
        size = -(-output.tokens.end // asked.pad_to_multiple_of) * asked.pad_to_multiple_of
    return _Output(**{**vars(output), "size": size})


def _chosen(source: str, checkpoints: Checkpoints) -> int:
    """The model that a recipe's source names. raises: UsageError"""
    names = list(checkpoints)
    if source == BASE:
        return 0
    if source not in names:
        raise UsageError(
            f"tokenizer: '{source}' is none of the models{did_you_mean(source, [UNION, BASE, *names])} "
            f"(take {UNION}, {BASE}, or one of {', '.join(names)})"
        )
    return names.index(source)


def _given(
    asked: TokenizerRecipe, output: Tokens, checkpoints: Checkpoints, tokens: Sequence[Tokens], rows: Sequence[int]
) -> dict[int, Given]:
    """The recipe's rules for single tokens, by the token's number in the output. raises: UsageError"""
    given: dict[int, Given] = {}
    for token, rule in asked.tokens.items():
        if token not in output.numbers:
            raise UsageError(
                f"tokens: the output has no token {token!r}{did_you_mean(token, output.numbers)}"
                f" (its tokens are those of source: {asked.source})"
            )
        found: dict[int, int] = {}
        if not isinstance(rule.source, Zero):
            name = rule.source.model if isinstance(rule.source, ModelToken) else rule.source
            model = _chosen(name, checkpoints)
            row = _row(rule.source, token, tokens[model])
            if row is None or row >= rows[model]:
                raise UsageError(
                    f"tokens: {token!r}: {name} has no row for {_whose(rule.source, token)} (it has {rows[model]} rows)"
                )
            found = {model: row}
        given[output.numbers[token]] = Given(found, rule.force)
    return given


def _whose(source: ModelToken | str, token: str) -> str:
    """How an error names the token whose row is wanted."""
    if isinstance(source, ModelToken):
        return f"number {source.token_id}" if source.token is None else repr(source.token)
    return repr(token)


def _row(source: ModelToken | str, token: str, tokens: Tokens) -> int | None:
    if not isinstance(source, ModelToken):
        return tokens.numbers.get(token)
    return source.token_id if source.token is None else tokens.numbers.get(source.token)


def _with_generation(found: _Output, models: Sequence[Checkpoint]) -> dict[str, bytes | Path]:
    """The tokenizer's files, with the generation settings that go with its numbers, where they are another model's."""
    files = models[found.model].files
    own = {GENERATION: files[GENERATION]} if found.model and GENERATION in files else {}
    return {**found.files, **own}


def _rowless(best: Sequence[int], tokens: Tokens, given: Mapping[int, Given]) -> list[str]:
    """A remark on tokens that no model has a row for."""
    without = [tokens.names[i] for i, row in enumerate(best) if row < 0 and i in tokens.names and i not in given]
    if not without:
        return []
    return [f"{len(without)} tokens have no row in any model (first: {without[0]!r}); they get the mean of all rows"]
