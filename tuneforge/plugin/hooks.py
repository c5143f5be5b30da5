"""The hooks of one run, on top of pluggy.

pluggy reads every attribute of what is registered, keeps a half-registered plugin after an error, and lets errors pass
without the name of the plugin. So each hook implementation is checked and registered by itself, in a wrapper that names
the component in every error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

import attrs
import pluggy

from tuneforge.errors import PluginError, PluginLoadError, TuneforgeError, suggest_name
from tuneforge.plugin.hookspecs import CHAINED_HOOKS, EXIT_HOOKS, PROVIDER_HOOKS, HookSpecs
from tuneforge.plugin.merged_metrics import MergedMetrics

_MAX_YIELDS_OF_CLOSED = 100

_HOOK_SIGNATURES = {
    name: inspect.signature(spec) for name, spec in vars(HookSpecs).items() if hasattr(spec, "tuneforge_spec")
}


@attrs.frozen(eq=False)
class RegisteredComponent:
    """A component of a run.

    Args:
        component: The instance.
        name: The name that the user typed.
        label: The description in messages, such as `strategy 'x' of some-package 1.2`.
    """

    component: Any
    name: str
    label: str


@attrs.frozen(eq=False)
class HookImplementation:
    """One hook implementation of one member, bound and guarded."""

    hook: str
    function: Callable[..., Any]
    wrapper: bool
    hookimpl_opts: dict[str, Any]
    owner: RegisteredComponent


class Hooks:
    """The hooks of one run; `call.train_step(run=run, batch=batch)` calls one.

    Args:
        log: Called with a message for the user where an observer fails.
    """

    def __init__(self, log: Callable[[str], None] = lambda text: None) -> None:
        self._log = log
        self._failed_observers: set[tuple[str, str]] = set()
        self.components: list[RegisteredComponent] = []
        self._implementations: list[HookImplementation] = []
        self._manager = pluggy.PluginManager("tuneforge")
        self._manager.add_hookspecs(HookSpecs)
        self.call = _HookCallers(self)
        for hook, chained in (("model_adapt", self._chain_model_adapt), ("evaluate", self._merge_metrics)):
            self._register(hook, chained, {})

    def add(self, member: RegisteredComponent) -> None:
        """Let a component take part, after those already added.

        Raises:
            PluginLoadError: One of its implementations does not fit its hook; then none of them takes part.
        """
        found = [self._tolerate_errors(each) for each in find_hook_implementations(member)]
        self.components.append(member)
        self._implementations += found
        for each in found:
            if each.wrapper or each.hook not in CHAINED_HOOKS:
                self._register(each.hook, each.function, each.hookimpl_opts)
        self.call = _HookCallers(self)

    def get_caller(self, hook: str) -> Callable[..., Any]:
        """What calls a hook by keyword: pluggy, or the one provider itself where nothing wraps it.

        That saves 6 of 9 microseconds a call (2 cores, Python 3.11), in each step of training.
        """
        found = [each for each in self._implementations if each.hook == hook]
        if hook not in PROVIDER_HOOKS or len(found) != 1 or found[0].wrapper:
            through_pluggy: Callable[..., Any] = getattr(self._manager.hook, hook)
            return through_pluggy
        function, names = found[0].function, tuple(inspect.signature(found[0].function).parameters)
        return lambda **given: function(*[given[name] for name in names])

    def has_provider(self, hook: str) -> bool:
        """True where some component answers `hook`."""
        return any(each.hook == hook and not each.wrapper for each in self._implementations)

    def get_provider(self, hook: str) -> RegisteredComponent:
        """The one component that answers `hook`.

        Raises:
            PluginError: None does, or several do.
        """
        return _require_single_provider(hook, self._get_providers(hook)).owner

    def get_owners(self, hook: str) -> list[RegisteredComponent]:
        """Return the components that implement `hook` or wrap it."""
        return [each.owner for each in self._implementations if each.hook == hook]

    def _get_providers(self, hook: str) -> list[HookImplementation]:
        return [each for each in self._implementations if each.hook == hook and not each.wrapper]

    def _tolerate_errors(self, found: HookImplementation) -> HookImplementation:
        """Return the implementation of a hook; if it only observes, its errors are logged, each once.

        Raises:
            PluginLoadError: An observer implements or wraps a hook that returns something.
        """
        is_observer = getattr(type(found.owner.component), "__tuneforge_observer__", False)
        if not is_observer and found.hook not in EXIT_HOOKS:
            return found
        if found.wrapper or found.hook in (*PROVIDER_HOOKS, *CHAINED_HOOKS):
            raise PluginLoadError(
                f"{found.owner.label} is declared as an observer, and {'wraps' if found.wrapper else 'implements'} "
                f"'{found.hook}'",
                why="an observer returns nothing to the run",
                fix="remove observer=True, or the hook",
            )

        @functools.wraps(found.function)
        def tolerant(*args: Any) -> None:
            try:
                found.function(*args)
            except Exception as error:  # noqa: BLE001 - training goes on, whatever fails in a component that observes
                if (found.owner.label, found.hook) not in self._failed_observers:
                    self._failed_observers.add((found.owner.label, found.hook))
                    why = getattr(error, "why", "") or str(error)
                    self._log(f"warning: {found.owner.label} failed in {found.hook}: {why}; the run goes on without it")

        return attrs.evolve(found, function=tolerant)

    def _chain_model_adapt(self, run: Any, model: Any) -> Any:
        for link in self._get_providers("model_adapt"):
            given = model
            model = _call_with_accepted(link, run=run, model=given)
            if model is None:
                raise PluginError(
                    f"{link.owner.label} returned no model from model_adapt", fix="end it with: return model"
                )
            if not hasattr(model, "with_head"):
                if given is not None:
                    raise PluginError(
                        f"{link.owner.label} returned {type(model).__name__} from model_adapt",
                        why="an adapter changes the model that it gets, whose layer groups and classes go on with it",
                        fix="return model.with_head(...) or attrs.evolve(model, module=...)",
                    )
                model = run.as_model(model)
        return model

    def _merge_metrics(self, run: Any) -> Any:
        return MergedMetrics(
            [(link.owner.label, _call_with_accepted(link, run=run)) for link in self._get_providers("evaluate")]
        )

    def _register(self, hook: str, function: Callable[..., Any], marks: dict[str, Any]) -> None:
        stand_in = type("StandIn", (), {})()
        marked = functools.wraps(function)(lambda *args: function(*args)) if inspect.ismethod(function) else function
        setattr(stand_in, hook, pluggy.HookimplMarker("tuneforge")(marked, **_marker_arguments(marks)))
        self._manager.register(stand_in, name=f"{hook}:{len(self._implementations)}:{id(stand_in)}")


class _HookCallers:
    """Callers of hooks by name, each created once."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def __getattr__(self, hook: str) -> Callable[..., Any]:
        caller = self._hooks.get_caller(hook)
        setattr(self, hook, caller)
        return caller


def find_hook_implementations(member: RegisteredComponent) -> list[HookImplementation]:
    """Return the hook implementations of a component, checked and wrapped. None of its code is executed.

    Raises:
        PluginLoadError: A name is misspelled, a parameter is unknown to the hook or has a default, or it is an
            old-style wrapper.
    """
    cls = type(member.component)
    found = []
    for name, hook, marks in find_hook_methods(cls, member.label):
        wrapper = bool(marks.get("wrapper"))
        bound = inspect.getattr_static(cls, name).__get__(member.component, cls)
        guard = _wrap_wrapper_errors if wrapper else _wrap_errors
        found.append(HookImplementation(hook, guard(member, hook, bound), wrapper, marks, member))
    return found


def find_hook_methods(cls: type, label: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the hook implementations of a class: attribute, hook and marks. None of its code is executed.

    Raises:
        PluginLoadError: As `find_hook_implementations`.
    """
    found = []
    for name in dir(cls):
        static = inspect.getattr_static(cls, name)
        function = getattr(static, "__func__", static)
        marks = getattr(function, "tuneforge_impl", None) if inspect.isfunction(function) else None
        if marks is None and name in _HOOK_SIGNATURES and inspect.isfunction(function):
            raise PluginLoadError(
                f"{label} has a method '{name}' that is no hook implementation",
                where=f"{cls.__module__}:{cls.__qualname__}.{name}",
                why="it has a hook's name and no @hookimpl, so it would never be called",
                fix="decorate it with @hookimpl, or give it another name",
            )
        if marks is not None:
            hook = marks.get("specname") or name
            _check_signature(label, hook, f"{cls.__module__}:{cls.__qualname__}.{name}", function, marks)
            found.append((name, hook, marks))
    return found


def iterate_strategy(member: RegisteredComponent, steps: Any) -> Generator[Any, Any, str]:
    """Iterate over the steps of a strategy so that an error in its body names the strategy.

    The body of a generator runs outside the hook call, so the wrapper of the hook does not catch its errors. This
    returns what the body returned: the reason why there is no further step, or "".

    Raises:
        PluginError: The body raised, or a generator returned a value.
    """
    iterator = _call_wrapped(member, "finetune_strategy", iter, steps)
    answer = None
    try:
        while True:
            try:
                step = iterator.send(answer) if hasattr(iterator, "send") else next(iterator)
            except StopIteration as stop:
                if stop.value is not None and not isinstance(stop.value, str):
                    raise _return_value_error(member, stop.value) from None
                return stop.value or ""
            except (Exception, SystemExit) as error:
                if isinstance(error, AttributeError) and "has no attribute 'send'" in str(error):
                    raise _yield_from_error(member, error) from error
                raise _to_plugin_error(member, "finetune_strategy", error) from error
            answer = yield step
    finally:
        if hasattr(iterator, "close"):  # what a generator cleans up, it does now
            _call_wrapped(member, "finetune_strategy", _close_fully, iterator)


def _close_fully(iterator: Any) -> None:
    """Close a generator; one that yields while it is closed stays suspended, so it is closed until it ends."""
    num_yields = 0
    while num_yields < _MAX_YIELDS_OF_CLOSED:
        try:
            iterator.close()
            break
        except RuntimeError as error:
            if "ignored GeneratorExit" not in str(error):
                raise
            num_yields += 1
    if num_yields:
        raise RuntimeError("it yields another step while it is closed")


def _check_signature(label: str, hook: str, where: str, function: Callable[..., Any], marks: dict[str, Any]) -> None:
    if hook not in _HOOK_SIGNATURES:
        raise PluginLoadError(
            f"{label} implements a hook '{hook}' that does not exist",
            where=where,
            why="a misspelt hook would never be called",
            fix=suggest_name(hook, _HOOK_SIGNATURES),
        )
    if marks.get("hookwrapper") or (marks.get("wrapper") and not inspect.isgeneratorfunction(function)):
        raise PluginLoadError(
            f"{label} has a wrapper of '{hook}' of the wrong form",
            where=where,
            fix="use @hookimpl(wrapper=True) on a generator: result = yield; return result",
        )
    allowed = list(_HOOK_SIGNATURES[hook].parameters)
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.name not in allowed or parameter.default is not parameter.empty:
            raise PluginLoadError(
                f"{label}: parameter '{parameter.name}' of '{hook}' would never be passed",
                where=where,
                why=f"the hook passes {', '.join(allowed[1:])}, by name, to parameters without a default",
                fix="remove the parameter or its default",
            )


def _wrap_errors(member: RegisteredComponent, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        try:
            return function(*args)
        except TuneforgeError:
            raise
        except (Exception, SystemExit) as error:
            raise _to_plugin_error(member, hook, error) from error

    return guarded


def _wrap_wrapper_errors(member: RegisteredComponent, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse two silent errors of a wrapper: yielding a value, and not returning the result."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Generator[None, Any, Any]:
        inner = function(*args)
        if _call_wrapped(member, hook, next, inner) is not None:
            raise PluginError(
                f"{member.label}: the wrapper of '{hook}' yields a value, which would be lost",
                fix="a wrapper's only yield is bare: result = yield",
            )
        try:
            result = yield
        except BaseException as error:  # noqa: BLE001 - a wrapper may handle whatever it wraps, as the hook library lets it
            returned = _call_wrapped(member, hook, _throw_into_wrapper, inner, error)
            return returned
        returned = _call_wrapped(member, hook, _send_to_wrapper, inner, result)
        if returned is None and result is not None:
            raise PluginError(
                f"{member.label}: the wrapper of '{hook}' lost the result", fix="end it with: return result"
            )
        return returned

    return guarded


def _send_to_wrapper(generator: Generator[None, Any, Any], value: Any) -> Any:
    try:
        generator.send(value)
    except StopIteration as stop:
        return stop.value
    raise PluginError("a wrapper yielded twice", fix="a wrapper yields exactly once")


def _throw_into_wrapper(generator: Generator[None, Any, Any], error: BaseException) -> Any:
    try:
        generator.throw(error)
    except StopIteration as stop:
        return stop.value
    raise PluginError("a wrapper yielded twice", fix="a wrapper yields exactly once")


def _call_wrapped(member: RegisteredComponent, hook: str, function: Callable[..., Any], *args: Any) -> Any:
    return _wrap_errors(member, hook, function)(*args)


def _to_plugin_error(member: RegisteredComponent, hook: str, error: BaseException) -> TuneforgeError:
    if isinstance(error, TuneforgeError):
        return error
    return PluginError(
        f"{member.label} failed in {hook}",
        why=f"{type(error).__name__}: {error}",
        fix="see the traceback in the run's log, or run again with --debug",
    )


def _yield_from_error(member: RegisteredComponent, error: AttributeError) -> PluginError:
    return PluginError(
        f"{member.label} has a `yield from` something that takes no answers",
        why=f"each yield is answered with a report, and {error}",
        fix="loop instead: for step in steps: report = yield step",
    )


def _return_value_error(member: RegisteredComponent, value: Any) -> PluginError:
    return PluginError(
        f"{member.label} returns {type(value).__name__} from a function that also yields",
        why="a generator's return value is not run: it may be a sentence that says why no further step follows",
        fix="yield each step, or return a list and yield nothing",
    )


def _require_single_provider(hook: str, providers: list[HookImplementation]) -> HookImplementation:
    if len(providers) == 1:
        return providers[0]
    raise PluginError(
        f"{'no component provides' if not providers else 'more than one component provides'} '{hook}'",
        where=" and ".join(each.owner.label for each in providers),
        why="exactly one must" + (", and the last one registered would silently win" if providers else ""),
        fix="name one component for it",
    )


def _call_with_accepted(link: HookImplementation, **given: Any) -> Any:
    """Call an implementation with those of the hook's parameters that it asks for."""
    return link.function(*(given[name] for name in inspect.signature(link.function).parameters))


def _marker_arguments(marks: dict[str, Any]) -> dict[str, Any]:
    return {key: bool(marks.get(key)) for key in ("wrapper", "tryfirst", "trylast")}
