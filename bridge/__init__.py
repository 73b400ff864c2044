"""The Erlang runtime in Python: terms, distribution, processes. Knows nothing of models or clusters."""
