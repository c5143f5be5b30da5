"""The bounds of a server."""

from __future__ import annotations

import attrs


@attrs.frozen
class Limits:
    """Bounds of a server.

    Args:
        body_bytes: Largest body of a request.
        held_bytes: All bodies that are being read or wait for their answer.
        batch_rows: Most rows of one forward pass.
        queue_rows: Most rows that wait for one.
        wait_s: Longest that a request waits for company that is on its way.
        request_s: Longest time from a whole request to its answer.
        body_s: Longest time that a body may take to arrive.
        head_s: Longest time that the head of a request may take to arrive.
        head_bytes: Largest head of a request.
        connections: Most connections at a time.
    """

    body_bytes: int = 16 * 2**20
    held_bytes: int = 256 * 2**20
    batch_rows: int = 32
    queue_rows: int = 512
    wait_s: float = 0.005
    request_s: float = 30.0
    body_s: float = 20.0
    head_s: float = 10.0
    head_bytes: int = 16 * 2**10
    connections: int = 256
