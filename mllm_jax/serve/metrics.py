"""What Prometheus is told of a server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        kept = {"registry": self.registry}
        self.requests = Counter(
            "mllm_jax_requests",
            "Requests by their path and the status of the answer",
            ["path", "status"],
            **kept,
        )
        self.gone = Counter(
            "mllm_jax_clients_gone", "Clients that left before their answer was complete", **kept
        )
        self.prompt_tokens = Counter("mllm_jax_prompt_tokens", "Tokens of prompts", ["model"], **kept)
        self.answer_tokens = Counter("mllm_jax_answer_tokens", "Tokens of answers", ["model"], **kept)
        self.seconds = Histogram(
            "mllm_jax_answer_seconds",
            "From a request to the end of its answer",
            ["model"],
            buckets=_SECONDS,
            **kept,
        )
        self.first_seconds = Histogram(
            "mllm_jax_first_text_seconds",
            "From a request to the first text of a streamed answer",
            ["model"],
            buckets=_SECONDS,
            **kept,
        )

    def watch(self, name: str, text: str, read: Callable[[], float], model: str) -> None:
        """A gauge of a model, read whenever the numbers are asked for."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, text, ["model"], registry=self.registry)
        gauge.labels(model).set_function(read)

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
