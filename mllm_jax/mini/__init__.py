"""The mini world, and how the shipped mini tower and mini LLM were made."""
