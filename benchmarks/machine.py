"""What every recorded row says of where, when and with what it was measured."""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Time (UTC), commit (with ``-dirty`` where code was changed), hardware, threads, versions."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()
    return {
        "run": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device.type,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def results_file(folder: Path, machine: Mapping[str, Any]) -> Path:
    """``<hardware>[-<threads>-threads].jsonl``."""
    kind = machine["hardware"]
    if machine["device"] == "cpu":
        kind += f" {machine['threads']} threads"
    return folder / (re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".jsonl")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "sslkit", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown: no git repository here")


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("torch", "triton", "timm", "lightly", "birder"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions
