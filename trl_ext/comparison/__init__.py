"""Methods side by side: the same model, prompts and updates."""
