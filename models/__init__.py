"""What a model is: architecture facts, weights on disk, text to tokens. Imports nothing of ours."""
