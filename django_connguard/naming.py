"""Dotted names of callables, for logs and reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def dotted_name(func: Callable[..., Any]) -> str:
    """Return ``module.qualname`` of a function, or of what a partial or an instance stands for."""
    inner = inspect.unwrap(func)
    inner = getattr(inner, "func", inner)  # of a functools.partial
    qualname = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{inner.__module__}.{qualname}"
