"""LangChain over Coase: a chat model, embeddings, and tools to spend a budget with."""

from .chat import ChatCoase
from .embeddings import CoaseEmbeddings
from .tools import HireTool, OffersTool, WalletTool, market_tools

__all__ = [
    "ChatCoase",
    "CoaseEmbeddings",
    "HireTool",
    "OffersTool",
    "WalletTool",
    "market_tools",
]
