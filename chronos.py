#!/usr/bin/env python3
"""Chronos: a cron service in one file. It fires HTTP webhooks on time and keeps their history.

    python chronos.py                     start the service (with chronos.yaml, if one is beside it)
    python chronos.py check-config        say what is wrong in chronos.yaml
    python chronos.py --help              every command and option

The file is read from top to bottom; each section leans only on those above it (the page, which
stands last, is the one exception).

    Ground             1 Constants and words   2 Errors   3 Time
    What people write  4 Schedules   5 Checks   6 Jobs   7 Settings
    Decisions          8 Policies
    Database           9 Schema and migrations   10 Connections   11 Store
    Running            12 Logs and metrics   13 Requests   14 The wire   15 Work   16 Engine
    Edge               17 API   18 Service   19 Commands
    Page               20 Dashboard

The database is the queue: there is no schedule in memory, so a restart has nothing to rebuild.
The life of an execution:

              fire time due            a worker is free          outcome
     (job) ───────────────▶ pending ─────────────────▶ running ───────────▶ success | failed
                  │            ▲                          │
                  ▼            └──────────────────────────┘
               skipped          retry: pending again, due later, attempts kept

To add …

    a field of a job        its table in section 6; Webhook in 13 if it is sent; GROUPS in the page
    a reason                Reason and ENDINGS in section 1; LETTERS, KINDS, SHAPES in the page
    a column of executions  Execution in section 6; SCHEMA, SCHEMA_VERSION, MIGRATIONS in 9
    a setting               its dataclass in section 7, and chronos.yaml
    a route                 ROUTES in section 17

The threads:

    thread      started by    what it does, and what it may touch
    main        the shell     waits for signals, reads the configuration again
    signs       main          tells systemd that the service lives
    log         main          writes to stderr, which may block
    engine      Engine        is the only writer of the database; makes one turn after another
    worker-N    WorkerPool    makes one HTTP request at a time; never touches the database
    watchdog    Dispatcher    cuts attempts off at their limit, closes idle connections
    dns-HOST    Resolver      looks up one name; it may hang, so nobody waits for it without limit
    http        HttpServer    waitress: accepts connections
    waitress-N  waitress      answers one API call at a time; reads the database, submits changes
    sign-in_0   Passwords     hashes the passwords of those who sign in, one after another
"""

from __future__ import annotations

import struct
import sys

if sys.platform not in ("linux", "darwin"):  # Others lack some of the modules below.
    sys.exit(f"chronos: it runs on Linux and macOS, not on {sys.platform}")

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import getpass
import hashlib
import hmac
import html
import importlib.resources
import io
import ipaddress
import json
import logging
import math
import operator
import os
import platform
import queue
import re
import resource
import select
import signal
import socket
import sqlite3
import ssl
import stat
import threading
import time
import uuid
import zlib
import zoneinfo
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from itertools import chain, islice, pairwise, product, zip_longest
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, get_type_hints
from urllib.parse import SplitResult, quote, unquote, urlsplit
from zoneinfo import ZoneInfo, available_timezones

# Where they were closed, Python has None for them, and bottle 0.12 can't be imported.
_streams = (sys.stdout, sys.stderr)
sys.stdout = sys.stdout or io.StringIO()
sys.stderr = sys.stderr or io.StringIO()
try:
    import bottle  # type: ignore[import-untyped]
    import requests
    import requests.certs
    import waitress  # type: ignore[import-untyped]
    import waitress.parser  # type: ignore[import-untyped]
    import waitress.task  # type: ignore[import-untyped]
    import yaml  # type: ignore[import-untyped]
    from croniter import croniter  # type: ignore[import-untyped]
    from waitress import wasyncore
except ImportError as error:
    package = repr(error.name or str(error))
    sys.exit(f"chronos: the package {package} is missing: pip install -r requirements.txt")
finally:
    sys.stdout, sys.stderr = _streams

# ======================================================================================
# 1. Constants and words: what is fixed, with its unit, and the words that programs read
# ======================================================================================

__version__ = "0.2.0"

log = logging.getLogger("chronos")

Json = dict[str, Any]
Result = TypeVar("Result")

# Instants and durations are integers in microseconds, unless a name says otherwise.
SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 3600 * SECOND
DAY = 86_400 * SECOND

# --- The clock ---

RELEASED_AT = 1_795_996_800 * SECOND  # 2026-11-30: a clock that shows less is wrong
CLOCK_STEP = SECOND  # A change of the wall clock by more than this counts as a step.
CLOCK_FAR_BACK = 3 * HOUR  # After a step back by more than this every cursor is computed anew.
CLOCK_SETTLED = 2 * MINUTE  # A clock that has stood for so long (two heartbeats) is trusted.
TAKE_BACK_ROWS = 500  # Executions that are looked at together after the clock went back.
STANDSTILL = SECOND  # A watchdog that was away for longer says that the whole process was.
LOOK_AGAIN = MINUTE  # A job that can't fire, as its configuration is unusable, is tried so often.

# --- A turn of the engine ---

MAX_FIRES_PER_TURN = 256  # Fire times beyond so many are left to the next turn.
TURN_TARGET = 50_000  # A turn that has taken so long (50 ms) leaves the rest to the next one.
HEARTBEAT = MINUTE  # An idle engine writes last_seen this often.
MAX_CATCH_UP = 100  # Missed fire times of a job that execute_all makes up for.
MAX_ACTIVE = 1000  # Executions of a job that may be pending or running at once.
RULES_TARGET = 10_000  # A turn applies new rules of time zones to cursors for so long (10 ms),
RULES_BATCHES = 25  # and to so many batches
RULES_JOBS = 20  # of so many jobs.
PRUNE_ROWS = 250  # Executions that one turn removes: more than the 100 failed ones it spares.
PRUNE_BYTES = 1 << 22  # And no more bytes of them, but for the last one: each is overwritten.
PRUNE_VERSIONS = 4  # Versions that one turn removes: one may have 1 MB, which is overwritten.
VERSION_IN_ROWS = PRUNE_ROWS // PRUNE_VERSIONS + 1  # What removing one is worth in executions.
PRUNE_TARGET = TURN_TARGET // 2  # Time for what goes by number and age, and the same for size.
PRUNE_JOBS = 20  # Jobs whose history one turn looks at.
VERSIONS_PAGE = 1000  # Versions that one turn of the daily walk looks at.
PRUNE_INTERVAL = 100_000  # Pause between two looks (100 ms) while there is other work.
PRUNE_LOOK = 1000  # Executions of a job that one look for what is large passes over.
EXECUTION_BYTES = 400  # What one takes in the database, less its attempt_log and response.

# --- Patience ---

WRITE_PATIENCE_S = 10.0  # An API thread waits this long for the engine to begin its change.
WATCHDOG_TICK_S = 0.1  # The watchdog looks at the limits of attempts this often.
SWITCH_INTERVAL_S = 0.0005  # A thread has to let another one run after this; Python's is 5 ms.
SIGN_OF_LIFE_S = 10  # systemd is told this often that the service lives.
SILENCE_LIMIT = 30 * SECOND  # A thread whose loop has not come round for so long hangs.
IDLE_CONNECTION = 30 * SECOND  # A connection that nobody has used for so long is closed.
TCP_KEEPALIVE_S = 60  # TCP asks a peer that has been quiet for so long whether it is still there.
KEEP_ALIVE_RACE = SECOND // 10  # A server that had closed it shows that within so long (100 ms).
FREE_THREADS = 4  # Of the API: whoever waits for something leaves so many to all other calls.
READ_LIMIT = 5 * SECOND  # What is read for an API call takes no longer, or each piece of it.
LOOKUP_PATIENCE_S = 0.4  # A look-up waits this long for one of MAX_LOOKUPS to end.
LOG_PATIENCE_S = 2.0  # The exit waits this long for somebody to read the end of the log.
MAX_LOOKUPS = 16  # Name look-ups at once; one that hangs keeps its place among them.
DIAL_INTERVAL = SECOND // 4  # After this a host's next address is dialled as well (RFC 8305, 5).
MAX_DIALLED = 8  # Addresses of a host that are dialled at the same time.
MAX_PROBLEMS = 4  # Addresses of which a sentence says why there is no connection.

# --- Sizes ---

MAX_NESTING = 32  # Levels of lists and objects, in a body as in a configuration.
MAX_BODY_BYTES = 1 << 20  # Of a request to the API.
PAGE_BYTES = 1 << 18  # Rows of a list that are in memory at once, but for one that is larger.
PAGE_ROWS = 100  # And no more than so many of them.
VERSION_CACHE_BYTES = 1 << 25  # Versions of jobs that are kept ready to run, together.
VERSION_BYTES = 1 << 13  # What each of them takes at least.
MAX_HEAD_BYTES = 1 << 18  # One line of an answer, and all that are not its body together.
MAX_LOG_WAITING = 1 << 20  # Characters of the log that may wait for somebody to read them.
LOG_CHUNK = 1 << 16  # Characters of the log that are written at once.
QUICK_CHECK_BYTES = 100_000_000  # A larger database is checked only after an unclean stop.

# --- Names ---

MASK = "********"  # What is shown in the place of a secret.
DECLARED_BY = "chronos.yaml"  # Who manages a job that the configuration declares.
DECLARED_IDS = uuid.UUID("ab032aef-5f06-4566-acdc-8c7694c9303c")  # Namespace of their ids.
KEYED_IDS = uuid.UUID("57e1352e-94ea-4cd5-91a5-43b3a3b60d33")  # Of those by Idempotency-Key.
ALERTS_ID = str(uuid.UUID(int=0))  # The built-in job, whose executions are the alerts.
ALERT_GATHER = 10 * SECOND  # What turns bad or well meanwhile goes into one alert.
ALERT_PAUSE = MINUTE  # Until one that could not be made is tried again.
ALERT_LINES = 10  # Jobs that the text of an alert names.

EXIT_FAILED = 1
EXIT_RUNNING = 75  # EX_TEMPFAIL of sysexits.h
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h


class Status(StrEnum):
    """Where an execution is in its life; the drawing is at the head of the file."""

    PENDING = "pending"  # It waits: for its due_at, for a worker, or for older executions.
    RUNNING = "running"  # An attempt is on its way.
    SUCCESS = "success"  # The last attempt was answered as the job wants.
    FAILED = "failed"  # It ended otherwise; the reason says why.
    SKIPPED = "skipped"  # It was never started; the reason says why.


class Trigger(StrEnum):
    """What made an execution."""

    SCHEDULE = "schedule"  # Its fire time came, in time.
    CATCH_UP = "catch_up"  # Its fire time was missed and is made up for.
    MANUAL = "manual"  # Somebody triggered it.
    REPLAY = "replay"  # Somebody asked for an earlier execution again.
    ALERT = "alert"  # Jobs have turned bad or well.


class Reason(StrEnum):
    """Why an execution ended without success, in a word for programs."""

    OVERLAP = "overlap"  # skipped: an older execution had not ended, and the policy is forbid.
    MISSED = "missed"  # skipped: its fire time passed while nobody was there to run it.
    CANCELLED = "cancelled"  # Somebody ended it.
    REPLACED = "replaced"  # A newer one took its place, as the policy says.
    TIMEOUT = "timeout"  # The time allowed for it was used up.
    BLOCKED = "blocked"  # The settings close the address of its target.
    NO_ANSWER = "no_answer"  # No whole answer came: refused, reset, no such name, TLS …
    HTTP_STATUS = "http_status"  # The answer's status is not among the success codes.
    INTERRUPTED = "interrupted"  # The server ended during its last attempt: outcome unknown.
    INVALID = "invalid"  # The stored configuration can't be used: no such zone, damaged …
    DELETED = "deleted"  # Its job went during the attempt; no execution is left to show it.


class CutReason(StrEnum):
    """Why an attempt on its way is cut off."""

    TIMEOUT = "timeout"  # The execution's time ends with it.
    ATTEMPT_TIMEOUT = "attempt_timeout"  # Only this attempt's time is over.
    CANCELLED = "cancelled"  # Somebody ended its execution.
    REPLACED = "replaced"  # A newer execution takes the place of its own.
    DELETED = "deleted"  # Its job is gone.
    SHUTDOWN = "shutdown"  # The grace of a stop is over; the next start takes it up.


class Ending(NamedTuple):
    """What the end of an execution means for its job."""

    letter: str  # A job keeps those of its last 30; they are counted for each hour.
    is_verdict: bool  # It says whether the job is well; else the job stays as it was.


# How executions end, by the word that /metrics and the counts have for it.
ENDINGS = {
    "success": Ending("S", is_verdict=True),
    "failed": Ending("F", is_verdict=True),
    "cancelled": Ending("C", is_verdict=False),
    "replaced": Ending("R", is_verdict=False),
    "overlap": Ending("K", is_verdict=False),
    "missed": Ending("M", is_verdict=True),
}

# These have no ending of their own: they are "failed".
FAILED_REASONS = frozenset(
    {
        Reason.TIMEOUT,
        Reason.BLOCKED,
        Reason.NO_ANSWER,
        Reason.HTTP_STATUS,
        Reason.INTERRUPTED,
        Reason.INVALID,
    }
)

# An end for one of these reasons is a warning in the log: somebody should look.
ALARMING_REASONS = FAILED_REASONS | {Reason.MISSED}

# Whoever adds a reason says here or there what it means: else it would count as a failure.
assert set(Reason) - FAILED_REASONS - {Reason.DELETED} <= ENDINGS.keys()

# ======================================================================================
# 2. Errors: each is a status, a stable code and a sentence for people
# ======================================================================================
#
#     ChronosError                  can be told to the person who asked
#     ├── StartError                the start is refused; it has an exit status
#     └── ApiError                  a request fails
#         ├── InvalidJson           400 INVALID_JSON
#         ├── ValidationError       400 VALIDATION_ERROR
#         │   └── InvalidFields     names every wrong field; INVALID_TIMEOUT if it is timeout alone
#         ├── Unauthorized          401 UNAUTHORIZED
#         ├── Forbidden             403 FORBIDDEN
#         ├── NotFound              404 NOT_FOUND
#         ├── MethodNotAllowed      405 METHOD_NOT_ALLOWED
#         ├── Conflict              409 CONFLICT
#         │   ├── DeclaredElsewhere the job is declared in chronos.yaml
#         │   └── UnusableConfig    the stored configuration of a job is damaged, its zone is gone …
#         ├── PreconditionFailed    412 PRECONDITION_FAILED
#         ├── PayloadTooLarge       413 PAYLOAD_TOO_LARGE
#         ├── TooManyRequests       429 TOO_MANY_REQUESTS
#         ├── StoreError            500 STORE_ERROR
#         │   └── PartlyDeclared    some of the declared jobs are not yet as they are declared
#         ├── ExecutionError        500 EXECUTION_ERROR
#         ├── InternalError         500 INTERNAL_ERROR
#         └── Unavailable           503 UNAVAILABLE


class ChronosError(Exception):
    """Something that can be told to the person who asked."""


class StartError(ChronosError):
    """The start is refused; ``exit_status`` is one of the EXIT constants."""

    def __init__(self, exit_status: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class ApiError(ChronosError):
    """A request fails. ``details``: {"field": …, "message": …} for each wrong field, or None."""

    status = 500
    code = "INTERNAL_ERROR"
    details: list[Json] | None = None


class InvalidJson(ApiError):
    """The body is not JSON."""

    status = 400
    code = "INVALID_JSON"


class ValidationError(ApiError):
    """The request is understood, but something in it is not allowed."""

    status = 400
    code = "VALIDATION_ERROR"


class InvalidFields(ValidationError, ValueError):
    """What is wrong with the fields of an object, all at once."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        """``problems`` are pairs: the field's path such as webhook.url, and what is wrong."""
        sentences = [f"{path} {message}".strip() for path, message in problems]
        super().__init__("; ".join(sentences))
        self.problems = problems
        self.details = [{"field": path, "message": message} for path, message in problems]
        if [path for path, _message in problems] == ["timeout"]:
            self.code = "INVALID_TIMEOUT"


class Unauthorized(ApiError):
    """User name and password are missing or wrong."""

    status = 401
    code = "UNAUTHORIZED"


class Forbidden(ApiError):
    """It is clear who asks, and that they may not."""

    status = 403
    code = "FORBIDDEN"


class NotFound(ApiError):
    """There is no job, execution, version or path of this name."""

    status = 404
    code = "NOT_FOUND"


class MethodNotAllowed(ApiError):
    """The path is there, but not with this method."""

    status = 405
    code = "METHOD_NOT_ALLOWED"


class Conflict(ApiError):
    """The job or execution is in a state that does not allow it."""

    status = 409
    code = "CONFLICT"


class DeclaredElsewhere(Conflict):
    """The API must not change a job that the configuration file declares."""

    def __init__(self) -> None:
        super().__init__(f"the job is declared in {DECLARED_BY}: change it there")


class UnusableConfig(Conflict):
    """What is stored of a job's configuration can't be used.

    Its time zone has left this machine, a newer croniter refuses its schedule, it is damaged.
    """


class PreconditionFailed(ApiError):
    """The job is not at the version that the caller has named."""

    status = 412
    code = "PRECONDITION_FAILED"


class PayloadTooLarge(ApiError):
    """The body has more than MAX_BODY_BYTES."""

    status = 413
    code = "PAYLOAD_TOO_LARGE"


class TooManyRequests(ApiError):
    """Too many attempts to sign in have failed."""

    status = 429
    code = "TOO_MANY_REQUESTS"


class StoreError(ApiError):
    """The database could not be read or written."""

    status = 500
    code = "STORE_ERROR"


class PartlyDeclared(StoreError):
    """The database has failed amid the declared jobs; the next reload takes up the rest."""


class ExecutionError(ApiError):
    """A triggered execution got no answer at all from its target."""

    status = 500
    code = "EXECUTION_ERROR"


class InternalError(ApiError):
    """A bug: the log has more."""

    status = 500
    code = "INTERNAL_ERROR"


class Unavailable(ApiError):
    """The server is stopping, or it does not work as it should."""

    status = 503
    code = "UNAVAILABLE"


# ======================================================================================
# 3. Time: instants and durations are integers in µs; only Clock looks at the time
# ======================================================================================
#
# An instant counts from the epoch (1970), in UTC. As text an instant has the form of RFC 3339,
# a duration that of Go (time.ParseDuration). Datetimes appear only where the calendar matters.
# What is here keeps nothing, so any thread may call it.

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d"
    r"T(?!24)\d\d:\d\d:\d\d"  # Newer releases of Python take hour 24 as the next day.
    r"(\.\d{1,9})?"
    r"(Z|[+-]\d\d:\d\d)",
    re.ASCII | re.IGNORECASE,
)

_DURATION_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")
_MAX_DURATION_CHARS = 50

# How many microseconds each unit of a duration has.
_UNITS = {
    "ns": 0.001,
    "us": 1,
    "µs": 1,
    "ms": 1000,
    "s": SECOND,
    "m": MINUTE,
    "h": HOUR,
}


class Clock:
    """The only place that looks at the time; tests hand in another one."""

    def now(self) -> int:
        """Return the wall-clock time as an instant. It may step, in both directions."""
        return time.time_ns() // 1000

    def monotonic(self) -> int:
        """Return the µs since some fixed instant. They never go back; waits count in them."""
        return time.monotonic_ns() // 1000


def to_datetime(at: int) -> datetime:
    """Return the instant as an aware datetime in UTC. Raises OverflowError after the year 9999."""
    return EPOCH + timedelta(microseconds=at)


def to_instant(moment: datetime) -> int:
    """Return an aware datetime, of whatever zone, as an instant: µs since the epoch."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def format_time(at: int | None) -> str | None:
    """Return the instant as RFC 3339 in UTC: ``2026-11-23T09:00:00.25Z``; None stays None.

    There are no more decimals than the instant needs, at most six.
    """
    if at is None:
        return None
    text = to_datetime(at).replace(tzinfo=None).isoformat()
    if "." in text:
        text = text.rstrip("0")
    return text + "Z"


def parse_time(text: str) -> int:
    """Return the instant of an RFC 3339 date-time; it must name its offset from UTC.

    What is finer than a microsecond is cut off. Raises ValueError for anything else.
    """
    # The pattern lets impossible dates through, and those that UTC moves out of the calendar.
    with contextlib.suppress(ValueError, OverflowError):
        if _RFC_3339.fullmatch(text):
            moment = datetime.fromisoformat(text.upper())
            return to_instant(moment.astimezone(UTC))
    problem = 'must be a time such as "2027-01-31T09:00:00Z" (RFC 3339)'
    if _RFC_3339.fullmatch(text.replace(" ", "+")):
        problem += ", and in a URL its + is written %2B"
    raise ValueError(problem)


def parse_duration(value: object) -> int:
    """Return the µs of a duration in the form of Go: ``500ms``, ``1h30m``; a bare ``0``, too.

    Of any other number the unit must be named, and there are no signs. Raises ValueError,
    also for a value that is not text.
    """
    if value == "0":
        return 0
    parts: list[tuple[str, str]] = []
    if isinstance(value, str) and len(value) <= _MAX_DURATION_CHARS:
        parts = _DURATION_PART.findall(value)
    # findall passes over what does not match, so the parts must make up the whole text.
    understood = "".join(number + unit for number, unit in parts)
    if not parts or understood != value:
        raise ValueError('must be a duration such as "500ms", "30s" or "1h30m"')
    return round(sum(float(number) * _UNITS[unit] for number, unit in parts))


def format_duration(us: int) -> str:
    """Return the shortest form in the manner of Go: ``500ms``, ``1.5s``, ``1m30s``, ``5m``, ``1h``.

    ``parse_duration`` returns the same number of µs for it. Nothing at all is ``0s``.
    """
    if us == 0:
        return "0s"
    if 0 < us < 1000:
        return f"{us}us"
    if 0 < us < SECOND:
        return f"{us / 1000:g}ms"
    hours = us // HOUR
    minutes = us % HOUR // MINUTE
    seconds = us % MINUTE / SECOND
    text = ""
    if hours:
        text += f"{hours}h"
    if minutes:
        text += f"{minutes}m"
    if seconds:
        decimals = f"{seconds:.6f}".rstrip("0").rstrip(".")
        text += f"{decimals}s"
    return text


def nanoseconds(us: int) -> int:
    """Return a duration in nanoseconds, the unit of ``duration`` in the API."""
    return us * 1000


# ======================================================================================
# 4. Schedules: when a job fires; no clock, no files, no network
# ======================================================================================
#
# A schedule is a pure function from one instant to the next. It never changes, so threads
# may share it. croniter never sees a time zone, a day or an expression as it was typed,
# because its releases disagree about them. A strict gate turns each field into its plain
# list of numbers; croniter finds the next time of day in them; days and the zone are ours.
#
# The rules at changes of the clock are those of Vixie cron, as Debian has it. A schedule is
# *repeating* if its second, minute or hour begins with "*", else *fixed-time*. Where the
# clock goes forward, a fixed-time one with times in the gap runs once, right after it.
# Where it goes back, it runs in the first pass only, a repeating one in both.

SHORTEST_INTERVAL = SECOND  # Of @every.
LONGEST_INTERVAL = 3650 * DAY  # Of @every: 10 years.
WALK_LIMIT = 500  # A backlog that seems longer is counted by days, not walked through.

_ONE_SECOND = timedelta(seconds=1)
_ONE_DAY = timedelta(days=1)

CRON_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}

# How many days each month has at most, January first.
_LONGEST_MONTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

# --- The strict gate: one field becomes its list of numbers ---

# An item of a field: *, a, a-b, and any of them with a step, where a and b may be names.
_ITEM = re.compile(
    r"(?:(?P<star>\*)|(?P<first>[0-9]+|[A-Za-z]+)(?:-(?P<last>[0-9]+|[A-Za-z]+))?)"
    r"(?:/(?P<step>[0-9]+))?"
)


class CronField(NamedTuple):
    """One of the six fields of a cron expression: what may stand in it."""

    name: str
    lowest: int
    highest: int
    words: tuple[str, ...] = ()  # What the numbers from the lowest on are called.

    def number(self, word: str) -> int:
        """Return the number that a word of this field means. Raises ValueError quoting it."""
        if word.lower() in self.words:
            return self.lowest + self.words.index(word.lower())
        if word.isdigit() and self.lowest <= int(word) <= self.highest:
            return int(word)
        allowed = f"{self.lowest}-{self.highest}"
        if self.words:
            allowed += " " + " ".join(self.words)
        raise ValueError(f"{self.name}: {word!r} is not one of {allowed}")

    def item_numbers(self, item: str) -> range:
        """Return the numbers of one item, such as ``8-18/2``. Raises ValueError quoting it."""
        match = _ITEM.fullmatch(item)
        if not match:
            raise ValueError(f"{self.name}: {item!r} is not *, a, a-b, */n, a/n or a-b/n")
        low = self.lowest
        if match["first"]:
            low = self.number(match["first"])
        if match["last"]:
            high = self.number(match["last"])
        elif match["star"] or match["step"]:
            # As in cron, a/n goes on from a to the end of the field.
            high = self.highest
        else:
            high = low
        step = int(match["step"] or 1)
        if high < low or step == 0:
            raise ValueError(f"{self.name}: {item!r} runs backwards, or its step is 0")
        return range(low, high + 1, step)

    def numbers(self, text: str) -> list[int]:
        """Return the numbers that the field names, sorted, each once. Raises ValueError."""
        found: set[int] = set()
        for item in text.split(","):
            found.update(self.item_numbers(item))
        if self.name == "day-of-week":
            # Sunday may be written as 7, so that 5-7 is no range that runs backwards.
            found = {number % 7 for number in found}
        return sorted(found)


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")

_SECOND_FIELD = CronField("second", 0, 59)
_MINUTE_FIELD = CronField("minute", 0, 59)
_HOUR_FIELD = CronField("hour", 0, 23)
_DAY_FIELD = CronField("day-of-month", 1, 31)
_MONTH_FIELD = CronField("month", 1, 12, _MONTHS)
_WEEKDAY_FIELD = CronField("day-of-week", 0, 7, _WEEKDAYS)

# --- Wall-clock times: what a zone's clocks show, as naive datetimes ---


# None of these names leads out of the directories of time zones.
_ZONE_NAME = re.compile("[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")


def zone_file(name: str) -> bytes:
    """Return the file of a time zone (RFC 9636), from where ZoneInfo takes it; empty: none."""
    if not _ZONE_NAME.fullmatch(name):
        return b""
    for directory in zoneinfo.TZPATH:
        with contextlib.suppress(OSError):
            return Path(directory, name).read_bytes()
    with contextlib.suppress(OSError, ImportError):
        file = importlib.resources.files("tzdata").joinpath("zoneinfo", name)
        return file.read_bytes()
    return b""


class _WholeFile(io.BytesIO):
    """A file that may not end early: ZoneInfo would look for the end of its last line for ever."""

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes. Raises ValueError if there are fewer."""
        data = super().read(size)
        if size is not None and len(data) < size:
            raise ValueError("its end is missing")
        return data


class _ZoneHeader(NamedTuple):
    """What a block of a time zone's file begins with; the names are those of RFC 9636, 3.1."""

    magic: bytes
    version: bytes
    isutcnt: int
    isstdcnt: int
    leapcnt: int
    timecnt: int
    typecnt: int
    charcnt: int


_ZONE_HEADER = struct.Struct(">4sc15x6I")
_ZONE_TYPE = struct.Struct(">ibb")  # A type of local time: utoff (in seconds), isdst and desigidx.


def _check_zone_file(data: bytes) -> None:
    """Raise an error where the changes or types of a zone are none that RFC 9636, 3.2 allows.

    ZoneInfo takes them. A type that is not there, or whose isdst is -1, can end the process (a
    segmentation fault in CPython), and offsets of years or changes out of order can make a walk
    along fire times endless.
    """
    header = _ZoneHeader(*_ZONE_HEADER.unpack_from(data))
    begin = _ZONE_HEADER.size
    code_of_times = "i"
    if header.version != b"\0":  # The same follows once more, with times of 64 bits.
        begin += 5 * header.timecnt + 6 * header.typecnt + header.charcnt
        begin += 8 * header.leapcnt + header.isstdcnt + header.isutcnt
        header = _ZoneHeader(*_ZONE_HEADER.unpack_from(data, begin))
        begin += _ZONE_HEADER.size
        code_of_times = "q"
    times_format = struct.Struct(f">{header.timecnt}{code_of_times}")
    times = times_format.unpack_from(data, begin)
    if any(later <= earlier for earlier, later in pairwise(times)):
        raise ValueError("its changes are out of order")
    begin += times_format.size
    if max(data[begin : begin + header.timecnt], default=0) >= header.typecnt:
        raise ValueError("a change has no type")
    begin += header.timecnt
    types = data[begin : begin + header.typecnt * _ZONE_TYPE.size]
    for utoff, isdst, desigidx in _ZONE_TYPE.iter_unpack(types):
        if not -25 * 3600 < utoff < 26 * 3600:
            raise ValueError("an offset is out of range")
        if isdst not in (0, 1) or not 0 <= desigidx < header.charcnt:
            raise ValueError("a type is none")


class NoSuchZone(ValueError):
    """This machine has no time zone of that name."""


@functools.lru_cache(maxsize=1024)  # ZoneInfo keeps eight of them.
def time_zone(name: str) -> ZoneInfo:
    """Return the rules of a time zone.

    Raises ValueError that names it if it can't be used: NoSuchZone if it is not there.
    """
    data = zone_file(name)
    if not data:
        # A zone can go: newer releases of Debian have the old names in a package of their own.
        hint = "Debian has old names in tzdata-legacy"
        raise NoSuchZone(f"the time zone {name} is not on this machine ({hint})")
    try:
        _check_zone_file(data)
        return ZoneInfo.from_file(_WholeFile(data), key=name)
    except Exception as error:  # It raises this or that, wherever it meets what is wrong.
        raise ValueError(f"the file of the time zone {name} is damaged: {error!r}") from error


def _local_time(at: int, zone: ZoneInfo) -> datetime:
    """Return the instant as an aware datetime in this zone."""
    return to_datetime(at).astimezone(zone)


def _wall_time(at: int, zone: ZoneInfo) -> datetime:
    """Return what a clock on the wall shows at this instant: a naive datetime."""
    return _local_time(at, zone).replace(tzinfo=None)


def _instants_of(wall: datetime, zone: ZoneInfo) -> tuple[int, int]:
    """Return the two instants that a wall-clock time can mean: with fold 0 and 1 (PEP 495).

    They are equal where it comes once. The first is earlier where it comes twice, because
    the clock goes back. The first is later where the clock jumps over it: it never comes.
    """
    first_at = to_instant(wall.replace(tzinfo=zone, fold=0))
    second_at = to_instant(wall.replace(tzinfo=zone, fold=1))
    return first_at, second_at


def _change_between(before: int, after: int, zone: ZoneInfo) -> int:
    """Return when the clock changes: the first instant in (before, after] with the new offset.

    The new offset from UTC is that of ``after``; there is one change between the two.
    """
    new_offset = _local_time(after, zone).utcoffset()

    def has_changed(at: int) -> bool:
        return _local_time(at, zone).utcoffset() == new_offset

    instants = range(before, after + SECOND, SECOND)
    return instants[bisect_left(instants, True, key=has_changed)]


# --- The kinds of schedules ---


class Backlog(NamedTuple):
    """The fire times of a stretch of time: how many there are, and the newest, in order."""

    total: int
    newest: list[int]


class Schedule(ABC):
    """When a job fires. It never changes, so threads may share it.

    ``zone`` is the name of a time zone: methods raise ValueError where it is not on this machine.
    Fire times after the year 9999 cannot be told: they raise OverflowError or ValueError there.
    """

    warnings: tuple[str, ...] = ()  # What people who write such a schedule often do not mean.

    @abstractmethod
    def next_after(self, after: int, zone: str) -> int | None:
        """Return the first fire time later than ``after``; None: there is none any more."""

    @abstractmethod
    def backlog(self, first: int, last: int, zone: str, most: int) -> Backlog:
        """Return the number of fire times in [first, last], and the newest ``most`` of them.

        ``first`` is a fire time; ``most`` is 1 to 101. Where there are many, the count leaves
        changes of the clock out.
        """

    def fire_times(self, after: int, zone: str, last: float = math.inf) -> Iterator[int]:
        """Yield the fire times later than ``after``, in order, up to and including ``last``."""
        at = self.next_after(after, zone)
        while at is not None and at <= last:
            yield at
            at = self.next_after(at, zone)

    def clock_note(self, at: int, zone: str) -> str | None:
        """Return what a change of the clock does to this fire time; None: nothing."""
        return None


class AtSchedule(Schedule):
    """``@at <time>``: once, at the instant ``at``."""

    def __init__(self, at: int) -> None:
        self.at = at

    def next_after(self, after: int, zone: str) -> int | None:
        """Return the instant, or None once it is over."""
        if self.at > after:
            return self.at
        return None

    def backlog(self, first: int, last: int, zone: str, most: int) -> Backlog:
        """Return the only fire time there is: ``first``."""
        return Backlog(1, [first])


class EverySchedule(Schedule):
    """``@every <duration>``: each ``interval`` (µs) of elapsed time, whatever clocks show."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def next_after(self, after: int, zone: str) -> int:
        """Return the instant one interval later, so the spacing counts from ``after``."""
        return after + self.interval

    def backlog(self, first: int, last: int, zone: str, most: int) -> Backlog:
        """Return the number of fire times in [first, last], and the newest ``most`` of them."""
        count = (last - first) // self.interval + 1
        passed_over = max(0, count - most)
        oldest = first + passed_over * self.interval
        return Backlog(count, list(range(oldest, last + 1, self.interval)))


class CronSchedule(Schedule):
    """A cron expression of five fields, or six with seconds first.

    ``repeating`` decides what a change of the clock does to it (see the head of this section).
    ``both_must_match``: a day must be named by day-of-month and by day-of-week, because one of
    them begins with "*"; where neither does, either is enough (Vixie cron).

    attribute          written by              guarded by
    _croniter          whichever thread asks   _lock   (it keeps state while it answers)
    all others         nobody after __init__   nothing (seconds … weekdays: sorted numbers)
    """

    def __init__(self, fields: list[str]) -> None:
        """``fields`` are six texts, seconds first. Raises ValueError naming field and item."""
        second, minute, hour, day, month, weekday = fields
        self.seconds = _SECOND_FIELD.numbers(second)
        self.minutes = _MINUTE_FIELD.numbers(minute)
        self.hours = _HOUR_FIELD.numbers(hour)
        self.days = _DAY_FIELD.numbers(day)
        self.months = _MONTH_FIELD.numbers(month)
        self.weekdays = _WEEKDAY_FIELD.numbers(weekday)
        self.repeating = any(text.startswith("*") for text in (second, minute, hour))
        self.both_must_match = day.startswith("*") or weekday.startswith("*")
        if self.both_must_match and not self._has_a_day():
            raise ValueError("never fires: its months do not have such a day")
        self.warnings = tuple(self._warnings())
        self._first_time = clock_time(self.hours[0], self.minutes[0], self.seconds[0])
        self._croniter = self._time_finder()
        self._lock = threading.Lock()

    def _has_a_day(self) -> bool:
        """Return whether one of the months is long enough for one of the days."""
        return any(self.days[0] <= _LONGEST_MONTHS[month - 1] for month in self.months)

    def _warnings(self) -> Iterator[str]:
        """Yield what its author may not have meant, each as a sentence."""
        if len(self.seconds) == 60:
            yield "it fires every second of its minutes"
        if not self.both_must_match:
            yield "day-of-month and day-of-week are both set: either matches"

    def _time_finder(self) -> croniter:
        """Return a croniter that knows the times of day; for it, every day matches."""
        seconds = ",".join(map(str, self.seconds))
        minutes = ",".join(map(str, self.minutes))
        hours = ",".join(map(str, self.hours))
        expression = f"{minutes} {hours} * * * {seconds}"  # croniter has seconds last.
        return croniter(expression, EPOCH.replace(tzinfo=None), ret_type=datetime)

    # --- One fire time ---

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a thousand jobs compute it once
    def next_after(self, after: int, zone: str) -> int:
        """Return the first fire time later than ``after``. There is always one.

        It walks from one matching wall-clock time to the next, and takes the first whose
        instant is later. Raises OverflowError or ValueError after the year 9999.
        """
        info = time_zone(zone)
        after = after // SECOND * SECOND  # Fire times are whole seconds.
        wall = self._begin_of_walk(after, info)
        while True:
            wall = self.next_wall_time(wall)
            first_at, second_at = _instants_of(wall, info)
            if first_at > second_at:
                # The clock jumps over this time: a fixed-time one runs at once after the jump.
                change_at = _change_between(second_at, first_at, info)
                if not self.repeating and change_at > after:
                    return change_at
                # The walk goes on there. A second less, for there may be a fire time itself.
                wall = _wall_time(change_at, info) - _ONE_SECOND
            elif first_at > after:
                return first_at
            elif self.repeating and second_at > after:
                return second_at

    def _begin_of_walk(self, after: int, zone: ZoneInfo) -> datetime:
        """Return the wall-clock time from which ``next_after`` walks: mostly that of ``after``.

        The exception is a repeating schedule in the first pass of an hour that comes twice.
        When that pass has no fire time left, it begins at the change, to walk the hour again.
        """
        wall = _wall_time(after, zone)
        first_at, second_at = _instants_of(wall, zone)
        in_first_pass = after == first_at < second_at
        if not self.repeating or not in_first_pass:
            return wall
        change_at = _change_between(first_at, second_at, zone)
        next_at, _next_again_at = _instants_of(self.next_wall_time(wall), zone)
        if next_at < change_at:
            return wall
        return _wall_time(change_at, zone) - _ONE_SECOND

    def next_wall_time(self, wall: datetime) -> datetime:
        """Return the first matching wall-clock time later than ``wall``; both are naive."""
        with self._lock:
            self._croniter.set_current(wall)
            found: datetime = self._croniter.get_next(datetime)
        while not self._matches_day(found):
            # Nothing on this day: the next to look at is the first time of the day after.
            found = datetime.combine(found, self._first_time) + _ONE_DAY
        return found

    def _matches_day(self, day: date) -> bool:
        """Return whether the schedule fires on this day, by months, days and weekdays."""
        if day.month not in self.months:
            return False
        in_days = day.day in self.days
        in_weekdays = day.isoweekday() % 7 in self.weekdays  # Sunday is 7 there, 0 here.
        if self.both_must_match:
            return in_days and in_weekdays
        return in_days or in_weekdays

    def clock_note(self, at: int, zone: str) -> str | None:
        """Return what a change of the clock does to this fire time; None: nothing."""
        info = time_zone(zone)
        wall = _wall_time(at, info)
        first_at, second_at = _instants_of(wall, info)
        if self.next_wall_time(wall - _ONE_SECOND) != wall:
            # The expression does not name this time, so it makes up for one in a gap.
            return "the clock goes forward: a time that does not exist runs now"
        if first_at == second_at:
            return None
        if self.repeating:
            return "the clock goes back: this hour comes twice, both run"
        return "the clock goes back: this hour comes twice, only the first runs"

    # --- Many fire times ---

    def backlog(self, first: int, last: int, zone: str, most: int) -> Backlog:
        """Return the number of fire times in [first, last], and the newest ``most`` of them.

        ``first`` is a fire time; ``most`` is 1 to 101. The newest are always exact. The count
        is exact up to about WALK_LIMIT; beyond it leaves changes of the clock out.
        """
        # A year of seconds has 31 million fire times: to walk through them would hold the
        # engine up for minutes. Counting days and a search take as long for any number.
        estimate = self._count_by_days(first, last, zone)
        if estimate > WALK_LIMIT:
            newest = self._search_newest(first, last, zone, most)
            if newest is not None:
                return Backlog(estimate, newest)
        found = [first]
        found.extend(self.fire_times(first, zone, last))
        return Backlog(len(found), found[-most:])

    def _count_by_days(self, first: int, last: int, zone: str) -> int:
        """Return how many matching wall-clock times lie in [first, last].

        This is the number of fire times if the clock does not change in between.
        """
        info = time_zone(zone)
        begin = _wall_time(first, info)
        end = _wall_time(last, info)
        times_of_day = list(product(self.hours, self.minutes, self.seconds))
        last_day = end.date()
        day = begin.date()
        matching_days = 0
        while day < last_day:
            if self._matches_day(day):
                matching_days += 1
            day += _ONE_DAY
        # So far every day but the last one is counted, and as a whole.
        count = matching_days * len(times_of_day)
        # Of the last day only what comes up to ``last`` belongs to it.
        if self._matches_day(end):
            last_time = (end.hour, end.minute, end.second)
            count += bisect_right(times_of_day, last_time)
        # Of the first day what came before ``first`` does not.
        first_time = (begin.hour, begin.minute, begin.second)
        count -= bisect_left(times_of_day, first_time)
        return count

    def _search_newest(self, first: int, last: int, zone: str, most: int) -> list[int] | None:
        """Return the newest ``most`` fire times in (first, last]; None: there are fewer.

        The later an instant, the fewer fire times are left after it. So bisection finds the
        last second after which ``most`` are left: these are the newest.
        """

        def left_after(at: int) -> list[int]:
            return list(islice(self.fire_times(at, zone, last), most))

        def is_too_late(at: int) -> bool:
            return len(left_after(at)) < most

        seconds = range(first, last, SECOND)
        first_too_late = bisect_left(seconds, True, key=is_too_late)
        if first_too_late == 0:
            return None
        return left_after(seconds[first_too_late - 1])


# --- Expressions as people write them ---


@functools.lru_cache(maxsize=4096)  # A thousand jobs share few expressions.
def parse_schedule(text: str) -> Schedule:
    """Return what the expression means: cron, an alias, ``@every …`` or ``@at …``.

    Raises ValueError with a message for its author, which quotes what is wrong.
    """
    words = re.split(r"[ \t]+", text.strip(" \t"))
    keyword = words[0]
    if text.isascii():
        # Elsewhere lower() could make ASCII of what is not: the Kelvin sign becomes a "k".
        keyword = keyword.lower()
    if keyword in ("@every", "@at") and len(words) == 2:
        try:
            return _parse_at_or_every(keyword, words[1])
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    if keyword in CRON_ALIASES and len(words) == 1:
        words = CRON_ALIASES[keyword].split()
    if len(words) == 5:
        words.insert(0, "0")
    if len(words) != 6:
        known = " ".join([*CRON_ALIASES, "@every <duration>", "@at <time>"])
        raise ValueError(f"{text!r} is neither 5 fields, nor 6 with seconds first, nor of {known}")
    return CronSchedule(words)


def _parse_at_or_every(keyword: str, word: str) -> Schedule:
    """Return the schedule of ``@at`` or ``@every`` with this time or duration.

    Raises ValueError with a sentence that goes on after the expression and a colon.
    """
    if keyword == "@at":
        return AtSchedule(parse_time(word))
    interval = parse_duration(word)
    if not SHORTEST_INTERVAL <= interval <= LONGEST_INTERVAL:
        raise ValueError("the shortest interval is 1s, the longest 10 years")
    return EverySchedule(interval)


def preview(schedule: Schedule, after: int, zone: str, count: int) -> Iterator[Json]:
    """Yield the next ``count`` fire times later than ``after``; fewer where there are no more.

    Each has ``utc`` and ``local`` (RFC 3339), and a ``note`` at a change of the clock, else None.
    """
    # Fire times end where the calendar of datetime does, in the year 9999.
    with contextlib.suppress(OverflowError, ValueError):
        for at in islice(schedule.fire_times(after, zone), count):
            local = _local_time(at, time_zone(zone))
            yield {
                "utc": format_time(at),
                "local": local.isoformat(),
                "note": schedule.clock_note(at, zone),
            }


# ======================================================================================
# 5. Checks: an object is a table of fields, and every wrong field is reported at once
# ======================================================================================
#
# A check takes a value as it came from JSON or YAML, and returns it in its normal form, or
# raises ValueError with a sentence that goes on after the field's name ("timeout must be …").
# Most are named after what they let through: ``a_boolean`` is a check, and ``a_text(200)``
# makes one. No check here looks at the clock, the database or a file that somebody wrote.

Check = Callable[[Any], Any]
REQUIRED: Any = object()  # Stands in the place of a default: the field must be there.

MAX_UNKNOWN_NAMES = 20  # So many unknown fields of an object are reported.


class Field(NamedTuple):
    """A field: its check, and what it is where it is left out or null."""

    check: Check
    default: Any = REQUIRED  # In its normal form, for nobody checks it.


def validate(table: Mapping[str, Field], data: Any, ignored: frozenset[str] = frozenset()) -> Json:
    """Return ``data`` with the fields of ``table`` only, in normal form, defaults filled in.

    Names in ``ignored`` may be there, and are left out. Raises InvalidFields with everything
    that is wrong inside the object, and a plain ValueError if it is none.
    """
    if not isinstance(data, dict):
        raise ValueError("must be an object")
    clean: Json = {}
    problems = _unknown_names(table, data, ignored)
    for name, wanted in table.items():
        try:
            clean[name] = _checked(wanted, data.get(name))
        except InvalidFields as inner:
            problems += [(f"{name}.{path}", message) for path, message in inner.problems]
        except ValueError as error:
            problems.append((name, str(error)))
    if problems:
        raise InvalidFields(problems)
    return clean


def _checked(wanted: Field, value: Any) -> Any:
    """Return the value of one field in normal form, or its default. Raises ValueError."""
    if value is not None:
        return wanted.check(value)
    if wanted.default is REQUIRED:
        raise ValueError("is required")
    return wanted.default


def _unknown_names(
    table: Mapping[str, Field], data: Json, ignored: frozenset[str]
) -> list[tuple[str, str]]:
    """Return a problem for each name that is not in the table, with the nearest known one."""
    problems = []
    unknown = sorted(data.keys() - table.keys() - ignored)
    for name in unknown[:MAX_UNKNOWN_NAMES]:
        message = "is not a known name"
        nearest = difflib.get_close_matches(name, table, 1)
        if nearest:
            message += f" (did you mean {nearest[0]!r}?)"
        elif table:
            message += f": there are {', '.join(table)}"
        else:
            message += ": there are none here"
        problems.append((name[:100], message))  # It may be as long as the body.
    return problems


# --- Making checks ---


def rule(holds: Callable[[Any], object], problem: str) -> Check:
    """A check that leaves the value as it is, where ``holds`` returns something true."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(problem)
        return value

    return check


def matching(pattern: str, problem: str) -> Check:
    """A string that matches the regular expression as a whole."""
    form = re.compile(pattern)

    def holds(value: Any) -> bool:
        return isinstance(value, str) and form.fullmatch(value) is not None

    return rule(holds, problem)


def a_text(most: int, least: int = 1, lines: bool = False) -> Check:
    """A string of ``least`` to ``most`` characters, and no control characters among them.

    ``lines`` allows tabs and line ends. Unless ``least`` is 0, blanks alone are not enough.
    Half of a surrogate pair, which JSON can say and UTF-8 cannot, is refused.
    """
    control = r"\x00-\x1f"
    if lines:
        control = r"\x00-\x08\x0b\x0c\x0e-\x1f"
    character = rf"[^{control}\x7f-\x9f\ud800-\udfff]"
    pattern = rf"{character}{{{least},{most}}}"
    if least:
        pattern = rf"(?s:(?=.*\S)){pattern}"
    problem = f"must be a string of {least} to {most} characters, no control characters among them"
    return matching(pattern, problem)


def a_number(low: float, high: float, whole: bool = True) -> Check:
    """A number in [low, high]; unless ``whole`` is False it has no fraction."""
    problem = f"must be a number from {low} to {high}"
    kinds: tuple[type, ...] = (int, float)
    if whole:
        problem = f"must be a whole number from {low} to {high}"
        kinds = (int,)

    def holds(value: Any) -> bool:
        # isinstance() would let true and false through.
        return type(value) in kinds and low <= value <= high

    return rule(holds, problem)


def one_of(*words: str) -> Check:
    """One of these words."""
    return rule(lambda value: value in words, f"must be one of {', '.join(words)}")


def microseconds(low: str, high: str) -> Check:
    """A duration in [low, high], such as 1m30s, turned into µs."""
    shortest = parse_duration(low)
    longest = parse_duration(high)

    def check(value: Any) -> int:
        duration = parse_duration(value)
        if not shortest <= duration <= longest:
            raise ValueError(f"must be from {low} to {high}")
        return duration

    return check


def a_duration(low: str, high: str) -> Check:
    """A duration in [low, high], kept as text in its shortest form: a minute is ``1m``."""
    in_microseconds = microseconds(low, high)

    def check(value: Any) -> str:
        return format_duration(in_microseconds(value))

    return check


def list_of(item: Check, most: int, least: int = 0) -> Check:
    """A list of ``least`` to ``most`` values that each pass ``item``."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"must be a list of {least} to {most} values")
        return [item(entry) for entry in value]

    return check


def mapping_of(names: Check, values: Check, most: int) -> Check:
    """An object with at most ``most`` free names that pass ``names``, none of them null."""

    def entry(name: str, value: Any) -> Any:
        names(name)
        return values(value)

    def check(data: Any) -> Json:
        if not isinstance(data, dict) or len(data) > most:
            raise ValueError(f"must be an object with at most {most} names")
        table = {name: Field(functools.partial(entry, name)) for name in data}
        return validate(table, data)

    return check


def an_object(table: Mapping[str, Field]) -> Check:
    """An object with the fields of this table."""
    return functools.partial(validate, table)


def query_number(low: int, high: int) -> Check:
    """A whole number that is written out, as in a URL's query; over ``high`` means ``high``."""

    def check(value: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", value) or int(value) < low:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return min(int(value), high)

    return check


# --- Checks of values that jobs, queries and settings share ---

a_boolean = rule(lambda value: isinstance(value, bool), "must be true or false")

a_header_name = matching(
    r"(?!(?i:content-length|transfer-encoding|connection|upgrade|te|trailer|expect|keep-alive"
    r"|proxy-.*|x-chronos-.*)\Z)[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}",  # A token of RFC 9110, 5.6.2.
    "must be the name of an HTTP header, and of none that only Chronos sets",
)

_SECRET_HEADER = re.compile("(?i)authorization|cookie|token|secret|password|api-key")


def is_secret_header(name: str) -> bool:
    """Return whether the value of this header is a secret, which nobody may see again."""
    return _SECRET_HEADER.search(name) is not None


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity: Python's json would take them, RFC 8259 does not know them."""
    raise ValueError("NaN and Infinity are no numbers in JSON")


@functools.cache
def _time_zones() -> frozenset[str]:
    return frozenset(available_timezones())  # It reads a hundred directories: once is enough.


def a_timezone(value: Any) -> str:
    """The name of a time zone in the IANA database, as far as this machine has it."""
    if not isinstance(value, str) or not _is_time_zone(value):
        raise ValueError("must be an IANA time zone such as Europe/Madrid")
    return value


def _is_time_zone(name: str) -> bool:
    """Say whether there is a time zone of that name. Raises ValueError where it is damaged."""
    try:
        time_zone(name)
    except NoSuchZone:
        return False
    if name not in _time_zones():
        _time_zones.cache_clear()  # It may have come since.
    return name in _time_zones()  # posix/UTC can be loaded, and is none of the names.


def a_user_name(value: Any) -> str:
    """A name to sign in with; basic authentication ends it at a colon (RFC 7617, 2)."""
    name: str = a_text(256)(value)
    if ":" in name:
        raise ValueError("must not contain a colon")
    return name


def a_schedule(value: Any, now: int | None = None) -> str:
    """An expression that parse_schedule takes, without blanks around it.

    The instant of an ``@at`` must be later than ``now``; None: it may be past.
    """
    text: str = a_text(200, lines=True)(value)
    expression = text.strip(" \t")
    schedule = parse_schedule(expression)
    if now is not None and isinstance(schedule, AtSchedule) and schedule.at <= now:
        raise ValueError("is in the past")
    return expression


# --- URLs: one reading of them, so that what is checked is what is called ---

_LABEL = r"[A-Za-z0-9_\x80-\U0010ffff-]{1,63}"  # Beyond ASCII it is one of IDNA (RFC 5891).
_IPV6 = r"\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\]"  # %25 and a zone: RFC 6874.
_AUTHORITY = re.compile(rf"({_IPV6}|{_LABEL}(?:\.{_LABEL})*\.?)(?::([0-9]{{0,5}}))?")
# What neither path nor query nor fragment may have (RFC 3986, 3.3 to 3.5).
_WRONG_IN_URL = re.compile(r"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9._~!$&'()*+,;=:@/?%-]")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Url(NamedTuple):
    """A URL as it is called."""

    scheme: str  # http or https
    host: str  # What is looked up, in lower case; an IPv6 address without its brackets.
    port: int
    authority: str  # For the Host header: host and port, spelled as in the URL.
    resource: str  # For the request line: path and query, spelled as in the URL.

    @property
    def origin(self) -> str:
        """It is scheme://host:port, the port always there."""
        host = self.host
        if ":" in host:
            host = f"[{host}]"  # An IPv6 address.
        return f"{self.scheme}://{host}:{self.port}"


def split_url(url: str) -> tuple[str, str, str]:
    """Return scheme, authority and all the rest of a text that may be a URL (RFC 3986, 3)."""
    scheme, colon, rest = url.partition("://")
    if not colon:
        return "", "", url
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    return scheme.lower(), authority, rest.removeprefix(authority)


def read_url(url: str) -> Url:
    """Return an http or https URL in its parts, none of them rewritten.

    It has to be valid by RFC 3986, because only then everybody reads it alike; a host beyond
    ASCII is taken, and is what IDNA makes of it. The fragment is never sent. Raises ValueError,
    which says what to write instead and does not repeat the URL.
    """
    scheme, authority, rest = split_url(url)
    if scheme not in _DEFAULT_PORTS or not authority:
        raise ValueError("it must begin with http:// or https://, and a host")
    if "@" in authority:
        raise ValueError("a user and a password belong in webhook.auth")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError("between // and its path must be a host, or host:port")
    host, port = match.groups(default="")
    if not host.isascii():
        return read_url(url.replace(host, _ascii_host(host), 1))
    resource, _hash, fragment = rest.partition("#")
    wrong = _WRONG_IN_URL.search(resource) or _WRONG_IN_URL.search(fragment)
    if wrong:
        raise ValueError(_what_to_write(wrong[0]))
    number = int(port or _DEFAULT_PORTS[scheme])
    if not 1 <= number <= 65535:
        raise ValueError("its port must be from 1 to 65535")
    looked_up, spelled = _names_of_host(host)
    if port:
        spelled = f"{spelled}:{port}"
    if not resource.startswith("/"):
        resource = f"/{resource}"  # RFC 9112, 3.2.1: where there is no path, it is "/".
    return Url(scheme, looked_up, number, spelled, resource)


def _what_to_write(wrong: str) -> str:
    """Return what is to be written instead of a character that no URL may have there."""
    shown = "a blank" if wrong.isspace() else wrong
    sentence = f"write {quote(wrong, safe='')} for {shown}"
    if wrong == "%":
        sentence += " where no two hexadecimal digits follow it"
    return sentence


def _ascii_host(host: str) -> str:
    """Return the name that DNS knows for one with characters beyond ASCII."""
    prepared = requests.PreparedRequest()
    try:
        prepared.prepare_url(f"http://{host}/", None)
    except requests.RequestException as error:
        raise ValueError("its host is not a possible name") from error
    _scheme, ascii_host, _rest = split_url(str(prepared.url))
    if not ascii_host.isascii():
        raise ValueError("its host is not a possible name")
    return ascii_host


def _names_of_host(host: str) -> tuple[str, str]:
    """Return a host as it is looked up, and as the Host header has it."""
    if host[0] != "[":
        return host.lower(), host
    address, _mark, zone = host[1:-1].partition("%25")
    try:
        ipaddress.IPv6Address(address)
    except ValueError as error:
        raise ValueError("what is in brackets must be an IPv6 address") from error
    looked_up = address.lower()
    if zone:
        looked_up += f"%{zone}"  # It means something on this machine only (RFC 6874, 4).
    return looked_up, f"[{address}]"


def read_stored_url(url: str) -> Url:
    """Return the parts of a URL that was checked, perhaps by a version that took more.

    What that took and RFC 3986 forbids goes out as it did then: as requests rewrites it.
    Raises ValueError.
    """
    with contextlib.suppress(ValueError):
        return read_url(url)
    prepared = requests.PreparedRequest()
    try:
        prepared.prepare_url(url, None)
    except requests.RequestException:
        # The error would repeat the URL, and that of the alerts may be a secret.
        raise ValueError("webhook.url is not a URL that can be called") from None
    return read_url(str(prepared.url))


def a_url(value: Any, known: str | None = None) -> str:
    """An http or https URL that can be called, kept as it is written.

    ``known`` was taken before, perhaps by a version that took more: it is taken again.
    """
    url: str = a_text(2048)(value)
    read = read_stored_url if url == known else read_url
    try:
        read(url)
    except ValueError as error:
        raise ValueError(f"is not a URL that can be called: {error}") from error
    return url


# ======================================================================================
# 6. Jobs: what a job may say, what of it is secret, and the records of what happens
# ======================================================================================
#
# A job's configuration is a plain dict in the form of the API, checked by the tables below; so
# it is stored, versioned and compared as it is shown. What has happened is in records, which
# never change: who wants another one makes it with ``_replace``. Everything here is pure: no
# clock, no database, no threads. Only the store makes records of rows.

# --- The fields of a job ---

MISSED_RUN_POLICIES = ("ignore", "execute_one", "execute_all")
SECRET_AUTH_FIELDS = ("password", "token", "api_key")  # What webhook.auth must never show.

# What the specification of Standard Webhooks adds to a request that is signed.
SIGNATURE_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")
SIGNING_PREFIX = "whsec_"  # Before a secret: it only says what that is.
MAX_SIGNING_SECRET = 200  # Characters: enough for two secrets of 64 bytes.

_MASK_PROBLEM = f"is {MASK}, which only stands for a secret of the same URL: give the secret itself"
_printable = matching(
    r"(?:[!-~\xa0-\xff](?:[\t -~\xa0-\xff]{0,8190}[!-~\xa0-\xff])?)?",
    "must be at most 8192 printable Latin-1 characters, no blanks around them",
)


def _header_value(value: Any) -> str:
    """What may stand in a header line, and is no mask that stayed where it was."""
    text: str = _printable(value)
    if text == MASK:
        raise ValueError(_MASK_PROBLEM)
    return text


def _password(value: Any) -> str:
    """A password, which may be empty but is no mask that stayed where it was."""
    password: str = a_text(1024, least=0)(value)
    if password == MASK:
        raise ValueError(_MASK_PROBLEM)
    return password


def _signing_secret(value: Any) -> str:
    """One secret of Standard Webhooks, or an old and a new one with a blank between them."""
    secret: str = a_text(MAX_SIGNING_SECRET)(value)
    if secret == MASK:
        raise ValueError(_MASK_PROBLEM)
    signing_keys(secret)
    return secret


def signing_keys(secret: str) -> list[bytes]:
    """Return the keys that a webhook.signing_secret stands for. Raises ValueError.

    The specification of Standard Webhooks has keys of 24 to 64 bytes, as base64, before which
    there may be whsec_.
    """
    keys = []
    for text in secret.split(" "):
        try:
            key = base64.b64decode(text.removeprefix(SIGNING_PREFIX), validate=True)
        except ValueError:
            key = b""
        keys.append(key)
    if len(keys) > 2 or not all(24 <= len(key) <= 64 for key in keys):
        raise ValueError(
            "must be 24 to 64 random bytes as base64, with or without whsec_ before them; "
            "two such secrets have one blank between them"
        )
    return keys


def a_webhook(table: Mapping[str, Field]) -> Check:
    """A webhook with the fields of this table, which set no header twice."""

    def check(value: Any) -> Json:
        webhook = validate(table, value)
        problems = _doubled_headers(webhook)
        if problems:
            raise InvalidFields(problems)
        return webhook

    return check


def _doubled_headers(webhook: Json) -> list[tuple[str, str]]:
    """Return the fields that set a header which another one sets: one would be lost in silence.

    Case makes no difference in the names of headers (RFC 9110, 5.1). An Authorization beside an
    ``auth`` that sets it, too, is taken: the reference has it in its first example.
    """
    set_by: dict[str, str] = {}  # The name of a header in lower case -> what sets it.
    if webhook["signing_secret"] is not None:
        set_by = dict.fromkeys(SIGNATURE_HEADERS, "webhook.signing_secret")
    setters = []
    auth = webhook["auth"]
    if auth is not None and "header" in auth:
        setters.append(("auth.header", auth["header"]))
    setters += [(f"headers.{name}", name) for name in webhook["headers"]]
    problems = []
    for path, name in setters:
        setter = set_by.setdefault(name.lower(), f"webhook.{path}")
        if setter != f"webhook.{path}":
            problems.append((path, f"is a header that {setter} sets: leave one of them out"))
    return problems


def _auth(value: Any) -> Json:
    """The object webhook.auth: its type says which other fields it has."""
    kind = None
    if isinstance(value, dict):
        kind = value.get("type")
    if not isinstance(kind, str) or kind not in AUTH_FIELDS:
        raise InvalidFields([("type", f"must be one of {', '.join(AUTH_FIELDS)}")])
    table = {"type": Field(one_of(kind))} | AUTH_FIELDS[kind]
    return validate(table, value)


# fmt: off
AUTH_FIELDS: dict[str, dict[str, Field]] = {
    "basic": {
        "username":    Field(a_user_name),
        "password":    Field(_password),
    },
    "bearer": {
        "token":       Field(_header_value),
    },
    "api_key": {
        "api_key":     Field(_header_value),
        "header":      Field(a_header_name, "X-API-Key"),
    },
}

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
WEBHOOK_FIELDS: dict[str, Field] = {
    # name               check                                               default
    "url":               Field(a_url),
    "method":            Field(one_of(*METHODS),                             "GET"),
    "headers":           Field(mapping_of(a_header_name, _header_value, 50), {}),
    "body":              Field(a_text(MAX_BODY_BYTES, least=0, lines=True),  None),
    "auth":              Field(_auth,                                        None),
    "signing_secret":    Field(_signing_secret,                              None),
    "success_codes":     Field(list_of(a_number(100, 599), 100, least=1),    None),
    "verify_tls":        Field(a_boolean,                                    True),
}
RETRY_FIELDS: dict[str, Field] = {
    # name               check                                               default
    "max_attempts":      Field(a_number(1, 100),                             3),
    "initial_interval":  Field(a_duration("1ms", "24h"),                     "1s"),
    "max_interval":      Field(a_duration("1ms", "24h"),                     "1m"),
    "multiplier":        Field(a_number(1, 100, whole=False),                2.0),
    "attempt_timeout":   Field(a_duration("100ms", "24h"),                   None),
}
JOB_FIELDS: dict[str, Field] = {
    # name               check                                               default
    "name":              Field(a_text(200)),
    "description":       Field(a_text(2000, least=0, lines=True),            None),
    "schedule":          Field(a_schedule),
    "timezone":          Field(a_timezone,                                   "UTC"),
    "webhook":           Field(a_webhook(WEBHOOK_FIELDS)),
    "retry_policy":      Field(an_object(RETRY_FIELDS),                      {}),
    "timeout":           Field(a_duration("100ms", "24h"),                   "5m"),
    "concurrency":       Field(one_of("allow", "forbid", "replace"),         "forbid"),
    "missed_run_policy": Field(one_of(*MISSED_RUN_POLICIES),                 None),
    "tags":              Field(mapping_of(a_text(100), a_text(200, least=0), 50), {}),
    "enabled":           Field(a_boolean,                                    False),
}
# fmt: on

# What an answer adds to a job: it is accepted back, and ignored.
SERVER_FIELDS = frozenset(
    {
        "id",
        "version",
        "created_at",
        "updated_at",
        "next_run",
        "last_execution",
        "managed_by",
        "strip",
        "failures",
        "failing_since",
        "problem",
    }
)


# Why an id is refused where it can't have any effect, and would be taken for one that has.
NO_ID_IN_POST = (
    "must not be given: to create a job under an id of yours, "
    "PUT /api/v1/jobs/{id} with the header If-None-Match: *"
)
NO_ID_IN_FILE = "must not be given: the id of a declared job follows from its name"


def refused(reason: str) -> Callable[[Any], NoReturn]:
    """Return a check that refuses whatever is given."""

    def check(_value: Any) -> NoReturn:
        raise ValueError(reason)

    return check


# The webhook of alerts is one without a body: Chronos writes that.
ALERT_FIELDS = {name: wanted for name, wanted in WEBHOOK_FIELDS.items() if name != "body"}
ALERT_FIELDS["method"] = Field(one_of(*METHODS), "POST")


def validate_job(
    data: Any,
    retry: Mapping[str, Any],
    now: int | None,
    stored: Json | None = None,
    no_id: str | None = None,
) -> tuple[Json, bool]:
    """Return a job's configuration in its normal form, and whether it is to be enabled.

    ``retry`` completes retry_policy. An ``@at`` must be later than ``now``; None: it may be
    past. ``stored`` is the configuration that is replaced: masked secrets mean its own, an
    instant that it has already may be past, and its URL may be one that only an earlier version
    took. ``no_id`` is why an id is refused; None: it is ignored, as all that an answer adds to a
    job. Raises InvalidFields.
    """
    if not isinstance(data, dict):
        raise InvalidFields([("", "the body must be a JSON object")])
    known_url = None
    if stored is not None:
        data = restore_secrets(data, stored)
        if data.get("schedule") == stored["schedule"]:
            now = None
        known_url = stored["webhook"]["url"]
    retry_fields = {}
    for name, wanted in RETRY_FIELDS.items():
        retry_fields[name] = Field(wanted.check, default=retry[name])
    webhook_fields = WEBHOOK_FIELDS | {"url": Field(functools.partial(a_url, known=known_url))}
    table = JOB_FIELDS | {
        "webhook": Field(a_webhook(webhook_fields)),
        "schedule": Field(functools.partial(a_schedule, now=now)),
        "retry_policy": Field(an_object(retry_fields), retry),
    }
    if no_id is not None:
        table["id"] = Field(refused(no_id), None)
    config = validate(table, data, SERVER_FIELDS)
    config.pop("id", None)
    enabled: bool = config.pop("enabled")
    return config, enabled


class StoredShape:
    """The fields that a stored object has to have, each with its type."""

    def __init__(self, types: Mapping[str, Any]) -> None:
        self._types = types
        # In one call for all of them: this is done whenever a version is read.
        self._read = operator.itemgetter(*types)
        self._kinds = tuple(types.values())

    def wrong_part(self, data: Any) -> str | None:
        """Return the name of a field that is missing or not of its type; None: all are right."""
        if not isinstance(data, dict):
            return "all of it"
        with contextlib.suppress(KeyError):
            if all(map(isinstance, self._read(data), self._kinds)):
                return None
        for name, kind in self._types.items():
            if not isinstance(data.get(name), kind):
                return name
        return None


# --- Stored configurations, which may have become unusable ---

# What the whole program takes for granted of a stored configuration, and of its webhook.
_STORED_JOB = StoredShape(
    {
        "name": str,
        "description": (str, type(None)),
        "schedule": str,
        "timezone": str,
        "webhook": dict,
        "retry_policy": dict,
        "timeout": str,
        "concurrency": str,
        "tags": dict,
    }
)
_STORED_WEBHOOK = StoredShape(
    {"url": str, "method": str, "headers": dict, "auth": (dict, type(None))}
)


def read_config(text: str | bytes | None) -> Json:
    """Return a configuration as it was stored; None: it is not there.

    Raises UnusableConfig: it is damaged, or another program has written it.
    """
    if text is None:
        raise UnusableConfig("the job's configuration is missing in the database")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableConfig(f"the job's stored configuration is damaged: {error}") from error
    wrong = _STORED_JOB.wrong_part(config)
    if wrong is None:
        wrong = _STORED_WEBHOOK.wrong_part(config["webhook"])
    if wrong is not None:
        raise UnusableConfig(f"the job's stored configuration is damaged: {wrong} is wrong")
    return _completed(config)


def _completed(config: Json) -> Json:
    """Return a stored configuration with the defaults of the fields that have come since."""
    complete = _STORED_DEFAULTS | config
    complete["webhook"] = _STORED_WEBHOOK_DEFAULTS | config["webhook"]
    complete["retry_policy"] = _STORED_RETRY_DEFAULTS | config["retry_policy"]
    return complete


def stand_in_config(name: str, problem: str) -> Json:
    """Return what is shown of a job in the place of a configuration that can't be read.

    ``problem`` says why. It has every field, so that lists and changes work, but no valid
    schedule and URL: nobody can take it for a configuration of the job.
    """
    webhook = _defaults(WEBHOOK_FIELDS) | {"url": ""}
    retry_policy = _defaults(RETRY_FIELDS)
    own = {
        "name": name,
        "schedule": "",
        "webhook": webhook,
        "retry_policy": retry_policy,
        "problem": problem,
    }
    config = _defaults(JOB_FIELDS) | own
    del config["enabled"]
    return config


def _defaults(table: Mapping[str, Field]) -> Json:
    return {name: wanted.default for name, wanted in table.items()}


def _optional(table: Mapping[str, Field]) -> Json:
    """Return the defaults of the fields that have one."""
    return {name: value for name, value in _defaults(table).items() if value is not REQUIRED}


_STORED_DEFAULTS = _optional(JOB_FIELDS)
del _STORED_DEFAULTS["enabled"]  # It is the job's state, not part of its configuration.
_STORED_WEBHOOK_DEFAULTS = _optional(WEBHOOK_FIELDS)
_STORED_RETRY_DEFAULTS = _optional(RETRY_FIELDS)


def next_fire_time(config: Json, after: int) -> int | None:
    """Return a stored configuration's first fire time later than ``after``; None: there is none.

    Raises UnusableConfig.
    """
    if "problem" in config:
        raise UnusableConfig(config["problem"])
    try:
        schedule = parse_schedule(config["schedule"])
        return schedule.next_after(after, config["timezone"])
    except (ValueError, OverflowError) as error:
        raise UnusableConfig(f"the job's configuration can't be used: {error}") from error


# --- Secrets, which leave a configuration as a mask only ---


def masked_config(config: Json, job_id: str) -> Json:
    """Return a job's configuration with every secret replaced by the mask.

    Of the built-in job of the alerts the URL is one, too: chat services let in who knows it.
    """
    webhook = dict(config["webhook"])
    if job_id == ALERTS_ID:
        webhook["url"] = masked_url(webhook["url"])
    headers = dict(webhook["headers"])
    for name in headers:
        if is_secret_header(name):
            headers[name] = MASK
    webhook["headers"] = headers
    if webhook["signing_secret"] is not None:
        webhook["signing_secret"] = MASK
    if webhook["auth"] is not None:
        auth = dict(webhook["auth"])
        for name in SECRET_AUTH_FIELDS:
            if name in auth:
                auth[name] = MASK
        webhook["auth"] = auth
    return config | {"webhook": webhook}


def masked_url(url: str) -> str:
    """Return a checked URL with the mask in the place of all that comes after the host."""
    if rest_of_url(url) in ("", "/"):
        return url
    return f"{url.removesuffix(rest_of_url(url))}/{MASK}"


def rest_of_url(url: str) -> str:
    """Return path, query and fragment of a URL, just as they are written."""
    _scheme, _authority, rest = split_url(url)
    return rest


def restore_secrets(data: Json, stored: Json) -> Json:
    """Return ``data`` with what ``stored`` has in the place of each mask.

    ``data`` is a job as it came, ``stored`` a checked configuration. Where the origin of the
    URL or the Host header differ the masks stay, and validation refuses them: otherwise, who
    may change a job could have its secrets sent to a server of their own.
    """
    webhook = data.get("webhook")
    if not isinstance(webhook, dict):
        return data
    restored = dict(webhook)
    own_secret = stored["webhook"]["signing_secret"]
    if webhook.get("signing_secret") == MASK and own_secret is not None:
        restored["signing_secret"] = own_secret
    for part in ("headers", "auth"):
        given = webhook.get(part)
        if isinstance(given, dict):
            secrets = stored["webhook"][part] or {}
            restored[part] = _without_masks(given, secrets)
    if _is_sent_elsewhere(restored, stored["webhook"]):
        return data
    return data | {"webhook": restored}


def _without_masks(given: Json, secrets: Json) -> Json:
    """Return ``given`` with the secret of the same name for each mask, as far as there is one."""
    restored = dict(given)
    for name, value in given.items():
        if value == MASK and name in secrets:
            restored[name] = secrets[name]
    return restored


def _is_sent_elsewhere(webhook: Json, stored: Json) -> bool:
    """Return whether two webhooks have different receivers; False if the new URL is wrong."""
    try:
        receiver = _receiver(webhook)
    except ValueError:
        return False  # With its secrets restored, the URL is all that there is to report.
    try:
        return receiver != _receiver(stored)
    except ValueError:
        return True  # Where the secrets were sent to so far, nobody can say.


def _receiver(webhook: Json) -> list[Any]:
    """Return what decides where a request goes: the URL's origin, and each Host header.

    That of an api_key is a header like any other. Raises ValueError if the URL can't be read.
    """
    url = webhook.get("url")
    receiver: list[Any] = [target_of(a_url(url, known=url))]
    headers = webhook.get("headers")
    if isinstance(headers, dict):
        for name, value in headers.items():
            if name.lower() == "host":
                receiver.append(value)
    auth = webhook.get("auth")
    if isinstance(auth, dict) and str(auth.get("header")).lower() == "host":
        receiver.append(auth.get("api_key"))
    return receiver


def target_of(url: str) -> str:
    """Return scheme://host:port of a checked URL, the port always there. Raises ValueError."""
    return read_stored_url(url).origin


# --- Patches ---


def merge_patch(target: Any, patch: Any) -> Any:
    """Return ``target`` changed as a JSON merge patch says (RFC 7396); both stay as they are."""
    if not isinstance(patch, dict):
        return patch
    merged = {}
    if isinstance(target, dict):
        merged = dict(target)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def patched_config(shown: Json, patch: Any) -> Any:
    """Return a job, as it is shown, changed as a merge patch says.

    Beyond RFC 7396, a patch with another auth.type replaces the whole of webhook.auth: nothing
    of the one before belongs to it. The result is as unchecked as the patch is.
    """
    given = _auth_of(patch)
    current = _auth_of(shown)
    if "type" in given and given["type"] != current.get("type"):
        shown = shown | {"webhook": shown["webhook"] | {"auth": None}}
    return merge_patch(shown, patch)


def _auth_of(job: Any) -> Json:
    """Return the object webhook.auth of an unchecked job, or an empty one."""
    found = job
    for name in ("webhook", "auth"):
        if not isinstance(found, dict):
            return {}
        found = found.get(name)
    if not isinstance(found, dict):
        return {}
    return found


# --- Records ---


class Row(Protocol):
    """A row of the database, whose columns are asked for by their names."""

    def __getitem__(self, name: str, /) -> Any:
        """Return the value of a column."""

    def __len__(self) -> int:
        """Return the number of columns."""


class Job(NamedTuple):
    """A job with its newest configuration, in the form of the API."""

    id: str
    version: int  # The newest one.
    enabled: bool
    created_at: int  # Every *_at is in µs since the epoch, UTC.
    updated_at: int
    next_run_at: int | None  # The cursor; None: not enabled, or nothing comes any more.
    config: Json  # Where it can't be read: stand_in_config().
    strip: str = ""  # The letters of its last 30 executions that ended, the newest last.
    failures: int = 0  # So many failed or missed executions in a row.
    failing_since: int | None = None  # An instant; None: it does not fail.
    declared: str | None = None  # Digest of its declaration in chronos.yaml; None: not there.
    # The fire time that met an unusable configuration: the cursor says when to look again, and
    # nobody knows when it fires next. None: it is usable, as far as anybody has noticed.
    invalid_from: int | None = None

    @classmethod
    def from_row(cls, row: Row) -> Job:
        """Return the job of a row whose columns have the names of the fields, and its name."""
        try:
            config = read_config(row["config"])
        except UnusableConfig as error:
            config = stand_in_config(row["name"], str(error))
        return cls(
            id=row["id"],
            version=row["version"],
            enabled=bool(row["enabled"]),
            created_at=row["created_at"],
            updated_at=row["updated_at"],
            next_run_at=row["next_run_at"],
            config=config,
            strip=row["strip"],
            failures=row["failures"],
            failing_since=row["failing_since"],
            declared=row["declared"],
            invalid_from=row["invalid_from"],
        )

    def next_after(self, after: int) -> int | None:
        """Return the first fire time later than ``after``; None: there is none any more.

        Raises UnusableConfig.
        """
        return next_fire_time(self.config, after)

    def timing(self) -> tuple[bool, str, str]:
        """Return what decides its fire times: enabled, schedule, timezone."""
        return self.enabled, self.config["schedule"], self.config["timezone"]

    def to_json(self, last: Execution | None) -> Json:
        """Return the job as the API shows it: secrets masked, ``last`` as last_execution."""
        last_execution = None
        if last is not None:
            last_execution = last.to_summary()
        next_run_at = self.next_run_at
        if self.invalid_from is not None:
            next_run_at = None
        return {
            "id": self.id,
            **masked_config(self.config, self.id),
            "enabled": self.enabled,
            "version": self.version,
            "created_at": format_time(self.created_at),
            "updated_at": format_time(self.updated_at),
            "next_run": format_time(next_run_at),
            "last_execution": last_execution,
            "managed_by": DECLARED_BY if self.declared else None,
            "strip": self.strip,
            "failures": self.failures,
            "failing_since": format_time(self.failing_since),
            "problem": self.config.get("problem"),
        }


class Execution(NamedTuple):
    """One run of a job for a fire time, a trigger or a replay; in the order of its table."""

    id: str
    job_id: str
    job_version: int
    trigger: Trigger
    status: Status
    scheduled_at: int  # The fire time; of a trigger the instant of it.
    target: str  # scheme://host:port, for the limit per target.
    due_at: int | None  # When a pending one may start; None: ended, or waits for older ones.
    attempts: int = 0  # So many have started.
    spent: int = 0  # µs of the job's timeout that attempts and waits have used up.
    started_at: int | None = None  # Of the first attempt.
    attempt_at: int | None = None  # Of the newest attempt.
    completed_at: int | None = None
    reason: Reason | None = None  # Why it is no success, for programs.
    error: str | None = None  # The same for people.
    status_code: int | None = None  # Of the last attempt.
    node_id: str | None = None
    replay_of: str | None = None  # The id of the execution that it repeats.
    missed_count: int | None = None  # A skipped one may stand for so many fire times,
    missed_from: int | None = None  # from this one
    missed_to: int | None = None  # to this one.
    attempt_log: str = "[]"  # JSON in ASCII: what the API shows.
    response: str | None = None  # The body of the last answer.
    # New columns go above this line.
    job_name: str = ""  # Only where it is to be shown: the table has no such column.

    @classmethod
    def from_row(cls, row: Row) -> Execution:
        """Return the execution of a row with these columns; job_name may be the missing one.

        Raises KeyError for a word that is no Trigger or Status, which the schema forbids. A
        reason of another release stays the word that it is.
        """
        read = _READ_ALL if len(row) >= len(cls._fields) else _READ_STORED
        values = list(read(row))
        values[_TRIGGER] = _TRIGGERS[values[_TRIGGER]]
        values[_STATUS] = _STATUSES[values[_STATUS]]
        values[_REASON] = _REASONS.get(values[_REASON], values[_REASON])
        return cls(*values)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status not in (Status.PENDING, Status.RUNNING)

    @property
    def width(self) -> int:
        """How many bytes it takes; once it has ended, retention.max_size counts them."""
        response = self.response or ""
        # Most responses are ASCII, which costs no look at their characters.
        of_response = len(response) if response.isascii() else len(response.encode())
        return EXECUTION_BYTES + len(self.attempt_log) + of_response

    @property
    def ending(self) -> Ending:
        """What its end means for the job."""
        return ENDINGS.get(self.reason or self.status, ENDINGS["failed"])

    def to_summary(self) -> Json:
        """Return what a job shows of its last execution."""
        return {
            "id": self.id,
            "status": self.status,
            "reason": self.reason,
            "error": self.error,
            "scheduled_time": format_time(self.scheduled_at),
            "completed_at": format_time(self.completed_at),
        }

    def to_json(self) -> Json:
        """Return the execution as a list of the API shows it."""
        duration = None
        if self.completed_at and self.attempts:
            duration = nanoseconds(self.spent)
        return {
            "id": self.id,
            "job_id": self.job_id,
            "job_version": self.job_version,
            "trigger": self.trigger,
            "status": self.status,
            "due_at": format_time(self.due_at),
            "attempts": self.attempts,
            "started_at": format_time(self.started_at),
            "completed_at": format_time(self.completed_at),
            "reason": self.reason,
            "error": self.error,
            "status_code": self.status_code,
            "node_id": self.node_id,
            "replay_of": self.replay_of,
            "missed_count": self.missed_count,
            "missed_from": format_time(self.missed_from),
            "missed_to": format_time(self.missed_to),
            "response": self.response,
            "job_name": self.job_name,
            "scheduled_time": format_time(self.scheduled_at),
            "duration": duration,
        }


# How rows are read: each column by its name, all of them in one call, since this is done for
# every execution that runs. Looking a word up in a table is five times faster than Status(word).
STORED_FIELDS = tuple(name for name in Execution._fields if name != "job_name")
_READ_STORED = operator.itemgetter(*STORED_FIELDS)
_READ_ALL = operator.itemgetter(*Execution._fields)
_TRIGGER = Execution._fields.index("trigger")
_STATUS = Execution._fields.index("status")
_REASON = Execution._fields.index("reason")
_TRIGGERS = {trigger.value: trigger for trigger in Trigger}
_STATUSES = {status.value: status for status in Status}
_REASONS: dict[str | None, Reason | None] = {reason.value: reason for reason in Reason}
_REASONS[None] = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended; a worker hands it to the engine."""

    execution: Execution  # As it was when the attempt began.
    started_at: int  # Of the attempt, by the wall clock.
    duration: int  # µs, by the monotonic clock.
    ended_at_mono: int  # Instant of the monotonic clock.
    status_code: int | None = None  # None: no answer.
    response: str | None = None
    success: bool = False
    reason: Reason | None = None  # Why it is no success.
    error: str | None = None  # The same for people.
    retry_after: int | None = None  # µs that the answer asked to wait.


# ======================================================================================
# 7. Settings: chronos.yaml, every key with its check and its default
# ======================================================================================
#
# The path of an attribute is the key in the file: settings.dispatcher.connect_timeout is
# dispatcher.connect_timeout there, and CHRONOS_DISPATCHER_CONNECT_TIMEOUT in the environment,
# which overrides the file and is read as a YAML scalar. Each setting is declared once, below,
# with its check and its default. Durations are in µs here. Settings are checked when they are
# loaded, and never change after that; a reload makes new ones.


class Declaration(NamedTuple):
    """A job that the configuration file declares."""

    config: Json  # As the API has it.
    enabled: bool
    digest: str  # Of what the file says: another one means that the declaration has changed.
    problem: str = ""  # Its key in the file and why its time zone can't be used; empty: it can.


# --- Checks of settings ---


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:8080`` or ``[::1]:8080``. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError('must be an address such as "127.0.0.1:8080"')
    return host.strip("[]") or "0.0.0.0", int(port)


def _an_address(value: Any) -> str:
    """Host and port to listen on."""
    address: str = a_text(300)(value)
    split_address(address)
    return address


def _a_network(value: Any) -> str:
    """A network such as 10.0.0.0/8, in the shortest form."""
    return str(ipaddress.ip_network(a_text(100)(value)))


def _networks(value: Any) -> list[str]:
    """Addresses and networks in a list; a single one may stand without it."""
    if isinstance(value, str):
        value = [value]
    networks: list[str] = list_of(_a_network, 100)(value)
    return networks


def parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an IP address, one of IPv4 inside IPv6 (::ffff:10.0.0.5) as IPv4's own.

    Raises ValueError.
    """
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _authorities(value: Any) -> str:
    """The path of certificates in PEM, in a file or in a directory; they are read now."""
    path: str = a_text(4096)(value)
    try:
        candidates = [path]
        if os.path.isdir(path):
            names = filter(_HASHED_NAME.fullmatch, os.listdir(path))
            links = [os.path.join(path, name) for name in names]
            candidates = [link for link in links if os.path.exists(link)]  # A link may be dead.
        has_certificates = any(_has_certificates(candidate) for candidate in candidates)
    except OSError as error:
        raise ValueError(f"must be readable: {error.filename}: {error.strerror}") from error
    if not has_certificates:
        forms = "a file with certificates in PEM form, or a directory indexed by openssl rehash"
        raise ValueError(f"must be {forms}, not {path}")
    return path


# Under such names OpenSSL looks for certificates in a directory, and under no others.
_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.[0-9]+")


def _has_certificates(path: str) -> bool:
    """Say whether a file has certificates in PEM. Raises OSError where it can't be read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with open(path, "rb"), contextlib.suppress(ssl.SSLError):
        context.load_verify_locations(cafile=path)
    return context.cert_store_stats()["x509"] > 0  # There may be lists of revoked ones only.


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A forward proxy for HTTP, as dispatcher.proxy names it."""

    hostname: str
    port: int
    user: str = ""  # Empty: it asks for none.
    password: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """What people read of it, which is all but user and password."""
        host = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        return f"the proxy http://{host}:{self.port}"


_PROXY_URL = re.compile(
    r"(?i:http)://(?:(?P<user>[^/?#:@]+)(?::(?P<password>[^/?#]*))?@)?"
    r"(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[1-9][0-9]{0,4})/?"
)


def _a_proxy(value: Any) -> Proxy:
    """The URL of a proxy, with user and password where it asks for them."""
    parts = _PROXY_URL.fullmatch(value) if isinstance(value, str) else None
    if parts is None or int(parts["port"]) > 65535:
        # The value is not repeated, because a password may be in it.
        raise ValueError(
            'must be a URL such as "http://proxy.example.com:3128" or "http://user:password@…", '
            "what is special in user and password as in a URL (%40 for @)"
        )
    host = parts["host"].lower()
    if host[0] == "[":
        try:
            host = str(ipaddress.IPv6Address(host.strip("[]")))
        except ValueError as error:
            raise ValueError("must have an IPv6 address in its brackets") from error
    user = unquote(parts["user"] or "")
    if ":" in user:
        raise ValueError("must have no colon in its user: a proxy would end it there (RFC 7617, 2)")
    return Proxy(
        hostname=host,
        port=int(parts["port"]),
        user=user,
        password=unquote(parts["password"] or ""),
    )


_a_domain = matching(
    r"\.?[a-z0-9_-][a-z0-9._-]{0,252}",
    'must be a name, a suffix such as ".example.com", an address or a network',
)


_NETWORK_FORM = re.compile("[0-9./]+|[0-9A-Fa-f./]*:[0-9A-Fa-f:./]*")


def _a_direct_host(value: Any) -> str:
    """A name, a suffix of names, or a network in the shortest form."""
    if isinstance(value, str) and _NETWORK_FORM.fullmatch(value):
        return _a_network(value)
    name: str = _a_domain(value.lower() if isinstance(value, str) else value)
    return name.removesuffix(".")  # The dot of an absolute name.


_a_host = matching(
    "[a-z0-9._-]{0,252}[a-z0-9_-]|[0-9a-f:.]{2,45}",
    'must be a host in small letters, such as "api.example.com", without scheme and port',
)


def load_client_certificate(context: ssl.SSLContext, path: str) -> None:
    """Let connections show the certificate of a PEM file that has its key, too.

    Raises ValueError with a sentence that goes on after the name of a setting.
    """

    def no_password() -> str:
        # Without this function OpenSSL would ask for one on the terminal.
        raise ValueError(f"must have a key that is not encrypted: {path}")

    try:
        context.load_cert_chain(path, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"must have the key of its certificate: {path}") from error
        raise ValueError(f"must be a PEM file with a certificate and its key: {path}") from error
    except OSError as error:
        raise ValueError(f"must be readable: {path}: {error.strerror}") from error


def _a_client_certificate(value: Any) -> str:
    """The path of a PEM file with a certificate and its key, which is read now."""
    path: str = a_text(4096)(value)
    load_client_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)
    return path


_size_text = matching("[1-9][0-9]{0,5}[MG]B", 'must be a size such as "500MB" or "1GB"')
_SIZE_UNITS = {"MB": 10**6, "GB": 10**9}


def _a_size(value: Any) -> int:
    """A size, turned into bytes."""
    text: str = _size_text(value)
    number = int(text[:-2])
    return number * _SIZE_UNITS[text[-2:]]


_a_password_hash = matching("scrypt:[0-9a-f]{32}:[0-9a-f]{64}", "must be what hash-password prints")


def hash_password(password: bytes, salt: bytes) -> str:
    """Return the scrypt hash (RFC 7914) of a password, as auth.users has it."""
    key = hashlib.scrypt(password, salt=salt, n=1 << 14, r=8, p=1, dklen=32)
    return f"scrypt:{salt.hex()}:{key.hex()}"


def _a_list_of_objects(value: Any) -> list[Json]:
    """The declared jobs as they are written; what they say is checked with the settings."""
    if not isinstance(value, list) or not all(isinstance(job, dict) for job in value):
        raise ValueError("must be a list of jobs, each an object")
    return value


# --- Every setting ---


def setting(check: Check, default: Any) -> Any:
    """Declare a setting: its check, and its default as the file would say it (None: none).

    A member of a dataclass that is not declared so is a section, and its type says of what.
    """
    return field(metadata={"setting": Field(check, default)})


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """server.http: where and how the API is served."""

    address: str = setting(_an_address, "127.0.0.1:8080")  # Port 0 takes a free one.
    threads: int = setting(a_number(8, 256), 16)  # API calls at once.


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """server: who may come in, and how the service stops."""

    http: HttpSettings
    shutdown_grace: int = setting(microseconds("0", "1h"), "20s")  # µs for what runs at SIGTERM.
    allow_unauthenticated: bool = setting(a_boolean, False)  # Even where it is not loopback.
    allowed_hosts: Sequence[str] = setting(list_of(a_text(253), 100), [])  # That browsers may name.
    trusted_proxy: Sequence[str] = setting(_networks, [])  # Networks of those who say who asks.


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """cluster: what this node is called, and where its data is."""

    node_id: str = setting(a_text(100), platform.node() or "chronos")
    data_dir: str = setting(a_text(4096), "./data")  # Absolute once the settings are loaded.


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """store: how the database is used."""

    synchronous: str = setting(one_of("FULL", "NORMAL"), "FULL")  # The PRAGMA of this name.


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """scheduler: what becomes of fire times, and what a job leaves out."""

    paused: bool = setting(a_boolean, False)  # True: nothing is started.
    missed_run_policy: str = setting(one_of(*MISSED_RUN_POLICIES), "execute_one")
    missed_run_grace: int = setting(microseconds("1s", "24h"), "10s")  # µs: later means missed.
    # In the form of the API, complete.
    default_retry_policy: Mapping[str, Any] = setting(an_object(RETRY_FIELDS), {})


@dataclass(frozen=True, kw_only=True)
class DispatcherSettings:
    """dispatcher: how webhooks are called, and which ones never."""

    max_concurrent_jobs: int = setting(a_number(1, 1000), 64)  # Worker threads.
    # For one target; the file may leave it out, then three quarters of the workers.
    max_concurrent_per_host: int = setting(a_number(1, 1000), None)
    connect_timeout: int = setting(microseconds("100ms", "1h"), "10s")  # µs
    max_response_bytes: int = setting(a_number(0, 16 << 20), 64 << 10)  # So much is kept.
    blocked_networks: Sequence[str] = setting(
        list_of(_a_network, 1000),
        [
            "169.254.0.0/16",  # Link-local, with the metadata of most clouds.
            "fe80::/10",
            "168.63.129.16/32",  # Metadata of Azure.
            "fd00:ec2::254/128",  # Metadata of AWS.
            "0.0.0.0/8",
            "::/128",
            "224.0.0.0/4",  # Multicast and broadcast.
            "ff00::/8",
            "255.255.255.255/32",
        ],
    )
    # If any are named, all others are closed.
    allowed_networks: Sequence[str] = setting(list_of(_a_network, 1000), [])
    # None: targets are dialled directly.
    proxy: Proxy | None = setting(_a_proxy, None)  # noqa: RUF009 - a field
    # Names, .suffixes and networks that are dialled directly all the same.
    no_proxy: Sequence[str] = setting(
        list_of(_a_direct_host, 1000), ["localhost", "127.0.0.0/8", "::1/128"]
    )
    ca_bundle: str | None = setting(_authorities, None)  # None: that of requests.
    # By the host of a URL, the file with what it is shown when it asks for a certificate.
    client_certificates: Mapping[str, str] = setting(
        mapping_of(_a_host, _a_client_certificate, 100), {}
    )


@dataclass(frozen=True, kw_only=True)
class RetentionSettings:
    """retention: how much of the history is kept."""

    executions_per_job: int = setting(a_number(1, 100_000), 1000)
    versions_per_job: int = setting(a_number(1, 100_000), 100)
    max_age: int = setting(microseconds("1h", "87600h"), "720h")  # µs
    max_size: int = setting(_a_size, "1GB")  # Bytes of history, as Execution.width has them.


@dataclass(frozen=True, kw_only=True)
class AuthSettings:
    """auth: who may sign in."""

    type: str = setting(one_of("none", "basic"), "none")
    users: Mapping[str, str] = setting(mapping_of(a_user_name, _a_password_hash, 1000), {})
    viewers: Sequence[str] = setting(list_of(a_text(256), 1000), [])  # Those who may only read.


@dataclass(frozen=True, kw_only=True)
class AlertSettings:
    """alerts: who is told when jobs turn bad, and when they are well again."""

    # The form of a job's webhook, without a body; None: nobody is told.
    webhook: Json | None = setting(a_webhook(ALERT_FIELDS), None)  # noqa: RUF009 - a field
    after: int = setting(a_number(1, 100), 1)  # So many failed or missed runs in a row.


@dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """metrics: who may read GET /metrics."""

    public: bool = setting(a_boolean, False)  # True: everybody.


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """logging: what is logged, and in which form."""

    level: str = setting(one_of("debug", "info", "warning", "error"), "info")
    format: str = setting(one_of("text", "json"), "text")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, checked and complete. Nobody changes them, nor the lists that they hold."""

    server: ServerSettings
    cluster: ClusterSettings
    store: StoreSettings
    scheduler: SchedulerSettings
    dispatcher: DispatcherSettings
    retention: RetentionSettings
    auth: AuthSettings
    alerts: AlertSettings
    metrics: MetricsSettings
    logging: LoggingSettings
    jobs: Mapping[str, Declaration] = setting(_a_list_of_objects, [])  # By the id of the job.

    def value(self, key: str) -> Any:
        """Return one setting by its dotted key, such as dispatcher.connect_timeout."""
        found: Any = self
        for name in key.split("."):
            found = getattr(found, name)
        return found

    def replaced(self, key: str, value: Any) -> Settings:
        """Return settings with another value of one dotted key, which nobody checks."""
        changed = value
        while "." in key:  # From the inside out: each section is made anew around the change.
            section, _dot, name = key.rpartition(".")
            changed = dataclasses.replace(self.value(section), **{name: changed})
            key = section
        return dataclasses.replace(self, **{key: changed})

    def reloaded(self, fresh: Settings) -> tuple[Settings, list[str]]:
        """Return what a SIGHUP applies, and the keys that differ but take a restart.

        Jobs, auth, alerts and logging.level come from ``fresh``, everything else stays.
        """
        applied = dataclasses.replace(
            self,
            jobs=fresh.jobs,
            auth=fresh.auth,
            alerts=fresh.alerts,
            logging=dataclasses.replace(self.logging, level=fresh.logging.level),
        )
        need_restart = [key for key in SETTINGS if applied.value(key) != fresh.value(key)]
        return applied, need_restart


def _settings_of(kind: type, prefix: str = "") -> dict[str, Field]:
    """Return the settings of a section and the sections inside it, by their dotted keys."""
    table: dict[str, Field] = {}
    types = get_type_hints(kind)
    for member in dataclasses.fields(kind):
        key = prefix + member.name
        if "setting" in member.metadata:
            table[key] = member.metadata["setting"]
        else:
            table |= _settings_of(types[member.name], f"{key}.")
    return table


# Every setting by its dotted key. Other than in the tables of section 6, the defaults are as the
# file would say them, and go through the checks.
SETTINGS = _settings_of(Settings)


def build_settings(values: Mapping[str, Any]) -> Settings:
    """Return settings of what a file says by dotted keys, with the defaults of everything else.

    A value None means the default. cluster.data_dir stays as it is. Raises InvalidFields.
    """
    given = dict(values)
    for key, declared in SETTINGS.items():
        if given.get(key) is None:
            given[key] = declared.default
    checked = validate(SETTINGS, given)

    complete = dict(checked)
    per_host = checked["dispatcher.max_concurrent_per_host"]
    if per_host is None:
        per_host = max(1, checked["dispatcher.max_concurrent_jobs"] * 3 // 4)
    complete["dispatcher.max_concurrent_per_host"] = per_host
    retry = checked["scheduler.default_retry_policy"]
    complete["jobs"] = _declarations(checked["jobs"], retry)
    settings: Settings = _build_section(Settings, "", complete)
    return settings


def _build_section(kind: type, prefix: str, values: Json) -> Any:
    """Return the dataclass of a section, filled from values by their dotted keys."""
    members: Json = {}
    types = get_type_hints(kind)
    for member in dataclasses.fields(kind):
        key = prefix + member.name
        if "setting" in member.metadata:
            members[member.name] = values[key]
        else:
            members[member.name] = _build_section(types[member.name], f"{key}.", values)
    return kind(**members)


def check_access(settings: Settings) -> None:
    """Raise InvalidFields where nobody could come in, or everybody without being meant to."""
    users = settings.auth.users
    address = settings.server.http.address
    host, _port = split_address(address)
    is_local = re.fullmatch(r"localhost|127(\.[0-9]+){3}|::1", host)
    if settings.auth.type == "basic":
        unknown_viewers = set(settings.auth.viewers) - users.keys()
        if not users or unknown_viewers:
            problem = "must name somebody, and everybody in auth.viewers"
            raise InvalidFields([("auth.users", problem)])
    elif users:
        raise InvalidFields([("auth.type", "must be basic where auth.users names somebody")])
    elif not is_local and not settings.server.allow_unauthenticated:
        ways_out = "auth.type: basic and auth.users, or server.allow_unauthenticated: true"
        problem = f"{address} lets everybody in: set {ways_out}"
        raise InvalidFields([("server.http.address", problem)])


# --- Declared jobs ---

MAX_DECLARED_JOBS = 10_000


def _declarations(jobs: list[Json], retry: Mapping[str, Any]) -> dict[str, Declaration]:
    """Return each declared job by its id, in the order of the file.

    ``retry`` completes their retry policies. Raises InvalidFields with what is wrong in any.
    """
    if len(jobs) > MAX_DECLARED_JOBS:
        raise InvalidFields([("jobs", f"must be a list of at most {MAX_DECLARED_JOBS} jobs")])
    found: dict[str, Declaration] = {}
    problems: list[tuple[str, str]] = []
    for number, data in enumerate(jobs, 1):
        try:
            declaration = _declaration(data, retry)
            name = declaration.config["name"]
            job_id = str(uuid.uuid5(DECLARED_IDS, name))
            if job_id in found:
                raise InvalidFields([("name", f"{name!r} is there twice")])
            if declaration.problem:
                declaration = declaration._replace(problem=f"jobs.{number}.{declaration.problem}")
            found[job_id] = declaration
        except InvalidFields as error:
            problems += [(f"jobs.{number}.{path}", message) for path, message in error.problems]
    if problems:
        raise InvalidFields(problems)
    return found


def _declaration(data: Json, retry: Mapping[str, Any]) -> Declaration:
    """Return one declared job, enabled unless it says otherwise. Raises InvalidFields."""
    given = data
    if data.get("enabled") is None:
        given = data | {"enabled": True}
    validated = functools.partial(validate_job, retry=retry, now=None, no_id=NO_ID_IN_FILE)
    problem = ""
    try:
        # No instant is too old: a job stays declared after its @at.
        config, enabled = validated(given)
    except InvalidFields as error:
        if [path for path, _message in error.problems] != ["timezone"]:
            raise
        problem = str(error)  # Whether that is a mistake depends on what the database has.
        config, enabled = validated(given | {"timezone": "UTC"})
    written = json.dumps(data, sort_keys=True)
    return Declaration(config, enabled, hashlib.sha256(written.encode()).hexdigest(), problem)


def check_declarations(jobs: Iterable[Declaration]) -> None:
    """Raise StartError with up to three lines if the time zones of any of these are not there."""
    problems = [declaration.problem for declaration in jobs if declaration.problem]
    if problems:
        raise StartError(EXIT_CONFIG, "\n".join(problems[:3]))


# --- YAML ---


# In C where PyYAML was built with libyaml: seven times faster.
YAML_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class Document(NamedTuple):
    """What a YAML document says, and where."""

    data: Any
    lines: dict[str, int]  # ``.dotted.path`` -> line, from 1. The path of the whole is empty.
    variables: set[str]  # The names that its ``${NAME}`` take from the environment.


def read_yaml(content: str, environment: Mapping[str, str]) -> Document:
    """Return a YAML document as plain data, and the line of each ``.dotted.path`` in it.

    Words are as in JSON: no octals, dates, ``yes``; ``${NAME}`` is replaced from the
    environment. Items of lists count from 1. Raises ValueError with the line.
    """
    reader = YamlReader(environment)
    try:
        # Event by event, in one go: other threads get their turn, however large the file is.
        for event in yaml.parse(content, YAML_LOADER):
            reader.take(event)
    except yaml.YAMLError as error:
        place = ""
        mark = getattr(error, "problem_mark", None)
        if mark:
            place = f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or "this is not YAML"
        hint = 'a value with ":", "#", "@" or "*" wants quotes'
        raise ValueError(f"{place}{problem} ({hint})") from error
    return Document(reader.data, reader.lines, reader.variables)


@dataclass(slots=True)
class YamlContainer:
    """A list or mapping that is being read."""

    items: Any  # A list or a dict.
    path: str
    key: str | None = None  # Of a mapping: whose value comes next; None: a key does.


class YamlReader:
    """Turns the events of one YAML document into plain data. The attributes: see Document."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment`` has the values of ``${NAME}``."""
        self.data: Any = None
        self.lines: dict[str, int] = {}
        self.variables: set[str] = set()
        self._environment = environment
        self._documents = 0
        self._open: list[YamlContainer] = []  # Those around what comes next, the outermost first.

    def take(self, event: Any) -> None:
        """Take the next event of PyYAML's parser. Raises ValueError with the line."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self._take_scalar(event, line)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._begin([], event, line)
        elif isinstance(event, yaml.MappingStartEvent):
            self._begin({}, event, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
        elif isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line}: aliases are not supported")
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise ValueError(f"line {line}: a second document begins")

    def _begin(self, items: Any, event: Any, line: int) -> None:
        """Begin to read a list or a mapping."""
        if len(self._open) >= MAX_NESTING:
            raise ValueError(f"line {line}: it is nested deeper than {MAX_NESTING} levels")
        self._check_tag(event, line)
        path = self._add(items, line)
        self._open.append(YamlContainer(items, path))

    def _take_scalar(self, event: Any, line: int) -> None:
        """Take a key or a value."""
        around = self._open[-1] if self._open else None
        if around is None or isinstance(around.items, list) or around.key is not None:
            self._add(self._value_of(event, line), line)
            return
        if event.value in around.items:
            raise ValueError(f"line {line}: {event.value!r} is there twice")
        around.key = event.value

    def _add(self, value: Any, line: int) -> str:
        """Put a value where it belongs, and return its path."""
        path = ""
        if not self._open:
            self.data = value
        else:
            around = self._open[-1]
            if isinstance(around.items, list):
                around.items.append(value)
                path = f"{around.path}.{len(around.items)}"
            elif around.key is not None:
                around.items[around.key] = value
                path = f"{around.path}.{around.key}"
                around.key = None
            else:
                raise ValueError(f"line {line}: a list or a mapping cannot be a key")
        self.lines[path] = line
        return path

    def _check_tag(self, event: Any, line: int) -> None:
        """Refuse tags that would make something else of a value."""
        if event.tag is not None and event.tag not in YAML_TAGS:
            raise ValueError(f"line {line}: the tag {event.tag} is not supported")

    def _value_of(self, event: Any, line: int) -> Any:
        """Return what JSON would read, where it is not in quotes and can be; otherwise a text."""
        self._check_tag(event, line)
        text: str = event.value
        if "${" in text:
            text = self._with_variables(text, line)
        is_quoted = bool(event.style)
        if is_quoted or text != event.value:
            return text  # What comes from the environment is a text, whatever it looks like.
        if text in ("", "~"):
            return None
        if text[0] in "-0123456789tfn":  # Nothing else that is not in quotes is of JSON.
            with contextlib.suppress(ValueError):
                return json.loads(text, parse_constant=str)
        return text

    def _with_variables(self, text: str, line: int) -> str:
        """Return a text with ``${NAME}`` replaced. Raises ValueError."""

        def variable(match: re.Match[str]) -> str:
            name = match[1]
            if name not in self._environment:
                raise ValueError(f"line {line}: the environment variable {name} is not set")
            self.variables.add(name)
            return self._environment[name]

        return re.sub(r"\$\{([A-Za-z_]\w*)\}", variable, text)


# Those that say what is so anyway.
YAML_TAGS = ("!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")))


# --- Loading ---

# Settings that name files; like cluster.data_dir they count from the directory of chronos.yaml.
FILE_SETTINGS = ("dispatcher.ca_bundle", "dispatcher.client_certificates")

VARIABLES = {"CHRONOS_" + key.replace(".", "_").upper(): key for key in SETTINGS}

# Kubernetes and Docker set these where a service or container is called chronos.
_FOREIGN_VARIABLE = re.compile(
    "CHRONOS_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)"
)


def load_settings(path: Path | None, environment: Mapping[str, str]) -> Settings:
    """Return the settings of environment, file (None: there is no file) and defaults.

    Raises StartError with up to three lines that say what is wrong, and where it is written.
    """
    document = Document({}, {}, set())
    if path is not None:
        document = _read_file(path, environment)
    overriding = _read_variables(environment, document.variables)
    values = dict(_flatten(document.data)) | overriding
    directory = (path or Path(__file__)).parent.resolve()
    for key in FILE_SETTINGS:
        values[key] = _in_directory(directory, values.get(key))

    def with_place(key: str, message: str) -> str:
        return f"{_place_of(key, path, document.lines, overriding)}{key} {message}"

    try:
        settings = build_settings(values)
        check_access(settings)
    except InvalidFields as error:
        sentences = [with_place(key, message) for key, message in error.problems[:3]]
        raise StartError(EXIT_CONFIG, "\n".join(sentences)) from error
    jobs = dict(settings.jobs)
    for job_id, declaration in jobs.items():
        if declaration.problem:
            key, _blank, message = declaration.problem.partition(" ")
            jobs[job_id] = declaration._replace(problem=with_place(key, message))
    settings = settings.replaced("jobs", jobs)
    data_dir = directory / settings.cluster.data_dir
    return settings.replaced("cluster.data_dir", str(data_dir))


def _in_directory(directory: Path, value: Any) -> Any:
    """Return a path, or each one of a mapping, as it is seen from a directory."""
    if isinstance(value, dict):
        return {name: _in_directory(directory, path) for name, path in value.items()}
    if isinstance(value, str):
        return str(directory / value)
    return value  # It is none, and the check of the setting says so.


def _read_file(path: Path, environment: Mapping[str, str]) -> Document:
    """Return what a file says; its data is a dict. Raises StartError."""
    try:
        document = read_yaml(path.read_text("utf-8"), environment)
        if document.data is None:
            document = document._replace(data={})
        if not isinstance(document.data, dict):
            raise ValueError("must be a mapping of sections, such as server: …")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(EXIT_CONFIG, f"{path}: {reason}") from error
    return document


def _read_variables(environment: Mapping[str, str], used: set[str]) -> Json:
    """Return the settings in the environment by dotted keys, each read as a YAML scalar.

    ``used`` are the names that the file refers to. Raises StartError, also where a name is of no
    setting: nobody sets one that is to do nothing.
    """
    values: Json = {}
    for name, text in environment.items():
        if name in VARIABLES and text:
            try:
                values[VARIABLES[name]] = read_yaml(text, environment).data
            except ValueError as error:
                raise StartError(EXIT_CONFIG, f"{name}: {error}") from error
        is_ours = name.startswith("CHRONOS_") and not _FOREIGN_VARIABLE.fullmatch(name)
        if is_ours and name not in VARIABLES and name not in used:
            message = f"the environment variable {name[:100]} names no setting"
            nearest = difflib.get_close_matches(name, VARIABLES, 1)
            if nearest:
                message += f" (did you mean {nearest[0]}?)"
            raise StartError(EXIT_CONFIG, message)
    return values


def _flatten(data: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting that the sections of a file name."""
    for name, value in data.items():
        key = prefix + name
        is_section = any(known.startswith(f"{key}.") for known in SETTINGS)
        is_empty = value is None or value == {}
        if key not in SETTINGS and isinstance(value, dict) and not is_empty:
            yield from _flatten(value, f"{key}.")
        elif not (is_section and is_empty):
            yield key, value


def _place_of(
    key: str, path: Path | None, lines: Mapping[str, int], overriding: Mapping[str, Any]
) -> str:
    """Return the place of a key, or of the closest part around it that is written somewhere."""
    for variable, setting_key in VARIABLES.items():
        if setting_key in overriding and f"{key}.".startswith(f"{setting_key}."):
            return f"{variable}: "
    around = f".{key}"
    while around and around not in lines:
        around = around.rpartition(".")[0]
    if around not in lines:
        return ""
    return f"{path}: line {lines[around]}: "


# ======================================================================================
# 8. Policies: what follows from what has happened, as pure functions
# ======================================================================================
#
# Nothing here knows a clock, a thread, the database or a network: everything that a decision
# depends on is handed in, so each can be tested by a table.


def retry_wait(policy: Json, attempt: int, retry_after: int | None) -> int:
    """Return how long to wait before the next attempt, in µs.

    ``attempt`` is the number of the attempt that has just failed, from 1. With the defaults the
    waits are 1 s, 2 s, 4 s … and at most 1 minute; ``retry_after`` (µs; None: the answer did not
    ask) is waited for in any case.
    """
    first = parse_duration(policy["initial_interval"])
    most = parse_duration(policy["max_interval"])
    exponent = min(attempt - 1, 100)  # The power of a float must not overflow.
    grown = first * policy["multiplier"] ** exponent
    return max(int(min(grown, most)), retry_after or 0)


def parse_retry_after(value: str | None, now: int) -> int | None:
    """Return the µs that a ``Retry-After`` header asks to wait (RFC 9110, 10.2.3).

    It is a number of seconds, or a date, which ``now`` is subtracted from. None: there is no such
    header, or it is neither.
    """
    value = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return int(value) * SECOND
    try:
        moment = parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0, to_instant(moment) - now)
    except (ValueError, IndexError, OverflowError):
        return None


def _with_attempt(attempt_log: str, outcome: Outcome) -> str:
    """Return the log of an execution's attempts (JSON) with the one that has just ended."""
    entry = {
        "number": outcome.execution.attempts,
        "started_at": format_time(outcome.started_at),
        "duration": nanoseconds(outcome.duration),
        "status_code": outcome.status_code,
        "error": outcome.error,
    }
    entries = json.loads(attempt_log)
    entries.append(entry)
    return json.dumps(entries)


def another_attempt_may_help(outcome: Outcome) -> bool:
    """Say whether an outcome that is no success is worth another attempt.

    No answer, 429 (Too Many Requests) and 5xx may pass; any other answer is meant as it is, and a
    target that is blocked or a time limit that is used up stays so.
    """
    if outcome.reason in (Reason.NO_ANSWER, Reason.INTERRUPTED):
        return True
    status_code = outcome.status_code or 0
    return status_code == 429 or status_code >= 500


def after_attempt(outcome: Outcome, retry: Json, timeout: int, ended_at: int) -> Execution:
    """Return what becomes of an execution: success, failed, or pending again with a due_at.

    ``retry`` is its retry_policy; ``timeout`` (µs) is for its attempts and the waits between them
    together; ``ended_at`` is when the attempt ended, by the wall clock of now.
    """
    execution = outcome.execution
    spent = execution.spent + outcome.duration
    after = execution._replace(
        status=Status.SUCCESS if outcome.success else Status.FAILED,
        due_at=None,
        spent=spent,
        completed_at=ended_at,
        reason=outcome.reason,
        error=outcome.error,
        status_code=outcome.status_code,
        attempt_log=_with_attempt(execution.attempt_log, outcome),
        response=outcome.response,
    )
    is_last = execution.attempts >= retry["max_attempts"]
    if outcome.success or is_last or not another_attempt_may_help(outcome):
        return after
    if outcome.reason == Reason.INTERRUPTED:
        wait = 0  # We broke it off ourselves, so the target is not to be spared.
    else:
        wait = retry_wait(retry, execution.attempts, outcome.retry_after)
    if spent + wait >= timeout:
        error = f"{outcome.error}; no time is left to try again"
        if wait == outcome.retry_after:
            error += f", as it asked to wait {math.ceil(wait / SECOND)} s"
        return after._replace(reason=Reason.TIMEOUT, error=error)
    return after._replace(
        status=Status.PENDING,
        due_at=ended_at + wait,
        spent=spent + wait,
        completed_at=None,
        reason=None,
    )


def ended(execution: Execution, status: Status, reason: Reason, error: str, now: int) -> Execution:
    """Return the execution as one that has ended for a reason that is not its own.

    Where it runs, its attempt is broken off by that, and in its log like any other.
    """
    if execution.status == Status.RUNNING:
        started_at = execution.attempt_at or now
        duration = max(0, now - started_at)  # By the wall clock, which may have gone back.
        broken_off = Outcome(execution, started_at, duration, ended_at_mono=0, error=error)
        execution = execution._replace(
            spent=execution.spent + duration,
            attempt_log=_with_attempt(execution.attempt_log, broken_off),
        )
    return execution._replace(
        status=status,
        due_at=None,
        completed_at=now,
        reason=reason,
        error=error,
    )


def interruption(execution: Execution, now: int, mono: int) -> Outcome:
    """Return how the attempt ended that a process had left running when it ended.

    ``now`` is an instant of the wall clock, ``mono`` one of the monotonic clock.
    """
    return Outcome(
        execution=execution,
        started_at=execution.attempt_at or now,
        duration=0,
        ended_at_mono=mono,
        reason=Reason.INTERRUPTED,
        error="the server ended during the attempt: its outcome is unknown",
    )


def attempt_limit(timeout: int, attempt_timeout: int, spent: int) -> tuple[int, CutReason]:
    """Return how long the next attempt may take, in µs, and what it means if that is over.

    ``timeout`` is for the whole execution, of which ``spent`` is used up; ``attempt_timeout`` is
    for each attempt.
    """
    left = timeout - spent
    if attempt_timeout < left:
        return attempt_timeout, CutReason.ATTEMPT_TIMEOUT
    return left, CutReason.TIMEOUT


def catch_up_limit(missed_run_policy: str) -> int:
    """Return how many of a job's missed fire times are made up for, the newest ones."""
    limits = {"ignore": 0, "execute_one": 1, "execute_all": MAX_CATCH_UP}
    return limits[missed_run_policy]


class TargetLimits:
    """Which due executions may start, so that one dead endpoint can't hold all the workers."""

    def __init__(self, running: Iterable[str], most: int) -> None:
        """``running`` are the targets of what runs now, ``most`` is how many one may hold."""
        self._most = most
        self._held = Counter(running)
        self.full = {target for target, held in self._held.items() if held >= most}

    def has_room(self, target: str) -> bool:
        """Say whether one more may start; a target that is found full is noted in ``full``."""
        if self._held[target] < self._most:
            return True
        self.full.add(target)
        return False

    def hold(self, target: str) -> None:
        """Count one more that runs."""
        self._held[target] += 1


# ======================================================================================
# 9. Schema and migrations: what the database holds, and how an older one becomes like it
# ======================================================================================
#
# Texts of SQL and no decisions. Nobody but Database.open() in the next section runs them.
# Instants and durations are in µs; the classes Job and Execution say what their columns mean.
# The CHECKs hold what every other section takes for granted. They use no IN: for each row that
# is written SQLite would build the list anew, which costs as much as a third of the write.

APPLICATION_ID = 1130918511  # "Chro", in the header of the file.
SCHEMA_VERSION = 2  # In the header, too, as user_version; 1 was that of Chronos 0.1.0.

SCHEMA = """
CREATE TABLE meta (                      -- numbers that outlive the process, such as last_seen
    key           TEXT NOT NULL PRIMARY KEY,
    value         INTEGER NOT NULL
);
CREATE TABLE jobs (
    seq           INTEGER PRIMARY KEY,   -- order of creation; 0: the built-in one of the alerts
    id            TEXT NOT NULL UNIQUE,  -- a UUID
    version       INTEGER NOT NULL,
    enabled       BOOLEAN NOT NULL,
    created_at    INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL,
    next_run_at   INTEGER,
    invalid_from  INTEGER,
    strip         TEXT NOT NULL,
    failures      INTEGER NOT NULL,
    failing_since INTEGER,
    declared      TEXT,
    is_bad        BOOLEAN NOT NULL,      -- what the alerts have told, or are about to tell
    news_at       INTEGER,               -- since when that is news; NULL: it is told
    name          TEXT NOT NULL,         -- of the newest configuration
    history_bytes INTEGER NOT NULL DEFAULT 0,  -- the width of its ended executions together
    may_give      BOOLEAN NOT NULL DEFAULT FALSE  -- an end has come since no more of that could go
);
CREATE INDEX jobs_history ON jobs (may_give, history_bytes) WHERE history_bytes > 0;
CREATE INDEX jobs_news ON jobs (news_at) WHERE news_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (next_run_at) WHERE next_run_at IS NOT NULL;
CREATE TABLE job_tags (                  -- of the newest configuration
    job_id        TEXT NOT NULL,
    name          TEXT NOT NULL,
    value         TEXT NOT NULL,
    PRIMARY KEY (job_id, name)
);
CREATE TABLE job_search (                -- apart from jobs, so that those are quick to count
    job_id        TEXT NOT NULL PRIMARY KEY,
    words         TEXT NOT NULL          -- search_words() of the newest configuration
);
CREATE TABLE versions (
    job_id        TEXT NOT NULL,
    version       INTEGER NOT NULL,
    config        TEXT NOT NULL,         -- JSON, in the form of the API
    created_at    INTEGER NOT NULL,
    created_by    TEXT NOT NULL,
    PRIMARY KEY (job_id, version)
);
CREATE TABLE executions (
    seq           INTEGER PRIMARY KEY,   -- order of creation
    id            TEXT NOT NULL UNIQUE,  -- one per fire time, whatever crashes or restarts
    job_id        TEXT NOT NULL,
    job_version   INTEGER NOT NULL,
    trigger       TEXT NOT NULL,
    status        TEXT NOT NULL,
    scheduled_at  INTEGER NOT NULL,
    target        TEXT NOT NULL,
    due_at        INTEGER,
    attempts      INTEGER NOT NULL,
    spent         INTEGER NOT NULL,
    started_at    INTEGER,
    attempt_at    INTEGER,
    completed_at  INTEGER,
    reason        TEXT,
    error         TEXT,
    status_code   INTEGER,
    node_id       TEXT,
    replay_of     TEXT,
    missed_count  INTEGER,
    missed_from   INTEGER,
    missed_to     INTEGER,
    width         INTEGER NOT NULL,      -- bytes that it takes, also before it has ended
    attempt_log   TEXT NOT NULL,         -- JSON
    response      TEXT,
    CONSTRAINT known_trigger CHECK (
        trigger = 'schedule' OR trigger = 'catch_up' OR trigger = 'manual'
        OR trigger = 'replay' OR trigger = 'alert'),
    CONSTRAINT status_fits_times CHECK (
        CASE status
        WHEN 'pending' THEN completed_at IS NULL
        WHEN 'running' THEN completed_at IS NULL AND due_at IS NULL
        WHEN 'success' THEN completed_at IS NOT NULL AND due_at IS NULL
        WHEN 'failed'  THEN completed_at IS NOT NULL AND due_at IS NULL
        WHEN 'skipped' THEN completed_at IS NOT NULL AND due_at IS NULL
        ELSE FALSE END),
    CONSTRAINT missed_is_whole CHECK (
        (missed_count IS NULL) = (missed_from IS NULL)
        AND (missed_count IS NULL) = (missed_to IS NULL))
);
CREATE INDEX executions_of_job ON executions (job_id, seq);
CREATE INDEX executions_due ON executions (due_at, seq, target) WHERE status = 'pending';
CREATE INDEX executions_of_target ON executions (target, due_at, seq) WHERE status = 'pending';
CREATE INDEX executions_active ON executions (job_id, seq) WHERE status IN ('pending', 'running');
CREATE INDEX executions_listed ON executions (status, seq)
    WHERE status = 'running' OR status = 'failed' OR status = 'skipped';
CREATE INDEX executions_failed ON executions (job_id, seq) WHERE status = 'failed';
CREATE TABLE ends (                      -- how many executions ended in an hour, and how
    hour          INTEGER NOT NULL,      -- hours since the epoch
    letter        TEXT NOT NULL,         -- one of ENDINGS
    number        INTEGER NOT NULL,
    PRIMARY KEY (hour, letter)
);
CREATE VIEW stored_versions AS           -- config as bytes: damage need not be UTF-8
    SELECT job_id, version, CAST(config AS BLOB) AS config, created_at, created_by FROM versions;
CREATE VIEW configured_jobs AS           -- config NULL: it is lost, the job is there all the same
    SELECT jobs.*, stored_versions.config FROM jobs
      LEFT JOIN stored_versions
        ON stored_versions.job_id = jobs.id AND stored_versions.version = jobs.version
     WHERE jobs.version > 0;
CREATE VIEW named_executions AS
    SELECT executions.*, jobs.name AS job_name FROM executions
      JOIN jobs ON jobs.id = executions.job_id;
CREATE VIEW pending AS SELECT * FROM executions WHERE status = 'pending';
CREATE VIEW active AS SELECT * FROM executions WHERE status IN ('pending', 'running');
"""

# They came after files of this schema were written, so every start sees to them.
LATER_INDEXES = """
CREATE INDEX IF NOT EXISTS executions_successful ON executions (status, seq)
    WHERE status = 'success';
CREATE INDEX IF NOT EXISTS jobs_named ON jobs (name, seq);
CREATE INDEX IF NOT EXISTS executions_scheduled ON executions (scheduled_at, seq);
CREATE INDEX IF NOT EXISTS executions_reason ON executions (reason, seq, scheduled_at, missed_from)
    WHERE reason IS NOT NULL;
"""

# The job whose executions are the alerts is there from the start; its versions come with them.
ALERTS_JOB = """
INSERT INTO jobs (seq, id, version, enabled, created_at, updated_at, strip, failures, declared,
                  is_bad, name)
VALUES (0, :id, 0, FALSE, 0, 0, '', 0, :declared, FALSE, 'alerts')
"""

# Execution.width, less its response.
BARE_WIDTH = f"{EXECUTION_BYTES} + length(attempt_log)"

SCHEMA_1_ASIDE = """
DROP VIEW configured_jobs;
DROP VIEW named_executions;
DROP VIEW pending;
DROP VIEW active;
DROP INDEX jobs_news;
DROP INDEX jobs_due;
DROP INDEX executions_of_job;
DROP INDEX executions_due;
DROP INDEX executions_of_target;
DROP INDEX executions_active;
DROP INDEX executions_listed;
DROP INDEX executions_failed;
ALTER TABLE meta RENAME TO old_meta;
ALTER TABLE jobs RENAME TO old_jobs;
ALTER TABLE versions RENAME TO old_versions;
ALTER TABLE executions RENAME TO old_executions;
ALTER TABLE ends RENAME TO old_ends;
"""

# Schema 1 kept name and tags in the JSON alone, and the due_at of what is running. A version that
# is damaged stays so: its job is there, and waits for a better one.
FROM_SCHEMA_1 = f"""
CREATE VIEW readable_versions AS
    SELECT * FROM old_versions WHERE json_valid(config) AND json_type(config, '$.name') = 'text';
INSERT INTO meta (key, value) SELECT key, value FROM old_meta;
INSERT INTO versions (job_id, version, config, created_at, created_by)
SELECT job_id, version, config, created_at, created_by FROM old_versions;
INSERT INTO jobs (seq, id, version, enabled, created_at, updated_at, next_run_at, strip, failures,
                  failing_since, declared, is_bad, news_at, name)
SELECT job.seq, job.id, job.version, job.enabled, job.created_at, job.updated_at, job.next_run_at,
       job.strip, job.failures, job.failing_since, job.declared, job.is_bad, job.news_at,
       coalesce(json_extract(newest.config, '$.name'), CASE job.seq WHEN 0 THEN 'alerts'
                                                       ELSE job.id END)
  FROM old_jobs AS job
  LEFT JOIN readable_versions AS newest ON newest.job_id = job.id AND newest.version = job.version
 ORDER BY job.seq;
INSERT INTO job_search (job_id, words)
SELECT newest.job_id, search_words(json_extract(newest.config, '$.name'),
                                   json_extract(newest.config, '$.description'))
  FROM old_jobs AS job
  JOIN readable_versions AS newest ON newest.job_id = job.id AND newest.version = job.version
 ORDER BY job.seq;
INSERT INTO job_tags (job_id, name, value)
SELECT newest.job_id, tag.key, tag.value
  FROM old_jobs AS job
  JOIN readable_versions AS newest ON newest.job_id = job.id AND newest.version = job.version,
       json_each(newest.config, '$.tags') AS tag;
INSERT INTO executions (seq, id, job_id, job_version, trigger, status, scheduled_at, target, due_at,
                        attempts, spent, started_at, attempt_at, completed_at, reason, error,
                        status_code, node_id, replay_of, missed_count, missed_from, missed_to,
                        width, attempt_log, response)
SELECT seq, id, job_id, job_version, trigger, status, scheduled_at, target,
       CASE WHEN status = 'pending' THEN due_at END,
       attempts, spent, started_at, attempt_at, completed_at, reason, error,
       status_code, node_id, replay_of, missed_count, missed_from, missed_to,
       {BARE_WIDTH} + coalesce(length(CAST(response AS BLOB)), 0),
       attempt_log, response
  FROM old_executions ORDER BY seq;
UPDATE jobs
   SET history_bytes = (SELECT coalesce(sum(width), 0) FROM executions
                         WHERE job_id = jobs.id AND completed_at IS NOT NULL);
UPDATE jobs SET may_give = TRUE WHERE history_bytes > 0;
INSERT INTO ends (hour, letter, number) SELECT hour, letter, number FROM old_ends;
DROP VIEW readable_versions;
DROP TABLE old_meta;
DROP TABLE old_jobs;
DROP TABLE old_versions;
DROP TABLE old_executions;
DROP TABLE old_ends;
"""  # noqa: S608

# What brings a file of an older schema to the newest one, in one step. The next schema adds an
# entry for the one before it, and adapts the entries that are there to its new SCHEMA. Besides
# SQLite's own functions the statements may call search_words().
MIGRATIONS: dict[int, str] = {
    1: SCHEMA_1_ASIDE + SCHEMA + FROM_SCHEMA_1,
}
assert MIGRATIONS.keys() == set(range(1, SCHEMA_VERSION)), "an older schema has no way to this one"


def split_script(script: str) -> list[str]:
    """Return the statements of a script; each ends with a semicolon at the end of its line."""
    return [statement for statement in script.split(";\n") if statement.strip()]


def search_words(name: str, description: str | None) -> str:
    """Return what the search for jobs looks through: their texts, case folded."""
    return f"{name}\n{description or ''}".casefold()


# ======================================================================================
# 10. Connections: one database file; whatever is SQLite's own stays in this section
# ======================================================================================
#
# Each thread has a connection of its own. Only the engine's thread writes, inside
# transaction(); the write-ahead log lets all others read meanwhile, each statement a state that
# was committed. No statement about jobs or executions stands here, and nothing outside of
# sections 9 to 11 calls run().


class Boundaries(NamedTuple):
    """The statements around what happens as a whole or not at all."""

    begin: str
    commit: str
    roll_back: str


class Page(NamedTuple):
    """The first rows that a SELECT finds."""

    rows: list[Row]
    has_more: bool  # It was left off because these are enough.


class ReadBound:
    """The time that one thread's statements may take; it asks is_over() while one runs."""

    def __init__(self, monotonic: Callable[[], int]) -> None:
        """``monotonic`` is a clock, in µs."""
        self._monotonic = monotonic
        self._until = 0

    def begin(self) -> None:
        """Count from now: another statement begins."""
        self._until = self._monotonic() + READ_LIMIT

    def is_over(self) -> bool:
        """Say whether the statement has taken too long."""
        return self._monotonic() > self._until


READ_STEPS = 100_000  # Of SQLite's machine, some ms: after so many it is seen if a read is over.
TRANSACTION = Boundaries("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
SAVEPOINT = Boundaries("SAVEPOINT nested", "RELEASE nested", "ROLLBACK TO nested")


class DatabaseFile:
    """The file as it lies on the disk: creating, inspecting and copying it.

    It keeps nothing open, so any thread may use it, and a process without a server, too.
    """

    def __init__(self, path: Path) -> None:
        """``path`` is absolute."""
        self.path = path

    def beside(self, suffix: str) -> Path:
        """Return the path of a file whose name is that of the database and a suffix."""
        return self.path.with_name(f"{self.path.name}{suffix}")

    def connect(self, mode: str) -> sqlite3.Connection:
        """Return a new connection, read-only ("ro") or not ("rw"); it cannot create the file."""
        place = f"{self.path.as_uri()}?mode={mode}"
        return sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False)

    # --- Creating and inspecting ---

    def ensure(self) -> None:
        """Create the file if it is missing, for nobody else to read.

        No connection may be open: whoever closes a file loses all locks on it, SQLite's as
        well. Raises StartError if it cannot be opened for writing.
        """
        with self._start_errors():
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))

    def inspect(self, wholly: bool = False) -> int:
        """Return the version of the schema in the file, 0: it is empty. The file stays as it is.

        ``wholly``: look for damage, however large the file is. Raises StartError if it cannot
        be opened, is not ours, of a newer Chronos or damaged.
        """
        # It is looked at before a connection is made, which may create the log itself.
        was_left_open = self.beside("-wal").exists()
        with self._start_errors(), contextlib.closing(self._connect_to_look()) as connection:
            version = self._recognise(connection)
            is_suspect = was_left_open or version < SCHEMA_VERSION
            is_small = self.path.stat().st_size < QUICK_CHECK_BYTES
            if version > 0 and (wholly or is_suspect or is_small):
                check_for_damage(connection)
        return version

    def _connect_to_look(self) -> sqlite3.Connection:
        """Return a connection that changes nothing, but for what a crash has left half done."""
        # A rollback journal is there only if open() was killed: it has to be played back.
        was_broken_off = self.beside("-journal").exists()
        return self.connect("rw" if was_broken_off else "ro")

    def _recognise(self, connection: sqlite3.Connection) -> int:
        """Return the version of the schema, 0: there is none yet. Raises StartError."""
        if read_pragma(connection, "schema_version") == 0:
            return 0  # No table was ever made in it.
        if read_pragma(connection, "application_id") != APPLICATION_ID:
            raise StartError(EXIT_CONFIG, f"{self.path} is not a database of Chronos")
        version = int(read_pragma(connection, "user_version"))
        if version > SCHEMA_VERSION:
            raise StartError(EXIT_CONFIG, f"{self.path} is of a newer Chronos: start that")
        return version

    @contextlib.contextmanager
    def _start_errors(self) -> Iterator[None]:
        """Turn what the system and SQLite say about the file into a StartError."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            message = f"{self.path} cannot be opened: {reason_of(error)}"
            raise StartError(EXIT_CONFIG, message) from error
        except sqlite3.DatabaseError as error:
            message = f"{self.path} is damaged ({error}): see the README, Restore a backup"
            raise StartError(EXIT_CONFIG, message) from error

    # --- Copying ---

    def backup(self, target: Path) -> None:
        """Write a checked copy to a new file, also while a server works. Raises StartError.

        A file of an older schema is copied as it is: the copy has that schema, and is migrated
        when a server opens it. A file of this name that comes meanwhile stays as it is.
        """
        try:
            if os.path.lexists(target):
                raise FileExistsError
            with self._whole_copy(target) as part:
                add_name(part, target)
        except FileExistsError:
            message = f"no backup to {target}: it is there already"
            raise StartError(EXIT_FAILED, message) from None
        except (OSError, sqlite3.Error, StartError) as error:
            message = f"no backup to {target}: {reason_of(error)}"
            raise StartError(EXIT_FAILED, message) from error

    def copy_to(self, target: Path) -> None:
        """Write what is committed to a file, replacing one of this name once it is whole.

        Nobody else may be copying to it. Raises OSError, sqlite3.Error or StartError: the copy is
        damaged.
        """
        for leftover in target.parent.glob(f"{target.name}*.part*"):
            leftover.unlink()  # Of a copy that was broken off.
        with self._whole_copy(target) as part:
            os.replace(part, target)

    @contextlib.contextmanager
    def _whole_copy(self, target: Path) -> Iterator[Path]:
        """Provide a checked copy beside ``target``, under a name that goes at the end.

        Raises what copy_to() does.
        """
        part = DatabaseFile(new_file_beside(target))
        try:
            with contextlib.closing(self.connect("ro")) as connection:
                connection.execute("VACUUM INTO ?", (str(part.path),))
            part.inspect(wholly=True)
            with open(part.path, "r+b") as file:
                os.fsync(file.fileno())
            yield part.path
        finally:
            with contextlib.suppress(OSError):
                part.path.unlink()


def new_file_beside(target: Path) -> Path:
    """Make an empty file that only its owner can read, and return its path: a name + .part.

    Nobody can have laid out a file, a link or a journal there for us to write into, and two
    copies to the same target at once have a file each. Raises OSError.
    """
    part = target.with_name(f"{target.name}.part")
    journal = target.with_name(f"{target.name}.part-journal")
    if os.path.lexists(part) or os.path.lexists(journal):
        part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
    try:
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # It has just come.
        return new_file_beside(target)
    os.close(file)
    return part


def add_name(path: Path, name: Path) -> None:
    """Give a file one more name. Raises OSError, FileExistsError where that is taken."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:  # Not every file system has links. There the name is taken before it is given.
        os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(path, name)


class Database:
    """The connections to a database file: opening and migrating it, running statements.

    attribute      written by             guarded by
    _connections   each thread            itself  (a dict; a thread touches its own key only)
    commits        the engine's thread    nothing (others read it: a number is whole)
    _inode         open()                 nothing (it stays until the next open())
    _bounds        each thread            itself  (as _connections)
    _is_closing    who stops              nothing (it is set once)
    """

    def __init__(self, path: Path, synchronous: str = "FULL") -> None:
        """``path`` is absolute; ``synchronous`` is SQLite's pragma, FULL or NORMAL."""
        self.path = path
        self.commits = 0  # So far.
        self._file = DatabaseFile(path)
        self._synchronous = synchronous
        self._connections: dict[int, sqlite3.Connection] = {}  # By threading.get_ident().
        self._inode: int | None = None  # Of the file as it was opened; None: not yet.
        self._bounds: dict[int, ReadBound] = {}  # Of the threads whose reads are bounded.
        self._is_closing = False  # Bounded reads end at once.

    # --- Opening and closing ---

    def open(self) -> None:
        """Create the file, or check it and bring it to the newest schema.

        Raises StartError: the file is not ours, damaged, of a newer schema or cannot be
        migrated, and is as it was. Raises StoreError if it cannot be written.
        """
        was_there = self.path.exists()
        self._file.ensure()
        version = self._file.inspect()
        if version == 0 and was_there:
            log.warning("%s was empty: it begins anew", self.path)
        if 0 < version < SCHEMA_VERSION:
            self._migrate(version)
        self.run("PRAGMA journal_mode = WAL")
        with self.transaction():
            if version == 0:
                self._create_schema()
            for statement in split_script(LATER_INDEXES):
                self.run(statement)
            # Also where it is right already: a file that cannot be written shows it now.
            self.run(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
        self._inode = self.path.stat().st_ino

    def close(self) -> None:
        """Close the connections of all threads; bounded reads that are under way end."""
        self.end_reads()
        while self._connections:
            _thread, connection = self._connections.popitem()
            connection.close()

    def check_file(self) -> None:
        """Raise StoreError if the file was removed or replaced: writes would go nowhere."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                return
        raise StoreError(f"{self.path} was removed or replaced: stop the server, restore it")

    def backup(self, target: Path) -> None:
        """Write a checked copy to a new file: see DatabaseFile. Raises StartError."""
        self._file.backup(target)

    # --- Schema ---

    def _create_schema(self) -> None:
        for statement in split_script(SCHEMA):
            self.run(statement)
        self.run(ALERTS_JOB, id=ALERTS_ID, declared=DECLARED_BY)
        self.run(f"PRAGMA application_id = {APPLICATION_ID:d}")

    def _migrate(self, version: int) -> None:
        """Bring a file of an older schema to the newest one, in one transaction.

        The file as it was is kept beside it, in NAME.schema-VERSION. Raises StartError: the
        file is as it was.
        """
        copy = self._file.beside(f".schema-{version}")
        log.warning("%s has schema %s of an older Chronos: migrating it", self.path, version)
        try:
            with self.transaction():  # Nobody else can write between the copy and the changes.
                self._file.copy_to(copy)
                self._run_migration(version)
        except (OSError, sqlite3.Error, StoreError, StartError) as error:
            reason = reason_of(error.__cause__ or error)
            message = (
                f"{self.path} could not be migrated from schema {version} to {SCHEMA_VERSION}: "
                f"{reason}. It is as it was. Put that right (where the disk is full, room of five "
                "times its size is enough) and start again, or start the Chronos that wrote it"
            )
            raise StartError(EXIT_CONFIG, message) from error
        log.warning("%s has schema %s now; a copy from before: %s", self.path, SCHEMA_VERSION, copy)

    def _run_migration(self, version: int) -> None:
        """Make the changes, then check them. Raises sqlite3.Error or StartError."""
        connection = self._connection
        connection.create_function("search_words", 2, search_words, deterministic=True)
        before = self._count_rows()
        for statement in split_script(MIGRATIONS[version]):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
        check_for_damage(connection)
        after = self._count_rows()
        if after != before:
            message = f"rows were lost: {after} of {before} jobs, versions and executions are left"
            raise StartError(EXIT_CONFIG, message)

    def _count_rows(self) -> list[int]:
        """Return how many jobs, versions and executions there are."""
        tables = ("jobs", "versions", "executions")
        return [self.value(f"SELECT count(*) FROM {table}") for table in tables]  # noqa: S608

    # --- Connections and statements ---

    @property
    def _connection(self) -> sqlite3.Connection:
        """The connection of the calling thread, for one statement."""
        thread = threading.get_ident()
        bound = self._bounds.get(thread)
        if bound is not None:
            bound.begin()
        connection = self._connections.get(thread)
        if connection is None:
            connection = self._file.connect("rw")
            if bound is not None:
                must_end = functools.partial(self._must_end, bound)
                connection.set_progress_handler(must_end, READ_STEPS)
            connection.row_factory = sqlite3.Row
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            self._connections[thread] = connection
        return connection

    def bound_reads(self, monotonic: Callable[[], int]) -> None:
        """Let each statement of the calling thread take READ_LIMIT at most, from its first one on.

        One that takes longer raises Unavailable, and so does this where the server stops.
        ``monotonic`` is a clock, in µs.
        """
        if self._is_closing:
            raise Unavailable("the server is stopping")
        thread = threading.get_ident()
        if thread not in self._bounds:
            self._bounds[thread] = ReadBound(monotonic)

    def end_reads(self) -> None:
        """End all bounded reads, those to come, too: nobody waits for them any more."""
        self._is_closing = True

    def _must_end(self, bound: ReadBound) -> bool:
        return self._is_closing or bound.is_over()

    def run(self, statement: str, /, **values: Any) -> list[Row]:
        """Run a statement with named parameters, return all its rows. Raises StoreError."""
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def change(self, statement: str, /, **values: Any) -> int:
        """Run an INSERT, UPDATE or DELETE, return how many rows it changed. Raises StoreError.

        The statement begins with that word: after a WITH, Python does not count.
        """
        try:
            return self._connection.execute(statement, values).rowcount
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def run_with_list(self, statement: str, items: Iterable[str], /, **values: Any) -> list[Row]:
        """Run a statement in which ``IN (:list)`` means: among these texts, however many.

        Raises StoreError.
        """
        return self.run(with_list(statement), list=json.dumps(list(items)), **values)

    def run_page(self, statement: str, items: Iterable[str], /, **values: Any) -> Page:
        """Run a statement as run_with_list() does, but leave off when PAGE_BYTES have come.

        Raises StoreError.
        """
        rows: list[Row] = []
        left = PAGE_BYTES
        texts = json.dumps(list(items))
        try:
            found = self._connection.execute(with_list(statement), values | {"list": texts})
            with contextlib.closing(found):
                for row in found:
                    rows.append(row)
                    left -= sum(len(value) for value in row if isinstance(value, str | bytes))
                    if left <= 0:
                        return Page(rows, has_more=True)
        except sqlite3.Error as error:
            raise self._store_error(error) from error
        return Page(rows, has_more=False)

    def run_many(self, statement: str, rows: Iterable[Json], /) -> None:
        """Run a statement that returns nothing once for each row of values, in their order.

        Raises StoreError.
        """
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def value(self, statement: str, /, **values: Any) -> Any:
        """Return the first column of the first row; None: there is no row. Raises StoreError."""
        rows: list[Any] = self.run(statement, **values)
        for row in rows:
            return row[0]
        return None

    @property
    def in_transaction(self) -> bool:
        """Say whether the calling thread is inside one; a full disk ends it unasked."""
        connection = self._connections.get(threading.get_ident())
        return connection is not None and connection.in_transaction

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what happens inside, or nothing of it; one inside another is undone alone.

        Raises StoreError, and whatever is raised inside.
        """
        boundaries = SAVEPOINT if self.in_transaction else TRANSACTION
        self.run(boundaries.begin)
        try:
            yield
            self.run(boundaries.commit)
        except BaseException:
            if self.in_transaction:
                self.run(boundaries.roll_back)
            raise
        if boundaries is TRANSACTION:
            self.commits += 1

    def _store_error(self, error: sqlite3.Error) -> ApiError:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            if self._is_closing:
                return Unavailable("the server is stopping")
            return Unavailable(f"to read that took more than {READ_LIMIT // SECOND} s")
        return StoreError(f"the database failed: {error} ({self.path})")


def with_list(statement: str) -> str:
    """Return a statement whose ``IN (:list)`` means: among the texts of a list in JSON."""
    # One parameter that holds them all: SQLite takes no more than 32,766 parameters.
    return statement.replace("IN (:list)", "IN (SELECT value FROM json_each(:list))")


def read_pragma(connection: sqlite3.Connection, name: str) -> Any:
    """Return a value of the file's header, such as user_version. Raises sqlite3.Error."""
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return value


def check_for_damage(connection: sqlite3.Connection) -> None:
    """Read the whole file; raise sqlite3.DatabaseError, which says what is wrong, if anything."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found.splitlines()[-1])


def reason_of(error: BaseException) -> str:
    """Return what the system, SQLite or we say is wrong, without Python's words around it."""
    return str(getattr(error, "strerror", None) or error)


# ======================================================================================
# 11. Store: every statement about jobs and executions is in this section
# ======================================================================================
#
# Methods take and return records, never rows, and decide nothing. The engine's thread calls
# those that write, inside Database.transaction(): a turn is one commit. Any thread may read.
# The statements are such that SQLite and PostgreSQL take them, with few exceptions that say so;
# a list of ids is written IN (:list), see Database.run_with_list().
#
#     JobTable         jobs, their versions and tags
#     ExecutionTable   the queue, and what became of it
#     History          how executions ended, in numbers; the removal of old ones
#     News             which jobs have turned bad or well, for the alerts
#     Store            all of them, and the statements that are about more than one

NO_LIMIT = 2**63 - 1  # As a LIMIT, and as a seq that no row reaches.
NO_HOUR = 0  # In 1970: what ended then counts in the sum of all hours only.

JOB_COLUMNS = ", ".join(Job._fields)
EXECUTION_COLUMNS = ", ".join(STORED_FIELDS)
# Less what may be large, and is not shown everywhere.
EXECUTION_SUMMARY = EXECUTION_COLUMNS.replace(
    "attempt_log, response", "'[]' AS attempt_log, NULL AS response"
)
EXECUTION_VALUES = ", ".join(f":{name}" for name in STORED_FIELDS)

# The ends that say nothing about whether a job is well.
NO_VERDICTS = ", ".join(f"'{word}'" for word, end in ENDINGS.items() if not end.is_verdict)

FEW_TARGETS = 250  # To go from one target to the next takes 3 µs.

# The targets of all that is pending, each once, and NULL at the end; more may follow inside.
PENDING_TARGETS = """
    WITH RECURSIVE targets (name) AS (
        SELECT min(target) FROM pending
         UNION ALL
        SELECT (SELECT min(target) FROM pending WHERE target > targets.name)
          FROM targets WHERE targets.name IS NOT NULL
    """


class DueJob(NamedTuple):
    """A job and the next fire time of its schedule."""

    job_id: str
    version: int  # The newest one.
    fire_time: int
    invalid_from: int | None = None  # As in Job; not None: ``fire_time`` is none.


class NextInstants(NamedTuple):
    """When the engine has something to do; each is an instant, or None: there is no such thing."""

    cursor: int | None  # The earliest of all jobs; it may be past.
    due_at: int | None  # When the next execution is due that is not due yet.
    news_at: int | None  # When the next alert is due that is not due yet.


def like_pattern(text: str) -> str:
    """Return the pattern of LIKE … ESCAPE '!' for what has this text in it, case folded."""
    pattern = text.casefold()
    for special in ("!", "%", "_"):
        pattern = pattern.replace(special, f"!{special}")
    return f"%{pattern}%"


def _read_version(row: Row, config: Json | None) -> Json:
    return {
        "job_id": row["job_id"],
        "version": row["version"],
        "config": config,
        "created_at": row["created_at"],
        "created_by": row["created_by"],
    }


def matching_jobs(filters: Json) -> str:
    """Return the condition for JobTable.pages(), which names what it needs only."""
    conditions = ["seq > 0"]
    if filters.get("enabled") is not None:
        conditions.append("enabled = :enabled")
    if filters.get("name") is not None:
        conditions.append("name = :name")
    if filters.get("q") is not None:
        # Asked for each job, and not once for all of them: a list is read page by page.
        conditions.append(
            """
            EXISTS (SELECT 1 FROM job_search
                     WHERE job_id = jobs.id AND words LIKE :pattern ESCAPE '!')
            """
        )
    if filters.get("status") is not None:
        conditions.append(
            """
            :status = (SELECT status FROM executions WHERE job_id = jobs.id
                        ORDER BY seq DESC LIMIT 1)
            """
        )
    if filters.get("last_status") is not None:
        conditions.append("strip LIKE :last_letter")
    if filters.get("tags"):
        # No tag has a line end in it, so the two texts together are as unique as apart.
        conditions.append(
            """
            :tag_count = (SELECT count(*) FROM job_tags
                           WHERE job_id = jobs.id AND name || :line_end || value IN (:list))
            """
        )
    return " AND ".join(conditions)


# What a history may be filtered by, as it is asked of each row: in this form no index is taken for
# it, which could be the longer way. A row of missed fire times reaches from the first to the last.
ASKED_OF_EACH = {
    "status": "status || '' = :status",
    "reason": "reason || '' = :reason",
    "since": "+scheduled_at >= :since",
    "until": "coalesce(missed_from, scheduled_at) < :until",
}
# What says of a job's executions in a status that an index has no others of the job.
INDEX_OF_STATUS = {
    Status.PENDING: "status IN ('pending', 'running')",
    Status.RUNNING: "status IN ('pending', 'running')",
    Status.FAILED: "status = 'failed'",
}
# The two times together, in the form that does take indexes.
IN_TIME = """
    (scheduled_at >= :since AND scheduled_at < :until
     OR reason = 'missed' AND scheduled_at >= :until AND missed_from < :until)
    """


def matching_executions(job_id: str | None, filters: Json) -> str:
    """Return the condition for ExecutionTable.newest(), such that the right index is used."""
    each = {name: asked for name, asked in ASKED_OF_EACH.items() if filters.get(name) is not None}
    status = filters.get("status")
    has_times = "since" in each or "until" in each
    conditions = ["seq < :place"]
    if job_id is not None:
        conditions.append("job_id = :job_id")
        if status in INDEX_OF_STATUS:
            conditions.append(INDEX_OF_STATUS[status])
    elif "reason" in each:
        conditions.append("reason = :reason")
        del each["reason"]
    elif status == Status.PENDING:
        del each["status"]
        return _among_newest("pending", each.values())
    elif status is not None and not (status == Status.SUCCESS and has_times):
        # A literal, else SQLite does not see that it may use the index of this status.
        conditions.append(f"status = '{Status(status)}'")
        del each["status"]
    elif has_times:
        each.pop("since", None)
        each.pop("until", None)
        return _among_newest("executions", [IN_TIME, *each.values()])
    return " AND ".join([*conditions, *each.values()])


def _among_newest(source: str, conditions: Iterable[str]) -> str:
    """Return the condition for the newest rows of what an index has in another order.

    It is less than the whole history, which the + keeps from being walked.
    """
    wanted = " AND ".join(["+seq < :place", *conditions])
    return f"seq IN (SELECT seq FROM {source} WHERE {wanted} ORDER BY +seq DESC LIMIT :most)"  # noqa: S608


def values_of(filters: Json) -> Json:
    """Return the parameters of matching_executions(), whichever of them it names."""
    values = {"status": None, "reason": None, "since": -NO_LIMIT, "until": NO_LIMIT}
    return values | {name: value for name, value in filters.items() if value is not None}


class JobLists:
    """What is read of jobs, with their newest configuration, and of their versions."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, job_id: str) -> Job:
        """Return a job. Raises NotFound."""
        sql = f"SELECT {JOB_COLUMNS}, name FROM configured_jobs WHERE id = :id"  # noqa: S608
        for row in self._database.run(sql, id=job_id):
            return Job.from_row(row)
        raise NotFound(f"there is no job {job_id}")

    def pages(
        self, filters: Json, most: int | None, offset: int, after: str | None = None
    ) -> tuple[Iterator[list[Job]], int]:
        """Return jobs that match, in the order of their creation, and how many match.

        They come in lists that are read when they are asked for, so there may be as many as
        one likes; what is created after this call is not among them. ``filters`` may have:
        enabled (a bool), name (the whole of it), q (a text that is in the name or the
        description, whatever the case), status (of the newest execution), last_status (a word of
        ENDINGS: how the newest that has ended did so) and tags (pairs of name and value, the job
        has them all); None or no tags at all: whatever. ``most`` None: all of them after
        ``offset``. ``after``: only those that were created after the job of this id,
        of which ``offset`` are passed over. Raises NotFound where there is no such job.
        """
        place = 0 if after is None else self._seq_of(after)
        matching = matching_jobs(filters)
        tags = {f"{name}\n{value}" for name, value in filters.get("tags") or ()}
        last_letter = None
        if filters.get("last_status") is not None:
            last_letter = f"%{ENDINGS[filters['last_status']].letter}"
        values = {
            "enabled": filters.get("enabled"),
            "name": filters.get("name"),
            "pattern": like_pattern(filters.get("q") or ""),
            "status": filters.get("status"),
            "last_letter": last_letter,
            "line_end": "\n",
            "tag_count": len(tags),
        }
        count = f"SELECT count(*) AS number, max(seq) AS last FROM jobs WHERE {matching}"  # noqa: S608
        [found] = self._database.run_with_list(count, tags, **values)
        values["last"] = found["last"]
        limit = NO_LIMIT if most is None else most
        pages = self._read_pages(matching, tags, values, limit, offset, place)
        return pages, found["number"]

    def _seq_of(self, job_id: str) -> int:
        """Return the place of a job in the order of creation. Raises NotFound."""
        sql = "SELECT seq FROM jobs WHERE id = :id AND seq > 0"
        found = self._database.value(sql, id=job_id)
        if found is None:
            # Nobody knows any more what came after a deleted one.
            raise NotFound(f"there is no job {job_id}: go on after another one, or begin anew")
        return int(found)

    def _read_pages(
        self, matching: str, tags: set[str], values: Json, most: int, offset: int, after: int
    ) -> Iterator[list[Job]]:
        """Yield the lists of pages(); ``matching`` is the condition, ``values`` are its own."""
        # What is to be shown is found in the small table first: an offset passes over 50,000
        # jobs without a look at their configurations.
        sql = f"""
            SELECT seq, {JOB_COLUMNS}, name FROM configured_jobs WHERE seq IN (
                SELECT seq FROM jobs
                 WHERE {matching} AND seq > :after AND seq <= :last
                 ORDER BY seq LIMIT :most OFFSET :offset)
             ORDER BY seq
            """  # noqa: S608
        while most > 0:
            rows = min(most, PAGE_ROWS)
            place = {"after": after, "most": rows, "offset": offset}
            page = self._database.run_page(sql, tags, **values, **place)
            if page.rows:
                yield [Job.from_row(row) for row in page.rows]
                after = page.rows[-1]["seq"]
                most -= len(page.rows)
                offset = 0
            if len(page.rows) < rows and not page.has_more:
                return

    def declared_ids(self, ids: Iterable[str]) -> set[str]:
        """Return the ids of the jobs that chronos.yaml declared, or that are among ``ids``."""
        sql = """
            SELECT id FROM jobs WHERE (seq > 0 AND declared IS NOT NULL) OR id IN (:list)
            """
        return {row["id"] for row in self._database.run_with_list(sql, ids)}

    def versions(
        self, job_id: str, most: int | None = None, before: int | None = None
    ) -> Iterator[Json]:
        """Yield versions of a job, the newest first; none if there is no such job.

        ``most`` None: all of them; ``before``: only those with a smaller number.
        The ``config`` of one that can't be read is None.
        """
        sql = """
            SELECT job_id, version, config, created_at, created_by FROM stored_versions
             WHERE job_id = :id AND EXISTS (SELECT 1 FROM jobs WHERE id = :id)
               AND version < :before
             ORDER BY version DESC LIMIT :most
            """
        place = NO_LIMIT if before is None else before
        left = NO_LIMIT if most is None else most
        while left > 0:
            rows = min(left, PAGE_ROWS)
            page = self._database.run_page(sql, (), id=job_id, before=place, most=rows)
            for row in page.rows:
                place = row["version"]
                left -= 1
                config = None
                with contextlib.suppress(UnusableConfig):
                    config = read_config(row["config"])
                yield _read_version(row, config)
            if len(page.rows) < rows and not page.has_more:
                return

    def version(self, job_id: str, number: int) -> Json:
        """Return one version of a job.

        Raises NotFound, also where the job is deleted, or UnusableConfig.
        """
        sql = """
            SELECT job_id, version, config, created_at, created_by FROM stored_versions
             WHERE job_id = :id AND version = :number
               AND EXISTS (SELECT 1 FROM jobs WHERE id = :id)
            """
        for row in self._database.run(sql, id=job_id, number=number):
            return _read_version(row, read_config(row["config"]))
        raise NotFound(f"job {job_id} has no version {number}")

    def newest_versions(self, job_ids: Iterable[str]) -> list[Json]:
        """Return the newest version of some of these jobs, as many as one read may hold.

        Those that can't be read are not among them.
        """
        sql = """
            SELECT v.job_id, v.version, v.config, v.created_at, v.created_by
              FROM jobs JOIN stored_versions AS v ON v.job_id = jobs.id AND v.version = jobs.version
             WHERE jobs.id IN (:list)
            """
        found = []
        for row in self._database.run_page(sql, job_ids).rows:
            with contextlib.suppress(UnusableConfig):
                found.append(_read_version(row, read_config(row["config"])))
        return found

    def is_there(self, job_id: str) -> bool:
        """Say whether there is a job of this id."""
        return self._database.value("SELECT seq FROM jobs WHERE id = :id", id=job_id) is not None


class JobTable(JobLists):
    """Jobs with their versions and their tags: when they fire, and what is written of them."""

    # --- When they fire ---

    def due(self, now: int, most: int) -> list[DueJob]:
        """Return jobs that fire by ``now``, or are to be looked at again, the oldest first."""
        sql = """
            SELECT id, version, next_run_at, invalid_from FROM jobs
             WHERE next_run_at <= :now ORDER BY next_run_at LIMIT :most
            """
        return self._due_jobs(sql, now=now, most=most)

    def soonest(self, most: int, until: int = NO_LIMIT) -> list[DueJob]:
        """Return the jobs that fire soonest, and not later than ``until``."""
        sql = """
            SELECT id, version, next_run_at, invalid_from FROM jobs
             WHERE next_run_at <= :until AND invalid_from IS NULL
             ORDER BY next_run_at LIMIT :most
            """
        return self._due_jobs(sql, until=until, most=most)

    def fire_later(self, now: int, after: str, most: int) -> list[DueJob]:
        """Return jobs that fire later than ``now``, in the order of their ids, behind ``after``."""
        sql = """
            SELECT id, version, next_run_at, invalid_from FROM jobs
             WHERE id > :after AND next_run_at > :now AND invalid_from IS NULL
             ORDER BY id LIMIT :most
            """
        return self._due_jobs(sql, now=now, after=after, most=most)

    def _due_jobs(self, sql: str, /, **values: Any) -> list[DueJob]:
        rows = self._database.run(sql, **values)
        return [
            DueJob(row["id"], row["version"], row["next_run_at"], row["invalid_from"])
            for row in rows
        ]

    # --- Writing ---

    def save(self, job: Job, created_by: str | None) -> None:
        """Add or change a job.

        ``created_by``: its configuration is a new version, by this user; None: it is the one
        that was there. What counts executions (strip, failures) is changed by count_ends() only.
        """
        values = {
            **job._asdict(),
            "config": json.dumps(job.config),
            "created_by": created_by,
            "name": job.config["name"],
        }
        sql = """
            INSERT INTO jobs (id, version, enabled, created_at, updated_at, next_run_at,
                              invalid_from, strip, failures, failing_since, declared, is_bad, name)
            VALUES (:id, :version, :enabled, :created_at, :updated_at, :next_run_at,
                    :invalid_from, :strip, :failures, :failing_since, :declared, FALSE, :name)
                ON CONFLICT (id) DO UPDATE
               SET version = excluded.version, enabled = excluded.enabled,
                   updated_at = excluded.updated_at, next_run_at = excluded.next_run_at,
                   invalid_from = excluded.invalid_from,
                   declared = excluded.declared, name = excluded.name
            """
        self._database.run(sql, **values)
        if created_by is not None:
            sql = """
                INSERT INTO versions (job_id, version, config, created_at, created_by)
                VALUES (:id, :version, :config, :updated_at, :created_by)
                """
            self._database.run(sql, **values)
            self._save_for_search(job)

    def _save_for_search(self, job: Job) -> None:
        """Write what pages() looks for: the words and tags of the newest configuration."""
        sql = """
            INSERT INTO job_search (job_id, words) VALUES (:id, :words)
                ON CONFLICT (job_id) DO UPDATE SET words = excluded.words
            """
        words = search_words(job.config["name"], job.config["description"])
        self._database.run(sql, id=job.id, words=words)
        self._database.run("DELETE FROM job_tags WHERE job_id = :id", id=job.id)
        sql = "INSERT INTO job_tags (job_id, name, value) VALUES (:job_id, :name, :value)"
        tags = job.config["tags"].items()
        rows = [{"job_id": job.id, "name": name, "value": value} for name, value in tags]
        self._database.run_many(sql, rows)

    def delete(self, job_id: str) -> None:
        """Remove a job. Its versions and executions are left to History.prune()."""
        self._database.run("DELETE FROM jobs WHERE id = :id", id=job_id)
        self._database.run("DELETE FROM job_tags WHERE job_id = :id", id=job_id)
        self._database.run("DELETE FROM job_search WHERE job_id = :id", id=job_id)

    def move_cursors(self, cursors: Mapping[str, int | None]) -> None:
        """Set the next fire times of enabled jobs, by their ids.

        None: the schedule is spent, so the job is enabled no more.
        """
        sql = """
            UPDATE jobs SET next_run_at = :at, enabled = :enabled, invalid_from = NULL
             WHERE id = :id
            """
        rows = [
            {"id": job_id, "at": next_run_at, "enabled": next_run_at is not None}
            for job_id, next_run_at in cursors.items()
        ]
        self._database.run_many(sql, rows)

    def put_off(self, job_id: str, invalid_from: int, look_at: int) -> None:
        """Note that a job can't fire from a fire time on, and when to look at it again."""
        sql = "UPDATE jobs SET next_run_at = :at, invalid_from = :invalid_from WHERE id = :id"
        self._database.run(sql, id=job_id, at=look_at, invalid_from=invalid_from)


class ExecutionLists:
    """Executions as people ask for them. Any thread may call these."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def _select(self, rest: str, /, **values: Any) -> list[Execution]:
        """Return the executions that a SELECT finds, of which ``rest`` is what follows FROM."""
        sql = f"SELECT {EXECUTION_COLUMNS} FROM {rest}"  # noqa: S608
        return [Execution.from_row(row) for row in self._database.run(sql, **values)]

    def _select_named(self, rest: str, /, **values: Any) -> list[Execution]:
        """Return executions as _select() does, from named_executions: each with its job_name.

        Those whose job is deleted are not among them.
        """
        sql = f"SELECT {EXECUTION_COLUMNS}, job_name FROM {rest}"  # noqa: S608
        return [Execution.from_row(row) for row in self._database.run(sql, **values)]

    def get(self, job_id: str | None, execution_id: str) -> Execution:
        """Return an execution of this job (None: of any). Raises NotFound."""
        found = self._select_named(
            "named_executions WHERE id = :id AND job_id = coalesce(:job_id, job_id)",
            id=execution_id,
            job_id=job_id,
        )
        if not found:
            raise NotFound(f"there is no such execution: {execution_id}")
        return found[0]

    def newest(
        self,
        job_id: str | None,
        most: int,
        before: str | None = None,
        filters: Json | None = None,
        columns: str = EXECUTION_COLUMNS,
    ) -> Iterator[Execution]:
        """Yield the newest executions of a job (None: of all), the newest first.

        ``before``: only those older than this execution. ``filters`` may have: status, reason,
        and the instants since and until, less the latter itself: the fire time is between them,
        or one of those that the execution stands for. None: whatever.
        Raises NotFound if there is no execution ``before``.
        """
        filters = filters or {}
        sql = f"""
            SELECT seq, {columns}, (SELECT name FROM jobs WHERE id = job_id) AS job_name
              FROM executions WHERE {matching_executions(job_id, filters)}
             ORDER BY seq DESC LIMIT :most
            """  # noqa: S608
        place = NO_LIMIT
        if before is not None:
            place = self._seq_of(job_id, before)
        values = {"job_id": job_id} | values_of(filters)
        rows = most
        while most > 0:
            page = self._database.run_page(sql, (), place=place, most=rows, **values)
            for row in page.rows:
                place = row["seq"]
                has_job = row["job_name"] is not None  # Else a deleted one has left it.
                if has_job and most > 0:
                    most -= 1
                    yield Execution.from_row(row)
            if len(page.rows) < rows and not page.has_more:
                return
            rows = PAGE_ROWS

    def _seq_of(self, job_id: str | None, execution_id: str) -> int:
        """Return the place of an execution of this job (None: of any). Raises NotFound."""
        sql = """
            SELECT seq FROM executions WHERE id = :id AND job_id = coalesce(:job_id, job_id)
            """
        found = self._database.value(sql, id=execution_id, job_id=job_id)
        if found is None:
            raise NotFound(f"there is no such execution: {execution_id}")
        return int(found)

    def last_verdicts(self, job_id: str, most: int) -> list[Execution]:
        """Return the newest executions whose end says whether the job is well, newest first.

        They are without response and log.
        """
        sql = f"""
            SELECT {EXECUTION_SUMMARY}, job_name FROM named_executions
             WHERE job_id = :job_id AND completed_at IS NOT NULL
               AND coalesce(reason, '') NOT IN ({NO_VERDICTS})
             ORDER BY seq DESC LIMIT :most
            """  # noqa: S608
        rows = self._database.run(sql, job_id=job_id, most=most)
        return [Execution.from_row(row) for row in rows]

    def last_of(self, job_ids: list[str], has_ended: bool = False) -> dict[str, Execution]:
        """Return by job id the newest execution of each of these jobs that has one.

        They are without response and log. ``has_ended``: the newest that has ended.
        """
        condition = "AND completed_at IS NOT NULL" if has_ended else ""
        sql = f"""
            SELECT {EXECUTION_SUMMARY} FROM executions WHERE seq IN (
                SELECT (SELECT seq FROM executions WHERE job_id = jobs.id {condition}
                         ORDER BY seq DESC LIMIT 1)
                  FROM jobs WHERE id IN (:list))
            """  # noqa: S608
        return self._by_job(sql, job_ids)

    def retries_of(self, job_ids: list[str]) -> dict[str, Execution]:
        """Return by job id the oldest execution of each job that waits for its next attempt.

        They are without response and log.
        Of a job only the 10 oldest that have not ended are looked at.
        """
        sql = f"""
            SELECT {EXECUTION_SUMMARY} FROM executions WHERE seq IN (
                SELECT (SELECT seq FROM (SELECT seq, status, attempts FROM active
                                          WHERE job_id = jobs.id ORDER BY seq LIMIT 10) AS oldest
                         WHERE status = 'pending' AND attempts > 0 ORDER BY seq LIMIT 1)
                  FROM jobs WHERE id IN (:list))
            """  # noqa: S608
        return self._by_job(sql, job_ids)

    def _by_job(self, sql: str, job_ids: list[str]) -> dict[str, Execution]:
        """Return by job id the execution that a SELECT finds for each of these jobs."""
        rows = self._database.run_with_list(sql, job_ids)
        found = [Execution.from_row(row) for row in rows]
        return {execution.job_id: execution for execution in found}

    def count(self, job_id: str, filters: Json | None = None) -> int:
        """Return how many executions a job has that match; ``filters`` is as in newest()."""
        filters = filters or {}
        sql = f"SELECT count(*) FROM executions WHERE {matching_executions(job_id, filters)}"  # noqa: S608
        values = {"place": NO_LIMIT, "job_id": job_id} | values_of(filters)
        return int(self._database.value(sql, **values))

    def in_progress(self, most: int) -> list[Execution]:
        """Return what runs, the oldest first, and then what is due soonest.

        They are without response and log.
        """
        sql = f"""
            WITH shown (number, at) AS (
                SELECT * FROM (
                    SELECT seq, 0 FROM executions
                     WHERE status = 'running' ORDER BY seq LIMIT :most) AS running
                 UNION ALL
                SELECT * FROM (
                    SELECT seq, due_at FROM executions
                     WHERE status = 'pending' AND due_at > 0
                     ORDER BY due_at, seq LIMIT :most) AS soonest)
            SELECT {EXECUTION_SUMMARY}, job_name
              FROM shown JOIN named_executions ON seq = number
             ORDER BY at, number LIMIT :most
            """  # noqa: S608
        return [Execution.from_row(row) for row in self._database.run(sql, most=most)]


def _values_of(execution: Execution) -> Json:
    """Return what is stored of an execution, by the names of the columns."""
    values = execution._asdict()
    values["width"] = execution.width
    return values


class ExecutionTable(ExecutionLists):
    """Executions: those that wait and run are the queue, those that have ended the history.

    Only the engine's thread calls what is here: it is about what waits and runs.
    """

    def running(self) -> list[Execution]:
        """Return all that run, the oldest first."""
        return self._select_named("named_executions WHERE status = 'running' ORDER BY seq")

    def active_of(self, job_id: str, most: int | None = None) -> list[Execution]:
        """Return what waits or runs of a job, the oldest first; ``most`` None: all of it."""
        return self._select(
            "active WHERE job_id = :id ORDER BY seq LIMIT :most",
            id=job_id,
            most=NO_LIMIT if most is None else most,
        )

    def oldest_active(self, job_ids: Iterable[str]) -> dict[str, Execution]:
        """Return by job id the oldest execution of each of these jobs that waits or runs.

        They are without response and log.
        """
        sql = f"""
            SELECT {EXECUTION_SUMMARY} FROM executions WHERE seq IN (
                SELECT (SELECT min(seq) FROM active WHERE job_id = jobs.id)
                  FROM jobs WHERE id IN (:list))
            """  # noqa: S608
        found = map(Execution.from_row, self._database.run_with_list(sql, job_ids))
        return {execution.job_id: execution for execution in found}

    def count_active(self, job_id: str) -> int:
        """Return how many executions of a job wait or run."""
        return int(
            self._database.value("SELECT count(*) FROM active WHERE job_id = :id", id=job_id)
        )

    def due(self, now: int, most: int, passed_over: set[str]) -> list[Execution]:
        """Return executions that may start, the oldest due_at first.

        ``passed_over``: targets that are to get nothing.
        """
        if not passed_over:
            return self._select(
                "pending WHERE due_at <= :now ORDER BY due_at, seq LIMIT :most", now=now, most=most
            )
        # Either way is quick where the other is not: 50,000 rows may wait for one dead host, or
        # one row for each of 15,000 targets.
        if self._few_targets_wait():
            return self._due_by_target(now, most, passed_over)
        return self._due_in_order(now, most, passed_over)

    def _few_targets_wait(self) -> bool:
        """Say whether what is pending has at most FEW_TARGETS targets."""
        sql = f"""
            {PENDING_TARGETS} LIMIT :most)
            SELECT count(name) FROM targets
            """  # noqa: S608
        return int(self._database.value(sql, most=FEW_TARGETS + 1)) <= FEW_TARGETS

    def _due_by_target(self, now: int, most: int, passed_over: set[str]) -> list[Execution]:
        """Do what due() does: from target to target, so that no row of others is looked at."""
        # PostgreSQL needs another form of it: LATERAL instead of IN.
        sql = f"""
            {PENDING_TARGETS})
            SELECT {EXECUTION_COLUMNS} FROM targets JOIN executions ON executions.seq IN (
                SELECT seq FROM pending AS due
                 WHERE due.target = targets.name AND due_at <= :now
                 ORDER BY due_at, seq LIMIT :most)
             WHERE NOT targets.name IN (:list)
             ORDER BY due_at, seq LIMIT :most
            """  # noqa: S608
        rows = self._database.run_with_list(sql, passed_over, now=now, most=most)
        return [Execution.from_row(row) for row in rows]

    def _due_in_order(self, now: int, most: int, passed_over: set[str]) -> list[Execution]:
        """Do what due() does: in the order of due_at, a step for each row that is passed over."""
        # The steps are inside an index that has all that they need: 10,000 of them in 1 ms.
        sql = f"""
            SELECT {EXECUTION_COLUMNS} FROM executions WHERE seq IN (
                SELECT seq FROM pending
                 WHERE due_at <= :now AND NOT target IN (:list)
                 ORDER BY due_at, seq LIMIT :most)
             ORDER BY due_at, seq
            """  # noqa: S608
        rows = self._database.run_with_list(sql, passed_over, now=now, most=most)
        return [Execution.from_row(row) for row in rows]

    def known(self, ids: Iterable[str]) -> set[str]:
        """Return those of these ids that executions have."""
        sql = "SELECT id FROM executions WHERE id IN (:list)"
        return {row["id"] for row in self._database.run_with_list(sql, ids)}

    def add(self, executions: Iterable[Execution]) -> None:
        """Add executions, in this order; none of their ids is known() yet."""
        sql = f"""
            INSERT INTO executions ({EXECUTION_COLUMNS}, width)
            VALUES ({EXECUTION_VALUES}, :width)
            """  # noqa: S608
        self._database.run_many(sql, map(_values_of, executions))

    def still_running(self, executions: Iterable[Execution]) -> set[str]:
        """Return the ids of those of these executions that run, each in the attempt it names."""
        sql = "SELECT id, attempts FROM executions WHERE status = 'running' AND id IN (:list)"
        attempts = {execution.id: execution.attempts for execution in executions}
        rows = self._database.run_with_list(sql, attempts)
        return {row["id"] for row in rows if row["attempts"] == attempts[row["id"]]}

    def save(self, executions: Iterable[Execution]) -> None:
        """Write how executions stand."""
        sql = """
            UPDATE executions
               SET status = :status, due_at = :due_at, spent = :spent,
                   completed_at = :completed_at, reason = :reason, error = :error,
                   status_code = :status_code, attempt_log = :attempt_log, response = :response,
                   width = :width
             WHERE id = :id
            """
        self._database.run_many(sql, map(_values_of, executions))

    def start(self, ids: list[str], now: int, node_id: str) -> None:
        """Let pending executions run: each in its next attempt."""
        sql = """
            UPDATE executions
               SET status = 'running', due_at = NULL, attempts = attempts + 1, attempt_at = :now,
                   started_at = coalesce(started_at, :now), node_id = :node_id
             WHERE id IN (:list)
            """
        self._database.run_with_list(sql, ids, now=now, node_id=node_id)

    def release_oldest(self, job_ids: Iterable[str], now: int) -> None:
        """Make the oldest of what waits or runs of each job due, if it waited for older ones."""
        sql = """
            UPDATE executions SET due_at = :now
             WHERE due_at IS NULL AND status = 'pending' AND seq IN (
                SELECT (SELECT min(seq) FROM active WHERE job_id = jobs.id)
                  FROM jobs WHERE id IN (:list))
            """
        self._database.run_with_list(sql, job_ids, now=now)

    def take_back(self, after: int, below: int, most: int) -> tuple[int, list[Execution], int]:
        """Remove executions that were never sent, of fire times later than ``after``.

        ``most`` of those with a seq ``below`` this one are looked at, the newest first. Return
        the seq below which others are left, 0: none; the removed ones; and how many stay,
        because they were sent. What somebody has cancelled, or a later one replaced, stays, too.
        """
        sql = """
            SELECT min(seq) FROM (
                SELECT seq FROM executions WHERE seq < :below ORDER BY seq DESC LIMIT :most)
            """
        first = self._database.value(sql, below=below, most=most) or 0
        values = {"first": first, "below": below, "after": after}
        ahead = """
            FROM executions WHERE seq >= :first AND seq < :below AND scheduled_at > :after
             AND (trigger = 'schedule' OR trigger = 'catch_up')
            """
        sent = int(self._database.value(f"SELECT count(*) {ahead} AND attempts > 0", **values))
        sql = f"""
            DELETE {ahead} AND attempts = 0
               AND coalesce(reason, '') NOT IN ('cancelled', 'replaced')
            RETURNING {EXECUTION_COLUMNS}
            """
        removed = [Execution.from_row(row) for row in self._database.run(sql, **values)]
        return first, removed, sent

    def fire_times(self, job_id: str, first: int, last: int) -> set[int]:
        """Return the fire times of a job, from ``first`` to ``last``, that are in the history."""
        sql = """
            SELECT scheduled_at FROM executions
             WHERE job_id = :id AND scheduled_at BETWEEN :first AND :last
               AND (trigger = 'schedule' OR trigger = 'catch_up')
            """
        rows = self._database.run(sql, id=job_id, first=first, last=last)
        return {row["scheduled_at"] for row in rows}

    def delete(self, execution_id: str) -> None:
        """Remove one execution."""
        self._database.run("DELETE FROM executions WHERE id = :id", id=execution_id)


class HistoryRow(NamedTuple):
    """An execution that has ended, and what it takes."""

    id: str
    seq: int
    width: int  # Bytes.
    bare: int  # Bytes that it would take without its response.


class HistorySize:
    """How many bytes of history there are, whose they are, and taking some of them away."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._size: int | None = None  # Bytes, of all jobs; None: it has to be added up.

    def size(self) -> int:
        """Return the bytes of the history of all jobs that are there."""
        if self._size is None:
            sql = """
                SELECT CAST(coalesce(sum(history_bytes), 0) AS BIGINT) FROM jobs
                 WHERE history_bytes > 0
                """
            self._size = int(self._database.value(sql))
        return self._size

    def forget_size(self) -> None:
        """Let the next size() add it up: a job was removed, or a turn rolled back."""
        self._size = None

    def _note_size(self, change: int) -> None:
        if self._size is not None:
            self._size += change

    def _note_freed(self, job_id: str, freed: int) -> None:
        """Note that the history of a job has become smaller by so many bytes."""
        if freed:
            sql = "UPDATE jobs SET history_bytes = history_bytes - :freed WHERE id = :id"
            self._database.run(sql, id=job_id, freed=freed)
            self._note_size(-freed)

    def job_with_most(self) -> str | None:
        """Return the job with the largest history of those that may give; None: there is none."""
        sql = """
            SELECT id FROM jobs WHERE may_give = TRUE AND history_bytes > 0
             ORDER BY history_bytes DESC LIMIT 1
            """
        found: str | None = self._database.value(sql)
        return found

    def pass_over(self, job_id: str) -> None:
        """Note that nothing of a job may go, until another execution of it ends."""
        self._database.run("UPDATE jobs SET may_give = FALSE WHERE id = :id", id=job_id)

    def oldest(self, job_id: str, after: int, most: int) -> list[HistoryRow]:
        """Return the oldest executions of a job that have ended and are not its newest 10.

        ``after``: only those with a larger seq.
        """
        sql = f"""
            SELECT id, seq, width, {BARE_WIDTH} AS bare FROM executions
             WHERE job_id = :id AND completed_at IS NOT NULL AND seq > :after
               AND seq <= (SELECT seq FROM executions WHERE job_id = :id
                            ORDER BY seq DESC LIMIT 1 OFFSET 10)
             ORDER BY seq LIMIT :most
            """  # noqa: S608
        rows = self._database.run(sql, id=job_id, after=after, most=most)
        return [HistoryRow(row["id"], row["seq"], row["width"], row["bare"]) for row in rows]

    def drop_responses(self, job_id: str, rows: list[HistoryRow]) -> int:
        """Remove what was answered to these executions of a job; return what it is worth."""
        sql = f"""
            UPDATE executions SET response = NULL, width = {BARE_WIDTH} WHERE id IN (:list)
            """  # noqa: S608
        self._database.run_with_list(sql, [row.id for row in rows])
        freed = sum(row.width - row.bare for row in rows)
        self._note_freed(job_id, freed)
        return worth_of(len(rows), freed)

    def drop(self, job_id: str, rows: list[HistoryRow]) -> int:
        """Remove these executions of a job; return what it is worth."""
        sql = "DELETE FROM executions WHERE id IN (:list)"
        self._database.run_with_list(sql, [row.id for row in rows])
        freed = sum(row.width for row in rows)
        self._note_freed(job_id, freed)
        return worth_of(len(rows), freed)


class History(HistorySize):
    """How executions have ended, in numbers; and the removal of those that are not to be kept.

    Only the engine's thread uses its size: it is known, and changes with each end and removal.
    """

    def count_ends(self, executions: Iterable[Execution]) -> None:
        """Note in their jobs, and in the counts of the hours, how executions have ended.

        They come in the order in which they ended. Those that have not ended are left out; of
        the alerts nothing counts but their bytes.
        """
        endings: list[Json] = []
        numbers = Counter[tuple[int, str]]()  # By hour and letter.
        for execution in executions:
            if execution.completed_at is None:
                continue
            letter = ""
            fails = False
            at = execution.completed_at
            if execution.job_id != ALERTS_ID:
                letter = execution.ending.letter
                fails = execution.ending.is_verdict and execution.status != Status.SUCCESS
                numbers[at // HOUR, letter] += execution.missed_count or 1
            ending = {
                "job_id": execution.job_id,
                "letter": letter,
                "succeeds": execution.status == Status.SUCCESS,
                "fails": fails,
                "at": at,
                "width": execution.width,
            }
            endings.append(ending)
        if endings:
            self._note_in_jobs(endings)
            self._note_in_hours(numbers)
            self._note_size(sum(ending["width"] for ending in endings))

    def _note_in_jobs(self, endings: list[Json]) -> None:
        sql = """
            UPDATE jobs
               SET strip = CASE WHEN length(strip) < 30 THEN strip
                                ELSE substr(strip, 2) END || :letter,
                   failures = CASE WHEN :succeeds THEN 0
                                   WHEN :fails THEN failures + 1
                                   ELSE failures END,
                   failing_since = CASE WHEN :succeeds THEN NULL
                                        WHEN :fails THEN coalesce(failing_since, :at)
                                        ELSE failing_since END,
                   history_bytes = history_bytes + :width, may_give = TRUE
             WHERE id = :job_id
            """
        self._database.run_many(sql, endings)

    def _note_in_hours(self, numbers: Counter[tuple[int, str]]) -> None:
        sql = """
            INSERT INTO ends (hour, letter, number) VALUES (:hour, :letter, :number)
                ON CONFLICT (hour, letter) DO UPDATE SET number = ends.number + excluded.number
            """
        rows = [
            {"hour": hour, "letter": letter, "number": number}
            for (hour, letter), number in numbers.items()
        ]
        self._database.run_many(sql, rows)

    def uncount(self, job: Job, executions: Sequence[Execution], now: int) -> None:
        """Take back what count_ends() has noted of these executions of a job."""
        strip = job.strip
        failures = job.failures
        numbers = Counter[tuple[int, str]]()  # By hour and letter.
        freed = 0
        for execution in executions:
            if execution.completed_at is None:
                continue
            freed += execution.width
            letter = execution.ending.letter
            before, _letter, after = strip.rpartition(letter)
            strip = before + after
            if execution.ending.is_verdict and execution.status != Status.SUCCESS:
                failures = max(0, failures - 1)
            hour = execution.completed_at // HOUR
            if hour <= now // HOUR:  # Else forget_later_hours() has done it.
                number = execution.missed_count or 1
                numbers[hour, letter] -= number
                numbers[NO_HOUR, letter] += number
        sql = """
            UPDATE jobs SET strip = :strip, failures = :failures,
                   failing_since = CASE WHEN :failures > 0 THEN failing_since END
             WHERE id = :id
            """
        self._database.run(sql, id=job.id, strip=strip, failures=failures)
        self._note_in_hours(numbers)
        self._note_freed(job.id, freed)

    def forget_later_hours(self, now: int) -> None:
        """Let what has ended in hours that are still to come count in no hour."""
        sql = """
            SELECT letter, CAST(sum(number) AS BIGINT) AS number FROM ends
             WHERE hour > :hour GROUP BY letter
            """
        rows = self._database.run(sql, hour=now // HOUR)
        self._note_in_hours(Counter({(NO_HOUR, row["letter"]): row["number"] for row in rows}))
        self._database.run("DELETE FROM ends WHERE hour > :hour", hour=now // HOUR)

    def ends_since(self, at: int) -> dict[str, int]:
        """Return how many executions have ended since the hour of ``at``, by how they ended.

        The names are those of ENDINGS, each of them there.
        """
        sql = """
            SELECT letter, CAST(sum(number) AS BIGINT) AS number FROM ends
             WHERE hour >= :hour GROUP BY letter
            """
        rows = self._database.run(sql, hour=at // HOUR)
        numbers = {row["letter"]: row["number"] for row in rows}
        return {word: numbers.get(ending.letter, 0) for word, ending in ENDINGS.items()}

    def prune(self, job_id: str, before: int, keep: int) -> int:
        """Remove some executions of a job that are not to be kept; return what it is worth.

        Of those that have ended: what ended ``before``, but for the newest 10; and what is not
        among the newest ``keep``, but for the newest 100 of it that failed.
        """
        sql = """
            DELETE FROM executions WHERE seq IN (
                WITH mine AS NOT MATERIALIZED (SELECT * FROM executions WHERE job_id = :id),
                beyond_kept (seq) AS (SELECT seq FROM mine ORDER BY seq DESC LIMIT 1 OFFSET :keep),
                beyond_ten (seq) AS (SELECT seq FROM mine ORDER BY seq DESC LIMIT 1 OFFSET 10),
                spared (seq) AS (
                    SELECT seq FROM mine
                     WHERE status = 'failed' AND seq <= (SELECT seq FROM beyond_kept)
                     ORDER BY seq DESC LIMIT 100),
                oldest (seq, completed_at, width) AS (
                    SELECT seq, completed_at, width FROM mine
                     WHERE completed_at IS NOT NULL ORDER BY seq LIMIT :most),
                chosen (seq, bytes_before) AS (
                    SELECT seq, sum(width) OVER (ORDER BY seq) - width FROM oldest
                     WHERE (seq <= (SELECT seq FROM beyond_kept)
                            AND seq NOT IN (SELECT seq FROM spared))
                        OR (completed_at < :before AND seq <= (SELECT seq FROM beyond_ten)))
                SELECT seq FROM chosen WHERE bytes_before < :bytes)
            RETURNING width
            """
        values = {"id": job_id, "before": before, "keep": keep}
        removed = self._database.run(sql, **values, most=PRUNE_ROWS, bytes=PRUNE_BYTES)
        freed = sum(row["width"] for row in removed)
        self._note_freed(job_id, freed)
        return worth_of(len(removed), freed)

    def prune_versions(self, job_id: str, oldest: int) -> int:
        """Remove some old versions of a job; return how many executions that is worth.

        Those up to number ``oldest`` go, but for what executions have used that are still there.
        """
        sql = """
            DELETE FROM versions WHERE job_id = :id AND version IN (
                SELECT version FROM versions
                 WHERE job_id = :id AND version <= :old
                   AND version NOT IN (SELECT job_version FROM executions WHERE job_id = :id)
                 ORDER BY version LIMIT :most)
            """
        values = {"id": job_id, "old": oldest, "most": PRUNE_VERSIONS}
        return self._database.change(sql, **values) * VERSION_IN_ROWS

    def newest_version(self, job_id: str) -> int | None:
        """Return the number of a job's newest version; None: the job is deleted."""
        sql = "SELECT version FROM jobs WHERE id = :id"
        found: int | None = self._database.value(sql, id=job_id)
        return found

    def prune_deleted(self, job_id: str) -> int:
        """Remove some executions of a deleted job, then some versions; return what it is worth."""
        sql = """
            DELETE FROM executions WHERE seq IN (
                WITH oldest (seq, width) AS (
                    SELECT seq, width FROM executions WHERE job_id = :id ORDER BY seq LIMIT :most),
                chosen (seq, bytes_before) AS (
                    SELECT seq, sum(width) OVER (ORDER BY seq) - width FROM oldest)
                SELECT seq FROM chosen WHERE bytes_before < :bytes)
            RETURNING width
            """
        removed = self._database.run(sql, id=job_id, most=PRUNE_ROWS, bytes=PRUNE_BYTES)
        if removed:
            return worth_of(len(removed), sum(row["width"] for row in removed))
        sql = """
            DELETE FROM versions WHERE job_id = :id AND version IN (
                SELECT version FROM versions WHERE job_id = :id ORDER BY version LIMIT :most)
            """
        versions = self._database.change(sql, id=job_id, most=PRUNE_VERSIONS)
        return versions * VERSION_IN_ROWS

    def with_old_versions(self, after: str, keep: int) -> tuple[str | None, list[str]]:
        """Return job ids that have had more than ``keep`` versions, or whose job is deleted.

        They come from a page of those later than the id ``after``; returned is also the last
        id of the page, None: there are no more.
        """
        sql = """
            SELECT job_id, (SELECT version FROM jobs WHERE id = job_id) AS newest
              FROM versions WHERE job_id > :after ORDER BY job_id LIMIT :most
            """
        rows = self._database.run(sql, after=after, most=VERSIONS_PAGE)
        found = [row["job_id"] for row in rows if row["newest"] is None or row["newest"] > keep]
        last = rows[-1]["job_id"] if rows else None
        return last, found

    def next_with_history(self, job_id: str) -> str | None:
        """Return the next job id, in their order, that has executions, also of a deleted job.

        None: there are no more.
        """
        sql = "SELECT min(job_id) FROM executions WHERE job_id > :id"
        found: str | None = self._database.value(sql, id=job_id)
        return found


def worth_of(rows: int, freed: int) -> int:
    """Return what it is worth to remove so many executions, which had so many bytes together.

    It is as much work as to remove so many small ones: PRUNE_ROWS are what a turn does.
    """
    return max(rows, freed * PRUNE_ROWS // PRUNE_BYTES)


class News:
    """Which jobs have turned bad or well: what the alerts tell of."""

    def __init__(self, database: Database, jobs: JobTable) -> None:
        self._database = database
        self._jobs = jobs

    def note_turned(self, job_ids: Iterable[str], after: int, now: int) -> None:
        """Note which of these jobs have turned bad, by ``after`` failures in a row, or well.

        One that can't fire at all is bad at once: it stands for all fire times that follow.
        """
        sql = """
            UPDATE jobs SET is_bad = NOT is_bad, news_at = coalesce(news_at, :now)
             WHERE id IN (:list)
               AND CASE WHEN is_bad THEN failures = 0 AND invalid_from IS NULL
                        ELSE failures >= :after OR invalid_from IS NOT NULL END
            """
        self._database.run_with_list(sql, job_ids, after=after, now=now)

    def are_due(self, before: int) -> bool:
        """Say whether there are jobs that have turned, the first of them by ``before``."""
        sql = "SELECT min(news_at) FROM jobs WHERE news_at IS NOT NULL"
        first_at = self._database.value(sql)
        return first_at is not None and first_at <= before

    def turned(self, most: int) -> list[Json]:
        """Return the jobs that have turned, the first ones first.

        Each has id, name, failures and event: failed or recovered.
        """
        sql = """
            SELECT id, name, failures,
                   CASE WHEN is_bad THEN 'failed' ELSE 'recovered' END AS event
              FROM jobs WHERE news_at IS NOT NULL ORDER BY news_at, seq LIMIT :most
            """
        names = ("id", "name", "failures", "event")
        rows = self._database.run(sql, most=most)
        return [{name: row[name] for name in names} for row in rows]

    def count_turned(self) -> tuple[int, int]:
        """Return how many jobs have turned, and how many of them to bad."""
        sql = """
            SELECT count(*) AS number, count(*) FILTER (WHERE is_bad) AS failed
              FROM jobs WHERE news_at IS NOT NULL
            """
        [row] = self._database.run(sql)
        return row["number"], row["failed"]

    def save_alert(self, config: Json, now: int) -> int:
        """Mark all news as told, by a new version of the built-in job; return its number.

        Versions that no alert needs any more are removed.
        """
        self._database.run("UPDATE jobs SET news_at = NULL WHERE news_at IS NOT NULL")
        number = int(self._database.value("SELECT version + 1 FROM jobs WHERE seq = 0"))
        job = Job(ALERTS_ID, number, False, now, now, None, config, declared=DECLARED_BY)
        self._jobs.save(job, DECLARED_BY)
        sql = """
            DELETE FROM versions WHERE job_id = :id AND version < :number
               AND version NOT IN (SELECT job_version FROM executions WHERE job_id = :id)
            """
        self._database.run(sql, id=ALERTS_ID, number=number)
        return number


class Store:
    """The tables of the database, and the statements that are about more than one of them."""

    def __init__(self, path: Path, synchronous: str = "FULL") -> None:
        """``path`` is absolute; ``synchronous`` is FULL or NORMAL: see Database."""
        self.database = Database(path, synchronous)
        self.jobs = JobTable(self.database)
        self.executions = ExecutionTable(self.database)
        self.history = History(self.database)
        self.news = News(self.database, self.jobs)

    def number(self, key: str) -> int | None:
        """Return a number that was kept, such as last_seen; None: there is none."""
        sql = "SELECT value FROM meta WHERE key = :key"
        found: int | None = self.database.value(sql, key=key)
        return found

    def set_number(self, key: str, value: int) -> None:
        """Keep a number, also for the next start."""
        sql = """
            INSERT INTO meta (key, value) VALUES (:key, :value)
                ON CONFLICT (key) DO UPDATE SET value = excluded.value
            """
        self.database.run(sql, key=key, value=value)

    def next_instants(self, now: int) -> NextInstants:
        """Return when there is something to do next."""
        sql = """
            SELECT (SELECT min(next_run_at) FROM jobs WHERE next_run_at IS NOT NULL) AS next_run_at,
                   (SELECT min(due_at) FROM pending WHERE due_at > :now) AS due_at,
                   (SELECT min(news_at) FROM jobs WHERE news_at > :told_by) AS news_at
            """
        [row] = self.database.run(sql, now=now, told_by=now - ALERT_GATHER)
        news_at = row["news_at"]
        if news_at is not None:
            news_at += ALERT_GATHER
        return NextInstants(row["next_run_at"], row["due_at"], news_at)

    def shift_times(self, step: int, now: int) -> None:
        """Move what is to happen with the wall clock, which was moved by ``step`` µs to ``now``."""
        sql = "UPDATE executions SET due_at = due_at + :step WHERE status = 'pending'"
        self.database.run(sql, step=step)
        sql = "UPDATE jobs SET news_at = news_at + :step WHERE news_at IS NOT NULL"
        self.database.run(sql, step=step)
        sql = "UPDATE jobs SET failing_since = failing_since + :step WHERE failing_since > :now"
        self.database.run(sql, step=step, now=now)

    def last_fire_time(self, job_id: str) -> int | None:
        """Return the newest fire time of a job that is in the history; None: there is none."""
        sql = """
            SELECT scheduled_at FROM executions
             WHERE job_id = :id AND (trigger = 'schedule' OR trigger = 'catch_up')
             ORDER BY seq DESC LIMIT 1
            """
        found: int | None = self.database.value(sql, id=job_id)
        return found

    def reset_cursors(self, now: int) -> None:
        """Let each cursor that is later than ``now`` be computed anew."""
        # A cursor in 1970 is before RELEASED_AT, which tells that it is none.
        self.database.run("UPDATE jobs SET next_run_at = 0 WHERE next_run_at > :now", now=now)

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are, and of them what; how many executions wait and run."""
        sql = """
            SELECT count(*) AS jobs_total,
                   count(*) FILTER (WHERE enabled) AS enabled,
                   count(*) FILTER (WHERE enabled AND (failures > 0 OR invalid_from IS NOT NULL))
                       AS failing,
                   (SELECT count(*) FROM pending) AS pending,
                   (SELECT count(*) FROM executions WHERE status = 'running') AS running
              FROM jobs WHERE seq > 0
            """
        [row] = self.database.run(sql)
        names = ("jobs_total", "enabled", "failing", "pending", "running")
        return {name: row[name] for name in names}


# ======================================================================================
# 12. Logs and metrics: what the service tells about itself while it runs
# ======================================================================================
#
# A log event is one line, whatever names and answers of strangers are in it, and it knows
# the ids of what it is about. A metric is declared once, in METRICS, and all its series are
# there from the first scrape. Nothing in this section reads the database or decides anything.

# --- Logs ---


def about(job_id: str, execution_id: str | None = None) -> dict[str, str]:
    """Return the ``extra`` of a log call about a job or one of its executions.

    JSON logs show the ids as fields, so that programs need not search the sentence. None: the
    event is about the job as a whole.
    """
    ids = {"job_id": job_id}
    if execution_id is not None:
        ids["execution_id"] = execution_id
    return ids


def in_words(job_id: str) -> str:
    """Return what a log event is about: a job, or the alerts, which are one as well."""
    if job_id == ALERTS_ID:
        return "alerts"
    return f"job {job_id}"


# What could forge a line of the log or turn its text around: C0 and C1 controls, direction marks,
# line and paragraph separators, and surrogates, which UTF-8 does not have.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_JOURNAL_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4}  # sd-daemon(3)
_JOURNAL_ERROR = 3  # The priority of every level above those.


class LogFormatter(logging.Formatter):
    """Writes one line an event: control characters of names and errors can't forge a line."""

    def __init__(self, kind: str) -> None:
        """``kind``: text, json, or journal, which has times of its own and reads <priority>."""
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; as text only a traceback of our own has more than one."""
        traceback = ""
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
        if self._kind == "json":
            return self._to_json(record, traceback)
        line = _CONTROLS.sub(_escaped, record.getMessage())
        if self._kind == "text":
            line = f"{self.formatTime(record)} {record.levelname} {line}"
        if traceback:
            line = f"{line}\n{traceback}"
        if self._kind == "journal":
            line = _with_priority(line, record.levelname)
        return line

    def _to_json(self, record: logging.LogRecord, traceback: str) -> str:
        event = {
            "time": format_time(int(record.created * SECOND)),
            "message": record.getMessage(),
            "level": record.levelname.lower(),
        }
        if traceback:
            event["traceback"] = traceback
        for name in ("job_id", "execution_id"):
            # Only records made with about() have these attributes.
            value = getattr(record, name, None)
            if value is not None:
                event[name] = value
        return json.dumps(event)


def _escaped(match: re.Match[str]) -> str:
    r"""Return a character as Python's source would write it, such as \n or \u2028."""
    return match[0].encode("unicode_escape").decode()


def _with_priority(text: str, level: str) -> str:
    """Put the priority before every line, because the journal makes an event of each."""
    priority = _JOURNAL_PRIORITIES.get(level, _JOURNAL_ERROR)
    lines = [f"<{priority}>{line}" for line in text.split("\n")]
    return "\n".join(lines)


class LogWriter(logging.Handler):
    """Writes the log in a thread of its own: where nobody reads it, nobody else waits.

    What does not fit into the queue is dropped and counted, and a later line tells how much.

    attribute   written by        guarded by
    dropped     who logs          the handler's lock, which emit() is called with
    _gap_at     who logs          the handler's lock
    _queued     who logs          the handler's lock
    _lines      who logs          itself  (a queue; None: there will be nothing more)
    _written    the log thread    nothing (others only read it: a number is whole)
    _told       the log thread    nothing (a number is whole)

    The log thread never takes the handler's lock: logging.shutdown() holds it while it waits.
    """

    def __init__(self, descriptor: int) -> None:
        """``descriptor`` is that of an open file."""
        super().__init__()
        self.dropped = 0  # Events.
        self._descriptor = descriptor
        self._gap_at = 0  # So many characters are before the first dropped event untold of.
        self._queued = 0  # Characters so far.
        self._written = 0  # Characters so far, lost ones too.
        self._told = 0  # Of how many dropped events the log has told.
        self._lines = queue.SimpleQueue[str | None]()
        self._is_given_up = False  # Nobody has read the log while flush() was waiting.
        self._thread = threading.Thread(target=self._loop, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Let the thread write an event, or drop it."""
        try:
            line = self.format(record) + "\n"
        except Exception:  # A wrong call of log must not fail the work that it tells of.
            self.handleError(record)
            return
        if self._queued - self._written + len(line) > MAX_LOG_WAITING:
            if self.dropped == self._told:
                self._gap_at = self._queued
            self.dropped += 1
            return
        self._queued += len(line)
        self._lines.put(line)

    def flush(self) -> None:
        """Wait until all is written, once for at most LOG_PATIENCE_S."""
        deadline = time.monotonic() + LOG_PATIENCE_S
        wanted = self._queued
        while self._written < wanted and not self._is_given_up:
            time.sleep(0.005)
            self._is_given_up = time.monotonic() > deadline

    def close(self) -> None:
        """Write what is waiting, and nothing more."""
        self.flush()
        self._lines.put(None)
        super().close()

    def _loop(self) -> None:
        is_open = True
        while is_open:
            lines = self._take()
            is_open = lines[-1] is not None
            text = "".join(line for line in lines if line is not None)
            written = self._written + len(text)
            # A file that is closed or full is no reason to write no more: it may pass.
            with contextlib.suppress(OSError):
                self._write(text)
                if written >= self._gap_at:
                    self._tell_of_dropped()
            self._written = written  # Last: flush() waits for it, and then the process ends.

    def _take(self) -> list[str | None]:
        """Wait for a line, and return it with those behind it, up to LOG_CHUNK or the end."""
        line = self._lines.get()
        lines = [line]
        size = 0
        while line is not None and size < LOG_CHUNK:
            size += len(line)
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                break
            lines.append(line)
        return lines

    def _write(self, text: str) -> None:
        """Write everything, however long that takes. Raises OSError."""
        data = text.encode(errors="backslashreplace")
        while data:
            try:
                written = os.write(self._descriptor, data)
                data = data[written:]
            except BlockingIOError:  # Somebody who shares the file has made it non-blocking.
                time.sleep(0.05)

    def _tell_of_dropped(self) -> None:
        """Write how many events were dropped since this was told last. Raises OSError."""
        count = self.dropped - self._told
        if count == 0 or not log.isEnabledFor(logging.WARNING):
            return
        message = "%s events were dropped here: nobody was reading the log"
        record = log.makeRecord(log.name, logging.WARNING, __file__, 0, message, (count,), None)
        self._write(self.format(record) + "\n")
        self._told += count


def dropped_events() -> int:
    """Return how many events of the log were dropped, because nobody was reading it."""
    handlers = logging.getLogger().handlers
    return sum(handler.dropped for handler in handlers if isinstance(handler, LogWriter))


def _is_no_api_error(record: logging.LogRecord) -> bool:
    """Return False for a traceback of an error that is a sentence for who asked."""
    return not (record.exc_info and isinstance(record.exc_info[1], ApiError))


STDERR = 2  # Its descriptor.


def start_logging(kind: str) -> None:
    """Log to stderr, warnings only until a level is set; logging.shutdown() ends that.

    ``kind`` is logging.format: text or json. Text becomes the journal's form where stderr is
    the journal, which says so in JOURNAL_STREAM (systemd.exec(5)).
    """
    if kind == "text" and _stderr_is_the_journal():
        kind = "journal"
    handler = LogWriter(STDERR)
    handler.setFormatter(LogFormatter(kind))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # waitress would write a line for each request that waits for a thread.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    # Why an answer was broken off amid its body is in our own line already.
    logging.getLogger("waitress").addFilter(_is_no_api_error)
    # A stderr that somebody has closed must not end the service.
    logging.raiseExceptions = False


def _stderr_is_the_journal() -> bool:
    try:
        stderr = os.fstat(STDERR)
    except OSError:
        return False  # It is closed.
    return os.getenv("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


# --- Metrics ---

# Upper bounds of the buckets of every histogram, in seconds. One without bound comes after them.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# What an attempt can end with. "shutdown" is not among them: such an attempt is counted by the
# next start, which finds it interrupted.
ATTEMPT_RESULTS = (
    Status.SUCCESS,
    Reason.HTTP_STATUS,
    Reason.NO_ANSWER,
    Reason.TIMEOUT,
    Reason.BLOCKED,
    Reason.INTERRUPTED,
    Reason.CANCELLED,
    Reason.REPLACED,
    Reason.DELETED,
)


class Metric(NamedTuple):
    """A family of series in the words of Prometheus; its name is its key in METRICS."""

    kind: str  # counter, gauge or histogram
    meaning: str  # A sentence for people: the HELP line.
    label: str | None = None  # What tells its series apart; None: it has only one.
    values: tuple[str, ...] = ()  # Of the label: these series are there from the start.


METRICS: dict[str, Metric] = {
    # Counted by the engine, since the process began.
    "chronos_attempts_total": Metric(
        "counter",
        "Requests that were made, by how they ended.",
        "result",
        ATTEMPT_RESULTS,
    ),
    "chronos_lateness_seconds": Metric(
        "histogram",
        "Time from a fire time to the first request of its execution.",
    ),
    "chronos_execution_duration_seconds": Metric(
        "histogram",
        "Time that executions took, with all attempts and the waits between them.",
    ),
    "chronos_engine_passes_total": Metric(
        "counter",
        "Turns of the engine.",
    ),
    "chronos_store_errors_total": Metric(
        "counter",
        "Turns of the engine that the database refused.",
    ),
    # Looked up when Prometheus asks.
    "chronos_jobs": Metric(
        "gauge",
        "Jobs, by whether their schedule fires.",
        "state",
        ("enabled", "disabled"),
    ),
    "chronos_failing_jobs": Metric(
        "gauge",
        "Enabled jobs whose newest executions failed or were missed.",
    ),
    "chronos_executions": Metric(
        "gauge",
        "Executions that have not ended, by their status.",
        "status",
        (Status.PENDING, Status.RUNNING),
    ),
    "chronos_executions_ended_total": Metric(
        "counter",
        "Executions that have ended since the database began, by how they ended.",
        "result",
        tuple(ENDINGS),
    ),
    "chronos_log_events_dropped_total": Metric(
        "counter",
        "Events that are not in the log, because nobody was reading it.",
    ),
    "chronos_last_pass_age_seconds": Metric(
        "gauge",
        "Time since the engine or the watchdog last went round; beyond 30 it hangs.",
    ),
    "chronos_is_leader": Metric(
        "gauge",
        "1 where this process turns fire times into executions.",
    ),
    "chronos_build_info": Metric(
        "gauge",
        "Always 1; the label has the version of Chronos.",
        "version",
        (__version__,),
    ),
    "process_start_time_seconds": Metric(
        "gauge",
        "When the process began, in seconds since the epoch.",
    ),
    "process_resident_memory_bytes": Metric(
        "gauge",
        "Memory that the process has in RAM.",
    ),
    "process_open_fds": Metric(
        "gauge",
        "File descriptors that the process has open.",
    ),
}


class Histogram:
    """Counts durations by their length.

    attribute   written by   guarded by
    _counts     the engine   nothing (each is of one bucket alone, so whatever moment a reader
                             meets, the sums that samples() makes of them fit each other)
    _sum        the engine   nothing (a reader may meet it one duration behind the counts)
    """

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)  # The last is of what is above all bounds.
        self._sum = 0.0  # seconds

    def add(self, seconds: float) -> None:
        """Count one duration. A bound belongs to the bucket below it."""
        bucket = bisect_left(BUCKETS, seconds)
        self._counts[bucket] += 1
        self._sum += seconds

    def samples(self, name: str) -> list[str]:
        """Return the lines of the text format: each bucket has all shorter durations too."""
        bounds = [f"{bound:g}" for bound in BUCKETS]
        bounds.append("+Inf")
        lines = []
        total = 0
        for bound, count in zip(bounds, list(self._counts), strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        lines.append(f"{name}_sum {self._sum}")
        lines.append(f"{name}_count {total}")
        return lines


class Metrics:
    """The numbers that Prometheus scrapes, each zero at the start.

    attribute     written by   guarded by
    _numbers      the engine   nothing (one number changes at a time, and readers copy)
    _histograms   the engine   nothing (see Histogram)
    """

    def __init__(self) -> None:
        self._numbers: dict[str, dict[str, float]] = {}  # name -> value of the label -> number
        self._histograms: dict[str, Histogram] = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                self._histograms[name] = Histogram()
            elif metric.label is None:
                self._numbers[name] = {"": 0}
            else:
                self._numbers[name] = dict.fromkeys(metric.values, 0)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter: ``count("chronos_attempts_total", result="success")``.

        A value of the label that METRICS does not name begins a series of its own.
        Raises KeyError for another name of the family or label: a bug in the caller.
        """
        label = METRICS[name].label
        value = ""
        if label is not None:
            value = labels[label]
        numbers = self._numbers[name]
        numbers[value] = numbers.get(value, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        self._histograms[name].add(seconds)

    def text(self, gauges: Mapping[str, float | Mapping[str, float]]) -> str:
        """Return everything in Prometheus' text format, version 0.0.4.

        ``gauges`` has what the caller looked up for this scrape: by name of the family the
        number, or where the family has a label its numbers by the values of the label. What it
        does not name is 0.
        """
        lines = []
        for name, metric in METRICS.items():
            lines.append(f"# HELP {name} {metric.meaning}")
            lines.append(f"# TYPE {name} {metric.kind}")
            if metric.kind == "histogram":
                lines += self._histograms[name].samples(name)
            else:
                lines += self._samples(name, gauges.get(name, {}))
        return "\n".join(lines) + "\n"

    def _samples(self, name: str, looked_up: float | Mapping[str, float]) -> list[str]:
        numbers = dict(self._numbers[name])
        if isinstance(looked_up, Mapping):
            numbers.update(looked_up)
        else:
            numbers[""] = looked_up
        label = METRICS[name].label
        if label is None:
            return [f"{name} {number}" for number in numbers.values()]
        return [f'{name}{{{label}="{value}"}} {number}' for value, number in numbers.items()]


PROCESS_FILES = Path("/proc/self")  # Only Linux has them.


def resident_memory() -> int:
    """Return how many bytes of the process are in RAM; 0 where the system does not say."""
    try:
        numbers = (PROCESS_FILES / "statm").read_text().split()
    except OSError:
        return 0
    pages = int(numbers[1])  # proc(5)
    return pages * resource.getpagesize()


def open_files() -> int:
    """Return how many file descriptors the process has open; 0 where the system does not say."""
    for directory in (PROCESS_FILES / "fd", Path("/dev/fd")):
        with contextlib.suppress(OSError):
            return len(os.listdir(directory))
    return 0


# ======================================================================================
# 13. Requests: what goes over the wire for a webhook, made ready once per job version
# ======================================================================================
#
# A URL goes out as it is written, for a signature may depend on each octet of it; headers and
# body are prepared by requests. That costs more than anything else of an attempt, so it is done
# once per version of a job, and an attempt only adds its own headers. Here is no socket and no
# database.

SHORTEST_MASKED = 6  # Characters: a shorter secret would mask parts of words, and hide nothing.
ESCAPE_LEVELS = 3  # So deep escapes are looked through: JSON in a string of JSON in HTML.
SHORTEST_BEGINNING = 3  # Characters of a secret that are taken for its beginning where text is cut.


class ConnectionKey(NamedTuple):
    """What two requests have in common that can go over the same connection."""

    target: str  # As target_of() returns it: scheme://host:port
    verify_tls: bool


class Webhook:
    """A valid ``webhook`` of a job version, made ready to be sent.

    Any thread may use it. Nothing in it changes; what costs time is made by the first worker
    that needs it, and kept.
    """

    def __init__(self, config: Json, hides_url: bool = False) -> None:
        """``hides_url``: what comes after the host in its URL is a secret, too.

        Raises ValueError if the URL can't be called, or nothing be signed with the secret.
        """
        self._url = read_stored_url(config["url"])
        self.target = self._url.origin
        self._hides_url = hides_url
        self.method: str = config["method"]
        self.success_codes: list[int] | range = config["success_codes"] or range(200, 300)
        self._config = config
        secret: str | None = config["signing_secret"]
        self._signing_keys = signing_keys(secret) if secret else []

    # --- Secrets ---

    @functools.cached_property
    def secrets(self) -> list[str]:
        """What is masked in the text that is kept of an answer, the longest first."""
        headers: dict[str, str] = self._config["headers"]
        auth: Json = self._config["auth"] or {}
        found = [value for name, value in headers.items() if is_secret_header(name)]
        found += [auth[name] for name in SECRET_AUTH_FIELDS if name in auth]
        for secret in (self._config["signing_secret"] or "").split(" "):
            found += [secret, secret.removeprefix(SIGNING_PREFIX)]
        authorization = str(self.request.headers.get("Authorization", ""))
        found.append(authorization.rpartition(" ")[2])  # Less the scheme, such as Bearer.
        if self._hides_url:
            found += url_secrets(rest_of_url(self._config["url"]))
            found += url_secrets(self._url.resource)  # As it goes out, and may come back.
        return to_be_masked(found)

    def masked(self, text: str, cut: bool = False) -> str:
        """Return a text without the secrets, however their characters are escaped.

        ``cut``: the text was cut off, so that its end may be the beginning of a secret; that
        goes as well.
        """
        return without_secrets(text, self.secrets, cut)

    # --- The request ---

    @functools.cached_property
    def request(self) -> requests.PreparedRequest:
        """The prepared request, without the headers of an attempt and without the URL.

        requests would rewrite that: other escapes, no dots, another case.
        """
        body: str = self._config["body"] or ""
        # Step by step, because prepare() as a whole looks for cookies, too.
        prepared = requests.PreparedRequest()
        prepared.prepare_method(self.method)
        prepared.prepare_headers(self._headers(body))
        prepared.prepare_body(body.encode(), None)
        prepared.headers.setdefault("Host", self._url.authority)
        return prepared

    def _headers(self, body: str) -> Mapping[str, str]:
        """Return our headers, then the job's own, then that of ``auth``; the later one wins."""
        headers = requests.structures.CaseInsensitiveDict[str]()
        headers["Accept"] = "*/*"
        headers["User-Agent"] = f"chronos/{__version__}"
        # A packed answer could be a bomb, so none is asked for.
        headers["Accept-Encoding"] = "identity"
        if body:
            headers["Content-Type"] = content_type_of(body)
        headers.update(self._config["headers"])
        auth = self._config["auth"]
        if auth:
            name, value = auth_header(auth)
            headers[name] = value
        return headers

    @functools.cached_property
    def connection_key(self) -> ConnectionKey:
        """Which connections can carry the request."""
        return ConnectionKey(self.target, self._config["verify_tls"])

    @functools.cached_property
    def head(self) -> str:
        """The request line and the headers, as far as all attempts have the same ones."""
        lines = [f"{self.method} {self._url.resource} HTTP/1.1\r\n"]
        for name, value in self.request.headers.items():
            lines.append(f"{name}: {value!s}\r\n")
        return "".join(lines)

    @functools.cached_property
    def _body(self) -> bytes:
        return self.request.body or b""  # type: ignore[return-value]

    @functools.cached_property
    def _has_own_key(self) -> bool:
        return "Idempotency-Key" in self.request.headers

    def to_bytes(self, execution: Execution) -> bytes:
        """Return the request of the attempt that ``execution`` is in."""
        head = (
            f"{self.head}X-Chronos-Job-ID: {execution.job_id}\r\n"
            f"X-Chronos-Execution-ID: {execution.id}\r\n"
            f"X-Chronos-Scheduled-Time: {format_time(execution.scheduled_at)}\r\n"
            f"X-Chronos-Attempt: {execution.attempts}\r\n"
        )
        if not self._has_own_key:
            head += f"Idempotency-Key: {execution.id}\r\n"
        if self._signing_keys:
            head += self._signature(execution)
        return f"{head}\r\n".encode("latin-1") + self._body

    def _signature(self, execution: Execution) -> str:
        """Return the headers that sign an attempt, as Standard Webhooks specifies them.

        Of each attempt the time is another one, so that nobody can send an old request again.
        """
        timestamp = (execution.attempt_at or 0) // SECOND
        signed = f"{execution.id}.{timestamp}.".encode() + self._body
        signatures = []
        for key in self._signing_keys:
            digest = hmac.digest(key, signed, "sha256")
            signatures.append(f"v1,{base64.b64encode(digest).decode()}")
        return (
            f"webhook-id: {execution.id}\r\n"
            f"webhook-timestamp: {timestamp}\r\n"
            f"webhook-signature: {' '.join(signatures)}\r\n"
        )


# --- How secrets are spelled by those who repeat them ---


def to_be_masked(secrets: Iterable[str]) -> list[str]:
    """Return what is looked for to mask these secrets, the longest first."""
    spellings = {spelling for secret in secrets for spelling in spellings_of(secret)}
    long_enough = {spelling for spelling in spellings if len(spelling) >= SHORTEST_MASKED}
    return sorted(long_enough, key=len, reverse=True)


def without_secrets(text: str, secrets: Sequence[str], cut: bool = False) -> str:
    """Return a text without ``secrets``, which are as to_be_masked() returns them.

    ``cut``: see Webhook.masked().
    """
    if not secrets:
        return text
    plain = text
    levels = 0  # So often its escapes were resolved.
    steps: list[Unescaped] = []  # The same, with the places: they are looked up seldom.
    found: list[tuple[int, int]] = []  # Where secrets begin and end in the text.
    while True:
        for begin, end in places_of(secrets, plain, cut):
            while len(steps) < levels:
                steps.append(Unescaped(steps[-1].text if steps else text))
            for step in reversed(steps):
                begin = step.place(begin)
                end = step.place(end)
            found.append((begin, end))
        has_escapes = any(mark in plain for mark in ("\\", "&", "%"))
        if levels == ESCAPE_LEVELS or not has_escapes:
            return with_masks(text, found)
        plain = _ESCAPE.sub(resolved, plain)
        levels += 1


def places_of(secrets: Sequence[str], text: str, cut: bool) -> Iterator[tuple[int, int]]:
    """Yield where secrets begin and end in a text without escapes."""
    wholes = without_half_escapes(text) if cut else []
    for secret in secrets:
        begin = text.find(secret)
        while begin >= 0:
            yield begin, begin + len(secret)
            begin = text.find(secret, begin + len(secret))
        for whole in wholes:
            length = length_of_beginning(secret, whole)
            if length:
                yield len(whole) - length, len(text)


# The escapes of JSON and JavaScript, of Python's bytes, HTML and URLs.
_ESCAPE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}"
    r"|\\x[0-9a-fA-F]{2}|\\[\"'\\/bfnrt]"
    r"|&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
    r"|(?:%[0-9a-fA-F]{2})+"
)
# What may be left at the end of a text that was cut amid some of them; octets are characters.
_HALF_ESCAPE = re.compile(
    r"(?:\\(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?)?|&[#A-Za-z0-9]{0,31}|%[0-9a-fA-F]?|[\x80-\xff])\Z"
)
_LETTER_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def spellings_of(secret: str) -> set[str]:
    """Return a secret as it may come back in an answer, escapes aside."""
    spellings = {
        secret,
        secret.replace(" ", "+"),  # As in the query of a URL.
        secret.encode().decode("latin-1"),  # It was UTF-8, and taken for Latin-1.
    }
    with contextlib.suppress(UnicodeEncodeError):
        octets = secret.encode("latin-1")  # As a header has it; our reader takes it for UTF-8.
        spellings.add(octets.decode("utf-8", "replace"))
    for spelling in list(spellings):
        for _level in range(ESCAPE_LEVELS):
            # What looks like an escape in the secret is resolved with those that are some.
            spelling = _ESCAPE.sub(resolved, spelling)
            spellings.add(spelling)
    return spellings


def url_secrets(rest: str) -> list[str]:
    """Return what could be the secret in path and query of a URL that lets in who knows it."""
    parts = [rest, *re.split("[/?&=;#]", rest)]
    return parts + [unquote(part) for part in parts]


def resolved(escape: re.Match[str]) -> str:
    """Return what an _ESCAPE stands for."""
    if escape[0][0] == "%":
        text, _codec = _from_octets(escape[0])
        return text
    return _from_name(escape[0])


def _from_octets(escape: str) -> tuple[str, str]:
    """Return what escapes such as %C3%A4 stand for, and the codec that they are in."""
    octets = bytes.fromhex(escape.replace("%", ""))
    try:
        return octets.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return octets.decode("latin-1"), "latin-1"


@functools.lru_cache(1024)
def _from_name(escape: str) -> str:
    """Return what one escape with a backslash or an ampersand stands for."""
    if escape[0] == "&":
        return html.unescape(escape)
    if escape[1] == "u":
        return str(json.loads(f'"{escape}"'))
    if escape[1] == "x":
        return chr(int(escape[2:], 16))
    return _LETTER_ESCAPES.get(escape[1], escape[1])


def characters_of(escape: re.Match[str]) -> list[tuple[str, int]]:
    """Return the characters that an _ESCAPE stands for, each with its length in it."""
    if escape[0][0] == "%":
        text, codec = _from_octets(escape[0])
        return [(character, 3 * len(character.encode(codec))) for character in text]
    text = resolved(escape)
    if text == escape[0]:
        return [(character, 1) for character in text]  # There is no such entity.
    lengths = [len(escape[0])] + [0] * len(text)
    return list(zip(text, lengths, strict=False))


class Unescaped:
    """A text with one level of its escapes resolved, which knows where each character was."""

    def __init__(self, source: str) -> None:
        pieces: list[str] = []
        self._indices = [0]  # From each of these on, in the new text, characters follow
        self._origins = [0]  # one another as in the source from here on.
        index = 0
        done = 0  # So much of the source.
        for match in _ESCAPE.finditer(source):
            pieces.append(source[done : match.start()])
            index += match.start() - done
            done = match.start()
            for character, length in characters_of(match):
                pieces.append(character)
                index += 1
                done += length
                self._indices.append(index)
                self._origins.append(done)
            if done < match.end():  # It stands for no character at all.
                done = match.end()
                self._indices.append(index)
                self._origins.append(done)
        pieces.append(source[done:])
        self.text = "".join(pieces)

    def place(self, index: int) -> int:
        """Return where in the source a character of the text begins, or the one before ends."""
        number = bisect_right(self._indices, index) - 1
        return self._origins[number] + index - self._indices[number]


def with_masks(text: str, found: list[tuple[int, int]]) -> str:
    """Return a text with a mask for each of these places, one for those that overlap."""
    pieces: list[str] = []
    done = 0
    for begin, end in sorted(found):
        if begin >= done:
            pieces += [text[done:begin], MASK]
        done = max(done, end)
    pieces.append(text[done:])
    return "".join(pieces)


def without_half_escapes(text: str) -> list[str]:
    """Return a text that was cut off, and what it is without half an escape at its end.

    Half an escape of one level may stand before that of another.
    """
    found = [text]
    while len(found) <= ESCAPE_LEVELS:
        last = found[-1]
        half = _HALF_ESCAPE.search(last, max(0, len(last) - 64))
        if half is None:
            break
        found.append(last[: half.start()])
    return found


def length_of_beginning(secret: str, text: str) -> int:
    """Return how much of the beginning of ``secret`` a text ends with; 0: nothing of it."""
    for length in range(len(secret) - 1, SHORTEST_BEGINNING - 1, -1):
        if text.endswith(secret[:length]):
            return length
    return 0


def content_type_of(body: str) -> str:
    """Return the Content-Type of a body whose job names none: JSON if it parses, else text."""
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return "text/plain; charset=utf-8"
    return "application/json"


def auth_header(auth: Json) -> tuple[str, str]:
    """Return name and value of the header that a valid ``webhook.auth`` stands for.

    Basic is that of RFC 7617 in UTF-8, bearer that of RFC 6750.
    """
    if auth["type"] == "basic":
        pair = f"{auth['username']}:{auth['password']}"
        return "Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}"
    if auth["type"] == "bearer":
        return "Authorization", f"Bearer {auth['token']}"
    return auth["header"], auth["api_key"]


# ======================================================================================
# 14. The wire: one HTTP request, its hard limit, and the check of the address it goes to
# ======================================================================================
#
# Dispatcher.send() makes one attempt and never raises; retries are decided elsewhere, and no
# SQL is here. Sockets and the reading of answers are our own, because no timeout of requests is
# a limit: a server that drips bytes renews them all. What ends a blocked call from another thread
# is shutdown() on a duplicate of the socket's descriptor, made before connect(): close() leaves
# the call blocked, and TLS detaches the socket it wraps.

RECEIVE_BYTES = 65_536  # That one call of recv() may return.
PHRASE_LIMIT = 200  # Characters that are kept of a sentence with a target's own words in it.
SHORTEST_TIMEOUT_S = 0.001  # A socket takes 0 for "do not block", and we mean "at once".


class BlockedTarget(requests.RequestException):
    """The address that would be dialled is closed by the settings."""


class AttemptAborted(requests.RequestException):
    """The attempt was aborted; why is in its ``reason``."""


@dataclass(eq=False, slots=True)
class Attempt:
    """One HTTP request of an execution, and the means to end it from another thread.

    attribute   written by                       guarded by
    limit       its worker, before it begins     nothing (the watchdog reads it later)
    reason      who aborts it first              _lock; it is set once, so reading needs none
    _cut        its worker                       _lock
    """

    execution: Execution
    webhook: Webhook
    allowed: int  # Time for this attempt, in µs.
    cut_reason: CutReason  # What it is aborted for at its limit: TIMEOUT or ATTEMPT_TIMEOUT.
    limit: int = 0  # Instant of the monotonic clock when the watchdog aborts it.
    reason: CutReason | None = None  # None: nobody has aborted it.
    _cut: Callable[[], None] | None = None  # Ends what the worker blocks in; None: nothing.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def blocking(self, cut: Callable[[], None]) -> Iterator[None]:
        """While the worker blocks in this context, an abort calls ``cut``, which must end that.

        ``cut`` is called by other threads, under the lock: it must not block itself.
        Raises AttemptAborted if the attempt was aborted before, or meanwhile without an error.
        """
        with self._lock:
            if self.reason:
                raise AttemptAborted
            self._cut = cut
        try:
            yield
        finally:
            with self._lock:
                self._cut = None
        if self.reason:
            # What was received until the cut may look like a whole answer, and is none.
            raise AttemptAborted

    def abort(self, reason: CutReason) -> None:
        """End the attempt now; of several reasons the first one counts. Any thread may call it."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            if self._cut:
                self._cut()


# --- Which addresses may be dialled ---

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the IPv4 address is in the last 32 bits.


@functools.lru_cache
def parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return a network such as 10.0.0.0/8; the settings have few, so all stay parsed."""
    return ipaddress.ip_network(text)


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that is reached through this one; None: it stands for itself.

    Such are the IPv4-mapped addresses (RFC 4291), 6to4 (RFC 3056) and NAT64 (RFC 6052).
    """
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def readings_of(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return a numeric address in all its meanings; the last is the one that is reached."""
    without_zone = host.partition("%")[0]  # fe80::1%eth0 names the interface too.
    address = ipaddress.ip_address(without_zone)
    readings = [address]
    if isinstance(address, ipaddress.IPv6Address):
        inner = embedded_ipv4(address)
        if inner is not None:
            readings.append(inner)
    reached = readings[-1]
    if reached.is_unspecified:
        # Linux connects to loopback where 0.0.0.0 or :: is dialled.
        loopback = "127.0.0.1" if reached.version == 4 else "::1"
        readings.append(ipaddress.ip_address(loopback))
    return readings


def check_address(host: str, blocked: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise BlockedTarget if the settings close this numeric address.

    It is the address that is dialled, so no name and no answer of DNS can deceive the check.
    ``blocked`` and ``allowed`` are networks; ``allowed`` empty: all that is not blocked is open.
    """
    readings = readings_of(host)
    for network in blocked:
        if any(address in parse_network(network) for address in readings):
            raise BlockedTarget(f"{host} is blocked: dispatcher.blocked_networks has {network}")
    reached = readings[-1]
    if allowed and not any(reached in parse_network(network) for network in allowed):
        raise BlockedTarget(f"{host} is blocked: it is not in dispatcher.allowed_networks")


# --- HTTP/1.1 on a connection ---

_STATUS_LINE = re.compile(r"(?i)HTTP/([0-9]\.[0-9]) +([1-9][0-9]{2})(?: (.*))?")
_FOLD = re.compile("\n[ \t]+")
# It may be there several times, or list the same number again (RFC 9110, 8.6).
_CONTENT_LENGTH = re.compile(r"0{0,99}([0-9]{1,18})(?:, *0{0,99}\1)*")
_CHUNK_SIZE = re.compile("0{0,99}[0-9A-Fa-f]{1,16}")
PACKINGS = frozenset({"gzip", "x-gzip", "deflate"})  # Content and transfer codings that we unpack,
FOREIGN_PACKINGS = frozenset({"br", "zstd", "compress", "x-compress"})  # and those that we can't.
_PLAIN_CHUNK_HEAD = re.compile(b"([0-9A-Fa-f]{1,8})\r\n")


class Head(NamedTuple):
    """What precedes the body of an answer."""

    version: str  # That of HTTP, such as 1.1
    code: int
    phrase: str
    headers: dict[str, str]  # The names in lower case.


class Answer(NamedTuple):
    """A whole answer, but for what of its body is beyond the limit."""

    head: Head
    body: bytes


def ask_for_keepalive(connection: socket.socket) -> None:
    """Have TCP look whether a quiet peer is there: NAT forgets connections that nothing goes over.

    The answer to a run that takes an hour would not find its way back then (RFC 5382, REQ-5).
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):  # On Linux, and on macOS.
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, TCP_KEEPALIVE_S)
            return


class Connection:
    """A connection to a target, and HTTP/1.1 on it (RFC 9112): liberal and bounded.

    What curl, and Go or Node, take for an answer is one: to refuse it would be to send again what
    the target has done. But where an answer ends must be clear: else it is refused, or at least
    the connection carries no other request.

    One worker uses it at a time, and only cut() may be called by other threads meanwhile.
    Reading raises OSError, EOFError, or ValueError: what came is no HTTP.
    """

    def __init__(self, key: ConnectionKey, family: int) -> None:
        """``family``: AF_INET or AF_INET6. The connection is not connected yet."""
        self.key = key
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        ask_for_keepalive(self.socket)
        self.used_at_mono = 0  # When it became idle, by the monotonic clock.
        self.reusable = False  # The last answer was read to its end, and nothing follows it.
        self.is_for_one_request = False  # Whatever the answer says.
        self.heard = False  # Something came after the last request.
        self._handle = self.socket.dup()  # What cut() shuts down; see the head of the section.
        self._received = bytearray()  # It has come and is not read yet.
        self._peer_has_closed = False
        self._line_bytes_left = 0  # That the lines of the answer that is read may still have.

    def cut(self) -> None:
        """Shut the connection down: blocked calls on it return at once."""
        with contextlib.suppress(OSError):
            self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close both descriptors: an open duplicate would keep the connection alive."""
        self._handle.close()
        self.socket.close()

    def is_quiet(self) -> bool:
        """Say whether an idle connection is still open and nothing unasked has come on it."""
        try:
            self._handle.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            # Nothing waits in the socket, but TLS may have read ahead.
            has_read_ahead = isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0
            return not has_read_ahead
        except OSError:
            return False
        return False  # There are bytes, or the end of the stream.

    def exchange(self, request: bytes, method: str, limit: int) -> Answer:
        """Send a request and return its answer.

        Of a body with more than ``limit`` bytes, ``limit`` + 1 are returned.
        Raises requests.ConnectionError if no whole and proper answer comes.
        """
        self.reusable = False
        self.heard = False
        self._line_bytes_left = MAX_HEAD_BYTES
        head = None
        was_sent = self._send(request)
        try:
            self._wait_for(1)
            self.heard = True
            head = self._read_final_head()
            body = self._read_body(head, method, limit)
        except ValueError as error:
            problem = f"sent what is not a proper HTTP answer: {error}"
            raise requests.ConnectionError(f"{self.key.target} {problem}") from error
        except (OSError, EOFError) as error:
            problem = how_it_broke(error, self.heard, head, was_sent)
            raise requests.ConnectionError(f"{self.key.target} {problem}") from error
        self.reusable = was_sent and len(body) <= limit and self._may_stay_open(head)
        return Answer(head, body)

    def _send(self, request: bytes) -> bool:
        """Say whether the whole request was taken."""
        try:
            self.socket.sendall(request)
        except OSError:
            # The target has stopped reading: its answer, say 413, may be there all the same.
            return False
        return True

    def _may_stay_open(self, head: Head) -> bool:
        """Say whether another request may follow on the connection (RFC 9112, 9.3)."""
        if self.is_for_one_request:
            return False
        headers = head.headers
        if head.version != "1.1" or "close" in headers.get("connection", "").lower():
            return False
        if head.code == 101:
            return False
        coding = headers.get("transfer-encoding")
        if coding is not None and (coding.lower() != "chunked" or "content-length" in headers):
            return False  # It may be an attempt at smuggling (RFC 9112, 6.1).
        return not self._peer_has_closed and not self._received

    def _read_final_head(self) -> Head:
        """Pass over interim answers: 100 Continue, 103 Early Hints (RFC 9110, 15.2).

        101 is none: after it another protocol begins, and no answer of HTTP would come.
        """
        head = self._read_head()
        while head.code < 200 and head.code != 101:
            head = self._read_head()
        return head

    def _read_head(self) -> Head:
        """Read the status line and the headers; different values of one are joined by a comma."""
        status = _STATUS_LINE.fullmatch(self._read_line())
        if not status:
            raise ValueError("a wrong status line")
        headers: dict[str, str] = {}
        several: dict[str, list[str]] = {}  # Values of the headers that are there several times.
        for line in self._read_header_lines():
            name, _colon, value = line.partition(":")
            name = name.strip().lower()
            value = value.strip()
            if headers.setdefault(name, value) != value:
                several.setdefault(name, [headers[name]]).append(value)
        for name, values in several.items():
            headers[name] = ", ".join(dict.fromkeys(values))
        version, code, phrase = status.groups(default="")
        return Head(version, int(code), phrase, headers)

    def _read_header_lines(self) -> list[str]:
        """Return the lines of a head, each that was folded as a single one (RFC 9112, 5.2)."""
        lines: list[str] = []
        is_folded = False
        while (line := self._read_line()) != "":
            if line[0] in " \t" and lines:
                is_folded = True  # It goes on with the line above.
            elif ":" not in line or line[0] in " \t":
                raise ValueError("a wrong header")
            lines.append(line)
        if not is_folded:
            return lines
        return _FOLD.sub(" ", "\n".join(lines)).split("\n")

    def _read_body(self, head: Head, method: str, limit: int) -> bytes:
        """Return the body, at most one byte more than ``limit`` (RFC 9112, 6.3)."""
        if method == "HEAD" or head.code in (101, 204, 304):
            return b""
        codings = codings_of(head.headers.get("transfer-encoding"))
        if codings:
            return self._read_chunks(limit) if is_chunked(codings) else self._read_to_the_end(limit)
        length = head.headers.get("content-length")
        if length is None:
            return self._read_to_the_end(limit)
        number = _CONTENT_LENGTH.fullmatch(length)
        if not number:
            # Or different ones: whichever is taken, somebody may have meant another.
            raise ValueError("a wrong Content-Length")
        return self._read(min(int(number[1]), limit + 1))

    def _read_to_the_end(self, limit: int) -> bytes:
        """Return a body that ends where the target closes the connection."""
        with contextlib.suppress(EOFError):
            self._wait_for(limit + 1)
        return self._read(min(len(self._received), limit + 1))

    def _read_chunks(self, limit: int) -> bytes:
        """Return a chunked body (RFC 9112, 7.1), less its trailers."""
        body = bytearray()
        # There may be so much around it because each chunk may have a single byte.
        self._line_bytes_left += 8 * limit
        while len(body) <= limit:
            self._take_whole_chunks(body, limit)
            size = self._read_chunk_size()
            if size == 0:
                self._skip_trailers()
                break
            body += self._read(min(size, limit + 1 - len(body)))
            if len(body) <= limit and self._read_line() != "":
                raise ValueError("a chunk longer than its size")
        return bytes(body)

    def _take_whole_chunks(self, body: bytearray, limit: int) -> None:
        """Move to ``body`` the chunks in plain form that have come as a whole.

        Line by line, thousands of chunks of a single byte would cost five times as much. What
        comes next is for others: the end, the chunk that passes ``limit``, whatever is special.
        """
        place = 0
        around = 0
        while head := _PLAIN_CHUNK_HEAD.match(self._received, place):
            size = int(head[1], 16)
            begin = head.end()
            end = begin + size
            is_whole = self._received.startswith(b"\r\n", end)
            if size == 0 or not is_whole or len(body) + size > limit:
                break
            body += self._received[begin:end]
            around += begin - place + 2
            place = end + 2
        del self._received[:place]
        self._line_bytes_left -= around  # Whether that was too much, the next line shows.

    def _read_chunk_size(self) -> int:
        digits = self._read_line().partition(";")[0].strip()  # Extensions come after a semicolon.
        if not _CHUNK_SIZE.fullmatch(digits):
            raise ValueError("a wrong size of a chunk")
        return int(digits, 16)

    def _skip_trailers(self) -> None:
        try:
            while self._read_line() != "":
                pass
        except (OSError, EOFError):
            # The answer is whole all the same: nothing that counts comes after the last chunk.
            self._peer_has_closed = True

    def _read_line(self) -> str:
        """Return a line without its end, which may be a bare line feed (RFC 9112, 2.2)."""
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > MAX_HEAD_BYTES:
                raise ValueError("a line too long")
            self._wait_for(searched + 1)
        self._line_bytes_left -= end + 1
        if self._line_bytes_left < 0:
            raise ValueError("too much around its body")
        line = self._read(end + 1)[:-1]
        return line.decode("latin-1").rstrip("\r")

    def _read(self, size: int) -> bytes:
        self._wait_for(size)
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _wait_for(self, size: int) -> None:
        """Wait until so many bytes have come that are not read yet. Raises EOFError."""
        while len(self._received) < size:
            data = self.socket.recv(RECEIVE_BYTES)
            if not data:
                self._peer_has_closed = True
                raise EOFError
            self._received += data


def how_it_broke(error: OSError | EOFError, heard: bool, head: Head | None, was_sent: bool) -> str:
    """Return what is known about an answer that did not come as a whole, for people.

    ``heard``: some of it came; ``head``: so much of it; ``was_sent``: the request went out whole.
    """
    if head is not None:
        return f"closed the connection amid its answer, a {head.code}"
    if heard:
        return "closed the connection amid its answer"
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        # With TLS 1.3 a server asks for a certificate in the handshake, and complains of the
        # one that is missing only when the request is on its way (RFC 8446, 4.4.2.4).
        return f"closed the connection without an answer: {why_not_connected(error)}"
    if was_sent:
        return "closed the connection without an answer; it may have worked on the request"
    return "closed the connection without an answer"


def codings_of(header: str | None) -> list[str]:
    """Return the names in a Transfer-Encoding or Content-Encoding, in lower case.

    None: there is no such header. ``identity`` says that nothing was done, so it is left out.
    """
    if header is None:
        return []
    names = [name.strip().lower() for name in header.split(",")]
    return [name for name in names if name not in ("", "identity")]


def is_chunked(codings: list[str]) -> bool:
    """Say whether a body with these transfer codings comes in chunks, or else ends with the stream.

    It does if ``chunked`` is the last one (RFC 9112, 6.3); some servers say it twice. Raises
    ValueError if it is elsewhere or a coding is unknown: then clients disagree about the end.
    """
    inner = list(codings)
    while inner and inner[-1] == "chunked":
        inner.pop()
    if not PACKINGS.issuperset(inner):
        raise ValueError("an unknown Transfer-Encoding")
    return len(inner) < len(codings)


def unpacked(answer: Answer, limit: int) -> bytes:
    """Return the body of an answer, less the packing that was not asked for (RFC 9110, 8.4).

    Of one with more than ``limit`` bytes, ``limit`` + 1 are returned, so that it can't be a bomb.
    A body that is not what its header says stays as it came. Raises ValueError if it is packed
    in a way that can't be undone here.
    """
    headers = answer.head.headers
    codings = codings_of(headers.get("content-encoding"))
    codings += codings_of(headers.get("transfer-encoding"))
    packings = [name for name in codings if name in PACKINGS | FOREIGN_PACKINGS]
    if not packings or not answer.body:
        return answer.body
    if len(packings) > 1 or packings[0] in FOREIGN_PACKINGS:
        raise ValueError(", ".join(packings))
    windows = [32 + zlib.MAX_WBITS]  # Its first bytes say whether it is gzip or zlib.
    if packings[0] == "deflate":
        windows.append(-zlib.MAX_WBITS)  # Some servers leave out what zlib has around it.
    for window in windows:
        unpacker = zlib.decompressobj(window)
        with contextlib.suppress(zlib.error):
            body = unpacker.decompress(answer.body, limit + 1)
            if body or unpacker.eof or len(answer.body) > limit:
                return body
    return answer.body


class IdleConnections:
    """Connections that wait for their next request.

    attribute      written by             guarded by
    _connections   workers, watchdog      _lock  (the one that is idle longest stands first)
    """

    def __init__(self, clock: Clock, most: int) -> None:
        self._clock = clock
        self._most = most
        self._connections: list[Connection] = []
        self._lock = threading.Lock()

    def take(self, key: ConnectionKey) -> Connection | None:
        """Return one that is still open and belongs to the caller now; None: there is none."""
        connection = self._pop_newest(key)
        while connection is not None and not connection.is_quiet():
            connection.close()
            connection = self._pop_newest(key)
        return connection

    def _pop_newest(self, key: ConnectionKey) -> Connection | None:
        with self._lock:
            # From its end, because who used it last has most likely kept it open.
            for place in reversed(range(len(self._connections))):
                if self._connections[place].key == key:
                    return self._connections.pop(place)
        return None

    def keep(self, connection: Connection) -> None:
        """Take a connection that can carry another request."""
        connection.used_at_mono = self._clock.monotonic()
        with self._lock:
            self._connections.append(connection)

    def close(self, older_than: int) -> None:
        """Close those that have been idle for so many µs, and the oldest where there are too many.

        ``older_than`` 0 closes all.
        """
        limit = self._clock.monotonic() - older_than
        with self._lock:
            while self._connections:
                oldest = self._connections[0]
                if len(self._connections) <= self._most and oldest.used_at_mono > limit:
                    break
                self._connections.pop(0)
                oldest.close()


# --- From a name to addresses ---


class Address(NamedTuple):
    """Where a host can be dialled."""

    family: int  # AF_INET or AF_INET6
    sockaddr: tuple[Any, ...]  # What connect() takes; the numeric address stands first.


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Return the addresses of a host. Raises OSError, or UnicodeError: it can't be a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [Address(family, sockaddr) for family, _kind, _protocol, _name, sockaddr in found]


class Resolver:
    """Looks names up without hanging: a look-up that hangs is left behind in its thread.

    attribute   written by                  guarded by
    _places     the threads of look-ups     itself  (a semaphore: MAX_LOOKUPS at once)
    """

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(MAX_LOOKUPS)

    def resolve(self, host: str, port: int, patience_s: float, attempt: Attempt) -> list[Address]:
        """Return the addresses of a host, after ``patience_s`` seconds at most.

        Raises requests.ConnectionError if there is none, and AttemptAborted.
        """
        with contextlib.suppress(socket.gaierror, UnicodeError):
            # A numeric host, in whatever spelling, needs no thread.
            return look_up(host, port, socket.AI_NUMERICHOST)
        found: queue.SimpleQueue[list[Address] | str] = queue.SimpleQueue()

        def stop_waiting() -> None:
            found.put("")

        arguments = (host, port, found)
        name = f"dns-{host}"
        threading.Thread(target=self._look_up, args=arguments, name=name, daemon=True).start()
        result: list[Address] | str = f"no address of {host} within connect_timeout"
        with attempt.blocking(stop_waiting), contextlib.suppress(queue.Empty):
            result = found.get(timeout=patience_s)
        if isinstance(result, str):
            raise requests.ConnectionError(result)
        return result

    def _look_up(self, host: str, port: int, found: queue.SimpleQueue[list[Address] | str]) -> None:
        """Put the addresses into ``found``, or what is wrong. Runs in a thread of its own."""
        if not self._places.acquire(timeout=LOOKUP_PATIENCE_S):
            found.put(f"DNS busy: {MAX_LOOKUPS} look-ups wait for an answer")
            return
        try:
            found.put(look_up(host, port))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a possible name"
            found.put(f"the name {host} cannot be resolved: {reason}")
        finally:
            self._places.release()


# --- Through a proxy ---


class Route(NamedTuple):
    """How requests get to a target."""

    key: ConnectionKey  # Which connections can carry them.
    proxy: Proxy | None  # None: they go directly.

    @property
    def peer(self) -> str:
        """Who is dialled, for people."""
        return self.key.target if self.proxy is None else self.proxy.name

    @property
    def is_forwarded(self) -> bool:
        """Whether a proxy reads the requests, and does not only carry the bytes of TLS."""
        return self.proxy is not None and self.key.target == self.proxy.name


class Routes:
    """Says whether a target is reached through dispatcher.proxy, and speaks with the proxy.

    A target of http: is asked for in the absolute form (RFC 9112, 3.2.2), each time on a new
    connection: there are proxies (Tinyproxy is one) that look at the first request only, and
    pass what follows it on to the same target, whatever it says. To a target of https: a tunnel
    is opened, in which TLS begins.
    """

    def __init__(self, settings: DispatcherSettings) -> None:
        self._proxy = settings.proxy
        self._names = [entry for entry in settings.no_proxy if "/" not in entry]
        self._networks = [entry for entry in settings.no_proxy if "/" in entry]
        self._header = ""  # The one that signs in at the proxy; empty: it asks for none.
        self._secrets: list[str] = []
        if self._proxy is not None and self._proxy.user:
            pair = f"{self._proxy.user}:{self._proxy.password}"
            encoded = base64.b64encode(pair.encode()).decode()
            self._header = f"Proxy-Authorization: Basic {encoded}\r\n"
            # Without a password, what stands for the user is a token.
            secret = self._proxy.password or self._proxy.user
            self._secrets = to_be_masked([secret, encoded])

    def route(self, webhook: Webhook) -> Route:
        """Return how the requests of a webhook get to their target."""
        key = webhook.connection_key
        if self._proxy is None:
            return Route(key, None)
        parts = urlsplit(key.target)
        if self._is_direct(str(parts.hostname)):
            return Route(key, None)
        if parts.scheme == "http":
            key = ConnectionKey(self._proxy.name, verify_tls=True)
        return Route(key, self._proxy)

    def _is_direct(self, host: str) -> bool:
        """Say whether dispatcher.no_proxy names this host."""
        name = host.rstrip(".")
        for entry in self._names:
            if name == entry or (entry[0] == "." and name.endswith(entry)):
                return True
        try:
            numeric = str(look_up(host, 0, socket.AI_NUMERICHOST)[0].sockaddr[0])
        except (OSError, UnicodeError):
            return False  # It is a name, and only the proxy knows what it stands for.
        readings = readings_of(numeric)
        networks = [parse_network(entry) for entry in self._networks]
        return any(address in network for network in networks for address in readings)

    def addressed(self, request: bytes, webhook: Webhook) -> bytes:
        """Return a request in the absolute form, and signed in, as a proxy wants it."""
        method, _blank, rest = request.partition(b" ")
        path, _line_end, rest = rest.partition(b"\r\n")
        origin = webhook.connection_key.target.removesuffix(":80")
        line = b"%s %s%s\r\n" % (method, origin.encode(), path)
        return line + f"{self._header}Connection: close\r\n".encode() + rest

    def tunnel_request(self, authority: str) -> bytes:
        """Return the request for a tunnel to host:port (CONNECT: RFC 9110, 9.3.6)."""
        head = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n"
        head += f"User-Agent: chronos/{__version__}\r\n{self._header}\r\n"
        return head.encode()

    def refusal(self, proxy: Proxy, code: int, phrase: str) -> str:
        """Return a sentence about what a proxy answers that does not let a request through."""
        answer = self.masked(f"{code} {phrase}".strip())[:PHRASE_LIMIT]
        sentence = f"{proxy.name} answered {answer}"
        # Tinyproxy has a 401 for a wrong password.
        if code in (HTTPStatus.PROXY_AUTHENTICATION_REQUIRED, HTTPStatus.UNAUTHORIZED):
            wrong = "the wrong user or password" if proxy.user else "no user and password"
            sentence += f": dispatcher.proxy has {wrong}"
        return sentence

    def who_answered(self, webhook: Webhook, head: Head) -> str:
        """Return whose answer it is, for people.

        Raises requests.ConnectionError where it is the proxy's alone: it wants a password.
        """
        route = self.route(webhook)
        if route.proxy is None or not route.is_forwarded:
            return "the server"
        if head.code == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            # It has read the whole request, and may repeat any of it.
            phrase = webhook.masked(head.phrase)
            raise requests.ConnectionError(self.refusal(route.proxy, head.code, phrase))
        return f"the server, or {route.proxy.name},"

    def masked(self, text: str, cut: bool = False) -> str:
        """Return a text without the password of the proxy, which may have repeated it."""
        return without_secrets(text, self._secrets, cut)


_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


# --- Dialling and TLS ---


def by_turns(addresses: Sequence[Address]) -> list[Address]:
    """Return each address once, the two families by turns (RFC 8305, 4).

    The family of the first one, which the system prefers, keeps the lead.
    """
    leading = []
    others = []
    for address in dict.fromkeys(addresses):
        if address.family == addresses[0].family:
            leading.append(address)
        else:
            others.append(address)
    pairs = zip_longest(leading, others)
    return [address for address in chain.from_iterable(pairs) if address is not None]


class Race:
    """Dials the addresses of a host as RFC 8305 has it: the first that connects wins.

    One worker uses it, and only cut() may be called by other threads meanwhile.

    attribute   written by   guarded by
    _dialled    its worker   _lock  (cut() goes through it)
    _is_cut     cut()        _lock
    """

    def __init__(
        self,
        clock: Clock,
        route: Route,
        addresses: Sequence[Address],
        limit: int,
        interval: int,
    ) -> None:
        """``limit``: the instant of the monotonic clock when it ends at the latest.

        ``interval``: µs from one address to the next, as long as none of them answers.
        """
        self._clock = clock
        self._route = route
        self.limit = limit
        self._waiting = deque(addresses)
        self._interval = interval
        self._next_at = 0  # When the next of them is dialled, by the monotonic clock.
        self._dialled: dict[Connection, Address] = {}  # In the order of their addresses.
        self._problems: dict[str, str] = {}  # What is wrong with each address that was lost.
        self._is_cut = False
        self._lock = threading.Lock()

    def run(self) -> Connection:
        """Return the next connection that comes about; it stays in the race until taken.

        Raises requests.ConnectionError, which says what is wrong with each address.
        """
        while self._waiting or self._dialled:
            now = self._clock.monotonic()
            if self._may_dial(now):
                self._dial(self._waiting.popleft())
            # What has connected wins, even if this thread got no time to see it before the limit.
            winner = self._wait(now)
            if winner is not None:
                self._call_off(winner)
                return winner
            if now >= self.limit:
                self._time_is_up()
        sentences = [f"at {numeric}: {problem}" for numeric, problem in self._problems.items()]
        told = "; ".join(sentences[:MAX_PROBLEMS])
        raise requests.ConnectionError(f"no connection to {self._route.peer} {told}")

    def _may_dial(self, now: int) -> bool:
        """Say whether it is the turn of the next address."""
        if not self._waiting or len(self._dialled) >= MAX_DIALLED:
            return False
        return not self._dialled or now >= self._next_at

    def _dial(self, address: Address) -> None:
        """Begin to connect, without waiting for the end of it."""
        self._next_at = self._clock.monotonic() + self._interval
        try:
            connection = Connection(self._route.key, address.family)
        except OSError as error:
            self._note(address, error)
            return
        with self._lock:
            self._dialled[connection] = address
            is_cut = self._is_cut
        if is_cut:
            raise AttemptAborted  # Nobody would cut this one.
        connection.is_for_one_request = self._route.is_forwarded
        # A request is written at once, and must not wait for the peer's acknowledgement.
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.socket.setblocking(False)
        try:
            connection.socket.connect(address.sockaddr)
        except BlockingIOError:
            pass  # It is under way.
        except OSError as error:
            self.lose(connection, error)

    def _wait(self, now: int) -> Connection | None:
        """Wait until one has connected, which is returned, or it is time for something else."""
        if not self._dialled:
            return None
        until = self.limit
        if self._waiting and len(self._dialled) < MAX_DIALLED:
            until = min(until, self._next_at)
        poll = select.poll()
        for connection in self._dialled:
            poll.register(connection.socket, select.POLLOUT)
        timeout_ms = max(0, until - now) * 1000 / SECOND
        ended = {descriptor for descriptor, _event in poll.poll(timeout_ms)}
        for connection in list(self._dialled):
            if connection.socket.fileno() in ended:
                code = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return connection
                self.lose(connection, OSError(code, os.strerror(code)))
        return None

    def _call_off(self, winner: Connection) -> None:
        """Close the others; they are dialled anew if the winner turns out to be of no use."""
        for connection, address in list(self._dialled.items()):
            if connection is not winner:
                self._close(connection)
                self._waiting.append(address)

    def _time_is_up(self) -> None:
        for connection in list(self._dialled):
            self.lose(connection, TimeoutError())
        self._waiting.clear()

    def lose(self, connection: Connection, error: OSError) -> None:
        """Close a connection that came to nothing, or is of no use; ``error`` says why."""
        address = self._dialled[connection]
        self._close(connection)
        self._note(address, error)
        self._next_at = 0  # Nothing is left to wait for.

    def _note(self, address: Address, error: OSError) -> None:
        self._problems[str(address.sockaddr[0])] = why_not_connected(error)

    def _close(self, connection: Connection) -> None:
        # Under the lock, because cut() must not meet the descriptor when it is another's already.
        with self._lock:
            del self._dialled[connection]
            connection.close()

    def cut(self) -> None:
        """Shut all connections down: the race and whatever blocks on one of them end at once."""
        with self._lock:
            self._is_cut = True
            for connection in self._dialled:
                connection.cut()

    def take(self, connection: Connection) -> Connection:
        """Take a connection out of the race, which close() then leaves alone."""
        with self._lock:
            del self._dialled[connection]
        return connection

    def close(self) -> None:
        """Close what nobody has taken."""
        for connection in list(self._dialled):
            self._close(connection)


class TlsContexts:
    """The contexts of TLS, which connections share: reading the usual authorities takes 40 ms.

    Files that the settings name are read at once, so that what is wrong with them shows at the
    start, and a file that changes later changes nothing until the next one.

    attribute    written by            guarded by
    _contexts    its maker, workers    _lock  (so that only one of many reads the certificates)
    """

    def __init__(self, settings: DispatcherSettings) -> None:
        self._authorities: str = settings.ca_bundle or requests.certs.where()  # type: ignore[attr-defined]
        self._certificates = {
            usual_spelling(host): file for host, file in settings.client_certificates.items()
        }
        # By the file of the client's certificate (None: it has none), and verify_tls.
        self._contexts: dict[tuple[str | None, bool], ssl.SSLContext] = {}
        self._lock = threading.Lock()
        if settings.ca_bundle is not None:
            self._get(None, True)
        for certificate in self._certificates.values():
            self._get(certificate, True)
            self._get(certificate, False)

    def get(self, host: str, verify: bool) -> ssl.SSLContext:
        """Return the context for a host whose certificate is verified, or is not."""
        return self._get(self._certificates.get(usual_spelling(host)), verify)

    def _get(self, certificate: str | None, verify: bool) -> ssl.SSLContext:
        key = (certificate, verify)
        with self._lock:
            context = self._contexts.get(key)
            if context is None:
                context = self._make(verify)
                if certificate is not None:
                    load_client_certificate(context, certificate)
                self._contexts[key] = context
        return context

    def _make(self, verify: bool) -> ssl.SSLContext:
        if not verify:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        if os.path.isdir(self._authorities):
            return ssl.create_default_context(capath=self._authorities)
        return ssl.create_default_context(cafile=self._authorities)


class Connector:
    """Makes connections: resolves, checks, dials and, for https, shakes hands.

    Where there is a proxy, it is the proxy that is resolved, checked and dialled.
    """

    def __init__(self, clock: Clock, settings: DispatcherSettings, routes: Routes) -> None:
        self._clock = clock
        self._routes = routes
        self._timeout = settings.connect_timeout
        self._blocked = settings.blocked_networks
        self._allowed = settings.allowed_networks
        self._resolver = Resolver()
        self._tls_contexts = TlsContexts(settings)

    def connect(self, attempt: Attempt, route: Route) -> Connection:
        """Return a connection to the attempt's target, within dispatcher.connect_timeout.

        Where the attempt has less time left, the watchdog ends it.
        Raises requests.ConnectionError, BlockedTarget or AttemptAborted.
        """
        target = urlsplit(attempt.webhook.connection_key.target)
        name = name_in_certificate(str(target.hostname))
        tls = None
        if target.scheme == "https":
            tls = self._tls_contexts.get(name, route.key.verify_tls)
        limit = self._clock.monotonic() + self._timeout
        addresses = self._addresses(route.proxy or target, route, limit, attempt)
        # Where there is little time, each of the first MAX_DIALLED gets its turn all the same.
        left = min(limit, attempt.limit) - self._clock.monotonic()
        interval = min(DIAL_INTERVAL, left // len(addresses))
        race = Race(self._clock, route, addresses, limit, interval)
        try:
            with attempt.blocking(race.cut):
                connection = race.run()
                if tls is not None and route.proxy is not None:
                    self._open_tunnel(connection, route.proxy, limit)
                    self._shake_hands_in_tunnel(connection, route.proxy, tls, name, limit)
                elif tls is not None:
                    while not self._shake_hands(connection, race, tls, name):
                        connection = race.run()
                # From here on the watchdog is the limit.
                connection.socket.settimeout(None)
            return race.take(connection)
        finally:
            race.close()

    def _addresses(
        self, dialled: Proxy | SplitResult, route: Route, limit: int, attempt: Attempt
    ) -> list[Address]:
        """Return where the target or the proxy may be dialled.

        Raises requests.ConnectionError, BlockedTarget or AttemptAborted.
        """
        host = str(dialled.hostname)
        port = dialled.port or 0
        try:
            found = self._resolver.resolve(host, port, self._left_s(limit), attempt)
            return self._open_addresses(found)
        except AttemptAborted:
            raise
        except requests.RequestException as error:
            if route.proxy is None:
                raise
            raise type(error)(f"{route.peer} can't be used: {error}") from error

    def _open_addresses(self, found: Sequence[Address]) -> list[Address]:
        """Return the addresses that may be dialled. Raises BlockedTarget where none may."""
        addresses = []
        refusals = []
        for address in by_turns(found):
            try:
                check_address(str(address.sockaddr[0]), self._blocked, self._allowed)
                addresses.append(address)
            except BlockedTarget as refusal:
                refusals.append(refusal)
        if not addresses:
            raise refusals[0]
        return addresses

    def _left_s(self, limit: int) -> float:
        """Return the seconds until ``limit``."""
        left_s = (limit - self._clock.monotonic()) / SECOND
        return max(left_s, SHORTEST_TIMEOUT_S)

    def _shake_hands(
        self, connection: Connection, race: Race, tls: ssl.SSLContext, name: str
    ) -> bool:
        """Begin TLS on a connection. False: it failed, and the race has lost the connection."""
        # ssl takes the timeout for the whole handshake, so that dripping does not renew it.
        connection.socket.settimeout(self._left_s(race.limit))
        try:
            connection.socket = tls.wrap_socket(connection.socket, server_hostname=name)
        except OSError as error:
            race.lose(connection, error)
            return False
        return True

    def _open_tunnel(self, connection: Connection, proxy: Proxy, limit: int) -> None:
        """Let the proxy connect to the target. Raises requests.ConnectionError."""
        target = connection.key.target
        authority = target.removeprefix("https://")
        received = bytearray()
        try:
            connection.socket.settimeout(self._left_s(limit))
            connection.socket.sendall(self._routes.tunnel_request(authority))
            while not (end := _END_OF_HEAD.search(received)):
                # Anew for each piece, so that dripping does not renew it.
                connection.socket.settimeout(self._left_s(limit))
                piece = connection.socket.recv(RECEIVE_BYTES)
                if not piece or len(received) > MAX_HEAD_BYTES:
                    raise EOFError
                received += piece
        except TimeoutError as error:
            problem = f"has not connected to {target} within connect_timeout"
            raise requests.ConnectionError(f"{proxy.name} {problem}") from error
        except (OSError, EOFError) as error:
            problem = f"closed the connection when it was to connect to {target}"
            raise requests.ConnectionError(f"{proxy.name} {problem}") from error
        first_line = received.partition(b"\n")[0].decode("latin-1").removesuffix("\r")
        status = _STATUS_LINE.fullmatch(first_line)
        if status is None or (status[2][0] == "2" and end.end() < len(received)):
            problem = "sent what is not a proper answer to CONNECT"
            raise requests.ConnectionError(f"{proxy.name} {problem}")
        if status[2][0] != "2":
            refusal = self._routes.refusal(proxy, int(status[2]), status[3] or "")
            raise requests.ConnectionError(f"no connection to {target}: {refusal}")

    def _shake_hands_in_tunnel(
        self, connection: Connection, proxy: Proxy, tls: ssl.SSLContext, name: str, limit: int
    ) -> None:
        """Begin TLS with the target behind a proxy. Raises requests.ConnectionError."""
        connection.socket.settimeout(self._left_s(limit))
        try:
            connection.socket = tls.wrap_socket(connection.socket, server_hostname=name)
        except OSError as error:
            way = f"{connection.key.target} through {proxy.name}"
            problem = f"no connection to {way}: {why_not_connected(error)}"
            raise requests.ConnectionError(problem) from error


def usual_spelling(host: str) -> str:
    """Return an IPv6 address in its shortest form (RFC 5952), any other host as it is."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.IPv6Address(host))
    return host


def name_in_certificate(host: str) -> str:
    """Return the name that TLS asks for, and looks for in the certificate.

    The dot at the end of an absolute name is no part of it (RFC 6066, 3), and neither is the
    zone of an IPv6 address.
    """
    return host.partition("%")[0].removesuffix(".")


def why_not_connected(error: OSError) -> str:
    """Return what is known about a connection that did not come about, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        code = error.reason or "no answer"  # In the form of OpenSSL: WRONG_VERSION_NUMBER
        return f"TLS failed: {code.replace('_', ' ').lower()}"
    if isinstance(error, TimeoutError):
        return "it took too long"
    return error.strerror or str(error)


# --- Attempts ---

# What the outcome of an attempt that was cut off says. Where the engine has ended the execution
# itself, it does not look at it any more.
REASONS_OF_CUTS = {
    CutReason.TIMEOUT: Reason.TIMEOUT,
    CutReason.ATTEMPT_TIMEOUT: Reason.NO_ANSWER,
    CutReason.CANCELLED: Reason.CANCELLED,
    CutReason.REPLACED: Reason.REPLACED,
    CutReason.DELETED: Reason.DELETED,
    CutReason.SHUTDOWN: Reason.INTERRUPTED,
}

# Charsets of answers that are decoded; all others are read as UTF-8. Other codecs of Python take
# quadratic time, or let surrogates through.
_CHARSET = re.compile(
    r'(?i)charset="?(utf-16(?:[lb]e)?|iso-8859-(?:1[0-13-6]|[1-9])|windows-125[0-8]|latin-?1|'
    r"koi8-r|shift_jis|euc-(?:jp|kr)|gb(?:k|2312|18030)|big5)\b"
)


class Verdict(NamedTuple):
    """What the end of an attempt means; the fields are those of Outcome."""

    success: bool = False
    reason: Reason | None = None
    error: str | None = None
    status_code: int | None = None
    response: str | None = None
    retry_after: int | None = None  # µs


class Dispatcher:
    """Makes attempts: send() in a worker, and the watchdog beside it.

    attribute    written by                       guarded by
    _in_flight   each worker, its own attempts    nothing (the watchdog reads a copy)
    _idle        workers, watchdog                itself
    _connector   workers                          itself
    _stopped     who stops it                     itself  (an event)
    last_watch   the watchdog                     nothing (others only read it)
    _still       the watchdog                     nothing (others only read it)
    """

    def __init__(self, clock: Clock, settings: DispatcherSettings) -> None:
        self._clock = clock
        self._max_bytes = settings.max_response_bytes
        self._routes = Routes(settings)
        self._connector = Connector(clock, settings, self._routes)
        self._idle = IdleConnections(clock, settings.max_concurrent_jobs)
        self._in_flight: set[Attempt] = set()
        self._stopped = threading.Event()
        self.last_watch = clock.monotonic()  # When the watchdog last went round.
        self._still = 0  # For so many µs in all the process stood still, as the watchdog saw it.
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the watchdog."""
        self._watchdog.start()

    def stop(self) -> None:
        """Stop the watchdog and close what is idle."""
        self._stopped.set()
        self._watchdog.join()
        self.close_idle(0)

    def close_idle(self, older_than: int) -> None:
        """Close the connections that have been idle for so many µs, or are too many."""
        self._idle.close(older_than)

    # --- The watchdog ---

    def _watch(self) -> None:
        has_failed = False
        while not self._stopped.wait(WATCHDOG_TICK_S):
            try:
                self._look_at_limits()
                has_failed = False
            except Exception:
                # It must not end, because no limit would hold any more; once is enough to log.
                if not has_failed:
                    log.exception("the watchdog failed, continuing")
                has_failed = True

    def _look_at_limits(self) -> None:
        now = self._clock.monotonic()
        for attempt in tuple(self._in_flight):
            if attempt.limit <= now:
                attempt.abort(attempt.cut_reason)
        self.close_idle(IDLE_CONNECTION)
        pause = now - self.last_watch
        if pause > STANDSTILL:
            self._still += pause
        self.last_watch = now

    def stood_still(self) -> int:
        """Return for how many µs in all the whole process made no step: it was stopped.

        The watchdog goes round whatever the engine does, so a long turn does not count.
        """
        # In this order a pause may be counted twice for a moment, but never be overlooked.
        pause = self._clock.monotonic() - self.last_watch
        still = self._still
        if pause > STANDSTILL:
            still += pause
        return still

    # --- In a worker ---

    def send(self, attempt: Attempt) -> Outcome:
        """Make the request and say how it ended. Never raises."""
        started_at = self._clock.now()
        started_at_mono = self._clock.monotonic()
        attempt.limit = started_at_mono + attempt.allowed
        self._in_flight.add(attempt)
        try:
            answer = self._exchange(attempt)
            verdict = self._judge(attempt.webhook, answer)
        except requests.RequestException as error:
            verdict = verdict_without_answer(attempt, error)
        except Exception as error:
            # A bug must not end the worker.
            execution = attempt.execution
            ids = about(execution.job_id, execution.id)
            log.exception("the attempt of execution %s hit a bug", execution.id, extra=ids)
            sentence = f"unexpected error: {type(error).__name__}"
            verdict = Verdict(reason=Reason.NO_ANSWER, error=sentence)
        finally:
            self._in_flight.discard(attempt)
        ended_at_mono = self._clock.monotonic()
        return Outcome(
            execution=attempt.execution,
            started_at=started_at,
            duration=ended_at_mono - started_at_mono,
            ended_at_mono=ended_at_mono,
            status_code=verdict.status_code,
            response=verdict.response,
            success=verdict.success,
            reason=verdict.reason,
            error=verdict.error,
            retry_after=verdict.retry_after,
        )

    def _exchange(self, attempt: Attempt) -> Answer:
        """Send the request on an idle connection, or on a new one. Raises RequestException."""
        request = attempt.webhook.to_bytes(attempt.execution)
        route = self._routes.route(attempt.webhook)
        if route.is_forwarded:
            request = self._routes.addressed(request, attempt.webhook)
        idle = self._idle.take(route.key)
        if idle is not None:
            sent_at_mono = self._clock.monotonic()
            try:
                return self._exchange_on(idle, request, attempt)
            except requests.ConnectionError:
                took = self._clock.monotonic() - sent_at_mono
                if idle.heard or took > KEEP_ALIVE_RACE:
                    # It was alive and may have worked on the request: this attempt has failed.
                    raise
                # It was closed while it was idle, as the request was on its way: a new one is
                # tried.
        connection = self._connector.connect(attempt, route)
        return self._exchange_on(connection, request, attempt)

    def _exchange_on(self, connection: Connection, request: bytes, attempt: Attempt) -> Answer:
        try:
            with attempt.blocking(connection.cut):
                return connection.exchange(request, attempt.webhook.method, self._max_bytes)
        finally:
            # No abort can cut the connection any more: blocking() has ended.
            if connection.reusable and not attempt.reason:
                self._idle.keep(connection)
            else:
                connection.close()

    def _judge(self, webhook: Webhook, answer: Answer) -> Verdict:
        """Return what an answer means for the execution."""
        code = answer.head.code
        headers = answer.head.headers
        who = self._routes.who_answered(webhook, answer.head)
        response = self._to_text(answer, webhook)
        if code in webhook.success_codes:
            return Verdict(success=True, status_code=code, response=response)
        sentence = f"{who} answered {code} {answer.head.phrase}".strip()
        error = self._masked(sentence, webhook)[:PHRASE_LIMIT]
        error += self._masked(remark_on(answer.head), webhook)[:PHRASE_LIMIT]
        return Verdict(
            reason=Reason.HTTP_STATUS,
            error=error,
            status_code=code,
            response=response,
            retry_after=parse_retry_after(headers.get("retry-after"), self._clock.now()),
        )

    def _to_text(self, answer: Answer, webhook: Webhook) -> str:
        """Return the body as text, cut with a mark at dispatcher.max_response_bytes."""
        try:
            body = unpacked(answer, self._max_bytes)
        except ValueError as error:
            return f"[it is packed with {error}, which Chronos cannot unpack]"
        named = _CHARSET.search(answer.head.headers.get("content-type", ""))
        charset = named[1] if named else "utf-8"
        text = str(body[: self._max_bytes], charset, "replace")
        if len(answer.body) <= self._max_bytes and len(body) <= self._max_bytes:
            return self._masked(text, webhook)
        whole_characters = text.rstrip("\ufffd")  # The cut may have gone through the last one.
        text = self._masked(whole_characters, webhook, cut=True)
        return f"{text}\n[cut off after {min(len(body), self._max_bytes)} bytes]"

    def _masked(self, text: str, webhook: Webhook, cut: bool = False) -> str:
        """Return a text without the secrets of the webhook and of the proxy."""
        return self._routes.masked(webhook.masked(text, cut), cut)


def remark_on(head: Head) -> str:
    """Return what makes an answer no success, where its status does not say it; else nothing."""
    if 200 <= head.code < 300:
        return ", which is not among success_codes"
    if head.code == 101:
        return ": it changes to another protocol than HTTP/1.1, which was not asked for"
    location = head.headers.get("location")
    if 300 <= head.code < 400 and location:
        return f": redirects are not followed, and this one leads to {location}"
    return ""


def verdict_without_answer(attempt: Attempt, error: requests.RequestException) -> Verdict:
    """Return what it means that no whole answer came: it was aborted, or else ``error`` says."""
    cut = attempt.reason
    if cut is not None:
        # Only of a timeout anybody sees the sentence: other aborts come with their own.
        sentence = f"there was no whole answer within the {cut}"
        return Verdict(reason=REASONS_OF_CUTS[cut], error=sentence)
    if isinstance(error, BlockedTarget):
        return Verdict(reason=Reason.BLOCKED, error=str(error))
    return Verdict(reason=Reason.NO_ANSWER, error=str(error))


# ======================================================================================
# 15. Work: what the engine does in a turn, in six parts
# ======================================================================================
#
#     RunQueue     what may run: new executions, overlap, what is taken, how attempts ended
#     Scheduler    what becomes due: the clock, fire times, missed ones
#     ZoneRules    new rules of time zones, after a start
#     JobChanges   what the API and the configuration change
#     Retention    which history goes
#     Alerts       who is told that jobs have turned bad or well
#
# All of it runs in the engine's thread, inside the transaction of a turn. The parts meet in the
# turn, in the store and in each other's methods; none reads another's private attributes.

Change = Callable[["Turn"], Any]  # What an API thread wants done; it runs inside a savepoint.


@dataclass(slots=True)
class Turn:
    """What one turn of the engine has done and owes: paid after its commit, else forgotten."""

    now: int
    settings: Settings
    stopping: bool = False  # Nothing is started any more.
    starting: bool = False  # Nothing is started yet: what the file declares is not in place.
    results: list[tuple[Future[Any], Any]] = field(default_factory=list)  # Value or exception.
    ended: dict[str, Execution] = field(default_factory=dict)  # By id.
    deleted: dict[str, Execution] = field(default_factory=dict)  # By id: their jobs went.
    counted: int = 0  # So many of ``ended`` are in the counts.
    fired: list[tuple[Execution, str]] = field(default_factory=list)  # With their policies.
    caught_up: set[str] = field(default_factory=set)  # Ids of jobs that had missed fire times.
    to_prune: dict[str, None] = field(default_factory=dict)  # Ids of jobs with new history.
    taken: list[Attempt] = field(default_factory=list)
    follows_at_once: bool = False  # The next turn must not wait.
    is_clock_settled: bool = False  # The clock has stood for a while: what is old is old.

    @property
    def paused(self) -> bool:
        """Whether this server starts nothing, as scheduler.paused says."""
        return self.settings.scheduler.paused


# --- The versions of jobs, ready to run ---


class Version:
    """A version of a job, parsed once; the engine and workers share it and never change it."""

    def __init__(self, row: Json) -> None:
        """``row`` is as JobTable.version() returns it."""
        self.job_id: str = row["job_id"]
        self.number: int = row["version"]
        self.config: Json = row["config"]
        self.zone: str = self.config["timezone"]
        self.concurrency: str = self.config["concurrency"]
        self.retry_policy: Json = self.config["retry_policy"]
        self.timeout = parse_duration(self.config["timeout"])
        attempt_timeout = self.retry_policy["attempt_timeout"] or self.config["timeout"]
        self.attempt_timeout = parse_duration(attempt_timeout)
        self.webhook = Webhook(self.config["webhook"], hides_url=self.job_id == ALERTS_ID)
        self.size = self._size()
        self.fire_ids = uuid.UUID(self.job_id)  # The namespace of its executions' ids.
        if not self.config["webhook"]["verify_tls"]:
            message = "%s takes any certificate: its verify_tls is false"
            log.warning(message, in_words(self.job_id), extra=about(self.job_id))

    # What was triggered, or waits, runs without schedule and zone: nothing else needs them.

    @functools.cached_property
    def schedule(self) -> Schedule:
        """When it fires. Raises ValueError where a newer program refuses the expression."""
        return parse_schedule(self.config["schedule"])

    def next_after(self, after: int) -> int | None:
        """Return the first fire time later than ``after``. Raises UnusableConfig."""
        return next_fire_time(self.config, after)

    def _size(self) -> int:
        """Return about how many bytes of memory it takes, with its prepared request."""
        # All that can be large are the texts of the webhook, and those are there twice: as they
        # were parsed, where a character has up to 4 bytes, and in the request.
        texts = json.dumps(self.config["webhook"], ensure_ascii=False)
        return VERSION_BYTES + 2 * sys.getsizeof(texts)


class VersionCache:
    """The versions that were used last, as many as VERSION_CACHE_BYTES hold, for the engine.

    What a turn has rolled back may be in it: clear() it.
    """

    def __init__(self, jobs: JobTable) -> None:
        self._jobs = jobs
        self._cached: dict[tuple[str, int], Version] = {}  # The one longest unused stands first.
        self._size = 0  # Of all of them, in bytes.

    def _load(self, job_id: str, number: int) -> Version:
        try:
            return Version(self._jobs.version(job_id, number))
        except NotFound as error:
            if not self._jobs.is_there(job_id):
                raise
            raise UnusableConfig(f"{error}: it is lost") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnusableConfig(f"the job's configuration is not understood: {error}") from error

    def get(self, job_id: str, number: int) -> Version:
        """Return a version of a job.

        Raises NotFound where the job is gone, StoreError, and UnusableConfig where the version
        is lost, damaged or written by another release of Chronos.
        """
        key = (job_id, number)
        version = self._cached.pop(key, None)
        if version is None:
            version = self._load(job_id, number)
            self._add(version)
        self._cached[key] = version
        return version

    def load_newest(self, due: Iterable[DueJob]) -> None:
        """Read what get() will be asked of these jobs, most of it in one statement.

        What is left out, get() reads by itself, or says what is wrong with it.
        """
        wanted = [job.job_id for job in due if (job.job_id, job.version) not in self._cached]
        if not wanted:
            return
        for row in self._jobs.newest_versions(wanted):
            with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
                self._add(Version(row))

    def _add(self, version: Version) -> None:
        self._make_room(version.size)
        self._size += version.size
        self._cached[version.job_id, version.number] = version

    def _make_room(self, size: int) -> None:
        """Forget those that were not used for longest, until one of this size fits in."""
        while self._cached and self._size + size > VERSION_CACHE_BYTES:
            oldest = self._cached.pop(next(iter(self._cached)))
            self._size -= oldest.size

    def clear(self) -> None:
        """Forget all of them."""
        self._cached.clear()
        self._size = 0


# --- What may run ---


class WorkerPool:
    """The threads that make requests. What they return goes to ``hand_over``, in their thread."""

    def __init__(
        self, dispatcher: Dispatcher, size: int, hand_over: Callable[[Outcome], None]
    ) -> None:
        self.size = size
        self._dispatcher = dispatcher
        self._hand_over = hand_over
        self._attempts = queue.SimpleQueue[Attempt | None]()

    def start(self) -> None:
        """Start all threads at once, so that none can fail to come when it is needed."""
        for number in range(1, self.size + 1):
            name = f"worker-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while self._make_next():
            pass

    def _make_next(self) -> bool:
        """Make the next attempt; False: there are none to come.

        It returns, so that an idle worker keeps nothing of an attempt, whose body may be large.
        """
        attempt = self._attempts.get()
        if attempt is None:
            return False
        self._hand_over(self._dispatcher.send(attempt))
        return True

    def submit(self, attempt: Attempt) -> None:
        """Let the next free worker make this attempt."""
        self._attempts.put(attempt)

    def stop(self) -> None:
        """Let each worker end after the attempt that it makes."""
        for _worker in range(self.size):
            self._attempts.put(None)


def fire_id(namespace: uuid.UUID, at: int) -> str:
    """Return the id of the execution of a fire time; ``namespace`` is the id of its job."""
    return f"exec-{uuid.uuid5(namespace, str(format_time(at)))}"


class NewExecutions:
    """Makes executions and puts them into the history, where an older one may be in the way."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._node_id = settings.cluster.node_id

    def new_execution(
        self, turn: Turn, version: Version, trigger: Trigger, at: int, due_at: int | None
    ) -> Execution:
        """Return a pending execution for a fire time, with the one id that it can have.

        The id follows from job and fire time, so a fire time can be enqueued only once, whatever
        crashes or restarts. ``due_at`` None: it waits until the job's older ones have ended.
        """
        turn.to_prune[version.job_id] = None
        return Execution(
            id=fire_id(version.fire_ids, at),
            job_id=version.job_id,
            job_version=version.number,
            trigger=trigger,
            status=Status.PENDING,
            scheduled_at=at,
            target=version.webhook.target,
            due_at=due_at,
            node_id=self._node_id,
        )

    def add_invalid(self, turn: Turn, job: DueJob, at: int, error: str) -> None:
        """Note that a fire time was not run, because the job's configuration can't be used."""
        turn.to_prune[job.job_id] = None
        execution = Execution(
            id=fire_id(uuid.UUID(job.job_id), at),
            job_id=job.job_id,
            job_version=job.version,
            trigger=Trigger.SCHEDULE,
            status=Status.FAILED,
            scheduled_at=at,
            target="",  # Nobody can tell.
            due_at=None,
            completed_at=turn.now,
            reason=Reason.INVALID,
            error=error,
            node_id=self._node_id,
        )
        self.add(turn, [execution])

    def add(self, turn: Turn, executions: list[Execution]) -> list[Execution]:
        """Add executions that are not in the history yet; return those that were added."""
        known = self._store.executions.known(execution.id for execution in executions)
        added = []
        for execution in executions:
            if execution.id in known:
                # This fire time is in the history: whatever was to happen has happened.
                ids = about(execution.job_id, execution.id)
                message = "job %s: %s is in the history, so nothing is sent"
                log.info(message, *ids.values(), extra=ids)
                continue
            added.append(execution)
            if execution.has_ended:
                turn.ended[execution.id] = execution
        self._store.executions.add(added)
        return added

    def enqueue(self, turn: Turn, wanted: list[tuple[Execution, str]]) -> None:
        """Add executions, one of a job, each as the concurrency policy beside it has it.

        ``forbid`` skips it while an older one has not ended, ``replace`` ends the older ones,
        ``allow`` lets both run, up to MAX_ACTIVE.
        """
        older = self._store.executions.oldest_active(execution.job_id for execution, _ in wanted)
        executions = []
        to_replace: dict[str, list[Execution]] = {}  # By the id of what replaces them.
        for execution, concurrency in wanted:
            job_id = execution.job_id
            if job_id not in older:
                executions.append(execution)
            elif concurrency == "replace":
                to_replace[execution.id] = self._store.executions.active_of(job_id, MAX_ACTIVE)
                executions.append(execution)
            else:
                problem = self._overlap(older[job_id], concurrency)
                if problem is not None:
                    execution = ended(execution, Status.SKIPPED, Reason.OVERLAP, problem, turn.now)
                executions.append(execution)
        for execution in self.add(turn, executions):
            for other in to_replace.get(execution.id, ()):
                self.fail(turn, other, Reason.REPLACED, f"replaced by {execution.id}")

    def _overlap(self, older: Execution, concurrency: str) -> str | None:
        """Return why there can't be one more execution beside an older one; None: there can."""
        if concurrency != "allow":
            return f"{older.id} was still {older.status}"
        if self._store.executions.count_active(older.job_id) >= MAX_ACTIVE:
            return f"{MAX_ACTIVE} executions had not ended"
        return None

    def fail(self, turn: Turn, execution: Execution, reason: Reason, error: str) -> Execution:
        """Fail an execution that has not ended; its request is aborted after the commit."""
        failed = ended(execution, Status.FAILED, reason, error, turn.now)
        self._store.executions.save([failed])
        turn.ended[failed.id] = failed
        return failed


class RunQueue(NewExecutions):
    """What may run: it takes what is due, and records how attempts have ended.

    attribute      written by           read by
    _in_flight     the engine's thread  also the thread that stops (how many are left, to abort)
    the others     the engine's thread  nobody else
    """

    def __init__(
        self,
        store: Store,
        versions: VersionCache,
        pool: WorkerPool,
        settings: Settings,
        clock: Clock,
    ) -> None:
        super().__init__(store, settings)
        self._versions = versions
        self._pool = pool
        self._clock = clock
        self._per_target = settings.dispatcher.max_concurrent_per_host
        self._in_flight: dict[str, Attempt] = {}  # By the id of the execution.

    # --- Changes: submit() them, from any thread ---

    def trigger(
        self, turn: Turn, job_id: str, new_id: str, replay_of: str | None = None
    ) -> Execution | None:
        """Make an execution that is due now; or return the one that has this id already.

        ``replay_of`` is the id of an execution: what that one has sent is sent again.
        Raises NotFound, UnusableConfig, or Conflict where we are paused.
        """
        job = self._store.jobs.get(job_id)
        if self._store.executions.known([new_id]):
            return self._store.executions.get(job_id, new_id)
        if turn.paused:
            raise Conflict("this server is paused: it starts nothing")
        if replay_of:
            original = self._store.executions.get(job_id, replay_of)
            version = self._versions.get(job_id, original.job_version)
            kind = Trigger.REPLAY
            scheduled_at = original.scheduled_at
        else:
            version = self._versions.get(job_id, job.version)
            kind = Trigger.MANUAL
            scheduled_at = turn.now
        execution = self.new_execution(turn, version, kind, scheduled_at, turn.now)
        execution = execution._replace(id=new_id, replay_of=replay_of)
        self.enqueue(turn, [(execution, job.config["concurrency"])])
        return None

    def cancel(self, turn: Turn, job_id: str, execution_id: str, user: str) -> Execution:
        """Fail an execution that has not ended, and abort its request.

        Raises NotFound, or Conflict where it has ended.
        """
        execution = self._store.executions.get(job_id, execution_id)
        if execution.has_ended:
            raise Conflict(f"{execution_id} has ended: {execution.status}")
        return self.fail(turn, execution, Reason.CANCELLED, f"cancelled by {user}")

    # --- What is taken, and what comes back ---

    def take(self, turn: Turn) -> None:
        """Let due executions run, as many as workers are free and their targets may hold."""
        free = self._pool.size - len(self._in_flight)
        running = (attempt.webhook.target for attempt in self._in_flight.values())
        limits = TargetLimits(running, self._per_target)
        start = self._clock.monotonic()
        look_again = True
        while look_again and free > 0:
            if self._clock.monotonic() - start >= TURN_TARGET:
                turn.follows_at_once = True
                return
            look_again = False
            started: list[Attempt] = []
            for execution in self._store.executions.due(turn.now, free, limits.full):
                if not limits.has_room(execution.target):
                    look_again = True  # Behind the ones that are passed over others may be due.
                    continue
                version = self.version_of(turn, execution)
                if version is not None:
                    started.append(self._next_attempt(turn, execution, version))
                    limits.hold(execution.target)
            if started:
                ids = [attempt.execution.id for attempt in started]
                self._store.executions.start(ids, turn.now, self._node_id)
                turn.taken += started
                free -= len(started)

    def _next_attempt(self, turn: Turn, execution: Execution, version: Version) -> Attempt:
        limit, cut_reason = attempt_limit(version.timeout, version.attempt_timeout, execution.spent)
        running = execution._replace(  # As ExecutionTable.start() writes it.
            status=Status.RUNNING,
            due_at=None,
            attempts=execution.attempts + 1,
            attempt_at=turn.now,
            started_at=execution.started_at or turn.now,
            node_id=self._node_id,
        )
        return Attempt(running, version.webhook, limit, cut_reason)

    def version_of(self, turn: Turn, execution: Execution) -> Version | None:
        """Return the version that a due execution runs; None: it can't run, and is dealt with."""
        try:
            return self._versions.get(execution.job_id, execution.job_version)
        except NotFound:  # Its job was deleted.
            self._store.executions.delete(execution.id)
        except UnusableConfig as error:
            self.fail(turn, execution, Reason.INVALID, str(error))
            self._store.executions.release_oldest({execution.job_id}, turn.now)
        turn.to_prune[execution.job_id] = None
        turn.follows_at_once = True  # Others may be due behind it.
        return None

    def record(self, turn: Turn, outcomes: list[Outcome]) -> None:
        """Write down how attempts ended, but of executions that ended otherwise before."""
        recorded = []
        for outcome in outcomes:
            after = self._after(turn, outcome)
            if after is not None:
                recorded.append(after)
        running = self._store.executions.still_running(recorded)
        recorded = [execution for execution in recorded if execution.id in running]
        self._store.executions.save(recorded)
        for execution in recorded:
            if execution.has_ended:
                turn.ended[execution.id] = execution

    def _after(self, turn: Turn, outcome: Outcome) -> Execution | None:
        """Return an execution as it stands after an attempt; None: its job was deleted."""
        execution = outcome.execution
        try:
            version = self._versions.get(execution.job_id, execution.job_version)
            retry_policy = version.retry_policy
            timeout = version.timeout
        except NotFound:
            self._store.executions.delete(execution.id)
            return None
        except UnusableConfig:
            # What has happened stays true, but there can't be another attempt.
            retry_policy = {"max_attempts": 0}
            timeout = 0
        ended_at = turn.now - (self._clock.monotonic() - outcome.ended_at_mono)
        return after_attempt(outcome, retry_policy, timeout, ended_at)

    # --- Outside of the transaction ---

    @property
    def in_flight(self) -> int:
        """How many attempts are with the workers."""
        return len(self._in_flight)

    def came_back(self, outcome: Outcome) -> None:
        """Note that the worker which made this attempt is free."""
        self._in_flight.pop(outcome.execution.id, None)

    def after_commit(self, turn: Turn) -> None:
        """Give the workers what was taken; abort the requests of what has ended otherwise."""
        for taken in turn.taken:
            self._in_flight[taken.execution.id] = taken
            self._pool.submit(taken)
        for execution in turn.ended.values():
            reason = CutReason.CANCELLED
            if execution.reason == Reason.REPLACED:
                reason = CutReason.REPLACED
            self._abort(execution.id, reason)
        for execution_id in turn.deleted:
            self._abort(execution_id, CutReason.DELETED)

    def _abort(self, execution_id: str, reason: CutReason) -> None:
        """Abort the request of an execution, if it is on its way."""
        attempt = self._in_flight.get(execution_id)
        if attempt is not None:
            attempt.abort(reason)

    def abort_all(self, reason: CutReason) -> None:
        """Abort every request that is on its way."""
        for attempt in list(self._in_flight.values()):
            attempt.abort(reason)


# --- What becomes due ---


class ClockCorrection:
    """Takes back what a clock that was ahead has left, bit by bit once it has gone back.

    How far it has come is in the store, so that it outlives a crash and a turn that fails.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.latest_at = 0  # The clock has shown this before it went back.
        self._is_under_way = True  # False: there is nothing to take back.

    def recover(self) -> None:
        """Take up what the last process has left."""
        self.latest_at = self._store.number("latest_at") or 0

    def note(self, before: int) -> int:
        """Note what the clock would show if it had not been moved; return the latest of them."""
        ahead_until = max(before, self._store.number("ahead_until") or 0)
        self._store.set_number("ahead_until", ahead_until)
        self.latest_at = max(before, self.latest_at)
        self._store.set_number("latest_at", self.latest_at)
        return ahead_until

    def begin(self, turn: Turn, before: int) -> None:
        """Deal with what was noted of times that are yet to come, by a clock that went back.

        ``before``: as for note(). Cursors wait, unless they are too far ahead: several small
        steps back add up.
        """
        ahead_until = self.note(before)
        if ahead_until <= turn.now:
            return
        if ahead_until - turn.now > CLOCK_FAR_BACK:
            self._store.reset_cursors(turn.now)
            self._store.set_number("ahead_until", turn.now)
        self._store.history.forget_later_hours(turn.now)
        self._store.set_number("take_back_after", turn.now)
        self._store.set_number("take_back_below", NO_LIMIT)
        self._is_under_way = True

    def work(self, turn: Turn) -> None:
        """Take back some executions that were never sent and whose fire time is yet to come."""
        if not self._is_under_way:
            return
        start = self._clock.monotonic()
        after = self._store.number("take_back_after") or 0
        below = self._store.number("take_back_below") or 0
        if below == 0:
            self._is_under_way = False
            return
        taken_back: dict[str, list[Execution]] = {}  # By job id.
        sent = 0
        while below > 0 and self._clock.monotonic() - start < TURN_TARGET:
            rows = self._store.executions.take_back(after, below, TAKE_BACK_ROWS)
            below, removed, sent_of_these = rows
            sent += sent_of_these
            for execution in removed:
                taken_back.setdefault(execution.job_id, []).append(execution)
        self._store.set_number("take_back_below", below)
        if below > 0:
            turn.follows_at_once = True
        for job_id, executions in taken_back.items():
            self._put_cursor_back(turn, job_id, executions)
        if taken_back or sent:
            message = "the clock was ahead: %s runs were taken back, %s of times to come were sent"
            log.warning(message, sum(map(len, taken_back.values())), sent)

    def _put_cursor_back(self, turn: Turn, job_id: str, executions: list[Execution]) -> None:
        """Let a job fire again from the first of the fire times on that were taken back."""
        try:
            job = self._store.jobs.get(job_id)
        except NotFound:
            return
        self._store.history.uncount(job, executions, turn.now)
        turn.caught_up.add(job_id)  # What waited behind them waits no more.
        if not (job.enabled or self._was_spent(job)):
            return
        cursor = min(execution.missed_from or execution.scheduled_at for execution in executions)
        if any(execution.job_version != job.version for execution in executions):
            cursor = 0  # It may have another schedule now: it is computed anew.
        is_earlier = job.next_run_at is not None and RELEASED_AT <= job.next_run_at <= cursor
        if not is_earlier:
            self._store.jobs.move_cursors({job_id: cursor})

    def _was_spent(self, job: Job) -> bool:
        """Say whether it was the clock that has disabled a job: nothing came any more."""
        try:
            return job.next_after(self.latest_at) is None
        except UnusableConfig:
            return False


class Missed(NamedTuple):
    """Fire times that were missed and are not made up for."""

    number: int
    first: int
    last: int
    absence: str  # Why: goes on after "while".


class Absence:
    """Knows until when nobody could look for due fire times: what was due before was missed.

    What the engine itself delays, by a long turn, is late; but what passes while the database
    fails, or lets a commit wait, was missed.
    """

    def __init__(self, grace: int, clock: Clock, stood_still: Callable[[], int]) -> None:
        """``grace``: µs that a fire time may be late all the same.

        ``stood_still`` is that of the Dispatcher.
        """
        self.reason = ""  # Of the last one; goes on after "while".
        self._grace = grace
        self._clock = clock
        self._stood_still = stood_still
        self._missed_before = 0  # An older fire time that is still due was missed.
        self._seen_still = 0  # What stood_still() returned when due fire times were looked for.
        self._failing_since: int | None = None  # By the monotonic clock; None: turns work.
        self._commits_since = 0  # When the newest turn began to commit, by the monotonic clock.

    def turn_commits(self) -> None:
        """Note that from now on a turn waits for the disk."""
        self._commits_since = self._clock.monotonic()

    def turn_worked(self) -> None:
        """Note that a turn is on disk, so that fire times are dealt with again."""
        self._failing_since = None
        if self._clock.monotonic() - self._commits_since > self._grace:
            self.note(self._clock.now(), "the database did not answer")

    def turn_failed(self) -> None:
        """Note that a turn was rolled back, with the fire times that it had dealt with."""
        if self._failing_since is None:
            self._failing_since = self._clock.monotonic()

    def look(self) -> None:
        """Find out whether nobody could look since this was last called."""
        # The pause may have been since the turn began: what counts is the time when it was over.
        still = self._stood_still()
        if still - self._seen_still > self._grace:
            self.note(self._clock.now(), "the server was suspended")
        self._seen_still = still
        failing_since = self._failing_since
        if failing_since is not None and self._clock.monotonic() - failing_since > self._grace:
            self.note(self._clock.now(), "the database failed")

    def note(self, until: int, reason: str) -> None:
        """Note that nobody could look for due fire times until this instant."""
        self._missed_before = until - self._grace
        self.reason = reason

    def clock_moved(self, now: int) -> None:
        """Have no fire time missed that is later than what a clock shows which was moved."""
        self._missed_before = min(self._missed_before, now - self._grace)

    def reason_of(self, fire_time: int) -> str | None:
        """Return why a fire time that is due was missed; None: it was not."""
        return self.reason if fire_time < self._missed_before else None


class Scheduler:
    """What becomes due: it watches the clock and turns fire times into executions."""

    def __init__(
        self,
        store: Store,
        versions: VersionCache,
        run_queue: RunQueue,
        settings: Settings,
        clock: Clock,
        stood_still: Callable[[], int],
    ) -> None:
        """``stood_still`` is that of the Dispatcher."""
        self._store = store
        self._versions = versions
        self._run_queue = run_queue
        self._clock = clock
        self._grace = settings.scheduler.missed_run_grace
        self.absence = Absence(self._grace, clock, stood_still)
        self._offset = clock.now() - clock.monotonic()  # A change of it is a step of the clock.
        self._is_held = False  # The clock shows less than the release date: nothing fires.
        self._moved_at = clock.monotonic()  # When the clock was last moved, or we started.
        self._correction = ClockCorrection(store, clock)

    # --- The clock ---

    def recover(self) -> None:
        """Compare the clock with the one that the last process has seen: it may be behind."""
        last_seen = self._store.number("last_seen") or 0
        self._offset = max(self._offset, last_seen - self._clock.monotonic())
        self._correction.recover()
        self.absence.note(self._clock.now(), "the server was down")

    def clock_step(self, now: int) -> int:
        """Return by how many µs the wall clock has moved otherwise than the monotonic one."""
        return now - self._clock.monotonic() - self._offset

    def follow_clock(self, step: int) -> None:
        """Take the step as known: the turn that has dealt with it is on disk."""
        self._offset += step

    def look_at_clock(self, turn: Turn, step: int) -> None:
        """Deal with a clock that was moved by ``step`` µs, or can't be right."""
        is_held = turn.now < RELEASED_AT
        if is_held != self._is_held:
            self._is_held = is_held
            shown = format_time(turn.now)
            if is_held:
                log.warning("the clock shows %s, which can't be right: no job fires", shown)
            else:
                log.warning("the clock shows %s, which is right again: jobs fire", shown)
        if abs(step) > CLOCK_STEP:
            log.warning("the clock was moved by %s s", step / SECOND)
            self._moved_at = self._clock.monotonic()
            if abs(step) > self._grace:
                self.absence.note(turn.now, "the clock was moved")
            self.absence.clock_moved(turn.now)
            self._store.shift_times(step, turn.now)
            if is_held:
                self._correction.note(turn.now - step)
            else:
                self._correction.begin(turn, turn.now - step)
        turn.is_clock_settled = self._clock.monotonic() - self._moved_at >= CLOCK_SETTLED
        self._correction.work(turn)

    # --- Fire times ---

    def may_fire(self, turn: Turn) -> bool:
        """Say whether fire times become executions now."""
        return not (turn.paused or turn.stopping or turn.starting or self._is_held)

    def fire_due(self, turn: Turn) -> None:
        """Turn due fire times into executions; what would take too long stays for the next turn."""
        self.absence.look()
        if not self.may_fire(turn):
            return
        self._fire(turn, self._store.jobs.due(turn.now, MAX_FIRES_PER_TURN))

    def job_up_to_date(self, turn: Turn, job_id: str) -> Job:
        """Return a job whose due fire times are in the history, so that no change erases them.

        Raises NotFound, or Unavailable where the server stops: then no fire time is enqueued.
        """
        if turn.stopping:
            raise Unavailable("the server is stopping")
        job = self._store.jobs.get(job_id)
        while self.may_fire(turn) and job.next_run_at is not None and job.next_run_at <= turn.now:
            self._fire(turn, [DueJob(job_id, job.version, job.next_run_at, job.invalid_from)])
            job = self._store.jobs.get(job_id)
        return job

    def give_up_due(self, turn: Turn, job: Job) -> None:
        """Note as missed what is due of a job: its schedule went while no server was there."""
        first = job.next_run_at
        if turn.paused or self._is_held or first is None or not RELEASED_AT <= first <= turn.now:
            return
        try:
            version = self._versions.get(job.id, job.version)
            begin: int | None = first
            if job.invalid_from is not None:
                begin = version.next_after(job.invalid_from)
            if begin is not None and begin <= turn.now:
                self._catch_up(turn, version, begin, 0, self.absence.reason)
        except StoreError:
            raise
        except Exception as error:  # The declaration may be what mends it.
            self._put_off(turn, DueJob(job.id, job.version, first, job.invalid_from), error)

    # --- What becomes of a fire time ---

    def _fire(self, turn: Turn, jobs: list[DueJob]) -> None:
        """Enqueue a fire time of each job, or deal with whole backlogs; move their cursors.

        What would take too long is left out: it stays due.
        """
        start = self._clock.monotonic()
        self._versions.load_newest(jobs)
        turn.fired = []
        cursors: dict[str, int | None] = {}
        for job in jobs:
            if self._clock.monotonic() - start >= TURN_TARGET:
                break
            try:
                version = self._versions.get(job.job_id, job.version)
                cursors[job.job_id] = self._fire_one(turn, job, version)
            except StoreError:
                raise
            except Exception as error:  # Whatever is wrong with one job must not stop the others.
                self._put_off(turn, job, error)
        self._run_queue.enqueue(turn, turn.fired)
        self._store.jobs.move_cursors(cursors)

    def _fire_one(self, turn: Turn, job: DueJob, version: Version) -> int | None:
        """Deal with what is due of a job, return its next fire time. Raises UnusableConfig."""
        if job.fire_time < RELEASED_AT:
            # The cursor was reset, or comes from a wrong clock: decades were not missed.
            return version.next_after(turn.now)
        if job.invalid_from is not None:
            return self._fire_again(turn, version, job.invalid_from)
        absence = self.absence.reason_of(job.fire_time)
        return self._run_from(turn, version, job.fire_time, absence)

    def _run_from(
        self, turn: Turn, version: Version, fire_time: int, absence: str | None
    ) -> int | None:
        """Enqueue a fire time, or deal with the backlog from it on; return the next one.

        ``absence`` says why it was missed; None: it was not. Raises UnusableConfig, and has done
        nothing.
        """
        following = version.next_after(fire_time)
        if absence is not None:
            default = turn.settings.scheduler.missed_run_policy
            most = catch_up_limit(version.config["missed_run_policy"] or default)
            newest = self._catch_up(turn, version, fire_time, most, absence)
            return version.next_after(newest)
        execution = self._run_queue.new_execution(
            turn, version, Trigger.SCHEDULE, fire_time, turn.now
        )
        turn.fired.append((execution, version.concurrency))
        return following

    def _fire_again(self, turn: Turn, version: Version, invalid_from: int) -> int | None:
        """Deal with the fire times since a configuration became unusable; return the next one.

        Raises UnusableConfig where it still is.
        """
        cursor = version.next_after(invalid_from)
        log.info("job %s can fire again", version.job_id, extra=about(version.job_id))
        if cursor is None or cursor > turn.now:
            return cursor
        absence = None
        if cursor < turn.now - self._grace:
            absence = "the job's configuration could not be used"
        return self._run_from(turn, version, cursor, absence)

    def _put_off(self, turn: Turn, job: DueJob, error: Exception) -> None:
        """Note that a job can't fire, once for each outage; look at it again in LOOK_AGAIN."""
        invalid_from = job.invalid_from
        if invalid_from is None:
            invalid_from = job.fire_time
            if job.fire_time < RELEASED_AT:
                invalid_from = turn.now
            sentence = str(error)
            if not isinstance(error, UnusableConfig):
                log.exception("job %s can't fire", job.job_id, extra=about(job.job_id))
                sentence = f"the job can't fire: {error!r}"
            self._run_queue.add_invalid(turn, job, invalid_from, sentence)
        self._store.jobs.put_off(job.job_id, invalid_from, turn.now + LOOK_AGAIN)

    def _catch_up(self, turn: Turn, version: Version, first: int, most: int, absence: str) -> int:
        """Make up for ``most`` of the missed fire times from ``first`` on; return the newest.

        They are the newest ones; of those that are passed over there is one row. ``absence`` says
        why they were missed.
        """
        known: set[int] = set()
        if first <= self._correction.latest_at:  # The clock went back: some may be in the history.
            known = self._store.executions.fire_times(version.job_id, first, turn.now)
        # One more than is made up for: the newest of those that are passed over.
        wanted = most + 1 + len(known)
        count, newest = version.schedule.backlog(first, turn.now, version.zone, wanted)
        begin = max(0, len(newest) - most)
        made_up = newest[begin:]
        passed_over = [fire_time for fire_time in newest[:begin] if fire_time not in known]
        if passed_over:
            count = max(len(passed_over), count - len(known.union(made_up)))
            later = version.schedule.fire_times(first, version.zone)
            first = next(fire_time for fire_time in chain([first], later) if fire_time not in known)
            missed = Missed(count, first, passed_over[-1], absence)
            self._skip_missed(turn, version, missed)
        executions = []
        for fire_time in made_up:
            execution = self._run_queue.new_execution(
                turn, version, Trigger.CATCH_UP, fire_time, None
            )
            executions.append(execution)
        self._run_queue.add(turn, executions)
        turn.caught_up.add(version.job_id)
        return newest[-1]

    def _skip_missed(self, turn: Turn, version: Version, found: Missed) -> None:
        """Note fire times as missed, in one execution."""
        number, first, last, absence = found
        period = f"from {format_time(first)} to {format_time(last)}"
        error = f"{number} fire times {period} passed while {absence}"
        execution = self._run_queue.new_execution(turn, version, Trigger.SCHEDULE, last, None)
        missed = ended(execution, Status.SKIPPED, Reason.MISSED, error, turn.now)
        missed = missed._replace(missed_count=number, missed_from=first, missed_to=last)
        self._run_queue.add(turn, [missed])


def digest_of_rules() -> int:
    """Return a number that is another one where any time zone of this machine has other rules.

    Another release of Chronos has another one, too: it may compute fire times otherwise.
    """
    digest = hashlib.sha256(__version__.encode())
    for name in sorted(_time_zones()):
        digest.update(name.encode())
        digest.update(zone_file(name))
    return int.from_bytes(digest.digest()[:7])


class ZoneRules:
    """After a start: applies the rules of time zones to cursors, which old ones may have made.

    Where any rule has changed since the last start, cursors of cron schedules that are in the
    future are computed anew, a batch a turn. Those that are past are missed runs, and ``@every``
    and ``@at`` know no time zone: all of these stay.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._digest = 0  # Of the rules of now.
        self._last_id: str | None = ""  # Of the job that was looked at last; None: all were.
        self._last_seen = 0  # The clock, as the last process has seen it.

    def recover(self) -> None:
        """Note the rules of now, and the clock of the last process.

        Up to that one fire times are dealt with. To read all rules may take long, so this is
        called before the first turn.
        """
        self._digest = digest_of_rules()
        self._last_seen = self._store.number("last_seen") or 0

    def apply(self, turn: Turn) -> None:
        """Look at some jobs, until all were looked at once."""
        if self._last_id is None or turn.now < RELEASED_AT:
            return  # By a clock that can't be right no fire time is told.
        if self._last_id == "" and self._digest == self._store.number("zone_rules"):
            self._last_id = None
            return
        turn.follows_at_once = True
        self._apply_to_some(turn, self._last_id)

    def _apply_to_some(self, turn: Turn, last_id: str) -> None:
        """Look at the next jobs, for as long as RULES_TARGET; or note that all were."""
        deadline = self._clock.monotonic() + RULES_TARGET
        for _batch in range(RULES_BATCHES):
            jobs = self._store.jobs.fire_later(turn.now, last_id, RULES_JOBS)
            for job in jobs:
                self._apply_to(turn, job)
                last_id = job.job_id
            self._last_id = last_id
            if not jobs:
                self._last_id = None
                self._store.set_number("zone_rules", self._digest)
            if not jobs or self._clock.monotonic() >= deadline:
                return

    def _apply_to(self, turn: Turn, due: DueJob) -> None:
        """Move the cursor of a job, if its fire time is another one by the rules of now."""
        config = self._store.jobs.get(due.job_id).config
        zone = config["timezone"]
        if zone == "UTC":
            return  # It has no rules.
        try:
            schedule = parse_schedule(config["schedule"])
            if not isinstance(schedule, CronSchedule):
                return
            cursor = schedule.next_after(turn.now, zone)
            if cursor != due.fire_time:
                # Only now: the clock may have gone back a little, and nothing fires twice.
                after = self._fired_by(turn, due.job_id)
                cursor = schedule.next_after(after, zone)
        except StoreError:
            raise
        except Exception:  # Whatever is wrong with one job is told when it is due.
            return
        if cursor != due.fire_time:
            self._store.jobs.move_cursors({due.job_id: cursor})
            message = "job %s: by the rules of %s its next fire time is %s, not %s"
            ids = about(due.job_id)
            times = (format_time(cursor), format_time(due.fire_time))
            log.info(message, due.job_id, zone, *times, extra=ids)

    def _fired_by(self, turn: Turn, job_id: str) -> int:
        """Return the instant up to which the job's fire times are dealt with; at least now."""
        # The history may have lost them, and last_seen may be a minute old.
        fired_at = self._store.last_fire_time(job_id) or 0
        fired_at = max(fired_at, self._last_seen)
        if fired_at > turn.now + CLOCK_FAR_BACK:
            return turn.now  # The clock was wrong then.
        return max(fired_at, turn.now)

    def turn_failed(self) -> None:
        """Look again whether all jobs were looked at: a turn was rolled back with what it did."""
        self._last_id = ""


# --- Changes of jobs ---


ToDeclare = tuple[str, Declaration | None]  # The id of a job; None: it is not declared any more.


class Declared(NamedTuple):
    """What declare() has done."""

    done: int  # So many of what it was given, the first ones; 0: call it again.
    changed: list[Job]  # Those among them that are not as they were.


class JobChanges:
    """What the API and the configuration change. Call the methods through Engine.submit()."""

    def __init__(
        self, store: Store, versions: VersionCache, scheduler: Scheduler, clock: Clock
    ) -> None:
        self._store = store
        self._versions = versions
        self._scheduler = scheduler
        self._clock = clock

    def create(self, turn: Turn, config: Json, enabled: bool, user: str) -> Job:
        """Add a job and return it; where it is enabled, its schedule counts from now."""
        blank = self._blank(turn, str(uuid.uuid4()))
        wanted = blank._replace(config=config, enabled=enabled)
        return self._save(turn, blank, wanted, user)

    def make_room(self, turn: Turn, job_id: str) -> bool:
        """Remove some of what a deleted job of this id has left; say if there may be more."""
        if self._store.jobs.is_there(job_id):
            return False
        return self._store.history.prune_deleted(job_id) > 0

    def create_once(
        self, turn: Turn, job_id: str, config: Json, enabled: bool, user: str
    ) -> tuple[Job, bool]:
        """Return the job of this id and False; or, where there is none, add it: and True.

        Before that, make_room() until it returns False: all at once could take long.
        """
        if self._store.jobs.is_there(job_id):
            return self._store.jobs.get(job_id), False
        blank = self._blank(turn, job_id)
        wanted = blank._replace(config=config, enabled=enabled)
        return self._save(turn, blank, wanted, user), True

    def to_declare(self, declarations: Mapping[str, Declaration]) -> list[ToDeclare]:
        """Return what declare() is to be given for these, by their ids: also what is gone.

        Any thread may call this.
        """
        found: list[ToDeclare] = []
        for job_id, declaration in declarations.items():
            if not declaration.problem:  # Otherwise the job stays as it is.
                found.append((job_id, declaration))
        known = self._store.jobs.declared_ids(declarations)
        for job_id in sorted(known - declarations.keys()):
            found.append((job_id, None))
        return found

    def declare(self, turn: Turn, wanted: Sequence[ToDeclare]) -> Declared:
        """Make jobs as they are declared, as many as a turn has time for.

        A job whose declaration is as before keeps its state, so what somebody has disabled stays
        so. One that is not declared any more (None) is disabled and no longer managed.
        """
        deadline = self._clock.monotonic() + TURN_TARGET // 2
        changed: list[Job] = []
        for done, (job_id, declaration) in enumerate(wanted):
            if done and self._clock.monotonic() >= deadline:
                return Declared(done, changed)
            try:
                job = self._scheduler.job_up_to_date(turn, job_id)
            except NotFound:
                if not self._is_rest_gone(job_id, deadline):
                    return Declared(done, changed)  # The next turn goes on with it.
                job = self._blank(turn, job_id)
            wanted_job = self._as_declared(turn, job, declaration)
            if turn.starting and job.enabled and wanted_job.timing() != job.timing():
                self._scheduler.give_up_due(turn, job)
            saved = self._save(turn, job, wanted_job, DECLARED_BY)
            if saved != job:
                changed.append(saved)
        return Declared(len(wanted), changed)

    def _as_declared(self, turn: Turn, job: Job, declaration: Declaration | None) -> Job:
        """Return a job as it is declared; None: it is not declared any more."""
        if declaration is None:
            return job._replace(declared=None, enabled=False)
        wanted = job._replace(config=declaration.config, declared=declaration.digest)
        if declaration.digest == job.declared:
            return wanted
        is_spent = wanted.next_after(turn.now) is None
        return wanted._replace(enabled=declaration.enabled and not is_spent)

    def set_enabled(self, turn: Turn, job_id: str, enabled: bool) -> Job:
        """Enable or disable a job. A disabled one has no fire times; what is due runs on.

        Raises NotFound, or Conflict where an enabled one would never fire.
        """
        job = self._scheduler.job_up_to_date(turn, job_id)
        return self._save(turn, job, job._replace(enabled=enabled))

    def update(self, turn: Turn, base: Job, config: Json, state: bool | None, user: str) -> Job:
        """Replace the configuration of a job; ``state`` is whether it is enabled, None: as it is.

        Raises NotFound, Conflict, or PreconditionFailed where the job is no longer as ``base``.
        """
        job = self._scheduler.job_up_to_date(turn, base.id)
        if job.version != base.version:
            raise PreconditionFailed(f"the job has version {job.version} by now")
        enabled = job.enabled if state is None else state
        return self._save(turn, job, job._replace(config=config, enabled=enabled), user)

    def roll_back(
        self, turn: Turn, job_id: str, number: int, user: str, only_from: int | None = None
    ) -> Job:
        """Make a new version out of an older one; whether the job is enabled stays.

        Raises NotFound, Conflict, or PreconditionFailed where the job no longer has the version
        ``only_from``; None: whichever it has.
        """
        job = self._scheduler.job_up_to_date(turn, job_id)
        if only_from is not None and job.version != only_from:
            raise PreconditionFailed(f"the job has version {job.version} by now")
        config = self._store.jobs.version(job_id, number)["config"]
        wanted = job._replace(config=config)
        if wanted.next_after(turn.now) is None:
            wanted = wanted._replace(enabled=False)
        return self._save(turn, job, wanted, user, is_new_version=True)

    def delete(self, turn: Turn, base: Job, only_if_unchanged: bool) -> None:
        """Remove a job and abort what runs of it; its history goes later, in batches.

        Raises NotFound, Conflict, or PreconditionFailed where it is no longer as ``base``.
        """
        job = self._store.jobs.get(base.id)
        if only_if_unchanged and job.version != base.version:
            raise PreconditionFailed("the job has another version by now")
        if job.declared:
            raise DeclaredElsewhere
        self._store.jobs.delete(job.id)
        self._store.history.forget_size()
        self._versions.clear()  # A version that is not found lets nothing of the job start.
        turn.to_prune[job.id] = None
        for execution in self._store.executions.active_of(job.id):
            turn.deleted[execution.id] = execution

    def _is_rest_gone(self, job_id: str, deadline: int) -> bool:
        """Remove what is left of a deleted job; say whether all of it is gone.

        It would become part of a new job with the same id. ``deadline``: by the monotonic clock.
        """
        while self._store.history.prune_deleted(job_id):
            if self._clock.monotonic() >= deadline:
                return False
        return True

    def _blank(self, turn: Turn, job_id: str) -> Job:
        """Return a job that is not in the store yet, before its first version."""
        return Job(
            id=job_id,
            version=0,
            enabled=False,
            created_at=turn.now,
            updated_at=turn.now,
            next_run_at=None,
            config={},
        )

    def _save(
        self, turn: Turn, job: Job, wanted: Job, user: str = "", is_new_version: bool = False
    ) -> Job:
        """Write a changed job and return it.

        There is a new version, by ``user``, where the configuration has changed. The cursor is
        computed anew where the schedule has changed, or the job was enabled. Raises Conflict, also
        where the job can't fire.
        """
        if wanted.config != job.config or is_new_version:
            is_new_version = True
            wanted = wanted._replace(version=job.version + 1)
            if job.declared and user != DECLARED_BY:
                raise DeclaredElsewhere
        if not wanted.enabled:
            wanted = wanted._replace(next_run_at=None, invalid_from=None)
        elif job.version == 0 or wanted.timing() != job.timing():
            cursor = wanted.next_after(turn.now)
            if cursor is None:
                raise Conflict(f"{wanted.config['schedule']}: nothing comes any more")
            wanted = wanted._replace(next_run_at=cursor, invalid_from=None)
        elif is_new_version and wanted.invalid_from is not None:
            wanted = wanted._replace(next_run_at=turn.now)  # It may be usable now: look at once.
        if wanted == job:
            return job
        wanted = wanted._replace(updated_at=turn.now)
        self._store.jobs.save(wanted, user if is_new_version else None)
        if wanted.version > turn.settings.retention.versions_per_job:
            turn.to_prune[wanted.id] = None
        return wanted


# --- Which history goes ---


class SizeLimit:
    """Keeps the history within retention.max_size, a batch a turn.

    What goes first is the oldest of the job that has most, the responses before the rows, and
    never the newest 10 of a job. A job that has no more than those is passed over until another
    of its executions ends.

    attribute    written by             guarded by
    problem      the engine's thread    nothing (others only read it)
    the others   the engine's thread    nothing (nobody else reads them)
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.problem: str | None = None  # Why the history is larger than it may be.
        self._is_told = False  # The log says so.
        self._history = store.history
        self._clock = clock
        self.look_anew()

    def look_anew(self) -> None:
        """Forget where responses were looked for."""
        self._began_at = self._clock.monotonic()
        self._bare_to: dict[str, int] = {}  # Job id -> seq up to which no response is left.

    def work(self, most: int) -> bool:
        """Remove a batch if there are over ``most`` bytes; return whether there may be more."""
        if self._clock.monotonic() - self._began_at >= MINUTE:
            self.look_anew()  # What began long ago may have ended with a response.
        has_more = self._shrink(most)
        size = self._history.size()
        problem = None
        if size > most and not has_more:
            problem = (
                f"the history has {size / 10**6:.1f} MB, more than the {most / 10**6:g} MB of "
                "retention.max_size: the newest 10 executions of each job stay in any case"
            )
            if not self._is_told:
                self._is_told = True
                log.warning("%s", problem)
        elif self._is_told and size <= most - most // 100:
            self._is_told = False
            log.warning("the history has no more than retention.max_size again")
        self.problem = problem
        return has_more

    def _shrink(self, most: int) -> bool:
        """Remove a batch if there are over ``most`` bytes; return whether more may have to go."""
        margin = most // 100  # A little more goes, so that not every turn has to remove something.
        start = self._clock.monotonic()
        left = PRUNE_ROWS
        while left > 0 and self._clock.monotonic() - start < PRUNE_TARGET:
            excess = self._history.size() - most
            job_id = self._history.job_with_most() if excess > 0 else None
            if job_id is None:
                return False
            wanted = min(excess + margin, PRUNE_BYTES * left // PRUNE_ROWS)
            left -= self._free(job_id, wanted)
        return True

    def _free(self, job_id: str, wanted: int) -> int:
        """Remove some of a job, about ``wanted`` bytes; return what it is worth, at least 1."""
        rows = self._history.oldest(job_id, self._bare_to.get(job_id, 0), PRUNE_LOOK)
        answered = [row for row in rows if row.width > row.bare]
        if answered:
            chosen = self._enough(answered, [row.width - row.bare for row in answered], wanted)
            self._bare_to[job_id] = chosen[-1].seq
            return self._history.drop_responses(job_id, chosen)
        if rows:
            self._bare_to[job_id] = rows[-1].seq
            return 1  # The next look is at those behind them.
        rows = self._history.oldest(job_id, 0, PRUNE_ROWS)
        if rows:
            chosen = self._enough(rows, [row.width for row in rows], wanted)
            return self._history.drop(job_id, chosen)
        self._history.pass_over(job_id)
        return 1

    def _enough(self, rows: list[HistoryRow], sizes: list[int], wanted: int) -> list[HistoryRow]:
        """Return as many rows as free the wanted bytes, at most PRUNE_ROWS."""
        freed = 0
        for number, size in enumerate(sizes[:PRUNE_ROWS]):
            freed += size
            if freed >= wanted:
                return rows[: number + 1]
        return rows[:PRUNE_ROWS]


class Retention:
    """Removes history that is not to be kept, a batch a turn: by number, age and size.

    Versions go with it, so that the deletion of a job is short however many it has.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.size_limit = SizeLimit(store, clock)
        self._store = store
        self._clock = clock
        self._to_prune: dict[str, None] = {}  # Ids of jobs to look at, the longest waiting first.
        self._prune_cursor: str | None = ""  # The last job of the walk over all; None: all seen.
        self._version_cursor: str | None = ""  # The same of the walk over all versions.
        self._walk_day = 0  # Once a day all jobs are looked at, because history grows old.
        self._looked_at = clock.monotonic()

    def work(self, turn: Turn, is_busy: bool) -> bool:
        """Remove a batch; return whether there may be more.

        ``is_busy``: there is other work, so that it waits for PRUNE_INTERVAL.
        """
        self._to_prune |= turn.to_prune
        day = turn.now // DAY
        if day != self._walk_day and turn.is_clock_settled:
            self._walk_day = day
            self._prune_cursor = ""
            self._version_cursor = ""
            self._store.history.forget_size()  # Should a sum ever be wrong, it does not stay so.
        limits = turn.settings.retention
        has_just_looked = self._clock.monotonic() - self._looked_at < PRUNE_INTERVAL
        if is_busy and has_just_looked:
            return bool(self._to_prune) or self._store.history.size() > limits.max_size
        self._looked_at = self._clock.monotonic()
        # Nothing is too old by a clock that may be wrong.
        before = turn.now - limits.max_age if turn.is_clock_settled else 0
        is_untidy = self._prune_jobs(before, limits)
        is_too_large = self.size_limit.work(limits.max_size)
        return is_untidy or is_too_large

    def _prune_jobs(self, before: int, limits: RetentionSettings) -> bool:
        """Look at some jobs; return whether there are more to look at."""
        start = self._clock.monotonic()
        removed = 0
        self._walk_on_over_versions(limits.versions_per_job)
        for _job in range(PRUNE_JOBS):
            self._walk_on()
            if not self._to_prune:
                return self._version_cursor is not None
            job_id = next(iter(self._to_prune))
            del self._to_prune[job_id]
            found = self._prune_job(job_id, before, limits)
            if found:
                self._to_prune[job_id] = None  # There may be more of it: later again.
                removed += found
            if removed >= PRUNE_ROWS or self._clock.monotonic() - start >= PRUNE_TARGET:
                break
        return True

    def _prune_job(self, job_id: str, before: int, limits: RetentionSettings) -> int:
        """Remove some history of a job, and some versions; return how many."""
        history = self._store.history
        newest = history.newest_version(job_id)
        if newest is None:
            return history.prune_deleted(job_id)
        removed = history.prune(job_id, before, limits.executions_per_job)
        if newest > limits.versions_per_job:
            removed += history.prune_versions(job_id, newest - limits.versions_per_job)
        return removed

    def _walk_on_over_versions(self, keep: int) -> None:
        """Add the next jobs that may have more than ``keep`` versions, also deleted ones."""
        if self._version_cursor is None:
            return
        page = self._store.history.with_old_versions(self._version_cursor, keep)
        self._version_cursor, job_ids = page
        for job_id in job_ids:
            self._to_prune[job_id] = None

    def _walk_on(self) -> None:
        """Add the next job of the walk over all that have history, also of deleted ones."""
        if self._prune_cursor is None:
            return
        self._prune_cursor = self._store.history.next_with_history(self._prune_cursor)
        if self._prune_cursor:
            self._to_prune[self._prune_cursor] = None

    def turn_failed(self) -> None:
        """Walk over all jobs again: what a turn has noted was rolled back with it."""
        self._prune_cursor = ""
        self._version_cursor = ""
        self.size_limit.look_anew()
        self._store.history.forget_size()


# --- Alerts ---


class AlertSize(NamedTuple):
    """How much an alert tells."""

    jobs: int  # The others are only counted.
    executions: int  # Of each job, the newest ones.
    characters: int  # Of each error; longer ones are cut off.


class Alerts:
    """Tells that jobs have turned bad or well: one request for what turns within ALERT_GATHER.

    An alert is an execution of a built-in job, so that it is durable and tried again.
    """

    # Names and errors may be long: the first of these that fits into MAX_BODY_BYTES is sent. The
    # last one does, because a name has at most 200 characters, each at most 12 in JSON.
    SIZES = (
        AlertSize(jobs=50, executions=3, characters=5000),
        AlertSize(jobs=50, executions=3, characters=200),
        AlertSize(jobs=20, executions=1, characters=200),
    )

    RETRY_POLICY: ClassVar[Json] = {  # It is tried again for about half an hour.
        "max_attempts": 10,
        "initial_interval": "5s",
        "max_interval": "10m",
        "attempt_timeout": "10s",
    }

    def __init__(
        self, store: Store, versions: VersionCache, run_queue: RunQueue, clock: Clock
    ) -> None:
        self._store = store
        self._versions = versions
        self._run_queue = run_queue
        self._clock = clock
        self._failed_at: int | None = None  # By the monotonic clock; None: the last one was made.

    def note(self, turn: Turn, job_ids: set[str]) -> None:
        """Note which of these jobs have turned bad or well in this turn."""
        alerts = turn.settings.alerts
        if alerts.webhook:
            self._store.news.note_turned(job_ids, alerts.after, turn.now)

    def send_due(self, turn: Turn) -> None:
        """Enqueue an alert if it is time for one; whatever goes wrong with it is logged.

        A bug in it stops nothing else, and it is tried again after ALERT_PAUSE. Raises an error
        only where the whole turn is rolled back.
        """
        webhook = turn.settings.alerts.webhook
        if webhook is None or turn.paused:
            return
        now = self._clock.monotonic()
        if self._failed_at is not None and now - self._failed_at < ALERT_PAUSE:
            return
        self._failed_at = None
        try:
            with self._store.database.transaction():
                self._send(turn, webhook)
        except Exception:
            if not self._store.database.in_transaction:
                raise  # A full disk rolls back the whole turn, not only the savepoint.
            log.exception("alerts: no alert could be made, it is tried again in a minute")
            self._versions.clear()  # What was rolled back may be in it.
            self._failed_at = now

    def _send(self, turn: Turn, webhook: Json) -> None:
        """Enqueue one alert that tells of all jobs that have turned, if others had time to.

        Only one is on its way at a time, so that none overtakes another.
        """
        if not self._store.news.are_due(turn.now - ALERT_GATHER):
            return
        if self._store.executions.active_of(ALERTS_ID, 1):
            return
        config, _enabled = validate_job(
            {
                "name": "alerts",
                "schedule": "@at 2000-01-01T00:00:00Z",
                "timeout": "1h",
                "webhook": webhook | {"body": self._body(turn.settings.cluster.node_id)},
                "retry_policy": self.RETRY_POLICY,
            },
            turn.settings.scheduler.default_retry_policy,
            now=None,
        )
        number = self._store.news.save_alert(config, turn.now)
        version = self._versions.get(ALERTS_ID, number)
        alert = self._run_queue.new_execution(turn, version, Trigger.ALERT, turn.now, turn.now)
        self._store.executions.add([alert])

    def _body(self, node_id: str) -> str:
        """Return what the alert's receiver gets, as JSON that fits into a request."""
        body = ""
        for size in self.SIZES:
            body = json.dumps(self._content(node_id, size))
            if len(body) <= MAX_BODY_BYTES:
                break
        return body

    def _content(self, node_id: str, size: AlertSize) -> Json:
        """Return a text for people, and the jobs."""
        number, failed = self._store.news.count_turned()
        jobs = self._store.news.turned(size.jobs)
        lines = [f"Chronos on {node_id}:"]
        for job in jobs:
            last = self._store.executions.last_verdicts(job["id"], size.executions)
            shown = [self._shortened(execution, size.characters) for execution in last]
            job["executions"] = [execution.to_json() for execution in shown]
            if len(lines) <= ALERT_LINES:
                lines.append(self._line(job, shown))
        if number > ALERT_LINES:
            lines.append(f"and {number - ALERT_LINES} more")
        return {
            "text": "\n".join(lines),
            "event": "failed" if failed else "recovered",
            "jobs_total": number,
            "jobs": jobs,
        }

    def _shortened(self, execution: Execution, characters: int) -> Execution:
        """Return an execution as an alert shows it: with so many characters of its error."""
        error = execution.error
        if error and len(error) > characters:
            error = f"{error[:characters]} …"
        return execution._replace(error=error)

    def _line(self, job: Json, last: list[Execution]) -> str:
        """Return the line of the alert's text about one job."""
        if job["event"] == "recovered":
            return f"{job['name']} is well again"
        for execution in last:
            if execution.error:  # The newest may be a success of the very turn that tells.
                return f"{job['name']} fails: {execution.error}"
        return f"{job['name']} fails"


# ======================================================================================
# 16. Engine: one thread is the only writer of the database, one transaction a turn
# ======================================================================================
#
# The order in a turn: outcomes of attempts, fire times, changes, take what is due, then what may
# wait (counts, alerts, retention). What others wait for happens after the commit, and only then:
# so whatever was told or sent is on disk. A turn that fails is rolled back as a whole; outcomes
# are kept for the next one, and who has submitted a change is told.


class Submission(NamedTuple):
    """A change that an API thread has handed in, and the future that it waits for."""

    future: Future[Any]
    change: Change


class Submissions:
    """The changes that wait for a turn. Only the engine's thread uses it."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._waiting: deque[Submission] = deque()

    @property
    def are_waiting(self) -> bool:
        """Whether there is a change to make."""
        return bool(self._waiting)

    def add(self, submission: Submission) -> None:
        """Let a change wait for the turn that has time for it."""
        self._waiting.append(submission)

    def apply(self, turn: Turn) -> None:
        """Make the changes, in their order; what would take too long stays for the next turn."""
        start = self._clock.monotonic()
        while self._waiting and self._clock.monotonic() - start < TURN_TARGET:
            submission = self._waiting.popleft()
            if not submission.future.set_running_or_notify_cancel():
                continue  # Its thread has given up.
            turn.results.append((submission.future, None))  # So that fail() finds the future.
            result = self._apply(turn, submission.change)
            turn.results[-1] = (submission.future, result)

    def _apply(self, turn: Turn, change: Change) -> Any:
        """Make one change; return what it returns or raises."""
        ended_before = dict(turn.ended)
        deleted_before = dict(turn.deleted)
        try:
            with self._database.transaction():
                return change(turn)
        except Exception as error:
            if not self._database.in_transaction:
                raise  # A full disk rolls back the whole turn, not only the savepoint.
            turn.ended = ended_before
            turn.deleted = deleted_before
            if not isinstance(error, ApiError):
                log.exception("a change failed")
            return error

    def fail(self, turn: Turn, error: Exception) -> None:
        """Tell everybody whose change was rolled back, or was not begun, why."""
        for future, _result in turn.results:
            self.answer(future, error)
        self.refuse(error)

    def refuse(self, error: Exception) -> None:
        """Tell everybody whose change was not begun why."""
        for submission in self._waiting:
            if submission.future.set_running_or_notify_cancel():
                self.answer(submission.future, error)
        self._waiting.clear()

    def answer(self, future: Future[Any], result: Any) -> None:
        """Tell who waits for a future what its change returned or raised; raise nothing.

        Whatever goes wrong with that, there is an answer: nothing else ends the wait.
        """
        if future.done():
            return  # A second answer would raise, and keep others from theirs.
        try:
            self._answer(future, result)
        except Exception:
            log.exception("a bug: the engine could not answer who has submitted a change")
            future.set_exception(InternalError("a bug: the server's log has more"))

    def _answer(self, future: Future[Any], result: Any) -> None:
        if isinstance(result, ApiError):
            future.set_exception(result)
        elif isinstance(result, Exception):
            future.set_exception(InternalError("a bug: the server's log has more"))
        else:
            future.set_result(result)


class Waiters:
    """The API threads that wait for the end of an execution, each with an event of its own.

    attribute        written by     guarded by
    _execution_ids   API threads    nothing: each adds and removes an entry of its own
    """

    def __init__(self) -> None:
        self._execution_ids: dict[threading.Event, str] = {}  # Several may wait for the same.

    @contextlib.contextmanager
    def waiting_for(self, execution_id: str) -> Iterator[threading.Event]:
        """Yield the event that is set when the execution has ended, or the server stops.

        Whoever makes the execution enters this before, so that no end is missed.
        """
        event = threading.Event()
        self._execution_ids[event] = execution_id
        try:
            yield event
        finally:
            del self._execution_ids[event]

    def wake(self, execution_ids: set[str]) -> None:
        """Wake those who wait for one of these executions."""
        for event, execution_id in list(self._execution_ids.items()):
            if execution_id in execution_ids:
                event.set()

    def wake_all(self) -> None:
        """Wake everybody."""
        for event in list(self._execution_ids):
            event.set()


class Reporter:
    """Tells the log and /metrics what has happened, after the commit of a turn."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._failures: dict[str, int] = {}  # Kind of failure -> when it was last logged.

    def tell_of_attempt(self, turn: Turn, outcome: Outcome) -> None:
        """Count an attempt; log it where its execution goes on after it."""
        execution = outcome.execution
        self._metrics.count("chronos_attempts_total", result=outcome.reason or "success")
        if execution.trigger == Trigger.SCHEDULE and execution.attempts == 1:
            late = max(0, outcome.started_at - execution.scheduled_at)
            self._metrics.observe("chronos_lateness_seconds", late / SECOND)
        if execution.id not in turn.ended and outcome.reason in ALARMING_REASONS:
            log.info(
                "%s: %s failed in attempt %s: %s",
                in_words(execution.job_id),
                execution.id,
                execution.attempts,
                outcome.error,
                extra=about(execution.job_id, execution.id),
            )

    def tell_of_end(self, execution: Execution) -> None:
        """Log how an execution has ended, and count its time."""
        if execution.attempts:
            self._metrics.observe("chronos_execution_duration_seconds", execution.spent / SECOND)
        is_alarming = execution.reason in ALARMING_REASONS
        log.log(
            logging.WARNING if is_alarming else logging.INFO,
            "%s: %s %s: %s",
            in_words(execution.job_id),
            execution.id,
            execution.status,
            execution.error or f"the server answered {execution.status_code}",
            extra=about(execution.job_id, execution.id),
        )

    def tell_of_turn(self) -> None:
        """Count a turn."""
        self._metrics.count("chronos_engine_passes_total")

    def tell_of_bug(self, error: Exception, step: str) -> None:
        """Log a bug in what follows a commit, each step's once a minute."""
        if self._is_new(step):
            message = "a bug: the engine could not %s, it goes on with the rest"
            log.error(message, step, exc_info=error)

    @contextlib.contextmanager
    def isolated(self, step: str) -> Iterator[None]:
        """Log what is raised inside, and go on; ``step`` says in words what is done there."""
        try:
            yield
        except Exception as error:
            self.tell_of_bug(error, step)

    def _is_new(self, kind: str) -> bool:
        """Return whether this kind of failure was not logged for a minute; now it is."""
        now = self._clock.monotonic()
        told_at = self._failures.get(kind)
        if told_at is not None and now - told_at <= MINUTE:
            return False
        self._failures[kind] = now
        return True

    def tell_of_failure(self, error: Exception, problem: str) -> None:
        """Log why a turn has failed, each kind of error once a minute."""
        if isinstance(error, StoreError):
            self._metrics.count("chronos_store_errors_total")
        if not self._is_new(type(error).__name__):
            return
        trace = None if isinstance(error, StoreError) else error  # A bug needs its traceback.
        log.error("the engine failed, it tries again: %s", problem, exc_info=trace)


class Engine:
    """Makes the turns. run_turn() is one; start() lets a thread make one after another.

    attribute     written by              guarded by
    _inbox        workers, API threads    itself (a queue of outcomes and submissions)
    waiters       API threads             itself
    stopping      who stops               nothing: it is set once, as _stopped
    settings      who reloads             nothing: it is replaced as a whole
    problem       the engine's thread     nothing: others only read it, as last_turn and metrics
    the others    the engine's thread     nothing: nobody else reads them
    """

    def __init__(
        self, store: Store, dispatcher: Dispatcher, settings: Settings, clock: Clock
    ) -> None:
        self.store = store
        self.dispatcher = dispatcher
        self.clock = clock
        self.settings = settings
        self.metrics = Metrics()
        self.stopping = False  # Nothing is started any more.
        self._starting = False  # Nothing is started yet.
        self.problem: str | None = None  # Why the last turn failed.
        self.last_turn = clock.monotonic()
        self.waiters = Waiters()
        self._inbox = queue.SimpleQueue[Outcome | Submission | None]()
        workers = settings.dispatcher.max_concurrent_jobs
        self.pool = WorkerPool(dispatcher, workers, hand_over=self._inbox.put)
        self.versions = VersionCache(store.jobs)
        self.run_queue = RunQueue(store, self.versions, self.pool, settings, clock)
        self.scheduler = Scheduler(
            store, self.versions, self.run_queue, settings, clock, dispatcher.stood_still
        )
        self.zone_rules = ZoneRules(store, clock)
        self.job_changes = JobChanges(store, self.versions, self.scheduler, clock)
        self.retention = Retention(store, clock)
        self.alerts = Alerts(store, self.versions, self.run_queue, clock)
        self._outcomes: list[Outcome] = []  # They are kept until a turn has written them.
        self._submissions = Submissions(store.database, clock)
        self._reporter = Reporter(self.metrics, clock)
        self._wake_at = 0  # Nothing is due before this instant.
        self._heartbeat_at = 0  # When last_seen was last written.
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # --- Called by other threads ---

    def start(self) -> None:
        """Take up what the last process has left, and begin with the turns.

        Nothing fires and nothing runs until begin() is submitted.
        """
        self._starting = True
        self.recover()
        self.dispatcher.start()
        self.pool.start()
        self._thread.start()

    def begin(self, turn: Turn) -> None:
        """Let jobs fire, from the next turn on. Submit it, once they are as they are declared."""
        self._starting = False
        turn.follows_at_once = True

    def stop(self, grace: int) -> None:
        """Start nothing more, give what runs ``grace`` µs, leave the rest to the next start."""
        if not self._thread.is_alive():
            return  # The start did not get so far.
        self.stopping = True
        self.waiters.wake_all()
        with contextlib.suppress(ApiError):
            self.submit(lambda _turn: None)  # After it no turn is under way that starts something.
        deadline = self.clock.monotonic() + grace
        while self.run_queue.in_flight and self.clock.monotonic() < deadline:
            time.sleep(0.02)
        self._stopped = True
        self._inbox.put(None)
        self._thread.join()
        self.run_queue.abort_all(CutReason.SHUTDOWN)
        self.pool.stop()
        self.dispatcher.stop()

    def hand_in(self, change: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Hand in a change for the next turn, which calls it with itself and the arguments.

        It is made inside a savepoint of its own: if it raises, nothing of it stays.
        """
        future: Future[Result] = Future()
        if self._stopped:
            future.set_exception(Unavailable("the server is stopping"))
        else:
            self._inbox.put(Submission(future, lambda turn: change(turn, *arguments)))
        return future

    def submit(self, change: Callable[..., Result], *arguments: Any) -> Result:
        """Make a change and return what it returned, once it is on disk.

        Where this raises, nothing has changed: ApiError of the change's own, or StoreError, also
        where the engine has not begun it within WRITE_PATIENCE_S.
        """
        future = self.hand_in(change, *arguments)
        try:
            return future.result(WRITE_PATIENCE_S)
        except TimeoutError:
            if future.cancel():
                raise StoreError(f"nothing was changed within {WRITE_PATIENCE_S:g} s") from None
            return future.result()  # It is being made: its result is near.

    def silence(self) -> int:
        """Return how long ago the engine or the watchdog last went round, in µs."""
        return self.clock.monotonic() - min(self.last_turn, self.dispatcher.last_watch)

    # --- The turns ---

    def recover(self) -> None:
        """Take up what the last process has left running: its attempt counts as interrupted."""
        self.scheduler.recover()
        self.zone_rules.recover()
        for execution in self.store.executions.running():
            outcome = interruption(execution, self.clock.now(), self.clock.monotonic())
            self._outcomes.append(outcome)

    def _loop(self) -> None:
        wait = 0
        while not self._stopped:
            try:
                wait = self.run_turn(wait)
            except Exception as error:  # A bug must not end the thread.
                self._fail(Turn(self.clock.now(), self.settings), error)
                wait = SECOND
        self.run_turn()  # What came in meanwhile is written; nothing is started.
        self._submissions.refuse(Unavailable("the server is stopping"))

    def run_turn(self, wait: int = 0) -> int:
        """Wait up to ``wait`` µs for news, do what is due; return the µs until something is."""
        self._collect(wait)
        turn = Turn(self.clock.now(), self.settings, self.stopping, self._starting)
        try:
            step = self.scheduler.clock_step(turn.now)
            is_due = turn.now >= self._wake_at or abs(step) > CLOCK_STEP
            if is_due or self._outcomes or self._submissions.are_waiting:
                with self.store.database.transaction():
                    turn.now = self.clock.now()  # It may have waited for a lock.
                    self._work(turn, step)
                self.scheduler.absence.turn_worked()
                if self.problem:
                    log.warning("the engine works again")
                self.problem = None
        except Exception as error:
            self._fail(turn, error)
        else:
            self.scheduler.follow_clock(step)
            self._after_commit(turn)
        self._reporter.tell_of_turn()
        self.last_turn = self.clock.monotonic()
        if self._submissions.are_waiting:
            return 0
        return max(0, min(self._wake_at - self.clock.now(), SECOND))

    def _collect(self, wait: int) -> None:
        """Take everything out of the inbox; wait up to ``wait`` µs for the first of it."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get(wait > 0, wait / SECOND)
                wait = 0
                if isinstance(item, Outcome):
                    self.run_queue.came_back(item)
                    self._outcomes.append(item)
                elif item is not None:
                    self._submissions.add(item)

    def _work(self, turn: Turn, step: int) -> None:
        """Do everything of a turn that is inside its transaction."""
        self.store.database.check_file()
        self._beat(turn)
        self.scheduler.look_at_clock(turn, step)
        self.run_queue.record(turn, self._outcomes)
        self.zone_rules.apply(turn)
        self.scheduler.fire_due(turn)
        self._count_ends(turn)  # Alerts and the answers to changes show the counts.
        self.alerts.send_due(turn)
        self._submissions.apply(turn)
        freed = turn.caught_up | {execution.job_id for execution in turn.ended.values()}
        self.store.executions.release_oldest(freed, turn.now)
        if not (turn.stopping or turn.starting or turn.paused):
            self.run_queue.take(turn)
        self._count_ends(turn)
        self.alerts.note(turn, {execution.job_id for execution in turn.ended.values()})
        self._set_wake_at(turn)
        is_busy = bool(turn.taken or self._outcomes)
        is_untidy = self.retention.work(turn, is_busy)
        if is_untidy or turn.follows_at_once:
            self._wake_at = turn.now
        self.scheduler.absence.turn_commits()

    def _count_ends(self, turn: Turn) -> None:
        """Count how executions have ended since this was last called in the turn."""
        uncounted = list(turn.ended.values())[turn.counted :]
        self.store.history.count_ends(uncounted)
        turn.counted = len(turn.ended)

    def _beat(self, turn: Turn) -> None:
        """Note once a minute that we live: a start compares its clock with that."""
        if 0 <= turn.now - self._heartbeat_at < HEARTBEAT:  # Below 0: the clock went back.
            return
        self._heartbeat_at = turn.now
        if turn.now >= RELEASED_AT:  # Else it can't be right, and nothing is compared with it.
            self.store.set_number("last_seen", turn.now)

    def _set_wake_at(self, turn: Turn) -> None:
        """Find out when the next turn has something to do."""
        following = self.store.next_instants(turn.now)
        instants = [self._heartbeat_at + HEARTBEAT, following.due_at, following.news_at]
        if self.scheduler.may_fire(turn):
            instants.append(following.cursor)
        self._wake_at = min(instant for instant in instants if instant is not None)

    def _after_commit(self, turn: Turn) -> None:
        """Start what was taken, abort what ended otherwise, tell everybody.

        Those who wait come before the logs, and a bug in one step stops none of the others: an
        API thread that got no answer would wait for ever.
        """
        outcomes = self._outcomes
        self._outcomes = []
        with self._reporter.isolated("start what was taken"):
            self.run_queue.after_commit(turn)
        for future, result in turn.results:
            self._submissions.answer(future, result)
        with self._reporter.isolated("wake those who wait for an end"):
            self.waiters.wake({*turn.ended, *turn.deleted})
        with self._reporter.isolated("tell of attempts"):
            for outcome in outcomes:
                self._reporter.tell_of_attempt(turn, outcome)
        with self._reporter.isolated("tell of ends"):
            for execution in turn.ended.values():
                self._reporter.tell_of_end(execution)

    def _fail(self, turn: Turn, error: Exception) -> None:
        """The turn was rolled back: say why; the outcomes wait for the next turn."""
        self.problem = str(error) or repr(error)
        with self._reporter.isolated("refuse the changes of a turn that failed"):
            self._submissions.fail(turn, error)
        self.versions.clear()  # What was rolled back may be in it.
        self.scheduler.absence.turn_failed()
        self.zone_rules.turn_failed()
        self.retention.turn_failed()
        self._heartbeat_at = 0
        self._wake_at = turn.now + SECOND
        with self._reporter.isolated("tell of a turn that failed"):
            self._reporter.tell_of_failure(error, self.problem)


# ======================================================================================
# 17. API: a table of routes; each handler parses, calls and answers
# ======================================================================================
#
# Every answer is JSON in one envelope: {"success": …, "data": …, "error": …}; only the page and
# the metrics are not. Handlers run in waitress's threads: they read the store themselves and hand
# each change to the engine. There is no rule about jobs here, and no SQL.

# --- Bodies and queries ---


class Reply(NamedTuple):
    """What a handler returns where the status is not 200."""

    status: int
    data: Any


def envelope(data: Any, error: ApiError | None = None) -> bytes:
    """Return the body of an answer: JSON in UTF-8, and a line end.

    ``error`` is why the request failed; None: it did not.
    """
    shown: Json | None = None
    if error is not None:
        shown = {"code": error.code, "message": str(error)}
        if error.details:
            shown["details"] = error.details
    answer = {"success": error is None, "data": data, "error": shown}
    return json.dumps(answer, allow_nan=False).encode() + b"\n"


def read_json() -> Any:
    """Return the body of the request as JSON (RFC 8259). Raises InvalidJson."""
    # RequestParser and waitress have bounded it to MAX_BODY_BYTES.
    body = bottle.request.environ["wsgi.input"].read()
    try:
        text = body.decode()
        check_nesting(text)
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=no_constant)
    except ValueError as error:
        raise InvalidJson(f"the body is not JSON: {error}") from error


def take_no_body(why: str) -> None:
    """Raise ValidationError where the request has a body that says anything; {} says nothing.

    ``why`` is a sentence on what the call does instead.
    """
    body = bottle.request.environ["wsgi.input"].read().strip()
    if body and not re.fullmatch(rb"\{\s*\}", body):
        raise ValidationError(f"the body must be empty or {{}}: {why}")


# A string, whether it ends or not (*+ never goes back, so that this takes one walk through the
# text), or where a list or object begins or ends.
_NESTING = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def check_nesting(text: str) -> None:
    """Raise ValueError where JSON is nested deeper than MAX_NESTING.

    The parser's own limit differs from one Python to the next.
    """
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return
    depth = 0
    for match in _NESTING.finditer(text):
        character = match[0][0]
        if character in "[{":
            depth += 1
        elif character != '"':
            depth -= 1
        if depth > MAX_NESTING:
            raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")


def _without_repeats(pairs: list[tuple[str, Any]]) -> Json:
    """Return an object of JSON. Raises ValueError where a name is repeated (RFC 7493, 2.3)."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = Counter(name for name, _value in pairs)
        [(repeated, _count)] = names.most_common(1)
        raise ValueError(f"the name {repeated!r} is there twice")
    return members


def read_query(table: Mapping[str, Field]) -> Json:
    """Return what the query of the URL says, with the defaults of ``table``.

    It is as strict as a body: who misspells a filter must not get what it was to leave out.
    Raises ValidationError.
    """
    if bottle.request.query_string.count("&") >= MAX_QUERY_PARTS:
        raise ValidationError(f"the query has more than {MAX_QUERY_PARTS} parts")
    query = bottle.request.query.decode()
    given: Json = {}
    for name in query:
        values = query.getall(name)
        if name in REPEATABLE:
            given[name] = values
        elif len(values) == 1:
            given[name] = values[0]
        else:
            raise InvalidFields([(name[:100], "is there more than once")])
    return validate(table, given)


def current_query() -> Json:
    """Return the query of this request, checked, as its table in QUERIES has it."""
    query: Json = bottle.request.environ["chronos.query"]
    return query


def _true_or_false(word: str) -> bool:
    """A truth value, written out as in JSON."""
    known = one_of("true", "false")
    return bool(known(word) == "true")


# A tag in a query: the first colon that is not escaped ends the name; the value is as it stands.
_TAG = re.compile(r"((?:[^\\:]|\\[\\:])+):(.*)", re.DOTALL)


def _tags(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of name and value, each written with a colon between them; see _TAG."""
    if len(texts) > MAX_TAGS:
        raise ValueError(f"must not be there more than {MAX_TAGS} times")
    pairs = []
    for text in texts:
        match = _TAG.fullmatch(text)
        if match is None:
            raise ValueError(
                r"must be a name, a colon and a value; in the name, : is written \: and \ is \\"
            )
        name = re.sub(r"\\(.)", r"\1", match[1])
        pairs.append((name, match[2]))
    return pairs


MAX_QUERY_PARTS = 100  # Of a URL; no query means anything with so many.
MAX_TAGS = 20  # That a list of jobs can be filtered by.
REPEATABLE = frozenset({"tag"})  # Each value counts; of others there is one.

# fmt: off
EXECUTIONS_QUERY = {
    # name           check                            default
    "limit":       Field(query_number(1, 100),           20),
    "before":      Field(a_text(100),                    None),
    "status":      Field(one_of(*Status),                None),
    "reason":      Field(one_of(*sorted(set(Reason) - {Reason.DELETED})), None),
    "from":        Field(parse_time,                     None),
    "to":          Field(parse_time,                     None),
}
JOBS_QUERY = {
    "limit":       Field(query_number(1, 1_000_000),     None),
    "offset":      Field(query_number(0, 1_000_000_000), 0),
    "after":       Field(a_text(100),                    None),
    "enabled":     Field(_true_or_false,                 None),
    "name":        Field(a_text(200),                    None),
    "q":           Field(a_text(200),                    None),
    "status":      Field(one_of(*Status),                None),
    "last_status": Field(one_of(*ENDINGS),               None),
    "tag":         Field(_tags,                          ()),
}
PREVIEW_QUERY = {
    "schedule":    Field(a_schedule),
    "timezone":    Field(a_timezone,                     "UTC"),
    "count":       Field(query_number(1, 100),           5),
    "from":        Field(parse_time,                     None),
}
VERSIONS_QUERY = {
    "limit":       Field(query_number(1, 1_000_000),     None),
    "before":      Field(query_number(1, 1_000_000_000), None),
}
TRIGGER_QUERY = {
    "wait":        Field(parse_duration,                 None),
}
UPCOMING_QUERY = {
    "hours":       Field(query_number(1, 168),           24),
}
QUERIES: dict[str, dict[str, Field]] = {
    # handler              what its URL may ask; all others take no query
    "jobs.list_all":       JOBS_QUERY,
    "jobs.list_versions":  VERSIONS_QUERY,
    "executions.list_all": EXECUTIONS_QUERY,
    "executions.of_job":   EXECUTIONS_QUERY,
    "executions.trigger":  TRIGGER_QUERY,
    "server.preview":      PREVIEW_QUERY,
    "server.upcoming":     UPCOMING_QUERY,
}
# fmt: on

# --- Long answers: piece by piece ---

CHUNK_BYTES = 1 << 16  # A long answer is made and sent in chunks of about so many bytes,
CHUNK_TIME = 10_000  # or of what so many µs give.
SHORT_ANSWER = 1 << 20  # Bytes: an answer up to this is sent as a whole, with its length.
SPARE_PLACES = 2  # For long answers, where all who may hold a thread are there already.
CHUNKS_AT_ONCE = 2  # That all threads together make: the engine waits for the interpreter, too.


def json_pieces(value: Any, depth: int = 2) -> Iterator[str]:
    """Yield the JSON of a value in pieces, of which a few are in memory at once.

    An iterator in it stands for a list, and each of its items is a piece. It may be the value
    itself, or a member of an object, ``depth`` objects deep at most.
    """
    if isinstance(value, Iterator):
        separator = "["
        for item in value:
            yield separator + json.dumps(item, allow_nan=False)
            separator = ", "
        yield "]" if separator == ", " else "[]"
    elif isinstance(value, dict) and value and depth > 0:
        separator = "{"
        for name, member in value.items():
            yield f"{separator}{json.dumps(name)}: "
            yield from json_pieces(member, depth - 1)
            separator = ", "
        yield "}"
    else:
        yield json.dumps(value, allow_nan=False)


class LongAnswers:
    """Makes the bodies of answers, however long, such that the engine is not kept waiting.

    attribute   written by     guarded by
    _making     API threads    itself (who makes a chunk has a place in it)
    _places     API threads    each itself (who sends a long answer has a place in one)
    """

    def __init__(self, store: Store, clock: Clock, places: threading.BoundedSemaphore) -> None:
        """``places`` are the threads that may be held for long: see ExecutionHandlers."""
        self._store = store
        self._clock = clock
        self._places = (places, threading.BoundedSemaphore(SPARE_PLACES))
        self._making = threading.BoundedSemaphore(CHUNKS_AT_ONCE)

    def body(self, data: Any) -> bytes | Iterator[bytes]:
        """Return the envelope of ``data``; of a long one an iterator. Raises ApiError.

        Iterators in it are lists: see json_pieces().
        """
        answer = json_pieces({"success": True, "data": data, "error": None})
        pieces = chain(answer, ["\n"])  # The only line end: in the JSON of a text it is escaped.
        begin = bytearray(self._make_chunk(pieces))  # What ends with this waits for nobody.
        while not begin.endswith(b"\n") and len(begin) < SHORT_ANSWER:
            begin += self._make_chunk_in_turn(pieces)
        if begin.endswith(b"\n"):
            return bytes(begin)
        for places in self._places:
            if places.acquire(blocking=False):
                return self._send(bytes(begin), pieces, places)
        raise Unavailable("too many long answers are under way: try again, or set a limit")

    def _make_chunk(self, pieces: Iterator[str]) -> bytes:
        """Return the next pieces, as many as CHUNK_BYTES and CHUNK_TIME allow; empty: the end."""
        found: list[str] = []
        size = 0
        self._store.database.bound_reads(self._clock.monotonic)
        until = self._clock.monotonic() + CHUNK_TIME
        for piece in pieces:
            found.append(piece)
            size += len(piece)
            if size >= CHUNK_BYTES or self._clock.monotonic() > until:
                break
        return "".join(found).encode()

    def _make_chunk_in_turn(self, pieces: Iterator[str]) -> bytes:
        """Return the next pieces as _make_chunk() does, once few enough threads make some."""
        with self._making:
            return self._make_chunk(pieces)

    def _send(
        self, begin: bytes, pieces: Iterator[str], places: threading.BoundedSemaphore
    ) -> Iterator[bytes]:
        """Yield the chunks of a long answer, for which there is a place.

        What goes wrong breaks the connection off.
        """
        place = f"{bottle.request.method} {bottle.request.path}"
        try:
            yield begin
            while chunk := self._make_chunk_in_turn(pieces):
                yield chunk
        except ApiError as error:
            log.warning("%s was broken off: %s", place, error)
            raise
        finally:
            places.release()


# --- Sign-in ---

SIGN_IN_FAILURES = 10  # After so many in a minute an address has to wait,
NETWORK_FAILURES = 50  # and after so many a network.
SIGN_IN_PATIENCE_S = 5.0  # A request waits so long for the hash of its password.
NO_SUCH_USER = f"scrypt:{'00' * 16}:"  # Has a salt to hash with, but is the hash of nothing.


class Place(NamedTuple):
    """Where somebody asks from, as failures are counted."""

    address: str  # Of IPv6 the /64, which one subscriber has.
    network: str  # The /24 around an address of IPv4, the /48 around one of IPv6.

    @classmethod
    def of(cls, address: str) -> Place:
        """Return the place of an address; what is none is a place of its own."""
        try:
            ip = parse_ip(address)
        except ValueError:
            return cls(address, address)
        if ip.version == 4:
            widths = (32, 24)
        else:
            widths = (64, 48)
        around = [ipaddress.ip_network((int(ip), width), strict=False) for width in widths]
        return cls(str(around[0]), str(around[1]))


class PendingHash(NamedTuple):
    """A password that is being hashed, or waits for that."""

    result: Future[bool | None]  # Whether it is right; None: it was not hashed after all.
    addresses: dict[Place, str]  # Who asks.


class Passwords:
    """Finds out whether passwords are right; remembers the right ones, and who was wrong.

    One thread hashes: a hash takes 50 ms and 16 MB, and the allocator keeps those for every
    thread that has ever hashed. It lives as long as the service, whatever a reload changes.

    attribute    written by              guarded by
    _verified    the hashing thread      _lock  (name -> proof of the password that was right)
    _pending     API and hashing         _lock  (proof -> the hash that is on its way)
    _waiting     API threads             _lock  (where those ask from who wait for a hash)
    _failures    the hashing thread      _lock  (the last 1,000: place, µs of the monotonic clock)
    """

    def __init__(self, clock: Clock, most_waiting: int) -> None:
        """``most_waiting`` is how many threads, and how many passwords, may wait for a hash."""
        self._clock = clock
        self._most_waiting = most_waiting
        self._key = os.urandom(32)
        self._lock = threading.Lock()
        self._verified: dict[str, bytes] = {}
        self._pending: dict[bytes, PendingHash] = {}
        self._waiting: list[Place] = []
        self._failures = deque[tuple[Place, int]](maxlen=1000)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sign-in")

    def are_right(self, name: str, password: str, known_hash: str, address: str) -> bool:
        """Return whether the password is the one of ``known_hash``, and note it if it is not.

        ``address`` is who asks. Raises TooManyRequests: it has failed too often, or too many
        others wait. What was right once takes no hash, and so is never told to come later.
        """
        # The hash is in the proof, so another hash for a name makes what was verified worthless.
        credentials = f"{known_hash}:{name}:{password}".encode()
        proof = hmac.digest(self._key, credentials, "sha256")
        with self._lock:
            if hmac.compare_digest(self._verified.get(name, b""), proof):
                return True
            place = Place.of(address)
            self._check_room(place)
            pending = self._pending.get(proof)
            if pending is None:
                result = self._hasher.submit(self._hash, name, password, known_hash, proof)
                pending = self._pending[proof] = PendingHash(result, {})
            pending.addresses.setdefault(place, address)
            self._waiting.append(place)
        try:
            is_right = pending.result.result(SIGN_IN_PATIENCE_S)
        except (TimeoutError, CancelledError):
            is_right = None
        finally:
            with self._lock:
                self._waiting.remove(place)
        if is_right is None:
            raise self._too_many(SECOND)
        return is_right

    def _check_room(self, place: Place) -> None:
        """Raise TooManyRequests if nobody may wait for a hash here now.

        A network where somebody has failed may take half of the room: there is some beside it.
        """
        penalty = self._penalty(place)
        if penalty > 0:
            raise self._too_many(penalty)
        room = self._most_waiting
        if len(self._waiting) >= room or len(self._pending) >= room:
            raise self._too_many(SECOND)
        _of_address, failed = self._failed_at(place)
        waiting = [other for other in self._waiting if other.network == place.network]
        if failed and len(waiting) >= room // 2:
            raise self._too_many(SECOND)

    def _penalty(self, place: Place) -> int:
        """Return how many µs this place has to wait because of its failures; 0: none."""
        now = self._clock.monotonic()
        of_address, of_network = self._failed_at(place)
        waits = [0]
        if len(of_address) >= SIGN_IN_FAILURES:
            waits.append(of_address[-SIGN_IN_FAILURES] + MINUTE - now)
        if len(of_network) >= NETWORK_FAILURES:
            waits.append(of_network[-NETWORK_FAILURES] + MINUTE - now)
        return max(waits)

    def _failed_at(self, place: Place) -> tuple[list[int], list[int]]:
        """Return when sign-ins failed in the last minute: at this address, and in its network."""
        since = self._clock.monotonic() - MINUTE
        of_network = [
            (other, at)
            for other, at in self._failures
            if other.network == place.network and at > since
        ]
        of_address = [at for other, at in of_network if other.address == place.address]
        return of_address, [at for _other, at in of_network]

    def _hash(self, name: str, password: str, known_hash: str, proof: bytes) -> bool | None:
        """Return whether the password is right, and note it. The hashing thread does it.

        None: it was not hashed, because those before it were too many wrong ones.
        """
        with self._lock:
            if all(self._penalty(place) > 0 for place in self._pending[proof].addresses):
                del self._pending[proof]
                return None
        is_right: bool | None = None  # None: no hash came of it.
        _kind, salt, _hash = known_hash.split(":")
        try:
            its_hash = hash_password(password.encode(), bytes.fromhex(salt))
            is_right = hmac.compare_digest(its_hash, known_hash)
        finally:
            with self._lock:
                pending = self._pending.pop(proof)
                if is_right:
                    self._verified[name] = proof
                elif is_right is not None:
                    now = self._clock.monotonic()
                    self._failures.extend((place, now) for place in pending.addresses)
        if not is_right:
            for address in pending.addresses.values():
                log.warning("somebody at %s could not sign in as %s", address, name[:100])
        return is_right

    def stop(self) -> None:
        """End the hashing thread; who still waits for a hash is told to come later."""
        self._hasher.shutdown(wait=False, cancel_futures=True)

    def _too_many(self, wait: int) -> TooManyRequests:
        """Return the error that asks to come again in ``wait`` µs."""
        seconds = wait // SECOND + 1
        bottle.response.set_header("Retry-After", str(seconds))
        return TooManyRequests("too many sign-ins at once, or wrong ones in a minute")


class SignIn:
    """HTTP Basic authentication (RFC 7617) of the names in auth.users.

    Unknown users cost as much time as known ones, so that it can't be seen who is one.
    """

    def __init__(self, settings: AuthSettings, passwords: Passwords) -> None:
        self._users = settings.users
        self._viewers = settings.viewers
        self._passwords = passwords

    def user(self, header: str, reads: bool) -> str:
        """Return who sends these credentials.

        ``header`` is the Authorization of a request, empty where there is none; ``reads`` says
        that the request changes nothing. Raises Unauthorized, TooManyRequests, or Forbidden where
        a viewer wants to change something.
        """
        name = self._verified(header)
        if not reads and not self.may_write(name):
            raise Forbidden(f"{name} may only read: see auth.viewers")
        return name

    def may_write(self, name: str) -> bool:
        """Return whether this user may change anything."""
        return name not in self._viewers

    def _verified(self, header: str) -> str:
        """Return the name if the password is right. Raises Unauthorized or TooManyRequests."""
        credentials = bottle.parse_auth(header)
        # scrypt takes "x" and "x\0" for the same password: each spelling would cost a hash.
        if credentials is not None and "\0" not in credentials[1]:
            name, password = credentials
            known_hash = self._users.get(name, NO_SUCH_USER)
            address = bottle.request.environ["REMOTE_ADDR"]
            if self._passwords.are_right(name, password, known_hash, address):
                return str(name)
        scheme = "Basic"
        if "X-Chronos-UI" in bottle.request.headers:
            # A browser does not know this one, so it shows no dialog of its own above the page.
            scheme = "xBasic"
        challenge = f'{scheme} realm="Chronos", charset="UTF-8"'
        bottle.response.set_header("WWW-Authenticate", challenge)
        raise Unauthorized("user name and password are missing or wrong")


# --- What handlers share ---


def current_user() -> str:
    """Return who has signed in for this request; without sign-in everybody is anonymous."""
    return str(bottle.request.environ.get("chronos.user", "anonymous"))


def current_user_may_write() -> bool:
    """Return whether this user may change anything; without sign-in everybody may."""
    return bool(bottle.request.environ.get("chronos.may_write", True))


def etag_of(job: Job) -> str:
    """Return the entity tag of a job (RFC 9110, 8.8.3): its version, in quotes."""
    return f'"{job.version}"'


# The headers by which a client says that a job or an execution is to be made once.
# fmt: off
ONCE_HEADERS = {
    "Idempotency-Key": Field(
        matching("[!-~]{1,255}", "must be 1 to 255 visible ASCII characters, no blanks among them"),
        None),
    "If-None-Match": Field(
        matching(r"[*]", "may only be * in a PUT: it creates the job, and changes none"),
        None),
}
NEW_JOB_ID = {
    "id": Field(matching("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
                         "must be a UUID, in lower case and with hyphens")),
}
# fmt: on


def once_header(name: str) -> str | None:
    """Return a header of ONCE_HEADERS; None: it is not there. Raises InvalidFields."""
    variable = f"HTTP_{name.upper().replace('-', '_')}"
    # Not by request.headers: that fails on what is not UTF-8.
    given = bottle.request.environ.get(variable)
    found: str | None = validate({name: ONCE_HEADERS[name]}, {name: given})[name]
    return found


def new_execution_id(job_id: str, replay_of: str | None = None) -> str:
    """Return the id of an execution that is to be made; an Idempotency-Key has the same each time.

    A key is of one job, and there of its triggers (``replay_of`` None) or of the replays of one
    execution. Raises InvalidFields.
    """
    key = once_header("Idempotency-Key")
    if key is None:
        return f"exec-{uuid.uuid4()}"
    # As JSON, because ids that nobody has may be no UTF-8.
    name = json.dumps([job_id, replay_of, key])
    return f"exec-{uuid.uuid5(KEYED_IDS, name)}"


def has_if_match() -> bool:
    """Return whether the request is only about certain versions of a job."""
    return "HTTP_IF_MATCH" in bottle.request.environ


# A proxy that compresses an answer makes of its "3" W/"3" (nginx) or "3-gzip" (Apache, Caddy).
_ENTITY_TAG = re.compile(r'(?:W/)?"([^"]*?)(?:-(?:gzip|br|zstd|deflate))?"')


def names_entity_tag(header: str, etag: str) -> bool:
    """Return whether If-Match or If-None-Match names an entity tag (RFC 9110, 13.1).

    ``header`` is "*" or a list of tags. What a proxy has made of a tag counts as the same: ours
    stand for a state, in whatever coding it travels.
    """
    if header == "*":
        return True
    for tag in header.split(","):
        match = _ENTITY_TAG.fullmatch(tag.strip())
        if match and f'"{match[1]}"' == etag:
            return True
    return False


def check_conditions(job: Job) -> None:
    """Raise PreconditionFailed if If-Match names other versions (RFC 9110, 13.1.1).

    Or if there is If-None-Match: *, which holds where there is no job (13.1.2).
    """
    wanted: str = bottle.request.environ.get("HTTP_IF_MATCH", "*")
    if not names_entity_tag(wanted, etag_of(job)):
        raise PreconditionFailed(
            f"the job has version {job.version} by now: "
            f"If-Match must be {etag_of(job)}, with the quotes, and was {wanted[:100]}"
        )
    if once_header("If-None-Match") is not None:
        raise PreconditionFailed(f"there is a job {job.id} already")


def is_not_modified(state: str) -> bool:
    """Give the answer an entity tag for this state; say if the client has that already.

    The status is 304 then, and the answer has no body (RFC 9110, 13.1.2).
    """
    digest = hashlib.sha256(state.encode()).hexdigest()
    etag = f'"{digest[:16]}"'
    bottle.response.set_header("ETag", etag)
    is_known = names_entity_tag(bottle.request.environ.get("HTTP_IF_NONE_MATCH", ""), etag)
    if is_known:
        bottle.response.status = 304
    return is_known


class Handlers:
    """The base of all handlers: the engine takes changes, the store answers reads."""

    def __init__(self, engine: Engine, store: Store, clock: Clock) -> None:
        self.engine = engine
        self.store = store
        self.clock = clock

    def jobs_json(self, pages: Iterable[list[Job]], has_ended: bool = False) -> Iterator[Json]:
        """Yield jobs as the API shows them, each with its newest execution.

        ``has_ended``: with the newest one that has ended.
        """
        for jobs in pages:
            last = self.store.executions.last_of([job.id for job in jobs], has_ended)
            for job in jobs:
                yield job.to_json(last.get(job.id))


# --- Jobs and their versions ---


class JobHandlers(Handlers):
    """Jobs: list, create, change, delete, enable and disable; their versions."""

    def __init__(self, engine: Engine, store: Store, settings: Settings, clock: Clock) -> None:
        super().__init__(engine, store, clock)
        self._retry_policy = settings.scheduler.default_retry_policy

    def list_all(self) -> Json:
        """Return the jobs that match, in the order of their creation."""
        query = current_query()
        names = ("enabled", "name", "q", "status", "last_status")
        filters = {name: query[name] for name in names}
        filters["tags"] = query["tag"]
        limit, offset, after = query["limit"], query["offset"], query["after"]
        pages, total = self.store.jobs.pages(filters, limit, offset, after)
        return {"jobs": self.jobs_json(pages), "total": total}

    def create(self) -> Reply:
        """Create a job; with an Idempotency-Key only once, however often it is asked for.

        The same key again is answered with the job as it is by now.
        """
        key = once_header("Idempotency-Key")
        job_id = None
        now: int | None = self.clock.now()
        if key is not None:
            job_id = str(uuid.uuid5(KEYED_IDS, key))
            if self.store.jobs.is_there(job_id):
                now = None  # The instant of its @at may have passed since.
        body = read_json()
        config, enabled = validate_job(body, self._retry_policy, now, no_id=NO_ID_IN_POST)
        if job_id is None:
            user = current_user()
            job = self.engine.submit(self.engine.job_changes.create, config, enabled, user)
            return self._show_created(job)
        job, is_new = self._create_once(job_id, config, enabled)
        if is_new:
            return self._show_created(job)
        return Reply(200, self._show(job))

    def replace(self, job_id: str) -> Reply | Json:
        """Replace a job; with ``If-None-Match: *`` (RFC 9110, 13.1.2) create it under this id."""
        if once_header("If-None-Match") is None:
            return self.change(job_id)
        validate(NEW_JOB_ID, {"id": job_id})
        if has_if_match():
            raise PreconditionFailed("If-Match and If-None-Match: * never hold both")
        there_is_one = PreconditionFailed(f"there is a job {job_id} already")
        if self.store.jobs.is_there(job_id):
            raise there_is_one
        data = read_json()
        if isinstance(data, dict) and data.get("id") not in (None, job_id):
            raise InvalidFields([("id", "must be the one in the path, or left out")])
        config, enabled = validate_job(data, self._retry_policy, self.clock.now())
        job, is_new = self._create_once(job_id, config, enabled)
        if not is_new:
            raise there_is_one
        return self._show_created(job)

    def _create_once(self, job_id: str, config: Json, enabled: bool) -> tuple[Job, bool]:
        """Return the job of this id, and whether it is new; of calls at once it is for one."""
        changes = self.engine.job_changes
        while self.engine.submit(changes.make_room, job_id):
            pass
        return self.engine.submit(changes.create_once, job_id, config, enabled, current_user())

    def _show_created(self, job: Job) -> Reply:
        name = job.config["name"]
        message = "job %s (%s) was created by %s"
        log.info(message, job.id, name, current_user(), extra=about(job.id))
        bottle.response.set_header("ETag", etag_of(job))
        return Reply(201, job.to_json(None))  # It has no execution yet.

    def get(self, job_id: str) -> Json:
        """Return one job."""
        return self._show(self.store.jobs.get(job_id))

    def change(self, job_id: str) -> Json:
        """Replace a configuration (PUT) or what the body names of it (PATCH: RFC 7396)."""
        body = read_json()
        user = current_user()
        while True:  # Until no other change comes between.
            base = self.store.jobs.get(job_id)
            check_conditions(base)
            config, enabled = self._wanted(base, body)
            try:
                job = self.engine.submit(
                    self.engine.job_changes.update, base, config, enabled, user
                )
                break
            except PreconditionFailed:
                if has_if_match():
                    raise
        note = ""
        if base.enabled and not job.enabled:
            note = ", which disabled it"
        log.info("job %s was changed by %s%s", job_id, user, note, extra=about(job_id))
        return self._show(job)

    def _wanted(self, base: Job, body: Any) -> tuple[Json, bool | None]:
        """Return what a PUT or PATCH makes of a job: its configuration, and whether it is enabled.

        None: that stays as it is. Raises InvalidFields.
        """
        patches = bottle.request.method == "PATCH"
        data = body
        if patches:
            shown = masked_config(base.config, base.id)
            data = patched_config(shown | {"enabled": base.enabled}, body)
        now = self.clock.now()
        config, enabled = validate_job(data, self._retry_policy, now, base.config)
        if patches and "enabled" not in body:
            return config, None
        return config, enabled

    def delete(self, job_id: str) -> Json:
        """Delete a job and its history."""
        job = self.store.jobs.get(job_id)
        check_conditions(job)
        self.engine.submit(self.engine.job_changes.delete, job, has_if_match())
        log.info("job %s was deleted by %s", job_id, current_user(), extra=about(job_id))
        return {"id": job_id}

    def enable(self, job_id: str) -> Json:
        """Let the job's schedule fire, from now on."""
        job = self.engine.submit(self.engine.job_changes.set_enabled, job_id, True)
        log.info("job %s was enabled by %s", job_id, current_user(), extra=about(job_id))
        return self._show(job)

    def disable(self, job_id: str) -> Json:
        """Stop the job's fire times; what is pending or running goes on."""
        job = self.engine.submit(self.engine.job_changes.set_enabled, job_id, False)
        log.info("job %s was disabled by %s", job_id, current_user(), extra=about(job_id))
        return self._show(job)

    def _show(self, job: Job) -> Json:
        """Return a job as the API shows it, and give the answer its entity tag."""
        bottle.response.set_header("ETag", etag_of(job))
        [shown] = self.jobs_json([[job]])
        return shown

    def list_versions(self, job_id: str) -> Iterator[Json]:
        """Return the versions of a job, the newest first."""
        query = current_query()
        self.store.jobs.get(job_id)  # Raises NotFound.
        found = self.store.jobs.versions(job_id, query["limit"], query["before"])
        return map(self._show_version, found)

    def get_version(self, job_id: str, number: str) -> Json:
        """Return one version of a job."""
        self.store.jobs.get(job_id)  # Raises NotFound, which names the job.
        return self._show_version(self.store.jobs.version(job_id, int(number)))

    def _show_version(self, version: Json) -> Json:
        """Return a version as the API shows it: secrets masked; null where it can't be read."""
        config = version["config"]
        if config is not None:
            config = masked_config(config, version["job_id"])
        created_at = format_time(version["created_at"])
        return version | {"config": config, "created_at": created_at}

    def roll_back(self, job_id: str, number: str) -> Json:
        """Make a new version out of an older one."""
        user = current_user()
        base = self.store.jobs.get(job_id)
        check_conditions(base)
        only_from = base.version if has_if_match() else None
        change = self.engine.job_changes.roll_back
        job = self.engine.submit(change, job_id, int(number), user, only_from)
        message = "job %s was rolled back to version %s by %s"
        log.info(message, job_id, number, user, extra=about(job_id))
        return {
            "job": self._show(job),
            "rolled_back_from": int(number),
            "new_version": job.version,
        }


# --- Executions ---


class ExecutionHandlers(Handlers):
    """Executions: list, trigger, replay and cancel."""

    def __init__(self, engine: Engine, store: Store, settings: Settings, clock: Clock) -> None:
        super().__init__(engine, store, clock)
        # Whoever waits for an end, or sends a long answer, holds a thread.
        self.may_wait = threading.BoundedSemaphore(settings.server.http.threads - FREE_THREADS)

    def trigger(self, job_id: str) -> Reply:
        """Run the job now, and wait for the end as far as ``?wait=`` and free threads allow.

        With an Idempotency-Key that has done so before, the answer is about that execution.
        """
        take_no_body("a trigger sends the job's own request")
        wait = current_query()["wait"]
        execution_id = new_execution_id(job_id)
        with self.engine.waiters.waiting_for(execution_id) as has_ended:
            earlier = self.engine.submit(self.engine.run_queue.trigger, job_id, execution_id)
            if earlier is None:
                message = "job %s was triggered by %s: %s"
                ids = about(job_id, execution_id)
                log.info(message, job_id, current_user(), execution_id, extra=ids)
            if earlier is None or not earlier.has_ended:
                self._wait_for(has_ended, wait)
        return self._show_triggered(job_id, execution_id)

    def _wait_for(self, has_ended: threading.Event, wait: int | None) -> None:
        """Wait at most ``wait`` µs (None: however long), but not if that would hold up others."""
        if self.engine.stopping or not self.may_wait.acquire(blocking=False):
            return
        try:
            seconds = None
            if wait is not None:
                seconds = min(wait, DAY) / SECOND  # An Event can't wait for centuries.
            has_ended.wait(seconds)
        finally:
            self.may_wait.release()

    def _show_triggered(self, job_id: str, execution_id: str) -> Reply:
        """Answer a trigger with how its execution stands. Raises ExecutionError: no answer came."""
        execution = self.store.executions.get(job_id, execution_id)
        unanswered = execution.reason in (Reason.NO_ANSWER, Reason.TIMEOUT, Reason.BLOCKED)
        if unanswered and execution.status_code is None:
            raise ExecutionError(f"{execution_id} failed: {execution.error}")
        status = 200 if execution.has_ended else 202
        return Reply(status, execution.to_json())

    def of_job(self, job_id: str) -> Json:
        """Return the newest executions of a job, and how many match in all."""
        query = current_query()
        filters = self._filters_of(query)
        self.store.jobs.get(job_id)  # Raises NotFound.
        found = self.store.executions.newest(job_id, query["limit"], query["before"], filters)
        return {
            "executions": map(Execution.to_json, found),
            "total": self.store.executions.count(job_id, filters),
        }

    def _filters_of(self, query: Json) -> Json:
        """Return what ExecutionTable.newest() is to filter by. Raises InvalidFields."""
        since, until = query["from"], query["to"]
        if since is not None and until is not None and since >= until:
            raise InvalidFields([("to", "must be later than from")])
        filters = {"status": query["status"], "reason": query["reason"]}
        return filters | {"since": since, "until": until}

    def list_all(self) -> Json:
        """Return the newest executions over all jobs, without what was answered."""
        query = current_query()
        limit = query["limit"]
        newest = self.store.executions.newest(
            None,
            limit + 1,  # One more tells whether there are more.
            query["before"],
            self._filters_of(query),
            EXECUTION_SUMMARY,
        )
        found = list(newest)
        shown = [execution.to_json() for execution in found[:limit]]
        for execution in shown:
            del execution["response"]  # It may be large.
        return {"executions": shown, "has_more": len(found) > limit}

    def get(self, job_id: str, exec_id: str) -> Json:
        """Return one execution with its attempts and what it sends, secrets masked."""
        execution = self.store.executions.get(job_id, exec_id)
        shown = execution.to_json()
        shown["attempt_log"] = json.loads(execution.attempt_log)
        shown["request"] = self._request_of(execution)
        return shown

    def _request_of(self, execution: Execution) -> Json | None:
        """Return what an execution sends; None: its version is lost, or can't be read."""
        try:
            version = self.store.jobs.version(execution.job_id, execution.job_version)
            config = masked_config(version["config"], execution.job_id)["webhook"]
            headers = {}
            unsigned = Webhook(config | {"signing_secret": None})
            for name, value in unsigned.request.headers.items():
                headers[name] = MASK if is_secret_header(name) else value
            if config["signing_secret"] is not None:
                # Each attempt has a time of its own, which is not shown, and the signature with it.
                headers |= {"webhook-id": execution.id, "webhook-signature": MASK}
        except (NotFound, UnusableConfig, AttributeError, LookupError, TypeError, ValueError):
            return None
        return {
            "method": config["method"],
            "url": config["url"],
            "body": config["body"],
            "headers": headers,
        }

    def replay(self, job_id: str, exec_id: str) -> Reply:
        """Send again what an execution sent; with an Idempotency-Key only once."""
        take_no_body("a replay sends what its execution has sent")
        replay_id = new_execution_id(job_id, exec_id)
        change = self.engine.run_queue.trigger
        earlier = self.engine.submit(change, job_id, replay_id, exec_id)
        if earlier is None:
            message = "job %s: %s replays %s for %s"
            ids = about(job_id, replay_id)
            log.info(message, job_id, replay_id, exec_id, current_user(), extra=ids)
        answer = {
            "replay_execution_id": replay_id,
            "original_execution_id": exec_id,
            "message": "Execution replay triggered",
        }
        return Reply(202, answer)

    def cancel(self, job_id: str, exec_id: str) -> Json:
        """End an execution that is pending or running."""
        change = self.engine.run_queue.cancel
        execution = self.engine.submit(change, job_id, exec_id, current_user())
        return execution.to_json()


# --- The server: is it well, what does it do, what comes next ---

PAGE_POLICY = (
    "default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@functools.cache
def page_policy() -> str:
    """Return the Content-Security-Policy of the page: only its own style and script count."""
    digests = {}
    for tag, content in re.findall(r"(?s)<(style|script)>(.*?)</\1>", DASHBOARD_HTML):
        digest = hashlib.sha256(content.encode()).digest()
        digests[tag] = base64.b64encode(digest).decode()
    return PAGE_POLICY.format(**digests)


class ServerHandlers(Handlers):
    """What people and monitors ask about the service as a whole."""

    def __init__(self, engine: Engine, store: Store, settings: Settings, clock: Clock) -> None:
        super().__init__(engine, store, clock)
        self._node_id = settings.cluster.node_id
        self._started_at_mono = clock.monotonic()

    def health(self) -> Json:
        """Say whether the engine makes its turns and the store can write. Raises Unavailable."""
        problem = self._problem()
        if problem:
            raise Unavailable(problem)
        whole_second = self.clock.now() // SECOND * SECOND
        health: Json = {"status": "healthy", "timestamp": format_time(whole_second)}
        problem = self.engine.retention.size_limit.problem
        if problem:
            health["details"] = [problem]
        return health

    def _problem(self) -> str | None:
        """Return a sentence on why the service does not work as it should; None: it does."""
        if self.engine.problem:
            return self.engine.problem
        silence = self.engine.silence()
        if silence > SILENCE_LIMIT:
            return f"a thread has been silent for {silence // SECOND} s"
        return None

    def metrics(self) -> bytes:
        """Return what Prometheus scrapes, in its text format."""
        bottle.response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        return self.engine.metrics.text(self._looked_up()).encode()

    def _looked_up(self) -> dict[str, float | Mapping[str, float]]:
        """Return the metrics that nobody counts: what is true now, and what the store knows."""
        counts = self.store.counts()
        began_at = self.clock.now() - (self.clock.monotonic() - self._started_at_mono)
        return {
            "chronos_build_info": {__version__: 1},
            "chronos_is_leader": 1,
            "chronos_log_events_dropped_total": dropped_events(),
            "chronos_last_pass_age_seconds": self.engine.silence() / SECOND,
            "chronos_jobs": {
                "enabled": counts["enabled"],
                "disabled": counts["jobs_total"] - counts["enabled"],
            },
            "chronos_failing_jobs": counts["failing"],
            "chronos_executions": {
                Status.PENDING: counts["pending"],
                Status.RUNNING: counts["running"],
            },
            "chronos_executions_ended_total": self.store.history.ends_since(0),
            "process_start_time_seconds": began_at // SECOND,
            "process_resident_memory_bytes": resident_memory(),
            "process_open_fds": open_files(),
        }

    def status(self) -> Json:
        """Return what the whole of Chronos is doing: this one node."""
        next_runs = []
        for due in self.store.jobs.soonest(10):
            next_runs.append({"job_id": due.job_id, "next_run": format_time(due.fire_time)})
        uptime = self.clock.monotonic() - self._started_at_mono
        return {
            "is_leader": True,
            "node_id": self._node_id,
            "version": __version__,
            "uptime": uptime // SECOND,
            **self.store.counts(),
            "next_runs": next_runs,
        }

    def preview(self) -> Json:
        """Return the next fire times of a schedule that no job needs to have."""
        query = current_query()
        schedule = parse_schedule(query["schedule"])
        after = query["from"]
        if after is None:
            after = self.clock.now()
        runs = preview(schedule, after, query["timezone"], query["count"])
        return {"next_runs": runs, "warnings": schedule.warnings}

    def upcoming(self) -> Json:
        """Return the next fire times of the 100 jobs that fire soonest, at most 50 of each."""
        until = self.clock.now() + current_query()["hours"] * HOUR
        return {"upcoming": self._upcoming(until), "until": format_time(until)}

    def _upcoming(self, until: int) -> Iterator[Json]:
        for due in self.store.jobs.soonest(100, until):
            try:
                job = self.store.jobs.get(due.job_id)
            except NotFound:
                continue  # It was deleted meanwhile.
            yield self._upcoming_of(job, due.fire_time, until)

    def _upcoming_of(self, job: Job, first: int, until: int) -> Json:
        """Return the fire times of a job from ``first`` on, which is one of them."""
        fire_times = [first]
        # Where its configuration can't be used, nobody knows what comes after the cursor.
        with contextlib.suppress(ValueError, OverflowError):
            schedule = parse_schedule(job.config["schedule"])
            later = schedule.fire_times(first, job.config["timezone"], until)
            fire_times += islice(later, 50)  # One more than is shown.
        return {
            "job_id": job.id,
            "job_name": job.config["name"],
            "fire_times": [format_time(at) for at in fire_times[:50]],
            "has_more": len(fire_times) > 50,
        }

    def stats(self) -> bytes | Json:
        """Return what the dashboard polls, or 304 if it has that; of at most 1,000 jobs."""
        # What is committed after this look makes another entity tag, so nothing is missed.
        changes = self.store.database.commits
        problem = self._problem()
        user = current_user()
        if is_not_modified(f"{self._started_at_mono}-{changes}-{problem}-{user}"):
            return b""
        pages, _total = self.store.jobs.pages({}, 1000, 0)
        active = [execution.to_json() for execution in self.store.executions.in_progress(50)]
        now = self.clock.now()
        return {
            **self.status(),
            "now": format_time(now),
            "user": user,
            "may_write": current_user_may_write(),
            "paused": self.engine.settings.scheduler.paused,
            "problem": problem,
            "active": active,
            "jobs": self._jobs_in_short(pages),
            "last_24h": self.store.history.ends_since(now - DAY),
        }

    def _jobs_in_short(self, pages: Iterable[list[Job]]) -> Iterator[Json]:
        """Yield jobs as the dashboard needs them: less the webhook, but with what is retried."""
        for page in pages:
            retries = self.store.executions.retries_of([job.id for job in page])
            for job in self.jobs_json([page], has_ended=True):
                del job["webhook"]  # It may be large.
                job["retrying"] = self._retrying(retries.get(job["id"]))
                yield job

    def _retrying(self, execution: Execution | None) -> Json | None:
        """Return what /stats shows of a run that waits for its next attempt."""
        if execution is None:
            return None
        return {
            "id": execution.id,
            "attempts": execution.attempts,
            "due_at": format_time(execution.due_at),
            "error": execution.error,
        }

    def page(self) -> bytes:
        """Return the dashboard; it holds no data."""
        policy = page_policy()
        headers = {
            "Cache-Control": "no-cache",  # It is asked for each time, with its entity tag.
            "Content-Security-Policy": policy,
            "Content-Type": "text/html; charset=utf-8",
        }
        bottle.response.headers.update(headers)
        if is_not_modified(policy):
            return b""
        return DASHBOARD_HTML.encode()


# --- The application ---

# Of every answer; a handler may set others.
HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
# What others than programs of the API ask for: a query means nothing there, and is no mistake.
BARE = frozenset({"server.page", "server.health", "server.metrics"})
BOTTLE_ERRORS: dict[int, type[ApiError]] = {
    400: ValidationError,
    404: NotFound,
    405: MethodNotAllowed,
}


class Api:
    """The HTTP interface, as a WSGI application. Its methods run in waitress's threads.

    attribute    written by    guarded by
    sign_in      main          nothing (a reload replaces it; a request takes it once)
    """

    # fmt: off
    ROUTES = (
        ("GET",    "/",                                                     "server.page"),
        ("GET",    "/health",                                               "server.health"),
        ("GET",    "/metrics",                                              "server.metrics"),
        ("GET",    "/api/v1/jobs",                                          "jobs.list_all"),
        ("POST",   "/api/v1/jobs",                                          "jobs.create"),
        ("GET",    "/api/v1/jobs/<job_id>",                                 "jobs.get"),
        ("PUT",    "/api/v1/jobs/<job_id>",                                 "jobs.replace"),
        ("PATCH",  "/api/v1/jobs/<job_id>",                                 "jobs.change"),
        ("DELETE", "/api/v1/jobs/<job_id>",                                 "jobs.delete"),
        ("POST",   "/api/v1/jobs/<job_id>/enable",                          "jobs.enable"),
        ("POST",   "/api/v1/jobs/<job_id>/disable",                         "jobs.disable"),
        ("POST",   "/api/v1/jobs/<job_id>/trigger",                         "executions.trigger"),
        ("GET",    "/api/v1/jobs/<job_id>/executions",                      "executions.of_job"),
        ("GET",    "/api/v1/jobs/<job_id>/executions/<exec_id>",            "executions.get"),
        ("POST",   "/api/v1/jobs/<job_id>/executions/<exec_id>/replay",     "executions.replay"),
        ("POST",   "/api/v1/jobs/<job_id>/executions/<exec_id>/cancel",     "executions.cancel"),
        ("GET",    "/api/v1/jobs/<job_id>/versions",                        "jobs.list_versions"),
        ("GET",    "/api/v1/jobs/<job_id>/versions/<number:re:[0-9]{1,9}>", "jobs.get_version"),
        ("POST",   "/api/v1/jobs/<job_id>/rollback/<number:re:[0-9]{1,9}>", "jobs.roll_back"),
        ("GET",    "/api/v1/executions",                                    "executions.list_all"),
        ("GET",    "/api/v1/schedules/preview",                             "server.preview"),
        ("GET",    "/api/v1/schedules/upcoming",                            "server.upcoming"),
        ("GET",    "/api/v1/cluster/status",                                "server.status"),
        ("GET",    "/api/v1/stats",                                         "server.stats"),
    )
    # fmt: on

    def __init__(self, engine: Engine, store: Store, settings: Settings, clock: Clock) -> None:
        self.engine = engine
        self._store = store
        self._clock = clock
        self.jobs = JobHandlers(engine, store, settings, clock)
        self.executions = ExecutionHandlers(engine, store, settings, clock)
        self.server = ServerHandlers(engine, store, settings, clock)
        self.passwords = Passwords(clock, settings.server.http.threads - FREE_THREADS)
        self.long_answers = LongAnswers(store, clock, self.executions.may_wait)
        self.sign_in: SignIn | None = None  # None: everybody may come in.
        own_names = ["", "localhost", platform.node(), *settings.server.allowed_hosts]
        self._hosts = {name.lower() for name in own_names}
        self._trusted_proxy = settings.server.trusted_proxy
        self.app = bottle.Bottle()
        self.app.default_error_handler = self._bottle_error
        for method, path, name in self.ROUTES:
            group, handler = name.split(".")
            call = getattr(getattr(self, group), handler)
            self.app.route(path, method, functools.partial(self._handle, name, call))

    def _handle(self, name: str, call: Callable[..., Any], **path: str) -> bytes | Iterator[bytes]:
        """Call a handler; put what it returns, or raises, into the envelope.

        ``name`` is the handler's in ROUTES, ``path`` has the parts of the URL that are free.
        """
        bottle.response.headers.update(HEADERS)
        try:
            self._check_path()
            self._check_sender(name)
            if name not in BARE:
                query = read_query(QUERIES.get(name, {}))
                bottle.request.environ["chronos.query"] = query
            self._store.database.bound_reads(self._clock.monotonic)
            return self._answer(call(**path))
        except ApiError as error:
            return self._refuse(error)
        except UnicodeDecodeError:
            return self._refuse(ValidationError("the URL is not UTF-8"))
        except Exception:
            log.exception("%s %s failed", bottle.request.method, bottle.request.path)
            return self._refuse(InternalError("a bug: the server's log has more"))
        finally:
            self._log_request(path)

    def _check_path(self) -> None:
        """Raise UnicodeDecodeError or NotFound for paths that Bottle takes for others."""
        path = bottle.request.environ["bottle.raw_path"]
        path.encode("latin-1").decode()  # Bottle drops what is not UTF-8.
        if path.endswith("\n"):  # The patterns of Bottle's routes let that pass.
            raise NotFound("there is nothing")

    def _answer(self, result: Any) -> bytes | Iterator[bytes]:
        """Return the body for what a handler has returned; bytes are not in the envelope."""
        if isinstance(result, bytes):
            return result
        if isinstance(result, Reply):
            bottle.response.status = result.status
            return self.long_answers.body(result.data)
        return self.long_answers.body(result)

    def _refuse(self, error: ApiError) -> bytes:
        """Return the body for a request that has failed."""
        bottle.response.status = error.status
        return envelope(None, error)

    def _bottle_error(self, error: Any) -> bytes:
        """Answer what never reached a handler: unknown paths and wrong methods."""
        bottle.response.headers.update(HEADERS)
        place = f"{bottle.request.method} {bottle.request.path}"
        kind = BOTTLE_ERRORS.get(error.status_code, InternalError)
        if kind is InternalError:
            log.error("%s failed", place, exc_info=error.exception)
        body = self._refuse(kind(f"{place}: {error.body}"))
        self._log_request({})
        return body

    def _log_request(self, path: dict[str, str]) -> None:
        """Log who asked for what, without the query: it may hold secrets."""
        ids = {}
        if "job_id" in path:
            ids = about(path["job_id"], path.get("exec_id"))
        request = bottle.request
        status = bottle.response.status_code
        address = request.environ.get("REMOTE_ADDR")
        message = "%s %s: %s for %s at %s"
        user = current_user()
        log.debug(message, request.method, request.path, status, user, address, extra=ids)

    # --- Who may ask for what ---

    def _check_sender(self, name: str) -> None:
        """Refuse foreign hosts, foreign pages and unknown users; /health is open to everybody.

        Raises Forbidden, Unauthorized or TooManyRequests.
        """
        if name == "server.health":
            return
        sign_in = self.sign_in
        if name == "server.metrics" and self.engine.settings.metrics.public:
            sign_in = None
        # RFC 9110, 9.2.1, calls these safe: they change nothing.
        reads = bottle.request.method in ("GET", "HEAD", "OPTIONS")
        host = bottle.request.environ.get("HTTP_HOST", "").lower()
        if sign_in is None:
            self._check_host(host)
        if not reads:
            self._check_origin(host)
        if sign_in is not None:
            self._check_user(sign_in, reads)

    def _check_host(self, host: str) -> None:
        """Refuse a name that is not ours: a page elsewhere may have bound it to this address."""
        name = re.sub(":[0-9]*$", "", host)
        is_address = re.fullmatch(r"[0-9.]+|\[[0-9a-f:.]+\]", name)
        if name not in self._hosts and not is_address:
            raise Forbidden(f"the name {host} is not among server.allowed_hosts")

    def _check_origin(self, host: str) -> None:
        """Refuse what a page of another site sends, by Origin (RFC 6454) and Sec-Fetch-Site."""
        environ = bottle.request.environ
        message = "a page of another site must not change anything here"
        site = environ.get("HTTP_SEC_FETCH_SITE", "none")
        if site not in ("none", "same-origin"):
            raise Forbidden(f"{message}: the browser says Sec-Fetch-Site: {site}")
        name = re.sub(":(80|443)$", "", host)  # A scheme's own port may be left out.
        own = (f"http://{name}", f"http://{name}:80", f"https://{name}", f"https://{name}:443")
        origin = environ.get("HTTP_ORIGIN", f"http://{name}").lower()
        if origin not in own:
            raise Forbidden(f"{message}: {self._other_origin(origin, host)}")

    def _other_origin(self, origin: str, host: str) -> str:
        """Say how Origin and Host differ, and what a proxy, if one made them so, has to send."""
        environ = bottle.request.environ
        header = environ["chronos.host_header"]
        peer = environ["chronos.peer"]
        condition = f"({peer} is in server.trusted_proxy)"
        if not environ["chronos.trusts_peer"]:
            wanted = json.dumps([*self._trusted_proxy, peer])
            condition = f"and to be in server.trusted_proxy: {wanted}"
        return (
            f'Origin "{origin}" is not of {header} "{host}". A proxy between them has to pass on '
            "the Host that the browser names (nginx: proxy_set_header Host $http_host;), or to "
            f"send it as X-Forwarded-Host {condition}"
        )

    def _check_user(self, sign_in: SignIn, reads: bool) -> None:
        """Note in the request who sends it. Raises what SignIn.user() raises."""
        environ = bottle.request.environ
        user = sign_in.user(environ.get("HTTP_AUTHORIZATION", ""), reads)
        environ["chronos.user"] = user
        environ["chronos.may_write"] = sign_in.may_write(user)


# ======================================================================================
# 18. Service: store, engine and API together, in one process
# ======================================================================================
#
# start() returns when requests are taken, stop() when all has ended. One data directory has one
# process. Only this section knows waitress and systemd; it decides nothing about jobs.

# --- One process for a data directory ---


def lock_data_dir(directory: Path) -> IO[bytes]:
    """Create the directory, and lock it for as long as the returned file is open.

    Only its owner may look into a new one. Raises StartError: another process has the lock, which
    is named then, or the directory is unusable.
    """
    with contextlib.ExitStack() as opened:
        try:
            _make_private(directory)
            lock = opened.enter_context(_open_lock(directory))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n".encode())
        except BlockingIOError:
            process = lock.read(100).decode(errors="replace").strip()
            message = f"already running on {directory}, process {process}"
            raise StartError(EXIT_RUNNING, message) from None
        except OSError as error:
            message = f"the data directory {directory} is unusable: {error.strerror}"
            raise StartError(EXIT_CONFIG, message) from error
        opened.pop_all()
    return lock


def _make_private(directory: Path) -> None:
    """Create the directory if it is missing, and let only its owner in. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One that holds something may be shared with others on purpose.
    is_empty = not any(directory.iterdir())
    if is_empty:
        with contextlib.suppress(PermissionError):  # It is somebody else's.
            directory.chmod(0o700)


def _open_lock(directory: Path) -> IO[bytes]:
    """Open chronos.lock, which nobody else can open or have laid out. Raises OSError."""
    path = directory / "chronos.lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Without a buffer: on a full disk nothing is left to be written when it is closed.
        lock = open(os.open(path, flags, 0o600), "r+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a symbolic link: remove it") from None
        raise
    about = os.fstat(lock.fileno())
    owners = (os.geteuid(), directory.stat().st_uid)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1 or about.st_uid not in owners:
        lock.close()
        raise OSError(errno.EPERM, f"{path.name} is somebody else's or no file: remove it")
    if about.st_mode & 0o077:  # An earlier release let everybody open it, and so lock us out.
        os.fchmod(lock.fileno(), 0o600)
    return lock


# --- What waitress does not do ---

CLIENT_PATIENCE_S = 30  # A client that takes and sends nothing for so long is gone.


class RequestParser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """waitress's parser, stricter where two readers of a request could disagree about it."""

    def received(self, data: bytes) -> int:
        """Take what has come, and return how many bytes of it belong to this request.

        No body is asked for (100 Continue) where none is to come, or where it is refused.
        """
        taken: int = super().received(data)
        if self.completed:
            self.expect_continue = False
        return taken

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head of a request. Raises ParsingError, which is answered with 400."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            # urllib can't split the URL. This would end waitress's thread.
            raise waitress.parser.ParsingError(str(error)) from error
        # Where two of them tell how long the body is, a proxy may have believed the other one
        # (RFC 9112, 6.1). waitress leaves Transfer-Encoding there only with HTTP/1.0.
        has_both = self.chunked and "CONTENT_LENGTH" in self.headers
        is_ignored = "TRANSFER_ENCODING" in self.headers
        if has_both or is_ignored:
            raise waitress.parser.ParsingError("Transfer-Encoding with Content-Length or HTTP/1.0")


class JsonErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """Answers in the envelope what waitress refuses: what is not HTTP, or too large."""

    def execute(self) -> None:
        """Write the answer, with the status that waitress chose."""
        error = self.request.error
        body = b""
        if getattr(self.request, "command", "") != "HEAD":
            body = envelope(None, self._refusal(error))
        status = f"{error.code} {error.reason}"
        answer = (status, list(HEADERS.items()), body)

        def to_response(*_arguments: Any) -> tuple[str, list[tuple[str, str]], bytes]:
            return answer

        error.to_response = to_response  # The one of waitress makes plain text.
        super().execute()

    def _refusal(self, error: Any) -> ApiError:
        """Return waitress's error as one of ours."""
        if error.code == 413:
            return PayloadTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
        if error.code == 500:
            return InternalError("a bug: the server's log has more")
        return ValidationError(f"{error.reason}: {error.body}")


# What proxies say in headers; waitress has taken out any name with an underscore.
FORWARDED_HEADERS = (
    "HTTP_FORWARDED",
    "HTTP_X_FORWARDED_BY",
    "HTTP_X_FORWARDED_FOR",
    "HTTP_X_FORWARDED_HOST",
    "HTTP_X_FORWARDED_PORT",
    "HTTP_X_FORWARDED_PROTO",
)
MAX_PROXIES = 20  # So many are looked at between the client and us.


class BehindProxies:
    """The API as a WSGI application, told by trusted proxies who asks, and for which host.

    waitress can do that for one address only. What anybody else says is taken out. The API finds
    in the environment who is connected (chronos.peer), whether he is trusted (chronos.trusts_peer)
    and which header names the host (chronos.host_header).

    attribute    written by          guarded by
    _has_told    waitress threads    nothing (two may tell it at the same time)
    """

    def __init__(self, api: Api, trusted: Sequence[str]) -> None:
        """``trusted`` are networks, as server.trusted_proxy has them."""
        self._api = api
        self._trusted = [ipaddress.ip_network(network) for network in trusted]
        self._has_told = False

    def __call__(self, environ: Json, start_response: Any) -> Any:
        """Answer a request."""
        said = {name: environ.pop(name, "") for name in FORWARDED_HEADERS}
        environ["chronos.peer"] = environ["REMOTE_ADDR"]
        environ["chronos.trusts_peer"] = self._is_trusted(environ["REMOTE_ADDR"])
        environ["chronos.host_header"] = "Host"
        if environ["chronos.trusts_peer"]:
            self._believe(said, environ)
        elif said["HTTP_X_FORWARDED_FOR"] and self._api.sign_in is not None:
            self._tell(environ["REMOTE_ADDR"])
        return self._api.app(environ, start_response)

    def _is_trusted(self, address: str) -> bool:
        """Return whether this is the address of a trusted proxy."""
        if not self._trusted:
            return False
        ip = parse_ip(address)
        return any(ip in network for network in self._trusted)

    def _believe(self, said: Mapping[str, str], environ: Json) -> None:
        """Put what a trusted proxy says in the place of what is seen here."""
        environ["REMOTE_ADDR"] = self._client(said["HTTP_X_FORWARDED_FOR"], environ["REMOTE_ADDR"])
        # Of several values the last one is the nearest proxy's own.
        host = said["HTTP_X_FORWARDED_HOST"].rpartition(",")[2].strip()
        if host:
            environ["HTTP_HOST"] = host
            environ["chronos.host_header"] = "X-Forwarded-Host"
        scheme = said["HTTP_X_FORWARDED_PROTO"].rpartition(",")[2].strip().lower()
        if scheme in ("http", "https"):
            environ["wsgi.url_scheme"] = scheme

    def _client(self, forwarded_for: str, proxy: str) -> str:
        """Return who asked the farthest trusted proxy, as far as the trusted ones say it.

        Each proxy adds at the end who asked it; what stands before that, anybody may have made up.
        """
        client = proxy
        for hop in reversed(forwarded_for.rsplit(",", MAX_PROXIES)):
            # Some add the port: 192.0.2.1:4711, or [2001:db8::1]:4711.
            bare = re.sub(r"^\[(.*)\](:[0-9]+)?$|^([0-9.]+):[0-9]+$", r"\1\3", hop.strip())
            try:
                client = str(parse_ip(bare))
            except ValueError:
                break  # A word such as "unknown": we only know the proxy.
            if not self._is_trusted(client):
                break
        return client

    def _tell(self, address: str) -> None:
        """Say, once, what to set where a proxy seems to stand before us and is not known."""
        if self._has_told:
            return
        self._has_told = True
        message = (
            "requests from %s say by X-Forwarded-For who asks, but it is not trusted: if it is "
            "your proxy, name it in server.trusted_proxy; otherwise wrong passwords of one client "
            "make all behind it wait"
        )
        log.warning(message, address)


class HttpServer:
    """waitress, set up as Chronos needs it, in a thread of its own.

    attribute    written by    guarded by
    _channels    http          waitress  (its sockets by descriptor; stop() reads a copy)
    """

    def __init__(self, app: Any, listener: socket.socket, settings: Settings) -> None:
        """``app`` is a WSGI application, ``listener`` is bound and listens already."""
        self._channels: dict[int, Any] = {}
        self._server = waitress.create_server(
            app,
            map=self._channels,
            sockets=[listener],
            threads=settings.server.http.threads,
            connection_limit=1000,
            cleanup_interval=5,  # Seconds between two looks for idle connections.
            outbuf_high_watermark=1 << 20,  # Of an answer no more bytes wait to be taken, and
            outbuf_overflow=1 << 23,  # only such a piece of one is put into a file.
            ident=None,  # No Server header: nobody needs to know what answers.
            asyncore_use_poll=True,  # With select() the process ends at descriptor 1024.
            max_request_body_size=MAX_BODY_BYTES + 1,  # The first size that waitress refuses.
            clear_untrusted_proxy_headers=False,  # BehindProxies does it.
        )
        parts = {"error_task_class": JsonErrorTask, "parser_class": RequestParser}
        self._server.maintenance = self._close_idle
        self._server.channel_class = type("Channel", (self._server.channel_class,), parts)
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)

    def _close_idle(self, now: float) -> None:
        """Close connections that nobody has used for CLIENT_PATIENCE_S. The http thread calls it.

        waitress would spare those to which an answer is on its way: a client that does not
        take it would hold a thread for ever. ``now`` is in seconds, as last_activity is.
        """
        for channel in list(self._server.active_channels.values()):
            is_needed = channel.requests and not channel.total_outbufs_len
            if not is_needed and channel.last_activity < now - CLIENT_PATIENCE_S:
                # Not will_close, which waits until the client takes something.
                channel.handle_close()

    @property
    def url(self) -> str:
        """Where it answers."""
        host = self._server.effective_host
        if ":" in host:
            host = f"[{host}]"  # An IPv6 address, as RFC 3986 has it.
        return f"http://{host}:{self._server.effective_port}"

    def start(self) -> None:
        """Take requests."""
        self._thread.start()

    def refuse_connections(self) -> None:
        """Close the listener; who is connected is still served. The http thread does it."""
        self._call(lambda: wasyncore.dispatcher.close(self._server))

    def stop(self) -> None:
        """Let the last answers go out, for at most 3 s, and close everything."""
        self._server.task_dispatcher.shutdown(cancel_pending=False, timeout=2)
        deadline = time.monotonic() + 1
        for channel in list(self._channels.values()):
            while getattr(channel, "total_outbufs_len", 0) and time.monotonic() < deadline:
                time.sleep(0.01)
        with contextlib.suppress(OSError):  # The http thread may have closed all meanwhile.
            self._call(lambda: wasyncore.close_all(self._channels))
        self._thread.join(timeout=2)

    def _call(self, function: Callable[[], None]) -> None:
        """Let the http thread call a function: waitress's sockets are its own."""
        self._server.trigger.pull_trigger(function)


# --- The service ---


class Service:
    """Everything that runs.

    attribute    written by    guarded by
    settings     main          nothing (no other thread reads it; the engine has its own)
    """

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        """``clock`` is for tests; None: the real one."""
        clock = clock or Clock()
        self.settings = settings
        self.data_dir = Path(settings.cluster.data_dir)
        self.store = Store(self.data_dir / "chronos.db", settings.store.synchronous)
        dispatcher = Dispatcher(clock, settings.dispatcher)
        self.engine = Engine(self.store, dispatcher, settings, clock)
        self.api = Api(self.engine, self.store, settings, clock)
        self._open = contextlib.ExitStack()  # What stop() closes last.
        self._http: HttpServer | None = None  # None: start() did not get so far.

    @property
    def url(self) -> str:
        """Where the API answers; empty before start() has returned."""
        return self._http.url if self._http else ""

    def start(self) -> None:
        """Lock, open, bind, run. Raises StartError or StoreError."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._open.enter_context(lock_data_dir(self.data_dir))
        self._open.callback(self.store.database.close)
        self.store.database.open()
        listener = self._listen()
        self._open.enter_context(listener)
        self.engine.start()
        # Before anybody can come in: it sets who may.
        self.reload(self.settings)
        self.engine.submit(self.engine.begin)
        app = BehindProxies(self.api, self.settings.server.trusted_proxy)
        self._http = HttpServer(app, listener, self.settings)
        self._http.start()

    def _listen(self) -> socket.socket:
        """Return a socket that listens where the settings say. Raises StartError."""
        address = self.settings.server.http.address
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=1024)
        except (OSError, UnicodeError) as error:  # UnicodeError: what is no name of a host.
            reason = getattr(error, "strerror", None) or error
            raise StartError(EXIT_FAILED, f"cannot listen on {address}: {reason}") from error

    def reload(self, settings: Settings) -> None:
        """Apply what needs no restart: jobs, users, alerts, the log's level.

        Raises ChronosError: nothing has changed; or PartlyDeclared.
        """
        applied, needing_restart = self.settings.reloaded(settings)
        check_access(applied)
        self._declare(applied.jobs)
        sign_in = None
        if applied.auth.type == "basic":
            sign_in = SignIn(applied.auth, self.api.passwords)
        self.api.sign_in = sign_in
        self.engine.settings = applied
        self.settings = applied
        log.setLevel(applied.logging.level.upper())
        if needing_restart:
            log.warning("a restart is needed for %s", ", ".join(needing_restart))

    def _has(self, job_id: str, declaration: Declaration) -> bool:
        """Say whether a job is as this declaration made it."""
        with contextlib.suppress(NotFound):
            return self.store.jobs.get(job_id).declared == declaration.digest
        return False

    def _declare(self, jobs: Mapping[str, Declaration]) -> None:
        """Make the declared jobs as they are declared, over as many turns as that takes.

        One that is unchanged, and whose time zone has gone, stays as it was. Raises StoreError,
        PartlyDeclared where some of them were made, or StartError where a new or changed job
        names a time zone that is not there: that is a mistake in the file.
        """
        unusable = {job_id: job for job_id, job in jobs.items() if job.problem}
        check_declarations(job for job_id, job in unusable.items() if not self._has(job_id, job))
        for declaration in unusable.values():
            log.error("%s: the job stays as it was", declaration.problem)
        waiting = self.engine.job_changes.to_declare(jobs)
        total = len(waiting)
        is_done = False  # Also where there is none: a store that can't be written shows it.
        while not is_done:
            try:
                done, changed = self.engine.submit(self.engine.job_changes.declare, waiting)
            except StoreError as error:
                if len(waiting) == total:
                    raise
                left = f"{len(waiting)} of {total} declared jobs wait for the next reload"
                raise PartlyDeclared(f"{left}: {error}") from error
            self._tell_of_declared(changed)
            waiting = waiting[done:]
            is_done = not waiting

    def _tell_of_declared(self, changed: list[Job]) -> None:
        for job in changed:
            state = "disabled: it is not there any more"
            if job.declared:
                state = "as it declares"
            message = "%s: job %s (%s) is %s"
            log.info(message, DECLARED_BY, job.id, job.config["name"], state, extra=about(job.id))

    def signs_of_life(self) -> list[str]:
        """Return what systemd is told: a full disk is no reason to start anew, a hung thread is."""
        state = self.engine.problem or f"listens on {self.url}"
        signs = [f"STATUS={state}"]
        if self.engine.silence() <= SILENCE_LIMIT:
            signs.append("WATCHDOG=1")
        return signs

    def stop(self) -> None:
        """Refuse new connections, let running executions end within the grace, close all."""
        if self._http:
            self._http.refuse_connections()
        self.engine.stop(self.settings.server.shutdown_grace)
        self.store.database.end_reads()
        if self._http:
            self._http.stop()
        self.api.passwords.stop()
        self._open.close()


# --- Memory ---

M_MMAP_THRESHOLD = -3  # Of malloc.h; mallopt(3) tells what it does.
LARGE_BLOCK = 1 << 17  # Bytes; glibc begins with this value, too.


def return_large_blocks() -> None:
    """Let the C library give each large block back when it is freed.

    Without that glibc raises the limit as it goes, and keeps blocks of up to 32 MB for the thread
    that had one: the 16 MB of a password's hash, and long headers and bodies in every thread of
    the API. Other libraries do as they like.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


# --- systemd ---


def tell_systemd(*variables: str) -> None:
    """Send variables such as ``READY=1`` (sd_notify(3)); that nobody takes them is no error."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract namespace (unix(7)).
    # One variable a line, so there can be no line end in any.
    lines = [" ".join(variable.split()) for variable in variables]
    message = "\n".join(lines).encode(errors="replace")
    with (
        contextlib.suppress(OSError),  # Also where no descriptor is left for the socket.
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        sender.settimeout(1)
        sender.sendto(message, address)


class SignsOfLife:
    """Tells systemd every SIGN_OF_LIFE_S that the service lives, in a thread of its own.

    The main thread may be busy: to read a large configuration is no reason to be killed.
    """

    def __init__(self, service: Service) -> None:
        """``service`` has been started."""
        self._service = service
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="signs", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tell nothing more, once this has returned."""
        self._stopped.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.wait(SIGN_OF_LIFE_S):
            tell_systemd(*self._service.signs_of_life())


# ======================================================================================
# 19. Commands: what a person types
# ======================================================================================
#
# A command is a function run_NAME; its docstring is its help. Wrong arguments and wrong settings
# are told in at most three lines on stderr, never by a traceback.


def read_settings(asked: argparse.Namespace) -> Settings:
    """Return the settings that the command line asks for. Raises StartError.

    Sets ``asked.config`` to the file that they come from; None: there is none.
    """
    asked.config = getattr(asked, "config", None)
    beside = Path(__file__).with_name("chronos.yaml")
    if asked.config is None and beside.exists():
        asked.config = beside
    settings = load_settings(asked.config, os.environ)
    if hasattr(asked, "paused"):
        settings = settings.replaced("scheduler.paused", True)
    return settings


# --- serve ---

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
# Some programs mean a rotation of the log by them; the system's default is to end the process.
MEANINGLESS_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


def run_serve(asked: argparse.Namespace) -> None:
    """Run the service until SIGTERM or SIGINT; SIGHUP reloads (this is the default)."""
    settings = read_settings(asked)
    # Threads inherit this, so signals wait until the main thread takes them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in MEANINGLESS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    start_logging(settings.logging.format)
    return_large_blocks()
    _raise_file_limit()
    try:
        _serve(Service(settings), asked)
        log.info("stopped")
    finally:
        logging.shutdown()


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us have."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says that there is no limit, and takes no more than its OPEN_MAX.
    for limit in (hard, 10_240):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def _serve(service: Service, asked: argparse.Namespace) -> None:
    """Start the service, let it run until it is asked to stop, and stop it."""
    signs_of_life = SignsOfLife(service)
    try:
        service.start()
        _greet(service)
        signs_of_life.start()
        _reload_until_stopped(service, asked)
        signs_of_life.stop()
        tell_systemd("STOPPING=1")
        grace = format_duration(service.settings.server.shutdown_grace)
        log.info("stopping: running executions get %s", grace)
    finally:
        service.stop()


def _greet(service: Service) -> None:
    """Say that the service runs: in the log, and to whoever has started it by hand."""
    log.info("Chronos %s listens on %s, data in %s", __version__, service.url, service.data_dir)
    if sys.stdout is not None and sys.stdout.isatty():  # None: it was closed.
        url = re.sub(r"0\.0\.0\.0|\[::\]", "localhost", service.url)
        print(f"Chronos is ready: open {url} in a browser; Ctrl-C stops it")
    if service.settings.scheduler.paused:
        log.warning("paused: nothing fires")


def _reload_until_stopped(service: Service, asked: argparse.Namespace) -> None:
    """Reload at every SIGHUP, until a signal comes that stops."""
    while True:
        tell_systemd("READY=1", *service.signs_of_life())
        if _wait_for_signal() in STOP_SIGNALS:
            return
        tell_systemd("RELOADING=1", f"MONOTONIC_USEC={Clock().monotonic()}")
        _reload(service, asked)


def _wait_for_signal() -> int:
    """Return the one of SIGNALS that has come; of several one that stops."""
    # Not sigtimedwait(): when the process was stopped (SIGSTOP, Ctrl-Z, a debugger) for longer
    # than its time, Python returns a number that nobody has sent.
    while True:
        with contextlib.suppress(InterruptedError):
            came = signal.sigwait(SIGNALS)
            if signal.sigpending() & set(STOP_SIGNALS):
                # SIGHUP has the lower number, so it comes first, however often it is sent.
                came = signal.sigwait(STOP_SIGNALS)
            return came


def _reload(service: Service, asked: argparse.Namespace) -> None:
    """Read the configuration again and apply it; whatever is wrong is only logged."""
    try:
        service.reload(read_settings(asked))
        log.info("the configuration was read again")
    except PartlyDeclared as error:
        log.error("not everything was changed: %s", error)
    except ChronosError as error:
        one_line = "; ".join(str(error).splitlines())
        log.error("nothing was changed: %s", one_line)
    except Exception:  # A bug here must not end a service that works.
        log.exception("the configuration could not be read again")


# --- The other commands ---


def run_check_config(asked: argparse.Namespace) -> None:
    """Say what is wrong in the configuration, or that nothing is."""
    check_declarations(read_settings(asked).jobs.values())
    print("the configuration is correct")


def run_hash_password(_asked: argparse.Namespace) -> None:
    """Print the hash for auth.users of a password: typed in, or one line of the input."""
    if sys.stdin.isatty():
        password = getpass.getpass().encode()
    else:
        password = sys.stdin.buffer.readline()
    password = password.rstrip(b"\r\n")
    if not password:
        raise ChronosError("an empty password is none")
    print(hash_password(password, os.urandom(16)))


def run_backup(asked: argparse.Namespace) -> None:
    """Copy the database to FILE and check the copy; the server may be running."""
    settings = read_settings(asked)
    database = Database(Path(settings.cluster.data_dir, "chronos.db"))
    database.backup(asked.file.absolute())
    print(f"{asked.file} is a consistent copy")


UNIT = """\
[Unit]
Description=Chronos, a cron service that fires HTTP webhooks
After=time-sync.target network.target
[Service]
Type=notify
# -I: neither variables nor directories of a user decide what Python loads.
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
User=chronos
Restart=on-failure
RestartSec=5
# 75: it runs already, 78: configuration or database are wrong. Another start would not help.
RestartPreventExitStatus=75 78
# Only threads that hang stop its signs of life. A large database is checked at the start.
WatchdogSec=60
TimeoutStartSec=15min
TimeoutStopSec={grace}
# At most 1000 workers, 256 threads of the API, 16 look-ups.
TasksMax=1400
# It writes to its data only; the rest is what it never needs, nor who would break in.
ReadWritePaths={data}
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
CapabilityBoundingSet=
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
UMask=0077
[Install]
WantedBy=multi-user.target
"""


def run_systemd_unit(asked: argparse.Namespace) -> None:
    """Print a unit for systemd, with the paths of this program, Python and configuration."""
    settings = read_settings(asked)
    python = _quoted_path(sys.executable)
    program = _quoted_path(__file__)
    command = f"{python} -I {program}"
    if asked.config:
        command += f" --config {_quoted_path(asked.config)}"
    data = _quoted_path(settings.cluster.data_dir)
    # In seconds. After the grace there is still something to write and to close.
    grace = settings.server.shutdown_grace // SECOND + 15
    print(UNIT.format(command=command, data=data, grace=grace), end="")


def _quoted_path(path: str | Path) -> str:
    """Return the absolute path in quotes, as systemd.syntax(7) and its % signs want it."""
    return json.dumps(os.path.abspath(path), ensure_ascii=False).replace("%", "%%")


# --- The command line ---

COMMANDS = (run_serve, run_check_config, run_hash_password, run_backup, run_systemd_unit)


class ArgumentParser(argparse.ArgumentParser):
    """Wrong arguments are told in one line, as all errors are."""

    def error(self, message: str) -> NoReturn:
        """Raise ChronosError; argparse itself would print the usage and exit."""
        raise ChronosError(f"{message} (see --help)")


def command_line() -> ArgumentParser:
    """Return the parser of the command line; it sets ``run`` to the function of the command."""
    # Both options may stand before the command or after it. SUPPRESS: one that is not given sets
    # nothing, so that the command's own parser does not take back what came before it.
    options = ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--config", type=Path, metavar="FILE", help="instead of ./chronos.yaml")
    options.add_argument("--paused", action="store_true", help="start without firing anything")
    parser = ArgumentParser("chronos.py", description="Fires webhooks on time.", parents=[options])
    parser.add_argument("--version", action="version", version=f"chronos {__version__}")
    parser.set_defaults(run=run_serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    for run in COMMANDS:
        name = run.__name__.removeprefix("run_").replace("_", "-")
        command = commands.add_parser(name, help=run.__doc__, parents=[options])
        command.set_defaults(run=run)
        if run is run_backup:
            command.add_argument("file", type=Path, metavar="FILE", help="must not be there yet")
    return parser


def open_standard_files() -> None:
    """Open stdin, stdout and stderr where they are closed: other files would get their numbers."""
    descriptor = 0
    while descriptor <= STDERR:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0 or one of the EXIT constants.

    ``arguments`` are those of the command line without the program; None: the process's own.
    """
    open_standard_files()
    try:
        asked = command_line().parse_args(arguments)
        asked.run(asked)
        return 0
    except SystemExit:  # That is how argparse ends after --help and --version.
        return 0
    except ChronosError as error:
        print(f"chronos: {error}", file=sys.stderr)
        if isinstance(error, StartError):
            return error.exit_status
        return EXIT_FAILED


# ======================================================================================
# 20. Dashboard: the page that GET / answers with; all its data come from the API
# ======================================================================================
#
# It stands last, so that nobody scrolls through it to find main(). It is sent as it stands: no
# value is ever put into it here.

DASHBOARD_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chronos</title>
<link rel="icon" id="icon" href="data:,">
<style>
/* ==================================== style */

:root { color-scheme: light dark; --bg: #fff; --soft: #f6f8fa; --line: #d8dee4; --edge: #868e97; --text: #1f2328;
  --dim: #57606a; --ok: #1a7f37; --fail: #b42318; --run: #0b5fcc; --skip: #6b5900; --red: #fff1ef; --yellow: #fdf6dc; }
@media (prefers-color-scheme: dark) { :root { --bg: #0d1117; --soft: #151b23; --line: #2b323b; --edge: #6b7580;
  --text: #e6edf3; --dim: #8b949e; --ok: #3fb950; --fail: #ff7b72; --run: #79b8ff; --skip: #d4a72c; --red: #2a1618;
  --yellow: #241f10; } }
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
body { max-width: 1240px; margin: 0 auto; padding: 0 20px 70px; background: var(--bg); color: var(--text);
  font: 14px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 22px; font-weight: 650; line-height: 1.3; outline: none; }
h2, summary { font-size: 14px; font-weight: 650; line-height: 24px; }
a { color: var(--run); text-decoration: none; } a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--run); outline-offset: 2px; }
.vh, #skip:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.dim, .hint, dt, th, footer { color: var(--dim); }
.hint, th, footer { font-size: 12.5px; font-weight: 400; }
td .cut { max-width: 300px; } .cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.line { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; }
.grow, nav { flex: 1; min-width: 0; }
code, pre, .mono { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { padding: 9px 12px; background: var(--soft); border-radius: 6px; white-space: pre-wrap; max-height: 420px; overflow: auto; }
header { padding: 12px 0; border-bottom: 1px solid var(--line); }
header svg { width: 18px; height: 18px; color: var(--ok); vertical-align: -3px; margin-right: 8px; fill: none;
  stroke: currentColor; stroke-width: 2; }
.brand { font-size: 16px; font-weight: 650; color: var(--text); }
nav a { display: inline-block; padding: 4px 10px; border-radius: 6px; color: var(--text); font-weight: 550; }
nav [aria-current] { background: var(--soft); box-shadow: inset 0 0 0 1px var(--line); }
main, section, form { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); outline: none; }
main { gap: 20px; padding-top: 20px; }
.stale main { filter: grayscale(1); }
.box { border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.bar { padding: 8px 14px; border-radius: 6px; background: var(--soft); border-left: 4px solid var(--edge); }
.bar.skip { background: var(--yellow); border-color: var(--skip); }
.bar.fail { background: var(--red); border-color: var(--fail); }
.bar.ok { border-color: var(--ok); } body > .bar { margin-top: 12px; }
button, .button, input, select, textarea { font: inherit; color: var(--text); background: var(--bg); padding: 4px 10px;
  border: 1px solid var(--line); border-radius: 6px; min-height: 30px; }
button, .button { font-weight: 550; cursor: pointer; white-space: nowrap; }
button:hover, .button:hover { border-color: var(--edge); text-decoration: none; }
.primary { background: var(--run); border-color: var(--run); color: var(--bg); }
[aria-disabled] { opacity: .55; }
input, select, textarea { border-color: var(--edge); width: 100%; }
.line > input, .line > select { width: auto; min-width: 0; }
[type=checkbox] { width: 24px; min-height: 24px; accent-color: var(--run); }
i { font-style: normal; width: 12px; text-align: center; }
.state { display: inline-flex; gap: 5px; align-items: center; font-weight: 550; white-space: nowrap; color: var(--dim); }
.state.ok { color: var(--ok); } .state.run, .state.wait { color: var(--run); }
.state.fail, .error, .wrong, .danger { color: var(--fail); } .state.skip, .state.miss { color: var(--skip); }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; }
.tiles > * { flex: 1 1 80px; padding: 7px 10px 8px; border: 1px solid var(--line); border-radius: 8px; color: var(--dim); }
.tiles > a { flex: 4 1 240px; min-width: 0; }
.tiles b { display: block; font-size: 20px; font-weight: 600; line-height: 27px; color: var(--text); }
ul, ol { list-style: none; padding: 0; }
#active li { display: grid; grid-template-columns: 92px minmax(100px, 1fr) auto auto; gap: 4px 16px; align-items: center; padding: 5px 0; }
li + li { border-top: 1px solid var(--line); }
.scroll { overflow: auto; max-height: 312px; }
#timeline li { display: grid; grid-template-columns: minmax(80px, 170px) 1fr; gap: 12px; border: 0; align-items: center; }
#timeline svg { width: 100%; height: 24px; fill: var(--run); overflow: hidden;
  background: repeating-linear-gradient(90deg, var(--line) 0 1px, transparent 1px calc(100% / 24)); }
.dense { opacity: .5; } table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 14px 7px 0; vertical-align: top; text-align: left; }
tr { border-bottom: 1px solid var(--line); }
#runs :is(th, td:not(:last-child)) { overflow-wrap: normal; }
#jobs { table-layout: fixed; }
#jobs th:nth-child(1) { width: 104px; } #jobs th:nth-child(3) { width: 196px; } #jobs th:nth-child(4) { width: 24%; }
#jobs th:nth-child(5) { width: 150px; } #jobs th:nth-child(6) { width: 240px; }
#jobs a .cut { font-size: 14px; font-weight: 600; color: var(--text); }
td .line { gap: 6px; flex-wrap: nowrap; }
.strip { display: flex; justify-content: end; width: 180px; overflow: hidden; }
.strip svg { flex: none; width: 180px; height: 24px; }
.S { fill: var(--ok); } .F { fill: var(--fail); } .K { fill: var(--skip); } .C, .R { fill: var(--edge); }
.M { fill: none; stroke: var(--skip); } .rail { stroke: var(--line); }
.two { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 20px; align-items: start; }
dl { display: grid; grid-template-columns: 150px minmax(0, 1fr); gap: 5px 14px; } dd { white-space: pre-wrap; }
dt::first-letter, label::first-letter { text-transform: uppercase; }
ol li { display: flex; flex-wrap: wrap; gap: 0 14px; padding: 4px 0; } ol span:first-child { flex: 1 0 auto; }
form { max-width: 860px; }
.fields { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 14px; margin-top: 10px; }
.field { display: grid; gap: 3px; align-content: start; min-width: 0; }
.dots input { -webkit-text-security: disc; } /* A form with a fourth password field upsets Chromium. */
label { font-weight: 550; }
.area, .pairs, #preview { grid-column: 1 / -1; }
[aria-invalid] { border-color: var(--fail); box-shadow: 0 0 0 1px var(--fail); }
dialog { margin: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--bg); color: var(--text);
  width: min(640px, calc(100vw - 24px)); padding: 20px; }
dialog > * + * { margin-top: 14px; }
#messages { position: fixed; left: 20px; right: 20px; bottom: 14px; display: grid; gap: 8px; justify-items: start;
  pointer-events: none; }
#messages > :not(:empty) { padding: 9px 14px; border-radius: 8px; background: var(--bg); border: 1px solid var(--run);
  box-shadow: 0 4px 16px #0003; pointer-events: auto; }
#messages > #alert { background: var(--red); border-color: var(--fail); }
footer { margin-top: 32px; }
@media (max-width: 940px) {
  body { padding: 0 14px 60px; }
  .two, dl { grid-template-columns: minmax(0, 1fr); }
  dl { gap: 0; } dd { margin-bottom: 8px; }
  thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  table, tbody { display: block; }
  tr { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 10px 0; align-items: center; }
  #jobs :is(th, td) { display: block; padding: 1px 0; width: auto; }
  tr > :last-child, tr > th { flex: 1 1 100%; min-width: 0; }
  td { padding: 1px 0; } td:empty { display: none !important; }
  .strip { width: 90px; }
  #active li { grid-template-columns: minmax(0, 1fr) auto; }
}
</style>
</head>
<body>
<!-- ==================================== markup -->

<a id="skip" href="#/">Skip to the content</a>
<header class="line">
  <a class="brand" href="#/"><svg viewBox="0 0 16 16"><path d="M8 4v4.5l3 1.5M8 1.5a6.5 6.5 0 1 0 .01 0"/></svg>Chronos</a>
  <span id="host" class="dim cut"></span>
  <nav aria-label="Main"><a href="#/">Jobs</a> <a href="#/runs">Runs</a> <a href="#/new" id="new" hidden>New job</a></nav>
</header>
<div id="signed-out" class="bar fail" role="alert" hidden>Signed out. Reload to sign in.</div>
<div id="offline" class="bar fail" hidden><b id="why" role="alert"></b> <span id="rest"></span>
  <button type="button" id="retry">Now</button></div>
<main id="view" tabindex="-1"><h1>Loading …</h1></main>
<noscript>This needs JavaScript.</noscript>
<footer class="line"><span id="foot"></span><span>Keys: / filter, n new job, r refresh. Bars: full green
  succeeded, notched red failed, half skipped, hollow missed, grey cancelled or replaced.</span></footer>
<div id="messages"><div id="alert" role="alert"></div><div id="status" role="status"></div></div>
<dialog id="dialog" aria-labelledby="dialog-title"></dialog>
<script>
// ==================================== script

"use strict";
const $ = id => document.getElementById(id);
const { entries, keys } = Object;
const $$ = selector => document.querySelectorAll(selector);
// The API is beside the page, which a proxy may have below a path. Relative URLs throw where the page is user:password@host.
const API = location.origin + location.pathname.replace(/\/+$/, "") + "/api/v1";
const SVG = "http://www.w3.org/2000/svg", MINE = Intl.DateTimeFormat().resolvedOptions().timeZone;

let stats = null, etag = null, upcoming = null; // what the server said last
let view = null, opening = null; // the page that is shown, and the one that is being loaded
let skew = 0, gone = false; // ms that the server's clock is ahead; signed out
let searched = "";
const busy = new Set(); // keys of buttons whose call runs

// ---- elements: values are text or attributes, never markup

function fill(element, tag, parts) { // parts: nodes, text, lists, attributes; null and false are nothing
  if (tag.includes(".")) element.setAttribute("class", tag.split(".").slice(1).join(" "));
  for (const part of parts.flat(9)) {
    if ((part ?? false) === false) continue;
    if (typeof part !== "object" || part instanceof Node) element.append(part);
    else for (const [name, value] of entries(part)) {
      if (typeof value === "function") element[name] = value;
      else if ((value ?? false) !== false) element.setAttribute(name, value);
    }
  }
  return element;
}
const h = (tag, ...parts) => fill(document.createElement(tag.split(".")[0]), tag, parts);
const s = (tag, ...parts) => fill(document.createElementNS(SVG, tag.split(".")[0]), tag, parts);

// Make the children of a parent like the wanted nodes, and keep what can stay: focus, selection, scrolling survive.
function morph(parent, wanted) {
  const keyed = new Map([...parent.children].map(node => [node.id, node]));
  let next = parent.firstChild;
  for (const want of wanted.flat(9).filter(Boolean)) {
    let have = want.id ? keyed.get(want.id) : next;
    if (have?.nodeName !== want.nodeName || have.id !== want.id) have = want;
    if (have === next) next = next.nextSibling;
    else parent.insertBefore(have, next);
    if (have === want) continue;
    if (have.nodeType === 3) have.data = want.data;
    else {
      for (const { name } of [...have.attributes]) if (!want.hasAttribute(name)) have.removeAttribute(name);
      for (const { name, value } of want.attributes) have.setAttribute(name, value);
      for (const name of ["onclick", "oninput", "onchange", "sig"]) have[name] = want[name];
      morph(have, [...want.childNodes]);
    }
  }
  while (next) [next] = [next.nextSibling, next.remove()];
}

const ICONS = { ok: "\u2713", fail: "\u2717", run: "\u25b6", wait: "\u2026", skip: "\u00bb", miss: "!", idle: "\u2016" };
const KINDS = {
  success: "ok", ok: "ok", failed: "fail", failing: "fail", cancelled: "fail", running: "run", pending: "wait", retrying: "wait",
  skipped: "skip", replaced: "skip", missed: "miss", overdue: "miss", paused: "idle", "never ran": "new",
};
const badge = word => h("span.state." + KINDS[word], { "data-state": word },
  h("i", { "aria-hidden": "true" }, ICONS[KINDS[word]] ?? "-"), word);
const link = (href, ...parts) => h("a", { href }, ...parts);
const cut = (tag, text) => h(tag + ".cut", { title: text }, text);
const jobLink = (id, name) => link(`#/job/${id}`, cut("div", name));
const runLink = (job, id, ...parts) => link(`#/job/${job}/run/${id}`, ...parts);
const plain = (label, onclick, ...parts) => h("button", { type: "button", onclick }, label, ...parts);
const button = (label, key, run, ...parts) => plain(label, () => act(key, run),
  { "data-act": key, "aria-disabled": busy.has(key) && "true" }, ...parts);
const line = (...parts) => h("div.line", ...parts), dim = (...parts) => h("p.dim", ...parts);
const td = (...parts) => h("td", ...parts), heading = (...parts) => h("h1", { tabindex: "-1" }, ...parts);
const box = (id, title, ...parts) => h("section.box", { id }, h("h2", title), ...parts);
const facts = pairs => h("dl", pairs.filter(pair => pair[1]).map(([name, value]) => [h("dt", spoken(name)), h("dd", value)]));
const table = (label, heads, rows) => h("table", { "aria-label": label },
  h("thead", h("tr", heads.map(text => h("th", { scope: "col" }, text)))), h("tbody", rows));
const options = (values, value, first) => values.map(each =>
  h("option", { value: each, selected: each === value && "" }, each || first));
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const spoken = path => path.replace(/^(webhook|retry_policy)\./, "").replaceAll(/[._]/g, " ");
const pairsOf = object => entries(object ?? {}).map(pair => pair.join(": "));

// ---- time: the server's clock; a job's zone, the reader's in the tooltip

const clock = () => Date.now() + skew;
const formats = {};
function words(at, zone) {
  const format = timeZone => new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short",
    year: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23", timeZone });
  try { formats[zone] ??= format(zone); } catch { formats[zone] = format("UTC"); }
  return formats[zone].format(at).replaceAll(",", "").split(" ");
}
const full = (at, zone) => words(at, zone).join(" ");
function stamp(at, zone) { // the time of day, with the day unless it is today, the year unless this one
  const [, day, month, year, time] = words(at, zone), [, d, m, y] = words(clock(), zone);
  return year !== y ? `${day} ${month} ${year} ${time}` : day !== d || month !== m ? `${day} ${month} ${time}` : time;
}
const city = (at, zone) => full(at, zone) === full(at, MINE) ? "" : " " + zone.split("/").pop().replaceAll("_", " ");
function span(ms) {
  const seconds = Math.floor(Math.abs(ms) / 1000), minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (minutes < 60) return minutes ? `${minutes} min` : `${seconds} s`;
  return hours < 10 ? `${hours} h ${minutes % 60} min` : hours < 48 ? `${hours} h` : `${Math.floor(hours / 24)} d`;
}
const took = ns => ns < 1e9 ? `${Math.round(ns / 1e6)} ms` : ns < 6e10 ? `${(ns / 1e9).toFixed(1)} s` : span(ns / 1e6);
function relative(at, mode) {
  const left = at - clock();
  if (mode === "for") return span(left);
  if (mode === "due" && left < 1000) return left > -30000 ? "due now" : `overdue ${span(left)}`;
  return Math.abs(left) < 1000 ? "now" : left > 0 ? `in ${span(left)}` : `${span(left)} ago`;
}
function when(iso, zone, mode) { // a mode (ago, due, for): relative, and it ticks
  if (!iso) return "";
  const at = Date.parse(iso), yours = city(at, zone) && ` · ${full(at, MINE)} ${MINE} (yours)`;
  return h("time", { datetime: iso, title: `${iso} · ${full(at, zone)} ${zone}${yours}`, "data-mode": mode },
    mode ? relative(at, mode) : stamp(at, zone) + city(at, zone));
}
const known = id => stats.jobs.find(job => job.id === id);
const zoneOf = id => known(id)?.timezone ?? MINE;

// ---- the server

async function api(method, path, body, headers) {
  const failed = (status, message, details) => Object.assign(new Error(message), { status, details });
  let answer, json = {};
  try {
    answer = await fetch(API + path, { method, body: body && JSON.stringify(body), signal: AbortSignal.timeout(15000),
      headers: { "X-Chronos-UI": "1", "Content-Type": "application/json", ...headers } });
    if (answer.status !== 304) json = await answer.json();
  } catch {
    throw answer ? failed(answer.status, `answer ${answer.status}`) : failed(0, "Chronos is not reachable");
  }
  gone ||= answer.status === 401;
  if (answer.status === 304) return null;
  if (!json.success) throw failed(answer.status, json.error.message, json.error.details);
  return { data: json.data, etag: answer.headers.get("ETag") };
}
const get = async path => (await api("GET", path)).data, post = async path => (await api("POST", path)).data;

let asks = false, again = false, failures = 0, why = "", failedAt = 0, retryAt = 0, plannedAt = 0, touchedAt = Date.now(), timer;
async function poll() { // one call at a time, and none while nobody looks
  clearTimeout(timer);
  again = asks;
  if (asks || gone || document.hidden) return;
  asks = true;
  try {
    const before = stats, answer = await api("GET", "/stats", null, etag && { "If-None-Match": etag });
    if (answer) {
      ({ data: stats, etag } = answer);
      skew = Date.parse(stats.now) - Date.now();
    }
    if (Date.now() - plannedAt > 60000) [upcoming, plannedAt] = [await get("/schedules/upcoming?hours=24"), Date.now()];
    if (!before) await route();
    else if (answer && view.load) await reload();
    failures = 0;
    draw();
  } catch (error) {
    if (!failures++) failedAt = Date.now();
    why = error.status === 0 ? "Not reachable." : `The server says: ${error.message}.`;
  }
  asks = false;
  const idle = Date.now() - touchedAt, rhythm = stats?.running || idle < 60000 ? 3000 : idle < 600000 ? 10000 : 30000;
  const wait = failures ? Math.min(60, 2 ** failures) * (800 + Math.random() * 400) : again ? 0 : rhythm;
  retryAt = Date.now() + wait;
  timer = setTimeout(poll, wait);
  tick();
}

function tick() { // once a second
  const set = (node, text) => node.textContent === text || (node.textContent = text);
  for (const time of $$("[data-mode]")) set(time, relative(Date.parse(time.dateTime), time.dataset.mode));
  const off = failures > 0 || gone || !stats, bad = stats?.failing || stats?.problem;
  $("signed-out").hidden = !gone;
  $("offline").hidden = !failures || gone;
  document.body.classList.toggle("stale", off);
  set($("why"), why);
  const rest = asks ? "trying" : `trying again in ${span(Math.max(0, retryAt - Date.now()))}`;
  set($("rest"), failures ? `For ${span(Date.now() - failedAt)}, ${rest}.` : "");
  document.title = (stats?.failing ? `(${stats.failing} failed) ` : "") +
    [view?.title?.(), "Chronos", stats?.node_id].filter(Boolean).join(" · ");
  const color = off ? "#6b7580" : bad ? "#c9281c" : "#1a7f37", icon = $("icon").dataset;
  if (icon.color !== color) $("icon").href = "data:image/svg+xml," + encodeURIComponent(`<svg xmlns="${SVG}" viewBox="0 0 4 4">` +
    `<circle cx="2" cy="2" r="2" fill="${icon.color = color}"/><\/svg>`);
}

// ---- what happens on a click

async function act(key, run) { // unless the same still runs
  if (busy.has(key)) return;
  const mark = on => $$(`[data-act="${CSS.escape(key)}"]`).forEach(each => { each.ariaDisabled = on; });
  busy.add(key);
  mark("true");
  const clear = () => $("alert").replaceChildren();
  clear();
  await run().catch(error => $("alert").replaceChildren(error.message, plain("Close", clear)));
  busy.delete(key);
  mark(null);
}
let fading;
function done(...parts) { // say it, and show what has changed
  $("status").replaceChildren(...parts);
  clearTimeout(fading);
  fading = setTimeout(() => $("status").replaceChildren(), 10000);
  plannedAt = 0;
  poll();
}
function ask(title, content, label, typed) { // whether to go on; `typed` must be typed before
  const dialog = $("dialog"), word = h("input", { id: "typed", autocomplete: "off", "aria-label": "Name of the job" });
  return new Promise(resolve => {
    const go = () => !typed || word.value === typed ? dialog.close("go") : word.focus();
    dialog.returnValue = "";
    dialog.replaceChildren();
    fill(dialog, "", [h("h2", { id: "dialog-title" }, title), content, typed && [h("p", "To go on, type its name: ", h("b", typed)), word],
      line(label && plain(label, go, { id: "go", class: "primary" }),
        plain(label ? "Do nothing" : "Close", () => dialog.close(), { autofocus: !typed && "" }))]);
    word.onkeydown = event => { if (event.key === "Enter") go(); };
    dialog.onclose = () => resolve(dialog.returnValue === "go");
    dialog.showModal();
  });
}

const runsOf = id => stats.active.filter(run => run.job_id === id);
const running = id => runsOf(id).some(run => run.status === "running");
async function runNow(job) {
  const text = job.enabled ? `A run of it is not over: the rule is "${job.concurrency}".` : "It is paused: this runs it once.";
  if ((!job.enabled || runsOf(job.id).length) && !await ask(`Run ${job.name} now?`, text, "Run now")) return;
  const run = await post(`/jobs/${job.id}/trigger?wait=0`);
  done(`${job.name} was ${run.status === "skipped" ? `skipped: ${run.error}` : "started"}. `, runLink(job.id, run.id, "Open the run"));
}
async function toggle(job) {
  const { next_run } = await post(`/jobs/${job.id}/${job.enabled ? "disable" : "enable"}`);
  done(`${job.name} is ${next_run ? "on, the next run is " : "paused"}`, when(next_run, job.timezone, "due"), ".");
}
async function cancel(run) {
  const text = "Its request is cut off, and it counts as failed.";
  if (!await ask(`Cancel this run of ${run.job_name}?`, text, "Cancel the run")) return;
  await post(`/jobs/${run.job_id}/executions/${run.id}/cancel`);
  done("The run is cancelled.");
}
async function replay(run) {
  const { replay_execution_id: id } = await post(`/jobs/${run.job_id}/executions/${run.id}/replay`);
  location.hash = `#/job/${run.job_id}/run/${id}`;
  done("The same request is sent again.");
}
async function remove(job, total) {
  const text = total ? `${count(total, "run")} of history go too.` : "It never ran.";
  if (!await ask(`Delete ${job.name}?`, text, "Delete", total ? job.name : "")) return;
  await api("DELETE", `/jobs/${job.id}`);
  location.hash = "#/";
  done(`${job.name} is deleted.`);
}
async function compare(job, { version, config }) {
  const label = stats.may_write && !job.managed_by && `Roll back to version ${version}`;
  if (!await ask(`From version ${job.version} back to ${version}`, differences(job, config), label)) return;
  const { new_version } = await post(`/jobs/${job.id}/rollback/${version}`);
  done(`Version ${new_version} is like version ${version}.`);
}
// ---- what is shown in several places

const SHAPES = { S: "v20h5v-20z", F: "v20h5v-20l-2.5 6z", K: "m0 11v9h5v-9z", M: "m.5.5v19h4v-19z" };
const LETTERS = { S: "succeeded", F: "failed", K: "skipped", M: "missed", C: "cancelled", R: "replaced" };
function strip(letters) { // the newest at the right
  const counts = keys(LETTERS).filter(each => letters.includes(each))
    .map(each => `${letters.split(each).length - 1} ${LETTERS[each]}`);
  const bar = (letter, back) => s("path." + letter, { d: `M${174 - 6 * back} 2${SHAPES[letter] ?? SHAPES.K}` },
    s("title", `${LETTERS[letter]}, ${back ? back + " before the" : "the"} last`));
  return h("div.strip", s("svg", { role: "img", viewBox: "0 0 180 24", "aria-label": letters ? `Last ${count(letters.length, "run")}: ` +
    `${counts.join(", ")}, last ${LETTERS[letters.at(-1)]}` : "No run yet" }, s("path.rail", { d: "M0 23.5h180" }), [...letters].reverse().map(bar)));
}
function wordOf(run) {
  if (["missed", "cancelled", "replaced"].includes(run.reason)) return run.reason;
  return run.status === "pending" && run.attempts ? "retrying" : run.status;
}
function runTable(runs, named) {
  const row = run => h("tr", { id: run.id, "data-state": wordOf(run) },
    td(runLink(run.job_id, run.id, when(run.scheduled_time, zoneOf(run.job_id)))), named && td(jobLink(run.job_id, run.job_name)),
    td(badge(wordOf(run))), td(spoken(run.trigger)), td(run.status_code), td(run.attempts > 0 && count(run.attempts, "attempt")),
    td(run.duration && took(run.duration)), td({ class: run.status === "failed" ? "error" : "dim" }, run.error));
  return table("Runs", ["Time", ...(named ? ["Job"] : []), "State", "By", "Code", "Attempts", "Took", "What happened"], runs.map(row));
}

const CONFIG = ["schedule", "timezone", "webhook", "timeout", "retry_policy", "concurrency", "missed_run_policy", "tags", "name", "description"];
function flatten(value, path = "", into = {}) { // path -> text, of what a person may set
  if (value && typeof value === "object" && !Array.isArray(value)) {
    for (const name of path ? keys(value) : CONFIG) flatten(value[name], path ? `${path}.${name}` : name, into);
  } else if (value !== null) into[path] = typeof value === "string" ? value : JSON.stringify(value);
  return into;
}
function changes(before, after) { // [path, before, after]
  const a = flatten(before), b = flatten(after);
  return keys({ ...a, ...b }).filter(path => a[path] !== b[path]).map(path => [path, a[path], b[path]]);
}
function differences(before, after) {
  const rows = changes(before, after).map(([path, from = "-", to = "-"]) => h("tr", td(spoken(path)), td(from), td(to)));
  return rows.length ? table("Differences", ["Field", "From", "To"], rows) : "No difference (secrets are never shown).";
}

// ---- the start page

function stateOf(job) {
  if (job.enabled && (job.failures || !job.next_run)) return "failing";
  if (running(job.id)) return "running";
  if (job.retrying) return "retrying";
  if (!job.enabled) return "paused";
  if (!stats.paused && Date.parse(job.next_run) < clock() - 30000) return "overdue";
  return !job.strip ? "never ran" : job.strip.endsWith("K") ? "skipped" : "ok";
}
const RANKS = ["paused", "ok", "running", "retrying", "overdue", "failing"];
const nextAttempt = (run, zone) => run && h("div.dim", `attempt ${run.attempts + 1} `, when(run.due_at, zone, "due"));
const rank = job => Math.max(1, RANKS.indexOf(stateOf(job))) - !job.enabled;
const matches = job => [job.name, job.schedule, job.timezone, job.id, stateOf(job), ...pairsOf(job.tags)].join("\n")
  .toLowerCase().includes(searched.toLowerCase());
function actions(job) {
  const named = label => ({ "aria-label": `${label} ${job.name}` }), flip = job.enabled ? "Pause" : "Resume";
  return stats.may_write && [button("Run now", `run:${job.id}`, () => runNow(job), named("Run now")),
    button(flip, `toggle:${job.id}`, () => toggle(job), named(flip)),
    !job.managed_by && link(`#/job/${job.id}/edit`, { class: "button", ...named("Edit") }, "Edit")];
}
function jobRow(job) { // the one that is there, if nothing has changed
  const { id, timezone: zone, last_execution: run } = job, state = stateOf(job), row = $("job-" + id);
  const sig = JSON.stringify([job, state, stats.may_write, stats.paused, words(clock(), zone)[1], [...busy].filter(key => key.endsWith(id))]);
  if (row?.sig === sig) return row;
  return Object.assign(h("tr", { id: "job-" + id, "data-job": id, "data-state": state }, td(badge(state)),
    h("th", { scope: "row" }, jobLink(id, job.name), cut("div.mono", `${job.schedule}  ${zone}`), cut("div", pairsOf(job.tags).join(", "))),
    td(strip(job.strip)), td(run ? [runLink(id, run.id, badge(wordOf(run)), " ", when(run.completed_at, zone, "ago")),
      cut("div.dim", run.error ?? "")] : h("div.dim", "never ran"), nextAttempt(job.retrying, zone)),
    td(job.next_run ? [!stats.paused && when(job.next_run, zone, "due"), h("div.dim", when(job.next_run, zone))]
      : h("span.dim", job.enabled ? "not known" : "paused")), td(line(actions(job)))), { sig });
}
function banners() {
  const bar = (id, kind, ...parts) => h("p.bar." + kind, { id, role: "status" }, parts);
  const failing = stats.jobs.filter(job => stateOf(job) === "failing"), rest = stats.failing - 3;
  const tell = ({ name, failures: n, last_execution: run }) => `${name} (${n > 1 ? `${n} in a row, ` : ""}${run?.error})`;
  return [stats.problem && bar("problem", "fail", h("b", "Chronos is not well: "), stats.problem),
    stats.paused && bar("paused", "skip", h("b", "This server is paused"), " (scheduler.paused): no job starts."),
    failing.length > 0 && bar("failing", "fail", h("b", `${count(stats.failing, "job")} failing: `),
      failing.slice(0, 3).map(tell).join(", "), rest > 0 && `, and ${rest} more`)];
}
function summary() {
  const tile = ([n, label]) => h("div", h("b", n), label);
  const ended = entries(stats.last_24h).filter(([word, n]) => n || word === "success");
  return h("section.tiles", { "aria-label": "Summary" }, [[stats.jobs_total, "jobs"], [stats.failing, "failing"],
    [stats.running, "running"], [stats.jobs_total - stats.enabled, "paused"]].map(tile),
  link("#/runs", line(ended.map(([word, n]) => h("span.state." + KINDS[word], `${n} ${word}`))), "in 24 hours"));
}
function activePanel() {
  const tell = run => run.status === "running" ? [`attempt ${run.attempts}, for `, when(run.started_at, MINE, "for")]
    : run.due_at ? [`attempt ${run.attempts + 1} `, when(run.due_at, MINE, "due")] : "after an older run";
  const item = run => h("li", badge(wordOf(run)), runLink(run.job_id, run.id, cut("div", run.job_name)), h("span.dim", tell(run)),
    stats.may_write && button("Cancel", `cancel:${run.id}`, () => cancel(run), { "aria-label": `Cancel ${run.job_name}` }));
  return stats.active.length > 0 && box("active", `${stats.running} running, ${stats.pending} waiting`, h("ul.scroll", stats.active.map(item)));
}
function timeline() { // a row per job, a mark per fire time, a line per hour from now
  const from = clock(), percent = at => `${(Date.parse(at) - from) / 864000}%`;
  const row = ({ job_id: id, job_name: name, fire_times: times, has_more }) => h("li", jobLink(id, name), s("svg", { role: "img",
    "aria-label": times.slice(0, 9).map(at => stamp(Date.parse(at), MINE)).join(", ") }, has_more
    ? s("rect.dense", { x: percent(times[0]), width: "100%", y: 8, height: 8 })
    : times.map(at => s("rect", { x: percent(at), width: 3, y: 6, height: 12 }, s("title", stamp(Date.parse(at), MINE))))));
  return box("timeline", "Next 24 hours (a line per hour)", upcoming.upcoming.length
    ? h("ul.scroll", upcoming.upcoming.map(row)) : dim("Nothing is scheduled", !stats.enabled && ": all jobs are paused", "."));
}
const jobTable = table("Jobs", ["State", "Job", "Last 30 runs", "Last run", "Next run", "Actions"], []);
jobTable.id = "jobs";
function home() {
  const search = text => {
    searched = $("search").value = text;
    draw();
  };
  return { draw: () => {
    if (!stats.jobs_total) return [heading("Jobs"), banners(), firstJob()];
    const jobs = stats.jobs.filter(matches).sort((a, b) => rank(b) - rank(a)), all = jobs.length === stats.jobs_total;
    morph(jobTable.tBodies[0], jobs.map(jobRow));
    return [heading({ class: "vh" }, "Jobs"), banners(), summary(), activePanel(), timeline(), line({ id: "filter" },
      h("h2.grow", all ? "All jobs" : `${jobs.length} of ${stats.jobs_total} jobs`), h("input", { type: "search", id: "search",
        placeholder: "Name, state or tag", "aria-label": "Filter the jobs", value: searched, oninput: event => search(event.target.value) }),
      !all && plain("Clear filter", () => search(""))), jobs.length ? jobTable : h("p.box", { id: "no-match" }, "No job matches.")];
  } };
}
const firstJob = () => box("empty", "No jobs yet", h("p", "A job calls a URL at the times that its schedule names."),
  stats.may_write && h("p", link("#/new", { class: "button primary" }, "Create the first job")));

// ---- runs; a job with its versions; one run

function history(path, named) { // a page of runs, the newest first
  const limit = named ? 50 : 20, self = { total: 0 };
  let runs = [], before = "", status = "";
  self.load = async () => {
    const { executions, total } = await get(`${path}?limit=${limit}${status && `&status=${status}`}${before && `&before=${before}`}`);
    [runs, self.total] = [executions, status ? self.total : total];
  };
  const go = (...change) => act("page", async () => {
    [before, status] = change;
    await self.load();
    draw();
  });
  self.draw = () => [runs.length ? runTable(runs, named) : dim(status || before ? "No run here." : "No run yet."),
    line(runs.length === limit && plain("Load older", () => go(runs.at(-1).id, status)))];
  self.select = () => h("select", { "aria-label": "Runs with the state", onchange: event => go("", event.target.value) },
    options(["", "pending", "running", "success", "failed", "skipped"], status, "all runs"));
  return self;
}
function allRuns() {
  const runs = history("/executions", true);
  return { title: () => "Runs", load: runs.load, draw: () => [line(heading({ class: "grow" }, "Runs"), runs.select()), runs.draw()] };
}
function jobPage(id) {
  const path = `/jobs/${id}`, runs = history(`${path}/executions`, false);
  let job, versions, next, seen;
  const load = async () => {
    const now = JSON.stringify([known(id), runsOf(id)]);
    if (known(id) && seen === now) return;
    [job, versions] = await Promise.all([get(path), get(`${path}/versions`), runs.load()]);
    const query = new URLSearchParams({ schedule: job.schedule, timezone: job.timezone, count: 4, from: job.next_run });
    next = job.next_run ? [{ utc: job.next_run }, ...(await get(`/schedules/preview?${query}`).catch(() => ({}))).next_runs ?? []] : [];
    seen = now;
  };
  const versionRow = ({ version, config, created_at, created_by }, at) => {
    const changed = at + 1 < versions.length ? changes(versions[at + 1].config, config).map(each => spoken(each[0])).join(", ") : "created";
    return h("tr", { id: "v" + version }, td(`Version ${version}`), td(when(created_at, job.timezone)), td(created_by),
      td(changed || "nothing that is shown"), td(at ? button("Compare", `compare:${version}`, () => compare(job, versions[at])) : "current"));
  };
  const draw = () => {
    const row = known(id) ?? { ...job, failures: 0, strip: "" }, zone = job.timezone, { name, description, ...settings } = flatten(job);
    return [line(h("div.grow", line(heading(job.name), badge(stateOf(row)), nextAttempt(row.retrying, zone)), description && dim(description)),
      stats.may_write && line({ id: "actions" }, actions(job),
    !job.managed_by && button("Delete", `delete:${id}`, () => remove(job, runs.total), { class: "danger" }))),
    job.problem && h("p.bar.fail", job.problem),
    row.failures > 0 && h("p.bar.fail", { id: "failing" }, `Failed ${count(row.failures, "time")} in a row, since `,
      when(row.failing_since, zone), `: ${row.last_execution?.error}`),
    h("div.two", box("settings", "Settings", facts([...entries(settings), ["managed by", job.managed_by], ["version", `${job.version}`],
      ["changed", when(job.updated_at, zone)], ["id", id]])),
    box("next", "Next runs", next.length ? runTimes(next, zone) : dim(job.enabled ? "Not known." : "None: it is paused."))),
    box("runs", line(h("span.grow", "Runs"), strip(row.strip), runs.select()), runs.draw()),
    box("versions", "Versions", versions.length < 2 ? dim("Only version 1.")
      : table("Versions", ["Version", "When", "By", "What changed", ""], versions.map(versionRow)))];
  };
  return { title: () => job.name, load, draw };
}
const runTimes = (runs, zone) => h("ol", runs.map(({ utc, note }) => {
  const at = Date.parse(utc), yours = city(at, zone) && `${full(at, MINE)} yours`;
  return h("li", h("span", full(at, zone)), h("span.dim", when(utc, zone, "due")), h("span.hint", yours, " ", note));
}));

function sentence({ status, attempts, error, status_code: code }) {
  const tries = attempts > 1 ? ` after ${attempts} attempts` : "";
  if (status === "running") return `Attempt ${attempts} is running.`;
  if (status === "pending") return error ? `Waits for its next attempt: ${error}.` : "Waits to be started.";
  if (status === "success") return `Succeeded${tries}: the server answered ${code}.`;
  return `${status === "skipped" ? "Did not run" : "Failed" + tries}: ${error}.`;
}
function curl({ method, url, headers, body }) {
  const quote = text => `'${text.replaceAll("'", "'\\''")}'`, heads = pairsOf(headers).filter(pair => !/^content-length/i.test(pair));
  return [`curl ${method === "HEAD" ? "-I" : "-X " + method} ${quote(url)}`, ...heads.map(pair => `-H ${quote(pair)}`),
    ...(body ? [`--data-raw ${quote(body)}`] : [])].join(" \\\n  ");
}
function runPage(jobId, id) {
  let run;
  const load = async () => { if (!run?.completed_at) run = await get(`/jobs/${jobId}/executions/${id}`); };
  const attempt = each => h("tr", td(`Attempt ${each.number}`), td(when(each.started_at, zoneOf(jobId))), td(took(each.duration)),
    td(each.status_code), td({ class: each.error ? "error" : "dim" }, each.error ?? "succeeded"));
  const draw = () => {
    const zone = zoneOf(jobId), { request, status_code: code, response, replay_of: original } = run, { method, url, headers, body } = request ?? {};
    const late = run.trigger === "schedule" && Date.parse(run.started_at) - Date.parse(run.scheduled_time);
    return [line(h("div.grow", jobLink(jobId, run.job_name), line(heading("Run of ", when(run.scheduled_time, zone)), badge(wordOf(run)))),
      line({ id: "actions" }, stats.may_write && (run.completed_at ? button("Replay", `replay:${id}`, () => replay(run))
        : button("Cancel", `cancel:${id}`, () => cancel(run), { class: "danger" })),
    request && button("Copy as curl", "curl", () => ask("Copy this", h("pre", curl(request)))))),
    h("p.bar." + KINDS[run.status], { id: "sentence" }, sentence(run)),
    h("div.two", box("request", "Request", request ? [h("code", `${method} ${url}`), h("pre", pairsOf(headers).join("\n")),
      body ? h("pre", body) : dim("No body.")] : dim("Lost.")),
      box("facts", "Facts", facts([["scheduled", when(run.scheduled_time, zone)], ["started", when(run.started_at, zone)],
        ["late by", late >= 1000 && span(late)], ["ended", when(run.completed_at, zone)], ["took", run.duration && took(run.duration)],
        ["started by", spoken(run.trigger)], ["replay of", original && runLink(jobId, original, original)],
        ["job version", run.job_version], ["reason", run.reason], ["id", id]]))),
    box("response", ["Response ", code && h("span.dim", code)], response
      ? h("pre", { tabindex: 0, "aria-label": "Response" }, response) : dim(code ? "It was empty." : run.completed_at ? "There was none." : "None yet.")),
    run.attempt_log.length > 0 && box("attempts", "Attempts", table("Attempts", ["Attempt", "Started", "Took", "Code", "What happened"],
      run.attempt_log.map(attempt)))];
  };
  return { title: () => `Run of ${run.job_name}`, load, draw };
}

// ---- the editor: sends back what GET gave, the changed fields replaced

const GROUPS = { // path: kind or choices ("": text), and a hint
  Job: { name: [""], description: ["area"], enabled: ["check", "Its schedule fires."] },
  When: { schedule: ["", "minute hour day month weekday, @hourly, @every 90s"], timezone: ["zone"] },
  Request: {
    "webhook.url": ["", "Keep secrets out of it."],
    "webhook.method": [["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]],
    "webhook.auth.type": [["", "basic", "bearer", "api_key"]], "webhook.auth.username": [""], "webhook.auth.password": ["secret"],
    "webhook.auth.token": ["secret"], "webhook.auth.api_key": ["secret"], "webhook.auth.header": [""],
    "webhook.signing_secret": ["dots", "Standard Webhooks: whsec_…, or an old and a new one"],
    "webhook.headers": ["pairs", "One in a line, as X-Name: value"], "webhook.body": ["area"],
  },
  More: { // what is empty has its default
    timeout: ["", "of all attempts and waits: 5m"], "retry_policy.max_attempts": ["number"],
    "retry_policy.initial_interval": ["", "the first wait: 1s"], "retry_policy.multiplier": ["number", "2: waits of 1, 2, 4 s"],
    "retry_policy.max_interval": [""], "retry_policy.attempt_timeout": [""],
    concurrency: [["forbid", "allow", "replace"], "skip a run that meets an older one, let both run, end the older"],
    missed_run_policy: [["", "ignore", "execute_one", "execute_all"]], "webhook.success_codes": ["codes"],
    "webhook.verify_tls": ["check"], tags: ["pairs", "One in a line, as team: backend"],
  },
};
const AUTHS = { basic: ["username", "password"], bearer: ["token"], api_key: ["api_key", "header"] }, AUTH = "webhook.auth.";
function put(object, path, value) {
  const [first, ...rest] = path.split(".");
  if (rest.length) put(object[first] ??= {}, rest.join("."), value);
  else object[first] = value;
}
const numeric = word => word && !isNaN(word) ? Number(word) : word || null;
function read({ value, checked, dataset: { kind } }) {
  if (kind === "check") return checked;
  if (kind === "number") return numeric(value.trim());
  if (kind === "codes") return value.trim() ? value.trim().split(/[\s,]+/).map(numeric) : null;
  return kind !== "pairs" ? value || null : Object.fromEntries(value.split("\n").filter(each => each.trim()).map(each =>
    /^([^:]*):?(.*)$/.exec(each).slice(1).map(part => part.trim())));
}
function fieldOf([path, [kind, hint]], original) {
  const value = path.split(".").reduce((inner, name) => inner?.[name], original) ?? null, text = kind === "codes" ? (value ?? []).join(", ")
    : kind === "pairs" ? pairsOf(value).join("\n") : value ?? "";
  const common = { id: `f-${path}`, name: path, "aria-describedby": `h-${path} e-${path}`, autocomplete: "off", spellcheck: "false", "data-kind": kind };
  const input = Array.isArray(kind) ? h("select", common, options(kind, text, "none"))
    : kind === "area" || kind === "pairs" ? h("textarea", { rows: 3 }, common, text) : kind === "check"
    ? h("input", common, { type: "checkbox", checked: value !== false && "" }) : h("input", common, { value: text,
      type: kind === "secret" ? "password" : "text", list: kind === "zone" && "zones" });
  const auth = keys(AUTHS).find(each => AUTHS[each].some(name => AUTH + name === path));
  return h("div.field." + kind, { "data-auth": auth }, h("label", { for: input.id }, spoken(path)), input,
    h("p.hint", { id: `h-${path}` }, hint), h("p.wrong", { id: `e-${path}` }));
}
function editor(id) {
  const initial = {}, place = h("div", { id: "preview" });
  let original = { webhook: {}, timezone: "UTC", enabled: true }, version, form;
  const at = path => form.elements[path];
  const load = async () => {
    if (id) ({ data: original, etag: version } = await api("GET", `/jobs/${id}`));
    form = h("form", { novalidate: "", oninput: refresh }, h("div.bar.fail", { id: "form-error", role: "alert", tabindex: "-1", hidden: "" }),
      entries(GROUPS).map(([name, fields]) => h("details.box", { open: name !== "More" && "" }, h("summary", name),
        h("div.fields", entries(fields).map(each => fieldOf(each, original)), name === "When" && place))),
      h("datalist", { id: "zones" }, options(["UTC", ...Intl.supportedValuesOf("timeZone")])),
      line(h("button.primary", { "data-act": "save" }, "Save"), link(id ? `#/job/${id}` : "#/", { class: "button" }, "Cancel")));
    form.onsubmit = event => {
      event.preventDefault();
      act("save", save);
    };
    for (const fields of Object.values(GROUPS)) for (const path in fields) initial[path] = JSON.stringify(read(at(path)));
    refresh({});
    self.load = null; // no poll touches a form
  };
  const refresh = ({ target }) => { // what depends on other fields
    form.querySelectorAll("[data-auth]").forEach(each => { each.hidden = each.dataset.auth !== at(AUTH + "type").value; });
    if (!target || /schedule|timezone/.test(target.name)) preview(place, form.elements, target ? 300 : 0);
  };
  const changed = () => keys(initial).filter(path => JSON.stringify(read(at(path))) !== initial[path]);
  const collect = () => {
    const body = structuredClone(original), paths = changed(), kind = at(AUTH + "type").value;
    for (const path of paths.filter(each => !each.startsWith(AUTH))) put(body, path, read(at(path)));
    if (paths.some(path => path.startsWith(AUTH))) {
      body.webhook.auth = kind ? { type: kind } : null;
      for (const name of AUTHS[kind] ?? []) body.webhook.auth[name] = read(at(AUTH + name));
    }
    if (id && !paths.includes("enabled")) body.enabled = known(id)?.enabled ?? body.enabled;
    return body;
  };
  const show = (text, details = [], ...more) => {
    const bar = $("form-error"), wrong = [], rest = [];
    form.querySelectorAll(".wrong").forEach(each => each.replaceChildren());
    form.querySelectorAll("[aria-invalid]").forEach(each => { each.ariaInvalid = null; });
    for (const { field, message } of details) {
      const path = keys(initial).find(each => field === each || field.startsWith(each + ".")), input = at(path ?? "");
      if (!input) rest.push(`${field} ${message}.`);
      else {
        $("e-" + path).append(`${spoken(field)} ${message}. `);
        input.ariaInvalid = "true";
        input.closest("details").open = true;
        wrong.push(input);
      }
    }
    bar.hidden = !text;
    bar.replaceChildren(wrong.length ? `Not saved: ${count(wrong.length, "field")} to mend. ${rest.join(" ")}` : text, ...more);
    if (text) (wrong[0] ?? bar).focus();
  };
  const save = async () => {
    show("");
    try {
      const { data } = await api(id ? "PUT" : "POST", id ? `/jobs/${id}` : "/jobs", collect(), id && { "If-Match": version });
      location.hash = `#/job/${data.id}`;
      done(`${data.name} is saved as version ${data.version}.`);
    } catch (error) {
      if (error.status !== 412) return show(`Not saved: ${error.message}.`, error.details);
      const newer = await get(`/jobs/${id}`), text = `Not saved: it was changed meanwhile, to version ${newer.version}:`;
      show(text, [], differences(original, newer), "Reload the page to edit that version.");
    }
  };
  const title = () => id ? `Edit ${original.name}` : "New job";
  const self = { title, load, draw: () => [heading(title()), stats.may_write ? form : dim("You may only read here.")] };
  return self;
}
let asked; // the last preview wins
function preview(place, { schedule, timezone }, delay) {
  const mine = asked = {};
  setTimeout(async () => {
    const zone = timezone.value || "UTC", query = new URLSearchParams({ schedule: schedule.value, timezone: zone, count: 5 });
    const parts = mine === asked && schedule.value ? await get(`/schedules/preview?${query}`).then(({ next_runs: runs, warnings }) =>
      [runTimes(runs, zone), ...warnings.map(text => h("p.hint", `Note: ${text}.`))], error => [h("p.error", error.message)]) : [];
    if (mine === asked) place.replaceChildren(...parts);
  }, delay);
}

// ---- routes, keys and the start

async function route() {
  const hash = location.hash || "#/", [page, id, part, run] = hash.slice(2).split("/");
  if (view?.hash === hash) return opening = view;
  let next = opening = !page ? home() : page === "runs" ? allRuns() : page === "new" ? editor() : page !== "job" || !id
    ? lost({ status: 404, message: "There is no such page." }) : part === "edit" ? editor(id) : part === "run" && run ? runPage(id, run) : jobPage(id);
  try { await next.load?.(); } catch (error) {
    if (opening === next) next = opening = lost(error);
  }
  if (opening !== next) return;
  const first = !view;
  view = Object.assign(next, { hash });
  $("view").replaceChildren();
  $("alert").replaceChildren();
  draw();
  scrollTo(0, 0);
  if (!first) $("view").querySelector("h1").focus();
}
const lost = ({ status, message }) => ({ title: () => "Not found", draw: () => [
  heading(status === 404 ? "This job was deleted" : "This cannot be shown"), h("p", message, " ", link("#/", "All jobs"))] });
async function reload() {
  const mine = view;
  try { await mine.load(); } catch (error) {
    if (error.status !== 404) throw error;
    if (mine === view) view = { ...lost(error), hash: mine.hash };
  }
}
function draw() {
  if (!view || !stats) return;
  const focused = document.activeElement;
  morph($("view"), view.draw());
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  $("host").textContent = $("host").title = stats.node_id;
  $("new").hidden = !stats.may_write;
  for (const each of $$("nav a")) each.ariaCurrent = each.hash === view.hash ? "page" : null;
  $("foot").textContent = `Chronos ${stats.version}, signed in as ${stats.user}${stats.may_write ? "" : ", who may only read"}`;
  tick();
}

addEventListener("hashchange", () => stats && route());
addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, textarea, select") || $("dialog").open) return;
  const run = { "/": () => $("search")?.focus(), n: () => stats?.may_write && (location.hash = "#/new"), r: poll }[event.key];
  if (!run) return;
  event.preventDefault();
  run();
});
for (const kind of ["pointermove", "keydown", "scroll"]) addEventListener(kind, () => {
  const idle = Date.now() - touchedAt;
  touchedAt = Date.now();
  if (idle > 60000 && !failures) poll();
}, { passive: true });
document.addEventListener("visibilitychange", poll);
$("skip").onclick = event => {
  event.preventDefault();
  $("view").focus();
};
$("retry").onclick = poll;
setInterval(() => document.hidden || tick(), 1000);
poll();
</script>
</body>
</html>
"""  # noqa: E501


if __name__ == "__main__":
    sys.exit(main())
