"""A race: equal cost, one set of splits, decided on validation alone, the same results however often it is killed."""

import json
import math
import shutil

import attrs
import pytest
import torch
from tiny import blobs, tiny_data, tiny_net

import tuneforge as tf
from tuneforge.comparison.candidates import parse_strategies
from tuneforge.comparison.ranking import CandidateResult, FinishedRun, rank_candidates
from tuneforge.comparison.study import Study, engine_options_from_config
from tuneforge.comparison.study_dir import find_unfinished
from tuneforge.engine.feature_cache import build as feature_cache_build
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.exporting import load_tensors
from tuneforge.plugin.config import resolve_config
from tuneforge.report.report import write_report

HEAD = [tf.Phase("head", train="head", epochs=50, lr=0.02)]
ALL = [tf.Phase("all", epochs=50, lr=0.02)]
FEW = {"data": tf.use("digits", per_class=4, other_share=0.0), "page": False}


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(autouse=True)
def no_fault_is_left():
    yield
    faults.hook = None


@pytest.fixture
def race(tmp_path):
    """Race on the small world: `race({"name": steps, ...}, out="r", seeds=2)`."""

    def hold(strategies, *, out="race", **given):
        world = {"data": tiny_data(), "model": tiny_net(), "batch_size": 16, "page": False, "budget": "2epochs"}
        return tf.compare(strategies, out=tmp_path / out, **{"seeds": 2, **world, **given})

    return hold


def thaw(task):
    """A strategy that decides."""
    report = yield tf.Phase("head", train="head", epochs=1, lr=0.02)
    if report.val["accuracy"] < 2:
        yield tf.Phase("all", epochs=50, lr=0.01)


def broken(task):
    yield tf.Phase("head", train="head", epochs=1)
    raise ValueError("out of ideas")


def read(path):
    return json.loads(path.read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def entry(comparison, name):
    return next(each for each in comparison.results["candidates"] if each["name"] == name)


def killed_at(action, number, *, only):
    """Kill it at the `number`-th point of that name."""
    passed = 0

    def hook(name):
        nonlocal passed
        passed += name == only
        if passed == number and name == only:
            raise Killed

    faults.hook = hook
    with pytest.raises(Killed):
        action()
    faults.hook = None


# What a race is


def test_every_run_costs_the_same_on_the_same_splits_with_seeds_of_its_own(race):
    comparison = race({"head": HEAD, "all": ALL, "thaw": thaw}, seeds=2, seed=3)
    runs = [comparison.study_dir / name / f"seed-{seed}" for name in ("head", "all", "thaw") for seed in (3, 4)]
    assert [len(lines(run / "metrics.jsonl")) for run in runs] == [2] * 6
    assert {read(run / "report.json")["stopped_by_budget"] for run in runs} == {12}
    configs = [read(run / "run.json")["config"] for run in runs]
    assert [config["seed"] for config in configs] == [3, 4] * 3
    assert {config["data-seed"] for config in configs} == {3}
    assert len({json.dumps(read(run / "model.json")["fingerprints"]) for run in runs}) == 1


def test_runs_are_those_that_the_engine_alone_would_do(race, tune, tmp_path):
    race({"head": HEAD, "all": ALL})
    alone = tune(ALL, seed=1, data_seed=0, budget="2epochs").run_dir
    for name in ("model.safetensors", "metrics.jsonl", "report.json"):
        assert (tmp_path / "race" / "all" / "seed-1" / name).read_bytes() == (alone / name).read_bytes()


def test_the_module_that_was_given_stays_as_it_is(race):
    network = tiny_net()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    race({"all": ALL}, seeds=1, model=network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_table_has_mean_and_spread_of_the_runs(race):
    comparison = race({"head": HEAD, "all": ALL}, seeds=3)
    folders = [comparison.study_dir / "all" / f"seed-{seed}" for seed in range(3)]
    values = torch.tensor([read(each / "report.json")["splits"]["val"]["f1_macro"] for each in folders]).double()
    found = entry(comparison, "all")
    assert found["mean"] == pytest.approx(values.mean().item())
    assert found["std"] == pytest.approx(values.std().item())
    assert [run["run_dir"] for run in found["runs"]] == [f"all/seed-{seed}" for seed in range(3)]
    assert f"{found['mean']:.4f}" in comparison.table
    assert comparison.table == (comparison.study_dir / "table.txt").read_text().rstrip("\n")
    assert comparison.results == read(comparison.study_dir / "results.json")
    assert "seconds" not in json.dumps(comparison.results)


def test_the_frozen_part_is_computed_once_for_all_of_them(race, monkeypatch):
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE_ON_DISK", 0.0)
    comparison = race({"one": HEAD, "two": [attrs.evolve(HEAD[0], lr=0.01)]})
    runs = [comparison.study_dir / name / f"seed-{seed}" for seed in (0, 1) for name in ("one", "two")]
    found = ["found in the cache, so nothing is computed again" in (run / "log.txt").read_text() for run in runs]
    assert found == [False, True, True, True]


# The decision


def test_the_test_split_plays_no_part_and_is_shown_for_winner_and_baseline_alone(race):
    before = race({"head": HEAD, "all": ALL, "thaw": thaw})
    for number, path in enumerate(sorted(before.study_dir.glob("*/seed-*/report.json"))):
        report = read(path)
        report["splits"]["test"] = {"f1_macro": 100.0 + number}
        path.write_text(json.dumps(report))
    after = race({"head": HEAD, "all": ALL, "thaw": thaw})
    assert set(after.results["test"]) == {after.winner, "head"}
    assert all(value >= 100 for found in after.results["test"].values() for value in found["values"])
    same = {key: value for key, value in before.results.items() if key != "test"}
    assert {key: value for key, value in after.results.items() if key != "test"} == same
    unseen = {"all", "thaw"} - {after.winner}
    assert not [line for line in after.table.splitlines() if line.startswith("test") and unseen & set(line.split())]


def rows(**values):
    """Entrants with these figures, one a seed."""

    def run(seed, value, mode):
        prints = {"train": "t", "val": "v"}
        return FinishedRun("x", seed, "figure", mode, value, 1, 1, 1.0, True, prints)

    mode = values.pop("mode", "max")
    return [CandidateResult(name, tuple(run(*pair, mode) for pair in enumerate(each))) for name, each in values.items()]


def test_first_by_a_hair_is_no_significant_difference():
    standings = rank_candidates(
        rows(base=[0.90, 0.92, 0.91], new=[0.93, 0.90, 0.92]), baseline="base", num_comparisons=1
    )
    assert standings.winner.name == "new"
    assert standings.describe_verdict(standings.winner) == "no significant difference"


def test_better_and_worse_are_said_where_the_figures_show_it():
    given = rows(base=[0.90, 0.92, 0.91], up=[0.950, 0.971, 0.960], down=[0.80, 0.821, 0.81])
    standings = rank_candidates(given, baseline="base", num_comparisons=2)
    assert {row.name: standings.describe_verdict(row) for row in standings.results} == {
        "up": "better", "base": "baseline", "down": "worse",
    }  # fmt: skip


def test_less_is_better_where_the_figure_is_an_error():
    given = rows(base=[0.90, 0.92, 0.91], up=[0.950, 0.971, 0.960], down=[0.80, 0.821, 0.81], mode="min")
    standings = rank_candidates(given, baseline="base", num_comparisons=2)
    assert [(row.name, standings.describe_verdict(row)) for row in standings.results] == [
        ("down", "better"), ("base", "baseline"), ("up", "worse"),
    ]  # fmt: skip


def test_the_more_take_part_the_more_is_asked_of_each():
    given = rows(base=[0.90, 0.92, 0.91, 0.90], new=[0.93, 0.94, 0.92, 0.925])
    alone, among_many = (rank_candidates(given, baseline="base", num_comparisons=count) for count in (1, 5))
    assert alone.describe_verdict(alone.winner) == "better"
    assert among_many.describe_verdict(among_many.winner) == "no significant difference"
    assert among_many.corrected_p_values["new"] == pytest.approx(5 * alone.corrected_p_values["new"])


def test_with_one_seed_there_is_no_test_and_it_says_so(race):
    comparison = race({"head": HEAD, "all": ALL}, seeds=1)
    assert {each["verdict"] for each in comparison.results["candidates"]} == {"baseline", "not tested: one seed"}
    assert "one seed, so there is no test" in comparison.table
    assert "significantly" not in comparison.table
    assert entry(comparison, "all")["std"] is None


def test_two_seeds_say_how_little_they_can_show(race):
    comparison = race({"head": HEAD, "all": ALL}, baseline="all")
    assert "with 2 seeds an interval reaches 9.0 standard deviations of the differences each way" in comparison.table
    assert comparison.results["baseline"] == "all"


def test_who_ends_before_the_budget_is_spent_is_named(race):
    comparison = race({"short": [tf.Phase("short", epochs=1)], "all": ALL}, seeds=1)
    (note,) = (note for note in comparison.results["notes"] if "ended by themselves before their 2epochs" in note)
    assert note.endswith(": short after 1")


# Entrants that fail


def test_an_entrant_that_fails_is_listed_with_its_reason_and_the_others_go_on(race):
    told = []
    comparison = race({"broken": broken, "head": HEAD, "all": ALL}, baseline="head", log=told.append)
    found = entry(comparison, "broken")
    assert comparison.results["candidates"][-1] == found
    assert found["state"] == "failed"
    assert found["verdict"].startswith("failed: ")
    assert "(seed 0)" in found["verdict"]
    assert not (comparison.study_dir / "broken" / "seed-1").exists()
    assert comparison.results["num_comparisons"] == 2
    assert any("broken, seed 0: failed" in line for line in told)


def test_without_the_baseline_nothing_is_tested(race):
    comparison = race({"broken": broken, "head": HEAD, "all": ALL})
    assert all(
        "not tested" in each["verdict"] or each["state"] == "failed" for each in comparison.results["candidates"]
    )
    assert "baseline 'broken' did not come through" in comparison.table


def test_where_nobody_comes_through_the_reason_is_the_error(race, tmp_path):
    with pytest.raises(tf.PluginError, match="failed in finetune_strategy"):
        race({"broken": broken, "again": broken})
    assert read(tmp_path / "race" / "status.json")["state"] == "failed"


def test_what_is_wrong_in_itself_is_said_before_anything_runs(race, tmp_path):
    for strategies, given, words in (
        (["full", "ful"], {}, "did you mean 'full'"),
        (["full:lr=fast", "head-only"], {}, "not a valid value for 'lr'"),
        (["full", "no_freeze"], {}, "two entrants of the race are 'full'"),
        (["full", "lp-ft"], {"baseline": "head-only"}, "no entrant is 'head-only'"),
        (["greedy-soup"], {}, "a race needs strategies"),
        ({"once": (step for step in ALL)}, {}, "read only once"),
        (["full"], {"budget": "soon"}, "60s, 5m, 2h"),
        (["full"], {"seeds": 0}, "no seeds"),
        (["full"], {"strategy": "full"}, "takes strategies"),
        (["full", "lp-ft", "head-only"], {"halving": True, "budget": None}, "needs a budget"),
        (["full", "lp-ft", "head-only"], {"halving": True, "budget": "1epoch"}, "cannot be halved"),
    ):
        with pytest.raises(tf.UsageError, match=words):
            race(strategies, **given)
    assert not (tmp_path / "race").exists()


def test_how_strategies_are_written():
    text = "lp-ft, full:lr=3e-4:epochs=20,wise-ft:weights=[0.5,1],mine:Name:enough=0.9,plan-file:path=a:b.toml"
    assert [(use.name, dict(use.options)) for use in parse_strategies(text)] == [
        ("lp-ft", {}),
        ("full", {"lr": "3e-4", "epochs": "20"}),
        ("wise-ft", {"weights": "0.5,1"}),
        ("mine:Name", {"enough": "0.9"}),
        ("plan-file", {"path": "a:b.toml"}),
    ]


def test_entrants_are_named_by_what_sets_them_apart_and_that_name_can_be_written():
    asked = ["full", tf.use("full", lr=3e-4), "wise-ft:weights=[0.5,1]", thaw, HEAD]
    race = Study(asked, engine_options=FEW)
    names = [each.name for each in race.candidates]
    assert names == ["full", "full:lr=0.0003", "wise-ft:weights=[0.5,1.0]", "thaw", "head"]
    again = Study(names[:3], engine_options=FEW)
    assert [each.name for each in again.candidates] == names[:3]
    assert [each.dir_name for each in race.candidates][1:3] == ["full-lr=0.0003", "wise-ft-weights=-0.5,1.0"]


# Stopped and killed


@pytest.mark.parametrize(("number", "only"), [(3, "step-saved"), (1, "phase-saved"), (40, "step-saved")])
def test_a_race_that_was_killed_ends_with_the_same_results(race, tmp_path, number, only):
    given = {"checkpoint_s": 0.0}
    whole = race({"head": HEAD, "thaw": thaw}, out="whole", **given)
    killed_at(lambda: race({"head": HEAD, "thaw": thaw}, out="killed", **given), number, only=only)
    assert not (tmp_path / "killed" / "results.json").exists()
    again = race({"head": HEAD, "thaw": thaw}, out="killed", **given)
    assert (tmp_path / "killed" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert again.results == whole.results


def test_runs_that_are_done_are_not_done_again(race, tmp_path):
    race({"head": HEAD, "all": ALL})
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "race").glob("*/seed-*/log.txt")}
    race({"head": HEAD, "all": ALL})
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


def test_a_run_killed_before_anything_was_done_begins_again(race, tmp_path):
    whole = race({"head": HEAD, "all": ALL}).results
    for left in (("run.json",), (".lock",)):
        shutil.rmtree(tmp_path / "race" / "all" / "seed-1")
        (tmp_path / "race" / "all" / "seed-1").mkdir()
        for name in left:
            (tmp_path / "race" / "all" / "seed-1" / name).write_text("{}")
        assert race({"head": HEAD, "all": ALL}).results == whole


def test_a_race_that_is_asked_to_stop_does_and_says_how_to_go_on(race, tmp_path):
    done = []

    def stopped_at_the_second(engine):
        if done:
            engine.stop("Ctrl-C", exit_code=130)
        done.append(engine.run())

    race = Study("full,head-only", seeds=1, budget="1epoch", engine_options=FEW)
    with pytest.raises(tf.StoppedError, match="stopped by Ctrl-C") as caught:
        race.run(tmp_path / "race", stopped_at_the_second)
    assert caught.value.exit_code == 130
    assert f"tuneforge compare --resume {tmp_path / 'race'}" in caught.value.fix
    assert read(tmp_path / "race" / "status.json")["state"] == "stopped"
    comparison = Study.from_dir(tmp_path / "race").run(tmp_path / "race")
    assert [each["state"] for each in comparison.results["candidates"]] == ["ranked", "ranked"]
    assert read(tmp_path / "race" / "status.json")["state"] == "done"


def test_without_a_folder_the_same_race_goes_on_and_another_one_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = engine_options_from_config(resolve_config({"page": False}))
    one, same, other = (Study(each, engine_options=config) for each in ("full,lp-ft", "full,lp-ft", "full"))
    killed_at(one.run, 1, only="step-saved")
    (folder,) = (tmp_path / "runs").iterdir()
    assert find_unfinished(same.build_record()).resolve() == folder
    assert find_unfinished(other.build_record()) is None
    with RunDir(folder, resume=True):
        assert find_unfinished(same.build_record()) is None, "it runs now"
    (folder / "status.json").write_text('{"state": "done"}')
    assert find_unfinished(same.build_record()) is None


def test_another_race_in_the_folder_is_refused_with_the_difference(race):
    race({"head": HEAD, "all": ALL}, seeds=1)
    with pytest.raises(tf.UsageError, match="holds another race") as caught:
        race({"head": HEAD, "thaw": thaw}, seeds=1, batch_size=8)
    said = caught.value.what.splitlines()[1:]
    assert said == ["  candidates: there head, all, here head, thaw", "  config.batch-size: there 16, here 8"]


def test_a_run_is_no_race_and_stays_as_it_is(race, tune):
    folder = tune(HEAD, budget="1epoch").run_dir
    before = (folder / "status.json").read_bytes()
    with pytest.raises(tf.FolderError, match="holds a run"):
        race({"head": HEAD}, out=folder)
    assert (folder / "status.json").read_bytes() == before


# Halving


def test_halving_drops_the_worse_half_at_half_the_budget_and_keeps_the_baseline(race):
    still = [tf.Phase("still", train="head", epochs=50, lr=1e-9)]
    slow = [tf.Phase("slow", train="head", epochs=50, lr=1e-4)]
    comparison = race({"still": still, "slow": slow, "head": HEAD, "all": ALL}, budget="4epochs", halving=True)
    assert comparison.results["round_budgets"] == ["2epochs", "4epochs"]
    found = {each["name"]: each for each in comparison.results["candidates"]}
    first = {name: read_mean(comparison.study_dir / name / "round-1") for name in found}
    through = sorted(first, key=first.get, reverse=True)[:2]
    assert {name for name, each in found.items() if each["state"] == "ranked"} == {*through, "still"}
    for name, each in found.items():
        dropped = each["state"] == "dropped"
        assert dropped == (each["verdict"] == "dropped: after rung 1 of 2, 2epochs each")
        assert {run["epochs"] for run in each["runs"]} == {2 if dropped else 4}
        assert len(lines(comparison.study_dir / name / "round-1" / "seed-0" / "metrics.jsonl")) == 2
        assert (comparison.study_dir / name / "seed-0").exists() != dropped
    assert comparison.results["num_comparisons"] == 3, "those that were dropped count"


def read_mean(folder):
    found = [read(path)["splits"]["val"]["f1_macro"] for path in folder.glob("seed-*/report.json")]
    return sum(found) / len(found)


def test_each_rung_has_twice_the_budget_of_the_one_before():
    names = ["full", "head-only", "lp-ft", "layer-decay", "full:lr=1e-4"]
    for budget, rungs in (
        ("20epochs", ["5epochs", "10epochs", "20epochs"]),
        ("7epochs", ["1epochs", "3epochs", "7epochs"]),
        ("0.5m", ["7.5s", "15s", "0.5m"]),
        ("8000000steps", ["2000000steps", "4000000steps", "8000000steps"]),
    ):
        assert Study(names, engine_options={}, halving=True, budget=budget).round_budgets == rungs
    assert Study(names[:2], engine_options={}, halving=True, budget="20epochs").round_budgets == ["20epochs"]


# The soup


def test_the_soup_is_the_average_of_its_ingredients_and_never_worse_on_validation(race, tmp_path):
    comparison = race({"head": HEAD, "all": ALL, "soup": "greedy-soup"}, seeds=2)
    soup = comparison.results["soup"]
    best = max(run["value"] for each in comparison.results["candidates"] for run in each["runs"])
    assert soup["value"] >= best
    assert len(soup["candidates"]) == 4
    states = [load_tensors(comparison.study_dir / name / "model.safetensors")[0] for name in soup["ingredients"]]
    made, metadata = load_tensors(comparison.study_dir / "soup" / "model.safetensors")
    for name, tensor in made.items():
        if tensor.is_floating_point():
            mean = torch.stack([state[name] for state in states]).mean(0)
            assert torch.allclose(tensor, mean, rtol=1e-5, atol=1e-6), name
    assert metadata["labels"] == ["a", "b", "c"]
    assert "greedy-soup" in comparison.table
    assert comparison.winner in ("head", "all")


def test_the_soup_predicts_evaluates_and_never_saw_the_test(race):
    comparison = race({"head": HEAD, "all": ALL, "soup": "greedy-soup"}, seeds=1)
    folder = comparison.study_dir / "soup"
    assert set(read(folder / "report.json")["splits"]) == {"val"}
    figures = tf.evaluate(folder, data=tiny_data(), model=tiny_net(seed=5))
    assert figures["val"]["f1_macro"] == comparison.results["soup"]["value"]
    (answer,) = tf.predict(folder, [[0.0] * 8], model=tiny_net())
    assert answer["class"] in ("a", "b", "c")
    assert write_report(folder).exists()


def test_a_soup_that_was_killed_or_is_of_other_runs_is_made_again(race, tmp_path):
    entrants = {"head": HEAD, "all": ALL, "soup": "greedy-soup"}
    whole = race(entrants, seeds=1).results
    soup = tmp_path / "race" / "soup"
    (soup / "status.json").unlink()
    (soup / "model.safetensors").write_bytes(b"half")
    assert race(entrants, seeds=1).results == whole
    report = read(soup / "report.json")
    report["soup"] |= {"candidates": ["head/seed-0"], "value": 100.0}
    (soup / "report.json").write_text(json.dumps(report))
    assert race(entrants, seeds=1).results == whole


# Runs that are finished


def test_finished_runs_are_grouped_by_strategy_and_paired_by_seed(tune):
    runs = [tune(steps, seed=seed, budget="2epochs").run_dir for steps in (HEAD, ALL) for seed in (0, 1, 2)]
    comparison = tf.compare(runs=runs)
    assert [(each["name"], len(each["runs"])) for each in comparison.results["candidates"]] in (
        [("head", 3), ("all", 3)], [("all", 3), ("head", 3)],
    )  # fmt: skip
    assert entry(comparison, "all")["difference"]["num_pairs"] == 3
    assert comparison.study_dir is None
    assert "sd" in comparison.table


def test_options_tell_runs_of_one_strategy_apart(tune):
    options = {"epochs": 1, "restore_best": False}
    runs = [tune(tf.use("full", lr=lr, **options), seed=0).run_dir for lr in (1e-3, 1e-2)]
    assert [each["name"] for each in tf.compare(runs=runs).results["candidates"]] != ["full", "full"]
    assert {each["name"] for each in tf.compare(runs=runs).results["candidates"]} == {"full:lr=0.001", "full:lr=0.01"}


def test_runs_on_other_validation_data_are_not_compared(tune):
    other = attrs.evolve(tiny_data(), val=blobs(30, seed=9))
    one, two = tune(HEAD, budget="1epoch").run_dir, tune(ALL, budget="1epoch", data=other).run_dir
    with pytest.raises(tf.UsageError, match="validated on different samples"):
        tf.compare(runs=[one, two])


def test_runs_trained_on_other_samples_are_compared_with_a_note(tune):
    other = attrs.evolve(tiny_data(), train=blobs(96, seed=9))
    one, two = tune(HEAD, budget="1epoch").run_dir, tune(ALL, budget="1epoch", data=other).run_dir
    assert "not all were trained on the same samples" in tf.compare(runs=[one, two]).table


def test_results_and_picture_of_finished_runs_are_written_where_asked(tune, tmp_path):
    runs = [tune(steps, budget="1epoch").run_dir for steps in (HEAD, ALL)]
    tf.compare(runs=runs, baseline=str(runs[1]), out=tmp_path / "out")
    assert read(tmp_path / "out" / "results.json")["baseline"] == "all"
    assert (tmp_path / "out" / "cost.svg").read_text().startswith("<svg xmlns=")


def test_a_run_that_is_not_done_is_refused(tune):
    folder = tune(HEAD, budget="1epoch").run_dir
    (folder / "status.json").write_text('{"state": "stopped"}')
    with pytest.raises(tf.FolderError, match="is not done"):
        tf.compare(runs=[folder])


def test_a_race_and_finished_runs_are_not_asked_for_at_once(tune):
    with pytest.raises(tf.UsageError, match="compared as they are"):
        tf.compare(["full"], runs=["x"])


def test_the_picture_has_a_point_for_each_entrant_that_has_a_figure(race):
    comparison = race({"broken": broken, "head": HEAD, "all": ALL}, baseline="head")
    picture = (comparison.study_dir / "cost.svg").read_text()
    assert "f1_macro on validation" in picture
    for name, drawn in (("head", True), ("all", True), ("broken", False)):
        assert (f">{name}<" in picture) == drawn
    assert "var(--" not in picture
    assert math.isfinite(comparison.costs["head"]["total"])


def test_a_race_touches_nothing_that_is_not_its_own(tmp_path):
    kept = tmp_path / "mine" / "sub" / "failure.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    with pytest.raises(tf.FolderError, match="holds something else"):
        tf.compare({"one": "full", "two": "head-only"}, seeds=1, out=tmp_path / "mine")
    assert kept.exists()
    assert not (tmp_path / "mine" / "study.json").exists()
