"""The routes of the service, and what stands between them and the queue."""
