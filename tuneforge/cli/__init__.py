"""The command line: one file per verb, imported when it is used. Help and lists import neither torch nor plugins."""

from __future__ import annotations

import importlib
import keyword

import click

from tuneforge.plugin.commands import installed_commands, load_command

SECTIONS: dict[str, dict[str, str]] = {
    "prepare": {
        "import": "Convert a .pth weight file from elsewhere to safetensors, without executing its code.",
    },
    "train": {
        "run": "Fine-tune a model on your data, and write a report.",
        "resume": "Resume a run that was stopped or killed.",
        "lr-find": "Suggest a learning rate: try a range of them, one optimizer step each.",
        "cache": "List or clear the feature cache: outputs of frozen backbones, kept on disk.",
    },
    "evaluate": {
        "evaluate": "Evaluate a finished run again, on its own data or on other data.",
        "predict": "Predict a file, or every file of a folder, with a finished run.",
        "compare": "Compare strategies on your data at equal cost, or compare finished runs.",
        "report": "Print the metrics of a finished run, and write report.html again.",
    },
    "deploy": {
        "export": "Export a finished run as a bundle (ONNX or safetensors), checked for parity.",
    },
    "extend": {
        "plugins": "List, show and check the installed components.",
        "doctor": "Show the machine, the installed packages and the device.",
    },
}
"""The verbs of the core with their help lines, by section. Plugins add verbs to these sections or to others."""


class LazyGroup(click.Group):
    """A group whose commands are imported when used: those of the core and those of plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every verb, by section."""
        return [name for verbs in _sections().values() for name in verbs]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None if no distribution ships it."""
        if cmd_name in _builtin_verbs():
            name = cmd_name.replace("-", "_")
            name += "_" * keyword.iskeyword(name)
            command: click.Command = getattr(importlib.import_module(f"tuneforge.cli.{name}"), name)
            return command
        if cmd_name in self.list_commands(ctx):
            plugin_command: click.Command = load_command(cmd_name)
            return plugin_command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or raise an error with the nearest verb or the distribution to install."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in _builtin_verbs():
            load_command(name, builtin=_builtin_verbs())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs by section, without importing them."""
        for section, verbs in _sections().items():
            with formatter.section(f"Commands to {section}" if section in SECTIONS else f"Commands: {section}"):
                formatter.write_dl(list(verbs.items()))


def _builtin_verbs() -> list[str]:
    return [name for verbs in SECTIONS.values() for name in verbs]


def _sections() -> dict[str, dict[str, str]]:
    """Return the verbs of the core and of installed plugins, with their help lines."""
    sections = {section: dict(verbs) for section, verbs in SECTIONS.items()}
    builtin = _builtin_verbs()
    for entry in installed_commands():
        if entry.name not in builtin:
            sections.setdefault(entry.section, {}).setdefault(entry.name, entry.help)
    return sections


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tuneforge", prog_name="tuneforge")
def cli() -> None:
    """Fine-tune a pretrained PyTorch model on your own data, and compare strategies.

    Start with: tuneforge run --strategy freeze-then-unfreeze

    Add --debug to any command to see the traceback of an error.
    """
