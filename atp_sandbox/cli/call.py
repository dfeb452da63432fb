"""`atp-sandbox call`: one call in the jail, no backend."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from atp_sandbox.cli.options import reroutes_from, toolkit_options, toolkits_from
from atp_sandbox.errors import UsageError
from atp_sandbox.outcome import Failure, outcome_json


@click.command()
@click.argument("toolkit", type=click.Path(path_type=Path))
@click.argument("tool")
@click.argument("arguments", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--params", metavar="JSON", help="All parameters as one JSON object.")
@click.option(
    "--auth-token-env", metavar="VAR", help="Environment variable that holds the auth_token."
)
@toolkit_options
def call(
    toolkit: Path,
    tool: str,
    arguments: tuple[str, ...],
    params: str | None,
    auth_token_env: str | None,
    **options: Any,
) -> int:
    """Run one tool of a toolkit in the sandbox, without any backend.

    NAME=VALUE passes a string, NAME:=JSON any JSON value. The result is printed as JSON; the exit
    code is 1 if it is an error. What the tool prints goes to standard error.

    \b
    Examples:
      atp-sandbox call toolkit.py hello_world name=Ada
      atp-sandbox call toolkit.py add a:=1 b:=2
      TOKEN=… atp-sandbox call toolkit.py get_contacts --auth-token-env TOKEN
    """
    from atp_sandbox import log
    from atp_sandbox.admission import ServedTool, admit
    from atp_sandbox.atp.messages import ToolRequest
    from atp_sandbox.single import SingleToolkit

    log.configure(level=log.WARNING)
    given = _parameters(arguments, params)
    token = _token(auth_token_env)
    (settings,) = toolkits_from([toolkit], options)
    request = ToolRequest("null", tool, given, json.dumps(given), token)
    with SingleToolkit(settings, reroutes_from(options)) as single:
        tools = {t.name: ServedTool(settings.name, "", t) for t in single.discovery.registrations}
        outcome: Any = admit(request, tools)
        printed = ""
        if outcome is None:
            token_bytes = None if token is None else token.encode()
            outcome, printed = single.call(
                tools[tool].tool, request.params_json.encode(), token_bytes
            )
    if options["learn_egress"] and (wanted := single.learned.options(settings.name)):
        click.echo(f"To allow what was refused: {' '.join(wanted)}", err=True)
    if printed:
        click.echo(printed, err=True, nl=not printed.endswith("\n"))
    click.echo(outcome_json(outcome))
    return 1 if isinstance(outcome, Failure) else 0


def _parameters(arguments: tuple[str, ...], params: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if params is not None:
        try:
            given = json.loads(params)
        except ValueError as error:
            raise UsageError("--params is not JSON", cause=str(error)) from None
        if not isinstance(given, dict):
            raise UsageError("--params must be a JSON object", tip="""--params '{"name": "Ada"}'""")
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        if not has_value or not name:
            raise UsageError(f"{argument!r} is no parameter", tip="write NAME=VALUE or NAME:=JSON")
        if name.endswith(":"):
            try:
                given[name[:-1]] = json.loads(value)
            except ValueError as error:
                raise UsageError(f"{name}= is not followed by JSON", cause=str(error)) from None
        else:
            given[name] = value
    try:
        json.dumps(given, allow_nan=False)
    except ValueError:
        raise UsageError("parameters must be finite numbers: no NaN, no Infinity") from None
    return given


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UsageError(f"--auth-token-env: {variable} is not set here")
    return json.dumps(os.environ[variable])
