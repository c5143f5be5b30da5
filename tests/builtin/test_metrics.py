import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn import metrics as judge
from torch.nn import functional as F

from tuneforge import DataError
from tuneforge.builtin.metrics import Classification, Multilabel, Regression
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets

NEAR = {"rel": 1e-6, "abs": 1e-6}


def run_of(targets):
    return SimpleNamespace(data=SimpleNamespace(targets=targets))


def classes(number):
    return run_of(ClassTargets(names=tuple(f"c{index}" for index in range(number))))


def compute_metrics(component, run, outputs, targets, *, parts=1):
    """Return the metrics of one evaluation in `parts` batches of uneven size."""
    metrics = component.evaluate(run)
    cuts = sorted(np.random.default_rng(parts).integers(0, len(targets), parts - 1).tolist())
    for begin, end in zip([0, *cuts], [*cuts, len(targets)], strict=True):
        metrics.update(outputs[begin:end], targets[begin:end])
    return metrics.compute()


def drawn_classes(number, samples, seed, *, missing=()):
    """Outputs that are right about half the time, and targets that never are of the `missing` classes."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([index for index in range(number) if index not in missing])
    targets = present[torch.randint(len(present), (samples,), generator=generator)]
    outputs = torch.randn(samples, number, generator=generator)
    outputs[torch.arange(samples), targets] += 2 * torch.rand(samples, generator=generator)
    return outputs, targets


def matrix_of(found):
    """The confusion matrix, which above 100 classes is put together from recalls and the wrong predictions."""
    if "confusion" in found:
        return found["confusion"]
    rows = list(found["per_class"].values())
    matrix = np.diag([round(row["recall"] * row["support"]) for row in rows])
    for label, prediction, count in found["largest_confusions"]:
        matrix[label, prediction] += count
    return matrix.tolist()


def assert_near(first, second):
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], dict):
            assert_near(first[name], second[name])
        elif isinstance(first[name], (str, list)):
            assert first[name] == second[name], name
        else:
            assert first[name] == pytest.approx(second[name], **NEAR), name


class TestClassification:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize(
        ("number", "samples", "missing"),
        [
            (2, 50, ()),
            (2, 7, (0,)),
            (3, 9, (1,)),
            (11, 400, ()),
            (11, 30, (4, 10)),
            (200, 300, ()),
            (200, 900, (0, 199)),
        ],
    )
    def test_metrics_equal_those_of_scikit_learn(self, number, samples, missing, seed):
        outputs, targets = drawn_classes(number, samples, seed, missing=missing)
        found = compute_metrics(Classification(), classes(number), outputs, targets, parts=3)
        answers = outputs.argmax(1)
        assert found["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), **NEAR)
        assert found["accuracy"] == pytest.approx(judge.accuracy_score(targets, answers), **NEAR)
        for average in ("macro", "weighted"):
            expected = judge.precision_recall_fscore_support(
                targets, answers, labels=targets.unique(), average=average, zero_division=0
            )[:3]
            assert [found[f"{name}_{average}"] for name in ("precision", "recall", "f1")] == pytest.approx(
                expected, **NEAR
            )
        names = [f"c{index}" for index in range(number)]
        report = judge.classification_report(
            targets, answers, labels=range(number), target_names=names, output_dict=True, zero_division=0
        )
        assert_near(found["per_class"], {name: report[name] for name in names})
        assert matrix_of(found) == judge.confusion_matrix(targets, answers, labels=range(number)).tolist()

    @pytest.mark.parametrize(("number", "name"), [(100, "confusion"), (101, "largest_confusions")])
    def test_whole_matrix_is_given_up_to_a_hundred_classes(self, number, name):
        found = compute_metrics(Classification(), classes(number), *drawn_classes(number, 150, seed=0))
        assert {"confusion", "largest_confusions"} & found.keys() == {name}

    def test_most_frequent_of_very_many_confusions_are_given_in_order(self):
        labels = torch.arange(1500).repeat_interleave(2)
        labels = torch.cat([labels, torch.tensor([7] * 4)])
        predicted = (labels + 1) % 1500
        predicted[0] = 5  # one sample of class 0 goes elsewhere, so that both cells of class 0 have one sample
        found = compute_metrics(Classification(), classes(1500), F.one_hot(predicted, 1500).float(), labels, parts=4)
        confusions = found["largest_confusions"]
        assert confusions[0] == [7, 8, 6]
        assert len(confusions) == 1000
        assert confusions[1:4] == [[1, 2, 2], [2, 3, 2], [3, 4, 2]]

    @pytest.mark.parametrize("number", [3, 200])
    def test_sums_of_many_samples_equal_those_of_few_at_a_time(self, number, monkeypatch):
        outputs, targets = drawn_classes(number, 400, seed=8)
        whole = compute_metrics(Classification(), classes(number), outputs, targets, parts=5)
        monkeypatch.setattr("tuneforge.builtin.metrics._MAX_PENDING", 32)
        assert_near(compute_metrics(Classification(), classes(number), outputs, targets, parts=5), whole)

    @pytest.mark.parametrize("number", [3, 200])
    def test_metrics_can_be_computed_between_updates(self, number):
        outputs, targets = drawn_classes(number, 90, seed=9)
        metrics = Classification().evaluate(classes(number))
        metrics.update(outputs[:50], targets[:50])
        assert_near(metrics.compute(), compute_metrics(Classification(), classes(number), outputs[:50], targets[:50]))
        metrics.update(outputs[50:].requires_grad_(), targets[50:])
        assert_near(metrics.compute(), compute_metrics(Classification(), classes(number), outputs, targets))

    @pytest.mark.parametrize("number", [3, 200])
    def test_first_of_equal_scores_is_the_prediction(self, number):
        outputs = torch.zeros(3, number)
        outputs[1, [1, 2]] = 5.0
        outputs[2, 0] = -math.inf
        found = compute_metrics(Classification(), classes(number), outputs, torch.tensor([0, 1, 1]))
        assert found["accuracy"] == 1.0

    @pytest.mark.parametrize(("number", "top"), [(11, 3), (11, 1), (200, 5), (4, 3)])
    def test_top_k_equals_that_of_scikit_learn(self, number, top):
        outputs, targets = drawn_classes(number, 300, seed=top)
        found = compute_metrics(Classification(top_k=top), classes(number), outputs, targets)
        expected = judge.top_k_accuracy_score(targets, outputs, k=top, labels=range(number))
        assert found[f"top{top}_accuracy"] == pytest.approx(expected, **NEAR)

    @pytest.mark.parametrize("number", [2, 3])
    def test_top_k_is_omitted_with_at_most_k_classes(self, number):
        found = compute_metrics(Classification(), classes(number), *drawn_classes(number, 20, seed=0))
        assert not [name for name in found if name.startswith("top")]

    def test_top_k_of_equal_scores_credits_only_the_first(self):
        found = compute_metrics(Classification(top_k=2), classes(4), torch.zeros(4, 4), torch.arange(4))
        assert found["top2_accuracy"] == 0.5
        assert found["accuracy"] == 0.25

    @pytest.mark.parametrize("bins", [15, 7])
    def test_calibration_error_is_that_of_guo(self, bins):
        outputs, targets = drawn_classes(5, 500, seed=3)
        confidence, answers = outputs.double().softmax(1).max(1)
        right = (answers == targets).double()
        expected = 0.0
        for index in range(bins):
            inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
            if inside.any():
                expected += inside.sum().item() / 500 * abs(right[inside].mean() - confidence[inside].mean()).item()
        assert compute_metrics(Classification(bins=bins), classes(5), outputs, targets)["ece"] == pytest.approx(
            expected, **NEAR
        )

    def test_perfect_confidence_is_perfectly_calibrated(self):
        found = compute_metrics(Classification(), classes(3), torch.eye(3) * 1000, torch.arange(3))
        assert found["ece"] == 0.0
        assert found["accuracy"] == 1.0

    @pytest.mark.parametrize("number", [2, 11, 200])
    def test_metrics_do_not_depend_on_the_batches(self, number):
        outputs, targets = drawn_classes(number, 257, seed=5)
        whole = compute_metrics(Classification(), classes(number), outputs, targets)
        split = compute_metrics(Classification(), classes(number), outputs, targets, parts=9)
        assert_near(whole, split)

    def test_a_prediction_outside_the_classes_of_a_split_lowers_recall_but_adds_no_class(self):
        outputs = torch.eye(3)[[0, 1, 2, 1]] * 5
        found = compute_metrics(Classification(), classes(3), outputs, torch.tensor([0, 1, 0, 1]))
        assert found["recall_macro"] == 0.75
        assert found["precision_macro"] == 1.0

    def test_a_class_without_samples_or_predictions_does_not_lower_the_macro_average(self):
        outputs = torch.eye(3)[[0, 1]] * 5
        found = compute_metrics(Classification(), classes(3), outputs, torch.tensor([0, 1]))
        assert found["recall_macro"] == found["f1_macro"] == 1.0
        assert found["per_class"]["c2"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0}

    def test_the_worst_class_is_the_one_of_lowest_recall_among_those_with_samples(self):
        outputs = torch.eye(4)[[0, 1, 1, 0]] * 5
        found = compute_metrics(Classification(), classes(4), outputs, torch.tensor([0, 1, 2, 0]))
        assert found["recall_min"] == 0.0
        assert found["hardest_class"] == "c2"

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_non_finite_outputs_count_as_misclassified(self, value):
        outputs = torch.eye(150)[[0, 0, 1]] * 5
        outputs[1, 0] = value
        found = compute_metrics(Classification(top_k=1), classes(150), outputs, torch.tensor([0, 0, 1]))
        assert found["accuracy"] == found["top1_accuracy"] == pytest.approx(2 / 3)
        assert found["largest_confusions"] == []
        assert found["per_class"]["c0"]["recall"] == 0.5

    def test_nan_outputs_count_as_misclassified(self):
        outputs = torch.eye(3)[[0, 0, 1]] * 5
        outputs[1] = math.nan
        found = compute_metrics(Classification(top_k=1), classes(3), outputs, torch.tensor([0, 0, 1]))
        assert math.isnan(found["loss"])
        assert math.isnan(found["ece"])
        assert found["accuracy"] == found["top1_accuracy"] == pytest.approx(2 / 3)
        assert found["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
        assert found["per_class"]["c0"] == {
            "precision": 1.0,
            "recall": 0.5,
            "f1-score": pytest.approx(2 / 3),
            "support": 2,
        }

    def test_an_impossible_class_is_a_number_like_any(self):
        outputs = torch.tensor([[2.0, -math.inf, 1.0]])
        found = compute_metrics(Classification(), classes(3), outputs, torch.tensor([0]))
        assert found["accuracy"] == 1.0
        assert math.isfinite(found["loss"])

    def test_mixed_targets_count_for_their_most_probable_class(self):
        outputs, shares = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.8, 0.2], [0.6, 0.4]])
        found = compute_metrics(Classification(), classes(2), outputs, shares)
        assert found["accuracy"] == 0.5
        assert found["loss"] == pytest.approx(F.cross_entropy(outputs, shares).item(), **NEAR)

    def test_outputs_that_do_not_fit_the_classes_are_refused(self):
        with pytest.raises(DataError, match="each label needs one output"):
            Classification().evaluate(classes(3)).update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))

    def test_targets_without_names_are_named_by_index(self):
        run = run_of(SimpleNamespace(labels=()))
        found = compute_metrics(Classification(), run, torch.eye(2), torch.arange(2))
        assert list(found["per_class"]) == ["0", "1"]


class TestMultilabel:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("number", [1, 2, 11, 200])
    def test_metrics_equal_those_of_scikit_learn(self, number, seed):
        generator = torch.Generator().manual_seed(seed)
        targets = (torch.rand(80, number, generator=generator) < 0.3).float()
        targets[:, 0] = float(seed == 1)  # a label that none has, or all
        outputs = torch.randn(80, number, generator=generator) + targets
        run = run_of(MultilabelTargets(names=tuple(f"l{index}" for index in range(number))))
        found = compute_metrics(Multilabel(threshold=0.6), run, outputs, targets, parts=4)
        given = (outputs.sigmoid() >= 0.6).numpy().astype(int)
        truth = targets.numpy().astype(int)
        assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(outputs, targets).item(), **NEAR)
        assert found["exact_match"] == pytest.approx((given == truth).all(1).mean(), **NEAR)
        assert found["hamming_loss"] == pytest.approx((given != truth).mean(), **NEAR)
        columns = [
            judge.precision_recall_fscore_support(truth[:, index], given[:, index], average="binary", zero_division=0)[
                :3
            ]
            for index in range(number)
        ]
        per_class = [[row["precision"], row["recall"], row["f1-score"]] for row in found["per_class"].values()]
        assert per_class == [pytest.approx(list(column), **NEAR) for column in columns]
        if number > 1:
            for average in ("macro", "micro"):
                expected = judge.precision_recall_fscore_support(truth, given, average=average, zero_division=0)[:3]
                ours = [found[f"{name}_{average}"] for name in ("precision", "recall", "f1")]
                assert ours == pytest.approx(expected, **NEAR)

    def test_metrics_do_not_depend_on_the_batches(self):
        outputs = torch.randn(101, 4, generator=torch.Generator().manual_seed(0))
        run, targets = run_of(MultilabelTargets(names=tuple("abcd"))), (outputs.roll(1, 0) > 0).float()
        assert_near(*(compute_metrics(Multilabel(), run, outputs, targets, parts=parts) for parts in (1, 8)))

    def test_nan_outputs_count_as_misclassified(self):
        outputs = torch.tensor([[math.nan, -1.0], [-1.0, -1.0]])
        found = compute_metrics(Multilabel(), run_of(MultilabelTargets(names=("a", "b"))), outputs, torch.zeros(2, 2))
        assert math.isnan(found["loss"])
        assert found["exact_match"] == 0.5
        assert found["hamming_loss"] == 0.25


class TestRegression:
    @pytest.mark.parametrize("seed", range(4))
    def test_metrics_of_one_output_equal_those_of_scikit_learn_in_original_units(self, seed):
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randn(90, generator=generator)
        outputs = (targets + 0.3 * torch.randn(90, generator=generator))[:, None]
        numbers = RegressionTargets(names=("price",), means=(100.0,), scales=(20.0,))
        found = compute_metrics(Regression(), run_of(numbers), outputs, targets, parts=5)
        truth, guess = targets.double() * 20 + 100, outputs[:, 0].double() * 20 + 100
        assert found == {
            "loss": pytest.approx(F.mse_loss(outputs[:, 0], targets).item(), **NEAR),
            "mae": pytest.approx(judge.mean_absolute_error(truth, guess), **NEAR),
            "rmse": pytest.approx(judge.root_mean_squared_error(truth, guess), **NEAR),
            "r2": pytest.approx(judge.r2_score(truth, guess), **NEAR),
        }

    def test_metrics_of_several_outputs_equal_those_of_scikit_learn(self):
        generator = torch.Generator().manual_seed(7)
        targets = torch.randn(64, 3, generator=generator)
        outputs = targets + torch.tensor([0.1, 0.5, 2.0]) * torch.randn(64, 3, generator=generator)
        scales = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
        numbers = RegressionTargets(names=("x", "y", "z"), units=("m",), means=(5.0,), scales=tuple(scales.tolist()))
        found = compute_metrics(Regression(), run_of(numbers), outputs, targets, parts=4)
        truth, guess = targets.double() * scales + 5, outputs.double() * scales + 5
        assert found["mae"] == pytest.approx(judge.mean_absolute_error(truth, guess), **NEAR)
        assert found["rmse"] == pytest.approx(judge.root_mean_squared_error(truth, guess), **NEAR)
        assert found["r2"] == pytest.approx(judge.r2_score(truth, guess), **NEAR)
        raw = judge.r2_score(truth, guess, multioutput="raw_values")
        assert [found["per_output"][name]["r2"] for name in "xyz"] == pytest.approx(raw.tolist(), **NEAR)

    def test_r2_is_stable_far_from_zero(self):
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        targets = 1e8 + noise
        outputs = (targets + 0.1 * noise.roll(1))[:, None]
        found = compute_metrics(Regression(), run_of(RegressionTargets()), outputs, targets, parts=7)
        assert found["r2"] == pytest.approx(judge.r2_score(targets, outputs), **NEAR)

    @pytest.mark.parametrize(("guess", "expected"), [(0.1, 1.0), (0.2, 0.0)])
    def test_r2_of_a_truth_that_never_varies_is_scikit_learns(self, guess, expected):
        targets, outputs = torch.full((7,), 0.1), torch.full((7, 1), guess)
        assert compute_metrics(Regression(), run_of(RegressionTargets()), outputs, targets, parts=3)["r2"] == expected

    def test_metrics_do_not_depend_on_the_batches(self):
        targets = torch.randn(200, generator=torch.Generator().manual_seed(0))
        outputs = targets.roll(1)[:, None]
        assert_near(
            *(
                compute_metrics(Regression(), run_of(RegressionTargets()), outputs, targets, parts=parts)
                for parts in (1, 11)
            )
        )

    def test_columns_against_flat_targets_never_broadcast(self):
        found = compute_metrics(
            Regression(), run_of(RegressionTargets()), torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        )
        assert found["mae"] == 0.0

    def test_nan_outputs_make_every_metric_nan(self):
        found = compute_metrics(
            Regression(), run_of(RegressionTargets()), torch.tensor([[1.0], [math.nan]]), torch.tensor([1.0, 2.0])
        )
        assert all(math.isnan(value) for value in found.values())


ALL = [
    (Classification(), classes(4), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)),
    (Multilabel(), run_of(MultilabelTargets(names=("a", "b"))), torch.zeros(3, 2), torch.ones(3, 2)),
    (Regression(), run_of(RegressionTargets()), torch.zeros(3, 1), torch.tensor([1.0, 2.0, 3.0])),
]


@pytest.mark.parametrize(("component", "run", "outputs", "targets"), ALL)
def test_without_samples_the_metrics_are_nan(component, run, outputs, targets):
    metrics = component.evaluate(run)
    empty = metrics.compute()
    metrics.update(outputs[:0], targets[:0])
    assert json.dumps(metrics.compute()) == json.dumps(empty)
    assert all(math.isnan(value) for value in empty.values() if isinstance(value, float))
    assert math.isnan(empty["loss"])


@pytest.mark.parametrize(("component", "run", "outputs", "targets"), ALL)
def test_metrics_are_plain_data(component, run, outputs, targets):
    found = compute_metrics(component, run, outputs, targets)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(("component", "run", "outputs", "targets"), ALL)
def test_an_update_may_come_under_inference_mode_and_the_next_outside(component, run, outputs, targets):
    metrics = component.evaluate(run)
    with torch.inference_mode():
        metrics.update(outputs, targets)
    metrics.update(outputs, targets)
    assert metrics.compute()["loss"] == pytest.approx(compute_metrics(component, run, outputs, targets)["loss"])


@pytest.mark.parametrize(("component", "run", "outputs", "targets"), ALL)
def test_an_update_never_waits_for_the_device(component, run, outputs, targets, monkeypatch):
    metrics = component.evaluate(run)

    def refuse(*_):
        raise AssertionError("a value was read back")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    metrics.update(outputs, targets)
    monkeypatch.undo()
    metrics.compute()


@pytest.mark.parametrize(("component", "run", "outputs", "targets"), ALL)
def test_half_precision_outputs_give_the_metrics_of_their_values(component, run, outputs, targets):
    outputs = outputs + torch.arange(outputs.numel()).view_as(outputs) / 8
    assert compute_metrics(component, run, outputs.bfloat16(), targets) == compute_metrics(
        component, run, outputs, targets
    )
