"""`atp-sandbox doctor`: what this machine can enforce, by doing it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import click

_SIGNS = {"ok": "✓", "warn": "⚠", "fail": "✗", "skip": "○"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Show what this machine can enforce, by doing it.

    Starts a real jail with a real worker and looks at it. The exit code is 1 if `serve` would not
    start here.

    \b
    Example:
      atp-sandbox doctor
    """
    from atp_sandbox import log
    from atp_sandbox.doctor import examine, would_serve

    log.configure(level=log.ERROR)
    findings = examine()
    starts = would_serve(findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"would_serve": starts, "findings": rows}, indent=2))
        return 0 if starts else 1
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            click.echo(group)
        click.echo(f"  {_SIGNS[finding.state]} {finding.id:20} {finding.text}")
        if finding.remedy:
            click.echo(f"    {'':20} → {finding.remedy}")
    counts = Counter(str(finding.state) for finding in findings)
    shown = ", ".join(f"{counts[state]} {state}" for state in _SIGNS if counts[state])
    verdict = "serve would start" if starts else "serve would not start"
    click.echo(f"\n{shown}: {verdict}, with isolation strict")
    return 0 if starts else 1
