"""Plan files: what is written reads back, runs the same, and is refused with file, step and key where it is wrong."""

import tomllib

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tuneforge as tf
from tuneforge.builtin.strategies.plan_file import STEP_CLASS_BY_KIND, format_plan, read_plan, step_to_dict

EVERYTHING = [
    tf.Diagnosis("look", measure="lrs", train=["head", "!norms"], batches=2, by="tensor", why="who knows"),
    tf.HeadFit("fit", l2=0.1, why="it is cheap"),
    tf.Phase(
        "all", train=("all", "!re:bias$"), epochs=3, lr=1 / 3, lr_scales={"second": 2.0, "head.*": 0.5, "first": 0.0},
        layer_decay=0.7, schedule=tf.use("step", milestones=(0.25, 0.5), gamma=0.3), optimizer="sgd", weight_decay=0.1,
        patience=2, monitor="loss", monitor_mode="min", min_delta=1e-4, restore_best=True, batchnorm_stats="updating",
        class_weights={"a": 1.5, "a b": 2}, sampling="balanced",
    ),
    tf.Phase(
        "steps", train="head", steps=7, optimizer=tf.use("sgd", momentum=0.9), class_weights="balanced",
        mixture_weights={"old": 0.25, "a b": 0.5}, why="some said so",
    ),
    tf.WeightAverage(
        "mix", snapshots=["start", "all", "steps"], weights=[0.5], monitor="loss", monitor_mode="min", why="both"
    ),
    tf.WeightAverage("back", snapshots=["fit"]),
]  # fmt: skip


def name_of(step):
    return step.name


def written(path, steps, **options):
    path.write_text(format_plan(steps, heading=["a plan"], describe=name_of, **options), encoding="utf-8")
    return path


def test_a_plan_reads_back_as_it_was_written(tmp_path):
    found = read_plan(written(tmp_path / "plan.toml", EVERYTHING))
    assert found == EVERYTHING
    assert list(found[2].lr_scales) == list(EVERYTHING[2].lr_scales)  # a later factor beats an earlier one


def test_every_field_of_every_step_is_covered_here():
    seen = {kind: set() for kind in STEP_CLASS_BY_KIND}
    for step in EVERYTHING:
        entry = step_to_dict(step)
        seen[entry.pop("kind")] |= {key.replace("-", "_") for key in entry}
    assert seen == {kind: {field.name for field in attrs.fields(cls)} for kind, cls in STEP_CLASS_BY_KIND.items()}


@settings(max_examples=200, deadline=None)
@given(
    name=st.text(min_size=1), selector=st.text(min_size=1), lr=st.floats(1e-30, 1e30),
    factors=st.dictionaries(st.text(), st.floats(0, 1e30)), option=st.none() | st.text() | st.floats(allow_nan=False),
)  # fmt: skip
def test_any_text_and_any_number_reads_back(tmp_path_factory, name, selector, lr, factors, option):
    step = tf.Phase(name, train=selector, epochs=1, lr=lr, lr_scales=factors, schedule=tf.use("x", some_option=option))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    if name == "start":
        return
    (found,) = read_plan(written(path, [step]))
    option = "none" if option is None else option
    assert found == attrs.evolve(step, schedule=tf.use("x", some_option=option))


def test_keys_may_have_dashes_or_underscores_and_a_table_may_be_on_one_line(tmp_path):
    (tmp_path / "plan.toml").write_text(
        '[[step]]\nkind = "phase"\nname = "a"\nepochs = 1\nrestore_best = true\nlayer-decay = 0.5\n'
        'schedule = {name = "one-cycle", pct-start = 0.2}\n'
    )
    expected = tf.Phase("a", epochs=1, restore_best=True, layer_decay=0.5, schedule=tf.use("one-cycle", pct_start=0.2))
    assert read_plan(tmp_path / "plan.toml") == [expected]


HEAD = '[[step]]\nkind = "phase"\nname = "a"\nepochs = 1\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["lists no steps", "[[step]]"]),
        ('[step]\nkind = "head-fit"\nname = "a"\n', ["lists no steps", "[[step]]"]),
        ("[[step]\n", ["is not TOML", "line 1"]),
        ("[[stpe]]\n", ["no key 'stpe'", "did you mean 'step'"]),
        ("seed = 3\n" + HEAD, ["no key 'seed'", "--config"]),
        (
            '[[step]]\nname = "a"\n',
            ["step 1 'a'", "needs the key 'kind'", "phase, head-fit, diagnosis, weight-average"],
        ),
        ('[[step]]\nkind = "phas"\nname = "a"\n', ["step 1 'a'", "'phas'", "did you mean 'phase'"]),
        ('[[step]]\nkind = ["head-fit"]\nname = "a"\n', ["step 1 'a'", "['head-fit']"]),
        ('[[step]]\nkind = "head-fit"\n', ["step 1", "needs the key 'name'"]),
        (HEAD + '[[step]]\nkind = "weight-average"\nname = "b"\n', ["step 2 'b'", "needs the key 'snapshots'"]),
        (HEAD + "epoch = 2\n", ["step 1 'a'", "no key 'epoch'", "did you mean 'epochs'"]),
        (HEAD + "restore-bets = true\n", ["no key 'restore-bets'", "did you mean 'restore-best'"]),
        (HEAD + "steps = 3\n", ["step 1 'a'", "epochs or steps"]),
        (HEAD + 'lr = "fast"\n', ["step 1 'a'", "lr must be a number", "'fast'"]),
        (HEAD + "lr = -1.0\n", ["lr must be a number of at least 0"]),
        (HEAD + 'restore-best = "yes"\n', ["restore_best must be True or False"]),
        (HEAD + "train = 3\n", ["'train'", "a selector, or a list of selectors", "3"]),
        (HEAD + "train = []\n", ["'train'", "a list of selectors"]),
        (HEAD + "schedule = 3\n", ["'schedule'", "a name, or a table with a name"]),
        (HEAD + "schedule = {pct-start = 0.2}\n", ["'schedule'", "a table with a name"]),
        (HEAD + "monitor = 3\n", ["'monitor'", "text"]),
        (HEAD + 'batchnorm-stats = "froze"\n', ["batchnorm_stats must be 'frozen', 'all-frozen' or 'updating'"]),
        (HEAD + 'class-weights = "balance"\n', ["'class-weights'", "balanced"]),
        (HEAD + 'lr-scales = {head = "much"}\n', ["'lr-scales'", "a table of numbers"]),
        ('[[step]]\nkind = "diagnosis"\nname = "a"\nbatches = 2.5\n', ["'batches'", "whole number"]),
        ('[[step]]\nkind = "diagnosis"\nname = "a"\nmeasure = "gradient"\n', ["measure must be one of gradients"]),
        (HEAD + HEAD, ["step 2 'a'", "the name 'a' is taken"]),
        (HEAD.replace('"a"', '"start"'), ["the name 'start' is taken"]),
        (
            HEAD + '[[step]]\nkind = "weight-average"\nname = "b"\nsnapshots = ["strat", "a"]\n',
            ["'strat'", "mean 'start'"],
        ),
        ('[[step]]\nkind = "weight-average"\nname = "b"\nsnapshots = ["a"]\n' + HEAD, ["no earlier step 'a'"]),
        (
            HEAD + '[[step]]\nkind = "weight-average"\nname = "b"\nsnapshots = "start"\n',
            ["'snapshots'", "a list of names"],
        ),
        (HEAD + '[[step]]\nkind = "weight-average"\nname = "b"\nsnapshots = ["a"]\nweights = [2.0]\n', ["from 0 to 1"]),
    ],
)
def test_errors_name_file_step_and_key(tmp_path, content, words):
    path = tmp_path / "plan.toml"
    path.write_text(content)
    with pytest.raises(tf.UsageError) as caught:
        read_plan(path)
    for word in (*words, str(path)):
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(tf.UsageError, match=r"cannot read the plan.*none\.toml.*--strategy\.path"):
        read_plan(tmp_path / "none.toml")


SAME = ("model.safetensors", "metrics.jsonl", "steps.jsonl")
STATIC = [
    "full", "head-only", "freeze-then-unfreeze", "gradual-unfreeze", "layer-decay", "lp-ft", "wise-ft", "norm-only",
    "bias-only",
]  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_the_plan_of_a_strategy_runs_as_the_strategy_does(tune, tmp_path, name):
    from tiny import tiny_data, tiny_net

    options = {} if name == "gradual-unfreeze" else {"patience": 1}
    strategy = tf.use(name, epochs=2, **({} if name == "wise-ft" else options))
    plan = tf.Engine(
        strategy=strategy, data=tiny_data(), model=tiny_net(), batch_size=16, out=tmp_path / "never"
    ).dry_run()
    assert not plan.depends_on_results
    assert not (tmp_path / "never").exists()
    path = written(tmp_path / "plan.toml", plan.strategy_steps, refit=plan.refit)
    one, two = tune(strategy), tune(tf.use("plan-file", path=path))
    assert [step for step, _ in one.strategy_steps] == list(plan.strategy_steps)
    for name in SAME:
        assert (one.run_dir / name).read_bytes() == (two.run_dir / name).read_bytes()


def test_the_docstrings_example_is_a_plan(tmp_path):
    from tuneforge.builtin.strategies.plan_file import PlanFile

    example = PlanFile.__doc__.partition("in order:\n")[2].partition("\n    Every field")[0]
    (tmp_path / "plan.toml").write_text(example)
    assert [step.name for step in read_plan(tmp_path / "plan.toml")] == ["head", "all"]
    assert len(tomllib.loads(example)["step"]) == 2
