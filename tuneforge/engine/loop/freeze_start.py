"""The start of a freeze check: what a forward pass writes to frozen tensors is settled or refused before it."""

from __future__ import annotations

from tuneforge.engine.context.run import Run
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.engine.model.modes import Modes


def begin_freeze_check(run: Run, trainable: list[str], modes: Modes) -> FreezeCheck:
    """Return the freeze check of a step that is about to begin.

    Rows of a frozen embedding with `max_norm` are scaled now as its lookups would scale them.

    Raises:
        PluginError: The model's forward pass writes to a frozen tensor.
    """
    if len(trainable) < len(run.model.parameters()) and not run.model.pretrained:
        run.log(
            "  note: freezing preserves random weights, because the model is not pretrained; consider --strategy full"
        )
    writes = run.engine_state.forward_writes
    for name in writes.settle(run.model.module, trainable):
        run.log(f"  note: rows of '{name}' were scaled to max_norm {writes.rescaled[name][0]:g}, as lookups would")
    check = FreezeCheck.begin(run.model, trainable, modes)
    writes.check_frozen(check.frozen)
    return check
