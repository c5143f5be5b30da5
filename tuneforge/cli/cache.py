"""`tuneforge cache`: the feature cache on disk, which runs share."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

_CACHE_DIR_OPTION = click.Option(
    ["--cache-dir", "cache_dir"],
    type=click.Path(path_type=Path),
    help="Directory of the cache. [default: $TUNEFORGE_CACHE, else the user's cache directory]",
)


@click.group()
def cache() -> None:
    """List or clear the feature cache: outputs of frozen backbones, stored on disk and shared between runs."""


@cache.command("list", params=[_CACHE_DIR_OPTION])
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per entry.")
def list_entries(cache_dir: Path | None, as_json: bool) -> None:
    """List the entries, most recently used first."""
    from tuneforge.engine.feature_cache.disk import DiskCache, default_cache_dir

    disk_cache = DiskCache(cache_dir or default_cache_dir(), 0)
    entries = disk_cache.entries()[::-1]
    if as_json:
        for each in entries:
            click.echo(
                json.dumps({"key": each.path.name, "bytes": each.num_bytes, "used": each.last_used, **each.metadata})
            )
        return
    for each in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.last_used))
        what = f"{each.metadata.get('model')}, {each.metadata.get('samples')} samples of {each.metadata.get('split')}"
        click.echo(f"{each.path.name[:12]}  {each.num_bytes / 2**20:9.1f} MB  {used}  {what}")
    total = sum(each.num_bytes for each in entries)
    click.echo(f"{len(entries)} entries, {total / 2**20:.1f} MB, in {disk_cache.entry_dir('')}")


@cache.command(params=[_CACHE_DIR_OPTION])
@click.argument("key", nargs=-1)
def clear(cache_dir: Path | None, key: tuple[str, ...]) -> None:
    """Delete all entries, or those whose keys start with KEY; runs recompute the features they need."""
    from tuneforge.engine.feature_cache.disk import DiskCache, default_cache_dir
    from tuneforge.errors import UsageError, suggest_name

    disk_cache = DiskCache(cache_dir or default_cache_dir(), 0)
    known = [entry.path.name for entry in disk_cache.entries()]
    for each in key:
        if not any(name.startswith(each) for name in known):
            near = suggest_name(each, [name[:12] for name in known])
            raise UsageError(f"no entry has a key that starts with '{each}'", where=str(disk_cache.directory), fix=near)
    click.echo(f"{disk_cache.clear(key) / 2**20:.1f} MB freed")
