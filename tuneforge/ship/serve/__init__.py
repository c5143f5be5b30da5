"""A tuned model behind HTTP: the Open Inference Protocol for programs, `/predict` and a page for people.

A request passes through the files in this order: `server` (connections), `app` (who may ask, times, counts), `bounds`
(bodies), `people` or `protocol` (what is asked), `models` (which version answers), `batches` (the forward pass).
"""

from tuneforge.ship.serve.bounds import Limits as Limits
