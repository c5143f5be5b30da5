"""The bounds of a server."""

from __future__ import annotations

import attrs


@attrs.frozen
class Limits:
    """Bounds of a server.

    Args:
        max_body_bytes: Largest body of a request.
        max_total_body_bytes: All bodies that are being read or wait for their answer.
        max_batch_size: Most rows of one forward pass.
        max_queue_size: Most rows that wait for one.
        max_wait_s: Longest that a request waits for company that is on its way.
        request_timeout_s: Longest time from a whole request to its answer.
        body_timeout_s: Longest time that a body may take to arrive.
        header_timeout_s: Longest time that the head of a request may take to arrive.
        max_header_bytes: Largest head of a request.
        max_connections: Most connections at a time.
    """

    max_body_bytes: int = 16 * 2**20
    max_total_body_bytes: int = 256 * 2**20
    max_batch_size: int = 32
    max_queue_size: int = 512
    max_wait_s: float = 0.005
    request_timeout_s: float = 30.0
    body_timeout_s: float = 20.0
    header_timeout_s: float = 10.0
    max_header_bytes: int = 16 * 2**10
    max_connections: int = 256
