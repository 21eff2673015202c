"""What rows can be, one file a format, and how each becomes examples."""
