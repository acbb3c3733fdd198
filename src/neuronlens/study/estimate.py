"""What a study would cost, before it is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neuronlens.adapters import ModelAdapter
from neuronlens.atlas import Atlas
from neuronlens.chat import ChatModel, Estimate
from neuronlens.classify import Category, Classification, NeuronClassifier
from neuronlens.errors import ChatError
from neuronlens.exemplars import EXPLAIN_RANKS, HELD_OUT_RANKS, VALIDATE_RANKS, exemplars
from neuronlens.explain import ChatExplainer, ExplanationJob, modalities
from neuronlens.explanation import Explanation
from neuronlens.neurons import NeuronId
from neuronlens.samples import Sample
from neuronlens.simulate import ChatSimulator, SimulationJob, Simulator
from neuronlens.study.run import NULL_DRAWS

_STAND_IN = Explanation(
    sentence="parts of animals that are covered with fur, and words that name such animals",
    phrases=("fur",),
)
"""About as long as explanations are: simulations are estimated with it."""


def estimate_study(
    adapter: ModelAdapter,
    atlas: Atlas,
    neurons: Iterable[NeuronId] | None = None,
    *,
    explainer: ChatExplainer,
    text_simulator: Simulator | None = None,
    kinds: Classification | None = None,
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
    the result is scaled to all neurons. Nothing is asked. Answers that are stored already are
    not counted among the questions for explanations; for simulations, which depend on the
    explanations, they are not known.

    Args:
        adapter: Of the scanned model.
        atlas: The scan.
        neurons: As for `explain_neurons`.
        explainer: Asks the chat model.
        text_simulator: As for `explain_neurons`; what does not ask a chat model costs nothing.
        kinds: The classification; by default with P1's constants.
        explain: Ranks to explain from.
        held_out: Ranks to score on.
        validate: Ranks by which the best of several explanations is chosen.
        best_of: How many explanations of each neuron one is chosen from.
        samples: The scanned samples, if the atlas cannot find them again.
        null_draws: How many other neurons' explanations are scored for the null.
        seed: Of all draws.
        probe: Neurons of each category that are looked at.

    Raises:
        ChatError: If the explainer's chat model gives no estimates.
    """
    chat = explainer.chat
    if not isinstance(chat, ChatModel):
        raise ChatError(
            f"{type(chat).__name__} gives no estimates: derive it from nl.chat.ChatModel."
        )
    kinds = kinds or NeuronClassifier().classify(atlas)
    chosen = list(dict.fromkeys(kinds.pick(seed=seed) if neurons is None else neurons))
    by_category: dict[Category, list[NeuronId]] = {}
    for neuron in chosen:
        by_category.setdefault(kinds.of(neuron), []).append(neuron)
    probed = [n for several in by_category.values() for n in _spread(several, probe)]
    found = exemplars(
        adapter,
        atlas,
        probed,
        explain=explain,
        held_out=held_out,
        contrast=explainer.contrast,
        samples=samples,
        seed=seed,
    )
    simulator = ChatSimulator(chat) if text_simulator is None else text_simulator
    # How often a neuron's held-out samples are simulated; the validation samples are as many.
    times = 1 + null_draws + (best_of * len(validate) / max(1, len(held_out)) if best_of > 1 else 0)
    total = Estimate(0, 0, 0, 0, None)
    for category, several in by_category.items():
        mine = [neuron for neuron in probed if neuron in several]
        asked = [
            explainer.request(ExplanationJob(n, category, found[n].explain, found[n].contrast, d))
            for n in mine
            for d in range(best_of)
        ]
        total += chat.estimate(asked).times(len(several) / len(mine))
        if isinstance(simulator, ChatSimulator):
            jobs = [
                SimulationJob(_STAND_IN, e.sample, e.tokens, e.text_roles)
                for n in mine
                if "text" in modalities(category, found[n].held_out)
                for e in found[n].held_out
            ]
            # Neurons that share a sample share no explanation: each question is another one.
            each = [chat.estimate([simulator.request(job)]) for job in jobs if job.text.any()]
            for one in each:
                total += one.times(times * len(several) / len(mine))
    return total


def _spread(neurons: Sequence[NeuronId], count: int) -> list[NeuronId]:
    """Some of them, from all over the sequence."""
    step = max(1, len(neurons) // count)
    return list(neurons[::step][:count])
