"""From finished shards to the atlas."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from pathlib import Path

import torch

from neuronlens.atlas import (
    SampleRecord,
    Shard,
    Skipped,
    put_in_place,
    write,
    write_sessions,
)
from neuronlens.errors import OutputError, SkippedError
from neuronlens.neurons import NeuronSite
from neuronlens.running import SiteStatistics
from neuronlens.scan.checkpoint import Progress, Saved, Workplace


@dataclass(frozen=True)
class Part:
    """What one shard found."""

    place: Workplace
    progress: Progress
    statistics: Mapping[str, SiteStatistics] | Saved

    def of(self, site: NeuronSite) -> SiteStatistics | None:
        """The statistics of a site; None if there was no sample."""
        if isinstance(self.statistics, Saved):
            return self.statistics.statistics(site)
        return self.statistics.get(site.name)


def parts_of(root: Path, own: Progress) -> list[Part]:
    """What all ranks left.

    Raises:
        OutputError: If one left nothing, or scanned other samples.
    """
    parts = []
    for index in range(own.shard.count):
        place = Workplace(root, Shard(index=index, count=own.shard.count))
        saved = place.restore()
        if saved is None or saved.progress.plan != own.plan:
            raise OutputError(
                f"{place.folder} does not hold what rank {index} scanned. Do all ranks see the "
                "same file system, and were they given the same samples?"
            )
        parts.append(Part(place, saved.progress, saved))
    return parts


def put_together(root: Path, out: Path, parts: Sequence[Part], shard: Shard | None) -> None:
    """Write the atlas beside the checkpoints, and put it where it belongs.

    Raises:
        SkippedError: If no sample could be used, in a scan that is whole.
        OutputError: If it cannot be written, or something is at `out` meanwhile.
    """
    skipped = [each for part in parts for each in part.progress.skipped]
    if shard is None and not any(part.progress.samples for part in parts):
        raise SkippedError(
            f"None of {len(skipped)} samples could be used, for example:\n"
            + "\n".join(each.detail for each in skipped[:5])
        )
    working = root / "atlas"
    shutil.rmtree(working, ignore_errors=True)
    sessions = [each for part in parts for each in part.progress.sessions]
    try:
        working.mkdir()
        _write(working, parts, skipped, shard)
        write_sessions(working, sessions)
    except OSError as error:
        raise OutputError(
            f"The atlas could not be written in {root}: {error}. Free some space and run the same "
            "scan again: it goes on from its last checkpoint."
        ) from error
    put_in_place(working, out)


def _write(
    folder: Path, parts: Sequence[Part], skipped: Iterable[Skipped], shard: Shard | None
) -> None:
    first = parts[0].progress

    def position(record: SampleRecord) -> int:
        return record.position

    write(
        folder,
        model=first.model,
        choices=first.choices,
        sites=first.sites,
        statistics=lambda site: _joined(parts, site),
        samples=merge(*(part.place.records() for part in parts), key=position),
        skipped=skipped,
        versions=first.versions,
        plan=first.plan or "",
        positions=first.positions,
        shard=shard,
    )


def _joined(parts: Sequence[Part], site: NeuronSite) -> SiteStatistics:
    found = [each for part in parts if (each := part.of(site)) is not None]
    if not found:
        choices, model = parts[0].progress.choices, parts[0].progress.model
        kept = choices.keep_visual, choices.keep_text
        dtype: torch.dtype = getattr(torch, model.dtype)
        return SiteStatistics(site.neurons, choices.n, *kept, dtype, site.experts)
    for other in found[1:]:
        found[0].merge(other)
    return found[0]
