"""A lock that lets only one run at a time write into a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorafamily.errors import FileError, StateError

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Locks a folder until the end of a `with` block, or of the process, however that ends.

    Raises:
        StateError: another process has locked it.
        FileError: nothing can be written there.
    """

    def __init__(self, folder: Path | None):
        self._file: Any = None
        if folder is None or fcntl is None:
            return
        path = folder / "lock"
        while self._file is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = open(path, "a+")  # noqa: SIM115 - open as long as the lock is held
            except OSError as error:
                raise FileError(f"{folder}: a run cannot write there ({error})") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise StateError(
                    f"{folder}: another run is writing there (process {holder}); wait for it, or give another folder"
                ) from None
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                self._file = file
            else:  # its last holder removed it between our opening and locking
                file.close()
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            os.unlink(self._file.name)
            self._file.close()
            self._file = None
