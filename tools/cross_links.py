"""
A Sphinx extension: links that nobody types, each with a preview.

In the text of every page it links names of claims to the ledger, [B] and [C] to the references, numbers of pages to
notebooks, statements (R5) to the page of results, and the first occurrence of a glossary's term to the glossary. Code,
formulas, headings, captions, reference lists and whatever is a link already are left alone. The preview is the link's
title; where scripts run, `book/_static/book.js` shows it to the mouse and to the keyboard.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from html.entities import html5
from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

from iclgd_helpers.pages.claims import load, worded
from tools.claims_pages import anchor

LONGEST = 200  # characters of a preview
NUMBERS = r"(?:[Pp]age|[Cc]hapter)s?\s+\d\d(?:(?:,\s+|,?\s+(?:and|or|to)\s+)\d\d)*"  # pages 02, 04 and 50 to 72
NUMBER = re.compile(r"(?:[a-zA-Z]{4,}\s+)?(\d\d)")  # one of them, the first with its word
SIGNS = html5 | {"sqrt;": "√"}  # what a formula's command shows
NEVER = (  # no link is made inside these
    nodes.FixedTextElement,  # code, output, formulas set apart, raw HTML
    nodes.Invisible,
    nodes.Titular,
    nodes.caption,
    nodes.citation,
    nodes.citation_reference,
    nodes.footnote_reference,
    nodes.legend,
    nodes.literal,
    nodes.math,
    nodes.reference,
    nodes.term,
    nodes.thead,
    addnodes.desc_signature,
    addnodes.download_reference,
    addnodes.pending_xref,
)


@dataclass(frozen=True)
class Target:
    """
    What a name leads to.

    Parameters
    ----------
    kind : claim, paper, page, statement or term.
    docname, anchor : the page and the place on it; an empty anchor is the page's beginning.
    preview : what is said of it before the link is followed.
    pages : pattern of the pages on which it is linked.
    """

    kind: str
    docname: str
    anchor: str
    preview: str
    pages: str = ""


@dataclass(frozen=True)
class Place:
    """Where a text stands: its page, the anchors of the entry it belongs to, and whether in a table or a folded box."""

    docname: str
    own: frozenset[str]
    aside: bool


# -------------------------------------------------------------------------------------------- what names there are
def short(text: str) -> str:
    """A text on one line, cut where it is too long; formulas without their commands."""
    text = re.sub(r"\\(?:math|text)[a-z]*|[{}$]", "", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda command: SIGNS.get(f"{command[1]};", command[1]), text)
    return textwrap.shorten(text, LONGEST, placeholder=" …")


def claims(env: BuildEnvironment) -> dict[str, Target]:
    """Claims that have a place in the ledger's page."""
    places, found = env.domains["std"].data["anonlabels"], {}
    for entry in load():
        if (name := anchor(entry["id"])) in places:
            docname, place = places[name]
            said = short(f"Claim ({entry['status']}): {worded(entry)}")
            found[entry["id"]] = Target("claim", docname, place, said)
    return found


def papers(env: BuildEnvironment) -> dict[str, Target]:
    """The papers that have a letter in brackets."""
    letters = {key: f"[{letter}]" for letter, key in env.config.cross_links_papers.items()}
    return {
        letters[cited.key]: Target(
            "paper",
            cited.bibliography_key.docname,
            cited.citation_id,
            short(cited.formatted_entry.text.render_as("text")),
        )
        for cited in (env.domains["cite"].data["citations"] if "cite" in env.domains else ())
        if cited.key in letters
    }


def pages(env: BuildEnvironment) -> dict[str, Target]:
    """The notebooks by their numbers."""
    found = {}
    for docname in sorted(env.found_docs):
        if number := re.match(r"\d\d(?=_)", docname.rpartition("/")[2]):
            said = f"{env.titles[docname].astext()}. {summary(env.get_doctree(docname))}"
            found[number[0]] = Target("page", docname, "", short(said))
    return found


def summary(page: nodes.document) -> str:
    """First sentence of a page, after links, its level, and a label in bold."""
    for paragraph in page.findall(nodes.paragraph):
        parts = [part for part in paragraph.children if part.astext().strip()]
        text = "".join(part.astext() for part in parts[isinstance(parts[0], nodes.strong) :])
        if text and not text.startswith("Level:") and not isinstance(parts[0], nodes.reference):
            return re.split(r"(?<=[.?!])\s", text.strip(), maxsplit=1)[0]
    return ""


def statements(env: BuildEnvironment) -> dict[str, Target]:
    """The statements that the reproduction judges, if the book has the page of their verdicts."""
    docname = env.config.cross_links_statements
    if docname not in env.found_docs:
        return {}
    # Slow to import.
    from iclgd_helpers.pages.statements import STATEMENTS
    from iclgd_helpers.pages.verdict_overview import place

    return {
        said.id: Target("statement", docname, place(said.id), short(f"{said.id} ({said.kind}): {said.says}"))
        for said in STATEMENTS
    }


def terms(env: BuildEnvironment) -> dict[str, Target]:
    """The forms of the glossary's terms: singular and plural, at a sentence's beginning too, or those configured."""
    places = env.domains["std"].data["objects"]
    found = {}
    for docname in sorted({place[0] for (kind, _), place in places.items() if kind == "term"}):
        for item in env.get_doctree(docname).findall(nodes.definition_list_item):
            for term in item.findall(nodes.term):
                name, said = term.astext(), short(item.children[-1].astext())
                where = env.config.cross_links_pages.get(name, "")
                target = Target("term", docname, term["ids"][0], said, where)
                for form in env.config.cross_links_forms.get(name, (name, plural(name))):
                    found[form] = found[form[0].upper() + form[1:]] = target
    return found


def plural(name: str) -> str:
    """A noun's plural."""
    if re.search("[^aeiou]y$", name):
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x")) else "s")


@lru_cache(maxsize=1)
def known(env: BuildEnvironment) -> tuple[dict[str, Target], re.Pattern[str]]:
    """All targets by what the text calls them, and the pattern that finds these names: the longest first."""
    names = terms(env) | statements(env) | papers(env) | claims(env)
    return names | pages(env), pattern(names)


def pattern(names: Iterable[str]) -> re.Pattern[str]:
    """What finds names, and numbers of pages as the group `pages`, as whole words, over the ends of lines."""
    literal = [r"\s+".join(map(re.escape, name.split())) for name in sorted(names, key=len, reverse=True)]
    return re.compile(rf"(?<![\w-])(?:{'|'.join([f'(?P<pages>{NUMBERS})', *literal])})(?![\w-]|\.\w)")


# ------------------------------------------------------------------------------------------------ what is made of them
class CrossLinks(SphinxPostTransform):
    """Make the links of a page, or of the one page that holds all."""

    default_priority = 300  # after all references, outputs and citations are there
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """What Sphinx calls."""
        self.targets, self.pattern = known(self.env)
        self.seen: set[tuple[str, str, str]] = set()
        for element in list(self.document.findall(nodes.TextElement)):
            around = list(ancestors(element))
            if isinstance(element, nodes.literal):
                if not any(map(barred, around[1:])):
                    self.link_code(element, self.place(around))
            elif not any(map(barred, around)):
                self.link_text(element, self.place(around))

    def place(self, around: list[nodes.Element]) -> Place:
        """The place of an element, from itself and what it stands in."""
        docnames = [node["docname"] for node in around if isinstance(node, nodes.section) and "docname" in node]
        heads = [
            term for node in around if isinstance(node, nodes.definition_list_item) for term in node.findall(nodes.term)
        ]
        own = frozenset(name for node in [*around, *heads] for name in node["ids"])
        aside = any(isinstance(node, nodes.table) or "dropdown" in node["classes"] for node in around)
        return Place(docnames[0] if docnames else self.env.docname, own, aside)

    def link_code(self, code: nodes.literal, place: Place) -> None:
        """Link code in a line that is a claim's name and nothing else."""
        target = self.targets.get(code.astext())
        if target and target.kind == "claim" and self.wanted(target, place):
            code.parent.replace(code, self.link(target, place, code.deepcopy()))

    def link_text(self, element: nodes.TextElement, place: Place) -> None:
        """Link the names in an element's own text; MyST divides it at the ends of lines."""
        children: list[nodes.Node] = []
        for is_text, group in groupby(element.children, key=lambda child: isinstance(child, nodes.Text)):
            part = list(group)
            children += self.linked("".join(part), place) if is_text else part
        element[:] = children

    def linked(self, text: str, place: Place) -> list[nodes.Node]:
        """A text with its links, in parts."""
        parts, end = [], 0
        for match in self.pattern.finditer(text):
            for start, stop, name in named(match):
                target = self.targets.get(name)
                if target and self.wanted(target, place):
                    parts += [nodes.Text(text[end:start]), self.link(target, place, nodes.Text(text[start:stop]))]
                    end = stop
        return [part for part in [*parts, nodes.Text(text[end:])] if part.astext()]

    def wanted(self, target: Target, place: Place) -> bool:
        """Whether to link here: not to where one is, and a term once a page, in its sentences."""
        if target.docname == place.docname and (not target.anchor or target.anchor in place.own):
            return False
        if target.kind != "term":
            return True
        key = (place.docname, target.docname, target.anchor)
        if place.aside or key in self.seen or not re.match(target.pages, place.docname):
            return False
        self.seen.add(key)
        return True

    def link(self, target: Target, place: Place, child: nodes.Node) -> nodes.reference:
        """A link with its preview."""
        made = make_refnode(self.app.builder, place.docname, target.docname, target.anchor, child, target.preview)
        made["classes"] += ["cross", f"cross-{target.kind}"]
        return made


def ancestors(node: nodes.Element | None) -> Iterator[nodes.Element]:
    """An element and what it stands in, from the inside out."""
    while node is not None:
        yield node
        node = node.parent


def barred(node: nodes.Element) -> bool:
    """Whether nothing is linked inside: see `NEVER`; a notebook's section of references, too."""
    if isinstance(node, nodes.section) and isinstance(node.parent, nodes.section):
        return bool(node.children[0].astext() == "References")
    return isinstance(node, NEVER)


def named(match: re.Match[str]) -> Iterator[tuple[int, int, str]]:
    """Beginning, end and name of what a match of the pattern names: several pages may be named at once."""
    if match["pages"]:
        for page in NUMBER.finditer(match.string, *match.span()):
            yield *page.span(), page[1]
    else:
        yield *match.span(), " ".join(match[0].split())


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_config_value("cross_links_forms", {}, "html")  # term -> the only forms of it that are linked
    app.add_config_value("cross_links_pages", {}, "html")  # term -> pattern of the pages on which it is linked
    app.add_config_value("cross_links_papers", {}, "html")  # letter -> key in the bibliography
    app.add_config_value("cross_links_statements", "", "html")  # page with the verdicts on the statements
    app.add_post_transform(CrossLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
