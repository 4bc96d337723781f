"""Ask a model anything: loading, batches of requests, generation, likelihood."""
