"""What the service remembers: jobs, their files, and identities."""
