"""Tells the server who opened a connection: ``application_name``, or MySQL's ``program_name``."""

from __future__ import annotations

import os
import re
import socket
import sys
from functools import cache
from string import Formatter
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.conf import conf


def tag(wrapper: BaseDatabaseWrapper) -> None:
    """Add the tag to what ``wrapper`` connects with from now on, a user's own name excepted."""
    template = conf.TAG
    if template is None or "get_connection_params" in wrapper.__dict__:
        return
    get_connection_params = wrapper.get_connection_params

    def get_connection_params_tagged() -> dict[str, Any]:
        params: dict[str, Any] = get_connection_params()
        name = _name(template, wrapper.alias)
        if wrapper.vendor == "postgresql":
            # libpq takes it if neither a parameter nor PGAPPNAME nor a service file names one.
            if "application_name" not in str(params.get("options")):
                params.setdefault("fallback_application_name", name)
        elif wrapper.vendor == "mysql" and _driver(wrapper) == "pymysql":
            # mysqlclient has no way to say it.
            params.setdefault("program_name", name)
        return params

    wrapper.get_connection_params = get_connection_params_tagged  # type: ignore[method-assign]


# PostgreSQL's NAMEDATALEN - 1, in bytes: it cuts off the rest, which would be the process.
MOST = 63


def _name(template: str, alias: str) -> str:
    host = socket.gethostname()
    for _ in range(2):
        name = template.format(alias=alias, host=host, pid=os.getpid(), role=conf.ROLE or role())
        # What a command line may hold, and a server would refuse.
        name = name.encode("utf-8", "replace").decode().replace("\0", "")
        excess = len(name.encode()) - MOST
        if excess <= 0:
            break
        host = host[:-excess]
    return name


def _driver(wrapper: Any) -> str:
    module: str = wrapper.Database.connect.__module__
    return module.partition(".")[0]


def group_of(application: str) -> str:
    """Return the role in a tag, so that the processes of one role count together."""
    match = _pattern(conf.TAG or "").fullmatch(application)
    return match["role"] if match and "role" in match.groupdict() else application


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern, seen = "", set()
    for text, field, _, _ in Formatter().parse(template):
        pattern += re.escape(text)
        if field:
            pattern += f"(?P={field})" if field in seen else f"(?P<{field}>.*?)"
            seen.add(field)
    return re.compile(pattern)


@cache
def role() -> str:
    """Return what the process runs: a management command's name, else its program's.

    ``manage.py run_jobs`` and ``python -m django run_jobs`` are ``run_jobs``; gunicorn's workers
    are ``gunicorn``.
    """
    program, *arguments = sys.argv or [""]
    name = os.path.basename(program)
    if name == "__main__.py":  # python -m
        name = os.path.basename(os.path.dirname(program))
    if name in ("manage.py", "django-admin", "django") and arguments:
        return arguments[0]
    return name.removesuffix(".py") or "python"
