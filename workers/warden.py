"""The jail's first process: ours, privileged inside its user namespace only, and dull on purpose.

It reaps every process of the jail, makes and removes scratch, and ends everything by ending itself:
when the supervisor goes, its channel closes and the kernel kills it, and with it the whole PID
namespace. Where there is none, it ends all of its descendants first. It never runs toolkit code and
holds no toolkit data.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from typing import Any, Callable, NoReturn

from . import frames, zygote
from .confinement import listeners, namespaces, privileges, root, scratch, syscalls

Plan = dict[str, Any]
_MOST_PASSES = 10_000
"""Over the processes that are ended: whoever still makes new ones is left to the supervisor."""


class StepFailed(Exception):
    """A step of the jail's set-up was refused; says which, so that the supervisor can name it."""

    def __init__(self, step: str, error: OSError) -> None:
        super().__init__(step)
        self.step = step
        self.error = error


def start(plan: Plan) -> NoReturn:
    """Build the jail described by `plan` and become its warden; never returns."""
    channel = socket.socket(fileno=plan["warden_fd"])
    try:
        _end_with_supervisor(channel)
        _run_steps(plan)
        _end_with_supervisor(channel)
    except StepFailed as failed:
        _report_failure(channel, failed)
        os._exit(1)
    # A sibling of this process, hence the supervisor's own child and the first of the namespace.
    warden_pid = syscalls.fork_as_sibling()
    if warden_pid:
        channel.sendall(frames.encode("forked", warden_pid))
        os._exit(0)
    try:
        _run(plan, channel)
    except StepFailed as failed:
        _report_failure(channel, failed)
    except BaseException as error:  # the outer door of this process: say what it was, then end
        sys.stderr.write(f"warden: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
    os._exit(1)


def _end_with_supervisor(channel: socket.socket, *, tidies: bool = False) -> None:
    """Be killed when the supervisor ends, also while this process is stopped.

    `tidies`: be woken only, so as to end in order.
    """
    _step("parent", privileges.wake_with_parent if tidies else privileges.die_with_parent)
    # It may have ended before: then no signal comes any more.
    with contextlib.suppress(BlockingIOError):
        if not channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            os._exit(1)


def _run_steps(plan: Plan) -> None:
    """What must happen outside the new PID namespace; the order is ARCHITECTURE.md's."""
    outside_id = plan["outside_id"]
    if plan["root"] is None:
        _step("scratch", _make_directory, plan["directory"], outside_id)
        if outside_id is not None:
            _step("capabilities", privileges.empty_bounding_set)
            _step("identity", namespaces.become_user, outside_id)
        _step("files", _see_that_files_can_be_read, plan)
        return
    if outside_id is not None:
        _step("mount_namespace", namespaces.enter_mount_namespace)
        _step("root", root.build, plan)
        _step("identity", namespaces.become_user, outside_id)
    _step("namespaces", namespaces.enter_all)
    _step("mount_namespace", namespaces.keep_mounts_private)
    if outside_id is None:
        _step("root", root.build, plan)


def _make_directory(path: str, owner: int | None) -> None:
    os.mkdir(path, 0o700)
    if owner is not None:
        os.chown(path, owner, owner)


def _see_that_files_can_be_read(plan: Plan) -> None:
    """As the user whose toolkit it will be: its own files, and the interpreter."""
    for path in (os.path.join(plan["toolkit_directory"], plan["entry"]), plan["executable"]):
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _run(plan: Plan, channel: socket.socket) -> NoReturn:
    privileges.hide_from_tracers()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with_supervisor(channel, tidies=plan["root"] is None)
    if plan["root"] is None:
        _step("subreaper", syscalls.prctl, syscalls.PR_SET_CHILD_SUBREAPER, 1)
        slots: scratch.Slots = scratch.PlainSlots(plan)
    else:
        _step("nested_namespaces", namespaces.forbid_nested_user_namespaces)
        _step("hostname", namespaces.name_host, "jail")
        _step("loopback", namespaces.bring_loopback_up)
        if plan["network"] is not None:
            _step("network", listeners.bind_and_pass, plan["network"]["ports"], plan["network_fd"])
        _step("pivot_root", root.enter, plan)
        slots = scratch.MountedSlots(plan)
    zygote_pid = 0
    try:
        _step("scratch", slots.prepare)
        for slot in range(1, plan["scratch"]["first_slots"]):
            _step("scratch", slots.renew, slot)
        wake_reader, zygote_pid = _start_zygote(plan, channel)
        channel.sendall(frames.encode("up", zygote_pid))
        _serve(channel, slots, wake_reader, None if plan["reports_all_exits"] else zygote_pid)
    finally:
        if plan["root"] is None:
            _end_descendants(zygote_pid)
            slots.close()
    os._exit(0)


def _start_zygote(plan: Plan, channel: socket.socket) -> tuple[int, int]:
    """A descriptor that tells of ended processes, and the zygote's process id."""
    wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    zygote_pid = os.fork()
    if zygote_pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(wake_reader)
        os.close(wake_writer)
        channel.close()
        try:
            zygote.start(plan)
        finally:
            os._exit(1)  # never back into what only the warden does
    os.close(plan["zygote_fd"])
    os.close(plan["output_fd"])
    return wake_reader, zygote_pid


def _serve(
    channel: socket.socket, slots: scratch.Slots, wake_reader: int, reported_pid: int | None
) -> None:
    """Until the supervisor hangs up."""
    decoder = frames.Decoder(frames.TO_WARDEN, frames.MAX_CONTROL_BYTES)
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(wake_reader, select.POLLIN)
    while True:
        # A bit of what is to be removed at a time: a tool can make much of it.
        ready = {fd for fd, _ in poll.poll(0 if slots.tidy() else None)}
        if wake_reader in ready:
            os.read(wake_reader, 4096)
        replies: list[bytes] = []
        if channel.fileno() in ready:
            data = channel.recv(65536)
            if not data:
                return
            for message in decoder.feed(data):
                _obey(message, slots, replies)
        replies += _reap(reported_pid)
        if replies:
            channel.sendall(b"".join(replies))


def _obey(message: frames.Message, slots: scratch.Slots, replies: list[bytes]) -> None:
    name = message[0]
    if name == "slot":
        was_full = slots.is_full(message[1])
        slots.renew(message[1])
        replies.append(frames.encode("slot_ready", message[1], was_full))
    elif name == "measure":
        replies.append(frames.encode("measured", message[1], slots.is_full(message[1])))


def _reap(reported_pid: int | None) -> list[bytes]:
    """One `exited` frame for every process that ended, with who is left afterwards.

    Where programs may be started, only for `reported_pid`: the others are no business of ours.
    """
    gone = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        cpu_us = int((usage.ru_utime + usage.ru_stime) * 1_000_000)
        if reported_pid in (None, pid):
            gone.append((pid, status, cpu_us, usage.ru_maxrss))
    if not gone:
        return []
    left = _own_children()  # orphans of the jail are among them
    return [frames.encode("exited", *row, left) for row in gone]


_children_fd = -1


def _own_children() -> list[int]:
    """`_children_of` this process, which has one thread, at a tenth of the cost."""
    global _children_fd
    if _children_fd < 0:
        pid = os.getpid()
        _children_fd = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
    text = b""
    while chunk := os.pread(_children_fd, 65536, len(text)):
        text += chunk
    return list(map(int, text.split()))


def _children_of(pid: int) -> list[int]:
    """Process ids of its living children, of whichever thread (proc(5))."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):  # it has ended; its children are ours then
        pass
    return found


def _end_descendants(group: int) -> None:
    """Without a PID namespace: kill the zygote's `group`, which its filter lets nobody leave.

    Then, where there is no filter, stop all that came of us until nothing new does, and kill it.
    Whatever is orphaned meanwhile becomes our own child (PR_SET_CHILD_SUBREAPER).
    """
    if group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    stopped: set[int] = set()
    for _ in range(_MOST_PASSES):
        found = _descendants() - stopped
        if not found:
            break
        for pid in found:
            _signal(pid, signal.SIGSTOP)
        stopped |= found
    for _ in range(_MOST_PASSES):
        for pid in _descendants():
            _signal(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def _descendants() -> set[int]:
    found: set[int] = set()
    waiting = _children_of(os.getpid())
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += _children_of(pid)
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _step(name: str, action: Callable[..., object], *arguments: Any) -> None:
    try:
        action(*arguments)
    except OSError as error:
        raise StepFailed(name, error) from error


def _report_failure(channel: socket.socket, failed: StepFailed) -> None:
    error = failed.error
    channel.sendall(frames.encode("failed", failed.step, error.errno or 0, str(error)[:500]))
