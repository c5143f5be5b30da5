"""Verify a cut before it is trusted: training steps and evaluation passes of the whole model and of its two parts.

Both run on a batch of samples from the beginning, the middle and the end of the training split, as a phase trains: at
the batch size and in the memory layout of the feature extraction, through the component that computes the loss, in the
modes of the phase, with gradients, from the same seeds. Outputs, gradients, buffers, parameters and random draws must
be bit-identical, and a step must not change a plain attribute of the model, which a trace would not repeat.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.batches import make_batch
from tuneforge.engine.context.forward import Features
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, named_tensors
from tuneforge.engine.data.sample_seeds import epoch_key
from tuneforge.engine.data.sampler import SampleRNG
from tuneforge.engine.data.tensor_tree import clone_inputs
from tuneforge.engine.feature_cache.cache import FeatureCache, Values
from tuneforge.engine.feature_cache.extract import FeatureExtractor, check_shape
from tuneforge.engine.feature_cache.graph_split import NotCacheableError, UntraceableError
from tuneforge.engine.model.inspection import (
    StateCopy,
    restore_rng_states,
    rng_states,
    same_leaf,
    same_rng_states,
)
from tuneforge.engine.model.modes import Modes, set_modes
from tuneforge.engine.model.module_state import bitwise_equal

ComputeLoss = Callable[[Batch], tuple[Tensor, Any]]
Execute = Callable[[Any, Tensor], "_Outcome"]


@attrs.frozen(eq=False)
class _Place:
    """A batch of the training split as it is extracted, and the samples of it that are verified.

    Args:
        indices: Its rows, int64 (b,).
        inputs: What the model takes.
        values: The features.
        chosen: Positions in the batch, int64.
    """

    indices: Tensor
    inputs: Any
    values: Values
    chosen: Tensor


@attrs.frozen(eq=False)
class _Outcome:
    """What a pass gave and left behind.

    Args:
        results: Loss, outputs and gradients, by path.
        model: What it changed in the model, by path.
        components: What it changed in the components that compute the loss.
        generators: The states of the random generators after it.
    """

    results: Mapping[str, Any]
    model: Mapping[str, Any]
    components: Mapping[str, Any]
    generators: Any


@attrs.frozen(eq=False)
class SplitVerification:
    """Compares the whole model with its two parts.

    Args:
        run: With the model frozen as the phase asks.
        cache: The model in two parts.
        extractor: Computes the features.
        modes: The modes of the phase.
        before: Restores the model.
        compute_loss: Returns the loss and the outputs of a batch; None where nothing is trained.
        weights: Factor of each training sample's loss (n,), or None.
    """

    run: Run
    cache: FeatureCache
    extractor: FeatureExtractor
    modes: Modes
    before: StateCopy
    compute_loss: ComputeLoss | None
    weights: Tensor | None
    components: StateCopy = attrs.field(
        default=attrs.Factory(lambda self: _copy_components(self.run, self.before), takes_self=True)
    )
    generators: Any = attrs.field(factory=rng_states)

    def verify(self) -> None:
        """Check the cut, and give the extractor the features that were computed on the way.

        Raises:
            NotCacheableError: The features would not do; or the samples are random.
            UntraceableError: The parts differ from the whole.
        """
        try:
            places = self._extract_places()
            self._compare_steps(places)
            self._compare_few(places)
            for path in self.before.changes():
                raise NotCacheableError(f"'{path}' of the model changes in a forward pass")
        finally:
            self._restore()
        for place in places:
            self.extractor.reuse(self.run.data.train, int(place.indices[0]), place.values)

    def _restore(self, model: Mapping[str, Any] | None = None) -> None:
        self.before.restore(model)
        self.components.restore()
        restore_rng_states(self.generators)

    def _extract_places(self) -> list[_Place]:
        """Return a batch of the beginning, the middle and the end of the training split, with its features."""
        split, size = self.run.data.train, self.extractor.batch_size
        starts = range(0, len(split), size)
        chosen_starts = sorted({starts[0], starts[len(starts) // 2], starts[-1]})
        places = []
        for number, start in enumerate(chosen_starts):
            indices = self.extractor.rows(split, start)
            inputs = self._prepare(indices)
            share = min(len(indices), size // len(chosen_starts) + (number < size % len(chosen_starts)))
            chosen = torch.arange(share) if number == 0 else torch.arange(len(indices) - share, len(indices))
            places.append(_Place(indices, inputs, self._extract(inputs), chosen))
        return places

    def _prepare(self, indices: Tensor, epoch: int = 0) -> Any:
        split = self.run.data.train
        samples = split.fetch(indices, epoch_key(self.run.config.seed, epoch))
        return self.extractor.prepare(split, indices, samples, 0)

    def _extract(self, inputs: Any) -> Values:
        """Return features as the extraction computes them."""
        self.run.model.module.eval()
        values = self.extractor.compute(clone_inputs(inputs))
        self._restore(self.before.changes(parameters=False))
        for value in values:
            check_shape(value, torch.Size([len(values[0]), *value.shape[1:]]))
        return values

    def _compare_steps(self, places: list[_Place]) -> None:
        """Compare a training step on samples of all places; their features are those of the batches they lie in."""
        indices = torch.cat([place.indices[place.chosen] for place in places])
        inputs = self._prepare(indices, epoch=0 if self.cache.num_augmented_copies else 1)
        self._check_not_random(inputs, places)
        gathered = tuple(
            torch.cat([place.values[index][place.chosen.to(place.values[index].device)] for place in places])
            for index in range(len(places[0].values))
        )
        execute = self._train if self.compute_loss is not None else self._evaluate
        whole = self._execute_whole(execute, inputs, indices)
        if self._find_difference(execute, whole, gathered, indices, inputs):
            # The bits of a sample's features may depend on the batch in which they were computed.
            values = self._extract(inputs)
            if difference := self._find_difference(execute, whole, values, indices, inputs):
                raise UntraceableError(f"the two parts of the model do not give the {difference} of the whole")
            _check_close(gathered, values)

    def _check_not_random(self, inputs: Any, places: list[_Place]) -> None:
        """Compare samples that were fetched in two epochs, unless their shapes depend on the batch."""
        if not isinstance(inputs, (Tensor, Mapping)):
            return
        once = [named_tensors(place.inputs) for place in places]
        for name, tensor in named_tensors(inputs).items():
            parts = [each[name][place.chosen.to(tensor.device)] for each, place in zip(once, places, strict=True)]
            if len({part.shape[1:] for part in (tensor, *parts)}) == 1 and not bitwise_equal(torch.cat(parts), tensor):
                raise NotCacheableError("the samples are random, so each epoch draws its own")

    def _compare_few(self, places: list[_Place]) -> None:
        """Compare an evaluation pass of a few samples, whose features must not depend on the samples beside them."""
        few = [place.indices[:1] for place in places] + [places[0].indices[-1:]]
        expected = [
            torch.cat([*(place.values[index][:1] for place in places), places[0].values[index][-1:]])
            for index in range(len(places[0].values))
        ]
        indices = torch.cat(few)
        inputs = self._prepare(indices)
        values = self._extract(inputs)
        whole = self._execute_whole(self._evaluate, inputs, indices)
        if difference := self._find_difference(self._evaluate, whole, values, indices, inputs):
            raise UntraceableError(f"the two parts of the model do not give the {difference} of the whole")
        _check_close(expected, values)

    def _execute_whole(self, execute: Execute, inputs: Any, indices: Tensor) -> _Outcome:
        try:
            whole = execute(clone_inputs(inputs), indices)
        except Exception as error:
            raise NotCacheableError(
                f"the model fails on a batch of {len(indices)} samples ({type(error).__name__})"
            ) from error
        for path in whole.model:
            if path not in self.before.registered:
                raise NotCacheableError(f"'{path}' of the model changes in a forward pass")
        return whole

    def _find_difference(
        self, execute: Execute, whole: _Outcome, values: Sequence[Tensor], indices: Tensor, inputs: Any
    ) -> str:
        """Return what the two parts give or leave behind otherwise than the whole, when they run on features."""
        crossing = values[: len(self.cache.split_model.cut.crossing)]
        stored = tuple(value.clone(memory_format=torch.contiguous_format) for value in crossing)  # as in the cache
        try:
            parts = execute(Features(stored, indices, lambda rows: inputs), indices)
        except Exception as error:
            raise UntraceableError(f"the two parts of the model cannot run ({type(error).__name__})") from error
        pairs = ((whole.results, parts.results), (whole.model, parts.model), (whole.components, parts.components))
        difference = next(filter(None, (_first_difference(*pair) for pair in pairs)), "")
        if not difference and not same_rng_states(whole.generators, parts.generators):
            return "random draws"
        return difference

    def _train(self, inputs: Any, indices: Tensor) -> _Outcome:
        run = self.run
        set_modes(self.modes)
        run.reseed()
        rng = SampleRNG(run.config.seed, run.epoch, indices)
        batch = make_batch(run, run.data.train, indices, inputs, rng, self.weights)
        assert self.compute_loss is not None
        with torch.enable_grad(), self._parts():
            loss, outputs = self.compute_loss(batch)
            torch.autograd.backward(loss)
        gradients = {f"gradient of {name}": each.grad for name, each in run.model.parameters().items()}
        return self._outcome({"loss": loss, "outputs": outputs, **gradients})

    def _evaluate(self, inputs: Any, indices: Tensor) -> _Outcome:
        del indices
        run = self.run
        run.model.module.eval()
        run.reseed()
        with torch.no_grad(), self._parts():
            outputs = run.forward_pass(run.model.module, inputs, evaluating=True)
        return self._outcome({"outputs": outputs})

    @contextlib.contextmanager
    def _parts(self) -> Iterator[None]:
        """Let forward passes of features go through the parts."""
        self.run.forward_pass.feature_cache = self.cache
        try:
            yield
        finally:
            self.run.forward_pass.feature_cache = None

    def _outcome(self, results: Mapping[str, Any]) -> _Outcome:
        leaves = StateCopy(results, copy=False).leaves
        outcome = _Outcome(leaves, self.before.changes(parameters=False), self.components.changes(), rng_states())
        self._restore(outcome.model)
        return outcome


def _copy_components(run: Run, before: StateCopy) -> StateCopy:
    """Copy the state of the components that take part in `train_step`."""
    owners = run.hooks.get_owners("train_step")
    components = {each.label: each.component for each in owners}
    return StateCopy({**components, "component states": run.engine_state.component_states}, known=before)


def _first_difference(whole: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Return the path of the first leaf that differs; "" if all are equal."""
    for path in dict.fromkeys([*whole, *parts]):
        if path not in whole or path not in parts or not same_leaf(whole[path], parts[path]):
            return repr(path)
    return ""


def _check_close(once: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Check that features of samples do not depend on the other samples of a batch.

    They may differ by what another batch size does to their last bits. The tolerance is relative to the largest
    element, because rounding errors of sums are.

    Raises:
        NotCacheableError: They do.
    """
    for one, other in zip(once, again, strict=True):
        check_shape(other, one.shape)
        largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.is_floating_point() else 0.0
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-4 * largest, equal_nan=True):
            raise NotCacheableError("the frozen backbone mixes samples")
