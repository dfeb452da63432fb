"""Entry of the egress process: `python -I -S -B boot.py CONFIG_FD`, with an empty environment.

The supervisor's own import path comes with the configuration, since this interpreter is to look at
no environment and no site directory.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        config = json.load(file)
    sys.path[:] = config["path"]
    from atp_sandbox.egress.process import run

    run(config)


if __name__ == "__main__":
    main()
