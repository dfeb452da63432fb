"""One link and everything that goes over it: its session, its tools, their registration.

A shell: requests are decoded and judged by `atp.messages`, `atp.session` and `admission`; this says
what they decided to the node, and what the node concluded to the backend.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from atp_sandbox import log
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
from atp_sandbox.atp.registration import Registrar, RegistrationEntry
from atp_sandbox.atp.session import Resend, Running, Session, Start
from atp_sandbox.loop import Loop, Timer
from atp_sandbox.outcome import Failure, Outcome, outcome_json
from atp_sandbox.toolkit import NodeCall

MAX_UNSENT_BYTES = 4 * 1024 * 1024
"""Answers handed to the connection and not yet taken by the kernel; others wait in the outbox."""
_RETRY_FLUSH_S = 0.02
LINK_TIMINGS = LinkTimings()
"""Of every link of this process; other than the defaults only in tests."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """Whose call it is, so that the outcome finds its way back."""

    unit: LinkUnit
    key: int
    request_id_json: str


class LinkOwner(Protocol):
    """What the supervisor is asked and told."""

    def submit(self, call: NodeCall) -> None: ...
    def link_connected(self, unit: LinkUnit) -> None: ...
    def link_refused(self, unit: LinkUnit, reason: str) -> None: ...
    def link_closed(self, unit: LinkUnit) -> None: ...


class LinkUnit:
    """Owns one link."""

    def __init__(
        self, loop: Loop, address: LinkAddress, owner: LinkOwner, tools: dict[str, ServedTool]
    ) -> None:
        self._loop = loop
        self.address = address
        self._owner = owner
        self.tools = tools
        """By name; what is missing here is an unknown tool."""
        self._session = Session(secrets.token_bytes(16))
        self._link = Link(
            loop,
            address,
            on_message=self._on_message,
            on_state=self._on_state,
            timings=LINK_TIMINGS,
        )
        self._registrar: Registrar | None = None
        self._flush_timer: Timer | None = None
        self._refusal: Failure | None = None
        self.was_connected = False

    @property
    def is_settled(self) -> bool:
        """Nothing is in flight and every answer has left."""
        session = self._session
        return not session.in_flight and not session.pending and not self._link.unsent_bytes

    @property
    def is_connected(self) -> bool:
        return self._link.connected

    def register(self, entries: Sequence[RegistrationEntry], *, then_connect: bool) -> None:
        """Tell the backend of the tools; the link opens, if wanted, after each first attempt."""
        address = self.address
        self._registrar = Registrar(
            self._loop,
            address.base_url,
            address.api_key,
            address.generation,
            entries,
            on_first_round=self._link.start if then_connect else self.close,
            on_event=lambda _event: None,
        )
        self._registrar.start()

    def refuse(self, failure: Failure) -> None:
        """Answer every new request with `failure`."""
        self._refusal = failure

    def close(self) -> None:
        """End registration and link; `link_closed` follows."""
        if self._registrar is not None:
            self._registrar.stop()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        self._link.close()

    def answer(self, context: CallContext, outcome: Outcome) -> None:
        """The one answer to a call of this link."""
        text = encode_response(context.request_id_json, outcome_json(outcome))
        self._session.answered(context.key, text, self._loop.now())
        self._flush()

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
                    request_id=request_id_json,
                    tool=tool,
                    kind=failure.kind.value,
                )
                self._session.enqueue(encode_response(request_id_json, outcome_json(failure)))
                self._flush()
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
                self._flush()
                return
            case _:
                assert_never(decision)
        refusal = self._refusal or admit(request, self.tools)
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

    def _flush(self) -> None:
        if not self._link.connected:
            return
        room = MAX_UNSENT_BYTES - self._link.unsent_bytes
        if room > 0:
            for text in self._session.take(room):
                self._link.send(text)
        if self._session.pending and self._flush_timer is None:
            self._flush_timer = self._loop.call_later(_RETRY_FLUSH_S, self._flush_again)

    def _flush_again(self) -> None:
        self._flush_timer = None
        self._flush()

    def _on_state(self, event: LinkEvent) -> None:
        match event:
            case Connecting():
                pass
            case Connected():
                self.was_connected = True
                self._owner.link_connected(self)
                self._flush()
            case Disconnected(_, retry_in_s, unsent):
                self._session.restore(unsent)
                if retry_in_s is None:
                    self._owner.link_closed(self)
            case Refused(status, reason, first, _):
                if first:
                    self._owner.link_refused(self, f"HTTP {status} {reason}".strip())
            case _:
                assert_never(event)


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
