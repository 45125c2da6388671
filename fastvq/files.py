"""Files and folders that appear whole or not at all, and folders with one writer.

A temporary has a random name, `.fastvq-RANDOM.tmp`, beside the file or folder that it becomes. It is created, never
opened if it exists; it is flushed to disk before it gets its final name, and its folder after that. While it is being
written it is locked, so that a later write in the same folder can tell the remains of a dead process, which it deletes,
from the work of a living one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from fastvq.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

StrPath: TypeAlias = "str | os.PathLike[str]"
"""A path as every public function takes one."""

_TEMPORARY = re.compile(r"\.fastvq-[0-9a-f]{16}\.tmp")
_LOCK = ".lock"
_CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems that have no locks, or can't flush a folder."""
_FAR = 1 << 30
"""Offset of the byte that Windows locks: others may read the bytes before it."""


@contextlib.contextmanager
def whole(path: StrPath) -> Iterator[BinaryIO]:
    """Yield a new file, open for writing, that replaces `path` when the block ends without an error.

    Until then, and after a kill, `path` is as it was before. Missing parent folders are created. The permissions are
    those that the umask gives to new files. A symbolic link is replaced, not followed: its target stays as it is.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileExistsError: `path` is neither a file nor a link to one, but a device or pipe.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is not a file that could be replaced")
    make_folder(path.parent)
    delete_abandoned(path.parent)
    temporary, descriptor = _create_file(path.parent)
    try:
        with open(temporary, "w+b", opener=lambda *_: descriptor) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                # Renamed while it is locked, so that nobody takes it for abandoned. Windows renames no open file.
                os.replace(temporary, path)
        if fcntl is None:
            os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_whole(path: StrPath, content: str | bytes) -> None:
    """Write a file as a whole; text is encoded as UTF-8."""
    with whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(folder: StrPath) -> Iterator[Path]:
    """Yield a new folder that becomes `folder` when the block ends without an error.

    Missing parent folders are created.

    Raises:
        FileExistsError: `folder` exists, at the beginning or at the end.
    """
    folder = Path(folder)
    check_new(folder)
    make_folder(folder.parent)
    delete_abandoned(folder.parent)
    temporary, descriptor = _create_folder(folder.parent)
    try:
        yield temporary
        _flush_tree(temporary)
        _rename_to_new(temporary, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def check_new(folder: StrPath) -> None:
    """Raise a FileExistsError if `folder` exists."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists: choose another folder")


def make_folder(folder: StrPath) -> None:
    """Create a folder and its missing parents, and flush their names to disk."""
    folder, missing = Path(folder), []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        flush_folder(new.parent)


def delete_folder(folder: StrPath) -> None:
    """Delete a folder; rename it first, so that a half-deleted one is never found under its name."""
    hidden = Path(folder).with_name(_temporary_name())
    os.rename(folder, hidden)
    # Whoever writes beside it may delete it at the same time.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(hidden)


def flush_folder(folder: StrPath) -> None:
    """Flush the names in a folder to disk, where the system can: Windows can't, nor some network file systems."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


@dataclass
class _Held:
    """A folder that this process may write to: by which thread, and how often it has entered."""

    process: int
    thread: int
    entered: int
    descriptor: int


_held: dict[str, _Held] = {}
_held_guard = threading.Lock()


@contextlib.contextmanager
def exclusive(folder: StrPath) -> Iterator[None]:
    """Hold the right to write to a folder, which is created if it is missing.

    The right is a lock of the operating system on `FOLDER/.lock`: it ends with the block and with the process, however
    the process ends. A thread that holds it may enter again. On a file system without locks a warning says so.

    Raises:
        CheckpointError: another process or thread holds it; the message names the folder and the process.
    """
    folder = Path(folder)
    make_folder(folder)
    name, thread = os.path.realpath(folder), threading.get_ident()
    with _held_guard:
        held = _held.get(name)
        if held is None or held.process != os.getpid():
            held = _held[name] = _Held(os.getpid(), thread, 0, _open_lock(folder))
        elif held.thread != thread:
            raise CheckpointError(_in_use(folder, "another thread of this process"))
        held.entered += 1
    try:
        yield
    finally:
        with _held_guard:
            held.entered -= 1
            if not held.entered:
                if _held.get(name) is held:
                    del _held[name]
                os.close(held.descriptor)


def lock_of(folder: StrPath) -> Path:
    """Return the file that `exclusive` locks; it stays there."""
    return Path(folder) / _LOCK


def _open_lock(folder: Path) -> int:
    """Return the descriptor of the folder's lock file, locked."""
    flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(lock_of(folder), flags, 0o666)
    try:
        locked = _lock(descriptor)
        if locked is None:
            warnings.warn(f"{folder}: no locks on this file system; let no other process write there", stacklevel=4)
        elif not locked:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise CheckpointError(_in_use(folder, holder or "another process"))
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _in_use(folder: Path, holder: str) -> str:
    return f"{folder} is being written by {holder}: wait until it ends, or choose another folder"


def _lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed; return whether nobody else has, or None if the file system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            os.lseek(descriptor, 0, os.SEEK_SET)
            return False
        raise
    return True


def _temporary_name() -> str:
    return f".fastvq-{secrets.token_hex(8)}.tmp"


def _create_file(folder: Path) -> tuple[Path, int]:
    """Create a temporary file in a folder; return its path and its descriptor, locked."""
    while True:
        path = folder / _temporary_name()
        descriptor = os.open(path, _CREATE, 0o666)
        if _own(path, descriptor):
            return path, descriptor


def _create_folder(parent: Path) -> tuple[Path, int | None]:
    """Create a temporary folder in another; return its path and its descriptor, locked, or None on Windows."""
    while True:
        path = parent / _temporary_name()
        os.mkdir(path)
        if os.name == "nt":
            return path, None
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _own(path, descriptor):
                return path, descriptor


def _own(path: Path, descriptor: int) -> bool:
    """Lock a new temporary; close it and return False if it was taken for abandoned and deleted before."""
    if fcntl is None:
        return True
    try:
        if _lock(descriptor) is not False and os.path.lexists(path):
            return True
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return False


def delete_abandoned(folder: StrPath) -> None:
    """Delete the temporaries that dead processes left in a folder; a living process has locked its own."""
    if fcntl is None:
        return
    with contextlib.suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError):
                    _delete_if_abandoned(Path(entry))


def _delete_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(descriptor):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        os.close(descriptor)


def _rename_to_new(temporary: Path, folder: Path) -> None:
    check_new(folder)
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another one may have created it since.
        check_new(folder)
        raise


def _flush_tree(folder: Path) -> None:
    """Flush all files and folders in a folder to disk, and the folder itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            # Windows flushes only what is open for writing.
            descriptor = os.open(Path(root) / name, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        flush_folder(Path(root))
