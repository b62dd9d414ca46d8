"""The command line: parse, call an experiment, print."""
