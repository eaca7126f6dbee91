"""One word, one meaning (docs/glossary.md): the glossary is in order, and words that it replaced are not used."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafamily

DOCS = Path(__file__).parents[1] / "docs"
WRITTEN_BY_COMMANDS = {"architectures.md", "claims.md", "peft-zoo.md", "study.md"}
RETIRED = {
    r"\bparked\b": "inactive values",
    r"\bhung\b": "attached",
    # As a term: the preposition in "the file beside it" is English.
    r"`beside`|\bbeside:|\b(train|trains|trained|training|named|is|are) beside\b": "extra trained parameters",
    r"\b(trainable|trained|million|billion|adapter|adapters') numbers\b": "parameters",
    r"\bnumbers (of|in) (an|the|its|their|all)? ?(adapters?|layers?|model)\b": "parameters",
    r"\bnumbers (that )?trains?\b": "parameters",
}


def public_docstrings() -> Iterator[tuple[str, str]]:
    """Name and docstring of everything that `lorafamily` exports, and of public members of its classes."""
    for name in lorafamily.__all__:
        thing = getattr(lorafamily, name)
        yield name, inspect.getdoc(thing) or ""
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not member.startswith("_"):
                found = getattr(value, "fget", None) or getattr(value, "__func__", value)
                yield f"{name}.{member}", (inspect.getdoc(found) or "") if callable(found) else ""


@pytest.mark.parametrize("pattern", RETIRED)
def test_public_docstrings_use_no_retired_word(pattern):
    found = {name: re.search(pattern, text) for name, text in public_docstrings()}
    used = [f"{name}: {hit[0]!r}" for name, hit in found.items() if hit]
    assert used == [], f"say {RETIRED[pattern]}"


@pytest.mark.parametrize("pattern", RETIRED)
def test_pages_use_no_retired_word(pattern):
    texts = {page.name: page.read_text() for page in DOCS.glob("*.md") if page.name not in WRITTEN_BY_COMMANDS}
    used = [f"{name}: {hit[0]!r}" for name, text in texts.items() for hit in re.finditer(pattern, text)]
    assert used == [], f"say {RETIRED[pattern]}"


def test_the_glossary_has_each_word_once_and_in_order():
    heads = re.findall(r"^\| (\*\*.*?) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    words = [word for head in heads for word in re.findall(r"\*\*(.*?)\*\*", head)]
    first = [re.findall(r"\*\*(.*?)\*\*", head)[0] for head in heads]
    assert len(set(words)) == len(words) > 20
    assert first == sorted(first)
    for code in ("frozen_initial", "also_train", "budget_at", "targets"):
        assert f"`{code}" in (DOCS / "glossary.md").read_text()
