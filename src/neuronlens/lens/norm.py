"""What a norm does to a small part of a state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearPart:
    """What a norm does to vectors beside dividing by their length: its scale, and centring.

    For a state of root mean square 1 (after centring, where the norm centres) it is how the norm
    passes on what was added to it, the length being held. For a state of another length the
    result is divided by that length. A bias is no part of it.

    The norm is run, and its weights are not read: on signs, whose mean is 0 and whose length is 1,
    it tells its scale; on a constant, whether it centres.

    Attributes:
        scale: Factor of every component.
        centres: Whether the mean is taken away first.
    """

    def __init__(self, norm: nn.Module, hidden: int) -> None:
        """Find it.

        Args:
            norm: Any module that computes scale * (x - mean) / length + bias, with or without mean
                and bias.
            hidden: Length of the vectors.
        """
        signs = torch.ones(hidden)
        signs[1::2] = -1
        if hidden % 2:
            signs[-1] = 0  # so that their mean is 0
        answers = [(_odd(norm, each), each) for each in (signs, signs.flip(0))]
        length = signs.square().mean().sqrt()
        (answer, sign), (other, turned) = answers
        scale = torch.where(
            sign.to(answer) != 0, answer * sign.to(answer), other * turned.to(other)
        )
        self.scale: Float[Tensor, " hidden"] = scale * length
        constant = _odd(norm, torch.ones(hidden))
        self.centres = bool(constant.abs().sum() < 1e-2 * self.scale.abs().sum())

    def __call__(self, x: Float[Tensor, "*axes hidden"]) -> Float[Tensor, "*axes hidden"]:
        """The linear part of vectors, in their type; gradients flow."""
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        return x * self.scale.to(x)

    def back(self, direction: Float[Tensor, "hidden k"]) -> Float[Tensor, "hidden k"]:
        """Of which a vector's product is that of its linear part with `direction`."""
        scaled = direction * self.scale.to(direction)[:, None]
        return scaled - scaled.mean(0) if self.centres else scaled


@torch.no_grad()
def _odd(norm: nn.Module, x: Float[Tensor, " hidden"]) -> Float[Tensor, " hidden"]:
    """A norm's answer to a vector, without its bias, in float32."""
    weight = next(iter(norm.parameters()), None)
    if weight is not None and not weight.is_meta:
        x = x.to(weight.device, weight.dtype)
    both: Tensor = norm.forward(torch.stack([x, -x])[None])[0].float()
    return (both[0] - both[1]) / 2
