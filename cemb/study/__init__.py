"""The study: its grid of runs, what each measures, and the records of it."""
