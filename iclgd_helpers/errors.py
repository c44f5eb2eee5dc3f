"""The one error a reader may cause: bad input."""

from __future__ import annotations


class InputError(ValueError):
    """Something given by the reader cannot be used; the message names it and the way out."""
