"""The pytest plugin of django-connguard; it does nothing unless it is asked to.

A module of its own, since pytest loads it in every run: importing the package would import Django
and begin to watch its connections.
"""

from __future__ import annotations

import unittest
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from django_connguard.testing.finder import Finder

NAME = "connguard_no_leaks"

# In the stash of the config, during a test that is checked.
_finder: pytest.StashKey[Finder] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --connguard-no-leaks, and the same as a line of the ini file."""
    what = "fail tests that leave connections, transactions or server sessions open"
    group = parser.getgroup("django-connguard")
    group.addoption("--connguard-no-leaks", action="store_true", help=what)
    parser.addini(NAME, what, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{NAME}(check=True): fail the test if it leaves connections, transactions or server "
        "sessions open; False exempts it from --connguard-no-leaks.",
    )


@pytest.fixture
def connguard_no_leaks() -> None:
    """Fail the test if it leaves connections, transactions or server sessions open."""


def _is_asked(item: pytest.Item) -> bool:
    marker = item.get_closest_marker(NAME)
    if marker is not None:
        return bool(marker.args[0] if marker.args else marker.kwargs.get("check", True))
    return (
        NAME in getattr(item, "fixturenames", ())
        or item.config.getoption(NAME)
        or item.config.getini(NAME)
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Begin before any fixture of the test."""
    if not _is_asked(item):
        return (yield)
    from django.apps import apps

    installed = apps.ready and apps.is_installed("django_connguard")
    if installed:
        from django_connguard.testing.finder import Finder

        item.config.stash[_finder] = finder = Finder()
        finder.start()
    result = yield
    if not installed:
        pytest.fail(f"{NAME} needs 'django_connguard' in INSTALLED_APPS.", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Excuse what fixtures of a wider scope open: they go on after the test."""
    result = yield
    if fixturedef.scope != "function":
        finder = request.config.stash.get(_finder, None)
        if finder is not None:
            finder.excuse_present()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Look around the test's body alone, within its fixtures."""
    finder = item.config.stash.get(_finder, None)
    if finder is None:
        return (yield)
    finder.body_begins()
    test_case = getattr(item, "instance", None)
    if isinstance(test_case, unittest.TestCase):
        # The first to be added is the last to run, and Django's own teardown comes after it.
        test_case.addCleanup(finder.body_ends)
        return (yield)
    try:
        return (yield)
    finally:
        finder.body_ends()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Look once more after all fixtures of the test: an error at its teardown tells what is left.

    Neither the failure of the test nor that of another teardown is put out of sight by it.
    """
    failed = True
    try:
        result = yield
        failed = False
    finally:
        left = []
        if (finder := item.config.stash.get(_finder, None)) is not None:
            del item.config.stash[_finder]
            left = finder.finish()
        if left:
            from django_connguard.testing.finder import report

            if failed:
                item.add_report_section("teardown", NAME, report(left))
            else:
                exempt = f"If it is meant to stay: @pytest.mark.{NAME}(False)"
                pytest.fail(f"{report(left)}\n\n{exempt}", pytrace=False)
    return result
