from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import AtlasError, DataError, OutputError, UnknownNameError
from neuronlens.exemplars import EXPLAIN_RANKS, HELD_OUT_RANKS
from neuronlens.explanation import Explanation, Failure
from neuronlens.score import ModalityScore, Score
from neuronlens.simulate import MaskSimulator, Simulation, WordSimulator
from neuronlens.study import NeuronRecord, Study, StudyManifest
from neuronlens.tokens import Role


@pytest.fixture(scope="module")
def planted() -> testbed.Testbed:
    return testbed.load(planted=True)


@pytest.fixture(scope="module")
def vlm(planted) -> nl.ModelAdapter:
    return nl.adapt(planted.model, planted.processor)


@pytest.fixture(scope="module")
def atlas(vlm, tmp_path_factory) -> nl.Atlas:
    folder = tmp_path_factory.mktemp("study")
    samples = nl.read_samples(testbed.write(folder / "scenes", 50, seed=3))
    return nl.scan(vlm, samples, out=folder / "atlas", sites="language.0", n=20, batch_size=10)


@pytest.fixture(scope="module")
def kinds(atlas) -> nl.Classification:
    return nl.NeuronClassifier(**testbed.READINGS).classify(atlas)


@pytest.fixture(scope="module")
def neurons(planted, kinds) -> list[nl.NeuronId]:
    """Twelve planted neurons, and one of the model's own of each category there is."""
    known = [each.neuron for each in planted.planted if each.kind != "silent"]
    own = [kinds.select(category, n=3)[:1] for category in ("visual", "text", "unknown")]
    return list(dict.fromkeys([*known, *(neuron for some in own for neuron in some)]))


@pytest.fixture(scope="module")
def study(vlm, atlas, kinds, neurons) -> Study:
    return nl.explain_neurons(vlm, atlas, neurons, kinds=kinds)


class Named:
    """Says what each neuron is called, and keeps its jobs."""

    def __init__(self, failing=(), **more) -> None:
        self.failing = failing
        self.more = {"phrases": ("red",), "words": ("red",)} | more
        self.jobs = []

    def explain(self, jobs):
        self.jobs += jobs
        return [
            Failure("told to fail")
            if job.neuron in self.failing
            else Explanation(sentence=str(job.neuron), **self.more)
            for job in jobs
        ]


class Noting:
    """Passes jobs on to another simulator and keeps them."""

    def __init__(self, simulator, failing: str = "") -> None:
        self.simulator = simulator
        self.failing = failing
        self.jobs = []

    def simulate(self, jobs):
        self.jobs += jobs
        answers = self.simulator.simulate(jobs)
        return [
            Failure("told to fail") if job.sample.id == self.failing else answer
            for job, answer in zip(jobs, answers, strict=True)
        ]


def noted(failing: str = "") -> dict[str, Noting]:
    return {
        "visual_simulator": Noting(MaskSimulator(nl.AnnotationSegmenter()), failing),
        "text_simulator": Noting(WordSimulator(), failing),
    }


def held_out(study: Study, record: NeuronRecord):
    return [each for each in study.exemplars(record.id) if each.use == "held_out"]


def ids(study: Study, record: NeuronRecord) -> list[str]:
    """The held-out samples of a neuron."""
    return [
        study.samples[each.position, record.stream].sample.id for each in held_out(study, record)
    ]


# What is recorded.


def test_most_planted_neurons_are_explained_by_what_they_do(planted, study):
    right = 0
    known = [each for each in planted.planted if each.kind != "silent"]
    for each in known:
        said = study[each.neuron].explanation
        named = {*said.phrases, *said.words} == {*each.concepts}
        right += named and study[each.neuron].category == each.kind
    # From 50 scenes only; tests/test_acceptance.py asks for all of them.
    assert right >= 8


def test_a_record_is_of_its_neuron(study, atlas, kinds, neurons):
    assert list(study) == neurons
    for neuron, record in study.items():
        assert record.id == neuron
        assert record.category == kinds.of(neuron)
        assert record.probability == kinds.probability(neuron)
        assert record.maximum == atlas.maximum(neuron)
        top = atlas.neuron(neuron).positions.tolist()
        for use, ranks in (("explain", EXPLAIN_RANKS), ("held_out", HELD_OUT_RANKS)):
            mine = [each for each in study.exemplars(record.id) if each.use == use]
            assert [each.rank for each in mine] == list(ranks)
            assert [each.position for each in mine] == [top[rank - 1] for rank in ranks]
        assert not any(
            each.simulated for each in study.exemplars(record.id) if each.use == "explain"
        )
        assert (record.explanation is None) == (record.failure is not None)


def test_recorded_activations_are_those_of_the_exemplars(study, vlm, atlas, neurons):
    found = nl.exemplars(vlm, atlas, neurons)
    for neuron, record in study.items():
        for kept, each in zip(
            study.exemplars(record.id),
            (*found[neuron].explain, *found[neuron].held_out),
            strict=True,
        ):
            np.testing.assert_allclose(kept.true, each.activation, rtol=1e-4, atol=1e-6)
            tokens = study.samples[kept.position, record.stream]
            assert tokens.role == each.tokens.role.tolist()
            assert tokens.pieces == list(each.tokens.pieces)
            assert tokens.sample.id == each.sample.id


def modality(study, record, role) -> ModalityScore | None:
    """The score from what the record holds, with numpy."""
    pairs = []
    for each in held_out(study, record):
        at = np.array(study.samples[each.position, record.stream].role) == role
        said = np.array([np.nan if v is None else v for v in each.simulated], float)
        pairs.append((np.array(each.true)[at & ~np.isnan(said)], said[at & ~np.isnan(said)]))
    true, said = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if not len(said):
        return None
    each = []
    for x, y in pairs:
        if np.ptp(x) > 0:
            each.append(np.corrcoef(x, y)[0, 1] if np.ptp(y) > 0 else 0.0)
    r = np.corrcoef(true, said)[0, 1] if np.ptp(said) > 0 else None
    return ModalityScore(
        r=r,
        undefined=None if r is not None else "constant prediction",
        mean_per_sample=np.mean(each) if each else None,
        tokens=len(said),
    )


def test_scores_follow_from_the_recorded_true_and_simulated_activations(study):
    scored = 0
    for record in study.values():
        if record.score is None:
            continue
        visual, text = (modality(study, record, role) for role in (Role.VISUAL, Role.RESPONSE))
        counts = {"visual": (visual, None), "text": (None, text)}
        sides = counts.get(record.category, (visual, text))
        for found, expected in zip((record.score.visual, record.score.text), sides, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                assert found.tokens == expected.tokens
                assert found.undefined == expected.undefined
                assert found.r == pytest.approx(expected.r, abs=1e-3)
                assert found.mean_per_sample == pytest.approx(expected.mean_per_sample, abs=1e-3)
        values = [0.0 if side.r is None else side.r for side in sides if side is not None]
        assert record.score.value == pytest.approx(np.mean(values), abs=1e-3)
        scored += 1
    assert scored >= 12


def test_only_held_out_tokens_of_the_modality_are_simulated(study):
    for record in study.values():
        for each in held_out(study, record) if record.score else []:
            roles = study.samples[each.position, record.stream].role
            simulated = {r for r, v in zip(roles, each.simulated, strict=True) if v is not None}
            wanted = {"visual": {Role.VISUAL}, "text": {Role.RESPONSE}}
            both = {Role.VISUAL, Role.RESPONSE}
            assert simulated == wanted.get(record.category, both)


def test_the_same_study_twice_is_the_same(vlm, atlas, kinds, neurons, study):
    again = nl.explain_neurons(vlm, atlas, neurons, kinds=kinds)
    assert again.manifest == study.manifest
    assert again.records == study.records


# Who gets to see what.


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_an_explainer_sees_no_held_out_sample(vlm, atlas, kinds, neurons, sampling):
    explainer = Named()
    study = nl.explain_neurons(
        vlm, atlas, neurons, kinds=kinds, explainer=explainer, sampling=sampling
    )
    assert [job.neuron for job in explainer.jobs] == neurons
    for job in explainer.jobs:
        record = study[job.neuron]
        assert job.category == kinds.of(job.neuron)
        assert len(job.exemplars) == 5
        hidden = {each.position for each in held_out(study, record)}
        assert not hidden & {each.position for each in job.exemplars}
        ranks = [each.rank for each in job.exemplars]
        assert ranks == ([None] * 5 if sampling == "random" else list(EXPLAIN_RANKS))
    assert study.manifest.sampling == sampling


def test_only_the_modalities_of_the_category_are_simulated(vlm, atlas, kinds, neurons):
    simulators = noted()
    nl.explain_neurons(
        vlm, atlas, neurons, kinds=kinds, explainer=Named(), null_draws=0, **simulators
    )
    for modality, other in (("visual", "text"), ("text", "visual")):
        jobs = simulators[f"{modality}_simulator"].jobs
        expected = [n for n in neurons if kinds.of(n) != other for _ in range(5)]
        assert [job.explanation.sentence for job in jobs] == [str(n) for n in expected]


# The null.


@pytest.mark.parametrize("draws", [1, 3])
def test_a_null_is_of_other_neurons_of_the_same_category(vlm, atlas, kinds, neurons, draws):
    simulators = noted()
    study = nl.explain_neurons(
        vlm, atlas, neurons, kinds=kinds, explainer=Named(), null_draws=draws, **simulators
    )
    tested = {tuple(ids(study, record)): neuron for neuron, record in study.items()}
    assert len(tested) == len(neurons)
    drawn = defaultdict(list)
    for simulator in simulators.values():
        trials = [simulator.jobs[i : i + 5] for i in range(0, len(simulator.jobs), 5)]
        for trial in trials:
            (said,) = {job.explanation.sentence for job in trial}
            neuron = tested[tuple(job.sample.id for job in trial)]
            if said != str(neuron):
                drawn[neuron].append(nl.NeuronId.parse(said))
    for neuron in neurons:
        peers = {n for n in neurons if n != neuron and kinds.of(n) == kinds.of(neuron)}
        assert set(drawn[neuron]) <= peers
        assert len(set(drawn[neuron])) == min(draws, len(peers))


def test_null_scores_are_those_of_the_other_explanations_on_the_same_samples(
    vlm, atlas, kinds, neurons, study
):
    group = [n for n in neurons if kinds.of(n) == "text" and study[n].explanation]
    assert 3 <= len(group) <= 6
    found = nl.exemplars(vlm, atlas, group)
    for neuron in group:
        expected = []
        for other in group:
            if other != neuron:
                said = study[other].explanation
                true, predicted = [], []
                for each in found[neuron].held_out:
                    words = each.tokens.words(said.words, -1 if said.predicts else 0).numpy()
                    true.append(each.activation[each.text])
                    predicted.append(words[each.text])
                true, predicted = np.concatenate(true), np.concatenate(predicted)
                constant = np.ptp(predicted) == 0
                expected.append(0.0 if constant else np.corrcoef(true, predicted)[0, 1])
        assert sorted(study[neuron].null) == pytest.approx(sorted(expected), abs=1e-5)
        assert study[neuron].null_mean == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_neuron_alone_in_its_category_has_no_null(vlm, atlas, kinds, neurons):
    alone = [next(n for n in neurons if kinds.of(n) == c) for c in ("visual", "text")]
    study = nl.explain_neurons(vlm, atlas, alone, kinds=kinds, explainer=Named())
    for record in study.values():
        assert (record.null, record.null_mean) == ([], None)
    assert study.null() == {}
    assert nl.explain_neurons(vlm, atlas, alone, kinds=kinds, null_draws=0).null() == {}


def test_nulls_follow_their_seed(vlm, atlas, kinds, neurons):
    group = [n for n in neurons if kinds.of(n) == "text"]
    one, same, other = (
        nl.explain_neurons(vlm, atlas, group, kinds=kinds, null_draws=1, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [record.null for record in one.values()] == [record.null for record in same.values()]
    assert [record.null for record in one.values()] != [record.null for record in other.values()]


# Failures.


def test_what_could_not_be_simulated_fails_its_neuron_only_and_says_why(
    vlm, atlas, kinds, neurons, study
):
    bad = ids(study, study[next(n for n in neurons if kinds.of(n) == "text")])[2]
    partly = nl.explain_neurons(
        vlm, atlas, neurons, kinds=kinds, text_simulator=noted(bad)["text_simulator"]
    )
    failed = 0
    for neuron, record in partly.items():
        if bad in ids(study, study[neuron]) and record.category != "visual":
            assert record.score is None
            assert "text simulation: told to fail" in record.failure
            assert record.explanation == study[neuron].explanation
            assert not any(each.simulated for each in partly.exemplars(record.id))
            failed += 1
        else:
            assert record.score == study[neuron].score
            assert record.failure is None
    assert 1 <= failed < len(neurons)
    assert sum(partly.failures().values()) == failed


def test_what_could_not_be_explained_is_not_simulated_and_says_why(vlm, atlas, kinds, neurons):
    simulators, lost = noted(), neurons[1]
    study = nl.explain_neurons(
        vlm, atlas, neurons, kinds=kinds, explainer=Named(failing=[lost]), **simulators
    )
    record = study[lost]
    assert (record.explanation, record.score, record.null) == (None, None, [])
    assert record.failure == "told to fail"
    assert len(study.exemplars(record.id)) == 10
    said = {job.explanation.sentence for each in simulators.values() for job in each.jobs}
    assert said == {str(neuron) for neuron in neurons if neuron != lost}
    assert all(each.failure is None for n, each in study.items() if n != lost)


def test_an_explanation_without_a_phrase_fails_by_name(vlm, atlas, kinds, neurons):
    study = nl.explain_neurons(vlm, atlas, neurons, kinds=kinds, explainer=Named(phrases=()))
    for record in study.values():
        if record.category == "text":
            assert record.failure is None
        else:
            assert "visual simulation: the explanation has no phrase" in record.failure
            assert record.score is None


def test_a_neuron_of_a_stream_without_text_is_scored_on_what_it_has(bed, scenes, tmp_path):
    vlm = nl.adapt(bed.model, bed.processor)
    atlas = nl.scan(vlm, scenes, out=tmp_path / "atlas", sites=["vision.2", "language.3"], n=20)
    kinds = nl.NeuronClassifier(**testbed.READINGS).classify(atlas)
    neurons = [
        *kinds.select("unknown", module="vision", n=1),
        *kinds.select("visual", module="vision", n=1),
        *kinds.select("text", n=1),
    ]
    assert len(neurons) == 3
    study = nl.explain_neurons(vlm, atlas, neurons, kinds=kinds, samples=scenes, explainer=Named())
    for neuron, record in study.items():
        assert record.failure is None
        assert record.score is not None
        tokens = study.samples[study.exemplars(record.id)[0].position, record.stream]
        if neuron.site == "vision.2":
            assert (record.stream, len(tokens.role), tokens.pieces) == ("vision", 65, None)
            assert tokens.box[0] is None  # CLS sees no single region
            assert record.score.value == record.score.visual.counted
    shown = study._repr_html_()
    assert all(str(neuron) in shown for neuron in neurons)


@pytest.mark.parametrize("change", ["one too few", "one too many"])
@pytest.mark.parametrize("who", ["explainer", "simulator"])
def test_replies_that_are_not_one_per_job_are_refused(vlm, atlas, kinds, neurons, who, change):
    def wrong(replies):
        return replies[:-1] if change == "one too few" else [*replies, replies[-1]]

    class Explainer(Named):
        def explain(self, jobs):
            return wrong(super().explain(jobs))

    class Words:
        def simulate(self, jobs):
            return wrong(WordSimulator().simulate(jobs))

    plug = {"explainer": Explainer()} if who == "explainer" else {"text_simulator": Words()}
    with pytest.raises(ValueError, match=r"\d"):
        nl.explain_neurons(vlm, atlas, neurons, kinds=kinds, **plug)


def test_a_constant_prediction_counts_as_nothing_found(vlm, atlas, kinds, neurons):
    class Flat:
        def simulate(self, jobs):
            return [Simulation(np.zeros(len(job.tokens))) for job in jobs]

    text = [n for n in neurons if kinds.of(n) == "text"]
    study = nl.explain_neurons(
        vlm, atlas, text, kinds=kinds, explainer=Named(), text_simulator=Flat()
    )
    for record in study.values():
        assert record.score.text.undefined == "constant prediction"
        assert record.score.value == 0
    assert study.summary()["text"].constant_predictions == len(text)
    assert study.summary()["text"].mean == 0


# Folders.


def test_a_study_is_opened_as_it_was_saved(study, tmp_path):
    study.save(tmp_path / "study")
    opened = Study.open(tmp_path / "study")
    assert opened.manifest == study.manifest
    assert opened.records == study.records
    assert opened.samples == study.samples
    assert list(opened) == list(study)


def test_a_study_is_written_where_it_was_asked_for(vlm, atlas, kinds, neurons, tmp_path):
    study = nl.explain_neurons(vlm, atlas, neurons[:2], kinds=kinds, out=tmp_path / "study")
    assert Study.open(tmp_path / "study").records == study.records


def test_an_output_that_holds_something_is_refused_before_anything_is_asked(
    vlm, atlas, kinds, neurons, tmp_path
):
    (tmp_path / "mine").write_text("mine")
    explainer = Named()
    with pytest.raises(OutputError, match="would be overwritten"):
        nl.explain_neurons(vlm, atlas, neurons[:2], kinds=kinds, explainer=explainer, out=tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    assert explainer.jobs == []  # a paid explainer must not work for nothing


@pytest.mark.parametrize("name", ["manifest.json", "records.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("how", ["missing", "cut short", "not text"])
def test_a_study_that_is_not_whole_is_refused(study, tmp_path, name, how):
    study.save(tmp_path / "study")
    path = tmp_path / "study" / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if how == "cut short" else b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no whole study"):
        Study.open(tmp_path / "study")


# What a study answers.


def made(neuron, category="visual", score=None, null=(), **more) -> NeuronRecord:
    return NeuronRecord(
        neuron=neuron,
        stream="language",
        category=category,
        probability={"visual": 1.0, "text": 0.0, "multimodal": 0.0, "unknown": 0.0},
        maximum=1.0,
        explanation=more.pop("explanation", Explanation(sentence="it")),
        score=score,
        null=list(null),
        failure=more.pop("failure", None),
    )


def side(r=None, undefined=None) -> ModalityScore:
    return ModalityScore(r=r, undefined=undefined, mean_per_sample=r, tokens=3)


MANIFEST = StudyManifest(
    model="m",
    model_name="m",
    readings={},
    explainer="E",
    sampling="top",
    null_draws=1,
    seed=0,
    simulators={},
    explain=(1,),
    held_out=(3,),
)


@pytest.fixture
def small() -> Study:
    records = [
        made("language.0/0", score=Score(visual=side(0.8)), null=[0.1, 0.3]),
        made("language.0/1", score=Score(visual=side(undefined="constant prediction")), null=[0.0]),
        made("language.0/2", score=Score(visual=side(undefined="constant truth"))),
        made("language.0/3", failure="no words", explanation=None),
        made("language.0/4", "text", Score(text=side(0.5)), null=[-0.1]),
        made("language.0/5", "multimodal", Score(visual=side(0.9), text=side(0.4))),
        made("language.0/6", "multimodal", Score(visual=side(0.6), text=side(0.5))),
    ]
    return Study(MANIFEST, records)


def test_means_by_hand(small):
    summary = small.summary()
    assert summary["visual"].mean == pytest.approx(0.4)
    assert (summary["visual"].neurons, summary["visual"].undefined) == (2, 1)
    assert summary["visual"].constant_predictions == 1
    assert summary["text"].mean == pytest.approx(0.5)
    assert summary["multimodal"].mean == pytest.approx((0.65 + 0.55) / 2)
    assert "unknown" not in summary
    assert small.null() == {"visual": pytest.approx(0.1), "text": pytest.approx(-0.1)}
    assert small.failures() == {"no words": 1}


def test_agreeing_neurons_agree_on_every_modality_that_counts(small):
    assert [n.index for n in small.agreeing(0.5)] == [0, 4, 6]
    assert [n.index for n in small.agreeing(0.4)] == [0, 4, 5, 6]
    assert small.agreeing(0.95) == []


def test_the_table_has_a_score_beside_its_null(small, study):
    table = small.table()
    assert table["neuron"].tolist() == [f"language.0/{i}" for i in range(7)]
    assert table["score"].tolist()[:2] == [0.8, 0.0]
    assert math.isnan(table["score"][3])
    assert table["null"][0] == pytest.approx(0.2)
    assert table["failure"][3] == "no words"
    assert len(study.table()) == len(study)


def test_a_neuron_that_was_not_studied_is_refused_with_those_that_were(small):
    with pytest.raises(UnknownNameError, match=r"No neuron in this study 'language.0/9'.*0/6"):
        small[nl.NeuronId("language.0", 9)]


def test_a_classification_of_another_model_is_refused(vlm, atlas, neurons, kinds, untrained_vlm):
    with pytest.raises(AtlasError, match="Classify this atlas"):
        nl.explain_neurons(vlm, atlas, neurons, kinds=replace(kinds, model="other"))
    with pytest.raises(AtlasError, match="other weights"):
        nl.explain_neurons(untrained_vlm, atlas, neurons, kinds=kinds)


HOSTILE = "<script>alert(1)</script>"


def test_hostile_explanations_and_failures_are_escaped_in_html(vlm, atlas, kinds, neurons):
    class Hostile(Named):
        def explain(self, jobs):
            return [
                Failure(HOSTILE) if i == 0 else Explanation(sentence=HOSTILE, phrases=(HOSTILE,))
                for i, _ in enumerate(jobs)
            ]

    study = nl.explain_neurons(vlm, atlas, neurons, kinds=kinds, explainer=Hostile())
    shown = [study._repr_html_(), *(record._repr_html_() for record in study.values())]
    for page in shown:
        assert "<script>" not in page
        assert "&lt;script&gt;" in page


def test_a_study_shows_its_scores_beside_their_null(small):
    shown = small._repr_html_()
    assert shown.index("language.0/0") < shown.index("language.0/4") < shown.index("language.0/3")
    for said in ("0.800", "0.200", "1 constant predictions as 0", "1 undefined", "no words"):
        assert said in shown
