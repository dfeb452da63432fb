"""Whether a request may reach a worker: the tool is known, its parameters and its token are there.

PURE.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.discovery import Tool
from atp_sandbox.outcome import Failure, Kind

MAX_COMPARED = 50
"""Names that an unknown one is compared with, to say which may have been meant."""
_MAX_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True)
class ServedTool:
    """One tool as a link serves it."""

    toolkit: str
    app_name: str
    tool: Tool


def admit(request: ToolRequest, tools: Mapping[str, ServedTool]) -> Failure | None:
    """Why `request` is answered without a call; None if it may run.

    A parameter that is null counts as present. A token satisfies a required parameter named
    `auth_token` or as `auth_with` says, and so does one that the caller put into the parameters
    under either name.
    """
    served = tools.get(request.tool)
    if served is None:
        return _unknown(request.tool, tools)
    tool, params = served.tool, request.params
    if not tool.required and not tool.declares_auth:
        return None
    token_names = {"auth_token", tool.auth_with or "auth_token"}
    # A token that is missing is said to be one, even where it is listed as a parameter.
    missing = [name for name in tool.required if name not in params and name not in token_names]
    if missing:
        names = ", ".join(missing)
        return Failure(
            Kind.INVALID_PARAMS,
            f"Tool {tool.name} is missing required parameters: {names}.",
            details={"missing": missing},
        )
    has_token = request.auth_token_json is not None or any(map(params.get, token_names))
    if tool.declares_auth and not has_token:
        provider = f" for {tool.auth_provider}" if tool.auth_provider else ""
        return Failure(
            Kind.AUTH_REQUIRED, f"Tool {tool.name} needs an auth_token{provider}; none was given."
        )
    return None


def _unknown(name: str, tools: Mapping[str, ServedTool]) -> Failure:
    shown = name[:_MAX_SHOWN_CHARS]
    sentence = f"Unknown tool: {shown}."
    names = list(tools)
    if len(names) > MAX_COMPARED:  # comparing costs 30 µs a name
        names = [one for one in names if one[:1] == shown[:1]][:MAX_COMPARED]
    near = difflib.get_close_matches(shown, names, n=1)
    if near:
        sentence += f" Did you mean {near[0]}?"
    return Failure(Kind.UNKNOWN_TOOL, sentence)
