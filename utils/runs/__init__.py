"""The folder of a run: its files, its saved states, and who may write them."""
