"""
The page of the helpers, from their docstrings.

The sources are read, not imported: the page takes no time to speak of, needs no model library, and shows a docstring as
it is written, in Markdown.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tools.book_pages import ROOT, repository

PACKAGE = "iclgd_helpers"
ROOMS = ("theory", "data", "engine", "measures", "experiments", "pages", "")  # as data flows; last, what all rooms use
COMMANDS = ("__init__", "__main__", "cli", "command_line")  # `iclgd --help` describes them
MADE_OF_FIELDS = {"dataclass", "NamedTuple", "BaseModel"}
SECTION = re.compile(r"^([A-Z]\w+)\n-+$", re.M)  # the head of one in a docstring of NumPy's form
CODE = re.compile(r"(`[^`]+`)")
NEXT, UNSAID = "\n\n", "As in the class above it."

Definition: TypeAlias = ast.FunctionDef | ast.ClassDef
Links = dict[str, str]  # what a docstring may call a name -> anchor of its entry


@dataclass(frozen=True)
class Module:
    """A module: its place in the package (`measures.metrics`), its text, and what is public of it."""

    name: str
    source: str
    tree: ast.Module

    @property
    def public(self) -> list[Definition]:
        """Functions and classes that other modules may use."""
        return public(self.tree.body)


def public(body: list[ast.stmt]) -> list[Definition]:
    """Functions and classes of a body whose names begin with no underscore."""
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_")]


def modules(room: str, root: Path = ROOT) -> list[Module]:
    """A room's modules that have public names, in the order of the alphabet; of `""`, those beside the rooms."""
    found = []
    for path in sorted((root / PACKAGE / room).glob("*.py")):
        if path.stem not in COMMANDS:
            source = path.read_text(encoding="utf-8")
            found.append(Module(".".join(filter(None, [room, path.stem])), source, ast.parse(source)))
    return [module for module in found if module.public]


def api_page(root: Path = ROOT) -> str:
    """The page's Markdown: a section a room, in it one a module, in it an entry a public function or class."""
    rooms = {room: modules(room, root) for room in ROOMS}
    links, of_repository = anchors([module for group in rooms.values() for module in group]), repository()
    lines = []
    for room, group in rooms.items():
        said = ast.get_docstring(ast.parse((root / PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        lines += [f"## `{room}`" if room else "## Beside the rooms", said if room and said else "What every room uses."]
        for module in group:
            blocks = described(ast.get_docstring(module.tree) or "", module, links)
            lines += [f"### `{module.name}`", *blocks, place(module, *of_repository)]
            lines += [block for node in module.public for block in entry(node, module, links)]
    return "\n\n".join(lines) + "\n"


def anchor(module: Module, node: Definition) -> str:
    """Name of an entry's place on the page; only their case tells a class `Plan` from a function `plan`."""
    kind = "class-" if isinstance(node, ast.ClassDef) else ""
    return "api-" + re.sub(r"[^a-z0-9]+", "-", f"{module.name}-{kind}{node.name}".lower())


def anchors(found: list[Module]) -> Links:
    """Anchors by `module.name`, and by the name alone where the package has it once and it is a class."""
    links: Links = {}
    classes: dict[str, list[str]] = {}
    for module in found:
        for node in module.public:
            links[f"{module.name.rpartition('.')[2]}.{node.name}"] = anchor(module, node)
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(anchor(module, node))
    return links | {name: places[0] for name, places in classes.items() if len(places) == 1}


def place(module: Module, url: str, branch: str) -> str:
    """Link to a module's source in the repository."""
    path = f"{PACKAGE}/{module.name.replace('.', '/')}.py"
    return f"Source: [{path}]({url}/blob/{branch}/{path})"


# -------------------------------------------------------------------------------------------------------- one entry
def entry(node: Definition, module: Module, links: Links) -> Iterator[str]:
    """Blocks of Markdown: the place, then the signature over what the docstring says."""
    own = anchor(module, node)
    yield f"({own})="
    yield definition(node, module, {name: to for name, to in links.items() if to != own})


def definition(node: Definition, module: Module, links: Links) -> str:
    """A definition list of one item; of a class with its public methods, which have items of their own in it."""
    blocks = described(ast.get_docstring(node) or "", module, links)
    if isinstance(node, ast.ClassDef):
        blocks += [definition(method, module, links) for method in public(node.body)]
    return f"`{signature(node, module)}`\n: {textwrap.indent(NEXT.join(blocks) or UNSAID, '  ').lstrip()}"


def signature(node: Definition, module: Module) -> str:
    """What stands behind `def`, on one line; of a class, what makes one."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}{arguments(node, module)}"
    kinds, said = named(node.decorator_list), head(node, module)
    if "property" in kinds:
        return node.name + said.removeprefix("()")
    return ("with " if "contextmanager" in kinds else "") + node.name + said


def head(node: ast.FunctionDef, module: Module) -> str:
    """Arguments and what is returned, as written."""
    text = "\n".join(module.source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1])
    text = re.sub(r",\s*\n\s*([)\]])", r"\1", re.sub(r"\s+#.*", "", text))
    text = re.sub(r"([(\[])\s+|\s+(?=[)\]])", r"\1", text)
    text = " ".join(text.split()).removeprefix(f"def {node.name}").removesuffix(":")
    return re.sub(r"^\((?:self|cls)(?:, )?", "(", text)


def arguments(node: ast.ClassDef, module: Module) -> str:
    """The fields of a class that is made of them, or the arguments of `__init__`."""
    if named([*node.decorator_list, *node.bases]) & MADE_OF_FIELDS:
        fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
        shown = ", ".join(one for one in fields if not one.startswith("_"))
        return f"({shown})" if shown else ""
    makers = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
    return head(makers[0], module).partition(" ->")[0] if makers else ""


def named(nodes: list[ast.expr]) -> set[str]:
    """Last names of decorators or bases: `dataclass` of `@dataclasses.dataclass(frozen=True)`."""
    return {re.split(r"[(\[]", ast.unparse(node))[0].rpartition(".")[2] for node in nodes}


# --------------------------------------------------------------------------------------------------- one docstring
def described(docstring: str, module: Module, links: Links) -> list[str]:
    """A docstring as blocks of Markdown: its sections are lists, under their names in bold."""
    first, *rest = SECTION.split(docstring)
    blocks = [marked(first.strip(), module, links)]
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        parts = re.split(r"\n\s*\n", body.strip("\n"))
        blocks += [f"**{name}**", *("\n".join(items(part, module, links)) for part in parts)]
    return [block for block in blocks if block]


def items(part: str, module: Module, links: Links) -> Iterator[str]:
    """A section's entries (`name : text`, or the text indented below the name) as items; other text as it is."""
    for one in re.split(r"\n(?! )", part):
        name, colon, text = one.partition(" : ")
        if not colon or "\n" in name:
            name, _, text = one.partition("\n")
        if text and not re.match(r"\d+\. |- ", one):
            yield f"- `{name.strip('`')}`: {marked(' '.join(text.split()), module, links)}"
        else:
            yield marked(one, module, links)


def marked(text: str, module: Module, links: Links) -> str:
    """
    A text of a docstring as Markdown.

    Names that have an entry become links, formulas become code (so that the page needs no MathJax), and what Markdown
    would take for markup stays as it is.
    """
    parts = CODE.split(re.sub(r"\$([^$\n]*[\\^_{][^$\n]*)\$", r"`\1`", text))
    parts[::2] = [re.sub(r"[*$<]", lambda sign: f"\\{sign[0]}", part) for part in parts[::2]]
    parts[1::2] = [linked(code, module, links) for code in parts[1::2]]
    return "".join(parts)


def linked(code: str, module: Module, links: Links) -> str:
    """Code, as a link if it names an entry; one of its own module by a name that is no mere word, too."""
    name = code.strip("`").removesuffix("()")
    own = f"{module.name.rpartition('.')[2]}.{name}"
    to = links.get(name) or (links.get(own) if "_" in name or code.endswith("()`") else None)
    return f"[{code}](#{to})" if to else code
