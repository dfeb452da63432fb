"""Log lines as events: a stable name, a sentence, and plain fields; as text or as JSON lines.

Nobody may pass a secret, a parameter or a result as a field. Text that comes from a toolkit goes
through `printable` first, so that it can neither move the cursor nor forge a line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import unicodedata
from collections.abc import Iterable
from typing import TextIO

_logger = logging.getLogger("atp_sandbox")

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


def emit(level: int, event: str, message: str, **fields: object) -> None:
    """Log `message` under the stable name `event`; field values are plain JSON values."""
    if _logger.isEnabledFor(level):
        _logger.log(level, "%s", message, extra={"event": event, "fields": fields})


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """`text` with every control, format, surrogate, unassigned and line-ending character escaped.

    Unicode categories C*, Zl and Zp (Unicode Standard, section 4.5), but for the tab.
    """
    if text.isprintable():  # nothing of C* and, of Z*, only the space (docs of str.isprintable)
        return text
    kept = "\t\n" if keep_newlines else "\t"
    return "".join(c if c in kept or _is_shown(c) else _escaped(c) for c in text)


def _is_shown(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] != "C" and category not in ("Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def without(text: str, secrets: Iterable[str]) -> str:
    """`text`, which went through `printable` or not, without any of `secrets`."""
    for secret in sorted(secrets, key=len, reverse=True):
        for spelling in {secret, printable(secret), printable(secret, keep_newlines=True)}:
            text = text.replace(spelling, "***")
    return text


class TextFormatter(logging.Formatter):
    """`12:00:01 warning message  key=value …`; a message of several lines is indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        head = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} "
        head += f"{record.levelname.lower():7} "
        first, *more = printable(record.getMessage(), keep_newlines=True).split("\n")
        line = head + first
        for key, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            line += f"  {key}={printable(text)}"
        # Further lines of a message stand under it, where none can pass for an event.
        return "\n".join([line, *(" " * len(head) + text for text in more)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `event`, `message`, the fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        row: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
        }
        row.update(getattr(record, "fields", {}))
        return json.dumps(row, default=str)


def configure(log_format: str = "text", *, level: int = INFO, stream: TextIO | None = None) -> None:
    """Send our events to `stream` (standard error), and nothing of other libraries' chatter."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    _logger.handlers[:] = [handler]
    _logger.setLevel(level)
    _logger.propagate = False
