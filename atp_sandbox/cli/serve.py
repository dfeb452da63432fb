"""`atp-sandbox serve`: the main job."""

from __future__ import annotations

import gc
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from atp_sandbox.cli.options import (
    DURATION,
    LIFETIME,
    reroutes_from,
    toolkit_options,
    toolkits_from,
)
from atp_sandbox.errors import UsageError
from atp_sandbox.settings import (
    BackendSettings,
    JournalMode,
    ServeOptions,
    ServeSettings,
)

CONFIG_NAME = "atp-sandbox.toml"


@click.command()
@click.argument("toolkits", metavar="[TOOLKIT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--embedded", is_flag=True, help="Start a backend of our own and serve there.")
@click.option("--api-key-file", metavar="FILE", help="File with the API key; - reads it from here.")
@click.option("--app-name", envvar="ATP_APP_NAME", help="Name of the application. [ATP_APP_NAME]")
@click.option("--base-url", help="Address of the ATP backend. [ATP_BASE_URL]")
@click.option(
    "--as-written",
    is_flag=True,
    help="Connect where the toolkits say, with the keys they hold: the toolkit then chooses.",
)
@toolkit_options
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Calls of one toolkit that run at once. [4]",
)
@click.option(
    "--queue",
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="Calls of one toolkit that may wait; more are answered `overloaded`. [256]",
)
@click.option(
    "--lifetime",
    type=LIFETIME,
    metavar="call|calls:N|jail",
    help="How long a process serves: one call, N calls, or a whole jail a call. [call]",
)
@click.option(
    "--ws-path",
    type=click.Choice(["0.1", "0.2"]),
    help="SDK generation of the websocket path and the registration. [0.2]",
)
@click.option("--no-source", is_flag=True, help="Do not send the tools' source to the backend.")
@click.option(
    "--sample-responses",
    is_flag=True,
    help="Call every tool once, in its jail, for a sample response to register.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where snapshots and locks are kept.",
)
@click.option(
    "--journal",
    type=click.Choice([mode.value for mode in JournalMode]),
    help="Keep what is due in the state directory, so that it outlives this process; `required`: "
    "take no calls without. [on; off with --embedded]",
)
@click.option(
    "--grace",
    type=DURATION,
    metavar="DURATION",
    help="Time for running calls once a stop is asked for. [the longest --time]",
)
@click.option(
    "--reload", is_flag=True, help="Take over changes of the toolkits' files while serving."
)
@click.option(
    "--total-queue",
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="Calls of all toolkits that may wait. [4096]",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Configuration; without toolkits, ./{CONFIG_NAME} is read.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of the log on standard error.",
)
def serve(**given: Any) -> int:
    """Serve toolkits: connect to the backend and run every call in a process of its own.

    A TOOLKIT is a Python file or a folder with a __main__.py, toolkit.py or main.py. The API key
    comes from --api-key-file or ATP_API_KEY, never from the command line; toolkits do not see it.

    \b
    Examples:
      atp-sandbox serve toolkit.py --embedded
      ATP_API_KEY=… atp-sandbox serve toolkit.py --base-url https://api.chat-atp.com
      atp-sandbox serve a.py b/ --api-key-file key --base-url URL --time 10s --memory 512M
      atp-sandbox serve                      (reads ./atp-sandbox.toml)

    Ctrl-C or SIGTERM drains: running calls finish and their answers go out. Again ends at once.
    SIGHUP reloads the configuration and the toolkits.
    """
    from atp_sandbox import crash_points, log
    from atp_sandbox.backend.embedded import EmbeddedBackend
    from atp_sandbox.supervisor import Supervisor

    log.configure(given["log_format"])
    crash_points.arm(os.environ)
    _raise_descriptor_limit()
    # Taken out of the environment first: no process that we start inherits it.
    key_from_environment = os.environ.pop("ATP_API_KEY", None)
    settings = _read(given)
    key = _read_key(given, settings.backend, key_from_environment)
    settings = replace(settings, backend=replace(settings.backend, api_key=key))
    embedded = None
    try:
        if given["embedded"]:
            _refuse_with_embedded(given)
            embedded = EmbeddedBackend(port=0)
            key = secrets.token_urlsafe(24)
            settings = _with_embedded(settings, key, embedded.url)

        def reread() -> ServeSettings:
            """The same once more, but for the key: what it came from may be a pipe."""
            new = _read(given)
            return new if embedded is None else _with_embedded(new, key, embedded.url)

        supervisor = Supervisor(settings, reread=reread)

        def on_ready() -> None:
            _look_rarely_for_garbage()
            if embedded is not None:
                _explain(supervisor, embedded.url)

        supervisor.on_ready = on_ready
        try:
            return supervisor.run()
        finally:
            for name in supervisor.learned.toolkits():
                lines = [f"[toolkit.{name}]", *supervisor.learned.lines(name)]
                click.echo("\n".join(lines), err=True)
    finally:
        if embedded is not None:
            embedded.close()


def _look_rarely_for_garbage() -> None:
    """What there is now stays; of what comes, little is ever part of a cycle.

    With the usual threshold of 700 the looks cost 3 µs a call, and long ones a few ms at a time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _raise_descriptor_limit() -> None:
    """As many descriptors as we may have: each running call takes a handful."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _with_embedded(settings: ServeSettings, key: str | None, url: str) -> ServeSettings:
    backend = replace(settings.backend, api_key=key, base_url=url, as_written=False)
    return replace(settings, backend=backend)


def _read(given: dict[str, Any]) -> ServeSettings:
    """What the command line and the configuration ask for; without the key."""
    from atp_sandbox.config import BackendConfig, load_config
    from atp_sandbox.state import default_state_dir

    paths: tuple[Path, ...] = given["toolkits"]
    config_path: Path | None = given["config_path"]
    if config_path is None and not paths:
        config_path = Path(CONFIG_NAME)
        if not config_path.exists():
            raise UsageError(
                "no toolkit to serve",
                cause=f"none was named, and there is no {CONFIG_NAME} here",
                tip="atp-sandbox serve toolkit.py --embedded",
            )
    config, options = BackendConfig(), ServeOptions()
    if config_path is not None:
        _refuse_with_config(given)
        loaded = load_config(config_path)
        toolkits, config, options = loaded.toolkits, loaded.backend, loaded.serve
    else:
        toolkits = toolkits_from(paths, given)
    key_file = given["api_key_file"] or config.api_key_file
    backend = BackendSettings(
        api_key_file=None if key_file is None else str(key_file),
        base_url=given["base_url"] or os.environ.get("ATP_BASE_URL") or config.base_url,
        app_name=given["app_name"] or config.app_name,
        as_written=given["as_written"] or config.as_written,
        ws_path=given["ws_path"] or config.ws_path,
        send_source=config.send_source and not given["no_source"],
        sample_responses=config.sample_responses or given["sample_responses"],
    )
    state_dir = given["state_dir"] or default_state_dir(os.environ, os.geteuid())
    return ServeSettings(
        toolkits,
        backend,
        Path(state_dir),
        given["log_format"],
        reroutes=reroutes_from(given),
        options=_options(given, options),
        config_path=config_path,
        learns_egress=given["learn_egress"],
    )


def _read_key(
    given: dict[str, Any], backend: BackendSettings, key_from_environment: str | None
) -> str | None:
    from atp_sandbox.config import read_api_key

    is_said = given["api_key_file"] is not None
    if backend.as_written and is_said:
        raise UsageError(
            "--as-written and --api-key-file exclude each other",
            tip="with --as-written the toolkits' own keys are used",
        )
    if key_from_environment is not None and not is_said:
        return key_from_environment.strip() or None
    return None if backend.api_key_file is None else read_api_key(backend.api_key_file, sys.stdin)


def _options(given: dict[str, Any], otherwise: ServeOptions) -> ServeOptions:
    """What is said here goes before what the configuration says."""
    journal = otherwise.journal
    if given["journal"] is not None:
        journal = JournalMode(given["journal"])
    elif given["embedded"]:
        journal = JournalMode.OFF  # the other side of the link ends with us
    return replace(
        otherwise,
        journal=journal,
        grace_s=given["grace"] or otherwise.grace_s,
        reloads=given["reload"] or otherwise.reloads,
        queue=otherwise.queue if given["total_queue"] is None else given["total_queue"],
    )


def _refuse_with_config(given: dict[str, Any]) -> None:
    """What a configuration says per toolkit cannot be said for all on the command line too."""
    names = {
        "toolkits": "TOOLKIT",
        "env": "--env",
        "data": "--data",
        "time_s": "--time",
        "cpu_s": "--cpu",
        "import_time_s": "--import-time",
        "memory_bytes": "--memory",
        "output_bytes": "--output",
        "concurrency": "--concurrency",
        "queue": "--queue",
        "lifetime": "--lifetime",
        "subprocess": "--subprocess",
        "allow": "--allow",
        "private_ok": "--private-ok",
        "inject": "--inject",
        "isolation": "--isolation",
        "waive": "--waive",
    }
    both = [shown for name, shown in names.items() if given[name] not in (None, (), False)]
    if both:
        raise UsageError(
            f"{', '.join(both)} cannot be given together with a configuration",
            tip="write it into the configuration, under [defaults] or [toolkit.NAME]",
        )


def _refuse_with_embedded(given: dict[str, Any]) -> None:
    for name, shown in (
        ("as_written", "--as-written"),
        ("base_url", "--base-url"),
        ("api_key_file", "--api-key-file"),
    ):
        if given[name]:
            raise UsageError(f"--embedded and {shown} exclude each other")


def _explain(supervisor: Any, url: str) -> None:
    """How to call what is served now, with a real tool and its real parameters."""
    import json

    tools = [served.tool for route in supervisor.routes for served in route.tools.values()]
    tool = min(tools, key=lambda t: (t.declares_auth, len(t.required), t.index))
    body = json.dumps({"params": {name: "..." for name in tool.required}})
    click.echo(f"Tools:  curl {url}/tools", err=True)
    click.echo(f"Call:   curl {url}/tools/{tool.name} -d '{body}'", err=True)
    click.echo("Stop:   Ctrl-C", err=True)
