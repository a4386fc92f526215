"""The service on a Ray cluster: an ingress, and replicas that generate the images."""
