"""Orders, and the shipments they become."""

from __future__ import annotations

from django.db import models
from django.utils import timezone


class OrderQuerySet(models.QuerySet["Order"]):
    """Orders by what is to be done with them."""

    def due(self) -> OrderQuerySet:
        """Return what is to be shipped by now, the longest due first."""
        paid = self.filter(state=Order.State.PAID, due_at__lte=timezone.now())
        return paid.order_by("due_at", "pk")


class Order(models.Model):
    """What a customer wants, to be shipped when it is paid and its day has come."""

    class State(models.TextChoices):
        PLACED = "placed"
        PAID = "paid"
        SHIPPED = "shipped"

    customer = models.CharField(max_length=100)
    # Kept here, though a shipment would tell as much: shipping an order must change the row that
    # workers lock, or one that read it before could ship it again.
    state = models.CharField(max_length=7, choices=State.choices, default=State.PLACED)
    placed_at = models.DateTimeField(default=timezone.now)
    due_at = models.DateTimeField(default=timezone.now)
    # The event that the order came with, if it came by Kafka, where a message may come twice.
    event = models.UUIDField(null=True, unique=True, editable=False)

    objects = OrderQuerySet.as_manager()

    class Meta:
        indexes = (models.Index(fields=["state", "due_at"], name="shop_order_due"),)

    def __str__(self) -> str:
        return f"order {self.pk} of {self.customer}"


class Shipment(models.Model):
    """A parcel; an order has one at most."""

    order = models.OneToOneField(Order, on_delete=models.PROTECT)
    shipped_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"shipment of {self.order}"
