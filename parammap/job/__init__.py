"""One conversion from end to end."""
