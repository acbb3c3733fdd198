from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import neuronlens as nl
from neuronlens.errors import DataError, SampleError
from neuronlens.segment import AnnotationSegmenter

WIDTH, HEIGHT = 5, 3


def region(row: int) -> np.ndarray:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[row] = 7
    return labels


def sample(*named, images: int = 1) -> nl.Sample:
    """A row of the image for each annotation: its names, and the image it is in."""
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    annotations = tuple(
        nl.Annotation(names, region(row), number=7, image=image)
        for row, (names, image) in enumerate(named)
    )
    return nl.Sample("s", (picture,) * images, "p", annotations=annotations)


def rows(sample, *phrases, image: int = 0) -> list[list[int]]:
    masks = AnnotationSegmenter().segment(sample, image, phrases)
    assert masks.shape == (len(phrases), HEIGHT, WIDTH)
    assert masks.dtype == bool
    assert (masks.all(2) == masks.any(2)).all()
    return [np.flatnonzero(mask.any(1)).tolist() for mask in masks]


THREE = sample((("red", "circle"), 0), (("red", "square"), 0), (("blue", "circle"), 0))


@pytest.mark.parametrize(
    ("phrase", "where"),
    [
        ("red", [0, 1]),
        ("circle", [0, 2]),
        ("red circle", [0]),
        ("circle red", [0]),
        ("Red Circle", [0]),
        (" red circle. ", [0]),
        ("blue square", []),  # each word is somewhere, but not in one region
        ("green", []),
        ("re", []),
        ("", []),
        (" . ", []),
    ],
)
def test_a_phrase_names_the_regions_that_carry_all_its_words(phrase, where):
    assert rows(THREE, phrase) == [where]


def test_every_phrase_has_its_own_mask():
    assert rows(THREE, "blue", "red", "green") == [[2], [0, 1], []]
    assert rows(THREE) == []


def test_only_regions_of_the_asked_image_count():
    two = sample((("red",), 0), (("red",), 1), images=2)
    assert rows(two, "red", image=0) == [[0]]
    assert rows(two, "red", image=1) == [[1]]


def test_names_are_compared_without_regard_to_case_and_may_hold_spaces():
    named = sample((("Traffic light",), 0))
    assert rows(named, "traffic light") == [[0]]
    assert rows(named, "light") == [[]]


def test_a_sample_without_annotations_has_empty_masks():
    assert rows(sample(), "red") == [[]]


def test_masks_come_from_label_files(tmp_path):
    path = tmp_path / "labels.png"
    Image.fromarray(region(2)).save(path)
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    one = nl.Sample("s", (picture,), "p", annotations=(nl.Annotation(("red",), path, number=7),))
    assert rows(one, "red") == [[2]]
    gone = nl.Annotation(("red",), tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone.png cannot be read"):
        rows(nl.Sample("s", (picture,), "p", annotations=(gone,)), "red")


def test_an_image_that_cannot_be_opened_is_a_sample_error(tmp_path):
    with pytest.raises(SampleError, match="missing image"):
        AnnotationSegmenter().segment(nl.Sample("s", (tmp_path / "gone.png",), "p"), 0, ["red"])


def test_a_label_map_of_another_size_than_its_image_is_refused():
    image = Image.new("RGB", (8, 4))
    sample = nl.Sample("s", (image,), "p", annotations=(nl.Annotation(("red",), np.ones((8, 4))),))
    with pytest.raises(DataError, match="labels of its size"):
        nl.AnnotationSegmenter().segment(sample, 0, ["red"])
