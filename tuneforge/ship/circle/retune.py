"""One turn of the circle: the champion, old data and what production taught make a challenger, and the gate judges.

A turn has a folder in the store, `STORE/NAME/turns/N/`: the new samples as they were at its beginning, the labels that
did not fit, the run. So a turn can be looked at, and its run resumed, whatever is labelled meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine import tuned
from tuneforge.engine.engine import Engine
from tuneforge.engine.samples.data import Inputs, Split, tensors_of
from tuneforge.engine.state import folder as names
from tuneforge.errors import DataError, FolderError, UsageError
from tuneforge.plugin.steps import Use
from tuneforge.ship.bundles.bundle import BUNDLE
from tuneforge.ship.champion.gate import Rules, Verdict
from tuneforge.ship.champion.promote import promote
from tuneforge.ship.champion.store import Store, store_of, stores_in
from tuneforge.ship.circle.records import Labelled, Records
from tuneforge.ship.circle.suspects import Suspect, sentence, suspects

TURN = "turn"
"""The event that the store's log has for each turn."""

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
        trust: Train also on labels that do not fit their samples, and judge by them.
        to: The forms of the new version; None: those of the champion.
        settings: Of the run, over the champion's, such as `seed` and `device`.
        say: Where sentences for the user go.

    Raises:
        FolderError: The store has no such champion, or its version does not hold what can be tuned.
        DataError: Nothing is labelled, or what is cannot be decoded any more.
    """
    began = time.monotonic()
    place = named(store, name)
    against = place.champion
    if against is None:
        raise FolderError(f"'{place.name}' has no champion", where=str(place.path), fix="tuneforge promote RUN")
    champion = _tunable(place.folder(against))
    labels = records.num_labels()  # those given while the turn goes on are for the next one
    samples = Samples.of(list(records.labelled()), champion.inputs)
    number, folder = _next_folder(place)
    say(f"turn {number}: {len(samples)} labelled samples, {sum(samples.held_out)} of them for the gate alone")
    misfits: list[Suspect] = []
    if not trust:
        misfits = _suspects(champion, samples)
        names.write_json(folder / SUSPECTS, [{"id": samples.ids[each.place], **attrs.asdict(each)} for each in misfits])
        say(sentence(misfits, len(samples)))
    samples.without({each.place for each in misfits}).save(folder / NEW)
    run = _engine(champion, folder, strategy, settings or {}, say).run().folder
    data = tuned.with_data(tuned.load(run)).data
    new, targets = data.further.get("new"), data.targets
    ended = promote(run, store=place.root, name=place.name, to=to, new=new, new_targets=targets, rules=rules, say=say)
    turn = Turn(
        number=number,
        labelled=len(samples),
        held_out=sum(samples.held_out),
        suspects=tuple(misfits),
        version=ended.version,
        against=against,
        verdict=ended.verdict,
        folder=folder,
        seconds=time.monotonic() - began,
    )
    place.note(TURN, **_logged(turn, labels))
    return turn


@attrs.frozen(eq=False)
class Samples:
    """Labelled samples as the inputs contract stores them; what the data source `continued` reads.

    Args:
        tensors: Each (n, ...), by name; a single one is named ''.
        labels: The class of each.
        ids: The request of each.
        held_out: Whether each is for the gate alone.
    """

    tensors: dict[str, Tensor]
    labels: list[str]
    ids: list[str]
    held_out: list[bool]

    @classmethod
    def of(cls, found: Sequence[Labelled], inputs: Inputs) -> Samples:
        """Decode labelled requests.

        Raises:
            DataError: There are none, or one cannot be decoded, or they come out in different shapes.
        """
        if not found:
            raise DataError("nothing is labelled", fix="label some requests (POST /feedback, or the page /review)")
        stored = [tensors_of(inputs.decode(each.exchange.raw)) for each in found]
        if any(stored[0][name].shape != each[name].shape for each in stored for name in stored[0]):
            raise DataError("labelled samples have different shapes", fix="let the inputs' operations give one size")
        return cls(
            {name: torch.stack([each[name] for each in stored]) for name in stored[0]},
            [each.label for each in found],
            [each.exchange.id for each in found],
            [each.held_out for each in found],
        )

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, places: Collection[int]) -> Samples:
        """All but some."""
        kept = [place for place in range(len(self)) if place not in places]
        return Samples(
            {name: tensor[kept] for name, tensor in self.tensors.items()},
            [self.labels[place] for place in kept],
            [self.ids[place] for place in kept],
            [self.held_out[place] for place in kept],
        )

    def split(self, classes: Sequence[str]) -> Split:
        """As a split; targets are places in `classes`."""
        codes = torch.tensor([classes.index(each) for each in self.labels])
        return Split(self.tensors.get("", self.tensors), codes, ids=self.ids)

    def save(self, path: Path) -> None:
        """Write them into a file, whole or not at all."""
        about = {"labels": self.labels, "ids": self.ids, "held_out": self.held_out}
        names.save_tensors({f"stored/{name}": each for name, each in self.tensors.items()}, path, metadata=about)


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


def _suspects(champion: tuned.Tuned, samples: Samples) -> list[Suspect]:
    """Labels that do not fit, by the champion's features and the old samples, which are trusted."""
    old = tuned.with_data(tuned.load(_base(champion))).data
    known = old.targets.labels
    classes = [*known, *sorted(set(samples.labels) - set(known))]
    return suspects(champion.run, old.train, samples.split(classes), classes)


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
