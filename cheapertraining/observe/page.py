"""One self-contained HTML page: tabs of figures, tables and texts, light and dark, no network.

page("title", "subtitle", {"Tab": [figure(...), rows(...), text(...)]}) -> str
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from cheapertraining.errors import UserError

__all__ = ["Block", "figure", "page", "paragraph", "preformatted", "rows"]

Block = str
"""HTML of a part of a tab."""


def figure(content: Mapping[str, Any] | None, missing: str) -> Block:
    """A Plotly figure, drawn when its tab is first shown; a sentence where there is nothing to draw."""
    if content is None:
        return paragraph(missing)
    return f'<div class="figure"><script type="application/json">{_inline(content)}</script></div>'


def paragraph(text: str, kind: str = "note") -> Block:
    """A sentence."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def preformatted(text: str) -> Block:
    """Text as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


def rows(head: Sequence[str], body: Sequence[Sequence[str]], texts: bool = False) -> Block:
    """A table: the first column to the left, the others to the right, or to the left too where they are texts."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    kind = ' class="texts"' if texts else ""
    return f'<div class="wide"><table{kind}><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def page(title: str, subtitle: str, tabs: Mapping[str, Sequence[Block]]) -> str:
    """The whole document.

    Raises:
        UserError: Plotly is not installed.
    """
    names = [name for name, blocks in tabs.items() if blocks]
    buttons = "".join(
        f'<button role="tab" id="tab-{i}" aria-controls="panel-{i}" aria-selected="{str(i == 0).lower()}">'
        f"{html.escape(name)}</button>"
        for i, name in enumerate(names)
    )
    panels = "".join(
        f'<section role="tabpanel" id="panel-{i}" aria-labelledby="tab-{i}"{"" if i == 0 else " hidden"}>'
        f"{''.join(tabs[name])}</section>"
        for i, name in enumerate(names)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><div><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></div>"
        '<button id="theme" title="light or dark">◐</button></header>'
        f'<nav role="tablist">{buttons}</nav><main>{panels}</main>'
        f"<script>{_plotly()}</script><script>{_SCRIPT}</script></body></html>\n"
    )


def _inline(content: Any) -> str:
    """JSON that no name in it can end early as a script."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plotly() -> str:
    """Plotly's own bundle, as its package ships it."""
    try:
        return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError("The report is drawn with plotly, which is not installed: pip install plotly.") from error


_STYLE = """
:root { --back: #ffffff; --front: #1c1e21; --soft: #606770; --line: #dfe1e5; --card: #f7f8fa; --mark: #0072b2; }
:root[data-theme=dark] {
  --back: #15171a; --front: #e6e8eb; --soft: #9aa1ab; --line: #33373d; --card: #1d2024; --mark: #56b4e9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--front); font: 15px/1.5 system-ui, sans-serif; }
header { display: flex; justify-content: space-between; align-items: start; padding: 16px 20px 4px; }
h1 { font-size: 21px; margin: 0; overflow-wrap: anywhere; }
header p { margin: 2px 0 0; color: var(--soft); }
button { font: inherit; color: inherit; background: none; border: 0; cursor: pointer; }
#theme { font-size: 20px; padding: 4px 10px; }
nav { display: flex; overflow-x: auto; gap: 2px; padding: 0 12px; border-bottom: 1px solid var(--line);
  position: sticky; top: 0; background: var(--back); z-index: 5; }
nav button { padding: 10px 12px; white-space: nowrap; color: var(--soft); border-bottom: 2px solid transparent; }
nav button[aria-selected=true] { color: var(--front); border-color: var(--mark); }
main { max-width: 1180px; margin: 0 auto; padding: 12px; }
.figure { min-height: 200px; margin-bottom: 14px; background: var(--card); border-radius: 8px; overflow: hidden; }
.note { color: var(--soft); margin: 8px 4px; }
.warning { background: var(--card); border-left: 3px solid #e69f00; padding: 6px 10px; margin: 8px 0; }
.wide { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child, .texts th, .texts td { text-align: left; }
.texts td:first-child { width: 1%; }
.texts td:last-child { white-space: normal; overflow-wrap: anywhere; }
pre { background: var(--card); padding: 12px; border-radius: 8px; overflow-x: auto; font-size: 13px; }
"""

_SCRIPT = """
const root = document.documentElement;
const tabs = [...document.querySelectorAll("[role=tab]")];
const narrow = () => window.innerWidth < 640;
const style = name => getComputedStyle(root).getPropertyValue(name).trim();
function look(own, traces) {
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"),
    automargin: true };
  const legend = { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom", x: 0,
    font: { size: narrow() ? 11 : 12 } };
  const layout = Object.assign({ height: narrow() ? 380 : 430, autosize: true, legend }, own);
  const below = traces > 1 || own.showlegend ? (narrow() ? 44 + 22 * Math.ceil(traces / 2) : 96) : 44;
  layout.margin = Object.assign({ l: narrow() ? 48 : 64, r: 16, t: 48, b: below }, own.margin || {});
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.font = { color: style("--front"), family: "system-ui, sans-serif", size: 13 };
  layout.title = Object.assign({}, own.title, { font: { size: 15 }, x: 0.01, xanchor: "left" });
  layout.hoverdistance = -1;
  layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--mark") };
  layout.hoverlabel = { bgcolor: style("--card"), font: { color: style("--front") } };
  layout.xaxis = Object.assign({}, axis, own.xaxis || {});
  layout.yaxis = Object.assign({}, axis, own.yaxis || {});
  for (const each of [layout.xaxis, layout.yaxis]) {
    if (each.title) each.title = Object.assign({ standoff: 6, font: { size: 12 } }, each.title);
  }
  return layout;
}
function draw(panel, again) {
  for (const box of panel.querySelectorAll(".figure")) {
    if (!box.spec) box.spec = JSON.parse(box.querySelector("script").textContent);
    if (box.drawn && !again) continue;
    const place = box.drawn || box.appendChild(document.createElement("div"));
    box.drawn = place;
    Plotly.react(place, box.spec.data, look(box.spec.layout, box.spec.data.length),
      { responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover" });
  }
}
function show(tab) {
  for (const other of tabs) {
    const panel = document.getElementById(other.getAttribute("aria-controls"));
    other.setAttribute("aria-selected", String(other === tab));
    panel.hidden = other !== tab;
    if (other === tab) draw(panel, false);
  }
}
function theme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  for (const panel of document.querySelectorAll("[role=tabpanel]:not([hidden])")) draw(panel, true);
  for (const box of document.querySelectorAll("[hidden] .figure")) {
    if (box.drawn) { Plotly.purge(box.drawn); box.drawn.remove(); box.drawn = null; }
  }
}
tabs.forEach((tab, i) => {
  tab.onclick = () => show(tab);
  tab.onkeydown = event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { const next = tabs[(i + step + tabs.length) % tabs.length]; next.focus(); show(next); }
  };
});
const wish = matchMedia("(prefers-color-scheme: dark)");
wish.onchange = () => theme(wish.matches);
document.getElementById("theme").onclick = () => theme(root.dataset.theme !== "dark");
theme(wish.matches);
"""
