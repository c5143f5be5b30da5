"""`tuneforge cache`: what frozen models gave for each sample, kept on disk and shared between runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

_FOLDER = click.Option(
    ["--cache-dir", "folder"],
    type=click.Path(path_type=Path),
    help="Folder of the cache. [default: $TUNEFORGE_CACHE, else the user's cache folder]",
)


@click.group()
def cache() -> None:
    """List or clear the features that frozen models gave, kept on disk and shared between runs."""


@cache.command("list", params=[_FOLDER])
@click.option("--json", "as_json", is_flag=True, help="One JSON object an entry.")
def list_entries(folder: Path | None, as_json: bool) -> None:
    """List the entries, the most recently used first."""
    from tuneforge.engine.feature_cache.disk import Store, default_folder

    store = Store(folder or default_folder(), 0)
    entries = store.entries()[::-1]
    if as_json:
        for each in entries:
            click.echo(json.dumps({"key": each.path.name, "bytes": each.num_bytes, "used": each.used, **each.about}))
        return
    for each in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
        what = f"{each.about.get('model')}, {each.about.get('samples')} samples of {each.about.get('split')}"
        click.echo(f"{each.path.name[:12]}  {each.num_bytes / 2**20:9.1f} MB  {used}  {what}")
    total = sum(each.num_bytes for each in entries)
    click.echo(f"{len(entries)} entries, {total / 2**20:.1f} MB, in {store.path_of('')}")


@cache.command(params=[_FOLDER])
@click.argument("key", nargs=-1)
def clear(folder: Path | None, key: tuple[str, ...]) -> None:
    """Delete all entries, or those whose keys begin with KEY; runs compute again what they need."""
    from tuneforge.engine.feature_cache.disk import Store, default_folder
    from tuneforge.errors import UsageError, close_match

    store = Store(folder or default_folder(), 0)
    known = [entry.path.name for entry in store.entries()]
    for each in key:
        if not any(name.startswith(each) for name in known):
            near = close_match(each, [name[:12] for name in known])
            raise UsageError(f"no entry's key begins with '{each}'", where=str(store.folder), fix=near)
    click.echo(f"{store.clear(key) / 2**20:.1f} MB freed")
