"""gpu-report.json: every result is in it as soon as there is one, and a second run goes on from there."""

import hashlib
import json
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_stages import STAGES
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import write_atomically

VERSION = 1


class Report:
    """The results of some runs of the check on one machine.

    A stage has the checks that it plans and, for each that was begun, its status (running, ok, failed or skipped), why
    it failed or was skipped, its seconds, its figures, its date, the run that it belongs to, and a digest of the code.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self.content = path, content

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any], tiny: bool) -> "Report":
        """The report at a path, or a new one. Raises DataError for a report of another machine, and for other files."""
        new = {"version": VERSION, "machine": machine, "tiny": tiny, "stages": {}}
        if not path.exists():
            return cls(path, new)
        report = cls.read(path)
        found = [f"tiny: {report.content['tiny']}"] if report.content["tiny"] != tiny else []
        found += _differences(report.content["machine"], machine)
        if found:
            raise DataError(
                f"{path}: expected a report of this machine and these options, found another: {'; '.join(found)}; "
                "name another file with --out"
            )
        report.content["machine"] = machine
        return report

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Raises DataError when there is none, or something else."""
        try:
            content = json.loads(path.read_bytes())
            whole = _is_report(content)
        except (OSError, ValueError, RecursionError):
            content, whole = {}, False
        if not whole:
            raise DataError(
                f"{path}: expected a report of benchmarks/gpu_check.py, found none or something else; name another file"
            )
        return cls(path, content)

    def save(self) -> None:
        """What does not get onto the disk now comes with the next result: a full disk is not worth the rest of the
        check."""
        text = json.dumps(self.content, indent=1, default=float)  # numpy's numbers
        try:
            write_atomically(self._path, f"{text}\n".encode())
        except OSError as error:
            print(f"gpu-check: {self._path}: not written ({error}); make room", flush=True)

    def plan(self, stage: str, names: list[str]) -> None:
        """What a stage consists of now; results of checks that are no longer among it are forgotten."""
        found = self._stage(stage)
        found["planned"] = names
        found["checks"] = {name: check for name, check in found["checks"].items() if name in names}
        self.save()

    def planned(self, stage: str) -> list[str]:
        return self._stage(stage)["planned"]

    def checks(self, stage: str) -> dict[str, dict[str, Any]]:
        return self._stage(stage)["checks"]

    def begun(self, stage: str, run: str) -> int:
        """How many checks of a stage a run has begun."""
        return sum(check["run"] == run for check in self.checks(stage).values())

    def pending(self, stage: str, run: str) -> list[str]:
        """What is neither ok nor was begun in this run: first what was never begun, then what failed or was skipped."""
        checks = self.checks(stage)
        left = [name for name in self.planned(stage) if checks.get(name, {}).get("status") != "ok"]
        left = [name for name in left if checks.get(name, {}).get("run") != run]
        return sorted(left, key=lambda name: name in checks)

    def record(self, stage: str, check: str, status: str, **more: Any) -> None:
        """Replace what is known of a check."""
        self.checks(stage)[check] = {"status": status, "date": date.today().isoformat(), "code": code_digest()} | more
        self.save()
        if status != "running":
            print(f"{stage:9} {check:44} {status:8} {more['seconds']:7.1f} s  {more['why']}", flush=True)

    def close(self, stage: str, why: str, run: str | None = None) -> None:
        """What a process left at work, in this run (None: in any), has failed."""
        for name, check in list(self.checks(stage).items()):
            if check["status"] == "running" and run in (None, check["run"]):
                seconds = round(time.time() - check["started"], 2)
                late = f"took more than {check['limit']:g} s (where it was is in the output)"
                reason = late if run and seconds >= check["limit"] else why
                self.record(stage, name, "failed", why=reason, run=check["run"], seconds=seconds, figures={})

    def conclude(self, stage: str, why: str = "") -> str:
        """Give a stage its status, from its checks; `why` is for one whose process could not begin."""
        checks, planned = self.checks(stage), self.planned(stage)
        counted = {status: [n for n, c in checks.items() if c["status"] == status] for status in ("failed", "skipped")}
        missing = [name for name in planned if name not in checks]
        reasons = [why] if why else []
        if counted["failed"]:
            reasons.append(f"failed: {', '.join(counted['failed'])}")
        if missing:
            reasons.append(f"not reached: {', '.join(missing)}; run again to go on")
        if reasons:
            status = "failed"
        else:
            status = "skipped" if counted["skipped"] == planned else "ok"
            reasons = [f"skipped: {', '.join(counted['skipped'])}"] if counted["skipped"] else []
        self._stage(stage).update(status=status, why="; ".join(reasons))
        self.save()
        return status

    def _stage(self, stage: str) -> dict[str, Any]:
        assert stage in STAGES, stage
        return self.content["stages"].setdefault(stage, {"status": "", "why": "", "planned": [], "checks": {}})


def code_digest() -> str:
    """Of all Python files that a figure can depend on, wherever they are installed."""
    folders = {"benchmarks": Path(__file__).parents[1]}
    for name in ("pipeline", "teachers", "trainer"):
        spec = find_spec(f"softshard.{name}")
        assert spec is not None
        assert spec.origin is not None
        folders[name] = Path(spec.origin).parent
    state = hashlib.blake2b(digest_size=8)
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            state.update(f"{name}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return state.hexdigest()


def _is_report(content: Any) -> bool:
    """Whether it has the shape of a report: all that is looked at without being looked for."""
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("tiny"), bool):
        return False
    machine, stages = content.get("machine"), content.get("stages")
    if not isinstance(machine, dict) or not isinstance(stages, dict) or not stages.keys() <= set(STAGES):
        return False
    return all(_is_stage(stage) for stage in stages.values())


def _is_stage(stage: Any) -> bool:
    if not isinstance(stage, dict) or not isinstance(stage.get("planned"), list):
        return False
    checks = stage.get("checks")
    if not isinstance(checks, dict) or not all(isinstance(name, str) for name in stage["planned"]):
        return False
    kinds = {"status": str, "why": str, "date": str, "code": str, "run": str, "figures": dict}
    working = kinds | {"started": float, "limit": float}
    for check in checks.values():
        wanted = working if isinstance(check, dict) and check.get("status") == "running" else kinds
        if not isinstance(check, dict) or not all(isinstance(check.get(key), kind) for key, kind in wanted.items()):
            return False
    return True


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is not the same. A package that was installed or removed since is no difference, nor a driver that did not
    say its version once."""
    return [
        f"{key}: {found.get(key)!r} instead of {wanted[key]!r}"
        for key in wanted
        if found.get(key) != wanted[key] and None not in (found.get(key), wanted[key])
    ]
