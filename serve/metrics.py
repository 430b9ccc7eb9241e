"""Counts and times of a server, as Prometheus reads them (`GET /metrics`)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_UNCOUNTED = 64
"""Batches that are remembered at most until somebody asks."""
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """One server's own registry, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "tendon"}
        self.requests = Counter("requests", "Requests by wire and outcome", ["wire", "outcome"], **own)
        self.busy = Counter("refused_busy", "Requests refused since they could not be answered in time", **own)
        self.late = Counter("late", "Accepted requests whose deadline passed", **own)
        self.holds = Counter("holds", "Chunks the guard held, by the first word of its reason", ["reason"], **own)
        self.help = Counter("needs_help", "Times a session began to ask for help", **own)
        self.restarts = Counter("backend_restarts", "Times the model's process was lost or killed", **own)
        self.swaps = Counter("policy_swaps", "Policies swapped while serving", **own)
        self.queue = Gauge("queue_length", "Requests waiting", **own)
        self.running = Gauge("running", "Requests with the model", **own)
        self.sessions = Gauge("sessions", "Open connections by wire", ["wire"], **own)
        self.wait = Histogram("wait_seconds", "From accepted to with the model", buckets=_SECONDS, **own)
        self.inference = Histogram("inference_seconds", "Of a batch", buckets=_SECONDS, **own)
        self.batches = Histogram("batch_size", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64), **own)
        self._policy = Gauge("policy_info", "1 for the policy that answers", ["fingerprint"], **own)
        self._answered: list[tuple[int, float, list[float]]] = []
        """Batches that are not counted yet: to count takes longer than to remember."""

    def batch(self, size: int, seconds: float, waits: list[float]) -> None:
        """A batch was answered; those in it had waited so many seconds."""
        self._answered.append((size, seconds, waits))
        if len(self._answered) >= _UNCOUNTED:
            self._count()

    def _count(self) -> None:
        answered, self._answered = self._answered, []
        for size, seconds, waits in answered:
            self.batches.observe(size)
            self.inference.observe(seconds)
            for wait in waits:
                self.wait.observe(wait)

    def policy(self, fingerprint: str) -> None:
        """Which policy answers from now on."""
        self._policy.clear()
        self._policy.labels(fingerprint[:12]).set(1)

    def text(self) -> bytes:
        """The exposition format."""
        self._count()
        return generate_latest(self.registry)
