"""Adapters that read a model into towers: one file a family."""
