import json
import math

import pytest
import torch
from torch.nn import functional as F

from tuneforge import DataError, OptionError
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets, to_columns
from tuneforge.plugin.declaration import build_component, get_option_values

ABC = ClassTargets(names=("a", "b", "c"))
SETS = MultilabelTargets(names=("red", "round", "ripe"))
PRICE = RegressionTargets(names=("price",), units=("EUR",), means=(100.0,), scales=(20.0,))
PLACE = RegressionTargets(names=("x", "y"), units=("m",), means=(1.0, 2.0), scales=(10.0, 0.5))


def blobs(samples, features, classes, *, seed=0, spread=1.5):
    """Features on very different scales, around one center a class; every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    centers = torch.randn(classes, features, generator=generator)
    values = centers[labels] + spread * torch.randn(samples, features, generator=generator)
    return values * torch.logspace(-2, 2, features) + torch.linspace(-50, 50, features), labels


def minimized(loss, *shapes):
    """The parameters that minimize a smooth loss, by torch's own L-BFGS in float64."""
    parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(*parameters)
        value.backward()
        return value

    optimizer.step(closure)
    return [each.detach() for each in parameters]


def scaled(features):
    deviation = features.std(0, correction=0)
    return (features - features.mean(0)) / deviation.clamp_min(0.01 * deviation.max())


def linear(features, weight, bias):
    return features @ weight.T + bias


class TestClasses:
    def test_describe_names_the_likeliest_class_and_every_probability(self):
        told = ABC.describe(torch.tensor([0.0, 2.0, 1.0]))
        assert told["class"] == "b"
        assert (
            told["probability"]
            == told["probabilities"]["b"]
            == pytest.approx(math.exp(2) / (1 + math.exp(1) + math.exp(2)))
        )
        assert list(told["probabilities"]) == ["a", "b", "c"]
        assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-12)

    def test_describe_of_half_precision_is_that_of_its_values(self):
        output = torch.tensor([0.5, 2.0, 1.0])
        assert ABC.describe(output.bfloat16()) == ABC.describe(output)

    @pytest.mark.parametrize("output", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3])
    def test_describe_names_no_class_for_nan_outputs(self, output):
        told = ABC.describe(torch.tensor(output))
        assert told["class"] is None
        assert told["probability"] is None
        json.dumps(told, allow_nan=False)

    @pytest.mark.parametrize("names", [(), ("only",)])
    def test_none_or_one_class_is_described_without_a_crash(self, names):
        told = ClassTargets(names=names).describe(torch.zeros(len(names)))
        assert told["class"] == (names[0] if names else None)

    def test_encode_finds_a_name_and_truth_gives_it_back(self):
        assert [ABC.encode(name) for name in "abc"] == [0, 1, 2]
        assert ABC.describe_label(torch.tensor(2)) == "c"
        assert ClassTargets(names=("0", "7")).encode(7) == 1

    def test_encode_offers_the_nearest_name(self):
        with pytest.raises(DataError, match="did you mean 'zebra'"):
            ClassTargets(names=("zebra", "lion")).encode("zebar")

    def test_label_of_mixed_samples_has_class_probabilities(self):
        assert ABC.describe_label(torch.tensor([0.7, 0.0, 0.3])) == "a 0.70, c 0.30"

    def test_wrongness_is_nought_where_right_and_the_cross_entropy_elsewhere(self):
        outputs, targets = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), torch.tensor([0, 2])
        expected = F.cross_entropy(outputs, targets, reduction="none")
        assert ABC.per_sample_loss(outputs, targets).tolist() == [0.0, expected[1].item()]

    def test_nan_outputs_have_the_largest_per_sample_loss(self):
        outputs = torch.tensor([[math.nan, 1.0, 0.0], [0.0, 50.0, 0.0]])
        wrongness = ABC.per_sample_loss(outputs, torch.tensor([0, 0]))
        assert wrongness[0] > wrongness[1] > 0
        assert wrongness.isfinite().all()

    def test_pools_hold_the_rows_of_each_class(self):
        pools = ABC.group_by_class(torch.tensor([2, 0, 2, 2]))
        assert {name: rows.tolist() for name, rows in pools.items()} == {"a": [1], "b": [], "c": [0, 2, 3]}

    def test_names_that_repeat_are_refused(self):
        with pytest.raises(OptionError, match="names that differ"):
            ClassTargets(names=("a", "a"))

    def test_options_survive_json(self):
        assert (
            build_component(ClassTargets, json.loads(json.dumps(get_option_values(ABC))), where="-").names == ABC.names
        )


class TestHeadOfClasses:
    @pytest.mark.parametrize("classes", [2, 3, 11])
    def test_the_head_minimizes_the_documented_loss(self, classes):
        features, labels = blobs(samples=120, features=5, classes=classes)
        targets, l2 = ClassTargets(names=tuple(map(str, range(classes)))), 0.05
        weight, bias = targets.fit_head(features.double(), labels, l2=l2)

        def loss(weight, bias):
            return F.cross_entropy(scaled(features.double()) @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()

        best, free = minimized(loss, (classes, 5), (classes,))
        logits = scaled(features.double()) @ best.T + free
        assert weight.shape == (classes, 5)
        assert torch.allclose((features.double() @ weight.T + bias).softmax(1), logits.softmax(1), atol=2e-4)

    def test_the_head_keeps_type_and_is_deterministic(self):
        features, labels = blobs(samples=60, features=4, classes=3)
        weight, bias = ABC.fit_head(features, labels, l2=1e-3)
        again, free = ABC.fit_head(features, labels, l2=1e-3)
        assert weight.dtype == bias.dtype == torch.float32
        assert torch.equal(weight, again)
        assert torch.equal(bias, free)

    def test_an_absent_class_is_never_predicted(self):
        features, labels = blobs(samples=60, features=4, classes=2)
        weight, bias = ClassTargets(names=("a", "ghost", "b")).fit_head(features, labels * 2, l2=1e-3)
        probabilities = (features @ weight.T + bias).softmax(1)
        assert weight.shape == (3, 4)
        assert probabilities[:, 1].max() <= 1.01 / 60
        assert (probabilities.argmax(1) == labels * 2).float().mean() > 0.8

    def test_a_constant_feature_does_no_harm(self):
        features, labels = blobs(samples=60, features=4, classes=3)
        features[:, 1] = 7.3
        weight, bias = ABC.fit_head(features, labels, l2=1e-3)
        assert weight.isfinite().all()
        assert bias.isfinite().all()

    @pytest.mark.parametrize("l2", [1e-3, None])
    @pytest.mark.parametrize("deviation", [1e-7, 1e-8, 1e-12])
    def test_a_feature_that_is_nearly_constant_in_training_does_not_decide(self, deviation, l2):
        features, labels = blobs(samples=60, features=4, classes=3)
        features = (features - features.mean(0)) / features.std(0)
        expected = F.softmax(linear(features, *ABC.fit_head(features, labels, l2=l2)), 1)
        features = torch.cat([features, deviation * torch.randn(60, 6, generator=torch.Generator().manual_seed(1))], 1)
        weight, bias = ABC.fit_head(features, labels, l2=l2)
        features[:, 4:] = 1.0  # active elsewhere, as a ReLU that was off in training
        assert weight.abs().max() < 100
        assert torch.allclose(F.softmax(linear(features, weight, bias), 1), expected, atol=0.2)

    @pytest.mark.parametrize(("samples", "classes"), [(6, 3), (7, 3), (40, 2), (700, 3)])
    def test_the_penalty_is_chosen_on_held_out_samples(self, samples, classes):
        features, labels = blobs(samples=samples, features=30, classes=classes, spread=4)
        others, truth = blobs(samples=500, features=30, classes=classes, spread=4)
        loss = {
            l2: F.cross_entropy(linear(others, *ABC.fit_head(features, labels, l2=l2))[:, :classes], truth).item()
            for l2 in (None, 1e-4, 1.0)
        }
        assert loss[None] <= 1.1 * min(loss.values())

    def test_classes_of_one_sample_are_solved(self):
        features = torch.eye(3)
        assert linear(features, *ABC.fit_head(features, torch.arange(3), l2=None)).argmax(1).tolist() == [0, 1, 2]

    def test_one_class_alone_cannot_be_solved(self):
        with pytest.raises(DataError, match="at least two classes"):
            ABC.fit_head(torch.randn(5, 2), torch.zeros(5, dtype=torch.int64), l2=1e-3)


class TestLabelSets:
    def test_describe_names_the_labels_at_least_as_likely_as_not(self):
        told = SETS.describe(torch.tensor([2.0, 0.0, -1.0]))
        assert told["labels"] == ["red", "round"]
        assert told["probabilities"]["round"] == 0.5

    def test_describe_of_non_finite_outputs_is_json(self):
        told = SETS.describe(torch.tensor([math.nan, 1.0, -1.0]))
        assert told == {
            "labels": ["round"],
            "probabilities": {"red": None, **{k: told["probabilities"][k] for k in ("round", "ripe")}},
        }
        json.dumps(told, allow_nan=False)

    def test_encode_turns_a_list_of_names_into_flags(self):
        assert SETS.encode(["ripe", "red"]) == [1.0, 0.0, 1.0]
        assert SETS.encode([]) == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("raw", ["red", 3, ["red", "rnd"]])
    def test_encode_refuses_what_is_no_list_of_labels(self, raw):
        with pytest.raises(DataError):
            SETS.encode(raw)

    def test_truth_names_the_labels_or_none(self):
        assert SETS.describe_label(torch.tensor([1.0, 0.0, 1.0])) == "red, ripe"
        assert SETS.describe_label(torch.zeros(3)) == "none"

    def test_wrongness_is_nought_only_where_every_label_is_right(self):
        outputs = torch.tensor([[2.0, -1.0, -3.0], [2.0, -1.0, -3.0]])
        targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
        expected = F.binary_cross_entropy_with_logits(outputs[1], targets[1], reduction="sum")
        assert SETS.per_sample_loss(outputs, targets).tolist() == [0.0, pytest.approx(expected.item())]

    def test_the_head_minimizes_the_documented_loss(self):
        features, labels = blobs(samples=90, features=4, classes=3)
        held, l2 = torch.stack([labels == 0, labels != 1], 1).double(), 0.05
        weight, bias = MultilabelTargets(names=("p", "q")).fit_head(features.double(), held, l2=l2)

        def loss(weight, bias):
            logits = scaled(features.double()) @ weight.T + bias
            return F.binary_cross_entropy_with_logits(logits, held) * 2 + l2 / 2 * weight.square().sum()

        best, free = minimized(loss, (2, 4), (2,))
        assert torch.allclose(features.double() @ weight.T + bias, scaled(features.double()) @ best.T + free, atol=2e-3)

    def test_a_constant_label_gets_its_smoothed_frequency(self):
        held = torch.tensor([[1.0, 0.0]]).repeat(9, 1)
        weight, bias = MultilabelTargets(names=("all", "none")).fit_head(torch.randn(9, 3), held, l2=1e-3)
        assert not weight.any()
        assert bias.sigmoid().tolist() == pytest.approx([0.95, 0.05], abs=1e-6)


class TestNumbers:
    def test_describe_and_truth_are_in_original_units(self):
        assert PRICE.describe(torch.tensor([0.5])) == {"value": 110.0, "unit": "EUR"}
        assert PRICE.describe_label(torch.tensor(0.5)) == "110 EUR"

    def test_several_numbers_are_described_by_name(self):
        told = PLACE.describe(torch.tensor([1.0, -2.0]))
        assert told == {"values": {"x": 11.0, "y": 1.0}, "units": {"x": "m", "y": "m"}}
        assert PLACE.describe_label(torch.tensor([1.0, -2.0])) == "x 11 m, y 1 m"

    def test_describe_of_non_finite_outputs_is_json(self):
        assert PRICE.describe(torch.tensor([math.nan])) == {"value": None, "unit": "EUR"}

    def test_encode_undoes_describe(self):
        assert PRICE.encode(110) == 0.5
        assert PLACE.encode({"y": 1.0, "x": 11.0}) == [1.0, -2.0]
        assert PLACE.encode([11.0, 1.0]) == [1.0, -2.0]

    @pytest.mark.parametrize("raw", ["dear", math.nan, math.inf, True, None])
    def test_encode_rejects_non_finite_numbers(self, raw):
        with pytest.raises(DataError, match="is not a finite number"):
            PRICE.encode(raw)

    def test_encode_refuses_a_missing_number(self):
        with pytest.raises(DataError, match="is not a finite number"):
            PLACE.encode({"x": 1.0})
        with pytest.raises(DataError, match=r"1 number\(s\) for 2"):
            PLACE.encode([1.0])

    def test_wrongness_is_the_absolute_error_whatever_the_columns(self):
        outputs, targets = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1.0, 4.0, 4.0])
        assert PRICE.per_sample_loss(outputs, targets).tolist() == [0.0, 2.0, 1.0]

    def test_the_head_minimizes_the_documented_loss(self):
        features, labels = blobs(samples=80, features=4, classes=3)
        answers, l2 = torch.stack([labels * 2.0, labels - features[:, 0]], 1).double(), 0.3
        weight, bias = PLACE.fit_head(features.double(), answers, l2=l2)

        def loss(weight, bias):
            errors = scaled(features.double()) @ weight.T + bias - answers
            return errors.square().mean(0).sum() + l2 / 2 * weight.square().sum()

        best, free = minimized(loss, (2, 4), (2,))
        assert torch.allclose(features.double() @ weight.T + bias, scaled(features.double()) @ best.T + free, atol=1e-5)

    def test_the_penalty_is_chosen_by_the_leave_one_out_error(self):
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(30, 20, generator=generator)
        noise = torch.randn(30, generator=generator)
        shrunk, exact = (PRICE.fit_head(features, each, l2=None)[0] for each in (noise, features[:, 0]))
        assert shrunk.norm() < 0.7 * PRICE.fit_head(features, noise, l2=1e-4)[0].norm()
        assert exact[0, 0] == pytest.approx(1, abs=0.01)

    def test_the_head_of_one_number_takes_a_flat_target(self):
        features = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        weight, bias = PRICE.fit_head(features, features @ torch.tensor([1.0, 2.0, 3.0]) + 4, l2=1e-9)
        assert weight.shape == (1, 3)
        assert weight[0].tolist() == pytest.approx([1, 2, 3], abs=1e-4)
        assert bias.tolist() == pytest.approx([4], abs=1e-4)

    @pytest.mark.parametrize(
        "options", [{"scales": (0.0,)}, {"means": (1.0, 2.0)}, {"names": ("a", "b", "c"), "units": ("m", "s")}]
    )
    def test_scalings_that_do_not_fit_are_refused(self, options):
        with pytest.raises(OptionError):
            RegressionTargets(**options)


def test_columns_never_broadcast():
    outputs, targets = to_columns(torch.zeros(4, 1), torch.zeros(4))
    assert outputs.shape == targets.shape == (4, 1)
    with pytest.raises(DataError, match=r"outputs \(4, 2\) do not match targets \(4,\)"):
        to_columns(torch.zeros(4, 2), torch.zeros(4))


@pytest.mark.parametrize("targets", [ABC, SETS, PRICE, PLACE])
def test_every_encoded_target_becomes_a_tensor(targets):
    raw = {3: "a", 1: 1.0, 2: [1.0, 2.0]}[targets.num_outputs] if targets is not SETS else ["red"]
    assert torch.tensor([targets.encode(raw)]).shape[0] == 1


@pytest.mark.parametrize("targets", [ABC, SETS, PRICE, PLACE])
def test_the_monitored_metric_is_a_primary_metric(targets):
    assert targets.monitor in targets.primary_metrics
    assert targets.monitor_mode in ("max", "min")
