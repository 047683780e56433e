"""Studies: several experiments that differ in one thing, trained and recognized side by side."""
