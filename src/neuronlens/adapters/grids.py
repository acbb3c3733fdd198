"""What an image's tokens see: boxes in processed pixels, and the orders models keep them in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from neuronlens.tokens import Role, TokenMap

ImageSize = tuple[int, int]
"""Width and height in pixels."""

Boxes = Float[Tensor, "token 4"]
NOWHERE = float("nan")


@dataclass(frozen=True, eq=False)
class Piece:
    """Some consecutive tokens of one image: what they are and what they see.

    Pieces are added to each other in the order of the tokens.
    """

    role: Int[Tensor, " token"]
    box: Boxes

    def __add__(self, other: Piece) -> Piece:
        return Piece(torch.cat([self.role, other.role]), torch.cat([self.box, other.box]))

    def __len__(self) -> int:
        return len(self.role)

    def __getitem__(self, order: Int[Tensor, " token"] | slice) -> Piece:
        """The tokens in another order, or some of them."""
        return Piece(self.role[order], self.box[order])


def cells(box: Boxes) -> Piece:
    """Tokens that see one region each."""
    return Piece(torch.full((len(box),), int(Role.VISUAL), dtype=torch.int8), box.float())


def queries(count: int) -> Piece:
    """Tokens that depend on the image and see no single region: learned queries, VQ codes."""
    return cells(torch.full((count, 4), NOWHERE))


def special(count: int = 1) -> Piece:
    """CLS, registers, and learned markers on the placeholder id: newline, separator."""
    return _of_role(Role.SPECIAL, count)


def pad(count: int) -> Piece:
    """Tokens that only fill up."""
    return _of_role(Role.PAD, count)


def nothing() -> Piece:
    """No token."""
    return special(0)


def _of_role(role: Role, count: int) -> Piece:
    return Piece(torch.full((count,), int(role), dtype=torch.int8), torch.full((count, 4), NOWHERE))


def raster(rows: int, columns: int, size: ImageSize, corner: tuple[float, float] = (0, 0)) -> Boxes:
    """Boxes of a grid over an area of `size` pixels, in reading order."""
    width, height = size[0] / columns, size[1] / rows
    top, left = torch.meshgrid(
        torch.arange(rows).double() * height, torch.arange(columns).double() * width, indexing="ij"
    )
    left, top = left.flatten() + corner[0], top.flatten() + corner[1]
    return torch.stack([left, top, left + width, top + height], 1).float()


def in_blocks(rows: int, columns: int, block: int) -> Int[Tensor, " token"]:
    """Raster positions in merge-block order: the `block` x `block` cells of a token together."""
    grid = torch.arange(rows * columns).reshape(rows, columns)
    order: Tensor = rearrange(grid, "(r a) (c b) -> (r c a b)", a=block, b=block)
    return order


@dataclass(frozen=True, eq=False)
class Grid:
    """The tokens of one stream of a batch.

    Attributes:
        role, box: As in `TokenMap`, boxes in the processed image's pixels.
        image: Number, within the batch, of the image a token comes from; -1 for none.
        sample: Of the batch, for tokens that come from no image; -1 elsewhere.
    """

    role: Int[Tensor, "*axes"]
    image: Int[Tensor, "*axes"]
    box: Float[Tensor, "*axes 4"]
    sample: Int[Tensor, "*axes"]

    def reshape(self, *axes: int) -> Grid:
        """The same tokens on other axes."""
        return Grid(
            self.role.reshape(axes),
            self.image.reshape(axes),
            self.box.reshape(*axes, 4),
            self.sample.reshape(axes),
        )


def flat(pieces: Iterable[tuple[int, Piece]]) -> Grid:
    """One token axis for the whole batch: (number of the image, its tokens), in order."""
    listed = list(pieces)
    joined = nothing()
    joined = sum((piece for _, piece in listed), joined)
    image = torch.tensor([number for number, piece in listed for _ in range(len(piece))])
    image = image.long()
    return Grid(joined.role, image, joined.box, torch.full_like(image, -1))


def rows(pieces: Iterable[tuple[int, Piece]]) -> Grid:
    """`[image or tile, token]`: pieces of one length; shorter ones are filled up with PAD."""
    listed = list(pieces)
    longest = max((len(piece) for _, piece in listed), default=0)
    even = [(number, piece + pad(longest - len(piece))) for number, piece in listed]
    return flat(even).reshape(len(even), longest)


def text_rows(role: Int[Tensor, "batch token"]) -> Grid:
    """`[sample, token]` of a text that is no part of the language stream (a Q-Former's)."""
    sample = torch.arange(len(role))[:, None].expand(role.shape)
    nowhere = torch.full((*role.shape, 4), NOWHERE)
    return Grid(role.to(torch.int8), torch.full(role.shape, -1), nowhere, sample.contiguous())


def text_stream(role: Int[Tensor, "batch token"]) -> TokenMap:
    """The map of a stream that holds no token of an image (a decoder's)."""
    grid = text_rows(role)
    return TokenMap(grid.role, grid.sample, grid.image, grid.box)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a family's model makes of the images of a batch.

    Attributes:
        sizes: Per image of the batch, in order, the size in pixels of the processed image that
            boxes are told in.
        language: The tokens at the placeholders of the language stream, in reading order over
            the batch; None if images put no token there.
        streams: Every other stream's tokens.
        owners: Sample of each image, where there are no placeholders to tell it.
    """

    sizes: Sequence[ImageSize]
    language: Grid | None
    streams: dict[str, Grid] = field(default_factory=dict)
    owners: Sequence[int] | None = None
