"""The frame of the report: one HTML file with its style inside, light and dark, that loads nothing from anywhere."""

from __future__ import annotations

from html import escape

# The policy makes the browser hold what the file promises: no script, nothing from outside.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d1f21; --soft: #63686e; --rule: #e2e3df;
  --good: 22 150 80; --bad: 216 60 40; --strength: .62;
  --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b0558c; --c4: #a87400; --c5: #3d9bd1; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181a; --card: #1e2124; --ink: #e6e6e3; --soft: #9aa0a6; --rule: #33373b;
    --good: 40 175 100; --bad: 235 85 65; --strength: .6;
    --c0: #4fb0e8; --c1: #f0854a; --c2: #35c997; --c3: #dd92c0; --c4: #e0b34a; --c5: #9bd3f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 6rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; }
p { margin: .25rem 0 1rem; max-width: 46rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .75rem; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 500; }
th { font-weight: 500; color: var(--soft); } td small { display: block; color: var(--soft); white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
figure { margin: 0 0 1.5rem; } figcaption { margin-bottom: .5rem; color: var(--soft); }
.keys { display: inline-flex; flex-wrap: wrap; gap: 0 1rem; margin-left: 1rem; color: var(--ink); }
.key svg { width: 1.5rem; height: .25rem; vertical-align: middle; margin-right: .4rem; }
.plot { position: relative; margin: 0 .75rem 1.75rem 3.25rem; } .tall { height: 16rem; } .low { height: 6rem; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; }
.raw { opacity: .35; stroke-width: 1; } .grid { stroke: var(--rule); vector-effect: non-scaling-stroke; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); stroke-dasharray: 7 4; }
.c2 { stroke: var(--c2); stroke-dasharray: 2 3; } .c3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; }
.c4 { stroke: var(--c4); stroke-dasharray: 14 4; } .c5 { stroke: var(--c5); stroke-dasharray: 1 5; }
.raw { stroke-dasharray: none; }
.key { white-space: nowrap; } .key path { stroke: inherit; stroke-dasharray: inherit; }
.hover rect { fill: transparent; } .hover rect:hover { fill: var(--ink); opacity: .08; }
.y, .x { position: absolute; font-size: .8rem; color: var(--soft); line-height: 1; }
.y { right: 100%; padding-right: .5rem; transform: translateY(-50%); }
.x { top: 100%; padding-top: .5rem; transform: translateX(-50%); }
img { max-width: 100%; background: #fff; }
.pair { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; padding: 1rem 1.25rem;
  margin: 0 0 1rem; }
.prompt { color: var(--soft); margin: 0 0 .75rem; max-width: none; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.75rem; }
.sides > div { min-width: 0; } h3 { margin: 0; font-size: .8rem; font-weight: 500; color: var(--soft); }
.text, .prompt { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text { line-height: 1.9; margin: .1rem 0 .4rem; }
.earned { font-size: .85rem; color: var(--soft); margin: 0; font-variant-numeric: tabular-nums; }
.p { border-radius: .2em; padding: .12em 0; cursor: help; outline-offset: 1px; }
.p.good { background: rgb(var(--good) / calc(var(--s) * var(--strength))); }
.p.bad { background: rgb(var(--bad) / calc(var(--s) * var(--strength)));
  text-decoration: underline dotted 1.5px; text-underline-offset: .25em; }
.p:focus { outline: 2px solid var(--c0); }
.p:focus::after { content: attr(title); white-space: pre-wrap; position: fixed; z-index: 1; left: 0; right: 0;
  bottom: 0; padding: .8rem 1.25rem; background: var(--ink); color: var(--page); font-size: .95rem; line-height: 1.45; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; align-items: center;
  font-size: .9rem; margin-bottom: 1rem; }
.ramp { display: inline-flex; vertical-align: middle; margin: 0 .5rem; border: 1px solid var(--rule); }
.ramp span { width: 1.6rem; height: 1.1rem; border-radius: 0; padding: 0; cursor: default; }
.prompt summary { white-space: pre-wrap; } details.prompt { border: 0; padding: 0; }
details { border-top: 1px solid var(--rule); padding: .75rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; line-height: 1.5; background: var(--card); border: 1px solid var(--rule);
  border-radius: .6rem; padding: 1rem; }
@media (max-width: 42rem) {
  main { padding: 1.5rem 1rem 6rem; } .sides { grid-template-columns: 1fr; gap: 1.1rem; } .pair { padding: .9rem 1rem; }
  th, td { padding: .4rem .4rem; } td small { font-size: .72rem; } .keys { margin-left: 0; display: flex; }
  .plot { margin-left: 2.5rem; } .tall { height: 12rem; } }
@media print { .pair { break-inside: avoid; } * { print-color-adjust: exact; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML page. ``body`` is HTML; ``title`` is text and is escaped here."""
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)
