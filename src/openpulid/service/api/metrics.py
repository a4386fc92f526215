"""Figures of the service for Prometheus. None of them says anything about a person or a prompt."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Of HTTP. Any text can be a method; others are counted together."""

SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the durations that are counted together."""


class Metrics:
    """The figures of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "pulid_http_requests",
            "HTTP requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pulid_http_request_seconds",
            "Seconds until a request was answered, waiting for images included.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._waiting = Gauge(
            "pulid_waiting_images", "Images that wait in the queue.", registry=self.registry
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            method: of HTTP.
            route: its pattern, not its path, whose ids would be a figure each.
            status: of HTTP.
            seconds: until it was answered.
        """
        name = method if method in METHODS else "other"
        self._requests.labels(name, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self, waiting: int) -> bytes:
        """Return all figures in Prometheus' text format.

        Args:
            waiting: images that wait.
        """
        self._waiting.set(waiting)
        return generate_latest(self.registry)
