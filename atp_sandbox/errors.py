"""What can go wrong before a call exists, as three sentences a person can act on.

The class says whose fault it is:

    SandboxError
    ├── UsageError      the command line or the configuration     exit 2
    ├── ToolkitError    the toolkit (import, registration, files)  exit 1
    ├── IsolationError  this machine cannot enforce a protection   exit 1
    └── BackendError    the ATP backend refused us for good        exit 1

What goes wrong *inside* a call is no exception but an `outcome.Failure`.
"""

from __future__ import annotations


class SandboxError(Exception):
    """Base of all; `str()` is the one line after `error:`.

    `cause` says why in the words of whoever refused; `tip` what to do next. No secret and no
    parameter value may be put in any of the three.
    """

    exit_code = 1

    def __init__(self, message: str, *, cause: str = "", tip: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.tip = tip
        # A script that uses the library sees them below the traceback.
        for label, text in (("cause", cause), ("tip", tip)):
            if text:
                self.add_note(f"{label}: {text}")

    def render(self) -> str:
        """The `error:` / `cause:` / `tip:` lines, without a trailing newline."""
        rows = [("error", self.message), ("cause", self.cause), ("tip", self.tip)]
        return "\n".join(
            f"{label}: {text}".replace("\n", "\n       ") for label, text in rows if text
        )


class UsageError(SandboxError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class ToolkitError(SandboxError):
    """The toolkit cannot be read, imported or used."""


class IsolationError(SandboxError):
    """A required protection cannot be enforced here; nothing was started."""

    def __init__(self, layer: str, message: str, *, cause: str = "", tip: str = "") -> None:
        super().__init__(message, cause=cause, tip=tip)
        self.layer = layer


class BackendError(SandboxError):
    """The backend refuses this key or address, and asking again will not help."""
