"""Tells the backend which tools there are: one HTTP POST for each, again where it may help.

Supervisor side, a thin shell: `registration_body` is pure, the posts run in one thread. A tool
whose registration failed is served all the same, as with the published SDK. The API key stands
in every body; events and log lines never hold it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from atp_sandbox import log
from atp_sandbox.atp.address import parse_retry_after, redact
from atp_sandbox.limits import MIB
from atp_sandbox.loop import Loop, Timer

MAX_ANSWER_BYTES = 1 * MIB
"""Read of the backend's answer, which is one short object."""
_RETRYABLE_STATUSES = frozenset({408, 429})
_MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class RegistrationEntry:
    """One tool as the backend is told of it."""

    app_name: str
    function_id: str
    params: Sequence[str]
    required_params: Sequence[str]
    description: str
    auth_provider: str | None
    auth_type: str | None
    auth_with: str | None
    sample_response: Any
    """Any JSON value."""
    source_code: str
    code_hash: str
    """Hex SHA-256 of the source."""


@dataclass(frozen=True, slots=True)
class RegistrationTimings:
    """All durations of a registrar, in seconds; other than the defaults only in tests."""

    connect_s: float = 5.0
    read_s: float = 10.0
    first_round_s: float = 10.0
    """After which serving begins, however many attempts are still to be made."""
    backoff_first_s: float = 5.0
    backoff_cap_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Registered:
    tool: str


@dataclass(frozen=True, slots=True)
class RegistrationFailed:
    """One attempt failed. `retry_in_s` is None where asking again would not help."""

    tool: str
    status: int | None
    """The final HTTP status; None where there was none."""
    reason: str
    retry_in_s: float | None


RegistrationEvent = Registered | RegistrationFailed


@dataclass(frozen=True, slots=True)
class _Answer:
    """How one post ended: `reason` is empty for success."""

    status: int | None
    reason: str
    is_retryable: bool = False
    retry_after_s: float | None = None


def toolkit_hash(entries: Iterable[RegistrationEntry]) -> str:
    """Hex SHA-256 of all sources, ordered by tool name; of two tools of one name the later."""
    sources = {entry.function_id: entry.source_code for entry in entries}
    joined = "".join(sources[name] for name in sorted(sources))
    return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()


def registration_body(
    entry: RegistrationEntry, api_key: str, generation: str, toolkit_hash: str | None
) -> dict[str, Any]:
    """The body for one tool, in the order in which the SDK of `generation` writes it."""
    body: dict[str, Any] = {
        "function_id": entry.function_id,
        "api_key": api_key,
        "app_name": entry.app_name,
        "programming_language": "Python",
        "code_hash": entry.code_hash,
    }
    if generation == "0.2":
        body["toolkit_hash"] = toolkit_hash
    body["metadata"] = {
        "params": list(entry.params),
        "required_params": list(entry.required_params),
        "description": entry.description,
        "auth_provider": entry.auth_provider,
        "auth_type": entry.auth_type,
        "auth_with": entry.auth_with,
        "sample_response": entry.sample_response,
        "source_code": entry.source_code,
    }
    return body


@dataclass(frozen=True, order=True, slots=True)
class _Due:
    """One tool's next attempt."""

    at: float
    index: int
    failures: int = field(compare=False)


class Registrar:
    """Registers the entries in order, then again those that failed in a way that may pass.

    To be used in the loop's thread; both callbacks come in the loop, none after `stop`.
    """

    def __init__(
        self,
        loop: Loop,
        base_url: str,
        api_key: str,
        generation: str,
        entries: Sequence[RegistrationEntry],
        *,
        all_entries: Sequence[RegistrationEntry] | None = None,
        after: Registrar | None = None,
        on_first_round: Callable[[], None],
        on_event: Callable[[RegistrationEvent], None],
        timings: RegistrationTimings | None = None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`all_entries`: where others of the same toolkits are known already, these with them.

        `after` is stopped; what it is just posting goes first.
        """
        self._loop = loop
        self._after = after
        self._thread = threading.Thread(target=self._run, name="atp-registration", daemon=True)
        self._url = f"{base_url.rstrip('/')}/api/v1/register_tool"
        self._api_key, self._generation = api_key, generation
        self._entries = tuple(entries)
        self._toolkit_hash = toolkit_hash(entries if all_entries is None else all_entries)
        self._on_first_round, self._on_event = on_first_round, on_event
        self._timings = timings or RegistrationTimings()
        self._jitter = jitter
        self._stopped = threading.Event()
        self._first_round_timer: Timer | None = None
        self._is_first_round_over = False

    def start(self) -> None:
        """Begin; returns at once. `on_first_round` follows exactly once."""
        self._first_round_timer = self._loop.call_later(
            self._timings.first_round_s, self._end_first_round
        )
        self._start_thread()

    def _start_thread(self) -> None:
        if self._stopped.is_set():
            return
        try:
            self._thread.start()
        except RuntimeError as error:  # the machine has no processes left for us
            message = "the backend is not told of tools yet; that is tried again"
            delay_s = self._timings.backoff_first_s
            log.emit(
                log.WARNING, "registration_delayed", message, cause=str(error), retry_in_s=delay_s
            )
            self._loop.call_later(delay_s, self._start_thread)

    def stop(self) -> None:
        """No further attempts and no further callbacks. Safe to repeat; waits for nothing."""
        self._stopped.set()
        if self._first_round_timer is not None:
            self._first_round_timer.cancel()

    def join(self) -> None:
        """Wait for the last post of one that was stopped; not to be called in the loop."""
        self._stopped.wait()
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    # --- in the loop

    def _end_first_round(self) -> None:
        if not self._is_first_round_over and not self._stopped.is_set():
            self._is_first_round_over = True
            if self._first_round_timer is not None:
                self._first_round_timer.cancel()
            self._on_first_round()

    def _tell(self, event: RegistrationEvent) -> None:
        if self._stopped.is_set():
            return
        if isinstance(event, Registered):
            log.emit(log.INFO, "tool_registered", "the backend knows the tool", tool=event.tool)
        else:
            log.emit(
                log.WARNING,
                "registration_failed",
                "the backend was not told of the tool; it is served all the same",
                tool=event.tool,
                status=event.status,
                reason=event.reason,
                retry_in_s=event.retry_in_s,
            )
        self._on_event(event)

    # --- in the thread

    def _run(self) -> None:
        after, self._after = self._after, None
        if after is not None:
            after.join()
        due: list[_Due] = []
        for index in range(len(self._entries)):
            if self._stopped.is_set():
                return
            self._attempt(index, 0, due)
        self._loop.call_from_thread(self._end_first_round)
        while due and not self._stopped.wait(max(0.0, due[0].at - self._loop.now())):
            attempt = heapq.heappop(due)
            self._attempt(attempt.index, attempt.failures, due)

    def _attempt(self, index: int, failures: int, due: list[_Due]) -> None:
        entry = self._entries[index]
        answer = self._post(entry)
        event: RegistrationEvent
        if not answer.reason:
            event = Registered(entry.function_id)
        else:
            retry_in_s: float | None = None
            if answer.is_retryable:
                doubled_s = self._timings.backoff_first_s * 2.0 ** min(failures, 32)
                longest_s = min(self._timings.backoff_cap_s, doubled_s)
                delay_s = self._jitter(longest_s / 2, longest_s)
                retry_in_s = max(delay_s, answer.retry_after_s or 0.0)
                heapq.heappush(due, _Due(self._loop.now() + retry_in_s, index, failures + 1))
            reason = redact(answer.reason, self._api_key)[:_MAX_REASON_CHARS]
            event = RegistrationFailed(entry.function_id, answer.status, reason, retry_in_s)
        self._loop.call_from_thread(lambda: self._tell(event))

    def _post(self, entry: RegistrationEntry) -> _Answer:
        body = registration_body(entry, self._api_key, self._generation, self._toolkit_hash)
        timeouts = (self._timings.connect_s, self._timings.read_s)
        try:
            with requests.post(
                self._url,
                json=body,
                headers={"Content-Type": "application/json"},  # first, as the SDK has it
                timeout=timeouts,
                auth=_no_auth,
                stream=True,
            ) as response:
                return self._judge(response)
        except (requests.ConnectionError, requests.Timeout) as error:
            return _Answer(None, _describe(error), is_retryable=True)
        except requests.exceptions.ChunkedEncodingError:
            return _Answer(None, "the answer broke off", is_retryable=True)
        except Exception as error:  # the thread's outer door: one bad entry must not stop the rest
            return _Answer(None, _describe(error))

    def _judge(self, response: requests.Response) -> _Answer:
        status = response.status_code
        if status == 200:
            content = _bounded_content(response)
            try:
                is_object = type(json.loads(content)) is dict
            except (ValueError, RecursionError):
                is_object = False
            return _Answer(200, "" if is_object else "the answer is not a JSON object")
        return _Answer(
            status,
            f"HTTP {status} {response.reason or ''}".rstrip(),
            is_retryable=status in _RETRYABLE_STATUSES or status >= 500,
            retry_after_s=parse_retry_after(response.headers.get("Retry-After")),
        )


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from adding an Authorization header out of a .netrc file."""
    return request


def _bounded_content(response: requests.Response) -> bytes:
    """The body; nothing of one that is longer than we are ready to read."""
    content = b""
    for piece in response.iter_content(16 * 1024):
        content += piece
        if len(content) > MAX_ANSWER_BYTES:
            return b""
    return content


def _describe(error: Exception) -> str:
    """What failed at the bottom: requests wraps it in layers that repeat the URL."""
    if isinstance(error, requests.ConnectTimeout):
        return "connecting took too long"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    seen = 0
    cause: BaseException = error
    while seen < 10 and (inner := _inner(cause)) is not None:
        cause, seen = inner, seen + 1
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return f"{type(cause).__name__}: {cause}"


def _inner(error: BaseException) -> BaseException | None:
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return reason
    if error.args and isinstance(error.args[0], BaseException):
        return error.args[0]
    return error.__cause__ or error.__context__
