"""The Erlang runtime in Python: terms, distribution, processes; knows nothing of models."""
