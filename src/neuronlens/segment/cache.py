"""Masks that were made before, by image, phrase and segmenter."""

from __future__ import annotations

import io
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from neuronlens.errors import OutputError, SegmenterError
from neuronlens.samples import Sample, image_digest
from neuronlens.segment.annotations import AnnotationSegmenter
from neuronlens.segment.segmenter import Segmenter, clean, open_image

Key = tuple[str, str, str]
"""Segmenter's name, image's digest, phrase."""


class CachedSegmenter:
    """A segmenter that is never asked the same twice.

    A mask is known by the pixels of the image (upright, RGB: what a segmenter sees), the phrase
    in lower case and without full stops (see `clean`), and the segmenter's name. Another file
    with the same pixels is the same image. The segmenter is asked for the phrases in the form
    they are kept in, and only for those not yet known.

    Several threads may share one, and several processes a file. In one process the segmenter is
    asked by one thread at a time. What was kept survives the process, however it ends.

    It cannot keep masks that depend on more than the image, such as those of annotations.
    """

    def __init__(
        self, segmenter: Segmenter, path: Path | str | None = None, *, memory: int = 256_000_000
    ) -> None:
        """Keep masks in memory, or in a file.

        Args:
            segmenter: Makes the masks.
            path: An SQLite file, made if there is none; without it masks are kept in memory.
            memory: Bytes to keep without a file; the masks used longest ago go first. A mask
                takes about a thousandth to a hundredth of its image's pixels.

        Raises:
            SegmenterError: If the segmenter's masks do not depend on the image alone.
            OutputError: If the file cannot be used.
        """
        if isinstance(segmenter, AnnotationSegmenter):
            raise SegmenterError(
                "The masks of an AnnotationSegmenter come from the sample, not from its image, and "
                "take no time. Use it without a cache."
            )
        self.segmenter = segmenter
        self._kept: _Kept = _InMemory(memory) if path is None else _InFile(Path(path))
        self._turn = Lock()

    @property
    def name(self) -> str:
        """The segmenter's own, since the masks are the same."""
        return self.segmenter.name

    def segment(
        self, sample: Sample, image: int, phrases: Sequence[str]
    ) -> Bool[np.ndarray, "phrase height width"]:
        """The segmenter's masks, asked for only where they are not known.

        Raises:
            SampleError: If the image is missing or not readable.
            OutputError: If the file cannot be used.
        """
        picture = open_image(sample, image)
        shape = (picture.height, picture.width)
        name, digest = self.segmenter.name, image_digest(picture)
        keys = {phrase: (name, digest, clean(phrase)) for phrase in phrases}
        known = self._known(keys.values(), shape)
        if len(known) < len(set(keys.values())):
            with self._turn:
                # Another thread may have asked in the meantime.
                missing = [key for key in dict.fromkeys(keys.values()) if key not in known]
                known |= self._known(missing, shape)
                missing = [key for key in missing if key not in known]
                if missing:
                    made = self.segmenter.segment(sample, image, [key[2] for key in missing])
                    fresh = dict(zip(missing, made, strict=True))
                    self._kept.put({key: _packed(mask) for key, mask in fresh.items()})
                    known |= fresh
        masks = np.zeros((len(phrases), *shape), np.bool_)
        for mask, phrase in zip(masks, phrases, strict=True):
            mask[:] = known[keys[phrase]]
        return masks

    def _known(
        self, keys: Iterable[Key], shape: tuple[int, int]
    ) -> dict[Key, Bool[np.ndarray, "height width"]]:
        """Masks already made; one that cannot be read counts as not made."""
        found = self._kept.get(list(dict.fromkeys(keys)))
        masks = {key: _unpacked(packed) for key, packed in found.items()}
        return {k: mask for k, mask in masks.items() if mask is not None and mask.shape == shape}

    def __repr__(self) -> str:
        return f"CachedSegmenter({self.segmenter!r})"


class _Kept(Protocol):
    """Packed masks by key."""

    def get(self, keys: Sequence[Key]) -> dict[Key, bytes]: ...

    def put(self, packed: Mapping[Key, bytes]) -> None: ...


class _InMemory:
    """Packed masks up to so many bytes; those used longest ago go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._packed: OrderedDict[Key, bytes] = OrderedDict()
        self._size = 0
        self._lock = Lock()

    def get(self, keys: Sequence[Key]) -> dict[Key, bytes]:
        with self._lock:
            found = {key: self._packed[key] for key in keys if key in self._packed}
            for key in found:
                self._packed.move_to_end(key)
            return found

    def put(self, packed: Mapping[Key, bytes]) -> None:
        with self._lock:
            for key, data in packed.items():
                self._size += len(data) - len(self._packed.pop(key, b""))
                self._packed[key] = data
            while self._size > self.limit:
                self._size -= len(self._packed.popitem(last=False)[1])


class _InFile:
    """Packed masks in an SQLite file.

    Every access opens the file anew, which takes a fraction of a millisecond: so threads and
    forked processes share no connection. The journal is the default one, not the write-ahead
    log, which several machines cannot share over a network file system.
    """

    TABLE = (
        "CREATE TABLE IF NOT EXISTS masks (segmenter TEXT NOT NULL, image TEXT NOT NULL, "
        "phrase TEXT NOT NULL, png BLOB NOT NULL, PRIMARY KEY (segmenter, image, phrase))"
    )
    PATIENCE = 60.0
    """Seconds to wait for another process to finish writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {path.parent} cannot be made: {error}.") from error
        with path.open("ab+") as file:  # SQLite would write over a short file of another kind
            file.seek(0)
            start = file.read(16)
        if start and start != b"SQLite format 3\0":
            raise OutputError(
                f"The cache of masks {path} cannot be used: it is no database. Name another file."
            )
        with self._open() as database:
            database.execute(self.TABLE)
            database.execute("SELECT segmenter, image, phrase, png FROM masks LIMIT 1")

    def get(self, keys: Sequence[Key]) -> dict[Key, bytes]:
        found = {}
        query = "SELECT png FROM masks WHERE segmenter = ? AND image = ? AND phrase = ?"
        with self._open() as database:
            for key in keys:
                row = database.execute(query, key).fetchone()
                if row is not None:
                    found[key] = bytes(row[0])
        return found

    def put(self, packed: Mapping[Key, bytes]) -> None:
        rows = [(*key, data) for key, data in packed.items()]
        with self._open() as database, database:
            database.executemany("INSERT OR REPLACE INTO masks VALUES (?, ?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=self.PATIENCE)) as database:
                yield database
        except sqlite3.Error as error:
            raise OutputError(
                f"The cache of masks {self.path} cannot be used: {error}. Name another file, or "
                "remove this one if it holds nothing else."
            ) from error


def _packed(mask: Bool[np.ndarray, "height width"]) -> bytes:
    """A PNG of one bit per pixel."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(file, "PNG", compress_level=6)
    return file.getvalue()


def _unpacked(packed: bytes) -> Bool[np.ndarray, "height width"] | None:
    """The mask, or None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(packed), formats=["PNG"]) as image:
            return np.asarray(image.convert("1"), np.bool_)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None
