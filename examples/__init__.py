"""Runnable examples, and the texts that the demo works on."""
