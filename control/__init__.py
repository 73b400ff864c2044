"""The cluster's brain: supervision, instances, scheduling, gateway. Holds no tensor."""
