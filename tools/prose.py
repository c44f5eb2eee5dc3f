"""
Counts long sentences and paragraphs: `python -m tools.prose [--list]`, from the root.

Read are the pages of `book/`, the notebooks' prose, the README and the helpers' docstrings; code, formulas set apart,
tables, directives and lists of references are not. A formula or a link counts as one word. Exit status 1 if more than
2 % of all sentences have more than 40 words.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat

from tools.book_pages import ROOT, notebooks

LONG, TOO_LONG, LONG_PARAGRAPH = 25, 40, 100  # words
MOST = 0.02  # share of sentences that may be too long
GENERATED = {"mutations.md"}  # written by a script
ENDS = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_`$\[]*[A-Z0-9$`])")
ABBREVIATED = re.compile(r"\b(e\.g|i\.e|cf|vs|al|Fig|fig|eq|Eq|No|no|St|approx)\.$")


@dataclass(frozen=True)
class Counted:
    """A place and the lengths, in words, of its paragraphs' sentences."""

    place: str
    paragraphs: list[list[tuple[int, str]]]

    @property
    def sentences(self) -> list[tuple[int, str]]:
        """All sentences: their number of words, and their text."""
        return [sentence for paragraph in self.paragraphs for sentence in paragraph]


def paragraphs(markdown: str) -> Iterator[str]:
    """The paragraphs and items of a Markdown text, each on one line."""
    text = re.sub(r"^(```|:::+|~~~).*?^\1", "\n\n", markdown, flags=re.M | re.S)
    text = re.sub(r"^[:`]{3,}.*$|^:label:.*$|^\(.*\)=$", "\n", text, flags=re.M)
    text = re.sub(r"\$\$.*?\$\$", " X ", text, flags=re.S)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.|:)\s)", text):
        if not re.match(r"\s*(\||#|<|---|\[Open in Colab|%)", block):
            line = " ".join(block.split())
            if line:
                yield re.sub(r"^(?:[-*+]|\d+\.|:)\s+", "", line)


def plain(paragraph: str) -> str:
    """The paragraph with a formula, a role, a link or code as one word each."""
    text = re.sub(r"`[^`]*`", "X", re.sub(r"\$[^$]*\$", "X", paragraph))
    text = re.sub(r"\{[\w:]+\}X", "X", text)
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(paragraph: str) -> list[tuple[int, str]]:
    """Each sentence with its number of words."""
    parts: list[str] = []
    for part in ENDS.split(plain(paragraph)):
        if parts and ABBREVIATED.search(parts[-1]):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return [(len(re.findall(r"[\w'’.-]*\w[\w'’.-]*", part)), part) for part in parts if part.strip()]


def counted(place: str, markdown: str) -> Counted:
    """What a text holds."""
    return Counted(place, [sentences(paragraph) for paragraph in paragraphs(markdown)])


def docstrings(path: Path) -> str:
    """All docstrings of a module, as paragraphs; lists of parameters, exceptions and sources are taken line by line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            text = re.sub(r"^[A-Z]\w+\n-+$", "\n", text, flags=re.M)
            found.append(re.sub(r"^(\w[\w, ]*?)(?: : |\n +)", r"\n\n\1: ", text, flags=re.M))
    return "\n\n".join(found)


def everything() -> Iterator[Counted]:
    """Every text of the project, by its place."""
    for path in [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]:
        if path.name not in GENERATED:
            yield counted(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    for path in notebooks():
        cells = nbformat.read(path, as_version=4).cells
        prose = [c.source for c in cells if c.cell_type == "markdown" and "## References" not in c.source]
        yield counted(str(path.relative_to(ROOT)), "\n\n".join(prose))
    for path in sorted((ROOT / "iclgd_helpers").rglob("*.py")):
        yield counted(str(path.relative_to(ROOT)), docstrings(path))


def main(arguments: list[str]) -> int:
    """Prints a line for each place, and a last one for all."""
    all_of_them = [found for found in everything() if found.sentences]
    print(f"{'':55}{'sentences':>10}{f'> {LONG}':>7}{f'> {TOO_LONG}':>7}{f'paragraphs > {LONG_PARAGRAPH}':>18}")
    totals = [0, 0, 0, 0]
    for found in all_of_them:
        lengths = [n for n, _ in found.sentences]
        long_ones = sum(sum(n for n, _ in p) > LONG_PARAGRAPH for p in found.paragraphs)
        row = [len(lengths), sum(n > LONG for n in lengths), sum(n > TOO_LONG for n in lengths), long_ones]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        if any(row[2:]) or "--all" in arguments:
            print(f"{found.place:55}{row[0]:10}{row[1]:7}{row[2]:7}{row[3]:18}")
        if "--list" in arguments:
            print(*(f"    {n}: {text}" for n, text in found.sentences if n > TOO_LONG), sep="\n")
    print(f"{'all':55}{totals[0]:10}{totals[1]:7}{totals[2]:7}{totals[3]:18}")
    print(f"{totals[2] / totals[0]:.1%} of the sentences have more than {TOO_LONG} words; at most {MOST:.0%} may.")
    return int(totals[2] > MOST * totals[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
