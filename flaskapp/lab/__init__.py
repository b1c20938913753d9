"""The race lab: the race, the explorer, the report. Loaded by its commands and its page only."""
