"""The command line `parammap`, a module for each command."""
