"""The engine: run a configuration and write its run directory. Read `Engine.run` and `Engine._execute` first."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.engine.context.budget import Budget
from tuneforge.engine.context.distributed import ProcessGroup, open_run_dir
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.copied_rows import describe_copies
from tuneforge.engine.loop.phase_components import PhaseComponents, create_component
from tuneforge.engine.loop.sample_weights import num_draws
from tuneforge.engine.loop.weight_average import check_unchanged, take_snapshot
from tuneforge.engine.model import device, fsdp
from tuneforge.engine.model.forward_writes import ForwardWrites
from tuneforge.engine.model.model import Model
from tuneforge.engine.model.modes import ModuleFlags, get_modes, set_modes
from tuneforge.engine.model.module_check import check_trainable
from tuneforge.engine.model.weights_file import check_extra_states
from tuneforge.engine.session import messages
from tuneforge.engine.session.components import (
    as_list,
    as_spec,
    check_no_duplicates,
    check_non_hook_components,
    engine_arguments,
    resolve_augmentations,
    resolve_component,
)
from tuneforge.engine.session.dry_run import DryRun, collect_known_steps
from tuneforge.engine.session.exclusive import exclusive_process_state
from tuneforge.engine.session.portability import Portability
from tuneforge.engine.session.refit import decide_refit, refit
from tuneforge.engine.session.resume import ResumeState, find_checkpoint, restore_counters
from tuneforge.engine.session.resume_check import check_config, check_data
from tuneforge.engine.session.run_log import (
    RunLogger,
    build_task_info,
    describe_model,
    describe_run,
    write_results,
)
from tuneforge.engine.session.signals import save_on_signals
from tuneforge.engine.session.strategy_loop import check_step_type, run_strategy
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.engine.storage.run_files import LOG, METRICS, MODEL, RUN, STATUS, STRATEGY_STEPS, TIMINGS, read_json
from tuneforge.errors import StoppedError, UsageError
from tuneforge.plugin.config import GROUP_BY_KEY, REPEATABLE_COMPONENT_KEYS, RunConfig, resolve_config
from tuneforge.plugin.data_path import choose_model, default_strategy, infer_data, is_data_path, note_shadowed_path
from tuneforge.plugin.hooks import Hooks, RegisteredComponent
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.results import AnyStrategyStepResult
from tuneforge.plugin.steps import ComponentSpec, StrategyStep

_REPORT_CALLBACK = "report-page"


@attrs.frozen(eq=False)
class Result:
    """The result of a finished run.

    Args:
        run_dir: The run directory.
        report: The content of `report.json`.
        model: The fine-tuned model, in eval mode.
        strategy_steps: Each step of the strategy with its result.
    """

    run_dir: Path
    report: Mapping[str, Any]
    model: Model
    strategy_steps: tuple[tuple[StrategyStep, AnyStrategyStepResult], ...]


class Engine:
    """One run, as `tuneforge run` starts it: every flag of the command line is a keyword here.

    Where the command line takes a name, Python may also pass an instance of a component. The data may also be arrays, a
    torch `Dataset` or a `DataLoader`; the model may be a module; the strategy may be a list of steps or a function that
    takes a `TaskInfo`.

    Args:
        data: The data source, or a path: what lies there decides how it is read.
        model: The model builder; None selects the one that suits the data.
        adapt: Adapters that change the model, in order.
        loss: The loss; None selects the one that fits the targets.
        metrics: The metrics; an empty list selects those that fit the targets.
        strategy: The strategy that decides which steps are executed; None selects `freeze-then-unfreeze`, or `full` for
            a model without pretrained weights.
        schedule: The learning-rate schedule; overrides that of the strategy.
        optimizer: The optimizer; overrides that of the strategy.
        callbacks: Further components that take part in the run.
        augment: Augmentations of the training inputs, in order.
        log: Called with every line for the user; None: lines go into `log.txt` only.
        settings: The settings of the run, such as `seed`, `batch_size`, `device` and `out`.

    Raises:
        UnknownNameError: No component of some name is installed.
        OptionError: An option or a setting is wrong.
    """

    _argument = "Engine({}=...)"  # how errors name the argument of a component

    def __init__(
        self,
        *,
        data: Any = "digits",
        model: Any = None,
        adapt: Sequence[Any] = (),
        loss: Any = None,
        metrics: Sequence[Any] = (),
        strategy: Any = None,
        schedule: str | ComponentSpec | None = None,
        optimizer: str | ComponentSpec | None = None,
        callbacks: Sequence[Any] = (),
        augment: Sequence[str | ComponentSpec] = (),
        log: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        self._log = log
        self._members: list[tuple[str, RegisteredComponent]] = []  # (hook, component), in the order of hook calls
        self._observers: list[RegisteredComponent] = []
        self._has_run = self._has_started = False
        self._resume_dir: Path | None = None
        self._changed_settings: list[str] = []
        self._stop_error: StoppedError | None = None
        self._budget = Budget()
        self._module_flags: ModuleFlags | None = None  # known once the model is built
        self._notes: list[str] = []
        table = dict(settings)
        data, model = self._choose_by_path(data, model)
        for key, value in (("data", data), ("model", model), ("loss", loss)):
            if value is not None:
                table[key] = self._add_component(key, value)
        if strategy is None:
            strategy, note = default_strategy(
                next(each.component for hook, each in self._members if hook == "model_adapt")
            )
            self._notes += [note] * bool(note)
        table["strategy"] = self._add_component("strategy", strategy)
        for key, values in (("adapt", adapt), ("metrics", metrics), ("callback", callbacks)):
            table[key] = [self._add_component(key, value) for value in as_list(values)]
        for key, name in (("schedule", schedule), ("optimizer", optimizer)):
            if name is not None:
                table[key] = as_spec(name)
        for _, member in self._members:
            _add_settings(table, member)
        table["augment"] = [as_spec(value) for value in as_list(augment)]
        check_no_duplicates([member for hook, member in self._members if hook == "callback"])
        self.config: RunConfig = resolve_config(table, where="Engine")
        if self.config.page and not any(spec.name == _REPORT_CALLBACK for spec in self.config.callbacks):
            self._add_component("callback", _REPORT_CALLBACK)
        device.resolve_device(self.config.device)
        fsdp.check_config(self.config)
        check_non_hook_components(self.config)

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        *,
        log: Callable[[str], None] | None = None,
        observers: Sequence[Any] = (),
        notes: Sequence[str] = (),
    ) -> Engine:
        """Return the engine of a configuration.

        Args:
            config: The configuration.
            log: Called with every line for the user.
            observers: Callbacks that `run.json` does not record.
            notes: Lines for the beginning of the log, such as how the configuration was inferred.
        """
        engine = _EngineOfFlags(**engine_arguments(config), log=log)
        engine._set_observers(observers)
        engine._notes += notes
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
        """Return an engine whose `run` continues a stopped or killed run; the result equals that of an unbroken run.

        Args:
            path: The run directory.
            log: Called with every line for the user.
            observers: Callbacks that `run.json` does not record.
            objects: The Python objects that the run was given, such as `model` and `data`. Other components and
                settings come from the run. They may be given again if they are the same; `device`, `num_workers`,
                `checkpoint_s`, `checkpoint_steps`, `keep`, `cache_dir` and `page` may also differ.

        Raises:
            FolderError: `path` holds no run, or the run was given Python objects that are missing here.
            UsageError: The run is done, or a component or setting differs from that of the run. `run` also raises it if
                the strategy asks for other steps than before, and `DataError` if the data differs.
        """
        path = Path(path)
        recorded = read_json(path / RUN, "config")["config"]
        config = resolve_config(recorded, where=str(path / RUN))
        if read_json(path / STATUS, "state")["state"] == "done":
            raise messages.finished_error(path)
        engine = cls(**{**engine_arguments(config), "out": path, **objects}, log=log)
        engine._changed_settings = check_config(path, recorded, engine.config, objects)
        engine._set_observers(observers)
        engine._resume_dir = path
        return engine

    def stop(self, reason: str, *, exit_code: int) -> bool:
        """Make `run` save a checkpoint after the optimizer step and raise `StoppedError`; False if it has not begun."""
        self._stop_error = StoppedError(
            f"stopped by {reason}", exit_code=exit_code, fix="continue with: tuneforge resume RUN"
        )
        return self._has_started

    def run(self) -> Result:
        """Execute the run: prepare data and model, execute the strategy's steps, evaluate, and write the report.

        Ctrl-C and SIGTERM save a checkpoint before they take their usual effect, unless the program has set a handler.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint is saved once training has begun.
            TuneforgeError: The run failed; the run directory keeps what was written, the log and the reason.
        """
        if self._has_run:
            raise UsageError(
                "an Engine runs once",
                why="its model has been adapted or trained, so a second run would start from other weights",
                fix="create another Engine with a new model",
            )
        device_type = device.resolve_device(self.config.device).torch.type
        with save_on_signals(self.stop), exclusive_process_state(device_type, seed=self.config.seed):
            self._has_run = True
            return self._run()

    def _run(self) -> Result:
        """Open the run directory, execute the run, and give the model back whatever happens."""
        process_group = ProcessGroup.from_env()
        with open_run_dir(process_group, self.config.out, resume=self._resume_dir is not None) as run_dir:
            run = None
            try:
                run = self._create_run(run_dir, process_group)
                try:
                    return self._execute(run, run_dir)
                finally:
                    if self._module_flags is not None:
                        self._module_flags.restore(with_modes=run_dir.state != "done")
                    run.close()  # before the run directory is unlocked: a data worker would still hold the lock
            except BaseException as error:
                run_dir.append(LOG, traceback.format_exc())
                is_stop = isinstance(error, StoppedError) or not isinstance(error, Exception)
                state = "done" if run_dir.state == "done" else "stopped" if is_stop else "failed"
                run_dir.write_status(
                    state, reason=str(error) or type(error).__name__, elapsed_s=self._budget.elapsed_s()
                )
                if run is not None:
                    exit_hook = run.hooks.call.run_stopped if is_stop else run.hooks.call.run_failed
                    exit_hook(run=run, error=error)
                raise

    def _execute(self, run: Run, run_dir: RunDir) -> Result:
        """Execute the run from its first hook to its last."""
        checkpoint_name, state = "", None
        if self._resume_dir is not None:
            checkpoint_name, state = find_checkpoint(run, run_dir.path)
        if state is not None:
            restore_counters(run, state)
        run.hooks.call.run_started(run=run)
        run.restoring = self._resume_dir is not None
        _ask_expected_inputs(run)
        run.restoring = False
        _prepare_data(run)
        messages.log_lines(run, messages.format_data(self.config.data.name, run.data))
        messages.log_lines(run, messages.format_augmentations(run))
        messages.log_lines(run, messages.format_batches(num_draws(run), run.batch_size))
        run.engine_state.refits = decide_refit(run)
        resume_state = ResumeState(
            run,
            run_dir,
            Checkpoints(run_dir.path, self.config.checkpoint_s, self.config.keep, self.config.checkpoint_steps),
            stop_request=lambda: self._stop_error,
            components=PhaseComponents(self.config),
        )
        if self._resume_dir is not None:
            if (run_dir.path / MODEL).exists():
                check_data(run.data, read_json(run_dir.path / MODEL, "splits"))
            resume_state.read_requested_steps()
        run.restoring = state is not None
        # A model that is built for a checkpoint loads no weights, so only model.json knows whether it was pretrained.
        self._prepare_model(run, pretrained=None if state is None else read_json(run_dir.path / MODEL)["pretrained"])
        run.restoring = False
        if not run.sharded:
            run.engine_state.forward_writes = ForwardWrites.find(run.model.module, run.example)
        messages.log_lines(run, messages.format_model(self.config.model.name, run.model))
        portability = Portability.of_run(run, self._members)
        messages.log_lines(run, portability.format_notes())
        if state is None:
            run_dir.truncate(dict.fromkeys((STRATEGY_STEPS, METRICS, TIMINGS), 0))
            run_dir.write(MODEL, {**describe_model(run), "not_kept": portability.reason})
            resume_state.begin(build_task_info(run))
        else:
            resume_state.restore(state)
            run.log(resume_state.describe(checkpoint_name))

        run.engine_state.save = resume_state.save
        self._has_started = True
        if self._stop_error is not None:
            resume_state.save(None)
        self._budget.start()
        stop_reason = run_strategy(run, resume_state)

        if not resume_state.completed_steps:
            run.log("note: the strategy yielded no step, so nothing was trained")

        def check_weights(where: str) -> None:
            check_unchanged(run, resume_state.last_snapshot, resume_state.changed_tensors, where)

        refit_steps = functools.partial(_refit, run, resume_state) if run.engine_state.refits else None
        report = write_results(run, run_dir, stop_reason, check_weights, refit_steps)
        portability.write(run_dir)
        run_dir.write_status("done", elapsed_s=self._budget.elapsed_s())
        if run_dir.writable:
            checkpoint.delete_unpinned(run_dir.path)
        messages.log_lines(run, messages.format_checkpoints(resume_state.checkpoints))
        run.hooks.call.run_ended(run=run, report=report)
        check_weights("run_ended; the run directory is complete, the model in memory is not the saved one")
        run.process_group.barrier()  # a rank that exits early would break collectives of the others
        return Result(run_dir.path, report, run.model, tuple(resume_state.completed_steps))

    def _create_run(self, run_dir: RunDir, process_group: ProcessGroup) -> Run:
        """Return the run with its components and its budget, and write `run.json`."""
        log_sink = self._create_log_sink(run_dir)
        run = Run(
            config=self.config,
            run_dir=run_dir.path if process_group.is_main else None,
            process_group=process_group,
            device=device.resolve_device(self.config.device),
            hooks=self._create_hooks(self._observers, log=log_sink),
            log_sink=log_sink,
        )
        run.hooks.add(RegisteredComponent(RunLogger(run_dir), "engine", "the engine's run logger"))
        self._budget = run.engine_state.budget = Budget.load(self.config.budget, run_dir.path)
        if self._resume_dir is None:
            run_dir.write(RUN, describe_run(run, self._members))
        run_dir.write_status("running", elapsed_s=self._budget.previous_s)
        messages.log_lines(run, messages.format_run(run_dir.path, process_group.world_size, shard=self.config.shard))
        messages.log_lines(run, self._changed_settings)
        messages.log_lines(run, self._notes)
        return run

    def _create_hooks(
        self, observers: Iterable[RegisteredComponent] = (), log: Callable[[str], None] = lambda text: None
    ) -> Hooks:
        hooks = Hooks(log)
        for member in (*(member for _, member in self._members), *observers):
            hooks.add(member)
        hooks.add(RegisteredComponent(_DefaultOptimizerStep(), "engine", "the engine's optimizer step"))
        return hooks

    def _create_log_sink(self, run_dir: RunDir) -> Callable[[str], None]:
        def log(text: str) -> None:
            run_dir.append(LOG, f"{time.strftime('%H:%M:%S')} {text}")
            if self._log is not None and run_dir.writable:
                self._log(text)

        return log

    def _prepare_model(self, run: Run, *, pretrained: bool | None = None) -> None:
        """Build and adapt the model; the data must be there, because default components depend on its targets.

        Args:
            run: A run with data.
            pretrained: Whether the weights are pretrained; None takes it from the model builder.
        """
        self._add_default_components(run)
        run.reseed(step=0)  # so that randomly initialized weights depend on the seed alone
        model = _mark_user_frozen(run.hooks.call.model_adapt(run=run, model=None))
        check_trainable(model.module)
        check_extra_states(model.module)
        self._module_flags = ModuleFlags.capture(model.module)
        run.set_model(model if pretrained is None else attrs.evolve(model, pretrained=pretrained))

    def _add_default_components(self, run: Run) -> None:
        """Add the loss, the metrics and the head that fit the targets, where the user chose none."""
        targets = run.data.targets
        if not run.hooks.has_provider("train_step"):
            run.hooks.add(resolve_component("train_step", targets.loss, where="--loss")[0])
        if not self.config.metrics:
            for name in targets.metrics:
                run.hooks.add(resolve_component("evaluate", name, where="--metrics")[0])
        if not any(spec.name == "head" for spec in self.config.adapt):
            run.hooks.add(resolve_component("model_adapt", "head", where="--adapt")[0])
        for hook in ("train_step", "finetune_strategy", "optimizer_step"):
            run.hooks.get_provider(hook)

    def prepare(self) -> Run:
        """Return the run with prepared data and model; nothing is trained or written. `run` can no longer be called."""
        run = Run(
            config=self.config,
            run_dir=None,
            device=device.resolve_device(self.config.device),
            hooks=self._create_hooks(),
        )
        with exclusive_process_state(run.device.torch.type, seed=self.config.seed):
            self._has_run = True  # a model object of the caller has been adapted
            _ask_expected_inputs(run)
            _prepare_data(run)
            self._prepare_model(run)
        return run

    def dry_run(self) -> DryRun:
        """Return the steps that are known before the first is executed; nothing is trained or written."""
        return collect_known_steps(self.prepare(), check_step_type, self._log or (lambda text: None))

    def _choose_by_path(self, data: Any, model: Any) -> tuple[Any, Any]:
        """Return the data source and the model, inferred from what lies at a path, with lines for the log."""
        spec = as_spec(data) if isinstance(data, str) else data
        name = spec.name if isinstance(spec, ComponentSpec) else data
        if is_data_path(name):
            options = spec.options if isinstance(spec, ComponentSpec) else {}
            found = infer_data(name, given=options)
            self._notes.append(found.describe())
            if model is None:
                chosen, why = choose_model(found.kind)
                self._notes += [why] * bool(why)
                model = ComponentSpec(chosen.pop("name"), chosen)
            return ComponentSpec(found.name, {**found.options, **options}), model
        if note := note_shadowed_path(data):  # a command line has said it before it names the source by a ComponentSpec
            self._notes.append(note)
        return data, "digit-cnn" if model is None else model

    def _add_component(self, key: str, value: Any) -> ComponentSpec:
        hook = GROUP_BY_KEY[key]
        repeatable = key in REPEATABLE_COMPONENT_KEYS
        where = self._argument.format("callbacks" if key == "callback" and "--" not in self._argument else key)
        member, spec = resolve_component(hook, value, where=where, repeatable=repeatable)
        self._members.append((hook, member))
        return spec

    def _set_observers(self, observers: Sequence[Any]) -> None:
        self._observers = [resolve_component("callback", each, where="observers")[0] for each in observers]


class _EngineOfFlags(Engine):
    """An engine whose components were chosen by flags or in a file, in whose words its errors speak."""

    _argument = "--{}"


class _DefaultOptimizerStep:
    """The engine's implementation of `optimizer_step`."""

    @hookimpl
    def optimizer_step(self, run: Run) -> bool:
        """Apply the gradients and drop them; the freeze check first records which tensors they must change."""
        freeze_check = run.engine_state.freeze_check
        if freeze_check is not None and freeze_check.unmoved:
            freeze_check.observe(run.model, run.optimization.param_groups())
        run.optimization.step()
        return True


def _add_settings(table: dict[str, Any], member: RegisteredComponent) -> None:
    """Add the settings of the run that a component brings, such as the batch size of a DataLoader.

    `run_settings` must not contradict those of the user; `run_defaults` may.

    Raises:
        UsageError: They do.
    """
    for key, value in getattr(member.component, "run_settings", {}).items():
        if table.setdefault(key, value) != value:
            raise UsageError(
                f"{key} is {table[key]} for the run, and {value} for {member.label}",
                why="only one of them can be used",
                fix=f"give {key} once, or twice the same",
            )
    for key, value in getattr(member.component, "run_defaults", {}).items():
        table.setdefault(key, value)


def _refit(run: Run, resume_state: ResumeState) -> dict[str, Any]:
    """Refit the model; a request to stop ends it, and a resumed run starts it again."""
    state = run.engine_state

    def stop_if_requested(_: Any) -> None:
        stop_error = resume_state.stop_request()
        if run.process_group.all_reduce_any(stop_error is not None)[0]:
            raise stop_error or StoppedError("stopped on another rank", exit_code=143)

    state.is_refit, state.save = True, stop_if_requested
    record = refit(run, resume_state.completed_steps, resume_state.snapshots["start"], resume_state.components)
    state.is_refit = False
    resume_state.last_snapshot = take_snapshot(run, resume_state.last_snapshot)
    return record


def _ask_expected_inputs(run: Run) -> None:
    if run.hooks.has_provider("model_inputs"):
        run.hooks.get_provider("model_inputs")  # raises if there is more than one
        run.expected_inputs = run.hooks.call.model_inputs(run=run)


def _prepare_data(run: Run) -> None:
    run.hooks.get_provider("data_prepare")  # raises if there is none, or more than one
    data = run.hooks.call.data_prepare(run=run)
    notes = (*describe_copies(data), *messages.describe_other_images(run.expected_inputs, data))
    run.set_data(attrs.evolve(data, notes=(*data.notes, *notes)) if notes else data)
    run.engine_state.augment_specs = specs = resolve_augmentations(run.config, data)
    run.engine_state.augmentations = tuple(create_component("augment", spec) for spec in specs)


def _mark_user_frozen(model: Model) -> Model:
    """Return the model with the parameters that the user froze recorded, so that no phase trains them.

    A model may freeze some in its own `train()`, which is called at the start of every epoch.
    """
    before = get_modes(model.module)
    model.module.train()
    set_modes(before)
    user_frozen = [name for name, parameter in model.parameters().items() if not parameter.requires_grad]
    if not user_frozen:
        return model
    sentence = f"{len(user_frozen)} parameter tensor(s) came frozen and stay so: {messages.join_names(user_frozen, 4)}"
    return model.with_change(sentence, user_frozen=user_frozen)
