"""The jail's way out: sockets made in its network namespace that are accepted on from outside.

A socket belongs to the namespace in which it was made, whoever holds it: network_namespaces(7).
Until somebody calls listen(2) on one, the kernel refuses connections to it.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Sequence


def bind_and_pass(ports: Sequence[int], channel_fd: int) -> None:
    """Bind a socket for each port, in order, and pass them all out; nothing of it stays here.

    Ports below 1024 need CAP_NET_BIND_SERVICE over the namespace, which the warden has.
    """
    with socket.socket(fileno=channel_fd) as channel:
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in ports]
        try:
            for sock, port in zip(sockets, ports):
                # Without SO_REUSEADDR, so that nobody can bind beside it.
                sock.bind(("0.0.0.0", port))
            rights = array.array("i", [sock.fileno() for sock in sockets])
            channel.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        finally:
            for sock in sockets:
                sock.close()
