"""Runs the corpus: fills its placeholders, calls each case through a whole supervisor, judges it.

Nothing of the corpus is ever run here: its files are handed to `atp-sandbox serve`, which is a real
process with a real websocket. What a case must hold to is in `corpus/index.json`; each oracle there
(O1 to O14) is a method of `Watch` here. A timing oracle that does not hold is looked at a second
time, since this machine may have been busy with something else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .backend import METADATA, PUBLIC, Backend, Cell, Honeypots, Reply, Sample, StandIn

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).resolve().parents[2]
ARM = "hostile-v1"
ALWAYS = ("O1", "O2", "O3", "O6", "O7", "O11")

PROXY_CATEGORY = "Egress proxy"
EGRESS_CONTROL = "G12"
"""The one control that fetches something; its feature is egress, like that of the X cases."""
ALLOWED = "allowed.example"
ALLOWED_OTHER = "other-provider.example"
EGRESS_BYTES = 32 * 1024 * 1024
NEIGHBOUR_IDLE_S = 1
EGRESS_RSS_BYTES = 32 * 1024 * 1024
"""Over all cases; its 64 connections have a buffer of 128 KiB for each way."""

TIME_S = 2.0
BYSTANDER_P99_S = 0.25
PONG_S = 1.0
LAG_S = 0.1
RSS_BYTES = 8 * 1024 * 1024
GONE_S = 1.0
NEXT_CALL_S = 1.0
LATE_S = 2.0
START_S = 60.0
MAX_GROUP_FILES = 160
"""For each jail, whose slots are thirteen and have a dozen files each at most."""
MAX_SURPLUS = 8
"""Workers of one toolkit that a burst can leave waiting: its concurrency, and some."""
MAX_LOG_LINE_CHARS = 512 * 1024
"""64 KiB of output, each byte of which may become a six-character escape, and its fields."""

_OUTCOMES = {
    "timeout": "timeout",
    "memory_limit": "memory",
    "crashed": "crash",
    "output_limit": "output_limit",
    "process_limit": "pids",
    "invalid_result": "bad_result",
    "tool_error": "error",
    "unknown_tool": "error",
    "invalid_params": "error",
    "auth_required": "error",
}
_TOKEN = re.compile(rb"tok[AB]-[0-9a-f]{32}")
_LEFTOVER = re.compile(r"^(\.hostile|sem\.hostile|hostile_token|hostile-|tok-)|^core(\.\d+)?$")
_SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")
_PROTOCOL_SHAPE = ["answer", "$id", "result", "$result"]


# -- the corpus ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    category: str
    expected: str
    also_ok: tuple[str, ...]
    verify: tuple[str, ...]
    steps: tuple[tuple[dict[str, Any], ...], ...]
    """Calls that go out together, one group after the other."""
    judged_step: int
    variants: int
    file: str

    @property
    def oracles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*ALWAYS, *self.verify)))

    @property
    def needs_egress(self) -> bool:
        return self.category == PROXY_CATEGORY or self.id == EGRESS_CONTROL

    @property
    def is_import(self) -> bool:
        return self.file.startswith("toolkit_import_")


def load_cases() -> dict[str, Case]:
    """Every case of the index, by id."""
    rows = json.loads((CORPUS / "index.json").read_text())["cases"]
    return {row["id"]: _case(row) for row in rows}


def _case(row: dict[str, Any]) -> Case:
    groups: dict[int, list[dict[str, Any]]] = {}
    for call in row["calls"]:
        groups.setdefault(call["step"], []).append(call)
    return Case(
        row["id"],
        row["category"],
        row["expected"],
        tuple(row["also_ok"]),
        tuple(row["verify"]),
        tuple(tuple(groups[step]) for step in sorted(groups)),
        row["judged_step"] or 0,
        row.get("variants", 0),
        row["file"] or "",
    )


def outcomes_of(result: Any) -> tuple[set[str], str]:
    """The outcome names that an answer's result amounts to, and why it is void, if it is."""
    if isinstance(result, dict) and "error_type" in result and "retryable" in result:
        kind = result["error_type"]
        return {_OUTCOMES.get(kind, kind)}, ""
    names = {"ok"}
    void = ""
    if isinstance(result, dict):
        if result.get("escaped") is False:
            names.add("denied")
        elif result.get("escaped"):
            void = "escaped"
        for flag in ("refused", "skipped"):
            if result.get(flag):
                void = flag
        if result.get("channels") == 0:
            void = "channels: 0"
    return names, void


def shorten(value: Any, most: int = 300) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


# -- one supervisor --------------------------------------------------------------------------------


@dataclass(slots=True)
class Process:
    pid: int
    parent: int
    state: str
    command: str


def processes() -> dict[int, Process]:
    """Every process of the machine."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    head, _, rest = file.read().rpartition(")")
            except OSError:
                continue
            fields = rest.split()
            pid = int(entry)
            found[pid] = Process(pid, int(fields[1]), fields[0], head.partition("(")[2])
    return found


def descendants(root: int) -> list[Process]:
    """Every process below `root`, zombies included."""
    table = processes()
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


class Serve:
    """One `atp-sandbox serve`, started in the cell; owns the process and its log."""

    def __init__(
        self,
        cell: Cell,
        folder: Path,
        config: str,
        *,
        command: Sequence[str] = (sys.executable, "-m", "atp_sandbox"),
        before_exec: Callable[[], None] | None = None,
        state: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.state = state or folder / "state"
        self.log_path = folder / "log.jsonl"
        self.config_path = folder / "atp-sandbox.toml"
        self.config_path.write_text(config)
        arguments = [
            *command,
            "serve",
            "--config",
            str(self.config_path),
            "--log-format",
            "json",
            "--state-dir",
            str(self.state),
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("ATP_API_KEY", None)
        log = self.log_path.open("ab")

        def in_child() -> None:
            # Tests that are themselves run by nohup(1) would hand its ignored SIGHUP on.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            if before_exec is not None:
                before_exec()

        self.process = cell.run(
            lambda: subprocess.Popen(
                arguments,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=in_child,
                start_new_session=True,
            )
        )
        log.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self, start: int = 0) -> list[bytes]:
        """Whole lines from byte `start` of the log."""
        with self.log_path.open("rb") as file:
            file.seek(start)
            return file.read().split(b"\n")[:-1]

    def log_size(self) -> int:
        return self.log_path.stat().st_size

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        found = []
        for line in self.log(start):
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"event": "", "message": line.decode("utf-8", "replace")})
        return found

    def wait_event(self, name: str, timeout_s: float = START_S, start: int = 0) -> dict[str, Any]:
        """The first such event; AssertionError with the end of the log if it does not come."""
        deadline = time.monotonic() + timeout_s
        while True:
            for event in self.events(start):
                if event.get("event") == name:
                    return event
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                tail = b"\n".join(line[:500] for line in self.log()[-12:]).decode()
                raise AssertionError(f"no {name} (exit {ended}); log ends:\n{tail}")
            time.sleep(0.02)

    def jail_processes(self) -> list[Process]:
        return descendants(self.pid)

    def open_files(self) -> int:
        """Descriptors but for those of control groups, which are kept for the next call."""
        return len(self._descriptors()[1])

    def group_files(self) -> int:
        """Descriptors of control groups: there are more the more calls ran at once so far."""
        return len(self._descriptors()[0])

    def _descriptors(self) -> tuple[list[str], list[str]]:
        of_groups, others = [], []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                target = os.readlink(f"/proc/{self.pid}/fd/{fd}")
            except OSError:
                continue
            (of_groups if target.startswith("/sys/fs/cgroup") else others).append(target)
        return of_groups, others

    def status(self, name: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+)", text, re.M)
        assert found
        return int(found[1])

    def rss(self) -> int:
        return self.status("VmRSS") * 1024

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, then SIGKILL; the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait(20)


def configuration(
    backend: Backend, key_file: Path, toolkits: dict[str, dict[str, Any]], **defaults: Any
) -> str:
    """A configuration file's text; values are written as JSON, which TOML reads the same."""

    def table(name: str, values: dict[str, Any]) -> str:
        return f"[{name}]\n" + "".join(
            f"{key.replace('_', '-')} = {json.dumps(value)}\n" for key, value in values.items()
        )

    backend_values = {"url": backend.url, "api_key_file": str(key_file)}
    sample = defaults.pop("sample_responses", None)
    if sample is not None:
        backend_values["sample_responses"] = sample
    parts = [table("backend", backend_values), table("defaults", defaults)]
    parts += [table(f"toolkit.{name}", values) for name, values in toolkits.items()]
    return "\n".join(parts)


def corpus_toolkit(name: str) -> dict[str, Any]:
    return {"path": str(CORPUS / f"toolkit_{name}.py")}


# -- canaries --------------------------------------------------------------------------------------


class Canaries:
    """Files outside every jail whose content and state nobody may see or change."""

    def __init__(self, folder: Path) -> None:
        self.secret = f"canary-{secrets.token_hex(16)}"
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        self.readable = folder / "canary.txt"
        self.writable = folder / "canary-rw.txt"
        for path, mode in ((self.readable, 0o644), (self.writable, 0o666)):
            path.write_text(self.secret + "\n")
            path.chmod(mode)
        self._before = self._state()

    def _state(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for path in (self.readable, self.writable):
            status = os.lstat(path)
            attributes = [(n, os.getxattr(path, n)) for n in os.listxattr(path)]
            rows.append(
                (
                    path.read_text(),
                    status.st_ino,
                    status.st_mode,
                    status.st_uid,
                    status.st_gid,
                    status.st_mtime_ns,
                    attributes,
                )
            )
        return rows

    def is_untouched(self) -> bool:
        try:
            return self._state() == self._before
        except OSError:
            return False


# -- a session: one supervisor, many cases ---------------------------------------------------------


@dataclass(slots=True)
class Call:
    """One call that was made for a case."""

    tool: str
    file: str
    user: str
    token: str
    request_id: str
    sent: float
    reply: Reply | None = None

    @property
    def result(self) -> Any:
        return self.reply.result if self.reply else None


@dataclass(slots=True)
class Verdict:
    """What became of one case; it passed if there are no problems."""

    case: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _is_certain: bool = False

    def problem(self, oracle: str, text: str, *, by_clock: bool = False) -> None:
        """Something does not hold; `by_clock` if a machine that is busy otherwise explains it."""
        self.problems.append(f"{oracle}: {text}")
        self._is_certain |= not by_clock

    @property
    def only_timing(self) -> bool:
        return bool(self.problems) and not self._is_certain

    def __str__(self) -> str:
        lines = [f"{self.case} ({self.seconds:.2f} s)", *(f"  {p}" for p in self.problems)]
        lines += [f"  note: {n}" for n in self.notes] + [f"  answer: {a}" for a in self.answers]
        return "\n".join(lines)


class Session:
    """A backend, a supervisor with some toolkits, bystanders, and what is needed to judge."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        *,
        overrides: dict[str, dict[str, Any]] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "atp_sandbox"),
        before_exec: Callable[[], None] | None = None,
        **defaults: Any,
    ) -> None:
        """`files` are corpus files by their middle name; `good` is always served, and first."""
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        self.folder = folder
        self.time_s = float(str(defaults.get("time", "2s")).removesuffix("s"))
        self.api_key = f"key-{secrets.token_hex(16)}"
        self.key_file = folder / "key"
        self.key_file.write_text(self.api_key)
        self.key_file.chmod(0o600)
        self.cell = self._make_cell()
        self.backend = Backend(self.cell)
        self.honeypots = Honeypots(self.cell, str(folder))
        self.canaries = Canaries(folder / "canaries")
        self.tokens: dict[str, str] = {}
        """Token → JSON text of the id of the request that carried it."""
        toolkits = {name: corpus_toolkit(name) for name in dict.fromkeys(("good", *files))}
        for name, values in (overrides or {}).items():
            toolkits[name] = {**toolkits.get(name, {}), **values}
        options = self._prepare(toolkits)
        config = configuration(self.backend, self.key_file, toolkits, **defaults)
        self.serve: Serve | None = None
        try:
            self.serve = Serve(
                self.cell,
                folder / "serve",
                config,
                command=command,
                before_exec=before_exec,
                options=options,
            )
            self.serve.wait_event("ready")
            self.backend.bystanders = {"ok_echo": {"arm": ARM, "value": 1}}
            self._settle()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.backend.is_watching = False
        if self.serve is not None:
            self.serve.stop(10)
        self.honeypots.close()
        self.backend.close()
        self.cell.close()

    @property
    def supervisor(self) -> Serve:
        assert self.serve is not None
        return self.serve

    # -- what other kinds of session have beside it ------------------------------------------------

    def _make_cell(self) -> Cell:
        return Cell()

    def _prepare(self, toolkits: dict[str, dict[str, Any]]) -> Sequence[str]:
        """Change the tables of `toolkits` before they are served; gives options of `serve`."""
        return ()

    def begin_case(self) -> None:
        """A case begins."""

    def judge_further(self, verdict: Verdict) -> None:
        """What only this kind of session can say of a case that has ended."""

    def placeholders(self) -> dict[str, Any]:
        return {}

    # -- how it is at rest -------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until nothing changes, and keep the counts that it must come back to."""
        # The first call of every kind leaves things behind that later ones do not.
        for _ in range(3):
            self.call("ok_echo", {"arm": ARM, "value": 0}, "B")
        serve = self.supervisor
        last: tuple[int, int, int] | None = None
        since = time.monotonic()
        deadline = since + 20
        while time.monotonic() < deadline:
            now = (len(serve.jail_processes()), serve.open_files(), serve.status("Threads"))
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > 0.5:
                break
            time.sleep(0.05)
        assert last is not None
        self.resting_processes, self.resting_files, self.resting_threads = last
        self.resting_slots = self._scratch_state()
        self.shared_before = _shared_entries()
        self.mounts_before = _mounts(serve.pid)
        self.connection = self.backend.link
        self.jail_uids = self._jail_uids()

    def _jail_uids(self) -> set[int]:
        uids = set()
        for process in self.supervisor.jail_processes():
            try:
                if b"jails/janitor.py" in Path(f"/proc/{process.pid}/cmdline").read_bytes():
                    continue  # of no jail: it is the supervisor's own user
                uids.add(os.stat(f"/proc/{process.pid}").st_uid)
                uids.add(
                    int(
                        Path(f"/proc/{process.pid}/status")
                        .read_text()
                        .partition("Uid:")[2]
                        .split()[0]
                    )
                )
            except (OSError, ValueError):
                continue
        return uids - {0, os.getuid()}

    def _scratch_state(self) -> dict[str, list[str]]:
        """What lies in the scratch directories and shared places of each jail, by path."""
        found: dict[str, list[str]] = {}
        for process in self.supervisor.jail_processes():
            if process.parent != self.supervisor.pid:
                continue
            base = f"/proc/{process.pid}/root"
            try:
                slots = [f"scratch/{name}" for name in os.listdir(f"{base}/scratch")]
            except OSError:
                continue
            for place in (*slots, "tmp", "dev/shm", "var/tmp"):
                try:
                    names = os.listdir(f"{base}/{place}")
                except OSError:
                    continue
                if names:
                    found[f"{process.pid}:{place}"] = names
        return found

    # -- calls -------------------------------------------------------------------------------------

    def token(self, user: str) -> str:
        return f"tok{user}-{secrets.token_hex(16)}"

    def send(
        self, tool: str, params: Any, user: str, *, file: str = "", token: str | None = None
    ) -> Call:
        token = token or self.token(user)
        request_id = self.backend.new_id(user)
        self.tokens[token] = json.dumps(request_id)
        call = Call(tool, file, user, token, request_id, time.monotonic())
        self.backend.request(tool, params, token, request_id)
        return call

    def finish(self, call: Call, timeout_s: float | None = None) -> Call:
        limit = self.time_s + LATE_S + 2.0 if timeout_s is None else timeout_s
        call.reply = self.backend.wait_reply(call.request_id, limit)
        return call

    def call(self, tool: str, params: Any, user: str = "A") -> Call:
        return self.finish(self.send(tool, params, user))

    # -- placeholders ------------------------------------------------------------------------------

    def fill(self, value: Any, also: dict[str, Any]) -> Any:
        """`value` with every string that begins with `$` replaced; an unknown one stays."""
        if isinstance(value, dict):
            return {key: self.fill(item, also) for key, item in value.items()}
        if isinstance(value, list):
            return [self.fill(item, also) for item in value]
        if not isinstance(value, str) or "$" not in value:
            return value
        known: dict[str, Any] = {
            "$CANARY_FILE": str(self.canaries.readable),
            "$CANARY_RW_FILE": str(self.canaries.writable),
            "$CANARY_SOCK": self.honeypots.path,
            "$CANARY_ABSTRACT": self.honeypots.abstract,
            "$CANARY_PORT": self.honeypots.port,
            "$SUPERVISOR_PID": self.supervisor.pid,
            "$SUPERVISOR_CMD": "atp_sandbox serve",
            "$SUPERVISOR_PORT": self.backend.port,
            "$API_KEY_FIRST": self.api_key[:18],
            "$API_KEY_REST": self.api_key[18:],
            "$DNS_SINK": self.honeypots.dns,
            "$FRAMING": "be32",
            "$SHAPE": _PROTOCOL_SHAPE,
            "$DEADLINE": self.time_s,
            "$ALLOWED_OTHER": ALLOWED_OTHER,
            **self.placeholders(),
            **also,
        }
        if value == "$BYSTANDER_PID":
            return next(
                (
                    p.pid
                    for p in reversed(self.supervisor.jail_processes())
                    if p.parent != self.supervisor.pid
                ),
                self.supervisor.pid,
            )
        if value in known:
            return known[value]
        for name, text in (
            ("$RANDOM", secrets.token_hex(8)),
            ("$DNS_ZONE", "canary.invalid"),
            ("$ALLOWED", ALLOWED),
        ):
            value = value.replace(name, text)
        return value

    # -- one case ----------------------------------------------------------------------------------

    def run(self, case: Case) -> Verdict:
        """The whole case, a second time if only the clock spoke against it."""
        verdict = self._run_once(case)
        if verdict.only_timing:
            first = verdict
            verdict = self._run_once(case)
            verdict.notes.append("the first time: " + "; ".join(first.problems))
        return verdict

    def _run_once(self, case: Case) -> Verdict:
        verdict = Verdict(case.id)
        with Watch(self, case, verdict) as watch:
            if case.variants:
                self._run_variants(case, verdict, watch)
            elif case.id in SPECIAL:
                SPECIAL[case.id](self, case, verdict, watch)
            else:
                self.run_steps(case, verdict, watch)
        return verdict

    def run_steps(
        self, case: Case, verdict: Verdict, watch: Watch, also: dict[str, Any] | None = None
    ) -> list[Call]:
        """Every step in its order; judges the case's own call and gives all of them."""
        made: list[Call] = []
        also = dict(also or {})
        for number, group in enumerate(case.steps, 1):
            calls = []
            ids = [self.backend.new_id(call["user"]) for call in group]
            # The request that the others aim at is the last one of its group.
            also.setdefault("$VICTIM_ID", ids[-1])
            for call in group:
                token = self.token(call["user"])
                middle = len(token) // 2
                also.setdefault(f"$TOKEN_{call['user']}_FIRST", token[:middle])
                also.setdefault(f"$TOKEN_{call['user']}_REST", token[middle:])
                params = self.fill(call["params"], also)
                one = Call(
                    call["tool"],
                    call["file"],
                    call["user"],
                    token,
                    ids[len(calls)],
                    time.monotonic(),
                )
                self.tokens[token] = json.dumps(one.request_id)
                self.backend.request(one.tool, params, token, one.request_id)
                calls.append(one)
            for one in calls:
                watch.judge_lateness(self.finish(one))
            made += calls
            if number == case.judged_step:
                self.judge(case, verdict, calls[0])
                for companion in calls[1:]:
                    self._judge_companion(verdict, companion)
        watch.calls += made
        return made

    def judge(self, case: Case, verdict: Verdict, call: Call) -> None:
        if call.reply is None:
            verdict.problem("answer", f"{call.tool}: none came")
            return
        result = call.result
        names, void = outcomes_of(result)
        wanted = {case.expected, *case.also_ok}
        verdict.answers.append(f"{call.tool}: {shorten(result)}")
        if void:
            verdict.problem("answer", f"{void}: {shorten(result)}")
        elif not names & wanted:
            got = "/".join(sorted(names))
            verdict.problem(
                "answer", f"{got}, wanted {'/'.join(sorted(wanted))}: {shorten(result)}"
            )

    def _judge_companion(self, verdict: Verdict, call: Call) -> None:
        """A call of somebody else in the same step: it must have its own, proper answer."""
        names, void = outcomes_of(call.result)
        if call.reply is None or void or "ok" not in names:
            verdict.problem("answer", f"companion {call.tool}: {shorten(call.result)}")
        elif isinstance(call.result, dict) and "forged" in call.result:
            verdict.problem("O2", f"companion {call.tool} got a forged answer")

    def _run_variants(self, case: Case, verdict: Verdict, watch: Watch) -> None:
        """Each variant by itself. How many there are depends on our own frames, so it is asked."""
        (call,) = case.steps[0]
        params = call["params"]
        asked = self.call(call["tool"], self.fill(params, {"$VARIANT": -1}))
        total = asked.result.get("variants") if isinstance(asked.result, dict) else None
        if not isinstance(total, int) or total < 1:
            verdict.problem("answer", f"how many variants: {shorten(asked.result)}")
            return
        verdict.notes.append(f"{total} variants ({case.variants} in the index)")
        for number in range(total):
            before = len(verdict.problems)
            self.run_steps(case, verdict, watch, {"$VARIANT": number})
            if len(verdict.problems) > before:
                verdict.problems[before:] = [
                    f"{p} [variant {number}]" for p in verdict.problems[before:]
                ]
            else:
                verdict.answers.pop()

    # -- at the end --------------------------------------------------------------------------------

    def whole_session_problems(self) -> list[str]:
        """What can only be said when everything is over."""
        problems = []
        if len(self.backend.connections) != 1:
            problems.append(f"O1: {len(self.backend.connections)} connections were made")
        for key, replies in list(self.backend.replies.items()):
            if key not in self.backend.sent_ids:
                problems.append(f"O2: an answer to {key}, which nobody asked")
            if len(replies) != 1:
                problems.append(f"O2: {len(replies)} answers to {key}")
        if self.backend.odd_frames:
            problems.append(f"O2: {len(self.backend.odd_frames)} frames that are no answers")
        problems += self.token_leaks()
        done = sorted(s.seconds for s in self.backend.samples)
        if done and percentile(done, 0.99) > BYSTANDER_P99_S:
            problems.append(f"O3: the bystanders' p99 is {percentile(done, 0.99):.3f} s")
        return problems

    def token_leaks(self, start: int = 0) -> list[str]:
        """O9 over the log and all frames: whose token is where."""
        problems = []
        text = b"\n".join(self.supervisor.log(start))
        seen = {t.decode() for t in _TOKEN.findall(text)} & self.tokens.keys()
        if seen:
            problems.append(f"O9: {len(seen)} tokens are in the log, the first {min(seen)}")
        if self.api_key.encode() in text:
            problems.append("O9: the API key is in the log")
        for key, replies in list(self.backend.replies.items()):
            for reply in replies:
                for found in set(_TOKEN.findall(reply.raw)):
                    owner = self.tokens.get(found.decode())
                    if owner is not None and owner != key:
                        problems.append(f"O9: the token of {owner} is in the answer to {key}")
                if self.canaries.secret.encode() in reply.raw:
                    problems.append(f"O4: the canary's content is in the answer to {key}")
                if self.api_key.encode() in reply.raw:
                    problems.append(f"O9: the API key is in the answer to {key}")
        return problems


# -- a session whose toolkits have a way out -------------------------------------------------------


_NEVER_SENT = (b"hostile-canary", b"smuggled", b"d=secret", b"SSH-2.0", b"EHLO", b"canary.invalid")
"""What is in the cases' requests that must be refused, and in no other."""
_HONEYPOT_HOST = f"honeypot.{ALLOWED}"

_NEIGHBOUR = """\
import os
import ssl
import urllib.request

from atp_sdk.clients import ToolKitClient

AUTHORITY = {authority!r}
client = ToolKitClient(api_key="k", app_name="neighbour")


def tool(function):
    return client.register_tool(
        function_name=function.__name__,
        params=["url"],
        required_params=[],
        description="the harness's own",
        auth_provider=None,
        auth_type=None,
        auth_with=None,
    )(function)


@tool
def neighbour_credentials(**_):
    return os.environ["HTTPS_PROXY"].partition("//")[2].rpartition("@")[0]


@tool
def neighbour_fetch(**given):
    context = ssl.create_default_context(cadata=AUTHORITY)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(given["url"], timeout=2) as answer:
            return answer.read(100).decode()
    except OSError as error:
        return "failed: " + str(error)


client.start()
"""
"""Not hostile: does what its policy allows, to show that the oracles would see it."""


class EgressSession(Session):
    """Its toolkits may reach the stand-ins of `$ALLOWED` and a few other names, and no more.

    In a cell the sink for DNS is the only resolver, and every name that a case is allowed to reach
    is rerouted: so no question at all may get to it.
    """

    def _make_cell(self) -> Cell:
        resolver = self.folder / "resolv.conf"
        resolver.write_text("nameserver 127.0.0.1\noptions timeout:2 attempts:1\n")
        resolver.chmod(0o644)
        return Cell(resolver)

    def _prepare(self, toolkits: dict[str, dict[str, Any]]) -> Sequence[str]:
        self._seen = 0
        self._others: str | None = None
        self.stand_in = StandIn(self.cell, [ALLOWED])
        neighbour = self.folder / "neighbour.py"
        neighbour.write_text(_NEIGHBOUR.format(authority=self.stand_in.authority_pem))
        toolkits["neighbour"] = {"path": str(neighbour)}
        both = [f"{host}:{port}" for host in (ALLOWED, f"*.{ALLOWED}") for port in (80, 443)]
        hostile = [*both, f"{ALLOWED_OTHER}:80"]
        policies = {
            # Without a pattern: it gets there by the name's address in the jail, not by the proxy.
            "good": ([f"{ALLOWED}:80"], [ALLOWED]),
            "neighbour": ([*both, f"{_HONEYPOT_HOST}:80"], [ALLOWED, _HONEYPOT_HOST]),
        }
        for name, values in toolkits.items():
            allowed, private = policies.get(name, (hostile, [ALLOWED, ALLOWED_OTHER]))
            values.update(egress=allowed, private_ok=private, egress_bytes=EGRESS_BYTES)
        toolkits["neighbour"]["egress_idle"] = f"{NEIGHBOUR_IDLE_S}s"
        options = []
        for host, address in self._reroutes():
            options += ["--reroute", f"{host}={address}"]
        return options

    def _reroutes(self) -> list[tuple[str, str]]:
        ports, honeypot = self.stand_in.ports, self.honeypots.port
        rebinding = f"{METADATA},127.0.0.1:{honeypot}"
        if self.cell.is_private:
            # On each of these there is a socket at port 80: the stand-in's, and two honeypots.
            rebinding = f"{PUBLIC},{METADATA},{PUBLIC},127.0.0.1:80"
        return [
            (f"{ALLOWED}:80", f"127.0.0.1:{ports['http']}"),
            (f"{ALLOWED}:443", f"127.0.0.1:{ports['https']}"),
            (f"{ALLOWED_OTHER}:80", f"127.0.0.1:{ports['http']}"),
            (f"rebind.{ALLOWED}:80", rebinding),
            (f"{_HONEYPOT_HOST}:80", f"127.0.0.1:{honeypot}"),
        ]

    def close(self) -> None:
        super().close()
        if hasattr(self, "stand_in"):
            self.stand_in.close()

    def placeholders(self) -> dict[str, Any]:
        if self._others is None:
            self._others = self.call("neighbour_credentials", {}, "B").result
            assert self._others.startswith("worker-"), self._others
        return {"$OTHER_PROXY_CRED": self._others}

    def _settle(self) -> None:
        super()._settle()
        self._egress_pid = self._find_egress()
        self._egress_files = self._open_egress_files()
        self._egress_rss = self._read_egress_rss()

    def _find_egress(self) -> int:
        """The number of the egress process; 0 if there is none at the moment."""
        for process in self.supervisor.jail_processes():
            try:
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"egress/boot.py" in command:
                return process.pid
        return 0

    def _open_egress_files(self) -> int:
        """0 if there is no telling, as for an ordinary user."""
        try:
            return len(os.listdir(f"/proc/{self._egress_pid}/fd"))
        except OSError:
            return 0

    def _read_egress_rss(self) -> int:
        try:
            text = Path(f"/proc/{self._egress_pid}/statm").read_text()
        except OSError:
            return 0
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def begin_case(self) -> None:
        self.stand_in.wait_quiet(GONE_S)
        self._seen = len(self.stand_in.arrivals)

    def arrivals(self) -> list[Any]:
        """What reached the stand-ins in this case."""
        return self.stand_in.arrivals[self._seen :]

    def judge_further(self, verdict: Verdict) -> None:
        if not self.stand_in.wait_quiet(GONE_S):
            verdict.problem("O7", "connections to a host outlive their call")
        self._judge_egress_process(verdict)
        for arrival in self.arrivals():
            head = arrival.raw.partition(b"\r\n\r\n")[0].lower()
            if found := [text for text in _NEVER_SENT if text in arrival.raw]:
                verdict.problem("egress", f"{found} got to {arrival.place}: {arrival.raw[:300]!r}")
            if arrival.place == "https" and arrival.raw and not arrival.is_tls:
                verdict.problem("egress", f"port 443 was sent {arrival.raw[:80]!r}")
            if head.count(b"\r\ncontent-length:") + head.count(b"\r\ntransfer-encoding:") > 1:
                verdict.problem("egress", f"a request of two lengths: {arrival.raw[:300]!r}")
            if head.count(b"\r\nhost:") > 1 or b"\r\nproxy-authorization:" in head:
                verdict.problem("egress", f"a head that is not the proxy's: {arrival.raw[:300]!r}")
        if self.arrivals():
            verdict.notes.append(f"{len(self.arrivals())} connections got to a stand-in")

    def _judge_egress_process(self, verdict: Verdict) -> None:
        """O7 for the process that reads what hostile tools send: it stays, and keeps nothing."""
        if self._find_egress() != self._egress_pid:
            verdict.problem("egress", "the egress process ended")
            self._egress_pid = self._find_egress()
        self.backend.wait_for(lambda: self._open_egress_files() <= self._egress_files, GONE_S)
        files = self._open_egress_files()
        if files > self._egress_files:
            text = f"{files} descriptors of the egress process, {self._egress_files} at rest"
            verdict.problem("O7", text)
        grown = self._read_egress_rss() - self._egress_rss
        if grown > EGRESS_RSS_BYTES:
            verdict.problem("O7", f"the egress process grew by {grown >> 20} MiB")
        verdict.notes.append(f"egress process: {grown >> 10} KiB more, {files} descriptors")


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _shared_entries() -> set[str]:
    found = set()
    for place in _SHARED:
        try:
            found |= {os.path.join(place, name) for name in os.listdir(place)}
        except OSError:
            continue
    return found


def _mounts(supervisor: int) -> set[str]:
    """Mounts of the machine and of the supervisor, whose cell may have its own, if maybe ours."""
    tables = [Path(f"/proc/{pid}/mountinfo").read_text() for pid in ("self", supervisor)]
    lines = [line for table in tables for line in table.splitlines()]
    return {line for line in lines if re.search(r"atp-sandbox| (scratch|jail|mask) ", line)}


# -- the oracles -----------------------------------------------------------------------------------


class Watch:
    """Everything that is looked at while one case runs and just after it."""

    def __init__(self, session: Session, case: Case, verdict: Verdict) -> None:
        self.session = session
        self.case = case
        self.verdict = verdict
        self.calls: list[Call] = []
        self.bystander_tools = {"ok_echo"}
        self._shared_limits: list[Call] = []

    def __enter__(self) -> Watch:
        session, backend = self.session, self.session.backend
        self.started = time.monotonic()
        self.log_start = session.supervisor.log_size()
        self.rss = session.supervisor.rss()
        self.visits = len(session.honeypots.look())
        self.samples = len(backend.samples)
        self.trips = len(backend.round_trips)
        self.odd = len(backend.odd_frames)
        session.begin_case()
        inert = _inert_tool(self.case.file)
        backend.bystanders = {"ok_echo": {"arm": ARM, "value": 1}}
        if inert and self.case.id not in FILLS_ITS_TOOLKIT:
            backend.bystanders[inert] = {"arm": "not armed"}
        if "O14" in self.case.oracles:
            backend.bystanders["ok_shared_limits"] = {"arm": ARM}
        backend.is_watching = True
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self.session.backend.is_watching = False
            return
        self._look()

    def judge_lateness(self, call: Call) -> None:
        """O12, judged for every call, since no answer of any case may be later than that."""
        if call.reply is not None:
            late = call.reply.at - call.sent - self.session.time_s
            if late > LATE_S:
                self.verdict.problem(
                    "O12", f"{call.tool} answered {late:.2f} s after its deadline", by_clock=True
                )

    def _look(self) -> None:
        session, verdict, backend = self.session, self.verdict, self.session.backend
        if "O13" in self.case.oracles:
            self._next_call()
        for lost in backend.pause_bystanders():
            verdict.problem("O3", f"{lost.tool} of a bystander was never answered")
        backend.forget_waiting()
        verdict.seconds = time.monotonic() - self.started
        self._rest()
        self._connection()
        self._answers()
        self._bystanders()
        if not session.canaries.is_untouched():
            verdict.problem("O4", "a canary file was changed")
        visits = session.honeypots.look()[self.visits :]
        if visits:
            oracle = "O10" if all(visit.startswith("dns") for visit in visits) else "O5"
            verdict.problem(oracle, f"honeypots were visited: {', '.join(sorted(set(visits)))}")
        session.judge_further(verdict)
        self._left_files()
        for problem in session.token_leaks(self.log_start):
            oracle, _, text = problem.partition(": ")
            verdict.problem(oracle, text)
        self._log()

    def _next_call(self) -> None:
        """O13: the same toolkit, another user, a fresh worker."""
        tool = _inert_tool(self.case.file) or "ok_echo"
        began = time.monotonic()
        call = self.session.call(tool, {"arm": "not armed"}, "B")
        seconds = time.monotonic() - began
        if outcomes_of(call.result)[0] != {"ok", "denied"}:
            self.verdict.problem("O13", f"the next call: {shorten(call.result)}")
        elif seconds > NEXT_CALL_S:
            self.verdict.problem("O13", f"the next call took {seconds:.2f} s", by_clock=True)

    def _rest(self) -> None:
        """O6 and O7: back to what it was, in the time that is allowed for it."""
        session, serve = self.session, self.session.supervisor
        inert, used = _inert_tool(self.case.file), 0
        deadline = time.monotonic() + GONE_S
        while True:
            found = serve.jail_processes()
            files, threads = serve.open_files(), serve.status("Threads")
            odd = [p for p in found if p.state in "TtZX"]
            is_at_rest = (
                len(found) == session.resting_processes
                and not odd
                and files == session.resting_files
                and threads == session.resting_threads
            )
            if is_at_rest or time.monotonic() > deadline:
                break
            if len(found) > session.resting_processes and inert is not None and used < MAX_SURPLUS:
                # After a burst more workers than usual wait, fresh; a call takes one of them away.
                session.call(inert, {"arm": "not armed"}, "B")
                used += 1
            time.sleep(0.01)
        extra = len(found) - session.resting_processes
        if extra > 0 or odd:
            shown = [f"{p.pid}:{p.command}:{p.state}" for p in (odd or found)][:12]
            self.verdict.problem("O6", f"{extra} processes too many, {len(odd)} odd: {shown}")
        strangers = self._strangers({p.pid for p in found})
        if strangers:
            self.verdict.problem("O6", f"processes of a jail's user elsewhere: {strangers}")
        if files > session.resting_files:
            text = f"{files} descriptors, {session.resting_files} at rest"
            self.verdict.problem("O7", text)
        most = MAX_GROUP_FILES * sum(1 for p in found if p.parent == serve.pid)
        if serve.group_files() > most:
            self.verdict.problem("O7", f"{serve.group_files()} descriptors of control groups")
        if threads > session.resting_threads:
            text = f"{threads} threads, {session.resting_threads} at rest"
            self.verdict.problem("O7", text)
        grown = serve.rss() - self.rss
        if grown > RSS_BYTES:
            self.verdict.problem("O7", f"the supervisor grew by {grown >> 20} MiB", by_clock=True)

    def _strangers(self, known: set[int]) -> list[int]:
        if not self.session.jail_uids:
            return []
        found = []
        for pid in processes().keys() - known:
            try:
                if os.stat(f"/proc/{pid}").st_uid in self.session.jail_uids:
                    found.append(pid)
            except OSError:
                continue
        # Between two looks a worker may have been started: only one that stays counts.
        below = {p.pid for p in self.session.supervisor.jail_processes()}
        return [pid for pid in found if pid not in below and os.path.exists(f"/proc/{pid}")]

    def _connection(self) -> None:
        """O1, and of O7 the event loop's lag, by the round trips of pings."""
        session, backend = self.session, self.session.backend
        if backend.link is not session.connection:
            self.verdict.problem("O1", "the connection was lost")
            session.connection = backend.link
            return
        trips = backend.round_trips[self.trips :]
        assert session.connection is not None
        unanswered = [time.monotonic() - s for s in list(session.connection.pings.values())]
        slowest = max([t for _, t, _ in trips] + unanswered, default=0.0)
        if slowest > PONG_S:
            self.verdict.problem("O1", f"a ping was answered after {slowest:.2f} s", by_clock=True)
        # The backend's own loop can be late, too; that much is not the supervisor's.
        lag = max((seconds - ours for _, seconds, ours in trips), default=0.0)
        if lag > LAG_S:
            self.verdict.problem("O7", f"a ping took {lag * 1000:.0f} ms", by_clock=True)

    def _answers(self) -> None:
        """O2 for what was asked in this case."""
        backend = self.session.backend
        for call in self.calls:
            count = len(backend.replies_to(call.request_id))
            if count != 1:
                self.verdict.problem("O2", f"{count} answers to a call of {call.tool}")
        if len(backend.odd_frames) > self.odd:
            self.verdict.problem(
                "O2", f"a frame that is no answer: {backend.odd_frames[-1][:80]!r}"
            )
        strange = [key for key in list(backend.replies) if key not in backend.sent_ids]
        if strange:
            self.verdict.problem("O2", f"answers to ids that were never sent: {strange[:3]}")

    def _bystanders(self) -> None:
        """O3, and O14 where the case names it."""
        samples = self.session.backend.samples[self.samples :]
        faults = [f"{s.tool}: {s.fault}" for s in samples if s.fault]
        if faults:
            self.verdict.problem("O3", f"{len(faults)} bystanders failed, first {faults[0]}")
        seconds = sorted(s.seconds for s in samples)
        if seconds and percentile(seconds, 0.99) > BYSTANDER_P99_S:
            worst = percentile(seconds, 0.99)
            self.verdict.problem(
                "O3", f"bystanders' p99 of {len(seconds)}: {worst:.3f} s", by_clock=True
            )
        if "O14" in self.case.oracles:
            self._judge_shared_limits([s for s in samples if s.tool == "ok_shared_limits"])

    def _judge_shared_limits(self, samples: list[Sample]) -> None:
        if not samples:
            self.verdict.notes.append("too short for a look at the shared limits")
        for sample in samples:
            replies = self.session.backend.replies_to(sample.request_id)
            result = replies[0].result if replies else None
            if not isinstance(result, dict) or not all(v is True for v in result.values()):
                self.verdict.problem("O14", f"ok_shared_limits: {shorten(result)}")
                return

    def _left_files(self) -> None:
        """O8, always: it is cheap."""
        session = self.session
        left = {
            place: names
            for place, names in session._scratch_state().items()
            if place not in session.resting_slots
        }
        if left:
            # A slot that is just being freed is not left behind.
            time.sleep(0.1)
            left = {p: n for p, n in session._scratch_state().items() if p in left}
        if left:
            self.verdict.problem("O8", f"files are left: {shorten(left)}")
        for path in _shared_entries() - session.shared_before:
            try:
                owner = os.lstat(path).st_uid
            except OSError:
                continue
            if owner in session.jail_uids or _LEFTOVER.match(os.path.basename(path)):
                self.verdict.problem("O8", f"{path} was left")
        if _mounts(session.supervisor.pid) - session.mounts_before:
            self.verdict.problem("O8", "mounts were left")
        names = {p.name for p in session.supervisor.folder.iterdir()}
        if names - {"state", "log.jsonl", "atp-sandbox.toml"}:
            self.verdict.problem("O8", f"in the supervisor's directory: {sorted(names)}")

    def _log(self) -> None:
        """O11: one line for each failed call, and only clean lines."""
        failed: dict[str, int] = {}
        for line in self.session.supervisor.log(self.log_start):
            if len(line) > MAX_LOG_LINE_CHARS:
                self.verdict.problem("O11", f"a log line of {len(line)} bytes")
            if re.search(rb"[\x00-\x1f\x7f]", line):
                self.verdict.problem("O11", f"control characters in the log: {line[:80]!r}")
            try:
                event = json.loads(line)
            except ValueError:
                self.verdict.problem("O11", f"a log line that is no JSON: {line[:200]!r}")
                continue
            if event.get("event") in ("call_failed", "request_rejected"):
                key = event.get("request_id", "")
                failed[key] = failed.get(key, 0) + 1
            elif event.get("event") == "":
                self.verdict.problem("O11", f"a log line without a name: {line[:200]!r}")
        for call in self.calls:
            is_failure = isinstance(call.result, dict) and "error_type" in call.result
            count = failed.get(json.dumps(call.request_id), 0)
            if count != (1 if is_failure and "retryable" in call.result else 0):
                self.verdict.problem("O11", f"{count} log lines for the call of {call.tool}")


def _inert_tool(file: str) -> str | None:
    """A tool of that corpus file which does nothing unless it is armed."""
    found = {
        "toolkit_fs.py": "fs_read_paths",
        "toolkit_proc.py": "proc_list_host",
        "toolkit_syscalls.py": "sys_vsyscall",
        "toolkit_net.py": "net_tun",
        "toolkit_tokens.py": "tok_other_tool",
        "toolkit_ipc.py": "ipc_list",
        "toolkit_crash.py": "cr_sleep",
        "toolkit_resource.py": "rs_mlock",
        "toolkit_results.py": "rt_scalar",
        "toolkit_proxy.py": "px_auth",
    }
    return found.get(file)


FILLS_ITS_TOOLKIT = frozenset({"R36"})
"""Cases that occupy every worker of their own toolkit on purpose: only others must not feel it."""


# -- cases that are more than a call after the other -----------------------------------------------


def _occupy(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """R36: three times as many sleepers as a toolkit may run; others go on."""
    (sleeper, echo) = case.steps[0]
    calls = [session.send(sleeper["tool"], sleeper["params"], "A") for _ in range(12)]
    companions = []
    while time.monotonic() - calls[0].sent < session.time_s:
        companions.append(session.call(echo["tool"], echo["params"], "B"))
        time.sleep(0.1)
    for call in calls:
        watch.judge_lateness(session.finish(call))
        session.judge(case, verdict, call)
    for companion in companions:
        session._judge_companion(verdict, companion)
    verdict.answers[1:] = []
    watch.calls += [*calls, *companions]


def _leak_often(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """R11: what one call keeps, no later one may pay for."""
    for _ in range(20):
        (call,) = session.run_steps(case, verdict, watch)
        if isinstance(call.result, dict) and call.result.get("detail") != {"kept_mb": 48}:
            verdict.notes.append(f"a process that was used before: {shorten(call.result)}")
    verdict.answers[1:] = []


def _race(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """C37: two hundred calls that end just before, at and just after their deadline."""
    call = case.steps[0][0]
    params = session.fill(call["params"], {})
    for first in range(0, 200, 8):
        group = [
            session.send(call["tool"], {**params, "offset_ms": number % 41 - 20}, "A")
            for number in range(first, min(first + 8, 200))
        ]
        for one in group:
            watch.judge_lateness(session.finish(one))
            session.judge(case, verdict, one)
        watch.calls += group
    kinds = {a.partition(": ")[2][:24] for a in verdict.answers}
    verdict.answers[:] = sorted(kinds)


def _named_process(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """T24, with a look at every process of ours while it runs."""
    call = case.steps[0][0]
    made = session.send(call["tool"], session.fill(call["params"], {}), "A")
    while not session.backend.replies_to(made.request_id):
        for process in session.supervisor.jail_processes():
            for name in ("cmdline", "comm"):
                try:
                    text = Path(f"/proc/{process.pid}/{name}").read_bytes()
                except OSError:
                    continue
                if made.token.encode() in text:
                    verdict.problem("O9", f"the token is in /proc/PID/{name}")
        if time.monotonic() - made.sent > session.time_s + LATE_S:
            break
    watch.judge_lateness(session.finish(made))
    session.judge(case, verdict, made)
    watch.calls.append(made)


def _control(check: Callable[[Any, Call], bool]) -> Callable[..., None]:
    """A control must not only answer but answer right."""

    def run(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
        (call,) = session.run_steps(case, verdict, watch)
        try:
            is_right = check(call.result, call)
        except (LookupError, TypeError, AttributeError):
            is_right = False
        if not is_right:
            verdict.problem("answer", f"not what it should be: {shorten(call.result)}")

    return run


def _plain_over_tunnels(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """X06: proves nothing if its tunnels were not granted."""
    (call,) = session.run_steps(case, verdict, watch)
    if "tunnel refused" in json.dumps(call.result):
        verdict.problem("answer", "a tunnel to an allowed host was refused")


def _redirects(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """X10 for each kind of place that an allowed page may lead to."""
    assert isinstance(session, EgressSession)
    for place in (
        f"http://{METADATA}/",
        f"http://127.0.0.1:{session.honeypots.port}/",
        f"http://localhost:{session.honeypots.port}/",
        f"http://rebind.{ALLOWED}/",
        "http://denied.hostile-canary.invalid/",
        f"https://{METADATA}/",
    ):
        session.stand_in.redirects = [place]
        asked = len(session.stand_in.arrivals)
        session.run_steps(case, verdict, watch)
        if not any(b"GET /redirect" in a.raw for a in session.stand_in.arrivals[asked:]):
            verdict.problem("answer", "the page that redirects was not asked for")


def _rebinding(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """X11: each answer of the resolver is judged by itself."""
    (call,) = session.run_steps(case, verdict, watch)
    wanted = {"200", "403"} if session.cell.is_private else {"403"}
    if not isinstance(call.result, dict) or set(call.result["detail"]) != wanted:
        verdict.problem("answer", f"wanted {sorted(wanted)} alone: {shorten(call.result)}")


def _upload(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """X20: what got through is bounded by the policy, and not by the tool's patience."""
    assert isinstance(session, EgressSession)
    session.run_steps(case, verdict, watch)
    session.stand_in.wait_quiet(GONE_S)
    received = sum(arrival.received_bytes for arrival in session.arrivals())
    if not 0 < received <= EGRESS_BYTES + (1 << 20):
        verdict.problem("egress", f"{received >> 20} MiB got through")


def _plain_token(session: Session, case: Case, verdict: Verdict, watch: Watch) -> None:
    """X24 where tools get the token itself, and may send it to whom they may reach."""
    (call,) = session.run_steps(case, verdict, watch)
    if call.result == {"escaped": True, "detail": {"header": "200", "query": "200"}}:
        verdict.problems[:] = []
        verdict.notes.append("the token went to another host, as it may in plain mode")


_TEXT = (
    'Grüße, 你好, שלום, नमस्ते, 🦀👩\u200d👩\u200d👧\u200d👦, "quotes" \\ / \b\f\n\r\t \u2028\u2029'
)

SPECIAL: dict[str, Callable[[Session, Case, Verdict, Watch], None]] = {
    "C37": _race,
    "R11": _leak_often,
    "R36": _occupy,
    "T24": _named_process,
    "X06": _plain_over_tunnels,
    "X10": _redirects,
    "X11": _rebinding,
    "X20": _upload,
    "X24": _plain_token,
    "G12": _control(lambda r, c: r == {"ok": True, "body": "ok"}),
    "G01": _control(lambda r, c: r["value"] == [1, "x", None]),
    "G02": _control(
        lambda r, c: (
            r == {"length": len(c.token), "sha256": hashlib.sha256(c.token.encode()).hexdigest()}
        )
    ),
    "G03": _control(lambda r, c: r["slept"] >= 0.2),
    "G04": _control(lambda r, c: r["n"] > 0),
    "G05": _control(lambda r, c: r == {"read": "hello"}),
    "G06": _control(lambda r, c: r == {"sum": 328_350}),
    "G07": _control(lambda r, c: r["ran"] in (True, False)),
    "G08": _control(lambda r, c: r == {"mb": 32}),
    "G09": _control(lambda r, c: r == {"text": "r" * 65_536}),
    "G10": _control(
        lambda r, c: r["text"] == _TEXT and r["nested"]["a"] == [1, 2.5, None, True, {"b": []}]
    ),
    "G11": _control(lambda r, c: r["error"] == "the city was not found"),
    "G13": _control(lambda r, c: r["n"] == 42 and r["re"] == "bb" and r["dec"] == "1.1"),
    "G14": _control(lambda r, c: r == {"r": list(range(10))}),
    "G15": _control(lambda r, c: r == {"printed": 2}),
    "G16": _control(lambda r, c: r["calls"] == 1),
    "G17": _control(lambda r, c: r == {"inotify": True, "pipe": True, "thread": True}),
}
