"""What gpu.py has found so far, on disk after every row; and how it is shown."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """The result so far, on disk after every row."""

    path: Path
    deadline: float  # of time.monotonic
    content: dict[str, Any] = field(default_factory=dict)
    context_bytes: int = 0  # what the driver takes of the card
    kept: dict[str, Any] = field(default_factory=dict)  # steps of a run that was cut off

    def resume(self) -> None:
        """Take over what an earlier run of the same question left in the file, if it did."""
        try:
            earlier = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return
        if all(earlier.get(key) == value for key, value in self.content.items() if key != "steps"):
            before, last = earlier.get("earlier", {}), earlier.get("steps", {})
            for name in {**before, **last}:
                steps = [kept[name] for kept in (before, last) if name in kept]
                rows = [row for step in steps for row in step["rows"]]
                done = next((step for step in steps if step["status"] == "done"), None)
                self.kept[name] = done or {**steps[-1], "rows": rows}

    def kept_row(self, name: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Return an earlier run's row of a step that was done as ``asked``; None: there is none."""
        for row in self.kept.get(name, {}).get("rows", []):
            if row.get("status") == "done" and all(row.get(key) == value for key, value in asked.items()):
                return {**row, "from_earlier_run": True}
        return None

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        partial = self.path.with_suffix(".part")
        content = {**self.content, "earlier": self.kept} if self.kept else self.content
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)

    def end(self) -> None:
        """Forget what an earlier run had: it has been taken over."""
        self.kept = {}
        self.write()

    def not_run(self, name: str, reason: str) -> None:
        self.content["steps"][name] = {"status": f"not run: {reason}", "rows": []}
        self.write()

    def step(
        self,
        name: str,
        rows: Callable[[], Iterator[dict[str, Any]]],
        needs_s: float = 0.0,
        *,
        once: bool = False,
    ) -> None:
        """Run a step and keep its rows; a failure is part of the result and stops no other step.

        Args:
            once: an earlier run's rows will do.
        """
        if once and self.kept.get(name, {}).get("status") == "done":
            self.content["steps"][name] = {**self.kept[name], "from_earlier_run": True}
            print(f"[{name}] done by an earlier run", flush=True)
            return self.write()
        step: dict[str, Any] = {"status": "running", "rows": []}
        self.content["steps"][name] = step
        started = time.monotonic()
        if self.left_s() < needs_s:
            step["status"] = f"not run: {self.left_s():.0f} s left, wants {needs_s:.0f}"
        else:
            try:
                for row in rows():
                    step["rows"].append(row)
                    show(name, row)
                    self.write()
                step["status"] = "done"
            except NotRun as reason:
                step["status"] = f"not run: {reason}"
            except Exception as error:
                step["status"] = f"failed: {type(error).__name__}: {error}"
        step["seconds"] = round(time.monotonic() - started, 2)
        print(f"[{name}] {step['status']} ({step['seconds']} s)", flush=True)
        self.write()


class NotRun(Exception):
    """Why a step has nothing to say here."""


def show(name: str, row: dict[str, Any]) -> None:
    shown = {key: value for key, value in row.items() if key != "also"}
    for phase in shown.keys() & {"cold", "warm", "topic_change", "prefill"}:
        joules = [value for key, value in row[phase].items() if key.endswith("joules_per_token") and value]
        shown[phase] = f"{row[phase]['tokens_per_s']:.4g} tok/s" + "".join(f" {j:.3g} J/tok" for j in joules)
    line = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
    print(f"  {name}: {line}", flush=True)


def give_up(report: Report, reason: str) -> None:
    """Mark what follows as not run and exit."""
    for name in (
        "bits",
        "ceilings",
        "link",
        "kernels",
        "code",
        "tests",
        "model",
        "runs",
        "dense",
        "laptop",
        "modelled",
        "sanitizer",
        "llama.cpp",
    ):
        report.not_run(name, reason)
    print(reason, file=sys.stderr)
    sys.exit(1)


def phases_of(output: str) -> dict[str, Any]:
    """Return what a run had said when it ended, or was ended."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            said = json.loads(line)
            found[said.pop("phase", "also")] = said
    return found


PHASES = ("cold", "warm", "topic_change")


def medians(content: dict[str, Any]) -> dict[tuple[int, str], dict[str, float]]:
    """Return tokens per second by share, method and phase: of rounds the median."""
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for row in content["steps"].get("runs", {}).get("rows", []):
        of_all = found.setdefault((row["vram_percent"], row["method"]), {phase: [] for phase in PHASES})
        for phase in PHASES:
            of_all[phase] += [row[phase]["tokens_per_s"]] if phase in row else []
    return {
        key: {phase: statistics.median(values) for phase, values in phases.items() if values}
        for key, phases in found.items()
    }


def table(content: dict[str, Any]) -> list[str]:
    """Return lines of tokens per second, cold / warm / after a change of topic, and their label."""
    found = medians(content)
    if not found:
        return []
    rounds = max(row.get("round", 0) for row in content["steps"]["runs"]["rows"]) + 1
    lines = [f"tok/s, cold / warm / after a change of topic, {content['label']}, medians of {rounds}:"]
    for (share, method), phases in sorted(found.items()):
        speeds = " / ".join(f"{phases[phase]:.4g}" if phase in phases else "not run" for phase in PHASES)
        lines.append(f"  {share}% {method}: {speeds}")
    return lines


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """Return the last line: what each step came to, and the speeds at 25%."""
    rows = content["steps"].get("runs", {}).get("rows", [])
    at_25 = {row["method"]: row["status"] for row in rows if row["vram_percent"] == 25}
    for (share, method), phases in medians(content).items():
        at_25 |= {method: phases["warm"]} if share == 25 and "warm" in phases else {}
    energies = [row["also"]["energy"] for row in rows if "energy" in row.get("also", {})]
    digests = {row[phase]["digest"] for row in rows for phase in ("cold",) if phase in row}
    statuses = {name: step["status"] for name, step in content["steps"].items()}
    kept = {key: content[key] for key in ("bench", "label", "device", "commit")}
    return {
        **kept,
        "steps": statuses,
        "same_logits": len(digests) <= 1,
        "warm_tokens_per_s_at_25_percent": at_25,
        "energy": energies[-1] if energies else "no energy: no run said",
    }
