"""From samples to encoded batches; what cannot be encoded is skipped by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Skipped
from neuronlens.errors import DataError, NeuronLensError, SampleError
from neuronlens.samples import Batch, Picture, Prepared, Sample, collate, image_digest, prepare

Side = Literal["left", "right"]

Placed = tuple[int, Sample]
"""A sample and its position in the caller's sequence."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Samples that are ready for the model together.

    Attributes:
        positions: In the caller's sequence, of the batch's rows.
        prepared: What the batch was made of.
        batch: Inputs and token maps.
    """

    positions: tuple[int, ...]
    prepared: tuple[Prepared, ...]
    batch: Batch

    def alone(self, encoder: Encoder) -> list[Encoded]:
        """Every row by itself; one that can only be encoded in a batch is skipped by name."""
        if len(self.positions) == 1:
            return [self]
        return encoder.of(list(zip(self.positions, self.prepared, strict=True)), together=False)

    def row(self, encoder: Encoder, row: int) -> Encoded | None:
        """One row by itself; None if it can only be encoded in a batch, which is not noted."""
        if len(self.positions) == 1:
            return self
        return encoder.one(self.positions[row], self.prepared[row])


@dataclass(eq=False)
class Encoder:
    """Encodes samples in batches, padded on the side that is needed.

    Attributes:
        adapter: Of the model, with its processor.
        template: Whether the processor's chat template goes around a prompt.
        side: On which side shorter rows are padded.
        response: Whether every sample must have a response.
        skipped: What could not be encoded, so far.
    """

    adapter: ModelAdapter
    template: bool
    side: Side
    response: bool = False
    skipped: list[Skipped] = field(default_factory=list)
    _has_worked: bool = False

    def __call__(self, placed: Sequence[Placed]) -> list[Encoded]:
        """The samples, together if the processor can; those that cannot be encoded are noted.

        Raises:
            AdapterError: If the adapter has no processor, or the processor no template.
        """
        ready: list[tuple[int, Prepared]] = []
        for position, sample in placed:
            try:
                prepared = prepare(
                    self.adapter, sample, template=self.template, response=self.response
                )
            except SampleError as error:
                self.skip(position, error)
            else:
                ready.append((position, prepared))
        return self.of(ready)

    def of(self, ready: Sequence[tuple[int, Prepared]], *, together: bool = True) -> list[Encoded]:
        """Prepared samples as one batch, or each by itself.

        Raises:
            AdapterError: If the adapter does not fit what the processor gives.
        """
        if not ready:
            return []
        if together and len(ready) > 1:
            try:
                return [self._collated(ready)]
            except SampleError as error:
                left = [each for each in ready if each[1].sample.id != error.sample_id]
                if len(left) == len(ready) - 1:  # else one by one tells which of them it is
                    (lost,) = (each for each in ready if each[1].sample.id == error.sample_id)
                    self.skip(lost[0], error)
                    return self.of(left)
            except (ArithmeticError, LookupError, TypeError, ValueError):
                pass  # one sample's fault, or a processor that takes one at a time
        found = []
        first_error: Exception | None = None
        for position, prepared in ready:
            try:
                found.append(self._collated([(position, prepared)]))
            except SampleError as error:
                self.skip(position, error)
            except NeuronLensError:
                raise  # an adapter that does not fit is no sample's fault
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                if first_error is None and not self._has_worked and not found:
                    first_error = error
                detail = f"{type(error).__name__}: {error}"
                refused = SampleError(prepared.sample.id, "refused by the processor", detail)
                self.skip(position, refused)
        if first_error is not None and not found and not self._has_worked:
            raise first_error  # nothing ever worked: it is not the samples' fault
        return found

    def one(self, position: int, prepared: Prepared) -> Encoded | None:
        """A prepared sample by itself; None if it cannot be encoded, which is not noted.

        Raises:
            AdapterError: If the adapter does not fit what the processor gives.
        """
        try:
            return self._collated([(position, prepared)])
        except SampleError:
            return None
        except NeuronLensError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return None

    def skip(self, position: int, error: SampleError) -> None:
        """Note a sample that cannot be used."""
        self.skipped.append(
            Skipped(position=position, id=error.sample_id, reason=error.reason, detail=str(error))
        )

    def _collated(self, ready: Sequence[tuple[int, Prepared]]) -> Encoded:
        positions, prepared = zip(*ready, strict=True)
        with padded_on(self.adapter, self.side):
            batch = collate(self.adapter, prepared)
        self._has_worked = True
        return Encoded(positions, prepared, batch)


@contextmanager
def padded_on(adapter: ModelAdapter, side: Side) -> Iterator[None]:
    """Have the tokenizer pad on one side, for the length of the block."""
    tokenizer = adapter.processor.tokenizer
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        yield
    finally:
        tokenizer.padding_side = before


def require_own_ids(samples: Sequence[Sample]) -> None:
    """Refuse samples that cannot be told apart.

    Raises:
        DataError: If an id occurs twice.
    """
    counted = Counter(each.id for each in samples)
    twice = [id for id, count in counted.items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} ids occur more than once, such as {twice[0]!r}: give each sample an id "
            "of its own."
        )


def parts(count: int, size: int) -> Iterator[range]:
    """Which positions are in each batch: a function of the count and the size only."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def units_of(images: Sequence[Sequence[Picture]]) -> tuple[list[str], list[int]]:
    """What each row's images are, and the number of its unit: rows with the same images share one.

    A file that cannot be read is known by its path.
    """
    known: dict[Path | bytes | int, str] = {}

    def digest(image: Picture) -> str:
        key = id(image) if isinstance(image, Image) else image
        if key not in known:
            try:
                known[key] = image_digest(image)
            except OSError:
                known[key] = f"unreadable: {image!r}"
        return known[key]

    names = ["+".join(digest(image) for image in each) for each in images]
    numbers: dict[str, int] = {}
    return names, [numbers.setdefault(name, len(numbers)) for name in names]


def sample_units(samples: Sequence[Sample]) -> list[int]:
    """The number of each sample's unit: samples of one group, or of the same images, share one."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(each.unit(), len(numbers)) for each in samples]
