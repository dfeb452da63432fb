"""`atp-sandbox inspect`: what a toolkit registers, and what would separate its calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atp_sandbox.cli.options import LIFETIME, reroutes_from, toolkit_options, toolkits_from
from atp_sandbox.isolation import Isolation, Level, Waivable
from atp_sandbox.settings import Lifetime, LifetimeKind, ToolkitSettings

if TYPE_CHECKING:
    from atp_sandbox.single import SingleToolkit

BETWEEN_TOOLKITS = {
    Level.STRICT: (
        "Between this toolkit, other toolkits and the machine: the jail (its own namespaces, root "
        "directory, user id and resource limits)."
    ),
    Level.CONTAINER: (
        "Between this toolkit, other toolkits and the machine: Landlock and the system call "
        "filter, and for root a user id of its own. No namespaces."
    ),
    Level.NONE: "Between this toolkit, other toolkits and the machine: NOTHING.",
}
NETWORK = {
    Level.STRICT: "none: nothing is reachable from the jail",
    Level.CONTAINER: "none: sockets are refused",
    Level.NONE: "ALL that this machine can reach",
}
BETWEEN_CALLS = {
    LifetimeKind.CALL: (
        "Between its calls: a process and a scratch directory of their own. That holds against "
        "code that turns hostile during a call and against leftovers; not against a toolkit whose "
        "imported code is malicious, which is handed the tokens of its calls anyway."
    ),
    LifetimeKind.CALLS: (
        "Between its calls: nothing, for up to N calls: they run one after the other in one "
        "process and share its memory."
    ),
    LifetimeKind.JAIL: "Between its calls: a whole jail each, also from its own imported code.",
}


@click.command()
@click.argument("toolkit", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--lifetime",
    type=LIFETIME,
    metavar="call|calls:N|jail",
    help="Lifetime to look at it with. [call]",
)
@toolkit_options
def inspect(
    toolkit: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what a toolkit registers and what would separate its calls.

    The toolkit is imported in a jail, as `serve` does it; nothing is registered anywhere.

    \b
    Example:
      atp-sandbox inspect toolkit.py
    """
    from atp_sandbox import log
    from atp_sandbox.single import SingleToolkit

    log.configure(level=log.WARNING)
    (settings,) = toolkits_from([toolkit], options)
    with SingleToolkit(settings, reroutes_from(options)) as single:
        found = describe(settings, single)
    click.echo(json.dumps(found, indent=2) if as_json else render(found))


def describe(settings: ToolkitSettings, single: SingleToolkit) -> dict[str, Any]:
    """The findings as plain JSON values; no key is among them."""
    discovery, lifetime, isolation = single.discovery, single.lifetime, settings.isolation
    return {
        "toolkit": settings.name,
        "lifetime": str(lifetime),
        "ended": discovery.ended,
        "isolation": {
            "level": isolation.level.value,
            "waived": sorted(isolation.waived),
            "layers": single.layers,
            "warnings": isolation.warnings(),
        },
        "separates": [BETWEEN_TOOLKITS[isolation.level], _between_calls(isolation, lifetime)],
        "network": "these hosts alone" if settings.egress.allowed else NETWORK[isolation.level],
        "egress": settings.egress.lines(),
        "subprocess": settings.may_start_programs,
        "limits": {
            "time_s": settings.limits.time_s,
            "memory_bytes": settings.limits.memory_bytes,
            "output_bytes": settings.limits.output_bytes,
            "scratch_bytes": settings.limits.scratch_bytes,
        },
        "clients": [
            {
                "app_name": client.app_name,
                "base_url": client.base_url,
                "started": client.started,
            }
            for client in discovery.clients
        ],
        "tools": [
            {
                "name": tool.name,
                "description": tool.description,
                "params": list(tool.params),
                "required": list(tool.required),
                "auth_provider": tool.auth_provider,
                "auth_type": tool.auth_type,
                "auth_with": tool.auth_with,
                "needs_token": tool.declares_auth,
                "client": tool.client,
            }
            for tool in discovery.registrations
        ],
    }


def _between_calls(isolation: Isolation, lifetime: Lifetime) -> str:
    if isolation.level is Level.NONE:
        return "Between its calls: NOTHING but a process each."
    if Waivable.LANDLOCK in isolation.waived and lifetime.kind is LifetimeKind.CALL:
        return (
            "Between its calls: a process and a scratch directory of their own, but no Landlock "
            "domain, which was waived: they can reach each other's memory."
        )
    return BETWEEN_CALLS[lifetime.kind]


def render(found: dict[str, Any]) -> str:
    """The findings for a person; the toolkit's text is made harmless."""
    from atp_sandbox.limits import format_duration, format_size
    from atp_sandbox.log import printable

    limits = found["limits"]
    rows = [
        f"Toolkit   {found['toolkit']}",
        f"Lifetime  {found['lifetime']}",
        f"Limits    {format_duration(limits['time_s'])}, memory "
        f"{format_size(limits['memory_bytes'])}, output {format_size(limits['output_bytes'])}, "
        f"scratch {format_size(limits['scratch_bytes'])}",
        f"Network   {found['network']}",
        f"Isolation {found['isolation']['level']}: {', '.join(found['isolation']['layers'])}",
    ]
    rows += [f"          ⚠ {warning}" for warning in found["isolation"]["warnings"]]
    rows += [f"Egress    {line}" for line in found["egress"]]
    if found["subprocess"]:
        rows.append("Programs  its tools may start those of this machine, inside the jail")
    for client in found["clients"]:
        state = "" if client["started"] else "  (never started)"
        rows.append(
            f"Client    {printable(client['app_name'])}  {printable(client['base_url'])}{state}"
        )
    rows += ["", "Tools"]
    for tool in found["tools"]:
        names = [n if n in tool["required"] else f"[{n}]" for n in tool["params"]]
        names += [n for n in tool["required"] if n not in tool["params"]]
        rows.append(f"  {printable(tool['name'])}({printable(', '.join(names))})")
        description = printable(tool["description"].strip().split("\n")[0])
        if description:
            rows.append(f"      {description[:200]}")
        if tool["needs_token"]:
            auth = " ".join(a for a in (tool["auth_provider"], tool["auth_type"]) if a)
            rows.append(f"      needs a token {printable(auth)}".rstrip())
    rows += ["", "What separates what"]
    rows += [f"  {sentence}" for sentence in found["separates"]]
    return "\n".join(rows)
