"""The HTTP gateway: FastAPI routes in front of the cluster."""
