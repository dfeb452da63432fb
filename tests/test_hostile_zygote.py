"""A toolkit that is hostile from its first imported line, and what holds even then.

Its import owns the zygote: it changes our modules there (`_atp_jail.…`), skips what its workers
should put on, keeps what passes through its hands and shares memory with every process that it
forks. It does not own what the supervisor sees from outside: who wrote, who lives, who ended.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest
from conftest import (
    LogLine,
    NodeMaker,
    ServedNode,
    Ticket,
    jail_processes,
    processes_named,
    toolkit_text,
)

from atp_sandbox.errors import ToolkitError
from atp_sandbox.isolation import Isolation, Waivable
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Kind
from atp_sandbox.scheduling.pool import HUNG_UP_S, START_S
from atp_sandbox.settings import ToolkitSettings

SOON_S = 2.0
"""What takes milliseconds and is promised within a second or so."""
STRAY = "an unknown process ran in it"

OWNED = """
    import ctypes, errno, mmap, os, select, sys, time

    call = sys.modules["_atp_jail.call"]
    frames = sys.modules["_atp_jail.frames"]
    syscalls = sys.modules["_atp_jail.confinement.syscalls"]
    zygote = sys.modules["_atp_jail.zygote"]._Zygote

    obey = zygote._obey
    serve = call.serve
    receive = call._receive

    # One memory for the zygote and all that it forks: a row of 64 bytes for each.
    board = mmap.mmap(-1, 1024 * 64)


    def start_stray(comm):
        '''Returns once a process of that name lives, of which nobody was told.'''
        board[0] = 0
        if syscalls.fork_as_sibling() == 0:
            ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
            board[0] = 1
            while True:
                time.sleep(1000)
        while not board[0]:
            time.sleep(0.001)


    def wait_for(condition):
        while not condition():
            time.sleep(0.001)


    def wait_for_the_end(pid):
        '''Of a process that is no child of this one; whoever reaps it has done so.'''
        try:
            while True:
                os.kill(pid, 0)
                time.sleep(0.001)
        except ProcessLookupError:
            pass
"""
"""How every toolkit here begins: with our own modules in its hands."""


def reasons(logged: list[LogLine]) -> list[object]:
    """Why jails ended."""
    return [line.fields["reason"] for line in logged if line.event == "jail_ended"]


def rules(logged: list[LogLine]) -> list[object]:
    """Which rules of the answer protocol workers broke."""
    return [line.fields["rule"] for line in logged if line.event == "worker_broke_rules"]


def new_comm() -> str:
    return f"hz-{os.urandom(5).hex()}"


def nothing() -> str:
    return "nothing"


def wait(seconds: float) -> str:
    import time

    time.sleep(seconds)
    return "waited"


def arm(node: ServedNode) -> None:
    """With its next request for a worker, the zygote does what it is here for.

    That may be the request for the successor of the worker that is used here.
    """

    def set_flag() -> None:
        import sys

        sys.modules["__main__"].board[0] = 1

    node.finish(node.begin_inside(set_flag))


# -- unknown processes -----------------------------------------------------------------------------

UNCONFINED = (
    OWNED
    + """
    def serve_unconfined(plan, registry, enter, *rest):
        serve(plan, registry, lambda slot: None, *rest)

    call.serve = serve_unconfined
"""
)


def leave_a_process(comm: str) -> str:
    import sys

    sys.modules["__main__"].start_stray(comm)
    return "left a process"


def add_bystander(node: ServedNode, folder: Path) -> None:
    """A toolkit that does no harm, beside the first; both register `probe` alone."""
    path = folder / "bystander.py"
    path.write_text(toolkit_text())
    first = node.toolkit
    node.node.add(ToolkitSettings("bystander", path))
    node.until(lambda: node.toolkit is not first, "discovery of the bystander")


def begin_at_bystander(node: ServedNode, seconds: float) -> Ticket:
    source = "from __future__ import annotations\n" + inspect.getsource(wait)
    params = {"source": source, "name": "wait", "arguments": [seconds]}
    ticket = Ticket("probe", node.loop.now())
    node.tickets.append(ticket)
    node.node.submit(
        NodeCall(
            "bystander",
            node.discovery.registrations[0],
            json.dumps(params).encode(),
            None,
            received_at=ticket.submitted_at,
            context=ticket,
        )
    )
    return ticket


def test_process_that_an_unconfined_worker_left_ends_its_jail_and_nothing_else(
    make_node: NodeMaker, logged: list[LogLine], tmp_path: Path
) -> None:
    node, comm = make_node(toolkit_text(UNCONFINED)), new_comm()
    jail = jail_processes(recursive=True)
    assert jail
    add_bystander(node, tmp_path)
    beside = begin_at_bystander(node, 1.0)
    caught = node.begin_inside(wait, 1000)
    leaving = node.begin_inside(leave_a_process, comm)
    node.finish(leaving, caught)
    assert leaving.value == "left a process"
    assert reasons(logged) == [STRAY]
    assert caught.failure.kind is Kind.CRASHED
    assert caught.failure.error.endswith(f"ended while the tool ran: {STRAY}.")
    node.until(lambda: not processes_named(comm), "the end of the process", SOON_S)
    node.until(lambda: not any(p.is_running() for p in jail), "the end of its jail", SOON_S)

    node.finish(beside)
    assert beside.value == "waited"
    later = begin_at_bystander(node, 0.0)
    node.finish(later)
    assert later.value == "waited"
    node.assert_healthy()
    assert reasons(logged) == [STRAY]


STRAY_OF_THE_ZYGOTE = (
    OWNED
    + """
    comm = "hz-" + os.urandom(5).hex()
    started = []


    def start_once():
        if not started:
            started.append(start_stray(comm))


    def stray_and_obey(self, message):
        start_once()
        obey(self, message)


    if os.environ["WHEN"] == "import":
        start_once()
    zygote._obey = stray_and_obey
"""
)


def name_of_the_stray() -> str:
    import sys

    main = sys.modules["__main__"]
    assert main.board[0] == 1
    comm: str = main.comm
    return comm


def test_process_that_a_zygote_left_is_gone_soon_after_the_first_call(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    node = make_node(toolkit_text(STRAY_OF_THE_ZYGOTE), env={"WHEN": "serving"})
    comm = node.inside(name_of_the_stray)
    node.until(lambda: reasons(logged), "the end of its jail")
    assert reasons(logged) == [STRAY]
    node.until(lambda: not processes_named(comm), "its end", SOON_S)
    assert node.inside(name_of_the_stray) != comm, "another jail serves"


def test_toolkit_whose_import_left_a_process_is_not_served(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text(STRAY_OF_THE_ZYGOTE), env={"WHEN": "import"})
    assert isinstance(node.error, ToolkitError)
    assert STRAY in node.error.message


FLOOD = (
    OWNED
    + """
    def flood_and_obey(self, message):
        if board[0]:
            for _ in range(100_000):
                self._channel.sendall(frames.encode("stopped", int(os.environ["CLIENT"])))
        obey(self, message)

    zygote._obey = flood_and_obey
"""
)


@pytest.mark.parametrize("client", [0, 99, -1])
def test_zygote_that_keeps_saying_that_a_client_stopped_ends_its_jail(
    make_node: NodeMaker, logged: list[LogLine], client: int
) -> None:
    node = make_node(toolkit_text(FLOOD), env={"CLIENT": str(client)})
    arm(node)
    node.begin_inside(nothing)
    node.until(lambda: reasons(logged), "the end of its jail")
    assert reasons(logged) == ["its zygote stopped a client that it had not"]
    assert node.stopped_clients == ([0] if client == 0 else [])


GROWING = (
    OWNED
    + """
    held = []


    def grow_and_obey(self, message):
        if board[0]:
            held.append(b"x" * (200 * 1024 * 1024))
        obey(self, message)

    zygote._obey = grow_and_obey
"""
)


def test_zygote_that_takes_memory_for_itself_ends_where_no_group_counts_it(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    sampled = Isolation(waived=frozenset({Waivable.CGROUP}))
    node = make_node(toolkit_text(GROWING), memory_bytes=64 * 1024 * 1024, isolation=sampled)
    arm(node)
    node.begin_inside(nothing)
    node.until(lambda: reasons(logged), "the end of its jail")
    assert reasons(logged) == ["its zygote used more memory than it may"]
    node.assert_healthy()


LONE = (
    OWNED
    + """
    refused = []


    def try_to_fork():
        for fork in (syscalls.fork_as_sibling, os.fork):
            try:
                pid = fork()
            except OSError as error:
                refused.append(errno.errorcode[error.errno])
            else:
                refused.append(str(pid))
                if pid == 0:
                    os._exit(0)


    def try_and_obey(self, message):
        try_to_fork()
        obey(self, message)


    try_to_fork()
    zygote._obey = try_and_obey
"""
)


def test_zygote_starts_no_process_at_all_with_lifetime_jail(make_node: NodeMaker) -> None:
    """Neither in its import nor once it has its call: nobody else is there to answer for it."""

    def refused() -> list[str]:
        import sys

        main = sys.modules["__main__"]
        main.try_to_fork()
        refusals: list[str] = main.refused
        return refusals

    node = make_node(toolkit_text(LONE), lifetime="jail")
    assert node.inside(refused) == ["EPERM"] * 6


HIDDEN = (
    OWNED
    + """
    started = []


    def note_and_obey(self, message):
        if not started:
            started.append(start_stray(os.environ["COMM"]))
        board[64 * message[1]] = 1
        obey(self, message)


    def serve_late(plan, registry, enter, channel_fd, output_fd, number, slot, ticket):
        # Says that it is ready once the next one is asked for, and ends: one is always starting.
        wait_for(lambda: board[64 * (number + 1)])
        os.write(channel_fd, frames.encode("ready", number))
        os._exit(0)


    zygote._obey = note_and_obey
    call.serve = serve_late
"""
)


def test_unknown_process_is_found_however_many_workers_are_starting(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    comm = new_comm()
    node = make_node(toolkit_text(HIDDEN), env={"COMM": comm})
    node.until(lambda: processes_named(comm), "the process to be seen from outside")
    node.until(lambda: reasons(logged), "the end of its jail", START_S + SOON_S)
    assert reasons(logged)[0] == STRAY


ENDED = (
    OWNED
    + """
    def lose_and_obey(self, message):
        if board[0]:
            board[0] = 0
            pid = syscalls.fork_as_sibling()
            if pid == 0:
                os._exit(0)
            wait_for_the_end(pid)
        obey(self, message)


    zygote._obey = lose_and_obey
"""
)


def test_unknown_process_that_has_ended_by_itself_ends_its_jail_too(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    """One at a time, they would otherwise go on for ever."""
    node = make_node(toolkit_text(ENDED))
    arm(node)
    asks_for_a_worker = node.begin_inside(nothing)
    node.until(lambda: reasons(logged), "the end of its jail", START_S)
    assert reasons(logged) == [STRAY]
    node.finish(asks_for_a_worker)
    node.assert_healthy()


BORN_DEAD = (
    OWNED
    + """
    fork = syscalls.fork_as_sibling
    forked = []
    is_last = False


    def fork_and_note():
        forked.append(fork())
        return forked[-1]


    def obey_and_close_late(self, message):
        global is_last
        if not board[0]:
            return obey(self, message)
        board[0] = 0
        is_last = True
        copy = os.dup(self._descriptors[0])
        obey(self, message)
        is_last = False
        wait_for_the_end(forked[-1])
        time.sleep(0.1)
        os.close(copy)


    def serve_or_end(*arguments):
        if is_last:
            os._exit(1)
        serve(*arguments)


    syscalls.fork_as_sibling = fork_and_note
    zygote._obey = obey_and_close_late
    call.serve = serve_or_end
"""
)


def test_worker_that_ends_before_it_speaks_costs_its_jail_nothing(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    """As if the zygote waited for its turn between the fork and the close of its own copy."""
    node = make_node(toolkit_text(BORN_DEAD))
    beside = node.begin_inside(wait, HUNG_UP_S + 1.0)
    arm(node)
    assert node.inside(nothing) == "nothing"
    node.finish(beside)
    assert beside.value == "waited"
    assert reasons(logged) == []
    node.assert_healthy()


# -- answers for others ----------------------------------------------------------------------------

FORGER = (
    OWNED
    + """
    WAITING, FORGED = 1, 2
    kept = {}  # by number of the worker: a copy of its socket
    control = []  # a copy of the zygote's own
    me = 0
    forger = os.environ.get("FORGER")


    def keep_and_obey(self, message):
        if not control:
            control.append(os.dup(self._channel.fileno()))
        kept[message[1]] = os.dup(self._descriptors[0])
        obey(self, message)


    def serve_numbered(plan, registry, enter, channel_fd, output_fd, number, slot, ticket):
        global me
        me = number
        serve(plan, registry, enter, channel_fd, output_fd, number, slot, ticket)


    def receive_and_tell(channel, decoder):
        received = receive(channel, decoder)
        board[64 * me + 1 : 64 * me + 17] = received[0][1]
        return received


    def waiting():
        '''Workers, other than this process, whose call is to be answered by somebody else.'''
        return [n for n in kept if n != me and board[64 * n] == WAITING]


    def forge():
        '''How many calls of others were answered.'''
        numbers = waiting()
        for number in numbers:
            call_id = board[64 * number + 1 : 64 * number + 17]
            os.write(kept[number], frames.encode("answer", call_id, "result", b'"forged"'))
            board[64 * number] = FORGED
        return len(numbers)


    def serve_and_forge(self, until_stopped):
        while True:
            while self._messages:
                self._obey(self._messages.popleft())
            if forger == "zygote":
                forge()
            elif forger == "unknown process" and waiting():
                if syscalls.fork_as_sibling() == 0:
                    forge()
                    while True:
                        time.sleep(1000)
                wait_for(lambda: not waiting())
            if select.select([self._channel], [], [], 0.001)[0]:
                self._receive()


    zygote._obey = keep_and_obey
    zygote._serve = serve_and_forge
    call.serve = serve_numbered
    call._receive = receive_and_tell
"""
)


def be_answered_for(comm: str) -> None:
    """Leave the answer to others, and stay."""
    import sys
    import time

    main = sys.modules["__main__"]
    main.ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    main.board[64 * main.me] = main.WAITING
    while True:
        time.sleep(1000)


def forge_now() -> int:
    import sys

    forged: int = sys.modules["__main__"].forge()
    return forged


@pytest.mark.parametrize("forger", ["zygote", "worker of another call", "unknown process"])
def test_answer_of_another_process_is_no_answer_even_with_the_right_call_id(
    make_node: NodeMaker, logged: list[LogLine], forger: str
) -> None:
    node = make_node(toolkit_text(FORGER), env={"FORGER": forger})
    comm = new_comm()
    victim = node.begin_inside(be_answered_for, comm)
    if forger == "worker of another call":
        # Whoever was forked before the victim has no copy of its socket.
        node.until(lambda: node.inside(forge_now), "a forged answer")
    node.finish(victim)
    assert victim.failure.kind is Kind.CRASHED
    assert "broke the answer protocol" in victim.failure.error
    assert rules(logged) == ["another process wrote to its channel"]
    node.until(lambda: not processes_named(comm), "the end of its worker", SOON_S)
    if forger == "unknown process":
        node.until(lambda: reasons(logged), "the end of its jail")
        assert reasons(logged) == [STRAY]
    node.assert_healthy()


THIEF = (
    FORGER
    + """
    def receive_unless_it_is_stolen(channel, decoder):
        wait_for(lambda: select.select([channel], [], [], 0)[0] and not board[0])
        return receive(channel, decoder)


    def serve_and_steal(self, until_stopped):
        while True:
            while self._messages:
                self._obey(self._messages.popleft())
            sockets = [self._channel, *(kept.values() if board[0] else ())]
            for ready in select.select(sockets, [], [], 0.001)[0]:
                if ready is self._channel:
                    self._receive()
                    continue
                for request in frames.Decoder(frames.TO_WORKER, 65536).feed(os.read(ready, 65536)):
                    os.write(ready, frames.encode("answer", request[1], "result", b'"forged"'))
                    board[0] = 0


    call._receive = receive_unless_it_is_stolen
    zygote._serve = serve_and_steal
"""
)


def test_call_that_its_zygote_took_from_the_socket_is_answered_by_nobody_else(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    node = make_node(toolkit_text(THIEF))
    arm(node)
    stolen = node.begin_inside(nothing)
    node.finish(stolen)
    assert stolen.failure.kind is Kind.CRASHED
    assert "broke the answer protocol" in stolen.failure.error
    assert rules(logged) == ["another process wrote to its channel"]
    node.assert_healthy()


SPEAKS_FOR_A_WORKER = (
    OWNED
    + """
    def speak_and_obey(self, message):
        if board[0]:
            os.write(self._descriptors[0], frames.encode("ready", message[1]))
        obey(self, message)


    zygote._obey = speak_and_obey
"""
)


def test_zygote_that_speaks_for_a_worker_ends_its_jail(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    node = make_node(toolkit_text(SPEAKS_FOR_A_WORKER))
    arm(node)
    asks_for_a_worker = node.begin_inside(nothing)
    node.until(lambda: reasons(logged), "the end of its jail")
    assert reasons(logged) == ["its zygote spoke for a worker"]
    node.finish(asks_for_a_worker)
    node.assert_healthy()


def test_worker_that_speaks_for_its_zygote_ends_its_jail(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    def speak() -> None:
        import os
        import sys
        import time

        main = sys.modules["__main__"]
        os.write(main.control[0], main.frames.encode("stopped", 0))
        time.sleep(1000)

    node = make_node(toolkit_text(FORGER))
    speaking = node.begin_inside(speak)
    node.finish(speaking)
    reason = "its zygote broke the protocol: another process wrote to its channel"
    assert reasons(logged) == [reason]
    assert speaking.failure.kind is Kind.CRASHED
    assert reason in speaking.failure.error
    assert node.stopped_clients == []
    node.assert_healthy()


TWO_IN_ONE = (
    OWNED
    + """
    first = []


    def join_and_obey(self, message):
        if board[0]:
            board[0] = 0
            first[:] = [message[1], self._descriptors.popleft(), self._descriptors.popleft()]
        else:
            obey(self, message)
            first.clear()


    def serve_two(plan, registry, enter, channel_fd, output_fd, number, slot, ticket):
        if first:
            os.write(first[1], frames.encode("ready", first[0]))
        serve(plan, registry, enter, channel_fd, output_fd, number, slot, ticket)


    zygote._obey = join_and_obey
    call.serve = serve_two
"""
)


def test_process_that_speaks_for_two_workers_ends_its_jail(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    """Else it has two calls at a time, and when it ends, word of that reaches only one of them."""
    node = make_node(toolkit_text(TWO_IN_ONE))
    arm(node)
    ask_for_workers = [node.begin_inside(nothing) for _ in range(2)]
    node.until(lambda: reasons(logged), "the end of its jail", START_S)
    node.finish(*ask_for_workers)
    node.assert_healthy()


# -- memory that calls share -----------------------------------------------------------------------

SHARING = (
    OWNED
    + """
    @tool
    def tokens(value, auth_token=None, **_):
        '''Every token on the board, its own too: once there are `value`, or after a while.'''
        row = 64 * os.getpid()
        board[row : row + len(auth_token)] = auth_token.encode()
        deadline = time.monotonic() + 0.3
        while True:
            rows = (board[n : n + 64].rstrip(bytes(1)) for n in range(0, len(board), 64))
            found = sorted(row.decode() for row in rows if row)
            if len(found) >= value or time.monotonic() > deadline:
                return found
            time.sleep(0.01)
"""
)


def test_documented_limit_imported_code_carries_tokens_from_call_to_call(
    make_node: NodeMaker,
) -> None:
    """SECURITY.md, "What separates what": with lifetime `call` this is not prevented."""
    node = make_node(toolkit_text(SHARING))
    assert node.call("tokens", {"value": 1}, token="token-1").value == ["token-1"]
    assert node.call("tokens", {"value": 2}, token="token-2").value == ["token-1", "token-2"]


def test_imported_code_finds_no_token_of_another_call_with_lifetime_jail(
    make_node: NodeMaker,
) -> None:
    node = make_node(toolkit_text(SHARING), lifetime="jail")
    given = [f"token-{n}" for n in range(4)]
    one_by_one = [node.call("tokens", {"value": 2}, token=token) for token in given[:1]]
    at_once = [node.submit("tokens", {"value": 2}, token=token) for token in given[1:]]
    node.finish(*at_once)
    assert [ticket.value for ticket in one_by_one + at_once] == [[token] for token in given]


def test_imported_code_reaches_nothing_of_another_call_with_lifetime_jail(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    """Neither a call id nor a socket: there is nothing to answer another call with."""

    def look(forges: bool) -> list[int]:
        import contextlib
        import os
        import sys
        import time

        main = sys.modules["__main__"]
        rows = [main.board[n + 1 : n + 17] for n in range(0, len(main.board), 64)]
        call_ids = [row for row in rows if any(row)]
        sockets = {}
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{fd}")
                if target.startswith("socket:"):
                    sockets[target] = fd
        own = {os.readlink(f"/proc/self/fd/{fd}") for fd in main.kept.values()}
        if forges:
            for target in sockets.keys() - own:
                for call_id in call_ids:
                    answer = main.frames.encode("answer", call_id, "result", b'"forged"')
                    os.write(sockets[target], answer)
            time.sleep(1000)
        return [len(call_ids), len(own), len(sockets)]

    node = make_node(toolkit_text(FORGER), lifetime="jail")
    # Its own call's id; its own channel, and the one by which its jail was told to begin.
    assert node.inside(look, False) == [1, 1, 2]
    forging = [node.begin_inside(look, True) for _ in range(2)]
    others = [node.begin_inside(look, False) for _ in range(4)]
    node.finish(*forging, *others)
    assert {ticket.failure.kind for ticket in forging} == {Kind.CRASHED}
    assert [ticket.value for ticket in others] == [[1, 1, 2]] * 4
    assert rules(logged) == []
    node.assert_healthy()
