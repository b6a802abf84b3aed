"""Who works on a run: one process at a time, on one machine or on many that share its folder.

On one machine a lock of the kernel says so, which ends with its process. Between machines it may say nothing (NFS can be
mounted without locks), so that a process holds a lease besides: `lease-N` in the run's folder, with its host and process,
whose time it renews while it lives. A lease that nobody has renewed for LAPSE_SECONDS, or whose holder lay under the lock that
is free now, has ended. It is taken over by making `lease-N+1`, which only one process can do; whoever held the one before sees
that one before it writes again, and ends. All times are those of the file system, no clock of a host is asked.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import threading
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError, printable, shown
from utils.runs.folder import LEASE_PREFIX, LOCK
from utils.untrusted import open_regular

RENEWAL_SECONDS, LAPSE_SECONDS = 15.0, 120.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # which machine, since when


class Lease:
    """The right to write into the folder of a run. `Lease.take` gets it, `check` asks before each write, `release` ends it."""

    def __init__(self, folder: Path, number: int, lock: BinaryIO, *, token: str):
        self._folder, self._path, self._lock, self._token = folder, folder / f"{LEASE_PREFIX}{number}", lock, token
        self._next = folder / f"{LEASE_PREFIX}{number + 1}"
        self._released, self._process = threading.Event(), os.getpid()

    @classmethod
    def take(cls, folder: Path) -> "Lease":
        """Raises UserError if another process works on this run, or if the folder cannot be written."""
        lock, is_locked = _lock(folder)
        try:
            number, holder = _newest(folder)
            if holder is not None and not _has_ended(folder, number, holder, lock, is_locked=is_locked):
                raise _alive(folder, holder, may_lapse=True)
            lease = cls(folder, number + 1, lock, token=secrets.token_hex(8))
            lease._write(is_locked=is_locked)
        except BaseException:
            lock.close()
            raise
        _remove_until(folder, number)
        atexit.register(lease.release)
        threading.Thread(target=lease._renew, name="lease", daemon=True).start()
        return lease

    def _write(self, *, is_locked: bool) -> None:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token}
        holder |= {"boot": _boot(), "locked": is_locked}
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError as error:  # another process has taken it at this very moment
            raise _alive(self._folder, _read(self._path)) from error
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        with os.fdopen(handle, "w") as file:
            json.dump(holder, file)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):  # where it is gone, the next check says so
                os.utime(self._path, follow_symlinks=False)

    def check(self) -> None:
        """Raises UserError if another process has taken the run over, as when this one was suspended for minutes."""
        is_held = not self._next.exists() and _read(self._path).get("token") == self._token
        if not is_held and self._folder.is_dir():  # what has no folder any more cannot be written, and says that
            holder = _newest(self._folder)[1]
            by = f" by {_name(holder)}" if holder is not None else ""
            raise UserError(f"{self._folder}: unheard of for {LAPSE_SECONDS:g} s, this run was taken over{by}; this process ends")

    def release(self) -> None:
        """Lets the next process have the run at once. Nothing is left but the lock's empty file."""
        if not self._released.is_set() and os.getpid() == self._process:  # not that of a fork, which ends before
            self._released.set()
            atexit.unregister(self.release)
            if _read(self._path).get("token") == self._token:
                with contextlib.suppress(OSError):
                    self._path.unlink()
            self._lock.close()


def _lock(folder: Path) -> tuple[BinaryIO, bool]:
    """The lock's file, and whether it is locked: not where the file system has no locks.

    The lock is this process's alone: it ends with it, even where its DataLoader workers live on for a while.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # not through a link, and without emptying anything
        lock = os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"cannot lock {folder / LOCK}: {error.strerror}") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return lock, False
        lock.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _alive(folder, _newest(folder)[1]) from error
        raise UserError(f"cannot lock {folder / LOCK}: {error.strerror}") from error
    return lock, True


def _newest(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """The number of the latest lease, and what it says; 0 and None where there is none."""
    numbers = [int(found[1]) for path in folder.glob(f"{LEASE_PREFIX}*") if (found := _NUMBERED.fullmatch(path.name))]
    number = max(numbers, default=0)
    return number, _read(folder / f"{LEASE_PREFIX}{number}") if number else None


_NUMBERED = re.compile(rf"{LEASE_PREFIX}([1-9]\d{{0,199}})")


def _read(path: Path) -> dict[str, Any]:
    """What a lease says; nothing for one that is just being written or is gone."""
    try:
        with open_regular(path) as file:
            holder = json.loads(file.read(4096))
    except (OSError, UserError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _has_ended(folder: Path, number: int, holder: dict[str, Any], lock: BinaryIO, *, is_locked: bool) -> bool:
    # Here the lock is free, or cannot be had at all.
    if is_locked and holder.get("locked") is True and holder.get("boot") == _boot() != "":
        return True
    try:
        with open_regular(folder / f"{LEASE_PREFIX}{number}") as file:  # opening asks a server anew
            renewed = os.fstat(file.fileno()).st_mtime
        os.utime(lock.fileno())
        age = os.fstat(lock.fileno()).st_mtime - renewed
        if age < -LAPSE_SECONDS:  # of a clock that was ahead: from now on it lapses as others do, and a live holder renews it
            os.utime(folder / f"{LEASE_PREFIX}{number}", follow_symlinks=False)
        return age > LAPSE_SECONDS
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {error.strerror}") from error


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _remove_until(folder: Path, number: int) -> None:
    for path in folder.glob(f"{LEASE_PREFIX}*"):
        found = _NUMBERED.fullmatch(path.name)
        if found and int(found[1]) <= number:
            path.unlink(missing_ok=True)


def _alive(folder: Path, holder: dict[str, Any] | None, *, may_lapse: bool = False) -> UserError:
    where = f" ({_name(holder)})" if holder else ""
    way_out = f"; if that one is gone, the run is free {LAPSE_SECONDS:g} s after it was heard of last" if may_lapse else ""
    return UserError(f"--resume {folder}: this run is still alive in another process{where}{way_out}")


def _name(holder: dict[str, Any]) -> str:
    return printable(f"process {shown(holder.get('process'), 20)} on {holder.get('host')}", 100)
