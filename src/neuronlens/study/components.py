"""What a study is made with: simulators by default, settings for the manifest, kept replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neuronlens.chat import ChatModel, ReplyStore
from neuronlens.errors import SegmenterError
from neuronlens.explain import Explainer, Modality
from neuronlens.explanation import Failure
from neuronlens.neurons import NeuronId
from neuronlens.segment import AnnotationSegmenter, CachedSegmenter, GroundedSegmenter
from neuronlens.simulate import (
    ChatSimulator,
    MaskSimulator,
    Simulation,
    SimulationJob,
    Simulator,
    WordSimulator,
)
from neuronlens.study.journal import MASKS, REPLIES


def named(neurons: Iterable[NeuronId | str]) -> list[NeuronId]:
    """Neurons, each once, whatever way they are given.

    Raises:
        TypeError: If it is a single one.
    """
    if isinstance(neurons, (NeuronId, str)):
        raise TypeError(f"Several neurons are needed, such as [{str(neurons)!r}].")
    parsed = (NeuronId.parse(each) if isinstance(each, str) else each for each in neurons)
    return list(dict.fromkeys(parsed))


def require(name: str, component: object, method: str, example: str) -> None:
    """Refuse what cannot do its part, before anything is recorded.

    Raises:
        TypeError: If the component has no such method.
    """
    if component is not None and (isinstance(component, type) or not hasattr(component, method)):
        raise TypeError(
            f"{name}={component!r:.80} cannot {method}. Give an object that can, such as {example}."
        )


def described(component: object) -> dict[str, Any]:
    """What a component's answers depend on, as far as it says."""
    return dict(getattr(component, "settings", {}))


class Simulators:
    """The simulators of a study: those given, or what follows from the explainer.

    Attributes:
        by_modality: One for visual, one for text tokens.
    """

    def __init__(
        self,
        explainer: Explainer,
        visual: Simulator | None,
        text: Simulator | None,
        folder: Path | None,
    ) -> None:
        chat = getattr(explainer, "chat", None)
        by_mask: Simulator = MaskSimulator(AnnotationSegmenter())
        by_word: Simulator = WordSimulator()
        if chat is not None:
            by_mask, by_word = GroundedByDefault(folder), ChatSimulator(chat)
        self.by_modality: dict[Modality, Simulator] = {
            "visual": visual or by_mask,
            "text": text or by_word,
        }

    def prepare(self, modalities: Iterable[Modality]) -> dict[str, str]:
        """Load what these need and is not loaded yet: what is missing is known before anyone asks.

        Returns:
            By modality, the name of what was chosen by default and is loaded.

        Raises:
            MissingExtraError: If a package is not installed.
            SegmenterError: If a segmenter cannot be loaded.
        """
        loaded: dict[str, str] = {}
        for modality in set(modalities):
            simulator = self.by_modality[modality]
            if isinstance(simulator, GroundedByDefault):
                loaded[modality] = simulator.prepare().segmenter.name
        return loaded

    @property
    def given(self) -> list[Simulator]:
        """Both of them."""
        return list(self.by_modality.values())

    @property
    def names(self) -> dict[str, str]:
        """Class of the simulator of each modality."""
        return {name: type(each).__name__ for name, each in self.by_modality.items()}

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What their answers depend on."""
        return {name: described(each) for name, each in self.by_modality.items()}


class GroundedByDefault:
    """Masks of Grounding DINO and SAM 2, loaded when it is known that they are needed."""

    settings: Mapping[str, object] = {"segmenter": "Grounding DINO and SAM 2, by default"}

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._loaded: MaskSimulator | None = None

    def prepare(self) -> MaskSimulator:
        """Load both models, once.

        Raises:
            MissingExtraError: If torchvision is not installed.
            SegmenterError: If a checkpoint cannot be loaded.
        """
        if self._loaded is None:
            try:
                segmenter = GroundedSegmenter.load()
            except (OSError, ValueError) as error:
                raise SegmenterError(
                    "Visual tokens are simulated with Grounding DINO and SAM 2 unless another "
                    f"visual_simulator is given, and these cannot be loaded: {error}"
                ) from error
            path = None if self._folder is None else self._folder / MASKS
            self._loaded = MaskSimulator(CachedSegmenter(segmenter, path))
        return self._loaded

    def simulate(self, jobs: Sequence[SimulationJob]) -> list[Simulation | Failure]:
        """Predict visual tokens that have a box."""
        return self.prepare().simulate(jobs)


class Replies:
    """The chat models behind a study's components, and the store its replies are kept in.

    A chat model whose caller did not say where keeps its answers in the study's folder from now
    on; of one with a file of its own, what the records name is copied: neither what was asked
    for the null nor for the scores of candidates.

    Attributes:
        store: Where the replies can be looked up; None if no chat model is asked.
    """

    def __init__(self, components: Iterable[object], folder: Path | None) -> None:
        found = [getattr(each, "chat", None) for each in components]
        self._chats = list({id(c): c for c in found if isinstance(c, ChatModel)}.values())
        self.store: ReplyStore | None = None
        if not self._chats:
            if folder is not None and (folder / REPLIES).exists():
                self.store = ReplyStore(folder / REPLIES)
            return
        if folder is None:
            stores = {id(chat.replies): chat.replies for chat in self._chats}
            self.store = next(iter(stores.values())) if len(stores) == 1 else ReplyStore()
            return
        path = (folder / REPLIES).resolve()
        chosen = [chat.replies for chat in self._chats if chat.chosen]
        here = [each for each in chosen if each.path and each.path.resolve() == path]
        self.store = here[0] if here else ReplyStore(folder / REPLIES)
        for chat in self._chats:
            if not chat.chosen:
                chat.keep_in(self.store)

    def keep(self, keys: Iterable[str]) -> None:
        """Make sure that these replies are in the study's store."""
        if self.store is None:
            return
        keys = list(keys)
        for chat in self._chats:
            if chat.replies is not self.store:
                chat.replies.copy_to(self.store, keys)

    def spent(self) -> str:
        """What the chat models have cost so far."""
        return "; ".join(str(chat.purse) for chat in self._chats)
