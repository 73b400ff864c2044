"""Files of models from the machines that have them: what is offered, served, fetched and kept."""
