"""A list of parts, written as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    words: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, the header first. In HTML a click on a column's header sorts by it."""

    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder; HTML embeds it."""

    what: str
    path: Path


Part = Heading | Text | Table | Picture


def markdown(title: str, parts: Sequence[Part], folder: Path) -> str:
    """The report as Markdown; paths of pictures are relative to `folder`."""
    return "\n\n".join([f"# {title}", *(_markdown(part, folder) for part in parts)]) + "\n"


def _markdown(part: Part, folder: Path) -> str:
    match part:
        case Heading(words):
            return f"## {words}"
        case Text(words):
            return words
        case Picture(what, path):
            return f"![{what}]({path.resolve().relative_to(folder.resolve()).as_posix()})"
        case Table(lines):
            head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in lines]
            rule = ["---"] + ["---:"] * (len(head) - 1)
            return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rows])


def html(title: str, parts: Sequence[Part]) -> str:
    """The report as one HTML file that loads nothing from a network and suits a desktop and a phone."""
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(map(_html, parts)), script=SCRIPT)


def _html(part: Part) -> str:
    match part:
        case Heading(words):
            return f"<h2>{escape(words)}</h2>"
        case Text(words):
            return f"<p>{escape(words)}</p>"
        case Picture(what, path):
            data = base64.b64encode(path.read_bytes()).decode()
            return f'<figure><img alt="{escape(what)}" src="data:image/png;base64,{data}"></figure>'
        case Table([head, *rows]):
            columns = "".join(f'<th scope="col"><button>{escape(cell)}</button></th>' for cell in head)
            body = "\n".join(
                f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
                for first, *rest in rows
            )
            style = ' class="settings"' if len(head) == 2 else ""
            head_row = f"<thead><tr>{columns}</tr></thead>"
            return f"<div class=wide><table{style}>{head_row}\n<tbody>\n{body}\n</tbody></table></div>"
        case _:
            raise TypeError("a table needs a header")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f3f5f7; --ink: #1c2127; --paper: #fff; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4149; --soft: #23282e; --ink: #e4e7ea; --paper: #171a1e; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 3rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
p, .settings td { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p { max-width: 62rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
td, th { padding: .38rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-weight: normal; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tbody th { font-weight: 600; }
thead th { background: var(--soft); vertical-align: bottom; } thead th:first-child { background: var(--soft); }
thead button { all: unset; cursor: pointer; font-weight: 600; white-space: normal; overflow-wrap: normal; }
thead button:focus-visible { outline: 2px solid var(--mark); }
[aria-sort=ascending] button::after { content: " ↑"; color: var(--mark); }
[aria-sort=descending] button::after { content: " ↓"; color: var(--mark); }
.settings td, .settings th { text-align: left; }
.settings td { white-space: normal; min-width: 14rem; }
figure { margin: 1.5rem 0; overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
@media (max-width: 40rem) { body { font-size: 15px; } td, th { padding: .45rem .5rem; } img { min-width: 36rem; } }
"""

SCRIPT = """
const number = text => { const found = text.replaceAll(",", "").match(/-?\\d+(\\.\\d+)?(e[+-]?\\d+)?/i);
  return found ? parseFloat(found[0]) : NaN; };
for (const head of document.querySelectorAll("thead th")) head.firstChild.addEventListener("click", () => {
  const rows = head.closest("table").tBodies[0], column = head.cellIndex;
  const way = head.ariaSort === "ascending" ? -1 : 1;
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = way > 0 ? "ascending" : "descending";
  const all = [...rows.rows], of = row => row.cells[column].textContent;
  const numeric = column && all.some(row => /\\d/.test(of(row)));
  all.sort((a, b) => { if (!numeric) return way * of(a).localeCompare(of(b));
    const [x, y] = [number(of(a)), number(of(b))];  // cells without a number stay at the bottom in both orders
    return isNaN(x) - isNaN(y) || way * (x - y); });
  rows.append(...all);
});
"""
