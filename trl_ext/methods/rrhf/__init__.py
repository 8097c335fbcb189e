"""RRHF."""
