"""Repair a repository with tools, the second agentic task of the paper: software engineering (paper 3.3)."""
