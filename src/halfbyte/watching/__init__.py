"""What is noticed in the losses of a run, and what follows from it; it sees numbers alone."""
