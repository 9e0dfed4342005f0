"""Small tools that know nothing of the rest: clock, files, log, text."""
