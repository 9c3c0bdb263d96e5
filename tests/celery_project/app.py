"""The Celery app, as Celery's documentation has Django projects write it."""

from __future__ import annotations

import os

from celery import Celery
from celery.fixups.django import DjangoWorkerFixup

if os.environ.get("CONNGUARD_STRANGE_FIXUP"):
    # What a coming version of Celery may be like: it does something new.
    install = DjangoWorkerFixup.install

    def install_and_more(self: DjangoWorkerFixup) -> DjangoWorkerFixup:
        return install(self)

    DjangoWorkerFixup.install = install_and_more

app = Celery("tests.celery_project.app")
app.config_from_object("django.conf:settings", namespace="CELERY")
if "CONNGUARD_DB_REUSE_MAX" in os.environ:
    app.conf["CELERY_DB_REUSE_MAX"] = int(os.environ["CONNGUARD_DB_REUSE_MAX"])
app.conf.imports = ["tests.celery_project.tasks"]
