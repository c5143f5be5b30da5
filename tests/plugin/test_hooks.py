import pytest

import tuneforge as tf
from tuneforge.plugin.hooks import Hooks, RegisteredComponent, iterate_strategy


def member(component, name="x"):
    return RegisteredComponent(component, name, f"component '{name}' of some-pkg 1.0")


def hooks(*components):
    made = Hooks()
    for index, component in enumerate(components):
        made.add(member(component, f"c{index}"))
    return made


class Step:
    def __init__(self, answer):
        self.answer = answer

    @tf.hookimpl
    def train_step(self, run, batch):
        return self.answer


def test_two_providers_are_an_error_that_names_both():
    with pytest.raises(tf.PluginError, match="c0.*c1"):
        hooks(Step(1), Step(2)).get_provider("train_step")


def test_no_provider_is_an_error():
    with pytest.raises(tf.PluginError, match="no component provides"):
        hooks().get_provider("train_step")


def test_a_wrapper_sees_and_changes_the_result():
    class Twice:
        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            result = yield
            return result * 2

    assert hooks(Step(3), Twice()).call.train_step(run=None, batch=None) == 6


def test_a_wrapper_that_does_not_return_the_result_is_named():
    class Loses:
        @tf.hookimpl(wrapper=True)
        def train_step(self):
            yield

    with pytest.raises(tf.PluginError, match="c1.*lost the result"):
        hooks(Step(3), Loses()).call.train_step(run=None, batch=None)


def test_a_wrapper_that_yields_a_value_is_named():
    class Swallowed:
        @tf.hookimpl(wrapper=True)
        def finetune_strategy(self):
            yield tf.Phase("x", epochs=1)

    class Strategy:
        @tf.hookimpl
        def finetune_strategy(self):
            return []

    with pytest.raises(tf.PluginError, match="yields a value"):
        hooks(Strategy(), Swallowed()).call.finetune_strategy(task=None)


def test_a_misspelled_hook_is_refused_at_registration():
    class Misspelt:
        @tf.hookimpl
        def train_stop(self, run, batch):
            return None

    with pytest.raises(tf.PluginLoadError, match="did you mean 'train_step'"):
        hooks(Misspelt())


@pytest.mark.parametrize(
    "source", ["def train_step(self, run, batch, extra): ...", "def train_step(self, run, batch=None): ..."]
)
def test_a_parameter_that_is_never_passed_is_refused_at_registration(source):
    namespace = {}
    exec(source, namespace)
    made = type("Bad", (), {"train_step": tf.hookimpl(namespace["train_step"])})()
    with pytest.raises(tf.PluginLoadError, match="never be passed"):
        hooks(made)


def test_a_failed_component_leaves_no_hook_behind():
    class HalfBad:
        @tf.hookimpl
        def epoch_ended(self, run):
            raise AssertionError("must not be called")

        @tf.hookimpl
        def zzz(self):
            return None

    made = hooks(Step(1))
    with pytest.raises(tf.PluginLoadError):
        made.add(member(HalfBad()))
    made.call.epoch_ended(run=None)
    assert [each.name for each in made.components] == ["c0"]


def test_registration_reads_no_property():
    class Lazy:
        @property
        def expensive(self):
            raise AssertionError("ran a property")

        @tf.hookimpl
        def train_step(self):
            return 5

    assert hooks(Lazy()).call.train_step(run=None, batch=None) == 5


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(1)])
def test_every_error_of_a_plugin_names_the_plugin(error):
    class Raises:
        @tf.hookimpl
        def train_step(self):
            raise error

    with pytest.raises(tf.PluginError, match="some-pkg 1.0 failed in train_step"):
        hooks(Raises()).call.train_step(run=None, batch=None)


def test_errors_of_tuneforge_are_not_wrapped():
    class Raises:
        @tf.hookimpl
        def train_step(self):
            raise tf.DataError("mine")

    with pytest.raises(tf.DataError, match="mine"):
        hooks(Raises()).call.train_step(run=None, batch=None)


class Letters(str):
    """What stands for a model: it has the method by which a model is told from a module."""

    def with_head(self):
        raise NotImplementedError


class Adds:
    def __init__(self, letter):
        self.letter = letter

    @tf.hookimpl
    def model_adapt(self, model):
        return Letters((model or "") + self.letter)


def test_models_are_adapted_in_the_given_order_and_a_wrapper_runs_once():
    seen = []

    class Watches:
        @tf.hookimpl(wrapper=True)
        def model_adapt(self, run, model):
            seen.append(model)
            result = yield
            return result

    assert hooks(Adds("a"), Watches(), Adds("b"), Adds("c")).call.model_adapt(run=None, model=None) == "abc"
    assert seen == [None]


def test_an_adapter_that_returns_no_model_is_named():
    class Forgets:
        @tf.hookimpl
        def model_adapt(self, model):
            return None

    with pytest.raises(tf.PluginError, match="c1.*returned no model"):
        hooks(Adds("a"), Forgets()).call.model_adapt(run=None, model=None)


class Figures:
    def __init__(self, **values):
        self.values = values

    @tf.hookimpl
    def evaluate(self, run):
        return self

    def update(self, outputs, targets):
        self.values = {name: value + 1 for name, value in self.values.items()}

    def compute(self):
        return self.values


def test_values_of_all_metrics_are_merged():
    merged = hooks(Figures(a=0), Figures(b=1)).call.evaluate(run=None)
    merged.update(None, None)
    assert merged.compute() == {"a": 1, "b": 2}


def test_a_metric_of_two_components_names_both():
    with pytest.raises(tf.PluginError, match="c0.*c1"):
        hooks(Figures(a=0), Figures(a=0)).call.evaluate(run=None).compute()


def test_a_strategy_whose_body_raises_is_named():
    def steps():
        yield tf.Phase("x", epochs=1)
        raise KeyError("recall")

    driven = iterate_strategy(member(object()), steps())
    next(driven)
    with pytest.raises(tf.PluginError, match="failed in finetune_strategy"):
        driven.send("answer")


def test_a_generator_that_returns_its_steps_says_so():
    def steps():
        if False:
            yield
        return [tf.Phase("x", epochs=1)]

    with pytest.raises(tf.PluginError, match="also yields"):
        next(iterate_strategy(member(object()), steps()))


def test_results_reach_the_strategy():
    heard = []

    def steps():
        heard.append((yield "first"))
        heard.append((yield "second"))

    driven = iterate_strategy(member(object()), steps())
    assert driven.send(None) == "first"
    assert driven.send("a") == "second"
    with pytest.raises(StopIteration):
        driven.send("b")
    assert heard == ["a", "b"]


def test_a_yield_from_a_list_is_an_error_that_suggests_a_loop():
    def asked():
        yield from [1, 2]

    steps = iterate_strategy(member(object()), asked())
    assert next(steps) == 1
    with pytest.raises(tf.PluginError, match=r"`yield from` something that takes no answers.*loop instead"):
        steps.send("report")


def test_a_closed_strategy_cleans_up_and_an_error_then_names_it():
    closed = []

    def tidy():
        try:
            yield "first"
        finally:
            closed.append(True)

    def careless():
        try:
            yield "first"
        finally:
            raise KeyError("lost")

    steps = iterate_strategy(member(object()), tidy())
    next(steps)
    steps.close()
    assert closed == [True]
    steps = iterate_strategy(member(object()), careless())
    next(steps)
    with pytest.raises(tf.PluginError, match="failed in finetune_strategy"):
        steps.close()
