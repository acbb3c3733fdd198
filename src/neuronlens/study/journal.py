"""A study's folder, written line by line, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from pydantic import BaseModel, ValidationError

from neuronlens.atlas import locked, require_free
from neuronlens.errors import DataError, OutputError
from neuronlens.neurons import NeuronId
from neuronlens.study.records import (
    NeuronRecord,
    Said,
    SampleTokens,
    StudyManifest,
    TokenRecord,
    Traces,
)

Model = TypeVar("Model", bound=BaseModel)

MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
SAID = "explanations.jsonl"
SAMPLES = "samples.jsonl"
TRACES = "activations.jsonl"
REPLIES = "replies.sqlite"
MASKS = "masks.sqlite"
_LINES = (RECORDS, SAID, SAMPLES, TRACES)
_NAME = re.compile(rb'^\{"neuron":("(?:[^"\\]|\\.)*")')


class TraceFile(Mapping[NeuronId, list[TokenRecord]]):
    """Activations of a study's neurons, read from their file when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at: dict[NeuronId, int] = {}
        with path.open("rb") as lines:
            at = 0
            for line in lines:
                name = _NAME.match(line)
                if name is None or not line.endswith(b"\n"):
                    raise DataError(f"{path} is damaged at byte {at}.")
                # Written once more by a run that was killed in between, a neuron counts as last.
                self._at[NeuronId.parse(json.loads(name[1]))] = at
                at += len(line)

    def __getitem__(self, neuron: NeuronId) -> list[TokenRecord]:
        with self._path.open("rb") as lines:
            lines.seek(self._at[neuron])
            return Traces.model_validate_json(lines.readline()).exemplars

    def __iter__(self) -> Iterator[NeuronId]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


class Journal:
    """What a run has finished: in memory, and in a folder if there is one.

    Attributes:
        folder: Where it lies; None for a run that is kept in memory.
        said: What was said of each neuron.
        records: Of the finished neurons.
        samples: The tokens of exemplars, by (position, stream).
        traces: Activations, of a run that is kept in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.said: dict[NeuronId, Said] = {}
        self.records: dict[NeuronId, NeuronRecord] = {}
        self.samples: dict[tuple[int, str], SampleTokens] = {}
        self.traces: dict[NeuronId, list[TokenRecord]] = {}
        self._files: dict[str, IO[str]] = {}

    def say(self, said: Iterable[Said]) -> None:
        """Keep what was said of some neurons."""
        for each in said:
            self.said[NeuronId.parse(each.neuron)] = each
            self._write(SAID, each)
        self._flush()

    def finish(
        self, record: NeuronRecord, traces: list[TokenRecord], samples: Iterable[SampleTokens]
    ) -> None:
        """Keep a finished neuron: its record comes last, so that it is never without the rest."""
        for each in samples:
            place = (each.sample.position, each.stream)
            if place not in self.samples:
                self._write(SAMPLES, each)
                self.samples[place] = each
        if self.folder is None:
            self.traces[record.id] = traces
        else:
            self._write(TRACES, Traces(neuron=record.neuron, exemplars=traces))
        for name in (SAMPLES, TRACES):
            if name in self._files:
                self._files[name].flush()
        self.records[record.id] = record
        self._write(RECORDS, record)
        self._flush()

    def _write(self, name: str, line: BaseModel) -> None:
        if self.folder is None:
            return
        if name not in self._files:
            self._files[name] = (self.folder / name).open("a", encoding="utf-8")
        self._files[name].write(line.model_dump_json() + "\n")

    def _flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


@contextmanager
def journal(out: Path | None, manifest: StudyManifest, *, retry: bool = False) -> Iterator[Journal]:
    """The journal of a run, with what earlier runs of the same study have finished.

    Args:
        out: Folder of the study; None keeps everything in memory.
        manifest: What the study is made with.
        retry: Whether neurons that failed are tried again.

    Raises:
        OutputError: If the folder holds something else, or a study made with other settings,
            or is being written by another run.
        DataError: If what it holds is damaged.
    """
    if out is None:
        yield Journal(None)
        return
    if not (out / MANIFEST).exists():
        require_free(out)
        _begin(out, manifest)
    with locked(out / "lock"):
        _require_same(out, manifest)
        kept = Journal(out)
        for name in _LINES:
            _cut_torn_line(out / name)
        _load(kept, retry)
        try:
            yield kept
        finally:
            kept.close()


def _begin(out: Path, manifest: StudyManifest) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in _LINES:
            (out / name).touch()
        working = out / f".{MANIFEST}"
        working.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        working.replace(out / MANIFEST)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. Choose another folder."
        ) from error


def _require_same(out: Path, manifest: StudyManifest) -> None:
    there = read_manifest(out).model_dump(mode="json")
    now = manifest.model_dump(mode="json")
    for name, value in now.items():
        if there[name] != value:
            raise OutputError(
                f"{out} holds a study with another {name}: {_short(there[name])}, not "
                f"{_short(value)}. Choose another folder, or ask for the same to go on."
            )


def _short(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 160 else f"{said[:160]}..."


def _cut_torn_line(path: Path) -> None:
    """What a killed run was about to write is written again."""
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


def _load(kept: Journal, retry: bool) -> None:
    folder = kept.folder
    if folder is None:
        return
    for said in read_lines(folder / SAID, Said):
        if not (retry and said.explanation is None):
            kept.said[NeuronId.parse(said.neuron)] = said
    for sample in read_lines(folder / SAMPLES, SampleTokens):
        kept.samples[sample.sample.position, sample.stream] = sample
    for record in read_lines(folder / RECORDS, NeuronRecord):
        if retry and record.failure is not None:
            kept.records.pop(record.id, None)
        else:
            kept.records[record.id] = record


def read_manifest(folder: Path) -> StudyManifest:
    """The manifest of a study's folder.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        return StudyManifest.model_validate_json((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{folder} is no whole study: {error}") from error


def read_lines(path: Path, kind: type[Model]) -> list[Model]:
    """Every line of a file of records.

    Raises:
        DataError: If the file is missing or a line is damaged.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return [kind.model_validate_json(line) for line in file]
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise DataError(f"{path.parent} is no whole study: {path.name}: {error}") from error


def write_lines(path: Path, models: Iterable[BaseModel]) -> None:
    """A file of records."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(model.model_dump_json() + "\n" for model in models)
