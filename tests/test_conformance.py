"""Rows 1 to 13 of the known defects of others, for every strategy that is installed; and what is broken is found.

Rows 9 and 10 compile and start processes: `TUNEFORGE_SLOW_CHECKS=1 python -m pytest -m "" tests/test_conformance.py`.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import faulty_strategies as broken
import pytest
import torch

import tuneforge as tf
from tuneforge.engine.loop import diagnosis as probe
from tuneforge.engine.loop import train_phase as phase
from tuneforge.engine.model import freeze_check as proof
from tuneforge.engine.model import freezing
from tuneforge.engine.model import optimizer as optim
from tuneforge.engine.session import dry_run as plan
from tuneforge.engine.session import resume as memory
from tuneforge.plugin import registry
from tuneforge.testing import CHECKS, SLOW_CHECKS, check_strategy, small_options, strategy_checks
from tuneforge.testing import known_issues as rows
from tuneforge.testing import processes as ranks

GIVEN = {"plan-file": {"path": str(Path(__file__).parent / "plan.toml")}}
SLOW = pytest.mark.skipif(not os.environ.get("TUNEFORGE_SLOW_CHECKS"), reason="takes minutes; see the top of the file")
DOCS = Path(__file__).parent.parent / "docs" / "plugins.md"


@pytest.mark.parametrize("check", strategy_checks(options=GIVEN), ids=str)
def test_every_installed_strategy_conforms(check):
    check()


@SLOW
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("check", strategy_checks(options=GIVEN, slow=True), ids=str)
def test_every_installed_strategy_conforms_when_compiled_and_on_two_ranks(check):
    check()


def test_each_row_has_a_check_that_names_it():
    named = {int(re.match(r"Row (\d+)", check.__doc__)[1]) for check in (*CHECKS, *SLOW_CHECKS)}
    assert named == set(range(1, 14))


def the(check, strategy):
    """The one check of that name of a strategy."""
    (found,) = (each for each in strategy_checks(strategy, slow=check in SLOW_CHECKS) if each.check is check)
    return found


def mute(monkeypatch):
    """Silence the engine's own proof, so that only the kit is left to see what goes wrong."""
    monkeypatch.setattr(proof.FreezeCheck, "finish", lambda self, model: ())
    monkeypatch.setattr(proof.FreezeCheck, "observe", lambda self, model, groups: None)


MISTAKES = [
    (broken.RemembersInItself, rows.check_resume_at_phase_boundaries, "model.safetensors"),
    (broken.ThrowsDice, rows.check_resume_at_phase_boundaries, "differs from that of the stopped run"),
    (broken.ThrowsDice, rows.check_schedules_survive_resume, "differs from that of the stopped run"),
    (broken.CountsProbes, rows.check_diagnosis_has_no_side_effects, "model.safetensors"),
    (broken.WakesNorms, rows.check_frozen_batchnorm_statistics, "normalises with the batch"),
    (broken.WakesNorms, rows.check_frozen_dropout_is_off, "dropout"),
    (broken.MovesStatistics, rows.check_frozen_batchnorm_statistics, "running_mean"),
    (broken.MovesStatistics, rows.check_frozen_batchnorm_with_feature_cache, "running_mean"),
    (broken.MovesFrozen, rows.check_frozen_weights_ignore_decay_and_momentum, "weight is frozen and has changed"),
    (broken.ThawsBehindTheEngine, rows.check_equal_tensors_all_train, "no optimizer"),
]


@pytest.mark.parametrize(("strategy", "check", "says"), MISTAKES)
def test_a_strategy_that_makes_the_mistake_is_found_without_the_engines_proof(monkeypatch, strategy, check, says):
    mute(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        the(check, strategy)()


@pytest.mark.parametrize(
    ("strategy", "check"),
    [
        (broken.WakesNorms, rows.check_frozen_batchnorm_statistics),
        (broken.MovesFrozen, rows.check_frozen_weights_ignore_decay_and_momentum),
    ],
)
def test_where_the_engine_halts_the_run_the_check_says_so(strategy, check):
    with pytest.raises(AssertionError, match="the run stopped: HaltError: .* frozen tensor"):
        the(check, strategy)()


@SLOW
@pytest.mark.slow
def test_ranks_that_drift_apart_are_found():
    with pytest.raises(AssertionError, match="weights differ between ranks"):
        the(ranks.check_two_ranks, broken.DriftsByRank)()


def forget(what):
    """A mutant of the engine: a resumed run forgets one thing."""
    original = memory.ResumeState.restore

    def restore(self, state):
        if what == "epoch":
            state["epoch"] = 0
        if what == "schedule" and state["phase"] is not None:
            state["phase"]["steps_done"] = 0
        if what == "optimizer":
            state["optimizer"] = {}
        original(self, state)

    return restore


def all_awake(model, example, *, batchnorm_stats):
    """A mutant: every module is in training mode, whatever is frozen."""
    return [(module, True) for module in model.module.modules()]


def normalises_with_the_batch(model, example, *, batchnorm_stats):
    """A mutant: frozen norms keep their statistics and normalise with the batch."""
    for module in model.module.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.0
    return [(module, isinstance(module, torch.nn.BatchNorm1d)) for module in model.module.modules()]


def decays_all(self):
    """A mutant: the optimizer holds every tensor it ever held, with a gradient of zero where there is none."""
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    self.optimizer.step()
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def everything_in_groups(original):
    def groups(model, phase, trainable, *, weight_decay):
        return original(model, phase, list(model.parameters()), weight_decay=weight_decay)

    return groups


def equal_values_once(original):
    """A mutant: a tensor equal to one that the optimizer has already is left out."""

    def groups(model, phase, trainable, *, weight_decay):
        named, kept = model.parameters(), []
        for name in trainable:
            if not any(torch.equal(named[name], named[other]) for other in kept):
                kept.append(name)
        return original(model, phase, kept, weight_decay=weight_decay)

    return groups


def by_position(original_state, original_set_param_groups):
    """A mutant: what the optimizer remembers is saved and found by the place of the parameter."""

    def state(self, model):
        places = {name: place for place, name in enumerate(model.parameters())}
        return {f"{places[name]}": value for name, value in original_state(self, model).items() if name in places}

    def set_param_groups(self, model, phase, trainable, component, *, same):
        names = list(model.parameters())
        self.pending_state = {names[int(place)]: value for place, value in self.pending_state.items()}
        original_set_param_groups(self, model, phase, trainable, component, same=same)

    return state, set_param_groups


def tolerant(original):
    """A mutant: a selector that matches nothing is passed over."""

    def select(model, selectors):
        found = set()
        for selector in selectors:
            with contextlib.suppress(tf.SelectorError):
                found |= set(original(model, [selector]))
        return [name for name in model.parameters() if name in found]

    return select


def plant_epoch(monkeypatch):
    monkeypatch.setattr(memory.ResumeState, "restore", forget("epoch"))


def plant_schedule(monkeypatch):
    monkeypatch.setattr(memory.ResumeState, "restore", forget("schedule"))


def plant_optimizer(monkeypatch):
    monkeypatch.setattr(memory.ResumeState, "restore", forget("optimizer"))


def plant_awake(monkeypatch):
    monkeypatch.setattr(phase, "compute_modes", all_awake)


def plant_batch_norms(monkeypatch):
    monkeypatch.setattr(phase, "compute_modes", normalises_with_the_batch)


def plant_decay(monkeypatch):
    monkeypatch.setattr(optim, "parameter_groups", everything_in_groups(optim.parameter_groups))
    monkeypatch.setattr(optim.Optimization, "step", decays_all)


def plant_equal_values(monkeypatch):
    monkeypatch.setattr(optim, "parameter_groups", equal_values_once(optim.parameter_groups))


def plant_positions(monkeypatch):
    state, set_param_groups = by_position(optim.Optimization.state, optim.Optimization.set_param_groups)
    monkeypatch.setattr(optim.Optimization, "state", state)
    monkeypatch.setattr(optim.Optimization, "set_param_groups", set_param_groups)


def plant_stale_graph(monkeypatch):
    """What was frozen when the graph was made gives no gradient ever after, as a graph kept over phases would."""

    def compile_forward(run, plan):
        def call(inputs):
            with torch.no_grad():
                features = run.model.module.body(run.model.module.twins(run.model.module.stem(inputs)))
            return run.model.module.head(features)

        return call

    monkeypatch.setattr(phase, "compile_forward", compile_forward)


def plant_probe(monkeypatch):
    monkeypatch.setattr(probe, "restore_state", lambda module, state: None)


def plant_tolerance(monkeypatch):
    for module in (phase, plan, optim):
        monkeypatch.setattr(module, "select", tolerant(freezing.select))


def plant_silence(monkeypatch):
    original = phase._MetricTracker._find_stop_reason

    def find_stop_reason(self, *, is_complete):
        return " " if original(self, is_complete=is_complete) else ""

    monkeypatch.setattr(phase._MetricTracker, "_find_stop_reason", find_stop_reason)


DEFECTS = [
    (plant_optimizer, rows.check_resume_at_phase_boundaries, "model.safetensors"),
    (plant_awake, rows.check_frozen_batchnorm_statistics, "running_mean is frozen and has changed"),
    (plant_awake, rows.check_frozen_batchnorm_with_feature_cache, "running_mean is frozen and has changed"),
    (plant_batch_norms, rows.check_frozen_batchnorm_statistics, "normalises with the batch"),
    (plant_awake, rows.check_frozen_dropout_is_off, "dropout"),
    (plant_decay, rows.check_frozen_weights_ignore_decay_and_momentum, "is frozen and has changed"),
    (plant_schedule, rows.check_schedules_survive_resume, "ends otherwise"),
    (plant_equal_values, rows.check_equal_tensors_all_train, r"twins\.two\.bias"),
    (plant_positions, rows.check_optimizer_state_is_matched_by_name, "registered in another order"),
    (plant_epoch, rows.check_sample_order_after_resume, "see other samples"),
    (plant_stale_graph, rows.check_unfrozen_layers_train_when_compiled, "no longer moves"),
    (plant_probe, rows.check_diagnosis_has_no_side_effects, "ends otherwise"),
    (plant_tolerance, rows.check_misspelled_selectors_are_refused, "ignored"),
    (plant_silence, rows.check_every_stop_has_a_reason, "no reason"),
]


@pytest.mark.parametrize(("plant", "check", "says"), DEFECTS)
def test_an_engine_with_the_defect_of_the_row_is_found(monkeypatch, plant, check, says):
    """The negative control: were a check blind to its own defect, it would prove nothing."""
    mute(monkeypatch)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=says):
        the(check, "freeze-then-unfreeze")()


def test_state_by_position_goes_unseen_until_modules_are_reordered(monkeypatch):
    plant_positions(monkeypatch)
    the(rows.check_resume_at_phase_boundaries, "full")()


def test_a_name_or_a_class_gets_small_options_and_an_instance_keeps_its_own():
    from tuneforge.builtin.strategies.fixed import FreezeThenUnfreeze, Full

    assert small_options(FreezeThenUnfreeze) == {"epochs": 2}
    by_class, by_name, by_instance = (
        strategy_checks(each)[0].resolve() for each in (Full, "no_freeze", Full(epochs=3, lr=0.5))
    )
    assert by_class == by_name == (Full, {"epochs": 2})
    assert (by_instance[1]["epochs"], by_instance[1]["lr"]) == (3, 0.5)


def test_what_a_strategy_needs_and_nobody_gave_is_said():
    with pytest.raises(tf.OptionError, match=r"needs path.*options="):
        strategy_checks("plan-file")[0]()


def test_a_broken_package_fails_its_own_checks_and_no_others(plant):
    plant("bad-pkg", {"tuneforge.finetune_strategy": {"bad": "bad:Bad"}}, bad="raise SystemExit(1)")
    checks = strategy_checks(options=GIVEN)
    assert {each.name for each in checks} == {
        each.name for each in registry.list_components_of_group("finetune_strategy")
    }
    with pytest.raises(tf.PluginLoadError, match="bad-pkg"):
        next(each for each in checks if each.name == "bad")()


def test_checks_have_names_of_their_own():
    names = [str(each) for each in (*strategy_checks(options=GIVEN), *strategy_checks(options=GIVEN, slow=True))]
    assert len(set(names)) == len(names)
    assert "full-resume_at_phase_boundaries" in names


def test_all_checks_of_a_strategy_run_at_once_and_stop_at_the_first_failure():
    check_strategy("head-only")
    with pytest.raises(AssertionError, match="strategy 'throws-dice'"):
        check_strategy(broken.ThrowsDice())


def test_the_chapter_on_testing_a_plugin_works(monkeypatch):
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


def test_the_kit_needs_no_pytest():
    script = "import sys, tuneforge.testing; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
