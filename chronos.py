#!/usr/bin/env python3
"""Chronos: a cron service in one file. It fires HTTP webhooks on time and keeps their history.

    python chronos.py                     start the service (with chronos.yaml, if it is beside)
    python chronos.py check-config        say what is wrong in chronos.yaml
    python chronos.py --help              every command and option

The file is read from top to bottom; each section leans only on those above it.

     1 Constants      4 Schedules      7 Settings     10 Dispatch     13 Service, command line
     2 Errors         5 Validation     8 Policies     11 Engine       14 Dashboard
     3 Time           6 Records        9 Store        12 API

The database is the queue: there is no schedule in memory, so a restart has nothing to rebuild.

    thread      started by    what it does, and what it may touch
    main        the shell     waits for signals
    engine      Engine        the only writer of the database; one pass after another
    worker-N    Engine        one HTTP request at a time; never the database
    watchdog    Dispatcher    cuts attempts off at their limit, closes idle connections
    dns-HOST    Dispatcher    one name look-up; may hang, so nobody waits for it unbounded
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
import getpass
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import platform
import queue
import re
import resource
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import uuid
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import islice, product
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

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

# ==== 1. Constants ====================================================================

__version__ = "0.1.0"
log = logging.getLogger("chronos")
Json = dict[str, Any]
Result = TypeVar("Result")
Change = Callable[["Pass"], Any]  # what an API thread wants done; it runs inside a savepoint
SECOND = 1_000_000  # instants and durations are integers, in microseconds
MINUTE, HOUR, DAY = 60 * SECOND, 3600 * SECOND, 86_400 * SECOND

RELEASED_AT = 1_795_392_000 * SECOND  # 2026-11-23: a clock that shows less is wrong
MAX_BODY_BYTES = 1 << 20  # of a request to the API
MAX_HEADERS, MAX_LINE_BYTES, MAX_HEAD_BYTES = 100, 1 << 16, 1 << 18  # of an answer, less its body
MAX_LOOKUPS, LOOKUP_PATIENCE_S = 16, 0.4  # at once; how long one more waits for one to end
PRUNE_ROWS, PRUNE_JOBS = 250, 20  # that a pass looks at; the rows must be more than the 100 spared
PRUNE_INTERVAL = 100_000  # while there is other work, µs
MAX_CATCH_UP, MAX_ACTIVE = 100, 1000  # executions of a job: made up for by execute_all; unended
QUICK_CHECK_BYTES = 100_000_000  # a larger file is checked after an unclean stop only
MAX_FIRES_PER_PASS, PASS_TARGET = 256, 50_000  # after so many, or µs, the next pass goes on
CLOCK_STEP, CLOCK_FAR_BACK = SECOND, 3 * HOUR  # seen as a step; so far back cursors begin anew
WRITE_PATIENCE_S = 10.0  # how long an API thread waits for the engine to begin its write
WATCHDOG_TICK_S, SIGN_OF_LIFE_S = 0.1, 10  # how often limits are looked at, systemd is told
HEARTBEAT, IDLE_CONNECTION, SILENCE_LIMIT = MINUTE, 30 * SECOND, 30 * SECOND  # then it hangs
VERSION_CACHE = 2048  # job versions that are kept parsed, with their requests prepared
MASK = "********"
LETTERS = {  # how an execution ended
    "success": "S", "failed": "F", "cancelled": "C", "replaced": "R", "overlap": "K", "missed": "M",
}  # fmt: skip
LOUD_REASONS = ("timeout", "blocked", "no_answer", "http_status", "interrupted", "missed")
BUCKETS = {  # of histograms: seconds -> the bucket up to there
    float(le): f'_bucket{{le="{le}"}}'
    for le in (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, "+Inf")
}
DECLARED_BY = "chronos.yaml"  # who manages a job that the configuration declares
NOT_HERE = f"the job is declared in {DECLARED_BY}: change it there"
DECLARED_IDS = uuid.UUID("ab032aef-5f06-4566-acdc-8c7694c9303c")  # namespace of their ids
ALERTS_ID = str(uuid.UUID(int=0))  # the built-in job, whose executions are the alerts
ALERT_GATHER, ALERT_JOBS = 10 * SECOND, 50  # told at once; shown: they fit MAX_BODY_BYTES

# ==== 2. Errors: each is a status, a stable code and a sentence for people ============

STATUS = {
    "INVALID_JSON": 400, "VALIDATION_ERROR": 400, "INVALID_TIMEOUT": 400, "UNAUTHORIZED": 401,
    "FORBIDDEN": 403, "NOT_FOUND": 404, "METHOD_NOT_ALLOWED": 405, "CONFLICT": 409,
    "PRECONDITION_FAILED": 412, "PAYLOAD_TOO_LARGE": 413, "TOO_MANY_REQUESTS": 429,
    "STORE_ERROR": 500, "EXECUTION_ERROR": 500, "INTERNAL_ERROR": 500, "UNAVAILABLE": 503,
}  # fmt: skip
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


class Problems(ApiError, ValueError):
    """What is wrong with the fields of an object, all at once: (path, message) for each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        code = "INVALID_TIMEOUT" if [p for p, _m in problems] == ["timeout"] else "VALIDATION_ERROR"
        told = "; ".join(f"{path} {message}".strip() for path, message in problems)
        details = [{"field": path, "message": message} for path, message in problems]
        super().__init__(code, told, details)
        self.problems = problems


# ==== 3. Time: instants are integers, µs since the epoch, UTC; so are durations, in µs ====

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RFC_3339 = re.compile(r"(?ai)\d{4}(-\d\d){2}T(?!24)(\d\d:){2}\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_DURATION_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 0.001, "us": 1, "µs": 1, "ms": 1000, "s": SECOND, "m": MINUTE, "h": HOUR}


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
    with contextlib.suppress(ValueError, OverflowError):
        if _RFC_3339.fullmatch(text):
            return to_instant(datetime.fromisoformat(text.upper()).astimezone(UTC))
    raise ValueError('must be a time such as "2027-01-31T09:00:00Z" (RFC 3339)')


def parse_duration(text: str) -> int:
    """Return the µs of a duration in Go's form: ``500ms``, ``1h30m``. Raises ValueError."""
    text = "0s" if text == "0" else text
    parts = _DURATION_PART.findall(text) if isinstance(text, str) and len(text) <= 50 else []
    if not parts or "".join(n + unit for n, unit in parts) != text:
        raise ValueError('must be a duration such as "500ms", "30s" or "1h30m"')
    return round(sum(float(n) * _UNITS[unit] for n, unit in parts))


def format_duration(us: int) -> str:
    """Return the shortest form in Go's manner: ``500ms``, ``1.5s``, ``1m30s``, ``5m``, ``1h``."""
    if 0 < us < SECOND:
        return f"{us}us" if us < 1000 else f"{us / 1000:g}ms"
    seconds = f"{us % MINUTE / SECOND:.6f}".rstrip("0").rstrip(".")
    parts = ((us // HOUR, "h"), (us % HOUR // MINUTE, "m"), (seconds, "s"))
    return "".join(f"{n}{unit}" for n, unit in parts if n not in (0, "0")) or "0s"


# ==== 4. Schedules: when a job fires; no clock, no I/O ================================
#
# croniter never sees a time zone, a day or an expression as it was typed, because its releases
# disagree about them. A strict gate turns each field into its plain list of numbers; croniter
# finds the next matching time of day in them; days and the zone are applied here.
#
# A schedule is *repeating* if its second, minute or hour begins with "*", else *fixed-time* (Vixie
# cron, Debian). Where the clock goes forward, a fixed-time one with times in the gap runs once,
# right after it. Where it goes back, it runs in the first pass only, a repeating one in both.

CRON_FIELDS = (
    # name, lowest and highest number, and what the numbers from the lowest on are called
    ("second", 0, 59, ""), ("minute", 0, 59, ""), ("hour", 0, 23, ""), ("day-of-month", 1, 31, ""),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"),
    ("day-of-week", 0, 7, "sun mon tue wed thu fri sat"),
)  # fmt: skip
CRON_ALIASES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip
_ITEM = re.compile(r"(?:(\*)|([0-9]+|[A-Za-z]+)(?:-([0-9]+|[A-Za-z]+))?)(?:/([0-9]+))?")
_MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_ONE_SECOND, _ONE_DAY = timedelta(seconds=1), timedelta(days=1)


def _cron_numbers(text: str, field: str, lowest: int, highest: int, names: str) -> list[int]:
    """Return the sorted numbers that one field of an expression names. Raises ValueError."""

    def number(word: str) -> int:
        if word.lower() in names.split():
            return names.split().index(word.lower()) + lowest
        if word.isdigit() and lowest <= int(word) <= highest:
            return int(word)
        raise ValueError(f"{field}: {word!r} is not one of {lowest}-{highest} {names}".rstrip())

    numbers: set[int] = set()
    for item in text.split(","):
        if not (match := _ITEM.fullmatch(item)):
            raise ValueError(f"{field}: {item!r} is not *, a, a-b, */n, a/n or a-b/n")
        star, first, last, step = match.groups()
        low = lowest if star else number(first)
        high = number(last) if last else highest if star or step else low
        if high < low or int(step or 1) == 0:
            raise ValueError(f"{field}: {item!r} runs backwards, or its step is 0")
        numbers.update(range(low, high + 1, int(step or 1)))
    return sorted({n % 7 for n in numbers} if field == "day-of-week" else numbers)


class Schedule:
    """``@at <time>``: once; ``@every <duration>``: elapsed time. Immutable, safe in threads."""

    warnings: tuple[str, ...] = ()  # what people who write such a schedule often do not mean

    def __init__(self, at: int | None = None, interval: int = 0) -> None:
        self.at, self.interval = at, interval

    def next_after(self, after: int, zone: str) -> int | None:
        """Return the first fire time later than ``after``; None: there is none any more."""
        if self.at is None:
            return after + self.interval
        return self.at if self.at > after else None

    def fire_times(self, after: int, zone: str, last: float = math.inf) -> Iterator[int]:
        """Yield the fire times later than ``after``, in order, up to ``last``."""
        while (at := self.next_after(after, zone)) is not None and at <= last:
            yield at
            after = at

    def backlog(self, first: int, last: int, zone: str, most: int) -> tuple[int, list[int]]:
        """Return how many fire times lie in [first, last], and the newest ``most`` (up to 101).

        ``first`` is one of them. Where they are many, the count leaves changes of the clock out.
        """
        if self.at is not None:
            return 1, [first]
        count = (last - first) // self.interval + 1
        return count, [first + n * self.interval for n in range(max(0, count - most), count)]


class CronSchedule(Schedule):
    """A cron expression of five fields, or six with seconds first."""

    def __init__(self, texts: list[str]) -> None:
        """``texts`` are six fields, seconds first. Raises ValueError naming field and item."""
        super().__init__()
        self.numbers = [_cron_numbers(text, *CRON_FIELDS[n]) for n, text in enumerate(texts)]
        self.repeating = any(text.startswith("*") for text in texts[:3])
        self.both_days = any(texts[n].startswith("*") for n in (3, 5))
        days, months, _weekdays = self.numbers[3:]
        if self.both_days and all(days[0] > _MONTH_DAYS[month - 1] for month in months):
            raise ValueError("never fires: its months do not have such a day")
        seconds, minutes, hours = (",".join(map(str, numbers)) for numbers in self.numbers[:3])
        times = f"{minutes} {hours} * * * {seconds}"  # croniter: seconds last
        self._croniter = croniter(times, EPOCH.replace(tzinfo=None), ret_type=datetime)
        self._lock = threading.Lock()  # a croniter object keeps state while it answers
        every_second, either = len(self.numbers[0]) == 60, not self.both_days
        self.warnings = ("it fires every second of its minutes",) * every_second
        self.warnings += ("day-of-month and day-of-week are both set: either matches",) * either

    def step(self, wall: datetime) -> datetime:
        """Return the first matching wall-clock time later than ``wall``, both naive."""
        with self._lock:
            self._croniter.set_current(wall)
            found: datetime = self._croniter.get_next(datetime)
        seconds, minutes, hours = self.numbers[:3]
        while not self._matches_day(found):
            found = found.replace(hour=hours[0], minute=minutes[0], second=seconds[0]) + _ONE_DAY
        return found

    def _matches_day(self, day: date) -> bool:
        days, months, weekdays = self.numbers[3:]
        matches = (day.day in days, day.isoweekday() % 7 in weekdays)
        return day.month in months and (all if self.both_days else any)(matches)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a thousand jobs compute it once
    def next_after(self, after: int, zone: str) -> int:
        info, begin = ZoneInfo(zone), after // SECOND * SECOND
        wall = _wall(begin, info)
        early, late = _instants(wall, info)
        if self.repeating and begin == early < late:  # the first pass of an hour that comes twice
            turn = _change_between(early, late, info)
            if _instants(self.step(wall), info)[0] >= turn:  # it is finished: walk the hour again
                wall = _wall(turn, info) - _ONE_SECOND
        while True:
            wall = self.step(wall)
            early, late = _instants(wall, info)
            if early > late:  # the wall time does not exist
                turn = _change_between(late, early, info)
                if not self.repeating and turn > begin:
                    return turn
                wall = _wall(turn, info) - _ONE_SECOND
            elif early > begin:
                return early
            elif self.repeating and late > begin:
                return late

    def backlog(self, first: int, last: int, zone: str, most: int) -> tuple[int, list[int]]:
        def since(after: int, most: int | None) -> list[int]:
            return list(islice(self.fire_times(after, zone, last), most))

        begin, end = (_wall(at, ZoneInfo(zone)) for at in (first, last))
        times = list(product(*self.numbers[2::-1]))  # hour, minute, second
        days = (begin + _ONE_DAY * n for n in range((end.date() - begin.date()).days))
        total = len(times) * sum(map(self._matches_day, days))
        total += bisect_right(times, end.timetuple()[3:6]) * self._matches_day(end)
        total -= bisect_left(times, begin.timetuple()[3:6])
        instants = range(first, last, SECOND)
        few = total > 500 and bisect_left(instants, True, key=lambda t: len(since(t, most)) < most)
        if few:  # a year of seconds is 31 million: no walk then, but a search for the newest
            return total, since(instants[few - 1], most)
        found = [first, *since(first, None)]
        return len(found), found[-most:]


def _wall(at: int, zone: ZoneInfo) -> datetime:
    """Return what a clock on the wall shows at this instant, naive."""
    return to_datetime(at).astimezone(zone).replace(tzinfo=None)


def _instants(wall: datetime, zone: ZoneInfo) -> tuple[int, int]:
    """Return both meanings of a naive time: early < late if it is twice, > if never (PEP 495)."""
    early, late = (to_instant(wall.replace(tzinfo=zone, fold=fold)) for fold in (0, 1))
    return early, late


def _change_between(before: int, after: int, zone: ZoneInfo) -> int:
    """Return the first instant in (before, after] that has the UTC offset of ``after``."""

    def offset(at: int) -> timedelta | None:
        return to_datetime(at).astimezone(zone).utcoffset()

    instants = range(before, after + SECOND, SECOND)
    return instants[bisect_left(instants, True, key=lambda at: offset(at) == offset(after))]


@functools.lru_cache(maxsize=4096)
def parse_schedule(text: str) -> Schedule:
    """Return what the expression means. Raises ValueError with a message that quotes it."""
    words = re.split(r"[ \t]+", text.strip(" \t"))
    keyword = words[0].lower() if text.isascii() else words[0]
    if keyword in ("@every", "@at") and len(words) == 2:
        try:
            if keyword == "@at":
                return Schedule(at=parse_time(words[1]))
            interval = parse_duration(words[1])
            if not SECOND <= interval <= 3650 * DAY:
                raise ValueError("the shortest interval is 1s, the longest 10 years")
            return Schedule(interval=interval)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    if len(words) == 1 and keyword in CRON_ALIASES:
        words = CRON_ALIASES[keyword].split()
    if len(words) not in (5, 6):
        known = " ".join([*CRON_ALIASES, "@every <duration>", "@at <time>"])
        raise ValueError(f"{text!r} is neither 5 fields, nor 6 with seconds first, nor of {known}")
    return CronSchedule(words if len(words) == 6 else ["0", *words])


def preview(schedule: Schedule, after: int, zone: str, count: int) -> Iterator[Json]:
    """Yield the next fire times: ``utc``, ``local``, and a ``note`` at a change of the clock."""
    with contextlib.suppress(OverflowError, ValueError):  # where dates end
        for at in islice(schedule.fire_times(after, zone), count):
            local, note = to_datetime(at).astimezone(ZoneInfo(zone)), None
            if isinstance(schedule, CronSchedule):
                wall = local.replace(tzinfo=None)
                early, late = _instants(wall, ZoneInfo(zone))
                if schedule.step(wall - _ONE_SECOND) != wall:
                    note = "the clock goes forward: a time that does not exist runs now"
                elif early < late:
                    passes = "both run" if schedule.repeating else "only the first runs"
                    note = f"the clock goes back: this hour comes twice, {passes}"
            yield {"utc": format_time(at), "local": local.isoformat(), "note": note}


# ==== 5. Validation: an object is a table of fields; every wrong field is reported at once ====
#
# A check takes a value as it came from JSON or YAML and returns it in its normal form, or raises
# ValueError with a sentence that goes on after the field's name ("timeout must be …").

Check = Callable[[Any], Any]
REQUIRED: Any = object()


class Field(NamedTuple):
    """A field: its check, and what it is where it is left out or null."""

    check: Check
    default: Any = REQUIRED


def validate(table: dict[str, Field], data: Any, ignored: frozenset[str] = frozenset()) -> Json:
    """Return ``data`` in its normal form, defaults filled in. Raises Problems with all of them."""
    if not isinstance(data, dict):
        raise ValueError("must be an object")
    clean: Json = {}
    problems: list[tuple[str, str]] = []
    for name in sorted(data.keys() - table.keys() - ignored)[:20]:
        hint = [f" (did you mean {near!r}?)" for near in difflib.get_close_matches(name, table, 1)]
        problems.append((name[:100], "is not a known name" + "".join(hint)))
    for name, (check, default) in table.items():
        value = data.get(name)
        try:
            if value is None and default is REQUIRED:
                raise ValueError("is required")
            clean[name] = default if value is None else check(value)
        except Problems as inner:
            problems += [(f"{name}.{path}", message) for path, message in inner.problems]
        except ValueError as error:
            problems.append((name, str(error)))
    if problems:
        raise Problems(problems)
    return clean


def rule(holds: Callable[[Any], object], problem: str) -> Check:
    """A check that leaves the value as it is."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(problem)
        return value

    return check


def matching(pattern: str, problem: str) -> Check:
    """A string that matches as a whole."""
    form = re.compile(pattern)
    return rule(lambda value: isinstance(value, str) and form.fullmatch(value), problem)


def text(most: int, least: int = 1, lines: bool = False) -> Check:
    """A string without control characters; ``lines`` allows tabs and line ends."""
    control = r"\x00-\x08\x0b\x0c\x0e-\x1f" if lines else r"\x00-\x1f"
    some = r"(?s:(?=.*\S))" if least else ""
    problem = f"must be a string of {least} to {most} characters, no control characters among them"
    return matching(rf"{some}[^{control}\x7f-\x9f\ud800-\udfff]{{{least},{most}}}", problem)


def number(low: float, high: float, whole: bool = True) -> Check:
    """A number in [low, high]."""
    kinds = (int,) if whole else (int, float)
    problem = f"must be a {'whole ' * whole}number from {low} to {high}"
    return rule(lambda value: type(value) in kinds and low <= value <= high, problem)


def one_of(*words: str) -> Check:
    """One of these words."""
    return rule(lambda value: value in list(words), f"must be one of {', '.join(words)}")


def duration(low: str, high: str) -> Check:
    """A duration in [low, high], kept as text in its shortest form."""
    bounds = range(parse_duration(low), parse_duration(high) + 1)
    bounded = rule(lambda us: us in bounds, f"must be from {low} to {high}")
    return lambda value: format_duration(bounded(parse_duration(value)))


def list_of(item: Check, most: int, least: int = 0) -> Check:
    """A list of values that each pass ``item``."""
    problem = f"must be a list of {least} to {most} values"
    sized = rule(lambda value: isinstance(value, list) and least <= len(value) <= most, problem)
    return lambda value: [item(entry) for entry in sized(value)]


def mapping(names: Check, values: Check, most: int) -> Check:
    """An object of free names, none of them empty."""
    problem = f"must be an object with at most {most} names"
    sized = rule(lambda data: isinstance(data, dict) and len(data) <= most, problem)
    entry = lambda name, value: names(name) and values(value)  # noqa: E731
    return lambda data: validate({n: Field(functools.partial(entry, n)) for n in sized(data)}, data)


def query_number(low: int, high: int) -> Check:
    """A whole number written out; what is over ``high`` means ``high``."""
    problem = f"must be a whole number from {low} to {high}"
    whole = rule(lambda value: re.fullmatch("[0-9]{1,18}", value) and int(value) >= low, problem)
    return lambda value: min(int(whole(value)), high)


boolean = rule(lambda value: isinstance(value, bool), "must be true or false")
_no_constant = rule(lambda _name: False, "NaN and Infinity are no numbers in JSON")
_user_name = rule(lambda name: ":" not in text(256)(name), "must not contain a colon")
_zones = functools.cache(lambda: [*available_timezones()])
_timezone = rule(lambda name: name in _zones(), "must be an IANA time zone such as Europe/Madrid")
_header_name = matching(
    r"(?!(?i:content-length|transfer-encoding|connection|upgrade|te|trailer|expect|keep-alive"
    r"|proxy-.*|x-chronos-.*)\Z)[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}",  # a token of RFC 9110, 5.6.2
    "must be the name of an HTTP header, and of none that only Chronos sets",
)
_printable = matching(
    r"(?:[!-~\xa0-\xff](?:[\t -~\xa0-\xff]{0,8190}[!-~\xa0-\xff])?)?",
    "must be at most 8192 printable Latin-1 characters, no blanks around them",
)
_masked = f"is {MASK}, which only stands for a secret of the same URL: give the secret itself"
_header_value = rule(lambda value: _printable(value) != MASK, _masked)
_password = rule(lambda value: text(1024, least=0)(value) != MASK, _masked)
is_secret_header = re.compile("(?i)authorization|cookie|token|secret|password|api-key").search


def _schedule(value: Any, now: int = 0) -> str:
    expression: str = text(200, lines=True)(value).strip(" \t")
    schedule = parse_schedule(expression)
    if schedule.at is not None and schedule.at <= now:
        raise ValueError("is in the past")
    return expression


def _url(value: Any) -> str:
    url: str = text(2048)(value)
    try:
        parts = urlsplit(url)
        proper = re.match(r"(?i)https?://[^\s\\]*\Z", url) and "@" not in parts.netloc
        if not proper or not parts.hostname or parts.port == 0:
            raise ValueError("it must be http(s)://, a host, no user (see webhook.auth), no blanks")
        requests.Request("GET", url).prepare()
    except (requests.RequestException, ValueError) as error:
        raise ValueError(f"is not a URL that can be called: {error}") from error
    return url


def _auth(value: Any) -> Json:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in AUTH_FIELDS:
        raise Problems([("type", f"must be one of {', '.join(AUTH_FIELDS)}")])
    return validate({"type": Field(one_of(kind)), **AUTH_FIELDS[kind]}, value)


# fmt: off
AUTH_FIELDS: dict[str, dict[str, Field]] = {
    "basic":   {"username":    Field(_user_name),
                "password":    Field(_password)},
    "bearer":  {"token":       Field(_header_value)},
    "api_key": {"api_key":     Field(_header_value),
                "header":      Field(_header_name,                          "X-API-Key")},
}
WEBHOOK_FIELDS: dict[str, Field] = {
    "url":               Field(_url),
    "method":            Field(one_of("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"),
                                                                            "GET"),
    "headers":           Field(mapping(_header_name, _header_value, 50),    {}),
    "body":              Field(text(MAX_BODY_BYTES, least=0, lines=True),   None),
    "auth":              Field(_auth,                                       None),
    "success_codes":     Field(list_of(number(100, 599), 100, least=1),     None),
    "verify_tls":        Field(boolean,                                     True),
}
RETRY_FIELDS: dict[str, Field] = {
    "max_attempts":      Field(number(1, 100),                              3),
    "initial_interval":  Field(duration("1ms", "24h"),                      "1s"),
    "max_interval":      Field(duration("1ms", "24h"),                      "1m"),
    "multiplier":        Field(number(1, 100, whole=False),                 2.0),
    "attempt_timeout":   Field(duration("100ms", "24h"),                    None),
}
ALERT_FIELDS = WEBHOOK_FIELDS | {"method": WEBHOOK_FIELDS["method"]._replace(default="POST")}
del ALERT_FIELDS["body"]  # Chronos writes it
EXECUTION_STATUSES = ("pending", "running", "success", "failed", "skipped")
MISSED_RUN_POLICIES = ("ignore", "execute_one", "execute_all")
JOB_FIELDS: dict[str, Field] = {
    "name":              Field(text(200)),
    "description":       Field(text(2000, least=0, lines=True),             None),
    "schedule":          Field(_schedule),
    "timezone":          Field(_timezone,                                   "UTC"),
    "webhook":           Field(functools.partial(validate, WEBHOOK_FIELDS)),
    "retry_policy":      Field(functools.partial(validate, RETRY_FIELDS),   {}),
    "timeout":           Field(duration("100ms", "24h"),                    "5m"),
    "concurrency":       Field(one_of("allow", "forbid", "replace"),        "forbid"),
    "missed_run_policy": Field(one_of(*MISSED_RUN_POLICIES),                None),
    "tags":              Field(mapping(text(100), text(200, least=0), 50),  {}),
    "enabled":           Field(boolean,                                     False),
}
SERVER_FIELDS = frozenset({  # what an answer adds to a job: accepted back, and ignored
    "id", "version", "created_at", "updated_at", "next_run", "last_execution", "managed_by",
    "strip", "failures", "failing_since",
})
# fmt: on


def validate_job(data: Any, retry: Json, now: int, stored: Json | None = None) -> tuple[Json, bool]:
    """Return a job's configuration in its normal form, and whether it is to be enabled.

    ``retry`` completes retry_policy. Masked secrets are those of ``stored``, which is replaced, and
    an instant that it has may be past. Raises Problems.
    """
    if not isinstance(data, dict):
        raise Problems([("", "the body must be a JSON object")])
    if stored:
        data = restore_secrets(data, stored)
        now = 0 if data.get("schedule") == stored["schedule"] else now
    policy = {name: field._replace(default=retry[name]) for name, field in RETRY_FIELDS.items()}
    table = JOB_FIELDS | {"schedule": Field(functools.partial(_schedule, now=now))}
    table["retry_policy"] = Field(functools.partial(validate, policy), retry)
    config = validate(table, data, SERVER_FIELDS)
    return config, config.pop("enabled")


def restore_secrets(data: Json, stored: Json) -> Json:
    """Return ``data`` with what ``stored`` has in the place of each mask.

    Where URL origin or Host differ the masks stay, and validation refuses them: else who may change
    a job could have its secrets sent to himself.
    """
    webhook: Any = data.get("webhook")
    kept = stored["webhook"]
    with contextlib.suppress(ValueError):  # a wrong URL is all that there is to report then
        if not isinstance(webhook, dict) or _receiver(webhook) != _receiver(kept):
            return data
    restored = dict(webhook)
    for part in ("headers", "auth"):
        given, secrets = webhook.get(part), kept[part] or {}
        if isinstance(given, dict):
            restored[part] = {k: secrets.get(k, v) if v == MASK else v for k, v in given.items()}
    return data | {"webhook": restored}


def _receiver(webhook: Json) -> list[Any]:
    headers = webhook.get("headers")
    named = headers.items() if isinstance(headers, dict) else ()
    hosts = [value for name, value in named if name.lower() == "host"]
    return [target_of(_url(webhook.get("url"))), *hosts]


def target_of(url: str) -> str:
    """Return scheme://host:port, the port always there."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def merge_patch(target: Any, patch: Any, path: str = "") -> Any:
    """Return ``target`` changed as a JSON merge patch says (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    if path == ".webhook.auth" and patch.get("type", merged.get("type")) != merged.get("type"):
        merged = {}  # another kind of auth: nothing of the one before belongs to it
    for name, value in patch.items():
        merged[name] = merge_patch(merged.get(name), value, f"{path}.{name}")
    return {k: v for k, v in merged.items() if v is not None or k not in patch}


# ==== 6. Records: jobs and executions as the rest of the program sees them ============


class Job(NamedTuple):
    """A job with its newest configuration, in the form of the API."""

    id: str
    version: int  # the newest one
    enabled: bool
    created_at: int  # every *_at: µs since the epoch, UTC
    updated_at: int
    next_run_at: int | None  # the cursor; None: not enabled, or nothing comes any more
    config: Json
    strip: str = ""  # the letters of its last 30 executions that ended, the newest last
    failures: int = 0  # failed or missed, in a row
    failing_since: int | None = None
    declared: str | None = None  # digest of its last declaration in chronos.yaml; None: not there

    def next_after(self, after: int) -> int | None:
        """Return the first fire time later than ``after``, or None."""
        return parse_schedule(self.config["schedule"]).next_after(after, self.config["timezone"])

    def to_json(self, last: Execution | None) -> Json:
        """Return the job as the API shows it: secrets masked, ``last`` as last_execution."""
        return {
            "id": self.id, **masked_config(self.config), "enabled": self.enabled,
            "version": self.version, "created_at": format_time(self.created_at),
            "updated_at": format_time(self.updated_at), "next_run": format_time(self.next_run_at),
            "last_execution": last and last.to_summary(),
            "managed_by": DECLARED_BY if self.declared else None, "strip": self.strip,
            "failures": self.failures, "failing_since": format_time(self.failing_since),
        }  # fmt: skip


def masked_config(config: Json) -> Json:
    """Return a configuration with every secret replaced by the mask."""
    webhook, secret = config["webhook"], ("password", "token", "api_key")
    headers = {n: MASK if is_secret_header(n) else v for n, v in webhook["headers"].items()}
    auth = webhook["auth"] and {k: MASK if k in secret else v for k, v in webhook["auth"].items()}
    return config | {"webhook": webhook | {"headers": headers, "auth": auth}}


class Execution(NamedTuple):
    """One run of a job for a fire time, a trigger or a replay; in the order of its table."""

    id: str
    job_id: str
    job_version: int
    trigger: str  # schedule, catch_up, manual, replay, alert
    status: str  # pending, running, success, failed, skipped
    scheduled_at: int  # the fire time; of a trigger the instant of it
    target: str  # scheme://host:port, for the limit per target
    due_at: int | None  # when a pending one may start; None: ended, or waits for older ones
    attempts: int = 0  # started so far
    spent: int = 0  # µs of the job's timeout that attempts and waits have used up
    started_at: int | None = None  # of the first attempt
    attempt_at: int | None = None  # of the newest attempt
    completed_at: int | None = None
    reason: str | None = None  # why it is no success, for programs
    error: str | None = None  # the same for people
    status_code: int | None = None  # of the last attempt
    node_id: str | None = None
    replay_of: str | None = None
    missed_count: int | None = None  # of a skipped one: it stands for so many fire times,
    missed_from: int | None = None  # from this one
    missed_to: int | None = None  # to this one
    attempt_log: str = "[]"  # JSON: what the API shows
    response: str | None = None
    job_name: str = ""  # only where it is to be shown: the table has no such column

    @property
    def letter(self) -> str:
        """How it ended, as LETTERS has it."""
        return LETTERS.get(self.reason or self.status, "F")

    def to_summary(self) -> Json:
        """Return what a job shows of its last execution."""
        times = (format_time(self.scheduled_at), format_time(self.completed_at))
        shown = {name: getattr(self, name) for name in ("id", "status", "reason", "error")}
        return shown | {"scheduled_time": times[0], "completed_at": times[1]}

    def to_json(self) -> Json:
        """Return the execution as a list of the API shows it."""
        shown = self._asdict() | self.to_summary()
        shown["duration"] = self.spent * 1000 if self.completed_at and self.attempts else None
        for name in ("due_at", "started_at", "missed_from", "missed_to"):
            shown[name] = format_time(shown[name])
        for name in ("scheduled_at", "target", "attempt_at", "spent", "attempt_log"):
            del shown[name]  # they are our own
        return shown


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended; a worker hands it to the engine."""

    execution: Execution  # as it was when the attempt began
    started_at: int
    duration: int  # µs, by the monotonic clock
    ended: int  # instant of the monotonic clock
    status_code: int | None = None  # None: no answer
    response: str | None = None
    success: bool = False
    reason: str | None = None  # timeout, blocked, no_answer, http_status, interrupted, an abort's
    error: str | None = None
    retry_after: int | None = None  # µs that the answer asked to wait


# ==== 7. Settings: chronos.yaml, every key with its check and its default =============
#
# Settings are a flat dict: "dispatcher.connect_timeout" -> "10s". The file nests them; an
# environment variable CHRONOS_DISPATCHER_CONNECT_TIMEOUT overrides, read as a YAML scalar.


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:8080`` or ``[::1]:8080``. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError('must be an address such as "127.0.0.1:8080"')
    return host.strip("[]") or "0.0.0.0", int(port)


_ip_address = rule(lambda value: ipaddress.ip_address(text(100)(value)), "must be an IP address")
_networks = list_of(lambda value: str(ipaddress.ip_network(text(100)(value))), 1000)
_address = rule(lambda value: split_address(text(300)(value)), "must be an address")
_readable = rule(lambda path: os.access(text(4096)(path), os.R_OK), "must be a readable file")
_password_hash = matching("scrypt:[0-9a-f]{32}:[0-9a-f]{64}", "must be what hash-password prints")


def _size(value: Any) -> int:
    size = matching("[1-9][0-9]{0,5}[MG]B", 'must be a size such as "500MB" or "1GB"')(value)
    return int(size[:-2]) * {"MB": 10**6, "GB": 10**9}[size[-2:]]


def hash_password(password: bytes, salt: bytes) -> str:
    """Return the scrypt hash (RFC 7914) of a password, as auth.users has it."""
    key = hashlib.scrypt(password, salt=salt, n=1 << 14, r=8, p=1, dklen=32)
    return f"scrypt:{salt.hex()}:{key.hex()}"


# fmt: off
SETTINGS: dict[str, Field] = {
    # key                                   check                               default
    "server.http.address":            Field(_address,                           "127.0.0.1:8080"),
    "server.http.threads":            Field(number(8, 256),                     16),
    "server.shutdown_grace":          Field(duration("0", "1h"),                "20s"),
    "server.allow_unauthenticated":   Field(boolean,                            False),
    "server.allowed_hosts":           Field(list_of(text(253), 100),            []),
    "server.trusted_proxy":           Field(_ip_address,                        None),
    "cluster.node_id":                Field(text(100),           platform.node() or "chronos"),
    "cluster.data_dir":               Field(text(4096),                         "./data"),
    "store.synchronous":              Field(one_of("FULL", "NORMAL"),           "FULL"),
    "scheduler.paused":               Field(boolean,                            False),
    "scheduler.missed_run_policy":    Field(one_of(*MISSED_RUN_POLICIES),       "execute_one"),
    "scheduler.missed_run_grace":     Field(duration("1s", "24h"),              "10s"),
    "scheduler.default_retry_policy": Field(functools.partial(validate, RETRY_FIELDS),
                                            validate(RETRY_FIELDS, {})),
    "dispatcher.max_concurrent_jobs": Field(number(1, 1000),                    64),
    "dispatcher.max_concurrent_per_host": Field(number(1, 1000),                None),
    "dispatcher.connect_timeout":     Field(duration("100ms", "1h"),            "10s"),
    "dispatcher.max_response_bytes":  Field(number(0, 16 << 20),                64 << 10),
    "dispatcher.blocked_networks":    Field(_networks, [
        "169.254.0.0/16", "fe80::/10", "168.63.129.16/32", "fd00:ec2::254/128",
        "0.0.0.0/8", "::/128", "224.0.0.0/4", "ff00::/8", "255.255.255.255/32"]),
    "dispatcher.allowed_networks":    Field(_networks,                          []),
    "dispatcher.ca_bundle":           Field(_readable,                          None),
    "retention.executions_per_job":   Field(number(1, 100_000),                 1000),
    "retention.max_age":              Field(duration("1h", "87600h"),           "720h"),
    "retention.max_size":             Field(_size,                              10**9),
    "auth.type":                      Field(one_of("none", "basic"),            "none"),
    "auth.users":                     Field(mapping(_user_name, _password_hash, 1000), {}),
    "auth.viewers":                   Field(list_of(text(256), 1000),           []),
    "alerts.webhook":                 Field(functools.partial(validate, ALERT_FIELDS), None),
    "alerts.after":                   Field(number(1, 100),                     1),
    "metrics.public":                 Field(boolean,                            False),
    "logging.level":                  Field(one_of("debug", "info", "warning", "error"), "info"),
    "logging.format":                 Field(one_of("text", "json"),             "text"),
    "jobs":                           Field(rule(
        lambda jobs: isinstance(jobs, list) and all(isinstance(job, dict) for job in jobs),
        "must be a list of jobs, each an object"),                              []),
}
RELOADED = ("jobs", "auth.", "alerts.", "logging.level")  # keys that begin so need no restart
# fmt: on


def read_yaml(content: str, environment: Mapping[str, str], lines: dict[str, str]) -> Any:
    """Return a YAML document as plain data, and in ``lines`` the line of every ``.dotted.path``.

    Words are as in JSON: no octals, dates, ``yes``; ``${NAME}`` is replaced. Raises ValueError.
    """
    try:
        for event in yaml.parse(content, yaml.BaseLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"line {event.start_mark.line + 1}: aliases are not supported")
        root = yaml.compose(content, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"line {mark.line + 1}: " if mark else ""
        hint = 'a value with ":", "#", "@" or "*" wants quotes'
        raise ValueError(f"{place}{what or 'this is not YAML'} ({hint})") from error
    return root and _plain(root, "", environment, lines)


def _plain(node: Any, path: str, environment: Mapping[str, str], lines: dict[str, str]) -> Any:
    line = f"line {node.start_mark.line + 1}: "
    lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value, 1)
        return [_plain(item, f"{path}.{n}", environment, lines) for n, item in items]
    if isinstance(node, yaml.MappingNode):
        entries: Json = {}
        for key, value in node.value:
            name = str(key.value)
            if name in entries:
                raise ValueError(f"line {key.start_mark.line + 1}: {name!r} is there twice")
            entries[name] = _plain(value, f"{path}.{name}", environment, lines)
        return entries
    if node.tag != "tag:yaml.org,2002:str":
        raise ValueError(f"{line}the tag {node.tag} is not supported")
    try:
        word = re.sub(r"\$\{([A-Za-z_]\w*)\}", lambda name: environment[name[1]], node.value)
    except KeyError as error:
        raise ValueError(f"{line}the environment variable {error.args[0]} is not set") from None
    with contextlib.suppress(ValueError):
        if not node.style and word == node.value:
            return json.loads("null" if word in ("", "~") else word, parse_constant=str)
    return word


def _flatten(data: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting that the sections of a file name."""
    for name, value in data.items():
        path = prefix + name
        is_section = any(key.startswith(f"{path}.") for key in SETTINGS)
        if path not in SETTINGS and isinstance(value, dict) and value:
            yield from _flatten(value, f"{path}.")
        elif not is_section or value not in (None, {}):
            yield path, value


def load_settings(path: Path | None, environment: Mapping[str, str]) -> Json:
    """Return each setting of environment, file (None: there is none) or defaults, or StartError."""
    place = str(path)
    lines: dict[str, str] = {}
    try:
        content = path.read_text("utf-8") if path else ""
        data = read_yaml(content, environment, lines)
        if not isinstance(data, dict | None):
            raise ValueError("must be a mapping of sections, such as server: …")
        lines = {key: f"{path}: {line}" for key, line in lines.items()}
        values = dict(_flatten(data or {}))
        for key in SETTINGS:
            place = "CHRONOS_" + key.replace(".", "_").upper()
            if environment.get(place):
                values[key] = read_yaml(environment[place], environment, {})
                lines[f".{key}"] = f"{place}: "
        settings = validate(SETTINGS, values)
        settings["jobs"] = _declared_jobs(settings)
        check_door(settings)
    except Problems as error:
        told = []
        for key, message in error.problems[:3]:
            around = [line for path, line in lines.items() if f".{key}.".startswith(f"{path}.")]
            told.append(f"{around[-1] if around else ''}{key} {message}")
        raise StartError(EXIT_CONFIG, "\n".join(told)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StartError(EXIT_CONFIG, f"{place}: {reason}") from error
    limit = "dispatcher.max_concurrent_per_host"
    settings[limit] = settings[limit] or max(1, settings["dispatcher.max_concurrent_jobs"] * 3 // 4)
    base = (path or Path(__file__)).parent.resolve()
    settings["cluster.data_dir"] = str(base / settings["cluster.data_dir"])
    return settings


def _declared_jobs(settings: Json) -> dict[str, tuple[Json, bool, str]]:
    """Return configuration, state and digest of each declared job by its id. Raises Problems."""
    found: dict[str, tuple[Json, bool, str]] = {}
    retry = settings["scheduler.default_retry_policy"]

    def declare(data: Json) -> None:
        given = data | {"enabled": True} if data.get("enabled") is None else data
        config, enabled = validate_job(given, retry, now=0)  # it stays declared after its @at
        job_id = str(uuid.uuid5(DECLARED_IDS, config["name"]))
        if job_id in found:
            raise Problems([("name", f"{config['name']!r} is there twice")])
        digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        found[job_id] = (config, enabled, digest)

    numbered = {str(n): job for n, job in enumerate(settings["jobs"], 1)}
    validate({"jobs": Field(mapping(str, declare, 10_000))}, {"jobs": numbered})
    return found


def check_door(settings: Json) -> None:
    """Raise Problems where nobody could come in, or everybody without being meant to."""
    users, address = settings["auth.users"], settings["server.http.address"]
    is_local = re.fullmatch(r"localhost|127(\.[0-9]+){3}|::1", split_address(address)[0])
    if settings["auth.type"] == "basic":
        if not users or not users.keys() >= set(settings["auth.viewers"]):
            raise Problems([("auth.users", "must name somebody, and everybody in auth.viewers")])
    elif users:
        raise Problems([("auth.type", "must be basic where auth.users names somebody")])
    elif not is_local and not settings["server.allow_unauthenticated"]:
        ways_out = "auth.type: basic and auth.users, or server.allow_unauthenticated: true"
        raise Problems([("server.http.address", f"{address} lets everybody in: set {ways_out}")])


# ==== 8. Policies: pure functions =====================================================


def retry_wait(policy: Json, attempt: int, retry_after: int | None) -> int:
    """Return the µs to wait: with the defaults 1 s, 2 s, 4 s … up to 1 m; at least retry_after."""
    first, most = (parse_duration(policy[key]) for key in ("initial_interval", "max_interval"))
    grown = first * policy["multiplier"] ** min(attempt - 1, 100)
    return max(int(min(grown, most)), retry_after or 0)


def parse_retry_after(value: str | None, now: int) -> int | None:
    """Return the µs that a ``Retry-After`` header (RFC 9110, 10.2.3) asks to wait, or None."""
    value = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return int(value) * SECOND
    with contextlib.suppress(ValueError, IndexError, OverflowError):
        moment = parsedate_to_datetime(value)
        return max(0, to_instant(moment.replace(tzinfo=moment.tzinfo or UTC)) - now)
    return None


def after_attempt(outcome: Outcome, retry: Json, timeout: int, ended_at: int) -> Execution:
    """Return what becomes of an execution: success, failed, or pending again with a due_at.

    ``timeout`` (µs) is for attempts and waits together; ``ended_at`` is by the wall clock of now.
    """
    execution, error = outcome.execution, outcome.error
    attempt = {
        "number": execution.attempts, "started_at": format_time(outcome.started_at),
        "duration": outcome.duration * 1000, "status_code": outcome.status_code, "error": error,
    }  # fmt: skip
    earlier = execution.attempt_log.removeprefix("[").removesuffix("]")
    attempt_log = f"[{earlier}{', ' if earlier else ''}{json.dumps(attempt)}]"
    after = execution._replace(
        status="success" if outcome.success else "failed", due_at=None, completed_at=ended_at,
        spent=execution.spent + outcome.duration, reason=outcome.reason, error=error,
        status_code=outcome.status_code, response=outcome.response, attempt_log=attempt_log,
    )  # fmt: skip
    code = outcome.status_code or 0
    may_help = code == 429 or code >= 500 or outcome.reason in ("no_answer", "interrupted")
    if outcome.success or not may_help or execution.attempts >= retry["max_attempts"]:
        return after
    broken_off = outcome.reason == "interrupted"  # by ourselves: it begins again at once
    wait = 0 if broken_off else retry_wait(retry, execution.attempts, outcome.retry_after)
    if after.spent + wait >= timeout:
        return after._replace(reason="timeout", error=f"{error}; no time is left to try again")
    waiting = after._replace(status="pending", completed_at=None, reason=None)
    return waiting._replace(due_at=ended_at + wait, spent=after.spent + wait)


def ended(execution: Execution, status: str, reason: str, error: str, now: int) -> Execution:
    """Return the execution as one that ended for a reason that is not its own."""
    execution = execution._replace(status=status, due_at=None, completed_at=now)
    return execution._replace(reason=reason, error=error)


# ==== 9. Store: every SQL statement of Chronos is in this section =====================
#
# Methods take and return records, never rows. Each thread has a connection of its own; only the
# engine's writes, inside transaction(): a pass is one commit. The write-ahead log lets all read on.

APPLICATION_ID, SCHEMA_VERSION = 1130918511, 1  # "Chro"; both are in the header of the file
SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE jobs (                      -- class Job says what each column is
    seq          INTEGER PRIMARY KEY,    -- order of creation; 0: the built-in one of the alerts
    id           TEXT NOT NULL UNIQUE,   -- a UUID
    version INTEGER NOT NULL, enabled INTEGER NOT NULL,
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, next_run_at INTEGER,
    strip TEXT NOT NULL, failures INTEGER NOT NULL, failing_since INTEGER, declared TEXT,
    is_bad INTEGER NOT NULL, news_at INTEGER -- for alerts: its state, and since when it is news
);
INSERT INTO jobs VALUES
    (0, '{ALERTS_ID}', 0, 0, 0, 0, NULL, '', 0, NULL, '{DECLARED_BY}', 0, NULL);
CREATE INDEX jobs_news ON jobs (news_at) WHERE news_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (next_run_at) WHERE next_run_at IS NOT NULL;
CREATE TABLE versions (                  -- config: JSON, in the form of the API
    job_id TEXT NOT NULL, version INTEGER NOT NULL, config TEXT NOT NULL,
    created_at INTEGER NOT NULL, created_by TEXT NOT NULL, PRIMARY KEY (job_id, version)
);
CREATE VIEW configured_jobs AS
    SELECT jobs.*, config FROM jobs
      JOIN versions ON versions.job_id = jobs.id AND versions.version = jobs.version;
CREATE TABLE executions (                -- class Execution says what each column is
    seq INTEGER PRIMARY KEY,             -- order of creation
    {", ".join(Execution._fields[:-1])},
    UNIQUE (id)                          -- one per fire time, whatever crashes or restarts
);
CREATE VIEW named_executions AS
    SELECT executions.*, json_extract(config, '$.name') AS job_name
      FROM executions JOIN configured_jobs AS job ON job.id = executions.job_id;
CREATE VIEW pending AS SELECT * FROM executions WHERE status = 'pending';
CREATE VIEW active AS SELECT * FROM executions WHERE status IN ('pending', 'running');
CREATE INDEX executions_of_job ON executions (job_id, seq);
CREATE INDEX executions_due ON executions (due_at, seq) WHERE status = 'pending';
CREATE INDEX executions_of_target ON executions (target, due_at, seq) WHERE status = 'pending';
CREATE INDEX executions_active ON executions (job_id, seq) WHERE status IN ('pending', 'running');
CREATE INDEX executions_listed ON executions (status, seq)
    WHERE status = 'running' OR status = 'failed' OR status = 'skipped';
CREATE INDEX executions_failed ON executions (job_id, seq) WHERE status = 'failed';
CREATE TABLE ends (                      -- how many executions ended in an hour, and how
    hour INTEGER, letter TEXT, number INTEGER NOT NULL, PRIMARY KEY (hour, letter)
);
PRAGMA application_id = {APPLICATION_ID};
"""  # noqa: S608 - constants of our own


class Store:
    """The database file. See the head of this section for who may call what."""

    def __init__(self, path: Path, synchronous: str = "FULL") -> None:
        self.path, self._synchronous = path, synchronous
        self._connections: dict[int, sqlite3.Connection] = {}  # by the thread that uses it
        self.changes = 0  # commits so far; only the engine's thread writes it

    def open(self) -> None:
        """Create or check the file; one that is not ours stays as it is. Raises StartError."""
        is_new, version = not self.path.exists(), self._check()
        if not version and not is_new:
            log.warning("%s was empty: it begins anew", self.path)
        self._run("PRAGMA journal_mode = WAL")
        with self.transaction():
            for statement in () if version else SCHEMA.split(";\n"):
                self._run(statement)
            self._run(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
        self._inode = self.path.stat().st_ino

    def _check(self, wholly: bool = False) -> int:
        """Return the version of the schema, 0: the file is empty or new. Raises StartError."""
        sql = "SELECT * FROM pragma_user_version, pragma_application_id, pragma_schema_version"
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            broken_off = self.path.with_name(f"{self.path.name}-journal").exists()  # amid open()
            unclean = self.path.with_name(f"{self.path.name}-wal").exists()
            with contextlib.closing(self._connect_to("rw" if broken_off else "ro")) as connection:
                version, application, changes = connection.execute(sql).fetchone()
                if not changes:
                    return 0
                if application != APPLICATION_ID:
                    raise StartError(EXIT_CONFIG, f"{self.path} is not a database of Chronos")
                if version > SCHEMA_VERSION:
                    raise StartError(EXIT_CONFIG, f"{self.path} is of a newer Chronos: start that")
                if wholly or unclean or self.path.stat().st_size < QUICK_CHECK_BYTES:
                    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                    if found != "ok":
                        raise sqlite3.DatabaseError(found.splitlines()[-1])
                return int(version)
        except (OSError, sqlite3.OperationalError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartError(EXIT_CONFIG, f"{self.path} cannot be opened: {reason}") from error
        except sqlite3.DatabaseError as error:
            message = f"{self.path} is damaged ({error}): see the README, Restore a backup"
            raise StartError(EXIT_CONFIG, message) from error

    def _connect_to(self, mode: str) -> sqlite3.Connection:  # one that can't create the file
        place = f"{self.path.as_uri()}?mode={mode}"
        return sqlite3.connect(place, uri=True, isolation_level=None, check_same_thread=False)

    def backup(self, target: Path) -> None:
        """Write a checked copy to a new file, also while a server works. Raises StartError."""
        part = target.with_name(target.name + ".part")
        try:
            if target.exists():
                raise OSError("it is there already")
            part.unlink(missing_ok=True)  # of a backup that was broken off
            with open(part, "xb", opener=functools.partial(os.open, mode=0o600)) as file:
                with contextlib.closing(self._connect_to("ro")) as connection:
                    connection.execute("VACUUM INTO ?", (str(part),))
                Store(part)._check(wholly=True)
                os.fsync(file.fileno())
            part.rename(target)
        except (OSError, sqlite3.Error, StartError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            reason = getattr(error, "strerror", None) or error
            raise StartError(EXIT_FAILED, f"no backup to {target}: {reason}") from error

    def check_file(self) -> None:
        """Raise StoreError if the file was removed or replaced: writes would go nowhere."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                return
        raise StoreError(f"{self.path} was removed or replaced: stop the server, restore it")

    def close(self) -> None:
        """Close the connections of all threads; none may be in use."""
        while self._connections:
            self._connections.popitem()[1].close()

    @property
    def _connection(self) -> sqlite3.Connection:
        """The connection of the calling thread."""
        if not (connection := self._connections.get(threading.get_ident())):
            connection = self._connect_to("rw")
            connection.row_factory = sqlite3.Row
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            connection.create_function("casefold", 1, lambda text: text and text.casefold())
            self._connections[threading.get_ident()] = connection
        return connection

    def _run(self, statement: str, /, *row: Any, **values: Any) -> list[Any]:
        try:
            return list(self._connection.execute(statement, row or values))
        except sqlite3.Error as error:
            raise StoreError(f"the database failed: {error} ({self.path})") from error

    def _value(self, statement: str, /, **values: Any) -> Any:
        return next((row[0] for row in self._run(statement, **values)), None)

    @property
    def in_transaction(self) -> bool:
        """Say whether the calling thread is inside one; a full disk ends it unasked."""
        connection = self._connections.get(threading.get_ident())
        return connection is not None and connection.in_transaction

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what happens inside, or nothing of it; one inside another is undone alone."""
        begin, end, undo = "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"
        if self.in_transaction:
            begin, end, undo = "SAVEPOINT s", "RELEASE s", "ROLLBACK TO s"
        self._run(begin)
        try:
            yield
            self._run(end)
            self.changes += end == "COMMIT"
        except BaseException:
            if self.in_transaction:
                self._run(undo)
            raise

    def number(self, key: str) -> Any:
        """Return a number of meta, such as last_seen; None without it."""
        return self._value("SELECT value FROM meta WHERE key = :key", key=key)

    def set_number(self, key: str, value: int) -> None:
        """Keep a number in meta."""
        self._run("REPLACE INTO meta VALUES (:key, :value)", key=key, value=value)

    def next_instants(self, now: int) -> list[int | None]:
        """Return the earliest cursor, and later than now: a due_at, and when an alert is due."""
        sql = """
            SELECT (SELECT min(next_run_at) FROM jobs WHERE next_run_at IS NOT NULL),
                   (SELECT min(due_at) FROM pending WHERE due_at > :now),
                   (SELECT min(news_at) + :gather FROM jobs WHERE news_at > :now - :gather)"""
        return list(self._run(sql, now=now, gather=ALERT_GATHER)[0])

    def _jobs(self, statement: str, /, **values: Any) -> list[Job]:
        return [
            Job._make([*row[1:3], bool(row[3]), *row[4:7], json.loads(row["config"]), *row[7:11]])
            for row in self._run(statement, **values)
        ]

    def job(self, job_id: str) -> Job:
        """Return the job. Raises ApiError NOT_FOUND."""
        for job in self._jobs("SELECT * FROM configured_jobs WHERE id = :id", id=job_id):
            return job
        raise ApiError("NOT_FOUND", f"there is no job {job_id}")

    def jobs(self, filters: Json, most: int, offset: int) -> tuple[list[Job], int]:
        """Return a page of jobs that match JOBS_QUERY and all [name, value] tags; and how many."""
        matching = """
             FROM configured_jobs
            WHERE seq > 0 AND (:enabled IS NULL OR enabled = :enabled)
              AND (:q IS NULL OR instr(casefold(json_extract(config, '$.name')), casefold(:q))
                   OR instr(casefold(json_extract(config, '$.description')), casefold(:q)))
              AND (:status IS NULL OR :status = (
                       SELECT status FROM executions WHERE job_id = configured_jobs.id
                        ORDER BY seq DESC LIMIT 1))
              AND NOT EXISTS (
                       SELECT 1 FROM json_each(:tags) AS tag WHERE NOT EXISTS (
                           SELECT 1 FROM json_each(config, '$.tags') AS own
                            WHERE own.key = json_extract(tag.value, '$[0]')
                              AND own.value = json_extract(tag.value, '$[1]')))"""
        if all(value in (None, []) for value in filters.values()):
            matching = " FROM jobs WHERE seq > 0"  # an offset passes over 50,000 of these quickly
        values = filters | {"tags": json.dumps(filters.get("tags"))}
        page = f"""
            SELECT * FROM configured_jobs WHERE seq IN (
                SELECT seq {matching} ORDER BY seq LIMIT :most OFFSET :offset)
             ORDER BY seq"""  # noqa: S608
        found = self._jobs(page, **values, most=most, offset=offset)
        return found, self._value("SELECT count(*)" + matching, **values)

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are, and of them what; how many executions wait and run."""
        sql = """
            SELECT count(*) AS jobs_total, sum(enabled) AS enabled,
                   sum(enabled AND failures) AS failing, (SELECT count(*) FROM pending) AS pending,
                   (SELECT count(*) FROM executions WHERE status = 'running') AS running
              FROM jobs WHERE seq > 0"""
        return {name: count or 0 for name, count in dict(self._run(sql)[0]).items()}

    def declared_jobs(self, ids: list[str]) -> set[str]:
        """Return the ids of the jobs that are declared, or are among ``ids``."""
        sql = """
            SELECT id FROM jobs WHERE seq > 0 AND declared IS NOT NULL
                OR id IN (SELECT value FROM json_each(:ids))"""
        return {row[0] for row in self._run(sql, ids=json.dumps(ids))}

    def save_job(self, job: Job, created_by: str | None) -> None:
        """Add or change a job; ``created_by``: its version is a new one, by this user."""
        values = job._asdict() | {"config": json.dumps(job.config), "created_by": created_by}
        sql = """
            INSERT INTO jobs
            VALUES (NULL, :id, :version, :enabled, :created_at, :updated_at, :next_run_at,
                    :strip, :failures, :failing_since, :declared, FALSE, NULL)
            ON CONFLICT (id) DO UPDATE
               SET version = :version, enabled = :enabled, updated_at = :updated_at,
                   next_run_at = :next_run_at, declared = :declared"""
        self._run(sql, **values)
        if created_by is not None:
            sql = "INSERT INTO versions VALUES (:id, :version, :config, :updated_at, :created_by)"
            self._run(sql, **values)

    def versions(self, job_id: str, number: int | None = None) -> list[Json]:
        """Return the versions of a job, the newest first, or that one. Raises NOT_FOUND."""
        sql = """
            SELECT * FROM versions
             WHERE job_id = :id AND version = ifnull(:number, version) ORDER BY version DESC"""
        if not (rows := self._run(sql, id=job_id, number=number)):
            raise ApiError("NOT_FOUND", f"job {job_id} has no version {number}")
        return [dict(row) | {"config": json.loads(row["config"])} for row in rows]

    def delete_job(self, job_id: str) -> None:
        """Remove a job and its versions; prune() removes its history."""
        self._run("DELETE FROM jobs WHERE id = :id", id=job_id)
        self._run("DELETE FROM versions WHERE job_id = :id", id=job_id)

    def due_jobs(self, now: int, most: int) -> list[tuple[str, int, int]]:
        """Return (job id, version, fire time) of jobs that fire by ``now``, the oldest first."""
        sql = """
            SELECT id, version, next_run_at FROM jobs
             WHERE next_run_at <= :now ORDER BY next_run_at LIMIT :most"""
        return self._run(sql, now=now, most=most)

    def move_cursor(self, job_id: str, next_run_at: int | None) -> None:
        """Set the cursor of an enabled job; None, of a schedule that is spent, disables it."""
        sql = "UPDATE jobs SET next_run_at = :at, enabled = :at IS NOT NULL WHERE id = :id"
        self._run(sql, id=job_id, at=next_run_at)

    def last_executions(self, jobs: list[Job], has_ended: bool = False) -> dict[str, Execution]:
        """Return the newest execution, or the newest that has ended, of each job that has one."""
        sql = """
            SELECT executions.* FROM json_each(:ids) AS job JOIN executions ON executions.seq = (
                SELECT seq FROM executions
                 WHERE job_id = job.value AND (NOT :has_ended OR completed_at IS NOT NULL)
                 ORDER BY seq DESC LIMIT 1)"""
        found = self._executions(sql, ids=json.dumps([j.id for j in jobs]), has_ended=has_ended)
        return {execution.job_id: execution for execution in found}

    def _count_end(self, execution: Execution) -> None:
        """Note in the job, and in the count of the hour, how an execution has ended."""
        if execution.job_id == ALERTS_ID:
            return
        letter, at = execution.letter, execution.completed_at or 0
        sql = """
            UPDATE jobs
               SET strip = substr(strip || :letter, -30),
                   failures = iif(:letter = 'S', 0, failures + (:letter IN ('F', 'M'))),
                   failing_since = iif(:letter IN ('F', 'M'), coalesce(failing_since, :at),
                                       iif(:letter = 'S', NULL, failing_since))
             WHERE id = :id"""
        self._run(sql, id=execution.job_id, letter=letter, at=at)
        sql = """
            INSERT INTO ends VALUES (:hour, :letter, :number)
                ON CONFLICT DO UPDATE SET number = number + :number"""
        self._run(sql, hour=at // HOUR, letter=letter, number=execution.missed_count or 1)

    def ends_since(self, at: int) -> dict[str, int]:
        """Return how many executions ended since the hour of ``at``, by the names of LETTERS."""
        sql = "SELECT letter, sum(number) FROM ends WHERE hour >= :hour GROUP BY letter"
        found = dict(map(tuple, self._run(sql, hour=at // HOUR)))
        return {name: found.get(letter, 0) for name, letter in LETTERS.items()}

    def note_news(self, job_ids: set[str], after: int, now: int) -> None:
        """Note which of these jobs have turned bad, by so many failures in a row, or well again."""
        sql = """
            UPDATE jobs SET is_bad = NOT is_bad, news_at = coalesce(news_at, :now)
             WHERE id IN (SELECT value FROM json_each(:job_ids))
               AND iif(is_bad, failures = 0, failures >= :after)"""
        self._run(sql, job_ids=json.dumps(list(job_ids)), after=after, now=now)

    def news(self, before: int) -> list[Json]:
        """Return all jobs that have turned, if the first of them has ``before``."""
        sql = """
            SELECT id, json_extract(config, '$.name') AS name, failures,
                   iif(is_bad, 'failed', 'recovered') AS event
              FROM configured_jobs
             WHERE news_at IS NOT NULL
               AND (SELECT min(news_at) FROM jobs WHERE news_at IS NOT NULL) <= :before
             ORDER BY news_at, seq"""
        return list(map(dict, self._run(sql, before=before)))

    def save_alert(self, config: Json, now: int) -> int:
        """Mark all news as told, by a new version of the built-in job; return its number."""
        self._run("UPDATE jobs SET news_at = NULL WHERE news_at IS NOT NULL")
        number = int(self._value("SELECT version + 1 FROM jobs WHERE seq = 0"))
        job = Job(ALERTS_ID, number, False, now, now, None, config, declared=DECLARED_BY)
        self.save_job(job, DECLARED_BY)
        sql = """
            DELETE FROM versions WHERE job_id = :id AND version < :number
               AND version NOT IN (SELECT job_version FROM executions WHERE job_id = :id)"""
        self._run(sql, id=ALERTS_ID, number=number)
        return number

    def _executions(self, statement: str, /, **values: Any) -> list[Execution]:
        return [Execution(*row[1:]) for row in self._run(statement, **values)]

    def add_execution(self, execution: Execution) -> bool:
        """Add an execution; False: there is one with this id, and nothing was done."""
        row = execution[:-1]
        values = ", ".join("?" * len(row))
        sql = f"INSERT INTO executions VALUES (NULL, {values}) ON CONFLICT DO NOTHING"  # noqa: S608
        added = bool(self._run(f"{sql} RETURNING seq", *row))
        if added and execution.completed_at is not None:
            self._count_end(execution)
        return added

    def execution_of(self, job_id: str | None, execution_id: str) -> Execution:
        """Return an execution of this job (None: of any). Raises ApiError NOT_FOUND."""
        sql = "SELECT * FROM named_executions WHERE id = :id AND job_id = ifnull(:job_id, job_id)"
        for execution in self._executions(sql, id=execution_id, job_id=job_id):
            return execution
        raise ApiError("NOT_FOUND", f"there is no such execution: {execution_id}")

    def executions(
        self, job_id: str | None, most: int, before: str | None = None, status: str | None = None
    ) -> list[Execution]:
        """Return the newest executions, of a job or of all, older than the one ``before``."""
        of_job = "job_id = :job_id" if job_id else "TRUE"
        having = f"{'+' if job_id else ''}status = '{status}'" if status else "TRUE"
        if status == "verdict":  # it has ended in a way that says whether its job is well
            others = "('cancelled', 'replaced', 'overlap')"
            having = f"completed_at > 0 AND ifnull(reason, '') NOT IN {others}"
        sql = f"""
            SELECT * FROM named_executions
             WHERE {of_job} AND {having}
               AND seq < coalesce((SELECT seq FROM executions WHERE id = :before), 1 << 62)
             ORDER BY seq DESC LIMIT :most"""  # noqa: S608
        return self._executions(sql, job_id=job_id, most=most, before=before)

    def count_executions(self, job_id: str, status: str | None = None) -> int:
        """Return how many executions a job has, with this status (None: any)."""
        sql = "SELECT count(*) FROM executions WHERE job_id = :id"  # of the index alone
        sql += " AND status = :status" if status else ""
        return int(self._value(sql, id=job_id, status=status))

    def active(self, most: int) -> list[Execution]:
        """Return what runs, and then what is due soonest."""
        sql = """
            WITH shown (number, at) AS (
                SELECT * FROM (SELECT seq, 0 FROM executions WHERE status = 'running' LIMIT :most)
                 UNION ALL
                SELECT * FROM (SELECT seq, due_at FROM executions
                                WHERE status = 'pending' AND due_at > 0
                                ORDER BY due_at, seq LIMIT :most))
            SELECT named_executions.* FROM shown JOIN named_executions ON seq = number
             ORDER BY at, number LIMIT :most"""
        return self._executions(sql, most=most)

    def active_executions(self, job_id: str, nth: int, most: int) -> list[Execution]:
        """Return pending and running executions of a job, the oldest first, from the nth on."""
        sql = "SELECT * FROM active WHERE job_id = :id ORDER BY seq LIMIT :most OFFSET :nth - 1"
        return self._executions(sql, id=job_id, nth=nth, most=most)

    def due_executions(self, now: int, most: int, passed_over: set[str]) -> list[Execution]:
        """Return executions that may start, the oldest due_at first, but for some targets."""
        if not passed_over:
            sql = "SELECT * FROM pending WHERE due_at <= :now ORDER BY due_at, seq LIMIT :most"
            return self._executions(sql, now=now, most=most)
        # from target to target: 50,000 rows of a dead host cost nothing
        sql = """
            WITH RECURSIVE targets (target) AS (
                SELECT min(target) FROM pending
                 UNION ALL
                SELECT (SELECT min(target) FROM pending WHERE target > targets.target)
                  FROM targets WHERE targets.target IS NOT NULL
            )
            SELECT executions.* FROM targets JOIN executions ON executions.seq IN (
                SELECT seq FROM pending AS due
                 WHERE due.target = targets.target AND due_at <= :now
                 ORDER BY due_at, seq LIMIT :most)
             WHERE targets.target NOT IN (SELECT value FROM json_each(:passed_over))
             ORDER BY due_at, executions.seq LIMIT :most"""
        return self._executions(sql, now=now, most=most, passed_over=json.dumps(list(passed_over)))

    def save_execution(self, execution: Execution, only_running: bool = False) -> bool:
        """Write an execution, ``only_running``: where it still runs in this attempt; say if so."""
        sql = """
            UPDATE executions
               SET status = :status, due_at = :due_at, spent = :spent,
                   completed_at = :completed_at, reason = :reason, error = :error,
                   status_code = :status_code, attempt_log = :attempt_log, response = :response
             WHERE id = :id
               AND (NOT :only_running OR (status = 'running' AND attempts = :attempts))
            RETURNING seq"""
        saved = bool(self._run(sql, **execution._asdict(), only_running=only_running))
        if saved and execution.completed_at is not None:
            self._count_end(execution)
        return saved

    def delete_execution(self, execution_id: str) -> None:
        """Remove one execution."""
        self._run("DELETE FROM executions WHERE id = :id", id=execution_id)

    def start_executions(self, ids: list[str], now: int, node_id: str) -> None:
        """Let executions run: each in its next attempt."""
        sql = """
            UPDATE executions
               SET status = 'running', attempts = attempts + 1, attempt_at = :now,
                   started_at = coalesce(started_at, :now), node_id = :node_id
             WHERE id IN (SELECT value FROM json_each(:ids))"""
        self._run(sql, ids=json.dumps(ids), now=now, node_id=node_id)

    def release_oldest(self, job_ids: set[str], now: int) -> None:
        """Make the oldest active execution of each job due, if it waited for older ones."""
        sql = """
            UPDATE executions SET due_at = :now
             WHERE due_at IS NULL AND status = 'pending' AND seq IN (
                SELECT (SELECT min(seq) FROM active WHERE job_id = job.value)
                  FROM json_each(:job_ids) AS job)"""
        self._run(sql, job_ids=json.dumps(list(job_ids)), now=now)

    def prune(self, job_id: str, before: int, keep: int) -> int:
        """Remove some executions that are not to be kept; return how many.

        All of a job that is gone. Else, of those that have ended: what ended ``before``, but for
        the newest 10, and what is not among the newest ``keep``, but for the newest 100 failed.
        """
        sql = """
            WITH mine AS NOT MATERIALIZED (SELECT * FROM executions WHERE job_id = :id),
            beyond (seq) AS (SELECT seq FROM mine ORDER BY seq DESC LIMIT 1 OFFSET :keep),
            spared (seq) AS (
                SELECT seq FROM mine WHERE status = 'failed' AND seq <= (SELECT seq FROM beyond)
                 ORDER BY seq DESC LIMIT 100),
            oldest AS (
                SELECT seq, completed_at, EXISTS (SELECT 1 FROM jobs WHERE id = :id) AS lives
                  FROM mine WHERE completed_at IS NOT NULL OR NOT lives ORDER BY seq LIMIT :most)
            DELETE FROM executions WHERE seq IN (
                SELECT seq FROM oldest
                 WHERE NOT lives OR (seq <= (SELECT seq FROM beyond) AND seq NOT IN spared)
                    OR (completed_at < :before
                        AND seq <= (SELECT seq FROM mine ORDER BY seq DESC LIMIT 1 OFFSET 10)))
            RETURNING seq"""
        return len(self._run(sql, id=job_id, before=before, keep=keep, most=PRUNE_ROWS))

    def prune_oldest(self, max_size: int) -> bool:
        """Remove some of the oldest history if there is more than ``max_size`` bytes of data."""
        sql = """
            DELETE FROM executions WHERE seq IN (
                SELECT seq FROM executions
                 WHERE seq > 0 AND completed_at IS NOT NULL ORDER BY seq LIMIT (
                    SELECT :rows * ((page_count - freelist_count) * page_size > :max_size)
                      FROM pragma_page_count, pragma_freelist_count, pragma_page_size))
            RETURNING seq"""
        return bool(self._run(sql, max_size=max_size, rows=PRUNE_ROWS))

    def next_with_history(self, job_id: str) -> Any:
        """Return the next job id that has executions, also of a deleted one; None: no more."""
        return self._value("SELECT min(job_id) FROM executions WHERE job_id > :id", id=job_id)

    def shift_times(self, step: int, reset: bool) -> None:
        """Move every due_at with the wall clock; ``reset``: each cursor is to be computed anew."""
        sql = "UPDATE executions SET due_at = due_at + :step WHERE status = 'pending'"
        self._run(sql, step=step)
        self._run("UPDATE jobs SET news_at = news_at + :step WHERE news_at IS NOT NULL", step=step)
        if reset:  # 0 can't be true
            self._run("UPDATE jobs SET next_run_at = 0 WHERE next_run_at IS NOT NULL")


# ==== 10. Dispatch: one HTTP request, its hard limit, and the check of the address it goes to ====
#
# Sockets and the reading of answers are our own, because no timeout of requests is a limit: a
# server that drips bytes renews them all. What ends a blocked call from another thread is
# shutdown() on a duplicate of the socket's descriptor, made before connect(): close() leaves the
# call blocked, and TLS detaches the socket it wraps.

Key = tuple[str, bool]  # of connections that can stand in for each other: target, verify_tls
Answer = tuple[int, str, dict[str, str], bytes]  # status, phrase, headers in lower case, body
_STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: (.*))?")
_CHARSET = re.compile(  # other codecs of Python take quadratic time, or let surrogates through
    r'(?i)charset="?(utf-16(?:[lb]e)?|iso-8859-(?:1[0-13-6]|[1-9])|windows-125[0-8]|latin-?1|'
    r"koi8-r|shift_jis|euc-(?:jp|kr)|gb(?:k|2312|18030)|big5)\b"
)
_network = functools.lru_cache(ipaddress.ip_network)


class BlockedTarget(requests.RequestException):
    """The address that would be dialled is closed by the settings."""


class Webhook:
    """A valid ``webhook`` made ready once per job version; an attempt only adds its own headers."""

    def __init__(self, config: Json) -> None:
        self.target = target_of(config["url"])
        self.success_codes = config["success_codes"] or range(200, 300)
        self.method: str = config["method"]
        self._config = config

    @functools.cached_property
    def secrets(self) -> list[str]:
        """What is masked in the text that is kept of an answer."""
        headers, auth = self._config["headers"], self._config["auth"] or {}
        found = [value for name, value in headers.items() if is_secret_header(name)]
        found += [auth.get(name, "") for name in ("password", "token", "api_key")]
        found.append(str(self.request.headers.get("Authorization", "")).rpartition(" ")[2])
        found += [json.dumps(secret)[1:-1] for secret in found]  # as an echo in JSON has it
        return sorted({secret for secret in found if len(secret) >= 6}, key=len, reverse=True)

    def masked(self, text: str, cut: bool = False) -> str:
        """Return a text without the secrets; ``cut``: nor with the beginning of one at its end."""
        for secret in self.secrets:
            text = text.replace(secret, MASK)
            begun = (n for n in range(len(secret) - 1, 2, -1) if text.endswith(secret[:n]))
            text = text[: len(text) - next(begun, 0)] if cut else text
        return text

    @functools.cached_property
    def request(self) -> requests.PreparedRequest:
        """The prepared request: its first worker makes it, because that costs most."""
        config, auth = self._config, self._config["auth"] or {"type": None}
        body = config["body"] or ""
        own = {"User-Agent": f"chronos/{__version__}", "Accept-Encoding": "identity"}
        headers = requests.structures.CaseInsensitiveDict({"Accept": "*/*"} | own)
        if body:
            headers["Content-Type"] = "text/plain; charset=utf-8"
            with contextlib.suppress(ValueError, RecursionError):
                json.loads(body)
                headers["Content-Type"] = "application/json"
        headers.update(config["headers"])
        if auth["type"] == "basic":
            pair = f"{auth['username']}:{auth['password']}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        elif auth["type"] == "bearer":
            headers["Authorization"] = f"Bearer {auth['token']}"
        elif auth["type"] == "api_key":
            headers[auth["header"]] = auth["api_key"]
        prepared = requests.PreparedRequest()  # step by step: without cookies it takes a third
        prepared.prepare_method(self.method)
        prepared.prepare_url(config["url"], None)
        prepared.prepare_headers(headers)
        prepared.prepare_body(body.encode(), None)
        prepared.headers.setdefault("Host", urlsplit(prepared.url).netloc)
        return prepared

    @functools.cached_property
    def wired(self) -> tuple[Key, str]:
        """Which connections can carry it; and the head, as far as all attempts have it."""
        lines = [f"{name}: {value!s}\r\n" for name, value in self.request.headers.items()]
        head = f"{self.method} {self.request.path_url} HTTP/1.1\r\n{''.join(lines)}"
        return (target_of(str(self.request.url)), self._config["verify_tls"]), head

    def to_bytes(self, execution: Execution) -> bytes:
        """Return the request of the attempt that ``execution`` is in."""
        head = (
            f"{self.wired[1]}X-Chronos-Job-ID: {execution.job_id}\r\n"
            f"X-Chronos-Execution-ID: {execution.id}\r\n"
            f"X-Chronos-Scheduled-Time: {format_time(execution.scheduled_at)}\r\n"
            f"X-Chronos-Attempt: {execution.attempts}\r\n"
        )
        if "Idempotency-Key" not in self.request.headers:
            head += f"Idempotency-Key: {execution.id}\r\n"
        return f"{head}\r\n".encode("latin-1") + (self.request.body or b"")  # type: ignore[operator]


@dataclass(eq=False, slots=True)
class Attempt:
    """One HTTP request of an execution, and the means to end it from another thread."""

    execution: Execution
    webhook: Webhook
    allowed: int  # µs
    allowed_reason: str  # timeout: the execution's time ends with it; else attempt_timeout
    limit: int = 0  # monotonic instant when the watchdog aborts it
    reason: str | None = None  # of the first abort; guarded by _lock, as is _cut
    _cut: Callable[[], None] | None = None  # ends whatever the worker is blocked in
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def blocking(self, cut: Callable[[], None]) -> Iterator[None]:
        """While the worker blocks, ``cut`` ends it; raises if it was aborted, also where late."""
        with self._lock:
            if self.reason:
                raise requests.RequestException
            self._cut = cut
        try:
            yield
        finally:
            with self._lock:
                self._cut = None
        if self.reason:  # what has come may look whole and is not
            raise requests.RequestException

    def abort(self, reason: str) -> None:
        """End the attempt now; the first reason wins. Any thread."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
                if self._cut:
                    self._cut()


def check_address(host: str, blocked: list[str], allowed: list[str]) -> None:
    """Raise BlockedTarget if this numeric address is closed: names can't deceive it."""
    spellings: list[Any] = [ipaddress.ip_address(host.partition("%")[0])]
    if spellings[0].version == 6:  # it may stand for an IPv4 one: mapped, 6to4, NAT64
        inner = spellings[0].ipv4_mapped or spellings[0].sixtofour
        if spellings[0] in _network("64:ff9b::/96"):  # RFC 6052
            inner = ipaddress.IPv4Address(int(spellings[0]) & 0xFFFFFFFF)
        spellings += [inner] if inner else []
    if spellings[-1].is_unspecified:  # who connects to it reaches loopback
        spellings.append(ipaddress.ip_address({4: "127.0.0.1", 6: "::1"}[spellings[-1].version]))
    for network in blocked:
        if any(address in _network(network) for address in spellings):
            raise BlockedTarget(f"{host} is blocked: dispatcher.blocked_networks has {network}")
    if allowed and not any(spellings[-1] in _network(network) for network in allowed):
        raise BlockedTarget(f"{host} is blocked: it is not in dispatcher.allowed_networks")


class Connection:
    """A connection to a target, and HTTP/1.1 on it (RFC 9112): strict and bounded.

    One worker uses it, others only cut(). Reading raises OSError, EOFError, or ValueError: no HTTP.
    """

    def __init__(self, key: Key, family: int) -> None:
        self.key = key
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.idle_since, self.reusable = 0, False  # reusable: the last answer was read to its end
        self._handle = self.socket.dup()
        self._received = bytearray()  # and not read yet

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
            return False
        except OSError as error:
            read_ahead = isinstance(self.socket, ssl.SSLSocket) and self.socket.pending()
            return isinstance(error, BlockingIOError) and not read_ahead

    def exchange(self, request: bytes, method: str, limit: int) -> Answer:
        """Send a request, return its answer with ``limit`` bytes of body, of more one more."""
        self.reusable = self.heard = sent = False
        self._line_bytes = MAX_HEAD_BYTES  # that the lines of this answer may still have
        try:
            with contextlib.suppress(OSError):  # it stopped reading: its answer may be there
                self.socket.sendall(request)
                sent = True
            self._receive(1)
            self.heard = True
            status, headers = self._read_head()
            while status[2].startswith("1"):  # 100 Continue, 103 Early Hints: not the answer yet
                status, headers = self._read_head()
            bare = method == "HEAD" or status[2] in ("204", "304")
            body = b"" if bare else self._read_body(headers, limit)
        except (OSError, EOFError, ValueError) as error:
            did = f"closed the connection {'amid its' if self.heard else 'without an'} answer"
            if isinstance(error, ValueError):
                did = f"sent what is not a proper HTTP answer: {error}"
            raise requests.ConnectionError(f"{self.key[0]} {did}") from error
        lasts = status[1] != "0" and "close" not in headers.get("connection", "").lower()
        clear = not {"transfer-encoding", "content-length"} <= headers.keys()  # RFC 9112, 6.1
        self.reusable = sent and lasts and clear and len(body) <= limit and not self._received
        return int(status[2]), status[3] or "", headers, body

    def _read_head(self) -> tuple[re.Match[str], dict[str, str]]:
        """Return the status line and the headers, different values of one joined by a comma."""
        headers: dict[str, str] = {}
        status = _STATUS_LINE.fullmatch(self._read_line())
        if not status:
            raise ValueError("a wrong status line")
        for number, line in enumerate(iter(self._read_line, "")):
            name, colon, value = line.partition(":")
            if not colon or line[0] in " \t" or number == MAX_HEADERS:
                raise ValueError("a wrong header or too many")
            name, value = name.strip().lower(), value.strip()
            known = headers.setdefault(name, value)
            headers[name] = value if known == value else f"{known}, {value}"
        return status, headers

    def _read_body(self, headers: dict[str, str], limit: int) -> bytes:
        """Return the body, at most one byte more than ``limit``."""
        if coding := headers.get("transfer-encoding"):
            if coding.lower() != "chunked":
                raise ValueError("a Transfer-Encoding other than chunked")
            return self._read_chunks(limit)
        length = headers.get("content-length")
        if length is None:
            headers["connection"] = "close"  # that is the end of the body
            with contextlib.suppress(EOFError):
                self._receive(limit + 1)
            return self._read(min(len(self._received), limit + 1))
        if not re.fullmatch("[0-9]{1,18}", length):
            raise ValueError("a wrong Content-Length")
        return self._read(min(int(length), limit + 1))

    def _read_chunks(self, limit: int) -> bytes:
        body, size = bytearray(), 1
        self._line_bytes += 8 * limit  # chunks of a single byte
        while size and len(body) <= limit:
            digits = self._read_line().partition(";")[0].strip()
            if not re.fullmatch("[0-9A-Fa-f]{1,16}", digits):
                raise ValueError("a wrong size of a chunk")
            size = int(digits, 16)
            body += self._read(min(size, limit + 1 - len(body)))
            while len(body) <= limit and self._read_line():
                if size:
                    raise ValueError("a chunk longer than its size")  # else it is a trailer
        return bytes(body)

    def _read_line(self) -> str:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_LINE_BYTES:
                raise ValueError("a line too long")
            self._receive(len(self._received) + 1)
        self._line_bytes -= end + 1
        if self._line_bytes < 0:
            raise ValueError("too much around its body")
        return self._read(end + 1)[:-1].decode("latin-1").removesuffix("\r")

    def _read(self, size: int) -> bytes:
        self._receive(size)
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def _receive(self, size: int) -> None:
        """Wait until so many bytes have been received and not read."""
        while len(self._received) < size:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self._received += data


class Dispatcher:
    """Runs attempts and owns the connections: send() in a worker, the watchdog beside."""

    def __init__(self, clock: Clock, settings: Json) -> None:
        self._clock = clock
        self._max_bytes: int = settings["dispatcher.max_response_bytes"]
        self._max_idle: int = settings["dispatcher.max_concurrent_jobs"]
        self._connect_timeout = parse_duration(settings["dispatcher.connect_timeout"])
        self._ca_bundle = settings["dispatcher.ca_bundle"] or requests.certs.where()  # type: ignore[attr-defined]
        self._networks = [settings[f"dispatcher.{x}_networks"] for x in ("blocked", "allowed")]
        self._idle: list[Connection] = []  # the oldest first
        self._lock = threading.Lock()  # protects _idle; one at a time reads certificates
        self._lookups = threading.BoundedSemaphore(MAX_LOOKUPS)
        self._in_flight: set[Attempt] = set()  # each worker adds and removes its own
        self._stopped = threading.Event()
        self.last_watch = clock.monotonic()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the watchdog."""
        self._watchdog.start()

    def stop(self) -> None:
        """Stop the watchdog and close what is idle."""
        self._stopped.set()
        self._watchdog.join()
        self.close_idle(0)

    def _watch(self) -> None:
        failed = False
        while not self._stopped.wait(WATCHDOG_TICK_S):
            try:
                now = self._clock.monotonic()
                for attempt in tuple(self._in_flight):
                    if attempt.limit <= now:
                        attempt.abort(attempt.allowed_reason)
                self.close_idle(IDLE_CONNECTION)
                self.last_watch, failed = now, False
            except Exception:  # no limit would hold any more
                if not failed:  # else it was said
                    log.exception("the watchdog goes on")
                failed = True

    def send(self, attempt: Attempt) -> Outcome:
        """Make the request and say how it ended. Never raises."""
        started_at, start = self._clock.now(), self._clock.monotonic()
        attempt.limit = start + attempt.allowed
        self._in_flight.add(attempt)
        try:
            result = self._judge(attempt.webhook, self._exchange(attempt))
        except requests.RequestException as error:
            reason = "blocked" if isinstance(error, BlockedTarget) else "no_answer"
            result = {"reason": reason, "error": str(error)}
            if attempt.reason:  # of any other abort than a timeout nobody sees the sentence
                result["error"] = f"there was no whole answer within the {attempt.reason}"
                result["reason"] = attempt.reason.replace("attempt_timeout", "no_answer")
        except Exception as error:  # a bug must not end the worker
            log.exception("execution %s goes wrong", attempt.execution.id)
            result = {"reason": "no_answer", "error": f"unexpected error: {type(error).__name__}"}
        finally:
            self._in_flight.discard(attempt)
        ended = self._clock.monotonic()
        return Outcome(attempt.execution, started_at, ended - start, ended, **result)

    def _judge(self, webhook: Webhook, answer: Answer) -> Json:
        """Return what an answer means, as fields of an Outcome."""
        code, phrase, headers, body = answer
        result = {"status_code": code, "response": self._text(headers, body, webhook)}
        if code in webhook.success_codes:
            return result | {"success": True}
        error = webhook.masked(f"the server answered {code} {phrase}".strip())[:200]
        error += ", which is not among success_codes" if 200 <= code < 300 else ""
        wait = parse_retry_after(headers.get("retry-after"), self._clock.now())
        return result | {"reason": "http_status", "error": error, "retry_after": wait}

    def _text(self, headers: dict[str, str], body: bytes, webhook: Webhook) -> str:
        """Return a body as text, cut with a mark at dispatcher.max_response_bytes."""
        charset = _CHARSET.search(headers.get("content-type", ""))
        text = str(body[: self._max_bytes], charset[1] if charset else "utf-8", "replace")
        if len(body) <= self._max_bytes:
            return webhook.masked(text)
        text = webhook.masked(text.rstrip("\ufffd"), cut=True)
        return f"{text}\n[cut off after {self._max_bytes} bytes]"

    def _exchange(self, attempt: Attempt) -> Answer:
        """Send the request on an idle connection, or on a new one. Raises RequestException."""
        webhook = attempt.webhook
        request, idle = webhook.to_bytes(attempt.execution), self._take_idle(webhook.wired[0])
        while True:
            connection = idle or self._connect(attempt)
            try:
                with attempt.blocking(connection.cut):
                    return connection.exchange(request, webhook.method, self._max_bytes)
            except requests.ConnectionError:
                if not idle or idle.heard:
                    raise
                idle = None  # it died while it was idle: a new one is tried
            finally:
                if connection.reusable and not attempt.reason:
                    connection.idle_since = self._clock.monotonic()
                    with self._lock:
                        self._idle.append(connection)
                else:
                    connection.close()

    def _take_idle(self, key: Key) -> Connection | None:
        while True:
            with self._lock:
                connection = next((c for c in reversed(self._idle) if c.key == key), None)
                if connection:
                    self._idle.remove(connection)
            if connection is None or connection.is_quiet():
                return connection
            connection.close()

    def close_idle(self, older_than: int) -> None:
        """Close the connections that have been idle for so many µs, or are too many."""
        limit = self._clock.monotonic() - older_than
        with self._lock:
            idle = self._idle
            while idle and (len(idle) > self._max_idle or idle[0].idle_since <= limit):
                idle.pop(0).close()

    def _connect(self, attempt: Attempt) -> Connection:
        """Resolve, check, dial and, for https, shake hands, within dispatcher.connect_timeout."""
        key = attempt.webhook.wired[0]
        parts = urlsplit(key[0])
        host = str(parts.hostname)
        with self._lock:  # so that only one of many reads the certificates
            tls = self._context(key[1]) if parts.scheme == "https" else None
        limit = self._clock.monotonic() + self._connect_timeout

        def left(shared_by: int = 1) -> float:
            return max((limit - self._clock.monotonic()) / SECOND / shared_by, 0.001)

        addresses = self._resolve(host, parts.port or 0, left(), attempt)
        for tried, (family, _kind, _protocol, _name, address) in enumerate(addresses):
            check_address(str(address[0]), *self._networks)
            connection = Connection(key, family)
            try:
                with attempt.blocking(connection.cut):
                    connection.socket.settimeout(left(len(addresses) - tried))
                    connection.socket.connect(address)
                    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if tls:
                        connection.socket.settimeout(left())  # of the whole handshake
                        connection.socket = tls.wrap_socket(connection.socket, server_hostname=host)
                    connection.socket.settimeout(None)  # from here on the watchdog is the limit
                return connection
            except OSError as error:
                connection.close()
                reason = "it took too long" if isinstance(error, TimeoutError) else error.strerror
                if isinstance(error, ssl.SSLError):
                    reason = (error.reason or "no answer").replace("_", " ").lower()
                    reason = f"TLS failed: {getattr(error, 'verify_message', reason)}"
                problem = f"no connection to {key[0]} at {address[0]}: {reason or error}"
        raise requests.ConnectionError(problem)

    @functools.lru_cache  # noqa: B019 - there is one dispatcher
    def _context(self, verify: bool) -> ssl.SSLContext:
        """Return the shared context: reading the authorities' certificates takes 40 ms."""
        context = ssl.create_default_context(cafile=self._ca_bundle)
        context.check_hostname = verify
        context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
        return context

    def _resolve(self, host: str, port: int, left: float, attempt: Attempt) -> list[Any]:
        """Return the addresses of a host. A look-up that hangs is left behind in its thread."""
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        with contextlib.suppress(socket.gaierror, UnicodeError):
            return look_up(flags=socket.AI_NUMERICHOST)
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()  # addresses, or what is wrong

        def run() -> None:
            if not self._lookups.acquire(timeout=LOOKUP_PATIENCE_S):
                found.put(f"DNS busy: {MAX_LOOKUPS} look-ups wait for an answer")
                return
            try:
                found.put(look_up())
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not a possible name"
                found.put(f"the name {host} cannot be resolved: {reason}")
            finally:
                self._lookups.release()

        threading.Thread(target=run, name=f"dns-{host}", daemon=True).start()
        addresses: list[Any] | str = f"no address of {host} within connect_timeout"
        with attempt.blocking(lambda: found.put("")), contextlib.suppress(queue.Empty):
            addresses = found.get(timeout=left)
        if isinstance(addresses, str):
            raise requests.ConnectionError(addresses)
        return addresses


# ==== 11. Engine: fire times become executions, executions become requests ============
#
# One thread is the only writer of the database. Each pass of it is one transaction, in this
# order: outcomes of attempts, fire times, changes of the API, take what is due. What others wait
# for happens after the commit, and only then: so whatever was told or sent is on disk.


class Version:
    """A row of Store.versions(), parsed once; shared by engine and workers, never changed."""

    def __init__(self, row: Json) -> None:
        self.job_id, self.number, self.config = (row[n] for n in ("job_id", "version", "config"))
        self.schedule = parse_schedule(self.config["schedule"])
        self.timeout = parse_duration(self.config["timeout"])
        own_limit = self.config["retry_policy"]["attempt_timeout"]
        self.attempt_timeout = parse_duration(own_limit or self.config["timeout"])
        self.webhook = Webhook(self.config["webhook"])
        if not self.config["webhook"]["verify_tls"]:
            log.warning("job %s takes any certificate: its verify_tls is false", self.job_id)


@dataclass(slots=True)
class Pass:
    """What one pass has done and owes: paid after its commit, forgotten if it fails."""

    now: int
    made: list[tuple[Future[Any], Any]] = field(default_factory=list)  # result or exception
    ended: dict[str, Execution] = field(default_factory=dict)  # also with their jobs deleted
    caught_up: set[str] = field(default_factory=set)  # jobs with missed fire times
    taken: list[Attempt] = field(default_factory=list)
    again: bool = False  # the next pass follows at once


class Engine:
    """Turns fire times into executions and these into requests. run_pass() is one pass.

    Workers and API threads put into _inbox, API threads their own into waiters; stop() sets both
    flags once, a reload settings; /health reads problem and last_pass. The engine owns the rest.
    """

    def __init__(self, store: Store, dispatcher: Dispatcher, settings: Json, clock: Clock) -> None:
        self.store, self.dispatcher, self.clock = store, dispatcher, clock
        self.settings = settings  # a reload replaces it
        self.paused: bool = settings["scheduler.paused"]
        self.stopping = False  # nothing is started any more
        self.problem: str | None = None  # why the last pass failed
        self.counts = defaultdict[str, float](int, chronos_store_errors_total=0)  # for /metrics
        self.last_pass = self._worked_at = clock.monotonic()
        self._grace = parse_duration(settings["scheduler.missed_run_grace"])
        self._workers: int = settings["dispatcher.max_concurrent_jobs"]
        self._per_target: int = settings["dispatcher.max_concurrent_per_host"]
        self._attempts = queue.SimpleQueue[Attempt | None]()
        self._version = functools.lru_cache(VERSION_CACHE)(
            lambda job_id, number: Version(store.versions(job_id, number)[0])
        )
        self._inbox = queue.SimpleQueue[Outcome | tuple[Future[Any], Change] | None]()
        self._outcomes: list[Outcome] = []  # kept until a pass has written them
        self._changes: deque[tuple[Future[Any], Change]] = deque()
        self._in_flight: dict[str, Attempt] = {}
        self.waiters: dict[str, threading.Event] = {}  # execution -> set when it has ended
        self._offset = clock.now() - clock.monotonic()  # a change of it is a step of the clock
        self._wake_at = 0  # nothing is due before this instant
        self._seen_at: int | None = None  # when the backlog was first seen, while there is one
        self._saved_at = 0  # last heartbeat
        self._held = False  # the clock is before the release date: nothing fires
        self._untidy: dict[str, None] = {}  # jobs whose history may be more than is kept
        self._walk: str | None = ""  # how far all jobs were looked at for that; None: to the end
        self._tidied_at = clock.monotonic()
        self._reported: dict[str, int] = {}  # kind of error -> when it was logged
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # --------------------------------------------------------------- called by other threads
    def start(self) -> None:
        """Take up what the last process left, and begin with the passes."""
        self.recover()
        self.dispatcher.start()
        for n in range(self._workers):  # all at once: none can fail to come when it is needed
            threading.Thread(target=self._worker, name=f"worker-{n + 1}", daemon=True).start()
        self._thread.start()

    def _worker(self) -> None:
        while attempt := self._attempts.get():
            self._inbox.put(self.dispatcher.send(attempt))

    def stop(self, grace: int) -> None:
        """Start nothing more, give what runs ``grace`` µs, leave the rest to the next start."""
        if not self._thread.is_alive():
            return  # the start did not get so far
        self.stopping = True
        for waiter in list(self.waiters.values()):
            waiter.set()
        with contextlib.suppress(ApiError):
            self.make(lambda _turn: None)  # after it no pass is under way that starts something
        deadline = self.clock.monotonic() + grace
        while self._in_flight and self.clock.monotonic() < deadline:
            time.sleep(0.02)
        self._stopped = True
        self._inbox.put(None)
        self._thread.join()
        for attempt in list(self._in_flight.values()):
            attempt.abort("shutdown")
        for _worker in range(self._workers):
            self._attempts.put(None)
        self.dispatcher.stop()

    def hand_in(self, change: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Give the engine a change to make in its next pass, inside a savepoint of its own."""
        future: Future[Result] = Future()
        if self._stopped:
            future.set_exception(ApiError("UNAVAILABLE", "the server is stopping"))
        else:
            self._inbox.put((future, lambda turn: change(turn, *arguments)))
        return future

    def make(self, change: Callable[..., Result], *arguments: Any) -> Result:
        """Return what a change returned, once on disk; where this raises, nothing has changed."""
        future = self.hand_in(change, *arguments)
        try:
            return future.result(WRITE_PATIENCE_S)
        except TimeoutError:
            if future.cancel():
                raise StoreError(f"nothing was changed within {WRITE_PATIENCE_S:g} s") from None
            return future.result()

    def silence(self) -> int:
        """Return how long ago the engine or the watchdog last went round, in µs."""
        return self.clock.monotonic() - min(self.last_pass, self.dispatcher.last_watch)

    # ---------------------------------------------- changes: call them through make(), any thread
    def create_job(self, turn: Pass, config: Json, enabled: bool, user: str) -> Job:
        """Add a job; where enabled, its schedule counts from now."""
        new = Job(str(uuid.uuid4()), 0, False, turn.now, turn.now, None, {})
        return self._update(turn, new, new._replace(config=config, enabled=enabled), user)

    def declare_jobs(self, turn: Pass, declared: dict[str, tuple[Json, bool, str]]) -> list[Job]:
        """Make jobs as declared; return those changed. A declaration as before keeps the state."""
        changed: list[Job] = []
        known = self.store.declared_jobs(list(declared))
        for job_id in dict.fromkeys([*declared, *sorted(known)]):
            new = Job(job_id, 0, False, turn.now, turn.now, None, {})
            job = self._settled_job(turn, job_id) if job_id in known else new
            config, enabled, digest = declared.get(job_id, (job.config, False, None))
            wanted = job._replace(config=config, declared=digest)
            if digest != job.declared:
                spent = enabled and wanted.next_after(turn.now) is None
                wanted = wanted._replace(enabled=enabled and not spent)
            if (made := self._update(turn, job, wanted, DECLARED_BY)) != job:
                changed.append(made)
        return changed

    def set_enabled(self, turn: Pass, job_id: str, enabled: bool) -> Job:
        """Enable or disable a job. A disabled one has no fire times; what is due runs on."""
        job = self._settled_job(turn, job_id)
        return self._update(turn, job, job._replace(enabled=enabled))

    def update_job(self, turn: Pass, base: Job, config: Json, state: bool | None, user: str) -> Job:
        """Replace the configuration of a job that is still as ``base``; None leaves its state."""
        job = self._settled_job(turn, base.id)
        if job.version != base.version:
            raise ApiError("PRECONDITION_FAILED", f"the job has version {job.version} by now")
        state = job.enabled if state is None else state
        return self._update(turn, job, job._replace(config=config, enabled=state), user)

    def roll_back(self, turn: Pass, job_id: str, number: int, user: str) -> Job:
        """Make a new version out of an older one; whether the job is enabled stays."""
        job = self._settled_job(turn, job_id)
        changed = job._replace(config=self.store.versions(job_id, number)[0]["config"])
        if changed.next_after(turn.now) is None:
            changed = changed._replace(enabled=False)
        return self._update(turn, job, changed, user, is_new=True)

    def _update(
        self, turn: Pass, job: Job, changed: Job, user: str = "", is_new: bool = False
    ) -> Job:
        """Write a changed job, a new version where its configuration is new, or ``is_new``."""
        is_new |= changed.config != job.config
        if is_new:
            changed = changed._replace(version=job.version + 1)
            if job.declared and user != DECLARED_BY:
                raise ApiError("CONFLICT", NOT_HERE)
        when = [(j.enabled, *map(j.config.get, ("schedule", "timezone"))) for j in (job, changed)]
        if not changed.enabled:
            changed = changed._replace(next_run_at=None)
        elif when[0] != when[1]:
            changed = changed._replace(next_run_at=changed.next_after(turn.now))
            if changed.next_run_at is None:
                raise ApiError("CONFLICT", f"{when[1][1]}: nothing comes any more")
        if changed != job:
            changed = changed._replace(updated_at=turn.now)
            self.store.save_job(changed, user if is_new else None)
        return changed

    def delete_job(self, turn: Pass, base: Job, unchanged: bool) -> None:
        """Remove a job, ``unchanged``: only one still as ``base``. Its history goes in batches."""
        job = self.store.job(base.id)
        if job.version != base.version and unchanged:
            raise ApiError("PRECONDITION_FAILED", "the job has another version by now")
        if job.declared:
            raise ApiError("CONFLICT", NOT_HERE)
        self.store.delete_job(job.id)
        self._version.cache_clear()  # a version that is not found: nothing of it is started
        self._untidy[job.id] = None
        active = self.store.active_executions(job.id, 1, sys.maxsize)
        turn.ended |= {execution.id: execution._replace(reason="deleted") for execution in active}

    def trigger(self, turn: Pass, job_id: str, new_id: str, replay_of: str | None = None) -> None:
        """Make an execution that is due now; ``replay_of``: that sends again what this one sent."""
        if self.paused:
            raise ApiError("CONFLICT", "this server is paused: it starts nothing")
        job = self.store.job(job_id)
        number, kind, at = job.version, "manual", turn.now
        if replay_of:
            original = self.store.execution_of(job_id, replay_of)
            number, kind, at = original.job_version, "replay", original.scheduled_at
        new = self._new(self._version(job_id, number), kind, at, turn.now)
        self._enqueue(turn, new._replace(id=new_id, replay_of=replay_of), job.config["concurrency"])

    def cancel(self, turn: Pass, job_id: str, execution_id: str, user: str) -> Execution:
        """Fail an execution that has not ended, and abort its request."""
        execution = self.store.execution_of(job_id, execution_id)
        if execution.completed_at is not None:
            raise ApiError("CONFLICT", f"{execution_id} has ended: {execution.status}")
        return self._end(turn, execution, "cancelled", f"cancelled by {user}")

    # ----------------------------------------------------------------------------- the passes
    def recover(self) -> None:
        """Take up what the last process left running: its attempt counts as interrupted."""
        now, mono = self.clock.now(), self.clock.monotonic()
        self._offset = max(self._offset, (self.store.number("last_seen") or 0) - mono)
        lost = "the server ended during the attempt: its outcome is unknown"
        for execution in self.store.executions(None, -1, status="running")[::-1]:
            at = execution.attempt_at or now
            self._outcomes.append(Outcome(execution, at, 0, mono, reason="interrupted", error=lost))

    def _loop(self) -> None:
        wait = 0
        while not self._stopped:
            try:
                wait = self.run_pass(wait)
            except Exception as error:  # a bug must not end the thread
                self._fail(Pass(self.clock.now()), error)
                wait = SECOND
        self.run_pass()  # what came in meanwhile is written; nothing is started
        self._fail(Pass(0), ApiError("UNAVAILABLE", "the server is stopping"))

    def run_pass(self, wait: int = 0) -> int:
        """Wait up to ``wait`` µs for news, do what is due; return the µs until something is."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get(wait > 0, wait / SECOND)
                wait = 0
                if isinstance(item, Outcome):
                    self._in_flight.pop(item.execution.id, None)
                    self._outcomes.append(item)
                elif item:
                    self._changes.append(item)
        turn = Pass(self.clock.now())
        try:
            step = turn.now - self.clock.monotonic() - self._offset
            due = turn.now >= self._wake_at or abs(step) > CLOCK_STEP
            if due or self._outcomes or self._changes:
                with self.store.transaction():
                    turn.now = self.clock.now()  # it may have waited for a lock
                    self._work(turn, step)
                if self.problem:
                    log.warning("the engine goes on")
                self.problem = None
        except Exception as error:
            self._fail(turn, error)
        else:
            self._offset += step
            self._settle(turn)
        self.counts["chronos_engine_passes_total"] += 1
        self.last_pass = self.clock.monotonic()
        return 0 if self._changes else max(0, min(self._wake_at - self.clock.now(), SECOND))

    def _work(self, turn: Pass, step: int) -> None:
        """The whole of a pass, inside its transaction."""
        self.store.check_file()
        self._look_at_clock(turn, step)
        for outcome in self._outcomes:
            self._record(turn, outcome)
        start = self.clock.monotonic()
        if start - self._worked_at > self._grace:
            self._seen_at = None  # the process was suspended amid a backlog
        self._worked_at = start
        due = self.store.due_jobs(turn.now, MAX_FIRES_PER_PASS) if self._fires() else []
        for job_id, number, fire_time in due:
            if self.clock.monotonic() - start < PASS_TARGET:  # else the next pass goes on
                self._fire(turn, job_id, number, fire_time)
        if self.settings["alerts.webhook"] and self.store.news(turn.now - ALERT_GATHER):
            self._changes.append((Future(), self._alert))  # so that a bug in it stops nothing else
        self._make_changes(turn)
        freed = turn.caught_up | {execution.job_id for execution in turn.ended.values()}
        self.store.release_oldest(freed, turn.now)
        if self.settings["alerts.webhook"]:
            self.store.note_news(freed, self.settings["alerts.after"], turn.now)
        if not (self.stopping or self.paused):
            self._take(turn)
        cursor, *others = self.store.next_instants(turn.now)
        instants = (self._saved_at + HEARTBEAT, cursor if self._fires() else None, *others)
        self._wake_at = min(instant for instant in instants if instant is not None)
        if cursor is None or cursor > turn.now:
            self._seen_at = None
        tidied_now = self.clock.monotonic() - self._tidied_at < PRUNE_INTERVAL
        busy = tidied_now and (turn.taken or self._outcomes)
        if (self._untidy if busy else self._tidy(turn)) or turn.again:
            self._wake_at = turn.now

    def _fires(self) -> bool:
        return not (self.paused or self._held or self.stopping)

    def _tidy(self, turn: Pass) -> bool:
        """Remove a batch of history that is not to be kept; return whether there may be more."""
        self._tidied_at = self.clock.monotonic()
        if self.store.prune_oldest(self.settings["retention.max_size"]):
            return True
        before, rows = turn.now - parse_duration(self.settings["retention.max_age"]), 0
        keep = self.settings["retention.executions_per_job"]
        for _look in range(PRUNE_JOBS):
            if self._walk is not None:
                self._walk = self.store.next_with_history(self._walk)
                self._untidy |= {self._walk: None} if self._walk else {}
            if not self._untidy:
                return False
            job_id = next(iter(self._untidy))  # the one that waits longest
            del self._untidy[job_id]
            if found := self.store.prune(job_id, before, keep):
                self._untidy[job_id] = None
                rows += found
            if rows >= PRUNE_ROWS:
                break
        return True

    def _settle(self, turn: Pass) -> None:
        """After the commit: tell everybody, abort what ended otherwise, start what was taken."""
        for outcome in self._outcomes:
            self._count_attempt(outcome)
            tried = outcome.execution
            if tried.id not in turn.ended and outcome.reason in LOUD_REASONS:  # it is tried again
                what = (tried.job_id, tried.id, tried.attempts, outcome.error)
                log.info("job %s: %s failed in attempt %s: %s", *what)
        self._outcomes.clear()
        for taken in turn.taken:
            self._in_flight[taken.execution.id] = taken
            self._attempts.put(taken)
        for future, result in turn.made:
            self._answer(future, result)
        for execution in turn.ended.values():
            if waiter := self.waiters.get(execution.id):
                waiter.set()
            if attempt := self._in_flight.get(execution.id):
                attempt.abort(str(execution.reason))
            if execution.completed_at is not None:  # else its job was deleted
                if execution.attempts:
                    self._observe("chronos_execution_duration_seconds", execution.spent)
                level = logging.WARNING if execution.reason in LOUD_REASONS else logging.INFO
                why = execution.error or f"the server answered {execution.status_code}"
                about = (execution.job_id, execution.id, execution.status, why)
                log.log(level, "job %s: %s %s: %s", *about)

    def _count_attempt(self, outcome: Outcome) -> None:
        execution = outcome.execution
        self.counts[f'chronos_attempts_total{{result="{outcome.reason or "success"}"}}'] += 1
        if execution.trigger == "schedule" and execution.attempts == 1:
            late = max(0, outcome.started_at - execution.scheduled_at)
            self._observe("chronos_lateness_seconds", late)

    def _observe(self, name: str, us: int) -> None:
        for bound, bucket in BUCKETS.items():
            self.counts[name + bucket] += us <= bound * SECOND
        self.counts[f"{name}_sum"] += us / SECOND
        self.counts[f"{name}_count"] += 1

    def _answer(self, future: Future[Any], result: Any) -> None:
        """Tell a writer what its change returned or raised; of a bug the log has more."""
        if isinstance(result, Exception) and not isinstance(result, ApiError):
            result = ApiError("INTERNAL_ERROR", "a bug: the server's log has more")
        tell = future.set_exception if isinstance(result, ApiError) else future.set_result
        tell(result)

    def _fail(self, turn: Pass, error: Exception) -> None:
        """The pass was rolled back: say why, once a minute; outcomes wait for the next pass."""
        kind, now = type(error).__name__, self.clock.monotonic()
        self.problem = str(error) or repr(error)
        self.counts["chronos_store_errors_total"] += isinstance(error, StoreError)
        if kind != "ApiError" and now - self._reported.get(kind, now - HOUR) > MINUTE:
            self._reported[kind] = now
            trace = None if isinstance(error, StoreError) else error
            log.error("the engine can't go on and tries again: %s", self.problem, exc_info=trace)
        waiting = [made for made in self._changes if made[0].set_running_or_notify_cancel()]
        for future, _change in turn.made + waiting:
            self._answer(future, error)
        self._changes.clear()
        self._version.cache_clear()  # what was rolled back may be in it
        self._wake_at = turn.now + SECOND
        self._saved_at, self._seen_at = 0, None  # what the pass has written or seen is void
        self._walk = ""

    # ------------------------------------------------------------------- the steps of a pass
    def _look_at_clock(self, turn: Pass, step: int) -> None:
        if not 0 <= turn.now - self._saved_at < HEARTBEAT:
            self.store.set_number("last_seen", turn.now)
            if turn.now // DAY != self._saved_at // DAY:
                self._walk = ""
            self._saved_at = turn.now
        held = turn.now < RELEASED_AT
        if held != self._held:
            self._held = held
            state = "can't be right: no job fires" if held else "is right again: jobs fire"
            log.warning("the clock shows %s, which %s", format_time(turn.now), state)
        if abs(step) > CLOCK_STEP:
            log.warning("the clock was moved by %s s", step / SECOND)
            self.store.shift_times(step, reset=step < -CLOCK_FAR_BACK and not held)
            self._seen_at = None

    def _record(self, turn: Pass, outcome: Outcome) -> None:
        """Write down how an attempt ended, unless its execution ended otherwise before."""
        version = self._version_of(turn, outcome.execution)
        if version is None:
            return
        ended_at = turn.now - (self.clock.monotonic() - outcome.ended)
        after = after_attempt(outcome, version.config["retry_policy"], version.timeout, ended_at)
        if self.store.save_execution(after, only_running=True) and after.completed_at:
            turn.ended[after.id] = after

    def _fire(self, turn: Pass, job_id: str, number: int, fire_time: int) -> None:
        """Enqueue a fire time, or deal with a whole backlog; move the cursor."""
        self._seen_at = self._seen_at or turn.now
        try:
            version = self._version(job_id, number)
            newest = fire_time
            if fire_time < RELEASED_AT:  # reset, or of a wrong clock: decades were not missed
                newest = turn.now
            elif self._seen_at - fire_time > self._grace:
                newest = self._catch_up(turn, version, fire_time)
            else:
                execution = self._new(version, "schedule", fire_time, turn.now)
                self._enqueue(turn, execution, version.config["concurrency"])
            cursor = version.schedule.next_after(newest, version.config["timezone"])
            self.store.move_cursor(job_id, cursor)
        except StoreError:
            raise
        except Exception:
            log.exception("job %s fires no more until it is enabled anew", job_id)
            self.store.move_cursor(job_id, None)

    def _settled_job(self, turn: Pass, job_id: str) -> Job:
        """Return a job with its due fire times in the ledger, so that no change erases them."""
        if self.stopping:  # no fire time is enqueued any more
            raise ApiError("UNAVAILABLE", "the server is stopping")
        job = self.store.job(job_id)
        while self._fires() and job.next_run_at is not None and job.next_run_at <= turn.now:
            self._fire(turn, job_id, job.version, job.next_run_at)
            job = self.store.job(job_id)
        return job

    def _catch_up(self, turn: Pass, version: Version, first: int) -> int:
        """Deal with missed fire times as the policy says; return the newest of them."""
        policy = version.config["missed_run_policy"] or self.settings["scheduler.missed_run_policy"]
        most = {"ignore": 0, "execute_one": 1, "execute_all": MAX_CATCH_UP}[policy]
        zone = version.config["timezone"]
        count, newest = version.schedule.backlog(first, turn.now, zone, most + 1)
        if count > most:
            last, count = newest[-most - 1], count - most
            period = f"from {format_time(first)} to {format_time(last)}"
            reason = f"{count} fire times {period} passed while no server was there"
            new = self._new(version, "schedule", last, None)
            new = new._replace(missed_count=count, missed_from=first, missed_to=last)
            missed = ended(new, "skipped", "missed", reason, turn.now)
            if self.store.add_execution(missed):
                turn.ended[missed.id] = missed
        for fire_time in newest[-most:] if most else ():
            self.store.add_execution(self._new(version, "catch_up", fire_time, None))
        turn.caught_up.add(version.job_id)
        return newest[-1]

    def _make_changes(self, turn: Pass) -> None:
        """Make what API threads have handed in; what would take too long stays for later."""
        start = self.clock.monotonic()
        while self._changes and self.clock.monotonic() - start < PASS_TARGET:
            future, change = self._changes.popleft()
            if not future.set_running_or_notify_cancel():
                continue  # its thread has given up
            turn.made.append((future, None))  # so _fail() finds it
            ended_before = dict(turn.ended)
            try:
                with self.store.transaction():
                    result = change(turn)
            except Exception as error:
                if not self.store.in_transaction:
                    raise
                turn.ended = ended_before
                if not isinstance(error, ApiError):
                    log.exception("a change failed")
                result = error
            turn.made[-1] = (future, result)

    def _alert(self, turn: Pass) -> None:
        """Tell of all jobs that have turned: one alert at a time, so that none is overtaken."""
        news = self.store.news(turn.now - ALERT_GATHER)
        if self.paused or not news or self.store.active_executions(ALERTS_ID, 1, 1):
            return
        lines = [f"Chronos on {self.settings['cluster.node_id']}:"]
        for job in news[:ALERT_JOBS]:
            last = self.store.executions(job["id"], 3, status="verdict")
            job["executions"] = [e._replace(response=None).to_json() for e in last]
            fails = f"fails: {last[0].error}" if last else "fails"
            lines.append(f"{job['name']} {fails if job['event'] == 'failed' else 'is well again'}")
        lines[11:] = [f"and {len(news) - 10} more"] if len(news) > 10 else []
        body = {"text": "\n".join(lines), "event": min(job["event"] for job in news)}
        body |= {"jobs_total": len(news), "jobs": news[:ALERT_JOBS]}
        config, _enabled = validate_job({
            "name": "alerts", "schedule": "@at 2000-01-01T00:00:00Z", "timeout": "1h",
            "webhook": self.settings["alerts.webhook"] | {"body": json.dumps(body)},
            "retry_policy": {"max_attempts": 10, "initial_interval": "5s", "max_interval": "10m",
                             "attempt_timeout": "10s"},
        }, self.settings["scheduler.default_retry_policy"], now=0)  # fmt: skip
        version = self._version(ALERTS_ID, self.store.save_alert(config, turn.now))
        self.store.add_execution(self._new(version, "alert", turn.now, turn.now))

    def _take(self, turn: Pass) -> None:
        """Start due executions, as many as workers are free and their targets may hold."""
        room = self._workers - len(self._in_flight)
        busy = Counter(attempt.webhook.target for attempt in self._in_flight.values())
        full = {target for target, count in busy.items() if count >= self._per_target}
        more = True
        while more and room > 0:
            more, started = False, []
            for execution in self.store.due_executions(turn.now, room, full):
                if busy[execution.target] >= self._per_target:
                    full.add(execution.target)
                    more = True  # look behind the ones that are passed over
                elif version := self._version_of(turn, execution):
                    started.append(self._attempt(turn, execution, version))
                    busy[execution.target] += 1
            if started:
                ids = [attempt.execution.id for attempt in started]
                self.store.start_executions(ids, turn.now, self.settings["cluster.node_id"])
                turn.taken += started
                room -= len(started)

    def _version_of(self, turn: Pass, execution: Execution) -> Version | None:
        """Return the version that an execution runs; None: it can't run any more, nor stays."""
        try:
            return self._version(execution.job_id, execution.job_version)
        except StoreError:
            raise
        except ApiError:
            self.store.delete_execution(execution.id)
        except (LookupError, TypeError, ValueError) as error:  # another release took it
            log.exception("execution %s can't go on", execution.id)
            self._end(turn, execution, "no_answer", f"its configuration is not understood: {error}")
            self.store.release_oldest({execution.job_id}, turn.now)
        self._untidy[execution.job_id] = None
        turn.again = True  # others may be due behind it
        return None

    def _attempt(self, turn: Pass, execution: Execution, version: Version) -> Attempt:
        started = execution._replace(
            status="running", attempts=execution.attempts + 1, attempt_at=turn.now,
            started_at=execution.started_at or turn.now, node_id=self.settings["cluster.node_id"],
        )  # fmt: skip
        limit = (version.timeout - execution.spent, "timeout")
        if version.attempt_timeout < limit[0]:
            limit = (version.attempt_timeout, "attempt_timeout")
        return Attempt(started, version.webhook, *limit)

    def _new(self, version: Version, trigger: str, at: int, due_at: int | None) -> Execution:
        """Return a pending execution for a fire time, with the one id that it can have."""
        self._untidy[version.job_id] = None
        fire_id = f"exec-{uuid.uuid5(uuid.UUID(version.job_id), str(format_time(at)))}"
        target = version.webhook.target
        head = (fire_id, version.job_id, version.number, trigger, "pending", at, target, due_at)
        return Execution(*head, node_id=self.settings["cluster.node_id"])

    def _enqueue(self, turn: Pass, execution: Execution, concurrency: str) -> None:
        """Add an execution that is not in the ledger: pending, or skipped as the policy has it."""
        least = MAX_ACTIVE if concurrency == "allow" else 1
        most = MAX_ACTIVE if concurrency == "replace" else 1
        others = self.store.active_executions(execution.job_id, least, most)
        if others and concurrency != "replace":
            error = f"{others[0].id} was still {others[0].status}"
            error = f"{MAX_ACTIVE} executions had not ended" if concurrency == "allow" else error
            execution, others = ended(execution, "skipped", "overlap", error, turn.now), []
        if self.store.add_execution(execution):
            turn.ended |= {execution.id: execution} if execution.completed_at is not None else {}
            for other in others:
                self._end(turn, other, "replaced", f"replaced by {execution.id}")

    def _end(self, turn: Pass, execution: Execution, reason: str, error: str) -> Execution:
        """Fail an execution that has not ended, and abort its request after the commit."""
        execution = ended(execution, "failed", reason, error, turn.now)
        self.store.save_execution(execution)
        turn.ended[execution.id] = execution
        return execution


# ==== 12. API: a table of routes; each handler parses, calls and answers ==============
#
# Every answer is JSON in one envelope: {"success": …, "data": …, "error": …}.


def envelope(data: Any, error: ApiError | None = None) -> bytes:
    """Return the body of an answer."""
    details = {"details": error.details} if error and error.details else {}
    told = error and {"code": error.code, "message": str(error), **details}
    answer = {"success": not error, "data": data, "error": told}
    return json.dumps(answer, allow_nan=False).encode() + b"\n"


def read_json() -> Any:
    """Return the body of the request as JSON (RFC 8259). Raises ApiError."""
    body = bottle.request.environ["wsgi.input"].read()  # waitress has bounded it
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except ValueError as error:
        raise ApiError("INVALID_JSON", f"the body is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    if len(dict(pairs)) < len(pairs):
        name = Counter(name for name, _value in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {name!r} is there twice")
    return dict(pairs)


# fmt: off
EXECUTIONS_QUERY = {
    "limit":    Field(query_number(1, 100),                         20),
    "before":   Field(text(100),                                    None),
    "status":   Field(one_of(*EXECUTION_STATUSES),                  None),
}
JOBS_QUERY = {
    "limit":    Field(query_number(1, 1_000_000),                   -1),
    "offset":   Field(query_number(0, 1_000_000_000),               0),
    "enabled":  Field(lambda word: one_of("true", "false")(word) == "true", None),
    "q":        Field(text(200),                                    None),
    "status":   Field(one_of(*EXECUTION_STATUSES),                  None),
}
PREVIEW_QUERY = {
    "schedule": Field(_schedule),
    "timezone": Field(_timezone,                                    "UTC"),
    "count":    Field(query_number(1, 100),                         5),
    "from":     Field(parse_time,                                   None),
}
# fmt: on


class SignIn:
    """HTTP Basic authentication (RFC 7617); unknown users cost as much as known ones."""

    def __init__(self, settings: Json, clock: Clock) -> None:
        self._users, self.viewers = settings["auth.users"], settings["auth.viewers"]
        self._clock = clock
        self._failures: deque[tuple[str, int]] = deque(maxlen=1000)  # addresses, and when
        self._lock = threading.Lock()  # for _failures; and one hash at a time: 50 ms and 16 MB
        self._verified = functools.lru_cache(1000)(self._verify)  # it keeps who was right

    def user(self, header: str, reads: bool) -> str:
        """Return who sends these credentials. Raises ApiError: 401, 403 or 429."""
        name = self._verified(header)
        if name in self.viewers and not reads:
            raise ApiError("FORBIDDEN", f"{name} may only read: see auth.viewers")
        return name

    def _verify(self, header: str) -> str:
        name, password = bottle.parse_auth(header) or ("", None)
        known = self._users.get(name, f"scrypt:{'00' * 16}:")
        if password is not None:
            if not self._lock.acquire(timeout=0.1):
                raise self._too_many(SECOND)
            try:
                now, address = self._clock.monotonic(), bottle.request.environ.get("REMOTE_ADDR")
                waits = [at + MINUTE - now for who, at in self._failures if who == address]
                if len(waits) >= 10 and waits[-10] > 0:
                    raise self._too_many(waits[-10])
                hashed = hash_password(password.encode(), bytes.fromhex(known.split(":")[1]))
                if hmac.compare_digest(hashed, known):
                    return str(name)
                self._failures.append((address, now))
                log.warning("somebody at %s could not sign in as %s", address, name[:100])
            finally:
                self._lock.release()
        asks = "xBasic" if "X-Chronos-UI" in bottle.request.headers else "Basic"  # no dialog
        bottle.response.set_header("WWW-Authenticate", f'{asks} realm="Chronos", charset="UTF-8"')
        raise ApiError("UNAUTHORIZED", "user name and password are missing or wrong")

    def _too_many(self, wait: int) -> ApiError:
        bottle.response.set_header("Retry-After", str(wait // SECOND + 1))
        return ApiError("TOO_MANY_REQUESTS", "too many sign-ins at once, or wrong ones in a minute")


HEADERS = {
    "Content-Type": "application/json", "Cache-Control": "no-store", "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}  # fmt: skip
PAGE_POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Api:
    """The HTTP interface, as a WSGI application. Its methods run in waitress's threads."""

    # fmt: off
    ROUTES = (
        ("GET",    "/",                                                 "page"),
        ("GET",    "/health",                                           "health"),
        ("GET",    "/metrics",                                          "metrics"),
        ("GET",    "/api/v1/jobs",                                      "list_jobs"),
        ("POST",   "/api/v1/jobs",                                      "create_job"),
        ("GET",    "/api/v1/jobs/<job_id>",                             "get_job"),
        ("PUT",    "/api/v1/jobs/<job_id>",                             "change_job"),
        ("PATCH",  "/api/v1/jobs/<job_id>",                             "change_job"),
        ("DELETE", "/api/v1/jobs/<job_id>",                             "delete_job"),
        ("POST",   "/api/v1/jobs/<job_id>/enable",                      "enable_job"),
        ("POST",   "/api/v1/jobs/<job_id>/disable",                     "disable_job"),
        ("POST",   "/api/v1/jobs/<job_id>/trigger",                     "trigger_job"),
        ("GET",    "/api/v1/jobs/<job_id>/executions",                  "list_executions"),
        ("GET",    "/api/v1/jobs/<job_id>/executions/<exec_id>",        "get_execution"),
        ("POST",   "/api/v1/jobs/<job_id>/executions/<exec_id>/replay", "replay_execution"),
        ("POST",   "/api/v1/jobs/<job_id>/executions/<exec_id>/cancel", "cancel_execution"),
        ("GET",    "/api/v1/jobs/<job_id>/versions",                    "list_versions"),
        ("GET",    "/api/v1/jobs/<job_id>/versions/<number:re:[0-9]{1,9}>", "list_versions"),
        ("POST",   "/api/v1/jobs/<job_id>/rollback/<number:re:[0-9]{1,9}>", "roll_back_job"),
        ("GET",    "/api/v1/executions",                                "list_executions"),
        ("GET",    "/api/v1/schedules/preview",                         "preview_schedule"),
        ("GET",    "/api/v1/schedules/upcoming",                        "upcoming"),
        ("GET",    "/api/v1/cluster/status",                            "cluster_status"),
        ("GET",    "/api/v1/stats",                                     "stats"),
    )
    # fmt: on

    def __init__(self, engine: Engine, store: Store, settings: Json, clock: Clock) -> None:
        self.engine, self.store, self.clock = engine, store, clock
        self._retry_policy: Json = settings["scheduler.default_retry_policy"]
        self._node_id, self._started = settings["cluster.node_id"], clock.monotonic()
        self.sign_in: SignIn | None = None
        own = ("", "localhost", platform.node(), *settings["server.allowed_hosts"])
        self._hosts = {name.lower() for name in own}
        self._may_wait = threading.BoundedSemaphore(settings["server.http.threads"] - 4)
        self.app = bottle.Bottle()
        for method, path, name in self.ROUTES:
            self.app.route(path, method, functools.partial(self._handle, getattr(self, name)))
        self.app.default_error_handler = self._bottle_error

    def _log_request(self) -> None:
        request, status = bottle.request, bottle.response.status_code
        who = f"{self._user()} at {request.environ.get('REMOTE_ADDR')}"
        log.debug("%s %s: %s for %s", request.method, request.path, status, who)

    def _handle(self, handler: Callable[..., Any], **path: str) -> bytes:
        """Call a handler and put what it returns, or raises, into the envelope."""
        environ = bottle.request.environ
        bottle.response.headers.update(HEADERS)
        try:
            raw_path = environ["bottle.raw_path"]
            raw_path.encode("latin-1").decode()  # Bottle drops what is not UTF-8
            if raw_path.endswith("\n"):  # Bottle's routes let that pass
                raise ApiError("NOT_FOUND", "there is nothing")
            if handler != self.health:
                self._check_sender(environ, handler)
            result = handler(**path)
            if isinstance(result, bytes):  # not in the envelope
                return result
            status, data = result if isinstance(result, tuple) else (200, result)
            return self._answer(data, status=status)
        except ApiError as error:
            return self._answer(None, error)
        except UnicodeDecodeError:
            return self._answer(None, ApiError("VALIDATION_ERROR", "the URL is not UTF-8"))
        except RecursionError:
            return self._answer(None, ApiError("INVALID_JSON", "the body is nested too deep"))
        except Exception:
            log.exception("%s %s failed", bottle.request.method, bottle.request.path)
            bug = ApiError("INTERNAL_ERROR", "a bug: the server's log has more")
            return self._answer(None, bug)
        finally:
            self._log_request()

    def _check_sender(self, environ: Json, handler: Callable[..., Any]) -> None:
        """Refuse foreign hosts, foreign pages and unknown users. Raises ApiError."""
        is_public = handler == self.metrics and self.engine.settings["metrics.public"]
        reads = bottle.request.method in ("GET", "HEAD", "OPTIONS")  # safe: RFC 9110, 9.2.1
        host = environ.get("HTTP_HOST", "").lower()
        name = re.sub(":[0-9]*$", "", host)
        is_own = name in self._hosts or re.fullmatch(r"[0-9.]+|\[[0-9a-f:.]+\]", name)
        sign_in = None if is_public else self.sign_in  # a reload may replace it
        if not sign_in and not is_own:  # a page may have rebound its name
            raise ApiError("FORBIDDEN", f"the name {host} is not among server.allowed_hosts")
        if not reads:
            name = re.sub(":(80|443)$", "", host)
            own = (f"http://{name}", f"http://{name}:80", f"https://{name}", f"https://{name}:443")
            origin = environ.get("HTTP_ORIGIN", own[0]).lower()
            site = environ.get("HTTP_SEC_FETCH_SITE", "none")
            if origin not in own or site not in ("none", "same-origin"):
                message = "a page of another site must not change anything here"
                raise ApiError("FORBIDDEN", f"{message} (behind a proxy: server.trusted_proxy)")
        if sign_in:
            environ["chronos.user"] = sign_in.user(environ.get("HTTP_AUTHORIZATION", ""), reads)

    def _bottle_error(self, error: Any) -> bytes:
        """Answer what never reached a handler: unknown paths and wrong methods."""
        bottle.response.headers.update(HEADERS)
        place = f"{bottle.request.method} {bottle.request.path}"
        codes = {400: "VALIDATION_ERROR", 404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
        code = codes.get(error.status_code, "INTERNAL_ERROR")
        if code == "INTERNAL_ERROR":
            log.error("%s failed", place, exc_info=error.exception)
        answer = self._answer(None, ApiError(code, f"{place}: {error.body}"))
        self._log_request()
        return answer

    def _answer(self, data: Any, error: ApiError | None = None, status: int = 200) -> bytes:
        bottle.response.status = STATUS[error.code] if error else status
        return envelope(data, error)

    def _user(self) -> str:
        return str(bottle.request.environ.get("chronos.user", "anonymous"))

    def health(self) -> Json:
        """Say whether the engine passes and the store can write."""
        if problem := self._problem():
            raise ApiError("UNAVAILABLE", problem)
        return {"status": "healthy", "timestamp": format_time(self.clock.now() // SECOND * SECOND)}

    def _problem(self) -> str | None:
        silent = self.engine.silence()
        hung = f"a thread has been silent for {silent // SECOND} s"
        return self.engine.problem or (hung if silent > SILENCE_LIMIT else None)

    def metrics(self) -> bytes:
        """Return what Prometheus scrapes, in its text format."""
        began = self.clock.now() - self.clock.monotonic() + self._started
        counts, pages = self.store.counts(), int(Path("/proc/self/statm").read_text().split()[1])
        samples = self.engine.counts | {
            f'chronos_build_info{{version="{__version__}"}}': 1,
            "chronos_is_leader": 1,
            "chronos_last_pass_age_seconds": self.engine.silence() / SECOND,
            'chronos_jobs{state="enabled"}': counts["enabled"],
            'chronos_jobs{state="disabled"}': counts["jobs_total"] - counts["enabled"],
            "chronos_failing_jobs": counts["failing"],
            'chronos_executions{status="pending"}': counts["pending"],
            'chronos_executions{status="running"}': counts["running"],
            "process_start_time_seconds": began // SECOND,
            "process_resident_memory_bytes": pages * resource.getpagesize(),
            "process_open_fds": len(os.listdir("/proc/self/fd")),
        }
        for result, number in self.store.ends_since(0).items():
            samples[f'chronos_executions_ended_total{{result="{result}"}}'] = number
        families: dict[str, str] = {}
        for series, value in samples.items():
            name = re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", series)
            families[name] = f"{families.get(name, '')}{series} {value}\n"
        bottle.response.content_type, text = "text/plain; version=0.0.4; charset=utf-8", ""
        for name, lines in families.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            kind = "histogram" if "_bucket" in lines else kind
            text += f"# HELP {name} See the README of Chronos.\n# TYPE {name} {kind}\n{lines}"
        return text.encode()

    def list_jobs(self) -> Json:
        """Return the jobs that match, in the order of their creation."""
        query = self._query(JOBS_QUERY)
        limit, offset = query.pop("limit"), query.pop("offset")
        query["tags"] = [t.partition(":")[::2] for t in bottle.request.query.decode().getall("tag")]
        jobs, total = self.store.jobs(query, limit, offset)
        return {"jobs": self._jobs_json(jobs), "total": total}

    def create_job(self) -> tuple[int, Json]:
        """Create a job."""
        config, enabled = validate_job(read_json(), self._retry_policy, self.clock.now())
        job = self.engine.make(self.engine.create_job, config, enabled, self._user())
        log.info("job %s (%s) was created by %s", job.id, config["name"], self._user())
        return 201, self._show_job(job, is_new=True)

    def get_job(self, job_id: str) -> Json:
        """Return one job."""
        return self._show_job(self.store.job(job_id))

    def change_job(self, job_id: str) -> Json:
        """Replace a configuration (PUT) or what the body names of it (PATCH: a merge patch)."""
        body, patches = read_json(), bottle.request.method == "PATCH"
        while True:  # until no other change comes between
            base = self.store.job(job_id)
            self._check_match(base)
            shown = masked_config(base.config) | {"enabled": base.enabled}
            data = merge_patch(shown, body) if patches else body
            now = self.clock.now()
            config, enabled = validate_job(data, self._retry_policy, now, base.config)
            state = None if patches and "enabled" not in body else enabled
            try:
                job = self.engine.make(self.engine.update_job, base, config, state, self._user())
                break
            except ApiError as error:
                if error.code != "PRECONDITION_FAILED" or "If-Match" in bottle.request.headers:
                    raise
        note = ", which disabled it" if base.enabled and not job.enabled else ""
        log.info("job %s was changed by %s%s", job_id, self._user(), note)
        return self._show_job(job)

    def _check_match(self, job: Job) -> None:
        """Raise PRECONDITION_FAILED if If-Match names other versions (RFC 9110, 13.1.1)."""
        wanted = bottle.request.headers.get("If-Match", "*")
        if wanted != "*" and f'"{job.version}"' not in map(str.strip, wanted.split(",")):
            raise ApiError("PRECONDITION_FAILED", f"the job has version {job.version} by now")

    def delete_job(self, job_id: str) -> Json:
        """Delete a job and its history."""
        job = self.store.job(job_id)
        self._check_match(job)
        self.engine.make(self.engine.delete_job, job, "If-Match" in bottle.request.headers)
        log.info("job %s was deleted by %s", job_id, self._user())
        return {"id": job_id}

    def enable_job(self, job_id: str, enabled: bool = True) -> Json:
        """Let the job's schedule fire, from now on; or stop its fire times."""
        job = self.engine.make(self.engine.set_enabled, job_id, enabled)
        log.info("job %s was %s by %s", job_id, "enabled" if enabled else "disabled", self._user())
        return self._show_job(job)

    disable_job = functools.partialmethod(enable_job, enabled=False)

    def _jobs_json(self, jobs: list[Job], has_ended: bool = False) -> list[Json]:
        last = self.store.last_executions(jobs, has_ended)
        return [job.to_json(last.get(job.id)) for job in jobs]

    def _show_job(self, job: Job, is_new: bool = False) -> Json:
        bottle.response.set_header("ETag", f'"{job.version}"')
        return job.to_json(None) if is_new else self._jobs_json([job])[0]

    def list_versions(self, job_id: str, number: str | None = None) -> list[Json] | Json:
        """Return the versions of a job, the newest first, or one."""
        self.store.job(job_id)
        versions = self.store.versions(job_id, int(number) if number else None)
        for version in versions:
            version["config"] = masked_config(version["config"])
            version["created_at"] = format_time(version["created_at"])
        return versions[0] if number else versions

    def roll_back_job(self, job_id: str, number: str) -> Json:
        """Make a new version out of an older one."""
        job = self.engine.make(self.engine.roll_back, job_id, int(number), self._user())
        log.info("job %s was rolled back to version %s by %s", job_id, number, self._user())
        shown = self._show_job(job)
        return {"job": shown, "rolled_back_from": int(number), "new_version": job.version}

    def trigger_job(self, job_id: str) -> tuple[int, Json]:
        """Run the job now, and wait for the end as far as ``?wait=`` and free threads allow."""
        wait = self._query({"wait": Field(parse_duration, None)})["wait"]
        engine, execution_id = self.engine, f"exec-{uuid.uuid4()}"
        ended = engine.waiters[execution_id] = threading.Event()  # from before the commit on
        try:
            engine.make(engine.trigger, job_id, execution_id)
            log.info("job %s was triggered by %s: %s", job_id, self._user(), execution_id)
            if not engine.stopping and self._may_wait.acquire(blocking=False):
                try:
                    ended.wait(None if wait is None else min(wait, DAY) / SECOND)
                finally:
                    self._may_wait.release()
        finally:
            del engine.waiters[execution_id]
        execution = self.store.execution_of(job_id, execution_id)
        unanswered = execution.reason in ("no_answer", "timeout", "blocked")
        if unanswered and execution.status_code is None:
            raise ApiError("EXECUTION_ERROR", f"{execution_id} failed: {execution.error}")
        return (200 if execution.completed_at else 202), execution.to_json()

    def list_executions(self, job_id: str | None = None) -> Json:
        """Return the newest executions of a job, or over all jobs without what was answered."""
        limit, before, status = self._query(EXECUTIONS_QUERY).values()
        if job_id:
            self.store.job(job_id)
        if before:
            self.store.execution_of(job_id, before)
        found = self.store.executions(job_id, limit + 1, before, status)
        shown = [execution.to_json() for execution in found[:limit]]
        if job_id:
            return {"executions": shown, "total": self.store.count_executions(job_id, status)}
        for execution in shown:
            del execution["response"]
        return {"executions": shown, "has_more": len(found) > limit}

    def get_execution(self, job_id: str, exec_id: str) -> Json:
        """Return one execution with its attempts and what it sends."""
        execution = self.store.execution_of(job_id, exec_id)
        [version] = self.store.versions(job_id, execution.job_version)
        config = masked_config(version["config"])["webhook"]
        headers = Webhook(config).request.headers.items()
        request = {name: config[name] for name in ("method", "url", "body")}
        request["headers"] = {n: MASK if is_secret_header(n) else v for n, v in headers}
        more = {"attempt_log": json.loads(execution.attempt_log), "request": request}
        return execution.to_json() | more

    def replay_execution(self, job_id: str, exec_id: str) -> tuple[int, Json]:
        """Send again what an execution sent."""
        replay_id = f"exec-{uuid.uuid4()}"
        self.engine.make(self.engine.trigger, job_id, replay_id, exec_id)
        log.info("job %s: %s replays %s for %s", job_id, replay_id, exec_id, self._user())
        ids = {"replay_execution_id": replay_id, "original_execution_id": exec_id}
        return 202, ids | {"message": "Execution replay triggered"}

    def cancel_execution(self, job_id: str, exec_id: str) -> Json:
        """End an execution that is pending or running."""
        return self.engine.make(self.engine.cancel, job_id, exec_id, self._user()).to_json()

    def preview_schedule(self) -> Json:
        """Return the next fire times of a schedule that no job needs to have."""
        query = self._query(PREVIEW_QUERY)
        schedule = parse_schedule(query["schedule"])
        after = self.clock.now() if query["from"] is None else query["from"]
        runs = preview(schedule, after, query["timezone"], query["count"])
        return {"next_runs": list(runs), "warnings": schedule.warnings}

    def cluster_status(self) -> Json:
        """Return what the whole of Chronos is doing: this one node."""
        soonest = self.store.due_jobs(sys.maxsize, 10)
        next_runs = [{"job_id": job, "next_run": format_time(at)} for job, _n, at in soonest]
        node = {"is_leader": True, "node_id": self._node_id, "version": __version__}
        node["uptime"] = (self.clock.monotonic() - self._started) // SECOND
        return node | self.store.counts() | {"next_runs": next_runs}

    def upcoming(self) -> Json:
        """Return the next fire times of the jobs that fire soonest."""
        hours = self._query({"hours": Field(query_number(1, 168), 24)})["hours"]
        until, found = self.clock.now() + hours * HOUR, []
        for job_id, _version, first in self.store.due_jobs(until, 100):
            try:
                job = self.store.job(job_id)
            except ApiError as error:
                if error.code != "NOT_FOUND":
                    raise
                continue  # it was deleted meanwhile
            schedule, zone = parse_schedule(job.config["schedule"]), job.config["timezone"]
            later = schedule.fire_times(first, zone, until)
            times = [format_time(at) for at in (first, *islice(later, 50))]
            about = {"job_id": job_id, "job_name": job.config["name"]}
            found.append({**about, "fire_times": times[:50], "has_more": len(times) > 50})
        return {"upcoming": found, "until": format_time(until)}

    def stats(self) -> bytes | Json:
        """Return what the dashboard polls, or 304 if it has that; of at most 1,000 jobs."""
        changes, problem, user = self.store.changes, self._problem(), self._user()
        viewers = sign_in.viewers if (sign_in := self.sign_in) else ()
        if self._is_known(f"{self._started}-{changes}-{problem}-{user}"):
            return b""
        jobs = self._jobs_json(self.store.jobs({}, 1000, 0)[0], has_ended=True)
        for job in jobs:
            del job["webhook"]  # it may be large
        now, active = self.clock.now(), [e.to_json() for e in self.store.active(50)]
        return self.cluster_status() | {
            "now": format_time(now), "user": user, "may_write": user not in viewers,
            "paused": self.engine.paused, "problem": problem, "active": active, "jobs": jobs,
            "last_24h": self.store.ends_since(now - DAY),
        }  # fmt: skip

    def page(self) -> bytes:
        """Return the dashboard; it holds no data."""
        parts = re.findall(r"(?s)<(style|script)>(.*?)</\1>", DASHBOARD_HTML)
        digests = [hashlib.sha256(part.encode()).digest() for _tag, part in parts]
        policy = PAGE_POLICY.format(*(base64.b64encode(digest).decode() for digest in digests))
        own = {"Cache-Control": "no-cache", "Content-Security-Policy": policy}
        bottle.response.headers.update(own | {"Content-Type": "text/html; charset=utf-8"})
        return b"" if self._is_known(policy) else DASHBOARD_HTML.encode()

    def _is_known(self, state: str) -> bool:
        """Set an ETag for this state, and 304 if the request has that (RFC 9110, 13.1.2)."""
        etag = f'"{hashlib.sha256(state.encode()).hexdigest()[:16]}"'
        bottle.response.set_header("ETag", etag)
        known = etag in bottle.request.headers.get("If-None-Match", "")
        bottle.response.status = 304 if known else 200
        return known

    def _query(self, table: dict[str, Field]) -> Json:
        query = bottle.request.query.decode()
        return validate(table, dict(query), frozenset(query))


# ==== 13. Service and command line ====================================================


def lock_data_dir(directory: Path) -> IO[str]:
    """Create the directory, locked for as long as the returned file is open. Raises StartError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(directory / "chronos.lock", "a+", buffering=1)  # noqa: SIM115 - held for life
        lock.seek(0)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        return lock
    except BlockingIOError:
        with lock:
            message = f"already running on {directory}, process {lock.read().strip()}"
        raise StartError(EXIT_RUNNING, message) from None
    except OSError as error:
        message = f"the data directory {directory} is unusable: {error.strerror}"
        raise StartError(EXIT_CONFIG, message) from error


class RequestParser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """waitress's parser, but a request line that urllib can't split does not end the thread."""

    def received(self, data: bytes) -> int:
        """Take what has come; ask for no body where none is to come or it is refused."""
        taken: int = super().received(data)
        if self.completed:
            self.expect_continue = False
        return taken

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head of a request. Raises ParsingError, which is answered with 400."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            raise waitress.parser.ParsingError(str(error)) from error
        both = self.chunked and "CONTENT_LENGTH" in self.headers  # RFC 9112, 6.1
        if both or "TRANSFER_ENCODING" in self.headers:  # left there by HTTP/1.0
            raise waitress.parser.ParsingError("Transfer-Encoding with Content-Length or HTTP/1.0")


class JsonErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """Answers in the envelope what waitress refuses: what is not HTTP, or too large."""

    def execute(self) -> None:
        """Write the answer, with the status that waitress chose."""
        error = self.request.error
        code, message = "VALIDATION_ERROR", f"{error.reason}: {error.body}"
        if error.code == 413:
            code, message = "PAYLOAD_TOO_LARGE", f"the body has more than {MAX_BODY_BYTES} bytes"
        heads = getattr(self.request, "command", "") == "HEAD"
        body = b"" if heads else envelope(None, ApiError(code, message))
        answer = f"{error.code} {error.reason}", [*HEADERS.items()], body
        error.to_response = lambda *_: answer
        super().execute()


class Service:
    """Everything that runs: start() returns when requests are taken, stop() when all has ended."""

    def __init__(self, settings: Json, clock: Clock | None = None) -> None:
        self.settings, clock = settings, clock or Clock()
        self.data_dir = Path(settings["cluster.data_dir"])
        self.store = Store(self.data_dir / "chronos.db", settings["store.synchronous"])
        self.engine = Engine(self.store, Dispatcher(clock, settings), settings, clock)
        self.api = Api(self.engine, self.store, settings, clock)
        self._open = contextlib.ExitStack()  # what stop() closes last
        self._channels: dict[int, Any] = {}  # waitress's sockets
        self._server: Any = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where the API answers."""
        host, port = self._server.effective_host, self._server.effective_port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        """Lock, open, bind, run. Raises StartError or StoreError."""
        self._open.enter_context(lock_data_dir(self.data_dir))
        self._open.callback(self.store.close)
        self.store.open()
        address = self.settings["server.http.address"]
        host, port = split_address(address)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=1024)
        except (OSError, UnicodeError) as error:
            message = f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}"
            raise StartError(EXIT_FAILED, message) from error
        self._open.enter_context(listener)
        self.engine.start()
        self.reload(self.settings)  # nobody comes in before it is known who may
        proxy = self.settings["server.trusted_proxy"]
        forwarded = ("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto") if proxy else ()
        self._server = waitress.create_server(
            self.api.app, map=self._channels, sockets=[listener],
            threads=self.settings["server.http.threads"], connection_limit=1000,
            channel_timeout=30, cleanup_interval=5, ident=None, clear_untrusted_proxy_headers=True,
            asyncore_use_poll=True,  # select() ends the process at descriptor 1024
            max_request_body_size=MAX_BODY_BYTES + 1,
            trusted_proxy=proxy, trusted_proxy_headers=forwarded,
        )  # fmt: skip
        answers = {"error_task_class": JsonErrorTask, "parser_class": RequestParser}
        self._server.channel_class = type("Channel", (self._server.channel_class,), answers)
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()

    def reload(self, settings: Json) -> None:
        """Apply jobs and users anew. Raises ChronosError: nothing has changed."""
        kept = {k: v for k, v in self.settings.items() if not k.startswith(RELOADED)}
        applied = settings | kept
        check_door(applied)
        for job in self.engine.make(self.engine.declare_jobs, applied["jobs"]):
            state = "as it declares" if job.declared else "disabled: it is not there any more"
            log.info("%s: job %s (%s) is %s", DECLARED_BY, job.id, job.config["name"], state)
        basic = applied["auth.type"] == "basic"
        self.api.sign_in = SignIn(applied, self.engine.clock) if basic else None
        self.settings = self.engine.settings = applied
        log.setLevel(applied["logging.level"].upper())
        if stale := [key for key in kept if settings[key] != kept[key]]:
            log.warning("a restart is needed for %s", ", ".join(stale))

    def signs_of_life(self) -> list[str]:
        """Return what systemd is told: a full disk is no reason to start anew, a hung thread is."""
        alive = ["WATCHDOG=1"] if self.engine.silence() <= SILENCE_LIMIT else []
        return [f"STATUS={self.engine.problem or f'listens on {self.url}'}", *alive]

    def stop(self) -> None:
        """Refuse new connections, let running executions end within the grace, close all."""
        if self._thread:
            self._server.trigger.pull_trigger(lambda: wasyncore.dispatcher.close(self._server))
        self.engine.stop(parse_duration(self.settings["server.shutdown_grace"]))
        if self._thread:
            self._server.task_dispatcher.shutdown(cancel_pending=False, timeout=2)
            deadline = time.monotonic() + 1  # for the last answers to go out
            for channel in list(self._channels.values()):
                while getattr(channel, "total_outbufs_len", 0) and time.monotonic() < deadline:
                    time.sleep(0.01)
            with contextlib.suppress(OSError):  # the http thread may have closed all meanwhile
                self._server.trigger.pull_trigger(lambda: wasyncore.close_all(self._channels))
            self._thread.join(timeout=2)
        self._open.close()


class LogFormatter(logging.Formatter):
    """One line an event: control characters of names and errors can't forge a line."""

    _controls = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"

    def __init__(self, kind: str) -> None:
        """``kind``: text, json, or journal, which has times of its own and reads <priority>."""
        super().__init__("%(asctime)s %(levelname)s %(message)s" if kind == "text" else None)
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; as text only a traceback of our own has more than one."""
        trace, record.exc_info, record.exc_text = record.exc_info, None, None
        line, more = super().format(record), self.formatException(trace) if trace else ""
        if self._kind == "json":
            event = {"time": format_time(int(record.created * SECOND)), "message": line}
            event |= {"level": record.levelname.lower(), "traceback": more}
            event["job_id"] = "".join(re.findall(r"\bjob ([0-9a-f-]{36})", line)[:1])
            event["execution_id"] = "".join(re.findall(r"\bexec-[0-9a-f-]{36}", line)[:1])
            return json.dumps({name: value for name, value in event.items() if value})
        line = re.sub(self._controls, lambda m: m[0].encode("unicode_escape").decode(), line)
        line = f"{line}\n{more}" if more else line
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)  # sd-daemon(3)
        return re.sub("(?m)^", f"<{priority}>", line) if self._kind == "journal" else line


def read_settings(asked: argparse.Namespace) -> Json:
    """Return the settings that the command line asks for. Raises StartError."""
    beside = Path(__file__).with_name("chronos.yaml")
    asked.config = getattr(asked, "config", None) or (beside if beside.exists() else None)
    settings = load_settings(asked.config, os.environ)
    settings["scheduler.paused"] |= hasattr(asked, "paused")
    return settings


def start_logging(kind: str) -> None:
    """Log to stderr as logging.format says, warnings until a level is set."""
    handler = logging.StreamHandler()
    with contextlib.suppress(OSError):  # stderr is closed
        about = os.fstat(2)
        if kind == "text" and os.getenv("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}":
            kind = "journal"
    handler.setFormatter(LogFormatter(kind))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a line per queued request
    logging.raiseExceptions = False  # a closed stderr must not end the service


def tell_systemd(*variables: str) -> None:
    """Send variables such as ``READY=1`` (sd_notify(3)); that nobody takes them is no error."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        text = "\n".join(" ".join(variable.split()) for variable in variables)
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with sender, contextlib.suppress(OSError):
            sender.settimeout(1)
            sender.sendto(text.encode(errors="replace"), re.sub("^@", "\0", address))


def run_serve(asked: argparse.Namespace) -> None:
    """Run the service until SIGTERM or SIGINT; SIGHUP reloads (this is the default)."""
    settings = read_settings(asked)
    start_logging(settings["logging.format"])
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in every thread: they wait to be taken
    service = Service(settings)
    try:
        service.start()
        log.info("Chronos %s listens on %s, data in %s", __version__, service.url, service.data_dir)
        if sys.stdout.isatty():  # somebody has started it by hand
            url = re.sub(r"0\.0\.0\.0|\[::\]", "localhost", service.url)
            print(f"Chronos is ready: open {url} in a browser; Ctrl-C stops it")
        if service.engine.paused:
            log.warning("paused: nothing fires")
        while True:
            tell_systemd("READY=1", *service.signs_of_life())
            came = signal.sigtimedwait(signals, SIGN_OF_LIFE_S)
            if came and came.si_signo != signal.SIGHUP:
                break
            if came:
                tell_systemd("RELOADING=1", f"MONOTONIC_USEC={Clock().monotonic()}")
                try:
                    service.reload(read_settings(asked))
                    log.info("the configuration was read again")
                except ChronosError as error:
                    log.error("nothing was changed: %s", "; ".join(str(error).splitlines()))
        tell_systemd("STOPPING=1")
        log.info("stopping: running executions get %s", settings["server.shutdown_grace"])
    finally:
        service.stop()
    log.info("stopped")
    try:
        sys.stderr.flush()
    except OSError:  # nobody reads it any more: Python would make that exit status 120
        sys.stderr = None


def run_check_config(asked: argparse.Namespace) -> None:
    """Say what is wrong in the configuration, or that nothing is."""
    read_settings(asked)
    print("the configuration is correct")


def run_hash_password(_asked: argparse.Namespace) -> None:
    """Print the hash for auth.users of a password: typed in, or one line of the input."""
    password = getpass.getpass().encode() if sys.stdin.isatty() else sys.stdin.buffer.readline()
    if not (password := password.rstrip(b"\r\n")):
        raise ChronosError("an empty password is none")
    print(hash_password(password, os.urandom(16)))


def run_backup(asked: argparse.Namespace) -> None:
    """Copy the database to FILE and check the copy; the server may be running."""
    store = Store(Path(read_settings(asked)["cluster.data_dir"], "chronos.db"))
    store.backup(asked.file.absolute())
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
{hardening}
[Install]
WantedBy=multi-user.target
"""
HARDENING = """
    CapabilityBoundingSet= LockPersonality=yes MemoryDenyWriteExecute=yes NoNewPrivileges=yes
    PrivateDevices=yes PrivateTmp=yes PrivateUsers=yes ProcSubset=pid ProtectClock=yes
    ProtectControlGroups=yes ProtectHome=yes ProtectHostname=yes ProtectKernelLogs=yes
    ProtectKernelModules=yes ProtectKernelTunables=yes ProtectProc=invisible ProtectSystem=strict
    RemoveIPC=yes RestrictNamespaces=yes RestrictRealtime=yes RestrictSUIDSGID=yes
    SystemCallArchitectures=native UMask=0077"""


def run_systemd_unit(asked: argparse.Namespace) -> None:
    """Print a unit for systemd, with the paths of this program, Python and configuration."""
    settings = read_settings(asked)
    python, program, config, data = (  # as systemd.syntax(7) has them
        json.dumps(os.path.abspath(path), ensure_ascii=False).replace("%", "%%")
        for path in (sys.executable, __file__, asked.config or "", settings["cluster.data_dir"])
    )
    command = f"{python} -I {program}" + (f" --config {config}" if asked.config else "")
    grace = parse_duration(settings["server.shutdown_grace"]) // SECOND + 15
    hardening = "\n".join(HARDENING.split())
    print(UNIT.format(command=command, data=data, grace=grace, hardening=hardening), end="")


class ArgumentParser(argparse.ArgumentParser):
    """Wrong arguments are told in one line, as all errors are."""

    def error(self, message: str) -> NoReturn:
        raise ChronosError(f"{message} (see --help)")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1, 75 (already running) or 78 (configuration)."""
    options = ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--config", type=Path, metavar="FILE", help="instead of ./chronos.yaml")
    options.add_argument("--paused", action="store_true", help="start without firing anything")
    parser = ArgumentParser("chronos.py", description="Fires webhooks on time.", parents=[options])
    parser.add_argument("--version", action="version", version=f"chronos {__version__}")
    parser.set_defaults(run=run_serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    for run in (run_serve, run_check_config, run_hash_password, run_backup, run_systemd_unit):
        name = run.__name__.removeprefix("run_").replace("_", "-")
        command = commands.add_parser(name, help=run.__doc__, parents=[options])
        command.set_defaults(run=run)
        if run is run_backup:
            command.add_argument("file", type=Path, metavar="FILE", help="must not be there yet")
    try:
        asked = parser.parse_args(arguments)
        asked.run(asked)
        return 0
    except SystemExit:  # argparse has printed help or version
        return 0
    except ChronosError as error:
        print(f"chronos: {error}", file=sys.stderr)
        return getattr(error, "exit_status", EXIT_FAILED)


# ==== 14. Dashboard: the page that GET / answers with; its data come from the API =====

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
const API = location.origin + "/api/v1"; // relative URLs throw where the page is user:password@host
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
  success: "ok", ok: "ok", failed: "fail", failing: "fail", cancelled: "fail", running: "run", pending: "wait",
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
const wordOf = run => ["missed", "cancelled", "replaced"].includes(run.reason) ? run.reason : run.status;
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
  if (job.enabled && job.failures) return "failing";
  if (running(job.id)) return "running";
  if (!job.enabled) return "paused";
  if (!stats.paused && Date.parse(job.next_run) < clock() - 30000) return "overdue";
  return !job.strip ? "never ran" : job.strip.endsWith("K") ? "skipped" : "ok";
}
const RANKS = ["paused", "ok", "running", "overdue", "failing"];
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
      cut("div.dim", run.error ?? "")] : h("span.dim", "never ran")),
    td(job.next_run ? [!stats.paused && when(job.next_run, zone, "due"), h("div.dim", when(job.next_run, zone))]
      : h("span.dim", job.enabled ? "never again" : "paused")), td(line(actions(job)))), { sig });
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
  const item = run => h("li", badge(run.status), runLink(run.job_id, run.id, cut("div", run.job_name)), h("span.dim", tell(run)),
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
    next = job.next_run ? [{ utc: job.next_run }, ...(await get(`/schedules/preview?${query}`)).next_runs] : [];
    seen = now;
  };
  const versionRow = ({ version, config, created_at, created_by }, at) => {
    const changed = at + 1 < versions.length ? changes(versions[at + 1].config, config).map(each => spoken(each[0])).join(", ") : "created";
    return h("tr", { id: "v" + version }, td(`Version ${version}`), td(when(created_at, job.timezone)), td(created_by),
      td(changed || "nothing that is shown"), td(at ? button("Compare", `compare:${version}`, () => compare(job, versions[at])) : "current"));
  };
  const draw = () => {
    const row = known(id) ?? { ...job, failures: 0, strip: "" }, zone = job.timezone, { name, description, ...settings } = flatten(job);
    return [line(h("div.grow", line(heading(job.name), badge(stateOf(row))), description && dim(description)),
      stats.may_write && line({ id: "actions" }, actions(job),
    !job.managed_by && button("Delete", `delete:${id}`, () => remove(job, runs.total), { class: "danger" }))),
    row.failures > 0 && h("p.bar.fail", { id: "failing" }, `Failed ${count(row.failures, "time")} in a row, since `,
      when(row.failing_since, zone), `: ${row.last_execution?.error}`),
    h("div.two", box("settings", "Settings", facts([...entries(settings), ["managed by", job.managed_by], ["version", `${job.version}`],
      ["changed", when(job.updated_at, zone)], ["id", id]])),
    box("next", "Next runs", next.length ? runTimes(next, zone) : dim(job.enabled ? "None: it has ended." : "None: it is paused."))),
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
    const zone = zoneOf(jobId), { request, status_code: code, response, replay_of: original } = run, { method, url, headers, body } = request;
    const late = run.trigger === "schedule" && Date.parse(run.started_at) - Date.parse(run.scheduled_time);
    return [line(h("div.grow", jobLink(jobId, run.job_name), line(heading("Run of ", when(run.scheduled_time, zone)), badge(wordOf(run)))),
      line({ id: "actions" }, stats.may_write && (run.completed_at ? button("Replay", `replay:${id}`, () => replay(run))
        : button("Cancel", `cancel:${id}`, () => cancel(run), { class: "danger" })),
    button("Copy as curl", "curl", () => ask("Copy this", h("pre", curl(request)))))),
    h("p.bar." + KINDS[run.status], { id: "sentence" }, sentence(run)),
    h("div.two", box("request", "Request", h("code", `${method} ${url}`), h("pre", pairsOf(headers).join("\n")), body ? h("pre", body) : dim("No body.")),
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
