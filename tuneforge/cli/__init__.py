"""The command line: one file a verb, imported when it is used. Helping and listing import neither torch nor plugins."""

from __future__ import annotations

import importlib
import keyword

import click

STAGES: dict[str, dict[str, str]] = {
    "prepare": {
        "data": "Check pictures: broken files, copies across splits, labels that are likely wrong.",
        "import": "Make a foreign .pth file of weights into safetensors, without running what is in it.",
    },
    "tune": {
        "run": "Tune a model: data, model, strategy, report.",
        "resume": "Go on with a run that was stopped or killed.",
        "lr-find": "Suggest a learning rate: the loss after one step at each of a range of them.",
        "cache": "List or clear what frozen models gave for each sample, kept on disk.",
    },
    "judge": {
        "evaluate": "Evaluate a finished run again, on its own data or on others.",
        "predict": "Predict with a finished run: a file or a folder of them.",
        "compare": "Race strategies on your data at equal cost, or compare finished runs.",
        "report": "Print a finished run's figures, and write its page again.",
    },
    "ship": {
        "export": "Write a finished run as a bundle: ONNX or safetensors, proved to answer as before.",
        "promote": "Make a run the champion of a name, if it is better.",
        "models": "List the models of a store, show one, or go back to an earlier version.",
        "serve": "Serve a run, a bundle or a store's champions over HTTP, with a page to try it.",
        "test": "Send the test split to a server, and compare its figures with the offline report.",
        "retune": "Tune the champion on labelled feedback, and promote the result through the gate.",
    },
    "extend": {
        "plugins": "List, show and check the components that are installed.",
        "doctor": "Say what this machine and this environment have.",
    },
}
"""Every command with its one-line help, by stage of the work."""


class CommandGroup(click.Group):
    """A group whose commands are imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, by stage."""
        return [name for verbs in STAGES.values() for name in verbs]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        name = cmd_name.replace("-", "_")
        name += "_" * keyword.iskeyword(name)
        command: click.Command = getattr(importlib.import_module(f"tuneforge.cli.{name}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or offer the nearest."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            from tuneforge.errors import UnknownNameError, suggest_name

            raise UnknownNameError(f"there is no command '{name}'", fix=suggest_name(name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands by stage, without importing them."""
        for stage, verbs in STAGES.items():
            with formatter.section(f"Commands to {stage}"):
                formatter.write_dl(list(verbs.items()))


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tuneforge", prog_name="tuneforge")
def cli() -> None:
    """Fine-tune a pretrained PyTorch model on your data, and see which recipe was better.

    Start with: tuneforge run --strategy freeze-then-unfreeze

    With --debug anywhere, an error comes with its traceback.
    """
