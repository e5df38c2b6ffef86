"""ExplainHM: harmful memes detected with reasons, by a debate of language models and a small judge."""

__version__ = "0.1.0"
