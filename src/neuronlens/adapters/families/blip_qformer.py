"""BLIP-2 and InstructBLIP: a Q-Former between a vision tower and any language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from neuronlens.adapters.base import register
from neuronlens.adapters.discover import Block
from neuronlens.adapters.families.patches import one_each, patch_boxes, size_of
from neuronlens.adapters.family import FamilyAdapter, Part
from neuronlens.adapters.grids import (
    NOWHERE,
    Grid,
    Seen,
    cells,
    flat,
    queries,
    rows,
    special,
    text_stream,
)
from neuronlens.errors import AdapterError
from neuronlens.tokens import Role, TokenMap

_FRAMES = 4
"""Frames of a video: InstructBlipVideoProcessor makes room for these, whatever it is given."""


@register("blip-2", "instructblip", "instructblipvideo")
class BlipAdapter(FamilyAdapter):
    """BLIP-2 and InstructBLIP, with a decoder or T5 behind them.

    Streams: `vision` [image, CLS + patch], `qformer` [image, query], `qformer.text` [image,
    token of the instruction] (InstructBLIP), `language`, `language.decoder` (T5, whose encoder
    is `language`). A video is one image of four frames; `vision` and `qformer` have a row for
    each. `generate()` calls the language model by itself, so it cannot be recorded.
    """

    one_image = True

    parts: ClassVar[tuple[Part, ...]] = (
        ("qformer.text", r"^qformer\..*\.intermediate$"),
        ("language.decoder", r"^language_model\.decoder\."),
    )

    def check_model(self) -> None:
        """Refuse encoder-decoders other than T5."""
        super().check_model()
        text = self._config.text_config
        if text.is_encoder_decoder:
            self.answer_stream = "language.decoder"
        if text.is_encoder_decoder and text.model_type != "t5":
            raise AdapterError(
                f"The language model is a {text.model_type!r}; of encoder-decoders only 't5' is "
                "described. To describe another: docs/adapters.md."
            )

    def stack_of(self, path: str) -> str | None:
        """Blocks of BLIP-2's Q-Former for text are for retrieval, and do not run."""
        stack = super().stack_of(path)
        return None if stack == "qformer.text" and self.model_type == "blip-2" else stack

    def blocks(self) -> Iterable[Block]:
        """A Q-Former layer runs its queries before its text."""
        text: list[Block] = []
        for block in super().blocks():
            if block.path.endswith(".intermediate"):
                text.append(block)
                continue
            yield block
            yield from text
            text.clear()

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """The instruction's last block: only what queries read of it is passed on."""
        return stack == "qformer.text" and layer == last

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """Queries for every image, or for every frame of a video."""
        pixels = inputs["pixel_values"]
        frames = pixels.shape[1] if pixels.ndim == 5 else 1
        images = range(len(pixels))
        each_frame = [i for i in images for _ in range(frames)]
        tower = special() + cells(patch_boxes(pixels, self._config.vision_config.patch_size))
        asked = queries(self._config.num_query_tokens)
        streams = {
            "vision": rows((i, tower) for i in each_frame),
            "qformer": rows((i, asked) for i in each_frame),
        }
        if isinstance(inputs.get("qformer_input_ids"), Tensor):
            streams["qformer.text"] = self._instruction(inputs, frames)
        return Seen(
            sizes=[size_of(pixels)] * len(pixels),
            language=flat((i, asked) for i in each_frame),
            streams=streams,
        )

    def _instruction(self, inputs: Mapping[str, Any], frames: int) -> Grid:
        """The text beside the queries, of every image, once for each of its frames."""
        ids = inputs["qformer_input_ids"].cpu()
        role = torch.full(ids.shape, int(Role.PROMPT), dtype=torch.int8)
        tokenizer = getattr(self.processor, "qformer_tokenizer", None)
        if tokenizer is not None:  # BERT's [CLS] and [SEP]; the config does not tell their ids
            role[torch.isin(ids, torch.tensor(tokenizer.all_special_ids))] = Role.SPECIAL
        mask = inputs.get("qformer_attention_mask")
        if isinstance(mask, Tensor):
            role[mask.cpu() == 0] = Role.PAD
        image = torch.arange(len(role))[:, None].expand(role.shape).contiguous()
        role, image = (part.repeat_interleave(frames, 0) for part in (role, image))
        box = torch.full((*role.shape, 4), NOWHERE)
        return Grid(role, image, box, torch.full_like(image, -1))

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """What T5's decoder says."""
        if not self._config.text_config.is_encoder_decoder:
            return {}
        ids = inputs.get("decoder_input_ids")
        if not isinstance(ids, Tensor):
            raise AdapterError(
                "The language model is an encoder-decoder: call it with decoder_input_ids too "
                "(labels alone do not do), so that the decoder's tokens are known."
            )
        mask = inputs.get("decoder_attention_mask")
        role = self.text_roles(ids, mask if isinstance(mask, Tensor) else None)
        return {"language.decoder": text_stream(role)}

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """How many queries there are."""
        return {"query tokens": (self.processor.num_query_tokens, self._config.num_query_tokens)}

    @property
    def image_processor(self) -> Any:
        """Of a video model, the part that processes videos."""
        return getattr(self.processor, "video_processor", None) or super().image_processor

    @property
    def image_token(self) -> str:
        """Nothing: the processor puts an image's tokens before the text by itself."""
        return ""

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """One image per text; for a video model it is shown four times.

        Raises:
            AdapterError: If a text has no image, or several.
        """
        one_each(images, self.model)
        shown = images
        if self.model_type == "instructblipvideo":
            shown = [list(each) * _FRAMES for each in images]
        inputs = super().process(texts, shown, add_special_tokens=add_special_tokens)
        return _padded_behind(inputs, "qformer_input_ids", "qformer_attention_mask")


def _padded_behind(inputs: dict[str, Any], ids: str, mask: str) -> dict[str, Any]:
    """The inputs with a text's padding behind it.

    The processor pads the Q-Former's text on the side of the language model's tokenizer, but its
    positions are counted from the left: before the text, padding would move every token.
    """
    kept = inputs.get(mask)
    if not isinstance(kept, Tensor):
        return inputs
    order = kept.argsort(dim=1, descending=True, stable=True)
    return {**inputs, ids: inputs[ids].gather(1, order), mask: kept.gather(1, order)}
