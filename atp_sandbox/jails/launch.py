"""Launching a jail: the plan, the channels, the first process and its unprivileged user."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from atp_sandbox.confinement.plan import JailSpec, jail_plan
from atp_sandbox.jails.channel import channel_pair
from atp_sandbox.jails.host import host_view
from workers import frames

_BOOT = Path(frames.__file__).parent / "boot.py"
_FIRST_ID = 1_879_048_192
"""First of the user ids that systemd's table of ranges leaves unused ("Users, Groups, UIDs")."""
_ID_COUNT = 2**27
_used_ids: set[int] = set()


@dataclass(frozen=True, slots=True)
class Launched:
    """A jail on its way: our ends of both channels, and the process that builds it."""

    builder: subprocess.Popen[bytes]
    warden: socket.socket
    zygote: socket.socket
    network: socket.socket | None
    """On which the warden passes its listening sockets out, before foreign code runs."""


def launch(spec: JailSpec, *, outside_id: int | None, output_writer: int) -> Launched:
    """Start building the jail; `output_writer` is closed here, also after OSError."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        theirs.callback(os.close, output_writer)
        warden_ours, warden_theirs = channel_pair()
        ours.enter_context(warden_ours)
        theirs.enter_context(warden_theirs)
        zygote_ours, zygote_theirs = channel_pair()
        ours.enter_context(zygote_ours)
        theirs.enter_context(zygote_theirs)
        plan = jail_plan(host_view(), spec, outside_id=outside_id)
        plan["warden_fd"] = warden_theirs.fileno()
        plan["zygote_fd"] = zygote_theirs.fileno()
        plan["output_fd"] = output_writer
        network_ours: socket.socket | None = None
        passed = [warden_theirs.fileno(), zygote_theirs.fileno(), output_writer]
        if spec.network is not None:
            network_ours, network_theirs = socket.socketpair()
            ours.enter_context(network_ours)
            theirs.enter_context(network_theirs)
            plan["network_fd"] = network_theirs.fileno()
            passed.append(network_theirs.fileno())
        plan_fd = os.memfd_create("plan")
        theirs.callback(os.close, plan_fd)
        os.write(plan_fd, json.dumps(plan).encode())
        os.lseek(plan_fd, 0, os.SEEK_SET)
        builder = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_BOOT), str(plan_fd)],
            pass_fds=(plan_fd, *passed),
            env={},
            stdin=subprocess.DEVNULL,
            stdout=output_writer,
            stderr=output_writer,
            start_new_session=True,
            cwd="/",
        )
        ours.pop_all()
    return Launched(builder, warden_ours, zygote_ours, network_ours)


def allocate_id() -> int | None:
    """A user id that no other jail of ours has, if we are root: its kernel counters are its own."""
    if os.geteuid() != 0:
        return None
    while True:
        candidate = _FIRST_ID + secrets.randbelow(_ID_COUNT)
        if candidate not in _used_ids:
            _used_ids.add(candidate)
            return candidate


def release_id(outside_id: int | None) -> None:
    """Give an id back once nothing runs under it."""
    if outside_id is not None:
        _used_ids.discard(outside_id)
