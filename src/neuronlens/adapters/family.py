"""What most model families share: sites by structure, tokens by placeholders.

A family says which parts its model has and what its images' tokens see (`look`); everything
else is here.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from neuronlens.adapters.base import ModelAdapter
from neuronlens.adapters.discover import Block, feed_forward_blocks
from neuronlens.adapters.geometry import Placement, processed_by
from neuronlens.adapters.grids import Grid, ImageSize, Seen
from neuronlens.errors import AdapterError
from neuronlens.neurons import Module, NeuronSite
from neuronlens.tokens import Role, TokenMap

Part = tuple[str | None, str]
"""Stack (None: not ours), and a regular expression that the dotted path of its blocks matches."""

PARTS: tuple[Part, ...] = (
    (None, r"audio|speech|talker|code2wav|sound"),
    (None, r"per_layer|lm_head|\.cls\.|pooler|(^|\.)head\.|generation_|vqmodel|mtp"),
    (None, r"mixer\.act|linear_attn|\.conv\."),
    ("qformer", r"q_?former|resampler|perceiver"),
    ("projector", r"project(or|ion)|connector|merger|aligner|adapter|modality_projection"),
    ("vision", r"vision|visual|image_(encoder|tower|model)"),
    ("language", r""),
)
"""Which stack a block belongs to: the first line that matches."""


class FamilyAdapter(ModelAdapter):
    """The adapter of a family of models.

    Attributes:
        parts: Lines that go before `PARTS`.
        not_run: Regular expression of the paths of blocks that no image and text run through.
        placeholder_names: Names in the config of the token ids that images take the place of.
    """

    parts: ClassVar[tuple[Part, ...]] = ()
    not_run: ClassVar[str | None] = None
    placeholder_names: ClassVar[tuple[str, ...]] = (
        "image_token_id",
        "image_token_index",
        "video_token_id",
        "video_token_index",
    )

    # What a family says of itself.

    @abstractmethod
    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """What the tokens of the images among these inputs see."""

    def look_with(
        self, inputs: Mapping[str, Any], originals: Sequence[Sequence[ImageSize]] | None
    ) -> Seen:
        """`look`, for families whose inputs do not tell everything without the original sizes."""
        return self.look(inputs)

    def blocks(self) -> Iterable[Block]:
        """The model's feed-forward blocks in running order; a family adds and replaces some."""
        return feed_forward_blocks(self.model)

    def is_inert(self, stack: str, layer: int, last: int) -> bool:
        """Whether the block runs without any effect on the output.

        Args:
            stack: Its stack.
            layer: Its layer.
            last: The last layer of its stack.
        """
        return False

    def is_conditional(self, stack: str, layer: int) -> bool:
        """Whether the block is left out of a forward without an image."""
        return False

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Where an image of that original size lies in the processed one.

        Args:
            original: Size before processing.
            size: Of the processed image, as `look` told it.
            index: Number of the image within the batch.
        """
        return processed_by(self.image_processor, original, size)

    def agreements(self) -> dict[str, tuple[Any, Any]]:
        """What processor and model must agree on: by name, the processor's value and the model's.

        A value the processor does not have (None) is not compared.
        """
        return {}

    # What follows from it.

    def check_processor(self) -> None:
        """Compare what processor and model must agree on: the image token, words, sizes."""
        processor: Any = self.processor
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or self.image_processor is None:
            raise AdapterError(
                f"{type(processor).__name__} is not a processor of images and text. "
                "Load it with AutoProcessor.from_pretrained(...)."
            )
        ours = self.placeholder_ids()
        theirs = self.placeholder_of_processor
        try:
            agreements = self.agreements()
        except AttributeError as error:
            raise AdapterError(
                f"{type(processor).__name__} belongs to another model: {error}. Load the processor "
                f"of {self.name!r}."
            ) from error
        said = [
            f"{what} {other!r} (the model's is {mine!r})"
            for what, (other, mine) in agreements.items()
            if other is not None and other != mine
        ]
        if theirs is not None and ours and theirs not in ours:
            said.insert(0, f"image token id {theirs!r} (the model's is {ours[0]!r})")
        embeddings: Any = None
        with suppress(NotImplementedError):
            embeddings = cast(Any, self.model).get_input_embeddings()
        words = getattr(embeddings, "num_embeddings", None)
        if words is not None:
            words += getattr(embeddings, "num_additional_embeddings", 0)
        if words is not None and len(tokenizer) > words:
            said.append(f"{len(tokenizer)} tokens (the model embeds {words})")
        if said:
            raise AdapterError(
                f"{type(processor).__name__} belongs to another model: {'; '.join(said)}. "
                f"Load the processor of {self.name!r}."
            )

    @property
    def image_processor(self) -> Any:
        """The processor's part that processes images; None if it has none."""
        return getattr(self.processor, "image_processor", None)

    @property
    def placeholder_of_processor(self) -> int | None:
        """The token id that the processor puts in an image's place; None if it does not say."""
        return getattr(self.processor, "image_token_id", None)

    def stack_of(self, path: str) -> str | None:
        """The stack that the block at `path` belongs to; None if it is not ours."""
        if self.not_run is not None and re.search(self.not_run, path):
            return None
        for stack, pattern in (*self.parts, *PARTS):
            if re.search(pattern, path):
                return stack
        return None

    def find_sites(self) -> Iterator[NeuronSite]:
        """The sites of the blocks: `stack.layer`, with a suffix for a layer's further ones."""
        ours = [(stack, block) for block in self.blocks() if (stack := self.stack_of(block.path))]
        layers = _layers(ours)
        last = {stack: max(n for (s, _), n in layers.items() if s == stack) for stack, _ in ours}
        main: dict[tuple[str, int], Block] = {}
        for stack, block in ours:
            key = (stack, layers[stack, block.path])
            if key not in main or (block.experts and not main[key].experts):
                main[key] = block
        taken: Counter[str] = Counter()
        for stack, block in ours:
            layer = layers[stack, block.path]
            name = f"{stack}.{layer}"
            if main[stack, layer] is not block:
                name += f".{_suffix(block, main[stack, layer])}"
            taken[name] += 1
            if taken[name] > 1:
                name += f".{taken[name]}"
            flags = {
                "inert": self.is_inert(stack, layer, last[stack]),
                "conditional": self.is_conditional(stack, layer),
            }
            self.taps[name] = block.tap
            yield NeuronSite(
                name=name,
                module=cast(Module, stack.split(".")[0]),
                layer=layer,
                width=block.width,
                path=block.tap.path,
                stream=self.stream_of(stack, block),
                experts=block.experts,
                branch=self.branch_of(stack, block),
                flags=frozenset(flag for flag, holds in flags.items() if holds),
            )

    def stream_of(self, stack: str, block: Block) -> str:
        """The stream that a block runs on."""
        return stack

    def branch_of(self, stack: str, block: Block) -> str | None:
        """Of a Q-Former: the text's or the queries'."""
        if stack.startswith("qformer"):
            return "text" if stack == "qformer.text" else "query"
        return None

    # Tokens.

    def text(self, inputs: Mapping[str, Any]) -> Int[Tensor, "batch token"]:
        """The token ids of the language stream.

        Raises:
            AdapterError: If the inputs have none.
        """
        ids = inputs.get(self.text_input)
        if not isinstance(ids, Tensor):
            given = ", ".join(sorted(k for k, v in inputs.items() if v is not None)) or "nothing"
            raise AdapterError(
                f"Token roles need {self.text_input}; the model was called with {given}. Call it "
                f"with {self.text_input}, not inputs_embeds."
            )
        return ids.cpu()

    def placeholder_ids(self) -> list[int]:
        """The token ids that images take the place of."""
        found = {getattr(self._config, name, None) for name in self.placeholder_names}
        return sorted(int(each) for each in found if each is not None)

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """Which positions of the language stream images take the place of."""
        return torch.isin(ids, torch.tensor(self.placeholder_ids(), dtype=ids.dtype))

    def text_map(self, inputs: Mapping[str, Any]) -> TokenMap:
        """The language stream, before it is known what images put there."""
        ids = self.text(inputs)
        mask = inputs.get(self.text_mask)
        role = self.text_roles(ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
        sample = torch.arange(len(ids))[:, None].expand_as(ids).contiguous()
        box = torch.full((*ids.shape, 4), float("nan"))
        return TokenMap(role, sample, torch.full_like(ids, -1), box)

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there are images among the inputs."""
        return any(
            isinstance(value, Tensor) and ("pixel" in name or name == "image_patches")
            for name, value in inputs.items()
        )

    def tokens(
        self,
        inputs: Mapping[str, Any],
        originals: Sequence[Sequence[ImageSize]] | None = None,
    ) -> dict[str, TokenMap]:
        """The token map of every stream for these model inputs; see `ModelAdapter.tokens`.

        Maps are made on the CPU, wherever the inputs are.
        """
        inputs = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        language = self.text_map(inputs)
        here = self.placeholders(inputs, self.text(inputs)) & (language.role != Role.PAD)
        if not self.has_images(inputs):
            if here.any():
                raise AdapterError(
                    f"input_ids hold {int(here.sum())} image tokens, but there are no "
                    "pixel_values. Pass the processor's whole output to the model."
                )
            return {"language": language} | self.text_streams(inputs)
        seen = self.look_with(inputs, originals)
        owner = self._owners(seen, here)
        number = [owner[:i].count(sample) for i, sample in enumerate(owner)]
        if originals is not None:
            shown = [owner.count(sample) for sample in range(len(here))]
            if [len(row) for row in originals] != shown:
                raise AdapterError(
                    f"The rows have {shown} images, but original sizes were given for "
                    f"{[len(row) for row in originals]}. Give one per image of each row."
                )
        places = (
            None
            if originals is None
            else [
                self.place(originals[s][n], size, i)
                for i, (s, n, size) in enumerate(zip(owner, number, seen.sizes, strict=True))
            ]
        )
        streams = {
            name: _placed(grid, owner, number, places) for name, grid in seen.streams.items()
        }
        if seen.language is not None:
            visual = _placed(seen.language, owner, number, places)
            language.role[here] = visual.role.to(language.role.dtype)
            language.image[here] = visual.image.to(language.image.dtype)
            language.box[here] = visual.box
        return {"language": language} | streams | self.text_streams(inputs)

    def text_streams(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """Streams of text beside the language stream, such as a decoder's."""
        return {}

    def _owners(self, seen: Seen, here: Bool[Tensor, "batch token"]) -> list[int]:
        """The sample of every image, told by whose placeholders its tokens fill."""
        counts = here.sum(1).tolist()
        images = len(seen.sizes)
        if seen.language is None:
            if seen.owners is not None:
                return list(seen.owners)
            if images % len(here):
                raise AdapterError(f"{images} images were given for {len(here)} texts.")
            return [i // (images // len(here)) for i in range(images)]
        tokens = seen.language.image.flatten()
        if len(tokens) != sum(counts):
            per = torch.bincount(tokens[tokens >= 0], minlength=images).unique().tolist()
            raise AdapterError(
                f"{images} images of {' or '.join(map(str, per))} tokens were given, but the rows "
                f"of {self.text_input} hold {counts} image tokens. Does each prompt have one image "
                "token per image, and was it expanded by the model's own processor?"
            )
        rows = torch.repeat_interleave(torch.arange(len(here)), torch.tensor(counts))
        owner = []
        for image in range(images):
            mine = rows[tokens == image].unique().tolist()
            if len(mine) > 1:
                raise AdapterError(
                    f"Image {image} of the batch would fill image tokens of rows {mine}: the rows "
                    f"hold {counts} image tokens. Does each prompt have one image token per image?"
                )
            if not mine:
                raise AdapterError(
                    f"Image {image} of the batch has no token in the language stream, so it cannot "
                    f"be told whose it is; the rows hold {counts} image tokens."
                )
            owner.append(mine[0])
        return owner


def as_pixel_values(model: nn.Module, inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A processor's inputs, the pixels under the name that the model takes.

    Transformers 5.21 renamed them for some models, whose processors still give the old `name`.
    """
    given = dict(inputs)
    if name in given and "pixel_values" in signature(type(model).forward).parameters:
        given["pixel_values"] = given.pop(name)
    return given


def _placed(
    grid: Grid, owner: Sequence[int], number: Sequence[int], places: Sequence[Placement] | None
) -> TokenMap:
    """A stream's map: images numbered within their samples, boxes in original pixels."""
    owners, numbers = torch.tensor([*owner, -1]), torch.tensor([*number, -1])
    sample = torch.where(grid.image >= 0, owners[grid.image], grid.sample)
    image = torch.where(grid.role == Role.VISUAL, numbers[grid.image], -1)
    box = grid.box.clone()
    for index, place in enumerate(places or ()):
        mine = grid.image == index
        box[mine] = place.to_original(box[mine])
    return TokenMap(grid.role.clone(), sample, image, box)


def _layers(blocks: Sequence[tuple[str, Block]]) -> dict[tuple[str, str], int]:
    """The layer of every block: its number in the stack's list, or its place in running order."""
    layers: dict[tuple[str, str], int] = {}
    for stack in dict.fromkeys(stack for stack, _ in blocks):
        paths = list(dict.fromkeys(block.path for each, block in blocks if each == stack))
        found = [re.match(r"(.*)\.(\d+)(?=\.|$)", path) for path in paths]
        lists = {match.group(1) if match else None for match in found}
        if len(lists) == 1 and None not in lists and stack != "projector":
            layers |= {
                (stack, path): int(match.group(2))
                for path, match in zip(paths, found, strict=True)
                if match
            }
        else:
            owners = [
                match.group(0) if match else path for path, match in zip(paths, found, strict=True)
            ]
            order = list(dict.fromkeys(owners))
            layers |= {
                (stack, path): order.index(owner) for path, owner in zip(paths, owners, strict=True)
            }
    return layers


def _suffix(block: Block, main: Block) -> str:
    """What tells a further block of a layer from the main one."""
    if "shared" in block.path:
        return "shared"
    steps = [step for step in block.path.split(".") if step not in main.path.split(".")]
    return steps[-1] if steps else block.name
