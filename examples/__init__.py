"""Runnable examples, and the small trainer that the tests share with them."""
