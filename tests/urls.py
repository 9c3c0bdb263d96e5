from asgiref.sync import sync_to_async
from django.http import HttpRequest, HttpResponse
from django.urls import path

from django_connguard import job
from tests.server import backend_id


def backends(request: HttpRequest) -> HttpResponse:
    """Tell the connection before, inside and after a job."""
    numbers = (backend_id(), job(backend_id)(), backend_id())
    return HttpResponse(" ".join(map(str, numbers)))


async def async_backends(request: HttpRequest) -> HttpResponse:
    """Tell the connection before, inside and after an async job."""
    get = sync_to_async(backend_id)

    @job
    async def inside() -> int:
        return await get()

    numbers = (await get(), await inside(), await get())
    return HttpResponse(" ".join(map(str, numbers)))


urlpatterns = [path("backends/", backends), path("async-backends/", async_backends)]
