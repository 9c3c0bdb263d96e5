"""The jobs of the shop: plain functions, to be guarded by whoever runs them."""

from __future__ import annotations

import random

from django.db import connection, transaction

from shop.models import Order, Shipment

CUSTOMERS = ("Ada", "Blaise", "Grace", "Konrad")
BATCH = 10


def place_order() -> None:
    """Do what a customer does: place an order, paid and due at once."""
    Order.objects.create(customer=random.choice(CUSTOMERS), state=Order.State.PAID)


def ship_due_orders() -> int:
    """Ship the orders that have been due the longest, a batch at most; return how many."""
    with transaction.atomic():
        if not connection.features.has_select_for_update:
            # SQLite locks the whole file. A transaction that writes first waits for the others;
            # one that has read already would fail when it comes to write.
            Order.objects.filter(pk=0).update(state=Order.State.SHIPPED)
        # Orders that another worker ships at this moment are skipped, not waited for.
        skip = connection.features.has_select_for_update_skip_locked
        orders = list(Order.objects.due().select_for_update(skip_locked=skip)[:BATCH])
        Shipment.objects.bulk_create([Shipment(order=order) for order in orders])
        shipped = Order.objects.filter(pk__in=[order.pk for order in orders])
        shipped.update(state=Order.State.SHIPPED)
    return len(orders)


def order_and_ship() -> int:
    """Place an order and ship what is due; return how many orders were shipped."""
    place_order()
    return ship_due_orders()
