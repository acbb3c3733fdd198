"""Files of records, one on each line: written at the end, cut where a run was killed."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from neuronlens.errors import DataError, OutputError

Model = TypeVar("Model", bound=BaseModel)
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LineFile(Mapping[Key, Value], Generic[Key, Value]):
    """What stands on the lines of a file, read when it is asked for.

    Args:
        path: The file.
        torn: Whether its last line may be without an end: of a run that goes on, or was killed.

    Raises:
        OSError: If there is no such file.
        DataError: If a line does not begin as it must.
    """

    begins: ClassVar[re.Pattern[bytes]]
    """How every line begins; a key is read from the groups."""

    def __init__(self, path: Path, *, torn: bool = False) -> None:
        self._path = path
        self._at: dict[Key, int] = {}
        with path.open("rb") as lines:
            at = 0
            for line in lines:
                if torn and not line.endswith(b"\n"):
                    break
                found = self.begins.match(line)
                if found is None or not line.endswith(b"\n"):
                    raise DataError(f"{path} is damaged at byte {at}.")
                # Written once more by a run that was killed in between, a line counts as last.
                self._at[self._key(found)] = at
                at += len(line)

    @abstractmethod
    def _key(self, found: re.Match[bytes]) -> Key:
        """What a line is found by."""

    @abstractmethod
    def _value(self, line: bytes) -> Value:
        """What a line says."""

    def __getitem__(self, key: Key) -> Value:
        with self._path.open("rb") as lines:
            lines.seek(self._at[key])
            line = lines.readline()
        try:
            return self._value(line)
        except ValidationError as error:
            raise DataError(f"{self._path} is damaged at byte {self._at[key]}: {error}") from error

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def __iter__(self) -> Iterator[Key]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


def read_lines(
    path: Path, kind: type[Model], *, torn: bool = False, of: str = "study"
) -> list[Model]:
    """Every line of a file of records.

    Args:
        path: The file.
        kind: Of the records.
        torn: Whether a last line without an end is left out: of a run that goes on.
        of: What the file belongs to, for the message.

    Raises:
        DataError: If the file is missing or a line is damaged.
    """
    try:
        # As bytes: a line that was cut may end in the middle of a character.
        with path.open("rb") as file:
            return [
                kind.model_validate_json(line) for line in file if line.endswith(b"\n") or not torn
            ]
    except (OSError, ValidationError) as error:
        raise DataError(f"{path.parent} is no whole {of}: {path.name}: {error}") from error


def write_lines(path: Path, models: Iterable[BaseModel]) -> None:
    """A file of records."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(model.model_dump_json() + "\n" for model in models)


def cut_torn_line(path: Path) -> None:
    """Take away what a killed run was about to write: it is written again."""
    if not path.exists():
        path.touch()
        return
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        at = end
        while at > 0:
            start = max(0, at - 65536)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                at = start + found + 1
                break
            at = start
        if at < end:
            file.truncate(at)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Give what cannot be written the name of the folder or file.

    Raises:
        OutputError: If something in the block cannot be written.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. What was written before is kept: call "
            "again to go on from it, or choose another place."
        ) from error
