"""Verdicts kept on disk: one SQLite file that processes share and that a killed process leaves whole.

In: a key (``endpoint.cache_key``) and a verdict. Out: the verdict for the key, or None. Failures are never kept.

>>> cache = VerdictCache(path, max_bytes=2**30)
>>> cache.put("5e1f", verdict); cache.get("5e1f") == verdict
True

SQLite's write-ahead log makes every write whole or absent, also under kill -9, and lets one process write while others
read. Each row has a checksum of its own, since SQLite has none. When the file grows beyond its bound, the tenth that
was unused for longest goes; when a row was last used is remembered and written with the next verdicts, so that reading
does not write. Nothing here stops a run: a file that is damaged is moved aside with a line on stderr and begun anew,
and where a file cannot be used at all, the judge is asked.

SQLite and not the diskcache library: that one stores pickles, which run code when a shared file is read, and writes at
every read where it evicts what was least recently used.
"""

import contextlib
import os
import pathlib
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping

from kardia_jax.judge.records import verdict_from_json, verdict_to_json
from kardia_jax.rewards.rubric import Verdict

BUSY_SECONDS = 2.0
"""How long another process's write is waited for."""
LOOK_EVERY = 256
"""Writes between two looks at the size of the file."""
SHARE_THAT_GOES = 0.1

Act = Callable[[sqlite3.Connection], sqlite3.Cursor]

_TABLE = """
create table if not exists verdicts (
  key text primary key, verdict text not null, checksum integer not null, used real not null
) without rowid;
create index if not exists by_use on verdicts (used);
"""


def cache_path(setting: str, environment: Mapping[str, str]) -> pathlib.Path | None:
    """The file that ``judge.cache.path`` means; None for off."""
    if setting == "off":
        return None
    home = pathlib.Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "kardia_jax" / "verdicts.sqlite" if setting == "auto" else pathlib.Path(setting).expanduser()


class VerdictCache:
    """Thread-safe; processes share the file by opening it each for itself."""

    def __init__(self, path: pathlib.Path, max_bytes: int):
        self.path, self._max_bytes = path, max_bytes
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        self._writes = 0
        self._warned = False
        self._connection = self._open_or_replace()

    def get(self, key: str) -> Verdict | None:
        """The verdict that was kept under this key."""
        with self._lock:
            row = self._guarded(lambda db: db.execute("select verdict, checksum from verdicts where key = ?", (key,)))
            if not row:
                return None
            text, checksum = row[0]
            verdict = _verified(text, checksum)
            if verdict is None:
                self._guarded(lambda db: db.execute("delete from verdicts where key = ?", (key,)))
                return None
            self._used[key] = time.time()
            if len(self._used) >= 100 * LOOK_EVERY:
                self._guarded(self._note_uses)
            return verdict

    def put(self, key: str, verdict: Verdict) -> None:
        """Keeps a verdict; the last one under a key stays."""
        text = verdict_to_json(verdict)
        row = (key, text, _checksum(text), time.time())
        with self._lock:
            self._guarded(lambda db: db.execute("insert or replace into verdicts values (?, ?, ?, ?)", row))
            self._writes += 1
            if self._writes % LOOK_EVERY == 0:
                self._guarded(self._note_uses)
                self._guarded(self._shrink)

    def close(self) -> None:
        """Writes what is remembered and closes the file."""
        with self._lock:
            self._guarded(self._note_uses)
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _note_uses(self, db: sqlite3.Connection) -> sqlite3.Cursor:
        used, self._used = self._used, {}
        with _transaction(db):
            return db.executemany("update verdicts set used = ? where key = ?", [(at, key) for key, at in used.items()])

    def _shrink(self, db: sqlite3.Connection) -> sqlite3.Cursor:
        """Deletes the rows unused for longest until what is left would fit; freed pages are used again."""
        with _transaction(db):
            while _bytes_in_use(db) > self._max_bytes:
                (rows,) = db.execute("select count(*) from verdicts").fetchone()
                if rows == 0:
                    break
                fewest = max(1, int(rows * SHARE_THAT_GOES))
                oldest = "select key from verdicts order by used limit ?"
                db.execute(f"delete from verdicts where key in ({oldest})", (fewest,))
        return db.execute("pragma wal_checkpoint(truncate)")

    def _guarded(self, act: Act) -> list[tuple]:
        """What the statement gives; nothing where the file is out of order, which is said once."""
        if self._connection is None:
            return []
        try:
            return act(self._connection).fetchall()
        except sqlite3.OperationalError as error:  # locked for too long, disk full, file system gone
            self._warn(f"{error}; the judge is asked instead")
            return []
        except sqlite3.DatabaseError as error:
            self._connection.close()
            self._move_aside(error)
            self._connection = self._open_or_replace()
            return []

    def _open_or_replace(self) -> sqlite3.Connection | None:
        for _ in range(2):
            try:
                return _opened(self.path)
            except sqlite3.OperationalError as error:
                self._warn(f"cannot be used ({error}); verdicts are not kept. Name a file in judge.cache.path")
                return None
            except sqlite3.DatabaseError as error:
                self._move_aside(error)
            except OSError as error:
                self._warn(f"cannot be used ({error}); verdicts are not kept. Name a file in judge.cache.path")
                return None
        return None

    def _move_aside(self, error: sqlite3.Error) -> None:
        kept = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        print(f"judge.cache.path: {self.path} is damaged ({error}); kept as {kept.name}, begun anew", file=sys.stderr)
        # Another process may have done it a moment ago.
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, kept)
        for suffix in ("-wal", "-shm"):
            pathlib.Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _warn(self, what: str) -> None:
        if not self._warned:
            print(f"judge.cache.path: {self.path}: {what}", file=sys.stderr)
        self._warned = True


def _opened(path: pathlib.Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        connection.executescript(_TABLE)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("begin immediate")
    try:
        yield
    except BaseException:
        db.execute("rollback")
        raise
    db.execute("commit")


def _bytes_in_use(db: sqlite3.Connection) -> int:
    names = ("page_count", "freelist_count", "page_size")
    pages, free, size = (db.execute(f"pragma {name}").fetchone()[0] for name in names)
    return (pages - free) * size


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def _verified(text: object, checksum: object) -> Verdict | None:
    """The verdict, or None for a row that is not as it was written."""
    if not isinstance(text, str) or _checksum(text) != checksum:
        return None
    try:
        return verdict_from_json(text)
    except ValueError:
        return None
