"""Shelves: a folder with a GPT-2 in a tray, and what it computes in shelf.json."""
