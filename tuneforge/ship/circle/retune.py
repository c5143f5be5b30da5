"""One turn of the circle: the champion, old data and what production taught make a challenger, and the gate judges.

A turn has a folder in the store, `STORE/NAME/turns/N/`: the new samples as they were at its beginning, the labels that
did not fit, the run. So a turn can be looked at, and its run resumed, whatever is labelled meanwhile.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Data, Inputs, Split, tensors_of
from tuneforge.engine.session import predictor as tuned
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.safetensors_io import save_tensors
from tuneforge.errors import DataError, FolderError, UsageError
from tuneforge.exporting.bundle import BUNDLE
from tuneforge.plugin.steps import Use
from tuneforge.ship.champion.gate import Rules, Verdict, refused
from tuneforge.ship.champion.promote import promote
from tuneforge.ship.champion.statistics import fewest_pairs
from tuneforge.ship.champion.store import Store, store_of, stores_in
from tuneforge.ship.circle.records import Labelled, Records
from tuneforge.ship.circle.suspects import Suspect, sentence, suspects
from tuneforge.ship.circle.watch import FEWEST

TURN = "turn"
"""The event that the store's log has for each turn."""

MOST_MISFITS = 0.1
"""Share of labels that may not fit their samples. Of 300 real digits of a changed world, all labelled right, at most
4 % do not seem to; where a fifth are labelled wrong at random, about a fifth do not.
"""

TURNS, NEW, SUSPECTS, RUN = "turns", "new.safetensors", "suspects.json", "run"
_CONTINUED, _WARM = "continued", "warm-start"


@attrs.frozen
class Turn:
    """How a turn ended.

    Args:
        number: Of the turn.
        labelled: Labelled samples, each content once.
        held_out: Those of them that only the gate saw.
        suspects: Labels that do not fit their samples.
        version: The new champion's number; None where the gate refused.
        against: The champion at the beginning.
        verdict: What the gate said.
        folder: Of the turn.
        seconds: It took.
    """

    number: int
    labelled: int
    held_out: int
    suspects: tuple[Suspect, ...]
    version: int | None
    against: int
    verdict: Verdict
    folder: Path
    seconds: float


def retune(
    store: str | Path,
    records: Records,
    *,
    name: str | None = None,
    strategy: Any = "replay",
    rules: Rules | None = None,
    trust: bool = False,
    most_misfits: float = MOST_MISFITS,
    to: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Turn:
    """Tune the champion on the old data and on what got labelled, and promote the result if the gate lets it pass.

    Args:
        store: The store's folder.
        records: Of the server that the champion answers in.
        name: Of the model; None: the only one that the store has.
        strategy: By name, `use(...)`, or what else `Engine` takes.
        rules: Of the gate.
        trust: Train also on labels that do not fit their samples, judge by them, and have as many as there are.
        most_misfits: Share of the labels that may not fit their samples; with more, nothing is trained.
        to: The forms of the new version; None: those of the champion.
        settings: Of the run, over the champion's, such as `seed` and `device`.
        say: Where sentences for the user go.

    Raises:
        FolderError: The store has no such champion, or its version does not hold what can be tuned.
        DataError: Too little is labelled, or what is cannot be decoded any more.
    """
    place = named(store, name)
    rules = rules or Rules()
    turning = _Turning(place, records, strategy, rules, trust, most_misfits, to, settings or {}, say)
    return turning.turn()


@attrs.frozen(eq=False)
class _Turning:
    """A turn while it goes on; the fields are what `retune` is given."""

    place: Store
    records: Records
    strategy: Any
    rules: Rules
    trust: bool
    most_misfits: float
    to: Sequence[str] | None
    settings: Mapping[str, Any]
    say: Callable[[str], None]

    def turn(self) -> Turn:
        """From the labels to the verdict."""
        began, place = time.monotonic(), self.place
        against = place.champion
        if against is None:
            raise FolderError(f"'{place.name}' has no champion", where=str(place.path), fix="tuneforge promote RUN")
        champion = _tunable(place.folder(against))
        labels = self.records.num_labels()  # those given while the turn goes on are for the next one
        samples = Samples.of(list(self.records.labelled()), champion.inputs)
        self._require_enough(samples)
        number, folder = _next_folder(place)
        self.say(f"turn {number}: {len(samples)} labelled samples, {sum(samples.held_out)} of them for the gate alone")
        misfits = [] if self.trust else self._misfits(champion, samples, folder)
        if len(misfits) > self.most_misfits * len(samples):
            verdict, version = self._poisoned(misfits, len(samples), against), None
        else:
            verdict, version = self._challenged(champion, samples.without({each.place for each in misfits}), folder)
        turn = Turn(
            number=number,
            labelled=len(samples),
            held_out=sum(samples.held_out),
            suspects=tuple(misfits),
            version=version,
            against=against,
            verdict=verdict,
            folder=folder,
            seconds=time.monotonic() - began,
        )
        place.note(TURN, **_logged(turn, labels))
        return turn

    def _require_enough(self, samples: Samples) -> None:
        """See that a turn can end well, before anything is made."""
        held, least = sum(samples.held_out), 0 if self.rules.accept_equal else fewest_pairs(self.rules.alpha)
        if held < len(samples) and held >= least:
            return
        more = max(1, math.ceil((least - held) / self.records.held_out)) if self.records.held_out else 1
        raise DataError(
            f"{len(samples)} labelled sample(s) are too few for a turn",
            where=str(self.records.path),
            why=f"{held} of them are held out for the gate, which needs {least} to see any difference, and the others "
            "are to train on",
            fix=f"label about {more} more (POST /feedback, or the page /review)",
        )

    def _misfits(self, champion: tuned.Tuned, samples: Samples, folder: Path) -> list[Suspect]:
        """Labels that do not fit, by the champion's features and the old samples, which are trusted."""
        old = tuned.with_data(tuned.load(_base(champion))).data
        known = old.targets.labels
        classes = [*known, *sorted(set(samples.labels) - set(known))]
        found = suspects(champion.run, old.train, samples.split(classes), classes)
        names.write_json(folder / SUSPECTS, [{"id": samples.ids[each.place], **attrs.asdict(each)} for each in found])
        self.say(sentence(found, len(samples)))
        return found

    def _poisoned(self, misfits: Sequence[Suspect], total: int, against: int) -> Verdict:
        """Refuse labels of which too many do not fit."""
        share, most = (f"{100 * each:.0f} %" for each in (len(misfits) / total, self.most_misfits))
        rule = f"at most {most} of the labels do not fit"
        verdict = refused("labels", f"{sentence(misfits, total)}, and {most} are allowed", challenger=share, rule=rule)
        self.place.note("refused", against=against, verdict=names.finite(verdict.plain()))
        return verdict

    def _challenged(self, champion: tuned.Tuned, samples: Samples, folder: Path) -> tuple[Verdict, int | None]:
        """Tune, and let the gate judge; the number of the new version, if there is one."""
        samples.save(folder / NEW)
        run = _engine(champion, folder, self.strategy, self.settings, self.say).run().folder
        data = tuned.with_data(tuned.load(run)).data
        ended = promote(
            run,
            store=self.place.root,
            name=self.place.name,
            to=self.to or _forms(champion.path),
            new=data.further.get("new"),
            new_targets=data.targets,
            worlds=_worlds(self.place, samples, data),
            rules=self.rules,
            say=self.say,
        )
        return ended.verdict, ended.version


@attrs.frozen(eq=False)
class Samples:
    """Labelled samples as the inputs contract stores them; what the data source `continued` reads.

    Args:
        tensors: Each (n, ...), by name; a single one is named ''.
        labels: The class of each.
        ids: The request of each.
        held_out: Whether each is for the gate alone.
        numbers: How many labels had been given when each was, itself counted.
    """

    tensors: dict[str, Tensor]
    labels: list[str]
    ids: list[str]
    held_out: list[bool]
    numbers: list[int]

    @classmethod
    def of(cls, found: Sequence[Labelled], inputs: Inputs) -> Samples:
        """Decode labelled requests.

        Raises:
            DataError: There are none, or one cannot be decoded, or they come out in different shapes.
        """
        if not found:
            raise DataError("nothing is labelled", fix="label some requests (POST /feedback, or the page /review)")
        stored = [tensors_of(each.exchange.stored(inputs)) for each in found]
        if any(stored[0][name].shape != each[name].shape for each in stored for name in stored[0]):
            raise DataError("labelled samples have different shapes", fix="let the inputs' operations give one size")
        return cls(
            {name: torch.stack([each[name] for each in stored]) for name in stored[0]},
            [each.label for each in found],
            [each.exchange.id for each in found],
            [each.held_out for each in found],
            [each.number for each in found],
        )

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, places: Collection[int]) -> Samples:
        """All but some."""
        return self.take([place for place in range(len(self)) if place not in places])

    def take(self, places: Sequence[int]) -> Samples:
        """Some of them."""
        return Samples(
            {name: tensor[list(places)] for name, tensor in self.tensors.items()},
            [self.labels[place] for place in places],
            [self.ids[place] for place in places],
            [self.held_out[place] for place in places],
            [self.numbers[place] for place in places],
        )

    def split(self, classes: Sequence[str]) -> Split:
        """As a split; targets are places in `classes`."""
        codes = torch.tensor([classes.index(each) for each in self.labels])
        return Split(self.tensors.get("", self.tensors), codes, ids=self.ids)

    def save(self, path: Path) -> None:
        """Write them into a file, whole or not at all."""
        about = {"labels": self.labels, "ids": self.ids, "held_out": self.held_out}
        save_tensors({f"stored/{name}": each for name, each in self.tensors.items()}, path, metadata=about)


def named(root: str | Path, name: str | None) -> Store:
    """The model of that name in a store, or the only one there is.

    Raises:
        FolderError: The store has none of that name, or none at all.
        UsageError: It has several, and none is named.
    """
    if name is not None:
        return store_of(root, name)
    known = stores_in(root)
    if not known:
        raise FolderError(f"there is no model in the store '{root}'", where="--store", fix="tuneforge promote RUN")
    if len(known) > 1:
        listed = ", ".join(each.name for each in known)
        raise UsageError(f"the store has the models {listed}", where="--name", fix="name one of them")
    return known[0]


def _tunable(folder: Path) -> tuned.Tuned:
    """The champion as a run that answers with a class."""
    if not (folder / names.WEIGHTS).is_file():
        raise FolderError(
            f"version {folder.name} of '{folder.parent.name}' holds nothing that can be tuned",
            where=str(folder),
            why="its safetensors form is missing",
            fix="promote the run again with --to onnx --to safetensors",
        )
    found = tuned.load(folder)
    if "class" not in found.targets.describe(torch.zeros(found.targets.size)):
        raise DataError(
            f"'{folder.parent.name}' does not answer with a class",
            why="labels name classes, so there is nothing to learn from them",
            fix="tune again on data of your own: tuneforge run",
        )
    return found


def _forms(folder: Path) -> tuple[str, ...]:
    """The export formats that a version holds."""
    return tuple(names.read_json(folder / BUNDLE)["formats"])


def _base(champion: tuned.Tuned) -> Path:
    """The run or version whose data are the old world: the first of the line."""
    data = champion.run.config.data
    return Path(data.options["run"]) if data.name == _CONTINUED else champion.path.absolute()


def _next_folder(place: Store) -> tuple[int, Path]:
    turns = place.path / TURNS
    turns.mkdir(exist_ok=True)
    number = 1 + max((int(each.name) for each in turns.iterdir() if each.name.isdigit()), default=0)
    (turns / str(number)).mkdir()
    return number, turns / str(number)


def _worlds(place: Store, samples: Samples, data: Data) -> list[Split]:
    """Labelled samples that were validated or judged on and not trained on, one split for each turn that was promoted
    and one for this one: what drift is measured from. Those too few to be a reference go with an older turn's.
    """
    looked = (each for each in (data.val, data.further.get("new")) if each is not None)
    known = {split.id_of(row) for split in looked for row in range(len(split))}
    ends = [line["labels"] for line in place.log() if line["event"] == TURN and line["promoted"] is not None]
    by_turn: dict[int, list[int]] = {}
    for row, (each, number) in enumerate(zip(samples.ids, samples.numbers, strict=True)):
        if f"new/{each}" in known:
            by_turn.setdefault(bisect_left(ends, number), []).append(row)
    worlds: list[list[int]] = []
    rows: list[int] = []
    for turn in sorted(by_turn, reverse=True):
        rows += by_turn[turn]
        if len(rows) >= FEWEST:
            worlds.append(rows)
            rows = []
    return [samples.take(each).split(data.targets.labels) for each in worlds]


def _engine(
    champion: tuned.Tuned, folder: Path, strategy: Any, settings: Mapping[str, Any], say: Callable[[str], None]
) -> Engine:
    """A run as the champion's, but for its data, its start and its strategy."""
    config = champion.run.config
    others = [each for each in config.extensions if each.name != _WARM]
    return Engine(
        data=Use(_CONTINUED, {"run": str(_base(champion)), "new": str((folder / NEW).absolute())}),
        strategy=strategy,
        extensions=[*others, Use(_WARM, {"run": str(champion.path.absolute())})],
        **{name: getattr(config, name) for name in ("model", "adapt", "step", "evaluate", "augment")},
        **{name: getattr(config, name) for name in ("schedule", "optimizer")},
        **{**config.settings(), "out": folder / RUN, **settings},
        say=say,
    )


def _logged(turn: Turn, labels: int) -> dict[str, Any]:
    """What the store's log keeps of a turn; `labels` had been given when it began."""
    return {
        "turn": turn.number,
        "labels": labels,
        "labelled": turn.labelled,
        "held_out": turn.held_out,
        "suspects": len(turn.suspects),
        "against": turn.against,
        "promoted": turn.version,
        "reason": turn.verdict.reason,
        "seconds": round(turn.seconds, 1),
    }
