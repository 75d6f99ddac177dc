"""fwd: one model on one machine, answering one tenant as fast as the memory allows."""

__version__ = "0.1.0"
