"""Docstrings are written as PyTorch's are, and nothing refers to documents outside the repository."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
TEXTS = sorted([*SOURCES, *PAGES, *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "benchmarks").rglob("*.py")])
PREPOSITIONS = {
    "about",
    "after",
    "as",
    "at",
    "before",
    "behind",
    "below",
    "by",
    "for",
    "from",
    "in",
    "into",
    "of",
    "on",
    "to",
    "with",
}
# documents that are not here, and words that this project made up for things that have a name
OUTSIDE = re.compile(r"\bspecs?\.md\b|\bspecs A\d|\bA\d{1,2}\b(?!\d*x)|\bshared/")
HOME_MADE = re.compile(r"\b(players?|stand-ins?|finite guard|dry run|peers' turns|gives? free)\b", re.IGNORECASE)


def entries(docstring: str) -> Iterator[str]:
    """Descriptions of the entries below ``Args:`` and ``Attributes:``."""
    section = ""
    for line in docstring.splitlines():
        if re.fullmatch(r"\s*(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):\s*", line):
            section = line.strip()
            indent = len(line) - len(line.lstrip()) + 4
        elif section in ("Args:", "Attributes:"):
            match = re.match(rf"\s{{{indent}}}\*{{0,2}}(\w+): (.+)", line)
            if match:
                yield match[2]


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_argument_is_described_by_a_preposition(path):
    wrong = [
        entry
        for docstring in docstrings(path)
        for entry in entries(docstring)
        if entry.split()[0].lower().strip(":,") in PREPOSITIONS
    ]
    assert wrong == []


def test_the_rule_finds_a_preposition():
    assert list(entries("Do.\n\nArgs:\n    path: of the file.\n")) == ["of the file."]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_reference_to_documents_outside(path):
    text = path.read_text(encoding="utf-8")
    assert OUTSIDE.findall(text) == []
    assert HOME_MADE.findall(text) == []
