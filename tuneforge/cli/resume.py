"""`tuneforge resume`: go on with a run that was stopped or killed."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="[RUN]", required=False)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
def resume(folder: Path | None, as_json: bool) -> None:
    """Go on with a run that was stopped or killed, as if nothing had happened; by default the newest under runs/.

    It takes no other flags: what decides the run is in its folder, and stays as it was.
    """
    from tuneforge.cli.run import carry_out
    from tuneforge.engine.engine import Engine
    from tuneforge.engine.memory import resumable
    from tuneforge.errors import FolderError

    if folder is None:
        found = resumable(Path("runs"))
        if not found:
            raise FolderError(
                "there is no run to go on with",
                where="runs/",
                why="all of them are done",
                fix="name one: tuneforge resume RUN",
            )
        folder = found[-1]
    carry_out(lambda screen: Engine.resume(folder, say=screen.say, also=[screen]), as_json=as_json)
