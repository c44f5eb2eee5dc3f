"""Tasks, their sources, demonstrations and the tokens they become; nothing here knows a model."""
