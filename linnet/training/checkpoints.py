"""Which checkpoints are whole. A checkpoint is complete once its manifest exists and every file matches it.

The manifest (sizes and SHA-256 of all files) is written last and by rename, so a run killed while it saves leaves a
directory without one. Such a torn checkpoint is never loaded and never deleted: resuming renames it and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or the previous one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_manifest(checkpoint: Path) -> None:
    """Declare a checkpoint complete."""
    paths = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != MANIFEST]
    files = {p.relative_to(checkpoint).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}
    write_text(checkpoint / MANIFEST, json.dumps({"files": files}, indent=1))


def defect(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be used; None if it is complete."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to the end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories of a run, newest first, complete or not."""
    found = [(int(m[1]), p) for p in run.iterdir() if p.is_dir() and (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_complete(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest complete checkpoint of a run, and the newer ones that are torn with the reason of each."""
    torn = []
    for checkpoint in checkpoints(run):
        reason = defect(checkpoint)
        if reason is None:
            return checkpoint, torn
        torn.append((checkpoint, reason))
    return None, torn


def set_aside(checkpoint: Path) -> Path:
    """Rename a torn checkpoint to `torn-checkpoint-N`, so that the resumed run can write its own."""
    target, copy = checkpoint.with_name(f"torn-{checkpoint.name}"), 1
    while target.exists():
        copy += 1
        target = checkpoint.with_name(f"torn-{checkpoint.name}.{copy}")
    return checkpoint.rename(target)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints. Those without a manifest are left alone."""
    for checkpoint in [p for p in checkpoints(run) if (p / MANIFEST).exists()][keep:]:
        (checkpoint / MANIFEST).unlink()  # from here on it is torn, whatever happens to the deletion
        shutil.rmtree(checkpoint)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_blocks(file)


def _sha256_blocks(file) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
