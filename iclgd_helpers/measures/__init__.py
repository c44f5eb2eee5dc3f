"""Numbers made of arrays: similarities, prediction metrics, intervals."""
