"""Trials: an explanation, simulated on a neuron's exemplars and scored against the truth."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from neuronlens.classify import Category
from neuronlens.errors import ChatError
from neuronlens.exemplars import Exemplar
from neuronlens.explain import Modality, modalities
from neuronlens.explanation import Explanation, Failure
from neuronlens.score import Score, neuron_score
from neuronlens.simulate import Simulation, SimulationJob, Simulator
from neuronlens.study.each import one_each, together

ACTIVE_LEVEL = 3.0
"""From which level a patch counts as active for the overlap of masks: 30 % of the neuron's
maximum, which is what P1's T_v = 2 asks for on whole numbers (docs/methods.md, reading 3)."""


@dataclass(frozen=True, eq=False)
class Trial:
    """An explanation, and the exemplars it is to be tested on.

    Attributes:
        explanation: Of the neuron, or of another one for its null.
        category: Of the neuron; decides which tokens count.
        exemplars: To test on.
        resamples: How often samples are drawn for the score's interval.
    """

    explanation: Explanation
    category: Category
    exemplars: tuple[Exemplar, ...]
    resamples: int = 0


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a trial ended.

    Attributes:
        score: Or why there is none.
        simulated: Predicted activations on each exemplar, NaN where nothing was predicted.
        asked: Keys of the requests that were answered.
    """

    score: Score | Failure
    simulated: Sequence[Float[np.ndarray, " token"]] = ()
    asked: tuple[str, ...] = ()


def run_trials(
    trials: Sequence[Trial],
    simulators: Mapping[Modality, Simulator],
    seed: int,
    *,
    have_worked: Collection[Modality] = (),
) -> list[Outcome]:
    """Every trial's outcome; each simulator gets all its jobs in one call, beside the others.

    Args:
        trials: What to simulate and score.
        simulators: One of each modality.
        seed: Of the resamples.
        have_worked: Whose simulators have answered before; see `one_each`.
    """
    counts = [modalities(trial.category, trial.exemplars) for trial in trials]
    stopped = threading.Event()

    def answers(modality: Modality) -> dict[tuple[int, Modality], list[Simulation | Failure]]:
        mine = [i for i, names in enumerate(counts) if modality in names]
        jobs = [
            SimulationJob(trials[i].explanation, e.sample, e.tokens, e.text_roles)
            for i in mine
            for e in trials[i].exemplars
        ]
        simulator = simulators[modality]
        worked = modality in have_worked
        if stopped.is_set():
            raise ChatError("Simulating was stopped before it began.")
        replies = iter(one_each(simulator, simulator.simulate, jobs, has_worked=worked))
        return {(i, modality): [next(replies) for _ in trials[i].exemplars] for i in mine}

    needed: list[Modality] = [m for m in simulators if any(m in names for names in counts)]

    def stop() -> None:
        stopped.set()
        cancel(simulators.values())

    found = together({name: partial(answers, name) for name in needed}, stop)
    by_trial = {key: replies for part in found.values() for key, replies in part.items()}
    return [
        _outcome(trial, {m: by_trial[i, m] for m in counts[i]}, seed)
        for i, trial in enumerate(trials)
    ]


def cancel(components: Iterable[object]) -> None:
    """Make the chat models of these components stop soon."""
    for each in components:
        stop = getattr(getattr(each, "chat", None), "cancel", None)
        if stop is not None:
            stop()


def _outcome(
    trial: Trial, answers: Mapping[Modality, Sequence[Simulation | Failure]], seed: int
) -> Outcome:
    if not trial.exemplars:
        return Outcome(Failure("no held-out exemplar"))
    sides: dict[Modality, list[tuple[np.ndarray, np.ndarray]]] = {}
    simulated = [np.full(len(each.tokens), np.nan) for each in trial.exemplars]
    asked: list[str] = []
    for modality, replies in answers.items():
        sides[modality] = []
        for each, reply, whole in zip(trial.exemplars, replies, simulated, strict=True):
            if isinstance(reply, Failure):
                lost = () if reply.asked is None else (reply.asked,)
                why = Failure(f"{modality} simulation: {reply.reason}", passing=reply.passing)
                return Outcome(why, asked=(*asked, *lost))
            at = each.visual if modality == "visual" else each.text
            whole[at] = reply.values[at]
            sides[modality].append((each.activation[at], reply.values[at]))
            if reply.asked is not None:
                asked.append(reply.asked)
    active = None
    if "visual" in sides:
        active = [each.level[each.visual] >= ACTIVE_LEVEL for each in trial.exemplars]
    score = neuron_score(sides, active=active, resamples=trial.resamples, seed=seed)
    return Outcome(score, simulated, tuple(asked))
