"""One link and everything that goes over it: its session, its tools, their registration.

A shell: requests are decoded and judged by `atp.messages`, `atp.session` and `admission`; this says
what they decided to the node, and what the node concluded to the backend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from atp_sandbox import crash_points, log
from atp_sandbox.admission import ServedTool, admit
from atp_sandbox.atp.address import LinkAddress
from atp_sandbox.atp.connection import LinkTimings
from atp_sandbox.atp.link import (
    Connected,
    Connecting,
    Disconnected,
    Link,
    LinkEvent,
    Refused,
)
from atp_sandbox.atp.messages import (
    Hello,
    Ignored,
    Rejected,
    ToolRequest,
    decode,
    encode_response,
)
from atp_sandbox.atp.outbox import MAX_OUTBOX_BYTES
from atp_sandbox.atp.record import Record, Stage
from atp_sandbox.atp.registration import (
    Registered,
    Registrar,
    RegistrationEntry,
    RegistrationEvent,
)
from atp_sandbox.atp.session import Forgotten, Resend, Running, Session, Start
from atp_sandbox.journal import UNAVAILABLE, Journal
from atp_sandbox.limits import MIB, format_size
from atp_sandbox.loop import Loop, Timer
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Kind, Limit, Outcome, Success, outcome_json

LINK_TIMINGS = LinkTimings()
MAX_UNSENT_BYTES = 4 * MIB
"""Answers handed to the connection and not yet taken by the kernel; others wait in the outbox."""
MAX_WAITING_BYTES = 8 * MIB
"""While more answers wait than this, the backend takes none: no request is taken, no call begun."""
CONFIRM_AFTER_S = 0.01
"""From an answer to the ping that asks whether it was read, while others are to follow it."""
_RETRY_FLUSH_S = 0.02
MAX_LOGGED_ID_CHARS = 200
"""Of the id of a request that is refused for what it is."""
_UPKEEP_S = 5.0
"""Between two looks at what only time changes."""

NOT_STARTED = Failure(
    Kind.INTERRUPTED,
    "The server ended before this call was started; it did not run.",
    never_ran=True,
)
MAY_HAVE_RUN = Failure(
    Kind.INTERRUPTED,
    "The server ended while this call was at work; it may have run, in part or to its end.",
)
ANSWER_GONE = Failure(
    Kind.INTERRUPTED,
    "This request was answered before; its answer is kept no longer, and it is not run again.",
)


@dataclass(frozen=True, slots=True)
class CallContext:
    """Whose call it is, so that the outcome finds its way back."""

    unit: LinkUnit
    key: int
    request_id_json: str


class LinkOwner(Protocol):
    """What the supervisor is asked and told."""

    def submit(self, call: NodeCall) -> None: ...
    def link_announced(self, unit: LinkUnit) -> None: ...
    def link_connected(self, unit: LinkUnit) -> None: ...
    def link_refused(self, unit: LinkUnit, reason: str) -> None: ...
    def link_closed(self, unit: LinkUnit) -> None: ...


class LinkUnit:
    """Owns one link."""

    def __init__(
        self,
        loop: Loop,
        address: LinkAddress,
        owner: LinkOwner,
        tools: dict[str, ServedTool],
        secret: bytes,
        journal: Journal,
    ) -> None:
        """`secret`: see `Session`. JournalError if the journal is required and cannot be had."""
        self._loop = loop
        self.address = address
        self._owner = owner
        self.tools = tools
        """By name; what is missing here is an unknown tool."""
        self._session = Session(secret)
        self._journal = journal
        self._restore(journal.open())
        self._turn_is_due = False
        self._starting: list[tuple[Callable[[], None], Callable[[Failure], None]]] = []
        """How to hand calls to their workers, or not to, until the journal has them."""
        self._given_up = 0
        self._upkeep_timer = loop.call_later(_UPKEEP_S, self._upkeep)
        self._link = Link(
            loop,
            address,
            on_message=self._on_message,
            on_state=self._on_state,
            on_read=self._on_read,
            timings=LINK_TIMINGS,
        )
        self._registrar: Registrar | None = None
        self._entries: dict[str, RegistrationEntry] = {}
        """What the backend knows, or is to know, by name."""
        self._untold: dict[str, RegistrationEntry] = {}
        """What of it is still to be told."""
        self._flush_timer: Timer | None = None
        self._ping_timer: Timer | None = None
        self._refusal: Failure | None = None
        self.was_connected = False
        self.is_announced = False
        """Whether the backend was told once of every tool, or could not be in time."""

    @property
    def is_refusing(self) -> bool:
        """Whether no call is taken any more."""
        return self._refusal is not None

    @property
    def is_idle(self) -> bool:
        """Whether every call was answered, wherever its answer is."""
        return not self._session.in_flight

    @property
    def is_settled(self) -> bool:
        """Nothing is in flight, and the backend has read past every answer."""
        outbox = self._session.outbox
        return self.is_idle and not outbox.waiting and not outbox.unconfirmed

    @property
    def is_connected(self) -> bool:
        return self._link.connected

    def register(self, entries: Sequence[RegistrationEntry], *, then_connect: bool) -> None:
        """Tell the backend of the tools; the link opens, if wanted, after each first attempt."""
        self._entries = {entry.function_id: entry for entry in entries}
        self._untold = dict(self._entries)

        def announced() -> None:
            self.is_announced = True
            (self._link.start if then_connect else self.close)()
            self._owner.link_announced(self)

        self._start_registrar(entries, announced)

    def take_over(
        self,
        tools: Mapping[str, ServedTool],
        entries: Sequence[RegistrationEntry],
        *,
        toolkit: str,
        removed: Collection[str],
    ) -> None:
        """From now on these tools of `toolkit`; the backend is told of `entries`, not of the rest.

        It cannot be told that a tool was `removed`: requests for it are answered `unknown_tool`.
        """
        others = {name: one for name, one in self.tools.items() if one.toolkit != toolkit}
        self.tools.clear()
        self.tools.update(others | dict(tools))
        for name in removed:
            self._entries.pop(name, None)
            self._untold.pop(name, None)
        new = {entry.function_id: entry for entry in entries}
        self._entries |= new
        if new:
            self._untold |= new
            self._start_registrar(list(self._untold.values()), lambda: None)

    def _start_registrar(
        self, entries: Sequence[RegistrationEntry], on_first_round: Callable[[], None]
    ) -> None:
        address, before = self.address, self._registrar
        if before is not None:
            before.stop()
        self._registrar = Registrar(
            self._loop,
            address.base_url,
            address.api_key,
            address.generation,
            entries,
            all_entries=list(self._entries.values()),
            after=before,
            on_first_round=on_first_round,
            on_event=self._on_registration,
        )
        self._registrar.start()

    def _on_registration(self, event: RegistrationEvent) -> None:
        if isinstance(event, Registered) or event.retry_in_s is None:
            self._untold.pop(event.tool, None)

    def refuse(self, failure: Failure) -> None:
        """Answer every new request with `failure`."""
        self._refusal = failure

    def close(self) -> None:
        """End registration and link; `link_closed` follows."""
        if self._registrar is not None:
            self._registrar.stop()
        for timer in (self._flush_timer, self._ping_timer):
            if timer is not None:
                timer.cancel()
        self._upkeep_timer.cancel()
        self._journal.commit(self._session, self._loop.now())
        self._link.close()

    def release(self) -> None:
        """Close the journal: nothing is written any more. Safe to call again."""
        # Without waiting for the next attempt after one that failed: there will be none.
        self._journal.commit(self._session, math.inf, everything=True)
        self._journal.close()

    def starting(
        self, context: CallContext, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        """Call `go` once a successor would know that the call was started, or `refuse`."""
        self._session.started(context.key)
        self._starting.append((go, refuse))
        self._end_turn_soon()

    def answer(self, context: CallContext, outcome: Outcome) -> None:
        """The one answer to a call of this link."""
        crash_points.reach(crash_points.AFTER_RESULT)
        text = encode_response(context.request_id_json, outcome_json(outcome))
        # A failure is short, and in its place nobody could say whether the tool ran.
        if isinstance(outcome, Success) and not self._session.outbox.has_room_for(len(text)):
            text = encode_response(context.request_id_json, outcome_json(_no_room(len(text))))
        self._session.answered(context.key, text, self._loop.now())
        self._end_turn_soon()

    # -- from the backend --------------------------------------------------------------------------

    def _on_message(self, data: bytes) -> None:
        message = decode(data)
        match message:
            case ToolRequest():
                self._on_request(message)
            case Rejected(request_id_json, tool, failure):
                log.emit(
                    log.INFO,
                    "request_rejected",
                    failure.error,
                    request_id=request_id_json[:MAX_LOGGED_ID_CHARS],
                    tool=tool,
                    kind=failure.kind.value,
                )
                text = encode_response(request_id_json, outcome_json(failure))
                self._session.reject(text, self._loop.now())
                self._end_turn_soon()
            case Hello(text):
                log.emit(log.DEBUG, "hello", text)
            case Ignored(reason):
                log.emit(log.WARNING, "message_ignored", f"a message was ignored: {reason}")
            case _:
                assert_never(message)

    def _on_request(self, request: ToolRequest) -> None:
        now = self._loop.now()
        decision = self._session.receive(request, now)
        match decision:
            case Start(key):
                context = CallContext(self, key, request.request_id_json)
                crash_points.reach(crash_points.AFTER_ACCEPT)
                self._end_turn_soon()
            case Running():
                log.emit(
                    log.INFO,
                    "request_repeated",
                    "asked again while it runs",
                    request_id=request.request_id_json,
                    tool=request.tool,
                )
                return
            case Resend():
                log.emit(
                    log.INFO,
                    "request_repeated",
                    "asked again: its answer is sent again",
                    request_id=request.request_id_json,
                    tool=request.tool,
                )
                self._end_turn_soon()
                return
            case Forgotten():
                log.emit(
                    log.WARNING,
                    "request_repeated",
                    "asked again: its answer is kept no longer",
                    request_id=request.request_id_json,
                    tool=request.tool,
                )
                text = encode_response(request.request_id_json, outcome_json(ANSWER_GONE))
                self._session.reject(text, now)
                self._end_turn_soon()
                return
            case _:
                assert_never(decision)
        refusal = self._refusal or self._journal.refusal or admit(request, self.tools)
        if refusal is not None:
            log.emit(
                log.INFO,
                "request_rejected",
                refusal.error,
                request_id=request.request_id_json,
                tool=request.tool,
                kind=refusal.kind.value,
            )
            self.answer(context, refusal)
            return
        served = self.tools[request.tool]
        token = request.auth_token_json
        self._owner.submit(
            NodeCall(
                toolkit=served.toolkit,
                tool=served.tool,
                params=request.params_json.encode("ascii"),
                token=None if token is None else token.encode("ascii"),
                received_at=now,
                context=context,
            )
        )

    # -- to the backend ----------------------------------------------------------------------------

    def _end_turn_soon(self) -> None:
        """What this turn of the loop brings is written down together, and then done."""
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._turn_is_due = False
        has_news = self._session.has_changes
        may_start = self._journal.commit(self._session, self._loop.now())
        if has_news:
            crash_points.reach(crash_points.AFTER_JOURNAL)
        if not self._is_backed_up:
            self._start_calls(may_start)
        self._flush()

    @property
    def _is_backed_up(self) -> bool:
        return self._session.outbox.waiting_bytes > MAX_WAITING_BYTES

    def _start_calls(self, may_start: bool) -> None:
        starting, self._starting = self._starting, []
        for go, refuse in starting:
            if may_start:
                go()
            else:
                refuse(UNAVAILABLE)
        if starting:
            crash_points.reach(crash_points.AFTER_START)

    def _flush(self) -> None:
        """Only after a commit: what has come meanwhile waits here too."""
        outbox = self._session.outbox
        if not self._link.connected:
            return
        room = MAX_UNSENT_BYTES - self._link.unsent_bytes
        if outbox.waiting and room > 0:
            crash_points.reach(crash_points.BEFORE_SEND)
            for text in outbox.take(room, self._loop.now()):
                self._link.send(text)
            if crash_points.is_armed():
                self._loop.call_last(self._sent)  # after the connection, which writes then
        if outbox.unconfirmed and self.is_idle:
            self._link.ping()
        elif outbox.unconfirmed and self._ping_timer is None:
            self._ping_timer = self._loop.call_later(CONFIRM_AFTER_S, self._ping)
        self._link.pause_reading(self._is_backed_up)
        if self._starting and not self._is_backed_up:
            self._end_turn_soon()
        if outbox.waiting and self._flush_timer is None:
            self._flush_timer = self._loop.call_later(_RETRY_FLUSH_S, self._flush_again)

    def _ping(self) -> None:
        self._ping_timer = None
        if self._session.outbox.unconfirmed:
            self._link.ping()

    def _sent(self) -> None:
        crash_points.reach(crash_points.AFTER_SEND)

    def _flush_again(self) -> None:
        self._flush_timer = None
        self._end_turn()

    def _on_read(self, count: int) -> None:
        """The backend has read past this many texts of this connection."""
        self._session.confirm(count)
        self._end_turn_soon()

    def _upkeep(self) -> None:
        self._upkeep_timer = self._loop.call_later(_UPKEEP_S, self._upkeep)
        now = self._loop.now()
        self._journal.tidy(now)
        # After it: of a file that is gone, everything.
        self._journal.commit(self._session, now, everything=True)
        given_up = self._session.outbox.given_up
        if given_up > self._given_up:
            log.emit(
                log.WARNING,
                "answers_given_up",
                "answers are not kept any longer for a backend that does not confirm them",
                url=self.address.redacted,
                answers=given_up - self._given_up,
            )
            self._given_up = given_up

    def _restore(self, records: Sequence[Record]) -> None:
        """Answer what a predecessor left without; what it has answered is sent again."""
        now = self._loop.now()
        interrupted = due = 0
        for record in records:
            text = record.text
            if record.stage in (Stage.ACCEPTED, Stage.STARTED):
                failure = NOT_STARTED if record.stage is Stage.ACCEPTED else MAY_HAVE_RUN
                text = encode_response(record.request_id_json, outcome_json(failure))
                interrupted += 1
                log.emit(
                    log.WARNING,
                    "call_interrupted",
                    failure.error,
                    request_id=record.request_id_json,
                    tool=record.tool,
                )
            due += record.stage is Stage.ANSWERED
            self._session.restore(record, text, now)
        if interrupted or due:
            log.emit(
                log.WARNING,
                "journal_recovered",
                "the process before this one ended without having answered everything",
                url=self.address.redacted,
                interrupted=interrupted,
                unconfirmed=due,
            )

    def _on_state(self, event: LinkEvent) -> None:
        match event:
            case Connecting():
                pass
            case Connected():
                self.was_connected = True
                self._owner.link_connected(self)
                self._end_turn()
            case Disconnected(_, retry_in_s):
                self._session.outbox.connection_ended()
                if retry_in_s is None:
                    self._owner.link_closed(self)
            case Refused(status, reason, first, _):
                if first:
                    self._owner.link_refused(self, f"HTTP {status} {reason}".strip())
            case _:
                assert_never(event)


def _no_room(size_bytes: int) -> Failure:
    return Failure(
        Kind.OUTPUT_LIMIT,
        f"The tool ran, but its result of {format_size(size_bytes)} could not be kept: the backend "
        f"takes no answers, and {format_size(MAX_OUTBOX_BYTES)} of them wait already.",
        Limit("waiting answers", MAX_OUTBOX_BYTES, "bytes"),
    )


def registration_entry(
    served: ServedTool, *, send_source: bool, sample: Outcome | None
) -> RegistrationEntry:
    """How the backend is told of one tool; `sample` is the outcome of its sample call, if made."""
    tool = served.tool
    sample_response: object = ""
    if sample is not None:
        sample_response = {"error": "Sample response unavailable"}
        if not isinstance(sample, Failure):
            sample_response = json.loads(sample.result_json)
    return RegistrationEntry(
        app_name=served.app_name,
        function_id=tool.name,
        params=tool.params,
        required_params=tool.required,
        description=tool.description,
        auth_provider=tool.auth_provider,
        auth_type=tool.auth_type,
        auth_with=tool.auth_with,
        sample_response=sample_response,
        source_code=tool.source if send_source else "",
        code_hash=tool.code_hash,
    )
