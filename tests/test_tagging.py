"""The server is told who opened a connection."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
from django.db import connection
from django.test import override_settings

from django_connguard.tagging import group_of
from tests import services
from tests.command import Run
from tests.server import Server, alias

pytestmark = pytest.mark.django_db(transaction=True)
postgresql_only = pytest.mark.skipif(
    services.vendor() != "postgresql", reason="a server that lists application names"
)


def application_of(name: str) -> str:
    from django.db import connections

    with connections[name].cursor() as cursor:
        cursor.execute("SHOW application_name")
        shown: str = cursor.fetchone()[0]
        return shown


@postgresql_only
def test_a_connection_names_its_role_host_and_process() -> None:
    with override_settings(CONNGUARD={"ROLE": "billing"}), alias("tagged") as name:
        expected = f"billing@{socket.gethostname()}/{os.getpid()}"
        assert application_of(name) == expected
        assert group_of(expected) == "billing"


@postgresql_only
@pytest.mark.parametrize(
    "options", [{"application_name": "mine"}, {"options": "-c application_name=mine"}]
)
def test_a_name_of_the_users_own_stays(options: dict[str, Any]) -> None:
    options = {**connection.settings_dict["OPTIONS"], **options}
    with alias("named", OPTIONS=options) as name:
        assert application_of(name) == "mine"
        assert group_of("mine") == "mine"


@postgresql_only
def test_a_name_from_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGAPPNAME", "from the environment")
    with alias("named") as name:
        assert application_of(name) == "from the environment"


@postgresql_only
def test_no_tag_is_sent_when_there_is_none() -> None:
    with override_settings(CONNGUARD={"TAG": None}), alias("untagged") as name:
        assert application_of(name) == ""


@postgresql_only
@pytest.mark.skipif(not services.has_pools(), reason="no pools")
def test_connections_of_a_pool_are_tagged() -> None:
    options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 1}}
    with (
        override_settings(CONNGUARD={"ROLE": "pooled", "TAG": "{role} {alias}"}),
        alias("tagged_pool", OPTIONS=options, CONN_MAX_AGE=0) as name,
    ):
        from django.db import connections

        try:
            assert application_of(name) == "pooled tagged_pool"
        finally:
            connections[name].close()
            connections[name].close_pool()


@postgresql_only
def test_a_forked_child_names_itself(connstats: Run) -> None:
    result = connstats.script(
        "import os, django; django.setup()\n"
        "from django.db import connection\n"
        "def name():\n"
        "    with connection.cursor() as cursor:\n"
        "        cursor.execute('SHOW application_name')\n"
        "        return cursor.fetchone()[0]\n"
        "assert name() == f'parent {os.getpid()}', name()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert name() == f'parent {os.getpid()}', name()\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n",
        connguard={"ROLE": "parent", "TAG": "{role} {pid}"},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(services.driver() != "pymysql", reason="about PyMySQL")
def test_pymysql_sends_the_tag_as_program_name() -> None:
    with override_settings(CONNGUARD={"ROLE": "billing"}), alias("tagged") as name:
        from django.db import connections

        connections[name].ensure_connection()
        attributes = connections[name].connection._connect_attrs
        assert attributes["program_name"] == f"billing@{socket.gethostname()}/{os.getpid()}"


@pytest.mark.parametrize(
    ("arguments", "role"),
    [
        (["manage.py", "run_jobs", "--guarded"], "run_jobs"),
        (["/srv/venv/bin/django-admin", "migrate"], "migrate"),
        (["/lib/django/__main__.py", "shell"], "shell"),
        (["/srv/venv/bin/gunicorn", "shop.wsgi"], "gunicorn"),
        (["/srv/venv/lib/celery/__main__.py", "-A", "shop", "worker"], "celery"),
        (["consume.py"], "consume"),
        ([""], "python"),
        ([], "python"),
    ],
)
def test_the_role_is_what_the_process_runs(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], role: str
) -> None:
    from django_connguard import tagging

    monkeypatch.setattr(sys, "argv", arguments)
    assert tagging.role.__wrapped__() == role


@pytest.mark.parametrize(
    ("template", "application", "group"),
    [
        ("{role}@{host}/{pid}", "celery@a@b/12", "celery"),
        ("{role}@{host}/{pid}", "psql", "psql"),
        ("{host}:{pid}", "web-1:12", "web-1:12"),
        ("{role}{role} ({alias})", "xx (default)", "x"),
        ("{role}.{pid}", "a+b.7", "a+b"),
        (None, "", ""),
    ],
)
def test_processes_of_one_role_are_one_group(
    template: str | None, application: str, group: str
) -> None:
    with override_settings(CONNGUARD={"TAG": template}):
        assert group_of(application) == group


@postgresql_only
def test_connstats_counts_the_processes_of_one_role_together(
    connstats: Run, server: Server
) -> None:
    with (
        override_settings(CONNGUARD={"ROLE": "billing", "TAG": "{role}@{alias}"}),
        alias("one") as one,
        alias("two") as two,
    ):
        application_of(one), application_of(two)
        result = connstats(connguard={"TAG": "{role}@{alias}"})
    [line] = [line for line in result.stdout.splitlines() if "billing" in line]
    assert [word for word in line.split() if word != "│"][:3] == ["billing", "2", "2"]
