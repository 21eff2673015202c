"""Models for other programs' formats, which their own packages write in a Python of theirs."""
