"""Best-of-n."""
