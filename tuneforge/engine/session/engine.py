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
from tuneforge.engine.context.distributed import Ranks, opened
from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.build import Parts, part
from tuneforge.engine.loop.diagnosis import probe
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.head_fit import Snapshot, blend, fit
from tuneforge.engine.loop.metric_set import Worst
from tuneforge.engine.loop.train_phase import train
from tuneforge.engine.model import device
from tuneforge.engine.model import fsdp as shards
from tuneforge.engine.model.freezing import whole_state
from tuneforge.engine.model.model import Model
from tuneforge.engine.session import from_objects as given
from tuneforge.engine.session import messages as story
from tuneforge.engine.session.dry_run import Plan, check_ahead, looked_at, planned
from tuneforge.engine.session.resume import Memory, found
from tuneforge.engine.session.run_log import MISTAKES_KEPT, Keeper, brief_of, describe_model, describe_run, mistakes
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage import run_dir as folder
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.engine.storage.run_dir import RunFolder
from tuneforge.engine.storage.safetensors_io import save_tensors, state_of
from tuneforge.errors import PluginError, StoppedError, UsageError
from tuneforge.plugin.config import REPEATABLE, RunConfig, resolve
from tuneforge.plugin.hooks import Hooks, Member, guarded_steps
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.results import Answer
from tuneforge.plugin.steps import Blend, Fit, Phase, Probe, Step, Use

_PAGE = "report-page"


@attrs.frozen(eq=False)
class Result:
    """What a run leaves.

    Args:
        folder: Where everything lies.
        report: The content of `report.json`.
        model: The tuned model.
        steps: Each step with its answer.
    """

    folder: Path
    report: Mapping[str, Any]
    model: Model
    steps: tuple[tuple[Step, Answer], ...]


class Engine:
    """One run, as the command line's `tuneforge run` describes it: every flag is a keyword.

    Where the command line takes a name, Python may also give an instance of a component; for data also arrays, a
    torch `Dataset` or `DataLoader`; for the model also a module; for the strategy also a list of steps or a function
    of the brief.

    Args:
        data: Where samples come from.
        model: What builds the model.
        adapt: What changes it, in order.
        step: What computes the loss; None: what fits the targets.
        evaluate: What computes the figures; empty: what fits the targets.
        strategy: What says what to do.
        schedule: Course of the rate, over what the strategy asks.
        optimizer: Over what the strategy asks.
        extensions: What else takes part.
        augment: Random changes of training inputs, in order.
        say: Where sentences for the user go; None: only into the log.
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
        step: Any = None,
        evaluate: Sequence[Any] = (),
        strategy: Any = "freeze-then-unfreeze",
        schedule: str | Use | None = None,
        optimizer: str | Use | None = None,
        extensions: Sequence[Any] = (),
        augment: Sequence[str | Use] = (),
        say: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        self._say = say
        self._members: list[tuple[str, Member]] = []
        self._watchers: list[Member] = []
        self._ran = False
        self._resumed: Path | None = None
        self._stop: StoppedError | None = None
        self._budget = Budget()
        singles = {"data": data, "model": model, "step": step, "strategy": strategy}
        uses = {name: self._take(name, asked) for name, asked in singles.items() if asked is not None}
        many = {"adapt": adapt, "evaluate": evaluate, "with": extensions}
        lists = {
            name: [self._take(name, asked) for asked in given.listed(asked_all)] for name, asked_all in many.items()
        }
        parts = {"schedule": schedule, "optimizer": optimizer}
        uses |= {name: given.named(asked) for name, asked in parts.items() if asked is not None}
        lists["augment"] = [given.named(asked) for asked in given.listed(augment)]
        given.refuse_twice([member for group, member in self._members if group == "extension"])
        self.config: RunConfig = resolve({**settings, **uses, **lists}, where="Engine")
        if self.config.page and not any(use.name == _PAGE for use in self.config.extensions):
            self._take("with", _PAGE)
        self._check_parts()

    @classmethod
    def of(cls, config: RunConfig, *, say: Callable[[str], None] | None = None, also: Sequence[Any] = ()) -> Engine:
        """The engine of a configuration; `also` are extensions that only watch, and that no file records."""
        chosen = {name: getattr(config, name) for name in _CHOICES}
        engine = cls(**chosen, extensions=config.extensions, **config.settings(), say=say)
        engine._watchers = [given.member("extension", each, where="also")[0] for each in also]
        return engine

    @classmethod
    def resume(
        cls, path: str | Path, *, say: Callable[[str], None] | None = None, also: Sequence[Any] = (), **objects: Any
    ) -> Engine:
        """The engine that goes on with a run that was stopped or killed; its `run` ends as if nothing had happened.

        Args:
            path: The run's folder.
            say: Where sentences for the user go.
            also: Extensions that only watch.
            objects: What the run was given as Python objects, such as `model` and `data`.

        Raises:
            FolderError: The folder holds no run, or one that was given objects which are missing here.
            UsageError: The run is done.
        """
        path = Path(path)
        config = resolve(folder.read_json(path / folder.RUN, "config")["config"], where=str(path / folder.RUN))
        if folder.read_json(path / folder.STATUS, "state")["state"] == "done":
            raise UsageError(f"the run in '{path}' is done", fix=f"see it: tuneforge report {path}")
        chosen = {name: getattr(config, name) for name in _CHOICES} | {"extensions": config.extensions} | objects
        engine = cls(**chosen, **{**config.settings(), "out": path}, say=say)
        engine._watchers = [given.member("extension", each, where="also")[0] for each in also]
        engine._resumed = path
        return engine

    def stop(self, reason: str, *, exit_code: int) -> None:
        """Ask the run to save a checkpoint after the step it is in, and to stop with `StoppedError`."""
        self._stop = StoppedError(f"stopped by {reason}", exit_code=exit_code, fix="go on with: tuneforge resume RUN")

    def run(self) -> Result:
        """Do it: data, model, steps, report.

        Raises:
            TuneforgeError: Something went wrong; the folder keeps what was written, the log and the reason.
        """
        if self._ran:
            raise UsageError(
                "an Engine runs once",
                why="its model has been adapted or tuned, so a second run would not be the same",
                fix="make another Engine, with a fresh model",
            )
        self._ran = True
        ranks = Ranks.joined()
        with (
            opened(ranks, self.config.out, resume=self._resumed is not None) as place,
            torch.random.fork_rng(devices=[]),
        ):
            try:
                return self._run(place, ranks)
            except BaseException as error:
                place.append(folder.LOG, traceback.format_exc())
                stopped = isinstance(error, StoppedError) or not isinstance(error, Exception)
                ended = "done" if place.state == "done" else "stopped" if stopped else "failed"
                place.status(ended, reason=str(error) or type(error).__name__, spent_s=self._budget.seconds())
                raise

    def _run(self, place: RunFolder, ranks: Ranks) -> Result:
        run = self._start(place, ranks)
        try:
            return self._told(run, place)
        finally:
            run.close()  # before the folder is free: a process that decodes ahead holds its lock too

    def _told(self, run: Run, place: RunFolder) -> Result:
        run.hooks.call.run_started(run=run)

        run.hooks.provider("data_prepare")
        run.take_data(run.hooks.call.data_prepare(run=run))
        for line in story.of_data(run.data):
            run.note(line)

        memory = Memory(
            run,
            place,
            Checkpoints(place.path, self.config.checkpoint_s, self.config.keep, self.config.checkpoint_steps),
            stopping=lambda: self._stop,
            parts=Parts(self.config),
        )
        name, state = found(run, place.path) if self._resumed is not None else ("", None)
        run.restoring = state is not None
        self._fill_in(run)
        run.reseed()  # so that fresh weights follow from the seed
        run.take_model(given.with_fixed(run.hooks.call.model_adapt(run=run, model=None)))
        run.restoring = False
        for line in story.of_model(run.model):
            run.note(line)
        if state is None:
            place.cut(dict.fromkeys((folder.STEPS, folder.METRICS, folder.TIMINGS), 0))
            place.write(folder.MODEL, describe_model(run))
            memory.begin(brief_of(run))
        else:
            memory.recall(state)
            run.note(memory.story(name))

        run.save = memory.save
        if self._stop is not None:
            memory.save(None)
        run.budget.start()
        reason = self._converse(run, memory)
        for name, parameter in run.model.parameters().items():
            parameter.requires_grad_(name not in run.model.fixed)  # as it came
        if not memory.done:
            run.note("note: the strategy asked for no step, so nothing was trained")
        report = self._report(run, place, reason)
        place.status("done", spent_s=self._budget.seconds())
        if place.writes:
            checkpoint.clear(place.path)
        if memory.checkpoints.count:
            cost = 1000 * memory.checkpoints.spent_s / memory.checkpoints.count
            run.note(f"checkpoints: {memory.checkpoints.count}, {cost:.0f} ms each")
        run.hooks.call.run_ended(run=run)
        run.ranks.wait()  # none leaves before all are done
        return Result(place.path, report, run.model, tuple(memory.done))

    def _start(self, place: RunFolder, ranks: Ranks) -> Run:
        hooks = Hooks()
        for each in (*(member for _, member in self._members), *self._watchers):
            hooks.add(each)
        hooks.add(Member(_Steps(), "engine", "the engine's own optimizer step"))
        run = Run(
            config=self.config,
            folder=place.path if ranks.leads else None,
            ranks=ranks,
            device=device.choose(self.config.device),
            hooks=hooks,
            say=self._voice(place),
        )
        run.augments = tuple(part("augment", use) for use in self.config.augment)
        hooks.add(Member(Keeper(place), "engine", "the engine's own record"))
        self._budget = run.budget = Budget.found(self.config.budget, place.path)
        if self._resumed is None:
            place.write(folder.RUN, describe_run(run, self._members))
        place.status("running", spent_s=run.budget.before_s)
        run.note(f"run: {place.path}")
        if not ranks.alone:
            run.note(f"ranks: {ranks.size} processes, each with its share of every batch")
        elif self.config.shard:
            run.note("note: one process holds the whole model; --shard splits it among those that torchrun starts")
        return run

    def _fill_in(self, run: Run) -> None:
        """Add what nobody named and the targets ask for: the step, the metrics, and a head of the right size."""
        targets = run.data.targets
        if not run.hooks.provides("train_step"):
            run.hooks.add(given.member("train_step", targets.step, where="--step")[0])
        if not self.config.evaluate:
            for name in targets.metrics:
                run.hooks.add(given.member("evaluate", name, where="--evaluate")[0])
        if not any(use.name == "head" for use in self.config.adapt):
            run.hooks.add(given.member("model_adapt", "head", where="--adapt")[0])
        for hook in ("train_step", "finetune_strategy", "optimizer_step"):
            run.hooks.provider(hook)

    def _converse(self, run: Run, memory: Memory) -> str:
        """The conversation: the strategy says what to do, the engine does it and reports back.

        What was done before a resume is replayed: the strategy is answered from the log, and must ask the same.

        Returns:
            Why it ended, where the strategy or the budget says so; else "".
        """
        member = run.hooks.provider("finetune_strategy")
        assert memory.brief is not None
        asked = run.hooks.call.finetune_strategy(brief=memory.brief)
        plan = asked if isinstance(asked, (list, tuple)) else ()
        for each in plan:
            check_ahead(run, _checked(each, member))
            run.note(f"plan: {story.of_step(each)}")
        steps = guarded_steps(member, asked)
        answer: Answer | None = None
        number = -1
        while True:
            number += 1
            run.budget.done = len(memory.done)
            if number == len(memory.done) and memory.phase is None and (spent := run.budget.spent(run)):
                run.note(f"{spent}, so no further step is taken")
                steps.close()
                return "the budget was spent"
            try:
                step = _checked(steps.send(answer), member)
            except StopIteration as end:
                if end.value:
                    run.note(f"ended: {end.value}")
                return str(end.value or "")
            if number < len(memory.done):
                answer = memory.replayed(number, step)
                continue
            _check_name(step, memory.snapshots, member)
            run.note(story.of_step(step))
            if step.why:
                run.note(f"  because {step.why}")
            resumed, memory.phase = memory.phase, None
            run.planned = tuple(itertools.takewhile(lambda each: isinstance(each, Phase), plan[number + 1 :]))
            answer = _do(run, step, memory, resumed)
            run.ranks.follow(list(whole_state(run.model.module).values()))
            for line in story.of_answer(answer):
                run.note(line)
            memory.finish(step, answer)

    def _report(self, run: Run, place: RunFolder, reason: str) -> dict[str, Any]:
        worst = Worst(MISTAKES_KEPT)
        splits = {"val": evaluate(run, run.data.val, "val"), "test": evaluate(run, run.data.test, "test", worst=worst)}
        splits |= {name: evaluate(run, split, name) for name, split in run.data.further.items()}
        weights = shards.gathered(state_of(run.model.module), keep=place.writes)
        if place.writes:
            save_tensors(weights, place.path / folder.WEIGHTS, metadata={"labels": run.model.labels})
        report: dict[str, Any] = {
            "strategy": run.hooks.provider("finetune_strategy").name,
            "ended": reason,
            "monitor": run.data.targets.monitor,
            "headline": list(run.data.targets.headline),
            "samples": {name: len(split) for name, split in run.data.splits().items()},
            "splits": splits,
        }
        if run.budget.mark is not None:
            report["stopped_by_budget"] = run.budget.mark[0]
        place.write(folder.REPORT, report)
        place.write(folder.MISTAKES, mistakes(run, run.data.test, worst))
        for line in story.of_result(splits, run.data.targets.headline):
            run.note(line)
        return report

    def _take(self, key: str, asked: Any) -> Use:
        group = _GROUPS[key]
        member, use = given.member(group, asked, where=f"--{key}", repeatable=key in REPEATABLE)
        self._members.append((group, member))
        return use

    def _check_parts(self) -> None:
        """Build every part once and look for the device, so that what is wrong is found before a folder is made."""
        device.choose(self.config.device)
        shards.check(self.config)
        named = [("lr_schedule", self.config.schedule), ("optimizer", self.config.optimizer)]
        for group, use in [*named, *(("augment", use) for use in self.config.augment)]:
            if use is not None:
                part(group, use)

    def _voice(self, place: RunFolder) -> Callable[[str], None]:
        def say(text: str) -> None:
            place.append(folder.LOG, f"{time.strftime('%H:%M:%S')} {text}")
            if self._say is not None and place.writes:
                self._say(text)

        return say

    def look(self) -> Run:
        """Data and model as the run would begin with them; nothing is trained or written. No run can follow."""
        self._ran = True  # a model of the caller's has been adapted
        members = (*(each for _, each in self._members), Member(_Steps(), "engine", "the engine's own optimizer step"))
        return looked_at(self.config, members, self._fill_in)

    def plan(self) -> Plan:
        """The steps that are known before any is done: data and model are built, nothing is trained or written."""
        return planned(self.look(), _checked, self._say or (lambda text: None))


class _Steps:
    """The engine's own answer to `optimizer_step`."""

    @hookimpl
    def optimizer_step(self, run: Run) -> bool:
        """Note what the gradients are due to move, apply them and drop them."""
        if run.proof is not None and run.proof.watched:
            run.proof.observe(run.model, run.optimization.groups())
        run.optimization.step()
        return True


_GROUPS = {
    "data": "data_prepare", "model": "model_adapt", "adapt": "model_adapt", "step": "train_step",
    "evaluate": "evaluate", "strategy": "finetune_strategy", "with": "extension",
}  # fmt: skip
_CHOICES = ("data", "model", "adapt", "step", "evaluate", "strategy", "schedule", "optimizer", "augment")
_STEPS: dict[type, Callable[[Run, Any, Memory, dict[str, Any] | None], Answer]] = {
    Phase: lambda run, step, memory, resumed: train(run, step, memory.parts, resumed),
    Fit: lambda run, step, memory, resumed: fit(run, step),
    Probe: lambda run, step, memory, resumed: probe(run, step, memory.parts),
    Blend: lambda run, step, memory, resumed: blend(run, step, memory.snapshots),
}


def _do(run: Run, step: Step, memory: Memory, resumed: dict[str, Any] | None) -> Answer:
    return _STEPS[type(step)](run, step, memory, resumed)


def _checked(step: Any, member: Member) -> Step:
    if type(step) not in _STEPS:
        raise PluginError(
            f"{member.label} asked for {step!r:.80}, which is no step",
            why=f"steps are {', '.join(kind.__name__ for kind in _STEPS)}",
            fix="yield each step by itself" if isinstance(step, (list, tuple)) else "",
        )
    return step  # type: ignore[no-any-return]  # just checked


def _check_name(step: Step, snapshots: Mapping[str, Snapshot], member: Member) -> None:
    if step.name in snapshots:
        raise PluginError(
            f"{member.label} names two steps '{step.name}'",
            why="a step's name is how reports and Blend refer to it; 'start' is taken",
            fix="give each step its own name",
        )
