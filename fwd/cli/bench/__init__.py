"""`fwd bench`: start-up, decode and streaming of a model, the ceiling first, and `transformers` beside it."""

import os

# NOTE: as the engine does for itself; without it `transformers` loses much of its speed when another process has work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
