"""Recognition: models and search put together. A decoding is a config; a recognizer runs it over audio."""
