"""The engine: a run from its configuration to its folder. `Engine.run` is the whole story; read it first."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from tuneforge.engine.context.budget import Budget
from tuneforge.engine.context.distributed import ProcessGroup, open_run_dir
from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.build import PhaseComponents, create_component
from tuneforge.engine.loop.diagnosis import diagnose
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.head_fit import Snapshot, average_weights, fit_head
from tuneforge.engine.loop.metric_set import HardestSamples
from tuneforge.engine.loop.train_phase import train_phase
from tuneforge.engine.model import device, fsdp
from tuneforge.engine.model.freezing import full_state
from tuneforge.engine.model.model import Model
from tuneforge.engine.session import from_objects, messages
from tuneforge.engine.session.dry_run import DryRun, collect_known_steps, prepare_run, validate_step
from tuneforge.engine.session.resume import ResumeState, find_checkpoint
from tuneforge.engine.session.run_log import (
    NUM_HARDEST_SAMPLES,
    RunLogger,
    build_task_info,
    describe_hardest_samples,
    describe_model,
    describe_run,
)
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.engine.storage.run_dir import (
    HARDEST_SAMPLES,
    LOG,
    METRICS,
    MODEL,
    REPORT,
    RUN,
    STATUS,
    STRATEGY_STEPS,
    TIMINGS,
    WEIGHTS,
    RunDir,
    read_json,
)
from tuneforge.engine.storage.safetensors_io import get_state_dict, save_tensors
from tuneforge.errors import PluginError, StoppedError, UsageError
from tuneforge.plugin.config import REPEATABLE_COMPONENT_KEYS, RunConfig, resolve_config
from tuneforge.plugin.hooks import Hooks, RegisteredComponent, iterate_strategy
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.results import AnyStrategyStepResult
from tuneforge.plugin.steps import ComponentSpec, Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage

_REPORT_CALLBACK = "report-page"


@attrs.frozen(eq=False)
class Result:
    """What a run leaves.

    Args:
        run_dir: Where everything lies.
        report: The content of `report.json`.
        model: The tuned model.
        strategy_steps: Each step with its answer.
    """

    run_dir: Path
    report: Mapping[str, Any]
    model: Model
    strategy_steps: tuple[tuple[StrategyStep, AnyStrategyStepResult], ...]


class Engine:
    """One run, as the command line's `tuneforge run` describes it: every flag is a keyword.

    Where the command line takes a name, Python may also give an instance of a component; for data also arrays, a
    torch `Dataset` or `DataLoader`; for the model also a module; for the strategy also a list of steps or a function
    of the task.

    Args:
        data: Where samples come from.
        model: What builds the model.
        adapt: What changes it, in order.
        loss: What computes the loss; None: what fits the targets.
        metrics: What computes the figures; empty: what fits the targets.
        strategy: What says what to do.
        schedule: Course of the rate, over what the strategy asks.
        optimizer: Over what the strategy asks.
        callbacks: What else takes part.
        augment: Random changes of training inputs, in order.
        log: Where sentences for the user go; None: only into the log.
        settings: The run's own settings, such as `seed`, `batch_size`, `device`, `out`.

    Raises:
        UnknownNameError: A name is not installed.
        OptionError: An option or a setting is wrong.
    """

    def __init__(
        self,
        *,
        data: Any = "digits",
        model: Any = "digit-cnn",
        adapt: Sequence[Any] = (),
        loss: Any = None,
        metrics: Sequence[Any] = (),
        strategy: Any = "freeze-then-unfreeze",
        schedule: str | ComponentSpec | None = None,
        optimizer: str | ComponentSpec | None = None,
        callbacks: Sequence[Any] = (),
        augment: Sequence[str | ComponentSpec] = (),
        log: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        self._log = log
        self._members: list[tuple[str, RegisteredComponent]] = []
        self._observers: list[RegisteredComponent] = []
        self._has_run = False
        self._resume_dir: Path | None = None
        self._stop_error: StoppedError | None = None
        self._budget = Budget()
        singles = {"data": data, "model": model, "loss": loss, "strategy": strategy}
        specs = {name: self._add_member(name, value) for name, value in singles.items() if value is not None}
        repeatable = {"adapt": adapt, "metrics": metrics, "callback": callbacks}
        lists = {
            name: [self._add_member(name, value) for value in from_objects.as_list(values)]
            for name, values in repeatable.items()
        }
        parts = {"schedule": schedule, "optimizer": optimizer}
        specs |= {name: from_objects.as_spec(value) for name, value in parts.items() if value is not None}
        lists["augment"] = [from_objects.as_spec(value) for value in from_objects.as_list(augment)]
        from_objects.check_no_duplicates([member for group, member in self._members if group == "callback"])
        self.config: RunConfig = resolve_config({**settings, **specs, **lists}, where="Engine")
        if self.config.page and not any(spec.name == _REPORT_CALLBACK for spec in self.config.callbacks):
            self._add_member("callback", _REPORT_CALLBACK)
        self._check_components()

    @classmethod
    def from_config(
        cls, config: RunConfig, *, log: Callable[[str], None] | None = None, observers: Sequence[Any] = ()
    ) -> Engine:
        """The engine of a configuration; `observers` are callbacks that only watch, and that no file records."""
        chosen = {name: getattr(config, name) for name in _COMPONENT_KEYS}
        engine = cls(**chosen, callbacks=config.callbacks, **config.settings(), log=log)
        engine._observers = [from_objects.resolve_member("callback", each, where="also")[0] for each in observers]
        return engine

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        log: Callable[[str], None] | None = None,
        observers: Sequence[Any] = (),
        **objects: Any,
    ) -> Engine:
        """The engine that goes on with a run that was stopped or killed; its `run` ends as if nothing had happened.

        Args:
            path: The run's folder.
            log: Where sentences for the user go.
            observers: Callbacks that only watch.
            objects: What the run was given as Python objects, such as `model` and `data`.

        Raises:
            FolderError: The folder holds no run, or one that was given objects which are missing here.
            UsageError: The run is done.
        """
        path = Path(path)
        config = resolve_config(read_json(path / RUN, "config")["config"], where=str(path / RUN))
        if read_json(path / STATUS, "state")["state"] == "done":
            raise UsageError(f"the run in '{path}' is done", fix=f"see it: tuneforge report {path}")
        chosen = {name: getattr(config, name) for name in _COMPONENT_KEYS} | {"callbacks": config.callbacks} | objects
        engine = cls(**chosen, **{**config.settings(), "out": path}, log=log)
        engine._observers = [from_objects.resolve_member("callback", each, where="also")[0] for each in observers]
        engine._resume_dir = path
        return engine

    def stop(self, reason: str, *, exit_code: int) -> None:
        """Ask the run to save a checkpoint after the step it is in, and to stop with `StoppedError`."""
        self._stop_error = StoppedError(
            f"stopped by {reason}", exit_code=exit_code, fix="go on with: tuneforge resume RUN"
        )

    def run(self) -> Result:
        """Do it: data, model, steps, report.

        Raises:
            TuneforgeError: Something went wrong; the folder keeps what was written, the log and the reason.
        """
        if self._has_run:
            raise UsageError(
                "an Engine runs once",
                why="its model has been adapted or tuned, so a second run would not be the same",
                fix="make another Engine, with a fresh model",
            )
        self._has_run = True
        process_group = ProcessGroup.from_env()
        with (
            open_run_dir(process_group, self.config.out, resume=self._resume_dir is not None) as run_dir,
            torch.random.fork_rng(devices=[]),
        ):
            try:
                return self._run(run_dir, process_group)
            except BaseException as error:
                run_dir.append(LOG, traceback.format_exc())
                stopped = isinstance(error, StoppedError) or not isinstance(error, Exception)
                state = "done" if run_dir.state == "done" else "stopped" if stopped else "failed"
                run_dir.write_status(
                    state, reason=str(error) or type(error).__name__, elapsed_s=self._budget.elapsed_s()
                )
                raise

    def _run(self, run_dir: RunDir, process_group: ProcessGroup) -> Result:
        run = self._create_run(run_dir, process_group)
        try:
            return self._execute(run, run_dir)
        finally:
            run.close()  # before the folder is free: a process that decodes ahead holds its lock too

    def _execute(self, run: Run, run_dir: RunDir) -> Result:
        run.hooks.call.run_started(run=run)

        run.hooks.get_provider("data_prepare")
        run.set_data(run.hooks.call.data_prepare(run=run))
        for line in messages.format_data(run.data):
            run.log(line)

        resume_state = ResumeState(
            run,
            run_dir,
            Checkpoints(run_dir.path, self.config.checkpoint_s, self.config.keep, self.config.checkpoint_steps),
            stop_request=lambda: self._stop_error,
            components=PhaseComponents(self.config),
        )
        name, state = find_checkpoint(run, run_dir.path) if self._resume_dir is not None else ("", None)
        run.restoring = state is not None
        self._add_defaults(run)
        run.reseed()  # so that fresh weights follow from the seed
        run.set_model(from_objects.mark_user_frozen(run.hooks.call.model_adapt(run=run, model=None)))
        run.restoring = False
        for line in messages.format_model(run.model):
            run.log(line)
        if state is None:
            run_dir.truncate(dict.fromkeys((STRATEGY_STEPS, METRICS, TIMINGS), 0))
            run_dir.write(MODEL, describe_model(run))
            resume_state.begin(build_task_info(run))
        else:
            resume_state.restore(state)
            run.log(resume_state.describe(name))

        run.engine_state.save = resume_state.save
        if self._stop_error is not None:
            resume_state.save(None)
        self._budget.start()
        reason = self._run_strategy(run, resume_state)
        for name, parameter in run.model.parameters().items():
            parameter.requires_grad_(name not in run.model.user_frozen)  # as it came
        if not resume_state.completed_steps:
            run.log("note: the strategy asked for no step, so nothing was trained")
        report = self._write_report(run, run_dir, reason)
        run_dir.write_status("done", elapsed_s=self._budget.elapsed_s())
        if run_dir.writable:
            checkpoint.delete_unpinned(run_dir.path)
        if resume_state.checkpoints.num_saved:
            cost = 1000 * resume_state.checkpoints.spent_s / resume_state.checkpoints.num_saved
            run.log(f"checkpoints: {resume_state.checkpoints.num_saved}, {cost:.0f} ms each")
        run.hooks.call.run_ended(run=run)
        run.process_group.barrier()  # none leaves before all are done
        return Result(run_dir.path, report, run.model, tuple(resume_state.completed_steps))

    def _create_run(self, run_dir: RunDir, process_group: ProcessGroup) -> Run:
        hooks = Hooks()
        for member in (*(member for _, member in self._members), *self._observers):
            hooks.add(member)
        hooks.add(RegisteredComponent(_DefaultOptimizerStep(), "engine", "the engine's own optimizer step"))
        run = Run(
            config=self.config,
            run_dir=run_dir.path if process_group.is_main else None,
            process_group=process_group,
            device=device.resolve_device(self.config.device),
            hooks=hooks,
            log_sink=self._build_log(run_dir),
        )
        run.engine_state.augmentations = tuple(create_component("augment", spec) for spec in self.config.augment)
        hooks.add(RegisteredComponent(RunLogger(run_dir), "engine", "the engine's own record"))
        self._budget = run.engine_state.budget = Budget.load(self.config.budget, run_dir.path)
        if self._resume_dir is None:
            run_dir.write(RUN, describe_run(run, self._members))
        run_dir.write_status("running", elapsed_s=self._budget.previous_s)
        run.log(f"run: {run_dir.path}")
        if not process_group.is_single:
            run.log(f"ranks: {process_group.world_size} processes, each with its share of every batch")
        elif self.config.shard:
            run.log("note: one process holds the whole model; --shard splits it among those that torchrun starts")
        return run

    def _add_defaults(self, run: Run) -> None:
        """Add what nobody named and the targets ask for: the step, the metrics, and a head of the right size."""
        targets = run.data.targets
        if not run.hooks.has_provider("train_step"):
            run.hooks.add(from_objects.resolve_member("train_step", targets.loss, where="--loss")[0])
        if not self.config.metrics:
            for name in targets.metrics:
                run.hooks.add(from_objects.resolve_member("evaluate", name, where="--metrics")[0])
        if not any(spec.name == "head" for spec in self.config.adapt):
            run.hooks.add(from_objects.resolve_member("model_adapt", "head", where="--adapt")[0])
        for hook in ("train_step", "finetune_strategy", "optimizer_step"):
            run.hooks.get_provider(hook)

    def _run_strategy(self, run: Run, resume_state: ResumeState) -> str:
        """The conversation: the strategy says what to do, the engine does it and reports back.

        What was done before a resume is replayed: the strategy is answered from the log, and must ask the same.

        Returns:
            Why it ended, where the strategy or the budget says so; else "".
        """
        member = run.hooks.get_provider("finetune_strategy")
        assert resume_state.task is not None
        steps_or_generator = run.hooks.call.finetune_strategy(task=resume_state.task)
        plan = steps_or_generator if isinstance(steps_or_generator, (list, tuple)) else ()
        for each in plan:
            validate_step(run, _check_step_type(each, member))
            run.log(f"plan: {messages.format_step(each)}")
        steps = iterate_strategy(member, steps_or_generator)
        result: AnyStrategyStepResult | None = None
        number = -1
        while True:
            number += 1
            self._budget.completed_steps = len(resume_state.completed_steps)
            if (
                number == len(resume_state.completed_steps)
                and resume_state.phase_state is None
                and (spent := self._budget.check_exhausted(run))
            ):
                run.log(f"{spent}, so no further step is taken")
                steps.close()
                return "the budget was spent"
            try:
                step = _check_step_type(steps.send(result), member)
            except StopIteration as end:
                if end.value:
                    run.log(f"ended: {end.value}")
                return str(end.value or "")
            if number < len(resume_state.completed_steps):
                result = resume_state.replay_step(number, step)
                continue
            _check_step_name(step, resume_state.snapshots, member)
            run.log(messages.format_step(step))
            if step.why:
                run.log(f"  because {step.why}")
            phase_state, resume_state.phase_state = resume_state.phase_state, None
            run.engine_state.next_phases = tuple(
                itertools.takewhile(lambda each: isinstance(each, Phase), plan[number + 1 :])
            )
            result = _execute_step(run, step, resume_state, phase_state)
            run.process_group.broadcast(list(full_state(run.model.module).values()))
            for line in messages.format_step_result(result):
                run.log(line)
            resume_state.add_step_result(step, result)

    def _write_report(self, run: Run, run_dir: RunDir, reason: str) -> dict[str, Any]:
        hardest = HardestSamples(NUM_HARDEST_SAMPLES)
        splits = {
            "val": evaluate(run, run.data.val, "val"),
            "test": evaluate(run, run.data.test, "test", hardest=hardest),
        }
        splits |= {name: evaluate(run, split, name) for name, split in run.data.extra_test_splits.items()}
        weights = fsdp.gather_state(get_state_dict(run.model.module), keep=run_dir.writable)
        if run_dir.writable:
            save_tensors(weights, run_dir.path / WEIGHTS, metadata={"labels": run.model.labels})
        report: dict[str, Any] = {
            "strategy": run.hooks.get_provider("finetune_strategy").name,
            "stop_reason": reason,
            "monitor": run.data.targets.monitor,
            "primary_metrics": list(run.data.targets.primary_metrics),
            "num_samples": {name: len(split) for name, split in run.data.splits().items()},
            "splits": splits,
        }
        if self._budget.exhausted_at is not None:
            report["stopped_by_budget"] = self._budget.exhausted_at[0]
        run_dir.write(REPORT, report)
        run_dir.write(HARDEST_SAMPLES, describe_hardest_samples(run, run.data.test, hardest))
        for line in messages.format_metrics(splits, run.data.targets.primary_metrics):
            run.log(line)
        return report

    def _add_member(self, key: str, spec: Any) -> ComponentSpec:
        group = _GROUP_OF_KEY[key]
        member, component_spec = from_objects.resolve_member(
            group, spec, where=f"--{key}", repeatable=key in REPEATABLE_COMPONENT_KEYS
        )
        self._members.append((group, member))
        return component_spec

    def _check_components(self) -> None:
        """Build every part once and look for the device, so that what is wrong is found before a folder is made."""
        device.resolve_device(self.config.device)
        fsdp.check_config(self.config)
        named = [("lr_schedule", self.config.schedule), ("optimizer", self.config.optimizer)]
        for group, spec in [*named, *(("augment", spec) for spec in self.config.augment)]:
            if spec is not None:
                create_component(group, spec)

    def _build_log(self, run_dir: RunDir) -> Callable[[str], None]:
        def log(text: str) -> None:
            run_dir.append(LOG, f"{time.strftime('%H:%M:%S')} {text}")
            if self._log is not None and run_dir.writable:
                self._log(text)

        return log

    def prepare(self) -> Run:
        """Data and model as the run would begin with them; nothing is trained or written. No run can follow."""
        self._has_run = True  # a model of the caller's has been adapted
        members = (
            *(each for _, each in self._members),
            RegisteredComponent(_DefaultOptimizerStep(), "engine", "the engine's own optimizer step"),
        )
        return prepare_run(self.config, members, self._add_defaults)

    def dry_run(self) -> DryRun:
        """The steps that are known before any is done: data and model are built, nothing is trained or written."""
        return collect_known_steps(self.prepare(), _check_step_type, self._log or (lambda text: None))


class _DefaultOptimizerStep:
    """The engine's own answer to `optimizer_step`."""

    @hookimpl
    def optimizer_step(self, run: Run) -> bool:
        """Note what the gradients are due to move, apply them and drop them."""
        freeze_check = run.engine_state.freeze_check
        if freeze_check is not None and freeze_check.unmoved:
            freeze_check.observe(run.model, run.optimization.param_groups())
        run.optimization.step()
        return True


_GROUP_OF_KEY = {
    "data": "data_prepare", "model": "model_adapt", "adapt": "model_adapt", "loss": "train_step",
    "metrics": "evaluate", "strategy": "finetune_strategy", "callback": "callback",
}  # fmt: skip
_COMPONENT_KEYS = ("data", "model", "adapt", "loss", "metrics", "strategy", "schedule", "optimizer", "augment")
_STEP_EXECUTORS: dict[type, Callable[[Run, Any, ResumeState, dict[str, Any] | None], AnyStrategyStepResult]] = {
    Phase: lambda run, step, resume_state, phase_state: train_phase(run, step, resume_state.components, phase_state),
    HeadFit: lambda run, step, resume_state, phase_state: fit_head(run, step),
    Diagnosis: lambda run, step, resume_state, phase_state: diagnose(run, step, resume_state.components),
    WeightAverage: lambda run, step, resume_state, phase_state: average_weights(run, step, resume_state.snapshots),
}


def _execute_step(
    run: Run, step: StrategyStep, resume_state: ResumeState, phase_state: dict[str, Any] | None
) -> AnyStrategyStepResult:
    return _STEP_EXECUTORS[type(step)](run, step, resume_state, phase_state)


def _check_step_type(step: Any, member: RegisteredComponent) -> StrategyStep:
    if type(step) not in _STEP_EXECUTORS:
        raise PluginError(
            f"{member.label} asked for {step!r:.80}, which is no step",
            why=f"steps are {', '.join(kind.__name__ for kind in _STEP_EXECUTORS)}",
            fix="yield each step by itself" if isinstance(step, (list, tuple)) else "",
        )
    return step  # type: ignore[no-any-return]  # just checked


def _check_step_name(step: StrategyStep, snapshots: Mapping[str, Snapshot], member: RegisteredComponent) -> None:
    if step.name in snapshots:
        raise PluginError(
            f"{member.label} names two steps '{step.name}'",
            why="a step's name is how reports and WeightAverage refer to it; 'start' is taken",
            fix="give each step its own name",
        )
