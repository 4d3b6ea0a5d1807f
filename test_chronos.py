"""The specification of Chronos, in the order of the sections of chronos.py.

A name is a promise, a test keeps one. Time is a clock that the test moves; what is about real
time runs against the real process. The target of the webhooks is a real HTTP server.

    python -m pytest -q test_chronos.py           what CI runs
    python -m pytest -q test_chronos.py --long    and what takes minutes
"""

# What is promised where; "---" opens each of the parts that are named here.
#
#  3 Time           times and durations: read, written, refused
#  4 Schedules      what an expression means, what is refused, clock changes, backlogs; random
#                   expressions against trying every instant
#  5 Checks         every wrong value of every field, by its name; all at once; the nearest name
#  6 Jobs           defaults, normal form; secrets: shown nowhere, kept, sent only where they were
#                   meant for, masked where a target repeats them
#  7 Settings       file, environment, lines of mistakes, who may listen where; declared jobs
#  8 Policies       retry or not, and when; Retry-After; the attempt log
#  9 Schema         foreign and newer files are refused untouched; no statement walks a table
# 10 Connections    durable commits, who may read the files, damage, backups
# 11 Store          what a job's row has of its history
# 12 Logs, metrics  what is logged and how; every series of /metrics
# 13 Requests       the request as it goes out; nothing of the environment goes with it
# 14 The wire       reuse, answers, limits, aborts, names, several addresses, blocked ones, a
#                   sentence for each failure, through a proxy, TLS, what hostile servers cost
# 15 Work           fire times, missed ones, the clock is set, overlap, the queue, retries, after a
#                   crash, changes to jobs, retention, alerts
# 16 Engine         passes, changes that meet outcomes, full disk, errors nobody expected, the stop
# 17 API            health and errors, who may do what, jobs, jobs that are created once, versions,
#                   triggers, executions, lists, what the dashboard asks for, the answers of the
#                   reference
# 18 Service        start and stop, the configuration is read again, systemd, raw connections,
#                   behind nginx
# 19 Commands       where things are, starts that are refused, commands, the unit
# 20 Dashboard      what people do in a browser, what the page asks for, who may, how it looks
# The real process  on time, overload, kill -9, the clock of the machine, outages, the README
# Bad input         requests made from the tables of routes and fields
#
# Constants and errors (1, 2) are in every test. Whose promise is about a part and needs the API or
# a process to be seen stands with the part.

from __future__ import annotations

import base64
import collections
import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import hmac
import html
import http.client
import http.server
import importlib.resources
import ipaddress
import itertools
import json
import logging
import os
import platform
import pty
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import uuid
import weakref
import zlib
import zoneinfo
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlsplit
from zoneinfo import ZoneInfo

import pytest
import requests

import chronos


def all_errors(kind):
    """Return an error class and all that are derived from it."""
    return [kind, *(error for child in kind.__subclasses__() for error in all_errors(child))]


# The processes that the tests start take every warning for an error, too, but that waitress
# leaves the file of a large body to the garbage collector.
WARNINGS = (
    "error",
    "ignore::ResourceWarning",
    "ignore::ImportWarning",  # bottle 0.12 has an importer of the old kind.
    "ignore:'cgi' is deprecated:DeprecationWarning",
)
os.environ["PYTHONWARNINGS"] = ",".join(WARNINGS)

CHRONOS = Path(chronos.__file__)
SECOND = chronos.SECOND
STATUS_OF_CODE = {error.code: error.status for error in all_errors(chronos.ApiError)}
STATUS_OF_CODE["INVALID_TIMEOUT"] = 400
JSON_ROUTES = [route for route in chronos.Api.ROUTES if route[1] not in ("/", "/metrics")]
NOON = chronos.parse_time("2027-03-01T12:00:00Z")  # where the clock of most tests begins


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run what takes minutes")
    parser.addoption("--no-browser", action="store_true", help="leave out what needs Chromium")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        items[:] = [item for item in items if "long" not in item.keywords]
    if config.getoption("--no-browser"):
        items[:] = [item for item in items if "browser" not in item.fixturenames]


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("TEST_NO_SKIPS") and reporter.stats.get("skipped"):
        session.exitstatus = 1


# ======================================================================================
# The kit: what more than one section uses
# ======================================================================================
#
# Real servers on free ports, real files in tmp_path; replaced are the clock, by one that the test
# moves, and the name server, because no query may leave the machine.

# --- time: a clock that the test moves, and waiting for what others do ----------------


class ManualClock(chronos.Clock):
    """A clock that stands still until the test moves it."""

    def __init__(self, now=NOON):
        self.wall, self.mono = now, 1_000 * SECOND

    def now(self):
        return self.wall

    def monotonic(self):
        return self.mono

    def advance(self, seconds):
        """Let time pass."""
        self.wall += int(seconds * SECOND)
        self.mono += int(seconds * SECOND)

    def step(self, seconds):
        """Set the wall clock, as an administrator or NTP does."""
        self.wall += int(seconds * SECOND)


class HookedClock(ManualClock):
    hook = staticmethod(lambda: None)  # called whenever somebody looks at the monotonic time

    def monotonic(self):
        self.hook()
        return super().monotonic()


@pytest.fixture
def clock():
    return ManualClock()


def wait_until(condition, seconds=10):
    """Wait for what another process does; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return result


# --- time zones: rules that come, change and go ------------------------------------------


class Zones:
    """A database of time zones before that of the machine."""

    def __init__(self, directory):
        self.directory = directory

    def give(self, name, like):
        """Let a zone have the rules of another one."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._rules(like))
        self.forget()

    def remove(self, name):
        (self.directory / name).unlink()
        self.forget()

    def cut(self, name, size):
        """Leave so many bytes of a zone, as a full disk does; negative: so many are gone."""
        path = self.directory / name
        path.write_bytes(path.read_bytes()[:size])
        self.forget()

    def forget(self):
        """Forget what the process has read, as a start does."""
        ZoneInfo.clear_cache()
        chronos.time_zone.cache_clear()
        chronos._time_zones.cache_clear()
        chronos.CronSchedule.next_after.cache_clear()

    def _rules(self, name):
        found = [Path(root, name) for root in zoneinfo.TZPATH if Path(root, name).exists()]
        source = found[0] if found else importlib.resources.files("tzdata") / "zoneinfo" / name
        return source.read_bytes()


@pytest.fixture
def zones(tmp_path):
    zones, before = Zones(tmp_path / "zones"), zoneinfo.TZPATH
    zoneinfo.reset_tzpath([str(zones.directory), *before])
    yield zones
    zoneinfo.reset_tzpath(before)
    zones.forget()


# --- the words of the tests -----------------------------------------------------------

JOB_ID = "11111111-1111-4111-8111-111111111111"
NEW_YORK, MADRID, LORD_HOWE = "America/New_York", "Europe/Madrid", "Australia/Lord_Howe"
NOBODY = "http://127.0.0.1:1/"  # nobody listens on port 1
URL = "http://127.0.0.1/hook"
MASK = "********"
CANARY = "canary-in-a-coal-mine"
SIGNING_KEY = "canary/in/a/coal/mine+canary/too"  # base64, as it happens
SIGNING_SECRET = f"whsec_{SIGNING_KEY}"
ONCE = {"max_attempts": 1}
RETRY = {"max_attempts": 3, "initial_interval": "1s", "max_interval": "1m", "multiplier": 2.0}
RETRY |= {"attempt_timeout": None}
INTERRUPTED = "the server ended during the attempt: its outcome is unknown"
ADA = "scrypt:" + "5a" * 16 + ":" + "0f" * 32
HASHED = chronos.hash_password("pässwörd".encode(), bytes(16))


def at(text):
    """Return an instant of the day on which the tests begin."""
    return chronos.parse_time(f"2027-03-01T{text}Z")


# --- settings and jobs ----------------------------------------------------------------


def make_settings(directory, **overrides):
    """Return the default settings with a data directory and port 0; ``a__b`` stands for a.b."""
    values = {
        "server.http.address": "127.0.0.1:0",
        "server.shutdown_grace": "1s",
        "dispatcher.max_concurrent_per_host": 48,
        "cluster.data_dir": str(directory),
    }
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return chronos.build_settings(values)


def job_body(url, **fields):
    """Return a job that is never due by itself, unless ``fields`` say so."""
    method = fields.pop("method", "POST")
    webhook = {"url": url, "method": method, **fields.pop("webhook", {})}
    return {"name": "report", "schedule": "0 0 1 1 *", "webhook": webhook} | fields


KEY = {"type": "api_key", "api_key": "k"}
EXAMPLE = {  # the request body of "Create Job" in the API reference
    "name": "daily-report", "description": "Generate daily report", "schedule": "0 9 * * *",
    "timezone": "America/New_York",
    "webhook": {
        "url": "https://api.example.com/reports", "method": "POST",
        "headers": {"Authorization": "Bearer token123", "Content-Type": "application/json"},
        "body": "{\"type\": \"daily\"}", "auth": {"type": "bearer", "token": "my-secret-token"},
        "success_codes": [200, 201, 202]},
    "retry_policy": {
        "max_attempts": 3, "initial_interval": "1s", "max_interval": "1m", "multiplier": 2.0},
    "timeout": "5m", "concurrency": "forbid",
    "tags": {"team": "backend", "environment": "production"}, "enabled": True,
}  # fmt: skip
WITH_SECRET = {
    "bearer": {"auth": {"type": "bearer", "token": CANARY}},
    "basic": {"auth": {"type": "basic", "username": "user", "password": CANARY}},
    "api_key": {"auth": {"type": "api_key", "api_key": CANARY}},
    "header": {"headers": {"Authorization": f"Bearer {CANARY}"}},
    "another header": {"headers": {"X-Hook-Token": CANARY}},
}


@pytest.fixture
def load(tmp_path):
    """Loads the settings of a file with this content."""

    def load(content, **environment):
        (tmp_path / "chronos.yaml").write_text(content, "utf-8")
        return chronos.load_settings(tmp_path / "chronos.yaml", environment)

    return load


@pytest.fixture
def refusal(load):
    """Loads settings that are wrong, and returns what the start says."""

    def refusal(content, **environment):
        with pytest.raises(chronos.StartError) as caught:
            load(content, **environment)
        assert caught.value.exit_status == 78
        assert str(caught.value).count("\n") <= 2
        return str(caught.value)

    return refusal


def declared(*jobs, rest=""):
    """Return a chronos.yaml that declares these jobs; JSON is YAML."""
    return f"{rest}\njobs:\n" + "".join(f"  - {json.dumps(job)}\n" for job in jobs)


@pytest.fixture
def configure(tmp_path):
    """Write a configuration, return its path."""

    def write(config):
        path = tmp_path / "chronos.yaml"
        path.write_text(config)
        return path

    return write


# --- the target -----------------------------------------------------------------------


class TargetHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.server.script.pop(0) if self.server.script else self.path
        self.server.received.put((self.command, path, self.headers, body, time.time()))
        status, reason, answer = self.server.behave(self) or self.usual(path.strip("/"), body)
        self.send_response(status, reason)
        for name, value in self.server.extra_headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"" if self.command == "HEAD" else answer)

    def usual(self, path, body):
        """Return status, reason (None: the usual one) and body of what a path asks for."""
        kind, _, argument = path.partition("/")
        if kind == "hang":
            self.server.hanging.release()
            self.server.let_go.wait(30)
            return self.usual(argument, body)
        if kind == "slow":
            self.server.let_go.wait(0.7)
        status = int(argument) if kind == "status" else 200
        return status, None, body if kind == "echo" else b"OK"

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = answer

    def log_message(self, *_args):
        pass


class Target(http.server.ThreadingHTTPServer):
    """A webhook receiver: /ok, /echo, /status/503, /slow, /hang (until let_go is set).

    "/hang/echo" hangs, and is then "/echo". ``script`` holds the paths as which the next requests
    are treated; ``behave`` gets the handler of a request and may say what it is answered.
    """

    request_queue_size = 1024

    def __init__(self):
        super().__init__(("127.0.0.1", 0), TargetHandler)
        self.received = queue.Queue()
        self.let_go = threading.Event()
        self.hanging = threading.Semaphore(0)  # one release for each request that hangs
        self.extra_headers = {}
        self.script = []
        self.behave = lambda _handler: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_args):
        pass

    def take(self):
        """Return the next request: method, path, headers, body, time of arrival."""
        return self.received.get(timeout=10)

    def stop(self):
        self.let_go.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def target():
    server = Target()
    yield server
    server.stop()


@pytest.fixture
def bell():
    """The target of the alerts."""
    server = Target()
    yield server
    server.stop()


# --- hostile servers and TLS ----------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\n"
OK = HEAD + b"Content-Length: 2\r\n\r\nOK"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Hostile:
    """A raw socket server: ``behave(server, connection)`` runs in a thread for each connection."""

    def __init__(self, behave, tls=None, host="127.0.0.1", port=0):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.behave, self.tls = behave, tls
        self.requests = queue.Queue()
        self.accepted = 0
        self.reached = threading.Semaphore(0)  # one release for each connection that is held
        self.stopping = threading.Event()
        self.listener = socket.create_server((host, port), family=family, backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self.handles = set()  # of the connections: TLS detaches the sockets themselves
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _address = self.listener.accept()
                self.accepted += 1
                self.threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self.threads[-1].start()

    def _serve(self, connection):
        handle = connection.dup()
        self.handles.add(handle)
        try:
            connection.settimeout(20)
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            self.behave(self, connection)
        except OSError:
            pass  # the client went away, which is what most tests are about
        finally:
            self.handles.discard(handle)
            handle.close()
            connection.close()

    def hold(self):
        """Say that the connection is where the test wants it, and leave it so."""
        self.reached.release()
        self.stopping.wait(20)

    def stop(self):
        self.stopping.set()
        for open_socket in (self.listener, *self.handles):
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listener.close()


@pytest.fixture
def hostile(tls):
    servers = []

    def make(behave, scheme="http", host="127.0.0.1", context=tls):
        servers.append(Hostile(behave, context if scheme == "https" else None, host))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Return the paths of a certificate for localhost, 127.0.0.1 and ::1, and of its key."""
    directory = tmp_path_factory.mktemp("tls")
    paths = directory / "certificate.pem", directory / "key.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", names,
         "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
         "-out", paths[0], "-keyout", paths[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return paths


@pytest.fixture(scope="session")
def tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@contextlib.contextmanager
def deaf(host="127.0.0.1", port=0):
    """While this lasts, a SYN to the port gets no answer: the queue of its listener is full."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            yield listener.getsockname()[1]


@pytest.fixture
def deaf_url():
    with deaf() as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """Dial nothing else, even where the check of an address has a bug."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX:
            host = ipaddress.ip_address(address[0].partition("%")[0])
            host = getattr(host, "ipv4_mapped", None) or host
            assert host.is_loopback or host.is_unspecified, address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def read_request(connection):
    """Return one request, head and body; nothing at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", data)
    missing = int(length[1]) + data.index(b"\r\n\r\n") + 4 - len(data) if length else 0
    while missing > 0:
        missing -= len(connection.recv(65536)) or missing
    return data


def answers(raw, close=False):
    """Return a behaviour: the same answer to every request."""

    def behave(server, connection):
        while request := read_request(connection):
            server.requests.put(request)
            connection.sendall(raw)
            if close:
                return

    return behave


def typed(content_type, body, header=b"Content-Type"):
    """Return an answer with this content type, or another header."""
    head = HEAD + b"%s: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (header, content_type, len(body)) + body


# --- the name server ------------------------------------------------------------------


@pytest.fixture
def name_server(monkeypatch):
    """Names that end in .test get no answer until the event is set; no other name exists.

    Replaced, because a resolver that hangs can't be had without changing the machine, and because
    no query may leave it.
    """
    let_go, real = threading.Event(), socket.getaddrinfo

    def look_up(host, port, *arguments, flags=0, **options):
        is_name = re.search("[a-z]", host) and host != "localhost"
        if is_name and not flags & socket.AI_NUMERICHOST:
            if host.endswith(".test"):
                let_go.wait(20)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, port, *arguments, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield let_go
    let_go.set()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("dns-")])


@pytest.fixture
def resolve(monkeypatch):
    """Gives the name several.test these addresses, in this order."""
    real = socket.getaddrinfo

    def resolve(*addresses):
        def look_up(host, port, *arguments, flags=0, **options):
            if host != "several.test" or flags & socket.AI_NUMERICHOST:
                return real(host, port, *arguments, flags=flags, **options)
            return [real(address, port, **options)[0] for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return resolve


# --- the wire -------------------------------------------------------------------------

WEBHOOK = chronos.validate(chronos.WEBHOOK_FIELDS, {"url": "http://localhost/"})


@pytest.fixture
def make_dispatcher(tmp_path):
    dispatchers = []

    def make(**overrides):
        dispatchers.append(
            chronos.Dispatcher(chronos.Clock(), make_settings(tmp_path, **overrides).dispatcher)
        )
        dispatchers[-1].start()
        return dispatchers[-1]

    yield make
    for dispatcher in dispatchers:
        dispatcher.stop()


@pytest.fixture
def dispatcher(make_dispatcher):
    return make_dispatcher()


@pytest.fixture
def send(dispatcher):
    return lambda url, **options: dispatcher.send(make_attempt(url, **options))


def make_attempt(url, allowed=10.0, reason="timeout", **webhook):
    """Return an attempt that may take ``allowed`` seconds, of a webhook that nobody validated."""
    ready = chronos.Webhook(WEBHOOK | {"url": url} | webhook)
    execution = chronos.Execution(
        "exec-1",
        JOB_ID,
        1,
        "schedule",
        "running",
        NOON,
        ready.target,
        None,
        attempts=2,
        attempt_at=NOON,
    )
    return chronos.Attempt(execution, ready, int(allowed * SECOND), reason)


# --- the world: an engine that the test turns -----------------------------------------


class World:
    """A store, a dispatcher and an engine without a thread: the test turns it pass by pass."""

    def __init__(self, directory, clock, **overrides):
        directory.mkdir(exist_ok=True)
        self.clock = clock
        self.settings = make_settings(directory, **overrides)
        self.store = chronos.Store(directory / "chronos.db")
        self.store.database.open()
        self.dispatcher = chronos.Dispatcher(clock, self.settings.dispatcher)
        self.engine = chronos.Engine(self.store, self.dispatcher, self.settings, clock)
        self.engine.recover()
        self.engine.pool.start()

    def do(self, change, *arguments):
        """Hand a change in as an API thread would, and turn the engine until it is made."""
        future = self.engine.hand_in(change, *arguments)
        while not future.done():
            self.engine.run_turn()
        return future.result()

    def create(self, url, enabled=True, **fields):
        """Create a job and return it."""
        body = job_body(url, **fields)
        retry = self.settings.scheduler.default_retry_policy
        config, _enabled = chronos.validate_job(body, retry, self.clock.now())
        return self.do(self.engine.job_changes.create, config, enabled, "tester")

    def settle(self):
        """Turn the engine until nothing is in flight and nothing is due."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            wait = self.engine.run_turn(0)
            if self.engine.run_queue.in_flight:
                self.engine.run_turn(SECOND)
            elif wait > 0 and not self.engine._outcomes:
                return
        raise AssertionError("the engine does not come to rest")

    def advance(self, seconds):
        """Let time pass, then settle."""
        self.clock.advance(seconds)
        self.settle()

    def all_jobs(self):
        """Return all jobs in the order of their creation."""
        pages, _total = self.store.jobs.pages({}, None, 0)
        return [job for page in pages for job in page]

    def executions(self, job):
        """Return the executions of a job, the oldest first."""
        return list(self.store.executions.newest(job.id, 10_000))[::-1]

    def close(self):
        self.engine.run_queue.abort_all(chronos.CutReason.SHUTDOWN)
        self.engine.pool.stop()
        self.dispatcher.close_idle(0)
        self.store.database.close()


@pytest.fixture
def make_world(tmp_path, clock):
    worlds = []

    def make(**overrides):
        worlds.append(World(tmp_path / "data", clock, **overrides))
        return worlds[-1]

    yield make
    try:
        if worlds:
            assert_sizes_are_right(worlds[-1])  # Of each test, whatever it has done.
    finally:
        for world in worlds:
            world.close()


def assert_sizes_are_right(world):
    """Check that what is known of the size of the history is what its rows add up to."""
    with contextlib.suppress(chronos.StoreError), world.store.database.transaction():
        run = world.store.database.run
        sums = run("""SELECT job_id, sum(width) AS size FROM executions
                       WHERE completed_at IS NOT NULL GROUP BY job_id""")
        jobs = run("SELECT id, history_bytes FROM jobs")
        sizes = {row["job_id"]: row["size"] for row in sums}
        known = {row["id"]: row["history_bytes"] for row in jobs}
        assert known == {job_id: sizes.get(job_id, 0) for job_id in known}
        assert world.store.history.size() == sum(known.values())


@pytest.fixture
def world(make_world):
    return make_world()


def trigger(world, job):
    """Trigger a job, and return the id of the execution."""
    execution_id = f"exec-{uuid.uuid4()}"
    world.do(world.engine.run_queue.trigger, job.id, execution_id)
    return execution_id


def run_once(world, job):
    """Trigger a job, let it run to its end, and return the id of the execution."""
    execution_id = trigger(world, job)
    world.settle()
    return execution_id


def hang(world, target, job):
    """Trigger a job whose request hangs, and return the id of the execution."""
    execution_id = trigger(world, job)
    assert target.hanging.acquire(timeout=10)
    return execution_id


def turn_until(world, condition):
    """Turn the engine until something is so."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        world.engine.run_turn(10_000)


def states(world, job, *names):
    """Return the status of each execution of a job, or other columns, the oldest first."""
    rows = [tuple(getattr(e, name) for name in names) for e in world.executions(job)]
    return rows if names else [e.status for e in world.executions(job)]


def open_database(path):
    """Open a database as another process would, until the end of a block."""
    return contextlib.closing(sqlite3.connect(path, isolation_level=None))


@contextlib.contextmanager
def locked(path):
    """Hold the lock of a database, as a tool that somebody left open."""
    with open_database(path) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def by_hand(world, statement, *values):
    """Run a statement as another process would, on a connection of its own; return the rows."""
    with open_database(world.store.database.path) as database:
        return database.execute(statement, values).fetchall()


def engine_connection(world):
    return world.store.database._connections[
        threading.get_ident()
    ]  # the test's thread is the engine's


def add_jobs(world, count, url, **fields):
    """Add enabled jobs in one commit, as fast as the store goes."""
    retry, now = world.settings.scheduler.default_retry_policy, world.clock.now()
    config, _enabled = chronos.validate_job(job_body(url, **fields), retry, now)
    cursor = chronos.parse_schedule(config["schedule"]).next_after(now, "UTC")
    ids = [str(uuid.uuid4()) for _ in range(count)]
    jobs = [chronos.Job(job_id, 1, True, now, now, cursor, config) for job_id in ids]
    with world.store.database.transaction():
        for job in jobs:
            world.store.jobs.save(job, "tester")
    return jobs


def add_executions(world, job, count, status, ended_at=None, **fields):
    """Add executions of a job in one commit, return their ids.

    What is "pending" is due, what is "waiting" is pending, but waits for older ones.
    """
    due_at = world.clock.now() if status == "pending" else None
    if status in ("success", "failed", "skipped"):
        ended_at = ended_at or world.clock.now()
    status = "pending" if status == "waiting" else status
    target = chronos.target_of(job.config["webhook"]["url"])
    added = []
    with world.store.database.transaction():
        for number in range(count):
            values = (f"exec-{uuid.uuid4()}", job.id, 1, "manual", status, number, target, due_at)
            added.append(chronos.Execution(*values, completed_at=ended_at, **fields))
            world.store.executions.add([added[-1]])
        world.store.history.count_ends(added)
    return [execution.id for execution in added]


def set_number(world, key):
    """Hand in a change, which writes ``key``."""
    return world.engine.hand_in(lambda _turn: world.store.set_number(key, 1))


def numbers(world):
    return [key for (key,) in by_hand(world, "SELECT key FROM meta")]


def fill_disk(world):
    """Let the database grow no more, as on a full disk."""
    [pages] = engine_connection(world).execute("PRAGMA page_count").fetchone()
    engine_connection(world).execute(f"PRAGMA max_page_count = {pages}")


def free_disk(world):
    engine_connection(world).execute("PRAGMA max_page_count = 1000000")


def a_bug(*_arguments, **_options):
    raise RuntimeError("a bug")


# --- the service, and who calls it ----------------------------------------------------


class Client:
    """Calls the API and checks the envelope of every answer."""

    def __init__(self, url):
        self.url = url

    def call(self, method, path, body=None, **options):
        """Return status and envelope."""
        if body is not None:
            options["data"] = body if isinstance(body, bytes | str) else json.dumps(body)
        url = self.url + (path if path == "/" or path[:7] == "/health" else f"/api/v1{path}")
        answer = requests.request(method, url, timeout=30, **options)
        assert answer.headers["Content-Type"] == "application/json"
        envelope = answer.json()
        assert envelope.keys() == {"success", "data", "error"}
        assert envelope["success"] == (answer.status_code < 400) == (envelope["error"] is None)
        return answer.status_code, envelope

    def expect(self, status, method, path, body=None, **options):
        """Return the data, or the error, of an answer with this status."""
        got, envelope = self.call(method, path, body, **options)
        assert got == status, envelope
        return envelope["data"] if status < 400 else envelope["error"]

    def get(self, path):
        return self.expect(200, "GET", path)

    def post(self, path, body=None):
        return self.expect(201 if body is not None else 200, "POST", path, body)

    def error(self, status, method, path, body=None):
        return self.expect(status, method, path, body)

    def create(self, url, **fields):
        return self.post("/jobs", job_body(url, **fields))

    def start(self, job):
        """Trigger a job, and return the execution without waiting for its end."""
        return self.expect(202, "POST", trigger_path(job, "?wait=0"))


@pytest.fixture
def make_service(tmp_path):
    services = []

    def make(clock=None, **overrides):
        service = chronos.Service(make_settings(tmp_path / "data", **overrides), clock)
        service.start()
        services.append(service)
        client = Client(service.url)
        client.service = service
        return client

    yield make
    for service in services:
        service.stop()


@pytest.fixture
def service(make_service):
    return make_service()


@pytest.fixture
def guard():
    """Settings with two users: ada, and vera who may only read; the password is pässwörd."""
    users = {"ada": HASHED, "vera": HASHED}
    return {"auth__type": "basic", "auth__users": users, "auth__viewers": ["vera"]}


@pytest.fixture
def guarded(make_service, guard):
    """A service that asks who it is."""
    return make_service(**guard)


class Hashing:
    """Hashes passwords as the program does, and can be held up meanwhile."""

    def __init__(self):
        self.passwords, self.let_go, self._hash = [], threading.Event(), chronos.hash_password
        self.let_go.set()

    def __call__(self, password, salt):
        self.passwords.append(password.decode())
        assert self.let_go.wait(10)
        return self._hash(password, salt)


@pytest.fixture
def hashing(monkeypatch):
    """Every password that is hashed; the hashes wait while ``let_go`` is cleared."""
    hashing = Hashing()
    monkeypatch.setattr(chronos, "hash_password", hashing)
    yield hashing
    hashing.let_go.set()


def credentials(name, password="pässwörd"):
    pair = f"{name}:{password}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


@pytest.fixture
def background():
    """Runs calls that wait for something, in threads."""
    pool = ThreadPoolExecutor(48)
    yield pool
    pool.shutdown(wait=False, cancel_futures=True)


def connect(client, timeout=10):
    host, port = client.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout)


def exchange(client, sent, timeout=10):
    """Send bytes on a connection of their own; return all that comes until the server closes it."""
    received = b""
    with connect(client, timeout) as connection:
        with contextlib.suppress(ConnectionError):  # it stops reading what is too large
            connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                received += data
    return received


ANSWER = re.compile(
    rb"(?:HTTP/1\.1 100 Continue\r\n\r\n)?"
    rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)+)\r\n(\{[^\n]*\}\n)?"
)


USUAL_HEADERS = {b"X-Content-Type-Options: nosniff", b"Cache-Control: no-store"}


def read_answers(received):
    """Return status and envelope (None: no body) of the answers; there must be nothing else."""
    found, end = [], 0
    while match := ANSWER.match(received, end):
        status, head, body = int(match[1]), match[2], match[3]
        envelope, end = body and json.loads(body, parse_constant=pytest.fail), match.end()
        assert {b"Content-Type: application/json", *USUAL_HEADERS} <= set(head.split(b"\r\n"))
        assert not re.search(rb"(?i)(^|\n)server:", head)
        if envelope:
            error = envelope["error"]
            assert list(envelope) == ["success", "data", "error"]
            assert envelope["success"] == (status < 400) == (error is None)
            assert error is None or {"code", "message"} <= error.keys() <= {*error, "details"}
            if status in (431, 501):
                assert error["code"] == "VALIDATION_ERROR"
            else:
                assert error is None or status == STATUS_OF_CODE[error["code"]]
            assert b"Traceback (most" not in body
        found.append((status, envelope))
    assert found and end == len(received), received[end:][:300]
    return found


def path_of(job, rest=""):
    return f"/jobs/{job['id']}{rest}"


def trigger_path(job, query=""):
    return path_of(job, f"/trigger{query}")


def history_of(service, job):
    return service.get(path_of(job, "/executions"))["executions"]


def put(service, job, body):
    return service.expect(200, "PUT", path_of(job), body)


def patch(service, job, body):
    return service.expect(200, "PATCH", path_of(job), body)


def wrong_fields(service, method, path, body=None):
    """Return the names of the fields for which a request is refused."""
    return [detail["field"] for detail in service.error(400, method, path, body)["details"]]


def differences(before, after):
    return {name: after[name] for name in before if before[name] != after[name]}


def poll(client, etag=None):
    """Return the status, the data and the ETag that a poll of the dashboard gets."""
    headers = {"If-None-Match": etag} if etag else {}
    answer = requests.get(f"{client.url}/api/v1/stats", headers=headers, timeout=10)
    return answer.status_code, answer.content and answer.json()["data"], answer.headers["ETag"]


def start_hanging(process, target):
    """Trigger a job whose target answers when it is let go; return the execution's path."""
    job = process.create(target.url + "/hang")
    execution = process.start(job)
    assert target.hanging.acquire(timeout=10)
    return path_of(job, f"/executions/{execution['id']}")


# --- the process ----------------------------------------------------------------------


class Process(Client):
    """The real program, started as a user starts it, on port 0."""

    def __init__(self, directory, config="", *arguments, environment=None):
        directory.mkdir(exist_ok=True)
        self.log, self.config = [], directory / "chronos.yaml"
        self.config.write_text(config)
        environment = (
            os.environ | {"CHRONOS_SERVER_HTTP_ADDRESS": "127.0.0.1:0"} | (environment or {})
        )
        command = [sys.executable, CHRONOS, "--config", self.config, *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, cwd=directory
        )
        self.urls = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        try:
            super().__init__(self.urls.get(timeout=20))
        except queue.Empty:
            self.end(signal.SIGKILL)
            raise AssertionError(self.log) from None

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if "listens on" in line:
                self.urls.put(line.split("listens on ")[1].split(",")[0])

    def hang_up(self, config, told="was read again|nothing was changed"):
        """Write a configuration (None: remove it), send SIGHUP, return the line that it logs."""
        before = len(self.log)
        self.config.unlink() if config is None else self.config.write_text(config)
        self.process.send_signal(signal.SIGHUP)
        is_told = re.compile(told).search
        return wait_until(lambda: next(filter(is_told, self.log[before:]), None))

    def end(self, number):
        """Send a signal, if it still runs, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(30)
        self.reader.join(5)
        self.process.stderr.close()
        return status


@pytest.fixture
def make_process(tmp_path):
    processes = []

    def make(config="", *arguments, **options):
        processes.append(Process(tmp_path / "home", config, *arguments, **options))
        return processes[-1]

    yield make
    for process in processes:
        process.end(signal.SIGKILL)


def memory(process, name):
    """Return how many MB a process has (VmRSS) or had at most (VmHWM)."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1000


@contextlib.contextmanager
def serving(program, *arguments, directory):
    """Run the program in a directory; yield the process, its stderr open, and a client."""
    with subprocess.Popen(
        [sys.executable, program, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=os.environ | {"CHRONOS_SERVER_HTTP_ADDRESS": "127.0.0.1:0"},
    ) as process:
        try:
            yield process, Client(process.stderr.readline().split("listens on ")[1].split(",")[0])
        finally:
            process.kill()


def fill_store(directory, url, count, schedule, next_run_at):
    """Make a database with enabled jobs that are next due at ``next_run_at``."""
    directory.mkdir(parents=True)
    retry, now = make_settings(directory).scheduler.default_retry_policy, chronos.Clock().now()
    config, _enabled = chronos.validate_job(job_body(url, schedule=schedule), retry, now)
    store = chronos.Store(directory / "chronos.db")
    store.database.open()
    with store.database.transaction():
        for _ in range(count):
            job_id = str(uuid.uuid4())
            store.jobs.save(chronos.Job(job_id, 1, True, now, now, next_run_at, config), "tester")
    store.database.close()


# --- its disk and its signals ---------------------------------------------------------


@contextlib.contextmanager
def small_disk(directory):
    """Mount a disk of 3 MB, which only root can."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def data(tmp_path):
    """The data directory, on a disk of 3 MB where the user may mount one."""
    directory = tmp_path / "home" / "data"
    with small_disk(directory) if os.geteuid() == 0 else contextlib.nullcontext():
        directory.mkdir(parents=True, exist_ok=True)
        yield directory


@contextlib.contextmanager
def disk_error(process, _data):
    """Let each write to a file fail: an open file keeps its disk from becoming read-only."""
    pid, before = process.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


# --- what was logged ------------------------------------------------------------------


def logged(caplog, text):
    """Return the levels of the events whose message has this text."""
    return [r.levelname for r in caplog.records if text in r.getMessage()]


def tracebacks(caplog):
    """Return what was logged with a traceback."""
    return [record.getMessage() for record in caplog.records if record.exc_info]


# --- nginx ----------------------------------------------------------------------------

NGINX = """
daemon off; worker_processes 1; pid nginx.pid;
events { }
http {
  access_log off; client_body_temp_path temp1; proxy_temp_path temp2; fastcgi_temp_path temp3;
  uwsgi_temp_path temp4; scgi_temp_path temp5;
%s
}
"""
SUB_PATH = "server { listen PORT; %s location /chronos/ { proxy_pass BACKEND/; } }"
PASSES_HOST = "proxy_set_header Host $http_host;"


@pytest.fixture
def make_nginx(tmp_path):
    """Starts nginx with a server block, before a service; returns a client of /chronos there.

    A test names it before the page, which so goes first.
    """
    program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    if program is None:
        pytest.skip("no nginx: apt install nginx-light")
    processes = []

    def make(server, service, scheme="http"):
        directory = tmp_path / f"nginx{len(processes)}"
        directory.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as listener:  # which nginx inherits
            place = f"127.0.0.1:{listener.getsockname()[1]}"
            server = server.replace("PORT", place).replace("BACKEND", service.url)
            keeps_user = "user root;" if os.geteuid() == 0 else ""  # who may read the directory
            (directory / "nginx.conf").write_text(keeps_user + NGINX % server)
            command = [program, "-e", "stderr", "-p", directory, "-c", "nginx.conf"]
            environment = os.environ | {"NGINX": f"{listener.fileno()};"}
            handles = [listener.fileno()]
            processes.append(subprocess.Popen(command, env=environment, pass_fds=handles))
        return Client(f"{scheme}://{place}/chronos")

    yield make
    for process in processes:
        process.terminate()
        process.wait(20)


# --- the browser ----------------------------------------------------------------------

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium that reaches nobody but this machine, driven by Selenium."""
    chosen = os.environ.get("TEST_BROWSER", "chromium-headless-shell")
    programs = map(shutil.which, (chosen, "chromium", "google-chrome"))
    program, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    if not program or not driver:
        apt = "apt install chromium chromium-driver"
        pytest.skip(f"no Chromium: {apt}, or set TEST_BROWSER")
    why = "no Selenium: pip install selenium"
    webdriver = pytest.importorskip("selenium.webdriver", reason=why)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    rules = "MAP evil.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    for flag in (
        "headless", "disable-dev-shm-usage", "disable-gpu", "disable-quic", "no-first-run",
        "no-proxy-server", "disable-background-networking", "disable-component-update",
        "disable-sync", *(["no-sandbox"] if os.geteuid() == 0 else []), "window-size=1280,1000",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}", f"host-resolver-rules={rules}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.accept_insecure_certs = True  # nobody has signed that of the tests
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


# Time in a page passes ten times as fast; `ahead` is a jump of it; `waits` are all its timers.
FAST = """{
  window.ahead = 0;
  window.waits = [];
  const began = Date.now(), now = Date.now, later = setTimeout;
  Date.now = () => began + (now() - began) * 10 + ahead;
  window.setTimeout = (run, ms, ...rest) => {
    waits.push(ms);
    return later(run, ms / 10, ...rest);
  };
}"""
# The names of a control: that of a form's field, and what is heard or read.
NAMING = """
const names = e => [e.name, e.ariaLabel, e.matches("select, textarea") ? "" : e.textContent]
  .map(each => each?.trim()).filter(Boolean);"""
FIND = """
const place = document.querySelector("dialog[open]") || document;
const all = [...place.querySelectorAll("a, button, summary, input, select, textarea")];
return all.find(e => e.checkVisibility() && names(e).includes(arguments[0]));"""


class Page:
    """A tab of the browser, used by the words that stand on it."""

    def __init__(self, browser):
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver import ActionChains

        self.browser = browser
        self.hands = lambda: ActionChains(browser, duration=0)
        self.trouble, self.last_trouble = WebDriverException, ""
        self.allowed = "^$"  # a pattern of what the console may say
        self.tab = self.new_tab()

    def new_tab(self):
        self.browser.switch_to.new_window("tab")
        return self.browser.current_window_handle

    def open(self, service, route="#/", text="All jobs"):
        """Go to a route and wait until this text stands there."""
        self.browser.get(f"{service.url}/{route}")
        self.see(text)

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def cdp(self, command, **parameters):
        return self.browser.execute_cdp_cmd(command, parameters)

    def hurry(self):
        """Let the time of the pages to come pass ten times as fast."""
        self.cdp("Page.addScriptToEvaluateOnNewDocument", source=FAST)

    def text(self, selector="body"):
        """Return the visible text of the first element that the selector names, or ""."""
        script = "const e = document.querySelector(arguments[0]);"
        return self.js(script + "return e?.checkVisibility() ? e.innerText : ''", selector)

    def see(self, text, selector="body"):
        """Wait until this text stands there; the style may capitalize it."""
        wait_until(lambda: text.lower() in self.text(selector).lower())

    def find(self, name):
        """Wait for the control with this name."""
        return wait_until(lambda: self.js(NAMING + FIND, name))

    def click(self, name, twice=False):
        """Click on the control with this name; found anew if it is drawn anew meanwhile."""

        def attempt():
            control = self.find(name)
            try:
                self.hands().double_click(control).perform() if twice else control.click()
                return True
            except self.trouble as trouble:
                self.last_trouble = trouble.msg

        wait_until(attempt)

    def fill(self, name, text):
        """Write into the field with this name."""
        field = self.find(name)
        field.clear()
        field.send_keys(text)

    def press(self, *keys):
        """Press keys, wherever the focus is."""
        self.hands().send_keys(*keys).perform()

    def focused(self):
        """Return the name of what has the focus."""
        return self.js(NAMING + "return names(document.activeElement)[0]")

    def tab_to(self, name):
        """Press Tab until the focus is on the control with this name."""
        for _ in range(80):
            if self.focused() == name:
                return
            self.press(TAB)
        raise AssertionError(f"no way to {name} by Tab")

    def console(self):
        """Return what the console has said since the last call, but for what is allowed."""
        lines = [entry["message"] for entry in self.browser.get_log("browser")]
        return [line for line in lines if not re.search(self.allowed, line)]

    def asked(self):
        """Return the URLs of all requests since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.browser.get_log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked]


@pytest.fixture
def page(request, browser, make_service, tmp_path):
    """A new tab; in the end the console must be empty, and nobody else asked."""
    failed = request.session.testsfailed
    tab = Page(browser)
    tab.asked()
    yield tab
    if request.session.testsfailed > failed:
        picture = tmp_path / "page.png"
        browser.save_screenshot(picture)
        print(picture, browser.current_url, tab.text(), tab.console(), tab.last_trouble, sep="\n")
    said, asked = tab.console(), {urlsplit(url) for url in tab.asked()}
    for handle in browser.window_handles[1:]:
        browser.switch_to.window(handle)
        browser.close()
    browser.switch_to.window(browser.window_handles[0])
    assert said == []
    hosts = {url.hostname for url in asked if url.scheme not in ("about", "data")}
    assert hosts <= {"127.0.0.1", "evil.test"}


# ======================================================================================
# 3. Time
# ======================================================================================

WRONG_TIMES = """2027-03-01|2027-03-01T12:00:00|2027-03-01 12:00:00Z|2027-03-01T12:00Z|tomorrow|
2027-02-29T12:00:00Z|2027-03-01T24:00:00Z|2027-03-01T12:60:00Z|2027-3-1T12:00:00Z|2027|
\u0662027-03-01T12:00:00Z|2027-03-01T12:00:00.Z|2027-03-01T12:00:00+0200|2027-03-01T12:00:00+24:00"""


@pytest.mark.parametrize("text", ["2027-03-01T12:00:00Z\n", *re.split(r"\|\s*", WRONG_TIMES)])
def test_what_is_no_rfc_3339_time_is_refused(text):
    with pytest.raises(ValueError, match="RFC 3339"):
        chronos.parse_time(text)


@pytest.mark.parametrize("text, us, shortest", [
    ("0", 0, "0s"), ("250µs", 250, "250us"), ("1500000ns", 1500, "1.5ms"),
    ("999.999ms", 999_999, "999.999ms"), ("1000ms", SECOND, "1s"), ("1.5s", 1_500_000, "1.5s"),
    ("90s", 90 * SECOND, "1m30s"), ("300s", 300 * SECOND, "5m"), ("1.5h", 5400 * SECOND, "1h30m"),
    ("60250ms", 60_250_000, "1m0.25s"), ("1s1h1s", 3602 * SECOND, "1h2s"),
])  # fmt: skip
def test_durations_are_read_as_go_does_and_written_in_their_shortest_form(text, us, shortest):
    assert chronos.parse_duration(text) == chronos.parse_duration(shortest) == us
    assert chronos.format_duration(us) == shortest


WRONG_DURATIONS = ["", " ", "5", "5 s", "-5s", "+5s", "5S", "5d", "s", "1,5s", "1.s", "1s ", "1e3s"]
WRONG_DURATIONS += ["\u0665s", "5s\n", "1h" * 30, "9" * 40 + "s", 5, 1.5, True, None, ["5s"], {}]


@pytest.mark.parametrize("value", WRONG_DURATIONS, ids=repr)
def test_what_is_no_duration_is_refused_with_examples(value):
    with pytest.raises(ValueError, match='must be a duration such as "500ms"'):
        chronos.parse_duration(value)


@pytest.mark.parametrize("text, utc", [
    ("2027-03-01t12:00:00z", "2027-03-01T12:00:00Z"),
    ("2027-03-01T12:00:00.250Z", "2027-03-01T12:00:00.25Z"),
    ("2027-03-01T12:00:00.123456789Z", "2027-03-01T12:00:00.123456Z"),
    ("2027-03-01T01:30:00+02:30", "2027-02-28T23:00:00Z"),
    ("1969-12-31T22:59:59.5-01:00", "1969-12-31T23:59:59.5Z"),
])  # fmt: skip
def test_times_are_read_with_any_offset_and_written_in_utc_without_idle_zeros(text, utc):
    assert chronos.format_time(chronos.parse_time(text)) == utc


# ======================================================================================
# 4. Schedules
# ======================================================================================


def fires(expression, after, count, zone="UTC"):
    """Return the next fire times as text, without the date where it is that of ``after``."""
    schedule, at, found = chronos.parse_schedule(expression), chronos.parse_time(after), []
    while len(found) < count and at is not None:
        at = schedule.next_after(at, zone)
        found.append(chronos.format_time(at))
    return found


# --- what an expression means ---------------------------------------------------------

FIRES = [  # after 1 March 2027, 12:00 (a Monday), unless a row says otherwise
    ("*/20 * * * *", "03-01T12:20:00 03-01T12:40:00 03-01T13:00:00"),
    ("50/5 * * * *", "03-01T12:50:00 03-01T12:55:00 03-01T13:50:00"),
    ("10-20/5 13 * * *", "03-01T13:10:00 03-01T13:15:00 03-01T13:20:00 03-02T13:10:00"),
    ("\t 0  9\t* *   MON-fri ", "03-02T09:00:00 03-03T09:00:00 03-04T09:00:00 03-05T09:00:00"),
    ("0 0 1 Apr,jUN *", "04-01T00:00:00 06-01T00:00:00"),
    ("0 0 * * 5-7", "03-05T00:00:00 03-06T00:00:00 03-07T00:00:00 03-12T00:00:00"),
    ("0 0 * * sat/1", "03-06T00:00:00 03-07T00:00:00 03-13T00:00:00"),
    ("*/30 59 23 31 12 *", "12-31T23:59:00 12-31T23:59:30"),
    ("*/99 13 * * *", "03-01T13:00:00 03-02T13:00:00"),
    # the aliases
    ("@hourly", "03-01T13:00:00 03-01T14:00:00"),
    ("@daily", "03-02T00:00:00 03-03T00:00:00"),
    ("@Midnight", "03-02T00:00:00 03-03T00:00:00"),
    ("@weekly", "03-07T00:00:00 03-14T00:00:00"),
    (" @MONTHLY ", "04-01T00:00:00 05-01T00:00:00"),
    # either day matches where both are restricted; a field that begins with * restricts nothing
    ("0 0 10 * 3", "03-03T00:00:00 03-10T00:00:00 03-17T00:00:00"),
    ("0 0 13 * 5", "03-05T00:00:00 03-12T00:00:00 03-13T00:00:00"),
    ("0 0 */2 * 3", "03-03T00:00:00 03-17T00:00:00 03-31T00:00:00"),
    ("0 0 3,4 * */2", "03-04T00:00:00 04-03T00:00:00 04-04T00:00:00"),
    ("0 0 1-31 * 3", "03-02T00:00:00 03-03T00:00:00 03-04T00:00:00"),
    ("0 0 15 * 0-6", "03-02T00:00:00 03-03T00:00:00"),
    # what croniter reads differently
    ("15 30 9 * * *", "03-02T09:30:15 03-03T09:30:15"),
    ("5-5 13 * * *", "03-01T13:05:00 03-02T13:05:00"),
    ("0 0 * * 7-7", "03-07T00:00:00 03-14T00:00:00"),
    ("59/15 * * * *", "03-01T12:59:00 03-01T13:59:00"),
    ("0 0 0 * * 7", "03-07T00:00:00 03-14T00:00:00"),
]


@pytest.mark.parametrize("expression, expected", FIRES)
def test_a_cron_expression_fires_as_the_rules_say(expression, expected):
    expected = [f"2027-{text}Z" for text in expected.split()]

    assert fires(expression, "2027-03-01T12:00:00Z", len(expected)) == expected


@pytest.mark.parametrize("expression, after, expected", [
    ("0 0 31 2 1", "2027-01-30", "2027-02-01 2027-02-08 2027-02-15 2027-02-22 2028-02-07"),
    ("0 0 31 2,4 1", "2027-02-20", "2027-02-22 2027-04-05 2027-04-12"),
    ("0 0 1,31 * *", "2027-02-02", "2027-03-01 2027-03-31 2027-04-01 2027-05-01"),
    ("0 0 1,30 2,3 *", "2027-02-02", "2027-03-01 2027-03-30 2028-02-01"),
    ("0 0 1,30 2,3 */2", "2026-02-02", "2026-03-01 2027-03-30"),
    ("0 0 29 2 *", "2027-02-01", "2028-02-29 2032-02-29"),
    ("0 0 29 2 */7", "2027-02-01", "2032-02-29 2060-02-29"),
    ("@yearly", "2027-02-02", "2028-01-01 2029-01-01"),
    ("@annually", "2027-02-02", "2028-01-01"),
])  # fmt: skip
def test_days_that_not_every_month_has_are_neither_lost_nor_made_up(expression, after, expected):
    expected = [f"{day}T00:00:00Z" for day in expected.split()]

    assert fires(expression, f"{after}T00:00:00Z", len(expected)) == expected


# --- what is refused ------------------------------------------------------------------

PLACES = ["second", "minute", "hour", "day-of-month", "month", "day-of-week"]
WRONG_ITEMS = {
    "second": "5-1 */0 TZ=UTC CRON_TZ=UTC",
    "minute": "5-1 */0 5/0 +5 -5 1_0 1/2/3 *-5 *5 0.5 5- 1--5 0x5 *\n *\0",
    "hour": "22-2 11-2/3",
    "day-of-month": "15W ?",
    "month": "0 13 january sun 12-1 DEC-JAN",
    "day-of-week": "8 0-8 5#2 5L jan monday 5-1 MON-SUN",
}
BEYOND = {"second": "60", "minute": "60 75 H R", "hour": "24 5-24", "day-of-month": "0 32 L mon"}


def items(table):
    return [(f, i) for f in table for i in table[f].split(" ")]


@pytest.mark.parametrize("field, item", [*items(WRONG_ITEMS), *items(BEYOND)])
def test_a_wrong_item_is_refused_quoted_and_with_the_name_of_its_field(field, item):
    texts = ["1"] * 6
    texts[PLACES.index(field)] = item

    for text in (" ".join(texts), " ".join(texts).replace(item, f"1,{item}")):
        with pytest.raises(ValueError, match=f"^{field}: ") as caught:
            chronos.parse_schedule(text)
        assert repr(item) in str(caught.value) or repr(item.split("-")[-1]) in str(caught.value)


@pytest.mark.parametrize("expression, message", [
    ("", "fields"), ("* * * *", "neither 5 fields"), ("* * * * * * *", "nor 6 with seconds"),
    ("TZ=UTC * * * * * *", "nor 6 with seconds"), ("1,,2 * * * *", "^minute: ''"),
    ("\u0665 * * * *", "\u0665"), ("0 0 * * \u00a0", r"\\xa0"),
    ("@reboot", "'@reboot' is neither .* @yearly "), ("@daily 5", "'@daily 5' is neither"),
    ("@every", "nor of"), ("@every 1s 2s", "nor of"), ("@at", "nor of .* @at <time>"),
    ("@every 999ms", "the shortest interval is 1s"), ("@every -5s", "must be a duration"),
    ("@every 10", "must be a duration"), ("@at noon", "RFC 3339"), ("@at 2027-03-01", "RFC 3339"),
    ("@at 2027-02-29T00:00:00Z", "RFC 3339"),
    ("0 0 31 2 *", "never fires"), ("0 0 31 4,6,9,11 *", "never fires"),
    ("0 0 31 2 */2", "never fires"),
    ("@wee\u212aly", "nor of"),
])  # fmt: skip
def test_an_expression_of_another_form_or_that_never_fires_is_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        chronos.parse_schedule(expression)


# --- when the clock changes -----------------------------------------------------------

# America/New_York    2027-03-14 02:00 EST -> 03:00 EDT at 07:00Z; gap 02:00-03:00
#                     2027-11-07 02:00 EDT -> 01:00 EST at 06:00Z; overlap 01:00-02:00
# Europe/Madrid       2027-03-28 02:00 CET -> 03:00 CEST at 01:00Z
#                     2027-10-31 03:00 CEST -> 02:00 CET at 01:00Z
# Australia/Lord_Howe 2027-10-03 02:00 +10:30 -> 02:30 +11:00 at 15:30Z of the 2nd
#                     2027-04-04 02:00 +11:00 -> 01:30 +10:30 at 15:00Z of the 3rd
# Pacific/Apia        2011-12-30 00:00 -10:00 -> 2011-12-31 00:00 +14:00 at 10:00Z of the 30th
APIA = "Pacific/Apia"
CHANGES = [
    # fixed-time, in a gap: once, at the first instant after it
    (NEW_YORK, "30 2 * * *", "2027-03-13T12:00", "14T07:00 15T06:30"),
    (NEW_YORK, "0,15,30 2 * * *", "2027-03-13T12:00", "14T07:00 15T06:00 15T06:15"),
    (NEW_YORK, "0 3 * * *", "2027-03-13T12:00", "14T07:00 15T07:00"),
    (NEW_YORK, "30 2,3 * * *", "2027-03-13T12:00", "14T07:00 14T07:30 15T06:30"),
    (NEW_YORK, "0 2,3 * * *", "2027-03-13T12:00", "14T07:00 15T06:00 15T07:00"),
    (MADRID, "15 2 * * *", "2027-03-27T12:00", "28T01:00 29T00:15"),
    (LORD_HOWE, "15 2 * * *", "2027-10-02T00:00", "02T15:30 03T15:15"),
    (APIA, "0 12 * * *", "2011-12-29T12:00", "29T22:00 30T10:00 30T22:00 31T22:00"),
    (APIA, "0 12 30 12 *", "2011-12-01T00:00", "30T10:00"),
    # repeating, in a gap: nothing to make up
    (NEW_YORK, "*/30 * * * *", "2027-03-14T06:00", "14T06:30 14T07:00 14T07:30"),
    (NEW_YORK, "0 */2 * * *", "2027-03-14T04:00", "14T05:00 14T08:00 14T10:00"),
    (NEW_YORK, "* 2 * * *", "2027-03-13T12:00", "15T06:00 15T06:01"),
    (NEW_YORK, "* 30 2 * * *", "2027-03-13T12:00", "15T06:30 15T06:30:01"),
    (LORD_HOWE, "*/15 * * * *", "2027-10-02T15:00", "02T15:15 02T15:30 02T15:45"),
    (APIA, "0 */12 * * *", "2011-12-29T12:00", "29T22:00 30T10:00 30T22:00"),
    # fixed-time, in an overlap: the first pass only
    (NEW_YORK, "30 1 * * *", "2027-11-06T12:00", "07T05:30 08T06:30"),
    (NEW_YORK, "0,30 1-3 * * *", "2027-11-06T12:00", "07T05:00 07T05:30 07T07:00 07T07:30"),
    (NEW_YORK, "0,30 1-3 * * *", "2027-11-07T06:10", "07T07:00"),
    (MADRID, "30 2 * * *", "2027-10-30T12:00", "31T00:30"),
    (LORD_HOWE, "45 1 * * *", "2027-04-03T00:00", "03T14:45 04T15:15"),
    # repeating, in an overlap: both passes
    (NEW_YORK, "30 * * * *", "2027-11-07T04:00", "07T04:30 07T05:30 07T06:30 07T07:30"),
    (NEW_YORK, "*/30 1 * * *", "2027-11-06T12:00", "07T05:00 07T05:30 07T06:00 07T06:30 08T06:00"),
    (NEW_YORK, "*/30 1 * * *", "2027-11-07T05:45", "07T06:00"),
    (MADRID, "* 30 2 31 10 *", "2027-10-31T00:30:58", "31T00:30:59 31T01:30 31T01:30:01"),
    (LORD_HOWE, "15,45 * * * *", "2027-04-03T14:00", "03T14:15 03T14:45 03T15:15 03T15:45"),
]


def rules(version, times=(), types=(), offset=3600, isdst=0, name_at=0):
    """Return the file of a time zone that has one type of local time (RFC 9636)."""

    def block(code):
        header = struct.pack(">4sc15x6I", b"TZif", version, 0, 0, 0, len(times), 1, 4)
        changes = struct.pack(f">{len(times)}{code}", *times) + bytes(types)
        return header + changes + struct.pack(">ibb", offset, isdst, name_at) + b"CET\0"

    if version == b"\0":
        return block("i")
    return block("i") + block("q") + b"\nCET-1\n"


def test_a_time_zone_has_all_of_its_file_or_is_refused(zones):
    zones.give("Old/Name", like=MADRID)
    path = zones.directory / "Old/Name"
    whole = path.read_bytes()

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"zone Old/Name is (damaged|not on this machine)"):
            chronos.time_zone("Old/Name")
    for content in (whole, rules(b"\0"), rules(b"2", (0, 9), (0, 0))):
        path.write_bytes(content)
        chronos.time_zone.cache_clear()
        winter = chronos.to_datetime(NOON).astimezone(chronos.time_zone("Old/Name"))
        assert winter.utcoffset() == timedelta(hours=1)


@pytest.mark.parametrize("version", [b"\0", b"2"])
@pytest.mark.parametrize(("spoilt", "problem"), [
    ({"types": (0, 1)}, "a change has no type"),
    ({"times": (9, 0)}, "its changes are out of order"),
    ({"times": (9, 9)}, "its changes are out of order"),
    ({"offset": 26 * 3600}, "an offset is out of range"),
    ({"offset": -25 * 3600}, "an offset is out of range"),
    ({"offset": -822_042_184}, "an offset is out of range"),
    ({"isdst": -1}, "a type is none"),
    ({"name_at": 4}, "a type is none"),
])  # fmt: skip
def test_a_file_whose_changes_can_not_be_is_no_time_zone(zones, version, spoilt, problem):
    path = zones.directory / "Old-Name"
    path.parent.mkdir()
    path.write_bytes(rules(version, **{"times": (0, 9), "types": (0, 0)} | spoilt))

    with pytest.raises(ValueError, match=f"zone Old-Name is damaged: .*{problem}"):
        chronos.time_zone("Old-Name")


def test_a_damaged_time_zone_is_not_called_an_unknown_one(zones):
    zones.give("Old/Name", like=MADRID)
    zones.cut("Old/Name", 600)

    for name, said in (("Old/Name", "Old/Name is damaged"), ("New/Name", "must be an IANA time")):
        with pytest.raises(ValueError, match=said):
            chronos.a_timezone(name)


def test_every_time_zone_of_this_machine_can_be_used():
    for name in chronos._time_zones():
        assert chronos.time_zone(name).key == name


@pytest.mark.parametrize(("zone", "expression", "after", "expected"), CHANGES)
def test_a_clock_change_neither_loses_nor_repeats_a_fire_time(zone, expression, after, expected):
    whole = lambda text: text + (":00Z" if text.count(":") == 1 else "Z")
    expected = [whole(after[:8] + text) for text in expected.split()]

    assert fires(expression, whole(after), len(expected), zone) == expected


def test_every_counts_elapsed_time_across_a_clock_change():
    expected = [f"2027-03-14T{text}:00Z" for text in ("06:30", "08:00", "09:30")]

    assert fires("@EVERY 1h30m", "2027-03-14T05:00:00Z", 3, NEW_YORK) == expected


def test_at_fires_once_and_never_again():
    expected = ["2027-03-01T10:00:00.5Z", None]

    assert fires("@At 2027-03-01t12:00:00.5+02:00", "2027-03-01T09:00:00Z", 2) == expected
    assert fires("@at 2027-03-01T12:00:00Z", "2027-03-01T12:00:00Z", 1) == [None]


def test_a_fire_time_is_strictly_later_and_never_has_a_fraction():
    assert fires("* * * * * *", "2027-03-01T12:00:00.999999Z", 1) == ["2027-03-01T12:00:01Z"]
    assert fires("0 12 * * *", "2027-03-01T11:59:59.999999Z", 1) == ["2027-03-01T12:00:00Z"]
    assert fires("0 12 * * *", "2027-03-01T12:00:00Z", 1) == ["2027-03-02T12:00:00Z"]


# --- random schedules, against trying every instant -----------------------------------


class RandomCron:
    """A random expression, and the sets of numbers that it was made from."""

    RANGES = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 7))

    def __init__(self, chance, with_seconds=False, late_days=False, daily=False):
        made = [self._field(chance, low, high) for low, high in self.RANGES]
        made[0] = made[0] if with_seconds else ("0", {0})
        if late_days:  # what February does not have, and what it has
            days = {chance.randint(1, 2), chance.randint(28, 31)}
            made[3] = (",".join(map(str, days)), days)
        if daily:
            made[3:] = [("*", set(range(32)))] * 3
        self.texts = [text for text, _numbers in made]
        self.text = " ".join(self.texts[0 if with_seconds else 1 :])
        self.seconds, self.minutes, self.hours, self.days, self.months = (m[1] for m in made[:5])
        self.weekdays = {number % 7 for number in made[5][1]}
        self.repeating = any(text[0] == "*" for text in self.texts[:3])

    @staticmethod
    def _field(chance, low, high):
        a, b = sorted((chance.randint(low, high), chance.randint(low, high)))
        step = chance.randint(1, 7)
        texts = [
            *[("*", range(low, high + 1))] * 2, (f"*/{step}", range(low, high + 1, step)),
            (f"{a}", [a]), (f"{b},{a}", [a, b]), (f"{a}-{b}", range(a, b + 1)),
            (f"{a}-{b}/{step}", range(a, b + 1, step)), (f"{a}/{step}", range(a, high + 1, step)),
            (f"{a},{b}/{step}", [a, *range(b, high + 1, step)]),
        ]  # fmt: skip
        text, numbers = chance.choice(texts)
        return text, set(numbers)

    def on_day(self, day):
        both = self.texts[3][0] == "*" or self.texts[5][0] == "*"
        matches = (day.day in self.days, day.isoweekday() % 7 in self.weekdays)
        return day.month in self.months and (all(matches) if both else any(matches))

    def at_wall(self, wall):
        in_hour = wall.minute in self.minutes and wall.second in self.seconds
        return in_hour and wall.hour in self.hours and self.on_day(wall)

    def parse(self):
        """Return the schedule, or None where it never fires."""
        try:
            return chronos.parse_schedule(self.text)
        except ValueError as error:
            assert "never fires" in str(error)
            return None


class ClockChange:
    """What the wall shows at every minute (or second) around a change of the clock."""

    def __init__(self, zone, turn, step, reach):
        self.step, self.turn = timedelta(seconds=step), datetime.fromisoformat(turn + "Z")
        local = lambda at: at.astimezone(ZoneInfo(zone))
        times = [self.turn + n * self.step for n in range(-reach, reach + 1)]
        self.times = [(at, local(at).replace(tzinfo=None), local(at).fold) for at in times]
        before, first = self.times[reach - 1][1], self.times[reach][1]
        self.gap = [before + n * self.step for n in range(1, (first - before) // self.step)]

    def fires(self, cron, after):
        """Yield the fire times later than ``after``: ask of every instant what the rules say."""
        for at, wall, fold in self.times:
            made_up = at == self.turn and not cron.repeating and any(map(cron.at_wall, self.gap))
            its_turn = (cron.repeating or not fold) and cron.at_wall(wall)
            if at > after and (its_turn or made_up):
                yield at


TURNS = [
    (NEW_YORK, "2027-03-14T07:00:00"),
    (NEW_YORK, "2027-11-07T06:00:00"),
    (MADRID, "2027-03-28T01:00:00"),
    (MADRID, "2027-10-31T01:00:00"),
    (LORD_HOWE, "2027-10-02T15:30:00"),
    (LORD_HOWE, "2027-04-03T15:00:00"),
    (APIA, "2011-12-30T10:00:00"),
    ("Antarctica/Troll", "2027-03-28T01:00:00"),  # two hours
    ("Antarctica/Troll", "2027-10-31T01:00:00"),
    ("Asia/Beirut", "2027-10-30T21:00:00"),  # at midnight
]


@pytest.mark.parametrize("step, reach, cases", [(60, 1800, 50), (1, 5400, 15)])
@pytest.mark.parametrize("zone, turn", TURNS)
def test_around_a_clock_change_random_schedules_agree_with_trying_every_instant(
    zone, turn, step, reach, cases
):
    chance = random.Random(f"{zone} {turn} {step}")
    change = ClockChange(zone, turn, step, reach)

    for n in range(cases):
        cron = RandomCron(chance, with_seconds=step == 1, daily=n % 3)
        after = change.turn + chance.randint(-reach, reach // 4) * change.step
        for expected in islice(change.fires(cron, after), 4):
            got = cron.parse().next_after(chronos.to_instant(after), zone)
            assert chronos.to_datetime(got) == expected, (cron.text, after)
            after = expected


@pytest.mark.parametrize("late_days", [False, True])
def test_over_years_random_schedules_agree_with_trying_every_day(late_days):
    chance = random.Random(3)
    days = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=n) for n in range(365 * 4)]

    for _ in range(800):
        cron = RandomCron(chance, not late_days, late_days)
        after = chance.randint(0, 500)
        day = next(filter(cron.on_day, days[after:]), None)
        if day:
            hour, minute, second = map(min, (cron.hours, cron.minutes, cron.seconds))
            first = day.replace(hour=hour, minute=minute, second=second)
            got = cron.parse().next_after(chronos.to_instant(days[after]) - 1, "UTC")
            assert chronos.to_datetime(got) == first, (cron.text, days[after])


# --- backlogs -------------------------------------------------------------------------


@pytest.mark.parametrize("zone, turn", TURNS)
def test_a_backlog_agrees_with_walking_from_fire_time_to_fire_time(zone, turn):
    chance = random.Random(turn + zone)

    for n in range(30):
        cron = RandomCron(chance, with_seconds=n % 4 == 0, daily=n % 3)
        if not (schedule := cron.parse()):
            continue
        begin = chronos.parse_time(turn + "Z") - chance.randint(0, 40 * 3600) * SECOND
        walk = [schedule.next_after(begin, zone)]
        for _ in range(chance.randint(0, 120)):
            walk.append(schedule.next_after(walk[-1], zone))
        last = chance.randint(walk[-1], schedule.next_after(walk[-1], zone) - 1)

        for most in (1, 2, 101):
            expected = (len(walk), walk[-most:])
            assert schedule.backlog(walk[0], last, zone, most) == expected, (cron.text, last)


@pytest.mark.parametrize(("zone", "expression", "after", "_expected"), CHANGES)
def test_a_backlog_is_exact_on_every_day_around_a_clock_change(zone, expression, after, _expected):
    schedule = chronos.parse_schedule(expression)
    begin = chronos.parse_time(after[:10] + "T00:00:00Z") - 3 * 86_400 * SECOND
    walk = [schedule.next_after(begin, zone)]
    while len(walk) < 9 or (walk[-1] - begin < 6 * 86_400 * SECOND and len(walk) < 300):
        walk.append(schedule.next_after(walk[-1], zone))

    for n in range(0, len(walk), 1 + len(walk) // 10):
        assert schedule.backlog(walk[n], walk[-1], zone, 1) == (len(walk) - n, walk[-1:])
        assert schedule.backlog(walk[0], walk[n], zone, 1) == (n + 1, [walk[n]])


@pytest.mark.parametrize("expression", ["@every 90s", "@at 2027-03-01T12:00:00Z", "*/5 * * * *"])
def test_a_backlog_can_be_a_single_fire_time(expression):
    schedule = chronos.parse_schedule(expression)

    assert schedule.backlog(NOON, NOON + SECOND, "UTC", 2) == (1, [NOON])


def test_counting_a_year_of_seconds_takes_no_year():
    schedule = chronos.parse_schedule("* * * * * *")
    end = chronos.parse_time("2028-03-01T12:00:00Z")
    began = time.monotonic()

    newest = [end - n * SECOND for n in range(100, -1, -1)]
    assert schedule.backlog(NOON, end, NEW_YORK, 101) == (366 * 86_400 + 1, newest)
    assert time.monotonic() - began < 1


def test_one_schedule_answers_several_threads_at_once():
    schedule, alone = (chronos.parse_schedule(text) for text in ("0 0 29 2 *", " 0 0 29 2 *"))
    instants = [NOON + n * 13 * 86_400 * SECOND for n in range(1300)]
    expected = [alone.next_after(at, MADRID) for at in instants]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda at: schedule.next_after(at, MADRID), instants))
    finally:
        sys.setswitchinterval(interval)

    assert got == expected


# ======================================================================================
# 5. Checks
# ======================================================================================


def wrong(data):
    """Return the code and the wrong fields (with their messages) of a job that is refused."""
    with pytest.raises(chronos.ApiError) as caught:
        chronos.validate_job(data, RETRY, NOON)
    return caught.value.code, {d["field"]: d["message"] for d in caught.value.details}


WRONG_URLS = r"""localhost/hook /hook //host/hook ftp://host/ file:///etc/passwd http:// http:///x
    http://[::1 http://host:0/ http://host:99999/ http://host:x/ http://u:p@host/ http://u@host/
    http://127.0.0.1\@evil/ http://*host/ http://h*/ http://.x/ http://a..b/ http://h%41/ http://h|x/
    http://[1.2.3.4]/ http://[v1.a]/ http://[::1]x/ http://[fe80::1%eth0]/ http://h\u2100x/"""
RESERVED = ["Content-Length", "TRANSFER-encoding", "Connection", "upgrade", "TE", "Trailer"]
RESERVED += ["Expect", "Keep-Alive", "Proxy-Authorization", "X-Chronos-Job-ID"]
LONG = "x" * 70_000
BASIC, BEARER = {"type": "basic", "username": "a", "password": ""}, {"type": "bearer", "token": "x"}
# fmt: off
WRONG = {  # field: wrong values of it
    "name": [None, 5, "", "   ", "x" * 201, "a\nb", "a\0b", "\x1b[1m", "\ud800", ["a"]],
    "description": [5, LONG, "\0", "\udfff"],
    "schedule": [None, 5, "", "x", "0 0 31 2 *", "@at 2027-03-01T12:00:00Z", ["@daily"],
                 "0 0 * * *" + " " * 192, "9" * 10_000 + " * * * *"],
    "timezone": [5, "", "Mars", "America", "../UTC", "UTC\0", "x" * 300, ["UTC"], "europe/madrid"],
    "webhook": [None, "http://x/", [], True],
    "timeout": [5, "5", "-1s", "99ms", "25h", "5 m", True],
    "concurrency": ["", "Forbid", 1, ["forbid"], {}],
    "missed_run_policy": ["run", True],
    "tags": ["a", [], {str(n): "x" for n in range(51)}],
    "tags.team": [5, None, "a\nb", "x" * 201],
    "enabled": [0, 1, "true", []],
    "retry_policy": ["x", [], 3],
    "retry_policy.max_attempts": [0, 101, -1, 1.0, "3", True, 9 * 10**18, 10**4000],
    "retry_policy.initial_interval": [1, "0s", "25h", "1"],
    "retry_policy.max_interval": [1, "0s", "25h", "forever"],
    "retry_policy.multiplier": [0, 0.99, 100.1, True, "2", 10**400],
    "retry_policy.attempt_timeout": [1, "99ms", "25h"],
    "webhook.url": [None, 5, "", *WRONG_URLS.split(), "http://ho st/", "http://h/a b", "http://h/\n",
                    "http://h/\0", "http://h/\ud800", "http://h/" + LONG],
    "webhook.method": ["", "get", "TRACE", "GET\r\n", 1, ["GET"]],
    "webhook.body": [5, {}, "a\0b", "\x1b", "\ud800", "x" * (2**20 + 1)],
    "webhook.signing_secret": [
        5, "", " ", "s3cret", "whsec_", MASK, "whsec_x" + SIGNING_KEY, SIGNING_KEY[:-1] + "-",
        SIGNING_KEY[:-4], "A" * 88, f"{SIGNING_SECRET}  {SIGNING_KEY}", f" {SIGNING_SECRET}",
        " ".join([SIGNING_KEY] * 3), f"{SIGNING_KEY} x", SIGNING_SECRET + "\n", [SIGNING_SECRET]],
    "webhook.success_codes": [200, [], [99], [600], ["200"], [True], [200.0], [200] * 101],
    "webhook.verify_tls": [0, "no"],
    "webhook.headers": ["a", [], {f"x{n}": "" for n in range(51)}],
    "webhook.headers.X": [5, None, "a\0b", "a\r\nb", "ж", "😀", "\ud800", " a", "\x85", LONG],
    **{f"webhook.headers.{name}": ["x"] for name in ("", "a b", "é", "a:", *RESERVED)},
    **{f"webhook.headers.{name}": [MASK]
       for name in ("x-my-token", "Cookie", "X-Api-Key", "Authorization")},
    "webhook.auth": ["x", [], True],
    "webhook.auth.type": [{}, {"type": "digest"}, {"type": ["basic"]}, {"token": "x"}],
    "webhook.auth.username": [BASIC | {"username": v} for v in (None, "", 5, "a:b", "a\n")],
    "webhook.auth.password": [BASIC | {"password": v} for v in (None, 5, "a\0", MASK)],
    "webhook.auth.token": [BEARER | {"token": v} for v in (None, 5, "ж", "a\nb", MASK)],
    "webhook.auth.api_key": [KEY | {"api_key": v} for v in (None, "a\nb", MASK)],
    "webhook.auth.header": [KEY | {"header": v} for v in ("a b", "Host:", 5, "Content-Length")],
}
# fmt: on


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_field_alone(path):
    *parents, name = path.split(".", 2)
    for value in WRONG[path]:
        body = {"name": "a", "schedule": "@daily", "webhook": {"url": URL}}
        if parents[1:] == ["auth"]:
            body["webhook"]["auth"] = value
        else:
            inner = body
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = value

        code, details = wrong(body)

        assert [p.removesuffix(".type") for p in details] == [path.removesuffix(".type")]
        assert code == ("INVALID_TIMEOUT" if path == "timeout" else "VALIDATION_ERROR")


@pytest.mark.parametrize("wrong_one", ["%zz", "%", "%4", *'[]|"<>\\^`{} ö\u3000😀'])
def test_a_character_that_no_url_may_have_is_refused_with_what_to_write(wrong_one):
    typed, right = wrong_one[0], quote(wrong_one[0])

    for place in ("/a{}", "/?a={}&b", "/a#{}"):
        _code, details = wrong(job_body(URL + place.format(wrong_one)))

        shown = "a blank" if typed.isspace() else typed
        assert f"write {right} for {shown}" in details["webhook.url"]
        validate(webhook={"url": URL + place.format(wrong_one.replace(typed, right))})


def test_every_wrong_field_is_reported_at_once():
    hook = {"url": "x", "method": "x", "headers": {"a b": "x", "TE": "x"}, "auth": {"type": "x"}}
    body = {"schedule": "x", "timeout": 5, "retry_policy": {"max_attempts": 0}, "webhook": hook}

    code, details = wrong(body)

    paths = ["name", "schedule", "timeout", "retry_policy.max_attempts", "webhook.url"]
    paths += [f"webhook.{name}" for name in ("method", "headers.a b", "headers.TE", "auth.type")]
    assert details.keys() == set(paths)
    assert code == "VALIDATION_ERROR"


def test_a_past_instant_is_reported_beside_a_wrong_timeout():
    code, details = wrong(job_body(URL, schedule="@at 2020-01-01T00:00:00Z", timeout="x"))

    assert (code, details.keys()) == ("VALIDATION_ERROR", {"schedule", "timeout"})


@pytest.mark.parametrize(("fields", "path", "meant"), [
    ({"timezon": "UTC"}, "timezon", "timezone"), ({"shedule": "@daily"}, "shedule", "schedule"),
    ({"webhook": {"url": URL, "metod": "GET"}}, "webhook.metod", "method"),
    ({"retry_policy": {"max_attemps": 3}}, "retry_policy.max_attemps", "max_attempts"),
    ({"webhook": {"url": URL, "auth": BEARER | {"tokn": ""}}}, "webhook.auth.tokn", "token"),
])  # fmt: skip
def test_an_unknown_field_is_refused_with_the_nearest_known_one(fields, path, meant):
    code, details = wrong(job_body(URL) | fields)

    assert (code, list(details)) == ("VALIDATION_ERROR", [path])
    assert f"(did you mean {meant!r}?)" in details[path]


@pytest.mark.parametrize("webhook, doubled", [
    ({"headers": {"X-Own": "1", "x-own": "2"}}, {"headers.x-own": "webhook.headers.X-Own"}),
    ({"headers": {"X-Api-Key": "x"}, "auth": {"type": "api_key", "api_key": "k"}},
     {"headers.X-Api-Key": "webhook.auth.header"}),
    ({"headers": {"X-OWN": "x"}, "auth": KEY | {"header": "X-Own"}},
     {"headers.X-OWN": "webhook.auth.header"}),
    ({"signing_secret": SIGNING_SECRET, "auth": KEY | {"header": "webhook-signature"},
      "headers": {"Webhook-Id": "x", "WEBHOOK-TIMESTAMP": "x", "webhook": "x"}},
     dict.fromkeys(["auth.header", "headers.Webhook-Id", "headers.WEBHOOK-TIMESTAMP"],
                   "webhook.signing_secret")),
])  # fmt: skip
def test_a_header_that_is_set_twice_is_refused(webhook, doubled):
    _code, details = wrong(job_body(URL, webhook=webhook | {"url": URL}))

    assert details.keys() == {f"webhook.{field}" for field in doubled}
    for field, setter in doubled.items():
        assert f"that {setter} sets" in details[f"webhook.{field}"]


def test_a_refused_header_is_named_and_credentials_in_a_url_are_pointed_to_auth(service):
    names = ["Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "TE", "Trailer"]
    names += ["Expect", "Keep-Alive", "Proxy-Connection", "x-Chronos-Attempt", "a b", "a\r\nb", "é"]
    webhook = {"headers": dict.fromkeys(names, "x") | {"X-Own": "a\r\nX-Forged: b"}}

    url = NOBODY.replace("//", "//user:secret-word@")
    error = service.error(400, "POST", "/jobs", job_body(url, webhook=webhook))

    messages = {detail["field"]: detail["message"] for detail in error["details"]}
    headers = {f"webhook.headers.{name}" for name in (*names, "X-Own")}
    assert messages.keys() == headers | {"webhook.url"}
    assert "webhook.auth" in messages["webhook.url"] and "secret-word" not in str(error)


# ======================================================================================
# 6. Jobs
# ======================================================================================


def validate(**fields):
    """Return the configuration of a job that is right but for ``fields``."""
    return chronos.validate_job(job_body(URL, **fields), RETRY, NOON)[0]


# --- what a job is --------------------------------------------------------------------


def test_what_a_job_leaves_out_or_sets_to_null_has_the_defaults_of_the_reference():
    body = {"name": "a", "schedule": "@daily", "webhook": {"url": URL}}

    config, enabled = chronos.validate_job(body, RETRY, NOON)

    defaults = {"timezone": "UTC", "timeout": "5m", "concurrency": "forbid", "tags": {}}
    defaults |= {"description": None, "retry_policy": RETRY}
    assert config.items() >= defaults.items()
    webhook = {"method": "GET", "success_codes": None, "body": None}
    assert config["webhook"].items() >= webhook.items()
    assert enabled is False
    assert chronos.validate_job(dict.fromkeys(chronos.JOB_FIELDS) | body, RETRY, NOON)[0] == config


def test_the_job_of_the_reference_is_taken_as_it_is_written():
    config, enabled = chronos.validate_job(EXAMPLE, RETRY | {"multiplier": 7}, NOON)

    plain = {name: EXAMPLE[name] for name in EXAMPLE.keys() - {"webhook", "enabled"}}
    assert enabled is True
    assert config.items() >= (plain | {"retry_policy": RETRY}).items()
    assert config["webhook"].items() >= EXAMPLE["webhook"].items()


def test_ordinary_text_urls_and_headers_are_taken_unchanged():
    hook = {
        "url": "https://[::1]:8443/a%20b/~x;y?q=%C3%A9&mail=a@b#top",
        "headers": {"X-Any.thing_1": "é\tÿ ~", "Authorization": "*" * 9, "Host": "a.b"},
        "body": "tab\t line\r\n é 😀",
        "auth": {"type": "basic", "username": "jürgen", "password": " pä:ss 😀"},
    }

    config = validate(name="Ünïcode 😀", description="two\nlines", webhook=hook)

    assert config["webhook"].items() >= hook.items()
    assert (config["name"], config["description"]) == ("Ünïcode 😀", "two\nlines")


def test_tabs_separate_the_fields_of_a_jobs_schedule():
    assert validate(schedule="0 9\t* * *")["schedule"].split() == ["0", "9", "*", "*", "*"]


@pytest.mark.parametrize("expression", ["@every 999999999h", "@at 9999-12-31T23:59:59-10:00"])
def test_a_schedule_whose_fire_time_no_date_can_show_is_refused(expression):
    with contextlib.suppress(chronos.ApiError):
        config = validate(schedule=expression)
        job = chronos.Job("id", 1, True, NOON, NOON, None, config)
        chronos.format_time(job.next_after(NOON))
        raise AssertionError("accepted")


def test_what_the_server_adds_to_a_job_may_be_sent_back():
    names = ["id", "version", "created_at", "updated_at", "next_run", "last_execution"]

    assert validate(**dict.fromkeys(names, "x"), managed_by=None) == validate()


def test_values_are_kept_in_their_normal_form_and_a_retry_policy_is_completed():
    given = {"initial_interval": "1000ms", "attempt_timeout": "90s", "max_attempts": None}
    body = job_body(URL, timeout="60s", schedule="  @daily ", retry_policy=given)

    config, _enabled = chronos.validate_job(body, RETRY | {"max_attempts": 7}, NOON)

    assert (config["timeout"], config["schedule"]) == ("1m", "@daily")
    assert config["retry_policy"] == RETRY | {"attempt_timeout": "1m30s", "max_attempts": 7}


# --- secrets: shown nowhere, kept, and sent only where they were meant for ------------

SECRETS = {  # by the field that is the secret
    "auth.token": WITH_SECRET["bearer"], "auth.password": WITH_SECRET["basic"],
    "auth.api_key": {"auth": {"type": "api_key", "api_key": CANARY, "header": "X-Key"}},
    "signing_secret": {"signing_secret": SIGNING_SECRET},
} | {f"headers.{name}": {"headers": {name: CANARY}}
     for name in ("Authorization", "cookie", "X-PASSWORD", "x-api-key", "the-secret")}  # fmt: skip
EACH_SECRET = pytest.mark.parametrize(("field", "webhook"), SECRETS.items(), ids=SECRETS)
NAMES = ("authorization", "Cookie", "X-Auth-TOKEN", "client-secret-2", "Passwords", "x-api-key-old")
PLAIN = {"username": "X-Key", "header": "X-Key"}  # what is no secret in an auth
SECRET_KINDS = [{"headers": {name: CANARY, "X-Plain": "a"}} for name in NAMES]
SECRET_KINDS += [{"auth": {"type": kind, **{name: PLAIN.get(name, CANARY) for name in table}}}
          for kind, table in chronos.AUTH_FIELDS.items()]  # fmt: skip
VARIANTS = [
    {"schedule": "@every 90m", "timezone": "Europe/Madrid", "description": "two\nlines"},
    {"schedule": "@at 2099-01-01T00:00:00+02:00", "enabled": True, "tags": {"a": "", "b": "😀"}},
    {"schedule": "*/7 1-5 29 feb *", "missed_run_policy": "execute_all", "concurrency": "replace"},
    {"webhook": {"success_codes": [201], "body": "é😀", "verify_tls": False}, "timeout": "1m30s"},
    {"method": "GET", "webhook": {"body": ""}, "retry_policy": {"multiplier": 1}},
    *({"method": method, "schedule": "@weekly"} for method in ("HEAD", "PUT", "DELETE", "OPTIONS")),
]


def repeats_values(handler):
    """Repeat the headers of the request, in the reason phrase and in the body."""
    said = " ".join(handler.headers.values())
    return 500, said, said.encode()


def signature_of(headers, body, *secrets):
    """Return the header webhook-signature that these secrets make of a request."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets or [SIGNING_KEY]]
    digests = [hmac.new(key, signed, "sha256").digest() for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


class Listener(Client):
    """Remembers what it was told."""

    told = ""

    def call(self, *request, **options):
        status, envelope = super().call(*request, **options)
        self.told += json.dumps(envelope)
        return status, envelope


def test_no_secret_of_a_job_is_shown_and_its_configuration_keeps_them():
    names = ["authorization", "Cookie", "X-Token", "my-secret", "X-PASSWORD", "x-api-key-2"]
    headers = dict.fromkeys(names, "s3cret") | {"X": "y"}
    config = validate(webhook={"headers": headers, "auth": KEY | {"api_key": "s3cret"}})
    job = chronos.Job("id", 1, True, NOON, NOON, None, config)

    shown = job.to_json(None)

    assert "s3cret" not in json.dumps(shown)
    assert shown["webhook"]["headers"] == dict.fromkeys(names, MASK) | {"X": "y"}
    assert shown["webhook"]["auth"]["api_key"] == MASK
    assert job.config["webhook"]["auth"]["api_key"] == "s3cret"


@pytest.mark.parametrize("secret", SECRET_KINDS, ids=str)
def test_every_kind_of_job_is_put_back_unchanged_and_tells_no_secret(
    service, target, caplog, secret
):
    caplog.set_level("DEBUG")
    target.behave = repeats_values
    client = Listener(service.url)
    sent = [CANARY, base64.b64encode(f"X-Key:{CANARY}".encode()).decode()]

    for fields in VARIANTS:
        more = {"webhook": fields.get("webhook", {}) | secret}
        more["retry_policy"] = fields.get("retry_policy", {}) | ONCE
        job = client.create(target.url, **fields | more)
        assert put(client, job, client.get(path_of(job))) == job
        run = client.post(trigger_path(job))
        for state in ("/disable", "/enable"):
            client.post(path_of(job, state))
        names = {"job_id": job["id"], "exec_id": run["id"]}
        for method, template, _name in JSON_ROUTES:
            if method == "GET" and "preview" not in template:
                path = re.sub("<(.*?)>", lambda match: names.get(match[1], "1"), template)  # noqa: B023
                client.get(path.removeprefix("/api/v1"))
        for wrong in (CANARY + "\n", CANARY * 1000, [CANARY], {CANARY[:6]: CANARY}):
            body = json.dumps({"webhook": secret}).replace(json.dumps(CANARY), json.dumps(wrong))
            client.error(400, "PATCH", path_of(job), body)

        arrived = " ".join(target.take()[2].values())
        assert any(value in arrived for value in sent), arrived
        assert (run["status"], run["error"].count(MASK)) == ("failed", 1)
        assert MASK in json.dumps(job["webhook"])
        assert MASK in run["response"] or fields.get("method") == "HEAD"

    assert not [value for value in sent if value in client.told + caplog.text]


@EACH_SECRET
def test_an_execution_shows_the_request_of_its_version_masked(service, target, field, webhook):
    headers = {"X-Plain": "1"} | webhook.get("headers", {})
    job = service.create(target.url + "/old", webhook=webhook | {"headers": headers, "body": "{}"})
    execution = service.post(trigger_path(job))
    patch(service, job, {"webhook": {"url": target.url + "/new", "body": "new", "method": "PUT"}})

    request = service.get(path_of(job, f"/executions/{execution['id']}"))["request"]

    arrived = dict(target.take()[2])
    shown = request.pop("headers")
    hidden = {name for name in shown if shown[name] == MASK}
    secrets = ("Authorization", "webhook-signature")
    assert request == {"method": "POST", "url": target.url + "/old", "body": "{}"}
    assert hidden == {n for n, v in arrived.items() if CANARY in v or n in secrets} != set()
    assert {"X-Plain", "Content-Type", "User-Agent"} <= shown.keys() <= arrived.keys()
    assert differences(shown, arrived).keys() == hidden


@EACH_SECRET
def test_what_get_gave_can_be_sent_back_and_the_target_gets_secrets(
    service, target, field, webhook
):
    webhook = EXAMPLE["webhook"] | {"headers": {}, "auth": None, "url": target.url} | webhook
    job = service.post("/jobs", EXAMPLE | {"webhook": webhook})

    def sent():
        service.post(trigger_path(job))
        _method, _path, headers, body, _at = target.take()
        own = ("X-Chronos", "Idempotency", "webhook-")  # of each execution
        kept = {n: v for n, v in headers.items() if not n.startswith(own)}
        return kept | {"signed": headers["webhook-signature"] == signature_of(headers, body)}

    before = sent()
    assert before["signed"] is (field == "signing_secret")
    shown = service.get(path_of(job))
    assert put(service, job, shown) == shown
    assert put(service, job, job | {"description": "changed"})["version"] == 2
    assert sent() == before
    patch(service, job, {"webhook": {"url": target.url + "/b", "auth": job["webhook"]["auth"]}})
    assert sent() == before
    for path in (path_of(job), path_of(job, "/versions"), path_of(job, "/versions/1")):
        assert not re.search(f"{CANARY}|{SIGNING_KEY[:20]}", json.dumps(service.get(path)))


@pytest.mark.parametrize("url", ["http://127.0.0.1:2", "https://127.0.0.1:1", "http://localhost:1"])
@EACH_SECRET
def test_a_stored_secret_does_not_go_to_another_origin(service, field, webhook, url):
    job = service.create(NOBODY, webhook=webhook)
    moved = job | {"webhook": job["webhook"] | {"url": url}}

    for method, body in (("PATCH", {"webhook": {"url": url}}), ("PUT", moved)):
        assert wrong_fields(service, method, path_of(job), body) == [f"webhook.{field}"]
    assert service.get(path_of(job)) == job
    assert patch(service, job, {"webhook": webhook | {"url": url}})["webhook"]["url"] == url


def test_a_stored_secret_does_not_go_to_another_virtual_host(service, target):
    webhook = {"auth": {"type": "bearer", "token": "canary-token"}, "headers": {"Host": "a.test"}}
    job = service.create(target.url, webhook=webhook)

    for host in ("b.test", None):
        patch = {"webhook": {"headers": {"Host": host}}}
        error = service.error(400, "PATCH", path_of(job), patch)
        assert error["details"][0]["field"] == "webhook.auth.token"
    service.expect(200, "PATCH", path_of(job), {"webhook": {"headers": {"X-More": "1"}}})


@pytest.mark.parametrize(("before", "after"), [
    ("http://localhost:1", "HTTP://LOCALHOST:01/x#y"), ("http://localhost:", "http://localhost:80"),
    ("http://b\u00fccher.test:1", "http://xn--bcher-kva.test:1"),
])  # fmt: skip
def test_an_origin_that_is_spelled_otherwise_is_the_same_one(service, before, after):
    job = service.create(before, webhook=WITH_SECRET["bearer"])

    assert patch(service, job, {"webhook": {"url": after}})["webhook"]["url"] == after


OLD_URLS = {  # that only an earlier version took: what it called
    "/a/../%7Eb|c?\u00f6=[%41]#x|y": "/~b%7Cc?%C3%B6=%5BA%5D",
    "/%zz?a=%7E": "/%25zz?a=~",
}


@pytest.fixture
def aged(service):
    """Makes a job whose URL an earlier version took, and which this one refuses."""

    def make(url, **webhook):
        job = service.create(NOBODY, webhook=webhook)
        config = service.service.store.jobs.version(job["id"], 1)["config"]
        config["webhook"]["url"] = url
        spoil(service.service, chronos.Job(job["id"], 1, True, 0, 0, 0, {}), json.dumps(config))
        return service.get(path_of(job))

    return make


def test_a_secret_of_a_url_that_is_refused_by_now_does_not_go_to_another_origin(service, aged):
    for url in (f"{NOBODY}/a|b", "http://*.test/"):
        job = aged(url, **WITH_SECRET["bearer"])

        body = {"webhook": {"url": "http://127.0.0.1:2/"}}
        assert wrong_fields(service, "PATCH", path_of(job), body) == ["webhook.auth.token"]


def test_an_api_key_in_the_host_header_is_a_virtual_host_like_any(service, target):
    host = {"type": "api_key", "header": "host", "api_key": "a.test"}
    job = service.create(target.url, webhook={"headers": {"X-Token": CANARY}, "auth": host})
    other = service.create(target.url, webhook={"headers": {"X-Token": CANARY, "Host": "a.test"}})

    assert put(service, job, job) == job
    for changed, auth in ((job, {"api_key": "b.test"}), (job, None), (other, host)):
        body = {"webhook": {"auth": auth}}
        wrong = wrong_fields(service, "PATCH", path_of(changed), body)
        assert wrong == ["webhook.headers.X-Token"]
    service.post(trigger_path(job))
    assert target.take()[2]["Host"] == "a.test"


# --- secrets that a target repeats ----------------------------------------------------


@pytest.mark.parametrize("webhook, secrets", [
    ({"headers": {"X-Auth-Token": "sesame"}}, ["sesame"]),
    ({"headers": {"Authorization": "Digest canary"}}, ["canary"]),
    ({"auth": {"type": "bearer", "token": "canary-1"}}, ["canary-1"]),
    ({"auth": {"type": "api_key", "header": "X-Key", "api_key": "canary"}}, ["canary"]),
    ({"auth": {"type": "basic", "username": "u", "password": "canary"}},
     ["canary", base64.b64encode(b"u:canary").decode()]),
    ({"signing_secret": f"{SIGNING_SECRET} {SIGNING_KEY[::-1]}"},
     [SIGNING_SECRET, SIGNING_KEY, SIGNING_KEY[::-1], quote(SIGNING_KEY, safe="")]),
])  # fmt: skip
def test_secrets_are_masked_in_response_and_error(send, hostile, webhook, secrets):
    echo = " ".join(secrets).encode()
    head = b"HTTP/1.1 500 %s\r\nContent-Length: %d\r\n\r\n%s" % (echo, len(echo), echo)

    outcome = send(hostile(answers(head)).url, **webhook)

    masked = " ".join([MASK] * len(secrets))
    assert (outcome.error, outcome.response) == (f"the server answered 500 {masked}", masked)


def test_a_secret_of_five_characters_is_too_common_to_be_masked(send, hostile):
    server = hostile(answers(typed(b"text/plain", b"today")))

    assert send(server.url, headers={"X-Token": "today"}).response == "today"


ODD_SECRET = 's3cr"et\\p\u00e4ssw\u00f6rd'
AS_JSON = {"auth": {"type": "basic", "username": "ada", "password": ODD_SECRET}}
TOKEN = {"headers": {"X-Token": "canary-and-more"}}
TWO = {"headers": {"X-Token": "0SECRET0", "X-Secret": "0SECRET0-and-more"}}
SHORT, EMPTY = "0SEC|-and-more", b"\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(("webhook", "answer", "parts"), [
    (AS_JSON, typed(b"application/json", json.dumps({"got": ODD_SECRET}).encode()), "s3cr"),
    (AS_JSON, typed(b"text/plain; charset=utf-8", b"x" * 65_521 + ODD_SECRET.encode()), "s3cr"),
    (TOKEN, b"HTTP/1.1 500 " + b"x" * 166 + b" canary-and-more" + EMPTY, "canary"),
    (TOKEN, typed(b"text/plain", b"x" * 65_529 + b"canary-and-more"), "canary"),
    (TWO, typed(b"text/plain", b"x" * 65_526 + b"0SECRET0"), SHORT),
    (TWO, typed(b"text/plain", b"x" * 65_531 + b"0SECRET0"), SHORT),
    (TWO, b"HTTP/1.1 500 " + b"x" * 171 + b"0SECRET0" + EMPTY, SHORT),
    (TWO, typed(b"text/plain", b"0SECRET0-and-more"), SHORT),
    (TWO, CHUNKED + b"0SECRET0\r\n", SHORT),
], ids=range(9))  # fmt: skip
def test_no_part_of_a_secret_that_a_target_repeats_is_kept(send, hostile, webhook, answer, parts):
    outcome = send(hostile(answers(answer)).url, **webhook)

    assert outcome.error or outcome.response
    assert not re.search(parts, f"{outcome.error}{outcome.response}")


def as_json(secret):
    return json.dumps(secret)[1:-1]


def in_capitals(escaped):
    return re.sub(r"\\u[0-9a-f]{4}", lambda match: "\\u" + match[0][2:].upper(), escaped)


SPELLED = [
    ("Zm9v/YmFy+abc==", lambda secret: as_json(secret).replace("/", r"\/")),  # PHP
    ("Zm9v/YmFy+abc==", lambda secret: quote(secret, safe="")),
    ("Zm9v/YmFy+abc==", lambda secret: quote(secret).lower().replace("zm9v/ymfy", "Zm9v/YmFy")),
    ("p&ssword<123", lambda secret: secret.replace("&", r"\u0026").replace("<", r"\u003c")),  # Go
    ("p&ssword<123", lambda secret: secret.replace("&", r"\x26").replace("<", r"\x3C")),
    ("p&ss'word\"<123", html.escape),
    ("p&ss'word<123", lambda secret: "".join(f"&#{ord(character)};" for character in secret)),
    ("p\u00ffss word-\u00fe", lambda secret: in_capitals(as_json(secret))),
    ("p\u00ffss word-\u00fe", lambda secret: "p&yuml;ss word-&#xfe;"),
    ("p\u00ffss word-\u00fe", quote), ("p\u00ffss word-\u00fe", lambda secret: "p%FFss+word-%FE"),
    ("p\u00ffss word-\u00fe", lambda secret: repr(secret.encode())[2:-1]),
    ("\U0001f511-and-lock", as_json), ("\U0001f511-and-lock", quote),
    ('s3cr"et\\p\u00e4ss', lambda secret: as_json(as_json(secret))),
    ('s3cr"et/p\u00e4ss', lambda secret: html.escape(as_json(as_json(secret)))),
    ("100%41&amp;more", lambda secret: secret), ('100%41"&amp;more', as_json),
]  # fmt: skip


@pytest.mark.parametrize(("secret", "spell"), SPELLED, ids=range(len(SPELLED)))
def test_a_secret_is_masked_however_it_is_spelled(secret, spell):
    auth = {"type": "basic", "username": "ada", "password": secret}
    webhook = chronos.Webhook(WEBHOOK | {"auth": auth})
    echo = spell(secret)

    assert webhook.masked(f'{{"a": "\\u00e4%41", "b": "{echo}", "c&lt;"}}') == (
        '{"a": "\\u00e4%41", "b": "********", "c&lt;"}'
    )
    for length in range(len(spell(secret[:3])), len(echo)):  # where the text may be cut
        kept = webhook.masked("\\u00e4: " + echo[:length], cut=True)
        assert kept in ("\\u00e4: ", "\\u00e4: ********"), length


def test_a_header_that_comes_back_in_latin_1_is_masked(send, hostile):
    server = hostile(answers(typed(b"text/plain", "<p\u00e4ssw\u00f6rd>".encode("latin-1"))))

    assert send(server.url, headers={"X-Token": "p\u00e4ssw\u00f6rd"}).response == f"<{MASK}>"


@pytest.mark.parametrize(
    "text", ["\\" * 65_536, r"\u0041" * 10_000, "%2541" * 13_000, "&#65;" * 13_000]
)
def test_a_text_full_of_escapes_costs_little(text):
    webhook = chronos.Webhook(WEBHOOK | {"headers": {"X-Token": "A" * 6 + CANARY}})
    began = time.process_time()

    assert webhook.masked(text) == text
    assert time.process_time() - began < 0.5


# ======================================================================================
# 7. Settings
# ======================================================================================

# --- the file and the environment -----------------------------------------------------


@pytest.mark.parametrize("content", ["", "# x\n", "server:\n", "server:\n  http:\n", "{}"])
def test_a_file_that_says_nothing_means_the_defaults(load, content):
    settings = load(content)

    expected = {"server.http.address": "127.0.0.1:8080", "store.synchronous": "FULL"}
    expected |= {"dispatcher.max_concurrent_jobs": 64, "dispatcher.max_concurrent_per_host": 48}
    expected |= {"scheduler.missed_run_grace": 10 * SECOND, "scheduler.default_retry_policy": RETRY}
    assert {key: settings.value(key) for key in expected} == expected


def test_a_value_of_the_file_replaces_its_default_and_no_other(load):
    content = "scheduler:\n  default_retry_policy: {max_attempts: 5, max_interval: 90s}\n"

    settings = load(content + "dispatcher: {max_concurrent_jobs: 1, connect_timeout: 1500ms}")

    retry_policy = RETRY | {"max_attempts": 5, "max_interval": "1m30s"}
    assert settings.scheduler.default_retry_policy == retry_policy
    assert settings.dispatcher.max_concurrent_per_host == 1
    assert settings.dispatcher.connect_timeout == 1_500_000


THREADS = "server:\n  http:\n    threads: "
PAUSED = "scheduler:\n  paused: "
NODE = "cluster:\n  node_id: "
DIAL = "dispatcher:\n  "
CLIENT = DIAL + "client_certificates:"
SIGN_IN = f'auth: {{type: basic, users: {{ada: "{ADA}"}}}}'
QUOTES = 'a value with ":", "#", "@" or "*" wants quotes'
# fmt: off
TAGS_AND_SHAPES = [
    (NODE + "!!bool maybe", 2, "the tag tag:yaml.org,2002:bool is not supported"),
    (THREADS + "!!int", 3, "the tag tag:yaml.org,2002:int is not supported"),
    (NODE + "!!timestamp x", 2, "the tag tag:yaml.org,2002:timestamp is not supported"),
    (THREADS + "8\n    threads: 9", 4, "'threads' is there twice"),
    ("servr:\n  http:\n    address: x", 3, "did you mean 'server.http.address'"),
    ("[]", 0, "must be a mapping"), ("false", 0, "must be a mapping"),
    (DIAL + "blocked_networks: [5]", 2, "dispatcher.blocked_networks"),
]
# fmt: on


@pytest.mark.parametrize(("content", "line", "said"), [
    # row 50: words that YAML 1.1 takes for something else, and keys that are there twice
    *((PAUSED + word, 2, "scheduler.paused must be true or false")
      for word in ("off", "no", "on", "yes", "True", "0", "'true'")),
    *((THREADS + word, 3, "server.http.threads must be a whole number from 8 to 256")
      for word in ("1:30", "010", "0777", "0x10", "1e3", "1_6", "+16", "16.0", "'16'", "true", "7",
                   "257", "1" * 40, "[16]", "2027-01-01")),
    *((NODE + word, 2, "cluster.node_id must be a string")
      for word in ("5", "true", "1.5", "[a]")),
    (NODE + "!!binary aGk=", 2, ""),
    ("a: 1\na: 3", 0, "'a' is there twice"),
    # row 51: what wants quotes
    *((NODE + word, 2, QUOTES) for word in ("@daily", "* * * * *", "a: b")),
    # row 52: unknown keys, with the nearest
    (THREADS + "16\n    adress: x", 4, "(did you mean 'server.http.address'?)"),
    ("\nstore:\n  synchronus: FULL", 3, "(did you mean 'store.synchronous'?)"),
    ("scheduler:\n  default_retry_policy:\n    max_attemps: 3", 3, "did you mean 'max_attempts'"),
    ("server: 5", 1, "server"), ("server:\n  http: x", 2, "server.http"),
    # row 53: other shapes
    ("- 1", 0, "must be a mapping"), ("a word", 0, "must be a mapping"),
    ("a: \x01", 0, "not YAML"),
    ("a: &x [*x]", 1, "aliases are not supported"), ("a: &x [1]\nb: *x", 0, "aliases"),
    ("[" * 2000, 0, "nest"), ("a:\n  " + "[" * 32 + "]" * 32, 2, "nested deeper than 32 levels"),
    ("a: 1\n--- \nb: 1", 2, "a second document"),
    ("? [a]\n: 1", 1, "a list or a mapping cannot be a key"),
    ("a: !!python/object:x {}", 1, "the tag tag:yaml.org,2002:python/object:x is not supported"),
    # values
    *((f"server:\n  http:\n    address: {word}", 3, "must be an address")
      for word in ("localhost", "'a:70000'", "'a:'", "':x'")),
    ("store:\n  synchronous: OFF", 2, "must be one of FULL, NORMAL"),
    (DIAL + "connect_timeout: 10", 2, "must be a duration"),
    (DIAL + "blocked_networks: 10.0.0.0/8", 2, "must be a list"),
    (DIAL + "blocked_networks: [10.0.0.1/8]", 2, "10.0.0.1/8 has host bits set"),
    *TAGS_AND_SHAPES,
    # who may sign in, and who is trusted
    ("auth: {type: basic}", 0, "auth.users must name somebody"),
    (SIGN_IN[:-1] + ", viewers: [bob]}", 0, "everybody in auth.viewers"),
    ("auth: {users: {ada: secret}}", 0, "auth.users.ada must be what hash-password prints"),
    ('auth: {users: {"a:b": "' + ADA + '"}}', 0, "auth.users.a:b must not contain a colon"),
    ("auth: {type: digest}", 0, "auth.type must be one of none, basic"),
    ('auth: {users: {ada: "' + ADA + '"}}', 0, "auth.type must be basic where auth.users names"),
    ("server: {trusted_proxy: ['::1', proxy.lan]}", 0, "server.trusted_proxy 'proxy.lan' does not"),
    ("server: {trusted_proxy: 10.0.0.1/8}", 0, "server.trusted_proxy 10.0.0.1/8 has host bits"),
    ('server: {trusted_proxy: "*"}', 0, "server.trusted_proxy '*' does not appear to be an IPv4"),
    ("dispatcher: {ca_bundle: /gone.pem}", 1, "dispatcher.ca_bundle must be readable: /gone.pem: "),
    ("dispatcher: {ca_bundle: .}", 1, "dispatcher.ca_bundle must be a "),
    ("dispatcher: {ca_bundle: chronos.yaml}", 1, "dispatcher.ca_bundle must be a file with certif"),
    (CLIENT + "\n    api.test: /gone.pem", 3, "api.test must be readable: /gone.pem: No such file"),
    (CLIENT + " x.pem", 2, "dispatcher.client_certificates must be an object with at most 100"),
    (CLIENT + "\n    api.test: .", 3, "client_certificates.api.test must be readable: /"),
    *((DIAL + f"proxy: {word}", 2, "dispatcher.proxy must be a URL such as")
      for word in ("proxy.test:3128", "https://proxy.test:3128", "http://proxy.test", "5",
                   "http://proxy.test:70000", "http://proxy.test:3128/path", "http://:3128",
                   "socks5://proxy.test:1080", f"http://ada:{CANARY}@proxy.test")),
    (DIAL + f"proxy: http://[1.2.3]:3128 # {CANARY}", 2, "must have an IPv6 address in its br"),
    (DIAL + f"proxy: http://a%3Ab:{CANARY}@proxy.test:3128", 2, "must have no colon in its user"),
    (DIAL + "no_proxy: '*'", 2, "dispatcher.no_proxy must be a list of 0 to 1000 values"),
    *((DIAL + f"no_proxy: ['{word}']", 2, f"dispatcher.no_proxy {said}")
      for word, said in (("*", "must be a name, a suf"), ("http://x", "must be a name, a suffix"),
                         ("10.0.0.1/8", "10.0.0.1/8 has host bits"), ("10.0.0", "'10.0.0' does"))),
    *((CLIENT + f"\n    {host}: x.pem", 3, "must be a host in small letters, such as")
      for host in ("API.test", "'https://api.test'", "'api.test:443'", "'*.test'", "'[::1]'",
                   "api.test.")),
])  # fmt: skip
def test_a_wrong_setting_is_refused_with_its_line_and_what_is_meant(refusal, content, line, said):
    message = refusal(content)

    assert said in message and CANARY not in message
    assert f": line {line}: " in message or not line


def test_a_file_that_is_not_there_or_no_utf_8_is_refused_by_its_name(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"cluster:\n  node_id: \xe9\n")

    for name in ("missing.yaml", "latin.yaml"):
        with pytest.raises(chronos.StartError, match=name) as caught:
            chronos.load_settings(tmp_path / name, {})
        assert caught.value.exit_status == 78


def test_a_reference_to_the_environment_is_replaced_and_refused_where_it_is_unset(load, refusal):
    content = "cluster:\n  node_id: ${SITE}-${N_1}\n  data_dir: '/srv/${SITE}'\n"

    settings = load(content, SITE="a: b #c", N_1="7")

    assert settings.cluster.node_id == "a: b #c-7"
    assert settings.cluster.data_dir == "/srv/a: b #c"
    message = refusal(content, SITE="x")
    assert "line 2: " in message
    assert "N_1" in message


def test_the_environment_overrides_the_file_and_is_read_as_a_yaml_scalar(load, refusal):
    content = THREADS + "16\nscheduler:\n  paused: false\n  missed_run_grace: 5s\n"
    environment = {"CHRONOS_SERVER_HTTP_THREADS": "32", "CHRONOS_SCHEDULER_PAUSED": "true"}

    settings = load(content, **environment, CHRONOS_SERVER_HTTP_ADDRESS="127.1.1.1:90")

    assert (settings.server.http.threads, settings.scheduler.paused) == (32, True)
    assert settings.server.http.address == "127.1.1.1:90"
    assert settings.scheduler.missed_run_grace == 5 * SECOND
    assert "whole number from 8" in refusal(content, CHRONOS_SERVER_HTTP_THREADS="many")


@pytest.mark.parametrize(("address", "is_open"), [
    ("127.0.0.1:80", False), ("127.9.9.9:80", False), ("localhost:80", False), ("[::1]:80", False),
    (":80", True), ("0.0.0.0:80", True), ("[::]:80", True), ("10.0.0.5:80", True),
    ("[fe80::1]:80", True), ("example.test:80", True),
])  # fmt: skip
def test_without_sign_in_only_loopback_is_listened_on_unless_it_is_meant(
    load, refusal, address, is_open
):
    content = f'server: {{http: {{address: "{address}"}}}}'
    if is_open:
        message = refusal(content)
        assert "auth.type: basic" in message
        assert "server.allow_unauthenticated: true" in message
    else:
        load(content)

    load(f"{content}\n{SIGN_IN}")
    load(content, CHRONOS_SERVER_ALLOW_UNAUTHENTICATED="true")


@pytest.mark.parametrize(
    ("written", "networks"),
    [
        ("null", []), ("[]", []), ("10.0.0.1", ["10.0.0.1/32"]), ("'::1'", ["::1/128"]),
        ("[10.0.0.1, 10.1.0.0/16]", ["10.0.0.1/32", "10.1.0.0/16"]),
    ],
)  # fmt: skip
def test_trusted_proxies_are_addresses_and_networks(load, written, networks):
    in_file = load(f"server: {{trusted_proxy: {written}}}")
    in_environment = load("", CHRONOS_SERVER_TRUSTED_PROXY=written)

    assert in_file.server.trusted_proxy == networks == in_environment.server.trusted_proxy


def test_a_relative_data_dir_counts_from_the_file_not_from_where_one_stands(load, tmp_path):
    assert load("").cluster.data_dir == str(tmp_path / "data")
    assert load("cluster: {data_dir: ../b}").cluster.data_dir == str(tmp_path / "../b")
    assert load("cluster: {data_dir: /var/b}").cluster.data_dir == "/var/b"
    beside = chronos.load_settings(None, {}).cluster.data_dir
    assert Path(beside) == CHRONOS.parent.resolve() / "data"


CRL = """-----BEGIN X509 CRL-----
MIGlME0CAQEwCgYIKoZIzj0EAwIwDDEKMAgGA1UEAwwBeBcNMjYxMTMwMjIzNTQy
WhgPMjEyNjExMDYyMjM1NDJaoA4wDDAKBgNVHRQEAwIBATAKBggqhkjOPQQDAgNI
ADBFAiAePirETvitCaiopjrTkNsVrwAyW44uIMQQPLyj4AYYrAIhANkADWUYOMD/
JUglyP+bOrR905vbbCkrH2IA7pIm9WfB
-----END X509 CRL-----
"""


@pytest.mark.parametrize(("content", "is_right"), [
    ("certificate", True), ("certificate and key", True),
    ("key", False), ("der", False), ("empty", False), ("half", False), ("revoked", False),
])  # fmt: skip
def test_a_ca_bundle_counts_from_the_file_and_is_read_with_it(
    load, refusal, tmp_path, certificate, content, is_right
):
    pem, key = [path.read_text() for path in certificate]
    der = ssl.PEM_cert_to_DER_cert(pem)
    data = {"certificate": pem, "certificate and key": pem + key, "key": key, "empty": ""}
    data |= {"der": der, "half": pem[: len(pem) // 2], "revoked": CRL}
    written = data[content]
    (tmp_path / "ca.pem").write_bytes(written if isinstance(written, bytes) else written.encode())
    config = "dispatcher:\n  ca_bundle: ca.pem"

    if is_right:
        assert load(config).dispatcher.ca_bundle == str(tmp_path / "ca.pem")
        assert load("", CHRONOS_DISPATCHER_CA_BUNDLE="ca.pem") == load(config)
    else:
        assert "line 2: dispatcher.ca_bundle must be a file with certificates" in refusal(config)


def test_a_directory_of_authorities_must_have_names_that_are_looked_for(
    load, refusal, tmp_path, certificate
):
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca/12345678.0").symlink_to("gone.pem")
    shutil.copy(certificate[0], tmp_path / "ca/own.pem")
    shutil.copy(certificate[1], tmp_path / "ca/12345678.1")
    config = "dispatcher: {ca_bundle: ca}"

    message = refusal(config)
    subprocess.run(["openssl", "rehash", tmp_path / "ca"], check=True, capture_output=True)

    assert message.endswith(f"a directory indexed by openssl rehash, not {tmp_path / 'ca'}")
    assert load(config).dispatcher.ca_bundle == str(tmp_path / "ca")


@pytest.mark.parametrize(("written", "read"), [
    ("http://proxy.test:3128", ("proxy.test", 3128, "", "")),
    ("HTTP://PROXY.test:1/", ("proxy.test", 1, "", "")),
    ("http://[::1]:8080", ("::1", 8080, "", "")),
    ("http://ada@10.0.0.1:80", ("10.0.0.1", 80, "ada", "")),
    ("http://a%40b:p%40:%2F@p@proxy.test:80", ("proxy.test", 80, "a@b", "p@:/@p")),
])  # fmt: skip
def test_a_proxy_is_read_from_its_url_and_never_shows_its_password(load, written, read):
    proxy = load("", CHRONOS_DISPATCHER_PROXY=f"'{written}'").dispatcher.proxy

    assert (proxy.hostname, proxy.port, proxy.user, proxy.password) == read
    host = f"[{read[0]}]" if ":" in read[0] else read[0]
    assert proxy.name == f"the proxy http://{host}:{read[1]}"
    assert not proxy.password or proxy.password not in repr(proxy)


def test_a_client_certificate_counts_from_the_file_and_is_read_with_it(
    load, refusal, tmp_path, certificate, monkeypatch
):
    pem, key = [path.read_text() for path in certificate]
    options = ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-aes128", "-pass", "pass:x"]
    encrypted, other = [
        subprocess.run(["openssl", "genpkey", "-algorithm", "ec", *given], check=True,
                       capture_output=True, text=True).stdout
        for given in (options, options[:2])
    ]  # fmt: skip
    mistakes = {
        "must be a PEM file with a certificate and its key": [pem, key, "", "x"],
        "must have the key of its certificate": [pem + other],
        "must have a key that is not encrypted": [pem + encrypted, encrypted + pem],
    }
    config = "dispatcher:\n  client_certificates:\n    api.test: own.pem"
    path = tmp_path / "own.pem"

    for sentence, contents in mistakes.items():
        for content in contents:
            path.write_text(content)
            message = f"line 3: dispatcher.client_certificates.api.test {sentence}: {path}"
            assert refusal(config).endswith(message)
    path.write_text(pem + key)
    settings = load(config)

    assert settings.dispatcher.client_certificates == {"api.test": str(path)}
    variable = {"CHRONOS_DISPATCHER_CLIENT_CERTIFICATES": "{api.test: own.pem}"}
    assert load("", **variable) == settings


@pytest.mark.parametrize(("name", "nearest"), [
    ("CHRONOS_SERVER_HTTP_ADRESS", "CHRONOS_SERVER_HTTP_ADDRESS"),
    ("CHRONOS_DATA_DIR", "CHRONOS_CLUSTER_DATA_DIR"),
    ("CHRONOS_CLUSTER_DATADIR", "CHRONOS_CLUSTER_DATA_DIR"), ("CHRONOS_ZZZ", None),
    ("CHRONOS_SERVER", None), ("CHRONOS_", None),
])  # fmt: skip
def test_a_variable_that_names_no_setting_is_refused_with_the_nearest(refusal, name, nearest):
    message = refusal("", **{name: ""})

    assert f"the environment variable {name} names no setting" in message
    assert f"did you mean {nearest or 'CHRONOS'}" in message or nearest is None


def test_variables_that_the_file_uses_or_that_a_container_has_are_no_settings(load):
    ports = ("PORT", "PORT_8080_TCP", "PORT_8080_TCP_ADDR", "PORT_8080_UDP_PROTO")
    service = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP")
    container = {f"CHRONOS_{name}": "tcp://10.0.0.1:8080" for name in ports + service}

    settings = load("cluster: {node_id: '${CHRONOS_SITE}'}", CHRONOS_SITE="a", **container)

    assert settings.cluster.node_id == "a"
    load("", CHRONOSPHERE="1", CHRONOS="1", MY_CHRONOS_X="1")


@pytest.mark.parametrize("parser", ["CBaseLoader", "BaseLoader"])
def test_a_configuration_is_read_alike_with_and_without_the_parser_in_c(monkeypatch, parser):
    if not hasattr(chronos.yaml, parser):
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(chronos, "YAML_LOADER", getattr(chronos.yaml, parser))
    content = (
        "a: !!str 5\n'b b':\n  - {c: ~, d: [1, x y]}\n  -\n    e: |\n      f\n\n  - ${H}\ng:\n"
    )

    document = chronos.read_yaml(content, {"H": "07"})

    assert document.data == {
        "a": 5, "b b": [{"c": None, "d": [1, "x y"]}, {"e": "f\n"}, "07"], "g": None
    }  # fmt: skip
    lines = {"": 1, ".a": 1, ".b b": 3, ".b b.1": 3, ".b b.1.c": 3, ".b b.1.d": 3, ".b b.1.d.1": 3}
    lines |= {".b b.1.d.2": 3, ".b b.2": 5, ".b b.2.e": 5, ".b b.3": 8}
    assert document.lines.pop(".g") in (9, 10)
    assert document.lines == lines
    assert document.variables == {"H"}


def test_chronos_yaml_holds_every_setting_with_its_default():
    shipped = chronos.load_settings(CHRONOS.with_name("chronos.yaml"), {})
    lines = CHRONOS.with_name("chronos.yaml").read_text()

    assert shipped == chronos.load_settings(None, {})
    assert all(f"{key.rpartition('.')[2]}:" in lines for key in chronos.SETTINGS)


# --- declared jobs --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "line", "said"),
    [
        ("- {}", 3, "jobs.1.name is required"),
        ("- name: a\n  schedule: '@daily'\n  webhook: {url: 'http://a'}\n- 5", 3, "each an ob"),
        ("- name: a\n  schedule: 1 2 3\n  webhook: {url: 'http://a'}", 4, "jobs.1.schedule '1 2"),
        ("- name: a\n  shedule: x", 4, "jobs.1.shedule is not a known name (did you mean 'sch"),
        ("- name: a\n  schedule: '@daily'\n  webhook:\n    url: ftp://a", 6, "jobs.1.webhook.url"),
        ("- name: a\n  schedule: '@daily'\n  webhook: {}", 5, "jobs.1.webhook.url is required"),
        ("- name: a\n  timeout: 1x", 4, "jobs.1.timeout must be a duration"),
        ("- name: a\n  schedule: '@daily'\n  id: a", 5, "jobs.1.id must not be given: the id of a "
         "declared job follows from its name"),
        ("- name: a\n  schedule: '@daily'\n  webhook: {url: 'http://a', auth: {type: bearer, "
         "token: '********'}}", 5, "jobs.1.webhook.auth.token is ********"),
        ("- &a {name: a}\n- *a", 4, "aliases are not supported"),
        ("- {name: a, schedule: '@daily', webhook: {url: 'http://a'}}\n"
         "- {name: a, schedule: '@daily', webhook: {url: 'http://a'}}", 4,
         "jobs.2.name 'a' is there twice"),
        ("{a: {schedule: '@daily'}}", 3, "must be a list of jobs"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_refused_with_its_line_and_the_words_of_the_api(
    refusal, wrong, line, said
):
    indented = "".join(f"  {text}\n" for text in wrong.splitlines())
    message = refusal(f"# declared\njobs:\n{indented}")

    assert said in message
    assert f"chronos.yaml: line {line}: " in message


def test_a_secret_of_a_declared_job_may_come_from_the_environment(load):
    auth = {"type": "bearer", "token": "${TOKEN}"}
    body = job_body(NOBODY, webhook={"auth": auth, "signing_secret": "whsec_${KEY}"})

    content = declared(body)
    [(config, enabled, *_rest)] = load(content, TOKEN="s3cret!", KEY=SIGNING_KEY).jobs.values()

    assert config["webhook"]["auth"]["token"] == "s3cret!"
    assert config["webhook"]["signing_secret"] == SIGNING_SECRET
    assert enabled


def test_the_jobs_of_the_readme_are_correct(load):
    readme = CHRONOS.with_name("README.md").read_text()
    examples = re.findall("```yaml\n(jobs:.*?)```", readme, re.DOTALL)

    found = [load(example, TOKEN="t0ken!", PING_KEY="k").jobs for example in examples]

    assert [len(jobs) for jobs in found] == [3, 1]
    for jobs in found:
        chronos.check_declarations(jobs.values())


# ======================================================================================
# 8. Policies
# ======================================================================================


def retry_policy(**fields):
    return RETRY | fields


def after(attempts=1, spent=0, timeout=300, policy=None, seconds=1, **fields):
    """Return what becomes of an execution whose attempt began at NOON and took ``seconds``."""
    names = {"job_version": 1, "trigger": "schedule", "target": "http://h:80", "due_at": None}
    names |= {"status": "running", "scheduled_at": NOON, "attempts": attempts}
    execution = chronos.Execution("exec-1", "job-1", **names, spent=spent * SECOND)
    fields.setdefault("reason", "http_status" if fields.get("status_code") else "no_answer")
    outcome = chronos.Outcome(execution, NOON, seconds * SECOND, 0, **fields)
    ended_at = NOON + seconds * SECOND
    return chronos.after_attempt(outcome, policy or retry_policy(), timeout * SECOND, ended_at)


@pytest.mark.parametrize(("fields", "attempt", "asked", "seconds"), [
    ({}, 1, None, 1), ({}, 2, None, 2), ({}, 6, None, 32), ({}, 7, None, 60),
    ({"multiplier": 100, "max_interval": "24h"}, 100, None, 86_400),
    ({"multiplier": 1}, 9, None, 1), ({"multiplier": 1.5}, 3, None, 2.25),
    ({"initial_interval": "5m"}, 1, None, 60),
    ({}, 1, 0, 1), ({}, 1, 5, 5), ({}, 6, 5, 32), ({}, 1, 3600, 3600),
])  # fmt: skip
def test_a_wait_grows_to_its_maximum_or_is_what_the_answer_asks(fields, attempt, asked, seconds):
    asked = asked if asked is None else asked * SECOND

    assert chronos.retry_wait(retry_policy(**fields), attempt, asked) == seconds * SECOND


RUBBISH = [None, "", "soon", "-5", "1.5", "1e3", "\u0665", "9" * 30, "5s", "1 2 3", "\xff", ",,,"]
RUBBISH += ["Mon, 32 Mar 2027 12:00:00 GMT"]
ABSURD = ["Mon, 01 Mar 99999999999 12:00:00 GMT", f"Mon, 01 Mar 2027 12:00:00 +{9**20}"]


@pytest.mark.parametrize(("value", "seconds"), [
    ("0", 0),
    (" 120 ", 120),
    ("Mon, 01 Mar 2027 12:01:30 GMT", 90),
    ("Monday, 01-Mar-27 12:00:10 GMT", 10),
    ("Mon, 01 Mar 2027 13:01:30 +0100", 90),
    ("Mon, 01 Mar 2027 11:00:00 GMT", 0),
])  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert chronos.parse_retry_after(value, NOON) == seconds * SECOND


@pytest.mark.parametrize("value", RUBBISH + ABSURD)
def test_any_other_retry_after_is_none(value):
    assert chronos.parse_retry_after(value, NOON) is None


@pytest.mark.parametrize(("attempt", "status", "reason", "due_s"), [
    # success_codes decide before the question of a retry
    *(({"status_code": code, "reason": None, "success": True}, "success", None, None)
      for code in (200, 429, 503)),
    # no answer, 429 and 5xx are tried again after the wait, which counts as spent
    *(({"status_code": code, "attempts": 2, "spent": 3}, "pending", None, 3)
      for code in (None, 429, 500, 503, 599)),
    ({"policy": retry_policy(attempt_timeout="5s"), "seconds": 5}, "pending", None, 6),
    # any other answer, a blocked target and the limit of time are final
    *(({"status_code": code}, "failed", "http_status", None) for code in (100, 204, 301, 404, 428)),
    *(({"reason": reason}, "failed", reason, None) for reason in ("blocked", "timeout")),
    # and so is the last attempt that is allowed
    ({"status_code": 503, "attempts": 3}, "failed", "http_status", None),
    ({"policy": retry_policy(max_attempts=1)}, "failed", "no_answer", None),
    # where the next wait would pass the timeout, it fails at once
    ({"timeout": 11, "spent": 7, "seconds": 2}, "pending", None, 3),
    ({"timeout": 10, "spent": 7, "seconds": 2}, "failed", "timeout", None),
    ({"status_code": 503, "retry_after": 600 * SECOND}, "failed", "timeout", None),
])  # fmt: skip
def test_what_becomes_of_an_execution_after_an_attempt(attempt, status, reason, due_s):
    spent, seconds = attempt.get("spent", 0), attempt.get("seconds", 1)

    then = after(error="why", response="OK", **attempt)

    assert (then.status, then.reason, then.response) == (status, reason, "OK")
    assert then.status_code == attempt.get("status_code") and then.error.startswith("why")
    if status == "pending":
        assert (then.due_at, then.completed_at) == (NOON + due_s * SECOND, None)
        assert then.spent == (spent + due_s) * SECOND
    else:
        assert (then.due_at, then.completed_at) == (None, NOON + seconds * SECOND)
        assert then.spent == (spent + seconds) * SECOND


@pytest.mark.parametrize(("asked", "timeout", "asks"), [
    (3600, 300, ", as it asked to wait 3600 s"), (299.2, 300, ", as it asked to wait 300 s"),
    (None, 2, ""), (0, 2, ""), (0.5, 2, ""),
])  # fmt: skip
def test_what_an_answer_asks_to_wait_is_named_where_it_leaves_no_time(asked, timeout, asks):
    asked = asked if asked is None else int(asked * SECOND)

    then = after(status_code=429, error="why", retry_after=asked, timeout=timeout)

    assert (then.reason, then.error) == ("timeout", f"why; no time is left to try again{asks}")


def test_the_attempt_log_keeps_every_attempt():
    again = after(reason="no_answer", error="refused")._replace(attempts=2)
    outcome = chronos.Outcome(again, NOON + 2 * SECOND, 250_000, 0, 200, "OK", True)

    one, two = json.loads(chronos.after_attempt(outcome, retry_policy(), SECOND, NOON).attempt_log)

    assert (one["number"], one["status_code"], one["error"]) == (1, None, "refused")
    assert (two["number"], two["status_code"], two["error"]) == (2, 200, None)
    assert (two["started_at"], two["duration"]) == ("2027-03-01T12:00:02Z", 250_000_000)


@pytest.mark.parametrize(
    ("timeout", "attempt_timeout", "spent", "limit", "means"),
    [
        (300, 10, 0, 10, "attempt_timeout"), (300, 10, 289, 10, "attempt_timeout"),
        (300, 10, 290, 10, "timeout"), (300, 10, 295, 5, "timeout"), (300, 300, 0, 300, "timeout"),
        (5, 10, 0, 5, "timeout"), (300, 10, 300, 0, "timeout"),
    ],
)  # fmt: skip
def test_an_attempt_may_take_its_own_limit_or_what_is_left(
    timeout, attempt_timeout, spent, limit, means
):
    assert chronos.attempt_limit(timeout, attempt_timeout, spent) == (limit, means)


@pytest.mark.parametrize(
    ("policy", "most"), [("ignore", 0), ("execute_one", 1), ("execute_all", 100)]
)
def test_missed_fire_times_are_made_up_for_as_the_policy_says(policy, most):
    assert chronos.catch_up_limit(policy) == most


@pytest.mark.parametrize(
    ("status_code", "reason", "may_help"),
    [
        (None, "no_answer", True), (200, "no_answer", True), (None, "interrupted", True),
        (429, "http_status", True), (500, "http_status", True), (599, "http_status", True),
        (428, "http_status", False), (430, "http_status", False), (499, "http_status", False),
        (302, "http_status", False), (None, "blocked", False), (None, "timeout", False),
    ],
)  # fmt: skip
def test_another_attempt_may_help_where_the_cause_may_pass(status_code, reason, may_help):
    outcome = chronos.Outcome(None, NOON, 0, 0, status_code, reason=reason)

    assert chronos.another_attempt_may_help(outcome) is may_help


@pytest.mark.parametrize(
    ("running", "asked", "started", "full"),
    [
        ("", "a a a b", "a a b", "a"), ("a", "a a b b", "a b b", "a"), ("a a", "a b a", "b", "a"),
        ("a a b b b", "a b c", "c", "a b"), ("a a", "", "", "a"), ("a", "b", "b", ""),
    ],
)  # fmt: skip
def test_a_target_holds_two_workers_at_most_if_that_is_the_limit(running, asked, started, full):
    limits, took = chronos.TargetLimits(running.split(), 2), []

    for target in asked.split():
        if limits.has_room(target):
            limits.hold(target)
            took.append(target)

    assert (took, limits.full) == (started.split(), set(full.split()))


# ======================================================================================
# 9. Schema and migrations
# ======================================================================================

NEWER = "CREATE TABLE jobs (id); PRAGMA application_id = 0x4368726F; PRAGMA user_version = 99"
NOT_OURS = "PRAGMA application_id = 7; PRAGMA journal_mode = DELETE"


@pytest.mark.parametrize(("is_changed", "content", "message"), [
    (False, "CREATE TABLE accounts (id)", "is not a database of Chronos"),
    (False, NEWER, "is of a newer Chronos"),
    (False, b"no database" * 1000, "file is not a database"),
    (True, "PRAGMA user_version = 99", "is of a newer Chronos"),
    (True, NOT_OURS, "is not a database of Chronos"),
])  # fmt: skip
def test_a_foreign_or_newer_file_is_refused_and_not_touched(tmp_path, is_changed, content, message):
    path = tmp_path / "data" / "chronos.db"
    fill_store(path.parent, NOBODY, 1, "@daily", None)
    is_changed or path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with open_database(path) as database:
            database.executescript(content)
    before, store = path.read_bytes(), chronos.Store(path)

    with pytest.raises(chronos.StartError, match=f"{path} .*{message}") as refusal:
        store.database.open()
    store.database.close()

    assert refusal.value.exit_status == 78
    assert path.read_bytes() == before
    assert is_changed or list(path.parent.iterdir()) == [path]


def test_no_statement_of_the_engine_walks_a_whole_table(make_world, target):
    world = make_world(dispatcher__max_concurrent_per_host=1)
    statements = set()
    engine_connection(world).set_trace_callback(statements.add)

    for path in ("/status/503", "/hang", "/ok"):
        for concurrency in ("allow", "forbid", "replace"):
            job = world.create(target.url + path, schedule="* * * * *", concurrency=concurrency)
    for seconds in (60, 3600, 1):
        world.clock.advance(seconds)
        world.engine.run_turn()
        world.engine.run_turn()
    target.let_go.set()
    world.settle()
    world.do(world.engine.job_changes.set_enabled, job.id, False)
    world.executions(job)
    world.do(world.engine.job_changes.delete, job, False)
    for _look in range(30):
        with world.store.database.transaction():
            world.engine.retention.size_limit.work(0)
    world.engine.recover()
    engine_connection(world).set_trace_callback(None)

    kinds = ("SELECT", "WITH", "UPDATE", "DELETE", "INSERT")
    plans = {
        statement: str([row[3] for row in by_hand(world, f"EXPLAIN QUERY PLAN {statement}")])
        for statement in statements
        if statement.split()[0] in kinds
    }
    for mark in ("next_run_at <=", "due_at <=", "RECURSIVE", "min(due_at)", "FROM active",
                 "status = 'running'", "SET due_at", "seq DESC", "DELETE FROM ex"):  # fmt: skip
        assert any(mark in statement for statement in plans), mark
    may = "INDEX executions_active|COVERING INDEX jobs_history"  # the size, which is kept then
    walks = rf"SCAN (TABLE )?(jobs|versions|executions|due)\b(?! USING ({may}))"
    assert not [plan for plan in plans.items() if re.search(walks, plan[1])]
    active = [plan for text, plan in plans.items() if "FROM active" in text]
    assert all(re.search("executions_(active|listed)", plan) for plan in active)


@pytest.mark.parametrize(("status", "index"), [
    ("pending", "executions_active"), ("running", "executions_active"),
    ("failed", "executions_failed"),
])  # fmt: skip
def test_what_waits_runs_or_has_failed_of_a_job_is_found_by_an_index(world, status, index):
    job, statements = world.create(NOBODY), set()
    engine_connection(world).set_trace_callback(statements.add)
    found = list(world.store.executions.newest(job.id, 10, filters={"status": status}))
    count = world.store.executions.count(job.id, {"status": status})
    engine_connection(world).set_trace_callback(None)

    assert (found, count, len(statements)) == ([], 0, 2)
    for statement in statements:
        plan = by_hand(world, f"EXPLAIN QUERY PLAN {statement}")
        assert plan[0][3].endswith(f"INDEX {index} (job_id=? AND seq<?)"), statement


def test_the_metrics_look_at_no_execution_that_has_ended(world, monkeypatch):
    api = chronos.Api(world.engine, world.store, world.settings, world.clock)
    run, plans = world.store.database.run, []

    def explain(statement, /, *row, **values):
        plans.extend(row[3] for row in run(f"EXPLAIN QUERY PLAN {statement}", *row, **values))
        return run(statement, *row, **values)

    monkeypatch.setattr(world.store.database, "run", explain)
    api.server.metrics()

    looked = [plan for plan in plans if "executions" in plan]
    partial = ("executions_of_target", "executions_listed (status=?)", "executions_active")
    assert looked and all(plan.endswith(partial) for plan in looked), plans


# --- a file of 0.1.0 ------------------------------------------------------------------

# Made by the program of commit 2165717, which was killed at 11:59:51, and dumped. Shortened are
# instants (@ and the seconds since 08:00), the ids of jobs (# and a number), each configuration
# (what differs from the first) and the log of an execution with one attempt ("one").
SCHEMA_1 = r"""
PRAGMA application_id = 1130918511; PRAGMA user_version = 1;
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE jobs (                      -- class Job says what each column is
    seq          INTEGER PRIMARY KEY,    -- order of creation; 0: the built-in one of the alerts
    id           TEXT NOT NULL UNIQUE,   -- a UUID
    version INTEGER NOT NULL, enabled INTEGER NOT NULL,
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, next_run_at INTEGER,
    strip TEXT NOT NULL, failures INTEGER NOT NULL, failing_since INTEGER, declared TEXT,
    is_bad INTEGER NOT NULL, news_at INTEGER -- for alerts: its state, and since when it is news
);
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
    id, job_id, job_version, trigger, status, scheduled_at, target, due_at, attempts, spent,
    started_at, attempt_at, completed_at, reason, error, status_code, node_id, replay_of,
    missed_count, missed_from, missed_to, attempt_log, response,
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
INSERT INTO meta VALUES ('last_seen', @14390);
INSERT INTO ends VALUES (501080, 'F', 1),(501080, 'R', 1),(501080, 'C', 1),(501080, 'S', 1),
 (501081, 'S', 3),(501083, 'M', 3),(501083, 'S', 1),(501083, 'K', 1),(501083, 'F', 1);
INSERT INTO jobs VALUES
(0,'ALERTS',1,0,0,@11,NULL,'',0,NULL,'chronos.yaml',0,NULL),
(1,'#1',2,1,@0,@1800,@14400,'SSMS',0,NULL,NULL,0,@14390),
(2,'#2',1,1,@0,@0,@14400,'SM',1,@14390,NULL,1,@14390),
(3,'#3',1,0,@0,@0,NULL,'S',0,NULL,NULL,0,NULL),
(4,'#4',1,0,@0,@0,NULL,'F',1,@14390,NULL,1,@14390),
(5,'#5',1,1,@0,@0,@26409600,'F',1,@1,NULL,1,NULL),
(6,'#6',1,1,@0,@0,@26409600,'RC',0,NULL,NULL,0,NULL),
(7,'#7',1,1,@0,@0,@26409600,'',0,NULL,NULL,0,NULL),
(8,'4b673453-18eb-54c3-b773-a0f794433df5',1,1,@0,@0,@16200,'',0,NULL,
 '4f9aa5e3a858ad383e8cf34a07543c85c90f1d0adcb7a4494dc4d700a8ac14b5',0,NULL),
(9,'#8',1,1,@3601,@3601,@15300,'K',0,NULL,NULL,0,NULL);
INSERT INTO versions SELECT column1, column2, json_patch(
 '{"name":"","description":null,"schedule":"0 0 1 1 *","timezone":"UTC",
 "webhook":{"url":"TARGET/ok","method":"POST","headers":{},"body":null,"auth":null,
 "success_codes":null,"verify_tls":true},"retry_policy":{"max_attempts":3,"initial_interval":"1s",
 "max_interval":"1m","multiplier":2.0,"attempt_timeout":null},"timeout":"5m",
 "concurrency":"forbid","missed_run_policy":null,"tags":{}}',
 column3), column4, column5 FROM (VALUES
('#1',1,'{"name":"Invoices","description":"st\u00fcndlich; \u00c4\u00d6\u00dc",
 "schedule":"0 * * * *","timezone":"Europe/Berlin","webhook":{"body":"{\"n\": 1}",
 "auth":{"type":"bearer","token":"canary-in-a-coal-mine"}},"tags":{"team":"b\u00fcro",
 "tier":"1"}}',@0,'tester'),
('#2',1,'{"name":"every","schedule":"@every 1h","missed_run_policy":"ignore",
 "tags":{"team":"ops"}}',@0,'tester'),
('#3',1,'{"name":"once","schedule":"@at 2027-03-01T08:30:00Z"}',@0,'tester'),
('#4',1,'{"name":"off","schedule":"@daily","webhook":{"url":"TARGET/status/404"},
 "tags":{"team":"b\u00fcro"}}',@0,'tester'),
('#5',1,'{"name":"bad","webhook":{"url":"TARGET/status/503",
 "headers":{"X-Hook-Token":"canary-in-a-coal-mine"}},"retry_policy":{"max_attempts":2}}',@0,
 'tester'),
('#6',1,'{"name":"swap","webhook":{"url":"TARGET/hang"},"concurrency":"replace"}',@0,'tester'),
('#7',1,'{"name":"late","webhook":{"url":"TARGET/status/503"},
 "retry_policy":{"initial_interval":"1m"}}',@0,'tester'),
('4b673453-18eb-54c3-b773-a0f794433df5',1,'{"name":"declared","schedule":"30 12 * * *",
 "webhook":{"url":"http://127.0.0.1:1/","auth":{"type":"basic","username":"ada",
 "password":"canary-in-a-coal-mine"}}}',@0,'chronos.yaml'),
('ALERTS',1,'{"name":"alerts","schedule":"@at 2000-01-01T00:00:00Z","webhook":{"url":"BELL/alerts",
 "body":"{\"text\": \"bad fails\", \"event\": \"failed\"}"},"retry_policy":{"max_attempts":10,
 "initial_interval":"5s","max_interval":"10m","attempt_timeout":"10s"},"timeout":"1h"}',@11,
 'chronos.yaml'),
('#1',2,'{"name":"Rechnungen","description":"st\u00fcndlich; \u00c4\u00d6\u00dc, 50%",
 "schedule":"0 * * * *","timezone":"Europe/Berlin","webhook":{"body":"{\"n\": 1}",
 "auth":{"type":"bearer","token":"canary-in-a-coal-mine"}},"tags":{"team":"b\u00fcro",
 "tier":"2"}}',@1800,'bob'),
('#8',1,'{"name":"hangs","schedule":"15 * * * *","webhook":{"url":"TARGET/hang"},
 "missed_run_policy":"execute_all"}',@3601,'tester'));
INSERT INTO executions VALUES
(1,'exec-1','#5',1,'manual','failed',@0,'TARGET',NULL,2,1000000,@0,@1,@1,'http_status',
 'the server answered 503 Service Unavailable',503,'alpha',NULL,NULL,NULL,NULL,'[{"number":1,
 "started_at":"2027-03-01T08:00:00Z","duration":0,"status_code":503,
 "error":"the server answered 503 Service Unavailable"},{"number":2,
 "started_at":"2027-03-01T08:00:01Z","duration":0,"status_code":503,
 "error":"the server answered 503 Service Unavailable"}]','OK'),
(2,'exec-88830ab4-577d-5f50-9dfa-8973f7ca1941','ALERTS',1,'alert','success',@11,'BELL',NULL,1,0,
 @11,@11,@11,NULL,NULL,200,'alpha',NULL,NULL,NULL,NULL,'one','OK'),
(3,'exec-2','#6',1,'manual','failed',@11,'TARGET',NULL,1,0,@11,@11,@11,'replaced',
 'replaced by exec-3',NULL,'alpha',NULL,NULL,NULL,NULL,'[]',NULL),
(4,'exec-3','#6',1,'manual','failed',@11,'TARGET',NULL,1,0,@11,@11,@11,'cancelled',
 'cancelled by ada',NULL,'alpha',NULL,NULL,NULL,NULL,'[]',NULL),
(5,'exec-bb173ec8-7ca5-5105-b47d-11b65957ace5','#3',1,'schedule','success',@1800,'TARGET',NULL,1,0,
 @1800,@1800,@1800,NULL,NULL,200,'alpha',NULL,NULL,NULL,NULL,'one','OK'),
(6,'exec-9bf86355-7cfe-5319-a826-ec35571c0d98','#1',2,'schedule','success',@3600,'TARGET',NULL,1,0,
 @3600,@3600,@3600,NULL,NULL,200,'alpha',NULL,NULL,NULL,NULL,'one','OK'),
(7,'exec-e2e26a5b-bdd7-5466-a1a7-e8de4174b115','#2',1,'schedule','success',@3600,'TARGET',NULL,1,0,
 @3600,@3600,@3600,NULL,NULL,200,'alpha',NULL,NULL,NULL,NULL,'one','OK'),
(8,'exec-4','#1',2,'replay','success',@3600,'TARGET',NULL,1,0,@3600,@3600,@3600,NULL,NULL,200,
 'alpha','exec-9bf86355-7cfe-5319-a826-ec35571c0d98',NULL,NULL,NULL,'one','OK'),
(9,'exec-c6509cb0-6be9-5bf7-aaf1-5ebbd3ab7d83','#8',1,'catch_up','running',@4500,'TARGET',@14390,1,
 0,@14390,@14390,NULL,NULL,NULL,NULL,'alpha',NULL,NULL,NULL,NULL,'[]',NULL),
(10,'exec-c961f4b0-b051-5f7e-b643-b5642d3a9617','#8',1,'catch_up','pending',@8100,'TARGET',NULL,0,
 0,NULL,NULL,NULL,NULL,NULL,NULL,'alpha',NULL,NULL,NULL,NULL,'[]',NULL),
(11,'exec-22bdedf5-385a-55f5-af68-eede0477eefc','#8',1,'catch_up','pending',@11700,'TARGET',NULL,0,
 0,NULL,NULL,NULL,NULL,NULL,NULL,'alpha',NULL,NULL,NULL,NULL,'[]',NULL),
(12,'exec-18a9ddd5-8bc7-5f1f-adcd-fafce8d0c7f0','#1',2,'schedule','skipped',@7200,'TARGET',NULL,0,
 0,NULL,NULL,@14390,'missed',
 '1 fire times from 2027-03-01T10:00:00Z to 2027-03-01T10:00:00Z passed while no server was there',
 NULL,'alpha',NULL,1,@7200,@7200,'[]',NULL),
(13,'exec-e6cf406d-883f-516c-a3a6-728f95e708a3','#1',2,'catch_up','success',@10800,'TARGET',NULL,1,
 0,@14390,@14390,@14390,NULL,NULL,200,'alpha',NULL,NULL,NULL,NULL,'one','OK'),
(14,'exec-da4b1260-6aca-5552-8a38-dbeaccf8f8cf','#2',1,'schedule','skipped',@10800,'TARGET',NULL,0,
 0,NULL,NULL,@14390,'missed',
 '2 fire times from 2027-03-01T10:00:00Z to 2027-03-01T11:00:00Z passed while no server was there',
 NULL,'alpha',NULL,2,@7200,@10800,'[]',NULL),
(15,'exec-5','#8',1,'manual','skipped',@14390,'TARGET',NULL,0,0,NULL,NULL,@14390,'overlap',
 'exec-c6509cb0-6be9-5bf7-aaf1-5ebbd3ab7d83 was still running',NULL,'alpha',NULL,NULL,NULL,NULL,
 '[]',NULL),
(16,'exec-6','#7',1,'manual','pending',@14390,'TARGET',@14450,1,60000000,@14390,@14390,NULL,NULL,
 'the server answered 503 Service Unavailable',503,'alpha',NULL,NULL,NULL,NULL,'one','OK'),
(17,'exec-7','#4',1,'manual','failed',@14390,'TARGET',NULL,1,0,@14390,@14390,@14390,'http_status',
 'the server answered 404 Not Found',404,'alpha',NULL,NULL,NULL,NULL,'one','OK');
UPDATE executions SET attempt_log = json_array(json_object('number', 1, 'started_at',
 strftime('%Y-%m-%dT%H:%M:%SZ', attempt_at / 1000000, 'unixepoch'), 'duration', 0,
 'status_code', status_code, 'error', error)) WHERE attempt_log = 'one';
"""


OLD_DECLARED = {
    "name": "declared", "schedule": "30 12 * * *",
    "webhook": {"url": NOBODY, "method": "POST",
                "auth": {"type": "basic", "username": "ada", "password": CANARY}},
}  # fmt: skip
DECLARED_JOB = str(uuid.uuid5(chronos.DECLARED_IDS, "declared"))


def job_id_of(number):
    """Return the id of a job of SCHEMA_1."""
    return f"{number:08d}-0000-4000-8000-{number:012d}"


def write_old(path, target=NOBODY[:-1], bell=NOBODY[:-1], more=0, killed=False):
    """Make a file of 0.1.0, with ``more`` executions of "late" that are due at 12:00:50.

    Where its process was ``killed``, the log is still beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sql = re.sub("#([1-8])", lambda match: job_id_of(int(match[1])), SCHEMA_1)
    sql = re.sub("@([0-9]+)\\b", lambda match: str(at("08:00:00") + int(match[1]) * SECOND), sql)
    sql = sql.replace("TARGET", target).replace("BELL", bell).replace("ALERTS", chronos.ALERTS_ID)
    made = path.with_name("made.db")
    with contextlib.closing(sqlite3.connect(made)) as database:
        database.executescript(f"PRAGMA journal_mode = WAL; BEGIN; {sql} COMMIT")
        [row] = database.execute("SELECT * FROM executions WHERE id = 'exec-6'")
        rows = [(None, f"exec-more-{number}", *row[2:]) for number in range(more)]
        added = f"INSERT INTO executions VALUES ({', '.join('?' * len(row))})"  # noqa: S608
        database.executemany(added, rows)
        database.commit()
        if killed:
            shutil.copy(f"{made}-wal", f"{path}-wal")
            shutil.copy(made, path)
    made.unlink() if killed else made.rename(path)
    return path


def read_rows(path):
    """Return the rows of a file of any schema by their tables, without the due_at of what runs."""
    found = {}
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        for table in ("meta", "ends", "jobs", "versions", "executions"):
            rows = database.execute(f"SELECT * FROM {table} ORDER BY rowid")  # noqa: S608
            found[table] = [dict(row) for row in rows]
    for execution in found["executions"]:
        execution["due_at"] = execution["due_at"] if execution["status"] == "pending" else None
    return found


def has_all(path, before):
    """Say whether a file has exactly these rows; its tables may have more columns."""
    after = read_rows(path)
    kept = {table: [row | old for row, old in zip(after[table], rows, strict=True)]
            for table, rows in before.items()}  # fmt: skip
    return kept == after


def schema_of(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return chronos.read_pragma(database, "user_version")


@contextlib.contextmanager
def largest_file(size):
    """Let no file become larger than so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def old(tmp_path, clock, target, bell):
    """A file of 0.1.0 in the data directory, whose process was killed; it is 11:59:55."""
    clock.wall = at("11:59:55")
    return write_old(tmp_path / "data" / "chronos.db", target.url, bell.url, killed=True)


def test_a_file_of_0_1_0_keeps_each_value_of_each_row_in_its_order(old):
    before, store = read_rows(old), chronos.Store(old)

    store.database.open()
    store.database.close()

    assert schema_of(old) == chronos.SCHEMA_VERSION
    assert has_all(old, before)
    named = {job["id"]: job["name"] for job in read_rows(old)["jobs"]}
    assert len(named) == 10 and named[job_id_of(1)] == "Rechnungen"
    assert named[chronos.ALERTS_ID] == "alerts"


def test_an_unused_file_of_0_1_0_becomes_as_a_new_one(tmp_path):
    path = write_old(tmp_path / "old.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("meta", "ends", "versions", "executions"):
            database.execute(f"DELETE FROM {table}")  # noqa: S608
        database.execute("DELETE FROM jobs WHERE seq > 0")
        database.execute("UPDATE jobs SET version = 0, updated_at = 0")
        database.commit()

    dumps = []
    for file in (path, tmp_path / "new.db"):
        store = chronos.Store(file)
        store.database.open()
        store.database.close()
        with contextlib.closing(sqlite3.connect(file)) as database:
            dumps.append(sorted(database.iterdump()))

    assert dumps[0] == dumps[1]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", "Rechnungen every once off bad swap late declared hangs"),
        ("?tag=team:büro", "Rechnungen off"), ("?tag=tier:1", ""), ("?tag=tier:2", "Rechnungen"),
        ("?q=RECH", "Rechnungen"), ("?q=äÖü, 50%25", "Rechnungen"), ("?q=Invoices", ""),
        ("?status=failed", "off bad swap"), ("?enabled=false", "once off"),
    ],
)  # fmt: skip
def test_jobs_of_0_1_0_are_found_as_before(old, make_service, clock, query, names):
    service = make_service(clock, scheduler__paused=True, jobs=[OLD_DECLARED])

    found = service.get(f"/jobs{query}")

    assert {job["name"] for job in found["jobs"]} == set(names.split())
    assert found["total"] == len(names.split())


def test_jobs_of_0_1_0_show_their_versions_and_history(old, make_service, clock):
    service = make_service(clock, scheduler__paused=True, jobs=[OLD_DECLARED])
    path = f"/jobs/{job_id_of(1)}"

    versions = service.get(f"{path}/versions")
    executions = service.get(f"{path}/executions")["executions"]
    attempts = service.get(f"/jobs/{job_id_of(5)}/executions/exec-1")["attempt_log"]

    assert [(v["version"], v["created_by"]) for v in versions] == [(2, "bob"), (1, "tester")]
    assert [v["config"]["tags"]["tier"] for v in versions] == ["2", "1"]
    assert versions[0]["config"]["webhook"]["auth"]["token"] == MASK
    assert [(e["trigger"], e["status"], e["missed_count"]) for e in executions] == [
        ("catch_up", "success", None), ("schedule", "skipped", 1),
        ("replay", "success", None), ("schedule", "success", None),
    ]  # fmt: skip
    assert executions[2]["replay_of"] == executions[3]["id"]
    assert [(a["number"], a["status_code"]) for a in attempts] == [(1, 503), (2, 503)]


def test_all_is_counted_in_a_file_of_0_1_0_as_before(old, make_service, clock):
    service = make_service(clock, scheduler__paused=True, jobs=[OLD_DECLARED])

    stats = service.get("/stats")
    metrics = requests.get(f"{service.url}/metrics", timeout=10).text

    strips = {job["name"]: (job["strip"], job["failures"]) for job in stats["jobs"]}
    assert strips == {
        "Rechnungen": ("SSMS", 0), "every": ("SM", 1), "once": ("S", 0), "off": ("F", 1),
        "bad": ("F", 1), "swap": ("RC", 0), "late": ("", 0), "declared": ("", 0), "hangs": ("K", 0),
    }  # fmt: skip
    assert (stats["enabled"], stats["failing"]) == (7, 2)
    ends = dict(re.findall(r'ended_total\{result="(\w+)"\} (\d+)', metrics))
    assert ends == {
        "success": "5", "failed": "2", "missed": "3", "overlap": "1", "replaced": "1",
        "cancelled": "1",
    }  # fmt: skip


def test_what_ran_when_0_1_0_was_killed_is_tried_again_before_what_waits_for_it(old, world, target):
    [hangs] = [job for job in world.all_jobs() if job.config["name"] == "hangs"]
    target.let_go.set()

    world.settle()

    rows = states(world, hangs, "status", "attempts", "reason")
    assert rows[:3] == [("success", 2, None), ("success", 1, None), ("success", 1, None)]
    first, _second = json.loads(world.executions(hangs)[0].attempt_log)
    assert first["error"] == INTERRUPTED
    sent = [headers["X-Chronos-Scheduled-Time"][11:16] for headers in drain(target)]
    assert sent == ["09:15", "10:15", "11:15"]


def test_a_retry_that_0_1_0_left_is_sent_when_it_is_due_and_not_before(old, world, target):
    target.let_go.set()
    late = world.store.jobs.get(job_id_of(7))

    world.advance(54)
    assert states(world, late, "status", "attempts", "spent") == [("pending", 1, 60 * SECOND)]
    world.advance(1)

    assert states(world, late, "status", "attempts", "spent") == [("pending", 2, 120 * SECOND)]


def test_the_next_fire_times_after_0_1_0_come_once_and_when_they_are_due(old, world, target):
    target.let_go.set()
    jobs = {job.config["name"]: job for job in world.all_jobs()}

    world.advance(5)
    world.advance(3600)

    both = [(NOON, "success"), (NOON + 3600 * SECOND, "success")]
    for name, fired in {"Rechnungen": both, "every": both, "once": [], "off": []}.items():
        rows = states(world, jobs[name], "scheduled_at", "status")
        assert [row for row in rows if row[0] >= NOON] == fired


def test_an_alert_that_0_1_0_owed_is_sent_and_what_it_had_told_is_not_told_again(
    old, make_world, target, bell
):
    webhook = chronos.validate(chronos.ALERT_FIELDS, {"url": f"{bell.url}/alerts"})
    world = make_world(alerts__webhook=webhook)
    target.let_go.set()

    world.advance(4)
    assert bell.received.empty()
    world.advance(1)
    told = [alert["text"] for alert in rings(bell)]
    world.dispatcher.close_idle(0)  # on a new connection the script holds
    target.script = ["/ok"]
    trigger(world, world.store.jobs.get(job_id_of(5)))
    world.settle()
    world.advance(11)

    assert "off fails: the server answered 404 Not Found" in told[0]
    assert not any("bad" in text for text in told)
    assert any("bad is well again" in alert["text"] for alert in rings(bell))


def test_a_job_that_0_1_0_declared_stays_managed_and_as_it_was(old, world, load):
    before = world.store.jobs.get(DECLARED_JOB)

    assert declare_all(world, load(declared(OLD_DECLARED)).jobs) == []
    assert world.store.jobs.get(DECLARED_JOB) == before
    [removed] = declare_all(world, {})

    assert before.enabled and before.to_json(None)["managed_by"] == chronos.DECLARED_BY
    assert (removed.id, removed.enabled, removed.declared) == (DECLARED_JOB, False, None)


@pytest.mark.parametrize("leftover", [None, b"of a migration that was broken off"])
def test_a_copy_from_before_a_migration_is_beside_the_file(old, leftover):
    before, copy = read_rows(old), old.with_name("chronos.db.schema-1")
    if leftover:
        copy.write_bytes(leftover)
    store = chronos.Store(old)

    umask = os.umask(0)
    try:
        store.database.open()
    finally:
        os.umask(umask)
    store.database.close()

    assert (schema_of(copy), read_rows(copy)) == (1, before)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in old.parent.iterdir()} == {old.name, copy.name}


BROKEN = {
    "an unknown status": ("UPDATE executions SET status = 'lost' WHERE seq = 1", "status_fits"),
    "an end without its time": (
        "UPDATE executions SET completed_at = NULL WHERE seq = 1", "status_fits"),
    "half of a gap": ("UPDATE executions SET missed_to = NULL WHERE missed_count", "missed_is"),
    "a tag of no value": (
        "UPDATE versions SET config = '{\"name\": \"x\", \"tags\": {\"a\": null}}'", "NOT NULL"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_migrated_is_left_as_it_was(tmp_path, configure, change, words):
    path = write_old(tmp_path / "data" / "chronos.db")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(change)
    before = path.read_bytes()

    result = run_chronos("--config", configure(""))

    assert path.read_bytes() == before
    told = (str(path), words, "It is as it was", "start the Chronos that wrote")
    check_refused(result, 78, *told, lines=2)  # The first: that it is being migrated.


@pytest.mark.parametrize("config", ["{", "[]", '{"tags": {"a": null}}', None])
def test_a_version_that_is_damaged_does_not_stop_a_migration(make_world, tmp_path, config):
    path = write_old(tmp_path / "data" / "chronos.db")
    job_id = job_id_of(4)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE versions SET config = ? WHERE job_id = ?", (config or "", job_id))
        database.execute("DELETE FROM versions WHERE job_id = ? AND ?", (job_id, config is None))

    world = make_world()

    assert world.store.jobs.get(job_id).config["problem"]
    assert [job.id for job in world.all_jobs() if "problem" in job.config] == [job_id]


@pytest.mark.parametrize("size", [50_000, 150_000])
def test_a_migration_for_which_there_is_no_room_is_made_by_the_next_start(
    tmp_path, configure, size
):
    path = write_old(tmp_path / "data" / "chronos.db")
    before, content = read_rows(path), path.read_bytes()

    with largest_file(size):
        result = run_chronos("--config", configure(""))

    assert path.read_bytes() == content
    assert not [*path.parent.glob("*.part*")]
    check_refused(result, 78, str(path), "room of five times its size", lines=2)
    store = chronos.Store(path)
    store.database.open()
    store.database.close()
    assert schema_of(path) == chronos.SCHEMA_VERSION and has_all(path, before)


OPEN = "import chronos, sys; chronos.Store(chronos.Path(sys.argv[1])).database.open()"


@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.long)])
def test_kill_9_amid_a_migration_leaves_the_old_file_or_the_new_and_the_next_start_goes_on(
    make_process, tmp_path, rounds
):
    first, data = write_old(tmp_path / "first.db", more=4_000), tmp_path / "home" / "data"
    path, before, left = data / "chronos.db", read_rows(first), []
    began = [data / "chronos.db.schema-1.part", data / "chronos.db.schema-1"]
    data.mkdir(parents=True)

    for _ in range(rounds):
        for file in data.iterdir():
            file.unlink()
        shutil.copy(first, path)
        with subprocess.Popen(
            [sys.executable, "-c", OPEN, path], stderr=subprocess.DEVNULL, cwd=CHRONOS.parent
        ) as process:
            wait_until(lambda: any(file.exists() for file in began))
            time.sleep(random.uniform(0, 0.15))
            process.kill()
        shutil.copytree(data, tmp_path / "left", dirs_exist_ok=True)
        left.append(schema_of(tmp_path / "left" / "chronos.db"))
        assert has_all(tmp_path / "left" / "chronos.db", before)
        shutil.rmtree(tmp_path / "left")
        store = chronos.Store(path)
        store.database.open()
        store.database.close()
        assert schema_of(path) == chronos.SCHEMA_VERSION and has_all(path, before)
    process = make_process()

    assert process.get(f"/jobs/{job_id_of(7)}/executions")["total"] == 4_001
    print(f"{left.count(1)} of {rounds} were left as they were")


# ======================================================================================
# 10. Connections
# ======================================================================================

# --- everything on disk, and nobody else reads it -------------------------------------


def test_a_commit_waits_for_the_disk_and_readers_do_not_wait_for_the_writer(world):
    names = ("journal_mode", "synchronous", "application_id", "user_version")
    values = [engine_connection(world).execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert values == ["wal", 2, 0x4368_726F, 2]
    world.engine.run_turn()
    with world.store.database.transaction():
        world.store.set_number("last_seen", 5)
        assert by_hand(world, "SELECT value FROM meta WHERE key = 'last_seen'") == [(NOON,)]


def test_nobody_else_can_read_the_data_directory(service, target):
    service.create(target.url)

    directory = service.service.data_dir
    assert directory.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.glob("chronos.db*")}
    assert modes == dict.fromkeys(["chronos.db", "chronos.db-wal", "chronos.db-shm"], 0o600)


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777])
def test_an_empty_directory_is_made_for_its_owner_alone_and_one_in_use_is_not(tmp_path, mode):
    empty, used = tmp_path / "empty", tmp_path / "used"
    for directory in (empty, used):
        directory.mkdir()
        directory.chmod(mode)
    (used / "notes").touch()

    for directory in (empty, used):
        chronos.lock_data_dir(directory).close()

    assert empty.stat().st_mode & 0o7777 == 0o700
    assert used.stat().st_mode & 0o7777 == mode
    assert (used / "chronos.lock").stat().st_mode & 0o777 == 0o600


def test_a_lock_that_everybody_could_open_is_closed_to_them(tmp_path):
    lock = tmp_path / "chronos.lock"
    lock.write_text("1234567\nand more\n")
    lock.chmod(0o666)

    chronos.lock_data_dir(tmp_path).close()

    assert lock.stat().st_mode & 0o777 == 0o600
    assert lock.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("how", ["symlink", "dangling", "hard link", "fifo", "foreign"])
def test_a_lock_that_somebody_has_laid_out_is_refused_and_its_target_is_kept(tmp_path, how):
    data, victim = tmp_path / "data", tmp_path / "victim"
    data.mkdir()
    lock = data / "chronos.lock"
    if how != "dangling":
        victim.write_text("important\n")
    {
        "symlink": lambda: lock.symlink_to(victim),
        "dangling": lambda: lock.symlink_to(victim),
        "hard link": lambda: lock.hardlink_to(victim),
        "fifo": lambda: os.mkfifo(lock),
        "foreign": lock.touch,
    }[how]()
    if how == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(lock, 65534, 65534)

    with pytest.raises(chronos.StartError, match=r"unusable: chronos\.lock is .*remove it") as told:
        chronos.lock_data_dir(data)

    assert told.value.exit_status == 78
    assert victim.exists() == (how != "dangling")
    assert how == "dangling" or victim.read_text() == "important\n"


# --- reads that take long -------------------------------------------------------------

FOR_EVER = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"


def test_a_statement_that_takes_over_5_s_is_ended_and_the_next_one_is_not(world, background):
    database = world.store.database

    def read():
        ticks = itertools.count(step=SECOND)
        database.bound_reads(lambda: next(ticks))
        with pytest.raises(chronos.Unavailable, match="took more than 5 s"):
            database.run(FOR_EVER)
        return database.value("SELECT 1")

    assert background.submit(read).result(10) == 1


def test_what_is_read_when_the_server_stops_is_ended(world, background):
    database, is_begun = world.store.database, threading.Event()

    def read():
        database.bound_reads(world.clock.monotonic)
        is_begun.set()
        database.run(FOR_EVER)

    reading = background.submit(read)
    assert is_begun.wait(10)
    database.end_reads()

    with pytest.raises(chronos.Unavailable, match="stopping"):
        reading.result(10)


# --- damage ---------------------------------------------------------------------------


def damage(path):
    """Overwrite pages in the middle of a database, so many that a table is among them."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\xa5" * 4096 * 10)


def test_a_file_that_is_damaged_inside_is_refused_and_not_touched(make_world, target):
    world = make_world()
    add_executions(world, world.create(target.url), 500, "success", NOON)
    world.store.database.close()
    path = world.store.database.path
    damage(path)
    before, store = path.read_bytes(), chronos.Store(path)

    with pytest.raises(chronos.StartError, match=r"is damaged .*Restore a backup") as refusal:
        store.database.open()

    assert refusal.value.exit_status == 78
    assert path.read_bytes() == before


@pytest.mark.parametrize("stopped", [True, False])
def test_a_large_file_is_looked_through_only_after_an_unclean_stop(
    make_world, target, monkeypatch, stopped
):
    world = make_world()
    add_executions(world, world.create(target.url), 500, "success", NOON)
    world.store.database.close()
    if not stopped:
        world.store.database.path.with_name("chronos.db-wal").touch()
    damage(world.store.database.path)
    monkeypatch.setattr(chronos, "QUICK_CHECK_BYTES", 0)

    refused = None if stopped else pytest.raises(chronos.StartError, match="is damaged")
    with refused or contextlib.nullcontext():
        world.store.database.open()


def test_a_start_that_was_killed_before_the_log_was_there_does_not_stop_the_next(world, target):
    job, path = world.create(target.url), world.store.database.path
    add_executions(world, job, 500, "success", NOON)
    world.store.database.close()
    with open_database(path) as database:
        database.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN")
        database.execute("UPDATE executions SET error = 'half of a transaction'")
        for name in ("chronos.db", "chronos.db-journal"):  # as a power cut would leave them
            shutil.copy(path.with_name(name), path.with_name(f"{name}.cut"))
    for name in ("chronos.db", "chronos.db-journal"):
        path.with_name(f"{name}.cut").rename(path.with_name(name))

    world.store.database.open()

    assert {execution.error for execution in world.executions(job)} == {None}


def test_an_empty_file_where_data_was_is_told(world, caplog):
    world.store.database.close()
    world.store.database.path.write_bytes(b"")

    world.store.database.open()

    assert "was empty: it begins anew" in caplog.text


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_database_that_is_gone_under_the_server_is_noticed_within_a_minute(world, how):
    path = world.store.database.path
    other = path.with_name("other")
    shutil.copy(path, other)
    world.settle()

    path.unlink() if how == "removed" else other.rename(path)
    write = set_number(world, "a")
    world.clock.advance(61)
    world.engine.run_turn()

    assert "was removed or replaced" in world.engine.problem
    with pytest.raises(chronos.StoreError, match="removed or replaced"):
        write.result(5)


# --- backups --------------------------------------------------------------------------


def test_a_backup_is_a_whole_copy_and_never_replaces_a_file(world, target, tmp_path):
    job = world.create(target.url)
    copy = tmp_path / "copy.db"

    world.store.database.backup(copy)
    with pytest.raises(chronos.StartError, match="is there already"):
        world.store.database.backup(copy)
    restored = chronos.Store(copy)
    restored.database.open()

    assert restored.jobs.get(job.id) == job
    restored.database.close()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("has_links", [True, False])
def test_a_backup_keeps_a_file_that_came_meanwhile(world, tmp_path, monkeypatch, has_links):
    def no_link(*_arguments):
        raise PermissionError(1, "Operation not permitted")

    def look(part, wholly=False):
        (tmp_path / "copy.db").write_text("precious")

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
        world.store.database.backup(tmp_path / "without.db")
        assert chronos.DatabaseFile(tmp_path / "without.db").inspect(wholly=True) == 2
    monkeypatch.setattr(chronos.DatabaseFile, "inspect", look)

    with pytest.raises(chronos.StartError, match="it is there already"):
        world.store.database.backup(tmp_path / "copy.db")

    assert (tmp_path / "copy.db").read_text() == "precious"
    assert not list(tmp_path.glob("*.part"))


def test_of_two_backups_at_once_to_one_name_one_is_whole_and_the_other_is_told(
    world, target, tmp_path, background
):
    add_executions(world, world.create(target.url), 20_000, "success", NOON)

    def back_up(_number):
        try:
            chronos.Database(world.store.database.path).backup(tmp_path / "copy.db")
        except chronos.StartError as error:
            return str(error).rpartition(": ")[2]
        return "whole"

    told = list(background.map(back_up, range(3)))

    assert sorted(told) == ["it is there already", "it is there already", "whole"]
    assert chronos.DatabaseFile(tmp_path / "copy.db").inspect(wholly=True) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"data", "copy.db"}


def test_a_backup_that_fails_leaves_nothing_behind(world, target, tmp_path):
    with pytest.raises(chronos.StartError, match=r"no backup to .*No such file"):
        world.store.database.backup(tmp_path / "nowhere" / "copy.db")
    with pytest.raises(chronos.StartError, match=r"no backup to .*Not a directory"):
        world.store.database.backup(world.store.database.path / "copy.db")
    with pytest.raises(chronos.StartError, match="File name too long"):
        world.store.database.backup(tmp_path / ("x" * 300))
    add_executions(world, world.create(target.url), 500, "success", NOON)
    by_hand(world, "PRAGMA wal_checkpoint(TRUNCATE)")
    damage(world.store.database.path)
    with pytest.raises(chronos.StartError, match="malformed"):
        world.store.database.backup(tmp_path / "copy.db")

    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_a_backup_takes_no_file_that_somebody_has_laid_out(world, tmp_path):
    (tmp_path / "b.db.part").write_bytes(b"")
    (tmp_path / "b.db.part").chmod(0o666)
    (tmp_path / "c.db.part").symlink_to(tmp_path / "elsewhere")

    for name in ("b.db", "c.db"):
        world.store.database.backup(tmp_path / name)

        assert (tmp_path / name).lstat().st_mode & 0o777 == 0o600
        assert (tmp_path / f"{name}.part").lstat()
    assert not (tmp_path / "elsewhere").exists()


# ======================================================================================
# 11. Store
# ======================================================================================


def summary(world, job):
    """Return what a job's row has of its history."""
    job = world.store.jobs.get(job.id)
    return job.strip, job.failures, job.failing_since


def test_a_job_has_the_letters_of_its_last_runs_and_how_often_it_failed_in_a_row(world, target):
    target.script = ["/ok", "/status/404", "/status/404", "/hang", "/ok"]
    job = world.create(target.url, schedule="* * * * *")
    for _ in range(3):
        world.advance(60)
    assert summary(world, job) == ("SFF", 2, at("12:02:00"))

    running = hang(world, target, job)
    trigger(world, job)
    world.do(world.engine.run_queue.cancel, job.id, running, "tester")
    assert summary(world, job) == ("SFFKC", 2, at("12:02:00"))  # neither breaks nor mends

    world.advance(60)
    assert summary(world, job) == ("SFFKCS", 0, None)


def test_missed_fire_times_are_one_failure_and_as_many_in_the_count_of_the_hour(world, target):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")

    world.advance(600)

    assert summary(world, job) == ("M", 1, at("12:10:00"))
    assert world.store.history.ends_since(NOON)["missed"] == 10
    assert world.store.history.ends_since(NOON + chronos.HOUR)["missed"] == 0


def test_a_retry_is_no_end_and_what_is_replaced_has_its_letter(world, target):
    target.script = ["/status/503", "/ok", "/ok"]
    job = world.create(target.url, concurrency="replace")

    trigger(world, job)
    turn_until(world, lambda: states(world, job, "attempts", "status") == [(1, "pending")])
    assert summary(world, job) == ("", 0, None)
    run_once(world, job)

    assert summary(world, job) == ("RS", 0, None)
    assert states(world, job) == ["failed", "success"]


def test_a_strip_has_the_newest_thirty_and_ends_are_counted_by_the_hour(world, target):
    job = world.create(target.url)
    add_executions(world, job, 20, "failed", NOON)
    add_executions(world, job, 25, "success", NOON)

    assert summary(world, job) == ("F" * 5 + "S" * 25, 0, None)
    none = dict.fromkeys(chronos.ENDINGS, 0)
    assert world.store.history.ends_since(NOON) == none | {"failed": 20, "success": 25}
    assert world.store.history.ends_since(NOON + 3600 * SECOND) == none


def test_a_reason_that_another_release_has_written_is_shown_as_it_is(world, target):
    job = world.create(target.url + "/status/404")
    run_once(world, job)
    by_hand(world, "UPDATE executions SET reason = 'of_tomorrow'")

    [execution] = world.executions(job)

    assert (execution.reason, execution.ending.letter) == ("of_tomorrow", "F")


def test_a_configuration_of_an_older_release_runs_and_is_no_change(world, target):
    job = world.create(target.url)
    for field in ("$.webhook.verify_tls", "$.retry_policy.attempt_timeout", "$.missed_run_policy"):
        by_hand(world, "UPDATE versions SET config = json_remove(config, ?)", field)
    world.engine.versions.clear()
    old = world.store.jobs.get(job.id)

    run_once(world, job)
    changed = world.do(world.engine.job_changes.update, old, job.config, None, "ada")

    assert states(world, job) == ["success"]
    assert changed.version == 1


# --- lists are read in pages ----------------------------------------------------------


def test_a_page_of_jobs_has_no_more_bytes_than_it_may(world, target):
    for size in (100, 100, 300_000, 300_000, 100, 900_000, 100):
        webhook = {"url": target.url, "body": "x" * size}
        world.create(target.url, name=str(size), webhook=webhook)

    pages, total = world.store.jobs.pages({}, None, 0)

    names = [[job.config["name"] for job in page] for page in pages]
    assert names == [["100", "100", "300000"], ["300000"], ["100", "900000"], ["100"]]
    assert total == 7


@pytest.mark.parametrize(("most", "offset", "shown"), [
    (None, 0, slice(None)), (None, 3, slice(3, None)), (5, 3, slice(3, 8)), (99, 9, slice(9, None)),
])  # fmt: skip
def test_the_pages_of_a_list_are_the_list(world, monkeypatch, most, offset, shown):
    monkeypatch.setattr(chronos, "PAGE_ROWS", 2)
    ids = [job.id for job in add_jobs(world, 11, "http://a.test", tags={"a": "b"})]

    for filters in ({}, {"tags": [("a", "b")]}, {"enabled": True, "q": "REPORT"}):
        pages, total = world.store.jobs.pages(filters, most, offset)
        assert [job.id for page in pages for job in page] == ids[shown]
        assert total == 11


def test_what_comes_or_goes_while_a_list_is_read_moves_nothing_else(world, monkeypatch):
    monkeypatch.setattr(chronos, "PAGE_ROWS", 2)
    ids = [job.id for job in add_jobs(world, 7, "http://a.test")]

    pages, _total = world.store.jobs.pages({}, None, 0)
    found = [job.id for job in next(pages)]
    world.do(world.engine.job_changes.delete, world.store.jobs.get(ids[0]), False)
    world.do(world.engine.job_changes.delete, world.store.jobs.get(ids[3]), False)
    add_jobs(world, 1, "http://a.test")
    found += [job.id for page in pages for job in page]

    assert found == ids[:3] + ids[4:]


@pytest.mark.parametrize("status", [None, *chronos.Status])
def test_the_history_is_read_in_pages_newest_first(world, target, monkeypatch, status):
    monkeypatch.setattr(chronos, "PAGE_BYTES", 300)
    jobs = [world.create(target.url, enabled=False, concurrency="allow") for _ in range(2)]
    ids = [
        (job, state, add_executions(world, job, 1, state)[0])
        for number in range(60)
        for job, state in [(jobs[number % 2], [*chronos.Status][number % 5])]
    ]

    for job in (None, *jobs):
        matching = [e for j, s, e in ids if job in (None, j) and status in (None, s)][::-1]
        newest = functools.partial(
            world.store.executions.newest, job and job.id, filters={"status": status}
        )
        assert [execution.id for execution in newest(100)] == matching
        assert [execution.id for execution in newest(3, matching[1])] == matching[2:5]


def test_a_job_is_found_by_its_name_without_a_walk_through_all(world):
    statements = []
    engine_connection(world).set_trace_callback(statements.append)

    pages, _total = world.store.jobs.pages({"name": "report"}, 10, 0)
    list(pages)

    plans = [row[3] for sql in statements for row in by_hand(world, f"EXPLAIN QUERY PLAN {sql}")]
    assert len([step for step in plans if "jobs_named (name=?" in step]) == 2, plans
    assert not [step for step in plans if re.search(r"SCAN jobs|jobs .*\(rowid[<>]", step)], plans


HISTORY_KINDS = [
    ("success", None), ("failed", "http_status"), ("failed", "timeout"), ("skipped", "overlap"),
    ("skipped", "missed"), ("pending", None), ("running", None),
]  # fmt: skip


def add_ledger(world, jobs, number):
    """Add executions of each kind, of each job, their fire times in no order; return them."""
    added = []
    for n in range(number):
        status, reason = HISTORY_KINDS[n % 7]
        at = NOON + n * 37 % number * SECOND
        values = (f"exec-{n}", jobs[n % len(jobs)].id, 1, "schedule", status, at, NOBODY, None)
        ended_at = None if status in ("pending", "running") else NOON
        execution = chronos.Execution(*values, completed_at=ended_at, reason=reason)
        if reason == "missed":
            missed = {"missed_count": 8, "missed_from": at - 7 * SECOND, "missed_to": at}
            execution = execution._replace(**missed)
        added.append(execution)
    with world.store.database.transaction():
        world.store.executions.add(added)
        world.store.history.count_ends(added)
    return added


def test_a_history_is_filtered_by_status_reason_and_time_and_by_all_together(world, monkeypatch):
    monkeypatch.setattr(chronos, "PAGE_BYTES", 300)
    *jobs, deleted = add_jobs(world, 3, NOBODY)
    added = add_ledger(world, [*jobs, deleted], 84)[::-1]
    with world.store.database.transaction():
        world.store.jobs.delete(deleted.id)
        world.store.history.forget_size()
    since, until = NOON + 20 * SECOND, NOON + 50 * SECOND

    def matches(e, job, filters):
        status, reason, since, until = filters.values()
        return (e.job_id != deleted.id and job in (None, e.job_id) and status in (None, e.status)
                and reason in (None, e.reason) and (since is None or e.scheduled_at >= since)
                and (until is None or (e.missed_from or e.scheduled_at) < until))  # fmt: skip

    names = ("status", "reason", "since", "until")
    words = [None, *chronos.Status], [None, "timeout", "overlap", "missed"]
    for job in (None, jobs[0].id):
        for values in itertools.product(*words, (None, since), (None, until)):
            filters = dict(zip(names, values, strict=True))
            newest = functools.partial(world.store.executions.newest, job, filters=filters)
            matching = [e.id for e in added if matches(e, job, filters)]
            assert [e.id for e in newest(100)] == matching, filters
            assert [e.id for e in newest(3, "exec-60")] == [
                each for each in matching if int(each[5:]) < 60
            ][:3], filters
            assert job is None or world.store.executions.count(job, filters) == len(matching)


@pytest.mark.parametrize(("filters", "index"), [
    ("since until", "executions_scheduled (scheduled_at>? AND scheduled_at<?)"),
    ("since", "executions_scheduled (scheduled_at>? AND scheduled_at<?)"),
    ("until", "executions_scheduled (scheduled_at>? AND scheduled_at<?)"),
    ("since until success", "executions_scheduled (scheduled_at>? AND scheduled_at<?)"),
    ("since until failed", "executions_listed (status=? AND seq<?)"),
    ("reason", "executions_reason (reason=? AND seq<?)"),
    ("reason since until", "executions_reason (reason=? AND seq<?)"),
    ("reason failed", "executions_reason (reason=? AND seq<?)"),
    ("job since until", "executions_of_job (job_id=? AND seq<?)"),
    ("job reason", "executions_of_job (job_id=? AND seq<?)"),
])  # fmt: skip
def test_each_filter_of_a_history_has_an_index(world, filters, index):
    all_values = {"since": NOON, "until": NOON + SECOND, "reason": "timeout"}
    wanted = {name: value for name, value in all_values.items() if name in filters}
    wanted["status"] = next((status for status in chronos.Status if status in filters), None)
    statements = []
    engine_connection(world).set_trace_callback(statements.append)

    list(world.store.executions.newest(JOB_ID if "job" in filters else None, 20, filters=wanted))

    [statement] = statements
    plan = [row[3] for row in by_hand(world, f"EXPLAIN QUERY PLAN {statement}")]
    assert [step for step in plan if index in step], plan
    assert not [step for step in plan if re.search(r"executions.*rowid[<>]|SCAN executions", step)]


@pytest.mark.parametrize("word", chronos.ENDINGS)
def test_jobs_are_found_by_how_their_last_run_ended(world, word):
    reasons = {"success": None, "failed": "http_status"}
    jobs = dict(zip([*chronos.ENDINGS, "never"], add_jobs(world, 7, NOBODY), strict=True))
    for ending in chronos.ENDINGS:
        for each in ("success", "missed", ending):
            status = each if each == "success" else "failed"
            add_executions(world, jobs[ending], 1, status, reason=reasons.get(each, each))
        add_executions(world, jobs[ending], 1, "pending")

    pages, total = world.store.jobs.pages({"last_status": word}, None, 0)

    assert ([job.id for page in pages for job in page], total) == ([jobs[word].id], 1)


@pytest.mark.parametrize("status", chronos.Status)
def test_the_executions_in_one_status_are_found_without_a_walk_through_all(world, status):
    statements = []
    engine_connection(world).set_trace_callback(statements.append)

    list(world.store.executions.newest(None, 20, filters={"status": status}))

    [statement] = statements
    plan = [row[3] for row in by_hand(world, f"EXPLAIN QUERY PLAN {statement}")]
    assert not [step for step in plan if re.search(r"executions.*rowid<|SCAN executions$", step)]
    assert [
        step for step in plan if re.search("executions_(listed|successful|of_target|due)", step)
    ], plan


# ======================================================================================
# 12. Logs and metrics
# ======================================================================================

# --- what is logged -------------------------------------------------------------------


def test_what_a_run_becomes_is_logged_and_only_what_needs_somebody_as_a_warning(
    world, target, caplog
):
    caplog.set_level("INFO", "chronos")
    target.script = ["/ok", "/status/503", "/ok", "/status/404"]
    job = world.create(target.url)
    run_once(world, job)
    run_once(world, job)
    world.advance(1)
    run_once(world, job)

    assert logged(caplog, " success: the server answered 200") == ["INFO", "INFO"]
    assert logged(caplog, "failed in attempt 1: the server answered 503") == ["INFO"]
    assert logged(caplog, "failed: the server answered 404") == ["WARNING"]
    assert len(logged(caplog, f"job {job.id}: exec-")) == 4


def test_a_skipped_replaced_or_cancelled_run_needs_nobody(world, target, caplog):
    caplog.set_level("INFO", "chronos")
    job = world.create(target.url + "/hang")
    other = world.create(target.url + "/hang", concurrency="replace")
    first = hang(world, target, job)
    trigger(world, job)
    world.do(world.engine.run_queue.cancel, job.id, first, "ada")
    hang(world, target, other)
    hang(world, target, other)

    for text in ("was still running", "failed: cancelled by ada", "failed: replaced by exec-"):
        assert logged(caplog, text) == ["INFO"], text
    target.let_go.set()


def test_missed_fire_times_are_logged_once(world, target, caplog):
    caplog.set_level("INFO", "chronos")
    job = world.create(target.url, schedule="* * * * *")
    world.advance(600)

    assert logged(caplog, f"job {job.id}: ").count("WARNING") == 1
    assert logged(caplog, "skipped: 9 fire times from") == ["WARNING"]


def test_a_job_that_takes_any_certificate_is_warned_of(world, target, caplog):
    for verify_tls in (True, False):
        job = world.create(target.url, webhook={"verify_tls": verify_tls})
        trigger(world, job)
        warned = f"job {job.id} takes any certificate" in caplog.text
        assert warned == (not verify_tls)


def test_each_request_is_logged_at_debug_and_what_it_asks_is_not(guarded, caplog):
    caplog.set_level("DEBUG", "chronos")
    guarded.expect(200, "GET", "/jobs?q=canary", headers=credentials("vera"))
    guarded.expect(401, "POST", "/jobs", job_body(NOBODY), headers=credentials("eve", "canary"))
    guarded.expect(404, "GET", "/nothing", headers=credentials("vera"))

    debug = [r for r in caplog.records if (r.levelname, r.name) == ("DEBUG", "chronos")]
    assert [record.getMessage() for record in debug] == [
        "GET /api/v1/jobs: 200 for vera at 127.0.0.1",
        "POST /api/v1/jobs: 401 for anonymous at 127.0.0.1",
        "GET /api/v1/nothing: 404 for anonymous at 127.0.0.1",
    ]


# --- how it is written ----------------------------------------------------------------


def repeats_headers(handler):
    """Answer with the headers of the request, and say so in the reason phrase."""
    reason = "Sorry\x1b[31m\x85CRITICAL " + handler.headers["X-Chronos-Job-ID"]
    return 503, reason, str(handler.headers).encode()


def test_an_event_is_one_line_of_the_log_whatever_it_is_about(make_process, target):
    target.behave = repeats_headers
    process = make_process()
    process.error(400, "POST", "/jobs", job_body(NOBODY, name="a\n2026-11-23 CRITICAL x"))
    name = "a\u202eb\u2028CRITICAL c"

    job = process.create(target.url, name=name, retry_policy=ONCE)
    process.post(trigger_path(job))
    assert process.end(signal.SIGTERM) == 0

    lines = "".join(process.log).splitlines()
    about = [line for line in lines if job["id"] in line]
    assert all(re.match(r"\d{4}-\d\d-\d\d .{12} (INFO|WARNING) ", line) for line in lines)
    assert len(about) == 3  # created, triggered, failed
    assert r"a\u202eb\u2028CRITICAL c" in about[0]
    assert r"Sorry\x1b[31m\x85CRITICAL" in about[2]


def test_a_system_without_proc_has_metrics_all_the_same(service, monkeypatch):
    monkeypatch.setattr(chronos, "PROCESS_FILES", Path("/nowhere"))

    samples = scrape(service)

    assert samples["process_resident_memory_bytes"] == 0
    assert samples["process_open_fds"] > 0


def test_a_log_that_nobody_reads_holds_up_nobody_and_tells_later_what_was_dropped(caplog):
    caplog.set_level("INFO", "chronos")
    read_end, write_end = os.pipe()
    writer = chronos.LogWriter(write_end)
    chronos.log.addHandler(writer)
    begun = time.monotonic()
    for n in range(20_000):
        chronos.log.info("event %s %s", n, "x" * 100)
    took = time.monotonic() - begun
    dropped = writer.dropped

    with open(read_end) as reader:
        lines = list(iter(lambda: reader.readline().strip(), f"{dropped} {DROPPED}"))
        chronos.log.info("the next one")
        assert reader.readline() == "the next one\n"
        chronos.log.removeHandler(writer)
        writer.close()
        os.close(write_end)

    assert took < 5
    assert (writer.dropped, len(lines)) == (dropped, 20_000 - dropped)
    assert lines == [f"event {n} {'x' * 100}" for n in range(len(lines))]
    kept = sum(map(len, lines)) + len(lines)  # The queue, and what the pipe may have taken of it.
    assert (1 << 20) - 200 <= kept <= (1 << 20) + (1 << 17)


DROPPED = "events were dropped here: nobody was reading the log"


@pytest.mark.parametrize("level", ["INFO", "ERROR"])
def test_the_end_of_a_log_that_is_read_again_at_the_exit_is_all_there(caplog, level):
    caplog.set_level(level, "chronos")
    read_end, write_end = os.pipe()
    writer = chronos.LogWriter(write_end)
    chronos.log.addHandler(writer)
    for n in range(20_000):
        chronos.log.error("event %s %s", n, "x" * 100)

    with ThreadPoolExecutor(1) as pool, open(read_end) as reader:
        lines = pool.submit(reader.readlines)
        begun = time.monotonic()
        logging.shutdown([lambda: writer])  # as the end of the process does it
        took = time.monotonic() - begun
        chronos.log.removeHandler(writer)
        os.close(write_end)
        *events, end = lines.result()

    if level == "ERROR":
        assert end.startswith("event ")  # The line is a warning, and none is wanted.
        events.append(end)
    else:
        assert end == f"{writer.dropped} {DROPPED}\n"
    assert len(events) == 20_000 - writer.dropped
    assert took < chronos.LOG_PATIENCE_S


def test_a_stderr_that_nobody_reads_stops_neither_jobs_nor_calls_nor_the_exit(tmp_path, target):
    program = shutil.copy(CHRONOS, tmp_path)
    (tmp_path / "chronos.yaml").write_text("logging: {level: debug}")
    with serving(program, directory=tmp_path) as (process, client):
        for _ in range(300):
            client.call("GET", f"/{'x' * 6000}")
        client.create(target.url, schedule="* * * * * *", enabled=True)

        assert target.take() and target.take()
        assert scrape(client)["chronos_log_events_dropped_total"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- <&- >&-"])
def test_a_stderr_that_is_closed_or_full_is_no_reason_not_to_serve(tmp_path, redirection):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"CHRONOS_SERVER_HTTP_ADDRESS": address}
    shutil.copy(CHRONOS, tmp_path)
    command = f"exec {shlex.quote(sys.executable)} chronos.py {redirection}"
    with subprocess.Popen(command, shell=True, cwd=tmp_path, env=environment) as process:
        client = Client(f"http://{address}")
        wait_until(lambda: not refuses(client))
        for _ in range(50):
            client.create(NOBODY)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0

    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "chronos.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert (tmp_path / "data" / "chronos.lock").read_text() == f"{process.pid}\n"


def test_json_logs_are_one_object_a_line_with_the_ids_of_what_they_are_about(make_process, target):
    process = make_process("logging: {format: json, level: debug}")
    job = process.create(target.url + "/status/404", name='"a\u2028b')
    run = process.post(trigger_path(job))
    assert process.end(signal.SIGTERM) == 0

    events = [json.loads(line) for line in "".join(process.log).splitlines()]
    assert all({"time", "level", "message"} <= event.keys() for event in events)
    assert all(abs(chronos.parse_time(e["time"]) / SECOND - time.time()) < 60 for e in events)
    told = [e for e in events if e.get("job_id") == job["id"] and e["level"] != "debug"]
    created, triggered, failed = told
    assert (created["level"], created.get("execution_id")) == ("info", None)
    assert '("a\u2028b) was created' in created["message"]
    assert triggered["execution_id"] == failed["execution_id"] == run["id"]
    assert failed["level"] == "warning" and run["error"] in failed["message"]
    assert {event["level"] for event in events} == {"debug", "info", "warning"}


@pytest.mark.parametrize("kind", ["json", "journal"])
def test_a_traceback_is_part_of_its_event(kind):
    try:
        raise RuntimeError("a bug\nof ours")
    except RuntimeError:
        record = chronos.log.makeRecord("chronos", 40, "f", 1, "it %s", ("failed",), sys.exc_info())

    told = chronos.LogFormatter(kind).format(record)

    if kind == "json":
        event = json.loads(told)
        assert "\n" not in told and event["message"] == "it failed"
        assert event["traceback"].startswith("Traceback") and "bug\nof" in event["traceback"]
    else:
        assert told.startswith("<3>it failed\n<3>Traceback")
        assert all(line.startswith("<3>") for line in told.splitlines())


@pytest.mark.parametrize("is_journal", [True, False])
@pytest.mark.parametrize("style", ["text", "json"])
def test_the_journal_gets_priorities_and_no_times_of_ours(configure, is_journal, style):
    read_end, write_end = os.pipe()
    about = os.fstat(write_end)
    stream = f"{about.st_dev}:{about.st_ino + (not is_journal)}"
    environment = {"JOURNAL_STREAM": stream, "CHRONOS_SERVER_HTTP_ADDRESS": "127.0.0.1:0"}
    config = configure(f"logging: {{format: {style}}}")
    command = [sys.executable, CHRONOS, "--paused", "--config", config]
    with subprocess.Popen(command, stderr=write_end, env=os.environ | environment) as process:
        os.close(write_end)
        with open(read_end, encoding="utf-8") as log:
            lines = [log.readline(), log.readline()]
            process.terminate()
            lines += log.read().splitlines(keepends=True)

    first, paused = lines[:2]
    if style == "json":
        assert all(json.loads(line)["time"] for line in lines)
    elif is_journal:
        assert first.startswith("<6>Chronos ") and paused == "<4>paused: nothing fires\n"
        assert all(re.match("<[46]>[A-Za-z]", line) for line in lines)
    else:
        assert all(re.match(r"\d{4}-\d\d-\d\d .{12} (INFO|WARNING) ", line) for line in lines)


def test_a_log_that_nobody_reads_any_more_does_not_end_the_service(tmp_path, configure):
    arguments = (CHRONOS, "--config", configure(""))
    with serving(*arguments, directory=tmp_path) as (process, client):
        process.stderr.close()

        client.create(NOBODY)

        assert client.get("/jobs")["total"] == 1
        process.terminate()
        assert process.wait(10) == 0


# --- metrics --------------------------------------------------------------------------

NEEDS_PROMTOOL = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool: Debian has it in the package prometheus"
)
SAMPLE = re.compile(
    r'(?P<name>[a-z_]+)(?:\{(?P<labels>[a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*)\})? '
    r"(?P<value>[0-9.e+-]+)"
)


def scrape(client, **options):
    """Return the samples of /metrics by name and labels, and check that its format is right."""
    answer = requests.get(f"{client.url}/metrics", timeout=10, **options)
    assert (answer.status_code, answer.headers["Content-Type"]) == (
        200, "text/plain; version=0.0.4; charset=utf-8",
    )  # fmt: skip
    return parse_metrics(answer.text)


def parse_metrics(text):
    """Return name and labels -> value. It is stricter than Prometheus about order and names."""
    samples, families, lines = collections.Counter(), {}, text.split("\n")
    assert lines.pop() == ""
    while lines:
        _hash, word, family, meaning = lines.pop(0).split(" ", 3)
        assert (_hash, word) == ("#", "HELP") and meaning and family not in families
        kind = families[family] = lines.pop(0).removeprefix(f"# TYPE {family} ")
        assert kind in ("counter", "gauge", "histogram")
        assert family.endswith("_total") == (kind == "counter")
        own = {"histogram": ["_bucket", "_sum", "_count"]}.get(kind, [""])
        while lines and not lines[0].startswith("#"):
            sample = SAMPLE.fullmatch(lines[0])
            assert sample and sample["name"].removeprefix(family) in own, lines[0]
            key, _blank, value = lines.pop(0).rpartition(" ")
            assert key not in samples
            samples[key] = float(value)
        if kind == "histogram":
            buckets = [n for key, n in samples.items() if key.startswith(f"{family}_bucket")]
            assert buckets == sorted(buckets)
            assert max(buckets, default=0) == samples[f"{family}_count"]
    return samples


def ends(samples, **expected):
    """Check how many executions have ended with each result; all others are 0."""
    prefix = "chronos_executions_ended_total"
    results = {key: n for key, n in samples.items() if key.startswith(prefix)}
    assert len(results) == 6
    counts = {key: n for key, n in results.items() if n}
    assert counts == {f'{prefix}{{result="{result}"}}': n for result, n in expected.items()}


def names_of_metrics(client):
    text = requests.get(f"{client.url}/metrics", timeout=10).text
    return set(re.findall("# TYPE ([^ ]+)", text))


@NEEDS_PROMTOOL
def test_the_alert_rules_of_the_readme_are_ones_and_it_names_every_metric(
    service, target, tmp_path
):
    readme = (CHRONOS.parent / "README.md").read_text()
    rules = tmp_path / "rules.yml"
    (rules_text,) = re.findall("```yaml\n(groups:.*?)```", readme, re.DOTALL)
    rules.write_text(rules_text)

    command = ["promtool", "check", "rules", rules]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (checked.returncode, checked.stdout.count("SUCCESS: 3 rules found")) == (0, 1)
    used = set(re.findall(r"((?:chronos|process)_[a-z_]+)[{`\[ )]", readme))
    service.create(target.url, schedule="@every 1s", enabled=True)
    names = wait_until(lambda: (now := names_of_metrics(service)) and len(now) == 16 and now)
    assert names | {"chronos_lateness_seconds_bucket"} == used


@NEEDS_PROMTOOL
def test_promtool_has_nothing_to_say_about_the_metrics(service, target):
    service.post(trigger_path(service.create(target.url)))
    text = requests.get(f"{service.url}/metrics", timeout=10).text

    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_metrics_show_what_there_is_and_what_the_process_uses(service, target):
    before = time.time()
    for enabled in (True, True, False):
        service.create(target.url + "/hang", enabled=enabled)
    start_hanging(service, target)

    samples = scrape(service)

    assert samples['chronos_jobs{state="enabled"}'] == 2
    assert samples['chronos_jobs{state="disabled"}'] == 2
    assert samples['chronos_executions{status="running"}'] == 1
    assert samples['chronos_executions{status="pending"}'] == samples["chronos_is_leader"] - 1 == 0
    assert 0 <= samples["chronos_last_pass_age_seconds"] < 10
    assert before - 60 < samples["process_start_time_seconds"] < time.time()
    assert 10e6 < samples["process_resident_memory_bytes"] < 1e9
    open_files = len(os.listdir("/proc/self/fd"))
    assert abs(samples["process_open_fds"] - open_files) < 10
    (build,) = (key for key in samples if key.startswith("chronos_build_info"))
    assert f'version="{chronos.__version__}"' in build
    target.let_go.set()


def test_every_end_is_counted_by_its_reason_and_every_attempt_by_its_result(service, target):
    job = service.create(target.url, retry_policy=ONCE)
    failing = service.create(f"{target.url}/status/404")
    zeros = scrape(service)
    ends(zeros)

    for _ in range(3):
        service.post(trigger_path(job))
    service.post(trigger_path(failing))
    hanging = start_hanging(service, target)
    assert service.post(f"{hanging.partition('/exec')[0]}/trigger")["reason"] == "overlap"
    service.post(f"{hanging}/cancel")
    service.error(500, "POST", trigger_path(service.create(NOBODY, retry_policy=ONCE)))
    attempts = 'chronos_attempts_total{result="cancelled"}'
    samples = wait_until(lambda: (now := scrape(service))[attempts] and now)

    ends(samples, success=3, failed=2, overlap=1, cancelled=1)
    made = {"success": 3, "http_status": 1, "no_answer": 1, "cancelled": 1}
    for result, count in made.items():
        assert samples[f'chronos_attempts_total{{result="{result}"}}'] == count
    assert samples["chronos_execution_duration_seconds_count"] == 6  # the skipped one had none
    assert samples["chronos_engine_passes_total"] > zeros["chronos_engine_passes_total"]
    target.let_go.set()


def text_of(world):
    api = chronos.Api(world.engine, world.store, world.settings, world.clock)
    return parse_metrics(api.server.metrics().decode())


def test_lateness_is_from_the_fire_time_to_the_first_attempt_of_a_scheduled_run(world, target):
    target.script = ["/status/503"]
    job = world.create(target.url, schedule="* * * * *")
    world.clock.advance(60.2)
    world.settle()
    world.advance(1)
    world.do(world.engine.run_queue.trigger, job.id, "exec-1")
    world.settle()

    samples = text_of(world)

    assert samples["chronos_lateness_seconds_count"] == 1
    assert samples["chronos_lateness_seconds_sum"] == pytest.approx(0.2)
    name = "chronos_lateness_seconds_bucket"
    assert [samples[f'{name}{{le="{le}"}}'] for le in (0.1, 0.25, "+Inf")] == [0, 1, 1]
    assert samples["chronos_execution_duration_seconds_sum"] == pytest.approx(1.0)  # the wait
    assert samples['chronos_attempts_total{result="http_status"}'] == 1


def test_missed_fire_times_are_counted_each_and_made_up_runs_are_not_late(world, target):
    world.create(target.url, schedule="* * * * *", missed_run_policy="execute_one")

    world.advance(10 * 60)

    samples = text_of(world)
    assert samples["chronos_lateness_seconds_count"] == 0
    ends(samples, success=1, missed=9)


def test_what_the_store_did_not_take_is_told_and_counted_as_an_end_when_it_is_on_disk(
    world, target, caplog
):
    caplog.set_level("INFO", "chronos")
    job = world.create(target.url + "/status/404")
    world.engine.hand_in(world.engine.run_queue.trigger, job.id, "exec-1")
    world.engine.run_turn()
    target.take()
    wait_until(world.engine._inbox.qsize)
    before = text_of(world)
    with locked(world.store.database.path):
        engine_connection(world).execute("PRAGMA busy_timeout = 1")
        world.engine.run_turn()
        during = text_of(world)
        world.clock.advance(2)
        world.engine.run_turn()
        assert logged(caplog, "answered 404") == []
    world.advance(2)

    assert before["chronos_store_errors_total"] == 0
    assert during["chronos_store_errors_total"] == 1
    ends(during)
    ends(text_of(world), failed=1)
    assert text_of(world)['chronos_attempts_total{result="http_status"}'] == 1
    assert logged(caplog, "answered 404") == ["WARNING"]


def test_a_run_that_the_last_process_left_without_an_end_counts_as_interrupted(make_world, target):
    world = make_world()
    job = world.create(target.url + "/hang", retry_policy=ONCE)
    world.engine.hand_in(world.engine.run_queue.trigger, job.id, "exec-1")
    world.engine.run_turn()
    world.store.database.close()

    after = make_world()
    after.engine.run_turn()

    samples = text_of(after)
    ends(samples, failed=1)
    assert samples['chronos_attempts_total{result="interrupted"}'] == 1
    target.let_go.set()


def test_a_run_that_goes_with_its_job_counts_as_no_end(world, target):
    job = world.create(target.url + "/hang")
    hang(world, target, job)

    world.do(world.engine.job_changes.delete, job, False)
    target.let_go.set()
    world.settle()

    samples = text_of(world)
    ends(samples)
    assert samples['chronos_attempts_total{result="deleted"}'] == 1


def test_the_metrics_ask_who_it_is_unless_they_are_public(make_service):
    guard = {"auth__type": "basic", "auth__users": {"ada": HASHED}}
    closed = make_service(**guard)

    answer = requests.get(f"{closed.url}/metrics", timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHORIZED")
    assert scrape(closed, headers=credentials("ada"))
    closed.service.stop()
    public = make_service(**guard, metrics__public=True)

    assert scrape(public)
    assert public.call("GET", "/jobs")[0] == 401
    foreign = requests.get(f"{public.url}/metrics", headers={"Host": "evil.test"}, timeout=10)
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "FORBIDDEN")


def test_errors_of_the_metrics_are_json_as_all_others(service):
    foreign = requests.get(f"{service.url}/metrics", headers={"Host": "evil.test"}, timeout=10)
    wrong = requests.post(f"{service.url}/metrics", timeout=10)

    assert [a.status_code for a in (foreign, wrong)] == [403, 405]
    assert all(a.json()["success"] is False for a in (foreign, wrong))


# ======================================================================================
# 13. Requests
# ======================================================================================


def headers_of(request):
    """Return the headers of a raw request as a list of pairs."""
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return [tuple(line.split(": ", 1)) for line in lines]


def test_the_request_is_the_configured_one_with_the_headers_of_chronos(send, target):
    outcome = send(
        f"{target.url}/echo/a%20b?q=ö&r=1#part",
        method="PUT",
        body='{"name": "Zoë ☃"}',
        headers={"X-Own": "Zoë"},
    )

    method, path, headers, body, _at = target.take()
    assert (method, path) == ("PUT", "/echo/a%20b?q=%C3%B6&r=1")
    assert body == '{"name": "Zoë ☃"}'.encode()
    assert headers["X-Own"].encode("latin-1") in ("Zoë".encode("latin-1"), "Zoë".encode())
    expected = {
        "Host": target.url.removeprefix("http://"),
        "User-Agent": f"chronos/{chronos.__version__}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Accept-Encoding": "identity",
        "X-Chronos-Job-ID": JOB_ID,
        "X-Chronos-Execution-ID": "exec-1",
        "X-Chronos-Scheduled-Time": "2027-03-01T12:00:00Z",
        "X-Chronos-Attempt": "2",
        "Idempotency-Key": "exec-1",
    }
    assert {name: headers.get_all(name) for name in expected} == {
        name: [value] for name, value in expected.items()
    }
    assert (outcome.success, outcome.status_code, outcome.response) == (True, 200, body.decode())
    assert (outcome.reason, outcome.error, outcome.retry_after) == (None, None, None)


@pytest.mark.parametrize(("typed", "sent"), [
    ("/a%7Eb%41?sig=a%2fb", "/a%7Eb%41?sig=a%2fb"), ("/%c3%A9%e9%00", "/%c3%A9%e9%00"),
    ("/a/../b/./c/..", "/a/../b/./c/.."), ("//a//?//", "//a//?//"), ("/a;b=1,2", "/a;b=1,2"),
    ("/!$&'()*+,;=:@-._~", "/!$&'()*+,;=:@-._~"), ("/?a?b=:/@!$'()*,;", "/?a?b=:/@!$'()*,;"),
    ("", "/"), ("?", "/?"), ("?q=1", "/?q=1"), ("/a?", "/a?"), ("/%3f%23", "/%3f%23"),
    ("#part", "/"), ("/a#b/c?d", "/a"), ("?q#", "/?q"), ("/a@b:1", "/a@b:1"),
])  # fmt: skip
def test_a_url_goes_out_octet_for_octet_as_it_is_typed(send, hostile, typed, sent):
    server = hostile(answers(OK))

    assert send(chronos.a_url(server.url + typed)).success

    line = server.requests.get(timeout=5).partition(b"\r\n")[0]
    assert line.decode() == f"GET {sent} HTTP/1.1"


@pytest.mark.parametrize(("typed", "sent"), [
    ("LocalHost:{}", "LocalHost:{}"), ("127.1:{}", "127.1:{}"), ("[::1]:{}", "[::1]:{}"),
    ("[0:0::0:1]:{}", "[0:0::0:1]:{}"), ("[::1%251]:{}", "[::1]:{}"),
])  # fmt: skip
def test_the_host_header_has_the_host_as_it_is_typed(send, hostile, typed, sent):
    server = hostile(answers(OK), host="::1" if "[" in typed else "127.0.0.1")

    assert send(chronos.a_url(f"http://{typed.format(server.port)}/")).success

    assert ("Host", sent.format(server.port)) in headers_of(server.requests.get(timeout=5))


def test_the_history_shows_the_url_as_it_is_typed(service, target):
    url = f"{target.url}/a%7Eb%41?sig=a%2fb#part"
    job = service.create(url)

    execution = service.post(trigger_path(job))

    shown = service.get(path_of(job, f"/executions/{execution['id']}"))["request"]
    assert job["webhook"]["url"] == shown["url"] == url


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("body", [None, "text"])
def test_every_method_goes_out_with_and_without_a_body(send, target, method, body):
    outcome = send(f"{target.url}/ok", method=method, body=body)

    taken = target.take()
    assert (taken[0], taken[3]) == (method, (body or "").encode())
    assert (outcome.success, outcome.response) == (True, "" if method == "HEAD" else "OK")


@pytest.mark.parametrize("name", ["user-agent", "idempotency-key", "content-type", "host"])
def test_the_jobs_own_headers_win_in_whatever_case(send, target, name):
    send(target.url, method="POST", body="{}", headers={name: "own.example"})

    assert target.take()[2].get_all(name) == ["own.example"]


@pytest.mark.parametrize("body, content_type", [
    ('{"a": 1}', "application/json"),
    ("[" * 100_000, "text/plain; charset=utf-8"),
    ("Zoë", "text/plain; charset=utf-8"),
    ("", None),
    (None, None),
])  # fmt: skip
def test_a_body_without_content_type_is_json_if_it_parses_else_text(
    send, target, body, content_type
):
    send(target.url, method="POST", body=body)

    assert target.take()[2]["Content-Type"] == content_type


@pytest.mark.parametrize("auth, name, value", [
    ({"type": "basic", "username": "zoë", "password": "pä:ss"}, "Authorization",
     "Basic " + base64.b64encode("zoë:pä:ss".encode()).decode()),
    ({"type": "bearer", "token": "t0k.en=="}, "Authorization", "Bearer t0k.en=="),
    ({"type": "api_key", "header": "X-API-Key", "api_key": "k"}, "X-API-Key", "k"),
    ({"type": "api_key", "header": "X-Own", "api_key": "k"}, "X-Own", "k"),
])  # fmt: skip
def test_auth_sets_its_header_last(send, target, auth, name, value):
    send(target.url, auth=auth, headers={name.lower(): "the job's own"})

    assert target.take()[2].get_all(name) == [value]


def test_a_signature_is_that_of_the_published_example():
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # of the tests of Standard Webhooks
    ready = make_attempt(URL, body='{"test": 2432232314}', signing_secret=secret)
    execution = ready.execution._replace(
        id="msg_p5jXN8AQM9LWM0D4loKWxJek", attempt_at=1614265330 * SECOND + 999_999
    )

    headers = dict(headers_of(ready.webhook.to_bytes(execution)))

    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("body", ['{"a": "Zo\u00eb \u2603"}', "text\r\n", None])
def test_a_receiver_verifies_the_signatures_of_each_secret(service, target, body):
    why = "no receiver to compare with: pip install standardwebhooks"
    receiver = pytest.importorskip("standardwebhooks", reason=why)
    secrets = [f"whsec_{base64.b64encode(os.urandom(size)).decode()}" for size in (24, 64, 32)]
    webhook = {"body": body, "signing_secret": f"{secrets[0]} {secrets[1].removeprefix('whsec_')}"}

    execution = service.post(trigger_path(service.create(target.url, webhook=webhook)))

    _method, _path, headers, arrived, _at = target.take()
    assert headers["webhook-id"] == headers["X-Chronos-Execution-ID"] == execution["id"]
    for secret in secrets[:2]:
        receiver.Webhook(secret).verify(arrived, dict(headers), json_parse=False)
    for secret, data in ((secrets[2], arrived), (secrets[0], arrived + b"x")):
        with pytest.raises(receiver.WebhookVerificationError):
            receiver.Webhook(secret).verify(data, dict(headers), json_parse=False)


def test_each_attempt_is_signed_with_its_own_time(world, target):
    target.script = ["/status/503"]
    retry = {"initial_interval": "1h", "max_interval": "1h"}
    webhook = {"signing_secret": SIGNING_SECRET, "body": "{}"}
    job = world.create(target.url, webhook=webhook, retry_policy=retry, timeout="24h")
    execution_id = run_once(world, job)
    world.advance(3600)

    attempts = [target.take() for _ in range(2)]

    for number, (_method, _path, headers, body, _at) in enumerate(attempts):
        assert headers["webhook-id"] == execution_id
        assert headers["webhook-timestamp"] == str(NOON // SECOND + 3600 * number)
        assert headers["webhook-signature"] == signature_of(headers, body)


def test_what_has_no_signing_secret_is_not_signed(send, target):
    send(target.url, headers={"webhook-id": "own"})

    headers = target.take()[2]
    assert [headers[f"webhook-{name}"] for name in ("id", "signature")] == ["own", None]


def test_an_ipv6_target_is_named_in_brackets(send, hostile):
    server = hostile(answers(OK), host="::1")

    assert send(server.url).success
    assert ("Host", f"[::1]:{server.port}") in headers_of(server.requests.get())


def test_proxy_variables_netrc_and_cookies_are_not_used(send, target, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login l password p\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    target.extra_headers = {"Set-Cookie": "a=b; Path=/"}

    outcomes = [send(target.url) for _ in range(2)]

    assert [outcome.success for outcome in outcomes] == [True, True]
    for _ in outcomes:
        headers = target.take()[2]
        assert headers["Authorization"] is None and headers["Cookie"] is None


def test_nothing_of_the_environment_is_sent_or_called(make_process, hostile, tmp_path):
    proxy, behave = (
        hostile(answers(OK)),
        answers(OK.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b\r\n")),
    )
    names = ("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
    environment = dict.fromkeys(names, proxy.url) | {"HOME": str(tmp_path), "NO_PROXY": ""}
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login l password p\n")
    (tmp_path / ".netrc").chmod(0o600)
    process = make_process(environment=environment)

    for server in (hostile(behave), hostile(behave, "https")):
        for _ in range(2):
            job = process.create(f"{server.url}/{_}", webhook={"verify_tls": False})
            process.post(trigger_path(job))
            sent = {name.lower() for name, _value in headers_of(server.requests.get(timeout=5))}
            assert "x-chronos-job-id" in sent
            assert not sent & {"authorization", "cookie", "proxy-authorization"}
    assert proxy.accepted == 0


@pytest.mark.parametrize("text", ["env:HIDDEN", "${HIDDEN}", "$HIDDEN", "%HIDDEN%", "{HIDDEN}"])
def test_names_of_the_environment_in_a_job_are_sent_as_they_are(service, target, monkeypatch, text):
    monkeypatch.setenv("HIDDEN", "expanded")
    webhook = {"auth": {"type": "bearer", "token": text}, "headers": {"X-A": text}, "body": text}

    service.post(trigger_path(service.create(target.url, webhook=webhook)))

    _method, _path, headers, body, _at = target.take()
    assert (headers["Authorization"], headers["X-A"]) == (f"Bearer {text}", text)
    assert body.decode() == text


@pytest.mark.parametrize("webhook", [
    {"method": "POST", "body": "\ud800"},
    {"headers": {"X-Split": "a\r\nX-Chronos-Attempt: 9"}}, {"headers": {"X-Number": 5}},
    {"auth": {"type": "basic", "username": "\ud800", "password": ""}},
])  # fmt: skip
def test_what_cannot_be_prepared_ends_as_an_outcome(send, target, webhook):
    outcome = send(**{"url": target.url} | webhook)

    assert (outcome.success, outcome.reason) == (False, "no_answer")
    assert target.received.empty()


# ======================================================================================
# 14. The wire
# ======================================================================================

FORGED = HEAD + b"Content-Length: 6\r\n\r\nforged"
MEGABYTE = "x" * 1_000_000
SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])


def stalls(start):
    """Return a behaviour: after the request this beginning of an answer, and no more."""

    def behave(server, connection):
        read_request(connection)
        connection.sendall(start)
        server.hold()

    return behave


def repeats(start, piece, pause=0.0):
    """Return a behaviour: this beginning of an answer, and ``piece`` for ever."""

    def behave(server, connection):
        read_request(connection)
        connection.sendall(start)
        server.reached.release()
        while not server.stopping.wait(pause):
            connection.sendall(piece)

    return behave


def reads_nothing(server, _connection):
    server.hold()


def resets(_server, connection):
    """Take a request and answer with a TCP reset."""
    read_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hangs_up(_server, connection):
    connection.recv(1000)  # and closes while the rest of the request is on its way


def begun_handshake(server, connection):
    connection.recv(100)
    server.hold()


def timed_send(dispatcher, attempt):
    """Return the outcome and how many seconds it took."""
    start = time.monotonic()
    outcome = dispatcher.send(attempt)
    return outcome, time.monotonic() - start


# --- reuse of connections -------------------------------------------------------------


@SCHEMES
def test_a_connection_is_reused(send, hostile, scheme):
    server = hostile(answers(OK), scheme)

    outcomes = [send(server.url, verify_tls=False) for _ in range(5)]

    assert all(outcome.success for outcome in outcomes)
    assert (server.accepted, server.requests.qsize()) == (1, 5)


def test_requests_at_the_same_time_do_not_share_a_connection(send, hostile):
    together = threading.Barrier(4)

    def behave(_server, connection):
        while read_request(connection):
            together.wait(10)
            connection.sendall(OK)

    server = hostile(behave)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(send, [server.url] * 8))

    assert all(outcome.success for outcome in outcomes)
    assert server.accepted == 4


USED_UP = [
    HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\nOK",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nOK",
    HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000,  # read in part
    OK + FORGED,  # more than was asked for
]
UNCLEAR = [  # where does it end?
    HEAD + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\nOK",
    CHUNKED[:-2] + b"Content-Length: 9\r\n\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: x\r\n\r\nOK",
    HEAD + b"Content-Length: 2\r\n 0\r\n\r\nOK",
    HEAD + b"Connection: keep-alive\r\nConnection: close\r\nContent-Length: 2\r\n\r\nOK",
    CHUNKED[:-2] + b"Transfer-Encoding: gzip\r\n\r\n2\r\nOK\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: identity, chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n",
    CHUNKED + b"0x2\r\nOK\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("answer", USED_UP + UNCLEAR)
def test_a_connection_that_is_used_up_or_of_unclear_state_is_not_reused(send, hostile, answer):
    server = hostile(answers(answer))

    for _ in range(2):
        outcome = send(server.url, allowed=0.5)
        assert outcome.success or (answer in UNCLEAR and outcome.reason == "no_answer")
    assert server.accepted == 2


@SCHEMES
@pytest.mark.parametrize("end", ["closed while idle", "closed", "reset"])
def test_a_reused_connection_that_is_dead_is_replaced_in_the_same_attempt(
    world, hostile, scheme, end
):
    closed = threading.Event()
    send = lambda **webhook: world.dispatcher.send(
        make_attempt(server.url, verify_tls=False, **webhook)
    )

    def behave(server, connection):
        server.requests.put(read_request(connection))
        connection.sendall(OK)
        if server.accepted == 1 and end == "closed":
            server.requests.put(read_request(connection))
        elif server.accepted == 1 and end == "reset":
            resets(server, connection)
        connection.close()
        closed.set()

    server = hostile(behave, scheme)

    assert send().success
    assert end != "closed while idle" or closed.wait(10)
    assert send(method="POST", body="x").success
    assert server.accepted == 2


@SCHEMES
@pytest.mark.parametrize(("seconds", "beginning", "most", "numbers", "reason"), [
    (0.09, b"", 1, [1, 1], None),  # it had closed the connection as the request came
    (0.11, b"", 1, [1], "no_answer"), (2, b"", 1, [1], "no_answer"), (2, b"", 3, [1, 2], None),
    (0, b"H", 1, [1], "no_answer"), (0, b"H", 3, [1, 2], None),
])  # fmt: skip
def test_a_request_that_may_have_been_worked_on_is_sent_again_as_an_attempt_of_its_own(
    world, hostile, scheme, seconds, beginning, most, numbers, reason
):
    def behave(server, connection):
        while request := read_request(connection):
            server.requests.put(int(dict(headers_of(request))["X-Chronos-Attempt"]))
            if server.requests.qsize() == 2:
                world.clock.advance(seconds)
                connection.sendall(beginning)
                return
            connection.sendall(OK)

    server = hostile(behave, scheme)
    webhook = {"method": "POST", "body": "x", "verify_tls": False}
    job = world.create(server.url, webhook=webhook, retry_policy={"max_attempts": most})

    for _ in range(2):
        run_once(world, job)
    world.advance(1)

    run = world.executions(job)[-1]
    assert list(server.requests.queue) == [1, *numbers]
    assert (run.reason, run.attempts) == (reason, numbers[-1])
    attempts = json.loads(run.attempt_log)
    assert [attempt["number"] for attempt in attempts] == list(range(1, numbers[-1] + 1))
    if seconds and attempts[0]["error"]:
        closed = "closed the connection without an answer; it may have worked on the request"
        assert attempts[0]["error"] == f"{server.url} {closed}"


def test_an_interim_answer_is_passed_over_and_its_final_one_never_answers_another_request(
    send, hostile
):
    def behave(_server, connection):
        for name in (b"first", b"second"):
            read_request(connection)
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
            time.sleep(0.2)  # the final answer comes in a packet of its own
            body = b"Content-Length: %d\r\n\r\n%s" % (len(name), name)
            connection.sendall(HEAD + body)

    server = hostile(behave)

    assert [send(server.url).response for _ in range(2)] == ["first", "second"]


def test_what_tls_has_read_ahead_does_not_answer_the_next_request(send, hostile):
    head = HEAD + b"Content-Length: 12000\r\n\r\n"
    server = hostile(answers(head + b"x" * 12_000), "https")  # a body that HEAD must not have

    for _ in range(2):
        assert send(server.url, method="HEAD", verify_tls=False).error is None


def test_an_attempt_is_delivered_at_most_twice_however_many_idle_connections_die(world, hostile):
    together = threading.Barrier(4)
    send = lambda url, **webhook: world.dispatcher.send(make_attempt(url, **webhook))

    def behave(server, connection):
        if server.accepted <= 4 and read_request(connection):
            together.wait(10)
            connection.sendall(OK)
        server.requests.put(read_request(connection))  # and closes without an answer

    server = hostile(behave)
    with ThreadPoolExecutor(4) as pool:
        assert all(outcome.success for outcome in pool.map(send, [server.url] * 4))

    assert send(server.url, method="POST", body="x").reason == "no_answer"
    assert (server.requests.qsize(), server.accepted) == (2, 5)


def test_idle_connections_are_no_more_than_the_workers_and_end_after_30_s(make_world, hostile):
    world = make_world(dispatcher__max_concurrent_jobs=3)
    servers = [hostile(answers(OK), host=f"127.0.0.{n}") for n in range(2, 14)]
    opened = lambda: [len(server.handles) for server in servers]
    world.dispatcher.start()

    for server in servers:
        assert world.dispatcher.send(make_attempt(server.url)).success
    wait_until(lambda: opened() == [0] * 9 + [1, 1, 1])
    world.clock.advance(29.9)
    wait_until(lambda: world.dispatcher.last_watch == world.clock.monotonic())
    assert (
        world.dispatcher.send(make_attempt(servers[-2].url)).success and servers[-2].accepted == 1
    )
    for seconds, left in ((0.1, [0, 1, 0]), (29.9, [0, 0, 0])):
        world.clock.advance(seconds)
        wait_until(lambda left=left: opened() == [0] * 9 + left)
    world.dispatcher.stop()


@SCHEMES
@pytest.mark.parametrize(("method", "answer"), [
    ("GET", OK), ("GET", CHUNKED + b"0\r\n\r\n"), ("HEAD", HEAD + b"Content-Length: 6\r\n\r\n"),
    ("GET", b"HTTP/1.1 204 Fine\r\nContent-Length: 6\r\n\r\n"),
    ("GET", b"HTTP/1.1 304 Same\r\n\r\n"),
])  # fmt: skip
def test_what_comes_unasked_while_a_connection_is_idle_answers_nothing(
    send, hostile, scheme, method, answer
):
    ready, sent = threading.Event(), threading.Event()

    def behave(server, connection):
        if server.accepted == 1:
            read_request(connection)
            connection.sendall(answer)
            ready.wait(10)
            connection.sendall(FORGED)
            sent.set()
        answers(OK)(server, connection)

    server, codes = hostile(behave, scheme), [200, 204, 304]

    first = send(server.url, method=method, success_codes=codes, verify_tls=False)
    ready.set()
    assert first.success and sent.wait(10)

    assert send(server.url, verify_tls=False).response == "OK"
    assert server.accepted == 2


# --- the answer -----------------------------------------------------------------------


@pytest.mark.parametrize("answer, text", [
    (HEAD + b"Content-Length: 0\r\n\r\n", ""),
    (typed(b"text/plain", "Zoë ☃".encode()), "Zoë ☃"),
    (typed(b"text/plain; charset=latin-1", b"Zo\xeb"), "Zoë"),
    (typed(b'text/plain; charset="UTF-16LE"', "☃".encode("utf-16-le")), "☃"),
    (typed(b"text/plain; charset=klingon", "☃".encode()), "☃"),
    (typed(b"text/plain; charset=base64", "☃".encode()), "☃"),
    (typed(b"text/plain", b"a\xff\xed\xa0\x80b"), "a\ufffd\ufffd\ufffd\ufffdb"),
    (typed(b"text/plain; charset=unicode_escape", rb"a\ud800b"), r"a\ud800b"),
])  # fmt: skip
def test_an_answer_is_kept_as_text(send, hostile, answer, text):
    outcome = send(hostile(answers(answer, close=True)).url)

    assert (outcome.success, outcome.response) == (True, text), outcome.error


def packed(text, window):
    """Return a text in the form of zlib: 31 gzip, 15 with its own head, -15 bare."""
    packer = zlib.compressobj(wbits=window)
    return packer.compress(text.encode()) + packer.flush()


def in_chunks(body):
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


GZIP, PLAIN = packed("Zoë ☃", 31), b"as it came"
FOREIGN = "[it is packed with {}, which Chronos cannot unpack]"
CODED_BODIES = [  # headers, body, what is kept
    ("Content-Encoding: gzip", GZIP, "Zoë ☃"), ("Content-Encoding: X-GZip", GZIP, "Zoë ☃"),
    ("Content-Encoding: identity, gzip", GZIP, "Zoë ☃"), ("Content-Encoding: gzip", b"", ""),
    *(("Content-Encoding: deflate", packed("Zoë ☃", window), "Zoë ☃") for window in (15, -15)),
    ("Content-Type: text/plain; charset=latin-1\r\nContent-Encoding: gzip", GZIP, "ZoÃ« â\x98\x83"),
    ("Transfer-Encoding: gzip, chunked", in_chunks(GZIP), "Zoë ☃"),
    ("Transfer-Encoding: gzip", GZIP, "Zoë ☃"), ("Content-Encoding: gzip", GZIP[:-9], "Zoë ☃"),
    *((f"Content-Encoding: {name}", PLAIN, "as it came") for name in ("gzip", "deflate", "utf-8")),
    *((f"Content-Encoding: {name}", PLAIN, FOREIGN.format(name)) for name in ("br", "zstd")),
    ("Content-Encoding: gzip, gzip", GZIP, FOREIGN.format("gzip, gzip")),
    ("Content-Encoding: gzip\r\nTransfer-Encoding: deflate, chunked", in_chunks(GZIP),
     FOREIGN.format("gzip, deflate")),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "body", "kept"), CODED_BODIES)
def test_a_packed_answer_that_was_not_asked_for_is_unpacked(send, hostile, headers, body, kept):
    answer = HEAD + headers.encode() + b"\r\n\r\n" + body

    outcome = send(hostile(answers(answer, close=True)).url)

    assert (outcome.success, outcome.response) == (True, kept), outcome.error


@pytest.mark.parametrize(("size", "limit", "kept"), [
    (50, 50, 50), (51, 50, 50), (50_000_000, 65536, 65536), (50_000_000, 100, 100), (9, 5, 0),
    (1, 0, 0),
])  # fmt: skip
def test_a_packed_answer_is_unpacked_to_the_limit(make_dispatcher, hostile, size, limit, kept):
    dispatcher = make_dispatcher(dispatcher__max_response_bytes=limit)
    body = packed("x" * size, 31)
    server = hostile(answers(typed(b"gzip", body, b"Content-Encoding")))

    outcome = dispatcher.send(make_attempt(server.url))

    response, _mark, rest = outcome.response.partition("\n[cut off after ")
    assert (response, rest) == ("x" * kept, "" if size == limit else f"{kept} bytes]")


def two(*lines):
    """Return an answer with these header lines and a body of two bytes."""
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\nOK"


def coded(name, body=b"2\r\nOK\r\n0\r\n\r\n"):
    """Return an answer with a Transfer-Encoding."""
    return HEAD + b"Transfer-Encoding: " + name + b"\r\n\r\n" + body


LENGTH = b"Content-Length: 2"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
# An answer, who of others takes it (curl 7.88, Python's requests, Go, Node's http and its fetch:
# tried once by hand), and what Chronos says: status and response, or why it is none. After those
# in CLOSED_AFTER the server closes the connection, and after all that are none; else it waits.
# What curl takes, and Go or Node, must be an answer: it would be sent again. Of the others those
# are none whose end is not clear; there two clients would find different answers.
ODD_ANSWERS = {
    # the status line
    "lower-case phrase": (b"HTTP/1.1 200 ok\r\n" + OK[17:], "cpgnf", "200 OK"),
    "lower-case version": (b"http/1.1 200 OK\r\n" + OK[17:], "c", "200 OK"),
    "no phrase": (b"HTTP/1.1 200 \r\n" + OK[17:], "cpgnf", "200 OK"),
    "neither phrase nor blank": (b"HTTP/1.1 200\r\n" + OK[17:], "cpgnf", "200 OK"),
    "blanks before the code": (b"HTTP/1.1  200 OK\r\n" + OK[17:], "cpg", "200 OK"),
    "8-bit phrase": (b"HTTP/1.1 200 M\xf6glich\r\n" + OK[17:], "cpgnf", "200 OK"),
    "NUL in the phrase": (b"HTTP/1.1 200 O\0K\r\n" + OK[17:], "pgnf", "200 OK"),
    "code 600": (b"HTTP/1.1 600 Odd\r\n" + OK[17:], "cpgnf", "600 OK"),
    "code 99": (b"HTTP/1.1 99 Odd\r\n" + OK[17:], "", "a wrong status line"),
    "code 099": (b"HTTP/1.1 099 Odd\r\n" + OK[17:], "gn", "a wrong status line"),
    "code 2000": (b"HTTP/1.1 2000 Odd\r\n" + OK[17:], "", "a wrong status line"),
    "tabs": (b"HTTP/1.1\t200\tOK\r\n" + OK[17:], "p", "a wrong status line"),
    "HTTP/2.0": (b"HTTP/2.0 200 OK\r\n" + OK[17:], "cgnf", "200 OK"),
    "HTTP/1.2": (b"HTTP/1.2 200 OK\r\n" + OK[17:], "pg", "200 OK"),
    "HTTP/2": (b"HTTP/2 200 OK\r\n" + OK[17:], "c", "a wrong status line"),
    "HTTP/1.10": (b"HTTP/1.10 200 OK\r\n" + OK[17:], "p", "a wrong status line"),
    "ICY": (b"ICY 200 OK\r\n" + OK[17:], "", "a wrong status line"),
    "HTTP/0.9": (b"OK\n", "", "a wrong status line"),
    "CRLF before it": (b"\r\n" + OK, "nf", "a wrong status line"),
    # headers
    "bare LF": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nOK", "cpg", "200 OK"),
    "CR CR LF": (b"HTTP/1.1 200 OK\r\r\nContent-Length: 2\r\r\n\r\r\nOK", "c", "200 OK"),
    "lower-case names": (two(LENGTH.lower()), "cpgnf", "200 OK"),
    "no blank after the colon": (two(b"Content-Length:2"), "cpgnf", "200 OK"),
    "blank before the colon": (two(b"X : y", LENGTH), "cgf", "200 OK"),
    "blank before a length's": (two(b"Content-Length : 2"), "", "200 OK"),
    "blank in a name": (two(b"X Y: z", LENGTH), "cgf", "200 OK"),
    "odd name": (two(b"X(1)@\xc3: y", b": z", LENGTH), "c", "200 OK"),
    "8-bit value": (two(b"X: Zo\xc3\xab \xeb", LENGTH), "cpgnf", "200 OK"),
    "NUL in a value": (two(b"X: a\0b", LENGTH), "p", "200 OK"),
    "bare CR in a value": (two(b"X: a\rb", LENGTH), "c", "200 OK"),
    "folded": (two(b"X: a", b" b", b"\tc", LENGTH), "cpgf", "200 OK"),
    "folded length": (two(b"Content-Length:", b" 2"), "pgf", "200 OK"),
    "length in two folds": (two(b"Content-Length: 2", b" 0"), "cp", "a wrong Content-Length"),
    "blank before the first": (two(b" X: y", LENGTH), "p", "a wrong header"),
    "no colon": (two(b"no colon", LENGTH), "p", "a wrong header"),
    "1,500 headers": (two(*(b"X-%d: y" % n for n in range(1500)), LENGTH), "cgnf", "200 OK"),
    "90,000 bytes": (two(b"X: " + b"y" * 90_000, LENGTH), "cg", "200 OK"),
    "250 KB": (two(*[b"X: " + b"y" * 50_000] * 5, LENGTH), "cpg", "200 OK"),
    "half a head": (HEAD + b"Content-Length: 0\r\n", "cp", "amid its answer"),
    # where it ends
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nOK", "cpgnf", "200 OK"),
    "no length": (HEAD + b"\r\nOK", "cpgnf", "200 OK"),
    "two equal lengths": (two(LENGTH, LENGTH), "cpg", "200 OK"),
    "list of equal lengths": (two(b"Content-Length: 2, 02,2"), "c", "200 OK"),
    "two lengths": (two(LENGTH, b"Content-Length: 9"), "", "a wrong Content-Length"),
    "list of lengths": (two(b"Content-Length: 2, 3"), "c", "a wrong Content-Length"),
    "empty length": (two(b"Content-Length:"), "p", "a wrong Content-Length"),
    "length +2": (two(b"Content-Length: +2"), "cp", "a wrong Content-Length"),
    "length -2": (two(b"Content-Length: -2"), "p", "a wrong Content-Length"),
    "length 0x2": (two(b"Content-Length: 0x2"), "cp", "a wrong Content-Length"),
    "length 2.0": (two(b"Content-Length: 2.0"), "cp", "a wrong Content-Length"),
    "leading zeros": (two(b"Content-Length: " + b"0" * 30 + b"2"), "cpgnf", "200 OK"),
    "blanks around a length": (two(b"Content-Length: \t 2 \t"), "cpg", "200 OK"),
    "body too short": (two(b"Content-Length: 9"), "", "amid its answer, a 200"),
    "data after it": (OK + b"and more", "cpgf", "200 OK"),
    "204 with a body": (b"HTTP/1.1 204 Fine\r\n" + OK[17:], "cpgf", "204 "),
    "205 with a body": (b"HTTP/1.1 205 Fine\r\n" + OK[17:], "cpgnf", "205 OK"),
    "100 before it": (CONTINUE * 20 + OK, "cpgn", "200 OK"),
    "102, 103 before it": (HINTS + OK, "cpgnf", "200 OK"),
    # chunks
    "extensions": (coded(b"chunked", b'2;a="x;y"\r\nOK\r\n0;end\r\n\r\n'), "cpgnf", "200 OK"),
    "long extension": (CHUNKED + b"2;%020000d\r\nOK\r\n0\r\n\r\n" % 0, "cpf", "200 OK"),
    "trailers": (CHUNKED + b"2\r\nOK\r\n0\r\nX: y\r\n\r\n", "cpgnf", "200 OK"),
    "odd trailer": (CHUNKED + b"2\r\nOK\r\n0\r\nno colon\r\n\r\n", "p", "200 OK"),
    "zeros before a size": (CHUNKED + b"0002\r\nOK\r\n00000\r\n\r\n", "cpgnf", "200 OK"),
    "20 of them": (CHUNKED + b"%020d\r\nOK\r\n0\r\n\r\n" % 2, "pnf", "200 OK"),
    "blanks after a size": (CHUNKED + b"2 \r\nOK\r\n0 \t\r\n\r\n", "cpg", "200 OK"),
    "chunks with bare LF": (CHUNKED + b"2\nOK\n0\n\n", "c", "200 OK"),
    "no last CRLF": (CHUNKED + b"2\r\nOK\r\n0\r\n", "p", "200 OK"),
    "half a last CRLF": (CHUNKED + b"2\r\nOK\r\n0\r\n\r", "cp", "200 OK"),
    "half the trailers": (CHUNKED + b"2\r\nOK\r\n0\r\nX: y\r\nY", "p", "200 OK"),
    "half a last chunk": (CHUNKED + b"2\r\nOK\r\n0", "p", "amid its answer, a 200"),
    "no last chunk": (CHUNKED + b"2\r\nOK\r\n", "", "amid its answer, a 200"),
    "size 0x2": (CHUNKED + b"0x2\r\nOK\r\n0\r\n\r\n", "p", "a wrong size of a chunk"),
    "size +2": (CHUNKED + b"+2\r\nOK\r\n0\r\n\r\n", "p", "a wrong size of a chunk"),
    "no size": (CHUNKED + b"\r\nOK\r\n0\r\n\r\n", "", "a wrong size of a chunk"),
    "wrong size": (CHUNKED + b"2\r\nOK!\r\n0\r\n\r\n", "", "a chunk longer than its size"),
    # Transfer-Encoding
    "capitals": (coded(b"Chunked"), "cpgnf", "200 OK"),
    "twice": (coded(b"chunked\r\nTransfer-Encoding: chunked"), "cpnf", "200 OK"),
    "twice in a list": (coded(b"chunked, chunked"), "cpnf", "200 OK"),
    "identity": (coded(b"identity", b"OK"), "cpnf", "200 OK"),
    "identity with a length": (two(LENGTH, b"Transfer-Encoding: identity"), "p", "200 OK"),
    "identity, chunked": (coded(b"identity, chunked"), "cpnf", "200 OK"),
    "chunked, identity": (coded(b"chunked, identity"), "cp", "200 OK"),
    "chunked, with a length": (coded(b"chunked\r\nContent-Length: 9"), "cpg", "200 OK"),
    "chunked in HTTP/1.0": (coded(b"chunked").replace(b"1.1", b"1.0"), "cpnf", "200 OK"),
    "unknown": (coded(b"xchunked", b"OK"), "pnf", "an unknown Transfer-Encoding"),
    "not the last": (coded(b"chunked, gzip"), "pnf", "an unknown Transfer-Encoding"),
}
CLOSED_AFTER = {"HTTP/1.0", "no length", "identity", "no last CRLF", "half a last CRLF"}
CLOSED_AFTER |= {"half the trailers"}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_odd_answer_is_taken_where_others_take_it_and_its_end_is_clear(send, hostile, name):
    answer, takers, expected = ODD_ANSWERS[name]
    is_answer = expected[:3].isdigit()

    outcome = send(hostile(answers(answer, not is_answer or name in CLOSED_AFTER)).url)

    assert is_answer or "c" not in takers or not set(takers) & set("gnf")
    if is_answer:
        assert f"{outcome.status_code} {outcome.response}" == expected, outcome.error
    else:
        assert (outcome.status_code, outcome.reason) == (None, "no_answer")
        assert outcome.error.endswith(expected)


@SCHEMES
@pytest.mark.parametrize("answer", [OK, coded(b"chunked"), CHUNKED + b"2\r\nOK\r\n0\r\n"])
def test_an_answer_that_was_whole_before_a_reset_is_one(send, hostile, scheme, answer):
    def behave(server, connection):
        read_request(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else it may not leave
        connection.sendall(answer)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert send(hostile(behave, scheme).url, verify_tls=False).response == "OK"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_chunks_are_put_together_wherever_they_were_cut(send, hostile, size):
    sent = CHUNKED + b"1\r\na\r\n" * 3 + b"4;x=1\r\n\r\n\r\n\r\n01\nb\nA\r\n0123456789\r\n"
    sent += b"1\r\nc\r\n" * 3 + b"0\r\n\r\n"

    def behave(server, connection):
        read_request(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(0, len(sent), size):
            connection.sendall(sent[place : place + size])

    assert send(hostile(behave).url).response == "aaa\r\n\r\nb0123456789ccc"


@pytest.mark.parametrize("code", [204, 304])
def test_an_answer_that_can_have_no_body_ends_with_its_head(send, hostile, code):
    head = b"HTTP/1.1 %d Fine\r\nTransfer-Encoding: chunked\r\n\r\n" % code

    outcome = send(hostile(answers(head)).url, success_codes=[204, 304], allowed=0.5)

    assert (outcome.status_code, outcome.response) == (code, "")


def test_a_body_of_exactly_the_limit_is_whole_and_one_byte_more_is_marked(make_dispatcher, hostile):
    dispatcher = make_dispatcher(dispatcher__max_response_bytes=10)
    whole = hostile(answers(typed(b"text/plain", b"x" * 10)))
    longer = hostile(answers(typed(b"text/plain", b"x" * 11)))
    chunked = hostile(answers(CHUNKED + b"a\r\n" + b"x" * 10 + b"\r\n0\r\n\r\n"))

    responses = [dispatcher.send(make_attempt(s.url)).response for s in (whole, longer, chunked)]

    assert responses == ["x" * 10, "x" * 10 + "\n[cut off after 10 bytes]", "x" * 10]


CUT = "\n[cut off after 10 bytes]"


@pytest.mark.parametrize(("chunks", "kept"), [
    (b"5\r\naaaaa\r\n" * 2, "a" * 10), (b"5\r\naaaaa\r\n" * 3, "a" * 10 + CUT),
    (b"4\r\naaaa\r\n" * 3, "a" * 10 + CUT), (b"1\r\na\r\n" * 11, "a" * 10 + CUT),
])  # fmt: skip
def test_chunks_are_kept_up_to_the_limit(make_dispatcher, hostile, chunks, kept):
    dispatcher = make_dispatcher(dispatcher__max_response_bytes=10)
    server = hostile(answers(CHUNKED + chunks + b"0\r\n\r\n"))

    assert dispatcher.send(make_attempt(server.url)).response == kept


def test_thousands_of_single_bytes_in_chunks_cost_little(send, hostile):
    plain, special = [hostile(answers(CHUNKED + chunk * 65536 + b"0\r\n\r\n"))
                      for chunk in (b"1\r\nx\r\n", b"1;\r\nx\r\n")]  # fmt: skip

    def cost(server):
        costs = []
        for _ in range(3):
            start = time.thread_time()
            assert send(server.url).response == "x" * 65536
            costs.append(time.thread_time() - start)
        return min(costs)

    assert cost(plain) < cost(special) / 2  # those are read line by line


@pytest.mark.parametrize("behave", [
    repeats(HEAD + b"\r\n", b"\0" * 65536),
    repeats(HEAD + b"Content-Length: 99999999999999\r\n\r\n", b"\0" * 65536),
    repeats(CHUNKED + b"ffffffffffffff\r\n", b"\0" * 65536),
    repeats(CHUNKED, b"1000\r\n" + b"\0" * 4096 + b"\r\n"),
], ids=["endless", "endless length", "endless chunk", "endless chunks"])  # fmt: skip
def test_of_an_endless_body_or_a_bomb_only_the_limit_is_read(send, hostile, behave):
    server = hostile(behave)

    tracemalloc.start()
    outcome = send(server.url)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert outcome.success and outcome.duration < SECOND
    assert outcome.response == "\0" * 65536 + "\n[cut off after 65536 bytes]"
    assert peak < 3_000_000


def test_no_charset_makes_an_attempt_outlast_its_limit(make_dispatcher, hostile):
    dispatcher = make_dispatcher(dispatcher__max_response_bytes=200_000)
    server = hostile(answers(typed(b"text/plain; charset=punycode", b"b" * 200_000)))

    assert timed_send(dispatcher, make_attempt(server.url, allowed=0.5))[1] < 1


@SCHEMES
@pytest.mark.parametrize("start", [
    b"HTTP/1.1 20", b"HTTP/1.1 200 OK", HEAD + b"Content-Le",
    HEAD + b"Content-Length: 2\r\n", HEAD + b"Content-Length: 2\r\n\r\n",
    HEAD + b"Content-Length: 2\r\n\r\nO", CHUNKED, CHUNKED + b"2\r\nO",
    CHUNKED + b"2\r\nOK\r\n", CHUNKED + b"2\r\nOK\r\n0", CHUNKED + b"no number\r\n",
    HEAD + b"Content-Length: \xb2\r\n\r\nOK",
    HEAD + b"Content-Length: " + b"9" * 9999 + b"\r\n\r\nOK",
    b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"X-Many: x\r\n" * 1000,
    HEAD + b"X-Long: " + b"x" * 100_000, HEAD + b"X-Long: " + b"x" * 300_000,
    b"HTTP/1.1 0 Odd\r\n\r\n", b"\0\xff\n\n",
])  # fmt: skip
def test_half_an_answer_is_no_answer(send, hostile, scheme, start):
    server = hostile(answers(start, close=True), scheme)

    outcome = send(server.url, verify_tls=False)

    assert (outcome.success, outcome.reason, outcome.status_code) == (False, "no_answer", None)
    assert outcome.response is None
    assert server.url in outcome.error and "unexpected" not in outcome.error


LEADS = ": redirects are not followed, and this one leads to "


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_is_not_followed(send, target, hostile, code):
    elsewhere = hostile(answers(OK))
    target.extra_headers = {"Location": elsewhere.url}

    failed = send(f"{target.url}/status/{code}", method="POST", body="x")
    success = send(f"{target.url}/status/{code}", method="POST", body="x", success_codes=[code])

    assert (failed.reason, failed.status_code, success.success) == ("http_status", code, True)
    assert re.fullmatch(rf"the server answered {code} [A-Za-z ]+", failed.error.partition(":")[0])
    assert failed.error.endswith(LEADS + elsewhere.url)
    assert target.received.qsize() == 2 and elsewhere.accepted == 0


@pytest.mark.parametrize(("code", "location", "error"), [
    (302, "/login?next=sesame-1", "302 Odd" + LEADS + "/login?next=********"),
    (302, "/" + "x" * 999, "302 Odd" + LEADS + "/" + "x" * 147),
    (302, "", "302 Odd"), (304, None, "304 Odd"), (404, "/elsewhere", "404 Odd"),
])  # fmt: skip
def test_where_a_redirect_leads_is_masked_and_bounded(send, hostile, code, location, error):
    line = "" if location is None else f"Location: {location}\r\n"
    answer = f"HTTP/1.1 {code} Odd\r\n{line}Content-Length: 0\r\n\r\n"

    outcome = send(
        hostile(answers(answer.encode())).url, auth={"type": "bearer", "token": "sesame-1"}
    )

    assert outcome.error == f"the server answered {error}"


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


@pytest.mark.parametrize("codes", [None, [101]])
def test_a_change_of_the_protocol_that_nobody_asked_for_ends_an_attempt_at_once(
    send, hostile, codes
):
    server = hostile(answers(SWITCH))

    for number in (1, 2):
        outcome = send(server.url, success_codes=codes)
        assert (outcome.success, outcome.status_code) == (codes == [101], 101)
        assert outcome.success or outcome.error == (
            "the server answered 101 Switching Protocols: it changes to another protocol than "
            "HTTP/1.1, which was not asked for"
        )
        assert server.accepted == number


def test_success_codes_decide_and_the_sentence_names_the_status(send, hostile):
    busy = hostile(answers(b"HTTP/1.1 503 Too Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"))

    outcome = send(busy.url)

    assert (outcome.success, outcome.reason, outcome.status_code) == (False, "http_status", 503)
    assert outcome.error == "the server answered 503 Too Busy"
    assert outcome.retry_after == 7 * SECOND
    assert send(busy.url, success_codes=[503]).success
    assert not send(hostile(answers(OK)).url, success_codes=[503]).success


def test_a_senseless_retry_after_does_not_turn_an_answer_into_none(send, target):
    target.extra_headers = {"Retry-After": "Mon, 01 Jan 2024 00:00:00 +99999999999999"}

    assert send(f"{target.url}/status/503").status_code == 503


BIG_HEADERS = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 65_000) for n in range(99))


@pytest.mark.parametrize(("start", "piece"), [
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    (HEAD, b"X-Same: x\r\n" * 1000),
    (HEAD + b"X: y\r\n", b" folded\r\n" * 1000),
    (CHUNKED + b"0\r\n", b"X-Trailer: x\r\n" * 1000),
    (CHUNKED, b"1;" + b"x" * 60000 + b"\r\nx\r\n"),
    (HEAD + BIG_HEADERS + b"Content-Length: 2\r\n\r\nOK", b"x"),
    (HEAD, b"x" * 65536),
], ids=["100", "same header", "folded", "trailers", "extensions", "6 MB", "line"])  # fmt: skip
def test_what_surrounds_a_body_has_a_bound(send, hostile, start, piece):
    outcome = send(hostile(repeats(start, piece)).url, allowed=3)

    assert outcome.reason == "no_answer" and outcome.duration < 2 * SECOND


def test_an_answer_to_half_a_request_counts(send, hostile):
    def refuses(_server, connection):
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")

    refused = send(hostile(refuses).url, method="POST", body=MEGABYTE * 8)

    assert (refused.status_code, refused.error) == (413, "the server answered 413 Too Large")


@SCHEMES
@pytest.mark.parametrize("behave", [hangs_up, resets])
def test_a_server_that_hangs_up_while_it_is_sent_to_is_told(send, hostile, scheme, behave):
    server = hostile(behave, scheme)

    outcome = send(server.url, method="POST", body=MEGABYTE * 8, verify_tls=False)

    assert outcome.duration < SECOND and outcome.reason == "no_answer"
    assert "closed the connection without an answer" in outcome.error


# --- limits of time -------------------------------------------------------------------

FLOODS = ("100 Continue for ever", "trailers for ever")
STALLS = {
    "no byte": stalls(b""),
    "half a head": stalls(HEAD + b"X-Half: "),
    "a head that drips": repeats(HEAD + b"X-Long: ", b"x", 0.1),
    "100 Continue for ever": repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "half a body": stalls(HEAD + b"Content-Length: 9\r\n\r\nOK"),
    "a body that drips": repeats(HEAD + b"Content-Length: 999\r\n\r\n", b"x", 0.1),
    "a body without length": stalls(HEAD + b"\r\nOK"),
    "a body without length that drips": repeats(HEAD + b"\r\n", b"x", 0.1),
    "half a chunk": stalls(CHUNKED + b"ff\r\nOK"),
    "trailers for ever": repeats(CHUNKED + b"0\r\n", b"X-Trailer: x\r\n" * 1000),
    "a 30 MB request is not read": reads_nothing,
}
CONNECTING = ("SYN unanswered", "TLS handshake stalled")


def proc_tcp():
    return Path("/proc/net/tcp").read_text()


@pytest.fixture
def stalled(hostile, deaf_url):
    """Return URL, options and a wait for a server that shows one of the ways to stall."""

    def make(name, scheme):
        if name == "SYN unanswered":
            port = int(deaf_url.rpartition(":")[2])
            row = re.compile(rf":{port:04X} 02 ")  # /proc/net/tcp: remote port, SYN_SENT
            return deaf_url, {}, lambda: wait_until(lambda: row.search(proc_tcp()))
        if name == "TLS handshake stalled":
            server = hostile(begun_handshake)
            server.url = server.url.replace("http:", "https:")
        else:
            server = hostile(STALLS[name], scheme)
        options = {"verify_tls": False}
        if name == "a 30 MB request is not read":
            options |= {"method": "POST", "body": "x" * 30_000_000}
        return server.url, options, lambda: server.reached.acquire(timeout=10)

    return make


@SCHEMES
@pytest.mark.parametrize(
    "limit, reason", [("timeout", "timeout"), ("attempt_timeout", "no_answer")]
)
def test_every_hostile_server_is_cut_off_at_the_limit(dispatcher, stalled, scheme, limit, reason):
    names = [*STALLS, *CONNECTING]
    servers = [stalled(name, scheme) for name in names]

    attempts = [make_attempt(url, 1, limit, **options) for url, options, _wait in servers]
    with ThreadPoolExecutor(len(names)) as pool:
        results = pool.map(lambda attempt: timed_send(dispatcher, attempt), attempts)
    for name, (outcome, seconds) in zip(names, results, strict=True):
        assert (outcome.success, outcome.status_code, outcome.response) == (False, None, None)
        if name in FLOODS:  # there is a bound before the limit
            assert seconds <= 1.5 and "too much around its body" in outcome.error, name
        else:
            assert 1 <= seconds <= 1.5 and outcome.reason == reason, name
            assert limit in outcome.error, name


def drips_a_handshake(server, connection):
    connection.recv(100)
    connection.sendall(b"\x16\x03\x03\x3f\x00")  # a record of the handshake, 16 KiB
    while not server.stopping.wait(0.1):
        connection.sendall(b"x")


@pytest.mark.parametrize("name", [*CONNECTING, "TLS handshake that drips", "look-up"])
def test_connecting_has_a_limit_of_its_own(make_dispatcher, hostile, name_server, stalled, name):
    dispatcher = make_dispatcher(dispatcher__connect_timeout="500ms")
    url = "http://hangs.test/"
    if name in CONNECTING:
        url, _options, _wait = stalled(name, "http")
    elif name != "look-up":
        url = hostile(drips_a_handshake).url.replace("http:", "https:")

    outcome, seconds = timed_send(dispatcher, make_attempt(url, verify_tls=name not in CONNECTING))

    assert 0.5 <= seconds <= 1
    assert (outcome.success, outcome.reason) == (False, "no_answer")
    assert outcome.error.startswith("no address " if name == "look-up" else "no connection to ")


def test_the_limit_for_connecting_does_not_bound_the_answer(make_dispatcher, hostile):
    dispatcher = make_dispatcher(dispatcher__connect_timeout="100ms")
    server = hostile(stalls(b""))

    outcome, seconds = timed_send(dispatcher, make_attempt(server.url, allowed=0.6))

    assert outcome.reason == "timeout" and 0.6 <= seconds <= 1.1


@SCHEMES
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/net/tcp")
def test_tcp_asks_after_60_s_whether_a_quiet_server_is_there(dispatcher, hostile, scheme):
    server = hostile(stalls(b""), scheme)
    attempt = make_attempt(server.url, verify_tls=False)
    # To the server's port, established, with the timer of keepalive, in ticks.
    row = re.compile(rf" [0-9A-F]+:{server.port:04X} 01 \S+ 02:([0-9A-F]+) ")

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(dispatcher.send, attempt)
        assert server.reached.acquire(timeout=10)
        try:
            timer = wait_until(lambda: row.search(proc_tcp()))
        finally:
            attempt.abort("cancelled")
        assert sent.result().reason == "cancelled"

    assert 40 < int(timer[1], 16) / os.sysconf("SC_CLK_TCK") <= 60


# --- aborts ---------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("name", [*STALLS, *CONNECTING])
def test_an_abort_ends_an_attempt_at_once_wherever_it_waits(dispatcher, stalled, name, scheme):
    url, options, wait = stalled(name, scheme)
    attempt = make_attempt(url, **options)

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(dispatcher.send, attempt)
        assert wait()
        aborted_at = time.monotonic()
        attempt.abort("replaced")
        attempt.abort("timeout")
        outcome = sent.result()

    assert time.monotonic() - aborted_at < 0.2
    assert (outcome.success, outcome.reason, outcome.status_code) == (False, "replaced", None)


def test_an_attempt_that_was_aborted_before_it_began_sends_nothing(dispatcher, hostile):
    server = hostile(answers(OK))
    attempt = make_attempt(server.url)

    attempt.abort("cancelled")

    assert dispatcher.send(attempt).reason == "cancelled"
    assert server.requests.empty()


def test_a_late_abort_does_not_cut_the_next_attempt_on_the_connection(dispatcher, hostile):
    server = hostile(answers(OK))
    first, second = make_attempt(server.url), make_attempt(server.url)

    dispatcher.send(first)
    first.abort("cancelled")

    assert dispatcher.send(second).success
    assert server.accepted == 1


# CPython leaves a TLS socket whose peer is gone before it is wrapped to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_aborts_leave_no_thread_and_no_descriptor_behind(dispatcher, hostile):
    def until_it_ends(server, connection):
        read_request(connection)
        server.reached.release()
        connection.recv(1)

    def used():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    servers = [hostile(until_it_ends, scheme) for scheme in ("http", "https")]
    warm_up = make_attempt(servers[1].url, allowed=0, verify_tls=False)
    dispatcher.send(warm_up)
    wait_until(lambda: not any(thread.is_alive() for s in servers for thread in s.threads[1:]))
    before, slowest = used(), 0.0

    for _round in range(5):
        attempts = [make_attempt(servers[i % 2].url, 60, verify_tls=False) for i in range(100)]
        with ThreadPoolExecutor(100) as pool:
            sent = [pool.submit(dispatcher.send, attempt) for attempt in attempts]
            for server in servers:
                assert all(server.reached.acquire(timeout=10) for _ in range(50))
            start = time.monotonic()
            for attempt in attempts:
                attempt.abort("cancelled")
            assert {future.result().reason for future in sent} == {"cancelled"}
            slowest = max(slowest, time.monotonic() - start)

    wait_until(lambda: used() == before)
    assert slowest < 1


# CPython leaves a TLS socket whose peer is gone before it is wrapped to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@SCHEMES
def test_an_abort_at_any_step_ends_the_attempt_and_leaves_nothing(tmp_path, hostile, scheme):
    class Clock(chronos.Clock):
        steps, attempt = 0, None

        def monotonic(self):
            if threading.current_thread() is threading.main_thread():
                self.steps -= 1
                if self.steps == 0:
                    self.attempt.abort(chronos.CutReason.CANCELLED)
            return super().monotonic()

    clock = Clock()
    dispatcher = chronos.Dispatcher(clock, make_settings(tmp_path).dispatcher)
    server = hostile(answers(OK), scheme)
    url = server.url.replace("127.0.0.1", "localhost")
    reasons = []
    before = len(os.listdir("/proc/self/fd"))

    for step in range(1, 12):
        clock.attempt, clock.steps = make_attempt(url, verify_tls=False), step
        outcome, seconds = timed_send(dispatcher, clock.attempt)
        assert seconds < 1
        reasons.append(outcome.reason)
        dispatcher.close_idle(0)

    ended = reasons.index(None)
    assert ended >= 4 and set(reasons[:ended]) == {"cancelled"} and set(reasons[ended:]) == {None}
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_aborts_at_random_moments_never_mix_answers_up(dispatcher, target):
    chance = random.Random(7)

    def send_and_abort(number):
        attempt = make_attempt(f"{target.url}/echo", method="POST", body=str(number))
        if number % 3 == 0:
            threading.Timer(chance.uniform(0, 0.005), attempt.abort, ["cancelled"]).start()
        return number, dispatcher.send(attempt)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(send_and_abort, range(600)))

    cut = [number for number, outcome in results if outcome.reason == "cancelled"]
    whole = [(number, outcome) for number, outcome in results if number not in cut]
    assert all((o.success, o.response) == (True, str(number)) for number, o in whole)
    assert len(cut) > 20 and all(number % 3 == 0 for number in cut)


def sees_its_end(start, piece=b""):
    """Return a behaviour: this beginning, ``piece`` again and again; it notes when it is cut."""

    def behave(server, connection):
        read_request(connection)
        connection.sendall(start)
        server.reached.release()
        try:
            while not (server.stopping.is_set() or select.select([connection], [], [], 0.05)[0]):
                connection.sendall(piece)
        finally:
            server.requests.put(time.monotonic())

    return behave


@SCHEMES
@pytest.mark.parametrize("how", ["replace", "cancel", "delete", "shutdown"])
def test_the_server_sees_at_once_that_its_connection_is_cut(service, hostile, how, scheme):
    starts = [(b"",), (HEAD + b"X-Half: ", b"x"), (HEAD + b"Content-Length: 9\r\n\r\n", b"")]
    starts += [
        (HEAD + b"\r\n", b"x"),
        (CHUNKED + b"fff\r\n", b"x"),
        (b"", OK[:9] + b"100 C\r\n\r\n"),
    ]
    servers = [hostile(sees_its_end(*s), scheme) for s in starts]
    fields = {"concurrency": "replace", "webhook": {"verify_tls": False}}
    jobs = [service.create(server.url, **fields) for server in servers]
    ids = [service.start(job)["id"] for job in jobs]
    assert all(server.reached.acquire(timeout=10) for server in servers)
    delays = []

    for job, execution_id, server in zip(jobs, ids, servers, strict=True):
        if how == "replace":
            service.start(job)
        elif how == "cancel":
            service.post(path_of(job, f"/executions/{execution_id}/cancel"))
        elif how == "delete":
            service.expect(200, "DELETE", path_of(job))
        told = time.monotonic()
        if how == "shutdown":
            service.service.engine.stop(0)
        delays.append(server.requests.get(timeout=5) - told)

    # All but one within 0.2 s; that one because other processes may hold the CPU for a while.
    assert sorted(delays)[-2] < 0.2
    assert max(delays) < 0.6


# --- names ----------------------------------------------------------------------------


def test_a_look_up_that_hangs_is_cut_off_and_only_16_may_hang(dispatcher, name_server):
    attempts = [make_attempt(f"http://host{i}.test/", allowed=0.6) for i in range(20)]

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(lambda attempt: timed_send(dispatcher, attempt), attempts))

    cut = [seconds for outcome, seconds in results if outcome.reason == "timeout"]
    busy = [outcome for outcome, _s in results if outcome.error.startswith("DNS busy")]
    assert (len(cut), len(busy)) == (16, 4)
    assert all(0.6 <= seconds <= 1.1 for seconds in cut)
    assert {outcome.reason for outcome in busy} == {"no_answer"}


def test_look_ups_go_on_once_the_hanging_ones_have_ended(dispatcher, name_server, hostile):
    for i in range(16):
        dispatcher.send(make_attempt(f"http://host{i}.test/", allowed=0))
    url = hostile(answers(OK)).url.replace("127.0.0.1", "localhost")

    busy = dispatcher.send(make_attempt(url))
    name_server.set()

    assert busy.error.startswith("DNS busy")
    wait_until(lambda: dispatcher.send(make_attempt(url)).success)


def test_an_abort_ends_a_look_up_that_hangs(dispatcher, name_server):
    attempt = make_attempt("http://host.test/")

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(timed_send, dispatcher, attempt)
        wait_until(lambda: [t for t in threading.enumerate() if t.name.startswith("dns-")])
        attempt.abort("cancelled")

    assert sent.result()[0].reason == "cancelled" and sent.result()[1] < 0.5


def test_look_ups_wait_for_one_another_and_free_their_place(send, target, monkeypatch):
    url, real = target.url.replace("127.0.0.1", "slow.test"), socket.getaddrinfo

    def look_up(host, port, *arguments, flags=0, **options):
        if host == "slow.test" and not flags & socket.AI_NUMERICHOST:
            time.sleep(0.02)
            host = "127.0.0.1"
        return real(host, port, *arguments, flags=flags, **options)

    def no_thread(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        errors = {send(url).error for _ in range(chronos.MAX_LOOKUPS + 1)}
    with ThreadPoolExecutor(60, initializer=threading.Barrier(60).wait) as pool:
        outcomes = list(pool.map(send, [url] * 60))

    assert errors == {"unexpected error: RuntimeError"}
    assert {outcome.error for outcome in outcomes} == {None}


# --- several addresses ----------------------------------------------------------------


def at_several(server):
    """Return the URL of a server by the name several.test."""
    return re.sub(r"//.*:", "//several.test:", server.url)


def syns_under_way(port):
    return len(re.findall(rf":{port:04X} 02 ", proc_tcp()))  # remote port, SYN_SENT


@SCHEMES
def test_an_address_that_is_silent_costs_a_quarter_of_a_second(
    dispatcher, hostile, resolve, scheme
):
    server = hostile(answers(OK, close=True), scheme)
    resolve("127.0.0.2", "127.0.0.3", "127.0.0.1")
    before = len(os.listdir("/proc/self/fd"))

    with deaf("127.0.0.2", server.port), deaf("127.0.0.3", server.port):
        outcome = dispatcher.send(make_attempt(at_several(server), 4, verify_tls=False))
        assert not syns_under_way(server.port)

    assert outcome.success and 0.5 * SECOND <= outcome.duration < 2 * SECOND
    dispatcher.close_idle(0)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.parametrize("addresses", [
    ["127.0.0.2", "127.0.0.1"],  # nobody listens there, which is seen at once
    ["127.0.0.1", "127.0.0.1"],
    ["127.0.0.9"] * 20 + ["::1", "127.0.0.1"],
    [f"127.0.0.{number}" for number in range(2, 30)] + ["127.0.0.1"],
])  # fmt: skip
def test_an_address_that_refuses_costs_no_time(send, hostile, resolve, addresses):
    server = hostile(answers(OK))
    resolve(*addresses)

    assert send(at_several(server), allowed=3).success
    assert server.accepted == 1


def test_where_tls_fails_the_next_address_is_tried(dispatcher, hostile, resolve):
    server = hostile(answers(OK), "https")
    resolve("127.0.0.2", "127.0.0.1")
    other = Hostile(hangs_up, host="127.0.0.2", port=server.port)

    outcome = dispatcher.send(make_attempt(at_several(server), verify_tls=False))
    other.stop()

    assert outcome.success and (other.accepted, server.accepted) == (1, 1)


def test_little_time_is_enough_for_the_second_address(tmp_path, hostile, resolve):
    class SlowClock(chronos.Clock):
        """A tenth as fast, so that a busy machine is fast enough."""

        def monotonic(self):
            return super().monotonic() // 10

    dispatcher = chronos.Dispatcher(SlowClock(), make_settings(tmp_path).dispatcher)
    server = hostile(answers(OK, close=True))
    resolve("127.0.0.2", "127.0.0.1")

    with deaf("127.0.0.2", server.port):
        outcome = dispatcher.send(make_attempt(at_several(server), allowed=0.2))
    dispatcher.close_idle(0)

    assert outcome.success and outcome.duration < 0.2 * SECOND


@pytest.mark.parametrize("ended_by", ["abort", "timeout", "attempt_timeout", "connect_timeout"])
def test_several_silent_addresses_end_as_one_does(make_dispatcher, resolve, ended_by):
    options = {"dispatcher__connect_timeout": "1s"} if ended_by == "connect_timeout" else {}
    dispatcher = make_dispatcher(**options)
    resolve("127.0.0.2", "127.0.0.3")
    limit = {"timeout": 1, "attempt_timeout": 1}.get(ended_by, 10)
    before = len(os.listdir("/proc/self/fd"))

    with deaf("127.0.0.2") as port, deaf("127.0.0.3", port), ThreadPoolExecutor(1) as pool:
        reason = ended_by if limit == 1 else "timeout"
        attempt = make_attempt(f"http://several.test:{port}/", limit, reason)
        sent = pool.submit(timed_send, dispatcher, attempt)
        wait_until(lambda: syns_under_way(port) == 2)
        if ended_by == "abort":
            begun = time.monotonic()
            attempt.abort("cancelled")
        outcome, seconds = sent.result()
        assert not syns_under_way(port)

    if ended_by == "abort":
        assert outcome.reason == "cancelled" and time.monotonic() - begun < 0.5
    elif ended_by == "connect_timeout":
        silent = "at 127.0.0.2: it took too long; at 127.0.0.3: it took too long"
        assert outcome.error == f"no connection to http://several.test:{port} {silent}"
    else:
        assert ended_by in outcome.error and 1 <= seconds <= 1.5
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.parametrize(("found", "dialled"), [
    ("::1", "::1"),
    ("::1 ::2 ::3 127.0.0.1 127.0.0.2", "::1 127.0.0.1 ::2 127.0.0.2 ::3"),
    ("127.0.0.1 ::1 127.0.0.2 127.0.0.1", "127.0.0.1 ::1 127.0.0.2"),
    ("127.0.0.3 127.0.0.2 127.0.0.1", "127.0.0.3 127.0.0.2 127.0.0.1"),
])  # fmt: skip
def test_the_two_families_are_dialled_by_turns(found, dialled):
    addresses = [chronos.look_up(numeric, 80)[0] for numeric in found.split()]

    in_order = [address.sockaddr[0] for address in chronos.by_turns(addresses)]

    assert in_order == dialled.split()


# --- addresses that are blocked -------------------------------------------------------

CLOSED_BY_DEFAULT = """
169.254.169.254 169.254.0.1 168.63.129.16 0.0.0.0 0.1.2.3 224.0.0.1 239.255.255.250
255.255.255.255 :: fe80::1 fe80::1%lo ff02::1 fd00:ec2::254 ::ffff:169.254.169.254
::ffff:0.0.0.0 ::ffff:a83f:8110 2002:a9fe:a9fe:: 2002:a9fe:a9fe::1 64:ff9b::a9fe:a9fe
64:ff9b::168.63.129.16"""
OPEN_BY_DEFAULT = """
127.0.0.1 ::1 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 fd00::1 8.8.8.8 2001:db8::1
::ffff:127.0.0.1 2002:7f00:1:: 64:ff9b::808:808"""
SPELLINGS = """
127.0.0.2 127.2 2130706434 0x7f.2 0x7f000002 0177.0.0.2 017700000002
[::ffff:127.0.0.2] [::ffff:7f00:2] [0:0:0:0:0:ffff:7f00:0002]"""
DEFAULT_BLOCKED = chronos.SETTINGS["dispatcher.blocked_networks"].default


@pytest.mark.parametrize("address", CLOSED_BY_DEFAULT.split())
def test_link_local_metadata_and_addresses_of_no_single_host_are_blocked(address):
    with pytest.raises(chronos.BlockedTarget, match=r"dispatcher\.blocked_networks"):
        chronos.check_address(address, DEFAULT_BLOCKED, [])


@pytest.mark.parametrize("address", OPEN_BY_DEFAULT.split())
def test_loopback_private_and_public_addresses_are_open(address):
    chronos.check_address(address, DEFAULT_BLOCKED, [])


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "2002:a01:203::", "fd00::5"])
def test_allowed_networks_close_everything_else(address):
    networks = DEFAULT_BLOCKED, ["10.0.0.0/8", "fd00::/8", "169.254.0.0/16"]

    chronos.check_address(address, *networks)
    for closed in ("127.0.0.1", "::1", "11.0.0.1", "::ffff:11.0.0.1", "64:ff9b::b00:1"):
        with pytest.raises(chronos.BlockedTarget, match=r"dispatcher\.allowed_networks"):
            chronos.check_address(closed, *networks)
    with pytest.raises(chronos.BlockedTarget, match=r"dispatcher\.blocked_networks"):
        chronos.check_address("169.254.1.1", *networks)


@pytest.mark.parametrize("host", SPELLINGS.split())
def test_a_blocked_address_is_refused_in_every_spelling(make_dispatcher, hostile, host):
    closed = make_dispatcher(dispatcher__blocked_networks=["127.0.0.2/32"])
    allowed = make_dispatcher(dispatcher__allowed_networks=["127.0.0.1/32"])
    server = hostile(answers(OK), host="127.0.0.2")
    url = server.url.replace("127.0.0.2", host)

    for dispatcher in (closed, allowed):
        outcome = dispatcher.send(make_attempt(url))
        assert (outcome.reason, outcome.status_code) == ("blocked", None)
        assert "is blocked: " in outcome.error
    assert server.accepted == 0
    assert make_dispatcher().send(make_attempt(url)).success


SPELLED = """127.0.0.1 2130706433 0x7f.1 127.1 0177.0.0.1 [::ffff:127.0.0.1] [::ffff:7f00:1]
    [2002:7f00:1::] [2002:7f00:1::9] [64:ff9b::7f00:1] localhost"""


@pytest.mark.parametrize(("networks", "sentence"), [
    ({"blocked": ["127.0.0.0/8", "::1/128"]}, "dispatcher.blocked_networks has "),
    ({"allowed": ["10.0.0.0/8"]}, "it is not in dispatcher.allowed_networks"),
])  # fmt: skip
def test_a_blocked_job_says_so_at_once_and_is_not_tried_again(
    make_service, hostile, networks, sentence
):
    service = make_service(**{f"dispatcher__{k}_networks": v for k, v in networks.items()})
    server = hostile(answers(OK))

    for host in SPELLED.split():
        job = service.create(f"http://{host}:{server.port}/hook")
        service.error(500, "POST", trigger_path(job))
        (execution,) = service.get(path_of(job, "/executions"))["executions"]
        assert (execution["reason"], execution["attempts"]) == ("blocked", 1), host
        assert re.fullmatch(rf"[0-9a-f.:]+ is blocked: {re.escape(sentence)}.*", execution["error"])
    assert server.accepted == 0


@pytest.mark.parametrize("host", ["0", "0.0.0.0", "[::ffff:0.0.0.0]", "[::]"])
def test_the_unspecified_address_does_not_lead_to_a_blocked_loopback(
    make_dispatcher, hostile, host
):
    dispatcher = make_dispatcher(dispatcher__blocked_networks=["127.0.0.0/8", "::1/128"])
    server = hostile(answers(OK), host="::1" if host == "[::]" else "127.0.0.1")

    outcome = dispatcher.send(make_attempt(f"http://{host}:{server.port}/"))

    assert (outcome.reason, server.accepted) == ("blocked", 0)


@pytest.mark.parametrize(("later", "reason", "error"), [
    (["127.0.0.2"], "blocked", "127.0.0.2 is blocked: dispatcher.blocked_networks has "),
    (["127.0.0.2", "127.0.0.4"], "blocked", "127.0.0.2 is blocked: dispatcher.blocked_networks"),
    (["127.0.0.2", "127.0.0.3"], "no_answer", "no connection to {url} at 127.0.0.3: Connection re"),
    (["127.0.0.3", "127.0.0.2"], "no_answer", "no connection to {url} at 127.0.0.3: Connection re"),
    (["127.0.0.2", "127.0.0.1"], None, ""),
])  # fmt: skip
def test_a_name_is_judged_by_each_address_that_it_has_this_time(
    make_dispatcher, hostile, resolve, later, reason, error
):
    blocked = ["127.0.0.2/32", "127.0.0.4/32"]
    dispatcher = make_dispatcher(dispatcher__blocked_networks=blocked)
    opened = hostile(answers(OK, close=True))
    closed = Hostile(answers(OK), host="127.0.0.2", port=opened.port)

    resolve("127.0.0.1")
    assert dispatcher.send(make_attempt(at_several(opened))).success
    resolve(*later)
    outcome = dispatcher.send(make_attempt(at_several(opened)))
    closed.stop()

    assert (outcome.reason, closed.accepted) == (reason, 0)
    assert (outcome.error or "").startswith(error.format(url=at_several(opened)))


# --- TLS ------------------------------------------------------------------------------


def shows_who_came(_server, connection):
    """Answer with the name in the client's certificate."""
    while read_request(connection):
        (((_kind, name),),) = connection.getpeercert()["subject"]
        connection.sendall(typed(b"text/plain", name.encode()))


def test_an_unknown_authority_is_refused_unless_it_is_in_ca_bundle_or_nobody_asks(
    make_dispatcher, hostile, certificate
):
    server = hostile(answers(OK), "https")
    strict = make_dispatcher()
    trusting = make_dispatcher(dispatcher__ca_bundle=str(certificate[0]))

    assert strict.send(make_attempt(server.url, verify_tls=False)).success
    refused = strict.send(make_attempt(server.url))

    assert (refused.reason, refused.status_code) == ("no_answer", None)
    untrusted = f"no connection to {server.url} at 127.0.0.1: TLS failed: "
    assert re.match(f"{untrusted}self.signed", refused.error)
    assert trusting.send(make_attempt(server.url)).success
    assert trusting.send(make_attempt(server.url.replace("127.0.0.1", "localhost"))).success
    assert server.requests.qsize() == 3


@pytest.mark.parametrize("form", ["file", "directory"])
def test_authorities_are_taken_from_a_file_or_a_directory_from_the_start_on(
    make_dispatcher, hostile, certificate, tmp_path, form
):
    path = shutil.copy(certificate[0], tmp_path / "own.pem")
    if form == "directory":
        subprocess.run(["openssl", "rehash", tmp_path], check=True, capture_output=True)
        path = tmp_path
    server = hostile(answers(OK), "https")

    dispatcher = make_dispatcher(dispatcher__ca_bundle=str(path))
    if form == "file":
        path.unlink()  # what is read at the start is not read again

    assert dispatcher.send(make_attempt(server.url)).success


def who_asks(certificate, directory):
    """Return a file with certificate and key, and the context of a server that asks for it."""
    own = directory / "own.pem"
    own.write_text("".join(path.read_text() for path in certificate))
    asking = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate[0])
    asking.load_cert_chain(*certificate)
    asking.verify_mode = ssl.CERT_REQUIRED
    return own, asking


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("verify_tls", [True, False])
def test_a_host_that_asks_for_a_certificate_gets_the_one_that_is_meant_for_it(
    make_dispatcher, hostile, certificate, tmp_path, version, verify_tls
):
    own, asking = who_asks(certificate, tmp_path)
    asking.maximum_version = version
    server = hostile(shows_who_came, "https", context=asking)
    settings = {
        "dispatcher__ca_bundle": str(certificate[0]),
        "dispatcher__client_certificates": {"localhost": str(own)},
    }

    dispatcher = make_dispatcher(**settings)
    own.unlink()  # what is read at the start is not read again
    named = make_attempt(server.url.replace("127.0.0.1", "localhost"), verify_tls=verify_tls)
    served = [dispatcher.send(named) for _ in range(2)]
    unnamed = dispatcher.send(make_attempt(server.url, verify_tls=verify_tls))

    assert [outcome.response for outcome in served] == ["localhost", "localhost"]
    assert (unnamed.success, unnamed.reason) == (False, "no_answer")


def test_a_certificate_for_another_name_is_refused(make_dispatcher, hostile, certificate):
    dispatcher = make_dispatcher(dispatcher__ca_bundle=str(certificate[0]))
    server = hostile(answers(OK), "https", host="127.0.0.3")

    refused = dispatcher.send(make_attempt(server.url))

    assert refused.error.startswith(f"no connection to {server.url} at 127.0.0.3: TLS failed: ")
    assert "127.0.0.3" in refused.error.partition("failed: ")[2]
    assert dispatcher.send(make_attempt(server.url, verify_tls=False)).success


@pytest.mark.parametrize("name", ["::1", "0:0::1"])
@pytest.mark.parametrize("host", ["[::1]", "[0:0:0::1]"])
def test_an_address_is_given_its_certificate_however_it_is_spelled(
    make_dispatcher, hostile, certificate, tmp_path, name, host
):
    own, asking = who_asks(certificate, tmp_path)
    server = hostile(shows_who_came, "https", host="::1", context=asking)
    dispatcher = make_dispatcher(dispatcher__client_certificates={name: str(own)})

    outcome = dispatcher.send(make_attempt(f"https://{host}:{server.port}/", verify_tls=False))

    assert outcome.response == "localhost"


@pytest.mark.parametrize(("authority", "header", "asked"), [
    ("LocalHost.:{}", "LocalHost.:{}", "localhost"), ("[::1%251]:{}", "[::1]:{}", None),
])  # fmt: skip
def test_the_dot_of_an_absolute_name_and_a_zone_are_not_in_the_certificate(
    make_dispatcher, hostile, certificate, monkeypatch, authority, header, asked
):
    look_up, names = socket.getaddrinfo, []
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **b: look_up(host.rstrip("."), *a, **b)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    server = hostile(answers(OK), "https", "::1" if asked is None else "127.0.0.1", context)
    dispatcher = make_dispatcher(dispatcher__ca_bundle=str(certificate[0]))

    outcome = dispatcher.send(make_attempt(f"https://{authority.format(server.port)}/"))

    assert (outcome.success, outcome.error, names) == (True, None, [asked])
    assert ("Host", header.format(server.port)) in headers_of(server.requests.get(timeout=5))


def test_a_certificate_that_has_expired_is_refused(make_dispatcher, hostile, certificate, tmp_path):
    path, key = tmp_path / "expired.pem", certificate[1]
    command = ["openssl", "x509", "-in", certificate[0], "-signkey", key, "-days", "-1"]
    subprocess.run([*command, "-out", path], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    server = hostile(answers(OK), "https", context=context)

    dispatcher = make_dispatcher(dispatcher__ca_bundle=str(path))
    outcome = dispatcher.send(make_attempt(server.url))

    assert outcome.error.endswith(": TLS failed: certificate has expired")
    assert server.requests.empty()


@pytest.mark.parametrize("body", ["x", MEGABYTE * 8])
@pytest.mark.parametrize(("version", "before", "alert"), [
    ("TLSv1_2", "no connection to {url} at 127.0.0.1: ", " alert handshake failure"),
    ("TLSv1_3", "{url} closed the connection without an answer: ", " alert certificate required"),
])  # fmt: skip
def test_a_server_that_wants_to_see_a_certificate_is_understood(
    send, hostile, certificate, version, before, alert, body
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.load_verify_locations(certificate[0])
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    server = hostile(answers(OK), "https", context=context)

    outcome = send(server.url, method="POST", body=body, verify_tls=False)

    assert outcome.reason == "no_answer" and outcome.error.endswith(alert)
    assert outcome.error.startswith(before.format(url=server.url) + "TLS failed: ")


# --- a sentence for each failure ------------------------------------------------------


def answers_at_once(_server, connection):
    connection.recv(10_000)
    connection.sendall(OK)


WORKED = "without an answer; it may have worked on the request"
CLOSED, NOT_HTTP = "{url} closed the connection ", "{url} sent what is not a proper HTTP answer: "
NO_CONNECTION = "no connection to {url} at 127.0.0.1: "
SENTENCES = [  # server, scheme, reason, what is said
    (answers(b"", close=True), "http", "no_answer", CLOSED + WORKED),
    (resets, "http", "no_answer", CLOSED + WORKED),
    (answers(HEAD, close=True), "http", "no_answer", CLOSED + "amid its answer"),
    (answers(HEAD + b"X: ", close=True), "http", "no_answer", CLOSED + "amid its answer"),
    (answers(b"HTTP/1.1 413 No\r\nContent-Length: 9\r\n\r\nx", close=True), "http", "no_answer",
     CLOSED + "amid its answer, a 413"),
    (answers(b"SSH-2.0-OpenSSH\r\n"), "http", "no_answer", NOT_HTTP + "a wrong status line"),
    (answers(HEAD + b"no colon\r\n"), "http", "no_answer", NOT_HTTP + "a wrong header"),
    (answers(HEAD + b"X: " + b"x" * 2**18), "http", "no_answer", NOT_HTTP + "a line too long"),
    (answers(HEAD + b"Content-Length: -1\r\n\r\n"), "http", "no_answer",
     NOT_HTTP + "a wrong Content-Length"),
    (answers(CHUNKED + b"-1\r\n" + b"x" * 200_000), "http", "no_answer",
     NOT_HTTP + "a wrong size of a chunk"),
    (stalls(b""), "http", "timeout", "there was no whole answer within the timeout"),
    (answers(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "http", "http_status",
     "the server answered 404 Not Found"),
    (answers(b"HTTP/1.1 201\r\nContent-Length: 0\r\n\r\n"), "http", "http_status",
     "the server answered 201, which is not among success_codes"),
    (begun_handshake, "https", "no_answer",
     NO_CONNECTION + "it took too long"),
    (answers(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"), "http", "no_answer",
     NOT_HTTP + "a wrong Content-Length"),
    (answers(CHUNKED + b"zz\r\n"), "http", "no_answer", NOT_HTTP + "a wrong size of a chunk"),
    (hangs_up, "https", "no_answer",
     NO_CONNECTION + "TLS failed: unexpected eof while reading"),
    (answers_at_once, "https", "no_answer", NO_CONNECTION + "TLS failed: wrong version number"),
]  # fmt: skip
REPR = re.compile(r"<|Errno|[a-z]Error|Exception|Pool|0x[0-9a-f]{6}|_ssl|codec|int\(|_[A-Z]+_")


@pytest.mark.parametrize(("behave", "scheme", "reason", "sentence"), SENTENCES)
def test_each_failure_has_its_sentence(make_dispatcher, hostile, behave, scheme, reason, sentence):
    dispatcher, server = make_dispatcher(dispatcher__connect_timeout="300ms"), hostile(behave)
    url = server.url.replace("http:", f"{scheme}:")

    outcome = dispatcher.send(make_attempt(url, allowed=0.6, success_codes=[200]))

    assert (outcome.success, outcome.reason) == (False, reason)
    assert outcome.error == sentence.format(url=url) and not REPR.search(outcome.error)
    assert (outcome.status_code is None) == (reason != "http_status")
    assert server.accepted == 1


@pytest.mark.parametrize(("url", "options", "sentence"), [
    ("http://[::1]:1/", {}, "no connection to http://[::1]:1 at ::1: Connection refused"),
    ("http://127.0.0.1:1/hook?token=canary", {},
     "no connection to http://127.0.0.1:1 at 127.0.0.1: Connection refused"),
    ("http://nowhere.example/hook?token=canary", {},
     "the name nowhere.example cannot be resolved: Name or service not known"),
    ("http://hangs.test/", {"connect_timeout": "200ms"},
     "no address of hangs.test within connect_timeout"),
])  # fmt: skip
def test_no_connection_has_its_sentence(make_dispatcher, name_server, url, options, sentence):
    dispatcher = make_dispatcher(**{f"dispatcher__{k}": v for k, v in options.items()})

    outcome = dispatcher.send(make_attempt(url))

    assert (outcome.reason, outcome.error) == ("no_answer", sentence)


@pytest.mark.parametrize("name", ["a..b", "a" * 64, f"{'a' * 64}.test", "x\u00e9..y"])
def test_a_name_that_cannot_exist_is_no_host(name):
    _code, details = wrong(job_body(f"http://{name}/"))

    assert "host" in details["webhook.url"]
    assert not REPR.search(details["webhook.url"])


@pytest.mark.parametrize("webhook", [
    {"url": "http://[::1%25nope]/"}, {"url": "http://[fe80::1%lo]/"},
    {"url": "https://127.0.0.1:1/\x00"}, {"headers": {"X-Snow": "☃"}},
    {"headers": {"X-\ud800": "x"}},
])  # fmt: skip
def test_what_slips_through_validation_ends_as_an_outcome(send, target, webhook):
    outcome = send(**{"url": target.url} | webhook)

    assert (outcome.success, outcome.status_code) == (False, None)
    assert outcome.reason in ("no_answer", "blocked") and outcome.error


# --- through a proxy ------------------------------------------------------------------


@pytest.fixture
def tinyproxy(tmp_path):
    """Starts a real forward proxy, which wants a password; returns its host:port."""
    program = shutil.which("tinyproxy")
    if not program:
        pytest.skip("no tinyproxy: apt install tinyproxy-bin")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings = tmp_path / "tinyproxy.conf"
    settings.write_text(f"Port {port}\nListen 127.0.0.1\nTimeout 20\nBasicAuth ada {CANARY}\n")
    process = subprocess.Popen([program, "-d", "-c", settings], stdout=subprocess.DEVNULL)

    def is_up():
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port)).close() is None

    wait_until(is_up, 20)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture
def behind(make_dispatcher, certificate):
    """Makes a dispatcher that reaches everything through a proxy, unless no_proxy names it."""

    def make(address, no_proxy=(), **settings):
        return make_dispatcher(
            dispatcher__proxy=address if "//" in address else f"http://{address}",
            dispatcher__no_proxy=list(no_proxy),
            dispatcher__ca_bundle=str(certificate[0]),
            **settings,
        )

    return make


@SCHEMES
def test_a_request_reaches_its_target_through_a_real_proxy(behind, hostile, tinyproxy, scheme):
    dispatcher = behind(f"http://ada:{CANARY}@{tinyproxy}")
    server = hostile(answers(OK), scheme)
    url = server.url.replace("127.0.0.1", "localhost")

    first = dispatcher.send(make_attempt(f"{url}/hook?a=1", method="POST", body="x" * 100_000))
    second = dispatcher.send(make_attempt(url))

    assert (first.error, second.error, first.response) == (None, None, "OK")
    request = server.requests.get_nowait()
    assert request.startswith(b"POST /hook?a=1 HTTP/1.")
    assert f"Host: localhost:{server.port}\r\n".encode() in request
    assert b"roxy-Auth" not in request  # the proxy keeps it
    assert (b"Via: " in request) == (scheme == "http")  # the bytes of TLS it only carries


@SCHEMES
def test_what_a_real_proxy_refuses_is_told_from_what_a_target_does(
    behind, hostile, tinyproxy, scheme
):
    server = hostile(answers(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), scheme)
    url = server.url.replace("127.0.0.1", "localhost")
    proxy = f"the proxy http://{tinyproxy}"
    signed_in = behind(f"http://ada:{CANARY}@{tinyproxy}")

    busy = signed_in.send(make_attempt(url))
    dead = signed_in.send(make_attempt(f"{scheme}://127.0.0.1:1/"))
    stranger = behind(tinyproxy).send(make_attempt(url))

    refusal = f"{proxy} answered 407 Proxy Authentication Required"
    assert (busy.reason, stranger.reason) == ("http_status", "no_answer")
    assert stranger.error.endswith(f"{refusal}: dispatcher.proxy has no user and password")
    if scheme == "http":
        assert busy.error == f"the server, or {proxy}, answered 503 Busy"
        assert dead.error == f"the server, or {proxy}, answered 500 Unable to connect"
    else:
        assert busy.error == "the server answered 503 Busy"
        target = "no connection to https://127.0.0.1:1"
        assert dead.error == f"{target}: {proxy} answered 500 Unable to connect"


PROXY_SAYS = "no connection to {url}: the proxy {proxy} answered "
TUNNEL = b"HTTP/1.0 200 Connection established\r\n\r\n"
PROXY_FAILURES = [  # scheme of the target, what the proxy does, what is said
    ("https", answers(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), PROXY_SAYS + "502 Bad Gateway"),
    ("https", answers(b"HTTP/1.1 403\r\n\r\n"), PROXY_SAYS + "403"),
    ("https", answers(b"HTTP/1.1 407 Who?\r\nA: b\r\n\r\nbody"),
     PROXY_SAYS + "407 Who?: dispatcher.proxy has the wrong user or password"),
    ("http", answers(b"HTTP/1.1 407 Who?\r\nContent-Length: 0\r\n\r\n"),
     "the proxy {proxy} answered 407 Who?: dispatcher.proxy has the wrong user or password"),
    ("https", hangs_up, "the proxy {proxy} closed the connection when it was to connect to {url}"),
    ("https", resets, "the proxy {proxy} closed the connection when it was to connect to {url}"),
    ("http", resets, "the proxy {proxy} closed the connection without an answer; "
     "it may have worked on the request"),
    ("https", stalls(b""), "the proxy {proxy} has not connected to {url} within connect_timeout"),
    ("https", repeats(HEAD, b"x", 0.05),
     "the proxy {proxy} has not connected to {url} within connect_timeout"),
    ("https", repeats(HEAD, b"x" * 65536),
     "the proxy {proxy} closed the connection when it was to connect to {url}"),
    ("https", answers(b"SSH-2.0-OpenSSH\r\n\r\n"),
     "the proxy {proxy} sent what is not a proper answer to CONNECT"),
    ("https", answers(TUNNEL + b"more"),
     "the proxy {proxy} sent what is not a proper answer to CONNECT"),
    ("https", answers(TUNNEL, close=True),
     "no connection to {url} through the proxy {proxy}: TLS failed: unexpected eof while reading"),
    ("https", stalls(TUNNEL), "no connection to {url} through the proxy {proxy}: it took too long"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "behave", "sentence"), PROXY_FAILURES)
def test_each_failure_of_a_proxy_has_its_sentence(behind, hostile, scheme, behave, sentence):
    proxy = hostile(behave)
    dispatcher = behind(
        f"http://ada:{CANARY}@127.0.0.1:{proxy.port}", dispatcher__connect_timeout="500ms"
    )
    url = f"{scheme}://target.test:9"

    outcome, seconds = timed_send(dispatcher, make_attempt(f"{url}/hook?token=x"))

    assert (outcome.reason, outcome.status_code) == ("no_answer", None)
    # A connection that is closed with bytes unread is reset, so that its end has two forms.
    said = outcome.error.replace(
        "Connection reset by peer", "TLS failed: unexpected eof while reading"
    )
    assert said == sentence.format(url=url, proxy=proxy.url)
    assert seconds < 2 and not REPR.search(outcome.error)


@pytest.mark.parametrize(("proxy", "settings", "reason", "sentence"), [
    ("127.0.0.1:1", {}, "no_answer",
     "no connection to the proxy http://127.0.0.1:1 at 127.0.0.1: Connection refused"),
    ("nowhere.example:1", {}, "no_answer",
     "the proxy http://nowhere.example:1 can't be used: the name nowhere.example cannot be resol"),
    ("127.0.0.2:1", {"dispatcher__blocked_networks": ["127.0.0.2/32"]}, "blocked",
     "the proxy http://127.0.0.2:1 can't be used: 127.0.0.2 is blocked: dispatcher.blocked_netw"),
])  # fmt: skip
@SCHEMES
def test_a_proxy_that_can_not_be_reached_has_its_sentence(
    behind, name_server, scheme, proxy, settings, reason, sentence
):
    outcome = behind(proxy, **settings).send(make_attempt(f"{scheme}://target.test/"))

    assert outcome.reason == reason and outcome.error.startswith(sentence)


def test_the_address_that_is_checked_is_the_one_of_the_proxy(behind, hostile):
    proxy = hostile(answers(OK))
    closed = ["169.254.0.0/16", "10.0.0.0/8"]
    dispatcher = behind(f"127.0.0.1:{proxy.port}", dispatcher__blocked_networks=closed)

    outcomes = [
        dispatcher.send(make_attempt(url, method="POST", body="b"))
        for url in ("http://10.0.0.1/a?b=%2f", "http://name.test:8080", "http://[::1]:80/x")
    ]

    assert [outcome.error for outcome in outcomes] == [None, None, None]
    lines = [proxy.requests.get_nowait().partition(b"\r\n")[0] for _ in outcomes]
    targets = [line.split()[1].decode() for line in lines]
    assert targets[0].lower() == "http://10.0.0.1/a?b=%2f"
    assert targets[1:] == ["http://name.test:8080/", "http://[::1]/x"]


def test_what_a_proxy_repeats_of_a_request_that_it_refuses_is_masked(behind, hostile):
    proxy = hostile(answers(b"HTTP/1.1 407 Denied: tok-canary-1 s3cret-user\r\n\r\n", close=True))
    attempt = make_attempt("http://target.test/", auth={"type": "bearer", "token": "tok-canary-1"})

    outcome = behind(f"http://s3cret-user:@127.0.0.1:{proxy.port}").send(attempt)

    assert "answered 407 Denied: ******** ********: " in outcome.error


@pytest.mark.parametrize(("no_proxy", "host", "is_direct"), [
    (["localhost"], "localhost", True), (["LOCALHOST"], "LocalHost", True),
    (["localhost"], "127.0.0.1", False), (["host"], "localhost", False),
    ([".test"], "several.test", True), (["several.test"], "several.test", True),
    ([".test."], "several.test", True), (["several.test."], "several.test", True),
    (["everal.test"], "several.test", False), ([".several.test"], "several.test", False),
    (["127.0.0.1"], "127.0.0.1", True), (["127.0.0.0/8"], "127.1", True),
    (["127.0.0.0/8"], "[::ffff:127.0.0.1]", True), (["10.0.0.0/8", "::1"], "127.0.0.1", False),
    (["127.0.0.0/8"], "several.test", False), ([], "localhost", False),
])  # fmt: skip
@SCHEMES
def test_what_no_proxy_names_is_dialled_directly(
    behind, hostile, resolve, no_proxy, host, is_direct, scheme
):
    proxy = hostile(answers(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"))
    server = hostile(answers(OK), scheme)
    resolve("127.0.0.1")
    url = server.url.replace("127.0.0.1", host)

    outcome = behind(f"127.0.0.1:{proxy.port}", no_proxy).send(make_attempt(url, verify_tls=False))

    assert (outcome.success, server.accepted, proxy.accepted) == (
        (True, 1, 0) if is_direct else (False, 0, 1)
    )


@SCHEMES
def test_an_abort_ends_an_attempt_that_waits_for_a_proxy(behind, hostile, scheme):
    proxy = hostile(lambda server, connection: read_request(connection) and server.hold())
    dispatcher = behind(f"127.0.0.1:{proxy.port}")
    before = len(os.listdir("/proc/self/fd"))
    attempt = make_attempt(f"{scheme}://target.test/")

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(dispatcher.send, attempt)
        assert proxy.reached.acquire(timeout=10)
        aborted_at = time.monotonic()
        attempt.abort("cancelled")
        assert sent.result().reason == "cancelled"

    assert time.monotonic() - aborted_at < 0.5
    proxy.stopping.set()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.parametrize("spell", [
    str, lambda header: base64.b64decode(header).decode().partition(":")[2],
    lambda header: header + "x" * 100_000, lambda header: "x" * (65536 - 8) + header,
])  # fmt: skip
def test_a_proxy_that_repeats_its_password_is_masked(behind, hostile, spell):
    def behave(_server, connection):
        request = read_request(connection).decode()
        said = spell(re.search("Proxy-Authorization: Basic (.*)\r\n", request)[1])
        head = f"HTTP/1.1 403 {said[:100]}\r\nContent-Length: {len(said)}\r\n\r\n"
        connection.sendall((head + said).encode())

    dispatcher = behind(f"http://ada:{CANARY}@127.0.0.1:{hostile(behave).port}")
    encoded = base64.b64encode(f"ada:{CANARY}".encode()).decode()

    for scheme in ("http", "https"):
        outcome = dispatcher.send(make_attempt(f"{scheme}://target.test/"))
        text = f"{outcome.error} {outcome.response}"
        assert " 403 " in text
        assert not any(part in text for part in (CANARY, encoded[:8], encoded[-20:]))


# --- what it costs the process --------------------------------------------------------


def gzip_bomb():
    """Return a gzip stream of 1 GB, made of one piece again and again."""
    packer = zlib.compressobj(wbits=-15)
    piece = packer.compress(b"\0" * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + piece * 1000


REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 1000000000\r\n\r\n"
ENDLESS = {
    "1 GB with a length": repeats(HEAD + b"Content-Length: 1000000000\r\n\r\n", b"\0" * 65536),
    "1 GB in chunks": repeats(CHUNKED, b"100000\r\n" + b"\0" * 2**20 + b"\r\n"),
    "1 GB until it closes": repeats(HEAD + b"\r\n", b"\0" * 65536),
    "a bomb of 1 GB": answers(typed(b"gzip", gzip_bomb(), b"Content-Encoding")),
    "a redirect with 1 GB": repeats(REDIRECT, b"\0" * 65536),
}


@SCHEMES
def test_no_hostile_server_costs_the_process_memory_descriptors_or_threads(
    make_process, hostile, scheme
):
    process, servers = make_process("dispatcher: {max_concurrent_jobs: 2}"), STALLS | ENDLESS
    home = Path(f"/proc/{process.process.pid}")

    def run(behave, **webhook):
        url = hostile(behave, scheme).url
        fields = {"timeout": "300ms", "retry_policy": ONCE}
        job = process.create(url, webhook={"verify_tls": False} | webhook, **fields)
        process.call("POST", trigger_path(job))
        return process.get(path_of(job))["last_execution"]["reason"]

    def used():
        names = [os.readlink(path) for path in (home / "fd").iterdir() if path.is_symlink()]
        return sum(name.startswith("socket") for name in names), len(os.listdir(home / "task"))

    for behave in (hangs_up, resets):
        assert run(behave, body=MEGABYTE, method="POST") == "no_answer"
    before, at_rest = used(), memory(process, "VmRSS")
    (home / "clear_refs").write_text("5")  # the peak counts from here

    reasons = {name: run(behave) for name, behave in servers.items()}

    more = memory(process, "VmHWM") - at_rest
    print(f"{scheme}: at most {more:.1f} MB more")
    redirect = {"a redirect with 1 GB": "http_status"}
    ended = dict.fromkeys(STALLS, "timeout") | dict.fromkeys(FLOODS, "no_answer")
    assert reasons == ended | dict.fromkeys(ENDLESS) | redirect
    assert more < 10
    wait_until(lambda: all(now <= then for now, then in zip(used(), before, strict=True)))


# ======================================================================================
# 15. Work
# ======================================================================================


def fire_times(target, job):
    """Return the fire times that the target was called for, in the order of the calls."""
    headers = [target.take()[2] for _ in range(target.received.qsize())]
    mine = [h for h in headers if h["X-Chronos-Job-ID"] == job.id]
    return [h["X-Chronos-Scheduled-Time"][11:-1] for h in mine]


@pytest.fixture
def other_target():
    server = Target()
    yield server
    server.stop()


def declare(world, *jobs, rest=""):
    """Let the engine have the jobs of such a file; return those that this has changed."""
    path = world.store.database.path.parent / "chronos.yaml"
    path.write_text(declared(*jobs, rest=rest))
    return declare_all(world, chronos.load_settings(path, {}).jobs)


def declare_all(world, declarations):
    """Let the engine have declarations; return the jobs that this has changed."""
    changed, waiting = [], world.engine.job_changes.to_declare(declarations)
    while waiting:
        declared = world.do(world.engine.job_changes.declare, waiting)
        changed += declared.changed
        waiting = waiting[declared.done :]
    return changed


# --- fire times -----------------------------------------------------------------------


def test_a_fire_time_becomes_one_execution_whose_id_follows_from_it(world, target):
    job = world.create(target.url, schedule="* * * * *")

    world.advance(59)
    assert world.executions(job) == []
    world.advance(1)

    [execution] = world.executions(job)
    assert execution.id == f"exec-{uuid.uuid5(uuid.UUID(job.id), '2027-03-01T12:01:00Z')}"
    assert (execution.status, execution.trigger) == ("success", "schedule")
    assert execution.scheduled_at == at("12:01:00")
    assert target.take()[2]["X-Chronos-Execution-ID"] == execution.id


def test_a_fire_time_never_fires_twice_even_if_the_cursor_is_moved_back(world, target):
    job = world.create(target.url, schedule="* * * * *")
    world.advance(60)

    by_hand(world, "UPDATE jobs SET next_run_at = ?", at("12:01:00"))
    world.do(world.engine.job_changes.set_enabled, job.id, True)
    world.settle()

    assert fire_times(target, job) == ["12:01:00"]
    assert world.store.jobs.get(job.id).next_run_at == at("12:02:00")


def test_disabling_a_job_leaves_what_was_due_before_and_its_retries(world, target):
    target.script = ["/status/503"]
    job = world.create(target.url, schedule="* * * * *")
    world.clock.advance(60)
    world.do(world.engine.job_changes.set_enabled, job.id, False)
    world.settle()

    world.advance(3600)
    world.do(world.engine.job_changes.set_enabled, job.id, True)
    world.settle()

    assert states(world, job, "status", "attempts") == [("success", 2)]
    assert world.store.jobs.get(job.id).next_run_at == at("13:02:00")


@pytest.mark.parametrize("how", ["disabled", "gone from the file"])
def test_what_was_due_before_a_change_is_not_lost_behind_many_others(world, target, how):
    bodies = [job_body(target.url, name=f"{n}", schedule="@every 1m") for n in range(300)]
    jobs = declare(world, *bodies)
    world.clock.advance(61)  # more is due than one pass enqueues

    if how == "disabled":
        world.do(world.engine.job_changes.set_enabled, jobs[-1].id, False)
    else:
        declare(world)
    world.settle()

    assert [states(world, job) for job in jobs] == [["success"]] * 300


def test_every_is_spaced_from_the_previous_fire_time(world, target):
    job = world.create(target.url, schedule="@every 10s")

    world.advance(13)
    world.advance(7)

    assert fire_times(target, job) == ["12:00:10", "12:00:20"]


def test_at_fires_once_and_a_spent_job_can_not_be_enabled(world, target):
    job = world.create(target.url, schedule="@at 2027-03-01T12:00:30Z")

    world.advance(30)

    assert states(world, job) == ["success"]
    assert not world.store.jobs.get(job.id).enabled
    with pytest.raises(chronos.ApiError, match="nothing comes any more") as refusal:
        world.do(world.engine.job_changes.set_enabled, job.id, True)
    assert refusal.value.code == "CONFLICT"


def test_a_paused_server_starts_nothing(make_world, target):
    world = make_world(scheduler__paused=True)
    job = world.create(target.url, schedule="* * * * *")
    add_executions(world, job, 1, "pending")

    world.advance(60)
    with pytest.raises(chronos.ApiError, match="paused"):
        trigger(world, job)

    assert states(world, job) == ["pending"]
    assert target.received.empty()


def test_an_execution_that_is_in_the_ledger_does_not_end_again(world, target, caplog):
    caplog.set_level("INFO", "chronos")
    job = world.create(target.url + "/hang", schedule="* * * * *")
    hang(world, target, job)
    world.clock.advance(60)
    world.engine.run_turn()
    before = states(world, job, "id", "status")
    by_hand(world, "UPDATE jobs SET next_run_at = ? WHERE seq > 0", NOON + 60 * SECOND)
    world.engine._wake_at = 0
    world.engine.run_turn()

    assert states(world, job, "id", "status") == before
    assert len(logged(caplog, "was still running")) == 1
    target.let_go.set()


# --- configurations that have become unusable -------------------------------------------


def spoil(world, job, config):
    """Put something else in the place of a job's stored configuration; None: nothing at all."""
    by_hand(world, "DELETE FROM versions WHERE job_id = ? AND ?", job.id, config is None)
    by_hand(world, "UPDATE versions SET config = ? WHERE job_id = ?", config, job.id)
    world.engine.versions.clear()  # as a start does


def unusable(config):
    """Return what a stored configuration may have become, by the words that name what is wrong."""
    webhook = config["webhook"]
    return {
        "time zone Gone/Zone": json.dumps(config | {"timezone": "Gone/Zone"}),
        "'1 2 3' is neither": json.dumps(config | {"schedule": "1 2 3"}),
        "damaged: Expecting": "{",
        "damaged: 'utf": b"\xff\xfe\xfd",
        "all of it is wrong": "[]",
        "url is wrong": json.dumps(config | {"webhook": webhook | {"url": None}}),
        "not understood": json.dumps(config | {"timeout": "soon"}),
        "that can be called": json.dumps(config | {"webhook": webhook | {"url": "http://*.test/"}}),
        "lost": None,
    }


UNUSABLE = list(unusable(EXAMPLE))


@pytest.mark.parametrize("words", UNUSABLE)
@pytest.mark.parametrize("step", [0, -4 * 3600])
def test_a_job_that_can_not_be_used_fails_once_and_stops_no_other(world, target, words, step):
    spoilt, job = [world.create(target.url, schedule="0 * * * *") for _ in range(2)]
    spoil(world, spoilt, unusable(spoilt.config)[words])

    world.clock.step(step)
    world.settle()
    for _ in range(60):
        world.advance(60)

    assert states(world, job) == ["success"]
    [execution] = world.executions(spoilt)
    assert (execution.status, execution.reason, execution.attempts) == ("failed", "invalid", 0)
    assert words in execution.error
    assert world.store.jobs.get(spoilt.id).enabled and not world.engine.problem


# what can happen to the file of a time zone
ZONE_IS_BAD = pytest.mark.parametrize("spoil_zone", [
    Zones.remove,
    functools.partial(Zones.cut, size=0),
    functools.partial(Zones.cut, size=-600),  # amid its changes of the clock
    functools.partial(Zones.cut, size=-14),  # amid its last line
    functools.partial(Zones.cut, size=-1),
])  # fmt: skip


@ZONE_IS_BAD
def test_a_job_whose_time_zone_has_vanished_fires_again_when_it_is_back(
    world, target, zones, spoil_zone
):
    zones.give("Old/Name", like=MADRID)
    job = world.create(target.url, schedule="0 * * * *", timezone="Old/Name")
    spoil_zone(zones, "Old/Name")
    world.advance(3600)
    world.advance(3 * 3600)

    zones.give("Old/Name", like=MADRID)
    world.advance(60)
    world.advance(3540)

    assert states(world, job, "reason", "missed_count", "scheduled_at") == [
        ("invalid", None, at("13:00:00")),
        ("missed", 2, at("15:00:00")),
        (None, None, at("16:00:00")),
        (None, None, at("17:00:00")),
    ]
    assert fire_times(target, job) == ["16:00:00", "17:00:00"]
    assert "Old/Name" in world.executions(job)[0].error


@ZONE_IS_BAD
def test_a_zone_that_can_not_be_used_holds_up_no_start(make_world, target, zones, spoil_zone):
    zones.give("Old/Name", like=MADRID)
    before = make_world()
    before.create(target.url, schedule="0 9 * * *", timezone="Old/Name")
    job = before.create(target.url, schedule="0 * * * *", timezone=MADRID)
    spoil_zone(zones, "Old/Name")

    world = make_world()
    world.settle()
    world.advance(3600)

    assert states(world, job) == ["success"]
    assert not world.engine.problem


def test_each_time_a_zone_vanishes_is_a_failure_of_its_own(world, target, zones):
    zones.give("Old/Name", like=MADRID)
    job = world.create(target.url, schedule="0 * * * *", timezone="Old/Name")
    for _ in range(2):
        zones.remove("Old/Name")
        world.advance(3600)
        zones.give("Old/Name", like=MADRID)
        world.advance(60)
        world.advance(3540)

    assert states(world, job, "reason") == [("invalid",), (None,), ("invalid",), (None,)]


def test_a_job_that_can_not_be_used_is_looked_at_once_a_minute(world, target):
    job = world.create(target.url, schedule="* * * * * *")
    spoil(world, job, "{")
    world.advance(1)
    assert states(world, job) == ["failed"]

    commits = world.store.database.commits
    waits = []
    for _ in range(120):
        world.clock.advance(1)
        waits.append(world.engine.run_turn())

    assert world.store.database.commits - commits <= 4  # of them two heartbeats
    assert waits.count(0) <= 1  # the walk of retention, once the clock has settled


def test_a_declaration_mends_a_job_whose_configuration_is_damaged(world, target):
    body = job_body(target.url, schedule="0 * * * *")
    [job] = declare(world, body)
    spoil(world, job, "{")

    [mended] = declare(world, body)
    world.advance(3600)

    assert (mended.config, mended.version, mended.enabled) == (job.config, 2, True)
    assert states(world, job) == ["success"]


@pytest.mark.parametrize("words", UNUSABLE)
@pytest.mark.parametrize("is_told", [False, True])
def test_a_start_takes_a_better_declaration_of_a_job_that_can_not_be_used(
    make_world, target, words, is_told
):
    before = make_world()
    [job] = declare(before, job_body(target.url + "/old", schedule="0 * * * *"))
    spoil(before, job, unusable(job.config)[words])
    before.advance(3600 if is_told else 0)

    world = make_world()
    world.engine._starting = True
    world.clock.advance(3 * 3600)
    [mended] = declare(world, job_body(target.url, schedule="30 * * * *", timeout="1m"))
    world.do(world.engine.begin)
    world.advance(1800)

    assert mended.next_run_at and mended.invalid_from is None
    assert states(world, job, "status", "reason") == [("failed", "invalid"), ("success", None)]


def test_every_and_at_need_no_time_zone(world, target, zones):
    zones.give("Old/Name", like=MADRID)
    when = ("@every 1h", "@at 2027-03-01T13:00:00Z")
    jobs = [world.create(target.url, schedule=text, timezone="Old/Name") for text in when]
    zones.remove("Old/Name")

    world.advance(3600)

    assert [states(world, job) for job in jobs] == [["success"]] * 2


def test_what_was_triggered_needs_no_schedule(world, target):
    job = world.create(target.url)
    spoil(world, job, json.dumps(job.config | {"schedule": "1 2 3", "timezone": "Gone/Zone"}))

    trigger(world, job)
    world.settle()

    assert states(world, job) == ["success"]


def test_a_bug_in_the_firing_of_a_job_does_not_stop_the_others(world, target, monkeypatch, caplog):
    broken, job = [world.create(target.url, schedule=f"{n} * * * *") for n in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(world.engine.run_queue, "new_execution", a_bug)
        world.advance(60)
    world.advance(60)

    assert states(world, job) == ["success"]
    assert "RuntimeError" in world.executions(broken)[0].error
    assert len(tracebacks(caplog)) == 1


# what was running or waiting when its configuration became unusable -> how that ends
@pytest.mark.parametrize(("path", "ends"), [
    ("/hang/ok", [("success", None)]),
    ("/hang/status/404", [("failed", "http_status")]),
    ("/hang/status/503", [("failed", "http_status")]),
])  # fmt: skip
def test_how_an_attempt_ended_is_kept_without_a_configuration(world, target, path, ends):
    target.script = [path]
    job = world.create(target.url)
    hang(world, target, job)
    spoil(world, job, None)

    target.let_go.set()
    world.settle()

    assert states(world, job, "status", "reason") == ends


def test_what_was_cancelled_stays_so_without_a_configuration(world, target):
    target.script = ["/hang/ok"]
    job = world.create(target.url)
    execution_id = hang(world, target, job)
    spoil(world, job, None)

    cancel = ending(world, job, execution_id, "cancel")
    change_while_it_ends(world, target, *cancel)
    world.settle()

    assert states(world, job, "status", "reason") == [("failed", "cancelled")]
    assert world.store.jobs.get(job.id).strip == "C"


def test_what_waits_ends_and_stays_in_the_history_when_its_configuration_is_lost(world, target):
    job = world.create(target.url)
    add_executions(world, job, 1, "pending")
    add_executions(world, job, 1, "waiting")
    spoil(world, job, None)

    world.advance(60)

    assert states(world, job, "status", "reason") == [("failed", "invalid")] * 2


# --- missed fire times ----------------------------------------------------------------


@pytest.mark.parametrize(("server", "own", "run", "missed"), [
    ("ignore", None, [], (3, at("12:01:00"), at("12:03:00"))),
    ("ignore", "execute_one", ["12:03:00"], (2, at("12:01:00"), at("12:02:00"))),
    ("execute_one", None, ["12:03:00"], (2, at("12:01:00"), at("12:02:00"))),
    ("execute_one", "execute_all", ["12:01:00", "12:02:00", "12:03:00"], None),
])  # fmt: skip
def test_missed_runs_are_made_up_for_as_the_policy_says(
    make_world, target, server, own, run, missed
):
    world = make_world(scheduler__missed_run_policy=server)
    job = world.create(target.url, schedule="* * * * *", missed_run_policy=own)

    world.advance(230)

    assert fire_times(target, job) == run
    rows = [e for e in world.executions(job) if e.status != "skipped"]
    assert [e.trigger for e in rows] == ["catch_up"] * len(run)
    names = {e.id: chronos.format_time(e.scheduled_at) for e in rows}
    assert names == {f"exec-{uuid.uuid5(uuid.UUID(job.id), at)}": at for at in names.values()}
    skipped = states(
        world, job, "missed_count", "missed_from", "missed_to", "scheduled_at", "reason"
    )
    expected = [(*missed, missed[2], "missed")] if missed else []
    assert [row for row in skipped if row[0]] == expected
    world.advance(10)
    assert fire_times(target, job) == ["12:04:00"]


def test_execute_all_makes_up_for_the_newest_100_in_order(world, target):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="execute_all")

    world.advance(150 * 60)

    newest = [NOON + n * 60 * SECOND for n in range(51, 151)]
    assert fire_times(target, job) == [chronos.format_time(n)[11:-1] for n in newest]
    assert states(world, job, "status", "missed_count", "missed_to") == [
        ("skipped", 50, at("12:50:00")),
        *[("success", None, None)] * 100,
    ]


@pytest.mark.parametrize("concurrency", ["allow", "forbid", "replace"])
def test_runs_that_are_made_up_for_run_one_at_a_time(world, target, concurrency):
    fields = {"missed_run_policy": "execute_all", "concurrency": concurrency}
    target.script = ["/hang", "/status/503"]
    job = world.create(target.url, schedule="0 * * * *", **fields)

    world.clock.advance(3 * 3600 + 60)
    turn_until(world, lambda: target.hanging.acquire(blocking=False))
    world.engine.run_turn()
    assert states(world, job) == ["running", "pending", "pending"]
    target.let_go.set()
    world.settle()
    assert states(world, job) == ["success", "pending", "pending"]  # the second waits to retry
    world.advance(1)

    assert states(world, job) == ["success"] * 3
    assert fire_times(target, job) == ["13:00:00", "14:00:00", "14:00:00", "15:00:00"]


@pytest.mark.parametrize(("concurrency", "after"), [
    ("allow", ["running", "pending", "running"]),
    ("forbid", ["running", "pending", "skipped"]),
    ("replace", ["failed", "failed", "running"]),
])  # fmt: skip
def test_a_normal_fire_time_that_meets_made_up_runs_follows_the_policy(
    world, target, concurrency, after
):
    fields = {"missed_run_policy": "execute_all", "concurrency": concurrency}
    job = world.create(target.url + "/hang", schedule="0 * * * *", **fields)
    world.clock.advance(2 * 3600 + 3590)
    world.engine.run_turn()

    world.clock.advance(10)
    world.engine.run_turn()

    kinds = ["catch_up", "catch_up", "schedule"]
    assert states(world, job, "trigger", "status") == list(zip(kinds, after, strict=True))


@pytest.mark.parametrize(("late", "kind"), [(10, "schedule"), (10.001, "catch_up")])
def test_a_fire_time_is_missed_when_it_is_older_than_the_grace(world, target, late, kind):
    job = world.create(target.url, schedule="* * * * *")

    world.advance(60 + late)

    assert states(world, job, "trigger", "status") == [(kind, "success")]


def test_what_the_engine_takes_long_to_work_off_is_late_but_not_missed(world, target):
    jobs = add_jobs(world, 600, target.url, schedule="0 * * * *")
    world.clock.advance(3600)
    for _ in range(2):
        world.engine.run_turn()
        assert not all(world.executions(job) for job in jobs)
        world.clock.advance(6)  # the grace is 10 s
    world.settle()

    assert [states(world, job, "trigger") for job in jobs] == [[("schedule",)]] * 600


def take_long(world, seconds):
    """Let a change take so long, while the rest of the process goes on."""

    def change(_turn):
        world.clock.advance(seconds)
        world.dispatcher.last_watch = world.clock.monotonic()  # the watchdog has gone round

    world.do(change)


@pytest.mark.parametrize("step", [0, 2, -2])
def test_what_a_long_turn_delays_is_late_but_not_missed(world, target, step):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")

    world.advance(50)
    take_long(world, 30)
    world.clock.step(step)
    world.settle()

    assert states(world, job, "trigger", "status") == [("schedule", "success")]


def test_a_suspend_in_a_long_turn_is_missed_time(world, target):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")

    world.advance(50)
    world.do(lambda _turn: world.clock.advance(30))  # the watchdog does not go round either
    world.settle()

    assert states(world, job, "reason") == [("missed",)]


def test_a_suspend_in_a_turn_that_has_not_yet_fired_is_missed_time(world, target, monkeypatch):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")
    pauses = [3600]

    def suspended(_turn):
        if pauses:
            world.clock.advance(pauses.pop())

    monkeypatch.setattr(world.engine.zone_rules, "apply", suspended)
    world.advance(50)
    world.settle()

    assert states(world, job, "reason", "missed_count") == [("missed", 60)]


def the_server_is_down(make_world):
    make_world().clock.advance(100)
    return make_world()


def the_server_is_suspended(make_world):
    world = make_world()
    world.clock.advance(100)
    return world


def the_clock_is_moved(make_world):
    world = make_world()
    world.clock.step(100)
    return world


def the_file_is_away(make_world):
    world = make_world()
    path = world.store.database.path
    path.rename(path.with_suffix(".away"))
    for _ in range(100):
        world.advance(1)
    path.with_suffix(".away").rename(path)
    world.clock.advance(1)
    return world


def the_disk_hangs(make_world):
    world = make_world()
    set_number(world, "a")
    run = world.store.database.run

    def hang(sql, **values):
        if sql == "COMMIT":
            world.clock.advance(100)
            world.dispatcher.last_watch = world.clock.monotonic()  # the watchdog has gone round
        return run(sql, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.store.database, "run", hang)
        world.engine.run_turn()
    return world


@pytest.mark.parametrize(("happens", "reason"), [
    (the_server_is_down, "the server was down"),
    (the_server_is_suspended, "the server was suspended"),
    (the_clock_is_moved, "the clock was moved"),
    (the_file_is_away, "the database failed"),
    (the_disk_hangs, "the database did not answer"),
])  # fmt: skip
def test_what_was_missed_says_why(make_world, target, happens, reason):
    job = make_world().create(target.url, schedule="* * * * *", missed_run_policy="ignore")

    happens(make_world).settle()

    [missed] = make_world().executions(job)
    period = "from 2027-03-01T12:01:00Z to 2027-03-01T12:01:00Z"
    assert missed.error == f"1 fire times {period} passed while {reason}"


@pytest.mark.parametrize(("policy", "seconds", "expected"), [
    ("ignore", 11, ("schedule", "skipped", 1)),
    ("execute_one", 11, ("catch_up", "success", None)),
    ("ignore", 10, ("schedule", "success", None)),
])  # fmt: skip
def test_what_passed_while_the_disk_was_full_is_missed(world, target, policy, seconds, expected):
    add_jobs(world, 100, target.url, schedule="* * * * *", missed_run_policy=policy)
    fill_disk(world)
    world.advance(60)
    for _ in range(seconds - 1):
        world.advance(1)
        assert "disk is full" in world.engine.problem

    free_disk(world)
    world.advance(1)

    rows = by_hand(world, "SELECT trigger, status, missed_count FROM executions")
    assert rows == [expected] * 100


# --- the clock is set -----------------------------------------------------------------


def test_a_step_forward_is_missed_time_and_keeps_the_waits_of_retries(world, target):
    retrying = world.create(target.url + "/status/503")
    job = world.create(target.url, schedule="* * * * *")
    trigger(world, retrying)
    world.settle()

    world.clock.step(3600)
    world.advance(0.999)
    assert states(world, job, "status", "missed_count") == [("skipped", 59), ("success", None)]
    assert states(world, retrying, "attempts") == [(1,)]
    world.advance(0.001)

    assert states(world, retrying, "attempts") == [(2,)]


def test_a_step_back_of_less_than_3_h_makes_cursors_wait_but_not_retries(world, target):
    retrying = world.create(target.url + "/status/503")
    job = world.create(target.url, schedule="* * * * *")
    world.advance(60)
    trigger(world, retrying)
    world.settle()

    world.clock.step(-2.9 * 3600)
    world.advance(1)
    assert states(world, retrying, "attempts") == [(2,)]
    world.advance(2.9 * 3600 - 2)
    assert fire_times(target, job) == ["12:01:00"]
    world.advance(61)

    assert fire_times(target, job) == ["12:02:00"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_step_back_of_more_than_3_h_computes_every_cursor_anew(make_world, target, restart):
    world = make_world()
    jobs = add_jobs(world, 300, target.url, schedule="0 * * * *")
    world.advance(3600)

    world.clock.step(-4 * 3600)
    world = make_world() if restart else world
    world.settle()
    for _ in range(4):  # to 13:00, which has been
        world.advance(3600)

    assert target.received.qsize() == 1200
    fired = [chronos.to_datetime(e.scheduled_at).hour for e in world.executions(jobs[-1])]
    assert fired == [13, 10, 11, 12]


@pytest.mark.parametrize("step", [-3600, 3600])
def test_a_step_during_an_attempt_leaves_the_wait_after_it_as_it_is(world, target, step):
    target.script = ["/hang/status/503"]
    job = world.create(target.url)
    hang(world, target, job)

    world.clock.step(step)
    target.let_go.set()
    world.settle()

    assert world.executions(job)[0].due_at == world.clock.now() + SECOND


def test_a_clock_from_before_the_release_fires_nothing_and_decades_are_not_missed(
    make_world, clock, target, caplog
):
    clock.step(-NOON / SECOND)
    world = make_world(scheduler__missed_run_policy="execute_all")
    job = world.create(target.url, schedule="* * * * *")

    world.advance(3600)
    assert "no job fires" in caplog.text
    clock.step(NOON / SECOND - 3600)
    world.settle()
    assert world.executions(job) == []
    world.advance(60)

    assert states(world, job, "scheduled_at", "status") == [(at("12:01:00"), "success")]


@pytest.mark.parametrize(("policy", "run"), [("ignore", []), ("execute_one", ["12:03:00"])])
def test_a_boot_in_1970_hides_nothing_that_was_missed(make_world, target, clock, policy, run):
    job = make_world().create(target.url, schedule="* * * * *", missed_run_policy=policy)
    clock.step(-NOON / SECOND)
    world = make_world()
    world.advance(100)

    clock.step(NOON / SECOND + 130)
    world.settle()

    assert fire_times(target, job) == run
    first, *_ = states(world, job, "status", "missed_count", "missed_from")
    assert first == ("skipped", 3 - len(run), at("12:01:00"))


def days(target):
    """Return the days of the fire times that the target was called for since the last time."""
    headers = [target.take()[2] for _ in range(target.received.qsize())]
    return [h["X-Chronos-Scheduled-Time"][:10] for h in headers]


@pytest.mark.parametrize(("policy", "ahead", "later"), [
    ("ignore", [], ["2027-03-02", "2027-03-03", "2027-03-04"]),
    ("execute_one", ["2027-03-03"], ["2027-03-02", "2027-03-04"]),
    ("execute_all", ["2027-03-02", "2027-03-03"], ["2027-03-04"]),
])  # fmt: skip
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("back", [
    [-2 * 86_400],
    [-NOON / SECOND, NOON / SECOND - 2 * 86_400],  # by way of 1970
])  # fmt: skip
def test_a_clock_that_was_ahead_for_a_moment_costs_no_later_run(
    make_world, target, policy, ahead, later, restart, back
):
    world = make_world()
    world.create(target.url, schedule="0 9 * * *", missed_run_policy=policy)
    world.clock.step(2 * 86_400)
    world.advance(3)
    assert days(target) == ahead

    for step in back:
        world.clock.step(step)
        world = make_world() if restart else world
        world.settle()
    for _ in range(73):
        world.advance(3600)

    assert days(target) == later


def test_a_clock_that_was_ahead_for_a_moment_leaves_no_failure_and_no_number(world, target):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")
    world.advance(60)
    last_24h = world.store.history.ends_since(NOON)

    for step in (400 * 86_400, 20 * 60):
        world.clock.step(step)
        world.advance(1)
        assert summary(world, job)[:2] == ("SM", 1)
        world.clock.step(-step)
        world.settle()

        assert summary(world, job) == ("S", 0, None)
        assert states(world, job) == ["success"]
        assert world.store.history.ends_since(NOON) == last_24h
    assert world.store.jobs.get(job.id).next_run_at == at("12:02:00")
    counted = world.store.history.ends_since(0)["missed"]
    assert counted == 400 * 1440 + 20  # a counter does not go back


def test_what_really_passed_while_the_clock_was_ahead_was_missed(world, target):
    job = world.create(target.url, schedule="* * * * *")
    world.clock.step(86_400)
    for _ in range(10):
        world.advance(60)
    world.clock.step(-86_400)
    world.settle()

    rows = states(world, job, "missed_from", "missed_to", "scheduled_at", "trigger")
    assert [row for row in rows if row[2] < NOON + chronos.DAY] == [
        (at("12:01:00"), at("12:09:00"), at("12:09:00"), "schedule"),
        (None, None, at("12:10:00"), "catch_up"),
    ]


def test_a_fire_time_that_was_sent_by_a_clock_ahead_is_counted_neither_twice_nor_as_missed(
    world, target
):
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")
    world.clock.step(3600)
    world.settle()
    for _ in range(3):
        world.advance(60)  # 13:01, 13:02, 13:03
    world.clock.step(-3600)
    world.settle()

    world.clock.advance(3600)  # to 13:03
    world.settle()

    missed = [row for row in states(world, job, "missed_count", "missed_to") if row[0]]
    assert missed == [(3, at("12:03:00")), (57, at("13:00:00"))]


@pytest.mark.parametrize("policy", ["ignore", "execute_one", "execute_all"])
def test_a_clock_that_was_behind_for_a_moment_makes_nothing_missed(world, target, policy):
    job = world.create(target.url, schedule="0 * * * *", missed_run_policy=policy)
    for _ in range(30):
        world.advance(3600)
    before = states(world, job, "id")

    world.clock.step(-86_400)
    world.advance(3)
    world.clock.step(86_400)
    world.settle()
    assert states(world, job, "id") == before
    world.advance(3600)

    assert len(fire_times(target, job)) == len(states(world, job)) == 31


@pytest.mark.parametrize("restart", [False, True])
def test_small_steps_back_add_up(make_world, target, restart):
    world = make_world()
    job = world.create(target.url, schedule="0 * * * *")

    for _ in range(4):
        world.clock.step(-2 * 3600)
        world = make_world() if restart else world
        world.advance(60)
        ahead = world.store.jobs.get(job.id).next_run_at - world.clock.now()
        assert ahead <= chronos.CLOCK_FAR_BACK + chronos.HOUR


def test_every_24_h_fires_though_the_clock_is_set_each_hour_after_it_was_ahead(world, target):
    job = world.create(target.url, schedule="@every 24h")
    world.clock.step(400 * 86_400)
    world.advance(3)
    world.clock.step(-400 * 86_400)
    world.settle()
    target.take()

    for _ in range(26):
        world.clock.step(-2)
        world.advance(3600)

    assert len(fire_times(target, job)) == 1


def test_an_instant_that_was_spent_by_a_clock_ahead_is_enabled_again(world, target):
    fields = {"schedule": "@at 2027-03-02T12:00:00Z", "missed_run_policy": "ignore"}
    job = world.create(target.url, **fields)
    off = world.create(target.url, schedule="0 0 * * *", missed_run_policy="ignore")
    world.clock.step(2 * 86_400)
    world.advance(3)
    assert not world.store.jobs.get(job.id).enabled
    world.do(world.engine.job_changes.set_enabled, off.id, False)

    world.clock.step(-2 * 86_400)
    world.settle()
    assert world.store.jobs.get(job.id).next_run_at == NOON + chronos.DAY
    world.advance(86_400)

    assert states(world, job) == ["success"]
    assert (states(world, off), world.store.jobs.get(off.id).enabled) == ([], False)


def test_what_waits_for_a_worker_is_taken_back_with_the_clock_and_fires_in_time(make_world, target):
    world = make_world(dispatcher__max_concurrent_jobs=1, dispatcher__max_concurrent_per_host=1)
    hang(world, target, world.create(target.url + "/hang"))
    job = world.create(target.url, schedule="@at 2027-03-01T12:00:10Z")
    world.clock.advance(12)
    world.engine.run_turn()
    assert states(world, job) == ["pending"]

    world.clock.step(-5)
    world.engine.run_turn()
    assert (states(world, job), world.store.jobs.get(job.id).enabled) == ([], True)
    target.let_go.set()
    world.settle()
    assert states(world, job) == []
    world.advance(3)

    assert states(world, job) == ["success"]


def test_a_large_history_is_taken_back_in_several_turns(tmp_path, target):
    world = World(tmp_path / "data", HookedClock())
    jobs = add_jobs(world, 3, target.url, schedule="@every 1m", missed_run_policy="ignore")
    other = world.create(target.url, enabled=False)
    world.clock.step(86_400)
    world.settle()
    add_executions(world, other, 20 * chronos.TAKE_BACK_ROWS, "success")

    world.clock.hook = lambda: world.clock.advance(0.01)
    world.clock.step(-86_400)
    turns = 0
    while any(states(world, job) for job in jobs):
        world.engine.run_turn()
        turns += 1
    world.close()

    assert 2 < turns < 20


def test_nothing_is_too_old_until_the_clock_has_stood_for_two_heartbeats(world, target):
    job = world.create(target.url, enabled=False)
    add_executions(world, job, 30, "success", NOON)

    world.clock.step(36 * 86_400)
    trigger(world, job)
    world.advance(119)
    assert len(world.executions(job)) == 31
    world.advance(1)
    world.advance(60)

    assert len(world.executions(job)) == 10


@pytest.mark.parametrize("concurrency", ["allow", "forbid", "replace"])
def test_a_running_request_is_not_in_the_way_of_its_own_fire_time(world, target, concurrency):
    target.script = ["/hang"]
    job = world.create(target.url, schedule="* * * * *", concurrency=concurrency)
    world.clock.advance(60)
    world.engine.run_turn()
    assert target.hanging.acquire(timeout=10)

    world.clock.step(-12)
    world.engine.run_turn()
    for enabled in (False, True):
        world.do(world.engine.job_changes.set_enabled, job.id, enabled)
    for missed in (0, 12):  # it is due anew, and due too late
        assert world.store.jobs.get(job.id).next_run_at == at("12:01:00")
        world.clock.advance(12 + missed)
        world.engine.run_turn()
        assert states(world, job, "status", "reason") == [("running", None)]
        by_hand(world, "UPDATE jobs SET next_run_at = ? WHERE seq > 0", at("12:01:00"))
    target.let_go.set()
    world.settle()

    assert states(world, job) == ["success"]
    assert target.received.qsize() == 1


# --- the rules of a time zone change ----------------------------------------------------


def next_run(world, job):
    return chronos.format_time(world.store.jobs.get(job.id).next_run_at)[5:-4]


def test_a_start_applies_new_rules_of_a_time_zone_to_what_is_to_come(make_world, target, zones):
    zones.give("Some/Zone", like=MADRID)
    before = make_world()
    job = before.create(target.url, schedule="0 9 * * *", timezone="Some/Zone")
    assert next_run(before, job) == "03-02T08:00"

    zones.give("Some/Zone", like="Asia/Tokyo")
    world = make_world()
    world.settle()
    assert next_run(world, job) == "03-02T00:00"
    world.advance(24 * 3600)

    assert fire_times(target, job) == ["00:00:00"]
    assert states(world, job) == ["success"]
    assert next_run(world, job) == "03-03T00:00"


# what new rules of its zone leave as it is -> its next run; the clock is at 03-01T12:00
@pytest.mark.parametrize(("schedule", "expected"), [
    ("@every 1h", "03-01T13:00"), ("@at 2027-03-02T09:00:00+01:00", "03-02T08:00"),
    ("0 * * * *", "03-01T13:00"),
])  # fmt: skip
def test_new_rules_leave_what_does_not_depend_on_them(
    make_world, target, zones, schedule, expected
):
    zones.give("Some/Zone", like=MADRID)
    job = make_world().create(target.url, schedule=schedule, timezone="Some/Zone")

    zones.give("Some/Zone", like="Asia/Tokyo")
    world = make_world()
    world.settle()

    assert next_run(world, job) == expected


def test_new_rules_leave_what_was_missed(make_world, target, zones):
    zones.give("Some/Zone", like=MADRID)
    job = make_world().create(target.url, schedule="0 14 * * *", timezone="Some/Zone")

    zones.give("Some/Zone", like="Asia/Tokyo")
    world = make_world()
    world.clock.advance(2 * 3600)
    world.settle()

    assert fire_times(target, job) == ["13:00:00"]
    assert next_run(world, job) == "03-02T05:00"


@pytest.mark.parametrize("behind", [0, 2 * 3600])
def test_a_start_fires_nothing_again_whatever_the_clock_shows(make_world, target, behind):
    before = make_world(retention__executions_per_job=1)
    job = before.create(target.url, schedule="* * * * *", timezone=NEW_YORK)
    for _ in range(30):
        before.advance(60)
    run_once(before, job)
    before.clock.step(-behind)

    world = make_world(retention__executions_per_job=1)
    world.settle()

    assert next_run(world, job) == "03-01T12:31"


def test_a_start_whose_clock_can_not_be_right_moves_no_cursor(make_world, target):
    job = make_world().create(target.url, schedule="0 9 * * *")
    make_world().clock.wall = 0

    make_world().settle()

    assert next_run(make_world(), job) == "03-02T09:00"


def test_the_cursors_of_many_jobs_are_looked_at_in_short_passes(make_world, zones, monkeypatch):
    zones.give("Some/Zone", like=MADRID)
    before = make_world()
    fields = {"schedule": "0 9 * * *", "timezone": "Some/Zone"}
    jobs = add_jobs(before, 1300, NOBODY, **fields)
    last = before.create(NOBODY, **fields)
    zones.give("Some/Zone", like="Asia/Tokyo")
    world = make_world()
    looked, get = [], world.store.jobs.get
    monkeypatch.setattr(
        world.store.jobs, "get", lambda job_id: looked.append(job_id) or get(job_id)
    )

    passes = 0
    while world.engine.run_turn() == 0:
        passes += 1
        assert len(looked) <= 500 * passes

    assert len(set(looked)) == len(jobs) + 1
    assert {next_run(world, job) for job in (jobs[0], jobs[-1], last)} == {"03-02T00:00"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_pass_that_fails_leaves_no_cursor_as_old_rules_had_it(
    make_world, zones, monkeypatch, number
):
    zones.give("Some/Zone", like=MADRID)
    job = make_world().create(NOBODY, schedule="0 9 * * *", timezone="Some/Zone")
    zones.give("Some/Zone", like="Asia/Tokyo")
    world = make_world()
    for _ in range(number - 1):
        world.engine.run_turn()

    with monkeypatch.context() as patch:
        patch.setattr(world.engine.retention, "work", a_bug)
        world.advance(60)
    assert world.engine.problem == "a bug"
    world.advance(1)

    assert next_run(world, job) == "03-02T00:00"


# --- overlap --------------------------------------------------------------------------

IN_THE_WAY = pytest.mark.parametrize(
    ("path", "status"), [("/hang", "running"), ("/status/503", "pending")]
)


@IN_THE_WAY
def test_forbid_skips_what_overlaps_and_names_the_one_in_the_way(world, target, path, status):
    target.script = [path]
    job = world.create(target.url, concurrency="forbid")
    first = trigger(world, job)
    turn_until(world, lambda: target.received.qsize() and states(world, job) == [status])

    trigger(world, job)

    skipped = world.executions(job)[1]
    assert (skipped.status, skipped.reason, skipped.completed_at) == ("skipped", "overlap", NOON)
    assert skipped.error == f"{first} was still {status}"


@IN_THE_WAY
def test_replace_ends_the_old_one_at_once_and_starts_the_new_one(world, target, path, status):
    target.script = [path]
    job = world.create(target.url, concurrency="replace")
    old = trigger(world, job)
    turn_until(world, lambda: target.received.qsize() and states(world, job) == [status])

    told = threading.Event()
    world.engine.waiters._execution_ids[told] = old
    new = trigger(world, job)
    assert told.is_set()
    world.advance(60)  # though the target still holds the old request

    assert states(world, job, "id", "status", "reason", "error") == [
        (old, "failed", "replaced", f"replaced by {new}"),
        (new, "success", None, None),
    ]
    assert target.received.qsize() == 2


@pytest.mark.parametrize("how", ["replaced", "cancelled"])
def test_an_attempt_that_was_broken_off_is_in_the_log_of_attempts(world, target, how):
    target.script = ["/status/503", "/hang"]
    job = world.create(target.url, concurrency="replace")
    first = run_once(world, job)
    world.clock.advance(1)
    world.engine.run_turn()
    assert target.hanging.acquire(timeout=10)
    world.clock.advance(2.5)

    if how == "cancelled":
        world.do(world.engine.run_queue.cancel, job.id, first, "ada")
    else:
        trigger(world, job)

    execution = world.store.executions.get(job.id, first)
    _answered, broken_off = json.loads(execution.attempt_log)
    assert (broken_off["number"], broken_off["status_code"]) == (2, None)
    assert (broken_off["started_at"], broken_off["duration"]) == (
        "2027-03-01T12:00:01Z",
        25 * 10**8,
    )
    assert broken_off["error"] == execution.error and how in execution.error
    assert execution.to_json()["duration"] == 35 * 10**8


def test_a_retry_that_was_cancelled_while_it_waited_has_no_attempt_more(world, target):
    job = world.create(target.url + "/status/503")
    first = run_once(world, job)

    world.do(world.engine.run_queue.cancel, job.id, first, "ada")

    [execution] = world.executions(job)
    assert len(json.loads(execution.attempt_log)) == execution.attempts == 1


def test_a_job_that_never_catches_up_has_a_thousand_runs_waiting_and_skips_more(world, target):
    job = world.create(target.url + "/hang", enabled=False, concurrency="allow")
    hang(world, target, job)
    add_executions(world, job, 998, "pending")

    last, refused = trigger(world, job), trigger(world, job)

    assert world.store.executions.get(None, last).status in ("pending", "running")
    skipped = world.store.executions.get(None, refused)
    assert (skipped.status, skipped.reason) == ("skipped", "overlap")
    assert skipped.error == "1000 executions had not ended"


def test_ending_a_run_releases_the_one_that_is_made_up_for_behind_it(world, target):
    target.script = ["/hang"]
    job = world.create(target.url, schedule="* * * * *")
    hang(world, target, job)
    world.clock.advance(80)
    world.engine.run_turn()

    first, _behind = world.executions(job)
    world.engine.hand_in(
        lambda turn: world.engine.run_queue.fail(turn, first, "replaced", "by another")
    )
    world.settle()

    assert states(world, job) == ["failed", "success"]


@pytest.mark.parametrize(("concurrency", "after"), [
    ("forbid", ["running"] + ["skipped"] * 9),
    ("replace", ["failed"] * 9 + ["running"]),
    ("allow", ["running"] * 2 + ["pending"] * 8),
])  # fmt: skip
def test_runs_longer_than_their_interval_lose_no_fire_time_and_stop_no_other_job(
    make_world, target, other_target, concurrency, after
):
    world = make_world(dispatcher__max_concurrent_jobs=4, dispatcher__max_concurrent_per_host=2)
    slow = world.create(target.url + "/hang", schedule="@every 1s", concurrency=concurrency)
    job = world.create(other_target.url, schedule="@every 1s")

    for n in range(1, 11):
        world.clock.advance(1)
        turn_until(world, lambda n=n: states(world, job) == ["success"] * n)
    turn_until(world, lambda: states(world, slow) == after)

    assert states(world, slow, "scheduled_at") == states(world, job, "scheduled_at")


# --- the queue ------------------------------------------------------------------------


def test_nothing_is_sent_before_its_execution_is_on_disk_as_running(world, target):
    seen = queue.SimpleQueue()

    def witness(handler):
        find = "SELECT status, attempts FROM executions WHERE id = ?"
        seen.put(by_hand(world, find, handler.headers["X-Chronos-Execution-ID"]))

    target.behave = witness
    add_jobs(world, 100, target.url, schedule="* * * * *")

    world.advance(60)

    assert [seen.get(timeout=10) for _ in range(100)] == [[("running", 1)]] * 100


def test_no_more_run_at_once_than_there_are_workers_and_the_oldest_is_next(make_world, target):
    world = make_world(dispatcher__max_concurrent_jobs=1, dispatcher__max_concurrent_per_host=9)
    hang(world, target, world.create(target.url + "/hang"))
    jobs = [world.create(f"{target.url}/{n}", schedule=f"@every {n}s") for n in (5, 3, 4)]

    world.clock.advance(5)
    world.engine.run_turn()
    assert [states(world, job) for job in jobs] == [["pending"]] * 3
    target.let_go.set()
    world.settle()

    assert [target.take()[1] for _ in range(4)] == ["/hang", "/3", "/4", "/5"]


def test_a_dead_target_does_not_hold_up_the_others(make_world, target, other_target):
    world = make_world(dispatcher__max_concurrent_jobs=4, dispatcher__max_concurrent_per_host=2)
    dead = world.create(target.url + "/hang", concurrency="allow")
    add_executions(world, dead, 10, "pending")
    job = world.create(other_target.url)

    trigger(world, job)
    turn_until(world, lambda: states(world, job) == ["success"])

    assert sorted(states(world, dead)) == ["pending"] * 8 + ["running"] * 2
    target.let_go.set()
    world.settle()
    assert states(world, dead) == ["success"] * 10


def test_taking_stays_quick_while_50000_executions_wait_for_a_dead_target(
    make_world, target, other_target
):
    world = make_world(dispatcher__max_concurrent_per_host=1)
    dead = world.create(target.url + "/hang", concurrency="allow")
    job = world.create(other_target.url, concurrency="allow")
    hang(world, target, dead)
    full = {chronos.target_of(target.url)}

    def quickest():
        times = []
        for _ in range(20):
            start = time.perf_counter()
            assert world.store.executions.due(world.clock.now(), 64, full) == []
            times.append(time.perf_counter() - start)
        return min(times)

    add_executions(world, dead, 100, "pending")
    few = quickest()
    add_executions(world, dead, 49_900, "pending")
    assert quickest() < 5 * few

    trigger(world, job)
    turn_until(world, lambda: states(world, job) == ["success"])


def add_waiting(world, targets, seconds=0):
    """Add an execution of its own job for each of these targets, due so many seconds ago."""
    due_at = world.clock.now() - seconds * SECOND
    with world.store.database.transaction():
        for target in targets:
            ids = (f"exec-{uuid.uuid4()}", str(uuid.uuid4()))
            values = (1, "manual", "pending", due_at, target, due_at)
            world.store.executions.add([chronos.Execution(*ids, *values)])


def test_taking_stays_quick_while_one_of_15000_targets_is_full(world):
    add_waiting(world, [f"http://h{number}:80" for number in range(15_000)])

    def quickest(full):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            assert len(world.store.executions.due(world.clock.now(), 16, full)) == 16
            times.append(time.perf_counter() - start)
        return min(times)

    assert quickest({"http://h0:80"}) < 10 * quickest(set())


@pytest.mark.parametrize("few", [0, 250], ids=["in order", "by target"])
def test_what_is_taken_are_the_oldest_of_all_targets_with_room(world, monkeypatch, few):
    monkeypatch.setattr(chronos, "FEW_TARGETS", few)
    for seconds in (3, 1, 2, -1):
        add_waiting(world, ["http://a:80", "http://b:80", "http://c:80", "http://a:80"], seconds)

    due = world.store.executions.due(world.clock.now(), 5, {"http://a:80", "http://x:80"})

    found = [((world.clock.now() - e.due_at) // SECOND, e.target[7]) for e in due]
    assert found == [(3, "b"), (3, "c"), (2, "b"), (2, "c"), (1, "b")]


def test_a_run_behind_those_of_a_deleted_job_starts_at_once(make_world, target):
    world = make_world(dispatcher__max_concurrent_jobs=2)
    gone, job = [world.create(target.url, enabled=False, concurrency="allow") for _ in range(2)]
    world.settle()
    execution_id = f"exec-{uuid.uuid4()}"

    for _ in range(2):
        world.engine.hand_in(world.engine.run_queue.trigger, gone.id, f"exec-{uuid.uuid4()}")
    world.engine.hand_in(world.engine.run_queue.trigger, job.id, execution_id)
    world.engine.hand_in(world.engine.job_changes.delete, gone, False)
    world.settle()  # no time passes

    assert world.store.executions.get(None, execution_id).status == "success"


def test_what_is_made_up_for_goes_on_behind_a_run_that_can_not_start(make_world, target):
    world = make_world()
    job = world.create(target.url, schedule="* * * * *", missed_run_policy="execute_all")
    world.clock.advance(6 * 60)
    world.engine.pool.size = 0  # nothing is taken yet
    world.engine.run_turn()
    config = json.dumps(job.config | {"timeout": "?"})
    by_hand(world, "UPDATE versions SET config = ? WHERE job_id = ?", config, job.id)
    by_hand(world, "UPDATE jobs SET next_run_at = NULL")
    world.engine.versions.clear()
    world.engine.pool.size = 4

    world.advance(61)

    assert states(world, job) == ["failed"] * 6


def test_an_execution_that_can_not_be_started_stops_no_other(make_world, target):
    before = make_world()
    broken, job = [before.create(target.url) for _ in range(2)]
    add_executions(before, broken, 1, "pending")
    config = json.dumps(broken.config | {"timeout": "?"})
    by_hand(before, "UPDATE versions SET config = ? WHERE job_id = ?", config, broken.id)

    world = make_world()
    world.clock.advance(60)
    world.engine.run_turn()
    assert not world.engine.problem
    run_once(world, job)

    assert (states(world, broken), states(world, job)) == (["failed"], ["success"])


# --- retries --------------------------------------------------------------------------


def test_retries_wait_in_the_database_for_one_second_and_then_two(world, target):
    job = world.create(target.url + "/status/503")
    run_once(world, job)
    waits = []

    while (execution := world.executions(job)[0]).status == "pending":
        waits.append((execution.due_at - world.clock.now()) / SECOND)
        world.advance(waits[-1] - 0.001)
        assert world.executions(job) == [execution]
        world.advance(0.001)

    assert waits == [1, 2]
    assert (execution.status, execution.reason, execution.attempts) == ("failed", "http_status", 3)
    log = [
        (e["number"], e["started_at"][-3:], e["status_code"])
        for e in json.loads(execution.attempt_log)
    ]
    assert log == [(1, "00Z", 503), (2, "01Z", 503), (3, "03Z", 503)]
    calls = [target.take()[2] for _ in range(3)]
    assert [call["X-Chronos-Attempt"] for call in calls] == ["1", "2", "3"]
    assert {call["X-Chronos-Execution-ID"] for call in calls} == {execution.id}


def test_the_time_allowed_spans_attempts_and_waits(world, target):
    target.script = ["/status/503", "/hang"]
    job = world.create(target.url, timeout="30s", retry_policy={"initial_interval": "20s"})
    run_once(world, job)

    world.dispatcher.start()
    world.clock.advance(20)
    world.engine.run_turn()
    assert target.hanging.acquire(timeout=10)
    world.advance(10)
    world.dispatcher.stop()

    assert states(world, job, "status", "reason", "attempts") == [("failed", "timeout", 2)]
    assert world.executions(job)[0].to_json()["duration"] == 30_000_000_000


def test_every_attempt_uses_the_version_that_the_execution_began_with(world, target):
    job = world.create(target.url + "/status/503")
    run_once(world, job)

    config = job.config | {"webhook": job.config["webhook"] | {"url": target.url + "/ok"}}
    by_hand(world, "INSERT INTO versions VALUES (?, 2, ?, 0, '')", job.id, json.dumps(config))
    by_hand(world, "UPDATE jobs SET version = 2")
    world.advance(1)
    world.advance(2)
    run_once(world, job)

    assert [target.take()[1] for _ in range(4)] == ["/status/503"] * 3 + ["/ok"]
    assert states(world, job, "job_version", "status") == [(1, "failed"), (2, "success")]


def test_a_retry_after_that_is_a_date_counts_from_the_answer(world, target):
    target.script = ["/hang/status/503"]
    target.extra_headers = {"Retry-After": "Mon, 01 Mar 2027 12:01:00 GMT"}
    job = world.create(target.url)
    hang(world, target, job)

    world.clock.advance(25)
    target.let_go.set()
    world.settle()

    assert states(world, job, "status", "due_at") == [("pending", at("12:01:00"))]


# --- after a crash --------------------------------------------------------------------


@pytest.mark.parametrize("is_sent", [True, False])
def test_after_a_crash_what_ran_is_due_at_once_and_its_attempt_counts(make_world, target, is_sent):
    target.script = ["/hang"] if is_sent else []
    before = make_world()
    job = before.create(target.url)
    if not is_sent:
        before.engine._after_commit = lambda _turn: (
            None
        )  # the process ends between commit and request
    before.engine.hand_in(before.engine.run_queue.trigger, job.id, "exec-1")
    before.engine.run_turn()
    assert not is_sent or target.hanging.acquire(timeout=10)
    assert states(before, job, "status", "attempts") == [("running", 1)]

    world = make_world()
    world.settle()

    [execution] = world.executions(job)
    assert (execution.id, execution.status, execution.attempts) == ("exec-1", "success", 2)
    errors = [entry["error"] for entry in json.loads(execution.attempt_log)]
    assert errors == [INTERRUPTED, None]
    calls = [target.take()[2] for _ in range(1 + is_sent)]
    assert [call["X-Chronos-Attempt"] for call in calls] == ["1", "2"][-len(calls) :]
    assert {call["Idempotency-Key"] for call in calls} == {"exec-1"}
    assert target.received.empty()


def test_after_a_crash_what_ran_in_its_last_attempt_has_failed(make_world, target):
    before = make_world()
    job = before.create(target.url + "/hang", retry_policy={"max_attempts": 1})
    hang(before, target, job)

    world = make_world()
    world.settle()

    expected = ("failed", "interrupted", 1, NOON)
    assert states(world, job, "status", "reason", "attempts", "completed_at") == [expected]


def test_a_run_that_is_resumed_after_a_crash_comes_before_what_was_missed(make_world, target):
    target.script = ["/hang", "/status/503"]
    before = make_world()
    job = before.create(target.url, schedule="* * * * *", missed_run_policy="execute_all")
    before.clock.advance(60)
    before.engine.run_turn()
    assert target.hanging.acquire(timeout=10)

    world = make_world()
    world.advance(125)
    assert states(world, job) == ["pending"] * 3  # the resumed one waits to retry
    world.advance(2)

    assert states(world, job) == ["success"] * 3
    assert fire_times(target, job) == ["12:01:00"] * 3 + ["12:02:00", "12:03:00"]


def test_a_crash_during_a_big_delete_does_not_stop_the_next_start(make_world, target):
    before = make_world()
    job = before.create(target.url + "/hang")
    add_executions(before, job, 2000, "success")
    hang(before, target, job)
    before.do(before.engine.job_changes.delete, job, False)

    world = make_world()
    turn_until(world, lambda: world.executions(job) == [])


def test_the_outcome_of_an_earlier_attempt_does_not_count_for_a_later_one(make_world, target):
    target.script = ["/hang/echo", "/hang/echo"]
    before = make_world()
    job = before.create(target.url)
    hang(before, target, job)
    world = make_world()
    target.let_go.set()
    target.let_go.clear()
    turn_until(world, lambda: target.hanging.acquire(blocking=False))
    turn_until(before, lambda: not before.engine.run_queue._in_flight)

    assert states(world, job, "status", "attempts") == [("running", 2)]


# --- changes to jobs ------------------------------------------------------------------


@pytest.mark.parametrize("status", ["success", "pending"])
def test_deleting_a_job_ends_all_of_it_and_its_history_goes_in_batches(make_world, target, status):
    world = make_world(dispatcher__max_concurrent_per_host=1)
    job, other = [world.create(target.url + "/hang", concurrency="allow") for _ in range(2)]
    executions = [hang(world, target, job)]
    add_executions(world, other, 10, "success")
    executions.append(trigger(world, job))
    add_executions(world, job, 5000, status)
    left = [5002]

    world.engine.waiters._execution_ids |= {threading.Event(): id_ for id_ in executions}
    world.engine.hand_in(world.engine.job_changes.delete, job, False)
    while left[-1]:
        world.engine.run_turn(10_000)
        left.append(world.store.executions.count(job.id))
    assert all(told.is_set() for told in world.engine.waiters._execution_ids)
    world.settle()  # though the target still holds the request

    assert [job.id for job in world.all_jobs()] == [other.id]
    assert target.received.qsize() == 1
    assert world.store.executions.count(other.id) == 10
    assert max(before - after for before, after in itertools.pairwise(left)) <= 1000


def test_the_versions_of_a_deleted_job_go_in_batches_and_can_not_be_seen(world, target):
    job = world.create(target.url)
    job = add_versions(world, job, 300)

    world.engine.hand_in(world.engine.job_changes.delete, job, False)
    world.engine.run_turn()
    left = [len(version_numbers(world, job))]
    assert list(world.store.jobs.versions(job.id)) == []
    with pytest.raises(chronos.NotFound):
        world.store.jobs.version(job.id, 300)
    while left[-1]:
        world.engine.run_turn()
        left.append(len(version_numbers(world, job)))

    assert left[0] > 200
    assert max(before - after for before, after in itertools.pairwise(left)) <= 100


def test_what_is_left_of_a_deleted_job_does_not_come_back_with_its_id(world, target):
    [job] = declare(world, job_body(target.url))
    trigger(world, job)
    world.settle()
    job = add_versions(world, job, 300)
    declare(world)

    world.engine.hand_in(world.engine.job_changes.delete, world.store.jobs.get(job.id), False)
    [again] = declare(world, job_body(target.url))

    assert (again.id, again.version) == (job.id, 1)
    assert version_numbers(world, again) == [1]
    assert world.executions(again) == []


def test_a_declared_job_is_made_enabled_under_the_id_that_follows_from_its_name(world, target):
    body = job_body(target.url, schedule="@every 1m", timezone="Europe/Madrid")

    [job] = declare(world, body)

    namespace = uuid.UUID("ab032aef-5f06-4566-acdc-8c7694c9303c")
    assert job.id == str(uuid.uuid5(namespace, "report"))
    [version] = world.store.jobs.versions(job.id)
    assert (version["version"], version["created_by"]) == (1, "chronos.yaml")
    world.advance(60)
    assert states(world, job) == ["success"]
    assert declare(world, body) == []


def test_a_changed_declaration_is_a_version_and_moves_no_cursor_that_it_does_not_name(world):
    body = job_body(NOBODY, schedule="@every 1m")
    declare(world, body, job_body(NOBODY, name="other"))
    world.clock.advance(30)

    changed = declare(world, body | {"timeout": "9s"}, job_body(NOBODY, name="other"))

    assert [(job.config["timeout"], job.version) for job in changed] == [("9s", 2)]
    assert changed[0].next_run_at == at("12:01:00")
    assert len(list(world.store.jobs.versions(changed[0].id))) == 2


def test_what_somebody_disabled_stays_so_until_its_declaration_is_another(world):
    body = job_body(NOBODY)
    [job] = declare(world, body)
    world.do(world.engine.job_changes.set_enabled, job.id, False)

    retry_policy = "scheduler: {default_retry_policy: {max_attempts: 9}}"
    assert declare(world, body) == []
    [other_default] = declare(world, body, rest=retry_policy)
    [other] = declare(world, body | {"timeout": "9s"})

    assert (other_default.config["retry_policy"]["max_attempts"], other_default.enabled) == (9, 0)
    assert other.enabled
    [off] = declare(world, body | {"enabled": False})
    assert not off.enabled


def test_a_job_that_is_gone_from_the_file_is_disabled_and_may_be_changed_then(world):
    [job] = declare(world, job_body(NOBODY))

    [gone] = declare(world)

    assert (gone.enabled, gone.declared, gone.version) == (False, None, 1)
    world.do(world.engine.job_changes.roll_back, job.id, 1, "ada")
    [back] = declare(world, job_body(NOBODY))
    assert (back.id, back.enabled) == (job.id, True)


def test_a_declared_instant_that_has_passed_is_no_mistake_and_does_not_run_again(world, target):
    once = job_body(target.url, schedule="@at 2027-03-01T12:01:00Z")
    [job] = declare(world, once)
    world.advance(60)

    assert declare(world, once) == []
    [changed] = declare(world, once | {"timeout": "9s"})

    assert states(world, job) == ["success"]
    assert not changed.enabled


def test_many_declarations_are_spread_over_turns_none_of_which_is_long(tmp_path):
    clock = HookedClock()
    clock.hook = lambda: clock.advance(0.002)  # what a job takes
    world = World(tmp_path / "data", clock)
    bodies = [job_body(NOBODY, name=f"{n}") for n in range(100)]

    declarations = chronos.build_settings({"jobs": bodies}).jobs
    first = world.do(world.engine.job_changes.declare, list(declarations.items()))
    changed = declare_all(world, declarations)
    world.close()

    assert 5 <= first.done == len(first.changed) <= 20
    names = [job.config["name"] for job in first.changed + changed]
    assert names == [body["name"] for body in bodies]


def test_what_a_deleted_job_has_left_is_removed_over_turns_before_it_is_declared_anew(tmp_path):
    clock = HookedClock()
    world = World(tmp_path / "data", clock)
    body = job_body(NOBODY)
    declarations = chronos.build_settings({"jobs": [body]}).jobs
    [job] = declare_all(world, declarations)
    add_versions(world, job, 100)
    by_hand(world, "DELETE FROM jobs WHERE id = ?", job.id)
    clock.hook = lambda: clock.advance(0.005)  # what a batch takes

    first = world.do(world.engine.job_changes.declare, list(declarations.items()))
    left = version_numbers(world, job)
    [anew] = declare_all(world, declarations)
    numbers = version_numbers(world, job)
    world.close()

    assert first == (0, [])
    assert 60 < len(left) < 100
    assert (anew.id, anew.version, numbers) == (job.id, 1, [1])


def test_declared_jobs_are_listed_in_the_order_of_the_file(world):
    names = [f"job {n}" for n in range(20)]

    declare(world, *(job_body(NOBODY, name=name) for name in names))

    assert [job.config["name"] for job in world.all_jobs()] == names


# --- retention ------------------------------------------------------------------------


def look_over_all(world):
    """Make the engine look over the history of every job, as it does after a start."""
    world.engine.retention._prune_cursor = ""


def tidy(world):
    look_over_all(world)
    world.advance(60)


def test_of_a_job_the_newest_are_kept_and_beyond_them_100_that_failed(make_world, target):
    world = make_world(retention__executions_per_job=50)
    job, other = [world.create(target.url, enabled=False) for _ in range(2)]
    old_failed = add_executions(world, job, 150, "failed", NOON)
    add_executions(world, job, 500, "success", NOON)
    failed = add_executions(world, job, 10, "failed", NOON)
    newest = add_executions(world, job, 45, "skipped", NOON) + add_executions(
        world, job, 1, "waiting"
    )
    untouched = add_executions(world, other, 50, "success", NOON)

    tidy(world)

    assert [e.id for e in world.executions(job)] == old_failed[-94:] + failed + newest
    assert [e.id for e in world.executions(other)] == untouched


def test_what_is_too_old_goes_but_for_the_newest_ten_and_what_has_not_ended(make_world, target):
    world = make_world(retention__max_age="24h")
    idle, mixed = [world.create(target.url, enabled=False) for _ in range(2)]
    too_old = NOON - chronos.DAY - 1
    ten = add_executions(world, idle, 300, "failed", too_old)[-10:]
    running = add_executions(world, mixed, 1, "waiting")
    add_executions(world, mixed, 300, "success", too_old)
    young = add_executions(world, mixed, 20, "success", too_old + 3 * chronos.MINUTE + 1)

    world.advance(120)  # by then the clock is trusted
    world.advance(60)

    assert [e.id for e in world.executions(idle)] == ten
    assert [e.id for e in world.executions(mixed)] == running + young


def test_history_is_looked_over_once_a_day_even_of_jobs_that_never_run(world, target):
    job = world.create(target.url, enabled=False)
    add_executions(world, job, 30, "success", NOON)

    world.advance(29 * 24 * 3600)
    assert len(world.executions(job)) == 30
    world.advance(2 * 24 * 3600)
    world.advance(60)

    assert len(world.executions(job)) == 10


def test_a_run_pushes_the_oldest_one_out_at_once(make_world, target):
    world = make_world(retention__executions_per_job=3)
    job = world.create(target.url, enabled=False)

    ids = [run_once(world, job) for _ in range(6)]

    assert [e.id for e in world.executions(job)] == ids[-3:]


def add_answered(world, job, count, length=64_000):
    """Add executions of a job that were answered with so many bytes."""
    return add_executions(world, job, count, "success", response="x" * length)


def lengths(world, job):
    """Return the length of each response of a job, the oldest first; None: there is none."""
    return [e.response and len(e.response) for e in world.executions(job)]


def test_a_chatty_job_pushes_nothing_out_of_the_history_of_a_quiet_one(make_world):
    world = make_world(retention__max_size="2MB")
    quiet, chatty = [world.create(NOBODY, enabled=False) for _ in range(2)]
    add_answered(world, quiet, 12)

    for _ in range(5):
        add_answered(world, chatty, 40)
        world.advance(60)

    assert lengths(world, quiet) == [64_000] * 12
    kept = lengths(world, chatty)
    assert len(kept) == 200  # responses go before rows
    assert kept[:182] + kept[-10:] == [None] * 182 + [64_000] * 10


def look_now(world):
    """Make the engine look at the size of the history, as it does after each run."""
    world.clock.advance(1)
    set_number(world, "looked")
    world.settle()


def test_a_job_that_had_nothing_to_give_gives_as_soon_as_it_has_grown(make_world):
    world = make_world(retention__max_size="2MB")
    quiet, *chatty = [world.create(NOBODY, enabled=False) for _ in range(3)]
    for job in chatty:
        add_answered(world, job, 10, 90_000)
    add_answered(world, quiet, 60, 5_000)
    look_now(world)  # only the quiet one has more than ten
    kept = lengths(world, quiet)

    for _second in range(30):
        for job in chatty:
            add_answered(world, job, 2, 90_000)
        look_now(world)
        assert world.store.history.size() <= 2 * 10**6

    assert kept.count(5_000) > 20
    assert lengths(world, quiet) == kept


def test_jobs_that_had_nothing_to_give_are_looked_at_again_only_once_they_have_grown(make_world):
    world = make_world(retention__max_size="1MB")
    jobs = [world.create(NOBODY, enabled=False) for _ in range(100)]
    for job in jobs:
        add_answered(world, job, 10, 2_000)
    look_now(world)
    statements = []
    engine_connection(world).set_trace_callback(statements.append)

    for number in range(5):
        add_answered(world, jobs[number], 1, 2_000)
        world.advance(61)

    looks = [statement for statement in statements if "AS bare" in statement]
    assert 5 <= len(looks) <= 30
    assert all(lengths(world, job) == [2_000] * 10 for job in jobs)


def test_what_is_beyond_the_number_goes_also_while_the_size_is_being_looked_after(make_world):
    world = make_world(retention__max_size="1MB", retention__executions_per_job=10)
    job, *larger = [world.create(NOBODY, enabled=False) for _ in range(300)]
    world.settle()
    add_executions(world, job, 600, "success")
    for other in larger:
        add_answered(world, other, 1, 300_000)
    world.engine.retention._to_prune[job.id] = None

    for _turn in range(2):
        world.clock.advance(60)
        world.engine.run_turn()

    assert len(world.executions(job)) <= 100


def test_after_a_turn_that_failed_responses_still_go_before_rows(make_world, monkeypatch):
    world = make_world(retention__max_size="1MB")
    job = world.create(NOBODY, enabled=False)
    work = world.engine.retention.work

    def fail_afterwards(*arguments):
        work(*arguments)
        raise RuntimeError("a bug")

    world.settle()
    add_answered(world, job, 40)
    with monkeypatch.context() as patch:
        patch.setattr(world.engine.retention, "work", fail_afterwards)
        look_now(world)
    assert lengths(world, job) == [64_000] * 40
    world.advance(2)

    assert len(world.executions(job)) == 40
    assert world.store.history.size() <= 10**6


def test_large_versions_are_no_history_and_push_none_out(make_world, target):
    world = make_world(retention__max_size="1MB")
    job = world.create(target.url, enabled=False)
    ids = add_executions(world, job, 100, "success")

    for n in range(5):
        config = job.config | {"webhook": job.config["webhook"] | {"body": f"{n}" * 10**6}}
        job = world.do(world.engine.job_changes.update, job, config, None, "ada")
    run_once(world, job)

    assert [e.id for e in world.executions(job)][:100] == ids


def test_rows_go_where_no_response_is_left_and_never_the_newest_ten(make_world):
    world = make_world(retention__max_size="1MB", retention__executions_per_job=10_000)
    small, large = [world.create(NOBODY, enabled=False) for _ in range(2)]
    add_answered(world, small, 10, 40_000)
    ids = add_executions(world, large, 5_000, "success")

    world.advance(60)

    kept = [e.id for e in world.executions(large)]
    assert 1000 < len(kept) < 1500 and kept == ids[-len(kept) :]
    assert lengths(world, small) == [40_000] * 10


def test_among_many_jobs_the_one_that_has_something_to_give_is_found(make_world):
    world = make_world(retention__max_size="1MB")
    ten_each = [world.create(NOBODY, enabled=False) for _ in range(50)]
    for job in ten_each:
        add_answered(world, job, 10, 1567)
    giver = world.create(NOBODY, enabled=False)
    add_answered(world, giver, 12, 1000)

    world.advance(60)

    assert lengths(world, giver) == [None] * 2 + [1000] * 10
    assert {tuple(lengths(world, job)) for job in ten_each} == {(1567,) * 10}


def test_a_max_size_that_cannot_be_kept_is_said_once_and_in_health(make_world, caplog):
    world = make_world(retention__max_size="1MB")
    api = chronos.Api(world.engine, world.store, world.settings, world.clock)
    jobs = [world.create(NOBODY, enabled=False) for _ in range(3)]
    for job in jobs:
        add_answered(world, job, 10)

    for _ in range(10):
        world.advance(60)
    [told] = [line for line in caplog.messages if "max_size" in line]

    world.dispatcher._look_at_limits()  # nobody else does it here

    assert "the history has 1.9 MB, more than the 1 MB of retention.max_size" in told
    assert api.server.health()["details"] == [told]
    add_answered(world, jobs[0], 10, 200_000)
    look_now(world)
    assert "the history has 3.3 MB, more than the 1 MB" in api.server.health()["details"][0]
    assert [line for line in caplog.messages if "max_size" in line] == [told]
    for job in jobs[:2]:
        world.do(world.engine.job_changes.delete, job, False)
    world.settle()
    assert "details" not in api.server.health()


def test_the_size_of_the_history_is_known_after_another_start(make_world, target):
    world = make_world()
    job = world.create(target.url + "/echo", webhook={"body": "\u00e9" * 1000})
    run_once(world, job)

    [execution] = world.executions(job)
    known = make_world().store.history.size()

    assert known == execution.width == 400 + len(execution.attempt_log) + 2000


def test_beyond_max_size_the_oldest_history_goes_and_the_file_grows_no_more(make_world, target):
    world = make_world(retention__max_size="1MB", retention__executions_per_job=100_000)
    job = world.create(target.url, enabled=False)
    sizes, ids = [], []

    for _ in range(6):
        ids += add_executions(world, job, 2500, "success", NOON)
        world.advance(60)
        sizes.append(world.store.database.path.stat().st_size)

    kept = [e.id for e in world.executions(job)]
    assert 500 < len(kept) < 5000
    assert kept == ids[-len(kept) :]
    assert max(sizes[1:]) < sizes[1] * 1.2


@pytest.mark.parametrize("why", ["number", "age", "size", "deletion", "deletion of retries"])
def test_a_turn_removes_no_more_bytes_than_it_has_time_to_overwrite(make_world, why):
    limits = {
        "number": {"executions_per_job": 10},
        "age": {"max_age": "1h"},
        "size": {"max_size": "1MB"},
    }
    world = make_world(**{f"retention__{key}": value for key, value in limits.get(why, {}).items()})
    world.advance(120)  # by then the clock is trusted
    jobs = [world.create(NOBODY, enabled=False) for _ in range(2)]
    rows = ("success", NOON - chronos.DAY)
    if why == "deletion of retries":
        rows = ("waiting", None)
    for job in jobs:
        add_executions(world, job, 20, *rows, response="x" * 10**6)
    look_over_all(world)
    left = [40]
    if why.startswith("deletion"):
        for job in jobs:
            world.engine.hand_in(world.engine.job_changes.delete, job, False)

    while len(left) == 1 or left[-1] < left[-2]:
        world.clock.advance(60)
        world.engine.run_turn()
        left += by_hand(world, "SELECT count(response) FROM executions")[0]

    assert left[-1] == (0 if why.startswith("deletion") else 20)
    assert max(before - after for before, after in itertools.pairwise(left)) == 5


def test_what_has_not_ended_keeps_nothing_behind_it_from_going(make_world, target):
    world = make_world(retention__executions_per_job=1000)
    job = world.create(target.url, enabled=False, concurrency="allow")
    add_executions(world, job, 500, "waiting")
    ids = add_executions(world, job, 2000, "skipped", NOON)

    tidy(world)

    assert [e.id for e in world.executions(job)][500:] == ids[-1000:]


def test_under_load_every_job_is_looked_over_also_one_that_does_not_run(make_world, target):
    world = make_world(retention__executions_per_job=1)
    idle, *busy = [world.create(target.url, enabled=False) for _ in range(101)]
    add_executions(world, idle, 50, "success", NOON)
    look_over_all(world)

    for _ in range(100):  # of a tenth of a second
        for job in busy[:20]:
            add_executions(world, job, 1, "success", NOON)
        world.engine.retention._to_prune.update({job.id: None for job in busy})
        trigger(world, busy[-1])  # so that each pass takes something
        world.clock.advance(0.1)

    assert len(world.executions(idle)) == 1
    assert max(len(world.executions(job)) for job in busy[:20]) < 15


def version_numbers(world, job):
    """Return the numbers of a job's versions, the oldest first, also of a deleted job."""
    sql = "SELECT version FROM versions WHERE job_id = ? ORDER BY version"
    return [number for (number,) in by_hand(world, sql, job.id)]


def add_versions(world, job, newest, size=10):
    """Let a job have versions up to this number, each with so large a body."""
    config = job.config | {"webhook": job.config["webhook"] | {"body": "x" * size}}
    with world.store.database.transaction():
        for number in range(job.version + 1, newest + 1):
            world.store.jobs.save(job._replace(version=number, config=config), "tester")
    return world.store.jobs.get(job.id)


def test_of_a_job_the_newest_versions_stay_and_those_that_its_runs_have_used(make_world, target):
    world = make_world(retention__versions_per_job=20, retention__executions_per_job=2)
    job = world.create(target.url, enabled=False)
    trigger(world, job)
    job = add_versions(world, job, 60)
    trigger(world, job)
    world.settle()

    world.do(world.engine.job_changes.update, job, job.config | {"timeout": "9s"}, None, "ada")
    world.settle()
    assert version_numbers(world, job) == [1, *range(42, 62)]

    trigger(world, job)  # pushes the first run out, and with it the version that it used
    world.advance(1)
    assert version_numbers(world, job) == list(range(42, 62))


def test_what_older_releases_have_left_of_versions_goes_too(make_world, target):
    before = make_world()
    idle, gone = [before.create(target.url, enabled=False) for _ in range(2)]
    add_versions(before, idle, 150)
    add_versions(before, gone, 150)
    by_hand(before, "DELETE FROM jobs WHERE id = ?", gone.id)

    world = make_world()
    world.settle()

    assert version_numbers(world, idle) == list(range(51, 151))
    assert version_numbers(world, gone) == []


def test_history_is_removed_while_there_is_other_work_too(make_world, target):
    world = make_world(retention__executions_per_job=10)
    job = world.create(target.url, enabled=False)
    add_executions(world, job, 2000, "success", NOON)
    passes = 0

    while len(world.executions(job)) > 100 and passes < 100:
        passes += 1
        trigger(world, job)  # so that each pass takes something
        world.clock.advance(0.2)

    assert 5 < passes < 20


# --- alerts ---------------------------------------------------------------------------

ALERTS = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def make_watched(make_world, bell):
    """Makes a world that sends its alerts to the bell."""

    def make(after=1, path="", **overrides):
        webhook = chronos.validate(chronos.ALERT_FIELDS, {"url": bell.url + path})
        return make_world(alerts__webhook=webhook, alerts__after=after, **overrides)

    return make


@pytest.fixture
def watched(make_watched):
    return make_watched()


def run(world, target, job, *statuses):
    """Trigger a job once for each of these answers."""
    target.script = [f"/status/{status}" for status in statuses]
    for _ in statuses:
        run_once(world, job)


def rings(bell):
    """Return the body of each alert that has come."""
    return [json.loads(bell.take()[3]) for _ in range(bell.received.qsize())]


def play(make_watched, target, bell, after, scenario):
    """Play a scenario, and return what was told until each "?".

    "a404": a run of job a is answered so. "+5": seconds pass; "~5": the clock leaps so far.
    "crash": another start. "a!2" tells that a failed twice in a row, "a." that it is well again.
    """
    world, jobs, told = make_watched(after=after), {}, []
    webhook = world.settings.alerts.webhook
    for word in scenario.split():
        kind, rest = word[0], word[1:]
        if word == "?":
            told.append(",".join(map(in_short, rings(bell))) or "-")
        elif word == "crash":
            world = make_watched(after=after)
        elif word in ("off", "on"):
            value = webhook if word == "on" else None
            world.engine.settings = world.settings.replaced("alerts.webhook", value)
        elif kind in "+~":
            (world.advance if kind == "+" else world.clock.step)(float(rest))
        else:
            if kind not in jobs:
                jobs[kind] = world.create(target.url, name=kind)
            run(world, target, jobs[kind], rest)
    return " ".join(told)


def in_short(body):
    """Return of an alert what it tells of each job."""
    failed = [job["event"] == "failed" for job in body["jobs"]]
    assert body["event"] == ("failed" if any(failed) else "recovered")
    told = zip(body["jobs"], failed, strict=True)
    return "&".join(job["name"] + (f"!{job['failures']}" if bad else ".") for job, bad in told)


@pytest.mark.parametrize(("after", "scenario", "told"), [
    (1, "a200 a404 a404 +9.9 ? +0.1 ? a404 a404 +60 ? a200 a200 +10 ? ?", "- a!2 - a. -"),
    (3, "a404 a404 a200 a404 a404 +60 ? a404 +10 ?", "- a!3"),
    (1, "a404 +5 a200 b404 +5 ?", "a.&b!1"),  # within ten seconds it is one alert
    (1, "off a404 +60 ? on +60 ? a404 +10 ?", "- - a!2"),  # what was off is not made up for
    (1, "a404 ~-7200 +9 ? +1 ?", "- a!1"),  # the clock may step between the turn and its alert
    (1, "a404 crash +10 ?", "a!1"),
])  # fmt: skip
def test_a_turn_to_bad_or_well_is_told_once(make_watched, target, bell, after, scenario, told):
    assert play(make_watched, target, bell, after, scenario) == told


def test_an_alert_says_in_words_what_turned_and_shows_the_last_runs(watched, target, bell):
    job = watched.create(target.url)

    run(watched, target, job, 200, 404, 404)
    watched.advance(10)
    [bad] = rings(bell)
    run(watched, target, job, 200, 200)
    watched.advance(10)
    [well] = rings(bell)

    node = platform.node()
    assert bad["text"] == f"Chronos on {node}:\nreport fails: the server answered 404 Not Found"
    assert well["text"] == f"Chronos on {node}:\nreport is well again"
    assert bad["jobs"][0]["id"] == job.id
    assert [e["status"] for e in bad["jobs"][0]["executions"]] == ["failed", "failed", "success"]
    assert [e["status"] for e in well["jobs"][0]["executions"]] == ["success", "success", "failed"]


def test_a_job_that_can_not_be_used_is_told_at_once(make_watched, target, bell):
    world = make_watched(after=3)
    job = world.create(target.url, schedule="0 * * * *")
    spoil(world, job, json.dumps(job.config | {"timezone": "Gone/Zone"}))
    world.advance(3600)
    world.advance(10)
    [bad] = rings(bell)
    run(world, target, job, 200)  # it can still be triggered
    world.advance(3600)
    assert rings(bell) == []

    spoil(world, job, json.dumps(job.config))
    for seconds in (60, 60, 3600, 10):
        world.advance(seconds)

    assert "Gone/Zone" in bad["text"] and bad["event"] == "failed"
    assert [alert["event"] for alert in rings(bell)] == ["recovered"]


def test_an_alert_is_an_execution_of_a_built_in_job(watched, target, bell):
    run(watched, target, watched.create(target.url), 404)
    watched.advance(10)

    method, _path, headers, _body, _at = bell.take()
    [alert] = watched.store.executions.newest(ALERTS, 10)

    assert (alert.trigger, alert.status, alert.job_name) == ("alert", "success", "alerts")
    assert (method, headers["Content-Type"]) == ("POST", "application/json")
    assert headers["X-Chronos-Execution-ID"] == alert.id


def test_an_alert_needs_no_response_and_reads_none(watched, target, bell):
    target.script = ["/status/404"]
    job = watched.create(target.url)
    run_once(watched, job)
    assert watched.executions(job)[0].response

    [read] = watched.store.executions.last_verdicts(job.id, 3)
    watched.advance(10)

    assert (read.job_name, read.response, read.attempt_log) == ("report", None, "[]")
    assert rings(bell)[0]["jobs"][0]["executions"] == [json.loads(json.dumps(read.to_json()))]


def test_fifty_jobs_that_fail_at_once_are_one_alert(watched, target, bell):
    jobs = [watched.create(target.url + "/status/404", name=f"job {n}") for n in range(50)]
    for job in jobs[:49]:
        trigger(watched, job)
    watched.settle()
    watched.advance(9)
    trigger(watched, jobs[49])
    watched.settle()
    watched.advance(1)

    [body] = rings(bell)
    assert [job["id"] for job in body["jobs"]] == [job.id for job in jobs]
    lines = body["text"].splitlines()
    assert (len(lines), lines[1][:12], lines[-1]) == (12, "job 0 fails:", "and 40 more")
    watched.advance(600)
    assert rings(bell) == []


def test_an_alert_about_very_many_jobs_counts_those_that_it_does_not_show(watched, bell):
    add_jobs(watched, 1000, NOBODY)
    by_hand(watched, "UPDATE jobs SET failures = 1 WHERE seq > 0")
    with watched.store.database.transaction():
        watched.store.news.note_turned(
            {job.id for job in watched.all_jobs()}, 1, watched.clock.now()
        )
    watched.advance(10)

    [body] = rings(bell)
    assert (body["jobs_total"], len(body["jobs"])) == (1000, 50)
    assert body["text"].endswith("and 990 more")


def test_an_alert_about_the_longest_names_fits_into_a_body(watched, target, bell):
    for n in range(60):
        job = watched.create(target.url + "/status/404", name=f"{n:02}" + "\U0001f4a5" * 198)
        for _ in range(3):
            trigger(watched, job)
            watched.settle()
    watched.advance(10)

    [body] = rings(bell)
    assert (body["jobs_total"], len(body["jobs"])) == (60, 50)
    assert all(len(job["executions"]) == 3 for job in body["jobs"])


@pytest.mark.parametrize(("length", "node", "jobs", "runs"), [
    (100, "x", 50, 3), (2_000, "x", 50, 3), (100_000, "x", 50, 3),
    (100_000, "\U0001f4a5", 20, 1),
])  # fmt: skip
def test_an_alert_is_made_smaller_until_it_fits(watched, bell, length, node, jobs, runs):
    for job in add_jobs(watched, 60, NOBODY, name="\U0001f4a5" * 200):
        add_executions(watched, job, 3, "failed", error="\U0001f4a5" * length, node_id=node * 100)
    with watched.store.database.transaction():
        ids = {job.id for job in watched.all_jobs()}
        watched.store.news.note_turned(ids, 1, watched.clock.now())
    watched.advance(10)

    [body] = rings(bell)
    assert (body["event"], body["jobs_total"], len(body["jobs"])) == ("failed", 60, jobs)
    assert {len(job["executions"]) for job in body["jobs"]} == {runs}
    errors = {run["error"] for job in body["jobs"] for run in job["executions"]}
    assert errors == {"\U0001f4a5" * min(length, 200) + (" …" if length > 200 else "")}


def test_what_goes_wrong_with_an_alert_is_logged_once_a_minute(
    watched, target, bell, monkeypatch, caplog
):
    job = watched.create(target.url)
    with monkeypatch.context() as patch:
        patch.setattr(chronos, "MAX_BODY_BYTES", 100)  # nothing fits
        patch.setitem(chronos.WEBHOOK_FIELDS, "body", chronos.Field(chronos.a_text(100), None))
        run(watched, target, job, 404)
        for _ in range(50):
            watched.clock.advance(1)
            watched.engine.run_turn()
        told = [line for line in caplog.messages if "alerts: no alert could be made" in line]
        assert len(told) == 1 and "webhook.body" in caplog.text
    watched.advance(60)

    assert [body["event"] for body in rings(bell)] == ["failed"]


def test_what_was_cancelled_replaced_or_in_the_way_neither_breaks_nor_mends(
    make_watched, target, bell
):
    world = make_watched()
    forbids, replaces, broken = [
        world.create(target.url + "/hang", name=name, concurrency=concurrency)
        for name, concurrency in (("a", "forbid"), ("b", "replace"), ("c", "forbid"))
    ]
    run(world, target, broken, 404)
    world.advance(10)
    assert len(rings(bell)) == 1

    for job in (forbids, replaces, broken):
        hang(world, target, job)
        trigger(world, job)  # skipped, or replaces the one before
    for job in (forbids, replaces, broken):
        for execution in world.executions(job):
            if execution.completed_at is None:
                world.do(world.engine.run_queue.cancel, job.id, execution.id, "ada")
    world.settle()
    world.advance(60)

    ends = [reason for job in (forbids, replaces) for reason in states(world, job, "reason")]
    assert {reason for (reason,) in ends} == {"cancelled", "replaced", "overlap"}
    assert rings(bell) == []


def test_an_alert_says_why_a_job_fails_whatever_ended_otherwise_since(watched, target, bell):
    job = watched.create(target.url)
    run(watched, target, job, 404)
    target.script = ["/hang"]
    execution_id = hang(watched, target, job)
    trigger(watched, job)  # skipped
    watched.do(watched.engine.run_queue.cancel, job.id, execution_id, "ada")
    watched.settle()
    watched.advance(10)

    assert states(watched, job, "reason") == [("http_status",), ("cancelled",), ("overlap",)]
    assert rings(bell)[0]["text"].endswith("report fails: the server answered 404 Not Found")


def test_missed_fire_times_are_an_alert_as_failures_are(make_watched, target, bell):
    world = make_watched()
    world.create(target.url, schedule="* * * * *", missed_run_policy="ignore")

    world.advance(300)
    world.advance(10)

    [body] = rings(bell)
    assert body["jobs"][0]["executions"][0]["missed_count"] == 5
    assert "report fails: 5 fire times from " in body["text"]


def test_an_alert_that_fails_is_tried_again_and_raises_none(make_watched, target, bell, caplog):
    caplog.set_level("INFO", "chronos")
    world = make_watched(path="/status/503")
    run(world, target, world.create(target.url), 404)

    for _ in range(60):
        world.advance(60)

    [alert] = world.store.executions.newest(ALERTS, 10)
    assert (alert.status, alert.reason) == ("failed", "http_status")
    assert (alert.attempts, bell.received.qsize()) == (10, 10)
    assert {json.dumps(body) for body in rings(bell)} == {alert_body(world, alert)}
    assert f"alerts: {alert.id} failed in attempt 1: the server answered 503" in caplog.text
    assert f"alerts: {alert.id} failed: the server answered 503" in caplog.text


def alert_body(world, alert):
    config = world.store.jobs.version(ALERTS, alert.job_version)["config"]
    return json.dumps(json.loads(config["webhook"]["body"]))


def test_what_turns_while_an_alert_is_under_way_is_told_after_it(watched, target, bell):
    bell.script = ["/status/503", "/status/503", "/status/503"]  # it waits for 5, 10 and 20 s
    first, second = [watched.create(target.url, name=name) for name in "ab"]
    run(watched, target, first, 404)
    watched.advance(10)
    run(watched, target, second, 404)

    for seconds in (5, 10, 10):
        watched.advance(seconds)
    assert watched.engine.run_turn() > 0  # what is due and has to wait keeps nobody busy
    assert len(list(watched.store.executions.newest(ALERTS, 10))) == 1
    watched.advance(10)

    assert [[job["name"] for job in body["jobs"]] for body in rings(bell)] == [["a"]] * 4 + [["b"]]


def test_a_bug_in_alerts_is_in_the_way_of_nothing_else(watched, target, bell, monkeypatch, caplog):
    job = watched.create(target.url)
    run(watched, target, job, 404)
    with monkeypatch.context() as patch:
        patch.setattr(watched.store.news, "save_alert", None)
        watched.advance(10)
        run(watched, target, job, 200, 404)
        assert "TypeError" in caplog.text
        assert watched.engine.problem is None
    watched.advance(60)

    assert [body["event"] for body in rings(bell)] == ["failed"]


def test_nobody_sees_the_key_in_the_url_of_the_alerts(make_service, clock, target, bell, caplog):
    def refuses(handler):
        return 404, f"No {handler.path}", f"no hook {handler.path[7:]}".encode()

    caplog.set_level("DEBUG", "chronos")
    bell.behave = refuses
    hook = {"url": f"{bell.url}/hooks/{CANARY}?room=dog%2D{CANARY}"}
    webhook = chronos.validate(chronos.ALERT_FIELDS, hook)
    service = make_service(clock, alerts__webhook=webhook)
    service.post(trigger_path(service.create(target.url + "/status/404")))
    clock.advance(10)
    assert bell.take()[1].count(CANARY) == 2

    [alert] = wait_until(lambda: ended_of(service, ALERTS))
    paths = ("", "/versions", "/versions/1", f"/executions/{alert['id']}", "/executions")
    shown = [service.get(f"/jobs/{ALERTS}{path}") for path in paths]

    assert shown[0]["webhook"]["url"] == shown[3]["request"]["url"] == f"{bell.url}/********"
    assert "no hook ********" in alert["response"] and "No ********" in alert["error"]
    assert CANARY not in json.dumps(shown) + caplog.text


def test_an_alert_can_be_signed_and_nobody_sees_the_secret(make_service, clock, target, bell):
    hook = {"url": bell.url, "signing_secret": SIGNING_SECRET}
    webhook = chronos.build_settings({"alerts.webhook": hook}).alerts.webhook
    service = make_service(clock, alerts__webhook=webhook)
    service.post(trigger_path(service.create(target.url + "/status/404")))
    clock.advance(10)

    _method, _path, headers, body, _at = bell.take()
    assert headers["webhook-signature"] == signature_of(headers, body)
    [alert] = wait_until(lambda: ended_of(service, ALERTS))
    shown = [service.get(f"/jobs/{ALERTS}{path}") for path in ("", "/versions")]
    shown.append(service.get(f"/jobs/{ALERTS}/executions/{alert['id']}"))
    assert shown[2]["request"]["headers"]["webhook-signature"] == MASK
    assert SIGNING_KEY not in json.dumps(shown)


def ended_of(service, job_id):
    """Return the executions of a job that have ended."""
    found = service.get(f"/jobs/{job_id}/executions")["executions"]
    return [execution for execution in found if execution["completed_at"]]


def test_the_built_in_job_is_in_no_list_and_no_total(watched, target, bell):
    job = watched.create(target.url)
    run(watched, target, job, 404)
    watched.advance(10)

    assert [job.id for job in watched.all_jobs()] == [job.id]
    counts = watched.store.counts()
    assert [counts[name] for name in ("jobs_total", "enabled", "failing")] == [1, 1, 1]
    assert watched.store.jobs.get(ALERTS).config["name"] == "alerts"
    assert declare(watched) == []


def test_old_alerts_leave_no_versions_behind(make_watched, target, bell):
    world = make_watched(retention__executions_per_job=3)
    job = world.create(target.url)

    for _ in range(5):
        run(world, target, job, 404, 200)
        world.advance(10)

    kept = [alert.job_version for alert in world.store.executions.newest(ALERTS, 10)]
    assert kept == [5, 4, 3]
    assert {version["version"] for version in world.store.jobs.versions(ALERTS)} <= {5, 4, 3, 2}


def test_a_job_whose_last_attempt_a_crash_interrupted_is_told(make_watched, target, bell):
    before = make_watched()
    job = before.create(target.url + "/hang", retry_policy={"max_attempts": 1})
    hang(before, target, job)

    world = make_watched()
    world.engine.run_turn()
    world.advance(10)

    assert "report fails: the server ended during the attempt" in rings(bell)[0]["text"]


def test_alerts_are_found_in_the_history_and_their_job_is_nobodys_to_change(
    make_service, target, bell, monkeypatch
):
    monkeypatch.setattr(chronos, "ALERT_GATHER", 1000)
    webhook = {"url": bell.url, "headers": {"Authorization": "Bearer secret"}}
    client = make_service(alerts__webhook=chronos.validate(chronos.ALERT_FIELDS, webhook))
    job = client.create(target.url + "/status/404", enabled=True)
    assert client.error(404, "GET", f"/jobs/{ALERTS}/executions")["code"] == "NOT_FOUND"
    client.post(trigger_path(job))
    assert bell.take()[2]["Authorization"] == "Bearer secret"

    [alert, failed] = client.get("/executions")["executions"]
    assert (alert["trigger"], alert["job_name"], failed["job_id"]) == ("alert", "alerts", job["id"])
    request = client.get(f"/jobs/{ALERTS}/executions/{alert['id']}")["request"]
    assert json.loads(request["body"])["jobs"][0]["executions"][0]["id"] == failed["id"]
    assert request["headers"]["Authorization"] == MASK
    assert client.get("/jobs")["total"] == client.get("/cluster/status")["jobs_total"] == 1
    assert client.get("/stats")["jobs_total"] == len(client.get("/stats")["jobs"]) == 1
    assert client.get("/stats")["last_24h"]["success"] == 0
    for path in ("/jobs?q=alerts", "/jobs?enabled=false", "/jobs?status=success"):
        assert client.get(path)["jobs"] == [], path
    for method, rest, body in (("PATCH", "", {"timeout": "9s"}), ("DELETE", "", None),
                               ("POST", "/enable", None)):  # fmt: skip
        assert client.error(409, method, f"/jobs/{ALERTS}{rest}", body)["code"] == "CONFLICT"


def test_killed_before_its_alert_or_during_it_a_process_tells_it_after_the_next_start(
    make_process, target, bell
):
    bell.script = ["/hang", "/ok"]
    config = f"alerts: {{webhook: {{url: '{bell.url}'}}}}"
    process = make_process(config)
    process.call("POST", trigger_path(process.create(target.url + "/status/404")))
    process.end(signal.SIGKILL)

    process = make_process(config)
    assert bell.hanging.acquire(timeout=20)
    process.end(signal.SIGKILL)
    process = make_process(config)

    calls = [bell.received.get(timeout=20) for _ in range(2)]
    assert len({call[2]["X-Chronos-Execution-ID"] for call in calls}) == 1
    assert [call[2]["X-Chronos-Attempt"] for call in calls] == ["1", "2"]
    assert len({call[3] for call in calls}) == 1
    bell.let_go.set()


# --- what is kept in memory -----------------------------------------------------------


def test_versions_with_large_bodies_are_kept_ready_up_to_a_limit(world, target):
    webhook = {"url": target.url, "body": "\N{FIRE}" + "x" * 500_000}  # 4 bytes a character
    jobs = [world.create(target.url, webhook=webhook) for _ in range(20)]
    world.engine.versions.clear()

    tracemalloc.start()
    for job in jobs * 2:
        assert world.engine.versions.get(job.id, 1).webhook.request.body
    kept, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert kept < 1.2 * chronos.VERSION_CACHE_BYTES
    again = [world.engine.versions.get(jobs[-1].id, 1) for _ in range(2)]
    assert again[0] is again[1]


def test_an_idle_worker_keeps_nothing_of_its_last_attempt(world, target):
    job = world.create(target.url)
    webhook = weakref.ref(world.engine.versions.get(job.id, 1).webhook)

    trigger(world, job)
    world.settle()
    world.engine.versions.clear()

    wait_until(lambda: webhook() is None)


# ======================================================================================
# 16. Engine
# ======================================================================================

# --- passes ---------------------------------------------------------------------------


def test_a_pass_with_nothing_to_do_writes_nothing_but_the_heartbeat(world, target):
    world.create(target.url)
    world.settle()
    with open_database(world.store.database.path) as observer:
        commits = lambda: observer.execute("PRAGMA data_version").fetchone()[0]
        before = commits()

        for _ in range(59):
            world.advance(1)
            assert commits() == before
        world.advance(1)

        assert commits() == before + 1
    assert world.store.number("last_seen") == at("12:01:00")


@pytest.mark.parametrize(
    ("error", "code"),
    [(chronos.Conflict("no"), "CONFLICT"), (RuntimeError("oh"), "INTERNAL_ERROR")],
)
def test_changes_are_one_commit_and_one_that_fails_takes_no_other_with_it(world, error, code):
    def fail(_turn):
        world.store.set_number("b", 1)
        raise error

    statements = []
    engine_connection(world).set_trace_callback(statements.append)
    first = set_number(world, "a")
    second = world.engine.hand_in(fail)
    third = set_number(world, "c")
    world.engine.run_turn()

    with pytest.raises(chronos.ApiError) as refusal:
        second.result(5)
    assert refusal.value.code == code
    assert (first.result(5), third.result(5)) == (None, None)
    assert {"a", "b", "c"} & set(numbers(world)) == {"a", "c"}
    assert statements.count("COMMIT") == 1


def test_who_has_waited_too_long_withdraws_a_change_that_was_not_begun(world, target, monkeypatch):
    job = world.create(target.url)
    monkeypatch.setattr(chronos, "WRITE_PATIENCE_S", 0.05)

    with pytest.raises(chronos.StoreError, match="nothing was changed"):
        world.engine.submit(world.engine.job_changes.set_enabled, job.id, False)
    world.settle()

    assert world.store.jobs.get(job.id).enabled


def test_a_change_that_begins_as_its_thread_gives_up_is_not_denied(world, monkeypatch, background):
    begun, gave_up = threading.Event(), threading.Event()

    class Impatient(concurrent.futures.Future):
        def result(self, timeout=None):
            if timeout is None:
                return super().result(10)
            assert begun.wait(10)
            raise TimeoutError

        def cancel(self):
            assert not super().cancel()
            gave_up.set()

    def change(_turn):
        begun.set()
        assert gave_up.wait(10)
        world.store.set_number("a", 1)

    monkeypatch.setattr(chronos, "Future", Impatient)
    answer = background.submit(world.engine.submit, change)
    turn_until(world, answer.done)

    assert answer.result() is None
    assert "a" in numbers(world)


def test_a_pass_with_long_work_to_do_is_cut_short_and_the_next_follows_at_once(tmp_path, target):
    world = World(tmp_path / "data", HookedClock())
    jobs = add_jobs(world, 30, target.url, schedule="0 * * * *", missed_run_policy="execute_all")
    world.clock.advance(50 * 3600)
    world.clock.hook = lambda: world.clock.advance(0.01)

    done = [0]
    while done[-1] < 30:
        wait = world.engine.run_turn()
        done.append(sum(bool(world.executions(job)) for job in jobs))
        assert 0 < done[-1] - done[-2] <= 6 and (wait == 0 or done[-1] == 30)
    world.close()


# --- what a turn has seen is counted before it answers --------------------------------


def test_a_change_in_the_turn_of_an_end_answers_with_its_count(world, target):
    job = world.create(target.url + "/status/404")
    trigger(world, job)
    wait_until(world.engine._inbox.qsize)  # the outcome, for the turn that makes the change

    changed = world.do(world.engine.job_changes.set_enabled, job.id, False)

    assert (changed.strip, changed.failures) == ("F", 1)


def test_an_alert_in_the_turn_of_a_success_tells_why_the_job_had_failed(watched, target, bell):
    target.script = ["/status/404", "/hang"]
    job = watched.create(target.url)
    run_once(watched, job)
    hang(watched, target, job)
    watched.clock.advance(10)
    target.let_go.set()
    wait_until(watched.engine._inbox.qsize)  # the success, for the turn that sends the alert

    watched.settle()

    told = rings(bell)
    assert "report fails: the server answered 404" in told[0]["text"]


# --- changes that meet outcomes -------------------------------------------------------


def ending(world, job, execution_id, how):
    """Return a change that ends a run, and its arguments."""
    return {
        "cancel": (world.engine.run_queue.cancel, job.id, execution_id, "tester"),
        "replace": (world.engine.run_queue.trigger, job.id, f"exec-{uuid.uuid4()}"),
        "delete": (world.engine.job_changes.delete, job, False),
    }[how]


def change_while_it_ends(world, target, change, *arguments):
    """Make a change in a pass that has begun when the request that hangs ends."""

    def late(turn):
        target.let_go.set()
        wait_until(world.engine._inbox.qsize)  # the outcome, for the next pass
        return change(turn, *arguments)

    return world.do(late)


def pointed_at(job, url):
    """Return the configuration of a job with another URL."""
    return job.config | {"webhook": job.config["webhook"] | {"url": url}}


@pytest.mark.parametrize("path", ["/hang/ok", "/hang/status/503"])
@pytest.mark.parametrize(("how", "after"), [
    ("cancel", [("failed", "cancelled")]),
    ("replace", [("failed", "replaced"), ("success", None)]),
    ("delete", []),
])  # fmt: skip
def test_an_outcome_that_comes_while_its_run_is_ended_is_ignored(world, target, path, how, after):
    target.script = [path]
    job = world.create(target.url, concurrency="replace")
    execution_id = hang(world, target, job)

    change_while_it_ends(world, target, *ending(world, job, execution_id, how))
    world.advance(60)

    assert states(world, job, "status", "reason") == after
    assert target.received.qsize() == (2 if how == "replace" else 1)
    assert not world.engine.run_queue._in_flight


@pytest.mark.parametrize(("how", "after", "refusal"), [
    ("cancel", ["success"], "has ended: success"),
    ("replace", ["success", "success"], "None"),
    ("delete", [], "None"),
])  # fmt: skip
def test_an_outcome_that_came_before_its_run_is_ended_counts(world, target, how, after, refusal):
    target.script = ["/hang/ok"]
    job = world.create(target.url, concurrency="replace")
    execution_id = hang(world, target, job)

    target.let_go.set()
    wait_until(world.engine._inbox.qsize)
    change = world.engine.hand_in(*ending(world, job, execution_id, how))
    world.settle()

    assert states(world, job) == after
    assert refusal in str(change.exception(5))


def test_a_run_whose_job_is_changed_while_it_ends_goes_on_as_it_began(world, target):
    target.script = ["/hang/status/503"]
    job = world.create(target.url + "/old")
    hang(world, target, job)

    change = (
        world.engine.job_changes.update,
        job,
        pointed_at(job, target.url + "/new"),
        None,
        "tester",
    )
    assert change_while_it_ends(world, target, *change).version == 2
    world.advance(1)

    assert states(world, job, "job_version", "status", "attempts") == [(1, "success", 2)]
    assert [target.take()[1] for _ in range(2)] == ["/hang/status/503", "/old"]


def test_a_change_that_is_refused_aborts_nothing(world, target, monkeypatch):
    job = world.create(target.url + "/hang", schedule="* * * * *", concurrency="replace")
    execution_id = hang(world, target, job)
    world.clock.advance(61)
    monkeypatch.setattr(world.store.jobs, "due", lambda *_: [])  # only the change reaches it

    with pytest.raises(chronos.ApiError, match="no version 9"):
        world.do(world.engine.job_changes.roll_back, job.id, 9, "tester")

    assert world.engine.run_queue._in_flight[execution_id].reason is None
    assert states(world, job) == ["running"]


# --- the disk is full -----------------------------------------------------------------


def test_a_full_disk_refuses_every_change_of_the_pass(world):
    world.engine.run_turn()
    known = numbers(world)
    fill_disk(world)

    writes = [set_number(world, key) for key in ("a", "b" * 90_000, "c")]
    world.engine.run_turn()

    for write in writes:
        with pytest.raises(chronos.StoreError, match="disk is full") as refusal:
            write.result(5)
        assert refusal.value.code == "STORE_ERROR"
    assert numbers(world) == known
    assert "disk is full" in world.engine.problem
    free_disk(world)
    again = set_number(world, "b" * 90_000)
    world.engine.run_turn()
    assert again.result(5) is world.engine.problem is None


def test_an_outcome_that_a_full_disk_refuses_is_kept_and_written_later(world, target):
    target.script = ["/hang/echo"]
    job = world.create(target.url, webhook={"body": "x" * 60_000})
    hang(world, target, job)
    fill_disk(world)

    target.let_go.set()
    turn_until(world, lambda: world.engine.problem)
    world.engine.run_turn()
    assert states(world, job) == ["running"]
    free_disk(world)
    world.settle()

    assert states(world, job, "status", "response") == [("success", "x" * 60_000)]
    assert target.received.qsize() == 1


def test_a_version_that_was_rolled_back_with_its_pass_sends_nothing(world, target):
    job = world.create(target.url)
    config = pointed_at(job, target.url + "/refused")
    fill_disk(world)
    world.engine.hand_in(world.engine.job_changes.update, job, config, None, "tester")
    world.engine.hand_in(world.engine.run_queue.trigger, job.id, "exec-1")
    set_number(world, "b" * 90_000)
    world.engine.run_turn()
    free_disk(world)

    config = pointed_at(job, target.url + "/made")
    world.do(world.engine.job_changes.update, job, config, None, "tester")
    run_once(world, job)

    assert target.take()[1] == "/made"


# --- errors that nobody expected ------------------------------------------------------


def test_an_error_of_passes_is_logged_once_a_minute_and_its_end_is_logged(world, caplog):
    fill_disk(world)
    for minute in (1, 2):
        for _ in range(61):
            set_number(world, "b" * 90_000)
            world.engine.run_turn()
            world.clock.advance(1)
        assert len(caplog.messages) == caplog.text.count("disk is full") == minute

    free_disk(world)
    world.engine.run_turn()

    assert caplog.messages[2:] == ["the engine works again"]


def test_an_error_that_leaves_a_pass_does_not_end_the_engine(service, target, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(service.service.engine, "_after_commit", a_bug)
        wait_until(lambda: service.call("GET", "/health")[0] == 503)

    service.create(target.url)
    wait_until(lambda: service.call("GET", "/health")[0] == 200)
    assert tracebacks(caplog) == ["the engine failed, it tries again: a bug"]


def test_an_error_in_passes_is_logged_once_and_shown_and_delays_fire_times(
    service, target, monkeypatch, caplog
):
    fields = {"schedule": "@every 1s", "enabled": True, "concurrency": "allow"}
    first = chronos.parse_time(service.create(target.url, **fields)["next_run"])
    with monkeypatch.context() as patch:
        patch.setattr(service.service.store.jobs, "due", a_bug)
        wait_until(lambda: service.call("GET", "/health")[0] == 503)
        shown = service.error(503, "GET", "/health")
        refused = service.error(500, "POST", "/jobs", job_body(NOBODY))

    fired = [target.take()[2]["X-Chronos-Scheduled-Time"] for _ in range(3)]
    assert service.get("/health")["status"] == "healthy"

    assert shown == {"code": "UNAVAILABLE", "message": "a bug"}
    assert refused["code"] == "INTERNAL_ERROR"
    assert sorted(map(chronos.parse_time, fired)) == [first + n * SECOND for n in range(3)]
    assert tracebacks(caplog) == ["the engine failed, it tries again: a bug"]
    assert caplog.messages.count("the engine works again") == 1


def test_an_error_without_words_is_shown_too(world, monkeypatch):
    def no_memory(_now, _most):
        raise MemoryError

    monkeypatch.setattr(world.store.jobs, "due", no_memory)
    world.engine.run_turn()

    assert world.engine.problem


@pytest.mark.parametrize("step", [
    "_reporter.tell_of_attempt", "_reporter.tell_of_end", "run_queue.after_commit",
    "_submissions._answer", "waiters.wake",
])  # fmt: skip
def test_a_bug_after_a_commit_stops_none_of_the_other_steps(
    world, target, monkeypatch, caplog, step
):
    job = world.create(target.url)
    execution_id = trigger(world, job)
    waiter = threading.Event()
    world.engine.waiters._execution_ids[waiter] = execution_id
    wait_until(world.engine._inbox.qsize)
    writer = set_number(world, "a")
    owner, _dot, name = step.rpartition(".")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(world.engine, owner), name, a_bug)
        world.engine.run_turn()

    assert writer.done()  # with an error, if it could not be told what its change returned
    assert isinstance(writer.exception(), chronos.InternalError) == (name == "_answer")
    assert waiter.is_set() or name == "wake"
    [told] = tracebacks(caplog)
    assert told.startswith("a bug: the engine could not ")
    assert states(world, job) == ["success"] and run_once(world, job)


def test_a_bug_in_telling_of_a_failed_turn_leaves_no_writer_without_an_answer(world, monkeypatch):
    writer = set_number(world, "a")
    with monkeypatch.context() as patch:
        patch.setattr(world.store.jobs, "due", a_bug)
        patch.setattr(world.engine._reporter, "tell_of_failure", a_bug)
        world.engine.run_turn()

    assert isinstance(writer.exception(timeout=0), chronos.InternalError)


def test_what_was_taken_runs_though_there_was_a_bug_in_answering(world, target, monkeypatch):
    job = world.create(target.url)
    world.engine.hand_in(world.engine.run_queue.trigger, job.id, "exec-1")

    with monkeypatch.context() as patch:
        patch.setattr(world.engine._submissions, "_answer", a_bug)
        world.engine.run_turn()
    world.settle()

    assert states(world, job) == ["success"]


def test_an_error_in_a_worker_fails_its_execution_and_not_the_worker(
    make_service, target, monkeypatch, caplog
):
    service, died = make_service(dispatcher__max_concurrent_jobs=1), []
    monkeypatch.setattr(threading, "excepthook", died.append)
    job = service.create(target.url, retry_policy=ONCE)
    with monkeypatch.context() as patch:
        patch.setattr(service.service.engine.dispatcher, "_judge", a_bug)
        status, envelope = service.call("POST", trigger_path(job, "?wait=2s"))

    assert (status, died) == (500, [])
    assert envelope["error"]["code"] == "EXECUTION_ERROR"
    assert len(tracebacks(caplog)) == 1
    assert service.post(trigger_path(job))["status"] == "success"


def test_an_error_in_the_watchdog_ends_no_limit_and_is_logged_once(
    service, target, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        patch.setattr(service.service.engine.dispatcher, "close_idle", a_bug)
        wait_until(lambda: tracebacks(caplog))
        job = service.create(target.url + "/hang", timeout="300ms", retry_policy=ONCE)
        error = service.error(500, "POST", trigger_path(job))

    assert "within the timeout" in error["message"]
    assert tracebacks(caplog) == ["the watchdog failed, continuing"]


# --- the stop -------------------------------------------------------------------------


def test_an_outcome_that_arrives_during_the_stop_is_written(make_service, target, monkeypatch):
    begun, clock = threading.Event(), HookedClock()
    monkeypatch.setattr(chronos, "Clock", lambda: clock)
    client = make_service(server__shutdown_grace="0s")
    engine, job = client.service.engine, client.create(target.url + "/hang")

    def last_pass(_turn):
        begun.set()
        target.let_go.set()
        wait_until(lambda: engine._inbox.qsize() == 2)  # the outcome, the call to stop

    def hook():
        if threading.current_thread() is threading.main_thread():  # it begins to count the grace
            clock.hook = HookedClock.hook
            engine.hand_in(last_pass)
            assert begun.wait(10)

    client.start(job)
    assert target.hanging.acquire(timeout=10)
    clock.hook = hook
    engine.stop(0)

    assert client.get(path_of(job))["last_execution"]["status"] == "success"


def test_while_the_server_stops_no_change_erases_a_due_fire_time(world, target):
    job = world.create(target.url, schedule="* * * * *")
    world.clock.advance(61)
    world.engine.stopping = True

    with pytest.raises(chronos.ApiError, match="is stopping") as refusal:
        world.do(world.engine.job_changes.set_enabled, job.id, False)

    assert refusal.value.code == "UNAVAILABLE"
    assert world.store.jobs.get(job.id).next_run_at == NOON + 60 * SECOND


def test_a_trigger_during_the_stop_is_answered_at_once_and_run_by_the_next_start(
    make_service, make_world, target, background
):
    service = make_service()
    busy, job = service.create(target.url + "/hang"), service.create(target.url)
    service.start(busy)
    target.take()
    stopping = background.submit(service.service.engine.stop, 20 * SECOND)
    wait_until(lambda: service.service.engine.stopping)

    execution = service.expect(202, "POST", trigger_path(job))
    assert not stopping.done()
    target.let_go.set()
    stopping.result(10)
    assert target.received.empty()
    world = make_world()
    world.settle()

    assert execution["status"] == "pending"
    assert world.store.executions.get(None, execution["id"]).status == "success"
    assert target.take()[2]["X-Chronos-Execution-ID"] == execution["id"]


# ======================================================================================
# 17. API
# ======================================================================================

NO_ID = "11111111-1111-4111-8111-111111111111"


def send_as_is(client, method, path, body=None):
    """Send a path just as it is written, which requests does not; return status and answer."""
    host, port = client.url.removeprefix("http://").split(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=10)) as connection:
        connection.request(method, path, body)
        answer = connection.getresponse()
        answer.text = answer.read().decode()
        return answer.status, answer


@contextlib.contextmanager
def held(engine):
    """Hold the engine in a pass: what is handed in meanwhile is made in the next one."""
    begun, let_go = threading.Event(), threading.Event()
    engine.hand_in(lambda _turn: begun.set() or let_go.wait(10))
    assert begun.wait(10)
    try:
        yield engine._inbox
    finally:
        let_go.set()


# --- health and errors ----------------------------------------------------------------


def test_health_is_healthy_and_knows_the_time(service):
    health = service.get("/health")

    assert health["status"] == "healthy"
    assert abs(chronos.parse_time(health["timestamp"]) / SECOND - time.time()) < 5


def test_a_store_that_fails_is_a_store_error_which_health_shows_until_it_is_over(service):
    with open_database(service.service.store.database.path) as database:
        database.execute("ALTER TABLE jobs RENAME TO gone")
        assert service.error(500, "POST", "/jobs", job_body(NOBODY))["code"] == "STORE_ERROR"
        assert service.error(500, "GET", "/jobs")["code"] == "STORE_ERROR"
        problem = service.error(503, "GET", "/health")
        database.execute("ALTER TABLE gone RENAME TO jobs")

    assert problem["code"] == "UNAVAILABLE"
    assert "no such table: jobs" in problem["message"]
    wait_until(lambda: service.call("GET", "/health")[0] == 200)
    assert service.create(NOBODY)["name"] == "report"


def test_an_error_in_a_handler_is_answered_and_logged_once(service, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(service.service.store.jobs, "pages", a_bug)
        error = service.error(500, "GET", "/jobs")

    assert error["code"] == "INTERNAL_ERROR"
    assert tracebacks(caplog) == ["GET /api/v1/jobs failed"]
    assert service.get("/jobs") == {"jobs": [], "total": 0}
    assert service.get("/health")["status"] == "healthy"


@pytest.mark.parametrize("path", [
    "/nope", "/api/v1", "/api/v1/jobs/", "/health/", "/api/v2/jobs", "/..%2fhealth", "/%00",
])  # fmt: skip
def test_an_unknown_path_is_answered_in_the_envelope(service, path):
    status, answer = send_as_is(service, "GET", path)

    assert (status, answer.headers["Content-Type"]) == (404, "application/json")
    assert json.loads(answer.text)["error"]["code"] == "NOT_FOUND"


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("DELETE", "/api/v1/jobs", {"GET", "POST"}),
    ("OPTIONS", "/api/v1/jobs", {"GET", "POST"}),
    ("BREW", "/api/v1/jobs", {"GET", "POST"}),
    ("POST", "/health", {"GET"}),
    ("GET", "/api/v1/jobs/x/trigger", {"POST"}),
])  # fmt: skip
def test_a_wrong_method_is_answered_with_what_is_allowed(service, method, path, allowed):
    status, answer = send_as_is(service, method, path)

    assert json.loads(answer.text)["error"]["code"] == "METHOD_NOT_ALLOWED"
    assert (status, answer.headers["Content-Type"]) == (405, "application/json")
    assert allowed <= set(re.split(", *", answer.headers["Allow"])) <= allowed | {"HEAD"}
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(("body", "hint"), [
    (b"", ""),
    (b"{", ""),
    (b'{"name": "a"} x', ""),
    (b'{"name": "\xff"}', ""),
    (b'{"name": NaN}', "NaN"),
    (b'{"name": -Infinity}', "Infinity"),
    (b'{"webhook": {"url": "a", "url": "b"}}', "'url'"),
    (b"[" * 100_000, "nested"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested"),
    (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "nested deeper than 32 levels"),
    (b'["\\"", ' * 40 + b"1" + b"]" * 40, "nested deeper than 32 levels"),
    (b'"' + b'\\"[' * 300_000, "Unterminated"),
])  # fmt: skip
def test_a_body_that_is_no_json_is_refused(service, body, hint):
    error = service.error(400, "POST", "/jobs", body)

    assert error["code"] == "INVALID_JSON"
    assert hint in error["message"]


def test_brackets_in_texts_and_beside_each_other_are_no_nesting(service):
    body = job_body(NOBODY, description='[{"\\' * 100, tags={"[" * 40: "{" * 40})
    deep = {"a": [[]] * 100 + [{"b": {}}] * 100}
    for _ in range(27):
        deep = [deep]

    assert service.post("/jobs", body)["description"] == body["description"]
    assert wrong_fields(service, "POST", "/jobs", body | {"x": deep}) == ["x"]


@pytest.mark.parametrize("body", ["[]", '"job"', "1", "null", "true"])
def test_json_that_is_no_object_is_a_validation_error(service, body):
    assert service.error(400, "POST", "/jobs", body)["code"] == "VALIDATION_ERROR"


@pytest.mark.parametrize(
    "odd", ["%00", "a%00b", "%", "%zz", "..", "%2e%2e", "a%2Fb", "%F0%9F%92%A5", "'--"]
)
def test_an_odd_id_is_of_no_job_and_no_execution(service, odd):
    job = service.create(NOBODY)

    for path in (odd, f"{job['id']}{odd}", f"{job['id']}/executions/{odd}"):
        status, answer = send_as_is(service, "GET", f"/api/v1/jobs/{path}")
        assert status in (400, 404), path
        assert json.loads(answer.text)["error"]["code"] in ("VALIDATION_ERROR", "NOT_FOUND")


@pytest.mark.parametrize("odd", ["%ff", "%ed%a0%80"])
def test_bytes_that_are_not_utf_8_are_not_dropped_from_an_id(service, odd):
    job = service.create(NOBODY)

    status, _answer = send_as_is(service, "DELETE", f"/api/v1/jobs/{odd}{job['id']}")

    assert status in (400, 404)
    assert service.get("/jobs")["total"] == 1


@pytest.mark.parametrize(("method", "path"), [r[:2] for r in chronos.Api.ROUTES if "<" in r[1]])
def test_what_is_not_there_is_not_found(service, method, path):
    status, answer = send_as_is(service, method, re.sub("<.*?>", NO_ID, path), "{}")

    assert (status, json.loads(answer.text)["error"]["code"]) == (404, "NOT_FOUND")


def test_head_answers_with_the_head_of_get(service):
    job_path = f"/api/v1{path_of(service.create(NOBODY))}"

    for path in ("/health", job_path, f"{job_path}/executions", "/api/v1/jobs/x"):
        got, head = (send_as_is(service, method, path) for method in ("GET", "HEAD"))
        assert (got[0], bool(got[1].text), head[1].text) == (head[0], True, "")
        assert differences(dict(got[1].headers), dict(head[1].headers)).keys() <= {"Date"}


def test_a_body_of_one_mebibyte_is_accepted(service):
    assert service.call("POST", "/jobs", json.dumps(job_body(NOBODY)).ljust(2**20))[0] == 201


def test_answers_are_not_kept_framed_or_sniffed(service):
    for path in ("/health", "/api/v1/jobs", "/nothing"):
        headers = requests.get(service.url + path, timeout=5).headers
        assert {name: headers[name] for name in chronos.HEADERS} == (chronos.HEADERS)
        assert not [name for name in headers if name.startswith("Access-Control-")]


# --- who may do what ------------------------------------------------------------------


def test_every_route_but_health_asks_who_it_is(guarded):
    for method, path, _name in chronos.Api.ROUTES:
        status, answer = send_as_is(guarded, method, re.sub("<.*?>", "1", path))
        assert status == (200 if path == "/health" else 401), path
        assert json.loads(answer.text)["success"] == (status == 200)
    for path in ("//api/v1/jobs", "/%61pi/v1/jobs", "/api/v1/jobs?x"):
        answer = requests.get(guarded.url + path, timeout=5)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="Chronos", charset="UTF-8"'


@pytest.mark.parametrize("header", [
    "", "Basic", "Basic !!!", "Basic YWRh", "Bearer x", "Basic " + "A" * 5000, "Digest a=b",
    "Basic \xff",
])  # fmt: skip
def test_what_are_no_credentials_is_a_401_and_no_failure(guarded, header):
    for _ in range(12):
        error = guarded.expect(401, "GET", "/jobs", headers={"Authorization": header})

    assert error["code"] == "UNAUTHORIZED"
    assert guarded.call("GET", "/jobs", headers=credentials("ada"))[0] == 200


def test_who_changed_a_version_is_known_and_a_viewer_only_reads(guarded, target):
    body, vera = job_body(target.url), credentials("vera")
    job = guarded.expect(201, "POST", "/jobs", body, headers=credentials("ada"))

    [version] = guarded.expect(200, "GET", path_of(job, "/versions"), headers=vera)
    assert version["created_by"] == "ada"
    for method, rest in (("DELETE", ""), ("POST", "/trigger"), ("PATCH", ""), ("PUT", "")):
        error = guarded.expect(403, method, path_of(job, rest), headers=vera)
        assert error["code"] == "FORBIDDEN" and "auth.viewers" in error["message"]
    assert target.received.empty()


def test_after_ten_wrong_passwords_an_address_waits_but_who_was_verified_does_not(
    guarded, monkeypatch
):
    clock = ManualClock()
    monkeypatch.setattr(guarded.service.api.passwords, "_clock", clock)
    known, new = credentials("ada"), credentials("vera")
    guarded.expect(200, "GET", "/jobs", headers=known)

    for name in ("ada", "nobody") * 5:
        guarded.expect(401, "GET", "/jobs", headers=credentials(name, "wrong"))
        clock.advance(1)
    refused = requests.get(f"{guarded.url}/api/v1/jobs", headers=new, timeout=5)

    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "51")
    assert refused.json()["error"]["code"] == "TOO_MANY_REQUESTS"
    guarded.expect(200, "GET", "/jobs", headers=known)
    clock.advance(51)
    guarded.expect(200, "GET", "/jobs", headers=new)


def test_a_failed_sign_in_is_logged_without_its_password(guarded, caplog):
    guarded.expect(401, "GET", "/jobs", headers=credentials("eve", "canary-word"))

    assert "somebody at 127.0.0.1 could not sign in as eve" in caplog.text
    assert "canary-word" not in caplog.text


def test_the_same_right_password_many_times_at_once_is_hashed_once(guarded, hashing, background):
    hashing.let_go.clear()

    calls = [background.submit(guarded.call, "GET", "/jobs", headers=credentials("ada"))
             for _ in range(12)]  # fmt: skip
    wait_until(lambda: hashing.passwords)
    done, _waiting = concurrent.futures.wait(calls, timeout=1)
    hashing.let_go.set()

    assert not done
    assert [call.result(10)[0] for call in calls] == [200] * 12
    assert hashing.passwords == ["pässwörd"]


def waiting_for_a_hash(service):
    return len(service.service.api.passwords._waiting)


def test_twelve_people_who_sign_in_at_once_are_all_let_in(make_service, guard, hashing, background):
    names = ["vera", *(f"user-{n}" for n in range(11))]
    service = make_service(**guard | {"auth__users": dict.fromkeys(names, HASHED)})
    hashing.let_go.clear()

    calls = [background.submit(service.call, "GET", "/jobs", headers=credentials(name))
             for name in names]  # fmt: skip
    done, _waiting = concurrent.futures.wait(calls, timeout=1)
    hashing.let_go.set()

    assert not done
    assert [call.result(20)[0] for call in calls] == [200] * 12


@pytest.mark.parametrize("passwords", [1, 20])
def test_however_many_strangers_wait_for_a_hash_four_threads_are_free(
    guarded, hashing, background, passwords
):
    known = credentials("ada")
    guarded.expect(200, "GET", "/jobs", headers=known)
    hashing.let_go.clear()

    wrong = [credentials("eve", f"{n % passwords}") for n in range(20)]
    calls = [background.submit(guarded.call, "GET", "/jobs", headers=one) for one in wrong]
    wait_until(lambda: sum(call.done() for call in calls) == 8)
    error = guarded.expect(429, "GET", "/jobs", headers=credentials("vera"))
    guarded.expect(200, "GET", "/jobs", headers=known)
    assert all(health_is_quick(guarded) for _ in range(5))
    assert waiting_for_a_hash(guarded) == 12
    hashing.let_go.set()

    assert "too many sign-ins at once" in error["message"]
    made = min(passwords, 10)  # the others of the twelve come after ten wrong ones
    statuses = collections.Counter(call.result(20)[0] for call in calls)
    assert statuses == ({401: 12, 429: 8} if passwords == 1 else {401: 10, 429: 10})
    assert len(hashing.passwords) == 1 + made
    assert waiting_for_a_hash(guarded) == 0


def test_a_reload_leaves_in_who_was_verified_unless_the_hash_is_another(guarded, hashing):
    ada, service = {"headers": credentials("ada")}, guarded.service
    guarded.expect(200, "GET", "/jobs", **ada)
    for n in range(10):
        guarded.expect(401, "GET", "/jobs", headers=credentials("eve", f"{n}"))

    service.reload(service.settings)
    guarded.expect(200, "GET", "/jobs", **ada)
    guarded.expect(429, "GET", "/jobs", headers=credentials("eve"))  # its failures are known, too
    service.reload(service.settings.replaced("auth.users", {"ada": ADA, "vera": ADA}))

    guarded.expect(429, "GET", "/jobs", **ada)
    assert len(hashing.passwords) == 11


def test_other_spellings_of_the_same_credentials_cost_no_hash(guarded, hashing):
    ada = credentials("ada")["Authorization"]

    for header in (ada, f"{ada}!!!", f"basic  {ada[6:]}", f"{ada[:9]} {ada[9:]}", ada + "-" * 9999):
        assert guarded.call("GET", "/jobs", headers={"Authorization": header})[0] == 200
    guarded.expect(401, "GET", "/jobs", headers=credentials("ada", "pässwörd\0"))  # so for scrypt

    assert len(hashing.passwords) == 1


@pytest.fixture
def passwords(clock, monkeypatch):
    """Verifies passwords, none of which is right; 20 may wait at once."""
    monkeypatch.setattr(chronos, "hash_password", lambda *_: "")
    passwords = chronos.Passwords(clock, 20)
    yield passwords
    passwords.stop()


def guess(passwords, address, password="x"):
    """Return the status that a wrong password gets."""
    chronos.bottle.response.bind()
    try:
        return 401 - passwords.are_right("ada", password, ADA, address)
    except chronos.TooManyRequests as error:
        return error.status


def test_failures_are_counted_by_address_and_forgotten_when_there_are_too_many(passwords):
    others = [f"10.{n // 250 + 1}.{n % 250}.1" for n in range(1000)]

    statuses = [guess(passwords, address) for address in ["10.0.0.1"] * 11 + others]

    assert statuses == [401] * 10 + [429] + [401] * 1000
    assert len(passwords._failures) == 1000
    assert guess(passwords, "10.0.0.1") == 401  # its failures are forgotten


@pytest.mark.parametrize(("address", "other", "is_the_same"), [
    ("10.0.0.1", "10.0.0.2", False), ("10.0.0.1", "::ffff:10.0.0.1", True),
    ("2001:db8::1", "2001:db8:0:0:9:8:7:6", True), ("2001:db8::1", "2001:db8:0:1::1", False),
    ("fe80::1%eth0", "fe80::2%eth0", True), ("unknown", "hidden", False),
])  # fmt: skip
def test_the_addresses_of_one_subscriber_count_as_one(passwords, address, other, is_the_same):
    for _ in range(10):
        guess(passwords, address)

    assert guess(passwords, other) == (429 if is_the_same else 401)


@pytest.mark.parametrize(("addresses", "outside"), [
    ([f"2001:db8:0:{n:x}::1" for n in range(60)], "2001:db8:1::1"),
    ([f"10.0.0.{n}" for n in range(60)], "10.0.1.0"),
])  # fmt: skip
def test_after_fifty_wrong_passwords_a_network_waits_and_no_other(
    passwords, clock, addresses, outside
):
    assert [guess(passwords, address) for address in addresses] == [401] * 50 + [429] * 10
    assert guess(passwords, outside) == 401

    clock.advance(61)
    assert guess(passwords, addresses[-1]) == 401


@pytest.fixture
def held_up(passwords, monkeypatch):
    """Hashes no password while it is not set; then all are wrong."""
    held_up = threading.Event()
    monkeypatch.setattr(chronos, "hash_password", lambda *_: held_up.wait(20) and "")
    yield held_up
    held_up.set()


def test_guesses_at_the_same_time_are_no_more_than_ten(passwords, background, held_up):
    guesses = [background.submit(guess, passwords, "10.0.0.1", f"{n}") for n in range(20)]
    wait_until(lambda: len(passwords._waiting) == 20)
    held_up.set()

    assert sorted(one.result(10) for one in guesses) == [401] * 10 + [429] * 10
    assert len(passwords._failures) == 10


def test_a_network_where_somebody_fails_leaves_half_of_the_room_to_others(
    passwords, background, held_up
):
    held_up.set()
    guess(passwords, "2001:db8::1")
    held_up.clear()

    addresses = [f"2001:db8:0:{n:x}::1" for n in range(20)]
    guesses = [background.submit(guess, passwords, one, one) for one in addresses]
    wait_until(lambda: sum(one.done() for one in guesses) == 10)
    other = background.submit(guess, passwords, "10.0.0.1")
    wait_until(lambda: len(passwords._waiting) == 11)
    held_up.set()

    assert sorted(one.result(10) for one in guesses) == [401] * 10 + [429] * 10
    assert other.result(10) == 401


def test_passwords_whose_hash_nobody_has_waited_for_are_no_more_than_the_room(
    passwords, held_up, monkeypatch
):
    monkeypatch.setattr(chronos, "SIGN_IN_PATIENCE_S", 0)

    statuses = [guess(passwords, f"10.0.{n}.1", f"{n}") for n in range(30)]

    assert statuses == [429] * 30
    assert len(passwords._pending) == 20


def test_at_the_stop_who_waits_for_a_hash_is_told_so(passwords, background, held_up):
    guesses = [background.submit(guess, passwords, "10.0.0.1", f"{n}") for n in range(2)]
    wait_until(lambda: len(passwords._pending) == 2)

    passwords.stop()

    assert next(as_completed(guesses, 5)).result() == 429
    held_up.set()
    assert sorted(one.result(10) for one in guesses) == [401, 429]


def test_an_unknown_user_costs_as_much_as_a_known_one_and_a_verified_one_nothing(guarded, hashing):
    for name, password in (("nobody", "x"), ("ada", "x"), ("ada", "pässwörd")):
        guarded.call("GET", "/jobs", headers=credentials(name, password))
    for _ in range(5):
        guarded.expect(200, "GET", "/jobs", headers=credentials("ada"))

    assert hashing.passwords == ["x", "x", "pässwörd"]


def test_wrong_passwords_cost_no_memory(make_process, background):
    process = make_process(SIGN_IN)
    port = int(process.url.rpartition(":")[2])

    def guess(n):
        source = (f"127.0.{2 + n // 9}.1", 0)
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=30, source_address=source)
        ) as caller:
            caller.request("GET", "/api/v1/jobs", headers=credentials("ada", f"{n}"))
            return caller.getresponse().status

    def memory():
        pages = Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize() / 1e6

    for _ in range(40):
        process.get("/health")  # wakes the threads
    at_rest = memory()
    statuses = {
        status for n in range(0, 90, 6) for status in background.map(guess, range(n, n + 6))
    }

    assert statuses == {401}
    assert memory() - at_rest < 8  # a hash takes 16 MB


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200),
    ({"Origin": "http://HOST"}, 200),
    ({"Origin": "http://HOST", "Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ({"Host": "localhost:80", "Origin": "http://localhost"}, 200),
    ({"Host": "localhost", "Origin": "https://Localhost:443"}, 200),
    ({"Host": "localhost:443", "Origin": "https://localhost"}, 200),
    ({"Origin": "null"}, 403),
    ({"Origin": ""}, 403),
    ({"Origin": "http://HOST1"}, 403),
    ({"Origin": "http://HOST.evil.test"}, 403),
    ({"Origin": "http://evil.test"}, 403),
    ({"Host": "localhost", "Origin": "http://localhost:8080"}, 403),
    ({"Host": "localhost", "Origin": "http://localhost:443"}, 403),
    ({"Host": "localhost:8080", "Origin": "http://localhost"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "http://HOST", "Sec-Fetch-Site": "cross-site"}, 403),
])  # fmt: skip
def test_a_page_of_another_site_changes_nothing(service, target, headers, status):
    job = service.create(target.url)
    host = service.url.removeprefix("http://")
    headers = {name: value.replace("HOST", host) for name, value in headers.items()}

    got, envelope = service.call("POST", path_of(job, "/enable"), headers=headers)

    assert got == status
    site = headers.get("Sec-Fetch-Site", "none")
    why = "server.trusted_proxy" if site == "none" else f"the browser says Sec-Fetch-Site: {site}"
    assert status == 200 or why in envelope["error"]["message"]
    assert service.call("GET", "/jobs", headers=headers)[0] == 200  # reading is the page's right
    assert service.get(path_of(job))["enabled"] == (status == 200)


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200), ("LOCALHOST:8080", 200), ("127.0.0.1:1", 200), ("[::1]:8080", 200),
    ("10.0.0.5:8080", 200), ("cron.test", 200), ("CRON.test:80", 200), (platform.node(), 200),
    ("evil.test", 403), ("cron.test.evil.test", 403), ("127.0.0.1.evil.test", 403),
    ("localhost, evil.test", 403), ("[::1", 403),
])  # fmt: skip
def test_without_sign_in_only_own_names_are_answered(make_service, host, status):
    service = make_service(server__allowed_hosts=["Cron.Test"])

    got, envelope = service.call("GET", "/jobs", headers={"Host": host})

    assert got == status
    assert status == 200 or "server.allowed_hosts" in envelope["error"]["message"]
    assert service.call("GET", "/health", headers={"Host": host})[0] == 200


def test_with_sign_in_any_name_will_do(guarded):
    headers = credentials("ada") | {"Host": "evil.test"}

    assert guarded.call("GET", "/jobs", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("trusted", "is_believed"),
    [
        (None, False), ("127.0.0.1", True), ("127.0.0.9", False), ("127.0.0.0/29", True),
        (["10.0.0.0/8", "127.0.0.1"], True), (["10.0.0.0/8", "::/0"], False),
    ],
)  # fmt: skip
def test_who_asks_is_taken_from_trusted_proxies_only(make_service, caplog, trusted, is_believed):
    service = make_service(server__trusted_proxy=trusted, logging__level="debug")
    forwarded = {"X-Forwarded-For": "10.9.9.9", "X-Forwarded-Host": "evil.test"}

    status = service.call("GET", "/jobs", headers=forwarded)[0]

    assert status == (403 if is_believed else 200)
    assert ("anonymous at 10.9.9.9" in caplog.text) == is_believed


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        ("192.0.2.7, 10.0.0.3", "192.0.2.7"),  # 10.0.0.3 is a proxy in front of ours
        ("6.6.6.6, 192.0.2.7, 10.0.0.3", "192.0.2.7"),  # the first is made up
        ("6.6.6.6, unknown, 10.0.0.3", "10.0.0.3"),
        ("10.0.0.4, 10.0.0.3", "10.0.0.4"),  # a proxy that asks for itself
        ("", "127.0.0.1"),
        ("unknown", "127.0.0.1"),
        ("1,2,3" * 2000, "127.0.0.1"),
        ("10.0.0.3," * 2000 + "10.0.0.4", "10.0.0.3"),
    ],
)
def test_of_many_proxies_the_first_that_is_not_trusted_is_who_asks(
    make_service, caplog, forwarded_for, client
):
    trusted = ["127.0.0.1", "10.0.0.0/8"]
    service = make_service(server__trusted_proxy=trusted, logging__level="debug")

    service.expect(200, "GET", "/jobs", headers={"X-Forwarded-For": forwarded_for})

    assert f"200 for anonymous at {client}\n" in caplog.text


@pytest.mark.parametrize("scheme", ["https", "gopher", "https, http", ""])
def test_a_proxy_may_say_any_host_and_scheme(make_service, scheme):
    service = make_service(server__trusted_proxy="127.0.0.1")
    job = service.create(NOBODY)
    headers = {"X-Forwarded-Host": "evil.test, localhost", "X-Forwarded-Proto": scheme}

    service.expect(
        200, "POST", path_of(job, "/enable"), headers=headers | {"Origin": "https://localhost"}
    )


def test_a_guesser_behind_the_proxy_is_the_only_one_who_waits(guard, make_service):
    service = make_service(**guard, server__trusted_proxy="127.0.0.0/8")

    for n in range(10):
        guesser = {"X-Forwarded-For": "192.0.2.6"} | credentials("ada", f"{n}")
        service.expect(401, "GET", "/jobs", headers=guesser)

    service.expect(429, "GET", "/jobs", headers=guesser)
    other = {"X-Forwarded-For": "192.0.2.7"} | credentials("ada")
    service.expect(200, "GET", "/jobs", headers=other)


@pytest.mark.parametrize("trusted", [None, "127.0.0.9", "127.0.0.1"])
def test_an_unknown_proxy_is_told_of_once_where_people_sign_in(
    guard, make_service, caplog, trusted
):
    through_proxy = {"headers": {"X-Forwarded-For": "192.0.2.7"} | credentials("ada")}
    service = make_service(**guard, server__trusted_proxy=trusted)

    service.expect(200, "GET", "/jobs", headers=credentials("ada"))
    assert "trusted_proxy" not in caplog.text
    for _ in range(3):
        service.expect(200, "GET", "/jobs", **through_proxy)

    told = "requests from 127.0.0.1 say by X-Forwarded-For who asks, but it is not trusted: if it"
    assert caplog.text.count(told) == (trusted != "127.0.0.1")


def test_without_sign_in_nothing_is_told_of_a_proxy(service, caplog):
    service.expect(200, "GET", "/jobs", headers={"X-Forwarded-For": "192.0.2.7"})

    assert "trusted_proxy" not in caplog.text


# --- jobs -----------------------------------------------------------------------------


def test_the_example_of_the_reference_is_created_with_every_field_and_sent(service, target):
    webhook = EXAMPLE["webhook"] | {"url": target.url + "/reports"}

    job = service.post("/jobs", EXAMPLE | {"webhook": webhook})

    shown = {"Authorization": MASK, "Content-Type": "application/json"}
    webhook |= {"headers": shown, "auth": {"type": "bearer", "token": MASK}}
    assert webhook.items() <= job["webhook"].items()
    assert EXAMPLE["retry_policy"].items() <= job["retry_policy"].items()
    plain = EXAMPLE.keys() - {"webhook", "retry_policy"}
    assert {name: job[name] for name in plain} == {name: EXAMPLE[name] for name in plain}
    assert str(uuid.UUID(job["id"])) == job["id"]
    assert job["created_at"] == job["updated_at"]
    next_run = datetime.fromisoformat(job["next_run"]).astimezone(ZoneInfo("America/New_York"))
    assert (next_run.hour, next_run.minute, next_run.second) == (9, 0, 0)
    assert service.post(trigger_path(job))["status"] == "success"
    method, path, headers, body, _at = target.take()
    assert (method, path, body) == ("POST", "/reports", b'{"type": "daily"}')
    assert headers["Authorization"] == "Bearer my-secret-token"
    assert headers["Content-Type"] == "application/json"


def test_jobs_are_listed_in_the_order_of_their_creation_as_get_shows_them(service):
    jobs = [service.create(NOBODY, name=name) for name in "bca"]

    assert service.get("/jobs") == {"jobs": jobs, "total": 3}
    assert service.get(path_of(jobs[1])) == jobs[1]


def test_a_job_has_a_next_run_only_while_it_is_enabled(service):
    job = service.create(NOBODY)

    enabled = service.post(path_of(job, "/enable"))
    again = service.post(path_of(job, "/enable"))
    disabled = service.post(path_of(job, "/disable"))

    year = datetime.now(UTC).year + 1
    assert (job["enabled"], job["next_run"]) == (False, None)
    assert (enabled["enabled"], enabled["next_run"]) == (True, f"{year}-01-01T00:00:00Z")
    assert again == enabled
    assert (disabled["enabled"], disabled["next_run"]) == (False, None)


def test_a_deleted_job_is_gone_with_its_executions(service, target):
    job = service.create(target.url + "/ok")
    execution = service.post(trigger_path(job))

    assert service.expect(200, "DELETE", path_of(job)) == {"id": job["id"]}

    for path in ("", "/executions", f"/executions/{execution['id']}"):
        assert service.error(404, "GET", path_of(job, f"{path}"))["code"] == "NOT_FOUND"
    for method, path in (("DELETE", ""), ("POST", "/enable"), ("POST", "/trigger")):
        assert service.error(404, method, path_of(job, f"{path}"))["code"] == "NOT_FOUND"
    wait_until(lambda: service.service.store.executions.count(job["id"]) == 0)
    assert service.get("/jobs") == {"jobs": [], "total": 0}


def test_a_job_is_on_disk_when_its_201_arrives(service, background):
    def create_and_look(_n):
        job_id = service.create(NOBODY)["id"]
        with open_database(service.service.store.database.path) as other:
            sql = "SELECT count(*) FROM jobs JOIN versions ON id = job_id WHERE id = ?"
            return other.execute(sql, [job_id]).fetchone()[0]

    assert list(background.map(create_and_look, range(80))) == [1] * 80


# --- jobs that are created once -------------------------------------------------------

NEW = {"If-None-Match": "*"}


def keyed(key="order-17"):
    return {"Idempotency-Key": key}


def test_the_same_key_again_is_answered_with_the_job_as_it_is_by_now(service):
    body = job_body(NOBODY)
    job = service.expect(201, "POST", "/jobs", body, headers=keyed())
    changed = patch(service, job, {"name": "changed"})

    assert service.expect(200, "POST", "/jobs", body, headers=keyed()) == changed
    other = service.expect(201, "POST", "/jobs", body, headers=keyed("order-18"))

    assert job["id"] == str(uuid.uuid5(chronos.KEYED_IDS, "order-17")) != other["id"]
    assert service.get("/jobs") == {"jobs": [changed, other], "total": 2}


@pytest.mark.parametrize(("method", "headers", "status"), [
    ("POST", keyed(), 200),
    ("PUT", NEW, 412),
])  # fmt: skip
def test_of_equal_creations_at_once_one_makes_the_job(service, background, method, headers, status):
    path, body = ("/jobs" if method == "POST" else f"/jobs/{JOB_ID}"), job_body(NOBODY)

    with held(service.service.engine) as inbox:
        calls = [
            background.submit(service.call, method, path, body, headers=headers) for _ in range(16)
        ]
        wait_until(lambda: inbox.qsize() == 16)  # All have seen that there is no such job.
    answers = [call.result(20) for call in calls]

    assert sorted(answer[0] for answer in answers) == sorted([201] + [status] * 15)
    [job] = service.get("/jobs")["jobs"]
    assert (job["version"], len(service.get(path_of(job, "/versions")))) == (1, 1)
    assert {data["id"] for _status, answer in answers if (data := answer["data"])} == {job["id"]}


@pytest.mark.parametrize(("method", "headers"), [("POST", keyed()), ("PUT", NEW)])
def test_after_it_was_deleted_a_job_is_created_anew_and_has_no_history(
    service, target, method, headers
):
    path = "/jobs" if method == "POST" else f"/jobs/{JOB_ID}"
    job = service.expect(201, method, path, job_body(target.url, name="old"), headers=headers)
    for _ in range(3):
        service.post(trigger_path(job))
    patch(service, job, {"description": "second"})

    service.expect(200, "DELETE", path_of(job))
    again = service.expect(201, method, path, job_body(target.url, name="new"), headers=headers)

    assert (again["id"], again["version"], again["name"]) == (job["id"], 1, "new")
    assert service.get(path_of(job, "/executions"))["total"] == 0
    [version] = service.get(path_of(job, "/versions"))
    assert version["config"]["name"] == "new"
    assert service.post(trigger_path(job))["job_version"] == 1


def test_what_a_deleted_job_has_left_goes_in_steps_before_it_is_created_anew(
    world, target, monkeypatch
):
    job = world.create(target.url)
    add_executions(world, job, 2 * chronos.PRUNE_ROWS + 1, "success")
    changes, left = world.engine.job_changes, []
    monkeypatch.setattr(world.engine.retention, "work", lambda _turn, _is_busy: False)

    world.do(changes.delete, job, False)
    while world.do(changes.make_room, job.id):
        left += by_hand(world, "SELECT count(*) FROM executions")
    made, is_new = world.do(changes.create_once, job.id, job.config, True, "tester")

    assert left == [(251,), (1,), (0,), (0,)]  # The last step was for the version.
    assert (made.id, made.version, is_new) == (job.id, 1, True)
    assert world.do(changes.make_room, job.id) is False
    assert world.do(changes.create_once, job.id, {}, False, "tester") == (made, False)


def test_a_creation_is_repeated_after_the_instant_of_its_schedule(make_service, clock):
    service = make_service(clock)
    body = job_body(NOBODY, schedule="@at 2027-03-01T12:01:00Z")
    job = service.expect(201, "POST", "/jobs", body, headers=keyed())
    clock.advance(120)

    assert service.expect(200, "POST", "/jobs", body, headers=keyed()) == job
    assert wrong_fields(service, "POST", "/jobs", body) == ["schedule"]


@pytest.mark.parametrize("key", ["", "a b", "a, b", "x" * 256, "schl\xfcssel", '"a\tb"'])
def test_a_key_is_visible_ascii(service, target, key):
    job = service.create(target.url + "/ok")
    run = service.post(trigger_path(job))
    replay = path_of(job, f"/executions/{run['id']}/replay")
    calls = [("/jobs", job_body(NOBODY), 201), (trigger_path(job), None, 200), (replay, None, 202)]

    for path, body, status in calls:
        error = service.expect(400, "POST", path, body, headers=keyed(key))
        assert [detail["field"] for detail in error["details"]] == ["Idempotency-Key"]
        assert service.expect(status, "POST", path, body, headers=keyed("x" * 255))

    assert service.get("/jobs")["total"] == 2
    assert service.get(path_of(job, "/executions"))["total"] == 3


def test_put_creates_a_job_under_an_id_only_where_it_is_told_that_it_is_new(service):
    path, body = f"/jobs/{JOB_ID}", job_body(NOBODY)

    assert service.error(404, "PUT", path, body)["code"] == "NOT_FOUND"
    job = service.expect(201, "PUT", path, body | {"id": JOB_ID}, headers=NEW)
    error = service.expect(412, "PUT", path, body | {"name": "other"}, headers=NEW)

    assert (job["id"], job["version"]) == (JOB_ID, 1)
    assert error["code"] == "PRECONDITION_FAILED"
    assert service.get("/jobs") == {"jobs": [job], "total": 1}
    assert put(service, job, body | {"name": "other"})["version"] == 2


@pytest.mark.parametrize(("job_id", "headers", "status"), [
    (JOB_ID.upper().replace("1", "A"), NEW, 400), (JOB_ID.replace("-", ""), NEW, 400),
    (f"{{{JOB_ID}}}", NEW, 400), ("report", NEW, 400), (JOB_ID + "%0A", NEW, 404),
    (JOB_ID, {"If-None-Match": '"1"'}, 400), (JOB_ID, {"If-None-Match": ""}, 400),
    (JOB_ID, NEW | {"If-Match": "*"}, 412), (chronos.ALERTS_ID, NEW, 412),
])  # fmt: skip
def test_put_creates_no_job_under_an_odd_id_or_condition(service, job_id, headers, status):
    service.expect(status, "PUT", f"/jobs/{job_id}", job_body(NOBODY), headers=headers)

    assert service.get("/jobs")["total"] == 0
    assert by_hand(service.service, "SELECT seq, name FROM jobs") == [(0, "alerts")]


def test_a_post_with_an_id_is_refused_and_says_how_to_choose_one(service):
    job = service.create(NOBODY)
    error = service.error(400, "POST", "/jobs", job | {"name": None})

    details = {detail["field"]: detail["message"] for detail in error["details"]}
    assert details.keys() == {"id", "name"}
    assert "PUT /api/v1/jobs/{id} with the header If-None-Match: *" in details["id"]
    again = service.post("/jobs", job | {"id": None})
    assert differences(job, again).keys() <= {"id", "created_at", "updated_at"}


# --- changes to a job, and its versions -----------------------------------------------

EXAMPLE_RETRY = EXAMPLE["retry_policy"] | {"attempt_timeout": None}
MASKED_BEARER = {"type": "bearer", "token": MASK}
BASIC_AUTH = {"type": "basic", "username": "me", "password": "p"}


def in_seconds(seconds):
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def test_put_replaces_everything_and_what_is_left_out_goes_to_its_default(service, caplog):
    caplog.set_level("INFO")
    minimal = {"name": "a", "schedule": "@daily", "webhook": {"url": NOBODY}}
    job, fresh = service.post("/jobs", EXAMPLE), service.post("/jobs", minimal)

    changed = put(service, job, minimal)

    assert fresh["retry_policy"] == EXAMPLE_RETRY  # the default of the settings
    assert (fresh["enabled"], fresh["next_run"]) == (False, None)
    assert differences(fresh, changed).keys() == {"id", "version", "created_at", "updated_at"}
    assert (changed["id"], changed["version"]) == (job["id"], 2)
    assert job["created_at"] == changed["created_at"] != changed["updated_at"]
    assert changed["enabled"] is False
    assert any(job["id"] in line and "disabled" in line for line in caplog.messages)


@pytest.mark.parametrize(("name", "value", "becomes"), [
    ("timeout", None, "5m"), ("description", None, None), ("concurrency", "replace", "replace"),
    ("tags", {"a": "9", "b": None, "c": "3"}, {"a": "9", "c": "3"}), ("tags", None, {}),
    ("retry_policy", {"max_attempts": 7, "multiplier": None}, EXAMPLE_RETRY | {"max_attempts": 7}),
    ("webhook", {"method": None}, {"method": "GET"}),
    ("webhook", {"success_codes": [204]}, {"success_codes": [204]}),
    ("webhook", {"headers": {"x-a": None, "X-B": "2"}}, {"headers": {"X-B": "2"}}),
    ("webhook", {"auth": None}, {"auth": None}),
    ("webhook", {"auth": {"username": "u"}},
     {"auth": BASIC_AUTH | {"username": "u", "password": MASK}}),
    ("webhook", {"auth": MASKED_BEARER | {"token": "t"}}, {"auth": MASKED_BEARER}),
])  # fmt: skip
def test_patch_changes_what_it_names_and_null_is_the_default(service, name, value, becomes):
    webhook = {"success_codes": [200], "headers": {"x-a": "1"}, "auth": BASIC_AUTH, "body": "b"}
    fields = {"timeout": "1m", "tags": {"a": "1", "b": "2"}, "description": "d"}
    job = service.create(NOBODY, webhook=webhook, retry_policy={"multiplier": 4}, **fields)

    after = patch(service, job, {name: value})

    assert differences(job, after).keys() == {name, "version", "updated_at"}
    assert after[name] == (job["webhook"] | becomes if name == "webhook" else becomes)
    assert after["version"] == 2


@pytest.mark.parametrize(("body", "moves"), [
    ({"description": "x", "timeout": "1s", "schedule": "@every 1h", "enabled": True}, False),
    ({"schedule": "@every 2h"}, True),
    ({"timezone": "Asia/Tokyo"}, True),
])  # fmt: skip
def test_a_cursor_moves_only_where_schedule_time_zone_or_state_change(service, body, moves):
    job = service.create(NOBODY, schedule="@every 1h", enabled=True)

    after = patch(service, job, body)

    assert (after["next_run"] != job["next_run"]) is moves
    assert put(service, job, after) == service.post(path_of(job, "/enable")) == after
    disabled = patch(service, job, {"enabled": None})
    enabled = patch(service, job, {"enabled": True})
    assert differences(after, disabled).keys() == {"enabled", "next_run", "updated_at"}
    assert enabled["next_run"] not in (None, after["next_run"])
    assert enabled["version"] == after["version"] == 2


def test_an_instant_in_the_past_is_kept_but_not_set_anew(service):
    job = service.create(NOBODY, schedule=f"@at {in_seconds(1)}", enabled=True, retry_policy=ONCE)
    path = path_of(job)
    job = wait_until(lambda: (got := service.get(path))["next_run"] is None and got)
    past = {"schedule": f"@at {in_seconds(-5)}"}

    assert patch(service, job, {"description": "was"})["version"] == 2
    assert wrong_fields(service, "PATCH", path, past) == ["schedule"]
    assert wrong_fields(service, "POST", "/jobs", job_body(NOBODY, **past)) == ["schedule"]
    for method, rest, body in (("POST", "/enable", None), ("PATCH", "", {"enabled": True})):
        assert service.error(409, method, path + rest, body)["code"] == "CONFLICT"
    assert patch(service, job, {"schedule": f"@at {in_seconds(60)}", "enabled": True})["next_run"]


@pytest.mark.parametrize(("method", "rest"), [
    ("PUT", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rollback/1"),
])  # fmt: skip
@pytest.mark.parametrize(("wanted", "status"), [
    ("*", 200), ('"2"', 200), ('"1", "2"', 200),
    ('"1","2"', 200), ('W/"2"', 200), ('W/"1", W/"2"', 200), ('"2-gzip"', 200),
    ('"1"', 412), ('"1", "3"', 412), ("2", 412), ("", 412),
    ('W/"1"', 412), ('w/"2"', 412), ('W/2', 412), ('"22"', 412), ('"2-3"', 412), ('"1-gzip"', 412),
    (b'"\xff"', 412),
])  # fmt: skip
def test_a_change_is_made_only_to_a_version_that_if_match_names(
    service, method, rest, wanted, status
):
    job = service.create(NOBODY)
    job = patch(service, job, {"name": "second"})
    body = job_body(NOBODY, name="third") if method in ("PUT", "PATCH") else None

    got, envelope = service.call(method, path_of(job, rest), body, headers={"If-Match": wanted})

    assert got == status, envelope
    if status == 412:
        assert envelope["error"]["code"] == "PRECONDITION_FAILED"
        assert 'must be "2", with the quotes' in envelope["error"]["message"]
        assert service.get(path_of(job)) == job


@pytest.mark.parametrize(("method", "rest"), [
    ("PATCH", ""), ("DELETE", ""), ("POST", "/rollback/1"),
])  # fmt: skip
def test_what_is_only_for_a_job_that_is_not_there_changes_none(service, method, rest):
    job = service.create(NOBODY)
    body = {"name": "second"} if method == "PATCH" else None
    headers = {"If-None-Match": "*"}

    got, envelope = service.call(method, path_of(job, rest), body, headers=headers)

    assert (got, envelope["error"]["code"]) == (412, "PRECONDITION_FAILED")
    assert service.get(path_of(job)) == job


def test_a_job_is_not_created_under_one_id_with_another_in_its_body(service):
    path = "/jobs/7f7c9d3e-0000-4000-8000-000000000001"
    body = job_body(NOBODY, id="7f7c9d3e-0000-4000-8000-000000000002")

    got, envelope = service.call("PUT", path, body, headers={"If-None-Match": "*"})

    assert (got, envelope["error"]["details"][0]["field"]) == (400, "id")
    service.error(404, "GET", path)


def test_the_etag_of_a_job_is_its_version(service):
    path = f"/api/v1{path_of(service.create(NOBODY))}"

    for method, body, etag in (("GET", None, 1), ("PATCH", '{"name": "b"}', 2), ("GET", None, 2)):
        assert send_as_is(service, method, path, body)[1].headers["ETag"] == f'"{etag}"'


@pytest.mark.parametrize(("headers", "made"), [({}, 16), ({"If-Match": '"1"'}, 1)])
def test_of_changes_at_the_same_time_none_is_lost(service, background, headers, made):
    job = service.create(NOBODY)

    def change(n):
        return service.call("PATCH", path_of(job), {"tags": {f"t{n}": ""}}, headers=headers)[0]

    assert sorted(background.map(change, range(16))) == [200] * made + [412] * (16 - made)
    after = service.get(path_of(job))
    assert (len(after["tags"]), after["version"]) == (made, 1 + made)


def test_every_change_of_the_configuration_is_a_version_newest_first(service):
    job = service.create(NOBODY, name="one")
    patch(service, job, {"name": "two"})
    third = put(service, job, job_body(NOBODY, name="three"))

    versions = service.get(path_of(job, "/versions"))

    found = [(v["version"], v["config"]["name"], v["created_by"]) for v in versions]
    assert found == [(3, "three", "anonymous"), (2, "two", "anonymous"), (1, "one", "anonymous")]
    assert versions[0]["created_at"] == third["updated_at"] != versions[2]["created_at"]
    assert versions[0]["config"].items() <= third.items()
    assert [service.get(path_of(job, f"/versions/{n}")) for n in (3, 2, 1)] == versions


@pytest.mark.parametrize(("query", "found"), [
    ("limit=2", [7, 6]), ("limit=9", [7, 6, 5, 4, 3, 2, 1]), ("before=3", [2, 1]), ("before=1", []),
    ("limit=3&before=7", [6, 5, 4]), ("before=99&limit=1", [7]), ("limit=1&before=2", [1]),
])  # fmt: skip
def test_versions_are_paged_by_their_numbers(service, monkeypatch, query, found):
    monkeypatch.setattr(chronos, "PAGE_ROWS", 2)
    job = service.create(NOBODY)
    for number in range(2, 8):
        patch(service, job, {"name": str(number)})

    versions = service.get(path_of(job, f"/versions?{query}"))

    assert [version["version"] for version in versions] == found


def test_a_rollback_is_a_new_version_and_leaves_state_and_cursor_alone(service, target):
    fields = {"schedule": "@every 1h", "enabled": True, "webhook": WITH_SECRET["bearer"]}
    job = service.create(target.url, **fields)
    patch(service, job, {"name": "two", "webhook": {"auth": {"token": "another"}}})

    answer = service.post(path_of(job, "/rollback/1"))
    again = service.post(path_of(job, "/rollback/3"))
    service.post(trigger_path(job))
    service.post(path_of(job, "/disable"))

    assert (answer["rolled_back_from"], answer["new_version"]) == (1, 3)
    assert differences(job, answer["job"]).keys() == {"version", "updated_at"}
    assert (again["rolled_back_from"], again["new_version"], again["job"]["version"]) == (3, 4, 4)
    assert target.take()[2]["Authorization"] == f"Bearer {CANARY}"
    assert service.post(path_of(job, "/rollback/1"))["job"]["enabled"] is False


@pytest.mark.parametrize("n", ["2", "0", "-1", "%2B1", "1.0", "x", "%D9%A1", "9" * 10, "9" * 5000])
def test_a_version_that_is_not_there_is_not_found(service, n):
    job = service.create(NOBODY)

    for method, rest in (("GET", "versions"), ("POST", "rollback")):
        assert service.error(404, method, path_of(job, f"/{rest}/{n}"))["code"] == "NOT_FOUND"
    assert service.get(path_of(job)) == job


@pytest.mark.parametrize(("body", "fields"), [
    ({"webhook": {"headers": {"X-Token": MASK}}}, ["webhook.headers.X-Token"]),
    ({"webhook": {"auth": BASIC_AUTH | {"password": MASK}}}, ["webhook.auth.password"]),
    ({"webhook": {"auth": {"type": "api_key", "api_key": MASK}}}, ["webhook.auth.api_key"]),
    ({"name": None, "schedule": None, "taggs": {}}, ["taggs", "name", "schedule"]),
    ({"webhook": {"url": None}}, ["webhook.url"]),
    ({"name": None, "webhook": {"url": "http://other/"}}, ["name", "webhook.auth.token"]),
])  # fmt: skip
def test_what_a_change_has_wrong_is_named_all_at_once(service, body, fields):
    job = service.create(NOBODY, webhook=WITH_SECRET["bearer"])

    assert wrong_fields(service, "PATCH", path_of(job), body) == fields
    assert service.get(path_of(job)) == job


@pytest.mark.parametrize(("headers", "status"), [
    ({"If-Match": '"1"'}, 412),
    ({}, 200),
])  # fmt: skip
def test_a_delete_that_meets_a_change_is_refused_only_if_it_names_a_version(
    service, background, headers, status
):
    job = service.create(NOBODY)

    with held(service.service.engine) as inbox:
        change = background.submit(service.call, "PATCH", path_of(job), {"name": "b"})
        wait_until(lambda: inbox.qsize() == 1)
        delete = background.submit(service.call, "DELETE", path_of(job), headers=headers)
        wait_until(lambda: inbox.qsize() == 2)

    assert (change.result(10)[0], delete.result(10)[0]) == (200, status)


# --- configurations that have become unusable, as they are seen and mended ------------------


@pytest.fixture
def spoilt(service, target):
    """Makes a job whose newest configuration has become unusable, and a run that was before."""

    def make(words, **fields):
        job = service.create(target.url, schedule="@hourly", **fields)
        run = service.post(trigger_path(job))
        changed = patch(service, job, {"description": "version 2"})
        stored = service.service.store.jobs.version(job["id"], 2)["config"]
        world = service.service
        by_hand(world, "DELETE FROM versions WHERE job_id = ? AND version = 2", job["id"])
        config = unusable(stored)[words]
        if config is not None:
            by_hand(world, "INSERT INTO versions VALUES (?, 2, ?, 0, '')", job["id"], config)
        world.engine.versions.clear()
        return changed, run

    return make


@pytest.mark.parametrize("words", UNUSABLE)
def test_no_list_fails_with_a_job_that_can_not_be_used(service, spoilt, words):
    job, run = spoilt(words, enabled=True)
    other = service.create(NOBODY, schedule="@hourly", enabled=True)

    for path in ("/jobs", "/stats"):
        shown = service.get(path)["jobs"]
        assert [(each["id"], each["name"]) for each in shown] == [
            (job["id"], "report"),
            (other["id"], "report"),
        ]
    upcoming = service.get("/schedules/upcoming")["upcoming"]
    assert {len(each["fire_times"]) for each in upcoming if each["job_id"] == other["id"]} == {24}
    assert len(service.get("/cluster/status")["next_runs"]) == 2
    assert service.get(path_of(job))["problem"] or words in UNUSABLE[:2] + UNUSABLE[6:8]
    assert [each["version"] for each in service.get(path_of(job, "/versions"))][-1] == 1
    assert service.get(path_of(job, f"/executions/{run['id']}"))["request"]["method"] == "POST"


@pytest.mark.parametrize("words", UNUSABLE)
def test_changes_of_a_job_that_can_not_be_used_work_or_say_why_not(service, spoilt, words):
    job, run = spoilt(words)

    for method, path, body in (
        ("POST", "/enable", None),
        ("PATCH", "", {"description": "new", "enabled": True}),
        ("POST", "/trigger", None),
        ("POST", "/rollback/2", None),
        ("GET", "/versions/2", None),
    ):
        status, envelope = service.call(method, path_of(job, path), body)
        assert status in (200, 400, 404, 409), (path, envelope)
    assert service.expect(202, "POST", path_of(job, f"/executions/{run['id']}/replay"))
    assert service.post(path_of(job, "/disable"))["enabled"] is False


@pytest.mark.parametrize("words", UNUSABLE)
@pytest.mark.parametrize("how", ["PUT", "PATCH", "rollback"])
def test_a_job_that_can_not_be_used_is_mended_by_a_good_configuration(
    service, spoilt, target, words, how
):
    job, _run = spoilt(words, enabled=True)
    body = job_body(target.url, schedule="@daily", timezone="UTC", timeout="1m", enabled=True)

    if how == "rollback":
        mended = service.post(path_of(job, "/rollback/1"))["job"]
    else:
        mended = service.expect(200, how, path_of(job), body)

    assert mended["version"] == 3 and mended["next_run"] and not mended["problem"]
    assert service.post(trigger_path(job))["status"] == "success"


@pytest.mark.parametrize(("old", "sent"), OLD_URLS.items())
def test_a_url_that_only_an_earlier_version_took_goes_out_as_it_did(
    service, aged, target, old, sent
):
    job = aged(target.url + old, **WITH_SECRET["bearer"])

    run = service.post(trigger_path(job))

    assert (run["status"], target.take()[1]) == ("success", sent)
    request = service.get(path_of(job, f"/executions/{run['id']}"))["request"]
    assert request["url"] == target.url + old


@pytest.mark.parametrize("old", OLD_URLS)
def test_a_url_that_only_an_earlier_version_took_stays_until_it_is_changed(
    service, aged, target, old
):
    job = aged(target.url + old, **WITH_SECRET["bearer"])

    assert put(service, job, job) == job
    assert patch(service, job, {"description": "new"})["version"] == 2
    for url in (f"{target.url}/{old}", f"{target.url}/|", ""):
        body = {"webhook": {"url": url}}
        assert wrong_fields(service, "PATCH", path_of(job), body) == ["webhook.url"]
    changed = patch(service, job, {"webhook": {"url": f"{target.url}/%7C"}})
    assert changed["webhook"]["auth"]["token"] == MASK


def test_a_run_of_a_version_that_is_lost_is_shown_without_its_request(service, target):
    job = service.create(target.url)
    run = service.post(trigger_path(job))
    patch(service, job, {"description": "version 2"})
    by_hand(service.service, "DELETE FROM versions WHERE version = 1")

    service.service.engine.versions.clear()
    path = path_of(job, f"/executions/{run['id']}")

    assert service.get(path)["request"] is None
    assert "is lost" in service.error(409, "POST", path + "/replay")["message"]


def test_a_zone_that_comes_while_it_runs_is_known_and_one_that_went_is_not(service, zones):
    body = job_body(NOBODY, timezone="New/Zone", enabled=True)
    assert wrong_fields(service, "POST", "/jobs", body) == ["timezone"]

    zones.give("New/Zone", like=MADRID)
    job = service.post("/jobs", body)
    zones.remove("New/Zone")

    assert wrong_fields(service, "POST", "/jobs", body) == ["timezone"]
    service.post(path_of(job, "/disable"))
    assert "New/Zone" in service.error(409, "POST", path_of(job, "/enable"))["message"]


# --- jobs that the file declares ------------------------------------------------------


@pytest.fixture
def managed(make_service, target):
    """A service with one declared job, which is ``managed.job``."""
    client = make_service(jobs=[job_body(target.url)])
    [client.job] = client.get("/jobs")["jobs"]
    return client


def test_the_configuration_of_a_declared_job_is_changed_in_the_file_only(managed):
    job = managed.job

    assert job["managed_by"] == "chronos.yaml"
    for method, rest, body in (
        ("PUT", "", job_body(NOBODY)), ("PATCH", "", {"timeout": "9s"}), ("DELETE", "", None),
        ("POST", "/rollback/1", None),
    ):  # fmt: skip
        error = managed.error(409, method, path_of(job, rest), body)
        assert error["code"] == "CONFLICT"
        assert "chronos.yaml" in error["message"]
    assert managed.get("/jobs")["jobs"] == [job]


def test_a_declared_job_is_triggered_replayed_cancelled_and_disabled_as_any_other(managed, target):
    path = path_of(managed.job)

    execution = managed.post(f"{path}/trigger")
    managed.expect(202, "POST", f"{path}/executions/{execution['id']}/replay")
    assert not managed.post(f"{path}/disable")["enabled"]
    assert managed.post(f"{path}/enable")["enabled"]
    assert not managed.expect(200, "PATCH", path, {"enabled": False})["enabled"]
    wait_until(lambda: target.received.qsize() == 2)
    error = managed.error(409, "POST", f"{path}/executions/{execution['id']}/cancel")
    assert "has ended" in error["message"]


# --- triggers -------------------------------------------------------------------------


def test_a_trigger_answers_with_the_ended_execution_even_of_a_disabled_job(service, target):
    job = service.create(target.url + "/ok", enabled=False)

    execution = service.post(trigger_path(job))

    _method, _path, headers, _body, _at = target.take()
    instants = ("scheduled_time", "started_at", "completed_at")
    scheduled, started, completed = (chronos.parse_time(execution[name]) for name in instants)
    assert headers["X-Chronos-Execution-ID"] == execution["id"]
    assert execution["id"] == f"exec-{uuid.UUID(execution['id'][5:])}"
    assert (execution["job_id"], execution["job_name"]) == (job["id"], "report")
    assert (execution["status"], execution["attempts"]) == ("success", 1)
    assert (execution["status_code"], execution["response"]) == (200, "OK")
    assert scheduled <= started < completed
    assert 0 < execution["duration"] // 1000 <= completed - started + SECOND // 100
    assert execution["node_id"] == service.service.settings.cluster.node_id
    assert service.get(path_of(job))["last_execution"]["id"] == execution["id"]


@pytest.mark.parametrize(("query", "at_least"), [("?wait=0", 0), ("?wait=1s", 1)])
def test_a_trigger_waits_no_longer_than_it_is_asked_to(service, target, query, at_least):
    job = service.create(target.url + "/hang")
    start = time.monotonic()

    execution = service.expect(202, "POST", trigger_path(job, query))

    assert at_least <= time.monotonic() - start < at_least + 5
    assert execution["status"] in ("pending", "running")
    assert execution["completed_at"] is execution["duration"] is None
    target.let_go.set()
    path = path_of(job, f"/executions/{execution['id']}")
    assert wait_until(lambda: service.get(path)["completed_at"])


def test_the_same_key_again_is_answered_with_the_run_as_it_stands(service, target, background):
    job = service.create(target.url + "/hang", concurrency="allow")
    path = trigger_path(job)
    waiting = [background.submit(service.call, "POST", path, headers=keyed()) for _ in range(5)]
    run = service.expect(202, "POST", trigger_path(job, "?wait=0"), headers=keyed())
    wait_until(lambda: len(service.service.engine.waiters._execution_ids) == 5)
    target.let_go.set()

    ended = service.expect(200, "POST", path, headers=keyed())
    answers = [call.result(20) for call in waiting]

    assert (run["completed_at"], ended["status"]) == (None, "success")
    assert [(status, answer["data"]) for status, answer in answers] == [(200, ended)] * 5
    assert [execution["id"] for execution in history_of(service, job)] == [run["id"]]


def test_a_key_is_of_one_job_and_there_of_its_triggers_or_the_replays_of_one_run(service, target):
    jobs = [service.create(target.url + "/ok", concurrency="allow") for _ in range(2)]
    paths = [trigger_path(job) for job in jobs]
    runs = [service.expect(200, "POST", path, headers=keyed())["id"] for path in paths]
    runs.append(service.expect(200, "POST", paths[0], headers=keyed("order-18"))["id"])
    paths = [path_of(jobs[0], f"/executions/{runs[n]}/replay") for n in (0, 2)]
    replays = [service.expect(202, "POST", path, headers=keyed()) for path in paths]
    runs += [replay["replay_execution_id"] for replay in replays]
    wait_until(lambda: all(run["completed_at"] for run in history_of(service, jobs[0])))

    assert [service.expect(202, "POST", path, headers=keyed()) for path in paths] == replays
    told = [service.expect(200, "POST", trigger_path(job), headers=keyed())["id"] for job in jobs]

    assert told == runs[:2]
    assert len(set(runs)) == 5
    assert sorted(run["id"] for job in jobs for run in history_of(service, job)) == sorted(runs)
    assert target.received.qsize() == 5


def test_a_key_whose_run_got_no_answer_is_answered_as_before(service):
    job = service.create(NOBODY, retry_policy=ONCE)

    answers = [service.expect(500, "POST", trigger_path(job), headers=keyed()) for _ in range(2)]

    assert answers[0] == answers[1]
    assert answers[0]["code"] == "EXECUTION_ERROR"
    assert len(history_of(service, job)) == 1


@pytest.mark.parametrize("wait", ["", "x", "5", "-1s", "1e3s", "NaN", "inf", "%D9%A3s", "1s%00"])
def test_a_wait_that_is_no_duration_is_refused_and_nothing_runs(service, target, wait):
    job = service.create(target.url + "/ok")

    error = service.error(400, "POST", trigger_path(job, f"?wait={wait}"))

    assert (error["code"], error["details"][0]["field"]) == ("VALIDATION_ERROR", "wait")
    assert service.get(path_of(job, "/executions"))["total"] == 0


@pytest.mark.parametrize("body", [
    '{"body": "override"}', "null", "[]", '""', "0", "x=1", "{}{}", '{"": 1}', "\x00", "\udcff",
])  # fmt: skip
def test_a_trigger_or_replay_with_a_body_is_refused_and_nothing_runs(service, target, body):
    job = service.create(target.url + "/ok")
    execution = service.post(trigger_path(job))
    calls = {
        trigger_path(job): "a trigger sends the job's own request",
        path_of(job, f"/executions/{execution['id']}/replay"): "a replay sends what its execution",
    }

    for path, why in calls.items():
        error = service.error(400, "POST", path, as_bytes(body))
        assert error["code"] == "VALIDATION_ERROR"
        assert error["message"].startswith(f"the body must be empty or {{}}: {why}")
    assert service.get(path_of(job, "/executions"))["total"] == 1


@pytest.mark.parametrize("body", [b"", b"{}", b"\r\n{ \t\n} "])
def test_a_trigger_and_a_replay_take_an_empty_object(service, target, body):
    job = service.create(target.url + "/ok")

    execution = service.expect(200, "POST", trigger_path(job), body)

    path = path_of(job, f"/executions/{execution['id']}/replay")
    assert service.expect(202, "POST", path, body)["original_execution_id"] == execution["id"]


def test_a_wait_of_ages_is_as_good_as_none_given(service, target):
    job = service.create(target.url + "/ok")

    status, _envelope = service.call("POST", trigger_path(job, "?wait=999999999999h"))

    assert status in (200, 400)


def test_a_trigger_whose_webhook_answers_with_a_failure_is_200_and_failed(service, target):
    job = service.create(target.url + "/status/503", retry_policy=ONCE)

    execution = service.post(trigger_path(job))

    assert (execution["status"], execution["reason"]) == ("failed", "http_status")
    assert (execution["status_code"], execution["response"]) == (503, "OK")
    assert "503" in execution["error"]


@pytest.mark.parametrize(("path", "timeout", "cause"), [
    (NOBODY, "5s", "refused"),
    ("/hang", "200ms", "timeout"),
    ("http://127.0.0.2:1/", "5s", "127.0.0.2"),
])  # fmt: skip
def test_a_trigger_without_any_answer_is_an_execution_error(
    make_service, target, path, timeout, cause
):
    service = make_service(dispatcher__blocked_networks=["127.0.0.2/32"])
    url = target.url + path if path.startswith("/") else path
    job = service.create(url, timeout=timeout, retry_policy=ONCE)

    error = service.error(500, "POST", trigger_path(job))

    (execution,) = service.get(path_of(job, "/executions"))["executions"]
    assert (error["code"], execution["status"]) == ("EXECUTION_ERROR", "failed")
    assert execution["id"] in error["message"]
    assert execution["error"] in error["message"]
    assert cause in error["message"]


@pytest.mark.parametrize(("threads", "count"), [(8, 20), (16, 40)])
def test_triggers_that_wait_leave_four_threads_to_everybody_else(
    make_service, target, background, threads, count
):
    service = make_service(server__http__threads=threads)
    job = service.create(target.url + "/hang", concurrency="allow")
    calls = [background.submit(service.call, "POST", trigger_path(job)) for _ in range(count)]

    at_once = as_completed(calls, 10)
    done = {next(at_once) for _ in range(count - threads + 4)}
    start = time.monotonic()
    service.get("/health")
    assert service.get("/jobs")["total"] == 1

    assert time.monotonic() - start < 1
    assert {call.result()[0] for call in done} == {202}
    target.let_go.set()
    assert [call.result(10)[0] for call in set(calls) - done] == [200] * (threads - 4)


def test_of_triggers_at_the_same_time_forbid_runs_one_and_the_others_name_it(
    service, target, background
):
    job = service.create(target.url + "/hang", concurrency="forbid")

    with held(service.service.engine) as inbox:
        calls = [background.submit(service.call, "POST", trigger_path(job)) for _ in range(10)]
        wait_until(lambda: inbox.qsize() == 10)
    skipped = [call.result() for call in islice(as_completed(calls, 10), 9)]
    target.let_go.set()

    [ran] = [call.result(10) for call in calls if call.result(10) not in skipped]
    assert (ran[0], ran[1]["data"]["status"]) == (200, "success")
    told = [(code, *map(a["data"].get, ("status", "reason", "attempts"))) for code, a in skipped]
    assert told == [(200, "skipped", "overlap", 0)] * 9
    in_the_way = f"{ran[1]['data']['id']} was still pending"
    assert {answer["data"]["error"] for _code, answer in skipped} == {in_the_way}
    assert target.received.qsize() == 1


# --- executions -----------------------------------------------------------------------


def test_the_executions_of_a_job_are_listed_newest_first_and_at_most_100(service, target):
    job = service.create(target.url + "/hang")
    ids = [service.start(job)["id"]]
    ids += [service.post(trigger_path(job))["id"] for _ in range(104)]
    path = path_of(job, "/executions")

    for query, count in (("", 20), ("?limit=1", 1), ("?limit=100", 100), ("?limit=101", 100)):
        page = service.get(path + query)
        assert [execution["id"] for execution in page["executions"]] == ids[::-1][:count]
        assert page["total"] == 105


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1e99", "", "1.5", "%D9%A3", "9" * 5000])
def test_a_limit_that_is_no_number_from_1_is_refused(service, limit):
    job = service.create(NOBODY)

    error = service.error(400, "GET", path_of(job, f"/executions?limit={limit}"))

    assert (error["code"], error["details"][0]["field"]) == ("VALIDATION_ERROR", "limit")


def test_one_execution_shows_each_attempt(service, target):
    retry = {"max_attempts": 2, "initial_interval": "1ms"}
    job = service.create(target.url + "/status/503", retry_policy=retry)
    execution = service.post(trigger_path(job))

    shown = service.get(path_of(job, f"/executions/{execution['id']}"))

    attempts = shown.pop("attempt_log")
    assert shown.pop("request")["method"] == "POST"
    assert shown == execution
    assert shown["attempts"] == 2
    assert [(a["number"], a["status_code"]) for a in attempts] == [(1, 503), (2, 503)]
    assert "503" in attempts[0]["error"]
    starts = [chronos.parse_time(entry["started_at"]) for entry in (shown, *attempts)]
    assert starts[0] <= starts[1] < starts[2]
    assert 0 < sum(attempt["duration"] for attempt in attempts) <= shown["duration"]


@pytest.mark.parametrize(("charset", "body"), [("utf-7", "+2AA-"), ("unicode_escape", "\\ud800")])
def test_a_lone_surrogate_in_an_answer_harms_no_list(service, target, charset, body):
    target.extra_headers["Content-Type"] = f"text/plain; charset={charset}"
    job = service.create(target.url + "/echo", webhook={"body": body})
    service.post(trigger_path(job))

    (execution,) = service.get(path_of(job, "/executions"))["executions"]

    assert execution["status"] == "success"
    assert "\ud800" not in execution["response"]


@pytest.fixture
def history(service, target):
    """A job and its executions: two successes, one that runs on, one that it skipped."""
    job = service.create(target.url + "/ok", name="history")
    ids = [service.post(trigger_path(job))["id"] for _ in range(2)]
    patch(service, job, {"webhook": {"url": target.url + "/hang"}})
    ids.append(service.start(job)["id"])
    assert target.hanging.acquire(timeout=10)
    return job, [*ids, service.post(trigger_path(job))["id"]]


@pytest.mark.parametrize(("query", "found", "total"), [
    ("before={3}", [2, 1, 0], 4), ("before={2}&limit=1", [1], 4), ("before={0}", [], 4),
    ("status=success", [1, 0], 2), ("status=success&before={1}", [0], 2), ("status=failed", [], 0),
    ("status=running", [2], 1), ("status=skipped", [3], 1), ("limit=500", [3, 2, 1, 0], 4),
    ("reason=overlap", [3], 1), ("reason=overlap&status=success", [], 0), ("reason=missed", [], 0),
    ("from={5}", [3, 2, 1], 3), ("to={5}", [0], 1), ("from={5}&to={7}", [2, 1], 2),
    ("from={4}&to={7}&status=success", [1, 0], 2), ("from={5}&to={7}&before={2}", [1], 2),
    ("from=2999-01-01T00:00:00Z", [], 0), ("from={5}&reason=overlap", [3], 1),
])  # fmt: skip
def test_executions_are_paged_by_before_and_filtered(service, history, query, found, total):
    job, ids = history
    runs = service.get(path_of(job, "/executions"))["executions"][::-1]
    query = query.format(*ids, *(run["scheduled_time"] for run in runs))

    page, overall = (service.get(f"{path}/executions?{query}") for path in (path_of(job), ""))

    assert [execution["id"] for execution in page["executions"]] == [ids[n] for n in found]
    assert page["total"] == total
    assert [e["id"] for e in overall["executions"]] == [ids[n] for n in found]
    assert overall["has_more"] is ("limit=1" in query)
    assert all(e["job_name"] == "history" and "response" not in e for e in overall["executions"])


def test_an_execution_of_another_job_is_none(service, history):
    other, running = path_of(service.create(NOBODY), "/executions"), history[1][2]

    paths = ["?before={}", "/{}", "/{}/replay", "/{}/cancel"]
    calls = zip(("GET", "GET", "POST", "POST"), (other + path for path in paths), strict=True)
    for method, path in [*calls, ("GET", f"/executions?before=exec-{NO_ID}")]:
        assert service.error(404, method, path.format(running))["code"] == "NOT_FOUND"
    assert service.get("/executions?status=running")["executions"][0]["id"] == running


def test_a_replay_sends_what_the_original_sent_even_after_a_change(service, target):
    job = service.create(target.url + "/old", webhook={"body": "old", **WITH_SECRET["bearer"]})
    original, first = service.post(trigger_path(job)), target.take()
    patch(service, job, {"webhook": {"url": target.url + "/new", "body": "new", "auth": None}})

    answer = service.expect(202, "POST", path_of(job, f"/executions/{original['id']}/replay"))

    again, replay_id = target.take(), answer.pop("replay_execution_id")
    assert answer.pop("original_execution_id") == original["id"] != replay_id
    assert answer == {"message": "Execution replay triggered"}
    assert [again[n] for n in (0, 1, 3)] == ["POST", "/old", b"old"]
    fresh = {"X-Chronos-Execution-ID": replay_id, "Idempotency-Key": replay_id}
    assert differences(dict(first[2]), dict(again[2])) == fresh
    replay = service.get(path_of(job, f"/executions/{replay_id}"))
    kept = {name: original[name] for name in ("job_version", "scheduled_time")}
    assert {"trigger": "replay", "replay_of": original["id"], **kept}.items() <= replay.items()


def test_a_replay_obeys_the_concurrency_that_the_job_has_now(service, history):
    job, ids = history

    for concurrency, status in (("forbid", "skipped"), ("allow", "success")):
        patch(service, job, {"concurrency": concurrency})
        service.expect(202, "POST", path_of(job, f"/executions/{ids[0]}/replay"))
        newest = path_of(job, f"/executions?limit=1&status={status}")
        wait_until(lambda url=newest: service.get(url)["executions"][0]["trigger"] == "replay")


def test_cancelling_a_running_execution_ends_its_connection(service, hostile):
    def behave(server, connection):
        server.requests.put(read_request(connection))
        server.requests.put(connection.recv(1))

    server = hostile(behave)
    job = service.create(server.url)
    execution = service.start(job)
    path = path_of(job, f"/executions/{execution['id']}")
    assert server.requests.get(timeout=10)

    answer = service.post(path + "/cancel")

    assert (answer["status"], answer["reason"]) == ("failed", "cancelled")
    assert "anonymous" in answer["error"]
    assert server.requests.get(timeout=2) == b""
    assert service.error(409, "POST", path + "/cancel")["code"] == "CONFLICT"


def test_a_pending_execution_that_was_cancelled_is_not_sent(service, target):
    job = service.create(target.url + "/status/503", retry_policy={"initial_interval": "2s"})
    execution = service.expect(202, "POST", trigger_path(job, "?wait=1s"))

    answer = service.post(path_of(job, f"/executions/{execution['id']}/cancel"))

    assert (execution["status"], execution["attempts"]) == ("pending", 1)
    assert (answer["status"], answer["reason"], answer["attempts"]) == ("failed", "cancelled", 1)
    target.take()
    with pytest.raises(queue.Empty):
        target.received.get(timeout=2)


# --- lists of jobs --------------------------------------------------------------------


@pytest.mark.parametrize(("query", "found", "total"), [
    ("enabled=true", "a", 1), ("enabled=false", "bcd", 3), ("q=REPORT", "b", 1),
    ("tag=team:x", "ab", 2), ("tag=team:x&tag=env:prod:eu", "b", 1), ("tag=team:", "d", 1),
    (r"tag=k8s\:app:x:y", "c", 1), ("tag=k8s:app:x:y", "d", 1), (r"tag=k8s\:app:x", "", 0),
    ("tag=%5C%5C%5C::%5C:%5C", "c", 1),
    ("tag=gr%C3%B6%C3%9Fe:%22", "c", 1), ("q=nightly", "ac", 2), ("q=%25", "d", 1),
    ("q=%C3%84RGER", "c", 1),
    ("name=c NIGHTLY", "c", 1), ("name=c nightly", "", 0), ("name=c", "", 0),
    ("name=a&enabled=true", "a", 1),
    ("status=success", "a", 1), ("status=failed", "b", 1), ("status=skipped", "", 0),
    ("last_status=failed", "b", 1), ("last_status=missed", "", 0),
    ("last_status=success&tag=team:x", "a", 1),
    ("limit=2", "ab", 4), ("limit=2&offset=1", "bc", 4), ("offset=9", "", 4),
    ("q=nightly&limit=1", "a", 2), ("q=nightly&enabled=false&tag=team:x", "", 0),
])  # fmt: skip
def test_jobs_are_found_by_state_name_tag_text_and_outcome(service, target, query, found, total):
    tags, url = {"team": "x"}, target.url + "/status/404"
    odd_tags = {"größe": '"', "Team": "x", "k8s:app": "x:y", "\\:": "\\:\\"}
    service.create(target.url, name="a", description="Nightly", enabled=True, tags=tags)
    service.create(url, name="b Report", tags=tags | {"env": "prod:eu"})
    service.create(url, name="c NIGHTLY", description="ärger", tags=odd_tags)
    service.create(url, name="d 100%", tags={"team": "", "k8s": "app:x:y"})
    for job in service.get("/jobs?limit=2")["jobs"]:
        service.post(trigger_path(job))

    answer = service.get(f"/jobs?{query}")

    assert "".join(job["name"][0] for job in answer["jobs"]) == found
    assert answer["total"] == total


def test_jobs_are_paged_by_after_and_none_is_skipped_when_others_come_and_go(service):
    ids = [service.create(NOBODY, name=f"n{n}", enabled=n % 2 == 0)["id"] for n in range(8)]
    page = lambda query: [job["id"] for job in service.get(f"/jobs?{query}")["jobs"]]

    first = page("limit=3")
    for number in (0, 4, 7):
        service.expect(200, "DELETE", f"/jobs/{ids[number]}")
    new = service.create(NOBODY, name="new")["id"]
    second = page(f"limit=3&after={first[-1]}")
    third = page(f"limit=3&after={second[-1]}")

    assert (first, second, third) == (ids[:3], [ids[3], *ids[5:7]], [new])
    assert page(f"after={new}") == []
    assert page(f"after={ids[1]}&offset=1&limit=2") == [ids[3], ids[5]]
    assert page(f"after={ids[1]}&enabled=true") == [ids[2], ids[6]]
    assert page(f"after={ids[1]}&q=N5") == page(f"after={ids[1]}&name=n5") == [ids[5]]
    assert service.get(f"/jobs?after={ids[6]}&enabled=false&limit=1")["total"] == 4


@pytest.mark.parametrize("odd", ["{deleted}", NO_ID, "x", chronos.ALERTS_ID])
def test_after_a_job_that_is_gone_is_not_found_rather_than_all_or_nothing(service, odd):
    deleted = service.create(NOBODY)["id"]
    service.create(NOBODY)
    service.expect(200, "DELETE", f"/jobs/{deleted}")

    error = service.error(404, "GET", f"/jobs?after={odd.format(deleted=deleted)}")

    assert "go on after another one, or begin anew" in error["message"]


@pytest.mark.parametrize(("path", "fields"), [
    ("jobs?enabled=yes&status=done&limit=0&offset=-1", ["limit", "offset", "enabled", "status"]),
    ("jobs?limit=x&offset=1e99", ["limit", "offset"]),
    ("executions?limit=0&status=done", ["limit", "status"]),
    ("executions?reason=deleted&from=monday&to=2027-03-01", ["reason", "from", "to"]),
    ("executions?from=2027-03-01T12:00:00Z&to=2027-03-01T13:00:00%2B01:00", ["to"]),
    ("jobs?last_status=skipped", ["last_status"]),
    (f"jobs/{NO_ID}/versions?limit=0&before=x", ["limit", "before"]),
    ("schedules/preview?count=0", ["schedule", "count"]),
    ("schedules/preview?schedule=* * *&timezone=Mars/Base&count=x&from=tomorrow",
        ["schedule", "timezone", "count", "from"]),
])  # fmt: skip
def test_a_wrong_query_is_refused_naming_every_parameter(service, path, fields):
    assert wrong_fields(service, "GET", f"/{path}") == fields


TAG = "tag=a:b"
TAG_FORM = r"must be a name, a colon and a value; in the name, : is written \: and \ is \\"


@pytest.mark.parametrize(("method", "path", "problem"), [
    ("GET", "/jobs?nmae=x", ("nmae", "is not a known name (did you mean 'name'?)")),
    ("GET", "/jobs?limits=1", ("limits", "is not a known name (did you mean 'limit'?)")),
    ("GET", "/jobs?limit=1&limit=1", ("limit", "is there more than once")),
    *(("GET", f"/jobs?tag={tag}", ("tag", TAG_FORM)) for tag in (
        "team", "", ":x", r"a\:b", "a%5Cb:c", "a%5C")),
    ("GET", "/jobs?" + "&".join([TAG] * 21), ("tag", "must not be there more than 20 times")),
    ("GET", "{job}?limit=1", ("limit", "is not a known name: there are none here")),
    ("GET", "{job}/executions?state=failed",
        ("state", "is not a known name (did you mean 'status'?)")),
    ("DELETE", "{job}?dry_run=true", ("dry_run", "is not a known name: there are none here")),
    ("POST", "{job}/trigger?wiat=0", ("wiat", "is not a known name (did you mean 'wait'?)")),
    ("GET", "/stats?x", ("x", "is not a known name: there are none here")),
])  # fmt: skip
def test_a_query_is_as_strict_as_a_body_and_nothing_happens(service, method, path, problem):
    job = service.create(NOBODY)

    error = service.error(400, method, path.format(job=path_of(job)))

    assert error["code"] == "VALIDATION_ERROR"
    assert [(detail["field"], detail["message"]) for detail in error["details"]] == [problem]
    assert service.get(path_of(job))["last_execution"] is None


def test_every_route_refuses_a_query_that_it_does_not_know(service, target):
    job = service.create(target.url)
    names = {"job_id": job["id"], "exec_id": service.post(trigger_path(job))["id"]}
    before = service.get(path_of(job))

    for method, template, handler in JSON_ROUTES:
        path = re.sub("<([^:>]+).*?>", lambda match: names.get(match[1], "1"), template)
        if handler not in chronos.BARE:
            wrong = wrong_fields(service, method, f"{path.removeprefix('/api/v1')}?lime=1")
            assert wrong[0] == "lime", handler
    assert service.get(path_of(job)) == before


def test_the_page_the_metrics_and_health_mind_no_query(service):
    for path in ("/?from=mail", "/metrics?x=1&x=2", "/health?x"):
        assert requests.get(service.url + path, timeout=10).status_code == 200


def test_a_query_of_thousands_of_parts_is_refused_before_it_is_read(service):
    error = service.error(400, "GET", "/jobs?" + "&".join([TAG] * 15_000))

    assert error["message"] == "the query has more than 100 parts"
    assert service.get("/jobs?" + "&".join([TAG] * 20))["total"] == 0


# --- long answers ---------------------------------------------------------------------

MEGABYTES = {"method": "POST", "url": NOBODY, "body": "x" * 1_000_000}


def test_a_long_list_is_what_it_is_in_memory_and_comes_in_pieces(service):
    jobs = [service.create(NOBODY, webhook=MEGABYTES | {"url": f"{NOBODY}/{n}"}) for n in range(3)]

    answer = requests.get(service.url + "/api/v1/jobs", timeout=10)

    data = {"jobs": jobs, "total": 3}
    assert answer.json() == {"success": True, "data": data, "error": None}
    assert answer.content == json.dumps(answer.json()).encode() + b"\n"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    short = requests.get(service.url + "/api/v1/jobs?offset=9", timeout=10)
    assert short.headers["Content-Length"] == str(len(short.content))


@pytest.mark.parametrize("value", [
    iter(()), iter([1, {"a": None}]), {"a": iter(()), "b": iter("xy"), "c": {}, "d": [1, []]}, {},
    {"a": {"b": iter([{"c": "ä"}])}}, None, "text", [True, 1.5],
], ids=repr)  # fmt: skip
def test_json_in_pieces_is_the_json_of_the_whole(value):
    def whole(part):
        if isinstance(part, dict):
            return {name: whole(member) for name, member in part.items()}
        return list(part) if isinstance(part, collections.abc.Iterator) else part

    value, again = copy.deepcopy(value), copy.deepcopy(value)

    assert "".join(chronos.json_pieces(value)) == json.dumps(whole(again))


@pytest.mark.parametrize("path", ["/jobs", "/jobs/{id}/versions", "/stats"])
def test_a_long_list_costs_the_memory_of_a_page(make_process, path):
    process = make_process()
    for _ in range(40):
        job = process.create(NOBODY, webhook=MEGABYTES)
    for number in range(40):
        process.expect(200, "PATCH", path_of(job), {"description": str(number)})
    home = Path(f"/proc/{process.process.pid}")
    at_rest = memory(process, "VmRSS")
    (home / "clear_refs").write_text("5")  # the peak counts from here

    url = f"{process.url}/api/v1{path.format(**job)}"
    with requests.get(url, timeout=30, stream=True) as answer:
        size = sum(len(piece) for piece in answer.iter_content(65536))

    more = memory(process, "VmHWM") - at_rest
    print(f"{path}: {size / 1e6:.1f} MB, at most {more:.1f} MB more")
    assert more < 30


def free_places(service, keep=False):
    """Return how many threads may be held for long now; ``keep``: they are from now on."""
    places, count = service.service.api.executions.may_wait, 0
    while places.acquire(blocking=False):
        count += 1
    for _ in range(0 if keep else count):
        places.release()
    return count


def test_long_answers_leave_threads_for_all_other_calls(service, monkeypatch):
    monkeypatch.setattr(chronos, "SHORT_ANSWER", 1000)
    monkeypatch.setattr(chronos, "CHUNK_BYTES", 1000)
    for _ in range(9):
        service.create(NOBODY)
    for _ in range(20):  # each gives its place back
        assert len(service.get("/jobs")["jobs"]) == 9
    assert free_places(service, keep=True) == 12  # as when so many wait for an execution

    assert len(service.get("/jobs")["jobs"]) == 9
    monkeypatch.setattr(service.service.api.long_answers, "_places", ())
    error = service.error(503, "GET", "/jobs")

    assert error["code"] == "UNAVAILABLE" and "too many long answers" in error["message"]
    assert service.get("/jobs?limit=1")["total"] == 9


@pytest.fixture
def long_answers(service, clock):
    """Makes answers as the API does, by the clock of the test."""
    return chronos.LongAnswers(service.service.store, clock, threading.BoundedSemaphore(12))


def test_no_more_than_two_threads_make_a_long_answer_at_a_time(
    long_answers, background, monkeypatch
):
    monkeypatch.setattr(chronos, "CHUNK_BYTES", 100)
    lock, making = threading.Lock(), [0, 0]  # now, and at most

    def items():
        yield "x" * 100  # the first chunk waits for nobody
        for _ in range(10):
            with lock:
                making[:] = making[0] + 1, max(making[1], making[0] + 1)
            time.sleep(0.002)
            with lock:
                making[0] -= 1
            yield "y" * 100

    bodies = list(background.map(lambda _: long_answers.body(items()), range(8)))

    assert [len(json.loads(body)["data"]) for body in bodies] == [11] * 8
    assert making == [0, 2]


@pytest.mark.parametrize(("cost", "waits"), [(0.003, False), (0.006, True)])
def test_what_is_short_and_soon_made_waits_for_no_long_answer(
    long_answers, clock, background, cost, waits
):
    def items():
        for n in range(3):
            clock.advance(cost)
            yield n

    for _ in range(2):  # as if two long answers were being made
        long_answers._making.acquire()
    body = background.submit(long_answers.body, items())
    done, _waiting = concurrent.futures.wait([body], timeout=1 if waits else 20)
    assert (not done) == waits
    long_answers._making.release()

    assert json.loads(body.result(20))["data"] == [0, 1, 2]


def test_a_read_that_takes_long_is_a_503_and_the_next_one_is_answered(service, monkeypatch):
    jobs = service.service.store.jobs
    monkeypatch.setattr(chronos, "READ_LIMIT", SECOND // 5)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "pages", lambda *_: jobs._database.run(FOR_EVER))
        error = service.error(503, "GET", "/jobs")

    assert error["code"] == "UNAVAILABLE" and "to read that took more than" in error["message"]
    assert service.get("/jobs")["total"] == 0


def test_a_long_answer_that_fails_amid_its_body_is_no_whole_answer(service, monkeypatch, caplog):
    monkeypatch.setattr(chronos, "SHORT_ANSWER", 100)
    monkeypatch.setattr(chronos, "CHUNK_BYTES", 100)
    service.create(NOBODY)

    def fail(_pages, _has_ended=False):
        yield {"x": "y" * 1000}
        raise chronos.StoreError("the database failed")

    monkeypatch.setattr(service.service.api.jobs, "jobs_json", fail)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(service.url + "/api/v1/jobs", timeout=10)

    line = "GET /api/v1/jobs was broken off: the database failed"
    wait_until(lambda: line in [record.getMessage() for record in caplog.records])
    wait_until(lambda: free_places(service) == 12)


def test_a_client_that_takes_nothing_holds_no_thread(service):
    for _ in range(25):  # more than sockets and waitress hold
        service.create(NOBODY, webhook=MEGABYTES)
    with connect(service) as connection:
        connection.sendall(b"GET /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        channels = service.service._http._server.active_channels
        wait_until(lambda: [c for c in channels.values() if c.total_outbufs_len > 1 << 20])
        assert free_places(service) == 11

        http = service.service._http

        def is_free():  # it is asked again, as by the service: just now all may have been taken
            http._call(lambda: http._close_idle(time.time() + 3600))
            return free_places(service) == 12

        wait_until(is_free)


def test_a_stop_breaks_off_what_is_read_and_sent(make_process, target):
    process = make_process()
    for _ in range(25):
        process.create(NOBODY, webhook=MEGABYTES)
    with connect(process) as connection:
        connection.sendall(b"GET /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(100)

        start = time.monotonic()
        assert process.end(signal.SIGTERM) == 0

    assert time.monotonic() - start < 8


# --- what the dashboard asks for ------------------------------------------------------


def test_stats_say_in_one_answer_how_all_is(service, target):
    good = service.create(target.url, name="good", enabled=True)
    bad = service.create(target.url + "/status/404", name="bad", enabled=True, tags={"a": "b"})
    for job in (good, bad, bad):
        run = service.post(trigger_path(job))
    hanging = service.create(target.url + "/hang", name="hanging")
    service.start(hanging)
    assert target.hanging.acquire(timeout=10)

    _status, stats, _etag = poll(service)

    counts = {"jobs_total": 3, "enabled": 2, "failing": 1, "running": 1, "pending": 0}
    assert {name: stats[name] for name in counts} == counts
    assert {name: n for name, n in stats["last_24h"].items() if n} == {"success": 1, "failed": 2}
    assert [run["job_name"] for run in stats["active"]] == ["hanging"]
    assert [job["strip"] for job in stats["jobs"]] == ["S", "FF", ""]
    shown = stats["jobs"][1]
    assert (shown["name"], shown["tags"], shown["failures"]) == ("bad", {"a": "b"}, 2)
    assert shown["failing_since"] and shown["next_run"] == bad["next_run"]
    last = shown["last_execution"]
    assert (last["id"], last["error"]) == (run["id"], run["error"])
    assert (stats["problem"], stats["paused"], stats["may_write"]) == (None, False, True)


def test_stats_say_of_a_job_that_its_run_waits_for_another_attempt(service, target):
    target.script = ["/ok", "/status/503"]
    retry = {"initial_interval": "60s"}
    job = service.create(target.url, retry_policy=retry)
    other = service.create(target.url + "/hang", concurrency="allow")
    service.post(trigger_path(job))
    waiting = service.expect(202, "POST", trigger_path(job, "?wait=1s"))
    service.start(other)

    shown, running = poll(service)[1]["jobs"]

    assert (waiting["status"], shown["last_execution"]["status"]) == ("pending", "success")
    assert shown["retrying"] == {
        "id": waiting["id"],
        "attempts": 1,
        "due_at": waiting["due_at"],
        "error": "the server answered 503 Service Unavailable",
    }
    assert running["retrying"] is None


def test_stats_are_not_sent_again_until_something_has_changed(service, target):
    job = service.create(target.url, name="old")
    etag = poll(service)[2]
    assert poll(service, etag)[:2] == (304, b"")

    patch(service, job, {"name": "new"})
    status, stats, changed = poll(service, etag)
    assert (status, stats["jobs"][0]["name"]) == (200, "new")

    for path in ("/enable", "/trigger", "/disable"):
        service.post(path_of(job, path))
        status, stats, newer = poll(service, changed)
        assert (status, newer == changed) == (200, False)
        changed = newer
    assert (stats["jobs"][0]["strip"], stats["jobs"][0]["enabled"]) == ("S", False)

    service.expect(200, "DELETE", path_of(job))
    assert poll(service, changed)[1]["jobs"] == []


def test_stats_have_the_oldest_thousand_jobs_also_when_one_of_them_goes(service):
    retry = service.service.settings.scheduler.default_retry_policy
    config, _enabled = chronos.validate_job(job_body(NOBODY), retry, NOON)
    engine = service.service.engine

    def add_many(turn):
        return [
            engine.job_changes.create(turn, config | {"name": str(n)}, False, "x")
            for n in range(1002)
        ]

    jobs = engine.submit(add_many)
    assert [job["name"] for job in poll(service)[1]["jobs"]] == [str(n) for n in range(1000)]
    service.expect(200, "DELETE", f"/jobs/{jobs[3].id}")
    names = [job["name"] for job in poll(service)[1]["jobs"]]

    assert names == [str(n) for n in range(1001) if n != 3]


def test_a_fault_of_the_store_shows_in_the_stats_until_it_is_over(service):
    path, etag = service.service.store.database.path, poll(service)[2]
    aside = path.with_name("aside")

    path.rename(aside)
    service.call("POST", "/jobs", job_body(NOBODY))
    wait_until(lambda: "was removed" in str(poll(service, etag)[1]))
    aside.rename(path)

    wait_until(lambda: poll(service)[1]["problem"] is None)


def test_upcoming_names_the_fire_times_of_the_next_hours_job_by_job(service):
    service.create(NOBODY, name="off", schedule="@hourly")
    service.create(NOBODY, name="rare", schedule="0 0 1 1 *", enabled=True)
    service.create(NOBODY, name="every", schedule="@every 15m", enabled=True)
    service.create(NOBODY, name="dense", schedule="* * * * * *", enabled=True)

    told = service.get("/schedules/upcoming?hours=1")

    dense, every = told["upcoming"]
    assert (dense["job_name"], len(dense["fire_times"]), dense["has_more"]) == ("dense", 50, True)
    times = [chronos.parse_time(time) for time in every["fire_times"]]
    assert (every["job_name"], len(times), every["has_more"]) == ("every", 4, False)
    assert {later - earlier for earlier, later in itertools.pairwise(times)} == {
        15 * chronos.MINUTE
    }
    assert times[-1] <= chronos.parse_time(told["until"])
    assert wrong_fields(service, "GET", "/schedules/upcoming?hours=0") == ["hours"]


def test_of_a_dense_schedule_no_more_fire_times_are_computed_than_tell_that_there_are_more(
    make_service, clock, monkeypatch
):
    service = make_service(clock=clock)  # It stands still, so the engine computes none.
    service.create(NOBODY, schedule="* * * * * *", enabled=True)
    computed, fire_times = [], chronos.Schedule.fire_times

    def counted(*asked):
        for at in islice(fire_times(*asked), 1000):  # of 604,800
            computed.append(at)
            yield at

    monkeypatch.setattr(chronos.Schedule, "fire_times", counted)
    [dense] = service.get("/schedules/upcoming?hours=168")["upcoming"]

    assert (len(dense["fire_times"]), dense["has_more"]) == (50, True)
    assert len(computed) == 50  # the first is the job's next_run


def test_a_job_that_is_deleted_meanwhile_is_left_out_of_what_comes(service, monkeypatch):
    service.create(NOBODY, name="stays", schedule="@daily", enabled=True)
    jobs = service.service.store.jobs
    gone, soonest = chronos.DueJob(str(uuid.uuid4()), 1, NOON), jobs.soonest

    monkeypatch.setattr(jobs, "soonest", lambda *asked: [gone, *soonest(*asked)])

    upcoming = service.get("/schedules/upcoming?hours=168")["upcoming"]
    assert [job["job_name"] for job in upcoming] == ["stays"]


def test_the_page_of_somebody_who_was_signed_out_is_not_answered_with_a_dialog(guarded):
    answer = requests.get(guarded.url + "/api/v1/stats", headers={"X-Chronos-UI": "1"}, timeout=5)

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("xBasic ")


def test_a_viewer_is_told_that_he_may_only_read(guarded):
    told = {}
    for name in ("ada", "vera"):
        answer = requests.get(guarded.url + "/api/v1/stats", headers=credentials(name), timeout=5)
        told[name] = answer.json()["data"]["may_write"]

    assert told == {"ada": True, "vera": False}


@pytest.mark.parametrize(("known", "status"), [
    ("TAG", 304), ("*", 304), ('"1", TAG', 304), ("W/TAG,W/TAG", 304), ("TAG-gzip", 304),
    ('"1"', 200), ("", 200), ('"1", "*"', 200), ("TAG-x", 200), ("xTAG", 200),
])  # fmt: skip
def test_a_poll_that_names_the_state_gets_no_answer_again(service, known, status):
    etag = poll(service)[2]
    known = known.replace("TAG-gzip", etag[:-1] + '-gzip"').replace("TAG", etag)

    assert poll(service, known)[0] == status


# --- schedules and the cluster --------------------------------------------------------


@pytest.mark.parametrize(("schedule", "after", "utc", "local", "note"), [
    ("30 2 * * *", "03-27T12:00", "03-28T01:00", "03-28T03:00:00+02:00", "forward"),
    ("30 2 * * *", "03-28T12:00", "03-29T00:30", "03-29T02:30:00+02:00", None),
    ("0 * * * *", "03-28T00:30", "03-28T01:00", "03-28T03:00:00+02:00", None),
    ("30 2 * * *", "10-30T12:00", "10-31T00:30", "10-31T02:30:00+02:00", "only the first"),
    ("30 * * * *", "10-31T00:00", "10-31T00:30", "10-31T02:30:00+02:00", "both"),
    ("30 * * * *", "10-31T00:30", "10-31T01:30", "10-31T02:30:00+01:00", "both"),
])  # fmt: skip
def test_a_preview_notes_a_clock_change(service, schedule, after, utc, local, note):
    query = f"schedule={schedule}&timezone=Europe/Madrid&from=2027-{after}:00Z&count=1"

    (run,) = service.get(f"/schedules/preview?{query}")["next_runs"]

    assert (run["utc"], run["local"]) == (f"2027-{utc}:00Z", f"2027-{local}")
    assert note in run["note"] if note else run["note"] is None


@pytest.mark.parametrize(("schedule", "warnings"), [
    ("0 0 1 * 1", ["either"]), ("0 0 31 * *", []), ("0 9 * * 1", []), ("@every 1h", []),
    ("* * * * * *", ["every second"]),
    ("0 9 * * *", []),
])  # fmt: skip
def test_a_preview_warns_of_what_people_often_do_not_mean(service, schedule, warnings):
    found = service.get(f"/schedules/preview?schedule={schedule}")["warnings"]

    assert len(found) == len(warnings)
    assert all(words in warning for warning, words in zip(found, warnings, strict=True))


@pytest.mark.parametrize(("query", "count"), [
    ("@hourly", 5), ("@hourly&count=999", 100), ("@at 2020-01-01T00:00:00Z", 0),
    ("@at 2020-01-01T01:00:00%2B01:00&from=2019-01-01T00:00:00Z", 1),
    *((query, 0) for query in (
        "@daily&from=9999-12-31T23:59:59Z", "0 0 29 2 *&from=9999-01-01T00:00:00Z")),
    ("@daily&from=0001-01-01T00:00:00Z&timezone=America/New_York", 0),
])  # fmt: skip
def test_a_preview_has_five_runs_and_at_most_100_and_ends_where_dates_end(service, query, count):
    assert len(service.get(f"/schedules/preview?schedule={query}")["next_runs"]) == count


def test_the_cluster_counts_what_there_is_and_names_the_ten_soonest(make_service, target):
    service = make_service(dispatcher__max_concurrent_jobs=1, cluster__node_id="n1")
    hours = range(12, 0, -1)
    jobs = [service.create(NOBODY, schedule=f"@every {n}h", enabled=True) for n in hours]
    busy = service.create(target.url + "/hang", concurrency="allow")
    for _ in range(3):
        service.start(busy)
    assert target.hanging.acquire(timeout=10)

    status = service.get("/cluster/status")

    soonest = [{"job_id": job["id"], "next_run": job["next_run"]} for job in jobs[:1:-1]]
    assert 0 <= status.pop("uptime") < 60
    assert status == {
        "is_leader": True, "node_id": "n1", "version": chronos.__version__, "jobs_total": 13,
        "enabled": 12, "failing": 0,
        "running": 1, "pending": 2, "next_runs": soonest}  # fmt: skip


# --- the answers of the reference -----------------------------------------------------

# fmt: off
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
ID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
JOB = {  # the answers of the API reference
    "id": ID, "name": str, "description": str, "schedule": str, "timezone": str, "next_run": TIME,
    "webhook": {"url": str, "method": str}, "enabled": bool, "created_at": TIME, "updated_at": TIME}
TRIGGERED = {
    "id": f"exec-{ID}", "job_id": ID, "status": str, "attempts": int, "started_at": TIME,
    "completed_at": TIME, "status_code": int, "response": str, "duration": int}
EXECUTION = TRIGGERED | {"job_name": str, "scheduled_time": TIME, "node_id": str}
VERSION = {"job_id": ID, "version": int, "config": {}, "created_at": TIME, "created_by": str}
ROLLED_BACK = {"job": JOB, "rolled_back_from": int, "new_version": int}
CLUSTER = {
    "is_leader": bool, "jobs_total": int, "running": int,
    "next_runs": [{"job_id": ID, "next_run": TIME}]}
# fmt: on


def check(value, documented):
    """Check that everything of an answer in the reference is there, with its type."""
    if isinstance(documented, dict):
        for name, inner in documented.items():
            check(value[name], inner)
    elif isinstance(documented, list):
        for item in value or [None]:
            check(item, documented[0])
    elif isinstance(documented, str):
        assert re.fullmatch(documented, value)
    else:
        assert type(value) is documented


def test_every_answer_has_what_the_reference_documents(service, target):
    body = EXAMPLE | {"webhook": EXAMPLE["webhook"] | {"url": target.url + "/reports"}}
    job = service.post("/jobs", body)
    execution = service.post(trigger_path(job))
    path = path_of(job)

    check(job, JOB)
    check(put(service, job, body | {"description": "Changed"}), JOB)
    check(service.get(path), JOB)
    check(service.get("/jobs"), {"jobs": [JOB], "total": int})
    check(execution, TRIGGERED)
    check(service.get(path + "/executions"), {"executions": [EXECUTION], "total": int})
    check(service.get(f"{path}/executions/{execution['id']}"), EXECUTION)
    check(service.get(path + "/versions"), [VERSION])
    check(service.get(path + "/versions/2"), VERSION)
    check(service.post(path + "/rollback/1"), ROLLED_BACK)
    check(service.get("/cluster/status"), CLUSTER)
    check(service.post(path + "/enable"), JOB)
    check(service.post(path + "/disable"), JOB | {"next_run": type(None)})


# ======================================================================================
# 18. Service
# ======================================================================================

# --- start and stop -------------------------------------------------------------------


def refuses(client):
    """Say whether nobody accepts connections there any more."""
    try:
        socket.create_connection(("127.0.0.1", int(client.url.rpartition(":")[2])), 1).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_what_runs_end_and_answers_who_waits(make_process, target, background, number):
    process = make_process("server: {shutdown_grace: 20s}")
    job = process.create(target.url + "/hang")
    waiting = background.submit(process.call, "POST", trigger_path(job))
    assert target.hanging.acquire(timeout=10)

    process.process.send_signal(number)

    status, envelope = waiting.result(5)
    assert (status, envelope["data"]["status"]) == (202, "running")
    wait_until(lambda: refuses(process), 2)
    assert process.process.poll() is None
    target.let_go.set()
    process.process.wait(10)
    assert process.end(number) == 0
    (execution,) = make_process().get(path_of(job, "/executions"))["executions"]
    assert execution["id"] == envelope["data"]["id"]
    assert (execution["status"], execution["attempts"]) == ("success", 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_what_ran_when_the_process_ended_is_resumed_by_the_next(
    make_process, target, number, status
):
    process = make_process("server: {shutdown_grace: 200ms}")
    job = process.create(target.url + "/hang", enabled=False)
    execution = process.start(job)
    first = target.take()[2]

    assert process.end(number) == status
    target.let_go.set()
    process = make_process()

    second = target.take()[2]
    assert first["X-Chronos-Execution-ID"] == second["X-Chronos-Execution-ID"] == execution["id"]
    assert (first["X-Chronos-Attempt"], second["X-Chronos-Attempt"]) == ("1", "2")
    path = path_of(job, f"/executions/{execution['id']}")
    assert wait_until(lambda: process.get(path)["completed_at"])
    shown = process.get(path)
    assert (shown["status"], shown["attempts"]) == ("success", 2)
    assert [attempt["error"] for attempt in shown["attempt_log"]] == [INTERRUPTED, None]


def test_a_process_that_was_stopped_for_a_while_goes_on(tmp_path):
    pauses = {signal.SIGSTOP: Process(tmp_path / "a"), signal.SIGTSTP: Process(tmp_path / "b")}
    for number, process in pauses.items():
        process.process.send_signal(number)
    time.sleep(12)  # longer than any wait of the main thread used to be
    for process in pauses.values():
        process.process.send_signal(signal.SIGCONT)

    time.sleep(0.5)

    for process in pauses.values():
        assert process.get("/health")["status"] == "healthy"
        assert [line for line in process.log if "listens on" not in line] == []
        assert process.end(signal.SIGTERM) == 0


def test_of_many_signals_at_once_only_those_with_a_meaning_do_something(make_process, tmp_path):
    process, names = make_process(), ("USR1", "USR2", "WINCH", "CHLD", "URG", "CONT", "TSTP", "HUP")
    numbers = [getattr(signal, f"SIG{name}") for name in names] * 50
    random.Random(1).shuffle(numbers)

    for number in numbers:
        process.process.send_signal(number)
    process.process.send_signal(signal.SIGCONT)

    assert process.get("/health")["status"] == "healthy"
    wait_until(lambda: any("was read again" in line for line in process.log))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        process.process.send_signal(number)
    assert process.end(signal.SIGTERM) == 0
    assert not [line for line in process.log if "INFO" not in line]


def test_a_signal_that_stops_does_not_wait_for_a_reload(make_process):
    process = make_process()

    process.process.send_signal(signal.SIGSTOP)
    for number in (signal.SIGHUP, signal.SIGTERM):
        process.process.send_signal(number)
    process.process.send_signal(signal.SIGCONT)

    assert process.end(signal.SIGCONT) == 0
    assert not any("was read again" in line for line in process.log)


def test_a_low_soft_limit_of_open_files_is_raised(make_process):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        process = make_process()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    address = ("127.0.0.1", int(process.url.rpartition(":")[2]))

    with contextlib.ExitStack() as idle:
        for _ in range(300):
            idle.enter_context(socket.create_connection(address))
        with contextlib.suppress(requests.RequestException):
            requests.get(process.url + "/health", timeout=2)

    assert process.get("/health")["status"] == "healthy"
    assert "Too many open files" not in "".join(process.log)


@pytest.mark.parametrize("silent", ["watchdog", "engine"])
def test_health_tells_of_a_thread_that_is_silent_for_30_s(make_service, monkeypatch, silent):
    clock, begun, let_go = HookedClock(), threading.Event(), threading.Event()
    monkeypatch.setattr(chronos, "Clock", lambda: clock)

    def hook():
        if threading.current_thread().name == silent and not let_go.is_set():
            begun.set()
            if silent == "watchdog":
                raise RuntimeError("a bug")
            let_go.wait(20) or let_go.set()

    clock.hook, client = hook, make_service()
    engine = client.service.engine
    assert begun.wait(10)
    for seconds, status in ((30, 200), (1, 503)):
        clock.advance(seconds)
        wait_until(lambda: clock.mono in (engine.last_turn, engine.dispatcher.last_watch))
        shown = client.expect(status, "GET", "/health")
        assert ("WATCHDOG=1" in client.service.signs_of_life()) == (status == 200)
    let_go.set()
    wait_until(lambda: client.call("GET", "/health")[0] == 200)

    assert shown == {"code": "UNAVAILABLE", "message": "a thread has been silent for 31 s"}


def test_a_start_that_fails_after_the_engine_runs_leaves_no_thread(tmp_path, monkeypatch):
    service = chronos.Service(make_settings(tmp_path / "data"))
    monkeypatch.setattr(service.engine.job_changes, "declare", a_bug)

    with pytest.raises(chronos.ApiError, match="a bug"):
        service.start()
    service.stop()

    def names():
        return {thread.name for thread in threading.enumerate()}

    wait_until(lambda: not names() & {"engine", "watchdog", "worker-1"})


# --- the configuration is read again --------------------------------------------------


def test_a_hang_up_signal_applies_the_jobs_of_the_file(make_process):
    process = make_process(declared(job_body(NOBODY), job_body(NOBODY, name="b")))
    before = process.get("/jobs")["jobs"]
    process.expect(200, "POST", path_of(before[0], "/disable"))

    process.hang_up(declared(job_body(NOBODY), job_body(NOBODY, name="c", timeout="9s")))

    assert [job["name"] for job in before] == ["report", "b"]
    shown = ("name", "enabled", "managed_by", "timeout")
    assert [tuple(job[name] for name in shown) for job in process.get("/jobs")["jobs"]] == [
        ("report", False, "chronos.yaml", "5m"),
        ("b", False, None, "5m"),
        ("c", True, "chronos.yaml", "9s"),
    ]
    assert process.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(("broken", "said"), [
    ("jobs: [", "node content"),
    (declared(job_body(NOBODY, name="new"), {"name": "x"}), "jobs.2.schedule is required; "),
    (declared(job_body(NOBODY, name="new", id=JOB_ID)), "jobs.1.id must not be given: "),
    ("auth: {type: basic}", "auth.users must name somebody"),
    ("a: 1\nb: 1\nc: 1\nd: 1", "; "),
    (None, "No such file"),
])  # fmt: skip
def test_a_broken_file_changes_nothing_and_says_so_in_one_line(make_process, broken, said):
    process = make_process(declared(job_body(NOBODY)))
    before = process.get("/jobs")

    line = process.hang_up(broken)

    assert "ERROR nothing was changed: " in line
    assert str(process.config) in line
    assert said in line
    assert process.get("/jobs") == before
    assert process.log[-1] == line


def test_a_hang_up_signal_lets_users_in_and_out_at_once(make_process):
    users = "auth: {type: basic, users: {%s: '" + HASHED + "'}, viewers: [%s]}"
    process = make_process(users % ("ada", ""))
    ada = {"headers": credentials("ada")}
    process.expect(200, "GET", "/jobs", **ada)

    process.hang_up(users % ("ada", "ada"))
    process.expect(403, "POST", "/jobs", job_body(NOBODY), **ada)
    process.hang_up(users % ("bob", ""))
    process.expect(401, "GET", "/jobs", **ada)
    process.hang_up("")

    process.expect(200, "GET", "/jobs")


def test_a_hang_up_signal_sets_the_log_level_and_names_what_takes_a_restart(make_process):
    process = make_process("server: {shutdown_grace: 2s}")

    changed = "logging: {level: warning}\nserver: {shutdown_grace: 3s}\nstore: {}"
    line = process.hang_up(changed, told="restart")
    process.create(NOBODY)
    process.hang_up("alerts: {webhook: {url: 'http://127.0.0.1:1'}, after: 5}")
    process.create(NOBODY)

    assert "WARNING a restart is needed for server.shutdown_grace\n" in line
    wait_until(lambda: [line for line in process.log if "was created by" in line])
    assert sum("was created by" in line for line in process.log) == 1


def test_a_hang_up_signal_sets_where_alerts_go(make_process, target, bell):
    process = make_process("alerts: {webhook: {url: 'http://127.0.0.1:1'}, after: 5}")

    process.hang_up(f"alerts: {{webhook: {{url: '{bell.url}/new'}}}}")
    process.call("POST", trigger_path(process.create(target.url + "/status/404")))

    assert bell.received.get(timeout=20)[1] == "/new"


def test_a_reload_opens_no_door_to_everybody(make_service, caplog):
    users = {"auth__type": "basic", "auth__users": {"ada": HASHED}}
    client = make_service(server__http__address="0.0.0.0:0", **users)
    service = client.service

    without = service.settings.replaced("auth.type", "none").replaced("auth.users", {})
    with pytest.raises(chronos.ChronosError, match="lets everybody in"):
        service.reload(without.replaced("server.http.address", "127.0.0.1:0"))

    url = f"http://127.0.0.1:{service._http._server.effective_port}/api/v1/jobs"
    assert requests.get(url, timeout=5).status_code == 401


EACH_MINUTE = {"name": "a", "schedule": "* * * * *"}


@pytest.mark.parametrize(("file", "webhook_path", "rows"), [
    ({"url": "/new"}, "/new", [("success", None)]),
    ({"schedule": "*/5 * * * *"}, None, [("skipped", 2)]),
    ({"enabled": False}, None, [("skipped", 2)]),
    (None, None, [("skipped", 2)]),
])  # fmt: skip
def test_what_the_file_says_now_counts_before_anything_is_fired(
    make_service, target, clock, file, webhook_path, rows
):
    def start(url="/old", **fields):
        return make_service(clock, jobs=[job_body(target.url + url, **EACH_MINUTE | fields)])

    before = start()
    [job] = before.get("/jobs")["jobs"]
    before.service.stop()
    clock.advance(130)

    after = make_service(clock) if file is None else start(**file)

    def history():
        return after.get(path_of(job, "/executions"))["executions"]

    wait_until(lambda: history() and history()[0]["completed_at"])
    assert rows == [(run["status"], run.get("missed_count")) for run in history()][: len(rows)]
    paths = [target.take()[1] for _ in range(target.received.qsize())]
    assert set(paths) == ({webhook_path} if webhook_path else set())


def test_a_declared_job_whose_time_zone_has_vanished_stays_as_it_was(
    make_service, clock, load, zones, caplog
):
    zones.give("Old/Name", like=MADRID)
    old, other = job_body(NOBODY, timezone="Old/Name"), job_body(NOBODY, name="other")
    make_service(clock, jobs=[old]).service.stop()
    zones.remove("Old/Name")

    client = make_service(clock, jobs=[old, other])
    for mistake in (old | {"name": "new"}, old | {"timeout": "9s"}):
        with pytest.raises(chronos.StartError, match=r"line 4: jobs\.2\.timezone must be"):
            client.service.reload(load(declared(other, mistake)))
    client.service.reload(load(declared(old, other)))

    def jobs():
        found = client.get("/jobs")["jobs"]
        return [(job["name"], job["version"], job["timeout"], job["enabled"]) for job in found]

    assert "line 3: jobs.1.timezone must be an IANA time zone" in caplog.text
    assert jobs() == [("report", 1, "5m", True), ("other", 1, "5m", True)]
    zones.give("Old/Name", like=MADRID)
    client.service.reload(load(declared(old | {"timeout": "9s"}, other)))
    assert jobs()[0] == ("report", 2, "9s", True)


def test_a_database_that_fails_amid_the_declared_jobs_is_told_and_the_rest_comes_later(
    make_service, monkeypatch
):
    service = make_service().service
    changes = service.engine.job_changes
    declare, calls = changes.declare, []

    def declare_few(turn, wanted):
        calls.append(wanted)
        if len(calls) == 3:
            raise chronos.StoreError("the disk is full")
        return declare(turn, wanted[:4])._replace(done=min(4, len(wanted)))

    monkeypatch.setattr(changes, "declare", declare_few)
    bodies = [job_body(NOBODY, name=f"{n}") for n in range(10)]
    fresh = service.settings.replaced("jobs", chronos.build_settings({"jobs": bodies}).jobs)

    with pytest.raises(chronos.PartlyDeclared, match=r"^2 of 10 declared jobs wait .* is full"):
        service.reload(fresh)
    assert service.store.counts()["jobs_total"] == 8
    service.reload(fresh)

    assert service.store.counts()["jobs_total"] == 10


def test_a_large_reload_holds_up_no_job(make_process, target):
    process = make_process()
    for _ in range(5):
        process.create(target.url, schedule="@every 1s", enabled=True)
        time.sleep(0.2)
    bodies = [job_body(NOBODY, name=f"job {n}", tags={"n": str(n)}) for n in range(8000)]
    process.config.write_text(declared(*bodies))
    next_lateness(target)

    process.process.send_signal(signal.SIGHUP)
    late = []
    while not any("was read again" in line for line in process.log[-500:]):
        late.append(next_lateness(target))
    late += [next_lateness(target) for _ in range(10)]

    assert max(late) < 0.5
    assert process.get("/jobs?limit=1")["total"] == 8005


# --- systemd is told ------------------------------------------------------------------


class Manager:
    """What systemd is to a service: a datagram socket, and the variables that name it."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(re.sub("^@", "\0", str(address)))
        self.socket.settimeout(15)
        self.environment = {"NOTIFY_SOCKET": str(address)}

    def take(self):
        """Return the next message: its variables."""
        lines = self.socket.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def await_variables(self, **expected):
        """Take messages until one has these variables; return it."""
        while not expected.items() <= (message := self.take()).items():
            pass
        return message


@pytest.fixture
def make_manager(tmp_path):
    with contextlib.ExitStack() as managers:

        def make(address=tmp_path / "notify"):
            manager = Manager(address)
            managers.enter_context(manager.socket)
            return manager

        yield make


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told_of_readiness_life_and_stopping(
    make_manager, make_process, tmp_path, is_abstract
):
    address = f"@chronos-{uuid.uuid4()}" if is_abstract else tmp_path / "notify"
    manager = make_manager(address)
    process = make_process(environment=manager.environment)

    life = {"STATUS": f"listens on {process.url}", "WATCHDOG": "1"}
    assert manager.take() == {"READY": "1"} | life
    assert process.get("/health")
    begun = time.monotonic()
    assert manager.take() == life
    assert 8 < time.monotonic() - begun < 12  # WatchdogSec is 60
    assert process.end(signal.SIGTERM) == 0
    assert manager.take() == {"STOPPING": "1"}


def test_signs_of_life_come_while_the_main_thread_is_busy(make_manager, make_service, monkeypatch):
    manager, service = make_manager(), make_service().service
    monkeypatch.setattr(chronos, "SIGN_OF_LIFE_S", 0.01)
    monkeypatch.setenv("NOTIFY_SOCKET", manager.environment["NOTIFY_SOCKET"])
    signs = chronos.SignsOfLife(service)

    signs.start()
    life = [manager.take() for _ in range(5)]
    signs.stop()

    assert life == [{"STATUS": f"listens on {service.url}", "WATCHDOG": "1"}] * 5


def test_a_store_that_fails_is_the_status_and_no_reason_to_be_killed(make_manager, make_process):
    manager = make_manager()
    process = make_process(environment=manager.environment)
    assert "listens on" in manager.await_variables(WATCHDOG="1")["STATUS"]

    with disk_error(process, None):
        process.error(500, "POST", "/jobs", job_body(NOBODY))
        assert "disk I/O error" in manager.await_variables(WATCHDOG="1")["STATUS"]

    process.create(NOBODY)


@pytest.mark.parametrize("change", ["logging: {level: error}", "nonsense: 1"])
def test_reading_the_configuration_anew_is_told_with_its_instant(
    make_manager, make_process, tmp_path, change
):
    manager = make_manager()
    process = make_process(environment=manager.environment)
    manager.await_variables(WATCHDOG="1")

    before = time.monotonic_ns() // 1000
    (tmp_path / "home" / "chronos.yaml").write_text(change)
    process.process.send_signal(signal.SIGHUP)

    message = manager.take()
    assert message["RELOADING"] == "1"
    assert before <= int(message["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert manager.take()["READY"] == "1"


@pytest.mark.parametrize("how", ["gone", "full", "none"])
def test_a_manager_that_does_not_listen_is_no_problem(make_manager, make_process, how):
    manager = make_manager()
    if how == "full":
        for _ in range(10):  # one has no room left for more before the queue is full
            sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            with sender, contextlib.suppress(BlockingIOError):
                while True:
                    sender.sendto(b"X=1", socket.MSG_DONTWAIT, manager.environment["NOTIFY_SOCKET"])
    elif how == "gone":
        manager.socket.close()
    process = make_process(environment=manager.environment if how != "none" else {})

    assert process.get("/health")
    assert process.end(signal.SIGTERM) == 0


# --- connections, and what waitress does not do ---------------------------------------


@pytest.mark.parametrize("header", [
    'X-Forwarded-For: "', "X-Forwarded-For: unknown, _x", 'X-Forwarded-Host: "a',
    "X-Forwarded-By: [", "X-Forwarded-Proto: gopher", "X-Forwarded-Proto: http, https",
    "X-Forwarded-Port: x, y",
    'Forwarded: for="', "Forwarded: for=a;for=b;=;proto=x, host=",
])  # fmt: skip
def test_what_a_trusted_proxy_says_wrongly_is_answered_in_the_envelope(make_service, header):
    service = make_service(server__trusted_proxy="127.0.0.1")
    head = f"GET /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n"

    ((status, _envelope),) = read_answers(exchange(service, head.encode()))

    assert status in (200, 400, 403)


def test_an_error_that_only_waitress_sees_is_answered_in_the_envelope(service, monkeypatch):
    monkeypatch.setattr(service.service.api, "app", a_bug)

    error = service.error(500, "GET", "/jobs")

    assert error == {"code": "INTERNAL_ERROR", "message": "a bug: the server's log has more"}


@pytest.mark.parametrize(("request_line", "headers", "status"), [
    ("POST /api/v1/jobs/ID/enable%0A HTTP/1.1", "Connection: close", 404),
    ("POST /api/v1/jobs/ID/enable HTTP/1.1", "Expect: 100-continue\r\nConnection: close", 200),
    ("POST /api/v1/jobs HTTP/1.1", "Expect: 100-continue\r\nContent-Length: x", 400),
    ("POST /api/v1/jobs HTTP/1.1", "Expect: 100-continue\r\nContent-Length: 1048577", 413),
    ("HEAD /health HTTP/1.1", "Content-Length: 1048577", 413),
])  # fmt: skip
def test_an_odd_request_is_answered_at_once_and_as_http_has_it(
    service, request_line, headers, status
):
    head = f"{request_line}\r\n{headers}\r\n\r\n".replace("ID", service.create(NOBODY)["id"])

    ((got, envelope),) = read_answers(exchange(service, head.encode(), timeout=2))

    assert (got, envelope is None) == (status, head.startswith("HEAD"))


POST = b"POST /api/v1/jobs HTTP/1.1\r\n"
IN_CHUNKS = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSE = b" HTTP/1.1\r\nConnection: close\r\n\r\n"
BEHIND = b"GET /health?hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"  # nobody may read it
SMUGGLED = (
    POST + b"Connection: keep-alive\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(BEHIND), BEHIND)
)
# fmt: off
RAW = {  # by the answers: version of HTTP, status, code; where two are named, waitress has changed
    "1.1 413 PAYLOAD_TOO_LARGE": [
        POST + b"Content-Length: 1048577\r\n\r\n" + b" " * (2**20 + 1),
        POST + b"Content-Length: 1048577\r\n\r\n",
        POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
        IN_CHUNKS + b"100001\r\n" + b" " * (2**20 + 1) + b"\r\n0\r\n\r\n",
        IN_CHUNKS + b"8000\r\n%b\r\n" % (b" " * 32768) * 33 + b"0\r\n\r\n"],
    "1.1 400 VALIDATION_ERROR": [
        *(POST + b"Content-Length: %b\r\n\r\n{}" % n
          for n in (b"-2", b"+2", b"2 2", b"0x2", b"\xb2", b"9" * 5000, b"2, 2")),
        POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        *(IN_CHUNKS + b"%b\r\n{}\r\n0\r\n\r\n" % n
          for n in (b"-2", b"2_0", b"0x2", b"", b"zz", b"\xff")),
        IN_CHUNKS + b"2\r\n{}}}0\r\n\r\n",
        POST + b"Content-Length: 40\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
               b"2\r\n{}\r\n0\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n", b"GET http://[::1/ HTTP/1.1\r\n\r\n", SMUGGLED],
    "1.0 400 VALIDATION_ERROR": [
        SMUGGLED.replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        # Headers are looked at before the version.
        b"GET /health HTTP/1.1\r\n folded: x\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"],
    "1.0 400 VALIDATION_ERROR|1.0 405 METHOD_NOT_ALLOWED": [
        b"garbage\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET  /health HTTP/1.1 \r\n\r\n",
        b"\x80\x2e\x01\0\r\n\r\n" + bytes(range(256))],
    "1.1 400 INVALID_JSON, 1.0 400 VALIDATION_ERROR|"  # of two requests
    "1.1 400 INVALID_JSON, 1.0 405 METHOD_NOT_ALLOWED": [
        POST + b"Content-Length: 1\r\n\r\n{ \x01\r\n\r\n"],
    "1.1 404 NOT_FOUND": [b"GET /" + b"x" * 8192 + CLOSE, b"CONNECT a:443" + CLOSE],
    "1.0 404 NOT_FOUND": [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"],
    "1.0 200": [
        b"GET /health\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.0\r\n%b\r\n" % b"".join(b"X-%d: 1\r\n" % n for n in range(9000))],
    "1.1 501 VALIDATION_ERROR": [
        POST + b"Transfer-Encoding: %b\r\n\r\n{}" % n for n in (b"gzip", b"chunked, x")],
    "1.0 431 VALIDATION_ERROR": [
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 300_000, b"x" * 300_000],
}
HALF = [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost", b"\r\n" * 500, b"GET / HTTP/1.1\n\n",
        b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3", POST + b"Content-Length: 9\r\n\r\n{}",
        IN_CHUNKS + b"2", IN_CHUNKS + b"f" * 100 + b"\r\n{",
        POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        POST + b"Content-Length: 1000000\r\n\r\n" + b" " * 600_000]  # kept in a file
# fmt: on


def descriptors(process):
    """Return how many a process has, but for the database, which every thread opens for itself."""
    found = []
    for link in os.scandir(f"/proc/{process.process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append("chronos.db" in os.readlink(link))
    return found.count(False)


def health_is_quick(client):
    start = time.monotonic()
    return client.get("/health")["status"] == "healthy" and time.monotonic() - start < 1


@pytest.fixture
def unharmed(make_process):
    """A process that in the end has the descriptors that it had before, and no error in its log."""
    process = make_process()
    before = descriptors(process)
    yield process
    wait_until(lambda: descriptors(process) == before, 40)
    assert not re.search("ERROR|CRITICAL|Traceback", "".join(process.log))


def answers_in_short(received):
    """Return of each answer the version of HTTP, the status, and the code of the error."""
    found = []
    versions = re.findall(rb"HTTP/(1\.[01]) (?!100)\d{3} ", received)
    for version, (status, envelope) in zip(versions, read_answers(received), strict=True):
        code = envelope["error"]["code"] if envelope["error"] else ""
        found.append(f"{version.decode()} {status} {code}".rstrip())
    return ", ".join(found)


def test_rubbish_on_a_connection_is_answered_in_the_envelope(unharmed):
    for answers, rubbish in RAW.items():
        for sent in rubbish:
            assert answers_in_short(exchange(unharmed, sent)) in answers.split("|"), sent[:200]
            assert health_is_quick(unharmed)


def test_idle_half_and_slow_requests_are_in_nobodys_way(unharmed, background):
    body = json.dumps(job_body(NOBODY)).encode()
    request = POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body

    def drip(_n):
        with connect(unharmed) as connection:
            for byte in request:
                connection.sendall(bytes([byte]))
                time.sleep(0.005)
            return read_answers(connection.makefile("rb").read())[0][0]

    with contextlib.ExitStack() as held:
        before = descriptors(unharmed)
        for n in range(400):
            held.enter_context(connect(unharmed)).sendall(HALF[n // 2 % len(HALF) * (n % 2)])
        wait_until(lambda: descriptors(unharmed) >= before + 400)
        dripping = background.map(drip, range(16))
        assert all(health_is_quick(unharmed) for _ in range(20))
        assert list(dripping) == [201] * 16


@pytest.mark.long
def test_a_connection_on_which_nothing_comes_is_closed_after_30_seconds(unharmed):
    with contextlib.ExitStack() as held:
        open_ones = [held.enter_context(connect(unharmed, timeout=45)) for _ in HALF]
        for connection, sent in zip(open_ones, HALF, strict=True):
            connection.sendall(sent)
        received = {connection.makefile("rb").read() for connection in open_ones}
        assert received == {b"", b"HTTP/1.1 100 Continue\r\n\r\n"}


# --- behind nginx ---------------------------------------------------------------------

GZIP = "gzip on; gzip_min_length 1; gzip_types application/json;"


@pytest.fixture
def compressed(service, make_nginx):
    """The service behind nginx, which compresses what it answers."""
    return make_nginx(SUB_PATH % GZIP, service)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_the_tag_that_nginx_makes_weak_names_the_version(compressed, method):
    path = path_of(compressed.create(NOBODY))
    body = None if method == "DELETE" else job_body(NOBODY, name="second")
    weak = requests.get(f"{compressed.url}/api/v1{path}", timeout=10).headers["ETag"]
    compressed.expect(412, method, path, body, headers={"If-Match": 'W/"2"'})

    compressed.expect(200, method, path, body, headers={"If-Match": weak})

    assert weak == 'W/"1"'


@pytest.mark.parametrize("path", ["/", "/api/v1/stats"])
def test_what_nginx_has_compressed_is_not_sent_again(compressed, path):
    first = requests.get(compressed.url + path, timeout=10)
    known = {"If-None-Match": first.headers["ETag"]}
    again = requests.get(compressed.url + path, headers=known, timeout=10)

    assert (first.headers["ETag"][:3], first.headers["Content-Encoding"]) == ('W/"', "gzip")
    assert (again.status_code, again.content) == (304, b"")


@pytest.fixture
def make_tls_nginx(make_nginx, certificate):
    """Starts nginx with TLS on a port that is not 443; returns a client, and what a page sends."""
    path, key = certificate
    listen = f"listen PORT ssl; ssl_certificate {path}; ssl_certificate_key {key};"

    def make(lines, service):
        server = (SUB_PATH % lines).replace("listen PORT;", listen)
        proxied = make_nginx(server, service, "https")
        origin = proxied.url.removesuffix("/chronos")
        return proxied, {"headers": {"Origin": origin}, "verify": path}

    return make


@pytest.mark.parametrize(("lines", "trusted", "seen", "wanted"), [
    ("", [], 'Host "127.0.0.1:BACKEND"', ["127.0.0.1"]),
    ("proxy_set_header Host $host;", [], 'Host "127.0.0.1"', ["127.0.0.1"]),
    ("proxy_set_header Host $host;", ["10.0.0.0/8"], 'Host "127.0.0.1"',
     ["10.0.0.0/8", "127.0.0.1"]),
    ("proxy_set_header Host $host;", ["127.0.0.0/8"], 'Host "127.0.0.1"', None),
    ("proxy_set_header X-Forwarded-Host $host;", ["127.0.0.1"], 'X-Forwarded-Host "127.0.0.1"',
     None),
])  # fmt: skip
def test_what_a_proxy_has_to_send_is_said_and_is_enough(
    make_service, make_tls_nginx, lines, trusted, seen, wanted
):
    service = make_service(server__trusted_proxy=trusted)
    proxied, of_page = make_tls_nginx(lines, service)

    message = proxied.expect(403, "POST", "/jobs", job_body(NOBODY), **of_page)["message"]

    origin, port = of_page["headers"]["Origin"], service.url.split(":")[-1]
    assert f'Origin "{origin}" is not of {seen.replace("BACKEND", port)}.' in message
    mended = re.search(r"nginx: (.*;)", message)[1]
    proxied, of_page = make_tls_nginx(mended, service)
    proxied.expect(201, "POST", "/jobs", job_body(NOBODY), **of_page)
    setting = re.search(r"server.trusted_proxy: (\[.*\])", message)
    assert (setting and json.loads(setting[1])) == wanted
    assert setting or message.endswith("(127.0.0.1 is in server.trusted_proxy)")


def test_the_host_that_a_proxy_forwards_counts_with_the_setting_that_is_said(
    make_service, make_tls_nginx
):
    service = make_service()
    lines = "proxy_set_header Host $host; proxy_set_header X-Forwarded-Host $http_host;"
    proxied, of_page = make_tls_nginx(lines, service)
    message = proxied.expect(403, "POST", "/jobs", job_body(NOBODY), **of_page)["message"]
    setting = json.loads(re.search(r"server.trusted_proxy: (\[.*\])", message)[1])
    service.service.stop()

    service = make_service(server__trusted_proxy=setting)

    proxied, of_page = make_tls_nginx(lines, service)
    proxied.expect(201, "POST", "/jobs", job_body(NOBODY), **of_page)


# ======================================================================================
# 19. Commands
# ======================================================================================


def run_chronos(*arguments, program=CHRONOS, typed=None, **environment):
    """Run the program to its end; return the completed process."""
    environment = os.environ | {"CHRONOS_SERVER_HTTP_ADDRESS": "127.0.0.1:0"} | environment
    command = [sys.executable, program, *arguments]
    pipes = {"capture_output": True, "text": True, "input": typed}
    return subprocess.run(command, timeout=20, env=environment, **pipes)


def check_refused(result, status, *words, lines=1):
    """Check that the start was refused in so many lines, with these words."""
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    assert len(result.stderr.splitlines()) == lines
    for word in words:
        assert word in result.stderr


# --- where the configuration and the data are -----------------------------------------


def test_without_a_configuration_the_data_is_beside_the_program(tmp_path):
    program = shutil.copy(CHRONOS, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    with serving(program, directory=elsewhere) as (_process, client):
        client.create(NOBODY)

    assert (tmp_path / "data" / "chronos.db").exists()
    assert list(elsewhere.iterdir()) == []


def test_the_configuration_beside_the_program_is_taken_unless_another_is_named(tmp_path, configure):
    program = shutil.copy(CHRONOS, tmp_path)
    configure("nonsense: 1")
    (tmp_path / "good.yaml").write_text("logging: {level: error}")

    beside = run_chronos("check-config", program=program)
    named = run_chronos("check-config", "--config", tmp_path / "good.yaml", program=program)

    check_refused(beside, 78, "nonsense", "line 1")
    assert (named.returncode, named.stderr) == (0, "")


# --- starts that are refused ----------------------------------------------------------


GRASE, MISSPELT = "server:\n  shutdown_grase: 1s", "line 2: server.shutdown_grase|shutdown_grace"
CONFIG = "--config HOME/chronos.yaml"
ADDRESS = "CHRONOS_SERVER_HTTP_ADDRESS=a..b:8080"
GOPHER = declared(job_body("gopher://x"))


@pytest.mark.parametrize(("command", "config", "status", "said"), [
    *((command, GRASE, 78, MISSPELT) for command in (
        CONFIG, f"serve {CONFIG}", f"check-config {CONFIG}", f"{CONFIG} check-config")),
    ("--config HOME/nope.yaml", "", 78, "HOME/nope.yaml"),
    ("check-config --config HOME", "", 78, "HOME: "),
    (f"check-config {CONFIG}", GOPHER, 78, "line 3: jobs.1.webhook.url"),
    (f"systemd-unit {CONFIG}", "nonsense: 1", 78, "line 1: nonsense"),
    (f"{ADDRESS} {CONFIG}", "", 78, "a..b:8080"),
    (f"{ADDRESS} {CONFIG}", "server: {allow_unauthenticated: true}", 1, "a..b:8080"),
    *((CONFIG, f"cluster: {{data_dir: {path}}}", 78, path)
      for path in ("/dev/null/data", "/proc/data", "chronos.yaml", "x" * 300)),
    (f"backup HOME/copy.db {CONFIG}", "", 1,
     "no backup to |HOME/copy.db|unable to open database file"),
    ("nixt", "", 1, "chronos: |'nixt'|--help"),
    ("serve --confog", "", 1, "chronos: |--confog|--help"),
    ("backup", "", 1, "chronos: |FILE|--help"),
    ("hash-password", "", 1, "an empty password is none"),
])  # fmt: skip
def test_what_cannot_be_done_is_told_in_one_line(
    tmp_path, configure, command, config, status, said
):
    configure(config)
    words = command.replace("HOME", str(tmp_path)).split()
    variables = dict(word.split("=") for word in words if "=" in word)
    arguments = [word for word in words if "=" not in word]

    result = run_chronos(*arguments, typed="\n", **variables)

    check_refused(result, status, *said.replace("HOME", str(tmp_path)).split("|"))


@pytest.mark.parametrize("package", ["bottle", "requests", "waitress", "yaml", "croniter"])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, package):
    shadow = f"raise ModuleNotFoundError('No module named {package}', name='{package}')"
    (tmp_path / f"{package}.py").write_text(shadow)

    result = run_chronos("--version", PYTHONPATH=str(tmp_path))

    check_refused(result, 1, repr(package), "pip install -r requirements.txt")


@pytest.mark.parametrize("system", ["win32", "freebsd15", "emscripten"])
def test_another_system_is_refused_in_one_line_before_anything_is_missing(system):
    lacking = "sys.modules.update(fcntl=None, resource=None)"
    start = f"runpy.run_path({str(CHRONOS)!r}, run_name='__main__')"
    script = f"import runpy, sys; sys.platform = {system!r}; {lacking}; {start}"
    command = [sys.executable, "-c", script]

    result = subprocess.run(command, capture_output=True, text=True, timeout=20)

    expected = f"chronos: it runs on Linux and macOS, not on {system}\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)


def test_a_port_in_use_is_told_in_one_line(configure):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"

        result = run_chronos("--config", configure(""), CHRONOS_SERVER_HTTP_ADDRESS=address)

    check_refused(result, 1, address, "in use")


def test_a_second_process_on_the_same_data_is_refused_naming_the_first(
    make_process, tmp_path, configure
):
    first = make_process()
    config = configure("cluster: {data_dir: home/data}")

    result = run_chronos("--config", config)

    check_refused(result, 75, f"process {first.process.pid}\n", str(tmp_path / "home" / "data"))
    assert first.get("/health")["status"] == "healthy"


def test_the_lock_of_a_killed_process_is_none(make_process):
    make_process().end(signal.SIGKILL)

    assert make_process().get("/health")["status"] == "healthy"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("free", [0, 4, 8, 40, 80])
def test_a_full_disk_at_the_start_is_told_in_one_line(tmp_path, configure, free):
    directory = tmp_path / "data"
    with small_disk(directory):
        (directory / "ballast").write_bytes(bytes((3072 - free) << 10))
        result = run_chronos("--config", configure("cluster: {data_dir: data}"))

    check_refused(result, result.returncode or "an error", str(directory))


# --- commands -------------------------------------------------------------------------


def test_the_option_version_prints_it():
    result = run_chronos("--version")

    assert (result.returncode, result.stdout) == (0, f"chronos {chronos.__version__}\n")


def test_help_explains_every_command():
    result = run_chronos("--help")

    assert (result.returncode, result.stderr) == (0, "")
    told = " ".join(result.stdout.split())
    runs = {name: run for name, run in vars(chronos).items() if name.startswith("run_")}
    assert len(runs) == 5
    for name, run in runs.items():
        assert f"{name.removeprefix('run_').replace('_', '-')} {run.__doc__}" in told


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0"])
def test_whoever_starts_it_by_hand_is_told_which_address_to_open(tmp_path, configure, address):
    config = configure("{server: {allow_unauthenticated: true}, logging: {level: error}}")
    pid, terminal = pty.fork()
    if not pid:
        os.environ["CHRONOS_SERVER_HTTP_ADDRESS"] = address
        os.execv(sys.executable, [sys.executable, str(CHRONOS), "--config", str(config)])
    shown = b""
    with open(terminal, "r+b", buffering=0) as console, contextlib.suppress(OSError):
        while b"Ctrl-C" not in shown:
            if not select.select([console], [], [], 10)[0]:
                os.kill(pid, signal.SIGKILL)
            shown += console.read(1000)
        url = re.search(rb"open (http://\S+) in a browser", shown)[1].decode()
        assert requests.get(f"{url}/api/v1/jobs", timeout=5).status_code == 200
        console.write(b"\x03")
        while console.read(1000):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert url.startswith("http://localhost" if address[0] == "0" else "http://127.0.0.1")


def test_check_config_says_that_all_is_correct(configure):
    good = run_chronos("check-config", "--config", configure(declared(job_body(NOBODY))))

    assert (good.returncode, good.stdout) == (0, "the configuration is correct\n")


@pytest.mark.parametrize("command", ["check-config", "serve"])
def test_a_new_declaration_with_an_unknown_time_zone_is_refused(configure, command):
    result = run_chronos(command, "--config", configure(declared(job_body(NOBODY, timezone="X/Y"))))

    assert result.returncode == 78
    assert "line 3: jobs.1.timezone must be an IANA time zone" in result.stderr


def test_a_backup_of_a_working_server_is_restored_by_copying_it_back(
    make_process, target, tmp_path, background
):
    process = make_process()
    stop = threading.Event()

    def create_jobs():
        ids = []
        while not stop.is_set():
            ids.append(process.create(target.url)["id"])
        return ids

    writers = [background.submit(create_jobs) for _ in range(4)]
    wait_until(lambda: process.get("/jobs?limit=1")["total"] > 20)
    before = {job["id"] for job in process.get("/jobs")["jobs"]}
    config = tmp_path / "home" / "chronos.yaml"
    result = run_chronos("backup", tmp_path / "copy.db", "--config", config)
    stop.set()
    created = {job_id for writer in writers for job_id in writer.result(10)}
    process.end(signal.SIGKILL)

    assert (result.returncode, result.stderr) == (0, "")
    for path in (tmp_path / "home" / "data").glob("chronos.db*"):
        path.unlink()
    shutil.copy(tmp_path / "copy.db", tmp_path / "home" / "data" / "chronos.db")
    restored = {job["id"] for job in make_process("", "--paused").get("/jobs")["jobs"]}
    assert before <= restored <= created


def test_hash_password_prints_one_line_that_signs_in(make_process):
    lines = [run_chronos("hash-password", typed="pässwörd\n").stdout for _ in range(2)]
    assert lines[0] != lines[1]  # each has a salt of its own
    assert [line.count("\n") for line in lines] == [1, 1]

    process = make_process(f"auth: {{type: basic, users: {{ada: {lines[0].strip()}}}}}")

    assert process.call("GET", "/jobs")[0] == 401
    assert process.call("GET", "/jobs", headers=credentials("ada"))[0] == 200
    assert process.call("GET", "/health")[0] == 200


@pytest.mark.parametrize("typed", ["alpha", ""])
def test_hash_password_does_not_show_what_is_typed(typed):
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(CHRONOS), "hash-password"])
    shown = b""
    with open(terminal, "r+b", buffering=0) as console, contextlib.suppress(OSError):
        while b"Password: " not in shown:
            shown += console.read(1000)
        console.write(typed.encode() + b"\n")
        while data := console.read(1000):
            shown += data
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert b"alpha" not in shown
    assert (status, b"scrypt:" in shown) == ((0, True) if typed else (1, False))


# --- the unit of systemd --------------------------------------------------------------

NEEDS_SYSTEMD = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="no systemd-analyze: apt-get install -y systemd"
)


def print_unit(config, program=CHRONOS):
    """Return what systemd-unit prints, and its settings; of one that is there twice the last."""
    result = run_chronos("systemd-unit", "--config", config, program=program)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if re.match("[A-Z][A-Za-z]*=", line)]
    return result, dict(line.split("=", 1) for line in lines)


@NEEDS_SYSTEMD
def test_the_unit_is_one_that_systemd_takes_and_that_leaves_little_open(configure, tmp_path):
    result, _settings = print_unit(configure(""))
    path = tmp_path / "chronos.service"
    path.write_text(result.stdout)

    def analyze(*arguments):
        command = ["systemd-analyze", *arguments, path]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    verified = analyze("verify")
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    exposed = analyze("security", "--offline=true", "--no-pager").stdout
    assert float(re.search(r"exposure level for \S+: ([0-9.]+)", exposed)[1]) < 2.0


def test_the_unit_starts_this_program_with_this_interpreter_and_configuration(tmp_path):
    home = tmp_path / 'a "b" 100% é'
    home.mkdir()
    program = shutil.copy(CHRONOS, home)
    (home / "own.yaml").write_text("cluster: {data_dir: ../state}")

    _result, settings = print_unit(home / "own.yaml", program=program)

    command = shlex.split(settings["ExecStart"].replace("%%", "%"))
    assert command == [sys.executable, "-I", program, "--config", str(home / "own.yaml")]
    assert "%%" in settings["ExecStart"]
    assert settings["ReadWritePaths"] == f'"{tmp_path}/state"'
    started = subprocess.run([*command, "--version"], capture_output=True, timeout=20, check=True)
    assert started.stdout.startswith(b"chronos ")


def test_the_unit_without_a_configuration_names_none(tmp_path):
    program = shutil.copy(CHRONOS, tmp_path)

    result = run_chronos("systemd-unit", program=program)

    assert f'-I "{program}"\n' in result.stdout
    assert f'\nReadWritePaths="{tmp_path}/data"\n' in result.stdout


def test_the_unit_is_restarted_when_that_helps_and_stopped_in_its_own_time(configure):
    _result, settings = print_unit(configure(
        "{cluster: {data_dir: /var/lib/chronos}, server: {shutdown_grace: 2m}}"
    ))  # fmt: skip

    expected = {
        "Type": "notify", "User": "chronos", "Restart": "on-failure", "TimeoutStopSec": "135",
        "RestartSec": "5",  # by default five starts in ten seconds would be the last
        "RestartPreventExitStatus": f"{chronos.EXIT_RUNNING} {chronos.EXIT_CONFIG}",
        "ReadWritePaths": '"/var/lib/chronos"', "ExecReload": "/bin/kill -HUP $MAINPID",
    }  # fmt: skip
    assert settings | expected == settings
    assert int(settings["WatchdogSec"]) >= 4 * chronos.SIGN_OF_LIFE_S
    most = {"dispatcher.max_concurrent_jobs": 1000, "server.http.threads": 256}
    for name, threads in most.items():
        with pytest.raises(ValueError, match=f"to {threads}"):
            chronos.SETTINGS[name].check(threads + 1)
    assert int(settings["TasksMax"]) > sum(most.values()) + chronos.MAX_LOOKUPS + 5


# ======================================================================================
# 20. Dashboard
# ======================================================================================
#
# What a person sees and does, in headless Chromium, and what the API says of it afterwards. Each
# test has a Chronos and a tab of its own, in one browser for all.

PAGE = chronos.DASHBOARD_HTML
SCRIPT = "".join(re.findall("(?s)<script>(.*?)</script>", PAGE))

# --- the page itself ------------------------------------------------------------------


def test_the_page_is_allowed_only_its_own_style_and_script(service):
    answer = requests.get(service.url + "/", timeout=5)

    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'"} <= set(policy)
    for name in ("style", "script"):
        [block] = re.findall(f"(?s)<{name}>(.*?)</{name}>", answer.content.decode())
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_a_browser_that_has_the_page_does_not_get_it_again(service):
    first = requests.get(service.url + "/", timeout=5)
    known = {"If-None-Match": first.headers["ETag"]}
    again = requests.get(service.url + "/", headers=known, timeout=5)
    head = requests.head(service.url + "/", timeout=5)

    assert (first.status_code, first.text) == (200, PAGE)
    assert first.headers["Cache-Control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert (head.status_code, head.content) == (200, b"")


def test_the_page_asks_no_other_server_and_writes_no_markup():
    own = PAGE.replace("http://www.w3.org/2000/svg", "")
    wrong = r"https?://| src=|@import|\burl\(|javascript:|style=\"| on[a-z]+=\""
    wrong += r"|(?:inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function"

    assert re.findall(f".*(?:{wrong}).*", own) == []


def test_the_page_stays_within_its_limits():
    lines = PAGE.splitlines()

    assert len(lines) <= 1200 and len(PAGE.encode()) <= 90 * 1024
    assert max(map(len, lines)) < 155


def test_each_path_that_the_page_asks_for_is_a_route():
    paths = re.findall(r'["`](/[a-z](?:\$\{[^}]*\}|[^`"$ ?])*)', SCRIPT)
    paths = {re.sub(r"\$\{[^}]*\}", "*", path) for path in paths} - {"/api/v1", "/health"}
    known = [re.sub(r"<[^>]*>", "*", route[1][7:]).split("/") for route in chronos.Api.ROUTES]

    def is_route(path):
        pairs = [itertools.zip_longest(parts, path.split("/"), fillvalue="") for parts in known]
        return any(all(a == b or "*" in (a, b) for a, b in each) for each in pairs)

    assert len(paths) > 5
    assert [path for path in paths if not is_route(path)] == []


def watch(service):
    """Return a queue of what the service is asked from now on: method, path, status."""
    asked, bottle = queue.Queue(), chronos.bottle

    def note():
        asked.put((bottle.request.method, bottle.request.path, bottle.response.status_code))

    service.service.api.app.add_hook("after_request", note)
    return asked


def run_to_end(service, job):
    """Run a job to its end; return the execution as the API tells it in full."""
    execution = service.post(trigger_path(job))
    return service.get(path_of(job, f"/executions/{execution['id']}"))


# --- what people do -------------------------------------------------------------------


def test_the_first_job_is_made_on_the_page(page, service):
    page.open(service, text="No jobs yet")
    page.click("Create the first job")
    wanted = {"name": "report", "schedule": "0 9 1 * *", "timezone": "Asia/Calcutta"}
    for name, text in {**wanted, "webhook.url": NOBODY}.items():
        page.fill(name, text)
    query = "schedule=0 9 1 * *&timezone=Asia/Calcutta&count=5"
    promised = [run["utc"] for run in service.get(f"/schedules/preview?{query}")["next_runs"]]
    shown = "return [...document.querySelectorAll('#preview time')].map(e => e.dateTime)"
    wait_until(lambda: page.js(shown) == promised)

    page.click("Save")
    page.see("report", "h1")
    page.click("Jobs")

    page.see("report", "#jobs")
    [job] = service.get("/jobs")["jobs"]
    assert {name: job[name] for name in wanted} == wanted
    assert (job["webhook"]["url"], job["enabled"], len(promised)) == (NOBODY, True, 5)


def test_what_is_wrong_in_a_form_stands_beside_its_field(page, service):
    page.allowed = "status of 400"
    page.open(service, "#/new", "Schedule")
    wrong = {"schedule": "61 * * * *", "timezone": "Mars/Base", "webhook.url": "ftp://x/"}
    for name, text in {"name": "report", **wrong}.items():
        page.fill(name, text)
    page.click("Save")
    wait_until(lambda: page.focused() == "schedule")

    error = service.error(400, "POST", "/jobs", job_body(wrong.pop("webhook.url"), **wrong))
    for detail in error["details"]:
        field = page.find(detail["field"])
        notes = field.get_attribute("aria-describedby").split(" ")
        assert detail["message"] in "".join(page.text(f"[id='{note}']") for note in notes)
        assert field.get_attribute("aria-invalid") == "true"
    assert page.find("name").get_attribute("aria-invalid") is None
    assert page.find("timezone").get_attribute("value") == "Mars/Base"
    assert (service.get("/jobs")["total"], len(error["details"])) == (0, 3)

    for name, text in {"schedule": "@daily", "timezone": "UTC", "webhook.url": NOBODY}.items():
        page.fill(name, text)
    page.click("Save")
    page.see("report", "h1")


def test_a_run_is_followed_to_its_end_without_a_reload(page, service, target):
    job = service.create(target.url + "/hang", name="report", enabled=True)
    page.open(service)
    page.js("window.mark = 1")
    page.click("Run now report")
    page.see("running", "#jobs")
    page.see("report", "#active")
    page.click("Open the run")
    page.see("attempt 1", "#sentence")
    assert target.hanging.acquire(timeout=10)
    target.let_go.set()

    page.see("succeeded", "#sentence")
    page.click("Jobs")
    page.see("success", "#jobs")
    assert (page.js("return window.mark"), page.text("#active")) == (1, "")
    assert poll(service)[1]["jobs"][0]["strip"] == "S"
    assert service.get(path_of(job, "/executions"))["total"] == 1


def test_a_failure_shows_in_title_banner_and_strip(page, service, target):
    service.create(target.url + "/status/404", name="report", enabled=True)
    page.open(service)
    assert "failed" not in page.browser.title
    page.click("Run now report")

    page.see("1 job failing: report (", "#failing")

    error = poll(service)[1]["jobs"][0]["last_execution"]["error"]
    assert "404" in error and error in page.text("#failing") and error in page.text("#jobs")
    assert page.browser.title.startswith("(1 failed) ")
    label = page.js("return document.querySelector('.strip svg').getAttribute('aria-label')")
    assert label.startswith("Last 1 run: 1 failed")


def test_a_retry_that_waits_is_shown_with_when_it_goes_on(page, service, target):
    target.script = ["/ok", "/status/503"]
    retry = {"initial_interval": "1h", "max_interval": "1h"}
    job = service.create(target.url, name="report", retry_policy=retry, timeout="24h")
    service.post(trigger_path(job))
    service.expect(202, "POST", trigger_path(job, "?wait=1s"))

    for place, shown in (("", "#jobs"), (f"#/job/{job['id']}", "main")):
        page.open(service, place, "retrying")
        page.see("retrying", shown)
        page.see("attempt 2 in", shown)
    assert page.console() == []


def test_a_run_is_shown_in_full_and_as_text_only(page, service, target):
    markup = "<img src=x onerror=alert(1)>"
    retry = {"max_attempts": 2, "initial_interval": "1ms"}
    job = service.create(
        target.url + "/echo", name=markup, tags={"a": markup}, webhook={"body": markup},
        description=markup,
    )  # fmt: skip
    run_to_end(service, job)
    page.open(service)
    page.click(markup)
    page.see("Settings")
    page.js("document.querySelector('#runs td a').click()")
    page.see(markup, "#response")
    page.see(markup, "#request")
    assert page.js("return document.images.length") == 0

    patch(service, job, {"webhook": {"url": target.url + "/status/503"}, "retry_policy": retry})
    failed = run_to_end(service, job)
    page.open(service, f"#/job/{job['id']}/run/{failed['id']}", "Attempt 2")

    assert failed["error"] in page.text("#sentence") and "503" in page.text("#response")
    assert page.text("#attempts").count("503 ") == len(failed["attempt_log"]) == 2


def test_a_change_of_the_name_leaves_all_else_as_it_was(page, service, target):
    job = service.create(
        target.url, name="old", description="two\nlines", tags={"a": "b"}, timeout="2m",
        concurrency="allow", missed_run_policy="execute_one", timezone="Europe/Madrid",
        retry_policy={"max_attempts": 2, "initial_interval": "2s", "max_interval": "3s"},
        webhook={"auth": {"type": "bearer", "token": CANARY}, "headers": {"X-A": "1", "X-B": "2"},
                 "body": '{"a": 1}', "success_codes": [200, 201], "verify_tls": False,
                 "signing_secret": SIGNING_SECRET},
    )  # fmt: skip
    page.open(service, f"#/job/{job['id']}", "Settings")
    page.click("Edit old")
    page.fill("name", "new")
    page.click("Save")
    page.see("new", "h1")

    changed = service.get(path_of(job))
    different = {name for name in job if job[name] != changed[name]}
    assert different == {"name", "version", "updated_at"}
    run_to_end(service, job)
    _method, _path, headers, body, _at = target.take()
    assert headers["Authorization"] == f"Bearer {CANARY}"
    assert headers["webhook-signature"] == signature_of(headers, body)


def test_a_signing_secret_is_given_in_the_editor_taken_away_and_not_shown(page, service, target):
    page.allowed = "status of 400"
    job = service.create(target.url, name="report")
    page.open(service, f"#/job/{job['id']}/edit", "Schedule")
    page.fill("webhook.signing_secret", "s3cret")
    page.click("Save")
    page.see("must be 24 to 64 random bytes as base64", "form")
    page.fill("webhook.signing_secret", SIGNING_SECRET)
    page.click("Save")
    page.see("Version 2")
    run_to_end(service, job)
    _method, _path, headers, body, _at = target.take()
    assert headers["webhook-signature"] == signature_of(headers, body)

    page.click("Edit")
    field = page.find("webhook.signing_secret")
    assert field.get_attribute("value") == MASK
    assert field.value_of_css_property("-webkit-text-security") == "disc"
    page.fill("webhook.signing_secret", "")
    page.click("Save")
    page.see("Version 3")

    assert service.get(path_of(job))["webhook"]["signing_secret"] is None


def test_a_job_is_paused_and_resumed(page, service):
    job = service.create(NOBODY, name="report", enabled=True)
    page.open(service)
    for action, enabled in (("Pause", False), ("Resume", True)):
        page.click(f"{action} report")
        page.find(f"{'Pause' if enabled else 'Resume'} report")

        assert service.get(path_of(job))["enabled"] is enabled


def test_a_job_with_runs_is_deleted_only_by_its_name(page, service, target):
    job = service.create(target.url, name="report")
    run_to_end(service, job)
    page.open(service, f"#/job/{job['id']}", "Settings")
    page.click("Delete")
    page.see("1 run of history", "dialog")
    page.press(ESCAPE)
    wait_until(lambda: page.focused() == "Delete")
    for name in ("repo", "report"):
        assert service.get("/jobs")["total"] == 1
        if not page.text("dialog"):
            page.click("Delete")
        page.fill("Name of the job", name)
        page.click("Delete")

    page.see("No jobs yet")
    assert service.get("/jobs")["total"] == 0


def test_a_filter_of_its_runs_does_not_spare_the_name_of_a_job_to_be_deleted(page, service, target):
    job = service.create(target.url, name="report")
    run_to_end(service, job)
    page.open(service, f"#/job/{job['id']}", "Settings")

    select = page.find("Runs with the state")
    select.find_element("css selector", "option[value=failed]").click()
    page.see("No run here", "#runs")
    page.click("Delete")

    page.see("1 run of history", "dialog")
    assert page.find("Name of the job")


def test_a_double_click_is_one_request(page, service, target):
    job = service.create(target.url, name="report", enabled=True)
    page.open(service)
    asked, go_on = watch(service), threading.Event()
    app, bottle = service.service.api.app, chronos.bottle
    app.add_hook("before_request", lambda: bottle.request.method == "GET" or go_on.wait(10))
    page.click("Run now report", twice=True)
    go_on.set()
    page.see("success", "#jobs")

    assert service.get(path_of(job, "/executions"))["total"] == 1
    assert [method for method, _path, _status in asked.queue].count("POST") == 1


def test_of_two_windows_the_second_to_save_is_told(page, service):
    page.allowed = "status of 412"
    job = service.create(NOBODY, name="report")
    windows = {page.tab: "first", page.new_tab(): "second"}
    for window in windows:
        page.browser.switch_to.window(window)
        page.open(service, f"#/job/{job['id']}/edit", "Schedule")
    for window, name in windows.items():
        page.browser.switch_to.window(window)
        page.fill("name", name)
        page.click("Save")
        page.see("first")  # the heading of the job, or in the differences

    page.see("version 2", "main [role=alert]")
    assert page.find("name").get_attribute("value") == "second"
    kept = service.get(path_of(job))
    assert (kept["name"], kept["version"]) == ("first", 2)


def test_an_older_version_is_compared_and_rolled_back_to(page, service):
    job = service.create(NOBODY, name="old", timeout="1m")
    patch(service, job, {"name": "new", "timeout": "2m"})
    page.open(service, f"#/job/{job['id']}", "Version 2")
    page.click("Compare")
    for text in ("Name", "old", "new", "1m", "2m"):
        page.see(text, "dialog")
    page.click("Roll back to version 1")

    page.see("old", "h1")
    page.see("Version 3", "#versions")
    rolled = service.get(path_of(job))
    assert (rolled["version"], rolled["name"], rolled["timeout"]) == (3, "old", "1m")


@pytest.mark.parametrize("words", ["time zone Gone/Zone", "damaged: Expecting", "lost"])
def test_a_job_that_can_not_be_used_is_shown_and_edited(page, service, spoilt, target, words):
    page.allowed = "status of 40[09]"
    job, run = spoilt(words, enabled=True)
    page.open(service, text="report")
    page.open(service, f"#/job/{job['id']}/run/{run['id']}", "Succeeded")
    page.open(service, f"#/job/{job['id']}", "Version 1")

    page.click("Edit")
    for name, text in {"schedule": "@daily", "timezone": "UTC", "webhook.url": target.url}.items():
        page.fill(name, text)
    page.click("Save")

    wait_until(lambda: service.get(path_of(job))["version"] == 3)
    assert service.get(path_of(job))["next_run"]


def test_runs_are_cancelled_and_replayed(page, service, target):
    job = service.create(target.url + "/hang", name="report", enabled=True)
    first = service.start(job)["id"]
    assert target.hanging.acquire(timeout=10)
    page.open(service)
    page.click("Cancel report")
    page.click("Cancel the run")
    page.see("cancelled", "#jobs")
    assert service.get(path_of(job, f"/executions/{first}"))["reason"] == "cancelled"

    target.let_go.set()
    page.open(service, f"#/job/{job['id']}/run/{first}", "Replay")
    page.click("Replay")
    page.see("Succeeded", "#sentence")
    [second, _first] = service.get(path_of(job, "/executions"))["executions"]
    assert (second["replay_of"], second["status"]) == (first, "success")


WITHOUT_SLASH = "location = /chronos { proxy_pass BACKEND/; }"  # else nginx redirects to /chronos/


@pytest.mark.parametrize(("slash", "more"), [("/", ""), ("", ""), ("", WITHOUT_SLASH)])
def test_the_page_works_below_a_path_of_a_proxy(make_nginx, page, service, target, slash, more):
    proxied = make_nginx(SUB_PATH % (PASSES_HOST + GZIP + more), service)
    page.browser.get(proxied.url + slash)
    page.see("No jobs yet")
    page.click("Create the first job")
    for name, text in {"name": "report", "schedule": "@daily", "webhook.url": target.url}.items():
        page.fill(name, text)
    page.click("Save")
    page.see("report", "h1")
    page.click("Run now report")
    page.click("Open the run")
    page.see("succeeded", "#sentence")
    page.browser.refresh()
    page.see("succeeded", "#sentence")
    place = page.js("return location.pathname")
    page.click("report")
    page.click("Edit report")
    page.fill("name", "renamed")
    page.click("Save")
    page.see("renamed", "h1")

    [job] = service.get("/jobs")["jobs"]
    assert (job["name"], job["last_execution"]["status"]) == ("renamed", "success")
    assert place == ("/chronos" if more else "/chronos/")
    asked = [url for url in page.asked() if url.startswith("http")]
    assert [url for url in asked if not url.startswith(proxied.url)] == []


@pytest.fixture
def proxy_of_readme(make_process, make_nginx, guard, certificate):
    """The process as the README has it behind nginx, with sign-in; and what it logs."""
    readme = (CHRONOS.parent / "README.md").read_text()
    [server] = re.findall(r"```nginx\n(.*?)```", readme, re.DOTALL)
    [setting] = re.findall(r"With this nginx and `(.*?)`", readme)
    auth = {"auth": {key.removeprefix("auth__"): value for key, value in guard.items()}}
    process = make_process(f"{setting}\n{json.dumps(auth)[1:-1]}\n")
    own = {"8443": "PORT", "http://127.0.0.1:8080": "BACKEND"}
    paths = ("/etc/ssl/certs/chronos.pem", "/etc/ssl/private/chronos.key")
    for printed, used in (own | dict(zip(paths, certificate, strict=True))).items():
        server = server.replace(printed, str(used))
    return make_nginx(server, process, "https"), process.log


def test_the_nginx_of_the_readme_brings_page_and_sign_in(proxy_of_readme, page, certificate):
    proxied, log = proxy_of_readme
    trusting = {"verify": certificate[0]}
    page.open(with_user(proxied), text="No jobs yet")
    page.click("Create the first job")
    for name, text in {"name": "report", "schedule": "@daily", "webhook.url": NOBODY}.items():
        page.fill(name, text)
    page.click("Save")
    page.see("report", "h1")

    page.see("signed in as ada", "footer")
    proxied.expect(401, "GET", "/jobs", **trusting)
    [job] = proxied.expect(200, "GET", "/jobs", **trusting, headers=credentials("vera"))["jobs"]
    assert (job["name"], job["enabled"]) == ("report", True)
    assert "trusted_proxy" not in "".join(log)


# --- what the page asks for, and when -------------------------------------------------


def polls(asked, count=1, seconds=10):
    """Wait for so many polls; return their statuses. Raises queue.Empty if one is not made."""
    statuses = []
    while len(statuses) < count:
        method, path, status = asked.get(timeout=seconds)
        statuses += [status] if (method, path) == ("GET", "/api/v1/stats") else []
    return statuses


HIDE = """
Object.defineProperty(document, "hidden", { value: arguments[0], configurable: true });
document.dispatchEvent(new Event("visibilitychange"));"""


def test_nobody_is_asked_while_the_page_is_hidden(page, service):
    page.hurry()
    page.open(service, text="No jobs yet")
    asked = watch(service)
    assert 304 in polls(asked, 2)

    page.js(HIDE, True)
    asked.queue.clear()
    with pytest.raises(queue.Empty):
        polls(asked, 2, seconds=1)  # one may have been on its way
    page.js(HIDE, False)

    assert polls(asked)


def test_the_longer_nobody_does_anything_the_rarer_are_the_polls(page, service):
    page.hurry()
    page.open(service, text="No jobs yet")
    for ahead, wait in ((0, 3_000), (61_000, 10_000), (601_000, 30_000)):
        page.js("ahead = arguments[0]; waits.length = 0", ahead)
        page.js(HIDE, False)

        wait_until(lambda wait=wait: wait in page.js("return waits"))


def test_a_poll_touches_neither_focus_nor_what_is_typed(page, service):
    page.hurry()
    job = service.create(NOBODY, name="report", enabled=True)
    page.open(service)
    asked = watch(service)
    page.fill("Filter the jobs", "rep")
    for number in range(3):
        patch(service, job, {"name": f"report {number}"})
        page.see(f"report {number}", "#jobs")
    polls(asked)

    assert page.focused() == "Filter the jobs"
    page.press("x")
    assert page.find("Filter the jobs").get_attribute("value") == "repx"
    page.see("No job matches")


def test_what_is_typed_is_kept_while_the_server_is_away(page, make_service):
    page.allowed = "ERR_"
    page.hurry()
    first = make_service()
    first.create(NOBODY, name="report", enabled=True)
    page.open(first)
    page.fill("Filter the jobs", "rep")
    first.service.stop()
    page.see("Not reachable", "#offline")
    assert "report" in page.text("#jobs")

    make_service(server__http__address=first.url.removeprefix("http://"))

    wait_until(lambda: not page.text("#offline"))
    assert page.focused() == "Filter the jobs"
    assert page.find("Filter the jobs").get_attribute("value") == "rep"


# --- who may --------------------------------------------------------------------------


def with_user(service, name="ada"):
    """Return a client whose URL names a user, as somebody types it into the address bar."""
    client = copy.copy(service)
    client.url = service.url.replace("//", f"//{name}:{quote('pässwörd')}@")
    return client


def test_the_page_works_with_a_password_in_the_address(page, guarded, target):
    ada = credentials("ada")
    body = job_body(target.url, name="report", enabled=True)
    job = guarded.expect(201, "POST", "/jobs", body, headers=ada)
    page.open(with_user(guarded))
    page.click("Run now report")
    page.see("success", "#jobs")

    page.see("signed in as ada", "footer")
    runs = guarded.expect(200, "GET", path_of(job, "/executions"), headers=ada)
    assert runs["total"] == 1


def test_who_may_only_read_gets_no_buttons(page, guarded):
    body = job_body(NOBODY, name="report", enabled=True)
    job = guarded.expect(201, "POST", "/jobs", body, headers=credentials("ada"))
    names = """return [...document.querySelectorAll("button, a")].filter(e => e.checkVisibility())
        .map(e => e.innerText)"""
    for route in ("#/", f"#/job/{job['id']}"):
        page.open(with_user(guarded, "vera"), route, "report")
        assert not {"Run now", "Pause", "Edit", "Delete", "New job"} & set(page.js(names))


def test_who_is_signed_out_is_told_so_and_asks_no_more(page, guarded, make_service):
    page.allowed = "status of 401|ERR_"
    page.hurry()
    page.open(with_user(guarded), text="No jobs yet")
    guarded.service.stop()
    address = guarded.url.removeprefix("http://")
    ada = {"auth__type": "basic", "auth__users": {"ada": ADA}}  # with another password
    changed = make_service(server__http__address=address, **ada)
    asked = watch(changed)

    page.see("Signed out", "#signed-out")
    asked.queue.clear()
    page.js(HIDE, False)  # whoever comes back to a page makes it poll
    with pytest.raises(queue.Empty):
        polls(asked, seconds=1)


ATTACK = """
const [url, done] = arguments, form = document.createElement("form");
const frame = document.createElement("iframe"), bare = { method: "POST", mode: "no-cors" };
Object.assign(form, { method: "POST", action: url + "/trigger", enctype: "text/plain" });
form.target = frame.name = "frame";
document.body.append(form, frame);
const calls = [fetch(url + "/enable", bare), fetch(url + "/trigger", { ...bare, body: "{}" }),
  fetch(url, { method: "DELETE" }), fetch(url + "/trigger", { method: "POST" })];
Promise.allSettled(calls).then(() => {
  frame.onload = () => done();
  form.submit();
});"""


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.test"])
def test_a_page_of_another_origin_changes_nothing(page, service, target, host):
    page.allowed = "."
    job = service.create(target.url, name="report")
    page.browser.get(target.url.replace("127.0.0.1", host) + "/ok")
    asked = watch(service)
    page.browser.execute_async_script(ATTACK, f"{service.url}/api/v1{path_of(job)}")

    assert {(method, status) for method, _path, status in asked.queue} >= {("POST", 403)}
    unchanged = service.get(path_of(job))
    assert (unchanged["enabled"], unchanged["version"]) == (False, 1)
    assert service.get(path_of(job, "/executions"))["total"] == 0


def test_the_page_is_not_framed_and_not_answered_under_another_name(page, service, target):
    page.allowed = "X-Frame-Options|frame-ancestors|status of 403"
    page.browser.get(target.url + "/ok")
    script = """const frame = document.createElement("iframe");
        Object.assign(frame, { src: arguments[0], onload: arguments[1] });
        document.body.append(frame)"""
    page.browser.execute_async_script(script, service.url + "/")
    page.allowed = "^$"
    assert re.search("X-Frame-Options|frame-ancestors", str(page.console()))

    page.allowed = "status of 403"
    page.browser.get(service.url.replace("127.0.0.1", "evil.test") + "/")
    assert "server.allowed_hosts" in page.text()


# --- how it looks, on every page ------------------------------------------------------


@pytest.fixture
def tour(service, target):
    """All pages, with what stands on each: a job with runs of all kinds, and a secret."""
    auth = {"type": "bearer", "token": CANARY}
    job = service.create(
        target.url + "/echo", name="report", enabled=True, tags={"team": "a"}, schedule="@hourly",
        timezone=NEW_YORK, webhook={"auth": auth, "body": "{}", "headers": {"X-API-Key": CANARY}},
    )  # fmt: skip
    done = run_to_end(service, job)
    patch(service, job, {"description": "D" * 300, "webhook": {"url": target.url + "/status/404"}})
    failed = run_to_end(service, job)
    service.create(NOBODY, name="N" * 200, enabled=True, schedule="*/5 * * * *")
    hanging = service.create(target.url + "/hang", name="hanging", enabled=True)
    service.start(hanging)
    assert target.hanging.acquire(timeout=10)
    place = f"#/job/{job['id']}"
    routes = {"#/": "All jobs", "#/runs": "What happened", "#/new": "Schedule", place: "Settings"}
    routes |= {f"{place}/edit": "Schedule", f"{place}/run/{done['id']}": "Succeeded"}
    return routes | {f"{place}/run/{failed['id']}": "Failed", "#/job/none": "deleted"}


def test_no_page_shows_a_secret_or_upsets_the_console(page, service, tour):
    page.allowed = "/jobs/none.* status of 404"
    for route, text in tour.items():
        page.open(service, route, text)
        page.browser.refresh()
        page.see(text)

        assert CANARY not in page.browser.page_source, route
        assert page.console() == [], route


def test_no_page_is_wider_than_a_small_screen(page, service, tour):
    page.allowed = "status of 404"
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.cdp("Emulation.setDeviceMetricsOverride", **size)
    small = """
        return [...document.querySelectorAll("button, .button, input, select, textarea, summary")]
          .map(e => [e.getBoundingClientRect(), e]).filter(([box, e]) => e.checkVisibility()
            && (box.width < 24 || box.height < 24)).map(([, e]) => e.outerHTML)"""
    for route, text in tour.items():
        page.open(service, route, text)
        widths = page.js("return [document.documentElement.scrollWidth, innerWidth]")

        assert widths == [360, 360], route
        assert page.js(small) == [], route


# Each text that has less contrast than 4.5 to 1 with what is behind it.
PALE = r"""
const parse = color => [...color.match(/[\d.]+/g).map(Number), 1].slice(0, 4);
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) =>
  sum + share * (c[i] <= 10 ? c[i] / 3294 : ((c[i] / 255 + 0.055) / 1.055) ** 2.4), 0);
const pale = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const text = texts.currentNode, e = text.parentElement, style = getComputedStyle(e);
  if (!text.data.trim() || !e.checkVisibility()) continue;
  if (e.closest("[aria-disabled], .vh, script, noscript, datalist")) continue;
  let behind = [255, 255, 255, 1];
  const around = [];
  for (let each = e; each; each = each.parentElement) around.unshift(each);
  for (const each of around) behind = over(parse(getComputedStyle(each).backgroundColor), behind);
  const color = parse(e instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(over(color, behind)), light(behind)].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) pale.push([text.data, color.join(), behind.join()].join(" "));
}
return pale;"""
NAMED = ("button", "link", "textbox", "searchbox", "combobox", "checkbox", "heading", "dialog")


def test_every_page_can_be_read_and_heard(page, service, tour):
    page.allowed = "status of 404"
    levels = "return [...document.querySelectorAll('h1, h2, h3')].map(e => +e.localName[1])"
    for route, text in tour.items():
        page.open(service, route, text)
        headings = page.js(levels)
        assert headings[0] == 1 and headings.count(1) == 1, route
        assert max(b - a for a, b in itertools.pairwise([1, *headings])) <= 1, route
        nodes = page.cdp("Accessibility.getFullAXTree")["nodes"]
        parts = [node for node in nodes if not node["ignored"] and node["role"]["value"] in NAMED]
        assert len(parts) > 5, route
        assert [node for node in parts if not node.get("name", {}).get("value")] == [], route
        for theme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": theme}]
            page.cdp("Emulation.setEmulatedMedia", features=features)
            assert page.js(PALE) == [], (route, theme)


def test_all_can_be_done_by_keyboard(page, service, target):
    page.open(service, text="No jobs yet")
    page.press("n")
    wait_until(lambda: page.focused() == "New job")
    for name, text in {"name": "report", "schedule": "@daily", "webhook.url": target.url}.items():
        page.tab_to(name)
        page.press(text)
    page.press(ENTER)
    wait_until(lambda: page.focused() == "report")  # the heading of its page
    page.tab_to("Run now report")
    page.press(ENTER)
    page.see("200", "#runs")
    assert page.focused() == "Run now report"

    page.tab_to("Delete")
    page.press(ENTER)
    wait_until(lambda: page.focused() == "Name of the job")
    page.press(ESCAPE)
    wait_until(lambda: page.focused() == "Delete")
    wait_until(lambda: not page.js("return document.activeElement.ariaDisabled"))  # it is over
    page.press(ENTER)
    wait_until(lambda: page.focused() == "Name of the job")
    page.press("report", ENTER)
    page.see("No jobs yet")
    assert page.focused() == "Jobs"
    assert service.get("/jobs")["total"] == 0


def test_times_are_those_of_the_job_with_the_readers_beside(page, make_service, clock):
    service = make_service(clock)  # New York changes its clocks on 14 March
    when = {"schedule": "0 12 13-15 3 *", "timezone": NEW_YORK}
    job = service.create(NOBODY, name="report", enabled=True, **when)
    page.cdp("Emulation.setTimezoneOverride", timezoneId="Asia/Kolkata")
    page.open(service, f"#/job/{job['id']}", "Next runs")

    shown = page.text("#next ol").split(" Mar 2027")
    assert shown[0] == "Sat 13" and "12:00:00" in shown[1] and "22:30:00" in shown[2]
    assert "Sun 14" in shown[2] and "12:00:00" in shown[3] and "21:30:00" in shown[4]


def add_history(service, jobs, runs):
    """Add so many enabled jobs, each with so many runs that have ended, one of them failed."""
    store, engine = service.service.store, service.service.engine
    retry = service.service.settings.scheduler.default_retry_policy
    now, hour = chronos.Clock().now(), (datetime.now(UTC).hour + 12) % 24
    config, _enabled = chronos.validate_job(job_body(NOBODY), retry, now)

    def add(turn):
        for number in range(jobs):
            about = {"name": f"job {number}", "schedule": f"{number % 60} {hour} * * *"}
            job = engine.job_changes.create(turn, config | about, True, "tester")
            for run in range(runs):
                status, at = "failed" if run == 7 else "success", now - (runs - run) * SECOND
                store.executions.add([chronos.Execution(
                    f"exec-{job.id}-{run}", job.id, 1, "schedule", status, at, NOBODY, None,
                    completed_at=at, started_at=at, attempts=1,
                )])  # fmt: skip

    engine.submit(add)


def test_three_hundred_jobs_are_soon_drawn_and_cheaply_polled(page, service):
    add_history(service, jobs=300, runs=30)
    job = service.get("/jobs?limit=1")["jobs"][0]
    asked = watch(service)
    page.cdp("Performance.enable", timeDomain="threadTicks")  # of the processor: others may be busy

    def used():
        metrics = page.cdp("Performance.getMetrics")["metrics"]
        return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

    def poll_changed(name):
        patch(service, job, {"name": name})
        before = used()
        page.press("r")
        page.see(name, f"#job-{job['id']}")
        return used() - before

    page.open(service)
    assert used() < 1
    assert page.js("return document.querySelectorAll('#jobs tbody tr').length") == 300
    asked.queue.clear()
    page.press("r")
    assert polls(asked) == [304]
    assert min(poll_changed(f"changed {number}") for number in range(5)) < 0.1


# ======================================================================================
# The real process: on time, under load, crashes, clocks, outages
# ======================================================================================

# --- on time, and at what cost --------------------------------------------------------


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.long)])
def test_each_fire_time_arrives_once_and_on_time(make_process, target, seconds):
    process = make_process()
    intervals = {
        process.create(target.url, schedule=schedule, enabled=True)["id"]: interval
        for schedule, interval in (("@every 1s", 1), ("*/2 * * * * *", 2))
    }

    arrivals = [target.take() for _ in range(seconds * 3 // 2)]

    lateness = []
    for job_id, interval in intervals.items():
        mine = [(h, at) for _, _, h, _, at in arrivals if h["X-Chronos-Job-ID"] == job_id]
        fires = [chronos.parse_time(headers["X-Chronos-Scheduled-Time"]) for headers, _at in mine]
        assert fires == list(range(fires[0], fires[-1] + 1, interval * SECOND))
        assert len(fires) >= seconds // interval - 1
        lateness += [at - fire / SECOND for (_headers, at), fire in zip(mine, fires, strict=True)]
    median = statistics.median(lateness)
    print(f"lateness: median {median * 1000:.1f} ms, worst {max(lateness) * 1000:.1f} ms")
    assert min(lateness) >= 0
    assert median < (0.01 if seconds == 60 else 0.25)


def test_a_thousand_jobs_due_in_one_second_all_fire_once(make_process, target, tmp_path):
    at = (int(time.time()) + 3) * SECOND
    fill_store(tmp_path / "home" / "data", target.url, 1000, f"@at {chronos.format_time(at)}", at)

    process = make_process()

    arrivals = [target.take() for _ in range(1000)]
    ended = lambda job: job["last_execution"]["status"] == "success"
    wait_until(lambda: all(map(ended, process.get("/jobs")["jobs"])))
    newest = process.get("/executions?limit=100")["executions"]
    assert {execution["trigger"] for execution in newest} == {"schedule"}
    print(f"1000 jobs took {max(at for *_, at in arrivals) - at / SECOND:.2f} s")
    assert len({headers["X-Chronos-Job-ID"] for _, _, headers, _, _ in arrivals}) == 1000
    assert {headers["X-Chronos-Attempt"] for _, _, headers, _, _ in arrivals} == {"1"}
    assert min(arrived for *_, arrived in arrivals) >= at / SECOND
    assert target.received.empty()


@pytest.mark.long
def test_a_thousand_daily_jobs_cost_next_to_nothing_while_nothing_is_due(make_process, tmp_path):
    now = chronos.Clock().now()
    hour = chronos.to_datetime(now).hour
    later = now + 12 * chronos.HOUR
    fill_store(tmp_path / "home" / "data", NOBODY, 1000, f"0 {(hour + 12) % 24} * * *", later)
    process = make_process()

    def cpu_seconds():
        stat = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    before = cpu_seconds()
    time.sleep(20)
    share = (cpu_seconds() - before) / 20

    print(f"idle: {share:.2%} of a core")
    assert share < 0.01


@pytest.mark.long
def test_under_a_steady_load_neither_file_nor_memory_grow(make_process, target, tmp_path):
    now, directory = chronos.Clock().now(), tmp_path / "home" / "data"
    fill_store(directory, target.url, 200, "* * * * * *", now)
    process = make_process("retention: {executions_per_job: 100}")
    seen = []

    for minute in range(6):
        time.sleep(60)  # what is measured is what it has come to after so long
        size = sum(path.stat().st_size for path in directory.glob("chronos.db*"))
        seen.append((memory(process, "VmRSS"), size / 1e6))
        print(f"minute {minute + 1}: {seen[-1][0]:.1f} MB of memory, {seen[-1][1]:.1f} MB on disk")

    jobs = process.get("/jobs?limit=20")["jobs"]
    totals = [process.get(path_of(job) + "/executions?limit=1")["total"] for job in jobs]
    print(f"{target.received.qsize() / 360:.0f} executions/s; a job has {max(totals)} at most")
    assert target.received.qsize() > 190 * 360
    assert max(totals) <= 110
    assert seen[5][0] - seen[2][0] < 3
    assert seen[5][1] <= seen[2][1] * 1.1


# --- overload -------------------------------------------------------------------------


def test_50000_due_executions_cost_no_more_memory_than_500(make_process, target, tmp_path):
    data, peaks = tmp_path / "home" / "data", []
    fill_store(data, target.url + "/hang", 1, "@daily", None)
    add = """
        INSERT INTO executions (id, job_id, job_version, trigger, status, scheduled_at, target,
                                due_at, attempts, spent, width, attempt_log)
        SELECT ?, id, 1, 'manual', 'pending', 0, ?, ?, 0, 0, 0, '[]' FROM jobs WHERE seq > 0"""

    for count in (500, 50_000):
        ids = [f"exec-{count}-{n}" for n in range(count)]
        with contextlib.closing(sqlite3.connect(data / "chronos.db")) as database, database:
            database.executemany(add, [(ids[n], target.url, count - n) for n in range(count)])
        process = make_process()
        first = [target.take()[2]["X-Chronos-Execution-ID"] for _ in range(48)]
        assert sorted(first) == sorted(ids[-48:])  # by due_at, not in the order of their creation
        assert process.get("/cluster/status")["pending"] == count - 48
        target.let_go.set()
        for _ in range(452):
            target.take()
        peaks.append(memory(process, "VmHWM"))
        wait_until(lambda: count > 500 or process.get("/cluster/status")["running"] == 0)  # noqa: B023
        process.end(signal.SIGKILL)
        target.let_go.clear()

    print(f"500: {peaks[0]:.1f} MB, 50,000: {peaks[1]:.1f} MB")
    assert peaks[1] - peaks[0] < 10


def test_a_host_that_accepts_no_connection_makes_no_other_target_late(service, target, deaf_url):
    dead = service.create(deaf_url, concurrency="allow")
    for _ in range(60):
        service.start(dead)
    status = service.get("/cluster/status")
    assert (status["running"], status["pending"]) == (48, 12)

    service.create(target.url, schedule="@every 1s", enabled=True)

    for _ in range(3):
        _method, _path, headers, _body, arrived_at = target.take()
        fire_time = chronos.parse_time(headers["X-Chronos-Scheduled-Time"]) / SECOND
        assert 0 <= arrived_at - fire_time < 1


# --- kill -9: nothing lost, nothing doubled -------------------------------------------

STEPS = {"@every 1s": SECOND, "*/2 * * * * *": 2 * SECOND}
ANY_PORT = os.environ | {"CHRONOS_SERVER_HTTP_ADDRESS": "127.0.0.1:0"}
HOUR, YEAR = 3600, 365 * 24 * 3600


def past_runs(client, job):
    """Return all executions of a job, the newest first."""
    path, found = path_of(job, "/executions?limit=100"), []
    page = client.get(path)["executions"]
    while page:
        found += page
        page = client.get(f"{path}&before={page[-1]['id']}")["executions"]
    return found


def audit(client, job):
    """Disable a job; when all of it has ended, check that its history is whole, and return it."""
    until = chronos.parse_time(client.post(path_of(job, "/disable"))["updated_at"])
    wait_until(lambda: all(e["completed_at"] for e in past_runs(client, job)), 30)
    executions = past_runs(client, job)
    created, step = chronos.parse_time(job["created_at"]), STEPS[job["schedule"]]
    origin = created if job["schedule"].startswith("@every") else created - created % step
    expected, ledger = range(origin + step, until + 1, step), []
    for execution in executions:
        newest, oldest = execution["scheduled_time"], execution["missed_from"]
        first, last = map(chronos.parse_time, (oldest or newest, newest))
        fires = range(first, last + 1, step)
        assert len(fires) == (execution["missed_count"] or 1)
        ledger += fires if execution["trigger"] != "manual" else ()
    if job["name"] == "switched":  # it was disabled at times
        expected = set(expected) & set(ledger)
    assert sorted(ledger) == sorted(expected)
    return executions


def create_fired(process, target, schedule="@every 1s", **fields):
    """Create a job, and return it when its first execution is in the history, as a success."""
    job = process.create(target.url, schedule=schedule, enabled=True, **fields)
    target.take()
    wait_until(lambda: process.get(path_of(job, "/executions?status=success"))["total"])
    return job


def drain(target):
    """Return the headers of the requests that have arrived."""
    return [target.take()[2] for _ in range(target.received.qsize())]


def silence(target, seconds):
    """Check that nothing arrives for so long."""
    with pytest.raises(queue.Empty):
        target.received.get(timeout=seconds)


def next_lateness(target):
    """Return by how many seconds the next request comes after its fire time."""
    _, _, headers, _, at = target.take()
    return at - chronos.parse_time(headers["X-Chronos-Scheduled-Time"]) / SECOND


QUICK_RETRY = {"max_attempts": 3, "initial_interval": "300ms"}
DOOMED = ("/slow", "@every 1s", {"name": "doomed"})
KINDS = (
    ("/ok", "*/2 * * * * *", {"missed_run_policy": "execute_all"}),
    ("/ok", "*/2 * * * * *", {"name": "switched"}),
    ("/status/500", "@every 1s", {"retry_policy": QUICK_RETRY, "missed_run_policy": "ignore"}),
    ("/slow", "@every 1s", {"retry_policy": QUICK_RETRY, "missed_run_policy": "execute_all"}),
    ("/slow", "@every 1s", {"retry_policy": ONCE, "concurrency": "allow"}),
    ("/slow", "*/2 * * * * *", {"retry_policy": QUICK_RETRY, "concurrency": "replace"}),
)


class Caller:
    """Uses the API as a client does, and remembers what was acknowledged or is uncertain."""

    def __init__(self, seed, url):
        self.chance, self.url, self.made = random.Random(seed), url, 0
        self.jobs, self.deleted, self.acknowledged = {}, [], 0

    def run(self, client):
        """Make one call after another until the server is gone."""
        acts = {"report": [self.describe, self.trigger]}
        acts |= {"switched": [self.switch], "doomed": [self.delete]}
        with contextlib.suppress(requests.RequestException):
            while True:
                if not self.jobs or self.chance.random() < 0.15:
                    self.create(client)
                job = self.chance.choice(list(self.jobs.values()))
                self.chance.choice(acts[job["name"]])(client, job, path_of(job))

    def call(self, client, *call):
        status, envelope = client.call(*call)
        assert status < 300, envelope
        self.acknowledged += 1
        return envelope["data"]

    def create(self, client):
        """Create a job that stays, twelve of them in all, or one that is to be deleted."""
        stays = self.made < 12 and self.chance.random() < 0.3
        path, schedule, fields = KINDS[self.made % len(KINDS)] if stays else DOOMED
        self.made += stays
        body = job_body(self.url + path, schedule=schedule, enabled=True, **fields)
        job = self.call(client, "POST", "/jobs", body)
        may_be = {"enabled": {True}, "description": {job["description"]}}
        self.jobs[job["id"]] = job | {"versions": {}, "triggers": set(), "may_be": may_be}

    def change(self, client, job, name, value, *call):
        """Set a field; until that is acknowledged, either value may hold."""
        job["may_be"][name].add(value)
        changed = self.call(client, *call)
        job["may_be"][name] = {value}
        return changed

    def describe(self, client, job, path):
        text = str(self.chance.random())
        patch = ("PATCH", path, {"description": text})
        job["versions"][self.change(client, job, "description", text, *patch)["version"]] = text

    def switch(self, client, job, path):
        on = self.chance.random() < 0.5
        path += "/enable" if on else "/disable"
        self.change(client, job, "enabled", on, "POST", path)

    def trigger(self, client, job, path):
        job["triggers"].add(self.call(client, "POST", f"{path}/trigger?wait=0")["id"])

    def delete(self, client, job, path):
        del self.jobs[job["id"]]  # answered or not, it may be gone
        self.call(client, "DELETE", path)
        self.deleted.append(job["id"])

    def check(self, client):
        """Check that all is as it was acknowledged."""
        for job_id in self.deleted:
            client.error(404, "GET", f"/jobs/{job_id}")
        for job_id, job in self.jobs.items():
            shown = client.get(f"/jobs/{job_id}")
            assert all(shown[name] in values for name, values in job["may_be"].items())
            versions = client.get(f"/jobs/{job_id}/versions")
            numbers = [version["version"] for version in versions]
            assert numbers == list(range(shown["version"], 0, -1))
            texts = {v["version"]: v["config"]["description"] for v in versions}
            assert job["versions"].items() <= texts.items()
            manual = {e["id"] for e in past_runs(client, job) if e["trigger"] == "manual"}
            assert job["triggers"] <= manual


def cut_off(data):
    """Return (id, attempt) of what ran at the kill, from a copy of the files as they were left."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(data, copy, dirs_exist_ok=True)
        with open_database(f"{copy}/chronos.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            sql = "SELECT id, attempts FROM executions WHERE status = 'running'"
            return set(database.execute(sql))


def check_attempts(client, job, executions, received, interrupted):
    """Check the attempts of a job: what its target has received, and what a kill has cut off."""
    most = job["retry_policy"]["max_attempts"]
    names = ("Execution-ID", "Scheduled-Time", "Attempt")
    sent = [tuple(headers[f"X-Chronos-{name}"] for name in names) for headers in received]
    rows = {e["id"]: (e["scheduled_time"], e["attempts"]) for e in executions}
    succeeded = {e["id"] for e in executions if e["status"] == "success"}

    assert len(sent) == len(set(sent))
    assert all(at == rows[i][0] and int(attempt) <= rows[i][1] for i, at, attempt in sent)
    assert {(i, rows[i][0], str(rows[i][1])) for i in succeeded} <= set(sent)
    assert all(attempts <= most for _at, attempts in rows.values())
    for i, number in interrupted & {(i, n + 1) for i in rows for n in range(most)}:
        shown = client.get(path_of(job, f"/executions/{i}"))
        errors = {attempt["number"]: attempt["error"] for attempt in shown["attempt_log"]}
        given_up = shown["reason"] == ("interrupted" if number == most else "replaced")
        assert errors[number] == INTERRUPTED and (shown["attempts"] > number or given_up)


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.long)])
def test_kill_9_at_any_instant_loses_nothing_and_doubles_nothing(
    make_process, target, background, tmp_path, rounds
):
    seed = os.environ.get("TEST_SEED") or str(time.time_ns() % 1_000_000)
    print(f"TEST_SEED={seed}")
    chance, data = random.Random(seed), "home/data"
    # All versions stay, so that none that was acknowledged may be missing.
    config = "scheduler: {missed_run_grace: 1s}\nretention: {versions_per_job: 100000}"
    callers = [Caller(chance.random(), target.url) for _ in range(4)]
    interrupted, received = set(), defaultdict(list)

    for _ in range(rounds):
        process = make_process(config)
        calls = [background.submit(caller.run, process) for caller in callers]
        time.sleep(chance.uniform(0.2, 1.5))
        process.end(signal.SIGKILL)
        interrupted |= cut_off(tmp_path / data)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed while it starts
            command, limit = process.process.args, chance.uniform(0, 1)
            subprocess.run(command, timeout=limit, stderr=subprocess.DEVNULL, env=ANY_PORT)
        interrupted |= cut_off(tmp_path / data)
        assert [call.result(10) for call in calls] == [None] * 4
    process = make_process(config)
    for caller in callers:
        caller.check(process)
    jobs = process.get("/jobs")["jobs"]
    ended = [audit(process, job) for job in jobs]

    for headers in drain(target):
        received[headers["X-Chronos-Job-ID"]].append(headers)
    for job, executions in zip(jobs, ended, strict=True):
        check_attempts(process, job, executions, received[job["id"]], interrupted)
    assert cut_off(tmp_path / data) == set()
    print(f"{sum(caller.acknowledged for caller in callers)} calls acknowledged, {len(jobs)} jobs,",
          f"{sum(map(len, ended))} executions, {sum(map(len, received.values()))} requests,",
          f"{len(interrupted)} attempts cut off")  # fmt: skip


# --- the clock of the machine ---------------------------------------------------------

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
NEEDS_FAKETIME = pytest.mark.skipif(
    not FAKETIME, reason="no libfaketime: apt-get install -y libfaketime"
)


@pytest.fixture
def wall(tmp_path, make_process):
    """A process with set_clock(), for its wall clock; its monotonic one stays as it is."""
    file = tmp_path / "clock"

    def set_clock(seconds):
        """Show so many seconds more than two years from now."""
        (tmp_path / "new").write_text(f"+{2 * YEAR + seconds}\n")
        (tmp_path / "new").replace(file)  # it is read whenever the process looks at the clock

    set_clock(0)
    process = make_process(environment={
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    })  # fmt: skip
    process.set_clock = set_clock
    yield process
    for path in Path("/dev/shm").glob(f"*faketime_s*_{process.process.pid}"):
        path.unlink()  # libfaketime leaves them where its process is killed


@NEEDS_FAKETIME
@pytest.mark.parametrize("policy, most", [("ignore", 0), ("execute_one", 1), ("execute_all", 100)])
def test_an_hour_that_the_clock_leaps_is_missed_time(wall, target, policy, most):
    job = create_fired(wall, target, missed_run_policy=policy)

    def missed():
        with contextlib.suppress(requests.ConnectionError):
            return [run for run in past_runs(wall, job) if run["missed_count"]]
        return []  # waitress counts by this clock for how long a connection is idle

    wall.set_clock(HOUR)
    leap = time.time()
    (passed_over,) = wait_until(missed)

    seen = time.time()
    noticed = chronos.parse_time(passed_over["completed_at"]) / SECOND - 2 * YEAR - HOUR - leap
    print(f"noticed after {noticed:.2f} s, seen by the test after {seen - leap:.2f} s")
    assert noticed < 2
    made_up = [e["status"] for e in audit(wall, job) if e["trigger"] == "catch_up"]
    assert made_up == ["success"] * most
    assert abs(passed_over["missed_count"] + most - HOUR) <= 2


@NEEDS_FAKETIME
def test_while_the_clock_is_half_an_hour_back_nothing_fires_again(wall, target):
    job = create_fired(wall, target, concurrency="allow")

    wall.set_clock(-HOUR // 2)
    silence(target, 2.5)
    wall.set_clock(0)
    target.take()

    assert {e["status"] for e in audit(wall, job)} == {"success"}
    ids = [headers["X-Chronos-Execution-ID"] for headers in drain(target)]
    assert len(ids) == len(set(ids)) >= 1


@NEEDS_FAKETIME
@pytest.mark.parametrize("schedule", STEPS)
def test_a_clock_that_is_put_back_by_a_year_fires_on_at_once(wall, target, schedule):
    job = create_fired(wall, target, schedule)

    wall.set_clock(-YEAR)
    put_back = time.time()
    lags = [next_lateness(target) + YEAR for _ in range(2)]

    print(f"fires twice within {time.time() - put_back:.2f} s, {max(lags):.3f} s late")
    assert time.time() - put_back < 1.5 + 2 * STEPS[schedule] / SECOND
    assert min(lags) >= 0 and max(lags) < 0.5
    newest, before, *others = [e["scheduled_time"] for e in past_runs(wall, job)]
    assert chronos.parse_time(newest) - chronos.parse_time(before) == STEPS[schedule]
    assert others and not {newest, before} & set(others)


@pytest.mark.parametrize(("grace", "reasons"), [("1s", {None, "missed"}), ("1m", {None})])
def test_a_process_that_was_suspended_has_missed_what_is_beyond_the_grace(
    make_process, target, grace, reasons
):
    process = make_process(f"scheduler: {{missed_run_grace: {grace}}}")
    job = create_fired(process, target, concurrency="allow")

    process.process.send_signal(signal.SIGSTOP)
    silence(target, 2.8)
    process.process.send_signal(signal.SIGCONT)

    print(f"the first one after it was {next_lateness(target):.2f} s late")
    assert {execution["reason"] for execution in audit(process, job)} == reasons


def test_a_suspend_amid_a_backlog_is_missed_time_too(make_process, target, tmp_path):
    at = (int(time.time()) + 3) * SECOND
    fill_store(tmp_path / "home" / "data", target.url, 1000, "@every 2s", at)
    process = make_process("scheduler: {missed_run_grace: 1s}")
    target.take()

    process.process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.process.send_signal(signal.SIGCONT)

    job = process.get("/jobs")["jobs"][-1]  # the last one to be enqueued
    wait_until(lambda: any(e["reason"] == "missed" for e in past_runs(process, job)), 6)


# --- outages of the store -------------------------------------------------------------


@contextlib.contextmanager
def full_disk(_process, data):
    """Leave no room on the disk."""
    ballast = data / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


def lock_of(_process, data):
    return locked(data / "chronos.db")


def check_outage(process, job, problem):
    """Check what is answered while nothing can be written."""
    path = path_of(job)
    writes = [("POST", "/jobs", job_body(NOBODY)), ("PATCH", path, {"name": "x"})]
    writes += [("POST", f"{path}/disable"), ("POST", trigger_path(job))]
    with ThreadPoolExecutor(len(writes)) as pool:
        refused = list(pool.map(lambda write: process.error(500, *write)["code"], writes))
    health = process.error(503, "GET", "/health")

    assert refused == ["STORE_ERROR"] * len(writes)
    assert health["code"] == "UNAVAILABLE" and problem in health["message"]
    assert process.get("/jobs")["total"] == 2
    assert process.get(path)["name"] == process.get(f"{path}/versions/1")["config"]["name"]
    assert process.get(f"{path}/executions")["total"] >= 1


@pytest.mark.parametrize(("fault", "problem", "grace"), [
    pytest.param(full_disk, "disk is full", "1s",
                 marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")),
    (disk_error, "disk I/O error", "1m"), (lock_of, "database is locked", "1m"),
])  # fmt: skip
def test_an_outage_of_the_store_is_told_and_survived_and_loses_nothing(
    data, make_process, target, fault, problem, grace
):
    process = make_process(f"scheduler: {{missed_run_grace: {grace}}}")
    job = create_fired(process, target)
    path = start_hanging(process, target)

    with fault(process, data):
        begun = time.time()
        target.let_go.set()
        check_outage(process, job, problem)
        drain(target)
        silence(target, max(1, begun + 2.5 - time.time()))  # what can't be recorded is not sent
        assert process.get(path)["status"] == "running"
    freed = time.time()
    while (late := next_lateness(target)) > 0.5:
        pass
    back = time.time() - freed

    print(f"out for {freed - begun:.1f} s, on time again after {back:.2f} s: {late * 1000:.0f} ms")
    assert back < 3 and process.get("/health") and process.create(NOBODY)
    assert (process.get(path)["status"], process.get(path)["attempts"]) == ("success", 1)
    assert ("missed" in {e["reason"] for e in audit(process, job)}) == (grace == "1s")
    lines = [line for line in process.log if " INFO " not in line]
    assert "".join(lines).count("the engine failed") == 1 and len(lines) < 6, lines


def test_an_attempt_that_ends_while_the_store_is_locked_keeps_its_time(make_process, target, data):
    process = make_process()
    path = start_hanging(process, target)
    target.take()

    with locked(data / "chronos.db"):
        target.let_go.set()
        ended = time.time()
        silence(target, 2)
    shown = wait_until(lambda: (s := process.get(path))["completed_at"] and s)

    assert abs(chronos.parse_time(shown["completed_at"]) / SECOND - ended) < 0.5


# --- what a new user does -------------------------------------------------------------


def test_the_tour_of_the_readme_runs_as_printed(make_process, tmp_path):
    readme = (CHRONOS.parent / "README.md").read_text()
    tour = readme.split("## The first job")[1].split("\n## The API")[0]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = make_process().url.removeprefix("http://")
    for printed, used in (("localhost:8080", address), ("8000", str(port)), ("/tmp", tmp_path)):
        tour = tour.replace(printed, str(used))
    blocks = re.findall(r"```sh\n(.*?)```", tour, re.DOTALL)
    serve, create, history, trigger, change, versions, replay = blocks
    calls = tmp_path / "calls"

    def run(block):
        find = f"JOB=$(cat {tmp_path}/job 2>/dev/null || true)\n"
        command = ["bash", "-ec", f"{find}{block}echo $JOB > {tmp_path}/job"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout

    def told(output):
        """Return what each answer of several has, whatever white space they are printed with."""
        decoder, answers = json.JSONDecoder(), []
        while output := output.lstrip():
            answer, end = decoder.raw_decode(output)
            answers.append(answer["data"])
            output = output[end:]
        return answers

    command = serve.replace("python3 -m", "exec python3 -um").strip() + f" 2> {calls}"
    hook = subprocess.Popen(["bash", "-c", command], stdout=subprocess.DEVNULL)
    try:
        created = json.loads(run(create))["data"]
        wait_until(lambda: calls.exists() and '"GET /report HTTP/1.1" 200' in calls.read_text())
        triggered = json.loads(run(trigger))["data"]
        newest = json.loads(run(history))["data"]["executions"][0]
        changed = json.loads(run(change))["data"]
        listed, back = told(run(versions))
        replayed, *tidied = told(run(replay))
    finally:
        hook.kill()
        hook.wait()

    assert created["next_run"].endswith(("0Z", "5Z"))
    assert (triggered["status"], triggered["trigger"]) == ("success", "manual")
    assert (newest["status_code"], newest["response"]) == (200, "OK\n")
    assert changed["webhook"]["url"].endswith("/wrong")
    assert [version["version"] for version in listed] == [2, 1]
    assert (back["new_version"], back["job"]["webhook"]["url"][-7:]) == (3, "/report")
    assert replayed["message"] == "Execution replay triggered"
    assert (tidied[0]["enabled"], tidied[1]) == (False, {"id": created["id"]})


def test_only_the_promised_files_stand_at_the_top_level():
    names = {path.name for path in CHRONOS.parent.iterdir() if not path.name.startswith(".")}
    promised = {"chronos.py", "chronos.yaml", "test_chronos.py", "requirements.txt", "README.md"}

    assert names - {"LICENSE", "data", "__pycache__"} == promised


# ======================================================================================
# Bad input, made from the tables of routes and fields
# ======================================================================================

SEED = int(os.environ.get("TEST_SEED", 1))


def as_bytes(text):
    return text.encode("utf-8", "surrogateescape")  # \udcff is the byte 0xff


# fmt: off
ODD_TEXTS = [
    "", " ", "\\u0000", "\0", "\n", "\\ud800", "\\udfff\\ud800", "\udcff", "\udced\udca0\udc80",
    "\\x", "\\r\\nX-Odd: 1", "\uff4e\uff41\uff4d\uff45", "\u202e\u200b", "\u0435", "\\u2028\\u0085",
    "x" * 70_000, "\\ud83d\\ude00" * 300, MASK, "%s%n{0}${HOME}", "<script>", "' OR 1=1 --",
    "../../etc", "UTC", "localtime", "0", "1ms", "-1s", "9999999999h", "9" * 5000, "true", "failed",
    "@every 1h", "@at 9999-12-31T23:59:59-10:00", "* * * * * *", "0 0 29 2 *", "0-59/0 * * * *",
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59Z", "http://127.0.0.1:0/", "http://[::1",
    f"{NOBODY}\\u00e9?%zz#\\ud83d\\ude00", "http://\uff11\uff12\uff17.0.0.1:1", f"{NOBODY}\\\\@a/",
]
ODD_JSON = [
    *(f'"{text}"' for text in ODD_TEXTS), "null", "true", "false", "0", "-1", "0.5", "-0.", "1e999",
    "-1e999", "1e-999", "NaN", "-Infinity", "0x1f", "01", "+1", "9" * 400, "-9223372036854775809",
    "9" * 5000, "[]", "{}", "[null]", '{"": ""}', '"', "'x'", "nul", '{"a": 1, "a": 2}',
    '{"type": ["basic"]}', "[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000,
    "[" + "0," * 5000 + "0]", '{"%s": 1}' % ("x" * 10**6), "x" * 2**20,
    json.dumps({f"n{n}": "x" for n in range(60)}), 'null, "NAME": null', '1, "NAME\u0435": 1',
    '1, "NAMES": 1', '1, "": 1', 'null, "id": 1e999',
]  # NAME: the name of the field, which so is there twice, or has a neighbour much like it
ODD_IDS = ["%2F", "..", "%2e%2e", "%00", "%0A", "%", "%zz", "%ff", "%ed%a0%80", "\udcff", "-1", "0",
           "%E2%80%8B", "x" * 10_000, "99999999999999999999", "%D9%A1", "'--", "*", " "]
ODD_ENDS = ["/", "//x", "/..", "%0A", "%00", ";x", "%2F", "%ff", "#", "?"]  # the last end an id
ODD_HEADERS = [
    "If-Match: \udcff\udc80 x", 'If-Match: "1"', "If-Match:", 'If-Match: W/"1"' + ', "x"' * 1000,
    "Host: a\r\nHost: b\r\nHost: [::1", "Accept: text/html;q=\udcff, */*;q=1e999", "Range: bytes=-",
    "Content-Type: text/xml", "Content-Type: multipart/form-data", "Content-Type: \udcff\0", "X : ",
    "Content-Encoding: gzip", "Cookie: " + "a=b; " * 500, "Authorization: Basic \udcff", "no colon",
    "X-HTTP-Method-Override: DELETE", "X-Forwarded-For: ' OR 1=1", "X-Forwarded-Proto: gopher",
    "\r\n".join(f"X-{n}: {n}" for n in range(100)), "X: " + "x" * 8000, "Upgrade: h2c", "\udcff: x",
    "Transfer-Encoding: gzip", "Content_Length: 5", "X: a\rb", "X: a\0b", "If-None-Match: *",
    "If-None-Match: \udcff", "Idempotency-Key: \udcff", "Idempotency-Key: a\r\nIdempotency-Key: b",
]
ODD_METHODS = ["TRACE", "CONNECT", "OPTIONS", "HEAD", "BREW", "ANY", "PROXY", "get", "G" * 5000]
TABLES = {(): chronos.JOB_FIELDS, ("webhook",): chronos.WEBHOOK_FIELDS, ("tags",): ["odd"],
          ("retry_policy",): chronos.RETRY_FIELDS, ("webhook", "headers"): ["X-Odd", "Cookie"]}
FIELDS = [(*path, name, None) for path, table in TABLES.items() for name in table]
FIELDS += [("webhook", "auth", name, kind)
           for kind, table in chronos.AUTH_FIELDS.items() for name in ("type", *table)]
AUTHS = [{"type": kind} | dict.fromkeys(table, "value")
         for kind, table in chronos.AUTH_FIELDS.items()]
QUERIES = ["wait", "tag"]  # and the names in EXECUTIONS_QUERY, JOBS_QUERY …
QUERIES += [name for key, table in vars(chronos).items() if key[-6:] == "_QUERY" for name in table]
WRITES = [route[:2] for route in chronos.Api.ROUTES
          if route[0] in ("POST", "PUT", "PATCH") and re.search("/jobs(/<job_id>)?$", route[1])]
# fmt: on


class Fuzzer:
    """Makes requests that are odd in one way or several, and checks what each is answered."""

    def __init__(self, service, kept):
        self.service, self.kept, self.chance = service, kept, random.Random(SEED)
        self.odd_ids = [*ODD_IDS, "%00" + kept[0]["id"], kept[0]["id"].upper()]
        self.odd_ids += [job["id"] + end for job in kept for end in ODD_ENDS[:-2]]
        self.renew()

    def renew(self):
        """Make the job at which writes are aimed, and an execution of it."""
        self.job = self.service.create(NOBODY, retry_policy=ONCE)
        self.service.call("POST", trigger_path(self.job, "?wait=0"))
        self.run = self.service.get(path_of(self.job, "/executions"))["executions"][0]

    def maybe(self, likelihood):
        return self.chance.random() < likelihood

    def path(self, template):
        good = {"job_id": self.job["id"], "exec_id": self.run["id"]}
        return re.sub("<(.*?)>", lambda match: good.get(match[1], "1"), template)

    def body(self, method, field, odd):
        """Return a job, as JSON, in which one field is odd and some are left out."""
        *parents, name, kind = field
        body = copy.deepcopy(EXAMPLE) | {"enabled": self.maybe(0.5)}
        auths = [auth for auth in AUTHS if kind in (None, auth["type"])]
        body["webhook"] |= {"url": NOBODY, "auth": dict(self.chance.choice(auths))}
        if self.maybe(0.2):
            del body[self.chance.choice(sorted(body.keys() - {*parents, name}))]
        inner = body
        for parent in parents:
            inner = inner[parent]
        inner[name] = "ODD"
        if method == "PATCH":
            body = {top: body[top] for top in (*parents, name)[:1]}
        made = as_bytes(json.dumps(body).replace('"ODD"', odd.replace("NAME", name)))
        if self.maybe(0.05):  # a byte too few, too many, or another
            cut = self.chance.randrange(len(made))
            made = made[:cut] + self.chance.randbytes(self.chance.randint(0, 2)) + made[cut + 1 :]
        return made

    def send(self, method, path, query="", headers=(), body=b""):
        """Send a request, again if it took a second; check the answer, return status and data."""
        query += "&wait=0" * ("/trigger" in path and "wait=" not in query)
        query = "schedule=0+9+*+*+*&" + query
        length = f"Content-Length: {len(body)}"
        if body and self.maybe(0.1) and "Transfer-Encoding: gzip" not in headers:
            length = "Transfer-Encoding: chunked"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        lines = [f"{method} {path}?{query} HTTP/1.1", "Connection: close", length, *headers]
        sent = as_bytes("\r\n".join(lines) + "\r\n\r\n") + body
        try:
            for again in (False, True):
                start = time.monotonic()
                ((status, envelope),) = read_answers(exchange(self.service, sent))
                if time.monotonic() - start < 1:
                    break
                assert not again, "it took a second, twice"
            assert envelope or method == "HEAD"
            if status >= 500 and status != 501:  # Transfer-Encoding: gzip
                assert "/trigger" in path and envelope["error"]["code"] == "EXECUTION_ERROR"
        except Exception as error:
            raise AssertionError(f"TEST_SEED={SEED}: {sent[:500]!r}") from error
        if method == "DELETE":
            self.renew()
        return status, envelope and envelope["data"]

    def write(self, field, odd):
        """Write a job with an odd field; what is accepted is shown so, and taken back by PUT."""
        method, template = self.chance.choice(WRITES)
        status, job = self.send(method, self.path(template), body=self.body(method, field, odd))
        if status < 300:
            volatile = {"next_run": None, "last_execution": None}
            for shown in (self.service.get(path_of(job)), put(self.service, job, job)):
                assert shown | volatile == job | volatile, f"TEST_SEED={SEED}: {odd[:99]!r}"
        if status == 201:
            assert self.service.expect(200, "DELETE", path_of(job)) == {"id": job["id"]}

    def query(self, method, template, name):
        """Send every odd text as a parameter to a route that reads it: one that refuses NUL."""
        statuses = [self.send(method, self.path(template), f"{key}=%00")[0] for key in ("", name)]
        for text in ODD_TEXTS if statuses[0] < 400 == statuses[1] else ["", "odd:\n"]:
            self.send(method, self.path(template), f"{name}={quote(as_bytes(text))}")

    def request(self, method, template):
        """Send to a route what is odd elsewhere: in method, path, query, headers and body."""
        path, choose = self.path(template), self.chance.choice
        headers = self.chance.choices(ODD_HEADERS, k=self.chance.randint(0, 2))
        if self.maybe(0.4):
            path = re.sub("<.*?>", lambda _match: choose(self.odd_ids), template)
        elif self.maybe(0.2):
            path += choose(ODD_ENDS)
        elif method in ("PUT", "PATCH", "DELETE") and self.maybe(0.4):
            path, headers = f"/api/v1{path_of(choose(self.kept))}", ['If-Match: "999"']
        has_body = self.maybe(0.1 if method == "GET" else 1)
        body = self.body(method, choose(FIELDS), choose(ODD_JSON)) if has_body else b""
        verb = choose(ODD_METHODS) if self.maybe(0.2) else method
        query = f"{choose([*QUERIES, '%ff', ''])}{choose('=&%;')}{choose(ODD_TEXTS + ODD_IDS)}"
        self.send(verb, path, query.replace("\n", ""), headers, body)


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.long)])
def test_whatever_is_sent_is_answered_in_the_envelope_and_changes_nothing_else(
    service, target, caplog, capsys, rounds
):
    kept = [service.create(target.url, enabled=on, name=f"kept {on}") for on in (True, False)]
    run = service.post(trigger_path(kept[0]))
    patch(service, kept[1], {"description": "second"})
    rests = ["", "/versions", "/executions", f"/executions/{run['id']}"]
    heads = [f"GET /api/v1{path_of(job, rest)} HTTP/1.0\r\n\r\n" for job in kept for rest in rests]
    shown = lambda: [exchange(service, head.encode()).split(b"\r\n\r\n")[1] for head in heads]
    before, fuzzer = shown(), Fuzzer(service, kept)

    for _ in range(rounds):
        for field, odd in itertools.product(FIELDS, ODD_JSON):
            fuzzer.write(field, odd)
        for method, template, _name in JSON_ROUTES:
            fuzzer.renew()
            for name in QUERIES:
                fuzzer.query(method, template, name)
            for _ in range(30):
                fuzzer.request(method, template)

    assert shown() == before
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    assert "Traceback" not in capsys.readouterr().err
    assert service.get("/health")["status"] == "healthy"
