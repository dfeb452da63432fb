"""What a backend asked and what it got, and whether each request was run and answered at most once.

PURE: moments are arguments, in seconds of one clock. Fed by `benchmarks.load` while it talks to the
system under test; `History.faults` says at the end what broke the promise:

* Each request has one distinct answer in the end. Identical copies are fine after a reconnect.
* No request is executed twice; none is executed whose answer says that it was not.
* An answer comes within the time limit, not counting what was disturbed on purpose.

A request that was written into a connection may or may not have arrived. It surely has if a later
ping of that connection was answered, if it was executed, or if it was answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

OK = "ok"
INTERRUPTED = "interrupted"
"""It may have been executed."""
NOT_STARTED = "interrupted, not started"
GONE = "interrupted, answered before"
"""To whoever asks again for what he got already: its text is kept only until he has read it."""
INTERNAL_ERROR = "internal_error"
REFUSED = frozenset({"unknown_tool", "invalid_params", "auth_required", "overloaded", NOT_STARTED})
"""Kinds that say: the tool was not run."""


class FaultKind(StrEnum):
    LOST = "never answered"
    DIFFERENT = "different answers"
    UNASKED = "answer to what nobody asked"
    COPIES = "too many copies on one connection"
    TWICE = "executed more than once"
    NOT_RUN = "answered as if executed"
    REFUSED_BUT_RUN = "executed although refused"
    STRANGER = "execution of what nobody asked"
    LATE = "answered late"
    INTERRUPTED = "interrupted though nothing ended"
    GONE = "said to have been answered, but it was not"
    INTERNAL = "internal error"


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    request_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.request_id}: {self.detail}"


@dataclass(slots=True)
class Content:
    """One call: a request id with one content, however often it was sent."""

    key: str
    request_id: str
    counts: bool
    """Whether its tool reports to the execution counter before it does anything."""
    first_sent_at: float
    is_sure: bool = False
    executions: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Answer:
    at: float
    connection: int
    digest: str
    kind: str
    content: str | None


@dataclass(frozen=True, slots=True)
class _Send:
    at: float
    connection: int
    content: str


@dataclass(slots=True)
class _Request:
    """All that goes by one id: usually one content."""

    contents: dict[str, Content] = field(default_factory=dict)
    answers: list[_Answer] = field(default_factory=list)
    gone: list[_Answer] = field(default_factory=list)
    """Those of kind GONE, which are no answers of their own."""
    sends: list[_Send] = field(default_factory=list)

    def named(self, key: str) -> list[_Answer]:
        """Answers that are surely to this content."""
        if len(self.contents) == 1:
            return self.answers
        return [answer for answer in self.answers if answer.content == key]

    def unnamed(self) -> list[_Answer]:
        return [a for a in self.answers if a.content is None and len(self.contents) > 1]

    def unanswered(self) -> list[Content]:
        open_ones = [c for c in self.contents.values() if not self.named(c.key)]
        # Which of them an answer without a name is to cannot be told: it answers some one of them.
        return open_ones[len(self.unnamed()) :]


class History:
    """Told in the order of events; may be asked at any time."""

    def __init__(self, *, time_limit_s: float, slack_s: float) -> None:
        """`slack_s`: for a busy machine, over the time limit of a call."""
        self._allowed_s = time_limit_s + slack_s
        self._requests: dict[str, _Request] = {}
        self._contents: dict[str, Content] = {}
        self._unconfirmed: dict[int, dict[int, Content]] = {}
        self._open: dict[str, None] = {}
        self._strangers: Counter[str] = Counter()
        self._unasked: list[_Answer] = []
        self._unasked_ids: list[str] = []
        self._deaths: list[float] = []
        self._restarts: list[float] = []
        self._disturbances: list[tuple[float, float]] = []

    # -- what happens ------------------------------------------------------------------------------

    def sent(
        self,
        at: float,
        connection: int,
        number: int,
        request_id: str,
        content: str,
        *,
        counts: bool = True,
    ) -> None:
        """A request was written into a connection as its message `number`, for the first time or
        again. `content` names id and content together, over the whole history."""
        request = self._requests.setdefault(request_id, _Request())
        known = request.contents.get(content)
        if known is None:
            known = Content(content, request_id, counts, at)
            request.contents[content] = self._contents[content] = known
        request.sends.append(_Send(at, connection, content))
        self._unconfirmed.setdefault(connection, {})[number] = known
        self._note(request_id, request)

    def confirmed(self, connection: int, number: int) -> None:
        """The peer has read this connection up to message `number`."""
        waiting = self._unconfirmed.get(connection, {})
        for sent in [n for n in waiting if n <= number]:
            waiting.pop(sent).is_sure = True

    def ended(self, connection: int) -> None:
        """Nothing more comes of this connection."""
        self._unconfirmed.pop(connection, None)

    def received(
        self,
        at: float,
        connection: int,
        request_id: str,
        digest: str,
        kind: str,
        content: str | None,
    ) -> None:
        """One answer. `content`: which it says that it is to, if it says."""
        answer = _Answer(at, connection, digest, kind, content)
        request = self._requests.get(request_id)
        if request is None or (content is not None and content not in request.contents):
            self._unasked.append(answer)
            self._unasked_ids.append(request_id)
            return
        (request.gone if kind == GONE else request.answers).append(answer)
        self._note(request_id, request)

    def executed(self, at: float, content: str) -> None:
        known = self._contents.get(content)
        if known is None:
            self._strangers[content] += 1
        else:
            known.executions.append(at)
            known.is_sure = True

    def died(self, at: float) -> None:
        """The system under test was killed, so that calls may be interrupted."""
        self._deaths.append(at)

    def restarted(self, at: float) -> None:
        """A successor is there, which knows of what was answered and read, but not the texts."""
        self._restarts.append(at)

    def disturbed(self, begin: float, end: float) -> None:
        """From `begin` to `end` no answer could be expected; of no two do they overlap."""
        self._disturbances.append((begin, end))

    # -- what a backend wants to know meanwhile ----------------------------------------------------

    def unanswered(self) -> list[Content]:
        """In the order in which they were first sent."""
        return [c for name in self._open for c in self._requests[name].unanswered()]

    def is_answered(self, content: str) -> bool:
        known = self._contents[content]
        return known not in self._requests[known.request_id].unanswered()

    @property
    def requests(self) -> int:
        return len(self._contents)

    @property
    def answers(self) -> int:
        return sum(len(request.answers) for request in self._requests.values())

    @property
    def copies(self) -> int:
        """Answers that repeat an earlier one byte for byte."""
        return self.answers - sum(
            len({a.digest for a in request.answers}) for request in self._requests.values()
        )

    @property
    def executions(self) -> int:
        return sum(len(content.executions) for content in self._contents.values())

    def kinds(self) -> Counter[str]:
        """How many distinct answers are of which kind."""
        found: Counter[str] = Counter()
        for request in self._requests.values():
            found.update({answer.digest: answer.kind for answer in request.answers}.values())
        return found

    # -- the verdict -------------------------------------------------------------------------------

    def faults(self) -> list[Fault]:
        found = [
            Fault(FaultKind.UNASKED, name, f"{answer.kind} on connection {answer.connection}")
            for name, answer in zip(self._unasked_ids, self._unasked, strict=True)
        ]
        found += [
            Fault(FaultKind.STRANGER, key, f"{times} times")
            for key, times in self._strangers.items()
        ]
        for name, request in self._requests.items():
            found += self._faults_of(name, request)
        return found

    def story(self, request_id: str) -> list[tuple[float, str]]:
        """What happened by one id, in order; empty for an unknown one."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        told = [(s.at, f"{s.content} sent on connection {s.connection}") for s in request.sends]
        told += [
            (answer.at, f"{answer.kind} ({answer.digest[:4]}) on connection {answer.connection}")
            for answer in (*request.answers, *request.gone)
        ]
        told += [
            (at, f"{content.key} executed")
            for content in request.contents.values()
            for at in content.executions
        ]
        return sorted(told)

    def _note(self, name: str, request: _Request) -> None:
        if request.unanswered():
            self._open[name] = None
        else:
            self._open.pop(name, None)

    def _faults_of(self, name: str, request: _Request) -> Iterator[Fault]:
        for content in request.unanswered():
            how = "surely received" if content.is_sure else "perhaps never received"
            yield Fault(FaultKind.LOST, name, f"{content.key}, {how}")
        yield from _differing(name, request)
        yield from _copied(name, request)
        for answer in request.answers:
            if answer.kind == INTERNAL_ERROR:
                yield Fault(FaultKind.INTERNAL, name, f"on connection {answer.connection}")
        for content in request.contents.values():
            yield from self._faults_of_content(name, content, request.named(content.key))
        first_sent_at = min(content.first_sent_at for content in request.contents.values())
        cut_short = [a.at for a in request.answers if a.kind in (INTERRUPTED, NOT_STARTED)]
        if cut_short and not any(first_sent_at <= at <= min(cut_short) for at in self._deaths):
            yield Fault(FaultKind.INTERRUPTED, name, "no death between request and answer")
        for told in request.gone:
            if not self._may_be_gone(request, told):
                yield Fault(FaultKind.GONE, name, f"on connection {told.connection}")

    def _may_be_gone(self, request: _Request, told: _Answer) -> bool:
        """Answered, then another process, then asked again, then told so."""
        answered_at = min((answer.at for answer in request.answers), default=told.at)
        asked_again = [sent.at for sent in request.sends if sent.at <= told.at]
        return any(answered_at <= start <= sent for start in self._restarts for sent in asked_again)

    def _faults_of_content(
        self, name: str, content: Content, answers: list[_Answer]
    ) -> Iterator[Fault]:
        times = len(content.executions)
        if times > 1:
            yield Fault(FaultKind.TWICE, name, f"{content.key}: {times} times")
        if not answers:
            return
        first = answers[0]
        if first.kind == OK and content.counts and not times:
            yield Fault(FaultKind.NOT_RUN, name, f"{content.key}: {first.kind}")
        if first.kind in REFUSED and times:
            yield Fault(FaultKind.REFUSED_BUT_RUN, name, f"{content.key}: {first.kind}")
        quiet_s = self._undisturbed_s(content.first_sent_at, first.at)
        if quiet_s > self._allowed_s:
            yield Fault(FaultKind.LATE, name, f"{content.key}: {first.kind} after {quiet_s:.1f} s")

    def _undisturbed_s(self, begin: float, end: float) -> float:
        if end - begin <= self._allowed_s:
            return end - begin  # cannot be late; looking closer at each answer would take long
        disturbed = (min(end, e) - max(begin, b) for b, e in self._disturbances)
        return end - begin - sum(seconds for seconds in disturbed if seconds > 0)


def _differing(name: str, request: _Request) -> Iterator[Fault]:
    for key in request.contents:
        kinds = {answer.digest: answer.kind for answer in request.named(key)}
        if len(kinds) > 1:
            yield Fault(FaultKind.DIFFERENT, name, f"{key}: {', '.join(kinds.values())}")
            return
    all_kinds = {answer.digest: answer.kind for answer in request.answers}
    if len(all_kinds) > len(request.contents):
        kinds_told = ", ".join(all_kinds.values())
        yield Fault(FaultKind.DIFFERENT, name, f"{len(request.contents)} calls: {kinds_told}")


def _copied(name: str, request: _Request) -> Iterator[Fault]:
    """One copy for each time that it was asked on a connection, and one for each call of before."""
    got = Counter(answer.connection for answer in request.answers)
    for connection, copies in got.items():
        asked_here = sum(sent.connection == connection for sent in request.sends)
        before = {sent.content for sent in request.sends if sent.connection < connection}
        if copies > asked_here + len(before):
            text = f"{copies} on connection {connection}, asked {asked_here} times there"
            yield Fault(FaultKind.COPIES, name, text)
