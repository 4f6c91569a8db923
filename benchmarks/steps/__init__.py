"""Races of whole steps and whole trainings on a CPU: `python -m benchmarks.steps`."""
