"""How far interventions move a model's last hidden states."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Skipped
from neuronlens.errors import (
    DataError,
    MissingExtraError,
    SkippedError,
    UnknownNameError,
)
from neuronlens.evaluate.batches import Encoder, parts, require_own_ids, sample_units
from neuronlens.evaluate.conditions import Interventions, applied, conditions_of
from neuronlens.evaluate.finite import not_finite, note_of, warn_of_not_finite
from neuronlens.evaluate.folder import put
from neuronlens.evaluate.groups import By, Group, Groups
from neuronlens.evaluate.resampling import RESAMPLES, Estimated, Measured
from neuronlens.evaluate.states import (
    Padding,
    Tokens,
    kept_tokens,
    last_states,
    share_moved,
)
from neuronlens.lines import writing
from neuronlens.samples import Sample
from neuronlens.show import Html, escaped, table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Deviation:
    """How far each intervention moves the last hidden states of each sample.

    A share: 0 where nothing moves, 1 where the states move by as much as they are long; P2 prints
    per cent. Intervals are percentile bootstraps at 95 %: sets of images are drawn with
    replacement, with all samples on them, and controls of several seeds by themselves.

    Attributes:
        samples: Those that were run, in their order.
        units: Number of the set of images of each sample.
        skipped: Samples that could not be encoded.
        shares: By condition, the deviation of each sample under each of its members; NaN where a
            state is no finite number, or all are 0. Those are in no mean.
        tokens: Over which tokens: `"all"` of the prompt, or the `"last"` one.
        model: Where the model was loaded from.
        resamples: How often intervals draw.
        seed: Of the draws.
    """

    samples: tuple[Sample, ...]
    units: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    shares: Mapping[str, Float[np.ndarray, "member sample"]]
    tokens: Tokens
    model: str
    resamples: int
    seed: int

    @property
    def conditions(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.shares)

    @cached_property
    def _measured(self) -> Measured:
        return Measured(self.shares, self.units, resamples=self.resamples, seed=self.seed)

    def mean(
        self, condition: str, *, group: Group[Sample] | None = None, by: By[Sample] = "domain"
    ) -> Estimated:
        """Mean share over samples, and over members.

        Args:
            condition: Its name.
            group: Of samples: its name, or a function that is true for those in it.
            by: What a group's name is: the samples' domain, or a function of them.

        Raises:
            UnknownNameError: If there is no such condition or group.
        """
        return self._measured.mean(self._known(condition), Groups(self.samples, by).rows(group))

    def compare(
        self,
        one: str,
        other: str,
        *,
        group: Group[Sample] | None = None,
        versus: Group[Sample] | None = None,
        by: By[Sample] = "domain",
    ) -> Estimated:
        """How much farther one condition moves the states than another.

        With `versus`, how much larger that is in `group` than there; `"others"` are all samples
        that are not in `group`.

        Raises:
            UnknownNameError: If there is no such condition or group.
            DataError: If a group is empty or two have samples in common, or there is `versus`
                without `group`.
        """
        names = self._known(one), self._known(other)
        groups = Groups(self.samples, by)
        if versus is None:
            return self._measured.difference(*names, groups.rows(group))
        if group is None:
            raise DataError("versus= compares a group with another: give group= too.")
        return self._measured.difference(*names, *groups.others(group, versus))

    def table(self, by: By[Sample] | None = None) -> pd.DataFrame:
        """Mean share of each condition (and group) with its interval, as P2's Table 3.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("pandas", "table", "A data frame") from None
        groups = Groups(self.samples, by or "domain")
        names: Sequence[str | None] = [None] if by is None else groups.known
        rows = []
        for condition in self.conditions:
            for name in names:
                found = self._measured.mean(condition, groups.rows(name))
                low, high = found.interval or (np.nan, np.nan)
                row: dict[str, object] = {"condition": condition}
                row |= {} if by is None else {"group": name}
                row |= {"deviation": found.value, "low": low, "high": high}
                row |= {"samples": found.rows, "members": len(self.shares[condition])}
                rows.append(row)
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write every sample's share into a JSON file.

        Raises:
            OutputError: If it cannot be written.
        """
        path = Path(path)
        told = {
            "model": self.model,
            "tokens": self.tokens,
            "seed": self.seed,
            "resamples": self.resamples,
            "samples": [
                {"id": each.id, "domain": each.domain, "images": unit}
                for each, unit in zip(self.samples, self.units, strict=True)
            ],
            "skipped": [each.model_dump() for each in self.skipped],
            "shares": {name: values.tolist() for name, values in self.shares.items()},
        }
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, json.dumps(told) + "\n")

    def __repr__(self) -> str:
        lost = not_finite(self.shares)
        told = f", {lost} numbers not finite" if lost else ""
        names = ", ".join(self.conditions)
        return f"Deviation({len(self.samples)} samples, conditions {names}{told})"

    def _repr_html_(self) -> Html:
        groups = Groups(self.samples).known
        head = ["condition", "deviation", *(groups if len(groups) > 1 else [])]
        rows = []
        for name in self.conditions:
            members = len(self.shares[name])
            row = [name if members == 1 else f"{name} (mean of {members})", str(self.mean(name))]
            if len(groups) > 1:
                row += [str(self.mean(name, group=group)) for group in groups]
            rows.append(row)
        over = "all prompt tokens" if self.tokens == "all" else "the last prompt token"
        said = (
            f"Share by which the last layer's output moves over {over}; {len(self.samples)} "
            "samples, 95 % intervals."
        )
        if self.skipped:
            counted = Counter(each.reason for each in self.skipped)
            told = ", ".join(f"{reason} ({count})" for reason, count in counted.items())
            said += f" {len(self.skipped)} samples were skipped: {told}."
        said = f"{said} {note_of(self.shares)}".rstrip()
        note = Html(f'<div style="font-size:12px;opacity:.7">{escaped(said)}</div>')
        return Html(table(head, rows, f"Hidden-state deviation of {self.model}") + note)

    def _known(self, condition: str) -> str:
        if condition not in self.shares:
            raise UnknownNameError("condition", condition, self.shares)
        return condition


def hidden_state_deviation(
    adapter: ModelAdapter,
    samples: Iterable[Sample],
    interventions: Interventions,
    *,
    tokens: Tokens = "all",
    template: bool = True,
    batch_size: int = 8,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> Deviation:
    """How far interventions move what the last decoder layer gives for a prompt.

    Per sample, ||H_n - H_d|| / ||H_n||: H_n is the output of the last decoder layer, before the
    final norm, in the untouched model, H_d the same under an intervention, and the norm is the
    root of the sum of squares over all tokens and components. Responses are left out. For an
    encoder-decoder it is the decoder, which has read the prompt and has one token: the start of
    the answer. ::

        deviation = nl.hidden_state_deviation(
            vlm, [each.identification() for each in questions], {"all": nl.deactivate(vlm, found)},
            template=False,
        )
        deviation.table(by="domain")

    The untouched model runs once for each batch, and a sample's states are those it has alone, up
    to rounding; where padding changes them, samples are run one by one. Sums are taken in float64.
    An intervention on neurons that cannot change the output (the last layer of a vision tower that
    is read at layer -2) gives exactly 0.

    Args:
        adapter: Of the model, with its processor.
        samples: Images and prompts.
        interventions: By name, what `nl.deactivate`, `nl.amplify` or `nl.set_to` return, or
            several of these that stand for one another (random controls of several seeds).
        tokens: Over `"all"` tokens of the prompt (images and special tokens included, padding
            not), or the `"last"` one, from which the answer begins.
        template: Whether the processor's chat template goes around prompts; P2's identification
            prompts have none.
        batch_size: Samples per forward.
        resamples: How often intervals draw; 0 for none.
        seed: Of intervals.
        progress: Whether to show a bar.

    Source: P2, section 4.3, Table 3. The text writes ||.||_2 of hidden states and does not say
    over which tokens; of a matrix, it is read as the Frobenius norm over the prompt. Table 3 is
    in per cent, this is a share. Its control draws indices with replacement; here
    `nl.random_control` does not.

    Raises:
        DataError: If there is no sample, or ids repeat.
        InterventionError: If an intervention is none, or of another model.
        AdapterError: If the model has no decoder layers, is in training mode, or its processor is
            missing.
        SkippedError: If no sample could be encoded.
        UnknownNameError: If `tokens` is neither.
    """
    if tokens not in get_args(Tokens):
        raise UnknownNameError("choice of tokens", tokens, get_args(Tokens))
    given = list(samples)
    if not given or not all(isinstance(each, Sample) for each in given):
        odd = next((each for each in given if not isinstance(each, Sample)), None)
        raise DataError(
            "No samples were given: hidden_state_deviation needs at least one."
            if odd is None
            else f"A {type(odd).__name__} was given among the samples. Of questions, give "
            "question.identification() or question.sample(prompt)."
        )
    require_own_ids(given)
    if batch_size < 1 or resamples < 0:
        raise DataError(
            f"batch_size={batch_size}, resamples={resamples} were given; they must be at least 1 "
            "and 0."
        )
    conditions = conditions_of(adapter, interventions, baseline=False)
    adapter.require_eval()
    asked = [replace(each, response=None) for each in given]
    encoder = Encoder(adapter, template=template, side="right")
    shares = {each.name: np.full((len(each.members), len(asked)), np.nan) for each in conditions}
    last = adapter.decoding.layers[-1]
    padding = Padding(encoder, last)
    with tqdm(total=len(asked), desc="deviation", unit="sample", disable=not progress) as bar:
        for part in parts(len(asked), batch_size):
            for encoded in padding.apart(encoder([(at, asked[at]) for at in part])):
                inputs = encoded.batch.on(adapter.device)
                kept = kept_tokens(adapter, encoded, tokens)
                normal = last_states(adapter, last, inputs, kept)
                for condition in conditions:
                    for member, intervention in enumerate(condition.members):
                        with applied(intervention, encoded.batch.tokens):
                            moved = last_states(adapter, last, inputs, kept)
                        shares[condition.name][member, list(encoded.positions)] = [
                            share_moved(*pair) for pair in zip(normal, moved, strict=True)
                        ]
            bar.update(len(part))
    lost = {each.position for each in encoder.skipped}
    there = [at for at in range(len(given)) if at not in lost]
    if not there:
        raise SkippedError(
            f"None of the {len(given)} samples could be encoded. {encoder.skipped[0].detail}"
        )
    shares = {name: values[:, there] for name, values in shares.items()}
    warn_of_not_finite(shares, [given[at].id for at in there], "deviations")
    return Deviation(
        samples=tuple(given[at] for at in there),
        units=tuple(sample_units([given[at] for at in there])),
        skipped=tuple(encoder.skipped),
        shares=shares,
        tokens=tokens,
        model=adapter.name,
        resamples=resamples,
        seed=seed,
    )
