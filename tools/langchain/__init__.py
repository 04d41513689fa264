"""LangChain's chat model over Coase: ``ChatCoase``."""

from .chat import ChatCoase

__all__ = ["ChatCoase"]
