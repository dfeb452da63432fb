"""A worker: takes one call (or a few), runs the tool, answers, and is gone.

Everything it needs at call time was imported before, so that a tool which empties `sys.modules`
still gets its answer out. Its answer is a claim: the supervisor checks it and reaches the verdict.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from . import frames, proxy, stdio
from .confinement import scratch
from .discovery import Registration, Registry

_CHANNEL_FD = 200
"""High, so that tools which close "all" low descriptors keep their answer."""
_PERMITS_FD = _CHANNEL_FD + 1
_ERROR_CHARS = 64 * 1024
_DEEPEST = 1_000
"""Levels of a result that are looked at; fewer are allowed outside."""
_SMALLEST_LARGE_BYTES = 64 * 1024
"""Below it a result that is too large is sent all the same, and refused where it is counted."""
_CHUNK_BYTES = 64 * 1024
_REHEARSALS = 24
"""CPython 3.11 adapts a function's code once it has run eight times, a loop's after a few more."""
_PLAIN = frozenset((type(None), bool, int, float, str, list, tuple, dict))
"""Of results that are not awaitable."""

_GENERATORS = ("random", "numpy.random")
"""Modules with a generator of their own. Not imported here: what is mapped, every fork copies."""

_duplicate, _FROM_THEN_ON = fcntl.fcntl, fcntl.F_DUPFD_CLOEXEC
_run_coroutine: Any = None
_decode_json = json.JSONDecoder().raw_decode
_encode_json = json.JSONEncoder(allow_nan=False).encode
_home = ""
"""What was put into the environment for the last worker."""
_first_word = b""
_ours = Registry()
"""With a tool of our own, to rehearse with."""
_REQUEST = frames.encode("call", bytes(frames.CALL_ID_BYTES), 0, b'{"value": "x"}', None, False)
_permits_fd = -1
_reseed: list[Callable[[], object]] = []
"""All of them are the next worker's."""


def rehearse() -> None:
    """Take a few calls that nobody made, before there is a toolkit.

    So caches are filled and code is adapted once, and not in each worker, where every page that is
    written to is copied first.
    """

    def echo(value: str) -> str:
        return value

    _ours.registrations.append(Registration(echo, None, {}))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number in range(_REHEARSALS):
            theirs.sendall(_REQUEST)
            _send(ours.fileno(), frames.encode("ready", number))
            _answer_one(_ours, _Inbox(ours.fileno(), -1), _SMALLEST_LARGE_BYTES)
            theirs.recv(_CHUNK_BYTES)


def _rehearse_once() -> None:
    """In a worker that has no call yet: copy the pages now that its call would have to wait for."""
    inbox = _Inbox(-1, -1)
    inbox.take_in(_REQUEST)
    with contextlib.suppress(OSError):  # its answer goes nowhere
        _answer_one(_ours, inbox, _SMALLEST_LARGE_BYTES)


def prepare(registry: Registry) -> None:
    """Import, before any fork, what only some toolkits need."""
    global _run_coroutine
    if any(inspect.iscoroutinefunction(entry.function) for entry in registry.registrations):
        _import_asyncio()


def prepare_fork(
    plan: dict[str, Any], number: int, slot: int, ticket: str, permits_fd: int
) -> None:
    """Do in the zygote what its next worker, `number`, would have to do else.

    `permits_fd` is negative for a worker that takes one call.

    Each page that a worker writes to is copied first; of those that the zygote writes to, only the
    ones that a worker still has.
    """
    global _home, _first_word, _reseed, _permits_fd
    _permits_fd = permits_fd
    proxy.prepare(plan["network"], number, ticket)
    _first_word = frames.encode("ready", number)
    modules: Any = [sys.modules[name] for name in _GENERATORS if name in sys.modules]
    _reseed = [module.seed for module in modules]
    if not _home or not plan["scratch"]["has_views"]:  # with views, all workers have the same
        _home = scratch.Places.of(plan).inside(slot)
        os.environ["HOME"] = os.environ["TMPDIR"] = _home
    tempfile: Any = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile.tempdir = None


def serve(
    plan: dict[str, Any],
    registry: Registry,
    enter: Callable[[int], None],
    channel_fd: int,
    output_fd: int,
    number: int,
    slot: int,
    ticket: str,
) -> NoReturn:
    """Be worker `number`, which was prepared for, for as many calls as planned; never returns.

    `enter(slot)` confines this process to scratch `slot`; OSError ends it.
    """
    try:
        channel, permits = _settle(channel_fd, output_fd)
        proxy.identify()
        try:
            enter(slot)
        except OSError as error:
            sys.stderr.write(f"worker: cannot confine itself: {error}\n")
            os._exit(70)
        registry.on_stop = _refuse_stop
        _rehearse_once()
        _send(channel, _first_word)
        inbox, output_bytes = _Inbox(channel, permits), plan["output_bytes"]
        for _ in range(plan["calls_per_worker"]):
            if not _answer_one(registry, inbox, output_bytes):
                break
        status = 0
    except SystemExit as leaving:
        status = _exit_status(leaving)
    except KeyboardInterrupt:
        _die_by_sigint()
        status = 130
    except BaseException:  # the outer door; the supervisor sees an exit without an answer
        status = 70
    stdio.flush()
    os._exit(status)


def _refuse_stop(_client: int) -> None:
    raise RuntimeError("stop() cannot be called from inside a tool")


def _settle(channel_fd: int, output_fd: int) -> tuple[int, int]:
    """Make this process its own: streams, descriptors, random numbers; (channel, permits)."""
    stdio.attach(output_fd)
    channel = _duplicate(channel_fd, _FROM_THEN_ON, _CHANNEL_FD)
    os.close(channel_fd)
    permits = -1
    if _permits_fd >= 0:
        permits = _duplicate(_permits_fd, _FROM_THEN_ON, _PERMITS_FD)
        os.close(_permits_fd)
    # The hooks that fork(2) would have run in Python's modules were skipped.
    for reseed in _reseed:
        reseed()
    if _run_coroutine is not None:
        sys.modules["asyncio.events"]._set_running_loop(None)
    return channel, permits


def _send(channel: int, frame: bytes) -> None:
    sent = os.write(channel, frame)
    while sent < len(frame):
        sent += os.write(channel, memoryview(frame)[sent:])


class _Inbox:
    """The calls that this worker is handed, in order."""

    def __init__(self, channel: int, permits: int) -> None:
        self.channel = channel
        self._permits = permits
        self._permit = b""
        self._decoder = frames.TrustingDecoder()
        self._handed: list[frames.Message] = []
        """The next one last."""

    def take_in(self, data: bytes) -> None:
        self._handed = self._decoder.feed(data)[::-1]

    def next(self) -> frames.Message:
        """The next call that may begin; ends the process if there will be none."""
        while True:
            while not self._handed:
                self._handed = _receive(self.channel, self._decoder)[::-1]
            message = self._handed.pop()
            if self._permits < 0 or self._may_begin(message[1]):
                return message

    def _may_begin(self, call_id: bytes) -> bool:
        """Whether the supervisor has not taken this call back: only one side gets its permit."""
        if not self._permit:
            try:
                self._permit = os.read(self._permits, frames.CALL_ID_BYTES)
            except BlockingIOError:
                return False
        if self._permit != call_id:
            return False  # it is for one that comes later
        self._permit = b""
        return True


def _answer_one(registry: Registry, inbox: _Inbox, output_bytes: int) -> bool:
    """Take one call and answer it; whether another one may follow."""
    channel = inbox.channel
    _name, call_id, index, params_json, token_json, is_sample = inbox.next()
    entry = registry.registrations[index]
    pid = os.getpid()
    try:
        kind, body = _run(entry, params_json, token_json, is_sample, output_bytes)
    except _TooLarge as too_large:
        _end_if_not(pid)
        stdio.flush()
        _send(channel, frames.oversize_head(call_id, too_large.least_bytes))
        return False  # nothing that follows could be read
    _end_if_not(pid)
    stdio.flush()
    _send(channel, frames.encode("answer", call_id, kind, body))
    return True


def _end_if_not(pid: int) -> None:
    """A child that the tool forked has come out of it: the answer is its parent's to give."""
    if os.getpid() != pid:
        stdio.flush()
        os._exit(0)


def _receive(channel: int, decoder: frames.TrustingDecoder) -> list[frames.Message]:
    """Calls that have come, maybe none yet; ends the process if none will come any more."""
    data = os.read(channel, _CHUNK_BYTES)
    if not data:
        os._exit(0)
    return decoder.feed(data)


def _run(
    entry: Registration,
    params_json: bytes,
    token_json: bytes | None,
    is_sample: bool,
    output_bytes: int,
) -> tuple[str, bytes]:
    """Call the tool; ("result", JSON), ("error", sentence) or ("invalid", sentence).

    _TooLarge if the result's text would certainly be longer than `output_bytes`.
    """
    try:
        arguments, _ = _decode_json(params_json.decode("utf-8", "surrogatepass").lstrip())
        if token_json is not None:
            _add_token(arguments, json.loads(token_json), entry, is_sample)
        result = entry.function(**arguments)
        if type(result) not in _PLAIN and inspect.isawaitable(result):
            result = _await(result)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # any failure of foreign code is an answer
        return "error", _sentence(error)
    try:
        _check_size(result, max(output_bytes, _SMALLEST_LARGE_BYTES))
        return "result", _encode_json(result).encode("ascii")
    except _TooLarge:
        raise
    except BaseException as error:  # as above: a result's own methods run in here
        return "invalid", _sentence(error)


class _TooLarge(Exception):
    """A result whose text needs at least `least_bytes`."""

    def __init__(self, least_bytes: int) -> None:
        super().__init__()
        self.least_bytes = min(least_bytes, 2**31)


def _check_size(result: Any, most_bytes: int) -> None:
    """_TooLarge before a huge result is encoded, which would need its memory several times over."""
    if type(result) not in (str, list, tuple, dict):
        return
    seen = 0
    visited = set()  # a container that holds itself is refused where it is encoded
    level: list[Any] = [result]
    for _ in range(_DEEPEST):
        deeper: list[Any] = []
        for value in level:
            kind = type(value)
            if kind is str:
                seen += len(value)
            elif kind is dict or kind is list or kind is tuple:
                if id(value) in visited:
                    continue
                visited.add(id(value))
                seen += 2 * len(value)
                deeper.extend(value)
                if kind is dict:
                    deeper.extend(value.values())
            if seen > most_bytes:
                raise _TooLarge(seen)
        if not deeper:
            return
        level = deeper
    raise RecursionError(f"the result is nested more than {_DEEPEST} levels deep")


def _add_token(arguments: dict[str, Any], token: Any, entry: Registration, is_sample: bool) -> None:
    """The token under each name the signature has for it; a sample call always passes it."""
    if is_sample or "auth_token" in entry.passes or "**" in entry.passes:
        arguments["auth_token"] = token
    if entry.auth_with is not None and entry.auth_with in entry.passes:
        arguments[entry.auth_with] = token


def _await(awaitable: Any) -> Any:
    if _run_coroutine is None:
        _import_asyncio()

    async def wait() -> Any:
        return await awaitable

    return _run_coroutine(wait())


def _import_asyncio() -> None:
    global _run_coroutine
    import asyncio

    _run_coroutine = asyncio.run


def _sentence(error: BaseException) -> bytes:
    """`str(error)`, or the type's name where that is empty or fails."""
    try:
        text = str(error)
    except BaseException:  # foreign __str__
        text = ""
    text = text or type(error).__name__
    return text[:_ERROR_CHARS].encode("utf-8", "backslashreplace")


def _exit_status(leaving: SystemExit) -> int:
    """What the interpreter would have made of it: sys.exit in the library reference."""
    code = leaving.code
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1


def _die_by_sigint() -> None:
    stdio.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
