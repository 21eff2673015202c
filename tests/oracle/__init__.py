"""The two stacks of the oracle test, the comparison of what they did, and the mutants."""
