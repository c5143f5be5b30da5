"""Write docs/hooks.md from the hook specifications: `python docs/generate.py`. A test keeps the two equal."""

import inspect
from pathlib import Path

from tuneforge.plugin import registry
from tuneforge.plugin.hookspecs import CHAINED_HOOKS, PROVIDER_HOOKS, HookSpecs

HEAD = """# Hooks

Written by `docs/generate.py` from `tuneforge/plugin/hookspecs.py`; change them there.

An implementation is a method decorated with `@tuneforge.hookimpl`; it takes those of the hook's parameters that it
needs, by name. Any extension may wrap any hook: `@tuneforge.hookimpl(wrapper=True)`.
"""


def reference() -> str:
    """The whole page."""
    specs = [(name, spec) for name, spec in vars(HookSpecs).items() if hasattr(spec, "tuneforge_spec")]
    return HEAD + "".join(section(name, spec) for name, spec in specs)


def section(name: str, spec: object) -> str:
    """One hook: signature, who answers, and its docstring."""
    parameters = [each for each in inspect.signature(spec).parameters if each != "self"]
    answers = (
        "exactly one component"
        if name in PROVIDER_HOOKS
        else "a chain"
        if name in CHAINED_HOOKS
        else "any number observe"
    )
    flag = f", chosen by `{registry.FLAG_BY_GROUP[name]}`" if name in registry.FLAG_BY_GROUP else ""
    return f"\n## {name}({', '.join(parameters)})\n\n*{answers}{flag}*\n\n{inspect.cleandoc(spec.__doc__ or '')}\n"


if __name__ == "__main__":
    (Path(__file__).parent / "hooks.md").write_text(reference())
