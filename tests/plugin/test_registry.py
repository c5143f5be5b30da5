import subprocess
import sys

import pytest

import tuneforge as tf
from tuneforge.plugin import hookspecs, registry

GOOD = """
import tuneforge as tf
@tf.component(api=1)
class Mine:
    "A strategy."
    @tf.hookimpl
    def finetune_strategy(self):
        return []
"""
GROUP = "tuneforge.finetune_strategy"


def test_groups_are_those_of_the_hook_specifications():
    assert (*hookspecs.COMPONENT_GROUPS, *hookspecs.NON_HOOK_GROUPS) == registry.GROUPS


def test_every_builtin_component_loads():
    builtin = [entry for entry in registry.list_components() if entry.distribution == "tuneforge"]
    assert len(builtin) > 40
    for entry in builtin:
        assert registry.load_component(entry).__doc__


def test_entries_with_one_target_are_aliases_and_the_class_names_the_component():
    entry = registry.find_component("finetune_strategy", "fine_tune")
    assert entry.name == "freeze-then-unfreeze"
    assert entry.aliases == ("fine_tune", "freeze_unfreeze")


def test_listing_imports_no_plugin(plant):
    plant("bad-import", {GROUP: {"boom": "boom_mod:Boom"}}, boom_mod="raise ImportError('no such luck')")
    assert "boom" in [entry.name for entry in registry.list_components()]
    assert "boom_mod" not in sys.modules


@pytest.mark.parametrize("cause", ["raise ImportError('no such luck')", "raise SystemExit(3)", "1/0", "def ("])
def test_a_plugin_that_does_not_import_names_distribution_cause_and_fix(plant, cause):
    plant("bad-import", {GROUP: {"boom": "boom_mod:Boom"}}, boom_mod=cause)
    with pytest.raises(tf.PluginLoadError) as caught:
        registry.load_component(registry.find_component("finetune_strategy", "boom"))
    assert "bad-import 1.0" in str(caught.value)
    assert "pip uninstall bad-import" in str(caught.value)


def test_another_api_version_is_refused_before_any_hook_runs(plant):
    plant("old-api", {GROUP: {"old": "old_mod:Mine"}}, old_mod=GOOD.replace("api=1", "api=0"))
    with pytest.raises(tf.PluginLoadError, match="plugin API 0"):
        registry.load_component(registry.find_component("finetune_strategy", "old"))


def test_a_target_that_is_no_component_is_refused(plant):
    plant("no-comp", {GROUP: {"no": "no_mod:X"}}, no_mod="class X: pass")
    with pytest.raises(tf.PluginLoadError, match="not a component"):
        registry.load_component(registry.find_component("finetune_strategy", "no"))


def test_a_clash_is_an_error_only_for_the_bare_name(plant):
    plant("one-pkg", {GROUP: {"same": "mod_one:Mine"}}, mod_one=GOOD)
    plant("two-pkg", {GROUP: {"same": "mod_two:Mine", "free": "mod_two:Mine"}}, mod_two=GOOD)
    with pytest.raises(tf.UnknownNameError, match="one-pkg 1.0 and two-pkg 1.0"):
        registry.find_component("finetune_strategy", "same")
    assert registry.find_component("finetune_strategy", "two-pkg/same").distribution == "two-pkg"
    assert registry.find_component("finetune_strategy", "two_pkg/same").distribution == "two-pkg"


def test_a_builtin_keeps_its_bare_name(plant):
    plant("impostor", {GROUP: {"full": "mod_full:Mine"}}, mod_full=GOOD)
    assert registry.find_component("finetune_strategy", "full").distribution == "tuneforge"
    assert registry.find_component("finetune_strategy", "impostor/full").distribution == "impostor"


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(tf.UnknownNameError, match="did you mean 'freeze-then-unfreeze'"):
        registry.find_component("finetune_strategy", "freze-then-unfreeze")


def test_local_code_needs_no_package(plant):
    plant("unrelated", {}, local_mod=GOOD)
    assert registry.load_component(registry.find_component("finetune_strategy", "local_mod:Mine")).__name__ == "Mine"


def test_a_distribution_with_unreadable_metadata_hides_no_other(plant, tmp_path):
    plant("fine-pkg", {GROUP: {"fine": "fine_mod:Mine"}}, fine_mod=GOOD)
    broken = tmp_path / "site" / "broken-2.0.dist-info"
    broken.mkdir()
    (broken / "entry_points.txt").write_bytes(b"[tuneforge.finetune_strategy]\n\xff\xfe = :\n[[[\n")
    registry.clear_cache()
    assert registry.find_component("finetune_strategy", "fine").name == "fine"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plugins", "list"], ["run", "--strategy", "full", "--help"], ["run", "--callback", "ema", "--help"]],
)
def test_helping_and_listing_import_no_torch(arguments):
    code = (
        "import sys; from tuneforge.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and code == 0, sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
