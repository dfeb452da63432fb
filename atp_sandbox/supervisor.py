"""`serve`: toolkits on one side, links on the other, and the order in which both come and go.

Enqueue, decide, act: what a request or an outcome leads to is decided by the pure modules; this
joins the node to the links and knows when everything is ready and when everything is over.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from atp_sandbox import log, routing
from atp_sandbox.atp.address import LinkAddress
from atp_sandbox.discovery import Discovery
from atp_sandbox.drain import SEND_GRACE_S, Drain, Step
from atp_sandbox.egress.jail_network import Denial
from atp_sandbox.errors import IsolationError, SandboxError, ToolkitError
from atp_sandbox.journal import Journal, journal_path, remove_unused
from atp_sandbox.learned import Learned
from atp_sandbox.link_unit import CallContext, LinkUnit, registration_entry
from atp_sandbox.loop import Loop
from atp_sandbox.node import Node
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Kind, Outcome
from atp_sandbox.reloader import Reloader
from atp_sandbox.samples import SampleCalls
from atp_sandbox.scheduling.pool import UNAVAILABLE_DRAINING, UNAVAILABLE_STOPPED
from atp_sandbox.settings import ServeSettings
from atp_sandbox.state import LinkLock
from atp_sandbox.toolkit import ServedToolkit

DRAIN_LOOK_S = 0.02
SCRIPT_END_S = 1.0
"""For what a toolkit's script still does after `stop()` let its `start()` return."""


class Supervisor:
    """Runs one `serve`; `run()` returns the exit code. All but `request_stop` in one thread."""

    def __init__(
        self,
        settings: ServeSettings,
        *,
        on_ready: Callable[[], None] | None = None,
        reread: Callable[[], ServeSettings] | None = None,
    ) -> None:
        """SandboxError if the state directory cannot be used.

        `reread` reads the settings anew when they, or the toolkits, are to be reloaded; without it
        nothing is.
        """
        self._settings = settings
        self.on_ready = on_ready or (lambda: None)
        """Called in the loop once every link is connected."""
        self._loop = Loop()
        self._node = Node(
            self._loop,
            settings.state_dir,
            self,
            settings.reroutes,
            has_janitor=True,
            options=settings.options,
        )
        self._undecided = {toolkit.name for toolkit in settings.toolkits}
        self._discoveries: dict[str, Discovery] = {}
        self._stopped_clients: set[tuple[str, int]] = set()
        self._units: list[LinkUnit] = []
        self._open_units: list[LinkUnit] = []
        self._locks: list[LinkLock] = []
        self._samples: SampleCalls | None = None
        self._error: SandboxError | None = None
        self._is_ready = False
        self._stop_requests = 0
        self._drain: Drain | None = None
        self._started_at = time.monotonic()
        self.learned = Learned({t.name: t.egress for t in settings.toolkits})
        self.routes: tuple[routing.Route, ...] = ()
        self._reloader: Reloader | None = None
        if reread is not None:
            self._reloader = Reloader(self._loop, self._node, self, reread, settings.state_dir)

    def run(self, *, handle_signals: bool = True) -> int:
        """Serve until stopped: 0 after a drain, 1 if nothing can be served.

        SandboxError says why nothing could be served, where one reason is to be told.
        """
        try:
            if handle_signals:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    # What nohup(1) set is kept: whoever started us does not want to be hung up.
                    if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                        continue
                    is_reload = number is signal.SIGHUP and self._reloader is not None
                    self._loop.on_signal(
                        number, self._on_reload_request if is_reload else self._on_stop_request
                    )
            self._loop.call_soon(self._start)
            self._loop.run()
        finally:
            if self._reloader is not None:
                self._reloader.close()
            for unit in list(self._open_units):
                unit.close()
            if self._drain is None:
                self._node.close()
            else:
                self._node.close(patience_s=self._drain.patience_s(self._loop.now()))
            for unit in self._units:
                unit.release()
            for lock in self._locks:
                lock.close()
            self._loop.close()
        if self._error is not None:
            raise self._error
        return 0

    def request_stop(self) -> None:
        """Drain and return from `run`; a second request ends at once. From any thread."""
        self._loop.call_from_thread(self._on_stop_request)

    # -- start -------------------------------------------------------------------------------------

    def _start(self) -> None:
        for settings in self._settings.toolkits:
            try:
                self._node.add(settings)
            except ToolkitError as error:
                self._log_failure(settings.name, error)
                self._undecided.discard(settings.name)
            except SandboxError as error:
                self._fail(error)
                return
        self._node.forget_old_snapshots()
        self._when_decided()

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None:
        self._discoveries[toolkit.name] = discovery
        self._undecided.discard(toolkit.name)
        log.emit(
            log.INFO,
            "toolkit_discovered",
            f"discovered {len(discovery.registrations)} tools",
            toolkit=toolkit.name,
            isolation=str(toolkit.settings.isolation),
            lifetime=str(toolkit.lifetime),
        )
        for warning in routing.warnings(toolkit.name, discovery):
            log.emit(log.WARNING, warning.event, warning.message, toolkit=toolkit.name)
        self._loop.call_soon(self._when_decided)

    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None:
        if isinstance(error, IsolationError):
            self._fail(error)
            return
        self._log_failure(toolkit.name, error)
        self._undecided.discard(toolkit.name)
        self._loop.call_soon(self._when_decided)

    def _log_failure(self, name: str, error: SandboxError) -> None:
        log.emit(log.ERROR, "toolkit_failed", error.render(), toolkit=name)

    def _when_decided(self) -> None:
        if self._undecided or self._units or self._error is not None:
            return
        if not self._discoveries:
            self._fail(
                ToolkitError(
                    "No toolkit can be served.",
                    tip="The reasons are above; `atp-sandbox inspect TOOLKIT` looks at one alone.",
                )
            )
            return
        if self._settings.backend.as_written:
            for name, client, reason in routing.unusable_addresses(self._discoveries):
                log.emit(
                    log.WARNING,
                    "address_unusable",
                    reason,
                    toolkit=name,
                    url=log.printable(client.base_url),
                )
        order = [t.name for t in self._settings.toolkits if t.name in self._discoveries]
        try:
            self.routes = routing.route(
                {name: self._discoveries[name] for name in order}, self._settings.backend
            )
            for found in self.routes:
                self._open(found)
            remove_unused(self._settings.state_dir)
        except SandboxError as error:
            self._fail(error)
            return
        if self._settings.backend.sample_responses:
            calls = [tool for found in self.routes for tool in found.registered]
            self._samples = SampleCalls(calls, self._node.submit, self._register)
            self._samples.start(self._loop.now())
        else:
            self._register()

    def _open(self, found: routing.Route) -> None:
        address = LinkAddress(found.base_url, found.api_key, self._settings.backend.ws_path)
        for refused in found.refused:
            log.emit(
                log.WARNING,
                "tool_refused",
                refused.reason,
                toolkit=refused.toolkit,
                tool=refused.name,
            )
        lock = LinkLock(self._settings.state_dir, found.base_url, found.api_key)
        lock.acquire()
        self._locks.append(lock)
        mode = self._settings.options.journal
        journal = Journal(journal_path(self._settings.state_dir, lock.name), mode)
        unit = LinkUnit(self._loop, address, self, dict(found.tools), lock.secret, journal)
        self._units.append(unit)
        self._open_units.append(unit)
        if self._settings.backend.as_written:
            log.emit(
                log.INFO,
                "link_as_written",
                "connecting where the toolkit says",
                url=address.redacted,
            )

    def _register(self) -> None:
        if self._drain is not None:
            return  # asked to stop while the sample calls ran
        for unit, found in zip(self._units, self.routes, strict=True):
            if unit not in self._open_units:
                continue  # its clients were stopped while the sample calls ran
            entries = [
                registration_entry(
                    tool,
                    send_source=self._settings.backend.send_source,
                    sample=None if self._samples is None else self._samples.outcome(tool),
                )
                for tool in found.registered
            ]
            unit.register(entries, then_connect=found.is_served)

    # -- links -------------------------------------------------------------------------------------

    def submit(self, call: NodeCall) -> None:
        self._node.submit(call)

    def link_announced(self, unit: LinkUnit) -> None:
        self._look_if_announced()

    def _look_if_announced(self) -> None:
        is_all = bool(self._open_units) and all(one.is_announced for one in self._open_units)
        if self._reloader is not None and is_all and not self._stop_requests:
            self._reloader.start(self._units, self.routes)

    def link_connected(self, unit: LinkUnit) -> None:
        self._look_if_ready()

    def _look_if_ready(self) -> None:
        if self._is_ready or not all(u.was_connected for u in self._open_units):
            return
        self._is_ready = True
        tools = sum(len(unit.tools) for unit in self._open_units)
        log.emit(
            log.INFO,
            "ready",
            f"ready: {tools} tools of {len(self._discoveries)} toolkits are served",
            tools=tools,
            toolkits=len(self._discoveries),
            links=len(self._open_units),
            isolation=", ".join(sorted({str(t.isolation) for t in self._settings.toolkits})),
            seconds=round(time.monotonic() - self._started_at, 2),
        )
        self.on_ready()

    def link_refused(self, unit: LinkUnit, reason: str) -> None:
        error = routing.refused_by_backend(unit.address.redacted, reason)
        if len(self._open_units) == 1:
            self._error = error
        else:
            log.emit(log.ERROR, "link_refused", error.render(), url=unit.address.redacted)
        self.link_closed(unit)

    def link_closed(self, unit: LinkUnit) -> None:
        if unit in self._open_units:
            self._open_units.remove(unit)
        if not self._open_units:
            self._loop.call_later(SCRIPT_END_S if self._stopped_clients else 0.0, self._loop.stop)
        elif not self._stop_requests:
            # It may have been the one that the others waited for.
            self._look_if_announced()
            self._look_if_ready()

    # -- calls -------------------------------------------------------------------------------------

    def connection_denied(self, toolkit: str, denial: Denial) -> None:
        if not self._settings.learns_egress:
            return
        if self.learned.note(toolkit, denial.host, denial.port, denial.reason):
            told = "\n".join(self.learned.lines(toolkit))
            log.emit(log.INFO, "egress_wanted", f"to allow it:\n{told}", toolkit=toolkit)

    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        if isinstance(call.context, CallContext):
            call.context.unit.starting(call.context, go, refuse)
        else:
            go()  # a sample call

    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None:
        context = call.context
        if isinstance(context, SampleCalls):
            context.finished(call, outcome)
            return
        assert isinstance(context, CallContext)
        if printed:
            log.emit(
                log.INFO,
                "tool_output",
                log.without(printed, call.secrets()),
                toolkit=call.toolkit,
                tool=call.tool.name,
                request_id=context.request_id_json,
            )
        if (
            isinstance(outcome, Failure) and outcome.kind is not Kind.OVERLOADED
        ):  # its toolkit tells
            log.emit(
                log.INFO,
                "call_failed",
                log.without(outcome.error, call.secrets()),
                toolkit=call.toolkit,
                tool=call.tool.name,
                request_id=context.request_id_json,
                kind=outcome.kind.value,
                seconds=round(self._loop.now() - call.received_at, 3),
            )
        context.unit.answer(context, outcome)

    # -- reload ------------------------------------------------------------------------------------

    @property
    def settings(self) -> ServeSettings:
        """As they hold now."""
        return self._settings

    @property
    def open_units(self) -> Sequence[LinkUnit]:
        return self._open_units

    @property
    def discoveries(self) -> Mapping[str, Discovery]:
        return self._discoveries

    def version_served(self, toolkit: ServedToolkit, discovery: Discovery) -> None:
        """A new version takes the calls of its toolkit from now on."""
        name = toolkit.name
        self._discoveries[name] = discovery
        others = [one for one in self._settings.toolkits if one.name != name]
        self._settings = replace(self._settings, toolkits=(*others, toolkit.settings))
        self.learned.expect(name, toolkit.settings.egress)
        # Clients are numbered anew: what the old version stopped says nothing of these.
        self._stopped_clients = {one for one in self._stopped_clients if one[0] != name}
        for client in sorted(toolkit.stopped_clients):
            self.client_stopped(toolkit, client)

    def toolkit_removed(self, name: str) -> None:
        """It is not served any more, nor asked for."""
        self._discoveries.pop(name, None)
        left = tuple(one for one in self._settings.toolkits if one.name != name)
        self._settings = replace(self._settings, toolkits=left)
        self._stopped_clients = {one for one in self._stopped_clients if one[0] != name}

    def settings_read(self, settings: ServeSettings) -> None:
        """What needs no restart is taken from them; toolkits come one by one."""
        taken = replace(
            self._settings.options,
            grace_s=settings.options.grace_s,
            reloads=settings.options.reloads,
        )
        self._settings = replace(self._settings, options=taken)

    def _on_reload_request(self) -> None:
        assert self._reloader is not None
        if not self._stop_requests:
            self._reloader.reload_all()

    # -- end ---------------------------------------------------------------------------------------

    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None:
        """The toolkit's own `stop()`: its client is served no more."""
        log.emit(log.INFO, "client_stopped", "the toolkit stopped a client", toolkit=toolkit.name)
        self._stopped_clients.add((toolkit.name, client))
        for unit in list(self._open_units):
            of_unit = {(served.toolkit, served.tool.client) for served in unit.tools.values()}
            if of_unit and of_unit <= self._stopped_clients:
                unit.refuse(UNAVAILABLE_STOPPED)
                self._close_when_settled(unit)
        discovery = self._discoveries[toolkit.name]
        clients = {(toolkit.name, tool.client) for tool in discovery.served()}
        if clients <= self._stopped_clients:
            self._node.stop_toolkit(toolkit.name)

    def _close_when_settled(self, unit: LinkUnit, deadline: float = math.inf) -> None:
        now = self._loop.now()
        if unit.is_idle:
            deadline = min(deadline, now + SEND_GRACE_S)
        if unit.is_settled or now >= deadline:
            unit.close()
        else:
            self._loop.call_later(DRAIN_LOOK_S, lambda: self._close_when_settled(unit, deadline))

    def _on_stop_request(self) -> None:
        self._stop_requests += 1
        if self._stop_requests > 1 or not self._units:
            self._loop.stop()
            return
        if self._reloader is not None:
            self._reloader.stop()
        grace_s = self._settings.options.grace_s
        if grace_s is None:
            versions = self._node.versions()
            grace_s = max((one.settings.limits.time_s for one in versions), default=0.0)
        log.emit(log.INFO, "draining", "no new calls; running ones may finish", grace_s=grace_s)
        for unit in self._open_units:
            unit.refuse(UNAVAILABLE_DRAINING)
        self._node.drain()
        self._drain = Drain(self._loop.now(), grace_s)
        self._go_on_draining(self._drain)

    def _go_on_draining(self, drain: Drain) -> None:
        settled = all(unit.is_settled for unit in self._open_units)
        step = drain.step(self._loop.now(), is_idle=self._node.is_idle, is_settled=settled)
        match step:
            case Step.WAIT:
                pass
            case Step.INTERRUPT:
                log.emit(log.WARNING, "interrupting", "the grace is over: running calls are ended")
                self._node.interrupt()
            case Step.CLOSE_LINKS:
                for unit in list(self._open_units):
                    unit.close()
            case Step.LEAVE:
                self._loop.stop()
            case _:
                assert_never(step)
        self._loop.call_later(DRAIN_LOOK_S, lambda: self._go_on_draining(drain))

    def _fail(self, error: SandboxError) -> None:
        self._error = self._error or error
        self._loop.stop()
