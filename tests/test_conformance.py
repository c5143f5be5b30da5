"""The conformance kit on every installed strategy, on faulty strategies and on a faulty engine.

Known issues 9 and 10 compile and start processes; to run their checks:
`TUNEFORGE_SLOW_CHECKS=1 python -m pytest -m "" tests/test_conformance.py`.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import faulty_strategies
import pytest
import torch

import tuneforge as tf
from tuneforge.engine.loop import diagnosis, train_phase
from tuneforge.engine.loop.phase_progress import MetricTracker
from tuneforge.engine.model import freezing, optimizer
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.engine.session import dry_run, engine
from tuneforge.engine.session.resume import ResumeState
from tuneforge.plugin import registry
from tuneforge.testing import (
    CHECKS,
    SLOW_CHECKS,
    check_strategy,
    known_issues,
    small_options,
    strategy_checks,
    two_ranks,
)

OPTIONS = {"plan-file": {"path": str(Path(__file__).parent / "plan.toml")}}
SLOW = pytest.mark.skipif(not os.environ.get("TUNEFORGE_SLOW_CHECKS"), reason="takes minutes; see the top of the file")
DOCS = Path(__file__).parent.parent / "docs" / "plugins.md"


@pytest.mark.parametrize("check", strategy_checks(options=OPTIONS), ids=str)
def test_every_installed_strategy_conforms(check):
    check()


@SLOW
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("check", strategy_checks(options=OPTIONS, slow=True), ids=str)
def test_every_installed_strategy_conforms_when_compiled_and_on_two_ranks(check):
    check()


def test_each_known_issue_has_a_check():
    named = {int(re.match(r"Known issue (\d+)", check.__doc__)[1]) for check in (*CHECKS, *SLOW_CHECKS)}
    assert named == set(range(1, 14))


def get_check(check, strategy):
    """Return a single check of a strategy."""
    (found,) = (each for each in strategy_checks(strategy, slow=check in SLOW_CHECKS) if each.check is check)
    return found


def disable_freeze_check(monkeypatch):
    """Disable the engine's own freeze check, so that only the kit can find a fault."""
    monkeypatch.setattr(FreezeCheck, "finish", lambda self, model: ())
    monkeypatch.setattr(FreezeCheck, "observe", lambda self, model, groups: None)


FAULTY_STRATEGIES = [
    (faulty_strategies.StateInAttribute, known_issues.check_resume_at_phase_boundaries, "model.safetensors"),
    (
        faulty_strategies.RandomLearningRate,
        known_issues.check_resume_at_phase_boundaries,
        "differs from that of the stopped run",
    ),
    (
        faulty_strategies.RandomLearningRate,
        known_issues.check_schedules_survive_resume,
        "differs from that of the stopped run",
    ),
    (faulty_strategies.CountsTrainStepCalls, known_issues.check_diagnosis_has_no_side_effects, "model.safetensors"),
    (
        faulty_strategies.NormsInTrainingMode,
        known_issues.check_frozen_batchnorm_statistics,
        "normalizes with batch statistics",
    ),
    (faulty_strategies.NormsInTrainingMode, known_issues.check_frozen_dropout_is_off, "dropout"),
    (faulty_strategies.WritesBatchNormStatistics, known_issues.check_frozen_batchnorm_statistics, "running_mean"),
    (
        faulty_strategies.WritesBatchNormStatistics,
        known_issues.check_frozen_batchnorm_with_feature_cache,
        "running_mean",
    ),
    (
        faulty_strategies.DecaysFrozenWeights,
        known_issues.check_frozen_weights_ignore_decay_and_momentum,
        "weight is frozen and has changed",
    ),
    (faulty_strategies.UnfreezesWithoutEngine, known_issues.check_equal_tensors_all_train, "no optimizer"),
]


@pytest.mark.parametrize(("strategy", "check", "message"), FAULTY_STRATEGIES)
def test_faulty_strategy_is_found_without_the_engines_freeze_check(monkeypatch, strategy, check, message):
    disable_freeze_check(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        get_check(check, strategy)()


@pytest.mark.parametrize(
    ("strategy", "check"),
    [
        (faulty_strategies.NormsInTrainingMode, known_issues.check_frozen_batchnorm_statistics),
        (faulty_strategies.DecaysFrozenWeights, known_issues.check_frozen_weights_ignore_decay_and_momentum),
    ],
)
def test_check_reports_that_the_engine_halted_the_run(strategy, check):
    with pytest.raises(AssertionError, match="the run failed: HaltError: .* frozen tensor"):
        get_check(check, strategy)()


@SLOW
@pytest.mark.slow
def test_different_weights_on_two_ranks_are_found():
    with pytest.raises(AssertionError, match="weights differ between ranks"):
        get_check(two_ranks.check_two_ranks, faulty_strategies.RankDependentUpdate)()


def forget(what):
    """Return a faulty `ResumeState.restore` that does not restore one thing."""
    original = ResumeState.restore

    def restore(self, state):
        if what == "schedule" and state["phase"] is not None:
            state["phase"]["steps_done"] = 0
        if what == "optimizer":
            state["optimizer"] = {}
        original(self, state)

    return restore


def all_in_training_mode(model, example, *, batchnorm_stats):
    """A faulty `compute_modes`: every module is in training mode, even if it is frozen."""
    return [(module, True) for module in model.module.modules()]


def frozen_norms_use_batch_statistics(model, example, *, batchnorm_stats):
    """A faulty `compute_modes`: frozen norms keep their statistics, but normalize with those of the batch."""
    for module in model.module.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.0
    return [(module, isinstance(module, torch.nn.BatchNorm1d)) for module in model.module.modules()]


def find_no_function_mode(module, example, modes, *, norms):
    """A faulty `find_function_mode`: functional dropout and norms of frozen parts are not observed."""


def step_all_parameters(self):
    """A faulty `Optimization.step`: parameters without a gradient get a zero gradient, so weight decay changes them."""
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    self.optimizer.step()
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def group_all_parameters(original):
    """Return a faulty `parameter_groups` that includes frozen parameters."""

    def groups(model, phase, trainable, *, weight_decay):
        return original(model, phase, list(model.parameters()), weight_decay=weight_decay)

    return groups


def drop_equal_tensors(original):
    """Return a faulty `parameter_groups` that drops a tensor equal to an earlier one."""

    def groups(model, phase, trainable, *, weight_decay):
        named, distinct = model.parameters(), []
        for name in trainable:
            if not any(torch.equal(named[name], named[other]) for other in distinct):
                distinct.append(name)
        return original(model, phase, distinct, weight_decay=weight_decay)

    return groups


def drop_misshapen(model, states):
    """Return the states whose tensors have the shape of their parameter: torch's fused kernels do not check it."""
    shapes = {name: {each.shape, torch.Size()} for name, each in model.parameters().items()}
    return {
        name: each
        for name, each in states.items()
        if {value.shape for value in each["state"].values() if isinstance(value, torch.Tensor)} <= shapes[name]
    }


def match_state_by_position(original_state, original_set_param_groups):
    """Return faulty methods of `Optimization` that match optimizer state by the position of the parameter."""

    def state(self, model):
        positions = {name: position for position, name in enumerate(model.parameters())}
        whole = original_state(self, model)
        by_position = {f"{positions[name]}": value for name, value in whole.get("parameters", {}).items()}
        return {**whole, "parameters": by_position} if whole else {}

    def set_param_groups(self, model, phase, trainable, component, *, same):
        names = list(model.parameters())
        if self.pending_state:
            by_position = self.pending_state["parameters"]
            by_name = {names[int(position)]: value for position, value in by_position.items()}
            self.pending_state = {**self.pending_state, "parameters": drop_misshapen(model, by_name)}
        original_set_param_groups(self, model, phase, trainable, component, same=same)

    return state, set_param_groups


def ignore_unmatched_selectors(original):
    """Return a faulty `select` that ignores a selector without matches."""

    def select(model, selectors):
        found = set()
        for selector in selectors:
            with contextlib.suppress(tf.SelectorError):
                found |= set(original(model, [selector]))
        return [name for name in model.parameters() if name in found]

    return select


def inject_forgotten_epoch(monkeypatch):
    original = engine.restore_counters

    def restore_without_epoch(run, state):
        original(run, state)
        run.epoch = 0

    monkeypatch.setattr(engine, "restore_counters", restore_without_epoch)


def inject_forgotten_schedule_position(monkeypatch):
    monkeypatch.setattr(ResumeState, "restore", forget("schedule"))


def inject_forgotten_optimizer_state(monkeypatch):
    monkeypatch.setattr(ResumeState, "restore", forget("optimizer"))


def inject_training_mode(monkeypatch):
    monkeypatch.setattr(train_phase, "compute_modes", all_in_training_mode)
    monkeypatch.setattr(train_phase, "find_function_mode", find_no_function_mode)


def inject_batch_statistics(monkeypatch):
    monkeypatch.setattr(train_phase, "compute_modes", frozen_norms_use_batch_statistics)
    monkeypatch.setattr(train_phase, "find_function_mode", find_no_function_mode)


def inject_weight_decay_of_frozen(monkeypatch):
    monkeypatch.setattr(optimizer, "parameter_groups", group_all_parameters(optimizer.parameter_groups))
    monkeypatch.setattr(optimizer.Optimization, "step", step_all_parameters)


def inject_dropped_tensors(monkeypatch):
    monkeypatch.setattr(optimizer, "parameter_groups", drop_equal_tensors(optimizer.parameter_groups))


def inject_state_by_position(monkeypatch):
    state, set_param_groups = match_state_by_position(
        optimizer.Optimization.state, optimizer.Optimization.set_param_groups
    )
    monkeypatch.setattr(optimizer.Optimization, "state", state)
    monkeypatch.setattr(optimizer.Optimization, "set_param_groups", set_param_groups)


def inject_stale_graph(monkeypatch):
    """Layers that were frozen when the graph was compiled get no gradient, as if the graph were kept between phases."""

    def compile_forward(run, plan):
        def call(inputs):
            with torch.no_grad():
                features = run.model.module.body(run.model.module.twins(run.model.module.stem(inputs)))
            return run.model.module.head(features)

        return call

    monkeypatch.setattr(train_phase, "compile_forward", compile_forward)


def inject_unrestored_diagnosis(monkeypatch):
    monkeypatch.setattr(diagnosis, "preserve_state", contextlib.nullcontext)


def inject_ignored_selectors(monkeypatch):
    for module in (train_phase, dry_run, optimizer):
        monkeypatch.setattr(module, "select", ignore_unmatched_selectors(freezing.select))


def inject_empty_reason(monkeypatch):
    original = MetricTracker._find_stop_reason

    def find_stop_reason(self, *, is_complete):
        return " " if original(self, is_complete=is_complete) else ""

    monkeypatch.setattr(MetricTracker, "_find_stop_reason", find_stop_reason)


FAULTY_ENGINES = [
    (inject_forgotten_optimizer_state, known_issues.check_resume_at_phase_boundaries, "model.safetensors"),
    (inject_training_mode, known_issues.check_frozen_batchnorm_statistics, "normalizes with batch statistics"),
    (
        inject_training_mode,
        known_issues.check_frozen_batchnorm_with_feature_cache,
        "running_mean is frozen and has changed",
    ),
    (inject_batch_statistics, known_issues.check_frozen_batchnorm_statistics, "normalizes with batch statistics"),
    (inject_training_mode, known_issues.check_frozen_dropout_is_off, "dropout"),
    (
        inject_weight_decay_of_frozen,
        known_issues.check_frozen_weights_ignore_decay_and_momentum,
        "is frozen and has changed",
    ),
    (inject_forgotten_schedule_position, known_issues.check_schedules_survive_resume, "ends with other files"),
    (inject_dropped_tensors, known_issues.check_equal_tensors_all_train, r"twins\.two\.bias"),
    (inject_state_by_position, known_issues.check_optimizer_state_is_matched_by_name, "registered in another order"),
    (inject_forgotten_epoch, known_issues.check_sample_order_after_resume, "use other samples"),
    (inject_stale_graph, known_issues.check_unfrozen_layers_train_when_compiled, "does not change"),
    (inject_unrestored_diagnosis, known_issues.check_diagnosis_has_no_side_effects, "ends with other files"),
    (inject_ignored_selectors, known_issues.check_misspelled_selectors_are_refused, "ignored"),
    (inject_empty_reason, known_issues.check_every_stop_has_a_reason, "no reason"),
]


@pytest.mark.parametrize(("inject", "check", "message"), FAULTY_ENGINES)
def test_known_issue_in_the_engine_is_found(monkeypatch, inject, check, message):
    """The negative control: a check that never fails would show nothing."""
    disable_freeze_check(monkeypatch)
    inject(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        get_check(check, "freeze-then-unfreeze")()


def test_state_matched_by_position_shows_only_if_modules_are_reordered(monkeypatch):
    inject_state_by_position(monkeypatch)
    get_check(known_issues.check_resume_at_phase_boundaries, "full")()


def test_names_and_classes_get_small_options_and_instances_keep_their_own():
    from tuneforge.builtin.strategies.fixed import FreezeThenUnfreeze, Full

    assert small_options(FreezeThenUnfreeze) == {"epochs": 2}
    by_class, by_name, by_instance = (
        strategy_checks(each)[0].resolve() for each in (Full, "no_freeze", Full(epochs=3, lr=0.5))
    )
    assert by_class == by_name == (Full, {"epochs": 2})
    assert (by_instance[1]["epochs"], by_instance[1]["lr"]) == (3, 0.5)


def test_missing_required_option_is_an_error():
    with pytest.raises(tf.OptionError, match=r"needs path.*options="):
        strategy_checks("plan-file")[0]()


def test_broken_package_fails_only_its_own_checks(plant):
    plant("bad-pkg", {"tuneforge.finetune_strategy": {"bad": "bad:Bad"}}, bad="raise SystemExit(1)")
    checks = strategy_checks(options=OPTIONS)
    assert {each.name for each in checks} == {
        each.name for each in registry.list_components_of_group("finetune_strategy")
    }
    with pytest.raises(tf.PluginLoadError, match="bad-pkg"):
        next(each for each in checks if each.name == "bad")()


def test_checks_have_unique_names():
    names = [str(each) for each in (*strategy_checks(options=OPTIONS), *strategy_checks(options=OPTIONS, slow=True))]
    assert len(set(names)) == len(names)
    assert "full-resume_at_phase_boundaries" in names


def test_check_strategy_raises_the_first_failure():
    check_strategy("head-only")
    with pytest.raises(AssertionError, match="strategy 'random-learning-rate'"):
        check_strategy(faulty_strategies.RandomLearningRate())


def test_code_of_the_documentation_on_testing_plugins_works(monkeypatch):
    text = DOCS.read_text()
    strategy = {"__name__": "my_strategies"}
    exec(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1], strategy)
    module = ModuleType("my_strategies")
    module.HeadTwice = strategy["HeadTwice"]
    monkeypatch.setitem(sys.modules, "my_strategies", module)
    tests = {"__name__": "test_my_strategies"}
    exec(re.search(r"```py\n(.*?)```", text, flags=re.DOTALL)[1], tests)
    (marks,) = tests["test_conforms"].pytestmark
    assert len(marks.args[1]) == 2 * len(CHECKS)
    for check in marks.args[1][3:7]:
        tests["test_conforms"](check)


def test_kit_does_not_import_pytest():
    script = "import sys, tuneforge.testing; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
