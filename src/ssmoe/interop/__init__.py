"""Weights of other libraries, from their files alone: transformers itself is imported by tests only."""
