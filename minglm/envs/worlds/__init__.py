"""Provide worlds: tools, the program behind them, and a user who wants something of them (paper 3.4, function calling)."""
