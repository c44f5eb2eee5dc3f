"""What the tests in a real browser share."""

from collections.abc import Iterator

import pytest

from tools import browser


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """A tab; tests that ask for one are skipped where no browser is installed."""
    if browser.path() is None:
        pytest.skip("no chromium found: install it, or set ICLGD_BROWSER to its path")
    with browser.Page(tmp_path_factory.mktemp("profile")) as page:
        yield page
