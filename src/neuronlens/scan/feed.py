"""From planned batches to model inputs, in worker processes that run ahead of the model."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Choices, SampleRecord, Skipped
from neuronlens.errors import AdapterError, SampleError
from neuronlens.samples import Batch, Prepared, Sample, collate, prepare
from neuronlens.scan.plan import Planned
from neuronlens.tokens import Role, TokenMap


@dataclass(frozen=True, eq=False)
class Encoded:
    """A planned batch that is ready for the model.

    Attributes:
        planned: The batch.
        inputs: Model inputs; empty if no sample could be used.
        tokens: The token map of each stream.
        records: Of the samples that can be used, in the order of the batch's rows.
        skipped: Those that cannot.
    """

    planned: Planned
    inputs: dict[str, Any]
    tokens: dict[str, TokenMap]
    records: tuple[SampleRecord, ...]
    skipped: tuple[Skipped, ...]

    def pin_memory(self) -> Encoded:
        """The same, where a GPU can fetch it while the program goes on."""
        for name, value in self.inputs.items():
            if isinstance(value, torch.Tensor):
                self.inputs[name] = value.pin_memory()
        return self


@dataclass(frozen=True)
class _Failed:
    """A batch whose encoding raised in a worker."""

    planned: Planned


class Encoder(Dataset[Encoded]):
    """Opens, processes and maps the samples of a planned batch; samples that fail only leave it."""

    def __init__(self, adapter: ModelAdapter, choices: Choices) -> None:
        self._adapter = adapter
        self._choices = choices

    def __getitem__(self, planned: Planned) -> Encoded:
        """The batch, ready for the model.

        Raises:
            AdapterError: If the processor does not fit the adapter.
        """
        places = {sample.id: position for position, sample in planned.placed}
        skipped: list[Skipped] = []

        def skip(error: SampleError) -> None:
            place = places[error.sample_id]
            skipped.append(skip_record(place, error))

        ready: list[Prepared] = []
        records: dict[str, SampleRecord] = {}
        for position, sample in planned.placed:
            try:
                ready.append(self._prepared(sample))
                pictures = ready[-1].images
                records[sample.id] = SampleRecord.of(sample, position, pictures)
            except SampleError as error:
                skip(error)
        batch: Batch | None = None
        while ready and batch is None:
            try:
                batch = collate(self._adapter, ready)
            except SampleError as error:
                skip(error)
                ready = [each for each in ready if each.sample.id != error.sample_id]
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                # What its processor cannot do (an image of one pixel) is one sample's fault, unless
                # it is everybody's.
                refused = [each.sample.id for each in ready if self._refuses(each)]
                if not refused and len(ready) > 1:
                    raise AdapterError(
                        f"The processor takes these {len(ready)} samples one by one, but not "
                        f"together ({type(error).__name__}: {error}). Scan with batch_size=1."
                    ) from error
                if not refused or (len(refused) == len(ready) and planned.is_first):
                    raise
                for each in refused:
                    detail = f"{type(error).__name__}: {error}"
                    skip(SampleError(each, "refused by the processor", detail))
                ready = [each for each in ready if each.sample.id not in refused]
        if batch is None:
            return Encoded(planned, {}, {}, (), tuple(skipped))
        used = tuple(records[sample.id] for sample in batch.samples)
        return Encoded(planned, batch.inputs, batch.tokens, used, tuple(skipped))

    def _prepared(self, sample: Sample) -> Prepared:
        roles = set(self._choices.text_roles)
        ready = prepare(
            self._adapter,
            sample,
            template=self._choices.template,
            response=roles == {Role.RESPONSE},
        )
        if not roles & set(ready.roles) and not (ready.answer and Role.RESPONSE in roles):
            wanted = " or ".join(role.name.lower() for role in self._choices.text_roles)
            raise SampleError(sample.id, "no eligible text", f"it has no token of its {wanted}.")
        return ready

    def _refuses(self, prepared: Prepared) -> bool:
        try:
            collate(self._adapter, [prepared])
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return True
        return False


def skip_record(position: int, error: SampleError) -> Skipped:
    """How the manifest names a sample that was skipped."""
    return Skipped(position=position, id=error.sample_id, reason=error.reason, detail=str(error))


class _InWorker(Dataset[Encoded | _Failed]):
    """Encoding in another process: what raises there is done again where it can be raised."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __getitem__(self, planned: Planned) -> Encoded | _Failed:
        try:
            return self._encoder[planned]
        except Exception:  # noqa: BLE001 - many errors do not survive the way between processes
            return _Failed(planned)


def default_workers(device: torch.device) -> int:
    """None beside a model that itself needs the processors; up to 8 beside a GPU."""
    if device.type == "cpu" or not sys.platform.startswith("linux"):
        return 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks - 1))


class Feed:
    """Encoded batches in the order of the plan.

    Attributes:
        waited: Seconds that were spent waiting for them.
    """

    def __init__(self, plan: Iterable[Planned], encoder: Encoder, workers: int, pin: bool) -> None:
        self._plan, self._encoder, self._workers, self._pin = plan, encoder, workers, pin
        self.waited = 0.0

    def __iter__(self) -> Generator[Encoded]:
        with closing(self._batches()) as batches:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                if isinstance(batch, _Failed):
                    batch = self._encoder[batch.planned]
                self.waited += time.perf_counter() - start
                if batch is None:
                    return
                yield batch

    def _batches(self) -> Generator[Encoded | _Failed]:
        plan = iter(self._plan)
        # The first batch is not left to workers: what an adapter establishes once, they inherit.
        for planned in islice(plan, 1 if self._workers else None):
            yield self._encoder[planned]
        if self._workers == 0:
            return
        loader: DataLoader[Encoded | _Failed] = DataLoader(
            _InWorker(self._encoder),
            batch_size=None,
            sampler=plan,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            # A copy of the whole process, so that neither model nor processor has to travel.
            multiprocessing_context="fork",
            pin_memory=self._pin,
        )
        running: Any = iter(loader)
        try:
            yield from running
        finally:
            # Not left to the garbage collector: an error that is kept would keep the workers, and
            # they do not end when the program asks them to.
            running._shutdown_workers()


_DIE_WITH_PARENT = 1
"""Linux' PR_SET_PDEATHSIG."""


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(_worker: int) -> None:
    """Signals are the main process' business; it ends its workers, also when it is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A job's end is told to all its processes; without workers there is no checkpoint.
        signal.signal(number, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        # Else a worker whose batches nobody fetches any more waits for ever at its full pipe.
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
