"""Train, evaluate and study multimodal LLMs and their connectors in JAX/Flax."""
