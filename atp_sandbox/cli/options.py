"""Options that several commands share, and what they mean as values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from atp_sandbox.errors import UsageError
from atp_sandbox.isolation import Isolation, Level, parse_waived
from atp_sandbox.limits import Limits, format_duration, format_size, parse_duration, parse_size
from atp_sandbox.policy import EgressPolicy, Reroute, parse_reroute, policy_of
from atp_sandbox.settings import (
    RESERVED_ENV,
    Lifetime,
    LifetimeKind,
    ToolkitSettings,
    parse_lifetime,
)

F = TypeVar("F", bound=Callable[..., Any])

DEFAULTS = Limits()
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Parsed(click.ParamType[Any]):
    """An option whose text a function of ours understands."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except (ValueError, OverflowError) as error:
            self.fail(str(error), param, ctx)


SIZE = _Parsed("size", parse_size)
DURATION = _Parsed("duration", parse_duration)
LIFETIME = _Parsed("lifetime", parse_lifetime)

isolation_options = (
    click.option(
        "--isolation",
        type=click.Choice([level.value for level in Level]),
        help="strict: namespaces and all. container: for inside a container that forbids them. "
        "none: plain processes, for development. [strict]",
    ),
    click.option(
        "--waive",
        multiple=True,
        metavar="LAYER",
        help="Do without landlock, seccomp or cgroup, by name; said at every start.",
    ),
)


egress_options = (
    click.option(
        "--allow",
        multiple=True,
        metavar="HOST[:PORT]",
        help="A host that the toolkit may reach, or *.DOMAIN; port 443 if none is said. [none]",
    ),
    click.option(
        "--private-ok",
        multiple=True,
        metavar="HOST",
        help="An allowed host whose address may be private or this machine's own.",
    ),
    click.option(
        "--inject",
        multiple=True,
        metavar="PROVIDER=HOST",
        help="The tools get a placeholder for their token; the real one of this provider is put "
        "in outside the jail, for this host alone.",
    ),
    click.option(
        "--reroute",
        multiple=True,
        metavar="HOST[:PORT]=ADDRESS[:PORT]",
        help="Where an allowed host is, in place of its name's answer: for a stand-in.",
    ),
    click.option(
        "--learn-egress",
        is_flag=True,
        help="Refuse as ever, and print the lines that would allow what was asked for.",
    ),
)


def toolkit_options(command: F) -> F:
    """What a toolkit given on the command line may use, and how it is confined."""
    options = [
        click.option(
            "--env",
            "env",
            multiple=True,
            metavar="NAME[=VALUE]",
            help="Environment of the toolkit: a value, or this shell's. Not for secrets.",
        ),
        click.option(
            "--data",
            "data",
            multiple=True,
            metavar="PATH",
            type=click.Path(path_type=Path),
            help="A file or folder that the toolkit needs beside itself, read-only.",
        ),
        click.option(
            "--time",
            "time_s",
            type=DURATION,
            metavar="DURATION",
            help=f"Longest time of a call, from receipt. [{format_duration(DEFAULTS.time_s)}]",
        ),
        click.option(
            "--cpu",
            "cpu_s",
            type=DURATION,
            metavar="DURATION",
            help="Most processor time of a call, all threads together. [as its time allows]",
        ),
        click.option(
            "--import-time",
            "import_time_s",
            type=DURATION,
            metavar="DURATION",
            help="Longest time of the toolkit's import. "
            f"[{format_duration(DEFAULTS.import_time_s)}]",
        ),
        click.option(
            "--memory",
            "memory_bytes",
            type=SIZE,
            metavar="SIZE",
            help=f"What a call may add to its process. [{format_size(DEFAULTS.memory_bytes)}]",
        ),
        click.option(
            "--output",
            "output_bytes",
            type=SIZE,
            metavar="SIZE",
            help=f"Largest result, as JSON. [{format_size(DEFAULTS.output_bytes)}]",
        ),
        click.option(
            "--subprocess",
            is_flag=True,
            help="Let its tools start programs; each call then gets a jail of its own.",
        ),
        *egress_options,
        *isolation_options,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def limits_from(given: Mapping[str, Any]) -> Limits:
    """The default limits, with those that were given."""
    names = {field.name for field in fields(Limits)} & given.keys()
    return replace(DEFAULTS, **{name: given[name] for name in names if given[name] is not None})


def isolation_from(given: Mapping[str, Any]) -> Isolation:
    """The level and what is waived of it; UsageError if it cannot be."""
    try:
        level = Level(given["isolation"] or Level.STRICT)
        return Isolation(level, parse_waived(given["waive"]))
    except ValueError as error:
        raise UsageError(f"--waive: {error}") from None


def egress_from(given: Mapping[str, Any]) -> EgressPolicy:
    """What may be reached; UsageError if it contradicts itself."""
    bound: dict[str, list[str]] = {}
    for pair in given["inject"]:
        provider, has_host, host = pair.partition("=")
        if not has_host:
            raise UsageError(f"--inject: {pair!r} is no PROVIDER=HOST")
        bound.setdefault(provider, []).append(host)
    try:
        return policy_of(given["allow"], given["private_ok"], bound)
    except ValueError as error:
        tip = "every host of --private-ok and --inject must be allowed: --allow HOST"
        raise UsageError(f"egress: {error}", tip=tip) from None


def reroutes_from(given: Mapping[str, Any]) -> tuple[Reroute, ...]:
    """Where hosts are said to be; UsageError."""
    found = []
    for pair in given["reroute"]:
        wanted, has_place, place = pair.partition("=")
        if not has_place:
            raise UsageError(f"--reroute: {pair!r} is no HOST[:PORT]=ADDRESS[:PORT]")
        try:
            found.append(parse_reroute(wanted, place))
        except ValueError as error:
            raise UsageError(f"--reroute: {error}") from None
    return tuple(found)


def environment_from(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` as given, `NAME` from our own environment; UsageError if it is not there."""
    environment: dict[str, str] = {}
    for pair in pairs:
        name, has_value, value = pair.partition("=")
        if not _ENV_NAME.fullmatch(name):
            raise UsageError(f"--env: {name!r} is no name of an environment variable")
        if name in RESERVED_ENV:
            raise UsageError(
                f"--env: {name} is reserved",
                tip="toolkits see a placeholder; the real key stays with the supervisor",
            )
        if not has_value:
            if name not in os.environ:
                raise UsageError(f"--env: {name} is not set here", tip=f"write --env {name}=VALUE")
            value = os.environ[name]
        environment[name] = value
    return environment


def toolkits_from(paths: Sequence[Path], given: Mapping[str, Any]) -> tuple[ToolkitSettings, ...]:
    """One toolkit a path, named after it, with the options of `toolkit_options` as `given`.

    UsageError if values for one are given to several, or exclude each other.
    """
    env, data = given["env"], given["data"]
    if len(paths) > 1 and (env or data or given["allow"]):
        raise UsageError(
            "--env, --data and --allow are for one toolkit",
            tip="with several, write an atp-sandbox.toml with a [toolkit.NAME] table for each",
        )
    subprocess = given["subprocess"]
    usual = Lifetime(LifetimeKind.JAIL) if subprocess else Lifetime()
    first = ToolkitSettings(
        name="",
        path=Path(),
        data=tuple(data),
        env=environment_from(env),
        limits=limits_from(given),
        isolation=isolation_from(given),
    )
    try:
        first = replace(
            first, lifetime=given.get("lifetime") or usual, may_start_programs=subprocess
        )
    except ValueError as error:
        raise UsageError(f"--subprocess: {error}", tip="leave --lifetime out") from None
    try:
        first = replace(first, egress=egress_from(given))
    except ValueError as error:
        raise UsageError(str(error), tip="leave --allow out, or --isolation") from None
    taken: set[str] = set()
    toolkits = []
    for path in paths:
        name = _name(path, taken)
        taken.add(name)
        toolkits.append(replace(first, name=name, path=path))
    return tuple(toolkits)


def _name(path: Path, taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.resolve().stem)[:60] or "toolkit"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name
