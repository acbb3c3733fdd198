"""LLaVA 1.5 and its like: a CLIP-like tower, an MLP projector, one token per patch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuronlens.adapters.base import ImageSize, ModelAdapter, register
from neuronlens.adapters.discover import feed_forward_blocks
from neuronlens.adapters.geometry import resized_and_cropped
from neuronlens.errors import AdapterError
from neuronlens.neurons import Module, NeuronSite
from neuronlens.tokens import Role, TokenMap

_PARTS: tuple[tuple[Module, str], ...] = (
    ("vision", "vision_tower"),
    ("projector", "multi_modal_projector"),
    ("language", "language_model"),
)

_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}
"""Vision towers whose tokens are described: one per patch, in reading order, after a CLS or not."""


@register("llava")
class LlavaAdapter(ModelAdapter):
    """Streams: `vision` [image, CLS (CLIP's) + patch], `projector` [image, patch], `language`."""

    def check_model(self) -> None:
        config = self._config
        self._image_token = int(config.image_token_id)
        self._vision = config.vision_config
        if self._vision.model_type not in _HAS_CLS:
            raise AdapterError(
                f"The vision tower is a {self._vision.model_type!r}; LlavaAdapter knows the tokens "
                f"of {', '.join(_HAS_CLS)}. To describe another: docs/adapters.md."
            )
        self._has_cls = _HAS_CLS[self._vision.model_type]
        self._strategy = getattr(config, "vision_feature_select_strategy", "default")
        self.max_tokens = getattr(config.text_config, "max_position_embeddings", None)

    def check_processor(self) -> None:
        """Compare what processor and model must agree on: the image token, sizes, words."""
        processor = self.processor
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or getattr(processor, "image_processor", None) is None:
            raise AdapterError(
                f"{type(processor).__name__} is not a processor of images and text. "
                "Load it with AutoProcessor.from_pretrained(...)."
            )
        model: Any = self.model
        words = model.get_input_embeddings().num_embeddings
        side = self._vision.image_size
        crop = getattr(processor.image_processor, "crop_size", None)
        differences = {
            "image token id": (getattr(processor, "image_token_id", None), self._image_token),
            "patch size": (getattr(processor, "patch_size", None), self._vision.patch_size),
            "image size": ((crop.height, crop.width) if crop else (side, side), (side, side)),
            "feature selection": (
                getattr(processor, "vision_feature_select_strategy", None),
                self._strategy,
            ),
        }
        said = [
            f"{what} {theirs!r} (the model's is {ours!r})"
            for what, (theirs, ours) in differences.items()
            if theirs != ours
        ]
        if len(tokenizer) > words:
            said.append(f"{len(tokenizer)} tokens (the model embeds {words})")
        if said:
            raise AdapterError(
                f"{type(processor).__name__} belongs to another model: {'; '.join(said)}. "
                f"Load the processor of {self.name!r}."
            )

    def find_sites(self) -> Iterator[NeuronSite]:
        layers = self._vision.num_hidden_layers
        chosen = self._config.vision_feature_layer
        # hidden_states[k] is the output of layer k - 1; negative numbers count from the last.
        read = [
            k if k >= 0 else layers + 1 + k
            for k in ([chosen] if isinstance(chosen, int) else chosen)
        ]
        for module, name in _PARTS:
            path = next(p for p, _ in self.model.named_modules() if p.split(".")[-1] == name)
            for block in feed_forward_blocks(self.model.get_submodule(path), path):
                if block.layer is None and module != "projector":
                    continue  # a pooling head, of which LLaVA reads nothing
                layer = block.layer or 0
                inert = module == "vision" and layer >= max(read)
                yield NeuronSite(
                    name=f"{module}.{layer}",
                    module=module,
                    layer=layer,
                    width=block.width,
                    path=block.path,
                    stream=module,
                    flags=frozenset({"inert"} if inert else ()),
                )

    def tokens(
        self,
        inputs: Mapping[str, Any],
        originals: Sequence[Sequence[ImageSize]] | None = None,
    ) -> dict[str, TokenMap]:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise AdapterError(
                "Token roles need input_ids; the model was called with "
                f"{', '.join(sorted(k for k, v in inputs.items() if v is not None)) or 'nothing'}. "
                "Call it with input_ids, not inputs_embeds."
            )
        ids = ids.cpu()
        visual = ids == self._image_token
        images, processed = self._images(inputs, int(visual.sum()))
        role = self.text_roles(ids, inputs.get("attention_mask"))
        role[visual] = Role.VISUAL
        sample = torch.arange(len(ids))[:, None].expand_as(ids).contiguous()
        image = torch.full_like(ids, -1)
        box = torch.full((*ids.shape, 4), float("nan"))
        streams = {"language": TokenMap(role, sample, image, box)}
        if images == 0:
            if visual.any():
                raise AdapterError(
                    f"input_ids hold {int(visual.sum())} image tokens, but there are no "
                    "pixel_values. Pass the processor's whole output to the model."
                )
            return streams

        cells = self._cells(processed)
        per_image = self._per_image(processed)
        counts = visual.sum(1)
        if int(counts.sum()) != per_image * images or (counts % per_image).any():
            raise AdapterError(
                f"{images} images of {per_image} tokens each were given, but the rows of "
                f"input_ids hold {counts.tolist()} image tokens. Does each prompt have one "
                f"image token per image?"
            )
        shown = (counts // per_image).tolist()
        if originals is not None and [len(row) for row in originals] != shown:
            raise AdapterError(
                f"The rows have {shown} images, but original sizes were given for "
                f"{[len(row) for row in originals]}. Give one per image of each row."
            )
        owner = torch.repeat_interleave(torch.arange(len(ids)), counts // per_image)
        number = torch.cat([torch.arange(int(n)) for n in counts // per_image])
        boxes = torch.stack(
            [
                self._place(cells, processed, int(who), int(which), originals)
                for who, which in zip(owner, number, strict=True)
            ]
        )
        if self._has_cls:
            boxes = torch.cat([torch.full_like(boxes[:, :1], float("nan")), boxes], 1)
        passes_all = self._strategy == "full"
        seen = boxes if passes_all else boxes[:, 1:]
        passes_cls = self._has_cls and passes_all
        box[visual] = seen.flatten(0, 1)
        image[visual] = number.repeat_interleave(per_image)
        # With the CLS token passed on ("full"), its placeholder sees no single region.
        cls = torch.zeros(images, per_image, dtype=torch.bool)
        cls[:, 0] = passes_cls
        role[visual] = torch.where(cls.flatten(), int(Role.SPECIAL), int(Role.VISUAL)).to(
            role.dtype
        )
        streams["vision"] = _image_rows(boxes, owner, number, first_is_cls=self._has_cls)
        streams["projector"] = _image_rows(seen, owner, number, first_is_cls=passes_cls)
        return streams

    def _images(self, inputs: Mapping[str, Any], placeholders: int) -> tuple[int, ImageSize]:
        """How many images there are, and the size they were processed to."""
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            return len(pixels), (int(pixels.shape[-1]), int(pixels.shape[-2]))
        # generate() encodes the images beforehand and passes on their features, in pieces if
        # the prompt is fed in chunks.
        processed = (int(self._vision.image_size),) * 2
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        return (0 if encoded is None else placeholders // self._per_image(processed)), processed

    def _per_image(self, processed: ImageSize) -> int:
        return len(self._cells(processed)) + self._has_cls - (self._strategy != "full")

    def _cells(self, processed: ImageSize) -> Float[Tensor, "patch 4"]:
        patch = self._vision.patch_size
        width, height = processed
        rows, columns = torch.meshgrid(
            torch.arange(height // patch), torch.arange(width // patch), indexing="ij"
        )
        corner = torch.stack([columns, rows], -1).flatten(0, 1) * patch
        return torch.cat([corner, corner + patch], -1).float()

    def _place(
        self,
        cells: Float[Tensor, "patch 4"],
        processed: ImageSize,
        sample: int,
        image: int,
        originals: Sequence[Sequence[ImageSize]] | None,
    ) -> Float[Tensor, "patch 4"]:
        if originals is None:
            return cells
        placed = resized_and_cropped(
            self.processor.image_processor, originals[sample][image], processed
        )
        return placed.to_original(cells)


def _image_rows(
    boxes: Float[Tensor, "image token 4"],
    owner: Int[Tensor, " image"],
    number: Int[Tensor, " image"],
    first_is_cls: bool,
) -> TokenMap:
    """A stream with one row per image."""
    role = torch.full(boxes.shape[:2], int(Role.VISUAL), dtype=torch.int8)
    image = number[:, None].expand(boxes.shape[:2]).clone()
    if first_is_cls:
        role[:, 0] = Role.SPECIAL
        image[:, 0] = -1
    return TokenMap(role, owner[:, None].expand(boxes.shape[:2]).contiguous(), image, boxes)
