import json

import attrs
import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.plugin.serialization import from_json


def weights(result):
    return (result.run_dir / "model.safetensors").read_bytes()


def test_same_seed_gives_identical_files_and_another_seed_does_not(tune):
    strategy = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=2, lr=0.01)]
    one, two, other = (tune(strategy, seed=seed, callbacks=[tf.use("ema")]) for seed in (1, 1, 2))
    assert weights(one) == weights(two)
    assert weights(one) != weights(other)
    for name in ("metrics.jsonl", "steps.jsonl", "report.json", "model.json"):
        assert (one.run_dir / name).read_bytes() == (two.run_dir / name).read_bytes()


def test_dropout_does_not_depend_on_the_callers_random_state(tune):
    one = tune([tf.Phase("all", epochs=2)])
    torch.rand(17)
    assert weights(one) == weights(tune([tf.Phase("all", epochs=2)]))


def test_run_directory_holds_all_files(tune):
    result = tune([tf.Phase("head", train="head", epochs=2)])
    names = {path.name for path in result.run_dir.iterdir()}
    assert names >= {
        "run.json",
        "status.json",
        "steps.jsonl",
        "metrics.jsonl",
        "report.json",
        "model.safetensors",
        "model.json",
        "log.txt",
        "hardest_samples.json",
    }
    assert not [name for name in names if name.endswith(".part")]
    assert json.loads((result.run_dir / "status.json").read_text())["state"] == "done"
    epochs = [from_json(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(1, 6), (2, 12)]
    report = json.loads((result.run_dir / "report.json").read_text())
    assert {"accuracy", "precision_macro", "recall_macro", "f1_macro", "per_class", "confusion"} <= set(
        report["splits"]["test"]
    )


def test_strategy_gets_results_and_decides(tune):
    results = []

    def strategy(task):
        head_result = yield tf.Phase("head", train="head", epochs=1)
        results.append(head_result)
        if head_result.val["recall_min"] < 1.1:
            yield tf.Phase("more", epochs=1)

    result = tune(strategy)
    assert [step.name for step, _ in result.strategy_steps] == ["head", "more"]
    assert set(results[0].val["per_class"]) == {"a", "b", "c"}
    assert len(results[0].val["confusion"]) == 3
    logged = [json.loads(line) for line in (result.run_dir / "steps.jsonl").read_text().splitlines()]
    assert from_json(json.dumps(logged[0]["result"])).val["recall_min"] == results[0].val["recall_min"]


def test_early_stopping_ends_a_phase_and_restores_the_best_weights(tune):
    phase = tf.Phase("all", epochs=30, lr=0.01, patience=2, restore_best=True)
    result = tune([phase])
    report = result.strategy_steps[0][1]
    assert report.epochs < 30
    assert report.reason.startswith("early stopping: f1_macro did not improve for 2 epochs")
    assert report.best_epoch == report.epochs - 2
    best = max(entry["val"]["f1_macro"] for entry in report.history)
    assert report.val["f1_macro"] == best == result.report["splits"]["val"]["f1_macro"]


def test_phase_length_in_optimizer_steps(tune):
    report = tune([tf.Phase("all", steps=8)]).strategy_steps[0][1]
    assert (report.steps, report.epochs) == (8, 2)


def test_gradient_accumulation_steps_once_per_several_batches(tune):
    report = tune([tf.Phase("all", epochs=1)], grad_accum_steps=4).strategy_steps[0][1]
    assert report.steps == 2


def test_optimizer_keeps_state_between_phases_and_drops_that_of_frozen_parameters(tune):
    seen = []

    class Recorder:
        @tf.hookimpl
        def phase_started(self, run):
            state = run.optimization.optimizer.state
            named = run.model.parameters()
            seen.append(sorted(name for name, parameter in named.items() if parameter in state))

    tune(
        [tf.Phase("a", epochs=1), tf.Phase("b", train="head", epochs=1), tf.Phase("c", epochs=1)],
        callbacks=[Recorder()],
    )
    assert seen == [[], ["head.bias", "head.weight"], ["head.bias", "head.weight"]]


def test_learning_rates_follow_layer_decay_and_lr_scales(tune):
    lrs = {}

    class Recorder:
        @tf.hookimpl
        def phase_started(self, run):
            by_id = {id(p): group for group in run.optimization.param_groups() for p in group["params"]}
            lrs.update(
                {
                    name: (by_id[id(p)]["peak_lr"], by_id[id(p)]["weight_decay"])
                    for name, p in run.model.parameters().items()
                }
            )
            lrs["groups"] = len(run.optimization.param_groups())

    phase = tf.Phase("a", epochs=1, lr=0.1, layer_decay=0.5, lr_scales={"second.1.weight": 3.0}, weight_decay=0.2)
    tune([phase], callbacks=[Recorder()])
    assert lrs["head.weight"] == (0.1, 0.2)
    assert lrs["second.0.weight"] == (0.05, 0.2)
    assert lrs["second.1.weight"] == (pytest.approx(0.15), 0.0)
    assert lrs["first.0.bias"] == (0.025, 0.0)
    assert lrs["groups"] == 7


def test_users_optimizer_overrides_the_strategys(tune):
    seen = []

    class Recorder:
        @tf.hookimpl
        def phase_started(self, run):
            seen.append(type(run.optimization.optimizer).__name__)

    phase = tf.Phase("a", epochs=1, optimizer=tf.use("adamw"))
    tune([phase], callbacks=[Recorder()])
    tune([phase], callbacks=[Recorder()], optimizer="sgd")
    assert seen == ["AdamW", "SGD"]


def test_head_fit_solves_the_head_and_changes_nothing_else(tune):
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = tune([tf.HeadFit("probe")], model=net).strategy_steps[0][1]
    changed = [name for name, tensor in net.state_dict().items() if not torch.equal(before[name], tensor)]
    assert changed == ["head.weight", "head.bias"]
    assert report.val["accuracy"] > 0.7


@pytest.mark.parametrize("measure", ["gradients", "features", "lrs"])
def test_diagnosis_has_no_side_effects(tune, measure):
    plain = tune([tf.Phase("a", epochs=1), tf.Phase("b", train="head", epochs=1)])
    diagnosed = tune(
        [tf.Phase("a", epochs=1), tf.Diagnosis("diagnosis", measure=measure), tf.Phase("b", train="head", epochs=1)]
    )
    assert weights(plain) == weights(diagnosed)
    diagnostics = diagnosed.strategy_steps[1][1]
    assert len(diagnostics.values) == (25 if measure == "lrs" else 3)
    assert all(value >= 0 for value in diagnostics.values.values())


def test_weight_average_chooses_its_weight_on_validation_and_its_ends_are_exact(tune):
    start = tiny_net()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    result = tune([tf.Phase("a", epochs=3, lr=0.01), tf.WeightAverage("mix", snapshots=["start", "a"])], model=start)
    averaged = result.strategy_steps[1][1]
    assert averaged.val["f1_macro"] == max(entry["val"]["f1_macro"] for entry in averaged.history)
    only_start = tune(
        [tf.Phase("a", epochs=1), tf.WeightAverage("mix", snapshots=["start", "a"], weights=[0.0])], model=tiny_net()
    )
    state = only_start.model.module.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items() if tensor.is_floating_point())


def test_class_weights_and_sampling_reach_the_batches(tune):
    seen = []

    class Recorder:
        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            seen.append((batch.targets, batch.weights))
            result = yield
            return result

    tune([tf.Phase("a", epochs=1, class_weights={"b": 2.0})], callbacks=[Recorder()])
    targets, factors = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert factors[targets == 1].unique().item() == pytest.approx(1.5)
    assert factors[targets == 0].unique().item() == pytest.approx(0.75)
    seen.clear()
    tune([tf.Phase("a", epochs=1, sampling={"a": 0.0, "b": 3.0})], callbacks=[Recorder()])
    assert torch.bincount(torch.cat([targets for targets, _ in seen]), minlength=3).tolist() == [0, 72, 24]


def test_sample_groups_are_mixed_by_weight_and_passed_to_the_strategy(tune):
    seen, passed = [], []
    data = attrs.evolve(tiny_data(), sample_groups={"old": torch.arange(12), "new": torch.arange(12, 36)})

    class Recorder:
        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            seen.append(batch.indices)
            result = yield
            return result

        @tf.hookimpl
        def finetune_strategy(self, task):
            passed.append(dict(task.sample_groups))
            return [
                tf.Phase("half", epochs=1, mixture_weights={"old": 0.5}),
                tf.Phase("none", epochs=1, mixture_weights={"old": 0.0, "new": 1.0}),
            ]

    tune(Recorder(), data=data)
    half, none = torch.cat(seen[:6]), torch.cat(seen[6:])
    assert passed == [{"old": 12, "new": 24}]
    assert int((half < 12).sum()) == 48
    assert torch.bincount(half[half < 12]).tolist() == [4] * 12
    assert len(half[half >= 12].unique()) == 48
    assert sorted(none.tolist()) == sorted([*range(12, 36)] * 4)


def test_unknown_sample_group_is_an_error_that_lists_the_known_ones(tune):
    data = attrs.evolve(tiny_data(), sample_groups={"old": torch.arange(12)})
    with pytest.raises(tf.DataError, match="does not have.*its sample groups are old"):
        tune([tf.Phase("a", epochs=1, mixture_weights={"new": 0.5})], data=data)
    with pytest.raises(tf.DataError, match="rows that the training split does not have"):
        attrs.evolve(tiny_data(), sample_groups={"old": torch.tensor([96])})
    with pytest.raises(tf.UsageError, match="mixture_weights or sampling"):
        tf.Phase("a", epochs=1, mixture_weights={"new": 0.5}, sampling="balanced")
    with pytest.raises(tf.UsageError, match="at most 1"):
        tf.Phase("a", epochs=1, mixture_weights={"new": 0.7, "old": 0.7})


def test_reasons_of_steps_and_strategy_are_logged_and_reported(tune):
    @tf.component(api=1)
    class Reasons:
        @tf.hookimpl
        def finetune_strategy(self):
            yield tf.Phase("a", epochs=1, why="the <head> is new")
            return "nothing is left to gain"

    result = tune(Reasons(), page=True)
    log, page = (result.run_dir / "log.txt").read_text(), (result.run_dir / "report.html").read_text()
    assert "reason: the <head> is new" in log
    assert "strategy ended: nothing is left to gain" in log
    assert "because <bdi>the &lt;head&gt; is new</bdi>" in page
    assert "nothing is left to gain" in page
    assert result.report["stop_reason"] == "nothing is left to gain"
    assert result.strategy_steps[0][0].why == "the <head> is new"


def test_nan_loss_halts_the_run(tune, tmp_path):
    with pytest.raises(tf.HaltError, match="training loss is nan"):
        tune([tf.Phase("a", epochs=1, lr=1e30)], optimizer=tf.use("sgd"))
    status = json.loads((tmp_path / "run0" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "nan" in status["reason"]


def test_two_steps_with_the_same_name_are_refused(tune):
    with pytest.raises(tf.PluginError, match="two steps 'a'"):
        tune([tf.Phase("a", epochs=1), tf.Phase("a", epochs=1)])


def test_object_that_is_no_step_is_refused(tune):
    with pytest.raises(tf.PluginError, match="no step"):
        tune(lambda task: ["head"])


def test_run_never_overwrites_another(tune, tmp_path):
    result = tune([tf.Phase("a", epochs=1)])
    engine = tf.Engine(data=tiny_data(), model=tiny_net(), strategy=[tf.Phase("a", epochs=1)], out=result.run_dir)
    with pytest.raises(tf.FolderError, match="already holds a run"):
        engine.run()


def test_run_directory_in_use_names_the_process(tmp_path):
    from tuneforge.engine.storage.run_dir import RunDir

    with RunDir(tmp_path / "r"), pytest.raises(tf.FolderError, match=r"process \d+"), RunDir(tmp_path / "r"):
        pass
    with RunDir(tmp_path / "r"):
        pass


def test_averaged_weights_are_evaluated_and_saved(tune):
    result = tune([tf.Phase("a", epochs=3, lr=0.05)], callbacks=[tf.use("ema", decay=0.9)])
    assert result.report["splits"]["val"]["loss"] == result.strategy_steps[0][1].val["loss"]
    plain = tune([tf.Phase("a", epochs=3, lr=0.05)])
    assert weights(plain) != weights(result)


def test_weight_averages_leave_frozen_weights_bit_identical(tune):
    net = tiny_net()
    before = net.first[0].weight.clone()
    tune([tf.Phase("head", train="head", epochs=2)], model=net, callbacks=[tf.use("ema", decay=0.5)])
    assert torch.equal(before, net.first[0].weight)


def test_metric_objects_of_third_parties_can_be_used(tune):
    class Single:
        def __init__(self):
            self.right = torch.tensor(0)

        def update(self, outputs, targets):
            self.right += (outputs.argmax(1) == targets).sum()

        def compute(self):
            return self.right

    class Mine:
        @tf.hookimpl
        def evaluate(self, run):
            return Single()

    metrics = tune([tf.Phase("a", epochs=1)], metrics=["classification", Mine()]).report["splits"]["test"]
    assert metrics["single"] == round(metrics["accuracy"] * 30)


def test_weight_average_of_one_snapshot_restores_it(tune):
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tune([tf.Phase("a", epochs=1), tf.WeightAverage("back", snapshots=["start"])], model=net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_lr_scales_of_frozen_parameters_are_refused(tune):
    with pytest.raises(tf.SelectorError, match="matches no parameter that trains"):
        tune([tf.Phase("a", train="head", epochs=1, lr_scales={"first": 0.1})])
    with pytest.raises(tf.UsageError, match="at least 0"):
        tf.Phase("a", epochs=1, lr_scales={"head": -1.0})


def test_gradient_too_small_to_change_a_tensor_is_a_warning(tune):
    report = tune(
        [tf.Phase("a", epochs=1, lr=1e-3)], optimizer=tf.use("sgd"), callbacks=[tf.use("grad-clip", norm=1e-30)]
    )
    assert "first.0.weight" in report.strategy_steps[0][1].never_updated


@pytest.mark.parametrize("wrong", [42, tf.Phase, object()])
def test_object_that_is_no_strategy_is_refused(tune, wrong):
    with pytest.raises(tf.UsageError, match="is not a strategy"):
        tune(wrong)


def test_single_phase_is_a_strategy(tune):
    assert tune(tf.Phase("a", epochs=1)).strategy_steps[0][0].name == "a"


class Linear(torch.nn.Module):
    """A single linear layer, whose gradients are easy to compute: (batch, 8) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Identity()
        self.head = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def test_accumulated_batches_equal_one_large_batch_even_if_the_last_is_smaller(tune):
    phase = [tf.Phase("a", steps=1, lr=0.1)]
    updated = []
    for settings in (
        {"batch_size": 96},
        {"batch_size": 32, "grad_accum_steps": 100},
        {"batch_size": 20, "grad_accum_steps": 5},
    ):
        net = Linear()
        tune(phase, model=net, optimizer=tf.use("sgd", momentum=0.0), **settings)
        updated.append(net.head.weight.detach().clone())
    assert updated[0].abs().max() > 0
    assert torch.allclose(updated[0], updated[1], atol=1e-7)
    assert torch.allclose(updated[0], updated[2], atol=1e-7)


def test_accumulated_batches_get_different_dropout(tune):
    seen = []

    class Recorder:
        @tf.hookimpl(wrapper=True)
        def train_step(self):
            seen.append(torch.rand(1).item())
            result = yield
            return result

    tune([tf.Phase("a", steps=1)], grad_accum_steps=3, callbacks=[Recorder()])
    assert len(set(seen)) == 3


def test_weight_average_minimizes_the_loss_and_never_selects_nan(tune):
    phase = tf.Phase("a", epochs=3, lr=0.01)
    mix = tune([phase, tf.WeightAverage("mix", snapshots=["start", "a"], monitor="loss")]).strategy_steps[1][1]
    assert mix.val["loss"] == min(entry["val"]["loss"] for entry in mix.history)

    class Odd:
        def __init__(self, values):
            self.values = values

        @tf.hookimpl
        def evaluate(self, run):
            return self

        def update(self, outputs, targets):
            pass

        def compute(self):
            return {"odd": next(self.values)}

    values = iter([1.0, float("nan"), 0.5, 0.5, 0.5])
    average = tf.WeightAverage("mix", snapshots=["start", "a"], weights=[0.0, 1.0], monitor="odd", monitor_mode="max")
    chosen = (
        tune([tf.Phase("a", epochs=1), average], metrics=["classification", Odd(values)]).strategy_steps[1][1].selection
    )
    assert chosen["weight"] == 1.0


def test_metric_with_unknown_direction_needs_monitor_mode(tune):
    with pytest.raises(tf.UsageError, match="monitor_mode"):
        tune([tf.Phase("a", epochs=1, monitor="perplexity")])


def test_infinite_masks_survive_a_weight_average():
    from tuneforge.engine.loop.weight_average import average_snapshots, interpolate

    mask = {"mask": torch.tensor([0.0, -torch.inf]), "weight": torch.tensor([1.0, 2.0])}
    other = {"mask": mask["mask"].clone(), "weight": torch.tensor([3.0, 2.0])}
    for state in (interpolate(mask, other, 0.5), average_snapshots([mask, other])):
        assert state["mask"].tolist() == [0.0, -torch.inf]
        assert state["weight"].tolist() == [2.0, 2.0]


def test_parameters_frozen_by_the_user_stay_frozen_and_requires_grad_is_restored(tune):
    net = tiny_net()
    net.first[0].weight.requires_grad_(False)
    before = net.first[0].weight.clone()
    result = tune([tf.Phase("all", epochs=1), tf.Phase("head", train="head", epochs=1)], model=net)
    assert torch.equal(net.first[0].weight, before)
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["first.0.weight"]
    assert "came frozen" in result.model.changes[0]


def test_callers_random_state_is_restored(tune):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tune([tf.Phase("a", epochs=1)])
    assert torch.equal(torch.rand(1), expected)


def test_engine_runs_once(tmp_path):
    engine = tf.Engine(
        data=tiny_data(), model=tiny_net(), strategy=tf.Phase("a", epochs=1), page=False, out=tmp_path / "a"
    )
    engine.run()
    with pytest.raises(tf.UsageError, match="runs once"):
        engine.run()


def test_randomly_initialized_weights_depend_on_the_seed(tune):
    class Builds:
        @tf.hookimpl
        def model_adapt(self):
            from tiny import TinyNet

            return tf.Model.from_module(TinyNet())

    one, two, other = (tune([tf.Phase("a", epochs=1)], model=Builds(), seed=seed) for seed in (1, 1, 2))
    assert weights(one) == weights(two)
    assert weights(one) != weights(other)


def test_same_callback_twice_is_refused(tune):
    with pytest.raises(tf.UsageError, match="named twice"):
        tune([tf.Phase("a", epochs=1)], callbacks=[tf.use("ema", decay=0.5), tf.use("ema", decay=0.9)])


def test_method_with_a_hooks_name_but_without_hookimpl_is_refused(tune):
    class Forgot:
        @tf.hookimpl
        def phase_started(self, run):
            pass

        def epoch_ended(self, run):
            pass

    with pytest.raises(tf.PluginLoadError, match="no @hookimpl"):
        tune([tf.Phase("a", epochs=1)], callbacks=[Forgot()])


def test_component_must_implement_the_hook_it_is_chosen_for(tune):
    with pytest.raises(tf.UsageError, match="does not implement train_step"):
        tune([tf.Phase("a", epochs=1)], loss=_clipper())


def _clipper():
    from tuneforge.builtin.callbacks import GradClip

    return GradClip()


def test_iterable_whose_iter_is_a_generator_gets_results(tune):
    results = []

    class Plan:
        def __iter__(self):
            results.append((yield tf.Phase("a", epochs=1)))

    tune(lambda task: Plan())
    assert results[0].step_name == "a"


def test_head_that_does_not_compute_the_output_is_found_before_training(tune):
    class Aux(Linear):
        def __init__(self):
            super().__init__()
            self.late = torch.nn.Linear(8, 5)

    with pytest.raises(tf.PluginError, match="the head 'late' does not compute the output"):
        tune([tf.Phase("a", epochs=1)], model=tf.Model.from_module(Aux(), head="late"), adapt=[KeepHead()])


class KeepHead:
    @tf.hookimpl
    def model_adapt(self, model):
        return model


def test_model_that_does_not_accept_the_data_is_found_before_training(tune):
    with pytest.raises(tf.PluginError, match="does not accept the data"):
        tune([tf.Phase("a", epochs=1)], model=torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)))


class Embedded(torch.nn.Module):
    """A network whose position embeddings fit images of one size only."""

    def __init__(self, side):
        super().__init__()
        self.patches = torch.nn.Conv2d(2, 4, 4, 4)
        self.position = torch.nn.Parameter(torch.zeros(4, side // 4, side // 4))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, images):
        return self.head((self.patches(images) + self.position).mean((2, 3)))


@pytest.mark.parametrize("side", [16, 28, 224])
def test_images_of_a_size_that_does_not_fit_are_refused_with_one_that_does(tmp_path, side):
    images, labels = torch.randn(40, 2, 12, 12), torch.arange(40) % 2
    engine = tf.Engine(
        data=(images, labels), model=Embedded(side), strategy=tf.Phase("a", epochs=1), out=tmp_path / "r"
    )
    with pytest.raises(tf.PluginError, match=rf"inputs \(2, 2, 12, 12\).*accepts images of {side}x{side} pixels"):
        engine.prepare()


def test_images_with_other_channels_are_refused_without_a_size(tmp_path):
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 2
    engine = tf.Engine(data=(images, labels), model=Embedded(16), strategy=tf.Phase("a", epochs=1), out=tmp_path / "r")
    with pytest.raises(tf.PluginError, match=r"expected input.* to have 2 channels.*choose a model"):
        engine.prepare()


def test_model_that_flattens_with_view_runs_without_channels_last(tmp_path):
    class Viewer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 4, 3, padding=1)
            self.head = torch.nn.Linear(64, 2)

        def forward(self, images):
            return self.head(self.conv(images).view(len(images), -1))

    images, labels = torch.randn(40, 2, 4, 4), torch.arange(40) % 2
    lines = []
    tf.Engine(
        data=(images, labels), model=Viewer(), strategy=tf.Phase("a", epochs=1), log=lines.append, out=tmp_path / "r"
    ).run()
    assert [line for line in lines if "channels-last is off" in line]


def test_sgd_continues_after_layers_are_unfrozen(tune):
    steps = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=1)]
    assert tune(steps, optimizer="sgd").strategy_steps[1][1].num_frozen == 0


def test_single_leftover_sample_joins_the_previous_batch(tune):
    from tiny import blobs

    data = attrs.evolve(tiny_data(), train=blobs(97, seed=1))
    assert tune([tf.Phase("a", epochs=1)], data=data).strategy_steps[0][1].steps == 6


def test_model_that_caches_tensors_in_evaluation_can_continue_training(tune):
    class Caches(Linear):
        cached = None

        def forward(self, inputs):
            if self.cached is None or len(self.cached) != len(inputs):
                self.cached = torch.ones(len(inputs), 1)
            return super().forward(inputs * self.cached)

    assert (
        tune([tf.Phase("a", epochs=2)], model=Caches(), batch_size=16, eval_batch_size=16).strategy_steps[0][1].epochs
        == 2
    )


def test_overridden_train_method_is_called_when_training_continues(tune):
    class Merges(torch.nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.calls = []

        def train(self, mode=True):
            self.calls.append(mode)
            return super().train(mode)

    net = Linear()
    net.head = Merges()
    tune([tf.Phase("a", epochs=2)], model=net)
    assert net.head.calls[-1] is False
    assert net.head.calls.count(True) >= 2


def test_train_step_that_returns_only_the_loss_is_an_error(tune):
    class Bare:
        @tf.hookimpl
        def train_step(self, run, batch):
            return run.forward(batch.inputs).sum()

    with pytest.raises(tf.PluginError, match="scalar loss and the outputs"):
        tune([tf.Phase("a", epochs=1)], loss=Bare())


def test_load_repeats_the_model_changes_of_a_callback(tmp_path):
    result = tf.Engine(
        data=tf.use("digits", per_class=2, other_share=0.0), strategy=tf.Phase("a", steps=1), page=False,
        callbacks=["tiny:DoubleHeadInput"], out=tmp_path / "r",
    ).run()  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(tf.load(result.run_dir).model.module(images), result.model.module.eval()(images))


def test_error_after_the_report_leaves_the_run_done(tune, tmp_path):
    class Fails:
        @tf.hookimpl
        def run_ended(self):
            raise ValueError("page")

    with pytest.raises(tf.PluginError):
        tune([tf.Phase("a", epochs=1)], callbacks=[Fails()])
    assert json.loads((tmp_path / "run0" / "status.json").read_text())["state"] == "done"


def test_strategy_without_steps_is_noted(tmp_path):
    lines = []
    tf.Engine(data=tiny_data(), model=tiny_net(), strategy=[], log=lines.append, page=False, out=tmp_path / "r").run()
    assert [line for line in lines if "nothing was trained" in line]


def test_freezing_a_randomly_initialized_model_is_noted(tmp_path):
    noted = {}
    for strategy in ("freeze-then-unfreeze", "full"):
        lines = []
        data = tf.use("digits", per_class=2, other_share=0.0)
        model, chosen = tf.use("digit-cnn", pretrained=False), tf.use(strategy, epochs=1)
        tf.Engine(data=data, model=model, strategy=chosen, log=lines.append, page=False, out=tmp_path / strategy).run()
        noted[strategy] = any("freezing preserves random weights" in line for line in lines)
    assert noted == {"freeze-then-unfreeze": True, "full": False}


def test_run_json_marks_python_objects_without_source_paths(tune):
    class Observer:
        @tf.hookimpl
        def phase_started(self, run):
            pass

    result = tune([tf.Phase("a", epochs=1)], callbacks=[Observer()])
    text = (result.run_dir / "run.json").read_text()
    record = json.loads(text)
    names = [record["config"][key]["name"] for key in ("data", "model", "strategy")]
    assert names == ["object:data", "object:model", "object:strategy"]
    assert [each["name"] for each in record["components"]] == [*names, "object:callback"]
    assert "tuneforge.engine" not in text
    assert tf.load(result.run_dir, model=tiny_net()).model.head == "head"


def test_load_asks_again_for_a_callback_object_that_adapts_the_model(tune):
    class Adapter:
        @tf.hookimpl(wrapper=True)
        def model_adapt(self, run):
            model = yield
            return model

    result = tune([tf.Phase("a", epochs=1)], callbacks=[Adapter()])
    with pytest.raises(tf.FolderError, match="was given this component as a Python object"):
        tf.load(result.run_dir, model=tiny_net())


@tf.component(api=1)
class PlainModule:
    """A model component that returns a module."""

    @tf.hookimpl
    def model_adapt(self):
        return tiny_net()


def test_a_model_component_may_return_a_module(tune):
    result = tune([tf.Phase("all", epochs=1)], model=PlainModule())
    assert result.model.head == "head"
    plain = tune([tf.Phase("all", epochs=1)], model=tiny_net())
    for one, other in zip(result.model.module.parameters(), plain.model.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("built", "message"),
    [(None, "returned no model from model_adapt"), ("resnet18", "what builds the model returned str")],
)
def test_a_model_component_that_returns_something_else_is_named(tune, built, message):
    class Wrong:
        @tf.hookimpl
        def model_adapt(self):
            return built

    with pytest.raises(tf.PluginError, match=message):
        tune([], model=Wrong())


def test_an_adapter_that_returns_a_module_is_refused(tune):
    class Adapter:
        @tf.hookimpl
        def model_adapt(self, model):
            return model.module

    with pytest.raises(
        tf.PluginError, match="returned TinyNet from model_adapt.*layer groups and classes go on with it"
    ):
        tune([], adapt=[Adapter()])
