"""Encode sources into archives on Ray Data: stages, commits, watching a source."""
