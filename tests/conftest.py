"""What the tests of served toolkits share: a node in the test's own thread, and patience.

Nothing here is a fake: toolkits are written to disk, snapshotted, imported in a real jail and
called through the same admission as a request from the backend.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

from atp_sandbox.admission import ServedTool, admit
from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.discovery import Discovery
from atp_sandbox.egress.jail_network import Denial
from atp_sandbox.errors import SandboxError
from atp_sandbox.isolation import Isolation
from atp_sandbox.limits import Limits
from atp_sandbox.loop import Loop
from atp_sandbox.node import Node
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Outcome, Success
from atp_sandbox.policy import EgressPolicy, Reroute
from atp_sandbox.settings import ToolkitSettings, parse_lifetime
from atp_sandbox.toolkit import ServedToolkit

# A machine that is busy with other tests is no fault of what is tested.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

STRICT = Isolation()
NOWHERE = EgressPolicy()
PATIENCE_S = 40.0
"""For what takes milliseconds; a machine that is busy with other tests takes longer."""

HEAD = """\
from atp_sdk.atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="key-in-the-toolkit", app_name="tests")


def tool(function):
    register = client.register_tool(
        function_name=function.__name__,
        params=["value"],
        required_params=[],
        description="a test's tool",
        auth_provider=None,
        auth_type=None,
        auth_with=None,
    )
    return register(function)


@tool
def probe(source, name, arguments):
    space = {"__name__": "probe"}
    exec(source, space)
    return space[name](*arguments)


"""
"""Every toolkit below begins so; `probe` runs a function of the test inside the jail."""


def toolkit_text(body: str = "", *, start: bool = True) -> str:
    """A whole toolkit around `body`."""
    return HEAD + textwrap.dedent(body) + ("\n\nclient.start()\n" if start else "\n")


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    """Write each text below `folder`, dedented, and return `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return once `condition()` holds; fails the test, naming `what`, if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        threading.Event().wait(0.01)


def processes_named(comm: str) -> list[int]:
    """Process ids, of the whole machine, whose name as of prctl(PR_SET_NAME) is `comm`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                name = Path("/proc", entry, "comm").read_text(errors="replace")
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
                state = stat.rpartition(")")[2].split()[0]
            except OSError:
                continue
            if name.rstrip("\n") == comm and state not in "ZX":
                found.append(int(entry))
    return found


def jail_processes(*, recursive: bool = False) -> list[psutil.Process]:
    """Descendants of this process but for the egress process, which is of no one jail."""
    found = []
    for process in psutil.Process().children(recursive=recursive):
        with contextlib.suppress(psutil.Error):
            if not any(part.endswith("egress/boot.py") for part in process.cmdline()):
                found.append(process)
    return found


@dataclass(slots=True)
class Ticket:
    """One submitted call and every outcome that came for it."""

    tool: str
    submitted_at: float
    outcomes: list[Outcome] = field(default_factory=list)
    printed: str = ""
    finished_at: float = 0.0

    @property
    def outcome(self) -> Outcome:
        assert len(self.outcomes) == 1, f"{self.tool}: {len(self.outcomes)} answers"
        return self.outcomes[0]

    @property
    def failure(self) -> Failure:
        assert isinstance(self.outcome, Failure), f"{self.tool}: {self.outcome}"
        return self.outcome

    @property
    def value(self) -> Any:
        assert isinstance(self.outcome, Success), f"{self.tool}: {self.outcome}"
        return json.loads(self.outcome.result_json)

    @property
    def seconds(self) -> float:
        return self.finished_at - self.submitted_at


class ServedNode:
    """A node with one toolkit; its loop runs while the test waits for something."""

    def __init__(
        self, settings: ToolkitSettings, state_dir: Path, reroutes: Sequence[Reroute] = ()
    ) -> None:
        self.loop = Loop()
        self.error: SandboxError | None = None
        self.toolkit: ServedToolkit | None = None
        self.stopped_clients: list[int] = []
        self.tickets: list[Ticket] = []
        self._found: Discovery | None = None
        self._name = settings.name
        self.denials: list[Denial] = []
        self.node = Node(self.loop, state_dir, self, reroutes)
        try:
            self.node.add(settings)
            longest_s = settings.limits.import_time_s + PATIENCE_S
            self.until(lambda: self._found or self.error, "discovery", longest_s)
        except BaseException:
            self.close()
            raise

    @property
    def discovery(self) -> Discovery:
        if self.error is not None:
            raise self.error
        assert self._found is not None
        return self._found

    def until(
        self, condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S
    ) -> None:
        """Serve until `condition()` holds; fails the test if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            self.loop.run_once(0.01)

    def submit(
        self,
        tool: str,
        params: dict[str, Any] | None = None,
        token: Any = None,
        *,
        age_s: float = 0.0,
    ) -> Ticket:
        """Begin a call the way a request of the backend does, received `age_s` ago."""
        ticket = Ticket(tool, self.loop.now())
        self.tickets.append(ticket)
        given = params or {}
        token_json = None if token is None else json.dumps(token)
        request = ToolRequest('"1"', tool, given, json.dumps(given), token_json)
        serving = self.node.serving(self._name)
        assert serving is not None
        found = serving.discovery or self.discovery
        tools = {t.name: ServedTool(self._name, "", t) for t in found.registrations}
        refusal = admit(request, tools)
        if refusal is not None:
            self._finish(ticket, refusal, "")
            return ticket
        self.node.submit(
            NodeCall(
                self._name,
                tools[tool].tool,
                request.params_json.encode(),
                None if token_json is None else token_json.encode(),
                received_at=self.loop.now() - age_s,
                context=ticket,
            )
        )
        return ticket

    def finish(self, *tickets: Ticket, timeout_s: float = PATIENCE_S) -> None:
        """Serve until each of these calls has its answer."""
        self.until(lambda: all(t.outcomes for t in tickets), "answers", timeout_s)

    def call(self, tool: str, params: dict[str, Any] | None = None, token: Any = None) -> Ticket:
        """One call from beginning to end."""
        ticket = self.submit(tool, params, token)
        self.finish(ticket)
        return ticket

    def begin_inside(self, function: Callable[..., Any], *arguments: Any) -> Ticket:
        """Begin to run a function of the test, by its source, as a tool."""
        source = "from __future__ import annotations\n" + textwrap.dedent(
            inspect.getsource(function)
        )
        params = {"source": source, "name": function.__name__, "arguments": list(arguments)}
        return self.submit("probe", params)

    def inside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the test returns that runs as a tool."""
        ticket = self.begin_inside(function, *arguments)
        self.finish(ticket)
        return ticket.value

    def assert_healthy(self) -> None:
        """The toolkit still answers, and no call ever had two answers."""
        assert self.inside(_still_there) == "still there"
        assert all(len(ticket.outcomes) == 1 for ticket in self.tickets)

    def close(self) -> None:
        self.node.close()
        self.loop.close()

    # -- what the node tells -----------------------------------------------------------------------

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None:
        self.toolkit, self._found = toolkit, discovery

    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None:
        self.error = error

    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None:
        self.stopped_clients.append(client)

    def connection_denied(self, toolkit: str, denial: Denial) -> None:
        self.denials.append(denial)

    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        go()

    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None:
        assert isinstance(call.context, Ticket)
        self._finish(call.context, outcome, printed)

    def _finish(self, ticket: Ticket, outcome: Outcome, printed: str) -> None:
        ticket.finished_at = self.loop.now()
        ticket.printed = printed
        ticket.outcomes.append(outcome)


def _still_there() -> str:
    return "still there"


NodeMaker = Callable[..., ServedNode]


def node_maker(folder: Path) -> Iterator[NodeMaker]:
    """`make(toolkit, lifetime=…, isolation=…, **limits)`; a text becomes a file `kit.py`."""
    made: list[ServedNode] = []

    def make(
        toolkit: str | Path,
        *,
        lifetime: str = "call",
        data: Sequence[Path] = (),
        env: dict[str, str] | None = None,
        isolation: Isolation = STRICT,
        programs: bool = False,
        egress: EgressPolicy = NOWHERE,
        reroutes: Sequence[Reroute] = (),
        **limits: Any,
    ) -> ServedNode:
        place = folder / f"node-{len(made)}"
        place.mkdir()
        if isinstance(toolkit, str):
            path = place / "kit.py"
            path.write_text(toolkit)
            toolkit = path
        settings = ToolkitSettings(
            "kit",
            toolkit,
            tuple(data),
            env or {},
            replace(Limits(), **limits),
            parse_lifetime("jail" if programs else lifetime),
            isolation,
            programs,
            egress,
        )
        node = ServedNode(settings, place / "state", reroutes)
        made.append(node)
        return node

    try:
        yield make
    finally:
        for node in made:
            node.close()


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[NodeMaker]:
    """Makes nodes that live as long as the test."""
    yield from node_maker(tmp_path)


@pytest.fixture(scope="module")
def make_module_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeMaker]:
    """Makes nodes that live as long as the tests of one module."""
    yield from node_maker(tmp_path_factory.mktemp("nodes"))


@dataclass(slots=True)
class LogLine:
    event: str
    message: str
    fields: dict[str, object]


@pytest.fixture
def logged() -> Iterator[list[LogLine]]:
    """Every event of ours that is logged during the test."""
    lines: list[LogLine] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(
                LogLine(
                    getattr(record, "event", ""),
                    record.getMessage(),
                    getattr(record, "fields", {}),
                )
            )

    logger = logging.getLogger("atp_sandbox")
    collect, level = Collect(), logger.level
    logger.addHandler(collect)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(collect)
    logger.setLevel(level)
