"""What toolkits asked for in vain, as the lines that would allow it. PURE.

Nothing is allowed by it: whoever writes the lines down has read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from atp_sandbox.policy import DEFAULT_PORT, EgressPolicy, canonical_host

MAX_HOSTS = 100
"""Of one toolkit, which may ask for any number of names."""
_PRIVATE = ("resolves to a private address", "resolves to a loopback address")


class Learned:
    """Denials of one run, gathered by toolkit."""

    def __init__(self, policies: Mapping[str, EgressPolicy]) -> None:
        self._policies = dict(policies)
        self._hosts: dict[str, set[str]] = {}
        self._private: dict[str, set[str]] = {}

    def expect(self, toolkit: str, policy: EgressPolicy) -> None:
        """From now on `toolkit` is served with this policy."""
        self._policies[toolkit] = policy

    def note(self, toolkit: str, host: str, port: int | None, reason: str) -> bool:
        """Whether this is something new that a line could allow."""
        try:
            host = canonical_host(host)
        except ValueError:
            return False
        # A name that was only looked up came without a port.
        wanted = f"{host}:{port or DEFAULT_PORT}"
        hosts = self._hosts.setdefault(toolkit, set())
        private = self._private.setdefault(toolkit, set())
        if not self._policies[toolkit].allows(host, port or DEFAULT_PORT):
            known, new = hosts, wanted
            if port is None and any(one.rpartition(":")[0] == host for one in hosts):
                return False
        elif reason in _PRIVATE:
            known, new = private, host
        else:
            return False
        if new in known or len(known) >= MAX_HOSTS:
            return False
        known.add(new)
        return True

    def lines(self, toolkit: str) -> list[str]:
        """Of its table in the configuration; empty if nothing was refused."""
        hosts, private = self._hosts.get(toolkit, set()), self._private.get(toolkit, set())
        policy, found = self._policies[toolkit], []
        if hosts:
            all_hosts = sorted({*map(str, policy.allowed), *hosts})
            found.append(f"egress = {json.dumps(all_hosts)}")
        if private:
            found.append(f"private-ok = {json.dumps(sorted({*policy.private_ok, *private}))}")
        return found

    def options(self, toolkit: str) -> list[str]:
        """The same for the command line, without what is given there already."""
        hosts, private = self._hosts.get(toolkit, set()), self._private.get(toolkit, set())
        return [f"--allow {h}" for h in sorted(hosts)] + [
            f"--private-ok {host}" for host in sorted(private)
        ]

    def toolkits(self) -> list[str]:
        """Those that were refused something, sorted."""
        return sorted(name for name in self._policies if self.lines(name))
