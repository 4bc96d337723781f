"""What a stage would need and how fast it could be on machines that are not here: `mllm-jax plan`."""
