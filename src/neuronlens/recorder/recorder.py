"""Keeping the activations of any forward or `generate()`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from neuronlens.activations import Activation, Routed
from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.adapters.steps import attended, cached_tokens, generated_roles, repeats
from neuronlens.errors import AdapterError, CaptureError
from neuronlens.hooks import (
    attached,
    overheard,
    recomputing,
    refuse_compiled,
    uncompiled,
    watched,
)
from neuronlens.neurons import NeuronSite
from neuronlens.recorder.stream import (
    conditional,
    copied,
    on_stream,
    reading,
)
from neuronlens.tokens import Role, TokenMap


class _Run:
    """One sequence: a forward from its start, and the steps that continue it."""

    def __init__(
        self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"], adapter: ModelAdapter
    ) -> None:
        self.names = adapter.text_input, adapter.text_mask
        self.inputs = {k: v for k, v in inputs.items() if k != "past_key_values"}
        self.ids = ids
        self.attended = attended(inputs.get(adapter.text_mask), ids, 0)
        self.prompt_length = ids.shape[1]
        self.kept: dict[str, list[Activation]] = {}
        self.encoder_inputs: dict[str, Any] = {}
        self.forwards = 0
        self.prefix = 0
        self.maps: dict[str, TokenMap] | None = None

    def go_on(self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]) -> None:
        done = self.ids.shape[1]
        if ids.shape[1] > 1 and self.prompt_length == done:
            self.prompt_length += ids.shape[1]  # a prompt that is fed in chunks
        known = {*self.inputs, "past_key_values"}
        self.inputs |= {k: v for k, v in inputs.items() if k not in known and v is not None}
        more = attended(inputs.get(self.names[1]), ids, done)
        self.attended = torch.cat([self.attended, more], 1)
        self.ids = torch.cat([self.ids, ids], 1)

    def kept_tokens(self, name: str) -> int:
        """How many of the text's tokens of a site are kept."""
        kept = sum(_length(part) for part in self.kept.get(name, []))
        return max(0, kept - self.prefix)

    def prompt(self, beams: int = 1) -> dict[str, Any]:
        """The inputs of one forward over the prompt, of every `beams`-th row."""
        rows = len(self.ids)
        ids, mask = self.names
        inputs = self.inputs | {
            ids: self.ids[:, : self.prompt_length],
            mask: self.attended[:, : self.prompt_length],
        }
        if beams > 1:
            inputs = {
                name: value[::beams]
                if isinstance(value, Tensor) and value.ndim and len(value) == rows
                else value
                for name, value in inputs.items()
            }
        return inputs | self.encoder_inputs


class ActivationRecorder:
    """Keeps the activations of every forward, or `generate()`, inside the block.

    ::

        with ActivationRecorder(adapter, "language") as recorder:
            model(**inputs)
        recorder.activations["language.16"]  # [batch, token, neuron]

    During `generate()` the prompt and every later step are kept once each, in order, on one
    token axis. The last generated token never enters the model and has no activation. A
    static cache, which would compile the model, is run uncompiled. With beams, a row is one
    beam as the model sees it (`sample * beams + beam`); where beams were swapped, follow a
    returned sequence with `follow`. If a prompt is fed in chunks (`prefill_chunk_size`) of which
    the last is a single token, that token's role is told as if it were generated.

    Attributes:
        adapter: Of the model.
        sites: The recorded sites, by name.

    Raises:
        CaptureError: When the block ends well, but some site never ran; when a step does
            not continue what was recorded, as in assisted decoding.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        sites: SiteSelection = "language",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Choose what to record.

        Args:
            adapter: Of the model.
            sites: Sites, modules, names, or None for every site.
            device: Where to keep activations; by default where they are computed.
        """
        refuse_compiled(adapter.model)
        self.adapter = adapter
        self.sites = {site.name: site for site in adapter.select(sites)}
        self._device = device
        self._runs: list[_Run] = []
        self._skip = 0
        self._open = False
        self._early: dict[str, list[Activation]] = {}
        self._encoder_inputs: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ActivationRecorder:
        self._runs.clear()
        self._early.clear()
        self._encoder_inputs.clear()
        model = self.adapter.model
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.enter_context(
                attached(reading(self.adapter, self.sites, self._keep), conditional(self.sites))
            )
            stack.enter_context(overheard(model, self._encoder_inputs))
            stack.enter_context(watched(model, self._begin, self._end))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    @property
    def activations(self) -> dict[str, Activation]:
        """By site name, act_fn outputs `[*axes of the site's stream, neuron]`.

        `Routed` for sites with routed experts: see its `dense()`.

        Raises:
            CaptureError: If several unrelated forwards ran in the block; see `runs`.
        """
        return self.runs[self._only()]

    @property
    def tokens(self) -> dict[str, TokenMap]:
        """The token map of each recorded stream; generated tokens are RESPONSE."""
        return self._tokens(self._runs[self._only()])

    @property
    def runs(self) -> list[dict[str, Activation]]:
        """The activations of each sequence, if several were run in the block."""
        return [
            {name: self._whole(run, site) for name, site in self.sites.items() if name in run.kept}
            for run in self._runs
        ]

    def follow(self, beam_indices: Int[Tensor, "sequence step"]) -> dict[str, Tensor]:
        """Language activations of the sequences a beam search returned.

        Args:
            beam_indices: As `generate(..., return_dict_in_generate=True)` gives them: the
                row each step was continued from, -1 after a sequence ended.

        Returns:
            By site, `[sequence, token, neuron]` (routed sites: `dense()`); NaN after a
            sequence's end.
        """
        run = self._runs[self._only()]
        rows = beam_indices.cpu()
        steps = run.ids.shape[1] - run.prompt_length
        followed = {}
        for name, site in self.sites.items():
            if site.stream not in self.adapter.growing:
                continue
            whole = self.activations[name]
            kept = whole.dense() if isinstance(whole, Routed) else whole
            first = kept[rows[:, 0].to(kept.device), : run.prompt_length]
            parts = [first]
            # Step t's scores were computed on the row that beam_indices[t] names, which is
            # the row its last token was fed in.
            for step in range(1, steps + 1):
                column = rows[:, step] if step < rows.shape[1] else torch.full_like(rows[:, 0], -1)
                part = kept[column.clamp(min=0).to(kept.device), run.prompt_length + step - 1]
                part = part.clone()
                part[(column < 0).to(kept.device)] = float("nan")
                parts.append(part[:, None])
            followed[name] = torch.cat(parts, 1)
        return followed

    def _only(self) -> int:
        if len(self._runs) != 1:
            raise CaptureError(
                f"{len(self._runs)} sequences were run in the block, so `activations` would mix "
                "them. Use one recorder for each, or take them from `recorder.runs`."
            )
        return 0

    def _begin(self, inputs: dict[str, Any]) -> None:
        ids = inputs.get(self.adapter.text_input)
        if inputs.get("encoder_outputs") is not None:
            raise CaptureError(
                "generate() of an encoder-decoder model runs its encoder by itself, which is not "
                "recorded. Call the model with the whole decoder_input_ids inside the block."
            )
        if not isinstance(ids, Tensor):
            raise CaptureError(
                f"The model was called without {self.adapter.text_input}, so its tokens cannot be "
                f"told apart. Call it with {self.adapter.text_input}, not inputs_embeds."
            )
        done = cached_tokens(inputs)
        run = self._runs[-1] if self._runs else None
        if done and run is not None and run.prefix:
            done -= run.prefix
        self._skip, self._open = 0, True
        if run is not None and done == 0 and repeats(run.ids, ids):
            self._skip = done = run.ids.shape[1]  # generation without a cache
            ids = ids[:, done:]
        if done == 0:
            run = _Run(inputs, ids, self.adapter)
            run.kept |= self._early
            run.encoder_inputs |= self._encoder_inputs
            self._runs.append(run)
            self._early = {}
            self._encoder_inputs.clear()
        elif run is None or run.ids.shape[1] != done:
            have = 0 if run is None else run.ids.shape[1]
            self._open = False
            raise CaptureError(
                f"This step continues {done} cached tokens, but {have} were recorded. Start the "
                "recorder before generation; assisted decoding, which goes back, is not supported."
            )
        else:
            run.go_on(inputs, ids)
        run.forwards += 1

    def _end(self) -> None:
        self._open = False
        self._encoder_inputs.clear()

    def _keep(self, name: str, out: Activation) -> None:
        if recomputing():
            return
        site = self.sites[name]
        grows = site.stream in self.adapter.growing
        if not self._open:
            if grows:
                raise CaptureError(
                    f"Site {name} ran outside a call of the recorded model. Call the model itself, "
                    "not a part of it: the recorder needs its inputs to know the tokens. If its "
                    "generate() does so, record a forward over the generated ids instead."
                )
            # generate() encodes the images before it first calls the model.
            self._early.setdefault(name, []).append(copied(out, self._device))
            return
        run = self._runs[-1]
        if not grows:
            if run.forwards == 1:  # later steps may encode the images again
                run.kept.setdefault(name, []).append(copied(out, self._device))
            return
        batch, new = len(run.ids), run.ids.shape[1] - run.kept_tokens(name)
        out = _by_batch(out, batch)
        if name not in run.kept and self.adapter.prefixes_images:
            run.prefix = _length(out) - new
        expected = new + self._skip + (run.prefix if name not in run.kept or self._skip else 0)
        if _length(out) != expected:
            raise CaptureError(
                f"Site {name} gave {_length(out)} tokens where {expected} were expected. Some "
                "models leave prompt tokens out of their last layers while generating: ask "
                "generate() for output_hidden_states=True, return_dict_in_generate=True."
            )
        skip = self._skip + (run.prefix if self._skip else 0)
        run.kept.setdefault(name, []).append(copied(_from_token(out, skip), self._device))

    def _whole(self, run: _Run, site: NeuronSite) -> Activation:
        """All of a site's steps in one piece, which is kept in their place."""
        if len(run.kept[site.name]) > 1 or site.stream not in self.adapter.growing:
            run.kept[site.name] = [self._put_together(run, site)]
        return run.kept[site.name][0]

    def _put_together(self, run: _Run, site: NeuronSite) -> Activation:
        parts = run.kept[site.name]
        if site.stream not in self.adapter.growing:
            return on_stream(site, parts, self._tokens(run)[site.stream])
        if isinstance(parts[0], Routed):
            return Routed.cat([part for part in parts if isinstance(part, Routed)], 1)
        return torch.cat([part for part in parts if isinstance(part, Tensor)], 1)

    def _tokens(self, run: _Run) -> dict[str, TokenMap]:
        if run.maps is None or run.maps["language"].role.shape[1] != run.ids.shape[1] + run.prefix:
            beams, maps = self._prompt_maps(run)
            if beams > 1:
                maps = {
                    stream: _repeated(tokens, beams, stream in self.adapter.growing)
                    for stream, tokens in maps.items()
                }
            maps["language"] = _continued(maps["language"], self._generated_roles(run))
            run.maps = maps
        return run.maps

    def _prompt_maps(self, run: _Run) -> tuple[int, dict[str, TokenMap]]:
        """The maps of the prompt, and how many beams share an image that was encoded once."""
        try:
            return 1, self.adapter.tokens(run.prompt())
        except AdapterError:
            if not run.encoder_inputs:
                raise
            for beams in range(2, len(run.ids) + 1):
                if len(run.ids) % beams == 0:
                    with suppress(AdapterError):
                        return beams, self.adapter.tokens(run.prompt(beams))
            raise

    def _generated_roles(self, run: _Run) -> Int[Tensor, "batch token"]:
        ids = run.ids[:, run.prompt_length :].cpu()
        role = generated_roles(self.adapter, ids)
        config = getattr(self.adapter.model, "generation_config", None)
        ends, fill = (getattr(config, f"{kind}_token_id", None) for kind in ("eos", "pad"))
        is_end = torch.isin(ids, torch.tensor([] if ends is None else ends, dtype=ids.dtype))
        # A row that has ended, on this token or on one generate() was given, is filled up while
        # others go on.
        role[(is_end.cumsum(1) - is_end.int()) > 0] = Role.PAD
        if fill is not None and not torch.isin(torch.tensor(fill), ids[is_end]):
            role[ids == fill] = Role.PAD
        return role


def _length(out: Activation) -> int:
    return out.expert.shape[1] if isinstance(out, Routed) else out.shape[1]


def _by_batch(out: Activation, batch: int) -> Activation:
    """Rows of blocks that do not keep the batch axis, `[batch, token, ...]` again."""
    if isinstance(out, Routed):
        return out.reshape(batch, -1)
    return out.reshape(batch, -1, out.shape[-1])


def _from_token(out: Activation, first: int) -> Activation:
    if isinstance(out, Routed):
        return Routed(out.values[:, first:], out.expert[:, first:], out.experts)
    return out[:, first:]


def _repeated(tokens: TokenMap, beams: int, grows: bool) -> TokenMap:
    """The map of a batch of which each row was made into several beams."""
    if not grows:  # an image is encoded once; the first of its beams stands for them
        return replace(tokens, sample=tokens.sample * beams)
    repeated = [
        part.repeat_interleave(beams, 0) for part in (tokens.role, tokens.image, tokens.box)
    ]
    rows = torch.arange(len(repeated[0]))[:, None].expand(repeated[0].shape)
    return TokenMap(repeated[0], rows.contiguous(), repeated[1], repeated[2])


def _continued(prompt: TokenMap, role: Int[Tensor, "batch token"]) -> TokenMap:
    """The map with generated tokens behind the prompt's."""
    sample = prompt.sample[:, :1].expand_as(role)
    return TokenMap(
        role=torch.cat([prompt.role, role], 1),
        sample=torch.cat([prompt.sample, sample], 1),
        image=torch.cat([prompt.image, torch.full_like(sample, -1).to(prompt.image.dtype)], 1),
        box=torch.cat([prompt.box, torch.full((*role.shape, 4), float("nan"))], 1),
    )
