"""Neurons already explained, which come before a question to a chat model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neuronlens.errors import DataError, UnknownNameError
from neuronlens.neurons import NeuronId

Kind = Literal["visual", "text", "multimodal"]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

WORKED_VERSION: Final = "1"
"""Of the examples; a request that shows other ones is another request."""

PER_KIND: Final = 8


@dataclass(frozen=True)
class WorkedExemplar:
    """One scene, as a neuron responds to it.

    Attributes:
        raw: The scene, a JPEG file; None for a text neuron.
        modulated: The scene under a cover that opens where the neuron is active, a JPEG file
            of the same size; None for a text neuron.
        tokens: Every token of the response with its level, an integer from 0 to 10; empty for
            a visual neuron.
    """

    raw: bytes | None
    modulated: bytes | None
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class WorkedExample:
    """A neuron, two of its top samples, and the right answer.

    Attributes:
        neuron: Of the testbed with planted neurons.
        kind: Its category: what is shown of it.
        exemplars: What it is to be explained from.
        sentence: Completes "the main thing this neuron does is find".
        phrases: What a segmenter should look for; empty for a text neuron.
        words: Words it goes with in text; empty for a visual neuron.
        predicts: Whether it fires on the token before those words.
        confidence: How well the answer covers what is seen, from 0 to 1.
    """

    neuron: NeuronId
    kind: Kind
    exemplars: tuple[WorkedExemplar, ...]
    sentence: str
    phrases: tuple[str, ...]
    words: tuple[str, ...]
    predicts: bool
    confidence: float


def worked_examples(kind: Kind) -> tuple[WorkedExample, ...]:
    """The eight worked examples for a kind of neuron, the same ones at each call.

    Source: P1, appendix A.1 and A.2, Figures 10 and 11: M = 8 worked examples precede a
    question. Its own are not published; these are of the testbed's neurons and checked by hand,
    so that scores need not equal the paper's (docs/methods.md, row 18).

    Raises:
        UnknownNameError: If there is no such kind.
        DataError: If the installed files are damaged.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of worked examples", kind, KINDS)
    return _packaged()[kind]


@lru_cache(maxsize=1)
def _packaged() -> dict[Kind, tuple[WorkedExample, ...]]:
    return read_worked(files("neuronlens.worked") / "data")


class _Stored(BaseModel):
    model_config = ConfigDict(defer_build=True, extra="forbid", strict=True)


class _StoredExemplar(_Stored):
    scene: str
    rank: int
    raw: str | None
    modulated: str | None
    tokens: list[tuple[str, Annotated[int, Field(ge=0, le=10)]]]


class _StoredNeuron(_Stored):
    neuron: str
    kind: Kind
    sentence: str
    phrases: list[str] = Field(max_length=3)
    words: list[str] = Field(max_length=5)
    predicts: bool
    confidence: float = Field(ge=0, le=1)
    exemplars: list[_StoredExemplar] = Field(min_length=1)


class _StoredFile(_Stored):
    version: str
    model: str
    scenes_seed: int
    neurons: list[_StoredNeuron]


def read_worked(folder: Traversable) -> dict[Kind, tuple[WorkedExample, ...]]:
    """The worked examples of a folder that `neuronlens.testbed.worked` wrote.

    Raises:
        DataError: If a file is missing or is not what it was written as.
    """
    try:
        stored = _StoredFile.model_validate_json((folder / "worked.json").read_bytes())
    except OSError as error:
        raise _damaged(folder, f"worked.json cannot be read ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
        raise _damaged(folder, f"worked.json is not as it was written ({said})") from error
    if stored.version != WORKED_VERSION:
        raise _damaged(folder, f"they have version {stored.version!r}, not {WORKED_VERSION!r}")
    found: dict[Kind, tuple[WorkedExample, ...]] = {}
    for kind in KINDS:
        mine = [each for each in stored.neurons if each.kind == kind]
        if len(mine) != PER_KIND:
            raise _damaged(folder, f"it has {len(mine)} {kind} neurons, not {PER_KIND}")
        found[kind] = tuple(_example(folder, each) for each in mine)
    return found


def _example(folder: Traversable, stored: _StoredNeuron) -> WorkedExample:
    try:
        neuron = NeuronId.parse(stored.neuron)
    except ValueError as error:
        raise _damaged(folder, f"{stored.neuron!r} names no neuron") from error
    return WorkedExample(
        neuron=neuron,
        kind=stored.kind,
        exemplars=tuple(
            WorkedExemplar(
                _picture(folder, each.raw), _picture(folder, each.modulated), tuple(each.tokens)
            )
            for each in stored.exemplars
        ),
        sentence=stored.sentence,
        phrases=tuple(stored.phrases),
        words=tuple(stored.words),
        predicts=stored.predicts,
        confidence=stored.confidence,
    )


def _picture(folder: Traversable, name: str | None) -> bytes | None:
    if name is None:
        return None
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{name} cannot be read ({error})") from error
    # The first and last bytes of every JPEG file: enough to notice a file cut short.
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        raise _damaged(folder, f"{name} is not a whole JPEG file")
    return data


def _damaged(folder: Traversable, what: str) -> DataError:
    return DataError(
        f"The worked examples in {folder} are damaged: {what}. Install neuronlens again, or write "
        "them anew: python -m neuronlens.testbed.worked --out FOLDER."
    )
