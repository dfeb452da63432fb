"""`atp-sandbox doctor`: what this machine can enforce, by doing it."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from atp_sandbox.cli.options import isolation_from, isolation_options
from atp_sandbox.log import printable

if TYPE_CHECKING:
    from atp_sandbox.doctor import Finding, Report

_WIDTH = 80
_SIGNS = {"ok": "✓", "warn": "⚠", "fail": "✗", "skip": "○", "remedy": "→"}
_PLAIN_SIGNS = {"ok": "+", "warn": "!", "fail": "x", "skip": "-", "remedy": ">"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@isolation_options[0]
@isolation_options[1]
def doctor(as_json: bool, **options: Any) -> int:
    """Show what this machine can enforce, by doing it.

    Starts a real jail with a real worker, as `serve` would with the same --isolation and --waive.
    The worker says what the kernel says of it, and tries what it must not be able to do.

    \b
    ✓ holds
    ⚠ works, with less than there could be; the line below says how to get it
    ✗ `serve` would not start; the line below says what to do
    ○ not needed, waived, or not to be seen here

    The exit code is 1 if `serve` would not start, else 0.

    \b
    Examples:
      atp-sandbox doctor
      atp-sandbox doctor --isolation container         # inside an ordinary container
      atp-sandbox doctor --waive cgroup                # would it start without this layer?
      atp-sandbox doctor --json | jq -r '.findings[] | select(.state == "fail") | .remedy'
    """
    from atp_sandbox import log
    from atp_sandbox.doctor import examine

    log.configure(level=log.ERROR)
    report = examine(isolation_from(options))
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        click.echo("\n".join(render(report, encoding=sys.stdout.encoding or "utf-8")))
    return 0 if report.would_serve else 1


def render(report: Report, *, encoding: str = "utf-8") -> list[str]:
    """The lines for a person, in characters that `encoding` has."""
    lines = list(_lines(report, _SIGNS))
    try:
        "".join(lines).encode(encoding)
    except UnicodeEncodeError:
        plain = _lines(report, _PLAIN_SIGNS)
        return [line.encode(encoding, "backslashreplace").decode(encoding) for line in plain]
    return lines


def _lines(report: Report, signs: dict[str, str]) -> Iterator[str]:
    for note in report.notes:
        yield from _wrap(note, "Note: ", " " * 6)
    if report.notes:
        yield ""
    group = ""
    for finding in report.findings:
        if finding.group != group:
            group = finding.group
            yield group
        yield from _row(finding, signs)
    counts = Counter(str(finding.state) for finding in report.findings)
    shown = ", ".join(f"{counts[state]} {state}" for state in signs if counts[state])
    would = "would start" if report.would_serve else "would not start"
    yield ""
    yield f"{shown}: serve {would}, with isolation {report.isolation}"


def _row(finding: Finding, signs: dict[str, str]) -> Iterator[str]:
    head = f"  {signs[finding.state]} {finding.id:18} "
    yield from _wrap(finding.text, head, " " * len(head))
    first = f"    {signs['remedy']} "
    for line in finding.remedy.split("\n") if finding.remedy else ():
        if line.startswith("  "):
            yield f"      {printable(line)}"  # to be typed as it is
        else:
            yield from _wrap(line, first, " " * 6)
        first = " " * 6


def _wrap(text: str, first: str, further: str) -> list[str]:
    """Lines of 80 columns. A path is never cut: where one is long, further lines begin earlier."""
    text = printable(text)
    if max(map(len, text.split()), default=0) > _WIDTH - len(further):
        further = " " * 6
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
