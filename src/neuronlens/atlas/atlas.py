"""A finished scan, read from its folder as it is needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas.folder import check_files
from neuronlens.atlas.manifest import FORMAT, Choices, Manifest, SampleRecord, Session
from neuronlens.atlas.write import SESSIONS, TABLE, read_records, site_file
from neuronlens.errors import AtlasError, UnknownNameError
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.running import COUNTED, FIXED_POINT, SiteStatistics
from neuronlens.samples import Sample
from neuronlens.show import Html, table
from neuronlens.tokens import Role

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True, eq=False, repr=False)
class NeuronStatistics:
    """What an atlas knows of one neuron.

    Attributes:
        neuron: Which.
        positions: Of its top samples, best first.
        value: What ranks them: each sample's largest eligible activation.
        visual: Their largest visual activations, falling, -inf where there are fewer.
        text: Their largest eligible text activations, likewise.
        maximum: Over all samples, by role; -inf for a role that never occurred.
        mean: Over the tokens of a role that ran through the neuron; NaN if there were none.
        firing_rate: Share of a role's tokens with an activation above 0.
        routed_share: Share of a role's tokens that were routed to the neuron's expert; 1 in dense
            blocks. `firing_rate / routed_share` is the rate on the tokens it ran on.
    """

    neuron: NeuronId
    positions: Int[Tensor, " rank"]
    value: Float[Tensor, " rank"]
    visual: Float[Tensor, "rank kept_visual"]
    text: Float[Tensor, "rank kept_text"]
    maximum: Mapping[Role, float]
    mean: Mapping[Role, float]
    firing_rate: Mapping[Role, float]
    routed_share: Mapping[Role, float]

    def __repr__(self) -> str:
        best = f"{self.value[0]:.3g} on sample {self.positions[0]}" if len(self.value) else "none"
        return f"NeuronStatistics({self.neuron}: {len(self.value)} top samples, best {best})"


Selection = str | NeuronId | NeuronSite | Iterable[str | NeuronId | NeuronSite] | None
"""Neurons of an atlas: modules, sites, single ones; None for all."""


class Atlas:
    """A finished scan, read from its folder as it is needed.

    Attributes:
        path: The folder.
        manifest: Model, readings, sites, domains, skipped samples, files.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.sites = {site.name: site for site in manifest.sites}

    @classmethod
    def open(cls, path: str | Path) -> Atlas:
        """Open an atlas; sizes of its files are checked, hashes by `verify`.

        Raises:
            AtlasError: If the folder is no atlas, a file is missing or cut short, or it was
                written in another format.
        """
        path = Path(path)
        try:
            text = (path / "manifest.json").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise AtlasError(f"{path}/manifest.json cannot be read: {error}") from error
        except OSError as error:
            raise AtlasError(
                f"{path} is no atlas: it has no manifest.json. Scans write one last, so an "
                "interrupted scan leaves none; scan again."
            ) from error
        try:
            found = json.loads(text).get("format")
            if isinstance(found, int) and found > FORMAT:
                raise AtlasError(
                    f"{path} has format {found}; this neuronlens reads up to {FORMAT}. Update it."
                )
            if isinstance(found, int) and found < FORMAT:
                raise AtlasError(
                    f"{path} has format {found}, of a development version before the first release;"
                    f" this neuronlens reads {FORMAT}. Scan again."
                )
            manifest = Manifest.model_validate_json(text)
        except (json.JSONDecodeError, AttributeError, ValidationError) as error:
            raise AtlasError(f"{path}/manifest.json cannot be read: {error}") from error
        check_files(path, manifest.files, hashes=False)
        return cls(path, manifest)

    @classmethod
    def merge(cls, atlases: Iterable[Atlas | str | Path], out: str | Path) -> Atlas:
        """One atlas of several scans of one model: of different samples, or all shards of a scan.

        Shards (`scan(..., shard=(i, n))`) give the atlas of the whole scan, bit for bit. Scans of
        different samples are put one behind the other, in an order that follows from the data: so
        merging does not depend on the order, or the grouping, in which they are given.

        Args:
            atlases: Two or more, or their folders.
            out: Folder to write.

        Raises:
            AtlasError: If they are of other models, sites or readings; if shards are missing.
            DataError: If a sample is in two of them.
            SkippedError: If none of them has a sample.
            OutputError: If `out` holds something, or cannot be written.
        """
        from neuronlens.atlas.merge import merge

        merge([each if isinstance(each, Atlas) else cls.open(each) for each in atlases], out)
        return cls.open(out)

    def verify(self) -> None:
        """Compare every file with the hash the scan wrote.

        Raises:
            AtlasError: If one differs.
        """
        check_files(self.path, self.manifest.files, hashes=True)

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse a model, or a kind of neuron, other than what was scanned.

        Raises:
            AtlasError: If the weights differ, or act_fn outputs would be read beside inputs of
                the down projection.
        """
        if adapter.neuron_kind != self.choices.neuron:
            raise AtlasError(
                f"This atlas was scanned with neuron={self.choices.neuron!r}; the given adapter "
                f"reads {adapter.neuron_kind!r}. Use adapt(model, processor, "
                f"neuron={self.choices.neuron!r})."
            )
        if adapter.fingerprint() != self.manifest.model.fingerprint:
            raise AtlasError(
                f"This atlas is of {self.manifest.model.name!r} with other weights than the "
                f"given {adapter.name!r}. Load the model that was scanned, or scan this one."
            )

    @property
    def choices(self) -> Choices:
        """The readings the scan was made with."""
        return self.manifest.choices

    @property
    def eligible(self) -> tuple[Role, ...]:
        """Roles whose tokens rank samples and give a neuron's maximum."""
        return (Role.VISUAL, *self.choices.text_roles)

    def site(self, name: str) -> NeuronSite:
        """The site of that name.

        Raises:
            UnknownNameError: If it was not scanned.
        """
        if name not in self.sites:
            raise UnknownNameError("site in this atlas", name, self.sites)
        return self.sites[name]

    def statistics(self, site: str) -> SiteStatistics:
        """Everything that was kept of a site."""
        with self.read(site) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return SiteStatistics.from_state_dict(state, self.manifest.domains)

    def neuron(self, neuron: NeuronId) -> NeuronStatistics:
        """What is known of one neuron; only its own rows are read.

        Raises:
            UnknownNameError: If it is not in this atlas.
        """
        row = self.site(neuron.site).row(neuron)
        with self.read(neuron.site) as file:
            ids, visual, text = (
                file.get_slice(f"top.{name}")[row] for name in ("ids", "visual", "text")
            )
            maximum, total = (file.get_slice(f"role.{n}")[row] for n in ("maximum", "total"))
            fired = file.get_slice("fired")[row].sum((0, 1))
            tokens = file.get_tensor("tokens").sum((0, 1))
            ran = tokens
            if neuron.expert is not None:
                ran = file.get_slice("routed")[neuron.expert].sum((0, 1))
        present = ids >= 0

        def by_role(values: Tensor) -> dict[Role, float]:
            return dict(zip(COUNTED, values.tolist(), strict=True))

        return NeuronStatistics(
            neuron,
            ids[present],
            torch.maximum(visual[:, 0], text[:, 0])[present],
            visual[present],
            text[present],
            maximum=by_role(maximum),
            mean=by_role(total.double() / FIXED_POINT / ran),
            firing_rate=by_role(fired.double() / tokens),
            routed_share=by_role(ran.double() / tokens),
        )

    def maximum(self, neuron: NeuronId) -> float:
        """The largest eligible activation over all samples: 10 on the 0..10 scale."""
        by_role = self.neuron(neuron).maximum
        return max(by_role[role] for role in self.eligible)

    def means(
        self, neurons: Selection = None, roles: Iterable[Role] | None = None
    ) -> dict[NeuronId, float]:
        """Mean activation of some neurons over the tokens of some roles, all samples together.

        ::

            with nl.set_to(vlm, neurons, atlas.means(neurons)):
                model.generate(**inputs)

        Args:
            neurons: A module, a site, a neuron, how one is written, or several of these; None
                for every neuron.
            roles: Roles of the tokens; None for all but padding.

        Returns:
            The mean over the tokens that ran through the neuron: for one of a routed expert,
            those that were routed there. NaN if there were none.

        Raises:
            UnknownNameError: If a neuron is not in this atlas, or a role is not counted.
        """
        wanted = COUNTED if roles is None else tuple(dict.fromkeys(roles))
        for role in wanted:
            if role not in COUNTED:
                raise UnknownNameError("counted role", role, [each.name for each in COUNTED])
        places = [COUNTED.index(role) for role in wanted]
        found: dict[NeuronId, float] = {}
        for name, rows in self.rows(neurons).items():
            site = self.sites[name]
            at = torch.arange(site.neurons) if rows is None else torch.tensor(rows)
            with self.read(name) as file:
                total = file.get_tensor("role.total")[at][:, places].sum(1)
                ran = file.get_tensor("tokens")[..., places].sum()
                if site.experts:
                    routed = file.get_tensor("routed")[..., places].sum((1, 2, 3))
                    ran = routed[at // site.width]
            mean = total.double() / FIXED_POINT / ran
            for row, value in zip(at.tolist(), mean.tolist(), strict=True):
                expert, index = divmod(row, site.width)
                found[site.neuron(index, expert if site.experts else None)] = value
        return found

    @cached_property
    def samples(self) -> dict[int, SampleRecord]:
        """The sample table, by position."""
        try:
            return {record.position: record for record in read_records(self.path / TABLE)}
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise AtlasError(f"{self.path}/{TABLE} cannot be read: {error}") from error

    @property
    def runs(self) -> list[Session]:
        """How the scan went, a line per run and rank; empty for a merged atlas."""
        path = self.path / SESSIONS
        if not path.exists():
            return []
        return [Session.model_validate_json(line) for line in path.read_text("utf-8").splitlines()]

    def summary(self) -> str:
        """How the scan went, in a sentence: samples, time, rate, what was skipped."""
        manifest, runs = self.manifest, self.runs
        said = f"{manifest.samples:,} samples"
        if runs:
            by_rank = Counter[int]()
            for run in runs:
                by_rank[run.shard.index] += round(run.seconds * 1000)
            seconds, ran = max(by_rank.values()) / 1000, sum(run.seconds for run in runs)
            rate = manifest.samples / max(seconds, 1e-3)
            said += f" in {_duration(seconds)} ({rate:,.1f} a second)"
        if manifest.skipped:
            said += f"; {len(manifest.skipped)} skipped: {manifest.reasons()}"
        if runs and ran:
            waited, saving = (sum(getattr(r, n) for r in runs) / ran for n in ("waited", "saving"))
            said += f"; {waited:.0%} of the time waiting for data, {saving:.0%} for checkpoints"
        return said

    def sample(self, position: int) -> Sample:
        """A scanned sample, found again through its files.

        Raises:
            UnknownNameError: If no sample was taken in at that position.
            AtlasError: If it was not a file to begin with.
            SampleError: If its image is no longer what was scanned.
        """
        if position not in self.samples:
            raise UnknownNameError("sample at position", position, self.samples)
        return self.samples[position].sample_from_files()

    def table(
        self,
        neurons: Selection = None,
        *,
        per: Literal["neuron", "sample"] = "neuron",
        library: Literal["pandas", "pyarrow"] = "pandas",
    ) -> pd.DataFrame | pa.Table:
        """The numbers of some neurons as a table.

        Args:
            neurons: A module, a site, a neuron, how one is written, or several of these; None
                for every neuron.
            per: `"neuron"`: a row for each, with its maximum, and by role the maximum, mean and
                firing rate. `"sample"`: a row for each of its top samples, with rank, value and
                the kept activations.
            library: Whose table: `"pandas"` or `"pyarrow"`.

        Raises:
            UnknownNameError: If a name is not in this atlas.
            MissingExtraError: If the library is not installed.
        """
        from neuronlens.atlas.table import made_by, per_neuron, per_sample

        if per not in ("neuron", "sample"):
            raise ValueError(f"No table per {per!r}. Tables have a row per 'neuron' or 'sample'.")
        make = made_by(library)
        # A table of nothing still has its columns.
        rows = self.rows(neurons) or {next(iter(self.sites)): []}
        return make((per_neuron if per == "neuron" else per_sample)(self, rows))

    def rows(self, neurons: Selection = None) -> dict[str, list[int] | None]:
        """By site, the rows of the selected neurons; None for all of them.

        Raises:
            UnknownNameError: If a name is not in this atlas.
        """
        if neurons is None:
            return dict.fromkeys(self.sites)
        one = isinstance(neurons, (str, NeuronId, NeuronSite))
        chosen: list[Any] = [neurons] if one else list(neurons)  # type: ignore[arg-type]
        modules = {site.module for site in self.sites.values()}
        found: dict[str, dict[int, None] | None] = {}
        for each in chosen:
            if isinstance(each, str) and "/" in each:
                each = NeuronId.parse(each)
            if isinstance(each, NeuronId):
                rows = found.setdefault(each.site, {})
                if rows is not None:
                    rows[self.site(each.site).row(each)] = None
                else:
                    self.site(each.site).row(each)
            elif isinstance(each, str) and each in modules and each not in self.sites:
                found |= {n: None for n, site in self.sites.items() if site.module == each}
            else:
                found[self.site(each if isinstance(each, str) else each.name).name] = None
        return {
            name: None if found[name] is None else list(found[name] or ())
            for name in self.sites
            if name in found
        }

    @contextmanager
    def read(self, site: str) -> Iterator[Any]:
        """The site's file, mapped into memory: nothing is read before it is asked for."""
        name = site_file(self.site(site).name)
        try:
            with safe_open(self.path / name, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise AtlasError(f"{self.path}/{name} cannot be read: {error}.") from error

    def __repr__(self) -> str:
        name, samples = self.manifest.model.name, self.manifest.samples
        shard = f", shard {self.manifest.shard}" if self.manifest.shard else ""
        return f"Atlas({str(self.path)!r}: {name}, {samples} samples{shard})"

    def _repr_html_(self) -> Html:
        manifest, choices = self.manifest, self.choices
        modules = Counter[str]()
        for site in manifest.sites:
            modules[site.module] += site.neurons
        rows = [
            (
                "model",
                f"{manifest.model.name} ({manifest.model.model_type}, {manifest.model.dtype})",
            ),
            ("neurons", ", ".join(f"{module} {count:,}" for module, count in modules.items())),
            ("samples", self.summary()),
            *([("shard", str(manifest.shard))] if manifest.shard else []),
            ("skipped", manifest.reasons() or "none"),
            ("domains", ", ".join(domain or "(none)" for domain in manifest.domains)),
            ("top samples", f"{choices.n} per neuron, by {choices.rank}"),
            ("text tokens", ", ".join(role.name.lower() for role in choices.text_roles)),
        ]
        return table(["atlas", str(self.path)], rows)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
