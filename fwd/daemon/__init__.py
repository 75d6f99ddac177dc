"""The daemon process: ordered start and stop."""
