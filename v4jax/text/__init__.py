"""Prompts to text, text to tokens, completions back to messages."""
