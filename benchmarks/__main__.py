"""`python -m benchmarks`: how fast the sandbox is, beside its peers and its floors."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks import memory, own_work, peers, starts, storms, throughput, variants
from benchmarks.generator import PeerGone, WrongAnswer
from benchmarks.settings import Settings
from benchmarks.statistics import Section, table
from benchmarks.surroundings import summary, surroundings
from benchmarks.targets import TARGETS, judge, verdicts_table

SECTIONS: dict[str, tuple[Callable[[Settings], Section], str]] = {
    "throughput": (throughput.measure, "calls/s, latency, CPU by lifetime and outstanding calls"),
    "peers": (peers.measure, "the sandbox beside the SDK, process pools and floors"),
    "isolation": (variants.isolation, "what the levels none, container and strict cost"),
    "journal": (variants.journal, "what the journal costs"),
    "work": (own_work.measure, "a tool of 10 ms of its own work"),
    "memory": (memory.measure, "of supervisor, idle toolkit and worker"),
    "starts": (starts.measure, "until ready; after a killed worker or jail"),
    "toolkits": (variants.toolkits, "1, 10 and 100 of them, calls of one"),
    "zygotes": (variants.zygotes, "toolkits that hold 0, 32 and 96 MB after their import"),
    "payloads": (variants.payloads, "100 bytes to 1 MB"),
    "storms": (storms.measure, "a bystander's latency beside a hostile neighbour"),
}
"""What can be asked for, in the order in which it is measured."""
_NAMES = "\n".join(f"      {name:11} {told}" for name, (_, told) in SECTIONS.items())


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"""Measure the sandbox beside its peers and its floors; all parts if no NAME is given.

    All run in turn, several rounds; shown are medians, with the lowest and highest round in
    brackets. Every answer is compared with what is due: a wrong one ends the run with exit code 1.
    Other programs on the machine make every figure worse, so stop them first.

    \b
    NAMEs:
      {_NAMES.strip()}

    \b
    Examples:
      python -m benchmarks
      python -m benchmarks throughput isolation --json figures.json
      python -m benchmarks --plot plots/ --json figures.json
      python -m benchmarks --quick            (does it all work? says nothing of speed)
    """,
)
@click.argument("names", nargs=-1, type=click.Choice(list(SECTIONS)), metavar="[NAME]...")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Every sample, as JSON.")
@click.option("--plot", "plot_dir", type=click.Path(path_type=Path), help="Plots, PNG and SVG.")
@click.option("--quick", is_flag=True, help="A tenth of a second each, one round: a smoke test.")
def main(
    names: tuple[str, ...], json_file: Path | None, plot_dir: Path | None, quick: bool
) -> None:
    if plot_dir is not None:
        from benchmarks import plots  # only this needs matplotlib; better told now than at the end

    found = surroundings()
    began = time.monotonic()
    sections: dict[str, Section] = {}

    def on_progress(line: str) -> None:
        click.echo(f"{time.monotonic() - began:5.0f} s  {line}", err=True)

    with tempfile.TemporaryDirectory(prefix="atp-benchmark-") as folder:
        Path(folder).chmod(0o755)  # outside a jail of namespaces, root's toolkits run as others
        for name, (measure, _) in SECTIONS.items():
            if names and name not in names:
                continue
            try:
                sections[name] = measure(Settings(Path(folder) / name, quick, on_progress))
            except (WrongAnswer, PeerGone, RuntimeError) as error:
                click.echo(f"error: {name}: {error}", err=True)
                sys.exit(1)
    verdicts = [judge(target, sections) for target in TARGETS]
    click.echo(summary(found) + "\n")
    for section in sections.values():
        click.echo(table(section) + "\n")
    told = [verdict for verdict in verdicts if verdict.found is not None or not names]
    if told:
        click.echo(verdicts_table(told))
    if quick:
        click.echo("\nThis was a smoke test: its figures say nothing of speed.")
    if json_file is not None:
        whole = {
            "surroundings": {**found, "seconds": round(time.monotonic() - began, 1)},
            "is_quick": quick,
            "sections": [asdict(section) for section in sections.values()],
            "targets": [{**asdict(v), "is_met": v.is_met} for v in verdicts],
        }
        json_file.write_text(json.dumps(whole, indent=1))
    if plot_dir is not None:
        click.echo("\n" + "\n".join(str(file) for file in plots.draw(sections, plot_dir)))


if __name__ == "__main__":
    main()
