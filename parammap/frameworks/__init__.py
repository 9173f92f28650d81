"""Frameworks: which files a checkpoint of each consists of, and which rank writes what. A folder
each."""
