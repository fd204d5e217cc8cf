"""TTT-E2E: a language model that learns what it reads while it reads it (arXiv 2512.23675)."""

from engine.config import TTTConfig
from engine.model import TTTModel

__all__ = ["TTTConfig", "TTTModel"]
