"""The HTTP side: one middleware as its border, one room per dialect."""
