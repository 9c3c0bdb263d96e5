"""Signals for metrics and traces, sent in the thread that does the work.

``job_started``: ``sender`` (the Unit class), ``name`` (str).

``job_finished``: ``sender``, ``name``, ``duration`` (seconds), ``exception`` (what the job raised,
or None), ``closed`` (how many connections the two boundaries closed, by reason; the reasons are
the constants in ``django_connguard.hygiene``) and ``queue_wait`` (seconds in a queue before the
start, or None where that is not known). Nested jobs send neither of the two.

``connection_closed``: ``sender`` (the class of the Django connection), ``alias``, ``reason`` and
``age`` (seconds since it was opened), for what connguard closes; the reaper does that in a thread
of its own, where a receiver should be quick and not use the database. (Django's
``connection_created`` tells of those that are opened.)

A receiver that raises is logged and never reaches the job.
"""

from django.dispatch import Signal

job_started = Signal()
job_finished = Signal()
connection_closed = Signal()
