"""The plan of a jail as data: what is in it, and above all what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.confinement.plan import (
    FIRST_SLOTS,
    HostView,
    JailSpec,
    ToolkitView,
    jail_environment,
    jail_plan,
    jail_processes,
    outermost,
    slot_count,
)
from atp_sandbox.isolation import Isolation, Level, Waivable
from atp_sandbox.jails.host import host_view
from atp_sandbox.limits import Limits
from atp_sandbox.scheduling.pool import MAX_AHEAD

HOST = HostView(
    read_only=("/usr/lib", "/usr/lib/python3", "/opt/site"),
    symlinks=(("/lib", "usr/lib"),),
    site_path=("/opt/site",),
    hidden=("/opt/site/atp_sandbox", "/elsewhere/workers"),
    msgpack_path="/opt/site",
    executable="/usr/bin/python3.11",
)
KIT = ToolkitView("/state/snapshot", "main.py", "", {"MODE": "test"})
SPEC = JailSpec(
    toolkit=KIT,
    limits=Limits(),
    isolation=Isolation(),
    forks_workers=True,
    may_start_programs=False,
    calls_per_worker=1,
    directory="/state/mount",
)
CONTAINER = replace(SPEC, isolation=Isolation(Level.CONTAINER), directory="/run/scratch-1")


def plan(spec: JailSpec = SPEC, *, outside_id: int | None = None, **given: Any) -> dict[str, Any]:
    return jail_plan(HOST, replace(spec, limits=Limits(**given)), outside_id=outside_id)


def test_a_plan_survives_json() -> None:
    assert json.loads(json.dumps(plan())) == plan()


def test_only_what_the_host_shows_and_the_snapshot_is_bound() -> None:
    assert plan()["root"]["binds"] == [
        {"source": "/opt/site", "target": "/opt/site"},
        {"source": "/usr/lib", "target": "/usr/lib"},
        {"source": "/state/snapshot", "target": "/toolkit"},
    ]


def test_our_own_code_is_masked_where_it_would_be_seen() -> None:
    assert plan()["root"]["masks"] == ["/opt/site/atp_sandbox"]


def test_the_environment_is_made_and_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_API_KEY", "SECRET")
    monkeypatch.setenv("ANYTHING", "SECRET")
    environment = jail_environment({"MODE": "test"}, "/scratch/0")
    assert "SECRET" not in repr(environment)
    assert environment["MODE"] == "test"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_the_toolkits_own_environment_wins() -> None:
    assert jail_environment({"HOME": "/elsewhere"}, "/s")["HOME"] == "/elsewhere"


@pytest.mark.parametrize("concurrency", [1, 2, 4, 100])
def test_there_is_a_slot_for_the_import_and_every_worker_that_the_pool_may_have(
    concurrency: int,
) -> None:
    limits = Limits(concurrency=concurrency)
    assert slot_count(limits) >= 1 + 2 * concurrency + MAX_AHEAD
    assert slot_count(limits, forks_workers=False) == FIRST_SLOTS


def test_each_limit_is_where_the_kernel_enforces_it() -> None:
    found = plan(open_files=17, processes=5, scratch_bytes=1000, scratch_files=9)
    assert (found["scratch"]["bytes"], found["scratch"]["files"]) == (1000, 9)
    rlimits = found["rlimits"]
    assert rlimits["fsize"] == 4000
    assert (rlimits["nofile"], rlimits["nproc"]) == (17, jail_processes(Limits(processes=5)))
    assert rlimits["msgqueue"] == rlimits["nice"] == rlimits["rtprio"] == 0
    assert rlimits["core"] == 1  # 0 would not keep a core dump from a program that takes it


def test_names_are_resolved_from_files_alone() -> None:
    files = {row["path"]: row["text"] for row in plan()["root"]["files"]}
    assert "dns" not in files["/etc/nsswitch.conf"]
    assert files["/etc/resolv.conf"] == ""
    assert "root" not in files["/etc/passwd"]


def test_outermost_drops_what_another_holds_and_keeps_like_names() -> None:
    assert outermost(["/a/b", "/a", "/a-b", "/a", "/ab/c"]) == ["/a", "/a-b", "/ab/c"]
    assert outermost(["/", "/a"]) == ["/"]


@given(st.lists(st.lists(st.sampled_from("ab-"), min_size=1, max_size=4).map("/".join)))
def test_outermost_covers_everything_and_nothing_twice(relative: list[str]) -> None:
    paths = [f"/{path}" for path in relative]
    kept = outermost(paths)
    for path in paths:
        assert sum(1 for k in kept if path == k or path.startswith(k + "/")) == 1


def test_this_machines_own_view_can_be_planned() -> None:
    host = host_view()
    assert all(path.startswith("/") for path in (*host.read_only, *host.hidden))
    assert any(path.endswith("/atp_sandbox") for path in host.hidden)
    forbidden = {"/", "/etc", "/home", "/root", "/proc", "/sys", "/dev", "/var", "/run", "/tmp"}
    assert not forbidden & set(host.read_only)
    for level in Level:
        json.dumps(jail_plan(host, replace(SPEC, isolation=Isolation(level)), outside_id=1))


# -- levels ----------------------------------------------------------------------------------------


def test_strict_plans_every_layer_and_says_nothing_of_where_the_snapshot_is() -> None:
    found = plan()
    assert found["is_confined"]
    assert found["landlock"] == {"abi": 1, "code": None, "scratch": "/scratch"}
    assert found["seccomp"] == {"base": "zygote", "sockets": True}
    assert found["toolkit_directory"] == "/toolkit"
    assert found["env"]["HOME"] == "/scratch/0"
    inside = {key: value for key, value in found.items() if key != "root"}
    assert "/state/snapshot" not in json.dumps(inside)


def test_a_waived_layer_is_not_planned_and_the_others_are() -> None:
    found = plan(replace(SPEC, isolation=Isolation(waived=frozenset({Waivable.LANDLOCK}))))
    assert found["landlock"] is None
    assert found["seccomp"] is not None
    assert found["root"] is not None
    found = plan(replace(SPEC, isolation=Isolation(waived=frozenset({Waivable.SECCOMP}))))
    assert found["seccomp"] is None
    assert found["landlock"] is not None
    assert found["root"] is not None


def test_container_plans_landlock_and_closed_sockets_in_place_of_namespaces() -> None:
    found = plan(CONTAINER)
    assert found["root"] is None
    assert found["is_confined"]
    assert found["seccomp"] == {"base": "zygote", "sockets": False}
    assert found["landlock"]["code"] == ["/opt/site", "/state/snapshot", "/usr/lib"]
    assert found["landlock"]["scratch"] == found["directory"] == "/run/scratch-1"
    assert found["toolkit_directory"] == "/state/snapshot"
    assert found["env"]["HOME"] == "/run/scratch-1/0"


def test_processes_of_a_user_are_limited_only_where_the_user_is_the_jails_own() -> None:
    assert "nproc" in plan()["rlimits"]
    assert "nproc" in plan(CONTAINER, outside_id=1_900_000_000)["rlimits"]
    assert "nproc" not in plan(CONTAINER)["rlimits"]


def test_none_plans_nothing() -> None:
    found = plan(replace(CONTAINER, isolation=Isolation(Level.NONE)))
    assert not found["is_confined"]
    assert (found["root"], found["landlock"], found["seccomp"]) == (None, None, None)
    assert found["rlimits"] == {}


def test_programs_are_in_reach_only_of_those_who_may_start_them() -> None:
    host = replace(HOST, programs=("/usr/bin",))
    for spec in (SPEC, CONTAINER):
        closed = json.dumps(jail_plan(host, spec, outside_id=None))
        may = replace(spec, forks_workers=False, may_start_programs=True)
        opened = jail_plan(host, may, outside_id=None)
        assert '/usr/bin"' not in closed
        assert '/usr/bin"' in json.dumps(opened)
        assert opened["seccomp"]["base"] == "subprocess"  # type: ignore[index]
