"""Converted models on disk: each one an ordinary transformers folder that is either whole and verified, or rebuilt.

A folder is written beside its final place, listed in a manifest with the size and SHA-256 of every file, flushed to
the disk and then renamed, under a lock, so that a killed process, a full disk, a flipped bit or two processes that
start together can cost time but never yield a wrong model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[float, str], None]  # fraction done, what is being done
Advance = Callable[[float], None]  # fraction done

FORMAT = 1  # raise it whenever a converter writes something different
MANIFEST = "manifest.json"


class CacheError(OSError):
    """The cache folder cannot be written; the message names the folder, the space needed and the remedy."""


@dataclass(frozen=True)
class Recipe:
    """How one model folder is made: `convert(source(), target, advance)` fills the empty folder `target`."""

    name: str
    source: Callable[[], Path]
    origin: str  # SHA-256 of the source; a folder made from another one is rebuilt
    convert: Callable[[Path, Path, Advance], None]
    size: int  # bytes the finished folder takes, rounded up


def root() -> Path:
    """Folder of converted models: `ZQ_CACHE`, else `XDG_CACHE_HOME/zq_lib`, else where the platform keeps caches."""
    if chosen := os.environ.get("ZQ_CACHE"):
        return Path(chosen).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "zq_lib"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "zq_lib" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "zq_lib"
    return Path.home() / ".cache" / "zq_lib"


def place(recipe: Recipe) -> Path:
    """Where the folder of `recipe` lies once made. The format is in the name, so two versions do not fight."""
    return root() / f"{recipe.name}-{FORMAT}"


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder: Path, origin: str) -> bool:
    """Whether `folder` was made from `origin` and holds exactly the files of its manifest, byte for byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        present = {p.name for p in folder.iterdir() if not p.name.startswith(".")} - {MANIFEST}
        return (
            (manifest["format"], manifest["origin"]) == (FORMAT, origin)
            and present == set(files)
            and all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
            and all(sha256(folder / name) == entry["sha256"] for name, entry in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure(recipe: Recipe, progress: Progress) -> Path:
    """The verified folder of `recipe`, converted first if it is absent, incomplete or damaged.

    Raises `CacheError` when the cache cannot be written or has no room, and whatever `recipe.source` raises when the
    package with the original is not installed. Safe to call from several processes at once.
    """
    folder = place(recipe)
    if is_whole(folder, recipe.origin):
        return folder
    source = recipe.source()
    with _explained(recipe), _locked(folder.with_name(folder.name + ".lock")):
        if not is_whole(folder, recipe.origin):  # another process may have made it while this one waited
            _build(recipe, source, folder, progress)
    return folder


def _build(recipe: Recipe, source: Path, folder: Path, progress: Progress) -> None:
    draft = folder.with_name(folder.name + ".tmp")
    _remove(draft)  # left by a killed process: the lock is ours, so nobody is writing there
    _remove(folder)  # incomplete or damaged; its room may be needed
    if shutil.disk_usage(folder.parent).free < recipe.size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    task = f"converting {recipe.name} once into {folder} ({recipe.size / 1e6:.0f} MB)"
    progress(0.0, task)
    try:
        draft.mkdir()
        recipe.convert(source, draft, lambda fraction: progress(0.99 * fraction, task))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(draft.iterdir())}
        manifest = {"format": FORMAT, "origin": recipe.origin, "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for path in draft.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner only, which breaks a cache that is shared
            _flush(path)
        _flush(draft)
        os.replace(draft, folder)
        _flush(folder.parent)
    except BaseException:
        _remove(draft)
        raise
    progress(1.0, task)


@contextmanager
def _explained(recipe: Recipe) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence with the remedy."""
    try:
        yield
    except OSError as error:
        reason = {
            getattr(errno, "EDQUOT", None): "has no quota left for",
            errno.ENOSPC: "has no room for",
            errno.EACCES: "may not be written, but has to hold",
            errno.EPERM: "may not be written, but has to hold",
            errno.EROFS: "may not be written, but has to hold",
        }.get(error.errno)
        if reason is None:
            raise
        raise CacheError(
            f"the cache folder {root()} {reason} the converted {recipe.name} ({recipe.size:,} bytes): "
            "make room there or set ZQ_CACHE to another folder"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, waiting for it; the system releases it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError as error:  # LK_LOCK gives up after ten seconds
                    if error.errno != errno.EDEADLK:
                        raise
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if sys.platform == "win32":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force a file, or on POSIX a folder, onto the disk."""
    if path.is_dir():
        if os.name != "posix":
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
