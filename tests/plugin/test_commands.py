"""Verbs that other distributions ship: listed from data, imported when used, and harmless when broken."""

import sys

import pytest

from tuneforge.__main__ import main
from tuneforge.plugin import commands

GREET = """import click
@click.command()
def greet():
    "Say hello."
    click.echo("hello")
    return 3
not_a_command = 5
"""


@pytest.fixture
def ship(plant, tmp_path):
    """Install a distribution with verbs, and its help file beside its modules."""

    def add(distribution, verbs, *, help_file=None, **modules):
        commands._installed_commands.cache_clear()
        plant(distribution, {"tuneforge.command": verbs}, **modules)
        if help_file is not None:
            (tmp_path / "site" / commands.HELP_FILE).write_text(help_file)

    yield add
    commands._installed_commands.cache_clear()


def test_a_verb_is_listed_without_an_import_and_runs(ship, capsys):
    ship(
        "pkg-greet",
        {"greet": "greeting:greet"},
        help_file='[greet]\nsection = "deploy"\nhelp = "Say hello."\n',
        greeting=GREET,
    )
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    deploy = shown[shown.index("Commands to deploy") :]
    assert "greet" in deploy[: deploy.index("Commands to extend")]
    assert "Say hello." in deploy
    assert "greeting" not in sys.modules
    assert main(["greet"]) == 3
    assert capsys.readouterr().out == "hello\n"


def test_a_verb_without_a_help_file_is_listed_under_its_distribution(ship, capsys):
    ship("pkg-greet", {"greet": "greeting:greet"}, greeting=GREET)
    main(["--help"])
    assert "(of pkg-greet 1.0)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[greet", "greet = 5", "[greet]\nhelp = 5\nsection = []", "\x00"])
def test_a_broken_help_file_affects_no_other_command(ship, capsys, text):
    ship("pkg-greet", {"greet": "greeting:greet"}, help_file=text, greeting=GREET)
    assert main(["--help"]) == 0
    assert "greet" in capsys.readouterr().out
    assert main(["greet"]) == 3


@pytest.mark.parametrize(
    ("target", "source", "words"),
    [
        ("absent_module:greet", "", "ModuleNotFoundError"),
        ("greeting:absent", GREET, "AttributeError"),
        ("greeting:not_a_command", GREET, "it is int"),
        ("greeting:greet", "raise SystemExit(9)", "SystemExit"),
        ("greeting:greet", "1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_broken_verb_names_its_distribution_and_breaks_nothing_else(ship, capsys, target, source, words):
    ship("pkg-broken", {"greet": target}, greeting=source)
    assert main(["greet"]) == 2
    shown = capsys.readouterr().err
    assert "pkg-broken 1.0" in shown
    assert words in shown
    assert main(["plugins", "list"]) == 0


def test_two_distributions_that_ship_one_verb_are_named_when_it_is_used(ship, capsys):
    ship("pkg-one", {"greet": "greeting:greet"}, greeting=GREET)
    ship("pkg-two", {"greet": "greeting:greet"})
    assert main(["--help"]) == 0
    assert main(["greet"]) == 2
    assert "pkg-one and pkg-two" in capsys.readouterr().err


def test_a_verb_of_the_core_cannot_be_replaced(ship, capsys):
    ship("pkg-thief", {"doctor": "greeting:greet"}, greeting=GREET)
    main(["doctor", "--help"])
    assert "Say hello" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["serve", "promote", "models", "test-endpoint", "retrain", "data"])
def test_a_verb_that_is_not_installed_says_what_to_install(monkeypatch, capsys, verb):
    monkeypatch.setattr(commands, "_installed_commands", lambda path: ())
    assert main([verb]) == 69
    assert f"pip install {commands.OFFICIAL_VERBS[verb]}" in capsys.readouterr().err


def test_a_misspelled_verb_suggests_the_nearest(capsys):
    assert main(["runn"]) == 2
    assert "did you mean 'run'?" in capsys.readouterr().err
