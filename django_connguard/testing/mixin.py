"""For ``manage.py test``: a mixin whose tests fail if they leave anything open."""

from __future__ import annotations

import sys
import unittest
from typing import TYPE_CHECKING

from django_connguard.testing.finder import Finder, report

if TYPE_CHECKING:
    _Base = unittest.TestCase
else:
    _Base = object


class NoLeaksMixin(_Base):
    """Fails a test that leaves a connection, a transaction or a server session open.

    To be named before SimpleTestCase, TestCase or TransactionTestCase::

        class ShipOrdersTests(NoLeaksMixin, TransactionTestCase): ...

    A test that fails by itself is reported for both.
    """

    def __call__(self, result: unittest.TestResult | None = None) -> None:
        """Run the test, then look: only here has Django torn down what it sets up for a test."""
        if result is None:
            result = self.defaultTestResult()
        finder = Finder()
        finder.start()
        finder.body_begins()
        self.addCleanup(finder.body_ends)  # the first to be added is the last to run
        try:
            super().__call__(result)
        finally:
            left = finder.finish()
        try:
            if left:
                raise self.failureException(report(left))
        except self.failureException:
            result.addFailure(self, sys.exc_info())
