"""PostgreSQL's own count of its sessions."""

from __future__ import annotations

from collections.abc import Iterable

from django.db.backends.base.base import BaseDatabaseWrapper

from django_connguard.connstats.probe import (
    ACTIVE,
    HIDDEN,
    IDLE,
    IDLE_IN_TRANSACTION,
    Capacity,
    ServerConnection,
    ServerProbe,
)


class PostgreSQLProbe(ServerProbe):
    """PostgreSQL's own count, from pg_stat_activity (manual, section 27.2.3)."""

    # Of another role's session an unprivileged one sees no backend_type; usesysid then tells
    # clients (and the rare parallel worker) from the server's own processes.
    CLIENTS = """
        FROM pg_stat_activity WHERE pid <> pg_backend_pid()
        AND (backend_type = 'client backend' OR
             (backend_type IS NULL AND usesysid IS NOT NULL AND datid IS NOT NULL))
    """
    HERE = f"{CLIENTS} AND datname = current_database()"
    SESSIONS = f"""
        SELECT pid, application_name, usename, host(client_addr), client_port, state,
               extract(epoch FROM clock_timestamp() - backend_start)::float8,
               extract(epoch FROM clock_timestamp() - state_change)::float8 {HERE} ORDER BY pid
    """  # noqa: S608
    # reserved_connections came with PostgreSQL 16.
    CAPACITY = f"""
        SELECT current_setting('max_connections')::int,
               current_setting('superuser_reserved_connections')::int
               + coalesce(current_setting('reserved_connections', true), '0')::int,
               (SELECT count(*) {CLIENTS})
    """
    UNSEEN = f"""
        SELECT count(*), quote_ident(current_user) {HERE} AND query = '<insufficient privilege>'
    """
    LIMITS = """
        SELECT 'role', rolname, rolconnlimit FROM pg_roles
        WHERE rolname = current_user AND rolconnlimit >= 0 AND NOT rolsuper
        UNION ALL
        SELECT 'database', datname, datconnlimit FROM pg_database
        WHERE datname = current_database() AND datconnlimit >= 0
    """
    STATES = {  # noqa: RUF012
        None: HIDDEN,
        "fastpath function call": ACTIVE,
        "idle in transaction (aborted)": IDLE_IN_TRANSACTION,
    }

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        super().__init__(wrapper)
        self._wrapper.settings_dict["OPTIONS"]["application_name"] = "connstats"

    def connections(self) -> list[ServerConnection]:
        return [
            ServerConnection(
                id=pid,
                application=application or "",
                user=user or "",
                client=self._client(address, port),
                state=self.STATES.get(state, state),
                age=age,
                idle=idle if state and state.startswith(IDLE) else None,
            )
            for pid, application, user, address, port, state, age, idle in self._query(
                self.SESSIONS
            )
        ]

    @staticmethod
    def _client(address: str | None, port: int | None) -> str:
        if address is None:  # port is -1 on a Unix socket, NULL where it is hidden
            return "local socket" if port == -1 else ""
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

    def capacity(self) -> Capacity:
        [(maximum, reserved, in_use)] = self._query(self.CAPACITY)
        return Capacity(maximum, reserved, in_use)

    # Since PostgreSQL 14, outside transactions; 0 switches it off (manual, section 20.11.1).
    IDLE_LIMIT = "idle_session_timeout"

    def idle_limit(self) -> float | None:
        found = self._query(
            "SELECT setting::int FROM pg_settings WHERE name = 'idle_session_timeout'"
        )
        milliseconds = found[0][0] if found else 0
        return milliseconds / 1000 or None

    def end(self, sessions: Iterable[int]) -> None:
        with self._plainly("cannot end sessions of"):
            for session in sessions:
                self._fetch(f"SELECT pg_terminate_backend({session:d})")

    def notes(self) -> list[str]:
        [(unseen, role)] = self._query(self.UNSEEN)
        notes = [
            f"At most {limit} connections are allowed to the {kind} {name!r} (CONNECTION LIMIT)."
            for kind, name, limit in self._query(self.LIMITS)
        ]
        if unseen:
            notes.append(
                f"The role {role} may not see the state of {unseen} of the connections, "
                f"only count them; to see it: GRANT pg_monitor TO {role};"
            )
        return notes
