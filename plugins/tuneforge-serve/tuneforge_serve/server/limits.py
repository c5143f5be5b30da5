"""Limits of the server."""

from __future__ import annotations

import attrs


@attrs.frozen
class Limits:
    """Limits of the server.

    Args:
        max_body_bytes: Largest body of a request.
        max_total_body_bytes: Largest size of all bodies that are being received or wait for their prediction.
        max_batch_size: Most samples of a forward pass.
        max_queue_size: Most samples that wait for a forward pass.
        max_wait_s: Longest time a request waits for others to join its batch, in seconds.
        request_timeout_s: Longest time from a complete request to its prediction, in seconds.
        body_timeout_s: Longest time for a body to arrive, in seconds.
        keep_alive_s: Seconds after which an idle connection is closed.
        max_header_bytes: Largest size of the headers of a request.
        max_connections: Most connections at a time.
    """

    max_body_bytes: int = 16 * 2**20
    max_total_body_bytes: int = 256 * 2**20
    max_batch_size: int = 32
    max_queue_size: int = 512
    max_wait_s: float = 0.005
    request_timeout_s: float = 30.0
    body_timeout_s: float = 20.0
    keep_alive_s: int = 10
    max_header_bytes: int = 16 * 2**10
    max_connections: int = 256
