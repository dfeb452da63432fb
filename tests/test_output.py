"""What a process prints: kept up to a bound, read without end, shown without harm."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from atp_sandbox.jails.output import OutputPipe
from atp_sandbox.limits import MAX_OUTPUT_CAPTURE_BYTES
from atp_sandbox.loop import Loop

PATIENCE_S = 30.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe(loop: Loop) -> Iterator[OutputPipe]:
    pipe = OutputPipe(loop)
    yield pipe
    pipe.close()


def prints(pipe: OutputPipe, program: str) -> subprocess.Popen[bytes]:
    """A child whose standard output is `pipe`; our own writing end is closed."""
    child = subprocess.Popen([sys.executable, "-I", "-c", program], stdout=pipe.writer)
    os.close(pipe.writer)
    return child


def test_what_was_printed_is_taken_once(pipe: OutputPipe) -> None:
    os.write(pipe.writer, "héllo\n".encode())
    assert pipe.take() == "héllo\n"
    assert pipe.take() == ""
    os.write(pipe.writer, b"more")
    assert pipe.take() == "more"
    os.close(pipe.writer)


def test_a_process_that_prints_megabytes_is_never_held_up_and_the_rest_is_counted(
    loop: Loop, pipe: OutputPipe
) -> None:
    most = 4 * 1024 * 1024
    child = prints(pipe, f"import os; [os.write(1, b'x' * 65536) for _ in range({most // 65536})]")
    assert loop.run_until(lambda: child.poll() is not None, PATIENCE_S)
    assert child.returncode == 0
    assert loop.run_until(lambda: pipe._fd < 0, PATIENCE_S)
    text = pipe.take()
    assert text.count("x") == MAX_OUTPUT_CAPTURE_BYTES
    assert f"[{most - MAX_OUTPUT_CAPTURE_BYTES} more bytes were printed and not kept]" in text
    assert pipe.take() == ""


def test_a_process_that_prints_without_pause_leaves_the_loop_its_turns(
    loop: Loop, pipe: OutputPipe
) -> None:
    child = prints(pipe, "import os\nwhile True: os.write(1, b'x' * 65536)")
    turns: list[int] = []

    def again() -> None:
        turns.append(1)
        loop.call_soon(again)

    again()
    assert loop.run_until(lambda: len(turns) >= 100, PATIENCE_S)
    assert len(pipe._kept) <= MAX_OUTPUT_CAPTURE_BYTES
    child.kill()
    child.wait()


def test_what_was_printed_before_the_end_can_be_taken_after_it(
    loop: Loop, pipe: OutputPipe
) -> None:
    child = prints(pipe, "print('last words')")
    child.wait()
    assert loop.run_until(lambda: pipe._fd < 0, PATIENCE_S)
    assert pipe.take() == "last words\n"


def test_bytes_that_are_no_text_and_controls_are_shown_as_escapes(pipe: OutputPipe) -> None:
    os.write(pipe.writer, b"\xff \x1b[2J\r\n\xe2\x80\xae")
    assert pipe.take() == "\\xff \\x1b[2J\\r\n\\u202e"
    os.close(pipe.writer)


def test_closing_twice_and_taking_afterwards_is_safe(loop: Loop) -> None:
    gc.collect()  # what earlier tests left must not be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    pipe = OutputPipe(loop)
    os.close(pipe.writer)
    pipe.close()
    pipe.close()
    assert pipe.take() == ""
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_reading_end_is_no_ones_but_ours(pipe: OutputPipe) -> None:
    assert not os.get_inheritable(pipe._fd)
    assert not os.get_inheritable(pipe.writer)
    os.close(pipe.writer)
