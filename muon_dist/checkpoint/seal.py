"""A folder that is whole or not there: written aside, checksummed, synced to the disk, and renamed last.

``manifest.json`` lists the size and the CRC-32 of every file and carries a checksum of itself, so a file that is cut,
damaged or taken from another checkpoint is found before any of it is used. The ranks share the work. CRC-32, because a
core computes it as fast as a disk reads, or faster; what it is for is damage, and no manifest stops who can write one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch.distributed as dist

from muon_dist.agreement import gathered, require_none

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
FORMAT_VERSION = 2
_BLOCK = 64 << 20  # bytes of one checksum: what a thread reads in one go
_READ_AT_ONCE = 256 << 10  # bytes, so that they are summed while they are in the core's cache
_THREADS = 8


def begin(folder: Path, group: dist.ProcessGroup | None) -> Path:
    """An empty folder beside ``folder``, for all ranks to write into.

    Raises:
        ValueError: ``folder`` exists; on every rank.
    """
    aside = folder.with_name(folder.name + UNFINISHED)
    problems = []
    if _index(group) == 0:
        if folder.exists():
            problems.append(f"{folder} exists already; save to a new folder, so that the old state is not lost")
        else:
            shutil.rmtree(aside, ignore_errors=True)  # of a job that was killed
            aside.mkdir(parents=True)
    require_none(problems, group, "nothing was saved")
    return aside


def finish(aside: Path, folder: Path, facts: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Turns what the ranks have written into ``aside`` into ``folder``, with ``facts`` (for JSON) in its manifest."""
    gathered(None, group)  # all have written
    paths = sorted(path for path in aside.rglob("*") if path.is_file())
    share = paths[_index(group) :: _size(group)]
    with ThreadPoolExecutor(1) as disk:  # is busy with the files while they are summed from memory
        synced = disk.map(_sync, share)
        described = {path.relative_to(aside).as_posix(): _describe(path) for path in share}
        list(synced)  # raises what went wrong
    files = {name: entry for part in gathered(described, group) for name, entry in part.items()}
    if _index(group) == 0:
        body = {"format": "muon_dist", "version": FORMAT_VERSION, "files": files, "facts": facts}
        (aside / MANIFEST).write_text(json.dumps({**body, "sha256": _digest_of(body)}))
        for path in (aside / MANIFEST, *(p for p in aside.rglob("*") if p.is_dir()), aside):
            _sync(path)
        aside.rename(folder)
        _sync(folder.parent)
    gathered(None, group)  # no rank goes on before the checkpoint is there


def is_finished(folder: Path) -> bool:
    """Whether a folder was written to its end. Damage that came afterwards is found by :func:`verify`."""
    return (folder / MANIFEST).exists() and folder.suffix != UNFINISHED


def verify(folder: Path, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The facts in the manifest, when every file is found to be what was written.

    Raises:
        ValueError: on every rank, naming the files and what is wrong with them.
    """
    body: dict[str, Any] = {"files": {}, "facts": {}}
    problems = []
    try:
        body = _read_manifest(folder)
    except ValueError as error:
        problems.append(str(error))
    names = sorted(body["files"])[_index(group) :: _size(group)]
    problems += [problem for name in names if (problem := _problem(folder, name, body["files"][name]))]
    require_none(problems, group, f"{folder} cannot be loaded; use an older checkpoint")
    facts: dict[str, Any] = body["facts"]
    return facts


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        if body.pop("sha256") != _digest_of(body):
            raise ValueError(f"{MANIFEST} is damaged: it has not the checksum that was written into it")
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}: no checkpoint, or one that was not finished") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error}") from None
    if (body["format"], body["version"]) != ("muon_dist", FORMAT_VERSION):
        raise ValueError(
            f"{MANIFEST} has version {body['version']} of the format {body['format']!r}, this is version "
            f"{FORMAT_VERSION} of 'muon_dist'; load it with the version of muon_dist that wrote it"
        )
    return dict(body)


def _problem(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} lies outside of the checkpoint"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size:,} bytes, {expected['bytes']:,} were written"
    try:
        found = _describe(path)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if found == expected else f"{name} is damaged: its CRC-32 is not that of what was written"


def _describe(path: Path) -> dict[str, Any]:
    """Size of a file, and checksums of its blocks."""
    size = path.stat().st_size
    with path.open("rb") as file, ThreadPoolExecutor(_THREADS) as threads:
        checksums = threads.map(partial(_checksum, file.fileno()), range(0, size, _BLOCK))
        return {"bytes": size, "crc32": list(checksums)}


def _checksum(descriptor: int, start: int) -> int:
    """CRC-32 of the block that starts there."""
    checksum, buffer = 0, memoryview(bytearray(_READ_AT_ONCE))
    offset, end = start, start + _BLOCK
    while offset < end and (count := os.preadv(descriptor, [buffer[: end - offset]], offset)):
        checksum = crc32(buffer[:count], checksum)
        offset += count
    return checksum


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Makes a file's contents, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()
