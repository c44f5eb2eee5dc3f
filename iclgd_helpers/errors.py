"""The one error a reader may cause, bad input, and the one that a notebook may."""

from __future__ import annotations


class InputError(ValueError):
    """Something given by the reader cannot be used; the message names it and the way out."""


class CellError(RuntimeError):
    """A cell of a notebook failed for another reason than bad input."""


def shortened(text: str, longest: int = 200) -> str:
    """`text` on one line, its middle left out where it is longer than a message should be."""
    line = " ".join(text.split())
    half = longest // 2 - 2
    return line if len(line) <= longest else f"{line[:half]} … {line[-half:]}"


def reason(error: BaseException) -> str:
    """The message of another library's error on one short line; its kind where it has none."""
    return shortened(str(error)) or type(error).__name__
