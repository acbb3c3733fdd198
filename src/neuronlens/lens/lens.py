"""The logit lens: every state of a model's residual stream through its own unembedding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from neuronlens.adapters import ModelAdapter, SiteSelection, require_adapter
from neuronlens.errors import AdapterError, DataError, SampleError, UnknownNameError
from neuronlens.hooks import refuse_compiled
from neuronlens.lens.averages import Averager
from neuronlens.lens.curves import EVERYTHING, NO_DOMAIN, By, EntropyCurves, Totals
from neuronlens.lens.decode import MEMORY, Decoder, entropies, top
from neuronlens.lens.feed import batches
from neuronlens.lens.inputs import MeanInputs, tokens_of
from neuronlens.lens.places import Place, placed, roles_of
from neuronlens.lens.reading import LensReading
from neuronlens.lens.readout import Readout, writing_sites
from neuronlens.lens.states import show_states
from neuronlens.lens.words import Words
from neuronlens.lens.writes import NeuronWrites, NormPart
from neuronlens.neurons import NeuronId
from neuronlens.samples import Batch, Sample, encode
from neuronlens.tokens import Role, TokenMap

Readable = Sample | Sequence[Sample] | Batch | Mapping[str, Any]
"""One sample, several, an encoded batch, or bare model inputs."""


class LogitLens:
    """Reads the model's states, and its neurons' columns, as words.

    ::

        lens = nl.LogitLens(vlm)
        lens.show(samples[0], position=("visual", 1))   # P2, Figure 6
        lens.entropy(samples).table()                   # P2, Figure 7
        lens.writes(vlm.neuron(layer=16, index=4347))

    Layer 0 is the embeddings: what the first decoder layer is given. Layer l is the output of the
    l-th decoder layer. The last one gives the model's own logits: states are taken by hooks,
    before the final norm, which `hidden_states[-1]` of transformers has already been through. Of
    an encoder-decoder model it is the decoder's states, whose tokens are the response's. Models
    that add image features between layers (DeepStack) are read before that, at image tokens.

    Attributes:
        adapter: Of the model.
        words: Size of the vocabulary.

    Source: P2, section 3.3, eq. (10).
    """

    def __init__(self, adapter: ModelAdapter, *, memory: int = MEMORY) -> None:
        """Find the model's way from states to logits.

        Args:
            adapter: Of the model.
            memory: Bytes that the logits of one chunk of tokens may take, with all that is
                computed from them. Fewer bytes are smaller chunks, and slower.

        Raises:
            AdapterError: If the model has no such way, no weights, or is in training mode; if
                it is given itself, and not its adapter.
            CaptureError: If the model is compiled.
            ValueError: If `memory` is no positive number.
        """
        require_adapter(adapter)
        if memory < 1:
            raise ValueError(f"memory is {memory} bytes. Give a positive number, such as 2**28.")
        refuse_compiled(adapter.model)
        adapter.require_eval()
        name, layers = type(adapter.model).__name__, adapter.decoding.layers
        if adapter.device.type == "meta":
            raise AdapterError(
                f"{name} is on the meta device: there are no weights to read the states of its "
                f"{len(layers)} layers with. Load them first."
            )
        self.adapter = adapter
        self._decoder = Decoder(adapter, memory)
        self.words = self._decoder.words
        self._texts = Words(adapter.processor)
        self._readouts: dict[NormPart, Readout] = {}

    @property
    def layers(self) -> range:
        """Every layer: 0 for the embeddings, up to the number of decoder layers."""
        return range(len(self.adapter.decoding.layers) + 1)

    def __repr__(self) -> str:
        return f"LogitLens({self.adapter.name!r}, {len(self.layers)} layers, {self.words:,} words)"

    # States.

    def read(
        self,
        samples: Readable,
        *,
        k: int = 5,
        layers: int | Iterable[int] | None = None,
        positions: Sequence[Place] | None = None,
        template: bool = True,
    ) -> LensReading:
        """The likeliest words at every layer and token.

        Args:
            samples: A sample or several (as one batch), a batch from `encode`, or model inputs.
            k: How many words.
            layers: Which layers, all by default; -1 is the last.
            positions: Which tokens of each sample, all but padding by default: their position, or
                a kind and a number, such as `("visual", 1)` or `("text", -1)`.
            template: Whether samples are encoded with the chat template.

        Source: P2, section 3.3; the entropy is that of section 4.2.3.

        Raises:
            UnknownNameError: If there is no such layer or token.
            ValueError: If k is below 1 or above the number of words, or nothing is to be read.
            SampleError: If a sample cannot be used.
            AdapterError: If samples are given and the adapter has no processor, or the batch is
                another model's.
        """
        if not 1 <= k <= self.words:
            raise ValueError(f"k is {k}. Give 1 to {self.words}, the size of the vocabulary.")
        if positions is not None and not positions:
            raise ValueError("No positions given: name at least one, or None for all.")
        chosen = self._layers(layers)
        batch = self._batch(samples, template)
        tokens = batch.tokens[self.adapter.answer_stream]
        rows = range(len(tokens.role))
        within = [placed(tokens, row, positions) for row in rows]
        at = torch.cat([tokens.where(row)[some] for row, some in zip(rows, within, strict=True)])
        found: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in chosen}

        def see(layer: int, states: Tensor) -> None:
            for _, log in self._decoder.chunks(states):
                found[layer].append((*top(log, k), entropies(log)))

        show_states(self.adapter, batch.on(self.adapter.device), tokens.role.shape, at, chosen, see)
        ids, probabilities, entropy = (
            np.stack([torch.cat([part[i] for part in found[layer]]).cpu() for layer in chosen])
            for i in range(3)
        )
        words = np.unique(ids).tolist()
        return LensReading(
            layers=chosen,
            ids=ids,
            probabilities=probabilities,
            entropy=entropy,
            tokens=self._tokens(batch, tokens, at, within),
            positions=torch.cat(within).numpy(),
            texts={word: self._texts.text(word) for word in words},
            words=self.words,
            samples=batch.samples,
        )

    def show(
        self,
        sample: Sample,
        *,
        position: Place = ("text", -1),
        k: int = 5,
        layers: int | Iterable[int] | None = None,
        template: bool = True,
    ) -> LensReading:
        """The likeliest words at one token, layer by layer: a heat map in a notebook.

        Args:
            sample: Any sample.
            position: Which token: by default the last of the text. `("visual", 1)` is the second
                of the images.
            k: How many words.
            layers: Which layers, all by default.
            template: Whether to use the chat template.

        Source: P2, Figure 6.

        Raises:
            UnknownNameError: If there is no such layer or token.
            ValueError: If k is below 1 or above the number of words.
            SampleError: If the sample cannot be used.
        """
        return self.read(sample, k=k, layers=layers, positions=[position], template=template)

    def entropy(
        self,
        samples: Iterable[Sample],
        *,
        batch_size: int = 8,
        layers: int | Iterable[int] | None = None,
        by: Literal["domain"] | By | None = "domain",
        text_roles: Sequence[str | Role] = ("prompt", "response"),
        compare: bool = False,
        template: bool = True,
        resamples: int = 1000,
        seed: int = 0,
        progress: bool = False,
    ) -> EntropyCurves:
        """Average entropy of the distribution over words, by layer, at visual and text tokens.

        Every layer's states are reduced to one number per token where and when they are computed:
        no logits of more than one chunk of tokens exist at a time, no states are kept, and the
        device is waited for once per batch. Padding and special tokens are in no mean.

        Args:
            samples: Samples, or rows that can be made samples.
            batch_size: Samples per forward.
            layers: Which layers, all by default; -1 is the last.
            by: What samples are grouped by: their domain, a function of the sample, or None for
                one group of all.
            text_roles: Which tokens are text.
            compare: Whether to compare every layer with the last: the divergence of their
                distributions and how often their likeliest words agree. This takes a second
                forward per batch, and each layer's logits twice.
            template: Whether to use the chat template. P2 identifies with `False`.
            resamples: How often samples are drawn for the interval; 0 for no interval.
            seed: Of the draws.
            progress: Whether to show a bar.

        Source: P2, section 4.2.3, Figure 7 and Table 9. The interval is ours.

        Raises:
            UnknownNameError: If there is no such layer or role.
            SampleError: If no sample can be used; says why the first one cannot.
            ValueError: If `batch_size` is below 1, `resamples` is negative, or there is no sample.
            AdapterError: If the adapter has no processor.
        """
        if batch_size < 1 or resamples < 0:
            raise ValueError(
                f"batch_size is {batch_size} and resamples {resamples}: give at least 1 and 0."
            )
        group = _grouping(by)
        chosen, roles = self._layers(layers), roles_of(text_roles)
        if Role.VISUAL in roles or Role.PAD in roles:
            raise ValueError("text_roles may hold prompt, response and special: only text.")
        averager = Averager(self.adapter, self._decoder, chosen, roles, compare, group)
        totals = Totals(len(chosen), averager.measures)
        skipped: dict[str, SampleError] = {}
        done = 0
        with tqdm(desc="lens", unit="sample", disable=not progress) as bar:
            for batch in self._batches(samples, batch_size, template, skipped):
                done += averager.add(batch, totals, skipped)
                bar.update(len(batch.samples))
        if not done:
            raise next(iter(skipped.values()), None) or ValueError(
                "No samples given: the entropy needs at least one."
            )
        return totals.curves(
            chosen,
            words=self.words,
            text_roles=roles,
            skipped=skipped,
            resamples=resamples,
            seed=seed,
        )

    # Neurons.

    def writes(
        self, neuron: NeuronId | str, *, k: int = 10, norm: NormPart = "scale"
    ) -> NeuronWrites:
        """The words that a neuron of the language model raises and lowers most.

        Its column of the down projection goes through the unembedding. That is its direct effect
        on the logits; what later layers make of it is not in it.

        Args:
            neuron: Which neuron, or how it is written (`"language.16/4347"`).
            k: How many words of each.
            norm: What of the final norm is applied: `"scale"`, its scale (and centring), so that
                values are logits at a final state of length 1; or `"none"`.

        Raises:
            UnknownNameError: If the model has no such neuron.
            AdapterError: If it is no neuron of the stack that makes the logits, or its column has
                no logits of its own; the message says why.
            ValueError: If k is below 1 or above the number of words.
        """
        if not 1 <= k <= self.words:
            raise ValueError(f"k is {k}. Give 1 to {self.words}, the size of the vocabulary.")
        one = NeuronId.parse(neuron) if isinstance(neuron, str) else neuron
        logits = self.contributions([one], norm=norm)[0]
        can_come = self._readout(norm).can_come.numpy()
        order = np.argsort(-logits, kind="stable")
        order = order[can_come[order]]
        raised, lowered = order[:k], order[::-1][:k]
        return NeuronWrites(
            neuron=one,
            raised=raised,
            raised_by=logits[raised],
            lowered=lowered,
            lowered_by=logits[lowered],
            mean=float(logits[can_come].mean(dtype=np.float64)),
            texts={int(word): self._texts.text(int(word)) for word in {*raised, *lowered}},
            norm=norm,
        )

    def contributions(
        self,
        neurons: NeuronId | str | Iterable[NeuronId | str],
        words: str | int | Sequence[str | int] | None = None,
        *,
        norm: NormPart = "scale",
    ) -> Float[np.ndarray, "neuron word"]:
        """Logits that neurons add, per unit of what their down projection takes.

        Args:
            neurons: Which neurons, one or more.
            words: Of which words, one or more, or their numbers; all by default.
            norm: As in `writes`.

        Returns:
            Float32, one row per neuron in the given order; 0 for words that the model never gives.

        Raises:
            UnknownNameError: If there is no such neuron or word.
            AdapterError: As in `writes`.
        """
        neurons = [neurons] if isinstance(neurons, (NeuronId, str)) else neurons
        words = [words] if isinstance(words, (str, int)) else words
        several = [NeuronId.parse(n) if isinstance(n, str) else n for n in neurons]
        numbers = None if words is None else [self._number(word) for word in words]
        return self._readout(norm).of(several, numbers, self._decoder.size)

    def writers(
        self,
        word: str | int,
        *,
        n: int = 50,
        sites: SiteSelection = "language",
        samples: Iterable[Sample] | None = None,
        at: Literal["before", "all"] | Sequence[str | Role] = "before",
        relative: bool = True,
        norm: NormPart = "scale",
        batch_size: int = 8,
        template: bool = True,
        progress: bool = False,
    ) -> list[tuple[NeuronId, float]]:
        """The neurons that write a word the most.

        Without samples, by their columns: the logit per unit of what the down projection takes,
        **largest absolute value first**. Its sign alone does not tell whether a neuron says or
        unsays the word: in a gated block the input is act_fn(gate) * up, and up may be negative
        whenever the gate is open. With samples, by what they really write: that logit times the
        mean input at the chosen tokens, largest first; negative values lower the word there.

        Args:
            word: A word of one token, as it is within a text, or its number.
            n: How many neurons; fewer if there are not as many.
            sites: Among which neurons: of a module those that write into the stream that is
                unembedded.
            samples: Samples to run. Those that cannot be used are left out, with a warning.
            at: At which tokens inputs are averaged: `"before"`, those whose next token is the
                word, `"all"` but padding, or kinds of tokens such as `["visual"]`.
            relative: Whether to take off the mean over all words, which changes no probability.
            norm: As in `writes`.
            batch_size: Samples per forward.
            template: Whether to use the chat template.
            progress: Whether to show a bar.

        Returns:
            Neurons with their values. Those of routed experts are before the router's weight.

        Raises:
            UnknownNameError: If the word is no single token, or there is no such site or role.
            AdapterError: As in `writes`.
            DataError: If no token of the samples is chosen.
            SampleError: If no sample can be used.
            ValueError: If n or `batch_size` is below 1, or `at` is given without samples.
        """
        if n < 1 or batch_size < 1:
            raise ValueError(f"n is {n} and batch_size {batch_size}: give at least 1.")
        if samples is None and at != "before":
            raise ValueError(
                f"at={at!r} says at which tokens of samples inputs are averaged, and no samples "
                "were given: give samples=, or leave out at=."
            )
        number = self._number(word)
        readout = self._readout(norm)
        chosen = writing_sites(self.adapter, sites)
        inputs = None
        if samples is not None:
            tokens = tokens_of(self.adapter, at, number)
            inputs = MeanInputs(self.adapter, chosen)
            skipped: dict[str, SampleError] = {}
            every = self._batches(samples, batch_size, template, skipped)
            inputs.run(tqdm(every, desc="inputs", unit="batch", disable=not progress), tokens)
            if skipped and inputs.tokens:
                warnings.warn(
                    f"{len(skipped)} samples were left out: {', '.join(list(skipped)[:5])}. "
                    f"{next(iter(skipped.values()))}",
                    stacklevel=2,
                )
            if inputs.tokens == 0:
                raise next(iter(skipped.values()), None) or DataError(
                    f"No token of the samples is followed by {self._texts.text(number)!r}: give "
                    "samples whose text has the word, or at='all'."
                    if at == "before"
                    else f"The samples have no token of the kind {at!r}."
                )
        return readout.writers(number, chosen, n, relative, inputs)

    def _readout(self, norm: NormPart) -> Readout:
        if norm not in self._readouts:
            self._readouts[norm] = Readout(self.adapter, norm, self.words)
        return self._readouts[norm]

    def _number(self, word: str | int) -> int:
        if isinstance(word, str):
            return self._texts.number(word)
        if not 0 <= word < self.words:
            raise UnknownNameError("word", word, [f"0 to {self.words - 1}"])
        return word

    # What is read.

    def _layers(self, layers: int | Iterable[int] | None) -> tuple[int, ...]:
        """Checked numbers of layers, in order, each once."""
        if layers is None:
            return tuple(self.layers)
        found = []
        for layer in [layers] if isinstance(layers, int) else layers:
            known = [f"0 (embeddings) to {self.layers[-1]} (the last)"]
            if isinstance(layer, (str, bool)) or not hasattr(layer, "__index__"):
                raise UnknownNameError("layer", layer, known, "Layers are numbers.")
            if not -len(self.layers) <= layer < len(self.layers):
                raise UnknownNameError("layer", layer, known)
            found.append(self.layers[layer])
        if not found:
            raise ValueError("No layers given: name at least one, or None for all.")
        return tuple(sorted(set(found)))

    def _batch(self, given: Readable, template: bool) -> Batch:
        if isinstance(given, Batch):
            if given.adapter.model is not self.adapter.model:
                raise AdapterError("The batch was encoded for another model. Encode it with this.")
            return given
        if isinstance(given, Sample):
            return encode(self.adapter, [given], template=template)
        if isinstance(given, Mapping):
            return Batch(dict(given), self.adapter.tokens(given), (), self.adapter)
        return encode(self.adapter, list(given), template=template)

    def _batches(
        self,
        samples: Iterable[Sample],
        size: int,
        template: bool,
        skipped: dict[str, SampleError],
    ) -> Iterator[Batch]:
        if isinstance(samples, Sample):
            samples = [samples]
        return batches(self.adapter, samples, size, template, skipped)

    def _tokens(
        self, batch: Batch, tokens: TokenMap, at: Tensor, within: Sequence[Tensor]
    ) -> TokenMap:
        """The map of the tokens that are read, on one axis."""
        stream = self.adapter.answer_stream
        pieces = None
        if self.adapter.processor is not None:
            pieces = tuple(
                each[i]
                for row, some in enumerate(within)
                for each in [batch.pieces(row, stream)]
                for i in some.tolist()
            )
        return TokenMap(
            role=tokens.role.flatten()[at],
            sample=tokens.sample.flatten()[at],
            image=tokens.image.flatten()[at],
            box=tokens.box.reshape(-1, 4)[at],
            pieces=pieces,
        )


def _grouping(by: Literal["domain"] | By | None) -> By:
    if by is None:
        return lambda sample: EVERYTHING
    if callable(by):
        return by
    if by != "domain":
        raise UnknownNameError("grouping", by, ["domain", "a function of the sample", "None"])
    return lambda sample: sample.domain or NO_DOMAIN
