"""Finds what a test leaves behind; pytest comes to it by a plugin, unittest by a mixin."""

from django_connguard.testing.mixin import NoLeaksMixin

__all__ = ["NoLeaksMixin"]
