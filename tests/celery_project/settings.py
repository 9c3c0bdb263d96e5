"""What the test passes in CONNGUARD_CELERY_PROJECT (JSON), as Django settings."""

from __future__ import annotations

import json
import os

from tests import services

project = json.loads(os.environ["CONNGUARD_CELERY_PROJECT"])
services.use_driver(services.driver())

SECRET_KEY = "tests"
TIME_ZONE = "UTC"
USE_TZ = True
INSTALLED_APPS = ["django_connguard", *project["apps"]]
DATABASES = project["databases"]
CONNGUARD = project["connguard"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGGING = {"version": 1, "disable_existing_loggers": False}
CACHES = {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}

globals().update({f"CELERY_{name.upper()}": value for name, value in project["celery"].items()})
