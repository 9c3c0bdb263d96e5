"""The Django app."""

import sys

from django.apps import AppConfig


class ConnguardConfig(AppConfig):
    """Registers the system checks, begins to watch connections, and wires the integrations."""

    name = "django_connguard"
    verbose_name = "Connection guard"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # They register themselves.
        from django_connguard import boundary, checks, forking, leaks  # noqa: F401
        from django_connguard.conf import conf
        from django_connguard.connstats import checks as server_checks  # noqa: F401

        # A worker and beat have imported Celery before Django starts; whoever has not, runs none.
        if "celery" in sys.modules and conf.CELERY:
            from django_connguard.integrations import celery

            celery.connect()
