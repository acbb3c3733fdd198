"""Writing an atlas."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from neuronlens.atlas.folder import described, durable, save_tensors
from neuronlens.atlas.manifest import (
    Choices,
    Manifest,
    ModelInfo,
    Part,
    SampleRecord,
    Session,
    Shard,
    Skipped,
)
from neuronlens.neurons import NeuronSite
from neuronlens.running import SiteStatistics

TABLE = "samples.jsonl"
"""Where the table of samples lies within the folder."""

SESSIONS = "runs.jsonl"
"""Where it is said how the scan went; that is no part of the result."""


def site_file(site: str) -> str:
    """Where a site's statistics lie within the folder."""
    return f"sites/{site}.safetensors"


def read_records(path: Path) -> Iterator[SampleRecord]:
    """The rows of a sample table, one after the other."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield SampleRecord.model_validate_json(line)


def write_sessions(folder: Path, sessions: Iterable[Session]) -> None:
    """Write how the scan went."""
    with (folder / SESSIONS).open("w", encoding="utf-8") as file:
        file.writelines(session.model_dump_json() + "\n" for session in sessions)


def write_sites(
    folder: Path,
    sites: Iterable[NeuronSite],
    statistics: Callable[[NeuronSite], SiteStatistics],
    domains: Sequence[str],
) -> list[str]:
    """Write each site's statistics, one at a time; returns the files' names."""
    (folder / "sites").mkdir()
    names = []
    for site in sites:
        names.append(site_file(site.name))
        save_tensors(folder / names[-1], statistics(site).state_dict(domains))
    return names


def write(
    folder: Path,
    *,
    model: ModelInfo,
    choices: Choices,
    sites: Sequence[NeuronSite],
    statistics: Mapping[str, SiteStatistics] | Callable[[NeuronSite], SiteStatistics],
    samples: Iterable[SampleRecord],
    skipped: Iterable[Skipped],
    versions: Mapping[str, str],
    parts: Sequence[Part] = (),
    plan: str = "",
    positions: int = 0,
    shard: Shard | None = None,
) -> Manifest:
    """Write an atlas into an empty folder, its manifest last.

    Args:
        folder: Where.
        model: What was scanned.
        choices: How.
        sites: Which sites.
        statistics: Of each site, by name, or a function that fetches them.
        samples: Records in the order of their positions; they are not kept.
        skipped: Samples that could not be used.
        versions: Of the libraries.
        parts: The scans it was merged from; by default it is one scan, of `plan`.
        plan: Fingerprint of the ids and texts of the samples that were given.
        positions: How many were given.
        shard: Which share of the scan it is, if not the whole.
    """
    of = statistics if callable(statistics) else lambda site: statistics[site.name]
    data, count, domains = hashlib.sha256(), 0, set[str]()
    with durable(folder / TABLE) as file:
        for record in samples:
            data.update(record.fingerprint())
            domains.add(record.domain or "")
            count += 1
            file.write(record.model_dump_json() + "\n")
    in_order = sorted(domains)
    names = [TABLE, *write_sites(folder, sites, of, in_order)]
    manifest = Manifest(
        model=model,
        choices=choices,
        sites=tuple(sites),
        domains=tuple(in_order),
        samples=count,
        skipped=tuple(sorted(skipped, key=lambda each: each.position)),
        data=data.hexdigest(),
        parts=tuple(parts) or (Part(data=data.hexdigest(), plan=plan, positions=positions),),
        shard=shard,
        versions=dict(versions),
        files=described(folder, names),
    )
    with durable(folder / "manifest.json") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
    return manifest
