"""Reading activations from a running model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuronlens.adapters import ModelAdapter, SiteSelection
from neuronlens.errors import CaptureError
from neuronlens.hooks import hooked, refuse_compiled, uncompiled, watched
from neuronlens.neurons import NeuronSite
from neuronlens.tokens import Role, TokenMap

Activations = Float[Tensor, "*axes neuron"]


class Sink(Protocol):
    """What takes activations while the model runs."""

    def take(self, site: NeuronSite, activation: Activations, tokens: TokenMap) -> None:
        """Take one site's act_fn output of one forward.

        Args:
            site: The site that has just run.
            activation: Its output, on the layer's device and in its dtype, detached. It
                belongs to the model: reduce or copy it, keep no view of it.
            tokens: What the leading axes of `activation` are.
        """
        ...


@contextmanager
def record(
    adapter: ModelAdapter, sites: SiteSelection, sink: Sink, tokens: Mapping[str, TokenMap]
) -> Iterator[None]:
    """Pass every chosen site's activations to `sink` during one forward in the block.

    Args:
        adapter: Of the model.
        sites: Sites, modules, names, or None for every site.
        sink: Takes the activations, site by site, as they are computed.
        tokens: The token map of each stream, from `encode` or `adapter.tokens`.

    Raises:
        CaptureError: If a site did not run, ran twice, or its output is not shaped like
            its stream.
    """
    chosen = {site.name: site for site in adapter.select(sites)}
    ran: set[str] = set()

    def hand_over(name: str, out: Tensor) -> None:
        site = chosen[name]
        if name in ran:
            raise CaptureError(
                f"Site {name} ran twice in one block of record(). Run one forward per block; for "
                "generate() use ActivationRecorder."
            )
        ran.add(name)
        if site.stream not in tokens:
            raise CaptureError(
                f"Site {name} runs on the stream {site.stream!r}, of which no token map was given "
                f"(given: {', '.join(tokens)})."
            )
        _check_shape(site, out, tokens[site.stream])
        sink.take(site, out.detach(), tokens[site.stream])

    refuse_compiled(adapter.model)
    with hooked({name: adapter.act_module(site) for name, site in chosen.items()}, hand_over):
        yield


def _check_shape(site: NeuronSite, out: Tensor, tokens: TokenMap) -> None:
    wanted = (*tokens.role.shape, site.width)
    if tuple(out.shape) != wanted:
        raise CaptureError(
            f"Site {site.name} gave activations of shape {tuple(out.shape)}, but its stream "
            f"{site.stream!r} has {wanted[:-1]} tokens and the site {site.width} neurons. Are the "
            "token maps those of these inputs?"
        )


class _Run:
    """One sequence: a forward from its start, and the steps that continue it."""

    def __init__(self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]) -> None:
        self.inputs = {k: v for k, v in inputs.items() if k != "past_key_values"}
        self.ids = ids
        self.attended = _attended(inputs.get("attention_mask"), ids, 0)
        self.prompt_length = ids.shape[1]
        self.kept: dict[str, list[Tensor]] = {}

    def go_on(self, inputs: Mapping[str, Any], ids: Int[Tensor, "batch token"]) -> None:
        done = self.ids.shape[1]
        if ids.shape[1] > 1 and self.prompt_length == done:
            self.prompt_length += ids.shape[1]  # a prompt that is fed in chunks
        known = {*self.inputs, "past_key_values"}
        self.inputs |= {k: v for k, v in inputs.items() if k not in known and v is not None}
        more = _attended(inputs.get("attention_mask"), ids, done)
        self.attended = torch.cat([self.attended, more], 1)
        self.ids = torch.cat([self.ids, ids], 1)

    def prompt(self) -> dict[str, Any]:
        """The inputs of one forward over the prompt, without what was generated."""
        return self.inputs | {
            "input_ids": self.ids[:, : self.prompt_length],
            "attention_mask": self.attended[:, : self.prompt_length],
        }


def _attended(mask: Any, ids: Int[Tensor, "batch token"], done: int) -> Int[Tensor, "batch token"]:
    """1 where a token is attended to, 0 where it is padding.

    A static cache comes with one mask per query, boolean or additive: padding is what no
    query sees.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    if not isinstance(mask, Tensor):
        return torch.ones_like(ids)
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > -1
        mask = seen.any(1).any(1)
    attended: Tensor = mask[:, done : done + ids.shape[1]].to(ids.dtype)
    return attended


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
        self._early: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ActivationRecorder:
        self._runs.clear()
        self._early.clear()
        modules = {name: self.adapter.act_module(site) for name, site in self.sites.items()}
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.enter_context(hooked(modules, self._keep))
            stack.enter_context(watched(self.adapter.model, self._begin, self._end))
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
    def activations(self) -> dict[str, Activations]:
        """By site name, act_fn outputs `[*axes of the site's stream, neuron]`.

        Raises:
            CaptureError: If several unrelated forwards ran in the block; see `runs`.
        """
        return self.runs[self._only()]

    @property
    def tokens(self) -> dict[str, TokenMap]:
        """The token map of each recorded stream; generated tokens are RESPONSE."""
        return self._tokens(self._runs[self._only()])

    @property
    def runs(self) -> list[dict[str, Activations]]:
        """The activations of each sequence, if several were run in the block."""
        return [
            {name: torch.cat(run.kept[name], -2) for name in self.sites if name in run.kept}
            for run in self._runs
        ]

    def follow(self, beam_indices: Int[Tensor, "sequence step"]) -> dict[str, Activations]:
        """Language activations of the sequences a beam search returned.

        Args:
            beam_indices: As `generate(..., return_dict_in_generate=True)` gives them: the
                row each step was continued from, -1 after a sequence ended.

        Returns:
            By site, `[sequence, token, neuron]`; NaN after a sequence's end.
        """
        run = self._runs[self._only()]
        rows = beam_indices.cpu()
        steps = run.ids.shape[1] - run.prompt_length
        followed = {}
        for name, site in self.sites.items():
            if site.stream != "language":
                continue
            kept = self.activations[name]
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
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise CaptureError(
                "The model was called without input_ids, so its tokens cannot be told apart. Call "
                "it with input_ids, not inputs_embeds."
            )
        cache = inputs.get("past_key_values")
        done = int(cache.get_seq_length()) if cache is not None else 0
        self._skip, self._open = 0, True
        run = self._runs[-1] if self._runs else None
        if run is not None and done == 0 and _repeats(run.ids, ids):
            self._skip = done = run.ids.shape[1]  # generation without a cache
            ids = ids[:, done:]
        if done == 0:
            self._runs.append(_Run(inputs, ids))
            self._runs[-1].kept |= {name: [out] for name, out in self._early.items()}
            self._early.clear()
        elif run is None or run.ids.shape[1] != done:
            have = 0 if run is None else run.ids.shape[1]
            self._open = False
            raise CaptureError(
                f"This step continues {done} cached tokens, but {have} were recorded. Start the "
                "recorder before generation; assisted decoding, which goes back, is not supported."
            )
        else:
            run.go_on(inputs, ids)

    def _end(self) -> None:
        self._open = False

    def _keep(self, name: str, out: Tensor) -> None:
        site = self.sites[name]
        if not self._open:
            if site.stream == "language":
                raise CaptureError(
                    f"Site {name} ran outside a call of the recorded model. Call the model itself, "
                    "not a part of it: the recorder needs its inputs to know the tokens."
                )
            # generate() encodes the images before it first calls the model.
            self._early[name] = self._copy(out)
            return
        run = self._runs[-1]
        parts = run.kept.setdefault(name, [])
        if site.stream != "language":
            if not parts:
                parts.append(self._copy(out))
            return
        if sum(part.shape[1] for part in parts) + out.shape[1] - self._skip != run.ids.shape[1]:
            raise CaptureError(
                f"Site {name} gave {out.shape[1]} tokens where {run.ids.shape[1]} were expected."
            )
        parts.append(self._copy(out[:, self._skip :]))

    def _copy(self, out: Tensor) -> Tensor:
        return out.detach().to(self._device or out.device, copy=True)

    def _tokens(self, run: _Run) -> dict[str, TokenMap]:
        maps = self.adapter.tokens(run.prompt())
        maps["language"] = _continued(maps["language"], self._generated_roles(run))
        return {stream: self._encoded_once(run, stream, tokens) for stream, tokens in maps.items()}

    def _generated_roles(self, run: _Run) -> Int[Tensor, "batch token"]:
        ids = run.ids[:, run.prompt_length :].cpu()
        role = self.adapter.text_roles(ids)
        role[role == Role.PROMPT] = Role.RESPONSE
        config = getattr(self.adapter.model, "generation_config", None)
        ends, fill = (getattr(config, f"{kind}_token_id", None) for kind in ("eos", "pad"))
        is_end = torch.isin(ids, torch.tensor([] if ends is None else ends, dtype=ids.dtype))
        # A row that has ended, on this token or on one generate() was given, is filled up while
        # others go on.
        role[(is_end.cumsum(1) - is_end.int()) > 0] = Role.PAD
        if fill is not None and not torch.isin(torch.tensor(fill), ids[is_end]):
            role[ids == fill] = Role.PAD
        return role

    def _encoded_once(self, run: _Run, stream: str, tokens: TokenMap) -> TokenMap:
        """Generation with beams encodes an image once and repeats its features."""
        kept = next((p[0] for n, p in run.kept.items() if self.sites[n].stream == stream), None)
        if stream == "language" or kept is None or len(kept) == len(tokens.role):
            return tokens
        beams = len(tokens.role) // len(kept)
        first = tokens.sample[:, 0] % beams == 0
        return TokenMap(
            tokens.role[first], tokens.sample[first], tokens.image[first], tokens.box[first]
        )


def _continued(prompt: TokenMap, role: Int[Tensor, "batch token"]) -> TokenMap:
    """The map with generated tokens behind the prompt's."""
    sample = prompt.sample[:, :1].expand_as(role)
    return TokenMap(
        role=torch.cat([prompt.role, role], 1),
        sample=torch.cat([prompt.sample, sample], 1),
        image=torch.cat([prompt.image, torch.full_like(sample, -1).to(prompt.image.dtype)], 1),
        box=torch.cat([prompt.box, torch.full((*role.shape, 4), float("nan"))], 1),
    )


def _repeats(before: Int[Tensor, "batch token"], now: Int[Tensor, "batch longer"]) -> bool:
    """Whether `now` is `before` with one token more: a step of generation without a cache."""
    if now.shape[0] != before.shape[0] or now.shape[1] != before.shape[1] + 1:
        return False
    return bool((now[:, :-1] == before).all())
