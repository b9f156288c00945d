"""Predicted against measured: each validation is a table of cases, with errors and coverage."""
