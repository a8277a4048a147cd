"""Property tests draw the same examples in every run; to search further: ``pytest --hypothesis-profile=search``.

``pytest --check-passes``: every pass that promises to keep results is checked by the interpreter, wherever one runs (slow).
"""

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("search", deadline=None, max_examples=3000)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check-passes", action="store_true", help="compare results around every pass, in all tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--check-passes"):
        from wasat import driver

        for function in (driver.optimize, driver.compile):
            function.__kwdefaults__["check"] = True
