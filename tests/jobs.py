"""Jobs for connstats to run."""

from __future__ import annotations

import os

from asgiref.sync import sync_to_async
from django.db import connection

from django_connguard import job


def select() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


decorated = job(select)


async def async_select() -> None:
    await sync_to_async(select)()


def fail_and_print() -> None:
    print("a job may print")  # noqa: T201
    select()
    raise ValueError("on purpose")


def end_the_process() -> None:
    os._exit(3)


def needs_arguments(order: int) -> None:
    """Nothing."""
