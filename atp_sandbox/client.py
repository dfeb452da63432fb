"""`ToolKitClient` for one's own script: the published SDK's class, its tools run in a jail.

The script's top level runs twice: here, trusted, and in the jail as `__main__`, where the same
import gives the drop-in of `workers.atp_sdk`. So what a tool needs must be made by the script
itself, and what must not be seen by tools belongs after `start()`, which never returns in the jail.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from atp_sandbox import log
from atp_sandbox.errors import SandboxError, UsageError
from atp_sandbox.isolation import Isolation, parse_level, parse_waived
from atp_sandbox.limits import Limits
from atp_sandbox.policy import policy_of
from atp_sandbox.settings import (
    BackendSettings,
    ServeSettings,
    ToolkitSettings,
    parse_lifetime,
)
from atp_sandbox.state import default_state_dir
from atp_sandbox.supervisor import Supervisor

F = TypeVar("F", bound=Callable[..., object])

_made = 0
"""Clients made by this script so far: the same client has the same number in the jail."""


class ToolKitClient:
    """Registers functions of this script as tools and serves them, each call in its own process.

    `api_key`, `app_name` and `base_url` as in the SDK's documentation. Only by keyword: `limits`
    and `lifetime` (`call`, `calls:N`, `jail`) of the calls; `isolation` (`strict`, `container`,
    `none`) and the layers to `waive` by name; `egress`, the hosts that tools may reach
    (`api.example.com:443`), those of them that are `private_ok`, and for which providers the token
    is put in outside the jail (`inject`, provider to hosts); `env`, the environment of the jail,
    not for secrets; `data`, files and folders that the script needs beside itself; `ws_path`,
    `0.1` or `0.2`; `state_dir`.
    """

    def __init__(
        self,
        api_key: str,
        app_name: str,
        base_url: str = "https://chatatp-backend.onrender.com",
        *,
        limits: Limits | None = None,
        lifetime: str = "call",
        isolation: str = "strict",
        waive: Sequence[str] = (),
        egress: Sequence[str] = (),
        private_ok: Sequence[str] = (),
        inject: Mapping[str, Sequence[str]] | None = None,
        env: Mapping[str, str] | None = None,
        data: Sequence[str | Path] = (),
        ws_path: str = "0.2",
        state_dir: str | Path | None = None,
    ) -> None:
        global _made
        self._number, _made = _made, _made + 1
        self.app_name = app_name
        self.base_url = base_url.rstrip("/")
        self._backend = BackendSettings(
            api_key=api_key, base_url=self.base_url, ws_path=ws_path, only_client=self._number
        )
        self._limits = limits or Limits()
        self._lifetime = parse_lifetime(lifetime)
        self._isolation = Isolation(parse_level(isolation), parse_waived(waive))
        self._egress = policy_of(egress, private_ok, inject)
        self._env = dict(env or {})
        self._data = tuple(Path(path) for path in data)
        self._state_dir = state_dir
        self._lock = threading.Lock()
        self._supervisor: Supervisor | None = None
        self._thread: threading.Thread | None = None

    def register_tool(
        self,
        function_name: str,
        params: list[str],
        required_params: list[str],
        description: str,
        auth_provider: str | None,
        auth_type: str | None,
        auth_with: str | None,
    ) -> Callable[[F], F]:
        """A decorator that makes a function the tool `function_name`; it is returned as it is.

        What counts is the same call in the jail, where the function will run.
        """
        del function_name, params, required_params, description
        del auth_provider, auth_type, auth_with
        return lambda function: function

    def start(self) -> None:
        """Serve until `stop()`, Ctrl-C or SIGTERM; running calls are finished first.

        SandboxError says why nothing can be served.
        """
        supervisor = self._prepare()
        in_main_thread = threading.current_thread() is threading.main_thread()
        try:
            supervisor.run(handle_signals=in_main_thread)
        finally:
            self._supervisor = None

    def start_in_background(self) -> None:
        """Serve in a thread of our own; returns once every tool is registered and connected.

        SandboxError as `start`. End it with `stop()`. In the jail the script ends here, so whatever
        tools are to be served must be registered before.
        """
        ready = threading.Event()
        failure: list[BaseException] = []
        supervisor = self._prepare()
        supervisor.on_ready = ready.set

        def serve() -> None:
            try:
                supervisor.run(handle_signals=False)
            except BaseException as error:  # told to whoever waits below
                failure.append(error)
                if ready.is_set():
                    log.emit(log.ERROR, "serve_failed", str(error))
            finally:
                self._supervisor = None
                ready.set()

        self._thread = threading.Thread(target=serve, name="atp-sandbox", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            raise failure[0]

    def stop(self) -> None:
        """Let running calls finish, say good-bye and end `start()`; from any thread.

        Quietly does nothing before `start()`. Waits for a start in the background to end.
        """
        supervisor, thread = self._supervisor, self._thread
        if supervisor is not None:
            supervisor.request_stop()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def _prepare(self) -> Supervisor:
        with self._lock:
            if self._supervisor is not None:
                raise SandboxError("This client is already started.")
            if not logging.getLogger().handlers:
                log.configure()
            script = _main_script()
            toolkit = ToolkitSettings(
                name=script.stem,
                path=script,
                data=self._data,
                env=self._env,
                limits=self._limits,
                lifetime=self._lifetime,
                isolation=self._isolation,
                egress=self._egress,
            )
            state_dir = self._state_dir or default_state_dir(os.environ, os.geteuid())
            settings = ServeSettings((toolkit,), self._backend, Path(state_dir))
            self._supervisor = Supervisor(settings)
            return self._supervisor


def _main_script() -> Path:
    """The script that runs; UsageError where there is none that a jail could run again."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or not os.path.isfile(path):
        raise UsageError(
            "ToolKitClient.start() needs a script file",
            cause="the tools run in another process, which imports the script again; "
            "an interactive session or a notebook has none",
            tip="save the code as a file and run it with python",
        )
    if main.__spec__ is not None and main.__package__:
        raise UsageError(
            "ToolKitClient.start() cannot serve a module run with python -m",
            tip="run the file itself, or serve its folder: atp-sandbox serve FOLDER",
        )
    return Path(path).resolve()
