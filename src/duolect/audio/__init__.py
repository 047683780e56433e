"""Audio: from files and bytes to samples, from samples to features."""
