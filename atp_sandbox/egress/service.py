"""The supervisor's side of the egress process: starts it, hands it sockets, hears what it did.

An I/O shell in the supervisor's loop. The listening sockets of all jails are kept here too. When
the egress process ends, the kernel refuses connections to them (`shutdown`) until a successor,
which gets them all again, calls listen(2). What it tells is believed of connections alone: it holds
no key and decides on no call.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

from atp_sandbox import log
from atp_sandbox.egress import messages
from atp_sandbox.egress.authority import Authority, make_authority
from atp_sandbox.egress.budget import Budget
from atp_sandbox.egress.jail_network import Denial, JailNetwork
from atp_sandbox.egress.launch import launch
from atp_sandbox.isolation import Isolation, Waivable
from atp_sandbox.jails.channel import Channel
from atp_sandbox.jails.launch import allocate_id, release_id
from atp_sandbox.jails.output import OutputPipe
from atp_sandbox.jails.processes import ProcessHandle, read_status
from atp_sandbox.loop import Loop, Timer
from atp_sandbox.policy import EgressPolicy, Reroute
from workers import frames

_START_S = 20.0
"""From the launch to `ready`; measured 0.2 s, many times that on a busy machine."""
_FIRST_RESTART_S = 0.1
_MAX_RESTART_S = 10.0
_STABLE_S = 10.0
_OPEN_S = 10.0
"""For a jail's sockets to be accepted on; a millisecond where nothing is wrong."""
_LINES_AT_ONCE = 1_000
_LINES_A_SECOND = 200.0
"""Of one toolkit: it bounds itself at a quarter of it (`gate.Budget`)."""
_KEPT_ENDED = 1_000
_WAIVABLE = frozenset({Waivable.LANDLOCK, Waivable.SECCOMP})


class EgressError(Exception):
    """The egress process cannot be started or confined: the step, and what was refused."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"the egress process: {reason}")
        self.step = step


class EgressService:
    """Owns the egress process and starts it again when it ends."""

    def __init__(
        self,
        loop: Loop,
        *,
        reroutes: Sequence[Reroute] = (),
        on_failed: Callable[[EgressError], None],
        on_denied: Callable[[str, Denial], None],
    ) -> None:
        """`on_failed` if it cannot be confined or does not start; `on_denied(toolkit, denial)` for
        every connection that the policy refused.
        """
        self._loop = loop
        self._isolation: Isolation | None = None
        """What all toolkits have waived, and nothing else, is done without."""
        self._reroutes = reroutes
        self._on_failed = on_failed
        self._on_denied = on_denied
        self._numbers = itertools.count(1)
        self._jails: dict[int, JailNetwork] = {}
        self._ended: dict[int, str] = {}
        """Toolkits of the jails that ended last."""
        self._opening: dict[int, Timer] = {}
        """Of jails whose sockets are handed over, until they are accepted on."""
        self._budget = Budget(_LINES_AT_ONCE, _LINES_A_SECOND)
        self._authorities: dict[tuple[str, ...], Authority] = {}
        self._injects = False
        self._is_started = False
        self._channel: Channel | None = None
        self._process: ProcessHandle | None = None
        self._output: OutputPipe | None = None
        self._id: int | None = None
        self._timer: Timer | None = None
        self._is_ready = False
        self._was_ready = False
        self._is_closed = False
        self._started_at = 0.0
        self._restart_s = _FIRST_RESTART_S

    # -- for the node ------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the egress process; None while there is none."""
        return None if self._process is None else self._process.pid

    def expect(self, policy: EgressPolicy, isolation: Isolation) -> None:
        """A toolkit of this policy is to be served; to be called before its first jail.

        One process serves all, so it has each layer that one of them wants. A process that has
        less already is replaced.
        """
        waived = isolation.waived & _WAIVABLE
        if self._isolation is not None:
            waived &= self._isolation.waived
        wanted = (Isolation(isolation.level, waived), self._injects or bool(policy.inject))
        has_enough = wanted == (self._isolation, self._injects)
        self._isolation, self._injects = wanted
        if self._process is None or has_enough:
            return
        if self._is_ready:
            self._lose("a toolkit needs more of it")
        else:
            self._drop_process()
            self._loop.call_soon(self._launch)

    def jail(self, toolkit: str, policy: EgressPolicy) -> JailNetwork:
        """The way out of a jail that is about to be made; the caller closes it."""
        if not self._is_started:
            # A little later, when all toolkits are known.
            self._is_started = True
            self._loop.call_soon(self._launch)
        network = JailNetwork(self, next(self._numbers), toolkit, policy)
        self._jails[network.number] = network
        return network

    def authority(self, policy: EgressPolicy) -> Authority | None:
        """What jails of this policy trust beside the machine's authorities; None: nobody.

        Made here and not in the egress process, whose successor must have the same.
        """
        hosts = policy.injected_hosts
        if not hosts:
            return None
        if hosts not in self._authorities:
            self._authorities[hosts] = make_authority(hosts)
        return self._authorities[hosts]

    def catch_up(self) -> None:
        """Take in what the egress process has said already."""
        if self._channel is not None:
            self._channel.read_now()

    def log_output(self) -> None:
        """What the egress process had to say: nothing, but for a bug of ours."""
        printed = "" if self._output is None else self._output.take().strip()
        if printed:
            log.emit(log.ERROR, "egress_output", printed)

    def close(self) -> None:
        """End the process and give back what is owned. Safe to call again."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._drop_process()

    # -- for the jails' networks -------------------------------------------------------------------

    def open(self, network: JailNetwork) -> None:
        if self._is_ready:
            self._hand_over(network)
        elif self._was_ready:
            network.opened()

    def send(self, name: str, *values: frames.Value) -> None:
        if self._channel is not None and self._is_ready:
            self._channel.send(frames.encode(name, *values))

    def forget_jail(self, network: JailNetwork) -> None:
        timer = self._opening.pop(network.number, None)
        if timer is not None:
            timer.cancel()
        if self._jails.pop(network.number, None) is not None and network.listeners:
            self.send("close", network.number)
            # Its last connections are told of when they have ended.
            self._ended[network.number] = network.toolkit
            if len(self._ended) > _KEPT_ENDED:
                del self._ended[next(iter(self._ended))]

    def _hand_over(self, network: JailNetwork) -> None:
        assert self._channel is not None
        copies: list[int] = []
        try:
            for sock in network.listeners:
                copies.append(os.dup(sock.fileno()))
        except OSError as error:
            for fd in copies:
                os.close(fd)
            self._loop.call_soon(partial(self._lose, f"no descriptors: {error.strerror}"))
            return
        authority = self.authority(network.policy) or Authority(b"", b"")
        frame = frames.encode(
            "open",
            network.number,
            network.toolkit,
            network.policy.to_json(),
            network.key,
            authority.cert_pem,
            authority.key_pem,
        )
        self._channel.send(frame, copies)
        # Whoever does not take it in hangs, or is kept from its work.
        late = partial(self._lose, f"it did not open a jail within {_OPEN_S:.0f} s")
        self._opening[network.number] = self._loop.call_later(_OPEN_S, late)
        for placeholder, (provider, token) in network.placeholders.items():
            self.send("fill", network.number, provider, placeholder, token)

    # -- the process -------------------------------------------------------------------------------

    def _launch(self) -> None:
        if self._is_closed:
            return
        self._started_at = self._loop.now()
        assert self._isolation is not None
        self._id = allocate_id()
        try:
            self._output = OutputPipe(self._loop)
            launched = launch(
                self._isolation,
                self._reroutes,
                outside_id=self._id,
                injects=self._injects,
                output_writer=self._output.writer,
            )
        except OSError as error:
            self._fail(f"it cannot be launched: {error.strerror}")
            return
        self._popen = launched.process
        try:
            self._process = ProcessHandle(launched.process.pid)
        except OSError as error:
            launched.channel.close()
            self._popen.kill()  # it is our child, not reaped yet
            self._popen.wait()
            self._fail(f"it cannot be watched: {error.strerror}")
            return
        self._channel = Channel(
            self._loop,
            launched.channel,
            frames.Decoder(messages.FROM_EGRESS, messages.MAX_REPORT_BYTES),
            self._on_message,
            self._on_closed,
        )
        self._channel.peer_pid = launched.process.pid
        self._timer = self._loop.call_later(_START_S, self._on_start_timeout)

    def _on_start_timeout(self) -> None:
        self._fail(f"it was not ready within {_START_S:.0f} s")

    def _on_message(self, message: frames.Message, _sender: int) -> None:
        match message[0]:
            case "ready" if not self._is_ready:
                self._on_ready()
            case "refused" if not self._is_ready:
                self._fail(message[2], step=message[1])
            case "opened":
                self._on_opened(message[1])
            case "connection":
                self._on_connection(message)

    def _on_ready(self) -> None:
        assert self._process is not None
        assert self._isolation is not None
        wrong = _what_is_wrong(self._process.pid, self._id, self._isolation)
        if wrong:
            self._fail(wrong)
            return
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None
        self._is_ready = True
        if self._was_ready:
            log.emit(log.INFO, "egress_restarted", "the egress process is back")
        self._was_ready = True
        for network in list(self._jails.values()):
            if network.listeners:
                self._hand_over(network)

    def _on_opened(self, number: int) -> None:
        timer = self._opening.pop(number, None)
        if timer is not None:
            timer.cancel()
        if number in self._jails:
            self._jails[number].opened()

    def _on_connection(self, message: frames.Message) -> None:
        try:
            told = messages.read_connection(message)
        except frames.FrameError as error:
            self._lose(f"it broke the protocol: {error}")
            return
        now = self._loop.now()
        self._budget.widen(len({network.toolkit for network in self._jails.values()}))
        if not self._budget.take(now):
            self._lose("it told of more connections than there can be")
            return
        network = self._jails.get(told.jail)
        toolkit = self._ended.get(told.jail) if network is None else network.toolkit
        if toolkit is None:
            return
        is_denied = told.verdict == messages.DENIED
        log.emit(
            log.INFO if told.verdict == messages.ALLOWED else log.WARNING,
            "connection",
            _described(told),
            toolkit=toolkit,
            host=told.host,
            address=told.address,
            port=told.port,
            sent_bytes=told.sent_bytes,
            received_bytes=told.received_bytes,
            seconds=told.ms / 1000,
            verdict=told.verdict,
        )
        if is_denied:
            denial = Denial(now, told.worker, told.host, told.port, told.reason)
            if network is not None:
                network.note(denial)
            self._on_denied(toolkit, denial)

    def _on_closed(self, error: frames.FrameError | None) -> None:
        """It ended, or broke the protocol: nobody accepts, so the kernel is to refuse."""
        self._channel = None
        self._lose("it ended" if error is None else f"it broke the protocol: {error}")

    def _lose(self, reason: str) -> None:
        """End what is left of it; a successor comes."""
        if not self._is_ready:
            self._fail(reason)
            return
        self.log_output()
        self._drop_process()
        log.emit(
            log.ERROR,
            "egress_ended",
            "the egress process ended; connections are refused until its successor is there",
            reason=reason,
        )
        for network in list(self._jails.values()):
            network.opened()
        self._restart_later()

    def _restart_later(self) -> None:
        if self._loop.now() - self._started_at > _STABLE_S:
            self._restart_s = _FIRST_RESTART_S
        self._timer = self._loop.call_later(self._restart_s, self._launch)
        self._restart_s = min(_MAX_RESTART_S, self._restart_s * 2)

    def _fail(self, reason: str, step: str = "egress") -> None:
        """It did not come up: at the first time nothing can be served, later it is tried again."""
        printed = "" if self._output is None else self._output.take().strip()
        if printed:
            reason = f"{reason}: {printed[-500:]}"
        self._drop_process()
        if self._is_closed:
            return
        if not self._was_ready:
            self._is_started = False  # a toolkit that comes later may try again
            self._on_failed(EgressError(step, reason))
            return
        log.emit(log.ERROR, "egress_failed", "the egress process did not start", cause=reason)
        self._restart_later()

    def _drop_process(self) -> None:
        self._is_ready = False
        for timer in self._opening.values():
            timer.cancel()
        self._opening.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.kill()
            self._popen.wait()
            self._process.close()
            self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None
        release_id(self._id)
        self._id = None
        for network in self._jails.values():
            for sock in network.listeners:
                _stop_listening(sock)


def _stop_listening(sock: socket.socket) -> None:
    """From LISTEN to CLOSE, still bound: connections are refused, waiting ones reset.

    Not for a socket that does not listen: it would hand its shutdown on to all that it accepts
    later (inet_shutdown in the kernel).
    """
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.shutdown(socket.SHUT_RDWR)


def _described(told: messages.ConnectionLine) -> str:
    """`denied: evil.example:443 is not allowed for toolkit crm`."""
    place = told.host if told.port is None else f"{told.host}:{told.port}"
    return f"{told.verdict}: {f'{place} {told.reason}'.strip()}"


def _what_is_wrong(pid: int, outside_id: int | None, isolation: Isolation) -> str:
    """What the kernel says of the egress process that it should not; empty if all is well."""
    try:
        status = read_status(pid)
    except ProcessLookupError:
        return "it ended"
    except OSError as error:
        return f"it cannot be looked at: {error.strerror}"
    if status.capabilities or (outside_id is not None and status.bounding):
        return "it still has capabilities, or could get some"
    if not status.no_new_privs or (isolation.has_seccomp and not status.is_filtered):
        return "it did not confine itself"
    if outside_id is not None and status.uid != outside_id:
        return f"it runs as user {status.uid}"
    return ""
