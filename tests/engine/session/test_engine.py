import json

import attrs
import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.plugin.serialization import from_json


def weights(result):
    return (result.run_dir / "model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tune):
    strategy = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=2, lr=0.01)]
    one, two, other = (tune(strategy, seed=seed, callbacks=[tf.use("ema")]) for seed in (1, 1, 2))
    assert weights(one) == weights(two)
    assert weights(one) != weights(other)
    for name in ("metrics.jsonl", "steps.jsonl", "report.json", "model.json"):
        assert (one.run_dir / name).read_bytes() == (two.run_dir / name).read_bytes()


def test_noise_inside_the_model_does_not_depend_on_what_ran_before(tune):
    one = tune([tf.Phase("all", epochs=2)])
    torch.rand(17)
    assert weights(one) == weights(tune([tf.Phase("all", epochs=2)]))


def test_the_folder_holds_what_it_should(tune):
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


def test_a_strategy_is_answered_and_decides(tune):
    heard = []

    def strategy(task):
        report = yield tf.Phase("head", train="head", epochs=1)
        heard.append(report)
        if report.val["recall_min"] < 1.1:
            yield tf.Phase("more", epochs=1)

    result = tune(strategy)
    assert [step.name for step, _ in result.strategy_steps] == ["head", "more"]
    assert set(heard[0].val["per_class"]) == {"a", "b", "c"}
    assert len(heard[0].val["confusion"]) == 3
    logged = [json.loads(line) for line in (result.run_dir / "steps.jsonl").read_text().splitlines()]
    assert from_json(json.dumps(logged[0]["result"])).val["recall_min"] == heard[0].val["recall_min"]


def test_early_stop_ends_a_phase_and_says_so_and_best_weights_come_back(tune):
    phase = tf.Phase("all", epochs=30, lr=0.01, patience=2, restore_best=True)
    result = tune([phase])
    report = result.strategy_steps[0][1]
    assert report.epochs < 30
    assert report.reason.startswith("early stopping: f1_macro did not improve for 2 epochs")
    assert report.best_epoch == report.epochs - 2
    best = max(entry["val"]["f1_macro"] for entry in report.history)
    assert report.val["f1_macro"] == best == result.report["splits"]["val"]["f1_macro"]


def test_a_phase_can_be_given_in_steps(tune):
    report = tune([tf.Phase("all", steps=8)]).strategy_steps[0][1]
    assert (report.steps, report.epochs) == (8, 2)


def test_accumulated_gradients_step_once_for_several_batches(tune):
    report = tune([tf.Phase("all", epochs=1)], grad_accum_steps=4).strategy_steps[0][1]
    assert report.steps == 2


def test_the_optimizer_keeps_moments_over_phases_and_drops_those_of_the_frozen(tune):
    seen = []

    class Watches:
        @tf.hookimpl
        def phase_started(self, run):
            state = run.optimization.optimizer.state
            named = run.model.parameters()
            seen.append(sorted(name for name, parameter in named.items() if parameter in state))

    tune(
        [tf.Phase("a", epochs=1), tf.Phase("b", train="head", epochs=1), tf.Phase("c", epochs=1)],
        callbacks=[Watches()],
    )
    assert seen == [[], ["head.bias", "head.weight"], ["head.bias", "head.weight"]]


def test_rates_follow_layer_decay_and_scales(tune):
    rates = {}

    class Watches:
        @tf.hookimpl
        def phase_started(self, run):
            by_id = {id(p): group for group in run.optimization.param_groups() for p in group["params"]}
            rates.update(
                {
                    name: (by_id[id(p)]["peak_lr"], by_id[id(p)]["weight_decay"])
                    for name, p in run.model.parameters().items()
                }
            )
            rates["groups"] = len(run.optimization.param_groups())

    phase = tf.Phase("a", epochs=1, lr=0.1, layer_decay=0.5, lr_scales={"second.1.weight": 3.0}, weight_decay=0.2)
    tune([phase], callbacks=[Watches()])
    assert rates["head.weight"] == (0.1, 0.2)
    assert rates["second.0.weight"] == (0.05, 0.2)
    assert rates["second.1.weight"] == (pytest.approx(0.15), 0.0)
    assert rates["first.0.bias"] == (0.025, 0.0)
    assert rates["groups"] == 7


def test_what_the_user_says_beats_the_strategy(tune):
    seen = []

    class Watches:
        @tf.hookimpl
        def phase_started(self, run):
            seen.append(type(run.optimization.optimizer).__name__)

    phase = tf.Phase("a", epochs=1, optimizer=tf.use("adamw"))
    tune([phase], callbacks=[Watches()])
    tune([phase], callbacks=[Watches()], optimizer="sgd")
    assert seen == ["AdamW", "SGD"]


def test_a_fit_solves_the_head_and_moves_nothing_else(tune):
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = tune([tf.HeadFit("probe")], model=net).strategy_steps[0][1]
    moved = [name for name, tensor in net.state_dict().items() if not torch.equal(before[name], tensor)]
    assert moved == ["head.weight", "head.bias"]
    assert report.val["accuracy"] > 0.7


@pytest.mark.parametrize("measure", ["gradients", "features", "lrs"])
def test_a_probe_leaves_no_trace(tune, measure):
    plain = tune([tf.Phase("a", epochs=1), tf.Phase("b", train="head", epochs=1)])
    probed = tune(
        [tf.Phase("a", epochs=1), tf.Diagnosis("look", measure=measure), tf.Phase("b", train="head", epochs=1)]
    )
    assert weights(plain) == weights(probed)
    readings = probed.strategy_steps[1][1]
    assert len(readings.values) == (25 if measure == "lrs" else 3)
    assert all(value >= 0 for value in readings.values.values())


def test_a_blend_picks_its_weight_on_validation_and_its_ends_are_exact(tune):
    start = tiny_net()
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    result = tune([tf.Phase("a", epochs=3, lr=0.01), tf.WeightAverage("mix", snapshots=["start", "a"])], model=start)
    blended = result.strategy_steps[1][1]
    assert blended.val["f1_macro"] == max(entry["val"]["f1_macro"] for entry in blended.history)
    only_start = tune(
        [tf.Phase("a", epochs=1), tf.WeightAverage("mix", snapshots=["start", "a"], weights=[0.0])], model=tiny_net()
    )
    state = only_start.model.module.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items() if tensor.is_floating_point())


def test_class_weights_and_sampling_reach_the_batches(tune):
    seen = []

    class Watches:
        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            seen.append((batch.targets, batch.weights))
            result = yield
            return result

    tune([tf.Phase("a", epochs=1, class_weights={"b": 2.0})], callbacks=[Watches()])
    targets, factors = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert factors[targets == 1].unique().item() == pytest.approx(1.5)
    assert factors[targets == 0].unique().item() == pytest.approx(0.75)
    seen.clear()
    tune([tf.Phase("a", epochs=1, sampling={"a": 0.0, "b": 3.0})], callbacks=[Watches()])
    assert torch.bincount(torch.cat([targets for targets, _ in seen]), minlength=3).tolist() == [0, 72, 24]


def test_parts_of_the_training_split_are_mixed_by_share_and_a_strategy_is_told_of_them(tune):
    seen, told = [], []
    data = attrs.evolve(tiny_data(), sample_groups={"old": torch.arange(12), "new": torch.arange(12, 36)})

    class Watches:
        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            seen.append(batch.indices)
            result = yield
            return result

        @tf.hookimpl
        def finetune_strategy(self, task):
            told.append(dict(task.sample_groups))
            return [
                tf.Phase("half", epochs=1, mixture_weights={"old": 0.5}),
                tf.Phase("none", epochs=1, mixture_weights={"old": 0.0, "new": 1.0}),
            ]

    tune(Watches(), data=data)
    half, none = torch.cat(seen[:6]), torch.cat(seen[6:])
    assert told == [{"old": 12, "new": 24}]
    assert int((half < 12).sum()) == 48
    assert torch.bincount(half[half < 12]).tolist() == [4] * 12
    assert len(half[half >= 12].unique()) == 48
    assert sorted(none.tolist()) == sorted([*range(12, 36)] * 4)


def test_a_mix_of_parts_that_are_not_there_is_an_error_that_names_those_that_are(tune):
    data = attrs.evolve(tiny_data(), sample_groups={"old": torch.arange(12)})
    with pytest.raises(tf.DataError, match="does not have.*its sample groups are old"):
        tune([tf.Phase("a", epochs=1, mixture_weights={"new": 0.5})], data=data)
    with pytest.raises(tf.DataError, match="rows that do not exist"):
        attrs.evolve(tiny_data(), sample_groups={"old": torch.tensor([96])})
    with pytest.raises(tf.UsageError, match="mixture_weights or sampling"):
        tf.Phase("a", epochs=1, mixture_weights={"new": 0.5}, sampling="balanced")
    with pytest.raises(tf.UsageError, match="at most 1"):
        tf.Phase("a", epochs=1, mixture_weights={"new": 0.7, "old": 0.7})


def test_a_strategy_says_why_it_asks_and_why_it_ends(tune):
    @tf.component(api=1)
    class Says:
        @tf.hookimpl
        def finetune_strategy(self):
            yield tf.Phase("a", epochs=1, why="the <head> is new")
            return "nothing is left to gain"

    result = tune(Says(), page=True)
    log, page = (result.run_dir / "log.txt").read_text(), (result.run_dir / "report.html").read_text()
    assert "reason: the <head> is new" in log
    assert "strategy ended: nothing is left to gain" in log
    assert "because <bdi>the &lt;head&gt; is new</bdi>" in page
    assert "nothing is left to gain" in page
    assert result.report["stop_reason"] == "nothing is left to gain"
    assert result.strategy_steps[0][0].why == "the <head> is new"


def test_a_loss_that_is_no_number_halts_the_run(tune, tmp_path):
    with pytest.raises(tf.HaltError, match="training loss is nan"):
        tune([tf.Phase("a", epochs=1, lr=1e30)], optimizer=tf.use("sgd"))
    status = json.loads((tmp_path / "run0" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "nan" in status["reason"]


def test_two_steps_of_one_name_are_refused(tune):
    with pytest.raises(tf.PluginError, match="two steps 'a'"):
        tune([tf.Phase("a", epochs=1), tf.Phase("a", epochs=1)])


def test_something_that_is_no_step_is_refused(tune):
    with pytest.raises(tf.PluginError, match="no step"):
        tune(lambda task: ["head"])


def test_a_run_never_writes_over_another(tune, tmp_path):
    result = tune([tf.Phase("a", epochs=1)])
    engine = tf.Engine(data=tiny_data(), model=tiny_net(), strategy=[tf.Phase("a", epochs=1)], out=result.run_dir)
    with pytest.raises(tf.FolderError, match="already holds a run"):
        engine.run()


def test_a_folder_in_use_names_its_holder(tmp_path):
    from tuneforge.engine.storage.run_dir import RunDir

    with RunDir(tmp_path / "r"), pytest.raises(tf.FolderError, match=r"process \d+"), RunDir(tmp_path / "r"):
        pass
    with RunDir(tmp_path / "r"):
        pass


def test_averaged_weights_are_what_is_evaluated_and_kept(tune):
    result = tune([tf.Phase("a", epochs=3, lr=0.05)], callbacks=[tf.use("ema", decay=0.9)])
    assert result.report["splits"]["val"]["loss"] == result.strategy_steps[0][1].val["loss"]
    plain = tune([tf.Phase("a", epochs=3, lr=0.05)])
    assert weights(plain) != weights(result)


def test_averages_leave_frozen_weights_alone_to_the_bit(tune):
    net = tiny_net()
    before = net.first[0].weight.clone()
    tune([tf.Phase("head", train="head", epochs=2)], model=net, callbacks=[tf.use("ema", decay=0.5)])
    assert torch.equal(before, net.first[0].weight)


def test_metrics_of_a_third_party_fit_as_they_are(tune):
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

    figures = tune([tf.Phase("a", epochs=1)], metrics=["classification", Mine()]).report["splits"]["test"]
    assert figures["single"] == round(figures["accuracy"] * 30)


def test_a_blend_of_one_snapshot_goes_back_to_it(tune):
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tune([tf.Phase("a", epochs=1), tf.WeightAverage("back", snapshots=["start"])], model=net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_rate_factors_of_what_does_not_train_are_refused(tune):
    with pytest.raises(tf.SelectorError, match="nothing trains"):
        tune([tf.Phase("a", train="head", epochs=1, lr_scales={"first": 0.1})])
    with pytest.raises(tf.UsageError, match="at least 0"):
        tf.Phase("a", epochs=1, lr_scales={"head": -1.0})


def test_a_clipped_gradient_that_cannot_move_a_tensor_is_no_defect(tune):
    report = tune(
        [tf.Phase("a", epochs=1, lr=1e-3)], optimizer=tf.use("sgd"), callbacks=[tf.use("grad-clip", norm=1e-30)]
    )
    assert "first.0.weight" in report.strategy_steps[0][1].never_updated


@pytest.mark.parametrize("wrong", [42, tf.Phase, object()])
def test_what_is_no_strategy_is_refused_with_a_message(tune, wrong):
    with pytest.raises(tf.UsageError, match="is not a strategy"):
        tune(wrong)


def test_a_single_phase_is_a_strategy(tune):
    assert tune(tf.Phase("a", epochs=1)).strategy_steps[0][0].name == "a"


class Linear(torch.nn.Module):
    """One layer, so that a step can be computed by hand: (batch, 8) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Identity()
        self.head = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def test_accumulated_batches_move_as_one_large_batch_does_also_where_the_last_group_is_smaller(tune):
    phase = [tf.Phase("a", steps=1, lr=0.1)]
    moved = []
    for given in (
        {"batch_size": 96},
        {"batch_size": 32, "grad_accum_steps": 100},
        {"batch_size": 20, "grad_accum_steps": 5},
    ):
        net = Linear()
        tune(phase, model=net, optimizer=tf.use("sgd", momentum=0.0), **given)
        moved.append(net.head.weight.detach().clone())
    assert moved[0].abs().max() > 0
    assert torch.allclose(moved[0], moved[1], atol=1e-7)
    assert torch.allclose(moved[0], moved[2], atol=1e-7)


def test_batches_of_one_step_get_noise_of_their_own(tune):
    seen = []

    class Watches:
        @tf.hookimpl(wrapper=True)
        def train_step(self):
            seen.append(torch.rand(1).item())
            result = yield
            return result

    tune([tf.Phase("a", steps=1)], grad_accum_steps=3, callbacks=[Watches()])
    assert len(set(seen)) == 3


def test_a_blend_on_the_loss_takes_the_least_and_a_nan_never_wins(tune):
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
    blend = tf.WeightAverage("mix", snapshots=["start", "a"], weights=[0.0, 1.0], monitor="odd", monitor_mode="max")
    chosen = (
        tune([tf.Phase("a", epochs=1), blend], metrics=["classification", Odd(values)]).strategy_steps[1][1].selection
    )
    assert chosen["weight"] == 1.0


def test_a_figure_whose_direction_nobody_knows_must_be_declared(tune):
    with pytest.raises(tf.UsageError, match="monitor_mode"):
        tune([tf.Phase("a", epochs=1, monitor="perplexity")])


def test_infinite_masks_survive_a_blend():
    from tuneforge.engine.loop.weight_average import average_snapshots, interpolate

    mask = {"mask": torch.tensor([0.0, -torch.inf]), "weight": torch.tensor([1.0, 2.0])}
    other = {"mask": mask["mask"].clone(), "weight": torch.tensor([3.0, 2.0])}
    for state in (interpolate(mask, other, 0.5), average_snapshots([mask, other])):
        assert state["mask"].tolist() == [0.0, -torch.inf]
        assert state["weight"].tolist() == [2.0, 2.0]


def test_what_came_frozen_stays_frozen_and_flags_are_as_they_came(tune):
    net = tiny_net()
    net.first[0].weight.requires_grad_(False)
    before = net.first[0].weight.clone()
    result = tune([tf.Phase("all", epochs=1), tf.Phase("head", train="head", epochs=1)], model=net)
    assert torch.equal(net.first[0].weight, before)
    assert [name for name, each in net.named_parameters() if not each.requires_grad] == ["first.0.weight"]
    assert "came frozen" in result.model.changes[0]


def test_the_callers_random_generator_is_left_as_it_was(tune):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tune([tf.Phase("a", epochs=1)])
    assert torch.equal(torch.rand(1), expected)


def test_an_engine_runs_once(tmp_path):
    engine = tf.Engine(
        data=tiny_data(), model=tiny_net(), strategy=tf.Phase("a", epochs=1), page=False, out=tmp_path / "a"
    )
    engine.run()
    with pytest.raises(tf.UsageError, match="runs once"):
        engine.run()


def test_fresh_weights_of_any_builder_follow_from_the_seed(tune):
    class Builds:
        @tf.hookimpl
        def model_adapt(self):
            from tiny import TinyNet

            return tf.Model.from_module(TinyNet())

    one, two, other = (tune([tf.Phase("a", epochs=1)], model=Builds(), seed=seed) for seed in (1, 1, 2))
    assert weights(one) == weights(two)
    assert weights(one) != weights(other)


def test_the_same_extension_twice_is_refused(tune):
    with pytest.raises(tf.UsageError, match="named twice"):
        tune([tf.Phase("a", epochs=1)], callbacks=[tf.use("ema", decay=0.5), tf.use("ema", decay=0.9)])


def test_a_method_that_is_only_named_like_a_hook_is_refused(tune):
    class Forgot:
        @tf.hookimpl
        def phase_started(self, run):
            pass

        def epoch_ended(self, run):
            pass

    with pytest.raises(tf.PluginLoadError, match="no @hookimpl"):
        tune([tf.Phase("a", epochs=1)], callbacks=[Forgot()])


def test_a_component_must_answer_the_hook_it_is_chosen_for(tune):
    with pytest.raises(tf.UsageError, match="does not implement train_step"):
        tune([tf.Phase("a", epochs=1)], loss=_clipper())


def _clipper():
    from tuneforge.builtin.callbacks import GradClip

    return GradClip()


def test_an_object_that_hides_a_generator_is_answered(tune):
    heard = []

    class Plan:
        def __iter__(self):
            heard.append((yield tf.Phase("a", epochs=1)))

    tune(lambda task: Plan())
    assert heard[0].step_name == "a"


def test_a_head_that_does_not_answer_is_found_before_training(tune):
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


def test_a_model_that_cannot_take_the_data_is_found_before_training(tune):
    with pytest.raises(tf.PluginError, match="does not accept the data"):
        tune([tf.Phase("a", epochs=1)], model=torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)))


def test_a_model_that_flattens_with_view_runs_without_channels_last(tmp_path):
    class Viewer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 4, 3, padding=1)
            self.head = torch.nn.Linear(64, 2)

        def forward(self, images):
            return self.head(self.conv(images).view(len(images), -1))

    images, labels = torch.randn(40, 2, 4, 4), torch.arange(40) % 2
    said = []
    tf.Engine(
        data=(images, labels), model=Viewer(), strategy=tf.Phase("a", epochs=1), log=said.append, out=tmp_path / "r"
    ).run()
    assert [line for line in said if "channels-last is off" in line]


def test_sgd_goes_on_over_a_thawing(tune):
    steps = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=1)]
    assert tune(steps, optimizer="sgd").strategy_steps[1][1].num_frozen == 0


def test_one_sample_left_over_joins_the_batch_before(tune):
    from tiny import blobs

    data = attrs.evolve(tiny_data(), train=blobs(97, seed=1))
    assert tune([tf.Phase("a", epochs=1)], data=data).strategy_steps[0][1].steps == 6


def test_a_model_that_keeps_tensors_from_evaluation_can_train_on(tune):
    class Caches(Linear):
        kept = None

        def forward(self, inputs):
            if self.kept is None or len(self.kept) != len(inputs):
                self.kept = torch.ones(len(inputs), 1)
            return super().forward(inputs * self.kept)

    assert (
        tune([tf.Phase("a", epochs=2)], model=Caches(), batch_size=16, eval_batch_size=16).strategy_steps[0][1].epochs
        == 2
    )


def test_a_module_that_merges_for_evaluation_is_told_to_train_again(tune):
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


def test_a_step_that_returns_only_the_loss_is_named(tune):
    class Bare:
        @tf.hookimpl
        def train_step(self, run, batch):
            return run.forward(batch.inputs).sum()

    with pytest.raises(tf.PluginError, match="scalar loss and the outputs"):
        tune([tf.Phase("a", epochs=1)], loss=Bare())


def test_load_rebuilds_what_an_extension_did_to_the_model(tmp_path):
    result = tf.Engine(
        data=tf.use("digits", per_class=2, other_share=0.0), strategy=tf.Phase("a", steps=1), page=False,
        callbacks=["tiny:Doubles"], out=tmp_path / "r",
    ).run()  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(tf.load(result.run_dir).model.module(images), result.model.module.eval()(images))


def test_an_error_after_the_report_leaves_the_run_done(tune, tmp_path):
    class Fails:
        @tf.hookimpl
        def run_ended(self):
            raise ValueError("page")

    with pytest.raises(tf.PluginError):
        tune([tf.Phase("a", epochs=1)], callbacks=[Fails()])
    assert json.loads((tmp_path / "run0" / "status.json").read_text())["state"] == "done"


def test_no_step_at_all_is_said(tmp_path):
    said = []
    tf.Engine(data=tiny_data(), model=tiny_net(), strategy=[], log=said.append, page=False, out=tmp_path / "r").run()
    assert [line for line in said if "nothing was trained" in line]


def test_freezing_a_model_of_fresh_weights_is_said_and_training_all_of_it_is_not(tmp_path):
    said = {}
    for strategy in ("freeze-then-unfreeze", "full"):
        lines = []
        data = tf.use("digits", per_class=2, other_share=0.0)
        model, asked = tf.use("digit-cnn", pretrained=False), tf.use(strategy, epochs=1)
        tf.Engine(data=data, model=model, strategy=asked, log=lines.append, page=False, out=tmp_path / strategy).run()
        said[strategy] = any("freezing preserves random weights" in line for line in lines)
    assert said == {"freeze-then-unfreeze": True, "full": False}
