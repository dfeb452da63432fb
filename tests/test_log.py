"""Log lines: one event a line, and no text can forge another or move the cursor."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox import log
from atp_sandbox.log import printable


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged; the logger is left as it was."""
    logger = logging.getLogger("atp_sandbox")
    before = logger.handlers[:], logger.level, logger.propagate
    yield io.StringIO()
    logger.handlers[:], logger.level, logger.propagate = before


def test_text_has_the_time_the_level_the_sentence_and_the_fields(stream: io.StringIO) -> None:
    log.configure(stream=stream)
    log.emit(log.WARNING, "some_event", "it happened", tool="echo", count=3, names=["a"])
    shown = stream.getvalue()
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d warning it happened  tool=echo  count=3  names=\["a"\]\n', shown
    )


def test_json_is_one_object_a_line_with_the_events_stable_name(stream: io.StringIO) -> None:
    log.configure("json", stream=stream)
    log.emit(log.INFO, "some_event", "it\nhappened", tool="e\u2028cho")
    (line,) = stream.getvalue().splitlines()
    row = json.loads(line)
    assert datetime.fromisoformat(row.pop("time")).tzinfo is not None
    assert row == {
        "level": "info",
        "event": "some_event",
        "message": "it\nhappened",
        "tool": "e\u2028cho",
    }


def test_what_is_below_the_level_is_not_shown(stream: io.StringIO) -> None:
    log.configure(level=log.WARNING, stream=stream)
    log.emit(log.INFO, "some_event", "it happened")
    assert stream.getvalue() == ""


def test_other_libraries_do_not_log_here_and_we_not_there(
    stream: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    log.configure(stream=stream)
    logging.getLogger("urllib3").warning("chatter")
    log.emit(log.ERROR, "some_event", "ours")
    assert "chatter" not in stream.getvalue()
    assert "ours" not in caplog.text


def test_configuring_twice_does_not_double_lines(stream: io.StringIO) -> None:
    log.configure(stream=stream)
    log.configure(stream=stream)
    log.emit(log.INFO, "some_event", "once")
    assert stream.getvalue().count("once") == 1


@given(st.text(), st.text())
def test_no_text_passes_for_another_line_or_moves_the_cursor(sentence: str, value: str) -> None:
    record = logging.LogRecord("atp_sandbox", log.INFO, "", 0, "%s", (sentence,), None)
    record.fields = {"value": value}
    for formatter in (log.TextFormatter(), log.JsonFormatter()):
        _first, *more = formatter.format(record).splitlines()
        assert len(more) == (sentence.count("\n") if type(formatter) is log.TextFormatter else 0)
        assert all(line.startswith(" " * 17) for line in more)
        shown = formatter.format(record).replace("\n", "").replace("\t", "")
        shown.encode()
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢\ttab", "plain é 漢\ttab"),
        ("a\nb\r", "a\\nb\\r"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eevil", "\\u202eevil"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_printable_shows_what_cannot_be_seen(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_line_feeds_may_be_kept_and_nothing_else() -> None:
    assert printable("a\nb\r\u2028", keep_newlines=True) == "a\nb\\r\\u2028"
