"""The embedded model and its drafter: ordinary model folders, and the code that made them."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
DRAFT = Path(__file__).parent / "draft"
