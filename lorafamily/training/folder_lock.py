"""A lock that lets only one run at a time write into a folder."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from lorafamily.errors import FileError, StateError

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]


class FolderLock(ExitStack):
    """Locks a folder until the end of a `with` block, or of the process, however that ends. Raises StateError if
    another process has locked it, FileError if nothing can be written there."""

    def __init__(self, folder: Path | None):
        super().__init__()
        if folder is None or fcntl is None:
            return
        path = folder / "lock"
        while True:
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
                break
            file.close()  # its last holder removed it between our opening and locking
        self.enter_context(file)
        self.callback(path.unlink)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
