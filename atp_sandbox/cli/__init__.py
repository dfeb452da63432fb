"""The command line: one module a command, loaded when it is asked for.

The edge where every error becomes `error:` / `cause:` / `tip:` lines and an exit code.
"""

from __future__ import annotations

import importlib
import sys

import click

from atp_sandbox import __version__
from atp_sandbox.errors import SandboxError, UsageError

_COMMANDS = {
    "serve": "Serve toolkits: connect to the backend and run every call in a process of its own.",
    "call": "Run one tool of a toolkit in the sandbox, without any backend.",
    "inspect": "Show what a toolkit registers and what would separate its calls.",
    "doctor": "Show what this machine can enforce, by doing it.",
    "backend": "Run a small ATP backend on this machine, to develop toolkits against.",
}


class _LazyGroup(click.Group):
    """Imports a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(
            importlib.import_module(f"atp_sandbox.cli.{cmd_name}"), cmd_name
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            raise UsageError(
                f"there is no command {args[0]!r}",
                tip=f"did you mean {near[0]!r}?" if near else "see atp-sandbox --help",
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="atp-sandbox")
def cli() -> None:
    """Run other people's ATP toolkits safely: every call in an isolated process of its own.

    \b
    Try it, without an account:
      atp-sandbox serve toolkit.py --embedded
    Look at a toolkit first:
      atp-sandbox inspect toolkit.py
    Serve it:
      ATP_API_KEY=… atp-sandbox serve toolkit.py --base-url https://api.chat-atp.com
    """


def run() -> int:
    """The exit code of the command line in `sys.argv`."""
    try:
        result = cli(standalone_mode=False, prog_name="atp-sandbox")
    except click.exceptions.Abort:
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "atp-sandbox"
        shown = UsageError(error.format_message(), tip=f"see {command} --help")
        click.echo(shown.render(), err=True)
        return 2
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return 1
    except SandboxError as error:
        click.echo(error.render(), err=True)
        return error.exit_code
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    sys.stdout.flush()
    return result if isinstance(result, int) else 0
