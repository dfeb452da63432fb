"""The egress process: what it gave up, what it lets through, and what its end does."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import http.server
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from conftest import PATIENCE_S, LogLine, NodeMaker, ServedNode, toolkit_text
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.egress import dial, launch, lockdown, messages, service
from atp_sandbox.egress.budget import Budget
from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.gate import Gate, Target
from atp_sandbox.egress.relay import check_hello
from atp_sandbox.errors import IsolationError
from atp_sandbox.isolation import Isolation, Level, Waivable
from atp_sandbox.jails.processes import read_status
from atp_sandbox.policy import EgressPolicy, Reroute, parse_reroute, policy_of
from atp_sandbox.settings import ToolkitSettings
from workers.frames import FrameError, encode

ROOT = Path(__file__).resolve().parents[1]
HOST = "api.example.com"
SECRET_BODY = b"what only the stand-in says"
AT_ONCE_S = 15.0
"""What is refused takes milliseconds, a process on a busy machine some seconds to start; whoever
waits in vain takes the twenty of the sockets' own patience."""
PROBE_TOOLKIT = toolkit_text(
    """
    @tool
    def probe(source, name, arguments, **_):
        scope = {}
        exec(source, scope)
        return scope[name](*arguments)
    """
)


class StandIn:
    """An HTTP server on this machine's loopback that counts who comes."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(SECRET_BODY)))
                self.end_headers()
                self.wfile.write(SECRET_BODY)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.close()


def fetch(host: str, port: int) -> str:
    """Inside: one plain HTTP exchange over a socket, or the error."""
    import socket

    try:
        with socket.create_connection((host, port), 20) as sock:
            sock.sendall(b"GET /direct HTTP/1.0\r\n\r\n")
            data = b""
            while chunk := sock.recv(65536):
                data += chunk
    except OSError as error:
        return type(error).__name__
    return data.decode("latin-1")


def ask_proxy(request: str, credentials: str) -> str:
    """Inside: send `request` to the proxy as it is; `credentials` "own", "none" or a text."""
    import base64
    import os
    import socket
    from urllib.parse import urlsplit

    url = urlsplit(os.environ["HTTPS_PROXY"])
    if credentials == "own":
        credentials = f"{url.username}:{url.password}"
    head = ""
    if credentials != "none":
        head = f"Proxy-Authorization: Basic {base64.b64encode(credentials.encode()).decode()}\r\n"
    with socket.create_connection((url.hostname, url.port), 20) as sock:
        sock.sendall(request.replace("CREDENTIALS", head).encode())
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
    return data.decode("latin-1")


def connect(authority: str, then: str = "") -> str:
    """A CONNECT for `authority`, followed at once by `then`."""
    return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nCREDENTIALS\r\n{then}"


def get(url: str, host: str) -> str:
    return f"GET {url} HTTP/1.1\r\nHost: {host}\r\nCREDENTIALS\r\n"


def toward(stand_in: StandIn, *more: str, private: bool = True) -> dict[str, Any]:
    """Arguments of `make_node`: HOST:8080 is the stand-in."""
    endpoint = f"{HOST}:8080"
    return {
        "egress": policy_of([endpoint, *more], [HOST] if private else []),
        "reroutes": [parse_reroute(endpoint, f"127.0.0.1:{stand_in.port}")],
    }


def egress_of(node: ServedNode) -> service.EgressService:
    found = node.node.egress
    assert found is not None
    return found


# -- what it gave up -------------------------------------------------------------------------------


def in_child(attempt: Callable[[], object], *, has_landlock: bool = True) -> str:
    """What comes of `attempt` in a process that is locked down: `done`, or the error's name."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outside = 1_800_000_000 if os.geteuid() == 0 else None
            threads = threading.active_count
            threading.active_count = lambda: 1  # those of the test's own process are not here
            lockdown.lock_down(outside, has_landlock=has_landlock, has_seccomp=True)
            threading.active_count = threads
            attempt()
            os.write(writer, b"done")
        except BaseException as error:  # the child's outer door
            os.write(writer, f"{type(error).__name__} {error}".encode()[:200])
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        told = file.read()
    os.waitpid(pid, 0)
    return told


def signal_thread(pid: int) -> None:
    """tgkill(2) with signal 0: whether it would be allowed."""
    number = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, pid, pid, 0) != 0:
        raise OSError(ctypes.get_errno(), "tgkill")


FORBIDDEN: dict[str, Callable[[], object]] = {
    "start a program": lambda: os.execv("/bin/true", ["true"]),
    "make a process": os.fork,
    "read a file": lambda: open(__file__).close(),
    "read what its own process tells": lambda: open("/proc/self/status").close(),
    "make a file": lambda: open("/tmp/egress-was-here", "x").close(),
    "change a file": lambda: open("/etc/hosts", "a").close(),
    "reach a service of this machine": lambda: socket.socket(socket.AF_UNIX),
    "make a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "ask the kernel for its network": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "signal its group": lambda: os.kill(0, 0),
    "signal a thread of another process": lambda: signal_thread(os.getppid()),
    "make a pair that could send to any path": lambda: socket.socketpair(
        socket.AF_UNIX, socket.SOCK_DGRAM
    ),
    "take a port": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(("127.0.0.1", 0)),
    "become somebody else": lambda: os.setresuid(0, 0, 0) if os.geteuid() else os.fork(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_egress_process_cannot(what: str) -> None:
    told = in_child(FORBIDDEN[what])
    assert told.split()[0] in ("PermissionError", "OSError"), told


def test_without_its_file_layer_a_file_can_be_read() -> None:
    """The control of the test above, switched off."""
    assert in_child(lambda: os.close(os.open("/proc/self/status", 0)), has_landlock=False) == "done"


def test_the_egress_process_can_still_dial_and_resolve() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def reach() -> None:
        assert dial.SystemResolver  # which was imported before, as in the real one
        socket.create_connection(listener.getsockname(), 5).close()
        socket.getaddrinfo("localhost", 80)

    with listener:
        assert in_child(reach) == "done"


def test_a_name_that_the_machine_resolves_is_dialled(make_node: NodeMaker) -> None:
    """By the real resolver, from within the lock-down: every other test gives the answer itself."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        listener = socket.create_server((address, 0))
    except OSError as error:
        pytest.skip(f"this machine's own name does not resolve to it: {error}")
    with listener:
        port = listener.getsockname()[1]
        listener.settimeout(20)
        host = threading.Thread(target=lambda: listener.accept()[0].close())
        host.start()
        node = make_node(PROBE_TOOLKIT, egress=policy_of([f"{name}:{port}"], [name]))
        assert node.inside(_reach, name, port) == "connected"
        host.join()


def _reach(host: str, port: int) -> str:
    import socket

    with socket.create_connection((host, port), 20) as sock:
        # Accepted by the egress process at once; only the host itself ends it in an orderly way.
        return "connected" if sock.recv(1) == b"" else "talked to"


def test_the_kernel_says_that_the_egress_process_is_confined(make_node: NodeMaker) -> None:
    node = make_node(PROBE_TOOLKIT)
    pid = egress_of(node).pid
    assert pid is not None
    status = read_status(pid)
    assert status.capabilities == 0
    assert status.no_new_privs
    assert status.is_filtered
    if os.geteuid() == 0:
        assert status.uid >= 1_000_000_000
        assert status.bounding == 0
    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert all(
        part in (b"-I", b"-S", b"-B", b"") or b"/" in part or part.isdigit() for part in command
    )


def test_the_egress_process_has_no_variable_of_ours(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET_OF_THE_SUPERVISOR", "x" * 20)
    pid = egress_of(make_node(PROBE_TOOLKIT)).pid
    assert b"A_SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_start_that_the_egress_process_fails_says_which_layer(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    boot = tmp_path / "boot.py"
    boot.write_text("raise SystemExit('no such thing here')")
    monkeypatch.setattr(launch, "BOOT", boot)
    node = make_node(PROBE_TOOLKIT)
    with pytest.raises(IsolationError, match="egress process") as caught:
        _ = node.discovery
    assert "no such thing here" in caught.value.cause


def test_egress_needs_a_network_of_the_jails_own() -> None:
    for level in (Level.CONTAINER, Level.NONE):
        with pytest.raises(ValueError, match="egress needs isolation strict"):
            ToolkitSettings(
                "kit", Path("kit.py"), isolation=Isolation(level), egress=policy_of([HOST])
            )


def test_where_landlock_is_waived_the_egress_process_does_without(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    isolation = Isolation(Level.STRICT, frozenset({Waivable.LANDLOCK}))
    node = make_node(PROBE_TOOLKIT, isolation=isolation, **toward(stand_in))
    assert SECRET_BODY.decode() in node.inside(fetch, HOST, 8080)


LESS = Isolation(Level.STRICT, frozenset({Waivable.LANDLOCK, Waivable.SECCOMP}))


def test_what_one_toolkit_waived_the_egress_process_of_others_has(
    make_node: NodeMaker, stand_in: StandIn, tmp_path: Path, logged: list[LogLine]
) -> None:
    """There is one for all; it is replaced if it has less than a toolkit wants."""
    node = make_node(PROBE_TOOLKIT, isolation=LESS, **toward(stand_in))
    egress = egress_of(node)
    first = egress.pid
    assert first is not None
    assert not read_status(first).is_filtered
    other = tmp_path / "other.py"
    other.write_text(PROBE_TOOLKIT)
    node.node.add(ToolkitSettings("other", other))
    node.until(lambda: egress._is_ready and egress.pid != first, "its successor")
    assert read_status(egress.pid or 0).is_filtered
    wait_for(node, lambda: SECRET_BODY.decode() in node.inside(fetch, HOST, 8080))


def test_it_is_known_what_all_toolkits_need_before_the_egress_process_is_launched(
    make_node: NodeMaker,
) -> None:
    node = make_node(PROBE_TOOLKIT)
    egress = service.EgressService(
        node.loop, on_failed=lambda _error: None, on_denied=lambda *_: None
    )
    egress.expect(EgressPolicy(), LESS)
    assert egress._isolation == LESS
    egress.expect(policy_of([HOST], inject={"hub": [HOST]}), Isolation())
    egress.expect(EgressPolicy(), LESS)
    assert (egress._isolation, egress._injects) == (Isolation(), True)


# -- what it lets through --------------------------------------------------------------------------


def test_an_allowed_host_is_reached_by_its_name(make_node: NodeMaker, stand_in: StandIn) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    assert SECRET_BODY.decode() in node.inside(fetch, HOST, 8080)
    assert stand_in.paths == ["/direct"]


def test_a_jail_without_a_policy_reaches_nothing(make_node: NodeMaker, stand_in: StandIn) -> None:
    node = make_node(PROBE_TOOLKIT)
    assert node.inside(fetch, "127.0.0.1", stand_in.port) == "ConnectionRefusedError"
    assert node.inside(fetch, HOST, 8080) == "gaierror"
    assert node.inside(fetch, "169.254.169.254", 80) == "OSError"
    assert " 403 blocked by policy: " in node.inside(ask_proxy, connect(f"{HOST}:8080"), "own")
    assert stand_in.paths == []


def test_a_host_with_a_private_address_must_be_named_as_private(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in, private=False))
    assert node.inside(fetch, HOST, 8080) == "ConnectionResetError"
    answer = node.inside(ask_proxy, connect(f"{HOST}:8080"), "own")
    assert f"403 blocked by policy: {HOST}:8080 resolves to a loopback address" in answer
    assert stand_in.paths == []


def test_metadata_is_refused_even_to_a_host_that_may_be_private(make_node: NodeMaker) -> None:
    node = make_node(
        PROBE_TOOLKIT,
        egress=policy_of([f"{HOST}:80"], [HOST]),
        reroutes=[parse_reroute(f"{HOST}:80", "169.254.169.254")],
    )
    answer = node.inside(ask_proxy, get(f"http://{HOST}/", HOST), "own")
    assert f"403 blocked by policy: {HOST}:80 resolves to a cloud metadata address" in answer


def test_an_answer_that_changes_is_judged_each_time(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    """A rebinding resolver: public and nowhere, then this machine, in turn."""
    rebinding = Reroute(
        parse_reroute(f"{HOST}:8080", "127.0.0.1").endpoint,
        ("169.254.169.254", "127.0.0.1", "10.0.0.1", "::1"),
        stand_in.port,
    )
    node = make_node(PROBE_TOOLKIT, egress=policy_of([f"{HOST}:8080"]), reroutes=[rebinding])
    answers = {node.inside(fetch, HOST, 8080) for _ in range(8)}
    assert answers == {"ConnectionResetError"}
    assert stand_in.paths == []


def test_nobody_asks_the_proxy_without_a_ticket_of_this_jail(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    request = get(f"http://{HOST}:8080/", f"{HOST}:8080")
    for credentials in ("none", "x:y", "worker-1:" + "0" * 32, "worker-1:"):
        assert " 407 " in node.inside(ask_proxy, request, credentials)
    assert stand_in.paths == []
    assert " 200 " in node.inside(ask_proxy, request, "own")


def own_credentials() -> str:
    """Inside: what stands in the proxy variable."""
    import os
    from urllib.parse import urlsplit

    url = urlsplit(os.environ["HTTPS_PROXY"])
    return f"{url.username}:{url.password}"


def test_a_jail_cannot_use_the_ticket_of_another(make_node: NodeMaker, stand_in: StandIn) -> None:
    allowed = make_node(PROBE_TOOLKIT, **toward(stand_in))
    other = make_node(PROBE_TOOLKIT)
    theirs = allowed.inside(own_credentials)
    answer = other.inside(ask_proxy, connect(f"{HOST}:8080"), theirs)
    assert " 407 " in answer
    assert stand_in.paths == []


def test_each_call_has_a_ticket_of_its_own(make_node: NodeMaker) -> None:
    node = make_node(PROBE_TOOLKIT)
    assert len({node.inside(own_credentials) for _ in range(4)}) == 4


@pytest.mark.parametrize(
    ("request_text", "reason"),
    [
        (connect("evil.example:443"), "evil.example:443 is not allowed for toolkit kit"),
        (connect(f"{HOST}:8081"), f"{HOST}:8081 is not allowed for toolkit kit"),
        (connect(HOST), "no host name with a port"),
        (connect("127.0.0.1:8080"), "127.0.0.1:8080 is an address"),
        (connect("[::1]:8080"), "::1:8080 is an address"),
        (connect("[fe80::1%eth0]:8080"), "no host name with a port"),
        (connect("127.1:8080"), "no host name with a port"),
        (connect(f"{HOST}:08080"), "no host name with a port"),
        (get("http://evil.example/", "evil.example"), "evil.example:80 is not allowed"),
        (get(f"http://{HOST}:8080/", "evil.example"), "another Host header"),
        (get(f"http://evil.example@{HOST}:8080/", f"{HOST}:8080"), "no host name with a port"),
        (get(f"https://{HOST}:8080/", HOST), "no http:// URI"),
        (get("/", HOST), "no http:// URI"),
        (get(f"http://{HOST}:8080\\@evil.example/", HOST), "no host name with a port"),
        ("nonsense\r\n\r\n", "broken HTTP"),
    ],
)
def test_what_the_proxy_refuses_it_names_in_its_status_line(
    make_module_node: NodeMaker, shared: ServedNode, request_text: str, reason: str
) -> None:
    status = shared.inside(ask_proxy, request_text, "own").split("\r\n")[0]
    assert status.startswith("HTTP/1.1 403 blocked by policy: ")
    assert reason in status


@pytest.fixture(scope="module")
def shared(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(PROBE_TOOLKIT, egress=policy_of([f"{HOST}:8080"]))


def test_a_failed_call_says_what_was_denied_to_it(shared: ServedNode) -> None:
    def fail(request: str) -> None:
        import contextlib
        import socket
        from urllib.request import urlopen

        for name in ("first.example", "second.example"):
            with contextlib.suppress(OSError):
                socket.getaddrinfo(name, 443)
        urlopen("http://third.example/", timeout=5)

    ticket = shared.begin_inside(fail, "")
    shared.finish(ticket)
    reason = "is not allowed for toolkit kit"
    assert ticket.failure.details["denied"] == [
        {"host": "first.example", "port": None, "reason": reason},
        {"host": "second.example", "port": None, "reason": reason},
        {"host": "third.example", "port": 80, "reason": reason},
    ]


def test_what_an_import_asked_for_is_logged_and_in_no_answer(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    text = PROBE_TOOLKIT.replace(
        "client.start()",
        "import socket\ntry:\n    socket.getaddrinfo('import.example', 443)\n"
        "except OSError:\n    pass\nclient.start()",
    )
    node = make_node(text)
    ticket = node.begin_inside(_fail)
    node.finish(ticket)
    assert "denied" not in ticket.failure.details
    assert [x.fields["host"] for x in logged if x.event == "connection"] == ["import.example"]


def _fail() -> None:
    raise RuntimeError("for no such reason")


def test_a_connection_is_logged_with_what_it_moved_and_nothing_of_its_content(
    make_node: NodeMaker, stand_in: StandIn, logged: list[LogLine]
) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    node.inside(fetch, HOST, 8080)
    node.until(lambda: any(x.event == "connection" for x in logged), "the line")
    (line,) = [x for x in logged if x.event == "connection"]
    assert line.fields["host"] == HOST
    assert line.fields["port"] == 8080
    assert line.fields["address"] == "127.0.0.1"
    assert line.fields["sent_bytes"] == len("GET /direct HTTP/1.0\r\n\r\n")
    assert int(str(line.fields["received_bytes"])) > len(SECRET_BODY)
    assert line.fields["verdict"] == "allowed"
    assert "/direct" not in repr(logged)


def test_a_flood_of_denials_is_bounded_in_the_log(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    def flood() -> int:
        import os
        import socket
        from urllib.parse import urlsplit

        url = urlsplit(os.environ["HTTPS_PROXY"])
        for _ in range(1_000):
            with socket.create_connection((url.hostname, url.port), 20) as sock:
                sock.sendall(b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
                sock.recv(100)
        return 1_000

    node = make_node(PROBE_TOOLKIT)
    assert node.inside(flood) == 1_000
    node.close()
    told = [x for x in logged if x.event == "connection"]
    assert len(told) < 800
    dropped = [x.message for x in told if "more connections are not told of" in x.message]
    assert dropped


def ask_without_end(seconds: float) -> int:
    """Inside: questions to the jail's resolver, as fast as they are answered."""
    import socket
    import struct
    import time

    asked, until = 0, time.monotonic() + seconds
    question = b"\1x\7example\0" + struct.pack(">HH", 1, 1)
    message = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0) + question
    while time.monotonic() < until:
        with socket.create_connection(("127.128.0.2", 53), 20) as sock:
            try:
                while time.monotonic() < until:
                    sock.sendall((struct.pack(">H", len(message)) + message) * 20)
                    if not sock.recv(65536):
                        break
                    asked += 20
            except OSError:
                continue
    return asked


def test_a_flood_of_questions_keeps_nobody_else_waiting(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    flood = node.begin_inside(ask_without_end, 25.0)
    node.until(lambda: node.toolkit and node.toolkit.running == 1, "its start")
    before = time.monotonic()
    for _ in range(3):
        assert SECRET_BODY.decode() in node.inside(fetch, HOST, 8080)
    assert time.monotonic() - before < AT_ONCE_S
    assert flood.outcomes == [], "it goes on all the while"


def test_a_connection_to_the_resolver_has_a_number_of_questions(shared: ServedNode) -> None:
    def ask() -> int:
        import socket
        import struct

        question = b"\1x\7example\0" + struct.pack(">HH", 1, 1)
        message = struct.pack(">HHHHHH", 1, 0x0100, 1, 0, 0, 0) + question
        framed = struct.pack(">H", len(message)) + message
        answered = 0
        with socket.create_connection(("127.128.0.2", 53), 20) as sock:
            try:
                while True:
                    sock.sendall(framed)
                    if len(sock.recv(4096)) < 12:
                        return answered
                    answered += 1
            except OSError:
                return answered

    assert shared.inside(ask) == 64


def test_what_a_toolkit_looks_up_slowly_counts_until_it_is_found() -> None:
    """Whoever owns a domain may answer as slowly as he likes, and threads are few."""

    class Slow:
        async def resolve(self, host: str, port: int) -> tuple[list[str], int]:
            await answered.wait()
            return ["192.0.2.1"], port

    async def look_up() -> None:
        semaphore = asyncio.Semaphore(2)
        policy = policy_of([HOST])
        gate = Gate(1, "kit", policy, b"", [], semaphore, Budget(1, 1))
        for _ in range(2):
            with pytest.raises(Failed, match="could not be resolved in time"):
                await dial.dial(gate, Target(HOST, 443), Slow())
        assert semaphore.locked()
        answered.set()
        await asyncio.sleep(0.01)
        assert not semaphore.locked()

    answered = asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "_RESOLVE_S", 0.01)
        asyncio.run(look_up())


# -- what it tells ---------------------------------------------------------------------------------

LINE = ["connection", 1, 1, HOST, 443, "192.0.2.1", 1, 2, 3, "denied", "is not allowed"]


def test_a_line_of_a_connection_is_read() -> None:
    assert messages.read_connection(LINE).host == HOST


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (3, "x" * 254),
        (3, "e\u200bvil"),
        (3, "a\nb"),
        (4, 0),
        (4, 65_536),
        (5, "1" * 65),
        (5, "\x1b[31m"),
        (6, -1),
        (9, "fine"),
        (10, "y" * 301),
        (10, "a\rb"),
        (2, -2),
    ],
)
def test_a_line_that_cannot_be_is_a_violation(place: int, value: object) -> None:
    with pytest.raises(FrameError):
        messages.read_connection([*LINE[:place], value, *LINE[place + 1 :]])


@given(st.lists(st.floats(0, 10), max_size=200))
def test_a_budget_lets_no_more_pass_than_it_says(steps: list[float]) -> None:
    budget, now, taken = Budget(5, 2.0), 0.0, 0
    for step in steps:
        now += step
        taken += budget.take(now)
    assert taken <= 5 + 2.0 * now + 1e-6
    assert taken + budget.dropped == len(steps)


# -- its end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        encode("close", 1, 2),
        encode("open", 99, "kit", b"{}", b"", b"", b""),
        encode("fill", 1, "p", "x", bytes(2 * 1024 * 1024)),
    ],
)
def test_an_order_that_it_cannot_take_in_ends_it_and_a_successor_takes_over(
    make_node: NodeMaker, stand_in: StandIn, frame: bytes
) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    egress = egress_of(node)
    first = egress.pid
    assert egress._channel is not None
    egress._channel.send(frame)
    node.until(lambda: egress.pid not in (None, first) and egress._is_ready, "its successor")
    wait_for(node, lambda: SECRET_BODY.decode() in node.inside(fetch, HOST, 8080))


def test_an_egress_process_that_hangs_is_ended_and_replaced(
    make_node: NodeMaker, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(PROBE_TOOLKIT, lifetime="jail", concurrency=1, **toward(stand_in))
    egress = egress_of(node)
    first = egress.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(service, "_OPEN_S", 1.0)
    node.assert_healthy()  # which makes another jail ahead of need
    node.until(lambda: egress.pid != first, "its end")
    monkeypatch.undo()
    node.until(lambda: egress.pid not in (None, first) and egress._is_ready, "its successor")
    wait_for(node, lambda: SECRET_BODY.decode() in node.inside(fetch, HOST, 8080))


def test_a_successor_that_cannot_be_launched_is_tried_again(
    make_node: NodeMaker, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, logged: list[LogLine]
) -> None:
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    egress = egress_of(node)
    launched = service.launch

    def fail_once(*_arguments: object, output_writer: int, **_more: object) -> NoReturn:
        os.close(output_writer)
        monkeypatch.setattr(service, "launch", launched)
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(service, "launch", fail_once)
    os.kill(egress.pid or 0, signal.SIGKILL)
    node.until(lambda: any(x.event == "egress_restarted" for x in logged), "its successor")
    assert any(x.event == "egress_failed" for x in logged)
    wait_for(node, lambda: SECRET_BODY.decode() in node.inside(fetch, HOST, 8080))


def test_an_egress_process_that_tells_too_much_is_ended(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    node = make_node(PROBE_TOOLKIT)
    egress = egress_of(node)
    first = egress.pid
    for _ in range(20_000):  # which is faster than 200 a second
        egress._on_message(list(LINE), first or 0)
        if egress.pid is None:
            break
    assert egress.pid is None
    ended = [x.fields["reason"] for x in logged if x.event == "egress_ended"]
    assert ended == ["it told of more connections than there can be"]
    node.until(lambda: egress._is_ready, "its successor")


def test_when_the_egress_process_dies_connections_are_refused_until_it_is_back(
    make_node: NodeMaker, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, logged: list[LogLine]
) -> None:
    monkeypatch.setattr(service, "_STABLE_S", 3_600.0)
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    egress = egress_of(node)
    egress._restart_s = 3_600.0  # until we say so
    first = egress.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    node.until(lambda: egress.pid is None, "word of its end")
    before = time.monotonic()
    assert node.inside(fetch, HOST, 8080) == "ConnectionRefusedError"
    assert node.inside(fetch, "evil.example", 80) == "gaierror"
    assert time.monotonic() - before < AT_ONCE_S
    assert egress._timer is not None
    egress._timer.cancel()
    egress._launch()
    node.until(lambda: any(x.event == "egress_restarted" for x in logged), "its successor")
    assert [x.event for x in logged if x.event.startswith("egress_")] == [
        "egress_ended",
        "egress_restarted",
    ]
    assert egress.pid not in (None, first)
    wait_for(node, lambda: SECRET_BODY.decode() in node.inside(fetch, HOST, 8080))
    node.assert_healthy()


def wait_for(node: ServedNode, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline


def test_a_connection_that_waits_is_reset_when_the_egress_process_dies(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    """It had accepted nothing yet: stopped, so that the kernel queues what comes."""
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    first = egress_of(node).pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    ticket = node.begin_inside(fetch, HOST, 8080)
    node.until(lambda: _queued(node), "a connection in the queue")
    os.kill(first, signal.SIGKILL)
    node.finish(ticket)
    assert ticket.value == "ConnectionResetError"


def _queued(node: ServedNode) -> bool:
    """Whether a listening socket of the jail has a connection that nobody accepted: tcp(7)."""
    (network,) = egress_of(node)._jails.values()
    unacked = 24  # offset of tcpi_unacked in struct tcp_info: of a listener, its queue
    infos = (s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104) for s in network.listeners)
    return any(int.from_bytes(i[unacked : unacked + 4], sys.byteorder) for i in infos)


def test_a_jail_that_is_made_while_there_is_no_egress_process_serves_all_the_same(
    make_node: NodeMaker, stand_in: StandIn
) -> None:
    node = make_node(PROBE_TOOLKIT, lifetime="jail", concurrency=1, **toward(stand_in))
    egress = egress_of(node)
    egress._restart_s = 3.0
    os.kill(egress.pid or 0, signal.SIGKILL)
    node.until(lambda: egress.pid is None, "word of its end")
    node.assert_healthy()  # each of these has a jail of its own
    node.assert_healthy()


def test_the_egress_process_ends_with_the_supervisor(make_node: NodeMaker) -> None:
    node = make_node(PROBE_TOOLKIT)
    pid = egress_of(node).pid
    node.close()
    assert not Path(f"/proc/{pid}").exists()


def test_an_ended_jail_leaves_no_socket_behind(make_node: NodeMaker, stand_in: StandIn) -> None:
    node = make_node(PROBE_TOOLKIT, lifetime="jail", concurrency=1, **toward(stand_in))
    node.assert_healthy()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        node.assert_healthy()
    node.until(lambda: len(os.listdir("/proc/self/fd")) <= before, "no more descriptors")


# -- the checks, switched off ----------------------------------------------------------------------

OFF = {
    "policy": (
        "policy.py",
        "return any(endpoint.covers(host, port)",
        "return True or any(endpoint.covers(host, port)",
    ),
    "address": (
        "egress/addresses.py",
        "def refusal(address: str, *, private_ok: bool) -> str | None:\n",
        "def refusal(address: str, *, private_ok: bool) -> str | None:\n    return None\n",
    ),
    "ticket": ("egress/proxy.py", "raise NoTicket()", "return 1"),
    "server name": (
        "egress/relay.py",
        "def check_hello(first: bytes, host: str, port: int) -> bool:\n",
        "def check_hello(first: bytes, host: str, port: int) -> bool:\n    return True\n",
    ),
}


@pytest.fixture
def switch_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Run the egress process from a copy of our code in which one check is gone."""

    def switch(check: str) -> None:
        file, before, after = OFF[check]
        copy = tmp_path / "without"
        shutil.copytree(ROOT / "atp_sandbox", copy / "atp_sandbox")
        path = copy / "atp_sandbox" / file
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, after))
        monkeypatch.setattr(launch, "BOOT", copy / "atp_sandbox/egress/boot.py")
        monkeypatch.setattr(sys, "path", [str(copy), *sys.path])

    return switch


def test_without_the_policy_check_a_host_that_is_not_allowed_is_reached(
    make_node: NodeMaker, stand_in: StandIn, switch_off: Callable[[str], None]
) -> None:
    switch_off("policy")
    elsewhere = parse_reroute("other.example:8080", f"127.0.0.1:{stand_in.port}")
    egress = policy_of([f"{HOST}:80"])
    node = make_node(PROBE_TOOLKIT, egress=egress, reroutes=[elsewhere])
    answer = node.inside(ask_proxy, get("http://other.example:8080/", "other.example:8080"), "own")
    # The next check refuses then, since nobody said that it may be private.
    assert "resolves to a loopback address" in answer


def test_without_the_address_check_a_private_address_is_reached(
    make_node: NodeMaker, stand_in: StandIn, switch_off: Callable[[str], None]
) -> None:
    switch_off("address")
    node = make_node(PROBE_TOOLKIT, **toward(stand_in, private=False))
    assert SECRET_BODY.decode() in node.inside(fetch, HOST, 8080)


def test_without_the_ticket_check_anybody_uses_the_proxy(
    make_node: NodeMaker, stand_in: StandIn, switch_off: Callable[[str], None]
) -> None:
    switch_off("ticket")
    node = make_node(PROBE_TOOLKIT, **toward(stand_in))
    request = get(f"http://{HOST}:8080/", f"{HOST}:8080")
    assert SECRET_BODY.decode() in node.inside(ask_proxy, request, "none")


def test_without_the_look_at_the_hello_port_443_takes_anything(
    make_node: NodeMaker, stand_in: StandIn, switch_off: Callable[[str], None]
) -> None:
    toward_443 = {
        "egress": policy_of([HOST], [HOST]),
        "reroutes": [parse_reroute(HOST, f"127.0.0.1:{stand_in.port}")],
    }
    assert make_node(PROBE_TOOLKIT, **toward_443).inside(fetch, HOST, 443) == "ConnectionResetError"
    switch_off("server name")
    node = make_node(PROBE_TOOLKIT, **toward_443)
    assert SECRET_BODY.decode() in node.inside(fetch, HOST, 443)


# -- the look at the first bytes -------------------------------------------------------------------


def test_the_first_bytes_are_judged_as_soon_as_they_can_be() -> None:
    assert not check_hello(b"", HOST, 443)
    assert not check_hello(b"\x16\x03\x01", HOST, 443)
    assert check_hello(b"EHLO x\r\n", HOST, 25)
    with pytest.raises(Denied, match="not in TLS"):
        check_hello(b"GET / HTTP/1.1\r\n", HOST, 443)
    with pytest.raises(Denied, match="cannot be read"):
        check_hello(b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", HOST, 8443)


def test_a_policy_is_nothing_by_default() -> None:
    assert ToolkitSettings("kit", Path("kit.py")).egress == EgressPolicy()
