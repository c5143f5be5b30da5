"""`lwf` and `replay`: the term that the paper gives, a teacher that leaves no trace, and old classes that are kept."""

import attrs
import pytest
import torch
from tiny import TinyNet, blobs, tiny_data, tiny_net
from torch.nn import functional as F

import tuneforge as tf
from tuneforge.builtin.strategies.continual import LwF, Replay
from tuneforge.engine.storage import fault_injection as faults


def knowing(net, *labels):
    return tf.Model.from_module(net, head="head", labels=labels)


class Judge:
    """Computes the loss by hand at each step, from the formula and a teacher of its own."""

    def __init__(self, start, old, *, strength, temperature):
        self.teacher = TinyNet().eval()
        self.teacher.load_state_dict(start)
        self.old, self.strength, self.temperature = old, strength, temperature
        self.found, self.expected, self.terms = [], [], []

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        loss, outputs = yield
        with torch.no_grad():
            taught = F.softmax(self.teacher(batch.inputs)[:, self.old] / self.temperature, 1)
            said = F.softmax(outputs.detach()[:, self.old] / self.temperature, 1)
            self.terms.append(float(-(taught * said.log()).sum(1).mean()))
            plain = float(F.cross_entropy(outputs, batch.targets))
        self.found.append(float(loss.detach()))
        self.expected.append(plain + self.strength * self.terms[-1])
        return loss, outputs


def start_of(model, tune):
    """The weights that a run begins with, its head fitted to the classes."""
    kept = {}

    class Notes:
        @tf.hookimpl
        def phase_started(self, run):
            kept.update({name: each.clone() for name, each in run.model.module.state_dict().items()})

    tune([tf.Phase("one", steps=1)], model=model, callbacks=[Notes()])
    return kept


def test_lwf_adds_the_distillation_term_of_the_formula(tune):
    start = start_of(knowing(tiny_net(), "b", "a", "z"), tune)
    judge = Judge(start, [0, 1], strength=3.0, temperature=2.5)
    strategy = LwF(head_epochs=1, epochs=2, lr=0.01, strength=3.0, temperature=2.5)
    result = tune(strategy, model=knowing(tiny_net(), "b", "a", "z"), callbacks=[judge])
    assert [step.name for step, _ in result.strategy_steps] == ["head", "all"]
    assert judge.found == pytest.approx(judge.expected, rel=1e-5)
    assert max(judge.terms) > min(judge.terms) > 0


def test_the_teacher_leaves_no_trace(tune):
    """Norms, dropout and the generators are as without it: with strength 0 the weights are equal bit-identically."""
    strategy = LwF(head_epochs=1, epochs=2, strength=0.0)
    result = tune(strategy, model=knowing(tiny_net(), "a", "b", "z"))
    alone = tune([step for step, _ in result.strategy_steps], model=knowing(tiny_net(), "a", "b", "z"))
    found, expected = (each.model.module.state_dict() for each in (result, alone))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_random_rows_all_layers_train_at_once(tune):
    result = tune(LwF(epochs=1), model=knowing(tiny_net(), "a", "b", "c"))
    assert [step.name for step, _ in result.strategy_steps] == ["all"]


def test_lwf_refuses_a_model_that_knows_none_of_the_classes(tune):
    with pytest.raises(tf.SelectorError, match="knows none of the classes"):
        tune(LwF(epochs=1), model=knowing(tiny_net(), "x", "y", "z"))


def test_lwf_killed_in_the_middle_goes_on_to_the_same_bytes(tune, tmp_path, monkeypatch):
    strategy = LwF(head_epochs=1, epochs=2, lr=0.01)
    net = lambda: knowing(tiny_net(), "a", "b", "z")  # noqa: E731
    whole = (tune(strategy, model=net()).run_dir / "model.safetensors").read_bytes()

    class Killed(BaseException):
        pass

    for at in (0, 8, 13):
        passed = iter(range(at))

        def hook(name, passed=passed):
            if name == "step-saved" and next(passed, None) is None:
                raise Killed

        path = tmp_path / f"killed{at}"
        monkeypatch.setattr(faults, "hook", hook)
        with pytest.raises(Killed):
            tf.Engine(data=tiny_data(), model=net(), batch_size=16, page=False, strategy=strategy, out=path,
                      checkpoint_s=0.0).run()  # fmt: skip
        monkeypatch.setattr(faults, "hook", None)
        tf.Engine.resume(path, data=tiny_data(), model=net()).run()
        assert (path / "model.safetensors").read_bytes() == whole


def only(split, *classes):
    return split.subset(torch.isin(split.targets, torch.tensor(classes)).nonzero().flatten())


@pytest.fixture
def learnt(tune):
    """The tiny network, tuned on the classes `a` and `b` alone."""
    net, data = tiny_net(), tiny_data()
    old = attrs.evolve(data, train=only(data.train, 0, 1), val=only(data.val, 0, 1))
    tune([tf.Phase("all", epochs=20, lr=0.01)], model=knowing(net, "a", "b", "c"), data=old)
    return net


def recalls(result):
    rows = result.report["splits"]["test"]["per_class"]
    return {name: row["recall"] for name, row in rows.items()}


def copy_of(net):
    fresh = tiny_net()
    fresh.load_state_dict(net.state_dict())
    return knowing(fresh, "a", "b", "z")


def test_lwf_and_replay_prevent_catastrophic_forgetting(tune, learnt):
    data = tiny_data()
    new = attrs.evolve(data, train=only(data.train, 2))
    mixed = attrs.evolve(data, sample_groups={"old": (data.train.targets < 2).nonzero().flatten()})
    rest = {"epochs": 30, "lr": 0.01, "restore_best": False}
    plain = recalls(tune(tf.use("full", **rest), model=copy_of(learnt), data=new))
    distilled = recalls(tune(LwF(strength=10.0, **rest), model=copy_of(learnt), data=new))
    replayed = recalls(tune(Replay(share=0.3, **rest), model=copy_of(learnt), data=mixed))
    old = [each["a"] + each["b"] for each in (plain, distilled, replayed)]
    assert old[0] + 0.3 < old[1]
    assert old[2] > 1.5
    assert min(each["c"] for each in (plain, distilled, replayed)) > 0.5


class Drawn:
    """Notes the rows of the training split that each step saw."""

    def __init__(self):
        self.indices = []

    @tf.hookimpl(wrapper=True)
    def train_step(self, batch):
        self.indices += batch.indices.tolist()
        return (yield)


def test_replay_draws_its_fraction_of_old_samples(tune):
    drawn = Drawn()
    data = attrs.evolve(tiny_data(), train=blobs(100, seed=1), sample_groups={"old": torch.arange(40)})
    tune(Replay(epochs=1, share=0.25), data=data, callbacks=[drawn])
    assert len(drawn.indices) == 100
    assert sum(row < 40 for row in drawn.indices) == 25


def test_replay_names_the_missing_sample_group(tune):
    with pytest.raises(tf.DataError, match="mixes sample group 'old', which the data does not have"):
        tune(Replay(epochs=1))
