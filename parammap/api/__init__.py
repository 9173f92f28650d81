"""What `import parammap` offers to Python programs (docs/api.md)."""
