"""The CONNGUARD setting: its keys, their defaults, and what is wrong with what a user wrote."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.signals import setting_changed


@dataclass(frozen=True, slots=True)
class Key:
    """One key of CONNGUARD: default value, what a value must be, and whether one is that."""

    default: Any
    expects: str
    accepts: Callable[[Any], bool]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_template(value: Any) -> bool:
    try:
        value.format(alias="", host="", pid=0, role="")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    return True


def _is_processes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(role, Mapping)
        and role.keys() <= {"processes", "threads"}
        and all(type(count) is int and count > 0 for count in role.values())
        for role in value.values()
    )


KEYS: Mapping[str, Key] = {
    # True: a job sends Django's request_started and request_finished, so that every receiver runs.
    # False (lean): only what Django's own three hygiene receivers do is done.
    "REQUEST_SIGNALS": Key(True, "True or False", _is_bool),
    # Seconds that cancelling an orphaned query may take; 0 leaves such queries running.
    "CANCEL_TIMEOUT": Key(1.0, "a number of seconds, 0 or more", _is_seconds),
    # True: a thread's connections are closed when it ends, whether it ran jobs or not. False: when
    # Python's cyclic garbage collector finds them.
    "CLOSE_AT_THREAD_END": Key(True, "True or False", _is_bool),
    # True: a daemon thread closes connections past their CONN_MAX_AGE while their thread waits for
    # work. False: they wait for the next job.
    "CLOSE_IDLE": Key(True, "True or False", _is_bool),
    # Seconds that a job, or a thread that runs none, may hold a connection before that is logged.
    "LEAK_THRESHOLD": Key(
        None,
        "a number of seconds above 0, or None",
        lambda value: value is None or (_is_seconds(value) and value > 0),
    ),
    # True: keep the stack of the code that opens each connection, and log it with a leak.
    "OPENER_STACKS": Key(False, "True or False", _is_bool),
    # What the server is told of who opened a connection; None tells nothing.
    "TAG": Key(
        "{role}@{host}/{pid}",
        "a format string with {alias}, {host}, {pid} and {role}, or None",
        lambda value: value is None or _is_template(value),
    ),
    # What the process is for, as in the tag; None: the management command's or program's name.
    "ROLE": Key(None, "a string, or None", lambda value: value is None or isinstance(value, str)),
    # What runs where, by role, for the check of what it may open at the server (W005).
    "PROCESSES": Key(
        {},
        'a dict of roles, each {"processes": 1 or more, "threads": 1 or more (in each process)}',
        _is_processes,
    ),
    # True: in a Celery worker or beat, take over from Celery's Django fixup. False: leave it alone.
    "CELERY": Key(True, "True or False", _is_bool),
    # Dotted path of the job that `connstats --experiment` runs when it is given none.
    "EXPERIMENT_JOB": Key(
        None,
        "the dotted path of a callable, or None",
        lambda value: value is None or (isinstance(value, str) and "." in value),
    ),
}


# What holds whatever the settings say: the leak finder of tests wants OPENER_STACKS. Django's
# override_settings() would not do: a test class may override settings across our end.
forced: dict[str, Any] = {}


class Conf:
    """The effective settings as attributes; a wrong value counts as its default (checks tell)."""

    REQUEST_SIGNALS: bool
    CANCEL_TIMEOUT: float
    CLOSE_AT_THREAD_END: bool
    CLOSE_IDLE: bool
    LEAK_THRESHOLD: float | None
    OPENER_STACKS: bool
    TAG: str | None
    ROLE: str | None
    PROCESSES: Mapping[str, Mapping[str, int]]
    CELERY: bool
    EXPERIMENT_JOB: str | None

    def __getattr__(self, name: str) -> Any:
        # Reached only until the first read: the boundary must not pay for Django's lazy settings.
        if name not in KEYS:
            raise AttributeError(f"CONNGUARD has no key {name!r}")
        self._load()
        return self.__dict__[name]

    def _load(self) -> None:
        given = getattr(settings, "CONNGUARD", {})
        given = given if isinstance(given, Mapping) else {}
        for name, key in KEYS.items():
            value = given.get(name, key.default)
            self.__dict__[name] = value if key.accepts(value) else key.default
        self.__dict__.update(forced)

    def reload(self) -> None:
        """Forget what was read, for settings that change while the process runs (tests)."""
        self.__dict__.clear()


conf = Conf()


def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == "CONNGUARD":
        conf.reload()


setting_changed.connect(_on_setting_changed, dispatch_uid="django_connguard.conf")


def mistakes() -> Iterator[tuple[str, str, str]]:
    """Yield (check id, what is wrong, what to do) for each mistake in the CONNGUARD setting."""
    given = getattr(settings, "CONNGUARD", {})
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        yield "E001", f"CONNGUARD must be a dict, not {kind}.", "Write CONNGUARD = {...}."
        return
    for name, value in given.items():
        if name not in KEYS:
            near = difflib.get_close_matches(str(name).upper(), KEYS, n=1, cutoff=0.0)[0]
            hint = f"The nearest key is {near!r}; the others: {', '.join(sorted(KEYS))}."
            yield "E002", f"CONNGUARD has an unknown key {name!r}.", hint
        elif not KEYS[name].accepts(value):
            problem = f"CONNGUARD[{name!r}] must be {KEYS[name].expects}, not {value!r}."
            yield "E003", problem, f"The default is {KEYS[name].default!r}."
