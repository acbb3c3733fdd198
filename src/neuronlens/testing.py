"""Suites that third parties run on what they write: `check_adapter` for an adapter.

Needs no pytest: a law that does not hold is an `AssertionError` that says which, and where.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuronlens.activations import Activation, Routed
from neuronlens.adapters import (
    ActOutput,
    FamilyAdapter,
    ModelAdapter,
    adapt,
    feed_forward_blocks,
)
from neuronlens.adapters.functions import is_feed_forward
from neuronlens.errors import AdapterError
from neuronlens.hooks import Call, Point, attached
from neuronlens.intervene import deactivate
from neuronlens.neurons import NeuronId, NeuronSite
from neuronlens.recorder import ActivationRecorder, record
from neuronlens.tokens import Role, TokenMap


@dataclass(frozen=True)
class Checked:
    """What `check_adapter` found, for a closer look.

    Attributes:
        sites: Every site of the adapter.
        visual: Visual tokens of the language stream, in the whole batch.
        boxes: How many of them see one region.
        inert: Sites whose deactivation changed nothing, all of them flagged.
        padded: Padding tokens of the language stream.
        single: Whether batched = single could be told; not where a batch's patches are packed
            together, or the model's own logits depend on what it is batched with.
        left_out: Blocks that ran, look like feed-forward blocks (an activation between two
            projections), and have no site. Are they gates, or were they forgotten?
    """

    sites: tuple[NeuronSite, ...]
    visual: int
    boxes: int
    inert: tuple[str, ...]
    padded: int
    single: bool
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Checked({len(self.sites)} sites, {self.visual} visual tokens, {self.boxes} with a "
            f"box, {self.padded} padded, inert: {', '.join(self.inert) or 'none'}, batched = "
            f"single: {'yes' if self.single else 'not told'}, left out: "
            f"{', '.join(self.left_out) or 'nothing'})"
        )


def check_adapter(
    model: nn.Module | ModelAdapter,
    inputs: Mapping[str, Any],
    *,
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> Checked:
    """Check an adapter against its own model, on a batch of images and texts.

    The laws: hooks leave the model as it is; every site runs, and its activations have the
    axes of its stream's token map; batched = single, where the inputs can be taken apart;
    visual tokens are exactly those at which the first language layer's input moves with the
    pixels; padding is where the mask says; a deactivated neuron changes the logits unless
    its site is flagged inert, and leaving restores them bit for bit.

    Args:
        model: A Hugging Face model of a few layers, in eval mode, on any device; or an adapter
            of one.
        inputs: Of at least two samples with an image each, of which one is padded, as
            the model's processor gives them.
        rtol: Relative tolerance between batched and single, for activations and logits.
        atol: Absolute tolerance, likewise.

    Returns:
        What was found.

    Raises:
        AssertionError: If a law does not hold; it names the site and the law.
        ValueError: If the inputs are not such a batch.
        AdapterError: If the adapter cannot describe the model or these inputs.

    Example:
        >>> from neuronlens import testbed
        >>> from neuronlens.samples import encode
        >>> bed = testbed.load()
        >>> vlm = adapt(bed.model, bed.processor)
        >>> batch = encode(vlm, testbed.scenes(2))
        >>> check_adapter(bed.model, batch.inputs).visual
        128
    """
    vlm = model if isinstance(model, ModelAdapter) else adapt(model)
    vlm.require_eval()
    inputs = {
        name: value.to(vlm.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    plain = _logits(vlm, inputs)
    tokens = vlm.tokens(inputs)
    mask = inputs.get(vlm.text_mask)
    padding = mask == 0 if isinstance(mask, Tensor) else tokens["language"].role == Role.PAD
    if len(inputs[vlm.text_input]) < 2 or not padding.any():
        raise ValueError(
            "check_adapter needs a batch of at least two samples of which one is padded; "
            f"{vlm.text_input} is {tuple(inputs[vlm.text_input].shape)} with "
            f"{int(padding.sum())} padding tokens."
        )
    with torch.no_grad(), ActivationRecorder(vlm, None) as recorder:
        hooked = _output(vlm.model(**inputs))
    _holds(torch.equal(hooked, plain), "recording leaves the logits as they are")
    activations = recorder.activations
    left_out = _check_complete(vlm, inputs)
    _check_sites(vlm, activations, tokens)
    _check_sink(vlm, inputs, activations, tokens)
    padded = _check_padding(vlm, inputs, tokens)
    single = _check_single(vlm, inputs, plain, activations, tokens, rtol, atol)
    _check_visual(vlm, inputs, tokens)
    inert = _check_deactivation(vlm, inputs, plain, activations)
    language = tokens["language"]
    visual = language.role == Role.VISUAL
    boxes = int((~language.box[visual].isnan().any(-1)).sum())
    return Checked(
        tuple(vlm.sites.values()), int(visual.sum()), boxes, inert, padded, single, left_out
    )


def _holds(law: bool, what: str) -> None:
    if not law:
        raise AssertionError(f"Does not hold: {what}.")


def _output(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else out[0]


def _logits(vlm: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return _output(vlm.model(**inputs))


def _rows(out: Activation) -> Float[Tensor, "row neuron"]:
    """`[token, neuron]`, experts beside each other, 0 where a token was not routed."""
    if isinstance(out, Routed):
        ran = Routed(torch.ones_like(out.values[..., :1]), out.expert, out.experts).dense() == 1
        # Only where nothing ran: a NaN that was computed has to stay one.
        return torch.where(ran, out.dense(), 0).flatten(-2).flatten(0, -2)
    return out.flatten(0, -2)


def _check_complete(vlm: ModelAdapter, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """No block whose activation is a function is without a site; gives the others that are."""
    read = {vlm.tap(site).path for site in vlm.sites.values()}
    ran: set[str] = set()

    def point(path: str, module: nn.Module) -> Point:
        return Point(module, lambda call: ran.add(path), before=True)

    points = {
        path: [point(path, module)]
        for path, module in vlm.model.named_modules()
        if not any(f"{each}.".startswith(f"{path}.") for each in read)
        and not (isinstance(vlm, FamilyAdapter) and vlm.stack_of(path) is None)
        and is_feed_forward(module)
    }
    blocks = {block.path: block for block in feed_forward_blocks(vlm.model)}
    others: set[str] = set()

    def other(path: str) -> Point:
        return Point(vlm.model.get_submodule(path), lambda call: others.add(path), before=True)

    points |= {
        path: [other(path)]
        for path, block in blocks.items()
        if block.tap.path not in read and not any(f"{e}.".startswith(f"{path}.") for e in read)
    }
    with torch.no_grad(), attached(points, may_be_left_out=set(points)):
        vlm.model(**inputs)
    _holds(
        not ran,
        f"every feed-forward block has a site; {', '.join(sorted(ran)[:4])} have none. If their "
        "activation is a function, declare it with special_block",
    )
    return tuple(sorted(others))


def _check_sites(
    vlm: ModelAdapter, activations: Mapping[str, Activation], tokens: Mapping[str, TokenMap]
) -> None:
    for name, site in vlm.sites.items():
        if name not in activations:
            _holds("conditional" in site.flags, f"site {name} runs for an image and a text")
            continue
        _holds(site.stream in tokens, f"site {name} runs on {site.stream!r}, which has a token map")
        axes = tuple(tokens[site.stream].role.shape)
        wanted = (*axes, *((site.experts,) if site.experts else ()), site.width)
        got = tuple(activations[name].shape)
        _holds(got == wanted, f"site {name} has activations of shape {wanted}, not {got}")


class _Keep:
    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, site: NeuronSite, activation: Activation, tokens: TokenMap) -> None:
        self.kept[site.name] = _rows(activation).clone()


def _check_sink(
    vlm: ModelAdapter,
    inputs: Mapping[str, Any],
    activations: Mapping[str, Activation],
    tokens: Mapping[str, TokenMap],
) -> None:
    sink = _Keep()
    with torch.no_grad(), record(vlm, list(activations), sink, tokens):
        vlm.model(**inputs)
    for name, rows in sink.kept.items():
        _holds(
            torch.equal(rows, _rows(activations[name])),
            f"record() gives what ActivationRecorder keeps at site {name}",
        )


def _check_padding(
    vlm: ModelAdapter, inputs: Mapping[str, Any], tokens: Mapping[str, TokenMap]
) -> int:
    role = tokens["language"].role
    mask = inputs.get(vlm.text_mask)
    if isinstance(mask, Tensor) and mask.shape == role.shape:
        _holds(
            torch.equal(role == Role.PAD, mask.cpu() == 0),
            f"PAD is exactly where {vlm.text_mask} is 0",
        )
    return int((role == Role.PAD).sum())


def _alone(vlm: ModelAdapter, inputs: Mapping[str, Any], sample: int) -> dict[str, Any] | None:
    """The inputs of one sample without its padding; None where they cannot be told.

    Packed patches, for one: which rows are a sample's is the processor's knowledge.
    """
    ids, mask = inputs[vlm.text_input], inputs.get(vlm.text_mask)
    alone = {}
    for name, value in inputs.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not isinstance(mask, Tensor) or len(value) != len(ids):
            return None
        texts = name.replace("attention_mask", "input_ids")
        is_own = texts.endswith("input_ids") and texts in inputs
        own = inputs.get(texts.replace("input_ids", "attention_mask")) if is_own else None
        is_text = value.ndim == 2 and not value.is_floating_point()
        kept: Any = slice(None)
        if is_text and isinstance(own, Tensor) and own.shape == value.shape:
            kept = own[sample].bool()
        elif (is_text or value.ndim == 3) and value.shape[:2] == ids.shape:
            kept = mask[sample].bool()
        elif is_text and not is_own and value.shape[1] != ids.shape[1] and "image" not in name:
            return None
        row = value[sample : sample + 1]
        alone[name] = row[:, kept] if isinstance(kept, Tensor) else row
    return alone


def _check_single(
    vlm: ModelAdapter,
    inputs: Mapping[str, Any],
    plain: Tensor,
    activations: Mapping[str, Activation],
    tokens: Mapping[str, TokenMap],
    rtol: float,
    atol: float,
) -> bool:
    """A sample without its padding, by itself, gives what it gave in the batch."""
    for sample in range(len(inputs[vlm.text_input])):
        alone = _alone(vlm, inputs, sample)
        if alone is None:
            return False
        try:
            logits = _logits(vlm, alone)[0]
        except (RuntimeError, ValueError, IndexError):  # its images cannot be told from the others'
            return False
        attended = tokens["language"].role[sample] != Role.PAD
        beside = plain[sample]
        if len(beside) == len(attended):
            beside = beside[attended.to(beside.device)]
        if logits.shape != beside.shape or not torch.allclose(logits, beside, rtol, atol):
            return False  # the model itself gives another answer beside padding
        with torch.no_grad(), ActivationRecorder(vlm, list(activations)) as recorder:
            vlm.model(**alone)
        for name, out in recorder.activations.items():
            stream = tokens[vlm.sites[name].stream]
            mine = recorder.tokens[vlm.sites[name].stream].where(0)
            batched, single = _rows(activations[name])[stream.where(sample)], _rows(out)[mine]
            _holds(
                batched.shape == single.shape
                and torch.allclose(batched, single, rtol=rtol, atol=atol),
                f"batched = single at site {name}, sample {sample}",
            )
    return True


def _first_input(vlm: ModelAdapter, inputs: Mapping[str, Any]) -> Tensor | None:
    """What goes into the first layer of the language stack; None if it is not in a list."""
    site = next((site for site in vlm.sites.values() if site.stream == "language"), None)
    if site is None:
        raise AssertionError("Does not hold: some site runs on the stream 'language'.")
    found = re.match(r".*?\.\d+(?=\.)", site.path)
    layer = found.group() if found else None
    if vlm.answer_stream == "language":
        with suppress(AdapterError):  # the first layer may have no feed-forward block
            layer = vlm.decoding.layers[0]
    if layer is None:
        return None
    seen: list[Tensor] = []

    def keep(call: Call) -> None:
        seen.append((call.args[0] if call.args else call.kwargs["hidden_states"]).clone())

    point = Point(vlm.model.get_submodule(layer), keep, before=True)
    with torch.no_grad(), attached({layer: [point]}):
        vlm.model(**inputs)
    return seen[0]


def _by_token(moved: Tensor, shape: torch.Size) -> Tensor:
    """`[batch, token]`, where the model carries several streams per token beside these axes."""
    if moved.ndim == 3 and moved.shape[:2] == shape:
        return moved.any(2)
    if moved.ndim == 3 and moved.shape[1:] == shape:
        return moved.any(0)
    return moved.reshape(shape)


def _check_visual(
    vlm: ModelAdapter, inputs: Mapping[str, Any], tokens: Mapping[str, TokenMap]
) -> None:
    """Exactly the visual tokens' first input moves with the pixels."""
    pixels = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and "pixel" in name
    }
    role = tokens["language"].role
    plain = _first_input(vlm, inputs)
    if not pixels or not (role == Role.VISUAL).any() or plain is None:
        return
    generator = torch.Generator().manual_seed(0)
    moved = torch.zeros(role.shape, dtype=torch.bool)
    for strength in (0.5, -2.0, 1.0, -0.5, 3.0, -1.0):  # discrete codes take several trials
        other = {
            # A tile that only fills up is all zeros, and has to stay so.
            name: value
            + strength * (value != 0) * torch.randn(value.shape, generator=generator).to(value)
            for name, value in pixels.items()
        }
        now = _first_input(vlm, {**inputs, **other})
        assert now is not None
        moved |= _by_token((now != plain).any(-1).cpu(), role.shape)
    # What fills up an image may stand at a marker, and is changed like a pixel here.
    ids = inputs[vlm.text_input].cpu()
    markers = torch.isin(ids, torch.tensor(vlm.placeholder_ids(), dtype=ids.dtype))
    if markers.shape == moved.shape:
        moved &= ~(markers & (role == Role.SPECIAL))
    _holds(
        torch.equal(moved, role == Role.VISUAL),
        "VISUAL is exactly where the first language layer's input moves with the pixels; it "
        f"moves at {moved.nonzero().tolist()[:8]}..., and VISUAL are "
        f"{(role == Role.VISUAL).nonzero().tolist()[:8]}...",
    )


def _down(vlm: ModelAdapter, neuron: NeuronId) -> nn.Linear | None:
    """The down projection that takes a neuron's activation; None where it is no plain one."""
    tap = vlm.tap(vlm.site(neuron.site))
    if not isinstance(tap, ActOutput) or tap.down is None or tap.calls > 1:
        return None
    down = vlm.model.get_submodule(tap.down)
    return down if type(down) is nn.Linear and not hasattr(down, "_hf_hook") else None


def _is_taken_as_it_is(vlm: ModelAdapter, neuron: NeuronId, inputs: Mapping[str, Any]) -> bool:
    """Whether nothing stands between a deactivated neuron and the down projection."""
    down = _down(vlm, neuron)
    if down is None:
        return False
    largest: list[float] = []

    def look(call: Call) -> None:
        largest.append(float(call.args[0][..., neuron.index].abs().max()))

    with torch.no_grad(), attached({"down": [Point(down, look, before=True)]}):
        vlm.model(**inputs)
    return max(largest) == 0


def _check_column(
    vlm: ModelAdapter, neuron: NeuronId, inputs: Mapping[str, Any], without: Tensor
) -> None:
    """Deactivation is zeroing a column of the down projection."""
    down = _down(vlm, neuron)
    assert down is not None
    kept = down.weight[:, neuron.index].detach().clone()
    with torch.no_grad():
        down.weight[:, neuron.index] = 0
        try:
            edited = _logits(vlm, inputs)
        finally:
            down.weight[:, neuron.index] = kept
    _holds(
        torch.allclose(edited, without, rtol=1e-3, atol=1e-4),
        f"deactivating {neuron} is zeroing column {neuron.index} of its down projection",
    )


def _check_deactivation(
    vlm: ModelAdapter,
    inputs: Mapping[str, Any],
    plain: Tensor,
    activations: Mapping[str, Activation],
) -> tuple[str, ...]:
    inert = []
    for name, out in activations.items():
        site = vlm.sites[name]
        strongest = int(_rows(out).abs().amax(0).argmax())
        expert, index = divmod(strongest, site.width)
        neuron = NeuronId(name, index, expert if site.experts else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # whether it is inert is what is tested
            off = deactivate(vlm, neuron)
        with off:
            without = _logits(vlm, inputs)
            is_taken = _is_taken_as_it_is(vlm, neuron, inputs)
        if is_taken:
            _check_column(vlm, neuron, inputs, without)
        changes = not torch.equal(without, plain)
        _holds(
            changes != site.inert,
            f"site {name} is flagged inert: {site.inert}; deactivating {neuron} changed the "
            f"logits: {changes}",
        )
        if not changes:
            inert.append(name)
        _holds(
            torch.equal(_logits(vlm, inputs), plain),
            f"leaving deactivate({neuron}) restores the logits bit for bit",
        )
    return tuple(inert)
