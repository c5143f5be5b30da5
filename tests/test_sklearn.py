"""The estimators are scikit-learn's in all its checks, go on from where they are, and save without pickle."""

import copy
import pickle  # noqa: TID251 - scikit-learn sends estimators to other processes in this way
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine, make_blobs, make_regression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import tuneforge as tf
from tuneforge.builtin.strategies.fixed import Full
from tuneforge.sklearn import TunedClassifier, TunedRegressor
from tuneforge.sklearn.estimator import split_validation

CANNOT_HOLD: dict[str, str] = {}  # name of a check: the reason; so far every one holds
PICKLE = b"\x80"  # how one begins


@parametrize_with_checks([TunedClassifier(), TunedRegressor()], expected_failed_checks=lambda estimator: CANNOT_HOLD)
def test_scikit_learns_check_holds(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def blobs():
    x, y = make_blobs(90, n_features=5, centers=3, random_state=0)
    return x, np.array(["red", "green", "blue"])[y]


@pytest.fixture(scope="module")
def slope():
    return make_regression(90, n_features=4, n_informative=4, n_targets=2, random_state=0)


@pytest.fixture(scope="module")
def fitted(blobs):
    return TunedClassifier(random_state=0).fit(*blobs)


def quick(strategy="full", *, epochs=1, **params):
    return TunedClassifier(strategy=strategy, strategy_options={"epochs": epochs}, random_state=0, **params)


@tf.component(api=1)
class Looks:
    """Keeps the weights with which each phase starts."""

    seen: ClassVar[list] = []

    @tf.hookimpl
    def phase_started(self, run):
        self.seen.append(weights_of(run.model))


class ToGray(nn.Module):
    """(b, 1, 4, 4) -> (b, 2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        return self.head(self.conv(images).relu().flatten(1))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def images(count=24):
    """Dark and bright uint8 images (n, 1, 4, 4), and which they are."""
    y = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 60, (count, 1, 4, 4))
    return (noise + 150 * y[:, None, None, None]).astype(np.uint8), y


def test_cross_validation_in_a_pipeline_tells_wines_apart():
    pipeline = make_pipeline(StandardScaler(), TunedClassifier(random_state=0))
    assert cross_val_score(pipeline, *load_wine(return_X_y=True), cv=3).mean() > 0.9


def test_a_search_goes_over_strategies_and_their_options(blobs):
    grid = [
        {"strategy": ["full", "head-only"], "strategy__epochs": [1, 2]},
        {"strategy": [[tf.HeadFit("head")], Full(epochs=1)], "optimizer": [tf.use("sgd", momentum=0.9)]},
        {"strategy_options": [{"l2": 1.0, "epochs": 1}]},
    ]
    search = GridSearchCV(TunedClassifier(random_state=0), grid, cv=2, error_score="raise").fit(*blobs)
    assert len(search.cv_results_["params"]) == 7
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_one_option_is_set_and_the_others_stay():
    tuned = TunedClassifier(strategy_options={"epochs": 3}).set_params(strategy__lr=0.1, model__hidden=(4,))
    assert tuned.strategy_options == {"epochs": 3, "lr": 0.1}
    assert tuned.get_params()["strategy__lr"] == 0.1
    assert tuned.get_params()["model__hidden"] == (4,)


def test_options_reach_the_model_and_the_strategy(blobs):
    tuned = quick().set_params(model__hidden=(7,), strategy__lr=1e-12).fit(*blobs)
    assert tuned.predictor_.model.module.head.in_features == 7
    slow = weights_of(tuned.predictor_.model)["head.weight"]
    fast = weights_of(tuned.set_params(strategy__lr=1e-2).fit(*blobs).predictor_.model)["head.weight"]
    assert (slow - fast).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_bits_and_none_draws_one(blobs):
    one, other = (weights_of(quick().fit(*blobs).predictor_.model) for _ in range(2))
    assert same(one, other)
    drawn = [weights_of(quick().set_params(random_state=None).fit(*blobs).predictor_.model) for _ in range(2)]
    assert not same(*drawn)


def test_partial_fit_starts_from_the_present_weights_and_moves_them(blobs):
    looks = Looks()
    looks.seen.clear()
    tuned = quick(callbacks=[looks]).fit(*blobs)
    before = weights_of(tuned.predictor_.model)
    tuned.partial_fit(*blobs)
    assert same(looks.seen[-1], before)
    assert not same(weights_of(tuned.predictor_.model), before)
    assert len(looks.seen) == 2


def test_partial_fit_learns_from_batches_that_lack_a_class(blobs):
    x, y = blobs
    tuned = TunedClassifier(random_state=0, partial_lr=1e-3)
    tuned.partial_fit(x[:60], y[:60], classes=["blue", "green", "red", "white"])
    for start in range(0, 90, 15):
        rows = slice(start, start + 15)
        tuned.partial_fit(x[rows][y[rows] != "red"], y[rows][y[rows] != "red"])
    tuned.partial_fit(x[:1], y[:1])
    assert tuned.score(x, y) > 0.9
    assert tuned.predict_proba(x).shape == (90, 4)


def test_partial_fit_of_a_regressor_keeps_the_first_scale(slope):
    x, y = slope
    tuned = TunedRegressor(random_state=0).fit(x, y)
    before, targets = tuned.predict(x), tuned.predictor_.targets
    tuned.partial_fit(x[:5], 2 * y[:5])
    assert (tuned.predictor_.targets.means, tuned.predictor_.targets.scales) == (targets.means, targets.scales)
    assert np.abs(tuned.predict(x) - before).max() < 0.1 * y.std()
    assert tuned.score(x, y) > 0.5


def test_the_module_that_is_given_stays_as_it_is():
    module = ToGray()
    before = copy.deepcopy(module.state_dict())
    x, y = images()
    tuned = quick(model=module).fit(x / np.float32(255), y)
    assert same(before, module.state_dict())
    assert not same(before, weights_of(tuned.predictor_.model))


def test_uint8_images_are_read_on_the_scale_from_0_to_1():
    x, y = images()
    torch.manual_seed(0)
    module = ToGray()
    as_bytes = quick(model=module, epochs=5).set_params(strategy__lr=0.01).fit(x, y)
    as_floats = copy.deepcopy(as_bytes).fit(x / np.float32(255), y)
    np.testing.assert_allclose(as_bytes.predict_proba(x), as_floats.predict_proba(x / np.float32(255)), rtol=1e-4)
    with pytest.raises(ValueError, match="was fitted with samples of shape"):
        as_floats.predict(x)


def test_a_named_model_takes_images():
    x, y = np.random.default_rng(0).random((12, 3, 32, 32), np.float32), np.arange(12) % 3
    tuned = quick("head-only", model="digit-cnn").fit(x, y)
    assert tuned.predict_proba(x[:2]).shape == (2, 3)
    assert tuned.predictor_.model.head == "head"


def test_a_rows_answer_does_not_depend_on_its_company(fitted, blobs):
    x, _ = blobs
    alone = np.concatenate([fitted.predict_proba(row[None]) for row in x])
    assert np.array_equal(fitted.predict_proba(x), alone)
    assert np.array_equal(fitted.predict_proba(np.tile(x[::-1], (4, 1))), np.tile(alone[::-1], (4, 1)))


def test_what_is_saved_loads_to_the_same_answers_and_holds_no_pickle(fitted, blobs, tmp_path):
    x, _ = blobs
    fitted.save(tmp_path / "model")
    loaded = TunedClassifier.load(tmp_path / "model")
    assert np.array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    assert np.array_equal(loaded.classes_, fitted.classes_)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.n_features_in_ == 5
    for file in (tmp_path / "model").iterdir():
        assert not file.read_bytes().startswith(PICKLE), file
        assert file.suffix in {".json", ".jsonl", ".txt", ".safetensors"}


def test_a_saved_estimator_is_the_folder_of_a_run(fitted, blobs, tmp_path):
    x, _ = blobs
    goes_on = copy.deepcopy(fitted).partial_fit(*blobs)
    goes_on.save(tmp_path / "model")
    answers = [answer["class"] for answer in tf.predict(tmp_path / "model", x[:5].astype(np.float32))]
    assert answers == goes_on.predict(x[:5]).tolist()


def test_a_regressor_saves_several_numbers(slope, tmp_path):
    x, y = slope
    tuned = TunedRegressor(random_state=0).fit(x, y)
    tuned.save(tmp_path / "model")
    assert np.array_equal(TunedRegressor.load(tmp_path / "model").predict(x), tuned.predict(x))
    assert tuned.predict(x).shape == (90, 2)


def test_objects_are_given_again_when_loading(tmp_path):
    x, y = images()
    module = ToGray()
    tuned = quick(model=module).fit(x, y)
    tuned.save(tmp_path / "model")
    with pytest.raises(tf.FolderError, match=r"Python objects as parameters: model.*objects=\{'model': \.\.\.\}"):
        TunedClassifier.load(tmp_path / "model")
    loaded = TunedClassifier.load(tmp_path / "model", objects={"model": ToGray()})
    assert np.array_equal(loaded.predict_proba(x), tuned.predict_proba(x))


def test_only_its_own_class_loads_it_and_nothing_is_written_over(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    with pytest.raises(tf.UsageError, match=r"holds a TunedClassifier"):
        TunedRegressor.load(tmp_path / "model")
    with pytest.raises(tf.FolderError, match="exists and is not empty"):
        fitted.save(tmp_path / "model")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda tuned: pickle.loads(pickle.dumps(tuned))])
def test_copies_and_pickles_go_on_as_the_estimator_would(fitted, blobs, again):
    one, other = copy.deepcopy(fitted), again(copy.deepcopy(fitted))
    assert isinstance(other.__getstate__()["_weights"], np.ndarray)
    assert not any(isinstance(value, (nn.Module, torch.Tensor)) for value in other.__getstate__().values())
    assert np.array_equal(
        one.partial_fit(*blobs).predict_proba(blobs[0]), other.partial_fit(*blobs).predict_proba(blobs[0])
    )


@pytest.mark.parametrize("asked", [tf.use("sgd", momentum=0.9), tf.Phase("all", epochs=1, lr_scales={"head": 2.0})])
def test_parts_and_steps_can_be_copied_and_sent_to_another_process(asked):
    assert copy.deepcopy(asked) == asked
    assert pickle.loads(pickle.dumps(asked)) == asked


def test_runs_are_kept_where_that_is_asked_for_and_nowhere_else(blobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick().fit(*blobs)
    assert not list(tmp_path.iterdir())
    tuned = quick(runs_dir=tmp_path / "runs").fit(*blobs).partial_fit(*blobs)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run-1", "run-2"]
    assert tuned.run_dir_ == tmp_path / "runs" / "run-2"
    assert capsys.readouterr().out == ""
    quick(verbose=True).fit(*blobs)
    assert "metrics of test are those of val" in capsys.readouterr().out


def test_each_class_is_in_training_and_validation_unless_it_is_alone():
    pools = [torch.arange(0, 20), torch.arange(20, 22), torch.tensor([22])]
    train, val = split_validation(pools, val_fraction=0.1, seed=0)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(23))
    assert [int(((val >= low) & (val < high)).sum()) for low, high in ((0, 20), (20, 22), (22, 23))] == [2, 1, 0]


@pytest.mark.parametrize(("pools", "share"), [([torch.tensor([0]), torch.tensor([1])], 0.5), ([torch.arange(9)], 0.0)])
def test_where_nothing_is_held_out_all_samples_serve_for_both(pools, share):
    train, val = split_validation(pools, val_fraction=share, seed=0)
    assert torch.equal(train, val)
    assert len(train) == sum(map(len, pools))


def test_classes_are_told_apart_whatever_they_are(blobs):
    for classes in ([1.0, 2.0, 9.0], [3, 10, 2], np.array(["a", "b", "c"], dtype=object)):
        y = np.asarray(classes)[np.unique(blobs[1], return_inverse=True)[1]]
        tuned = TunedClassifier(random_state=0).fit(blobs[0], y)
        assert tuned.score(blobs[0], y) > 0.9
        assert np.array_equal(tuned.classes_, np.unique(y))


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (quick(validation_fraction=1.0), tf.OptionError, "validation_fraction"),
        (
            TunedClassifier(strategy=Full(epochs=1), strategy_options={"lr": 1.0}),
            tf.UsageError,
            "strategy is an object",
        ),
        (TunedClassifier("mlp", "ful"), tf.UnknownNameError, "did you mean 'full'"),
        (TunedClassifier(strategy_options={"epoch": 1}), tf.UsageError, "epochs"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_to_do(estimator, error, message, blobs):
    with pytest.raises(error, match=message):
        estimator.fit(*blobs)


def test_images_need_a_model():
    with pytest.raises(tf.UsageError, match=r"samples of shape \(1, 4, 4\) need a model"):
        quick().fit(*images())


def test_partial_fit_wants_the_classes_first_and_no_others_later(fitted, blobs):
    x, y = blobs
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        TunedClassifier().partial_fit(x, y)
    with pytest.raises(ValueError, match=r"y has the classes \['white'\]"):
        copy.deepcopy(fitted).partial_fit(x[:1], ["white"])
    with pytest.raises(ValueError, match="are not those of the first call"):
        copy.deepcopy(fitted).partial_fit(x, y, classes=["red", "green"])
