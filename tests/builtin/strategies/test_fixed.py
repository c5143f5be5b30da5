"""Each strategy on the small world: what is frozen stays, what trains moves, and the paper's formula holds."""

import pytest
import torch
from tiny import tiny_data, tiny_net
from torch import nn
from torch.nn import functional as F

import tuneforge as tf
from tuneforge.builtin.strategies.fixed import LPFT, BiasOnly, FreezeThenUnfreeze, LayerDecay, NormOnly, WiSEFT
from tuneforge.builtin.strategies.penalties import L2SP
from tuneforge.engine.feature_cache import build as feature_cache_build
from tuneforge.engine.session import resume as memory
from tuneforge.engine.storage import fault_injection as faults

NORMS = {f"{block}.1.{name}" for block in ("first", "second") for name in ("weight", "bias")}
BIASES = {f"{block}.{place}.bias" for block in ("first", "second") for place in (0, 1)}
HEAD = {"head.weight", "head.bias"}
BACKBONE = NORMS | BIASES | {"first.0.weight", "second.0.weight"}
STATISTICS = {f"{block}.1.{name}" for block in ("first", "second") for name in ("running_mean", "running_var")}


class Witness:
    """Copies the model's state and the rates when a phase starts."""

    def __init__(self):
        self.starts = []
        self.rates = []

    @tf.hookimpl
    def phase_started(self, run):
        self.starts.append({name: each.detach().clone() for name, each in run.model.module.state_dict().items()})
        by_id = {id(each): group["peak_lr"] for group in run.optimization.param_groups() for each in group["params"]}
        named = run.model.parameters()
        self.rates.append({name: by_id[id(each)] for name, each in named.items() if id(each) in by_id})


def moved(before, result):
    after = result.model.module.state_dict()
    return {name for name in after if not torch.equal(before[name], after[name])} - {
        name for name in after if name.endswith("num_batches_tracked")
    }


def start():
    return {name: each.clone() for name, each in tiny_net().state_dict().items()}


def knowing(*labels):
    return tf.Model.from_module(tiny_net(), head="head", labels=labels)


def test_norm_only_moves_norms_their_statistics_and_the_head_and_nothing_else(tune):
    result = tune(NormOnly(epochs=2))
    assert moved(start(), result) == NORMS | STATISTICS | HEAD


def test_bias_only_moves_biases_and_the_head_and_no_statistic(tune):
    result = tune(BiasOnly(epochs=2))
    assert moved(start(), result) == BIASES | HEAD


@pytest.mark.parametrize("strategy", [LayerDecay(epochs=1), L2SP(epochs=1), LPFT(epochs=1), WiSEFT(epochs=1)])
def test_the_others_move_every_parameter(tune, strategy):
    result = tune(strategy)
    assert moved(start(), result) >= set(result.model.parameters())


def plain():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def test_norm_only_refuses_a_model_without_norms(tune):
    with pytest.raises(tf.SelectorError, match="norm"):
        tune(NormOnly(), model=plain())


def test_bias_only_refuses_a_model_whose_only_bias_is_the_heads(tune):
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 3))
    with pytest.raises(tf.SelectorError, match="no bias below its head.*head-only"):
        tune(BiasOnly(), model=module)


def test_layer_decay_gives_learning_rates_geometric_in_depth(tune):
    witness = Witness()
    tune(LayerDecay(epochs=1, lr=0.1, decay=0.5), callbacks=[witness])
    (rates,) = witness.rates
    for name_of, rate in (("head.", 0.1), ("second.", 0.05), ("first.", 0.025)):
        assert {each for name, each in rates.items() if name.startswith(name_of)} == {rate}


def logits_of_logistic_regression(module, *, l2):
    """Scikit-learn's answer on standardized features of the frozen network, for validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = tiny_data()
    with torch.no_grad():
        train, val = (
            module.second(module.first(split.fetch(torch.arange(len(split))))).numpy()
            for split in (data.train, data.val)
        )
    solver = LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000)
    return make_pipeline(StandardScaler(), solver).fit(train, data.train.targets.numpy()).predict_log_proba(val)


def test_lp_ft_starts_all_layers_from_the_head_of_a_logistic_regression(tune):
    witness = Witness()
    tune(LPFT(epochs=1, l2=0.01), callbacks=[witness])
    module = tiny_net().eval()
    expected = torch.tensor(logits_of_logistic_regression(module, l2=0.01), dtype=torch.float32)
    assert moved_between(start(), witness.starts[0]) == HEAD
    module.load_state_dict(witness.starts[0])
    val = tiny_data().val
    with torch.no_grad():
        found = F.log_softmax(module(val.fetch(torch.arange(len(val)))), dim=1)
    assert torch.allclose(found, expected, rtol=5e-3, atol=5e-3)


def moved_between(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_wise_ft_ends_on_the_interpolation_of_solved_head_and_tuned_weights(tune):
    result = tune(WiSEFT(epochs=2, weights=(0.3,)), model=knowing("x", "y", "z"))
    fit, phase, blend = (step for step, _ in result.strategy_steps)
    assert blend.snapshots == ("head", "all")
    before, after = (
        tune(steps, model=knowing("x", "y", "z")).model.module.state_dict() for steps in ([fit], [fit, phase])
    )
    for name, tensor in result.model.module.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, 0.7 * before[name] + 0.3 * after[name], atol=1e-6), name
            assert torch.equal(tensor, before[name]) == torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("labels", "solve_head", "first"),
    [("abc", None, "start"), ("abd", None, "head"), ("abc", True, "head"), ("abd", False, "start")],
)
def test_wise_ft_fits_a_randomly_initialized_head_first_by_default(tune, labels, solve_head, first):
    steps = [step for step, _ in tune(WiSEFT(epochs=1, solve_head=solve_head), model=knowing(*labels)).strategy_steps]
    assert steps[-1].snapshots == (first, "all")
    assert [step.name for step in steps] == ["head", "all", "average"][first == "start" :]


def test_wise_ft_chooses_on_validation(tune):
    result = tune(WiSEFT(epochs=2, lr=0.01))
    answer = result.strategy_steps[-1][1]
    figures = {entry["weight"]: entry["val"]["f1_macro"] for entry in answer.history}
    assert len(figures) == 11
    assert figures[answer.selection["weight"]] == max(figures.values()) == result.report["splits"]["val"]["f1_macro"]


class Judge:
    """Computes L2-SP's loss by hand at each step, from the formula."""

    def __init__(self, alpha, beta, start):
        self.alpha, self.beta, self.start = alpha, beta, start
        self.found, self.expected, self.pull = [], [], []

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        loss, outputs = yield
        named = {name: each.detach() for name, each in run.model.parameters().items() if each.requires_grad}
        backbone = sum(float(((named[name] - self.start[name]) ** 2).sum()) for name in sorted(named.keys() - HEAD))
        head = sum(float((named[name] ** 2).sum()) for name in sorted(named.keys() & HEAD))
        self.pull.append(backbone)
        self.found.append(float(loss.detach()))
        plain = float(F.cross_entropy(outputs.detach(), batch.targets))
        self.expected.append(plain + self.alpha / 2 * backbone + self.beta / 2 * head)
        return loss, outputs


def test_l2_sp_adds_the_penalty_of_the_formula(tune):
    judge = Judge(3.0, 0.5, start())
    tune(L2SP(epochs=2, lr=0.01, alpha=3.0, beta=0.5), callbacks=[judge])
    assert judge.found == pytest.approx(judge.expected, rel=1e-5)
    assert judge.pull[0] == 0 < judge.pull[-1]


def test_l2_sp_leaves_out_what_is_frozen(tune):
    net = tiny_net()
    net.head.bias.requires_grad_(False)
    net.first[0].weight.requires_grad_(False)
    judge = Judge(3.0, 0.5, start())
    tune(L2SP(epochs=1, lr=0.01, alpha=3.0, beta=0.5), model=net, callbacks=[judge])
    assert judge.found == pytest.approx(judge.expected, rel=1e-5)


def test_l2_sp_allows_the_feature_cache_of_a_frozen_backbone(tune, monkeypatch):
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    free = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", free)
    net = tiny_net()
    net.first.requires_grad_(False)
    judge = Judge(3.0, 0.5, start())
    result = tune(L2SP(epochs=2, lr=0.01, alpha=3.0, beta=0.5), model=net, callbacks=[judge])
    assert "  feature cache: on" in (result.run_dir / "log.txt").read_text()
    assert judge.found == pytest.approx(judge.expected, rel=1e-5)
    assert judge.pull[-1] > 0


def test_l2_sp_keeps_the_backbone_near_and_the_head_small_the_more_so_the_stronger(tune):
    before = start()

    def distances(**options):
        after = tune(L2SP(epochs=8, lr=0.01, restore_best=False, **options)).model.module.state_dict()
        backbone = sum(float((after[name] - before[name]).pow(2).sum()) for name in BACKBONE)
        return backbone, sum(float(after[name].pow(2).sum()) for name in HEAD)

    free, held, small = distances(alpha=0.0, beta=0.0), distances(alpha=1.0, beta=0.0), distances(alpha=0.0, beta=1.0)
    assert held[0] < free[0] / 2
    assert small[1] < free[1] / 2


def test_l2_sp_decays_nothing_through_the_optimizer(tune):
    found = []

    class Watches:
        @tf.hookimpl
        def phase_started(self, run):
            found.extend(group["weight_decay"] for group in run.optimization.param_groups())

    tune(L2SP(epochs=1), callbacks=[Watches()])
    assert set(found) == {0.0}


def test_l2_sp_killed_in_the_middle_goes_on_to_the_same_bytes(tune, tmp_path, monkeypatch):
    whole = tune(L2SP(epochs=2, lr=0.01, alpha=1.0)).run_dir / "model.safetensors"

    class Killed(BaseException):
        pass

    def killed(path, at):
        passed = iter(range(at))

        def hook(name):
            if name == "step-saved" and next(passed, None) is None:
                raise Killed

        monkeypatch.setattr(faults, "hook", hook)
        strategy = L2SP(epochs=2, lr=0.01, alpha=1.0)
        with pytest.raises(Killed):
            tf.Engine(data=tiny_data(), model=tiny_net(), batch_size=16, page=False, strategy=strategy, out=path,
                      checkpoint_s=0.0).run()  # fmt: skip
        monkeypatch.setattr(faults, "hook", None)
        return path

    def resumed(path):
        tf.Engine.resume(path, data=tiny_data(), model=tiny_net()).run()
        return (path / "model.safetensors").read_bytes()

    for at in (0, 5, 8):
        assert resumed(killed(tmp_path / f"killed{at}", at)) == whole.read_bytes()

    recall = memory.ResumeState.restore

    def forgetful(self, state):
        for kept in state["components"].values():
            kept["start"] = {name: tensor + 0.1 for name, tensor in kept.get("start", {}).items()}
        recall(self, state)

    monkeypatch.setattr(memory.ResumeState, "restore", forgetful)
    assert resumed(killed(tmp_path / "forgetful", 5)) != whole.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "full", "head-only", "freeze-then-unfreeze", "gradual-unfreeze", "layer-decay", "lp-ft", "wise-ft", "norm-only",
        "bias-only", "bitfit", "l2-sp",
    ],
)  # fmt: skip
def test_every_strategy_learns_the_small_world_by_its_name(tune, name):
    result = tune(tf.use(name))
    assert result.report["splits"]["test"]["accuracy"] > 0.6  # chance is a third


def plan_of(strategy, **settings):
    settings = {"data": tiny_data(), "model": knowing("p", "q", "r"), **settings}
    return tf.Engine(strategy=strategy, **settings).dry_run()


@pytest.mark.parametrize("lr", [1e-2, 30.0])
def test_the_default_never_ends_below_its_solved_head_on_validation(tune, lr):
    steps = tune(FreezeThenUnfreeze(epochs=3, lr=lr), model=knowing("p", "q", "r"), refit=False).strategy_steps
    (_, head), (_, trained), (_, average) = steps
    assert trained.val["f1_macro"] < head.val["f1_macro"] or lr < 1
    assert average.val["f1_macro"] >= max(head.val["f1_macro"], trained.val["f1_macro"])


@pytest.mark.parametrize(("batch_size", "epochs"), [(16, 34), (4, 9), (3, 8), (96, 200)])
def test_the_default_trains_for_8_epochs_or_200_steps(batch_size, epochs):
    assert plan_of("freeze-then-unfreeze", batch_size=batch_size).strategy_steps[1].epochs == epochs


def test_the_default_trains_for_as_many_epochs_as_the_user_says(tune):
    plan = plan_of(FreezeThenUnfreeze(epochs=2, head_epochs=1)).strategy_steps
    assert [getattr(step, "epochs", None) for step in plan] == [1, 2, None]


def test_the_default_keeps_a_head_that_knows_the_classes_and_is_better(tune):
    trained = tune([tf.Phase("all", epochs=20, lr=1e-2)]).model.module
    steps = dict(
        zip(("head", "choice"), tune(FreezeThenUnfreeze(epochs=1), model=trained).strategy_steps, strict=False)
    )
    chosen = steps["choice"][1]
    assert chosen.val["f1_macro"] >= steps["head"][1].val["f1_macro"]
    assert steps["choice"][0].snapshots == ("start", "head")


@pytest.mark.parametrize("module", [lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))])
def test_the_default_trains_a_head_that_cannot_be_solved(tune, module):
    plan = plan_of("freeze-then-unfreeze", model=module()).strategy_steps
    assert [type(step).__name__ for step in plan] == ["Phase", "Phase", "WeightAverage"]
    assert tune("freeze-then-unfreeze", model=module()).report["splits"]["val"]["accuracy"] > 0.5


def test_batchnorm_keeps_its_statistics_under_the_default_on_few_samples(tune):
    result = tune(FreezeThenUnfreeze(epochs=1))
    assert moved(start(), result) == set(result.model.parameters())


def test_the_default_is_refitted_and_the_report_says_so(tune):
    lines = []
    report = tune(FreezeThenUnfreeze(epochs=1), log=lines.append).report
    assert report["refit"]["num_samples"] == 126
    assert "before the refit" in report["refit"]["note"]
    assert any("val metrics are from before the refit" in line for line in lines)
    assert "refit" not in tune(FreezeThenUnfreeze(epochs=1), refit=False).report
    assert "refit" not in tune(FreezeThenUnfreeze(epochs=1), budget="20epochs").report
    assert "refit" not in tune([tf.Phase("all", epochs=1)]).report
