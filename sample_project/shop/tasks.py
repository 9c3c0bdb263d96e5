"""The shop's jobs as Celery tasks, which connguard guards by itself."""

from __future__ import annotations

from celery import shared_task

from shop import jobs


@shared_task
def place_order() -> None:
    """Place an order, paid and due at once."""
    jobs.place_order()


@shared_task
def ship_due_orders() -> int:
    """Ship what has been due the longest; return how many orders that were."""
    return jobs.ship_due_orders()


@shared_task
def order_and_ship() -> int:
    """Do both; for `connstats --experiment shop.tasks.order_and_ship --pool celery`."""
    return jobs.order_and_ship()
