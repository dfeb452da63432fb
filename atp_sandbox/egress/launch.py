"""Launching the egress process: its configuration, its channel, its user."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atp_sandbox.isolation import Isolation
from atp_sandbox.jails.channel import channel_pair
from atp_sandbox.policy import Reroute

BOOT = Path(__file__).parent / "boot.py"
_CERTIFICATE_SETTINGS = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Environment by which OpenSSL finds what the machine trusts."""
_RESOLVER_OPTIONS = {"RES_OPTIONS": "ndots:1"}
"""A name with a dot is asked for as it is before any search domain is tried: resolv.conf(5)."""


@dataclass(frozen=True, slots=True)
class Launched:
    """The process, and our end of its channel."""

    process: subprocess.Popen[bytes]
    channel: socket.socket


def launch(
    isolation: Isolation,
    reroutes: Sequence[Reroute],
    *,
    outside_id: int | None,
    injects: bool,
    output_writer: int,
) -> Launched:
    """Start the egress process; `output_writer` is closed here, also after OSError.

    `outside_id`: the user that a root supervisor gives it; `injects`: whether tokens are put in.
    """
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        theirs.callback(os.close, output_writer)
        channel, channel_theirs = channel_pair()
        ours.enter_context(channel)
        theirs.enter_context(channel_theirs)
        config_fd = os.memfd_create("egress")
        theirs.callback(os.close, config_fd)
        config = {
            "path": sys.path,
            "channel_fd": channel_theirs.fileno(),
            "outside_id": outside_id,
            "has_landlock": isolation.has_landlock,
            "has_seccomp": isolation.has_seccomp,
            "reroutes": [
                [one.endpoint.host, one.endpoint.port, list(one.addresses), one.port]
                for one in reroutes
            ],
            "injects": injects,
        }
        os.write(config_fd, json.dumps(config).encode())
        os.lseek(config_fd, 0, os.SEEK_SET)
        environment = {n: os.environ[n] for n in _CERTIFICATE_SETTINGS if n in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(BOOT), str(config_fd)],
            pass_fds=(config_fd, channel_theirs.fileno()),
            env=environment | _RESOLVER_OPTIONS,
            stdin=subprocess.DEVNULL,
            stdout=output_writer,
            stderr=output_writer,
            start_new_session=True,
            cwd="/",
        )
        ours.pop_all()
    return Launched(process, channel)
