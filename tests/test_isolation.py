"""The level and what is waived: what can be asked for, and what is said about it."""

from __future__ import annotations

import pytest

from atp_sandbox.isolation import Isolation, Level, Waivable, parse_level, parse_waived

ALL = frozenset(Waivable)
CGROUP = frozenset({Waivable.CGROUP})


def test_strict_is_the_default_and_has_nothing_to_warn_of() -> None:
    usual = Isolation()
    assert usual.level is Level.STRICT
    assert str(usual) == "strict"
    assert usual.warnings() == []
    assert usual.has_namespaces
    assert usual.has_landlock
    assert usual.has_seccomp


def test_each_waived_layer_is_named_with_what_is_lost() -> None:
    waived = Isolation(waived=ALL)
    assert str(waived) == "strict without cgroup and landlock and seccomp"
    assert [line.split(":")[0] for line in waived.warnings()] == [
        "waived cgroup",
        "waived landlock",
        "waived seccomp",
    ]
    assert waived.has_namespaces
    assert (waived.has_landlock, waived.has_seccomp, waived.may_use_cgroups) == (False,) * 3


@pytest.mark.parametrize("level", [Level.CONTAINER, Level.NONE])
@pytest.mark.parametrize("layer", [Waivable.LANDLOCK, Waivable.SECCOMP])
def test_no_level_without_namespaces_can_do_without_its_last_layers(
    level: Level, layer: Waivable
) -> None:
    with pytest.raises(ValueError, match=f"{layer} cannot be waived at isolation {level}"):
        Isolation(level, frozenset({layer}))
    assert Isolation(level, CGROUP).waived == CGROUP


def test_weaker_levels_say_so_first() -> None:
    assert Isolation(Level.CONTAINER, CGROUP).warnings()[0].startswith("isolation container: no")
    assert Isolation(Level.NONE, CGROUP).warnings()[0].startswith("isolation NONE: ")


def test_only_a_root_supervisor_at_strict_must_have_control_groups() -> None:
    assert Isolation().requires_cgroups(is_root=True)
    assert not Isolation().requires_cgroups(is_root=False)
    assert not Isolation(Level.CONTAINER).requires_cgroups(is_root=True)
    assert not Isolation(waived=CGROUP).requires_cgroups(is_root=True)


def test_layers_are_told_as_they_are() -> None:
    assert Isolation().layers(7, 2) == [
        "namespaces",
        "a root directory of its own",
        "no capabilities",
        "resource limits",
        "Landlock (ABI 7)",
        "seccomp",
        "control groups (version 2)",
    ]
    assert Isolation(Level.NONE).layers(0, 0) == ["memory sampled every 20 ms"]


def test_what_is_no_level_or_layer_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="write strict, container or none"):
        parse_level("loose")
    with pytest.raises(ValueError, match="what can: cgroup, landlock, seccomp"):
        parse_waived(["cgroup", "namespaces"])
