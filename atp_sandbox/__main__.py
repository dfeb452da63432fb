"""`python -m atp_sandbox` and the script `atp-sandbox`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with 0, 1 (it failed) or 2 (it was not understood)."""
    if sys.platform != "linux":
        sys.stderr.write(
            "error: atp-sandbox runs on Linux only\n"
            f"cause: this is {sys.platform}, which has no namespaces to isolate a toolkit with\n"
            "tip: use a Linux machine, virtual machine or container\n"
        )
        sys.exit(1)
    from atp_sandbox.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
