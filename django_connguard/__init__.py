"""Healthy database connections in Django code that runs outside the request/response cycle."""

from django_connguard.counters import stats
from django_connguard.job import job
from django_connguard.long_jobs import acheckpoint, checkpoint, heartbeat, released
from django_connguard.signals import connection_closed, job_finished, job_started

__all__ = [
    "acheckpoint",
    "checkpoint",
    "connection_closed",
    "heartbeat",
    "job",
    "job_finished",
    "job_started",
    "released",
    "stats",
]
