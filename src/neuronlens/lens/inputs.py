"""Mean input of the down projections at chosen tokens: what neurons really write with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.adapters import ModelAdapter
from neuronlens.errors import CaptureError
from neuronlens.lens.places import roles_of
from neuronlens.neurons import NeuronSite
from neuronlens.recorder import record
from neuronlens.samples import Batch
from neuronlens.tokens import Role, TokenMap

Chosen = Callable[[Batch], Bool[Tensor, "batch token"]]
"""Which tokens of a batch count."""


class MeanInputs:
    """Sums of what each neuron's down projection takes, over chosen tokens.

    A token that is not routed to a neuron's expert counts 0. The weights with which the experts
    of a token are added are not in it.

    Attributes:
        tokens: How many tokens were chosen.
    """

    def __init__(self, adapter: ModelAdapter, sites: Sequence[NeuronSite]) -> None:
        # The same model read at another place: its sites and taps are shared.
        self._adapter = copy.copy(adapter)
        self._adapter.neuron_kind = "down_input"
        self._sites = list(sites)
        self._sums: dict[str, Float[Tensor, " neuron"]] = {}
        self._chosen: Tensor = torch.zeros(0, dtype=torch.bool)
        self.tokens = 0

    def run(self, batches: Iterable[Batch], chosen: Chosen) -> None:
        """Run the batches that have chosen tokens."""
        for batch in batches:
            self._chosen = chosen(batch)
            count = int(self._chosen.sum())
            if count == 0:
                continue
            self.tokens += count
            inputs = batch.on(self._adapter.device)
            with (
                torch.inference_mode(),
                record(self._adapter, self._sites, self, batch.tokens, stop=True),
            ):
                self._adapter.forward(inputs, logits=False)

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        """Add one site's inputs at the chosen tokens."""
        at = self._chosen.to(activation.device)
        if isinstance(activation, Routed):
            expert = activation.expert[at].reshape(-1)
            values = activation.values[at].reshape(-1, site.width).double()
            total = values.new_zeros(site.experts + 1, site.width)
            total.index_add_(0, torch.where(expert < 0, site.experts, expert), values)
            total = total[:-1].flatten()
        else:
            total = activation[at].double().sum(0)
        total = total.cpu()
        self._sums[site.name] = self._sums.get(site.name, 0) + total

    def mean(self, site: NeuronSite) -> Float[Tensor, " neuron"]:
        """Mean over the chosen tokens, in float64.

        Raises:
            CaptureError: If it is not finite.
        """
        mean = self._sums[site.name] / self.tokens
        if not mean.isfinite().all():
            raise CaptureError(
                f"The down projection of {site.name} was given NaN or infinity. Which sample it "
                "was, LogitLens.entropy tells: it leaves such samples out by name."
            )
        return mean


def tokens_of(
    adapter: ModelAdapter, at: Literal["before", "all"] | Sequence[str | Role], word: int
) -> Chosen:
    """Which tokens count: all but padding, those of some kinds, or those before a word.

    Raises:
        UnknownNameError: If there is no such kind of token.
    """
    stream = adapter.answer_stream
    if at == "before":
        return lambda batch: _before(batch, batch.tokens[stream], word)
    if at == "all":
        return lambda batch: batch.tokens[stream].role != Role.PAD
    roles = roles_of([at] if isinstance(at, str) else at)
    return lambda batch: batch.tokens[stream].is_role(*roles)


def _before(batch: Batch, tokens: TokenMap, word: int) -> Bool[Tensor, "batch token"]:
    """Tokens whose next token is the word."""
    adapter = batch.adapter
    is_language = adapter.answer_stream == "language"
    ids = batch.inputs[adapter.text_input if is_language else "decoder_input_ids"].cpu()
    # Images that the model puts before the text have no token of their own.
    ids = F.pad(ids, (tokens.role.shape[1] - ids.shape[1], 0), value=-1)
    here = (ids == word) & (tokens.role != Role.PAD) & (tokens.role != Role.VISUAL)
    before = torch.zeros_like(here)
    before[:, :-1] = here[:, 1:]
    return before & (tokens.role != Role.PAD)
