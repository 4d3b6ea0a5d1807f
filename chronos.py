#!/usr/bin/env python3
"""Chronos: a cron service in one file. It fires HTTP webhooks on time and keeps their history.

    python chronos.py                     start the service (with chronos.yaml, if it is beside)
    python chronos.py check-config        say what is wrong in chronos.yaml
    python chronos.py --help              every command and option

The file is read from top to bottom; each section leans only on those above it.

     1  Constants        the version, limits with their units
     2  Errors           one tree; each error is a status, a code and a sentence
     3  Time             the clock, RFC 3339, durations such as "1m30s"
     4  Schedules        cron expressions and their fire times, on croniter
     5  Validation       fields declared in tables, checked all at once
     6  Records          jobs and executions, as the rest of the program sees them
     7  Settings         chronos.yaml: every key with its check and its default
     8  Policies         retries, missed runs: pure functions
     9  Store            sqlite3: every SQL statement is here
    10  Dispatch         one HTTP request, its hard limit, the address check
    11  Engine           fire times become executions, executions become requests
    12  API              routes, sign-in, answers
    13  Service          start, stop, signals, the command line

The database is the queue: there is no schedule in memory, so a restart has nothing to rebuild.

    thread      started by    what it does, and what it may touch
    main        the shell     waits for signals
    engine      Engine        the only writer of the database; one pass after another
    worker-N    WorkerPool    one HTTP request at a time; never the database
    watchdog    Dispatcher    cuts attempts off at their limit, closes idle connections
    dns-N       Wire          one name look-up; may hang, so nobody waits for it unbounded
    http        Service       waitress: accepts connections
    waitress-N  waitress      one API call at a time; reads the database, hands writes in
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import fcntl
import functools
import http.client
import io
import ipaddress
import json
import logging
import os
import platform
import queue
import re
import select
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import uuid
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

try:
    import bottle  # type: ignore[import-untyped]
    import requests
    import requests.adapters
    import requests.certs
    import waitress  # type: ignore[import-untyped]
    import yaml  # type: ignore[import-untyped]
    from croniter import CroniterBadDateError, croniter  # type: ignore[import-untyped]
    from waitress import wasyncore
except ImportError as error:
    sys.exit(
        f"chronos: the Python package {error.name!r} is missing; "
        "this installs all it needs: python3 -m pip install -r requirements.txt"
    )

# ======================================================================================
# 1. Constants
# ======================================================================================

__version__ = "0.1.0"

log = logging.getLogger("chronos")

Json = dict[str, Any]
Result = TypeVar("Result")

SECOND = 1_000_000  # instants and durations are integers, in microseconds
MINUTE = 60 * SECOND
HOUR = 3600 * SECOND
DAY = 24 * HOUR

RELEASED_AT = 1_795_392_000 * SECOND  # 2026-11-23: a clock that shows less is wrong
MAX_SCHEDULE_CHARS = 200
MAX_BODY_BYTES = 1 << 20  # of a request to the API
MAX_CONFIG_BYTES = 256 << 10
MAX_FIRES_PER_PASS = 256
MAX_CATCH_UP = 100  # executions of one job that missed_run_policy execute_all makes up for
MAX_LOOKUPS = 16  # names that are being resolved at once
PASS_TARGET = 50_000  # a pass hands the rest over to the next one after so long, in µs
CLOCK_STEP = SECOND  # the wall clock moved by more than this against the monotonic one
CLOCK_FAR_BACK = 3 * HOUR  # by so much the clock must go back before cursors are computed anew
HEARTBEAT = MINUTE
WRITE_PATIENCE_S = 10.0  # how long an API thread waits for the engine to begin its write
WATCHDOG_TICK_S = 0.1
IDLE_CONNECTION = 30 * SECOND
VERSION_CACHE = 2048  # job versions that are kept parsed, with their requests prepared
MASK = "********"

# ======================================================================================
# 2. Errors: each is a status, a stable code and a sentence for people
# ======================================================================================
#
#   ChronosError         can be told to the person who asked
#   ├── ApiError         one of the codes below, and what details there are
#   │   └── StoreError   sqlite could not do it: a full disk, a lock, damage
#   └── StartError       the service can't start: with an exit status

STATUS = {
    "INVALID_JSON": 400,
    "VALIDATION_ERROR": 400,
    "INVALID_TIMEOUT": 400,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "CONFLICT": 409,
    "PAYLOAD_TOO_LARGE": 413,
    "STORE_ERROR": 500,
    "EXECUTION_ERROR": 500,
    "INTERNAL_ERROR": 500,
    "UNAVAILABLE": 503,
}
EXIT_FAILED, EXIT_RUNNING, EXIT_CONFIG = 1, 75, 78  # 75 and 78: sysexits.h


class ChronosError(Exception):
    """Something that can be told to the person who asked."""


class ApiError(ChronosError):
    """A request that fails, by its code (a key of STATUS)."""

    def __init__(self, code: str, message: str, details: list[Json] | None = None) -> None:
        super().__init__(message)
        self.code, self.details = code, details


class StoreError(ApiError):
    """The database could not be read or written."""

    def __init__(self, message: str) -> None:
        super().__init__("STORE_ERROR", message)


class StartError(ChronosError):
    """The start is refused; ``exit_status`` says what kind of reason there is."""

    def __init__(self, exit_status: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Problems(ValueError):
    """What is wrong with the fields of an object: (path, message) for each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{path} {message}".strip() for path, message in problems))
        self.problems = problems

    def to_api_error(self) -> ApiError:
        """Return the error that reports every wrong field at once."""
        only_timeout = [path for path, _message in self.problems] == ["timeout"]
        code = "INVALID_TIMEOUT" if only_timeout else "VALIDATION_ERROR"
        return ApiError(code, str(self), [{"field": f, "message": m} for f, m in self.problems])


# ======================================================================================
# 3. Time: instants are integers, µs since the epoch, UTC; so are durations, in µs
# ======================================================================================

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_DURATION = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{1,9})?(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9.]+)(ns|us|µs|ms|s|m|h)")
_UNITS = {
    "ns": Decimal("0.001"),
    "us": Decimal(1),
    "µs": Decimal(1),
    "ms": Decimal(1000),
    "s": Decimal(SECOND),
    "m": Decimal(MINUTE),
    "h": Decimal(HOUR),
}


class Clock:
    """The only place that looks at the time; tests hand in another one."""

    def now(self) -> int:
        """Return the wall-clock time: µs since the epoch. It may step."""
        return time.time_ns() // 1000

    def monotonic(self) -> int:
        """Return µs since some fixed instant. It never goes back."""
        return time.monotonic_ns() // 1000


def to_datetime(at: int) -> datetime:
    """Return the instant as an aware UTC datetime."""
    return EPOCH + timedelta(microseconds=at)


def to_instant(moment: datetime) -> int:
    """Return an aware datetime as µs since the epoch."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def format_time(at: int | None) -> str | None:
    """Return RFC 3339 in UTC with no more fraction than there is: ``2026-11-23T09:00:00.25Z``."""
    if at is None:
        return None
    text = to_datetime(at).replace(tzinfo=None).isoformat()
    return (text.rstrip("0") if "." in text else text) + "Z"


def parse_time(text: str) -> int:
    """Return the instant of an RFC 3339 date-time. Raises ValueError."""
    if not _RFC_3339.fullmatch(text):
        raise ValueError('must be a time such as "2027-01-31T09:00:00Z" (RFC 3339)')
    try:
        return to_instant(datetime.fromisoformat(text.upper()))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"is not a time: {error}") from error


def parse_duration(text: str) -> int:
    """Return the µs of a duration in Go's form: ``500ms``, ``1h30m``. Raises ValueError."""
    if text == "0":
        return 0
    if not isinstance(text, str) or len(text) > 50 or not _DURATION.fullmatch(text):
        raise ValueError('must be a duration such as "500ms", "30s" or "1h30m"')
    return int(sum(Decimal(n) * _UNITS[unit] for n, unit in _DURATION_PART.findall(text)))


def format_duration(us: int) -> str:
    """Return the shortest form in Go's manner: ``500ms``, ``1.5s``, ``1m30s``, ``5m``, ``1h``."""
    if 0 < us < 1000:
        return f"{us}us"
    if 0 < us < SECOND:
        return f"{us / 1000:g}ms"
    hours, rest = divmod(us, HOUR)
    minutes, rest = divmod(rest, MINUTE)
    seconds = f"{Decimal(rest) / SECOND:f}"
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else ""]
    if rest or not us:
        parts.append(seconds + "s")
    return "".join(parts)


# ======================================================================================
# 4. Schedules: when a job fires; no clock, no I/O
# ======================================================================================
#
# croniter never sees a time zone and never an expression as it was typed. A strict gate turns
# each field into its plain list of numbers, because releases of croniter disagree about all
# else; croniter answers "the next matching wall-clock time"; the zone is applied here.
#
# A schedule is *repeating* if its second, minute or hour begins with "*", else *fixed-time*
# (Vixie cron, Debian). Where the clock goes forward, a fixed-time schedule with times in the gap
# runs once, right after it. Where the clock goes back, it runs in the first pass only, a
# repeating one in both.


class CronField(NamedTuple):
    """One field of a cron expression: its name, its range, and the names of its values."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
CRON_FIELDS = (
    CronField("second", 0, 59),
    CronField("minute", 0, 59),
    CronField("hour", 0, 23),
    CronField("day-of-month", 1, 31),
    CronField("month", 1, 12, _MONTHS),
    CronField("day-of-week", 0, 7, _DAYS),
)
CRON_FULL = [list(range(f.low, f.high + 1)) for f in CRON_FIELDS[:5]] + [list(range(7))]
CRON_ALIASES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_ITEM = re.compile(r"(?:(\*)|([0-9]+|[A-Za-z]+)(?:-([0-9]+|[A-Za-z]+))?)(?:/([0-9]+))?")
_MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ONE_SECOND = timedelta(seconds=1)
_START = EPOCH.replace(year=2000, tzinfo=None)


def _cron_value(text: str, cron_field: CronField) -> int:
    """Return the number that ``text`` stands for in this field. Raises ValueError."""
    if text.lower() in cron_field.names:
        return cron_field.names.index(text.lower()) + cron_field.low
    if not text.isdigit() or not cron_field.low <= int(text) <= cron_field.high:
        names = f" or {cron_field.names[0].upper()}-{cron_field.names[-1].upper()}"
        raise ValueError(
            f"{cron_field.name}: {text!r} is not one of {cron_field.low}-{cron_field.high}"
            + (names if cron_field.names else "")
        )
    return int(text)


def _cron_numbers(text: str, cron_field: CronField) -> list[int]:
    """Return the sorted numbers that one field of an expression names. Raises ValueError."""
    numbers: set[int] = set()
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if not match:
            raise ValueError(f"{cron_field.name}: {item!r} is not *, a, a-b, */n, a/n or a-b/n")
        star, first, last, step = match.groups()
        low = cron_field.low if star else _cron_value(first, cron_field)
        high = cron_field.high if star or (step and not last) else low
        if last:
            high = _cron_value(last, cron_field)
        if high < low:
            raise ValueError(f"{cron_field.name}: the range {item!r} runs backwards")
        if step and int(step) == 0:
            raise ValueError(f"{cron_field.name}: the step of {item!r} is 0")
        numbers.update(range(low, high + 1, int(step or 1)))
    if cron_field.name == "day-of-week":
        numbers = {number % 7 for number in numbers}
    return sorted(numbers)


class Schedule:
    """What a schedule expression means. Immutable for its users; safe in several threads."""

    def next_after(self, after: int, zone: str) -> int | None:
        """Return the first fire time later than ``after``; None: there is none any more."""
        raise NotImplementedError

    def count(self, first: int, last: int, zone: str) -> int:
        """Return how many fire times lie in [first, last]; ``first`` is one of them."""
        raise NotImplementedError

    def latest(self, first: int, last: int, zone: str, most: int) -> list[int]:
        """Return the newest ``most`` fire times of [first, last], in order; ``first`` is one."""
        window = MINUTE
        while True:
            start = max(first, last - window)
            found = deque([start] if start == first else [], maxlen=most)
            at = self.next_after(start, zone)
            while at is not None and at <= last:
                found.append(at)
                at = self.next_after(at, zone)
            if start == first or len(found) == most:
                return list(found)
            window *= 4


class AtSchedule(Schedule):
    """``@at <RFC 3339>``: once."""

    def __init__(self, at: int) -> None:
        self.at = at

    def next_after(self, after: int, zone: str) -> int | None:
        return self.at if self.at > after else None

    def count(self, first: int, last: int, zone: str) -> int:
        return 1


class EverySchedule(Schedule):
    """``@every <duration>``: elapsed time from one fire time to the next, no wall clock."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def next_after(self, after: int, zone: str) -> int | None:
        return after + self.interval

    def count(self, first: int, last: int, zone: str) -> int:
        return (last - first) // self.interval + 1

    def latest(self, first: int, last: int, zone: str, most: int) -> list[int]:
        newest = (last - first) // self.interval
        oldest = max(0, newest - most + 1)
        return [first + n * self.interval for n in range(oldest, newest + 1)]


class CronSchedule(Schedule):
    """A cron expression of five fields, or six with seconds first."""

    def __init__(self, texts: list[str]) -> None:
        """``texts`` are six fields, seconds first. Raises ValueError naming field and item."""
        parsed = zip(texts, CRON_FIELDS, strict=True)
        self.numbers = [_cron_numbers(text, cron_field) for text, cron_field in parsed]
        self.repeating = any(text.startswith("*") for text in texts[:3])
        self.both_days = any(texts[n].startswith("*") for n in (3, 5))
        self._lock = threading.Lock()  # a croniter object keeps state while it answers
        self._croniter = self._make_croniter()
        try:
            self._step(_START)
        except CroniterBadDateError:
            raise ValueError("never fires: its months do not have such a day") from None

    def _make_croniter(self) -> Any:
        seconds, minutes, hours, days, months, weekdays = self.numbers
        day_or = not self.both_days
        if day_or and (len(days) == 31 or len(weekdays) == 7):
            days, weekdays = CRON_FULL[3], CRON_FULL[5]  # either matches, and one always does
        elif day_or and not any(days[0] <= _MONTH_DAYS[month - 1] for month in months):
            days, day_or = CRON_FULL[3], False  # such a day never comes: the weekdays alone
        columns = (minutes, hours, days, months, weekdays, seconds)  # croniter: seconds last
        full = (CRON_FULL[n] for n in (1, 2, 3, 4, 5, 0))
        expression = " ".join(
            "*" if numbers == whole else ",".join(map(str, numbers))
            for numbers, whole in zip(columns, full, strict=True)
        )
        return croniter(expression, _START, ret_type=datetime, day_or=day_or)

    def _step(self, wall: datetime) -> datetime:
        """Return the first matching wall-clock time later than ``wall``, both naive."""
        with self._lock:
            found = self._ask_croniter(wall)
            march = _START.replace(year=found.year, month=3)
            if wall < march <= found:  # croniter 1.3 leaps from a 30 or 31 February into March
                found = self._ask_croniter(march - _ONE_SECOND)
            return found

    def _ask_croniter(self, wall: datetime) -> datetime:
        self._croniter.set_current(wall)
        found: datetime = self._croniter.get_next(datetime)
        return found

    def next_after(self, after: int, zone: str) -> int | None:
        return _next_of(self, after, zone)

    def walk(self, after: datetime, zone: ZoneInfo) -> datetime:
        """Return the first fire time later than ``after``, both aware.

        PEP 495: of a wall time that occurs twice ``fold=0`` is the earlier instant; of one that
        does not exist ``fold=0`` is the later.
        """
        wall = _wall(after, zone)
        early, late = _instants(wall, zone)
        if early < late:  # this wall time occurs twice
            turn = _change_between(early, late, zone)
            if after >= turn and not self.repeating:
                wall = _wall(turn - _ONE_SECOND, zone)
            elif after < turn and self.repeating:
                first_pass = _instants(self._step(wall), zone)[0]
                if first_pass < turn:
                    return first_pass
                wall = _wall(turn, zone) - _ONE_SECOND
        while True:
            wall = self._step(wall)
            early, late = _instants(wall, zone)
            if early > late:  # the wall time does not exist
                turn = _change_between(late, early, zone)
                if not self.repeating and turn > after:
                    return turn
                wall = _wall(turn, zone) - _ONE_SECOND
            elif early > after:
                return early
            elif self.repeating and late > after:
                return late

    def count(self, first: int, last: int, zone: str) -> int:
        info = ZoneInfo(zone)
        walls = (_wall(to_datetime(first - SECOND), info), _wall(to_datetime(last), info))
        total = self._count_walls(*walls)
        if total > 500:  # a year of seconds is 31 million: no walk, and so no look at DST
            return total
        return len(self.latest(first, last, zone, total + 1000))

    def _count_walls(self, after: datetime, until: datetime) -> int:
        """Return how many wall-clock times in (after, until] match, both naive."""
        if until <= after:
            return 0
        per_day = len(self.numbers[0]) * len(self.numbers[1]) * len(self.numbers[2])
        days = (until.date() - after.date()).days
        whole = sum(self._matches_day(after.date() + timedelta(days=n)) for n in range(days))
        total = whole * per_day - self._matches_day(after.date()) * self._count_on_day(after)
        return total + self._matches_day(until.date()) * self._count_on_day(until)

    def _count_on_day(self, wall: datetime) -> int:
        """Return how many times of day match up to ``wall``, itself included."""
        seconds, minutes, hours = self.numbers[:3]
        total = bisect_left(hours, wall.hour) * len(minutes) * len(seconds)
        if wall.hour in hours:
            total += bisect_left(minutes, wall.minute) * len(seconds)
            if wall.minute in minutes:
                total += bisect_right(seconds, wall.second)
        return total

    def _matches_day(self, day: date) -> bool:
        days, months, weekdays = self.numbers[3:]
        matches = (day.day in days, day.isoweekday() % 7 in weekdays)
        return day.month in months and (all if self.both_days else any)(matches)


def _wall(moment: datetime, zone: ZoneInfo) -> datetime:
    """Return what a clock on the wall shows at this instant, naive."""
    return moment.astimezone(zone).replace(tzinfo=None)


def _instants(wall: datetime, zone: ZoneInfo) -> tuple[datetime, datetime]:
    """Return the instants that a naive wall time may mean: with fold 0 and with fold 1."""
    return (
        wall.replace(tzinfo=zone, fold=0).astimezone(UTC),
        wall.replace(tzinfo=zone, fold=1).astimezone(UTC),
    )


def _change_between(before: datetime, after: datetime, zone: ZoneInfo) -> datetime:
    """Return the first instant in (before, after] that has the UTC offset of ``after``."""
    offset = after.astimezone(zone).utcoffset()
    while after - before > _ONE_SECOND:
        middle = before + timedelta(seconds=(after - before) // _ONE_SECOND // 2)
        if middle.astimezone(zone).utcoffset() == offset:
            after = middle
        else:
            before = middle
    return after


@functools.lru_cache(maxsize=4096)
def _next_of(schedule: CronSchedule, after: int, zone: str) -> int:
    """``next_after``, remembered: a thousand jobs with one schedule compute it once."""
    second = to_datetime(after).replace(microsecond=0)
    return to_instant(schedule.walk(second, ZoneInfo(zone)))


@functools.lru_cache(maxsize=4096)
def parse_schedule(text: str) -> Schedule:
    """Return what the expression means. Raises ValueError with a message that quotes it."""
    if len(text) > MAX_SCHEDULE_CHARS:
        raise ValueError(f"must not be longer than {MAX_SCHEDULE_CHARS} characters")
    words = re.split(r"[ \t]+", text.strip(" \t"))
    keyword = words[0].lower()
    if keyword in ("@every", "@at") and len(words) == 2:
        if keyword == "@at":
            return AtSchedule(parse_time(words[1]))
        interval = parse_duration(words[1])
        if interval < SECOND:
            raise ValueError(f"@every {words[1]}: the shortest interval is 1s")
        return EverySchedule(interval)
    if len(words) == 1 and keyword in CRON_ALIASES:
        words = CRON_ALIASES[keyword].split()
    if words[0].startswith("@"):
        known = " ".join([*CRON_ALIASES, "@every <duration>", "@at <time>"])
        raise ValueError(f"{text.strip()!r} is not one of {known}")
    if len(words) not in (5, 6):
        raise ValueError(
            f"{text.strip()!r} has {len(words)} fields; cron has 5 (minute hour day-of-month "
            "month day-of-week) or 6 (with seconds first)"
        )
    return CronSchedule(words if len(words) == 6 else ["0", *words])


@functools.cache
def known_timezones() -> frozenset[str]:
    """Return the names of the zone database: membership is the only safe question to ask it."""
    return frozenset(available_timezones())
