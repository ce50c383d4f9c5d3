"""What a run was computed with: versions, hardware, and the commit of the source."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """What this process computes with: ``versions``, ``hardware`` and ``commit``."""
    return {"versions": versions(), "hardware": hardware(device), "commit": commit()}


def versions() -> dict[str, str]:
    """Versions of Python, torch and chtconv."""
    # Plain text, which a checkpoint may hold.
    return {"python": platform.python_version(), "torch": str(torch.__version__), "chtconv": package_version()}


def package_version() -> str:
    """The version of the installed package, "unknown" where it runs from a plain folder."""
    try:
        return metadata.version("chtconv")
    except metadata.PackageNotFoundError:
        return "unknown"


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, its instruction set as torch uses it, threads in use, and the device by name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"cpu": _processor(), "instructions": instructions, "threads": torch.get_num_threads(), "device": name}


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that this file is tracked in, and whether it was changed since; None elsewhere."""
    source = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's checkout: only a tracked file speaks for its commit.
    if _git(source, "ls-files", "--error-unmatch", source.name) is None:
        return None
    revision, changes = _git(source, "rev-parse", "HEAD"), _git(source, "status", "--porcelain", "-uno")
    return None if revision is None else {"revision": revision, "dirty": bool(changes)}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(source: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(source.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
