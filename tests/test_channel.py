"""Our end of a pipe on real sockets, against real processes that do not keep to the rules."""

from __future__ import annotations

import array
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from atp_sandbox.jails.channel import Channel, channel_pair
from atp_sandbox.loop import Loop
from workers.frames import BYTES, HEAD_BYTES, INT, Decoder, FrameError, Message, encode

TABLE = {"number": (INT,), "blob": (BYTES,)}
MOST = 8 * 1024 * 1024
PATIENCE_S = 30.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class End:
    """A channel, its peer's socket, and everything that it reported."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        ours, self.peer = channel_pair()
        self.seen: list[Message] = []
        self.senders: list[int] = []
        self.ends: list[FrameError | None] = []
        self.channel = Channel(loop, ours, Decoder(TABLE, MOST), self._on_message, self.ends.append)

    def _on_message(self, message: Message, sender: int) -> None:
        self.seen.append(message)
        self.senders.append(sender)

    def until(self, condition: Callable[[], object]) -> None:
        assert self.loop.run_until(lambda: bool(condition()), PATIENCE_S)

    def reason(self) -> str:
        self.until(lambda: self.ends)
        assert self.channel.is_closed
        (reason,) = self.ends
        return str(reason)


@pytest.fixture
def end(loop: Loop) -> Iterator[End]:
    end = End(loop)
    yield end
    end.channel.close()
    end.peer.close()


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process, wait for its end, and give its number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return pid


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_frames_arrive_with_the_process_that_wrote_them(end: End) -> None:
    child = in_child(lambda: end.peer.sendall(encode("number", 1)))
    end.peer.sendall(encode("number", 2))
    end.until(lambda: len(end.seen) == 2)
    assert end.seen == [["number", 1], ["number", 2]]
    assert end.senders == [child, os.getpid()]


def test_a_frame_from_another_process_is_a_violation(end: End) -> None:
    end.channel.peer_pid = os.getpid()
    end.peer.sendall(encode("number", 1))
    in_child(lambda: end.peer.sendall(encode("number", 2)))
    assert end.reason() == "another process wrote to its channel"
    assert end.seen == [["number", 1]]


def test_half_a_frame_from_another_process_is_a_violation_too(end: End) -> None:
    end.channel.peer_pid = os.getpid()
    frame = encode("number", 1)
    end.peer.sendall(frame[:3])
    in_child(lambda: end.peer.sendall(frame[3:]))
    assert end.reason() == "another process wrote to its channel"
    assert end.seen == []


def test_an_orderly_end_is_told_once_and_without_a_reason(end: End) -> None:
    end.peer.sendall(encode("number", 1))
    end.peer.close()
    end.until(lambda: end.ends)
    assert end.seen == [["number", 1]]
    assert end.ends == [None]


def test_a_broken_grammar_ends_the_channel_after_what_was_well_formed(end: End) -> None:
    end.peer.sendall(encode("number", 1) + encode("unknown") + encode("number", 2))
    assert "no place here" in end.reason()
    assert end.seen == [["number", 1]]


@pytest.mark.parametrize("count", [1, 2, 100])
def test_descriptors_sent_by_the_peer_are_refused_and_never_kept(end: End, count: int) -> None:
    before = open_descriptors()
    rights = array.array("i", [0] * count)
    end.peer.sendmsg([encode("number", 1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    assert "descriptor" in end.reason()
    assert end.seen == []
    assert open_descriptors() == before - 1  # our own end was closed


def test_a_descriptor_that_hides_behind_data_is_refused_as_well(end: End) -> None:
    before = open_descriptors()
    end.peer.sendall(encode("number", 1))
    rights = array.array("i", [0])
    end.peer.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    assert "descriptor" in end.reason()
    assert open_descriptors() == before - 1


def test_descriptors_go_along_with_a_frame_and_are_closed_here(end: End) -> None:
    reader, writer = os.pipe()
    before = open_descriptors()
    end.channel.send(encode("number", 1), (writer,))
    assert open_descriptors() == before - 1
    data, (received,), _, _ = socket.recv_fds(end.peer, 1024, 1)
    assert data == encode("number", 1)
    os.write(received, b"x")
    os.close(received)
    assert os.read(reader, 2) == b"x"
    assert os.read(reader, 2) == b""  # no other writer is left
    os.close(reader)


def test_closing_closes_descriptors_that_never_left(end: End) -> None:
    before = open_descriptors()
    end.channel.send(encode("blob", b"x" * MOST))
    pipes = [os.pipe() for _ in range(3)]
    for reader, writer in pipes:
        end.channel.send(encode("number", 1), (reader, writer))
    end.channel.close()
    end.channel.close()
    late = os.pipe()
    end.channel.send(encode("number", 1), late)
    assert open_descriptors() == before - 1


def test_a_peer_that_went_away_costs_no_descriptor(end: End) -> None:
    before = open_descriptors()
    end.channel.send(encode("blob", b"x" * MOST))
    for _ in range(3):
        end.channel.send(encode("number", 1), os.pipe())
    end.peer.close()
    end.until(lambda: end.ends)
    assert open_descriptors() == before - 2  # both ends of the channel


def test_a_peer_that_takes_no_more_costs_no_descriptor_and_is_still_heard(end: End) -> None:
    before = open_descriptors()
    end.peer.shutdown(socket.SHUT_RD)
    for _ in range(3):
        end.channel.send(encode("number", 1), os.pipe())
    assert open_descriptors() == before
    end.peer.sendall(encode("number", 1))
    end.until(lambda: end.seen)
    assert end.ends == []


def test_a_peer_that_never_reads_does_not_hold_up_the_loop(end: End) -> None:
    end.channel.send(encode("blob", b"x" * MOST))
    end.channel.send(encode("number", 1))
    ran: list[int] = []
    end.loop.call_soon(lambda: ran.append(1))
    end.until(lambda: ran)
    end.peer.sendall(encode("number", 2))
    end.until(lambda: end.seen)  # it is heard all the same


def test_a_big_frame_goes_out_whole_and_in_order_while_others_are_served(end: End) -> None:
    sent = encode("blob", os.urandom(1024 * 1024)) + encode("number", 1)
    received = bytearray()

    def read_all() -> None:
        while len(received) < len(sent):
            received.extend(end.peer.recv(65536))
        end.loop.call_from_thread(lambda: None)

    reader = threading.Thread(target=read_all)
    end.channel.send(sent[:-9])
    end.channel.send(sent[-9:])
    reader.start()
    end.until(lambda: len(received) == len(sent))
    reader.join()
    assert received == sent


def test_big_frames_come_in_piece_by_piece_while_others_are_served(end: End) -> None:
    other = End(end.loop)
    blob = os.urandom(MOST - 100)
    writer = threading.Thread(target=lambda: end.peer.sendall(encode("blob", blob)))
    writer.start()
    end.loop.run_once(PATIENCE_S)  # a first piece is there, and not all of it
    assert end.seen == []
    other.peer.sendall(encode("number", 1))
    other.until(lambda: other.seen)
    end.until(lambda: end.seen)
    writer.join()
    assert end.seen == [["blob", blob]]
    other.channel.close()
    other.peer.close()


def test_a_frame_too_long_ends_the_channel_before_it_has_come(end: End) -> None:
    end.peer.sendall((MOST + 1).to_bytes(4, "big") + bytes(HEAD_BYTES))
    assert "allowed" in end.reason()


def test_nothing_follows_a_close_from_within_a_callback(loop: Loop) -> None:
    end = End(loop)
    seen: list[Message] = []

    def close_at_once(message: Message, _sender: int) -> None:
        seen.append(message)
        end.channel.close()

    end.channel._on_message = close_at_once  # type: ignore[method-assign]
    end.peer.sendall(encode("number", 1) + encode("number", 2) + encode("unknown"))
    end.until(lambda: seen)
    loop.run_once(0)
    assert seen == [["number", 1]]
    assert end.ends == []
    end.peer.close()


def test_what_has_arrived_can_be_taken_in_without_the_loop(end: End) -> None:
    end.channel.read_now()
    assert end.seen == []
    end.peer.sendall(encode("number", 1))
    end.channel.read_now()
    assert end.seen == [["number", 1]]
