"""One atlas from several."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from neuronlens.atlas.atlas import Atlas
from neuronlens.atlas.folder import new_folder
from neuronlens.atlas.manifest import Choices, Part, SampleRecord, Shard, Skipped
from neuronlens.atlas.write import TABLE, read_records, write
from neuronlens.errors import AtlasError, DataError, SkippedError
from neuronlens.neurons import NeuronSite
from neuronlens.running import ABSENT, SiteStatistics

_AND = " and "
"""Between the versions of a library, where several were used."""


def merge(atlases: Sequence[Atlas], out: str | Path) -> None:
    """Write the atlas of all of them; see `Atlas.merge`."""
    whole = Shard(index=0, count=1)  # an array of one job
    if len(atlases) < 2 and [atlas.manifest.shard for atlas in atlases] != [whole]:
        raise AtlasError(f"{len(atlases)} atlases were given; merging takes two or more.")
    choices = _agreed(atlases)
    moved = _shards(atlases) or _side_by_side(atlases)
    _require_apart(atlases)
    if not any(atlas.manifest.samples for atlas in atlases):
        reasons = "; ".join(each for a in atlases if (each := a.manifest.reasons()))
        raise SkippedError(f"None of these atlases has a sample: {reasons or 'none was given'}.")
    first = atlases[0].manifest
    with new_folder(out) as folder:
        write(
            folder,
            # One model may go by several names; which one is said must not follow from the order.
            model=min((a.manifest.model for a in atlases), key=lambda each: each.model_dump_json()),
            choices=choices,
            sites=first.sites,
            statistics=lambda site: _merged(atlases, site, moved.places),
            samples=heapq.merge(
                *(_records(a, p) for a, p in zip(atlases, moved.places, strict=True)),
                key=lambda record: record.position,
            ),
            skipped=_skipped(atlases, moved.places),
            versions=_versions([atlas.manifest.versions for atlas in atlases]),
            parts=moved.parts,
            plan=moved.plan,
            positions=moved.positions,
        )


@dataclass(frozen=True)
class _Moved:
    """Where each atlas' samples go.

    Attributes:
        places: By atlas, the new position of every old one.
        parts: The scans it is made of; none where it is one.
        plan: Of that one.
        positions: Of that one.
    """

    places: Sequence[Int[Tensor, " position"]]
    parts: Sequence[Part] = ()
    plan: str = ""
    positions: int = 0


def _agreed(atlases: Sequence[Atlas]) -> Choices:
    """What all were scanned with.

    Raises:
        AtlasError: If they differ in more than how samples were dealt to batches.
    """
    first = atlases[0]
    dealt = ("batch_size", "window")
    for other in atlases[1:]:
        one, two = (
            {
                "model": a.manifest.model.fingerprint,
                "dtype": a.manifest.model.dtype,
                "sites": ", ".join(a.sites),
                "neurons": [(site.width, site.experts) for site in a.sites.values()],
                **{name: each for name, each in a.choices.spelled().items() if name not in dealt},
            }
            for a in (first, other)
        )
        apart = [
            f"{name} {one[name]!s} and {two[name]!s}" for name in one if one[name] != two[name]
        ]
        if apart:
            raise AtlasError(
                f"{first.path} and {other.path} cannot be merged, since they differ in "
                f"{'; '.join(apart)}. Scan one of them again like the other."
            )
    several = {
        name: None for name in dealt if len({getattr(atlas.choices, name) for atlas in atlases}) > 1
    }
    return first.choices.model_copy(update=several)


def _shards(atlases: Sequence[Atlas]) -> _Moved | None:
    """The shards of one scan, whose positions are already those of the whole; None for others.

    Raises:
        AtlasError: If some are missing, or are of another scan.
    """
    shards = [atlas.manifest.shard for atlas in atlases]
    if not any(shards):
        return None
    known = [shard for shard in shards if shard is not None]
    parts = {(a.manifest.parts[0].plan, a.manifest.parts[0].positions) for a in atlases}
    counts = {shard.count for shard in known}
    choices = {atlas.choices.model_dump_json() for atlas in atlases}
    if len(known) < len(shards) or len(parts) > 1 or len(counts) > 1 or len(choices) > 1:
        raise AtlasError(
            "Shards merge with the other shards of their scan first; these are "
            + ", ".join(
                f"{atlas.path} ({'whole' if shard is None else f'shard {shard}'})"
                for atlas, shard in zip(atlases, shards, strict=True)
            )
            + " of other samples, another count or other batches."
        )
    have = Counter(shard.index for shard in known)
    missing = [i for i in range(known[0].count) if i not in have]
    twice = [i for i, count in have.items() if count > 1]
    if missing or twice:
        what = f"shards {missing} are missing" if missing else f"shards {twice} were given twice"
        raise AtlasError(
            f"A scan of {known[0].count} shards is whole with each of them once; {what}. "
            "Give each once, and run those there are not."
        )
    ((plan, positions),) = parts
    return _Moved([torch.arange(positions)] * len(atlases), (), plan, positions)


def _side_by_side(atlases: Sequence[Atlas]) -> _Moved:
    """Different scans, each behind the one before it in the order of their data.

    An atlas that was merged before is taken apart again: only so does the grouping not matter.
    """
    every = sorted(
        ((part, number, place) for number, atlas in enumerate(atlases)
         for place, part in enumerate(atlas.manifest.parts)),
        key=lambda each: (each[0].data, each[0].plan),
    )  # fmt: skip
    starts: dict[tuple[int, int], int] = {}
    total = 0
    for part, number, place in every:
        starts[number, place] = total
        total += part.positions
    places = [
        torch.cat(
            [
                torch.arange(part.positions) + starts[number, place]
                for place, part in enumerate(atlas.manifest.parts)
            ]
        )
        for number, atlas in enumerate(atlases)
    ]
    return _Moved(places, [part for part, _, _ in every])


def _require_apart(atlases: Sequence[Atlas]) -> None:
    """Refuse a sample that is in two of them.

    Raises:
        DataError: If there is one; names it.
    """
    seen: dict[str, Path] = {}
    for atlas in atlases:
        for record in read_records(atlas.path / TABLE):
            sample = str(record.id)
            if sample in seen:
                raise DataError(
                    f"Sample {sample!r} is in {seen[sample]} and in {atlas.path}; it would count "
                    "twice. Merge atlases of different samples, with different ids."
                )
            seen[sample] = atlas.path


def _merged(
    atlases: Sequence[Atlas], site: NeuronSite, places: Sequence[Int[Tensor, " position"]]
) -> SiteStatistics:
    merged: SiteStatistics | None = None
    every = list(zip(atlases, places, strict=True))
    # A shard without a batch of its own has nothing to add.
    for atlas, place in [each for each in every if each[0].manifest.samples] or every[:1]:
        with atlas.read(site.name) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ids = state["top.ids"].long()
        state["top.ids"] = torch.where(ids == ABSENT, ABSENT, place[ids.clamp(min=0)]).int()
        own = SiteStatistics.from_state_dict(state, atlas.manifest.domains)
        if merged is None:
            merged = own
        else:
            merged.merge(own)
    assert merged is not None
    return merged


def _records(atlas: Atlas, place: Int[Tensor, " position"]) -> Iterator[SampleRecord]:
    """With their new positions, which rise like the old ones: parts keep their order."""
    for record in read_records(atlas.path / TABLE):
        yield record.model_copy(update={"position": int(place[record.position])})


def _skipped(
    atlases: Sequence[Atlas], places: Sequence[Int[Tensor, " position"]]
) -> Iterator[Skipped]:
    for atlas, place in zip(atlases, places, strict=True):
        for each in atlas.manifest.skipped:
            yield each.model_copy(update={"position": int(place[each.position])})


def _versions(several: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The version of each library; all of them where several were used."""
    found: dict[str, set[str]] = {}
    for each in several:
        for name, said in each.items():
            found.setdefault(name, set()).update(said.split(_AND))
    return {name: _AND.join(sorted(numbers)) for name, numbers in found.items()}
