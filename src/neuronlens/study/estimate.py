"""What a study would cost, before it is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas
from neuronlens.chat import ChatModel, Estimate, ReplyStore, Request
from neuronlens.classify import Category, Classification, NeuronClassifier
from neuronlens.errors import ChatError
from neuronlens.exemplars import EXPLAIN_RANKS, HELD_OUT_RANKS, VALIDATE_RANKS, exemplars
from neuronlens.explain import ChatExplainer, ExplanationJob, modalities
from neuronlens.explanation import Explanation
from neuronlens.lines import read_lines
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample
from neuronlens.simulate import ChatSimulator, SimulationJob, Simulator
from neuronlens.study.components import named
from neuronlens.study.journal import RECORDS, REPLIES
from neuronlens.study.records import NeuronRecord
from neuronlens.study.run import NULL_DRAWS

_STAND_IN = Explanation(
    sentence="parts of animals that are covered with fur, and words that name such animals",
    phrases=("fur",),
)
"""About as long as explanations are: simulations are estimated with it."""


def estimate_study(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId | str] | None = None,
    *,
    explainer: ChatExplainer,
    text_simulator: Simulator | None = None,
    kinds: Classification | None = None,
    out: str | Path | None = None,
    sampling: Literal["top", "random"] = "top",
    explain: Sequence[int] = EXPLAIN_RANKS,
    held_out: Sequence[int] = HELD_OUT_RANKS,
    validate: Sequence[int] = VALIDATE_RANKS,
    best_of: int = 1,
    samples: Sequence[Sample] | None = None,
    null_draws: int = NULL_DRAWS,
    seed: int = 0,
    probe: int = 8,
) -> Estimate:
    """About how many requests, tokens and what price `explain_neurons` would take.

    A few neurons of each category are re-recorded, their questions are made and counted, and
    the result is scaled to all neurons. Nothing is asked, and nothing is written. Answers that
    are stored already, by the chat model or in `out`, are not counted among the questions for
    explanations; for simulations, which depend on the explanations, they are not known. Neurons
    that are recorded in `out` cost nothing more.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: As for `explain_neurons`.
        explainer: Asks the chat model.
        text_simulator: As for `explain_neurons`; what does not ask a chat model costs nothing.
        kinds: The classification; by default with P1's constants.
        out: Folder of the study, if it may have been begun.
        sampling: As for `explain_neurons`.
        explain: Ranks to explain from.
        held_out: Ranks to score on.
        validate: Ranks by which the best of several explanations is chosen.
        best_of: How many explanations of each neuron one is chosen from.
        samples: The scanned samples, if the atlas cannot find them again.
        null_draws: How many other neurons' explanations are scored for the null.
        seed: Of all draws.
        probe: Neurons of each category that are looked at.

    Raises:
        ChatError: If the chat model of the explainer or of the simulator gives no estimates.
        DataError: If what `out` holds is damaged.
        ValueError: If `probe` or `best_of` is below 1, or `null_draws` below 0.
    """
    if probe < 1 or best_of < 1 or null_draws < 0:
        raise ValueError(
            f"probe={probe}, best_of={best_of}, null_draws={null_draws} were given; they must be "
            "at least 1, 1 and 0."
        )
    chat = _estimating(explainer)
    simulator = ChatSimulator(chat) if text_simulator is None else text_simulator
    simulating = _estimating(simulator) if isinstance(simulator, ChatSimulator) else chat
    kinds = kinds or NeuronClassifier().classify(atlas)
    chosen = named(kinds.pick(seed=seed) if neurons is None else neurons)
    done, replies = _begun(None if out is None else Path(out))
    by_category: dict[Category, list[NeuronId]] = {}
    for neuron in (neuron for neuron in chosen if neuron not in done):
        by_category.setdefault(kinds.of(neuron), []).append(neuron)
    probed = [n for several in by_category.values() for n in _spread(several, probe)]
    found = exemplars(
        adapter,
        atlas,
        probed,
        explain=explain,
        held_out=held_out,
        # What is drawn to explain from depends on them.
        validate=validate if best_of > 1 else (),
        contrast=explainer.contrast,
        sampling=sampling,
        samples=samples,
        seed=seed,
        only=probed,  # samples that are gone end no study, if others are left
    )
    # How often a neuron's held-out samples are simulated; the validation samples are as many.
    times = 1 + null_draws + (best_of * len(validate) / max(1, len(held_out)) if best_of > 1 else 0)
    total = chat.estimate([])
    for category, several in by_category.items():
        mine = [neuron for neuron in probed if neuron in several]
        asked = [
            explainer.request(ExplanationJob(n, category, found[n].explain, found[n].contrast, d))
            for n in mine
            if modalities(category, found[n].explain) and found[n].explain
            for d in range(best_of)
        ]
        total += _of(chat, asked, replies).times(len(several) / len(mine))
        if isinstance(simulator, ChatSimulator):
            jobs = [
                SimulationJob(_STAND_IN, e.sample, e.tokens, e.text_roles)
                for n in mine
                if "text" in modalities(category, found[n].held_out)
                for e in found[n].held_out
            ]
            # Neurons that share a sample share no explanation: each question is another one.
            each = [simulating.estimate([simulator.request(j)]) for j in jobs if j.text.any()]
            for one in each:
                total += one.times(times * len(several) / len(mine))
    return total


def _estimating(asking: ChatExplainer | ChatSimulator) -> ChatModel:
    """The chat model of a component, which must be one that says what it would cost."""
    chat = asking.chat
    if not isinstance(chat, ChatModel):
        raise ChatError(
            f"{type(chat).__name__} gives no estimates: derive it from nl.chat.ChatModel."
        )
    return chat


def _begun(folder: Path | None) -> tuple[set[NeuronId], ReplyStore | None]:
    """What a study's folder holds: the finished neurons, and the stored answers."""
    if folder is None:
        return set(), None
    records = folder / RECORDS
    done = read_lines(records, NeuronRecord, torn=True) if records.exists() else []
    there = (folder / REPLIES).exists()
    replies = ReplyStore(folder / REPLIES, read_only=True) if there else None
    return {record.id for record in done}, replies


def _of(chat: ChatModel, requests: Sequence[Request], replies: ReplyStore | None) -> Estimate:
    """What asking these would cost, if a study's own answers are used as well."""
    if replies is None:
        return chat.estimate(requests)
    left = [each for each in requests if each.key(chat.identity) not in replies]
    return chat.estimate(left) + Estimate(0, len(requests) - len(left), 0, 0, None)


def _spread(neurons: Sequence[NeuronId], count: int) -> list[NeuronId]:
    """Some of them, from all over the sequence."""
    step = max(1, len(neurons) // count)
    return list(neurons[::step][:count])
