"""What a run records of itself, so that its figures can be traced and made again."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "datasets", "sentence-transformers", "accelerate", "scikit-learn", "numpy")


def environment() -> dict[str, Any]:
    """Return versions, machine and the commit of this checkout (with `-dirty` if it was changed)."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "cpu": _cpu(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
        "code_commit": code_commit(),
    }


def _cpu() -> str:
    """Return the processor's name as its maker writes it, or what the system knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache  # the code that runs does not change while it runs, and git takes its time
def code_commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` if it was changed; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a checkout, or no git
        return None


def sha256(path: str | Path) -> str:
    """Return the hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(folder: str | Path) -> str | None:
    """Return the digest of the weights of a checkpoint folder, None for a Hub id or weights in several files."""
    weights = Path(folder, "model.safetensors")
    return sha256(weights) if weights.is_file() else None


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
