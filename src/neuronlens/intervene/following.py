"""Which tokens an intervention means, forward after forward and step after step of generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from neuronlens.adapters import ModelAdapter
from neuronlens.adapters.change import Rows, Where
from neuronlens.adapters.steps import attended, cached_tokens, generated_roles, repeats
from neuronlens.errors import AdapterError, CaptureError, InterventionError
from neuronlens.hooks import generating, recomputing, watched
from neuronlens.intervene.part import Part
from neuronlens.intervene.stream import Stream
from neuronlens.neurons import NeuronSite
from neuronlens.tokens import Role, TokenMap

COMPLETE = "Give tokens=batch.tokens, as encode() makes them"


@dataclass(eq=False)
class _Sequence:
    """A batch from its start: one forward, and the steps that continue it.

    Attributes:
        maps: Of its prompt, or of all that was given.
        length: Ids of its prompt.
        is_told: Whether it is known where the prompt ends.
        ids: Those of the last forward.
        done: How many tokens of the language stream were fed.
        expanded: Maps of streams that run for every beam by itself, where they do.
        streams: What was made of the maps, by stream and number of beams.
    """

    maps: Mapping[str, TokenMap]
    length: int
    is_told: bool
    ids: Int[Tensor, "row token"] | None = None
    done: int = 0
    expanded: Mapping[str, TokenMap] = field(default_factory=dict)
    streams: dict[tuple[str, int], Stream] = field(default_factory=dict)

    def stream(self, name: str, beams: int = 1) -> Stream:
        """The tokens of a stream, for every beam of a sample."""
        key = name, beams
        if key not in self.streams:
            self.streams[key] = Stream.of(self.maps[name]).repeated(beams)
        return self.streams[key]

    @property
    def samples(self) -> int:
        """How many the batch has."""
        return len(self.maps["language"].role)


@dataclass(frozen=True, eq=False)
class _Step:
    """One forward of a sequence: `first` to `last` are its tokens on the language stream."""

    sequence: _Sequence
    ids: Int[Tensor, "row token"]
    first: int
    last: int

    @property
    def copies(self) -> int:
        return len(self.ids) // self.sequence.samples


class Following:
    """Tells which of a site's rows are meant, while a model runs inside a block.

    Token maps are given, or told from the inputs of each forward. `generate()` is listened to:
    images may be encoded before the model is first called, and its prompt may be fed in chunks.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokens: Mapping[str, TokenMap] | None = None,
        samples: int | None = None,
    ) -> None:
        """Say what is known.

        Args:
            adapter: Of the model.
            tokens: The complete map of each stream; None to tell them.
            samples: How many a batch must have; None for any number.
        """
        self.adapter = adapter
        self._given = tokens
        self._wanted = samples
        self._generate: dict[str, Any] | None = None
        self._sequence: _Sequence | None = None
        self._step: _Step | None = None
        self._open = False
        self._phase = self._forwards = 0
        self._rows: dict[tuple[bool, str, Part], Rows] = {}
        self.met: dict[Part, bool] = {}
        """Whether any token was meant, by part whose sites ran."""
        self._reached: dict[tuple[str, Part], tuple[int, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the model for the length of the block."""
        with ExitStack() as stack:
            stack.enter_context(generating(self.adapter.model, self._begin_all, self._end_all))
            stack.enter_context(watched(self.adapter.model, self._begin, self._end))
            yield

    def where(self, site: NeuronSite, part: Part) -> Where:
        """Which rows of a site a part means, call by call."""
        return partial(self._next, site, part)

    # What the model does.

    def _begin_all(self, inputs: dict[str, Any]) -> None:
        if not isinstance(inputs.get(self.adapter.text_input), Tensor):
            inputs = inputs | {self.adapter.text_input: inputs.get("inputs")}
        self._generate, self._sequence = inputs, None
        self._open, self._step = False, None
        self._new_phase()

    def _end_all(self) -> None:
        self._generate = self._sequence = None

    def _begin(self, inputs: dict[str, Any]) -> None:
        self._open, self._step = True, None
        self._new_phase()
        self._forwards += 1
        ids = inputs.get(self.adapter.text_input)
        if inputs.get("encoder_outputs") is not None:
            raise CaptureError(
                "generate() of an encoder-decoder model runs its encoder by itself, where roles, "
                "positions and samples of tokens are not followed. Change neurons at every token, "
                "or call the model with the whole decoder_input_ids inside the block."
            )
        if not isinstance(ids, Tensor):
            raise CaptureError(
                f"The model was called without {self.adapter.text_input}, so its tokens cannot be "
                f"told apart. Call it with {self.adapter.text_input}, not inputs_embeds."
            )
        done = cached_tokens(inputs)
        sequence = self._sequence
        if self._generate is not None:
            sequence = sequence or self._of_generate(inputs)
        elif done == 0 and (
            sequence is None or sequence.ids is None or not repeats(sequence.ids, ids)
        ):
            sequence = self._of_forward(inputs, ids)
        elif sequence is None or done not in (0, sequence.done):
            have = 0 if sequence is None else sequence.done
            raise CaptureError(
                f"This step continues {done} cached tokens, but {have} were followed. Enter the "
                "intervention before the first forward of a sequence."
            )
        samples = sequence.samples
        if len(ids) % samples or (len(ids) != samples and self._generate is None):
            raise CaptureError(
                f"The token maps are of {samples} samples, but the model was given {len(ids)} "
                "rows. Are they those of this batch?"
            )
        copies = len(ids) // samples
        if done == 0 and copies > 1 and not sequence.expanded:
            sequence.expanded = self._expanded(inputs, sequence, copies)
        prefix = 0
        if done == 0 and self.adapter.prefixes_images:
            prefix = sequence.maps["language"].role.shape[1] - sequence.length
        last = done + ids.shape[1] + prefix
        self._sequence = sequence
        sequence.ids, sequence.done = (ids if done == 0 else None), last
        self._step = _Step(sequence, ids, done, last)

    def _end(self) -> None:
        self._open = False

    def _new_phase(self) -> None:
        self._phase += 1
        self._rows.clear()

    # What is known of the tokens.

    def _of_generate(self, forward: Mapping[str, Any] | None = None) -> _Sequence:
        """The sequence that `generate()` was asked for."""
        assert self._generate is not None
        inputs, name, mask = dict(self._generate), self.adapter.text_input, self.adapter.text_mask
        ids = inputs.get(name)
        if not isinstance(ids, Tensor):
            raise CaptureError(
                f"generate() was called without {name}, so its tokens cannot be told apart. Give "
                f"it {name}, not inputs_embeds."
            )
        if inputs.get(mask) is None and forward is not None and forward.get(mask) is not None:
            fed = forward[name]
            step = len(fed) // len(ids)
            inputs[mask] = attended(forward[mask], fed, 0)[::step]  # it made one by itself
        sequence = _Sequence(self._maps(inputs), ids.shape[1], True)
        self._check(sequence, ids.shape[1])
        self._sequence = sequence
        return sequence

    def _of_forward(self, inputs: Mapping[str, Any], ids: Int[Tensor, "row token"]) -> _Sequence:
        """The sequence that a forward begins."""
        sequence = _Sequence(self._maps(inputs), ids.shape[1], self._given is not None)
        is_chunk = inputs.get("past_key_values") is not None
        self._check(sequence, ids.shape[1], may_be_part=is_chunk)
        return sequence

    def _maps(self, inputs: Mapping[str, Any]) -> Mapping[str, TokenMap]:
        if self._given is not None:
            return self._given
        try:
            return self.adapter.tokens(inputs)
        except AdapterError as error:
            raise AdapterError(
                f"It cannot be told what each token is, so neurons cannot be changed at some of "
                f"them: {error} {COMPLETE}, or change the neurons at every token."
            ) from error

    def _check(self, sequence: _Sequence, length: int, may_be_part: bool = False) -> None:
        have = sequence.maps["language"].role.shape[1]
        fits = have == length or (may_be_part and have > length)
        if self._given is not None and not fits and not self.adapter.prefixes_images:
            raise CaptureError(
                f"The token maps that were given are of {have} tokens, but the model was given "
                f"{length}. Are they those of this batch?"
            )
        if self._wanted not in (None, sequence.samples):
            raise InterventionError(
                f"The intervention is of {self._wanted} samples, one by one, but the batch has "
                f"{sequence.samples}. Give one entry for each sample of the batch."
            )

    def _expanded(
        self, inputs: Mapping[str, Any], sequence: _Sequence, copies: int
    ) -> Mapping[str, TokenMap]:
        """Maps of the images of every beam, if they are encoded for every beam."""
        name, mask = self.adapter.text_input, self.adapter.text_mask
        attention = attended(inputs.get(mask), inputs[name], 0)
        try:
            found = self.adapter.tokens({**inputs, mask: attention})
        except AdapterError:  # the forward has no images: they were encoded before, once
            return {}
        return {name: each for name, each in found.items() if name not in self._texts}

    @property
    def _is_inside(self) -> bool:
        """Whether what runs now belongs to a forward of the model."""
        return self._open or recomputing()

    @property
    def _texts(self) -> set[str]:
        """Streams on which there may be a response."""
        return {"language", self.adapter.answer_stream, *self.adapter.growing}

    def _stream(self, name: str) -> tuple[Stream, bool]:
        """A stream's tokens in what runs now, and whether it is known where the prompt ends."""
        step = self._step
        if step is None or not self._is_inside:
            return self._outside(name)
        sequence = step.sequence
        if name in self.adapter.growing:
            whole = sequence.stream(name, step.copies)
            behind = step.last - max(whole.role.shape[1], step.first)
            new = step.ids[:, step.ids.shape[1] - max(0, behind) :].cpu()
            roles = generated_roles(self.adapter, new).long()
            return whole.step(step.first, step.last, roles), sequence.is_told
        if name in sequence.expanded:
            return Stream.of(sequence.expanded[name], step.copies), sequence.is_told
        return self._of_map(sequence.maps, name), sequence.is_told

    def _outside(self, name: str) -> tuple[Stream, bool]:
        """A stream's tokens where the model itself is not running."""
        if self._generate is not None and name not in self._texts:
            sequence = self._sequence or self._of_generate()
            return self._of_map(sequence.maps, name), True
        if self._generate is None and self._given is not None:
            return self._of_map(self._given, name), True
        raise CaptureError(
            f"A site of the stream {name!r} ran outside a call of the model, so it cannot be told "
            "what its tokens are. Call the model itself, not a part of it. If its generate() does "
            "so, change the neurons at every token, or run forwards over the generated ids."
        )

    def _of_map(self, maps: Mapping[str, TokenMap], name: str) -> Stream:
        if name not in maps:
            raise CaptureError(
                f"A site runs on the stream {name!r}, of which there is no token map (there are: "
                f"{', '.join(maps)})."
            )
        return Stream.of(maps[name])

    # What is meant.

    def _next(self, site: NeuronSite, part: Part, count: int) -> Rows:
        """Which of the next `count` rows of a site a part means."""
        if recomputing() and self._forwards > 1:
            raise CaptureError(
                "Gradient checkpointing runs a block once more, and after several forwards it is "
                "not known of which. Run one forward and its backward() in a block of their own."
            )
        whole = self._chosen(site.stream, part)
        if count == whole.count:
            return whole
        # A block may run once per tile: its tokens are complete when the stream's are.
        key = site.name, part
        phase, first = self._reached.get(key, (self._phase, 0))
        if phase != self._phase:
            first = 0
        if first + count > whole.count or recomputing():
            raise CaptureError(
                f"Site {site.name} gave {count} tokens where its stream {site.stream!r} has "
                f"{whole.count}{f', of which {first} have run' if first else ''}. Are the token "
                "maps those of this batch? Some models leave prompt tokens out of their last "
                "layers while generating: ask generate() for output_hidden_states=True, "
                "return_dict_in_generate=True."
            )
        last = first + count
        self._reached[key] = self._phase, last % whole.count
        return whole.part(first, count)

    def _chosen(self, name: str, part: Part) -> Rows:
        key = self._is_inside, name, part
        if key not in self._rows:
            stream, is_told = self._stream(name)
            if name in self._texts and not is_told:
                _need_no_end(part)
            is_whole = name not in self.adapter.growing
            rows = self._rows[key] = stream.rows(part, is_whole=is_whole)
            self.met[part] = self.met.get(part, False) or len(rows.index) > 0
        return self._rows[key]


def _need_no_end(part: Part) -> None:
    """Refuse what depends on where the prompt ends.

    Raises:
        CaptureError: If the part does.
    """
    roles = part.roles or ()
    if (Role.PROMPT in roles) != (Role.RESPONSE in roles):
        raise CaptureError(
            "A forward alone does not tell the prompt's tokens from the response's. "
            f"{COMPLETE}, or use roles='text', which is both. In generate() they are told."
        )
    if part.has_negative_positions:
        raise CaptureError(
            "Negative positions are counted from the end of the prompt, and a forward alone does "
            f"not tell where that is. {COMPLETE}, or count from the start. In generate() it is "
            "told."
        )
