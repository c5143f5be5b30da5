from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tuneforge import DataError, OptionError, UnknownNameError
from tuneforge.builtin.losses import MSE, BinaryCrossEntropy, CrossEntropy
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets

ABC = ClassTargets(names=("a", "b", "c"))
SETS = MultilabelTargets(names=("red", "round"))


def run_of(outputs, targets, *, train=None):
    """A run whose model answers `outputs`, whatever it is given."""
    states = {}
    return SimpleNamespace(
        forward=lambda inputs: outputs,
        data=SimpleNamespace(targets=targets, train=SimpleNamespace(targets=train)),
        state=lambda part: states.setdefault(id(part), {}),
    )


def batch(targets, *, weights=None):
    return SimpleNamespace(inputs=None, targets=targets, weights=weights)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class TestCrossEntropy:
    def test_without_weights_it_is_bit_identical_to_torch(self):
        outputs, targets = drawn(5, 3), torch.tensor([0, 1, 2, 2, 0])
        loss, answered = CrossEntropy().train_step(run_of(outputs, ABC), batch(targets))
        assert answered is outputs
        assert torch.equal(loss, F.cross_entropy(outputs, targets))

    @pytest.mark.parametrize("smoothing", [0.1, 0.5])
    def test_label_smoothing_is_bit_identical_to_torch(self, smoothing):
        outputs, targets = drawn(5, 3), torch.tensor([0, 1, 2, 2, 0])
        loss, _ = CrossEntropy(label_smoothing=smoothing).train_step(run_of(outputs, ABC), batch(targets))
        assert torch.equal(loss, F.cross_entropy(outputs, targets, label_smoothing=smoothing))

    def test_mixed_targets_are_class_probabilities(self):
        outputs, shares = drawn(4, 3), torch.rand(4, 3).softmax(1)
        loss, _ = CrossEntropy().train_step(run_of(outputs, ABC), batch(shares))
        assert torch.equal(loss, F.cross_entropy(outputs, shares))

    def test_sample_weights_multiply_each_loss_and_the_mean_is_over_the_batch(self):
        outputs, targets, weights = drawn(3, 3), torch.tensor([0, 1, 2]), torch.tensor([2.0, 0.0, 0.5])
        loss, _ = CrossEntropy().train_step(run_of(outputs, ABC), batch(targets, weights=weights))
        losses = F.cross_entropy(outputs, targets, reduction="none")
        assert loss.item() == pytest.approx(((2 * losses[0] + 0.5 * losses[2]) / 3).item())

    def test_class_weights_have_mean_one_over_the_split(self):
        train = torch.tensor([0, 0, 0, 1, 2, 2])  # factors 1 1 1 4 1 1, whose mean is 1.5
        outputs, targets = drawn(2, 3), torch.tensor([1, 2])
        step, run = CrossEntropy(class_weights={"b": 4.0}), run_of(outputs, ABC, train=train)
        loss, _ = step.train_step(run, batch(targets))
        losses = F.cross_entropy(outputs, targets, reduction="none")
        assert loss.item() == pytest.approx(((4 * losses[0] + losses[1]) / 1.5 / 2).item())
        assert torch.equal(step.train_step(run, batch(targets))[0], loss)

    def test_class_and_sample_weights_multiply(self):
        train, weights = torch.tensor([0, 1, 2]), torch.tensor([3.0])
        outputs, targets = drawn(1, 3), torch.tensor([1])
        step = CrossEntropy(class_weights={"a": 0.0, "b": 3.0, "c": 0.0})
        loss, _ = step.train_step(run_of(outputs, ABC, train=train), batch(targets, weights=weights))
        assert loss.item() == pytest.approx(9 * F.cross_entropy(outputs, targets).item())

    def test_class_weights_of_a_mixed_sample_are_mixed(self):
        train, shares = torch.tensor([0, 1, 2]), torch.tensor([[0.25, 0.75, 0.0]])
        outputs = drawn(1, 3)
        step = CrossEntropy(class_weights={"a": 2.0, "b": 1.0, "c": 0.0})
        loss, _ = step.train_step(run_of(outputs, ABC, train=train), batch(shares))
        assert loss.item() == pytest.approx(1.25 * F.cross_entropy(outputs, shares).item())

    def test_an_unknown_class_offers_the_nearest(self):
        targets = ClassTargets(names=("zebra", "lion"))
        run = run_of(drawn(1, 2), targets, train=torch.tensor([0, 1]))
        with pytest.raises(UnknownNameError, match="did you mean 'zebra'"):
            CrossEntropy(class_weights={"zebar": 2.0}).train_step(run, batch(torch.tensor([0])))

    def test_weights_that_leave_nothing_to_learn_are_refused(self):
        step = CrossEntropy(class_weights={"a": 0.0, "b": 0.0})
        with pytest.raises(OptionError, match="weight 0"):
            step.train_step(run_of(drawn(1, 3), ABC, train=torch.tensor([0, 1])), batch(torch.tensor([0])))

    @pytest.mark.parametrize("targets", [torch.tensor([0, 3]), torch.tensor([-1, 0])])
    @pytest.mark.parametrize("weights", [None, torch.ones(2)])
    def test_a_target_out_of_range_is_an_error_with_the_range(self, targets, weights):
        with pytest.raises(DataError, match=r"there are 3 classes.*from 0 to 2"):
            CrossEntropy().train_step(run_of(drawn(2, 3), ABC), batch(targets, weights=weights))

    @pytest.mark.parametrize(
        "targets",
        [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2)],
    )
    def test_targets_of_the_wrong_type_or_shape_say_what_to_store(self, targets):
        with pytest.raises(DataError, match=r"targets\.long\(\)"):
            CrossEntropy().train_step(run_of(drawn(2, 3), ABC), batch(targets))

    @pytest.mark.parametrize("shape", [(2, 4), (2,), (2, 3, 3)])
    def test_outputs_that_do_not_fit_the_classes_name_the_adapter(self, shape):
        with pytest.raises(DataError, match="--adapt head"):
            CrossEntropy().train_step(run_of(drawn(*shape), ABC), batch(torch.tensor([0, 1])))

    @pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"class_weights": {"a": -1.0}}])
    def test_options_out_of_range_are_refused(self, options):
        with pytest.raises(OptionError):
            CrossEntropy(**options)


class TestBinaryCrossEntropy:
    def test_without_weights_it_is_bit_identical_to_torch(self):
        outputs, targets = drawn(4, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
        loss, answered = BinaryCrossEntropy().train_step(run_of(outputs, SETS), batch(targets))
        assert answered is outputs
        assert torch.equal(loss, F.binary_cross_entropy_with_logits(outputs, targets))

    def test_positive_weights_are_by_label_name(self):
        outputs, targets = drawn(1, 2), torch.tensor([[1.0, 1.0]])
        loss, _ = BinaryCrossEntropy(pos_weights={"round": 3.0}).train_step(run_of(outputs, SETS), batch(targets))
        expected = F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=torch.tensor([1.0, 3.0]))
        assert torch.equal(loss, expected)

    def test_label_smoothing_draws_targets_to_one_half(self):
        outputs, targets = drawn(1, 2), torch.tensor([[1.0, 0.0]])
        loss, _ = BinaryCrossEntropy(label_smoothing=0.2).train_step(run_of(outputs, SETS), batch(targets))
        expected = F.binary_cross_entropy_with_logits(outputs, torch.tensor([[0.9, 0.1]]))
        assert loss.item() == pytest.approx(expected.item())

    def test_sample_weights_multiply_each_samples_mean(self):
        outputs, targets, weights = drawn(2, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 0.0])
        loss, _ = BinaryCrossEntropy().train_step(run_of(outputs, SETS), batch(targets, weights=weights))
        assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(outputs[:1], targets[:1]).item())

    def test_one_label_takes_a_flat_target(self):
        outputs, targets = drawn(3, 1), torch.tensor([1.0, 0.0, 1.0])
        loss, _ = BinaryCrossEntropy().train_step(run_of(outputs, MultilabelTargets(names=("red",))), batch(targets))
        assert torch.equal(loss, F.binary_cross_entropy_with_logits(outputs[:, 0], targets))

    def test_integer_targets_say_what_to_store(self):
        with pytest.raises(DataError, match=r"targets\.float\(\)"):
            BinaryCrossEntropy().train_step(run_of(drawn(1, 2), SETS), batch(torch.tensor([[1, 0]])))

    def test_an_unknown_label_offers_the_nearest(self):
        step = BinaryCrossEntropy(pos_weights={"rund": 2.0})
        with pytest.raises(UnknownNameError, match="did you mean 'round'"):
            step.train_step(run_of(drawn(1, 2), SETS), batch(torch.zeros(1, 2)))


class TestMSE:
    @pytest.mark.parametrize("shape", [(4,), (4, 1)])
    def test_a_flat_target_never_broadcasts_against_a_column(self, shape):
        outputs, targets = drawn(4, 1), torch.arange(4.0)
        loss, answered = MSE().train_step(run_of(outputs, RegressionTargets()), batch(targets.reshape(shape)))
        assert answered is outputs
        assert torch.equal(loss, F.mse_loss(outputs[:, 0], targets))

    def test_with_several_outputs_it_is_bit_identical_to_torch(self):
        outputs, targets = drawn(4, 2), torch.randn(4, 2)
        loss, _ = MSE().train_step(run_of(outputs, RegressionTargets(names=("x", "y"))), batch(targets))
        assert torch.equal(loss, F.mse_loss(outputs, targets))

    def test_sample_weights_multiply_each_samples_mean(self):
        outputs, targets, weights = torch.tensor([[1.0], [5.0]]), torch.tensor([0.0, 0.0]), torch.tensor([0.5, 1.5])
        loss, _ = MSE().train_step(run_of(outputs, RegressionTargets()), batch(targets, weights=weights))
        assert loss.item() == (0.5 * 1 + 1.5 * 25) / 2

    @pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)])
    def test_targets_that_do_not_fit_are_refused(self, targets):
        with pytest.raises(DataError):
            MSE().train_step(run_of(drawn(4, 1), RegressionTargets()), batch(targets))


@pytest.mark.parametrize(
    ("step", "targets", "answers"),
    [
        (CrossEntropy(), ABC, torch.tensor([0, 1])),
        (BinaryCrossEntropy(), SETS, torch.zeros(2, 2)),
        (MSE(), RegressionTargets(), torch.zeros(2)),
    ],
)
@pytest.mark.parametrize("weights", [None, torch.ones(2)])
def test_weights_of_one_change_nothing_and_gradients_flow(step, targets, answers, weights):
    outputs = drawn(2, targets.num_outputs)
    loss, _ = step.train_step(run_of(outputs, targets), batch(answers, weights=weights))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(step.train_step(run_of(outputs, targets), batch(answers))[0].item())
    assert outputs.grad.abs().sum() > 0
