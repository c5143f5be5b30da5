"""Promotion: a run becomes a bundle, the gate judges it as it would be served, and the store admits it or not."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.engine.data.dataset import Data, Split, Targets
from tuneforge.engine.session.predictor import load
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import PluginError
from tuneforge.exporting import atomic_dir as sealed
from tuneforge.exporting.bundle import BUNDLE, Servable, load_bundle
from tuneforge.exporting.exporter import export, prepared
from tuneforge.exporting.parity import ParityError
from tuneforge.ship.champion.gate import Both, Rules, Verdict, judge, refused, same_contract
from tuneforge.ship.champion.store import INCOMING, Store
from tuneforge.ship.champion.worlds import data_of_bundle, labelled_files, split_of_files

_ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")


@attrs.frozen
class Promotion:
    """How it ended.

    Args:
        verdict: What the gate said.
        name: Of the model.
        version: Its number, where it was promoted.
        against: The champion that it was judged against.
    """

    verdict: Verdict
    name: str
    version: int | None
    against: int | None


def promote(
    run: str | Path,
    *,
    store: str | Path = "models",
    name: str | None = None,
    to: Sequence[str] | None = None,
    data: Any = None,
    model: Any = None,
    old: Split | Both | None = None,
    old_targets: Targets | None = None,
    new: Split | Both | str | Path | None = None,
    new_targets: Targets | None = None,
    worlds: Sequence[Split] = (),
    rules: Rules | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Promotion:
    """Make a run, or a bundle of one, the champion of a name if the gate lets it pass.

    Args:
        run: The folder of a finished run, or of a bundle.
        store: The store's folder.
        name: Of the model; None: what the run's data source is called.
        to: The forms that the version holds, of a run; None: ONNX where its packages are installed and the network can
            be written so, and safetensors.
        data: The run's data, where it was given them as objects.
        model: The module, where the run was given one as an object.
        old: The old world's test split; None: the champion's own, prepared again.
        old_targets: How its targets are read; by default as the champion reads them.
        new: The new world's held-out split, or a folder of its files with one folder a class; None: superiority on the
            old one decides.
        new_targets: Of the new split; by default as the challenger reads them.
        worlds: What production sent, as far as the run did not train on it: drift is measured from it too.
        rules: What the challenger must keep to.
        say: Where sentences for the user go.

    Raises:
        FolderError: The run is not done, or another process is promoting.
        DataError: The data is no longer what the run or the champion was tested on, or there are no new files.
    """
    exams = _Exams(old, old_targets, new, new_targets, rules)
    exams.require_files()
    place = Store(store, name or _name_of(Path(run)))
    with place.locked():
        return _Challenge(place, Path(run), to, data, model, worlds, say).judged(exams)


@attrs.frozen(eq=False)
class _Exams:
    """What a challenger is judged by; the fields are what `promote` is given."""

    old: Split | Both | None
    old_targets: Targets | None
    new: Split | Both | str | Path | None
    new_targets: Targets | None
    rules: Rules | None

    def require_files(self) -> None:
        """See that a folder of new files has some, before anything else is done."""
        if isinstance(self.new, (str, Path)):
            labelled_files(Path(self.new))

    def new_world(self, challenger: Servable) -> Split | Both | None:
        """The new world, as the challenger stores its inputs."""
        if isinstance(self.new, (str, Path)):
            return split_of_files(Path(self.new), challenger.inputs, self.new_targets or challenger.targets)
        return self.new


@attrs.frozen(eq=False)
class _Challenge:
    """A promotion while it goes on, in a store that is locked; the fields are what `promote` is given."""

    place: Store
    run: Path
    to: Sequence[str] | None
    data: Any
    model: Any
    worlds: Sequence[Split]
    say: Callable[[str], None]

    def judged(self, exams: _Exams) -> Promotion:
        """Export the run, let the gate judge, and admit the bundle or clear it away."""
        place, against, incoming = self.place, self.place.champion, self.place.path / INCOMING
        try:
            verdict = self._verdict(exams, incoming, None if against is None else place.servable(against))
        except ParityError as error:
            verdict = refused("parity", f"{error.what}: {error.why}")
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        about = {"run": str(self.run), "verdict": names.finite(verdict.plain())}
        if verdict.promoted:
            return Promotion(verdict, place.name, place.admit(incoming, about), against)
        shutil.rmtree(incoming, ignore_errors=True)
        place.note("refused", against=against, **about)
        return Promotion(verdict, place.name, None, against)

    def _verdict(self, exams: _Exams, incoming: Path, champion: Servable | None) -> Verdict:
        found = self._incoming(incoming)
        challenger = load_bundle(incoming, name=self.place.name, version="challenger")
        challenger.check()
        return judge(
            champion,
            challenger,
            exams.old if exams.old is not None else _old_world(champion, challenger, found),
            exams.new_world(challenger),
            rules=exams.rules,
            old_targets=exams.old_targets,
            new_targets=exams.new_targets,
            used=self.place.times_used,
        )

    def _incoming(self, incoming: Path) -> Data:
        """Write the challenger's bundle beside the versions; returns the data it was tuned and tested on."""
        run = self.run
        if (run / BUNDLE).is_file():
            sealed.verify(run)
            shutil.copytree(run, incoming)
            return data_of_bundle(names.read_json(run / BUNDLE), self.data)
        found = prepared(load(run, model=self.model, device_name="cpu"), self.data)
        given = {"out": incoming, "name": self.place.name, "data": found, "model": self.model, "worlds": self.worlds}
        if self.to is None and all(importlib.util.find_spec(each) for each in _ONNX_NEEDS):
            try:
                export(run, to=("onnx", "safetensors"), **given, say=self.say)
                return found
            except ParityError:
                raise
            except PluginError as error:
                self.say(f"note: {error.what}, so the version holds safetensors alone ({error.why})")
        elif self.to is None:
            self.say("note: without the packages of 'tuneforge[export]' the version holds safetensors alone")
        export(run, to=self.to or ("safetensors",), **given, say=self.say)
        return found


def _name_of(run: Path) -> str:
    """What the run's data source is called: it stays when the model is tuned again."""
    if (run / BUNDLE).is_file():
        config = names.read_json(run / BUNDLE)["run"]["config"]
    else:
        config = names.read_json(run / names.RUN)["config"]
    name = config["data"]["name"]
    return run.absolute().name if "." in name or ":" in name else name.rpartition("/")[2]


def _old_world(champion: Servable | None, challenger: Servable, found: Data) -> Split | Both:
    """The champion's own test split, also as the challenger stores inputs where it does so otherwise."""
    own = challenger.record["fingerprints"]["test"]
    if champion is None or champion.record["fingerprints"]["test"] == own:
        return found.test
    before = data_of_bundle(champion.record).test
    if same_contract(champion.inputs, challenger.inputs):
        return before
    now = data_of_bundle(champion.record, stored_by=challenger.record).test
    same = len(now) == len(before) and all(now.id_of(row) == before.id_of(row) for row in range(len(now)))
    return Both(before, now) if same else before
