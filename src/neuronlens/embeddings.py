"""One vector per image from the vision encoder, and the plane in which they differ most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuronlens.adapters import ModelAdapter, require_adapter
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point, attached, refuse_compiled, uncompiled
from neuronlens.neurons import NeuronSite
from neuronlens.samples import Batch, Sample, encode
from neuronlens.tokens import Role, TokenMap


@dataclass(frozen=True, eq=False)
class ImageEmbeddings:
    """One vector per image.

    Attributes:
        values: The vectors.
        samples: Id of the sample each image belongs to.
        images: Number of the image within its sample.
        domains: Domain of the sample; "" where it has none.
        taken: Dotted path of the module whose output was averaged.
        model: Fingerprint of the model.
    """

    values: Float[np.ndarray, "image width"]
    samples: tuple[str, ...]
    images: tuple[int, ...]
    domains: tuple[str, ...]
    taken: str
    model: str

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        count, width = self.values.shape
        return f"ImageEmbeddings({count} images, {width} values each, of {self.taken})"


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """Where vectors lie in the directions in which they vary most.

    Attributes:
        scores: Each vector's distance from the mean along each direction.
        directions: Unit vectors; the largest value of each is positive.
        explained: Share of the variance along each, falling.
        mean: Of all vectors.
    """

    scores: Float[np.ndarray, "image component"]
    directions: Float[np.ndarray, "component width"]
    explained: Float[np.ndarray, " component"]
    mean: Float[np.ndarray, " width"]

    def __repr__(self) -> str:
        count, components = self.scores.shape
        shares = ", ".join(f"{share:.1%}" for share in self.explained[:5])
        more = ", ..." if components > 5 else ""
        return (
            f"PrincipalComponents({count} vectors, {components} directions: {shares}{more} of the "
            "variance)"
        )


def image_embeddings(
    adapter: ModelAdapter,
    samples: Sequence[Sample],
    *,
    template: bool = True,
    batch_size: int = 8,
) -> ImageEmbeddings:
    """One vector per image: the mean of its visual tokens in the vision encoder.

    ::

        embeddings = nl.image_embeddings(vlm, samples)
        plane = nl.principal_components(embeddings)

    What is averaged is the output of the vision encoder's last block that can affect the model's
    output: for LLaVA, which reads its encoder one layer before the end, that layer's. It is taken
    before a final norm, where there is one. Class tokens, registers and padding are left out; the
    tiles of an image are averaged together, each token with the same weight. Where the encoder
    has several towers or stages, it is the last one's.

    The whole model runs on every batch.

    Args:
        adapter: Of the model, with its processor.
        samples: With one image or several; responses are not needed.
        template: Whether to use the processor's chat template.
        batch_size: Samples per forward.

    Source: P2, Figure 2 (which output of the encoder it shows is not said there).

    Raises:
        AdapterError: If the model has no vision encoder of blocks, or its last block's output
            has another shape than its tokens; if the model is in training mode, or is given
            itself, and not its adapter.
        SampleError: If a sample cannot be used.
        ValueError: If there is no sample.
    """
    require_adapter(adapter)
    if not samples:
        raise ValueError("No samples given: give at least one with an image.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    site, path = last_block(adapter)
    adapter.require_eval()
    refuse_compiled(adapter.model)
    values: list[Tensor] = []
    found: list[tuple[Sample, int]] = []
    for start in range(0, len(samples), batch_size):
        batch = encode(adapter, samples[start : start + batch_size], template=template)
        rows = _block_output(adapter, batch, site, path)
        for sample, image, mean in _means(rows, batch.tokens[site.stream]):
            values.append(mean)
            found.append((batch.samples[sample], image))
    return ImageEmbeddings(
        torch.stack(values).numpy(),
        tuple(sample.id for sample, _ in found),
        tuple(image for _, image in found),
        tuple(sample.domain or "" for sample, _ in found),
        path,
        adapter.fingerprint(),
    )


def last_block(adapter: ModelAdapter) -> tuple[NeuronSite, str]:
    """The last vision site that can affect the output, and the path of the block it is in.

    Raises:
        AdapterError: If there is no such block.
    """
    sites = [s for s in adapter.sites.values() if s.module == "vision" and not s.inert]
    if not sites:
        raise AdapterError(
            f"{type(adapter.model).__name__} has no vision encoder with feed-forward blocks, so "
            "there is no embedding of an image to take. Its image tokens are embedded in the "
            "language model."
        )
    parts = sites[-1].path.split(".")
    numbered = [
        place
        for place in range(1, len(parts))
        if parts[place].isdecimal()
        and isinstance(
            adapter.model.get_submodule(".".join(parts[:place])), (nn.ModuleList, nn.Sequential)
        )
    ]
    if not numbered:
        raise AdapterError(
            f"{sites[-1].name} ({sites[-1].path}) lies in no row of blocks, so it is not known "
            "which output stands for the image. Choose a module yourself, with a forward hook."
        )
    return sites[-1], ".".join(parts[: numbered[-1] + 1])


def _block_output(
    adapter: ModelAdapter, batch: Batch, site: NeuronSite, path: str
) -> Float[Tensor, "token width"]:
    """The block's output on the flat token axis of its stream, in single precision."""
    parts: list[Tensor] = []

    def keep(call: Call) -> None:
        # A tower may run once per image or tile: its tokens are complete when all calls are.
        parts.append(_first_tensor(call.out).detach().float().cpu())

    point = Point(adapter.model.get_submodule(path), keep)
    with torch.no_grad(), uncompiled(), attached({path: [point]}):
        adapter.forward(batch.on(adapter.device), logits=False)
    wanted = len(batch.tokens[site.stream])
    # Convolutions have their channels before rows and columns.
    for arranged in (parts, [part.movedim(1, -1) for part in parts]):
        one_width = len({part.shape[-1] for part in arranged}) == 1
        if one_width and sum(part[..., 0].numel() for part in arranged) == wanted:
            return torch.cat([part.flatten(0, -2) for part in arranged])
    raise AdapterError(
        f"{path} gave outputs of shape {', '.join(str(tuple(part.shape)) for part in parts)}, but "
        f"the stream {site.stream!r} has {wanted} tokens, so it is not known which row is of which "
        "image. Choose another module yourself, with a forward hook."
    )


def _first_tensor(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out


def _means(
    rows: Float[Tensor, "token width"], tokens: TokenMap
) -> Iterator[tuple[int, int, Float[Tensor, " width"]]]:
    """Sample, image and mean of each image of a batch, in order."""
    visual = tokens.is_role(Role.VISUAL).flatten().cpu()
    keys: Int[Tensor, "token 2"] = torch.stack(
        [tokens.sample.flatten().cpu().long(), tokens.image.flatten().cpu().long()], 1
    )
    for sample, image in torch.unique(keys[visual], dim=0).tolist():
        mine = visual & (keys == torch.tensor([sample, image])).all(1)
        yield sample, image, rows[mine].double().mean(0).float()


def principal_components(
    embeddings: ImageEmbeddings | Float[np.ndarray, "image width"], n: int = 2
) -> PrincipalComponents:
    """The directions in which vectors vary most, and where each vector lies along them.

    By singular value decomposition of the centred vectors. A direction and its opposite are as
    good; the one whose largest value (in size) is positive is given.

    Args:
        embeddings: Of images, or vectors of your own.
        n: How many directions; fewer than vectors, and at most their width.

    Source: P2, Figure 2.

    Raises:
        ValueError: If there are too few vectors for `n`, all are the same, or one is not finite.
    """
    given = embeddings.values if isinstance(embeddings, ImageEmbeddings) else embeddings
    values = np.asarray(given, float)
    if values.ndim != 2:
        raise ValueError(f"Vectors of shape {values.shape} are no table. Give [image, width].")
    most = min(len(values) - 1, values.shape[1])
    if not 1 <= n <= most:
        raise ValueError(
            f"{n} components asked of {len(values)} vectors of {values.shape[1]} values. Give from "
            f"1 to {max(most, 1)}, and at least two vectors."
        )
    if not np.isfinite(values).all():
        raise ValueError("Some values are NaN or infinite. Leave these vectors out.")
    mean = values.mean(0)
    left, size, directions = np.linalg.svd(values - mean, full_matrices=False)
    variance = size**2
    if not variance.sum() > 0:
        raise ValueError("All vectors are the same, so there is no direction in which they vary.")
    largest = np.abs(directions).argmax(1)
    sign = np.sign(directions[np.arange(len(directions)), largest])
    return PrincipalComponents(
        (left * size * sign)[:, :n],
        (directions * sign[:, None])[:n],
        (variance / variance.sum())[:n],
        mean,
    )
