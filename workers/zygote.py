"""The jail's second process: confines itself, imports the toolkit, then forks a worker for a call.

Everything after `_import_toolkit` runs beside foreign code that may have changed anything in this
process; nothing here is a boundary any more. What holds was set up before: namespaces, no
capability, no_new_privs, resource limits, descriptors.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import os
import select
import signal
import site
import socket
import struct
import sys
import threading
import traceback
import types
from collections import deque
from typing import Any, NoReturn

from . import call, frames, proxy, stdio
from .atp_sdk import clients
from .confinement import huge_pages, layers, privileges, syscalls
from .discovery import registry

_SETTLE_AFTER_REGISTRATION_S = 0.5
_TRACEBACK_CHARS = 4_000
_DESCRIPTORS_PER_FORK = 2
_CHUNK_BYTES = 4_096
_RIGHTS_BYTES = socket.CMSG_SPACE(_DESCRIPTORS_PER_FORK * 64 * struct.calcsize("i"))
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_SOCKET_LEVEL, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)


def start(plan: dict[str, Any]) -> NoReturn:
    """Confine this process as `plan` says, wait for the supervisor's word, serve; never returns."""
    stdio.attach(plan["output_fd"])
    if plan["root"] is None:
        os.setpgid(0, 0)  # with all that comes of it, to be ended at once
    os.environ.clear()
    os.environ.update(plan["env"])
    proxy.prepare(plan["network"], 0, plan["ticket"])
    proxy.identify()
    os.chdir(plan["toolkit_directory"])
    zygote = _Zygote(plan)
    try:
        # Until the supervisor has looked at what it holds.
        privileges.show_to_tracers()
        zygote.confine()
        zygote.wait_for_go()
        if plan["is_confined"]:
            privileges.hide_from_tracers()
        zygote.run()
    except BaseException:  # the outer door: what the toolkit left behind must not unwind into ours
        stdio.flush()
        os._exit(1)
    os._exit(0)


class _Zygote:
    """Owns the control channel; decides when discovery is over; forks."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._channel = socket.socket(fileno=plan["zygote_fd"])
        self._let_go = super(socket.socket, self._channel).detach
        self._sending = threading.Lock()
        self._decoder = frames.TrustingDecoder()
        self._messages: deque[frames.Message] = deque()
        self._descriptors: deque[int] = deque()
        self._discovered = False
        self._has_forked = False
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def confine(self) -> None:
        """Put on every layer; tell which one was refused, and end."""
        try:
            self._layers = layers.confine_zygote(self._plan)
        except layers.Refused as refused:
            message = refused.message[:500]
            self._send(frames.encode("refused", refused.step, refused.errno, message))
            os._exit(1)

    def wait_for_go(self) -> None:
        """Tell that confinement is complete; the supervisor looks at it from outside first."""
        self._send(frames.encode("locked", self._layers.landlock_abi))
        while not self._messages:
            self._receive()
        if self._messages.popleft()[0] != "go":
            os._exit(1)

    def run(self) -> None:
        """Import the toolkit; discovery ends in it (start) or after it (end of the script)."""
        registry.on_registered = self._arm_interrupt
        registry.on_start = self._started_in_main_thread
        registry.on_stop = self._stopped
        signal.signal(signal.SIGALRM, self._interrupt)
        try:
            self._import_toolkit()
        except BaseException as error:  # whatever foreign code raises is its report, not our end
            self._disarm_interrupt()
            if not self._discovered:
                self._report_broken(error)
                return
        self._disarm_interrupt()
        if not self._discovered:
            self._finish_discovery("end")
        # Even with every client stopped: what was asked before may still need workers, and when
        # this jail ends is the supervisor's to say.
        self._serve(None)

    # -- discovery ---------------------------------------------------------------------------------

    def _import_toolkit(self) -> None:
        plan = self._plan
        call.rehearse()
        stdio.open_streams()
        for name, module in (
            ("atp_sdk", sys.modules[clients.__package__ or ""]),
            ("atp_sdk.clients", clients),
            ("atp_sdk.atp_sdk", sys.modules[clients.__package__ or ""]),
            ("atp_sdk.atp_sdk.clients", clients),
            ("atp_sandbox", _public_module()),
        ):
            sys.modules[name] = module
        site.setquit()  # `exit` and `quit`, which an interpreter without site lacks
        site.sethelper()
        if plan["network"] is not None:
            proxy.teach_clients()
        sys.path[:] = [*plan["toolkit_path"], *sys.path, *plan["site_path"]]
        path = os.path.join(plan["toolkit_directory"], plan["entry"])
        sys.argv = [path]
        sys.executable = plan["executable"]
        main = types.ModuleType("__main__")
        main.__dict__.update(
            __file__=path, __builtins__=builtins, __package__=plan["package"] or None
        )
        sys.modules["__main__"] = main
        importlib.invalidate_caches()
        if plan["package"]:
            importlib.import_module(plan["package"])
        with open(path, "rb") as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        exec(code, main.__dict__)

    def _arm_interrupt(self) -> None:
        """Once a client was started elsewhere, a main thread that only waits is interrupted."""
        if not self._discovered and any(c["started"] for c in registry.clients):
            signal.setitimer(signal.ITIMER_REAL, _SETTLE_AFTER_REGISTRATION_S)

    def _disarm_interrupt(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _interrupt(self, _number: int, _frame: types.FrameType | None) -> None:
        # Serves on top of the toolkit's main loop, which is thus never unwound nor resumed.
        if not self._discovered:
            self._finish_discovery("interrupted")
            self._serve(None)

    def _started_in_main_thread(self, client: int) -> None:
        self._disarm_interrupt()
        if not self._discovered:
            self._finish_discovery("start")
        self._serve(client)

    def _stopped(self, client: int) -> None:
        if self._discovered:
            self._send(frames.encode("stopped", client))
            os.write(self._wake_writer, b"\0")

    def _finish_discovery(self, ended: str) -> None:
        self._discovered = True
        stdio.flush()
        report = json.dumps(registry.report(ended)).encode()
        call.prepare(registry)
        self._layers.note_directories()
        gc.collect()
        gc.freeze()
        self._send(frames.encode("discovered", report))

    def _report_broken(self, error: BaseException) -> None:
        if isinstance(error, SystemExit):
            what = f"called sys.exit({'' if error.code is None else repr(error.code)[:100]})"
        else:
            what = f"raised {type(error).__name__}"
        shown = traceback.TracebackException.from_exception(error)
        shown.stack = traceback.StackSummary.from_list(
            [row for row in shown.stack if "/zygote.py" not in row.filename]
        )
        text = "".join(shown.format())[-_TRACEBACK_CHARS:]
        stdio.flush()
        plain = text.encode("utf-8", "backslashreplace").decode()
        self._send(frames.encode("broken", what, plain))

    # -- serving -----------------------------------------------------------------------------------

    def _serve(self, until_stopped: int | None) -> None:
        """Fork a worker for each request of the supervisor.

        Returns once that client is stopped; without one, never.
        """
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        while True:
            while self._messages:
                self._obey(self._messages.popleft())
            if until_stopped is not None and registry.clients[until_stopped]["stopped"]:
                return
            for fd, _ in poll.poll():
                if fd == self._wake_reader:
                    os.read(fd, 4096)
                else:
                    self._receive()

    def _obey(self, message: frames.Message) -> None:
        name, number, slot, ticket = message
        channel_fd, output_fd = self._descriptors.popleft(), self._descriptors.popleft()
        permits_fd = self._descriptors.popleft() if self._plan["calls_per_worker"] > 1 else -1
        call.prepare_fork(self._plan, number, slot, ticket, permits_fd)
        pid = 0
        if name == "fork":
            if not self._has_forked:
                self._has_forked = True
                huge_pages.collapse()
            try:
                pid = syscalls.fork_as_sibling()
            except OSError as error:
                self._send(frames.encode("fork_failed", number, error.errno or 0))
                pid = -1
        if pid == 0:
            os.close(self._let_go())
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            enter = self._layers.enter if name == "fork" else self._layers.enter_alone
            call.serve(self._plan, registry, enter, channel_fd, output_fd, number, slot, ticket)
        os.close(channel_fd)
        os.close(output_fd)
        if permits_fd >= 0:
            os.close(permits_fd)

    def _receive(self) -> None:
        data, ancillary, _flags, _address = self._channel.recvmsg(
            _CHUNK_BYTES, _RIGHTS_BYTES, _CLOSE_ON_EXEC
        )
        if not data:
            os._exit(0)
        for level, kind, payload in ancillary:
            if level == _SOCKET_LEVEL and kind == _RIGHTS:
                self._descriptors.extend(memoryview(payload).cast("i"))
        self._messages.extend(self._decoder.feed(data))

    def _send(self, frame: bytes) -> None:
        with self._sending:
            self._channel.sendall(frame)


def _public_module() -> types.ModuleType:
    """`atp_sandbox` as a script sees it that uses the library: only the drop-in client."""
    module = types.ModuleType("atp_sandbox", "The part of atp_sandbox that exists inside a jail.")
    names: list[str] = ["ToolKitClient"]
    module.ToolKitClient = clients.ToolKitClient  # type: ignore[attr-defined]
    module.__all__ = names  # type: ignore[attr-defined]
    return module
