"""Chat models: asked through OpenAI's API or in this process, every answer at most once."""

from neuronlens.chat.budget import Budget, Estimate, Prices
from neuronlens.chat.local import TransformersChat
from neuronlens.chat.model import ChatModel, Reply
from neuronlens.chat.openai import OpenAIChat
from neuronlens.chat.replies import Exchange, ReplyStore
from neuronlens.chat.request import Message, Picture, Request, instruction

__all__ = [
    "Budget",
    "ChatModel",
    "Estimate",
    "Exchange",
    "Message",
    "OpenAIChat",
    "Picture",
    "Prices",
    "Reply",
    "ReplyStore",
    "Request",
    "TransformersChat",
    "instruction",
]
