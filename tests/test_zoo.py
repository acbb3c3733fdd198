"""Every architecture against its source code: sites, activations, tokens, boxes, ablation.

What is expected is recomputed from the weights and by changing pixels (see `zoo`); none of it
is taken from the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import neuronlens as nl
from neuronlens.activations import Routed as RoutedActivations
from zoo import Dense, Entry, Routed, entries

ZOO = entries()

FAINT = {"deepseek_vl_hybrid", "gemma3n", "unlimited_ocr"}
"""Convolutions reach farther than the next cell, but what is far moves a token much less."""

EVERYWHERE = {"chameleon", "emu3", "fast_vlm"}
"""In the tiny models' few cells, their convolutions see the whole image."""
NAMED = {
    "visual": (nl.Role.VISUAL,),
    "text": (nl.Role.PROMPT, nl.Role.RESPONSE),
    "special": (nl.Role.SPECIAL,),
}
MIXING = {"minimax_m3_vl"}
"""In transformers 5.20, the tower lets the images of a batch attend to each other."""
Expected = Dense | Routed


@contextmanager
def _watching(model: nn.Module, seen: dict[str, list[Any]], paths: set[str]) -> Iterator[None]:
    """The calls of some modules, by the test's own hooks: (args, kwargs, output)."""
    with ExitStack() as stack:
        for path in paths:

            def keep(_m: Any, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                seen.setdefault(path, []).append((args, kwargs, out))

            module = model.get_submodule(path)
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        yield


def _before(model: nn.Module, path: str, call: tuple[Any, Any, Any]) -> Tensor:
    """What is activated, from the weights where a Linear gives it."""
    args, _, out = call
    module = model.get_submodule(path)
    if type(module) is nn.Linear:
        return F.linear(args[0], module.weight, module.bias)
    return out


def _dense_rows(model: nn.Module, site: Dense, calls: list[Any]) -> Tensor:
    parts = []
    for call in calls:
        act = site.act(_before(model, site.before, call))
        if act.shape[-1] != site.width:
            act = act.movedim(1, -1)
        parts.append(act.reshape(-1, site.width))
    return torch.cat(parts)


def _routed_rows(
    model: nn.Module, site: Routed, calls: list[Any], inputs: Mapping[str, Any], total: int
) -> Tensor:
    block = model.get_submodule(site.block)
    args, kwargs, _ = calls[0]
    if site.routing is not None:
        x, chosen = site.routing(args, kwargs)
    else:
        given = [*args, *kwargs.values()]
        x, chosen = given[0], given[1]
    x = x.reshape(-1, x.shape[-1])
    chosen = chosen.reshape(len(x), -1)
    dense = x.new_full((len(x), site.experts, site.width), float("nan"))
    for expert in range(site.experts):
        sent = (chosen == expert).any(1)
        if sent.any():
            dense[sent, expert] = site.act(block, x[sent], expert)
    if site.rows is None:
        return dense
    whole = x.new_full((total, site.experts, site.width), float("nan"))
    whole[site.rows(model, inputs)] = dense
    return whole


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def _match(
    adapter: nl.ModelAdapter, entry: Entry, inputs: Mapping[str, Any]
) -> list[tuple[Expected, nl.NeuronSite]]:
    """The library's site of every expected one: the same module, width, and values."""
    model = adapter.model
    seen: dict[str, list[Any]] = {}
    paths = {s.before if isinstance(s, Dense) else s.block for s in entry.sites}
    with (
        torch.no_grad(),
        _watching(model, seen, paths),
        nl.ActivationRecorder(adapter, None) as recorder,
    ):
        model(**inputs)
    got = recorder.activations
    maps = recorder.tokens
    unused = dict(adapter.sites)
    matched = []
    for expected in entry.sites:
        if isinstance(expected, Routed):
            total = maps["language"].role.numel()
            rows = _routed_rows(model, expected, seen[expected.block], inputs, total)
        else:
            rows = _dense_rows(model, expected, seen[expected.before])
        found = []
        for site in unused.values():
            if (site.module, site.width) != (expected.module, expected.width):
                continue
            if site.experts != (expected.experts if isinstance(expected, Routed) else 0):
                continue
            out = got[site.name]
            assert tuple(out.shape[: maps[site.stream].role.ndim]) == tuple(
                maps[site.stream].role.shape
            )
            if isinstance(out, RoutedActivations):
                mine = out.dense().reshape(-1, site.experts, site.width)
            else:
                mine = out.reshape(-1, site.width)
            if _same(mine, rows):
                found.append(site)
        what = f"{expected.module} layer {expected.layer} {expected.stack} {type(expected)}"
        assert found, f"{entry.name}: no site gives what is expected of {what}"
        # Two sites of equal values (tied weights, one input) are told apart by their layer.
        found.sort(key=lambda site: site.layer != expected.layer)
        matched.append((expected, unused.pop(found[0].name)))
    assert not unused, f"{entry.name}: sites that are none: {sorted(unused)}"
    return matched


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if getattr(out, "logits", None) is not None else out[0]


def _ablated(
    model: nn.Module, expected: Expected, index: int, expert: int, factor: float = 0
) -> Iterator[None]:
    """The weights with one column of the down projection multiplied, by 0 or another factor."""
    if isinstance(expected, Routed):
        block = model.get_submodule(expected.block)
        kept = {k: v.detach().clone() for k, v in block.state_dict().items()}
        with torch.no_grad():
            expected.zero(block, expert, index)
            for name, value in block.state_dict().items():
                value += factor * (kept[name] - value)
        yield
        block.load_state_dict(kept)
        return
    module = model.get_submodule(expected.down)
    weight = next(p for p in module.parameters() if p.ndim >= 2)
    kept = weight.detach().clone()
    with torch.no_grad():
        if type(module).__name__ == "Conv1D":
            weight[index] *= factor
        else:
            weight[:, index] *= factor
    yield
    with torch.no_grad():
        weight.copy_(kept)


def _check_deactivation(
    adapter: nl.ModelAdapter,
    matched: list[tuple[Expected, nl.NeuronSite]],
    inputs: Mapping[str, Any],
    activations: Mapping[str, Any],
) -> None:
    model = adapter.model
    plain = _logits(model, inputs)
    for expected, site in matched:
        assert site.inert == expected.inert, (site.name, expected.inert)
        out = activations[site.name]
        expert = None
        if isinstance(out, RoutedActivations):
            expert = int(out.expert[out.expert >= 0].flatten()[0])
            values = out.dense()[..., expert, :].nan_to_num(0)
        else:
            values = out
        index = int(values.abs().reshape(-1, site.width).amax(0).argmax())
        neuron = nl.NeuronId(site.name, index, expert)
        with pytest.warns(UserWarning, match=site.name) if site.inert else nullcontext():
            off = nl.deactivate(adapter, neuron)
        with off:
            without = _logits(model, inputs)
        assert torch.equal(_logits(model, inputs), plain), site.name
        changed = not torch.equal(without, plain)
        assert changed != expected.inert, f"{site.name}: changes the logits: {changed}"
        edits = expected.zero if isinstance(expected, Routed) else expected.down
        if edits is None:
            continue
        for _ in _ablated(model, expected, index, expert or 0):
            edited = _logits(model, inputs)
        torch.testing.assert_close(without, edited, rtol=1e-3, atol=2e-4, msg=site.name)


@contextmanager
def _set_by_hand(
    model: nn.Module, expected: Expected, index: int, expert: int, value: float
) -> Iterator[None]:
    """One activation set: what the down projection is given of it is in proportion to it."""
    with ExitStack() as stack:
        if isinstance(expected, Dense):
            seen: list[Tensor] = []

            def keep(module: nn.Module, args: Any, out: Tensor) -> None:
                act = expected.act(_before(model, expected.before, (args, {}, out)))
                seen.append(act if act.shape[-1] == expected.width else act.movedim(1, -1))

            def write(module: nn.Module, args: Any) -> Any:
                given = args[0].clone()
                view = given if given.shape[-1] == expected.width else given.movedim(1, -1)
                act = seen.pop()[..., index].reshape(view.shape[:-1])
                is_act = torch.isclose(view[..., index], act, rtol=1e-5, atol=0)
                assert (act[~is_act] != 0).all()
                view[..., index] = torch.where(is_act, value, value * view[..., index] / act)
                return (given, *args[1:])

            before, down = (model.get_submodule(p) for p in (expected.before, expected.down))
            stack.callback(before.register_forward_hook(keep).remove)
            stack.callback(down.register_forward_pre_hook(write).remove)
            yield
            return

        def differ(block: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor:
            given = [*args, *kwargs.values()]
            routed = expected.routing(args, kwargs) if expected.routing else given[:2]
            x = routed[0].reshape(-1, routed[0].shape[-1])
            sent = (routed[1].reshape(len(x), -1) == expert).any(1)
            for _ in _ablated(model, expected, index, expert):
                without = block.forward(*args, **kwargs)
            new = out.clone()
            rows = new.reshape(-1, new.shape[-1])
            act = expected.act(block, x[sent], expert)[:, index, None]
            at = torch.arange(len(x))[sent]
            if len(rows) == len(x) * expected.experts:  # every token runs through every expert
                at = at + expert * len(x)
            written = (out - without).reshape(rows.shape)[at]
            rows[at] += written * (value / act - 1)
            return new

        block = model.get_submodule(expected.block)
        stack.callback(block.register_forward_hook(differ, with_kwargs=True).remove)
        yield


def _check_other_changes(
    adapter: nl.ModelAdapter,
    matched: list[tuple[Expected, nl.NeuronSite]],
    inputs: Mapping[str, Any],
    activations: Mapping[str, Any],
) -> None:
    """Multiplying is multiplying a column; setting is another activation in its place."""
    model, tried = adapter.model, set()
    for expected, site in matched:
        kind = (type(expected), type(adapter.tap(site)), expected.module)
        edits = expected.zero if isinstance(expected, Routed) else expected.down
        if edits is None or expected.inert or kind in tried:
            continue
        tried.add(kind)
        out, expert = activations[site.name], None
        if isinstance(out, RoutedActivations):
            expert = int(out.expert[out.expert >= 0].flatten()[0])
            values = out.dense()[..., expert, :].reshape(-1, site.width)
            values = values[~values.isnan().any(1)]
        else:
            values = out.reshape(-1, site.width)
        # One that is nowhere almost 0: the test divides by it.
        index = int(values.abs().amin(0).argmax())
        value = 1.5 * float(values[:, index].abs().mean()) + 0.1
        neuron = nl.NeuronId(site.name, index, expert)
        for _ in _ablated(model, expected, index, expert or 0, -2.0):
            wanted = _logits(model, inputs)
        with nl.amplify(adapter, neuron, -2.0):
            found = _logits(model, inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=3e-4, msg=site.name)
        block = model.get_submodule(expected.block) if isinstance(expected, Routed) else None
        is_gated = block is not None or getattr(adapter.tap(site), "gated", True)
        if hasattr(block, "post_expert_norm") or (is_gated and values[:, index].abs().min() == 0):
            continue  # what is written is not in proportion, or it is not known to what
        with _set_by_hand(model, expected, index, expert or 0, value):
            wanted = _logits(model, inputs)
        with nl.set_to(adapter, neuron, value):
            found = _logits(model, inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=5e-4, msg=site.name)


def _samples_mix(entry: Entry, model: nn.Module) -> bool:
    """Whether a sample's logits depend on the other's image."""
    images = entry.images()
    other = [images[0], [1 - image for image in images[1]]]
    before, after = (_logits(model, entry.inputs(model, each)) for each in (images, other))
    return not torch.allclose(before[0], after[0], rtol=1e-3, atol=1e-3)


def _check_parts_of_the_batch(
    entry: Entry,
    adapter: nl.ModelAdapter,
    inputs: Mapping[str, Any],
    activations: Mapping[str, Any],
    maps: Mapping[str, nl.TokenMap],
) -> None:
    """Each role's tokens in turn are all tokens; each sample is changed by itself."""
    model, streams, values = adapter.model, set(), {}
    for site in adapter.sites.values():
        out = activations[site.name]
        if site.inert or site.stream in streams or isinstance(out, RoutedActivations):
            continue
        streams.add(site.stream)
        index = int(out.reshape(-1, site.width).abs().amax(0).argmax())
        values[site.neuron(index)] = float(out[..., index].max()) + 1
    real = maps[adapter.answer_stream].role != nl.Role.PAD
    plain = _logits(model, inputs)
    if real.shape != plain.shape[:2]:
        real = torch.ones(plain.shape[:2], dtype=torch.bool)
    texts = {"language", adapter.answer_stream}
    change = nl.set_to(adapter, list(values), values)
    with change:
        everywhere = _logits(model, inputs)
    close = {"rtol": 1e-3, "atol": 3e-4, "msg": f"{entry.name}: {list(values)}"}
    # Padding of an image is no role's, and may matter.
    padded = {s for s in streams if (maps[s].role == nl.Role.PAD).any() and s not in texts}
    whole = [neuron for neuron in values if adapter.site(neuron.site).stream not in padded]
    with nl.set_to(adapter, whole, values):
        wanted = _logits(model, inputs)
    with ExitStack() as stack:
        for role, numbers in NAMED.items():
            if any(maps[each].is_role(*numbers).any() for each in streams - padded):
                stack.enter_context(nl.set_to(adapter, whole, values, roles=role))
        by_role = _logits(model, inputs)
    torch.testing.assert_close(by_role[real], wanted[real], **close)
    if entry.name in MIXING and _samples_mix(entry, model):
        return
    for sample, others in ((0, [change, None]), (1, [None, change])):
        with nl.by_sample(adapter, others):
            found = _logits(model, inputs)
        torch.testing.assert_close(found[sample], everywhere[sample], **close)
        torch.testing.assert_close(found[1 - sample], plain[1 - sample], **close)


def _first_input(entry: Entry, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What goes into the first layer of the language stack."""
    kept: list[Tensor] = []

    def keep(_m: Any, args: Any, kwargs: Any) -> None:
        if not kept:
            kept.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = model.get_submodule(entry.first).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return kept[0]


@contextmanager
def _unmixed(entry: Entry, model: nn.Module) -> Iterator[None]:
    """No token of the vision part sees another one."""

    def silence(_m: Any, _args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (torch.zeros_like(out[0]), *out[1:])
        return torch.zeros_like(out)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(re.fullmatch(pattern, name) for pattern in entry.mixers):
                stack.callback(module.register_forward_hook(silence).remove)
        yield


def _check_roles(
    entry: Entry, adapter: nl.ModelAdapter, images: Any, maps: Mapping[str, nl.TokenMap]
) -> None:
    model = adapter.model
    before = _first_input(entry, model, entry.inputs(model, images))
    other = [[1 - image for image in row] for row in images]
    moved = torch.zeros(before.shape[:-1], dtype=torch.bool)
    for changed in (other, [[image.flip(2) * 0.5 for image in row] for row in images]):
        after = _first_input(entry, model, entry.inputs(model, changed))
        moved |= (after != before).any(-1)
    language = maps["language"]
    is_visual = language.role == nl.Role.VISUAL
    if entry.spatial == "none":
        assert not is_visual.any()
        return
    assert is_visual.any()
    assert torch.equal(moved.reshape(is_visual.shape), is_visual), (moved.int(), is_visual.int())
    seen = ~language.box[is_visual].isnan().any(-1)
    assert bool(seen.any()) == (entry.spatial == "region")


def _check_padding(inputs: Mapping[str, Any], maps: Mapping[str, nl.TokenMap]) -> None:
    mask = inputs.get("attention_mask")
    role = maps["language"].role
    if isinstance(mask, Tensor) and mask.shape == role.shape:
        assert torch.equal(role == nl.Role.PAD, mask == 0)
        assert (mask == 0).any(), "the test's own inputs have no padding"


def _regions(entry: Entry) -> list[tuple[float, float, float, float]]:
    """Parts of the image, as shares of its width and height."""
    return [(0.0, 0.0, 0.3, 0.3), (0.6, 0.1, 0.9, 0.45), (0.35, 0.55, 0.65, 1.0)]


def _check_boxes(
    entry: Entry,
    adapter: nl.ModelAdapter,
    images: Any,
    maps: Mapping[str, nl.TokenMap],
    matched: list[tuple[Expected, nl.NeuronSite]],
) -> None:
    """With no mixing, a region's pixels move the tokens whose boxes touch it, and no others."""
    model = adapter.model
    firsts: dict[str, Dense] = {}
    for expected, site in matched:
        if isinstance(expected, Dense) and site.module in ("vision", "projector"):
            firsts.setdefault(site.stream, expected)

    def look(given: Any) -> dict[str, Tensor]:
        inputs = entry.inputs(model, given)
        seen: dict[str, list[Any]] = {}
        with _unmixed(entry, model), _watching(model, seen, {e.before for e in firsts.values()}):
            rows = {"language": _first_input(entry, model, inputs)}
        for stream, expected in firsts.items():
            rows[stream] = _dense_rows(model, expected, seen[expected.before])
        return {
            s: r.reshape(-1, r.shape[-1]) if s != "language" else r.flatten(0, -2)
            for s, r in rows.items()
        }

    plain = look(images)
    everything = look([[1 - image for image in row] for row in images])
    for stream in plain:
        role = maps[stream].role.flatten()
        moved = (everything[stream] != plain[stream]).any(-1).cpu()
        has_box = ~maps[stream].box.reshape(-1, 4).isnan().any(-1)
        assert moved[(role == nl.Role.VISUAL) & has_box].all(), (entry.name, stream)
        assert not moved[role == nl.Role.SPECIAL].any(), (entry.name, stream)
        if stream != "language":
            assert not moved[role == nl.Role.PAD].any(), (entry.name, stream)
    counted = dict.fromkeys(plain, 0)
    for left, top, right, bottom in _regions(entry):
        changed = [[image.clone() for image in row] for row in images]
        places = []
        for row in changed:
            _, h, w = row[0].shape
            place = (int(left * w), int(top * h), max(1, int(right * w)), max(1, int(bottom * h)))
            places.append(place)
            x0, y0, x1, y1 = place
            row[0][:, y0:y1, x0:x1] = 1 - row[0][:, y0:y1, x0:x1]
        after = look(changed)
        for stream in plain:
            tokens = maps[stream]
            moved = (after[stream] != plain[stream]).any(-1).cpu()
            box, sample = tokens.box.reshape(-1, 4), tokens.sample.flatten()
            seen = (tokens.role.flatten() == nl.Role.VISUAL) & ~box.isnan().any(-1)
            region = torch.tensor(places, dtype=torch.float)[sample.clamp(min=0)]
            touches = (
                (box[:, 0] < region[:, 2] - 1e-3)
                & (box[:, 2] > region[:, 0] + 1e-3)
                & (box[:, 1] < region[:, 3] - 1e-3)
                & (box[:, 3] > region[:, 1] + 1e-3)
            )
            counted[stream] += int(touches[seen].any() and not touches[seen].all())
            if entry.overlap:
                # Convolutions see more than the cell: what is told is seen, and what is far is not.
                assert moved[seen & touches].all(), (entry.name, stream)
                side = torch.stack([box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]], 1)
                near = (
                    (box[:, 0] - side[:, 0] < region[:, 2])
                    & (box[:, 2] + side[:, 0] > region[:, 0])
                    & (box[:, 1] - side[:, 1] < region[:, 3])
                    & (box[:, 3] + side[:, 1] > region[:, 1])
                )
                far = seen & ~near
                if entry.name in FAINT and (seen & touches).any() and far.any():
                    change = (after[stream] - plain[stream]).abs().mean(-1)
                    assert change[seen & touches].mean() > 2 * change[far].mean()
                if entry.name in FAINT | EVERYWHERE:
                    continue
                assert not moved[far].any(), (entry.name, stream)
                continue
            assert torch.equal(moved[seen], touches[seen]), (
                entry.name,
                stream,
                moved[seen].int(),
                touches[seen].int(),
            )
    sees = {stream: not maps[stream].box.isnan().all() for stream in plain}
    assert all(counted[stream] for stream in plain if sees[stream]), counted


def _check_down_input(entry: Entry, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """The other kind of neuron: what the down projections are really given."""
    adapter = nl.adapt(model, neuron="down_input")
    seen: dict[str, list[Any]] = {}
    dense = [e for e in entry.sites if isinstance(e, Dense) and e.down is not None]
    with (
        torch.no_grad(),
        _watching(model, seen, {e.down for e in dense}),
        nl.ActivationRecorder(adapter, None) as recorder,
    ):
        model(**inputs)
    got = [
        out.reshape(-1, out.shape[-1])
        for out in recorder.activations.values()
        if isinstance(out, Tensor)
    ]
    for expected in dense:
        given = [call[0][0] for call in seen[expected.down]]
        given = [x if x.shape[-1] == expected.width else x.movedim(1, -1) for x in given]
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in given])
        assert any(_same(rows, out) for out in got), (entry.name, expected.down)


def test_every_architecture_of_this_transformers_is_in_the_zoo() -> None:
    names = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert names - {name.split("+")[0] for name in ZOO} == set()
    backbones = {"blip-2+t5", "instructblip+t5", "internvl+gpt_oss", "internvl+qwen3_moe"}
    assert backbones | {"lfm2_vl+lfm2_moe"} <= set(ZOO)


@pytest.mark.parametrize("name", sorted(ZOO))
@torch.no_grad()
def test_architecture(name: str) -> None:
    """Points 1 to 5 of what must hold for every architecture."""
    entry = ZOO[name]
    model = entry.model()
    images = entry.images()
    inputs = entry.inputs(model, images)
    on_meta = nl.adapt(entry.model("meta"))
    adapter = nl.adapt(model)
    assert on_meta.sites == adapter.sites
    matched = _match(adapter, entry, inputs)
    for expected, site in matched:
        assert site.layer == expected.layer, (site.name, expected.layer)
        assert site.module == expected.module
    with torch.no_grad(), nl.ActivationRecorder(adapter, None) as recorder:
        model(**inputs)
    # The canvas stands for the original image: nothing was resized.
    sizes = [[(image.shape[2], image.shape[1]) for image in row] for row in images]
    maps = adapter.tokens(inputs, sizes)
    alone = adapter.tokens(inputs)
    assert {k: m.role.tolist() for k, m in alone.items()} == {
        k: m.role.tolist() for k, m in maps.items()
    }
    _check_padding(inputs, maps)
    _check_roles(entry, adapter, images, maps)
    if entry.mixers or entry.spatial == "region":
        _check_boxes(entry, adapter, images, maps, matched)
    _check_deactivation(adapter, matched, inputs, recorder.activations)
    _check_other_changes(adapter, matched, inputs, recorder.activations)
    _check_parts_of_the_batch(entry, adapter, inputs, recorder.activations, maps)
    _check_down_input(entry, model, inputs)
