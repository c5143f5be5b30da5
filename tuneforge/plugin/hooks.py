"""The hooks of one run: every trap of the hook library is closed here, in one place.

A component is never registered as it is. What is registered is a stand-in that holds only its hook
implementations, each checked and each guarded: so no property of a plugin runs, a failed registration leaves
nothing behind, and whatever a plugin raises names the plugin.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

import attrs
import pluggy

from tuneforge.errors import PluginError, PluginLoadError, TuneforgeError, close_match
from tuneforge.plugin.hookspecs import CHAINS, PROVIDERS, HookSpecs

_SPECS = {name: inspect.signature(spec) for name, spec in vars(HookSpecs).items() if hasattr(spec, "tuneforge_spec")}


@attrs.frozen(eq=False)
class Member:
    """A component that takes part in a run.

    Args:
        component: The instance.
        name: What the user typed for it.
        label: How messages name it, such as `strategy 'x' of some-package 1.2`.
    """

    component: Any
    name: str
    label: str


@attrs.frozen(eq=False)
class Implementation:
    """One hook implementation of one member, bound and guarded."""

    hook: str
    function: Callable[..., Any]
    wrapper: bool
    marks: dict[str, Any]
    owner: Member


class Hooks:
    """The hooks of one run; `call.train_step(run=run, batch=batch)` calls one."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._found: list[Implementation] = []
        self._manager = pluggy.PluginManager("tuneforge")
        self._manager.add_hookspecs(HookSpecs)
        self.call = _Calls(self)
        for hook, chained in (("model_adapt", self._adapt), ("evaluate", self._evaluate)):
            self._register(hook, chained, {})

    def add(self, member: Member) -> None:
        """Let a component take part, after those already added.

        Raises:
            PluginLoadError: One of its implementations does not fit its hook; then none of them takes part.
        """
        found = implementations(member)
        self.members.append(member)
        self._found += found
        for each in found:
            if each.wrapper or each.hook not in CHAINS:
                self._register(each.hook, each.function, each.marks)
        self.call = _Calls(self)

    def caller(self, hook: str) -> Callable[..., Any]:
        """What calls a hook by keyword: pluggy, or the one provider itself where nothing wraps it.

        That saves 6 of 9 microseconds a call (2 cores, Python 3.11), in each step of training.
        """
        found = [each for each in self._found if each.hook == hook]
        if hook not in PROVIDERS or len(found) != 1 or found[0].wrapper:
            through_pluggy: Callable[..., Any] = getattr(self._manager.hook, hook)
            return through_pluggy
        function, names = found[0].function, tuple(inspect.signature(found[0].function).parameters)
        return lambda **given: function(*[given[name] for name in names])

    def provides(self, hook: str) -> bool:
        """True where some component answers `hook`."""
        return any(each.hook == hook and not each.wrapper for each in self._found)

    def provider(self, hook: str) -> Member:
        """The one component that answers `hook`.

        Raises:
            PluginError: None does, or several do.
        """
        return _sole(hook, self._links(hook)).owner

    def _links(self, hook: str) -> list[Implementation]:
        return [each for each in self._found if each.hook == hook and not each.wrapper]

    def _adapt(self, run: Any, model: Any) -> Any:
        for link in self._links("model_adapt"):
            model = _call(link, run=run, model=model)
            if model is None:
                raise PluginError(
                    f"{link.owner.label} returned no model from model_adapt", fix="end it with: return model"
                )
        return model

    def _evaluate(self, run: Any) -> Any:
        from tuneforge.engine.loop.metric_set import MergedMetrics

        return MergedMetrics([(link.owner.label, _call(link, run=run)) for link in self._links("evaluate")])

    def _register(self, hook: str, function: Callable[..., Any], marks: dict[str, Any]) -> None:
        stand_in = type("StandIn", (), {})()
        marked = functools.wraps(function)(lambda *args: function(*args)) if inspect.ismethod(function) else function
        setattr(stand_in, hook, pluggy.HookimplMarker("tuneforge")(marked, **_marker_arguments(marks)))
        self._manager.register(stand_in, name=f"{hook}:{len(self._found)}:{id(stand_in)}")


class _Calls:
    """Hooks by name, each looked up once."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def __getattr__(self, hook: str) -> Callable[..., Any]:
        caller = self._hooks.caller(hook)
        setattr(self, hook, caller)
        return caller


def implementations(member: Member) -> list[Implementation]:
    """The checked and guarded hook implementations of a component. Runs none of its code.

    Raises:
        PluginLoadError: One is misspelt, has a parameter the hook lacks or one with a default, or is an
            old-style wrapper.
    """
    cls = type(member.component)
    found = []
    for name, hook, marks in check_hooks(cls, member.label):
        wrapper = bool(marks.get("wrapper"))
        bound = inspect.getattr_static(cls, name).__get__(member.component, cls)
        guard = _guarded_wrapper if wrapper else _guarded
        found.append(Implementation(hook, guard(member, hook, bound), wrapper, marks, member))
    return found


def check_hooks(cls: type, label: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The hook implementations of a class: attribute, hook, and marks. Runs none of its code.

    Raises:
        PluginLoadError: As `implementations`.
    """
    found = []
    for name in dir(cls):
        static = inspect.getattr_static(cls, name)
        function = getattr(static, "__func__", static)
        marks = getattr(function, "tuneforge_impl", None) if inspect.isfunction(function) else None
        if marks is None and name in _SPECS and inspect.isfunction(function):
            raise PluginLoadError(
                f"{label} has a method '{name}' that is no hook implementation",
                where=f"{cls.__module__}:{cls.__qualname__}.{name}",
                why="it has a hook's name and no @hookimpl, so it would never be called",
                fix="decorate it with @hookimpl, or give it another name",
            )
        if marks is not None:
            hook = marks.get("specname") or name
            _check(label, hook, f"{cls.__module__}:{cls.__qualname__}.{name}", function, marks)
            found.append((name, hook, marks))
    return found


def guarded_steps(member: Member, steps: Any) -> Generator[Any, Any, str]:
    """Drive a strategy's iterable so that whatever its body raises names the strategy.

    A generator's body runs outside the hook call, so the guard of the hook does not reach it. It returns what the body
    returned: the reason why there is no further step, or "".

    Raises:
        PluginError: The body raised, or a generator returned a value.
    """
    iterator = _named(member, "finetune_strategy", iter, steps)
    answer = None
    try:
        while True:
            try:
                step = iterator.send(answer) if hasattr(iterator, "send") else next(iterator)
            except StopIteration as stop:
                if stop.value is not None and not isinstance(stop.value, str):
                    raise _returned_steps(member, stop.value) from None
                return stop.value or ""
            except (Exception, SystemExit) as error:
                if isinstance(error, AttributeError) and "has no attribute 'send'" in str(error):
                    raise _yield_from(member, error) from error
                raise _failure(member, "finetune_strategy", error) from error
            answer = yield step
    finally:
        if hasattr(iterator, "close"):  # what a generator cleans up, it does now
            _named(member, "finetune_strategy", iterator.close)


def _check(label: str, hook: str, where: str, function: Callable[..., Any], marks: dict[str, Any]) -> None:
    if hook not in _SPECS:
        raise PluginLoadError(
            f"{label} implements a hook '{hook}' that does not exist",
            where=where,
            why="a misspelt hook would never be called",
            fix=close_match(hook, _SPECS),
        )
    if marks.get("hookwrapper") or (marks.get("wrapper") and not inspect.isgeneratorfunction(function)):
        raise PluginLoadError(
            f"{label} has a wrapper of '{hook}' of the wrong form",
            where=where,
            fix="use @hookimpl(wrapper=True) on a generator: result = yield; return result",
        )
    allowed = list(_SPECS[hook].parameters)
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.name not in allowed or parameter.default is not parameter.empty:
            raise PluginLoadError(
                f"{label}: parameter '{parameter.name}' of '{hook}' would never be passed",
                where=where,
                why=f"the hook passes {', '.join(allowed[1:])}, by name, to parameters without a default",
                fix="remove the parameter or its default",
            )


def _guarded(member: Member, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        try:
            return function(*args)
        except TuneforgeError:
            raise
        except (Exception, SystemExit) as error:
            raise _failure(member, hook, error) from error

    return guarded


def _guarded_wrapper(member: Member, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse the two silent mistakes of a wrapper: yielding a value, and forgetting to return the result."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Generator[None, Any, Any]:
        inner = function(*args)
        if _named(member, hook, next, inner) is not None:
            raise PluginError(
                f"{member.label}: the wrapper of '{hook}' yields a value, which would be lost",
                fix="a wrapper's only yield is bare: result = yield",
            )
        try:
            result = yield
        except BaseException as error:  # noqa: BLE001 - a wrapper may handle whatever it wraps, as the hook library lets it
            returned = _named(member, hook, _throw, inner, error)
            return returned
        returned = _named(member, hook, _send, inner, result)
        if returned is None and result is not None:
            raise PluginError(
                f"{member.label}: the wrapper of '{hook}' lost the result", fix="end it with: return result"
            )
        return returned

    return guarded


def _send(generator: Generator[None, Any, Any], value: Any) -> Any:
    try:
        generator.send(value)
    except StopIteration as stop:
        return stop.value
    raise PluginError("a wrapper yielded twice", fix="a wrapper yields exactly once")


def _throw(generator: Generator[None, Any, Any], error: BaseException) -> Any:
    try:
        generator.throw(error)
    except StopIteration as stop:
        return stop.value
    raise PluginError("a wrapper yielded twice", fix="a wrapper yields exactly once")


def _named(member: Member, hook: str, function: Callable[..., Any], *args: Any) -> Any:
    return _guarded(member, hook, function)(*args)


def _failure(member: Member, hook: str, error: BaseException) -> TuneforgeError:
    if isinstance(error, TuneforgeError):
        return error
    return PluginError(
        f"{member.label} failed in {hook}",
        why=f"{type(error).__name__}: {error}",
        fix="see the traceback in the run's log, or run again with --debug",
    )


def _yield_from(member: Member, error: AttributeError) -> PluginError:
    return PluginError(
        f"{member.label} has a `yield from` something that takes no answers",
        why=f"each yield is answered with a report, and {error}",
        fix="loop instead: for step in steps: report = yield step",
    )


def _returned_steps(member: Member, value: Any) -> PluginError:
    return PluginError(
        f"{member.label} returns {type(value).__name__} from a function that also yields",
        why="a generator's return value is not run: it may be a sentence that says why no further step follows",
        fix="yield each step, or return a list and yield nothing",
    )


def _sole(hook: str, providers: list[Implementation]) -> Implementation:
    if len(providers) == 1:
        return providers[0]
    raise PluginError(
        f"{'no component provides' if not providers else 'more than one component provides'} '{hook}'",
        where=" and ".join(each.owner.label for each in providers),
        why="exactly one must" + (", and the last one registered would silently win" if providers else ""),
        fix="name one component for it",
    )


def _call(link: Implementation, **given: Any) -> Any:
    """Call an implementation with those of the hook's parameters that it asks for."""
    return link.function(*(given[name] for name in inspect.signature(link.function).parameters))


def _marker_arguments(marks: dict[str, Any]) -> dict[str, Any]:
    return {key: bool(marks.get(key)) for key in ("wrapper", "tryfirst", "trylast")}
