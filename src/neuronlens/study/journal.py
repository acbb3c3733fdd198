"""A study's folder, written line by line, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from neuronlens.atlas import locked, require_free
from neuronlens.errors import DataError, OutputError
from neuronlens.lines import LineFile, cut_torn_line, read_lines, writing
from neuronlens.neurons import NeuronId
from neuronlens.study.records import (
    NeuronRecord,
    Said,
    SampleTokens,
    StudyManifest,
    TokenRecord,
    Traces,
)

Place = tuple[int, str]
"""A sample's position in the scan, and a stream."""

MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
SAID = "explanations.jsonl"
SAMPLES = "samples.jsonl"
TRACES = "activations.jsonl"
REPLIES = "replies.sqlite"
MASKS = "masks.sqlite"
_WORKING = f".{MANIFEST}"
_LINES = (RECORDS, SAID, SAMPLES, TRACES)


class TraceFile(LineFile[NeuronId, list[TokenRecord]]):
    """Activations of a study's neurons."""

    begins = re.compile(rb'^\{"neuron":("(?:[^"\\]|\\.)*")')

    def _key(self, found: re.Match[bytes]) -> NeuronId:
        return NeuronId.parse(json.loads(found[1]))

    def _value(self, line: bytes) -> list[TokenRecord]:
        return Traces.model_validate_json(line).exemplars


class SampleFile(LineFile[Place, SampleTokens]):
    """The tokens of a study's samples, by (position, stream)."""

    begins = re.compile(rb'^\{"position":(\d+),"stream":("(?:[^"\\]|\\.)*")')

    def _key(self, found: re.Match[bytes]) -> Place:
        return int(found[1]), json.loads(found[2])

    def _value(self, line: bytes) -> SampleTokens:
        return SampleTokens.model_validate_json(line)


class Journal:
    """What a run has finished: in memory, and in a folder if there is one.

    Attributes:
        folder: Where it lies; None for a run that is kept in memory.
        manifest: What the study is made with.
        said: What was said of each neuron.
        records: Of the finished neurons.
        places: Where the tokens are kept already.
        samples: The tokens of exemplars, of a run that is kept in memory.
        traces: Activations, of a run that is kept in memory.
    """

    def __init__(self, folder: Path | None, manifest: StudyManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.said: dict[NeuronId, Said] = {}
        self.records: dict[NeuronId, NeuronRecord] = {}
        self.places: set[Place] = set()
        self.samples: dict[Place, SampleTokens] = {}
        self.traces: dict[NeuronId, list[TokenRecord]] = {}
        self._files: dict[str, IO[str]] = {}

    def loaded(self, names: Mapping[str, str]) -> None:
        """Note in the manifest what simulators by default have loaded.

        Raises:
            OutputError: If what this folder holds was made with something else, or it cannot be
                written.
        """
        before = self.manifest.loaded
        for modality, name in names.items():
            if before.get(modality, name) != name:
                raise OutputError(
                    f"{self.folder} holds a study that was simulated with {before[modality]}, not "
                    f"{name}. Choose another folder, or use the same to go on."
                )
        if {**before, **names} != before:
            self.manifest = self.manifest.model_copy(update={"loaded": {**before, **names}})
            if self.folder is not None:
                _begin(self.folder, self.manifest)

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
            place = (each.position, each.stream)
            if place not in self.places:
                self.places.add(place)
                self._write(SAMPLES, each)
                if self.folder is None:
                    self.samples[place] = each
        if self.folder is None:
            self.traces[record.id] = traces
        else:
            self._write(TRACES, Traces(neuron=record.neuron, exemplars=traces))
        self._flush(SAMPLES, TRACES)
        self.records[record.id] = record
        self._write(RECORDS, record)
        self._flush()

    def _write(self, name: str, line: BaseModel) -> None:
        if self.folder is None:
            return
        with writing(self.folder):
            if name not in self._files:
                self._files[name] = (self.folder / name).open("a", encoding="utf-8")
            self._files[name].write(line.model_dump_json() + "\n")

    def _flush(self, *names: str) -> None:
        if self.folder is None:
            return
        with writing(self.folder):
            for name, file in self._files.items():
                if name in names or not names:
                    file.flush()

    def close(self) -> None:
        """Close the files; what could not be written was said when it was flushed."""
        for file in self._files.values():
            with suppress(OSError):
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
        yield Journal(None, manifest)
        return
    if not (out / MANIFEST).exists() and not _was_begun(out):
        require_free(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock"):
        if not (out / MANIFEST).exists():
            _begin(out, manifest)
        there = read_manifest(out)
        with writing(out):
            for name in _LINES:
                cut_torn_line(out / name)
        if not any((out / name).stat().st_size for name in _LINES):
            # Nothing was made with those settings: the run ended before, for whatever reason.
            there = manifest
            _begin(out, manifest)
        _require_same(out, there, manifest)
        kept = Journal(out, there)
        _load(kept, retry)
        try:
            yield kept
        finally:
            kept.close()


def _was_begun(out: Path) -> bool:
    """Whether there is nothing here but what a run, or the caller's chat model, begins with."""
    kept = {f"{name}{end}" for name in (REPLIES, MASKS) for end in ("", "-wal", "-shm", "-journal")}
    return out.is_dir() and {each.name for each in out.iterdir()} <= {"lock", _WORKING, *kept}


def _begin(out: Path, manifest: StudyManifest) -> None:
    with writing(out):
        # First of all files, and whole or not there.
        (out / _WORKING).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (out / _WORKING).replace(out / MANIFEST)


def _require_same(out: Path, manifest: StudyManifest, asked: StudyManifest) -> None:
    there = manifest.model_dump(mode="json", exclude={"loaded"})
    now = asked.model_dump(mode="json", exclude={"loaded"})
    for name, value in now.items():
        if there[name] != value:
            where, one, other = _difference(name, there[name], value)
            raise OutputError(
                f"{out} holds a study with another {where}: {_short(one)}, not {_short(other)}. "
                "Choose another folder, or ask for the same to go on."
            )


def _difference(where: str, one: object, other: object) -> tuple[str, object, object]:
    """The first place in which two values differ, and what stands there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return _difference(f"{where}.{key}", one.get(key), other.get(key))
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"number of {where}", len(one), len(other)
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                return _difference(f"{where}[{i}]", a, b)
    return where, one, other


def _short(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 160 else f"{said[:160]}..."


def _load(kept: Journal, retry: bool) -> None:
    folder = kept.folder
    if folder is None:
        return
    for said in read_lines(folder / SAID, Said):
        if said.passing or (retry and said.explanation is None):
            kept.said.pop(NeuronId.parse(said.neuron), None)
        else:
            kept.said[NeuronId.parse(said.neuron)] = said
    kept.places.update(SampleFile(folder / SAMPLES))
    for record in read_lines(folder / RECORDS, NeuronRecord):
        if record.passing or (retry and record.failure is not None):
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
