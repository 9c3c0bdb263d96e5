"""Settings of the benchmarks: persistent connections on the server that tests.services finds."""

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES

# No test database is made: a benchmark reads no table.
DATABASES["default"].update(
    {
        "CONN_MAX_AGE": None,
        "NAME": {"postgresql": "postgres", "mysql": None}.get(
            DATABASES["default"]["ENGINE"].rpartition(".")[2], ":memory:"
        ),
    }
)
