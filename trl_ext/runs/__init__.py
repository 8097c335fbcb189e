"""Runs of stages, and the loop over rounds."""
