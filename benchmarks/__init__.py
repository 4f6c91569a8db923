"""Races between sslkit's operations, their textbook formulas and the same code elsewhere."""
