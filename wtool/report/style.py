"""How a page looks: light and dark by what the reader's system says, from a phone to a wide screen."""

from collections.abc import Mapping, Sequence

# From a small error to a large one; the dark theme has them the other way round, so that large ones stand out in both.
_RAMP = "#fbf5d3 #f8dc84 #f7b444 #f08a2c #dd5f3c #bd3c54 #8f2469 #5d1668 #2f0d4d".split()
_INK = ["#211f1c"] * 5 + ["#ffffff"] * 4  # of the number on each, with a contrast of 4.5 at least
_BOTH = [*enumerate(zip(_RAMP, _INK, strict=True))]
_TURNED = [*enumerate(zip(reversed(_RAMP), reversed(_INK), strict=True))]


def _ramp(colours: Sequence[tuple[int, tuple[str, str]]]) -> dict[str, str]:
    return {key: value for n, (fill, ink) in colours for key, value in ((f"c{n}", fill), (f"i{n}", ink))}


LIGHT = {
    "page": "#fcfbf8",
    "card": "#ffffff",
    "ink": "#211f1c",
    "soft": "#625d56",
    "line": "#e4e0d8",
    "bad": "#c22f2f",
    "onbad": "#ffffff",
    "mark": "#0a6f90",
    **_ramp(_BOTH),
}
DARK = {
    "page": "#141317",
    "card": "#1c1b20",
    "ink": "#ece9e4",
    "soft": "#aaa59d",
    "line": "#34323a",
    "bad": "#ff8a80",
    "onbad": "#141317",
    "mark": "#5fd4ff",
    **_ramp(_TURNED),
}
_FILLS = "".join(
    f".c{n}{{fill:var(--c{n});background:var(--c{n})}}.heatmap .nc{n}{{fill:var(--i{n})}}" for n in range(len(_RAMP))
)

# of the pictures, which also stand alone
PICTURE = f"""
.heatmap text{{font:10px system-ui,sans-serif;fill:var(--soft)}}
.heatmap .block{{text-anchor:end}}
.heatmap .n{{text-anchor:middle;font:8px system-ui,sans-serif}}
.heatmap rect{{stroke:var(--line);stroke-width:.5}}
.curve .line{{fill:none;stroke:var(--mark);stroke-width:2;stroke-linejoin:round}}
.curve .grid{{stroke:var(--line);stroke-width:1;fill:none}}
.mark{{fill:var(--mark);stroke:var(--card);stroke-width:1}}
rect.none{{fill:none}}
rect.bad{{fill:var(--bad)}}
.heatmap .nbad{{fill:var(--onbad)}}
{_FILLS}
"""


def _variables(theme: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in theme.items())


CSS = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
-webkit-text-size-adjust:100%}}
main{{max-width:1120px;margin:0 auto;padding:28px 20px 60px}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}}
h2{{font-size:1.1rem;margin:0 0 10px}}
h3{{font-size:.9rem;margin:14px 0 6px;color:var(--soft);font-weight:600;overflow-wrap:anywhere}}
p{{margin:0 0 12px}}
.soft{{color:var(--soft)}}
.small{{font-size:.86rem}}
section{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px;margin-top:18px;
min-width:0}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}}
.tile{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}}
.tile b{{display:block;font-size:1.35rem;line-height:1.25;font-weight:650}}
.tile span{{display:block;color:var(--soft);font-size:.84rem;line-height:1.35}}
.pair{{display:grid;column-gap:18px;align-items:start}}
details+details{{margin-top:6px}}
.pair>div{{min-width:0}}
@media (min-width:900px){{.pair{{grid-template-columns:minmax(0,5fr) minmax(0,6fr)}}}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}}
th{{text-align:right;color:var(--soft);font-weight:500;vertical-align:bottom}}
th,td{{padding:5px 10px 5px 0;border-bottom:1px solid var(--line)}}
tr:last-child td,tr:last-child th[scope=row]{{border-bottom:0}}
td{{text-align:right;white-space:nowrap}}
th:last-child,td:last-child{{padding-right:0}}
th:first-child,td:first-child,.text td{{text-align:left;white-space:normal;overflow-wrap:anywhere}}
.text th{{text-align:left;white-space:nowrap;vertical-align:top;padding-right:18px}}
td:first-child{{min-width:9em}}
.text td:first-child{{min-width:0}}
code,pre{{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
pre{{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto;
margin:0 0 10px}}
ul{{margin:0;padding-left:1.2em}}
li{{overflow-wrap:anywhere}}
summary{{cursor:pointer}}
{PICTURE}
.heatmap{{display:block;width:100%;height:auto}}
.heatmap g:hover rect{{stroke:var(--ink);stroke-width:1.5}}
.curves{{display:grid;gap:6px 18px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}}
@media (max-width:520px){{main{{padding:20px 12px 40px}}section{{padding:14px;border-radius:8px}}
table{{font-size:.8rem}}th,td{{padding-right:6px}}td:first-child{{min-width:7.5em}}}}
article{{margin-top:34px;border-top:3px solid var(--line);padding-top:18px}}
.compared th:nth-child(2){{text-align:left}}
.compared td:nth-child(2){{white-space:normal;text-align:left;min-width:12em}}
.layers{{display:flex;flex-wrap:wrap;gap:3px;margin:0 0 8px}}
.layers i{{font:11px/20px system-ui,sans-serif;width:24px;text-align:center;
border:1px solid var(--line);border-radius:4px}}
.layers .stays{{background:var(--ink);color:var(--card)}}
.layers .gone{{text-decoration:line-through;color:var(--soft)}}
:focus-visible{{outline:2px solid var(--mark);outline-offset:2px}}
footer{{margin-top:22px;color:var(--soft);font-size:.82rem}}
"""
