"""The states of a model's last decoder layer, each sample's as it has them alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.errors import AdapterError
from neuronlens.evaluate.batches import Encoded, Encoder
from neuronlens.hooks import Call, Point, attached
from neuronlens.tokens import Role

_log = logging.getLogger("neuronlens.evaluate")

Tokens = Literal["all", "last"]


class Padding:
    """Takes batches apart in which a padded row is not what it is alone.

    With padding behind the text it is, but where attention picks blocks (MiniMax M3 in
    transformers 5.20): found out on the first batch with padding.
    """

    def __init__(self, encoder: Encoder, path: str) -> None:
        self._encoder = encoder
        self._path = path
        self._is_safe: bool | None = None

    def apart(self, batches: Sequence[Encoded]) -> list[Encoded]:
        """The batches, or their rows one by one."""
        found: list[Encoded] = []
        for each in batches:
            pads = _padding(each)
            if len(each.positions) == 1 or not any(pads) or self._is_harmless(each, pads):
                found.append(each)
            else:
                found += each.alone(self._encoder)
        return found

    def _is_harmless(self, encoded: Encoded, pads: Sequence[int]) -> bool:
        if self._is_safe is None:
            adapter = self._encoder.adapter
            rows = dict.fromkeys((pads.index(max(pads)), len(pads) - 1))
            together = self._states(encoded)
            limit = 1e-4 if adapter.dtype in (torch.float32, torch.float64) else 0.03
            # What cannot be compared is not known to be harmless.
            self._is_safe = all(
                (one := encoded.row(self._encoder, row)) is not None
                and share_moved(self._states(one)[0], together[row]) <= limit
                for row in rows
            )
            if not self._is_safe:
                _log.warning(
                    "%s gives a padded row other states than the row alone, so samples are run "
                    "one by one.",
                    type(adapter.model).__name__,
                )
        return self._is_safe

    def _states(self, encoded: Encoded) -> list[Float[Tensor, "token state"]]:
        adapter = self._encoder.adapter
        kept = kept_tokens(adapter, encoded, "all")
        return last_states(adapter, self._path, encoded.batch.on(adapter.device), kept)


def _padding(encoded: Encoded) -> list[int]:
    """How many tokens of each row are padding."""
    counts: list[int] = (encoded.batch.tokens["language"].role == Role.PAD).sum(1).tolist()
    return counts


def kept_tokens(
    adapter: ModelAdapter, encoded: Encoded, tokens: Tokens
) -> Bool[Tensor, "row token"]:
    """Which tokens of the stack that answers count."""
    kept = encoded.batch.tokens[adapter.answer_stream].role != Role.PAD
    if tokens == "all":
        return kept
    at = torch.arange(kept.shape[1])
    last = torch.where(kept, at, -1).amax(1, keepdim=True)
    return at == last


def last_states(
    adapter: ModelAdapter, path: str, inputs: dict[str, Any], kept: Bool[Tensor, "row token"]
) -> list[Float[Tensor, "token state"]]:
    """What the last layer gives for the tokens that count, row by row, in float64."""
    given: list[Tensor] = []

    def keep(call: Call) -> None:
        given.append(adapter.decoding.residual(call.out).detach())

    point = Point(adapter.model.get_submodule(path), keep)
    with torch.no_grad(), attached({path: [point]}):
        adapter.forward(inputs, logits=False)
    (state,) = given
    if state.shape[:2] != kept.shape:
        raise AdapterError(
            f"{path} gave states for {list(state.shape[:2])} rows and tokens, but the inputs "
            f"have {list(kept.shape)}, so which tokens they are is not known."
        )
    # Off the device before float64: not every device has it.
    rows = zip(state.cpu(), kept, strict=True)
    return [row[at].double().flatten(1) for row, at in rows]


def share_moved(normal: Float[Tensor, "token state"], moved: Float[Tensor, "token state"]) -> float:
    """The Frobenius norm of the change, as a share of that of the normal states.

    NaN where that is no finite number.
    """
    share = float((normal - moved).norm() / normal.norm())
    return share if math.isfinite(share) else math.nan
