"""The cluster's pure rules in a network that never existed, on virtual time, by seed."""
