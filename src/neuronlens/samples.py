"""Samples, how they are read from files, and how they become model inputs."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import AdapterError, DataError, SampleError
from neuronlens.tokens import Role, TokenMap

Picture = Path | Image.Image


@dataclass(frozen=True, eq=False)
class Annotation:
    """A region of an image, and everything it is called.

    Attributes:
        names: Every concept the region is an instance of, such as `("red", "circle")`.
        labels: A map of the image's size in which the region has the value `number`: an
            array, or a path to a PNG.
        number: Value of the region in `labels`.
        image: Number of the image within its sample.
    """

    names: tuple[str, ...]
    labels: Path | NDArray[np.integer[Any]]
    number: int = 1
    image: int = 0

    def mask(self) -> NDArray[np.bool_]:
        """True inside the region, `[height, width]`."""
        labels = _read_labels(self.labels) if isinstance(self.labels, Path) else self.labels
        return np.asarray(labels == self.number)


@lru_cache(maxsize=64)
def _read_labels(path: Path) -> NDArray[np.integer[Any]]:
    try:
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"The label map {path} cannot be read: {error}.") from error


@dataclass(frozen=True, eq=False)
class Sample:
    """One image (or several), what is asked of it, and what is said about it.

    Attributes:
        id: Unique within a data set.
        images: Paths, or pictures in memory.
        prompt: The user's text, without image tokens and chat markers.
        response: The text whose tokens the papers look at; None where there is none.
        domain: Name of the domain, for domain-specific neurons.
        annotations: Named regions, where the data set has them.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    response: str | None = None
    domain: str | None = None
    annotations: tuple[Annotation, ...] = ()

    def __post_init__(self) -> None:
        """Take paths as text, and a single image without a tuple, for what they mean."""
        given: Any = self.images
        several = given if isinstance(given, (tuple, list)) else (given,)
        images = tuple(Path(each) if isinstance(each, str) else each for each in several)
        object.__setattr__(self, "images", images)

    def open_images(self) -> list[Image.Image]:
        """The images as RGB, turned upright as their EXIF data say.

        Raises:
            SampleError: If there is none, or one is missing or not readable.
        """
        if not self.images:
            raise SampleError(self.id, "no image", "give at least one, as `image` or `images`.")
        opened = []
        for source in self.images:
            if isinstance(source, Image.Image):
                opened.append(ImageOps.exif_transpose(source).convert("RGB"))
                continue
            try:
                with Image.open(source) as image:
                    opened.append(ImageOps.exif_transpose(image).convert("RGB"))
            except FileNotFoundError:
                raise SampleError(self.id, "missing image", f"there is no file {source}.") from None
            except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as e:
                raise SampleError(self.id, "corrupt image", f"{source}: {e}.") from e
        return opened

    def concepts(self) -> frozenset[str]:
        """Every name its annotations carry."""
        return frozenset(name for each in self.annotations for name in each.names)


def image_digest(source: Picture) -> str:
    """SHA-256 of a file's bytes, or of a picture's pixels."""
    if isinstance(source, Image.Image):
        return hashlib.sha256(
            repr(source.size).encode() + source.convert("RGB").tobytes()
        ).hexdigest()
    return hashlib.sha256(source.read_bytes()).hexdigest()


class LabelMap(BaseModel):
    """Annotations in a file: a PNG whose values are named."""

    model_config = ConfigDict(extra="forbid")
    labels: str
    names: dict[int, list[str]]
    image: int = 0


class SampleRow(BaseModel):
    """A sample as a line of JSON; paths are relative to the file's folder.

    Other fields are ignored.
    """

    id: str | int | None = None
    image: str | list[str] | None = None
    prompt: str
    response: str | None = None
    domain: str | None = None
    annotations: list[LabelMap] = Field(default_factory=list)

    def sample(self, folder: Path, fallback_id: str) -> Sample:
        """The sample, with its paths made absolute."""
        names = [self.image] if isinstance(self.image, str) else (self.image or [])
        return Sample(
            id=fallback_id if self.id is None else str(self.id),
            images=tuple((folder / name).resolve() for name in names),
            prompt=self.prompt,
            response=self.response,
            domain=self.domain,
            annotations=tuple(
                Annotation(tuple(called), (folder / each.labels).resolve(), number, each.image)
                for each in self.annotations
                for number, called in each.names.items()
            ),
        )


class _Turn(BaseModel):
    speaker: str = Field(alias="from")
    value: str


class _Conversation(BaseModel):
    id: str | int | None = None
    image: str | list[str] | None = None
    conversations: list[_Turn]


def read_samples(path: str | Path, images: str | Path | None = None) -> list[Sample]:
    """Samples from a JSONL file of ours, or from LLaVA's conversation JSON.

    Args:
        path: A `.jsonl` with `image`, `prompt` and optionally `id`, `response`, `domain`,
            `annotations` per line (see `SampleRow`); or a `.json` list of records with
            `image` and `conversations`, of which the first exchange is read.
        images: Folder of the images, if not that of the file.

    Returns:
        The samples in the order of the file. Images are not opened: one that is missing
        or broken is skipped, by name, when it is needed.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If the file is not of either form, or an id occurs twice.
    """
    path = Path(path)
    folder = Path(images) if images is not None else path.parent
    readers = {".jsonl": _read_jsonl, ".json": _read_conversations}
    if path.suffix not in readers:
        raise DataError(
            f"{path} is neither .jsonl (one sample per line) nor .json (LLaVA's conversations)."
        )
    try:
        samples = list(readers[path.suffix](path, folder))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"{path} has two samples with the id {sample.id!r}; ids must differ.")
        seen.add(sample.id)
    if not samples:
        raise DataError(f"{path} holds no sample.")
    return samples


def _read_jsonl(path: Path, folder: Path) -> Iterator[Sample]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = SampleRow.model_validate_json(line)
                except ValidationError as error:
                    raise DataError(f"{path}, line {number}: {_first(error)}") from error
                yield row.sample(folder, str(number - 1))


def _read_conversations(path: Path, folder: Path) -> Iterator[Sample]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(records, list):
        raise DataError(f"{path} should hold a list of records, not {type(records).__name__}.")
    longer = 0
    for number, record in enumerate(records):
        try:
            read = _Conversation.model_validate(record)
        except ValidationError as error:
            raise DataError(f"{path}, record {number}: {_first(error)}") from error
        turns = read.conversations
        if [turn.speaker for turn in turns[:2]] != ["human", "gpt"]:
            said = [turn.speaker for turn in turns[:2]]
            raise DataError(f"{path}, record {number} begins with {said}, not ['human', 'gpt'].")
        longer += len(turns) > 2
        row = SampleRow(
            id=read.id,
            image=read.image,
            prompt=turns[0].value.replace("<image>", "").strip(),
            response=turns[1].value.strip(),
        )
        yield row.sample(folder, str(number))
    if longer:
        warnings.warn(
            f"{longer} of {len(records)} conversations in {path} have more than one exchange; "
            "only the first of each was read.",
            stacklevel=3,
        )


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"]) or "the line"
    return f"{where}: {first['msg']}."


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample that is ready for the processor.

    `roles` are those of `ids`, the text's tokens before images are expanded.
    """

    sample: Sample
    images: tuple[Image.Image, ...]
    text: str
    ids: tuple[int, ...]
    roles: tuple[Role, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs, the token map of every stream, and the samples they come from."""

    inputs: dict[str, Tensor]
    tokens: dict[str, TokenMap]
    samples: tuple[Sample, ...]
    adapter: ModelAdapter

    def pieces(self, sample: int) -> tuple[str, ...]:
        """Text of each language token of one sample, padding left out.

        Joined, they are the text as it was tokenised; image tokens are empty.
        """
        at = self.tokens["language"].where(sample)
        ids = self.inputs["input_ids"].cpu().flatten()[at]
        visual = ids == self.adapter.processor.image_token_id
        return _pieces(self.adapter.processor.tokenizer, ids.tolist(), visual.tolist())

    def map_of(self, sample: int, stream: str = "language") -> TokenMap:
        """The tokens of one sample on one stream, with their text where they have one."""
        pieces = self.pieces(sample) if stream == "language" else None
        return self.tokens[stream].of(sample, pieces)


def _pieces(tokenizer: Any, ids: Sequence[int], visual: Sequence[bool]) -> tuple[str, ...]:
    def text(some: Sequence[int]) -> str:
        decoded: str = tokenizer.decode(some, clean_up_tokenization_spaces=False)
        return decoded

    pieces: list[str] = []
    run: list[int] = []
    shown = told = 0  # where the last two stretches of the run that have their text begin
    for number, (token, is_visual) in enumerate(zip(ids, visual, strict=True)):
        if is_visual:
            pieces.append("")
            run, shown, told = [], 0, 0
            continue
        # Decoded beside its predecessors: alone, many tokenizers drop a token's leading space,
        # and a token may hold some bytes of a character only.
        run.append(token)
        before, both = text(run[shown:told]) if told else "", text(run[shown:])
        is_last = number + 1 == len(ids) or visual[number + 1]
        if both.endswith("\ufffd") and not is_last:
            pieces.append("")
            continue
        pieces.append(both[len(before) :])
        shown, told = told, len(run)
    return tuple(pieces)


def prepare(
    adapter: ModelAdapter, sample: Sample, *, template: bool = True, response: bool = True
) -> Prepared:
    """Open a sample's images, render its text, and find where its response starts.

    Args:
        adapter: Of the model, with its processor.
        sample: The sample.
        template: Whether to render the prompt with the processor's chat template; without
            it the text is the image tokens, the prompt and the response.
        response: Whether a response is needed; one that is there is always used.

    Raises:
        SampleError: If an image cannot be opened, the response is missing, or the
            tokenizer merges prompt and response so that no token starts the response.
        AdapterError: If the adapter has no processor, or the processor no template.
    """
    if adapter.processor is None:
        raise AdapterError("Samples need a processor to become inputs: adapt(model, processor).")
    answer = (sample.response or "").strip()
    if response and not answer:
        raise SampleError(sample.id, "no response", "its text tokens are what is looked at.")
    images = sample.open_images()
    if adapter.processor.image_token in sample.prompt + answer:
        raise SampleError(
            sample.id, "image token in text", f"remove {adapter.processor.image_token!r} from it."
        )
    asked = _rendered(adapter, len(images), sample.prompt, "", template)
    said = _rendered(adapter, len(images), sample.prompt, answer, template) if answer else asked
    asked_ids, said_ids = _ids(adapter, asked), _ids(adapter, said)
    if said_ids[: len(asked_ids)] != asked_ids:
        raise SampleError(
            sample.id,
            "no clear response start",
            f"the prompt alone ends in {_ending(adapter, asked_ids)}, but with the response "
            f"these tokens become {_ending(adapter, said_ids[: len(asked_ids)])}. Encode with "
            "template=False, or let the chat template put a space before the response.",
        )
    head, foot = _markers(adapter, asked_ids, len(images), template)
    roles = (
        [Role.SPECIAL] * head
        + [Role.PROMPT] * (len(asked_ids) - head - foot)
        + [Role.SPECIAL] * foot
        + [Role.RESPONSE] * (len(said_ids) - len(asked_ids))
    )
    return Prepared(sample, tuple(images), said, tuple(said_ids), tuple(roles))


def _rendered(adapter: ModelAdapter, images: int, prompt: str, answer: str, template: bool) -> str:
    processor = adapter.processor
    if not template:
        text = processor.image_token * images + prompt
        return f"{text} {answer}" if answer else text
    if not getattr(processor, "chat_template", None):
        raise AdapterError(
            f"{type(processor).__name__} has no chat template. Set processor.chat_template, or "
            "encode with template=False."
        )
    asked, said = (_from_template(processor, images, prompt, each) for each in ("", answer))
    if not answer:
        return asked
    # The response starts where two answers that share no first character differ.
    other = "\u2603" if not answer.startswith("\u2603") else "0"
    start = _shared(said, _from_template(processor, images, prompt, other))
    if not said.startswith(answer, start):
        raise AdapterError(
            "The chat template changes the response's text, so its tokens cannot be told apart. "
            "Encode with template=False."
        )
    return said[: start + len(answer)]


def _from_template(processor: Any, images: int, prompt: str, answer: str) -> str:
    pictures: list[dict[str, str]] = [{"type": "image"}] * images
    chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
    if answer:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = str(processor.apply_chat_template(chat, add_generation_prompt=not answer))
    written = text.count(processor.image_token)
    if written != images:
        raise AdapterError(
            f"The chat template writes {written} image tokens for {images} images: {text!r}. "
            "Give the processor a template that places each image once."
        )
    return text


def _ids(adapter: ModelAdapter, text: str) -> list[int]:
    ids: list[int] = adapter.processor.tokenizer(
        text, add_special_tokens=_adds_special(adapter, text)
    )["input_ids"]
    return ids


def _adds_special(adapter: ModelAdapter, text: str) -> bool:
    """Whether the tokenizer should add BOS: not if the chat template already did."""
    bos = adapter.processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def _ending(adapter: ModelAdapter, ids: Sequence[int]) -> str:
    return repr(adapter.processor.tokenizer.convert_ids_to_tokens(list(ids[-3:])))


def _markers(adapter: ModelAdapter, ids: list[int], images: int, template: bool) -> tuple[int, int]:
    """How many tokens before and after the user's own text come from the template.

    What two prompts that share nothing have in common is the template's.
    """
    empty = _ids(adapter, _rendered(adapter, images, "", "", template))
    other = _ids(adapter, _rendered(adapter, images, "\u2603 \u2603", "", template))
    head = min(_shared(other, empty), _shared(other, ids))
    foot = min(_shared(other[::-1], empty[::-1]), _shared(other[::-1], ids[::-1]))
    return head, min(foot, len(ids) - head)


def _shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences begin with in common."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def collate(adapter: ModelAdapter, prepared: Sequence[Prepared]) -> Batch:
    """One padded batch: the processor's inputs and complete token maps.

    Raises:
        SampleError: If a sample has more tokens than the model takes.
        AdapterError: If the processor's tokens are not those of the text.
    """
    processor = adapter.processor
    originals = [[image.size for image in each.images] for each in prepared]
    inputs: Mapping[str, Tensor] = processor(
        images=[list(each.images) for each in prepared],
        text=[each.text for each in prepared],
        add_special_tokens=_adds_special(adapter, prepared[0].text),
        padding=True,
        return_tensors="pt",
    )
    lengths = inputs["attention_mask"].sum(1).tolist()
    for each, length in zip(prepared, lengths, strict=True):
        if adapter.max_tokens and length > adapter.max_tokens:
            raise SampleError(
                each.sample.id,
                "too long",
                f"{length} tokens; the model takes {adapter.max_tokens}.",
            )
    tokens = adapter.tokens(inputs, originals)
    role = tokens["language"].role
    for row, each in enumerate(prepared):
        _set_text_roles(adapter, inputs["input_ids"][row], role[row], each)
    return Batch(dict(inputs), tokens, tuple(each.sample for each in prepared), adapter)


def _set_text_roles(
    adapter: ModelAdapter, ids: Int[Tensor, " token"], role: Int[Tensor, " token"], each: Prepared
) -> None:
    image_token = adapter.processor.image_token_id
    at = ((ids != image_token) & (role != Role.PAD)).nonzero().squeeze(1)
    kept = [(i, r) for i, r in zip(each.ids, each.roles, strict=True) if i != image_token]
    if ids[at].tolist() != [i for i, _ in kept]:
        raise AdapterError(
            f"Sample {each.sample.id!r}: the processor's text tokens are not those of its text, so "
            f"roles cannot be told. {type(adapter).__name__} does not fit this processor."
        )
    text = torch.tensor([int(r) for _, r in kept], dtype=role.dtype)
    role[at] = torch.where(role[at] == Role.SPECIAL, role[at], text)


def encode(
    adapter: ModelAdapter,
    samples: Sequence[Sample],
    *,
    template: bool = True,
    response: bool = False,
) -> Batch:
    """Model inputs and complete token maps of some samples, as one batch.

    Args:
        adapter: Of the model, with its processor.
        samples: One or more samples.
        template: Whether to use the processor's chat template.
        response: Whether every sample must have a response.

    Returns:
        The batch. Boxes are in the original images' pixels; text is PROMPT, RESPONSE or,
        where the chat template put it there, SPECIAL. The response is teacher-forced: its
        tokens are inputs like all others.

    Raises:
        SampleError: If one of the samples cannot be used.
    """
    if not samples:
        raise ValueError("No samples given: encode needs at least one.")
    return collate(
        adapter, [prepare(adapter, each, template=template, response=response) for each in samples]
    )
