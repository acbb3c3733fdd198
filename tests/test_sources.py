"""Whatever holds the samples, however they are fetched: the same atlas."""

from __future__ import annotations

import importlib
import io
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Features, List, Value
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModelForImageTextToText

import neuronlens as nl
from neuronlens.errors import DataError
from neuronlens.scan.state import ScanState

run = importlib.import_module("neuronlens.scan.run")
HERE = {"sites": ("vision.1", "language.2"), "n": 4, "batch_size": 3, "window": 6}


def files(atlas: nl.Atlas) -> dict[str, bytes]:
    """What is known of the neurons."""
    names = [name for name in atlas.manifest.files if name.startswith("sites/")]
    assert names
    return {name: (atlas.path / name).read_bytes() for name in names}


def whole(atlas: nl.Atlas) -> dict[str, bytes]:
    return {
        str(path.relative_to(atlas.path)): path.read_bytes()
        for path in atlas.path.rglob("*")
        if path.is_file() and path.name != "runs.jsonl"
    }


@pytest.fixture(scope="module")
def some(scenes) -> list[nl.Sample]:
    return [replace(scene, annotations=()) for scene in scenes[:8]]


@pytest.fixture(scope="module")
def expected(vlm, some, tmp_path_factory) -> dict[str, bytes]:
    return files(nl.scan(vlm, some, out=tmp_path_factory.mktemp("list") / "atlas", **HERE))


def encoded_image(sample: nl.Sample) -> bytes:
    file = io.BytesIO()
    sample.images[0].save(file, "png")
    return file.getvalue()


def rows(some, picture: Callable[[nl.Sample], Any], field: str = "image") -> list[dict[str, Any]]:
    return [
        {
            "id": each.id,
            field: picture(each),
            "prompt": each.prompt,
            "response": each.response,
            "domain": each.domain,
        }
        for each in some
    ]


class MapStyle(Dataset):
    """Has a length, and never says that an index is too large."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index % len(self._items)]


class Streamed(IterableDataset):
    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __iter__(self):
        return iter(self._items)


def hugging_face(some, *, several: bool = False) -> datasets.Dataset:
    feature = datasets.Image()
    field = "images" if several else "image"
    features = Features(
        {
            **dict.fromkeys(("id", "prompt", "response", "domain"), Value("string")),
            field: List(feature) if several else feature,
        }
    )
    picture = (lambda each: [each.images[0]]) if several else (lambda each: each.images[0])
    return datasets.Dataset.from_list(rows(some, picture, field), features=features)


def path_of(folder: Path, sample: nl.Sample) -> Path:
    path = folder / f"{sample.id}.png"
    path.write_bytes(encoded_image(sample))
    return path


SOURCES: dict[str, Callable[[list[nl.Sample], Path], Any]] = {
    "a tuple": lambda some, _: tuple(some),
    "a generator": lambda some, _: (each for each in some),
    "a torch Dataset without an end": lambda some, _: MapStyle(some),
    "a torch Dataset of rows": lambda some, _: MapStyle(rows(some, lambda s: s.images[0])),
    "a torch IterableDataset": lambda some, _: Streamed(some),
    "rows with pictures": lambda some, _: rows(some, lambda s: s.images[0]),
    "rows with lists of pictures": lambda some, _: rows(some, lambda s: list(s.images), "images"),
    "rows with paths": lambda some, folder: rows(some, lambda s: path_of(folder, s)),
    "rows with paths as text": lambda some, folder: rows(some, lambda s: str(path_of(folder, s))),
    "rows with bytes": lambda some, _: rows(some, encoded_image),
    "rows with bytes as Hugging Face has them": lambda some, _: rows(
        some, lambda s: {"bytes": encoded_image(s), "path": None}
    ),
    "rows with paths as Hugging Face has them": lambda some, folder: rows(
        some, lambda s: {"bytes": None, "path": str(path_of(folder, s))}
    ),
    "a Hugging Face Dataset": lambda some, _: hugging_face(some),
    "a Hugging Face Dataset of lists": lambda some, _: hugging_face(some, several=True),
    "a Hugging Face Dataset for torch": lambda some, _: hugging_face(some).with_format("torch"),
    "a Hugging Face IterableDataset": lambda some, _: hugging_face(some).to_iterable_dataset(),
    "a Hugging Face IterableDataset of lists": lambda some, _: hugging_face(
        some, several=True
    ).to_iterable_dataset(),
    "a Hugging Face IterableDataset for torch": lambda some, _: (
        hugging_face(some).to_iterable_dataset().with_format("torch")
    ),
    "a Hugging Face IterableDataset of unknown features": lambda some, _: (
        datasets.IterableDataset.from_generator(rows, gen_kwargs={
            "some": some, "picture": encoded_image
        })
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_gives_the_statistics_of_the_list_of_its_samples(
    vlm, some, expected, tmp_path, source
):
    atlas = nl.scan(vlm, SOURCES[source](some, tmp_path), out=tmp_path / "atlas", **HERE)
    assert atlas.manifest.skipped == ()
    assert [atlas.samples[place].id for place in range(8)] == [each.id for each in some]
    assert files(atlas) == expected


def test_conversations_give_the_statistics_of_their_first_exchange(vlm, some, tmp_path):
    plain = [replace(each, domain=None) for each in some]
    told = [
        {
            "id": each.id,
            "image": each.images[0],
            "conversations": [
                {"from": "human", "value": f"<image>\n{each.prompt}"},
                {"from": "gpt", "value": each.response},
            ],
        }
        for each in some
    ]
    one, other = (
        nl.scan(vlm, samples, out=tmp_path / name, **HERE)
        for name, samples in (("plain", plain), ("told", told))
    )
    assert files(one) == files(other)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_images_of_a_hugging_face_data_set_are_not_decoded_by_the_plan(
    vlm, some, expected, tmp_path, monkeypatch, several, streamed
):
    decoded = []
    plain = datasets.Image.decode_example

    def decode(self, *given, **more):
        decoded.append(None)
        return plain(self, *given, **more)

    monkeypatch.setattr(datasets.Image, "decode_example", decode)
    data = hugging_face(some, several=several)
    next(iter(data))
    assert decoded  # else nothing would be known
    decoded.clear()
    data = data.to_iterable_dataset() if streamed else data
    atlas = nl.scan(vlm, data, out=tmp_path / "atlas", **HERE)
    assert files(atlas) == expected
    assert decoded == []


def test_rows_without_an_id_are_named_by_their_place(vlm, some, tmp_path):
    unnamed = [{"image": each.images[0], "prompt": "p", "response": "red"} for each in some]
    atlas = nl.scan(vlm, unnamed, out=tmp_path / "atlas", **HERE)
    assert [record.id for record in atlas.samples.values()] == [str(i) for i in range(8)]


@pytest.mark.parametrize("source", ["rows with pictures", "a Hugging Face Dataset"])
def test_exemplars_find_scanned_rows_again(vlm, some, tmp_path, source):
    given = SOURCES[source](some, tmp_path)
    neuron = nl.NeuronId("language.2", 5)
    found = []
    for name, samples in (("rows", given), ("samples", some)):
        atlas = nl.scan(vlm, samples, out=tmp_path / name, **HERE)
        best = nl.exemplars(vlm, atlas, [neuron], samples=samples, explain=(1, 2, 3), held_out=())[
            neuron
        ]
        found.append([(e.position, e.sample.id, e.activation.tolist()) for e in best.explain])
    assert len(found[0]) == 3
    assert found[0] == found[1]


WRONG = {
    "a path": (lambda some: "coco.jsonl", r"'coco.jsonl' is a path.*nl.read_samples\(path\)"),
    "a Path": (lambda some: Path("coco.jsonl"), r"'coco.jsonl' is a path.*nl.read_samples"),
    "splits": (
        lambda some: datasets.DatasetDict({"train": hugging_face(some)}),
        r"DatasetDict is no sequence of samples. Choose one of its splits train",
    ),
    "one sample": (lambda some: some[0], "Give a list of samples"),
    "a number": (lambda some: 3, "int cannot be iterated"),
    "items that are no samples": (
        lambda some: [some[0], "scene.png"],
        "Item 1 of the samples is a str, neither a Sample nor a row. .*`prompt`",
    ),
    "rows without a prompt": (
        lambda some: [{"image": some[0].images[0], "caption": "red"}],
        "Row 0 has the fields image, caption. A row needs .*`prompt`",
    ),
    "rows whose prompt is no text": (
        lambda some: [{"image": some[0].images[0], "prompt": 3}],
        "Row 0 has the fields image, prompt. A row needs",
    ),
    "rows whose image is an array": (
        lambda some: [{"image": torch.zeros(3), "prompt": "p", "response": "r"}],
        "An image of row 0 is a Tensor. Images are paths",
    ),
    "conversations that begin otherwise": (
        lambda some: [{"conversations": [{"from": "gpt", "value": "hello"}]}],
        "Row 0 has conversations that do not begin with",
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", WRONG)
def test_what_holds_no_samples_is_refused_with_advice(vlm, some, tmp_path, what, workers):
    make, said = WRONG[what]
    with pytest.raises(DataError, match=said):
        nl.scan(vlm, make(some), out=tmp_path / "atlas", workers=workers, **HERE)
    assert list(tmp_path.iterdir()) == []


def test_the_advice_for_splits_works(vlm, some, expected, tmp_path):
    data = datasets.DatasetDict({"train": hugging_face(some)})
    assert files(nl.scan(vlm, data["train"], out=tmp_path / "atlas", **HERE)) == expected


# Worker processes.


def mixed(scenes, folder: Path) -> list[nl.Sample]:
    """In memory, in files and in bytes; one of each cannot be used."""
    folder.mkdir()
    made = []
    for number, scene in enumerate(scenes[:15]):
        path = folder / f"{scene.id}.png"
        path.write_bytes(encoded_image(scene))
        images = (scene.images[0], path, path.read_bytes())[number % 3]
        made.append(replace(scene, images=(images,), annotations=()))
    (folder / "text.png").write_text("no picture")
    made[3] = replace(made[3], images=())
    made[4] = replace(made[4], images=(folder / "text.png",))
    made[8] = replace(made[8], images=(b"no picture",))
    made[11] = replace(made[11], response="red " * 300)
    return made


def test_the_number_of_workers_changes_nothing(vlm, scenes, tmp_path):
    samples = mixed(scenes, tmp_path / "images")
    found = []
    for workers in (0, 1, 2):
        with pytest.warns(UserWarning, match="4 of 15 samples were skipped"):
            atlas = nl.scan(vlm, samples, out=tmp_path / str(workers), workers=workers, **HERE)
        assert [each.workers for each in atlas.runs] == [workers]
        found.append(whole(atlas))
    assert found[0] == found[1] == found[2]
    reasons = [each.reason for each in atlas.manifest.skipped]
    assert reasons == ["no image", "corrupt image", "corrupt image", "too long"]


@pytest.mark.parametrize("first", [True, False])
def test_an_error_in_a_worker_is_the_error_without_workers(vlm, some, tmp_path, monkeypatch, first):
    plain, breaks = type(vlm).process, some[0].prompt if first else some[7].response

    class UnlikeError(ZeroDivisionError):
        """Does not survive the way between processes."""

        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def process(self, texts, images, **more):
        if any(breaks in text for text in texts):
            raise (UnlikeError(1, 2) if first else RuntimeError("a processor that is broken"))
        return plain(self, texts, images, **more)

    monkeypatch.setattr(type(vlm), "process", process)
    raised = []
    for workers in (0, 2):
        with pytest.raises((UnlikeError, RuntimeError)) as error:
            nl.scan(vlm, some, out=tmp_path / str(workers), workers=workers, **HERE)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


def test_an_error_that_is_kept_does_not_keep_the_workers(vlm, some, tmp_path, monkeypatch):
    # They do not heed the end of the program, which would wait for them for ever.
    calls = count()

    def halt_later(inputs, *, logits=True):
        if next(calls):  # workers are started behind the first batch
            assert multiprocessing.active_children()
            raise ArithmeticError("the power went off")
        return type(vlm).forward(vlm, inputs, logits=logits)

    monkeypatch.setattr(vlm, "forward", halt_later)
    with pytest.raises(ArithmeticError) as kept:
        nl.scan(vlm, some, out=tmp_path / "a", workers=2, **HERE)
    assert not multiprocessing.active_children()
    assert kept.tb


def test_a_sample_without_eligible_text_is_skipped_by_that_name(vlm, some, tmp_path):
    samples = [*some[:3], replace(some[3], prompt="", response=some[3].response), *some[4:]]
    readings = HERE | {"text_roles": ("prompt",)}
    with pytest.warns(UserWarning, match="1 of 8 samples were skipped: 1 no eligible text"):
        atlas = nl.scan(vlm, samples, out=tmp_path / "atlas", **readings)
    (skipped,) = atlas.manifest.skipped
    assert (skipped.position, skipped.id) == (3, some[3].id)
    assert "no token of its prompt" in skipped.detail
    assert sorted(atlas.samples) == [0, 1, 2, 4, 5, 6, 7]


# A device that runs behind the program.


@pytest.fixture
def behind(monkeypatch):
    """Scan the way a GPU does it: nothing is looked at before the next batch runs."""
    made = []

    def state(*given, **more):
        made.append(ScanState(*given, **more | {"runs_behind": True}))
        return made[-1]

    def begin():
        monkeypatch.setattr(run, "ScanState", state)
        return made

    return begin


def counted(atlas: nl.Atlas) -> dict[str, torch.Tensor]:
    """Top lists, maxima and counts."""
    found = {}
    for name in atlas.sites:
        state = atlas.statistics(name).state_dict(atlas.manifest.domains)
        found |= {f"{name} {k}": v for k, v in state.items() if k != "role.total"}
        assert {"top.ids", "top.visual", "top.text", "role.maximum", "fired", "tokens"} <= {*state}
    return found


@pytest.mark.parametrize("number", [1, 3, 14])
@pytest.mark.parametrize("checkpoint_seconds", [0, 300])
def test_a_device_that_runs_behind_finds_the_same(
    vlm, scenes, tmp_path, behind, monkeypatch, number, checkpoint_seconds
):
    samples = list(scenes[:number])
    monkeypatch.setattr(run, "_WORTH", 0)

    def spoil(_module, _args, out):
        # One sample of every batch that has three, wherever it runs.
        return torch.where(torch.arange(len(out))[:, None, None] == 2, torch.nan, out)

    atlases = []
    module = vlm.model.get_submodule(vlm.site("language.2").path)
    handle = module.register_forward_hook(spoil)
    try:
        for name in ("plain", "behind"):
            made = behind() if name == "behind" else []
            readings = HERE | {"sites": None, "checkpoint_seconds": checkpoint_seconds}
            if number >= 3:
                with pytest.warns(UserWarning, match="non-finite activations"):
                    atlas = nl.scan(vlm, samples, out=tmp_path / name, **readings)
            else:
                atlas = nl.scan(vlm, samples, out=tmp_path / name, **readings)
            atlases.append(atlas)
    finally:
        handle.remove()
    assert made[0].runs_behind
    plain, other = atlases
    assert plain.manifest.skipped == other.manifest.skipped
    assert len(plain.manifest.skipped) == number // 3
    assert plain.samples == other.samples
    one, two = counted(plain), counted(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    for name in plain.sites:
        means = [each.statistics(name).roles.total.double() for each in atlases]
        # Sums are rounded otherwise, where they are made of other pieces.
        torch.testing.assert_close(*means, rtol=1e-5, atol=2.0**24)


def test_a_device_that_runs_behind_takes_its_last_batch_in(vlm, scenes, tmp_path, behind):
    behind()
    atlas = nl.scan(vlm, scenes[:7], out=tmp_path / "atlas", **HERE)
    assert sorted(atlas.samples) == list(range(7))
    top = atlas.statistics("language.2").top
    assert set(top.ids.unique().tolist()) <= set(range(7))
    tokens = sum(each.sum() for each in atlas.statistics("vision.1").firing.tokens.values())
    assert tokens == 7 * 65


def test_a_device_that_runs_behind_goes_on_after_an_error(vlm, scenes, tmp_path, behind):
    behind()
    calls = []

    def halt(*_):
        calls.append(None)
        if len(calls) == 3:
            raise ArithmeticError("the power went off")

    module = vlm.model.get_submodule(vlm.site("vision.0").path)
    handle = module.register_forward_pre_hook(halt)
    try:
        with pytest.raises(ArithmeticError) as error:
            nl.scan(vlm, scenes[:12], out=tmp_path / "atlas", **HERE)
        # The batch that had run, and waited, is kept as well.
        assert error.value.__notes__[0].startswith("6 samples had been scanned")
        nl.scan(vlm, scenes[:12], out=tmp_path / "atlas", **HERE)
        assert len(calls) == 3 + 2
    finally:
        handle.remove()
    undisturbed = nl.scan(vlm, scenes[:12], out=tmp_path / "whole", **HERE)
    assert whole(nl.Atlas.open(tmp_path / "atlas")) == whole(undisturbed)


# What is said of it.


@pytest.mark.parametrize("domains", [1, 4])
def test_the_size_that_is_foretold_is_that_of_the_files(vlm, some, tmp_path, domains):
    samples = [replace(each, domain=f"d{i % domains}") for i, each in enumerate(some)]
    readings = {"n": 7, "keep_visual": 6, "keep_text": 2}
    atlas = nl.scan(vlm, samples, out=tmp_path / "atlas", batch_size=4, **readings)
    size = nl.scan_size(vlm, **readings, domains=domains)
    real = sum(map(len, files(atlas).values()))
    assert size.atlas == pytest.approx(real, rel=0.03)
    assert size.neurons == sum(site.neurons for site in atlas.sites.values())
    kept = 0
    for name in atlas.sites:
        statistics = atlas.statistics(name)
        state = statistics.state_dict(atlas.manifest.domains)
        kept += sum(each.nbytes for each in state.values()) + statistics.top.value.nbytes
    assert size.state == pytest.approx(kept, rel=0.05)
    assert size.disk == 2 * size.atlas


def test_the_size_of_a_scan_is_known_without_weights(bed, vlm):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(bed.model.config)
    there = nl.adapt(model.eval())
    assert there.device.type == "meta"
    for sites in (None, "language", ["vision.1"]):
        assert nl.scan_size(there, sites, n=9) == nl.scan_size(vlm, sites, n=9)


@pytest.mark.parametrize("workers", [0, 1])
def test_progress_tells_size_rate_and_summary(vlm, some, tmp_path, capsys, workers):
    samples = [replace(some[0], images=()), *some[1:]]
    with pytest.warns(UserWarning, match="1 of 8 samples were skipped"):
        nl.scan(vlm, samples, out=tmp_path / "a", progress=True, workers=workers, **HERE)
    out, said = capsys.readouterr()
    assert out == ""
    size = str(nl.scan_size(vlm, HERE["sites"], n=4))
    assert said.startswith(f"scan: {size}\n")
    assert "640 neurons: " in size
    assert "8/8" in said
    assert "sample/s" in said
    assert "scan: 7 samples in " in said
    assert "a second); 1 skipped: 1 no image; " in said
    assert "% of the time waiting for data" in said


def test_a_scan_says_nothing_unless_asked(vlm, some, tmp_path, capsys):
    nl.scan(vlm, some, out=tmp_path / "atlas", **HERE)
    assert capsys.readouterr() == ("", "")
