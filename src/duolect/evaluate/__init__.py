"""Evaluation: normalization, word errors with their uncertainty, scale tuning, tables. Reads text and numbers, never a model; no torch."""
