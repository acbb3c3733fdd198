"""Segmenters of the real architectures, tiny and random, beside slow calls of their own parts."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import neuronlens as nl
import tiny_segmenters as tiny
from neuronlens import testbed
from neuronlens.errors import (
    MissingExtraError,
    MissingSegmenterError,
    SampleError,
    SegmenterError,
)
from neuronlens.explanation import Explanation, Failure
from neuronlens.segment import (
    GroundedSegmenter,
    GroundingDino,
    Sam2,
    Sam2Package,
    Sam3Segmenter,
    clean,
)
from neuronlens.simulate import MaskSimulator, SimulationJob

WIDE = tiny.picture(140, 90)
TALL = tiny.picture(60, 101, seed=1)
PHRASES = ("a cat", "red dog", "blue", "the big zebra")
"""Between the best scores of the phrases on the wide image: two are not found."""
BOXES = (
    np.array([[10, 10, 60, 50], [0, 0, 139, 89]], np.float32),
    np.array([[20.5, 30.25, 50, 80]], np.float32),
)
NO_BOX = np.zeros((0, 4), np.float32)


@pytest.fixture(scope="module")
def dino():
    return tiny.grounding_dino()


@pytest.fixture(scope="module")
def sam2():
    return tiny.sam2()


@pytest.fixture(scope="module")
def predictor():
    return tiny.sam2_predictor()


@pytest.fixture(scope="module")
def sam3():
    return tiny.sam3()


@pytest.fixture(params=["transformers", "package"])
def masker(request, sam2, predictor):
    return Sam2(*sam2) if request.param == "transformers" else Sam2Package(predictor)


@pytest.fixture
def encoder(masker):
    """What encodes images within the masker."""
    if isinstance(masker, Sam2):
        return masker.model.vision_encoder
    return masker.predictor.model.image_encoder.trunk


@pytest.fixture(scope="module")
def some(dino) -> float:
    """A threshold that some of the phrases pass."""
    return tiny.telling(dino, WIDE, PHRASES)


def boxes_of(dino, image, phrase, threshold):
    """The processor's own way for one phrase."""
    model, processor = dino
    inputs = processor(images=image, text=[[phrase]], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        answer = model(**inputs)
    found = processor.post_process_grounded_object_detection(
        answer, inputs.input_ids, threshold=threshold, target_sizes=[(image.height, image.width)]
    )[0]
    return found["boxes"].float().numpy()


def mask_of(masker, image, box):
    """The back end's own way for one box, from pixels to mask."""
    if isinstance(masker, Sam2Package):
        masker.predictor.set_image(np.array(image))
        return masker.predictor.predict(box=box, multimask_output=False)[0][0] > 0
    inputs = masker.processor(images=image, input_boxes=[[box.tolist()]], return_tensors="pt")
    with torch.no_grad():
        answer = masker.model(
            pixel_values=inputs.pixel_values,
            input_boxes=inputs.input_boxes,
            multimask_output=False,
        )
    return masker.processor.post_process_masks(answer.pred_masks, inputs.original_sizes)[0][0, 0]


def agree(one, other):
    """Share of pixels in which two masks agree, which rounding may take a few of."""
    return float((np.asarray(one) == np.asarray(other)).mean())


def test_the_models_are_tiny(dino, sam2, predictor, sam3):
    for model in (dino[0], sam2[0], predictor.model, sam3[0]):
        assert sum(each.numel() for each in model.parameters()) < 10_000_000


# Phrases.


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("A Cat.", "a cat"),
        ("  red \n dog ", "red dog"),
        ("what? a st. bernard", "what a st bernard"),
        ("...", ""),
        ("", ""),
        ("Straße, blau", "straße, blau"),
    ],
)
def test_a_phrase_is_asked_for_in_lower_case_without_what_would_split_it(given, asked):
    assert clean(given) == asked


# Boxes.


@pytest.mark.parametrize("image", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_boxes_are_those_of_the_processor_whatever_the_batch(dino, image, batch_size):
    detector = GroundingDino(*dino, threshold=0.7, batch_size=batch_size)
    found = detector.boxes(image, PHRASES)
    assert sum(map(len, found)) > 10
    for phrase, boxes in zip(PHRASES, found, strict=True):
        assert boxes.shape == (len(boxes), 4)
        np.testing.assert_allclose(boxes, boxes_of(dino, image, phrase, 0.7), atol=1e-2)


def test_boxes_are_in_pixels_of_the_image(dino):
    found = np.concatenate(GroundingDino(*dino, threshold=0.0).boxes(WIDE, PHRASES))
    model, processor = dino
    inputs = processor(images=WIDE, text=[[p] for p in PHRASES][:1], return_tensors="pt")
    x, y, width, height = model(**inputs).pred_boxes[0].detach().numpy().T
    np.testing.assert_allclose(found[:12, 0], (x - width / 2) * 140, atol=1e-2)
    np.testing.assert_allclose(found[:12, 3], (y + height / 2) * 90, atol=1e-2)


def test_each_phrase_is_one_query_and_queries_share_batches(dino):
    model, processor = dino
    asked = []
    tokenize = type(processor.tokenizer).__call__
    with pytest.MonkeyPatch.context() as patch, tiny.forwards(model.model.text_backbone) as sizes:
        patch.setattr(
            type(processor.tokenizer),
            "__call__",
            lambda self, text, **more: asked.append(text) or tokenize(self, text, **more),
        )
        GroundingDino(*dino, batch_size=3).boxes(WIDE, PHRASES)
    assert sizes == [3, 1]
    batches = [text for text in asked if isinstance(text, list)]
    assert batches == [["a cat.", "red dog.", "blue."], ["the big zebra."]]


def test_a_phrase_too_long_for_the_detector_loses_its_end(dino):
    # 24 tokens: begin, end, full stop, and 21 letters.
    fits, long = "abc de fghijklmnop qrstu", "abc de fghijklmnop qrstu vwx"
    detector = GroundingDino(*dino, threshold=0.0)
    first, second, third = detector.boxes(WIDE, [fits, long, "abc de"])
    np.testing.assert_allclose(first, second, atol=1e-2)
    assert not np.allclose(first, third, atol=1e-1)
    assert len(detector.boxes(WIDE, ["a" * 90])[0]) == 12


def test_the_more_a_score_must_exceed_the_fewer_boxes_are_left(dino):
    rising = tiny.scores(dino, WIDE, PHRASES[0])[::-1]
    thresholds = [(rising[i] + rising[i + 1]) / 2 for i in (2, 6, 10)]
    found = [
        {
            tuple(np.round(box, 1))
            for box in GroundingDino(*dino, threshold=t).boxes(WIDE, PHRASES)[0]
        }
        for t in (0.0, *thresholds, 1.0)
    ]
    assert [len(each) for each in found] == sorted((len(each) for each in found), reverse=True)
    assert all(more > fewer for more, fewer in pairwise(found))
    assert found[-1] == set()


def test_a_model_in_half_precision_is_given_half_precision():
    model, processor = tiny.grounding_dino()
    half = (model.bfloat16(), processor)
    (found,) = GroundingDino(*half, threshold=0.7).boxes(WIDE, PHRASES[:1])
    assert found.dtype == np.float32
    expected = boxes_of(half, WIDE, PHRASES[0], 0.7)
    assert len(expected) > 2
    np.testing.assert_allclose(found, expected, atol=1)  # the processor rounds pixels to bfloat16


# Masks of boxes.


@pytest.mark.parametrize("image", [WIDE, TALL], ids=["wide", "tall"])
def test_masks_are_those_the_back_end_gives_for_one_box_after_the_other(masker, image):
    boxes = [np.clip(each, 0, min(image.size) - 1) for each in BOXES]
    masks = masker.masks(image, [boxes[0], NO_BOX, boxes[1]])
    assert masks.shape == (3, image.height, image.width)
    assert masks.dtype == bool
    single = [mask_of(masker, image, box) for box in np.concatenate(boxes)]
    assert agree(masks[0], np.asarray(single[0]) | np.asarray(single[1])) > 0.999
    assert not masks[1].any()
    assert agree(masks[2], single[2]) > 0.999
    assert 0.01 < masks[2].mean() < 0.99


@pytest.mark.parametrize("batch_size", [1, 2])
def test_masks_do_not_depend_on_the_batching_of_boxes(masker, batch_size):
    whole = masker.masks(WIDE, BOXES)
    masker.batch_size = batch_size
    for one, other in zip(masker.masks(WIDE, BOXES), whole, strict=True):
        assert agree(one, other) > 0.999


def test_an_image_is_encoded_once_for_all_boxes_and_not_at_all_for_none(masker, encoder):
    with tiny.forwards(encoder) as encoded:
        assert not masker.masks(WIDE, [NO_BOX, NO_BOX]).any()
        assert masker.masks(WIDE, []).shape == (0, 90, 140)
        assert encoded == []
        masker.batch_size = 1
        masker.masks(WIDE, BOXES)
        assert encoded == [1]


def test_the_package_forgets_the_image(predictor):
    Sam2Package(predictor).masks(WIDE, BOXES)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=BOXES[1])


def test_sam2_in_half_precision_gives_nearly_the_same():
    model, processor = tiny.sam2()
    whole = Sam2(model, processor).masks(WIDE, BOXES)
    half = Sam2(model.bfloat16(), processor).masks(WIDE, BOXES)
    assert agree(whole, half) > 0.9


# Both together.


def test_a_phrase_has_the_union_of_the_masks_of_its_boxes(dino, masker, some):
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=some), masker)
    masks = segmenter.segment(tiny.sample(WIDE), 0, PHRASES)
    assert masks.shape == (4, 90, 140)
    found = [tiny.scores(dino, WIDE, phrase)[0] > some for phrase in PHRASES]
    assert [bool(mask.any()) for mask in masks] == found
    assert 0 < sum(found) < 4
    for phrase, mask in zip(PHRASES, masks, strict=True):
        union = np.zeros((90, 140), bool)
        for box in boxes_of(dino, WIDE, phrase, some):
            union |= np.asarray(mask_of(masker, WIDE, box))
        assert agree(mask, union) > 0.999


def test_phrases_are_found_alone_as_together_in_any_spelling_and_twice(dino, masker, some):
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=some), masker)
    whole = segmenter.segment(tiny.sample(WIDE), 0, PHRASES)
    for phrase, mask in zip(PHRASES, whole, strict=True):
        (alone,) = segmenter.segment(tiny.sample(WIDE), 0, [phrase])
        assert agree(alone, mask) > 0.999
    again = segmenter.segment(tiny.sample(WIDE), 0, ["Blue. ", "", "blue", "RED Dog", "?"])
    for mask, other in zip(again, [whole[2], None, whole[2], whole[1], None], strict=True):
        assert agree(mask, np.zeros_like(mask) if other is None else other) > 0.999


def test_without_any_box_the_masker_is_not_run(dino, masker, encoder):
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=1.0), masker)
    with tiny.forwards(encoder) as encoded:
        masks = segmenter.segment(tiny.sample(TALL), 0, PHRASES)
    assert encoded == []
    assert masks.shape == (4, 101, 60)
    assert not masks.any()


def test_without_a_phrase_no_model_is_run(dino, masker):
    segmenter = GroundedSegmenter(GroundingDino(*dino), masker)
    with tiny.forwards(dino[0]) as detected:
        assert segmenter.segment(tiny.sample(WIDE), 0, []).shape == (0, 90, 140)
        assert not segmenter.segment(tiny.sample(WIDE), 0, [" . "]).any()
    assert detected == []


def test_raising_the_threshold_never_adds_to_a_mask(dino, masker, some):
    masks = [
        GroundedSegmenter(GroundingDino(*dino, threshold=t), masker).segment(
            tiny.sample(WIDE), 0, PHRASES
        )
        for t in (0.5, some, (some + 1) / 2, 0.99)
    ]
    for more, fewer in pairwise(masks):
        # Rounding within another batch of boxes may move single pixels.
        assert (fewer & ~more).mean() < 1e-3
    assert masks[0].sum() > masks[-1].sum()


def test_images_of_one_sample_have_their_own_sizes_and_masks(dino, sam2):
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=0.7), Sam2(*sam2))
    both = tiny.sample(WIDE, TALL)
    first, second = (segmenter.segment(both, image, PHRASES) for image in (0, 1))
    assert first.shape == (4, 90, 140)
    assert second.shape == (4, 101, 60)
    assert agree(second, segmenter.segment(tiny.sample(TALL), 0, PHRASES)) == 1
    with pytest.raises(SampleError, match="image 2 was asked for; it has 2"):
        segmenter.segment(both, 2, PHRASES)


def test_an_image_lying_on_its_side_is_turned_first(dino, sam2, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    TALL.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "on_side.png", exif=exif)
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=0.7), Sam2(*sam2))
    masks = segmenter.segment(nl.Sample("s", (tmp_path / "on_side.png",), "p"), 0, PHRASES)
    assert agree(masks, segmenter.segment(tiny.sample(TALL), 0, PHRASES)) == 1


def test_threads_that_share_a_segmenter_get_what_one_gets(dino, masker):
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=0.7), masker)
    samples = [tiny.sample(tiny.picture(40 + i, 30, seed=i)) for i in range(4)]
    alone = [segmenter.segment(each, 0, PHRASES) for each in samples]
    found: dict[int, np.ndarray] = {}

    def work(i):
        found[i] = segmenter.segment(samples[i], 0, PHRASES)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(agree(found[i], alone[i]) == 1 for i in range(4))


# SAM 3.


def concept(sam3, image, phrase, threshold, mask_threshold=0.5):
    """The processor's own way for one phrase, from pixels to mask."""
    model, processor = sam3
    with torch.no_grad():
        answer = model(**processor(images=image, text=phrase, return_tensors="pt"))
    found = processor.post_process_instance_segmentation(
        answer, threshold, mask_threshold, target_sizes=[(image.height, image.width)]
    )[0]
    return found["masks"].numpy().astype(bool)


@pytest.mark.parametrize("image", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize(("threshold", "mask_threshold"), [(0.1, 0.5), (0.3, 0.5), (0.3, 0.52)])
def test_sam3_masks_are_the_union_of_the_processors(sam3, image, threshold, mask_threshold):
    segmenter = Sam3Segmenter(
        *sam3, threshold=threshold, mask_threshold=mask_threshold, batch_size=2
    )
    masks = segmenter.segment(tiny.sample(image), 0, PHRASES)
    assert masks.shape == (4, image.height, image.width)
    for phrase, mask in zip(PHRASES, masks, strict=True):
        instances = concept(sam3, image, phrase, threshold, mask_threshold)
        assert len(instances) >= 1
        assert agree(mask, instances.any(0)) > 0.999


def test_sam3_finds_some_phrases_and_not_others(sam3):
    best = [len(concept(sam3, WIDE, phrase, 0.57)) for phrase in PHRASES]
    assert 0 in best
    assert any(best)
    masks = Sam3Segmenter(*sam3, threshold=0.57).segment(tiny.sample(WIDE), 0, PHRASES)
    assert [bool(mask.any()) for mask in masks] == [n > 0 for n in best]


def test_sam3_encodes_an_image_once_for_all_phrases(sam3):
    segmenter = Sam3Segmenter(*sam3, threshold=1.0)
    with tiny.forwards(sam3[0].vision_encoder) as encoded, tiny.forwards(sam3[0]) as ran:
        masks = segmenter.segment(tiny.sample(WIDE), 0, [*PHRASES, "Blue.", ""])
        assert (len(encoded), len(ran)) == (1, 4)
        segmenter.segment(tiny.sample(WIDE), 0, [""])
        assert len(encoded) == 1
    assert masks.shape == (6, 90, 140)
    assert not masks.any()


def test_a_phrase_too_long_for_sam3_loses_its_end(sam3):
    fits = "a very long phrase of letters."[:-1]
    assert len(sam3[1].tokenizer(fits).input_ids) <= 32
    segmenter = Sam3Segmenter(*sam3, threshold=0.0, mask_threshold=0.5)
    exact = "abcdefghijklmnopqrstuvwxyzabcd"  # 30 bytes, begin and end
    first, second, third = segmenter.segment(
        tiny.sample(WIDE), 0, [exact, exact + "efgh", exact[:20]]
    )
    assert agree(first, second) == 1
    assert agree(first, third) < 1


# What a segmenter says of itself.


def test_a_name_changes_with_whatever_changes_the_masks(dino, sam2, predictor, sam3):
    model, processor = dino
    images, text = processor.image_processor, processor.tokenizer
    larger = type(images)(size={"shortest_edge": 96, "longest_edge": 160})
    names = [
        GroundingDino(model, processor).name,
        GroundingDino(model, processor, threshold=0.31).name,
        GroundingDino(model, type(processor)(image_processor=larger, tokenizer=text)).name,
        GroundingDino(*tiny.grounding_dino(seed=1)).name,
        GroundingDino(tiny.grounding_dino()[0].bfloat16(), processor).name,
        Sam2(*sam2).name,
        Sam2(*tiny.sam2(seed=1)).name,
        Sam2Package(predictor).name,
        Sam2Package(tiny.sam2_predictor(seed=1)).name,
        Sam3Segmenter(*sam3).name,
        Sam3Segmenter(*sam3, threshold=0.31).name,
        Sam3Segmenter(*sam3, mask_threshold=0.51).name,
        Sam3Segmenter(*tiny.sam3(seed=1)).name,
    ]
    assert len(set(names)) == len(names)
    detector, masker = GroundingDino(*dino), Sam2(*sam2)
    whole = GroundedSegmenter(detector, masker).name
    assert detector.name in whole
    assert masker.name in whole


def test_a_name_is_the_same_in_another_place_and_with_other_batches(dino, sam2, sam3):
    assert GroundingDino(*tiny.grounding_dino()).name == GroundingDino(*dino, batch_size=2).name
    assert Sam2(*tiny.sam2()).name == Sam2(*sam2, batch_size=2).name
    assert Sam3Segmenter(*tiny.sam3()).name == Sam3Segmenter(*sam3, batch_size=2).name


# Loading.


def test_checkpoints_load_from_folders_and_find_the_same(dino, sam2, sam3, tmp_path, some):
    for name, parts in {"dino": dino, "sam2": sam2, "sam3": sam3}.items():
        for part in parts:
            part.save_pretrained(tmp_path / name)
    loaded = GroundedSegmenter.load(
        str(tmp_path / "dino"), str(tmp_path / "sam2"), threshold=some, device="cpu"
    )
    own = GroundedSegmenter(GroundingDino(*dino, threshold=some), Sam2(*sam2))
    sample = tiny.sample(WIDE)
    assert agree(loaded.segment(sample, 0, PHRASES), own.segment(sample, 0, PHRASES)) > 0.99
    assert f"{tmp_path.name}/dino" in loaded.name
    assert str(tmp_path) not in loaded.name
    concepts = Sam3Segmenter.load(str(tmp_path / "sam3"), device="cpu", dtype=torch.float32)
    expected = Sam3Segmenter(*sam3).segment(sample, 0, PHRASES)
    assert agree(concepts.segment(sample, 0, PHRASES), expected) > 0.999


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for load in (GroundedSegmenter.load, Sam2.load, Sam3Segmenter.load):
        with pytest.raises(MissingExtraError, match=r"torchvision.*\[segment\]"):
            load()


def test_without_the_package_its_authors_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam2", None)
    monkeypatch.setitem(sys.modules, "sam2.sam2_image_predictor", None)
    with pytest.raises(MissingSegmenterError, match=r"github\.com/facebookresearch/sam2"):
        Sam2Package.load()
    assert issubclass(MissingSegmenterError, ImportError)


# Refusals.


@pytest.mark.parametrize("make", [tiny.grounding_dino, tiny.sam2, tiny.sam3])
def test_a_model_in_training_mode_is_refused_and_left_as_it_is(make):
    model, processor = make()
    model.train()
    segmenter = {tiny.grounding_dino: GroundingDino, tiny.sam2: Sam2, tiny.sam3: Sam3Segmenter}
    with pytest.raises(SegmenterError, match=r"training mode.*model\.eval\(\)"):
        segmenter[make](model, processor)
    assert model.training


def test_a_predictor_in_training_mode_is_refused():
    predictor = tiny.sam2_predictor()
    predictor.model.train()
    with pytest.raises(SegmenterError, match="training mode"):
        Sam2Package(predictor)


def test_numbers_that_make_no_sense_are_refused(dino, sam2, sam3):
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(SegmenterError, match="give 0 to 1"):
            GroundingDino(*dino, threshold=bad)
        with pytest.raises(SegmenterError, match="give 0 to 1"):
            Sam3Segmenter(*sam3, mask_threshold=bad)
    with pytest.raises(SegmenterError, match="at least 1"):
        Sam2(*sam2, batch_size=0)
    with pytest.raises(SegmenterError, match="at least 1"):
        GroundingDino(*dino, batch_size=0)


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (tiny.grounding_dino, lambda *both: GroundingDino(*both).boxes(WIDE, PHRASES)),
        (tiny.sam2, lambda *both: Sam2(*both).masks(WIDE, BOXES)),
        (
            tiny.sam3,
            lambda *both: Sam3Segmenter(*both).segment(tiny.sample(WIDE), 0, PHRASES),
        ),
    ],
)
def test_numbers_that_are_none_are_an_error_not_an_empty_mask(make, use):
    model, processor = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(SegmenterError, match=r"not finite.*torch\.float32"):
        use(model, processor)


# From a scene to simulated tokens.


def test_a_scene_is_simulated_through_detector_and_masker(vlm, dino, sam2, tmp_path):
    scenes = testbed.scenes(2, seed=11)
    lost = replace(scenes[1], id="lost", images=(tmp_path / "gone.png",), annotations=())
    best = [
        min(tiny.scores(dino, s.open_images()[0], p)[0] for s in scenes) for p in ("a cat", "blue")
    ]
    segmenter = GroundedSegmenter(GroundingDino(*dino, threshold=min(best) - 1e-3), Sam2(*sam2))
    explained = [Explanation(sentence="", phrases=p) for p in (("a cat",), ("blue", "red dog"))]
    maps = {each.id: nl.samples.encode(vlm, [each]).tokens["language"].of(0) for each in scenes}
    maps["lost"] = maps[scenes[1].id]
    jobs = [SimulationJob(e, s, maps[s.id]) for e in explained for s in (*scenes, lost)]
    with tiny.forwards(sam2[0].vision_encoder) as encoded:
        answers = MaskSimulator(segmenter, soft=True).simulate(jobs)
    assert len(encoded) == 2
    shares = []
    for job, answer in zip(jobs, answers, strict=True):
        if job.sample is lost:
            assert isinstance(answer, Failure)
            assert "missing image" in answer.reason
            continue
        (image,) = job.sample.open_images()
        union = segmenter.segment(job.sample, 0, job.explanation.phrases).any(0)
        shares.append(union.mean())
        assert union.any()
        assert union.shape == (image.height, image.width)
        expected = []
        for role, box in zip(job.tokens.role, job.tokens.box.tolist(), strict=True):
            left, top, right, bottom = (round(x) if x == x else 0 for x in box)
            seen = union[top:bottom, left:right]
            expected.append(seen.mean() if role == nl.Role.VISUAL and seen.size else np.nan)
        assert np.isfinite(expected).sum() >= 16
        np.testing.assert_allclose(answer.values, expected, atol=0.02)
    assert min(shares) < 1
