"""What a scan holds while it runs; it changes only when a whole batch is taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Choices, SampleRecord, Skipped
from neuronlens.errors import SampleError, SkippedError
from neuronlens.neurons import NeuronSite
from neuronlens.recorder import record
from neuronlens.running import (
    Incoming,
    Layout,
    Reduction,
    SiteStatistics,
    reduce,
    reduce_everything,
)
from neuronlens.scan.checkpoint import Saved
from neuronlens.scan.feed import Encoded, skip_record
from neuronlens.tokens import TokenMap

StateDevice = Literal["layer", "cpu"]
"""Where running statistics lie: beside the layer, or in the machine's memory."""


@dataclass(frozen=True, eq=False)
class _Staged:
    """A batch that has run, and has not been taken in."""

    encoded: Encoded
    reductions: Mapping[str, Reduction]
    finite: _Flags


class _Flags:
    """By site, which samples had finite activations: fetched once per device, not once per site.

    They are sent for when the batch has run; waiting for them is then no waiting for what the
    device has been given since.
    """

    def __init__(self, reductions: Mapping[str, Reduction]) -> None:
        by_device: dict[torch.device, list[str]] = {}
        for name, reduction in reductions.items():
            by_device.setdefault(reduction.finite.device, []).append(name)
        self._names = list(reductions)
        self._sent: list[tuple[list[str], Tensor, torch.cuda.Event | None]] = []
        for device, names in by_device.items():
            flags = torch.stack([reductions[name].finite for name in names])
            event = None
            if device.type == "cuda":
                flags = flags.to("cpu", non_blocking=True)
                with torch.cuda.device(device):
                    event = torch.cuda.Event()
                    event.record()
            self._sent.append((names, flags, event))

    def by_site(self) -> dict[str, Bool[Tensor, " sample"]]:
        """The flags, in the order in which the sites ran."""
        found: dict[str, Bool[Tensor, " sample"]] = {}
        for names, flags, event in self._sent:
            if event is not None:
                event.synchronize()
            found |= dict(zip(names, flags.cpu(), strict=True))
        return {name: found[name] for name in self._names}


class _Staging:
    """A recorder's sink that reduces each site of one batch; it changes no statistics."""

    def __init__(self, encoded: Encoded, scan: ScanState) -> None:
        self.reductions: dict[str, Reduction] = {}
        self._scan = scan
        self._samples = len(encoded.records)
        self._ids = torch.tensor([each.position for each in encoded.records], dtype=torch.int32)
        self._layouts: dict[tuple[str, torch.device], Layout] = {}

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        choices = self._scan.choices
        key = (site.stream, activation.device)
        if key not in self._layouts:
            self._layouts[key] = Layout.of(
                tokens, self._samples, choices.text_roles, activation.device
            )
        layout, keep = self._layouts[key], (choices.keep_visual, choices.keep_text)
        if self._scan.looks(activation):
            known = self._scan.statistics.get(site.name)
            gate = known.top.gate if known is not None else None
            self.reductions[site.name] = reduce(activation, layout, *keep, gate, self._ids)
        elif isinstance(activation, Routed):
            # How many rows each expert has is looked at in any case.
            self.reductions[site.name] = reduce(activation, layout, *keep)
        else:
            self.reductions[site.name] = reduce_everything(activation, layout, *keep)


@dataclass
class ScanState:
    """Statistics per site, records of the samples, what was skipped.

    Attributes:
        adapter: Of the model.
        sites: What is scanned.
        choices: How.
        max_skips: Skipped samples beyond which the scan stops; None for no limit.
        where: Where the statistics lie.
        runs_behind: Whether the device runs behind the program, so that looking at a number would
            stop it. Then a batch is taken in while the next one runs.
        statistics: Per site; none before the first batch.
        records: Of the samples that were taken in since they were last fetched.
        skipped: Of the whole scan.
        samples: How many were taken in.
        last: The last batch that was taken in.
    """

    adapter: ModelAdapter
    sites: Sequence[NeuronSite]
    choices: Choices
    max_skips: int | None = None
    where: StateDevice = "layer"
    runs_behind: bool = False
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)
    records: list[SampleRecord] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    domains: dict[str, None] = field(default_factory=dict)
    samples: int = 0
    last: Encoded | None = None
    is_whole: bool = True
    _waiting: _Staged | None = None

    def looks(self, activation: Activation) -> bool:
        """Whether a look at these activations stops nothing."""
        return activation.device.type == "cpu" and not self.runs_behind

    def run(self, encoded: Encoded) -> None:
        """Run a batch, and take it, or the one before, in.

        Nothing changes before a forward has ended, so that a batch can be run again.

        Raises:
            SkippedError: If more than `max_skips` samples had to be skipped.
        """
        staged: _Staged | None = self._forward(encoded)
        if self.runs_behind:
            staged, self._waiting = self._waiting, staged
        if staged is not None:
            self._take_in(staged)

    def finish(self) -> None:
        """Take in what has run."""
        staged, self._waiting = self._waiting, None
        if staged is not None:
            self._take_in(staged)

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint."""
        progress = saved.progress
        for site in self.sites:
            found = saved.statistics(site)
            if found is not None:
                self.statistics[site.name] = found
        self.records = list(progress.pending)
        self.skipped = list(progress.skipped)
        self.domains = dict.fromkeys(progress.domains)
        self.samples = progress.samples

    def _forward(self, encoded: Encoded) -> _Staged:
        staging = _Staging(encoded, self)
        if encoded.records:
            inputs = {
                name: value.to(self.adapter.device, non_blocking=True)
                if isinstance(value, Tensor)
                else value
                for name, value in encoded.inputs.items()
            }
            with (
                torch.inference_mode(),
                record(self.adapter, self.sites, staging, encoded.tokens),
            ):
                self.adapter.forward(inputs, logits=False)
        return _Staged(encoded, staging.reductions, _Flags(staging.reductions))

    def _take_in(self, staged: _Staged) -> None:
        encoded = staged.encoded
        skipped = list(encoded.skipped)
        keep = _finite(encoded.records, staged.finite.by_site(), skipped)
        records = [r for r, kept in zip(encoded.records, keep.tolist(), strict=True) if kept]
        self.is_whole = False  # until the end: what raises here leaves half a batch
        if records:
            incoming = Incoming(
                [each.position for each in encoded.records],
                [each.unit for each in encoded.records],
                [each.domain or "" for each in encoded.records],
                keep,
            )
            for site in self.sites:
                self._update(site, staged.reductions[site.name], incoming)
        self.records += records
        self.skipped += skipped
        self.samples += len(records)
        self.domains |= dict.fromkeys(record.domain or "" for record in records)
        self.last = encoded
        self.is_whole = True
        if skipped and self.max_skips is not None and len(self.skipped) > self.max_skips:
            raise SkippedError(
                f"{len(self.skipped)} samples had to be skipped; max_skips is {self.max_skips}.\n"
                + "\n".join(each.detail for each in self.skipped)
            )

    def _update(self, site: NeuronSite, reduction: Reduction, incoming: Incoming) -> None:
        where = torch.device("cpu") if self.where == "cpu" else reduction.maximum.device
        if site.name not in self.statistics:
            self.statistics[site.name] = SiteStatistics(
                site.neurons,
                self.choices.n,
                self.choices.keep_visual,
                self.choices.keep_text,
                reduction.visual.dtype,
                site.experts,
                where,
            )
        self.statistics[site.name].move(where)
        self.statistics[site.name].update(reduction, incoming)


def _finite(
    records: Sequence[SampleRecord],
    flags: Mapping[str, Bool[Tensor, " sample"]],
    skipped: list[Skipped],
) -> Bool[Tensor, " sample"]:
    """Which samples of the batch had finite activations everywhere; the others are skipped."""
    keep = torch.ones(len(records), dtype=torch.bool)
    for name, finite in flags.items():
        for row in (keep & ~finite).nonzero().squeeze(1).tolist():
            mine = records[row]
            error = SampleError(str(mine.id), "non-finite activations", f"first at site {name}.")
            skipped.append(skip_record(mine.position, error))
        keep &= finite
    return keep
