"""The request log: requests, predictions and labels in one SQLite file.

An acknowledged label is on the disk: the file is in WAL mode with synchronous=FULL, so a commit returns after the WAL
is flushed. Several processes may read and label while one serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tuneforge.errors import DataError, FolderError, TryAgainError, UnknownNameError, UsageError
from tuneforge_serve.feedback.schemas import LabeledRequest as LabeledRequest
from tuneforge_serve.feedback.schemas import LabelRecord as LabelRecord
from tuneforge_serve.feedback.schemas import LoggedRequest as LoggedRequest
from tuneforge_serve.feedback.schemas import RequestLogStats as RequestLogStats

Side = Literal["train", "held-out"]

HELD_OUT_FRACTION = 0.2
"""The fraction of the inputs that is held out for the gate by default."""

MAX_CLASS_NAME_LENGTH = 100
"""The most characters of a class name."""

_VERSION = 1
_EVICTION_BATCH_SIZE = 32
_MAX_BODY_FRACTION = 0.1  # of `max_bytes`, for one request
_WAL_BYTES = 4 * 2**20
_SCHEMA = """
CREATE TABLE settings (held_out REAL NOT NULL);
CREATE TABLE requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, time REAL NOT NULL, version TEXT NOT NULL,
    prediction TEXT NOT NULL, predicted_class TEXT, confidence REAL, features BLOB, content TEXT NOT NULL,
    held_out INTEGER NOT NULL, label TEXT, label_number INTEGER
);
CREATE TABLE bodies (number INTEGER PRIMARY KEY, content_type TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE labels (
    number INTEGER PRIMARY KEY AUTOINCREMENT, request INTEGER NOT NULL, name TEXT NOT NULL, time REAL NOT NULL
);
CREATE INDEX unlabeled ON requests (number) WHERE label IS NULL;
CREATE INDEX uncertain ON requests (confidence) WHERE label IS NULL;
CREATE INDEX labeled ON requests (label_number) WHERE label IS NOT NULL;
CREATE INDEX contents ON requests (content) WHERE label IS NOT NULL;
"""


class RequestLog:
    """A log of requests and labels: `with RequestLog(path) as request_log: ...`. Threads may share it.

    Args:
        path: The file; it is created if it does not exist.
        max_mb: Largest used size in MB. Beyond it the oldest requests without a label are removed; a labeled request is
            never removed.
        held_out_fraction: The fraction of the inputs that is held out for the gate. It is fixed when the file is
            created, so that a sample that was held out once is never trained on.

    Raises:
        FolderError: The file cannot be opened, or is not a request log.
    """

    def __init__(self, path: str | Path, *, max_mb: float = 256, held_out_fraction: float = HELD_OUT_FRACTION) -> None:
        if not 0 <= held_out_fraction < 1:
            raise UsageError(
                f"a fraction of {held_out_fraction} cannot be held out",
                where="held_out_fraction",
                fix="pass a number from 0 to less than 1",
            )
        self.path = Path(path)
        self.max_bytes = int(max_mb * 2**20)
        self.num_evicted, self.num_rejected = 0, 0
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise FolderError(f"cannot open '{self.path}'", why=str(error), fix="check the path") from None
        try:
            self._open_schema(held_out_fraction)
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @property
    def is_full(self) -> bool:
        """True if the log has reached `max_mb` and holds only labeled requests, so that it drops new ones."""
        return (
            self._used_bytes() > self.max_bytes
            and self._fetch_one("SELECT 1 FROM requests WHERE label IS NULL") is None
        )

    def append(self, requests: Sequence[LoggedRequest]) -> int:
        """Append requests in one commit, and remove old ones if the log is too large.

        Returns:
            The number of appended requests. The others are counted in `num_rejected`: a known id, a body of more than a
            tenth of `max_mb`, or no room beside labeled requests.
        """
        num_appended = 0
        with self._commit():
            for each in requests:
                room = len(each.body) <= _MAX_BODY_FRACTION * self.max_bytes and self._make_room()
                num_appended += self._insert(each) if room else 0
        self.num_rejected += len(requests) - num_appended
        return num_appended

    def label(self, request_id: str, class_name: str) -> LabelRecord:
        """Label a request durably. The last label counts, and the history keeps all of them.

        Raises:
            UnknownNameError: The log has no request with this id.
            DataError: The class name is empty, too long or not printable.
            TryAgainError: The disk is full, or another process holds the file.
        """
        class_name = _validate_class_name(class_name)
        with self._commit():
            row = self._fetch_one(
                "SELECT number, label, held_out, predicted_class FROM requests WHERE id = ?", request_id
            )
            if row is None:
                raise UnknownNameError(
                    f"the request log has no request '{request_id[:80]}'",
                    why="a sample rate below 1 skips requests, and the oldest ones are removed when the log is full",
                    fix="pass the id of a recent request",
                )
            number, previous, held_out, predicted_class = row
            added = self._db.execute(
                "INSERT INTO labels (request, name, time) VALUES (?, ?, ?)", (number, class_name, time.time())
            )
            self._db.execute(
                "UPDATE requests SET label = ?, label_number = ? WHERE number = ?",
                (class_name, added.lastrowid, number),
            )
        return LabelRecord(
            request_id,
            class_name,
            previous,
            bool(held_out),
            None if predicted_class is None else predicted_class == class_name,
        )

    def labeled_requests(self, side: Side | None = None) -> Iterator[LabeledRequest]:
        """Yield labeled samples in the order of their labels; equal inputs once, with their last label.

        Args:
            side: `"train"`, or `"held-out"` for the gate; None yields both. Equal inputs are always on the same side.
        """
        newest = self._fetch_all(
            "SELECT label_number FROM requests AS r WHERE label IS NOT NULL AND (? IS NULL OR held_out = ?) "
            "AND NOT EXISTS (SELECT 1 FROM requests WHERE content = r.content AND label IS NOT NULL "
            "AND label_number > r.label_number) ORDER BY label_number",
            side, side == "held-out",
        )  # fmt: skip
        for (number,) in newest:
            row = self._fetch_one(f"{_SELECT_REQUEST} WHERE label_number = ?", number)
            if row is not None:  # otherwise it was labeled again in the meantime
                yield LabeledRequest(_to_logged_request(row[:-2]), row[-2], bool(row[-1]), number)

    def history(self, request_id: str) -> list[str]:
        """Return every label of a request, oldest first."""
        query = "SELECT name FROM labels JOIN requests ON request = requests.number WHERE id = ? ORDER BY labels.number"
        return [name for (name,) in self._fetch_all(query, request_id)]

    def labeled_predictions(self, *, limit: int | None = None, version: str | None = None) -> list[tuple[str, str]]:
        """Return predicted class and label of labeled requests, newest first, without predictions that name no class.

        Args:
            limit: The most requests to return.
            version: Return only requests of this version.
        """
        return self._fetch_all(
            "SELECT predicted_class, label FROM requests WHERE label IS NOT NULL AND predicted_class IS NOT NULL "
            "AND (? IS NULL OR version = ?) ORDER BY number DESC LIMIT ?",
            version, version, -1 if limit is None else limit,
        )  # fmt: skip

    def recent_features(self, limit: int, *, version: str | None = None) -> list[tuple[float | None, bytes | None]]:
        """Return confidence and features of the newest requests."""
        return self._fetch_all(
            "SELECT confidence, features FROM requests WHERE ? IS NULL OR version = ? ORDER BY number DESC LIMIT ?",
            version, version, limit,
        )  # fmt: skip

    def accuracy_history(self) -> list[tuple[float, bool, str]]:
        """Return time, whether the prediction was correct, and version of labeled requests, oldest first."""
        rows = self._fetch_all(
            "SELECT time, predicted_class = label, version FROM requests "
            "WHERE label IS NOT NULL AND predicted_class IS NOT NULL ORDER BY 1"
        )
        return [(at, bool(is_correct), version) for at, is_correct, version in rows]

    def least_certain(self, *, skip: Sequence[str] = ()) -> LoggedRequest | None:
        """Return the unlabeled request with the least certain prediction; None if there is none.

        Args:
            skip: Ids to skip.
        """
        marks = ", ".join("?" * len(skip))
        found = self._fetch_one(
            f"SELECT id FROM requests WHERE label IS NULL AND id NOT IN ({marks}) "  # noqa: S608 - question marks only
            "ORDER BY confidence IS NULL, confidence, number DESC LIMIT 1",
            *skip,
        )
        return None if found is None else self.find(found[0])

    def find(self, request_id: str) -> LoggedRequest | None:
        """Return the request with this id; None if the log has none."""
        row = self._fetch_one(f"{_SELECT_REQUEST} WHERE id = ?", request_id)
        return None if row is None else _to_logged_request(row[:-2])

    def classes(self) -> list[str]:
        """Return the classes of all labels, sorted."""
        return [
            name
            for (name,) in self._fetch_all("SELECT DISTINCT label FROM requests WHERE label IS NOT NULL ORDER BY 1")
        ]

    def num_labels(self) -> int:
        """Return the number of labels ever given, which triggers count."""
        return int(self._fetch_one("SELECT COUNT(*) FROM labels")[0])

    def stats(self) -> RequestLogStats:
        """Return the size of the log."""
        num_requests = self._fetch_one("SELECT COUNT(*) FROM requests")[0]
        num_labeled, num_held_out = self._fetch_one(
            "SELECT COUNT(*), TOTAL(held_out) FROM requests WHERE label IS NOT NULL"
        )
        return RequestLogStats(num_requests, num_labeled, int(num_held_out), self.num_labels(), self._used_bytes())

    def _open_schema(self, held_out_fraction: float) -> None:
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            foreign = version == 0 and self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None
            if foreign:
                raise sqlite3.DatabaseError("it is the database of another program")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA fullfsync=ON")  # on macOS a plain fsync leaves data in the cache of the drive
            self._db.execute(f"PRAGMA journal_size_limit={_WAL_BYTES}")
            self._db.execute("BEGIN IMMEDIATE")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO settings VALUES (?)", (held_out_fraction,))
                self._db.execute(f"PRAGMA user_version={_VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise FolderError(
                f"cannot use '{self.path}' as a request log", why=str(error), fix="choose another file"
            ) from None
        if version not in (0, _VERSION):
            raise FolderError(
                f"the request log '{self.path}' has format {version}",
                why=f"this version of tuneforge-serve reads format {_VERSION}",
                fix="use the version of tuneforge-serve that wrote it, or choose another file",
            )
        self.held_out_fraction = float(self._fetch_one("SELECT held_out FROM settings")[0])

    def _insert(self, each: LoggedRequest) -> bool:
        content = each.content_digest or hashlib.sha256(each.body).hexdigest()
        predicted_class, confidence = each.prediction.get("class"), each.prediction.get("probability")
        added = self._db.execute(
            "INSERT OR IGNORE INTO requests "
            "(id, time, version, prediction, predicted_class, confidence, features, content, held_out)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                each.id, each.time, each.version, json.dumps(each.prediction), predicted_class, confidence,
                each.features, content, is_sampled(content, self.held_out_fraction, salt="held out"),
            ),
        )  # fmt: skip
        if added.rowcount:
            row = (added.lastrowid, each.content_type, each.body)
            self._db.execute("INSERT INTO bodies VALUES (?, ?, ?)", row)
        return bool(added.rowcount)

    def _make_room(self) -> bool:
        """Remove the oldest unlabeled requests until the log fits `max_bytes`; return False if that is impossible."""
        while self._used_bytes() > self.max_bytes:
            query = "SELECT number FROM requests WHERE label IS NULL ORDER BY number LIMIT ?"
            oldest = self._db.execute(query, (_EVICTION_BATCH_SIZE,)).fetchall()
            if not oldest:
                return False
            self._db.executemany("DELETE FROM bodies WHERE number = ?", oldest)
            self._db.executemany("DELETE FROM requests WHERE number = ?", oldest)
            self.num_evicted += len(oldest)
        return True

    def _used_bytes(self) -> int:
        """Return the size of the used pages in bytes."""
        pages, free, size = (
            self._fetch_one(f"PRAGMA {name}")[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    @contextlib.contextmanager
    def _commit(self) -> Iterator[None]:
        """Run the block in one durable transaction."""
        with self._lock, _translate_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _fetch_one(self, query: str, *values: Any) -> Any:
        with self._lock, _translate_errors(self.path):
            return self._db.execute(query, values).fetchone()

    def _fetch_all(self, query: str, *values: Any) -> list[Any]:
        with self._lock, _translate_errors(self.path):
            return self._db.execute(query, values).fetchall()


_SELECT_REQUEST = (
    "SELECT id, version, body, content_type, prediction, time, features, content, label, held_out "
    "FROM requests JOIN bodies USING (number)"
)


def is_sampled(key: str, fraction: float, *, salt: str) -> bool:
    """Return True for a fixed fraction of all keys; the result for a key never changes."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def _to_logged_request(row: tuple[Any, ...]) -> LoggedRequest:
    request_id, version, body, content_type, prediction, at, features, content = row
    return LoggedRequest(request_id, version, body, content_type, json.loads(prediction), at, features, content)


def _validate_class_name(name: str) -> str:
    name = name.strip()
    if not name or len(name) > MAX_CLASS_NAME_LENGTH or not name.isprintable():
        raise DataError(
            f"{name[:MAX_CLASS_NAME_LENGTH]!r} cannot be a class name",
            where="class",
            why=f"a class name has 1 to {MAX_CLASS_NAME_LENGTH} printable characters",
            fix="pass the name of a class",
        )
    return name


@contextlib.contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise TryAgainError(
            f"cannot write the request log '{path.name}'", why=str(error), fix="free some space, or wait, and try again"
        ) from None
