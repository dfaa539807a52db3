"""Serve a model: an OpenAI-compatible HTTP server with a chat page, and a chat in the terminal."""
