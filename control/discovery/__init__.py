"""How machines find each other: strategies that see nodes, and the server that dials them."""
