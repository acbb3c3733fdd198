"""What interventions do to each token of given responses: one forward, nothing generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Skipped
from neuronlens.errors import DataError, MissingExtraError, SkippedError, UnknownNameError
from neuronlens.evaluate.batches import Encoded, Encoder, parts, require_own_ids, sample_units
from neuronlens.evaluate.conditions import NONE, Interventions, applied, conditions_of
from neuronlens.evaluate.finite import not_finite, note_of, warn_of_not_finite
from neuronlens.evaluate.groups import Group, Groups
from neuronlens.evaluate.resampling import RESAMPLES, Estimated, Measured, Values
from neuronlens.intervene import Intervention
from neuronlens.lens.decode import MEMORY, Decoder
from neuronlens.lens.states import show_states
from neuronlens.samples import Sample, as_sample
from neuronlens.show import Html, table
from neuronlens.tokens import Role

if TYPE_CHECKING:
    import pandas as pd

Number = Literal["loss", "right"]

NUMBERS: Final[tuple[Number, ...]] = ("loss", "right")


@dataclass(frozen=True)
class ResponseToken:
    """A token of a response, which the model has to predict.

    Attributes:
        sample: Id of its sample.
        domain: Of the sample.
        place: Position within the response, from 0.
        text: As it is written, without spaces around it.
        kind: The same; what groups of tokens are named by.
    """

    sample: str
    domain: str | None
    place: int
    text: str

    @property
    def kind(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True, eq=False)
class ResponseLoss:
    """How well a model predicts given responses, as it is and under interventions.

    Attributes:
        tokens: Every token of the responses, sample by sample.
        units: Number of the set of images each is about; intervals draw whole images with all
            responses about them.
        measured: By number and condition. `"loss"`: minus the log-probability of the token, in
            nats. `"right"`: 1 where it is the likeliest of all words, else 0. Both are NaN where
            the model's logits are no numbers; those are in no mean.
        skipped: Samples that could not be used, the same under every condition.
    """

    tokens: tuple[ResponseToken, ...]
    units: tuple[int, ...]
    measured: Mapping[Number, Measured]
    skipped: tuple[Skipped, ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Their names, the untouched model first."""
        return tuple(self.measured["loss"].values)

    def values(self, condition: str, number: Number = "loss") -> Float[np.ndarray, "member token"]:
        """A number of every token under a condition.

        Raises:
            UnknownNameError: If there is no such condition or number.
        """
        return self._of(number).values[self._known(condition)]

    def mean(
        self,
        condition: str,
        *,
        group: Group[ResponseToken] | None = None,
        number: Number = "loss",
    ) -> Estimated:
        """The mean over tokens.

        Args:
            condition: Its name.
            group: Of tokens: a word, or a function that is true for those in it.
            number: `"loss"` or `"right"`.

        Raises:
            UnknownNameError: If there is no such condition, word or number.
        """
        rows = Groups(self.tokens, "kind").rows(group)
        return self._of(number).mean(self._known(condition), rows)

    def compare(
        self,
        one: str,
        other: str = NONE,
        *,
        group: Group[ResponseToken] | None = None,
        versus: Group[ResponseToken] | None = None,
        number: Number = "loss",
    ) -> Estimated:
        """How much more one condition has than another, token by token.

        With `versus`, the difference of differences, as in `Evaluation.compare`.

        Args:
            one: A condition.
            other: What is taken away from it.
            group: Of tokens: a word, or a function that is true for those in it.
            versus: Another group; `"others"` for all tokens that are not in `group`.
            number: `"loss"` or `"right"`.

        Raises:
            UnknownNameError: If there is no such condition, word or number.
            DataError: If a group is empty or two have tokens in common, or there is `versus`
                without `group`.
        """
        names = self._known(one), self._known(other)
        groups = Groups(self.tokens, "kind")
        if versus is None:
            return self._of(number).difference(*names, groups.rows(group))
        if group is None:
            raise DataError("versus= compares a group with another: give group= too.")
        return self._of(number).difference(*names, *groups.others(group, versus))

    def table(self) -> pd.DataFrame:
        """Means and differences to the untouched model, a row for each condition.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("pandas", "table", "A data frame") from None
        rows = []
        for condition in self.conditions:
            row: dict[str, object] = {"condition": condition}
            for number in NUMBERS:
                row[number] = self.mean(condition, number=number).value
                if NONE in self.conditions and condition != NONE:
                    change = self.compare(condition, number=number)
                    low, high = change.interval or (float("nan"), float("nan"))
                    row |= {
                        f"{number}_change": change.value,
                        f"{number}_change_low": low,
                        f"{number}_change_high": high,
                    }
            rows.append(row)
        return pd.DataFrame(rows)

    def _of(self, number: Number) -> Measured:
        if number not in NUMBERS:
            raise UnknownNameError("number of a token", number, NUMBERS)
        return self.measured[number]

    def _known(self, condition: str) -> str:
        if condition not in self.conditions:
            raise UnknownNameError("condition", condition, self.conditions)
        return condition

    def __repr__(self) -> str:
        lost = not_finite(self.measured["loss"].values)
        told = f", {lost} losses not finite" if lost else ""
        return (
            f"ResponseLoss({len(self.tokens)} tokens of {self._responses} responses, "
            f"conditions {', '.join(self.conditions)}{told})"
        )

    @property
    def _responses(self) -> int:
        return len({each.sample for each in self.tokens})

    def _repr_html_(self) -> Html:
        rows = []
        for name in self.conditions:
            compared = NONE in self.conditions and name != NONE
            rows.append(
                [
                    name,
                    str(self.mean(name)),
                    str(self.compare(name)) if compared else "",
                    str(self.mean(name, number="right")),
                    str(self.compare(name, number="right")) if compared else "",
                ]
            )
        head = ["condition", "loss (nats)", "difference to none", "right", "difference to none"]
        title = (
            f"{len(self.tokens):,} tokens of {self._responses:,} responses on "
            f"{len(set(self.units)):,} sets of images; 95 % intervals draw these. "
            f"Skipped: {len(self.skipped)}. {note_of(self.measured['loss'].values)}"
        ).rstrip()
        return table(head, rows, title)


def response_loss(
    adapter: ModelAdapter,
    samples: Iterable[Sample],
    interventions: Interventions | None = None,
    *,
    template: bool = True,
    batch_size: int = 8,
    baseline: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> ResponseLoss:
    """How well the samples' own responses are predicted, as the model is and under interventions.

    The cheapest look at what neurons are needed for: each response is an input (teacher-forced),
    one forward per batch and condition tells the loss of every token, and tokens can be grouped
    by word. So, whether neurons that are said to find red things are needed to say "red"::

        loss = nl.response_loss(vlm, samples, {
            "red": nl.deactivate(vlm, neurons),
            "random": [
                nl.deactivate(vlm, nl.random_control(vlm, neurons, seed=seed))
                for seed in range(5)
            ],
        })
        loss.compare("red", "random", group="red", versus="others", number="right")

    A later mention of a word can be copied from an earlier one, which is an input: group by
    `ResponseToken.place` too where that matters.

    Args:
        adapter: Of the model, with its processor.
        samples: With responses; those without are skipped, by name.
        interventions: By name, what `nl.deactivate`, `nl.amplify` or `nl.set_to` return, or
            several of these that stand for one another.
        template: Whether to use the processor's chat template.
        batch_size: Samples per forward.
        baseline: Whether to run the untouched model, which differences are to.
        resamples: How often intervals draw whole images with all responses about them; 0 for none.
        seed: Of the draws.
        progress: Whether to show a bar.

    Source: ours; the papers measure answers to questions (`evaluate`) and hidden states
    (`hidden_state_deviation`).

    Raises:
        DataError: If ids repeat.
        InterventionError: If an intervention is none, or of another model.
        AdapterError: If the model has no decoding (no single state gives its logits), is in
            training mode, or has no processor.
        SkippedError: If no sample could be used.
    """
    given = [as_sample(each, position) for position, each in enumerate(samples)]
    if batch_size < 1 or resamples < 0:
        raise DataError(
            f"batch_size={batch_size}, resamples={resamples} were given; they must be at least 1 "
            "and 0."
        )
    require_own_ids(given)
    conditions = conditions_of(adapter, interventions, baseline=baseline)
    adapter.require_eval()
    decoder = Decoder(adapter, MEMORY)
    encoder = Encoder(adapter, template=template, side="right", response=True)
    tokens: list[ResponseToken] = []
    positions: list[int] = []
    found: dict[tuple[str, int], list[Float[Tensor, "number token"]]] = {}
    members = [(each.name, n, m) for each in conditions for n, m in enumerate(each.members)]
    with tqdm(total=len(given), desc="responses", unit="sample", disable=not progress) as bar:
        for part in parts(len(given), batch_size):
            for encoded in encoder([(position, given[position]) for position in part]):
                asked = _Asked.of(encoded)
                tokens += asked.tokens
                positions += asked.positions
                for name, number, member in members:
                    numbers = asked.numbers(decoder, member)
                    found.setdefault((name, number), []).append(numbers)
            bar.update(len(part))
    if not tokens:
        told = encoder.skipped[0].detail if encoder.skipped else "None was given."
        raise SkippedError(f"None of the {len(given)} samples could be used. {told}")

    def values(place: int) -> dict[str, Values]:
        return {
            each.name: torch.stack(
                [torch.cat(found[each.name, n], 1)[place] for n in range(len(each.members))]
            ).numpy()
            for each in conditions
        }

    used = sorted(set(positions))  # a draw of what is not there would be lost
    unit_of = dict(zip(used, sample_units([given[at] for at in used]), strict=True))
    units = [unit_of[position] for position in positions]
    warn_of_not_finite(values(0), [each.sample for each in tokens], "losses")
    return ResponseLoss(
        tuple(tokens),
        tuple(units),
        {
            number: Measured(values(place), units, resamples=resamples, seed=seed)
            for place, number in enumerate(NUMBERS)
        },
        tuple(encoder.skipped),
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """The response tokens of a batch, and where the states are that predict them."""

    encoded: Encoded
    tokens: list[ResponseToken]
    positions: list[int]
    before: Int[Tensor, " token"]
    ids: Int[Tensor, " token"]

    @classmethod
    def of(cls, encoded: Encoded) -> _Asked:
        batch = encoded.batch
        stream = batch.adapter.answer_stream
        there = batch.tokens[stream]
        tokens: list[ResponseToken] = []
        positions: list[int] = []
        places: list[Tensor] = []
        for row, (position, sample) in enumerate(
            zip(encoded.positions, batch.samples, strict=True)
        ):
            mine = there.where(row)
            said = (there.role.flatten()[mine] == Role.RESPONSE).nonzero().squeeze(1).tolist()
            pieces = batch.pieces(row, stream)
            tokens += [
                ResponseToken(sample.id, sample.domain, place, pieces[at].strip())
                for place, at in enumerate(said)
            ]
            positions += [position] * len(said)
            places.append(mine[said])
        at = torch.cat(places)
        # Padding is on the right: the place before a token of the response is the token before.
        return cls(encoded, tokens, positions, at - 1, batch.ids(stream).flatten()[at])

    def numbers(
        self, decoder: Decoder, member: Intervention | None
    ) -> Float[Tensor, "number token"]:
        """Loss and whether it is the likeliest word, of each token."""
        batch = self.encoded.batch
        adapter = batch.adapter
        role = batch.tokens[adapter.answer_stream].role
        kept: list[Tensor] = []

        def see(_layer: int, states: Any) -> None:
            wanted = self.ids.to(states.device)
            for chunk, log in decoder.chunks(states):
                word = wanted[chunk]
                loss = -log.gather(1, word[:, None]).squeeze(1)
                right = (log.argmax(1) == word).to(loss.dtype)
                right[loss.isnan()] = torch.nan
                kept.append(torch.stack([loss, right]).double().cpu())

        with applied(member, batch.tokens):
            show_states(
                adapter,
                batch.on(adapter.device),
                role.shape,
                self.before,
                [len(adapter.decoding.layers)],
                see,
            )
        return torch.cat(kept, 1)
