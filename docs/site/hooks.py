"""Hooks of mkdocs: pages from outside docs/, links to them, and formulas as MathML, which needs no script."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SCRIPT = re.compile(r"\[[^]]+\]\((experiments/[^)]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NUMBER = re.compile(r'<td (style="text-align: right;")>([^<]{1,24})</td>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, at in OUTSIDE.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        for other, page in OUTSIDE.items():
            text = text.replace(f"]({other}", f"]({page}")
        text = SCRIPT.sub(r"`\1`", text)  # scripts have no page on the site
        files.append(File.generated(config, at, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    for name, at in OUTSIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({at}")
    return markdown


def on_page_content(html: str, **_: object) -> str:
    """Turns TeX into MathML, which browsers draw themselves, and keeps short cells of numbers on one line."""
    html = NUMBER.sub(r'<td class="number" \1>\2</td>', html)
    return FORMULA.sub(lambda found: mathml(unescape(found[2]), found[1]), html)


def mathml(formula: str, tag: str) -> str:
    return convert(formula, display="block" if tag == "div" else "inline")
