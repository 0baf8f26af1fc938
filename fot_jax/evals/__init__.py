"""Evaluations: each takes a LanguageModel and a document source, gives rows and a plot."""
