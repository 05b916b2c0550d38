"""Where one `up` keeps its logs and the data of its Redis."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

BASE = Path(".muxserve")


class DirectoryInUse(Exception):
    """Another `up` runs there."""


class RunDirectory:
    """A directory that one running `up` owns, with `logs/` and, while it runs, `redis/`."""

    def __init__(self, path: Path | None) -> None:
        """Make it: `path`, or a new `.muxserve/run-TIME` that `.muxserve/latest` then points to.

        Raises DirectoryInUse, OSError.
        """
        self.path = (path or _new_run()).absolute()
        self.logs = self.path / "logs"
        self.redis = self.path / "redis"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise DirectoryInUse(f"another `muxserve up` runs in {self.path}") from error
        # What an earlier run left is of no use: the clients of its requests are gone.
        shutil.rmtree(self.redis, ignore_errors=True)
        self.redis.mkdir(mode=0o700)
        for log in self.logs.glob("*.log"):
            log.unlink()

    def close(self) -> None:
        """Delete Redis' data, which holds prompts; the logs stay."""
        shutil.rmtree(self.redis, ignore_errors=True)
        (self.path / "lock").unlink(missing_ok=True)
        self._lock.close()


def _new_run() -> Path:
    name = f"run-{datetime.now():%Y%m%d-%H%M%S}"
    path = BASE / name
    if path.exists():
        path = BASE / f"{name}-{os.getpid()}"
    path.mkdir(parents=True)
    link = BASE / f"latest-{os.getpid()}"
    link.symlink_to(path.name)
    link.replace(BASE / "latest")
    return path


def write_atomically(file: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON so that readers see all of it or nothing."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
