"""The plan of a jail as data: what is in it, and above all what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.confinement.plan import (
    HostView,
    ToolkitView,
    jail_environment,
    jail_plan,
    jail_processes,
    outermost,
    slot_count,
)
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
KIT = ToolkitView("/state/snapshot", "main.py", "", ("/toolkit",), {"MODE": "test"})


def plan(**given: Any) -> dict[str, Any]:
    limits = Limits(**given)
    return jail_plan(
        HOST, KIT, limits, outside_id=None, mountpoint="/state/mount", calls_per_worker=1
    )


def test_a_plan_survives_json() -> None:
    assert json.loads(json.dumps(plan())) == plan()


def test_only_what_the_host_shows_and_the_snapshot_is_bound() -> None:
    assert plan()["binds"] == [
        {"source": "/opt/site", "target": "/opt/site"},
        {"source": "/usr/lib", "target": "/usr/lib"},
        {"source": "/state/snapshot", "target": "/toolkit"},
    ]


def test_our_own_code_is_masked_where_it_would_be_seen() -> None:
    assert plan()["masks"] == ["/opt/site/atp_sandbox"]


def test_the_environment_is_made_and_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_API_KEY", "SECRET")
    monkeypatch.setenv("ANYTHING", "SECRET")
    environment = jail_environment({"MODE": "test"})
    assert "SECRET" not in repr(environment)
    assert environment["MODE"] == "test"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_the_toolkits_own_environment_wins() -> None:
    assert jail_environment({"HOME": "/elsewhere"})["HOME"] == "/elsewhere"


@pytest.mark.parametrize("concurrency", [1, 2, 4, 100])
def test_there_is_a_slot_for_the_import_and_every_worker_that_the_pool_may_have(
    concurrency: int,
) -> None:
    limits = Limits(concurrency=concurrency)
    assert slot_count(limits) >= 1 + 2 * concurrency + MAX_AHEAD
    directories = plan(concurrency=concurrency)["directories"]
    assert sum(1 for path in directories if path.startswith("/scratch/")) == slot_count(limits)


def test_each_limit_is_where_the_kernel_enforces_it() -> None:
    found = plan(open_files=17, processes=5, scratch_bytes=1000, scratch_files=9)
    assert (found["scratch_bytes"], found["scratch_files"]) == (1000, 9)
    rlimits = found["rlimits"]
    assert rlimits["fsize"] == 4000
    assert (rlimits["nofile"], rlimits["nproc"]) == (17, jail_processes(Limits(processes=5)))
    assert rlimits["msgqueue"] == rlimits["nice"] == rlimits["rtprio"] == 0
    assert rlimits["core"] == 1  # 0 would not keep a core dump from a program that takes it


def test_names_are_resolved_from_files_alone() -> None:
    files = {row["path"]: row["text"] for row in plan()["files"]}
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
    kit = replace(KIT, env={})
    json.dumps(jail_plan(host, kit, Limits(), outside_id=1, mountpoint="/m", calls_per_worker=1))
