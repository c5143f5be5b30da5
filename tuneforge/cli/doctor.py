"""`tuneforge doctor`: show the machine, the installed packages and the device."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from typing import Any

import click

_PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "pluggy", "attrs", "click", "safetensors")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Show the machine, the installed packages and the device. The exit code is 2 if a required package is missing."""
    facts = {**_machine(), "packages": {name: _version(name) for name in _PACKAGES}, **_torch(), **_plugins()}
    missing = [name for name, version in facts["packages"].items() if version is None]
    if as_json:
        click.echo(json.dumps({**facts, "missing": missing}, indent=1))
    else:
        for key, value in facts.items():
            click.echo(f"{key + ':':<16}{_format_value(value)}")
        click.echo(f"missing:        {', '.join(missing)}" if missing else "all required packages are installed")
    return 2 if missing else 0


def _machine() -> dict[str, Any]:
    free_gb = shutil.disk_usage(".").free / 1e9
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    writable = os.access(".", os.W_OK)
    return {
        "python": f"{platform.python_version()} at {sys.prefix}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory_gb:.0f} GB of memory",
        "this directory": f"{'writable' if writable else 'NOT writable'}, {free_gb:.0f} GB free",
    }


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item or 'MISSING'}" for name, item in value.items())
    return str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a torch that does not import is a finding, not a crash
        return {"torch": f"does not import: {type(error).__name__}: {error}"}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {"device": f"--device auto selects {accelerator or 'cpu'}; {threads} threads, {capability}"}


def _plugins() -> dict[str, Any]:
    from tuneforge.plugin import registry

    entries = registry.list_components()
    others = sorted(
        {
            f"{entry.distribution} {entry.version}"
            for entry in entries
            if entry.distribution != registry.BUILTIN_DISTRIBUTION
        }
    )
    return {"components": f"{len(entries)} installed; other distributions: {', '.join(others) or 'none'}"}
