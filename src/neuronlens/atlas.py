"""What a scan leaves on disk: every neuron's top samples and counts, opened lazily."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import AtlasError, OutputError, SampleError, UnknownNameError
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.running import COUNTED, FIXED_POINT, SiteStatistics
from neuronlens.samples import LabelMap, Sample, SampleRow, image_digest
from neuronlens.show import Html, table
from neuronlens.tokens import Role

FORMAT: Final = 1
"""Version of the folder's layout; a reader refuses a newer one."""


class Choices(BaseModel):
    """The readings a scan was made with; another value of any needs another scan."""

    n: int
    keep_visual: int
    keep_text: int
    text_roles: tuple[Role, ...]
    rank: str = "largest activation over eligible tokens"
    text: str = "given"
    neuron: str = "act_fn"
    template: bool
    batch_size: int
    window: int


class ModelInfo(BaseModel):
    """Which model was scanned."""

    name: str
    model_type: str
    fingerprint: str
    dtype: str


class Skipped(BaseModel):
    """A sample that could not be used, and why."""

    position: int
    id: str
    reason: str
    detail: str


class FileInfo(BaseModel):
    """Size and SHA-256 of a file of the atlas."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What the folder holds and how it came to be."""

    format: int = FORMAT
    model: ModelInfo
    choices: Choices
    sites: tuple[NeuronSite, ...]
    domains: tuple[str, ...]
    samples: int
    skipped: tuple[Skipped, ...]
    data: str
    versions: dict[str, str]
    files: dict[str, FileInfo]


class SampleRecord(SampleRow):
    """A row of the sample table; paths are absolute.

    Attributes:
        position: In the sequence that was scanned; what `top.ids` hold.
        digests: SHA-256 of each image.
        in_memory: Whether an image or annotation was no file, so that the sample must be
            passed again to be looked at.
    """

    position: int
    digests: list[str]
    in_memory: bool = False

    @classmethod
    def of(cls, sample: Sample, position: int) -> SampleRecord:
        """The record of a sample."""
        paths = [str(source) for source in sample.images if isinstance(source, Path)]
        labels: dict[tuple[str, int], dict[int, list[str]]] = {}
        in_memory = len(paths) < len(sample.images)
        for each in sample.annotations:
            if isinstance(each.labels, Path):
                named = labels.setdefault((str(each.labels), each.image), {})
                named[each.number] = list(each.names)
            else:
                in_memory = True
        return cls(
            id=sample.id,
            image=paths,
            prompt=sample.prompt,
            response=sample.response,
            domain=sample.domain,
            annotations=[
                LabelMap(labels=path, names=names, image=image)
                for (path, image), names in labels.items()
            ],
            position=position,
            digests=[image_digest(source) for source in sample.images],
            in_memory=in_memory,
        )

    def sample_from_files(self) -> Sample:
        """The sample, if its images are still what was scanned.

        Raises:
            AtlasError: If it was not a file to begin with.
            SampleError: If an image is gone or has changed.
        """
        if self.in_memory:
            raise AtlasError(
                f"Sample {self.id!r} was scanned from memory, so its image or masks cannot be "
                "found again. Pass the same samples: samples=..."
            )
        sample = self.sample(Path("/"), str(self.position))
        paths = [source for source in sample.images if isinstance(source, Path)]
        for path, digest in zip(paths, self.digests, strict=True):
            if not path.exists():
                raise SampleError(sample.id, "missing image", f"{path} is gone since the scan.")
            if image_digest(path) != digest:
                raise SampleError(sample.id, "changed image", f"{path} differs since the scan.")
        return sample

    def fingerprint(self) -> bytes:
        """What makes the sample this one, wherever its files lie."""
        return json.dumps([self.id, self.digests, self.prompt, self.response, self.domain]).encode()


@dataclass(frozen=True)
class NeuronStatistics:
    """What an atlas knows of one neuron.

    Attributes:
        neuron: Which.
        positions: Of its top samples, best first.
        value: What ranks them: each sample's largest eligible activation.
        visual: Their largest visual activations, falling, -inf where there are fewer.
        text: Their largest eligible text activations, likewise.
        maximum: Over all samples, by role; -inf for a role that never occurred.
        mean: Over all tokens of a role; NaN for a role that never occurred.
        firing_rate: Share of a role's tokens with an activation above 0.
    """

    neuron: NeuronId
    positions: Int[Tensor, " rank"]
    value: Float[Tensor, " rank"]
    visual: Float[Tensor, "rank kept_visual"]
    text: Float[Tensor, "rank kept_text"]
    maximum: Mapping[Role, float]
    mean: Mapping[Role, float]
    firing_rate: Mapping[Role, float]


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
                written in a newer format.
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
            manifest = Manifest.model_validate_json(text)
        except (json.JSONDecodeError, AttributeError, ValidationError) as error:
            raise AtlasError(f"{path}/manifest.json cannot be read: {error}") from error
        for name, info in manifest.files.items():
            size = (path / name).stat().st_size if (path / name).exists() else None
            if size != info.bytes:
                have = "missing" if size is None else f"{size} bytes long"
                raise AtlasError(
                    f"{path}/{name} is {have}, not {info.bytes} bytes: the atlas is incomplete. "
                    "Copy it again, or scan again."
                )
        return cls(path, manifest)

    def verify(self) -> None:
        """Compare every file with the hash the scan wrote.

        Raises:
            AtlasError: If one differs.
        """
        for name, info in self.manifest.files.items():
            if _sha256(self.path / name) != info.sha256:
                raise AtlasError(
                    f"{self.path}/{name} is not what the scan wrote: its hash differs."
                )

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
        with self._read(site) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return SiteStatistics.from_state_dict(state, self.manifest.domains)

    def neuron(self, neuron: NeuronId) -> NeuronStatistics:
        """What is known of one neuron; only its own rows are read.

        Raises:
            UnknownNameError: If it is not in this atlas.
        """
        row = self.site(neuron.site).row(neuron)
        with self._read(neuron.site) as file:
            ids, visual, text = (
                file.get_slice(f"top.{name}")[row] for name in ("ids", "visual", "text")
            )
            maximum, total = (file.get_slice(f"role.{n}")[:, row] for n in ("maximum", "total"))
            fired = file.get_slice("fired")[:, :, :, row].sum((0, 1))
            tokens = file.get_tensor("tokens").sum((0, 1))
        present = ids >= 0
        return NeuronStatistics(
            neuron,
            ids[present],
            torch.maximum(visual[:, 0], text[:, 0])[present],
            visual[present],
            text[present],
            dict(zip(COUNTED, maximum.tolist(), strict=True)),
            dict(zip(COUNTED, (total / FIXED_POINT / tokens).tolist(), strict=True)),
            dict(zip(COUNTED, (fired / tokens).tolist(), strict=True)),
        )

    def maximum(self, neuron: NeuronId) -> float:
        """The largest eligible activation over all samples: 10 on the 0..10 scale."""
        by_role = self.neuron(neuron).maximum
        return max(by_role[role] for role in self.eligible)

    @cached_property
    def samples(self) -> dict[int, SampleRecord]:
        """The sample table, by position."""
        try:
            with (self.path / "samples.jsonl").open(encoding="utf-8") as lines:
                records = [SampleRecord.model_validate_json(line) for line in lines]
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise AtlasError(f"{self.path}/samples.jsonl cannot be read: {error}") from error
        return {record.position: record for record in records}

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

    @contextmanager
    def _read(self, site: str) -> Iterator[Any]:
        name = site_file(self.site(site).name)
        try:
            with safe_open(self.path / name, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise AtlasError(f"{self.path}/{name} cannot be read: {error}.") from error

    def __repr__(self) -> str:
        name, samples = self.manifest.model.name, self.manifest.samples
        return f"Atlas({str(self.path)!r}: {name}, {samples} samples)"

    def _repr_html_(self) -> Html:
        manifest, choices = self.manifest, self.choices
        modules = Counter[str]()
        for site in manifest.sites:
            modules[site.module] += site.neurons
        skips = Counter(each.reason for each in manifest.skipped)
        rows = [
            (
                "model",
                f"{manifest.model.name} ({manifest.model.model_type}, {manifest.model.dtype})",
            ),
            ("neurons", ", ".join(f"{module} {count:,}" for module, count in modules.items())),
            ("samples", f"{manifest.samples:,}"),
            ("skipped", ", ".join(f"{n} {reason}" for reason, n in skips.items()) or "none"),
            ("domains", ", ".join(domain or "(none)" for domain in manifest.domains)),
            ("top samples", f"{choices.n} per neuron, by {choices.rank}"),
            ("text tokens", ", ".join(role.name.lower() for role in choices.text_roles)),
        ]
        return table(["atlas", str(self.path)], rows)


def site_file(site: str) -> str:
    """Where a site's statistics lie within the folder."""
    return f"sites/{site}.safetensors"


def require_free(out: str | Path) -> None:
    """Refuse a folder that holds something or cannot be made.

    Raises:
        OutputError: If `out` exists and is not an empty folder, or its parent is not
            writable.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists already and would be overwritten. Choose another folder, or open what "
            "is there."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. Choose another folder."
        ) from error


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that appears at `out` only when the block has ended well.

    Raises:
        OutputError: At the start, if `out` exists and is not empty, or cannot be made.
    """
    out = Path(out)
    require_free(out)
    try:
        working = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    try:
        yield working
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    try:
        working.chmod(0o755)
        if out.exists():
            out.rmdir()
        working.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out} has been taken in the meantime ({error.strerror}). What was made is whole and "
            f"lies in {working}; move it where you want it."
        ) from error


def write(
    folder: Path,
    *,
    model: ModelInfo,
    choices: Choices,
    sites: Sequence[NeuronSite],
    statistics: Mapping[str, SiteStatistics],
    samples: Sequence[SampleRecord],
    skipped: Sequence[Skipped],
    versions: Mapping[str, str],
) -> Manifest:
    """Write an atlas into an empty folder, its manifest last."""
    (folder / "sites").mkdir()
    samples = sorted(samples, key=lambda record: record.position)
    domains = sorted({record.domain or "" for record in samples})
    data = hashlib.sha256()
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for record in samples:
            data.update(record.fingerprint())
            file.write(record.model_dump_json() + "\n")
    for site in sites:
        state = statistics[site.name].state_dict(domains)
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / site_file(site.name))
    names = ["samples.jsonl", *(site_file(site.name) for site in sites)]
    manifest = Manifest(
        model=model,
        choices=choices,
        sites=tuple(sites),
        domains=tuple(domains),
        samples=len(samples),
        skipped=tuple(sorted(skipped, key=lambda each: each.position)),
        data=data.hexdigest(),
        versions=dict(versions),
        files={
            name: FileInfo(bytes=(folder / name).stat().st_size, sha256=_sha256(folder / name))
            for name in names
        },
    )
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
