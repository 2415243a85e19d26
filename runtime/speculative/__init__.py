"""Speculative decoding: tokens are guessed cheaply, and one step of the model checks several guesses at once."""
