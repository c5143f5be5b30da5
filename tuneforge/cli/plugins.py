"""`tuneforge plugins`: list the installed components with their names and distributions."""

from __future__ import annotations

import json

import click

from tuneforge.plugin import registry
from tuneforge.report.text_table import format_table


@click.group()
def plugins() -> None:
    """List, show and check the installed components."""


@plugins.command("list")
@click.option("--hook", metavar="HOOK", help="Only components of this hook.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(hook: str | None, as_json: bool) -> None:
    """List every component with its hook, name, aliases, distribution and version. No plugin is imported."""
    entries = registry.list_components() if hook is None else registry.list_components_of_group(hook)
    if as_json:
        content = [
            {
                "hook": entry.group, "name": entry.name, "aliases": list(entry.aliases),
                "distribution": entry.distribution, "version": entry.version, "target": entry.target,
            }
            for entry in entries
        ]  # fmt: skip
        click.echo(json.dumps(content, indent=1))
        return
    rows = [
        (entry.group, entry.name, ", ".join(entry.aliases), f"{entry.distribution} {entry.version}")
        for entry in entries
    ]
    click.echo("\n".join(format_table(("HOOK", "NAME", "ALIASES", "DISTRIBUTION"), rows)))


@plugins.command()
@click.argument("name")
@click.option("--hook", metavar="HOOK", help="The hook, if components of several hooks have this name.")
@click.option("--json-schema", is_flag=True, help="Print the JSON Schema of its options.")
def show(name: str, hook: str | None, json_schema: bool) -> None:
    """Show one component: its description, its options and its distribution."""
    for position, entry in enumerate(_find_entries(name, hook)):
        if position:
            click.echo()
        _show(entry, json_schema=json_schema)


@plugins.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(as_json: bool) -> int:
    """Load every installed component and list those that fail. The exit code is 2 if one fails."""
    from tuneforge.errors import TuneforgeError
    from tuneforge.plugin.declaration import get_options
    from tuneforge.plugin.hooks import find_hook_methods

    verdicts = []
    for entry in registry.list_components():
        try:
            cls = registry.load_component(entry)
            get_options(cls)
            find_hook_methods(cls, registry.describe_component(entry))
            problem = None
        except TuneforgeError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - a broken declaration of any kind is what this command looks for
            problem = f"{type(error).__name__}: {error}"
        verdicts.append({"component": registry.describe_component(entry), "target": entry.target, "problem": problem})
    broken = [verdict for verdict in verdicts if verdict["problem"]]
    if as_json:
        click.echo(json.dumps(verdicts, indent=1))
    else:
        for clash in _describe_clashes():
            click.echo(clash)
        for verdict in broken:
            click.echo(f"broken: {verdict['component']}: {verdict['problem']}")
        click.echo(f"{len(verdicts) - len(broken)} of {len(verdicts)} components load")
    return 2 if broken else 0


def _describe_clashes() -> list[str]:
    """Return a line for each name that several distributions install for one hook."""
    owners: dict[tuple[str, str], list[str]] = {}
    for entry in registry.list_components():
        for name in (entry.name, *entry.aliases):
            owners.setdefault((entry.group, name), []).append(entry.distribution)
    return [
        f"clash: {registry.NOUN_BY_GROUP[group]} '{name}' is installed by {' and '.join(found)}; "
        + (
            f"the bare name means {registry.BUILTIN_DISTRIBUTION}'s"
            if registry.BUILTIN_DISTRIBUTION in found
            else "the bare name is refused"
        )
        + f"; write {' or '.join(f'{each}/{name}' for each in found)}"
        for (group, name), found in owners.items()
        if len(set(found)) > 1
    ]


def _find_entries(name: str, hook: str | None) -> list[registry.ComponentEntry]:
    from tuneforge.errors import UnknownNameError, suggest_name

    if hook is not None:
        return [registry.find_component(hook, name)]
    bare = name.rpartition("/")[2]
    groups = {entry.group for entry in registry.list_components() if bare == entry.name or bare in entry.aliases}
    if not groups:
        names = [each for entry in registry.list_components() for each in (entry.name, *entry.aliases)]
        raise UnknownNameError(
            f"no component '{name}' is installed", fix=f"{suggest_name(name, names)} See: tuneforge plugins list"
        )
    return [registry.find_component(group, name) for group in registry.GROUPS if group in groups]


def _show(entry: registry.ComponentEntry, *, json_schema: bool) -> None:
    import inspect

    from tuneforge.plugin.command_options import format_default
    from tuneforge.plugin.declaration import build_json_schema, describe_type, get_options

    cls = registry.load_component(entry)
    if json_schema:
        click.echo(json.dumps(build_json_schema(cls), indent=1, default=list))
        return
    click.echo(f"{entry.name}: {registry.NOUN_BY_GROUP[entry.group]}, {entry.distribution} {entry.version}")
    if entry.aliases:
        click.echo(f"also called: {', '.join(entry.aliases)}")
    click.echo(f"\n{inspect.cleandoc(cls.__doc__ or 'No description.')}\n")
    for option in get_options(cls).values():
        rule = f", {option.check.text}" if option.check else ""
        click.echo(f"  {option.key} ({describe_type(option.type)}{rule}): {option.help} {format_default(option)}")
