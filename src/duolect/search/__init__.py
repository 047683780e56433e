"""Search: hypotheses from CTC log-probs and Scorers. Knows no model, no file and no name of a scorer."""
