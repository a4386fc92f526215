"""The service for programs: an HTTP API, a durable queue, and workers."""
