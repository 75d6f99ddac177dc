"""Speculation: drafters guess what comes next, the target's own samples decide, and no byte of an answer changes."""
