"""`wtool diff`: how far two checkpoints are apart, tensor by tensor."""

from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wtool.compare import Comparison, Difference

app = typer.Typer(add_completion=False, rich_markup_mode=None)

EPILOG = """\
relative: ||a - b|| / ||a||.  cosine: of the angle between a and b.  largest: |a - b| of the element furthest apart.
The exit code is 0 whether or not they differ; with --exit-code it is 1 when they do (in values, types, shapes or
names), as in git diff."""
LISTED = 10  # names told one by one where tensors are in one checkpoint only


@app.command(epilog=EPILOG)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="the checkpoint to measure from")],
    b: Annotated[str, typer.Argument(metavar="B", help="the checkpoint to compare with it")],
    top: Annotated[int, typer.Option(min=0, help="show the tensors that are furthest apart")] = 15,
    show_all: Annotated[bool, typer.Option("--all", help="show every tensor, in the order of A")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="exit with 1 when they differ")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: all processors]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> None:
    """Tell how far two checkpoints are apart, read tensor by tensor."""
    from wtool import console
    from wtool.checkpoint import open_checkpoint
    from wtool.compare import compare

    first, second = open_checkpoint(a), open_checkpoint(b)
    with console.progress("comparing", first.nbytes, quiet=quiet) as advance:
        result = compare(first, second, workers=workers, progress=advance)
    shown = list(result.differences) if show_all else result.worst(top)
    if as_json:
        console.emit_json({"a": a, "b": b, **_figures(result), "tensors": [_row(difference) for difference in shown]})
    else:
        _print(a, b, result, shown)
    if exit_code and not result.identical:
        raise typer.Exit(1)


def _figures(result: "Comparison") -> dict[str, Any]:
    overall = result.overall
    return {
        "identical": result.identical,
        "compared": len(result.differences),
        "equal": result.equal,
        "relative": overall.relative if result.differences else None,
        "cosine": overall.cosine,
        "largest": overall.largest,
        "nonfinite": list(overall.nonfinite),
        "only_in_a": list(result.only_a),
        "only_in_b": list(result.only_b),
        "shapes_differ": [{"name": name, "a": list(a), "b": list(b)} for name, a, b in result.shapes],
        "dtypes_differ": sum(difference.dtypes[0] != difference.dtypes[1] for difference in result.differences),
        "tied": [{"a": pair.name, "b": pair.other} for pair in result.differences if pair.name != pair.other],
        "layers": [
            {"layer": number, "relative": sums.relative, "cosine": sums.cosine}
            for number, sums in result.layers.items()
        ],
    }


def _row(difference: "Difference") -> dict[str, Any]:
    sums = difference.sums
    return {
        "name": difference.name,
        **({"name_in_b": difference.other} if difference.other != difference.name else {}),
        "shape": list(difference.shape),
        "dtypes": list(difference.dtypes),
        "equal": sums.equal,
        "relative": sums.relative,
        "cosine": sums.cosine,
        "largest": sums.largest,
        "nonfinite": list(sums.nonfinite),
    }


def _print(a: str, b: str, result: "Comparison", shown: "list[Difference]") -> None:
    from wtool import console

    if result.identical:
        console.emit(f"identical: {len(result.differences)} tensors, the same in names, shapes, types and values")
        return
    overall = result.overall
    console.emit(f"a  {a}\nb  {b}")
    if result.differences:
        console.emit(
            f"{len(result.differences)} tensors compared, {result.equal} of them equal: relative distance "
            f"{overall.relative:.4g}, cosine {_cosine(overall.cosine)}, largest difference {overall.largest:.4g}"
        )
    else:
        console.emit("no tensor is in both with the same shape")
    distances = {number: sums.relative for number, sums in result.layers.items()}
    if len(distances) > 1:
        near, far = min(distances, key=lambda n: distances[n]), max(distances, key=lambda n: distances[n])
        console.emit(f"layers: from {distances[near]:.4g} (layer {near}) to {distances[far]:.4g} (layer {far})")
    for line in _remarks(result):
        console.emit(line)
    if shown:
        title = "all tensors" if len(shown) == len(result.differences) else f"the {len(shown)} furthest apart"
        columns = ["tensor", "type", "elements", "relative", "cosine", "largest", ""]
        console.table(title, columns, [_cells(difference) for difference in shown])


def _remarks(result: "Comparison") -> list[str]:
    """What cannot be said in a distance."""
    lines: list[str] = []
    for side, names in (("a", result.only_a), ("b", result.only_b)):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            lines.append(f"only in {side}: {', '.join(names[:LISTED])}{more}")
    lines += [f"shapes differ: {name} is {list(a)} in a, {list(b)} in b" for name, a, b in result.shapes[:LISTED]]
    if len(result.shapes) > LISTED:
        lines.append(f"shapes differ in {len(result.shapes) - LISTED} more tensors")
    types: dict[tuple[str, str], int] = {}
    for difference in result.differences:
        if difference.dtypes[0] != difference.dtypes[1]:
            types[difference.dtypes] = types.get(difference.dtypes, 0) + 1
    lines += [f"types differ: {count} tensors are {x} in a, {y} in b" for (x, y), count in types.items()]
    for difference in result.differences:
        if difference.name != difference.other:
            lines.append(f"tied: {difference.name} of a is compared with {difference.other} of b")
    in_a, in_b = result.overall.nonfinite
    if in_a or in_b:
        lines.append(f"not finite: {in_a} elements (NaN or infinity) in a, {in_b} in b; left out of the distances")
    return lines


def _cells(difference: "Difference") -> list[str]:
    sums, (x, y) = difference.sums, difference.dtypes
    notes = ["equal"] if sums.equal else []
    notes += [f"{sums.nonfinite[0]} | {sums.nonfinite[1]} not finite"] if any(sums.nonfinite) else []
    return [
        difference.name,
        x if x == y else f"{x} | {y}",
        f"{prod(difference.shape):,}",
        f"{sums.relative:.4g}",
        _cosine(sums.cosine),
        f"{sums.largest:.4g}",
        ", ".join(notes),
    ]


def _cosine(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.6f}"
