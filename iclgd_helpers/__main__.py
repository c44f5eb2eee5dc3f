"""`iclgd`, the one command; `python -m iclgd_helpers` is the same."""

from __future__ import annotations

from typing import NoReturn

from iclgd_helpers.signals import start


def main() -> NoReturn:
    """Run the command line; a signal ends it with one line from its first moment on."""
    start("iclgd_helpers.cli")


if __name__ == "__main__":
    main()
