"""The sample project; loading it loads its Celery app, so that shared tasks find it."""

from sample.celery import app as celery_app

__all__ = ["celery_app"]
