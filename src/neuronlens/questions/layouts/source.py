"""The files that questions are read from, and what is said if they have another form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronlens.errors import DataError


@dataclass(frozen=True)
class Source:
    """What a layout's reader is given.

    Attributes:
        layout: Its name, for messages and ids.
        path: The file with the questions.
        images: Folder of the images; None for where the layout has it.
        annotations: The file with the answers; None for where the layout has it.
        domain: Domain of every question.
        role: Role description of every question.
    """

    layout: str
    path: Path
    images: Path | None
    annotations: Path | None
    domain: str | None
    role: str

    def json(self, path: Path, key: str) -> Mapping[str, Any]:
        """What a JSON file holds; under the key is a list of records.

        Raises:
            FileNotFoundError: If there is no such file.
            DataError: If it is no JSON, or has no such list.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not JSON: {error}.") from error
        if not isinstance(read, Mapping) or not isinstance(read.get(key), list):
            has = _listed(read) if isinstance(read, Mapping) else f"a {type(read).__name__}"
            raise DataError(
                f"{path} is not in the layout {self.layout!r}: it holds {has}, and should hold "
                f"a list under {key!r}."
            )
        return read

    def need(self, record: object, fields: Iterable[str], where: str) -> Mapping[str, Any]:
        """The record, if it has all these fields.

        Args:
            record: From the file.
            fields: What the layout has in each record.
            where: The file, and the record's place in it, for the message.

        Raises:
            DataError: If one is missing.
        """
        has = record if isinstance(record, Mapping) else {}
        missing = [each for each in fields if each not in has]
        if missing:
            found = _listed(has) if isinstance(record, Mapping) else f"a {type(record).__name__}"
            raise DataError(
                f"{where} is not in the layout {self.layout!r}: it has {found}, and lacks "
                f"{', '.join(missing)}."
            )
        return has

    def sibling(self, name: str, what: str) -> Path:
        """A file that lies beside the questions.

        Raises:
            FileNotFoundError: If it does not.
        """
        path = self.path.parent / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.path} needs {what}: there is no {path}. Put the file there, or say where "
                "it is with `annotations`."
            )
        return path


def _listed(fields: Iterable[object]) -> str:
    names = ", ".join(map(str, fields))
    return f"the fields {names}" if names else "no fields"
