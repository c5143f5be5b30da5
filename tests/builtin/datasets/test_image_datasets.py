"""Images from folders, CSV files and torchvision's sets: what is found, how it is divided, and what is refused."""

from __future__ import annotations

import gzip
import os
import string
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuneforge import Data, DataError, Split, UnknownNameError, UsageError
from tuneforge.builtin.datasets.images import image_splits
from tuneforge.builtin.datasets.images.image_datasets import ImageCsv, ImageFolder, TorchvisionDataset
from tuneforge.builtin.datasets.images.image_splits import split_stratified
from tuneforge.engine.context.distributed import ProcessGroup


def run_of(seed: int = 0, **fields: Any) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        data_seed=seed,
        restoring=False,
        expected_inputs=None,
        single_split=False,
        run_dir=None,
        process_group=ProcessGroup(),
        **fields,
    )


def image(path: Path, level: int = 0, *, side: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), level).save(path, format="PNG")
    return path


def folder_of(root: Path, counts: dict[str, int], *, start: int = 0) -> Path:
    """A folder a class; each image has its own gray level."""
    level = start
    for name, count in counts.items():
        for number in range(count):
            image(root / name / f"{number:03d}.png", level % 256)
            level += 1
    return root


def folder_data(path: Path, *, seed: int = 0, **options: Any) -> Data:
    return ImageFolder(path=path, **{"size": 4, "grayscale": True, **options}).data_prepare(run_of(seed))


def labels_of(data: Data, split: str) -> list[str]:
    return [data.targets.labels[code] for code in data.splits()[split].targets.tolist()]


def levels_of(split: Split) -> list[int]:
    return split.fetch(torch.arange(len(split)))[:, 0, 0, 0].tolist()


def test_class_folders_are_split_stratified_by_class(tmp_path: Path) -> None:
    data = folder_data(folder_of(tmp_path, {"cat": 20, "ant": 10}), val=0.1, test=0.3)
    assert data.targets.labels == ("ant", "cat")
    counts = {split: Counter(labels_of(data, split)) for split in ("train", "val", "test")}
    assert counts == {"train": {"cat": 12, "ant": 6}, "val": {"cat": 2, "ant": 1}, "test": {"cat": 6, "ant": 3}}


def test_every_image_is_in_one_split_with_its_own_label_and_id(tmp_path: Path) -> None:
    data = folder_data(folder_of(tmp_path, {"a": 30, "b": 40}))
    seen = []
    for name, split in data.splits().items():
        for row, (level, label) in enumerate(zip(levels_of(split), labels_of(data, name), strict=True)):
            assert split.id_of(row) == f"{label}/{level if label == 'a' else level - 30:03d}.png"
            seen.append(level)
    assert sorted(seen) == list(range(70))


def test_the_seed_decides_the_division_and_nothing_else_does(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 30, "b": 40})
    splits = [levels_of(folder_data(tmp_path, seed=seed).test) for seed in (3, 3, 4)]
    assert splits[0] == splits[1] != splits[2]


def test_another_class_does_not_move_the_images_of_the_others(tmp_path: Path) -> None:
    folder_of(tmp_path, {"b": 20, "c": 20})
    before = folder_data(tmp_path)
    folder_of(tmp_path, {"a": 20}, start=100)
    after = folder_data(tmp_path)
    assert [level for level in levels_of(after.test) if level < 100] == levels_of(before.test)


def test_split_folders_are_kept_and_classes_go_by_name(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"a": 3, "b": 3, "c": 3})
    folder_of(tmp_path / "valid", {"c": 2, "a": 1}, start=100)
    folder_of(tmp_path / "test", {"b": 1}, start=200)
    data = folder_data(tmp_path)
    assert [Counter(labels_of(data, split)) for split in ("train", "val", "test")] == [
        {"a": 3, "b": 3, "c": 3},
        {"c": 2, "a": 1},
        {"b": 1},
    ]
    assert levels_of(data.test) == [200]
    assert "val has no images of 'b'" in data.notes


def test_a_missing_split_is_taken_from_train(tmp_path: Path) -> None:
    folder_of(tmp_path / "training", {"a": 10, "b": 10})
    folder_of(tmp_path / "test", {"a": 1, "b": 1}, start=200)
    data = folder_data(tmp_path, val=0.2)
    assert [len(split) for split in data.splits().values()] == [16, 4, 2]
    assert levels_of(data.test) == [200, 201]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = folder_data(folder_of(tmp_path, {"train": 5, "tram": 5}))
    assert data.targets.labels == ("train", "tram")


def test_a_class_that_train_lacks_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"a": 3, "b": 3})
    folder_of(tmp_path / "val", {"a": 3, "zebra": 3})
    with pytest.raises(DataError) as caught:
        folder_data(tmp_path)
    assert caught.value.what == "val has a class that train lacks: 'zebra'"
    assert caught.value.why == "train has 'a', 'b'"


def test_two_folders_for_one_split_are_an_error(tmp_path: Path) -> None:
    for name in ("train", "val", "validation"):
        folder_of(tmp_path / name, {"a": 3, "b": 3})
    with pytest.raises(DataError, match="'val' and 'validation' both name the split val"):
        folder_data(tmp_path)


def test_a_test_folder_without_classes_is_skipped_with_a_note(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"a": 10, "b": 10})
    image(tmp_path / "test" / "unknown.png")
    data = folder_data(tmp_path)
    assert len(data.test) == 4
    assert f"skipped '{tmp_path / 'test'}', which has no class folder with images" in data.notes


def test_hidden_foreign_and_broken_entries_are_skipped_and_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 3, "b": 3})
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (tmp_path / "a" / name).write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    image(tmp_path / "loose.png")
    data = folder_data(tmp_path)
    assert sum(map(len, data.splits().values())) == 6
    assert data.notes == (
        f"skipped 1 image outside of class folders in '{tmp_path}'",
        "skipped because a broken link or not a file: 1 entry",
        "skipped because hidden: 2 entries",
        "skipped because not an image file by its extension: 2 entries",
    )


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 3, "b/deep/er": 3})
    (tmp_path / "b" / "deep" / "again").symlink_to(tmp_path / "b")
    data = folder_data(tmp_path)
    assert sum(map(len, data.splits().values())) == 6
    assert "skipped because a link to another place in the same data, whose images are listed there: 1 entry" in (
        data.notes
    )


def test_a_folder_elsewhere_is_entered_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "data", {"a": 3, "b": 3})
    folder_of(tmp_path, {"elsewhere": 3}, start=6)
    for name in ("one", "two"):
        (tmp_path / "data" / "b" / name).symlink_to(tmp_path / "elsewhere")
    data = folder_data(tmp_path / "data")
    assert sum(map(len, data.splits().values())) == 9
    assert "skipped because a folder linked twice: 1 entry" in data.notes


def test_names_may_hold_line_breaks_and_odd_bytes(tmp_path: Path) -> None:
    folder_of(tmp_path, {"b": 3})
    odd = os.fsencode(tmp_path) + b"/caf\xe9\n"
    os.mkdir(odd)
    for number in range(3):
        image(tmp_path / "plain.png", number)
        os.rename(tmp_path / "plain.png", odd + b"/\xff\n%d.png" % number)
    data = folder_data(tmp_path)
    assert data.targets.labels == ("b", "caf\\xe9\\n")
    ids = {split.id_of(row) for split in data.splits().values() for row in range(len(split))}
    assert "caf\\xe9\\n/\\xff\\n0.png" in ids
    assert all(len(split.fingerprint()) == 64 for split in data.splits().values())


def test_the_order_is_that_of_the_names_whatever_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, {"a": 9, "b": 9})
    expected = levels_of(folder_data(tmp_path).train)
    scandir = os.scandir

    class Reversed(list[Any]):
        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(list(scandir(path))[::-1]))
    assert levels_of(folder_data(tmp_path).train) == expected


@pytest.mark.parametrize(
    ("counts", "what", "fix"),
    [
        ({}, "has no class folder with images", "create one folder of images per class"),
        ({"a": 3, "b": 0}, "class 'b' has no images", "add images to the folder or remove it"),
        ({"a": 5}, "there is only one class, 'a'", "add images of at least one more class"),
        ({"a": 5, "b": 1}, "class 'b' has 1 image, too few to split", "add images"),
        ({"a": 5, "b": 2}, "class 'b' has 2 images, too few to split", "add images"),
    ],
)
def test_too_little_is_a_data_error_with_a_way_out(tmp_path: Path, counts: dict[str, int], what: str, fix: str) -> None:
    folder_of(tmp_path, counts)
    for name in counts:
        (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(DataError) as caught:
        folder_data(tmp_path)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.why
    assert caught.value.exit_code == 65


def test_a_missing_folder_and_a_file_in_its_place_are_data_errors(tmp_path: Path) -> None:
    for path, why in [(tmp_path / "none", "nothing exists"), (image(tmp_path / "a.png"), "it is a file")]:
        with pytest.raises(DataError, match=f"there is no folder '.*'; at --data.path; {why}"):
            folder_data(path)


def test_images_without_class_folders_are_a_data_error(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"1 image directly in it, so their class is unknown"):
        folder_data(tmp_path)


@pytest.mark.parametrize("memory_mb", [None, 0])
def test_broken_images_are_named_and_counted_before_training(tmp_path: Path, memory_mb: int | None) -> None:
    folder_of(tmp_path / "train", {"a": 3, "b": 3})
    for name in ("val", "test"):
        folder_of(tmp_path / name, {"a": 1, "b": 1})
    for number in (0, 2):
        (tmp_path / "train" / "b" / f"{number:03d}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cannot use 'train/b/000\.png', and 1 more;"):
        folder_data(tmp_path, memory_mb=memory_mb)


def test_more_images_than_memory_are_decoded_on_demand_and_come_out_the_same(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 10, "b": 10})
    held, streamed = folder_data(tmp_path), folder_data(tmp_path, memory_mb=0)
    assert held.train.in_memory
    assert not streamed.train.in_memory
    assert held.notes == ()
    assert "decoded on demand" in streamed.notes[0]
    rows = torch.tensor([3, 1])
    assert torch.equal(held.train.fetch(rows), streamed.train.fetch(rows))
    assert (held.inputs.mean, held.inputs.std) == (streamed.inputs.mean, streamed.inputs.std)


def test_the_budget_is_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, {"a": 10, "b": 10})
    monkeypatch.setattr(image_splits, "free_memory_mb", lambda: 1)
    assert folder_data(tmp_path, size=4).notes == ()
    assert "more than 0.5 MB (half of the free memory)" in folder_data(tmp_path, size=512).notes[0]


def test_a_file_more_takes_less_than_a_hundred_bytes(tmp_path: Path) -> None:
    folder_data(folder_of(tmp_path / "few", {"a": 5, "b": 5}), memory_mb=0)
    for number in range(4000):
        folder = tmp_path / "many" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "few" / "a" / "000.png", folder / f"a longer name, number {number:05d}.png")
    tracemalloc.start()
    data = folder_data(tmp_path / "many", memory_mb=0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, data.splits().values())) == 4000
    assert held / 4000 < 100


def test_normalization_does_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels // (1 + np.arange(3, dtype=np.uint8))).save(path)
    expected = {}
    for channels in (1, 3):
        data = ImageFolder(path=tmp_path, size=8, channels=channels).data_prepare(run_of())
        plain = (
            data.inputs.with_normalization((0.0,), (1.0,))
            .preprocess(data.train.fetch(torch.arange(len(data.train))))
            .double()
        )
        assert data.inputs.mean == pytest.approx(plain.mean(dim=(0, 2, 3)).tolist(), abs=6e-5)
        assert data.inputs.std == pytest.approx(plain.std(dim=(0, 2, 3)).tolist(), abs=6e-5)
        expected[channels] = data.inputs
    monkeypatch.setattr(image_splits, "_CHUNK_SIZE", 3)
    for channels, inputs in expected.items():
        again = ImageFolder(path=tmp_path, size=8, channels=channels).data_prepare(run_of()).inputs
        assert (again.mean, again.std) == (inputs.mean, inputs.std)


def test_a_streamed_split_is_fingerprinted_by_its_files_and_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 10, "b": 10})
    first, again = (folder_data(tmp_path, memory_mb=0).train for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert first.inputs_fingerprint() == again.inputs_fingerprint()
    path = tmp_path / first.id_of(0)
    os.utime(path, ns=(0, 1))
    assert first.inputs_fingerprint() == again.inputs_fingerprint()  # it is taken once
    other = folder_data(tmp_path, memory_mb=0).train
    assert other.inputs_fingerprint() != first.inputs_fingerprint()
    assert other.fingerprint() != first.fingerprint()


def test_free_memory_is_asked_of_the_system() -> None:
    assert 0 < image_splits.free_memory_mb() < 2**24


def test_normalization_is_measured_on_training_alone(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"a": 50, "b": 50})
    for name in ("val", "test"):
        folder_of(tmp_path / name, {"a": 5, "b": 5}, start=200)
    data = folder_data(tmp_path)
    levels = torch.arange(100.0).double() / 255
    assert data.inputs.mean == (round(levels.mean().item(), 4),)
    assert data.inputs.std == pytest.approx((levels.std().item(),), abs=2e-3)
    ready = data.inputs.preprocess(data.train.fetch(torch.arange(100)))
    assert ready.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"normalize": "imagenet", "grayscale": False}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"normalize": "none"}, (0.0,), (1.0,)),
        ({"mean": (0.5,), "std": (0.25,)}, (0.5,), (0.25,)),
        ({"normalize": "imagenet", "channels": 1}, (0.449,), (0.226,)),
    ],
)
def test_normalization_may_be_named(tmp_path: Path, options: dict[str, Any], mean: Any, std: Any) -> None:
    data = folder_data(folder_of(tmp_path, {"a": 3, "b": 3}), **options)
    assert (data.inputs.mean, data.inputs.std) == (mean, std)


def test_a_tuned_models_normalization_holds_for_other_data(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 3, "b": 3})
    known = folder_data(tmp_path, mean=(0.5,), std=(0.25,))
    run = run_of(data=known)
    run.restoring = True
    assert ImageFolder(path=tmp_path, size=4, grayscale=True).data_prepare(run).inputs.mean == (0.5,)


def test_limit_keeps_so_many_of_each_class(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 30, "b": 5})
    data = folder_data(tmp_path, limit=10)
    assert Counter(label for split in data.splits() for label in labels_of(data, split)) == {"a": 10, "b": 5}


@pytest.mark.parametrize(("fit", "ops"), [("crop", 2), ("pad", 2), ("stretch", 1)])
def test_every_fit_makes_images_square(tmp_path: Path, fit: str, ops: int) -> None:
    for name in ("a", "b"):
        for number in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (9, 4 + number)).save(tmp_path / name / f"{number}.jpg")
    data = ImageFolder(path=tmp_path, size=6, fit=fit).data_prepare(run_of())
    assert data.train.fetch(torch.tensor([0])).shape == (1, 3, 6, 6)
    assert len(data.inputs.ops) == ops
    assert data.example().shape == (2, 3, 6, 6)


def test_stored_inputs_replay_what_the_split_holds(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a": 3, "b": 3})
    data = folder_data(tmp_path, invert=True, size=8)
    path = tmp_path / data.train.id_of(0)
    assert torch.equal(data.inputs.decode(path), data.train.fetch(torch.tensor([0]))[0])


def test_stratified_gives_every_split_one_of_each_class() -> None:
    codes = np.repeat([0, 1], [3, 100])
    rows = split_stratified(codes, ("few", "many"), {"val": 0.1, "test": 0.1}, seed=0)
    assert {split: np.bincount(codes[chosen]).tolist() for split, chosen in rows.items()} == {
        "train": [1, 80],
        "val": [1, 10],
        "test": [1, 10],
    }
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(103))


def test_large_fractions_of_a_small_class_leave_training_samples() -> None:
    rows = split_stratified(np.zeros(4, np.int64), ("a",), {"val": 0.4, "test": 0.5}, seed=0)
    assert {split: len(chosen) for split, chosen in rows.items()} == {"train": 1, "val": 1, "test": 2}


def test_fractions_that_leave_no_training_split_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"val 0\.5 and test 0\.6 leave nothing for training"):
        folder_data(folder_of(tmp_path, {"a": 30, "b": 30}), val=0.5, test=0.6)


def csv_of(root: Path, text: str) -> Path:
    for number in range(8):
        image(root / f"{number}.png", number)
    path = root / "list.csv"
    path.write_bytes(text.encode("utf-8-sig"))
    return path


ROWS = "".join(f"{number}.png,{'even' if number % 2 == 0 else 'odd'}\n" for number in range(8))


def csv_data(path: Path, **options: Any) -> Data:
    return ImageCsv(path=path, size=4, grayscale=True, **options).data_prepare(run_of())


def test_a_csv_gives_images_with_their_labels(tmp_path: Path) -> None:
    data = csv_data(csv_of(tmp_path, "path,label\n" + ROWS))
    assert data.targets.labels == ("even", "odd")
    for name, split in data.splits().items():
        assert [level % 2 for level in levels_of(split)] == split.targets.tolist()
        assert all(split.id_of(row) == f"{level}.png" for row, level in enumerate(levels_of(split))), name


def test_a_csv_with_other_columns_separator_and_root(tmp_path: Path) -> None:
    csv_of(tmp_path, "")
    path = tmp_path / "elsewhere" / "list.csv"
    path.parent.mkdir()
    path.write_text("kind;file\n" + "".join(f"k{number % 2};{number}.png\n" for number in range(8)))
    data = csv_data(path, image="file", label="kind", root=tmp_path)
    assert data.targets.labels == ("k0", "k1")


def test_a_csv_may_say_the_split(tmp_path: Path) -> None:
    rows = "".join(
        f"{number}.png,{'even' if number % 2 == 0 else 'odd'},{split}\n"
        for number, split in enumerate(["train"] * 4 + ["Val"] * 2 + ["test"] * 2)
    )
    data = csv_data(csv_of(tmp_path, "path,label,split\n" + rows))
    assert [levels_of(split) for split in data.splits().values()] == [[0, 1, 2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "has no rows"),
        ("", "has no column 'path'"),
        ("path,labels\n" + ROWS, "has no column 'label'.*did you mean 'labels'"),
        ("path,label\n0.png,\n", "row at line 2 has no label"),
        ("path,label\n0.png\n", "row at line 2 has no label"),
        ("path,label\n,a\n", "row at line 2 has no path"),
        ("path,label\n0.png,a\nx.png,a\ny.png,b\n", "2 images of 3 do not exist, the first: 'x.png'.*line 3"),
        ("path,label,split\n0.png,a,holdout\n", "row at line 2 has the split 'holdout'"),
    ],
)
def test_a_wrong_csv_is_a_data_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        csv_data(csv_of(tmp_path, text))


def test_a_missing_csv_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read '.*none.csv'; at --data.path; No such file"):
        csv_data(tmp_path / "none.csv")


def idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write the format of MNIST's files (http://yann.lecun.com/exdb/mnist): magic number, sizes, bytes."""
    kind = {1: 0x08, 4: 0x0C}[array.itemsize]
    header = bytes([0, 0, kind, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


def idx_pair(folder: Path, images: str, labels: str, codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(len(codes)).integers(0, 256, (len(codes), 28, 28), dtype=np.uint8)
    idx(folder / images, pixels)
    idx(folder / labels, codes.astype(np.uint8))
    return pixels


def torchvision_data(root: Path, dataset: str, **options: Any) -> Data:
    return TorchvisionDataset(dataset=dataset, root=root, **{"size": 28, **options}).data_prepare(run_of())


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_sets_in_the_format_of_mnist_are_read_from_disk(tmp_path: Path, name: str) -> None:
    raw = tmp_path / name / "raw"
    idx_pair(raw, "train-images-idx3-ubyte", "train-labels-idx1-ubyte", np.arange(100) % 10)
    images = idx_pair(raw, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", np.arange(20) % 10)
    data = torchvision_data(tmp_path, name, val=0.2)
    assert [len(split) for split in data.splits().values()] == [80, 20, 20]
    assert torch.equal(data.test.fetch(torch.arange(20))[:, 0], torch.from_numpy(images))
    assert data.test.targets.tolist() == [*range(10)] * 2
    assert data.test.id_of(3) == "test/3"
    assert data.train.in_memory
    assert data.inputs.decode(np.zeros((40, 40, 3), np.uint8)).shape == (1, 28, 28)
    if name == "MNIST":
        assert data.targets.labels == tuple(string.digits)


def emnist(root: Path) -> np.ndarray[Any, Any]:
    for split, count in (("train", 620), ("test", 124)):
        images = idx_pair(
            root / "EMNIST" / "raw",
            f"emnist-byclass-{split}-images-idx3-ubyte",
            f"emnist-byclass-{split}-labels-idx1-ubyte",
            np.arange(count) % 62,
        )
    return images


def test_emnist_is_turned_upright_and_named_by_its_characters(tmp_path: Path) -> None:
    images = emnist(tmp_path)
    data = torchvision_data(tmp_path, "EMNIST")
    assert data.targets.labels == tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
    assert torch.equal(data.test.fetch(torch.arange(124))[:, 0], torch.from_numpy(images).transpose(1, 2))


def test_emnist_letters_can_be_one_class_other_of_a_given_fraction(tmp_path: Path) -> None:
    emnist(tmp_path)
    data = torchvision_data(tmp_path, "EMNIST", other_share=0.4)
    assert data.targets.labels == (*string.digits, "other")
    counts = Counter(labels_of(data, "test"))
    assert counts["other"] == round(20 * 0.4 / 0.6)
    assert all(counts[digit] == 2 for digit in string.digits)
    every = Counter(label for split in ("train", "val") for label in labels_of(data, split))
    assert every["other"] / every.total() == pytest.approx(0.4, abs=0.01)


def test_fewer_others_than_requested_are_all_used_with_a_note(tmp_path: Path) -> None:
    emnist(tmp_path)
    data = torchvision_data(tmp_path, "EMNIST", other_share=0.9)
    assert "test has 104 others, fewer than the requested 180" in data.notes


def test_others_of_a_set_without_letters_are_an_error(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for images in ("train", "t10k"):
        idx_pair(raw, f"{images}-images-idx3-ubyte", f"{images}-labels-idx1-ubyte", np.arange(50) % 10)
    with pytest.raises(DataError, match="does not have digits and other characters"):
        torchvision_data(tmp_path, "MNIST", other_share=0.4)


def test_qmnist_takes_the_class_from_its_eight_columns(tmp_path: Path) -> None:
    raw = tmp_path / "QMNIST" / "raw"
    for split, count in (("train", 60), ("test", 20)):
        labels = np.zeros((count, 8), np.int32)
        labels[:, 0] = np.arange(count) % 10
        idx(raw / f"qmnist-{split}-images-idx3-ubyte", np.zeros((count, 28, 28), np.uint8))
        idx(raw / f"qmnist-{split}-labels-idx2-int", labels)
    assert torchvision_data(tmp_path, "QMNIST").test.targets.tolist() == [*range(10)] * 2


def test_cifar_keeps_its_colors_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle  # noqa: TID251 - the format that CIFAR10 is published in; torchvision reads it
    from hashlib import md5

    from torchvision import datasets

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3072), dtype=np.uint8)
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    contents = {
        "data_batch_1": {"data": pixels, "labels": [*range(10)] * 3},
        "test_batch": {"data": pixels[:10], "labels": [*range(10)]},
        "batches.meta": {"label_names": names},
    }
    sums = {}
    for name, content in contents.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    )
    data = torchvision_data(tmp_path, "CIFAR10", size=32)
    assert torch.equal(data.test.fetch(torch.arange(10)), torch.from_numpy(pixels[:10]).reshape(10, 3, 32, 32))
    assert data.targets.labels == tuple(names)


def test_a_set_of_files_is_read_as_torchvision_lists_it(tmp_path: Path) -> None:
    for name in ("Forest", "River"):
        for number in range(4):
            image(tmp_path / "eurosat" / "2750" / name / f"{name}_{number}.png", number, side=8)
    data = torchvision_data(tmp_path, "EuroSAT", size=8)
    assert data.targets.labels == ("Forest", "River")
    assert sum(map(len, data.splits().values())) == 8


def test_larger_than_memory_arrays_are_resized_on_demand(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for images in ("train", "t10k"):
        idx_pair(raw, f"{images}-images-idx3-ubyte", f"{images}-labels-idx1-ubyte", np.arange(50) % 10)
    held, streamed = (torchvision_data(tmp_path, "MNIST", size=64, memory_mb=budget) for budget in (None, 0))
    assert not streamed.train.in_memory
    assert torch.equal(held.test.fetch(torch.arange(50)), streamed.test.fetch(torch.arange(50)))
    assert held.inputs.std == streamed.inputs.std


def test_a_set_that_is_not_there_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        torchvision_data(tmp_path, "MNIST")
    assert caught.value.what == "cannot load MNIST"
    assert caught.value.why == "Dataset not found"
    assert "--data.download true" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_broken_set_is_a_data_error(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    idx_pair(raw, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", np.arange(50) % 10)
    (raw / "train-images-idx3-ubyte").write_bytes(gzip.compress(b"not what it says"))
    (raw / "train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match="cannot load MNIST"):
        torchvision_data(tmp_path, "MNIST")


@pytest.mark.parametrize(("name", "near"), [("mnist", "MNIST"), ("CIFAR-10", "CIFAR10"), ("zzz", "known: CIFAR10")])
def test_an_unknown_set_offers_the_nearest(tmp_path: Path, name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=near):
        torchvision_data(tmp_path, name)


def test_declaring_options_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, tuneforge.builtin.datasets.images.image_datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
