"""When discovery is over, whatever the script does; and what an import that fails is called."""

from __future__ import annotations

import pytest
from conftest import HEAD, LogLine, NodeMaker, toolkit_text

from atp_sandbox import routing
from atp_sandbox.outcome import Kind, Limit
from atp_sandbox.scheduling.shares import TOTAL_QUEUE
from atp_sandbox.settings import LifetimeKind, ServeOptions

# -- start and end of the script -------------------------------------------------------------------


def test_code_after_start_is_not_run(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text() + "\nimport os\nprint('after start')\nos._exit(9)\n")
    assert node.discovery.ended == "start"
    node.assert_healthy()


def test_end_of_the_script_ends_discovery_and_unstarted_client_is_served_with_a_warning(
    make_node: NodeMaker,
) -> None:
    node = make_node(toolkit_text(start=False))
    assert node.discovery.ended == "end"
    warnings = list(routing.warnings("kit", node.discovery))
    assert [w.event for w in warnings] == ["client_not_started"]
    assert [tool.name for tool in node.discovery.served()] == ["probe"]
    node.assert_healthy()


def test_start_in_a_thread_is_served_half_a_second_after_the_last_registration(
    make_node: NodeMaker,
) -> None:
    body = """
        import threading, time
        threading.Thread(target=client.start).start()
        time.sleep(0.3)

        @tool
        def late(**_):
            return waited

        waited = False
        try:
            while True:
                time.sleep(1)
        finally:
            waited = True
    """
    node = make_node(toolkit_text(body, start=False))
    assert node.discovery.ended == "interrupted"
    assert [t.name for t in node.discovery.registrations] == ["probe", "late"]
    # The main loop was neither unwound nor resumed, and the fork is safe again.
    assert node.call("late").value is False
    assert node.toolkit is not None
    assert node.toolkit.lifetime.kind is LifetimeKind.CALL


def test_stop_inside_a_tool_is_an_error_answer(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text("@tool\ndef end(**_):\n    client.stop()\n"))
    failure = node.call("end").failure
    assert failure.kind is Kind.TOOL_ERROR
    assert failure.error == "stop() cannot be called from inside a tool"
    assert node.stopped_clients == []
    node.assert_healthy()


def test_client_stopped_before_start_is_not_served(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text("client.stop()", start=False))
    assert node.discovery.served() == []


def test_threads_after_the_import_change_the_lifetime_and_calls_still_work(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    body = """
        import threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()

        @tool
        def threads(**_):
            return threading.active_count()
    """
    node = make_node(toolkit_text(body))
    assert node.toolkit is not None
    assert node.toolkit.lifetime.kind is LifetimeKind.JAIL
    assert [line.fields["lifetime"] for line in logged if line.event == "lifetime_changed"] == [
        "jail"
    ]
    assert node.call("threads").value == 2
    assert node.call("threads").value == 2


def test_calls_of_a_toolkit_that_runs_threads_wait_within_the_bound_of_all(
    make_node: NodeMaker,
) -> None:
    body = """
        import threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()

        @tool
        def wait(**_):
            threading.Event().wait()
    """
    node = make_node(toolkit_text(body), concurrency=1)
    while node.node._waiting.missing("another toolkit", 0) is None:
        node.node._waiting.take("another toolkit", 0)
    node.submit("wait")
    assert node.call("wait").failure.limit == Limit(TOTAL_QUEUE, ServeOptions().queue, "calls")


# -- imports that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import sys; sys.exit(3)", ("called sys.exit(3)", 'kit.py", line')),
        ("exit('no licence')", ("called sys.exit('no licence')", 'kit.py", line')),
        ("import os; os._exit(4)", ("its zygote ended with exit status 4",)),
        ("raise ValueError('no such region')", ("raised ValueError", "ValueError: no such region")),
        ("import no_such_package", ("raised ModuleNotFoundError", "No module named 'no_such")),
        ("def broken(:", ("raised SyntaxError", "def broken(:")),
        ("raise KeyboardInterrupt", ("raised KeyboardInterrupt",)),
        ("import ctypes; ctypes.string_at(0)", ("its zygote was ended by signal 11",)),
        ("import os, signal; os.kill(os.getpid(), 9)", ("its zygote was ended by signal 9",)),
    ],
)
def test_import_that_ends_badly_is_named(
    make_node: NodeMaker, line: str, said: tuple[str, ...]
) -> None:
    node = make_node(HEAD + line + "\nclient.start()\n")
    assert node.error is not None
    shown = node.error.render()
    assert shown.startswith("error: Toolkit kit ")
    for part in said:
        assert part in shown
    assert "zygote.py" not in shown


def test_toolkit_that_registers_nothing_is_refused(make_node: NodeMaker) -> None:
    node = make_node("x = 1\n")
    assert node.error is not None
    assert "registers no tools" in node.error.message


def test_toolkit_that_leaves_processes_after_its_import_is_refused(make_node: NodeMaker) -> None:
    line = "import os, time\nif os.fork() == 0:\n    time.sleep(1000)\n"
    node = make_node(HEAD + line + "client.start()\n")
    assert node.error is not None
    shown = node.error.render()
    assert "processes" in shown or "not permitted" in shown


def test_import_that_hangs_is_ended_by_the_import_time_limit(make_node: NodeMaker) -> None:
    node = make_node(HEAD + "while True:\n    pass\n", import_time_s=1.0)
    assert node.error is not None
    assert "was not imported within 1 s" in node.error.message


def test_import_that_takes_too_much_memory_is_ended(make_node: NodeMaker) -> None:
    # At a pace at which it is looked at long before it fills the group of the whole jail.
    line = "import time\nheld = []\n"
    line += "while True:\n    held.append(b'x' * 1_000_000)\n    time.sleep(0.005)\n"
    node = make_node(HEAD + line, memory_bytes=64 * 1024 * 1024)
    assert node.error is not None
    assert "its import used more than 64 MiB" in node.error.message
