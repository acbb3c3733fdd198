"""Where an unfinished scan lies: its table of samples, and the last whole checkpoint."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file

from neuronlens.atlas import (
    FORMAT,
    Choices,
    FileInfo,
    Manifest,
    ModelInfo,
    SampleRecord,
    Session,
    Shard,
    Skipped,
    check_files,
    described,
    durable,
    flush_names,
    locked,
    read_records,
    site_file,
    write_sites,
)
from neuronlens.errors import AtlasError, OutputError
from neuronlens.neurons import NeuronSite
from neuronlens.running import SiteStatistics

_TABLE = "samples.jsonl"
_PROGRESS = "progress.json"
_WRITING = "writing"


class Progress(BaseModel, defer_build=True):
    """What a checkpoint holds beside the statistics.

    Attributes:
        model, choices, sites, shard, versions: As in the manifest.
        next_batch: Number, in the plan, of the first batch that has not been taken in.
        window: Of the last batch that has; -1 for none.
        chain: The plan's fingerprint at the end of that window.
        samples: How many samples were taken in.
        table: Size in bytes of the table of samples.
        pending: Records that are not in it yet, since their window is not done.
        skipped: Samples that could not be used.
        domains: In the order in which counts are stacked.
        sessions: How it went so far.
        plan, positions: Of the whole plan; None and 0 before it has been run through.
        files: Size and hash of the statistics.
    """

    format: int = FORMAT
    model: ModelInfo
    choices: Choices
    sites: tuple[NeuronSite, ...]
    shard: Shard
    versions: dict[str, str]
    next_batch: int = 0
    window: int = -1
    chain: str = ""
    samples: int = 0
    table: int = 0
    pending: list[SampleRecord] = []
    skipped: list[Skipped] = []
    domains: list[str] = []
    sessions: list[Session] = []
    plan: str | None = None
    positions: int = 0
    files: dict[str, FileInfo] = {}


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on the disk."""

    folder: Path
    progress: Progress

    def statistics(
        self, site: NeuronSite, device: torch.device | str = "cpu"
    ) -> SiteStatistics | None:
        """A site's statistics; None if no batch had been taken in."""
        if site_file(site.name) not in self.progress.files:
            return None
        state = load_file(self.folder / site_file(site.name))
        return SiteStatistics.from_state_dict(state, self.progress.domains, device)


class Workplace:
    """The folder of one shard of an unfinished scan.

    A checkpoint is written beside the last one, flushed, then renamed; only then the last one
    goes. Records of samples are appended to a table, of which a checkpoint knows how long it was.
    """

    def __init__(self, root: Path, shard: Shard) -> None:
        self.root = root
        self._shard = shard
        self.folder = root / f"part-{shard.index}-of-{shard.count}"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep other runs away; a folder that holds nothing in the end is taken away.

        Raises:
            OutputError: If another run holds it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.root} cannot be written: {error.strerror}. Choose another folder."
            ) from error
        with locked(self.folder / "lock"):
            try:
                yield
            finally:
                if self.folder.exists() and not self._checkpoints():
                    shutil.rmtree(self.folder, ignore_errors=True)
                    if self.root.exists() and not any(self.root.iterdir()):
                        self.root.rmdir()

    def others(self, alone: bool) -> list[Path]:
        """Folders of shards that are not of this scan: any other one, if this process is alone."""
        ending = f"-of-{self._shard.count}"
        return [
            each
            for each in sorted(self.root.glob("part-*"))
            if each != self.folder and (alone or not each.name.endswith(ending))
        ]

    @property
    def table(self) -> Path:
        """The table of samples."""
        return self.folder / _TABLE

    def clear(self) -> None:
        """Forget what is there."""
        for path in (*self._checkpoints(), self.folder / _WRITING):
            shutil.rmtree(path, ignore_errors=True)
        self.table.unlink(missing_ok=True)

    def restore(self) -> Saved | None:
        """The last whole checkpoint, the table cut to what it was then; None if there is none.

        Raises:
            OutputError: If there are checkpoints, but none is whole.
        """
        shutil.rmtree(self.folder / _WRITING, ignore_errors=True)
        found = self._checkpoints()
        problems = []
        for folder in reversed(found):
            try:
                saved = Saved(folder, _read(folder / _PROGRESS))
                check_files(folder, saved.progress.files, hashes=True)
                have = self.table.stat().st_size if self.table.exists() else 0
                if have < saved.progress.table:
                    raise AtlasError(f"{self.table} is {have} bytes long")
            except (OSError, ValidationError, AtlasError) as error:
                problems.append(f"{folder}: {error}")
                continue
            if problems:
                warnings.warn(f"A damaged checkpoint was left aside: {problems[0]}", stacklevel=4)
            for other in found:
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            if saved.progress.table or self.table.exists():
                os.truncate(self.table, saved.progress.table)
            return saved
        if problems:
            raise OutputError(
                f"No checkpoint in {self.folder} is whole ({problems[0]}). Delete the folder, or "
                "scan with resume=False, to begin again."
            )
        self.table.unlink(missing_ok=True)
        return None

    def append(self, records: Iterable[SampleRecord]) -> None:
        """Add records to the table; they count once a checkpoint says so.

        Raises:
            OutputError: If the disk is full, or cannot be written.
        """
        try:
            with self.table.open("a", encoding="utf-8") as file:
                file.writelines(record.model_dump_json() + "\n" for record in records)
        except OSError as error:
            raise OutputError(
                f"{self.table} could not be written: {error}. Free some space and run the same "
                "scan again: it goes on from its last checkpoint."
            ) from error

    def save(
        self,
        progress: Progress,
        statistics: Callable[[NeuronSite], SiteStatistics] | None,
    ) -> float:
        """Write a checkpoint; the one before stays until this one is whole.

        Args:
            progress: Where the scan is; its `table` and `files` are filled in.
            statistics: Of each site; None before any batch has been taken in.

        Returns:
            Seconds it took.

        Raises:
            OutputError: If the disk is full, or cannot be written; the last checkpoint is intact.
        """
        start = time.perf_counter()
        before = self._checkpoints()
        number = int(before[-1].name.rpartition("-")[2]) + 1 if before else 0
        working, folder = self.folder / _WRITING, self.folder / f"checkpoint-{number:06d}"
        try:
            with durable(self.table, "a") as file:
                file.flush()
                progress.table = os.fstat(file.fileno()).st_size
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir()
            names = (
                write_sites(working, progress.sites, statistics, progress.domains)
                if statistics
                else []
            )
            progress.files = described(working, names)
            with durable(working / _PROGRESS) as file:
                file.write(progress.model_dump_json() + "\n")
            working.rename(folder)
            flush_names(self.folder)
        except OSError as error:
            shutil.rmtree(working, ignore_errors=True)
            kept = f"The last one is intact: {before[-1]}." if before else "There is none before."
            raise OutputError(
                f"A checkpoint could not be written in {self.folder}: {error}. {kept} Free some "
                "space and run the same scan again: it goes on from there."
            ) from error
        for old in before:
            shutil.rmtree(old, ignore_errors=True)
        return time.perf_counter() - start

    def records(self) -> Iterator[SampleRecord]:
        """The table of samples."""
        return read_records(self.table) if self.table.exists() else iter(())

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))


def _read(path: Path) -> Progress:
    return Progress.model_validate_json(path.read_bytes())


def differences(now: Progress, then: Progress | Manifest) -> list[str]:
    """In what two scans differ, for people."""
    apart = []
    if now.model.fingerprint != then.model.fingerprint:
        apart.append(f"other weights of {then.model.name}")
    if now.model.dtype != then.model.dtype:
        apart.append(f"dtype {then.model.dtype}, not {now.model.dtype}")
    if now.sites != then.sites:
        apart.append(f"{len(then.sites)} sites, not these {len(now.sites)}")
    here, there = now.choices.spelled(), then.choices.spelled()
    apart += [
        f"{name}={there[name]}, not {here[name]}" for name in here if here[name] != there[name]
    ]
    return apart
