"""LangChain over Coase: a chat model, embeddings, and tools to spend a budget with."""

from .chat import ChatCoase
from .embeddings import CoaseEmbeddings

__all__ = ["ChatCoase", "CoaseEmbeddings"]
