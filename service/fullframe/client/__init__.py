"""Asking a server: `Client`, and `AsyncClient` for asyncio."""

from fullframe.client.messages import ServedModel
from fullframe.client.surfaces import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "ServedModel"]
