"""Masks kept in memory and in a file: the same as made, made once, whoever asks and dies."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import neuronlens as nl
import tiny_segmenters as tiny
from neuronlens.errors import OutputError, SampleError, SegmenterError
from neuronlens.explanation import Explanation
from neuronlens.segment import CachedSegmenter, GroundedSegmenter, Sam3Segmenter
from neuronlens.simulate import MaskSimulator, SimulationJob

WIDE = tiny.picture(140, 90)
PHRASES = ("a cat", "red dog", "blue")


@pytest.fixture(scope="module")
def sam3():
    return tiny.sam3()


@pytest.fixture
def segmenter(sam3):
    return Sam3Segmenter(*sam3, threshold=0.3)


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "new" / "masks.sqlite"


@pytest.fixture
def looked(sam3):
    """Grows with every image that is encoded."""
    with tiny.forwards(sam3[0].vision_encoder) as seen:
        yield seen


@pytest.fixture
def asked(sam3):
    """Grows with every phrase that is looked for."""
    with tiny.forwards(sam3[0].text_encoder) as seen:
        yield seen


def rows(path: Path) -> list[tuple]:
    database = sqlite3.connect(path)
    found = database.execute("SELECT * FROM masks").fetchall()
    database.close()
    return found


def test_kept_masks_are_those_that_were_made_and_no_model_runs(segmenter, place, looked):
    fresh = segmenter.segment(tiny.sample(WIDE), 0, PHRASES)
    cached = CachedSegmenter(segmenter, place)
    first = cached.segment(tiny.sample(WIDE), 0, PHRASES)
    assert len(looked) == 2
    second = cached.segment(tiny.sample(WIDE), 0, PHRASES)
    assert len(looked) == 2
    for masks in (first, second):
        assert masks.dtype == bool
        np.testing.assert_array_equal(masks, fresh)
    assert fresh.any((1, 2)).all()
    assert not fresh.all((1, 2)).any()


def test_only_phrases_not_yet_known_are_asked_for(segmenter, place, looked, asked):
    cached = CachedSegmenter(segmenter, place)
    cached.segment(tiny.sample(WIDE), 0, PHRASES[:1])
    assert (len(looked), len(asked)) == (1, 1)
    masks = cached.segment(tiny.sample(WIDE), 0, [*PHRASES, "A cat. ", "blue"])
    assert (len(looked), len(asked)) == (2, 3)
    fresh = segmenter.segment(tiny.sample(WIDE), 0, PHRASES)
    np.testing.assert_array_equal(masks, fresh[[0, 1, 2, 0, 2]])


def test_a_phrase_found_nowhere_is_remembered_as_such(sam3, place, looked):
    cached = CachedSegmenter(Sam3Segmenter(*sam3, threshold=1.0), place)
    for _ in range(2):
        masks = cached.segment(tiny.sample(WIDE), 0, PHRASES)
        assert masks.shape == (3, 90, 140)
        assert not masks.any()
    assert len(looked) == 1
    assert cached.segment(tiny.sample(WIDE), 0, []).shape == (0, 90, 140)


def test_the_same_pixels_are_the_same_image_wherever_they_lie(segmenter, place, looked, tmp_path):
    cached = CachedSegmenter(segmenter, place)
    kept = cached.segment(tiny.sample(WIDE), 0, PHRASES)
    WIDE.save(tmp_path / "a.png")
    WIDE.save(tmp_path / "b.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6
    WIDE.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "on_side.png", exif=exif)
    for other in ("a.png", "b.bmp", "on_side.png"):
        sample = nl.Sample(other, (tiny.picture(9, 9), tmp_path / other), "p")
        np.testing.assert_array_equal(cached.segment(sample, 1, PHRASES), kept)
    assert len(looked) == 1


def test_other_pixels_are_another_image(segmenter, place, looked):
    cached = CachedSegmenter(segmenter, place)
    changed = WIDE.copy()
    changed.putpixel((139, 89), (1, 2, 3))
    turned = Image.frombytes("RGB", (90, 140), WIDE.tobytes())
    for count, image in enumerate((WIDE, changed, turned), 1):
        masks = cached.segment(tiny.sample(image), 0, PHRASES[:1])
        assert len(looked) == count
        np.testing.assert_array_equal(masks, segmenter.segment(tiny.sample(image), 0, PHRASES[:1]))
        looked.pop()


def test_a_segmenter_of_another_name_finds_nothing_of_the_first(sam3, tmp_path, looked):
    path = tmp_path / "masks.sqlite"
    for count, threshold in enumerate((0.3, 0.4), 1):
        segmenter = Sam3Segmenter(*sam3, threshold=threshold)
        cached = CachedSegmenter(segmenter, path)
        assert cached.name == segmenter.name
        cached.segment(tiny.sample(WIDE), 0, PHRASES)
        assert len(looked) == count
    assert len(rows(path)) == 2 * len(PHRASES)


def test_a_file_is_found_again(segmenter, tmp_path, looked):
    path = tmp_path / "masks.sqlite"
    first = CachedSegmenter(segmenter, path).segment(tiny.sample(WIDE), 0, PHRASES)
    again = CachedSegmenter(Sam3Segmenter(*tiny.sam3(), threshold=0.3), str(path))
    np.testing.assert_array_equal(again.segment(tiny.sample(WIDE), 0, PHRASES), first)
    assert len(looked) == 1


def test_memory_is_bounded_and_what_was_used_last_stays(segmenter, asked):
    cached = CachedSegmenter(segmenter)
    cached.segment(tiny.sample(WIDE), 0, PHRASES)
    kept = cached._kept
    assert 0 < kept._size == sum(map(len, kept._packed.values())) < WIDE.width * WIDE.height / 4
    room = CachedSegmenter(segmenter, memory=kept._size - 1)
    for phrase in PHRASES[:2]:
        room.segment(tiny.sample(WIDE), 0, [phrase])
    room.segment(tiny.sample(WIDE), 0, PHRASES[:1])  # now the second is the older one
    asked.clear()
    room.segment(tiny.sample(WIDE), 0, PHRASES[2:])
    room.segment(tiny.sample(WIDE), 0, PHRASES[:1])
    assert len(asked) == 1
    room.segment(tiny.sample(WIDE), 0, PHRASES[1:2])
    assert len(asked) == 2
    assert room._kept._size <= kept._size - 1
    nothing = CachedSegmenter(segmenter, memory=0)
    expected = segmenter.segment(tiny.sample(WIDE), 0, PHRASES)
    np.testing.assert_array_equal(nothing.segment(tiny.sample(WIDE), 0, PHRASES), expected)


@pytest.mark.parametrize("damage", [b"", b"not a picture", None], ids=["empty", "text", "cut"])
def test_a_damaged_mask_is_made_again(segmenter, tmp_path, looked, damage):
    path = tmp_path / "masks.sqlite"
    first = CachedSegmenter(segmenter, path).segment(tiny.sample(WIDE), 0, PHRASES)
    database = sqlite3.connect(path)
    with database:
        broken = damage if damage is not None else rows(path)[0][3][:60]
        database.execute("UPDATE masks SET png = ? WHERE phrase = 'blue'", (broken,))
    database.close()
    for _ in range(2):
        cached = CachedSegmenter(segmenter, path)
        np.testing.assert_array_equal(cached.segment(tiny.sample(WIDE), 0, PHRASES), first)
    assert len(looked) == 2


def test_threads_ask_for_nothing_twice(segmenter, place, looked, asked):
    cached = CachedSegmenter(segmenter, place)
    images = [tiny.picture(40 + i, 30, seed=i) for i in range(3)]
    expected = [segmenter.segment(tiny.sample(each), 0, PHRASES) for each in images]
    looked.clear()
    asked.clear()
    wrong: list[int] = []

    def work(seed):
        for i in np.random.default_rng(seed).permutation(3).tolist():
            masks = cached.segment(tiny.sample(images[i]), 0, PHRASES)
            if not np.array_equal(masks, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []
    assert (len(looked), len(asked)) == (3, 9)


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
import neuronlens as nl
from neuronlens.segment import CachedSegmenter

class Stripes:
    name = "stripes"

    def segment(self, sample, image, phrases):
        masks = np.zeros((len(phrases), 20, 30), bool)
        for mask, phrase in zip(masks, phrases, strict=True):
            mask[:, int(phrase) % 30] = True
        return masks

folder = Path(sys.argv[1])
cached = CachedSegmenter(Stripes(), folder / "masks.sqlite")  # opened before the processes part
sample = nl.Sample("s", (Image.new("RGB", (30, 20)),), "p")

def work(first, last):
    child = os.fork()
    if child:
        return child
    with open(folder / f"answered_{first}", "w") as said:
        for i in range(first, last):
            masks = cached.segment(sample, 0, [str(i), str(i + 1)])
            if np.flatnonzero(masks[0].any(0)).tolist() != [i % 30]:
                os._exit(1)
            print(i, file=said, flush=True)
    os._exit(0)

writers = [work(0, 20), work(10, 30)]
victim = work(1000, 100_000)
answered = folder / "answered_1000"
while not answered.exists() or len(answered.read_text().splitlines()) < 10:
    time.sleep(0.01)
os.kill(victim, signal.SIGKILL)
print([os.waitpid(each, 0)[1] for each in (victim, *writers)])
"""


def test_processes_share_a_file_and_one_killed_loses_nothing_it_had_answered(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == f"[{signal.SIGKILL.value}, 0, 0]"
    phrases = [int(row[2]) for row in rows(tmp_path / "masks.sqlite")]
    assert len(phrases) == len(set(phrases))
    answered = (tmp_path / "answered_1000").read_text().splitlines(keepends=True)
    answered = {int(line) for line in answered if line.endswith("\n")}
    assert len(answered) >= 10
    assert answered | set(range(31)) <= set(phrases)


def test_a_writer_waits_for_another(segmenter, tmp_path):
    path = tmp_path / "masks.sqlite"
    cached = CachedSegmenter(segmenter, path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.5, lambda: other.execute("COMMIT"))
    release.start()
    began = time.monotonic()
    cached.segment(tiny.sample(WIDE), 0, PHRASES)
    assert time.monotonic() - began > 0.3
    release.join()
    other.close()
    assert len(rows(path)) == len(PHRASES)


@pytest.mark.parametrize("held", [b"x", b"something else, and not short: " * 100, None])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(segmenter, tmp_path, held):
    path = tmp_path / "masks.sqlite"
    if held is None:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE masks (other TEXT)")
        database.close()
    else:
        path.write_bytes(held)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"masks\.sqlite cannot be used.*Name another file"):
        CachedSegmenter(segmenter, path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_output_error(segmenter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        CachedSegmenter(segmenter, tmp_path / "file" / "masks.sqlite")


def test_masks_that_come_from_the_sample_are_not_kept():
    with pytest.raises(SegmenterError, match="Use it without a cache"):
        CachedSegmenter(nl.AnnotationSegmenter())


def test_an_image_that_cannot_be_opened_is_a_sample_error(segmenter, tmp_path):
    with pytest.raises(SampleError, match="missing image"):
        CachedSegmenter(segmenter).segment(nl.Sample("s", (tmp_path / "gone.png",), "p"), 0, "x")


def test_simulations_through_a_cache_are_those_without(segmenter, vlm, scenes, looked):
    maps = [nl.samples.encode(vlm, [each]).tokens["language"].of(0) for each in scenes[:2]]
    jobs = [
        SimulationJob(Explanation(sentence="", phrases=phrases), sample, tokens)
        for phrases in (("a cat",), ("blue", "red dog"))
        for sample, tokens in zip(scenes, maps, strict=False)
    ]
    fresh = MaskSimulator(segmenter).simulate(jobs)
    simulator = MaskSimulator(CachedSegmenter(segmenter))
    looked.clear()
    for _ in range(2):
        for one, other in zip(simulator.simulate(jobs), fresh, strict=True):
            np.testing.assert_array_equal(one.values, other.values)
    assert len(looked) == 2


def test_a_grounded_segmenter_is_kept_by_both_its_parts(place):
    some = tiny.telling(tiny.grounding_dino(), WIDE, PHRASES)
    cached = CachedSegmenter(tiny.grounded(some), place)
    assert isinstance(cached.segmenter, GroundedSegmenter)
    dino, sam2 = cached.segmenter.detector.model, cached.segmenter.masker.model
    with tiny.forwards(dino) as detected, tiny.forwards(sam2.vision_encoder) as encoded:
        first = cached.segment(tiny.sample(WIDE), 0, PHRASES)
        np.testing.assert_array_equal(cached.segment(tiny.sample(WIDE), 0, PHRASES), first)
        assert (detected, encoded) == ([3], [1])
        cached.segmenter.detector.threshold = some / 2
        assert cached.segment(tiny.sample(WIDE), 0, PHRASES).sum() > first.sum()
        assert (len(detected), len(encoded)) == (2, 2)
