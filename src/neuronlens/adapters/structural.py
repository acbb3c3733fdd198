"""The adapter for models nobody registered: sites by structure, tokens by experiment.

Blocks are found by what they are made of, activations that are functions by running a copy
of their block, visual tokens and what they see by changing pixels. What was established, and
how, is told in `established`; what cannot be is an error that says what to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from neuronlens.adapters.base import ANY, register
from neuronlens.adapters.discover import Block, feed_forward_blocks, list_of
from neuronlens.adapters.experiment import Experiment, painted
from neuronlens.adapters.family import FamilyAdapter
from neuronlens.adapters.functions import functional_blocks
from neuronlens.adapters.geometry import Placement
from neuronlens.adapters.grids import ImageSize, Seen
from neuronlens.errors import WRITE_ONE, AdapterError

KEPT = 64
"""For how many shapes of images what was established is kept."""


@register(ANY)
class StructuralAdapter(FamilyAdapter):
    """Sites by structure, visual tokens and boxes by experiment.

    The stack next to the token embedding is the language model; other numbered blocks are
    the vision encoder's, blocks without a number the projector's. To know the tokens of some
    inputs, the model is run up to its first language layer, with pixels changed: twice for
    every text, and many times, once, for every shape of the images. The first axis of
    `pixel_values` counts the images, its last two are pixels.

    Attributes:
        established: What was found out, and how, in the order in which it was.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.established: list[str] = []
        self._seen: dict[tuple[Any, ...], Seen] = {}
        self._last: tuple[tuple[Any, ...], Tensor, Seen] | None = None
        self._places: dict[tuple[ImageSize, ImageSize], Placement] = {}
        super().__init__(*args, **kwargs)

    # Sites.

    def check_model(self) -> None:
        """Find the language stack: the numbered blocks next to the token embedding."""
        self._found = [*feed_forward_blocks(self.model), *functional_blocks(self.model, self.say)]
        order = {path: i for i, (path, _) in enumerate(self.model.named_modules())}
        self._found.sort(key=lambda block: order[block.path])
        lists = list(dict.fromkeys(filter(None, (list_of(each.path) for each in self._found))))
        # A list whose name says that it sees is not the language model's if there is another.
        named = FamilyAdapter.stack_of
        lists = [path for path in lists if named(self, path) == "language"] or lists
        if not lists:
            raise AdapterError(
                f"{type(self.model).__name__} has no feed-forward block in a list of layers, that "
                f"is, no activation module between two projections. {WRITE_ONE}"
            )
        embedding = self._embedding_path()
        ranked = {path: (-_common(path, embedding), path.count(".")) for path in lists}
        nearest = [path for path in lists if ranked[path] == min(ranked.values())]
        if len(nearest) > 1:
            raise AdapterError(
                f"{type(self.model).__name__} has {len(nearest)} lists of layers that are equally "
                f"near to the token embedding {embedding!r}: {', '.join(nearest)}. Which of them "
                f"is the language model cannot be told. {WRITE_ONE}"
            )
        self._language = nearest[0]
        self.say(
            f"language: the blocks in {self._language!r}, the list of layers nearest to the token "
            f"embedding {embedding!r}"
        )

    def _embedding_path(self) -> str:
        model: Any = self.model
        embedding = None
        with suppress(NotImplementedError, AttributeError):
            embedding = model.get_input_embeddings()
        tables: dict[str, nn.Embedding] = {
            path: m for path, m in self.model.named_modules() if isinstance(m, nn.Embedding)
        }
        for path, module in tables.items():
            if module is embedding:
                return path
        if not tables:
            raise AdapterError(
                f"{type(self.model).__name__} has no token embedding, so its language model cannot "
                f"be told. {WRITE_ONE}"
            )
        return max(tables, key=lambda path: tables[path].num_embeddings)

    def say(self, what: str) -> None:
        """Write down what was established, once."""
        if what not in self.established:
            self.established.append(what)

    def blocks(self) -> Iterable[Block]:
        """Blocks with an activation module, and blocks whose activation is a function."""
        return self._found

    def stack_of(self, path: str) -> str | None:
        """Language, vision or projector, by where the block is."""
        if path.startswith(f"{self._language}."):
            return "language"
        known = super().stack_of(path)
        if known is None and any(block.path == path for block in self._found):
            self.say(f"left out: {path!r}, named like an audio part, a head or a pooler")
        if known != "language":
            return known
        return "projector" if list_of(path) is None else "vision"

    # Tokens.

    def placeholders(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """The positions at which the language model's input moves with the pixels."""
        if not self.has_images(inputs):
            return super().placeholders(inputs, ids)
        return self._experiment(inputs)[0]

    def look(self, inputs: Mapping[str, Any]) -> Seen:
        """What tokens see, by changing the image stripe by stripe without any mixing."""
        return self._experiment(inputs)[1]

    def place(self, original: ImageSize, size: ImageSize, index: int) -> Placement:
        """Where an image lies in the processed one, by processing a picture with a painted part.

        Raises:
            AdapterError: If the processor makes something else of it than one image.
        """
        if (original, size) not in self._places:
            self._places[original, size] = painted(self.image_processor, original, size)
            self.say(
                "boxes in original pixels: where the image processor puts the painted middle of "
                "a picture"
            )
        return self._places[original, size]

    def _experiment(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Seen]:
        """Visual positions, by two runs per text; what they see, once per shape of the images."""
        whole = _key(inputs)
        if self._last is None or self._last[0] != whole:
            if next(self.model.parameters()).device.type == "meta":
                raise AdapterError(
                    "What tokens are and see is established by running the model, which a model "
                    "on the meta device cannot. Load its weights first."
                )
            text = self.text(inputs).shape
            images = _key(
                {
                    name: value
                    for name, value in inputs.items()
                    if isinstance(value, Tensor)
                    and (value.is_floating_point() or value.shape != text)
                }
            )
            experiment = Experiment(self, inputs, self._language, self.say)
            seen = self._seen.pop(images, None)
            here = None if seen is None else experiment.positions()
            expected = 0 if seen is None or seen.language is None else len(seen.language.role)
            if seen is None or here is None or int(here.sum()) != expected:
                here, seen = experiment.result()
            self._seen[images] = seen
            while len(self._seen) > KEPT:
                self._seen.pop(next(iter(self._seen)))
            self._last = (whole, here, seen)
        return self._last[1], self._last[2]

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + f"; {len(self.established)} things established)"


def _common(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count


def _key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes of the floating inputs, and the whole of the others."""
    return tuple(
        (
            name,
            tuple(value.shape),
            None if value.is_floating_point() else value.cpu().numpy().tobytes(),
        )
        for name, value in sorted(inputs.items())
        if isinstance(value, Tensor)
    )
