"""`atp-sandbox backend`: in the foreground, or as `EmbeddedBackend` starts it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import signal
import socket
from typing import TYPE_CHECKING

import click

from atp_sandbox import log
from atp_sandbox.errors import SandboxError, UsageError
from workers.confinement import privileges

if TYPE_CHECKING:
    from atp_sandbox.backend.app import Server


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on: a loopback one, unless --allow-remote is given.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8700,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--allow-remote",
    is_flag=True,
    help="Listen where other machines can reach it. Whoever can, may call every tool.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the ready line and the log as JSON.")
@click.option("--ready-fd", type=click.IntRange(3), hidden=True)
@click.option("--parent-fd", type=click.IntRange(3), hidden=True)
def backend(
    host: str,
    port: int,
    allow_remote: bool,
    as_json: bool,
    ready_fd: int | None,
    parent_fd: int | None,
) -> None:
    """Run a small ATP backend on this machine, to develop toolkits against.

    Toolkits connect to it as to the real one, over a websocket or by polling: give them its URL
    as base_url, and any API key. People call the tools over HTTP. It keeps nothing on disk and
    ends with Ctrl-C.

    \b
    Example:
      atp-sandbox backend --port 8700
      curl http://127.0.0.1:8700/tools
      curl http://127.0.0.1:8700/tools/echo -d '{"params": {"text": "hello"}}'
    """
    log.configure(
        "json" if as_json else "text", level=log.INFO if ready_fd is None else log.WARNING
    )
    try:
        listener = listen(host, port, allow_remote=allow_remote)
    except SandboxError as error:
        if ready_fd is None:
            raise
        row = {"error": error.message, "cause": error.cause, "tip": error.tip}
        _tell(ready_fd, row)
        raise SystemExit(error.exit_code) from None

    address, port = listener.getsockname()[:2]
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

    def announce() -> None:
        if ready_fd is not None:
            _tell(ready_fd, port)
        elif as_json:
            click.echo(json.dumps({"url": url, "host": address, "port": port}))
        else:
            click.echo(f"backend ready at {url}  (tools: curl {url}/tools; end with Ctrl-C)")

    from atp_sandbox.backend.app import Server, create_app

    names = {host, f"[{address}]" if ":" in address else address}
    if allow_remote:
        names.add(socket.gethostname())
    app = create_app(host_names=names, allow_remote=allow_remote)
    with contextlib.closing(listener):
        asyncio.run(_serve(Server(app, announce), listener, parent_fd))


async def _serve(server: Server, listener: socket.socket, parent_fd: int | None) -> None:
    """Serve until SIGINT, SIGTERM or the parent's end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)

    if parent_fd is not None:
        privileges.die_with_parent()  # also while it is stopped

        def on_parent() -> None:
            if not os.read(parent_fd, 4096):
                loop.remove_reader(parent_fd)
                server.stop()

        loop.add_reader(parent_fd, on_parent)
    await server.serve(sockets=[listener])


def listen(host: str, port: int, *, allow_remote: bool) -> socket.socket:
    """A listening socket on `host`, which was looked up once: what is judged is what is bound."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"cannot listen on {host!r}", cause=str(error), tip="give an address of this machine"
        ) from None
    family, _, _, _, address = min(found, key=lambda row: row[0] != socket.AF_INET)
    if not allow_remote and not ipaddress.ip_address(address[0]).is_loopback:
        raise UsageError(
            f"the backend does not listen on {host}",
            cause="this backend has no authentication: every machine that reaches it "
            "could call every tool",
            tip="leave --host out, or add --allow-remote if that is what you want",
        )
    # Named, not 0: asyncio sets TCP_NODELAY only then, and without it a request can take 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # now, not in uvicorn: with SO_REUSEADDR a taken port may fail here
    except OSError as error:
        listener.close()
        code = error.errno or 0
        tips = {
            errno.EADDRINUSE: "choose another with --port; --port 0 takes a free one",
            errno.EACCES: "ports below 1024 need privileges; choose another with --port",
            errno.EADDRNOTAVAIL: "give an address of this machine",
        }
        raise SandboxError(
            f"cannot listen on {host}, port {port}",
            cause=f"{os.strerror(code)} ({errno.errorcode.get(code, code)})",
            tip=tips.get(code, ""),
        ) from None
    return listener


def _tell(ready_fd: int, value: object) -> None:
    """Write the one line that whoever started us waits for. If it is gone, so be it."""
    with contextlib.suppress(BrokenPipeError):
        os.write(ready_fd, json.dumps(value).encode() + b"\n")
    os.close(ready_fd)
