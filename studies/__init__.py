"""Scenario files that answer a question, and later one page per system of the literature."""
