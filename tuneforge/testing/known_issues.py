"""Rows 1 to 13 of the known defects of fine-tuning tools, a check each.

A check is given a `Trial`, runs the strategy on the small world and raises AssertionError where the defect is there.
Around the strategy's own steps a check puts phases of the kit's, so that under every strategy something is thawed and
frozen again.
"""

from __future__ import annotations

from typing import Any

import attrs

from tuneforge import Phase, Probe, Report, SelectorError, Step, TuneforgeError, use
from tuneforge.plugin import registry
from tuneforge.testing import fixtures as world
from tuneforge.testing.observers import CallsTrain, Samples, Watch
from tuneforge.testing.recording import Framed, Trial, borders, end_of, same_files

ALL = Phase("kit-all", epochs=1, lr=0.01)
HEAD = Phase("kit-head", train="head", epochs=2, lr=0.01)
AGAIN = Phase("kit-again", epochs=1, lr=0.01)


def framed() -> Framed:
    """All layers, the strategy's own steps, the head alone, all layers again."""
    return Framed([ALL], [HEAD, AGAIN])


def _short_frame() -> Framed:
    return Framed([ALL], [attrs.evolve(HEAD, epochs=1)])


def check_resume_at_phase_borders(trial: Trial) -> None:
    """Row 1: resume freezes again what was thawed, or trains nothing (Lightning#21901, composer#1002).

    The run is killed one optimizer step before, at, and one after each border of two steps, and resumed each time by
    a strategy of the same class and options that has seen nothing. It must end as the run that was left alone, to the
    bit; so what a strategy remembers belongs in `run.state(self)`, and what it decides must follow from the answers.
    """
    keys = borders(trial.places(_short_frame(), name="whole"))
    trial.interrupted(keys, lambda: [_short_frame()])
    differs = same_files(trial.files("whole"), trial.files("interrupted"))
    assert not differs, f"{trial.label}: killed at {_words(keys)} and resumed, the run ends otherwise: {differs}"


def check_frozen_norms_keep_still(trial: Trial) -> None:
    """Row 2: frozen BatchNorm goes on moving, or normalises with the batch (Lightning#21531, pytorch#38084).

    Statistics of a norm with a frozen parameter, and of one without any that nothing trainable lies before, are equal
    to the bit after each validation and at the end of each phase, also where user code calls `.train()` between steps;
    and in training such a norm gives what its statistics say. With and without a norm that keeps none.
    """
    for batch_statistics in (False, True):
        watch, calls = Watch(forward=True), CallsTrain()
        network = world.model(batch_statistics=batch_statistics)
        trial.run(framed(), watch, calls, network=network, name=f"norms-{batch_statistics}")
        _no_faults(trial, watch)
        assert calls.calls, f"{trial.label}: no phase trained"


def check_frozen_statistics_with_kept_features(trial: Trial) -> None:
    """Row 2, where features of the frozen part are computed once and kept: nothing frozen changes either."""
    watch = Watch()
    trial.run(framed(), watch, CallsTrain(), use("ema", decay=0.5), cache="memory", accumulate=2)
    _no_faults(trial, watch)


def check_frozen_dropout_is_off(trial: Trial) -> None:
    """Row 3: dropout is active in a frozen encoder (butd_detr#8, OpenNMT-tf#627).

    While a phase trains, a dropout that nothing trainable lies before passes its input on, to the bit.
    """
    watch = Watch(forward=True)
    trial.run(framed(), watch)
    _no_faults(trial, watch, about="dropout")
    assert watch.looked, f"{trial.label}: no frozen dropout or norm ran, so nothing was seen"


def check_decay_and_momentum_move_nothing_frozen(trial: Trial) -> None:
    """Row 4: weight decay or momentum moves frozen weights (fairseq#4702, moco#14).

    Frozen weights are equal to the bit at the end of each phase, with AdamW and SGD with momentum, both under heavy
    weight decay, after a phase that has given every tensor its moments; with averaged weights, clipped and accumulated
    gradients, a weight that two layers share and a layer that gets no gradient.
    """
    optimizers = {"adamw": use("adamw", weight_decay=0.5), "sgd": use("sgd", momentum=0.9, weight_decay=0.5)}
    for name, optimizer in optimizers.items():
        watch, extensions = Watch(), [use("ema", decay=0.5), use("grad-clip")]
        trial.run(framed(), watch, *extensions, optimizer=optimizer, accumulate=2, name=name)
        _no_faults(trial, watch)


def check_every_schedule_goes_on(trial: Trial) -> None:
    """Row 5: schedulers or `load_state_dict` fail where the number of groups changes (Lightning#8720, #12141).

    Under each installed schedule the run goes through every border of its phases, is stopped within the last one, and
    ends as if it had not been, to the bit.
    """
    for entry in registry.entries_of("lr_schedule"):
        settings: dict[str, Any] = {"schedule": f"{entry.distribution}/{entry.name}"}
        places = trial.places(_short_frame(), name=f"{entry.name}-whole", **settings)
        last = [step for point, step in places if point == "step"][-2]
        trial.interrupted([("step", last)], lambda: [_short_frame()], name=entry.name, **settings)
        differs = same_files(trial.files(f"{entry.name}-whole"), trial.files(entry.name))
        assert not differs, f"{trial.label}: resumed under schedule '{entry.name}' it ends otherwise: {differs}"


def check_equal_tensors_all_train(trial: Trial) -> None:
    """Row 6: parameters of equal value are dropped from training (Lightning's `filter_on_optimizer`).

    Two biases, both zero, move in every phase that trains them, as does every tensor with a rate and a gradient.
    """
    watch = Watch()
    trial.run(framed(), watch)
    _no_faults(trial, watch)
    for phase in (ALL, AGAIN):
        missing = set(world.TWINS) - watch.moved[phase.name]
        assert not missing, f"{trial.label}: phase '{phase.name}' trains all and has not moved {sorted(missing)}"


def check_optimizer_state_goes_by_name(trial: Trial) -> None:
    """Row 7: optimizer state is attached by position ("parameter group doesn't match the size").

    The run is killed within its last phase and resumed with a network that registers the same modules in another
    order: every tensor ends where it would have.
    """
    places = trial.places(framed(), name="whole")
    last = [step for point, step in places if point == "step"][-2]
    whole = end_of(trial.run(framed(), name="again"))
    resumed = trial.interrupted(
        [("step", last)], lambda: [framed()], network=lambda: world.model(backwards=True), name="reordered"
    )
    ended = end_of(resumed)
    wrong = [name for name, each in whole.items() if not ended[name].allclose(each, rtol=1e-4, atol=1e-6)]
    assert not wrong, f"{trial.label}: modules registered in another order, these end elsewhere: {', '.join(wrong)}"


def check_order_goes_on_after_resume(trial: Trial) -> None:
    """Row 8: the first epoch after a resume repeats epoch 0's order (Lightning#21938, accelerate#2016).

    The samples of each batch are logged: epochs differ in order, and a run that was killed at the second step of an
    epoch goes on with exactly the samples that would have come.
    """
    whole = Samples()
    places = trial.places(framed(), whole, name="whole")
    orders = [tuple(rows) for rows in whole.epochs.values()]
    assert len(set(orders)) == len(orders), f"{trial.label}: two epochs have one order"
    ends = [step for point, step in places if point == "epoch"]
    logs = [Samples()]

    def extensions() -> list[object]:
        logs.append(Samples())
        return [framed(), logs[-1]]

    trial.interrupted([("step", ends[-2] + 2)], extensions)
    expected = dict(whole.rows)
    wrong = [step for step, rows in logs[-1].rows if rows != expected.get(step)]
    assert logs[-1].rows, f"{trial.label}: nothing was trained after the resume"
    assert not wrong, f"{trial.label}: after the resume, optimizer steps {wrong} see other samples"


def check_thawed_layers_train_when_compiled(trial: Trial) -> None:
    """Row 9: `torch.compile` and unfreezing train nothing (pytorch#139476, dingo#407).

    Each phase moves the same tensors with `compile` as without. Slow: each phase is compiled.
    """
    steps = Framed([HEAD], [])
    plain, fast = Watch(), Watch()
    trial.run(steps, plain, name="plain")
    trial.run(steps, fast, compile=True, name="compiled")
    _no_faults(trial, fast)
    for phase, moved in plain.moved.items():
        missing = moved - fast.moved[phase]
        assert not missing, f"{trial.label}: compiled, phase '{phase}' no longer moves {', '.join(sorted(missing))}"


def check_probe_leaves_no_trace(trial: Trial) -> None:
    """Row 11: a learning-rate probe changes the run's state (Lightning#14674).

    With probes of every kind before each of its steps, the run ends with the same bytes as without. A component that
    wraps `train_step` is called by probes too, and must not count on being called in training only.
    """
    kinds = ("gradients", "features", "rates")

    def looks(number: int) -> list[Step]:
        return [Probe(f"kit-{kind}-{number}", measure=kind, batches=1) for kind in kinds]

    trial.run(framed(), name="plain")
    trial.run(Framed([ALL, *looks(-1)], [*looks(-2), HEAD, AGAIN], beside=looks), name="probed")
    plain, probed = trial.files("plain"), trial.files("probed")
    plain.pop("steps.jsonl"), probed.pop("steps.jsonl")
    differs = same_files(plain, probed)
    assert not differs, f"{trial.label}: with probes before its steps the run ends otherwise: {differs}"


def check_misspelt_selectors_are_refused(trial: Trial) -> None:
    """Row 12: a pattern that matches nothing is ignored (ludwig, axolotl).

    A misspelt selector beside the strategy's own, in what trains and in rate factors, stops the run with an error that
    offers the near name.
    """

    def misspelt(step: Step) -> Step:
        return attrs.evolve(step, train=(*step.train, "twinns")) if isinstance(step, Phase) else step

    def scaled(step: Step) -> Step:
        scales = {**step.lr_scales, "bodi": 0.5} if isinstance(step, Phase) else {}
        return attrs.evolve(step, lr_scales=scales) if isinstance(step, Phase) else step

    for number, (changed, near) in enumerate([(misspelt, "twins"), (scaled, "body")]):
        said = _refusal(trial, Framed(after=[changed(HEAD)], changed=changed), f"misspelt-{number}")
        assert said, f"{trial.label}: a selector that matches nothing was ignored"
        assert near in said, f"{trial.label}: the error does not offer '{near}': {said}"


def _refusal(trial: Trial, frame: Framed, name: str) -> str:
    """What the error of a selector says; empty where there is none."""
    try:
        trial.engine(frame, name=name).run()
    except SelectorError as error:
        return str(error)
    except TuneforgeError as error:
        raise AssertionError(f"{trial.label}: a misspelt selector gives another error: {error}") from error
    return ""


def check_every_end_has_its_reason(trial: Trial) -> None:
    """Row 13: a phase ends, or training stops, and nobody says why (finetuning-scheduler#7).

    Every step's answer holds a reason, which the run also says aloud; where a phase stops early the reason names the
    figure, and where a budget ends the run it names the budget.
    """

    def impatient(step: Step) -> Step:
        return attrs.evolve(step, epochs=4, steps=None, patience=1) if isinstance(step, Phase) else step

    for number, settings in enumerate([{}, {"budget": "4steps"}]):
        said: list[str] = []
        frame = Framed([ALL], [HEAD], changed=impatient)
        result = trial.run(frame, name=f"reasons-{number}", say=said.append, **settings)
        for step, answer in result.steps:
            if isinstance(step, Probe):
                continue
            reason = getattr(answer, "reason", "").strip()
            assert reason, f"{trial.label}: step '{step.name}' ended and gives no reason"
            assert any(reason in line for line in said), f"{trial.label}: nobody was told: {reason}"
            if isinstance(step, Phase) and isinstance(answer, Report):
                assert _fits(step, answer.epochs, reason), (
                    f"{trial.label}: phase '{step.name}' ended after {answer.epochs} epoch(s), and says: {reason}"
                )


def _fits(phase: Phase, epochs: int, reason: str) -> bool:
    """True where the reason names what happened: all epochs done, an early stop, or the budget."""
    if "budget" in reason:
        return True
    if phase.epochs is not None and epochs < phase.epochs:
        return "early stop" in reason and "f1_macro" in reason
    return "done" in reason or "early stop" in reason


def _no_faults(trial: Trial, watch: Watch, *, about: str = "") -> None:
    faults = [each for each in watch.faults if about in each]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    assert not faults, f"{trial.label}: {'; '.join(faults[:3])}{more}"
    assert watch.moved, f"{trial.label}: no phase trained, so nothing was seen"


def _words(keys: list[tuple[str, int]]) -> str:
    return ", ".join(f"{point} {step}" for point, step in keys)
