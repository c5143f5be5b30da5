"""A study: equal cost, the same splits, ranked on the validation split, and the same results after kills."""

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
def reset_fault_injection():
    yield
    faults.hook = None


@pytest.fixture
def compare(tmp_path):
    """Compare strategies on small data: `compare({"name": steps, ...}, out="r", seeds=2)`."""

    def run_study(strategies, *, out="study", **options):
        defaults = {"data": tiny_data(), "model": tiny_net(), "batch_size": 16, "page": False, "budget": "2epochs"}
        return tf.compare(strategies, out=tmp_path / out, **{"seeds": 2, **defaults, **options})

    return run_study


def unfreeze(task):
    """Choose the second step from the result of the first."""
    result = yield tf.Phase("head", train="head", epochs=1, lr=0.02)
    if result.val["accuracy"] < 2:
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
    """Kill the action at the `number`-th fault injection point of that name."""
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


# Runs of a study


def test_every_run_has_the_same_budget_and_splits_and_its_own_seed(compare):
    comparison = compare({"head": HEAD, "all": ALL, "unfreeze": unfreeze}, seeds=2, seed=3)
    runs = [comparison.study_dir / name / f"seed-{seed}" for name in ("head", "all", "unfreeze") for seed in (3, 4)]
    assert [len(lines(run / "metrics.jsonl")) for run in runs] == [2] * 6
    assert {read(run / "report.json")["stopped_by_budget"] for run in runs} == {12}
    configs = [read(run / "run.json")["config"] for run in runs]
    assert [config["seed"] for config in configs] == [3, 4] * 3
    assert {config["data-seed"] for config in configs} == {3}
    assert len({json.dumps(read(run / "model.json")["fingerprints"]) for run in runs}) == 1


def test_runs_are_byte_identical_to_those_of_the_engine_alone(compare, tune, tmp_path):
    compare({"head": HEAD, "all": ALL})
    alone = tune(ALL, seed=1, data_seed=0, budget="2epochs").run_dir
    for name in ("model.safetensors", "metrics.jsonl", "report.json"):
        assert (tmp_path / "study" / "all" / "seed-1" / name).read_bytes() == (alone / name).read_bytes()


def test_the_module_of_the_caller_is_not_changed(compare):
    network = tiny_net()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    compare({"all": ALL}, seeds=1, model=network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_table_has_mean_and_std_of_the_runs(compare):
    comparison = compare({"head": HEAD, "all": ALL}, seeds=3)
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


def test_features_of_the_frozen_backbone_are_computed_once_for_all_runs(compare, monkeypatch):
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    free = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", free)
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE_ON_DISK", 0.0)
    comparison = compare({"one": HEAD, "two": [attrs.evolve(HEAD[0], lr=0.01)]})
    runs = [comparison.study_dir / name / f"seed-{seed}" for seed in (0, 1) for name in ("one", "two")]
    found = ["features computed earlier are reused" in (run / "log.txt").read_text() for run in runs]
    assert found == [False, True, True, True]


# Ranking


def test_the_test_split_does_not_decide_and_is_shown_for_winner_and_baseline_only(compare):
    before = compare({"head": HEAD, "all": ALL, "unfreeze": unfreeze})
    for number, path in enumerate(sorted(before.study_dir.glob("*/seed-*/report.json"))):
        report = read(path)
        report["splits"]["test"] = {"f1_macro": 100.0 + number}
        path.write_text(json.dumps(report))
    after = compare({"head": HEAD, "all": ALL, "unfreeze": unfreeze})
    assert set(after.results["test"]) == {after.winner, "head"}
    assert all(value >= 100 for found in after.results["test"].values() for value in found["values"])
    same = {key: value for key, value in before.results.items() if key != "test"}
    assert {key: value for key, value in after.results.items() if key != "test"} == same
    unseen = {"all", "unfreeze"} - {after.winner}
    assert not [line for line in after.table.splitlines() if line.startswith("test") and unseen & set(line.split())]


def rows(**values):
    """Candidates with these values, one per seed."""

    def run(seed, value, mode):
        prints = {"train": "t", "val": "v"}
        return FinishedRun("x", seed, "metric", mode, value, 1, 1, 1.0, True, prints)

    mode = values.pop("mode", "max")
    return [CandidateResult(name, tuple(run(*pair, mode) for pair in enumerate(each))) for name, each in values.items()]


def test_a_slightly_better_mean_is_no_significant_difference():
    ranking = rank_candidates(rows(base=[0.90, 0.92, 0.91], new=[0.93, 0.90, 0.92]), baseline="base", num_comparisons=1)
    assert ranking.winner.name == "new"
    assert ranking.describe_verdict(ranking.winner) == "no significant difference"


def test_better_and_worse_need_a_significant_difference():
    options = rows(base=[0.90, 0.92, 0.91], up=[0.950, 0.971, 0.960], down=[0.80, 0.821, 0.81])
    ranking = rank_candidates(options, baseline="base", num_comparisons=2)
    assert {row.name: ranking.describe_verdict(row) for row in ranking.results} == {
        "up": "better", "base": "baseline", "down": "worse",
    }  # fmt: skip


def test_lower_is_better_in_mode_min():
    options = rows(base=[0.90, 0.92, 0.91], up=[0.950, 0.971, 0.960], down=[0.80, 0.821, 0.81], mode="min")
    ranking = rank_candidates(options, baseline="base", num_comparisons=2)
    assert [(row.name, ranking.describe_verdict(row)) for row in ranking.results] == [
        ("down", "better"), ("base", "baseline"), ("up", "worse"),
    ]  # fmt: skip


def test_p_values_are_corrected_for_the_number_of_comparisons():
    options = rows(base=[0.90, 0.92, 0.91, 0.90], new=[0.93, 0.94, 0.92, 0.925])
    alone, among_many = (rank_candidates(options, baseline="base", num_comparisons=count) for count in (1, 5))
    assert alone.describe_verdict(alone.winner) == "better"
    assert among_many.describe_verdict(among_many.winner) == "no significant difference"
    assert among_many.corrected_p_values["new"] == pytest.approx(5 * alone.corrected_p_values["new"])


def test_one_seed_is_not_tested_and_the_table_says_so(compare):
    comparison = compare({"head": HEAD, "all": ALL}, seeds=1)
    assert {each["verdict"] for each in comparison.results["candidates"]} == {"baseline", "not tested: one seed"}
    assert "one seed, so there is no test" in comparison.table
    assert "significantly" not in comparison.table
    assert entry(comparison, "all")["std"] is None


def test_two_seeds_come_with_a_note_on_the_width_of_the_interval(compare):
    comparison = compare({"head": HEAD, "all": ALL}, baseline="all")
    assert (
        "with 2 seeds a confidence interval extends 9.0 standard deviations of the differences to each side"
        in comparison.table
    )
    assert comparison.results["baseline"] == "all"


def test_candidates_that_finish_before_their_budget_are_named(compare):
    comparison = compare({"short": [tf.Phase("short", epochs=1)], "all": ALL}, seeds=1)
    (note,) = (note for note in comparison.results["notes"] if "finished before their budget of 2epochs" in note)
    assert note.endswith(": short after 1")


# Candidates that fail


def test_a_failing_candidate_is_listed_with_its_reason_and_the_others_run(compare):
    log = []
    comparison = compare({"broken": broken, "head": HEAD, "all": ALL}, baseline="head", log=log.append)
    found = entry(comparison, "broken")
    assert comparison.results["candidates"][-1] == found
    assert found["state"] == "failed"
    assert found["verdict"].startswith("failed: ")
    assert "(seed 0)" in found["verdict"]
    assert not (comparison.study_dir / "broken" / "seed-1").exists()
    assert comparison.results["num_comparisons"] == 2
    assert any("broken, seed 0: failed" in line for line in log)


def test_nothing_is_tested_if_the_baseline_fails(compare):
    comparison = compare({"broken": broken, "head": HEAD, "all": ALL})
    assert all(
        "not tested" in each["verdict"] or each["state"] == "failed" for each in comparison.results["candidates"]
    )
    assert "baseline 'broken' failed" in comparison.table


def test_the_first_error_is_raised_if_every_candidate_fails(compare, tmp_path):
    with pytest.raises(tf.PluginError, match="failed in finetune_strategy"):
        compare({"broken": broken, "again": broken})
    assert read(tmp_path / "study" / "status.json")["state"] == "failed"


def test_wrong_arguments_are_refused_before_anything_runs(compare, tmp_path):
    for strategies, options, words in (
        (["full", "ful"], {}, "did you mean 'full'"),
        (["full:lr=fast", "head-only"], {}, "not a valid value for 'lr'"),
        (["full", "no_freeze"], {}, "two candidates are named 'full'"),
        (["full", "lp-ft"], {"baseline": "head-only"}, "no candidate is named 'head-only'"),
        (["greedy-soup"], {}, "there are no strategies"),
        ({"once": (step for step in ALL)}, {}, "read only once"),
        (["full"], {"budget": "soon"}, "60s, 5m, 2h"),
        (["full"], {"seeds": 0}, "not a valid value for seeds"),
        (["full"], {"strategy": "full"}, "takes strategies"),
        (["full", "lp-ft", "head-only"], {"halving": True, "budget": None}, "needs a budget"),
        (["full", "lp-ft", "head-only"], {"halving": True, "budget": "1epoch"}, "cannot be halved"),
    ):
        with pytest.raises(tf.UsageError, match=words):
            compare(strategies, **options)
    assert not (tmp_path / "study").exists()


def test_strategies_are_parsed_with_options_and_lists():
    text = "lp-ft, full:lr=3e-4:epochs=20,wise-ft:weights=[0.5,1],mine:Name:enough=0.9,plan-file:path=a:b.toml"
    assert [(use.name, dict(use.options)) for use in parse_strategies(text)] == [
        ("lp-ft", {}),
        ("full", {"lr": "3e-4", "epochs": "20"}),
        ("wise-ft", {"weights": "0.5,1"}),
        ("mine:Name", {"enough": "0.9"}),
        ("plan-file", {"path": "a:b.toml"}),
    ]


def test_candidates_are_named_by_their_non_default_options_and_the_name_parses_again():
    asked = ["full", tf.use("full", lr=3e-4), "wise-ft:weights=[0.5,1]", unfreeze, HEAD]
    study = Study(asked, engine_options=FEW)
    names = [each.name for each in study.candidates]
    assert names == ["full", "full:lr=0.0003", "wise-ft:weights=[0.5,1.0]", "unfreeze", "head"]
    again = Study(names[:3], engine_options=FEW)
    assert [each.name for each in again.candidates] == names[:3]
    assert [each.dir_name for each in study.candidates][1:3] == ["full-lr=0.0003", "wise-ft-weights=-0.5,1.0"]


# Resuming


@pytest.mark.parametrize(("number", "only"), [(3, "step-saved"), (1, "phase-saved"), (40, "step-saved")])
def test_a_study_that_was_killed_ends_with_the_same_results(compare, tmp_path, number, only):
    options = {"checkpoint_s": 0.0}
    whole = compare({"head": HEAD, "unfreeze": unfreeze}, out="whole", **options)
    killed_at(lambda: compare({"head": HEAD, "unfreeze": unfreeze}, out="killed", **options), number, only=only)
    assert not (tmp_path / "killed" / "results.json").exists()
    again = compare({"head": HEAD, "unfreeze": unfreeze}, out="killed", **options)
    assert (tmp_path / "killed" / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert again.results == whole.results


def test_finished_runs_are_not_repeated(compare, tmp_path):
    compare({"head": HEAD, "all": ALL})
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*/seed-*/log.txt")}
    compare({"head": HEAD, "all": ALL})
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


def test_a_run_killed_before_its_first_checkpoint_starts_again(compare, tmp_path):
    whole = compare({"head": HEAD, "all": ALL}).results
    for left in (("run.json",), (".lock",)):
        shutil.rmtree(tmp_path / "study" / "all" / "seed-1")
        (tmp_path / "study" / "all" / "seed-1").mkdir()
        for name in left:
            (tmp_path / "study" / "all" / "seed-1" / name).write_text("{}")
        assert compare({"head": HEAD, "all": ALL}).results == whole


def test_a_stopped_study_says_how_to_resume_it(compare, tmp_path):
    done = []

    def stopped_at_the_second(engine):
        if done:
            engine.stop("Ctrl-C", exit_code=130)
        done.append(engine.run())

    study = Study("full,head-only", seeds=1, budget="1epoch", engine_options=FEW)
    with pytest.raises(tf.StoppedError, match="stopped by Ctrl-C") as caught:
        study.run(tmp_path / "study", stopped_at_the_second)
    assert caught.value.exit_code == 130
    assert f"tuneforge compare --resume {tmp_path / 'study'}" in caught.value.fix
    assert read(tmp_path / "study" / "status.json")["state"] == "stopped"
    comparison = Study.from_dir(tmp_path / "study").run(tmp_path / "study")
    assert [each["state"] for each in comparison.results["candidates"]] == ["ranked", "ranked"]
    assert read(tmp_path / "study" / "status.json")["state"] == "done"


def test_without_a_directory_an_equal_unfinished_study_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = engine_options_from_config(resolve_config({"page": False}))
    one, same, other = (Study(each, engine_options=config) for each in ("full,lp-ft", "full,lp-ft", "full"))
    killed_at(one.run, 1, only="step-saved")
    (folder,) = (tmp_path / "runs").iterdir()
    assert find_unfinished(same.build_record()).resolve() == folder
    assert find_unfinished(other.build_record()) is None
    with RunDir(folder, resume=True):
        assert find_unfinished(same.build_record()) is None, "it is running"
    (folder / "status.json").write_text('{"state": "done"}')
    assert find_unfinished(same.build_record()) is None


def test_another_study_in_the_directory_is_refused_with_the_difference(compare):
    compare({"head": HEAD, "all": ALL}, seeds=1)
    with pytest.raises(tf.UsageError, match="holds another study") as caught:
        compare({"head": HEAD, "unfreeze": unfreeze}, seeds=1, batch_size=8)
    lines_of_error = caught.value.what.splitlines()[1:]
    assert lines_of_error == [
        "  candidates: there head, all, here head, unfreeze",
        "  config.batch-size: there 16, here 8",
    ]


def test_a_run_directory_is_refused_and_not_changed(compare, tune):
    folder = tune(HEAD, budget="1epoch").run_dir
    before = (folder / "status.json").read_bytes()
    with pytest.raises(tf.FolderError, match="holds a run"):
        compare({"head": HEAD}, out=folder)
    assert (folder / "status.json").read_bytes() == before


# Successive halving


def test_halving_drops_the_worse_half_at_half_the_budget_and_keeps_the_baseline(compare):
    tiny_lr = [tf.Phase("tiny-lr", train="head", epochs=50, lr=1e-9)]
    slow = [tf.Phase("slow", train="head", epochs=50, lr=1e-4)]
    comparison = compare({"tiny-lr": tiny_lr, "slow": slow, "head": HEAD, "all": ALL}, budget="4epochs", halving=True)
    assert comparison.results["round_budgets"] == ["2epochs", "4epochs"]
    found = {each["name"]: each for each in comparison.results["candidates"]}
    first = {name: read_mean(comparison.study_dir / name / "round-1") for name in found}
    through = sorted(first, key=first.get, reverse=True)[:2]
    assert {name for name, each in found.items() if each["state"] == "ranked"} == {*through, "tiny-lr"}
    for name, each in found.items():
        dropped = each["state"] == "dropped"
        assert dropped == (each["verdict"] == "dropped: after round 1 of 2, 2epochs each")
        assert {run["epochs"] for run in each["runs"]} == {2 if dropped else 4}
        assert len(lines(comparison.study_dir / name / "round-1" / "seed-0" / "metrics.jsonl")) == 2
        assert (comparison.study_dir / name / "seed-0").exists() != dropped
    assert comparison.results["num_comparisons"] == 3, "dropped candidates count"


def read_mean(folder):
    found = [read(path)["splits"]["val"]["f1_macro"] for path in folder.glob("seed-*/report.json")]
    return sum(found) / len(found)


def test_each_round_has_twice_the_budget_of_the_round_before():
    names = ["full", "head-only", "lp-ft", "layer-decay", "full:lr=1e-4"]
    for budget, budgets in (
        ("20epochs", ["5epochs", "10epochs", "20epochs"]),
        ("7epochs", ["1epochs", "3epochs", "7epochs"]),
        ("0.5m", ["7.5s", "15s", "0.5m"]),
        ("8000000steps", ["2000000steps", "4000000steps", "8000000steps"]),
    ):
        assert Study(names, engine_options={}, halving=True, budget=budget).round_budgets == budgets
    assert Study(names[:2], engine_options={}, halving=True, budget="20epochs").round_budgets == ["20epochs"]


# Model soup


def test_the_soup_is_the_average_of_its_ingredients_and_never_worse_on_validation(compare, tmp_path):
    comparison = compare({"head": HEAD, "all": ALL, "soup": "greedy-soup"}, seeds=2)
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


def test_the_soup_predicts_and_evaluates_and_has_no_test_metrics(compare):
    comparison = compare({"head": HEAD, "all": ALL, "soup": "greedy-soup"}, seeds=1)
    folder = comparison.study_dir / "soup"
    assert set(read(folder / "report.json")["splits"]) == {"val"}
    metrics = tf.evaluate(folder, data=tiny_data(), model=tiny_net(seed=5))
    assert metrics["val"]["f1_macro"] == comparison.results["soup"]["value"]
    (prediction,) = tf.predict(folder, [[0.0] * 8], model=tiny_net())
    assert prediction["class"] in ("a", "b", "c")
    assert write_report(folder).exists()


def test_a_partial_soup_or_one_of_other_runs_is_built_again(compare, tmp_path):
    strategies = {"head": HEAD, "all": ALL, "soup": "greedy-soup"}
    whole = compare(strategies, seeds=1).results
    soup = tmp_path / "study" / "soup"
    (soup / "status.json").unlink()
    (soup / "model.safetensors").write_bytes(b"half")
    assert compare(strategies, seeds=1).results == whole
    report = read(soup / "report.json")
    report["soup"] |= {"candidates": ["head/seed-0"], "value": 100.0}
    (soup / "report.json").write_text(json.dumps(report))
    assert compare(strategies, seeds=1).results == whole


# Finished runs


def test_finished_runs_are_grouped_by_strategy_and_paired_by_seed(tune):
    runs = [tune(steps, seed=seed, budget="2epochs").run_dir for steps in (HEAD, ALL) for seed in (0, 1, 2)]
    comparison = tf.compare(runs=runs)
    assert [(each["name"], len(each["runs"])) for each in comparison.results["candidates"]] in (
        [("head", 3), ("all", 3)], [("all", 3), ("head", 3)],
    )  # fmt: skip
    assert entry(comparison, "all")["difference"]["num_pairs"] == 3
    assert comparison.study_dir is None
    assert "std" in comparison.table


def test_runs_of_one_strategy_with_other_options_are_other_candidates(tune):
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


def test_results_and_plot_of_finished_runs_are_written_to_out(tune, tmp_path):
    runs = [tune(steps, budget="1epoch").run_dir for steps in (HEAD, ALL)]
    tf.compare(runs=runs, baseline=str(runs[1]), out=tmp_path / "out")
    assert read(tmp_path / "out" / "results.json")["baseline"] == "all"
    assert (tmp_path / "out" / "cost.svg").read_text().startswith("<svg xmlns=")


def test_a_run_that_is_not_done_is_refused(tune):
    folder = tune(HEAD, budget="1epoch").run_dir
    (folder / "status.json").write_text('{"state": "stopped"}')
    with pytest.raises(tf.FolderError, match="is not done"):
        tf.compare(runs=[folder])


def test_strategies_and_finished_runs_cannot_be_compared_at_once(tune):
    with pytest.raises(tf.UsageError, match="compared as they are"):
        tf.compare(["full"], runs=["x"])


def test_the_plot_has_a_point_for_each_candidate_with_a_metric(compare):
    comparison = compare({"broken": broken, "head": HEAD, "all": ALL}, baseline="head")
    plot = (comparison.study_dir / "cost.svg").read_text()
    assert "f1_macro on validation" in plot
    for name, drawn in (("head", True), ("all", True), ("broken", False)):
        assert (f">{name}<" in plot) == drawn
    assert "var(--" not in plot
    assert math.isfinite(comparison.costs["head"]["total"])


def test_a_directory_with_other_files_is_refused_and_not_changed(tmp_path):
    kept = tmp_path / "mine" / "sub" / "failure.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    with pytest.raises(tf.FolderError, match="holds other files"):
        tf.compare({"one": "full", "two": "head-only"}, seeds=1, out=tmp_path / "mine")
    assert kept.exists()
    assert not (tmp_path / "mine" / "study.json").exists()
