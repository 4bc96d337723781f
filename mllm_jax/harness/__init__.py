"""Adapters to evaluation harnesses, which ask the questions and score the answers."""
