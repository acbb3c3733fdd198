"""What is known of the tokens that run through a site, and which of them a part means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuronlens.adapters.change import Rows
from neuronlens.errors import InterventionError
from neuronlens.intervene.part import Part
from neuronlens.tokens import Role, TokenMap


@dataclass(frozen=True, eq=False)
class Stream:
    """The tokens of one stream in one forward, in the order in which they run.

    Attributes:
        role: Of each.
        sample: Number within the batch that was given: beams of a sample have its number.
        place: Position within the sample, padding not counted; -1 for padding.
        prompt: How many tokens the prompt of each one's sample has on this stream. Negative
            positions are counted from its end.
    """

    role: Int[Tensor, "*axes"]
    sample: Int[Tensor, "*axes"]
    place: Int[Tensor, "*axes"]
    prompt: Int[Tensor, "*axes"]

    @classmethod
    def of(cls, tokens: TokenMap, copies: int = 1) -> Stream:
        """The tokens of a map of which so many samples each are beams of one.

        A stream without a response is a prompt as a whole.
        """
        role, sample = tokens.role.flatten().long(), tokens.sample.flatten().long()
        is_real = (role != Role.PAD) & (sample >= 0)
        place, prompt = torch.full_like(sample, -1), torch.zeros_like(sample)
        for number in sample[sample >= 0].unique().tolist():
            mine = sample == number
            at = (mine & is_real).nonzero().squeeze(1)
            place[at] = torch.arange(len(at))
            answer = (role[at] == Role.RESPONSE).nonzero()
            prompt[mine] = int(answer[0]) if len(answer) else len(at)
        owner = torch.where(sample < 0, sample, sample // copies)
        axes = tokens.role.shape
        return cls(*(each.reshape(axes) for each in (role, owner, place, prompt)))

    def repeated(self, copies: int) -> Stream:
        """Each row so many times, one after the other: `sample * beams + beam`."""
        parts = self.role, self.sample, self.place, self.prompt
        return Stream(*(each.repeat_interleave(copies, 0) for each in parts))

    def step(self, first: int, last: int, new: Int[Tensor, "row generated"]) -> Stream:
        """Tokens `first` to `last` of every row; those behind the end have the roles `new`."""
        end = self.role.shape[1]
        behind = torch.arange(max(end, first), max(end, last)) - end
        count = self.place.amax(1, keepdim=True) + 1
        whole = (
            torch.cat([self.role[:, first:last], new], 1),
            _with(self.sample[:, first:last], self.sample[:, :1].expand_as(new)),
            _with(self.place[:, first:last], (count + behind).expand_as(new)),
            _with(self.prompt[:, first:last], self.prompt[:, :1].expand_as(new)),
        )
        return Stream(*whole)

    def rows(self, part: Part, *, is_whole: bool) -> Rows:
        """Those that a part means.

        Args:
            part: Which.
            is_whole: Whether no more tokens will come on this stream.

        Raises:
            InterventionError: If a sample has no token at a position that it should have.
        """
        meant = torch.ones_like(self.role, dtype=torch.bool)
        if part.sample is not None:
            meant &= self.sample == part.sample
        if part.positions is not None:
            meant &= self._is_at(part, is_whole)
        if part.roles is not None:
            meant &= torch.isin(self.role, torch.tensor(sorted(part.roles)))
        return Rows(meant.flatten().nonzero().squeeze(1), meant.numel())

    def _is_at(self, part: Part, is_whole: bool) -> Bool[Tensor, "*axes"]:
        assert part.positions is not None
        meant = torch.zeros_like(self.role, dtype=torch.bool)
        for number in self.sample[self.place >= 0].unique().tolist():
            if part.sample not in (None, number):
                continue
            wanted = part.positions_in(number)
            mine = (self.sample == number) & (self.place >= 0)
            length, prompt = int(self.place[mine].max()) + 1, int(self.prompt[mine].min())
            beyond = [each for each in wanted if each < -prompt or (is_whole and each >= length)]
            if beyond:
                raise InterventionError(
                    f"Sample {number} of the batch has no token at position {beyond[0]}: its "
                    f"prompt has {prompt} tokens there without padding, {length} with what follows."
                )
            at = torch.tensor(wanted, dtype=torch.long)
            is_there = torch.isin(self.place, at) | torch.isin(self.place - self.prompt, at[at < 0])
            meant |= mine & is_there
        return meant


def _with(prompt: Tensor, generated: Tensor) -> Tensor:
    return torch.cat([prompt, generated], 1)
