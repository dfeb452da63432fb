"""The jail's first process: ours, privileged inside its user namespace only, and dull on purpose.

It reaps every process of the jail, mounts and unmounts scratch, and ends everything by ending
itself: when the supervisor goes, its channel closes, and the kernel kills the whole PID namespace.
It never runs toolkit code and holds no toolkit data.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from typing import Any, Callable, NoReturn

from . import frames, zygote
from .confinement import namespaces, privileges, root, scratch, syscalls

Plan = dict[str, Any]


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
        _run_steps(plan)
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


def _run_steps(plan: Plan) -> None:
    """What must happen outside the new PID namespace; the order is ARCHITECTURE.md's."""
    outside_id = plan["outside_id"]
    if outside_id is not None:
        _step("mount_namespace", namespaces.enter_mount_namespace)
        _step("root", root.build, plan)
        _step("identity", namespaces.become_user, outside_id)
    _step("namespaces", namespaces.enter_all)
    if outside_id is None:
        _step("root", root.build, plan)


def _run(plan: Plan, channel: socket.socket) -> NoReturn:
    privileges.hide_from_tracers()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _step("nested_namespaces", namespaces.forbid_nested_user_namespaces)
    _step("hostname", namespaces.name_host, "jail")
    _step("loopback", namespaces.bring_loopback_up)
    _step("pivot_root", root.enter, plan)
    slots = scratch.Slots(plan)
    for slot in range(plan["first_slots"]):
        _step("scratch", slots.mount, slot)
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
        zygote.start(plan)
    os.close(plan["zygote_fd"])
    os.close(plan["output_fd"])
    channel.sendall(frames.encode("up", zygote_pid))
    _serve(channel, slots, wake_reader, zygote_pid)


def _serve(
    channel: socket.socket, slots: scratch.Slots, wake_reader: int, zygote_pid: int
) -> NoReturn:
    decoder = frames.Decoder(frames.TO_WARDEN, frames.MAX_CONTROL_BYTES)
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(wake_reader, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if wake_reader in ready:
            os.read(wake_reader, 4096)
        replies: list[bytes] = []
        if channel.fileno() in ready:
            data = channel.recv(65536)
            if not data:
                os._exit(0)
            for message in decoder.feed(data):
                _obey(message, slots, replies)
        replies += _reap()
        if replies:
            channel.sendall(b"".join(replies))


def _obey(message: frames.Message, slots: scratch.Slots, replies: list[bytes]) -> None:
    name = message[0]
    if name == "slot":
        was_full = slots.is_full(message[1])
        slots.mount(message[1])
        replies.append(frames.encode("slot_ready", message[1], was_full))
    elif name == "measure":
        replies.append(frames.encode("measured", message[1], slots.is_full(message[1])))
    elif name == "seal":
        slots.seal_import()


def _reap() -> list[bytes]:
    """One `exited` frame for every process that ended, with who is left afterwards."""
    gone = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        cpu_us = int((usage.ru_utime + usage.ru_stime) * 1_000_000)
        gone.append((pid, status, cpu_us, usage.ru_maxrss))
    if not gone:
        return []
    left = _children()
    return [frames.encode("exited", *row, left) for row in gone]


def _children() -> list[int]:
    """Process ids of our living children; orphans of the jail are among them (proc(5))."""
    fd = os.open("/proc/self/task/1/children", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = b""
        while True:
            part = os.read(fd, 65536)
            if not part:
                break
            text += part
    finally:
        os.close(fd)
    return [int(pid) for pid in text.split()]


def _step(name: str, action: Callable[..., None], *arguments: Any) -> None:
    try:
        action(*arguments)
    except OSError as error:
        raise StepFailed(name, error) from error


def _report_failure(channel: socket.socket, failed: StepFailed) -> None:
    error = failed.error
    channel.sendall(frames.encode("failed", failed.step, error.errno or 0, str(error)[:500]))
