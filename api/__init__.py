"""Sitter: a self-hosted image service in which every user has their own fine-tuned model."""

__version__ = "0.1.0"
