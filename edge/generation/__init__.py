"""Answers from a decoder: sampling, grammars, drafts, and the loop that puts them together."""
