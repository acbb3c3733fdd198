"""The scan itself: one pass, from the samples to the atlas."""

from __future__ import annotations

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.atlas import (
    Atlas,
    Choices,
    ModelInfo,
    Session,
    Shard,
    locked,
    require_free,
    require_space,
)
from neuronlens.errors import AtlasError, DataError, OutputError
from neuronlens.neurons import NeuronSite
from neuronlens.scan.checkpoint import Progress, Saved, Workplace, differences
from neuronlens.scan.feed import Encoder, Feed, default_workers
from neuronlens.scan.finish import Part, parts_of, put_together
from neuronlens.scan.interrupt import listening
from neuronlens.scan.plan import Plan, Planned
from neuronlens.scan.ranks import Ranks, ranks
from neuronlens.scan.size import size_of
from neuronlens.scan.state import ScanState, StateDevice
from neuronlens.tokens import Role

TextRole = Literal["prompt", "response"]

_log = logging.getLogger("neuronlens.scan")

_WORTH = 50
"""A checkpoint may cost a 50th of the time since the last one."""


def scan(
    adapter: ModelAdapter,
    samples: Iterable[Any],
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
    workers: int | None = None,
    state: StateDevice = "layer",
    shard: tuple[int, int] | None = None,
    resume: bool = True,
    checkpoint_seconds: float = 300,
    progress: bool = False,
) -> Atlas:
    """Find each neuron's top samples, and count how it fires, in one pass.

    A sample that cannot be used (its image missing or corrupt, no eligible text, too long,
    activations not finite) is skipped, counted and named in the manifest.

    A scan that was interrupted, even killed, goes on from its last checkpoint when it is called
    again with the same arguments; the atlas is the same, bit for bit, as without the
    interruption. Until it is done, checkpoints lie in the hidden folder `.NAME.scan` beside
    `out`. A finished scan is opened, not repeated.

    Under `torchrun`, or where a process group of `torch.distributed` has been set up, the ranks
    share the work, and every rank returns the same atlas. Without either, give each job of an
    array its `shard` and a folder of its own, and join them with `Atlas.merge`.

    Args:
        adapter: Of the model, with its processor.
        samples: A sequence or iterable of samples or rows, a torch or a Hugging Face data set
            (fields: `image` or `images`, `prompt`, and optionally `response`, `id`, `domain`;
            or LLaVA's `conversations`). Ids must differ.
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
        max_skips: Stop when more samples than this had to be skipped (of this rank's); None for
            no limit.
        workers: Processes that open and process samples ahead of the model. By default none
            beside a model on the CPU, which needs the processors itself, and up to 8 beside a
            GPU.
        state: Whether running statistics lie beside their layer or in the machine's memory
            (`"cpu"`), which saves room on a GPU and costs time.
        shard: `(i, n)` for the i-th of n shards, from 0.
        resume: Whether to go on with what an interrupted scan left; False discards that.
        checkpoint_seconds: Time between checkpoints, at least; they never cost more than a 50th
            of the time.
        progress: Whether to show a progress bar, the sizes before and a summary afterwards.

    Returns:
        The atlas, opened.

    Source: P1, sections 3.2 and 4.1, with the readings of docs/methods.md.

    Raises:
        OutputError: If `out` or an unfinished scan beside it is of something else, is being
            written by another run, or the disk is full.
        SkippedError: If more than `max_skips` samples, or all of them, were skipped.
        DataError: If two samples have the same id, or something given is no sample.
        AdapterError: If the model is in training mode.
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
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 or more.")
    if workers and "fork" not in get_all_start_methods():
        raise ValueError("Workers are forked, which this system cannot. Give workers=0.")
    if state not in ("layer", "cpu"):
        raise ValueError(f"No place {state!r} for the state. Give 'layer' or 'cpu'.")
    roles = tuple(sorted({_text_role(each) for each in text_roles}))
    if not roles:
        raise ValueError("text_roles is empty. Give 'response', 'prompt' or both.")
    adapter.require_eval()
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
    with ranks(_shard(shard)) as mine:
        run = _Run(
            adapter,
            adapter.select(sites),
            choices,
            mine,
            None if shard is None else mine.shard,
            Path(out),
            workers=default_workers(adapter.device) if workers is None else workers,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress and mine.is_first,
        )
        run.state.max_skips, run.state.where = max_skips, state
        atlas = run(samples, resume)
    skipped = atlas.manifest.skipped
    if skipped and mine.is_first:
        total = len(skipped) + atlas.manifest.samples
        warnings.warn(
            f"{len(skipped)} of {total} samples were skipped: {atlas.manifest.reasons()}. "
            "They are named in atlas.manifest.skipped.",
            stacklevel=2,
        )
    return atlas


class _Run:
    """One call of `scan`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        sites: Sequence[NeuronSite],
        choices: Choices,
        mine: Ranks,
        kept_as: Shard | None,
        out: Path,
        *,
        workers: int,
        checkpoint_seconds: float,
        progress: bool,
    ) -> None:
        self.adapter, self.choices, self.ranks, self.out = adapter, choices, mine, out
        self.kept_as = kept_as
        self.root = out.parent / f".{out.name}.scan"
        self.place = Workplace(self.root, mine.shard)
        self.workers, self.every, self.shows = workers, checkpoint_seconds, progress
        self.state = ScanState(
            adapter, sites, choices, runs_behind=adapter.device.type not in ("cpu", "meta")
        )
        self.progress = Progress(
            model=ModelInfo(
                name=adapter.name,
                model_type=adapter.model_type,
                fingerprint=adapter.fingerprint(),
                dtype=str(adapter.dtype).removeprefix("torch."),
                revision=adapter.revision,
            ),
            choices=choices,
            sites=tuple(sites),
            shard=mine.shard,
            versions=_versions(),
        )
        self.session = Session(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            workers=workers,
            device=str(adapter.device),
            threads=torch.get_num_threads(),
            shard=mine.shard,
        )
        self._start = self._saved_at = time.perf_counter()
        self._cost = 0.0

    def __call__(self, samples: Iterable[Any], resume: bool) -> Atlas:
        if self._is_finished(samples):
            if self.ranks.is_first:  # killed after the atlas was in its place
                shutil.rmtree(self.root, ignore_errors=True)
        else:
            with self.place.taken():
                others = self.place.others(self._is_alone)
                if others and resume:
                    raise OutputError(
                        f"{self.root} holds the unfinished work of another number of processes, or "
                        f"of another shard ({others[0].name}). Run with that number again, give "
                        "each shard a folder of its own, or discard it with resume=False."
                    )
                if not resume:
                    self.place.clear()
                    for other in others if self.ranks.is_first else ():
                        with locked(other / "lock"):
                            shutil.rmtree(other, ignore_errors=True)
                self._scan(samples, self.place.restore())
                self.ranks.meet()
                if self.ranks.is_first:
                    self._put_together()
                self.ranks.meet()
            if self.ranks.is_first:
                shutil.rmtree(self.root, ignore_errors=True)
        self.ranks.meet()
        return Atlas.open(self.out)

    @property
    def _is_alone(self) -> bool:
        """Whether no other rank has a part in the atlas."""
        return self.kept_as is not None or self.ranks.shard.count == 1

    # Before.

    def _is_finished(self, samples: Iterable[Any]) -> bool:
        """Whether `out` is the atlas of this very scan.

        Raises:
            OutputError: If it holds something else.
        """
        try:
            found = Atlas.open(self.out).manifest
        except AtlasError:
            require_free(self.out)
            return False
        apart = differences(self.progress, found)
        if found.shard != self.kept_as:
            apart.append(f"shard {found.shard or 'none'}, not {self.kept_as or 'none'}")
        if not apart:
            plan = self._plan(samples)
            for _ in plan:
                pass
            if [part.plan for part in found.parts] != [plan.chain]:
                apart.append("other samples")
        if apart:
            raise OutputError(
                f"{self.out} holds another scan already ({'; '.join(apart)}), which would be "
                "overwritten. Choose another folder, or open what is there."
            )
        _log.info("%s is this scan already; it is opened.", self.out)
        return True

    def _plan(self, samples: Iterable[Any]) -> Plan:
        size, window = self.choices.batch_size or 1, self.choices.window or 1
        return Plan(samples, size, window, self.ranks.shard)

    def _restore(self, saved: Saved) -> None:
        before = saved.progress
        apart = differences(self.progress, before)
        if apart:
            raise OutputError(
                f"{self.root} holds an unfinished scan that is another one: {'; '.join(apart)}. "
                "Scan into another folder, or discard it with resume=False."
            )
        now = self.progress.versions
        if before.versions != now:
            warnings.warn(
                f"This scan was begun with {_listed(before.versions)}, and goes on with "
                f"{_listed(now)}: numbers may be rounded otherwise.",
                stacklevel=6,
            )
        self.state.restore(saved)
        self.progress = before.model_copy(update={"versions": now})
        _log.info("Going on after %d samples, from %s.", before.samples, saved.folder)

    def _require_space(self) -> None:
        choices, domains = self.choices, max(1, len(self.progress.domains))
        kept = choices.n, choices.keep_visual, choices.keep_text
        size = size_of(self.progress.sites, self.adapter.dtype, *kept, domains)
        _log.info("%s", size)
        if self.shows:
            tqdm.write(f"scan: {size}", file=sys.stderr)
        require_space(self.place.folder, size.disk, f"A scan of {size.neurons:,} neurons")

    # The pass.

    def _scan(self, samples: Iterable[Any], saved: Saved | None) -> None:
        if saved is not None:
            self._restore(saved)
        self._require_space()
        plan = self._plan(samples)
        self.feed = Feed(
            self._remaining(plan),
            Encoder(self.adapter, self.choices),
            self.workers,
            pin=self.adapter.device.type == "cuda",
        )
        total = _length(samples)
        bar = tqdm(
            total=None if total is None else -(-total // self.ranks.shard.count),
            initial=self.state.samples + len(self.state.skipped),
            unit="sample",
            disable=not self.shows,
            smoothing=0.05,
        )
        with bar, listening() as asked, closing(iter(self.feed)) as batches:
            try:
                for encoded in batches:
                    self.state.run(encoded)
                    self._note()
                    bar.update(len(encoded.planned.placed))
                    if self.state.skipped:
                        bar.set_postfix(skipped=len(self.state.skipped), refresh=False)
                    if self._is_due():
                        self._save()
                    asked.act()
                self.state.finish()
            except BaseException as error:
                self._save_what_is_whole(error)
                raise
        self._note()
        self._write_records(None)
        self.progress.plan, self.progress.positions = plan.chain, plan.positions
        if not self._is_alone:
            self._save()  # for the first rank, which puts the atlas together

    def _remaining(self, plan: Plan) -> Iterator[Planned]:
        """The batches that have not been taken in; those that have are compared.

        Raises:
            DataError: If the samples are not those the scan began with.
        """
        begun = self.progress
        done, window, chain = begun.next_batch, begun.window, begun.chain
        is_same = window < 0
        for planned in plan:
            if planned.window == window and not is_same:
                is_same = planned.chain == chain
                if not is_same:
                    break
            if planned.index >= done:
                yield planned
        if not is_same:
            raise DataError(
                f"{self.root} holds an unfinished scan of other samples: their ids or texts, up to "
                "where it was interrupted, are not these. Give the same samples, choose another "
                "folder, or discard it with resume=False."
            )

    def _note(self) -> None:
        """Note where the scan is; a window that is done is written."""
        if self.state.last is not None:
            planned = self.state.last.planned
            if planned.window != self.progress.window:
                self._write_records(planned)
            self.progress.next_batch = planned.index + 1
            self.progress.window, self.progress.chain = planned.window, planned.chain

    def _write_records(self, newest: Planned | None) -> None:
        """Append the records before a batch to the table, in the order of their positions."""
        waiting = {position for position, _ in newest.placed} if newest else set()
        records = self.state.records
        done = [record for record in records if record.position not in waiting]
        self.state.is_whole = False  # until the end: a table that was cut short is not to be saved
        self.place.append(sorted(done, key=lambda record: record.position))
        self.state.records = [record for record in records if record.position in waiting]
        self.state.is_whole = True

    # Checkpoints.

    def _is_due(self) -> bool:
        since = time.perf_counter() - self._saved_at
        return since >= max(self.every, _WORTH * self._cost)

    def _save(self) -> None:
        self.state.finish()
        self._note()
        known = self.state.statistics
        self._cost = self.place.save(
            self._now(), (lambda site: known[site.name]) if known else None
        )
        self.session.saving += self._cost
        self._saved_at = time.perf_counter()

    def _now(self) -> Progress:
        before = self.progress.sessions
        session = self.session.model_copy(
            update={
                "samples": self.state.samples - sum(each.samples for each in before),
                "seconds": time.perf_counter() - self._start,
                "waited": self.feed.waited,
            }
        )
        return self.progress.model_copy(
            update={
                "samples": self.state.samples,
                "pending": self.state.records,
                "skipped": self.state.skipped,
                "domains": list(self.state.domains),
                "sessions": [*before, session],
            }
        )

    def _save_what_is_whole(self, error: BaseException) -> None:
        """Keep what has been taken in, unless something was taken in half."""
        full = isinstance(error, OutputError)
        if full or not self.state.is_whole or not self.state.samples or self.state.last is None:
            return
        try:
            self._save()
        except Exception as second:  # noqa: BLE001 - the first error is the one to raise
            error.add_note(f"What had been scanned since the last checkpoint is lost: {second}")
        else:
            kept = (
                f"{self.state.samples} samples had been scanned and are kept in {self.root}: the "
                "same scan goes on from there."
            )
            error.add_note(kept)
            if isinstance(error, SystemExit):  # of which Python prints no notes
                _log.warning("%s", kept)

    # After.

    def _put_together(self) -> None:
        if self._is_alone:
            parts = [Part(self.place, self._now(), self.state.statistics)]
        else:
            parts = parts_of(self.root, self.progress)
        put_together(self.root, self.out, parts, self.kept_as)
        summary = Atlas.open(self.out).summary()
        _log.info("%s", summary)
        if self.shows:
            tqdm.write(f"scan: {summary}", file=sys.stderr)


def _length(samples: Iterable[Any]) -> int | None:
    try:
        return len(samples)  # type: ignore[arg-type]
    except TypeError:
        return None


def _shard(given: tuple[int, int] | None) -> Shard | None:
    if given is None:
        return None
    index, count = given
    if not 0 <= index < count:
        raise ValueError(f"shard={given}: give (i, n) with i from 0 to n - 1.")
    return Shard(index=index, count=count)


def _text_role(name: str) -> Role:
    if name not in ("prompt", "response"):
        raise ValueError(f"No text role {name!r}. Text roles are 'prompt' and 'response'.")
    return Role[name.upper()]


def _versions() -> dict[str, str]:
    packages = ("neuronlens-vlm", "torch", "transformers", "numpy")
    return {package: version(package) for package in packages}


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
