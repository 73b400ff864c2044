"""The compute plane: what runs inside a port, one OS process a rank."""
