"""Toolkits that are hostile while they are imported, served together beside one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .harness import ARM, MAX_LOG_LINE_CHARS, Case, Session, Verdict, Watch, outcomes_of, shorten

SAMPLED = "M16"
"""Misbehaves in a sample call only, so it is served where such calls are made."""


class ImportSession(Session):
    """One supervisor with every import toolkit; `good` comes first, so its names are its own."""

    def __init__(self, folder: Path, cases: list[Case], **settings: Any) -> None:
        names = [case.file.removeprefix("toolkit_").removesuffix(".py") for case in cases]
        super().__init__(folder, names, time="3s", **settings)

    def failure_of(self, name: str) -> dict[str, Any] | None:
        """The log's line that says why that toolkit is not served."""
        return next(
            (
                e
                for e in self.supervisor.events()
                if e.get("event") == "toolkit_failed" and e.get("toolkit") == name
            ),
            None,
        )

    def judge_import(self, case: Case) -> Verdict:
        verdict = Verdict(case.id)
        name = case.file.removeprefix("toolkit_").removesuffix(".py")
        failure = self.failure_of(name)
        with Watch(self, case, verdict) as watch:
            if failure is not None:
                got = {"error"}
                shown = shorten(str(failure.get("message")))
                if len(json.dumps(failure)) > MAX_LOG_LINE_CHARS:
                    verdict.problem("O11", "its failure fills the log")
                if not failure.get("message"):
                    verdict.problem("O11", "its failure has no reason")
            else:
                call = self.call(f"{name}_tool", {"value": 1})
                watch.calls.append(call)
                got, void = outcomes_of(call.result)
                shown = shorten(call.result)
                if void:
                    verdict.problem("answer", f"{void}: {shown}")
            verdict.answers.append(f"{'/'.join(sorted(got))}: {shown}")
            if not got & {case.expected, *case.also_ok}:
                verdict.problem("answer", f"{'/'.join(sorted(got))}: {shown}")
            others = self.call("ok_echo", {"arm": ARM, "value": case.id}, "B")
            if outcomes_of(others.result)[0] != {"ok"} or others.result["value"] != case.id:
                verdict.problem("O3", f"another toolkit: {shorten(others.result)}")
        return verdict
