"""How the shipped mini vision tower and mini LLM were pretrained (`configs/mini_foundation.py`)."""
