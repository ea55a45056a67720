"""The part of the page on quality: what `wtool eval --json` measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from wtool.errors import MalformedFile


@dataclass(frozen=True)
class Score:
    """What a model made of a text; None where that was not measured."""

    checkpoint: str
    text: str
    perplexity: float
    tokens: int
    window: int
    reference: str | None = None
    reference_perplexity: float | None = None
    divergence: float | None = None  # mean KL(reference || model), nats per token
    agreement: float | None = None  # share of tokens where both think the same one likeliest, in [0, 1]

    def is_of(self, name: str) -> bool:
        """Whether it is of the checkpoint of this name, or in a folder of this name."""
        return name in (self.checkpoint, PurePath(self.checkpoint).name)


def scores(told: Any, where: str) -> list[Score]:
    """The scores in the output of `wtool eval --json`.

    told: the parsed JSON
    where: the file it is from, for the message
    raises: MalformedFile
    """
    texts = told.get("texts") if isinstance(told, Mapping) else None
    if not isinstance(texts, list) or not isinstance(told.get("checkpoint"), str):
        raise MalformedFile(f"{where}: no 'checkpoint' and 'texts' in it; give what wtool eval --json printed")
    try:
        return [_score(told, text) for text in texts]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MalformedFile(
            f"{where}: a text without its figures ({error}); give what wtool eval --json printed"
        ) from None


def table(found: Sequence[Score]) -> str:
    """Every score in a row; a column of which nothing is known is left out."""
    if not found:
        return ""
    rows = [_cells(each) for each in found]
    columns = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(row[key] or '–')}</td>" for key in columns) + "</tr>" for row in rows)
    return (
        '<section><h2>Quality</h2><p class="soft small">Perplexity: lower is better. KL: how far the model\'s '
        "predictions are from the reference's, in nats per token; 0 is the same.</p>"
        f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div></section>'
    )


def _score(told: Mapping[str, Any], text: Mapping[str, Any]) -> Score:
    optional = {
        key: None if text.get(key) is None else float(text[key])
        for key in ("reference_perplexity", "divergence", "agreement")
    }
    return Score(
        checkpoint=told["checkpoint"],
        text=PurePath(str(text["file"])).name,
        perplexity=float(text["perplexity"]),
        tokens=int(text["tokens"]),
        window=int(text["window"]),
        reference=None if told.get("reference") is None else str(told["reference"]),
        **optional,
    )


def _cells(each: Score) -> dict[str, str | None]:
    return {
        "checkpoint": each.checkpoint,
        "text": each.text,
        "perplexity": f"{each.perplexity:.3f}",
        "reference's": None if each.reference_perplexity is None else f"{each.reference_perplexity:.3f}",
        "KL": None if each.divergence is None else f"{each.divergence:.4f}",
        "same first choice": None if each.agreement is None else f"{each.agreement:.1%}",
        "tokens": f"{each.tokens:,}",
        "window": f"{each.window:,}",
        "reference": each.reference,
    }
