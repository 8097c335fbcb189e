"""CLICK."""
