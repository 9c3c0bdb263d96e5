"""One module for each job runner; each translates the runner's hooks into units of work."""
