"""Samples from whatever holds them: sequences, iterables, torch and Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from neuronlens.errors import DataError
from neuronlens.samples.read import Turn, first_exchange
from neuronlens.samples.sample import Picture, Sample

_FIELDS = (
    "A row needs `image` (or `images`) and `prompt`, and may have `response`, `id` and `domain`; "
    "or `image` and LLaVA's `conversations`. Rename its columns, or make each row a Sample."
)


@cache
def _turns() -> TypeAdapter[list[Turn]]:
    return TypeAdapter(list[Turn])


def as_sample(item: Any, position: int) -> Sample:
    """A sample as it is, or made from a row of a data set.

    Args:
        item: A `Sample`, or a mapping with `image` or `images` (pictures, paths, bytes, or what
            Hugging Face gives for an undecoded image), `prompt`, and optionally `response`, `id`,
            `domain` and `group`; or with LLaVA's `conversations`, of which the first exchange is
            read.
        position: In the data; the id of a row that has none.

    Raises:
        DataError: If it is neither.
    """
    if isinstance(item, Sample):
        return item
    if not isinstance(item, Mapping):
        raise DataError(
            f"Item {position} of the samples is a {type(item).__name__}, neither a Sample nor a "
            f"row. {_FIELDS}"
        )
    prompt, response = _texts(item, position)
    given = item.get("image") if item.get("image") is not None else item.get("images")
    several = given if isinstance(given, (list, tuple)) else [given]
    identity, domain, group = (item.get(name) for name in ("id", "domain", "group"))
    return Sample(
        id=str(position if identity is None else identity),
        images=tuple(_picture(each, position) for each in several if each is not None),
        prompt=prompt,
        response=response,
        domain=None if domain is None else str(domain),
        group=None if group is None else str(group),
    )


def _texts(item: Mapping[str, Any], position: int) -> tuple[str, str | None]:
    if "conversations" in item:
        try:
            exchange = first_exchange(_turns().validate_python(item["conversations"]))
        except ValidationError:
            exchange = None
        if exchange is None:
            raise DataError(
                f"Row {position} has conversations that do not begin with a turn from 'human' and "
                "one from 'gpt', each with a value."
            )
        return exchange
    prompt, response = item.get("prompt"), item.get("response")
    if not isinstance(prompt, str) or not isinstance(response, (str, type(None))):
        raise DataError(f"Row {position} has the fields {', '.join(map(str, item))}. {_FIELDS}")
    return prompt, response


def _picture(given: Any, position: int) -> Picture:
    if isinstance(given, Mapping):  # as Hugging Face has an image that is not decoded
        given = given.get("bytes") or given.get("path")
    if isinstance(given, (str, Path)):
        return Path(given)
    if isinstance(given, (bytes, Image.Image)):
        return given
    raise DataError(
        f"An image of row {position} is a {type(given).__name__}. Images are paths, pictures of "
        "PIL, or the bytes of image files."
    )


def in_order(samples: Iterable[Any]) -> Iterator[Any]:
    """The items one after the other, images of Hugging Face data sets not decoded.

    Raises:
        DataError: If these are no samples at all.
    """
    if isinstance(samples, (str, Path)):
        raise DataError(f"{str(samples)!r} is a path. Read it first: nl.read_samples(path).")
    if isinstance(samples, (Mapping, Sample)):
        named = f"splits {', '.join(map(str, samples))}" if isinstance(samples, Mapping) else ""
        raise DataError(
            f"A {type(samples).__name__} is no sequence of samples."
            + (f" Choose one of its {named}." if named else " Give a list of samples.")
        )
    source: Any = samples
    if hasattr(source, "cast_column") and hasattr(source, "features"):
        source = _undecoded(source)
    if hasattr(source, "__iter__"):
        yield from source
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        # A torch Dataset need not say when it ends.
        for position in range(len(source)):
            yield source[position]
    else:
        raise DataError(
            f"A {type(samples).__name__} cannot be iterated. Give a list, an iterable or a data "
            "set of samples."
        )


def _undecoded(data: Any) -> Any:
    """A Hugging Face data set whose images come as bytes or paths: workers decode them."""
    from datasets import Image as Feature

    if hasattr(data, "with_format"):
        data = data.with_format(None)
    for name, feature in (data.features or {}).items():
        if isinstance(feature, Feature):
            data = data.cast_column(name, Feature(decode=False))
        elif isinstance(getattr(feature, "feature", None), Feature):
            data = data.cast_column(name, type(feature)(Feature(decode=False)))
    return data
