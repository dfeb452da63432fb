"""A configuration is taken whole or refused with all its faults; a key is never shown."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atp_sandbox.config import MAX_CONFIG_BYTES, MAX_KEY_CHARS, Config, load_config, read_api_key
from atp_sandbox.errors import UsageError
from atp_sandbox.limits import GIB, KIB, MIB, Limits
from atp_sandbox.settings import (
    BackendSettings,
    JournalMode,
    Lifetime,
    LifetimeKind,
    ServeOptions,
)

SECRET = "sk-never-show-this"
ONE = '[toolkit.a]\npath = "a.py"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "atp-sandbox.toml"


def load(file: Path, text: str) -> Config:
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def faults(file: Path, text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(file, text)
    assert str(file) in caught.value.message
    rows = caught.value.cause.split("\n")
    assert rows[0] in caught.value.message
    return rows


# What is taken


def test_everything_that_can_be_said_arrives(file: Path) -> None:
    config = load(
        file,
        """
        [backend]
        url = "https://example.org/prefix"
        api-key-file = "keys/key.txt"
        app-name = "my_app"
        ws-path = "0.1"
        as-written = true
        send-source = false
        sample-responses = true
        [serve]
        journal = "required"
        grace = "20s"
        reload = true
        queue = 100
        queue-bytes = "8M"
        [defaults]
        time = "5s"
        import-time = 7
        memory = "1G"
        output = 2048
        concurrency = 2
        queue = 0
        lifetime = "jail"
        [toolkit.a]
        path = "a.py"
        [toolkit."b.2"]
        path = "/srv/b"
        data = ["words", "/srv/rates.csv"]
        env = { LANG = "C", EMPTY = "" }
        time = "500ms"
        memory = "64M"
        lifetime = "calls:10"
        """,
    )
    folder = file.parent
    assert config.backend.api_key_file == folder / "keys/key.txt"
    assert config.backend.with_key("k") == BackendSettings(
        api_key="k",
        base_url="https://example.org/prefix",
        app_name="my_app",
        as_written=True,
        ws_path="0.1",
        send_source=False,
        sample_responses=True,
    )
    assert config.serve == ServeOptions(
        JournalMode.REQUIRED, grace_s=20.0, reloads=True, queue=100, queue_bytes=8 * MIB
    )
    assert config.default_limits == Limits(
        time_s=5.0,
        import_time_s=7.0,
        memory_bytes=GIB,
        output_bytes=2 * KIB,
        concurrency=2,
        queue=0,
    )
    assert config.default_lifetime == Lifetime(LifetimeKind.JAIL)
    first, second = config.toolkits
    assert (first.name, first.path, first.data, first.env) == ("a", folder / "a.py", (), {})
    assert (first.limits, first.lifetime) == (config.default_limits, config.default_lifetime)
    assert (second.name, second.path) == ("b.2", Path("/srv/b"))
    assert second.data == (folder / "words", Path("/srv/rates.csv"))
    assert second.env == {"LANG": "C", "EMPTY": ""}
    assert (second.limits.time_s, second.limits.memory_bytes) == (0.5, 64 * MIB)
    assert second.limits.import_time_s == 7.0
    assert second.lifetime == Lifetime(LifetimeKind.CALLS, 10)


def test_what_is_not_said_is_as_without_a_configuration(file: Path) -> None:
    config = load(file, ONE)
    assert config.backend.with_key(None) == BackendSettings()
    assert config.backend.api_key_file is None
    assert config.default_limits == config.toolkits[0].limits == Limits()
    assert config.default_lifetime == config.toolkits[0].lifetime == Lifetime()


def test_paths_are_relative_to_the_file_and_not_to_where_we_stand(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(ONE)
    (file.parent / "below").mkdir()
    monkeypatch.chdir(file.parent / "below")
    found = load_config(Path("..", file.name)).toolkits[0].path
    assert found.is_absolute()
    assert found.resolve() == file.parent / "a.py"


def test_importing_the_module_does_not_import_pydantic() -> None:
    program = "import sys, atp_sandbox.config; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# What is refused


def test_all_faults_are_reported_at_once_each_with_its_place(file: Path) -> None:
    rows = faults(
        file,
        """
        [backend]
        url = "example.org"
        [defaults]
        memory = "10X"
        [toolkit.a]
        pth = "a.py"
        concurrency = "4"
        """,
    )
    assert [row.partition(": ")[0] for row in rows] == [
        "backend.url",
        "defaults.memory",
        "toolkit.a.concurrency",
        "toolkit.a.path",
        "toolkit.a.pth",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[backend]\nurl = 'ftp://x'", 'backend.url: found "ftp://x"; allowed: an address'),
        ("[backend]\nurl = 'https://'", "backend.url: found"),
        ("[backend]\nurl = 'https://[x'", "backend.url: found"),
        ("[backend]\nurl = 'https://x:99999999'", "backend.url: found"),
        ("[backend]\nurl = 'https://x y'", "backend.url: found"),
        ("[backend]\nurl = 'https://x?k=v'", "must end with the path"),
        ("[backend]\nws-path = 0.2", 'found the number 0.2; allowed: "0.1" or "0.2", in quotes'),
        ("[backend]\nws-path = '0.3'", 'found "0.3"; allowed'),
        ("[backend]\nas-written = 'no'", 'found "no"; allowed: true or false'),
        ("[backend]\nsend-source = 1", "found the number 1; allowed: true or false"),
        ("[backend]\napp-name = ''", "backend.app-name"),
        ('[backend]\napp-name = "a\\u001bb"', "backend.app-name"),
        ("[backend]\napi_key_file = 'k'", "unknown key; did you mean api-key-file?"),
        ("backend = 3", "backend: found the number 3; allowed: a table"),
        ("[defaults]\npath = 'x'", "defaults.path: unknown key"),
        ("[defaults]\nmemroy = '1G'", "unknown key; did you mean memory?"),
        (
            "[defaults]\nzzz = 1",
            "allowed: concurrency, cpu, egress-bytes, egress-connections, egress-idle, ",
        ),
        ("[defaults]\nisolation = 'loose'", "'loose' is no isolation; write strict, container"),
        ("[serve]\njournal = true", 'found true; allowed: "on", "required" or "off"'),
        ("[defaults]\nisolation = 1", 'found the number 1; allowed: "strict"'),
        ("[defaults]\nwaive = ['everything']", "'everything' cannot be waived; what can: cgroup"),
        ("[defaults]\nwaive = 'cgroup'", 'found "cgroup"; allowed: a list of layers'),
        ("[defaults]\nsubprocess = 1", "defaults.subprocess: found the number 1"),
        ("[defaults]\nmemory = 256", "found the number 256; must be from 1 MiB"),
        ("[defaults]\nmemory = '2000G'", 'found "2000G"; must be from 1 MiB'),
        ("[defaults]\nmemory = true", "found true; allowed: a size"),
        ("[defaults]\nmemory = 1.5", "found the number 1.5; allowed: a size"),
        ("[defaults]\noutput = '0'", "defaults.output"),
        ("[defaults]\ntime = '30 parsecs'", "'30 parsecs' is no duration; write"),
        ("[defaults]\ntime = '25h'", 'found "25h"; must be more than 0 and at most a day'),
        ("[defaults]\ntime = 0", "found the number 0; must be more than 0"),
        ("[defaults]\ntime = -1", "found the number -1; must be more than 0"),
        ("[defaults]\ntime = inf", "defaults.time: found"),
        ("[defaults]\ntime = nan", "defaults.time: found"),
        ("[defaults]\nimport-time = 1979-05-27", "found a date or time; allowed: a duration"),
        ("[defaults]\nconcurrency = 0", "found the number 0; allowed: a whole number from 1"),
        ("[defaults]\nconcurrency = 2.0", "found the number 2.0; allowed: a whole number"),
        ("[defaults]\nqueue = 1000001", "defaults.queue"),
        ("[defaults]\nlifetime = 'calls:0'", "'calls:0' is no lifetime; write call"),
        ("[defaults]\nlifetime = 1", 'found the number 1; allowed: "call"'),
        ("typo = 1", "typo: unknown key; allowed: backend, defaults, serve, toolkit"),
        ("toolkits = 1", "toolkits: unknown key; did you mean toolkit?"),
        ("[toolkit.b]", "toolkit.b.path: missing; a path"),
        ("[toolkit]\nb = 'b.py'", 'toolkit.b: found "b.py"; allowed: a table, [toolkit.NAME]'),
        ("[toolkit.b]\npath = ''", 'toolkit.b.path: found ""; allowed: a path'),
        ('[toolkit.b]\npath = "a\\u0000"', "toolkit.b.path"),
        ("[toolkit.b]\npath = 'b'\ndata = 'c'", 'toolkit.b.data: found "c"; allowed: a list'),
        ("[toolkit.b]\npath = 'b'\ndata = ['c', 1]", "toolkit.b.data[1]: found the number 1"),
        ("[toolkit.b]\npath = 'b'\nenv = 3", "toolkit.b.env: found a number; allowed: a table"),
        ("[toolkit.b]\npath = 'b'\nenv = {1A = ''}", "toolkit.b.env.1A: is no name of a variable"),
        ("[toolkit.b]\npath = 'b'\nenv = {'' = ''}", 'toolkit.b.env."": is no name of a variable'),
        ("[toolkit.b]\npath = 'b'\nenv = {A = 1}", "toolkit.b.env.A: found a number; allowed: a s"),
        ("[toolkit.b]\npath = 'b'\nenv = {A = \"\\u0000\"}", "must not hold a NUL"),
        ("[toolkit.b]\npath = 'b'\nenv = {ATP_API_KEY = 'x'}", "is reserved"),
        ("[toolkit.my.kit]\npath = 'b'", 'is written [toolkit."my.kit"]'),
        ("[toolkit.'a b']\npath = 'b'", 'toolkit."a b": is no toolkit name; allowed: 1 to 64'),
        ("[toolkit.'..']\npath = 'b'", "is no toolkit name"),
        (f"[toolkit.{'n' * 65}]\npath = 'b'", "is no toolkit name"),
        ("[toolkit.b]\npath = 'b'\nurl = 'x'", "toolkit.b.url: unknown key"),
        ("[toolkit.b]\npath = 'b'\negress = 'x'", 'toolkit.b.egress: found "x"; allowed: a list'),
        ("[toolkit.b]\npath = 'b'\negress = ['*']", "toolkit.b: '*': a pattern is"),
        ("[toolkit.b]\npath = 'b'\negress = ['10.0.0.1']", "toolkit.b: '10.0.0.1' is an address"),
        ("[toolkit.b]\npath = 'b'\nprivate-ok = ['x']", "x may be private, but is not among"),
        ("[toolkit.b]\npath = 'b'\nauth = 'inject'", "go together"),
        ("[toolkit.b]\npath = 'b'\nauth-hosts = {a = ['x']}", "go together"),
        ("[toolkit.b]\npath = 'b'\nauth = 'no'", 'allowed: "pass" or "inject"'),
        ("[toolkit.b]\npath = 'b'\negress-connections = 0", "a whole number from 1"),
        ("[defaults]\negress = ['x']", "defaults.egress: unknown key"),
        (
            "[toolkit.b]\npath = 'b'\nisolation = 'none'\negress = ['x.example']",
            "egress needs isolation strict",
        ),
    ],
)
def test_fault_is_told_with_place_finding_and_what_is_allowed(
    file: Path, text: str, complaint: str
) -> None:
    rows = faults(file, f"{text}\n{ONE}" if not text.startswith("[toolkit]") else text)
    assert any(complaint in row for row in rows), rows


@pytest.mark.parametrize("text", ["", "[toolkit]", "[defaults]\ntime = 1"])
def test_configuration_without_toolkits_is_refused(file: Path, text: str) -> None:
    assert faults(file, text) == [
        'toolkit: no toolkit is named; write [toolkit.NAME] with path = "…"'
    ]


def test_toolkits_as_a_list_are_refused_with_the_right_form(file: Path) -> None:
    (row,) = faults(file, "[[toolkit]]\npath = 'a.py'\n")
    assert row == "toolkit: found a list; allowed: tables, [toolkit.NAME]"


@pytest.mark.parametrize("place", ["[backend]\napi-key", "[backend]\napi_key", "api-key"])
def test_key_in_the_configuration_is_refused_with_the_way_out_and_not_shown(
    file: Path, place: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load(file, f'{place} = "{SECRET}"\n{ONE}')
    assert "api-key-file" in caught.value.tip
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "text",
    [
        f"[backend]\nurl = 'https://u:{SECRET}@example.org'\n{ONE}",
        f"{ONE}env = {{ 1 = '{SECRET}' }}",
        f"{ONE}env = {{ A = '{SECRET}\\0' }}".replace("'", '"').replace("\\0", "\\u0000"),
        f"{ONE}env = {{ A = ['{SECRET}'] }}",
        f"{ONE}unknown = '{SECRET}'",
        f"[backend]\napi-key-file = {SECRET}\n{ONE}",
        f"[backend]\napi-key-file = '{SECRET}\n{ONE}",
    ],
)
def test_value_that_may_be_secret_is_not_shown(file: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(file, text)
    shown = caught.value.render() + "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = \n", 2), ("[toolkit.a]\npath = 'x'\n[toolkit.a]\n", 3), ("a=1\na=2", 2)],
)
def test_broken_toml_is_told_with_file_and_line(file: Path, text: str, line: int) -> None:
    with pytest.raises(UsageError) as caught:
        load(file, text)
    assert str(file) in caught.value.message
    assert f"line {line}" in caught.value.message


def test_bytes_that_are_no_text_are_told_with_their_line(file: Path) -> None:
    file.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(UsageError, match=r"not UTF-8 \(at line 2\)"):
        load_config(file)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "9" * 10_000,
        f"[defaults]\ntime = 0x{'f' * 10_000}\n{ONE}",
        f"[defaults]\nmemory = 0x{'f' * 10_000}\n{ONE}",
        f"[defaults]\nqueue = 0x{'f' * 10_000}\n{ONE}",
        f"[defaults]\ntime = '{'9' * 10_000}h'\n{ONE}",
        f"[defaults]\nmemory = '{'9' * 10_000}'\n{ONE}",
        f"[defaults]\nmemory = '{'x' * 10_000}'\n{ONE}",
        f"[defaults]\nlifetime = '{'x' * 10_000}'\n{ONE}",
        f"[backend]\nws-path = '{'x' * 10_000}'\n{ONE}",
    ],
)
def test_absurd_values_are_refused_in_a_few_words(file: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(file, text)
    assert len(caught.value.render()) < 1_500


def test_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.toml", "ENOENT"), (tmp_path, "EISDIR")):
        with pytest.raises(UsageError) as caught:
            load_config(path)
        assert str(path) in caught.value.message
        assert caught.value.cause.startswith(reason)


def test_file_beyond_all_bounds_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="too large"):
        load(file, "#" * (MAX_CONFIG_BYTES + 1))


def test_names_in_the_file_cannot_move_the_cursor(file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(file, f'"a\\u001b[2J\\u202e\\u0085" = 1\n{ONE}')
    assert not set("\x1b\u202e\x85").intersection(caught.value.render())


_VALUES = st.recursive(
    st.one_of(
        st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.sampled_from(["", "1"])
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "data", "env", "time", "url", "a", "[key]", "toolkit"]), inner
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["backend", "defaults", "toolkit", "x"]), _VALUES))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_content_is_either_a_configuration_or_a_list_of_faults(
    content: dict[str, object],
) -> None:
    from atp_sandbox import _config_models as models

    found = models.validate(content)
    if isinstance(found, list):
        assert found
        assert all(where and what for where, what in found)


# The key


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.fields: dict[str, object] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(record.__dict__["event"])
        self.fields = record.__dict__["fields"]


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    logger = logging.getLogger("atp_sandbox")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.mark.parametrize("content", [SECRET, f"{SECRET}\n", f" \r\n{SECRET}\r\n\n"])
def test_key_is_read_without_the_space_around_it(
    tmp_path: Path, heard: Heard, content: str
) -> None:
    file = tmp_path / "key.txt"
    file.write_bytes(content.encode())
    file.chmod(0o600)
    assert read_api_key(file, io.StringIO()) == SECRET
    assert read_api_key(str(file), io.StringIO()) == SECRET
    assert read_api_key("-", io.StringIO(content)) == SECRET
    assert heard.events == []


def test_mark_that_an_editor_put_before_the_key_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text(SECRET, encoding="utf-8-sig")
    (tmp_path / "key.txt").chmod(0o600)
    assert read_api_key(tmp_path / "key.txt", io.StringIO()) == SECRET


def test_key_comes_through_a_pipe_as_a_shell_makes_it(tmp_path: Path, heard: Heard) -> None:
    os.mkfifo(tmp_path / "pipe", 0o644)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(SECRET,))
    writer.start()
    assert read_api_key(tmp_path / "pipe", io.StringIO()) == SECRET
    writer.join()
    assert heard.events == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_key_file_that_others_can_read_or_write_is_warned_of(
    tmp_path: Path, heard: Heard, mode: int
) -> None:
    file = tmp_path / "key.txt"
    file.write_text(SECRET)
    file.chmod(mode)
    assert read_api_key(file, io.StringIO()) == SECRET
    assert heard.events == ["api_key_file_open"]
    assert heard.fields == {"path": str(file), "mode": f"{mode:04o}"}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (f"{SECRET}\n{SECRET}".encode(), "more than one line"),
        (f"{SECRET}\u2028{SECRET}".encode(), "more than one line"),
        (f"{SECRET}\0".encode(), "control characters"),
        (f"{SECRET}\x1b[2J".encode(), "control characters"),
        (f"{SECRET}\u202e".encode(), "control characters"),
        (SECRET.encode() + b"\xff", "not UTF-8"),
        (SECRET.encode() * (MAX_KEY_CHARS // 4), "more than 4,096"),
    ],
)
def test_key_that_cannot_be_one_is_refused_without_showing_it(
    tmp_path: Path, content: bytes, cause: str
) -> None:
    file = tmp_path / "key.txt"
    file.write_bytes(content)
    file.chmod(0o600)
    piped = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    for source in (file, "-"):
        with pytest.raises(UsageError) as caught:
            read_api_key(source, piped)
        assert cause in caught.value.cause
        error: BaseException | None = caught.value
        while error is not None:
            assert SECRET not in repr(error) + repr(vars(error))
            assert not isinstance(error, UnicodeDecodeError)
            error = error.__context__


def test_key_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_api_key(tmp_path / "gone", io.StringIO(SECRET))
    assert str(tmp_path / "gone") in caught.value.message
    assert caught.value.cause.startswith("ENOENT")
