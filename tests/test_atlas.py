from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import neuronlens as nl
from handmade import open_atlas, statistics
from neuronlens import testbed
from neuronlens.atlas import FORMAT, new_folder
from neuronlens.errors import (
    AtlasError,
    NeuronLensError,
    OutputError,
    SampleError,
    UnknownNameError,
)
from neuronlens.neurons import NeuronId
from neuronlens.running import COUNTED, FIXED_POINT
from neuronlens.tokens import Role


@pytest.fixture
def copied(atlas, tmp_path) -> nl.Atlas:
    """An atlas that may be broken."""
    return nl.Atlas.open(shutil.copytree(atlas.path, tmp_path / "copied"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[nl.Sample]:
    """Scenes as files."""
    return nl.read_samples(testbed.write(tmp_path_factory.mktemp("scenes"), 4, seed=11))


@pytest.fixture
def movable(vlm, tmp_path) -> nl.Atlas:
    """An atlas of files that may be broken."""
    samples = nl.read_samples(testbed.write(tmp_path / "scenes", 3, seed=12))
    return nl.scan(vlm, samples, out=tmp_path / "atlas", sites="vision.0", n=3)


# Opening.


def test_an_atlas_opens_as_the_scan_left_it(atlas):
    opened = nl.Atlas.open(str(atlas.path))
    assert opened.manifest == atlas.manifest
    opened.verify()


@pytest.mark.parametrize("name", ["samples.jsonl", "sites/language.1.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated", "longer"])
def test_a_file_that_is_missing_or_has_another_size_is_named(copied, name, how):
    path = copied.path / name
    if how == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if how == "truncated" else data + b" ")
    said = "is missing" if how == "missing" else r"is \d+ bytes long"
    with pytest.raises(AtlasError, match=rf"{name} {said}.* Copy it again, or scan again"):
        nl.Atlas.open(copied.path)


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a file"])
def test_what_is_no_atlas_is_refused(tmp_path, kind):
    path = tmp_path / "atlas"
    if kind == "an empty folder":
        path.mkdir()
    elif kind == "a file":
        path.write_text("{}")
    with pytest.raises(AtlasError, match=r"is no atlas: it has no manifest.json.*scan again"):
        nl.Atlas.open(path)


def test_an_atlas_in_a_newer_format_is_refused(copied):
    path = copied.path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": FORMAT + 1, "new": "field"}))
    with pytest.raises(AtlasError, match=rf"has format {FORMAT + 1}; .* up to {FORMAT}. Update it"):
        nl.Atlas.open(copied.path)


def test_an_atlas_of_an_earlier_format_is_refused(copied):
    path = copied.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(AtlasError, match=rf"has format 1.* reads {FORMAT}. Scan again"):
        nl.Atlas.open(copied.path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"format": 2}', b"\xff\xfe\x00"], ids=str
)
def test_a_broken_manifest_is_refused(copied, text):
    (copied.path / "manifest.json").write_bytes(text)
    with pytest.raises(AtlasError, match=r"manifest.json cannot be read"):
        nl.Atlas.open(copied.path)


@pytest.mark.parametrize("name", ["samples.jsonl", "sites/vision.0.safetensors"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0], ids=["first byte", "middle byte", "last byte"])
def test_one_flipped_bit_is_found_by_verify_and_not_by_open(copied, name, where):
    path = copied.path / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    opened = nl.Atlas.open(copied.path)
    with pytest.raises(AtlasError, match=rf"{name} is not what the scan wrote"):
        opened.verify()


def test_a_site_file_that_is_no_safetensors_is_an_atlas_error(copied):
    path = copied.path / "sites/vision.0.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    opened = nl.Atlas.open(copied.path)
    with pytest.raises(AtlasError, match=r"vision.0.safetensors cannot be read"):
        opened.statistics("vision.0")
    with pytest.raises(AtlasError, match=r"vision.0.safetensors cannot be read"):
        opened.neuron(NeuronId("vision.0", 0))


def test_a_sample_table_that_is_no_json_is_an_atlas_error(copied):
    path = copied.path / "samples.jsonl"
    path.write_bytes(b"?" * path.stat().st_size)
    opened = nl.Atlas.open(copied.path)
    with pytest.raises(AtlasError, match=r"samples.jsonl"):
        opened.sample(0)


def test_an_atlas_refuses_a_model_with_other_weights(atlas, vlm, untrained_vlm):
    atlas.check(vlm)
    with pytest.raises(AtlasError, match="other weights"):
        atlas.check(untrained_vlm)


# Reading.


def test_a_neuron_is_its_rows_of_the_site(atlas):
    for site in ("vision.0", "projector.0", "language.3"):
        whole = atlas.statistics(site)
        fired = sum(whole.firing.fired.values()).sum(0)
        tokens = sum(whole.firing.tokens.values()).sum(0)
        for index in (0, 17, atlas.site(site).width - 1):
            one = atlas.neuron(NeuronId(site, index))
            present = whole.top.ids[index] >= 0
            assert torch.equal(one.positions, whole.top.ids[index][present])
            assert torch.equal(one.visual, whole.top.visual[index][present])
            assert torch.equal(one.text, whole.top.text[index][present])
            assert torch.equal(one.value, whole.top.value[index][present])
            for place, role in enumerate(COUNTED):
                assert one.maximum[role] == whole.roles.maximum[place, index].item()
                if tokens[place] == 0:
                    assert math.isnan(one.mean[role])
                    assert math.isnan(one.firing_rate[role])
                else:
                    seen = tokens[place].item()
                    mean = whole.roles.total[place, index].item() / FIXED_POINT / seen
                    assert one.mean[role] == pytest.approx(mean, rel=1e-6)
                    rate = fired[place, index].item() / seen
                    assert one.firing_rate[role] == pytest.approx(rate, rel=1e-6)


def test_top_samples_are_in_falling_order_without_repetition(atlas):
    one = atlas.neuron(NeuronId("language.1", 5))
    assert len(one.positions) == 20
    assert len(set(one.positions.tolist())) == 20
    assert one.value.tolist() == sorted(one.value.tolist(), reverse=True)
    for kept in (one.visual, one.text):
        assert (kept[:, :-1] >= kept[:, 1:]).all()


def test_a_neurons_maximum_is_over_eligible_roles_only(tmp_path):
    made = statistics([{0: ([1.0], [2.0])}])
    made.roles.maximum[COUNTED.index(Role.PROMPT)] = 9.0
    made.roles.maximum[COUNTED.index(Role.SPECIAL)] = 8.0
    neuron = NeuronId("language.0", 0)
    assert open_atlas(tmp_path / "r", {"language.0": made}).maximum(neuron) == 2.0
    both = (Role.PROMPT, Role.RESPONSE)
    assert open_atlas(tmp_path / "pr", {"language.0": made}, text_roles=both).maximum(neuron) == 9.0


def test_what_was_not_scanned_is_refused_with_what_was(atlas):
    with pytest.raises(UnknownNameError, match=r"No site in this atlas 'language.7'.*language.0"):
        atlas.statistics("language.7")
    with pytest.raises(UnknownNameError, match=r"neuron in language.0 '384'"):
        atlas.neuron(NeuronId("language.0", 384))


def test_an_atlas_shows_itself_with_hostile_names_escaped(atlas, tmp_path):
    assert "24" in atlas._repr_html_()
    hostile = "<script>alert(1)</script>"
    one = {"language.0": statistics([{0: ([1.0], [])}])}
    made = open_atlas(tmp_path / "a", one, domain=hostile)
    assert "<script>" not in made._repr_html_()
    assert "&lt;script&gt;" in made._repr_html_()


# Finding samples again.


def test_a_sample_is_found_again_through_its_files(vlm, written, tmp_path):
    atlas = nl.scan(vlm, written, out=tmp_path / "a", sites="vision.0")
    for position, sample in enumerate(written):
        found = nl.Atlas.open(atlas.path).sample(position)
        for name in ("id", "images", "prompt", "response", "domain"):
            assert getattr(found, name) == getattr(sample, name)
        assert len(found.annotations) == len(sample.annotations)
        before = {each.number: each for each in sample.annotations}
        for each in found.annotations:
            assert each.names == before[each.number].names
            assert np.array_equal(each.mask(), before[each.number].mask())
            assert each.image == 0


def test_a_changed_image_is_refused(movable):
    path = movable.sample(1).images[0]
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(SampleError, match=r"changed image.*00001.png differs since the scan"):
        movable.sample(1)
    movable.sample(0)


def test_a_missing_image_is_refused(movable):
    movable.sample(2).images[0].unlink()
    with pytest.raises(SampleError, match=r"missing image.*00002.png is gone since the scan"):
        movable.sample(2)


def test_a_sample_from_memory_must_be_passed_again_and_then_works(vlm, atlas, scenes):
    with pytest.raises(AtlasError, match=r"from memory.*Pass the same samples: samples=\.\.\."):
        atlas.sample(0)
    neuron = NeuronId("language.0", 0)
    with pytest.raises(AtlasError, match=r"samples=\.\.\."):
        nl.exemplars(vlm, atlas, [neuron])
    found = nl.exemplars(vlm, atlas, [neuron], samples=scenes)
    assert found[neuron].explain[0].sample is scenes[found[neuron].explain[0].position]


def test_a_sample_with_masks_from_memory_must_be_passed_again(vlm, written, scenes, tmp_path):
    sample = nl.Sample("x", written[0].images, "p", "r", annotations=scenes[0].annotations)
    atlas = nl.scan(vlm, [sample], out=tmp_path / "a", sites="vision.0")
    with pytest.raises(AtlasError, match="from memory"):
        atlas.sample(0)


def test_a_sample_that_was_skipped_is_refused_by_name(vlm, scenes, tmp_path):
    with pytest.warns(UserWarning, match="1 no image"):
        atlas = nl.scan(
            vlm, [scenes[0], nl.Sample("bare", (), "p", "r")], out=tmp_path / "a", sites="vision.0"
        )
    with pytest.raises(NeuronLensError):
        atlas.sample(1)


def test_the_fingerprint_of_the_data_does_not_depend_on_where_it_lies(vlm, tmp_path):
    data = []
    for name, seed in (("one", 1), ("other", 1), ("third", 2)):
        samples = nl.read_samples(testbed.write(tmp_path / name, 2, seed=seed))
        atlas = nl.scan(vlm, samples, out=tmp_path / f"{name} atlas", sites="vision.0")
        data.append(atlas.manifest.data)
    assert data[0] == data[1] != data[2]


# Folders.


def test_a_new_folder_appears_only_when_the_block_ended_well(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert out.stat().st_mode & 0o755 == 0o755  # not for its owner alone
    assert [each.name for each in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_ended_badly_leaves_nothing(tmp_path, error):
    def work():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        work()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_there_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def work():
        with new_folder(out) as folder:
            (folder / "file").write_text("late")
            out.mkdir()
            (out / "file").write_text("first")

    with pytest.raises(OSError, match="out"):
        work()
    assert (out / "file").read_text() == "first"


def test_a_folder_under_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OutputError, match="cannot be written"), new_folder(out):
            raise AssertionError("the block must not run")


def test_what_is_finished_is_kept_where_its_place_was_taken_meanwhile(tmp_path):
    def overtaken():
        with new_folder(tmp_path / "a") as work:
            (work / "done").write_text("x")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "other").write_text("y")

    with pytest.raises(OutputError, match="lies in") as raised:
        overtaken()
    (kept,) = tmp_path.glob(".a-*")
    assert str(kept) in str(raised.value)
    assert (kept / "done").read_text() == "x"
    assert (tmp_path / "a" / "other").read_text() == "y"
