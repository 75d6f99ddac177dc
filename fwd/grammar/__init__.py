"""Grammars as text: what front and engine share, and the process that tries them before an engine gets them."""
