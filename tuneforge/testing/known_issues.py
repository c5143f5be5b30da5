"""Rows 1 to 13 of the known defects of fine-tuning tools, a check each.

A check is given a `StrategyHarness`, runs the strategy on the small world and raises AssertionError where the defect is
there. Around the strategy's own steps a check puts phases of the kit's, so that under every strategy something is
thawed and frozen again.
"""

from __future__ import annotations

from typing import Any

import attrs

from tuneforge import Diagnosis, Phase, SelectorError, StrategyStepResult, TuneforgeError, use
from tuneforge.plugin import StrategyStep, registry
from tuneforge.testing import fixtures as world
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
    """All layers, the strategy's own steps, the head alone, all layers again."""
    return SurroundingSteps([ALL], [HEAD, AGAIN])


def _surround_strategy_briefly() -> SurroundingSteps:
    return SurroundingSteps([ALL], [attrs.evolve(HEAD, epochs=1)])


def check_resume_at_phase_boundaries(trial: StrategyHarness) -> None:
    """Row 1: resume freezes again what was thawed, or trains nothing (Lightning#21901, composer#1002).

    The run is killed one optimizer step before, at, and one after each border of two steps, and resumed each time by
    a strategy of the same class and options that has seen nothing. It must end as the run that was left alone, to the
    bit; so what a strategy remembers belongs in `run.state(self)`, and what it decides must follow from the answers.
    """
    keys = choose_interruption_points(trial.record_points(_surround_strategy_briefly(), name="whole"))
    trial.run_interrupted(keys, lambda: [_surround_strategy_briefly()])
    differs = compare_files(trial.read_files("whole"), trial.read_files("interrupted"))
    assert not differs, (
        f"{trial.label}: killed at {_format_points(keys)} and resumed, the run ends otherwise: {differs}"
    )


def check_frozen_batchnorm_statistics(trial: StrategyHarness) -> None:
    """Row 2: frozen BatchNorm goes on moving, or normalises with the batch (Lightning#21531, pytorch#38084).

    Statistics of a norm with a frozen parameter, and of one without any that nothing trainable lies before, are equal
    to the bit after each validation and at the end of each phase, also where user code calls `.train()` between steps;
    and in training such a norm gives what its statistics say. With and without a norm that keeps none.
    """
    for batch_statistics in (False, True):
        watch, calls = InvariantChecker(check_forward=True), TrainModeCaller()
        network = world.make_model(batch_statistics=batch_statistics)
        trial.run(surround_strategy(), watch, calls, model=network, name=f"norms-{batch_statistics}")
        _assert_no_violations(trial, watch)
        assert calls.num_calls, f"{trial.label}: no phase trained"


def check_frozen_batchnorm_with_feature_cache(trial: StrategyHarness) -> None:
    """Row 2, where features of the frozen part are computed once and kept: nothing frozen changes either."""
    watch = InvariantChecker()
    trial.run(surround_strategy(), watch, TrainModeCaller(), use("ema", decay=0.5), cache="memory", grad_accum_steps=2)
    _assert_no_violations(trial, watch)


def check_frozen_dropout_is_off(trial: StrategyHarness) -> None:
    """Row 3: dropout is active in a frozen encoder (butd_detr#8, OpenNMT-tf#627).

    While a phase trains, a dropout that nothing trainable lies before passes its input on, to the bit.
    """
    watch = InvariantChecker(check_forward=True)
    trial.run(surround_strategy(), watch)
    _assert_no_violations(trial, watch, about="dropout")
    assert watch.num_forward_checks, f"{trial.label}: no frozen dropout or norm ran, so nothing was seen"


def check_frozen_weights_ignore_decay_and_momentum(trial: StrategyHarness) -> None:
    """Row 4: weight decay or momentum moves frozen weights (fairseq#4702, moco#14).

    Frozen weights are equal to the bit at the end of each phase, with AdamW and SGD with momentum, both under heavy
    weight decay, after a phase that has given every tensor its moments; with averaged weights, clipped and accumulated
    gradients, a weight that two layers share and a layer that gets no gradient.
    """
    optimizers = {"adamw": use("adamw", weight_decay=0.5), "sgd": use("sgd", momentum=0.9, weight_decay=0.5)}
    for name, optimizer in optimizers.items():
        watch, callbacks = InvariantChecker(), [use("ema", decay=0.5), use("grad-clip")]
        trial.run(surround_strategy(), watch, *callbacks, optimizer=optimizer, grad_accum_steps=2, name=name)
        _assert_no_violations(trial, watch)


def check_schedules_survive_resume(trial: StrategyHarness) -> None:
    """Row 5: schedulers or `load_state_dict` fail where the number of groups changes (Lightning#8720, #12141).

    Under each installed schedule the run goes through every border of its phases, is stopped within the last one, and
    ends as if it had not been, to the bit.
    """
    for entry in registry.list_components_of_group("lr_schedule"):
        settings: dict[str, Any] = {"schedule": f"{entry.distribution}/{entry.name}"}
        places = trial.record_points(_surround_strategy_briefly(), name=f"{entry.name}-whole", **settings)
        last = [step for point, step in places if point == "step"][-2]
        trial.run_interrupted([("step", last)], lambda: [_surround_strategy_briefly()], name=entry.name, **settings)
        differs = compare_files(trial.read_files(f"{entry.name}-whole"), trial.read_files(entry.name))
        assert not differs, f"{trial.label}: resumed under schedule '{entry.name}' it ends otherwise: {differs}"


def check_equal_tensors_all_train(trial: StrategyHarness) -> None:
    """Row 6: parameters of equal value are dropped from training (Lightning's `filter_on_optimizer`).

    Two biases, both zero, move in every phase that trains them, as does every tensor with a rate and a gradient.
    """
    watch = InvariantChecker()
    trial.run(surround_strategy(), watch)
    _assert_no_violations(trial, watch)
    for phase in (ALL, AGAIN):
        missing = set(world.ZERO_BIASES) - watch.changed_tensors[phase.name]
        assert not missing, f"{trial.label}: phase '{phase.name}' trains all and has not moved {sorted(missing)}"


def check_optimizer_state_is_matched_by_name(trial: StrategyHarness) -> None:
    """Row 7: optimizer state is attached by position ("parameter group doesn't match the size").

    The run is killed within its last phase and resumed with a network that registers the same modules in another
    order: every tensor ends where it would have.
    """
    places = trial.record_points(surround_strategy(), name="whole")
    last = [step for point, step in places if point == "step"][-2]
    whole = copy_parameters(trial.run(surround_strategy(), name="again"))
    resumed = trial.run_interrupted(
        [("step", last)],
        lambda: [surround_strategy()],
        make_model=lambda: world.make_model(reversed_registration=True),
        name="reordered",
    )
    ended = copy_parameters(resumed)
    wrong = [name for name, each in whole.items() if not ended[name].allclose(each, rtol=1e-4, atol=1e-6)]
    assert not wrong, f"{trial.label}: modules registered in another order, these end elsewhere: {', '.join(wrong)}"


def check_sample_order_after_resume(trial: StrategyHarness) -> None:
    """Row 8: the first epoch after a resume repeats epoch 0's order (Lightning#21938, accelerate#2016).

    The samples of each batch are logged: epochs differ in order, and a run that was killed at the second step of an
    epoch goes on with exactly the samples that would have come.
    """
    whole = SampleRecorder()
    places = trial.record_points(surround_strategy(), whole, name="whole")
    orders = [tuple(rows) for rows in whole.rows_by_epoch.values()]
    assert len(set(orders)) == len(orders), f"{trial.label}: two epochs have one order"
    ends = [step for point, step in places if point == "epoch"]
    logs = [SampleRecorder()]

    def callbacks() -> list[object]:
        logs.append(SampleRecorder())
        return [surround_strategy(), logs[-1]]

    trial.run_interrupted([("step", ends[-2] + 2)], callbacks)
    expected = dict(whole.batches)
    wrong = [step for step, rows in logs[-1].batches if rows != expected.get(step)]
    assert logs[-1].batches, f"{trial.label}: nothing was trained after the resume"
    assert not wrong, f"{trial.label}: after the resume, optimizer steps {wrong} see other samples"


def check_unfrozen_layers_train_when_compiled(trial: StrategyHarness) -> None:
    """Row 9: `torch.compile` and unfreezing train nothing (pytorch#139476, dingo#407).

    Each phase moves the same tensors with `compile` as without. Slow: each phase is compiled.
    """
    steps = SurroundingSteps([HEAD], [])
    plain, fast = InvariantChecker(), InvariantChecker()
    trial.run(steps, plain, name="plain")
    trial.run(steps, fast, compile=True, name="compiled")
    _assert_no_violations(trial, fast)
    for phase, moved in plain.changed_tensors.items():
        missing = moved - fast.changed_tensors[phase]
        assert not missing, f"{trial.label}: compiled, phase '{phase}' no longer moves {', '.join(sorted(missing))}"


def check_diagnosis_has_no_side_effects(trial: StrategyHarness) -> None:
    """Row 11: a learning-rate probe changes the run's state (Lightning#14674).

    With probes of every kind before each of its steps, the run ends with the same bytes as without. A component that
    wraps `train_step` is called by probes too, and must not count on being called in training only.
    """
    kinds = ("gradients", "features", "lrs")

    def looks(number: int) -> list[StrategyStep]:
        return [Diagnosis(f"kit-{kind}-{number}", measure=kind, batches=1) for kind in kinds]

    trial.run(surround_strategy(), name="plain")
    trial.run(SurroundingSteps([ALL, *looks(-1)], [*looks(-2), HEAD, AGAIN], before_each=looks), name="probed")
    plain, probed = trial.read_files("plain"), trial.read_files("probed")
    plain.pop("steps.jsonl"), probed.pop("steps.jsonl")
    differs = compare_files(plain, probed)
    assert not differs, f"{trial.label}: with probes before its steps the run ends otherwise: {differs}"


def check_misspelled_selectors_are_refused(trial: StrategyHarness) -> None:
    """Row 12: a pattern that matches nothing is ignored (ludwig, axolotl).

    A misspelt selector beside the strategy's own, in what trains and in rate factors, stops the run with an error that
    offers the near name.
    """

    def misspelt(step: StrategyStep) -> StrategyStep:
        return attrs.evolve(step, train=(*step.train, "twinns")) if isinstance(step, Phase) else step

    def scaled(step: StrategyStep) -> StrategyStep:
        scales = {**step.lr_scales, "bodi": 0.5} if isinstance(step, Phase) else {}
        return attrs.evolve(step, lr_scales=scales) if isinstance(step, Phase) else step

    for number, (changed, near) in enumerate([(misspelt, "twins"), (scaled, "body")]):
        said = _get_selector_error(
            trial, SurroundingSteps(after=[changed(HEAD)], transform=changed), f"misspelt-{number}"
        )
        assert said, f"{trial.label}: a selector that matches nothing was ignored"
        assert near in said, f"{trial.label}: the error does not offer '{near}': {said}"


def _get_selector_error(trial: StrategyHarness, frame: SurroundingSteps, name: str) -> str:
    """What the error of a selector says; empty where there is none."""
    try:
        trial.build_engine(frame, name=name).run()
    except SelectorError as error:
        return str(error)
    except TuneforgeError as error:
        raise AssertionError(f"{trial.label}: a misspelt selector gives another error: {error}") from error
    return ""


def check_every_stop_has_a_reason(trial: StrategyHarness) -> None:
    """Row 13: a phase ends, or training stops, and nobody says why (finetuning-scheduler#7).

    Every step's answer holds a reason, which the run also says aloud; where a phase stops early the reason names the
    figure, and where a budget ends the run it names the budget.
    """

    def impatient(step: StrategyStep) -> StrategyStep:
        return attrs.evolve(step, epochs=4, steps=None, patience=1) if isinstance(step, Phase) else step

    for number, settings in enumerate([{}, {"budget": "4steps"}]):
        said: list[str] = []
        frame = SurroundingSteps([ALL], [HEAD], transform=impatient)
        result = trial.run(frame, name=f"reasons-{number}", log=said.append, **settings)
        for step, answer in result.strategy_steps:
            if isinstance(step, Diagnosis):
                continue
            reason = getattr(answer, "reason", "").strip()
            assert reason, f"{trial.label}: step '{step.name}' ended and gives no reason"
            assert any(reason in line for line in said), f"{trial.label}: nobody was told: {reason}"
            if isinstance(step, Phase) and isinstance(answer, StrategyStepResult):
                assert _explains_stop(step, answer.epochs, reason), (
                    f"{trial.label}: phase '{step.name}' ended after {answer.epochs} epoch(s), and says: {reason}"
                )


def _explains_stop(phase: Phase, epochs: int, reason: str) -> bool:
    """True where the reason names what happened: all epochs done, an early stop, or the budget."""
    if "budget" in reason:
        return True
    if phase.epochs is not None and epochs < phase.epochs:
        return "early stopping" in reason and "f1_macro" in reason
    return "completed" in reason or "early stopping" in reason


def _assert_no_violations(trial: StrategyHarness, watch: InvariantChecker, *, about: str = "") -> None:
    faults = [each for each in watch.violations if about in each]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    assert not faults, f"{trial.label}: {'; '.join(faults[:3])}{more}"
    assert watch.changed_tensors, f"{trial.label}: no phase trained, so nothing was seen"


def _format_points(keys: list[tuple[str, int]]) -> str:
    return ", ".join(f"{point} {step}" for point, step in keys)
