"""The `pifa-deploy` command: handlers parse, call one function, print and exit."""
