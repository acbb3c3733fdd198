"""One pass over the samples: every neuron's top samples, maxima, means and firing counts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from neuronlens import atlas as atlases
from neuronlens.activations import Activation, Routed
from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.atlas import Atlas, Choices, ModelInfo, SampleRecord, Skipped
from neuronlens.errors import AdapterError, DataError, SampleError, SkippedError
from neuronlens.neurons import NeuronSite
from neuronlens.recorder import record
from neuronlens.running import Layout, Reduction, SiteStatistics, reduce
from neuronlens.samples import Batch, Prepared, Sample, collate, prepare
from neuronlens.tokens import Role, TokenMap

TextRole = Literal["prompt", "response"]
Placed = tuple[int, Sample]


def batch_plan(samples: Iterable[Sample], batch_size: int, window: int) -> Iterator[list[Placed]]:
    """Batches of samples of like length, each sample with its position.

    A pure function of its arguments: within every `window` consecutive samples they are
    ordered by the length of their text (then by position) and cut into batches.
    """
    numbered = iter(enumerate(samples))
    while chunk := list(islice(numbered, window)):
        chunk.sort(key=lambda placed: (_length(placed[1]), placed[0]))
        yield from (chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size))


def _length(sample: Sample) -> tuple[int, int]:
    return len(sample.images), len(sample.prompt) + len(sample.response or "")


class _Staging:
    """A recorder's sink that reduces each site of one batch; state changes only at commit."""

    def __init__(self, batch: Batch, choices: Choices) -> None:
        self.reductions: dict[str, Reduction] = {}
        self._samples = len(batch.samples)
        self._choices = choices
        self._layouts: dict[tuple[str, torch.device], Layout] = {}

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        if isinstance(activation, Routed):
            raise TypeError(f"Site {site.name} is routed; scan() refuses such sites.")
        key = (site.stream, activation.device)
        if key not in self._layouts:
            self._layouts[key] = Layout.of(
                tokens, self._samples, self._choices.text_roles, activation.device
            )
        self.reductions[site.name] = reduce(
            activation, self._layouts[key], self._choices.keep_visual, self._choices.keep_text
        )


class _Scan:
    """The state of a scan: statistics per site, the sample table, what was skipped."""

    def __init__(
        self,
        adapter: ModelAdapter,
        sites: Sequence[NeuronSite],
        choices: Choices,
        max_skips: int | None,
    ) -> None:
        self.adapter = adapter
        self.sites = sites
        self.choices = choices
        self.max_skips = max_skips
        self.statistics: dict[str, SiteStatistics] = {}
        self.records: list[SampleRecord] = []
        self.skipped: list[Skipped] = []
        self._ids: set[str] = set()

    def run(self, placed: Sequence[Placed]) -> None:
        """Run one batch and take it in; a sample that fails only leaves its own batch.

        Nothing changes before the forward has ended, so that a batch can be run again.
        """
        places = {id(sample): position for position, sample in placed}
        ids = [sample.id for _, sample in placed]
        for sample_id in ids:
            if sample_id in self._ids or ids.count(sample_id) > 1:
                raise DataError(f"Two samples have the id {sample_id!r}; ids must differ.")
        skipped: list[Skipped] = []
        batch = self._batch([sample for _, sample in placed], places, skipped)
        if batch is not None:
            staging = _Staging(batch, self.choices)
            inputs = batch.on(self.adapter.device)
            with torch.inference_mode(), record(self.adapter, self.sites, staging, batch.tokens):
                self.adapter.forward(inputs)
            keep = _finite(batch, staging.reductions, places, skipped)
            records = [
                SampleRecord.of(sample, places[id(sample)])
                for sample, kept in zip(batch.samples, keep.tolist(), strict=True)
                if kept
            ]
            self._commit(batch, staging.reductions, places, keep)
            self.records += records
        self._ids.update(ids)
        self.skipped += skipped
        if self.max_skips is not None and len(self.skipped) > self.max_skips:
            raise SkippedError(
                f"{len(self.skipped)} samples had to be skipped; max_skips is {self.max_skips}.\n"
                + "\n".join(each.detail for each in self.skipped)
            )

    def _batch(
        self, samples: Sequence[Sample], places: Mapping[int, int], skipped: list[Skipped]
    ) -> Batch | None:
        needs_response = set(self.choices.text_roles) == {Role.RESPONSE}
        template = self.choices.template
        ready: list[Prepared] = []
        for sample in samples:
            try:
                ready.append(
                    prepare(self.adapter, sample, template=template, response=needs_response)
                )
            except SampleError as error:
                skipped.append(_skip(places[id(sample)], error))
        while ready:
            try:
                return collate(self.adapter, ready)
            except SampleError as error:
                gone = next(each for each in ready if each.sample.id == error.sample_id)
                skipped.append(_skip(places[id(gone.sample)], error))
                ready.remove(gone)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                # What its processor cannot do (an image of one pixel) is one sample's fault, unless
                # it is everybody's.
                refused = [each for each in ready if self._refuses(each)]
                if not refused or (len(refused) == len(ready) and not self.records):
                    raise
                for each in refused:
                    detail = f"{type(error).__name__}: {error}"
                    reason = SampleError(each.sample.id, "refused by the processor", detail)
                    skipped.append(_skip(places[id(each.sample)], reason))
                    ready.remove(each)
        return None

    def _refuses(self, prepared: Prepared) -> bool:
        try:
            collate(self.adapter, [prepared])
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return True
        return False

    def _commit(
        self,
        batch: Batch,
        reductions: Mapping[str, Reduction],
        places: Mapping[int, int],
        keep: Bool[Tensor, " sample"],
    ) -> None:
        for site in self.sites:
            reduction = reductions[site.name]
            if site.name not in self.statistics:
                self.statistics[site.name] = SiteStatistics(
                    site.neurons,
                    self.choices.n,
                    self.choices.keep_visual,
                    self.choices.keep_text,
                    reduction.visual.dtype,
                )
            self.statistics[site.name].update(
                reduction,
                [places[id(sample)] for sample in batch.samples],
                [sample.id for sample in batch.samples],
                [sample.domain or "" for sample in batch.samples],
                keep,
            )


def _finite(
    batch: Batch,
    reductions: Mapping[str, Reduction],
    places: Mapping[int, int],
    skipped: list[Skipped],
) -> Bool[Tensor, " sample"]:
    """Which samples of the batch had finite activations everywhere; the others are skipped."""
    keep = torch.ones(len(batch.samples), dtype=torch.bool)
    for name, reduction in reductions.items():
        finite = reduction.finite.cpu()
        for row in (keep & ~finite).nonzero().squeeze(1).tolist():
            sample = batch.samples[row]
            error = SampleError(sample.id, "non-finite activations", f"first at site {name}.")
            skipped.append(_skip(places[id(sample)], error))
        keep &= finite
    return keep


def _skip(position: int, error: SampleError) -> Skipped:
    return Skipped(position=position, id=error.sample_id, reason=error.reason, detail=str(error))


def scan(
    adapter: ModelAdapter,
    samples: Iterable[Sample],
    *,
    out: str | Path,
    sites: SiteSelection = None,
    n: int = 50,
    keep_visual: int = 5,
    keep_text: int = 3,
    text_roles: Iterable[TextRole] = ("response",),
    template: bool = True,
    batch_size: int = 8,
    window: int | None = None,
    max_skips: int | None = None,
    progress: bool = False,
) -> Atlas:
    """Find each neuron's top samples, and count how it fires, in one pass.

    A sample that cannot be used (its image missing or corrupt, no response where one is
    needed, too long, activations not finite) is skipped, counted and named in the manifest.

    Args:
        adapter: Of the model, with its processor.
        samples: Any iterable of samples with different ids.
        out: Folder to write. It appears when the scan is complete.
        sites: Sites, modules, names, or None for every site.
        n: How many top samples to keep per neuron (P1: 50).
        keep_visual: How many of a sample's largest visual activations to keep: one more
            than the largest n_v to classify with.
        keep_text: Likewise for text and n_t.
        text_roles: Which text is eligible beside visual tokens. With the response alone,
            samples need one.
        template: Whether to use the processor's chat template.
        batch_size: Samples per forward.
        window: Samples are ordered by length within this many; 16 batches by default.
        max_skips: Stop when more samples than this had to be skipped; None for no limit.
        progress: Whether to show a progress bar.

    Returns:
        The atlas, opened.

    Source: P1, sections 3.2 and 4.1, with the readings of docs/methods.md.

    Raises:
        OutputError: If `out` holds something, or cannot be written.
        SkippedError: If more than `max_skips` samples, or all of them, were skipped.
        DataError: If two samples have the same id.
        AdapterError: If the model is in training mode, or a chosen site is routed to experts.
    """
    for name, value in {
        "n": n,
        "keep_visual": keep_visual,
        "keep_text": keep_text,
        "batch_size": batch_size,
        "window": 1 if window is None else window,
    }.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    roles = tuple(sorted({_text_role(each) for each in text_roles}))
    if not roles:
        raise ValueError("text_roles is empty. Give 'response', 'prompt' or both.")
    adapter.require_eval()
    chosen = adapter.select(sites)
    routed = [site.name for site in chosen if site.experts]
    if routed:
        raise AdapterError(
            f"Sites {', '.join(routed[:4])}{', ...' if len(routed) > 4 else ''} are routed to "
            "experts, which a scan cannot count yet (record(), ActivationRecorder, look and "
            "deactivate can). Scan the others: sites=[site for site in adapter.sites.values() if "
            "not site.experts]."
        )
    choices = Choices(
        n=n,
        keep_visual=keep_visual,
        keep_text=keep_text,
        text_roles=roles,
        neuron=adapter.neuron_kind,
        template=template,
        batch_size=batch_size,
        window=16 * batch_size if window is None else window,
    )
    with atlases.new_folder(out) as folder:
        state = _Scan(adapter, chosen, choices, max_skips)
        total = len(samples) if isinstance(samples, Sequence) else None
        with tqdm(total=total, unit="sample", disable=not progress) as bar:
            for placed in batch_plan(samples, choices.batch_size, choices.window):
                state.run(placed)
                bar.update(len(placed))
        if not state.records:
            raise SkippedError(
                f"None of {len(state.skipped)} samples could be used, for example:\n"
                + "\n".join(each.detail for each in state.skipped[:5])
            )
        manifest = atlases.write(
            folder,
            model=ModelInfo(
                name=adapter.name,
                model_type=adapter.model_type,
                fingerprint=adapter.fingerprint(),
                dtype=str(adapter.dtype).removeprefix("torch."),
            ),
            choices=choices,
            sites=chosen,
            statistics=state.statistics,
            samples=state.records,
            skipped=state.skipped,
            versions=_versions(),
        )
    if manifest.skipped:
        reasons = Counter(each.reason for each in manifest.skipped)
        warnings.warn(
            f"{len(manifest.skipped)} of {len(manifest.skipped) + manifest.samples} samples were "
            f"skipped: {', '.join(f'{count} {reason}' for reason, count in reasons.items())}. "
            "They are named in atlas.manifest.skipped.",
            stacklevel=2,
        )
    return Atlas.open(out)


def _text_role(name: str) -> Role:
    if name not in ("prompt", "response"):
        raise ValueError(f"No text role {name!r}. Text roles are 'prompt' and 'response'.")
    return Role[name.upper()]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("neuronlens-vlm", "torch", "transformers", "numpy")
    return {package: version(package) for package in packages}
