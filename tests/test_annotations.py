"""Regions from COCO's files: the same masks, names and explanations as from the data's own."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import neuronlens as nl
from neuronlens import testbed
from neuronlens.atlas import SampleRecord
from neuronlens.errors import DataError
from neuronlens.samples import Outline, annotate

SQUARE = [10, 10, 20, 10, 20, 20, 10, 20]


def filled(polygon, height: int, width: int) -> np.ndarray:
    """Pixel by pixel: a centre is inside if a ray from it upwards crosses an odd number of edges.

    Corners are rounded to fifths; sums are in tenths of a pixel, so that they are exact.
    """
    tenths = [2 * math.floor(5 * each + 0.5) for each in polygon]
    corners = list(zip(tenths[::2], tenths[1::2], strict=True))
    mask = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            x, y = 10 * column + 5, 10 * row + 5
            for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
                if (ax < x) != (bx < x):
                    # y >= ay + (x - ax) (by - ay) / (bx - ax), without a division
                    above = (y - ay) * (bx - ax) - (x - ax) * (by - ay)
                    mask[row, column] ^= above * (1 if bx > ax else -1) >= 0
    return mask


# Polygons.


def test_a_square_is_the_pixels_between_its_edges():
    mask = Outline((30, 30), [SQUARE]).mask()
    assert mask.sum() == 100
    assert mask[10:20, 10:20].all()


coordinate = st.integers(-60, 300).map(lambda n: n / 20)


@given(
    st.lists(st.lists(coordinate, min_size=6, max_size=14), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_polygons_are_filled_as_by_looking_at_every_pixels_centre(parts, height, width):
    parts = [part[: len(part) // 2 * 2] for part in parts]
    expected = np.any([filled(part, height, width) for part in parts], 0)
    np.testing.assert_array_equal(Outline((height, width), parts).mask(), expected)


@pytest.mark.parametrize("sides", [3, 7, 60])
def test_the_area_of_a_polygon_is_that_of_its_pixels_but_for_its_boundary(sides):
    angle = np.linspace(0, 2 * np.pi, sides, endpoint=False) + 0.3
    corners = np.stack([320 + 200 * np.cos(angle), 240 + 200 * np.sin(angle)], 1)
    area = sides / 2 * 200**2 * np.sin(2 * np.pi / sides)
    boundary = sides * 400 * np.sin(np.pi / sides)
    # Pixels that are half in and half out err both ways, so much less than one for each remains.
    assert abs(Outline((480, 640), [corners.ravel()]).mask().sum() - area) < 0.05 * boundary


def test_parts_are_united_and_what_a_part_encloses_twice_is_outside():
    far, over = [0, 0, 5, 0, 5, 5, 0, 5], [12, 12, 18, 12, 18, 18, 12, 18]
    assert Outline((30, 30), [SQUARE, far]).mask().sum() == 125
    assert Outline((30, 30), [SQUARE, over]).mask().sum() == 100
    assert Outline((30, 30), [[*SQUARE, 10, 10, *over, 12, 12]]).mask().sum() == 100 - 36


def test_a_part_without_an_inside_is_empty_and_one_beyond_the_image_is_cut():
    for part in ([3, 3], [3, 3, 9, 9], [3, 3, 9, 9, 3, 3], [], [40, 40, 50, 40, 50, 50]):
        assert not Outline((20, 20), [part]).mask().any()
    assert Outline((15, 12), [SQUARE]).mask().sum() == 5 * 2
    assert Outline((15, 12), [[-1e6, -1e6, 1e6, -1e6, 1e6, 1e6, -1e6, 1e6]]).mask().all()


# Run lengths.


def test_run_lengths_go_down_the_columns_and_begin_outside():
    mask = Outline((2, 3), counts=[1, 2, 3]).mask()
    assert mask.tolist() == [[False, True, False], [True, False, False]]
    assert Outline((2, 2), counts=[0, 4]).mask().all()
    assert not Outline((2, 2), counts=[4]).mask().any()
    assert Outline((2, 2), counts=[1, 1, 0, 1, 1]).mask().T.ravel().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        # Groups of five bits, by hand: 15 is one group, 16 needs a second for its sign.
        ([15], "?"),
        ([16], "`0"),
        ([100], "T3"),
        # The fourth number is a difference to the second one: 3 - 5 = -2, the group 30.
        ([1, 5, 2, 3], "152N"),
        ([1, 5, 2, 5, 40], "1520V1"),
    ],
)
def test_run_lengths_have_the_text_that_coco_gives_them(runs, text):
    size = (1, sum(runs))
    assert Outline(size, counts=runs).text() == text
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    np.testing.assert_array_equal(Outline(size, counts=text).mask()[0], inside)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_mask_survives_being_written_as_an_outline(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    outline = Outline.of(mask)
    assert outline.size == mask.shape
    np.testing.assert_array_equal(outline.mask(), mask)
    np.testing.assert_array_equal(Outline(mask.shape, counts=outline.text()).mask(), mask)


def test_the_text_of_polygons_is_of_their_mask():
    outline = Outline((40, 50), [SQUARE, [3.3, 4.4, 30.1, 9.9, 22.2, 38.8]])
    again = Outline((40, 50), counts=outline.text())
    np.testing.assert_array_equal(again.mask(), outline.mask())


def test_masks_are_filled_when_needed_kept_a_while_and_cannot_be_written_to():
    outline = Outline((30, 30), [SQUARE])
    assert outline.mask() is outline.mask()
    with pytest.raises(ValueError, match="read-only"):
        outline.mask()[0, 0] = True
    given_list = [*SQUARE]
    kept = Outline((30, 30), [given_list])
    given_list[0] = 0
    assert kept.mask().sum() == 100


@pytest.mark.parametrize(
    ("size", "polygons", "counts", "said"),
    [
        ((10, 10), [[1, 2, 3]], None, "no even number of coordinates"),
        ((10, 10), [1, 2, 3, 4], None, "no even number"),
        ((10, 10), [[[1, 2], [3, 4]]], None, "no even number"),
        ((10, 10), [["a", "b"]], None, "list of numbers"),
        ((10, 10), [[1, 2, 3, math.nan]], None, "no place in an image"),
        ((10, 10), [[1, 2, 3, math.inf]], None, "no place in an image"),
        ((10, 10), [[1, 2, 3, 1e300]], None, "no place in an image"),
        ((10, 10), [], [50, 49], "cover 99 pixels of an image of 10 x 10, which has 100"),
        ((10, 10), [], [50, 51], "cover 101 pixels"),
        ((10, 10), [], [150, -50], "some of them negative"),
        ((10, 10), [], [50.5, 49.5], "whole numbers"),
        ((10, 10), [], ["50", "50"], "whole numbers"),
        ((10, 10), [], [], "cover 0 pixels"),
        ((10, 10), [], "", "cover 0 pixels"),
        ((10, 10), [], "1", "cover 1 pixels"),
        ((10, 10), [], "T", "breaks off"),
        ((10, 10), [], "T3 ", "no COCO text"),
        ((10, 10), [], "oooooooooo0", "no COCO text"),
        ((0, 10), [SQUARE], None, "No image is 0 pixels high"),
        ((2**20, 2**20), [SQUARE], None, "No image is"),
        ((10, 10, 3), [SQUARE], None, "a height and a width"),
        ((10.5, 10), [SQUARE], None, "size of an outline"),
        ((10, 10), [], None, "either polygons or counts"),
        ((10, 10), [SQUARE], [100], "either polygons or counts"),
    ],
)
def test_what_is_no_outline_is_refused_when_it_is_made(size, polygons, counts, said):
    with pytest.raises(DataError, match=said):
        Outline(size, polygons, counts)


# Files in COCO's form.

CATEGORIES = [
    {"id": 3, "name": "cat", "supercategory": "animal", "isthing": 1},
    {"id": 7, "name": "person", "supercategory": "person", "isthing": 1},
    {"id": 199, "name": "wall-other-merged", "supercategory": "wall", "isthing": 0},
    {"id": 118, "name": "floor-wood", "supercategory": "floor", "isthing": 0},
    {"id": 98, "name": "mirror-stuff", "supercategory": "furniture-stuff", "isthing": 0},
]
PICTURES = [
    {"id": 50, "file_name": "a.jpg", "height": 30, "width": 40},
    {"id": 60, "file_name": "b.jpg", "height": 30, "width": 40},
]
CAT = {"id": 1, "image_id": 50, "category_id": 3, "segmentation": [SQUARE], "iscrowd": 0}


def a_file(folder: Path, *annotations: dict, **more) -> Path:
    path = folder / "instances.json"
    content = {"images": PICTURES, "categories": CATEGORIES, "annotations": annotations} | more
    path.write_text(json.dumps(content))
    return path


def a_panoptic(folder: Path, *segments: tuple[int, int], image: int = 50, **more) -> Path:
    """A file with one map, in which the n-th segment is the n-th row from the top."""
    colours = np.zeros((30, 40, 3), np.uint8)
    for row, (number, _) in enumerate(segments):
        colours[row] = [number % 256, number // 256 % 256, number // 65536]
    (folder / "panoptic").mkdir(exist_ok=True)
    Image.fromarray(colours).save(folder / "panoptic" / "a.png")
    annotation = {
        "image_id": image,
        "file_name": "a.png",
        "segments_info": [
            {"id": number, "category_id": category, "iscrowd": 0} for number, category in segments
        ],
    }
    return a_file(folder, annotation | more).rename(folder / "panoptic.json")


def some(*names: str, folder: str = "/data/train2017") -> list[nl.Sample]:
    return [nl.Sample(str(i), (Path(folder, n),), "asked") for i, n in enumerate(names)]


def test_samples_get_the_regions_of_their_images_by_file_name(tmp_path):
    runs = {"size": [30, 40], "counts": [600, 60, 540]}
    text = {"size": [30, 40], "counts": Outline((30, 40), counts=[600, 60, 540]).text()}
    path = a_file(
        tmp_path,
        CAT,
        {"id": 2, "image_id": 60, "category_id": 7, "segmentation": runs, "iscrowd": 1},
        {"id": 3, "image_id": 60, "category_id": 3, "segmentation": text},
        {"id": 4, "image_id": 70, "category_id": 3, "segmentation": "of no image that is asked of"},
    )
    samples = some("b.jpg", "a.jpg")
    b, a = annotate(samples, path)
    assert [each.names for each in b.annotations] == [("person",), ("cat", "animal")]
    assert [each.names for each in a.annotations] == [("cat", "animal")]
    expected = np.zeros((30, 40), bool)
    expected[:, 20:22] = True
    for each in b.annotations:
        np.testing.assert_array_equal(each.mask(), expected)
    assert a.annotations[0].mask().sum() == 100
    for before, after in zip(samples, (b, a), strict=True):
        assert before.annotations == ()
        assert (after.id, after.images, after.prompt) == (before.id, before.images, before.prompt)


def test_regions_come_after_those_a_sample_has_and_on_the_image_they_are_of(tmp_path):
    own = nl.Annotation(("mine",), np.ones((30, 40), int))
    images = (Path("/d/b.jpg"), Path("/d/a.jpg"))
    sample = nl.Sample("x", images, "asked", annotations=(own,))
    (found,) = annotate([sample], a_file(tmp_path, CAT))
    assert found.annotations[0] is own
    assert [(each.names, each.image) for each in found.annotations[1:]] == [(("cat", "animal"), 1)]


def test_panoptic_maps_are_read_as_numbers_in_three_colours(tmp_path):
    segments = [(5, 3), (300, 199), (5 + 300 * 65536 % 2**24, 118), (65536 * 200, 98)]
    path = a_panoptic(tmp_path, *segments)
    for masks in (None, tmp_path / "panoptic", str(tmp_path / "panoptic")):
        (found,) = annotate(some("a.jpg"), path, masks=masks)
        assert len(found.annotations) == 4
        for row, each in enumerate(found.annotations):
            expected = np.zeros((30, 40), bool)
            expected[row] = True
            np.testing.assert_array_equal(each.mask(), expected)


def test_names_are_category_and_supercategory_in_words(tmp_path):
    path = a_panoptic(tmp_path, (1, 3), (2, 7), (3, 199), (4, 118), (5, 98))
    (found,) = annotate(some("a.jpg"), path)
    assert [each.names for each in found.annotations] == [
        ("cat", "animal"),
        ("person",),
        ("wall",),
        ("floor wood", "floor"),
        ("mirror", "furniture"),
    ]


@pytest.mark.parametrize(
    ("category", "names"),
    [
        ({"name": "t-shirt", "supercategory": "none"}, ("t-shirt",)),
        ({"name": " apple_sauce "}, ("apple sauce",)),
        ({"name": "truck_(vehicle)", "supercategory": ""}, ("truck (vehicle)",)),
        ({"name": "other", "supercategory": None}, ("other",)),
        ({"name": "<b>cat</b>"}, ("<b>cat</b>",)),
    ],
)
def test_names_of_things_keep_their_hyphens(tmp_path, category, names):
    path = a_file(tmp_path, CAT, categories=[{"id": 3} | category])
    assert annotate(some("a.jpg"), path)[0].annotations[0].names == names


def test_a_file_name_with_folders_has_to_be_how_the_path_ends(tmp_path):
    pictures = [
        PICTURES[0] | {"file_name": "val/a.jpg"},
        PICTURES[1] | {"file_name": "train/a.jpg"},
    ]
    path = a_file(tmp_path, CAT, CAT | {"image_id": 60, "category_id": 7}, images=pictures)
    one, other = annotate(
        [*some("a.jpg", folder="/data/train"), *some("a.jpg", folder="/data/val")], path
    )
    assert one.concepts() == {"person"}
    assert other.concepts() == {"cat", "animal"}
    with pytest.raises(DataError, match="none of the images"):
        annotate(some("a.jpg", folder="/data/test"), path)
    with pytest.raises(DataError, match="none of the images"):
        annotate([nl.Sample("x", (Path("xa.jpg"),), "asked")], a_file(tmp_path, CAT))


def test_samples_without_an_entry_are_counted_and_come_back_as_they_were(tmp_path):
    samples = [*some("c.jpg", "a.jpg"), nl.Sample("bare", (), "asked")]
    memory = nl.Sample("memory", (Image.new("RGB", (40, 30)),), "asked")
    with pytest.warns(UserWarning, match=r"3 of 4 samples .*instances\.json, such as '0'") as told:
        found = annotate([*samples, memory], a_file(tmp_path, CAT))
    assert [w.filename for w in told] == [__file__]
    assert [len(each.annotations) for each in found] == [0, 1, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # An image in which nothing is annotated has an entry.
        assert annotate(some("b.jpg"), a_file(tmp_path, CAT))[0].annotations == ()
        assert annotate([], a_file(tmp_path, CAT)) == []


def test_if_nothing_is_found_a_name_of_each_side_is_shown(tmp_path):
    path = a_file(tmp_path, CAT)
    with pytest.raises(DataError, match=r"none of the images .*train2017/c\.jpg.*'a\.jpg'"):
        annotate(some("c.jpg"), path)
    with pytest.raises(DataError, match=r"in memory.*'a\.jpg'"):
        annotate([nl.Sample("x", (Image.new("RGB", (40, 30)),), "asked")], path)
    with pytest.raises(DataError, match="none at all"):
        annotate(some("c.jpg"), a_file(tmp_path, images=[]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[]", "valid dictionary"),
        ('{"images": [], "annotations": []}', r"categories: Field required"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', r"images\.0\.file_name"),
        ('{"images": [], "categories": [{"id": 1}], "annotations": []}', r"categories\.0\.name"),
        ('{"images": [], "categories": [], "annotations": [3]}', r"annotations\.0"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"other\.json {said}|other\.json is not in .*{said}"):
        annotate(some("a.jpg"), path)


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        annotate(some("a.jpg"), tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": 4}, "no category 4; the file has 3, 7, 199, 118, 98"),
        ({"category_id": "cat"}, "category_id"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "no even number of coordinates"),
        ({"segmentation": SQUARE}, "no even number of coordinates"),
        ({"segmentation": [["x", "y"]]}, "list of numbers"),
        ({"segmentation": []}, "neither a list of polygons nor run lengths"),
        ({"segmentation": "a mask"}, "neither .*'?a mask"),
        ({"segmentation": {"counts": [1200]}}, "neither"),
        ({"segmentation": {"size": [30, 40], "counts": 1200}}, "neither"),
        ({"segmentation": None}, "neither"),
        ({"segmentation": {"size": [30, 40], "counts": [1199]}}, "cover 1199 pixels"),
        ({"segmentation": {"size": [30, 40], "counts": "1"}}, "cover 1 pixels"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, "of 40 x 30, but its image a.jpg"),
    ],
)
def test_a_region_that_cannot_be_is_named_by_file_and_id(tmp_path, change, said):
    good = CAT | {"id": 8, "image_id": 60}
    path = a_file(tmp_path, good, CAT | {"id": 4711} | change)
    with pytest.raises(DataError, match=rf"instances\.json, annotation 4711: .*{said}"):
        annotate(some("a.jpg"), path)
    # What is not asked for is not looked at.
    assert len(annotate(some("b.jpg"), path)[0].annotations) == 1


def test_an_annotation_that_has_no_mask_or_no_image_is_named(tmp_path):
    with pytest.raises(DataError, match=r"annotation 5: .*segmentation"):
        annotate(some("a.jpg"), a_file(tmp_path, {"id": 5, "image_id": 50, "category_id": 3}))
    for image in ({}, {"image_id": []}, {"image_id": None}):
        with pytest.raises(DataError, match=r"annotation number 1: it has no image_id"):
            annotate(some("a.jpg"), a_file(tmp_path, CAT, {"segmentation": [SQUARE]} | image))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([PICTURES[0], PICTURES[1] | {"file_name": "a.jpg"}], "two images named 'a.jpg'"),
        ([PICTURES[0], PICTURES[1] | {"file_name": "./a.jpg"}], "two images named"),
        ([PICTURES[0], PICTURES[1] | {"id": 50}], "two images with the id 50"),
    ],
)
def test_images_that_cannot_be_told_apart_are_refused(tmp_path, images, said):
    with pytest.raises(DataError, match=said):
        annotate(some("a.jpg"), a_file(tmp_path, CAT, images=images))


def test_a_category_without_a_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="category 3: it has no name"):
        annotate(some("a.jpg"), a_file(tmp_path, CAT, categories=[{"id": 3, "name": " "}]))


def test_a_map_that_is_missing_outside_its_folder_or_not_asked_for_is_refused(tmp_path):
    path = a_panoptic(tmp_path, (1, 3))
    with pytest.raises(DataError, match=r"annotation of image 50: .*no map .*empty/a\.png"):
        annotate(some("a.jpg"), path, masks=tmp_path / "empty")
    for name in ("../panoptic/a.png", str(tmp_path / "panoptic/a.png")):
        with pytest.raises(DataError, match="not within the folder"):
            annotate(some("a.jpg"), a_panoptic(tmp_path, (1, 3), file_name=name))
    with pytest.raises(DataError, match="no panoptic file"):
        annotate(some("a.jpg"), a_file(tmp_path, CAT), masks=tmp_path)


@pytest.mark.parametrize("segment", [(0, 3), (-1, 3), (1, 4)])
def test_a_segment_that_cannot_be_is_refused(tmp_path, segment):
    path = a_panoptic(tmp_path, (1, 3))
    content = json.loads(path.read_text())
    number, category = segment
    content["annotations"][0]["segments_info"] = [{"id": number, "category_id": category}]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotation of image 50: .*(segments_info|no category 4)"):
        annotate(some("a.jpg"), path)


def test_regions_of_another_size_than_the_image_are_refused_when_they_are_used(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 40 wide and 30 high, and to be turned by a quarter
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    for path in (a_panoptic(tmp_path, (1, 3)), a_file(tmp_path, CAT)):
        (found,) = annotate(some("a.jpg", folder=str(tmp_path)), path)
        with pytest.raises(DataError, match="of 40 x 30 annotates image 0"):
            nl.AnnotationSegmenter().segment(found, 0, ["cat"])


# Rows of atlases.


def test_outlines_and_colour_maps_are_found_again_from_a_row(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    (sample,) = annotate(some("a.jpg", folder=str(tmp_path)), a_file(tmp_path, CAT))
    (sample,) = annotate([sample], a_panoptic(tmp_path, (300, 199), (70_000, 118)))
    written = SampleRecord.of(sample, 4).model_dump_json()
    found = SampleRecord.model_validate_json(written).sample_from_files()

    def masks(of):
        return {each.names: (each.mask().tolist(), each.image) for each in of.annotations}

    assert len(sample.annotations) == 3
    assert masks(found) == masks(sample)


def test_a_row_of_an_older_atlas_has_no_outlines(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    row = json.loads(SampleRecord.of(some("a.jpg", folder=str(tmp_path))[0], 0).model_dump_json())
    del row["regions"]
    assert SampleRecord.model_validate(row).sample_from_files().annotations == ()


def test_relative_paths_are_found_again_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("a.jpg")
    path = a_panoptic(tmp_path, (300, 199))
    (sample,) = annotate([nl.Sample("x", "a.jpg", "asked")], path.name, masks="panoptic")
    map_ = nl.Annotation(("row",), Path("panoptic/a.png"), 300)
    sample = replace(sample, annotations=(*sample.annotations, map_))
    record = SampleRecord.of(sample, 0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for each in (sample.annotations[0], *record.sample_from_files().annotations):
        assert each.mask().sum() == 40


def test_names_given_twice_to_one_region_are_both_kept_in_a_row(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "m.png")
    both = tuple(nl.Annotation((name,), tmp_path / "m.png") for name in ("cat", "animal"))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    sample = nl.Sample("x", (tmp_path / "a.png",), "asked", annotations=both)
    assert SampleRecord.of(sample, 0).sample_from_files().concepts() == {"cat", "animal"}


# From files to explanations.


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return testbed.write(tmp_path_factory.mktemp("coco") / "scenes", 60, seed=3)


@pytest.fixture(scope="module")
def native(written) -> list[nl.Sample]:
    return nl.read_samples(written)


@pytest.fixture(scope="module")
def bare(native) -> list[nl.Sample]:
    return [replace(sample, annotations=()) for sample in native]


def as_coco(native: list[nl.Sample], folder: Path) -> tuple[Path, Path]:
    """What the samples' own annotations are in COCO's forms, instances and panoptic.

    A category has two names here, an object of the testbed three: it comes as two instances.
    """
    (folder / "maps").mkdir()
    categories: dict[tuple[str, str], int] = {}
    images, instances, panoptic = [], [], []
    for number, sample in enumerate(native):
        colours = np.zeros((64, 64, 3), np.uint8)
        name = sample.images[0].name
        images.append({"id": number, "file_name": name, "height": 64, "width": 64})
        segments = []
        for place, each in enumerate(sample.annotations):
            mask = each.mask()
            names = [each.names[:2], each.names[2:]] if len(each.names) > 1 else [each.names]
            kinds = [categories.setdefault((*n, "none")[:2], len(categories)) for n in names]
            runs = Outline.of(mask)
            for kind in kinds:
                # The text, or the numbers, as COCO has them for things and for crowds.
                counts = runs.text() if place % 2 else lengths(mask)
                instances.append(
                    {
                        "id": len(instances),
                        "image_id": number,
                        "category_id": kind,
                        "segmentation": {"size": [64, 64], "counts": counts},
                    }
                )
            segment = 70_000 + place * 300
            colours[mask] = [segment % 256, segment // 256 % 256, segment // 65536]
            segments += [{"id": segment, "category_id": kind} for kind in kinds]
        png = Path(name).with_suffix(".png").name
        Image.fromarray(colours).save(folder / "maps" / png)
        panoptic.append({"image_id": number, "file_name": png, "segments_info": segments})
    kinds = [
        {"id": kind, "name": name, "supercategory": above}
        for (name, above), kind in categories.items()
    ]
    paths = folder / "instances.json", folder / "panoptic.json"
    for path, regions in zip(paths, (instances, panoptic), strict=True):
        content = {"images": images, "categories": kinds, "annotations": regions}
        path.write_text(json.dumps(content))
    return paths


def lengths(mask: np.ndarray) -> list[int]:
    """Run lengths, one pixel after the other."""
    runs, inside = [0], False
    for pixel in mask.T.ravel():
        if pixel != inside:
            runs.append(0)
            inside = pixel
        runs[-1] += 1
    return runs


@pytest.fixture(scope="module")
def annotated(native, bare, tmp_path_factory) -> dict[str, list[nl.Sample]]:
    folder = tmp_path_factory.mktemp("as_coco")
    instances, panoptic = as_coco(native, folder)
    return {
        "instances": annotate(bare, instances),
        "panoptic": annotate(bare, panoptic, masks=folder / "maps"),
    }


@pytest.fixture(scope="module")
def planted() -> testbed.Testbed:
    return testbed.load(planted=True)


@pytest.fixture(scope="module")
def vlm(planted) -> nl.ModelAdapter:
    return nl.adapt(planted.model, planted.processor)


@pytest.fixture(scope="module")
def atlas(vlm, bare, tmp_path_factory) -> nl.Atlas:
    """Of samples that nobody had annotated yet."""
    folder = tmp_path_factory.mktemp("bare") / "atlas"
    return nl.scan(vlm, bare, out=folder, sites="language.0", n=20, batch_size=10)


@pytest.fixture(scope="module")
def kinds(atlas) -> nl.Classification:
    return nl.NeuronClassifier(**testbed.READINGS).classify(atlas)


@pytest.fixture(scope="module")
def neurons(planted) -> list[nl.NeuronId]:
    return [each.neuron for each in planted.planted if each.kind != "silent"]


@pytest.fixture(scope="module")
def expected(vlm, atlas, kinds, neurons, native) -> nl.Study:
    return nl.explain_neurons(vlm, atlas, neurons, kinds=kinds, samples=native)


@pytest.mark.parametrize("form", ["instances", "panoptic"])
def test_concepts_have_the_masks_that_were_written(native, annotated, form):
    segmenter = nl.AnnotationSegmenter()
    for one, other in zip(native, annotated[form], strict=True):
        assert one.concepts() == other.concepts()
        phrases = sorted(one.concepts())
        np.testing.assert_array_equal(
            segmenter.segment(one, 0, phrases), segmenter.segment(other, 0, phrases)
        )


@pytest.mark.parametrize("form", ["instances", "panoptic"])
def test_a_scan_that_was_annotated_afterwards_is_explained_as_from_the_datas_own(
    vlm, atlas, kinds, neurons, expected, annotated, form
):
    study = nl.explain_neurons(vlm, atlas, neurons, kinds=kinds, samples=annotated[form])
    assert sum(record.explanation is not None for record in study.values()) == len(neurons)
    assert study.records == expected.records


def test_a_scan_of_annotated_samples_needs_them_no_more(
    vlm, kinds, neurons, expected, annotated, tmp_path
):
    atlas = nl.scan(
        vlm, annotated["instances"], out=tmp_path / "a", sites="language.0", n=20, batch_size=10
    )
    atlas = nl.Atlas.open(atlas.path)
    study = nl.explain_neurons(vlm, atlas, neurons, kinds=kinds)
    assert study.records == expected.records


def test_without_annotations_there_is_nothing_to_name(planted, vlm, atlas, kinds):
    seen = [each.neuron for each in planted.planted if each.kind == "visual"][:2]
    study = nl.explain_neurons(vlm, atlas, seen, kinds=kinds)
    assert [kinds.of(neuron) for neuron in seen] == ["visual"] * 2
    assert all("no known concept" in record.failure for record in study.values())
