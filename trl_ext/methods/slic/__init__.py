"""SLiC-HF."""
