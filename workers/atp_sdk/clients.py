"""`ToolKitClient` as the SDK's 0.1.0 documentation describes it, seen from inside a jail.

Registering records the tool; the supervisor outside talks to the backend. Arguments that later
versions of the SDK added are accepted and ignored: what they configure happens outside.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, Callable, TypeVar

from ..discovery import registry

Function = TypeVar("Function", bound=Callable[..., Any])

_DEFAULT_BASE_URL = "https://chatatp-backend.onrender.com"


class ToolKitClient:
    """Registers functions as tools and serves them.

    `api_key`: the toolkit's key; inside a sandbox usually a placeholder, since the operator's own
    is used. `app_name`: the application the tools belong to. `base_url`: the backend.
    """

    def __init__(
        self,
        api_key: str,
        app_name: str,
        base_url: str = _DEFAULT_BASE_URL,
        *later: Any,
        **later_named: Any,
    ) -> None:
        del later, later_named
        for name, value in (("api_key", api_key), ("app_name", app_name), ("base_url", base_url)):
            if not isinstance(value, str):
                raise TypeError(f"ToolKitClient: {name} must be a str, not {type(value).__name__}")
        self.api_key = api_key
        self.app_name = app_name
        self.base_url = base_url.rstrip("/")
        self._number = registry.add_client(api_key, app_name, self.base_url)

    def register_tool(
        self,
        function_name: str,
        params: list[str],
        required_params: list[str],
        description: str,
        auth_provider: str | None,
        auth_type: str | None,
        auth_with: str | None,
        *later: Any,
        **later_named: Any,
    ) -> Callable[[Function], Function]:
        """A decorator that registers a function as the tool `function_name` and returns it as is.

        TypeError names the tool and the argument that is not of the documented type; OSError names
        the tool whose source cannot be read.
        """
        del later, later_named
        _require(function_name, "function_name", isinstance(function_name, str), "a str")
        _require(function_name, "description", isinstance(description, str), "a str")
        for name, names in (("params", params), ("required_params", required_params)):
            is_list = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
            _require(function_name, name, is_list, "a list of str")
        for name, text in (
            ("auth_provider", auth_provider),
            ("auth_type", auth_type),
            ("auth_with", auth_with),
        ):
            _require(function_name, name, text is None or isinstance(text, str), "a str or None")

        def decorate(function: Function) -> Function:
            described = {
                "name": function_name,
                "params": list(params),
                "required": list(required_params),
                "description": description,
                "auth_provider": auth_provider,
                "auth_type": auth_type,
                "auth_with": auth_with,
            }
            registry.add_tool(self._number, function, _source(function_name, function), described)
            return function

        return decorate

    def start(self) -> None:
        """Serve the tools registered so far; blocks until `stop()`.

        In a thread other than the main one it marks this client as started and ends that thread.
        """
        registry.clients[self._number]["started"] = True
        if threading.current_thread() is not threading.main_thread():
            registry.on_registered()
            raise SystemExit
        registry.on_start(self._number)

    def start_in_background(self) -> None:
        """As `start`: what follows in a script that uses the library is for outside only."""
        self.start()

    def stop(self) -> None:
        """Stop serving this client; quietly does nothing before `start()`."""
        registry.clients[self._number]["stopped"] = True
        registry.on_stop(self._number)


def _require(tool: object, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise TypeError(f"register_tool: tool {tool!r}: {name} must be {wanted}")


def _source(tool: str, function: Callable[..., Any]) -> str:
    if not callable(function):
        raise TypeError(f"register_tool: tool {tool!r}: a {type(function).__name__} is no function")
    try:
        return inspect.getsource(function)
    except OSError as error:
        raise OSError(
            f"register_tool: tool {tool!r}: its source cannot be read; define it with def in a file"
        ) from error
    except TypeError as error:
        raise TypeError(
            f"register_tool: tool {tool!r}: a {type(function).__name__} has no source; "
            "wrap it in a function defined with def"
        ) from error
