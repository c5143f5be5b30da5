"""Known issues 1 to 13 of fine-tuning tools, with one check for each.

A check takes a `StrategyHarness`, runs the strategy on the fixtures and raises AssertionError if the issue occurs.
Phases of the kit surround the strategy's own steps, so that layers are unfrozen and frozen again under every strategy.
"""

from __future__ import annotations

from typing import Any

import attrs

from tuneforge import Diagnosis, Phase, SelectorError, StrategyStepResult, TuneforgeError, use
from tuneforge.plugin import StrategyStep, registry
from tuneforge.testing import fixtures
from tuneforge.testing.observers import InvariantChecker, SampleRecorder, TrainModeCaller
from tuneforge.testing.recording import (
    StrategyHarness,
    SurroundingSteps,
    choose_interruption_points,
    compare_files,
    copy_parameters,
)

ALL = Phase("kit-all", epochs=1, lr=0.01)
HEAD = Phase("kit-head", train="head", epochs=2, lr=0.01)
AGAIN = Phase("kit-again", epochs=1, lr=0.01)


def surround_strategy() -> SurroundingSteps:
    """Return steps that train all layers before the strategy, and the head alone and then all layers after it."""
    return SurroundingSteps([ALL], [HEAD, AGAIN])


def _surround_strategy_briefly() -> SurroundingSteps:
    return SurroundingSteps([ALL], [attrs.evolve(HEAD, epochs=1)])


def check_resume_at_phase_boundaries(harness: StrategyHarness) -> None:
    """Known issue 1: a resumed run freezes unfrozen layers again, or trains nothing (Lightning#21901, composer#1002).

    The run is killed one optimizer step before, at, and one after the end of each strategy step. Each time a new
    instance of the strategy, with the same options, resumes it. The result must be bit-identical to that of an unbroken
    run. So the state of a strategy belongs in `run.state(self)`, and its decisions must depend on the results of its
    steps alone.
    """
    points = choose_interruption_points(harness.record_points(_surround_strategy_briefly(), name="unbroken"))
    harness.run_interrupted(points, lambda: [_surround_strategy_briefly()])
    difference = compare_files(harness.read_files("unbroken"), harness.read_files("interrupted"))
    assert not difference, (
        f"{harness.label}: killed at {_format_points(points)} and resumed, the run ends with other files: {difference}"
    )


def check_frozen_batchnorm_statistics(harness: StrategyHarness) -> None:
    """Known issue 2: frozen BatchNorm updates its statistics or uses batch statistics (Lightning#21531, pytorch#38084).

    A norm with a frozen parameter, and a norm without parameters whose inputs depend on nothing trainable, keep their
    statistics bit-identical and normalize with them in training, even if user code calls `.train()` between steps. The
    check runs with and without a norm that tracks no statistics.
    """
    for batch_statistics in (False, True):
        checker, caller = InvariantChecker(check_forward=True), TrainModeCaller()
        model = fixtures.make_model(batch_statistics=batch_statistics)
        harness.run(surround_strategy(), checker, caller, model=model, name=f"norms-{batch_statistics}")
        _assert_no_violations(harness, checker)
        assert caller.num_calls, f"{harness.label}: no phase trained"


def check_frozen_batchnorm_with_feature_cache(harness: StrategyHarness) -> None:
    """Known issue 2 with cached features of the frozen backbone: nothing frozen changes there either."""
    checker, average = InvariantChecker(), use("ema", decay=0.5)
    harness.run(surround_strategy(), checker, TrainModeCaller(), average, cache="memory", grad_accum_steps=2)
    _assert_no_violations(harness, checker)


def check_frozen_dropout_is_off(harness: StrategyHarness) -> None:
    """Known issue 3: dropout is active in a frozen encoder (butd_detr#8, OpenNMT-tf#627).

    While a phase trains, a dropout layer whose inputs depend on nothing trainable must pass them on bit-identical.
    """
    checker = InvariantChecker(check_forward=True)
    harness.run(surround_strategy(), checker)
    _assert_no_violations(harness, checker, about="dropout")
    assert checker.num_forward_checks, f"{harness.label}: no frozen dropout or norm ran, so nothing was checked"


def check_frozen_weights_ignore_decay_and_momentum(harness: StrategyHarness) -> None:
    """Known issue 4: weight decay or momentum changes frozen weights (fairseq#4702, moco#14).

    Frozen weights are bit-identical at the end of each phase, with AdamW and with SGD with momentum, both with heavy
    weight decay, after a phase in which every tensor has got optimizer state. The check includes averaged weights,
    clipped and accumulated gradients, a weight that two layers share, and a layer without gradient.
    """
    optimizers = {"adamw": use("adamw", weight_decay=0.5), "sgd": use("sgd", momentum=0.9, weight_decay=0.5)}
    for name, optimizer in optimizers.items():
        checker, callbacks = InvariantChecker(), [use("ema", decay=0.5), use("grad-clip")]
        harness.run(surround_strategy(), checker, *callbacks, optimizer=optimizer, grad_accum_steps=2, name=name)
        _assert_no_violations(harness, checker)


def check_schedules_survive_resume(harness: StrategyHarness) -> None:
    """Known issue 5: a scheduler or its `load_state_dict` fails if parameter groups change (Lightning#8720, #12141).

    Under each installed schedule the run is stopped within its last phase and resumed; the result must be bit-identical
    to that of an unbroken run.
    """
    for entry in registry.list_components_of_group("lr_schedule"):
        settings: dict[str, Any] = {"schedule": f"{entry.distribution}/{entry.name}"}
        points = harness.record_points(_surround_strategy_briefly(), name=f"{entry.name}-unbroken", **settings)
        second_last = [step for point, step in points if point == "step"][-2]
        harness.run_interrupted(
            [("step", second_last)], lambda: [_surround_strategy_briefly()], name=entry.name, **settings
        )
        difference = compare_files(harness.read_files(f"{entry.name}-unbroken"), harness.read_files(entry.name))
        assert not difference, (
            f"{harness.label}: resumed under schedule '{entry.name}', the run ends with other files: {difference}"
        )


def check_equal_tensors_all_train(harness: StrategyHarness) -> None:
    """Known issue 6: parameters of equal value are dropped from training (Lightning's `filter_on_optimizer`).

    Two biases that are both zero must change in every phase that trains them, as must every tensor with a learning rate
    and a gradient.
    """
    checker = InvariantChecker()
    harness.run(surround_strategy(), checker)
    _assert_no_violations(harness, checker)
    for phase in (ALL, AGAIN):
        missing = set(fixtures.ZERO_BIASES) - checker.changed_tensors[phase.name]
        assert not missing, f"{harness.label}: phase '{phase.name}' trains all and did not change {sorted(missing)}"


def check_optimizer_state_is_matched_by_name(harness: StrategyHarness) -> None:
    """Known issue 7: optimizer state is matched by position ("parameter group doesn't match the size").

    The run is killed within its last phase and resumed with a network that registers the same modules in another order:
    every tensor must end as in an unbroken run.
    """
    points = harness.record_points(surround_strategy(), name="recorded")
    second_last = [step for point, step in points if point == "step"][-2]
    unbroken = copy_parameters(harness.run(surround_strategy(), name="unbroken"))
    resumed = harness.run_interrupted(
        [("step", second_last)],
        lambda: [surround_strategy()],
        make_model=lambda: fixtures.make_model(reversed_registration=True),
        name="reordered",
    )
    parameters = copy_parameters(resumed)
    wrong = [name for name, each in unbroken.items() if not parameters[name].allclose(each, rtol=1e-4, atol=1e-6)]
    assert not wrong, f"{harness.label}: with modules registered in another order, these differ: {', '.join(wrong)}"


def check_sample_order_after_resume(harness: StrategyHarness) -> None:
    """Known issue 8: the first epoch after a resume repeats the order of epoch 0 (Lightning#21938, accelerate#2016).

    Epochs must differ in the order of their samples, and a run that is killed at the second optimizer step of an epoch
    must continue with exactly the samples that an unbroken run would use next.
    """
    unbroken = SampleRecorder()
    points = harness.record_points(surround_strategy(), unbroken, name="unbroken")
    orders = [tuple(indices) for indices in unbroken.indices_by_epoch.values()]
    assert len(set(orders)) == len(orders), f"{harness.label}: two epochs have the same sample order"
    epoch_ends = [step for point, step in points if point == "epoch"]
    recorders = [SampleRecorder()]

    def make_callbacks() -> list[object]:
        recorders.append(SampleRecorder())
        return [surround_strategy(), recorders[-1]]

    harness.run_interrupted([("step", epoch_ends[-2] + 2)], make_callbacks)
    expected = dict(unbroken.batches)
    wrong = [step for step, indices in recorders[-1].batches if indices != expected.get(step)]
    assert recorders[-1].batches, f"{harness.label}: nothing was trained after the resume"
    assert not wrong, f"{harness.label}: after the resume, optimizer steps {wrong} use other samples"


def check_unfrozen_layers_train_when_compiled(harness: StrategyHarness) -> None:
    """Known issue 9: layers that are unfrozen under `torch.compile` do not train (pytorch#139476, dingo#407).

    Each phase must change the same tensors with `compile` as without. The check is slow, because each phase compiles.
    """
    steps = SurroundingSteps([HEAD], [])
    eager, compiled = InvariantChecker(), InvariantChecker()
    harness.run(steps, eager, name="eager")
    harness.run(steps, compiled, compile=True, name="compiled")
    _assert_no_violations(harness, compiled)
    for phase, changed in eager.changed_tensors.items():
        missing = changed - compiled.changed_tensors[phase]
        assert not missing, f"{harness.label}: compiled, phase '{phase}' does not change {', '.join(sorted(missing))}"


def check_diagnosis_has_no_side_effects(harness: StrategyHarness) -> None:
    """Known issue 11: a learning-rate finder changes the state of the run (Lightning#14674).

    With a diagnosis of every kind before each strategy step the run must write the same files as without. A component
    that wraps `train_step` is called during a diagnosis too, so it must not assume that every call is a training step.
    """
    kinds = ("gradients", "features", "lrs")

    def diagnoses(number: int) -> list[StrategyStep]:
        return [Diagnosis(f"kit-{kind}-{number}", measure=kind, batches=1) for kind in kinds]

    harness.run(surround_strategy(), name="plain")
    steps = SurroundingSteps([ALL, *diagnoses(-1)], [*diagnoses(-2), HEAD, AGAIN], before_each=diagnoses)
    harness.run(steps, name="diagnosed")
    plain, diagnosed = harness.read_files("plain"), harness.read_files("diagnosed")
    plain.pop("steps.jsonl"), diagnosed.pop("steps.jsonl")
    difference = compare_files(plain, diagnosed)
    assert not difference, (
        f"{harness.label}: with a diagnosis before each step, the run ends with other files: {difference}"
    )


def check_misspelled_selectors_are_refused(harness: StrategyHarness) -> None:
    """Known issue 12: a pattern that matches nothing is ignored (ludwig, axolotl).

    A misspelled selector beside the strategy's own, in `train` or in `lr_scales`, must stop the run with an error that
    suggests the closest name.
    """

    def misspell_train(step: StrategyStep) -> StrategyStep:
        return attrs.evolve(step, train=(*step.train, "twinns")) if isinstance(step, Phase) else step

    def misspell_lr_scales(step: StrategyStep) -> StrategyStep:
        return attrs.evolve(step, lr_scales={**step.lr_scales, "bodi": 0.5}) if isinstance(step, Phase) else step

    for misspell, suggestion in ((misspell_train, "twins"), (misspell_lr_scales, "body")):
        steps = SurroundingSteps(after=[misspell(HEAD)], transform=misspell)
        message = _get_selector_error(harness, steps, f"misspelled-{suggestion}")
        assert message, f"{harness.label}: a selector that matches nothing was ignored"
        assert suggestion in message, f"{harness.label}: the error does not suggest '{suggestion}': {message}"


def _get_selector_error(harness: StrategyHarness, steps: SurroundingSteps, name: str) -> str:
    """Return the message of the `SelectorError` that a run raises; "" if it raises none."""
    try:
        harness.build_engine(steps, name=name).run()
    except SelectorError as error:
        return str(error)
    except TuneforgeError as error:
        raise AssertionError(f"{harness.label}: a misspelled selector raises another error: {error}") from error
    return ""


def check_every_stop_has_a_reason(harness: StrategyHarness) -> None:
    """Known issue 13: a phase or the training ends, and nothing says why (finetuning-scheduler#7).

    The result of every strategy step must hold a reason, which the run also logs. The reason of an early stop must name
    the metric, and that of an exhausted budget the budget.
    """

    def add_patience(step: StrategyStep) -> StrategyStep:
        return attrs.evolve(step, epochs=4, steps=None, patience=1) if isinstance(step, Phase) else step

    for number, settings in enumerate([{}, {"budget": "4steps"}]):
        lines: list[str] = []
        steps = SurroundingSteps([ALL], [HEAD], transform=add_patience)
        result = harness.run(steps, name=f"reasons-{number}", log=lines.append, **settings)
        for step, step_result in result.strategy_steps:
            if isinstance(step, Diagnosis):
                continue
            reason = getattr(step_result, "reason", "").strip()
            assert reason, f"{harness.label}: step '{step.name}' ended and gives no reason"
            assert any(reason in line for line in lines), f"{harness.label}: the reason was not logged: {reason}"
            if isinstance(step, Phase) and isinstance(step_result, StrategyStepResult):
                assert _explains_stop(step, step_result.epochs, reason), (
                    f"{harness.label}: phase '{step.name}' ended after {step_result.epochs} epochs because: {reason}"
                )


def _explains_stop(phase: Phase, epochs: int, reason: str) -> bool:
    """Return True if the reason names what happened: all epochs completed, early stopping, or the budget."""
    if "budget" in reason:
        return True
    if phase.epochs is not None and epochs < phase.epochs:
        return "early stopping" in reason and "f1_macro" in reason
    return "completed" in reason or "early stopping" in reason


def _assert_no_violations(harness: StrategyHarness, checker: InvariantChecker, *, about: str = "") -> None:
    violations = [each for each in checker.violations if about in each]
    more = f" (and {len(violations) - 3} more)" if len(violations) > 3 else ""
    assert not violations, f"{harness.label}: {'; '.join(violations[:3])}{more}"
    assert checker.changed_tensors, f"{harness.label}: no phase trained, so nothing was checked"


def _format_points(points: list[tuple[str, int]]) -> str:
    return ", ".join(f"{point} {step}" for point, step in points)
