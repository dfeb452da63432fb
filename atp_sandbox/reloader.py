"""Hot reload: new versions of toolkits beside those that serve, and the moment between the two.

A shell: what differs, whose turn it is and which tools are whose is decided by `reload` and
`routing`. The operator's files are read in a thread; what is swapped is swapped in one turn of the
loop, so that each call belongs to one version from its admission to its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from atp_sandbox import log, routing
from atp_sandbox.admission import ServedTool
from atp_sandbox.atp.registration import RegistrationEntry
from atp_sandbox.background import Background
from atp_sandbox.discovery import Discovery
from atp_sandbox.errors import SandboxError
from atp_sandbox.jails.snapshot import Snapshot
from atp_sandbox.link_unit import LinkUnit, registration_entry
from atp_sandbox.loop import Loop
from atp_sandbox.node import Node, TakenSnapshot, snapshot_of
from atp_sandbox.reload import ToolChanges, Turns, needs_restart, tool_changes
from atp_sandbox.samples import SampleCalls
from atp_sandbox.settings import ServeSettings, ToolkitSettings
from atp_sandbox.toolkit import ServedToolkit
from atp_sandbox.watch import FileWatch

MAX_RETIRED = 3
"""Versions of one toolkit that finish their calls; each is a jail. The next one waits for them."""
_LOOK_S = 0.1
"""Between two looks whether one of them has ended."""
_CONFIGURATION = ""
"""Its key among the watched files; no toolkit has an empty name."""

Told = dict[str, RegistrationEntry]
"""What a link's backend is told of one toolkit's tools, by name, without samples."""


class ReloadHost(Protocol):
    """What the supervisor has, and is told."""

    @property
    def settings(self) -> ServeSettings: ...
    @property
    def open_units(self) -> Sequence[LinkUnit]:
        """Those whose links take calls."""

    @property
    def discoveries(self) -> Mapping[str, Discovery]:
        """Of the toolkits that are served, by name."""

    def version_served(self, toolkit: ServedToolkit, discovery: Discovery) -> None: ...
    def toolkit_removed(self, name: str) -> None: ...
    def settings_read(self, settings: ServeSettings) -> None:
        """What needs no restart is to be taken from them."""


@dataclass(slots=True)
class _Reload:
    """One toolkit's new version on its way."""

    settings: ToolkitSettings
    began_at: float
    content: object = None
    """What it is made of, once that is known."""
    version: ServedToolkit | None = None
    is_dropped: bool = False
    """The toolkit was removed meanwhile."""


@dataclass(slots=True)
class _Takeover:
    """What one link is to serve of a new version."""

    unit: LinkUnit
    route: routing.Route
    told: Told
    changes: ToolChanges

    @property
    def to_register(self) -> list[ServedTool]:
        """The last of each name, in order."""
        wanted = {served.tool.name: served for served in self.route.registered}
        return [one for name, one in wanted.items() if name in self.changes.to_register]


class Reloader:
    """Brings what the operator's files say now into a `serve` that goes on."""

    def __init__(
        self,
        loop: Loop,
        node: Node,
        host: ReloadHost,
        reread: Callable[[], ServeSettings],
        state_dir: Path,
    ) -> None:
        """`reread` reads the settings anew, in a thread; SandboxError if they cannot be used."""
        self._loop = loop
        self._node = node
        self._host = host
        self._reread = reread
        self._state_dir = state_dir
        self._background = Background(loop.call_from_thread)
        self._watch: FileWatch | None = None
        self._turns = Turns()
        self._wanted: dict[str, ToolkitSettings] = {}
        """As the operator wants each toolkit served, whether it can be or not."""
        self._reloads: dict[str, _Reload] = {}
        self._failed: dict[str, object] = {}
        """What each toolkit was made of whose last reload failed."""
        self._told: dict[tuple[str, LinkUnit], Told] = {}
        self._is_reading = False
        self._asked: bool | None = None
        """Whether all is to be reloaded as soon as that is possible, and for a signal."""
        self._is_started = False
        self._is_closed = False
        node.on_version_ended = lambda: self._background.run(node.forget_old_snapshots, _ignore)

    def start(self, units: Sequence[LinkUnit], routes: Sequence[routing.Route]) -> None:
        """From now on: the backends were told of what there is. Does nothing when called again."""
        if self._is_started or self._is_closed:
            return
        self._is_started = True
        self._wanted = {toolkit.name: toolkit for toolkit in self._host.settings.toolkits}
        for unit, found in zip(units, routes, strict=True):
            for served in found.registered:
                told = self._told.setdefault((served.toolkit, unit), {})
                told[served.tool.name] = self._entry(served)
        self._set_watch()
        self._reload_if_asked()

    def reload_all(self, *, by_signal: bool = True) -> None:
        """Take over the configuration and all toolkits, as far as they have changed."""
        self._asked = bool(self._asked) or by_signal
        self._reload_if_asked()

    def stop(self) -> None:
        """No further changes; waits for nothing."""
        self._is_closed = True
        if self._watch is not None:
            self._watch.stop()

    def close(self) -> None:
        """End the threads as well; safe to call again."""
        self.stop()
        if self._watch is not None:
            self._watch.close()
        self._background.close()

    # -- the configuration -------------------------------------------------------------------------

    def _reload_if_asked(self) -> None:
        if self._asked is None or self._is_reading or not self._is_started or self._is_closed:
            return
        by_signal, self._asked = self._asked, None
        self._is_reading = True
        self._background.run(self._reread, partial(self._on_read, by_signal))

    def _on_read(self, by_signal: bool, read: ServeSettings | SandboxError) -> None:
        self._is_reading = False
        if self._is_closed:
            return
        if isinstance(read, SandboxError):
            message = f"the configuration was not taken over, the old one serves: {read.render()}"
            log.emit(log.ERROR, "reload_failed", message)
        else:
            self._take_settings(read, by_signal)
        self._reload_if_asked()

    def _take_settings(self, new: ServeSettings, by_signal: bool) -> None:
        left = needs_restart(self._host.settings, new)
        if left:
            message = "changes that need a restart were not taken over"
            log.emit(log.WARNING, "reload_needs_restart", message, changed=", ".join(left))
        self._host.settings_read(new)
        wanted = {toolkit.name: toolkit for toolkit in new.toolkits}
        removed = [name for name in self._wanted if name not in wanted]
        self._wanted = wanted
        for name in removed:
            self._remove(name)
        self._set_watch()
        for name in wanted:
            self._ask(name, tells_unchanged=by_signal)

    def _remove(self, name: str) -> None:
        self._drop(name)
        told = [key for key in self._told if key[0] == name]
        count = 0
        for key in told:
            gone = self._told.pop(key)
            count += len(gone)
            key[1].take_over({}, (), toolkit=name, removed=gone.keys())
        self._failed.pop(name, None)
        self._node.retire(name)
        self._host.toolkit_removed(name)
        log.emit(
            log.INFO,
            "reloaded",
            "the toolkit is served no more",
            toolkit=name,
            tools_added=0,
            tools_removed=count,
            tools_changed=0,
            seconds=0.0,
        )

    # -- files -------------------------------------------------------------------------------------

    def _set_watch(self) -> None:
        """Watch what is served now, or nothing."""
        if not self._host.settings.options.reloads:
            if self._watch is not None:
                self._watch.stop()
                self._watch = None
            return
        if self._watch is None:
            self._watch = FileWatch(self._loop, self._on_files)
        watched = {one.name: (one.path, *one.data) for one in self._wanted.values()}
        config = self._host.settings.config_path
        self._watch.watch(watched | ({_CONFIGURATION: (config,)} if config else {}))

    def _on_files(self, keys: set[str]) -> None:
        if self._is_closed:
            return
        if _CONFIGURATION in keys:
            self.reload_all(by_signal=False)
        for name in sorted(keys & self._wanted.keys()):
            self._ask(name, tells_unchanged=False)

    # -- one toolkit -------------------------------------------------------------------------------

    def _ask(self, name: str, *, tells_unchanged: bool) -> None:
        if self._turns.ask(name, tells_unchanged=tells_unchanged):
            self._begin(name)

    def _begin(self, name: str) -> None:
        if self._is_closed:
            return
        if name not in self._wanted:  # removed meanwhile
            if self._turns.end(name):
                self._begin(name)
            return
        if self._node.retired(name) >= MAX_RETIRED:
            self._loop.call_later(_LOOK_S, lambda: self._begin(name))
            return
        settings = self._wanted[name]
        self._reloads[name] = reload = _Reload(settings, self._loop.now())
        self._background.run(
            partial(snapshot_of, settings, self._state_dir), partial(self._on_snapshot, reload)
        )

    def _on_snapshot(self, reload: _Reload, taken: TakenSnapshot | SandboxError) -> None:
        if isinstance(taken, SandboxError):
            self._fail(reload, taken)
            return
        if reload.is_dropped or self._is_closed or self._is_unchanged(reload, taken):
            taken.hold.close()
            self._end(reload)
            return
        try:
            self._node.prepare(reload.settings, taken, partial(self._on_prepared, reload))
        except SandboxError as error:
            self._fail(reload, error)
        except OSError as error:  # what its jails need can be wanting while others are served
            self._fail(reload, SandboxError("It could not be prepared.", cause=str(error.strerror)))

    def _is_unchanged(self, reload: _Reload, taken: TakenSnapshot) -> bool:
        """Whether it is what is served; or what failed the last time, unless somebody insists."""
        name = reload.settings.name
        reload.content = content = _content(reload.settings, taken.snapshot)
        insists = self._turns.tells_unchanged(name)
        serving = self._node.serving(name)
        is_here = serving is not None and content == _content(serving.settings, serving.snapshot)
        if not self._is_served(name) or not is_here:
            return not insists and (is_here or content == self._failed.get(name))
        if insists:
            message = "the toolkit and its settings are what they were"
            log.emit(log.INFO, "reload_unchanged", message, toolkit=name)
        return True

    def _is_served(self, name: str) -> bool:
        serving = self._node.serving(name)
        return serving is not None and serving.discovery is not None

    def _on_prepared(
        self, reload: _Reload, version: ServedToolkit, found: Discovery | SandboxError
    ) -> None:
        if isinstance(found, SandboxError):
            self._fail(reload, found)
            return
        reload.version = version
        if reload.is_dropped or self._is_closed:
            self._end(reload)
            return
        if not self._host.settings.backend.sample_responses:
            self._swap(reload, found, None)
            return
        try:
            takeovers, _ = self._takeovers(version.name, found)
        except SandboxError as error:
            self._fail(reload, error)
            return

        def done() -> None:
            self._loop.call_soon(lambda: self._swap(reload, found, samples))

        calls = [served for one in takeovers for served in one.to_register]
        samples = SampleCalls(calls, self._node.submit, done)
        samples.start(self._loop.now())

    def _takeovers(self, name: str, found: Discovery) -> tuple[list[_Takeover], Sequence[str]]:
        """What each open link is to serve, and links that it asks for beside them.

        ToolkitError if it asks for none that is open.
        """
        units = {(u.address.base_url.rstrip("/"), u.address.api_key): u for u in self._open_units()}
        routes, unknown = routing.reroute(
            name,
            {**self._host.discoveries, name: found},
            self._host.settings.backend,
            {link: unit.tools for link, unit in units.items()},
        )
        takeovers = []
        for link, route in routes.items():
            told = {served.tool.name: self._entry(served) for served in route.registered}
            changes = tool_changes(self._told.get((name, units[link]), {}), told)
            takeovers.append(_Takeover(units[link], route, told, changes))
        return takeovers, unknown

    def _open_units(self) -> list[LinkUnit]:
        return [unit for unit in self._host.open_units if not unit.is_refusing]

    def _swap(
        self,
        reload: _Reload,
        found: Discovery,
        samples: SampleCalls | None,
    ) -> None:
        """One turn of the loop: whatever is admitted after it is a call to the new version."""
        version = reload.version
        assert version is not None
        if reload.is_dropped or self._is_closed:
            self._end(reload)
            return
        name = version.name
        try:
            # Only now is it known which names others serve.
            takeovers, unknown = self._takeovers(name, found)
        except SandboxError as error:
            self._fail(reload, error)
            return
        _warn(name, found, takeovers, unknown)
        self._node.swap(version)
        for one in takeovers:
            entries = [self._entry(served, samples) for served in one.to_register]
            one.unit.take_over(one.route.tools, entries, toolkit=name, removed=one.changes.removed)
            self._told[name, one.unit] = one.told
        self._failed.pop(name, None)
        self._host.version_served(version, found)
        reload.version = None  # no longer ours to end
        log.emit(
            log.INFO,
            "reloaded",
            "new calls go to the new version; calls of the old one finish there",
            toolkit=name,
            tools_added=sum(len(one.changes.added) for one in takeovers),
            tools_removed=sum(len(one.changes.removed) for one in takeovers),
            tools_changed=sum(len(one.changes.changed) for one in takeovers),
            seconds=round(self._loop.now() - reload.began_at, 2),
        )
        self._end(reload)

    def _fail(self, reload: _Reload, error: SandboxError) -> None:
        name = reload.settings.name
        if not reload.is_dropped and not self._is_closed:
            self._failed[name] = reload.content
            served = "the old version serves" if self._is_served(name) else "it is not served"
            message = f"the toolkit was not reloaded, {served}: {error.render()}"
            log.emit(log.ERROR, "reload_failed", message, toolkit=name)
        self._end(reload)

    def _end(self, reload: _Reload) -> None:
        """It is over, one way or another."""
        name = reload.settings.name
        version, reload.version = reload.version, None
        if version is not None:
            self._node.abandon(version)
        if self._reloads.get(name) is reload:
            del self._reloads[name]
            if self._turns.end(name):
                self._begin(name)

    def _drop(self, name: str) -> None:
        """The reload at hand, if there is one, is for nothing; its turn ends when it does."""
        reload = self._reloads.get(name)
        if reload is not None:
            reload.is_dropped = True

    def _entry(self, served: ServedTool, samples: SampleCalls | None = None) -> RegistrationEntry:
        return registration_entry(
            served,
            send_source=self._host.settings.backend.send_source,
            sample=None if samples is None else samples.outcome(served),
        )


def _content(settings: ToolkitSettings, snapshot: Snapshot) -> object:
    """What is equal only if nothing has changed."""
    return settings, snapshot.digest, snapshot.entry, snapshot.package


def _warn(
    name: str, found: Discovery, takeovers: Sequence[_Takeover], unknown: Sequence[str]
) -> None:
    """What the author of the new version should hear."""
    for warning in routing.warnings(name, found):
        log.emit(log.WARNING, warning.event, warning.message, toolkit=name)
    for url in unknown:
        message = "the new version asks for another link, which is not opened without a restart"
        log.emit(log.WARNING, "link_not_opened", message, toolkit=name, url=log.printable(url))
    for one in takeovers:
        for refused in one.route.refused:
            reason = refused.reason
            log.emit(log.WARNING, "tool_refused", reason, toolkit=name, tool=refused.name)


def _ignore(_outcome: object) -> None:
    """Of what is done for tidiness."""
