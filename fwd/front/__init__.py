"""The front half's core: stream journal, engine supervision, and the local socket."""
