"""What schemas of values from outside share: texts, numbers however they are written, and names that are known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from iclgd_helpers.errors import InputError, shortened

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _number(value: Any) -> Any:
    """A number that was written as a text is that number; everything else stays what it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _whole(value: Any) -> Any:
    """The same for whole numbers, however they are written: 10, 10.0, 1e1."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _whole_characters(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    return value


Text = Annotated[str, AfterValidator(_whole_characters)]
SomeText = Annotated[str, Field(min_length=1), AfterValidator(_whole_characters)]
Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]


class Schema(BaseModel):
    """
    What every schema shares: values are typed strictly, unknown names are refused, nothing changes later.

    One thing is not strict: numbers may be texts (YAML 1.1 reads `1e-3` as one), and whole numbers may have a point.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


def one_of(kind: str, name: Any, known: Iterable[str]) -> None:
    """InputError with the nearest known name if `name` is none of them."""
    known = list(known)
    if name not in known:
        said = shortened(repr(name))
        close = difflib.get_close_matches(said.strip("'"), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown {kind} {said}: {hint}known are {', '.join(known)}")
