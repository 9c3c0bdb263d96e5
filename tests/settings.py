"""Settings of the test project; tests.services finds the database server."""

from tests import services

SECRET_KEY = "tests"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "django_connguard", "tests"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "tests.urls"

try:
    DATABASES = {"default": services.database()}
except services.ServiceMissing as missing:
    SERVICE_MISSING: "str | None" = str(missing)
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
else:
    SERVICE_MISSING = None
