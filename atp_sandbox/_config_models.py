"""The configuration's shape for pydantic, and its complaints in our words.

Only `config` imports this module, and only while it reads a file: importing pydantic takes longer
than everything else that a command does at its start.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from atp_sandbox import limits
from atp_sandbox.isolation import Level, Waivable, parse_level, parse_waived
from atp_sandbox.log import printable
from atp_sandbox.settings import RESERVED_ENV, JournalMode, Lifetime, parse_lifetime

MAX_TIME_S = 86_400
"""A day; whatever takes longer is no tool call."""
MIN_MEMORY_BYTES = limits.MIB
"""Less is a forgotten unit: nothing of Python runs in it."""
MIN_OUTPUT_BYTES = limits.KIB
"""Less is a forgotten unit: not even an error's text would fit."""
MAX_SIZE_BYTES = 1024 * limits.GIB
"""More than any machine's memory that this runs on."""
MAX_CONCURRENCY = 1_024
"""Each running call is a process with several descriptors of ours."""
MAX_PROCESSES = 4_096
"""Threads of one call; more is a mistake on any machine that this runs on."""
MAX_FILES = 1_000_000
"""Files of one call, each a kernel object in memory."""
MAX_CONNECTIONS = 4_096
"""Of one jail at once; each is four descriptors of the egress process."""
MAX_QUEUE = 1_000_000
"""Each waiting call is held in our memory."""
MAX_SHOWN_CHARS = 60
"""Of a value that is quoted in a complaint."""
MAX_SENTENCE_CHARS = 200
"""Of a complaint in the words of `limits` or `settings`, which quote the whole value."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOOLKIT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_KEY_NAMES = frozenset({"api-key", "api_key", "apikey", "key", "token"})


class _Rule(ValueError):
    """What a value must be; said after what was found. Empty: see what the field allows."""


def _size(least: int, value: object) -> int:
    try:
        size = limits.parse_size(value) if isinstance(value, str) else _whole(value)
    except OverflowError:
        size = MAX_SIZE_BYTES + 1
    if not least <= size <= MAX_SIZE_BYTES:
        raise _Rule(
            f"must be from {limits.format_size(least)} to {limits.format_size(MAX_SIZE_BYTES)}"
        )
    return size


def _memory(value: object) -> int:
    return _size(MIN_MEMORY_BYTES, value)


def _output(value: object) -> int:
    return _size(MIN_OUTPUT_BYTES, value)


def _time(value: object) -> float:
    seconds = limits.parse_duration(value) if isinstance(value, str) else _whole(value)
    if not 0 < seconds <= MAX_TIME_S:
        raise _Rule("must be more than 0 and at most a day (24h)")
    return float(seconds)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Rule()
    return value


def _lifetime(value: object) -> Lifetime:
    if not isinstance(value, str):
        raise _Rule()
    return parse_lifetime(value)


def _level(value: object) -> Level:
    if not isinstance(value, str):
        raise _Rule()
    return parse_level(value)


def _waived(value: object) -> frozenset[Waivable]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _Rule()
    return parse_waived(value)


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not value.isascii() or any(c <= " " or c == "\x7f" for c in value):
        raise _Rule()
    if "@" in parts.netloc:
        raise _Rule("must not hold a user name or a password")
    if parts.query or parts.fragment:
        raise _Rule("must end with the path: no ? and no #")
    return value


def _text(value: str) -> str:
    if not value.strip() or len(value) > limits.MAX_NAME_CHARS or printable(value) != value:
        raise _Rule()
    return value


def _path(value: str) -> str:
    if not value or "\0" in value:
        raise _Rule()
    return value


def _ws_path(value: str) -> str:
    if value not in ("0.1", "0.2"):
        raise _Rule()
    return value


def _journal(value: object) -> JournalMode:
    if not isinstance(value, str) or value not in tuple(JournalMode):
        raise _Rule()
    return JournalMode(value)


def _auth(value: str) -> str:
    if value not in ("pass", "inject"):
        raise _Rule()
    return value


def _env_name(value: str) -> str:
    if not _ENV_NAME.fullmatch(value):
        raise ValueError("is no name of a variable; allowed: letters, digits and _, no digit first")
    if value in RESERVED_ENV:
        raise ValueError("is reserved: no jail gets the API key; leave it out")
    return value


def _env_value(value: str) -> str:
    if "\0" in value:
        raise _Rule("must not hold a NUL character")
    return value


def _toolkit_name(value: str) -> str:
    if not _TOOLKIT_NAME.fullmatch(value) or value in (".", ".."):
        raise ValueError("is no toolkit name; allowed: 1 to 64 of letters, digits and . _ -")
    return value


def _some(value: dict[str, ToolkitModel]) -> dict[str, ToolkitModel]:
    if not value:
        raise ValueError('no toolkit is named; write [toolkit.NAME] with path = "…"')
    return value


def _from(allowed: str) -> Any:
    """A field that may be left out; `allowed` ends the sentence "found …; allowed: …"."""
    return Field(default=None, description=allowed)


Memory = Annotated[int, BeforeValidator(_memory)]
Output = Annotated[int, BeforeValidator(_output)]
Time = Annotated[float, BeforeValidator(_time)]
FilePath = Annotated[str, AfterValidator(_path)]
EnvName = Annotated[str, AfterValidator(_env_name)]
EnvValue = Annotated[str, AfterValidator(_env_value)]
ToolkitName = Annotated[str, AfterValidator(_toolkit_name)]

_A_TIME = 'a duration such as "500ms", "30s" or "2m", or whole seconds'
_A_SIZE = 'a size such as "512K", "256M" or "1G", or whole bytes'
_A_PATH = "a path, relative to the configuration's folder"


class _Table(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
    )


class BackendModel(_Table):
    url: Annotated[str, AfterValidator(_url)] | None = _from(
        'an address such as "https://example.org"'
    )
    api_key_file: FilePath | None = _from(_A_PATH)
    app_name: Annotated[str, AfterValidator(_text)] | None = _from(
        f"1 to {limits.MAX_NAME_CHARS} printable characters"
    )
    ws_path: Annotated[str, AfterValidator(_ws_path)] | None = _from('"0.1" or "0.2", in quotes')
    as_written: bool | None = _from("true or false")
    send_source: bool | None = _from("true or false")
    sample_responses: bool | None = _from("true or false")


class ServeModel(_Table):
    journal: Annotated[JournalMode, BeforeValidator(_journal)] | None = _from(
        '"on", "required" or "off"'
    )
    grace: Time | None = _from(_A_TIME)
    reload: bool | None = _from("true or false")
    queue: Annotated[int, Field(ge=0, le=MAX_QUEUE)] | None = _from(
        f"a whole number from 0 to {MAX_QUEUE:,}"
    )
    queue_bytes: Output | None = _from(_A_SIZE)


class LimitsModel(_Table):
    time: Time | None = _from(_A_TIME)
    cpu: Time | None = _from(_A_TIME)
    import_time: Time | None = _from(_A_TIME)
    memory: Memory | None = _from(_A_SIZE)
    output: Output | None = _from(_A_SIZE)
    scratch: Memory | None = _from(_A_SIZE)
    scratch_files: Annotated[int, Field(ge=16, le=MAX_FILES)] | None = _from(
        f"a whole number from 16 to {MAX_FILES:,}"
    )
    processes: Annotated[int, Field(ge=1, le=MAX_PROCESSES)] | None = _from(
        f"a whole number from 1 to {MAX_PROCESSES:,}"
    )
    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] | None = _from(
        f"a whole number from 1 to {MAX_CONCURRENCY:,}"
    )
    queue: Annotated[int, Field(ge=0, le=MAX_QUEUE)] | None = _from(
        f"a whole number from 0 to {MAX_QUEUE:,}"
    )
    lifetime: Annotated[Lifetime, BeforeValidator(_lifetime)] | None = _from(
        '"call", "calls:N" (for example "calls:100") or "jail"'
    )
    isolation: Annotated[Level, BeforeValidator(_level)] | None = _from(
        '"strict", "container" or "none"'
    )
    waive: Annotated[frozenset[Waivable], BeforeValidator(_waived)] | None = _from(
        'a list of layers, of "cgroup", "landlock" and "seccomp"'
    )
    subprocess: bool | None = _from("true or false")
    egress_connections: Annotated[int, Field(ge=1, le=MAX_CONNECTIONS)] | None = _from(
        f"a whole number from 1 to {MAX_CONNECTIONS:,}"
    )
    egress_bytes: Output | None = _from(_A_SIZE)
    egress_idle: Time | None = _from(_A_TIME)


class ToolkitModel(LimitsModel):
    egress: list[str] = Field(default=[], description='a list of hosts, ["api.example.com:443", …]')
    private_ok: list[str] = Field(default=[], description='a list of hosts, ["db.internal", …]')
    auth: Annotated[str, AfterValidator(_auth)] | None = _from('"pass" or "inject"')
    auth_hosts: dict[str, list[str]] = Field(
        default={}, description='a table of lists, { PROVIDER = ["api.example.com"] }'
    )
    path: FilePath = Field(description=_A_PATH)
    data: list[FilePath] = Field(default=[], description='a list of paths, ["a.csv", …]')
    env: dict[EnvName, EnvValue] = Field(
        default={}, description='a table of strings, { NAME = "value" }'
    )


class ConfigModel(_Table):
    backend: BackendModel = Field(default=BackendModel(), description="a table, [backend]")
    serve: ServeModel = Field(default=ServeModel(), description="a table, [serve]")
    defaults: LimitsModel = Field(default=LimitsModel(), description="a table, [defaults]")
    toolkit: Annotated[dict[ToolkitName, ToolkitModel], AfterValidator(_some)] = Field(
        default={}, validate_default=True, description="tables, [toolkit.NAME]"
    )


def validate(content: Mapping[str, object]) -> ConfigModel | list[tuple[str, str]]:
    """The checked configuration, or every fault in it as (dotted path, sentence without it)."""
    try:
        return ConfigModel.model_validate(content)
    except ValidationError as error:
        found = [
            _fault(tuple(row["loc"]), row["type"], row.get("ctx", {}).get("error"), content)
            for row in error.errors(include_url=False, include_input=False)
        ]
    return list(dict.fromkeys(found))


def is_key_in_file(content: Mapping[str, object]) -> bool:
    """Whether somebody seems to have written the API key itself into the configuration."""
    backend = content.get("backend")
    tables = (content, backend if isinstance(backend, Mapping) else {})
    return any(_KEY_NAMES.intersection(table) for table in tables)


def _fault(
    loc: tuple[int | str, ...], kind: str, cause: object, content: Mapping[str, object]
) -> tuple[str, str]:
    # pydantic's mark of a key that its validator refused; a table may have a key of that name too.
    of_key = kind == "value_error" and loc[-1:] == ("[key]",)
    names = list(loc[:-1] if of_key else loc)
    path = dotted(names)
    if kind == "extra_forbidden":
        return path, _unknown(names, content)
    description = _allowed(names)
    if kind == "missing":
        return path, f"missing; {description}"
    if isinstance(cause, ValueError) and not isinstance(cause, _Rule):
        sentence = printable(str(cause))
        if len(sentence) <= MAX_SENTENCE_CHARS:
            return path, sentence  # it quotes the value itself, or speaks of the path
    rule = str(cause) if isinstance(cause, _Rule) else ""
    return path, f"found {_shown(names, content)}; {rule or f'allowed: {description}'}"


def _unknown(names: list[int | str], content: Mapping[str, object]) -> str:
    table, name = names[:-1], str(names[-1])
    if name in _KEY_NAMES and table in ([], ["backend"]):
        return "no key may be written here; api-key-file names the file that holds it"
    known = sorted(
        field.alias or field_name for field_name, field in _model(table).model_fields.items()
    )
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, 1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    if table[:1] == ["toolkit"] and isinstance(_value(names, content), Mapping):
        quoted = f'[toolkit."{table[1]}.{name}"]'
        return f"unknown key; a toolkit whose name has a dot is written {printable(quoted)}"
    return f"unknown key; allowed: {', '.join(known)}"


def _model(names: Iterable[int | str]) -> type[_Table]:
    """The table's model at the given path."""
    match list(names):
        case ["backend", *_]:
            return BackendModel
        case ["serve", *_]:
            return ServeModel
        case ["defaults", *_]:
            return LimitsModel
        case ["toolkit", _, *_]:
            return ToolkitModel
        case _:
            return ConfigModel


def _allowed(names: list[int | str]) -> str:
    """What may stand at the path."""
    match names:
        case ["toolkit", _]:
            return 'a table, [toolkit.NAME] with path = "…"'
        case ["toolkit", _, "env", _]:
            return "a string"
        case ["toolkit", _, "data", int()]:
            return _A_PATH
    fields = _model(names[:-1]).model_fields.items()
    return next((f.description or "" for n, f in fields if names[-1] == (f.alias or n)), "")


def _value(names: Iterable[int | str], content: object) -> object:
    for part in names:
        if isinstance(content, Mapping):
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            content = content[part]
        else:
            return None
    return content


def _shown(names: list[int | str], content: Mapping[str, object]) -> str:
    """A value as it may be shown: never one of an environment, nor an address with a password."""
    value, is_env = _value(names, content), names[2:3] == ["env"]
    match value:
        case Mapping():
            return "a table"
        case list():
            return "a list"
        case bool():
            return "true or false" if is_env else json.dumps(value)
        case int() | float():
            # Beyond that, Python may refuse to write the number out.
            return f"the number {value}" if abs(value) < 1e15 and not is_env else "a number"
        case str() if not is_env and "@" not in value:
            text = printable(json.dumps(value, ensure_ascii=False))
            return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
        case str():
            return "a string"
        case _:
            return "a date or time"


def dotted(names: Iterable[int | str]) -> str:
    """`toolkit."my.kit".data[0]`: a path as TOML would write it."""
    text = ""
    for part in names:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if _BARE_KEY.fullmatch(part) else json.dumps(part, ensure_ascii=False)
            text += f".{key}" if text else key
    return printable(text)
