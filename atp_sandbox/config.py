"""The configuration file and the API key's file, parsed once, here, into values.

Trusted side, at start. What is wrong is told all at once, in the operator's own terms, and without
showing what might be a secret. pydantic is imported only while a configuration is read.
"""

from __future__ import annotations

import errno
import os
import stat
import tomllib
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from atp_sandbox import log
from atp_sandbox.errors import UsageError
from atp_sandbox.isolation import Isolation, Level
from atp_sandbox.limits import MIB, Limits
from atp_sandbox.policy import EgressLimits, EgressPolicy, policy_of
from atp_sandbox.settings import (
    BackendSettings,
    Lifetime,
    LifetimeKind,
    ServeOptions,
    ToolkitSettings,
)

if TYPE_CHECKING:
    from atp_sandbox._config_models import (
        BackendModel,
        LimitsModel,
        ServeModel,
        ToolkitModel,
    )

_T = TypeVar("_T")

MAX_CONFIG_BYTES = MIB
"""Thousands of toolkits."""
MAX_KEY_CHARS = 4_096
"""An API key goes into an address; servers refuse longer ones."""


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """`BackendSettings`, but with the file that holds the key in place of the key."""

    api_key_file: Path | None = None
    base_url: str | None = None
    app_name: str | None = None
    as_written: bool = False
    ws_path: str = "0.2"
    send_source: bool = True
    sample_responses: bool = False

    def with_key(self, api_key: str | None) -> BackendSettings:
        """The same as settings, with the key that `read_api_key` has read."""
        return BackendSettings(
            api_key=api_key,
            base_url=self.base_url,
            app_name=self.app_name,
            as_written=self.as_written,
            ws_path=self.ws_path,
            send_source=self.send_source,
            sample_responses=self.sample_responses,
        )


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration file. Paths are absolute; each toolkit's limits include the defaults."""

    toolkits: tuple[ToolkitSettings, ...]
    """In the file's order; at least one."""
    backend: BackendConfig = field(default_factory=BackendConfig)
    serve: ServeOptions = field(default_factory=ServeOptions)
    default_limits: Limits = field(default_factory=Limits)
    default_lifetime: Lifetime = field(default_factory=Lifetime)


def load_config(path: Path) -> Config:
    """Read and check `atp-sandbox.toml`; relative paths in it are relative to its own folder.

    Whether the files that it names exist is not looked at. UsageError names the file, and the line
    (broken TOML) or the dotted path (anything else); its cause has a line for each fault.
    """
    content = _read_toml(path)
    from atp_sandbox import _config_models as models

    checked = models.validate(content)
    if isinstance(checked, list):
        raise _faults(path, checked, key_in_file=models.is_key_in_file(content))
    folder = path.absolute().parent
    limits = _limits(checked.defaults, Limits())
    toolkits = []
    for name, toolkit in checked.toolkit.items():
        try:
            toolkits.append(_toolkit(name, toolkit, folder, checked.defaults, limits))
        except ValueError as error:
            fault = (models.dotted(["toolkit", name]), str(error))
            raise _faults(path, [fault], key_in_file=False) from None
    return Config(
        tuple(toolkits),
        _backend(checked.backend, folder),
        _serve(checked.serve),
        limits,
        checked.defaults.lifetime or Lifetime(),
    )


def _read_toml(path: Path) -> dict[str, object]:
    shown = log.printable(str(path))
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the configuration {shown}", cause=_reason(error)) from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise UsageError(
            f"the configuration {shown} is too large",
            cause=f"more than {MAX_CONFIG_BYTES:,} bytes",
        )
    last_line = raw.count(b"\n") + 1
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        fault = f"not UTF-8 (at line {line})"
    except tomllib.TOMLDecodeError as error:
        fault = str(error).replace("at end of document", f"at line {last_line}, the end")
    except (RecursionError, ValueError):
        # ValueError: an integer of thousands of digits, which Python refuses to convert.
        fault = "its values are nested too deeply or too long"
    raise UsageError(
        f"{shown} is not valid TOML: {log.printable(fault)}",
        tip="strings need quotes, and each table and key may appear once",
    )


def _faults(path: Path, faults: list[tuple[str, str]], *, key_in_file: bool) -> UsageError:
    first, sentence = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return UsageError(
        f"{log.printable(str(path))}: {first}: {sentence}{more}",
        cause="\n".join(f"{where}: {what}" for where, what in faults),
        tip='put the key into a file of its own (chmod 600) and write: api-key-file = "key.txt"'
        if key_in_file
        else "",
    )


def _toolkit(
    name: str, model: ToolkitModel, folder: Path, defaults: LimitsModel, limits: Limits
) -> ToolkitSettings:
    """ValueError if what it asks for excludes each other."""
    subprocess = _said(model.subprocess, _said(defaults.subprocess, False))
    usual = Lifetime(LifetimeKind.JAIL) if subprocess else Lifetime()
    return ToolkitSettings(
        name=name,
        path=folder / model.path,
        data=tuple(folder / path for path in model.data),
        env=dict(model.env),
        limits=_limits(model, limits),
        lifetime=model.lifetime or defaults.lifetime or usual,
        isolation=Isolation(
            _said(model.isolation, _said(defaults.isolation, Level.STRICT)),
            _said(model.waive, _said(defaults.waive, frozenset())),
        ),
        may_start_programs=subprocess,
        egress=_egress(model, defaults),
    )


def _egress(model: ToolkitModel, defaults: LimitsModel) -> EgressPolicy:
    """ValueError if it contradicts itself."""
    injects = model.auth == "inject"
    if injects is not bool(model.auth_hosts):
        raise ValueError(
            'auth = "inject" and auth-hosts = { PROVIDER = ["HOST"] } go together: '
            "the hosts that get the provider's token"
        )
    usual = EgressLimits()
    limits = EgressLimits(
        connections=_said(
            model.egress_connections, _said(defaults.egress_connections, usual.connections)
        ),
        bytes=_said(model.egress_bytes, _said(defaults.egress_bytes, usual.bytes)),
        idle_s=_said(model.egress_idle, _said(defaults.egress_idle, usual.idle_s)),
    )
    return policy_of(model.egress, model.private_ok, model.auth_hosts, limits)


def _limits(model: LimitsModel, otherwise: Limits) -> Limits:
    return replace(
        otherwise,
        time_s=_said(model.time, otherwise.time_s),
        cpu_s=otherwise.cpu_s if model.cpu is None else model.cpu,
        import_time_s=_said(model.import_time, otherwise.import_time_s),
        memory_bytes=_said(model.memory, otherwise.memory_bytes),
        output_bytes=_said(model.output, otherwise.output_bytes),
        scratch_bytes=_said(model.scratch, otherwise.scratch_bytes),
        scratch_files=_said(model.scratch_files, otherwise.scratch_files),
        processes=_said(model.processes, otherwise.processes),
        concurrency=_said(model.concurrency, otherwise.concurrency),
        queue=_said(model.queue, otherwise.queue),
    )


def _backend(model: BackendModel, folder: Path) -> BackendConfig:
    usual = BackendConfig()
    return BackendConfig(
        api_key_file=None if model.api_key_file is None else folder / model.api_key_file,
        base_url=model.url,
        app_name=model.app_name,
        as_written=_said(model.as_written, usual.as_written),
        ws_path=_said(model.ws_path, usual.ws_path),
        send_source=_said(model.send_source, usual.send_source),
        sample_responses=_said(model.sample_responses, usual.sample_responses),
    )


def _serve(model: ServeModel) -> ServeOptions:
    usual = ServeOptions()
    return ServeOptions(
        journal=_said(model.journal, usual.journal),
        grace_s=_said(model.grace, usual.grace_s),
        reloads=_said(model.reload, usual.reloads),
        queue=_said(model.queue, usual.queue),
        queue_bytes=_said(model.queue_bytes, usual.queue_bytes),
    )


def _said(value: _T | None, otherwise: _T) -> _T:
    return otherwise if value is None else value


def read_api_key(source: str | Path, stdin: TextIO) -> str:
    """The key in the file `source`, or from `stdin` if that is `-`, without space around it.

    UsageError if it cannot be read, is empty, too long, of several lines, or holds characters that
    no key has; nothing of it is ever shown. A file that others can read is warned of.
    """
    from_stdin = str(source) == "-"
    shown = "standard input" if from_stdin else log.printable(str(source))
    text, refusal = _read_stdin(stdin) if from_stdin else _read_key_file(Path(source), shown)
    key = text.strip()
    if refusal:
        fault = refusal
    elif len(text) > MAX_KEY_CHARS:
        fault = f"there is more than {MAX_KEY_CHARS:,} characters"
    elif not key:
        fault = "it is empty"
    elif len(key.splitlines()) > 1:
        fault = "there is more than one line"
    elif any(unicodedata.category(c)[0] == "C" for c in key):
        fault = "it holds control characters"
    else:
        return key
    # Raised out here: an exception from decoding would carry the content along as its context.
    raise UsageError(
        f"cannot read the API key from {shown}",
        cause=fault,
        tip="it should hold the key alone, on one line",
    )


def _read_stdin(stdin: TextIO) -> tuple[str, str]:
    """What is there, and why it cannot be read; one of the two is empty."""
    try:
        return stdin.read(MAX_KEY_CHARS + 1), ""
    except UnicodeDecodeError:
        return "", "it is not UTF-8"
    except (OSError, ValueError) as error:
        return "", _reason(error)


def _read_key_file(path: Path, shown: str) -> tuple[str, str]:
    """As `_read_stdin`; a FIFO will do, such as a shell makes for `<(…)`."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            raw = file.read(4 * MAX_KEY_CHARS + 1)
    except (OSError, ValueError) as error:
        return "", _reason(error)
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o066:
        log.emit(
            log.WARNING,
            "api_key_file_open",
            "other users of this machine can read or change the API key's file; chmod 600 it",
            path=shown,
            mode=f"{stat.S_IMODE(status.st_mode):04o}",
        )
    try:
        return raw.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return "", "it is not UTF-8"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{errno.errorcode.get(error.errno or 0, 'unknown error')}: {error.strerror}"
    return "its name is not possible"
