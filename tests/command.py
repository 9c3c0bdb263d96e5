"""A management command as its users run it: a process of its own, on the test database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from django.db import connection

from tests import services

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = """
from tests import services
services.use_driver({driver!r})
SECRET_KEY = "tests"
INSTALLED_APPS = ["django_connguard"]
DATABASES = {databases!r}
CONNGUARD = {connguard!r}
"""


class Run:
    """Calls the command; ``down`` adds an alias that nobody answers, ``changes`` are settings."""

    def __init__(self, folder: Path, command: str = "connstats") -> None:
        self._folder = folder
        self._command = command

    def __call__(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        return _finish(self.start(*arguments, **settings))

    def script(self, code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run Python code of any kind instead."""
        return _finish(self.start_script(code, **settings))

    def start_script(self, code: str, **settings: Any) -> subprocess.Popen[str]:
        return self._start(code, **settings)

    def start(self, *arguments: str, prelude: str = "", **settings: Any) -> subprocess.Popen[str]:
        code = f"{prelude}\nimport runpy; runpy.run_module('django', run_name='__main__')"
        return self._start(code, self._command, *arguments, **settings)

    def _start(
        self,
        code: str,
        *arguments: str,
        down: bool = False,
        connguard: dict[str, Any] | None = None,
        **changes: Any,
    ) -> subprocess.Popen[str]:
        keys = ("ENGINE", "NAME", "HOST", "PORT", "USER", "PASSWORD")
        base = {key: connection.settings_dict[key] for key in keys}
        databases = {"default": {**base, **changes}}
        if down:
            unreachable = {"HOST": "127.0.0.1", "PORT": "1", "PASSWORD": "s3cret"}
            databases["down"] = {**base, **unreachable}
        text = SETTINGS.format(
            driver=services.driver(), databases=databases, connguard=connguard or {}
        )
        (self._folder / "command_settings.py").write_text(text)
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "command_settings",
                "PYTHONPATH": os.pathsep.join([str(self._folder), str(ROOT)]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def _finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a run that ended as a user's mistake."""
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    return line.removeprefix("CommandError: ")
