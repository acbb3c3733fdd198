"""From samples to model inputs and complete token maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import AdapterError, SampleError
from neuronlens.samples.sample import Sample
from neuronlens.tokens import Role, TokenMap


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample that is ready for the processor.

    `roles` are those of `ids`, the text's tokens before images are expanded. `answer` is the
    response of a model that reads it in its decoder; it is not in `text`.
    """

    sample: Sample
    images: tuple[Image.Image, ...]
    text: str
    ids: tuple[int, ...]
    roles: tuple[Role, ...]
    answer: str = ""


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs, the token map of every stream, and the samples they come from."""

    inputs: dict[str, Any]
    tokens: dict[str, TokenMap]
    samples: tuple[Sample, ...]
    adapter: ModelAdapter

    def on(self, device: torch.device) -> dict[str, Any]:
        """The inputs with their tensors on `device`."""
        return {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }

    def ids(self, stream: str = "language") -> Int[Tensor, "batch token"]:
        """Token ids on a stream of text, on the CPU; 0 where the model puts an image itself."""
        name = self.adapter.text_input if stream == "language" else "decoder_input_ids"
        ids: Tensor = self.inputs[name].cpu()
        # Images that the model puts before the text have no token of their own.
        return F.pad(ids, (self.tokens[stream].role.shape[1] - ids.shape[1], 0))

    def pieces(self, sample: int, stream: str = "language") -> tuple[str, ...]:
        """Text of each token of one sample on a stream of text, padding left out.

        Joined, they are the text as it was tokenised; image tokens are empty.
        """
        tokens = self.tokens[stream]
        at = tokens.where(sample)
        kept = self.ids(stream).flatten()[at].tolist()
        visual = (tokens.role.flatten()[at] == Role.VISUAL).tolist()
        is_image = [
            known or seen
            for known, seen in zip(_is_placeholder(self.adapter, kept), visual, strict=True)
        ]
        return _pieces(self.adapter.processor.tokenizer, kept, is_image)

    def map_of(self, sample: int, stream: str = "language") -> TokenMap:
        """The tokens of one sample on one stream, with their text where they have one."""
        is_text = stream in ("language", self.adapter.answer_stream)
        pieces = self.pieces(sample, stream) if is_text else None
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
    if adapter.one_image and len(images) > 1:
        raise SampleError(
            sample.id,
            "several images",
            f"{type(adapter.model).__name__} takes one image with each text, not {len(images)}.",
        )
    for token in _image_tokens(adapter):
        if token in sample.prompt + answer:
            raise SampleError(sample.id, "image token in text", f"remove {token!r} from it.")
    asked = _rendered(adapter, len(images), sample.prompt, "", template)
    decoded = answer if adapter.answer_stream != "language" else ""
    if decoded:
        answer = ""
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
    return Prepared(sample, tuple(images), said, tuple(said_ids), tuple(roles), decoded)


def _image_tokens(adapter: ModelAdapter) -> set[str]:
    """The text that a processor, or the model, takes for an image or a video."""
    processor = adapter.processor
    ids = adapter.placeholder_ids()
    known = {adapter.image_token, *processor.tokenizer.convert_ids_to_tokens(ids)}
    known |= {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
    return {str(each) for each in known if each and str(each).strip()}


def _rendered(adapter: ModelAdapter, images: int, prompt: str, answer: str, template: bool) -> str:
    processor = adapter.processor
    if not template:
        text = adapter.image_text * images + prompt
        return f"{text}{adapter.before_response}{answer}" if answer else text
    if not getattr(processor, "chat_template", None):
        raise AdapterError(
            f"{type(processor).__name__} has no chat template. Set processor.chat_template, or "
            "encode with template=False."
        )
    asked, said = (_from_template(adapter, images, prompt, each) for each in ("", answer))
    if not answer:
        return asked
    # The response starts where two answers that share no first character differ.
    other = "\u2603" if not answer.startswith("\u2603") else "0"
    start = _shared(said, _from_template(adapter, images, prompt, other))
    if not said.startswith(answer, start):
        raise AdapterError(
            "The chat template changes the response's text, so its tokens cannot be told apart. "
            "Encode with template=False."
        )
    return said[: start + len(answer)]


def _from_template(adapter: ModelAdapter, images: int, prompt: str, answer: str) -> str:
    processor = adapter.processor
    pictures: list[dict[str, str]] = [{"type": "image"}] * images
    chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
    if answer:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = str(processor.apply_chat_template(chat, add_generation_prompt=not answer))
    token = adapter.image_token
    written = text.count(token) if token else images
    if written != images:
        raise AdapterError(
            f"The chat template writes {written} image tokens for {images} images: {text!r}. "
            "Give the processor a template that places each image once."
        )
    return text


def _ids(adapter: ModelAdapter, text: str) -> list[int]:
    """The text's tokens, without what the tokenizer puts behind every text (BERT's, T5's)."""
    tokenizer = adapter.processor.tokenizer
    adds = _adds_special(adapter, text)
    ids: list[int] = tokenizer(adapter.as_processed(text), add_special_tokens=adds)["input_ids"]
    if not adds or not ids:
        return ids
    empty: list[int] = tokenizer("", add_special_tokens=True)["input_ids"]
    behind = 0
    while behind < len(empty) and ids[-1 - behind] == empty[-1 - behind] != tokenizer.bos_token_id:
        behind += 1
    return ids[: len(ids) - behind]


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
    originals = [[image.size for image in each.images] for each in prepared]
    inputs: Mapping[str, Any] = adapter.process(
        [each.text for each in prepared],
        [list(each.images) for each in prepared],
        add_special_tokens=_adds_special(adapter, prepared[0].text),
    )
    inputs = {
        name: value.to(adapter.dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    if adapter.answer_stream != "language":
        inputs = adapter.with_answers(inputs, [each.answer for each in prepared])
    ids = inputs[adapter.text_input]
    mask = inputs.get(adapter.text_mask)
    lengths = (torch.ones_like(ids) if mask is None else mask).sum(1).tolist()
    for each, length in zip(prepared, lengths, strict=True):
        if adapter.max_tokens and length > adapter.max_tokens:
            raise SampleError(
                each.sample.id,
                "too long",
                f"{length} tokens; the model takes {adapter.max_tokens}.",
            )
    tokens = adapter.tokens(inputs, originals)
    role = tokens["language"].role
    prefix = role.shape[1] - ids.shape[1]
    for row, each in enumerate(prepared):
        _set_text_roles(adapter, ids[row], role[row, prefix:], each)
    if adapter.answer_stream != "language":
        answered = tokens[adapter.answer_stream].role
        answered[answered == Role.PROMPT] = Role.RESPONSE
    return Batch(dict(inputs), tokens, tuple(each.sample for each in prepared), adapter)


def _set_text_roles(
    adapter: ModelAdapter, ids: Int[Tensor, " token"], role: Int[Tensor, " token"], each: Prepared
) -> None:
    """Give the text's tokens their roles; what the processor added for an image is SPECIAL."""
    at = (role != Role.PAD).nonzero().squeeze(1)
    found = _aligned(adapter, ids[at].tolist(), each)
    if found is None:
        raise AdapterError(
            f"Sample {each.sample.id!r}: the processor's text tokens are not those of its text, so "
            f"roles cannot be told. {type(adapter).__name__} does not fit this processor."
        )
    now = role[at]
    given = torch.tensor([int(Role.SPECIAL if r is None else r) for r in found], dtype=role.dtype)
    keeps = (now == Role.SPECIAL) | (now == Role.VISUAL)
    role[at] = torch.where(keeps, now, given)


def _is_placeholder(adapter: ModelAdapter, ids: Sequence[int]) -> list[bool]:
    known = set(adapter.placeholder_ids())
    return [each in known for each in ids]


def _aligned(adapter: ModelAdapter, ids: list[int], each: Prepared) -> list[Role | None] | None:
    """The role of every token, told by the text before its images were expanded.

    A processor puts any number of tokens in an image's place: placeholders, and markers
    between rows and tiles. The text between two images is found behind the first of them,
    the text behind the last one at the end. None stands for what was put there; None for
    the whole list if the text is not found.
    """
    written = adapter.processor.tokenizer.convert_tokens_to_ids(adapter.image_token or [])
    placeholder = [
        known or token == written
        for known, token in zip(_is_placeholder(adapter, each.ids), each.ids, strict=True)
    ]
    segments: list[list[tuple[int, Role]]] = [[]]
    was_image = False
    for token, role, is_image in zip(each.ids, each.roles, placeholder, strict=True):
        if is_image and not was_image:
            segments.append([])
        elif not is_image:
            segments[-1].append((token, role))
        was_image = is_image
    roles: list[Role | None] = [None] * len(ids)
    special = set(adapter.processor.tokenizer.all_special_ids)
    start = 0
    if len(segments) > 1:
        first = segments.pop(0)
        while not _put(roles, ids, start, first):  # a processor may begin with a BOS of its own
            if start == len(ids) or ids[start] not in special:
                return None
            start += 1
        start += len(first)
    last = segments.pop()
    end = len(ids) - len(last)
    while not _put(roles, ids, end, last):  # it may end with an EOS of its own
        if end <= start or ids[end + len(last) - 1] not in special:
            return None
        end -= 1
    here = _is_placeholder(adapter, ids)
    for segment in segments:
        while start < end and not here[start]:
            start += 1
        wanted = [token for token, _ in segment]
        while start < end and (here[start] or ids[start : start + len(wanted)] != wanted):
            start += 1
        if start + len(segment) > end or not _put(roles, ids, start, segment):
            return None
        start += len(segment)
    return roles


def _put(
    roles: list[Role | None], ids: list[int], start: int, segment: Sequence[tuple[int, Role]]
) -> bool:
    """Set the roles of a segment whose tokens begin at `start`; False if they do not."""
    end = start + len(segment)
    if start < 0 or ids[start:end] != [token for token, _ in segment]:
        return False
    roles[start:end] = [role for _, role in segment]
    return True


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
