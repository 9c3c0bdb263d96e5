"""Settings, switched by the environment.

DATABASE_URL: postgresql://..., mysql://... or sqlite:///...; unset, an embedded PostgreSQL.
SAMPLE_VAR: the folder of the embedded PostgreSQL's data, by default var/ in this project.
SAMPLE_CONN_MAX_AGE: seconds, or none for connections that are kept for ever.
SAMPLE_CONN_HEALTH_CHECKS: true or false.
SAMPLE_BROKER_URL: Celery's broker, redis://... or amqp://...; by default this machine's Redis.
SAMPLE_KAFKA_SERVERS: Kafka's brokers, host:port,host:port; by default this machine's.
SAMPLE_KAFKA_API_VERSION: theirs, as 0.9, where kafka-python cannot find it out (before 0.10).
"""

from __future__ import annotations

import os
from ast import literal_eval
from pathlib import Path
from typing import Any

import dj_database_url

BASE_DIR = Path(__file__).resolve().parent.parent


def from_environment(name: str, default: str) -> Any:
    """Read a number, true, false or none."""
    return literal_eval(os.environ.get(name, default).strip().capitalize())


VAR = Path(os.environ.get("SAMPLE_VAR") or BASE_DIR / "var")

if not os.environ.get("DATABASE_URL"):
    from sample import embedded

    # Exported, so that worker processes use this server and start none of their own.
    os.environ["DATABASE_URL"] = embedded.start(VAR, BASE_DIR / "manage.py")

DATABASES = {
    "default": dj_database_url.parse(
        os.environ["DATABASE_URL"],
        conn_max_age=from_environment("SAMPLE_CONN_MAX_AGE", "0"),
        conn_health_checks=from_environment("SAMPLE_CONN_HEALTH_CHECKS", "false"),
    )
}

if DATABASES["default"]["ENGINE"] == "django.db.backends.mysql":
    try:
        import MySQLdb  # noqa: F401
    except ImportError:
        import pymysql

        pymysql.install_as_MySQLdb()

SECRET_KEY = "not a secret: this project answers no requests"
INSTALLED_APPS = ["django_connguard", "shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"

CELERY_BROKER_URL = os.environ.get("SAMPLE_BROKER_URL", "redis://127.0.0.1:6379/0")
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True
CELERY_BEAT_SCHEDULE_FILENAME = str(VAR / "celerybeat-schedule")
CELERY_BEAT_SCHEDULE = {
    "orders come in": {"task": "shop.tasks.place_order", "schedule": 1.0},
    "due orders are shipped": {"task": "shop.tasks.ship_due_orders", "schedule": 2.0},
}

kafka_version = os.environ.get("SAMPLE_KAFKA_API_VERSION")
# What kafka-python's consumers and producers are made with.
KAFKA = {
    "bootstrap_servers": os.environ.get("SAMPLE_KAFKA_SERVERS", "127.0.0.1:9092").split(","),
    "api_version": tuple(map(int, kafka_version.split("."))) if kafka_version else None,
}
ORDERS_TOPIC = "shop.orders"
DEAD_LETTERS_TOPIC = "shop.orders.dead"

CONNGUARD = {"EXPERIMENT_JOB": "shop.jobs.order_and_ship"}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {
        "django_connguard": {"level": "INFO"},
        "shop": {"level": "INFO"},
        "kafka": {"level": "ERROR"},  # it warns of each old broker and each new topic
    },
}
