"""Folders that are whole or not there: written beside, flushed, then renamed; locked meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from neuronlens.atlas.manifest import FileInfo
from neuronlens.errors import AtlasError, OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def require_free(out: str | Path) -> None:
    """Refuse a folder that holds something or cannot be made.

    Raises:
        OutputError: If `out` exists and is not an empty folder, or its parent is not
            writable.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists already and would be overwritten. Choose another folder, or open what "
            "is there."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. Choose another folder."
        ) from error


def require_space(folder: Path, wanted: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OutputError: If fewer than `wanted` bytes are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OutputError(
            f"{what} needs {wanted / 1e9:,.2f} GB in {folder}, where {free / 1e9:,.2f} GB are "
            "free. Free some, or choose another folder."
        )


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that appears at `out` only when the block has ended well.

    Raises:
        OutputError: At the start, if `out` exists and is not empty, or cannot be made.
    """
    out = Path(out)
    require_free(out)
    try:
        working = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield working
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    working.chmod(0o755)
    put_in_place(working, out)


def put_in_place(working: Path, out: Path) -> None:
    """Rename a finished folder, which appears at `out` as a whole.

    Raises:
        OutputError: If something has been put there meanwhile; names where the result lies.
    """
    try:
        if out.exists():
            out.rmdir()
        working.rename(out)
        flush_names(out.parent)
    except OSError as error:
        raise OutputError(
            f"{out} has been taken in the meantime ({error.strerror}). What was made is whole and "
            f"lies in {working}; move it where you want it."
        ) from error


def flush_names(folder: Path) -> None:
    """Wait until the disk knows what a folder holds, where the system can tell."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def durable(path: Path, mode: str = "w") -> Iterator[IO[str]]:
    """A text file that is on the disk when the block ends."""
    with path.open(mode, encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and wait until they are on the disk.

    Raises:
        OSError: If they cannot be written.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def described(folder: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Size and hash of some of a folder's files."""
    return {
        name: FileInfo(bytes=(folder / name).stat().st_size, sha256=_sha256(folder / name))
        for name in names
    }


def check_files(folder: Path, files: Mapping[str, FileInfo], *, hashes: bool) -> None:
    """Compare files with what was written of them.

    Raises:
        AtlasError: If one is missing, of another size or, where asked, has another hash.
    """
    for name, info in files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != info.bytes:
            have = "missing" if size is None else f"{size} bytes long"
            raise AtlasError(
                f"{path} is {have}, not {info.bytes} bytes: the atlas is incomplete. "
                "Copy it again, or scan again."
            )
        if hashes and _sha256(path) != info.sha256:
            raise AtlasError(f"{path} is not what the scan wrote: its hash differs.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_held: set[Path] = set()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs away for the length of the block; ends with the process, however it ends.

    Args:
        path: The lock's file. It stays.

    Raises:
        OutputError: If another run holds it; names its process and machine.
    """
    path = path.resolve()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if path in _held:
        # Not even opened: a process loses its locks on a file that it closes anywhere.
        raise _is_taken(path, me)
    file = path.open("a+")
    with file:
        if not _take(file) or not _is_there(file, path):
            file.seek(0)
            raise _is_taken(path, file.read().strip() or "unknown")
        file.truncate(0)
        file.write(me)
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def _is_taken(path: Path, owner: str) -> OutputError:
    return OutputError(
        f"{path.parent} is being written by another run ({owner}). Wait for it, stop it, or choose "
        "another folder."
    )


def _take(file: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            # Of the process, not of the open file: worker processes that outlive it hold nothing.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether the file that was locked is still the one of that name."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
