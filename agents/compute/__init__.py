"""Compute: engines that turn prompts into text, behind one port."""
