"""The state that a checkpoint holds for a bit-exact resume, and how it is restored."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.nonfinite import find_nonfinite_tensors
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.loop.phase_progress import PhaseProgress
from tuneforge.engine.loop.weight_average import Snapshot, take_snapshot
from tuneforge.engine.model import fsdp
from tuneforge.engine.model.extra_state import get_extra_states, set_extra_states
from tuneforge.engine.model.module_state import full_state, restore_state
from tuneforge.engine.model.numerics import describe_change, describe_numerics
from tuneforge.engine.model.plain_attributes import AttributeState
from tuneforge.engine.session.rank_states import (
    get_own_state,
    get_rank_states,
    restore_generators,
    restore_rank_buffers,
)
from tuneforge.engine.session.resume_check import check_model, check_plan, check_step
from tuneforge.engine.storage import checkpoint, fault_injection
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.engine.storage.run_files import (
    METRICS,
    MODEL,
    RUN,
    STATUS,
    STRATEGY_STEPS,
    TIMINGS,
    read_json,
    read_jsonl,
)
from tuneforge.engine.storage.snapshot_files import SNAPSHOTS_DIR, SnapshotFiles
from tuneforge.errors import FolderError, StoppedError, UsageError
from tuneforge.plugin.names import format_count, is_object
from tuneforge.plugin.results import AnyStrategyStepResult, TaskInfo
from tuneforge.plugin.serialization import from_json, to_json
from tuneforge.plugin.steps import StrategyStep, WeightAverage

TASK, STRATEGY = "task.json", "strategy.json"
_APPENDED_FILES = (STRATEGY_STEPS, METRICS, TIMINGS)
"""Files that a run appends to. A resumed run truncates them to their size at the checkpoint, so no line repeats."""


@attrs.define(eq=False)
class ResumeState:
    """The progress of the strategy, which is saved together with the run's weights and counters.

    Args:
        run: The run whose weights, counters and component states are saved.
        run_dir: The run directory.
        checkpoints: Saves the checkpoints.
        stop_request: Returns the error to raise once a stop was requested, else None.
        components: Knows the current optimizer.
        task: What the strategy was given; a resumed run gives it the same.
        snapshots: The weights at the start and after strategy steps that a later `WeightAverage` can ask for.
        last_snapshot: The weights at the start, or after the last strategy step.
        changed_tensors: Names of the tensors that the last strategy step changed.
        snapshot_files: Where the snapshots are on disk.
        completed_steps: The completed strategy steps with their results.
        phase_state: In a resumed run, the state of the phase in which the checkpoint was saved, until it continues.
        requested_steps: The strategy steps that were asked for so far, or all of them where the strategy is a list.
        is_plan: True where the strategy is a list, so that `requested_steps` is complete.
        attributes: The plain attributes of the model, from the beginning of this process's part of the run.
        num_restored: How many strategy steps a resumed run has not executed itself.
    """

    run: Run
    run_dir: RunDir
    checkpoints: Checkpoints
    stop_request: Callable[[], StoppedError | None]
    components: PhaseComponents
    task: TaskInfo | None = None
    snapshots: dict[str, Snapshot] = attrs.field(factory=dict)
    last_snapshot: Snapshot = attrs.field(factory=dict)
    changed_tensors: frozenset[str] = frozenset()
    snapshot_files: SnapshotFiles = attrs.field(
        default=attrs.Factory(lambda self: SnapshotFiles(self.run_dir.path / SNAPSHOTS_DIR), takes_self=True)
    )
    completed_steps: list[tuple[StrategyStep, AnyStrategyStepResult]] = attrs.field(factory=list)
    phase_state: dict[str, Any] | None = None
    requested_steps: tuple[StrategyStep, ...] = ()
    is_plan: bool = False
    num_restored: int = 0
    attributes: AttributeState = attrs.field(init=False)

    @property
    def snapshot_names(self) -> tuple[str, ...]:
        """The names that snapshots have so far, whether they are kept or not."""
        return ("start", *(step.name for step, _ in self.completed_steps))

    def begin(self, task: TaskInfo) -> None:
        """Prepare for the first strategy step of a new run."""
        self.task, self.attributes = task, self._watch_attributes()
        self.last_snapshot = take_snapshot(self.run, {})
        self.snapshots = {"start": self.last_snapshot}
        self.run.engine_state.nonfinite_at_start = frozenset(find_nonfinite_tensors(self.last_snapshot))
        self.run_dir.write_text(TASK, to_json(task))

    def _watch_attributes(self) -> AttributeState:
        return AttributeState(self.run.model.module, [member.component for member in self.run.hooks.components])

    def add_step_result(self, step: StrategyStep, result: AnyStrategyStepResult) -> None:
        """Record a completed strategy step."""
        before, self.last_snapshot = self.last_snapshot, take_snapshot(self.run, self.last_snapshot)
        changed = (name for name, tensor in self.last_snapshot.items() if tensor is not before.get(name))
        self.changed_tensors = frozenset(changed)
        self.snapshots[step.name] = self.last_snapshot
        self.completed_steps.append((step, result))
        self._drop_snapshots()
        fault_injection.point("phase-trained")
        self.run_dir.append(STRATEGY_STEPS, f'{{"step": {to_json(step)}, "result": {to_json(result)}}}')
        fault_injection.point("phase-logged")
        self.save(None)
        fault_injection.point("phase-saved")

    def _drop_snapshots(self) -> None:
        """Drop the snapshots for which no later step of a plan asks; a generator may ask for any."""
        if self.is_plan:
            later = self.requested_steps[len(self.completed_steps) :]
            needed = {name for step in later if isinstance(step, WeightAverage) for name in step.snapshots}
            needed |= {"start"} if self.run.engine_state.refits else set()
            self.snapshots = {name: each for name, each in self.snapshots.items() if name in needed}

    def _record_steps(self, steps: tuple[StrategyStep, ...], *, is_plan: bool) -> None:
        self.requested_steps, self.is_plan = steps, is_plan
        self.run_dir.write_text(STRATEGY, to_json({"steps": steps, "is_plan": is_plan}))

    def save(self, progress: PhaseProgress | None) -> None:
        """Save a checkpoint if one is due or a stop was requested.

        Raises:
            StoppedError: A stop was requested, on this rank or another.
        """
        process_group = self.run.process_group
        stop_error = self.stop_request()
        step, other_counters = self.run.step, (self.run.epoch, len(self.completed_steps))
        stopped, due, ends = process_group.all_reduce_any(
            stop_error is not None,
            process_group.is_main and self.checkpoints.is_due(step, other_counters=other_counters),
            bool(self.run.engine_state.end_requests),
        )
        if ends:
            self.run.agree_on_ends()
        if stopped or due:
            state, new_snapshots = self._state(progress), self.snapshot_files.add(self.snapshots)
            if self.run.sharded:
                state, new_snapshots = fsdp.gather_state((state, new_snapshots), keep=process_group.is_main)
            if process_group.is_main:
                self.snapshot_files.write(new_snapshots)
                state["snapshot_files"] = self.snapshot_files.state()
                best = progress is not None and progress.is_best
                self.checkpoints.save(step, state, other_counters=other_counters, best=best)
        if stopped:
            process_group.barrier()
            how = f"continue with: tuneforge resume {shlex.quote(str(self.run_dir.path))}"
            if any(is_object(member.name) for member in self.run.hooks.components):
                how += ", or Engine.resume with the objects of the run"
            stop_error = stop_error or StoppedError("stopped, because another rank was stopped", exit_code=143)
            raise StoppedError(stop_error.what, exit_code=stop_error.exit_code, fix=how)

    def read_requested_steps(self) -> None:
        """Read the steps that the strategy of the stopped run had asked for, completed or not."""
        if (self.run_dir.path / STRATEGY).exists():
            self.requested_steps, self.is_plan = self._read(STRATEGY, "steps", "is_plan")

    def _read(self, name: str, *keys: str) -> Any:
        """Return the plain data of a file, or the values of these keys.

        Raises:
            FolderError: The file is missing or damaged.
        """
        try:
            content = from_json((self.run_dir.path / name).read_text(encoding="utf-8"))
            return tuple(content[key] for key in keys) if keys else content
        except (OSError, ValueError, LookupError, TypeError, UsageError) as error:
            raise FolderError(
                f"cannot read '{name}'",
                where=str(self.run_dir.path),
                why=f"{type(error).__name__}: {error}",
                fix="restore the file, or start another run",
            ) from None

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check that files that a run appends to are as long as they were at the checkpoint.

        Raises:
            FolderError: One is missing or shorter.
        """
        for name, size in sizes.items():
            path = self.run_dir.path / name
            present = path.stat().st_size if path.exists() else 0
            if present < size:
                raise FolderError(
                    f"'{name}' is damaged",
                    where=str(self.run_dir.path),
                    why=f"it has {present} bytes, and had {size} when the checkpoint was saved",
                    fix="restore the file, or start another run",
                )

    def check_plan(self, plan: tuple[StrategyStep, ...]) -> None:
        """Check a strategy that returns a list against that of the stopped run; record that of a new run.

        Raises:
            UsageError: A step differs, is missing or is new.
        """
        if self.is_plan:
            check_plan(self.requested_steps, plan)
        elif not self.requested_steps:
            self._record_steps(plan, is_plan=True)
        self._drop_snapshots()

    def check_next_step(self, number: int, step: StrategyStep | None) -> None:
        """Check the first step that a resumed run executes against that of the stopped run; record every other one.

        Later steps depend on results, which the resumed run computes by itself.

        Args:
            number: Of the step, counted from 0.
            step: What the strategy asks for; None at its end.

        Raises:
            UsageError: They differ, because the strategy's code or options have changed.
        """
        if number == self.num_restored and number < len(self.requested_steps):
            check_step(number + 1, self.requested_steps[number], step)
        elif step is not None and not self.is_plan:
            self._record_steps((*self.requested_steps[:number], step), is_plan=False)

    def replay_step(self, number: int, step: StrategyStep) -> AnyStrategyStepResult:
        """Return the recorded result of strategy step `number`, counted from 0.

        Raises:
            UsageError: The strategy yields another step than before, because its code or options have changed.
        """
        before, result = self.completed_steps[number]
        check_step(number + 1, before, step)
        return result

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, and truncate the files that grow to their size at that time.

        What `restore_counters` restores is there already.
        """
        run = self.run
        check_model(run.model, read_json(self.run_dir.path / MODEL, "modules", "frozen_by_user"), state["model"])
        self._check_sizes(state["offsets"])
        self.attributes = self._watch_attributes()
        own_state = get_own_state(run, state["ranks"])
        self.attributes.restore(own_state["attributes"])
        self.run_dir.truncate(state["offsets"])
        run.process_group.barrier()  # the other ranks read the files, which rank 0 truncates
        if run.sharded:
            state = fsdp.scatter_state(state, run.model.parameters(), run.device.torch)
            for key, shards in state["components"].items():
                run.engine_state.component_states[key].update(shards)
        restore_state(run.model.module, state["model"])
        restore_rank_buffers(run, state["ranks"])
        set_extra_states(run.model.module, state["extra_states"])
        run.optimization.pending_state = state["optimizer"]
        self.components.current_optimizer = state["optimizer_part"]
        engine_state = run.engine_state
        engine_state.end_requests = state["end_requests"]
        engine_state.micro_batch_size, engine_state.eval_batch_size = state["micro_batch"], state["eval_batch"]
        engine_state.budget.previous_s = max(engine_state.budget.previous_s, state["elapsed_s"])
        torch.set_rng_state(state["random"].cpu())
        restore_generators(own_state)
        self.snapshots, self.snapshot_files, self.phase_state = (
            state[key] for key in ("snapshots", "snapshot_files", "phase")
        )
        engine_state.nonfinite_at_start = frozenset(state["nonfinite_at_start"])
        if self.phase_state is None:
            self.last_snapshot = take_snapshot(run, next(reversed(self.snapshots.values()), {}))
            self.changed_tensors = frozenset(state["changed_tensors"])
        else:
            self.last_snapshot = next(reversed(self.snapshots.values()), {})
        self.task = self._read(TASK)
        for line in read_jsonl(self.run_dir.path / STRATEGY_STEPS):
            pair = [from_json(json.dumps(line.get(key))) for key in ("step", "result")]
            self.completed_steps.append((pair[0], pair[1]))
        self.num_restored = len(self.completed_steps)
        self.checkpoints.last_counters = (run.step, run.epoch, self.num_restored)

    def describe(self, name: str) -> str:
        """Return a line that says where the run continues from checkpoint `name`."""
        num_completed = len(self.completed_steps)
        if self.phase_state is not None:
            position = f"in strategy step {num_completed + 1}"
        else:
            position = f"after {format_count(num_completed, 'strategy step')}"
        return f"resumed from checkpoint '{name}': {position}, {format_count(self.run.step, 'optimizer step')} done"

    def _state(self, progress: PhaseProgress | None) -> dict[str, Any]:
        run, engine_state = self.run, self.run.engine_state
        return {
            "model": full_state(run.model.module),
            "ranks": get_rank_states(run, self.attributes.state(), progress),
            "extra_states": get_extra_states(run.model.module),
            "optimizer": run.optimization.state(run.model),
            "optimizer_part": self.components.current_optimizer,
            "components": engine_state.component_states,
            "end_requests": engine_state.end_requests,
            "history": run.history,
            "step": run.step,
            "micro_batch": engine_state.micro_batch_size,
            "eval_batch": engine_state.eval_batch_size,
            "epoch": run.epoch,
            "elapsed_s": engine_state.budget.elapsed_s(),
            "random": torch.get_rng_state(),
            "changed_tensors": sorted(self.changed_tensors),
            "nonfinite_at_start": sorted(engine_state.nonfinite_at_start),
            "phase": None if progress is None else progress.state(run),
            "offsets": self.run_dir.offsets(_APPENDED_FILES),
        }


def find_checkpoint(run: Run, path: Path) -> tuple[str, dict[str, Any] | None]:
    """Return the name and the state of the newest complete checkpoint; `("", None)` if the run has to start again.

    Damaged checkpoints, and changes of the environment that affect the result, are logged.
    """
    newest, state, skipped = checkpoint.load_latest(path, torch.device("cpu") if run.sharded else run.device.torch)
    run.process_group.barrier()  # rank 0 deletes old checkpoints, so every rank has to read first
    for why in skipped:
        run.log(f"warning: {why}")
    if newest is None:
        run.log("no complete checkpoint found: starting from the beginning")
    before, now = read_json(path / RUN, "environment")["environment"], describe_numerics(run.device.torch)
    changed = [describe_change(name, before.get(name), each) for name, each in now.items() if before.get(name) != each]
    if changed:
        run.log(f"warning: results may differ in the last bits, because the environment changed: {', '.join(changed)}")
    return ("", None) if newest is None else (newest.name, state)


def restore_counters(run: Run, state: Mapping[str, Any]) -> None:
    """Restore what hooks read before there is a model: the counters, the history and the state of components."""
    run.resumed = True
    run.step, run.epoch, run.history = state["step"], state["epoch"], state["history"]
    run.engine_state.component_states = state["components"]


def find_resumable(runs: Path) -> list[Path]:
    """Return the run directories below `runs` that are neither done nor running, the newest last."""
    paths = [path for path in runs.glob("*") if (path / RUN).exists() and _is_resumable(path)]
    return sorted(paths, key=lambda path: (path / STATUS).stat().st_mtime)


def _is_resumable(path: Path) -> bool:
    try:
        if read_json(path / STATUS)["state"] == "done":
            return False
        with RunDir(path, resume=True):
            return True
    except FolderError:  # in use, or incomplete
        return False
