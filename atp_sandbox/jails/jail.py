"""One jail and its workers: launches it, speaks with its warden and zygote, tells what happened.

An I/O shell: which worker starts, gets a call or is killed, and what an end means, is decided by
the caller (`scheduling`); here are descriptors, process handles and the order of set-up. Everything
that a jail owns outside (process, descriptors, user id, control group) is given back in `close`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

import psutil

from atp_sandbox import log
from atp_sandbox.confinement.plan import FIRST_SLOTS, JailSpec, slot_count
from atp_sandbox.discovery import MAX_CLIENTS
from atp_sandbox.jails.cgroup_mover import Mover
from atp_sandbox.jails.cgroups import CallEvidence, CallGroup, CgroupError, JailGroup
from atp_sandbox.jails.channel import Channel, channel_pair
from atp_sandbox.jails.farewell import Farewells
from atp_sandbox.jails.inspection import what_is_wrong
from atp_sandbox.jails.launch import allocate_id, launch, release_id
from atp_sandbox.jails.output import OutputPipe
from atp_sandbox.jails.permits import Permits
from atp_sandbox.jails.processes import (
    ProcessHandle,
    descendants,
    read_children,
    read_descent,
    read_status,
)
from atp_sandbox.jails.worker import Exited, Worker
from atp_sandbox.loop import READ, Loop, Timer
from workers import frames

_SETUP_S = 20.0
"""From the launch to a locked zygote; measured 60 to 120 ms, many times that on a busy machine."""
_MAX_LISTENERS = 64
"""A jail has a socket for each port that its policy names, and two."""
_STRAY = "an unknown process ran in it"
_FRAME_OVERHEAD_BYTES = 4_096
"""What an answer's frame holds beside the result."""


@dataclass(frozen=True, slots=True)
class SetupFailure:
    """Why a jail did not come to the toolkit's import: which step, and what was refused."""

    step: str
    message: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call has used so far."""

    added_memory_bytes: int
    """Resident memory beyond what every worker of its zygote starts with."""
    cpu_s: float


class Network(Protocol):
    """The way out of one jail; owned by it from the moment it is made."""

    def ticket(self, worker: int) -> str:
        """By which connections of that worker are known."""

    def attach(self, listeners: Sequence[socket.socket], on_open: Callable[[], None]) -> None:
        """Take over the sockets that the jail is to reach its hosts by; then `on_open()`."""

    def close(self) -> None:
        """Refuse from now on; safe to call again."""


class JailListener(Protocol):
    """What a jail tells its owner. Numbers of workers are the owner's own."""

    def jail_discovered(self, jail: Jail, report: bytes, threads: int) -> None: ...
    def jail_broken(self, jail: Jail, what: str, traceback_end: str) -> None: ...
    def jail_setup_failed(self, jail: Jail, failure: SetupFailure) -> None: ...
    def jail_ended(self, jail: Jail, reason: str) -> None: ...
    def client_stopped(self, jail: Jail, client: int) -> None: ...
    def worker_ready(self, jail: Jail, number: int) -> None: ...
    def worker_answered(
        self, jail: Jail, number: int, call_id: bytes, kind: str, body: bytes
    ) -> None: ...
    def worker_broke_rules(self, jail: Jail, number: int, error: frames.FrameError) -> None: ...
    def worker_hung_up(self, jail: Jail, number: int) -> None: ...
    def worker_exited(self, jail: Jail, number: int, exited: Exited) -> None: ...


class Phase(Enum):
    """How far a jail has come; what its zygote may say depends on it."""

    SETTING_UP = auto()
    IMPORTING = auto()
    SERVING = auto()
    BROKEN = auto()


_ZYGOTE_MAY_SAY = {
    Phase.SETTING_UP: {"refused", "locked"},
    Phase.IMPORTING: {"discovered", "broken"},
    Phase.SERVING: {"stopped", "fork_failed"},
    Phase.BROKEN: set[str](),
}


class Jail:
    """A warden, a zygote and its workers."""

    def __init__(
        self,
        loop: Loop,
        spec: JailSpec,
        group: JailGroup | None,
        mover: Mover | None,
        farewells: Farewells,
        listener: JailListener,
        network: Network | None = None,
    ) -> None:
        """`group` and `network` are owned from here on.

        `group` and `mover` are None where no control group can be made, `network` where there is no
        way out.
        """
        self._loop = loop
        self._group = group
        self._mover = mover
        self._farewells = farewells
        self._network = network
        self._network_channel: socket.socket | None = None
        self._spec = spec
        self._listener = listener
        self._workers: dict[int, Worker] = {}
        self._by_inner_pid: dict[int, Worker] = {}
        self._fresh_slots: list[int] = []
        self._waiting_for_slot: list[tuple[str, int]] = []
        self._groups_to_give_back: dict[int, CallGroup] = {}
        self._taken_back: dict[int, int] = {}
        """Of each worker that there was at the end."""
        self._unknown: dict[int, set[int]] = {}
        """Children of the warden that nobody spoke for, and the workers that each might be: those
        that were starting when it was first seen."""
        self._stopped_clients: set[int] = set()
        self._silent_exits: list[Exited] = []
        """Ends that no worker was found for yet."""
        self._resting_bytes = 0
        self._zygote_inner_pid = 0
        self._zygote_pid = 0
        self._locked_pid = 0
        self._warden_pid = 0
        self._builder_has_spoken = False
        self._warden_handle: ProcessHandle | None = None
        self._builder: subprocess.Popen[bytes] | None = None
        self._setup_timer: Timer | None = None
        self._phase = Phase.SETTING_UP
        self._is_closed = False
        self.landlock_abi = 0
        """As the zygote reported it before any foreign code ran in it."""
        self.output = OutputPipe(loop)
        self._outside_id = allocate_id() if spec.isolation.is_confined else None
        self._launch()

    # -- for the owner -----------------------------------------------------------------------------

    @property
    def worker_numbers(self) -> list[int]:
        return list(self._workers)

    def start_worker(self, number: int) -> None:
        """Have the zygote fork worker `number`; `worker_ready` follows, or `worker_exited`."""
        self._waiting_for_slot.append(("fork", number))
        self._start_waiting()

    def become_worker(self, number: int) -> None:
        """Have the zygote itself serve, in a jail that is for one call."""
        self._waiting_for_slot.append(("become", number))
        self._start_waiting()

    def send_call(
        self,
        number: int,
        call_id: bytes,
        index: int,
        params: bytes,
        token: bytes | None,
        sample: bool,
    ) -> None:
        """Hand one call to a worker, at the end of this turn; several at most if it has permits."""
        worker = self._workers.get(number)
        if worker is None or worker.channel is None:
            return
        if worker.group is not None and worker.has_served and not worker.handed:
            worker.group.restart(counts_cpu=self._spec.limits.cpu_s is not None)
        if not worker.due:
            self._loop.call_last(lambda: self._send_due(worker))
        worker.due.append(frames.encode("call", call_id, index, params, token, sample))
        worker.handed.append(call_id)
        worker.has_served = True

    def _send_due(self, worker: Worker) -> None:
        due, worker.due = worker.due, []
        if not due or worker.channel is None or worker.channel.is_closed:
            return
        if worker.permits is not None:
            worker.permits.grant(list(worker.handed)[-len(due) :])
        worker.channel.send(due[0] if len(due) == 1 else b"".join(due))

    def take_back(self, number: int) -> int:
        """How many of the last calls handed to worker `number` it has not begun, and never will.

        Also after the jail's end.
        """
        worker = self._workers.get(number)
        return self._taken_back.pop(number, 0) if worker is None else worker.take_back()

    def take_output(self, number: int) -> str:
        """What worker `number` printed since the last time."""
        worker = self._workers.get(number)
        return worker.output.take() if worker else ""

    def dismiss(self, number: int) -> None:
        """Nothing that worker `number` may still say or print is of interest; only its exit is."""
        worker = self._workers.get(number)
        if worker is not None and worker.exited is None and worker.channel is not None:
            worker.channel.close()
            worker.output.close()

    def measure_scratch(self, number: int, then: Callable[[bool], None]) -> None:
        """`then(is_full)` once the warden has looked; never if the jail ends before."""
        worker = self._workers[number]
        worker.on_measured.append(then)
        self._warden_channel.send(frames.encode("measure", worker.slot))

    def kill_worker(self, number: int) -> None:
        """SIGKILL; the caller has recorded why. `worker_exited` follows."""
        worker = self._workers.get(number)
        if worker is None or worker.exited is not None:
            return
        if worker.handle is not None:
            worker.handle.kill()
        else:
            # It never said who it is, so there is nobody to aim at but the jail.
            self._end(f"worker {number} did not start")

    def counted(self, number: int) -> CallEvidence | None:
        """What the control group of worker `number` counted for its call; None without one."""
        worker = self._workers.get(number)
        return worker.group.evidence() if worker and worker.group else None

    def usage(self, number: int) -> Usage:
        """What worker `number` uses now, seen from outside: its group's count, else a sample.

        OSError if it cannot be looked at.
        """
        worker = self._workers.get(number)
        if worker is None or worker.handle is None or worker.exited is not None:
            return Usage(0, 0.0)
        if worker.group is not None and (cpu_s := worker.group.evidence().cpu_s):
            return Usage(0, cpu_s)  # and the kernel keeps the limit of memory
        pids = {worker.handle.pid}
        if self._spec.may_start_programs:
            # All that runs in such a jail is of its one call, orphans too.
            pids |= descendants(self._warden_pid)
        cpu_s, added = 0.0, 0
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                cpu_s += sum(process.cpu_times()[:4])
                # Each begins with what it shares with its zygote.
                added += max(0, process.memory_info().rss - self._resting_bytes)
        return Usage(added, cpu_s)

    def zygote_memory_bytes(self) -> int:
        """Resident memory of the zygote; 0 if it is gone. OSError if it cannot be looked at."""
        try:
            rss: int = psutil.Process(self._zygote_pid).memory_info().rss if self._zygote_pid else 0
        except psutil.Error:
            return 0
        return rss

    def end(self, reason: str) -> None:
        """End the jail and tell the listener why."""
        self._end(reason)

    def close(self) -> None:
        """End the jail with everything in it and give back what it owned. Safe to call again.

        No callback follows. The kernel kills the PID namespace with its first process.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._setup_timer is not None:
            self._setup_timer.cancel()
        self._warden_channel.close()
        self._zygote_channel.close()
        self._close_network()
        for worker in self._workers.values():
            self._taken_back[worker.number] = worker.take_back()
            worker.close()
        self.output.close()
        self._reap_builder()
        self._workers.clear()
        if self._warden_handle is None:
            self._give_back(0)
            return
        self._loop.unwatch(self._warden_handle.fileno())
        if self._spec.isolation.has_namespaces:
            self._warden_handle.kill()
        # Else it has been hung up on, and ends what came of it, as the kernel does for a namespace.
        self._farewells.add(self._warden_handle, self._give_back)

    def _close_network(self) -> None:
        if self._network_channel is not None:
            self._network_channel.close()
            self._network_channel = None
        if self._network is not None:
            self._network.close()

    def _give_back(self, warden_status: int) -> None:
        """Its warden has ended with this wait status: nothing of it runs any more."""
        was_killed = os.WIFSIGNALED(warden_status)
        if not self._spec.isolation.has_namespaces and was_killed and self._zygote_pid:
            # Before it could see to that. One that could has reaped the zygote, whose number may be
            # somebody else's by now.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._zygote_pid, signal.SIGKILL)
        if self._group is not None:
            self._group.close()
        if not self._spec.isolation.has_namespaces:
            self._remove_scratch()
        release_id(self._outside_id)

    def _remove_scratch(self) -> None:
        """The warden emptied it; never looked into here."""
        try:
            os.rmdir(self._spec.directory)
        except FileNotFoundError:
            pass  # it was not made yet
        except OSError as error:
            reason = str(error.strerror)
            log.emit(log.WARNING, "scratch_left", self._spec.directory, cause=reason)

    # -- set-up ------------------------------------------------------------------------------------

    def _launch(self) -> None:
        try:
            launched = launch(
                self._spec, outside_id=self._outside_id, output_writer=self.output.writer
            )
        except OSError:
            self.output.close()
            self._close_network()
            release_id(self._outside_id)
            if self._group is not None:
                self._group.close()
            raise
        self._builder = launched.builder
        self._network_channel = launched.network
        self._warden_channel = Channel(
            self._loop,
            launched.warden,
            frames.Decoder(frames.FROM_WARDEN, frames.MAX_CONTROL_BYTES),
            self._on_warden,
            self._on_warden_closed,
        )
        self._zygote_channel = Channel(
            self._loop,
            launched.zygote,
            frames.Decoder(frames.FROM_ZYGOTE, frames.MAX_DISCOVERED_BYTES),
            self._on_zygote,
            self._on_zygote_closed,
        )
        self._setup_timer = self._loop.call_later(_SETUP_S, self._on_setup_timeout)

    def _on_setup_timeout(self) -> None:
        self._fail_setup("start", f"the jail was not ready within {_SETUP_S:.0f} s")

    def _fail_setup(self, step: str, message: str) -> None:
        printed = self.output.take().strip()
        self.close()
        if printed:
            message = f"{message}: {printed[-500:]}"
        self._listener.jail_setup_failed(self, SetupFailure(step, message))

    def _reap_builder(self) -> None:
        """The builder has ended, or ends now, and with it a warden that did not speak yet."""
        if self._builder is None:
            return
        if not self._warden_pid:
            # It leads a process group, whose number holds until it is reaped.
            os.killpg(self._builder.pid, signal.SIGKILL)
        self._builder.wait()
        if not self._warden_pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-self._builder.pid, 0)
        self._builder = None

    def _on_up(self, pid: int, zygote_inner_pid: int) -> None:
        """The warden speaks: it is our child, so its number cannot have been used again."""
        if not self._meet_warden(pid):
            return
        self._zygote_inner_pid = zygote_inner_pid
        self._settle_warden_channel()
        self._reap_builder()
        slots = slot_count(self._spec.limits, forks_workers=self._spec.forks_workers)
        for slot in range(FIRST_SLOTS, slots):
            self._warden_channel.send(frames.encode("slot", slot))
        self._when_both_have_spoken()

    def _meet_warden(self, pid: int) -> bool:
        """Whether it can be watched."""
        if self._warden_handle is None:
            try:
                self._warden_pid, self._warden_handle = pid, ProcessHandle(pid)
            except OSError as error:  # such as EMFILE
                self._fail_setup("start", f"its warden cannot be watched: {error.strerror}")
                return False
            self._loop.watch(
                self._warden_handle.fileno(), READ, lambda _events: self._end("its warden ended")
            )
        return True

    def _settle_warden_channel(self) -> None:
        """Once builder and warden have both spoken, in whichever order, only the warden may."""
        if self._builder_has_spoken and self._zygote_inner_pid:
            self._warden_channel.peer_pid = self._warden_pid

    def _on_locked(self, pid: int) -> None:
        """The zygote is confined. What it says may come before what its warden said earlier."""
        self._locked_pid = pid
        self._when_both_have_spoken()

    def _when_both_have_spoken(self) -> None:
        """Look at the confined zygote from outside before any foreign code runs in it."""
        if not self._locked_pid or not self._zygote_inner_pid:
            return
        pid = self._locked_pid
        try:
            wrong = what_is_wrong(self._spec, pid, self._outside_id)
        except ProcessLookupError:
            self._fail_setup("start", "the zygote ended")
            return
        except OSError as error:  # such as EMFILE: what cannot be looked at does not run
            self._fail_setup("verification", f"the zygote cannot be looked at: {error.strerror}")
            return
        if wrong:
            self._fail_setup("verification", f"the zygote did not confine itself: {wrong}")
            return
        self._zygote_pid = pid
        self._zygote_channel.peer_pid = pid
        if self._group is None or self._mover is None:
            self._go(None)
            return
        add = self._group.adder()
        self._mover.move(self._warden_pid, add, self._fail_if)
        self._mover.move(pid, add, self._go)

    def _fail_if(self, error: Exception | None) -> None:
        if error is not None and not self._is_closed:
            self._fail_setup("cgroup", str(error))

    def _go(self, error: Exception | None) -> None:
        """The zygote is confined, verified and limited: the toolkit's first line may run."""
        self._fail_if(error)
        if self._is_closed:
            return
        if self._network is not None and self._network_channel is not None:
            self._open_network(self._network, self._network_channel)
        else:
            self._import()

    def _open_network(self, network: Network, channel: socket.socket) -> None:
        """Take the sockets that the warden made; nothing else ever comes out of a jail."""
        self._network_channel = None
        with channel:
            channel.setblocking(False)
            try:
                _, descriptors, flags, _ = socket.recv_fds(
                    channel, 1, _MAX_LISTENERS, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                descriptors, flags = [], 0
        listeners = [socket.socket(fileno=fd) for fd in descriptors]
        if not listeners or flags & socket.MSG_CTRUNC:
            for sock in listeners:
                sock.close()
            self._fail_setup("network", "not all sockets of the warden arrived")
            return
        network.attach(listeners, self._import)

    def _import(self) -> None:
        """Once what the toolkit may reach can be reached."""
        if self._is_closed:
            return
        self._phase = Phase.IMPORTING
        assert self._setup_timer is not None
        self._setup_timer.cancel()
        self._fresh_slots += range(1, FIRST_SLOTS)
        self._zygote_channel.send(frames.encode("go"))

    # -- messages ----------------------------------------------------------------------------------

    def _on_warden(self, message: frames.Message, sender: int) -> None:
        match message[0]:
            case "forked":
                if self._meet_warden(message[1]):
                    self._builder_has_spoken = True
                    self._settle_warden_channel()
            case "failed":
                self._fail_setup(message[1], message[3])
            case "up":
                self._on_up(sender, message[1])
            case "slot_ready":
                self._on_slot_ready(message[1], message[2])
            case "measured":
                self._on_measured(message[1], message[2])
            case "exited":
                _, inner_pid, status, cpu_us, peak_kib, left = message
                exited = Exited(status, cpu_us / 1e6, peak_kib * 1024)
                self._on_exited(inner_pid, exited, left)

    def _on_measured(self, slot: int, is_full: bool) -> None:
        for worker in list(self._workers.values()):
            if worker.slot == slot and worker.on_measured:
                worker.on_measured.pop(0)(is_full)
                if worker.is_zygote and worker.exited is not None and not worker.on_measured:
                    self._forget(worker, worker.exited)
                    self._end(_describe_exit("its zygote", worker.exited.status))

    def _on_exited(self, inner_pid: int, exited: Exited, left: list[int]) -> None:
        if inner_pid == self._zygote_inner_pid:
            # What it sent before it ended counts: a report of a broken import, or a last answer.
            self._zygote_channel.read_now()
            for one in list(self._workers.values()):
                if one.inner_pid == inner_pid and one.channel is not None:
                    one.channel.read_now()
                    if one.group is not None:
                        exited = replace(exited, counted=one.group.evidence())
                    if one.on_measured:
                        one.exited = exited  # word of its scratch is on its way
                        return
                    self._forget(one, exited)
            self._end(_describe_exit("its zygote", exited.status))
            return
        worker = self._by_inner_pid.get(inner_pid)
        if worker is None:
            self._silent_exits.append(exited)
            self._adopt_silent_exits()
        else:
            self._finish_worker(worker, exited)
        known = {self._zygote_inner_pid, *self._by_inner_pid}
        self._unknown = {
            pid: self._unknown.get(pid, self._starting) for pid in left if pid not in known
        }
        self._look_for_strays()

    def _adopt_silent_exits(self) -> None:
        """Children ended that never spoke: strays, or workers whose last words are still unread."""
        for worker in list(self._workers.values()):
            if not worker.inner_pid and worker.channel is not None:
                worker.channel.read_now()
                self._adopt_silent_exit(worker)

    def _adopt_silent_exit(self, worker: Worker) -> None:
        """A worker that never spoke ends with its channel, which may be after word of its exit:
        for a moment the zygote has a copy.
        """
        has_ended = worker.is_gone or (worker.channel is not None and worker.channel.is_closed)
        if self._silent_exits and has_ended and not worker.inner_pid and worker.exited is None:
            self._finish_worker(worker, self._silent_exits.pop(0))

    def _finish_worker(self, worker: Worker, exited: Exited) -> None:
        if worker.channel is not None:
            worker.channel.read_now()
        if self._is_closed or worker.exited is not None:
            return
        if worker.group is not None and worker.owes_answer:
            exited = replace(exited, counted=worker.group.evidence())
        worker.exited = exited
        self._by_inner_pid.pop(worker.inner_pid, None)
        if worker.group is not None:
            self._groups_to_give_back[worker.slot] = worker.group
        self._warden_channel.send(frames.encode("slot", worker.slot))
        if not worker.owes_answer and not worker.on_measured:
            self._forget(worker, exited)
        # Otherwise how full its scratch was is evidence, and comes with the fresh slot.

    def _forget(self, worker: Worker, exited: Exited) -> None:
        if self._is_closed:
            return
        self._listener.worker_exited(self, worker.number, exited)
        worker.close()
        self._workers.pop(worker.number, None)

    def _on_slot_ready(self, slot: int, was_full: bool) -> None:
        # Its files were charged to its group until now.
        group = self._groups_to_give_back.pop(slot, None)
        if group is not None:
            group.give_back()
        for worker in list(self._workers.values()):
            if worker.slot == slot and worker.exited is not None:
                self._forget(worker, replace(worker.exited, scratch_was_full=was_full))
        self._fresh_slots.append(slot)
        self._start_waiting()

    def _look_for_strays(self) -> None:
        """End the jail if a process runs or ran in it that we know nothing of.

        No worker can start one, so only a zygote that skips its workers' confinement makes them.
        A child of the warden that we do not know may be one of the workers that were starting when
        it was first seen; it is none of them once they have all spoken or ended.
        """
        if self._is_closed:
            return
        starting = self._starting
        lives = any(
            pid not in self._by_inner_pid and starting.isdisjoint(might_be)
            for pid, might_be in self._unknown.items()
        )
        has_ended = bool(self._silent_exits) and not starting
        if has_ended:
            self._silent_exits.clear()
        if (lives or has_ended) and not self._may_hold_strays:
            self._end(_STRAY)

    @property
    def _may_hold_strays(self) -> bool:
        return self._spec.may_start_programs or not self._spec.isolation.is_confined

    @property
    def _starting(self) -> set[int]:
        """Workers that nobody has spoken for yet."""
        return {worker.number for worker in self._workers.values() if not worker.inner_pid}

    def _on_zygote(self, message: frames.Message, sender: int) -> None:
        name = message[0]
        if name not in _ZYGOTE_MAY_SAY[self._phase]:
            self._end(f"its zygote said {name} out of turn")
            return
        match name:
            case "refused":
                self._fail_setup(message[1], message[3])
            case "locked":
                self.landlock_abi = message[1]
                self._on_locked(sender)
            case "discovered":
                self._on_discovered(message[1], sender)
            case "broken":
                self._phase = Phase.BROKEN
                self._listener.jail_broken(self, message[1], message[2])
            case "stopped":
                self._on_stopped(message[1])
            case "fork_failed":
                self._on_fork_failed(message[1], message[2])

    def _on_stopped(self, client: int) -> None:
        """Once a client: whoever says more than there is to say keeps the supervisor busy."""
        if client in self._stopped_clients or not 0 <= client < MAX_CLIENTS:
            self._end("its zygote stopped a client that it had not")
            return
        self._stopped_clients.add(client)
        self._listener.client_stopped(self, client)

    def _on_discovered(self, report: bytes, pid: int) -> None:
        self._phase = Phase.SERVING
        try:
            threads = read_status(pid).threads
            strays = (read_children(self._warden_pid) | read_children(pid)) - {pid}
        except ProcessLookupError:
            return  # the warden will say how it ended
        except OSError as error:
            self._end(f"its processes cannot be looked at: {error.strerror}")
            return
        if strays and self._spec.isolation.is_confined:
            self._end(_STRAY)
            return
        self._listener.jail_discovered(self, report, threads)

    def _on_fork_failed(self, number: int, errno: int) -> None:
        worker = self._workers.get(number)
        if worker is None or worker.inner_pid:
            self._end("its zygote spoke of a worker that is not starting")
            return
        self._listener.worker_hung_up(self, number)
        self._finish_worker(worker, Exited((errno & 0x7F) << 8, 0.0, 0))
        self._look_for_strays()

    # -- workers -----------------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        while self._waiting_for_slot and self._fresh_slots and not self._is_closed:
            how, number = self._waiting_for_slot.pop(0)
            self._start(how, number, self._fresh_slots.pop())

    def _start(self, how: str, number: int, slot: int) -> None:
        ours = theirs = output = permits = None
        try:
            ours, theirs = channel_pair()
            output = OutputPipe(self._loop)
            if self._spec.calls_per_worker > 1:
                permits = Permits()
        except OSError as error:
            for end in (ours, theirs, output):
                if end is not None:
                    end.close()
            if output is not None:
                os.close(output.writer)
            self._end(f"no descriptors for a worker: {error.strerror}")
            return
        worker = Worker(number, slot, output, is_zygote=how == "become")
        worker.permits = permits
        self._workers[number] = worker
        limit = self._spec.limits.output_bytes + _FRAME_OVERHEAD_BYTES
        worker.channel = Channel(
            self._loop,
            ours,
            frames.Decoder(frames.FROM_WORKER, limit),
            lambda message, sender: self._on_worker(worker, message, sender),
            lambda error: self._on_worker_closed(worker, error),
        )
        ticket = "" if self._network is None else self._network.ticket(number)
        passed = [theirs.detach(), worker.output.writer]
        if permits is not None:
            passed.append(permits.for_worker)
        self._zygote_channel.send(frames.encode(how, number, slot, ticket), passed)

    def _on_worker(self, worker: Worker, message: frames.Message, sender: int) -> None:
        if message[0] == "answer" and worker.inner_pid:
            _, call_id, kind, body = message
            if worker.handed:
                worker.handed.popleft()
            self._listener.worker_answered(self, worker.number, call_id, kind, body)
        elif message[0] == "ready" and not worker.inner_pid and message[1] == worker.number:
            self._identify(worker, sender)
        else:
            error = frames.FrameError(f"{message[0]} out of turn")
            self._listener.worker_broke_rules(self, worker.number, error)

    def _identify(self, worker: Worker, pid: int) -> None:
        """Open a handle on the process that spoke, and make sure that it is one of this jail's."""
        assert worker.channel is not None
        try:
            worker.handle = ProcessHandle(pid)
            descent = read_descent(pid)
        except ProcessLookupError:
            worker.is_gone = True
            self._adopt_silent_exit(worker)
            return
        except OSError as error:  # such as EMFILE: what cannot be told apart does not serve
            self._end(f"a worker cannot be looked at: {error.strerror}")
            return
        is_zygote = pid == self._zygote_pid
        if is_zygote is not worker.is_zygote:
            self._end("its zygote spoke for a worker")
            return
        if descent.parent_pid != self._warden_pid:
            self._end("a worker is no child of its warden")
            return
        if descent.inner_pid in self._by_inner_pid:
            self._end("a process spoke for two workers")
            return
        if not self._resting_bytes:
            # All workers of a zygote start alike, so the first one is measured for all.
            try:
                self._resting_bytes = psutil.Process(pid).memory_info().rss
            except psutil.Error:
                pass  # how it ended is told by the warden
            except OSError as error:
                self._end(f"a worker cannot be looked at: {error.strerror}")
                return
        worker.channel.peer_pid = pid
        worker.inner_pid = descent.inner_pid
        if not is_zygote:
            self._by_inner_pid[descent.inner_pid] = worker
        if self._group is None or self._mover is None:
            self._on_moved(worker, None)
            return
        limits = self._spec.limits
        try:
            worker.group = self._group.take_call(
                memory_bytes=limits.memory_bytes,
                pids_max=limits.processes,
                counts_cpu=limits.cpu_s is not None,
            )
        except CgroupError as error:
            self._on_moved(worker, error)
            return
        self._mover.move(pid, worker.group.adder(), lambda error: self._on_moved(worker, error))

    def _on_moved(self, worker: Worker, error: Exception | None) -> None:
        """A worker is ready once it is limited."""
        if self._is_closed or worker.exited is not None or isinstance(error, ProcessLookupError):
            return  # how it ended is told by the warden
        if error is not None:
            self._end(f"a worker could not be limited: {error}")
            return
        self._listener.worker_ready(self, worker.number)
        self._look_for_strays()

    def _on_worker_closed(self, worker: Worker, error: frames.FrameError | None) -> None:
        if error is not None:
            self._listener.worker_broke_rules(self, worker.number, error)
        else:
            self._listener.worker_hung_up(self, worker.number)
            self._adopt_silent_exit(worker)

    # -- ends --------------------------------------------------------------------------------------

    def _on_warden_closed(self, error: frames.FrameError | None) -> None:
        self._end("its warden ended" if error is None else f"its warden: {error}")

    def _on_zygote_closed(self, error: frames.FrameError | None) -> None:
        if error is not None:
            self._end(f"its zygote broke the protocol: {error}")
        # An orderly end is told by the warden, with the exit status.

    def _end(self, reason: str) -> None:
        if self._is_closed:
            return
        if self._phase is Phase.SETTING_UP:
            self._fail_setup("start", reason)
            return
        self.close()
        self._listener.jail_ended(self, reason)


def _describe_exit(who: str, status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"{who} was ended by signal {os.WTERMSIG(status)}"
    return f"{who} ended with exit status {os.WEXITSTATUS(status)}"
