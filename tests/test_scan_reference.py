"""The scan of whole models, with their real processors, against loops over plain hooks.

What a site gives is taken by this file's own hooks on the modules that the zoo names, and sorted
and counted by hand. Of the library it uses the token maps and the plan, which have their own
tests, and nothing that reads, reduces or keeps activations.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

import neuronlens as nl
from neuronlens.activations import Routed as RoutedActivations
from neuronlens.neurons import NeuronSite
from neuronlens.running import ABSENT, COUNTED, FIXED_POINT
from neuronlens.samples import image_digest
from neuronlens.scan import batch_plan
from neuronlens.tokens import Role
from real import qwen, reals
from zoo import Dense, Entry, Routed, entries

ZOO, REAL = entries(), reals()
LOW = -math.inf
N, KEEP_VISUAL, KEEP_TEXT = 4, 5, 3
BATCHES = {"batch_size": 3, "window": 6}
NEAR = 2e-6
"""How far, for a value of 1, an activation may be that is computed twice."""

SIZES = [(150, 100), (90, 160), (64, 64), (120, 48), (100, 140), (56, 120), (160, 90)]
TEXTS = [
    ("what is this", "a small photo"),
    ("this", "a photo"),
    ("what is this small photo", "this is a small photo"),
    ("is this a photo", "this"),
    ("what", "a small small photo photo"),
    ("what is a photo", "this is this is this a small photo"),
    ("a small photo what is this", "a small"),
]
DOMAINS = ["cats", "cups", None, "cats", "cups", "cats", None]

# The cases.


@dataclass(frozen=True)
class Case:
    """A model with its processor, and which text is eligible.

    Attributes:
        name: Of the zoo's entry.
        text_roles: As for `scan`.
    """

    name: str
    text_roles: tuple[str, ...] = ("response",)

    def __str__(self) -> str:
        return f"{self.name} by {' and '.join(self.text_roles)}"

    def build(self) -> tuple[Any, Any]:
        if self.name == "qwen3_vl_moe":  # its processor is that of the dense model
            return qwen.build(self.name, "Qwen3VLProcessor", *qwen.IMAGES_3, chat=qwen.QWEN_CHAT)
        return REAL[self.name].build()

    @property
    def template(self) -> bool:
        return self.name == "qwen3_vl_moe" or REAL[self.name].template

    @property
    def several(self) -> bool:
        return self.name == "qwen3_vl_moe" or REAL[self.name].several


BOTH = ("prompt", "response")
MOE = Case("qwen3_vl_moe")
CASES = [
    Case("llava"),
    Case("qwen2_5_vl", BOTH),
    Case("instructblip"),
    Case("instructblip", BOTH),
    Case("instructblip+t5"),
    Case("mllama"),
    Case("idefics", BOTH),
    Case("gemma4"),
    MOE,
    Case("llama4"),
    Case("ernie4_5_vl_moe", BOTH),
]
ROUTED = [case for case in CASES if any(isinstance(s, Routed) for s in ZOO[case.name].sites)]


def photo(number: int) -> Image.Image:
    """A real photograph, of another size for each number."""
    picture = (data.astronaut, data.chelsea, data.coffee)[number % 3]()
    return Image.fromarray(picture).resize(SIZES[number % len(SIZES)])


def samples_of(case: Case) -> list[nl.Sample]:
    made = []
    for number, (prompt, response) in enumerate(TEXTS):
        images = [photo(number)]
        if case.several and number in (2, 5):
            images.append(photo(number + 1))
        made.append(nl.Sample(f"photo {number}", tuple(images), prompt, response, DOMAINS[number]))
    return made


# The reference: what each site gives for each sample.


@dataclass(frozen=True)
class Seen:
    """One site's activations.

    Attributes:
        values: By sample position, `[token, neuron]`, the neurons of experts one after the
            other; NaN where a token was not sent to the neuron's expert.
        roles: By sample position, of each token.
        is_same: Whether these are the very numbers that the model went on with, and not those
            numbers computed again.
    """

    values: dict[int, Tensor]
    roles: dict[int, list[int]]
    is_same: bool

    def of(self, neuron: int) -> dict[int, dict[Role, list[float]]]:
        """One neuron's activations by sample and role; of tokens that ran through it."""
        found: dict[int, dict[Role, list[float]]] = {}
        for position, values in self.values.items():
            mine: dict[Role, list[float]] = {role: [] for role in COUNTED}
            column = values[:, neuron].tolist()
            for value, role in zip(column, self.roles[position], strict=True):
                if role in mine and not math.isnan(value):
                    mine[Role(role)].append(value)
            found[position] = mine
        return found


@contextmanager
def listening(model: nn.Module, entry: Entry, heard: dict[int, list[Any]]) -> Iterator[None]:
    """By the number of the zoo's site: its written-out activations, and the model's own.

    The model's own are the output of that leaf module which was given the very tensor that the
    site's projection gave: the activation function, where that is a module.
    """
    before = {s.before: n for n, s in enumerate(entry.sites) if isinstance(s, Dense)}
    blocks = {s.block: n for n, s in enumerate(entry.sites) if isinstance(s, Routed)}
    given: dict[int, Tensor] = {}

    def hook(path: str, _module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if path in blocks:
            heard.setdefault(blocks[path], []).append((args, kwargs))
            return
        first = args[0] if args else None
        for number, tensor in given.items():
            if first is tensor:
                heard[number][-1][1] = out.clone()
        if path in before:
            number = before[path]
            given[number] = out
            heard.setdefault(number, []).append([entry.sites[number].act(out).clone(), None])

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path in blocks or path in before or not list(module.children()):
                attach = module.register_forward_hook
                stack.callback(attach(partial(hook, path), with_kwargs=True).remove)
        yield


def dense_rows(site: Dense, calls: list[list[Any]]) -> tuple[Tensor, bool]:
    """`[token, neuron]`, and whether it is the model's own tensor."""
    own = [same for _, same in calls if same is not None]
    written = [out for out, _ in calls]
    is_same = len(own) == len(calls)
    if is_same:
        torch.testing.assert_close(own, written, rtol=1e-4, atol=1e-5)
    parts = own if is_same else written
    parts = [each if each.shape[-1] == site.width else each.movedim(1, -1) for each in parts]
    return torch.cat([each.reshape(-1, site.width) for each in parts]), is_same


def routed_rows(
    model: nn.Module, site: Routed, calls: list[Any], inputs: Mapping[str, Any], total: int
) -> Tensor:
    """`[token, expert x neuron]`, NaN where a token was not sent to an expert."""
    ((args, kwargs),) = calls
    x, chosen = site.routing(args, kwargs)
    x = x.reshape(-1, x.shape[-1])
    chosen = chosen.reshape(len(x), -1)
    rows = range(total) if site.rows is None else site.rows(model, inputs).tolist()
    whole = x.new_full((total, site.experts, site.width), math.nan)
    block = model.get_submodule(site.block)
    for expert in range(site.experts):
        for number, row in enumerate(rows):
            if expert in chosen[number]:
                whole[row, expert] = site.act(block, x[number : number + 1], expert)[0]
    return whole.flatten(1)


def partners(adapter: nl.ModelAdapter, entry: Entry) -> dict[int, NeuronSite]:
    """The library's site of each of the zoo's, by what both say of themselves."""
    stacks = {site.stack for site in entry.sites} - {""}
    found = {}
    for number, expected in enumerate(entry.sites):
        experts = expected.experts if isinstance(expected, Routed) else 0
        (found[number],) = [
            site
            for site in adapter.sites.values()
            if (site.module, site.layer) == (expected.module, expected.layer)
            and (site.width, site.experts) == (expected.width, experts)
            and {part for part in site.name.split(".") if part in stacks} == {expected.stack} - {""}
        ]
    assert sorted(site.name for site in found.values()) == sorted(adapter.sites)
    return found


@torch.inference_mode()
def watch(case: Case, adapter: nl.ModelAdapter, samples: list[nl.Sample]) -> dict[str, Seen]:
    """By the library's name of each site, what it gives for each sample, batch by batch."""
    entry, model = ZOO[case.name], adapter.model
    paired = partners(adapter, entry)
    seen = {site.name: Seen({}, {}, True) for site in paired.values()}
    same = dict.fromkeys(seen, True)
    for batch in batch_plan(samples, **BATCHES):
        encoded = nl.encode(adapter, [sample for _, sample in batch], template=case.template)
        heard: dict[int, list[Any]] = {}
        with listening(model, entry, heard):
            adapter.forward(encoded.inputs)
        for number, site in paired.items():
            tokens, expected = encoded.tokens[site.stream], entry.sites[number]
            role, row = tokens.role.flatten(), tokens.sample.flatten()
            if isinstance(expected, Routed):
                calls = heard[number]
                values = routed_rows(model, expected, calls, encoded.inputs, len(role))
                same[site.name] = False
            else:
                values, is_same = dense_rows(expected, heard[number])
                same[site.name] &= is_same
            assert len(values) == len(role)
            for place, (position, _) in enumerate(batch):
                at = (row == place) & (role != Role.PAD)
                seen[site.name].values[position] = values[at]
                seen[site.name].roles[position] = role[at].tolist()
    return {name: Seen(each.values, each.roles, same[name]) for name, each in seen.items()}


@dataclass(frozen=True)
class Scanned:
    """A scanned model beside what its sites really gave."""

    case: Case
    vlm: nl.ModelAdapter
    samples: list[nl.Sample]
    seen: dict[str, Seen]
    folder: Path

    def scan(self, name: str, **more: Any) -> nl.Atlas:
        settings = {
            "n": N,
            "keep_visual": KEEP_VISUAL,
            "keep_text": KEEP_TEXT,
            "text_roles": self.case.text_roles,
            "template": self.case.template,
            **BATCHES,
        }
        return nl.scan(self.vlm, self.samples, out=self.folder / name, **settings | more)

    @cached_property
    def atlas(self) -> nl.Atlas:
        return self.scan("atlas")

    @cached_property
    def text(self) -> list[Role]:
        return [Role[each.upper()] for each in self.case.text_roles]

    def neurons(self, site: str) -> list[int]:
        """A handful: of every expert some."""
        known = self.vlm.site(site)
        some = range(0, known.width, max(1, known.width // (3 if known.experts else 8)))
        return [e * known.width + i for e in range(max(1, known.experts)) for i in some]

    def id_of(self, site: str, neuron: int) -> nl.NeuronId:
        known = self.vlm.site(site)
        expert, index = divmod(neuron, known.width)
        return known.neuron(index, expert if known.experts else None)


_scanned: dict[Case, Scanned] = {}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Makes each case once."""

    def scanned(case: Case) -> Scanned:
        if case not in _scanned:
            vlm = nl.adapt(*case.build())
            samples = samples_of(case)
            folder = tmp_path_factory.mktemp("scanned")
            _scanned[case] = Scanned(case, vlm, samples, watch(case, vlm, samples), folder)
        return _scanned[case]

    yield scanned
    _scanned.clear()


def every(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


# The slow way to what a scan keeps.


@dataclass(frozen=True)
class Entered:
    """One sample of one neuron's list."""

    position: int
    visual: list[float]
    text: list[float]

    @property
    def value(self) -> float:
        return max([*self.visual, *self.text])

    def kept(self) -> tuple[list[float], list[float]]:
        return (
            (self.visual + [LOW] * KEEP_VISUAL)[:KEEP_VISUAL],
            (self.text + [LOW] * KEEP_TEXT)[:KEEP_TEXT],
        )


def ranked(of: dict[int, dict[Role, list[float]]], text: list[Role]) -> list[Entered]:
    """Every sample with an eligible token that ran through the neuron, best first."""
    found = []
    for position, by_role in of.items():
        visual = sorted(by_role[Role.VISUAL], reverse=True)
        said = sorted((value for role in text for value in by_role[role]), reverse=True)
        if visual or said:
            found.append(Entered(position, visual, said))
    return sorted(found, key=lambda each: (-each.value, each.position))


def margin(value: float) -> float:
    return NEAR * max(1.0, abs(value))


def clear(order: list[Entered]) -> list[bool]:
    """Whether each sample's value is clearly apart from its neighbours'."""
    apart = [one.value - two.value > 10 * margin(one.value) for one, two in pairwise(order)]
    return [a and b for a, b in zip([True, *apart], [*apart, True], strict=True)]


def block(sample: nl.Sample) -> int:
    # By the images: what is asked about the same ones is no independent evidence.
    shown = "+".join(image_digest(picture) for picture in sample.open_images())
    return hashlib.sha256(shown.encode()).digest()[0] % 16


@every(CASES)
def test_the_top_samples_and_what_is_kept_of_them_are_what_sorting_finds(scans, case):
    made = scans(case)
    compared = told = 0
    for site, seen in made.seen.items():
        top = made.atlas.statistics(site).top
        for neuron in made.neurons(site):
            order = ranked(seen.of(neuron), made.text)
            ids = top.ids[neuron].tolist()
            visual, text = top.visual[neuron].tolist(), top.text[neuron].tolist()
            there = min(N, len(order))
            assert ids[there:] == [ABSENT] * (N - there)
            assert visual[there:] == [[LOW] * KEEP_VISUAL] * (N - there)
            assert text[there:] == [[LOW] * KEEP_TEXT] * (N - there)
            if seen.is_same:
                assert ids[:there] == [each.position for each in order[:there]]
                assert visual[:there] == [each.kept()[0] for each in order[:there]]
                assert text[:there] == [each.kept()[1] for each in order[:there]]
                continue
            by_position = {each.position: each for each in order}
            assert len(set(ids[:there])) == there
            for rank, (each, is_clear) in enumerate(zip(order[:there], clear(order), strict=False)):
                found = by_position[ids[rank]]
                assert found.value == pytest.approx(each.value, rel=NEAR, abs=NEAR)
                assert visual[rank] == pytest.approx(found.kept()[0], rel=NEAR, abs=NEAR)
                assert text[rank] == pytest.approx(found.kept()[1], rel=NEAR, abs=NEAR)
                compared += 1
                if is_clear:
                    told += 1
                    assert found is each
    assert told >= 0.9 * compared


@every(CASES)
def test_maxima_means_and_firing_are_those_of_a_loop_over_all_tokens(scans, case):
    made = scans(case)
    atlas = made.atlas
    for site, seen in made.seen.items():
        found = atlas.statistics(site)
        near = 0.0 if seen.is_same else NEAR
        for neuron in made.neurons(site):
            of = seen.of(neuron)
            known = atlas.neuron(made.id_of(site, neuron))
            for place, role in enumerate(COUNTED):
                values = [value for by_role in of.values() for value in by_role[role]]
                largest = max(values, default=LOW)
                assert found.roles.maximum[place, neuron].item() == pytest.approx(
                    largest, rel=near, abs=near
                )
                assert known.maximum[role] == found.roles.maximum[place, neuron].item()
                assert found.roles.total[place, neuron].item() / FIXED_POINT == pytest.approx(
                    math.fsum(values), rel=near, abs=len(of) / FIXED_POINT + near * len(values)
                )
                if values:
                    mean = math.fsum(values) / len(values)
                    assert known.mean[role] == pytest.approx(mean, rel=1e-5, abs=1e-6)
                else:
                    assert math.isnan(known.mean[role])
                fired: Counter[tuple[str, int]] = Counter()
                doubtful: Counter[tuple[str, int]] = Counter()
                for position, by_role in of.items():
                    sample = made.samples[position]
                    where = (sample.domain or "", block(sample))
                    fired[where] += sum(value > 0 for value in by_role[role])
                    if not seen.is_same:
                        doubtful[where] += sum(0 < abs(v) <= NEAR for v in by_role[role])
                for domain in ("cats", "cups", ""):
                    for number in range(16):
                        counted = found.firing.fired[domain][number, place, neuron].item()
                        at = domain, number
                        assert abs(counted - fired[at]) <= doubtful[at]


@every(CASES)
def test_tokens_are_counted_by_domain_block_and_role(scans, case):
    made = scans(case)
    for site, seen in made.seen.items():
        firing = made.atlas.statistics(site).firing
        experts = made.vlm.site(site).experts
        width = made.vlm.site(site).width
        tokens: Counter[tuple[str, int, int]] = Counter()
        routed: Counter[tuple[str, int, int, int]] = Counter()
        for position, roles in seen.roles.items():
            sample = made.samples[position]
            ran = ~seen.values[position][:, ::width].isnan()
            for token, role in enumerate(roles):
                where = sample.domain or "", block(sample), role
                tokens[where] += 1
                for expert in range(experts):
                    routed[(*where, expert)] += bool(ran[token, expert])
        assert sorted(firing.tokens) == ["", "cats", "cups"]
        for domain, by_block in firing.tokens.items():
            expected = [[tokens[domain, b, role] for role in COUNTED] for b in range(16)]
            assert by_block.tolist() == expected
            assert firing.routed[domain].tolist() == [
                [[routed[domain, b, role, e] for e in range(experts)] for role in COUNTED]
                for b in range(16)
            ]
        assert sum(tokens.values()) == sum(int(each.sum()) for each in firing.tokens.values())


@every(CASES)
def test_dense_activations_are_compared_as_the_very_numbers_of_the_model(scans, case):
    """What the other tests lean on: only experts, whose numbers are inside, are written out."""
    made = scans(case)
    again = {site for site, seen in made.seen.items() if not seen.is_same}
    assert again == {name for name, site in made.vlm.sites.items() if site.experts}


@every(CASES)
def test_lists_overflow_and_images_and_texts_differ_in_length(scans, case):
    """That the samples can tell a good scan from a bad one."""
    made = scans(case)
    language = made.seen["language.0"].roles
    lengths = {tuple(sorted(Counter(roles).items())) for roles in language.values()}
    assert len(lengths) > 3
    assert len(made.samples) > N
    batches = list(batch_plan(made.samples, **BATCHES))
    assert [len(batch) for batch in batches] == [3, 3, 1]


# Routed experts.


def ran_on(seen: Seen, neuron: int, roles: list[Role]) -> dict[int, int]:
    """On how many tokens of these roles a neuron ran, by sample; only where it ran at all."""
    counts = {p: sum(len(mine[role]) for role in roles) for p, mine in seen.of(neuron).items()}
    return {position: count for position, count in counts.items() if count}


def routed_sites(made: Scanned) -> list[str]:
    return [name for name, site in made.vlm.sites.items() if site.experts]


@every(ROUTED)
def test_a_sample_that_an_expert_never_ran_on_is_absent_from_its_lists(scans, case):
    """Here there is room for every sample."""
    made = scans(case)
    atlas = made.scan("roomy", n=len(TEXTS) + 2, sites=routed_sites(made))
    absent = short = 0
    for site in routed_sites(made):
        top, width = atlas.statistics(site).top, made.vlm.site(site).width
        for expert in range(made.vlm.site(site).experts):
            visual = ran_on(made.seen[site], expert * width, [Role.VISUAL])
            text = ran_on(made.seen[site], expert * width, made.text)
            present = {*visual, *text}
            absent += len(present) < len(TEXTS)
            for neuron in range(expert * width, (expert + 1) * width):
                ids = top.ids[neuron].tolist()
                assert set(ids) - {ABSENT} == present
                assert ids[len(present) :] == [ABSENT] * (len(ids) - len(present))
                kept = (top.visual, KEEP_VISUAL, visual), (top.text, KEEP_TEXT, text)
                for values, most, ran in kept:
                    there = (values[neuron] > LOW).sum(1).tolist()
                    assert there == [min(most, ran.get(position, 0)) for position in ids]
                    short += sum(count < most for count in there[: len(present)])
    assert short
    assert absent or case.name == "llama4"


@every(ROUTED)
def test_the_share_of_tokens_sent_to_an_expert_stands_beside_its_firing_rate(scans, case):
    made = scans(case)
    for site in routed_sites(made):
        known, seen = made.vlm.site(site), made.seen[site]
        for role in COUNTED:
            tokens = sum(roles.count(role) for roles in seen.roles.values())
            for expert in range(known.experts):
                ran = sum(ran_on(seen, expert * known.width, [role]).values())
                found = made.atlas.neuron(known.neuron(0, expert))
                if tokens == 0:
                    assert math.isnan(found.routed_share[role])
                    continue
                assert found.routed_share[role] == pytest.approx(ran / tokens)
                fires = sum(
                    value > 0
                    for mine in seen.of(expert * known.width).values()
                    for value in mine[role]
                )
                assert found.firing_rate[role] == pytest.approx(fires / tokens)


@every(ROUTED)
@pytest.mark.parametrize("count", [2, 3])
def test_merged_shards_of_a_routed_model_are_the_whole_scan_bit_for_bit(
    scans, tmp_path, case, count
):
    made = scans(case)
    shards = [made.scan(f"{count} shards, {i}", shard=(i, count)) for i in range(count)]
    merged = nl.Atlas.merge(shards[::-1], tmp_path / "merged")
    whole = made.atlas
    names = [name for name in whole.manifest.files if name != "sessions.jsonl"]
    assert sum(name.startswith("sites/") for name in names) == len(made.vlm.sites)
    for name in names:
        assert (merged.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert merged.manifest.samples == len(TEXTS)
    one, two = nl.NeuronClassifier().classify(whole), nl.NeuronClassifier().classify(merged)
    for name in one.sites:
        assert one.sites[name].probability.tolist() == two.sites[name].probability.tolist()


# Classification.


def levels(values: list[float], maximum: float) -> list[float]:
    return [10 * max(0.0, value) / maximum for value in values]


@every(CASES)
def test_categories_are_those_of_counting_tokens_over_the_thresholds(scans, case):
    """Of 0..10, floored: over 4 visual tokens of 3 or more, over 2 text tokens of 4 or more."""
    made = scans(case)
    found = nl.NeuronClassifier().classify(made.atlas)
    told = doubtful = 0
    for site, seen in made.seen.items():
        for neuron in made.neurons(site):
            order = ranked(seen.of(neuron), made.text)
            maximum = max((each.value for each in order), default=0.0)
            id = made.id_of(site, neuron)
            if maximum <= 0:
                assert found.of(id) == "unknown"
                assert found.probability(id)["unknown"] == 1
                assert found.sites[site].silent[neuron]
                continue
            used = order[:N]
            near = [
                abs(level - threshold) < 1e-3
                for each in used
                for values, threshold in ((each.visual, 3), (each.text, 4))
                for level in levels(values, maximum)
            ]
            if not seen.is_same and (any(near) or not all(clear(order)[:N])):
                doubtful += 1
                continue
            told += 1
            kinds: Counter[str] = Counter()
            for each in used:
                visual = sum(math.floor(v) > 2 for v in levels(each.visual, maximum)) > 4
                text = sum(math.floor(v) > 3 for v in levels(each.text, maximum)) > 2
                names = {(True, False): "visual", (False, True): "text", (True, True): "multimodal"}
                kinds[names.get((visual, text), "unknown")] += 1
            shares = {kind: kinds[kind] / len(used) for kind in found.probability(id)}
            assert found.probability(id) == pytest.approx(shares)
    assert doubtful <= 0.1 * told


# Exemplars of experts.


@every(ROUTED)
def test_exemplars_of_experts_are_what_ran_and_0_where_nothing_did(scans, case):
    made = scans(case)
    # Whatever sample is looked at, and however low its activations are.
    chosen = [
        (site, neuron)
        for site in routed_sites(made)
        for neuron in made.neurons(site)
        if ran_on(made.seen[site], neuron, [Role.VISUAL, *made.text])
    ]
    ids = {made.id_of(*each): each for each in chosen}
    found = nl.exemplars(
        made.vlm, made.atlas, list(ids), explain=(1, 3), held_out=(2, 4), samples=made.samples
    )
    unrouted = 0
    for id, (site, neuron) in ids.items():
        groups = [*found[id].explain, *found[id].held_out]
        assert sorted(each.rank for each in groups) == list(
            range(1, 1 + len(made.atlas.neuron(id).positions))
        )
        for each in groups:
            seen = made.seen[site]
            expected = seen.values[each.position][:, neuron]
            unrouted += int(expected.isnan().sum())
            assert each.tokens.role.tolist() == seen.roles[each.position]
            # Other batches than the scan's: rounded otherwise.
            assert each.activation.tolist() == pytest.approx(
                expected.nan_to_num(0.0).tolist(), rel=1e-3, abs=1e-4
            )
    assert unrouted


# Sites of one modality.


def lacks(made: Scanned, site: NeuronSite) -> tuple[bool, bool]:
    """Whether a site can have no visual, and no eligible text token, by what it is."""
    name = made.case.name
    language = site.module == "language"
    cross = name in ("mllama", "idefics")
    if site.branch == "text":
        return True, "prompt" not in made.case.text_roles
    if not language:
        return False, True
    if name == "ernie4_5_vl_moe" and site.experts:
        return "vision" not in site.name, "vision" in site.name
    if name == "instructblip+t5":
        is_decoder = "decoder" in site.name
        return is_decoder, not is_decoder
    return cross, False


@every(CASES)
def test_sites_of_one_modality_have_only_the_lists_they_can_have(scans, case):
    made = scans(case)
    categories = nl.NeuronClassifier().classify(made.atlas)
    for name, site in made.vlm.sites.items():
        no_visual, no_text = lacks(made, site)
        found = made.atlas.statistics(name)
        by_role = dict(zip(COUNTED, found.roles.maximum, strict=True))
        sides = (found.top.visual, [Role.VISUAL], no_visual), (found.top.text, made.text, no_text)
        for kept, roles, is_missing in sides:
            assert bool((kept > LOW).any()) != is_missing, name
            assert bool(torch.stack([by_role[r] for r in roles]).max() > LOW) != is_missing, name
        share = categories.sites[name].probability
        if no_visual:
            assert not share[:, [0, 2]].any(), name
        if no_text:
            assert not share[:, [1, 2]].any(), name
        if no_visual and no_text:
            assert (found.top.ids == ABSENT).all(), name
            assert (share[:, 3] == 1).all(), name
            assert categories.sites[name].silent.all(), name
        elif not site.experts:
            assert (found.top.ids != ABSENT).all(), name


# Fewer logits.


@pytest.mark.parametrize("name", sorted(ZOO))
def test_computing_fewer_logits_changes_no_activation(name):
    entry = ZOO[name]
    model = entry.model()
    adapter = nl.adapt(model)
    # Labels, which some processors give, have no place in a scan.
    inputs = {k: v for k, v in entry.inputs(model, entry.images()).items() if k != "labels"}
    kept, outs = [], []
    for logits in (True, False):
        with torch.inference_mode(), nl.ActivationRecorder(adapter, None) as recorder:
            outs.append(adapter.forward(inputs, logits=logits))
        kept.append(recorder.activations)
    assert sorted(kept[0]) == sorted(kept[1])
    for site, whole in kept[0].items():
        fewer = kept[1][site]
        if isinstance(whole, RoutedActivations):
            assert torch.equal(whole.expert, fewer.expert), site
            whole, fewer = whole.dense(), fewer.dense()
        assert torch.equal(whole.isnan(), fewer.isnan()), site
        assert torch.equal(whole.nan_to_num(0.0), fewer.nan_to_num(0.0)), site
    whole, fewer = (getattr(out, "logits", None) for out in outs)
    takes = "logits_to_keep" in signature(type(model).forward).parameters
    if takes and name != "shieldgemma2+classifier":  # its logits are those of two classes
        assert whole.shape[1] > 1
        assert fewer.shape[1] == 1
        torch.testing.assert_close(fewer[:, 0], whole[:, -1])
