"""A token trace as HTML, and the self-contained page around such fragments."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape

from ultrafuser.display.palette import colour, rgb
from ultrafuser.inspect.trace import TokenTrace, mean_weights, on_one_line, printable

# Nothing outside the page may be loaded: the browser itself enforces it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_CODE_LIKE = re.compile(r"```|^(?:    |\t)\s*\S", re.MULTILINE)  # a fence, or an indented line

TRACE_CSS = """
.uf-trace { --uf-strength: .8; margin: 0 0 1.5rem; }
.uf-trace figcaption { font-weight: 600; margin-bottom: .4rem; }
.uf-trace figcaption small { font-weight: 400; opacity: .7; }
.uf-legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin-bottom: .4rem; }
.uf-legend i, .uf-bar i { display: inline-block; background: rgb(var(--c)); }
.uf-legend i { width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; vertical-align: -.06em; }
.uf-legend b { font-weight: 600; font-variant-numeric: tabular-nums; margin-left: .3em; }
.uf-bar { display: flex; height: 5px; border-radius: 3px; overflow: hidden; margin-bottom: .7rem; }
.uf-prompt { white-space: pre-wrap; overflow-wrap: anywhere; opacity: .8;
  margin: 0 0 .7rem; padding-left: .8rem; border-left: 3px solid rgba(128,128,128,.4); }
.uf-tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; tab-size: 4; }
.uf-code .uf-tokens {
  font: .875rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.uf-t { background: rgba(var(--c), calc(var(--a) * var(--uf-strength))); cursor: default;
  padding: .12em 0; border-radius: 2px; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.uf-n::before { content: "\\21B5"; opacity: .4; }
.uf-t:hover { outline: 1.5px solid currentColor; }
.uf-t:hover::after { content: attr(title); white-space: pre-wrap;
  position: fixed; z-index: 9; left: 50%; bottom: 14px; transform: translateX(-50%);
  width: max-content; max-width: 92vw; padding: .45em .9em; border-radius: 6px;
  background: #1f2328; color: #fff; box-shadow: 0 2px 10px rgba(0,0,0,.35);
  font: 13px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { .uf-trace { --uf-strength: .45; } }
.dark .uf-trace { --uf-strength: .45; }
@media print { .uf-t { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""

PAGE_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f6f8fa; --ink: #1f2328; --muted: #59636e;
  --rule: #d1d9e0; --good: #116b4e; --bad: #a8440a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12151a; --panel: #1b2028; --ink: #e6e9ed; --muted: #9aa5b1;
    --rule: #343c47; --good: #4cc9a0; --bad: #f2935c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
p { max-width: 46rem; margin: 0 0 1rem; }
.lead { font-size: 1.12rem; }
.note, footer { color: var(--muted); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; margin: 1rem 0 0; }
nav a { color: var(--muted); text-decoration-color: var(--rule); text-underline-offset: .25em; }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .8rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom: 1.5px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody th { font-weight: 400; }
tbody tr.strong > * { background: var(--panel); }
tbody tr.strong th { font-weight: 600; }
tbody tr.rule > * { border-top: 1.5px solid var(--ink); }
td small, th small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
.better { color: var(--good); } .worse { color: var(--bad); }
figure.plot { margin: 0 0 1.6rem; }
figure.plot .scroll { margin: 0; }
figure.plot svg { display: block; width: 100%; min-width: 36rem; height: auto; }
figure.plot figcaption { color: var(--muted); font-size: .9rem; max-width: 46rem; margin-top: .3rem; }
.answer { background: var(--panel); border-radius: 8px; padding: 1rem 1.2rem; margin-bottom: 1.2rem; }
.answer .uf-trace { margin: 0; }
dl { margin: 0; } dt { font-weight: 600; } dd { margin: 0 0 .8rem; max-width: 46rem; }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; margin-bottom: .5rem; }
pre { background: var(--panel); border-radius: 8px;
  padding: .9rem 1.1rem; overflow-x: auto; font-size: .85em; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2.5rem;
  align-items: start; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem; }
"""


def trace_html(trace: TokenTrace, *, style: bool = True) -> str:
    """An HTML fragment: a span per token, coloured by the leading specialist, stronger the clearer it leads.

    Each span's tooltip gives the token and every weight; whitespace is kept. `style=False` leaves the style
    sheet out, for a place (such as `page`) that has it already.
    """
    caption = escape(printable(trace.title)) + (
        f" <small>{escape(printable(trace.domain))}</small>" if trace.domain else ""
    )
    rows = zip(trace.tokens, trace.weights, trace.leaders, strict=True)
    spans = "".join(_span(trace.specialists, *row) for row in rows)
    parts = [
        f"<style>{TRACE_CSS}</style>" if style else "",
        f'<figure class="uf-trace{" uf-code" if code_like(trace) else ""}">',
        f"<figcaption>{caption}</figcaption>" if caption else "",
        legend_html(trace),
        f'<p class="uf-prompt">{escape(printable(trace.prompt))}</p>' if trace.prompt else "",
        f'<div class="uf-tokens">{spans}</div>',
        "</figure>",
    ]
    return "\n".join(part for part in parts if part)


def legend_html(trace: TokenTrace) -> str:
    """Colour, name and mean weight of every specialist, and a bar of the mean weights."""
    means = mean_weights([trace]) if trace.tokens else {}
    keys = [
        f'<span><i style="{_colour_variable(k)}"></i>{escape(printable(name))}'
        + (f"<b>{means[name]:.2f}</b></span>" if means else "</span>")
        for k, name in enumerate(trace.specialists)
    ]
    bars = [
        f'<i style="{_colour_variable(k)};width:{100 * weight:.2f}%"></i>' for k, weight in enumerate(means.values())
    ]
    bar = f'\n<div class="uf-bar" aria-hidden="true">{"".join(bars)}</div>' if bars else ""
    return f'<div class="uf-legend">{"".join(keys)}</div>{bar}'


def code_like(trace: TokenTrace) -> bool:
    """Whether the response reads better in a fixed-width font: code data, fenced or indented blocks."""
    return trace.domain == "code" or _CODE_LIKE.search(trace.text) is not None


def page(
    title: str,
    sections: Sequence[tuple[str, str]],
    *,
    lead: str = "",
    footer: str = "",
    style: str = "",
    script: str = "",
) -> str:
    """A self-contained HTML page: nothing loaded from elsewhere, light and dark, readable on a phone.

    sections: pairs of a heading and its content, which is HTML and taken as it is; all else is plain text.
    style: CSS that only this page needs.
    script: JavaScript of this page, run at its end; by its hash the browser runs this text and no other.
    """
    links = "".join(f'<a href="#s{n}">{escape(heading)}</a>' for n, (heading, _) in enumerate(sections) if heading)
    body = "\n".join(
        f'<section id="s{n}">\n' + (f"<h2>{escape(heading)}</h2>\n" if heading else "") + f"{content}\n</section>"
        for n, (heading, content) in enumerate(sections)
    )
    policy = _POLICY
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{PAGE_CSS}{TRACE_CSS}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{f'<p class="lead">{escape(lead)}</p>' if lead else ""}
{f"<nav>{links}</nav>" if len(sections) > 2 else ""}
{body}
{f"<footer>{escape(footer)}</footer>" if footer else ""}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _span(specialists: list[str], token: str, weights: list[float], lead: tuple[int, float]) -> str:
    index, margin = lead
    pairs = zip(specialists, weights, strict=True)
    tip = f"{on_one_line(token)}   " + "  ".join(f"{name} {weight:.3f}" for name, weight in pairs)
    newline = " uf-n" if token and not token.strip() and "\n" in token else ""
    return (
        f'<span class="uf-t{newline}" style="{_colour_variable(index)};--a:{min(1.0, margin):.3f}" '
        f'title="{escape(printable(tip))}">{escape(printable(token))}</span>'
    )


def _colour_variable(index: int) -> str:
    red, green, blue = rgb(colour(index))
    return f"--c:{red},{green},{blue}"
