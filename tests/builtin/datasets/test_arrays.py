import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tuneforge import DataError, OptionError, UsageError
from tuneforge.builtin.datasets.tables.arrays import ArrayData, TensorInputs, data_from_arrays
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets
from tuneforge.engine.session.components import resolve_component
from tuneforge.plugin.declaration import build_component, get_option_values
from tuneforge.plugin.hooks import RegisteredComponent, find_hook_implementations

X = np.arange(60, dtype=np.float64).reshape(30, 2)
Y = np.arange(30) % 3


def prepared(*args, seed=0, known=None, **options):
    run = SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        data_seed=seed,
        restoring=known is not None,
        single_split=False,
        data=known,
        float_dtype=torch.float32,
    )
    return data_from_arrays(*args, **options).data_prepare(run)


def sizes(data):
    return {name: len(split) for name, split in data.splits().items()}


def stored(split):
    return split.fetch(torch.arange(len(split)))


class Pairs(Dataset):
    """Pairs made on demand."""

    def __init__(self, make, size=30):
        self.make, self.size, self.asked = make, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.asked.append(index)
        return self.make(index)


class TestScales:
    @pytest.mark.parametrize("scales", [(1, 10_000), (0.001, 1), (5_000, 5_000)])
    def test_unlike_or_large_scales_are_noted_unless_they_are_standardized(self, scales):
        x = np.random.default_rng(0).normal(size=(30, 2)) * scales
        (note,) = [note for note in prepared(x, Y).notes if "scales" in note]
        assert "standardize=True" in note
        assert not any("scales" in note for note in prepared(x, Y, standardize=True).notes)

    @pytest.mark.parametrize("x", [X, X.astype(np.int64) * 10_000, (X * 4000).reshape(30, 1, 2), X * [1, 0]])
    def test_like_scales_and_other_inputs_than_tables_are_not_noted(self, x):
        assert not any("scales" in note for note in prepared(x, Y).notes)


class TestKinds:
    @pytest.mark.parametrize(
        ("y", "names"),
        [
            (Y, ("0", "1", "2")),
            (Y * 5 + 2, ("2", "7", "12")),
            (np.array(["b", "a", "c"])[Y], ("a", "b", "c")),
            (np.array(["b", "a", "c"])[Y].tolist(), ("a", "b", "c")),
            (np.array(["b", "a", "c"], dtype=object)[Y], ("a", "b", "c")),
            (Y == 1, ("False", "True")),
            (torch.from_numpy(Y), ("0", "1", "2")),
            (Y[:, None], ("0", "1", "2")),
        ],
    )
    def test_integers_text_and_truth_values_are_classes(self, y, names):
        data = prepared(X, y)
        assert isinstance(data.targets, ClassTargets)
        assert data.targets.names == names
        assert data.train.targets.dtype == torch.int64

    def test_a_class_is_what_its_name_says(self):
        words = np.array(["b", "a", "c"])[Y]
        data = prepared(X, words)
        for split in data.splits().values():
            rows = [int(split.id_of(row)) for row in range(len(split))]
            assert [data.targets.names[code] for code in split.targets.tolist()] == words[rows].tolist()
            assert torch.equal(stored(split), torch.from_numpy(X[rows]).float())

    def test_names_are_given_by_index_or_in_the_order_wanted(self):
        by_index = prepared(X, Y, names=("no", "maybe", "yes"))
        by_order = prepared(X, np.array(["no", "maybe", "yes"])[Y], names=("yes", "maybe", "no"))
        assert by_index.targets.names == ("no", "maybe", "yes")
        assert torch.equal(by_order.train.targets, 2 - by_index.train.targets)

    def test_floats_are_standardized_with_the_training_split(self):
        y = np.linspace(100, 500, 30) ** 1.5
        data = prepared(X, y, names=("price",), units=("EUR",))
        assert isinstance(data.targets, RegressionTargets)
        assert data.train.targets.mean().item() == pytest.approx(0, abs=1e-6)
        assert data.train.targets.std(correction=0).item() == pytest.approx(1, abs=1e-6)
        for split in data.splits().values():
            rows = [int(split.id_of(row)) for row in range(len(split))]
            told = [data.targets.describe(target[None])["value"] for target in split.targets]
            assert told == pytest.approx(y[rows].tolist(), rel=1e-6)
        assert data.targets.describe(data.test.targets[:1])["unit"] == "EUR"

    def test_a_matrix_of_floats_is_multi_output_regression(self):
        data = prepared(X, X * [1.0, 3.0] + 0.5)
        assert data.targets.names == ("value0", "value1")
        assert data.train.targets.shape == (18, 2)

    @pytest.mark.parametrize("dtype", [np.int64, np.float32, bool, np.uint8])
    def test_a_matrix_of_noughts_and_ones_is_label_sets(self, dtype):
        y = np.stack([Y == 0, Y < 2], 1).astype(dtype)
        data = prepared(X, y, names=("first", "low"))
        assert isinstance(data.targets, MultilabelTargets)
        assert data.train.targets.dtype == torch.float32
        rows = [int(data.test.id_of(row)) for row in range(len(data.test))]
        assert data.test.targets.tolist() == y[rows].astype(float).tolist()

    def test_the_inferred_target_kind_is_noted(self):
        assert "3 classes" in prepared(X, Y).notes[-1]
        assert "give integers for classes" in prepared(X, Y.astype(float)).notes[-1]


class TestSplits:
    def test_splits_are_stratified_by_class(self):
        data = prepared(X, Y)
        assert sizes(data) == {"train": 18, "val": 6, "test": 6}
        for split, count in (("train", 6), ("val", 2), ("test", 2)):
            assert data.splits()[split].targets.bincount().tolist() == [count] * 3

    def test_splits_share_no_sample_and_lose_none(self):
        data = prepared(X, Y)
        ids = [split.id_of(row) for split in data.splits().values() for row in range(len(split))]
        assert sorted(map(int, ids)) == list(range(30))

    def test_the_seed_decides_and_decides_alone(self):
        first, again, other = (prepared(X, Y, seed=seed).train.ids for seed in (1, 1, 2))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("count", [3, 4, 5])
    def test_the_smallest_classes_are_in_every_split(self, count):
        data = prepared(np.zeros((2 * count, 1)), [0, 1] * count)
        assert all(split.targets.unique().tolist() == [0, 1] for split in data.splits().values())

    def test_given_splits_are_taken_as_they_are(self):
        data = prepared(X, Y, x_val=X[:3], y_val=Y[:3], x_test=X[3:9], y_test=Y[3:9])
        assert sizes(data) == {"train": 30, "val": 3, "test": 6}
        assert torch.equal(stored(data.test), torch.from_numpy(X[3:9]).float())

    def test_only_what_is_not_given_is_drawn(self):
        assert sizes(prepared(X, Y, x_test=X[:3], y_test=Y[:3])) == {"train": 24, "val": 6, "test": 3}

    def test_a_given_class_that_training_lacks_offers_the_nearest(self):
        with pytest.raises(DataError, match="did you mean 'zebra'"):
            prepared(X, np.array(["zebra", "lion", "gnu"])[Y], x_val=X[:1], y_val=["zebar"])

    @pytest.mark.parametrize("given_y", [np.array([0.5]), np.array(["a"]), np.array([[0, 1]])])
    def test_targets_of_another_kind_in_a_given_split_are_an_error(self, given_y):
        with pytest.raises(DataError):
            prepared(X, Y, x_val=X[:1], y_val=given_y)

    @pytest.mark.parametrize("given_x", [X[:1, :1], (X[:1] > 3), {"a": X[:1]}])
    def test_given_samples_of_another_shape_or_type_are_refused(self, given_x):
        with pytest.raises(DataError, match="prepare all splits in the same way"):
            prepared(X, Y, x_val=given_x, y_val=Y[:1])

    @pytest.mark.parametrize("shares", [{"val": 0.5, "test": 0.5}, {"val": 1.0}, {"test": -0.1}])
    def test_fractions_that_leave_no_training_split_are_an_error(self, shares):
        with pytest.raises(OptionError):
            data_from_arrays(X, Y, **shares)


class TestRefusals:
    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            ([], [], "0 samples"),
            (X, Y[:-1], "30 samples and 29 targets"),
            (X, np.zeros(30, int), "only one class, '0'"),
            (X[:4], [0, 0, 0, 1], r"class '1' has 1 sample\(s\)"),
            (X, [math.nan] * 30, r"30 target\(s\) are NaN"),
            (X, ["a", None] * 15, "mixed types"),
            (X, Y + 1j, "targets of dtype complex"),
            (X, np.stack([Y, Y], 1), "is ambiguous"),
            (X, np.zeros(30), "is 0 in every training sample"),
            (X[:2], [0.5, 1.5], r"2 sample\(s\) cannot fill every split"),
            (np.where(X == 5, math.nan, X), Y, r"NaN or Inf; at x\[2\]"),
            (np.array([["a"]] * 30), Y, "table-csv"),
            (3.0, Y, "a single number"),
            ({"a": X, "b": X[:-1]}, Y, "different lengths"),
            (X, None, "do not match"),
            ([[1, 2], [3]], [0, 1], "is not an array of numbers"),
            (X, [[0], [1, 2]], "targets are not an array"),
        ],
    )
    def test_bad_data_says_what_and_what_to_do(self, x, y, message):
        with pytest.raises(DataError, match=message) as caught:
            prepared(x, y)
        assert caught.value.fix or caught.value.why

    def test_a_name_without_samples_is_refused(self):
        with pytest.raises(DataError, match=r"class 'd' has 0 sample\(s\)"):
            prepared(X, Y, names=("a", "b", "c", "d"))

    def test_an_index_without_a_name_is_refused(self):
        with pytest.raises(DataError, match="an index must be from 0 to 1"):
            prepared(X, Y, names=("a", "b"))


class TestInputs:
    def test_a_mapping_of_arrays_stays_a_mapping(self):
        x = {"ids": np.arange(90).reshape(30, 3), "mask": np.ones((30, 3), bool)}
        data = prepared(x, Y)
        example = data.example()
        assert example["ids"].dtype == torch.int64
        assert example["mask"].dtype == torch.bool
        assert data.inputs.shapes == {"ids": (3,), "mask": (3,)}

    def test_bytes_become_floats_and_ids_stay_integers(self):
        assert prepared(np.zeros((30, 3, 2, 2), np.uint8), Y).example().dtype == torch.float32
        assert prepared(np.zeros((30, 4), np.int32), Y).example().dtype == torch.int64

    def test_an_array_that_cannot_be_written_to_will_do(self):
        frozen = X.astype(np.float32)
        frozen.flags.writeable = False
        assert sizes(prepared(frozen, Y))["train"] == 18

    @pytest.mark.parametrize("shape", [(30, 4), (30, 4, 3, 3)])
    def test_features_are_standardized_over_the_training_split(self, shape):
        x = np.random.default_rng(0).normal(5, 3, shape)
        x[:, 1] = 7.0
        data = prepared(x, Y, standardize=True)
        ready = data.inputs.preprocess(stored(data.train)).transpose(0, 1).flatten(1)
        assert ready.mean(1).tolist() == pytest.approx([0] * 4, abs=1e-5)
        assert ready.std(1, correction=0).tolist() == pytest.approx([1, 0, 1, 1], abs=1e-5)

    def test_several_inputs_are_not_standardized(self):
        with pytest.raises(DataError, match="only one tensor"):
            prepared({"a": X}, Y, standardize=True)


class TestDatasets:
    def test_a_dataset_is_fetched_on_demand(self):
        dataset = Pairs(lambda index: (torch.full((2,), float(index)), int(Y[index])))
        data = prepared(dataset)
        assert not data.train.in_memory
        dataset.asked.clear()
        assert data.test.fetch(torch.tensor([0, 1]))[:, 0].tolist() == [int(data.test.id_of(row)) for row in (0, 1)]
        assert len(dataset.asked) == 2

    def test_a_dataset_of_mappings_gives_mappings(self):
        data = prepared(Pairs(lambda index: ({"ids": [index, 1], "scale": 0.5}, "ab"[index % 2])))
        assert data.example()["ids"].shape == (2, 2)
        assert data.example()["scale"].dtype == torch.float32

    def test_a_tensor_dataset_is_in_memory(self):
        data = prepared(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)))
        assert data.train.in_memory
        assert torch.equal(stored(data.train), stored(prepared(X, Y).train))

    def test_a_loader_gives_its_dataset(self):
        loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=7, shuffle=True)
        data = prepared(loader)
        assert data.train.fingerprint() == prepared(X, Y).train.fingerprint()
        assert data.train_sampler is None

    def test_reading_many_targets_is_noted(self, monkeypatch):
        monkeypatch.setattr("tuneforge.builtin.datasets.tables.sample_arrays._LARGE_DATASET", 30)
        assert (
            "all 30 samples were read once" in prepared(Pairs(lambda index: ([float(index)], int(Y[index])))).notes[0]
        )

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda index: [1.0], r"return pairs \(input, target\)"),
            (lambda index: ("text", index % 2), "is not an array of numbers"),
            (lambda index: (torch.zeros(index + 1), index % 2), "pad or resize"),
        ],
    )
    def test_items_that_cannot_be_stacked_say_why(self, make, message):
        with pytest.raises(DataError, match=message):
            stored(prepared(Pairs(make)).train)

    def test_images_are_to_be_tensors(self):
        image = pytest.importorskip("PIL.Image").new("L", (2, 2))
        with pytest.raises(DataError, match="convert it to a tensor"):
            prepared(Pairs(lambda index: (image, index % 2)))

    def test_a_stream_is_refused(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(())

        with pytest.raises(DataError, match="has no access by index"):
            prepared(Stream())


class TestTensors:
    ONE = TensorInputs(shapes={"": (2,)}, dtypes={"": "float32"})
    TWO = TensorInputs(shapes={"ids": (2,), "mask": (2,)}, dtypes={"ids": "int64", "mask": "bool"})

    @pytest.mark.parametrize("raw", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1.0, 2.0]), b"[1, 2.0]"])
    def test_decode_gives_the_stored_form(self, raw):
        assert torch.equal(self.ONE.decode(raw), torch.tensor([1.0, 2.0]))

    def test_decode_gives_each_of_several_its_type(self):
        decoded = self.TWO.decode({"mask": [1, 0], "ids": [3.0, 4]})
        assert torch.equal(decoded["ids"], torch.tensor([3, 4]))
        assert torch.equal(decoded["mask"], torch.tensor([True, False]))

    def test_decode_reads_files_of_json_and_numpy(self, tmp_path):
        (tmp_path / "row.json").write_text("[1, 2]")
        np.save(tmp_path / "row.npy", np.array([1.0, 2.0]))
        for name in ("row.json", "row.npy"):
            assert self.ONE.decode(tmp_path / name).tolist() == [1.0, 2.0]

    def test_decode_never_opens_a_pickle(self):
        file = io.BytesIO()
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(DataError, match=r"neither JSON nor an \.npy file"):
            self.ONE.decode(file.getvalue())

    @pytest.mark.parametrize(
        ("inputs", "raw", "message"),
        [
            (ONE, [1, 2, 3], r"shape \(3,\)"),
            (ONE, [1, math.nan], "NaN or Inf"),
            (ONE, ["a", "b"], "not an array of numbers"),
            (ONE, {"a": 1}, "give the list"),
            (ONE, b"{", "neither JSON"),
            (TWO, [1, 2], "give a mapping of ids, mask"),
            (TWO, {"ids": [1, 2]}, "'mask' is missing"),
            (TWO, {"ids": [1, 2], "mask": [1, 1], "maks": [1, 1]}, "did you mean 'mask'"),
            (TWO, {"ids": [1.5, 2], "mask": [1, 1]}, "not an integer"),
        ],
    )
    def test_decode_refuses_what_does_not_fit(self, inputs, raw, message):
        with pytest.raises(DataError, match=message):
            inputs.decode(raw)

    def test_ready_standardizes_along_the_first_axis_of_a_sample(self):
        inputs = TensorInputs(means=(1.0, 2.0), scales=(2.0, 4.0))
        assert inputs.preprocess(torch.tensor([[3.0, 2.0]])).tolist() == [[1.0, 0.0]]
        assert inputs.preprocess(torch.ones(1, 2, 3, 3))[0, :, 0, 0].tolist() == [0.0, -0.25]

    def test_options_survive_json(self):
        inputs = prepared({"a": X, "b": Y[:, None]}, Y).inputs
        again = build_component(TensorInputs, json.loads(json.dumps(get_option_values(inputs))), where="-")
        assert get_option_values(again) == get_option_values(inputs)
        assert prepared(X, Y, standardize=True).inputs.decode([1.0, 2.0]).tolist() == [1.0, 2.0]


class TestComponent:
    def test_the_manager_finds_its_hook_and_its_options_are_plain(self):
        arrays = data_from_arrays(X, Y, val=0.1, names=("a", "b", "c"))
        assert [each.hook for each in find_hook_implementations(RegisteredComponent(arrays, "arrays", "arrays"))] == [
            "data_prepare"
        ]
        assert json.loads(json.dumps(get_option_values(arrays)))["names"] == ["a", "b", "c"]

    def test_the_engine_takes_it_as_data(self):
        member, use = resolve_component("data_prepare", data_from_arrays(X, Y), where="--data")
        assert isinstance(member.component, ArrayData)
        assert dict(use.options)["val"] == 0.2

    def test_without_its_arrays_it_asks_for_them(self):
        run = SimpleNamespace(
            config=SimpleNamespace(seed=0),
            data_seed=0,
            restoring=False,
            single_split=False,
            float_dtype=torch.float32,
        )
        with pytest.raises(DataError, match="pass them again"):
            ArrayData().data_prepare(run)

    def test_a_pair_a_dataset_and_a_loader_are_taken_alone(self):
        dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
        run = SimpleNamespace(
            config=SimpleNamespace(seed=0),
            data_seed=0,
            restoring=False,
            single_split=False,
            float_dtype=torch.float32,
        )
        found = [
            ArrayData.from_object(each).data_prepare(run).train.fingerprint()
            for each in ((X, Y), dataset, DataLoader(dataset))
        ]
        assert len(set(found)) == 1

    def test_anything_else_is_no_data(self):
        with pytest.raises(UsageError, match="int is not a data source"):
            ArrayData.from_object(3)

    def test_a_tuned_models_classes_and_scales_hold_for_other_arrays(self):
        tuned = prepared(X, np.array(["a", "b", "c"])[Y], standardize=True)
        other = prepared(X[:8] + 5, list("bcbcbcbc"), standardize=True, known=tuned)
        assert other.targets.names == ("a", "b", "c")
        assert get_option_values(other.inputs) == get_option_values(tuned.inputs)
        numbers = prepared(X, X[:, 0] * 3)
        assert get_option_values(prepared(X[:9], X[:9, 0], known=numbers).targets) == get_option_values(numbers.targets)
