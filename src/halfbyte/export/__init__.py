"""What is made of a finished run for use elsewhere."""
